"""transformers' own quantized caches and KVSinkCache on the same texts: how much they store, how
far their predictions are from full precision's, how fast they decode, what memory they take.

    python -m beyond.transformers_cache --model ID

Read top to bottom: the table; what follows from it; what is measured of a cache; the command.

What this file does not do: the caches are those of transformers and of beyond/kvsink_cache.py;
check.py says whether keeping sinks matters for a model at all.
"""

import itertools
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from beyond import check
from beyond.kvsink_cache import KVSinkCache, transformers
from beyond.models import head_sizes
from beyond.options import ATTENTIONS
from beyond.sites import site_of
from kvsink import Site
from paper.table4 import peak_memory, reset_peak_memory, their_caches
from support import cli, hub, text
from support.cache import log
from support.machine import pick_machine
from support.report import mean_and_error
from support.rows import KEEPS
from support.site import listed_site
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Comparison:
    """A model of transformers, the texts on which caches are compared, and the settings of ours."""

    model: torch.nn.Module
    windows: torch.Tensor  # the token ids of the texts (W, prompt + m)
    prompt: int  # how many of them are the prompt; the other m are decoded one by one
    site: Site
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    keep: tuple[str, ...]
    attention: str = "dequantized"  # see KVSinkCache
    exact_prompt: bool = False


class Measured(NamedTuple):
    """The measurements of one cache."""

    name: str
    setting: tuple  # of ours: bits, group size, keep; of theirs: bits
    stored_bits: float  # per number, a mean over texts and steps
    kl: list  # of each text: the KL divergence from full precision, in nats per token


def print_table(comparison):
    """Measure all caches and print a row for each, and then what follows."""
    print(
        f"{'cache':<50}{'stored bits':>12}{'KL, nats per token':>21}{'decoded tokens/s':>18}"
        f"{'peak, MB':>10}{'kept':>6}"
    )
    caches = their_caches(transformers, comparison.model)
    _, name, cache = next(caches)
    full, _ = measure_cache(comparison, cache, f"transformers, {name}", (16,), None)
    theirs = []
    for bits, name, cache in caches:
        try:
            _, measured = measure_cache(comparison, cache, f"transformers, {name}", (bits,), full)
            theirs.append(measured)
        except ValueError as error:  # such as: its groups do not divide the prompt
            print(f"transformers, {name}: not run, {' '.join(str(error).split())}")
    ours = []
    settings = itertools.product(comparison.bits, comparison.group_sizes, comparison.keep)
    for bits, group_size, keep in settings:
        options = {
            "keep": keep,
            "site": comparison.site,
            "attention": comparison.attention,
            "exact_prompt": comparison.exact_prompt,
        }
        cache = KVSinkCache(comparison.model, bits, group_size=group_size, **options)
        name = f"KVSinkCache, {bits} bits, groups of {group_size}, keep={keep}"
        ours.append(measure_cache(comparison, cache, name, (bits, group_size, keep), full)[1])
        cache.close()
    print_conclusions(comparison, theirs, ours)


def measure_cache(comparison, cache, name, setting, full):
    """Measure a cache on all texts, and print its row. `full` is what full precision predicts for
    each text, None if this is full precision. Return what this one predicts, and its Measured.
    Peak memory is that of the process or the GPU, above what was in use before."""
    device = str(comparison.model.device)
    reset_peak_memory(device)
    before = peak_memory(device)
    decoded = [
        decode(comparison, window, cache) for window in progress(comparison.windows.split(1), name)
    ]
    predictions = [result.log_p for result in decoded]
    size = sum(result.bytes_per_token for result in decoded) / len(decoded)
    bits = 8 * size / numbers_per_token(cache)
    seconds = min(result.seconds_per_token for result in decoded)
    kept = sum(result.kept for result in decoded) / len(decoded)
    peak = f"{(peak_memory(device) - before) / 1e6:.0f}" if before else "-"
    kl = (
        [check.kl_divergence(log_q, log_p) for log_q, log_p in zip(predictions, full)]
        if full
        else []
    )
    print(
        f"{name:<50}{bits:>12.2f}{in_words(kl) if kl else '':>21}{1 / seconds:>18.1f}"
        f"{peak:>10}{f'{kept:.1f}' if kept else '':>6}",
        flush=True,
    )
    return predictions, Measured(name, setting, bits, kl)


