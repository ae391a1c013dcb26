"""The paper's evidence, measured and drawn: Tables 1 and 3, and the figures of Sections 3 and 4 and Appendices C to E.

    python figures.py                                         all of it for the embedded default, into figures/
    python figures.py --model llama2-7b --fig 1 2 4 --table 1 3      the paper

Read top to bottom: what hooks see inside a block; what is measured on it (sinks, stages, attention, the bias of Eq. 9,
quantization errors); Table 1 and Table 3; the figures, in the paper's order; the command line.

What this file does not do: the model is llama.py's and knows nothing of all this, quantization is quant.py's. Figure 9
is drawn by eval_ppl.py, whose results it shows. Figures 3 and 8 are sketches without data.

Blocks are counted from 1, as in Algorithm 1; the paper's figures, Table 3 and the option --layer count from 0.
"""

import hashlib
import itertools
import json
import math
import sys
import textwrap
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval_ppl
import hub
import kvsink
import quant
from kvsink import OUTLIER, SPARSE
from llama import Llama, LlamaConfig, Tokenizer, causal, rope_table, rotate
from quant import Quantizer

try:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
except ImportError:  # then there are the tables
    Figure = None

# ---------------------------------------------------------------------------------------------------------------------
# Inside a block


class Activations(NamedTuple):
    """What block l computes for one sequence, in fp32; the names are those of Section 2 and Section 3.1."""

    l: int  # counted from 1
    Q: torch.Tensor  # (h, n, d_k), after RoPE
    K: torch.Tensor  # (h_kv, n, d_k), after RoPE
    V: torch.Tensor  # (h_kv, n, d_k)
    O: torch.Tensor  # (n, d), the attention's output
    H_: torch.Tensor  # (n, d), H^{l'}: the residual stream after the attention
    X_d_in: torch.Tensor  # (n, d_ffn), Eq. 7
    X_d_out: torch.Tensor  # (n, d), Eq. 8
    H: torch.Tensor  # (n, d), H^l


def look(model, tokens):
    """Run the model over tokens (1, n) and yield the Activations of one block after the other. Whoever asks for them
    keeps what it needs, reduced or on the CPU: the activations of all blocks of a large model would not fit."""
    H, rope = model.embedding(tokens), rope_table(model.config, tokens.shape[1], tokens.device)
    for l, block in enumerate(model.blocks, start=1):
        seen = {}

        def see(module, inputs, output, seen=seen):
            seen[module] = inputs[0][0].float(), output[0].float()

        watched = (block.W_q, block.W_k, block.W_v, block.W_o, block.LN_ffn, block.FFN.W_d)
        hooks = [module.register_forward_hook(see) for module in watched]
        try:
            H = block(H, rope)
        finally:
            for hook in hooks:
                hook.remove()
        Q, K, V = (seen[W][1].unflatten(-1, (-1, block.d_k)).transpose(0, 1) for W in (block.W_q, block.W_k, block.W_v))
        (X_d_in, X_d_out), O, H_ = seen[block.FFN.W_d], seen[block.W_o][1], seen[block.LN_ffn][0]
        yield Activations(l, rotate(Q, rope), rotate(K, rope), V, O, H_, X_d_in, X_d_out, H[0].float())


# ---------------------------------------------------------------------------------------------------------------------
# Sinks and stages (Section 3.1)


def sink_tokens(H, c):
    """S, a mask (n,): the tokens with a stable outlier in channel c of H^{l_E} (n, d). They stand out from the hidden
    state as the finder asks (kvsink.py), and no sink is ten times weaker than the strongest."""
    X = H.abs()
    return X[:, c] > torch.maximum(OUTLIER * X.median(), X[:, c].max() / SPARSE)


class Stages(NamedTuple):
    """The five stages of Figure 4, each a range of blocks, counted from 1; one that a model lacks is empty."""

    initial: range
    emergence: range
    stabilization: range
    dissipation: range
    final: range


STEADY = 1.5  # stable outliers stay within this factor of their level
FADED = 10  # and are gone at this part of it


def stages(peak, typical):
    """The stages of stable outliers, from the largest and the median |H^l| of every block, both (L,).

    A list of Stages: the last one is of the strongest outliers, before it those of weaker ones that come and go in its
    initial stage (SmolLM2 has some; the paper describes one emergence). Empty where nothing stands out from block to
    block: a single high block is not stable.
    """
    height, L = torch.where(peak > OUTLIER * typical, peak, 0.0), len(peak)
    low, high = torch.minimum(height[1:], height[:-1]), torch.maximum(height[1:], height[:-1])
    stable = torch.where(high < STEADY * low, low, 0.0)  # (L - 1,): of each two neighbours that hold the same level
    if not stable.any():
        return []
    level = stable[stable > stable.max() / 4].median()
    steady, faded = (height > level / STEADY).tolist(), (height < level / FADED).tolist()  # by block, from 0
    top = steady.index(True)  # the first block at full height
    rise = max((l + 1 for l in range(top) if faded[l]), default=0)  # the first after all blocks without
    fall = min((l for l in range(top, L) if not any(steady[l : l + 2])), default=L)  # two blocks low: not a mere dip
    gone = min((l + 1 for l in range(fall, L) if faded[l]), default=L)  # the first after the outliers went
    edges = [l + 1 for l in (0, rise, top + 1, fall, gone, L)]  # by block, from 1
    return [*stages(peak[:rise], typical[:rise]), Stages(*(range(*ends) for ends in zip(edges, edges[1:])))]


def extremes(X):
    """Of each token the entry that is largest in magnitude, with its sign: (n, channels) -> (n,)."""
    return X.gather(1, X.abs().argmax(1, keepdim=True))[:, 0]


def evolution(model, tokens):
    """Figures 4 and 12-17: name -> (L, n), the extremes of X_d.in, X_d.out, H^{l'}, H^l; and the median |H^l|, (L,).
    Raises NotFinite where a hidden state holds NaN or inf."""
    curves, typical = {"X_d_in": [], "X_d_out": [], "H_": [], "H": []}, []
    for a in look(model, tokens):
        kvsink.check_hidden_state(a.H, a.l, len(model.blocks))
        for name, curve in curves.items():
            curve.append(extremes(getattr(a, name)).cpu())
        typical.append(a.H.abs().median().cpu())
    return {name: torch.stack(curve) for name, curve in curves.items()}, torch.stack(typical)


