"""KVQuant: quantizer, codebooks, calibration, k-means and the file of a calibration, against NumPy,
scikit-learn's numbers and autograd through a whole model.

The tests are in the order of paper/kvquant.py."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kvsink
import quant
from kvsink import AUTO, Rule, Site, decoder_block_pre_rope, full_precision_quantizers, prefill
from llama import Llama, LlamaConfig, apply_rope, attention, rope_table
from paper import kvquant
from support.rows import Row, average_bits
from support.tokenizer import Tokenizer
from tests.helpers import (
    EMERGENCE,
    SITE,
    SMALL,
    STRONG,
    WEAK,
    ordinary_tokens,
    planted_model,
    write_model,
)

# --------------------------------------------------------------------------------------------------
# What several tests share

RULES = (Rule(first=3), Rule(k=2))
RECIPES = [kvquant.Recipe(rule, rho) for rule in RULES for rho in (0.0, 0.1)]
RECIPES += [kvquant.Recipe(Rule(first=1, k=AUTO), 0.1)]

PLACES = ([5, 22], [17, 18])  # of the sinks in each window


def kept_tokens(rule, l, w):
    """Return the tokens of window w that block l keeps."""
    if rule.predicts and l > EMERGENCE:
        return PLACES[w]
    return list(range(rule.first))


@pytest.fixture(scope="module")
def calibrated():
    """The planted model's calibrations, and the two windows of 40 tokens (2, 40) that they come
    from."""
    windows = torch.stack([ordinary_tokens(40, seed) for seed in (1, 2)])
    for window, places in zip(windows, PLACES):
        window[places] = torch.tensor([STRONG, WEAK])
    with torch.no_grad():
        return kvquant.calibrate(planted_model(), windows, RECIPES, SITE), windows


@pytest.fixture
def quick_codebooks(monkeypatch):
    """One start and few iterations: these clusters need not be the best ones."""
    quick = functools.partial(kvquant.weighted_kmeans, restarts=1, iterations=9)
    monkeypatch.setattr(kvquant, "weighted_kmeans", quick)


@pytest.fixture
def no_codebooks(monkeypatch):
    """Codebooks of zeros, for tests of the calibration alone."""
    shape = (6, 2)  # blocks; Keys and Values
    monkeypatch.setattr(
        kvquant, "codebooks", lambda calibration, bits: [torch.zeros(*shape, 2**bits)] * 2
    )


# --------------------------------------------------------------------------------------------------
# The quantizer


def nuq_numpy(X, signposts, lo, hi, sparse):
    """Quantize and dequantize by the distance to every signpost, with ranges and outliers in 16
    bits."""
    middle = np.float16((hi + lo) / 2).astype(float)
    half_width = np.float16((hi - lo) / 2).astype(float)
    x = (X - middle) / np.where(half_width > 0, half_width, 1)
    nearest = np.abs(x[..., None] - signposts).argmin(-1)
    X_ = signposts[nearest] * half_width + middle
    return np.where((X < lo) | (X > hi), np.float16(X), X_) if sparse else X_


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("tensor", ["K", "V"])
def test_non_uniform_quantizer_against_numpy(tensor, rho, bits):
    rng = np.random.RandomState(bits)
    X = np.float32(rng.standard_t(3, (2, 2, 21, 16)))  # two sequences, 32 numbers per token
    signposts = np.sort(np.float32(rng.uniform(-1, 1, 2**bits)))
    midpoints = torch.tensor((signposts[1:] + signposts[:-1]) / 2)
    levels = torch.tensor(signposts)
    if tensor == "K":
        lo, hi = (
            np.float32(np.quantile(X, level, axis=(0, 2), method="linear")[:, None])
            for level in (rho / 2, 1 - rho / 2)
        )
        ends = {"lo": torch.tensor(lo), "hi": torch.tensor(hi)}
        quantizer = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, **ends)
    else:
        size = kvquant.outliers_per_end(rho, 32)
        quantizer = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, tail_size=size)
        ordered = np.sort(X.transpose(0, 2, 1, 3).reshape(2, 21, 32))
        tail = round(rho * 32 / 2)
        lo, hi = (ordered[..., i].reshape(2, 1, 21, 1) for i in (tail, 31 - tail))
    assert quantizer.bits == bits and quantizer.static == (tensor == "K")
    assert quantizer.tokens_per_group == 1
    expected = nuq_numpy(X.astype(float), signposts, lo, hi, rho > 0)
    found = quantizer(torch.tensor(X)).numpy()
    off = np.abs(found - expected) > 1e-5
    assert off.mean() < 0.002  # fp32 may take the other of two signposts that are as near
    assert (np.abs(found - X) <= np.abs(expected - X) + 1e-5).all()
    if rho:
        outside = (X < lo) | (X > hi)
        assert 0.05 < outside.mean() < 0.15
        assert (found[outside] == np.float16(X[outside])).all()


def test_a_constant_channel_and_what_is_not_finite():
    midpoints = torch.tensor([-0.5, 0.0, 0.5])
    levels = torch.tensor([-0.9, -0.2, 0.3, 0.8])
    K = torch.full((1, 1, 5, 3), 2.25)
    quantizer = kvquant.NonUniformQuantizer(midpoints, levels, True, lo=K[0, :, :1], hi=K[0, :, :1])
    assert torch.equal(quantizer(K), K)
    assert torch.equal(kvquant.NonUniformQuantizer(midpoints, levels, False)(K), K)
    K[0, 0, 2, 1] = torch.nan
    assert torch.isnan(quantizer(K)[0, 0, 2, 1])


def test_ranges_of_tokens_by_hand():
    """A token of two heads with three numbers each: all heads make one vector."""
    V = torch.tensor([[[[5.0, 1, 2]], [[-7, 3, 0]]]])  # (1, 2, 1, 3)
    assert [x.flatten().tolist() for x in kvquant.token_range(V, 0)] == [[-7], [5]]
    assert [x.flatten().tolist() for x in kvquant.token_range(V, 1)] == [[0], [3]]
    assert kvquant.token_range(V, 2)[0].shape == (1, 1, 1, 1)
    rhos = (0, 0.001, 0.005, 0.01)
    assert [kvquant.outliers_per_end(rho, 4096) for rho in rhos] == [0, 2, 10, 20]
    assert [kvquant.outliers_per_end(rho, 192) for rho in rhos] == [0, 0, 0, 1]


# --------------------------------------------------------------------------------------------------
# The quantizers of a model, under Algorithm 1


def run_algorithm_1(model, H, quantizers, rule, step=decoder_block_pre_rope):
    return prefill(model, H, quantizers, step=step, **rule.with_site(SITE).prefill_arguments(H))


@pytest.mark.parametrize("recipe", RECIPES)
def test_kvquant_under_algorithm_1(
    planted, calibrated, sequences, recipe, quick_codebooks, monkeypatch
):
    """Kept tokens are untouched and the others quantized, Keys before RoPE; and a batch gives what
    its sequences give one by one."""
    calibrations, _ = calibrated
    quantizers = kvquant.kvquant_quantizers(calibrations[recipe], recipe.rho, 2)
    H = planted.embedding(sequences[0])
    used = []  # K and V of each block, as attention sees them
    entered = []  # what enters each block

    def recording_attention(Q, K, V, window):
        used.append((K, V))
        return attention(Q, K, V, window)

    def recording_step(block, H, S_sink, *rest):
        entered.append((block, H, S_sink))
        return decoder_block_pre_rope(block, H, S_sink, *rest)

    monkeypatch.setattr(kvsink, "attention", recording_attention)
    H_L, S = run_algorithm_1(planted, H, quantizers, recipe.rule, recording_step)
    assert int(S.sum()) == 2 * (2 if recipe.rule.predicts else 3)
    rope = rope_table(planted.config, H.shape[1], "cpu")
    for (block, H_l, S_sink), (K_used, V_used), pair in zip(entered, used, quantizers):
        quantize_K, quantize_V = pair
        _, K, V = block.QKV(block.LN_mhsa(H_l))
        kept = S_sink[:, None, :, None]
        assert torch.equal(K_used, apply_rope(torch.where(kept, K, quantize_K(K)), rope))
        assert torch.equal(V_used, torch.where(kept, V, quantize_V(V)))
        assert not torch.equal(V_used, V)
    for i in (0, 1):
        alone, _ = run_algorithm_1(planted, H[i : i + 1], quantizers, recipe.rule)
        assert torch.allclose(alone[0], H_L[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES[2:4])
def test_kvquant_compiled_is_kvquant_eager(planted, calibrated, sequences, recipe, quick_codebooks):
    """One graph per block, whatever is kept; with outliers and without."""
    quantizers = kvquant.kvquant_quantizers(calibrated[0][recipe], recipe.rho, 2)
    H = planted.embedding(sequences[0])
    step = torch.compile(decoder_block_pre_rope, fullgraph=True)
    H_L, S = run_algorithm_1(planted, H, quantizers, recipe.rule)
    H_c, S_c = run_algorithm_1(planted, H, quantizers, recipe.rule, step)
    assert torch.equal(S_c, S)
    # A number halfway between two signposts may fall on the other side.
    assert (H_c - H_L).norm() <= 5e-3 * H_L.norm()


@pytest.mark.parametrize("recipe", RECIPES)
def test_outliers_are_stored_apart_only_if_rho_says_so(calibrated, recipe, quick_codebooks):
    """Keys far outside the calibrated range come back as they were, in 16 bits; with rho 0 they
    come back at the end of the range."""
    calibration = calibrated[0][recipe]
    quantizers = kvquant.kvquant_quantizers(calibration, recipe.rho, 2)
    signposts, _ = kvquant.codebooks(calibration, 2)
    for l, (quantize_K, quantize_V) in enumerate(quantizers):
        lo = calibration.lo[l].numpy()
        hi = calibration.hi[l].numpy()
        K = np.float32(hi + 7.3 * (hi - lo))[None]
        end = float(signposts[l, 0, -1]) * np.float16((hi - lo) / 2) + np.float16((hi + lo) / 2)
        expected = np.float16(K) if recipe.rho else end[None]
        assert np.allclose(quantize_K(torch.tensor(K)).numpy(), expected, rtol=1e-3, atol=1e-3)
        V = torch.zeros(1, 2, 1, 8)
        V[0, 1, 0, 5] = 100.0  # if rho is a tenth, one of 16 numbers at each end is an outlier
        _, _, half_width, outliers = quantize_V.encode(V)
        assert outliers.sum() == (1 if recipe.rho else 0)
        assert half_width.item() == (0 if recipe.rho else 50)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kvquant_on_cuda(planted, calibrated, sequences, dtype):
    """Calibrated and run on the GPU, compiled, against the CPU in fp32."""
    calibrations, windows = calibrated
    model = copy.deepcopy(planted).to("cuda", dtype)
    ours = kvquant.calibrate(model, windows, RECIPES, SITE)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    step = kvsink.compiled(decoder_block_pre_rope)
    for recipe in RECIPES:
        for a, b in zip(ours[recipe][:2], calibrations[recipe][:2]):
            assert (a.cpu() - b).norm() <= tolerance * b.norm()
        H = planted.embedding(sequences[0])
        full = full_precision_quantizers(planted)
        expected, _ = run_algorithm_1(planted, H, full, recipe.rule, kvsink.decoder_block)
        H = H.to("cuda", dtype)
        quantizers = kvquant.kvquant_quantizers(ours[recipe], recipe.rho, 4)
        found, _ = run_algorithm_1(model, H, quantizers, recipe.rule, step)
        eager, _ = run_algorithm_1(model, H, quantizers, recipe.rule)
        assert (found.float() - eager.float()).norm() <= 10 * tolerance * eager.float().norm()
        assert (found.float().cpu() - expected).norm() <= 0.2 * expected.norm()


# --------------------------------------------------------------------------------------------------
# Codebooks and average bits


def mean_and_deviation(x, count):
    mean = np.average(x, weights=count)
    return mean, np.sqrt(np.average((x - mean) ** 2, weights=count))


def test_codebooks_lie_where_fisher_information_is_and_q_norm_keeps_mean_and_deviation():
    fisher = torch.zeros(1, 2, 3, kvquant.BINS)
    x = (torch.arange(kvquant.BINS) + 0.5) / kvquant.BINS * 2 - 1
    fisher[0, :, 0] = torch.exp(-8 * x**2)  # how many
    fisher[0, 0, 1] = fisher[0, 0, 0] * (x > 0)  # Keys matter on the right only
    fisher[0, 1, 1] = fisher[0, 1, 0]
    fisher[0, :, 2] = fisher[0, :, 1] * x
    calibration = kvquant.Calibration(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), fisher)
    signposts, levels = kvquant.codebooks(calibration, 2)
    assert torch.equal(signposts, levels) and (signposts[0, 0] > 0).all()
    assert torch.allclose(signposts[0, 1], -signposts[0, 1].flip(0), atol=5e-3)
    signposts, levels = kvquant.codebooks(calibration, 2, q_norm=True)
    count = fisher[0, 0, 0].numpy().astype(float)
    for j in (0, 1):
        nearest = np.abs(x.numpy()[:, None] - signposts[0, j].numpy()).argmin(1)
        mean, deviation = mean_and_deviation(x.numpy(), count)
        mean_, deviation_ = mean_and_deviation(levels[0, j].numpy()[nearest], count)
        assert mean_ == pytest.approx(mean, abs=1e-3)
        assert deviation_ == pytest.approx(deviation, rel=1e-3)


def test_codebooks_of_nothing_are_finite():
    calibration = kvquant.Calibration(
        torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), torch.zeros(1, 2, 3, kvquant.BINS)
    )
    assert all(table.isfinite().all() for table in kvquant.codebooks(calibration, 2, q_norm=True))


def test_average_bits_are_those_of_table_2():
    """LLaMA2-7B's shape, 4,096 tokens: "2-2.02, 2.04-2.06, 2.16-2.19, 2.32-2.35", from KVQuant
    alone to KVQuant with KVSink-5."""
    config = LlamaConfig.from_dict(
        {**SMALL, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
    )

    def bits(rule, N, rho):
        row = Row("kvquant", 2, rule, rho)
        return average_bits(row, config, 4096, kvquant.kvquant_bits(row, config), 2, N)

    printed = ((0.0, 2, 2.02), (0.001, 2.04, 2.06), (0.005, 2.16, 2.19), (0.01, 2.32, 2.35))
    for rho, low, high in printed:
        pfn = bits(Rule(first=1), 1, rho)
        with_kvsink = bits(Rule(k=5), 5, rho)
        assert low - 0.005 <= pfn < with_kvsink <= high + 0.005, rho


# --------------------------------------------------------------------------------------------------
# The calibration


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranges_of_keys_against_numpy(planted, calibrated, recipe):
    """Quantiles of every channel of the Keys before RoPE, over both windows, without the tokens
    that the rule keeps."""
    calibrations, windows = calibrated
    calibration = calibrations[recipe]
    hidden = [planted.embedding(window[None]) for window in windows]
    for l, block in enumerate(planted.blocks, start=1):
        keys = []
        for w, H in enumerate(hidden):
            _, K, _ = block.QKV(block.LN_mhsa(H))
            K = K[0].numpy().astype(np.float64)
            keys.append(np.delete(K, kept_tokens(recipe.rule, l, w), axis=1))
            hidden[w] = block(H, rope_table(planted.config, 40, "cpu"))
        keys = np.concatenate(keys, axis=1)
        ends = ((calibration.lo, recipe.rho / 2), (calibration.hi, 1 - recipe.rho / 2))
        for found, level in ends:
            expected = np.quantile(keys, level, axis=1)
            assert np.allclose(found[l - 1, :, 0], expected, rtol=1e-4, atol=1e-5)


def hidden_states(model, windows):
    """Return H^0 to H^L of every window: (L + 1, windows, n, d)."""
    states = [model.embedding(windows)]
    for block in model.blocks:
        states.append(block(states[-1], rope_table(model.config, windows.shape[1], "cpu")))
    return torch.stack(states)


def test_fisher_information_against_one_backward_pass(planted, sequences):
    """Block by block as here, against autograd through the whole model in float64 with hooks on W_k
    and W_v; the second of two windows is compared."""
    tokens = sequences[0][:1]
    windows = sequences[0].flip(0)
    model = copy.deepcopy(planted).double()
    outputs = {}  # (l, "K" or "V") -> the output of W_k or W_v

    def keep_output(key, module, inputs, output):
        outputs[key] = output if output.requires_grad else output.requires_grad_()
        outputs[key].retain_grad()

    for l, block in enumerate(model.blocks, start=1):
        for name, W in (("K", block.W_k), ("V", block.W_v)):
            W.register_forward_hook(functools.partial(keep_output, (l, name)))
    with torch.enable_grad():
        F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="sum").backward()
    order = []  # the windows, as they come
    blocks = []
    states = hidden_states(planted, windows)
    for l, w, K, V, F_K, F_V in kvquant.fisher_information(planted, windows, states):
        order.append(w)
        if w == 0:
            continue
        blocks.append(l)
        for name, X, fisher in (("K", K, F_K), ("V", V, F_V)):
            whole = outputs[l, name]
            X = X.transpose(1, 2).flatten(2)
            assert torch.allclose(X, whole.detach().float(), rtol=1e-3, atol=1e-4)
            expected = whole.grad.square().float()
            difference = fisher.transpose(1, 2).flatten(2) - expected
            assert difference.norm() <= 1e-3 * expected.norm(), (l, name)
            assert expected.norm() > 0
    assert blocks == [6, 5, 4, 3, 2, 1] and order == [0, 1] * 6
    assert not any(p.requires_grad for p in planted.parameters())


def test_a_gradient_that_is_not_finite_names_its_block(planted, sequences):
    model = copy.deepcopy(planted)
    model.blocks[3].FFN.W_d.weight[:] = 3e38
    windows = sequences[0][:1]
    with pytest.raises(quant.NotFinite, match="gradient of block"):
        list(kvquant.fisher_information(model, windows, hidden_states(model, windows)))


def test_no_room_for_the_hidden_states(planted, sequences, monkeypatch):
    """H^0 to H^6 and one more of two windows, 24 tokens, 32 channels, in fp32."""
    size = 8 * 2 * 24 * 32 * 4
    monkeypatch.setattr(kvquant, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=r"0\.0 MiB are free: lower --calib-windows"):
        kvquant.calibrate(planted, sequences[0], RECIPES[:1], SITE)
    monkeypatch.setattr(kvquant, "free_memory", lambda device: size)
    assert list(kvquant.calibrate(planted, sequences[0], RECIPES[:1], SITE)) == RECIPES[:1]


def test_a_recipe_that_is_named_twice_counts_once(planted, sequences):
    once = kvquant.calibrate(planted, sequences[0], RECIPES[:1], SITE)
    twice = kvquant.calibrate(planted, sequences[0], RECIPES[:1] * 2, SITE)
    assert torch.equal(once[RECIPES[0]].fisher, twice[RECIPES[0]].fisher)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_histogram_holds_what_the_rule_does_not_keep(planted, calibrated, recipe):
    """Counts, Fisher information and first moments, over all bins, against sums over the numbers
    themselves."""
    calibrations, windows = calibrated
    calibration = calibrations[recipe]
    expected = np.zeros((6, 2, 3))
    states = hidden_states(planted, windows)
    for l, w, K, V, F_K, F_V in kvquant.fisher_information(planted, windows, states):
        counted = ~np.isin(np.arange(40), kept_tokens(recipe.rule, l, w))
        ends_K = (calibration.lo[l - 1].numpy(), calibration.hi[l - 1].numpy())
        ordered = np.sort(V[0].transpose(0, 1).flatten(1).numpy())
        tail = round(recipe.rho * 16 / 2)
        ends_V = [ordered[None, :, [i]] for i in (tail, 15 - tail)]
        for j, (X, fisher, (lo, hi)) in enumerate(((K, F_K, ends_K), (V, F_V, ends_V))):
            X = X[0].numpy().astype(float)
            fisher = fisher[0].numpy().astype(float)
            x = (X - (lo + hi) / 2) / ((hi - lo) / 2)
            inside = (X >= lo) & (X <= hi) & counted[None, :, None]
            expected[l - 1, j] += [inside.sum(), fisher[inside].sum(), (fisher * x)[inside].sum()]
    found = calibration.fisher.sum(-1).numpy()
    largest = np.abs(expected[..., 1]).max()
    assert np.allclose(found[..., 0], expected[..., 0])
    assert np.allclose(found[..., 1], expected[..., 1], rtol=1e-4)
    assert np.allclose(found[..., 2], expected[..., 2], rtol=1e-2, atol=1e-2 * largest)


def test_gradients_reach_keys_and_values(tmp_path):
    """The Fisher information of KVQuant needs the gradient of the loss at every K and V; here of
    each block."""
    model = Llama.from_pretrained(write_model(tmp_path, SMALL))
    tokens = torch.tensor(np.random.RandomState(1).randint(0, 97, (1, 12)))
    outputs = []

    def keep_output(module, inputs, output):
        outputs.append(output.requires_grad_())

    linears = [linear for block in model.blocks for linear in (block.W_k, block.W_v)]
    hooks = [linear.register_forward_hook(keep_output) for linear in linears]
    with torch.enable_grad():
        logits = model(tokens)
        loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
        gradients = torch.autograd.grad(loss, outputs)
    for hook in hooks:
        hook.remove()
    assert len(gradients) == 6 and all(g.abs().max() > 1e-6 for g in gradients)
    # A finite difference at one number of the last block's V.
    step = 1e-2
    place = (0, 3, 5)

    def shifted_loss(shift):
        def add(module, inputs, output):
            output[place] += shift

        hook = model.blocks[-1].W_v.register_forward_hook(add)
        loss = F.cross_entropy(model(tokens)[0, :-1].double(), tokens[0, 1:])
        hook.remove()
        return loss

    difference = (shifted_loss(step) - shifted_loss(-step)) / (2 * step)
    assert gradients[-1][place].item() == pytest.approx(difference.item(), rel=1e-2, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Weighted k-means


def numbers_and_weights(kind):
    """Return numbers and weights whose clusters are easy, uneven, or hidden under a few heavy
    weights."""
    rng = np.random.RandomState(7)
    if kind == "normal":
        x = rng.randn(3000) / 3
        w = np.ones(3000)
    elif kind == "two humps":
        x = np.r_[rng.randn(2000) / 20 - 0.5, rng.randn(1000) / 10 + 0.6]
        w = rng.rand(3000) ** 4
    else:
        x = rng.standard_t(2, 3000) / 12
        w = np.exp(3 * rng.randn(3000))
    return np.clip(x, -1, 1), w


# of scikit-learn 1.9's KMeans(k, n_init=20, max_iter=500, random_state=0) with sample_weight
INERTIA = {
    ("normal", 4): 37.186215, ("normal", 8): 10.613144, ("normal", 16): 2.812161,
    ("two humps", 4): 1.148406, ("two humps", 8): 0.366825, ("two humps", 16): 0.09285,
    ("heavy tails", 4): 766.410834, ("heavy tails", 8): 163.680291, ("heavy tails", 16): 29.601434,
}  # fmt: skip


@pytest.mark.parametrize("kind, k", INERTIA)
def test_kmeans_is_as_good_as_scikit_learns(kind, k):
    x, w = numbers_and_weights(kind)
    centers = kvquant.weighted_kmeans(torch.tensor(x)[None], torch.tensor(w)[None], k)
    again = kvquant.weighted_kmeans(torch.tensor(x)[None], torch.tensor(w)[None], k)
    assert torch.equal(centers, again)
    c = centers[0].numpy()
    assert c.shape == (k,) and (np.diff(c) > 0).all()
    nearest = ((x[:, None] - c) ** 2).argmin(1)
    assert (w * (x - c[nearest]) ** 2).sum() <= 1.01 * INERTIA[kind, k]
    for j in range(k):  # a center is the weighted mean of the numbers that are nearest to it
        mean = np.average(x[nearest == j], weights=w[nearest == j])
        assert c[j] == pytest.approx(mean, abs=1e-9)


def test_kmeans_of_several_problems_and_of_few_numbers():
    problems = [numbers_and_weights(kind) for kind in ("normal", "two humps", "heavy tails")]
    x, w = (torch.tensor(np.stack(arrays)) for arrays in zip(*problems))
    together = kvquant.weighted_kmeans(x, w, 4)
    for i in range(3):
        alone = kvquant.weighted_kmeans(x[i : i + 1], w[i : i + 1], 4)[0]
        assert torch.allclose(together[i], alone, atol=1e-9), i
    x = torch.tensor([[3.0, -1.0, 0.5, 9.0]])
    w = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    # (-2 + 0.5) / 3; a number without weight pulls no center
    assert kvquant.weighted_kmeans(x, w, 2).tolist() == [[-1 / 2, 3.0]]
    # more centers than numbers with a weight
    assert kvquant.weighted_kmeans(x, w, 4).shape == (1, 4)


# --------------------------------------------------------------------------------------------------
# The file of a calibration


def test_recipes_have_the_names_of_older_files():
    names = ["pfn-3-0.0", "pfn-3-0.1", "kvsink-2-0.0", "kvsink-2-0.1", "pfn+kvsink-auto-0.1"]
    assert [recipe.name for recipe in RECIPES] == names
    assert kvquant.Recipe(Rule(), 0.0).name == "none-0-0.0"


def test_calibrations_are_kept_in_a_file_with_what_they_depend_on(
    calibrated, tmp_path, quick_codebooks
):
    calibrations, _ = calibrated
    path = tmp_path / "some" / "file.safetensors"
    settings = {"windows": 2, "weights": "abc", "site": [2, 5]}
    kvquant.save_calibrations(path, settings, calibrations)
    loaded = kvquant.load_calibrations(path, settings, RECIPES[:2], "cpu")
    assert list(loaded) == RECIPES[:2]
    for recipe in RECIPES[:2]:
        assert all(torch.equal(a, b) for a, b in zip(loaded[recipe], calibrations[recipe]))
    signposts = load_file(path)["kvsink-2-0.1.signposts.3"]
    assert torch.equal(signposts, kvquant.codebooks(calibrations[RECIPES[3]], 3)[0])
    assert signposts.shape == (6, 2, 8)
    for change, words in (
        ({"windows": 4}, "windows 2, not 4"),
        ({"weights": "b"}, "weights abc"),
        ({"new": 1}, "new None"),
    ):
        with pytest.raises(ValueError, match=words):
            kvquant.load_calibrations(path, {**settings, **change}, RECIPES, "cpu")
    with pytest.raises(ValueError, match="it has no pfn-7-0.0"):
        kvquant.load_calibrations(path, settings, [kvquant.Recipe(Rule(first=7), 0.0)], "cpu")
    # PFN does not depend on the site.
    kvquant.load_calibrations(path, {**settings, "site": None}, RECIPES[:2], "cpu")
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="file.safetensors.*delete it"):
        kvquant.load_calibrations(path, settings, RECIPES, "cpu")


@pytest.mark.parametrize("name", ["pfn-3-0.0.lo", "kvsink-2-0.1.fisher", "pfn-3-0.1.signposts.4"])
def test_a_file_with_another_number_is_refused(calibrated, tmp_path, no_codebooks, name):
    """One bit of any tensor, also of one that these recipes do not need; a file without its
    SHA-256; one cut short."""
    path = tmp_path / "file.safetensors"
    kvquant.save_calibrations(path, {"windows": 2}, calibrated[0])
    content = path.read_bytes()
    tensors = load_file(path)
    X = tensors[name].numpy().tobytes()
    i = content.index(X) + len(X) // 2
    for damaged in (content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="file.safetensors.*delete it"):
            kvquant.load_calibrations(path, {"windows": 2}, RECIPES[:1], "cpu")
    save_file(tensors, path, metadata={"settings": '{"windows": 2}'})
    with pytest.raises(ValueError, match="SHA-256"):
        kvquant.load_calibrations(path, {"windows": 2}, RECIPES[:1], "cpu")


CONFIG = kvquant.CalibrationConfig(
    recipes=RECIPES[2:3],
    site=SITE,
    weights="abc",
    data="wiki-sample",
    windows=2,
    tokens=40,
    seed=0,
    dtype="float32",
)


@pytest.fixture
def load_or_calibrate(tiny, tmp_path, monkeypatch, sample_calibration, no_codebooks):
    """A function that returns the tiny model's calibrations, from an empty cache of ours or from a
    file. It takes changes of CONFIG."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    model = Llama.from_pretrained(tiny[1])
    tokenizer = Tokenizer.from_pretrained(tiny[1])

    def load_or_calibrate(path=None, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        return kvquant.load_or_calibrate(model, tokenizer, config, path)

    return load_or_calibrate


def test_calibrations_are_made_once_for_the_same_settings(
    load_or_calibrate, tmp_path, monkeypatch, capsys
):
    def count_files():
        return len(list(tmp_path.glob("cache/kvquant/*.safetensors")))

    first = load_or_calibrate()[RECIPES[2]]
    assert "calibrating KVQuant on 2 windows of 40 tokens" in capsys.readouterr().err
    assert count_files() == 1
    changes = [
        {"seed": 1},
        {"windows": 3},
        {"tokens": 39},
        {"weights": "b"},
        {"dtype": "b"},
        {"site": Site(3, 5)},
        {"recipes": RECIPES},
    ]
    for count, change in enumerate(changes, start=2):
        load_or_calibrate(**change)
        assert count_files() == count, change
    monkeypatch.setattr(kvquant, "calibrate", None)
    capsys.readouterr()
    again = load_or_calibrate(recipes=RECIPES[2:3] * 2)[RECIPES[2]]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not capsys.readouterr().err


def test_windows_of_another_tokenizer_are_refused(load_or_calibrate, monkeypatch):
    monkeypatch.setattr(kvquant.text, "calibration_windows", lambda *_: torch.full((2, 40), 500))
    with pytest.raises(ValueError, match="wiki-sample: the tokenizer gives id 500"):
        load_or_calibrate()


def test_a_damaged_calibration_of_our_cache_is_made_again_and_a_named_one_refused(
    load_or_calibrate, tmp_path, capsys
):
    named = tmp_path / "named.safetensors"
    first = load_or_calibrate()[RECIPES[2]]
    load_or_calibrate(path=named)
    (ours,) = tmp_path.glob("cache/kvquant/*.safetensors")
    for path in (named, ours):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    damaged = named.read_bytes()
    capsys.readouterr()
    again = load_or_calibrate()[RECIPES[2]]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert ours.name in capsys.readouterr().err.splitlines()[0]
    assert ours.read_bytes() == content
    with pytest.raises(ValueError, match="named.safetensors.*SHA-256"):
        load_or_calibrate(path=named)
    assert named.read_bytes() == damaged
