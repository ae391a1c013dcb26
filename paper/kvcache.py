"""A KV cache that is stored in its low-bit form: packed codes, and the kept tokens beside them
(Table 4).

Read top to bottom: the cache of a model and of one block, with attention over it; the two ways to
store Keys or Values, in full precision and as packed codes; KVQuant's outliers; codes as bytes;
what a store asks of a quantizer; the bytes that Table 4 counts.

What this file does not do: kvsink.py says which tokens are kept, and a quantizer, RTN's or
KVQuant's, how a number is quantized. Prefill and decoding are elsewhere. The cache does not grow:
it has room for all tokens from the start.

Shapes: b sequences, n slots, k kept tokens, h query heads, h_kv Key/Value heads, G = h / h_kv, d_k
channels of a head. The slot of a token is its position in its sequence, counted from 0. To write m
tokens of each of r sequences, `sequences` (r, 1) holds the indices of the sequences and `slots`
(r or 1, m) those of the tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

import kvsink
from llama import apply_rope, rope_table

# --------------------------------------------------------------------------------------------------
# The cache


class KVCache:
    """The cache of b sequences of up to n tokens each, of which k are kept.

    quantizers   a list of L pairs, as `kvsink.prefill` takes it. Their codes are stored at their
                 width, or numbers in full precision if they are `kvsink.unquantized`.
    pre_rope     whether codes of Keys are made before RoPE
    """

    def __init__(self, model, quantizers, n, *, b=1, k=0, pre_rope=False):
        config = model.config
        quantize_K, _ = quantizers[0]
        is_packed = quantize_K is not kvsink.unquantized
        self.g = quantize_K.tokens_per_group if is_packed else 1
        multiple = self.g  # whole groups of tokens
        if model.device.type == "cuda":
            multiple = math.lcm(self.g, 64)  # which the kernel reads at a time
        self.n = -(-n // multiple) * multiple
        self.k = k
        self.pre_rope = pre_rope and is_packed
        self.lengths = [0] * b  # of each sequence so far
        self.next_slot = torch.zeros(b, 1, dtype=torch.int64, device=model.device)  # = lengths
        self.rope = rope_table(config, self.n + 1, model.device)
        self.replay = None  # on a CUDA device: the graph that decodes a token,
        self.replayed = None  # and the model and the step that it replays
        shape = CacheShape(
            b=b,
            n=self.n,
            k=k,
            h=config.num_attention_heads,
            h_kv=config.num_key_value_heads,
            d_k=config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        self.blocks = []
        for pair in quantizers:
            if is_packed:
                self.blocks.append(PackedBlockCache(pair, shape, self.pre_rope))
            else:
                self.blocks.append(FullPrecisionBlockCache(shape))

    def finish_groups(self):
        """Make codes of the newest group of tokens of each sequence in which it has become full.
        Call this after each token."""
        if self.g == 1:
            return
        full = [i for i, length in enumerate(self.lengths) if length % self.g == 0]
        if full:
            sequences = torch.tensor(full, device=self.next_slot.device)
            end = self.next_slot[sequences]
            for block in self.blocks:
                block.K.finish_group(sequences[:, None], end, block.kept[sequences])

    @property
    def has_outliers(self):
        stores = [store for block in self.blocks for store in (block.K, block.V)]
        return any(store.outliers is not None for store in stores)

    def bytes(self):
        """Return the bytes of all tensors of the blocks. Calibrated ranges and codebooks belong to
        the quantizers."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block.tensors())


@dataclass(frozen=True)
class CacheShape:
    """The shape and the dtype of the cache of a block."""

    b: int
    n: int
    k: int
    h: int
    h_kv: int
    d_k: int
    dtype: torch.dtype  # the model's
    device: torch.device


