"""Prefill, then decode, from a KV cache that is really small (Equations 5 and 6).

    python -m paper.generate --prompt "The tallest mountain is" --bits 4
    python -m paper.generate --prompt ... --compare      full precision and all rules of preservation side by side

Read top to bottom: prefill, which is Algorithm 1 filling a cache; decoding, which is attention of
one query over packed codes; sampling; the distance to full precision; the quantizers of a run; what
it prints; the command.

What this file does not do: kvcache.py says how a cache stores things. No beam search, no chat
templates.

Shapes as in kvcache.py: b sequences, n tokens of room, G query heads share a Key/Value head.
"""

import functools
import itertools
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kvsink
from llama import Llama, LlamaConfig, apply_rope
from paper import kvquant
from paper.kvcache import FullPrecisionStore, KVCache, cache_bytes, pieces
from quant import NotFinite
from support import cli, hub, results, text
from support.cache import log
from support.results import FULL_PRECISION, Row, expand_rows
from support.run import How, calibrated
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# Prefill

NOWHERE = kvsink.Site(0, 0)  # where nothing is predicted


def prefill(model, cache, prompts, keep="none", N=0, site=NOWHERE, step=kvsink.decoder_block):
    """Algorithm 1 for each prompt, a list of token ids, while the cache is filled. Returns logits
    (b, vocab) for the token after each. Prompts run one by one: if they were padded to one length,
    padding could be predicted as a sink. `step` is eager or compiled; compiled code is made for one
    length of prompt.

    Raises ValueError for an empty prompt, one longer than the cache, one of fewer tokens than the
    cache keeps, and where the cache's k is not as many tokens as may be kept.
    """
    logits = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) > cache.n:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and the cache was made for {cache.n}"
            )
        if cache.k > len(prompt):
            raise ValueError(f"cannot keep {cache.k} of {len(prompt)} tokens")
        if keep != "none" and (most := most_kept(N, len(prompt))) != cache.k:
            raise ValueError(
                f"cannot keep {most} tokens in a cache that was made to keep {cache.k}"
            )
        H = model.embedding(torch.tensor([prompt], device=cache.at.device))
        rows = torch.tensor([[i]], device=cache.at.device)
        storing_quantizers = [block_cache.storing_quantizers(rows) for block_cache in cache.blocks]
        rule = kvsink.preservation(keep, N, site, H)
        H, _ = kvsink.prefill(
            model, H, storing_quantizers, pre_rope=cache.blocks[0].pre_rope, step=step, **rule
        )
        logits.append(model.logits(H[:, -1]))
        cache.lengths[i] = cache.at[i] = len(prompt)
    return torch.cat(logits)


def most_kept(N, n):
    """How many of a prompt's n tokens may be kept."""
    return min(kvsink.MAX_AUTO_SINKS, n) if N == kvsink.AUTO else N


# --------------------------------------------------------------------------------------------------
# Decoding: Eq. 5 makes the Query, Key and Value of the new token, Eq. 6 appends them to the cache


# How torch.compile compiles `decode_block`. With its own limits, Inductor would write the unpacked
# Keys and Values to memory, because all G queries read them: without limits, it computes everything
# where it is read. A scale stored in 16 bits has to be rounded before codes are made with it;
# without emulated casts, Inductor skips that. Not dynamic: each n has code of its own.
FUSE = {
    "dynamic": False,
    "options": {f"realize_{what}_threshold": 1000 for what in ("opcount", "reads", "acc_reads")}
    | {"emulate_precision_casts": True},
}


def decode_block(block, H, cache, at, rope):
    """Algorithm 1, lines 6-13, for one token of each sequence, in slot `at` (b, 1): H^{l-1} -> H^l,
    both (b, 1, d). Needs `cache.make_room()` before."""
    Q, K, V = block.QKV(block.LN_mhsa(H))  # (b, h, 1, d_k), twice (b, h_kv, 1, d_k)
    turn = [table[at][:, None] for table in rope]  # (b, 1, 1, d_k)
    Q, K = apply_rope(Q, turn), K if cache.pre_rope else apply_rope(K, turn)
    rows = torch.arange(len(H), device=H.device)[:, None]
    cache.K.append(rows, at, K)
    cache.V.append(rows, at, V)
    H = block.W_o(attention(Q, cache, at, rope, block.sliding_window)) + H
    return block.FFN(block.LN_ffn(H)) + H


