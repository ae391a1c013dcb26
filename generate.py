"""Prefill, then decode, from a KV cache that is really small (Equations 5 and 6).

    python generate.py --prompt "The tallest mountain is" --bits 4 --keep kvsink --sinks 5
    python generate.py --prompt ... --compare         full precision, nothing kept, PFN and KVSink side by side

Read top to bottom: prefill, which is Algorithm 1 filling a cache; decoding, which is attention of one query over packed
codes; sampling; the distance to full precision; the command line.

What this file does not do: how the cache stores things is kvcache.py's business. No beam search, no chat templates.

Shapes as in kvcache.py: b sequences, n tokens of room, G query heads share a Key/Value head.
"""

import argparse
import itertools
import shutil
import sys
import textwrap
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval_ppl
import hub
import kvsink
import stream
from kvcache import KVCache, Plain, cache_bytes
from llama import Llama, LlamaConfig, Tokenizer, rotate
from quant import NotFinite

# ---------------------------------------------------------------------------------------------------------------------
# Eq. 5: prefill


def prefill(model, cache, prompts, keep="none", N=0, site=kvsink.Site(0, 0), step=kvsink.decoder_block):
    """Algorithm 1 for each prompt, a list of token ids, while the cache is filled. Each by itself: prompts of unequal
    length need no padding, which would be up for prediction too. Returns logits (b, vocab) for the token after each.
    `step` is eager or compiled; compiled code is made for one length of prompt.

    Raises ValueError for an empty prompt, one without room, one of fewer tokens than the cache keeps, and another N.
    """
    logits = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) > cache.n:
            raise ValueError(f"the prompt has {len(prompt)} tokens, and the cache was made for {cache.n}")
        if cache.k > len(prompt):
            raise ValueError(f"cannot keep {cache.k} of {len(prompt)} tokens")
        if keep != "none" and N != cache.k:
            raise ValueError(f"cannot keep {N} tokens in a cache that was made to keep {cache.k}")
        H = model.embedding(torch.tensor([prompt], device=cache.at.device))
        rows = torch.tensor([[i]], device=cache.at.device)
        fillers = [block_cache.fillers(rows) for block_cache in cache.blocks]
        rule = kvsink.preservation(keep, N, site, H)
        H, _ = kvsink.prefill(model, H, fillers, pre_rope=cache.blocks[0].pre_rope, step=step, **rule)
        logits.append(model.logits(H[:, -1]))
        cache.lengths[i] = cache.at[i] = len(prompt)
    return torch.cat(logits)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 6: decoding


# For torch.compile: what can be computed where it is read is not to be put into memory first. With Inductor's own
# limits the unpacked Keys and Values would be, because all G queries read them. A number that is stored in 16 bits is
# to be rounded before codes are made with it, too, which Inductor would skip. And each n has code of its own.
FUSE = {
    "dynamic": False,
    "options": {f"realize_{what}_threshold": 1000 for what in ("opcount", "reads", "acc_reads")}
    | {"emulate_precision_casts": True},
}


def decode_block(block, H, cache, at, rope):
    """Algorithm 1, lines 6-13, for one token of each sequence, in slot `at` (b, 1): H^{l-1} -> H^l, both (b, 1, d)."""
    Q, K, V = block.QKV(block.LN_mhsa(H))  # (b, h, 1, d_k), twice (b, h_kv, 1, d_k)
    turn = [table[at][:, None] for table in rope]  # (b, 1, 1, d_k)
    Q, K = rotate(Q, turn), K if cache.pre_rope else rotate(K, turn)
    rows = torch.arange(len(H), device=H.device)[:, None]
    cache.K.append(rows, at, K, cache.kept)
    cache.V.append(rows, at, V, cache.kept)
    H = block.W_o(attention(Q, cache, at, rope, block.sliding_window)) + H
    return block.FFN(block.LN_ffn(H)) + H


