"""Text from a model with a packed KV cache.

    python -m paper.generate --prompt "The tallest mountain is" --bits 4
    python -m paper.generate --prompt ... --compare      full precision and all rules side by side

Read top to bottom: generating tokens, and choosing each; the distance to full precision; what a run
prints; loading it; the quantizers of its caches; the command.

What this file does not do: decode.py fills the cache and decodes with it, kvcache.py stores it. No
beam search, no chat templates.
"""

import itertools
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kvsink
from kvsink import AUTO, NOWHERE, Site
from llama import Llama, LlamaConfig
from paper import kvquant
from paper.decode import FUSE, decode, decode_block, most_kept, prefill
from paper.kvcache import KVCache, cache_bytes
from quant import NotFinite
from support import cli, evaluate, hub, text
from support.cache import format_bytes
from support.machine import Machine, free_memory, pick_machine
from support.report import mean_and_error
from support.rows import FULL_PRECISION, KEEPS, Row, expand_rows
from support.site import site_of
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# Generating


def generate_tokens(
    model, cache, logits, choose, *, max_new_tokens, stop_ids=(), step=decode_block
):
    """Yield the token ids of one sequence, from the logits (1, vocab) of `prefill`, until one of
    `stop_ids`. `choose` takes logits (vocab,) and returns a token id."""
    for i in range(max_new_tokens):
        token = choose(logits[0])
        yield token
        if token in stop_ids or i == max_new_tokens - 1:
            return
        logits = decode(model, cache, torch.tensor([token], device=logits.device), step)


@dataclass(frozen=True)
class SamplingParams:
    max_new_tokens: int
    temperature: float  # 0 takes the likeliest token
    top_p: float
    seed: int


def sampler(params):
    """Return a function that samples a token id from logits (vocab,). Two of the same
    SamplingParams draw the same random numbers."""
    draw = torch.Generator().manual_seed(params.seed)
    return lambda logits: sample(logits, params.temperature, params.top_p, draw)


def sample(logits, temperature, top_p, draw):
    """Return a token id from logits (vocab,): the likeliest at temperature 0, else one drawn from
    the smallest set of likeliest tokens whose probabilities add up to `top_p`. Raises NotFinite if
    a logit is NaN or inf."""
    if not logits.isfinite().all():
        raise NotFinite("NaN or inf in the logits: is --dtype wide enough?")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu()
    p, tokens = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the likelier tokens alone reach top_p
    return int(tokens[torch.multinomial(p, 1, generator=draw)])


# --------------------------------------------------------------------------------------------------
# The distance to full precision


def kl_divergence(model, cache, logits, tokens, reference, *, step=decode_block):
    """Return, for each of m `tokens`, the KL divergence of this cache's prediction from full
    precision's, in nats, and whether both rank the same token first: two lists.
    `reference` holds full precision's m logits (vocab,); `logits` (1, vocab) are `prefill`'s."""
    kl = []
    agree = []
    for i, expected in enumerate(reference):
        if i:
            logits = decode(model, cache, torch.tensor([tokens[i - 1]], device=logits.device), step)
        p = expected.float().log_softmax(-1)
        q = logits[0].float().log_softmax(-1)
        kl.append(F.kl_div(q, p, reduction="sum", log_target=True).item())
        agree.append(bool(p.argmax() == q.argmax()))
    return kl, agree


# --------------------------------------------------------------------------------------------------
# A run, and what it prints


@dataclass(frozen=True)
class CacheConfig:
    """The caches of a run: how they quantize, and the text on which static ranges and KVQuant are
    calibrated."""

    rows: tuple[Row, ...]  # each has a cache of its own
    group_size: int
    pre_rope: bool
    calib_text: str
    calib_windows: int
    calib_tokens: int  # per window

    @property
    def is_calibrated(self):
        return any(row.is_static or row.scheme == "kvquant" for row in self.rows)


