"""The LLaMA transformer of Section 2, from scratch: configuration, forward pass, weights, tokenizer.

Read top to bottom: LlamaConfig, then RMSNorm, RoPE and attention (Eq. 3), the FFN (Eq. 4), the decoder block
(Eq. 1-2), the model, the loading of safetensors, at once or block by block, and last the tokenizer that turns text into
token ids.

What this file does not do: it knows nothing of quantization or of sinks (that is quant.py and kvsink.py), it keeps no
KV cache between calls (a prefill needs none), it does not train, and it runs no code out of a checkpoint.

Shapes: b sequences, n tokens, d hidden size, h query heads, h_kv Key/Value heads, d_k channels a head.
"""

import base64
import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import regex
import sentencepiece
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

ROPE_KEYS = {  # the rope types there are, and what each needs: our name -> config.json's
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_context": "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model, under the names of Hugging Face's config.json; `from_dict` says what it refuses."""

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
    sliding_window: int | None = None  # Mistral: a token sees itself and the window - 1 tokens before it
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw):
        """`raw` is a parsed config.json. Raises ValueError, by name, for what is not a plain LLaMA or Mistral."""
        if not isinstance(raw, dict):
            raise ValueError("not a model's configuration")
        architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
        if architecture not in ("LlamaForCausalLM", "MistralForCausalLM", "llama", "mistral"):
            raise ValueError(f"architecture {architecture!r} is not supported: only LLaMA and Mistral are")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported: only 'silu' is")
        for bias in ("attention_bias", "mlp_bias"):
            if raw.get(bias):
                raise ValueError(f"{bias} is not supported: LLaMA's projections have none")
        # Newer files keep all of RoPE in `rope_parameters`, older ones in `rope_scaling` and `rope_theta`.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling {rope!r} is not supported: it has to be an object or null")
        rope_type = str(rope.get("rope_type", rope.get("type", "default")))
        if rope_type not in ROPE_KEYS:
            raise ValueError(f"rope type {rope_type!r} is not supported: only {', '.join(ROPE_KEYS)} are")
        try:
            rope_numbers = {ours: float(rope[theirs]) for ours, theirs in ROPE_KEYS[rope_type].items()}
            d, h = raw["hidden_size"], raw["num_attention_heads"]
            config = cls(
                vocab_size=raw["vocab_size"],
                hidden_size=d,
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=h,
                num_key_value_heads=raw.get("num_key_value_heads") or h,
                head_dim=raw.get("head_dim") or d // h,
                max_position_embeddings=raw["max_position_embeddings"],
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta") or 10000.0)),
                rope_type=rope_type,
                **rope_numbers,
                # LLaMA has no window, whatever its file says; Mistral's file may say null.
                sliding_window=raw.get("sliding_window") if architecture.lower().startswith("mistral") else None,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
            )
        except KeyError as missing:
            raise ValueError(f"it lacks {missing}") from None
        except (TypeError, ZeroDivisionError):
            raise ValueError("one of its numbers is none") from None
        for field in fields(config):
            value = getattr(config, field.name)
            whole = field.type is int or field.name == "sliding_window" and value is not None
            if whole and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{field.name} is {value!r}, which is not a positive whole number")
        if h % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(f"{h} query heads, {config.num_key_value_heads} Key heads of {config.head_dim} do not fit")
        return config

    @classmethod
    def from_pretrained(cls, directory):
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory}: no config.json, so this is not a model's directory")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:  # not JSON, not UTF-8, or refused by name above
            raise ValueError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a decoder block, laid out so that Algorithm 1 can call them one by one


class RMSNorm(nn.Module):
    """LN of Eq. 1-2. LLaMA's is x / rms(x), in fp32: a sink reaches thousands, and the square would overflow fp16."""

    def __init__(self, d, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d))

    def forward(self, H):  # (b, n, d) -> (b, n, d)
        X = H.float()
        X = X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + self.eps)
        return X.to(H.dtype) * self.weight


def rope_table(config, n, device):
    """cos and sin of the angle by which RoPE turns each pair of channels at each position, fp32, each (n, d_k)."""
    d_k = config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, d_k, 2, device=device, dtype=torch.float32) / d_k)  # (d_k/2,)
    if config.rope_type == "linear":
        frequency = frequency / config.rope_factor
    elif config.rope_type == "llama3":
        # Fast pairs keep their frequency, slow ones are divided by the factor, those between are mixed.
        turns = config.rope_original_context * frequency / (2 * math.pi)  # over the context the model was trained at
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / config.rope_factor)
    angle = torch.outer(torch.arange(n, device=device, dtype=torch.float32), frequency)  # (n, d_k/2)
    angle = torch.cat((angle, angle), dim=-1)  # (n, d_k): channel i is paired with channel i + d_k/2
    return angle.cos(), angle.sin()


