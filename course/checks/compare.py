"""What a test says when two things differ. Each test is two halves: a scenario (scenarios.py) runs
the assigned function and returns plain values; the test compares these with numbers worked by hand,
or with a property."""

import numpy as np


def close(actual, expected, what, rtol=1e-5, atol=1e-6):
    """Asserts that `actual` is an array of the expected shape and numbers."""
    expected = np.asarray(expected)
    assert isinstance(actual, np.ndarray), f"{what}: not a tensor"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    good = np.isclose(actual.astype(np.float64), expected.astype(np.float64), rtol, atol)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(
            f"{what}: at {list(at)} it is {actual[at]:.6g}, not {expected[at]:.6g}"
        )


def same(actual, expected, what):
    """Asserts that two plain values are equal; arrays count as lists."""
    actual, expected = (x.tolist() if isinstance(x, np.ndarray) else x for x in (actual, expected))
    assert actual == expected, f"{what}: {str(actual)[:100]}, not {str(expected)[:100]}"
