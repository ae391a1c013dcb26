"""Eq. 3 for the newest token of each sequence, over a KV cache as it is stored: a decoding step's
attention on an NVIDIA GPU, in Triton.

Read top to bottom: planes and slices, as `pack` makes them; codes as numbers; the factors of the
two matrix products; the products; scores; the kernel, which cuts the tokens of each head in parts;
the kernel that puts the parts together; the function that launches both.

What this file does not do: PackedBlockCache.attention in kvcache.py is the same in PyTorch, serves
everywhere else, and is what this is tested against. Keys stored before RoPE and KVQuant's codebooks
have no kernel.

With Eq. 11 in it, the score of a query q and the Key of token t is

    S_t = sum_c q_c scale_c (code_tc - zero_c)
        = sum_c (q_c scale_c) code_tc - sum_c q_c scale_c zero_c

if all tokens share the scale of channel c: scale and zero go to the small side, the query. If the
channels of a token share its scale, it goes to the score:

    S_t = scale_t (sum_c q_c code_tc - zero_t sum_c q_c)

The sum of the Values is the same with a token's weight in the place of q_c. So the codes, the large
side, are only unpacked and multiplied, and full precision is the same with nothing to unpack.

Tensor cores multiply factors of 16 bits. A code, an integer up to 255, is exact in bfloat16; a
query, or a weight, is the sum of two bfloat16, itself rounded and what that left over. Tensor cores
take 16 rows at a time, and at most 8 queries share a Key: rows 0 to 7 are the queries rounded, rows
8 to 15 what is left over.

Shapes: b sequences, n slots, H heads of Keys, G queries that share a Key, D channels of a head.
"""

import functools

import torch
import triton
import triton.language as tl

BLOCK = 64  # this many tokens at a time; the cache has room for a multiple of it
FACTOR = tl.constexpr(tl.bfloat16)
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) is computed as 2^(x LOG2_E)
LOWEST = tl.constexpr(-1e30)  # the score of a token that is not seen

# --------------------------------------------------------------------------------------------------
# Planes and slices. The codes of BITS bits of a token are stored in planes, the widest first; a
# byte of a plane of w bits has 8 / w codes, and those at the same place of their bytes are a slice,
# of D w / 8 neighbouring channels. Full precision counts as one plane of 16 bits with one slice.


@triton.constexpr_function
def planes(bits):
    """Return the number of planes."""
    return bits.bit_count()


@triton.constexpr_function
def width(bits, p):
    """Return w of plane p."""
    return [w for w in (16, 8, 4, 2, 1) if bits & w][p]


@triton.constexpr_function
def bits_before(bits, p):
    """Return how many bits of a code lie in the planes before plane p: the lower ones."""
    return sum([w for w in (16, 8, 4, 2, 1) if bits & w][:p])


