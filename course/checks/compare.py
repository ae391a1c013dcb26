"""Comparisons, and what a test says if two things differ.

A test has two halves. A scenario (scenarios.py) calls the assigned function and returns plain
values; the test compares these with numbers worked out by hand, or with a property.
"""

import numpy as np


def close(actual, expected, name, rtol=1e-5, atol=1e-6):
    """Assert that `actual` is an array of the expected shape and numbers."""
    expected = np.asarray(expected)
    assert isinstance(actual, np.ndarray), f"{name}: not a tensor"
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    good = np.isclose(actual.astype(np.float64), expected.astype(np.float64), rtol, atol)
    if not good.all():
        place = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{name}: at {list(place)} it is {actual[place]:.6g}, not {expected[place]:.6g}"
        )


def same(actual, expected, name):
    """Assert that two plain values are equal; arrays count as lists."""
    actual = actual.tolist() if isinstance(actual, np.ndarray) else actual
    expected = expected.tolist() if isinstance(expected, np.ndarray) else expected
    assert actual == expected, f"{name}: {str(actual)[:100]}, not {str(expected)[:100]}"
