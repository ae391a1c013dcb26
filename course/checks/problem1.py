"""Problem 1, Equations 10 to 13: examples worked by hand."""

import numpy as np

from .compare import close, same
from .scenarios import equation


def numbers(*x):
    return np.array(x, np.float32)


def comes_back(s, x, bits):
    """Assert that scales are positive and finite, and that with them the constants x come back."""
    assert (s > 0).all() and np.isfinite(s).all(), f"scale: {s} is not positive and finite"
    z = -np.round(x / s)
    same(s * (np.clip(np.round(x / s) + z, 0, 2**bits - 1) - z), x, "a constant group")


def test_scale_by_hand(run):
    """The range from -1 to 2 in 2 bits has three steps; a range of length 4 in 3 bits has seven."""
    close(run(equation, "scale", numbers(-1), numbers(2), 2), [1], "scale")
    s = run(equation, "scale", numbers(-1, 0, 10), numbers(3, 7, 12), 3)
    close(s, [4 / 7, 1, 2 / 7], "scale")


def test_scale_of_a_constant_group(run):
    """Equations 13, 10 and 11 with this scale give back each constant exactly: 3.7, -0.25 and 0."""
    x = numbers(3.7, -0.25, 0)
    comes_back(run(equation, "scale", x, x, 2), x, 2)


def test_zero_by_hand(run):
    """-round(-1 / 1) and -round(-2.4 / 0.5) are whole numbers."""
    close(run(equation, "zero", numbers(-1, -2.4), numbers(1, 0.5)), [1, 5], "zero")


def test_zero_of_a_group_far_from_0(run):
    """X = (10, 10.5, 11.5) in 1 bit has scale 1.5 and zero -7."""
    close(run(equation, "zero", numbers(10), numbers(1.5)), [-7], "zero")


def test_quantize_by_hand(run):
    """X = (-1, 0, 0.4, 2) in 2 bits with scale 1 and zero 1 has the codes 0, 1, 1, 3, as uint8."""
    codes = run(equation, "quantize", numbers(-1, 0, 0.4, 2), numbers(1), numbers(1), 2)
    same(codes, [0, 1, 1, 3], "codes")
    same(codes.dtype.name, "uint8", "dtype")


def test_quantize_halves(run):
    """Halves are rounded to the even neighbour."""
    codes = run(equation, "quantize", numbers(0.5, 1.5, 2.5, 3.5), numbers(1), numbers(0), 3)
    same(codes, [0, 2, 2, 4], "codes")


def test_quantize_clamps(run):
    """Numbers outside the range get the first or the last code."""
    same(run(equation, "quantize", numbers(-9, 9), numbers(1), numbers(1), 2), [0, 3], "codes")


def test_dequantize_by_hand(run):
    """Codes 0, 1, 1, 3 have scale 1 and zero 1; codes 0, 0, 1 have scale 1.5 and zero -7."""
    X = run(equation, "dequantize", np.uint8([0, 1, 1, 3]), numbers(1), numbers(1))
    close(X, [-1, 0, 0, 2], "X'")
    X = run(equation, "dequantize", np.uint8([0, 0, 1]), numbers(1.5), numbers(-7))
    close(X, [10.5, 10.5, 12], "X'")
