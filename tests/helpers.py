"""What several test files share: tiny models, their tokenizers and texts, commands and their
results; and the default model, loaded once."""

import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kvsink
from kvsink import Rule, Site
from llama import Llama, LlamaConfig, checkpoint_names
from support import hub

HERE = Path(__file__).parent.parent

# --------------------------------------------------------------------------------------------------
# Random checkpoints

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama2-mha": {},
    "llama2-gqa": {"num_key_value_heads": 2},
    "llama3": {"num_key_value_heads": 1, "rope_theta": 500000.0},
    "llama3.1": {
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA31_ROPE,
    },
    "llama3.2-tied": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "rope_scaling": {**LLAMA31_ROPE, "factor": 32.0},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 16,
    },
}


def write_model(directory, config, shards=1, seed=0):
    """Write a checkpoint of random weights, which depend on the seed alone. Return its
    directory."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(config))
    draw = np.random.RandomState(seed)
    weights = {}
    for key, name in sorted(checkpoint_names(model.config).items()):
        if model.config.tie_word_embeddings and name == "W_vocab.weight":
            continue
        shape = model.get_parameter(name).shape
        noise = draw.standard_normal(shape)
        W = noise * 0.08 if len(shape) > 1 else 1 + 0.3 * noise
        weights[key] = torch.tensor(W, dtype=torch.float32)
    write_weights(directory, weights, shards)
    return directory


def write_weights(directory, weights, shards=1):
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return
    weight_map = {key: f"model-{i % shards:05}.safetensors" for i, key in enumerate(weights)}
    for name in set(weight_map.values()):
        shard = {key: W for key, W in weights.items() if weight_map[key] == name}
        save_file(shard, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --------------------------------------------------------------------------------------------------
# Tokenizers

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
}


def bytes_vocabulary(words=()):
    """Return ranks of byte-pair encoding: the 256 bytes, then every prefix of two and more bytes of
    each word."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    return ranks


def byte_characters():
    """Return the 256 characters that byte-level BPE writes for the bytes 0 to 255 (GPT-2's table):
    printable bytes stand for themselves, the others for the characters after the first 256, in
    order."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def write_bpe(directory, ranks, pre_tokenizer, special=("<|endoftext|>",), first=None, **model):
    """Write a tokenizer.json of byte-level BPE with these ranks, after which the special tokens
    come. `first` is one that begins every text, `model` further fields of the BPE. Return the
    content of the file."""
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    flags["special"] = True
    added = [{"id": len(ranks) + i, "content": name, **flags} for i, name in enumerate(special)]
    characters = byte_characters()
    text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    bpe = {
        "type": "BPE",
        "vocab": {text[token]: rank for token, rank in ranks.items()},
        "merges": [[text[token[:-1]], text[token[-1:]]] for token in ranks if len(token) > 1],
        **model,
    }
    raw = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": first and template(first, added),
        "decoder": BYTE_LEVEL,
        "model": bpe,
    }
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    return raw


def template(first, added):
    """Return the post-processor that puts the token `first`, one of `added`, before a text."""
    ids = {token["content"]: token["id"] for token in added}
    sequences = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": first, "type_id": 0}}, sequences[0]],
        "pair": sequences,
        "special_tokens": {first: {"id": first, "ids": [ids[first]], "tokens": [first]}},
    }


# --------------------------------------------------------------------------------------------------
# A tiny LLaMA whose weights plant stable outliers

EMERGENCE = 2  # l_E, counted from 1
CHANNEL = 5  # c
SITE = Site(EMERGENCE, CHANNEL)
WEAK = 11  # these two tokens become sinks, at any position
STRONG = 7
PLANTED = {
    **SMALL,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
}


def plant(directory):
    """Write the checkpoint of the planted model. Return its directory.

    Channel 0 of the embedding marks the two tokens. Only the FFN of block 2 reads that channel, and
    only this FFN writes channel 5: thousands for a marked token, exactly 0 for any other. No later
    block touches channel 5."""
    weights = load_file(write_model(directory, PLANTED) / "model.safetensors")
    for key, W in weights.items():
        name = key.removesuffix(".weight").split(".")[-1]
        if name in ("o_proj", "down_proj"):
            W[[0, CHANNEL]] = 0  # their rows are the channels of the hidden state
        if name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            W[:, [0, CHANNEL]] = 0
    E = weights["model.embed_tokens.weight"]
    E[:, [0, CHANNEL]] = 0
    E[STRONG, 0] = 1.0
    E[WEAK, 0] = 0.5
    block = f"model.layers.{EMERGENCE - 1}."
    weights[block + "post_attention_layernorm.weight"][0] = 1.0
    for name in ("gate_proj", "up_proj"):
        W = weights[f"{block}mlp.{name}.weight"]
        W[3] = 0
        W[3, 0] = 4.0
    W_d = weights[block + "mlp.down_proj.weight"]
    W_d[:, 3] = 0
    W_d[CHANNEL, 3] = 100.0
    write_weights(directory, weights)
    return directory


@functools.cache
def planted_model():
    with tempfile.TemporaryDirectory() as folder:
        return Llama.from_pretrained(plant(Path(folder) / "model"), dtype=torch.float32)


def ordinary_tokens(n, seed):
    return torch.tensor(np.random.RandomState(seed).randint(12, 64, n))


def two_sequences():
    """Return two sequences (2, 24) with sinks in the middle, at other places in each; and S_sink
    (2, 24), written down by hand."""
    tokens = torch.stack([ordinary_tokens(24, 0), ordinary_tokens(24, 1)])
    tokens[0, [6, 17]] = torch.tensor([WEAK, STRONG])
    tokens[1, [3, 9]] = torch.tensor([STRONG, WEAK])
    S_sink = torch.zeros(2, 24, dtype=torch.bool)
    S_sink[0, [6, 17]] = True
    S_sink[1, [3, 9]] = True
    return tokens, S_sink


def calibrate(model, windows, caches, rule=None, step=None):
    """Calibrate the static `caches` for one rule: Algorithm 1 with observers on windows (1, n)."""
    rule = rule or Rule()
    for tokens in windows:
        H = model.embedding(tokens)
        kvsink.prefill(model, H, kvsink.observers(caches), step=step, **rule.prefill_arguments(H))


def quantizers_for(model, scheme, bits, tokens, rule=None, step=None):
    """Return quantizers of the planted model in groups of 8. Static ones are calibrated on tokens
    (1, n)."""
    quantizers = kvsink.rtn_quantizers(model, scheme, bits, 8)
    if kvsink.SCHEMES[scheme].static:
        calibrate(model, [tokens], [quantizers], rule, step)
    return quantizers


# --------------------------------------------------------------------------------------------------
# Commands and their results

EVAL_PPL = [sys.executable, "eval_ppl.py"]  # as a process, in the folder HERE
TWO_RANKS = [
    sys.executable,
    *"-m torch.distributed.run --standalone --nproc-per-node 2 eval_ppl.py".split(),
]


def write_tiny(directory):
    """Write a planted model, a tokenizer of single bytes and a text: all that a command needs.
    Return its options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANTED, "vocab_size", 300)
        plant(directory)
    write_bpe(directory, bytes_vocabulary(), DIGITS)
    text = directory.parent / "text.txt"
    text.write_text("".join(chr(c) for c in np.random.RandomState(0).randint(32, 127, 2000)))
    options = "--seq-len 64 --no-compile --layer 1 --channel 5".split()
    return ["--model", str(directory), "--data", str(text), *options]


