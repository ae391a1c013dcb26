"""Problem 1 with other numbers, against NumPy in float64."""

import numpy as np

from course.checks.compare import close, same
from course.checks.problem1 import comes_back, numbers
from course.checks.problem3 import drawn
from course.checks.scenarios import equation


def test_scale_against_numpy(run):
    """Eq. 12 in all widths, also for groups on one side of 0."""
    lo = drawn(1, 3, 5, 1) * 10
    hi = lo + np.abs(drawn(2, 3, 5, 1))
    for bits in range(1, 9):
        expected = (hi.astype(np.float64) - lo) / (2.0**bits - 1)
        close(run(equation, "scale", lo, hi, bits), expected, f"scale, {bits} bits", rtol=1e-4)


def test_scale_of_constants_large_and_small(run):
    """In every width, Equations 13, 10 and 11 give back a constant exactly, be it negative, 0, tiny
    or huge, and its scale is positive and finite."""
    x = numbers(-60000, 1e-30, 0, -0.123456)
    for bits in (1, 4, 8):
        comes_back(run(equation, "scale", x, x, bits), x, bits)


def test_zero_against_numpy(run):
    """Eq. 13 gives whole numbers, on either side of 0 and not clamped, however large."""
    lo = drawn(3, 200) * 100
    s = np.abs(drawn(4, 200)) + 0.1
    close(run(equation, "zero", lo, s), -np.round(lo / s), "zero")


def test_zero_halves(run):
    """Halves are rounded to even, as torch.round does."""
    close(run(equation, "zero", numbers(-0.5, -1.5, -2.5, 2.5), numbers(1)), [0, 2, 2, -2], "zero")


def test_quantize_against_numpy(run):
    """Eq. 10 in all widths; each token has its own scale and zero."""
    X = drawn(5, 2, 6, 16) * 3
    s = np.abs(drawn(6, 2, 6, 1)) + 0.05
    z = np.round(drawn(7, 2, 6, 1) * 10)
    for bits in range(1, 9):
        expected = np.clip(np.round(X / s) + z, 0, 2**bits - 1)
        same(run(equation, "quantize", X, s, z, bits), expected, f"{bits} bits")


def test_quantize_halves_with_a_zero(run):
    """Eq. 10 rounds before it adds zero: if zero is odd, the order matters."""
    codes = run(equation, "quantize", numbers(0.5, 1.5, 2.5), numbers(1), numbers(1), 3)
    same(codes, [1, 3, 3], "codes")


def test_dequantize_against_numpy(run):
    """Eq. 11 for all 256 codes, and zeros on either side of 0."""
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    s = numbers(0.3, 2)[:, None]
    z = numbers(300, -40)[:, None]
    close(run(equation, "dequantize", codes, s, z), s * (codes.astype(np.float64) - z), "X'")
