"""Low-bit integer quantization: Equations 10 to 13 (Appendix C) in every granularity, dynamic and
static.

Read top to bottom: the four equations; the groups that share one scale and zero (Figure 10); the
range of a group; the Quantizer that puts them together.

What this file does not do: it handles tensors, and knows nothing of models, layers or sinks. A mask
tells it which tokens to leave out; kvsink.py says why. It rounds to nearest (RTN) and has no
learned or non-uniform levels.

Tensors are (..., n, d): n tokens of d channels. In a model they are Keys or Values (b, h, n, d_k).
Each sequence and each head has scales of its own; all sequences share static scales.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# The equations. lo and hi are clipped_min(X) and clipped_max(X), n is the number of bits. Halves
# are rounded to even.


def scale(lo, hi, n):
    """Eq. 12: scale = (clipped_max(X) - clipped_min(X)) / (2^n - 1).

    If all numbers of a group are the same x, its scale is |x|, or 1 if x is 0: with that scale, Eq.
    10, 11 and 13 give x back exactly.
    """
    s = (hi - lo) / (2**n - 1)
    return torch.where(s > 0, s, torch.where(lo == 0, 1.0, lo.abs()))


def zero(lo, s):
    """Eq. 13: zero = -round(clipped_min(X) / scale). An integer that, unlike the codes, is not
    clamped."""
    return -torch.round(lo / s)


def quantize(X, s, z, n):
    """Eq. 10: Q(X) = clamp(round(X / scale) + zero, 0, 2^n - 1), as uint8."""
    return torch.clamp(torch.round(X / s) + z, 0, 2**n - 1).to(torch.uint8)


def dequantize(codes, s, z):
    """Eq. 11: X' = scale * (Q(X) - zero)."""
    return s * (codes.to(s.dtype) - z)


# --------------------------------------------------------------------------------------------------
# Groups: which numbers share one scale and one zero (Figure 10)

GRANULARITIES = ("tensor", "token", "channel")


def check_granularity(granularity):
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity {granularity!r} is none of {', '.join(GRANULARITIES)}")


def grouped(X, granularity, group_size=None, fill=0.0):
    """Cut X (..., n, d) into groups, which adds an axis. Return it and the axes within one group.

        "token"    group_size consecutive channels of one token    (..., n, d/g, g), axis -1
        "channel"  group_size consecutive tokens of one channel    (..., n/g, g, d), axis -2
        "tensor"   group_size consecutive tokens of all channels   (..., n/g, g, d), axes -2 and -1

    Without a group size, or with one wider than X, a group is a whole token, channel or tensor. If
    the tokens do not fill the last group, `fill` stands in for the missing ones; `ungrouped` cuts
    them off again. Raises ValueError if group_size does not divide d channels.
    """
    check_granularity(granularity)
    n, d = X.shape[-2:]
    if granularity == "token":
        g = min(group_size or d, d)
        if d % g:
            raise ValueError(f"group size {g} does not divide {d} channels")
        return X.unflatten(-1, (-1, g)), (-1,)
    g = min(group_size or n, n)
    if n % g:
        X = F.pad(X, (0, 0, 0, -n % g), value=fill)
    return X.unflatten(-2, (-1, g)), ((-2,) if granularity == "channel" else (-2, -1))


def ungrouped(Xg, granularity, n):
    """Undo `grouped`: return (..., n, d)."""
    return Xg.flatten(-2) if granularity == "token" else Xg.flatten(-3, -2)[..., :n, :]


def clipped_range(
    X, granularity, group_size=None, axes=(), leave_out=None, quantile=1.0, ratio=1.0
):
    """Return clipped_min(X) and clipped_max(X) of every group, in shapes that broadcast against
    `grouped(X)`.

    axes        further axes of the grouped X to reduce over (static ranges: sequences and tokens)
    leave_out   a mask that broadcasts to X, True for numbers that must not count. A group with
                every number masked has lo = inf and hi = -inf.

    Eq. 12 and 13 speak of a clipped range, and the paper does not say how it clips. Its Table 1
    takes minimum and maximum, and so does this file by default. The two usual ways to clip:

    quantile    the maximum is this quantile, the minimum the (1 - quantile) quantile
    ratio       the range shrinks to this fraction of itself, about its middle
    """

    def groups_with(value):  # `value` stands in for the numbers that must not count
        X_ = X if leave_out is None else X.masked_fill(leave_out, value)
        return grouped(X_, granularity, group_size, value)

    if quantile < 1:
        Xg, group_axes = groups_with(torch.nan)
        lo = nanquantile(Xg, 1 - quantile, (*axes, *group_axes)).nan_to_num(torch.inf)
        hi = nanquantile(Xg, quantile, (*axes, *group_axes)).nan_to_num(-torch.inf)
    else:
        Xg, group_axes = groups_with(torch.inf)
        lo = Xg.amin((*axes, *group_axes), keepdim=True)
        Xg, _ = groups_with(-torch.inf)
        hi = Xg.amax((*axes, *group_axes), keepdim=True)
    if ratio < 1:
        cut = torch.where(lo <= hi, (1 - ratio) / 2 * (hi - lo), 0.0)
        lo = lo + cut
        hi = hi - cut
    return lo, hi


def nanquantile(X, level, axes):
    """Return torch.nanquantile over several axes, which stay as axes of length 1."""
    axes = sorted(axis % X.ndim for axis in axes)
    others = [axis for axis in range(X.ndim) if axis not in axes]
    values = torch.nanquantile(X.permute(*others, *axes).flatten(len(others)), level, dim=-1)
    for axis in axes:
        values = values.unsqueeze(axis)
    return values


