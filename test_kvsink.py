"""The tests of the four core files and of the default model, in the order of the paper: Section 2
(the transformer), Appendix C (Equations 10-13), Appendix G (Algorithm 1, calibration), Appendix D
(Table 3, the finder), Section 5 (perplexity). What is about support/, paper/, beyond/ and course/
is in tests/.

Every formula is held against something independent: a few lines of NumPy in float64, an example
worked by hand, or numbers that another implementation printed (each says which). The default model
is fetched once; its tests skip, saying so, where there is no network.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval_ppl
import kvsink
import quant
from kvsink import AUTO, Rule, Site, full_precision_quantizers, pfn, prefill
from llama import Llama, LlamaConfig, RMSNorm, apply_rope, attention, rope_table
from quant import Quantizer
from support import evaluate, hub, text
from support.machine import Machine, has_compiler
from support.rows import FULL_PRECISION, Row, options_of, rule_of
from support.tokenizer import Tokenizer
from tests.fixtures import *  # noqa: F403
from tests.helpers import (
    CHANNEL,
    EMERGENCE,
    FAMILIES,
    LLAMA31_ROPE,
    PLANTED,
    REFERENCE,
    SITE,
    SMALL,
    STRONG,
    calibrate,
    default_results,
    ordinary_tokens,
    perplexities,
    quantizers_for,
    results_of,
    write_model,
    write_weights,
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
# Section 2: the transformer

# Logits of the transformers package (5.23.0, fp32) for the weights of `write_model` and the tokens
# below: of sequence and token (0, 3), (0, 50), (1, 70), (1, 99) those of the vocabulary's 0, 41 and
# 96.
GOLDEN = {
    "llama2-mha": [-0.54516, -0.4232, -0.52108, 0.33692, 0.52123, 0.43235, -0.76152, 0.04591,
        -0.3704, -0.74062, -0.73239, -1.294],
    "llama2-gqa": [0.12231, 0.50431, 0.62561, -0.43123, -0.54595, 0.0589, 0.04128, -2.00896,
        -0.43138, 0.59327, -0.33802, 0.50021],
    "llama3": [0.15639, -0.60385, 0.31031, 0.52411, -1.02354, 0.77473, 0.86473, 0.09561, -0.36945,
        1.20313, 0.50739, -1.35994],
    "llama3.1": [0.12904, 0.49626, 0.63109, -0.53639, -0.72211, 0.22603, 0.07068, -2.45648,
        -0.78793, 0.3275, -0.86388, 0.30683],
    "llama3.2-tied": [0.28845, -0.18586, 0.57973, -0.40443, 0.90222, 0.47161, -0.86342, -0.06388,
        0.58952, -1.23296, 0.70068, 0.0361],
    "linear": [-0.64514, -0.43968, -0.50094, 0.2294, 0.36005, 0.33909, -0.84517, 0.14226, -0.35059,
        -0.90029, -0.72504, -1.22333],
    "mistral": [0.12231, 0.50431, 0.62561, 0.73236, -0.18087, -0.136, 1.00822, -0.09213, 0.77551,
        -0.41028, -1.28478, -0.48398],
}  # fmt: skip
GOLDEN_TOKENS = torch.tensor(np.random.RandomState(1).randint(0, 97, (2, 100)))


def golden_logits(logits):
    return logits[[0, 0, 1, 1], [3, 50, 70, 99]][:, [0, 41, 96]].flatten().float()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tmp_path):
    write_model(tmp_path, {**SMALL, **FAMILIES[family]})
    logits = Llama.from_pretrained(tmp_path)(GOLDEN_TOKENS)
    assert logits.shape == (2, 100, 97)
    torch.testing.assert_close(
        golden_logits(logits), torch.tensor(GOLDEN[family]), rtol=1e-4, atol=2e-5
    )
    low = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)(GOLDEN_TOKENS)
    assert low.dtype == torch.bfloat16
    assert (low - logits).norm() < 2e-2 * logits.norm()


def test_shards_give_the_same_model_as_one_file(tmp_path):
    one = Llama.from_pretrained(write_model(tmp_path / "one", SMALL))
    many = Llama.from_pretrained(write_model(tmp_path / "many", SMALL, shards=4))
    assert torch.equal(one(GOLDEN_TOKENS), many(GOLDEN_TOKENS))


def test_rope_parameters_of_newer_files_mean_the_same():
    old = LlamaConfig.from_dict({**SMALL, "rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE})
    assert old == LlamaConfig.from_dict(
        {**SMALL, "rope_parameters": {**LLAMA31_ROPE, "rope_theta": 5e5}}
    )


@pytest.mark.parametrize("window", [None, 4, 8])
def test_attention_against_numpy(window):
    """Eq. 3 written out in float64: every query of every head by itself, over the keys that it may
    see."""
    draw = np.random.RandomState(0)
    Q = draw.randn(2, 4, 9, 8)
    K = draw.randn(2, 2, 9, 8)
    V = draw.randn(2, 2, 9, 8)
    expected = np.zeros((2, 9, 4, 8))
    for b, h, t in np.ndindex(2, 4, 9):
        seen = slice(max(0, t - window + 1) if window else 0, t + 1)
        p = np.exp(K[b, h // 2, seen] @ Q[b, h, t] / np.sqrt(8))
        expected[b, t, h] = p / p.sum() @ V[b, h // 2, seen]
    A = attention(*(torch.tensor(X) for X in (Q, K, V)), sliding_window=window)
    np.testing.assert_allclose(A.numpy(), expected.reshape(2, 9, 32), rtol=1e-12)


def test_rope_turns_pairs_of_channels():
    """RoPE as it is defined: channels i and i + d_k/2 as one complex number, times exp(1j *
    position * frequency)."""
    config = LlamaConfig.from_dict({**SMALL, "head_dim": 8})
    X = np.random.RandomState(0).randn(1, 2, 50, 8)
    pairs = X[..., :4] + 1j * X[..., 4:]
    turned = pairs * np.exp(1j * np.outer(np.arange(50), 10000.0 ** -(np.arange(4) / 4)))
    out = apply_rope(torch.tensor(X, dtype=torch.float32), rope_table(config, 50, "cpu")).numpy()
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


def test_massive_numbers_are_handled_in_fp32():
    """A sink's 2e4, whose square fp16 cannot hold, through RMSNorm; and RoPE's angles, which bf16
    would blur."""
    H = np.random.RandomState(0).randn(1, 3, 64).astype(np.float16)
    H[0, 1, 5] = 2e4
    X = H.astype(np.float64)
    norm = RMSNorm(64, 1e-5).half()
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        norm(torch.tensor(H)).double().numpy(), expected, rtol=2e-3, atol=1e-6
    )
    rope = rope_table(LlamaConfig.from_dict(SMALL), 500, "cpu")
    Q = torch.randn(1, 1, 500, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(apply_rope(Q, rope), apply_rope(Q.float(), rope).bfloat16())


def test_a_batch_equals_its_sequences_one_by_one(tmp_path):
    model = Llama.from_pretrained(write_model(tmp_path, {**SMALL, **FAMILIES["mistral"]}))
    batch = model(GOLDEN_TOKENS)
    for tokens, logits in zip(GOLDEN_TOKENS, batch):
        torch.testing.assert_close(model(tokens[None])[0], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change, words", [
    ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "not a number"),
    ({"vocab_size": 97.0}, "vocab_size is 97.0"),
    ({"num_attention_heads": 0}, "is 0"),
    ({"num_key_value_heads": 3}, "do not fit"),
    ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    ({"rope_scaling": {"rope_type": []}}, "rope type"),
    ({"rms_norm_eps": "x"}, "'x'"),
    ({**FAMILIES["mistral"], "sliding_window": "x"}, "sliding_window is 'x'"),
    ({**FAMILIES["mistral"], "sliding_window": -4}, "sliding_window is -4"),
    ({"rope_scaling": {"type": "linear", "factor": "x"}}, "x"),
])  # fmt: skip
def test_configurations_that_are_refused_by_name(change, words):
    raw = {key: value for key, value in {**SMALL, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_dict(raw)


def test_what_a_configuration_leaves_out_is_what_transformers_assumes():
    """The defaults of its LlamaConfig and MistralConfig; a LLaMA never has a window, whatever its
    file says."""
    shape = {
        key: SMALL[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    shape["num_attention_heads"] = 16
    llama = LlamaConfig.from_dict(
        {"model_type": "llama", **shape, "sliding_window": 16, "max_sequence_length": 99}
    )
    assert (llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings) == (
        16,
        4,
        2048,
    )
    assert (llama.rms_norm_eps, llama.rope_theta, llama.rope_type) == (1e-6, 10000.0, "default")
    assert (llama.sliding_window, llama.tie_word_embeddings) == (None, False)
    mistral = LlamaConfig.from_dict({"model_type": "mistral", **shape})
    assert (
        mistral.num_key_value_heads,
        mistral.max_position_embeddings,
        mistral.sliding_window,
    ) == (8, 131072, 4096)
    assert (
        LlamaConfig.from_dict(
            {"model_type": "mistral", **shape, "sliding_window": None}
        ).sliding_window
        is None
    )


KEY = "model.layers.1.mlp.up_proj.weight"


def damage_missing(directory, weights):
    del weights[KEY]
    write_weights(directory, weights)


def damage_unexpected(directory, weights):
    write_weights(directory, {**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})


def damage_shape(directory, weights):
    write_weights(directory, {**weights, KEY: torch.zeros(112, 63)})


def damage_dtype(directory, weights):
    write_weights(directory, {**weights, KEY: torch.zeros(112, 64, dtype=torch.int8)})


def damage_truncated(directory, weights):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def damage_garbage(directory, weights):
    (directory / "model.safetensors").write_bytes(b"not a safetensors file at all")


def damage_no_weights(directory, weights):
    (directory / "model.safetensors").unlink()


def damage_shard(directory, weights):
    damage_no_weights(directory, weights)
    write_weights(directory, weights, shards=3)
    (directory / "model-00001.safetensors").unlink()


def damage_index(directory, weights):
    damage_no_weights(directory, weights)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def damage_shard_contents(directory, weights):
    damage_no_weights(directory, weights)
    write_weights(directory, weights, shards=3)
    save_file({}, directory / "model-00002.safetensors")


@pytest.mark.parametrize("damage, words", [
    (damage_missing, [KEY, "missing"]),
    (damage_unexpected, ["q_proj.bias", "unexpected"]),
    (damage_shape, ["model.safetensors", KEY, "(112, 63)", "(112, 64)"]),
    (damage_dtype, ["model.safetensors", KEY, "I8"]),
    (damage_truncated, ["model.safetensors", "not a whole"]),
    (damage_garbage, ["model.safetensors", "not a whole"]),
    (damage_no_weights, ["no model.safetensors"]),
    (damage_shard, ["model-00001.safetensors", "not there"]),
    (damage_index, ["index.json"]),
    (damage_shard_contents, ["model-00002.safetensors", "missing"]),
])  # fmt: skip
def test_damaged_checkpoints_are_named(damage, words, tmp_path):
    write_model(tmp_path, SMALL)
    damage(tmp_path, load_file(tmp_path / "model.safetensors"))
    with pytest.raises((ValueError, OSError)) as error:
        Llama.from_pretrained(tmp_path)
    assert all(word in str(error.value) for word in [*words, str(tmp_path)]), error.value


def test_frequencies_and_a_second_embedding_in_a_checkpoint_are_no_error(tmp_path):
    """Old LLaMA-2 files hold rotary_emb.inv_freq, some tied ones lm_head.weight."""
    write_model(tmp_path, {**SMALL, "tie_word_embeddings": True})
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    write_weights(tmp_path, weights)
    model = Llama.from_pretrained(tmp_path)
    assert model.W_vocab.weight is model.embedding.weight


def test_of_two_copies_of_weights_the_one_is_read_that_transformers_reads(tmp_path):
    """model.safetensors goes before an index beside it; a stored output layer that differs is used,
    tied or not; shards may lie in a subfolder of the model's directory and nowhere else."""
    new = write_model(tmp_path / "new", SMALL)
    old = write_model(tmp_path / "old", SMALL, shards=2, seed=1)
    expected = Llama.from_pretrained(new)(GOLDEN_TOKENS)
    for shard in old.glob("model-*"):
        shard.rename(new / shard.name)
    index = (old / "model.safetensors.index.json").read_text()
    (new / "model.safetensors.index.json").write_text(index)
    assert torch.equal(Llama.from_pretrained(new)(GOLDEN_TOKENS), expected)
    tied = write_model(tmp_path / "tied", {**SMALL, "tie_word_embeddings": True})
    weights = load_file(tied / "model.safetensors")
    weights["lm_head.weight"] = 2 * weights["model.embed_tokens.weight"]
    write_weights(tied, weights)
    model = Llama.from_pretrained(tied)
    assert torch.equal(model.W_vocab.weight, 2 * model.embedding.weight)
    (new / "model.safetensors").unlink()
    (new / "deep").mkdir()
    for shard in new.glob("model-*"):
        shard.rename(new / "deep" / shard.name)
    (new / "model.safetensors.index.json").write_text(index.replace("model-0", "deep/model-0"))
    assert not torch.equal(Llama.from_pretrained(new)(GOLDEN_TOKENS), expected)
    (new / "model.safetensors.index.json").write_text(index.replace("model-0", "../old/model-0"))
    with pytest.raises(ValueError, match="outside the model's directory"):
        Llama.from_pretrained(new)


