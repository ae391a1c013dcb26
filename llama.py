"""The LLaMA transformer of Section 2, from scratch: forward pass, configuration, weights.

Read top to bottom: the decoder block (Eq. 1-2) with its attention (Eq. 3), RoPE, FFN (Eq. 4) and
RMSNorm; the model; its configuration; the reading of a checkpoint from safetensors.

What this file does not do: it knows nothing of quantization or of sinks (quant.py, kvsink.py). It
stores no KV cache, because it always processes whole sequences. It does not train, and it never
executes code from a checkpoint.

Shapes: b sequences, n tokens, d hidden size, h query heads, h_kv Key/Value heads, d_k channels per
head.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

# --------------------------------------------------------------------------------------------------
# The decoder block, in parts that Algorithm 1 can call one by one


class Block(nn.Module):
    """One decoder block, Eq. 1-3."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.d_k = config.head_dim
        self.sliding_window = config.sliding_window
        self.LN_mhsa = RMSNorm(d, config.rms_norm_eps)
        self.W_q = nn.Linear(d, config.num_attention_heads * config.head_dim, bias=False)
        self.W_k = nn.Linear(d, config.d_kv, bias=False)
        self.W_v = nn.Linear(d, config.d_kv, bias=False)
        self.W_o = nn.Linear(config.num_attention_heads * config.head_dim, d, bias=False)
        self.LN_ffn = RMSNorm(d, config.rms_norm_eps)
        self.FFN = FFN(config)

    def forward(self, H, rope):
        """H^{l-1} -> H^l, both (b, n, d)."""
        Q, K, V = self.QKV(self.LN_mhsa(H))
        AV = attention(apply_rope(Q, rope), apply_rope(K, rope), V, self.sliding_window)
        H = self.W_o(AV) + H  # H^{l'}, Eq. 2
        return self.FFN(self.LN_ffn(H)) + H  # Eq. 1

    def QKV(self, X):
        """Return Queries (b, h, n, d_k), Keys and Values (b, h_kv, n, d_k), before RoPE, of
        X (b, n, d)."""
        heads = [W(X).unflatten(-1, (-1, self.d_k)) for W in (self.W_q, self.W_k, self.W_v)]
        return [X.transpose(1, 2) for X in heads]


def attention(Q, K, V, sliding_window=None):
    """Eq. 3 up to W_O: Softmax(Q K^T / sqrt(d_k) + M) V, causal.
    Q (b, h, n, d_k), K and V (b, h_kv, n, d_k) -> (b, n, h d_k)."""
    n = Q.shape[2]
    queries_per_head = Q.shape[1] // K.shape[1]  # query heads that share one Key and Value head
    K = K.repeat_interleave(queries_per_head, dim=1)
    V = V.repeat_interleave(queries_per_head, dim=1)
    M = None
    if sliding_window and n > sliding_window:
        M = causal_mask(n, sliding_window, Q.device)
    AV = F.scaled_dot_product_attention(Q, K, V, attn_mask=M, is_causal=M is None)
    return AV.transpose(1, 2).flatten(2)


def causal_mask(n, sliding_window, device):
    """Return a mask (n, n), True if query i (row) may attend to key j (column): j <= i and, if
    there is a window, i - j < sliding_window. (M of Eq. 3 is 0 there, and -inf elsewhere.)"""
    i = torch.arange(n, device=device)
    distance = i[:, None] - i[None, :]  # how many tokens the key lies before the query
    return (distance >= 0) & (distance < (sliding_window or n))


def apply_rope(X, rope):
    """Rotate Q or K (b, heads, n, d_k) by the angles of `rope`, which `rope_table` makes. It is
    computed in fp32 and rounded once, to the dtype of X."""
    cos, sin = rope
    first, second = X.float().chunk(2, dim=-1)
    return (X * cos + torch.cat((-second, first), dim=-1) * sin).to(X.dtype)


