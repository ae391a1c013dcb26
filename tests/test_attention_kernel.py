"""The kernels of paper/attention_kernel.py against the same attention in PyTorch, which
test_kvcache.py holds to float64: on a GPU, or else in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert len(errors) == 40
    for *case, error in errors:
        assert error < (1e-3 if case[0] == "full" else 2e-4), case
