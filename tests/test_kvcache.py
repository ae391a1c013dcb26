"""The packed cache (paper/kvcache.py), and decoding with it (Equations 5 and 6 in paper/decode.py).

Its logits are compared with quantizing and dequantizing all Keys and Values in every step, its
bytes with Table 4's formula, what it stores with NumPy in float64 or with numbers worked by hand.
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
from kvsink import Rule, full_precision_quantizers, pfn
from llama import Llama, LlamaConfig, apply_rope, rope_table
from paper import decode, kvquant
from paper.kvcache import (
    CacheShape,
    KVCache,
    PackedStore,
    StoredQuantizer,
    cache_bytes,
    pack,
    unpack,
)
from quant import Quantizer
from support.rows import Row, average_bits, rtn_bits, stored_bits
from tests.helpers import (
    CHANNEL,
    EMERGENCE,
    FAMILIES,
    SITE,
    SMALL,
    STRONG,
    WEAK,
    ordinary_tokens,
    planted_model,
    quantizers_for,
    write_model,
)

SCHEMES = list(kvsink.SCHEMES)
KVSINK_2 = Rule(k=2, site=SITE)
RULES = (Rule(), Rule(first=2), KVSINK_2)
RECIPES = [kvquant.Recipe(rule, rho) for rule in (Rule(first=3), Rule(k=2)) for rho in (0.0, 0.1)]

# --------------------------------------------------------------------------------------------------
# Codes as bytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    """Byte by byte and bit by bit: a plane of width w has d w/8 bytes, and byte m has the codes of
    m, m + d w/8, ..."""
    widths = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    for shape in [(8,), (3, 16), (2, 5, 128)]:
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        d = shape[-1]
        expected = []
        for row in codes.view(-1, d).tolist():
            row_bytes = []
            lower_bits = 0
            for w in widths:
                size = d * w // 8
                for m in range(size):
                    plane = [code >> lower_bits & 2**w - 1 for code in row[m::size]]
                    row_bytes.append(sum(code << w * i for i, code in enumerate(plane)))
                lower_bits += w
            expected.append(row_bytes)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], d * bits // 8)
        assert packed.view(len(expected), -1).tolist() == expected
        assert torch.equal(unpack(packed, bits), codes)


def test_packing_by_hand():
    codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    # 0, 2, 3, 1 and 1, 3, 2, 0, the lowest bits first
    assert pack(codes, 2).tolist() == [0b01_11_10_00, 0b00_10_11_01]


def test_16_bit_parameters_against_numpy():
    """The scale is in fp16, the zero a whole number within fp16, codes are made with both. The
    rows: ordinary, tiny and wide groups, one that is narrow and far from 0, constants."""
    X = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    X = X * torch.tensor([1.0, 1e-3, 300.0, 1.0, 1.0, 0.0])[:, None]
    X[0, 0, 3] = X[0, 0, 3] * 1e-4 + 50
    X[0, 0, 4] = -7.25
    q = Quantizer(8, "token", None, fp16_params=True)
    for row, out in zip(X[0, 0].double().numpy(), q(X)[0, 0].double().numpy()):
        lo = row.min()
        hi = row.max()
        s = (hi - lo) / 255 if hi > lo else (abs(lo) or 1.0)
        s = np.float64(np.float16(max(s, abs(lo) / 2**15, 2**-24)))
        z = np.float64(np.float16(-np.round(lo / s)))
        expected = s * (np.clip(np.round(row / s) + z, 0, 255) - z)
        assert abs(out - expected).max() <= s * 1e-4 + 1e-9  # no code differs
        assert abs(out - row).max() <= 1.01 * s * (0.5 + 255 * 2**-11)
    codes, s, z = q.encode(X)
    assert s.shape == z.shape == (1, 1, 6, 1)
    assert torch.equal(s, s.half().float()) and torch.equal(z, z.half().float())
    assert torch.equal(q.decode(codes, s, z), q(X))
    assert q(X)[0, 0, 4:].tolist() == [[-7.25] * 8, [0.0] * 8]


# --------------------------------------------------------------------------------------------------
# Quantizers, and logits as the cache should give them


def test_both_kinds_of_quantizers_have_what_a_store_asks_for():
    lo = torch.zeros(2, 1, 8)
    levels = torch.linspace(-1, 1, 4)
    for static in (False, True):
        for granularity in ("token", "channel"):
            quantizer = Quantizer(2, granularity, 8, static)
            assert isinstance(quantizer, StoredQuantizer) and quantizer.static == static
            groups = granularity == "channel" and not static
            assert quantizer.tokens_per_group == (8 if groups else 1)
        ranges = {"lo": lo, "hi": lo + 1} if static else {}
        quantizer = kvquant.NonUniformQuantizer(levels[1:], levels, sparse=True, **ranges)
        assert isinstance(quantizer, StoredQuantizer) and quantizer.static == static
        assert (quantizer.bits, quantizer.tokens_per_group) == (2, 1)


def as_stored(quantizers):
    """Return dynamic quantizers with scale and zero in the 16 bits that a cache gives them."""
    return [tuple(replace(q, fp16_params=True) for q in pair) for pair in quantizers]


@functools.cache
def kvquant_calibrations():
    """Return recipe -> Calibration of the planted model, on two windows with a sink of each
    kind."""
    windows = torch.stack([ordinary_tokens(40, seed) for seed in (1, 2)])
    windows[0, [5, 22]] = torch.tensor([STRONG, WEAK])
    windows[1, [17, 18]] = torch.tensor([STRONG, WEAK])
    return kvquant.calibrate(planted_model(), windows, RECIPES, SITE)


def sparse_cache(bits, device="cpu"):
    """Return a cache of KVQuant with a tenth of the Keys stored apart. Its ranges are wider by 1 %,
    so that they end between the Keys of block 1. These depend on the token alone: the calibrated
    quantile is one of them, and rounding would decide."""
    lo, hi, fisher = (part.to(device) for part in kvquant_calibrations()[RECIPES[-1]])
    calibration = kvquant.Calibration(1.01 * lo, 1.01 * hi, fisher)
    return kvquant.kvquant_quantizers(calibration, 0.1, bits)


def rtn_quantizers(model, scheme, bits, tokens, rule=None, *, pre_rope=False):
    """Return the quantizers of a scheme, calibrated on tokens (1, n) if they are static."""
    step = kvsink.decoder_block_pre_rope if pre_rope else None
    return quantizers_for(model, scheme, bits, tokens, rule, step)


def decoded(model, tokens, prompt, quantizers, rule=None, *, pre_rope=False, step=None, room=None):
    """Return the logits (n - prompt + 1, vocab) after the prompt and each further token of tokens
    (n,), from a packed cache of n tokens, or of more room; and the cache."""
    rule = rule or Rule()
    cache = KVCache(model, quantizers, room or len(tokens), k=rule.max_kept, pre_rope=pre_rope)
    logits = [decode.prefill(model, cache, [tokens[:prompt].tolist()], rule)]
    for token in tokens[prompt:]:
        logits.append(decode.decode(model, cache, token[None], step))
    return torch.cat(logits), cache


def step_by_step(model, tokens, prompt, quantizers, rule, *, pre_rope=False):
    """Return the same logits by quantizing and dequantizing all Keys and Values so far in each
    step."""
    K_so_far = {}
    V_so_far = {}
    S_sinks = {}
    logits = []
    for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(tokens)))]:
        H = model.embedding(tokens[None, begin:end])
        rope = rope_table(model.config, end, "cpu")
        new_rope = [table[begin:] for table in rope]
        S_sink = pfn(H, rule.first)
        for l, block in enumerate(model.blocks, start=1):
            S_sinks.setdefault(l, S_sink)  # the prompt's
            sink = F.pad(S_sinks[l], (0, end - prompt))[:, None, :, None]
            Q, K, V = block.QKV(block.LN_mhsa(H))
            Q = apply_rope(Q, new_rope)
            K = K if pre_rope else apply_rope(K, new_rope)
            K_so_far[l] = torch.cat((K_so_far[l], K), 2) if begin else K
            V_so_far[l] = torch.cat((V_so_far[l], V), 2) if begin else V
            quantize_K, quantize_V = quantizers[l - 1]
            K = torch.where(sink, K_so_far[l], quantize_K(K_so_far[l], sink))
            V = torch.where(sink, V_so_far[l], quantize_V(V_so_far[l], sink))
            # Of groups of tokens, the newest is not quantized before the token after it comes,
            # except in the prompt, in which it is when it is full.
            g = getattr(quantize_K, "tokens_per_group", 1)
            whole = end if g == 1 else (end - (begin > 0)) // g * g
            K = torch.cat((K[:, :, :whole], K_so_far[l][:, :, whole:]), 2)
            H = block_output(block, H, Q, apply_rope(K, rope) if pre_rope else K, V)
            if begin == 0 and l == EMERGENCE and rule.predicts:
                sinks = H[0, :, CHANNEL].abs().topk(rule.k).indices
                S_sink = torch.zeros(1, end, dtype=torch.bool).index_fill(1, sinks, True)
        logits.append(model.logits(H[:, -1]))
    return torch.cat(logits)


def block_output(block, H, Q, K, V):
    """Return a block's output for its last tokens H (1, m, d), by softmax and products: Eq. 1-3."""
    G = Q.shape[1] // K.shape[1]
    m = Q.shape[2]
    n = K.shape[2]
    scores = Q @ K.repeat_interleave(G, 1).mT / Q.shape[-1] ** 0.5
    ahead = torch.arange(n)[None] > torch.arange(n - m, n)[:, None]
    A = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ V.repeat_interleave(G, 1)
    H = block.W_o(A.transpose(1, 2).flatten(2)) + H
    return block.FFN(block.LN_ffn(H)) + H


