"""Two models on texts with sinks, which the tests of paper/activations.py, table1.py, table3.py and
figures.py share."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import kvsink
import support.site
from kvsink import Site
from llama import apply_rope, rope_table
from paper import command
from paper.activations import examine, static_quantizers
from support import hub, text
from support.tokenizer import Tokenizer
from tests.helpers import CHANNEL, EMERGENCE, STRONG, WEAK, loaded, ordinary_tokens, planted_model

# The sinks of each of four windows of 40 tokens.
PLACES = ([5, 22], [17, 18], [0, 9], [30, 31])


@functools.cache
def planted_windows():
    windows = [ordinary_tokens(40, seed)[None] for seed in range(4)]
    for window, places in zip(windows, PLACES):
        window[0, places] = torch.tensor([STRONG, WEAK])
    return windows


@functools.cache
def planted_subject():
    """The planted model on two windows, calibrated on the other two. Its sinks are the marked
    tokens."""
    windows = planted_windows()
    site = Site(EMERGENCE, CHANNEL)
    names = {"name": "planted", "text": "by hand", "tokenizer": None}
    subject = examine(planted_model(), windows[:2], site, **names)
    return replace(subject, quantizers=static_quantizers(subject, windows[2:]))


@functools.cache
def keys_and_values(window):
    """Return, for the planted model's blocks 3 to 6 on one of the windows, l -> {"K", "V"}, each
    (h_kv, n, d_k) in float64, made by the parts of the block."""
    model = planted_model()
    H = model.embedding(planted_windows()[window])
    rope = rope_table(model.config, 40, "cpu")
    tensors = {}
    for l, block in enumerate(model.blocks, start=1):
        _, K, V = block.QKV(block.LN_mhsa(H))
        tensors[l] = {
            "K": apply_rope(K, rope)[0].numpy().astype(np.float64),
            "V": V[0].numpy().astype(np.float64),
        }
        H = block(H, rope)
    return {l: tensors[l] for l in (3, 4, 5, 6)}


def calibration_tensor(l, name, kept):
    """Return the Keys or Values (h_kv, tokens, d_k) that a static range of block l comes from: all
    of them or, if `kept` is True, all but the sinks'."""
    parts = []
    for window in (2, 3):
        X = keys_and_values(window)[l][name]
        parts.append(np.delete(X, PLACES[window] if kept else [], axis=1))
    return np.concatenate(parts, axis=1)


def static_numpy(X, bits, calibration, granularity):
    """Apply Equations 10-13 with the ranges of `calibration` (heads, tokens, d_k): those of a head
    ("token", because 8 channels fit into one group of 16), or of a channel."""
    axes = (1, 2) if granularity == "token" else (1,)
    lo = calibration.min(axes, keepdims=True)
    hi = calibration.max(axes, keepdims=True)
    s = (hi - lo) / (2**bits - 1)
    z = -np.round(lo / s)
    return s * (np.clip(np.round(X / s) + z, 0, 2**bits - 1) - z)


@functools.cache
def default_subject(directory):
    """The default model on two packed windows, calibrated on another two (the command takes
    four)."""
    tokenizer = Tokenizer.from_pretrained(directory)
    windows = text.windows(tokenizer, "wiki-sample", "test", 1024, 2, 0)
    site = kvsink.table_site(hub.DEFAULT_MODEL)
    names = {"name": "smollm2-135m", "text": "packed", "tokenizer": tokenizer}
    subject = examine(loaded(directory), [window[None] for window in windows], site, **names)
    calibration = text.windows(tokenizer, "wiki-sample", "train", 1024, 2, 0)
    quantizers = static_quantizers(subject, [window[None] for window in calibration])
    return replace(subject, quantizers=quantizers)


@pytest.fixture
def evidence(default_model):
    return default_subject(default_model)


@pytest.fixture
def drawable(tiny, monkeypatch, tmp_path):
    """The options of a command on the planted model, with prompts of the paper's form in which it
    has sinks."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    prompts = ("The sinks \x07 are here\x0b, not there.", "Summer \x07is $warm$. Winter")
    monkeypatch.setattr(kvsink, "PROMPTS", prompts)
    monkeypatch.setattr(support.site, "PROMPTS", prompts)
    windows = ordinary_tokens(256, 9).view(4, 64)
    monkeypatch.setattr(command, "calibration_windows", lambda *_: windows)
    return ["--model", tiny[1], "--out", str(tmp_path / "out")]
