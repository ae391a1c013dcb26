"""Problem 3 against NumPy in float64: RoPE as complex numbers, attention in loops."""

import numpy as np

from course.checks.compare import close, same
from course.checks.problem3 import LLAMA31, drawn
from course.checks.scenarios import attended, mask, rope, rotated


def frequencies(d_k, theta, scaling):
    f = theta ** (-np.arange(0, d_k, 2) / d_k)
    if scaling.get("rope_type") == "linear":
        return f / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        turns = scaling["original_max_position_embeddings"] * f / (2 * np.pi)
        low = 1.0
        high = 4.0
        mix = np.clip((turns - low) / (high - low), 0, 1)
        return f * (mix + (1 - mix) / scaling["factor"])
    return f


def test_rope_table_against_numpy(run):
    """Four families, heads of 8 and 32 channels, 200 tokens."""
    scalings = ({}, {"rope_type": "linear", "factor": 3.0}, LLAMA31, {**LLAMA31, "factor": 32.0})
    for scaling in scalings:
        for d_k, theta in ((8, 10000.0), (32, 500000.0)):
            config = {"head_dim": d_k, "rope_theta": theta, "rope_scaling": scaling}
            cos, sin = run(rope, config, 200)
            angle = np.tile(np.outer(np.arange(200), frequencies(d_k, theta, scaling)), 2)
            close(cos, np.cos(angle), f"cos of {scaling.get('rope_type')}", atol=5e-5)
            close(sin, np.sin(angle), f"sin of {scaling.get('rope_type')}", atol=5e-5)


def test_apply_rope_against_complex_numbers(run):
    """Channels i and i + d_k/2 are one complex number, which is multiplied by exp(1j angle)."""
    X = drawn(11, 2, 3, 40, 8)
    angle = np.outer(np.arange(40), [1, 0.3, 0.1, 0.02])
    expected = (X[..., :4] + 1j * X[..., 4:]) * np.exp(1j * angle)
    expected = np.concatenate([expected.real, expected.imag], -1)
    table = np.tile(angle, 2)
    X, _ = run(rotated, X, np.cos(table).astype(np.float32), np.sin(table).astype(np.float32))
    close(X, expected, "rotated", atol=2e-5)


def test_apply_rope_in_fp32(run):
    """Half precision is rotated in fp32 and rounded once, to the dtype of X."""
    X = drawn(12, 1, 1, 500, 8).astype(np.float16).astype(np.float32)
    angle = np.tile(np.outer(np.arange(500), [1, 0.3, 0.1, 0.02]), 2)
    table = [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
    exact, _ = run(rotated, X, *table)
    rounded, dtype = run(rotated, X, *table, "float16")
    same(dtype, "torch.float16", "dtype")
    same(rounded, exact.astype(np.float16).astype(np.float32), "rotated")


def test_causal_mask_of_all_sizes(run):
    """Windows below, at and above n; with a window of 1, a token sees itself only."""
    for n in (1, 5, 9):
        for window in (None, 1, 3, n, n + 4):
            age = np.subtract.outer(np.arange(n), np.arange(n))
            expected = (age >= 0) & (age < (window or n))
            close(run(mask, n, window), expected, f"n {n}, window {window}")


def test_attention_against_loops(run):
    """Six query heads on three Key heads, with windows and without, in two sequences."""
    Q = drawn(13, 2, 6, 11, 8)
    K = drawn(14, 2, 3, 11, 8)
    V = drawn(15, 2, 3, 11, 8)
    for window in (None, 1, 4, 11, 30):
        A = np.zeros((2, 11, 6, 8))
        for b, h, t in np.ndindex(2, 6, 11):
            seen = slice(max(0, t - (window or 11) + 1), t + 1)
            p = np.exp(K[b, h // 2, seen].astype(np.float64) @ Q[b, h, t] / np.sqrt(8))
            A[b, t, h] = p / p.sum() @ V[b, h // 2, seen]
        actual = run(attended, Q, K, V, window)
        close(actual, A.reshape(2, 11, 48), f"A, window {window}", rtol=1e-4, atol=1e-5)
