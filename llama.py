"""The LLaMA transformer of Section 2, from scratch: configuration, forward pass, weights.

Read top to bottom: LlamaConfig; RMSNorm, RoPE and attention (Eq. 3); the FFN (Eq. 4); the decoder
block (Eq. 1-2); the model; and the loading of its weights from safetensors.

What this file does not do: it knows nothing of quantization or of sinks (quant.py, kvsink.py), it
keeps no KV cache between calls (a prefill needs none), it does not train, and it runs no code out
of a checkpoint.

Shapes: b sequences, n tokens, d hidden size, h query heads, h_kv Key/Value heads, d_k channels a
head.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

# --------------------------------------------------------------------------------------------------
# Configuration

ROPE_KEYS = {  # the rope types there are, and what each needs: our name -> config.json's
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {"rope_factor": "factor", "rope_low_freq_factor": "low_freq_factor",
               "rope_high_freq_factor": "high_freq_factor", "rope_original_context": "original_max_position_embeddings"},
}  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, under the names of Hugging Face's config.json; `from_dict` says what it
    refuses."""

    vocab_size: int
    hidden_size: int  # d
    intermediate_size: int  # d_ffn
    num_hidden_layers: int  # L
    num_attention_heads: int  # h
    num_key_value_heads: int  # h_kv; h_kv < h is Grouped-Query Attention
    head_dim: int  # d_k
    max_position_embeddings: int  # the context the model was trained at
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0  # what ROPE_KEYS says of the type; 1.0 is not used otherwise
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 1.0
    rope_original_context: float = 1.0
    sliding_window: int | None = (
        None  # Mistral: a token sees itself and the window - 1 tokens before it
    )
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw):
        """`raw` is a parsed config.json. Keys that it lacks have the defaults of transformers.
        Raises ValueError, by name, for what is not a plain LLaMA or Mistral in full precision."""
        if not isinstance(raw, dict):
            raise ValueError("not a model's configuration")
        names = raw.get("architectures") or [raw.get("model_type")]
        architecture = names[0] if isinstance(names, list) else names
        if architecture not in ("LlamaForCausalLM", "MistralForCausalLM", "llama", "mistral"):
            raise ValueError(
                f"architecture {architecture!r} is not supported: only LLaMA and Mistral are"
            )
        if quantization := raw.get("quantization_config"):
            method = (
                quantization.get("quant_method", "unnamed")
                if isinstance(quantization, dict)
                else quantization
            )
            raise ValueError(
                f"its weights are quantized ({method}): take the checkpoint in fp16, bf16 or fp32"
            )
        for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if (raw.get(key) or plain) != plain:
                raise ValueError(f"{key} {raw[key]!r} is not supported: only {plain!r} is")
        # Newer files keep all of RoPE in `rope_parameters`, older ones in `rope_scaling` and
        # `rope_theta`.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(
                f"rope_scaling {rope!r} is not supported: it has to be an object or null"
            )
        rope_type = str(rope.get("rope_type", rope.get("type", "default")))
        if rope_type not in ROPE_KEYS:
            raise ValueError(
                f"rope type {rope_type!r} is not supported: only {', '.join(ROPE_KEYS)} are"
            )
        mistral = architecture.lower().startswith("mistral")
        try:
            values = {field.name: raw[field.name] for field in fields(cls)[:5]}
            d, h = raw["hidden_size"], raw["num_attention_heads"]
            values |= {ours: rope[theirs] for ours, theirs in ROPE_KEYS[rope_type].items()}
            values |= {
                "num_key_value_heads": raw.get("num_key_value_heads", 8 if mistral else h) or h,
                "head_dim": raw.get("head_dim") or d // h,
                "max_position_embeddings": raw.get(
                    "max_position_embeddings", 131072 if mistral else 2048
                ),
                "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
                "rope_theta": rope.get("rope_theta", raw.get("rope_theta") or 10000.0),
                "sliding_window": raw.get("sliding_window", 4096)
                if mistral
                else None,  # LLaMA has none
                "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            }
        except KeyError as missing:
            raise ValueError(f"it lacks {missing}") from None
        except (TypeError, ZeroDivisionError):
            raise ValueError("one of its numbers is none") from None
        config = cls(rope_type=rope_type, **values)
        for field in fields(config):
            value = getattr(config, field.name)
            whole = field.type is int or field.name == "sliding_window" and value is not None
            if whole and not (type(value) is int and 0 < value < 2**31):
                raise ValueError(
                    f"{field.name} is {value!r}, which is not a positive whole number below 2^31"
                )
            if field.type is float and not (type(value) in (int, float) and 0 < value < 2**63):
                raise ValueError(
                    f"{field.name} is {value!r}, which is not a positive number below 2^63"
                )
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}, which is neither true nor false")
        if h % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(
                f"{h} query heads, {config.num_key_value_heads} Key heads of {config.head_dim} do not fit"
            )
        return config

    @classmethod
    def from_pretrained(cls, directory):
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory}: no config.json, so this is not a model's directory"
            )
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (
            ValueError,
            RecursionError,
        ) as error:  # not JSON, not UTF-8, or refused by name above
            raise ValueError(f"{path}: {error}") from None


