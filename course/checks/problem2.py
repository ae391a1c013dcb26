"""Problem 2, granularities and ranges: small tensors whose groups can be written down."""

import numpy as np

from .compare import close, same
from .scenarios import calibrated, groups, ranges, refused

# Token 0 is 0, 1, 2, 3; channel 0 is 0, 4, 8, ..., 20.
X = np.arange(24, dtype=np.float32).reshape(1, 1, 6, 4)


def test_grouped_by_token(run):
    """Each token has two groups of two channels: (1, 1, 6, 2, 2), with a group on the last axis."""
    Xg, axes = run(groups, X, "token", 2, 0.0)
    same(axes, [-1], "axes")
    close(Xg, X.reshape(1, 1, 6, 2, 2), "groups")


def test_grouped_by_channel(run):
    """Each channel has two groups of three tokens: (1, 1, 2, 3, 4)."""
    Xg, axes = run(groups, X, "channel", 3, 0.0)
    same(axes, [-2], "axes")
    close(Xg, X.reshape(1, 1, 2, 3, 4), "groups")


def test_grouped_by_tensor(run):
    """A group is three tokens with all their channels or, without a group size, all tokens."""
    Xg, axes = run(groups, X, "tensor", 3, 0.0)
    same(axes, [-2, -1], "axes")
    close(Xg, X.reshape(1, 1, 2, 3, 4), "groups")
    close(run(groups, X, "tensor", None, 0.0)[0], X[:, :, None], "one group")


def test_grouped_if_tokens_do_not_fill_the_last_group(run):
    """Six tokens in groups of four: `fill` stands for the missing two, at the end."""
    Xg, _ = run(groups, X, "channel", 4, -1.0)
    close(Xg[0, 0, 0], X[0, 0, :4], "the first group")
    close(Xg[0, 0, 1], np.concatenate([X[0, 0, 4:], np.full((2, 4), -1)]), "the last group")


def test_grouped_refuses_a_size_that_does_not_divide(run):
    """Four channels in groups of three: ValueError."""
    assert run(refused, "groups", X, "token", 3, 0.0), "no ValueError"


def test_clipped_range_by_hand(run):
    """Minimum and maximum of each token, of each channel in groups of three tokens, and of all."""
    lo, hi = run(ranges, X, "token", None, {})
    close(lo, X[..., None, :1], "token: lo")
    close(hi, X[..., None, 3:], "token: hi")
    lo, hi = run(ranges, X, "channel", 3, {})
    close(lo[0, 0, :, 0], X[0, 0, [0, 3]], "channel: lo")
    close(hi[0, 0, :, 0], X[0, 0, [2, 5]], "channel: hi")
    lo, hi = run(ranges, X, "tensor", None, {})
    same([lo.ravel().tolist(), hi.ravel().tolist()], [[0], [23]], "tensor")


def test_clipped_range_leaves_out(run):
    """A token that is left out does not count, whether it is the largest or the smallest."""
    leave_out = np.arange(6).reshape(1, 1, 6, 1) % 5 == 0  # tokens 0 and 5
    lo, hi = run(ranges, X, "channel", None, {"leave_out": leave_out})
    close(lo[0, 0, 0, 0], [4, 5, 6, 7], "lo")
    close(hi[0, 0, 0, 0], [16, 17, 18, 19], "hi")


def test_clipped_range_of_nothing(run):
    """A group of which everything is left out has lo = inf and hi = -inf."""
    lo, hi = run(ranges, X, "tensor", None, {"leave_out": np.ones((1, 1, 6, 1), bool)})
    same([lo.ravel().tolist(), hi.ravel().tolist()], [[np.inf], [-np.inf]], "range")


def test_clipped_range_by_ratio(run):
    """-2, 0, 6 with ratio 0.5: half of the range of 8, about its middle, 2."""
    lo, hi = run(ranges, np.float32([[[[-2, 0, 6]]]]), "token", None, {"ratio": 0.5})
    same([lo.ravel().tolist(), hi.ravel().tolist()], [[0], [4]], "range")


def test_calibrate_widens(run):
    """Two tensors of two channels: the range covers both tensors."""
    batches = [
        (np.float32([[[[0, 10], [2, 12]]]]), None),
        (np.float32([[[[-1, 11], [1, 99]]]]), None),
    ]
    lo, hi, _ = run(calibrated, "channel", None, {}, batches)
    same([lo.ravel().tolist(), hi.ravel().tolist()], [[-1, 10], [2, 99]], "range")
    lo, hi, _ = run(calibrated, "token", 2, {}, batches)
    same([lo.ravel().tolist(), hi.ravel().tolist()], [[-1], [99]], "range")


def test_calibrate_leaves_sinks_out(run):
    """The second token of the second tensor is a sink."""
    sink = np.array([False, True]).reshape(1, 1, 2, 1)
    batches = [
        (np.float32([[[[0, 10], [2, 12]]]]), None),
        (np.float32([[[[-1, 11], [50, 99]]]]), sink),
    ]
    lo, hi, _ = run(calibrated, "channel", None, {}, batches)
    same([lo.ravel().tolist(), hi.ravel().tolist()], [[-1, 10], [2, 12]], "range")


def test_calibrate_refuses_nan(run):
    """NaN raises NotFinite, which is a ValueError."""
    assert run(refused, "calibrated", "token", None, {}, [(np.float32([[[[0, np.nan]]]]), None)]), (
        "no ValueError"
    )
