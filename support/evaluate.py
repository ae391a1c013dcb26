"""A run: a model on windows of a text, the quantizers of each row, and what a row measures.

Read top to bottom: what is evaluated; loading it; Algorithm 1 on windows; the perplexity of a row;
the quantizers of a row and their calibration; rows that an earlier run has done.

What this file does not do: Algorithm 1 is in kvsink.py. eval_ppl.py writes out its loop over rows
and windows with the functions below; the other commands call `measure_row`.
"""

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import kvsink
from llama import Llama, LlamaConfig
from quant import NotFinite
from support import cli, hub, stream, text
from support.machine import (
    Machine,
    init_distributed,
    is_first_rank,
    no_progress_bar,
    ran_compiled,
    rank_and_world_size,
)
from support.rows import (
    FULL_PRECISION,
    Row,
    average_bits,
    options_of,
    rtn_bits,
    stored_bits,
)
from support.site import site_of
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# What is evaluated


@dataclass(frozen=True)
class EvalConfig:
    """A model, a text, the rows of a table, and the settings that all rows share."""

    model: str = hub.DEFAULT_MODEL
    data: str = text.PACKED
    rows: tuple[Row, ...] = (FULL_PRECISION,)
    seq_len: int = 1024
    bos: str = "start"  # where the begin-of-sequence token goes: one of text.BOS
    limit: int | None = 8  # windows at most
    calib_windows: int = 4
    seed: int = 0
    group_size: int = 128
    rope: str = "post"  # whether Keys are quantized after ("post") or before ("pre") RoPE
    layer: int | None = None  # None: from Table 3, else from the finder
    channel: int | None = None
    machine: Machine = Machine()
    stream: bool = False

    @property
    def calib_data(self):
        """The text that static ranges are calibrated on: a file has no training split."""
        return self.data if self.data in hub.TEXTS else text.PACKED


def check_against_model(config, model_config):
    """Raise ValueError if an option asks for more than the model can do."""
    if config.seq_len > model_config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {config.seq_len} is above the model's context, "
            f"{model_config.max_position_embeddings}"
        )
    N = max((row.rule.max_kept for row in config.rows if row.rule.k != kvsink.AUTO), default=0)
    if N > config.seq_len:
        raise ValueError(f"--sinks {N} is above the window of {config.seq_len} tokens")
    cli.clamp_group_size(config.group_size, model_config.head_dim)


# --------------------------------------------------------------------------------------------------
# Loading it


class Loaded(NamedTuple):
    directory: Path
    model: Llama
    tokenizer: Tokenizer


def load_model(name, machine, streamed=False):
    """Load a model by name, and fetch it first if necessary. Return its directory, model and
    tokenizer. Raises OSError or ValueError with a message that says what to do."""
    directory = hub.model_directory(name)
    load = stream.from_pretrained if streamed else Llama.from_pretrained
    model = load(directory, machine.device, machine.torch_dtype)
    return Loaded(directory, model, Tokenizer.from_pretrained(directory))


@dataclass(frozen=True)
class RunOptions:
    """The ways to run Algorithm 1: `step` is its lines 6-13 and `loss` the negative log-likelihood,
    both eager or compiled; `stream` takes all windows through one block after the other. `used`
    holds True if either ran compiled in this row, and False if either, meant to be compiled, ran
    eager."""

    step: Callable
    loss: Callable
    eager_step: Callable
    used: set
    stream: bool = False


def run_options(machine, rope="post", stream=False):
    eager = kvsink.decoder_block_pre_rope if rope == "pre" else kvsink.decoder_block
    used = set()
    step = machine.compiled(eager, used)
    loss = machine.compiled(negative_log_likelihood, used)
    return RunOptions(step, loss, eager, used, stream)


@dataclass(frozen=True)
class Run:
    """An EvalConfig with all that its rows need, loaded."""

    config: EvalConfig
    model: Llama
    tokenizer: Tokenizer
    tokens: torch.Tensor  # the windows (W, n)
    group_size: int  # the config's, at most a head
    site: kvsink.Site  # where sinks are predicted; NOWHERE if nobody asks for it
    weights: str  # hub.fingerprint of the checkpoint
    options: RunOptions
    # rule -> scheme -> quantizers, filled as rows need them
    calibrated: dict = field(default_factory=dict)


