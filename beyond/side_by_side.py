"""transformers' own quantized caches and KVSinkCache on the same text: how much they store, how far
their predictions are from full precision's, and how fast they decode.

    python -m beyond.transformers_cache --model ID

Read top to bottom: the table; what is measured of a cache; the command.

What this file does not do: the caches are those of transformers and of beyond/kvsink_cache.py.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from beyond.kvsink_cache import KVSinkCache, transformers  # its version is checked there
from beyond.sites import head_dim, site_of
from kvsink import Site
from paper.table4 import their_caches
from support import cli, hub, text
from support.machine import no_progress_bar, pick_machine
from support.site import listed_site
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Comparison:
    """A model of transformers, and the texts on which caches are compared."""

    model: torch.nn.Module
    windows: torch.Tensor  # the token ids of the texts (W, prompt + m)
    prompt: int  # how many of them are the prompt; the other m are decoded one by one
    site: Site


def print_table(comparison):
    """Compare each of transformers' caches with the KVSinkCache that has the finest groups and
    takes no more bytes."""
    print(f"{'cache':<42}{'stored bits':>12}{'KL, nats per token':>21}{'tokens / s':>11}")
    full = None  # what full precision, the first cache, predicts
    for bits, description, cache in their_caches(transformers, comparison.model):
        if full is None:
            name = f"transformers, {description}"
            full, _ = measure_cache(comparison, cache, name, full)
            continue
        backend = description.rpartition(" ")[2]
        name = f"transformers, {backend}, {bits} bits"
        _, most_bytes = measure_cache(comparison, cache, name, full)
        ours = finest_cache(comparison, bits, most_bytes)
        name = f"KVSinkCache, {bits} bits, groups of {ours.group_size}"
        measure_cache(comparison, ours, name, full)


def measure_cache(comparison, cache, name, full):
    """Measure a cache on all texts, and print its row. `full` is what full precision predicts, None
    if this is full precision. Return the predictions for each text, and the bytes per token."""
    windows = comparison.windows.split(1)
    with tqdm(windows, desc=name, unit="text", leave=False, disable=no_progress_bar()) as bar:
        decoded = [decode(comparison, window, cache) for window in bar]
    predictions = [result.log_p for result in decoded]
    size = sum(result.bytes_per_token for result in decoded) / len(decoded)
    bits = 8 * size / numbers_per_token(comparison.model.config)
    tokens_per_second = 1 / min(result.seconds_per_token for result in decoded)
    kl = kl_divergence(predictions, full) if full else ""
    print(f"{name:<42}{bits:>12.2f}{kl:>21}{tokens_per_second:>11.1f}", flush=True)
    return predictions, size


def finest_cache(comparison, bits, most_bytes):
    """Return the KVSinkCache with the smallest groups that takes at most `most_bytes` per token on
    the first text, or the one with the largest groups if all take more. If no group of 16 or more
    channels divides a head, it has the group size that KVSinkCache chooses."""
    d_k = head_dim(text_config(comparison.model.config))
    sizes = [size for size in (16, 32, 64, 128) if d_k % min(size, d_k) == 0]
    for group_size in sizes or [None]:
        cache = KVSinkCache(comparison.model, bits, group_size=group_size, site=comparison.site)
        if decode(comparison, comparison.windows[:1], cache).bytes_per_token <= most_bytes:
            break
    return cache


def kl_divergence(predictions, full):
    """Return, in words, the KL divergence from full precision's predictions, the mean over texts
    and its standard error."""
    kl = torch.stack(
        [
            F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            for log_q, log_p in zip(predictions, full)
        ]
    )
    error = f" +- {kl.std() / len(kl) ** 0.5:.4f}" if len(kl) > 1 else ""
    return f"{kl.mean():.4f}{error}"


# --------------------------------------------------------------------------------------------------
# What is measured of a cache


class Decoded(NamedTuple):
    """The measurements on one text."""

    log_p: torch.Tensor  # log-probabilities (m, vocab) after each decoded token
    bytes_per_token: float
    seconds_per_token: float


def decode(comparison, window, cache):
    """Decode the end of a window (1, prompt + m) token by token.

    The predictions after the prompt do not count, because the prompt's own attention reads what
    transformers' caches have not quantized yet. Bytes are a mean over the steps, because those
    caches hold up to 128 new tokens in full precision.
    """
    cache.reset()
    model = comparison.model
    prompt = comparison.prompt
    model(window[:, :prompt], past_key_values=cache, logits_to_keep=1)
    log_p = []
    size = 0
    seconds = 0
    for n, token in enumerate(window[0, prompt:], start=prompt + 1):
        start = synchronized_time(window.device)
        logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
        log_p.append(logits.float().log_softmax(-1))
        seconds += synchronized_time(window.device) - start
        size += stored_bytes(cache) / n
    return Decoded(torch.stack(log_p), size / len(log_p), seconds / len(log_p))


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


def text_config(config):
    """Return the configuration of the part of a model that reads text."""
    return config.get_text_config(decoder=True)


def numbers_per_token(config):
    """Return how many numbers the Keys and Values of one token are, over all blocks."""
    config = text_config(config)
    h_kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return 2 * config.num_hidden_layers * h_kv * head_dim(config)


# --------------------------------------------------------------------------------------------------
# The command


def main(argv=None):
    def work():
        args = parse_arguments(argv)
        comparison = load_comparison(args)
        texts = f"{args.windows} texts of packed articles"
        print(f"{args.model}, {texts}: {args.prompt} tokens of prompt, {args.tokens} decoded")
        print_table(comparison)

    return cli.run_command("beyond.transformers_cache", work, "lower --prompt")


def load_comparison(args):
    """Return the Comparison that the options ask for."""
    machine = pick_machine(args)
    directory = hub.model_directory(args.model)
    tokenizer = Tokenizer.from_pretrained(directory)
    seq_len = args.prompt + args.tokens
    windows = text.windows(tokenizer, text.PACKED, "test", seq_len, args.windows, seed=0)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=machine.torch_dtype)
    model = model.to(machine.device).eval()
    config = text_config(model.config)
    site = (
        cli.chosen_site(args.layer, args.channel, config)
        or listed_site(args.model, config.num_hidden_layers, config.hidden_size)
        or site_of(model.get_decoder())
    )
    return Comparison(model, windows.to(machine.device), args.prompt, site)


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(
        prog="python -m beyond.transformers_cache",
        description="Compare transformers' own quantized caches (quanto and HQQ, if they are\n"
        "installed) with KVSinkCache: the same model, the same texts, and at most the same bytes.",
    )
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--prompt", type=cli.number(2), default=1000, metavar="N", help="tokens of packed "
        "Wikipedia articles in a prompt (default: %(default)s)")
    add("--tokens", type=cli.number(1), default=100, metavar="M", help="tokens after the prompt, "
        "which are decoded (default: %(default)s)")
    add("--windows", type=cli.number(1), default=4, help="number of such texts (default: "
        "%(default)s)")
    add = parser.add_argument_group("how to run it").add_argument
    cli.add_site_options(add)
    cli.add_machine_options(add, compiler=False)
    parser.set_defaults(no_compile=True)
    return parser.parse_args(argv)
# fmt: on
