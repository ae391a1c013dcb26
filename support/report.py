"""How results are shown: the table, printed line by line; paired comparisons; Figure 9.

What this file does not do: it measures nothing. A result is a dict, as in the JSON file.
"""

import io
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kvsink import AUTO
from support.cache import printable, save
from support.machine import is_first_rank
from support.results import add_result
from support.rows import FULL_PRECISION, PAPER_KEEPS, row_of

# --------------------------------------------------------------------------------------------------
# The table


class Column(NamedTuple):
    """A column of the table besides those that every table has."""

    title: str
    width: int
    text: Callable  # result -> the text of its cell


STORED_BITS = Column("stored bits", 13, lambda result: f"{result['stored_bits']:.2f}")


def print_and_save(heading, site, results, json, columns=()):
    """Print results as they come, and add each to the file `json` (which may be None). Return all
    results on rank 0, an empty list elsewhere."""
    if not is_first_rank():
        for _ in results:  # measures this rank's share of the windows
            pass
        return []
    print(heading)
    if site.l_E:
        print(f"sinks predicted after block {site.l_E} (counted from 1) in channel {site.c}")
    done = []
    for result in print_rows(results, columns):
        done.append(result)
        if json:
            add_result(json, result)
    return done


def print_rows(results, columns=()):
    """Yield the same results, and print each as it comes: first a header, then one line per row,
    and a comparison after each scheme and width."""
    header = f"{'scheme':<16}{'bits':>4}   {'kept':<17}{'PPL':>10}{'over full':>12}"
    header += "".join(f"{column.title:>{column.width}}" for column in columns)
    print(header, flush=True)
    group = []  # the results of one scheme at one width
    for result in results:
        if group and scheme_and_bits(result) != scheme_and_bits(group[0]):
            print_comparisons(group)
            group = []
        print(table_line(result, columns, first=not group), flush=True)
        group.append(result)
        yield result
    print_comparisons(group)


def scheme_and_bits(result):
    row = row_of(result)
    return row.scheme_name, row.bits


def table_line(result, columns, first):
    """Return one line of the table. The `first` line of a group names the scheme and the width."""
    row = row_of(result)
    name = f"{row.scheme_name:<16}{row.bits:>4}" if first else ""
    kept = str(row.rule)
    over_full = f"{result['ppl'] - result['ppl_fp']:+.3f}"
    if row == FULL_PRECISION:
        name = "full precision"
        kept = over_full = ""
    line = f"{name:<20}   {kept:<17}{result['ppl']:>10.3f}{over_full:>12}"
    line += "".join(f"{column.text(result):>{column.width}}" for column in columns)
    if row.rule.k == AUTO:
        kept = result["kept"]
        line += f"   {statistics.mean(kept):.1f} tokens, at most {max(kept)}"
    return line.rstrip()


def print_comparisons(group):
    """Print the best row of a group, and what each rule that predicts sinks gains over PFN: with as
    many tokens, with the most tokens, and over the best PFN row of the group."""
    results = {row_of(result): result for result in group}
    by_ppl = sorted(results, key=lambda row: results[row]["ppl"])
    if len(by_ppl) > 1:
        print(f"{'':<23}{by_ppl[0].rule} is the best of these", flush=True)
    pfn_rows = [row for row in by_ppl if row.rule.first and not row.rule.predicts]
    largest = max((row.rule.first for row in pfn_rows), default=0)
    for row in results:
        if not row.rule.predicts:
            continue
        sizes = (row.rule.k, largest)
        rivals = [rival for N in sizes for rival in pfn_rows if rival.rule.first == N]
        rivals += pfn_rows[:1]
        for rival in dict.fromkeys(rivals):
            if "nll" in results[row] and "nll" in results[rival]:  # older files lack it
                words = gain(results[row]["nll"], results[rival]["nll"])
                print(f"{'':<23}{row.rule} against {rival.rule}: {words}", flush=True)


# --------------------------------------------------------------------------------------------------
# Paired comparisons


def gain(ours, theirs):
    """Return, in words, how much lower one perplexity is than another, from the mean negative
    log-likelihood per token of each window, in nats."""
    mean, error = mean_and_error(paired_differences(ours, theirs))
    direction = "lower" if mean < 0 else "higher"
    percent = 100 * abs(1 - math.exp(mean))
    if math.isnan(error):
        return f"PPL {percent:.1f} % {direction}, of one window"
    if abs(mean) <= 2 * error:
        return f"not resolved (gain {100 * (1 - math.exp(mean)):.1f} % +- {100 * error:.1f})"
    return f"PPL {percent:.1f} % {direction}, +- {100 * error:.1f}"


def paired_differences(ours, theirs):
    """Return the differences window by window: most of what makes a window hard is the same for
    both."""
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def mean_and_error(sample):
    """Return the mean of a sample and its standard error, which is NaN for one number."""
    mean = statistics.mean(sample)
    if len(sample) < 2:
        return mean, math.nan
    return mean, statistics.stdev(sample) / math.sqrt(len(sample))