# --------------------------------------------------------------------------------------------------
# The parts of a decoder block, laid out so that Algorithm 1 can call them one by one


class RMSNorm(nn.Module):
    """LN of Eq. 1-2. LLaMA's is x / rms(x), in fp32: a sink reaches thousands, and the square would
    overflow fp16."""

    def __init__(self, d, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d))

    def forward(self, H):  # (b, n, d) -> (b, n, d)
        X = H.float()
        return (X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            H.dtype
        ) * self.weight


def rope_table(config, n, device):
    """cos and sin of the angle by which RoPE turns each pair of channels at each position, fp32,
    each (n, d_k)."""
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)  # (d_k/2,)
    frequency = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_type == "linear":
        frequency = frequency / config.rope_factor
    elif config.rope_type == "llama3":
        # Fast pairs keep their frequency, slow ones are divided by the factor, those between are
        # mixed.
        turns = (
            config.rope_original_context * frequency / (2 * math.pi)
        )  # over the context the model was trained at
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / config.rope_factor)
    angle = torch.outer(
        torch.arange(n, device=device, dtype=torch.float32), frequency
    )  # (n, d_k/2)
    angle = torch.cat(
        (angle, angle), dim=-1
    )  # (n, d_k): channel i is paired with channel i + d_k/2
    return angle.cos(), angle.sin()


def apply_rope(X, rope):
    """RoPE on Q or K, (b, heads, n, d_k) -> the same; `rope` is the table above."""
    cos, sin = rope
    first, second = X.float().chunk(2, dim=-1)
    return (X * cos + torch.cat((-second, first), dim=-1) * sin).to(X.dtype)


def causal_mask(n, sliding_window, device):
    """M of Eq. 3 as a mask (n, n): True where query t sees key i, itself and those before it, or a
    window of them."""
    i = torch.arange(n, device=device)
    age = i[:, None] - i[None, :]  # how many tokens ago the query saw the key
    return (age >= 0) & (age < (sliding_window or n))


def attention(Q, K, V, sliding_window=None):
    """Softmax(Q K^T / sqrt(d_k) + M) V of Eq. 3, causal. Q (b, h, n, d_k), K, V (b, h_kv, n, d_k)
    -> (b, n, h d_k)"""
    n, group = Q.shape[2], Q.shape[1] // K.shape[1]
    K, V = (
        K.repeat_interleave(group, dim=1),
        V.repeat_interleave(group, dim=1),
    )  # each K and V serves `group` queries
    M = causal_mask(n, sliding_window, Q.device) if sliding_window and n > sliding_window else None
    A = F.scaled_dot_product_attention(Q, K, V, attn_mask=M, is_causal=M is None)
    return A.transpose(1, 2).flatten(2)