# --------------------------------------------------------------------------------------------------
# The logits of a packed cache


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_cache_gives_the_logits_of_quantizing_and_dequantizing(
    planted, sequences, scheme, bits, rule, pre_rope
):
    """Token by token, from a prompt of 22 tokens to 33, which completes two groups of 8; the sinks
    are at 6 and 17."""
    tokens = torch.cat((sequences[0][0], ordinary_tokens(9, 3)))
    quantizers = rtn_quantizers(planted, scheme, bits, tokens[None], rule, pre_rope=pre_rope)
    expected = step_by_step(planted, tokens, 22, as_stored(quantizers), rule, pre_rope=pre_rope)
    logits, _ = decoded(planted, tokens, 22, quantizers, rule, pre_rope=pre_rope)
    # To rounding: 1e-6, unless somewhere a sum is rounded the other way, to another code. That is
    # far less than what quantization does, and than what keeping other tokens would.
    error = (expected - planted(tokens[None])[0, 21:]).norm()
    assert (logits - expected).norm() < min(0.01 * expected.norm(), 0.25 * error)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_packed_cache_of_kvquant_gives_the_logits_of_quantizing_and_dequantizing(
    planted, bits, recipe
):
    """Codebooks, ranges by channel and by token, and outliers in 16 bits, of which tokens have many
    here."""
    tokens = torch.cat((ordinary_tokens(24, 5), ordinary_tokens(10, 3)))
    tokens[[6, 17]] = torch.tensor([WEAK, STRONG])
    quantizers = kvquant.kvquant_quantizers(kvquant_calibrations()[recipe], recipe.rho, bits)
    rule = recipe.rule.with_site(SITE)
    expected = step_by_step(planted, tokens, 19, quantizers, rule, pre_rope=True)
    logits, cache = decoded(planted, tokens, 19, quantizers, rule, pre_rope=True)
    # Two orders of the same sums may give a number that lies on the edge between two codes either
    # of them. One such code moves the logits by 3e-4 of their norm, lost outliers by 0.2.
    assert (logits - expected).norm() < 3e-3 * expected.norm()
    outliers = cache.blocks[3].K.outliers
    assert (outliers is None) == (recipe.rho == 0)
    if outliers:
        K = keys_in_full_precision(planted, tokens, 3)
        lo = quantizers[3][0].lo
        hi = quantizers[3][0].hi
        kept = cache.blocks[3].kept[0]
        counts = ((K < lo) | (K > hi)).sum((0, 1, 3)).index_fill(0, kept, 0)
        # The cache has nearly those.
        assert counts.sum() > 200 and (outliers.counts[0] - counts).abs().sum() < 0.2 * counts.sum()
        assert (outliers.counts[0, kept] == 0).all()