@dataclass(frozen=True)
class GenerateConfig:
    """A prompt, the model that continues it, and its caches. If their first row is full precision,
    the rows are compared."""

    model: str
    prompt: str
    sampling: SamplingParams
    caches: CacheConfig
    machine: Machine = Machine()
    layer: int | None = None  # None: Table 3's, else the finder's
    channel: int | None = None


@dataclass(frozen=True)
class TextRun:
    """A GenerateConfig with all that its rows need, loaded."""

    config: GenerateConfig
    model: Llama
    tokenizer: Tokenizer
    prompt: list[int]  # token ids
    n: int  # slots of a cache
    site: Site
    quantizers: dict  # row -> the quantizers of its cache
    step: Callable  # decode_block, eager or compiled

    def prefill(self, row):
        """Return the cache of a row, filled with the prompt, and the logits (1, vocab)."""
        cache = KVCache(
            self.model,
            self.quantizers[row],
            self.n,
            k=most_kept(row.rule, len(self.prompt)),
            pre_rope=self.config.caches.pre_rope,
        )
        return cache, prefill(self.model, cache, [self.prompt], row.rule.with_site(self.site))

    def generate(self, cache, logits, choose):
        return generate_tokens(
            self.model,
            cache,
            logits,
            choose,
            max_new_tokens=self.config.sampling.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            step=self.step,
        )


def print_text(run, row):
    """Print the text as it is generated; then how fast that was, the size of the cache, and which
    tokens were kept."""
    if run.step is not decode_block:
        message = "compiling with the second token, up to half a minute the first time"
        print(message, file=sys.stderr)
    start = time.perf_counter()
    cache, logits = run.prefill(row)
    tokens = list(run.prompt)
    if tokens[0] == run.tokenizer.bos:  # it has no text
        del tokens[0]
    times = []
    printed = ""
    for token in run.generate(cache, logits, sampler(run.config.sampling)):
        tokens.append(token)
        times.append(time.perf_counter())
        decoded = run.tokenizer.decode(tokens)
        if not decoded.endswith("\ufffd"):  # a character of several tokens waits for its last
            print(decoded[len(printed) :], end="", flush=True)
            printed = decoded
    print(run.tokenizer.decode(tokens)[len(printed) :] + "\n")
    speed = ""
    if len(times) > 2:  # the first step compiles, so it is not counted
        speed = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens per second"
    prefill_time = f"prompt of {len(run.prompt)} tokens in {times[0] - start:.2f} s"
    print(f"{row}: {prefill_time}, {len(times)} new ones{speed}")
    print_calibration(run.config.caches)
    print_cache(run, row, cache)


def print_cache(run, row, cache):
    """Print the bytes of a cache, and the tokens that it keeps after block l_E."""
    size = cache.bytes()
    fp16 = cache_bytes(run.model.config, cache.n, 16)
    share = f"{100 * size / fp16:.1f} % of the {fp16:,.0f} of fp16"
    print(f"cache for {cache.n} tokens: {size:,} bytes, {share}")
    if row.rule.max_kept:
        slots = [slot for slot in cache.blocks[-1].kept[0].tolist() if slot < cache.n]
        kept = [f"{slot} {run.tokenizer.decode([run.prompt[slot]])!r}" for slot in slots]
        print(f"kept: {', '.join(kept) or 'nothing'}")