def load_runs(configs, check=check_against_model):
    """Return a Run for each of `configs`, which are of one model on one machine. Before weights are
    read, `check(config, model_config)` is called for each. Raises OSError or ValueError."""
    first = configs[0]
    init_distributed(first.machine.device)
    directory = hub.model_directory(first.model)
    model_config = LlamaConfig.from_pretrained(directory)
    site = cli.chosen_site(first.layer, first.channel, model_config)
    for config in configs:
        check(config, model_config)
    _, model, tokenizer = load_model(first.model, first.machine, first.stream)
    windows = functools.cache(functools.partial(text.windows, tokenizer))  # several share a text
    texts = [windows(c.data, "test", c.seq_len, c.limit, c.seed, bos=c.bos) for c in configs]
    for tokens in texts:
        text.check_vocabulary(tokens, model_config, directory)
    if site is None and any(row.rule.predicts for config in configs for row in config.rows):
        site = site_of(model, tokenizer, first.model, directory)
    weights = hub.fingerprint(directory)
    options = run_options(first.machine, first.rope, first.stream)
    site = site or kvsink.NOWHERE
    runs = []
    for config, tokens in zip(configs, texts):
        group_size = cli.clamp_group_size(config.group_size, model_config.head_dim)
        runs.append(Run(config, model, tokenizer, tokens, group_size, site, weights, options))
    return runs


def heading(run):
    """Return what a table says first: the model, the text, the groups, and the text that static
    ranges were calibrated on."""
    config = run.config
    groups = f"groups of {run.group_size} channels"
    if run.group_size < config.group_size:
        groups += f", which is a head ({config.group_size} were asked for)"
    windows = f"{len(run.tokens)} windows of {config.seq_len} tokens"
    if config.bos == "window":
        windows += ", each after a begin-of-sequence token"
    lines = [f"{config.model} on {config.data}, {windows}, {groups}"]
    if any(row.is_static for row in config.rows):
        calibration = (config.calib_data, config.calib_windows, config.seq_len)
        lines.append(text.describe_calibration(*calibration))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Algorithm 1 on windows


def batches(model, tokens, options, label, step=None):
    """Yield the windows of `tokens` (W, n) in batches: the windows (B, n), their H^0 (B, n, d), and
    the `step` for kvsink.prefill, which also moves a progress bar. A batch is one window; when
    streaming it is all of them, in host memory. `step` is lines 6-13, by default options.step."""
    step = step or options.step
    bar = tqdm(
        total=len(tokens) * len(model.blocks),
        desc=label,
        unit="block",
        leave=False,
        disable=no_progress_bar(),
    )

    def step_with_progress(*arguments):
        H = step(*arguments)
        bar.update()
        return H

    with bar:
        if options.stream:
            H = stream.embed(model, tokens)
            yield tokens, H, stream.one_at_a_time(step_with_progress, model.device)
            return
        for window in tokens[:, None]:  # (1, n); a rank may have none
            yield window, model.embedding(window.to(model.device)), step_with_progress


# --------------------------------------------------------------------------------------------------
# The perplexity of a row


def negative_log_likelihood(model, H, tokens):
    """Return the negative log-likelihood of the n - 1 predicted tokens, summed, in fp32. H is H^L
    (1, n, d), tokens (1, n). Logits are made for 1,024 tokens at a time: with LLaMA-3's vocabulary,
    those of 4,096 take 2 GB."""
    pieces = zip(H[0, :-1].split(1024), tokens[0, 1:].split(1024))
    return sum(
        F.cross_entropy(model.logits(H_).float(), targets, reduction="sum")
        for H_, targets in pieces
    )


def window_losses(run, windows, H):
    """Return the negative log-likelihood of each window, a list, from H^L (B, n, d)."""
    device = run.model.device
    losses = []
    for window, H_w in zip(windows[:, None], H[:, None]):  # (1, n), (1, n, d)
        loss = run.options.loss(run.model, H_w.to(device), window.to(device))
        losses.append(loss.item())
    return losses


