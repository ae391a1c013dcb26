"""The paper's models at their true shape, which their config.json gives, with random weights.

What this file does not do: random weights say nothing about quality. They take as much time and
memory as the trained ones, and need no download.
"""

import torch

from llama import Llama, LlamaConfig
from support import machine
from support.cache import format_bytes


def size(d, d_ffn, L, h):
    return {
        "hidden_size": d,
        "intermediate_size": d_ffn,
        "num_hidden_layers": L,
        "num_attention_heads": h,
    }


LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31 = LLAMA3 | {"rope_scaling": LLAMA31_ROPE, "max_position_embeddings": 131072}
LLAMA32 = LLAMA31 | {"rope_scaling": LLAMA31_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32000,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
SHAPES = {
    "llama2-7b": LLAMA2 | size(4096, 11008, 32, 32),
    "llama2-13b": LLAMA2 | size(5120, 13824, 40, 40),
    "llama2-70b": LLAMA2 | size(8192, 28672, 80, 64) | {"num_key_value_heads": 8},
    "llama2-7b-chat": LLAMA2 | size(4096, 11008, 32, 32),
    "mistral-7b": MISTRAL | size(4096, 14336, 32, 32),
    "llama3-8b": LLAMA3 | size(4096, 14336, 32, 32),
    "llama3.1-8b-instruct": LLAMA31 | size(4096, 14336, 32, 32),
    "llama3.2-1b": LLAMA32 | size(2048, 8192, 16, 32) | {"head_dim": 64},
    "llama3.2-3b": LLAMA32 | size(3072, 8192, 28, 24) | {"head_dim": 128},
}


def shape(name):
    """Return the LlamaConfig of one of the paper's models."""
    return LlamaConfig.from_dict({"rms_norm_eps": 1e-5} | SHAPES[name])


def random_model(config, device, dtype):
    """Return a model of this shape whose weights are noise, made on the device. Raises ValueError
    if it does not fit."""
    with torch.device("meta"):
        model = Llama(config)
    size = dtype.itemsize * sum(weight.numel() for weight in model.parameters())
    free = machine.free_memory(device)
    if size > free:
        raise ValueError(
            f"the weights take {format_bytes(size)}, and {format_bytes(free)} are free on "
            f"{device}: take a smaller --shape, or --dtype float16"
        )
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    if config.tie_word_embeddings:
        model.W_vocab.weight = model.embedding.weight
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, 0.02)
    return model