def print_comparison(run):
    """Print the text of each row, side by side, and how far its predictions are from full
    precision's along the text of full precision, which is the first row."""
    rows = run.config.caches.rows
    width = max(20, shutil.get_terminal_size((120, 0)).columns // len(rows) - 2)
    columns = []
    reference = []  # the predictions of full precision, logits (vocab,)
    for row in tqdm(rows, desc="comparing", unit="cache", leave=False, disable=None):
        predictions = []
        tokens = list(run.generate(*run.prefill(row), recording_sampler(run, predictions)))
        if row == FULL_PRECISION:
            reference = predictions
            full_tokens = tokens
            heading = ["full precision", "KL 0", "same 100 %"]
        else:
            cache, logits = run.prefill(row)
            kl, agree = kl_divergence(
                run.model, cache, logits, full_tokens, reference, step=run.step
            )
            mean, error = mean_and_error(kl)
            heading = [
                f"{row.rule} kept",
                f"KL {mean:.4f} +- {error:.4f}",
                f"same {100 * sum(agree) / len(agree):.0f} %",
            ]
        columns.append([*heading, "", *textwrap.wrap(run.tokenizer.decode(tokens), width)])
    for line in itertools.zip_longest(*columns, fillvalue=""):
        print("  ".join(f"{cell:<{width}}" for cell in line).rstrip())
    print(
        f"\n{rows[1].scheme_name}, {rows[1].bits} bits; along full precision's text, KL: "
        "divergence from its predictions, nats per token, and the standard error over tokens; "
        "same: the share of tokens after which both find the same token the likeliest"
    )
    print_calibration(run.config.caches)


def print_calibration(caches):
    """Print on what the caches were calibrated, if they were."""
    if caches.is_calibrated:
        calibration = (caches.calib_text, caches.calib_windows, caches.calib_tokens)
        print(text.describe_calibration(*calibration))


def recording_sampler(run, predictions):
    """Return a sampler that appends the logits it is given to the list `predictions`."""
    choose = sampler(run.config.sampling)

    def record_and_choose(logits):
        predictions.append(logits)
        return choose(logits)

    return record_and_choose


# --------------------------------------------------------------------------------------------------
# Loading it


def load_run(config):
    """Return the TextRun of a GenerateConfig. What can be checked is checked before weights are
    read. Raises OSError or ValueError."""
    directory = hub.model_directory(config.model)
    model_config = LlamaConfig.from_pretrained(directory)
    prompt = Tokenizer.from_pretrained(directory).encode(config.prompt)
    if not prompt:
        raise ValueError("no character of the prompt is in the model's vocabulary")
    text.check_vocabulary(torch.tensor(prompt), model_config, directory)
    site = cli.chosen_site(config.layer, config.channel, model_config)
    config = replace(config, caches=fit_to_model(config.caches, model_config))
    check_against_model(config, prompt, model_config)
    n = count_slots(config, prompt, model_config)
    check_memory(config, n, model_config)
    loaded = evaluate.load_model(config.model, config.machine)
    if site is None and any(row.rule.predicts for row in config.caches.rows):
        site = site_of(loaded.model, loaded.tokenizer, config.model, directory)
    site = site or NOWHERE
    return TextRun(
        config=config,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        prompt=prompt,
        n=n,
        site=site,
        quantizers=quantizers(config.caches, loaded, site),
        step=config.machine.compiled(decode_block, **FUSE),
    )


def fit_to_model(caches, model_config):
    """Return a CacheConfig with groups no wider than a head and windows no longer than the model's
    context. Raises ValueError if groups do not divide a head."""
    group_size = cli.clamp_group_size(caches.group_size, model_config.head_dim)
    calib_tokens = min(caches.calib_tokens, model_config.max_position_embeddings)
    return replace(caches, group_size=group_size, calib_tokens=calib_tokens)


def check_against_model(config, prompt, model_config):
    """Raise ValueError if the prompt and the new tokens exceed the context, or the rules keep more
    tokens than the prompt or a calibration window has."""
    rows = config.caches.rows
    count = config.sampling.max_new_tokens
    context = model_config.max_position_embeddings
    if len(prompt) + count > context:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {count} new ones exceed the model's context, "
            f"{context}: shorten the prompt or lower --max-new-tokens"
        )
    most = max(most_kept(row.rule, len(prompt)) for row in rows)
    if most > len(prompt):
        raise ValueError(
            f"the prompt has {len(prompt)} tokens: lower --sinks {most}, or give a longer prompt"
        )
    most = max(row.rule.max_kept for row in rows)
    if config.caches.is_calibrated and most > config.caches.calib_tokens - 2:
        raise ValueError(
            f"--sinks {most}: calibration has windows of {config.caches.calib_tokens} tokens, too "
            "few to keep so many"
        )


