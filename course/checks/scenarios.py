"""What the tests do with your functions: each scenario takes plain values, makes tensors of them,
calls one assigned function, and returns plain values. No test and no answer is here."""

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
    """Tensors as arrays, in whatever lies around them; half precision as float32."""
    if isinstance(x, torch.Tensor):
        return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()
    if isinstance(x, dict):
        return {key: plain(part) for key, part in x.items()}
    return [plain(part) for part in x] if isinstance(x, (list, tuple)) else x


def refused(function, *arguments):
    """The name and text of the ValueError that a call raises; None where it raises none."""
    try:
        function(*arguments)
    except ValueError as error:
        return [type(error).__name__, str(error)]


# --------------------------------------------------------------------------------------------------
# Problems 1 and 2: quant.py


def equation(name, *arguments):
    """scale, zero, quantize or dequantize of arrays."""
    return plain(getattr(quant, name)(*map(tensor, arguments)))


def groups(X, granularity, group_size, fill):
    Xg, axes = quant.grouped(tensor(X), granularity, group_size, fill)
    return plain([Xg, sorted(axis % Xg.ndim - Xg.ndim for axis in axes)])


def groups_refused(X, granularity, group_size):
    return refused(quant.grouped, tensor(X), granularity, group_size)


def ranges(X, granularity, group_size, how):
    """`how` are clipped_range's other arguments, by name."""
    how = {name: tuple(x) if name == "axes" else tensor(x) for name, x in how.items()}
    return plain(quant.clipped_range(tensor(X), granularity, group_size, **how))


def calibrated(granularity, group_size, how, seen, dtype="float32"):
    """lo and hi of a static quantizer that has seen pairs of X and leave_out; and their dtype."""
    quantizer = quant.Quantizer(4, granularity, group_size, static=True, **how)
    for X, leave_out in seen:
        quantizer.calibrate(tensor(X).to(getattr(torch, dtype)), tensor(leave_out))
    return plain([quantizer.lo, quantizer.hi, str(quantizer.lo.dtype)])


def calibration_refused(X):
    return refused(quant.Quantizer(4, "token", static=True).calibrate, tensor(X))


# --------------------------------------------------------------------------------------------------
# Problem 3: llama.py

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def rope(config, n):
    """The table for a config.json that has these keys more."""
    return plain(
        llama.rope_table(llama.LlamaConfig.from_dict({**SHAPE, **config}), n, torch.device("cpu"))
    )


def rotated(X, cos, sin, dtype="float32"):
    """What comes back, and its dtype."""
    out = llama.apply_rope(tensor(X).to(getattr(torch, dtype)), (tensor(cos), tensor(sin)))
    return plain([out, str(out.dtype)])


def mask(n, window):
    return plain(llama.causal_mask(n, window, torch.device("cpu")))


def attended(Q, K, V, window):
    return plain(llama.attention(tensor(Q), tensor(K), tensor(V), window))


# --------------------------------------------------------------------------------------------------
# Problem 4: kvsink.py, with parts so simple that one can follow them by hand


def through_block(H, S_sink, pre_rope):
    """decoder_block with h = h_kv = H's third axis / 2 heads of 2 channels, or one head where there
    is one channel. Its parts: LN_mhsa adds 1; Q is X, K is 10 X, V is 100 X; RoPE adds 0.5; to
    quantize is to change the sign; attention is K + V; W_o doubles; LN_ffn triples; the FFN adds 7.
    Returns what each part was given."""
    seen, d_k = {}, min(2, H.shape[2])

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
    with patch.multiple(kvsink, **parts), patch.multiple(llama, **parts):
        quantizers = quantizer("quantize_K"), quantizer("quantize_V")
        seen["H"] = kvsink.decoder_block(
            block, tensor(H), tensor(S_sink), *quantizers, 0.5, pre_rope
        )
    return plain(seen)


def predicted(H, c, k):
    return plain(kvsink.predict_sinks(tensor(H), c, k))


def algorithm_1(H, steps, S_sink=None, **rule):
    """prefill of a model whose block l adds steps[l - 1] to H. Returns what the step was given in
    each block."""
    seen = {"block": [], "S_sink": [], "cache": [], "rope": [], "pre_rope": []}

    def step(block, H, S_sink, quantize_K, quantize_V, rope, pre_rope=False):
        given = (block, S_sink.clone(), [quantize_K, quantize_V], rope, pre_rope)
        for name, what in zip(seen, given):
            seen[name].append(what)
        return H + tensor(steps[block - 1])

    L = len(steps)
    model = SimpleNamespace(config="config", blocks=list(range(1, L + 1)))
    cache = [(f"K{l}", f"V{l}") for l in model.blocks]
    with patch.object(kvsink, "rope_table", lambda config, n, device: f"{config}, {n} tokens"):
        H, S_sink = kvsink.prefill(
            model, tensor(H), cache, S_sink=tensor(S_sink), step=step, **rule
        )
    return plain({**seen, "H": H, "kept": S_sink})


