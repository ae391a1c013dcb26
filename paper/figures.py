"""The figures of Sections 3 and 4 and of Appendices C to E; and Figure 9, from results of
eval_ppl.py.

    python -m paper.figures                                 all for the default model, in figures/
    python -m paper.figures --model llama2-7b --fig 1 2 4   the paper's model
    python -m paper.figures --fig 9 --json results.json     perplexities measured before

Read top to bottom: the figures, in the paper's order; the parts that several of them share; the
command.

What this file does not do: activations.py measures what is drawn here. Figures 3 and 8 are sketches
without data.

Blocks are counted from 1, as in Algorithm 1; "layer" in a title, and the option --layer, count from
0, as the paper's figures do.
"""

import itertools
import math
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import quant
from llama import LlamaConfig, causal_mask
from paper import command
from paper.activations import (
    FIGURE_7_BITS,
    GROUP,
    attention_bias,
    bias_similarity,
    cosines,
    mean_cosine,
    norms_by_block,
    quantized_attention,
    static_damage,
)
from support import cli, hub
from support.evaluate import load_model
from support.report import figure_9, save_figure
from support.results import read_results

try:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
except ImportError:  # `check_matplotlib` says so if figures are asked for
    Figure = None

# --------------------------------------------------------------------------------------------------
# The figures. Colours are Okabe and Ito's, which the colour-blind can tell apart.

SINK = "#D55E00"
OTHER = "#8C8C8C"
# Stages in which outliers change are orange; the stage in which they are stable is blue.
STAGE_COLORS = ("#FFFFFF", "#FBE3D0", "#DCEBF5", "#FBE3D0", "#FFFFFF")
CURVES = {  # name -> formula, marker, colour
    "X_d_in": ("X_{d.in}", "v", "#E69F00"),
    "X_d_out": ("X_{d.out}", "s", "#0072B2"),
    "H_": ("H'", ".", "#CC79A7"),
    "H": ("H", ".", "#000000"),
}


def figure_1(subject):
    """(a) attention scores, (b) |H^l| at the emergence block, (c) the stable outliers over the
    blocks."""
    l_E, c = subject.site

    def reduce(acts):
        H = acts.H.abs().cpu() if acts.l == l_E else None  # not all blocks': they would not fit
        return acts.H[:, c].abs().cpu(), H

    H_c, H = zip(*subject.map_blocks(reduce))
    figure = new_figure(subject, "Figure 1: attention sinks and stable outliers", 11, 3.9)
    axis = figure.add_subplot(1, 3, 1)
    title = f"(a) attention scores, {name_of_block(subject)},\nmean over heads"
    P = subject.scores(subject.activations).mean(0)
    figure.colorbar(draw_scores(axis, P, subject.S, title), ax=axis, shrink=0.7)
    draw_emergence(figure.add_subplot(1, 3, 2, projection="3d"), H[l_E - 1], subject)
    draw_channel(figure.add_subplot(1, 3, 3), torch.stack(H_c), subject)
    return figure


def draw_emergence(axis, H, subject):
    """Figure 1b: draw |H^{l_E}| (n, d), token by channel."""
    l_E, _ = subject.site
    n, d = H.shape
    for i, channel in (H > H.max() / 50).nonzero().tolist():
        color = SINK if subject.S[i] else OTHER
        axis.plot([i, i], [channel, channel], [0, H[i, channel]], color=color, linewidth=2)
    axis.set(xlabel="token", ylabel="channel", xlim=(0, n), ylim=(0, d))
    title = f"(b) $|H^l|$ after block {l_E} (layer {l_E - 1}),\nwhat is over 1/50 of the largest"
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)


def draw_channel(axis, H_c, subject):
    """Figure 1c: draw channel c of |H^l| over the blocks, (L, n)."""
    S = subject.S
    l_E, c = subject.site
    blocks = range(1, len(H_c) + 1)
    labels = ["each sink"] + [None] * (int(S.sum()) - 1)
    axis.semilogy(blocks, H_c[:, S], color=SINK, linewidth=1, label=labels)
    others = H_c[:, ~S]
    axis.semilogy(blocks, others.amax(1), "--", color=OTHER, label="largest other token")
    axis.semilogy(blocks, others.median(1).values, color=OTHER, label="median other token")
    axis.axvline(l_E, color="black", linestyle=":", label=f"$l_E$ = {l_E}")
    axis.set(xlabel="block $l$", ylabel=f"$|H^l_{{i,{c}}}|$")
    axis.set_title(f"(c) channel {c} over the blocks", fontsize=9)
    axis.legend(fontsize=7)


