"""KVQuant: k-means, quantizer, calibration and its file, against NumPy, scikit-learn's figures and
autograd as a whole.

In the order of paper/kvquant.py."""

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
from kvsink import Site, full_precision_cache, prefill, preservation
from llama import Llama, LlamaConfig, apply_rope, attention, rope_table
from paper import kvquant
from support import cli, results
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
# The codebook


@pytest.fixture
def quick_codebooks(monkeypatch):
    """Where clusters need not be the best ones: one start, few iterations."""
    monkeypatch.setattr(
        kvquant,
        "weighted_kmeans",
        functools.partial(kvquant.weighted_kmeans, restarts=1, iterations=9),
    )


@pytest.fixture
def no_codebooks(monkeypatch):
    """Where only the calibration counts."""
    shape = (6, 2)  # blocks; Keys and Values
    monkeypatch.setattr(
        kvquant, "codebooks", lambda calibration, bits: [torch.zeros(*shape, 2**bits)] * 2
    )


def clusters_of(kind):
    """Numbers and weights whose clusters are easy, uneven, or hidden under a few heavy weights."""
    draw = np.random.RandomState(7)
    x = {
        "normal": lambda: draw.randn(3000) / 3,
        "two humps": lambda: np.r_[draw.randn(2000) / 20 - 0.5, draw.randn(1000) / 10 + 0.6],
        "heavy tails": lambda: draw.standard_t(2, 3000) / 12,
    }[kind]()
    w = {"normal": lambda: np.ones(3000), "two humps": lambda: draw.rand(3000) ** 4}
    return np.clip(x, -1, 1), w.get(kind, lambda: np.exp(3 * draw.randn(3000)))()


# of scikit-learn 1.9's KMeans(k, n_init=20, max_iter=500, random_state=0) with sample_weight
INERTIA = {
    ("normal", 4): 37.186215, ("normal", 8): 10.613144, ("normal", 16): 2.812161,
    ("two humps", 4): 1.148406, ("two humps", 8): 0.366825, ("two humps", 16): 0.09285,
    ("heavy tails", 4): 766.410834, ("heavy tails", 8): 163.680291, ("heavy tails", 16): 29.601434,
}  # fmt: skip


@pytest.mark.parametrize("kind, k", INERTIA)
def test_kmeans_is_as_good_as_scikit_learns(kind, k):
    x, w = clusters_of(kind)
    centers = kvquant.weighted_kmeans(torch.tensor(x)[None], torch.tensor(w)[None], k)
    assert torch.equal(
        centers, kvquant.weighted_kmeans(torch.tensor(x)[None], torch.tensor(w)[None], k)
    )
    c = centers[0].numpy()
    assert c.shape == (k,) and (np.diff(c) > 0).all()
    nearest = ((x[:, None] - c) ** 2).argmin(1)
    assert (w * (x - c[nearest]) ** 2).sum() <= 1.01 * INERTIA[kind, k]
    for j in range(k):  # a center is the weighted mean of what is nearest to it
        assert c[j] == pytest.approx(np.average(x[nearest == j], weights=w[nearest == j]), abs=1e-9)


def test_kmeans_of_several_problems_and_of_few_numbers():
    problems = [clusters_of(kind) for kind in ("normal", "two humps", "heavy tails")]
    x, w = (torch.tensor(np.stack(part)) for part in zip(*problems))
    together = kvquant.weighted_kmeans(x, w, 4)
    for i in range(3):
        alone = kvquant.weighted_kmeans(x[i : i + 1], w[i : i + 1], 4)[0]
        assert torch.allclose(together[i], alone, atol=1e-9), i
    x, w = torch.tensor([[3.0, -1.0, 0.5, 9.0]]), torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert kvquant.weighted_kmeans(x, w, 2).tolist() == [
        [-1 / 2, 3.0]
    ]  # (-2 + 0.5) / 3; what weighs nothing, nowhere
    assert kvquant.weighted_kmeans(x, w, 4).shape == (1, 4)  # more centers than numbers that weigh


