"""Problem 2 with other shapes, group by group in loops, and the arguments that are easy to
forget."""

import numpy as np

from course.checks.compare import close, same
from course.checks.scenarios import calibrated, groups, ranges, refused

# Two sequences and three heads, all numbers above 0.
BOTH = np.random.RandomState(21).randn(2, 3, 7, 8).astype(np.float32) + 5


def members(n, d, granularity, g):
    """Return rows and columns of every group, in the order in which the groups lie."""
    if granularity == "token":
        return [(slice(i, i + 1), slice(j, j + g)) for i in range(n) for j in range(0, d, g)]
    columns = [slice(j, j + 1) for j in range(d)] if granularity == "channel" else [slice(None)]
    return [(slice(i, i + g), column) for i in range(0, n, g) for column in columns]


def test_grouped_with_other_sizes(run):
    """Groups as wide as X, wider, or without a size; a `fill` that is not 0 and changes no number
    of X."""
    close(run(groups, BOTH, "token", 128, 0.0)[0], BOTH[..., None, :], "token, 128")
    close(run(groups, BOTH, "token", None, 0.0)[0], BOTH[..., None, :], "token, None")
    close(run(groups, BOTH, "channel", 128, 9.0)[0], BOTH[:, :, None], "channel, 128")
    for granularity in ("channel", "tensor"):
        Xg, _ = run(groups, BOTH, granularity, 5, np.inf)
        same(list(Xg.shape), [2, 3, 2, 5, 8], "shape")
        tokens = Xg.reshape(2, 3, 10, 8)
        close(tokens[:, :, :7], BOTH, "the tokens")
        assert (tokens[:, :, 7:] == np.inf).all(), "the missing tokens are not `fill`"


def test_grouped_refuses_no_more_than_it_must(run):
    """A group size must divide the channels but not the tokens; an unknown granularity is
    refused."""
    assert run(refused, "groups", BOTH, "token", 5, 0.0), "no ValueError for 5 of 8 channels"
    assert run(refused, "groups", BOTH, "row", 4, 0.0), "no ValueError for an unknown granularity"
    same(run(refused, "groups", BOTH, "channel", 5, 0.0), None, "7 tokens in groups of 5")


def test_clipped_range_against_loops(run):
    """All granularities; a last group of two tokens, all above 0; a mask for each sequence."""
    leave_out = np.random.RandomState(3).rand(2, 1, 7, 1) < 0.3
    for granularity, g in (("token", 4), ("channel", 5), ("tensor", 5)):
        for mask in (None, leave_out):
            lo, hi = run(ranges, BOTH, granularity, g, {} if mask is None else {"leave_out": mask})
            hidden = np.broadcast_to(False if mask is None else mask, BOTH.shape).reshape(6, 7, 8)
            X = BOTH.reshape(6, 7, 8)
            low = np.where(hidden, np.inf, X)
            high = np.where(hidden, -np.inf, X)
            places = members(7, 8, granularity, g)
            expected = [[head[place].min() for place in places] for head in low]
            close(lo.reshape(6, -1), expected, f"{granularity}: lo")
            expected = [[head[place].max() for place in places] for head in high]
            close(hi.reshape(6, -1), expected, f"{granularity}: hi")


def test_clipped_range_over_further_axes(run):
    """Static ranges: sequences (axis 0) and tokens (axis -3) share one; heads do not."""
    lo, hi = run(ranges, BOTH, "token", 4, {"axes": [0, -3]})
    X = BOTH.reshape(2, 3, 7, 2, 4)
    close(lo, X.min((0, 2, 4), keepdims=True), "lo")
    close(hi, X.max((0, 2, 4), keepdims=True), "hi")


def test_clipped_range_by_quantile(run):
    """The quantiles at 1 - 0.9 and 0.9: what is missing or left out does not count, and an empty
    group still has inf and -inf."""
    leave_out = np.arange(7).reshape(1, 1, 7, 1) < 2
    lo, hi = run(ranges, BOTH, "channel", 4, {"quantile": 0.9, "leave_out": leave_out})
    close(lo[:, :, 0, 0], np.quantile(BOTH[:, :, 2:4], 0.1, axis=2), "lo")
    close(hi[:, :, 1, 0], np.quantile(BOTH[:, :, 4:], 0.9, axis=2), "hi of the short group")
    lo, hi = run(ranges, BOTH, "tensor", None, {"quantile": 0.9, "leave_out": leave_out | True})
    assert (lo == np.inf).all() and (hi == -np.inf).all(), "a group of nothing is not inf, -inf"


def test_clipped_range_by_ratio_of_nothing(run):
    """An empty group has no middle, and still has inf and -inf."""
    options = {"ratio": 0.5, "leave_out": np.ones((1, 1, 7, 1), bool)}
    lo, hi = run(ranges, BOTH, "tensor", None, options)
    assert (lo == np.inf).all() and (hi == -np.inf).all(), "a group of nothing is not inf, -inf"


def test_calibrate_against_loops(run):
    """Two batches of different lengths, with masks: one range for each head and group of channels,
    or for each head and channel."""
    draw = np.random.RandomState(5)
    batches = []
    parts = []
    for n in (5, 12):
        X = draw.randn(2, 3, n, 8).astype(np.float32) * 10
        sinks = draw.rand(2, n) < 0.3
        batches.append((X, sinks[:, None, :, None]))
        parts += [X[b][:, ~sinks[b]] for b in (0, 1)]
    every = np.concatenate(parts, 1)  # (3, tokens, 8)
    for granularity, width in (("token", 4), ("channel", 1), ("tensor", 8)):
        lo, hi, _ = run(calibrated, granularity, 4, {}, batches)
        X = every.reshape(3, -1, 8 // width, width)
        close(lo.reshape(3, -1), X.min((1, 3)), f"{granularity}: lo")
        close(hi.reshape(3, -1), X.max((1, 3)), f"{granularity}: hi")


def test_calibrate_uses_quantile_and_ratio(run):
    """Quantile and ratio clip the range of each tensor by itself; the first may be left out
    entirely."""
    nothing = (np.ones((1, 1, 1, 3), np.float32), np.ones((1, 1, 1, 1), bool))
    batches = [nothing, (np.float32([[[[-2, 0, 6]]]]), None)]
    lo, hi, _ = run(calibrated, "token", None, {"ratio": 0.5}, batches)
    same([lo.ravel().tolist(), hi.ravel().tolist()], [[0], [4]], "range")
    X = np.random.RandomState(6).randn(1, 1, 50, 4).astype(np.float32)
    _, hi, _ = run(calibrated, "channel", None, {"quantile": 0.9}, [(X, None)])
    close(hi.ravel(), np.quantile(X[0, 0], 0.9, axis=0), "hi")


def test_calibrate_in_fp32(run):
    """Ranges of fp16 tensors are kept in fp32."""
    batches = [(np.float32([[[[1.5], [6.25]]]]), None)]
    _, hi, dtype = run(calibrated, "channel", None, {}, batches, "float16")
    same([hi.ravel().tolist(), dtype], [[6.25], "torch.float32"], "hi")


def test_calibrate_names_the_error(run):
    """inf raises NotFinite, as NaN does."""
    for bad in (np.nan, np.inf, -np.inf):
        error = run(refused, "calibrated", "token", None, {}, [(np.float32([[[[0, bad]]]]), None)])
        assert error and error[0] == "NotFinite", f"{bad}: {error}, not NotFinite"
