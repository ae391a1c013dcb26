"""What hooks see inside a block, and what Sections 3 and 4 measure on it: sinks, stages, attention
and its bias.

Read top to bottom: the hooks; sinks and the five stages; attention scores, biases and cosines; a
Subject, which is a model on a text with its sinks found; what is measured block by block for
Figures 6, 7 and 18.

What this file does not do: it draws nothing and prints nothing (figures.py, table1.py), and it has
no loop over blocks of its own: that is Llama.forward's.

Blocks are counted from 1, as in Algorithm 1; the paper's figures, Table 3 and the option --layer
count from 0.
"""

import functools
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kvsink import OUTLIER, SPARSE, Site, check_hidden_state
from llama import Llama, apply_rope, causal_mask, rope_table
from quant import Quantizer
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# Inside a block


class Activations(NamedTuple):
    """What block l computes for one sequence, in fp32; the names are those of Section 2 and Section
    3.1."""

    l: int  # counted from 1
    Q: torch.Tensor  # (h, n, d_k), after RoPE
    K: torch.Tensor  # (h_kv, n, d_k), after RoPE
    V: torch.Tensor  # (h_kv, n, d_k)
    O: torch.Tensor  # (n, d), the attention's output
    H_: torch.Tensor  # (n, d), H^{l'}: the residual stream after the attention
    X_d_in: torch.Tensor  # (n, d_ffn), Eq. 7
    X_d_out: torch.Tensor  # (n, d), Eq. 8
    H: torch.Tensor  # (n, d), H^l


def look(model, tokens, reduce):
    """Run the model once over tokens (1, n) and call `reduce` with the Activations of each block,
    as the block ends. Returns what `reduce` gave, a list, block by block. It should give numbers or
    small tensors: the activations of one block are in memory at a time, those of all blocks of a
    large model would not fit."""
    rope, seen, given = rope_table(model.config, tokens.shape[1], tokens.device), {}, []

    def see(module, inputs, output):
        seen[module] = inputs[0][0], output[0]

    def finish(block, inputs, H):  # H^l (1, n, d)
        (X_d_in, X_d_out), (_, O), (H_, _) = (
            seen[block.FFN.W_d],
            seen[block.W_o],
            seen[block.LN_ffn],
        )
        Q, K, V = (seen[W][1].float().unflatten(-1, (-1, block.d_k)).transpose(0, 1)
                   for W in (block.W_q, block.W_k, block.W_v))  # fmt: skip
        wide = (X.float() for X in (O, H_, X_d_in, X_d_out, H[0]))
        given.append(
            reduce(Activations(len(given) + 1, apply_rope(Q, rope), apply_rope(K, rope), V, *wide))
        )
        seen.clear()

    # Nobody asks for logits: one token's are enough.
    hooks = [model.W_vocab.register_forward_pre_hook(lambda module, inputs: inputs[0][:, -1:])]
    for l in range(len(model.blocks)):  # by index: a loop over blocks on disk would read them all
        block = model.blocks[l]
        for module in (block.W_q, block.W_k, block.W_v, block.W_o, block.LN_ffn, block.FFN.W_d):
            hooks.append(module.register_forward_hook(see))
        hooks.append(block.register_forward_hook(finish))
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return given


# --------------------------------------------------------------------------------------------------
# Sinks and stages (Section 3.1)


def sink_tokens(H, c):
    """S, a mask (n,): the tokens with a stable outlier in channel c of H^{l_E} (n, d). They stand
    out from the hidden state as the finder asks (kvsink.py), and no sink is ten times weaker than
    the strongest."""
    X = H.abs()
    return X[:, c] > torch.maximum(OUTLIER * X.median(), X[:, c].max() / SPARSE)


class Stages(NamedTuple):
    """The five stages of Figure 4, each a range of blocks, counted from 1. A stage that a model
    lacks is empty."""

    initial: range
    emergence: range
    stabilization: range
    dissipation: range
    final: range


STEADY = 1.5  # stable outliers stay within this factor of their level
FADED = 10  # and are gone at this part of it