class BlockCache:
    """The Keys and Values of one block, each in a store; and beside them the k kept tokens, in the
    model's dtype and in the order of their slots. If a block keeps fewer (KVSink does up to block
    l_E), the unused entries have the slot n, one past the end."""

    def __init__(self, K, V, shape):
        self.K = K
        self.V = V
        self.n = shape.n
        self.kept = torch.full((shape.b, shape.k), shape.n, device=shape.device)  # slots
        kept_shape = (shape.b, shape.h_kv, shape.k, shape.d_k)
        self.kept_K = torch.zeros(kept_shape, dtype=shape.dtype, device=shape.device)
        self.kept_V = torch.zeros(kept_shape, dtype=shape.dtype, device=shape.device)

    def storing_quantizers(self, sequences):
        """Return a pair that takes the place of two quantizers in Algorithm 1 and stores the
        prompts of these sequences."""

        def store_K(K, leave_out):
            self.keep(sequences, leave_out)
            return self.fill(self.K, self.kept_K, sequences, K, leave_out)

        def store_V(V, leave_out):
            return self.fill(self.V, self.kept_V, sequences, V, leave_out)

        return store_K, store_V

    def keep(self, sequences, leave_out):
        """Remember the slots of the tokens that `leave_out` (r, 1, m, 1) masks."""
        before = leave_out[:, 0, :, 0].cumsum(1)  # (r, m): so many are kept up to each slot
        m = before.shape[1]
        i = torch.arange(1, self.kept.shape[1] + 1, device=before.device).repeat(len(before), 1)
        slots = torch.searchsorted(before, i)  # of the i-th kept token, or m
        self.kept[sequences[:, 0]] = torch.where(slots < m, slots, self.n)

    def fill(self, store, kept_X, sequences, X, leave_out):
        """Store the prompts X (r, h_kv, m, d_k), and the kept tokens as they are. Return X as
        attention will read it from the store."""
        slots = self.kept[sequences[:, 0]].clamp(max=X.shape[2] - 1)  # of unused entries: any
        kept_X[sequences[:, 0]] = X.take_along_dim(slots[:, None, :, None], dim=2)
        return store.fill(sequences, X, leave_out)

    def append(self, K, V, slot):
        """Eq. 6: store one token of every sequence, K and V (b, h_kv, 1, d_k), in `slot` (b, 1).
        Call `make_room` before."""
        sequences = torch.arange(len(K), device=K.device)[:, None]
        self.K.append(sequences, slot, K)
        self.V.append(sequences, slot, V)

    def make_room(self):
        """Make room for the outliers of one more token: any of its numbers may be an outlier, and
        compiled code cannot make room."""
        for store in (self.K, self.V):
            if store.outliers is not None:
                store.outliers.make_room(store.outliers.d)

    def tensors(self):
        return [self.kept, self.kept_K, self.kept_V, *self.K.tensors(), *self.V.tensors()]


