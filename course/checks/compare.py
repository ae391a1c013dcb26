"""Comparisons, and what a test says if two things differ.

A test has two halves. A scenario (scenarios.py) calls the assigned function and returns plain
values; the test compares these with numbers worked out by hand, or with a property.
"""

import numpy as np


def close(actual, expected, name, rtol=1e-5, atol=1e-6):
    """Assert that `actual` is an array of the expected shape and numbers."""
    expected = np.asarray(expected)
    assert isinstance(actual, np.ndarray), f"{name}: not a tensor"
    shapes = f"{name}: shape {actual.shape}, not {expected.shape}"
    for axis in range(expected.ndim):
        dropped = np.delete(expected.shape, axis)
        assert actual.shape != tuple(dropped), f"{shapes}: axis {axis} was dropped (keepdim?)"
    assert actual.shape == expected.shape, shapes
    good = np.isclose(actual.astype(np.float64), expected.astype(np.float64), rtol, atol)
    if not good.all():
        place = tuple(int(i) for i in np.argwhere(~good)[0])
        raise AssertionError(f"{name}: {at(place)}{differing(actual[place], expected[place])}")


def same(actual, expected, name):
    """Assert that two plain values are equal; arrays count as lists."""
    actual = actual.tolist() if isinstance(actual, np.ndarray) else actual
    expected = expected.tolist() if isinstance(expected, np.ndarray) else expected
    place = []
    while actual != expected and type(actual) is type(expected) is list:
        lengths = f"{len(actual)} items, not {len(expected)}"
        assert len(actual) == len(expected), f"{name}: {at(place, 'has')}{lengths}"
        place.append([a != b for a, b in zip(actual, expected)].index(True))
        actual = actual[place[-1]]
        expected = expected[place[-1]]
    assert actual == expected, f"{name}: {at(place)}{differing(actual, expected)}"


def at(place, verb="is"):
    return f"at {list(place)} it {verb} " if place else ""


def differing(actual, expected):
    """Return two values in words, numbers in as many digits as it takes to see that they differ."""
    pairs = [(str(actual)[:100], str(expected)[:100])]
    if all(isinstance(x, (float, np.number)) for x in (actual, expected)):
        pairs = [(f"{actual:.{digits}g}", f"{expected:.{digits}g}") for digits in (6, 9, 17)]
    one, other = next((pair for pair in pairs if pair[0] != pair[1]), pairs[-1])
    return f"{one}, not {other}"