def rope_table(config, n, device):
    """Return cos and sin, each (n, d_k) in fp32, of the angle by which RoPE turns each pair of
    channels at each position."""
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)  # (d_k/2,)
    frequency = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_type == "linear":
        frequency = frequency / config.rope_factor
    elif config.rope_type == "llama3":
        # Fast pairs keep their frequency, slow ones are divided by the factor, and those between
        # are mixed. A pair's speed is its number of turns over the original context.
        turns = config.rope_original_context * frequency / (2 * math.pi)
        low = config.rope_low_freq_factor
        high = config.rope_high_freq_factor
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / config.rope_factor)
    angle = torch.outer(torch.arange(n, device=device, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)  # (n, d_k): channel i is paired with i + d_k/2
    return angle.cos(), angle.sin()


class FFN(nn.Module):
    """Eq. 4 without its residual: (sigma(X W_g) * X W_u) W_d. The input of W_d is X_d.in (Eq. 7),
    its output X_d.out (Eq. 8)."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        d_ffn = config.intermediate_size
        self.W_g = nn.Linear(d, d_ffn, bias=False)
        self.W_u = nn.Linear(d, d_ffn, bias=False)
        self.W_d = nn.Linear(d_ffn, d, bias=False)

    def forward(self, X):  # (b, n, d) -> (b, n, d)
        return self.W_d(F.silu(self.W_g(X)) * self.W_u(X))


class RMSNorm(nn.Module):
    """LN of Eq. 1-2, which in LLaMA is weight * x / rms(x). In fp32, because the outlier of a sink
    reaches thousands, and its square would overflow fp16."""

    def __init__(self, d, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, H):  # (b, n, d) -> (b, n, d)
        X = H.float()
        X = X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + self.eps)
        return X.to(H.dtype) * self.weight


# --------------------------------------------------------------------------------------------------
# The model


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
        H = self.embedding(tokens)  # H^0 (b, n, d)
        rope = rope_table(self.config, tokens.shape[1], tokens.device)
        for block in self.blocks:
            H = block(H, rope)
        return self.logits(H)

    def logits(self, H):  # H^L (b, n, d) -> (b, n, vocab)
        return self.W_vocab(self.LN_final(H))

    @property
    def device(self):
        return self.embedding.weight.device

    @property
    def dtype(self):
        return self.embedding.weight.dtype

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32):
        """Return a model from a Hugging Face directory: config.json and model.safetensors, or
        shards with their index. Weights go one by one from the memory-mapped file to the device, so
        there are never two copies of the model in memory. Raises FileNotFoundError or ValueError,
        naming file and tensor; all errors are raised before any weight is read."""
        model, places = locate_weights(directory)
        set_weights(model, read_weights(places, device, dtype))
        return tie_output_layer(model)


# --------------------------------------------------------------------------------------------------
# The configuration

# The supported types of RoPE, and the parameters of each: our name -> config.json's
ROPE_KEYS = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_context": "original_max_position_embeddings",
    },
}
# Parameters of RoPE that may also stand beside all others, outside of RoPE's own object
ROPE_KEYS_OUTSIDE = ("original_max_position_embeddings", "partial_rotary_factor")
# Keys that change what a model computes, and the only value of each that this file computes
PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "per_layer_config": None,
}

REQUIRED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int  # d
    intermediate_size: int  # d_ffn
    num_hidden_layers: int  # L
    num_attention_heads: int  # h
    num_key_value_heads: int  # h_kv; h_kv < h is Grouped-Query Attention
    head_dim: int  # d_k
    max_position_embeddings: int  # the longest sequence it was trained on
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0  # these four are used if ROPE_KEYS lists them for the type
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 1.0
    rope_original_context: float = 1.0
    sliding_window: int | None = None  # Mistral: how many tokens a token sees, itself included
    tie_word_embeddings: bool = False

    @property
    def d_kv(self):
        """The length of one token's Key vector, all heads together."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_pretrained(cls, directory):
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory}: no config.json, so this is not a model's directory"
            )
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or not supported
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw):
        """Return the configuration that a parsed config.json describes. Missing keys have the
        defaults of transformers. Raises ValueError, naming the field, for anything but a plain
        LLaMA or Mistral in full precision."""
        mistral = check_architecture(raw) == "mistral"
        rope = rope_parameters(raw)
        try:
            values = {name: raw[name] for name in REQUIRED_FIELDS}
            d = raw["hidden_size"]
            h = raw["num_attention_heads"]
            h_kv = raw.get("num_key_value_heads", 8 if mistral else None)
            head_dim = raw.get("head_dim")
            context = raw.get("max_position_embeddings", 131072 if mistral else 2048)
            rope.setdefault("original_max_position_embeddings", context)
            keys = ROPE_KEYS[rope["rope_type"]]
            values |= {ours: rope[theirs] for ours, theirs in keys.items()}
            values |= {
                "num_key_value_heads": h if h_kv is None else h_kv,
                "head_dim": d // h if head_dim is None else head_dim,
                "max_position_embeddings": context,
                "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
                "rope_type": rope["rope_type"],
                "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
                "sliding_window": raw.get("sliding_window", 4096) if mistral else None,
                "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            }
        except KeyError as missing:
            raise ValueError(f"it lacks {missing}") from None
        except (TypeError, ZeroDivisionError):
            raise ValueError("a required field is not a number, or is 0") from None
        config = cls(**values)
        check_fields(config)
        # transformers takes a Mistral with `layer_types` for another model, which mixes them.
        kind = "sliding_attention" if config.sliding_window else "full_attention"
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or any(other != kind for other in kinds):
            raise ValueError(f"layer_types is not supported unless all of them are {kind}")
        return config


def rope_parameters(raw):
    """Return all parameters of RoPE in a parsed config.json, a dict that has "rope_type".

    Several keys may say the same thing, and we follow transformers: `rope_scaling`, which people
    add by hand, goes before `rope_parameters` of newer files; `rope_type` before `type`; the
    original context outside of them before the one inside. Raises ValueError, naming the key, for
    what this file does not compute."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling {rope!r} is not supported: it has to be an object or null")
    rope_type = str(rope.get("rope_type", rope.get("type", "default")))
    if rope_type not in ROPE_KEYS:
        raise ValueError(
            f"rope type {rope_type!r} is not supported: only {', '.join(ROPE_KEYS)} are"
        )
    for name, value in rope.items():
        if isinstance(value, dict):  # the parameters of one type of layers
            raise ValueError(f"RoPE that differs between layers ({name}) is not supported")
    outside = {key: raw[key] for key in ROPE_KEYS_OUTSIDE if key in raw}
    rope = {**rope, **outside, "rope_type": rope_type}
    if rope.get("partial_rotary_factor", 1) not in (1, None):
        raise ValueError("partial_rotary_factor is not supported: all channels are rotated")
    return rope


def check_architecture(raw):
    """Return "llama" or "mistral". Raise ValueError for any other parsed config.json, and for what
    this file does not compute."""
    if not isinstance(raw, dict):
        raise ValueError("not a model's configuration")
    architecture = raw.get("architectures")
    if isinstance(architecture, list):
        architecture = architecture[0] if architecture else None
    # transformers goes by model_type. A checkpoint that calls itself two things is neither.
    names = [name for name in (architecture, raw.get("model_type")) if name] or [None]
    for name in names:
        if name not in ("LlamaForCausalLM", "MistralForCausalLM", "llama", "mistral"):
            raise ValueError(f"architecture {name!r} is not supported: only LLaMA and Mistral are")
    kinds = {name.lower().removesuffix("forcausallm") for name in names}
    if len(kinds) > 1:
        raise ValueError(f"architecture {names[0]} and model_type {names[1]} contradict each other")
    if method := raw.get("quantization_config"):
        if isinstance(method, dict):
            method = method.get("quant_method", "unnamed")
        raise ValueError(
            f"its weights are quantized ({method}): take the checkpoint in fp16, bf16 or fp32"
        )
    for key, plain in PLAIN.items():
        if (raw.get(key) or plain) != plain:
            raise ValueError(f"{key} {raw[key]!r} is not supported: only {plain!r} is")
    return kinds.pop()


def check_fields(config):
    """Raise ValueError, naming the field, if a value has the wrong type, if h is not a multiple of
    h_kv, or if d_k is odd."""
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
    h = config.num_attention_heads
    h_kv = config.num_key_value_heads
    d_k = config.head_dim
    if h % h_kv or d_k % 2:
        raise ValueError(
            f"{h} query heads, {h_kv} Key heads, {d_k} channels per head do not fit: query heads "
            "have to be a multiple of Key heads, and channels even"
        )


# --------------------------------------------------------------------------------------------------
# The checkpoint

# A parameter's name in this file -> its key in the checkpoint. {l} counts blocks from 0, as
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
    """Return a dict of all tensors of the model: checkpoint key -> parameter name."""
    names = {}
    for name, key in CHECKPOINT_KEYS.items():
        for l in range(config.num_hidden_layers if "{l}" in name else 1):
            names[key.format(l=l)] = name.format(l=l)
    return names


def weight_files(directory):
    """Return a dict: each safetensors file of a checkpoint -> the keys that its index lists for it
    (none without an index). Raises FileNotFoundError or ValueError."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.is_file():  # it comes before an index that lies beside it, as in transformers
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


def stored_names(directory):
    """Return a dict of all stored tensors but RoPE's frequencies: checkpoint key -> its file."""
    stored = {}
    for path, listed in weight_files(directory).items():
        with open_weights(path) as file:
            keys = file.keys()
        if missing := set(listed) - set(keys):
            raise ValueError(
                f"{path}: tensor {min(missing)} is missing, though the index says it is here"
            )
        stored |= dict.fromkeys(keys, path)
    # Old LLaMA files carry RoPE's frequencies: not needed.
    return {key: path for key, path in stored.items() if not key.endswith("rotary_emb.inv_freq")}


@contextmanager
def open_weights(path, device="cpu"):
    """Open a safetensors file. Raises ValueError if it is not a whole one."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def check_names(directory, config, stored):
    """Raise ValueError if the stored tensors are not those of the model, by name: this takes no
    time however many there are."""
    if "embed_tokens.weight" in stored:
        raise ValueError(
            f"{directory}: a LlamaModel without its output layer: save the LlamaForCausalLM instead"
        )
    if config.num_hidden_layers > len(stored):  # before all names are listed
        raise ValueError(
            f"{directory}: config.json has more blocks than there are tensors ({len(stored)})"
        )
    names = checkpoint_names(config)
    if unexpected := stored.keys() - names.keys():
        key = min(unexpected)
        raise ValueError(
            f"{stored[key]}: tensor {key} is unexpected: this model has none of that name"
        )
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := names.keys() - stored.keys() - optional:
        raise ValueError(f"{directory}: tensor {min(missing)} is missing ({len(missing)} in all)")


def check_tensors(path, keys, shapes):
    """Raise ValueError if a tensor of a file has another shape than that in `shapes`, a dict, or a
    dtype that is not read."""
    with open_weights(path) as file:
        for key in sorted(keys):
            tensor = file.get_slice(key)
            shape = tuple(tensor.get_shape())
            if shape != shapes[key]:
                raise ValueError(
                    f"{path}: tensor {key} has shape {shape}, config.json asks for {shapes[key]}"
                )
            if tensor.get_dtype() not in ("F32", "F16", "BF16"):
                raise ValueError(
                    f"{path}: tensor {key} is stored as {tensor.get_dtype()}: only F32, F16 and "
                    "BF16 are read"
                )


def checkpoint_shapes(config):
    """Return a dict of all tensors of the model: checkpoint key -> shape."""
    with torch.device("meta"):  # shapes without storage; one block has the shapes of all
        model = Llama(replace(config, num_hidden_layers=1))
    shapes = {}
    for name, key in CHECKPOINT_KEYS.items():
        shape = tuple(model.get_parameter(name.format(l=0)).shape)
        for l in range(config.num_hidden_layers if "{l}" in name else 1):
            shapes[key.format(l=l)] = shape
    return shapes


def locate_weights(directory):
    """Return a model without weights, and a dict: parameter name -> file and key of its tensor.
    Check all tensors and read none. Raises FileNotFoundError or ValueError."""
    directory = Path(directory)
    config = LlamaConfig.from_pretrained(directory)
    stored = stored_names(directory)
    check_names(directory, config, stored)
    shapes = checkpoint_shapes(config)
    for path in sorted(set(stored.values())):
        check_tensors(path, [key for key in stored if stored[key] == path], shapes)
    with torch.device("meta"):
        model = Llama(config)
    names = checkpoint_names(config)
    return model, {names[key]: (stored[key], key) for key in sorted(stored)}


def read_weights(places, device, dtype, prefixes=("",)):
    """Yield the name and the weight of each parameter in `places` whose name begins with one of
    `prefixes`."""
    for name, (path, key) in places.items():
        if name.startswith(prefixes):
            with open_weights(path, device) as file:
                yield name, file.get_tensor(key).to(dtype)


def set_weights(module, weights):
    for name, weight in weights:
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(weight, requires_grad=False)
        setattr(module.get_submodule(path), leaf, parameter)


def tie_output_layer(model):
    """Let the output layer share the embedding's storage if config.json ties them; if the
    checkpoint stores a different output layer, that one is used. Return the model, ready to run."""
    W = model.W_vocab.weight
    E = model.embedding.weight
    if model.config.tie_word_embeddings and (W.is_meta or torch.equal(W, E)):
        model.W_vocab.weight = E
    return model.requires_grad_(False).eval()
