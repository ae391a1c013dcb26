"""The setting to use: perplexity against stored bits per number, over all schemes, widths, group
sizes and rules of preservation.

    python -m beyond.front --json front.json --plot front.png

The paper compares rules within a scheme. If you want a small cache, you must choose scheme, width,
group size and rule. The answer is the front: the settings that no other beats in both perplexity
and stored bits.

Read top to bottom: the front; the settings and their measurement; the picture; the command.

What this file does not do: support/evaluate.py loads the model and measures a row.
"""

from dataclasses import replace
from pathlib import Path

import kvsink
from llama import LlamaConfig
from support import cli, evaluate, hub, report
from support.evaluate import EvalConfig
from support.machine import pick_machine
from support.results import read_results
from support.rows import FULL_PRECISION, Row, row_of, rule_of

# --------------------------------------------------------------------------------------------------
# The front


def front(results):
    """Return the results that no other beats in both bits and PPL, from the fewest bits to the
    most."""
    lowest = float("inf")
    best = []
    for result in sorted(results, key=lambda r: (r["stored_bits"], r["ppl"])):
        if result["ppl"] < lowest:
            lowest = result["ppl"]
            best.append(result)
    return best


def print_front(results):
    print("\nthe front: no setting has fewer stored bits without a higher perplexity")
    print(f"{'stored bits':>11}{'PPL':>10}   setting")
    for result in front(results):
        print(f"{result['stored_bits']:>11.2f}{result['ppl']:>10.3f}   {setting(result)}")


def setting(result):
    """Return a result's setting in words."""
    row = row_of(result)
    if row == FULL_PRECISION:
        return str(row)
    return f"{row.scheme}, {row.bits} bits, groups of {result['group_size']}, {row.rule}"


# --------------------------------------------------------------------------------------------------
# The settings, and their measurement

WIDTHS = (4, 3, 2)
GROUP_SIZES = (32, 64, 128)
RULES = {"none": 0, "pfn": 5, "kvsink": 5, "pfn+kvsink": kvsink.AUTO}  # --keep: --sinks


def measure_settings(configs, json=None, plot=None):
    """Measure each EvalConfig, one per group size. Print each row and add it to the file `json` as
    it is done; then print the front, and draw it to the file `plot`."""
    old_results = read_results(json)
    results = []
    for run in evaluate.load_runs(configs):
        rows = measure_rows(run, old_results)
        heading = evaluate.heading(run)
        results += report.print_and_save(heading, run.site, rows, json, [report.STORED_BITS])
    if results:  # they are on rank 0 alone
        print_front(results)
        if plot:
            report.save_figure(picture(results), plot)


def measure_rows(run, old_results):
    """Yield the result of each row; `old_results` holds those that an earlier run has finished."""
    ppl_fp = None
    for row, result in evaluate.rows_with_results(run, old_results):
        if result is None:
            quantizers = evaluate.quantizers(run, row)
            result = evaluate.result_settings(run, row)
            result |= evaluate.measure_row(run, row, quantizers, ppl_fp)
        if row == FULL_PRECISION:
            ppl_fp = result["ppl"]
        yield evaluate.add_bits(run, row, result)


def all_rows():
    """Return the row of full precision, and one for every scheme, width and rule."""
    rows = [FULL_PRECISION]
    for scheme in kvsink.SCHEMES:
        for bits in WIDTHS:
            for keep, N in RULES.items():
                rows.append(Row(scheme, bits, rule_of(keep, N)))
    return tuple(rows)


def group_sizes(head_dim):
    """Return those of GROUP_SIZES that divide a head; larger ones would only repeat the whole head.
    Raises ValueError if none does."""
    sizes = [size for size in GROUP_SIZES if head_dim % size == 0]
    if not sizes:
        numbers = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"no group of {numbers} channels divides a head of {head_dim}")
    return sizes


# --------------------------------------------------------------------------------------------------
# The picture

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = dict(zip(kvsink.SCHEMES, ("#E69F00", "#56B4E9", "#0072B2", "#009E73")))
MARKERS = {"none": "x", "pfn": "o", "kvsink": "s", "pfn+kvsink": "^"}


def picture(results):
    """Return a figure of how far PPL is above full precision's, over stored bits: a point for each
    setting, and the front as a line."""
    from matplotlib.figure import Figure

    full = next(result for result in results if result["scheme"] == "full")
    quantized = [result for result in results if result["scheme"] != "full"]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.add_subplot()
    for result in quantized:
        axis.plot(
            result["stored_bits"],
            percent_above(result),
            MARKERS[result["keep"]],
            color=COLORS[result["scheme"]],
            markersize=5,
            alpha=0.8,
        )
    best = front(quantized)
    bits = [result["stored_bits"] for result in best]
    axis.plot(bits, [percent_above(result) for result in best], "k-", linewidth=1, zorder=0)
    axis.set(xlabel="stored bits per number", ylabel="PPL above full precision, %", yscale="log")
    windows = f"{full['windows']} windows of {full['seq_len']} tokens"
    axis.set_title(f"{Path(full['model']).name} on {full['data']}, {windows}", fontsize=10)
    axis.legend(handles=legend(), fontsize=8)
    return figure


def legend():
    """Return the entries of the legend: a colour for each scheme, a marker for each rule, a line
    for the front."""
    from matplotlib.lines import Line2D

    entries = []
    for scheme, color in COLORS.items():
        entries.append(Line2D([], [], marker="o", linestyle="", color=color, label=scheme))
    for keep, N in RULES.items():
        label = f"{rule_of(keep, N)} kept"
        marker = MARKERS[keep]
        entries.append(Line2D([], [], marker=marker, linestyle="", color="k", label=label))
    entries.append(Line2D([], [], color="k", label="the front"))
    return entries


def percent_above(result):
    """Return by how many percent PPL is above full precision's: at least 0.1, because the axis is
    logarithmic."""
    return max(100 * (result["ppl"] / result["ppl_fp"] - 1), 0.1)


# --------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    def work():
        args = parse_arguments(argv)
        measure_settings(eval_configs(args), args.json, args.plot)

    return cli.run_command("beyond.front", work, "try --device cpu")


def eval_configs(args):
    """Return one EvalConfig for each group size that divides a head of the model."""
    config = EvalConfig(
        model=args.model,
        rows=all_rows(),
        limit=args.limit,
        layer=args.layer,
        channel=args.channel,
        machine=pick_machine(args),
    )
    head_dim = LlamaConfig.from_pretrained(hub.model_directory(args.model)).head_dim
    return [replace(config, group_size=size) for size in group_sizes(head_dim)]


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(
        prog="python -m beyond.front",
        description="Perplexity against stored bits of all schemes, widths, group sizes and rules\n"
        "of preservation, on Wikipedia articles, and the settings that no other beats in both.",
    )
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--limit", type=cli.number(1), default=2, metavar="WINDOWS", help="windows of 1,024 "
        "tokens; four times as many halve the error of a comparison (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write each row to this file when it is done; "
        "rows that are already there are not run again")
    add("--plot", type=Path, metavar="FILE", help="draw the picture: .png, .svg or .pdf")
    add = parser.add_argument_group("how to run it").add_argument
    cli.add_site_options(add)
    cli.add_machine_options(add)
    args = parser.parse_args(argv)
    cli.check_outputs(args.json, args.plot)
    return args
# fmt: on


if __name__ == "__main__":
    cli.exit_process(main())
