"""Problem 4 with more sequences, heads and blocks, and sinks planted elsewhere."""

import numpy as np

from course.checks.compare import close, same
from course.checks.problem3 import drawn
from course.checks.scenarios import (
    first,
    observed,
    observers_refused,
    predicted,
    prefill_rule,
    refused,
    through_block,
)


def test_prefill_predicts_once(run):
    """A later block makes another token larger; an earlier one has made one large in another
    channel."""
    steps = drawn(4, 6, 3, 9, 5)
    steps[0, :, 1, 0] = 1e3
    steps[4, :, 0, 2] = 1e6
    sinks = np.zeros((3, 9), bool)
    for b, places in enumerate(([4, 8], [2, 3], [0, 7])):
        steps[2, b, places, 2] = [-700, 600]
        sinks[b, places] = True
    seen = run(prefill_rule, drawn(5, 3, 9, 5), steps, {"l_E": 3, "c": 2, "k": 2})
    for l, mask in enumerate(seen["S_sink"], start=1):
        same(mask, sinks & (l > 3), f"S_sink in block {l}")
    same(seen["kept"], sinks, "S_sink")


def test_prefill_with_both_rules(run):
    """Token 0 up to block l_E = 1, then the predicted ones; l_E = L predicts after the last
    block."""
    H = np.zeros((1, 5, 2), np.float32)
    steps = np.zeros((3, 1, 5, 2), np.float32)
    steps[0, 0, 3, 1] = -9
    mask = np.array([[True, False, False, False, False]])
    sinks = [[False, False, False, True, False]]
    seen = run(prefill_rule, H, steps, {"l_E": 1, "c": 1, "k": 1, "S_sink": mask})
    masks = [mask.tolist() for mask in seen["S_sink"]]
    same(masks, [mask.tolist(), sinks, sinks], "S_sink, block by block")
    seen = run(prefill_rule, H, steps, {"l_E": 3, "c": 1, "k": 1})
    same([seen["S_sink"][2].any(), seen["kept"].tolist()], [False, sinks], "l_E = L")


def test_prefill_without_k(run):
    """k = "auto" keeps the tokens that reach a tenth of the largest; k = n is allowed, k = n + 1
    refused."""
    H = np.zeros((1, 6, 2), np.float32)
    steps = np.zeros((2, 1, 6, 2), np.float32)
    steps[0, 0, :, 1] = [1, -500, 60, 2, 49, -3]
    seen = run(prefill_rule, H, steps, {"l_E": 1, "c": 1, "k": "auto"})
    same(seen["kept"].tolist(), [[False, True, True, False, False, False]], "auto")
    seen = run(prefill_rule, H, steps, {"l_E": 1, "c": 1, "k": 6})
    assert seen["kept"].all(), "k = n does not keep all"
    error = run(refused, "prefill_rule", H, steps, {"l_E": 1, "c": 1, "k": 7})
    assert error, "k = n + 1: no ValueError"


def test_decoder_block_against_numpy(run):
    """Two sequences of two tokens, two heads of two channels: a sink of one sequence keeps its Key
    and Value in both heads."""
    H = drawn(1, 2, 2, 4)
    S_sink = np.array([[True, False], [False, False]])
    seen = run(through_block, H, S_sink)
    sink = S_sink[:, :, None]
    X = (H + 1).astype(np.float64)
    K = 10 * X + 0.5
    V = 100 * X
    K_quant = np.where(sink, K, -K)
    V_quant = np.where(sink, V, -V)
    H_ = 2 * (K_quant + V_quant) + H
    close(seen["H"], 4 * H_ + 7, "H", rtol=1e-4)
    mask = seen["quantize_V"][1].transpose(0, 2, 1, 3).reshape(2, 2, 4)
    same(mask, np.broadcast_to(sink, H.shape), "leave_out")


def test_predict_sinks_of_many(run):
    """Each sequence has its own k sinks, by magnitude, in channel c: against sorting."""
    H = drawn(2, 5, 30, 7)
    for c, k in ((0, 1), (6, 4), (3, 29)):
        expected = np.zeros((5, 30), bool)
        for b in range(5):
            expected[b, np.argsort(-np.abs(H[b, :, c]))[:k]] = True
        same(run(predicted, H, c, k), expected, f"S_sink, k {k}")


def test_predict_sinks_of_none_and_all(run):
    """k = 0 and k = n are allowed."""
    same([run(predicted, drawn(3, 2, 6, 2), 0, k).sum() for k in (0, 6)], [0, 12], "how many")


def test_predict_sinks_without_k_of_many(run):
    """k = "auto" keeps as many as stand out in each sequence, in channel c."""
    H = np.ones((2, 30, 3), np.float32)
    H[0, [5, 28], 2] = [-700, 80]
    H[1, 11, 2] = 40
    H[:, 0, 1] = 5000
    expected = np.zeros((2, 30), bool)
    expected[0, [5, 28]] = True
    expected[1, 11] = True
    same(run(predicted, H, 2, "auto"), expected, "S_sink, auto")


def test_pfn_of_none_and_of_more(run):
    """N = 0, N = n, and N above n, for three sequences, as bool."""
    H = drawn(6, 3, 5, 2)
    for N, kept in ((0, 0), (1, 1), (5, 5), (8, 5)):
        mask = run(first, H, N)
        expected = [[i < kept for i in range(5)]] * 3
        same([mask.tolist(), mask.dtype.name], [expected, "bool"], f"N = {N}")


def test_observers_serve_several_schemes(run):
    """Three schemes of four blocks, in one pass: each quantizer gets its own block's Keys or
    Values, without the sinks."""
    X = drawn(7, 2, 3, 5, 4)
    mask = drawn(8, 2, 1, 5, 1) > 0
    seen, returned = run(observed, 3, 4, X, mask)
    names = [f"{i} {l} {kind}" for i in range(3) for l in range(1, 5) for kind in "KV"]
    same(sorted(seen), sorted(names), "quantizers")
    for name, (given, leave_out) in seen.items():
        _, l, kind = name.split()
        factor = int(l) if kind == "K" else -int(l)
        close(given, factor * X, f"what calibrates {name}")
        same(leave_out, mask, "leave_out")
    close(returned[3][1], -4 * X, "V of block 4")


def test_observers_count_blocks_from_1(run):
    """NotFinite names the first block, and the last."""
    for broken in (1, 4):
        error = run(observers_refused, 4, broken)
        good = error and error[0] == "NotFinite" and f"block {broken}" in error[1]
        assert good, f"{error}: not block {broken}"
