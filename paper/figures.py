"""The figures of Sections 3 and 4 and of Appendices C to E, drawn; and Figure 9, from results of
eval_ppl.py.

    python -m paper.figures                                       all figures of the embedded default, into figures/
    python -m paper.figures --model llama2-7b --fig 1 2 4         the paper's model
    python -m paper.figures --fig 9 --json results.json           perplexities, measured before

Read top to bottom: what several figures have in them; the figures, in the paper's order; the
command.

What this file does not do: what is drawn is measured by activations.py. Figures 3 and 8 are
sketches without data.

Blocks are counted from 1, as in Algorithm 1; "layer" in a title, and the option --layer, count from
0, as the paper's figures do.
"""

import itertools
import math
from argparse import ArgumentTypeError
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import quant
from llama import causal_mask
from paper import command
from paper.activations import (
    FIGURE_7_BITS,
    GROUP,
    attention_bias,
    bias_similarity,
    cosines,
    look,
    mean_cosine,
    norms_by_block,
    quantized_attention,
    static_damage,
)
from support import cli, results

try:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
except ImportError:  # said where figures are asked for
    Figure = None

# --------------------------------------------------------------------------------------------------
# What several figures have in them. Colours are Okabe and Ito's, which the colour-blind can tell
# apart.

SINK, OTHER = "#D55E00", "#8C8C8C"
UNSEEN = -2  # in a map of pairs, below every score and cosine: a key that comes after its query
STAGE_COLORS = (
    "#FFFFFF",
    "#FBE3D0",
    "#DCEBF5",
    "#FBE3D0",
    "#FFFFFF",
)  # what changes outliers, and what holds them
CURVES = {  # name -> formula, marker, colour
    "X_d_in": ("X_{d.in}", "v", "#E69F00"),
    "X_d_out": ("X_{d.out}", "s", "#0072B2"),
    "H_": ("H'", ".", "#CC79A7"),
    "H": ("H", ".", "#000000"),
}


def sheet(subject, title, width, height):
    """An empty figure under a title that names model, text and sinks."""
    sinks = subject.S.nonzero().flatten().tolist()
    listed = ", ".join(map(str, sinks[:8])) + (", ..." if len(sinks) > 8 else "")
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(
        f"{title}\n" + plain(f"{subject.name} on {subject.text}; sinks at tokens {listed}"),
        fontsize=10,
    )
    return figure


def plain(text):
    """Text that is not to be read as a formula."""
    return text.replace("$", r"\$")


def in_block(subject):
    return f"block {subject.block} (layer {subject.block - 1})"


def mark_sinks(axis, S):
    """A triangle above each sink, on an axis of tokens."""
    i = S.nonzero().flatten()
    axis.plot(
        i,
        [1.02] * len(i),
        "v",
        color=SINK,
        markersize=4,
        clip_on=False,
        transform=axis.get_xaxis_transform(),
    )


