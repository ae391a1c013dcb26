"""Scenarios: what the tests do with your functions. A scenario takes plain values, makes tensors of
them, calls one assigned function, and returns plain values. No test and no answer is here."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import kvsink
import llama
import quant


def tensor(x):
    return torch.tensor(x) if isinstance(x, np.ndarray) else x


def plain(x):
    """Return a value with all of its tensors as arrays, half precision as float32."""
    if isinstance(x, torch.Tensor):
        return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()
    if isinstance(x, dict):
        return {key: plain(part) for key, part in x.items()}
    return [plain(part) for part in x] if isinstance(x, (list, tuple)) else x


def value_error(function, *arguments):
    """Return the name and the text of the ValueError that a call raises, or None if it raises
    none."""
    try:
        function(*arguments)
    except ValueError as error:
        return [type(error).__name__, str(error)]


def refused(name, *arguments):
    """Return the same for the call of a scenario."""
    return value_error(globals()[name], *arguments)


# --------------------------------------------------------------------------------------------------
# Problems 1 and 2: quant.py


def equation(name, *arguments):
    """Call scale, zero, quantize or dequantize with arrays."""
    return plain(getattr(quant, name)(*map(tensor, arguments)))


def groups(X, granularity, group_size, fill):
    """Return the grouped X, and the axes of a group counted from the last."""
    Xg, axes = quant.grouped(tensor(X), granularity, group_size, fill)
    return plain([Xg, sorted(axis % Xg.ndim - Xg.ndim for axis in axes)])


def ranges(X, granularity, group_size, options):
    """Call clipped_range; `options` are its other arguments, by name."""
    options = {name: tensor(x) for name, x in options.items()}
    if "axes" in options:
        options["axes"] = tuple(options["axes"])
    return plain(quant.clipped_range(tensor(X), granularity, group_size, **options))


def calibrated(granularity, group_size, options, batches, dtype="float32"):
    """Return lo and hi of a static quantizer that is calibrated on `batches`, pairs of X and
    leave_out, and the dtype of lo."""
    quantizer = quant.Quantizer(4, granularity, group_size, static=True, **options)
    for X, leave_out in batches:
        quantizer.calibrate(tensor(X).to(getattr(torch, dtype)), tensor(leave_out))
    return plain([quantizer.lo, quantizer.hi, str(quantizer.lo.dtype)])


# --------------------------------------------------------------------------------------------------
# Problem 3: llama.py

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def rope(config, n):
    """Return RoPE's table for n tokens; `config` has further keys of config.json."""
    config = llama.LlamaConfig.from_dict({**CONFIG, **config})
    return plain(llama.rope_table(config, n, torch.device("cpu")))


def rotated(X, cos, sin, dtype="float32"):
    """Return what apply_rope makes of X, and its dtype."""
    X = tensor(X).to(getattr(torch, dtype))
    X = llama.apply_rope(X, (tensor(cos), tensor(sin)))
    return plain([X, str(X.dtype)])


def mask(n, window):
    return plain(llama.causal_mask(n, window, torch.device("cpu")))


def attended(Q, K, V, window):
    return plain(llama.attention(tensor(Q), tensor(K), tensor(V), window))


# --------------------------------------------------------------------------------------------------
# Problem 4: kvsink.py, with parts so simple that one can follow them by hand


def through_block(H, S_sink):
    """Run decoder_block on a block of simple parts, and return what each part was given.

    LN_mhsa adds 1. Q is X, K is 10 X, V is 100 X, in heads of two channels (or one head, if H has
    one channel). RoPE adds 0.5. To quantize is to change the sign. Attention is K + V. W_o doubles.
    LN_ffn triples. The FFN adds 7.
    """
    seen = {}
    d_k = min(2, H.shape[2])

    def heads(X):
        return X.unflatten(-1, (-1, d_k)).transpose(1, 2)

    def quantizer(name):
        def quantize(X, leave_out):
            seen[name] = [X, leave_out.expand_as(X)]
            return -X

        return quantize

    def attention(Q, K, V, sliding_window=None):
        seen["attention"] = [Q, K, V, sliding_window]
        return (K + V).transpose(1, 2).flatten(2)

    block = SimpleNamespace(
        LN_mhsa=lambda H: H + 1,
        QKV=lambda X: [heads(X), heads(10 * X), heads(100 * X)],
        W_o=lambda A: 2 * A,
        LN_ffn=lambda H: 3 * H,
        FFN=lambda X: X + 7,
        sliding_window=4,
    )
    parts = {"attention": attention, "apply_rope": lambda X, rope: X + rope}
    quantizers = (quantizer("quantize_K"), quantizer("quantize_V"))
    with patch.multiple(kvsink, **parts), patch.multiple(llama, **parts):
        seen["H"] = kvsink.decoder_block(block, tensor(H), tensor(S_sink), *quantizers, 0.5)
    return plain(seen)


def predicted(H, c, k):
    return plain(kvsink.predict_sinks(tensor(H), c, k))


