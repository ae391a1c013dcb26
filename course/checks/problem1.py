"""Problem 1, Equations 10 to 13: examples worked by hand."""

import numpy as np

from .compare import close, same
from .scenarios import equation


def numbers(*x):
    return np.array(x, np.float32)


def test_scale_by_hand(run):
    """The range of -1 to 2 in 2 bits has three steps; a range of 4 in 3 bits has seven."""
    close(run(equation, "scale", numbers(-1), numbers(2), 2), [1], "scale")
    close(
        run(equation, "scale", numbers(-1, 0, 10), numbers(3, 7, 12), 3), [4 / 7, 1, 2 / 7], "scale"
    )


def test_scale_of_a_constant_group(run):
    """Whatever the constant is, Equations 13, 10 and 11 with this scale give it back exactly: 3.7,
    -0.25 and 0."""
    x = numbers(3.7, -0.25, 0)
    s = run(equation, "scale", x, x, 2)
    assert (s > 0).all() and np.isfinite(s).all(), f"scale: {s} is not positive"
    z = -np.round(x / s)
    same(s * (np.clip(np.round(x / s) + z, 0, 3) - z), x, "a constant group")


def test_zero_by_hand(run):
    """-round(-1 / 1), -round(-2.4 / 0.5): whole numbers."""
    close(run(equation, "zero", numbers(-1, -2.4), numbers(1, 0.5)), [1, 5], "zero")


def test_zero_of_a_group_far_from_0(run):
    """X = (10, 10.5, 11.5) in 1 bit: scale 1.5, zero -7."""
    close(run(equation, "zero", numbers(10), numbers(1.5)), [-7], "zero")


def test_quantize_by_hand(run):
    """X = (-1, 0, 0.4, 2) in 2 bits with scale 1 and zero 1: codes 0, 1, 1, 3, as uint8."""
    codes = run(equation, "quantize", numbers(-1, 0, 0.4, 2), numbers(1), numbers(1), 2)
    same(codes, [0, 1, 1, 3], "codes")
    same(codes.dtype.name, "uint8", "dtype")


def test_quantize_halves(run):
    """Halves go to the even neighbour."""
    same(
        run(equation, "quantize", numbers(0.5, 1.5, 2.5, 3.5), numbers(1), numbers(0), 3),
        [0, 2, 2, 4],
        "codes",
    )


def test_quantize_clamps(run):
    """What lies outside the range gets the first or the last code."""
    same(run(equation, "quantize", numbers(-9, 9), numbers(1), numbers(1), 2), [0, 3], "codes")


def test_dequantize_by_hand(run):
    """Codes 0, 1, 1, 3 with scale 1 and zero 1, and codes 0, 0, 1 with scale 1.5 and zero -7."""
    close(
        run(equation, "dequantize", np.uint8([0, 1, 1, 3]), numbers(1), numbers(1)),
        [-1, 0, 0, 2],
        "X'",
    )
    close(
        run(equation, "dequantize", np.uint8([0, 0, 1]), numbers(1.5), numbers(-7)),
        [10.5, 10.5, 12],
        "X'",
    )
