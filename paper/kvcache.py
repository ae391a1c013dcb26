"""A KV cache that is really small: codes in as many bits as they have, and the kept tokens beside
them (Table 4).

Read top to bottom: codes as bytes; how Keys and Values are stored, as numbers or as packed codes;
KVQuant's outliers; the cache of a block and of a model; what Table 4 counts.

What this file does not do: kvsink.py says which tokens are kept, quant.py and kvquant.py say how a
number is quantized, and generate.py fills the cache and reads it. The cache does not grow: room for
all tokens is made at the start.

Shapes: b sequences, n tokens of room, h query heads, h_kv Key/Value heads, G = h / h_kv, d_k
channels a head. The slot of a token is its position in its sequence, from 0. rows (r, 1) and slots
(r, m) say where m tokens of r sequences go.
"""

import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

import kvsink
from llama import apply_rope, rope_table
from quant import Quantizer

# --------------------------------------------------------------------------------------------------
# Codes as bytes


def planes(bits):
    """The widths in which codes are stored: those that divide a byte and add up to `bits`, as 2 + 1
    do to 3."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack(codes, bits):
    """Codes (..., d) to bytes (..., d bits / 8), uint8; d is a multiple of 8.

    A plane of width w takes d w / 8 bytes. Its byte m holds, the lowest bits first, the codes of
    channels m, m + d w/8, m + 2 d w/8 and so on: neighbours lie side by side, so one shift unpacks
    a whole vector of bytes.
    """
    parts, codes = [], codes.to(torch.int32)
    for width in planes(bits):
        plane = (
            (codes & (2**width - 1)).unflatten(-1, (8 // width, -1)).unbind(-2)
        )  # each (..., d w/8)
        parts.append(sum(codes_i << (width * i) for i, codes_i in enumerate(plane)))
        codes = codes >> width
    return torch.cat(parts, dim=-1).to(torch.uint8)


def check_head(d_k):
    if d_k % 8:
        raise ValueError(f"a head of {d_k} channels: codes are packed by eights")


def slices(packed, bits):
    """Yields a few neighbouring channels at a time: their slice, and their codes (..., d/4 or d/8),
    int32.

    All it takes is to shift bytes. Code that computes with a slice under torch.compile never has
    the codes in memory.
    """
    d = packed.shape[-1] * 8 // bits
    step = (
        d * min(planes(bits)[-1], 2) // 8
    )  # 2 bits unpack to quarters of the channels, 1 bit to eighths
    for first in range(0, d, step):
        codes, plane, shift = 0, 0, 0
        for width in planes(bits):
            part, offset = divmod(first, d * width // 8)
            byte = packed[..., plane + offset : plane + offset + step].to(torch.int32)
            codes = codes + (((byte >> (width * part)) & (2**width - 1)) << shift)
            plane, shift = plane + d * width // 8, shift + width
        yield slice(first, first + step), codes


def unpack(packed, bits):
    """The inverse of `pack`: codes (..., d), uint8."""
    d, codes, first, shift = packed.shape[-1] * 8 // bits, 0, 0, 0
    for width in planes(bits):
        plane = packed[..., first : first + d * width // 8]
        parts = [(plane >> (width * i)) & (2**width - 1) for i in range(8 // width)]
        codes = codes | (torch.cat(parts, dim=-1) << shift)
        first, shift = first + plane.shape[-1], shift + width
    return codes


# --------------------------------------------------------------------------------------------------
# How the Keys or the Values of one block are stored


class FullPrecisionStore:
    """Full precision: the numbers themselves, (b, h_kv, n, d_k)."""

    outliers = None

    def __init__(self, b, h_kv, n, d_k, dtype, device):
        self.X = torch.zeros(b, h_kv, n, d_k, dtype=dtype, device=device)

    def fill(self, rows, slots, X, leave_out):
        self.append(rows, slots, X)
        return X

    def append(self, rows, slots, X):
        self.X[rows, :, slots] = X.transpose(1, 2)


class Packed:
    """Codes of `bits` bits, and the two parameters that decode them: scale and zero, or KVQuant's
    middle and half width. Dynamic parameters are stored in 16 bits, a pair for every token or for
    every g tokens; static ones once.

    Where g tokens share a scale, it is known when all g are there. Until the next token comes,
    `residual` holds the newest group in full precision (as in KIVI); then it is full, and gets its
    codes.
    """

    def __init__(self, quantizer, b, h_kv, n, d_k, dtype, device):
        check_head(d_k)
        rtn, self.d_k = isinstance(quantizer, Quantizer), d_k
        self.quantizer = replace(quantizer, fp16_params=True) if rtn else quantizer
        self.static = quantizer.static if rtn else quantizer.lo is not None
        self.g = (
            quantizer.group_size
            if rtn and quantizer.granularity == "channel" and not self.static
            else 1
        )
        # In memory RTN's codes lie with the tokens last, (b, h_kv, bytes, n), whatever their shape
        # says. So a vector register holds neighbouring tokens, and no width leaves it half empty.
        # KVQuant's look-up of levels wants its channels last.
        room = (
            (b, h_kv, d_k * quantizer.bits // 8, n)
            if rtn
            else (b, h_kv, n, d_k * quantizer.bits // 8)
        )
        codes = torch.zeros(room, dtype=torch.uint8, device=device)
        self.codes = codes.mT if rtn else codes  # (b, h_kv, n, bytes)
        one_group = torch.zeros(1, h_kv, self.g, d_k, device=device)
        self.residual = one_group.to(dtype).repeat(b, 1, 1, 1) if self.g > 1 else None
        self.parameters = list(self.quantizer.encode(one_group)[1:3])
        if not self.static:
            shape = (b, self.parameters[0].shape[1], n // self.g, self.parameters[0].shape[3])
            self.parameters = [
                torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(2)
            ]
        self.outliers = None
        if not rtn and quantizer.sparse:
            self.outliers = Outliers(b, n, h_kv * d_k, device)

    def fill(self, rows, slots, X, leave_out):
        """Stores the tokens of a prompt, X (r, h_kv, m, d_k), from slot 0 on, and returns them as
        they will be read."""
        if self.outliers is not None:
            self.outliers.counts[rows[:, 0]] = 0  # forgets those of an earlier prompt
        self.store(rows, slots, X, leave_out)
        X_ = self.quantizer(X, leave_out)
        if self.residual is None:
            return X_
        whole = X.shape[2] // self.g * self.g
        self.residual[rows[:, 0], :, : X.shape[2] - whole] = X[:, :, whole:]
        return torch.cat((X_[:, :, :whole], X[:, :, whole:]), dim=2)

    def append(self, rows, slots, X):
        """Stores one token of every sequence, X (b, h_kv, 1, d_k)."""
        if self.residual is None:
            return self.store(rows, slots, X, None)
        self.residual[rows, :, slots % self.g] = X.transpose(1, 2)

    def finish_group(self, rows, end, kept):
        """Makes codes of the residual of sequences `rows` (r, 1), whose last token is in slot end -
        1, (r, 1). `kept` (r, k) are the slots of kept tokens."""
        slots = end - self.g + torch.arange(self.g, device=end.device)  # (r, g)
        leave_out = (slots[..., None] == kept[:, None]).any(-1)[:, None, :, None]
        self.store(rows, slots, self.residual[rows[:, 0]], leave_out)

    def store(self, rows, slots, X, leave_out):
        codes, *parameters = self.quantizer.encode(X.float(), leave_out)
        self.codes[rows, :, slots] = pack(codes, self.quantizer.bits).transpose(1, 2)
        if not self.static:
            for stored, numbers in zip(self.parameters, parameters):
                stored[rows, :, slots[:, :: self.g] // self.g] = numbers.transpose(1, 2).half()
        if self.outliers is not None:
            is_outlier = parameters[2] if leave_out is None else parameters[2] & ~leave_out
            self.outliers.append(rows, slots, X, is_outlier)

    def dequantized(self):
        """Yields a few neighbouring channels at a time: their slice, and their numbers (b, h_kv,
        n/g, g, a few)."""
        wide = [to_float32(numbers) for numbers in self.parameters]
        for channels, codes in slices(self.codes, self.quantizer.bits):
            one, two = (self.of_channels(numbers, channels) for numbers in wide)
            yield channels, self.quantizer.decode(codes.unflatten(2, (-1, self.g)), one, two)

    def of_channels(self, numbers, channels):
        """One of the two parameters for a slice of channels, to broadcast against (b, h_kv, n/g, g,
        a few)."""
        width = self.d_k // numbers.shape[-1]  # so many channels share one
        first, last = channels.start // width, -(-channels.stop // width)
        numbers = numbers[..., first:last]
        if width > 1 < last - first:  # the slice has several groups, or parts of them
            numbers = numbers[..., None].expand(*numbers.shape, width).flatten(-2)
            numbers = numbers[..., channels.start - first * width : channels.stop - first * width]
        return numbers[..., None, :]

    # The next two are the hot path. They are products and sums, not matrix products, because
    # torch.compile fuses these with the unpacking: each byte is read once, for all of its codes and
    # for all G queries that share the head, and what it decodes to is never in memory. (Eager, the
    # Keys or Values of a block are.)

    def scores(self, Q, rope, at):
        """Q K^T of each query, (b, h_kv, G, d_k) -> G times (b, h_kv, n), fp32, for the token in
        slot `at` (b, 1). `rope` is given where Keys are stored before RoPE: a query that is turned
        back by a Key's angle has the same product with it as the query has with the turned Key."""
        K, Q_n = list(self.dequantized()), Q[:, :, :, None, None]  # (b, h_kv, G, 1, 1, d_k)
        if rope is not None:
            Q_n = apply_rope(Q[:, :, :, None], (rope[0], -rope[1])).unflatten(
                3, (-1, self.g)
            )  # (b, h_kv, G, n/g, g, d_k)
        # Of each query (b, h_kv, n/g, g):
        S = [sum(Q_g[..., channels] * K_ for channels, K_ in K).sum(-1) for Q_g in Q_n.unbind(2)]
        if self.residual is not None:  # whose codes are not made yet
            group = torch.arange(S[0].shape[2], device=at.device)
            newest = (group == at // self.g)[:, None, :, None]
            slots = at // self.g * self.g + torch.arange(self.g, device=at.device)  # (b, g)
            residual = (
                self.residual
                if rope is None
                else apply_rope(self.residual, [table[slots][:, None] for table in rope])
            )
            of_residual = Q @ residual.float().mT  # (b, h_kv, G, g)
            S = [torch.where(newest, of_residual[:, :, i, None], S_g) for i, S_g in enumerate(S)]
        S = [S_g.flatten(2) for S_g in S]
        if self.outliers is not None:
            S = self.outliers.add_to_scores(torch.stack(S, dim=2), Q, rope, self).unbind(2)
        return S

    def weighted_sum(self, p):
        """p V, (b, h_kv, G, n) -> (b, h_kv, G, d_k), fp32."""
        V = [pieces(V_.flatten(2, 3), 2) for _, V_ in self.dequantized()]
        P = pieces(p, 3)[..., None].unbind(2)  # G times (b, h_kv, n/piece, piece, 1)
        A = torch.stack(
            [torch.cat([(p_g * V_).sum(3).sum(2) for V_ in V], dim=-1) for p_g in P], dim=2
        )
        return A if self.outliers is None else self.outliers.add_to_sum(A, p, self)


def pieces(X, axis):
    """An axis of tokens cut in pieces, as flash decoding does: on a CPU a sum over more than 4,096
    numbers is half as fast, and a GPU needs more parallel sums than there are heads."""
    piece = math.gcd(X.shape[axis], 4096)
    return X.unflatten(axis, (-1, piece if piece >= 256 else X.shape[axis]))


@torch.library.custom_op("kvsink::to_fp32", mutates_args=())
def to_fp32(X: torch.Tensor) -> torch.Tensor:
    """An operation that torch.compile leaves alone: fused, the conversion made a loop on a CPU four
    times slower."""
    return X.to(torch.float32, copy=True)


to_fp32.register_fake(lambda X: torch.empty_like(X, dtype=torch.float32))


def to_float32(X):
    return to_fp32(X) if X.dtype == torch.float16 and X.device.type == "cpu" else X.float()


class Outliers:
    """KVQuant's sparse part. Each sequence has a list of its outliers in 16 bits, token by token,
    with the channel of each, counted through all heads (d = h_kv d_k); and each token says how many
    it has. The code of an outlier is the lowest or the highest. How many there will be is not
    known, so this part alone of the cache grows, rarely."""

    def __init__(self, b, n, d, device):
        self.d = d
        self.counts = torch.zeros(b, n, dtype=torch.int16, device=device)
        self.channels = torch.zeros(
            b, 1, dtype=torch.int16, device=device
        )  # the last entry takes what is no outlier
        self.values = torch.zeros(b, 1, dtype=torch.float16, device=device)

    def make_room(self, more):
        """Room for so many more outliers in the fullest sequence. Makes some spare room where it
        has to make any."""
        wanted = int(self.counts.sum(1).max()) + more
        if (missing := wanted + 1 - self.values.shape[1]) > 0:
            missing += wanted // 128  # so that the list does not grow with every token
            self.channels, self.values = (
                F.pad(part, (0, missing)) for part in (self.channels, self.values)
            )
        for part in (self.channels, self.values):
            torch._dynamo.mark_dynamic(
                part, 1
            )  # or torch.compile would make code for each length, in each block

    def append(self, rows, slots, X, is_outlier):
        X, is_outlier = (part.transpose(1, 2).flatten(2) for part in (X, is_outlier))  # (r, m, d)
        used, (_, m, d) = self.counts[rows[:, 0]].sum(1, keepdim=True), X.shape
        if not torch.compiler.is_compiling():
            self.make_room(int(is_outlier.sum((1, 2)).max()))
        self.counts[rows, slots] = is_outlier.sum(-1).to(torch.int16)
        is_outlier = is_outlier.flatten(1)
        place = torch.where(is_outlier, used + is_outlier.cumsum(1) - 1, self.values.shape[1] - 1)
        self.values[rows, place] = X.flatten(1).half()
        self.channels[rows, place] = (
            torch.arange(d, device=X.device).repeat(m).to(torch.int16).expand_as(place)
        )

    def entries(self, store):
        """Row, token, head and channel of every entry (b, e), and by how much its code decodes to
        the wrong number."""
        b, h_kv, n, _ = store.codes.shape
        d_k, device, ends = store.d_k, self.values.device, self.counts.cumsum(1)
        entry = torch.arange(self.values.shape[1], device=device).expand(b, -1).contiguous()
        rows, token = (
            torch.arange(b, device=device)[:, None],
            torch.searchsorted(ends, entry, right=True),
        )
        filled, token = token < n, token.clamp(max=n - 1)
        head, channel = self.channels.long() // d_k, self.channels.long() % d_k
        middle, half = (
            x.float().expand(b, h_kv, n, d_k)[rows, head, token, channel] for x in store.parameters
        )
        value, levels = self.values.float(), store.quantizer.levels
        off = value - torch.where(value < middle, levels[0], levels[-1]) * half - middle
        return rows, token, head, channel, torch.where(filled, off, 0.0)

    def add_to_scores(self, S, Q, rope, store):
        rows, token, head, channel, off = self.entries(store)
        Q, d_k = Q.transpose(2, 3), Q.shape[3]
        q = Q[rows, head, channel]  # (b, e, G)
        if rope is not None:  # turned back, as in `scores`, in one channel
            cos, sin = (table[token, channel, None] for table in rope)
            sign = torch.where(channel < d_k // 2, 1.0, -1.0)[..., None]
            q = q * cos + sign * Q[rows, head, (channel + d_k // 2) % d_k] * sin
        S = S.transpose(2, 3).index_put((rows, head, token), off[..., None] * q, accumulate=True)
        return S.transpose(2, 3)

    def add_to_sum(self, A, p, store):
        rows, token, head, channel, off = self.entries(store)
        p = p.transpose(2, 3)[rows, head, token]  # (b, e, G)
        A = A.transpose(2, 3).index_put((rows, head, channel), off[..., None] * p, accumulate=True)
        return A.transpose(2, 3)


# --------------------------------------------------------------------------------------------------
# The cache


class BlockCache:
    """The Keys and Values of one block; and beside them k tokens kept in the model's dtype, in the
    order of their slots. Where fewer are kept, as by KVSink up to block l_E, the unused slots hold
    n, one past the end. Only packed Keys are stored before RoPE: for Keys in full precision it
    makes no difference."""

    def __init__(self, quantizers, config, n, b, k, pre_rope, dtype, device):
        shape = (b, config.num_key_value_heads, n, config.head_dim, dtype, device)
        self.K, self.V = (
            FullPrecisionStore(*shape) if q is kvsink.unquantized else Packed(q, *shape)
            for q in quantizers
        )
        self.n, self.pre_rope = n, pre_rope and isinstance(self.K, Packed)
        self.kept = torch.full((b, k), n, device=device)
        side = (b, config.num_key_value_heads, k, config.head_dim)
        self.kept_K, self.kept_V = (torch.zeros(side, dtype=dtype, device=device) for _ in "KV")

    def fill(self, store, side, rows, X, leave_out):
        """Stores X with its codes, and beside them the tokens of `leave_out` as they are. With all
        but the last two arguments given, it takes the place of a quantizer in Algorithm 1."""
        is_kept, at = leave_out[:, 0, :, 0].int().topk(self.kept.shape[1])
        slots, order = torch.where(is_kept > 0, at, self.n).sort()
        self.kept[rows[:, 0]] = slots
        side[rows[:, 0]] = X.take_along_dim(at.gather(1, order)[:, None, :, None], dim=2)
        return store.fill(rows, torch.arange(X.shape[2], device=X.device)[None], X, leave_out)

    def storing_quantizers(self, rows):
        """The pair that quantizes Keys and Values into these rows."""
        sides = (self.K, self.kept_K), (self.V, self.kept_V)
        return tuple(functools.partial(self.fill, store, side, rows) for store, side in sides)

    def make_room(self):
        """To be called before a token is appended: every one of its numbers may be an outlier, and
        compiled code cannot make room."""
        for store in (self.K, self.V):
            if store.outliers is not None:
                store.outliers.make_room(store.outliers.d)


class KVCache:
    """The cache of b sequences of up to n tokens, of which k are kept.

    quantizers   a list of L pairs, as `kvsink.prefill` takes it: what it quantizes, this stores in as many bits
    pre_rope     whether Keys are stored before RoPE
    """

    def __init__(self, model, quantizers, n, b=1, k=0, pre_rope=False):
        K, _ = quantizers[0]
        if isinstance(K, Quantizer) and K.granularity == "channel" and not K.static:
            n = -(-n // K.group_size) * K.group_size  # whole groups of tokens
        dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
        self.n, self.k, self.lengths = n, k, [0] * b
        self.replay = None  # on a CUDA device: generate.decode's graph
        self.at = torch.zeros(
            b, 1, dtype=torch.int64, device=device
        )  # the slot of each sequence's next token
        self.rope = rope_table(model.config, n + 1, device)
        self.blocks = [
            BlockCache(pair, model.config, n, b, k, pre_rope, dtype, device) for pair in quantizers
        ]

    def finish_groups(self):
        """To be called after a token was appended: of sequences whose newest group of tokens is
        full, it gets codes."""
        g = getattr(self.blocks[0].K, "g", 1)
        if full := [i for i, length in enumerate(self.lengths) if g > 1 and length % g == 0]:
            rows = torch.tensor(full, device=self.at.device)
            for block in self.blocks:
                block.K.finish_group(rows[:, None], self.at[rows], block.kept[rows])

    def bytes(self):
        """The bytes of all tensors of its blocks. Calibrated ranges and codebooks belong to the
        quantizers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self.blocks))


def tensors_of(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list):
        for part in thing:
            yield from tensors_of(part)
    elif isinstance(thing, (BlockCache, Packed, FullPrecisionStore, Outliers)):
        yield from tensors_of(list(vars(thing).values()))


def cache_bytes(config, n, bits, k=0):
    """Table 4: bytes of a cache of n tokens at a width, with k of them in 16 bits besides; scales
    are not counted."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * n * bits / 8 + numbers * k * 2