def figure_2(subject):
    """QKV suppression: the L2 norms of Q, K, V of every head, token by token."""
    place = name_of_block(subject)
    title = (
        f"Figure 2: norms of Queries, Keys and Values in {place}, a dot a head, bars at the median"
    )
    figure = new_figure(subject, title, 11, 3.6)
    for axis, name in zip(figure.subplots(1, 3), "QKV"):
        norms = getattr(subject.activations, name).norm(dim=-1).cpu()  # (heads, n)
        for i in closeup_tokens(subject):
            color = SINK if subject.S[i] else OTHER
            axis.plot([i] * len(norms), norms[:, i], ".", color=color, markersize=4)
            axis.plot([i - 0.4, i + 0.4], [norms[:, i].median()] * 2, color=color, linewidth=2)
        axis.set(ylabel=f"L2 norm of {name}", ylim=(0, None))
        name_tokens(axis, subject)
    return figure


def figure_4(subject):
    """Figures 4 and 12-17: extreme outliers over the blocks, and token by token in one block of
    each stage."""
    figure = new_figure(subject, "Figure 4: the evolution of extreme outliers", 11, 5.2)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    draw_peaks(left.subplots(), subject)
    draw_stages(right, subject)
    return figure


def draw_peaks(axis, subject):
    """The left of Figure 4: draw the largest entry of each activation over the blocks, and the
    stages."""
    main = subject.stages[-1]
    L = len(subject.typical)
    blocks = range(1, L + 1)
    for name, (formula, marker, color) in CURVES.items():
        peak = subject.curves[name].abs().amax(1)
        style = {"color": color, "markersize": 4, "label": f"$|{formula}|$"}
        axis.semilogy(blocks, peak, f"{marker}-", **style)
    axis.semilogy(blocks, subject.typical, ":", color="black", label="$|H|$, median")
    above = axis.get_xaxis_transform()  # x in blocks, y from 0 at the bottom to 1 at the top
    for color, (name, stage) in zip(STAGE_COLORS, main._asdict().items()):
        if stage:
            axis.axvspan(stage[0] - 0.5, stage[-1] + 0.5, color=color, zorder=0)
            middle = (stage[0] + stage[-1]) / 2
            axis.text(middle, 1.01, name, transform=above, rotation=40, fontsize=7)
    for weaker in subject.stages[:-1]:
        l = weaker.stabilization[len(weaker.stabilization) // 2]
        axis.text(l, 0.45, "a weaker\nemergence", transform=above, ha="center", fontsize=7)
    axis.set(xlabel="block $l$", xlim=(0.5, L + 0.5))
    axis.set(ylabel="largest magnitude over tokens and channels")
    axis.legend(fontsize=7)


def draw_stages(figure, subject):
    """The right of Figure 4: draw the extremes token by token, in one block of each stage."""
    S = subject.S
    stages = {name: blocks for name, blocks in subject.stages[-1]._asdict().items() if blocks}
    columns = [(name, stage_block(name, stages[name], subject.curves)) for name in stages]
    i = torch.arange(len(S))
    rows = figure.subplots(4, len(columns), sharex=True, squeeze=False)
    for row, (name, (formula, *_)) in zip(rows, CURVES.items()):
        for axis, (_, l) in zip(row, columns):
            X = subject.curves[name][l - 1]  # (n,)
            axis.vlines(i[~S], 0, X[~S], color=OTHER, linewidth=1.2)
            axis.vlines(i[S], 0, X[S], color=SINK, linewidth=1.2)
            axis.tick_params(labelsize=6)
        row[0].set_ylabel(f"${formula}$", fontsize=8)
    for top, bottom, (stage, l) in zip(rows[0], rows[-1], columns):
        top.set_title(f"{stage}, block {l}", fontsize=7)
        bottom.set_xlabel("token", fontsize=7)
    figure.suptitle("of each token the entry largest in magnitude, with its sign", fontsize=8)


def stage_block(stage, blocks, curves):
    """Return the block that stands for a stage: the one with the largest FFN output if the FFN
    causes that stage, else the middle one."""
    if stage in ("emergence", "dissipation"):
        return max(blocks, key=lambda l: curves["X_d_out"][l - 1].abs().max())
    return blocks[len(blocks) // 2]


def figure_5(subject):
    """(a) cosine similarity of Q and K, (b, c, e) norms of Q, K, V, (d) attention scores, (f) norms
    of the output."""
    acts = subject.activations
    S = subject.S
    title = f"Figure 5: QKV suppression in {name_of_block(subject)}"
    figure = new_figure(subject, title, 11, 6.4)
    a, b, c, d, e, f = figure.subplots(2, 3).flatten()
    title = "(a) cosine similarity of Q and K, mean over heads"
    image = draw_cosines(a, cosines(acts.Q, acts.K).mean(0), S, title)
    figure.colorbar(image, ax=a, shrink=0.8)
    title = "(d) attention scores, mean over heads"
    image = draw_scores(d, subject.scores(acts).mean(0), S, title)
    figure.colorbar(image, ax=d, shrink=0.8)
    draw_norms(b, acts.Q, S, "(b) Queries", "L2 norm, median head")
    draw_norms(c, acts.K, S, "(c) Keys", "L2 norm, median head")
    draw_norms(e, acts.V, S, "(e) Values", "L2 norm, median head")
    draw_norms(f, acts.O[None], S, "(f) attention output O", "L2 norm")
    return figure


def draw_norms(axis, X, S, title, ylabel):
    """Draw the L2 norm of each token of X (heads, n, channels), the median over heads."""
    norms = X.norm(dim=-1).median(0).values.cpu()  # (n,)
    i = torch.arange(len(S))
    axis.plot(i[~S], norms[~S], "o", color=OTHER, markersize=2)
    axis.plot(i[S], norms[S], "o", color=SINK, markersize=6)
    axis.set(xlabel="token", ylabel=ylabel, ylim=(0, None))
    axis.set_title(title, fontsize=9, pad=10)
    mark_sinks(axis, S)


def figure_6(subject):
    """(a) similarity of the attention biases (Eq. 9) of all tokens, (b) the bias of a few heads."""
    similarity = bias_similarity(subject)  # (L, h)
    title = r"Figure 6: the attention bias $\Sigma_{i \in S}\, p_i^t v_i$ of Eq. 9"
    figure = new_figure(subject, title, 11, 3.6)
    left, *others = figure.subplots(1, 4, width_ratios=(1.7, 1, 1, 1))
    L, h = similarity.shape
    style = {"cmap": "viridis", "vmin": 0, "vmax": 1, "aspect": "auto"}
    image = left.imshow(similarity.T, extent=(0.5, L + 0.5, h - 0.5, -0.5), **style)
    figure.colorbar(image, ax=left)
    left.set(xlabel="block $l$", ylabel="head")
    left.set_title("(a) cosine similarity of two tokens' biases,\nmean over all pairs", fontsize=9)
    left.axvline(subject.site.l_E + 0.5, color="white", linestyle=":")
    image = draw_biases(others, similarity[subject.block - 1], subject)
    figure.colorbar(image, ax=others[-1])
    return figure


def draw_biases(axes, similarity, subject):
    """Figure 6b: draw the bias of the heads with the most, the median and the least `similarity`
    (h,), and return the last image."""
    acts = subject.activations
    first = int(subject.S.nonzero()[0])
    bias = attention_bias(subject.scores(acts), acts.V, subject.S.to(acts.V.device))[:, first:]
    limit = bias.abs().max().item()
    h = len(similarity)
    heads = similarity.argsort(descending=True)[[0, h // 2, -1]].tolist()
    for axis, head, rank in zip(axes, heads, ("most", "middling", "least")):
        title = f"(b) head {head}, {rank} alike: {similarity[head]:.3f}"
        image = draw_bias(axis, bias[head], first, limit, title)
        axis.set_xlabel("channel of the head")
    axes[0].set_ylabel(f"token $t$, {name_of_block(subject)}")
    return image


def figure_7(subject):
    """Attention scores and biases under static per-token quantization, with and without the sinks
    kept."""
    acts = subject.activations
    P = subject.scores(acts)
    bias = attention_bias(P, acts.V, subject.S.to(acts.V.device))
    head = int(mean_cosine(bias).argmax())
    limit = bias[head].abs().max().item()
    place = name_of_block(subject)
    title = (
        f"Figure 7: static per-token quantization, groups of {GROUP}, {place}; errors are relative"
    )
    figure = new_figure(subject, title, 11, 7.6)
    axes = figure.subplots(4, 1 + len(FIGURE_7_BITS), sharex="row")
    for kept in (False, True):
        scores_row = axes[int(kept)]
        bias_row = axes[2 + int(kept)]
        columns = attention_by_bits(subject, P, bias, kept)
        for top, below, (bits, P_, bias_) in zip(scores_row, bias_row, columns):
            draw_scores(top, P_.mean(0), subject.S, title_with_error(bits, P_, P))
            draw_bias(below, bias_[head], 0, limit, title_with_error(bits, bias_, bias))
        rule = "sinks kept" if kept else "nothing kept"
        scores_row[0].set_ylabel(f"scores,\n{rule}\nquery, token", fontsize=8)
        bias_row[0].set_ylabel(f"bias, head {head},\n{rule}\ntoken $t$", fontsize=8)
    for axis in axes.flatten():
        axis.label_outer()
        axis.set_aspect("auto")
        axis.tick_params(labelsize=6)
        axis.title.set_fontsize(8)
    for axis in axes[3]:
        axis.set_xlabel("channel of the head", fontsize=7)
    return figure


def attention_by_bits(subject, P, bias, kept):
    """Yield bits, attention scores and bias for each column of Figure 7."""
    acts = subject.activations
    S = subject.S.to(acts.V.device)
    yield 16, P, bias
    for bits in FIGURE_7_BITS:
        _, _, P_, bias_ = quantized_attention(subject, acts, S, bits, kept)
        yield bits, P_, bias_


def title_with_error(bits, X_, X):
    if bits == 16:
        return "full precision"
    return f"{bits} bits, error {(X_ - X).norm() / X.norm():.3f}"


def figure_10(subject):
    """The three granularities: each entry of a tensor is drawn as the index of its group."""
    n = 12
    d = 8
    g = 4
    title = (
        "Figure 10: which numbers share one scale and one zero, "
        f"{n} tokens of {d} channels, groups of {g}"
    )
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, granularity in zip(figure.subplots(1, 3), quant.GRANULARITIES):
        draw_groups(axis, group_numbers(n, d, granularity, g), sinks=(0, 6))
        axis.set_title(f"per {granularity}", fontsize=9)
    return figure


def draw_groups(axis, numbers, sinks):
    """Draw the group index of each entry, `numbers` (n, d), with lines between groups."""
    n, d = numbers.shape
    axis.imshow(numbers * 5 % 7, cmap="Pastel2", aspect="auto")
    for i, c in itertools.product(range(n), range(d)):
        style = {"color": SINK, "fontweight": "bold"} if i in sinks else {"color": "black"}
        axis.text(c, i, int(numbers[i, c]), ha="center", va="center", fontsize=7, **style)
        if i and numbers[i - 1, c] != numbers[i, c]:
            axis.plot([c - 0.5, c + 0.5], [i - 0.5, i - 0.5], color="black", linewidth=1)
        if c and numbers[i, c - 1] != numbers[i, c]:
            axis.plot([c - 0.5, c - 0.5], [i - 0.5, i + 0.5], color="black", linewidth=1)
    axis.set(xlabel="channel", xticks=[])
    axis.set(ylabel="token", yticks=sinks, yticklabels=["sink"] * len(sinks))
    axis.tick_params(axis="y", colors=SINK, labelsize=8)


def group_numbers(n, d, granularity, g):
    """Return the index of the group that each entry of a tensor (n, d) belongs to, counted from 0:
    (n, d). The grouping itself is quant.py's."""
    groups, axes = quant.grouped(torch.zeros(n, d), granularity, g)
    shape = [1 if i - groups.ndim in axes else size for i, size in enumerate(groups.shape)]
    numbers = torch.arange(math.prod(shape)).view(shape).expand_as(groups)
    return quant.ungrouped(numbers, granularity, n)


def figure_11(subject):
    """Attention scores, drawn above the cosine similarity of Q and K, in several blocks."""
    stable = subject.stable_blocks
    blocks = sorted({subject.site.l_E, subject.block, stable[len(stable) // 2], stable[-1]})

    def reduce(acts):
        if acts.l in blocks:
            return subject.scores(acts).mean(0), cosines(acts.Q, acts.K).mean(0)

    means = subject.map_blocks(reduce)
    title = "Figure 11: attention scores, and cosine similarity of Q and K; means over heads"
    figure = new_figure(subject, title, 11, 6)
    axes = figure.subplots(2, len(blocks), squeeze=False, sharex=True, sharey=True)
    for (top, below), l in zip(axes.T, blocks):
        P, cosine = means[l - 1]
        scores = draw_scores(top, P, subject.S, f"block {l} (layer {l - 1})")
        similarity = draw_cosines(below, cosine, subject.S, "")
        top.label_outer()
        below.label_outer()
    figure.colorbar(scores, ax=axes[0], shrink=0.8, label="attention score")
    figure.colorbar(similarity, ax=axes[1], shrink=0.8, label="cosine similarity")
    return figure


def figure_18(subject):
    """Figures 18, 20, 22, 23: QKV suppression through all blocks."""
    l_E = subject.site.l_E
    title = "Figure 18: norms of Queries, Keys and Values, block by block"
    figure = new_figure(subject, title, 11, 3.3)
    for axis, (name, norms) in zip(figure.subplots(1, 3), norms_by_block(subject).items()):
        blocks = range(1, len(norms) + 1)
        for i, (color, tokens) in enumerate(((SINK, "sinks"), (OTHER, "other tokens"))):
            low, median, high = norms[:, i].T  # each (L,)
            axis.plot(blocks, median, color=color, label=f"{tokens}, median")
            style = {"color": color, "alpha": 0.25, "linewidth": 0}
            axis.fill_between(blocks, low, high, label="80 % of them", **style)
        axis.axvline(l_E, color="black", linestyle=":", label=f"$l_E$ = {l_E}")
        axis.set(xlabel="block $l$", ylabel=f"L2 norm of {name}", ylim=(0, None))
    axis.legend(fontsize=7)
    return figure


def figure_19(subject):
    """Figures 19 and 21: |Q|, |K|, |V| themselves, token by channel."""
    title = f"Figure 19: magnitudes of Queries, Keys and Values in {name_of_block(subject)}"
    figure = new_figure(subject, title, 11, 4)
    tokens = closeup_tokens(subject)
    style = {"aspect": "auto", "cmap": "viridis", "interpolation": "none"}
    for axis, name in zip(figure.subplots(1, 3), "QKV"):
        X = getattr(subject.activations, name)[:, tokens[0] : tokens[-1] + 1]
        X = X.transpose(0, 1).flatten(1).abs().cpu()  # (tokens, heads d_k)
        extent = (tokens[0] - 0.5, tokens[-1] + 0.5, X.shape[1] - 0.5, -0.5)
        image = axis.imshow(X.T, extent=extent, vmax=X.quantile(0.995).item(), **style)
        axis.set(ylabel="channel, head by head")
        axis.set_title(f"|{name}|", fontsize=9)
        name_tokens(axis, subject)
        figure.colorbar(image, ax=axis)
    return figure


FIGURES = {
    1: figure_1,
    2: figure_2,
    4: figure_4,
    5: figure_5,
    6: figure_6,
    7: figure_7,
    10: figure_10,
    11: figure_11,
    18: figure_18,
    19: figure_19,
}
# The same figures for another model or prompt.
SAME_FIGURE = {12: 4, 13: 4, 14: 4, 15: 4, 16: 4, 17: 4, 20: 18, 21: 19, 22: 18, 23: 18}


# --------------------------------------------------------------------------------------------------
# The parts that several figures share

UNSEEN = -2  # in a map of pairs, below every score and cosine: a key that comes after its query


def new_figure(subject, title, width, height):
    """Return an empty figure under a title that names model, text and sinks."""
    sinks = subject.S.nonzero().flatten().tolist()
    listed = ", ".join(map(str, sinks[:8])) + (", ..." if len(sinks) > 8 else "")
    subtitle = escape_dollar(f"{subject.name} on {subject.text}; sinks at tokens {listed}")
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10)
    return figure


def escape_dollar(text):
    """Escape the $ that would begin a formula."""
    return text.replace("$", r"\$")


def name_of_block(subject):
    return f"block {subject.block} (layer {subject.block - 1})"


def mark_sinks(axis, S):
    """Draw a triangle above each sink, on an axis of tokens."""
    i = S.nonzero().flatten()
    above = axis.get_xaxis_transform()  # x in tokens, y from 0 at the bottom to 1 at the top
    style = {"color": SINK, "markersize": 4, "clip_on": False}
    axis.plot(i, [1.02] * len(i), "v", transform=above, **style)


def draw_pairs(axis, X, S, title, **style):
    """Draw a map of X (n, n), query by key. A long text is drawn in squares of tokens, each with
    its largest value, because a column one pixel wide would be lost."""
    n = X.shape[0]
    g = -(-n // 128)
    X = X.masked_fill(~causal_mask(n, None, X.device), UNSEEN)
    X = F.max_pool2d(X[None, None], g, ceil_mode=True)[0, 0].cpu()
    X = X.where(X > UNSEEN, torch.nan)
    end = len(X) * g - 0.5
    image = axis.imshow(X, extent=(-0.5, end, end, -0.5), interpolation="none", **style)
    axis.set_xlim(-0.03 * n, end)  # the frame would hide token 0, a sink
    squares = f" (largest of {g} x {g})" if g > 1 else ""
    axis.set(xlabel=f"key, token{squares}", ylabel="query, token")
    axis.set_title(title, fontsize=9, pad=10)
    mark_sinks(axis, S)
    return image


def draw_scores(axis, P, S, title):
    """Draw attention scores (n, n), a mean over heads; the square root makes small ones visible."""
    return draw_pairs(axis, P, S, title, cmap="viridis", norm=PowerNorm(0.5, 0, 1))


def draw_cosines(axis, cosine, S, title):
    """Draw the cosine similarity of Q and K (n, n), a mean over heads."""
    return draw_pairs(axis, cosine, S, title, cmap="PuOr_r", vmin=-1, vmax=1)


def draw_bias(axis, bias, first, limit, title):
    """Draw the attention bias of one head (n - first, d_k), for the tokens from `first` on."""
    n, d_k = bias.shape
    extent = (-0.5, d_k - 0.5, first + n - 0.5, first - 0.5)
    style = {"cmap": "PuOr_r", "interpolation": "none", "aspect": "auto"}
    axis.set_title(title, fontsize=8)
    return axis.imshow(bias.cpu(), extent=extent, vmin=-limit, vmax=limit, **style)


def closeup_tokens(subject):
    """Return the range of at most 24 tokens about the last sink."""
    n = len(subject.S)
    start = max(0, min(int(subject.S.nonzero()[-1]) - 14, n - 24))
    return range(start, min(start + 24, n))


def name_tokens(axis, subject):
    """Write the tokens of the close-up along the axis, the sinks in colour."""
    tokens = closeup_tokens(subject)
    labels = []
    for i in tokens:
        word = subject.tokenizer.decode([int(subject.windows[0][0, i])])
        labels.append(f"{escape_dollar(ascii(word)[1:-1][:13])} {i}")
    axis.set_xticks(tokens, labels, rotation=90, fontsize=7)
    for label, i in zip(axis.get_xticklabels(), tokens):
        label.set_color(SINK if subject.S[i] else "black")


# --------------------------------------------------------------------------------------------------
# The command


def run(config):
    if 9 in config.figures:
        if not config.results.is_file():
            raise FileNotFoundError(f"--json {config.results}: no such file")
        figure = figure_9(read_results(config.results))
        save_figure(figure, config.out / f"fig9.{config.format}")
    config = replace(config, figures=tuple(n for n in config.figures if n != 9))
    if not config.figures:
        return
    check_layer(config)
    loaded = load_model(config.model, config.machine)
    subject = command.find_sinks(config, loaded)
    if 7 in config.figures:
        check_figure_7(config, subject)
        subject = command.calibrate(config, loaded, subject)
    report(config, subject)


def report(config, subject):
    """Draw the figures of a Subject, which has its static quantizers if Figure 7 is one of them."""
    if 7 in config.figures:
        rows = static_damage(subject)
        print_damage(subject, rows)
        command.save_json(config.path("fig7", "json"), subject, rows)
    for n in tqdm(config.figures, desc="drawing", unit="figure", leave=False, disable=None):
        save_figure(FIGURES[n](subject), config.path(f"fig{n}", config.format))
    numbers = ", ".join(map(str, config.figures))
    print(f"\nfigures {numbers}: {config.path('fig*', config.format)}")


def print_damage(subject, rows):
    print(
        "\nFigure 7 in numbers: relative errors of static per-token quantization, "
        f"{command.describe_setting(subject)}"
    )
    for i, row in enumerate(rows):
        errors = {name: error for name, error in row.items() if name != "bits"}
        if i == 0:
            print(f"{'bits':>4}" + "".join(f"{name:>13}" for name in errors))
        cells = "".join(f"{error:>13.3f}" for error in errors.values())
        print(f"{row['bits']:>4}{cells}", flush=True)


def parse(argv):
    parser = figures_parser()
    args = parser.parse_args(argv)
    numbers = set(args.fig or [*FIGURES, *([9] if args.json else [])])
    if args.json and 9 not in numbers:
        raise ValueError(f"--json {args.json}: only Figure 9 shows results, --fig 9")
    if 9 in numbers and not args.json:
        raise ValueError(
            "Figure 9 shows results: eval_ppl.py --json FILE writes them, --json FILE names them "
            "here"
        )
    check_matplotlib()
    return replace(
        command.analysis_config(args),
        figures=tuple(sorted(numbers)),
        layer=args.layer,
        format=args.format,
        results=args.json,
    )


def figures_parser():
    parser = cli.Parser(
        prog="python -m paper.figures",
        description="The figures of the paper, measured on a model and drawn.",
        epilog="Figures 12-17 are Figure 4 of other models and prompts, 20, 22 and 23 are Figure "
        "18, 21 is Figure 19:\nchoose with --model and --prompt. Figure 9 shows results of "
        "eval_ppl.py: --fig 9 --json FILE.",
    )
    add = parser.add_argument
    add("--fig", nargs="+", type=figure_number, metavar="N", help="figures to draw (default: all)")
    command.add_options(parser)
    add(
        "--layer",
        type=cli.number(0),
        help="layer to draw, counted from 0 (default: the second in which sinks are stable)",
    )
    add(
        "--format",
        choices=["png", "svg", "pdf"],
        default="png",
        help="format of the pictures (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="results of eval_ppl.py, for Figure 9")
    command.add_machine_options(parser)
    return parser


def figure_number(text):
    """An argparse type: a figure of the paper that has data."""
    n = int(text) if text.isdecimal() else 0
    if n in (*FIGURES, *SAME_FIGURE, 9):
        return SAME_FIGURE.get(n, n)
    raise ArgumentTypeError(
        f"{text!r}: the paper's figures with data are 1, 2, 4-7 and 9-23 (3 and 8 are sketches)"
    )


def check_matplotlib():
    if Figure is None:
        raise ValueError(
            "figures need matplotlib: pip install matplotlib (paper.table1 and paper.table3 do "
            "without)"
        )


def check_layer(config):
    """Raise ValueError, before weights are read, if the model lacks the layer to draw."""
    L = LlamaConfig.from_pretrained(hub.model_directory(config.model)).num_hidden_layers
    if config.layer is not None and config.layer >= L:
        raise ValueError(f"--layer {config.layer}: the model has layers 0 to {L - 1}")


def check_figure_7(config, subject):
    """Raise ValueError if Figure 7 has nothing to show in the layer that was chosen."""
    if subject.block not in subject.stable_blocks:
        layers = command.format_span([l - 1 for l in subject.stable_blocks])
        raise ValueError(
            f"--layer {config.layer}: Figure 7 needs a layer in which sinks are stable, {layers}"
        )


def main(argv=None):
    return cli.run_command("paper.figures", lambda: run(parse(argv)), command.ADVICE)


if __name__ == "__main__":
    cli.exit_process(main())
