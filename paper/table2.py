"""Table 2: KVQuant at 2 bits with the first token kept (PFN-1), as its authors have it, and with
KVSink-5 instead.

    python -m paper.table2                      the default model on Wikipedia articles
    python -m paper.table2 --model llama2-7b    its columns of Table 2: WikiText-2, then C4

Read top to bottom: Table 2 as printed; the rows of a run and how they are measured; the command;
its options.

What this file does not do: the method is kvquant.py's, and the loop over windows is
support/evaluate.py's. This command and eval_ppl.py may write to one --json file, in which KVQuant's
rows then stand beside those of the RTN schemes.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import kvsink
from kvsink import Rule
from paper import kvquant
from support import cli, evaluate, hub, report, text
from support.evaluate import EvalConfig
from support.machine import pick_machine
from support.results import read_results
from support.rows import FULL_PRECISION, KEEPS, Row, expand_rows, row_of, rtn_bits

# --------------------------------------------------------------------------------------------------
# Table 2 as printed: PPL on WikiText-2, then on C4, of the models in this order

MODELS = ("llama2-7b", "llama2-13b", "llama3-8b", "llama3.1-8b-instruct")
TEXTS = ("wikitext2", "c4")
RHOS = (0.0, 0.001, 0.005, 0.01)
PFN = Rule(first=1)
KVSINK = Rule(k=5)
TABLE_2 = {
    FULL_PRECISION: ((5.12, 4.57, 5.75, 6.75), (6.63, 6.05, 7.37, 8.03)),
    Row("kvquant", 2, PFN, 0.0): ((7.46, 16.26, 7.31, 9.75), (9.46, 26.29, 8.53, 10.43)),
    Row("kvquant", 2, KVSINK, 0.0): ((6.52, 5.10, 6.77, 8.83), (7.93, 6.47, 7.74, 9.57)),
    Row("kvquant", 2, PFN, 0.001): ((5.73, 5.00, 6.84, 8.80), (7.11, 6.39, 8.06, 9.25)),
    Row("kvquant", 2, KVSINK, 0.001): ((5.60, 4.85, 6.56, 8.25), (7.10, 6.28, 7.87, 8.80)),
    Row("kvquant", 2, PFN, 0.005): ((5.62, 4.86, 6.51, 7.91), (7.11, 6.24, 7.87, 8.71)),
    Row("kvquant", 2, KVSINK, 0.005): ((5.54, 4.76, 6.34, 7.69), (6.95, 6.22, 7.81, 8.65)),
    Row("kvquant", 2, PFN, 0.01): ((5.53, 4.80, 6.37, 7.58), (6.94, 6.23, 7.82, 8.53)),
    Row("kvquant", 2, KVSINK, 0.01): ((5.44, 4.71, 6.22, 7.47), (6.81, 6.19, 7.78, 8.50)),
}


def paper_ppl(config, row):
    """Return the PPL that Table 2 prints for a row, or None if the row or the setting is not Table
    2's."""
    is_printed = config.model in MODELS and config.data in TEXTS and row in TABLE_2
    if not is_printed or config.seq_len != 4096 or config.q_norm:
        return None
    return TABLE_2[row][TEXTS.index(config.data)][MODELS.index(config.model)]


# --------------------------------------------------------------------------------------------------
# The rows of a run


@dataclass(frozen=True)
class KVQuantConfig(EvalConfig):
    """An EvalConfig whose rows are full precision, as eval_ppl.py measures it, and KVQuant's."""

    q_norm: bool = False
    calibration: Path | None = None  # a file; None: one of our cache

    @property
    def calib_data(self):
        """The text to calibrate on: as in KVQuant, WikiText-2 calibrates for C4, too."""
        return "wikitext2" if self.data in TEXTS else text.PACKED

    @property
    def calibration_tokens(self):
        """Tokens per calibration window: 2,048 as in KVQuant's paper, or --seq-len if that is
        smaller."""
        return min(2048, self.seq_len)


def evaluate_rows(run, old_results):
    """Yield the result of each row, a dict; `old_results` holds those that an earlier run has
    finished. KVQuant quantizes Keys before RoPE."""
    config = run.config
    pre_rope = evaluate.run_options(config.machine, "pre", config.stream)
    pre_rope_run = replace(run, options=pre_rope)
    calibrations = None
    ppl_fp = None
    for row, result in evaluate.rows_with_results(run, old_results, result_settings):
        if result is None:
            # The first row calibrates for all, or refuses a file, before anything is measured.
            calibrations = calibrations or kvquant.load_or_calibrate(
                run.model, run.tokenizer, calibration_config(run), config.calibration
            )
            row_run = run if row == FULL_PRECISION else pre_rope_run
            row_quantizers = quantizers(run, row, calibrations)
            result = result_settings(run, row)
            result |= evaluate.measure_row(row_run, row, row_quantizers, ppl_fp)
            result = evaluate.add_average_bits(run, row, result, storage_bits(run, row))
        if row == FULL_PRECISION:
            ppl_fp = result["ppl"]
        yield result