def prefill_rule(H, steps, rule):
    """Run prefill on a model whose block l adds steps[l - 1] to H; `rule` has l_E, c, k and S_sink,
    by name. Return H^L, the tokens kept after the last block, and what the step was given in each
    block."""
    seen = {"block": [], "S_sink": [], "quantizers": [], "rope": []}

    def step(block, H, S_sink, quantize_K, quantize_V, rope):
        seen["block"].append(block)
        seen["S_sink"].append(S_sink.clone())
        seen["quantizers"].append([quantize_K, quantize_V])
        seen["rope"].append(rope)
        return H + tensor(steps[block - 1])

    model = SimpleNamespace(config="config", blocks=list(range(1, len(steps) + 1)))
    quantizers = [(f"K{l}", f"V{l}") for l in model.blocks]
    options = {name: tensor(x) for name, x in rule.items()}
    with patch.object(kvsink, "rope_table", lambda config, n, device: f"{config}, {n} tokens"):
        H, S_sink = kvsink.prefill(model, tensor(H), quantizers, step=step, **options)
    return plain({**seen, "H": H, "kept": S_sink})


def first(H, N):
    return plain(kvsink.pfn(tensor(H), N))


def observed(schemes, L, X, leave_out, broken=None):
    """Call observers for this number of schemes, each of L blocks, with Keys l X and Values -l X in
    block l. Return what `calibrate` of each quantizer was given, and what the observers returned.
    The quantizers of block `broken` raise NotFinite."""
    seen = {}

    def quantizer(name, l):
        def calibrate(X, leave_out=None):
            if l == broken:
                raise quant.NotFinite("NaN or inf")
            seen[name] = [X, leave_out]

        return SimpleNamespace(calibrate=calibrate)

    X = tensor(X)
    leave_out = tensor(leave_out)
    blocks = range(1, L + 1)
    made = {
        i: [(quantizer(f"{i} {l} K", l), quantizer(f"{i} {l} V", l)) for l in blocks]
        for i in range(schemes)
    }
    pairs = kvsink.observers(made.values())
    returned = [
        [K(l * X, leave_out), V(-l * X, leave_out)] for l, (K, V) in zip(blocks, pairs, strict=True)
    ]
    return plain([seen, returned])


def observers_refused(L, broken):
    X = np.ones((1, 1, 2, 2), np.float32)
    return value_error(observed, 1, L, X, np.zeros((1, 1, 2, 1), bool), broken)


# --------------------------------------------------------------------------------------------------
# Problem 5: the finder


class Scripted(nn.Module):
    """A model whose hidden states H^1 to H^L, each (n, d), are given."""

    def __init__(self, states):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in states)
        self.states = states

    def forward(self, tokens):
        for block, H in zip(self.blocks, self.states):
            block(H[None])


def outliers(states):
    """Return l_E, channels and magnitudes; the error, or None; and how many hooks are left on the
    model."""
    model = Scripted(tensor(states))
    tokens = torch.zeros(1, states.shape[1], dtype=torch.int64)
    found = []
    error = value_error(lambda: found.extend(plain(tuple(kvsink.stable_outliers(model, tokens)))))
    return [found, error, sum(len(block._forward_hooks) for block in model.blocks)]


def site(found):
    """Call find_site with one prompt for each item of `found`, which says what that prompt shows.
    Return the site; the error, or None; and the tokens that stable_outliers was given."""
    seen = []
    replies = iter(found)
    out = []

    def stable_outliers(model, tokens):
        seen.append(tokens.tolist())
        l_E, channels, magnitudes = next(replies)
        return kvsink.Outliers(l_E, tuple(channels), tuple(magnitudes))

    embedding = SimpleNamespace(weight=torch.zeros(1))
    model = SimpleNamespace(embedding=embedding, device=torch.device("cpu"), dtype=torch.float32)
    prompts = [[i, i + 1, i + 2] for i in range(len(found))]
    with patch.object(kvsink, "stable_outliers", stable_outliers):
        error = value_error(lambda: out.extend(plain(tuple(kvsink.find_site(model, prompts)))))
    return [out, error, seen]


# --------------------------------------------------------------------------------------------------
# Problem 6: paper/kvcache.py


def packed(codes, bits):
    from paper import kvcache

    return plain(kvcache.pack(tensor(codes), bits))


def unpacked(codes, bits):
    from paper import kvcache

    return plain(kvcache.unpack(tensor(codes), bits))


def sliced(codes, bits):
    """Return start, stop, codes and dtype of each slice."""
    from paper import kvcache

    slices = kvcache.slices(tensor(codes), bits)
    return plain([[at.start, at.stop, part, str(part.dtype)] for at, part in slices])


class Sparse:
    """Outliers in place of KVQuant's: they add 1000 to each score."""

    @staticmethod
    def add_to_scores(S, Q, rope, store):
        return S + 1000


def scored(stored, Q, slot, rope=None):
    """Return the scores (b, h_kv, G, n) of the queries Q, whose tokens are in `slot` (b, 1).
    `stored` has codes, bits, scale and zero and, if there are any, the Keys of the newest group
    (b, h_kv, g, d_k) as `residual`, and `sparse` outliers."""
    from paper import kvcache

    def decode(codes, s, z):
        return s.float() * (codes - z.float())

    residual = tensor(stored.get("residual"))
    store = object.__new__(kvcache.PackedStore)
    store.quantizer = SimpleNamespace(bits=stored["bits"], decode=decode)
    store.codes = tensor(stored["codes"])
    store.parameters = [tensor(stored["scale"]), tensor(stored["zero"])]
    store.static = False
    store.d_k = Q.shape[-1]
    store.g = 1 if residual is None else residual.shape[2]
    store.residual = residual
    store.outliers = Sparse() if stored.get("sparse") else None
    S = store.scores(tensor(Q), rope and tuple(map(tensor, rope)), tensor(slot))
    return plain(torch.stack(list(S), dim=2))