def keys_in_full_precision(model, tokens, l):
    """Return the Keys of block l (from 0), before RoPE."""
    H = model.embedding(tokens[None])
    rope = rope_table(model.config, len(tokens), "cpu")
    for block in model.blocks[:l]:
        H = block(H, rope)
    _, K, _ = model.blocks[l].QKV(model.blocks[l].LN_mhsa(H))
    return K


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_in_full_precision_is_the_model(family, tmp_path):
    """The models have GQA, other RoPEs and Mistral's window of 16 tokens, which the text outgrows.
    Storing Keys before RoPE changes nothing."""
    model = Llama.from_pretrained(write_model(tmp_path / "model", {**SMALL, **FAMILIES[family]}))
    tokens = torch.tensor(np.random.RandomState(1).randint(0, 97, 40))
    for pre_rope in (False, True):
        logits, _ = decoded(model, tokens, 10, full_precision_quantizers(model), pre_rope=pre_rope)
        torch.testing.assert_close(logits, model(tokens[None])[0, 9:], rtol=1e-4, atol=1e-4)
    quantizers = kvsink.rtn_quantizers(model, "token-dynamic", 8, 16)
    logits_8, _ = decoded(model, tokens, 10, quantizers)  # PackedStore sees the same tokens
    assert 0 < (logits_8 - logits).norm() < 0.02 * logits.norm()


