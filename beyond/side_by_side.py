"""transformers' own quantized caches and KVSinkCache on the same text: what they store, lose and
cost.

    python -m beyond.transformers_cache --model ID

Read top to bottom: what is measured of a cache; the table; the command.

What this file does not do: the caches are those of transformers and of
beyond/transformers_cache.py.
"""

import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from beyond.sites import head_dim, site_of
from paper.table4 import their_caches
from support import cli, hub, text
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# What is measured


def bytes_of(thing):
    """The bytes of all tensors in a part of transformers' cache, those inside a quantized tensor
    one by one."""
    if hasattr(thing, "__tensor_flatten__"):
        return sum(bytes_of(getattr(thing, part)) for part in thing.__tensor_flatten__()[0])
    if isinstance(thing, (tuple, dict)):
        return sum(map(bytes_of, thing.values() if isinstance(thing, dict) else thing))
    return thing.nbytes if isinstance(thing, torch.Tensor) else 0


def stored(cache):
    if hasattr(cache, "bytes"):
        return cache.bytes()[0]
    return sum(bytes_of(part) for layer in cache.layers for part in vars(layer).values())


def decoded(model, window, prompt, cache):
    """Log-probabilities (m, vocab) after each of the m tokens of a window (1, prompt + m) that are
    decoded one by one; the bytes that a token of the text took, mean over these steps, because
    transformers' caches hold up to 128 new tokens in full precision; and seconds a token. The
    prefill's own predictions do not count: in it, those caches return what came in."""
    cache.reset()
    model(window[:, :prompt], past_key_values=cache, logits_to_keep=1)
    p, size, seconds = [], 0, 0
    for n, token in enumerate(window[0, prompt:], start=prompt + 1):
        start = time.perf_counter()
        logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
        p.append(logits.float().log_softmax(-1))
        seconds += time.perf_counter() - start
        size += stored(cache) / n
    return torch.stack(p), size / len(p), seconds / len(p)


# --------------------------------------------------------------------------------------------------
# The table


def shape(model):
    """L, h_kv and d_k."""
    config = model.config.get_text_config(decoder=True)
    h_kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return config.num_hidden_layers, h_kv, head_dim(config)


def row(model, windows, prompt, cache, name, full):
    """Measures a cache on all windows, and prints it. `full` are full precision's predictions, none
    yet if this is it. Returns its predictions, and the bytes of a token."""
    with tqdm(windows.split(1), desc=name, unit="text", leave=False, disable=cli.bar_off()) as bar:
        found, sizes, seconds = zip(*(decoded(model, window, prompt, cache) for window in bar))
    kl = torch.stack(
        [
            F.kl_div(q, p, reduction="batchmean", log_target=True)
            for q, p in zip(found, full or found)
        ]
    )
    error = f" +- {kl.std() / len(kl) ** 0.5:.4f}" if len(kl) > 1 else ""
    L, h_kv, d_k = shape(model)
    size = sum(sizes) / len(sizes)
    bits = 8 * size / (2 * L * h_kv * d_k)
    loss = f"{kl.mean():.4f}{error}" if full else ""
    print(f"{name:<42}{bits:>12.2f}{loss:>21}{1 / min(seconds):>11.1f}", flush=True)
    return found, size


def table(model, windows, prompt, site):
    """Each of transformers' caches, and after it KVSinkCache with the finest groups that take no
    more bytes."""
    from beyond.transformers_cache import KVSinkCache, transformers

    print(f"{'cache':<42}{'stored bits':>12}{'KL, nats a token':>21}{'tokens / s':>11}")
    full, (_, _, d_k) = None, shape(model)
    for bits, what, cache in their_caches(transformers, model):
        backend = what.rpartition(" ")[2]
        name = f"transformers, {backend}, {bits} bits" if full else f"transformers, {what}"
        found, most = row(model, windows, prompt, cache, name, full)
        groups = [g for g in (16, 32, 64, 128) if d_k % min(g, d_k) == 0]
        for group_size in groups if full else ():
            ours = KVSinkCache(model, bits, group_size=group_size, site=site)
            if decoded(model, windows[:1], prompt, ours)[1] <= most:
                break
        if full:
            group_size = ours.ours[0].quantizers[0].group_size
            row(
                model,
                windows,
                prompt,
                ours,
                f"KVSinkCache, {bits} bits, groups of {group_size}",
                full,
            )
        full = full or found


# --------------------------------------------------------------------------------------------------
# The command


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(
        prog="python -m beyond.transformers_cache",
        description="transformers' own quantized caches (quanto and HQQ, where they are installed) and KVSinkCache side by\n"
        "side: the same model and text, and at most the same bytes.",
    )
    add = parser.add_argument_group("what to run").add_argument
    cli.add_model_options(add)
    add("--prompt", type=cli.number(2), default=1000, metavar="N", help="tokens of a prompt, packed Wikipedia articles "
        "(default: %(default)s)")
    add("--tokens", type=cli.number(1), default=100, metavar="M", help="tokens of the article that are decoded after it "
        "(default: %(default)s)")
    add("--windows", type=cli.number(1), default=4, help="such texts (default: %(default)s)")
    add = parser.add_argument_group("how to run it").add_argument
    cli.add_site_options(add)
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float16 on cuda, else float32)")
    args = parser.parse_args(argv)
    args.no_compile = True  # transformers' way
    return args
# fmt: on


def run(args):
    try:
        from beyond.transformers_cache import transformers
    except ImportError as error:
        raise ValueError(f"{error}") from None
    machine, directory = cli.machine(args), hub.model_directory(args.model)
    windows = text.windows(
        Tokenizer.from_pretrained(directory),
        text.PACKED,
        "test",
        args.prompt + args.tokens,
        args.windows,
        0,
    )
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=machine.torch_dtype)
    model = model.to(machine.device).eval()
    config = model.config.get_text_config(decoder=True)
    site = cli.chosen_site(args.layer, args.channel, config)
    site = site or hub.listed_site(args.model, config.num_hidden_layers, config.hidden_size)
    site = site or site_of(model.get_decoder())
    print(
        f"{args.model}, {args.windows} texts of packed articles: {args.prompt} tokens of prompt, {args.tokens} decoded"
    )
    table(model, windows.to(machine.device), args.prompt, site)


def main(argv=None):
    return cli.run_command(
        "beyond.transformers_cache", lambda: run(parse_arguments(argv)), "lower --prompt"
    )
