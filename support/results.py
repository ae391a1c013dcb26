"""Rows: one perplexity each, in a JSON file, in a table, in Figure 9.

Read top to bottom: a row; its bits; the JSON file; the table, printed line by line; Figure 9.

What this file does not do: which rows there are and how they are measured is the business of
eval_ppl.py and of paper/table2.py. A result is a dict, as in the JSON file.
"""

import io
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import kvsink
from kvsink import AUTO, MAX_AUTO_SINKS
from support import hub
from support.cache import save
from support.cli import rank_and_world_size


class Row(NamedTuple):
    """One perplexity of Figure 9 or Table 2: a scheme at a width, and the rule by which N tokens
    are kept."""

    scheme: str
    bits: int
    keep: str
    N: int | str  # or AUTO
    rho: float = 0.0  # KVQuant's fraction of outliers in 16 bits

    def kept(self):
        names = {"none": "nothing", "pfn": f"PFN-{self.N}", "kvsink": f"KVSink-{self.N}"}
        return (names | {"pfn+kvsink": f"PFN-1+KVSink-{self.N}"})[self.keep]

    def most(self):
        """The most tokens that this row may keep."""
        return MAX_AUTO_SINKS if self.N == AUTO else self.N

    def name(self):
        return f"{self.scheme} {100 * self.rho:g} %" if self.rho else self.scheme

    def group(self):
        return self.name(), self.bits

    def static(self):
        return self.scheme in kvsink.SCHEMES and kvsink.SCHEMES[self.scheme].static

    def __str__(self):
        return (
            "full precision"
            if self == FULL_PRECISION
            else f"{self.name()} {self.bits} bits, {self.kept()} kept"
        )


FULL_PRECISION = Row("full", 16, "none", 0)
PAPER_KEEPS = ("none", "pfn", "kvsink")
KEEPS = (*PAPER_KEEPS, "pfn+kvsink")


def row_of(result):
    return Row(
        *(result[key] for key in ("scheme", "bits", "keep", "sinks")), result.get("outliers", 0.0)
    )


def expand_rows(groups, keeps, sinks):
    """Rows for every (scheme, bits, rho) of `groups` and every rule, in the order of the table.
    Nothing kept and N = 0 are the same row. PFN has no AUTO. Raises ValueError where that leaves
    none."""
    rows = []
    for (scheme, bits, rho), keep, N in itertools.product(groups, keeps, sinks):
        if keep == "pfn" and N == AUTO:
            continue
        kept = keep != "none" and N != 0
        rows.append(Row(scheme, bits, keep if kept else "none", N if kept else 0, rho))
    if not rows:
        raise ValueError("--sinks auto is for --keep kvsink and pfn+kvsink")
    return list(dict.fromkeys(rows))


# --------------------------------------------------------------------------------------------------
# Bits a number of the cache, for n tokens


def average_bits(row, config, n, stored, l_E, N):
    """Table 2's last column: codes, scales and zeros; kept tokens in 16 bits, with their places.

    stored   bits of a token, and bits that are stored once, as `rtn_bits` gives them
    N        how many tokens are kept after block l_E, on average over windows
    """
    d, L, (a_token, once) = (
        config.num_key_value_heads * config.head_dim,
        config.num_hidden_layers,
        stored,
    )
    before = {"kvsink": 0, "pfn+kvsink": 1}.get(row.keep, N)  # kept up to block l_E
    kept = (l_E * before + (L - l_E) * N) / L
    return ((n - kept) * a_token + kept * (2 * d * 16 + 32) + once) / (2 * d * n)


def rtn_bits(row, config, group_size):
    """Bits that a token takes in an RTN cache, and bits that are stored once: a scale and a zero of
    16 bits a group."""
    d = config.num_key_value_heads * config.head_dim
    if row == FULL_PRECISION:
        return 2 * d * 16, 0
    K, V, static = kvsink.SCHEMES[row.scheme]
    groups = sum(
        d if static and granularity == "channel" else d / group_size for granularity in (K, V)
    )
    return 2 * d * row.bits + (0 if static else 32 * groups), 32 * groups if static else 0