def rotate(X, rope):
    """RoPE on Q or K, (b, heads, n, d_k) -> the same; `rope` is the table above."""
    cos, sin = rope
    first, second = X.float().chunk(2, dim=-1)
    return (X * cos + torch.cat((-second, first), dim=-1) * sin).to(X.dtype)


def causal(n, sliding_window, device):
    """M of Eq. 3 as a mask (n, n): True where query t sees key i, itself and those before it, or a window of them."""
    i = torch.arange(n, device=device)
    age = i[:, None] - i[None, :]  # how many tokens ago the query saw the key
    return (age >= 0) & (age < (sliding_window or n))


def attention(Q, K, V, sliding_window=None):
    """Softmax(Q K^T / sqrt(d_k) + M) V of Eq. 3, causal. Q (b, h, n, d_k), K, V (b, h_kv, n, d_k) -> (b, n, h d_k)"""
    n, group = Q.shape[2], Q.shape[1] // K.shape[1]
    K, V = K.repeat_interleave(group, dim=1), V.repeat_interleave(group, dim=1)  # each K and V serves `group` queries
    if sliding_window is None or n <= sliding_window:
        A = F.scaled_dot_product_attention(Q, K, V, is_causal=True)
    else:
        A = F.scaled_dot_product_attention(Q, K, V, attn_mask=causal(n, sliding_window, Q.device))
    return A.transpose(1, 2).flatten(2)


class FFN(nn.Module):
    """Eq. 4: (sigma(X W_g) * X W_u) W_d. The input of W_d is X_d.in (Eq. 7), its output X_d.out (Eq. 8)."""

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
        """Queries, Keys and Values before RoPE: (b, n, d) -> (b, h, n, d_k), (b, h_kv, n, d_k), (b, h_kv, n, d_k)."""
        return [W(X).unflatten(-1, (-1, self.d_k)).transpose(1, 2) for W in (self.W_q, self.W_k, self.W_v)]

    def forward(self, H, rope):
        """H^{l-1} -> H^l, both (b, n, d)."""
        Q, K, V = self.QKV(self.LN_mhsa(H))
        A = attention(rotate(Q, rope), rotate(K, rope), V, self.sliding_window)
        H = self.W_o(A) + H  # H^{l'}, Eq. 2
        return self.FFN(self.LN_ffn(H)) + H  # Eq. 1


class StreamedBlocks(nn.ModuleList):
    """Blocks that stay on disk. A loop over them, forwards or backwards, reads each block when its turn comes and drops
    it afterwards, so that one at a time is in memory; by its index a block is there without its weights.

    read    a function that gives block l, counted from 0, its weights
    """

    def __init__(self, blocks, read):
        super().__init__(blocks)
        self.read = read

    def walk(self, order):
        """The blocks in the order of these numbers, from 0."""
        for l in order:
            try:
                self.read(l)
                yield self[l]
            finally:  # also where the loop is left early
                self[l].to("meta")

    def __iter__(self):
        return self.walk(range(len(self)))

    def __reversed__(self):
        return self.walk(reversed(range(len(self))))


class Llama(nn.Module):
    """The whole decoder: embedding, L blocks, final norm, output layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.LN_final = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.W_vocab = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.W_vocab.weight = self.embedding.weight

    def forward(self, tokens):
        """tokens (b, n) int64 -> logits (b, n, vocab)."""
        H = self.embedding(tokens)  # H^0 (b, n, d)
        rope = rope_table(self.config, tokens.shape[1], tokens.device)
        for block in self.blocks:
            H = block(H, rope)
        return self.logits(H)

    def logits(self, H):
        """H^L (b, n, d) -> logits (b, n, vocab)."""
        return self.W_vocab(self.LN_final(H))

    @classmethod
    def from_pretrained(cls, directory, device="cpu", dtype=torch.float32, stream=False):
        """A model from a Hugging Face directory: config.json and model.safetensors, or shards with their index.

        Tensor by tensor from the memory-mapped file to the device: never two copies of the model in memory; with
        `stream` never more of it than one block, and what is outside the blocks.
        Raises FileNotFoundError or ValueError, naming file and tensor, where one is missing, unexpected, of another
        shape, or cannot be read; all are looked at before the first is read.
        """
        config = LlamaConfig.from_pretrained(directory)
        with torch.device("meta"):  # shapes without storage
            model = cls(config)
        places = locate_weights(model, Path(directory))
        read = functools.partial(read_weights, model, places, device, dtype)
        if stream:
            model.blocks = StreamedBlocks(model.blocks, lambda l: read(f"blocks.{l}."))
        read(("embedding.", "LN_final.", "W_vocab.") if stream else "")
        if config.tie_word_embeddings:
            model.W_vocab.weight = model.embedding.weight
        return model.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Weights

# The paper's name (as in this file) -> the checkpoint's key. {l} counts blocks from 0, as checkpoints do.
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
    names = {}
    for ours, theirs in CHECKPOINT_KEYS.items():
        for l in range(config.num_hidden_layers if "{l}" in ours else 1):
            names[theirs.format(l=l)] = ours.format(l=l)
    if config.tie_word_embeddings:
        del names["lm_head.weight"]
    return names


def weight_files(directory):
    """Every safetensors file of a checkpoint -> the keys its index says it holds (None where there is no index)."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
        return {single: None}
    files = {}
    try:
        for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(directory / Path(name).name, []).append(key)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index}: not a safetensors index (no readable weight_map)") from None
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: this shard is listed in {index.name} but is not there")
    return files


