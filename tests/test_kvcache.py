"""The packed cache (paper/kvcache.py), and decoding from it (Equations 5 and 6 in
paper/generate.py).

Its logits are held against quantizing and dequantizing all Keys and Values in every step, its bytes
against Table 4's formula, what it stores against NumPy in float64 or numbers worked by hand.
"""

import copy
import functools
import math
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

import kvsink
from kvsink import full_precision_cache, pfn
from llama import Llama, LlamaConfig, apply_rope, rope_table
from paper import generate, kvquant
from paper.kvcache import KVCache, Packed, cache_bytes, pack, unpack
from quant import Quantizer
from support.results import Row, average_bits, rtn_bits, stored_bits
from tests.helpers import (
    CHANNEL,
    EMERGENCE,
    FAMILIES,
    SITE,
    SMALL,
    STRONG,
    WEAK,
    cache_of,
    ordinary_tokens,
    planted_model,
    write_model,
)

SCHEMES = list(kvsink.SCHEMES)
RULES = (("none", 0), ("pfn", 2), ("kvsink", 2))
RECIPES = [
    kvquant.Recipe(keep, N, rho) for keep, N in (("pfn", 3), ("kvsink", 2)) for rho in (0.0, 0.1)
]

# --------------------------------------------------------------------------------------------------
# Codes as bytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    """Byte by byte and bit by bit: a plane of width w has d w/8 bytes, and byte m the codes of m, m
    + d w/8, ..."""
    widths = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    for shape in [(8,), (3, 16), (2, 5, 128)]:
        codes, d = torch.randint(0, 2**bits, shape, dtype=torch.uint8), shape[-1]
        rows = []
        for row in codes.view(-1, d).tolist():
            packed, below = [], 0
            for w in widths:
                at = d * w // 8
                planes = [[code >> below & 2**w - 1 for code in row[m::at]] for m in range(at)]
                packed += [sum(code << w * i for i, code in enumerate(plane)) for plane in planes]
                below += w
            rows.append(packed)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], d * bits // 8)
        assert packed.view(len(rows), -1).tolist() == rows
        assert torch.equal(unpack(packed, bits), codes)


def test_packing_by_hand():
    codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert pack(codes, 2).tolist() == [
        0b01_11_10_00,
        0b00_10_11_01,
    ]  # 0, 2, 3, 1 and 1, 3, 2, 0, lowest first


def test_16_bit_parameters_against_numpy():
    """Scale in fp16, zero a whole number within fp16, codes made with both. The rows: ordinary,
    tiny and wide groups, one that is narrow and far off, constants."""
    X = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    X = X * torch.tensor([1.0, 1e-3, 300.0, 1.0, 1.0, 0.0])[:, None]
    X[0, 0, 3], X[0, 0, 4] = X[0, 0, 3] * 1e-4 + 50, -7.25
    q = Quantizer(8, "token", None, fp16_params=True)
    for row, out in zip(X[0, 0].double().numpy(), q(X)[0, 0].double().numpy()):
        lo, hi = row.min(), row.max()
        s = (hi - lo) / 255 if hi > lo else (abs(lo) or 1.0)
        s = np.float64(np.float16(max(s, abs(lo) / 2**15, 2**-24)))
        z = np.float64(np.float16(-np.round(lo / s)))
        expected = s * (np.clip(np.round(row / s) + z, 0, 255) - z)
        assert abs(out - expected).max() <= s * 1e-4 + 1e-9  # no code is another
        assert abs(out - row).max() <= 1.01 * s * (0.5 + 255 * 2**-11)
    codes, s, z = q.encode(X)
    assert (
        s.shape == z.shape == (1, 1, 6, 1)
        and torch.equal(s, s.half().float())
        and torch.equal(z, z.half().float())
    )
    assert torch.equal(q.decode(codes, s, z), q(X)) and q(X)[0, 0, 4:].tolist() == [
        [-7.25] * 8,
        [0.0] * 8,
    ]


# --------------------------------------------------------------------------------------------------
# Logits: those of quantizing and dequantizing


def step_by_step(model, tokens, prompt, quantizers, keep, N, pre_rope):
    """Logits (n - prompt + 1, vocab) after the prompt and each further token of tokens (n,), by
    quantizing and dequantizing all Keys and Values so far in each step. Of groups of tokens, the
    newest is not quantized before the token after it comes, except in the prompt, where it is when
    it is full."""
    Ks, Vs, S_sinks, logits = {}, {}, {}, []
    for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(tokens)))]:
        H, rope = model.embedding(tokens[None, begin:end]), rope_table(model.config, end, "cpu")
        turn, S_sink = [table[begin:] for table in rope], pfn(H, N if keep == "pfn" else 0)
        for l, block in enumerate(model.blocks, start=1):
            S_sinks.setdefault(l, S_sink)  # the prompt's
            sink = F.pad(S_sinks[l], (0, end - prompt))[:, None, :, None]
            Q, K, V = block.QKV(block.LN_mhsa(H))
            Q, K = apply_rope(Q, turn), K if pre_rope else apply_rope(K, turn)
            Ks[l], Vs[l] = (
                torch.cat((X[l], new), 2) if l in X else new for X, new in ((Ks, K), (Vs, V))
            )
            K, V = (
                torch.where(sink, X, quantize(X, sink))
                for X, quantize in zip((Ks[l], Vs[l]), quantizers[l - 1])
            )
            if (
                getattr(quantizers[l - 1][0], "granularity", "") == "channel"
                and not quantizers[l - 1][0].static
            ):
                g = quantizers[l - 1][0].group_size
                whole = (end - (begin > 0)) // g * g
                K = torch.cat((K[:, :, :whole], Ks[l][:, :, whole:]), 2)
            K = apply_rope(K, rope) if pre_rope else K
            G = Q.shape[1] // K.shape[1]
            scores = Q @ K.repeat_interleave(G, 1).mT / Q.shape[-1] ** 0.5
            ahead = torch.arange(end)[None] > torch.arange(begin, end)[:, None]
            A = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ V.repeat_interleave(G, 1)
            H = block.W_o(A.transpose(1, 2).flatten(2)) + H
            H = block.FFN(block.LN_ffn(H)) + H
            if begin == 0 and l == EMERGENCE and keep == "kvsink":
                sinks = H[0, :, CHANNEL].abs().topk(N).indices
                S_sink = torch.zeros(1, end, dtype=torch.bool).index_fill(1, sinks, True)
        logits.append(model.logits(H[:, -1]))
    return torch.cat(logits)


def decoded(
    model,
    tokens,
    prompt,
    quantizers,
    keep="none",
    N=0,
    pre_rope=False,
    step=generate.decode_block,
    room=None,
):
    """The same from a packed cache of tokens (n,), or of more room; and the cache."""
    cache = KVCache(model, quantizers, room or len(tokens), k=N, pre_rope=pre_rope)
    logits = [generate.prefill(model, cache, [tokens[:prompt].tolist()], keep, N, SITE)]
    for token in tokens[prompt:]:
        logits.append(generate.decode(model, cache, token[None], step))
    return torch.cat(logits), cache


def as_stored(quantizers):
    """Scale and zero of dynamic quantizers in the 16 bits that a cache gives them."""
    return [tuple(replace(q, fp16_params=True) for q in pair) for pair in quantizers]


@functools.cache
def kvquant_calibrated():
    """recipe -> Calibration of the planted model, on two windows with a sink of each kind."""
    windows = torch.stack([ordinary_tokens(40, seed) for seed in (1, 2)])
    windows[0, [5, 22]] = windows[1, [17, 18]] = torch.tensor([STRONG, WEAK])
    return kvquant.calibrate(planted_model(), windows, RECIPES, SITE, quiet=True)


def sparse_cache(bits, device="cpu"):
    """KVQuant with a tenth of the Keys stored apart. Its ranges are wider by 1 %, so that they end
    between the Keys of block 1. These depend on the token alone: the calibrated quantile is one of
    them, and rounding would decide."""
    calibration = kvquant.Calibration(
        *(part.to(device) for part in kvquant_calibrated()[RECIPES[-1]])
    )
    calibration = calibration._replace(lo=1.01 * calibration.lo, hi=1.01 * calibration.hi)
    return kvquant.kvquant_cache(calibration, 0.1, bits)


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("keep, N", RULES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_cache_gives_the_logits_of_quantizing_and_dequantizing(
    planted, sequences, scheme, bits, keep, N, pre_rope
):
    """Token by token, from a prompt of 22 tokens to 33, by which two groups of 8 become full; sinks
    at 6 and 17."""
    tokens = torch.cat((sequences[0][0], ordinary_tokens(9, 3)))
    quantizers = cache_of(planted, scheme, bits, tokens[None], keep, N, pre_rope)
    expected = step_by_step(planted, tokens, 22, as_stored(quantizers), keep, N, pre_rope)
    logits, _ = decoded(planted, tokens, 22, quantizers, keep, N, pre_rope)
    # To rounding: 1e-6, unless somewhere a sum is rounded the other way, to another code. That is
    # far less than what quantization does, and than what keeping other tokens would.
    error = (expected - planted(tokens[None])[0, 21:]).norm()
    assert (logits - expected).norm() < min(0.01 * expected.norm(), 0.25 * error)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_packed_cache_of_kvquant_gives_the_logits_of_quantizing_and_dequantizing(
    planted, bits, recipe
):
    """Codebooks, ranges by channel and by token, and outliers in 16 bits, of which tokens here have
    many."""
    tokens = torch.cat((ordinary_tokens(24, 5), ordinary_tokens(10, 3)))
    tokens[[6, 17]] = torch.tensor([WEAK, STRONG])
    quantizers = kvquant.kvquant_cache(kvquant_calibrated()[recipe], recipe.rho, bits)
    expected = step_by_step(planted, tokens, 19, quantizers, recipe.keep, recipe.N, True)
    logits, cache = decoded(planted, tokens, 19, quantizers, recipe.keep, recipe.N, True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    outliers = cache.blocks[3].K.outliers
    assert (outliers is None) == (recipe.rho == 0)
    if outliers:
        K = keys_in_full_precision(planted, tokens, 3)
        lo, hi, kept = quantizers[3][0].lo, quantizers[3][0].hi, cache.blocks[3].kept[0]
        counts = (
            ((K < lo) | (K > hi)).sum((0, 1, 3)).index_fill(0, kept, 0)
        )  # in the cache they are nearly those
        assert counts.sum() > 200 and (outliers.counts[0] - counts).abs().sum() < 0.2 * counts.sum()
        assert (outliers.counts[0, kept] == 0).all()


def keys_in_full_precision(model, tokens, l):
    """The Keys of block l (from 0), before RoPE."""
    H, rope = model.embedding(tokens[None]), rope_table(model.config, len(tokens), "cpu")
    for block in model.blocks[:l]:
        H = block(H, rope)
    _, K, _ = model.blocks[l].QKV(model.blocks[l].LN_mhsa(H))
    return K


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_in_full_precision_is_the_model(family, tmp_path):
    """With GQA, other RoPEs and Mistral's window of 16 tokens, which the text outgrows. To store
    Keys before RoPE changes nothing."""
    model = Llama.from_pretrained(write_model(tmp_path / "model", {**SMALL, **FAMILIES[family]}))
    tokens = torch.tensor(np.random.RandomState(1).randint(0, 97, 40))
    for pre_rope in (False, True):
        logits, _ = decoded(model, tokens, 10, full_precision_cache(model), pre_rope=pre_rope)
        torch.testing.assert_close(logits, model(tokens[None])[0, 9:], rtol=1e-4, atol=1e-4)
    quantizers = kvsink.rtn_cache(model, "token-dynamic", 8, 16)
    logits_8, _ = decoded(model, tokens, 10, quantizers)  # Packed sees the same tokens
    assert 0 < (logits_8 - logits).norm() < 0.02 * logits.norm()


@pytest.mark.parametrize(
    "d_k, group", [(32, 4), (32, 16), (32, 32), (48, 16), (48, 24)]
)  # slices of 8 and 12 channels
@pytest.mark.parametrize("n", [96, 768])  # one piece of tokens, three of 256
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_and_weighted_sum_are_products_with_what_comes_back(scheme, n, d_k, group):
    """Of two sequences, two heads of 32 or 48 channels, three queries each; several groups in a
    slice of channels, or one."""
    draw = torch.Generator().manual_seed(0)
    K, V = torch.randn(2, 2, 2, n, d_k, generator=draw)
    q, p = (
        torch.randn(2, 2, 3, d_k, generator=draw),
        torch.randn(2, 2, 3, n, generator=draw).softmax(-1),
    )
    pair = as_stored(kvsink.rtn_cache(SimpleNamespace(blocks=[0]), scheme, 3, group))[0]
    for quantizer, X, product in zip(pair, (K, V), (lambda X: q @ X.mT, lambda X: p @ X)):
        quantizer.calibrate(X) if quantizer.static else None
        store = Packed(quantizer, 2, 2, n, d_k, torch.float32, "cpu")
        store.fill(torch.arange(2)[:, None], torch.arange(n)[None], X, None)
        at = torch.full((2, 1), n)  # the next token
        out = torch.stack(store.scores(q, None, at), dim=2) if X is K else store.weighted_sum(p)
        torch.testing.assert_close(out, product(quantizer(X)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_as_a_graph(planted, sequences, monkeypatch, capsys, fails):
    """With a graph that notes its work when it is captured, and does it when it is replayed: the
    same logits, and no token is written twice. Where it cannot be captured, one line says so."""
    tokens, done = torch.cat((sequences[0][0], ordinary_tokens(9, 3))), []
    quantizers = cache_of(planted, "channel-dynamic", 3, tokens[None], "kvsink", 2)
    expected, _ = decoded(planted, tokens, 22, quantizers, "kvsink", 2)
    cache = KVCache(planted, quantizers, len(tokens), k=2)
    logits = [generate.prefill(planted, cache, [tokens[:22].tolist()], "kvsink", 2, SITE)]
    decode_step = generate.decode_step

    def noted(model, cache, step, tokens):
        done.append((tokens, decode_step(model, cache, step, tokens)))
        return done[-1][1]

    class Graph:
        def replay(self):
            tokens, logits = done[2]  # after two rounds of warming up
            logits.copy_(decode_step(planted, cache, generate.decode_block, tokens))

    @contextmanager
    def capture(graph, stream):
        if fails:
            raise RuntimeError("operation not permitted\nand more")
        yield
        cache.at -= 1  # to capture is not to run

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stub in (("Stream", lambda device: stream), ("current_stream", lambda device: stream),
                       ("stream", lambda stream: nullcontext()), ("CUDAGraph", Graph), ("graph", capture)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(generate, "decode_step", noted)
    replay = generate.capture_cuda_graph(planted, cache, generate.decode_block)
    assert len(done) == (2 if fails else 3) and cache.at.tolist() == [[22]]
    for token in tokens[22:]:
        logits.append(replay(token[None]))
        cache.lengths = [cache.lengths[0] + 1]
        cache.finish_groups()
    torch.testing.assert_close(torch.cat(logits), expected)
    said = capsys.readouterr().err.splitlines()
    assert (
        said
        == ["decoding without a CUDA graph, which could not be captured: operation not permitted"]
        * fails
    )
    sparse = KVCache(planted, sparse_cache(3), 24, pre_rope=True)
    assert (
        generate.capture_cuda_graph(planted, sparse, generate.decode_block).func is noted
    )  # whose outliers grow


@pytest.mark.parametrize("scheme", ["channel-static", "channel-dynamic", "kvquant"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(planted, sequences, scheme):
    """Prompts of 20, 11 and 15 tokens in one cache, each with its own sinks, and 12 steps."""
    pre_rope = scheme == "kvquant"
    quantizers = (
        sparse_cache(3) if pre_rope else cache_of(planted, scheme, 3, sequences[0], "kvsink", 2)
    )
    prompts = [
        sequences[0][0][:20].tolist(),
        sequences[0][1][:11].tolist(),
        ordinary_tokens(15, 8).tolist(),
    ]
    more = torch.stack([ordinary_tokens(12, seed) for seed in (1, 2, 3)])
    cache = KVCache(planted, quantizers, 32, b=3, k=2, pre_rope=pre_rope)
    together = [generate.prefill(planted, cache, prompts, "kvsink", 2, SITE)]
    together += [generate.decode(planted, cache, tokens) for tokens in more.T]
    for i, prompt in enumerate(prompts):
        tokens = torch.cat((torch.tensor(prompt), more[i]))
        alone, own = decoded(planted, tokens, len(prompt), quantizers, "kvsink", 2, pre_rope)
        torch.testing.assert_close(torch.stack(together)[:, i], alone, rtol=1e-3, atol=1e-3)
        kept, kept_alone = cache.blocks[-1].kept[i], own.blocks[-1].kept[0]
        assert torch.equal(kept, kept_alone)
    assert cache.lengths == [32, 23, 27] and cache.at.flatten().tolist() == cache.lengths
    assert cache.blocks[-1].kept[:2].tolist() == [[6, 17], [3, 9]]


def test_the_sinks_of_the_prompt_are_kept_for_the_whole_generation(planted, sequences):
    """Bit for bit and with their slots, in the blocks after l_E; new tokens are not, whatever they
    are."""
    tokens = torch.cat((sequences[0][0], torch.tensor([STRONG, WEAK, 20])))
    quantizers = kvsink.rtn_cache(planted, "token-dynamic", 2, 8)
    cache = KVCache(planted, quantizers, 27, k=2)
    seen = []
    storing_quantizers = [
        block_cache.storing_quantizers(torch.tensor([[0]])) for block_cache in cache.blocks
    ]
    watched = [
        tuple(lambda X, S, f=f: (seen.append(X), f(X, S))[1] for f in pair)
        for pair in storing_quantizers
    ]
    kvsink.prefill(
        planted, planted.embedding(tokens[None, :24]), watched, l_E=EMERGENCE, c=CHANNEL, k=2
    )
    before = [(c.kept.clone(), c.kept_K.clone(), c.kept_V.clone()) for c in cache.blocks]
    cache.lengths, cache.at[:] = [24], 24
    for token in tokens[24:]:
        generate.decode(planted, cache, token[None])
    for l, (c, old) in enumerate(zip(cache.blocks, before), start=1):
        assert all(torch.equal(now, then) for now, then in zip((c.kept, c.kept_K, c.kept_V), old))
        assert c.kept.tolist() == (
            [[6, 17]] if l > EMERGENCE else [[27, 27]]
        )  # 27: one past the end, unused
        if l > EMERGENCE:
            K, V = seen[2 * l - 2 : 2 * l]
            assert torch.equal(c.kept_K, K[:, :, [6, 17]]) and torch.equal(
                c.kept_V, V[:, :, [6, 17]]
            )


@pytest.mark.parametrize("scheme", ["full", "token-dynamic", "channel-dynamic"])
def test_a_prompt_may_fill_the_cache(planted, sequences, scheme):
    """Exactly: 24 tokens of 24, the last two of them decoded or in the prompt. One more is too
    many, for either."""
    tokens, keep = sequences[0][0], "none" if scheme == "full" else "kvsink"
    quantizers = (
        full_precision_cache(planted)
        if scheme == "full"
        else kvsink.rtn_cache(planted, scheme, 3, 8)
    )
    stored = quantizers if scheme == "full" else as_stored(quantizers)
    for prompt in (22, 24):
        expected = step_by_step(planted, tokens, prompt, stored, keep, 2, False)
        logits, cache = decoded(planted, tokens, prompt, quantizers, keep, 2)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert cache.n == 24 and cache.lengths == [24]
    with pytest.raises(ValueError, match="made for 24 tokens and is full"):
        generate.decode(planted, cache, torch.tensor([20]))
    with pytest.raises(ValueError, match="the prompt has 25 tokens, and the cache was made for 24"):
        generate.prefill(planted, cache, [[*tokens.tolist(), 20]], keep, 2, SITE)


def test_a_cache_that_is_full_or_asked_for_too_much(planted):
    cache = KVCache(planted, full_precision_cache(planted), 6)
    with pytest.raises(ValueError, match="the prompt has 7 tokens, and the cache was made for 6"):
        generate.prefill(planted, cache, [[20] * 7])
    with pytest.raises(ValueError, match="empty"):
        generate.prefill(planted, cache, [[]])
    keeping = KVCache(planted, kvsink.rtn_cache(planted, "token-dynamic", 2, 8), 16, k=5)
    for keep in ("pfn", "none"):
        with pytest.raises(ValueError, match="cannot keep 5 of 4"):
            generate.prefill(planted, keeping, [[20] * 4], keep, 5)
    logits = generate.prefill(
        planted, keeping, [[20, 21, 22, 23, 24]], "pfn", 5
    )  # all of a prompt is not too much
    torch.testing.assert_close(logits, planted(torch.tensor([[20, 21, 22, 23, 24]]))[:, -1])
    with pytest.raises(ValueError, match="cannot keep 6 tokens in a cache that was made to keep 5"):
        generate.prefill(planted, keeping, [[20] * 8], "pfn", 6)
    generate.prefill(planted, cache, [[20] * 5])
    generate.decode(planted, cache, torch.tensor([21]))
    with pytest.raises(ValueError, match="made for 6 tokens and is full"):
        generate.decode(planted, cache, torch.tensor([21]))
    with pytest.raises(ValueError, match="12 channels"):
        Packed(Quantizer(2, "token"), 1, 1, 4, 12, torch.float32, "cpu")


@pytest.mark.parametrize("scheme", ["channel-static", "channel-dynamic", "kvquant"])
def test_a_cache_can_be_filled_again(planted, sequences, scheme):
    """Of the first, longer prompt and what followed it nothing is seen any more."""
    tokens, pre_rope = sequences[0][1], scheme == "kvquant"
    if pre_rope:
        quantizers = kvquant.kvquant_cache(kvquant_calibrated()[RECIPES[-1]], 0.1, 3)
    else:
        quantizers = cache_of(planted, scheme, 3, sequences[0], "kvsink", 2)
    expected, _ = decoded(planted, tokens, 15, quantizers, "kvsink", 2, pre_rope)
    cache = KVCache(planted, quantizers, 24, k=2, pre_rope=pre_rope)
    generate.prefill(planted, cache, [sequences[0][0][:20].tolist()], "kvsink", 2, SITE)
    generate.decode(planted, cache, torch.tensor([STRONG]))
    logits = [generate.prefill(planted, cache, [tokens[:15].tolist()], "kvsink", 2, SITE)]
    logits += [generate.decode(planted, cache, token[None]) for token in tokens[15:]]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Bytes: those of Table 4


def shaped(**changes):
    """What KVCache asks of a model, in the shape of the default one, without its weights."""
    shape = {
        "hidden_size": 576,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig.from_dict({**SMALL, **shape, **changes})
    return SimpleNamespace(
        config=config, embedding=SimpleNamespace(weight=torch.zeros(1, dtype=torch.float16))
    )


@pytest.mark.parametrize("scheme", [*SCHEMES, "full"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_bytes_of_a_cache_are_those_of_table_4(scheme, bits):
    """2 L n d_kv b/8 and k 2 L d_kv 2 bytes within 1 %; 32 bits more for each group where ranges
    are dynamic, and for groups of tokens the one that waits in 16 bits."""
    model, n, k, g, L, d_kv = shaped(), 4096, 5, 64, 3, 192
    quantizers, expected, groups = (
        full_precision_cache(SimpleNamespace(blocks=range(L))),
        2 * L * n * d_kv * 2,
        0,
    )
    if scheme != "full":
        quantizers = kvsink.rtn_cache(SimpleNamespace(blocks=range(L)), scheme, bits, g)
        for q in (q for pair in quantizers for q in pair if q.static):
            q.calibrate(torch.randn(1, 3, 10, 64))
        expected = 2 * L * n * d_kv * bits / 8 + k * 2 * L * d_kv * 2
        assert cache_bytes(model.config, n, bits, k) == expected
        groups = 0 if kvsink.SCHEMES[scheme].static else 2 * L * n * d_kv / g
    cache = KVCache(model, quantizers, n, k=0 if scheme == "full" else k)
    waiting = L * g * d_kv * 2 if scheme == "channel-dynamic" else 0
    assert cache.bytes() == pytest.approx(expected + 4 * groups + waiting, rel=0.01)
    own = [part for c in cache.blocks for part in (c.kept, c.kept_K, c.kept_V)]
    for store in (store for c in cache.blocks for store in (c.K, c.V)):
        held = [getattr(store, name, None) for name in ("X", "codes", "residual")]
        own += [part for part in (*held, *getattr(store, "parameters", [])) if part is not None]
    assert cache.bytes() == sum(part.numel() * part.element_size() for part in own)
    if scheme != "full":  # and what eval_ppl.py counts as average bits
        row = Row(scheme, bits, "pfn", k)
        counted = (
            average_bits(row, model.config, n, rtn_bits(row, model.config, g), 0, k)
            * 2
            * L
            * n
            * d_kv
            / 8
        )
        assert cache.bytes() - waiting == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("N", [0, 5, "auto"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_bits_are_the_bytes_of_the_cache(scheme, N):
    """100 tokens: a whole group and an unfinished one. Static parameters are in fp32 here, and
    count in 16 bits."""
    model, row = shaped(), Row(scheme, 3, "kvsink" if N else "none", N)
    quantizers = kvsink.rtn_cache(SimpleNamespace(blocks=range(3)), scheme, 3, 64)
    for q in (q for pair in quantizers for q in pair if q.static):
        q.calibrate(torch.randn(1, 3, 10, 64))
    cache = KVCache(model, quantizers, 100, k=row.most())
    parameters = [
        X
        for c in cache.blocks
        for store in (c.K, c.V)
        for X in store.parameters
        if X.dtype == torch.float32
    ]
    assert len(parameters) == (12 if kvsink.SCHEMES[scheme].static else 0)
    bits = 8 * cache.bytes() - 16 * sum(X.numel() for X in parameters)
    assert stored_bits(row, model.config, 100, 64) * (2 * 3 * 100 * 192) == pytest.approx(
        bits, rel=1e-12
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rho", [0.0, 0.01, 0.05])
def test_the_bytes_of_a_kvquant_cache_are_what_average_bits_counts(rho, bits):
    """Codes, ranges, and outliers with their channels, after a prompt that fills it; and they come
    back as written."""
    model, n, k, d = shaped(num_hidden_layers=1), 2000, 5, 192
    draw = torch.Generator().manual_seed(0)
    K, V = ((torch.randn(1, 3, n, 64, generator=draw) ** 3).half().float() for _ in "KV")
    levels = torch.linspace(-1, 1, 2**bits)
    midpoints = (levels[1:] + levels[:-1]) / 2
    ends = [torch.quantile(K[0], level, dim=1, keepdim=True) for level in (rho / 2, 1 - rho / 2)]
    quantize_K = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, lo=ends[0], hi=ends[1])
    quantize_V = kvquant.NonUniformQuantizer(
        midpoints, levels, rho > 0, residual=kvquant.tail_of(rho, d)
    )
    cache = KVCache(model, [(quantize_K, quantize_V)], n, k=k, pre_rope=True)
    block_cache, leave_out = cache.blocks[0], torch.zeros(1, 1, n, 1, dtype=torch.bool)
    fill_K, fill_V = block_cache.storing_quantizers(torch.tensor([[0]]))
    for store, quantizer, filler, X in (
        (block_cache.K, quantize_K, fill_K, K),
        (block_cache.V, quantize_V, fill_V, V),
    ):
        assert torch.equal(filler(X.half(), leave_out), quantizer(X.half()))
        back = torch.cat(
            [part.flatten(2, 3).expand(1, 3, n, -1) for _, part in store.dequantized()], -1
        )
        if rho:
            rows, token, head, channel, off = store.outliers.entries(store)
            back = back.index_put((rows, head, token, channel), off, accumulate=True)
        torch.testing.assert_close(back, quantizer(X), rtol=1e-3, atol=1e-3)
        if rho and X is V:  # there are fewer where numbers are equal
            assert store.outliers.counts.sum() == pytest.approx(
                2 * kvquant.tail_of(rho, d) * n, rel=0.01
            )
    row = Row("kvquant", bits, "pfn", k, rho)
    counted = (
        average_bits(row, model.config, n, kvquant.kvquant_bits(row, model.config), 0, k)
        * 2
        * n
        * d
        / 8
    )
    assert cache.bytes() == pytest.approx(counted, rel=0.01)


# --------------------------------------------------------------------------------------------------
# Compiled: one graph, and no dequantized cache in memory


def largest_buffer(codes, entries=0):
    """Numbers in the largest buffer that Inductor's code for the CPU makes; `entries` for a size
    that is a name."""
    shapes = [
        shape for code in codes for shape in re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code)
    ]
    return max(
        math.prod(eval(f"[{re.sub('[su][0-9]+', str(entries), shape)}]")) for shape in shapes
    )


@pytest.mark.parametrize(
    "scheme", ["channel-static", "channel-dynamic", "token-dynamic", "kvquant", "kvquant 10 %"]
)
def test_compiled_decoding_is_one_graph_that_never_holds_the_dequantized_cache(
    planted, sequences, scheme
):
    """The logits of the eager code; one graph for all blocks and steps; and in the code that
    Inductor makes, no buffer as large as Keys or Values: what is as long as the cache has one
    number a token and query."""
    pre_rope, tokens = (
        scheme.startswith("kvquant"),
        torch.cat((sequences[0][0], ordinary_tokens(10, 3))),
    )
    if scheme.endswith("%"):
        quantizers = sparse_cache(2)
    elif pre_rope:
        quantizers = kvquant.kvquant_cache(kvquant_calibrated()[RECIPES[-2]], 0.0, 2)
    else:
        quantizers = cache_of(planted, scheme, 2, tokens[None], "kvsink", 2)
    arguments, h, h_kv, d_k, n = (
        (planted, tokens, 19, quantizers, "kvsink", 2, pre_rope),
        4,
        2,
        8,
        1024,
    )
    eager, _ = decoded(*arguments, room=n)
    torch._dynamo.reset()
    step = kvsink.compiled(generate.decode_block, **generate.FUSE)
    torch._dynamo.utils.counters.clear()
    (logits, cache), codes = run_and_get_code(lambda: decoded(*arguments, step, n))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (
        logits - eager
    ).norm() < 5e-3 * eager.norm()  # a sum may be rounded the other way, to another code
    outliers = cache.blocks[-1].K.outliers
    entries = outliers.values.shape[1] if outliers else 0
    assert n <= largest_buffer(codes, entries) <= h * (n + 1) < h_kv * n * d_k


@pytest.mark.parametrize(
    "h, h_kv, d_k, scheme, bits",
    [(9, 3, 64, "token-dynamic", 4), (4, 4, 128, "channel-dynamic", 3)],
)
def test_compiled_attention_is_fused_for_other_heads(h, h_kv, d_k, scheme, bits):
    model = shaped(
        num_hidden_layers=1, num_attention_heads=h, num_key_value_heads=h_kv, head_dim=d_k
    )
    quantizers = kvsink.rtn_cache(SimpleNamespace(blocks=[0]), scheme, bits, 64)
    cache = KVCache(model, quantizers, n := 1024, k=2)
    step = kvsink.compiled(generate.attention, **generate.FUSE)
    _, codes = run_and_get_code(
        step, torch.randn(1, h, 1, d_k), cache.blocks[0], cache.at, cache.rope
    )
    assert n <= largest_buffer(codes) <= h * (n + 1) < h_kv * n * d_k


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", [*SCHEMES, "kvquant"])
def test_cuda_decoding_agrees_with_cpu_and_never_holds_the_dequantized_cache(
    planted, sequences, scheme, dtype
):
    tokens, pre_rope = torch.cat((sequences[0][0], ordinary_tokens(10, 3))), scheme == "kvquant"

    def quantizers(model, device):
        if pre_rope:
            return sparse_cache(4, device)
        return cache_of(model, scheme, 4, tokens[None].to(device), "kvsink", 2)

    expected, _ = decoded(planted, tokens, 19, quantizers(planted, "cpu"), "kvsink", 2, pre_rope)
    there = copy.deepcopy(planted).to("cuda", dtype)
    step = kvsink.compiled(generate.decode_block, **generate.FUSE)
    logits, _ = decoded(
        there, tokens.cuda(), 19, quantizers(there, "cuda"), "kvsink", 2, pre_rope, step
    )
    assert (logits.cpu() - expected).norm() < (
        5e-3 if dtype == torch.float32 else 5e-2
    ) * expected.norm()
    cache = KVCache(there, quantizers(there, "cuda"), n := 16384, k=2, pre_rope=pre_rope)
    block_cache, H = cache.blocks[3], torch.randn(1, 1, 32, device="cuda", dtype=dtype)
    for _ in range(2):  # the first compiles
        block_cache.make_room()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(there.blocks[3], H, block_cache, cache.at, cache.rope)
        torch.cuda.synchronize()
    assert (
        torch.cuda.max_memory_allocated() - before < 2 * n * 8 * 4
    )  # less than the Keys would take in fp32
