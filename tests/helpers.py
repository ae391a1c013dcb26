"""What several test files share: tiny models, their tokenizers and texts, and the default model,
each made once."""

import functools
import json
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


def write_model(directory, config, shards=1, seed=0):
    """A checkpoint of random weights that depend on the seed alone."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(config))
    draw, weights = np.random.RandomState(seed), {}
    for key, name in sorted(checkpoint_names(model.config).items()):
        if model.config.tie_word_embeddings and name == "W_vocab.weight":
            continue
        shape = model.get_parameter(name).shape
        noise = draw.standard_normal(shape)
        weights[key] = torch.tensor(
            noise * 0.08 if len(shape) > 1 else 1 + 0.3 * noise, dtype=torch.float32
        )
    write_weights(directory, weights, shards)
    return directory


def write_weights(directory, weights, shards=1):
    if shards == 1:
        return save_file(weights, directory / "model.safetensors")
    weight_map = {key: f"model-{i % shards:05}.safetensors" for i, key in enumerate(weights)}
    for name in set(weight_map.values()):
        save_file(
            {key: weights[key] for key in weights if weight_map[key] == name}, directory / name
        )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --------------------------------------------------------------------------------------------------
# Tokenizers


def bytes_vocabulary(words=()):
    """Ranks of byte-pair encoding: the 256 bytes, then every prefix of two and more bytes of each
    word."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    return ranks


def byte_characters():
    """The 256 characters by which byte-level BPE writes the bytes 0 to 255 (GPT-2's table): the
    bytes that print stand for themselves, the others for the characters after the first 256, in
    order."""
    shown = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def write_bpe(directory, ranks, pre_tokenizer, special=("<|endoftext|>",), first=None, **model):
    """A tokenizer.json of byte-level BPE with these ranks; the special tokens come after them.
    `first` is one that goes before every text."""
    shown = byte_characters()
    text = {token: "".join(shown[byte] for byte in token) for token in ranks}
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    added = [{"id": len(ranks) + i, "content": name, **flags} for i, name in enumerate(special)]
    ids = {token["content"]: token["id"] for token in added}
    template = first and {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": first, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {first: {"id": first, "ids": [ids[first]], "tokens": [first]}},
    }
    raw = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": template,
        "decoder": BYTE_LEVEL,
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


# --------------------------------------------------------------------------------------------------
# A tiny LLaMA whose weights plant stable outliers

EMERGENCE, CHANNEL = 2, 5  # l_E, counted from 1, and c
WEAK, STRONG = 11, 7  # the tokens that become sinks, wherever they stand
PLANTED = {
    **SMALL, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_key_value_heads": 2,
}  # fmt: skip


def plant(directory):
    """Channel 0 of the embedding marks the two tokens; nothing but the FFN of block 2 reads it or
    writes channel 5, where it puts thousands for a marked token and exactly 0 for any other. No
    later block touches that channel."""
    weights = load_file(write_model(directory, PLANTED) / "model.safetensors")
    for key, W in weights.items():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            W[[0, CHANNEL]] = 0  # their rows are the channels of the hidden state
        if key.endswith(
            (
                "q_proj.weight",
                "k_proj.weight",
                "v_proj.weight",
                "gate_proj.weight",
                "up_proj.weight",
            )
        ):
            W[:, [0, CHANNEL]] = 0
    E = weights["model.embed_tokens.weight"]
    E[:, [0, CHANNEL]] = 0
    E[STRONG, 0], E[WEAK, 0] = 1.0, 0.5
    block = f"model.layers.{EMERGENCE - 1}."
    weights[block + "post_attention_layernorm.weight"][0] = 1.0
    weights[block + "mlp.gate_proj.weight"][3], weights[block + "mlp.up_proj.weight"][3] = 0, 0
    weights[block + "mlp.gate_proj.weight"][3, 0] = weights[block + "mlp.up_proj.weight"][3, 0] = (
        4.0
    )
    weights[block + "mlp.down_proj.weight"][:, 3] = 0
    weights[block + "mlp.down_proj.weight"][CHANNEL, 3] = 100.0
    write_weights(directory, weights)
    return directory


@functools.cache
def planted_model():
    with tempfile.TemporaryDirectory() as folder:
        return Llama.from_pretrained(plant(Path(folder) / "model"), dtype=torch.float32)


def ordinary_tokens(n, seed):
    return torch.tensor(np.random.RandomState(seed).randint(12, 64, n))


def two_sequences():
    """Two sequences of 24 tokens; sinks in the middle, at other places in each. S_sink is written
    down beside it."""
    tokens = torch.stack([ordinary_tokens(24, 0), ordinary_tokens(24, 1)])
    tokens[0, [6, 17]] = torch.tensor([WEAK, STRONG])
    tokens[1, [3, 9]] = torch.tensor([STRONG, WEAK])
    S_sink = torch.zeros(2, 24, dtype=torch.bool)
    S_sink[0, [6, 17]] = S_sink[1, [3, 9]] = True
    return tokens, S_sink


SITE = Site(EMERGENCE, CHANNEL)


def calibrate(model, windows, caches, rule=None, step=None):
    """Calibrate the static `caches` for one rule: Algorithm 1 with observers on windows (1, n)."""
    rule = rule or Rule()
    for tokens in windows:
        H = model.embedding(tokens)
        kvsink.prefill(model, H, kvsink.observers(caches), step=step, **rule.arguments(H))


def cache_of(model, scheme, bits, tokens, rule=None, step=None):
    """Return the planted model's cache in groups of 8. If it is static, it is calibrated on tokens
    (1, n)."""
    cache = kvsink.rtn_cache(model, scheme, bits, 8)
    if kvsink.SCHEMES[scheme].static:
        calibrate(model, [tokens], [cache], rule, step)
    return cache


# --------------------------------------------------------------------------------------------------
# What the commands need


def write_tiny(directory):
    """A planted model, a tokenizer of single bytes and a text: all that a command needs. Returns
    its options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANTED, "vocab_size", 300)
        plant(directory)
    write_bpe(directory, bytes_vocabulary(), DIGITS)
    text = directory.parent / "text.txt"
    text.write_text("".join(chr(c) for c in np.random.RandomState(0).randint(32, 127, 2000)))
    options = "--seq-len 64 --no-compile --layer 1 --channel 5".split()
    return ["--model", str(directory), "--data", str(text), *options]


def results_of(path):
    return json.loads(path.read_text())


def perplexities(path):
    return {(r["scheme"], r["bits"], r["keep"], r["sinks"]): r["ppl"] for r in results_of(path)}


def refuse(arguments, words, capsys, command):
    """The command answers with one line on stderr that has all the words, and with exit status
    2."""
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in printed.err


@functools.cache
def fetched_default_model():
    hub.documents("wiki-sample")
    return hub.model_directory(hub.DEFAULT_MODEL)


@functools.cache
def loaded(directory):
    return Llama.from_pretrained(directory)


@functools.cache
def default_results():
    """The JSON file of `python eval_ppl.py --no-compile` in these tests: a row that one has
    measured, no other does."""
    return Path(tempfile.mkdtemp()) / "default.json"


# an independent implementation on a modeling library: fp32, 8 windows of 1,024, 4 calibration
# windows
REFERENCE = {
    ("full", 16, "none", 0): 19.559,
    ("channel-static", 4, "pfn", 5): 20.988,
    ("channel-static", 4, "kvsink", 5): 20.583,
}