def write_unplanted(directory):
    """Write a model as large as that of `write_tiny`, without outliers, and its tokenizer. Return
    its weights."""
    write_model(directory, {**PLANTED, "vocab_size": 300})
    write_bpe(directory, bytes_vocabulary(), DIGITS)
    return load_file(directory / "model.safetensors")


def sample_documents(name, split="test", documents=hub.documents):
    """A `hub.documents` that fetches no training split, which static schemes calibrate on, but
    returns a text of bytes instead."""
    if split == "train":
        return ["A calibration text of bytes. " * 10] * 20
    return documents(name, split)


RESULT = {  # the least that a result has
    "model": "m",
    "data": "d",
    "scheme": "token-static",
    "keep": "none",
    "sinks": 0,
    "bits": 4,
    "ppl": 1.0,
    "ppl_fp": 1.0,
}


def results_of(path):
    return json.loads(path.read_text())


def perplexities(path):
    return {(r["scheme"], r["bits"], r["keep"], r["sinks"]): r["ppl"] for r in results_of(path)}


def refuse(arguments, words, capsys, command):
    """Assert that a command answers these arguments with one line on stderr that has all the words,
    and with exit status 2."""
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in printed.err


# --------------------------------------------------------------------------------------------------
# The default model


@functools.cache
def fetched_default_model():
    """Return the default model's directory, after fetching it and its text. Raises ConnectionError
    if that is not possible."""
    hub.documents("wiki-sample")
    return hub.model_directory(hub.DEFAULT_MODEL)


@functools.cache
def loaded(directory):
    return Llama.from_pretrained(directory)


@functools.cache
def default_results():
    """Return the JSON file that several tests hand to `python eval_ppl.py --no-compile`: no test
    measures a row again that another has measured."""
    return Path(tempfile.mkdtemp()) / "default.json"


# PPL by an independent implementation on a modeling library: fp32, 8 windows of 1,024 tokens,
# 4 calibration windows.
REFERENCE = {
    ("full", 16, "none", 0): 19.559,
    ("channel-static", 4, "pfn", 5): 20.988,
    ("channel-static", 4, "kvsink", 5): 20.583,
}