def stored_bits(row, config, n, group_size):
    """Bits a number in the packed cache (paper/kvcache.py) of a 16-bit model: codes of all tokens,
    also the kept ones; in every block room for the most tokens that may be kept; one group of
    tokens in 16 bits where groups span tokens; and static scales and zeros, in 16 bits."""
    if row == FULL_PRECISION:
        return 16.0
    d, (a_token, once) = (
        config.num_key_value_heads * config.head_dim,
        rtn_bits(row, config, group_size),
    )
    g = group_size if row.scheme == "channel-dynamic" else 1  # tokens that share a scale
    unfinished = g * d * 16 if g > 1 else 0
    return (-(-n // g) * g * a_token + once + unfinished + row.most() * (2 * d * 16 + 64)) / (
        2 * d * n
    )


# --------------------------------------------------------------------------------------------------
# The JSON file


def is_name(x):
    return isinstance(x, str) and x == x.encode(errors="ignore").decode()  # no lone surrogate


def is_whole(x):
    return type(x) is int and 0 <= x < 2**31


def is_number(x):
    return type(x) is int and abs(x) < 2**63 or type(x) is float and math.isfinite(x)


FIELDS = {
    "model": is_name,
    "data": is_name,
    "scheme": is_name,
    "keep": lambda x: x in KEEPS,
    "bits": is_whole,
}
FIELDS |= {"sinks": lambda x: x == AUTO or is_whole(x), "ppl": is_number, "ppl_fp": is_number}
LISTS = ("nll", "kept")  # a number a window


def is_result(x):
    others = (value for key, value in x.items() if key not in FIELDS and key not in LISTS)
    return (
        all(key in x and fits(x[key]) for key, fits in FIELDS.items())
        and all(is_number(number) for key in LISTS for number in x.get(key, []))
        and (x["sinks"] != AUTO or x["kept"])
        and all(
            value is None or is_name(value) or is_number(value) or value in (True, False)
            for value in others
        )
    )


def read_results(path):
    """The results of an earlier run, [] where there is no such file. Raises ValueError where the
    file is not ours."""
    if not path or not path.exists():
        return []
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(results, list) and all(map(is_result, results)):
            return results
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"{path} does not hold results of this program: it was left as it is, name another file"
    )


MEASURED = {"ppl", "ppl_fp", "avg_bits", "stored_bits", "seconds", "nll", "kept"}


def add_result(path, result):
    """Into the file as it is now: another run may have written to it since. A row that it wrote
    with the same settings stays, and this one is not added."""

    def own(row):
        return {key: value for key, value in row.items() if key not in MEASURED}

    with hub.lock(path):
        results = read_results(path)
        if own(result) not in map(own, results):
            hub.write_atomically(path.resolve(), json.dumps([*results, result], indent=1).encode())


def done_before(known, old_results):
    """row -> the old result that has all the settings `known[row]`, where there is one."""
    return {
        row: old for row, own in known.items() for old in old_results if own.items() <= old.items()
    }


def evaluate(known, done, measure):
    """Yields the result of each row of `known`, row -> settings, in order: that of `done`, or what
    `measure(row)` gives. Only the first rank has results, and what it has done decides what is
    run."""
    done, to_run = dict(done), torch.tensor([row not in done for row in known])
    if dist.is_initialized():
        to_run = to_run.cuda() if dist.get_backend() == "nccl" else to_run
        dist.broadcast(to_run, src=0)
    for row, is_new in zip(known, to_run.tolist()):
        result = measure(row) if is_new else None
        if is_new and rank_and_world_size()[0] == 0:
            full = result if row == FULL_PRECISION else done[FULL_PRECISION]
            done[row] = {**known[row], **result, "ppl_fp": full["ppl"]}
        yield done.get(row)


# --------------------------------------------------------------------------------------------------
# The table


