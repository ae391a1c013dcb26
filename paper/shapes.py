"""The paper's models at their true shape, which is what their config.json says, with random
weights.

What this file does not do: random weights say nothing of quality. They take the time and the memory
of the real ones, and need no download.
"""

import torch

from llama import Llama, LlamaConfig
from support import cli

# fmt: off
LLAMA2 = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "max_position_embeddings": 4096}
LLAMA2_7B = LLAMA2 | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32}
LLAMA3 = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
LLAMA3_8B = LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                      "num_attention_heads": 32}
LLAMA31_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}
LLAMA32 = LLAMA3 | {"rope_scaling": LLAMA31_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
                    "max_position_embeddings": 131072}
SHAPES = {
    "llama2-7b": LLAMA2_7B,
    "llama2-13b": LLAMA2 | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                            "num_attention_heads": 40},
    "llama2-70b": LLAMA2 | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                            "num_attention_heads": 64, "num_key_value_heads": 8},
    "llama2-7b-chat": LLAMA2_7B,
    "mistral-7b": {"architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
                   "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096},
    "llama3-8b": LLAMA3_8B | {"max_position_embeddings": 8192},
    "llama3.1-8b-instruct": LLAMA3_8B | {"max_position_embeddings": 131072, "rope_scaling": LLAMA31_ROPE},
    "llama3.2-1b": LLAMA32 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                              "num_attention_heads": 32, "head_dim": 64},
    "llama3.2-3b": LLAMA32 | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                              "num_attention_heads": 24, "head_dim": 128},
}
# fmt: on


def shape(name):
    """The configuration of one of the paper's models."""
    return LlamaConfig.from_dict({"rms_norm_eps": 1e-5} | SHAPES[name])


def random_model(config, device, dtype):
    """A model of this shape whose weights are noise, made on the device. Raises ValueError where it
    does not fit."""
    with torch.device("meta"):
        model = Llama(config)
    size, free = (
        dtype.itemsize * sum(weight.numel() for weight in model.parameters()),
        cli.free_memory(device),
    )
    if size > free:
        raise ValueError(
            f"the weights take {cli.format_bytes(size)}, and {cli.format_bytes(free)} are free on {device}: take a smaller "
            "--shape, or --dtype float16"
        )
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    if config.tie_word_embeddings:
        model.W_vocab.weight = model.embedding.weight
    for weight in model.parameters():
        weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, 0.02)
    return model