def stages(peak, typical):
    """The stages of stable outliers, from the largest and the median |H^l| of every block, both
    (L,).

    A list of Stages: the last one is of the strongest outliers, before it those of weaker ones that
    come and go in its initial stage (SmolLM2 has some; the paper describes one emergence). Empty
    where nothing stands out from block to block: a single high block is not stable.
    """
    height, L = torch.where(peak > OUTLIER * typical, peak, 0.0), len(peak)
    low, high = torch.minimum(height[1:], height[:-1]), torch.maximum(height[1:], height[:-1])
    stable = torch.where(
        high < STEADY * low, low, 0.0
    )  # (L - 1,): of each two neighbours that hold the same level
    if not stable.any():
        return []
    level = stable[stable > stable.max() / 4].median()
    steady, faded = (
        (height > level / STEADY).tolist(),
        (height < level / FADED).tolist(),
    )  # by block, from 0
    top = steady.index(True)  # the first block at full height
    rise = max(
        (l + 1 for l in range(top) if faded[l]), default=0
    )  # the first after all blocks without
    fall = min(
        (l for l in range(top, L) if not any(steady[l : l + 2])), default=L
    )  # two blocks low: not a mere dip
    gone = min(
        (l + 1 for l in range(fall, L) if faded[l]), default=L
    )  # the first after the outliers went
    edges = [l + 1 for l in (0, rise, top + 1, fall, gone, L)]  # by block, from 1
    return [
        *stages(peak[:rise], typical[:rise]),
        Stages(*(range(*ends) for ends in itertools.pairwise(edges))),
    ]


def extremes(X):
    """Of each token the entry that is largest in magnitude, with its sign: (n, channels) ->
    (n,)."""
    return X.gather(1, X.abs().argmax(1, keepdim=True))[:, 0]


def evolution(model, tokens, c):
    """Figures 4 and 12-17: name -> (L, n), the extremes of X_d.in, X_d.out, H^{l'}, H^l; the median
    |H^l|, (L,); and the tokens that stand out in channel c of H^l, a mask (L, n). Raises NotFinite
    where a hidden state holds NaN or inf."""
    names = ("X_d_in", "X_d_out", "H_", "H")

    def reduce(a):
        check_hidden_state(a.H, a.l, len(model.blocks))
        found = (
            *(extremes(getattr(a, name)) for name in names),
            a.H.abs().median(),
            sink_tokens(a.H, c),
        )
        return [X.cpu() for X in found]

    *curves, typical, S = (torch.stack(column) for column in zip(*look(model, tokens, reduce)))
    return dict(zip(names, curves)), typical, S


# --------------------------------------------------------------------------------------------------
# Attention, and its bias (Sections 3.2 and 4.2)