# --------------------------------------------------------------------------------------------------
# The quantizer


def test_ranges_of_tokens_by_hand():
    """A token of two heads with three numbers each: all heads make one vector."""
    V = torch.tensor([[[[5.0, 1, 2]], [[-7, 3, 0]]]])  # (1, 2, 1, 3)
    assert [x.flatten().tolist() for x in kvquant.token_range(V, 0)] == [[-7], [5]]
    assert [x.flatten().tolist() for x in kvquant.token_range(V, 1)] == [[0], [3]]
    assert kvquant.token_range(V, 2)[0].shape == (1, 1, 1, 1)
    assert [kvquant.tail_of(rho, 4096) for rho in (0, 0.001, 0.005, 0.01)] == [0, 2, 10, 20]
    assert [kvquant.tail_of(rho, 192) for rho in (0, 0.001, 0.005, 0.01)] == [0, 0, 0, 1]


def nuq_numpy(X, signposts, lo, hi, sparse):
    """The quantizer by a distance to every signpost; ranges as 16 bits, outliers as 16 bits."""
    middle, half = np.float16((hi + lo) / 2).astype(float), np.float16((hi - lo) / 2).astype(float)
    x = (X - middle) / np.where(half > 0, half, 1)
    nearest = np.abs(x[..., None] - signposts).argmin(-1)
    X_ = signposts[nearest] * half + middle
    return np.where((X < lo) | (X > hi), np.float16(X), X_) if sparse else X_


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("tensor", ["K", "V"])
def test_non_uniform_quantizer_against_numpy(tensor, rho, bits):
    draw = np.random.RandomState(bits)
    X = np.float32(draw.standard_t(3, (2, 2, 21, 16)))  # two sequences, 32 numbers a token
    signposts = np.sort(np.float32(draw.uniform(-1, 1, 2**bits)))
    midpoints, levels = torch.tensor((signposts[1:] + signposts[:-1]) / 2), torch.tensor(signposts)
    if tensor == "K":
        lo, hi = (
            np.quantile(X, q, axis=(0, 2), method="linear")[:, None] for q in (rho / 2, 1 - rho / 2)
        )
        quantizer = kvquant.NonUniformQuantizer(
            midpoints, levels, rho > 0, lo=torch.tensor(lo), hi=torch.tensor(hi)
        )
        quantizer.lo, quantizer.hi = quantizer.lo.float(), quantizer.hi.float()
        lo, hi = np.float32(lo), np.float32(hi)
    else:
        quantizer = kvquant.NonUniformQuantizer(
            midpoints, levels, rho > 0, tail=kvquant.tail_of(rho, 32)
        )
        ordered = np.sort(X.transpose(0, 2, 1, 3).reshape(2, 21, 32))
        tail = round(rho * 32 / 2)
        lo, hi = (ordered[..., i].reshape(2, 1, 21, 1) for i in (tail, 31 - tail))
    expected = nuq_numpy(X.astype(float), signposts, lo, hi, rho > 0)
    found = quantizer(torch.tensor(X)).numpy()
    off = np.abs(found - expected) > 1e-5
    assert off.mean() < 0.002  # fp32 may take the other of two signposts that are as near
    assert (np.abs(found - X) <= np.abs(expected - X) + 1e-5).all()
    if rho:
        outside = (X < lo) | (X > hi)
        assert 0.05 < outside.mean() < 0.15 and (found[outside] == np.float16(X[outside])).all()


def test_a_constant_channel_and_what_is_not_finite():
    midpoints, levels = torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([-0.9, -0.2, 0.3, 0.8])
    K = torch.full((1, 1, 5, 3), 2.25)
    quantizer = kvquant.NonUniformQuantizer(midpoints, levels, True, lo=K[0, :, :1], hi=K[0, :, :1])
    assert torch.equal(quantizer(K), K)
    assert torch.equal(kvquant.NonUniformQuantizer(midpoints, levels, False)(K), K)
    K[0, 0, 2, 1] = torch.nan
    assert torch.isnan(quantizer(K)[0, 0, 2, 1])