def token_map(axis, X, S, title, **style):
    """A map of X (n, n), query by key. A long text is drawn in squares of tokens, each by its
    largest value: a column one pixel wide would be lost."""
    n = X.shape[0]
    g = -(-n // 128)
    X = X.masked_fill(~causal_mask(n, None, X.device), UNSEEN)
    X = F.max_pool2d(X[None, None], g, ceil_mode=True)[0, 0].cpu()
    X = X.where(X > UNSEEN, torch.nan)
    end = len(X) * g - 0.5
    image = axis.imshow(X, extent=(-0.5, end, end, -0.5), interpolation="none", **style)
    axis.set_xlim(-0.03 * n, end)  # the frame would hide token 0, a sink
    axis.set(
        xlabel="key, token" + (f" (largest of {g} x {g})" if g > 1 else ""), ylabel="query, token"
    )
    axis.set_title(title, fontsize=9, pad=10)
    mark_sinks(axis, S)
    return image


def scores_map(axis, P, S, title):
    """Attention scores (n, n), a mean over heads; the square root makes the small ones visible."""
    return token_map(axis, P, S, title, cmap="viridis", norm=PowerNorm(0.5, 0, 1))


def cosine_map(axis, cosine, S, title):
    """Cosine similarity of Q and K (n, n), a mean over heads."""
    return token_map(axis, cosine, S, title, cmap="PuOr_r", vmin=-1, vmax=1)


def bias_map(axis, bias, first, limit, title):
    """The attention bias of one head, (n - first, d_k), of the tokens from `first` on."""
    n, d_k = bias.shape
    extent = (-0.5, d_k - 0.5, first + n - 0.5, first - 0.5)
    style = {
        "cmap": "PuOr_r",
        "vmin": -limit,
        "vmax": limit,
        "interpolation": "none",
        "aspect": "auto",
    }
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
    axis.set_xticks(
        tokens, [f"{word} {i}" for word, i in zip(words, tokens)], rotation=90, fontsize=7
    )
    for label, i in zip(axis.get_xticklabels(), tokens):
        label.set_color(SINK if subject.S[i] else "black")


# --------------------------------------------------------------------------------------------------
# The figures


def figure_1(subject):
    """(a) attention scores, (b) |H^l| at the emergence block, (c) the stable outliers over the
    blocks."""
    S, (l_E, c) = subject.S, subject.site

    def magnitudes(a):
        return a.H[:, c].abs().cpu(), a.H.abs().cpu() if a.l == l_E else None

    seen = look(subject.model, subject.windows[0], magnitudes)
    figure = sheet(subject, "Figure 1: attention sinks and stable outliers", 11, 3.9)
    axis = figure.add_subplot(1, 3, 1)
    title = f"(a) attention scores, {in_block(subject)},\nmean over heads"
    figure.colorbar(
        scores_map(axis, subject.scores(subject.inside).mean(0), S, title), ax=axis, shrink=0.7
    )

    axis = figure.add_subplot(1, 3, 2, projection="3d")
    H = seen[l_E - 1][1]  # (n, d)
    n, d = H.shape
    for i, channel in (H > H.max() / 50).nonzero().tolist():
        color = SINK if S[i] else OTHER
        axis.plot([i, i], [channel, channel], [0, H[i, channel]], color=color, linewidth=2)
    axis.set(xlabel="token", ylabel="channel", xlim=(0, n), ylim=(0, d))
    axis.set_title(
        f"(b) $|H^l|$ after block {l_E} (layer {l_E - 1}),\nwhat is over 1/50 of the largest",
        fontsize=9,
    )
    axis.tick_params(labelsize=7)

    axis = figure.add_subplot(1, 3, 3)
    stable = torch.stack([H_c for H_c, _ in seen])  # (L, n)
    L = range(1, len(stable) + 1)
    axis.semilogy(
        L, stable[:, S], color=SINK, linewidth=1, label=["each sink"] + [None] * (int(S.sum()) - 1)
    )
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
    figure, (tokens, _) = sheet(subject, title, 11, 3.6), closeup(subject)
    for axis, name in zip(figure.subplots(1, 3), "QKV"):
        norms = getattr(subject.inside, name).norm(dim=-1).cpu()  # (heads, n)
        for i in tokens:
            color = SINK if subject.S[i] else OTHER
            axis.plot([i] * len(norms), norms[:, i], ".", color=color, markersize=4)
            axis.plot([i - 0.4, i + 0.4], [norms[:, i].median()] * 2, color=color, linewidth=2)
        axis.set(ylabel=f"L2 norm of {name}", ylim=(0, None))
        name_tokens(axis, subject)
    return figure


def figure_4(subject):
    """Figures 4 and 12-17: extreme outliers over the blocks, and token by token in a block of each
    stage."""
    figure = sheet(subject, "Figure 4: the evolution of extreme outliers", 11, 5.2)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    draw_peaks(left.subplots(), subject)
    draw_stages(right, subject)
    return figure


def draw_peaks(axis, subject):
    """The left of Figure 4: over the blocks, the largest entry of each activation, and the
    stages."""
    curves, main, L = subject.curves, subject.stages[-1], len(subject.typical)
    for name, (formula, marker, color) in CURVES.items():
        peak = curves[name].abs().amax(1)
        axis.semilogy(
            range(1, L + 1), peak, f"{marker}-", color=color, label=f"$|{formula}|$", markersize=4
        )
    axis.semilogy(range(1, L + 1), subject.typical, ":", color="black", label="$|H|$, median")
    above = axis.get_xaxis_transform()  # x in blocks, y from 0 at the bottom to 1 at the top
    for color, name, blocks in zip(STAGE_COLORS, main._fields, main):
        if blocks:
            axis.axvspan(blocks[0] - 0.5, blocks[-1] + 0.5, color=color, zorder=0)
            axis.text(
                (blocks[0] + blocks[-1]) / 2, 1.01, name, transform=above, rotation=40, fontsize=7
            )
    for weaker in subject.stages[:-1]:
        l = weaker.stabilization[len(weaker.stabilization) // 2]
        axis.text(l, 0.45, "a weaker\nemergence", transform=above, ha="center", fontsize=7)
    axis.set(
        xlabel="block $l$", ylabel="largest magnitude over tokens and channels", xlim=(0.5, L + 0.5)
    )
    axis.legend(fontsize=7)


def draw_stages(figure, subject):
    """The right of Figure 4: token by token, in one block of each stage."""
    curves, S, main = subject.curves, subject.S, subject.stages[-1]
    shown = [
        (name, stage_block(name, blocks, curves))
        for name, blocks in zip(main._fields, main)
        if blocks
    ]
    i, rows = torch.arange(len(S)), figure.subplots(4, len(shown), sharex=True, squeeze=False)
    for row, (name, (formula, *_)) in zip(rows, CURVES.items()):
        for panel, (_, l) in zip(row, shown):
            for who, color in ((~S, OTHER), (S, SINK)):
                panel.vlines(i[who], 0, curves[name][l - 1, who], color=color, linewidth=1.2)
            panel.tick_params(labelsize=6)
        row[0].set_ylabel(f"${formula}$", fontsize=8)
    for top, bottom, (stage, l) in zip(rows[0], rows[-1], shown):
        top.set_title(f"{stage}, block {l}", fontsize=7)
        bottom.set_xlabel("token", fontsize=7)
    figure.suptitle("of each token the entry largest in magnitude, with its sign", fontsize=8)


def stage_block(stage, blocks, curves):
    """The block of a stage to show: where the FFN does the most, if that is what makes the stage,
    else the middle."""
    if stage in ("emergence", "dissipation"):
        return max(blocks, key=lambda l: curves["X_d_out"][l - 1].abs().max())
    return blocks[len(blocks) // 2]


def figure_5(subject):
    """(a) cosine similarity of Q and K, (b, c, e) norms of Q, K, V, (d) attention scores, (f) norms
    of the output."""
    inside, S = subject.inside, subject.S
    figure = sheet(subject, f"Figure 5: QKV suppression in {in_block(subject)}", 11, 6.4)
    axes = dict(zip("abcdef", figure.subplots(2, 3).flatten()))
    title = "(a) cosine similarity of Q and K, mean over heads"
    figure.colorbar(
        cosine_map(axes["a"], cosines(inside.Q, inside.K).mean(0), S, title),
        ax=axes["a"],
        shrink=0.8,
    )
    title = "(d) attention scores, mean over heads"
    figure.colorbar(
        scores_map(axes["d"], subject.scores(inside).mean(0), S, title), ax=axes["d"], shrink=0.8
    )
    panels = {"b": ("Queries", inside.Q), "c": ("Keys", inside.K), "e": ("Values", inside.V)}
    for letter, (title, X) in (panels | {"f": ("attention output O", inside.O[None])}).items():
        norms, i = X.norm(dim=-1).median(0).values.cpu(), torch.arange(len(S))
        for who, color, size in ((~S, OTHER, 2), (S, SINK, 6)):
            axes[letter].plot(i[who], norms[who], "o", color=color, markersize=size)
        axes[letter].set(
            xlabel="token",
            ylabel="L2 norm" + (", median head" if letter != "f" else ""),
            ylim=(0, None),
        )
        axes[letter].set_title(f"({letter}) {title}", fontsize=9, pad=10)
        mark_sinks(axes[letter], S)
    return figure


def figure_6(subject):
    """(a) how alike the attention bias of Eq. 9 is over all tokens, (b) the bias of a few heads."""
    alike, first, l = bias_similarity(subject), int(subject.S.nonzero()[0]), subject.block
    figure = sheet(
        subject, r"Figure 6: the attention bias $\Sigma_{i \in S}\, p_i^t v_i$ of Eq. 9", 11, 3.6
    )
    left, *others = figure.subplots(1, 4, width_ratios=(1.7, 1, 1, 1))
    (L, h), style = alike.shape, {"cmap": "viridis", "vmin": 0, "vmax": 1, "aspect": "auto"}
    figure.colorbar(left.imshow(alike.T, extent=(0.5, L + 0.5, h - 0.5, -0.5), **style), ax=left)
    left.set(xlabel="block $l$", ylabel="head")
    left.set_title("(a) cosine similarity of two tokens' biases,\nmean over all pairs", fontsize=9)
    left.axvline(subject.site.l_E + 0.5, color="white", linestyle=":")

    a, order = subject.inside, alike[l - 1].argsort(descending=True)
    bias = attention_bias(subject.scores(a), a.V, subject.S.to(a.V.device))[:, first:]
    limit = bias.abs().max().item()
    for axis, head, which in zip(
        others, order[[0, h // 2, -1]].tolist(), ("most", "middling", "least")
    ):
        image = bias_map(
            axis,
            bias[head],
            first,
            limit,
            f"(b) head {head}, {which} alike: {alike[l - 1, head]:.3f}",
        )
        axis.set_xlabel("channel of the head")
    others[0].set_ylabel(f"token $t$, {in_block(subject)}")
    figure.colorbar(image, ax=others[-1])
    return figure


def figure_7(subject):
    """Attention scores and biases under static per-token quantization, with and without the sinks
    kept."""
    a, S = subject.inside, subject.S.to(subject.windows[0].device)
    P = subject.scores(a)
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
            scores_map(top, P_.mean(0), subject.S, title.format((P_ - P).norm() / P.norm()))
            bias_map(
                below, bias_[head], 0, limit, title.format((bias_ - bias).norm() / bias.norm())
            )
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
    """Which group of a tensor (n, d) each number belongs to, from the grouping itself (quant.py):
    (n, d), from 0."""
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
        axis.set(
            xlabel="channel",
            ylabel="token",
            xticks=[],
            yticks=sinks,
            yticklabels=["sink"] * len(sinks),
        )
        axis.tick_params(axis="y", colors=SINK, labelsize=8)
        axis.set_title(f"per {granularity}", fontsize=9)
    return figure


def figure_11(subject):
    """Attention scores above cosine similarity of Q and K, in several blocks."""
    stable = subject.stable_blocks
    blocks = sorted({subject.site.l_E, subject.block, stable[len(stable) // 2], stable[-1]})

    def means(a):
        return (subject.scores(a).mean(0), cosines(a.Q, a.K).mean(0)) if a.l in blocks else None

    seen = look(subject.model, subject.windows[0], means)
    figure = sheet(
        subject,
        "Figure 11: attention scores, and cosine similarity of Q and K; means over heads",
        11,
        6,
    )
    axes = figure.subplots(2, len(blocks), squeeze=False, sharex=True, sharey=True)
    for (top, below), l in zip(axes.T, blocks):
        P, cosine = seen[l - 1]
        scores = scores_map(top, P, subject.S, f"block {l} (layer {l - 1})")
        cosine = cosine_map(below, cosine, subject.S, "")
        top.label_outer()
        below.label_outer()
    figure.colorbar(scores, ax=axes[0], shrink=0.8, label="attention score")
    figure.colorbar(cosine, ax=axes[1], shrink=0.8, label="cosine similarity")
    return figure


def figure_18(subject):
    """Figures 18, 20, 22, 23: QKV suppression through all blocks."""
    figure = sheet(subject, "Figure 18: norms of Queries, Keys and Values, block by block", 11, 3.3)
    for axis, (name, N) in zip(figure.subplots(1, 3), norms_by_block(subject).items()):
        L = range(1, len(N) + 1)
        for i, (color, label) in enumerate(((SINK, "sinks"), (OTHER, "other tokens"))):
            axis.plot(L, N[:, i, 1], color=color, label=f"{label}, median")
            axis.fill_between(
                L,
                N[:, i, 0],
                N[:, i, 2],
                color=color,
                alpha=0.25,
                linewidth=0,
                label="80 % of them",
            )
        axis.axvline(
            subject.site.l_E, color="black", linestyle=":", label=f"$l_E$ = {subject.site.l_E}"
        )
        axis.set(xlabel="block $l$", ylabel=f"L2 norm of {name}", ylim=(0, None))
    axis.legend(fontsize=7)
    return figure


def figure_19(subject):
    """Figures 19 and 21: |Q|, |K|, |V| themselves, token by channel."""
    figure = sheet(
        subject, f"Figure 19: magnitudes of Queries, Keys and Values in {in_block(subject)}", 11, 4
    )
    tokens, _ = closeup(subject)
    for axis, name in zip(figure.subplots(1, 3), "QKV"):
        X = getattr(subject.inside, name)[:, tokens[0] : tokens[-1] + 1].transpose(0, 1)
        X = X.flatten(1).abs().cpu()  # (tokens, heads d_k)
        image = axis.imshow(X.T, aspect="auto", cmap="viridis", interpolation="none", vmax=X.quantile(0.995).item(),
                            extent=(tokens[0] - 0.5, tokens[-1] + 0.5, X.shape[1] - 0.5, -0.5))  # fmt: skip
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
}
FIGURES |= {18: figure_18, 19: figure_19}
SAME = dict.fromkeys(range(12, 18), 4) | {
    20: 18,
    21: 19,
    22: 18,
    23: 18,
}  # for another model or prompt


# --------------------------------------------------------------------------------------------------
# The command


def print_damage(subject, rows):
    print(
        f"\nFigure 7 in numbers: relative errors of static per-token quantization, {command.whereabouts(subject)}"
    )
    print(f"{'bits':>4}" + "".join(f"{name:>13}" for name in rows[0] if name != "bits"))
    for row in rows:
        print(
            f"{row['bits']:>4}"
            + "".join(f"{x:>13.3f}" for name, x in row.items() if name != "bits"),
            flush=True,
        )


def report(what, subject, numbers, ending):
    """Draw these figures of a Subject, which needs its static quantizers for Figure 7. `ending` is
    png, svg or pdf."""
    if 7 in numbers:
        rows = static_damage(subject)
        print_damage(subject, rows)
        command.save_json(what.file("fig7", "json"), subject, rows)
    for number in tqdm(numbers, desc="drawing", unit="figure", leave=False, disable=None):
        results.save_figure(FIGURES[number](subject), what.file(f"fig{number}", ending))
    print(f"\nfigures {', '.join(map(str, numbers))}: {what.file('fig*', ending)}")


def check_figure_7(what, subject):
    """Raises ValueError where Figure 7 has nothing to show in the layer that was chosen."""
    if subject.block not in subject.stable_blocks:
        layers = command.span([l - 1 for l in subject.stable_blocks])
        raise ValueError(
            f"--layer {what.layer}: Figure 7 needs a layer where sinks are stable, {layers}"
        )


def run(what, numbers, ending, json):
    """`json` is the file of results for Figure 9."""
    if 9 in numbers:
        if not json.is_file():
            raise FileNotFoundError(f"--json {json}: no such file")
        results.save_figure(
            results.figure_9(results.read_results(json)), what.out / f"fig9.{ending}"
        )
    numbers = [number for number in numbers if number != 9]
    if not numbers:
        return
    loaded = command.load(what.model, what.machine, what.layer)
    subject = command.examined(what, loaded)
    if 7 in numbers:
        check_figure_7(what, subject)
        subject = command.calibrated(what, loaded, subject)
    report(what, subject, numbers, ending)


def figure_number(text):
    """An argparse type: a figure of the paper's that has data."""
    if text.isdecimal() and int(text) in (*FIGURES, *SAME, 9):
        return SAME.get(int(text), int(text))
    raise ArgumentTypeError(
        f"{text!r}: the paper's figures with data are 1, 2, 4-7 and 9-23 (3 and 8 are sketches)"
    )


def check_matplotlib():
    if Figure is None:
        raise ValueError(
            "figures need matplotlib: pip install matplotlib (paper.table1 and paper.table3 do without)"
        )


def parse(argv):
    parser = cli.Parser(
        prog="python -m paper.figures",
        description="The figures of the paper, measured on a model and drawn.",
        epilog="Figures 12-17 are Figure 4 of other models and prompts, 20, 22 and 23 are Figure 18, 21 is Figure 19:\n"
        "choose with --model and --prompt. Figure 9 shows results of eval_ppl.py: --fig 9 --json FILE.",
    )
    add = parser.add_argument
    add("--fig", nargs="+", type=figure_number, metavar="N", help="figures to draw (default: all)")
    command.add_options(add)
    add(
        "--layer",
        type=cli.number(0),
        help="layer to draw, from 0 (default: the second where sinks are stable)",
    )
    add(
        "--format",
        choices=["png", "svg", "pdf"],
        default="png",
        help="of pictures (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="results of eval_ppl.py, for Figure 9")
    command.add_machine_options(parser)
    args = parser.parse_args(argv)
    numbers = sorted(set(args.fig or [*FIGURES, *([9] if args.json else [])]))
    if args.json and 9 not in numbers:
        raise ValueError(f"--json {args.json}: only Figure 9 shows results, --fig 9")
    if 9 in numbers and not args.json:
        raise ValueError(
            "Figure 9 shows results: eval_ppl.py --json FILE writes them, --json FILE names them here"
        )
    check_matplotlib()
    return command.what(args), numbers, args.format, args.json


def main(argv=None):
    return cli.run_command("paper.figures", lambda: run(*parse(argv)), command.ADVICE)


if __name__ == "__main__":
    cli.exit_process(main())