def quantizers(run, row, calibrations):
    """Return the quantizers of a row, as kvsink.prefill takes them."""
    if row == FULL_PRECISION:
        return kvsink.full_precision_quantizers(run.model)
    calibration = calibrations[kvquant.Recipe(row.rule, row.rho)]
    return kvquant.kvquant_quantizers(calibration, row.rho, row.bits, run.config.q_norm)


def storage_bits(run, row):
    """Return the bits that a token takes in the cache of a row, and those stored once."""
    if row == FULL_PRECISION:
        return rtn_bits(row, run.model.config, run.group_size)
    return kvquant.kvquant_bits(row, run.model.config)


def calibration_config(run):
    """Return the recipes of all rows, finished rows included, so that one file serves all rows, and
    the settings of their calibration."""
    config = run.config
    return kvquant.CalibrationConfig(
        recipes=[kvquant.Recipe(r.rule, r.rho) for r in config.rows if r != FULL_PRECISION],
        site=run.site,
        weights=run.weights,
        data=config.calib_data,
        windows=config.calib_windows,
        tokens=config.calibration_tokens,
        seed=config.seed,
        dtype=config.machine.dtype,
    )


def result_settings(run, row):
    """Return all settings that the PPL of a row depends on: they identify a finished result."""
    settings = evaluate.result_settings(run, row)
    if row == FULL_PRECISION:
        return settings
    config = run.config
    return settings | {
        "rope": "pre",
        "calib_windows": config.calib_windows,
        "calib_data": config.calib_data,
        "outliers": row.rho,
        "q_norm": config.q_norm,
    }


# --------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    def work():
        args = parse_arguments(argv)
        evaluate_texts(kvquant_configs(args), args.json)

    advice = "lower --seq-len or --calib-windows, or run with --stream"
    return cli.run_command("paper.table2", work, advice)


def evaluate_texts(configs, json=None):
    """Evaluate each KVQuantConfig, one per text. Print each row and add it to the file `json` as it
    is done."""
    old_results = read_results(json)
    for run in evaluate.load_runs(configs, check_against_model):
        if run.config.stream:
            unfinished = evaluate.unfinished_rows(run, old_results, result_settings)
            evaluate.announce_streaming(run, unfinished, calibration_passes(run))
        rows = evaluate_rows(run, old_results)
        report.print_and_save(heading(run), run.site, rows, json, columns(run.config))


def check_against_model(config, model_config):
    """Raise ValueError if an option asks for more than the model can do, or for more tokens than a
    calibration window can lose."""
    evaluate.check_against_model(config, model_config)
    tokens = config.calibration_tokens
    if max(row.rule.max_kept for row in config.rows) > tokens - 2:
        raise ValueError(
            f"--sinks: KVQuant calibrates on windows of {tokens} tokens, too few to keep so many"
        )


def calibration_passes(run):
    """Return the number of windows in each pass through all blocks that the calibration takes: one
    forward pass for each rule, and a backward pass, which takes three times as long. The list is
    empty if there is a file."""
    config = run.config
    if (config.calibration or kvquant.cache_file(calibration_config(run))).exists():
        return []
    windows = config.calib_windows * config.calibration_tokens / config.seq_len
    rules = {row.rule for row in config.rows if row != FULL_PRECISION}
    return [windows] * len(rules) + [3 * windows]


def heading(run):
    config = run.config
    windows = f"{len(run.tokens)} windows of {config.seq_len} tokens"
    line = f"{config.model} on {config.data}, {windows}\n"
    tokens = config.calibration_tokens
    line += text.describe_calibration(config.calib_data, config.calib_windows, tokens)
    if any(row.rule.first and row.rule.predicts for row in config.rows):
        line += "\nPFN-1+KVSink is not one of the paper's rules"
    return line


def columns(config):
    """Return the columns of average bits and, if Table 2 has the model and the text, of the paper's
    numbers."""

    def paper_column(result):
        return str(paper_ppl(config, row_of(result)) or "")

    bits = report.Column("avg. bits", 11, lambda r: f"{r.get('avg_bits', math.nan):.3f}")
    paper = report.Column("Table 2 (paper)", 18, paper_column)
    is_printed = any(paper_ppl(config, row) for row in config.rows)
    return [bits, paper] if is_printed else [bits]


# --------------------------------------------------------------------------------------------------
# Options

# N for each word of --keep, if --sinks is not given. Table 2 does not have the last.
DEFAULT_SINKS = {"none": 0, "pfn": 1, "kvsink": 5, "pfn+kvsink": kvsink.AUTO}