def print_rows(results, columns=()):
    """The same results, each printed as it comes: a header first, a line a row, and what compares
    the rows of a scheme and width when the last of them is there. `columns` are further ones:
    title, width, a function from result to text."""
    header = f"{'scheme':<16}{'bits':>4}   {'kept':<17}{'PPL':>10}{'over full':>12}"
    print(header + "".join(f"{title:>{width}}" for title, width, _ in columns), flush=True)
    group = []
    for result in results:
        row = row_of(result)
        if group and row.group() != row_of(group[0]).group():
            print_comparisons(group)
            group = []
        name = (
            ""
            if group
            else "full precision"
            if row == FULL_PRECISION
            else f"{row.name():<16}{row.bits:>4}"
        )
        kept, over = row.kept(), f"{result['ppl'] - result['ppl_fp']:+.3f}"
        if row == FULL_PRECISION:
            kept = over = ""
        line = f"{name:<20}   {kept:<17}{result['ppl']:>10.3f}{over:>12}"
        line += "".join(f"{text(result):>{width}}" for _, width, text in columns)
        if row.N == AUTO:
            line += (
                f"   {statistics.mean(result['kept']):.1f} tokens, at most {max(result['kept'])}"
            )
        print(line.rstrip(), flush=True)
        group.append(result)
        yield result
    print_comparisons(group)


def print_and_save(heading, site, found, json, columns=()):
    """Prints results as they come, and adds them to the JSON file (None: none). Gives them all;
    none but on the first rank."""
    if rank_and_world_size()[0]:
        for _ in found:  # measures its share
            pass
        return []
    print(heading)
    if site.l_E:
        print(f"sinks predicted after block {site.l_E} (counted from 1) in channel {site.c}")
    results = []
    for result in print_rows(found, columns):
        results.append(result)
        if json:
            add_result(json, result)
    return results


def print_comparisons(group):
    """The best row, and what each rule that predicts sinks gains over PFN with the same N, else
    over the best PFN row."""
    rows = {row_of(result): result for result in group}
    by_ppl = sorted(rows, key=lambda row: rows[row]["ppl"])
    if len(rows) > 1:
        print(f"{'':<23}{by_ppl[0].kept()} is the best of these", flush=True)
    first_N = [row for row in by_ppl if row.keep == "pfn"]
    for row in (row for row in rows if "kvsink" in row.keep):
        rival = next(
            (other for other in first_N if other.N == row.N), first_N[0] if first_N else None
        )
        if rival and "nll" in rows[row] and "nll" in rows[rival]:  # older files lack it
            what = gain(rows[row]["nll"], rows[rival]["nll"])
            print(f"{'':<23}{row.kept()} against {rival.kept()}: {what}", flush=True)


def mean_and_error(d):
    """The mean of a sample, and its standard error (NaN of one number)."""
    return statistics.mean(d), statistics.stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.nan


def differences(ours, theirs):
    """Window by window, because most of what makes a window hard is the same for both."""
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def gain(ours, theirs):
    """In words, how much lower a perplexity is than another, from the mean negative log-likelihood
    a token of each window, in nats."""
    mean, error = mean_and_error(differences(ours, theirs))
    if math.isnan(error):
        return f"PPL {100 * abs(1 - math.exp(mean)):.1f} % {'lower' if mean < 0 else 'higher'}, of one window"
    if abs(mean) <= 2 * error:
        return f"not resolved (gain {100 * (1 - math.exp(mean)):.1f} % +- {100 * error:.1f})"
    return f"PPL {100 * abs(1 - math.exp(mean)):.1f} % {'lower' if mean < 0 else 'higher'}, +- {100 * error:.1f}"


# --------------------------------------------------------------------------------------------------
# Figure 9. The paper's colours, in shades that the colour-blind can tell apart (Okabe and Ito)

COLORS = {"pfn": "#0072B2", "kvsink": "#009E73", "pfn+kvsink": "#CC79A7", "full": "#E69F00"}
RULES = (("pfn", "PFN", "o"), ("kvsink", "KVSink", "s"), ("pfn+kvsink", "PFN-1+KVSink", "^"))
ALIKE = (
    "seq_len",
    "windows",
    "group_size",
    "rope",
    "dtype",
    "seed",
    "calib_windows",
    "q_norm",
    "weights",
)