# --------------------------------------------------------------------------------------------------
# Figure 9. The paper's colours, in shades that the colour-blind can tell apart (Okabe and Ito)

COLORS = {"pfn": "#0072B2", "kvsink": "#009E73", "pfn+kvsink": "#CC79A7", "full": "#E69F00"}
CURVES = (("pfn", "PFN", "o"), ("kvsink", "KVSink", "s"), ("pfn+kvsink", "PFN-1+KVSink", "^"))
# The results in one panel have to agree in these settings.
SAME_IN_A_PANEL = (
    "seq_len", "bos", "windows", "group_size", "rope", "dtype", "device", "compiled", "torch",
    "seed", "calib_windows", "calib_data", "q_norm", "weights", "tokens",
)  # fmt: skip


def figure_9(results):
    """Return Figure 9: PPL over N, PFN against KVSink, full precision as a line; one panel per
    model, text, scheme and width. A bar is one standard error of the distance to full precision,
    paired over windows. --sinks auto is a single point, at the mean number of tokens that it keeps.

    Raises ValueError if there is nothing to draw, or if a panel would mix results of runs with
    different settings."""
    from matplotlib.figure import Figure

    panels = {}  # model, text, scheme and width -> results
    for result in results:
        if result["scheme"] != "full":
            key = (result["model"], result["data"], *scheme_and_bits(result))
            panels.setdefault(key, []).append(result)
    if not panels:
        raise ValueError("there are no results to draw: Figure 9 needs rows with a scheme")
    full = {run_key(result): result for result in results if result["scheme"] == "full"}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    ticks = sorted({result["sinks"] for result in results} - {AUTO})
    right = max(map(tokens_kept, results)) + 1
    figure = Figure(figsize=(4 * columns, 3.1 * lines), layout="constrained")
    for i, ((model, text, scheme, bits), rows) in enumerate(panels.items(), start=1):
        check_panel(f"{model}, {scheme}, {bits} bits", rows)
        axis = figure.add_subplot(lines, columns, i)
        draw_curves(axis, rows, full.get(run_key(rows[0])))
        ppl = rows[0]["ppl_fp"]
        axis.axhline(ppl, color=COLORS["full"], linestyle="--", label="full precision")
        axis.set(xlabel="tokens kept, N", ylabel="PPL", xlim=(-1, right), xticks=ticks)
        names = " on ".join(printable(Path(name).name[:60]) for name in (model, text))
        names = names.replace("$", r"\$")  # no formula
        axis.set_title(f"{names}\n{scheme}, {bits} bits", fontsize=10)
        axis.legend(fontsize=8)
    return figure


def check_panel(panel, rows):
    for setting in SAME_IN_A_PANEL:
        if len({row.get(setting) for row in rows}) > 1:
            raise ValueError(
                f"{panel}: results of runs that differ in {setting}: give each run its own file"
            )


def draw_curves(axis, rows, full):
    """Draw one line per rule, PPL over N, and a single point for --sinks auto. `full` is the result
    of full precision, or None; then there are no error bars."""
    for keep, label, marker in CURVES:
        rule_rows = [row for row in rows if row["keep"] == keep]
        auto = [row for row in rule_rows if row["sinks"] == AUTO]
        curve = [row for row in rows if row["keep"] in (keep, "none") and row not in auto]
        if rule_rows == auto and keep not in PAPER_KEEPS:
            curve = []  # the paper's two rules are drawn even if they have the point N = 0 only
        for points, name, style in (
            (curve, label, f"{marker}-"),
            (auto, f"{label}-auto", marker),
        ):
            if points:
                points = sorted(points, key=tokens_kept)
                N = [tokens_kept(row) for row in points]
                ppl = [row["ppl"] for row in points]
                bars = [error_bar(row, full) for row in points]
                axis.plot(N, ppl, style, color=COLORS[keep], label=name)
                axis.errorbar(N, ppl, bars, fmt="none", ecolor=COLORS[keep], capsize=2)


def run_key(result):
    """Return the key shared by results of one model on the same windows."""
    return tuple(result.get(key) for key in ("model", "data", "tokens", "dtype", "weights"))


def tokens_kept(result):
    return statistics.mean(result["kept"]) if result["sinks"] == AUTO else result["sinks"]


def error_bar(result, full):
    """Return one standard error of the distance to full precision, in PPL, or NaN if it is not
    known."""
    ours = result.get("nll", [])
    theirs = full.get("nll", []) if full else []
    if not ours or len(ours) != len(theirs):
        return math.nan
    _, error = mean_and_error(paired_differences(ours, theirs))
    return result["ppl"] * error


def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=100)
    save(path, picture.getvalue())
