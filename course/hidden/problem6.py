"""Problem 6 in all widths, bit by bit, and scores against products in float64."""

import numpy as np

from course.checks.compare import close, same
from course.checks.scenarios import packed, scored, sliced, unpacked

PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def bytes_of(codes, bits):
    """Pack codes bit by bit: a plane of width w has d w/8 bytes, and byte m the codes of channels
    m, m + d w/8, ..."""
    d = codes.shape[-1]
    rows = []
    for row in codes.reshape(-1, d).tolist():
        row_bytes = []
        shift = 0
        for w in PLANES[bits]:
            count = d * w // 8
            for m in range(count):
                parts = [(code >> shift) & (2**w - 1) for code in row[m::count]]
                row_bytes.append(sum(part << (w * i) for i, part in enumerate(parts)))
            shift += w
        rows.append(row_bytes)
    return np.uint8(rows).reshape(*codes.shape[:-1], -1)


def all_widths():
    for bits in PLANES:
        for shape in ((8,), (3, 16), (2, 5, 128)):
            yield bits, np.random.RandomState(bits).randint(0, 2**bits, shape).astype(np.uint8)


def test_pack_bit_by_bit(run):
    """1 to 8 bits, 8 to 128 channels, as uint8."""
    for bits, codes in all_widths():
        name = f"{bits} bits, {codes.shape}"
        actual = run(packed, codes, bits)
        shape = [*codes.shape[:-1], codes.shape[-1] * bits // 8]
        same([list(actual.shape), actual.dtype.name], [shape, "uint8"], name)
        same(actual, bytes_of(codes, bits), name)


def test_unpack_bit_by_bit(run):
    """1 to 8 bits, from bytes that are packed here."""
    for bits, codes in all_widths():
        same(run(unpacked, bytes_of(codes, bits), bits), codes, f"{bits} bits, {codes.shape}")


def test_slices_cover_the_channels_in_order(run):
    """Slices have a quarter of the channels at most, and each channel once, with the codes of the
    bytes."""
    for bits, codes in all_widths():
        d = codes.shape[-1]
        parts = run(sliced, bytes_of(codes, bits), bits)
        ends = [end for part in parts for end in part[:2]]
        same([ends[0], ends[-1], ends[1:-1:2]], [0, d, ends[2::2]], f"{bits} bits: ends")
        widest = max(part[1] - part[0] for part in parts)
        assert widest <= d // 4, "a slice is more than a quarter"
        same(np.concatenate([part[2] for part in parts], -1), codes, f"{bits} bits: codes")


def case(seed, bits, shape, channels, tokens=1):
    """Return what a cache stores, queries, and the Keys that it stands for: `shape` is (n, d_k), of
    two sequences and two heads with three queries each; `channels` neighbouring channels of
    `tokens` neighbouring tokens share a scale."""
    n, d_k = shape
    draw = np.random.RandomState(seed)
    codes = draw.randint(0, 2**bits, (2, 2, n, d_k)).astype(np.uint8)
    groups = (2, 2, n // tokens, d_k // channels)
    s = (draw.rand(*groups) + 0.1).astype(np.float32)
    z = np.round(draw.randn(*groups) * 3).astype(np.float32)
    Q = draw.randn(2, 2, 3, d_k).astype(np.float32)
    stored = {"codes": bytes_of(codes, bits), "bits": bits, "scale": s, "zero": z}
    wide = [np.repeat(np.repeat(x, tokens, 2), channels, 3).astype(np.float64) for x in (s, z)]
    return stored, Q, wide[0] * (codes - wide[1])


def test_scores_against_numpy(run):
    """Two to four bits, scales by token in groups of 8, 16 or 32 channels, and of 24 of 48."""
    for bits, d_k, channels in ((2, 32, 32), (3, 32, 8), (3, 48, 24), (4, 32, 16)):
        stored, Q, K = case(bits, bits, (10, d_k), channels)
        S = run(scored, stored, Q, np.int64([[10], [4]]))
        name = f"{bits} bits, groups of {channels}"
        close(S, Q @ K.transpose(0, 1, 3, 2), name, rtol=1e-3, atol=1e-3)


def test_scores_of_the_newest_group_of_each_sequence(run):
    """Four tokens share a scale. The sequences have reached different slots. Keys are stored after
    RoPE, or before it."""
    stored, Q, K = case(5, 2, (12, 16), 1, tokens=4)
    residual = np.random.RandomState(6).randn(2, 2, 4, 16).astype(np.float32)
    stored["residual"] = residual
    slot = np.int64([[10], [4]])  # the first is in group 2, the second begins group 1
    K[0, :, 8:12] = residual[0]
    K[1, :, 4:8] = residual[1]
    S = run(scored, stored, Q, slot)
    close(S, Q @ K.transpose(0, 1, 3, 2), "scores", rtol=1e-3, atol=1e-3)
    angle = np.outer(np.arange(12), 1.0 / 10 ** np.linspace(0, 2, 8))
    rotated = (K[..., :8] + 1j * K[..., 8:]) * np.exp(1j * angle)
    rotated = np.concatenate([rotated.real, rotated.imag], -1)
    angle = np.tile(angle, 2)
    rope = [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
    S = run(scored, stored, Q, slot, rope)
    close(S, Q @ rotated.transpose(0, 1, 3, 2), "scores before RoPE", rtol=1e-3, atol=1e-3)


def test_scores_with_outliers(run):
    """KVQuant's outliers add to all scores at once, by a method of their own."""
    stored, Q, K = case(7, 3, (6, 16), 16)
    S = run(scored, {**stored, "sparse": True}, Q, np.int64([[6], [6]]))
    close(S, Q @ K.transpose(0, 1, 3, 2) + 1000, "scores", rtol=1e-4, atol=1e-3)