def prefill_rule(H, steps, rule):
    return algorithm_1(H, steps, **rule)


def prefill_refused(H, steps, rule):
    return refused(lambda: algorithm_1(H, steps, **rule))


def first(H, N):
    return plain(kvsink.pfn(tensor(H), N))


def observed(caches, L, X, leave_out, broken=None):
    """Of `caches` caches with L blocks: what calibrate of each quantizer was given when block l's
    Keys are l X and its Values -l X, and what the observers returned. The quantizers of block
    `broken` refuse theirs."""
    seen, returned = {}, []

    def quantizer(name, l):
        def calibrate(X, leave_out=None):
            if l == broken:
                raise quant.NotFinite("NaN or inf")
            seen[name] = [X, leave_out]

        return SimpleNamespace(calibrate=calibrate)

    blocks = range(1, L + 1)
    made = {
        i: [(quantizer(f"{i} {l} K", l), quantizer(f"{i} {l} V", l)) for l in blocks]
        for i in range(caches)
    }
    pairs = kvsink.observers(made.values())
    for l, (K, V) in zip(blocks, pairs, strict=True):
        returned.append([K(l * tensor(X), tensor(leave_out)), V(-l * tensor(X), tensor(leave_out))])
    return plain([seen, returned])


def observers_refused(L, broken):
    X = np.ones((1, 1, 2, 2), np.float32)
    return refused(observed, 1, L, X, np.zeros((1, 1, 2, 1), bool), broken)


# --------------------------------------------------------------------------------------------------
# Problem 5: the finder


class Scripted(nn.Module):
    """A model whose hidden states are written down: H^1 to H^L, each (n, d)."""

    def __init__(self, states):
        super().__init__()
        self.blocks, self.states = nn.ModuleList(nn.Identity() for _ in states), states

    def forward(self, tokens):
        for block, H in zip(self.blocks, self.states):
            block(H[None])


def outliers(states):
    """l_E, channels and magnitudes; or the error; and how many hooks are left."""
    model, tokens = Scripted(tensor(states)), torch.zeros(1, states.shape[1], dtype=torch.int64)
    found = []
    error = refused(lambda: found.extend(plain(tuple(kvsink.stable_outliers(model, tokens)))))
    return [found, error, sum(len(block._forward_hooks) for block in model.blocks)]


def site(found):
    """find_site where each prompt shows what `found` says; or the error; and the tokens that were
    looked at."""
    seen, replies, out = [], iter(found), []

    def stable_outliers(model, tokens):
        seen.append(tokens.tolist())
        l_E, channels, magnitudes = next(replies)
        return kvsink.Outliers(l_E, tuple(channels), tuple(magnitudes))

    model = SimpleNamespace(embedding=SimpleNamespace(weight=torch.zeros(1)))
    with patch.object(kvsink, "stable_outliers", stable_outliers):
        prompts = [[i, i + 1, i + 2] for i in range(len(found))]
        error = refused(lambda: out.extend(plain(tuple(kvsink.find_site(model, prompts)))))
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
    """Start, stop, codes and dtype of each slice."""
    from paper import kvcache

    return plain(
        [
            [at.start, at.stop, part, str(part.dtype)]
            for at, part in kvcache.slices(tensor(codes), bits)
        ]
    )


class Sparse:
    """In the place of KVQuant's outliers: adds 1000 to each score."""

    @staticmethod
    def add_to_scores(S, Q, rope, store):
        return S + 1000


def scored(codes, bits, s, z, Q, at, residual=None, rope=None, sparse=False):
    """Scores (b, h_kv, G, n) from packed codes; `at` (b, 1) is the slot of each sequence's next
    token; `residual` (b, h_kv, g, d_k) are the Keys of the newest group."""
    from paper import kvcache

    def decode(codes, s, z):
        return s.float() * (codes - z.float())

    store = object.__new__(kvcache.Packed)
    store.quantizer = SimpleNamespace(bits=bits, decode=decode)
    store.codes, store.parameters = tensor(codes), [tensor(s), tensor(z)]
    store.d_k, store.g = Q.shape[-1], 1 if residual is None else residual.shape[2]
    store.static, store.residual, store.outliers = (
        False,
        tensor(residual),
        Sparse() if sparse else None,
    )
    S = store.scores(tensor(Q), rope and tuple(map(tensor, rope)), tensor(at))
    return plain(torch.stack(list(S), dim=2))