@triton.constexpr_function
def slices(bits, p):
    """Return the number of slices of plane p."""
    return max(1, 8 // [w for w in (16, 8, 4, 2, 1) if bits & w][p])


@triton.constexpr_function
def slices_before(bits, p):
    """Return the number of slices of the planes before plane p."""
    return sum([max(1, 8 // w) for w in (16, 8, 4, 2, 1) if bits & w][:p])


@triton.constexpr_function
def channels(D, bits, p):
    """Return the number of channels of a slice of plane p, which is that of the plane's bytes."""
    return D * min(8, [w for w in (16, 8, 4, 2, 1) if bits & w][p]) // 8


@triton.constexpr_function
def row_size(D, bits):
    """Return the bytes of the codes of a token, or its numbers in full precision."""
    return D if bits == 16 else D * bits // 8


@triton.constexpr_function
def padded(m):
    """Return the next size that a tensor core takes."""
    return max(16, triton.next_power_of_2(m))


# --------------------------------------------------------------------------------------------------
# Codes as numbers


@triton.constexpr_function
def four_codes(w, j):
    """Return the PTX that makes two registers of two bfloat16 each of the codes that slice j has in
    the four bytes of one register. It takes half as long as a conversion of single integers, which
    is what the whole kernel would otherwise wait for.

    The trick is older than GPUs: the last bits of a float near a power of two count in steps of 1.
    128 in bfloat16 is 0x4300, and 0x4300 | code is 128 + code, up to 7 bits. For 8 bits the same
    goes through float32, whose 2^23 is 0x4B000000.
    """
    if w == 8:
        floats = [f"prmt.b32 f{i}, $2, c, 0x754{i}; sub.f32 f{i}, f{i}, c;" for i in range(4)]
        return (
            "{ .reg .b32 c, f0, f1, f2, f3; mov.b32 c, 0x4B000000; "
            + " ".join(floats)
            + " cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2; }"
        )
    mask = (2**w - 1) * 0x10001
    pairs = [
        f"prmt.b32 x, $2, 0, {bytes_}; shr.u32 x, x, {w * j}; "
        f"lop3.b32 x, x, {mask}, c, 0xEA; sub.rn.bf16x2 ${i}, x, c;"  # 0xEA is (x & mask) | c
        for i, bytes_ in enumerate(("0x4140", "0x4342"))
    ]
    return "{ .reg .b32 c, x; mov.b32 c, 0x43004300; " + " ".join(pairs) + " }"


@triton.jit
def numbers(stored, w: tl.constexpr, j: tl.constexpr, dtype: tl.constexpr):
    """Return the codes of slice j in the bytes of a plane, or numbers in full precision."""
    if w == 16:
        return stored
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            four_codes(w, j), "=&r,=&r,r", [stored], tl.bfloat16, is_pure=True, pack=4
        )
    else:  # Triton's interpreter knows neither PTX nor bfloat16
        return ((stored >> (w * j)) & (2**w - 1)).to(dtype)


# --------------------------------------------------------------------------------------------------
# The small side of the two products


@triton.jit
def in_two(X, dtype: tl.constexpr):
    """Round X (16, m), fp32, whose rows 8 to 15 repeat rows 0 to 7: these get what is left over."""
    row = tl.arange(0, 16)[:, None]
    rounded = X.to(dtype).to(tl.float32)
    return tl.where(row < 8, rounded, X - rounded).to(dtype)


@triton.jit
def in_one(X, m: tl.constexpr):
    """Add rows 8 to 15 of X (16, m) to rows 0 to 7: (8, m)."""
    return tl.sum(X.reshape(2, 8, m), axis=0)


# fmt: off
@triton.jit
def queries(Q, scale, zero, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
            SHARE: tl.constexpr, dtype: tl.constexpr):
    """Return the queries times scale, a factor (16, channels) for each slice; and the sums of
    queries times scale times zero (16,). SHARE channels have one scale; if SHARE is 0, scale and
    zero are 1."""
    factors = ()
    products = tl.zeros((16, padded(channels(D, BITS, 0))), tl.float32)
    for p in tl.static_range(planes(BITS)):
        for j in tl.static_range(slices(BITS, p)):
            x, z = slice_of_queries(Q, scale, zero, j, channels(D, BITS, p), G, D, SHARE)
            if p == 0:  # the slices of one plane have all channels
                products += x * z
            factors = factors + (in_two(x * 2.0 ** bits_before(BITS, p), dtype),)
    return factors, tl.sum(products, axis=1)


@triton.jit
def slice_of_queries(Q, scale, zero, j: tl.constexpr, m: tl.constexpr, G: tl.constexpr,
                     D: tl.constexpr, SHARE: tl.constexpr):
    """Return slice j, of m channels, of the queries times scale, and of zero."""
    row = tl.arange(0, 16)[:, None] % 8
    i = tl.arange(0, padded(m))[None, :]
    c = j * m + i
    x = tl.load(Q + row * D + c, (i < m) & (row < G), 0.0).to(tl.float32) * (D**-0.5 * LOG2_E)
    z = tl.full((1, 1), 1.0, tl.float32)
    if SHARE > 0:
        x *= tl.load(scale + c // SHARE, i < m, 0.0).to(tl.float32)
        z = tl.load(zero + c // SHARE, i < m, 0.0).to(tl.float32)
    return x, z


# --------------------------------------------------------------------------------------------------
# The large side: one plane of the codes of the tokens t


@triton.jit
def add_scores(S, q, K, t, D: tl.constexpr, BITS: tl.constexpr, p: tl.constexpr,
               dtype: tl.constexpr):
    """Return S (16, BLOCK) plus the products of the queries and plane p."""
    m: tl.constexpr = channels(D, BITS, p)
    i = tl.arange(0, padded(m))[:, None]
    place = t[None, :].to(tl.int64) * row_size(D, BITS) + D * bits_before(BITS, p) // 8 + i
    stored = tl.load(K + place, i < m, 0)  # (channels, BLOCK)
    for j in tl.static_range(slices(BITS, p)):
        codes = numbers(stored, width(BITS, p), j, dtype)
        S = tl.dot(q[slices_before(BITS, p) + j], codes, S)
    return S


@triton.jit
def add_values(A, P, shrink, V, t, n, D: tl.constexpr, BITS: tl.constexpr, p: tl.constexpr,
               dtype: tl.constexpr):
    """Return the sums A (16, channels) of the slices of plane p, times shrink (16,), plus the codes
    weighted by P (16, BLOCK)."""
    m: tl.constexpr = channels(D, BITS, p)
    i = tl.arange(0, padded(m))[None, :]
    if BITS == 16:
        place = t[:, None].to(tl.int64) * D + i
    else:  # in memory, tokens come last
        place = (D * bits_before(BITS, p) // 8 + i).to(tl.int64) * n + t[:, None]
    stored = tl.load(V + place, i < m, 0)  # (BLOCK, channels)
    sums = ()
    for j in tl.static_range(slices(BITS, p)):
        codes = numbers(stored, width(BITS, p), j, dtype)
        sums = sums + (tl.dot(P, codes, A[slices_before(BITS, p) + j] * shrink[:, None]),)
    return sums


@triton.jit
def store_values(out, A, parts, part, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
                 p: tl.constexpr):
    """Store the sums of the slices of plane p: out is (G, parts, planes, D)."""
    m: tl.constexpr = channels(D, BITS, p)
    i = tl.arange(0, padded(m))[None, :]
    query = tl.arange(0, 8)[:, None]
    place = ((query * parts + part) * planes(BITS) + p) * D + i
    for j in tl.static_range(slices(BITS, p)):
        X = in_one(A[slices_before(BITS, p) + j], padded(m)) * 2.0 ** bits_before(BITS, p)
        tl.store(out + place + j * m, X, (i < m) & (query < G))


# --------------------------------------------------------------------------------------------------
# The scores of the tokens t (BLOCK,)


@triton.jit
def scores(q, q_zero, K, K_scale, K_zero, t, D: tl.constexpr, BITS: tl.constexpr,
           K_TOKENS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Return S (16, BLOCK), in which rows 8 to 15 repeat rows 0 to 7."""
    S = tl.zeros((16, BLOCK), tl.float32)
    for p in tl.static_range(planes(BITS)):
        S = add_scores(S, q, K, t, D, BITS, p, dtype)
    S = tl.broadcast_to(in_one(S, BLOCK)[None], (2, 8, BLOCK)).reshape(16, BLOCK)
    if K_TOKENS == 1:
        s = tl.load(K_scale + t).to(tl.float32)
        z = tl.load(K_zero + t).to(tl.float32)
        S = (S - z[None, :] * q_zero[:, None]) * s[None, :]
    elif BITS < 16:
        S -= q_zero[:, None]
    return S


@triton.jit
def with_newest_group(S, S_newest, t, last, G: tl.constexpr, K_TOKENS: tl.constexpr):
    """Return S with the scores of the newest group, which has no codes yet."""
    query = tl.arange(0, 16)[:, None] % 8
    is_newest = (t // K_TOKENS == last // K_TOKENS)[None, :]
    place = query * K_TOKENS + t[None, :] % K_TOKENS
    newest = tl.load(S_newest + place, is_newest & (query < G), 0.0) * LOG2_E
    return tl.where(is_newest, newest, S)


@triton.jit
def seen(t, last, window, kept, k: tl.constexpr):
    """Return a mask of the tokens that the query sees and reads from codes."""
    mask = (t <= last) & (t > last - window)
    for i in tl.static_range(k):
        mask &= t != tl.load(kept + i).to(tl.int32)
    return mask


# --------------------------------------------------------------------------------------------------
# The kernels


@triton.jit
def attention_of_parts(
    Q, K, K_scale, K_zero, V, V_scale, V_zero, kept, newest, S_newest, out_m, out_Z, out_Z_zero,
    out_A, n, parts, window,
    k: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    K_TOKENS: tl.constexpr, K_CHANNELS: tl.constexpr, V_TOKENS: tl.constexpr,
    V_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Compute, for one head of one sequence and one part of its tokens, the maximum m of each
    query's scores, the sum Z of softmax's numerators exp(S - m), and the sum A of Values that they
    weight.

    newest                   the slot of the query's token (b,); it sees `window` slots up to that
    S_newest                 if groups of tokens share a scale: the scores (b, H, G, K_TOKENS) of
                             the newest group, which has no codes yet
    K_TOKENS, V_TOKENS       so many tokens share a scale; 0 if it is static and all do
    K_CHANNELS, V_CHANNELS   and so many channels
    """
    dtype: tl.constexpr = Q.dtype.element_ty if BITS == 16 else FACTOR
    head = tl.program_id(0).to(tl.int64)  # counted through all sequences
    part = tl.program_id(1)
    Q += head * G * D
    K += head * n * row_size(D, BITS)
    V += head * n * row_size(D, BITS)
    if K_TOKENS == 0:
        first_K = head % H * (D // K_CHANNELS)
    else:
        first_K = head * (n // K_TOKENS) * (D // K_CHANNELS)
    K_scale += first_K
    K_zero += first_K
    if V_TOKENS == 1:
        V_scale += head * n
        V_zero += head * n
    if BITS == 16 or K_TOKENS == 1:
        q, q_zero = queries(Q, K_scale, K_zero, G, D, BITS, 0, dtype)
    else:
        q, q_zero = queries(Q, K_scale, K_zero, G, D, BITS, K_CHANNELS, dtype)
    m = tl.full((16,), LOWEST, tl.float32)
    Z = tl.zeros((16,), tl.float32)
    Z_zero = tl.zeros((16,), tl.float32)  # the sum of numerators times scale times zero
    A = ()
    for p in tl.static_range(planes(BITS)):
        for _ in tl.static_range(slices(BITS, p)):
            A = A + (tl.zeros((16, padded(channels(D, BITS, p))), tl.float32),)

    last = tl.load(newest + head // H).to(tl.int32)
    first = tl.maximum(last + 1 - window, 0) // BLOCK
    blocks = tl.cdiv(last // BLOCK + 1 - first, parts)
    start = first + part * blocks
    end = tl.minimum(start + blocks, last // BLOCK + 1)
    for block in range(start, end):
        t = block * BLOCK + tl.arange(0, BLOCK)
        if K_TOKENS > 1:
            group = block * BLOCK // K_TOKENS * (D // K_CHANNELS)
            q, q_zero = queries(Q, K_scale + group, K_zero + group, G, D, BITS, K_CHANNELS, dtype)
        S = scores(q, q_zero, K, K_scale, K_zero, t, D, BITS, K_TOKENS, BLOCK, dtype)
        if K_TOKENS > 1:
            S = with_newest_group(S, S_newest + head * G * K_TOKENS, t, last, G, K_TOKENS)
        S = tl.where(seen(t, last, window, kept + head // H * k, k)[None, :], S, LOWEST)

        m_before = m
        m = tl.maximum(m, tl.max(S, axis=1))
        shrink = tl.exp2(m_before - m)
        P = tl.exp2(S - m[:, None])
        Z = Z * shrink + tl.sum(P, axis=1)
        if V_TOKENS == 1:
            P *= tl.load(V_scale + t).to(tl.float32)[None, :]
            z = tl.load(V_zero + t).to(tl.float32)
            Z_zero = Z_zero * shrink + tl.sum(P * z[None, :], axis=1)
        P = in_two(P, dtype)
        sums = ()
        for p in tl.static_range(planes(BITS)):
            sums += add_values(A, P, shrink, V, t, n, D, BITS, p, dtype)
        A = sums

    row = tl.arange(0, 16)
    place = (head * G + row) * parts + part
    tl.store(out_m + place, m, row < G)
    tl.store(out_Z + place, Z, row < G)
    tl.store(out_Z_zero + place, Z_zero, row < G)
    out_A += head * G * parts * planes(BITS) * D
    for p in tl.static_range(planes(BITS)):
        store_values(out_A, A, parts, part, G, D, BITS, p)


@triton.jit
def attention_of_all(
    Q, V_scale, V_zero, kept, K_kept, V_kept, newest, parts_m, parts_Z, parts_Z_zero, parts_A,
    out, parts, window,
    k: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    V_TOKENS: tl.constexpr, V_CHANNELS: tl.constexpr, PARTS: tl.constexpr, KEPT: tl.constexpr,
):
    """Put the parts of one query together, and the kept tokens, which are in full precision.
    PARTS and KEPT are `parts` and k, rounded up to powers of two."""
    query = tl.program_id(0).to(tl.int64)  # counted through all heads and sequences
    head = query // G
    sequence = head // H
    last = tl.load(newest + sequence)
    c = tl.arange(0, padded(D))
    q = tl.load(Q + query * D + c, c < D, 0.0).to(tl.float32) * (D**-0.5 * LOG2_E)

    i = tl.arange(0, KEPT)
    slot = tl.load(kept + sequence * k + i, i < k, 0)
    is_seen = (i < k) & (slot <= last) & (slot > last - window)
    place = (head * k + i[:, None]) * D + c[None, :]
    inside = (i < k)[:, None] & (c < D)[None, :]
    S_kept = tl.sum(tl.load(K_kept + place, inside, 0.0).to(tl.float32) * q[None, :], axis=1)
    S_kept = tl.where(is_seen, S_kept, LOWEST)

    part = tl.arange(0, PARTS)
    m_of_part = tl.load(parts_m + query * parts + part, part < parts, LOWEST)
    m = tl.maximum(tl.max(m_of_part), tl.max(S_kept))
    weight = tl.where(part < parts, tl.exp2(m_of_part - m), 0.0)
    Z = tl.sum(weight * tl.load(parts_Z + query * parts + part, part < parts, 0.0))
    Z_zero = tl.sum(weight * tl.load(parts_Z_zero + query * parts + part, part < parts, 0.0))
    A = tl.zeros((padded(D),), tl.float32)
    for first in range(0, parts * planes(BITS), 16):
        row = first + tl.arange(0, 16)
        there = row < parts * planes(BITS)
        m_of_row = tl.load(parts_m + query * parts + row // planes(BITS), there, LOWEST)
        place_A = (query * parts * planes(BITS) + row[:, None]) * D + c[None, :]
        A_of_row = tl.load(parts_A + place_A, there[:, None] & (c < D)[None, :], 0.0)
        A += tl.sum(tl.exp2(m_of_row - m)[:, None] * A_of_row, axis=0)
    if V_TOKENS == 1:
        A -= Z_zero
    elif BITS < 16:
        V_scale += head % H * (D // V_CHANNELS)
        V_zero += head % H * (D // V_CHANNELS)
        A -= Z * tl.load(V_zero + c // V_CHANNELS, c < D, 0.0)
        A *= tl.load(V_scale + c // V_CHANNELS, c < D, 0.0)

    P_kept = tl.where(is_seen, tl.exp2(S_kept - m), 0.0)
    A += tl.sum(P_kept[:, None] * tl.load(V_kept + place, inside, 0.0).to(tl.float32), axis=0)
    Z += tl.sum(P_kept)
    tl.store(out + query * D + c, A / Z, c < D)


# --------------------------------------------------------------------------------------------------
# Launching them


def can_serve(block, shape):
    """Return whether the kernels compute the attention of a block's cache of this shape."""
    K = block.K
    V = block.V
    if K.bits == 16:
        if shape.dtype not in (torch.float16, torch.bfloat16):
            return False
    elif block.pre_rope or hasattr(K.quantizer, "levels"):
        return False
    elif K.tokens == 1 and K.channels < shape.d_k or V.tokens == 1 and V.channels < shape.d_k:
        return False  # several scales in one token
    elif K.tokens > 1 and K.tokens % BLOCK or V.tokens > 1:
        return False
    return shape.h // shape.h_kv <= 8 and shape.d_k <= 256 and shape.n % BLOCK == 0


def attention(block, Q, slot, window):
    """Eq. 3 for one query of each sequence: Q (b, h, 1, d_k), rotated, of the token in `slot`
    (b, 1), over `block`, a BlockCache -> (b, 1, h d_k). It sees `window` slots up to its own."""
    K = block.K
    V = block.V
    b, h, _, d_k = Q.shape
    if K.bits == 16:
        stored_K = [K.X, K.X, K.X]  # there are no scales: these are not read
        stored_V = [V.X, V.X, V.X]
    else:
        stored_K = [K.codes, *K.parameters]
        stored_V = [V.codes.mT, *V.parameters]  # (b, h_kv, bytes, n)
    S_newest = block.kept_K  # not read
    if K.tokens > 1:
        q = Q.float().view(b, stored_K[0].shape[1], -1, d_k) * d_k**-0.5
        S_newest = q @ K.residual.float().mT
    kept = [block.kept, block.kept_K, block.kept_V]
    sharing = [K.tokens, K.channels, V.tokens, V.channels]
    window = window or block.n
    return launch(Q.contiguous(), stored_K, stored_V, kept, slot, S_newest, window, K.bits, sharing)


def plan(bits, K_tokens):
    """Return what was measured to be fast: how many tokens a program takes at a time, its warps,
    and how many programs a multiprocessor runs at once."""
    if K_tokens > 1 and K_tokens % (2 * BLOCK) == 0:
        return 2 * BLOCK, 2, 8  # queries are scaled anew each time
    if bits >= 8:
        return BLOCK, 4, 4 if bits == 8 else 2
    return BLOCK, 1, 8  # so few bytes that one warp works through them by itself


@torch.library.custom_op("kvsink::attention", mutates_args=())
def launch(
    Q: torch.Tensor, K: list[torch.Tensor], V: list[torch.Tensor], kept: list[torch.Tensor],
    slot: torch.Tensor, S_newest: torch.Tensor, window: int, bits: int, sharing: list[int],
) -> torch.Tensor:
    """Launch the two kernels. To torch.compile this is one operation."""
    b, h, _, d_k = Q.shape
    _, h_kv, n, _ = K[0].shape
    K_tokens, K_channels, V_tokens, V_channels = sharing
    k = kept[0].shape[1]
    block, warps, programs = plan(bits, K_tokens)
    parts = -(-multiprocessors(Q.device) * programs // (b * h_kv))
    parts = max(1, min(parts, n // BLOCK))
    m, Z, Z_zero = (torch.empty(b * h, parts, device=Q.device) for _ in range(3))
    A = torch.empty(b * h, parts, bits.bit_count(), d_k, device=Q.device)
    out = torch.empty(b, 1, h * d_k, dtype=Q.dtype, device=Q.device)
    shape = {"k": k, "H": h_kv, "G": h // h_kv, "D": d_k, "BITS": bits}
    attention_of_parts[(b * h_kv, parts)](
        Q, *K, *V, kept[0], slot, S_newest, m, Z, Z_zero, A, n, parts, window, **shape,
        K_TOKENS=K_tokens, K_CHANNELS=K_channels, V_TOKENS=V_tokens, V_CHANNELS=V_channels,
        BLOCK=block, num_warps=warps, num_stages=3,
    )
    attention_of_all[(b * h,)](
        Q, *V[1:], *kept, slot, m, Z, Z_zero, A, out, parts, window, **shape,
        V_TOKENS=V_tokens, V_CHANNELS=V_channels, PARTS=triton.next_power_of_2(parts),
        KEPT=triton.next_power_of_2(max(1, k)),
    )
    return out
# fmt: on


@launch.register_fake
def _(Q, K, V, kept, slot, S_newest, window, bits, sharing):
    b, h, _, d_k = Q.shape
    return torch.empty(b, 1, h * d_k, dtype=Q.dtype, device=Q.device)


@functools.cache
def multiprocessors(device):
    """Return how many a GPU has; 1 for a CPU, on which Triton's interpreter runs the kernels."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