# ---------------------------------------------------------------------------------------------------------------------
# Attention, and its bias (Sections 3.2 and 4.2)


def for_queries(X, h):
    """Keys or Values (h_kv, n, d_k), each repeated for the queries that it serves: (h, n, d_k)."""
    return X.repeat_interleave(h // X.shape[0], dim=0)


def attention_scores(Q, K, sliding_window=None):
    """P = Softmax(Q K^T / sqrt(d_k) + M) of Eq. 3: Q (h, n, d_k), K (h_kv, n, d_k) -> (h, n, n), p_i^t at [:, t, i]."""
    scores = Q @ for_queries(K, len(Q)).mT / Q.shape[-1] ** 0.5
    return scores.masked_fill(~causal(Q.shape[1], sliding_window, Q.device), -torch.inf).softmax(-1)


def attention_bias(P, V, S):
    """Eq. 9, sum over i in S of p_i^t v_i: P (h, n, n), V (h_kv, n, d_k), S a mask (n,) -> (h, n, d_k)."""
    return P[:, :, S] @ for_queries(V, len(P))[:, S]


def cosines(Q, K):
    """Cosine similarity of every query and every key: (h, n, n)."""
    return F.normalize(Q, dim=-1) @ F.normalize(for_queries(K, len(Q)), dim=-1).mT


def mean_cosine(X):
    """Cosine similarity of two vectors of X, the mean over all pairs: (h, n, d_k) -> (h,). Figure 6a."""
    U, n = F.normalize(X, dim=-1), X.shape[1]
    return (U.sum(1).square().sum(-1) - n) / (n * (n - 1))  # |sum u|^2 = n + the sum over pairs


# ---------------------------------------------------------------------------------------------------------------------
# What is looked at


@dataclass
class Subject:
    """A model on a text, and where its outliers and sinks are."""

    name: str
    text: str
    model: Llama
    tokenizer: Tokenizer
    windows: list  # of token ids (1, n), on the model's device: the tables use all, the figures draw the first
    site: kvsink.Site
    block: int  # the one that is drawn, counted from 1
    curves: dict  # of the first window, as `evolution` gives them
    typical: torch.Tensor  # (L,)
    stages: list  # of Stages, the last those of the strongest outliers
    S: torch.Tensor  # (n,), the sinks of the first window
    quantizers: dict = field(default_factory=dict)  # as `static_quantizers` makes them, where they are needed

    @property
    def stable_blocks(self):
        """The blocks of the stabilization stage, as far as they come after l_E: where there are sinks."""
        return [l for l in self.stages[-1].stabilization if l > self.site.l_E]

    def inside(self, l):
        """The Activations of block l on the first window."""
        return next(a for a in look(self.model, self.windows[0]) if a.l == l)

    def stable(self, tokens):
        """On tokens (1, n), the Activations of each block of the stabilization stage, and the sinks S, a mask (n,)."""
        for a in look(self.model, tokens):
            if a.l == self.site.l_E:
                S = sink_tokens(a.H, self.site.c)
            if a.l in self.stable_blocks:
                yield a, S


def examine(name, text, model, tokenizer, windows, site, layer=None):
    """A Subject. `layer` is the one to draw, from 0; by default the second where sinks are stable, the paper's layer 3
    of LLaMA2-7B. Raises ValueError where no token stands out, or every one."""
    curves, typical = evolution(model, windows[0])
    found = stages(curves["H"].abs().amax(1), typical)
    H = next(a.H for a in look(model, windows[0]) if a.l == site.l_E)
    S = sink_tokens(H, site.c).cpu()
    subject = Subject(name, text, model, tokenizer, windows, site, 0, curves, typical, found, S)
    if not found or not S.any() or not subject.stable_blocks:
        raise ValueError(f"no stable outliers: no token of {text} stands out in {name} after block {site.l_E} (from 1)")
    if S.all() or S.nonzero()[0] == len(S) - 1:
        raise ValueError(f"{text}: there is no other token to compare the sinks of {name} with")
    subject.block = subject.stable_blocks[:2][-1] if layer is None else layer + 1
    return subject


def print_stages(subject):
    sinks = ", ".join(map(str, subject.S.nonzero().flatten().tolist()))
    print(f"\n{subject.name} on {subject.text}: sinks at tokens {sinks}")
    for found, what in zip(subject.stages[::-1], ["stages", *["weaker outliers"] * len(subject.stages)]):
        listed = ", ".join(f"{name} {span(blocks)}" for name, blocks in found._asdict().items() if blocks)
        print(f"{what}, blocks from 1: {listed}")


# ---------------------------------------------------------------------------------------------------------------------
# Table 1, and the numbers behind Figure 7

KINDS = {  # the columns of Table 1: which tensor, and the granularity
    "per-token Keys": ("K", "token"),
    "per-token Values": ("V", "token"),
    "per-channel Keys": ("K", "channel"),
}
GROUP = 16  # of Table 1 and of Figure 7
FIGURE_7_BITS = (8, 4, 3, 2)
PAPER_TABLE_1 = {  # LLaMA2-7B, as printed: for each of the KINDS overall, without sink tokens, with (dynamic only)
    ("dynamic", 4): ((1.30, 1.38, 0.07), (0.10, 0.11, 0.01), (0.28, 0.26, 0.31)),
    ("dynamic", 3): ((9.00, 9.57, 0.50), (0.68, 0.72, 0.08), (2.03, 1.78, 2.30)),
    ("dynamic", 2): ((27.58, 29.32, 1.37), (2.53, 2.68, 0.23), (7.05, 6.52, 7.58)),
    ("static", 4): ((86.73, 16.39), (9.75, 3.10), (9.02, 5.17)),
    ("static", 3): ((89.60, 20.41), (10.09, 3.45), (10.24, 8.26)),
    ("static", 2): ((107.36, 46.14), (11.30, 6.35), (15.83, 11.44)),
}


def static_quantizers(subject, calibration):
    """(l, kind, kept) -> a static Quantizer for every block where sinks are stable, calibrated on windows (1, n):
    kept False on all tokens, kept True on all but the sinks."""
    quantizers = {}
    for tokens in calibration:
        for a, S in subject.stable(tokens):
            for kind, (tensor, granularity) in KINDS.items():
                for kept in (False, True):
                    q = quantizers.setdefault((a.l, kind, kept), Quantizer(8, granularity, GROUP, static=True))
                    q.calibrate(getattr(a, tensor), (S & kept)[:, None])
    return quantizers


def groups_with_sinks(S, granularity):
    """A mask (n,): the tokens whose group holds a sink. A group is in one token, or is 16 tokens of one channel."""
    groups, axes = quant.grouped(S[:, None], granularity, GROUP, fill=False)
    return quant.ungrouped(groups.any(axes, keepdim=True).expand_as(groups), granularity, len(S))[:, 0]


def table_1(subject):
    """Table 1, mean squared errors x 100 over all windows and all blocks where sinks are stable: a list of dict, one a
    kind, range and number of bits, with the paper's figures for LLaMA2-7B under "paper".

    Of dynamic ranges "overall" is of all groups, "without_sinks" of those that hold no sink, "with_sinks" of those that
    hold one (None where there are none). Of static ranges "overall" is of all tokens, "without_sinks" of all but the
    sinks, those left out of the calibration too. From the printed figures (of tokens, overall is 15/16 of without and
    1/16 of with) the paper's are of 32 tokens with two sinks; which blocks they cover it does not say.
    """
    sums = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))  # (kind, ranges, bits, part) -> sum, count
    for tokens in tqdm(subject.windows, desc="Table 1", unit="window", leave=False, disable=None):
        for a, S in subject.stable(tokens):
            for kind, (tensor, granularity) in KINDS.items():
                X, mixed = getattr(a, tensor), groups_with_sinks(S, granularity)
                for bits in (4, 3, 2):
                    dynamic = (Quantizer(bits, granularity, GROUP)(X) - X).square()
                    static, kept = (
                        (replace(subject.quantizers[a.l, kind, kept], bits=bits)(X) - X).square()
                        for kept in (False, True)
                    )
                    for ranges, part, errors in (
                        ("dynamic", "overall", dynamic),
                        ("dynamic", "without_sinks", dynamic[:, ~mixed]),
                        ("dynamic", "with_sinks", dynamic[:, mixed]),
                        ("static", "overall", static),
                        ("static", "without_sinks", kept[:, ~S]),
                    ):
                        sums[kind, ranges, bits, part] += torch.tensor([errors.sum(), errors.numel()])
    rows = []
    for i, kind in enumerate(KINDS):
        for (ranges, bits), printed in PAPER_TABLE_1.items():
            parts = ("overall", "without_sinks", "with_sinks")[: len(printed[i])]
            measured = {part: sums[kind, ranges, bits, part].tolist() for part in parts}
            mse = {part: 100 * total / count if count else None for part, (total, count) in measured.items()}
            rows.append({"kind": kind, "ranges": ranges, "bits": bits, **mse, "paper": dict(zip(parts, printed[i]))})
    return rows