def progress(windows, name):
    """Yield the windows, with a progress bar on a terminal, and a line for each anywhere else."""
    if sys.stderr.isatty():
        yield from tqdm(windows, desc=name, unit="text", leave=False)
        return
    for i, window in enumerate(windows, start=1):
        log(f"{name}: text {i} of {len(windows)}")
        yield window


def in_words(sample):
    mean, error = mean_and_error(sample)
    return f"{mean:.4f} +- {error:.4f}" if len(sample) > 1 else f"{mean:.4f}"


# --------------------------------------------------------------------------------------------------
# What follows from it


def print_conclusions(comparison, theirs, ours):
    """Say of each of their widths whether a cache of ours with the same or fewer stored bits is
    nearer to full precision than their best; and what the kept tokens gain."""
    print("\nDifferences of KL, paired over texts; resolved if over two standard errors:")
    for bits in sorted({cache.setting[0] for cache in theirs}, reverse=True):
        their_best = min((x for x in theirs if x.setting[0] == bits), key=mean_kl)
        small = [x for x in ours if x.stored_bits <= their_best.stored_bits]
        if not small:
            print(f"  no KVSinkCache here stores as few bits as {their_best.name}")
            continue
        our_best = min(small, key=mean_kl)
        print(
            f"  {our_best.name}\n    against {their_best.name}: {difference(our_best, their_best)}"
        )
    by_setting = {cache.setting: cache for cache in ours}
    first = comparison.keep[0]
    if "none" not in comparison.keep[1:]:
        return
    for bits, group_size in itertools.product(comparison.bits, comparison.group_sizes):
        kept = by_setting[bits, group_size, first]
        gain = difference(kept, by_setting[bits, group_size, "none"])
        print(f"  {bits} bits, groups of {group_size}: keep={first} against nothing kept: {gain}")


def mean_kl(cache):
    return sum(cache.kl) / len(cache.kl)


def difference(one, other):
    """Return, in words, how much lower one KL is than another."""
    mean, error = mean_and_error([b - a for a, b in zip(one.kl, other.kl)])
    if not abs(mean) > 2 * error:
        return f"not resolved ({mean:+.4f} +- {error:.4f})"
    return f"{'lower' if mean > 0 else 'higher'} by {abs(mean):.4f} +- {error:.4f}"


# --------------------------------------------------------------------------------------------------
# What is measured of a cache


class Decoded(NamedTuple):
    """The measurements on one text."""

    log_p: torch.Tensor  # log-probabilities (m, vocab) after each decoded token
    bytes_per_token: float
    seconds_per_token: float
    kept: int  # tokens, in the blocks after l_E


def decode(comparison, window, cache):
    """Decode the end of a window (1, prompt + m) token by token.

    The predictions after the prompt do not count, because the prompt's own attention reads what
    transformers' caches have not quantized yet. Bytes are a mean over the steps, because those
    caches hold up to 128 new tokens in full precision.
    """
    cache.reset()
    model = comparison.model
    prompt = comparison.prompt
    log_p = []
    size = 0
    seconds = 0
    with torch.no_grad():
        model(window[:, :prompt], past_key_values=cache, logits_to_keep=1)
        for n, token in enumerate(window[0, prompt:], start=prompt + 1):
            start = synchronized_time(window.device)
            logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
            log_p.append(logits.float().log_softmax(-1))
            seconds += synchronized_time(window.device) - start
            size += stored_bytes(cache) / n
    kept = len(cache.sinks()[0]) if isinstance(cache, KVSinkCache) else 0
    return Decoded(torch.stack(log_p), size / len(log_p), seconds / len(log_p), kept)


def synchronized_time(device):
    """Return the time in seconds, after a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stored_bytes(cache):
    """Return the bytes that a cache stores, transformers' or ours."""
    if hasattr(cache, "bytes"):
        return cache.bytes()[0]
    return sum(tensor_bytes(part) for layer in cache.layers for part in vars(layer).values())


def tensor_bytes(part):
    """Return the bytes of all tensors in an attribute of a layer of transformers' caches. A
    quantized tensor is several tensors."""
    if hasattr(part, "__tensor_flatten__"):
        names, _ = part.__tensor_flatten__()
        return sum(tensor_bytes(getattr(part, name)) for name in names)
    if isinstance(part, dict):
        part = tuple(part.values())
    if isinstance(part, tuple):
        return sum(map(tensor_bytes, part))
    return part.nbytes if isinstance(part, torch.Tensor) else 0