class FFN(nn.Module):
    """Eq. 4: (sigma(X W_g) * X W_u) W_d. The input of W_d is X_d.in (Eq. 7), its output X_d.out
    (Eq. 8)."""

    def __init__(self, config):
        super().__init__()
        d, d_ffn = config.hidden_size, config.intermediate_size
        self.W_g = nn.Linear(d, d_ffn, bias=False)
        self.W_u = nn.Linear(d, d_ffn, bias=False)
        self.W_d = nn.Linear(d_ffn, d, bias=False)

    def forward(self, X):  # (b, n, d) -> (b, n, d)
        return self.W_d(F.silu(self.W_g(X)) * self.W_u(X))


class Block(nn.Module):
    """One decoder block, Eq. 1-3."""

    def __init__(self, config):
        super().__init__()
        d, d_k, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.d_k, self.sliding_window = d_k, config.sliding_window
        self.LN_mhsa = RMSNorm(d, eps)
        self.W_q = nn.Linear(d, config.num_attention_heads * d_k, bias=False)
        self.W_k = nn.Linear(d, config.num_key_value_heads * d_k, bias=False)
        self.W_v = nn.Linear(d, config.num_key_value_heads * d_k, bias=False)
        self.W_o = nn.Linear(config.num_attention_heads * d_k, d, bias=False)
        self.LN_ffn = RMSNorm(d, eps)
        self.FFN = FFN(config)

    def QKV(self, X):
        """Queries, Keys and Values before RoPE: (b, n, d) -> (b, h, n, d_k), (b, h_kv, n, d_k), (b,
        h_kv, n, d_k)."""
        return [
            W(X).unflatten(-1, (-1, self.d_k)).transpose(1, 2)
            for W in (self.W_q, self.W_k, self.W_v)
        ]

    def forward(self, H, rope):
        """H^{l-1} -> H^l, both (b, n, d)."""
        Q, K, V = self.QKV(self.LN_mhsa(H))
        A = attention(apply_rope(Q, rope), apply_rope(K, rope), V, self.sliding_window)
        H = self.W_o(A) + H  # H^{l'}, Eq. 2
        return self.FFN(self.LN_ffn(H)) + H  # Eq. 1


class Llama(nn.Module):
    """The whole decoder: embedding, L blocks, final norm, output layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.LN_final = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.W_vocab = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens):
        """tokens (b, n) int64 -> logits (b, n, vocab)."""
        H, rope = (
            self.embedding(tokens),
            rope_table(self.config, tokens.shape[1], tokens.device),
        )  # H^0 (b, n, d)
        for block in self.blocks:
            H = block(H, rope)
        return self.logits(H)

    def logits(self, H):  # H^L (b, n, d) -> (b, n, vocab)
        return self.W_vocab(self.LN_final(H))

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32):
        """A model from a Hugging Face directory: config.json and model.safetensors, or shards with
        their index. Weights go one by one from the memory-mapped file to the device: never two
        copies of the model in memory. Raises FileNotFoundError or ValueError, naming file and
        tensor, before the first weight is read."""
        model, places = locate_weights(directory)
        set_weights(model, read_weights(places, device, dtype))
        return tie(model)


# --------------------------------------------------------------------------------------------------
# Weights

# The paper's name (as in this file) -> the checkpoint's key. {l} counts blocks from 0, as
# checkpoints do.
CHECKPOINT_KEYS = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{l}.LN_mhsa.weight": "model.layers.{l}.input_layernorm.weight",
    "blocks.{l}.W_q.weight": "model.layers.{l}.self_attn.q_proj.weight",
    "blocks.{l}.W_k.weight": "model.layers.{l}.self_attn.k_proj.weight",
    "blocks.{l}.W_v.weight": "model.layers.{l}.self_attn.v_proj.weight",
    "blocks.{l}.W_o.weight": "model.layers.{l}.self_attn.o_proj.weight",
    "blocks.{l}.LN_ffn.weight": "model.layers.{l}.post_attention_layernorm.weight",
    "blocks.{l}.FFN.W_g.weight": "model.layers.{l}.mlp.gate_proj.weight",
    "blocks.{l}.FFN.W_u.weight": "model.layers.{l}.mlp.up_proj.weight",
    "blocks.{l}.FFN.W_d.weight": "model.layers.{l}.mlp.down_proj.weight",
    "LN_final.weight": "model.norm.weight",
    "W_vocab.weight": "lm_head.weight",
}


def checkpoint_names(config):
    """Checkpoint key -> parameter name, for every tensor of the model."""
    every = [
        (key, l)
        for key in CHECKPOINT_KEYS
        for l in range(config.num_hidden_layers if "{l}" in key else 1)
    ]
    return {CHECKPOINT_KEYS[key].format(l=l): key.format(l=l) for key, l in every}


def weight_files(directory):
    """Every safetensors file of a checkpoint -> the keys its index says it holds (none where there
    is no index)."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if single.is_file():  # goes before an index that lies beside it, as in transformers
        return {single: []}
    if not index.is_file():
        raise FileNotFoundError(f"{directory}: no model.safetensors and no {index.name}")
    files = {}
    try:
        for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(directory / name, []).append(key)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{index}: not a safetensors index (no readable weight_map)") from None
    for path in files:
        if ".." in path.parts or directory not in path.parents:
            raise ValueError(f"{index}: {path} lies outside the model's directory")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: this shard is listed in {index.name} but is not there"
            )
    return files


