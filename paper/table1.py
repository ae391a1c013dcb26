"""Table 1: quantization errors of Keys and Values, with sink tokens and without, beside the paper's
figures.

    python -m paper.table1                                the embedded default
    python -m paper.table1 --model llama2-7b              the paper's model

Read top to bottom: the table as printed; the same measured on any model; the command.

What this file does not do: where the sinks are, and what a block computes, is found by
activations.py; the equations are quant.py's.
"""

from collections import defaultdict
from dataclasses import replace

import torch
from tqdm import tqdm

import quant
from paper import command
from paper.activations import GROUP, KINDS
from quant import Quantizer
from support import cli

# LLaMA2-7B, as printed: for each of the KINDS overall, without sink tokens, with (dynamic only)
PAPER_TABLE_1 = {
    ("dynamic", 4): ((1.30, 1.38, 0.07), (0.10, 0.11, 0.01), (0.28, 0.26, 0.31)),
    ("dynamic", 3): ((9.00, 9.57, 0.50), (0.68, 0.72, 0.08), (2.03, 1.78, 2.30)),
    ("dynamic", 2): ((27.58, 29.32, 1.37), (2.53, 2.68, 0.23), (7.05, 6.52, 7.58)),
    ("static", 4): ((86.73, 16.39), (9.75, 3.10), (9.02, 5.17)),
    ("static", 3): ((89.60, 20.41), (10.09, 3.45), (10.24, 8.26)),
    ("static", 2): ((107.36, 46.14), (11.30, 6.35), (15.83, 11.44)),
}
PARTS = {
    "overall": "overall",
    "without_sinks": "w/o sinks",
    "with_sinks": "w/ sinks",
}  # in the JSON file, in the title


def groups_with_sinks(S, granularity):
    """A mask (n,): the tokens whose group holds a sink. A group is in one token, or is 16 tokens of
    one channel."""
    groups, axes = quant.grouped(S[:, None], granularity, GROUP, fill=False)
    return quant.ungrouped(groups.any(axes, keepdim=True).expand_as(groups), granularity, len(S))[
        :, 0
    ]


def squared_errors(subject, a, S, kind, bits):
    """The squared errors of one kind in one block: (ranges, part) -> a tensor of them."""
    tensor, granularity = KINDS[kind]
    X, mixed = getattr(a, tensor), groups_with_sinks(S, granularity)
    static, kept = (
        replace(subject.quantizers[a.l, kind, kept], bits=bits) for kept in (False, True)
    )
    dynamic, static, kept = (
        (q(X) - X).square() for q in (Quantizer(bits, granularity, GROUP), static, kept)
    )
    return {
        ("dynamic", "overall"): dynamic,
        ("dynamic", "without_sinks"): dynamic[:, ~mixed],
        ("dynamic", "with_sinks"): dynamic[:, mixed],
        ("static", "overall"): static,
        ("static", "without_sinks"): kept[:, ~S],
    }


def table_1(subject):
    """Table 1, mean squared errors x 100 over all windows and all blocks where sinks are stable: a
    list of dict, one a kind, range and number of bits, with the paper's figures for LLaMA2-7B under
    "paper".

    Of dynamic ranges "overall" is of all groups, "without_sinks" of those that hold no sink,
    "with_sinks" of those that hold one (None where there are none). Of static ranges "overall" is
    of all tokens, "without_sinks" of all but the sinks, with ranges calibrated without them. The
    paper does not say on how many tokens it measures, nor in which blocks. By its per-token figures
    sinks are two of 32 tokens (overall is 15/16 of without and 1/16 of with).
    """
    sums = defaultdict(
        lambda: torch.zeros(2, dtype=torch.float64)
    )  # (kind, bits, ranges, part) -> sum, count

    def add(a, S):
        for kind in KINDS:
            for bits in (4, 3, 2):
                for place, errors in squared_errors(subject, a, S, kind, bits).items():
                    sums[kind, bits, *place] += torch.tensor(
                        [errors.sum(), errors.numel()], dtype=torch.float64
                    )

    for tokens in tqdm(subject.windows, desc="Table 1", unit="window", leave=False, disable=None):
        subject.look_where_stable(tokens, add)
    rows = []
    for i, kind in enumerate(KINDS):
        for (ranges, bits), printed in PAPER_TABLE_1.items():
            parts = list(PARTS)[: len(printed[i])]
            measured = {part: sums[kind, bits, ranges, part].tolist() for part in parts}
            mse = {
                part: 100 * total / count if count else None
                for part, (total, count) in measured.items()
            }
            rows.append(
                {
                    "kind": kind,
                    "ranges": ranges,
                    "bits": bits,
                    **mse,
                    "paper": dict(zip(parts, printed[i])),
                }
            )
    return rows


def print_table_1(subject, rows):
    print(f"\nTable 1: quantization error (MSE x 100), {command.whereabouts(subject)}")
    print(f"{'':<20}{subject.name:^33}{'LLaMA2-7B (paper)':^33}")
    print(f"{'':<20}" + "".join(f"{title:>11}" for title in PARTS.values()) * 2)
    for row in rows:
        if (row["ranges"], row["bits"]) == ("dynamic", 4):
            print(row["kind"])
        cells = [side.get(part) for side in (row, row["paper"]) for part in PARTS]
        numbers = "".join(f"{'-':>11}" if x is None else f"{x:>11.2f}" for x in cells)
        print(f"  {row['ranges']:<9}{row['bits']} bits  {numbers}", flush=True)


# --------------------------------------------------------------------------------------------------
# The command


def report(what, subject):
    """Measure, print and save Table 1 of a Subject that has its static quantizers."""
    rows = table_1(subject)
    print_table_1(subject, rows)
    command.save_json(what.file("table1", "json"), subject, rows)


def run(what):
    loaded = command.load(what.model, what.machine)
    subject = command.examined(what, loaded)
    report(what, command.calibrated(what, loaded, subject))


def parse(argv):
    parser = cli.Parser(
        prog="python -m paper.table1",
        description="Table 1 of the paper: errors of quantized Keys and Values, with sink tokens and without.",
    )
    command.add_options(parser.add_argument)
    command.add_machine_options(parser)
    return command.what(parser.parse_args(argv))


def main(argv=None):
    return cli.run_command("paper.table1", lambda: run(parse(argv)), command.ADVICE)


if __name__ == "__main__":
    cli.exit_process(main())