def locate_weights(model, directory):
    """Parameter -> its file and its key there, for every tensor of the model: all checked, none read."""
    names, places = checkpoint_names(model.config), {}
    for path, expected in weight_files(directory).items():
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                if lost := set(expected or ()) - keys:
                    raise ValueError(f"tensor {min(lost)} is missing, though the index says it is here")
                for key in sorted(keys):
                    # Old LLaMA files carry RoPE's frequencies, tied models sometimes the embedding twice: not needed.
                    if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and key not in names):
                        continue
                    if key not in names:
                        raise ValueError(f"tensor {key} is unexpected: this model has none of that name")
                    check_tensor(key, file.get_slice(key), model.get_parameter(names[key]).shape)
                    places[names[key]] = path, key
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if missing := {key for key, name in names.items() if name not in places}:
        raise ValueError(f"{directory}: tensor {min(missing)} is missing ({len(missing)} in all)")
    return places


def check_tensor(key, stored, shape):
    if tuple(stored.get_shape()) != tuple(shape):
        raise ValueError(f"tensor {key} has shape {tuple(stored.get_shape())}, config.json asks for {tuple(shape)}")
    if stored.get_dtype() not in ("F32", "F16", "BF16"):
        raise ValueError(f"tensor {key} is stored as {stored.get_dtype()}: only F32, F16 and BF16 are read")


def read_weights(model, places, device, dtype, prefix=""):
    """Give the parameters whose names begin so (a str or several) the weights that `locate_weights` found for them."""
    wanted = {}
    for name, (path, key) in places.items():
        if name.startswith(prefix):
            wanted.setdefault(path, []).append((name, key))
    for path, tensors in wanted.items():
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name, key in tensors:
                module, _, leaf = name.rpartition(".")
                weight = nn.Parameter(file.get_tensor(key).to(dtype), requires_grad=False)
                setattr(model.get_submodule(module), leaf, weight)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# How each family cuts text into words before byte-pair encoding merges within them.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 isolates every digit first and cuts what lies between with GPT-2's pattern. In one pattern: a digit stands
# alone, and spaces that run into a digit stay together ("a  5" is "a", "  ", "5").
SMOLLM_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Tokenizer:
    """Text to token ids and back, exactly as the model's own tokenizer: each file format is read as its owner reads it.

    tokenizer.model, SentencePiece    LLaMA-2, Mistral           text that looks like a special token stays text
    tokenizer.model, tiktoken format  LLaMA-3, as Meta ships it  the same
    tokenizer.json, byte-level BPE    LLaMA-3 family, SmolLM2    special tokens written out in the text are recognised

    `bos` is the id that the model's tokenizer puts before every text (None where it puts none, as SmolLM2's), `eot` the
    id that ends a document, by which documents are packed end to end, `ends` all ids that end what a model says.
    """

    def __init__(self, encode, decode, bos, eot, turn=None):
        self._encode, self.decode, self.bos, self.eot = encode, decode, bos, eot
        self.ends = {eot, turn} - {None}

    def encode(self, text, bos=True):
        """Token ids, a list of int. With `bos`, the begin-of-sequence id goes first where the model has one."""
        ids = self._encode(text)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    @classmethod
    def from_pretrained(cls, directory):
        """Raises FileNotFoundError where there is no tokenizer, ValueError for one of another kind."""
        model, bpe = Path(directory) / "tokenizer.model", Path(directory) / "tokenizer.json"
        for path, read in ((model, tokenizer_from_model), (bpe, tokenizer_from_json)):
            if path.is_file():
                try:
                    return cls(*read(path))
                except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
                    raise ValueError(f"{path}: not a tokenizer this project reads ({error})") from None
        raise FileNotFoundError(f"{directory}: no tokenizer.model and no tokenizer.json")