def attention(Q, cache, at, rope, sliding_window=None):
    """Eq. 3 for one query of each sequence, (b, h, 1, d_k), over all that is in the cache: (b, 1, h d_k)."""
    (b, h, _, d_k), n, device = Q.shape, cache.n, Q.device
    slot = torch.arange(n + 1, device=device)
    unseen = ((slot > at) | (slot <= at - (sliding_window or n)))[:, None, None]  # (b, 1, 1, n + 1)
    if isinstance(cache.K, Plain):
        Q = Q.view(b, -1, h // cache.K.X.shape[1], d_k)  # the G queries that share a Key, as if they were tokens
        A = F.scaled_dot_product_attention(Q, cache.K.X, cache.V.X, attn_mask=~unseen[..., :n])
        return A.reshape(b, 1, h * d_k)
    h_kv = cache.K.codes.shape[1]
    q = Q.float().view(b, h_kv, h // h_kv, d_k) * d_k**-0.5
    S = F.pad(cache.K.scores(q, [table[:n] for table in rope] if cache.pre_rope else None), (0, 1))  # slot n: nothing
    for K, slots in full_precision_keys(cache, at):
        K = rotate(K, [table[slots][:, None] for table in rope]) if cache.pre_rope else K
        S = S.scatter(3, slots[:, None, None].expand(*S.shape[:3], -1), q @ K.float().mT)
    p = S.masked_fill(unseen, -torch.inf).softmax(-1)  # (b, h_kv, G, n + 1)
    kept = cache.kept[:, None, None].expand(*p.shape[:3], -1)
    A = cache.V.weighted_sum(p.scatter(3, kept, 0.0)[..., :n]) + p.gather(3, kept) @ cache.kept_V.float()
    return A.to(Q.dtype).view(b, 1, h * d_k)


def full_precision_keys(cache, at):
    """Keys that are not quantized (b, h_kv, m, d_k) and their slots (b, m), n where there is none: kept tokens, and the
    unfinished group of tokens."""
    yield cache.kept_K, cache.kept
    if cache.K.tail is not None:
        g = cache.K.g
        slots = (at + 1) // g * g + torch.arange(g, device=at.device)
        yield cache.K.tail, torch.where(slots <= at, slots, cache.n)


def decode(model, cache, tokens, step=decode_block):
    """The next token of each sequence (b,) -> logits (b, vocab) for the one after it. `step` is eager or compiled.
    Raises ValueError where a sequence has no room left."""
    if max(cache.lengths) >= cache.n:
        raise ValueError(f"the cache was made for {cache.n} tokens and is full")
    H = model.embedding(tokens[:, None])  # (b, 1, d)
    for block, block_cache in zip(model.blocks, cache.blocks):
        for store in (block_cache.K, block_cache.V):
            if store.outliers is not None:
                store.outliers.make_room(store.outliers.d)  # all of a token's numbers may be
        H = step(block, H, block_cache, cache.at, cache.rope)
    cache.at += 1
    cache.lengths = [length + 1 for length in cache.lengths]
    return model.logits(H[:, 0])


def compiled(args):
    """`decode_block`, compiled where it can be."""
    return decode_block if args.no_compile else kvsink.compiled(decode_block, args.device, **FUSE)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample(logits, temperature, top_p, draw):
    """A token id from logits (vocab,): the likeliest at temperature 0, else drawn from the smallest set of tokens whose
    probabilities add up to `top_p`. Raises NotFinite where a logit is not."""
    if not logits.isfinite().all():
        raise NotFinite("NaN or inf in the logits: is --dtype wide enough?")
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu()
    p, tokens = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # of the likelier ones alone it is enough
    return int(tokens[torch.multinomial(p, 1, generator=draw)])


def generate(model, cache, logits, count, choose, ends=(), step=decode_block):
    """Yields up to `count` token ids of one sequence, from the logits (1, vocab) of `prefill`, until one of `ends`."""
    for i in range(count):
        token = choose(logits[0])
        yield token
        if token in ends or i == count - 1:
            return
        logits = decode(model, cache, torch.tensor([token], device=logits.device), step)


def kl_divergence(model, cache, logits, tokens, reference, step=decode_block):
    """Mean KL divergence in nats to full precision's predictions `reference`, m of (vocab,), of the m `tokens`."""
    total = 0.0
    for i, expected in enumerate(reference):
        if i:
            logits = decode(model, cache, torch.tensor([tokens[i - 1]], device=logits.device), step)
        p, q = expected.float().log_softmax(-1), logits[0].float().log_softmax(-1)
        total += F.kl_div(q, p, reduction="sum", log_target=True).item()
    return total / len(reference)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv):
    parser = eval_ppl.Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Text from a LLaMA-type model with a packed KV cache, of which the first N tokens (PFN) or the N\n"
        "predicted attention sinks of the prompt (KVSink, Algorithm 1) are kept in full precision.",
    )
    add = parser.add_argument_group("what to say").add_argument
    add("--prompt", default="The tallest mountain on Earth is", help="what the text begins with (default: %(default)s)")
    add("--max-new-tokens", type=eval_ppl.number(1), default=100, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-p", type=float, default=0.9, help="sample from the tokens that make up so much (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--compare", action="store_true", help="full precision, nothing kept, PFN and KVSink side by side")
    add = parser.add_argument_group("the cache").add_argument
    add("--bits", type=int, choices=(1, 2, 3, 4, 8), default=4, help="bits a number (default: %(default)s)")
    add(
        "--scheme",
        choices=[*kvsink.SCHEMES, "kvquant"],
        default="token-dynamic",
        help="as in eval_ppl.py; static ranges and kvquant calibrate first (default: %(default)s)",
    )
    add("--keep", choices=eval_ppl.KEEPS, default="kvsink", help="which tokens to keep (default: %(default)s)")
    add("--sinks", type=eval_ppl.number(1), default=5, metavar="N", help="how many of them (default: %(default)s)")
    add(
        "--outliers",
        type=eval_ppl.fraction,
        default=0.0,
        metavar="RHO",
        help="KVQuant: the fraction of the numbers stored apart in 16 bits (default: %(default)s)",
    )
    add(
        "--group-size",
        type=eval_ppl.number(1),
        default=128,
        help="channels, or with channel-dynamic tokens, that share a scale (default: 128, at most a head)",
    )
    add("--rope", choices=["post", "pre"], default="post", help="Keys after or before RoPE; KVQuant: always before")
    add = parser.add_argument_group("how to run it").add_argument
    add("--model", default=hub.DEFAULT_MODEL, help="as in eval_ppl.py (default: %(default)s)")
    add("--layer", type=eval_ppl.number(0), help="emergence layer, from 0 (default: Table 3's, else the finder's)")
    add("--channel", type=eval_ppl.number(0), help="outlier channel (default: likewise)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on cpu, else float16)")
    add("--no-compile", action="store_true", help="run eager, without torch.compile")
    return complete(parser.parse_args(argv))


def complete(args):
    """Check the options, and say to eval_ppl.py what to calibrate with: `args.rows` is what is to be run."""
    if not args.prompt.strip():
        raise ValueError("the prompt is empty: give --prompt some text")
    if not (args.temperature >= 0 and 0 < args.top_p <= 1):  # NaN too
        raise ValueError("--temperature is at least 0, and --top-p above 0 and at most 1")
    if args.outliers and args.scheme != "kvquant":
        raise ValueError("--outliers is for --scheme kvquant")
    eval_ppl.choose_device(args)
    keeps = eval_ppl.KEEPS if args.compare else [args.keep]
    args.rows = eval_ppl.all_rows([args.scheme], [args.bits], keeps, [args.sinks], [args.outliers])
    eval_ppl.check_rows(args)
    default_model = args.model == hub.DEFAULT_MODEL
    args.data, args.seq_len = ("wiki-sample", 1024) if default_model else ("wikitext2", 4096)
    args.calib_windows = args.calibration = None
    args.q_norm = False
    return args


def run(args):
    directory = hub.model_directory(args.model)
    config, tokenizer = LlamaConfig.from_pretrained(directory), Tokenizer.from_pretrained(directory)
    args.seq_len = min(args.seq_len, config.max_position_embeddings)
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise ValueError("no character of the prompt is in the model's vocabulary")
    n, context = len(prompt) + args.max_new_tokens, config.max_position_embeddings
    if n > context:
        raise ValueError(f"a prompt of {len(prompt)} tokens and {args.max_new_tokens} new ones are more than the "
                         f"model's context, {context}: shorten the one or lower --max-new-tokens")  # fmt: skip
    if args.sinks > len(prompt) and (args.compare or args.keep != "none"):
        raise ValueError(f"the prompt has {len(prompt)} tokens: lower --sinks {args.sinks}, or say more")
    eval_ppl.check_against_model(args, config)
    needed, free = cache_bytes(config, n, 32 if args.compare else args.bits), stream.free_memory(args.device)
    if needed > free:
        raise ValueError(f"a cache of {n} tokens takes {stream.amount(needed)}, and {stream.amount(free)} are free on "
                         f"{args.device}: lower --max-new-tokens or --bits")  # fmt: skip
    model = Llama.from_pretrained(directory, args.device, getattr(torch, args.dtype))
    eval_ppl.check_vocabulary(torch.tensor(prompt), model, directory)
    site = eval_ppl.site_for(args, model, tokenizer, directory)
    rows = [eval_ppl.FULL_PRECISION, *args.rows] if args.compare else args.rows
    quantizers = quantizers_for(args, model, tokenizer, rows, site, directory)
    step = compiled(args)
    # Room in steps of 256 tokens: the code compiled for one prompt serves the next.
    draw, room = torch.Generator(), min(-(-n // 256) * 256, context)

    def choose(logits):
        return sample(logits, args.temperature, args.top_p, draw)

    def prefilled(row):
        draw.manual_seed(args.seed)
        pre_rope = args.rope == "pre" or row.scheme == "kvquant"
        cache = KVCache(model, quantizers[row], room, k=row.N, pre_rope=pre_rope)
        return cache, prefill(model, cache, [prompt], row.keep, row.N, site)

    if args.compare:
        return compare(args, model, tokenizer, prompt, rows, prefilled, choose, step)
    speak(args, model, tokenizer, prompt, rows[0], prefilled, choose, step)


def quantizers_for(args, model, tokenizer, rows, site, directory):
    """row -> what quantizes its Keys and Values in each block, calibrated where that has to be."""
    static, calibrations = {}, {}
    args = argparse.Namespace(**vars(args) | {"seed": 0})  # --seed is the text's: every text comes from the same cache
    if any(row.static() for row in rows):
        static = eval_ppl.calibrated_caches(args, model, tokenizer, rows, site)
    if args.scheme == "kvquant":
        calibrations = eval_ppl.kvquant_calibrations(args, model, tokenizer, site, hub.fingerprint(directory))
    return {row: eval_ppl.cache_of(args, model, row, static, calibrations) for row in rows}


def speak(args, model, tokenizer, prompt, row, prefilled, choose, step):
    """Text as it is made; then how fast, in how many bytes, and what was kept."""
    if not args.no_compile:
        print("compiling with the second token, up to half a minute the first time", file=sys.stderr)
    start = time.perf_counter()
    cache, logits = prefilled(row)
    begin = prompt[:1] == [tokenizer.bos]  # has no text
    tokens, times, shown = prompt[begin:], [], ""
    for token in generate(model, cache, logits, args.max_new_tokens, choose, tokenizer.ends, step):
        tokens.append(token)
        times.append(time.perf_counter())
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # a character of several tokens waits for its last
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens)[len(shown) :] + "\n")
    # The first step compiles, so it is not counted.
    speed = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens per second" if len(times) > 2 else ""
    print(f"{row}: prompt of {len(prompt)} tokens in {times[0] - start:.2f} s, {len(times)} new ones{speed}")
    full = cache_bytes(model.config, cache.n, 16)
    size = cache.bytes()
    print(f"cache for {cache.n} tokens: {size:,} bytes, {100 * size / full:.1f} % of the {full:,.0f} of fp16")
    if row.N:
        slots = [slot for slot in cache.blocks[-1].kept[0].tolist() if slot < cache.n]
        print(f"kept: {', '.join(f'{slot} {tokenizer.decode([prompt[slot]])!r}' for slot in slots) or 'nothing'}")


def compare(args, model, tokenizer, prompt, rows, prefilled, choose, step):
    """What each rule makes of the prompt, side by side, and its KL divergence to full precision along that text."""
    width, columns = max(20, shutil.get_terminal_size((120, 0)).columns // len(rows) - 2), []
    for row in tqdm(rows, desc="comparing", unit="cache", leave=False, disable=None):
        seen, (cache, logits) = [], prefilled(row)

        def remember_and_choose(logits, seen=seen):
            seen.append(logits)
            return choose(logits)

        tokens = list(generate(model, cache, logits, args.max_new_tokens, remember_and_choose, tokenizer.ends, step))
        if row == eval_ppl.FULL_PRECISION:
            spoken, reference, heading = tokens, seen, ["full precision", "KL 0"]
        else:
            kl = kl_divergence(model, *prefilled(row), spoken, reference, step)
            heading = [f"{row.kept()} kept", f"KL {kl:.4f}"]
        columns.append([*heading, "", *textwrap.wrap(tokenizer.decode(tokens), width)])
    print(f"{args.prompt}\n")
    for line in itertools.zip_longest(*columns, fillvalue=""):
        print("  ".join(f"{text:<{width}}" for text in line).rstrip())
    print(f"\n{args.scheme}, {args.bits} bits; KL: to full precision's predictions along its text, nats a token")


def main(argv=None):
    return eval_ppl.guarded("generate.py", lambda: run(parse_arguments(argv)), "lower --max-new-tokens or --bits")


if __name__ == "__main__":
    sys.exit(main())
