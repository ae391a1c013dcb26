"""Problem 6, a cache that is really small: bytes that are written down."""

import numpy as np

from .compare import close, same
from .scenarios import packed, scored, sliced, unpacked

CODES = np.uint8([0, 1, 2, 3, 3, 2, 1, 0])
# Channels 0, 2, 4, 6 and channels 1, 3, 5, 7, the lowest bits first.
TWO_BITS = np.uint8([0b01_11_10_00, 0b00_10_11_01])
# Channels 0 and 4, 1 and 5, 2 and 6, 3 and 7.
FOUR_BITS = np.uint8([0x30, 0x21, 0x12, 0x03])
# CODES + 4 in channels 0 and 7: a plane of 2 bits, and one of 1.
THREE_BIT_CODES = CODES + np.uint8([4, 0, 0, 0, 0, 0, 0, 4])
THREE_BITS = np.uint8([*TWO_BITS, 0b10000001])


def test_pack_by_hand(run):
    """0, 1, 2, 3, 3, 2, 1, 0 in two bits, and in four."""
    same(run(packed, CODES, 2), TWO_BITS, "2 bits")
    same(run(packed, CODES, 4), FOUR_BITS, "4 bits")


def test_pack_in_planes(run):
    """Three bits: the lower two of all channels, then the upper one."""
    same(run(packed, THREE_BIT_CODES, 3), THREE_BITS, "3 bits")


def test_slices_by_hand(run):
    """Two bits: quarters of the channels, in order, int32."""
    parts = run(sliced, TWO_BITS, 2)
    same([part[:2] for part in parts], [[0, 2], [2, 4], [4, 6], [6, 8]], "slices")
    same([part[2].tolist() for part in parts], CODES.reshape(4, 2).tolist(), "codes")
    same(parts[0][3], "torch.int32", "dtype")


def test_unpack_by_hand(run):
    """The codes come back, as uint8."""
    same(run(unpacked, TWO_BITS, 2), CODES, "2 bits")
    same(run(unpacked, THREE_BITS, 3), THREE_BIT_CODES, "3 bits")
    same(run(unpacked, FOUR_BITS, 4).dtype.name, "uint8", "dtype")


def test_scores_by_hand(run):
    """One head of 8 channels and three tokens, in 8 bits, so that bytes are codes. Keys are
    s (codes - z). Two queries share the head."""
    stored = {
        "codes": np.arange(24, dtype=np.uint8).reshape(1, 1, 3, 8),
        "bits": 8,
        "scale": np.float32([1, 2, 0.5]).reshape(1, 1, 3, 1),
        "zero": np.float32([0, 8, 20]).reshape(1, 1, 3, 1),
    }
    Q = np.zeros((1, 1, 2, 8), np.float32)
    Q[0, 0, 0, 0] = 1
    Q[0, 0, 1, 7] = 1
    S = run(scored, stored, Q, np.int64([[3]]))
    close(S[0, 0], [[0, 0, -2], [7, 14, 1.5]], "scores")


def test_scores_of_the_newest_group(run):
    """Two tokens share a scale for each channel. The query is that of slot 3, so tokens 2 and 3 are
    in the residual."""
    stored = {
        "codes": np.ones((1, 1, 4, 8), np.uint8),
        "bits": 8,
        "scale": np.ones((1, 1, 2, 8), np.float32),
        "zero": np.zeros((1, 1, 2, 8), np.float32),
        "residual": np.float32([5] * 8 + [6] * 8).reshape(1, 1, 2, 8),
    }
    S = run(scored, stored, np.ones((1, 1, 1, 8), np.float32), np.int64([[3]]))
    close(S[0, 0], [[8, 8, 40, 48]], "scores")


# Token 1's angle is a quarter of a turn: rotated, channel 0 is channel 4. Scales of 1.
QUARTER_TURN = [np.float32([[1] * 8, [0] * 8]), np.float32([[0] * 8, [1] * 8])]  # cos and sin
QUERY = np.float32([3, 0, 0, 0, 2, 0, 0, 0]).reshape(1, 1, 1, 8)
FIRST = np.uint8([1, 0, 0, 0, 0, 0, 0, 0])
UNIT = {"bits": 8, "scale": np.ones((1, 1, 1, 8), np.float32), "zero": np.zeros((1, 1, 1, 8))}


def test_scores_of_keys_before_rope(run):
    """Both Keys are 1 in channel 0; rotated, the second is 1 in channel 4. (This uses
    `apply_rope`.)"""
    stored = {**UNIT, "codes": np.broadcast_to(FIRST, (1, 1, 2, 8)).copy()}
    close(run(scored, stored, QUERY, np.int64([[2]]), QUARTER_TURN)[0, 0], [[3, 2]], "scores")


def test_scores_of_the_newest_group_before_rope(run):
    """The newest group lies before RoPE, as the codes do: its Keys, 4 and 5 in channel 0, are
    rotated, too. (This uses `apply_rope`.)"""
    residual = np.float32([4 * FIRST, 5 * FIRST]).reshape(1, 1, 2, 8)
    stored = {**UNIT, "codes": np.ones((1, 1, 2, 8), np.uint8), "residual": residual}
    close(run(scored, stored, QUERY, np.int64([[1]]), QUARTER_TURN)[0, 0], [[12, 10]], "scores")