def numbers_per_token(cache):
    """Return how many numbers the Keys and Values of one token are, over all layers."""
    if isinstance(cache, KVSinkCache):
        return cache.bytes()[1] / 2 / cache.get_seq_length()
    layers = [layer for layer in cache.layers if layer.keys is not None]
    return sum(X.shape[1] * X.shape[3] for layer in layers for X in (layer.keys, layer.values))


# --------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    def work():
        args = parse_arguments(argv)
        comparison, tokenizer = load_comparison(args)
        if args.check:
            check.print_check(comparison.model, tokenizer, comparison.windows[:1], comparison.site)
            return
        texts = f"{len(comparison.windows)} texts of {args.data}"
        print(f"{args.model}, {texts}: {args.prompt} tokens of prompt, {args.tokens} decoded")
        l_E, c = comparison.site
        print(f"sinks predicted after block {l_E} (counted from 1) in channel {c}")
        print_table(comparison)

    return cli.run_command("beyond.transformers_cache", work, "lower --prompt")


def load_comparison(args):
    """Return the Comparison that the options ask for, and the tokenizer."""
    machine = pick_machine(args)
    directory = hub.model_directory(args.model)
    tokenizer = Tokenizer.from_pretrained(directory)
    seq_len = args.prompt + args.tokens
    windows = text.windows(
        tokenizer, args.data, "test", seq_len, args.windows, seed=0, advice="lower --prompt"
    )
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=machine.torch_dtype)
    model = model.to(machine.device).eval()
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    site = (
        cli.chosen_site(args.layer, args.channel, config)
        or listed_site(args.model, config.num_hidden_layers, config.hidden_size)
        or site_of(decoder)
    )
    head = min(head_sizes(decoder))
    group_sizes = [size for size in args.group_size or (16, 64) if head % size == 0]
    if args.group_size and not group_sizes:
        raise ValueError(f"no --group-size given divides a head of {head} channels")
    comparison = Comparison(
        model=model,
        windows=windows.to(machine.device),
        prompt=args.prompt,
        site=site,
        bits=tuple(args.bits),
        group_sizes=tuple(group_sizes) or (head,),
        keep=tuple(args.keep),
        attention=args.attention,
        exact_prompt=args.exact_prompt,
    )
    return comparison, tokenizer


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(
        prog="python -m beyond.transformers_cache",
        description="Compare transformers' own quantized caches (quanto and HQQ, if they are\n"
        "installed) with KVSinkCache: the same model, the same texts.",
    )
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--check", action="store_true", help="compare nothing; say where outliers emerge, which "
        "tokens of a text are sinks, and whether keeping them matters")
    add("--data", default=text.PACKED, help="wiki-sample, wikitext2, c4, or a UTF-8 text file "
        "(default: %(default)s)")
    add("--prompt", type=cli.number(2), default=512, metavar="N", help="tokens of a prompt "
        "(default: %(default)s)")
    add("--tokens", type=cli.number(1), default=48, metavar="M", help="tokens after the prompt, "
        "which are decoded (default: %(default)s)")
    add("--windows", type=cli.number(1), default=6, help="number of such texts (default: "
        "%(default)s)")
    add("--bits", nargs="+", type=cli.number(1, 8), default=[4, 3, 2], help="of KVSinkCache "
        "(default: 4 3 2)")
    add("--group-size", nargs="+", type=cli.number(1), help="of KVSinkCache; those that "
        "divide a head (default: 16 64)")
    add("--keep", nargs="+", choices=KEEPS, default=["pfn+kvsink", "none"], help="of KVSinkCache "
        "(default: pfn+kvsink none)")
    add("--attention", choices=ATTENTIONS, default=ATTENTIONS[0], help="how KVSinkCache decodes "
        "(default: %(default)s)")
    add("--exact-prompt", action="store_true", help="KVSinkCache's prompts read their Keys and "
        "Values before they are quantized, too, as those of the other caches do")
    add = parser.add_argument_group("how to run it").add_argument
    cli.add_site_options(add)
    cli.add_machine_options(add, compiler=False)
    parser.set_defaults(no_compile=True)
    return parser.parse_args(argv)
# fmt: on