def attention(Q, cache, at, rope, sliding_window=None):
    """Eq. 3 for one query of each sequence, (b, h, 1, d_k), over all that is in the cache: (b, 1, h
    d_k)."""
    (b, h, _, d_k), n = Q.shape, cache.n
    slot = torch.arange(n + 1, device=Q.device)
    unseen = (slot > at) | (slot <= at - (sliding_window or n))  # (b, n + 1)
    if isinstance(cache.K, FullPrecisionStore):
        Q = Q.view(
            b, -1, h // cache.K.X.shape[1], d_k
        )  # the G queries that share a Key, as if they were tokens
        A = F.scaled_dot_product_attention(
            Q, cache.K.X, cache.V.X, attn_mask=~unseen[:, None, None, :n]
        )
        return A.reshape(b, 1, h * d_k)
    h_kv, rope = cache.K.codes.shape[1], rope if cache.pre_rope else None
    q = Q.float().view(b, h_kv, h // h_kv, d_k) * d_k**-0.5
    # Kept tokens come from their side buffer. Unused slots of it hold n, one past the end, which is
    # unseen.
    K = (
        cache.kept_K
        if rope is None
        else apply_rope(cache.kept_K, [table[cache.kept][:, None] for table in rope])
    )
    S_kept = (q @ K.float().mT).masked_fill(
        unseen.gather(1, cache.kept)[:, None, None], -torch.inf
    )  # (b, h_kv, G, k)
    apart = unseen.scatter(1, cache.kept, True)[:, None, :n]
    # Softmax by hand, one query at a time: the scores are written once, and read once for their
    # maximum.
    P, P_kept = [], []
    for S_g, S_kept_g in zip(
        cache.K.scores(q, rope and [table[:n] for table in rope], at), S_kept.unbind(2)
    ):
        S_g = S_g.masked_fill(apart, -torch.inf)  # (b, h_kv, n)
        m = torch.cat((S_g.amax(-1, keepdim=True), S_kept_g), dim=-1).amax(-1, keepdim=True)
        P.append((S_g - m).exp())
        P_kept.append((S_kept_g - m).exp())
    P, P_kept = torch.stack(P, dim=2), torch.stack(P_kept, dim=2)
    Z = pieces(P, 3).sum(4).sum(3) + P_kept.sum(3)  # (b, h_kv, G)
    A = (cache.V.weighted_sum(P) + P_kept @ cache.kept_V.float()) / Z[..., None]
    return A.to(Q.dtype).view(b, 1, h * d_k)


def decode(model, cache, tokens, step=decode_block):
    """The next token of each sequence (b,) -> logits (b, vocab) for the one after it. `step` is
    eager or compiled. On a CUDA device all of it is one graph, unless the cache has outliers.
    Raises ValueError where a sequence has no room left."""
    if max(cache.lengths) >= cache.n:
        raise ValueError(f"the cache was made for {cache.n} tokens and is full")
    for block_cache in cache.blocks:
        block_cache.make_room()
    if cache.at.is_cuda:
        cache.replay = cache.replay or capture_cuda_graph(model, cache, step)
        logits = cache.replay(tokens)
    else:
        logits = decode_step(model, cache, step, tokens)
    cache.lengths = [length + 1 for length in cache.lengths]
    cache.finish_groups()
    return logits


def decode_step(model, cache, step, tokens):
    """A step's work on the device."""
    H = model.embedding(tokens[:, None])  # (b, 1, d)
    for block, block_cache in zip(model.blocks, cache.blocks):
        H = step(block, H, block_cache, cache.at, cache.rope)
    cache.at += 1
    return model.logits(H[:, 0])


def capture_cuda_graph(model, cache, step):
    """`decode_step` as one CUDA graph: some forty launches a block become one a token. A graph
    repeats the same work on the same addresses. So caches have their full size from the start, and
    `at` lies on the device. KVQuant's outliers grow: a cache with outliers is not captured."""
    work, at = functools.partial(decode_step, model, cache, step), cache.at.clone()
    if any(store.outliers is not None for block in cache.blocks for store in (block.K, block.V)):
        return work
    tokens, stream = torch.zeros_like(at[:, 0]), torch.cuda.Stream(at.device)
    stream.wait_stream(torch.cuda.current_stream(at.device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and writes into the slot that the first replay writes again
            work(tokens)
            cache.at.copy_(at)
    torch.cuda.current_stream(at.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            logits = work(tokens)
    except RuntimeError as error:
        cache.at.copy_(at)
        log(
            f"decoding without a CUDA graph, which could not be captured: {str(error).splitlines()[0]}"
        )
        return work

    def replay(new_tokens):
        tokens.copy_(new_tokens)
        graph.replay()
        return logits.clone()

    return replay


# --------------------------------------------------------------------------------------------------
# Sampling


def sample(logits, temperature, top_p, draw):
    """A token id from logits (vocab,): the likeliest at temperature 0, else drawn from the smallest
    set of likeliest tokens whose probabilities add up to `top_p`. Raises NotFinite where a logit is
    NaN or inf."""
    if not logits.isfinite().all():
        raise NotFinite("NaN or inf in the logits: is --dtype wide enough?")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu()
    p, tokens = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # the likelier tokens alone are enough
    return int(tokens[torch.multinomial(p, 1, generator=draw)])


def generate(model, cache, logits, count, choose, ends=(), step=decode_block):
    """Yields up to `count` token ids of one sequence, from the logits (1, vocab) of `prefill`,
    until one of `ends`. `choose` takes logits (vocab,) to a token id."""
    for i in range(count):
        token = choose(logits[0])
        yield token
        if token in ends or i == count - 1:
            return
        logits = decode(model, cache, torch.tensor([token], device=logits.device), step)


def kl_divergence(model, cache, logits, tokens, reference, step=decode_block):
    """For each of m `tokens`, the KL divergence of this cache's prediction from full precision's,
    in nats; and whether both find the same token the likeliest. `reference` holds full precision's
    m logits (vocab,), `logits` (1, vocab) are those of `prefill`."""
    kl, same = [], []
    for i, expected in enumerate(reference):
        if i:
            logits = decode(model, cache, torch.tensor([tokens[i - 1]], device=logits.device), step)
        p, q = expected.float().log_softmax(-1), logits[0].float().log_softmax(-1)
        kl.append(F.kl_div(q, p, reduction="sum", log_target=True).item())
        same.append(bool(p.argmax() == q.argmax()))
    return kl, same


# --------------------------------------------------------------------------------------------------
# The quantizers of a run


@dataclass(frozen=True)
class Caches:
    """How the caches of a run quantize, and what static ranges and KVQuant are calibrated on."""

    rows: tuple[Row, ...]  # each its own cache
    group_size: int
    pre_rope: bool
    text: str
    windows: int
    tokens: int  # of a window


def quantizers_for(caches, model, tokenizer, site, weights):
    """row -> what quantizes its Keys and Values in each block, calibrated where that has to be.
    Calibration always has seed 0, so that texts of all seeds come from the same quantizers."""
    recipes = {
        row: kvquant.Recipe(row.keep, row.N, row.rho)
        for row in caches.rows
        if row.scheme == "kvquant"
    }
    if recipes:
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        made_with = kvquant.MadeWith(
            weights, caches.text, caches.windows, caches.tokens, seed=0, dtype=dtype
        )
        calibrations = kvquant.calibrations(
            model, tokenizer, list(recipes.values()), site, made_with
        )
    if any(row.static() for row in caches.rows):
        windows = text.calibration_windows(
            tokenizer, caches.text, caches.tokens, caches.windows, seed=0
        )
    how, quantizers = (
        How(kvsink.decoder_block, nll=None, pre_rope=caches.pre_rope),
        {},
    )  # no loss is asked for
    for row in caches.rows:
        if row == FULL_PRECISION:
            quantizers[row] = kvsink.full_precision_cache(model)
        elif row in recipes:
            quantizers[row] = kvquant.kvquant_cache(calibrations[recipes[row]], row.rho, row.bits)
        elif row.static():
            rule = row.keep, row.N, site
            static = calibrated(model, windows, [row.scheme], caches.group_size, rule, how)
            quantizers[row] = kvsink.with_bits(static[row.scheme], row.bits)
        else:
            quantizers[row] = kvsink.rtn_cache(model, row.scheme, row.bits, caches.group_size)
    return quantizers


# --------------------------------------------------------------------------------------------------
# What a run prints


@dataclass(frozen=True)
class SamplingParams:
    """What is said: how the text begins, how many tokens follow, how each is chosen."""

    prompt: str
    count: int
    temperature: float
    top_p: float
    seed: int


def speak(model, tokenizer, prompt, count, row, prefilled, choose, step):
    """Text as it is made; then how fast, in how many bytes, and what was kept. `prefilled` takes a
    row to its cache, filled by the prompt, and to its logits."""
    if step is not decode_block:
        print(
            "compiling with the second token, up to half a minute the first time", file=sys.stderr
        )
    start = time.perf_counter()
    cache, logits = prefilled(row)
    begin = prompt[:1] == [tokenizer.bos]  # has no text
    tokens, times, shown = prompt[begin:], [], ""
    for token in generate(model, cache, logits, count, choose, tokenizer.ends, step):
        tokens.append(token)
        times.append(time.perf_counter())
        said = tokenizer.decode(tokens)
        if not said.endswith("\ufffd"):  # a character of several tokens waits for its last
            print(said[len(shown) :], end="", flush=True)
            shown = said
    print(tokenizer.decode(tokens)[len(shown) :] + "\n")
    # The first step compiles, so it is not counted.
    speed = (
        f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens per second"
        if len(times) > 2
        else ""
    )
    print(
        f"{row}: prompt of {len(prompt)} tokens in {times[0] - start:.2f} s, {len(times)} new ones{speed}"
    )
    full, size = cache_bytes(model.config, cache.n, 16), cache.bytes()
    print(
        f"cache for {cache.n} tokens: {size:,} bytes, {100 * size / full:.1f} % of the {full:,.0f} of fp16"
    )
    if row.N:
        slots = [slot for slot in cache.blocks[-1].kept[0].tolist() if slot < cache.n]
        print(
            f"kept: {', '.join(f'{slot} {tokenizer.decode([prompt[slot]])!r}' for slot in slots) or 'nothing'}"
        )


def compare(model, tokenizer, count, rows, prefilled, choose, step):
    """What each row makes of the prompt, side by side, and how far its predictions are from full
    precision's along the text that full precision says, which is the first of `rows`."""
    width, columns = max(20, shutil.get_terminal_size((120, 0)).columns // len(rows) - 2), []
    for row in tqdm(rows, desc="comparing", unit="cache", leave=False, disable=None):
        seen, (cache, logits) = [], prefilled(row)

        def remember_and_choose(logits, seen=seen):
            seen.append(logits)
            return choose(logits)

        tokens = list(
            generate(model, cache, logits, count, remember_and_choose, tokenizer.ends, step)
        )
        if row == FULL_PRECISION:
            spoken, reference, heading = tokens, seen, ["full precision", "KL 0", "same 100 %"]
        else:
            kl, same = kl_divergence(model, *prefilled(row), spoken, reference, step)
            mean, error = results.mean_and_error(kl)
            heading = [
                f"{row.kept()} kept",
                f"KL {mean:.4f} +- {error:.4f}",
                f"same {100 * sum(same) / len(same):.0f} %",
            ]
        columns.append([*heading, "", *textwrap.wrap(tokenizer.decode(tokens), width)])
    for line in itertools.zip_longest(*columns, fillvalue=""):
        print("  ".join(f"{cell:<{width}}" for cell in line).rstrip())


# --------------------------------------------------------------------------------------------------
# The command


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(
        prog="python -m paper.generate",
        description="Text from a LLaMA-type model with a packed KV cache, of which the first N tokens (PFN) or the N\n"
        "predicted attention sinks of the prompt (KVSink, Algorithm 1) are kept in full precision. Its defaults are not\n"
        "the paper's, but the best setting that was measured (docs/results.md).",
    )
    add = parser.add_argument_group("what to say").add_argument
    add("--prompt", default="The tallest mountain on Earth is", help="what the text begins with (default: %(default)s)")
    add("--max-new-tokens", type=cli.number(1), default=100, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-p", type=float, default=0.9, help="sample from the tokens that make up so much (default: %(default)s)")
    add("--seed", type=cli.number(0, 2**63 - 1), default=0, help="(default: %(default)s)")
    add("--compare", action="store_true", help="full precision and all rules of preservation side by side")
    add = parser.add_argument_group("the cache").add_argument
    add("--bits", type=int, choices=(1, 2, 3, 4, 8), default=4, help="bits a number (default: %(default)s)")
    add("--scheme", choices=[*kvsink.SCHEMES, "kvquant"], default="channel-dynamic", help="as in eval_ppl.py; static "
        "ranges and kvquant calibrate first (default: %(default)s)")
    add("--keep", choices=results.KEEPS, default="pfn+kvsink", help="which tokens to keep, as in eval_ppl.py "
        "(default: %(default)s)")
    add("--sinks", type=cli.number_or_auto(1), metavar="N", help="how many of them, or auto: as many as stand out, at most "
        "20 (default: auto; 5 of pfn)")
    add("--outliers", type=cli.fraction, default=0.0, metavar="RHO", help="KVQuant: the fraction of the numbers stored "
        "apart in 16 bits (default: %(default)s)")
    add("--group-size", type=cli.number(1), default=128, help="channels, or with channel-dynamic tokens, that share a "
        "scale (default: 128, at most a head)")
    add("--rope", choices=["post", "pre"], default="post", help="Keys after or before RoPE; KVQuant: always before")
    add = parser.add_argument_group("how to run it").add_argument
    cli.add_model_options(add)
    cli.add_site_options(add)
    cli.add_machine_options(add)
    return parser.parse_args(argv)
# fmt: on


def parse(argv):
    """What `run` takes. Raises ValueError for options that cannot be."""
    args = parse_arguments(argv)
    if not args.prompt.strip():
        raise ValueError("the prompt is empty: give --prompt some text")
    if (
        not (args.temperature == 0 or 1e-6 <= args.temperature <= 1e6)
        or not 1e-6 <= args.top_p <= 1
    ):  # NaN too
        raise ValueError("--temperature is 0 or from 1e-6 to 1e6, and --top-p from 1e-6 to 1")
    if args.outliers and args.scheme != "kvquant":
        raise ValueError("--outliers is for --scheme kvquant")
    if args.scheme == "kvquant" and args.bits not in (2, 3, 4):
        raise ValueError("--scheme kvquant has 2, 3 and 4 bits")
    rows = []
    for keep in results.KEEPS if args.compare else [args.keep]:
        N = args.sinks or kvsink.AUTO
        if keep == "pfn" and N == kvsink.AUTO and (args.compare or not args.sinks):
            N = 5  # PFN finds no N itself
        rows += expand_rows([(args.scheme, args.bits, args.outliers)], [keep], [N])
    source, windows, tokens = (
        ("wiki-sample", 4, 1024) if args.model == hub.DEFAULT_MODEL else ("wikitext2", 16, 4096)
    )
    if args.scheme == "kvquant":
        windows, tokens = 16, min(tokens, 2048)  # its paper's
    caches = Caches(
        rows=(FULL_PRECISION, *rows) if args.compare else tuple(rows),
        group_size=args.group_size,
        pre_rope=args.rope == "pre" or args.scheme == "kvquant",
        text=source,
        windows=windows,
        tokens=tokens,
    )
    speech = SamplingParams(
        args.prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed
    )
    return args.model, cli.machine(args), speech, caches, (args.layer, args.channel)


def fitting(caches, prompt, count, config, machine):
    """The same caches with a group no wider than a head and windows no longer than the context; and
    room for prompt and new tokens. Raises ValueError for what the model or the memory cannot do."""
    n, context = len(prompt) + count, config.max_position_embeddings
    if n > context:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {count} new ones are more than the model's context, {context}: "
            "shorten the one or lower --max-new-tokens"
        )
    N, tokens = max(row.most() for row in caches.rows), min(caches.tokens, context)
    if (most := max(most_kept(row.N, len(prompt)) for row in caches.rows)) > len(prompt):
        raise ValueError(f"the prompt has {len(prompt)} tokens: lower --sinks {most}, or say more")
    if N > tokens - 2 and any(row.static() or row.scheme == "kvquant" for row in caches.rows):
        raise ValueError(
            f"--sinks {N}: calibration has windows of {tokens} tokens, too few to keep so many"
        )
    group_size, _ = cli.clamp_group_size(caches.group_size, config.head_dim)
    room = min(
        -(-n // 256) * 256, context
    )  # in steps of 256 tokens: code compiled for one prompt serves the next
    bits = max(
        8 * machine.torch_dtype.itemsize if row == FULL_PRECISION else row.bits
        for row in caches.rows
    )
    needed, free = cache_bytes(config, room, bits), cli.free_memory(machine.device)
    if needed > free:
        raise ValueError(
            f"a cache of {room} tokens takes {cli.format_bytes(needed)}, and {cli.format_bytes(free)} are free on "
            f"{machine.device}: lower --max-new-tokens or --bits"
        )
    return replace(caches, group_size=group_size, tokens=tokens), room


def run(name, machine, speech, caches, place):
    """One text, or where the first row is full precision one of each row side by side."""
    directory = hub.model_directory(name)
    config, tokenizer = LlamaConfig.from_pretrained(directory), Tokenizer.from_pretrained(directory)
    prompt = tokenizer.encode(speech.prompt)
    if not prompt:
        raise ValueError("no character of the prompt is in the model's vocabulary")
    text.check_vocabulary(torch.tensor(prompt), config, directory)
    site = cli.chosen_site(*place, config)
    caches, room = fitting(caches, prompt, speech.count, config, machine)
    model = Llama.from_pretrained(directory, machine.device, machine.torch_dtype)
    if site is None and any("kvsink" in row.keep for row in caches.rows):
        site = hub.site_of(model, tokenizer, name, directory)
    site = site or NOWHERE
    quantizers = quantizers_for(caches, model, tokenizer, site, hub.fingerprint(directory))
    step, draw = machine.compiled(decode_block, **FUSE), torch.Generator()

    def choose(logits):
        return sample(logits, speech.temperature, speech.top_p, draw)

    def prefilled(row):
        draw.manual_seed(speech.seed)
        k = most_kept(row.N, len(prompt))
        cache = KVCache(model, quantizers[row], room, k=k, pre_rope=caches.pre_rope)
        return cache, prefill(model, cache, [prompt], row.keep, row.N, site)

    first, *others = caches.rows
    if first != FULL_PRECISION:
        return speak(model, tokenizer, prompt, speech.count, first, prefilled, choose, step)
    print(f"{speech.prompt}\n")
    compare(model, tokenizer, speech.count, caches.rows, prefilled, choose, step)
    print(
        f"\n{others[0].name()}, {others[0].bits} bits; along full precision's text, KL: divergence from its predictions, "
        "nats a token, and the standard error over tokens; same: share of tokens whose likeliest successor is its, too"
    )


def main(argv=None):
    return cli.run_command(
        "paper.generate", lambda: run(*parse(argv)), "lower --max-new-tokens or --bits"
    )


if __name__ == "__main__":
    cli.exit_process(main())
