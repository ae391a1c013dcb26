"""Table 2: KVQuant at 2 bits with the first token kept (PFN-1), as its authors have it, and with
KVSink-5 instead.

    python -m paper.table2                        the embedded default: a real model, a real text
    python -m paper.table2 --model llama2-7b      the model's part of the printed table: WikiText-2, then C4

Read top to bottom: Table 2 as printed; the rows of a run; the command.

What this file does not do: the method is kvquant.py's, perplexity is eval_ppl.py's. This command
and eval_ppl.py may write to one --json file, where KVQuant's rows then stand beside those of the
RTN schemes.
"""

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import eval_ppl
import kvsink
from eval_ppl import What
from paper.kvquant import MadeWith, Recipe, calibrations, kvquant_bits, kvquant_cache, own_file
from support import cli, hub, results, stream, text
from support.cli import rank_and_world_size
from support.results import FULL_PRECISION, Row, expand_rows
from support.run import How

# --------------------------------------------------------------------------------------------------
# Table 2 as printed: PPL on WikiText-2, then on C4, of the models in this order

MODELS = ("llama2-7b", "llama2-13b", "llama3-8b", "llama3.1-8b-instruct")
TEXTS = ("wikitext2", "c4")
RHOS = (0.0, 0.001, 0.005, 0.01)
TABLE_2 = {
    FULL_PRECISION: ((5.12, 4.57, 5.75, 6.75), (6.63, 6.05, 7.37, 8.03)),
    Row("kvquant", 2, "pfn", 1, 0.0): ((7.46, 16.26, 7.31, 9.75), (9.46, 26.29, 8.53, 10.43)),
    Row("kvquant", 2, "kvsink", 5, 0.0): ((6.52, 5.10, 6.77, 8.83), (7.93, 6.47, 7.74, 9.57)),
    Row("kvquant", 2, "pfn", 1, 0.001): ((5.73, 5.00, 6.84, 8.80), (7.11, 6.39, 8.06, 9.25)),
    Row("kvquant", 2, "kvsink", 5, 0.001): ((5.60, 4.85, 6.56, 8.25), (7.10, 6.28, 7.87, 8.80)),
    Row("kvquant", 2, "pfn", 1, 0.005): ((5.62, 4.86, 6.51, 7.91), (7.11, 6.24, 7.87, 8.71)),
    Row("kvquant", 2, "kvsink", 5, 0.005): ((5.54, 4.76, 6.34, 7.69), (6.95, 6.22, 7.81, 8.65)),
    Row("kvquant", 2, "pfn", 1, 0.01): ((5.53, 4.80, 6.37, 7.58), (6.94, 6.23, 7.82, 8.53)),
    Row("kvquant", 2, "kvsink", 5, 0.01): ((5.44, 4.71, 6.22, 7.47), (6.81, 6.19, 7.78, 8.50)),
}


def paper_ppl(row, model, data, seq_len, q_norm=False):
    """What Table 2 prints for a row, None where the row or its setting is none of Table 2's."""
    printed = (
        row in TABLE_2 and model in MODELS and data in TEXTS and seq_len == 4096 and not q_norm
    )
    return TABLE_2[row][TEXTS.index(data)][MODELS.index(model)] if printed else None


# --------------------------------------------------------------------------------------------------
# Rows

KEPT = {
    "none": (0,),
    "pfn": (1,),
    "kvsink": (5,),
    "pfn+kvsink": (kvsink.AUTO,),
}  # the N of each; Table 2 lacks the last


def rows_for(widths, rhos, keeps, sinks):
    """The rows of a run in the order of the table. Without `sinks` (None) each rule has its own
    N."""
    groups = [("kvquant", bits, rho) for bits in widths for rho in rhos]
    if sinks:
        return FULL_PRECISION, *expand_rows(groups, keeps, sinks)
    return FULL_PRECISION, *(
        row for g in groups for keep in keeps for row in expand_rows([g], [keep], KEPT[keep])
    )


@dataclass(frozen=True)
class KVQuant:
    """What KVQuant's rows have besides what all rows have (eval_ppl.What)."""

    q_norm: bool
    calibration: Path | None  # a file; None: one of our cache


def calibration_tokens(what):
    """How long KVQuant's calibration windows are: its own paper's 2,048 tokens, if a window here is
    as long."""
    return min(2048, what.seq_len)


