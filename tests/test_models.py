"""The configurations of public checkpoints, as their config.json have them: read, or refused by
name. A model that is read has as many parameters as its model card says."""

import pytest
import torch

from llama import Llama, LlamaConfig, rope_table

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shaped(vocab, d, d_ffn, L, h, h_kv, context, **others):
    shape = {
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": d_ffn,
        "num_hidden_layers": L,
        "num_attention_heads": h,
        "num_key_value_heads": h_kv,
        "max_position_embeddings": context,
    }
    return {key: value for key, value in shape.items() if value is not None} | others


LLAMA_2_7B = LLAMA | shaped(
    32000, 4096, 11008, 32, 32, 32, 4096, rope_scaling=None, attention_bias=False
)
LLAMA_3_8B = LLAMA | shaped(
    128256, 4096, 14336, 32, 32, 8, 8192, rope_theta=500000.0, rope_scaling=None
)
LLAMA_31_8B = LLAMA_3_8B | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, **LLAMA3},
    "mlp_bias": False,
}
TIED_32 = {
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 32.0, **LLAMA3},
}
MISTRAL_7B = MISTRAL | shaped(
    32000, 4096, 14336, 32, 32, 8, 32768, rope_theta=10000.0, sliding_window=4096
)


# Name -> configuration, parameters, head_dim, RoPE (theta, type, factor), window
READ = {
    "meta-llama/Llama-2-7b-hf": (LLAMA_2_7B, 6_738_415_616, 128, (10000.0, "default", 1.0), None),
    "meta-llama/Llama-2-13b-hf": (
        LLAMA | shaped(32000, 5120, 13824, 40, 40, 40, 4096), 13_015_864_320, 128,
        (10000.0, "default", 1.0), None),
    "meta-llama/Llama-2-70b-hf": (
        LLAMA | shaped(32000, 8192, 28672, 80, 64, 8, 4096), 68_976_648_192, 128,
        (10000.0, "default", 1.0), None),
    "meta-llama/Meta-Llama-3-8B": (LLAMA_3_8B, 8_030_261_248, 128, (500000.0, "default", 1.0),
        None),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA_31_8B, 8_030_261_248, 128,
        (500000.0, "llama3", 8.0), None),
    "meta-llama/Llama-3.2-1B": (
        LLAMA | shaped(128256, 2048, 8192, 16, 32, 8, 131072, head_dim=64, **TIED_32),
        1_235_814_400, 64, (500000.0, "llama3", 32.0), None),
    "meta-llama/Llama-3.2-3B": (
        LLAMA | shaped(128256, 3072, 8192, 28, 24, 8, 131072, head_dim=128, **TIED_32),
        3_212_749_824, 128, (500000.0, "llama3", 32.0), None),
    "mistralai/Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096, 128, (10000.0, "default", 1.0), 4096),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        MISTRAL_7B | {"rope_theta": 1e6, "sliding_window": None}, 7_241_732_096, 128,
        (1e6, "default", 1.0), None),
    "mistralai/Mistral-7B-v0.3": (
        MISTRAL_7B | {"vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None},
        7_248_023_552, 128, (1e6, "default", 1.0), None),
    "mistralai/Mistral-Nemo-Base-2407": (
        MISTRAL | shaped(131072, 5120, 14336, 40, 32, 8, 131072, head_dim=128, rope_theta=1e6,
            sliding_window=None),
        12_247_782_400, 128, (1e6, "default", 1.0), None),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        LLAMA | shaped(32000, 2048, 5632, 22, 32, 4, 2048), 1_100_048_384, 64,
        (10000.0, "default", 1.0), None),
    "HuggingFaceTB/SmolLM2-135M": (
        LLAMA | shaped(49152, 576, 1536, 30, 9, 3, 8192, rope_theta=100000,
            tie_word_embeddings=True),
        134_515_008, 64, (100000, "default", 1.0), None),
    "HuggingFaceTB/SmolLM2-1.7B": (
        LLAMA | shaped(49152, 2048, 8192, 24, 32, 32, 8192, rope_theta=130000,
            tie_word_embeddings=True),
        1_711_376_384, 64, (130000, "default", 1.0), None),
    "openlm-research/open_llama_3b": (
        LLAMA | shaped(32000, 3200, 8640, 26, 32, None, 2048, rms_norm_eps=1e-6,
            max_sequence_length=2048),
        3_426_473_600, 100, (10000.0, "default", 1.0), None),
    "codellama/CodeLlama-7b-hf": (
        LLAMA_2_7B | {"vocab_size": 32016, "rope_theta": 1000000, "max_position_embeddings": 16384},
        6_738_546_688, 128, (1000000, "default", 1.0), None),
    "01-ai/Yi-6B": (
        LLAMA | shaped(64000, 4096, 11008, 32, 32, 4, 4096, rope_theta=5000000.0),
        6_061_035_520, 128, (5000000.0, "default", 1.0), None),
    "deepseek-ai/deepseek-coder-1.3b-base": (
        LLAMA | shaped(32256, 2048, 5504, 24, 16, 16, 16384, rope_theta=100000,
            rope_scaling={"factor": 4.0, "type": "linear"}),
        1_346_471_936, 128, (100000, "linear", 4.0), None),
}  # fmt: skip
REFUSED = {
    "Qwen/Qwen2.5-7B": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "Qwen2ForCausalLM"),
    "google/gemma-2-2b": ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        "Gemma2ForCausalLM"),
    "mistralai/Mixtral-8x7B-v0.1": ({"architectures": ["MixtralForCausalLM"]},
        "MixtralForCausalLM"),
    "microsoft/Phi-3-mini-4k-instruct": ({"architectures": ["Phi3ForCausalLM"]}, "Phi3ForCausalLM"),
    "NousResearch/Yarn-Llama-2-7b-64k": (
        LLAMA_2_7B | {"rope_scaling": {"factor": 16.0, "type": "yarn",
            "original_max_position_embeddings": 4096}}, "'yarn'"),
    "TheBloke/Llama-2-7B-GPTQ": (LLAMA_2_7B | {"quantization_config": {"quant_method": "gptq",
        "bits": 4}}, "gptq"),
    "TheBloke/Llama-2-7B-AWQ": (LLAMA_2_7B | {"quantization_config": {"quant_method": "awq",
        "bits": 4}}, "awq"),
    "HF1BitLLM/Llama3-8B-1.58-100B-tokens": (
        LLAMA_3_8B | {"quantization_config": {"quant_method": "bitnet",
            "linear_class": "autobitlinear"}}, "bitnet"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_public_configurations_that_are_read(name):
    raw, parameters, head_dim, (theta, rope_type, factor), window = READ[name]
    config = LlamaConfig.from_dict(raw)
    with torch.device("meta"):
        model = Llama(config)
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    assert (
        sum(W.numel() for W in model.parameters()) == parameters + tied
    )  # which from_pretrained ties
    assert (config.head_dim, config.sliding_window) == (head_dim, window)
    assert (config.rope_theta, config.rope_type, config.rope_factor) == (theta, rope_type, factor)
    cos, _ = rope_table(config, 2, "cpu")
    turn = (
        1 / factor if rope_type == "linear" else 1.0
    )  # the fastest pair: one radian a token, unless all are slower
    assert cos[1, 0].item() == pytest.approx(torch.tensor(turn).cos().item(), rel=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_public_configurations_that_are_refused_by_name(name):
    raw, word = REFUSED[name]
    with pytest.raises(ValueError, match=word):
        LlamaConfig.from_dict(raw)
