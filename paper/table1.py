"""Table 1: quantization errors of Keys and Values, with sink tokens and without, beside the paper's
numbers.

    python -m paper.table1                                the embedded default
    python -m paper.table1 --model llama2-7b              the paper's model

Read top to bottom: the table as printed; the same measured on any model; the command.

What this file does not do: activations.py finds the sinks and records what a block computes; the
equations are quant.py's.
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
from support.evaluate import load_model

# LLaMA2-7B, as printed: for each of the KINDS, the error overall, without sink tokens and (dynamic
# only) with them
PAPER_TABLE_1 = {
    ("dynamic", 4): ((1.30, 1.38, 0.07), (0.10, 0.11, 0.01), (0.28, 0.26, 0.31)),
    ("dynamic", 3): ((9.00, 9.57, 0.50), (0.68, 0.72, 0.08), (2.03, 1.78, 2.30)),
    ("dynamic", 2): ((27.58, 29.32, 1.37), (2.53, 2.68, 0.23), (7.05, 6.52, 7.58)),
    ("static", 4): ((86.73, 16.39), (9.75, 3.10), (9.02, 5.17)),
    ("static", 3): ((89.60, 20.41), (10.09, 3.45), (10.24, 8.26)),
    ("static", 2): ((107.36, 46.14), (11.30, 6.35), (15.83, 11.44)),
}
PARTS = {  # name in the JSON file -> title
    "overall": "overall",
    "without_sinks": "w/o sinks",
    "with_sinks": "w/ sinks",
}


def table_1(subject):
    """Measure Table 1: mean squared errors x 100 over all windows and all stable blocks. Returns a
    list of dict, one for each kind, range and number of bits, with the paper's numbers for
    LLaMA2-7B under "paper".

                       dynamic ranges                      static ranges
        overall        all groups                          all tokens
        without_sinks  groups that hold no sink            all tokens but the sinks, with ranges
                                                           calibrated without sinks
        with_sinks     groups that hold a sink, or None
                       if there are none

    The paper does not say on how many tokens it measures, nor in which blocks. Its per-token
    numbers imply that two of 32 tokens are sinks: overall is 15/16 of without_sinks plus 1/16 of
    with_sinks.
    """
    # (kind, bits, ranges, part) -> sum and count of the squared errors
    sums = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add(acts, S):
        for kind in KINDS:
            for bits in (4, 3, 2):
                for place, errors in squared_errors(subject, acts, S, kind, bits).items():
                    added = [errors.sum(), errors.numel()]
                    sums[kind, bits, *place] += torch.tensor(added, dtype=torch.float64)

    for tokens in tqdm(subject.windows, desc="Table 1", unit="window", leave=False, disable=None):
        subject.map_stable_blocks(tokens, add)
    rows = []
    for i, kind in enumerate(KINDS):
        for (ranges, bits), printed in PAPER_TABLE_1.items():
            row = {"kind": kind, "ranges": ranges, "bits": bits}
            paper = dict(zip(PARTS, printed[i]))
            for part in paper:
                total, count = sums[kind, bits, ranges, part].tolist()
                row[part] = 100 * total / count if count else None
            rows.append({**row, "paper": paper})
    return rows


def squared_errors(subject, acts, S, kind, bits):
    """Return (ranges, part) -> the squared errors of one kind in one block, a tensor."""
    tensor, granularity = KINDS[kind]
    X = getattr(acts, tensor)

    def errors(quantizer):
        return (quantizer(X) - X).square()

    dynamic = errors(Quantizer(bits, granularity, GROUP))
    static = errors(replace(subject.quantizers[acts.l, kind, False], bits=bits))
    static_kept = errors(replace(subject.quantizers[acts.l, kind, True], bits=bits))
    mixed = groups_with_sinks(S, granularity)
    return {
        ("dynamic", "overall"): dynamic,
        ("dynamic", "without_sinks"): dynamic[:, ~mixed],
        ("dynamic", "with_sinks"): dynamic[:, mixed],
        ("static", "overall"): static,
        ("static", "without_sinks"): static_kept[:, ~S],
    }


def groups_with_sinks(S, granularity):
    """Return a mask (n,) of the tokens whose group holds a sink. A group lies within one token, or
    is 16 tokens of one channel."""
    groups, axes = quant.grouped(S[:, None], granularity, GROUP, fill=False)
    mixed = groups.any(axes, keepdim=True).expand_as(groups)
    return quant.ungrouped(mixed, granularity, len(S))[:, 0]


def print_table_1(subject, rows):
    print(f"\nTable 1: quantization error (MSE x 100), {command.describe_setting(subject)}")
    print(f"{'':<20}{subject.name:^33}{'LLaMA2-7B (paper)':^33}")
    print(f"{'':<20}" + "".join(f"{title:>11}" for title in PARTS.values()) * 2)
    for row in rows:
        if (row["ranges"], row["bits"]) == ("dynamic", 4):
            print(row["kind"])
        errors = [side.get(part) for side in (row, row["paper"]) for part in PARTS]
        cells = ["-" if error is None else f"{error:.2f}" for error in errors]
        line = "".join(f"{cell:>11}" for cell in cells)
        print(f"  {row['ranges']:<9}{row['bits']} bits  {line}", flush=True)


# --------------------------------------------------------------------------------------------------
# The command


def report(config, subject):
    """Measure, print and save Table 1 of a Subject that has its static quantizers."""
    rows = table_1(subject)
    print_table_1(subject, rows)
    command.save_json(config.path("table1", "json"), subject, rows)


def run(config):
    loaded = load_model(config.model, config.machine)
    subject = command.find_sinks(config, loaded)
    report(config, command.calibrate(config, loaded, subject))


def parse(argv):
    parser = cli.Parser(
        prog="python -m paper.table1",
        description="Table 1 of the paper: quantization errors of Keys and Values, with sink "
        "tokens and without.",
    )
    command.add_options(parser)
    command.add_machine_options(parser)
    return command.analysis_config(parser.parse_args(argv))


def main(argv=None):
    return cli.run_command("paper.table1", lambda: run(parse(argv)), command.ADVICE)


if __name__ == "__main__":
    cli.exit_process(main())
