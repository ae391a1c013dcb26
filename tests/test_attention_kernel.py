"""The kernels of paper/attention_kernel.py against the same attention in PyTorch, which
test_kvcache.py holds to float64: on a GPU, or else in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvsink import rtn_quantizers
from paper.kvcache import CacheShape, FullPrecisionBlockCache, PackedBlockCache

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def errors():
    """What attention_cases.py prints."""
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "tests.attention_cases"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_kernels_agree_with_pytorch(errors):
    """Factors are rounded to twice 8 bits on a GPU, to twice 11 in the interpreter. In full
    precision the output has 11."""
    assert len(errors) == 25
    for *case, error in errors:
        assert error < (1e-3 if case[0] == "full" else 2e-4), case


# What is changed in the shape of a cache, its quantizers, or the block; whether kernels serve it.
@pytest.mark.parametrize("scheme, group, changes, expected", [
    ("channel-static", 64, {}, True),
    ("channel-dynamic", 64, {}, True),
    ("token-dynamic", 64, {}, True),
    ("full", None, {"dtype": torch.bfloat16}, True),
    ("full", None, {"dtype": torch.float32}, False),
    ("token-dynamic", 32, {}, False),  # two scales in a token
    ("channel-dynamic", 32, {}, False),  # a block of tokens with two scales
    ("channel-static", 64, {"h": 18}, False),  # nine queries for each Key
    ("channel-static", 64, {"n": 100}, False),
    ("channel-static", 64, {"pre_rope": True}, False),
])  # fmt: skip
def test_which_caches_the_kernels_serve(scheme, group, changes, expected):
    from paper.attention_kernel import can_serve

    changes = dict(changes)
    pre_rope = changes.pop("pre_rope", False)
    shape = CacheShape(1, 128, 2, 4, 2, 64, torch.float16, torch.device("cpu"))
    shape = replace(shape, **changes)
    if scheme == "full":
        block = FullPrecisionBlockCache(shape)
    else:
        pair = rtn_quantizers(SimpleNamespace(blocks=range(1)), scheme, 4, group)[0]
        for quantizer in pair:
            if quantizer.static:
                quantizer.calibrate(torch.randn(1, 2, 10, 64))
        block = PackedBlockCache(pair, shape, pre_rope)
    assert block.kernel is None  # on a CPU
    assert can_serve(block, shape) == expected
