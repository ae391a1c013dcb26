"""This project beside the transformers package: what it makes of a config.json, the ids of its
tokenizers. transformers is no dependency: these tests skip without it."""

import itertools
import json

import numpy as np
import pytest
import torch

from llama import ROPE_KEYS, Llama, LlamaConfig, rope_table
from support.tokenizer import Tokenizer
from tests.helpers import LLAMA31_ROPE, SMALL, refuse, write_model
from tests.test_tokenizer import ADDED, LAYOUTS, STRINGS_THAT_HURT, write_fine_tune

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)
if not transformers.__version__.startswith("5.23."):
    pytest.skip("another version of the transformers package", allow_module_level=True)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Two keys of a config.json that may say the same thing

ABSENT = "absent"
LINEAR = {"rope_type": "linear", "factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
WITHOUT_ORIGINAL = {key: value for key, value in LLAMA31_ROPE.items() if key != ORIGINAL}
ROPES = [
    ABSENT,
    None,
    {},
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_theta": 2e5},
    LINEAR,
    {**LINEAR, "rope_theta": 3e5},
    {"type": "linear", "factor": 2.0},
    {"type": "linear", "rope_type": "default", "factor": 2.0},
    {"type": "default", "rope_type": "linear", "factor": 2.0},
    LLAMA31_ROPE,
    WITHOUT_ORIGINAL,
    {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64},
    {"type": "dynamic", "factor": 4.0},
    {"rope_type": "linear"},  # without a factor
    {"rope_type": None, "type": "linear", "factor": 2.0},
    {"rope_theta": None},
]


def tables_of_transformers(raw):
    """Return cos and sin (90, d_k) as transformers computes them, or None if it cannot or if the
    type of RoPE is none of ours."""
    raw = json.loads(json.dumps(raw))  # it changes the object that it is given
    try:
        config = transformers.LlamaConfig(**raw)
        if config.rope_parameters["rope_type"] not in ROPE_KEYS:
            return None
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(90)[None])
    except (KeyError, TypeError, ValueError):
        return None
    return cos[0], sin[0]


def test_every_pair_of_rope_keys_means_what_transformers_makes_of_it():
    """With theta and the original context inside, outside, in both places or in none."""
    read = 0
    choices = itertools.product(ROPES, ROPES, (ABSENT, 5e5), (ABSENT, 32))
    for scaling, parameters, theta, original in choices:
        keys = {
            "rope_scaling": scaling,
            "rope_parameters": parameters,
            "rope_theta": theta,
            ORIGINAL: original,
        }
        raw = SMALL | {key: value for key, value in keys.items() if value != ABSENT}
        expected = tables_of_transformers(raw)
        if expected is None:
            with pytest.raises(ValueError):
                LlamaConfig.from_dict(raw)
            continue
        ours = rope_table(LlamaConfig.from_dict(raw), 90, "cpu")
        for table, expected_table in zip(ours, expected):
            torch.testing.assert_close(table, expected_table, rtol=0, atol=2e-5, msg=str(keys))
        read += 1
    assert read > 500


def test_the_rope_scaling_that_was_added_by_hand_is_obeyed():
    """The case of the report, by name: `rope_scaling` goes before the `rope_parameters` that
    transformers wrote, and a yarn that was added is refused."""
    written = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = LlamaConfig.from_dict({**SMALL, **written, "rope_scaling": LINEAR})
    assert (config.rope_type, config.rope_factor) == ("linear", 4.0)
    yarn = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}
    with pytest.raises(ValueError, match="'yarn'"):
        LlamaConfig.from_dict({**SMALL, **written, "rope_scaling": yarn})


MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("change", [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LINEAR},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": LLAMA31_ROPE},
    {"head_dim": None},
    {"head_dim": 16},
    {"head_dim": 32},
    {"num_key_value_heads": None},
    {"tie_word_embeddings": True},
    {"sliding_window": 16},
    {"sliding_window": 16, "use_sliding_window": True},
    {"torch_dtype": "float16"},
    {"torch_dtype": "bfloat16", "dtype": "float16"},
    {**MISTRAL, "sliding_window": 16},
    {**MISTRAL, "sliding_window": None},
    {**MISTRAL, "sliding_window": 16, "use_sliding_window": False},
    {**MISTRAL, "sliding_window": None, "use_sliding_window": True},
    {**MISTRAL, "sliding_window": 16, "max_window_layers": 1},
    {**MISTRAL, "sliding_window": 16, "head_dim": 16, "layer_types": ["sliding_attention"] * 3},
    {**MISTRAL, "head_dim": 32, "sliding_window": 16},
])  # fmt: skip
def test_two_keys_that_say_the_same_give_the_logits_of_transformers(change, tmp_path):
    directory = write_model(tmp_path / "model", {**SMALL, **change})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor(np.random.RandomState(2).randint(0, 97, (2, 90)))
    expected = theirs.eval()(tokens).logits
    ours = Llama.from_pretrained(directory)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("change, words", [
    ({"architectures": ["MistralForCausalLM"]}, "contradict"),
    ({"model_type": "mistral"}, "contradict"),
    ({"model_type": "qwen2"}, "'qwen2'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {}}}, "full_attention"),
    ({"per_layer_config": {"0": {"sliding_window": 16}}}, "per_layer_config"),
    ({**MISTRAL, "sliding_window": 9, "layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"layer_types": 5}, "layer_types"),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": None}, "rope_theta is None"),
])  # fmt: skip
def test_what_transformers_would_compute_otherwise_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_dict({**SMALL, **change})


# --------------------------------------------------------------------------------------------------
# Tokenizers

CHATS = (
    "<|im_start|>the cat<|im_end|>",
    "the cat<|im_end|>",
    "<|im_start|>user\n a cat <|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> 1 2",
    "is <|im_star|> a <|im_end|>the 5",
)


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers_in_every_layout(layout, family, legacy, tmp_path):
    """On text with and without added tokens. Two things differ, where transformers reads a
    tokenizer.model: SentencePiece itself puts a space also before a text that begins with one; and
    transformers puts none before a text of a Mistral, which is no SentencePiece's."""
    from_model = "tokenizer.json" not in (*LAYOUTS[layout], layout.split()[-1])
    if from_model:
        reason = "the transformers package needs protobuf to read a tokenizer.model"
        pytest.importorskip("google.protobuf", reason=reason)
    settings = {} if legacy is None else {"legacy": legacy}
    write_fine_tune(tmp_path, layout, family, **settings)
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for words in (*STRINGS_THAT_HURT, *CHATS):
        starts_added = words.startswith(ADDED)
        if from_model and not starts_added and (words.startswith(" ") or family == "mistral"):
            continue
        if from_model and family == "mistral" and legacy:
            continue  # there, transformers knows no `legacy`
        assert ours.encode(words) == theirs(words).input_ids, words
    ids = [1, 320, *ours.encode("the cat", bos=False), 321]
    assert ours.decode(ids).removeprefix("<s>") == theirs.decode(ids).removeprefix("<s>")
    assert theirs.eos_token_id in ours.stop_ids


def test_a_prompt_longer_than_the_text_names_its_own_option(tiny, capsys):
    from beyond import side_by_side

    options = ["--model", tiny[1], "--data", tiny[3], "--prompt", "9999"]
    refuse(options, ["fewer than one window", "lower --prompt"], capsys, side_by_side)
