"""A KV cache that is really small: codes in as many bits as they have, and the kept tokens beside them (Table 4).

Read top to bottom: how Keys and Values are stored, as numbers or as packed codes; KVQuant's outliers; the cache of a
block and of a model; what Table 4 counts.

What this file does not do: which tokens are kept, and how a number is quantized, is the business of kvsink.py, quant.py
and kvquant.py; generate.py fills the cache and reads it. Room for all tokens is made at the start.

Shapes: b sequences, n tokens of room, h query heads, h_kv Key/Value heads, G = h / h_kv, d_k channels a head. The slot
of a token is its position in its sequence, from 0. rows (r, 1) and slots (r, m) say where m tokens of r sequences go.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F

import kvsink
from llama import rope_table, rotate
from quant import Quantizer, pack, slices

# ---------------------------------------------------------------------------------------------------------------------
# How the Keys or the Values of one block are stored


class Plain:
    """Full precision: the numbers themselves, (b, h_kv, n, d_k)."""

    outliers = None

    def __init__(self, b, h_kv, n, d_k, dtype, device):
        self.X = torch.zeros(b, h_kv, n, d_k, dtype=dtype, device=device)

    def fill(self, rows, slots, X, leave_out):
        self.append(rows, slots, X, None)
        return X

    def append(self, rows, slots, X, kept):
        self.X[rows, :, slots] = X.transpose(1, 2)


class Packed:
    """Codes of `bits` bits, and two numbers to undo them: scale and zero, or KVQuant's middle and half width. Dynamic,
    these are stored in 16 bits, for every token or every g tokens; static, they are one set.

    Where g tokens share a scale, it is not known before they are complete. Then `tail` has the newest, unfinished group
    in full precision; its codes are made anew with every token and not read before it is full (as in KIVI).
    """

    def __init__(self, quantizer, b, h_kv, n, d_k, dtype, device):
        if d_k % 8:
            raise ValueError(f"a head of {d_k} channels: codes are packed by eights")
        rtn, self.d_k = isinstance(quantizer, Quantizer), d_k
        self.quantizer = replace(quantizer, half=True) if rtn else quantizer
        self.static = quantizer.static if rtn else quantizer.lo is not None
        self.g = quantizer.group_size if rtn and quantizer.granularity == "channel" and not self.static else 1
        self.codes = torch.zeros(b, h_kv, n, d_k * quantizer.bits // 8, dtype=torch.uint8, device=device)
        one_group = torch.zeros(1, h_kv, self.g, d_k, device=device)
        self.tail = one_group.to(dtype).repeat(b, 1, 1, 1) if self.g > 1 else None
        self.undo = list(self.quantizer.encode(one_group)[1:3])
        if not self.static:
            shape = (b, self.undo[0].shape[1], n // self.g, self.undo[0].shape[3])
            self.undo = [torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(2)]
        self.outliers = None
        if not rtn and quantizer.sparse:
            self.outliers = Outliers(b, n, h_kv * d_k, device)

    def fill(self, rows, slots, X, leave_out):
        """The tokens of a prompt, X (r, h_kv, m, d_k) from slot 0 on: stored, and given back as they will be read."""
        if self.outliers is not None:
            self.outliers.counts[rows[:, 0]] = 0  # those of an earlier prompt
        self.store(rows, slots, X, leave_out)
        X_ = self.quantizer(X, leave_out)
        if self.tail is None:
            return X_
        whole = X.shape[2] // self.g * self.g
        self.tail[rows[:, 0], :, : X.shape[2] - whole] = X[:, :, whole:]
        return torch.cat((X_[:, :, :whole], X[:, :, whole:]), dim=2)

    def append(self, rows, slots, X, kept):
        """One token of every sequence, X (b, h_kv, 1, d_k)."""
        if self.tail is not None:
            self.tail[rows, :, slots % self.g] = X.transpose(1, 2)
            slots = slots // self.g * self.g + torch.arange(self.g, device=X.device)  # (b, g): of the whole group
            leave_out = (slots[..., None] == kept[:, None]).any(-1)[:, None, :, None]
            return self.store(rows, slots, self.tail, leave_out)
        self.store(rows, slots, X, None)

    def store(self, rows, slots, X, leave_out):
        codes, *undo = self.quantizer.encode(X.float(), leave_out)
        self.codes[rows, :, slots] = pack(codes, self.quantizer.bits).transpose(1, 2)
        if not self.static:
            for place, numbers in zip(self.undo, undo):
                place[rows, :, slots[:, :: self.g] // self.g] = numbers.transpose(1, 2).half()
        if self.outliers is not None:
            is_outlier = undo[2] if leave_out is None else undo[2] & ~leave_out
            self.outliers.append(rows, slots, X, is_outlier)

    def numbers_to_undo(self):
        """Both as fp32 that broadcast against (b, h_kv, n, d_k)."""
        for numbers in self.undo:
            numbers = numbers.float()[..., None].expand(*numbers.shape, self.d_k // numbers.shape[-1]).flatten(-2)
            if self.g > 1:
                numbers = numbers[..., None, :].expand(*numbers.shape[:3], self.g, self.d_k).flatten(2, 3)
            yield numbers

    def dequantized(self):
        """Yields a slice of channels and its numbers (b, h_kv, n, a few), fp32, one slice after the other."""
        one, two = self.numbers_to_undo()
        for channels, codes in slices(self.codes, self.quantizer.bits):
            yield channels, self.quantizer.decode(codes, one[..., channels], two[..., channels])

    # The next two are the hot path. They are written as products and sums, not as matrix products, because
    # torch.compile fuses these with the unpacking: each byte is read once, for all of its codes and for all the G
    # queries that share the head, and what it decodes to never is in memory.

    def scores(self, Q, rope):
        """Q K^T, (b, h_kv, G, d_k) -> (b, h_kv, G, n), fp32. Keys stored before RoPE need its table: turning the query
        back by a Key's angle gives the same product as turning the Key."""
        K, S = list(self.dequantized()), []
        for Q_g in Q.unbind(2):
            Q_g = Q_g[:, :, None] if rope is None else rotate(Q_g[:, :, None], (rope[0], -rope[1]))
            S.append(sum(Q_g[..., channels] * K_ for channels, K_ in K).sum(-1))
        S = torch.stack(S, dim=2)
        return S if self.outliers is None else self.outliers.add_to_scores(S, Q, rope, self)

    def weighted_sum(self, p):
        """p V, (b, h_kv, G, n) -> (b, h_kv, G, d_k), fp32."""
        V = [V_ for _, V_ in self.dequantized()]
        A = [torch.cat([(p_g[..., None] * V_).sum(-2) for V_ in V], dim=-1) for p_g in p.unbind(2)]
        A = torch.stack(A, dim=2)
        return A if self.outliers is None else self.outliers.add_to_sum(A, p, self)