def print_table_1(subject, rows):
    parts = {"overall": "overall", "without_sinks": "w/o sinks", "with_sinks": "w/ sinks"}
    print(f"\nTable 1: quantization error (MSE x 100), {whereabouts(subject)}")
    print(f"{'':<20}{subject.name:^33}{'LLaMA2-7B (paper)':^33}")
    print(f"{'':<20}" + "".join(f"{title:>11}" for title in parts.values()) * 2)
    for row in rows:
        if (row["ranges"], row["bits"]) == ("dynamic", 4):
            print(row["kind"])
        cells = [side.get(part) for side in (row, row["paper"]) for part in parts]
        numbers = "".join(f"{'-':>11}" if x is None else f"{x:>11.2f}" for x in cells)
        print(f"  {row['ranges']:<9}{row['bits']} bits  {numbers}")


def whereabouts(subject):
    blocks = span(subject.stable_blocks)
    return f"groups of {GROUP}: {subject.name} on {subject.text}, blocks {blocks}"


def static_damage(subject):
    """Where static per-token quantization hurts, the numbers behind Figure 7: a list of dict, one for each of its bits,
    of relative errors |X' - X| / |X| on the first window, over all blocks where sinks are stable. Scores are all p_i^t,
    the bias is that of Eq. 9; "kept" is with the sinks kept in full precision and left out of the calibration."""
    sums = {bits: defaultdict(lambda: torch.zeros(2, dtype=torch.float64)) for bits in FIGURE_7_BITS}
    blocks = len(subject.stable_blocks)
    bar = tqdm(subject.stable(subject.windows[0]), "Figure 7", blocks, leave=False, unit="block", disable=None)
    for a, S in bar:
        P = scores_of(subject, a)
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
    errors = {bits: {name: math.sqrt(s[0] / s[1]) for name, s in row.items()} for bits, row in sums.items()}
    return [{"bits": bits, **row} for bits, row in errors.items()]


def quantized_attention(subject, a, S, bits, kept):
    """Keys and Values after static per-token quantization, the attention scores they give, and the bias of Eq. 9."""
    q_K, q_V = (replace(subject.quantizers[a.l, f"per-token {X}", kept], bits=bits) for X in ("Keys", "Values"))
    keep = (S & kept)[:, None]
    K, V = torch.where(keep, a.K, q_K(a.K)), torch.where(keep, a.V, q_V(a.V))
    P = attention_scores(a.Q, K, subject.model.config.sliding_window)
    return K, V, P, attention_bias(P, V, S)


def print_damage(subject, rows):
    print(f"\nFigure 7 in numbers: relative errors of static per-token quantization, {whereabouts(subject)}")
    print(f"{'bits':>4}" + "".join(f"{name:>13}" for name in rows[0] if name != "bits"))
    for row in rows:
        print(f"{row['bits']:>4}" + "".join(f"{x:>13.3f}" for name, x in row.items() if name != "bits"))


# ---------------------------------------------------------------------------------------------------------------------
# Table 3