# Slices have 8 channels, or 12.
@pytest.mark.parametrize("d_k, group", [(32, 4), (32, 16), (32, 32), (48, 16), (48, 24)])
@pytest.mark.parametrize("n", [96, 768])  # one piece of tokens, three of 256
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_and_weighted_sum_are_products_with_what_comes_back(scheme, n, d_k, group):
    """Two sequences, two heads of 32 or 48 channels, three queries each; several groups in a slice
    of channels, or one."""
    draw = torch.Generator().manual_seed(0)
    K, V = torch.randn(2, 2, 2, n, d_k, generator=draw)
    q = torch.randn(2, 2, 3, d_k, generator=draw)
    p = torch.randn(2, 2, 3, n, generator=draw).softmax(-1)
    quantize_K, quantize_V = as_stored(kvsink.rtn_quantizers(blocks(1), scheme, 3, group))[0]
    scores = filled_store(quantize_K, K).scores(q, None, torch.full((2, 1), n))  # the next token
    expected = q @ quantize_K(K).mT
    torch.testing.assert_close(torch.stack(scores, dim=2), expected, rtol=1e-4, atol=1e-4)
    out = filled_store(quantize_V, V).weighted_sum(p)
    torch.testing.assert_close(out, p @ quantize_V(V), rtol=1e-4, atol=1e-4)


def filled_store(quantizer, X):
    """Return a PackedStore that X (b, h_kv, n, d_k) fills, and calibrate the quantizer first if it
    is static."""
    if quantizer.static:
        quantizer.calibrate(X)
    store = PackedStore(quantizer, cache_shape(*X.shape))
    store.fill(torch.arange(len(X))[:, None], X, None)
    return store


def cache_shape(b, h_kv, n, d_k):
    return CacheShape(b, n, 0, 3 * h_kv, h_kv, d_k, torch.float32, torch.device("cpu"))


def blocks(L):
    """Return what rtn_quantizers and full_precision_quantizers need of a model with L blocks."""
    return SimpleNamespace(blocks=range(L))


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_as_a_graph(planted, sequences, monkeypatch, capsys, fails):
    """The stub of a graph notes its work when it is captured, and does it when it is replayed: the
    logits are the same, and no token is written twice. If it cannot be captured, one line says
    so."""
    tokens = torch.cat((sequences[0][0], ordinary_tokens(9, 3)))
    quantizers = rtn_quantizers(planted, "channel-dynamic", 3, tokens[None], KVSINK_2)
    expected, _ = decoded(planted, tokens, 22, quantizers, KVSINK_2)
    cache = KVCache(planted, quantizers, len(tokens), k=2)
    logits = [decode.prefill(planted, cache, [tokens[:22].tolist()], KVSINK_2)]
    steps = note_steps(monkeypatch)
    stub_cuda(monkeypatch, cache, replay(planted, cache, steps), fails)
    run_step = decode.capture_cuda_graph(planted, cache, decode.decode_block)
    assert len(steps) == (2 if fails else 3) and cache.next_slot.tolist() == [[22]]
    for token in tokens[22:]:
        logits.append(run_step(token[None]))
        cache.lengths = [cache.lengths[0] + 1]
        cache.finish_groups()
    torch.testing.assert_close(torch.cat(logits), expected)
    message = "decoding without a CUDA graph, which could not be captured: operation not permitted"
    assert capsys.readouterr().err.splitlines() == [message] * fails
    sparse = KVCache(planted, sparse_cache(3), 24, pre_rope=True)
    run_step = decode.capture_cuda_graph(planted, sparse, decode.decode_block)
    assert run_step.func is decode.decode_step  # its outliers grow


def test_a_second_model_does_not_replay_the_graph_of_the_first(planted, sequences, monkeypatch):
    """Nor does another step. A cache that goes back to the first model is captured anew."""
    quantizers = kvsink.full_precision_quantizers(planted)
    cache = KVCache(planted, quantizers, 24)
    decode.prefill(planted, cache, [sequences[0][0][:20].tolist()])
    captured = []

    def capture(model, cache, step):
        captured.append((model, step))
        return lambda tokens: len(captured)

    on_cuda = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(decode, "capture_cuda_graph", capture)
    monkeypatch.setattr(cache, "next_slot", on_cuda)
    monkeypatch.setattr(cache, "finish_groups", lambda: None)
    other = SimpleNamespace()
    for expected, model, step in (
        (1, planted, None),
        (1, planted, None),
        (2, other, None),
        (3, planted, len),
    ):
        cache.lengths = [20]
        assert decode.decode(model, cache, torch.zeros(1), step) == expected
    assert captured == [
        (planted, decode.decode_block),
        (other, decode.decode_block),
        (planted, len),
    ]


def note_steps(monkeypatch):
    """Let `decode_step` append its tokens and its logits to a list, and return the list."""
    decode_step = decode.decode_step
    steps = []

    def noted(model, cache, step, tokens):
        steps.append((tokens, decode_step(model, cache, step, tokens)))
        return steps[-1][1]

    monkeypatch.setattr(decode, "decode_step", noted)
    return steps


def replay(model, cache, steps, decode_step=decode.decode_step):
    """Return the replay of a graph: it does the noted work again."""

    def replay_step():
        tokens, logits = steps[2]  # after two rounds of warm-up
        logits.copy_(decode_step(model, cache, decode.decode_block, tokens))

    return replay_step


