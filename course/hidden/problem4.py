"""Problem 4 with more sequences, heads and blocks, and sinks planted elsewhere."""

import numpy as np

from course.checks.compare import close, same
from course.checks.scenarios import (
    first,
    observed,
    observers_refused,
    predicted,
    prefill_refused,
    prefill_rule,
    through_block,
)


def drawn(seed, *shape):
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def test_decoder_block_against_numpy(run):
    """Two sequences of two tokens, two heads of two channels: a mask on the wrong axis fits, and is
    wrong."""
    H, S_sink = drawn(1, 2, 2, 4), np.array([[True, False], [False, False]])
    for pre_rope in (False, True):
        seen = run(through_block, H, S_sink, pre_rope)
        X = (H + 1).astype(np.float64)
        sink = S_sink[:, :, None]
        K = 10 * X
        K_quant = np.where(sink, K, -K) + 0.5 if pre_rope else np.where(sink, K + 0.5, -(K + 0.5))
        V_quant = np.where(sink, 100 * X, -100 * X)
        H_ = 2 * (K_quant + V_quant) + H
        close(seen["H"], 4 * H_ + 7, f"H, pre_rope {pre_rope}", rtol=1e-4)
        same(
            seen["quantize_V"][1].transpose(0, 2, 1, 3).reshape(2, 2, 4),
            np.broadcast_to(sink, H.shape),
            "leave_out",
        )


def test_predict_sinks_of_many(run):
    """Each sequence its own k, by magnitude, in channel c: against sorting."""
    H = drawn(2, 5, 30, 7)
    for c, k in ((0, 1), (6, 4), (3, 29)):
        expected = np.zeros((5, 30), bool)
        for b in range(5):
            expected[b, np.argsort(-np.abs(H[b, :, c]))[:k]] = True
        same(run(predicted, H, c, k), expected, f"S_sink, k {k}")


def test_predict_sinks_of_none_and_all(run):
    """k = 0 and k = n."""
    same([run(predicted, drawn(3, 2, 6, 2), 0, k).sum() for k in (0, 6)], [0, 12], "how many")


def test_prefill_predicts_once(run):
    """A later block makes another token larger; an earlier one has made one large in another
    channel."""
    steps = drawn(4, 6, 3, 9, 5)
    steps[0, :, 1, 0], steps[4, :, 0, 2] = 1e3, 1e6
    for b, at in enumerate(([4, 8], [2, 3], [0, 7])):
        steps[2, b, at, 2] = [-700, 600]
    seen = run(prefill_rule, drawn(5, 3, 9, 5), steps, {"l_E": 3, "c": 2, "k": 2})
    expected = np.zeros((3, 9), bool)
    for b, at in enumerate(([4, 8], [2, 3], [0, 7])):
        expected[b, at] = True
    for l, mask in enumerate(seen["S_sink"], start=1):
        same(mask, expected & (l > 3), f"S_sink in block {l}")
    same(seen["kept"], expected, "S_sink")


def test_prefill_with_both_rules(run):
    """Token 0 up to block l_E = 1, then the predicted ones; l_E = L predicts after the last
    block."""
    steps, given = (
        np.zeros((3, 1, 5, 2), np.float32),
        np.array([[True, False, False, False, False]]),
    )
    steps[0, 0, 3, 1] = -9
    seen = run(prefill_rule, steps[1], steps, {"l_E": 1, "c": 1, "k": 1, "S_sink": given})
    sinks = [[False, False, False, True, False]]
    same(
        [mask.tolist() for mask in seen["S_sink"]],
        [given.tolist(), sinks, sinks],
        "S_sink, block by block",
    )
    seen = run(prefill_rule, steps[1], steps, {"l_E": 3, "c": 1, "k": 1})
    same([seen["S_sink"][2].any(), seen["kept"].tolist()], [False, sinks], "l_E = L")


def test_prefill_without_k(run):
    """k = "auto" keeps what reaches a tenth of the largest; pre_rope reaches the step; k = n is
    allowed."""
    steps = np.zeros((2, 1, 6, 2), np.float32)
    steps[0, 0, :, 1] = [1, -500, 60, 2, 49, -3]
    seen = run(prefill_rule, steps[1], steps, {"l_E": 1, "c": 1, "k": "auto", "pre_rope": True})
    same(
        [seen["kept"].tolist(), seen["pre_rope"]],
        [[[False, True, True, False, False, False]], [True, True]],
        "auto",
    )
    assert run(prefill_rule, steps[1], steps, {"l_E": 1, "c": 1, "k": 6})["kept"].all(), (
        "k = n does not keep all"
    )
    assert run(prefill_refused, steps[1], steps, {"l_E": 1, "c": 1, "k": 7}), (
        "k = n + 1: no ValueError"
    )


def test_pfn_of_none_and_of_more(run):
    """N = 0, N = n, and N above n; three sequences, as bool."""
    H = drawn(6, 3, 5, 2)
    for N, kept in ((0, 0), (1, 1), (5, 5), (8, 5)):
        mask = run(first, H, N)
        same(
            [mask.tolist(), mask.dtype.name],
            [[[i < kept for i in range(5)]] * 3, "bool"],
            f"N = {N}",
        )


def test_observers_serve_several_caches(run):
    """Three caches of four blocks, in one pass: each quantizer sees its own block's Keys or Values,
    without the sinks."""
    X, mask = drawn(7, 2, 3, 5, 4), drawn(8, 2, 1, 5, 1) > 0
    seen, returned = run(observed, 3, 4, X, mask)
    same(
        sorted(seen),
        sorted(f"{i} {l} {name}" for i in range(3) for l in range(1, 5) for name in "KV"),
        "quantizers",
    )
    for name, (given, leave_out) in seen.items():
        _, l, kind = name.split()
        close(given, (int(l) if kind == "K" else -int(l)) * X, f"what calibrates {name}")
        same(leave_out, mask, "leave_out")
    close(returned[3][1], -4 * X, "V of block 4")


def test_observers_count_blocks_from_1(run):
    """NotFinite in the first block and in the last."""
    for broken in (1, 4):
        error = run(observers_refused, 4, broken)
        assert error and error[0] == "NotFinite" and f"block {broken}" in error[1], (
            f"{error}: not block {broken}"
        )