# --------------------------------------------------------------------------------------------------
# Appendix C: Equations 10 to 13


def test_equations_by_hand():
    """X = (-1, 0, 0.4, 2), n = 2: scale = 3/3, zero = 1, codes (0, 1, 1, 3), X' = (-1, 0, 0, 2)."""
    X = torch.tensor([-1, 0, 0.4, 2])
    lo = torch.tensor(-1.0)
    hi = torch.tensor(2.0)
    s = quant.scale(lo, hi, 2)
    z = quant.zero(lo, s)
    codes = quant.quantize(X, s, z, 2)
    assert (s, z, codes.tolist(), codes.dtype) == (1, 1, [0, 1, 1, 3], torch.uint8)
    assert quant.dequantize(codes, s, z).tolist() == [-1, 0, 0, 2]


def test_zero_is_not_clamped():
    """X = (10, 10.5, 11.5), n = 1: scale = 1.5, zero = -round(6.67) = -7, codes (0, 0, 1), X' =
    (10.5, 10.5, 12)."""
    X = torch.tensor([10, 10.5, 11.5])
    lo = torch.tensor(10.0)
    hi = torch.tensor(11.5)
    s = quant.scale(lo, hi, 1)
    z = quant.zero(lo, s)
    codes = quant.quantize(X, s, z, 1)
    assert (s, z, codes.tolist()) == (1.5, -7, [0, 0, 1])
    assert quant.dequantize(codes, s, z).tolist() == [10.5, 10.5, 12]


