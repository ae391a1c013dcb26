"""Problem 6 in all widths, bit by bit, and scores against products in float64."""

import numpy as np

from course.checks.compare import close, same
from course.checks.scenarios import packed, scored, sliced, unpacked

WIDTHS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def bytes_of(codes, bits):
    """Bit by bit: a plane of width w has d w/8 bytes, and byte m the codes of m, m + d w/8, ..."""
    rows, d = [], codes.shape[-1]
    for row in codes.reshape(-1, d).tolist():
        row_bytes, below = [], 0
        for w in WIDTHS[bits]:
            at = d * w // 8
            planes = [[code >> below & 2**w - 1 for code in row[m::at]] for m in range(at)]
            row_bytes += [sum(code << w * i for i, code in enumerate(plane)) for plane in planes]
            below += w
        rows.append(row_bytes)
    return np.uint8(rows).reshape(*codes.shape[:-1], -1)


def all_widths():
    for bits in WIDTHS:
        for shape in ((8,), (3, 16), (2, 5, 128)):
            yield bits, np.random.RandomState(bits).randint(0, 2**bits, shape).astype(np.uint8)


def test_pack_bit_by_bit(run):
    """1 to 8 bits, 8 to 128 channels, as uint8."""
    for bits, codes in all_widths():
        out = run(packed, codes, bits)
        same([out.shape, out.dtype.name, out.tolist()], [(*codes.shape[:-1], codes.shape[-1] * bits // 8), "uint8",
             bytes_of(codes, bits).tolist()], f"{bits} bits, {codes.shape}")  # fmt: skip


def test_unpack_bit_by_bit(run):
    """1 to 8 bits, from bytes written down."""
    for bits, codes in all_widths():
        same(run(unpacked, bytes_of(codes, bits), bits), codes, f"{bits} bits, {codes.shape}")


def test_slices_cover_the_channels_in_order(run):
    """A quarter of the channels at most, each once; codes as in the bytes."""
    for bits, codes in all_widths():
        parts = run(sliced, bytes_of(codes, bits), bits)
        ends = [at for part in parts for at in part[:2]]
        same(
            [ends[0], ends[-1], ends[1:-1:2]],
            [0, codes.shape[-1], ends[2::2]],
            f"{bits} bits: ends",
        )
        assert max(part[1] - part[0] for part in parts) <= codes.shape[-1] // 4, (
            "a slice is more than a quarter"
        )
        same(np.concatenate([part[2] for part in parts], -1), codes, f"{bits} bits: codes")


def case(seed, bits, n, d_k, group, g):
    """Codes, scale, zero, queries, and the Keys that they stand for, of two sequences, two heads,
    three queries each."""
    draw = np.random.RandomState(seed)
    codes = draw.randint(0, 2**bits, (2, 2, n, d_k)).astype(np.uint8)
    shape = (2, 2, n // g, d_k // group)
    s, z = (
        (draw.rand(*shape) + 0.1).astype(np.float32),
        np.round(draw.randn(*shape) * 3).astype(np.float32),
    )
    wide_s, wide_z = (np.repeat(np.repeat(x, g, 2), group, 3).astype(np.float64) for x in (s, z))
    return (
        bytes_of(codes, bits),
        s,
        z,
        draw.randn(2, 2, 3, d_k).astype(np.float32),
        wide_s * (codes - wide_z),
    )


def test_scores_against_numpy(run):
    """Two and three bits, scales by token in groups of 8 or 32 channels, and of 24 of 48."""
    for bits, d_k, group in ((2, 32, 32), (3, 32, 8), (3, 48, 24), (4, 32, 16)):
        codes, s, z, Q, K = case(bits, bits, 10, d_k, group, 1)
        S = run(scored, codes, bits, s, z, Q, np.int64([[10], [4]]))
        close(
            S, Q @ K.transpose(0, 1, 3, 2), f"{bits} bits, groups of {group}", rtol=1e-3, atol=1e-3
        )


def test_scores_of_the_newest_group_of_each_sequence(run):
    """Groups of four tokens; the sequences have come to different slots; Keys stored before RoPE or
    after it."""
    codes, s, z, Q, K = case(5, 2, 12, 16, 1, 4)
    residual = np.random.RandomState(6).randn(2, 2, 4, 16).astype(np.float32)
    at = np.int64([[10], [4]])  # the first is in group 2, the second begins group 1
    K[0, :, 8:12], K[1, :, 4:8] = residual[0], residual[1]
    close(
        run(scored, codes, 2, s, z, Q, at, residual),
        Q @ K.transpose(0, 1, 3, 2),
        "scores",
        rtol=1e-3,
        atol=1e-3,
    )
    angle = np.outer(np.arange(12), 1.0 / 10 ** np.linspace(0, 2, 8))
    turned = (K[..., :8] + 1j * K[..., 8:]) * np.exp(1j * angle)
    turned = np.concatenate([turned.real, turned.imag], -1)
    rope = [f(np.tile(angle, 2)).astype(np.float32) for f in (np.cos, np.sin)]
    S = run(scored, codes, 2, s, z, Q, at, residual, rope)
    close(S, Q @ turned.transpose(0, 1, 3, 2), "scores before RoPE", rtol=1e-3, atol=1e-3)


def test_scores_with_outliers(run):
    """KVQuant's outliers are added by their own method, which gets all scores at once."""
    codes, s, z, Q, K = case(7, 3, 6, 16, 16, 1)
    S = run(scored, codes, 3, s, z, Q, np.int64([[6], [6]]), None, None, True)
    close(S, Q @ K.transpose(0, 1, 3, 2) + 1000, "scores", rtol=1e-4, atol=1e-3)