def settings(what, kvquant, row, *where):
    """All that the PPL of a row depends on: by these a result is known again. `where` is the rest
    of what eval_ppl.settings takes. Full precision is eval_ppl.py's row."""
    if row == FULL_PRECISION:
        return eval_ppl.settings(what, row, *where)
    own = {"outliers": row.rho, "q_norm": kvquant.q_norm, "calib_windows": what.calib_windows}
    return eval_ppl.settings(replace(what, rope="pre"), row, *where) | own


def calibration_of(what, site, machine, weights):
    """Recipes, site and MadeWith of the rows, done or not: one file has all. As in KVQuant,
    WikiText-2 calibrates for C4 too."""
    source = "wikitext2" if what.data in TEXTS else text.PACKED
    tokens = calibration_tokens(what)
    made_with = MadeWith(weights, source, what.calib_windows, tokens, what.seed, machine.dtype)
    return (
        [Recipe(row.keep, row.N, row.rho) for row in what.rows if row != FULL_PRECISION],
        site,
        made_with,
    )


def rows_of(what, kvquant, model, tokenizer, tokens, calibration, how):
    """The function that measures a row on windows `tokens` (W, n). The first calibrates for all, or
    refuses a file."""
    made, (recipes, site, made_with) = {}, calibration

    def measure(row):
        if not made:
            made.update(
                calibrations(model, tokenizer, recipes, site, made_with, kvquant.calibration)
            )
        if row == FULL_PRECISION:
            cache, stored = (
                kvsink.full_precision_cache(model),
                results.rtn_bits(row, model.config, what.group_size),
            )
        else:
            own = made[Recipe(row.keep, row.N, row.rho)]
            cache, stored = (
                kvquant_cache(own, row.rho, row.bits, kvquant.q_norm),
                kvquant_bits(row, model.config),
            )
        rule, label = (row.keep, row.N, site), f"{what.rows.index(row) + 1}/{len(what.rows)} {row}"
        how_row = replace(how, pre_rope=row != FULL_PRECISION)
        result = eval_ppl.measured(model, tokens, cache, rule, how_row, label)
        kept = statistics.mean(result["kept"])
        return result | {
            "avg_bits": results.average_bits(
                row, model.config, what.seq_len, stored, site.l_E, kept
            )
        }

    return measure


def columns(what, kvquant):
    """Of the table, besides eval_ppl.py's: average bits, and the paper's figures where it has
    some."""

    def paper(row):
        return paper_ppl(row, what.model, what.data, what.seq_len, kvquant.q_norm)

    bits = ("avg. bits", 11, lambda result: f"{result.get('avg_bits', math.nan):.3f}")
    printed = ("Table 2 (paper)", 18, lambda result: f"{paper(results.row_of(result)) or '':}")
    return [bits, printed] if any(paper(row) for row in what.rows) else [bits]


# --------------------------------------------------------------------------------------------------
# The command


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(
        prog="python -m paper.table2",
        description="Table 2: perplexity with KVQuant (2 bits; other widths can be asked for), the first token kept\n"
        "(PFN-1) or the five predicted attention sinks (KVSink-5), for several fractions of outliers stored apart.",
        epilog="without options: SmolLM2-135M on Wikipedia articles\nthe paper: --model llama2-7b\n"
        "several GPUs: torchrun --nproc-per-node 4 -m paper.table2 ...",
    )
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--data", nargs="+", help="wiki-sample, wikitext2, c4, or a UTF-8 text file (default: wiki-sample for the "
        "default model, else wikitext2 c4)")
    add("--bits", nargs="+", type=cli.number(2, 4), default=[2], help="bits a number, 2 to 4 (default: 2)")
    add("--outliers", nargs="+", type=cli.fraction, metavar="RHO", default=RHOS, help="fractions of the numbers stored "
        "apart in 16 bits (default: 0 0.001 0.005 0.01)")
    add("--keep", nargs="+", choices=results.KEEPS, default=results.KEEPS[1:], help="which tokens to keep; pfn+kvsink is "
        "not Table 2's (default: pfn kvsink pfn+kvsink)")
    add("--sinks", nargs="+", type=cli.number_or_auto(0), metavar="N", help="how many of them (default: 1 of pfn, 5 of "
        "kvsink, auto of pfn+kvsink)")
    add("--q-norm", action="store_true", help="match mean and deviation after quantization")
    add("--json", type=Path, metavar="FILE", help="write the results, row by row; rows already there are not run again")
    add = parser.add_argument_group("how to run it").add_argument
    add("--seq-len", type=cli.number(2), help="tokens a window (default: 1024 on wiki-sample, else 4096)")
    add("--limit", type=cli.number(1), metavar="WINDOWS", help="the first windows only (default: 8 on wiki-sample, 256 "
        "on c4, else all)")
    add("--calib-windows", type=cli.number(1), metavar="WINDOWS", default=16, help="windows that calibrate, of at most "
        "2,048 tokens (default: 16; of wikitext2 for c4 too, of wiki-sample for a text file)")
    add("--calibration", type=Path, metavar="FILE", help="write what is calibrated to this file, or take it from there "
        "(default: a file of our cache)")
    cli.add_site_options(add)
    add("--seed", type=cli.number(0, 2**63 - 1), default=0, help="of windows at random places: calibration, c4 "
        "(default: 0)")
    cli.add_machine_options(add)
    add("--stream", action="store_true", help="all windows through one block after the other, which come from disk: "
        "for models larger than the memory")
    return parser.parse_args(argv)