def count_slots(config, prompt, model_config):
    """Return how many slots a cache gets: a multiple of 256, so that code that was compiled for one
    prompt serves the next."""
    n = len(prompt) + config.sampling.max_new_tokens
    return min(-(-n // 256) * 256, model_config.max_position_embeddings)


def check_memory(config, n, model_config):
    """Raise ValueError if a cache of n slots does not fit in the memory that is free."""
    device = config.machine.device
    full_bits = 8 * config.machine.torch_dtype.itemsize
    bits = max(full_bits if row == FULL_PRECISION else row.bits for row in config.caches.rows)
    needed = cache_bytes(model_config, n, bits)
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"a cache of {n} tokens takes {format_bytes(needed)}, and {format_bytes(free)} are "
            f"free on {device}: lower --max-new-tokens or --bits"
        )


# --------------------------------------------------------------------------------------------------
# The quantizers of its caches


def quantizers(caches, loaded, site):
    """Return row -> the quantizers of its Keys and Values in each block, calibrated if need be, for
    a CacheConfig and a model. Calibration always has seed 0, so that texts of all seeds come from
    the same quantizers."""
    model = loaded.model
    calibrations = kvquant_calibrations(caches, loaded, site)
    if any(row.is_static for row in caches.rows):
        windows = text.calibration_windows(
            loaded.tokenizer, caches.calib_text, caches.calib_tokens, caches.calib_windows, seed=0
        )
    options = evaluate.run_options(Machine(), "pre" if caches.pre_rope else "post")  # eager
    quantizers = {}
    for row in caches.rows:
        if row == FULL_PRECISION:
            cache = kvsink.full_precision_quantizers(model)
        elif row.scheme == "kvquant":
            calibration = calibrations[kvquant.Recipe(row.rule, row.rho)]
            cache = kvquant.kvquant_quantizers(calibration, row.rho, row.bits)
        else:
            cache = kvsink.rtn_quantizers(model, row.scheme, row.bits, caches.group_size)
        if row.is_static:
            evaluate.calibrate(model, [cache], windows, row.rule.with_site(site), options)
        quantizers[row] = cache
    return quantizers


def kvquant_calibrations(caches, loaded, site):
    """Return recipe -> Calibration for the KVQuant rows."""
    recipes = [kvquant.Recipe(r.rule, r.rho) for r in caches.rows if r.scheme == "kvquant"]
    if not recipes:
        return {}
    config = kvquant.CalibrationConfig(
        recipes=recipes,
        site=site,
        weights=hub.fingerprint(loaded.directory),
        data=caches.calib_text,
        windows=caches.calib_windows,
        tokens=caches.calib_tokens,
        seed=0,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
    )
    return kvquant.load_or_calibrate(loaded.model, loaded.tokenizer, config)


# --------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    def work():
        generate_text(generate_config(parse_arguments(argv)))

    return cli.run_command("paper.generate", work, "lower --max-new-tokens or --bits")


def generate_text(config):
    """Print a text or, if the first row is full precision, one of each row side by side."""
    run = load_run(config)
    first_row = config.caches.rows[0]
    if first_row == FULL_PRECISION:
        print(f"{config.prompt}\n")
        print_comparison(run)
    else:
        print_text(run, first_row)


def generate_config(args):
    """Return the GenerateConfig of the options. Raises ValueError if they contradict each other."""
    check_options(args)
    is_default = args.model == hub.DEFAULT_MODEL
    calib_tokens = 1024 if is_default else 4096
    if args.scheme == "kvquant":
        calib_tokens = min(calib_tokens, 2048)  # KVQuant's own paper uses 2,048
    caches = CacheConfig(
        rows=chosen_rows(args),
        group_size=args.group_size,
        pre_rope=args.rope == "pre" or args.scheme == "kvquant",
        calib_text=text.PACKED if is_default else "wikitext2",
        calib_windows=4 if is_default and args.scheme != "kvquant" else 16,
        calib_tokens=calib_tokens,
    )
    return GenerateConfig(
        model=args.model,
        prompt=args.prompt,
        sampling=SamplingParams(args.max_new_tokens, args.temperature, args.top_p, args.seed),
        caches=caches,
        machine=pick_machine(args),
        layer=args.layer,
        channel=args.channel,
    )


def check_options(args):
    """Raise ValueError if the options contradict each other."""
    if not args.prompt.strip():
        raise ValueError("the prompt is empty: give --prompt some text")
    is_temperature = args.temperature == 0 or 1e-6 <= args.temperature <= 1e6  # NaN fails
    if not (is_temperature and 1e-6 <= args.top_p <= 1):
        raise ValueError("--temperature is 0 or from 1e-6 to 1e6, and --top-p from 1e-6 to 1")
    if args.outliers and args.scheme != "kvquant":
        raise ValueError("--outliers is for --scheme kvquant")
    if args.scheme == "kvquant" and args.bits not in (2, 3, 4):
        raise ValueError("--scheme kvquant has 2, 3 and 4 bits")


def chosen_rows(args):
    """Return the row of the options or, to compare, full precision and a row for each rule."""
    rows = [FULL_PRECISION] if args.compare else []
    for keep in KEEPS if args.compare else [args.keep]:
        N = args.sinks or AUTO
        if keep == "pfn" and N == AUTO and (args.compare or not args.sinks):
            N = 5  # PFN cannot find N itself
        rows += expand_rows([(args.scheme, args.bits, args.outliers)], [keep], [N])
    return tuple(rows)


# fmt: off
def parse_arguments(argv):
    """Return the options. Raises ValueError, in one line, if they are invalid."""
    parser = cli.Parser(
        prog="python -m paper.generate",
        description="Text from a LLaMA-type model with a packed KV cache. The first N tokens of\n"
        "the prompt (PFN), or its N predicted attention sinks (KVSink), stay in full precision.\n"
        "The defaults are not the paper's, but the best that were measured (docs/results.md).",
    )
    add = parser.add_argument_group("the text").add_argument
    add("--prompt", default="The tallest mountain on Earth is", help="the beginning of the text "
        "(default: %(default)s)")
    add("--max-new-tokens", type=cli.number(1), default=100, metavar="N",
        help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: "
        "%(default)s)")
    add("--top-p", type=float, default=0.9, help="sample from the likeliest tokens whose "
        "probabilities add up to this (default: %(default)s)")
    add("--seed", type=cli.number(0, 2**63 - 1), default=0, help="(default: %(default)s)")
    add("--compare", action="store_true", help="full precision and all rules of preservation, side "
        "by side")
    add = parser.add_argument_group("the cache").add_argument
    add("--bits", type=int, choices=(1, 2, 3, 4, 8), default=4, help="bits per number (default: "
        "%(default)s)")
    add("--scheme", choices=[*kvsink.SCHEMES, "kvquant"], default="channel-dynamic", help="as in "
        "eval_ppl.py; static ranges and kvquant calibrate first (default: %(default)s)")
    add("--keep", choices=KEEPS, default="pfn+kvsink", help="which tokens to keep, as in "
        "eval_ppl.py (default: %(default)s)")
    add("--sinks", type=cli.number_or_auto(1), metavar="N", help="how many of them; auto keeps as "
        "many as stand out, at most 20 (default: auto, or 5 with --keep pfn)")
    add("--outliers", type=cli.fraction, default=0.0, metavar="RHO", help="KVQuant: the fraction "
        "of the numbers that is stored apart, in 16 bits (default: %(default)s)")
    add("--group-size", type=cli.number(1), default=128, help="channels (with channel-dynamic: "
        "tokens) that share a scale (default: 128, at most a head)")
    add("--rope", choices=["post", "pre"], default="post", help="store Keys after or before RoPE; "
        "KVQuant always stores them before it (default: post)")
    add = parser.add_argument_group("how to run it").add_argument
    cli.add_model_options(add)
    cli.add_site_options(add)
    cli.add_machine_options(add)
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    cli.exit_process(main())