# --------------------------------------------------------------------------------------------------
# The calibration


RECIPES = [
    kvquant.Recipe(keep, N, rho) for keep, N in (("pfn", 3), ("kvsink", 2)) for rho in (0.0, 0.1)
]
RECIPES += [kvquant.Recipe("pfn+kvsink", "auto", 0.1)]

PLACES = ([5, 22], [17, 18])  # of the sinks, in each window


def kept_in(recipe, l, i):
    """The tokens of window i that block l keeps."""
    predicted = PLACES[i] if l > EMERGENCE else []
    return {"pfn": [0, 1, 2], "kvsink": predicted, "pfn+kvsink": predicted or [0]}[recipe.keep]


@pytest.fixture(scope="module")
def calibrated():
    """The planted model's calibrations, and the two windows of 40 tokens (2, 40) that they are
    from."""
    windows = torch.stack([ordinary_tokens(40, seed) for seed in (1, 2)])
    for window, places in zip(windows, PLACES):
        window[places] = torch.tensor([STRONG, WEAK])
    with torch.no_grad():
        return kvquant.calibrate(planted_model(), windows, RECIPES, SITE, quiet=True), windows


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranges_of_keys_against_numpy(planted, calibrated, recipe):
    """Quantiles of every channel of the Keys before RoPE, over both windows, without the tokens
    that the rule keeps."""
    calibrations, windows = calibrated
    hidden = [planted.embedding(window[None]) for window in windows]
    for l, block in enumerate(planted.blocks, start=1):
        keys = []
        for i, H in enumerate(hidden):
            _, K, _ = block.QKV(block.LN_mhsa(H))
            keys.append(np.delete(K[0].numpy().astype(np.float64), kept_in(recipe, l, i), axis=1))
            hidden[i] = block(H, rope_table(planted.config, 40, "cpu"))
        keys = np.concatenate(keys, axis=1)
        for found, level in (
            (calibrations[recipe].lo, recipe.rho / 2),
            (calibrations[recipe].hi, 1 - recipe.rho / 2),
        ):
            assert np.allclose(
                found[l - 1, :, 0], np.quantile(keys, level, axis=1), rtol=1e-4, atol=1e-5
            )


def hidden_states(model, windows):
    """H^0 to H^L of every window: (L + 1, windows, n, d)."""
    states = [model.embedding(windows)]
    for block in model.blocks:
        states.append(block(states[-1], rope_table(model.config, states[0].shape[1], "cpu")))
    return torch.stack(states)


