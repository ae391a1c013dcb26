"""Problem 3, RoPE and attention: examples worked by hand, and properties."""

import numpy as np

from .compare import close, same
from .scenarios import attended, mask, rope, rotated

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def drawn(seed, *shape):
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def test_rope_table_by_hand(run):
    """Heads have 4 channels and theta is 100: pair 0 turns by 1 per token, pair 1 by 1/10. Channel
    i is paired with i + 2."""
    cos, sin = run(rope, {"head_dim": 4, "rope_theta": 100.0}, 3)
    angle = np.float64([[0, 0, 0, 0], [1, 0.1, 1, 0.1], [2, 0.2, 2, 0.2]])
    close(cos, np.cos(angle), "cos")
    close(sin, np.sin(angle), "sin")


def test_rope_table_linear(run):
    """A factor of 4 makes every pair turn four times more slowly."""
    scaling = {"rope_type": "linear", "factor": 4.0}
    cos, _ = run(rope, {"head_dim": 4, "rope_theta": 100.0, "rope_scaling": scaling}, 3)
    close(cos[2], np.cos([0.5, 0.05, 0.5, 0.05]), "cos")


def test_rope_table_llama3(run):
    """Pair 0 makes ten turns in the original context of 64 tokens, which is fast; pair 1 makes a
    thousandth of that, which is slow."""
    cos, _ = run(rope, {"head_dim": 4, "rope_theta": 1e6, "rope_scaling": LLAMA31}, 5)
    close(cos[4], np.cos([4, 4e-3 / 8, 4, 4e-3 / 8]), "cos")


def test_apply_rope_by_hand(run):
    """A quarter of a turn: channels (1, 2, 3, 4) are the pairs (1, 3) and (2, 4), which become
    (-3, 1) and (-4, 2)."""
    X = np.float32([1, 2, 3, 4]).reshape(1, 1, 1, 4)
    X, _ = run(rotated, X, np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32))
    close(X.ravel(), [-3, -4, 1, 2], "rotated")


def test_apply_rope_keeps_lengths_and_differences(run):
    """Rotation changes no length, and the product of a query and a Key depends on how far apart
    they are."""
    angle = np.outer(np.arange(10), [1, 0.1, 1, 0.1]).astype(np.float32)
    before = np.repeat(drawn(0, 1, 2, 1, 4), 10, axis=2)  # the same at each position
    after, _ = run(rotated, before, np.cos(angle), np.sin(angle))
    close((after**2).sum(-1), (before**2).sum(-1), "lengths", rtol=1e-4)
    products = after[0, 0] @ after[0, 0].T
    close(products[2:, 2:], products[:-2, :-2], "products", rtol=1e-3, atol=1e-4)


def test_apply_rope_keeps_the_dtype(run):
    """A tensor in bf16 comes back in bf16."""
    ones = np.ones((1, 4), np.float32)
    _, dtype = run(rotated, np.ones((1, 1, 1, 4), np.float32), ones, ones, "bfloat16")
    same(dtype, "torch.bfloat16", "dtype")


def test_causal_mask_by_hand(run):
    """Token 2 of 4 sees 0, 1 and 2; with a window of 2 it sees 1 and 2."""
    close(run(mask, 4, None), np.tril(np.ones((4, 4))), "mask")
    close(run(mask, 4, 2), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], "mask")


def test_attention_of_equal_keys(run):
    """If all Keys are 0, each token gets the mean of the Values that it sees."""
    V = drawn(1, 1, 2, 5, 4)
    A = run(attended, drawn(2, 1, 2, 5, 4), np.zeros_like(V), V, None)
    means = V.cumsum(2) / np.arange(1, 6)[:, None]
    close(A, means.transpose(0, 2, 1, 3).reshape(1, 5, 8), "A")


def test_attention_by_hand(run):
    """d_k is 4: query 1 has the products 2 and 0 with the Keys, so the scores 1 and 0."""
    Q = np.zeros((1, 1, 2, 4), np.float32)
    K = np.zeros((1, 1, 2, 4), np.float32)
    Q[0, 0, 1, 0] = 1
    K[0, 0, 0, 0] = 2
    V = np.float32([[1, 0, 0, 0], [0, 1, 0, 0]]).reshape(1, 1, 2, 4)
    e = np.e
    close(run(attended, Q, K, V, None)[0], [[1, 0, 0, 0], [e / (e + 1), 1 / (e + 1), 0, 0]], "A")


def test_attention_shares_keys_among_queries(run):
    """Query heads 0 and 1 of four have Key head 0, query heads 2 and 3 have Key head 1."""
    V = np.float32([10, 20]).reshape(1, 2, 1, 1)
    A = run(attended, drawn(3, 1, 4, 1, 1), drawn(4, 1, 2, 1, 1), V, None)
    close(A, [[[10, 10, 20, 20]]], "A")


def test_attention_in_a_window(run):
    """If all Keys are equal and the window is 2, a token gets the mean of its own Value and the
    one before it."""
    V = drawn(5, 1, 1, 6, 4)
    A = run(attended, drawn(6, 1, 1, 6, 4), np.zeros_like(V), V, 2)
    close(A[0, 0], V[0, 0, 0], "A of token 0")
    close(A[0, 1:], (V[0, 0, 1:] + V[0, 0, :-1]) / 2, "A")