def stub_cuda(monkeypatch, cache, replay_step, fails):
    """Put stubs in the place of streams and graphs."""

    @contextmanager
    def capture(graph, stream):
        if fails:
            raise RuntimeError("operation not permitted\nand more")
        yield
        cache.next_slot -= 1  # a capture does not run the work

    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=replay_step)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.parametrize("scheme", ["channel-static", "channel-dynamic", "kvquant"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(planted, sequences, scheme):
    """Prompts of 20, 11 and 15 tokens in one cache, each with its own sinks, and 12 steps."""
    pre_rope = scheme == "kvquant"
    if pre_rope:
        quantizers = sparse_cache(3)
    else:
        quantizers = rtn_quantizers(planted, scheme, 3, sequences[0], KVSINK_2)
    prompts = [
        sequences[0][0][:20].tolist(),
        sequences[0][1][:11].tolist(),
        ordinary_tokens(15, 8).tolist(),
    ]
    more = torch.stack([ordinary_tokens(12, seed) for seed in (1, 2, 3)])
    cache = KVCache(planted, quantizers, 32, b=3, k=2, pre_rope=pre_rope)
    together = [decode.prefill(planted, cache, prompts, KVSINK_2)]
    together += [decode.decode(planted, cache, tokens) for tokens in more.T]
    for i, prompt in enumerate(prompts):
        tokens = torch.cat((torch.tensor(prompt), more[i]))
        alone, cache_i = decoded(
            planted, tokens, len(prompt), quantizers, KVSINK_2, pre_rope=pre_rope
        )
        torch.testing.assert_close(torch.stack(together)[:, i], alone, rtol=1e-3, atol=1e-3)
        assert torch.equal(cache.blocks[-1].kept[i], cache_i.blocks[-1].kept[0])
    assert cache.lengths == [32, 23, 27] and cache.next_slot.flatten().tolist() == cache.lengths
    assert cache.blocks[-1].kept[:2].tolist() == [[6, 17], [3, 9]]


def test_the_sinks_of_the_prompt_are_kept_for_the_whole_generation(planted, sequences):
    """Bit for bit and with their slots, in the blocks after l_E; new tokens are not kept, whatever
    they are."""
    tokens = torch.cat((sequences[0][0], torch.tensor([STRONG, WEAK, 20])))
    quantizers = kvsink.rtn_quantizers(planted, "token-dynamic", 2, 8)
    cache = KVCache(planted, quantizers, 27, k=2)
    stored = []  # the Keys and the Values of each block

    def watched(quantizer):
        def store(X, leave_out):
            stored.append(X)
            return quantizer(X, leave_out)

        return store

    storing_quantizers = []
    for block_cache in cache.blocks:
        pair = block_cache.storing_quantizers(torch.tensor([[0]]))
        storing_quantizers.append(tuple(map(watched, pair)))
    H = planted.embedding(tokens[None, :24])
    kvsink.prefill(planted, H, storing_quantizers, l_E=EMERGENCE, c=CHANNEL, k=2)
    before = [(c.kept.clone(), c.kept_K.clone(), c.kept_V.clone()) for c in cache.blocks]
    cache.lengths = [24]
    cache.next_slot[:] = 24
    for token in tokens[24:]:
        decode.decode(planted, cache, token[None])
    for l, (c, then) in enumerate(zip(cache.blocks, before), start=1):
        assert all(torch.equal(*pair) for pair in zip((c.kept, c.kept_K, c.kept_V), then))
        # 27 is one past the end: unused.
        assert c.kept.tolist() == ([[6, 17]] if l > EMERGENCE else [[27, 27]])
        if l > EMERGENCE:
            K, V = stored[2 * l - 2 : 2 * l]
            assert torch.equal(c.kept_K, K[:, :, [6, 17]])
            assert torch.equal(c.kept_V, V[:, :, [6, 17]])


@pytest.mark.parametrize("scheme", ["full", "token-dynamic", "channel-dynamic"])
def test_a_prompt_may_fill_the_cache(planted, sequences, scheme):
    """Exactly: 24 tokens of 24, the last two of them decoded or in the prompt. One more is too
    many, for either."""
    tokens = sequences[0][0]
    rule = Rule() if scheme == "full" else KVSINK_2
    quantizers = stored = full_precision_quantizers(planted)
    if scheme != "full":
        quantizers = kvsink.rtn_quantizers(planted, scheme, 3, 8)
        stored = as_stored(quantizers)
    for prompt in (22, 24):
        expected = step_by_step(planted, tokens, prompt, stored, rule)
        logits, cache = decoded(planted, tokens, prompt, quantizers, rule)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert cache.n == 24 and cache.lengths == [24]
    with pytest.raises(ValueError, match="made for 24 tokens and is full"):
        decode.decode(planted, cache, torch.tensor([20]))
    with pytest.raises(ValueError, match="the prompt has 25 tokens, and the cache was made for 24"):
        decode.prefill(planted, cache, [[*tokens.tolist(), 20]], rule)


def test_a_cache_that_is_full_or_asked_for_too_much(planted):
    cache = KVCache(planted, full_precision_quantizers(planted), 6)
    with pytest.raises(ValueError, match="the prompt has 7 tokens, and the cache was made for 6"):
        decode.prefill(planted, cache, [[20] * 7])
    with pytest.raises(ValueError, match="empty"):
        decode.prefill(planted, cache, [[]])
    keeping = KVCache(planted, kvsink.rtn_quantizers(planted, "token-dynamic", 2, 8), 16, k=5)
    for rule in (Rule(first=5), Rule()):
        with pytest.raises(ValueError, match="cannot keep 5 of 4"):
            decode.prefill(planted, keeping, [[20] * 4], rule)
    # All of a prompt is not too much.
    logits = decode.prefill(planted, keeping, [[20, 21, 22, 23, 24]], Rule(first=5))
    torch.testing.assert_close(logits, planted(torch.tensor([[20, 21, 22, 23, 24]]))[:, -1])
    with pytest.raises(ValueError, match="cannot keep 6 tokens in a cache that was made to keep 5"):
        decode.prefill(planted, keeping, [[20] * 8], Rule(first=6))
    decode.prefill(planted, cache, [[20] * 5])
    decode.decode(planted, cache, torch.tensor([21]))
    with pytest.raises(ValueError, match="made for 6 tokens and is full"):
        decode.decode(planted, cache, torch.tensor([21]))
    with pytest.raises(ValueError, match="12 channels"):
        PackedStore(Quantizer(2, "token"), cache_shape(1, 1, 4, 12))


@pytest.mark.parametrize("scheme", ["channel-static", "channel-dynamic", "kvquant"])
def test_a_cache_can_be_filled_again(planted, sequences, scheme):
    """Nothing is left of the first, longer prompt and of the token after it."""
    tokens = sequences[0][1]
    pre_rope = scheme == "kvquant"
    if pre_rope:
        quantizers = kvquant.kvquant_quantizers(kvquant_calibrations()[RECIPES[-1]], 0.1, 3)
    else:
        quantizers = rtn_quantizers(planted, scheme, 3, sequences[0], KVSINK_2)
    expected, _ = decoded(planted, tokens, 15, quantizers, KVSINK_2, pre_rope=pre_rope)
    cache = KVCache(planted, quantizers, 24, k=2, pre_rope=pre_rope)
    decode.prefill(planted, cache, [sequences[0][0][:20].tolist()], KVSINK_2)
    decode.decode(planted, cache, torch.tensor([STRONG]))
    logits = [decode.prefill(planted, cache, [tokens[:15].tolist()], KVSINK_2)]
    logits += [decode.decode(planted, cache, token[None]) for token in tokens[15:]]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Bytes: those of Table 4


def shaped(**changes):
    """Return what KVCache needs of a model, in the shape of the default one, without weights."""
    shape = {
        "hidden_size": 576,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig.from_dict({**SMALL, **shape, **changes})
    return SimpleNamespace(config=config, dtype=torch.float16, device=torch.device("cpu"))


def noise_quantizers(scheme, bits, g):
    """Return the quantizers of three blocks of three heads, calibrated on noise if static."""
    quantizers = kvsink.rtn_quantizers(blocks(3), scheme, bits, g)
    for pair in quantizers:
        for quantizer in pair:
            if quantizer.static:
                quantizer.calibrate(torch.randn(1, 3, 10, 64))
    return quantizers


def tensors_in(cache):
    """Return all tensors that a cache should count."""
    tensors = []
    for c in cache.blocks:
        tensors += [c.kept, c.kept_K, c.kept_V]
        for store in (c.K, c.V):
            tensors += [getattr(store, name, None) for name in ("X", "codes", "residual")]
            tensors += getattr(store, "parameters", [])
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("scheme", [*SCHEMES, "full"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_bytes_of_a_cache_are_those_of_table_4(scheme, bits):
    """2 L n d_kv b/8 and k 2 L d_kv 2 bytes within 1 %; 32 bits more for each group if ranges are
    dynamic, and for groups of tokens the one that waits in 16 bits."""
    model = shaped()
    n = 4096
    k = 5
    g = 64
    L = 3
    d_kv = 192
    numbers = 2 * L * n * d_kv
    if scheme == "full":
        cache = KVCache(model, full_precision_quantizers(blocks(L)), n)
        assert cache.bytes() == pytest.approx(numbers * 2, rel=0.01)
    else:
        cache = KVCache(model, noise_quantizers(scheme, bits, g), n, k=k)
        expected = numbers * bits / 8 + k * 2 * L * d_kv * 2
        assert cache_bytes(model.config, n, bits, k) == expected
        groups = 0 if kvsink.SCHEMES[scheme].static else numbers / g
        waiting = L * g * d_kv * 2 if scheme == "channel-dynamic" else 0
        assert cache.bytes() == pytest.approx(expected + 4 * groups + waiting, rel=0.01)
        # And what eval_ppl.py counts as average bits:
        row = Row(scheme, bits, Rule(first=k))
        storage = rtn_bits(row, model.config, g)
        counted = average_bits(row, model.config, n, storage, 0, k) * numbers / 8
        assert cache.bytes() - waiting == pytest.approx(counted, rel=0.01)
    assert cache.bytes() == sum(X.numel() * X.element_size() for X in tensors_in(cache))


@pytest.mark.parametrize("N", [0, 5, "auto"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_bits_are_the_bytes_of_the_cache(scheme, N):
    """100 tokens: a whole group and an unfinished one. Static parameters are in fp32 here, and
    count in 16 bits."""
    model = shaped()
    row = Row(scheme, 3, Rule(k=N))
    cache = KVCache(model, noise_quantizers(scheme, 3, 64), 100, k=row.rule.max_kept)
    parameters = []
    for c in cache.blocks:
        for store in (c.K, c.V):
            parameters += [X for X in store.parameters if X.dtype == torch.float32]
    assert len(parameters) == (12 if kvsink.SCHEMES[scheme].static else 0)
    bits = 8 * cache.bytes() - 16 * sum(X.numel() for X in parameters)
    stored = stored_bits(row, model.config, 100, 64) * (2 * 3 * 100 * 192)
    assert stored == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rho", [0.0, 0.01, 0.05])
def test_the_bytes_of_a_kvquant_cache_are_what_average_bits_counts(rho, bits):
    """Codes, ranges, and outliers with their channels, after a prompt that fills it; and they come
    back as they were written."""
    model = shaped(num_hidden_layers=1)
    n = 2000
    k = 5
    d = 192
    draw = torch.Generator().manual_seed(0)
    K, V = ((torch.randn(1, 3, n, 64, generator=draw) ** 3).half().float() for _ in "KV")
    levels = torch.linspace(-1, 1, 2**bits)
    midpoints = (levels[1:] + levels[:-1]) / 2
    lo, hi = [torch.quantile(K[0], level, dim=1, keepdim=True) for level in (rho / 2, 1 - rho / 2)]
    tail_size = kvquant.outliers_per_end(rho, d)
    quantize_K = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, lo=lo, hi=hi)
    quantize_V = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, tail_size=tail_size)
    cache = KVCache(model, [(quantize_K, quantize_V)], n, k=k, pre_rope=True)
    block_cache = cache.blocks[0]
    leave_out = torch.zeros(1, 1, n, 1, dtype=torch.bool)
    fill_K, fill_V = block_cache.storing_quantizers(torch.tensor([[0]]))
    for quantizer, fill, X in ((quantize_K, fill_K, K), (quantize_V, fill_V, V)):
        assert torch.equal(fill(X.half(), leave_out), quantizer(X.half()))
    for store, quantizer, X in ((block_cache.K, quantize_K, K), (block_cache.V, quantize_V, V)):
        torch.testing.assert_close(read_back(store), quantizer(X), rtol=1e-3, atol=1e-3)
    if rho:  # there are fewer if numbers are equal
        count = block_cache.V.outliers.counts.sum()
        assert count == pytest.approx(2 * tail_size * n, rel=0.01)
    row = Row("kvquant", bits, Rule(first=k), rho)
    storage = kvquant.kvquant_bits(row, model.config)
    counted = average_bits(row, model.config, n, storage, 0, k) * 2 * n * d / 8
    assert cache.bytes() == pytest.approx(counted, rel=0.01)


def read_back(store):
    """Return the numbers (1, h_kv, n, d_k) of a PackedStore, outliers included."""
    b, h_kv, n, _ = store.codes.shape
    slices = [part.flatten(2, 3).expand(b, h_kv, n, -1) for _, part in store.dequantized()]
    X = torch.cat(slices, -1)
    if store.outliers is not None:
        sequence, token, head, channel, error = store.outliers.entries(store)
        X = X.index_put((sequence, head, token, channel), error, accumulate=True)
    return X


# --------------------------------------------------------------------------------------------------
# Compiled: one graph, and no dequantized cache in memory


def largest_buffer(codes, entries=0):
    """Return how many numbers the largest buffer has that Inductor's code for the CPU makes;
    `entries` stands for a size that is a name."""
    sizes = [0]
    for code in codes:
        for shape in re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code):
            sizes.append(math.prod(eval(f"[{re.sub('[su][0-9]+', str(entries), shape)}]")))
    return max(sizes)


@pytest.mark.parametrize(
    "scheme", ["channel-static", "channel-dynamic", "token-dynamic", "kvquant", "kvquant 10 %"]
)
def test_compiled_decoding_is_one_graph_that_never_holds_the_dequantized_cache(
    planted, sequences, scheme
):
    """The logits are those of the eager code; there is one graph for all blocks and steps; and in
    the code that Inductor makes no buffer is as large as Keys or Values: what is as long as the
    cache has one number per token and query."""
    pre_rope = scheme.startswith("kvquant")
    tokens = torch.cat((sequences[0][0], ordinary_tokens(10, 3)))
    if scheme.endswith("%"):
        quantizers = sparse_cache(2)
    elif pre_rope:
        quantizers = kvquant.kvquant_quantizers(kvquant_calibrations()[RECIPES[-2]], 0.0, 2)
    else:
        quantizers = rtn_quantizers(planted, scheme, 2, tokens[None], KVSINK_2)
    n = 1024
    h = 4
    h_kv = 2
    d_k = 8
    decode_all = functools.partial(
        decoded, planted, tokens, 19, quantizers, KVSINK_2, pre_rope=pre_rope, room=n
    )
    eager, _ = decode_all()
    torch._dynamo.reset()
    step = kvsink.compiled(decode.decode_block, **decode.FUSE)
    torch._dynamo.utils.counters.clear()
    (logits, cache), codes = run_and_get_code(lambda: decode_all(step=step))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # A sum may be rounded the other way, to another code.
    assert (logits - eager).norm() < 5e-3 * eager.norm()
    outliers = cache.blocks[-1].K.outliers
    entries = outliers.values.shape[1] if outliers else 0
    assert n <= largest_buffer(codes, entries) <= h * (n + 1) < h_kv * n * d_k


@pytest.mark.parametrize(
    "h, h_kv, d_k, scheme, bits",
    [(9, 3, 64, "token-dynamic", 4), (4, 4, 128, "channel-dynamic", 3)],
)
def test_compiled_attention_is_fused_for_other_heads(h, h_kv, d_k, scheme, bits):
    """It also loads no single bytes, which takes a CPU longer (`PackedStore.empty_codes`)."""
    model = shaped(
        num_hidden_layers=1, num_attention_heads=h, num_key_value_heads=h_kv, head_dim=d_k
    )
    n = 1024
    cache = KVCache(model, kvsink.rtn_quantizers(blocks(1), scheme, bits, 64), n, k=2)
    leave_out = torch.zeros(1, 1, n, 1, dtype=torch.bool)
    for store in cache.blocks[0].storing_quantizers(torch.tensor([[0]])):
        store(torch.randn(1, h_kv, n, d_k).half(), leave_out)
    step = kvsink.compiled(lambda block, *inputs: block.attention(*inputs), **decode.FUSE)
    Q = torch.randn(1, h, 1, d_k).half()
    inputs = (Q, torch.tensor([[n - 1]]), cache.rope)
    A, codes = run_and_get_code(step, cache.blocks[0], *inputs)
    torch.testing.assert_close(A, cache.blocks[0].attention(*inputs), rtol=1e-2, atol=1e-3)
    scores = h * (n + 1)
    parameters = 2 * cache.blocks[0].K.parameters[0].numel()
    assert n <= largest_buffer(codes) <= max(scores, parameters) < h_kv * n * d_k
    assert not any("Vectorized<uint8_t>::loadu" in code for code in codes)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", [*SCHEMES, "kvquant"])
def test_cuda_decoding_agrees_with_cpu_and_never_holds_the_dequantized_cache(
    planted, sequences, scheme, dtype
):
    tokens = torch.cat((sequences[0][0], ordinary_tokens(10, 3)))
    pre_rope = scheme == "kvquant"

    def quantizers(model, device):
        if pre_rope:
            return sparse_cache(4, device)
        return rtn_quantizers(model, scheme, 4, tokens[None].to(device), KVSINK_2)

    on_cpu = quantizers(planted, "cpu")
    expected, _ = decoded(planted, tokens, 19, on_cpu, KVSINK_2, pre_rope=pre_rope)
    cuda_model = copy.deepcopy(planted).to("cuda", dtype)
    on_cuda = quantizers(cuda_model, "cuda")
    step = kvsink.compiled(decode.decode_block, **decode.FUSE)
    arguments = (cuda_model, tokens.cuda(), 19, on_cuda, KVSINK_2)
    logits, _ = decoded(*arguments, pre_rope=pre_rope, step=step)
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2
    assert (logits.cpu() - expected).norm() < tolerance * expected.norm()
    n = 16384
    cache = KVCache(cuda_model, on_cuda, n, k=2, pre_rope=pre_rope)
    block_cache = cache.blocks[3]
    H = torch.randn(1, 1, 32, device="cuda", dtype=dtype)
    for _ in range(2):  # the first compiles
        block_cache.make_room()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(cuda_model.blocks[3], H, block_cache, cache.next_slot, cache.rope)
        torch.cuda.synchronize()
    # Less than the Keys would take in fp32.
    assert torch.cuda.max_memory_allocated() - before < 2 * n * 8 * 4