def test_halves_are_rounded_to_even():
    one = torch.tensor(1.0)
    zero = torch.tensor(0.0)
    assert quant.quantize(torch.tensor([0.5, 1.5, 2.5, 3.5]), one, zero, 3).tolist() == [0, 2, 2, 4]
    assert quant.zero(torch.tensor([-0.5, -1.5, -2.5]), one).tolist() == [0, 2, 2]


@pytest.mark.parametrize("x", [3.7, -0.123456, 0.0, 1e-30, -60000.0])
@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_constant_groups_come_back_exactly(x, granularity):
    X = torch.full((1, 2, 5, 8), x)
    assert torch.equal(Quantizer(2, granularity, 4)(X), X)


def groups_numpy(n, d, granularity, g):
    """The indices (rows, columns) of every group: Figure 10 as a plain loop."""
    if granularity == "token":
        g = min(g or d, d)
        return [(slice(i, i + 1), slice(j, j + g)) for i in range(n) for j in range(0, d, g)]
    g = min(g or n, n)
    columns = [slice(0, d)] if granularity == "tensor" else [slice(j, j + 1) for j in range(d)]
    return [(slice(i, i + g), column) for i in range(0, n, g) for column in columns]


def rtn_numpy(X, bits, groups):
    """Equations 10-13 in float64, group by group. Also a scale for every number, and whether it
    lies so near a rounding edge that fp32 may fall on the other side."""
    X_ = np.zeros_like(X)
    S = np.zeros_like(X)
    edge = np.zeros(X.shape, dtype=bool)
    for at in groups:
        x = X[at]
        s = (x.max() - x.min()) / (2**bits - 1)
        if s == 0:
            s = abs(x.max()) or 1.0
        z = -np.round(x.min() / s)
        X_[at] = s * (np.clip(np.round(x / s) + z, 0, 2**bits - 1) - z)
        S[at] = s
        near = np.abs(np.abs(x / s - np.floor(x / s)) - 0.5) < 1e-6 * max(1, np.abs(x / s).max())
        edge[at] = (
            near | near[x == x.min()].any()
        )  # the minimum decides `zero`, and so the whole group
    return X_, S, edge