def table_3(model, tokenizer, name):
    """Table 3's row of any model, from the finder (kvsink.py), for each of the prompts of Appendix D, as a dict."""
    device = model.embedding.weight.device
    found = [kvsink.stable_outliers(model, torch.tensor([tokenizer.encode(p)], device=device)) for p in kvsink.PROMPTS]
    config, row = model.config, kvsink.TABLE_3.get(name)
    sites = {(o.l_E - 1, o.channels[0]) for o in found}
    return {
        "model": name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "prompts": [
            {"emergence": o.l_E - 1, "channels": o.channels, "magnitudes": [round(m, 1) for m in o.magnitudes]}
            for o in found
        ],
        "prompts_agree": len(sites) == 1,
        "table_3": row and {"emergence": row.emergence, "channels": row.channels},
        "table_3_agrees": row and sites == {(row.emergence, row.channels[0])},
    }


def print_table_3(row):
    size = f"{row['layers']} layers, hidden size {row['hidden_size']}"
    print(f"\nTable 3 (layers counted from 0): {row['model']}, {size}")
    for i, found in enumerate(row["prompts"], start=1):
        channels = ", ".join(f"{c} ({m:,.0f})" for c, m in zip(found["channels"], found["magnitudes"]))
        print(f"  prompt {i}: outliers emerge in layer {found['emergence']}, channels (magnitudes) {channels}")
    print(f"  the prompts {'agree' if row['prompts_agree'] else 'DISAGREE'} on layer and first channel")
    if row["table_3"]:
        channels = ", ".join(map(str, row["table_3"]["channels"]))
        agrees = "agrees" if row["table_3_agrees"] else "DISAGREES"
        whose = "kvsink.py's row (the paper has none)" if row["model"] == hub.DEFAULT_MODEL else "Table 3"
        print(f"  {whose} {agrees} on them: layer {row['table_3']['emergence']}, channels {channels}")
    else:
        print("  Table 3 does not list this model")


# ---------------------------------------------------------------------------------------------------------------------
# The figures: each measures what it shows. Colours are Okabe and Ito's, which the colour-blind can tell apart.

SINK, OTHER = "#D55E00", "#8C8C8C"
UNSEEN = -2  # in a map of pairs, below every score and cosine: a key that comes after its query
STAGE_COLORS = ("#FFFFFF", "#FBE3D0", "#DCEBF5", "#FBE3D0", "#FFFFFF")  # what changes outliers, and what holds them
CURVES = {  # name -> formula, marker, colour
    "X_d_in": ("X_{d.in}", "v", "#E69F00"),
    "X_d_out": ("X_{d.out}", "s", "#0072B2"),
    "H_": ("H'", ".", "#CC79A7"),
    "H": ("H", ".", "#000000"),
}


def span(blocks):
    return f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


def sheet(subject, title, width, height):
    """An empty figure under a title that names model, text and sinks."""
    sinks = subject.S.nonzero().flatten().tolist()
    listed = ", ".join(map(str, sinks[:8])) + (", ..." if len(sinks) > 8 else "")
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n" + plain(f"{subject.name} on {subject.text}; sinks at tokens {listed}"), fontsize=10)
    return figure


def plain(text):
    """Text that is not to be read as a formula."""
    return text.replace("$", r"\$")


def in_block(subject):
    return f"block {subject.block} (layer {subject.block - 1})"


def scores_of(subject, inside):
    """Attention scores of a block, (h, n, n), from its Activations."""
    return attention_scores(inside.Q, inside.K, subject.model.config.sliding_window)


def mark_sinks(axis, S):
    """A triangle above each sink, on an axis of tokens."""
    i = S.nonzero().flatten()
    axis.plot(i, [1.02] * len(i), "v", color=SINK, markersize=4, clip_on=False, transform=axis.get_xaxis_transform())