def for_queries(X, h):
    """Keys or Values (h_kv, n, d_k), each repeated for the queries that it serves: (h, n, d_k)."""
    return X.repeat_interleave(h // X.shape[0], dim=0)


def attention_scores(Q, K, sliding_window=None):
    """P = Softmax(Q K^T / sqrt(d_k) + M) of Eq. 3: Q (h, n, d_k), K (h_kv, n, d_k) -> (h, n, n),
    p_i^t at [:, t, i]."""
    scores = Q @ for_queries(K, len(Q)).mT / Q.shape[-1] ** 0.5
    return scores.masked_fill(
        ~causal_mask(Q.shape[1], sliding_window, Q.device), -torch.inf
    ).softmax(-1)


def attention_bias(P, V, S):
    """Eq. 9, sum over i in S of p_i^t v_i: P (h, n, n), V (h_kv, n, d_k), S a mask (n,) -> (h, n,
    d_k)."""
    return P[:, :, S] @ for_queries(V, len(P))[:, S]


def cosines(Q, K):
    """Cosine similarity of every query and every key: (h, n, n)."""
    return F.normalize(Q, dim=-1) @ F.normalize(for_queries(K, len(Q)), dim=-1).mT


def mean_cosine(X):
    """Cosine similarity of two vectors of X, the mean over all pairs: (h, n, d_k) -> (h,). Figure
    6a."""
    U, n = F.normalize(X, dim=-1), X.shape[1]
    return (U.sum(1).square().sum(-1) - n) / (n * (n - 1))  # |sum u|^2 = n + the sum over pairs


# --------------------------------------------------------------------------------------------------
# What is looked at


@dataclass(frozen=True)
class Subject:
    """A model on a text, and where its outliers and sinks are."""

    name: str
    text: str  # what titles call it
    model: Llama
    tokenizer: Tokenizer
    # of token ids (1, n), on the model's device: Table 1 uses all, the figures draw the first
    windows: list
    site: Site
    block: int  # the one that is drawn, counted from 1
    curves: dict  # of the first window, as `evolution` gives them
    typical: torch.Tensor  # (L,)
    stages: list  # of Stages, the last those of the strongest outliers
    S: torch.Tensor  # (n,), the sinks of the first window, on the CPU
    quantizers: dict = field(
        default_factory=dict
    )  # as `static_quantizers` makes them, where they are needed

    @property
    def stable_blocks(self):
        """The blocks of the stabilization stage, as far as they come after l_E: where there are
        sinks."""
        return [l for l in self.stages[-1].stabilization if l > self.site.l_E]

    @functools.cached_property
    def inside(self):
        """The Activations of the block that is drawn, on the first window."""
        return look(self.model, self.windows[0], lambda a: a if a.l == self.block else None)[
            self.block - 1
        ]

    def look_where_stable(self, tokens, reduce):
        """`look` at tokens (1, n), in the blocks of the stabilization stage only. `reduce` is
        called with the Activations and the sinks S of these tokens, a mask (n,); returns what it
        gave for each of these blocks."""
        S = None

        def in_a_stable_block(a):
            nonlocal S
            if a.l == self.site.l_E:
                S = sink_tokens(a.H, self.site.c)
            return reduce(a, S) if a.l in self.stable_blocks else None

        given = look(self.model, tokens, in_a_stable_block)
        return [given[l - 1] for l in self.stable_blocks]

    def scores(self, a):
        """Attention scores (h, n, n) of a block, from its Activations."""
        return attention_scores(a.Q, a.K, self.model.config.sliding_window)


def examine(name, text, model, tokenizer, windows, site, layer=None):
    """A Subject. `layer` is the one to draw, from 0; by default the second where sinks are stable,
    the paper's layer 3 of LLaMA2-7B. Raises ValueError where no token stands out, or every one."""
    curves, typical, S = evolution(model, windows[0], site.c)
    found, S = stages(curves["H"].abs().amax(1), typical), S[site.l_E - 1]
    subject = Subject(name, text, model, tokenizer, windows, site, 0, curves, typical, found, S)
    if not found or not S.any() or not subject.stable_blocks:
        raise ValueError(
            f"no stable outliers: no token of {text} stands out in {name} after block {site.l_E} (from 1)"
        )
    if S.all() or S.nonzero()[0] == len(S) - 1:
        raise ValueError(f"{text}: there is no other token to compare the sinks of {name} with")
    return replace(subject, block=subject.stable_blocks[:2][-1] if layer is None else layer + 1)


# --------------------------------------------------------------------------------------------------
# Static quantization with sinks and without, for Table 1 and Figure 7

KINDS = {  # the columns of Table 1: which tensor, and the granularity
    "per-token Keys": ("K", "token"),
    "per-token Values": ("V", "token"),
    "per-channel Keys": ("K", "channel"),
}
GROUP = 16  # of Table 1 and of Figure 7
FIGURE_7_BITS = (8, 4, 3, 2)


def static_quantizers(subject, calibration):
    """(l, kind, kept) -> a static Quantizer for every block where sinks are stable, calibrated on
    windows (1, n): kept False on all tokens, kept True on all but the sinks."""
    quantizers = {}

    def calibrate(a, S):
        for kind, (tensor, granularity) in KINDS.items():
            for kept in (False, True):
                q = quantizers.setdefault(
                    (a.l, kind, kept), Quantizer(8, granularity, GROUP, static=True)
                )
                q.calibrate(getattr(a, tensor), (S & kept)[:, None])

    for tokens in calibration:
        subject.look_where_stable(tokens, calibrate)
    return quantizers


def quantized_attention(subject, a, S, bits, kept):
    """Keys and Values after static per-token quantization, the attention scores they give, and the
    bias of Eq. 9."""
    q_K, q_V = (
        replace(subject.quantizers[a.l, f"per-token {X}", kept], bits=bits)
        for X in ("Keys", "Values")
    )
    keep = (S & kept)[:, None]
    K, V = torch.where(keep, a.K, q_K(a.K)), torch.where(keep, a.V, q_V(a.V))
    P = attention_scores(a.Q, K, subject.model.config.sliding_window)
    return K, V, P, attention_bias(P, V, S)


def static_damage(subject):
    """Where static per-token quantization hurts, the numbers behind Figure 7: a list of dict, one
    for each of its bits, of relative errors |X' - X| / |X| on the first window, over all blocks
    where sinks are stable. Scores are all p_i^t, the bias is that of Eq. 9; "kept" is with the
    sinks kept in full precision and left out of the calibration."""
    sums = {
        bits: defaultdict(lambda: torch.zeros(2, dtype=torch.float64)) for bits in FIGURE_7_BITS
    }

    def add(a, S):
        P = subject.scores(a)
        bias = attention_bias(P, a.V, S)
        for bits in FIGURE_7_BITS:
            K, V, P_, bias_ = quantized_attention(subject, a, S, bits, kept=False)
            *_, P_kept, bias_kept = quantized_attention(subject, a, S, bits, kept=True)
            compared = {
                "sinks' K": (K[:, S], a.K[:, S]),
                "others' K": (K[:, ~S], a.K[:, ~S]),
                "sinks' V": (V[:, S], a.V[:, S]),
                "others' V": (V[:, ~S], a.V[:, ~S]),
                "scores": (P_, P),
                "scores, kept": (P_kept, P),
                "bias": (bias_, bias),
                "bias, kept": (bias_kept, bias),
            }
            for name, (X_, X) in compared.items():
                sums[bits][name] += torch.tensor([(X_ - X).square().sum(), X.square().sum()])
        bar.update()

    with tqdm(
        desc="Figure 7", total=len(subject.stable_blocks), leave=False, unit="block", disable=None
    ) as bar:
        subject.look_where_stable(subject.windows[0], add)
    errors = {
        bits: {name: math.sqrt(s[0] / s[1]) for name, s in row.items()}
        for bits, row in sums.items()
    }
    return [{"bits": bits, **row} for bits, row in errors.items()]


# --------------------------------------------------------------------------------------------------
# Figures 6a and 18 in numbers


def bias_similarity(subject):
    """Figure 6a: how alike the attention bias of Eq. 9 is over all tokens from the first sink on,
    (L, h)."""
    S, first = subject.S.to(subject.windows[0].device), int(subject.S.nonzero()[0])

    def reduce(a):
        return mean_cosine(attention_bias(subject.scores(a), a.V, S)[:, first:]).cpu()

    return torch.stack(look(subject.model, subject.windows[0], reduce))


def norms_by_block(subject):
    """Figures 18, 20, 22, 23: "Q", "K", "V" -> (L, 2, 3), the L2 norms of sinks and of the others,
    each as its 10th, 50th and 90th percentile over heads and tokens."""
    S, levels = subject.S, torch.tensor([0.1, 0.5, 0.9])

    def percentiles(X):  # (heads, n, d_k) -> (2, 3)
        N = X.norm(dim=-1).cpu()
        return torch.stack([N[:, who].quantile(levels) for who in (S, ~S)])

    found = look(
        subject.model, subject.windows[0], lambda a: [percentiles(X) for X in (a.Q, a.K, a.V)]
    )
    return {name: torch.stack(rows) for name, rows in zip("QKV", zip(*found))}