def test_fisher_information_against_one_backward_pass(planted, sequences):
    """Block by block as here, against autograd through the whole model in float64 with hooks on W_k
    and W_v; of two windows the second."""
    tokens, model, seen = sequences[0][:1], copy.deepcopy(planted).double(), {}
    windows, seen_windows = sequences[0].flip(0), []
    for l, block in enumerate(model.blocks, start=1):
        for name, W in (("K", block.W_k), ("V", block.W_v)):

            def see(module, inputs, output, key=(l, name)):
                seen[key] = output if output.requires_grad else output.requires_grad_()
                seen[key].retain_grad()

            W.register_forward_hook(see)
    with torch.enable_grad():
        F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="sum").backward()
    blocks = []
    for l, i, K, V, F_K, F_V in kvquant.fisher_information(
        planted, windows, hidden_states(planted, windows)
    ):
        seen_windows.append(i)
        if i == 0:
            continue
        blocks.append(l)
        for name, X, fisher in (("K", K, F_K), ("V", V, F_V)):
            whole = seen[l, name]
            assert torch.allclose(
                X.transpose(1, 2).flatten(2), whole.detach().float(), rtol=1e-3, atol=1e-4
            )
            expected = whole.grad.square().float()
            assert (
                fisher.transpose(1, 2).flatten(2) - expected
            ).norm() <= 1e-3 * expected.norm(), (l, name)
            assert expected.norm() > 0
    assert blocks == [6, 5, 4, 3, 2, 1] and seen_windows == [0, 1] * 6
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
    monkeypatch.setattr(cli, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=r"0\.0 MiB are free: lower --calib-windows"):
        kvquant.calibrate(planted, sequences[0], RECIPES[:1], SITE, quiet=True)
    monkeypatch.setattr(cli, "free_memory", lambda device: size)
    assert (
        list(kvquant.calibrate(planted, sequences[0], RECIPES[:1], SITE, quiet=True)) == RECIPES[:1]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_histogram_holds_what_the_rule_does_not_keep(planted, calibrated, recipe):
    """Counts, Fisher information and first moments, over all bins, against sums over the numbers
    themselves."""
    calibrations, windows = calibrated
    expected = np.zeros((6, 2, 3))
    for l, i, K, V, F_K, F_V in kvquant.fisher_information(
        planted, windows, hidden_states(planted, windows)
    ):
        counted = ~np.isin(np.arange(40), kept_in(recipe, l, i))
        lo, hi = calibrations[recipe].lo[l - 1].numpy(), calibrations[recipe].hi[l - 1].numpy()
        ordered = np.sort(V[0].transpose(0, 1).flatten(1).numpy())
        tail = round(recipe.rho * 16 / 2)
        ends = [ordered[None, :, [at]] for at in (tail, 15 - tail)]
        for j, (X, fisher, low, high) in enumerate(((K, F_K, lo, hi), (V, F_V, *ends))):
            X, fisher = X[0].numpy().astype(float), fisher[0].numpy().astype(float)
            x = (X - (low + high) / 2) / ((high - low) / 2)
            inside = (X >= low) & (X <= high) & counted[None, :, None]
            expected[l - 1, j] += [inside.sum(), fisher[inside].sum(), (fisher * x)[inside].sum()]
    found = calibrations[recipe].fisher.sum(-1).numpy()
    assert np.allclose(found[..., 0], expected[..., 0]) and np.allclose(
        found[..., 1], expected[..., 1], rtol=1e-4
    )
    assert np.allclose(
        found[..., 2], expected[..., 2], rtol=1e-2, atol=1e-2 * np.abs(expected[..., 1]).max()
    )


# --------------------------------------------------------------------------------------------------
# What is made of it


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
        back = levels[0, j].numpy()[nearest]
        mean, mean_ = np.average(x, weights=count), np.average(back, weights=count)
        assert mean_ == pytest.approx(mean, abs=1e-3)
        deviation, deviation_ = (
            np.sqrt(np.average((y - np.average(y, weights=count)) ** 2, weights=count))
            for y in (x.numpy(), back)
        )
        assert deviation_ == pytest.approx(deviation, rel=1e-3)


def test_codebooks_of_nothing_are_finite():
    calibration = kvquant.Calibration(
        torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), torch.zeros(1, 2, 3, kvquant.BINS)
    )
    assert all(table.isfinite().all() for table in kvquant.codebooks(calibration, 2, q_norm=True))