def table_rows(widths, rhos, keeps, sinks=None):
    """Return the rows of a run in the order of the table. Without `sinks` each rule has its own
    N."""
    groups = [("kvquant", bits, rho) for bits in widths for rho in rhos]
    if sinks:
        return FULL_PRECISION, *expand_rows(groups, keeps, sinks)
    rows = [FULL_PRECISION]
    for group in groups:
        for keep in keeps:
            rows += expand_rows([group], [keep], [DEFAULT_SINKS[keep]])
    return tuple(dict.fromkeys(rows))


def kvquant_configs(args):
    """Return one KVQuantConfig for each text of the options."""
    default_texts = [text.PACKED] if args.model == hub.DEFAULT_MODEL else TEXTS
    rows = table_rows(args.bits, args.outliers, args.keep, args.sinks)
    machine = pick_machine(args)
    return [
        KVQuantConfig(
            model=args.model,
            data=name,
            rows=rows,
            seq_len=args.seq_len or (1024 if name == text.PACKED else 4096),
            limit=args.limit or (8 if name == text.PACKED else None),
            calib_windows=args.calib_windows,
            seed=args.seed,
            layer=args.layer,
            channel=args.channel,
            machine=machine,
            stream=args.stream,
            q_norm=args.q_norm,
            calibration=args.calibration,
        )
        for name in args.data or default_texts
    ]


def parse_arguments(argv):
    """Return the options. Raises ValueError if they are invalid."""
    parser = cli.Parser(
        prog="python -m paper.table2",
        description="Table 2: perplexity with KVQuant (2 bits, or other widths). The first token\n"
        "is kept (PFN-1), or the five predicted attention sinks are (KVSink-5), for several\n"
        "fractions of outliers stored apart.",
        epilog="without options: SmolLM2-135M on Wikipedia articles\n"
        "the paper: --model llama2-7b\n"
        "several GPUs: torchrun --nproc-per-node 4 -m paper.table2 ...",
    )
    add_table_options(parser.add_argument_group("what to run").add_argument)
    add_run_options(parser.add_argument_group("how to run it").add_argument)
    args = parser.parse_args(argv)
    check_files(args.json, args.calibration)
    return args


# fmt: off
def add_table_options(add):
    cli.add_model_options(add)
    add("--data", nargs="+", help="wiki-sample, wikitext2, c4, or a UTF-8 text file (default: "
        "wiki-sample for the default model, else wikitext2 c4)")
    add("--bits", nargs="+", type=cli.number(2, 4), default=[2], help="bits per number, 2 to 4 "
        "(default: 2)")
    add("--outliers", nargs="+", type=cli.fraction, metavar="RHO", default=RHOS, help="fractions "
        "of the numbers that are stored apart in 16 bits (default: 0 0.001 0.005 0.01)")
    add("--keep", nargs="+", choices=KEEPS, default=KEEPS[1:], help="which tokens to keep; "
        "pfn+kvsink is not in Table 2 (default: pfn kvsink pfn+kvsink)")
    add("--sinks", nargs="+", type=cli.number_or_auto(0), metavar="N", help="how many of them "
        "(default: 1 for pfn, 5 for kvsink, auto for pfn+kvsink)")
    add("--q-norm", action="store_true", help="match mean and deviation after quantization")
    add("--json", type=Path, metavar="FILE", help="write each row to this file when it is done; "
        "rows that are already there are not run again")


def add_run_options(add):
    add("--seq-len", type=cli.number(2), help="tokens per window (default: 1024 on wiki-sample, "
        "else 4096)")
    add("--limit", type=cli.number(1), metavar="WINDOWS", help="use the first windows only "
        "(default: 8 on wiki-sample, 256 on c4, else all)")
    add("--calib-windows", type=cli.number(1), metavar="WINDOWS", default=16, help="windows to "
        "calibrate on, of at most 2,048 tokens (default: 16; they are of wikitext2 for c4 too, and "
        "of wiki-sample for a text file)")
    add("--calibration", type=Path, metavar="FILE", help="read the calibration from this file, or "
        "write it there if there is none (default: a file of our cache)")
    cli.add_site_options(add)
    add("--seed", type=cli.number(0, 2**63 - 1), default=0, help="for windows at random places: "
        "calibration, c4 (default: 0)")
    cli.add_machine_options(add)
    add("--stream", action="store_true", help="run all windows through one block after the other, "
        "and read blocks from disk: for models larger than the memory")
# fmt: on


def check_files(json, calibration):
    """Raise ValueError if the file of --json or --calibration could not be written. Each may be
    None."""
    cli.check_file(json)
    if not (calibration and calibration.is_file()):  # a calibration that is there is only read
        cli.check_file(calibration)
    if json and json == calibration:
        raise ValueError("--json and --calibration name the same file")


if __name__ == "__main__":
    cli.exit_process(main())