def check_losses(run, row, quantizers, windows, losses):
    """Raise NotFinite if a loss of these windows, the last of `losses`, is NaN or inf, after
    running them again, eager, to name the block where that began."""
    if all(map(math.isfinite, losses[-len(windows) :])):
        return
    L = len(run.model.blocks)
    options = replace(run.options, stream=False)  # one window at a time, without the other ranks

    def checking_step(block, H, *rest):
        H = run.options.eager_step(block, H, *rest)
        l = next(l for l in range(1, L + 1) if run.model.blocks[l - 1] is block)
        kvsink.check_hidden_state(H, l, L)
        return H

    rule = row.rule.with_site(run.site)
    message = "NaN or inf first appeared in the output layer"
    try:
        for _, H, step in batches(run.model, windows, options, "finding NaN", checking_step):
            kvsink.prefill(run.model, H, quantizers, step=step, **rule.prefill_arguments(H))
    except NotFinite as error:
        message = str(error)
    raise NotFinite(f"{row_label(run, row)}: {message}; is --dtype wide enough?") from None


def measure_row(run, row, quantizers, ppl_fp):
    """Return what a row measures with these quantizers. It is the inner loop of eval_ppl.py, for
    other tables."""
    start = time.perf_counter()
    rule = row.rule.with_site(run.site)
    losses = []
    kept = []
    for windows, H_0, step in row_batches(run, row):
        arguments = rule.prefill_arguments(H_0)
        H, S_sink = kvsink.prefill(run.model, H_0, quantizers, step=step, **arguments)
        losses += window_losses(run, windows, H)
        kept += S_sink.sum(1).tolist()
        check_losses(run, row, quantizers, windows, losses)
    return row_result(run, losses, kept, time.perf_counter() - start, ppl_fp)


def row_batches(run, row):
    """Return the batches of this rank's share of the windows, with a progress bar for the row."""
    run.options.used.clear()
    rank, ranks = rank_and_world_size()
    return batches(run.model, run.tokens[rank::ranks], run.options, row_label(run, row))


def row_label(run, row):
    return f"{run.config.rows.index(row) + 1}/{len(run.config.rows)} {row}"


def row_result(run, losses, kept, seconds, ppl_fp):
    """Return what a row measured. `losses` and `kept` hold, for each window of this rank, its
    negative log-likelihood and the number of tokens kept. `ppl_fp` is the perplexity of full
    precision, or None for that row itself."""
    n = run.config.seq_len
    losses = gather(run, losses)
    ppl = perplexity(losses, n)
    return {
        "ppl": ppl,
        "ppl_fp": ppl if ppl_fp is None else ppl_fp,
        "seconds": seconds,
        "nll": (losses / (n - 1)).tolist(),  # per token, one number per window
        "kept": gather(run, kept).int().tolist(),
        "compiled": ran_compiled(run.options.used, run.model.device),
    }


def add_bits(run, row, result):
    """Add to a result the bits per number of its RTN cache: as Table 2 counts them, and as the
    packed cache stores it."""
    if "avg_bits" not in result:
        storage = rtn_bits(row, run.model.config, run.group_size)
        result = add_average_bits(run, row, result, storage)
    stored = stored_bits(row, run.model.config, run.config.seq_len, run.group_size)
    return result | {"stored_bits": stored}


def add_average_bits(run, row, result, storage):
    """Add to a result the bits per number as Table 2 counts them; `storage` is what the codes and
    their scales take, as `rtn_bits` returns it."""
    kept = statistics.mean(result["kept"])
    n = run.config.seq_len
    average = average_bits(row, run.model.config, n, storage, run.site.l_E, kept)
    return result | {"avg_bits": average}