def token_map(axis, X, S, title, **style):
    """A map of X (n, n), query by key. A long text is drawn in squares of tokens, each by its largest value: a column
    one pixel wide would be lost."""
    n = X.shape[0]
    g = -(-n // 128)
    X = X.masked_fill(~causal(n, None, X.device), UNSEEN)
    X = F.max_pool2d(X[None, None], g, ceil_mode=True)[0, 0].cpu()
    X = X.where(X > UNSEEN, torch.nan)
    end = len(X) * g - 0.5
    image = axis.imshow(X, extent=(-0.5, end, end, -0.5), interpolation="none", **style)
    axis.set_xlim(-0.03 * n, end)  # the frame would hide token 0, a sink
    axis.set(xlabel="key, token" + (f" (largest of {g} x {g})" if g > 1 else ""), ylabel="query, token")
    axis.set_title(title, fontsize=9, pad=10)
    mark_sinks(axis, S)
    return image


def scores_map(axis, P, S, title):
    """Attention scores P (h, n, n), their mean over the heads; the square root makes the small ones visible."""
    return token_map(axis, P.mean(0), S, title, cmap="viridis", norm=PowerNorm(0.5, 0, 1))


def cosine_map(axis, Q, K, S, title):
    """Cosine similarity of Q and K, its mean over the heads."""
    return token_map(axis, cosines(Q, K).mean(0), S, title, cmap="PuOr_r", vmin=-1, vmax=1)


def bias_map(axis, bias, first, limit, title):
    """The attention bias of one head, (n - first, d_k), of the tokens from `first` on."""
    n, d_k = bias.shape
    extent = (-0.5, d_k - 0.5, first + n - 0.5, first - 0.5)
    style = {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit, "interpolation": "none", "aspect": "auto"}
    axis.set_title(title, fontsize=8)
    return axis.imshow(bias.cpu(), extent=extent, **style)


def closeup(subject):
    """At most 24 tokens about the last sink, and how they are written along an axis."""
    n = len(subject.S)
    start = max(0, min(int(subject.S.nonzero()[-1]) - 14, n - 24))
    tokens = range(start, min(start + 24, n))
    words = [subject.tokenizer.decode([int(subject.windows[0][0, i])]) for i in tokens]
    return tokens, [plain(ascii(word)[1:-1][:13]) for word in words]


def name_tokens(axis, subject):
    tokens, words = closeup(subject)
    axis.set_xticks(tokens, [f"{word} {i}" for word, i in zip(words, tokens)], rotation=90, fontsize=7)
    for label, i in zip(axis.get_xticklabels(), tokens):
        label.set_color(SINK if subject.S[i] else "black")


def figure_1(subject):
    """(a) attention scores, (b) |H^l| at the emergence block, (c) the stable outliers over the blocks."""
    S, (l_E, c) = subject.S, subject.site
    figure = sheet(subject, "Figure 1: attention sinks and stable outliers", 11, 3.9)
    axis = figure.add_subplot(1, 3, 1)
    title = f"(a) attention scores, {in_block(subject)},\nmean over heads"
    figure.colorbar(scores_map(axis, scores_of(subject, subject.inside(subject.block)), S, title), ax=axis, shrink=0.7)

    axis = figure.add_subplot(1, 3, 2, projection="3d")
    H = subject.inside(l_E).H.abs().cpu()  # (n, d)
    n, d = H.shape
    for i, channel in (H > H.max() / 50).nonzero().tolist():
        color = SINK if S[i] else OTHER
        axis.plot([i, i], [channel, channel], [0, H[i, channel]], color=color, linewidth=2)
    axis.set(xlabel="token", ylabel="channel", xlim=(0, n), ylim=(0, d))
    axis.set_title(f"(b) $|H^l|$ after block {l_E} (layer {l_E - 1}),\nwhat is over 1/50 of the largest", fontsize=9)
    axis.tick_params(labelsize=7)

    axis = figure.add_subplot(1, 3, 3)
    stable = torch.stack([a.H[:, c].abs().cpu() for a in look(subject.model, subject.windows[0])])  # (L, n)
    L = range(1, len(stable) + 1)
    axis.semilogy(L, stable[:, S], color=SINK, linewidth=1, label=["each sink"] + [None] * (int(S.sum()) - 1))
    axis.semilogy(L, stable[:, ~S].amax(1), "--", color=OTHER, label="largest other token")
    axis.semilogy(L, stable[:, ~S].median(1).values, color=OTHER, label="median other token")
    axis.axvline(l_E, color="black", linestyle=":", label=f"$l_E$ = {l_E}")
    axis.set(xlabel="block $l$", ylabel=f"$|H^l_{{i,{c}}}|$")
    axis.set_title(f"(c) channel {c} over the blocks", fontsize=9)
    axis.legend(fontsize=7)
    return figure


def figure_2(subject):
    """L2 norms of Q, K, V of every head, token by token: QKV suppression."""
    title = f"Figure 2: norms of Queries, Keys and Values in {in_block(subject)}, a dot a head, bars at the median"
    figure, inside, (tokens, _) = sheet(subject, title, 11, 3.6), subject.inside(subject.block), closeup(subject)
    for axis, name in zip(figure.subplots(1, 3), "QKV"):
        norms = getattr(inside, name).norm(dim=-1).cpu()  # (heads, n)
        for i in tokens:
            color = SINK if subject.S[i] else OTHER
            axis.plot([i] * len(norms), norms[:, i], ".", color=color, markersize=4)
            axis.plot([i - 0.4, i + 0.4], [norms[:, i].median()] * 2, color=color, linewidth=2)
        axis.set(ylabel=f"L2 norm of {name}", ylim=(0, None))
        name_tokens(axis, subject)
    return figure


def figure_4(subject):
    """Figures 4 and 12-17: extreme outliers over the blocks, and token by token in a block of each stage."""
    curves, S, main = subject.curves, subject.S, subject.stages[-1]
    figure = sheet(subject, "Figure 4: the evolution of extreme outliers", 11, 5.2)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    axis, L = left.subplots(), len(subject.typical)
    for name, (formula, marker, color) in CURVES.items():
        peak = curves[name].abs().amax(1)
        axis.semilogy(range(1, L + 1), peak, f"{marker}-", color=color, label=f"$|{formula}|$", markersize=4)
    axis.semilogy(range(1, L + 1), subject.typical, ":", color="black", label="$|H|$, median")
    above = axis.get_xaxis_transform()  # x in blocks, y from 0 at the bottom to 1 at the top
    for color, name, blocks in zip(STAGE_COLORS, main._fields, main):
        if blocks:
            axis.axvspan(blocks[0] - 0.5, blocks[-1] + 0.5, color=color, zorder=0)
            axis.text((blocks[0] + blocks[-1]) / 2, 1.01, name, transform=above, rotation=40, fontsize=7)
    for weaker in subject.stages[:-1]:
        l = weaker.stabilization[len(weaker.stabilization) // 2]
        axis.text(l, 0.45, "a weaker\nemergence", transform=above, ha="center", fontsize=7)
    axis.set(xlabel="block $l$", ylabel="largest magnitude over tokens and channels", xlim=(0.5, L + 0.5))
    axis.legend(fontsize=7)

    shown = [(name, stage_block(name, blocks, curves)) for name, blocks in zip(main._fields, main) if blocks]
    i, rows = torch.arange(len(S)), right.subplots(4, len(shown), sharex=True, squeeze=False)
    for row, (name, (formula, *_)) in zip(rows, CURVES.items()):
        for panel, (_, l) in zip(row, shown):
            for who, color in ((~S, OTHER), (S, SINK)):
                panel.vlines(i[who], 0, curves[name][l - 1, who], color=color, linewidth=1.2)
            panel.tick_params(labelsize=6)
        row[0].set_ylabel(f"${formula}$", fontsize=8)
    for top, bottom, (stage, l) in zip(rows[0], rows[-1], shown):
        top.set_title(f"{stage}, block {l}", fontsize=7)
        bottom.set_xlabel("token", fontsize=7)
    right.suptitle("of each token the entry largest in magnitude, with its sign", fontsize=8)
    return figure


def stage_block(stage, blocks, curves):
    """The block of a stage to show: where the FFN does the most, if that is what makes the stage, else the middle."""
    if stage in ("emergence", "dissipation"):
        return max(blocks, key=lambda l: curves["X_d_out"][l - 1].abs().max())
    return blocks[len(blocks) // 2]


def figure_5(subject):
    """(a) cosine similarity of Q and K, (b, c, e) norms of Q, K, V, (d) attention scores, (f) norms of the output."""
    inside, S = subject.inside(subject.block), subject.S
    figure = sheet(subject, f"Figure 5: QKV suppression in {in_block(subject)}", 11, 6.4)
    axes = dict(zip("abcdef", figure.subplots(2, 3).flatten()))
    title = "(a) cosine similarity of Q and K, mean over heads"
    figure.colorbar(cosine_map(axes["a"], inside.Q, inside.K, S, title), ax=axes["a"], shrink=0.8)
    title = "(d) attention scores, mean over heads"
    figure.colorbar(scores_map(axes["d"], scores_of(subject, inside), S, title), ax=axes["d"], shrink=0.8)
    panels = {"b": ("Queries", inside.Q), "c": ("Keys", inside.K), "e": ("Values", inside.V)}
    for letter, (title, X) in (panels | {"f": ("attention output O", inside.O[None])}).items():
        norms, i = X.norm(dim=-1).median(0).values.cpu(), torch.arange(len(S))
        for who, color, size in ((~S, OTHER, 2), (S, SINK, 6)):
            axes[letter].plot(i[who], norms[who], "o", color=color, markersize=size)
        axes[letter].set(xlabel="token", ylabel="L2 norm" + (", median head" if letter != "f" else ""), ylim=(0, None))
        axes[letter].set_title(f"({letter}) {title}", fontsize=9, pad=10)
        mark_sinks(axes[letter], S)
    return figure


def bias_similarity(subject):
    """Figure 6a: how alike the attention bias of Eq. 9 is over all tokens from the first sink on, (L, h)."""
    S, alike = subject.S, []
    for a in look(subject.model, subject.windows[0]):
        bias = attention_bias(scores_of(subject, a), a.V, S.to(a.V.device))
        alike.append(mean_cosine(bias[:, int(S.nonzero()[0]) :]).cpu())
    return torch.stack(alike)


def figure_6(subject):
    """(a) how alike the attention bias of Eq. 9 is over all tokens, (b) the bias of a few heads."""
    alike, first, l = bias_similarity(subject), int(subject.S.nonzero()[0]), subject.block
    figure = sheet(subject, r"Figure 6: the attention bias $\Sigma_{i \in S}\, p_i^t v_i$ of Eq. 9", 11, 3.6)
    left, *others = figure.subplots(1, 4, width_ratios=(1.7, 1, 1, 1))
    (L, h), style = alike.shape, {"cmap": "viridis", "vmin": 0, "vmax": 1, "aspect": "auto"}
    figure.colorbar(left.imshow(alike.T, extent=(0.5, L + 0.5, h - 0.5, -0.5), **style), ax=left)
    left.set(xlabel="block $l$", ylabel="head")
    left.set_title("(a) cosine similarity of two tokens' biases,\nmean over all pairs", fontsize=9)
    left.axvline(subject.site.l_E + 0.5, color="white", linestyle=":")

    a, order = subject.inside(l), alike[l - 1].argsort(descending=True)
    bias = attention_bias(scores_of(subject, a), a.V, subject.S.to(a.V.device))[:, first:]
    limit = bias.abs().max().item()
    for axis, head, which in zip(others, order[[0, h // 2, -1]].tolist(), ("most", "middling", "least")):
        image = bias_map(axis, bias[head], first, limit, f"(b) head {head}, {which} alike: {alike[l - 1, head]:.3f}")
        axis.set_xlabel("channel of the head")
    others[0].set_ylabel(f"token $t$, {in_block(subject)}")
    figure.colorbar(image, ax=others[-1])
    return figure


def figure_7(subject):
    """Attention scores and biases under static per-token quantization, with and without the sinks kept."""
    a, S = subject.inside(subject.block), subject.S.to(subject.windows[0].device)
    P = scores_of(subject, a)
    bias = attention_bias(P, a.V, S)
    head = int(mean_cosine(bias).argmax())
    limit = bias[head].abs().max().item()
    title = f"Figure 7: static per-token quantization, groups of {GROUP}, {in_block(subject)}; errors are relative"
    figure = sheet(subject, title, 11, 7.6)
    axes = figure.subplots(4, 1 + len(FIGURE_7_BITS), sharex="row")
    for kept, (scores_row, bias_row) in enumerate(zip(axes[:2], axes[2:])):
        for bits, top, below in zip((16, *FIGURE_7_BITS), scores_row, bias_row):
            P_, bias_, title = P, bias, "full precision"
            if bits < 16:
                *_, P_, bias_ = quantized_attention(subject, a, S, bits, kept=bool(kept))
                title = f"{bits} bits, error {{:.3f}}"
            scores_map(top, P_, subject.S, title.format((P_ - P).norm() / P.norm()))
            bias_map(below, bias_[head], 0, limit, title.format((bias_ - bias).norm() / bias.norm()))
        what = ("nothing kept", "sinks kept")[kept]
        scores_row[0].set_ylabel(f"scores,\n{what}\nquery, token", fontsize=8)
        bias_row[0].set_ylabel(f"bias, head {head},\n{what}\ntoken $t$", fontsize=8)
    for axis in axes.flatten():
        axis.label_outer()
        axis.set_aspect("auto")
        axis.tick_params(labelsize=6)
        axis.title.set_fontsize(8)
    for axis in axes[3]:
        axis.set_xlabel("channel of the head", fontsize=7)
    return figure


def group_numbers(n, d, granularity, g):
    """Which group of a tensor (n, d) each number belongs to, from the grouping itself (quant.py): (n, d), from 0."""
    groups, axes = quant.grouped(torch.zeros(n, d), granularity, g)
    shape = [1 if i - groups.ndim in axes else size for i, size in enumerate(groups.shape)]
    numbers = torch.arange(math.prod(shape)).view(shape).expand_as(groups)
    return quant.ungrouped(numbers, granularity, n)


def figure_10(subject):
    """The three granularities: each number of a tensor under the number of its group."""
    n, d, g, sinks = 12, 8, 4, (0, 6)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    title = f"Figure 10: which numbers share one scale and one zero, {n} tokens of {d} channels, groups of {g}"
    figure.suptitle(title, fontsize=10)
    for axis, granularity in zip(figure.subplots(1, 3), quant.GRANULARITIES):
        numbers = group_numbers(n, d, granularity, g)
        axis.imshow(numbers * 5 % 7, cmap="Pastel2", aspect="auto")
        for i, c in itertools.product(range(n), range(d)):
            style = {"color": SINK, "fontweight": "bold"} if i in sinks else {"color": "black"}
            axis.text(c, i, int(numbers[i, c]), ha="center", va="center", fontsize=7, **style)
            if i and numbers[i - 1, c] != numbers[i, c]:
                axis.plot([c - 0.5, c + 0.5], [i - 0.5, i - 0.5], color="black", linewidth=1)
            if c and numbers[i, c - 1] != numbers[i, c]:
                axis.plot([c - 0.5, c - 0.5], [i - 0.5, i + 0.5], color="black", linewidth=1)
        axis.set(xlabel="channel", ylabel="token", xticks=[], yticks=sinks, yticklabels=["sink"] * len(sinks))
        axis.tick_params(axis="y", colors=SINK, labelsize=8)
        axis.set_title(f"per {granularity}", fontsize=9)
    return figure


def figure_11(subject):
    """Attention scores above cosine similarity of Q and K, in several blocks."""
    stable = subject.stable_blocks
    blocks = sorted({subject.site.l_E, subject.block, stable[len(stable) // 2], stable[-1]})
    figure = sheet(subject, "Figure 11: attention scores, and cosine similarity of Q and K; means over heads", 11, 6)
    axes = figure.subplots(2, len(blocks), squeeze=False, sharex=True, sharey=True)
    for (top, below), l in zip(axes.T, blocks):
        inside = subject.inside(l)
        scores = scores_map(top, scores_of(subject, inside), subject.S, f"block {l} (layer {l - 1})")
        cosine = cosine_map(below, inside.Q, inside.K, subject.S, "")
        top.label_outer()
        below.label_outer()
    figure.colorbar(scores, ax=axes[0], shrink=0.8, label="attention score")
    figure.colorbar(cosine, ax=axes[1], shrink=0.8, label="cosine similarity")
    return figure


def norms_by_block(subject):
    """Figures 18, 20, 22, 23 in numbers: "Q", "K", "V" -> (L, 2, 3), the L2 norms of sinks and of the others, each as
    its 10th, 50th and 90th percentile over heads and tokens."""
    norms, levels = {"Q": [], "K": [], "V": []}, torch.tensor([0.1, 0.5, 0.9])
    for a in look(subject.model, subject.windows[0]):
        for name, rows in norms.items():
            N = getattr(a, name).norm(dim=-1).cpu()  # (heads, n)
            rows.append(torch.stack([N[:, who].quantile(levels) for who in (subject.S, ~subject.S)]))
    return {name: torch.stack(rows) for name, rows in norms.items()}


def figure_18(subject):
    """Figures 18, 20, 22, 23: QKV suppression through all blocks."""
    figure = sheet(subject, "Figure 18: norms of Queries, Keys and Values, block by block", 11, 3.3)
    for axis, (name, N) in zip(figure.subplots(1, 3), norms_by_block(subject).items()):
        L = range(1, len(N) + 1)
        for i, (color, label) in enumerate(((SINK, "sinks"), (OTHER, "other tokens"))):
            axis.plot(L, N[:, i, 1], color=color, label=f"{label}, median")
            axis.fill_between(L, N[:, i, 0], N[:, i, 2], color=color, alpha=0.25, linewidth=0, label="80 % of them")
        axis.axvline(subject.site.l_E, color="black", linestyle=":", label=f"$l_E$ = {subject.site.l_E}")
        axis.set(xlabel="block $l$", ylabel=f"L2 norm of {name}", ylim=(0, None))
    axis.legend(fontsize=7)
    return figure


def figure_19(subject):
    """Figures 19 and 21: |Q|, |K|, |V| themselves, token by channel."""
    figure = sheet(subject, f"Figure 19: magnitudes of Queries, Keys and Values in {in_block(subject)}", 11, 4)
    inside, (tokens, _) = subject.inside(subject.block), closeup(subject)
    for axis, name in zip(figure.subplots(1, 3), "QKV"):
        X = (
            getattr(inside, name).transpose(0, 1).flatten(1).abs().cpu()[tokens[0] : tokens[-1] + 1]
        )  # (tokens, heads d_k)
        image = axis.imshow(X.T, aspect="auto", cmap="viridis", interpolation="none", vmax=X.quantile(0.995).item(),
                            extent=(tokens[0] - 0.5, tokens[-1] + 0.5, X.shape[1] - 0.5, -0.5))  # fmt: skip
        axis.set(ylabel="channel, head by head")
        axis.set_title(f"|{name}|", fontsize=9)
        name_tokens(axis, subject)
        figure.colorbar(image, ax=axis)
    return figure


FIGURES = {1: figure_1, 2: figure_2, 4: figure_4, 5: figure_5, 6: figure_6, 7: figure_7, 10: figure_10, 11: figure_11}
FIGURES |= {18: figure_18, 19: figure_19}
SAME = dict.fromkeys(range(12, 18), 4) | {20: 18, 21: 19, 22: 18, 23: 18}  # for another model or prompt


# ---------------------------------------------------------------------------------------------------------------------
# Command line

LONGEST = 2048  # tokens of a text that is drawn: attention scores are kept for every pair of them
TABLES = (1, 3)
SLUGS = {"packed": "packed", "1": "prompt1", "2": "prompt2"}  # in the names of files; any other text has a hash


def figure_number(text):
    """An argparse type: a figure of the paper's that has data."""
    if text.isdigit() and int(text) in (*FIGURES, *SAME, 9):
        return SAME.get(int(text), int(text))
    raise ArgumentTypeError(f"{text!r}: the paper's figures with data are 1, 2, 4-7 and 9-23 (3 and 8 are sketches)")


def parse_arguments(argv):
    parser = eval_ppl.Parser(
        formatter_class=RawDescriptionHelpFormatter,
        description="The figures and Tables 1 and 3 of the paper, measured on a model and drawn.",
        epilog="Figures 12-17 are Figure 4 of other models and prompts, 20, 22 and 23 are Figure 18, 21 is Figure 19:\n"
        "choose with --model and --prompt. Figure 9 shows results of eval_ppl.py: --fig 9 --json FILE.",
    )
    add = parser.add_argument
    add("--model", default=hub.DEFAULT_MODEL, help="name, hub id or directory (default: %(default)s)")
    add("--fig", nargs="+", type=figure_number, metavar="N", help="figures to draw (default: all)")
    add("--table", nargs="+", type=int, choices=TABLES, help="tables to print (default: both)")
    add(
        "--prompt",
        help="1 or 2, the paper's; packed, Wikipedia articles; or a text (default: 1, and packed for the "
        "default model)",
    )
    add("--layer", type=eval_ppl.number(0), help="layer to draw, from 0 (default: the second where sinks are stable)")
    add("--format", choices=["png", "svg", "pdf"], default="png", help="of pictures (default: %(default)s)")
    add("--out", type=Path, default=Path("figures"), help="folder for pictures and JSON (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="results of eval_ppl.py, for Figure 9")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on cpu, else float16)")
    return complete(parser.parse_args(argv))


def complete(args):
    """Check the options and fill in the defaults that depend on others."""
    everything = not (args.fig or args.table)
    args.fig = sorted(set(args.fig or (FIGURES if everything else ())))
    args.table = args.table or (TABLES if everything else ())
    if everything and args.json:
        args.fig.append(9)
    if args.json and 9 not in args.fig:
        raise ValueError(f"--json {args.json}: only Figure 9 shows results, --fig 9")
    if 9 in args.fig and not args.json:
        raise ValueError("Figure 9 shows results: eval_ppl.py --json FILE writes them, --json FILE names them here")
    if args.fig and Figure is None:
        raise ValueError("figures need matplotlib: pip install matplotlib (--table does without)")
    if args.prompt is None:
        args.prompt = "packed" if args.model == hub.DEFAULT_MODEL else "1"
    eval_ppl.check_folder("--out", args.out)
    eval_ppl.choose_device(args)
    return args


def read_windows(args, model, tokenizer):
    """What titles call the text, and its windows (count, n)."""
    context = model.config.max_position_embeddings
    if args.prompt == "packed":
        n = min(1024, context)
        return f"packed wiki-sample, {n} tokens", eval_ppl.windows(tokenizer, "wiki-sample", "test", n, 8, 0)
    prompt = {"1": kvsink.PROMPTS[0], "2": kvsink.PROMPTS[1]}.get(args.prompt)
    windows = torch.tensor([tokenizer.encode(prompt or args.prompt)])
    if not 2 <= windows.shape[1] <= min(LONGEST, context):
        limits = f"2 to {min(LONGEST, context)} can be drawn"
        raise ValueError(f"--prompt has {windows.shape[1]} tokens for this model: {limits}")
    return f"prompt {args.prompt}" if prompt else f'"{textwrap.shorten(ascii(args.prompt)[1:-1], 40)}"', windows


def calibration_windows(args, model, tokenizer):
    """Of the training split, as eval_ppl.py's defaults: 4 windows of packed text, or 16 of WikiText-2."""
    sample = args.prompt == "packed" or args.model == hub.DEFAULT_MODEL
    text, n, count = ("wiki-sample", 1024, 4) if sample else ("wikitext2", 4096, 16)
    return eval_ppl.windows(tokenizer, text, "train", min(n, model.config.max_position_embeddings), count, seed=0)


def save_json(path, subject, rows):
    about = {"model": subject.name, "text": subject.text, "windows": len(subject.windows), "group_size": GROUP}
    about["blocks"] = subject.stable_blocks
    hub.write_atomically(path, json.dumps(about | {"rows": rows}, indent=1, allow_nan=False).encode())


def run(args):
    if 9 in args.fig:
        if not args.json.is_file():
            raise FileNotFoundError(f"--json {args.json}: no such file")
        figure = eval_ppl.figure_9(eval_ppl.read_results(args.json))
        eval_ppl.save_figure(figure, args.out / f"fig9.{args.format}")
    if args.fig == [9] and not args.table:
        return
    directory = hub.model_directory(args.model)
    L = LlamaConfig.from_pretrained(directory).num_hidden_layers
    if args.layer is not None and args.layer >= L:
        raise ValueError(f"--layer {args.layer}: the model has layers 0 to {L - 1}")
    model = Llama.from_pretrained(directory, args.device, getattr(torch, args.dtype))
    tokenizer = Tokenizer.from_pretrained(directory)
    if 3 in args.table:
        print_table_3(table_3(model, tokenizer, args.model))
    if set(args.fig) - {9} or 1 in args.table:
        evidence(args, model, tokenizer, directory)


def evidence(args, model, tokenizer, directory):
    """Everything that looks inside the model on a text."""
    text, windows = read_windows(args, model, tokenizer)
    eval_ppl.check_vocabulary(windows, model, directory)
    site, name = kvsink.site_of(model, tokenizer, args.model, directory), Path(args.model).resolve().name
    subject = examine(name, text, model, tokenizer, [w[None].to(args.device) for w in windows], site, args.layer)
    if 7 in args.fig and subject.block not in subject.stable_blocks:
        layers = span([l - 1 for l in subject.stable_blocks])
        raise ValueError(f"--layer {args.layer}: Figure 7 needs a layer where sinks are stable, {layers}")
    print_stages(subject)
    slug = SLUGS.get(args.prompt) or "text" + hashlib.sha256(args.prompt.encode(errors="replace")).hexdigest()[:8]
    slug = f"{name}-{slug}"
    if 1 in args.table or 7 in args.fig:
        calibration = calibration_windows(args, model, tokenizer)
        bar = tqdm(calibration, desc="calibrating", unit="window", leave=False, disable=None)
        subject.quantizers = static_quantizers(subject, (window[None].to(args.device) for window in bar))
    if 1 in args.table:
        rows = table_1(subject)
        print_table_1(subject, rows)
        save_json(args.out / f"table1-{slug}.json", subject, rows)
    if 7 in args.fig:
        rows = static_damage(subject)
        print_damage(subject, rows)
        save_json(args.out / f"fig7-{slug}.json", subject, rows)
    drawn = [number for number in args.fig if number != 9]
    for number in tqdm(drawn, desc="drawing", unit="figure", leave=False, disable=None):
        eval_ppl.save_figure(FIGURES[number](subject), args.out / f"fig{number}-{slug}.{args.format}")
    if drawn:
        print(f"\nfigures {', '.join(map(str, drawn))}: {args.out / f'fig*-{slug}.{args.format}'}")


def main(argv=None):
    advice = "give a shorter --prompt, or --device cpu"
    return eval_ppl.guarded("figures.py", lambda: run(parse_arguments(argv)), advice)


if __name__ == "__main__":
    sys.exit(main())