# fmt: on


def parse(argv):
    """What `run` takes. Raises ValueError for options that cannot be."""
    args = parse_arguments(argv)
    for path in (args.json, args.calibration):
        if not (path and path == args.calibration and path.is_file()):  # it is only read
            cli.check_file(path)
    if args.json and args.json == args.calibration:
        raise ValueError("--json and --calibration name the same file")
    rows = rows_for(args.bits, args.outliers, args.keep, args.sinks)
    whats = [
        What(
            model=args.model,
            rows=rows,
            data=name,
            seq_len=args.seq_len or (1024 if name == text.PACKED else 4096),
            limit=args.limit or (8 if name == text.PACKED else None),
            calib_windows=args.calib_windows,
            seed=args.seed,
            group_size=128,  # of full precision, whose row is eval_ppl.py's
            rope="post",
        )
        for name in args.data or ([text.PACKED] if args.model == hub.DEFAULT_MODEL else TEXTS)
    ]
    kvquant = KVQuant(args.q_norm, args.calibration)
    return whats, kvquant, cli.machine(args), args.stream, (args.layer, args.channel), args.json


def check_against_model(what, config):
    """Raises ValueError for what the model cannot do, or KVQuant's windows."""
    eval_ppl.check_against_model(what, config)
    tokens = calibration_tokens(what)
    if max(row.most() for row in what.rows) > tokens - 2:
        raise ValueError(
            f"--sinks: KVQuant calibrates on windows of {tokens} tokens, too few to keep so many"
        )


def run(whats, kvquant, machine, streamed, place, json):
    """Rows are printed and written as they are done."""
    old_results = results.read_results(json)
    model, tokenizer, site, weights, texts = eval_ppl.opened(
        whats, machine, streamed, place, check_against_model
    )
    step, nll = (
        machine.compiled(kvsink.decoder_block),
        machine.compiled(eval_ppl.negative_log_likelihood),
    )
    group_size, _ = cli.clamp_group_size(whats[0].group_size, model.config.head_dim)
    first = rank_and_world_size()[0] == 0
    for what, tokens in zip(whats, texts):
        what, how = replace(what, group_size=group_size), How(step, nll, stream=streamed)
        known = {
            row: settings(what, kvquant, row, tokens, machine, weights, site) for row in what.rows
        }
        done, calibration = (
            results.done_before(known, old_results),
            calibration_of(what, site, machine, weights),
        )
        if streamed and first and (rows := [row for row in what.rows if row not in done]):
            stream.announce(
                model,
                tokens,
                [len(tokens)] * len(rows) + calibration_passes(what, kvquant, calibration),
            )
        found = results.evaluate(
            known, done, rows_of(what, kvquant, model, tokenizer, tokens, calibration, how)
        )
        heading = f"{what.model} on {what.data}, {len(tokens)} windows of {what.seq_len} tokens"
        if any(row.keep == "pfn+kvsink" for row in what.rows):
            heading += "\nPFN-1+KVSink is not one of the paper's rules"
        results.print_and_save(heading, site, found, json, columns(what, kvquant))


def calibration_passes(what, kvquant, calibration):
    """What calibrating takes, in windows of the text through all blocks: forwards once for each
    rule, and backwards, three times as long. Nothing where it was done before."""
    if (kvquant.calibration or own_file(*calibration)).exists():
        return []
    windows = what.calib_windows * calibration_tokens(what) / what.seq_len
    rules = {(row.keep, row.N) for row in what.rows if row != FULL_PRECISION}
    return [windows] * len(rules) + [3 * windows]


def main(argv=None):
    advice = "lower --seq-len or --calib-windows, or run with --stream"
    return cli.run_command("paper.table2", lambda: run(*parse(argv)), advice)


if __name__ == "__main__":
    cli.exit_process(main())