INPUTS = {
    "normal": lambda draw, shape: draw.randn(*shape),
    "positive": lambda draw, shape: 5 + draw.rand(*shape),
    "negative": lambda draw, shape: -3 - 100 * draw.rand(*shape),
    "one constant channel": lambda draw,
    shape: np.where(np.arange(shape[-1]) == 3, 2.5, draw.randn(*shape)),
    "a sink": lambda draw,
    shape: draw.randn(*shape) * np.where(np.arange(shape[-2]) == 1, 1000, 1)[:, None],
}  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("group_size", [None, 4, 16, 128])
@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_quantizer_against_numpy(granularity, group_size, n, kind):
    X = np.float32(INPUTS[kind](np.random.RandomState(n), (2, 3, n, 32)))
    for bits in range(1, 9):
        out = Quantizer(bits, granularity, group_size)(torch.tensor(X)).numpy()
        for b, h in np.ndindex(2, 3):
            groups = groups_numpy(n, 32, granularity, group_size)
            expected, step, edge = rtn_numpy(X[b, h].astype(np.float64), bits, groups)
            error = np.abs(out[b, h] - expected)
            assert (error[~edge] <= 1e-5 * np.abs(expected[~edge]) + 1e-5 * step[~edge]).all()
            assert (error <= 1.001 * step + 1e-5 * np.abs(expected)).all() and edge.mean() < 0.1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_low_precision_inputs_are_computed_in_fp32(granularity, dtype, tolerance):
    X = torch.tensor(INPUTS["a sink"](np.random.RandomState(0), (1, 2, 20, 32))).to(dtype)
    out = Quantizer(4, granularity, 8)(X)
    expected = Quantizer(4, granularity, 8)(X.float())
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_non_contiguous_inputs(granularity):
    X = torch.randn(2, 16, 3, 64).transpose(1, 2)[..., ::2]
    quantizer = Quantizer(3, granularity, 4)
    assert not X.is_contiguous() and torch.equal(quantizer(X), quantizer(X.contiguous()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("static", [False, True])
def test_nan_and_inf_come_back_as_nan_and_do_not_calibrate(bad, static):
    X = torch.randn(1, 1, 4, 8)
    quantizer = Quantizer(4, "token", static=static)
    if static:
        quantizer.calibrate(X)
    X[0, 0, 2, 3] = bad
    assert torch.isnan(quantizer(X)[0, 0, 2, 3]) and torch.isfinite(quantizer(X)[0, 0, :2]).all()
    with pytest.raises(ValueError, match="NaN or inf"):
        quantizer.calibrate(X)


@pytest.mark.parametrize("arguments, words", [
    ((0, "token"), "0 bits"), ((9, "token"), "9 bits"), ((4, "row"), "row"),
    ((4, "token", 3), "does not divide"),
    ((4, "token", None, True), "calibrate"), ((4, "token", 0), "group size 0"),
    ((4, "channel", -4), "group size -4"),
])  # fmt: skip
def test_quantizers_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Quantizer(*arguments)(torch.randn(1, 1, 4, 8))


def test_tokens_left_out_do_not_widen_a_dynamic_channel_group():
    X = torch.tensor([0.0, 1.0, 1000.0, 3.0]).view(1, 1, 4, 1)
    left_out = torch.tensor([False, False, True, False]).view(1, 1, 4, 1)
    assert Quantizer(2, "channel")(X, left_out)[..., :2, 0].flatten().tolist() == [
        0,
        1,
    ]  # scale 3/3, not 1000/3
    everything = Quantizer(2, "channel")(X, torch.ones_like(left_out))
    assert torch.isfinite(everything).all()


def test_static_ranges_by_hand():
    """Two tensors of one head, two tokens, two channels; then a token left out. Ranges are global
    minima and maxima."""
    first = torch.tensor([[0.0, 10.0], [2.0, 12.0]]).view(1, 1, 2, 2)
    second = torch.tensor([[-1.0, 11.0], [50.0, 99.0]]).view(1, 1, 2, 2)
    second_is_a_sink = torch.tensor([False, True]).view(1, 1, 2, 1)

    def ranges(granularity, group_size, left_out):
        quantizer = Quantizer(2, granularity, group_size, static=True)
        quantizer.calibrate(first)
        quantizer.calibrate(second, left_out)
        return quantizer.lo.flatten().tolist(), quantizer.hi.flatten().tolist()

    assert ranges("channel", 16, None) == ([-1, 10], [50, 99])
    assert ranges("channel", 16, second_is_a_sink) == ([-1, 10], [2, 12])
    assert ranges("token", 2, None) == ([-1], [99])
    assert ranges("token", 2, second_is_a_sink) == ([-1], [12])
    assert ranges("token", 1, second_is_a_sink) == ([-1, 10], [2, 12])
    assert ranges("tensor", None, second_is_a_sink) == ([-1], [12])


@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_static_quantization_against_numpy(granularity):
    """Calibrated on batches of different lengths with masks, applied to others: float64, ranges by
    a loop."""
    draw = np.random.RandomState(0)
    quantizer = Quantizer(3, granularity, 4, static=True)
    seen = []  # (h, tokens, d) of what counts
    for n in (5, 12):
        X = draw.randn(2, 3, n, 8).astype(np.float32)
        left_out = draw.rand(2, n) < 0.3
        quantizer.calibrate(torch.tensor(X), torch.tensor(left_out)[:, None, :, None])
        seen += [X[b][:, ~left_out[b]] for b in range(2)]
    seen = np.concatenate(seen, axis=1).astype(np.float64)
    X = draw.randn(2, 3, 7, 8).astype(np.float32) * 1.5
    out = quantizer(torch.tensor(X)).numpy()
    for h, j in np.ndindex(3, 8):
        channels = {
            "token": slice(j // 4 * 4, j // 4 * 4 + 4),
            "channel": slice(j, j + 1),
            "tensor": slice(0, 8),
        }
        calibration = seen[h][:, channels[granularity]]
        s = (calibration.max() - calibration.min()) / 7
        z = -np.round(calibration.min() / s)
        expected = s * (np.clip(np.round(X[:, h, :, j].astype(np.float64) / s) + z, 0, 7) - z)
        np.testing.assert_allclose(out[:, h, :, j], expected, rtol=1e-5, atol=1e-6)


def test_clipped_ranges_against_numpy():
    X = np.random.RandomState(0).randn(1, 1, 40, 8).astype(np.float32)
    lo, hi = quant.clipped_range(torch.tensor(X), "channel", quantile=0.9)
    np.testing.assert_allclose(lo.flatten(), np.quantile(X[0, 0], 0.1, axis=0), rtol=1e-5)
    np.testing.assert_allclose(hi.flatten(), np.quantile(X[0, 0], 0.9, axis=0), rtol=1e-5)
    left_out = torch.arange(40).view(1, 1, 40, 1) < 10
    lo, hi = quant.clipped_range(torch.tensor(X), "token", 4, (-3,), left_out, quantile=0.95)
    np.testing.assert_allclose(
        hi.flatten(), [np.quantile(X[0, 0, 10:, j : j + 4], 0.95) for j in (0, 4)], rtol=1e-5
    )
    ragged = torch.tensor([0.0, 1, 2, 3, 10, 20]).view(1, 1, 6, 1)
    assert quant.clipped_range(ragged, "channel", 4, quantile=0.75)[1].flatten().tolist() == [
        2.25,
        17.5,
    ]
    lo, hi = quant.clipped_range(torch.tensor([[[[-2.0, 0, 6]]]]), "token", ratio=0.5)
    assert (lo.item(), hi.item()) == (0, 4)  # half of the range of 8, about its middle 2
    quantizer = Quantizer(4, "token", static=True, ratio=0.5)
    quantizer.calibrate(
        torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    )  # all of it is left out
    quantizer.calibrate(torch.tensor([[[[-2.0, 0, 6]]]]))
    assert (quantizer.lo.item(), quantizer.hi.item()) == (0, 4)


# --------------------------------------------------------------------------------------------------
# Algorithm 1, on a tiny LLaMA whose weights plant stable outliers (tests/helpers.py)

TABLE_SCHEMES = list(kvsink.SCHEMES)
STEPS = {"post": kvsink.decoder_block, "pre": kvsink.decoder_block_pre_rope}


def test_the_planted_outliers_are_where_the_description_says(planted, sequences):
    tokens, S_sink = sequences
    hidden = []
    hooks = []
    for block in planted.blocks:
        hooks.append(
            block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        )
    planted(tokens)
    for hook in hooks:
        hook.remove()
    for l, H in enumerate(hidden, start=1):
        at_sinks = H[:, :, CHANNEL].abs()[S_sink]
        elsewhere = H[:, :, CHANNEL].abs()[~S_sink]
        assert elsewhere.max() == 0
        assert at_sinks.min() > 1000 if l >= EMERGENCE else at_sinks.max() == 0


def test_full_precision_prefill_is_the_model(planted, sequences):
    tokens, _ = sequences
    H, S_sink = prefill(planted, planted.embedding(tokens), full_precision_quantizers(planted))
    assert torch.equal(planted.logits(H), planted(tokens)) and not S_sink.any()


@pytest.mark.parametrize(
    "keep, k", [("kvsink", 2), ("kvsink", "auto"), ("pfn+kvsink", 2), ("pfn+kvsink", "auto")]
)
@pytest.mark.parametrize("rope", ["post", "pre"])
@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_sinks_are_predicted_for_each_sequence_and_kept_bit_for_bit(
    planted, sequences, scheme, rope, keep, k
):
    """Lines 4-16: which tokens are left out block by block, and what becomes of their Keys and
    Values."""
    tokens, expected = sequences
    rule = rule_of(keep, k).with_site(SITE)
    quantizers = quantizers_for(planted, scheme, 2, tokens, rule, STEPS[rope])
    seen = []

    def watch(quantize):  # what goes into lines 8 and 9
        def watched(X, leave_out):
            seen.append((X, leave_out))
            return quantize(X, leave_out)

        return watched

    attended = []

    def watch_attention(Q, K, V, window):  # what comes out of them: Keys after RoPE
        attended.append((K, V))
        return attention(Q, K, V, window)

    watched = [(watch(K), watch(V)) for K, V in quantizers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvsink, "attention", watch_attention)
        H = planted.embedding(tokens)
        _, S_sink = prefill(planted, H, watched, step=STEPS[rope], **rule.prefill_arguments(H))
    assert torch.equal(S_sink, expected)
    table = rope_table(planted.config, 24, "cpu")
    before = torch.zeros(2, 24, dtype=torch.bool)
    before[:, 0] = keep == "pfn+kvsink"  # token 0, up to l_E
    for l in range(1, 7):
        K, left_out = seen[2 * l - 2]
        V, left_out_V = seen[2 * l - 1]
        empty_or_sinks = (expected if l > EMERGENCE else before)[:, None, :, None]
        assert torch.equal(left_out, empty_or_sinks) and torch.equal(left_out_V, empty_or_sinks), (
            f"block {l}"
        )
        K_quant, V_quant = attended[l - 1]
        K = apply_rope(K, table) if rope == "pre" else K
        kept = empty_or_sinks.expand_as(K)
        assert torch.equal(K_quant[kept], K[kept]) and torch.equal(V_quant[kept], V[kept])
        assert (K_quant[~kept] != K[~kept]).float().mean() > 0.9 and (
            V_quant[~kept] != V[~kept]
        ).float().mean() > 0.5


def test_keys_are_quantized_after_rope_or_before_it(planted, sequences):
    """The input of line 8, against the output of W_k."""
    table = rope_table(planted.config, 24, "cpu")
    projected = []
    hook = planted.blocks[0].W_k.register_forward_hook(
        lambda module, inputs, output: projected.append(output)
    )
    for rope, step in STEPS.items():
        seen = []
        quantizers = [(lambda X, _, seen=seen: seen.append(X) or X, kvsink.unquantized)] * 6
        prefill(planted, planted.embedding(sequences[0]), quantizers, step=step)
        K = projected.pop().unflatten(-1, (2, 8)).transpose(1, 2)
        assert torch.equal(seen[0], K if rope == "pre" else apply_rope(K, table))
    hook.remove()


def test_sinks_are_predicted_once(planted, sequences):
    """Line 14: in block l_E and never again, though a later block makes another token larger in
    that channel."""
    tokens, expected = sequences
    model = copy_of(planted)
    quantizers = full_precision_quantizers(model)

    def step(block, H, *rest):
        H = kvsink.decoder_block(block, H, *rest)
        if block is model.blocks[3]:
            H[:, 0, CHANNEL] = 1e6
        return H

    _, S_sink = prefill(model, model.embedding(tokens), quantizers, *SITE, k=2, step=step)
    assert torch.equal(S_sink, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sliding_window_holds_in_algorithm_1(tmp_path, compiled):
    """A Mistral of two blocks and a window of 4: the last token of 12 sees 6 tokens back, and no
    further."""
    config = {**SMALL, **FAMILIES["mistral"], "sliding_window": 4, "num_hidden_layers": 2}
    model = Llama.from_pretrained(write_model(tmp_path, config))
    step = kvsink.compiled(kvsink.decoder_block) if compiled else kvsink.decoder_block
    if compiled and not has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    tokens = GOLDEN_TOKENS[:1, :12].repeat(2, 1)
    for changed, differs in ((4, False), (5, True)):
        tokens[1] = tokens[0]
        tokens[1, changed] = (tokens[0, changed] + 1) % 97
        H, _ = prefill(model, model.embedding(tokens), full_precision_quantizers(model), step=step)
        assert torch.equal(H[0, -1], H[1, -1]) != differs


def test_no_token_is_kept_up_to_the_emergence_block(planted, sequences):
    """If k = n, every token is kept after l_E, so that what differs from full precision comes from
    blocks 1 to l_E."""
    tokens, _ = sequences
    H = planted.embedding(tokens)
    quantizers = quantizers_for(planted, "token-dynamic", 2, tokens)
    half = [*quantizers[:EMERGENCE], *full_precision_quantizers(planted)[EMERGENCE:]]
    kept, _ = prefill(planted, H, quantizers, *SITE, k=24)
    assert torch.equal(kept, prefill(planted, H, half)[0])
    assert not torch.equal(kept, prefill(planted, H, full_precision_quantizers(planted))[0])


def test_pfn_keeps_the_first_n_tokens_from_the_first_block(planted, sequences):
    tokens, _ = sequences
    H = planted.embedding(tokens)
    assert pfn(H, 3).tolist() == [[True] * 3 + [False] * 21] * 2
    quantizers = quantizers_for(planted, "token-dynamic", 2, tokens)
    everything, S_sink = prefill(planted, H, quantizers, **Rule(first=24).prefill_arguments(H))
    assert torch.equal(everything, prefill(planted, H, full_precision_quantizers(planted))[0])
    assert S_sink.all()
    nothing, S_sink = prefill(planted, H, quantizers, **Rule().prefill_arguments(H))
    assert torch.equal(nothing, prefill(planted, H, quantizers, S_sink=pfn(H, 0))[0])
    assert not S_sink.any()


def test_a_rule_is_its_arguments_its_size_and_its_name():
    """Nothing, PFN-3, KVSink-2, and what is not the paper's, worked by hand."""
    H = torch.zeros(1, 5, 4)
    rules = {
        Rule(): (0, 0, False, "nothing", ("none", 0)),
        Rule(first=3): (3, 3, False, "PFN-3", ("pfn", 3)),
        Rule(k=2): (0, 2, True, "KVSink-2", ("kvsink", 2)),
        Rule(k=AUTO): (0, 20, True, "KVSink-auto", ("kvsink", "auto")),
        Rule(first=1, k=2): (1, 2, True, "PFN-1+KVSink-2", ("pfn+kvsink", 2)),
    }
    for rule, (first, most, predicts, name, options) in rules.items():
        assert (rule.max_kept, rule.predicts, str(rule)) == (most, predicts, name)
        assert rule_of(*options) == rule and options_of(rule) == options
        arguments = rule.with_site(Site(7, 3)).prefill_arguments(H)
        assert arguments.pop("S_sink").tolist() == [[i < first for i in range(5)]]
        l_E, c = (7, 3) if predicts else (0, 0)
        assert arguments == {"l_E": l_E, "c": c, "k": rule.k}
    assert rule_of("kvsink", 0) == rule_of("none", 5) == Rule()
    with pytest.raises(ValueError, match="--sinks auto"):
        rule_of("pfn", AUTO)
    with pytest.raises(ValueError, match="keep 'some'"):
        rule_of("some", 0)


def test_prediction_is_the_top_k_of_one_channel():
    """Lines 15-16 by hand: |H| in channel 1 is 1, 9, 3, 5 and 7, 0, 2, 8; the signs do not
    matter."""
    H = torch.zeros(2, 4, 3)
    H[0, :, 1] = torch.tensor([1.0, -9, 3, 5])
    H[1, :, 1] = torch.tensor([-7.0, 0, 2, -8])
    H[:, 2, 0] = 100.0  # another channel
    assert kvsink.predict_sinks(H, c=1, k=2).tolist() == [
        [False, True, False, True],
        [True, False, False, True],
    ]
    assert kvsink.predict_sinks(H, c=1, k=0).sum() == 0 and kvsink.predict_sinks(H, c=1, k=4).all()


def test_prediction_without_k():
    """Of the largest 20, those that reach a tenth of the largest, worked by hand. If all are alike,
    20 are kept."""
    H = torch.zeros(3, 24, 2)
    H[0, :, 1] = 90.0
    H[0, 5, 1] = -1000.0
    H[0, 9, 1] = 100.0
    H[0, 11, 1] = 99.9
    H[1, :, 1] = 21544.0  # one token again and again
    H[2, :, 1] = torch.linspace(1, 1.5, 24)  # no gap: a model that broke down before l_E
    S_sink = kvsink.predict_sinks(H, c=1, k=AUTO)
    assert S_sink[0].nonzero().flatten().tolist() == [5, 9]
    assert S_sink[1].sum() == 20 and S_sink[2].nonzero().flatten().tolist() == list(range(4, 24))
    assert kvsink.predict_sinks(H[:, :7], c=1, k=AUTO).sum(1).tolist() == [1, 7, 7]


def test_more_sinks_than_tokens_are_refused(planted, sequences):
    with pytest.raises(ValueError, match="cannot keep 25 of 24"):
        prefill(
            planted,
            planted.embedding(sequences[0]),
            full_precision_quantizers(planted),
            *SITE,
            k=25,
        )


@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_sequences_of_a_batch_do_not_touch_each_other(planted, sequences, scheme):
    tokens, _ = sequences
    quantizers = quantizers_for(planted, scheme, 3, tokens, Rule(k=2, site=SITE))
    H, _ = prefill(planted, planted.embedding(tokens), quantizers, *SITE, k=2)
    for b in range(2):
        alone, _ = prefill(planted, planted.embedding(tokens[b : b + 1]), quantizers, *SITE, k=2)
        torch.testing.assert_close(alone[0], H[b], rtol=1e-4, atol=1e-4)


def test_keeping_the_sinks_brings_the_output_nearer(planted, sequences):
    tokens, _ = sequences
    H0 = planted.embedding(tokens)
    exact, _ = prefill(planted, H0, full_precision_quantizers(planted))

    def error(rule):
        quantizers = quantizers_for(planted, "token-static", 4, tokens, rule)
        H, _ = prefill(planted, H0, quantizers, **rule.prefill_arguments(H0))
        return (H - exact).norm().item()

    assert error(Rule(first=24)) == 0 < error(Rule(k=20, site=SITE)) < error(Rule())


# --------------------------------------------------------------------------------------------------
# Calibration: "sink tokens should also be excluded during quantization parameter calibration"
# (Appendix G)


@pytest.mark.parametrize("rope", ["post", "pre"])
@pytest.mark.parametrize("keep", ["none", "pfn", "kvsink", "pfn+kvsink"])
def test_calibration_sees_what_the_rule_does_not_preserve(planted, sequences, keep, rope):
    """Ranges of every block against NumPy on the Keys and Values of the plain model; PFN leaves out
    its tokens in every block, KVSink its own after l_E and none before."""
    tokens, S_sink = sequences
    windows = [tokens[:1], tokens[1:]]
    quantizers = kvsink.rtn_quantizers(planted, "channel-static", bits=4, group_size=4)
    calibrate(planted, windows, [quantizers], rule_of(keep, 2).with_site(SITE), STEPS[rope])
    projected = []
    hooks = []
    for block in planted.blocks:
        for linear in (block.W_k, block.W_v):
            hooks.append(
                linear.register_forward_hook(
                    lambda module, inputs, output: projected.append(output)
                )
            )
    planted(tokens)
    for hook in hooks:
        hook.remove()
    table = rope_table(planted.config, 24, "cpu")
    for l in range(1, 7):
        first_two = torch.arange(24).expand(2, 24) < 2
        left_out = {"none": S_sink & False, "pfn": first_two, "kvsink": S_sink & (l > EMERGENCE)}
        left_out["pfn+kvsink"] = S_sink if l > EMERGENCE else torch.arange(24).expand(2, 24) < 1
        left_out = left_out[keep]
        K, V = (
            X.unflatten(-1, (2, 8)).transpose(1, 2) for X in projected[2 * l - 2 : 2 * l]
        )  # (2, 2, 24, 8)
        K = K if rope == "pre" else apply_rope(K, table)
        K, V = (X.transpose(1, 2)[~left_out].numpy() for X in (K, V))  # (tokens that count, 2, 8)
        K_quantizer, V_quantizer = quantizers[l - 1]
        np.testing.assert_allclose(K_quantizer.lo.view(2, 8), K.min(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(K_quantizer.hi.view(2, 8), K.max(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            V_quantizer.lo.view(2, 2), V.reshape(-1, 2, 2, 4).min((0, 3)), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            V_quantizer.hi.view(2, 2), V.reshape(-1, 2, 2, 4).max((0, 3)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("keep, N", [("none", 0), ("pfn", 3), ("kvsink", 2)])
def test_one_pass_serves_all_schemes_and_widths_and_is_the_full_precision_model(
    planted, sequences, keep, N
):
    tokens = sequences[0]
    H = planted.embedding(sequences[0])
    together = {
        scheme: kvsink.rtn_quantizers(planted, scheme, 4, 8)
        for scheme in ("token-static", "channel-static")
    }
    rule = rule_of(keep, N).with_site(SITE)
    out, _ = prefill(planted, H, kvsink.observers(together.values()), **rule.prefill_arguments(H))
    assert torch.equal(planted.logits(out), planted(tokens))
    for scheme, quantizers in together.items():
        alone = quantizers_for(planted, scheme, 4, tokens, rule)
        for one, other, narrow in zip(quantizers, alone, kvsink.with_bits(quantizers, 2)):
            for a, b, c in zip(one, other, narrow):
                assert torch.equal(a.lo, b.lo) and torch.equal(a.hi, b.hi)
                assert (
                    (a.bits, c.bits) == (4, 2)
                    and torch.equal(c.lo, a.lo)
                    and torch.equal(c.hi, a.hi)
                )


# --------------------------------------------------------------------------------------------------
# Table 3 and the finder (Appendix D)


def test_table_3_as_printed():
    """Typed from the paper: layers, emergence layer, hidden size, channels."""
    assert {name: tuple(row) for name, row in kvsink.TABLE_3.items()} == {
        "llama2-7b": (32, 1, 4096, (2533, 1415)),
        "llama2-13b": (40, 3, 5120, (4743, 2100)),
        "mistral-7b": (32, 1, 4096, (2070, 3398)),
        "llama3-8b": (32, 1, 4096, (788, 1384, 4062)),
        "llama3.1-8b-instruct": (32, 1, 4096, (788, 1384, 4062)),
        "llama3.2-1b": (16, 1, 2048, (400, 698, 2029, 1159)),
        "llama3.2-3b": (28, 1, 3072, (588, 1016, 3046, 1731)),
        "smollm2-135m": (30, 11, 576, (507, 247)),  # the finder's
    }
    die = "A 6-sided die is rolled 15 times and the results are: side 1 comes up 0 times;"
    one = (
        "The following are multiple choice questions (with answers) about machine learning.\n \n "
        + die
    )
    seasons = ["Summer is warm.", "Winter is cold.", "Spring is mild.", "Autumn is crisp."]
    days = ["The sun rises early in the summer.", "The days are short in the winter.", ""]
    assert kvsink.PROMPTS == (one, "\n ".join(seasons + days))


def test_table_3_counts_from_0_and_algorithm_1_from_1():
    """LLaMA2-7B's printed layer 1 is the output of the second block, H^2."""
    assert kvsink.table_site("llama2-7b") == Site(l_E=2, c=2533)
    assert kvsink.table_site("llama2-13b") == Site(l_E=4, c=4743)
    assert kvsink.table_site("llama3.2-1b") == Site(l_E=2, c=400)
    assert kvsink.table_site("smollm2-135m") == Site(l_E=12, c=507)
    for row in kvsink.TABLE_3.values():
        assert row.emergence < row.layers and max(row.channels) < row.hidden_size


def test_the_finder_finds_what_was_planted(planted):
    prompts = [ordinary_tokens(30, 5).tolist(), ordinary_tokens(25, 6).tolist()]
    prompts[0][8] = prompts[1][4] = STRONG
    assert kvsink.find_site(planted, prompts) == SITE
    found = kvsink.stable_outliers(planted, torch.tensor(prompts[:1]))
    assert found.channels == (CHANNEL,) and found.magnitudes[0] > 1000


def test_the_finder_passes_over_a_weaker_emergence(planted):
    """Block 1 too puts an outlier into the channel, four hundred times smaller (in SmolLM2 it is
    forty)."""
    model = copy_of(planted)
    first = model.blocks[0]
    second = model.blocks[1]
    first.LN_ffn.weight[0] = 1.0
    for name in ("W_g", "W_u"):
        getattr(first.FFN, name).weight[3] = getattr(second.FFN, name).weight[3]
    first.FFN.W_d.weight[:, 3] = second.FFN.W_d.weight[:, 3] / 2000
    second.FFN.W_d.weight[:, 3] *= 100
    prompt = ordinary_tokens(30, 5).tolist()
    prompt[8] = STRONG
    H1 = model.blocks[0](
        model.embedding(torch.tensor([prompt])), rope_table(model.config, 30, "cpu")
    )
    assert H1[0, 8, CHANNEL].abs() > kvsink.OUTLIER * H1.abs().median()  # an outlier by itself
    assert kvsink.find_site(model, [prompt]) == SITE


def test_the_finder_names_the_block_of_a_nan(planted):
    model = copy_of(planted)
    model.blocks[3].FFN.W_d.weight[:] = torch.nan
    with pytest.raises(quant.NotFinite, match="block 4 of 6"):
        kvsink.find_site(model, [[1, 2, 3]])
    with pytest.raises(quant.NotFinite, match="block 5 "):
        quantizers_for(model, "token-static", 4, torch.tensor([[1, 2, 3]]))


class Scripted(torch.nn.Module):
    """A model whose hidden states are written down: H^1 to H^L, each (n, d)."""

    def __init__(self, states):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in states)
        self.states = states

    def forward(self, tokens):
        for block, H in zip(self.blocks, self.states):
            block(H[None])


def test_the_thresholds_of_the_finder_and_the_order_of_channels():
    """Magnitudes by hand, the median is 1: an outlier is over 100 and over ten times the median of
    its channel."""
    H = torch.ones(5, 7, 8)

    def found():
        return kvsink.stable_outliers(Scripted(H), torch.zeros(1, 7))

    H[1:, 3, 2] = 99.0
    with pytest.raises(ValueError, match="no stable outliers"):
        found()
    H[1:, :, 6] = 500.0  # every token has it: no outlier
    with pytest.raises(ValueError, match="no stable outliers"):
        found()
    H[1:, 3, 2] = 120.0
    H[1:, 5, 4] = -340.0
    assert found() == (2, (4, 2), (340.0, 120.0))


def test_the_finder_says_when_there_is_nothing_or_no_agreement(planted, tmp_path):
    plain = Llama.from_pretrained(write_model(tmp_path, PLANTED))
    with pytest.raises(ValueError, match="no stable outliers"):
        kvsink.find_site(plain, [list(range(20)), list(range(20, 40))])
    found = iter([kvsink.Outliers(2, (5,), (1e3,)), kvsink.Outliers(3, (5,), (1e3,))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvsink, "stable_outliers", lambda model, tokens: next(found))
        with pytest.raises(ValueError, match="disagree.*block 2.*block 3"):
            kvsink.find_site(planted, [[1], [2]])


# --------------------------------------------------------------------------------------------------
# The hot path: torch.compile and CUDA


def prefill_both_ways(model, tokens, scheme, device, dtype):
    """H^L eager and compiled, and the number of graphs that compiling the L blocks took."""
    tokens = tokens.to(device)
    model = model.to(device, dtype)
    quantizers = kvsink.rtn_quantizers(model, scheme, 4, 8)
    if kvsink.SCHEMES[scheme].static:
        calibrate(model, [tokens], [quantizers], Rule(k=2, site=SITE))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = [
        prefill(model, model.embedding(tokens), quantizers, *SITE, k=2, step=step)
        for step in (kvsink.decoder_block, torch.compile(kvsink.decoder_block))
    ]
    return results, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def copy_of(model):
    twin = Llama(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False)


@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_one_compiled_block_serves_all_and_agrees_with_eager(planted, sequences, scheme):
    if not has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    tokens, expected = sequences
    ((eager, _), (compiled, S_sink)), graphs = prefill_both_ways(
        copy_of(planted), tokens, scheme, "cpu", torch.float32
    )
    assert graphs == 1 and torch.equal(S_sink, expected)
    assert (compiled - eager).norm() < 1e-3 * eager.norm()


def test_compiled_code_does_not_hide_what_is_not_finite(planted, sequences):
    """A static quantizer clamps: inf would come back as an ordinary number."""
    if not has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    quantizer = Quantizer(4, "token", static=True)
    quantizer.calibrate(torch.randn(1, 1, 4, 8))
    X = torch.randn(1, 1, 4, 8)
    X[0, 0, 1, 2] = torch.inf
    assert torch.isnan(torch.compile(lambda X: quantizer(X, None))(X)[0, 0, 1, 2])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_cuda_agrees_with_cpu(planted, sequences, scheme, dtype):
    tokens, expected = sequences
    cpu, _ = prefill_both_ways(copy_of(planted), tokens, scheme, "cpu", torch.float32)
    gpu, graphs = prefill_both_ways(copy_of(planted), tokens, scheme, "cuda", dtype)
    assert graphs == 1
    for H, S_sink in gpu:
        assert torch.equal(S_sink.cpu(), expected)
        assert (H.cpu().float() - cpu[0][0]).norm() < (
            1e-3 if dtype == torch.float32 else 5e-2
        ) * cpu[0][0].norm()


# --------------------------------------------------------------------------------------------------
# Section 5: perplexity


def test_perplexity_against_numpy(tiny, tmp_path, capsys):
    """exp of the mean over the n - 1 predicted tokens of every whole window, from the model's
    logits, in float64."""
    out = tmp_path / "out.json"
    row = f"--scheme token-dynamic --keep none --bits 4 --json {out}".split()
    assert eval_ppl.main([*tiny, *row]) == 0
    full, quantized = results_of(out)
    tokens = np.frombuffer(Path(tiny[3]).read_bytes(), np.uint8)[: 31 * 64].reshape(31, 64)
    model = Llama.from_pretrained(tiny[1])
    logits = model(torch.tensor(tokens.astype(np.int64))).double().numpy()
    p = np.exp(logits[:, :-1])
    p = np.take_along_axis(p, tokens[:, 1:, None].astype(np.int64), -1)[..., 0] / p.sum(-1)
    assert full["windows"] == 31 and full["ppl"] == pytest.approx(
        np.exp(-np.log(p).mean()), rel=1e-5
    )
    assert quantized["ppl_fp"] == full["ppl"] != quantized["ppl"]


def test_the_loss_is_computed_in_fp32_and_in_pieces(tiny):
    """2,500 tokens in bf16, against float64; in bf16 the sum would be off by more than a
    percent."""
    model = copy_of(Llama.from_pretrained(tiny[1])).to(torch.bfloat16)
    tokens = torch.randint(0, 256, (1, 2500), generator=torch.Generator().manual_seed(0))
    H = model.embedding(tokens)
    expected = F.cross_entropy(model.logits(H)[0, :-1].double(), tokens[0, 1:], reduction="sum")
    loss = evaluate.negative_log_likelihood(model, H, tokens)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_command_of_the_card():
    """`--model llama2-7b --sinks 5 --bits 2`: Figure 9's setting at N = 5."""
    (config,) = configs_of("--model llama2-7b --sinks 5 --bits 2")
    assert (config.data, config.seq_len, config.limit) == ("wikitext2", 4096, None)
    assert (config.group_size, config.calib_windows) == (128, 16)
    rules = [Rule(), Rule(first=5), Rule(k=5)]
    schemes = ["token-static", "token-dynamic", "channel-static"]
    rows = [Row(scheme, 2, rule) for scheme in schemes for rule in rules]
    assert config.rows == (FULL_PRECISION, *rows)
    # A file is calibrated on wiki-sample, whose second part has 25,000 tokens: six windows of
    # 4,096, not sixteen.
    (config,) = configs_of("--model llama2-7b --data some.txt")
    assert config.calib_windows == 4
    assert len(config.rows) == 1 + 3 * 2 * (1 + 2 * 4)
    assert {row.rule.max_kept for row in config.rows} == {0, 5, 10, 15, 20}
    assert {row.bits for row in config.rows} == {16, 4, 2}


def configs_of(options):
    return eval_ppl.eval_configs(eval_ppl.parse_arguments(options.split()))


@pytest.mark.parametrize("rope", ["post", "pre"])
def test_a_row_is_algorithm_1_with_its_own_calibration(tiny, tmp_path, sample_calibration, rope):
    out = tmp_path / "out.json"
    text = Path(tiny[3]).read_bytes()
    row = f"--scheme channel-static --keep kvsink --sinks 3 --bits 3 --rope {rope}".split()
    windows = f"--limit 2 --calib-windows 2 --json {out}".split()
    assert eval_ppl.main([*tiny, *row, *windows]) == 0
    model = Llama.from_pretrained(tiny[1])
    documents = hub.documents("wiki-sample", "train")
    calibration = torch.tensor([*b"".join(document.encode() + b"\0" for document in documents)])
    calibration[calibration == 0] = 256  # <|endoftext|>, the id after the bytes
    quantizers = kvsink.rtn_quantizers(model, "channel-static", 3, 8)
    rule = Rule(k=3, site=SITE)
    calibrate(model, calibration[:128].view(2, 1, 64), [quantizers], rule, STEPS[rope])
    tokens = torch.tensor([*text[:128]]).view(2, 64)
    H, _ = prefill(model, model.embedding(tokens), quantizers, *SITE, k=3, step=STEPS[rope])
    nll = F.cross_entropy(model.logits(H)[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert results_of(out)[1]["ppl"] == pytest.approx(nll.exp().item(), rel=1e-4)


def test_compiled_and_eager_runs_agree(tiny, tmp_path, sample_calibration):
    if not has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    eager = tmp_path / "eager.json"
    compiled = tmp_path / "compiled.json"
    rows = ["--sinks", "3", "--bits", "4", "3", "--limit", "2"]
    assert eval_ppl.main([*tiny, *rows, "--json", str(eager)]) == 0
    with_compiler = [option for option in tiny if option != "--no-compile"]
    assert eval_ppl.main([*with_compiler, *rows, "--json", str(compiled)]) == 0
    for a, b in zip(results_of(eager), results_of(compiled), strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=5e-3)
        assert (a["compiled"], b["compiled"]) == (False, True)


@pytest.mark.parametrize("scheme", ["full", "channel-static"])
def test_the_loop_for_other_tables_is_the_loop_of_eval_ppl(tiny, sample_calibration, scheme):
    """evaluate.measure_row, which Table 2 and beyond/front.py use, against eval_ppl.py's loop."""
    options = "--scheme channel-static --bits 3 --keep kvsink --sinks 3 --limit 2"
    (run,) = evaluate.load_runs(configs_of(" ".join([*tiny, options])))
    results = {result["scheme"]: result for result in eval_ppl.evaluate_rows(run, [])}
    row = next(row for row in run.config.rows if row.scheme == scheme)
    measured = evaluate.measure_row(run, row, evaluate.quantizers(run, row), ppl_fp=None)
    for key in ("ppl", "nll", "kept"):
        assert measured[key] == results[scheme][key]


def test_another_setting_is_another_row(tiny):
    """Everything that a PPL depends on is part of its key: options, weights, and the text."""
    row = Row("token-static", 4, Rule(k=5))
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    (config,) = configs_of(" ".join(tiny))
    run = evaluate.Run(config, None, None, tokens, 8, SITE, "weights", None)

    def key(run=run, row=row, **changes):
        return evaluate.result_settings(replace(run, **changes), row)

    assert key() == key()
    for change in (
        "--rope=pre --dtype=bfloat16 --seed=1 --seq-len=32 --calib-windows=3 --model=other "
        "--data=other"
    ).split():
        (other,) = configs_of(" ".join([*tiny, change]))
        assert key(config=other) != key(), change
    for changes in (
        {"group_size": 4},
        {"tokens": tokens + 1},
        {"tokens": tokens[:1]},
        {"weights": "others"},
        {"site": Site(3, 5)},
        {"site": Site(2, 6)},
        {"config": replace(config, machine=Machine("cpu", "float32", compile=True))},
    ):
        assert key(**changes) != key(), changes
    assert key(row=row._replace(rule=Rule(k=6))) != key()


# --------------------------------------------------------------------------------------------------
# The default model, end to end


def test_the_finder_agrees_with_the_table_on_the_default_model(default_model):
    model = Llama.from_pretrained(default_model)
    tokenizer = Tokenizer.from_pretrained(default_model)
    prompts = [tokenizer.encode(prompt) for prompt in kvsink.PROMPTS]
    assert kvsink.find_site(model, prompts) == kvsink.table_site(hub.DEFAULT_MODEL)
    found = kvsink.stable_outliers(model, torch.tensor(prompts[:1]))
    row = kvsink.TABLE_3[hub.DEFAULT_MODEL]
    assert found.channels[: len(row.channels)] == row.channels


def test_the_sinks_of_the_default_model_are_where_documents_end(default_model):
    """Packed text: of each window, the outliers sit at token 0 and at every <|endoftext|>, nowhere
    else."""
    model = Llama.from_pretrained(default_model)
    tokenizer = Tokenizer.from_pretrained(default_model)
    for window in text.windows(tokenizer, "wiki-sample", "test", 1024, 1, 0):
        expected = window == tokenizer.eot
        expected[0] = True
        assert expected.sum() > 2
        H = model.embedding(window[None])
        site = kvsink.table_site(hub.DEFAULT_MODEL)
        _, S_sink = prefill(
            model, H, full_precision_quantizers(model), *site, k=int(expected.sum())
        )
        assert torch.equal(S_sink[0], expected)


def test_five_predicted_tokens_are_worth_more_than_the_first_five(default_model):
    """The first rows of `python eval_ppl.py`, eager so that they do not depend on a compiler;
    tests/test_eval_ppl.py has the others."""
    out = default_results()
    rows = "--scheme channel-static --bits 4 --keep pfn kvsink --sinks 5".split()
    assert eval_ppl.main([*rows, "--no-compile", "--json", str(out)]) == 0
    ppl = perplexities(out)
    assert ppl["full", 16, "none", 0] == pytest.approx(19.559, abs=0.001)
    for row, expected in REFERENCE.items():
        assert ppl[row] == pytest.approx(expected, rel=0.005), row
    assert ppl["channel-static", 4, "kvsink", 5] < ppl["channel-static", 4, "pfn", 5]