def tokenizer_from_model(path):
    try:  # tiktoken's format: a line for each token, its bytes in base64 and its rank
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:  # not that, so it should be SentencePiece's protocol buffer
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        decode = decoder(processor, range(processor.get_piece_size()))
        return processor.encode, decode, processor.bos_id(), processor.eos_id()
    check_ranks(ranks)
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    coding = tiktoken.Encoding("llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=special)
    decode = decoder(coding, {*ranks.values(), *special.values()})
    return coding.encode_ordinary, decode, special["<|begin_of_text|>"], special["<|end_of_text|>"]


def decoder(coding, known):
    """Ids to text. A model may have more ids than its tokenizer, to make a round number: these have no text."""
    return lambda ids: coding.decode([i for i in ids if i in known])


def check_ranks(ranks):
    """tiktoken takes what it gets: a file cut short would shift every special token, or end the process."""
    if any(bytes([byte]) not in ranks for byte in range(256)) or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("it is cut short: bytes or ranks are missing")


def tokenizer_from_json(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    model, added = raw["model"], {token["content"]: token["id"] for token in raw["added_tokens"]}
    if model["type"] != "BPE" or model.get("byte_fallback") or raw.get("normalizer"):
        raise ValueError("only byte-level BPE is read from a tokenizer.json")
    if any(token.get(flag) for token in raw["added_tokens"] for flag in ("lstrip", "rstrip", "single_word")):
        raise ValueError("an added token strips its surroundings")
    to_byte = {char: byte for byte, char in enumerate(byte_characters())}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in model["vocab"].items() if token not in added}
    # tiktoken merges the pair whose result has the lowest id, the original the pair that stands first in its list of
    # merges: the same thing where, as in every file that this was made for, the list is in the order of the ids.
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ids = [model["vocab"][left + right] for left, right in pairs]
    # And it takes a whole word that is in the vocabulary at once, as the original does if it may `ignore_merges`, and
    # else arrives at by merging, provided that every token has a merge.
    unmerged = {i for token, i in ranks.items() if len(token) > 1} - set(ids)
    if ids != sorted(ids) or (unmerged and not model.get("ignore_merges")):
        raise ValueError("its merges are not in the order of its vocabulary, or do not make all of it")
    # A byte that the vocabulary lacks (SmolLM2's lacks 0x04) gets an id beyond the vocabulary, by which it is noticed.
    lost = [byte for byte in range(256) if bytes([byte]) not in ranks]
    top = max(model["vocab"].values(), default=0)
    unused = {bytes([byte]): max([top, *added.values()]) + 1 + byte for byte in lost}
    words = word_pattern(raw)
    coding = tiktoken.Encoding("bpe", pat_str=words, mergeable_ranks=ranks | unused, special_tokens=added)
    # The template of the post-processor says whether a text begins with a special token.
    processor = raw.get("post_processor") or {"processors": []}
    templates = [p["single"] for p in processor.get("processors", [processor]) if p["type"] == "TemplateProcessing"]
    first = templates[0][0].get("SpecialToken", {}).get("id") if templates else None
    eot = next((added[name] for name in ("<|endoftext|>", "<|end_of_text|>") if name in added), None)

    def encode(text):
        ids = coding.encode(text, allowed_special="all")
        if not lost or max(ids, default=0) <= top:
            return ids
        # The original drops such bytes after cutting the text into words, so that merges reach across the gap.
        ids, never = [], "(?!)"
        for part in regex.split("(" + ("|".join(map(regex.escape, added)) or never) + ")", text):
            for word in [part] if part in added else regex.findall(words, part):
                if word in added:
                    ids.append(added[word])
                elif left := bytes(byte for byte in word.encode() if byte not in lost):
                    ids += coding._encode_single_piece(left)
        return ids

    turn = next((added[name] for name in ("<|im_end|>", "<|eot_id|>") if name in added), None)  # of a chat
    return encode, decoder(coding, {*ranks.values(), *added.values()}), added.get(first), eot, turn


def word_pattern(raw):
    """The regular expression that a tokenizer.json's pre-tokenizer amounts to."""
    steps = raw["pre_tokenizer"].get("pretokenizers", [raw["pre_tokenizer"]])
    if any(step.get("add_prefix_space") for step in steps):
        raise ValueError("it puts a space before the text")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_WORDS
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return SMOLLM_WORDS
    if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[1].get("use_regex", True):
        return steps[0]["pattern"]["Regex"]
    raise ValueError(f"its pre-tokenizer {kinds} is unknown")


def byte_characters():
    """The 256 printable characters by which byte-level BPE writes the bytes 0 to 255 (GPT-2's table)."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))  # the bytes that do not print get the characters after the first 256
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