class NotFinite(ValueError):
    """NaN or inf in a tensor that must be finite."""


def check_finite(X):
    """Raise NotFinite if X holds NaN or inf, which would spread over its whole group."""
    if not torch.isfinite(X).all():
        raise NotFinite("NaN or inf in a tensor to be quantized")


# --------------------------------------------------------------------------------------------------
# The quantizer


@dataclass
class Quantizer:
    """RTN quantization of one tensor to `bits` bits: asymmetric, dynamic or static (Appendix C).

    Dynamic: scale and zero come from the tensor itself. Static: they come from all tokens that
    `calibrate` has seen, and all tokens share them. So "token" has one scale per group of channels,
    "channel" one per channel and "tensor" one per head; groups of tokens do not exist.

    Raises ValueError for bits outside 1 to 8, an unknown granularity, a group size that does not
    divide, a static quantizer that has not been calibrated, and (in `calibrate`) for NaN or inf.
    """

    bits: int
    granularity: str
    group_size: int | None = None
    static: bool = False
    quantile: float = 1.0  # these two: see `clipped_range`
    ratio: float = 1.0
    lo: torch.Tensor | None = None  # static only: the range so far
    hi: torch.Tensor | None = None
    fp16_params: bool = False  # dynamic only: round scale and zero to fp16, as a packed cache does

    def __post_init__(self):
        if self.bits not in range(1, 9):
            raise ValueError(f"{self.bits} bits: this quantizer has 1 to 8")
        check_granularity(self.granularity)
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group size {self.group_size}: a group has at least 1 number")
        if self.static and self.granularity != "token":
            self.group_size = None  # groups of tokens would need a scale for tokens yet to come

    def calibrate(self, X, leave_out=None):
        """Widen the static range to include X (..., h, n, d), except for the numbers that
        `leave_out` masks (bool, broadcastable to X). `quantile` and `ratio` clip the range of each
        X by itself, before the static range is widened."""
        check_finite(X)
        # Reduce over all sequences and all tokens: axis -3 of the grouped X, which is
        # (..., h, n, d/g, g) or (..., h, 1, n, d).
        axes = (*range(X.ndim - 3), -3)
        lo, hi = clipped_range(
            X.float(),
            self.granularity,
            self.group_size,
            axes,
            leave_out,
            self.quantile,
            self.ratio,
        )
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def parameters(self, X, leave_out=None):
        """Return scale and zero for X (..., n, d), in shapes that broadcast against
        `grouped(X)`."""
        if self.static and self.lo is None:
            raise ValueError("a static quantizer needs `calibrate` first")
        if self.static:
            lo = self.lo
            hi = self.hi
        else:
            if self.granularity == "token":
                leave_out = None  # each token has ranges of its own: no need to mask another
            lo, hi = clipped_range(
                X, self.granularity, self.group_size, (), leave_out, self.quantile, self.ratio
            )
        empty = lo > hi  # every token of the group is left out: its codes are never read
        lo = lo.masked_fill(empty, 0.0)
        hi = hi.masked_fill(empty, 0.0)
        s = scale(lo, hi, self.bits)
        if self.fp16_params and not self.static:
            # The scale is at least |lo| / 2^15, so that zero fits in fp16. A finer scale would be
            # lost in 16 bits.
            s = torch.maximum(s, lo.abs() / 2**15).clamp(2**-24, 65504).half().float()
            return s, zero(lo, s).half().float()
        return s, zero(lo, s)

    def __call__(self, X, leave_out=None):
        """Quantize X (..., n, d) and dequantize it again; `leave_out` masks the numbers that must
        not count for the ranges. A number that is not finite comes back as NaN and so reaches the
        logits. No error is raised here, because the check would make every block wait for the
        GPU."""
        # fp16 cannot hold the quotients of Eq. 10 and 13.
        Xf = X.to(torch.promote_types(X.dtype, torch.float32))
        s, z = self.parameters(Xf, leave_out)
        Xg, _ = grouped(Xf, self.granularity, self.group_size)
        X_ = dequantize(quantize(Xg, s, z, self.bits), s, z)
        X_ = ungrouped(X_, self.granularity, X.shape[-2])
        return (X_ + (Xf - Xf)).to(X.dtype)  # X - X is 0, or NaN if X is not finite

    # What a packed cache asks of a quantizer (paper/kvcache.py).

    def encode(self, X, leave_out=None):
        """Return, for X (..., n, d) in fp32, what a cache stores: codes (..., n, d), scale and
        zero. These two are (..., n, d/g) if a group lies within a token, (..., n/g, d) if it spans
        tokens; n is 1 if they are static."""
        s, z = self.parameters(X, leave_out)
        Xg, (axis, *_) = grouped(X, self.granularity, self.group_size)
        codes = ungrouped(quantize(Xg, s, z, self.bits), self.granularity, X.shape[-2])
        return codes, s.squeeze(axis), z.squeeze(axis)

    @staticmethod
    def decode(codes, s, z):
        """Apply Eq. 11 to codes and to a scale and zero that broadcast against them."""
        return dequantize(codes, s.float(), z.float())

    @property
    def tokens_per_group(self):
        """The number of tokens that share a scale; 1 if each has its own or scales are static."""
        return 1 if self.static or self.granularity == "token" else self.group_size