def locate_weights(directory):
    """A model without weights, and parameter name -> file and key, for each of its tensors: all
    checked, none read."""
    directory, stored = Path(directory), {}  # key -> file, shape, dtype
    config = LlamaConfig.from_pretrained(directory)
    for path, expected in weight_files(directory).items():
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                stored |= {
                    key: (path, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()
                }
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        if lost := set(expected) - set(slices):
            raise ValueError(
                f"{path}: tensor {min(lost)} is missing, though the index says it is here"
            )
    # Old LLaMA files carry RoPE's frequencies: not needed.
    stored = {key: what for key, what in stored.items() if not key.endswith("rotary_emb.inv_freq")}
    if "embed_tokens.weight" in stored:
        raise ValueError(
            f"{directory}: a LlamaModel without its output layer: save the LlamaForCausalLM instead"
        )
    if config.num_hidden_layers > len(stored):  # before anything is made for each block
        raise ValueError(
            f"{directory}: config.json has more blocks than there are tensors ({len(stored)})"
        )
    with torch.device("meta"):  # shapes without storage
        model = Llama(config)
    names, places = checkpoint_names(config), {}
    for key, (path, shape, dtype) in sorted(stored.items()):
        if key not in names:
            raise ValueError(
                f"{path}: tensor {key} is unexpected: this model has none of that name"
            )
        if shape != (expected := tuple(model.get_parameter(names[key]).shape)):
            raise ValueError(
                f"{path}: tensor {key} has shape {shape}, config.json asks for {expected}"
            )
        if dtype not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: tensor {key} is stored as {dtype}: only F32, F16 and BF16 are read"
            )
        places[names[key]] = path, key
    if (
        missing := names.keys()
        - stored.keys()
        - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    ):
        raise ValueError(f"{directory}: tensor {min(missing)} is missing ({len(missing)} in all)")
    return model, places


def read_weights(places, device, dtype, prefixes=("",)):
    """Yields the name and the weight of each parameter in `places` whose name begins with one of
    `prefixes`."""
    for name, (path, key) in places.items():
        if name.startswith(prefixes):
            with safe_open(path, framework="pt", device=str(device)) as file:
                yield name, file.get_tensor(key).to(dtype)


def set_weights(module, weights):
    for name, weight in weights:
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))


def tie(model):
    """A tied output layer shares the embedding's storage. One that is stored all the same and
    differs is used."""
    W, E = model.W_vocab.weight, model.embedding.weight
    if model.config.tie_word_embeddings and (W.is_meta or torch.equal(W, E)):
        model.W_vocab.weight = E
    return model.requires_grad_(False).eval()
