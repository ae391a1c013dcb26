"""The setting to use: perplexity against the bits that a number takes, over all schemes, widths,
groups and rules.

    python -m beyond.front --json front.json --plot front.png

The paper compares rules of preservation within a scheme. If you want a small cache, you must choose
scheme, width, group size and rule. The answer is the front: the settings that no other beats in
both perplexity and stored bits.

Read top to bottom: the settings; the front; the picture; the command. Rows are measured by
eval_ppl.py.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import eval_ppl
import kvsink
from llama import LlamaConfig
from support import cli, hub, results, text
from support.results import FULL_PRECISION, Row, row_of

# --------------------------------------------------------------------------------------------------
# The settings

WIDTHS = (4, 3, 2)
GROUPS = (32, 64, 128)
RULES = {"none": 0, "pfn": 5, "kvsink": 5, "pfn+kvsink": kvsink.AUTO}  # and N


def rows():
    """Full precision, then every scheme, width and rule."""
    settings = itertools.product(kvsink.SCHEMES, WIDTHS, RULES.items())
    return FULL_PRECISION, *(Row(scheme, bits, keep, N) for scheme, bits, (keep, N) in settings)


def group_sizes(head_dim):
    """Those of GROUPS that divide a head: a larger one would be the head again. Raises ValueError
    where none does."""
    if found := [size for size in GROUPS if head_dim % size == 0]:
        return found
    raise ValueError(
        f"no group of {', '.join(map(str, GROUPS))} channels divides a head of {head_dim}"
    )


# --------------------------------------------------------------------------------------------------
# The front


def front(found):
    """The results that no other beats in both bits and PPL, from the fewest bits to the most."""
    best, kept = float("inf"), []
    for result in sorted(found, key=lambda r: (r["stored_bits"], r["ppl"])):
        if result["ppl"] < best:
            best = result["ppl"]
            kept.append(result)
    return kept


def setting(result):
    """A result's setting in words."""
    row = row_of(result)
    return f"{row.scheme}, {row.bits} bits, groups of {result['group_size']}, {row.kept()}"


def print_front(found):
    print("\nthe front: every other setting has more bits or a higher perplexity")
    print(f"{'stored bits':>11}{'PPL':>10}   setting")
    for result in front(found):
        name = "full precision" if row_of(result) == FULL_PRECISION else setting(result)
        print(f"{result['stored_bits']:>11.2f}{result['ppl']:>10.3f}   {name}")


# --------------------------------------------------------------------------------------------------
# The picture

COLORS = dict(zip(kvsink.SCHEMES, ("#E69F00", "#56B4E9", "#0072B2", "#009E73")))  # Okabe and Ito
MARKERS = {"none": "x", "pfn": "o", "kvsink": "s", "pfn+kvsink": "^"}


def picture(found):
    """How far PPL is above full precision's, over stored bits; a point a setting, the front as a
    line."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    full, quantized = (
        next(r for r in found if r["scheme"] == "full"),
        [r for r in found if r["scheme"] != "full"],
    )
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.add_subplot()
    for r in quantized:
        how = {"color": COLORS[r["scheme"]], "markersize": 5, "alpha": 0.8}
        axis.plot(r["stored_bits"], above(r), MARKERS[r["keep"]], **how)
    best = front(quantized)
    axis.plot(
        [r["stored_bits"] for r in best], [above(r) for r in best], "k-", linewidth=1, zorder=0
    )
    axis.set(xlabel="stored bits a number", ylabel="PPL above full precision, %", yscale="log")
    windows, n = full["windows"], full["seq_len"]
    axis.set_title(
        f"{Path(full['model']).name} on {full['data']}, {windows} windows of {n} tokens",
        fontsize=10,
    )
    names = {keep: f"{Row('', 0, keep, N).kept()} kept" for keep, N in RULES.items()}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, label=name)
        for name, color in COLORS.items()
    ]
    handles += [
        Line2D([], [], marker=MARKERS[k], linestyle="", color="k", label=name)
        for k, name in names.items()
    ]
    axis.legend(handles=[*handles, Line2D([], [], color="k", label="the front")], fontsize=8)
    return figure


def above(result):
    """In percent, at least 0.1, because the axis is logarithmic."""
    return max(100 * (result["ppl"] / result["ppl_fp"] - 1), 0.1)


# --------------------------------------------------------------------------------------------------
# The command


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(
        prog="python -m beyond.front",
        description="Perplexity against stored bits of all schemes, widths, group sizes and rules of preservation, on\n"
        "Wikipedia articles, and the settings that no other beats in both.",
    )
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--limit", type=cli.number(1), default=2, metavar="WINDOWS", help="windows of 1,024 tokens: four times as many "
        "halve the error of a comparison (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results, row by row; rows already there are not run again")
    add("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")
    add = parser.add_argument_group("how to run it").add_argument
    cli.add_site_options(add)
    cli.add_machine_options(add)
    return parser.parse_args(argv)
# fmt: on


def parse(argv):
    """What `run` takes. Raises ValueError for options that cannot be."""
    args = parse_arguments(argv)
    cli.check_outputs(args.json, args.plot)
    what = eval_ppl.What(
        args.model, rows(), text.PACKED, 1024, args.limit, 4, seed=0, group_size=0, rope="post"
    )
    return what, cli.machine(args), (args.layer, args.channel), args.json, args.plot


def run(what, machine, place, json, plot):
    config = LlamaConfig.from_pretrained(hub.model_directory(what.model))
    whats = [replace(what, group_size=size) for size in group_sizes(config.head_dim)]
    found = eval_ppl.run(whats, machine, False, place, json, None)
    if found:  # on the first rank
        print_front(found)
        if plot:
            results.save_figure(picture(found), plot)


def main(argv=None):
    return cli.run_command("beyond.front", lambda: run(*parse(argv)), "name another --device")


if __name__ == "__main__":
    cli.exit_process(main())