def gather(run, numbers):
    """Combine the ranks' numbers, one per window, into one float64 tensor in the order of the
    windows."""
    rank, ranks = rank_and_world_size()
    gathered = torch.zeros(len(run.tokens), dtype=torch.float64)
    gathered[rank::ranks] = torch.tensor(numbers, dtype=torch.float64)
    if ranks > 1:
        gathered = gathered.to(run.model.device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(gathered)
    return gathered.cpu()


def perplexity(losses, n):
    """Return exp of the mean negative log-likelihood of all predicted tokens; `losses` (W,) are of
    windows of n tokens."""
    # exp(710) overflows; a model with a mean that large is broken anyway.
    return math.exp(min(losses.sum().item() / (len(losses) * (n - 1)), 700))


# --------------------------------------------------------------------------------------------------
# The quantizers of a row


def quantizers(run, row):
    """Return the quantizers of a row, as kvsink.prefill takes them. Static ranges are calibrated
    when the first row needs them: one pass for each rule serves all schemes and widths of the
    run."""
    model = run.model
    if row == FULL_PRECISION:
        return kvsink.full_precision_quantizers(model)
    if not row.is_static:
        return kvsink.rtn_quantizers(model, row.scheme, row.bits, run.group_size)
    if row.rule not in run.calibrated:
        same_rule = [r for r in run.config.rows if r.is_static and r.rule == row.rule]
        schemes = dict.fromkeys(r.scheme for r in same_rule)
        width = 8  # any: ranges do not depend on it
        by_scheme = {s: kvsink.rtn_quantizers(model, s, width, run.group_size) for s in schemes}
        calibrate(
            model,
            by_scheme.values(),
            calibration_windows(run),
            row.rule.with_site(run.site),
            run.options,
        )
        run.calibrated[row.rule] = by_scheme
    return kvsink.with_bits(run.calibrated[row.rule][row.scheme], row.bits)


def calibrate(model, schemes, windows, rule, options):
    """Calibrate the static quantizers of `schemes`, a list of lists, on windows (W, n): Algorithm 1
    with observers, eager."""
    observers = kvsink.observers(schemes)
    for _, H, step in batches(model, windows, options, "calibrating", options.eager_step):
        kvsink.prefill(model, H, observers, step=step, **rule.prefill_arguments(H))


def calibration_windows(run):
    """Return the windows (calib_windows, seq_len) of the training split."""
    config = run.config
    tokens = text.calibration_windows(
        run.tokenizer,
        config.calib_data,
        config.seq_len,
        config.calib_windows,
        config.seed,
        bos=config.bos,
    )
    text.check_vocabulary(tokens, run.model.config, config.model)
    return tokens


# --------------------------------------------------------------------------------------------------
# Rows that an earlier run has done


def result_settings(run, row):
    """Return all settings that the PPL of a row depends on: they identify a finished result. What
    `row_result` says of `compiled`, which is what happened, goes before what is said here."""
    config = run.config
    keep, N = options_of(row.rule)
    l_E, c = row.rule.with_site(run.site).site
    return {
        "model": config.model,
        "data": config.data,
        "seq_len": config.seq_len,
        "bos": config.bos,
        "group_size": run.group_size,
        "rope": config.rope,
        "seed": config.seed,
        "windows": len(run.tokens),
        "calib_windows": config.calib_windows if row.is_static else 0,
        "calib_data": config.calib_data if row.is_static else None,
        "scheme": row.scheme,
        "bits": row.bits,
        "keep": keep,
        "sinks": N,
        "l_E": l_E,
        "c": c,
        "dtype": config.machine.dtype,
        "device": config.machine.kind,
        "compiled": config.machine.compiles,
        "torch": torch.__version__,
        "weights": run.weights,
        "tokens": hashlib.sha256(run.tokens.numpy().tobytes()).hexdigest()[:16],
    }


def rows_with_results(run, old_results, settings_of=result_settings):
    """Yield each row with its result from an earlier run, or with None if it has to be measured.
    `settings_of(run, row)` are the settings that a result must have. Rank 0 decides which rows are
    measured; the other ranks see these rows only."""
    finished = {}
    for row in run.config.rows:
        settings = settings_of(run, row)
        for old in old_results:
            if settings.items() <= old.items():
                finished[row] = old
    to_measure = torch.tensor([row not in finished for row in run.config.rows])
    if dist.is_initialized():
        to_measure = to_measure.cuda() if dist.get_backend() == "nccl" else to_measure
        dist.broadcast(to_measure, src=0)
    for row, is_new in zip(run.config.rows, to_measure.tolist()):
        if is_new or is_first_rank():
            yield row, None if is_new else finished[row]


def unfinished_rows(run, old_results, settings_of=result_settings):
    """Return the rows that no earlier run has finished."""
    rows = rows_with_results(run, old_results, settings_of)
    return [row for row, result in rows if result is None]


def announce_streaming(run, rows, calibration):
    """Log an estimate of the memory and the time that streaming takes for these rows, if there are
    any. `calibration` holds the number of windows of each pass that calibrates for them."""
    if rows and is_first_rank():
        tokens = run.tokens[:: rank_and_world_size()[1]]  # the share of one rank
        stream.announce(run.model, tokens, [len(tokens)] * len(rows) + calibration)