def test_average_bits_are_those_of_table_2():
    """LLaMA2-7B's shape, 4,096 tokens: "2-2.02, 2.04-2.06, 2.16-2.19, 2.32-2.35", from KVQuant to +
    KVSink-5."""
    config = LlamaConfig.from_dict(
        {**SMALL, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
    )
    for rho, low, high in (
        (0.0, 2, 2.02),
        (0.001, 2.04, 2.06),
        (0.005, 2.16, 2.19),
        (0.01, 2.32, 2.35),
    ):
        rows = [results.Row("kvquant", 2, keep, N, rho) for keep, N in (("pfn", 1), ("kvsink", 5))]
        bits = [
            results.average_bits(row, config, 4096, kvquant.kvquant_bits(row, config), 2, row.N)
            for row in rows
        ]
        assert low - 0.005 <= bits[0] < bits[1] <= high + 0.005, bits


# --------------------------------------------------------------------------------------------------
# Under Algorithm 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_kvquant_under_algorithm_1(
    planted, calibrated, sequences, recipe, quick_codebooks, monkeypatch
):
    """Kept tokens are untouched and the others quantized, Keys before RoPE; in a batch as one by
    one."""
    calibrations, _ = calibrated
    cache = kvquant.kvquant_cache(calibrations[recipe], recipe.rho, 2)
    H, used, entered = planted.embedding(sequences[0]), [], []
    monkeypatch.setattr(
        kvsink,
        "attention",
        lambda Q, K, V, window: used.append((K, V)) or attention(Q, K, V, window),
    )

    def step(block, H, S_sink, *rest):
        entered.append((block, H, S_sink))
        return kvsink.decoder_block(block, H, S_sink, *rest)

    H_L, S = prefill(
        planted, H, cache, pre_rope=True, step=step, **preservation(recipe.keep, recipe.N, SITE, H)
    )
    assert int(S.sum()) == 2 * (2 if recipe.N == kvsink.AUTO else recipe.N)
    rope = rope_table(planted.config, H.shape[1], "cpu")
    for (block, H_l, S_sink), (K_used, V_used), (quantize_K, quantize_V) in zip(
        entered, used, cache
    ):
        _, K, V = block.QKV(block.LN_mhsa(H_l))
        kept = S_sink[:, None, :, None]
        assert torch.equal(K_used, apply_rope(torch.where(kept, K, quantize_K(K)), rope))
        assert torch.equal(V_used, torch.where(kept, V, quantize_V(V))) and not torch.equal(
            V_used, V
        )
    for i in (0, 1):
        rule = preservation(recipe.keep, recipe.N, SITE, H[i : i + 1])
        alone, _ = prefill(planted, H[i : i + 1], cache, pre_rope=True, **rule)
        assert torch.allclose(alone[0], H_L[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES[2:4])
def test_kvquant_compiled_is_kvquant_eager(planted, calibrated, sequences, recipe, quick_codebooks):
    """One graph a block, whatever is kept; with outliers and without."""
    cache, H = (
        kvquant.kvquant_cache(calibrated[0][recipe], recipe.rho, 2),
        planted.embedding(sequences[0]),
    )
    rule, step = (
        preservation(recipe.keep, recipe.N, SITE, H),
        torch.compile(kvsink.decoder_block, fullgraph=True),
    )
    H_L, S = prefill(planted, H, cache, pre_rope=True, **rule)
    H_c, S_c = prefill(planted, H, cache, pre_rope=True, step=step, **rule)
    assert (
        torch.equal(S_c, S) and (H_c - H_L).norm() <= 5e-3 * H_L.norm()
    )  # a number in between may fall the other way


@pytest.mark.parametrize("recipe", RECIPES)
def test_outliers_are_stored_apart_only_where_rho_says_so(calibrated, recipe, quick_codebooks):
    """Keys far outside the calibrated range: as they were, in 16 bits, or at the end of the range
    with rho 0."""
    calibration = calibrated[0][recipe]
    cache = kvquant.kvquant_cache(calibration, recipe.rho, 2)
    for l, (quantize_K, quantize_V) in enumerate(cache):
        lo, hi = calibration.lo[l].numpy(), calibration.hi[l].numpy()
        K, half = np.float32(hi + 7.3 * (hi - lo))[None], np.float16((hi - lo) / 2)
        last = float(kvquant.codebooks(calibration, 2)[0][l, 0, -1]) * half + np.float16(
            (hi + lo) / 2
        )
        expected = np.float16(K) if recipe.rho else last[None]
        assert np.allclose(quantize_K(torch.tensor(K)).numpy(), expected, rtol=1e-3, atol=1e-3)
        V = torch.zeros(1, 2, 1, 8)
        V[0, 1, 0, 5] = 100.0  # of 16 numbers one at each end is an outlier where rho is a tenth
        _, _, half, outliers = quantize_V.encode(V)
        assert outliers.sum() == (1 if recipe.rho else 0) and half.item() == (
            0 if recipe.rho else 50
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kvquant_on_cuda(planted, calibrated, sequences, dtype):
    """Calibrated and run on the GPU, compiled, against the CPU in fp32."""
    calibrations, windows = calibrated
    model = copy.deepcopy(planted).to("cuda", dtype)
    ours = kvquant.calibrate(model, windows, RECIPES, SITE, quiet=True)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    for recipe in RECIPES:
        for a, b in zip(ours[recipe][:2], calibrations[recipe][:2]):
            assert (a.cpu() - b).norm() <= tolerance * b.norm()
        H = planted.embedding(sequences[0])
        expected, _ = prefill(
            planted,
            H,
            full_precision_cache(planted),
            **preservation(recipe.keep, recipe.N, SITE, H),
        )
        H = H.to("cuda", dtype)
        cache = kvquant.kvquant_cache(ours[recipe], recipe.rho, 4)
        rule = preservation(recipe.keep, recipe.N, SITE, H)
        found, _ = prefill(
            model, H, cache, pre_rope=True, step=kvsink.compiled(kvsink.decoder_block), **rule
        )
        eager, _ = prefill(model, H, cache, pre_rope=True, **rule)
        assert (found.float() - eager.float()).norm() <= 10 * tolerance * eager.float().norm()
        assert (found.float().cpu() - expected).norm() <= 0.2 * expected.norm()


# --------------------------------------------------------------------------------------------------
# Its file


def test_calibrations_are_kept_in_a_file_with_what_they_depend_on(
    calibrated, tmp_path, quick_codebooks
):
    calibrations, _ = calibrated
    path, settings = (
        tmp_path / "some" / "file.safetensors",
        {"windows": 2, "weights": "abc", "site": [2, 5]},
    )
    kvquant.save_calibrations(path, settings, calibrations)
    loaded = kvquant.load_calibrations(path, settings, RECIPES[:2], "cpu")
    assert list(loaded) == RECIPES[:2]
    for recipe in RECIPES[:2]:
        assert all(torch.equal(a, b) for a, b in zip(loaded[recipe], calibrations[recipe]))
    tensors = load_file(path)
    signposts = tensors["kvsink-2-0.1.signposts.3"]
    assert torch.equal(
        signposts, kvquant.codebooks(calibrations[RECIPES[3]], 3)[0]
    ) and signposts.shape == (6, 2, 8)
    for change, words in (
        ({"windows": 4}, "windows 2, not 4"),
        ({"weights": "b"}, "weights abc"),
        ({"new": 1}, "new None"),
    ):
        with pytest.raises(ValueError, match=words):
            kvquant.load_calibrations(path, {**settings, **change}, RECIPES, "cpu")
    with pytest.raises(ValueError, match="it has no pfn-7-0.0"):
        kvquant.load_calibrations(path, settings, [kvquant.Recipe("pfn", 7, 0.0)], "cpu")
    kvquant.load_calibrations(
        path, {**settings, "site": None}, RECIPES[:2], "cpu"
    )  # PFN does not depend on it
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="file.safetensors.*delete it"):
        kvquant.load_calibrations(path, settings, RECIPES, "cpu")


@pytest.mark.parametrize("name", ["pfn-3-0.0.lo", "kvsink-2-0.1.fisher", "pfn-3-0.1.signposts.4"])
def test_a_file_with_another_number_is_refused(calibrated, tmp_path, no_codebooks, name):
    """One bit of any tensor, also of one that these recipes do not need; a file without its
    SHA-256; one cut short."""
    path = tmp_path / "file.safetensors"
    kvquant.save_calibrations(path, {"windows": 2}, calibrated[0])
    content, tensors = path.read_bytes(), load_file(path)
    X = tensors[name].numpy().tobytes()
    at = content.index(X) + len(X) // 2
    for damaged in (content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="file.safetensors.*delete it"):
            kvquant.load_calibrations(path, {"windows": 2}, RECIPES[:1], "cpu")
    save_file(tensors, path, metadata={"settings": '{"windows": 2}'})
    with pytest.raises(ValueError, match="SHA-256"):
        kvquant.load_calibrations(path, {"windows": 2}, RECIPES[:1], "cpu")


MADE_WITH = kvquant.MadeWith(
    weights="abc", text="wiki-sample", windows=2, tokens=40, seed=0, dtype="float32"
)


@pytest.fixture
def ask(tiny, tmp_path, monkeypatch, sample_calibration, no_codebooks):
    """The tiny model's calibrations, in an empty cache of ours or in a file; some of MADE_WITH may
    be another."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    model, tokenizer = Llama.from_pretrained(tiny[1]), Tokenizer.from_pretrained(tiny[1])

    def calibrations(recipes=RECIPES[2:3], site=SITE, path=None, **other):
        made_with = dataclasses.replace(MADE_WITH, **other)
        return kvquant.calibrations(model, tokenizer, recipes, site, made_with, path)

    return calibrations


def test_calibrations_are_made_once_for_the_same_settings(ask, tmp_path, monkeypatch, capsys):
    def files():
        return len(list(tmp_path.glob("cache/kvquant/*.safetensors")))

    first = ask()[RECIPES[2]]
    assert (
        "calibrating KVQuant on 2 windows of 40 tokens" in capsys.readouterr().err and files() == 1
    )
    others = [
        {"seed": 1},
        {"windows": 3},
        {"tokens": 39},
        {"weights": "b"},
        {"dtype": "b"},
        {"site": Site(3, 5)},
    ]
    for count, other in enumerate([*others, {"recipes": RECIPES}], start=2):
        ask(**other)
        assert files() == count, other
    monkeypatch.setattr(kvquant, "calibrate", None)
    capsys.readouterr()
    again = ask(recipes=RECIPES[2:3] * 2)[RECIPES[2]]
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not capsys.readouterr().err


def test_a_damaged_calibration_of_our_cache_is_made_again_and_a_named_one_refused(
    ask, tmp_path, capsys
):
    mine, first = tmp_path / "mine.safetensors", ask()[RECIPES[2]]
    ask(path=mine)
    (ours,) = tmp_path.glob("cache/kvquant/*.safetensors")
    for path in (mine, ours):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    damaged = mine.read_bytes()
    capsys.readouterr()
    again = ask()[RECIPES[2]]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert ours.name in capsys.readouterr().err.splitlines()[0] and ours.read_bytes() == content
    with pytest.raises(ValueError, match="mine.safetensors.*SHA-256"):
        ask(path=mine)
    assert mine.read_bytes() == damaged


def test_gradients_reach_keys_and_values(tmp_path):
    """What the Fisher information of KVQuant needs: the gradient of the loss at every K and V, here
    of a block's."""
    model = Llama.from_pretrained(write_model(tmp_path, SMALL))
    tokens, seen = torch.tensor(np.random.RandomState(1).randint(0, 97, (1, 12))), []

    def keep(module, inputs, output):
        seen.append(output.requires_grad_())

    hooks = [
        linear.register_forward_hook(keep)
        for block in model.blocks
        for linear in (block.W_k, block.W_v)
    ]
    with torch.enable_grad():
        logits = model(tokens)
        loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
        gradients = torch.autograd.grad(loss, seen)
    for hook in hooks:
        hook.remove()
    assert len(gradients) == 6 and all(g.abs().max() > 1e-6 for g in gradients)
    # A finite difference at one number of the last block's V.
    step, at = 1e-2, (0, 3, 5)

    def shifted(by):
        def add(module, inputs, output):
            output[at] += by

        hook = model.blocks[-1].W_v.register_forward_hook(add)
        loss = F.cross_entropy(model(tokens)[0, :-1].double(), tokens[0, 1:])
        hook.remove()
        return loss

    difference = (shifted(step) - shifted(-step)) / (2 * step)
    assert gradients[-1][at].item() == pytest.approx(difference.item(), rel=1e-2, abs=1e-6)