def figure_9(results):
    """Figure 9: PPL over N, PFN against KVSink, full precision as a line; a panel a model, text,
    scheme and width. A bar is one standard error of the distance to full precision, paired over
    windows. AUTO stands alone, at the mean number of its tokens. Raises ValueError where there is
    nothing to draw, or where results of unlike runs would meet in one panel."""
    from matplotlib.figure import Figure

    def panel(result):
        return result["model"], result["data"], row_of(result).name(), result["bits"]

    panels = list(dict.fromkeys(panel(r) for r in results if r["scheme"] != "full"))
    if not panels:
        raise ValueError("there are no results to draw: a Figure 9 needs rows with a scheme")
    full = {run_of(r): r for r in results if r["scheme"] == "full"}
    columns = min(3, len(panels))
    lines, ticks = -(-len(panels) // columns), sorted({r["sinks"] for r in results} - {AUTO})
    figure = Figure(figsize=(4 * columns, 3.1 * lines), layout="constrained")
    for i, (model, text, scheme, bits) in enumerate(panels, start=1):
        axis = figure.add_subplot(lines, columns, i)
        rows = [r for r in results if panel(r) == (model, text, scheme, bits)]
        for setting in ALIKE:
            if len({row.get(setting) for row in rows}) > 1:
                where = f"{model}, {scheme}, {bits} bits"
                raise ValueError(
                    f"{where}: results of runs that differ in {setting}: give each run a file of its own"
                )
        draw_rules(axis, rows, full.get(run_of(rows[0])))
        axis.axhline(
            rows[0]["ppl_fp"], color=COLORS["full"], linestyle="--", label="full precision"
        )
        names = f"{Path(model).name} on {Path(text).name}".replace(
            "$", r"\$"
        )  # $ would begin a formula
        right = max(map(tokens_kept, results)) + 1
        axis.set(xlabel="tokens kept, N", ylabel="PPL", xlim=(-1, right), xticks=ticks)
        axis.set_title(f"{names}\n{scheme}, {bits} bits", fontsize=10)
        axis.legend(fontsize=8)
    return figure


def draw_rules(axis, rows, full):
    """A line a rule, through what its N tokens give; and a point where it finds N itself. `full` is
    full precision's result, or None: no error without it."""
    for keep, label, marker in RULES:
        own = [r for r in rows if r["keep"] == keep]
        auto = [r for r in own if r["sinks"] == AUTO]
        of_N = [r for r in rows if r["keep"] in (keep, "none") and r not in auto]
        if (
            own == auto and keep not in PAPER_KEEPS
        ):  # the paper's two rules show at least where nothing is kept
            of_N = []
        for points, name, style in ((of_N, label, f"{marker}-"), (auto, f"{label}-auto", marker)):
            if points:
                points = sorted(points, key=tokens_kept)
                N, ppl, bars = zip(
                    *((tokens_kept(r), r["ppl"], error_bar(r, full)) for r in points)
                )
                axis.plot(N, ppl, style, color=COLORS[keep], label=name)
                axis.errorbar(N, ppl, bars, fmt="none", ecolor=COLORS[keep], capsize=2)


def run_of(result):
    """Results with the same are of the same model on the same windows."""
    return tuple(result.get(key) for key in ("model", "data", "tokens", "dtype", "weights"))


def tokens_kept(result):
    return statistics.mean(result["kept"]) if result["sinks"] == AUTO else result["sinks"]


def error_bar(result, full):
    """One standard error of a PPL's distance to full precision's, in PPL; NaN where it is not
    known."""
    ours, theirs = result.get("nll", []), full.get("nll", []) if full else []
    if not ours or len(ours) != len(theirs):
        return math.nan
    return result["ppl"] * mean_and_error(differences(ours, theirs))[1]


def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=100)
    save(path, picture.getvalue())