class FullPrecisionBlockCache(BlockCache):
    """A BlockCache of numbers in full precision, over which PyTorch's own attention runs."""

    pre_rope = False

    def __init__(self, shape):
        super().__init__(FullPrecisionStore(shape), FullPrecisionStore(shape), shape)
        self.kernel = attention_kernel(self, shape)

    def attention(self, Q, slot, rope, window=None):
        """Eq. 3; see PackedBlockCache."""
        if self.kernel:
            return self.kernel(self, Q, slot, window)
        b, h, _, d_k = Q.shape
        unseen = unseen_slots(slot, window, self.n)
        K = self.K.X
        V = self.V.X
        Q = Q.view(b, -1, h // K.shape[1], d_k)  # the G queries that share a Key, as if tokens
        A = F.scaled_dot_product_attention(Q, K, V, attn_mask=~unseen[:, None, None, : self.n])
        return A.reshape(b, 1, h * d_k)


class PackedBlockCache(BlockCache):
    """A BlockCache of packed codes, which are decoded as attention reads them."""

    def __init__(self, quantizers, shape, pre_rope):
        quantize_K, quantize_V = quantizers
        super().__init__(PackedStore(quantize_K, shape), PackedStore(quantize_V, shape), shape)
        self.pre_rope = pre_rope
        self.kernel = attention_kernel(self, shape)
        if self.kernel:  # it multiplies along the channels of Keys, and along the tokens of Values
            self.K.codes = self.K.codes.contiguous()

    def attention(self, Q, slot, rope, window=None, unseen=None):
        """Eq. 3 for one query of each sequence: Q (b, h, 1, d_k), rotated, of the token in `slot`
        (b, 1) -> (b, 1, h d_k). The query sees its own slot and the slots before it, or a window of
        them, or those that a mask `unseen` (b, n + 1) leaves."""
        if self.kernel and unseen is None:
            return self.kernel(self, Q, slot, window)
        if unseen is None:
            unseen = unseen_slots(slot, window, self.n)
        b, h, _, d_k = Q.shape
        n = self.n
        h_kv = self.K.codes.shape[1]
        q = in_memory(Q.float().view(b, h_kv, h // h_kv, d_k))
        K_kept = self.kept_K
        if self.pre_rope:
            K_kept = apply_rope(K_kept, [table[self.kept][:, None] for table in rope])
        # Kept tokens are read from the tensors beside the codes. Their unused entries have slot n,
        # which is unseen.
        unseen_kept = unseen.gather(1, self.kept)[:, None, None]
        S_kept = dot(q, K_kept.float()) * d_k**-0.5  # (b, h_kv, G, k)
        S_kept = S_kept.masked_fill(unseen_kept, -torch.inf)
        unseen_codes = unseen.scatter(1, self.kept, True)[:, None, :n]
        # fp32, because compiled code for a CPU reads a mask slowly, byte by byte.
        unseen_codes = in_memory(unseen_codes.float())
        # Softmax by hand, one query at a time: the scores are written once, and read once for their
        # maximum.
        P = []
        P_kept = []
        S = self.K.scores(q, [table[:n] for table in rope] if self.pre_rope else None, slot)
        for S_g, S_kept_g in zip(S, S_kept.unbind(2)):
            S_g = torch.where(unseen_codes > 0, -torch.inf, S_g * d_k**-0.5)  # (b, h_kv, n)
            m = torch.cat((S_g.amax(-1, keepdim=True), S_kept_g), dim=-1).amax(-1, keepdim=True)
            P.append((S_g - m).exp())
            P_kept.append((S_kept_g - m).exp())
        P = torch.stack(P, dim=2)
        P_kept = torch.stack(P_kept, dim=2)
        Z = split_tokens(P, 3).sum(4).sum(3) + P_kept.sum(3)  # (b, h_kv, G)
        A_kept = dot(P_kept, self.kept_V.float().mT)
        A = (self.V.weighted_sum(P) + A_kept) / Z[..., None]
        return A.to(Q.dtype).view(b, 1, h * d_k)


def attention_kernel(block, shape):
    """Return the function that computes the attention of a block on an NVIDIA GPU in one pass, or
    None if there is none for such a block or such a GPU."""
    if shape.device.type != "cuda" or torch.version.hip:
        return None
    if torch.cuda.get_device_capability(shape.device) < (8, 0):  # no bfloat16
        return None
    try:
        from paper import attention_kernel
    except ImportError:  # Triton comes with PyTorch for CUDA, but not on every system
        return None
    return attention_kernel.attention if attention_kernel.can_serve(block, shape) else None


def unseen_slots(slot, window, n):
    """Return a mask (b, n + 1) of the slots that a query in `slot` (b, 1) does not see."""
    slots = torch.arange(n + 1, device=slot.device)  # one past the end is never seen
    return (slots > slot) | (slots <= slot - (window or n))


# --------------------------------------------------------------------------------------------------
# How the Keys or the Values of one block are stored


class FullPrecisionStore:
    """The numbers themselves, (b, h_kv, n, d_k)."""

    outliers = None
    bits = 16
    tokens = 0  # see PackedStore: as if all numbers had a static scale
    channels = 1

    def __init__(self, shape):
        size = (shape.b, shape.h_kv, shape.n, shape.d_k)
        self.X = torch.zeros(size, dtype=shape.dtype, device=shape.device)

    def fill(self, sequences, X, leave_out):
        slots = torch.arange(X.shape[2], device=X.device)[None]
        self.append(sequences, slots, X)
        return X

    def append(self, sequences, slots, X):
        self.X[sequences, :, slots] = X.transpose(1, 2)

    def tensors(self):
        return [self.X]


class PackedStore:
    """Codes of a few bits, packed into bytes, and the two parameters that decode them: scale and
    zero, or KVQuant's middle and half width. Dynamic parameters are stored in 16 bits, a pair for
    every token or for every g tokens; static ones are stored once.

    If g tokens share a scale, it can be computed only once all g have arrived. Until the next token
    comes, `residual` (b, h_kv, g, d_k) holds the newest group in full precision, as in KIVI; then
    the group gets its codes.
    """

    def __init__(self, quantizer, shape):
        check_head(shape.d_k)
        self.quantizer = with_fp16_params(quantizer)
        self.bits = quantizer.bits
        self.static = quantizer.static
        self.g = quantizer.tokens_per_group
        self.d_k = shape.d_k
        self.codes = self.empty_codes(shape)
        one_group = torch.zeros(1, shape.h_kv, self.g, shape.d_k, device=shape.device)
        self.residual = None
        if self.g > 1:
            self.residual = one_group.to(shape.dtype).repeat(shape.b, 1, 1, 1)
        self.parameters = list(self.quantizer.encode(one_group)[1:3])
        if not self.static:
            _, heads, _, groups = self.parameters[0].shape
            size = (shape.b, heads, shape.n // self.g, groups)
            self.parameters = [
                torch.zeros(size, dtype=torch.float16, device=shape.device) for _ in range(2)
            ]
        # So many tokens (0: all) and channels share a pair of parameters.
        self.tokens = 0 if self.static else self.g
        self.channels = shape.d_k // self.parameters[0].shape[-1]
        self.outliers = None
        if getattr(quantizer, "sparse", False):
            self.outliers = SparseOutliers(shape.b, shape.n, shape.h_kv * shape.d_k, shape.device)

    def empty_codes(self, shape):
        """Return codes (b, h_kv, n, bytes). If they are decoded by arithmetic, the tokens come last
        in memory, whatever the shape says: a vector register then holds neighbouring tokens, and no
        width leaves it half empty. A look-up in a codebook wants the channels last.

        On a CPU, if a token has a multiple of four bytes, four make one fp32 "number", (b, h_kv, n,
        bytes / 4), which `as_bytes` takes apart. It is never computed with. torch.compile loads
        fp32 straight into a vector register and all else through memory: over single bytes,
        attention took up to three times as long."""
        size = shape.d_k * self.bits // 8
        options = {"dtype": torch.uint8, "device": shape.device}
        if hasattr(self.quantizer, "levels"):  # the codebook
            return torch.zeros(shape.b, shape.h_kv, shape.n, size, **options)
        if shape.device.type == "cpu" and size % 4 == 0:
            size = size // 4
            options["dtype"] = torch.float32
        return torch.zeros(shape.b, shape.h_kv, size, shape.n, **options).mT

    def fill(self, sequences, X, leave_out):
        """Store prompts X (r, h_kv, m, d_k) from slot 0 on, and return them as they will be
        read."""
        if self.outliers is not None:
            self.outliers.counts[sequences[:, 0]] = 0  # forget those of an earlier prompt
        m = X.shape[2]
        slots = torch.arange(m, device=X.device)[None]
        self.store(sequences, slots, X, leave_out)
        X_ = self.quantizer(X, leave_out)
        if self.residual is None:
            return X_
        whole = m // self.g * self.g
        self.residual[sequences[:, 0], :, : m - whole] = X[:, :, whole:]
        return torch.cat((X_[:, :, :whole], X[:, :, whole:]), dim=2)

    def append(self, sequences, slots, X):
        """Store one token of every sequence, X (b, h_kv, 1, d_k), in `slots` (b, 1)."""
        if self.residual is None:
            self.store(sequences, slots, X, None)
        else:
            self.residual[sequences, :, slots % self.g] = X.transpose(1, 2)

    def finish_group(self, sequences, end, kept):
        """Make codes of the residual of `sequences` (r, 1), whose last token is in slot end - 1,
        (r, 1). `kept` (r, k) are the slots of their kept tokens."""
        slots = end - self.g + torch.arange(self.g, device=end.device)  # (r, g)
        leave_out = (slots[..., None] == kept[:, None]).any(-1)[:, None, :, None]
        self.store(sequences, slots, self.residual[sequences[:, 0]], leave_out)

    def store(self, sequences, slots, X, leave_out):
        codes, *parameters = self.quantizer.encode(X.float(), leave_out)
        codes = pack(codes, self.bits).contiguous().view(self.codes.dtype)
        self.codes[sequences, :, slots] = codes.transpose(1, 2)
        if not self.static:
            groups = slots[:, :: self.g] // self.g
            for stored, numbers in zip(self.parameters, parameters):
                stored[sequences, :, groups] = numbers.transpose(1, 2).half()
        if self.outliers is not None:
            is_outlier = parameters[2] if leave_out is None else parameters[2] & ~leave_out
            self.outliers.append(sequences, slots, X, is_outlier)

    # The hot path: `scores` and `weighted_sum`. They are written as products and sums, not as
    # matrix products, because torch.compile fuses these with the unpacking: each byte is read once,
    # for all of its codes and for all G queries that share the head, and the numbers that it
    # decodes to are never in memory. (Without torch.compile, those of a whole block are.)

    def scores(self, Q, rope, slot):
        """Return Q K^T for the queries Q (b, h_kv, G, d_k) of the tokens in `slot` (b, 1): G
        tensors (b, h_kv, n), fp32.

        `rope` is cos and sin (n, d_k) if Keys are stored before RoPE, in the codes and in
        `residual` alike; else None. A query that is rotated back by a Key's angle has the same
        product with the Key as the query has with the rotated Key."""
        K = list(self.dequantized())
        Q_n = Q[:, :, :, None, None]  # (b, h_kv, G, 1, 1, d_k)
        if rope is not None:
            Q_n = apply_rope(Q[:, :, :, None], (rope[0], -rope[1]))
            Q_n = Q_n.unflatten(3, (-1, self.g))  # (b, h_kv, G, n/g, g, d_k)
        # One tensor (b, h_kv, n/g, g) for each query:
        S = [sum(Q_g[..., channels] * K_ for channels, K_ in K).sum(-1) for Q_g in Q_n.unbind(2)]
        if self.residual is not None:  # the newest group has no codes yet
            group = torch.arange(S[0].shape[2], device=slot.device)
            newest = (group == slot // self.g)[:, None, :, None]
            residual = self.residual
            if rope is not None:
                slots = slot // self.g * self.g + torch.arange(self.g, device=slot.device)  # (b, g)
                residual = apply_rope(residual, [table[slots][:, None] for table in rope])
            of_residual = dot(Q, residual.float())  # (b, h_kv, G, g)
            S = [torch.where(newest, of_residual[:, :, i, None], S_g) for i, S_g in enumerate(S)]
        S = [S_g.flatten(2) for S_g in S]
        if self.outliers is not None:
            S = self.outliers.add_to_scores(torch.stack(S, dim=2), Q, rope, self).unbind(2)
        return S

    def weighted_sum(self, p):
        """Return p V, (b, h_kv, G, n) -> (b, h_kv, G, d_k), fp32."""
        V = [split_tokens(V_.flatten(2, 3), 2) for _, V_ in self.dequantized()]
        P = split_tokens(p, 3)[..., None].unbind(2)  # G times (b, h_kv, n/piece, piece, 1)
        A = [torch.cat([(p_g * V_).sum(3).sum(2) for V_ in V], dim=-1) for p_g in P]
        A = torch.stack(A, dim=2)
        return A if self.outliers is None else self.outliers.add_to_sum(A, p, self)

    def dequantized(self):
        """Yield a few neighbouring channels at a time: their slice, and their numbers (b, h_kv,
        n/g, g, a few)."""
        # On a CPU torch.compile writes what it stacks to memory. Fused, the conversion would make
        # the loop four times slower.
        parameters = torch.stack([numbers.float() for numbers in self.parameters])
        for channels, codes in slices(as_bytes(self.codes), self.quantizer.bits):
            first, second = (self.of_channels(numbers, channels) for numbers in parameters)
            yield channels, self.quantizer.decode(codes.unflatten(2, (-1, self.g)), first, second)

    def of_channels(self, numbers, channels):
        """Return one of the two parameters for a slice of channels, in a shape that broadcasts
        against (b, h_kv, n/g, g, a few)."""
        width = self.d_k // numbers.shape[-1]  # this many channels share one
        first = channels.start // width
        last = -(-channels.stop // width)
        numbers = numbers[..., first:last]
        if width > 1 < last - first:  # the slice has several groups, or parts of them
            numbers = numbers[..., None].expand(*numbers.shape, width).flatten(-2)
            numbers = numbers[..., channels.start - first * width : channels.stop - first * width]
        return numbers[..., None, :]

    def tensors(self):
        tensors = [self.codes, *self.parameters]
        if self.residual is not None:
            tensors.append(self.residual)
        if self.outliers is not None:
            tensors += self.outliers.tensors()
        return tensors


def check_head(d_k):
    if d_k % 8:
        raise ValueError(f"a head of {d_k} channels: codes are packed by eights")


def dot(Q, K):
    """Return Q K^T, (b, h_kv, G, d), (b, h_kv, m, d) -> (b, h_kv, G, m), for a small m: fused, it
    takes a few microseconds, and a matrix product some fifty."""
    return (Q[:, :, :, None] * K[:, :, None]).sum(-1)


def in_memory(X):
    """Return X. torch.compile writes to memory what it concatenates, and would otherwise compute it
    anew wherever it is read: in the loops over all tokens."""
    return torch.cat(X.chunk(2, dim=-1), dim=-1)


def split_tokens(X, axis):
    """Return X with its axis of tokens cut in pieces, as flash decoding does: on a CPU a sum over
    more than 4,096 numbers is half as fast, and a GPU needs more parallel sums than there are
    heads."""
    piece = math.gcd(X.shape[axis], 4096)
    return X.unflatten(axis, (-1, piece if piece >= 256 else X.shape[axis]))


# --------------------------------------------------------------------------------------------------
# KVQuant's outliers


class SparseOutliers:
    """KVQuant's sparse part. Each sequence has a list of its outliers in 16 bits, token by token,
    with the channel of each, counted through all heads (d = h_kv d_k); `counts` says how many each
    token has. The code of an outlier is the lowest or the highest. Their number is not known
    beforehand, so this part of the cache, and no other, grows, though rarely."""

    def __init__(self, b, n, d, device):
        self.d = d
        self.counts = torch.zeros(b, n, dtype=torch.int16, device=device)
        # The last entry of each list takes the numbers that are no outliers.
        self.channels = torch.zeros(b, 1, dtype=torch.int16, device=device)
        self.values = torch.zeros(b, 1, dtype=torch.float16, device=device)

    def make_room(self, count):
        """Make room for `count` more outliers in the fullest sequence, and for some more than that
        if the lists have to grow."""
        needed = int(self.counts.sum(1).max()) + count
        missing = needed + 1 - self.values.shape[1]
        if missing > 0:
            missing += needed // 128  # so that the lists do not grow with every token
            self.channels = F.pad(self.channels, (0, missing))
            self.values = F.pad(self.values, (0, missing))
        for entries in (self.channels, self.values):
            # Otherwise torch.compile would make code for each length, in each block.
            torch._dynamo.mark_dynamic(entries, 1)

    def append(self, sequences, slots, X, is_outlier):
        """Add the outliers of X (r, h_kv, m, d_k), those that the mask `is_outlier` marks."""
        X = X.transpose(1, 2).flatten(2)  # (r, m, d)
        is_outlier = is_outlier.transpose(1, 2).flatten(2)
        _, m, d = X.shape
        used = self.counts[sequences[:, 0]].sum(1, keepdim=True)
        if not torch.compiler.is_compiling():
            self.make_room(int(is_outlier.sum((1, 2)).max()))
        self.counts[sequences, slots] = is_outlier.sum(-1).to(torch.int16)
        is_outlier = is_outlier.flatten(1)
        last = self.values.shape[1] - 1
        entry = torch.where(is_outlier, used + is_outlier.cumsum(1) - 1, last)
        self.values[sequences, entry] = X.flatten(1).half()
        channels = torch.arange(d, device=X.device).repeat(m).to(torch.int16)
        self.channels[sequences, entry] = channels.expand_as(entry)

    def entries(self, store):
        """Return sequence, token, head and channel of every entry (b, e), and its error: by how
        much it exceeds the number that its code decodes to."""
        b, h_kv, n, _ = store.codes.shape
        d_k = store.d_k
        device = self.values.device
        ends = self.counts.cumsum(1)
        entry = torch.arange(self.values.shape[1], device=device).expand(b, -1).contiguous()
        sequence = torch.arange(b, device=device)[:, None]
        token = torch.searchsorted(ends, entry, right=True)
        is_used = token < n
        token = token.clamp(max=n - 1)
        head = self.channels.long() // d_k
        channel = self.channels.long() % d_k
        middle, half = (
            x.float().expand(b, h_kv, n, d_k)[sequence, head, token, channel]
            for x in store.parameters
        )
        value = self.values.float()
        levels = store.quantizer.levels
        error = value - torch.where(value < middle, levels[0], levels[-1]) * half - middle
        return sequence, token, head, channel, torch.where(is_used, error, 0.0)

    def add_to_scores(self, S, Q, rope, store):
        """Correct the scores S (b, h_kv, G, n) of queries Q (b, h_kv, G, d_k)."""
        sequence, token, head, channel, error = self.entries(store)
        d_k = Q.shape[3]
        Q = Q.transpose(2, 3)
        q = Q[sequence, head, channel]  # (b, e, G)
        if rope is not None:  # rotated back, as in `scores`, in one channel
            cos, sin = (table[token, channel, None] for table in rope)
            sign = torch.where(channel < d_k // 2, 1.0, -1.0)[..., None]
            q = q * cos + sign * Q[sequence, head, (channel + d_k // 2) % d_k] * sin
        index = (sequence, head, token)
        S = S.transpose(2, 3).index_put(index, error[..., None] * q, accumulate=True)
        return S.transpose(2, 3)

    def add_to_sum(self, A, p, store):
        """Correct the sums A (b, h_kv, G, d_k) with weights p (b, h_kv, G, n)."""
        sequence, token, head, channel, error = self.entries(store)
        p = p.transpose(2, 3)[sequence, head, token]  # (b, e, G)
        index = (sequence, head, channel)
        A = A.transpose(2, 3).index_put(index, error[..., None] * p, accumulate=True)
        return A.transpose(2, 3)

    def tensors(self):
        return [self.counts, self.channels, self.values]


# --------------------------------------------------------------------------------------------------
# Codes as bytes


def planes(bits):
    """Return the widths in which codes are stored: those that divide a byte and add up to `bits`,
    as 2 + 1 do to 3."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack(codes, bits):
    """Return codes (..., d) as bytes (..., d bits / 8), uint8; d is a multiple of 8.

    A plane of width w takes d w / 8 bytes. Its byte m holds, the lowest bits first, the codes of
    channels m, m + d w/8, m + 2 d w/8 and so on: neighbours lie side by side, so one shift unpacks
    a whole vector of bytes.
    """
    codes = codes.to(torch.uint8)
    parts = []
    for width in planes(bits):
        # Each tensor of the plane is (..., d w/8).
        plane = (codes & (2**width - 1)).unflatten(-1, (8 // width, -1)).unbind(-2)
        parts.append(sum(codes_i << (width * i) for i, codes_i in enumerate(plane)))
        codes = codes >> width
    return torch.cat(parts, dim=-1)


def slices(packed, bits):
    """Yield a few neighbouring channels at a time: their slice, and their codes (..., d/4 or d/8),
    int32.

    It only shifts bytes. Code that computes with a slice under torch.compile never has the codes in
    memory.
    """
    d = packed.shape[-1] * 8 // bits
    # 2 bits unpack to quarters of the channels, 1 bit to eighths.
    step = d * min(planes(bits)[-1], 2) // 8
    for first in range(0, d, step):
        codes = 0
        plane = 0  # its first byte
        shift = 0
        for width in planes(bits):
            part, offset = divmod(first, d * width // 8)
            byte = packed[..., plane + offset : plane + offset + step].to(torch.int32)
            codes = codes + (((byte >> (width * part)) & (2**width - 1)) << shift)
            plane = plane + d * width // 8
            shift = shift + width
        yield slice(first, first + step), codes


def as_bytes(codes):
    """Return the bytes (..., bytes) of the codes of a PackedStore, uint8. Those that lie four to a
    number are int32 under torch.compile, which cannot view a number as four others."""
    if codes.dtype == torch.uint8:
        return codes
    if not torch.compiler.is_compiling():
        of_words = codes.mT.view(torch.uint8).unflatten(-1, (-1, 4)).mT  # (..., words, 4, n)
        return of_words.flatten(-3, -2).mT
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=codes.device)
    return (codes.view(torch.int32)[..., None] >> shifts & 255).flatten(-2)


def unpack(packed, bits):
    """Return the codes (..., d), uint8, of bytes that `pack` made."""
    d = packed.shape[-1] * 8 // bits
    # Several bytes make one integer and are shifted at once, because without torch.compile bytes
    # one by one take twice as long.
    size = math.gcd(d * planes(bits)[-1] // 8, 8)
    packed = packed.contiguous().view(WORDS[size])
    codes = None
    first = 0
    shift = 0
    for width in planes(bits):
        words = packed[..., first : first + d * width // 8 // size]
        mask = int.from_bytes(bytes([2**width - 1]) * size, "little", signed=size > 1)
        m = words.shape[-1]
        parts = words.new_empty(*words.shape[:-1], d // size)
        for i in range(8 // width):  # straight into their places: torch.cat would copy them
            torch.bitwise_right_shift(words, width * i, out=parts[..., m * i : m * (i + 1)])
        parts &= mask
        codes = codes | parts << shift if shift else parts
        first = first + words.shape[-1]
        shift = shift + width
    return codes.view(torch.uint8)


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


# --------------------------------------------------------------------------------------------------
# What a PackedStore asks of a quantizer


@runtime_checkable
class StoredQuantizer(Protocol):
    """A quantizer whose codes a PackedStore can hold, such as quant.Quantizer and
    kvquant.NonUniformQuantizer.

    Three more attributes are optional:

    fp16_params   a dataclass's field: whether parameters are rounded to fp16, in which they are
                  stored, before codes are made with them. Without the field they always are.
    levels        the codebook, a tensor (2^bits,). Without it, codes are decoded by arithmetic.
    sparse        whether outliers are stored apart from their codes. This needs `levels`.
    """

    bits: int
    static: bool  # the parameters are the same for all tokens
    tokens_per_group: int  # this many tokens share a pair of parameters; 1 if they are static

    def encode(self, X, leave_out=None):
        """Return codes (..., n, d) of X (..., n, d), fp32, and two parameters; then, if `sparse`, a
        mask of the outliers. A parameter is (..., n, d/w) if w channels of a token share it, (...,
        n/g, d) if g tokens do. If static, n is 1. `leave_out` masks numbers that must not count."""

    def decode(self, codes, first, second):
        """Return the numbers, fp32, of codes and of parameters that broadcast against them."""

    def __call__(self, X, leave_out=None):
        """Encode X and decode it again, outliers as they are stored, in the dtype of X."""


def with_fp16_params(quantizer):
    """Return a quantizer that rounds its parameters to fp16, in which they are stored, before it
    makes codes with them."""
    return replace(quantizer, fp16_params=True) if hasattr(quantizer, "fp16_params") else quantizer


# --------------------------------------------------------------------------------------------------
# Table 4


def cache_bytes(config, n, bits, k=0):
    """Return the bytes that Table 4 counts for a cache of n tokens: `bits` per number, plus 16 bits
    per number for each of the k kept tokens. Scales and zeros are not counted."""
    numbers = 2 * config.num_hidden_layers * config.d_kv
    return numbers * n * bits / 8 + numbers * k * 2