class Outliers:
    """KVQuant's sparse part: in every sequence a list of outliers in 16 bits, token by token, with the channel of each,
    counted through all heads; and how many a token has. Codes of outliers are the lowest or the highest. Nobody knows
    how many there will be, so this alone of the cache grows, rarely."""

    def __init__(self, b, n, d, device):
        self.d = d
        self.counts = torch.zeros(b, n, dtype=torch.int16, device=device)
        self.channels = torch.zeros(b, 1, dtype=torch.int16, device=device)  # the last entry takes what is no outlier
        self.values = torch.zeros(b, 1, dtype=torch.float16, device=device)

    def make_room(self, more):
        """For so many more outliers in the fullest sequence, and some spare, if there is less."""
        wanted = int(self.counts.sum(1).max()) + more
        if (missing := wanted + 1 - self.values.shape[1]) > 0:
            missing += wanted // 128  # so that it is not made longer with every token
            self.channels, self.values = (F.pad(part, (0, missing)) for part in (self.channels, self.values))
        for part in (self.channels, self.values):
            torch._dynamo.mark_dynamic(part, 1)  # or each length, and each block has its own, would be compiled anew

    def append(self, rows, slots, X, is_outlier):
        X, is_outlier = (part.transpose(1, 2).flatten(2) for part in (X, is_outlier))  # (r, m, d)
        used, (_, m, d) = self.counts[rows[:, 0]].sum(1, keepdim=True), X.shape
        if not torch.compiler.is_compiling():
            self.make_room(int(is_outlier.sum((1, 2)).max()))
        self.counts[rows, slots] = is_outlier.sum(-1).to(torch.int16)
        is_outlier = is_outlier.flatten(1)
        place = torch.where(is_outlier, used + is_outlier.cumsum(1) - 1, self.values.shape[1] - 1)
        self.values[rows, place] = X.flatten(1).half()
        self.channels[rows, place] = torch.arange(d, device=X.device).repeat(m).to(torch.int16).expand_as(place)

    def entries(self, store):
        """Of every entry (b, e) its row, token, head and channel, and how far it is off what its code decodes to."""
        b, h_kv, n, _ = store.codes.shape
        d_k, device, ends = store.d_k, self.values.device, self.counts.cumsum(1)
        entry = torch.arange(self.values.shape[1], device=device).expand(b, -1).contiguous()
        rows, token = torch.arange(b, device=device)[:, None], torch.searchsorted(ends, entry, right=True)
        filled, token = token < n, token.clamp(max=n - 1)
        head, channel = self.channels.long() // d_k, self.channels.long() % d_k
        middle, half = (x.expand(b, h_kv, n, d_k)[rows, head, token, channel] for x in store.numbers_to_undo())
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


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class BlockCache:
    """One block's Keys and Values, and a side buffer of k tokens kept in the model's dtype, in the order of their
    slots. Where fewer are kept, as by KVSink up to block l_E, their slot is n, which there is not."""

    def __init__(self, quantizers, config, n, b, k, pre_rope, dtype, device):
        self.n, self.pre_rope = n, pre_rope
        shape = (b, config.num_key_value_heads, n, config.head_dim, dtype, device)
        self.K, self.V = (Plain(*shape) if q is kvsink.unquantized else Packed(q, *shape) for q in quantizers)
        self.kept = torch.full((b, k), n, device=device)
        side = (b, config.num_key_value_heads, k, config.head_dim)
        self.kept_K, self.kept_V = (torch.zeros(side, dtype=dtype, device=device) for _ in "KV")

    def fill(self, store, side, rows, X, leave_out):
        """Stores what is quantized, and what is not to be. With all but the last two arguments given, it stands in the
        place of a quantizer in Algorithm 1."""
        is_kept, at = leave_out[:, 0, :, 0].int().topk(self.kept.shape[1])
        slots, order = torch.where(is_kept > 0, at, self.n).sort()
        self.kept[rows[:, 0]] = slots
        side[rows[:, 0]] = X.take_along_dim(at.gather(1, order)[:, None, :, None], dim=2)
        return store.fill(rows, torch.arange(X.shape[2], device=X.device)[None], X, leave_out)

    def fillers(self, rows):
        """The pair that quantizes Keys and Values into these rows."""
        sides = (self.K, self.kept_K), (self.V, self.kept_V)
        return tuple(functools.partial(self.fill, store, side, rows) for store, side in sides)


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
        self.at = torch.zeros(b, 1, dtype=torch.int64, device=device)  # the slot of each sequence's next token
        self.rope = rope_table(model.config, n + 1, device)
        self.blocks = [BlockCache(pair, model.config, n, b, k, pre_rope, dtype, device) for pair in quantizers]

    def bytes(self):
        """What all the tensors of its blocks take; ranges and codebooks that were calibrated are the quantizers'."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self.blocks))


def tensors_of(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list):
        for part in thing:
            yield from tensors_of(part)
    elif isinstance(thing, (BlockCache, Packed, Plain, Outliers)):
        yield from tensors_of(list(vars(thing).values()))


def cache_bytes(config, n, bits, k=0):
    """Table 4: bytes of a cache of n tokens at a width, and of k of them in 16 bits besides; scales are not counted."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * n * bits / 8 + numbers * k * 2
