"""What the tests of paper/activations.py, table1.py, table3.py and figures.py look at: two models
on texts with sinks."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import kvsink
from kvsink import Site
from llama import apply_rope, rope_table
from paper import command
from paper.activations import examine, static_quantizers
from support import hub, text
from support.tokenizer import Tokenizer
from tests.helpers import CHANNEL, EMERGENCE, STRONG, WEAK, loaded, ordinary_tokens, planted_model

PLACES = ([5, 22], [17, 18], [0, 9], [30, 31])  # of the sinks in each of four windows of 40 tokens


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
    subject = examine(
        "planted", "by hand", planted_model(), None, windows[:2], Site(EMERGENCE, CHANNEL)
    )
    return replace(subject, quantizers=static_quantizers(subject, windows[2:]))


@functools.cache
def keys_and_values(window):
    """Of the planted model's blocks 3 to 6 on one of the windows, in float64: l -> {"K", "V"}, each
    (h_kv, n, d_k), from the parts of the block."""
    model, tokens, found = planted_model(), planted_windows()[window], {}
    H, rope = model.embedding(tokens), rope_table(model.config, 40, "cpu")
    for l, block in enumerate(model.blocks, start=1):
        _, K, V = block.QKV(block.LN_mhsa(H))
        found[l] = {
            "K": apply_rope(K, rope)[0].numpy().astype(np.float64),
            "V": V[0].numpy().astype(np.float64),
        }
        H = block(H, rope)
    return {l: found[l] for l in (3, 4, 5, 6)}


def seen_in_calibration(l, name, kept):
    """The Keys or Values (h_kv, tokens, d_k) that a static range of block l comes from: all, or all
    but the sinks'."""
    parts = [
        np.delete(keys_and_values(window)[l][name], PLACES[window] if kept else [], axis=1)
        for window in (2, 3)
    ]
    return np.concatenate(parts, axis=1)


def static_numpy(X, bits, seen, granularity):
    """Equations 10-13 with the ranges of `seen` (heads, tokens, d_k): of a head ("token": 8
    channels fit into one group of 16) or of a channel."""
    axes = (1, 2) if granularity == "token" else (1,)
    lo, hi = seen.min(axes, keepdims=True), seen.max(axes, keepdims=True)
    s = (hi - lo) / (2**bits - 1)
    z = -np.round(lo / s)
    return s * (np.clip(np.round(X / s) + z, 0, 2**bits - 1) - z)


@functools.cache
def default_subject(directory):
    """The default model on two packed windows, calibrated on another two (the command takes
    four)."""
    model, tokenizer = loaded(directory), Tokenizer.from_pretrained(directory)
    windows = [
        window[None] for window in text.windows(tokenizer, "wiki-sample", "test", 1024, 2, 0)
    ]
    subject = examine(
        "smollm2-135m", "packed", model, tokenizer, windows, kvsink.table_site(hub.DEFAULT_MODEL)
    )
    calibration = text.windows(tokenizer, "wiki-sample", "train", 1024, 2, 0)
    return replace(
        subject, quantizers=static_quantizers(subject, [window[None] for window in calibration])
    )


@pytest.fixture
def evidence(default_model):
    return default_subject(default_model)


@pytest.fixture
def drawable(tiny, monkeypatch, tmp_path):
    """The planted model as a command gets it, with prompts of the paper's form in which it has
    sinks: options."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    prompts = ("The sinks \x07 are here\x0b, not there.", "Summer \x07is $warm$. Winter")
    monkeypatch.setattr(kvsink, "PROMPTS", prompts)
    monkeypatch.setattr(hub, "PROMPTS", prompts)
    monkeypatch.setattr(
        command, "calibration_windows", lambda *_: ordinary_tokens(256, 9).view(4, 64)
    )
    return ["--model", tiny[1], "--out", str(tmp_path / "out")]
