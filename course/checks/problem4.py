"""Problem 4, Algorithm 1: a block whose parts can be followed by hand, and a model whose blocks add
given numbers. Nothing here needs your solutions of other problems."""

import numpy as np

from .compare import close, same
from .scenarios import (
    first,
    observed,
    observers_refused,
    predicted,
    prefill_rule,
    refused,
    through_block,
)

TWO = np.float32([[[0], [1]]])  # H (1, 2, 1)
SECOND = np.array([[False, True]])  # the second token is a sink
ZERO = np.zeros((2, 4, 3), np.float32)  # H^0 of two sequences of four tokens


def test_prefill_takes_each_block_in_turn(run):
    """Blocks 1 to 3 each get their own pair of quantizers and the table of RoPE; H^3 is the sum of
    what they add."""
    steps = np.arange(3 * 24, dtype=np.float32).reshape(3, 2, 4, 3)
    seen = run(prefill_rule, ZERO, steps, {})
    same(seen["block"], [1, 2, 3], "blocks")
    same(seen["quantizers"], [["K1", "V1"], ["K2", "V2"], ["K3", "V3"]], "quantizers")
    same(seen["rope"], ["config, 4 tokens"] * 3, "rope")
    close(seen["H"], steps.sum(0), "H^L")
    assert not seen["kept"].any(), "nothing should be kept"


def test_prefill_predicts_after_block_l_E(run):
    """l_E = 2 of 4: nothing is kept in blocks 1 and 2, and the largest token of channel 1 in blocks
    3 and 4."""
    steps = np.zeros((4, 2, 4, 3), np.float32)
    steps[1, 0, 2, 1] = -50
    steps[1, 1, 3, 1] = 40
    seen = run(prefill_rule, ZERO, steps, {"l_E": 2, "c": 1, "k": 1})
    nothing = [[False] * 4] * 2
    sinks = [[False, False, True, False], [False, False, False, True]]
    masks = [mask.tolist() for mask in seen["S_sink"]]
    same(masks, [nothing, nothing, sinks, sinks], "S_sink, block by block")
    same(seen["kept"], sinks, "S_sink")


def test_prefill_keeps_the_mask_it_is_given(run):
    """PFN: the mask given at the start holds in all blocks."""
    mask = np.array([[True, False, False, False]] * 2)
    seen = run(prefill_rule, ZERO, np.zeros((3, 2, 4, 3), np.float32), {"S_sink": mask})
    masks = [mask.tolist() for mask in seen["S_sink"]]
    same(masks, [mask.tolist()] * 3, "S_sink, block by block")


def test_prefill_refuses_more_than_there_are(run):
    """Five of four tokens: ValueError."""
    steps = np.zeros((1, 2, 4, 3), np.float32)
    assert run(refused, "prefill_rule", ZERO, steps, {"l_E": 1, "c": 0, "k": 5}), "no ValueError"


def test_decoder_block_by_hand(run):
    """scenarios.py says what the parts do. X is 1 and 2, K is 10.5 and 20.5, V is 100 and 200. The
    first token is quantized to -10.5 and -100. So A is -110.5 and 220.5, H' is -221 and 442, and
    the output is 4 H' + 7."""
    seen = run(through_block, TWO, SECOND)
    close(seen["attention"][0].ravel(), [1.5, 2.5], "Q")
    close(seen["attention"][1].ravel(), [-10.5, 20.5], "K after quantization")
    close(seen["attention"][2].ravel(), [-100, 200], "V after quantization")
    close(seen["H"].ravel(), [-877, 1775], "H")


def test_decoder_block_keeps_tokens_in_every_head(run):
    """Two sequences of two tokens in two heads: the second token of the first sequence is a sink,
    and keeps its Key and Value in both heads. (A mask on another axis would fit, too.)"""
    H = np.arange(16, dtype=np.float32).reshape(2, 2, 4)
    seen = run(through_block, H, np.array([[False, True], [False, False]]))
    kept = np.zeros((2, 2, 2, 2), bool)  # (b, h_kv, n, d_k)
    kept[0, :, 1] = True
    for i, name in ((1, "K"), (2, "V")):
        same(seen["attention"][i] > 0, kept, f"where {name} is kept")
        same(seen[f"quantize_{name}"][1], kept, f"leave_out of {name}")


def test_decoder_block_tells_the_quantizers_which_tokens_to_leave_out(run):
    """They get all Keys, after RoPE, and all Values, and a mask that is True for a sink."""
    seen = run(through_block, TWO, SECOND)
    close(seen["quantize_K"][0].ravel(), [10.5, 20.5], "K before quantization")
    close(seen["quantize_V"][0].ravel(), [100, 200], "V before quantization")
    masks = [seen[name][1].ravel().tolist() for name in ("quantize_K", "quantize_V")]
    same(masks, [[False, True]] * 2, "leave_out")


def test_decoder_block_keeps_the_window(run):
    """Attention gets the block's sliding window."""
    same(run(through_block, TWO, SECOND)["attention"][3], 4, "sliding_window")


def test_predict_sinks_by_hand(run):
    """|H| in channel 1 is 1, 9, 3, 5 and 7, 0, 2, 8: two tokens of each sequence."""
    H = np.zeros((2, 4, 3), np.float32)
    H[0, :, 1] = [1, -9, 3, 5]
    H[1, :, 1] = [-7, 0, 2, -8]
    H[:, 2, 0] = 100
    expected = [[False, True, False, True], [True, False, False, True]]
    close(run(predicted, H, 1, 2), expected, "S_sink")


def test_predict_sinks_without_k(run):
    """k = "auto": the tokens that reach a tenth of the largest, 9."""
    H = np.float32([1, -9, 0.5, 2]).reshape(1, 4, 1)
    close(run(predicted, H, 0, "auto"), [[True, True, False, True]], "S_sink")


def test_predict_sinks_refuses_more_than_there_are(run):
    """Five of four tokens: ValueError."""
    assert run(refused, "predicted", ZERO, 0, 5), "no ValueError"


def test_pfn_by_hand(run):
    """The first three of four tokens, in both sequences."""
    close(run(first, ZERO, 3), [[True, True, True, False]] * 2, "mask")


def test_observers_change_nothing(run):
    """One cache of two blocks: Keys and Values come back unchanged, and `calibrate` of each
    quantizer got its own and the mask."""
    X = np.float32([1, 2]).reshape(1, 1, 2, 1)
    mask = np.array([False, True]).reshape(1, 1, 2, 1)
    seen, returned = run(observed, 1, 2, X, mask)
    for l in (1, 2):
        for i, (name, sign) in enumerate((("K", 1), ("V", -1))):
            close(returned[l - 1][i], sign * l * X, f"{name} of block {l}")
            close(seen[f"0 {l} {name}"][0], sign * l * X, f"what calibrates {name} of block {l}")
            same(seen[f"0 {l} {name}"][1], mask, "leave_out")


def test_observers_name_the_block_of_a_nan(run):
    """NaN in block 2 raises NotFinite, which names it."""
    error = run(observers_refused, 3, 2)
    good = error and error[0] == "NotFinite" and "block 2" in error[1]
    assert good, f"{error}: not NotFinite of block 2"
