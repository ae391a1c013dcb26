"""Table 4: what KVSink adds to prefill time and to memory; and what a packed cache costs and saves
when decoding.

    python -m paper.table4                      the embedded default model
    python -m paper.table4 --shape llama2-7b    a paper's model with random weights: no download
    python -m paper.table4 --vs transformers    beside the `transformers` package and its caches

Read top to bottom: what is measured, and how long a call takes; Table 4; its cost against n;
decoding; the attention of one block; the comparison with another implementation; the command.

What this file does not do: it measures no quality; eval_ppl.py does. A time is the median of
repeats, with the fastest and the slowest, after one round of warm-up. Calls that are compared
alternate: the two prefills, the values of k, the two implementations. Only caches of different
widths are timed one after another, because together they might not fit.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import kvsink
from kvsink import Rule, Site
from llama import Llama, LlamaConfig
from paper import decode
from paper.kvcache import FullPrecisionStore, KVCache, cache_bytes
from paper.shapes import SHAPES, random_model, shape
from support import cli, evaluate, hub
from support.cache import format_bytes, save
from support.evaluate import negative_log_likelihood
from support.machine import Machine, free_memory, pick_machine, ran_compiled

# --------------------------------------------------------------------------------------------------
# What is measured


@dataclass(frozen=True)
class BenchmarkConfig:
    """The model of a benchmark, what is measured on it, and how often."""

    model: str
    is_shape: bool  # random weights in the shape of the model, which is one of the paper's
    parts: tuple[str, ...]
    seq_len: int  # tokens of the prefill
    n: tuple[int, ...]  # tokens in the cache when decoding
    batch: tuple[int | str, ...]  # sequences that are decoded together; MAX: as many as fit
    bits: tuple[int, ...]
    scheme: str
    repeats: int
    machine: Machine


@dataclass(frozen=True)
class Benchmark:
    """A BenchmarkConfig with its model, loaded, and the functions that are timed, compiled if the
    machine has a compiler."""

    config: BenchmarkConfig
    model: Llama
    directory: Path | None  # None: random weights
    step: Callable  # kvsink.decoder_block
    decode_block: Callable
    loss: Callable
    used: set  # holds True if a function ran compiled, False if the compiler failed on one

    @property
    def device(self):
        return str(self.model.device)


class Time(NamedTuple):
    """The time per call, in milliseconds."""

    median: float
    fastest: float
    slowest: float

    def __str__(self):
        digits = 1 if self.median >= 10 else 3
        return f"{self.median:.{digits}f} ({self.fastest:.{digits}f}-{self.slowest:.{digits}f})"


def measure(functions, repeats, device, calls=1):
    """Return name -> Time for named functions, each called `calls` times in a row. The first round
    is warm-up and includes compilation. The functions alternate, so that a slow spell of the
    machine meets all of them."""
    times = {name: [] for name in functions}
    label = str(next(iter(functions)))
    for i in tqdm(range(repeats + 1), desc=label, unit="round", leave=False, disable=None):
        for name, function in functions.items():
            milliseconds = elapsed(function, device, calls) / calls
            if i:
                times[name].append(milliseconds)
    return {name: Time(statistics.median(ms), min(ms), max(ms)) for name, ms in times.items()}


def elapsed(function, device, calls):
    """Return the milliseconds that these calls take, measured between two events on a CUDA GPU, and
    by the clock on any other device."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    if device.startswith("mps"):
        torch.mps.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.startswith("mps"):
        torch.mps.synchronize()
    return 1e3 * (time.perf_counter() - start)


def quantizers(model, bits, scheme):
    """Return the quantizers of a cache (16 bits: full precision), calibrated on noise if they are
    static."""
    if bits == 16:
        return kvsink.full_precision_quantizers(model)
    config = model.config
    cache = kvsink.rtn_quantizers(model, scheme, bits, min(128, config.head_dim))
    for pair in cache:
        for quantizer in pair:
            if quantizer.static:
                size = (1, config.num_key_value_heads, 64, config.head_dim)
                quantizer.calibrate(torch.randn(size, device=model.device))
    return cache


# --------------------------------------------------------------------------------------------------
# Table 4

KEPT = (1, 5, 20)  # k of Table 4
# As printed: model -> prefill time in ms, and what each KVSink-k adds to it in ms; memory in MB at
# 2 bits, and what each KVSink-k adds to it in MB
PAPER_TABLE_4 = {
    "llama2-7b": (676.78, (0.04, 0.04, 0.05), 256, (0.5, 2.5, 10)),
    "llama2-13b": (1090.70, (0.04, 0.05, 0.05), 400, (0.78, 3.91, 15.63)),
    "llama2-70b": (4481.05, (0.04, 0.05, 0.05), 160, (0.31, 1.56, 6.25)),
    "mistral-7b": (686.32, (0.04, 0.05, 0.05), 64, (0.13, 0.63, 2.5)),
    "llama3-8b": (707.95, (0.04, 0.05, 0.05), 64, (0.13, 0.63, 2.5)),
    "llama3.2-3b": (430.74, (0.04, 0.05, 0.05), 56, (0.11, 0.55, 2.19)),
}


def table_4(benchmark):
    """Print Table 4 for one model, and yield a record of each time and size."""
    config = benchmark.config
    model = benchmark.model
    n = config.seq_len
    prefills, lines = table_4_functions(benchmark)
    times = measure(prefills, config.repeats, benchmark.device)
    times |= measure(lines, config.repeats, benchmark.device, calls=100)
    for name in times:
        yield {"what": name, "n": n, "unit": "ms", **times[name]._asdict()}
    sizes = [KVCache(model, quantizers(model, 2, config.scheme), n, k=k).bytes() for k in KEPT]
    for k, size in zip(KEPT, sizes):
        yield {
            "what": f"cache, 2 bits, k = {k}",
            "n": n,
            "unit": "bytes",
            "measured": size,
            "computed": cache_bytes(model.config, n, 2, k),
        }
    full, packed = (times[name] for name in prefills)
    added = [times[name].median for name in lines]
    print_table_4(benchmark, full, added, sizes)
    print(
        f"lines 14-16 take at most {100 * max(added) / full.median:.4f} % of the prefill, which "
        f"with KVSink-5 into the 2-bit cache takes {packed} ms, "
        f"{packed.median / full.median:.3f} times as long"
    )


def table_4_functions(benchmark):
    """Return what Table 4 times, by name, in two dicts: the prefill of n tokens into a cache in
    full precision and in 2 bits; and lines 14-16 of Algorithm 1 alone, for each k."""
    model = benchmark.model
    config = model.config
    n = benchmark.config.seq_len
    tokens = torch.randint(config.vocab_size, (n,), device=model.device).tolist()
    site = Site(1, config.hidden_size // 2)  # any will do: the work is the same
    H = torch.randn(1, n, config.hidden_size, device=model.device, dtype=model.dtype)
    full = KVCache(model, kvsink.full_precision_quantizers(model), n)
    packed = KVCache(model, quantizers(model, 2, benchmark.config.scheme), n, k=5)

    def prefill(cache, rule):
        decode.prefill(model, cache, [tokens], rule, benchmark.step)

    prefills = {
        "prefill, full precision": functools.partial(prefill, full, Rule()),
        "prefill, 2 bits, KVSink-5": functools.partial(prefill, packed, Rule(k=5, site=site)),
    }
    lines = {
        f"lines 14-16, k = {k}": functools.partial(kvsink.predict_sinks, H, site.c, k) for k in KEPT
    }
    return prefills, lines


def print_table_4(benchmark, prefill, added, sizes):
    """Print Table 4. `prefill` is a Time; for each of KEPT, `added` has milliseconds and `sizes`
    the bytes of the whole cache."""
    name = benchmark.config.model
    n = benchmark.config.seq_len
    memory, *added_memory = table_4_memory(benchmark.model.config, n)
    paper = PAPER_TABLE_4.get(name)
    print(f"\nTable 4: {name}, {n} tokens; time in ms, memory in MB of 2^20 bytes")
    top = f"{'':12}{'prefill time':>46}{'KV cache memory, 2 bits':>44}"
    head = f"{'':12}{'w/o KVSink':>28}{'+ KVSink':>18}"
    head += f"{'w/o KVSink':>16}{'+ KVSink':>12}{'measured':>16}"
    if paper:
        top += f"{'4 x A100 (paper)':>36}"
        head += f"{'time':>20}{'memory':>16}"
    print(top)
    print(head)
    for i, k in enumerate(KEPT):
        first = i == 0
        cells = f"KVSink-{k:<5}{str(prefill) if first else '':>28}{f'+ {added[i]:.4f}':>18}"
        cells += f"{memory if first else '':>16}{f'+ {added_memory[i]}':>12}"
        cells += f"{sizes[i] / 2**20:>16.2f}"
        if paper:
            paper_ms, paper_added_ms, paper_MB, paper_added_MB = paper
            cells += f"{f'{paper_ms} + {paper_added_ms[i]}':>20}"
            cells += f"{f'{paper_MB} + {paper_added_MB[i]}':>16}"
        print(cells)


def table_4_memory(config, n=4096, bits=2):
    """Compute Table 4's memory and format it as the paper does (an MB is 2^20 bytes): the memory
    without KVSink, then what each of KEPT adds."""
    memory = cache_bytes(config, n, bits)
    added = [cache_bytes(config, n, bits, k) - memory for k in KEPT]
    return [as_printed(size / 2**20) for size in (memory, *added)]


def as_printed(x):
    """Return a number to two places, halves rounded up, without trailing zeros."""
    digits = str(Decimal(x).quantize(Decimal("0.01"), ROUND_HALF_UP))
    return digits.rstrip("0").rstrip(".")


def cost_against_n(benchmark):
    """Print the time of lines 14-16 for more and more tokens, a line for each n, and yield a record
    of each time."""
    model = benchmark.model
    print(f"\nlines 14-16 alone, ms\n{'n':>8}" + "".join(f"{f'KVSink-{k}':>26}" for k in KEPT))
    for n in benchmark.config.n:
        H = torch.randn(1, n, model.config.hidden_size, device=model.device, dtype=model.dtype)
        functions = {k: functools.partial(kvsink.predict_sinks, H, 0, k) for k in KEPT}
        times = measure(functions, benchmark.config.repeats, benchmark.device, calls=100)
        print(f"{n:>8}" + "".join(f"{times[k]!s:>26}" for k in KEPT))
        for k in KEPT:
            yield {"what": f"lines 14-16, k = {k}", "n": n, "unit": "ms", **times[k]._asdict()}


# --------------------------------------------------------------------------------------------------
# Decoding


MAX = "max"
SPARE = 0.85  # of the free memory; the rest is for all that is not the cache


def decoding(benchmark):
    """Print tokens per second and memory for each n, batch and width, and yield a record of each.
    "full" is the model's own dtype, unpacked."""
    model = benchmark.model
    head = f"{'n':>8}{'batch':>7}{'bits':>6}{'tokens/s':>10}{'ms a step':>28}{'against full':>14}"
    print(f"\ndecoding: tokens of all sequences a second; a step is one token of each\n{head}"
          f"{'cache, MiB':>12}{'computed':>10}{'peak, GiB':>11}")  # fmt: skip
    for n in benchmark.config.n:
        for batch in benchmark.config.batch:
            full = math.nan  # tokens a second in full precision, if it fits
            for bits in (16, *benchmark.config.bits):
                free = free_memory(benchmark.device)
                one = computed_bytes(model, n, bits)
                b = max(1, int(SPARE * free / one)) if batch == MAX else batch
                computed = b * one
                start = f"{n:>8}{b:>7}{bits if bits < 16 else 'full':>6}"
                if computed * 1.1 > free:
                    sizes = f"it takes {format_bytes(computed)}, of {format_bytes(free)} free"
                    print(f"{start}  not run: {sizes}")
                    continue
                time_, cache, peak = measure_decoding(benchmark, n, b, bits)
                rate = 1e3 * b / time_.median
                full = rate if bits == 16 else full
                record = {"what": "decode", "n": n, "b": b, "bits": bits, "unit": "ms"}
                record |= {**time_._asdict(), "cache": cache, "computed": computed, "peak": peak}
                yield record
                cells = f"{rate:>10.1f}{time_!s:>28}{rate / full:>13.2f}x"
                cells += f"{cache / 2**20:>12.1f}{computed / 2**20:>10.1f}"
                print(f"{start}{cells}{f'{peak / 2**30:.2f}' if peak else '-':>11}")


def computed_bytes(model, n, bits):
    """Return the bytes of the cache of one sequence of n tokens by Table 4's formula, with 5 tokens
    kept if the others are packed."""
    if bits == 16:
        return cache_bytes(model.config, n, 8 * model.dtype.itemsize)
    return cache_bytes(model.config, n, bits, 5)


def measure_decoding(benchmark, n, b, bits):
    """Return the Time of decoding a token of each of b sequences at n, the bytes of the cache, and
    the peak memory."""
    cache = noise_cache(benchmark, n, bits, b)
    reset_peak_memory(benchmark.device)
    functions = {bits: functools.partial(decode_one_token, benchmark, cache)}
    times = measure(functions, benchmark.config.repeats, benchmark.device)
    peak = peak_memory(benchmark.device)
    size = cache.bytes()
    del functions, cache
    release_memory(benchmark.device)
    return times[bits], size, peak


def release_memory(device):
    """Give freed memory back to the GPU, so that `free_memory` counts it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def noise_cache(benchmark, n, bits, b=1, L=None):
    """Return a cache of b sequences of n tokens of noise, of all blocks or of the first L."""
    model = benchmark.model
    cache_quantizers = quantizers(model, bits, benchmark.config.scheme)[:L]
    cache = KVCache(model, cache_quantizers, n, b=b, k=0 if bits == 16 else 5)
    for block in cache.blocks:
        fill_with_noise(block)
    return cache


def fill_with_noise(block):
    for store in (block.K, block.V):
        if isinstance(store, FullPrecisionStore):
            store.X.normal_()
        else:
            store.codes.mT.view(torch.uint8).random_(0, 256)


def decode_one_token(benchmark, cache):
    """Decode a token of each sequence in the second-to-last slot, which never completes a group."""
    slot = cache.n - 2
    cache.next_slot.fill_(slot)
    cache.lengths = [slot] * len(cache.lengths)
    tokens = torch.zeros_like(cache.next_slot[:, 0])
    decode.decode(benchmark.model, cache, tokens, benchmark.decode_block)


def reset_peak_memory(device):
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # gives back what has been freed
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: `peak_memory` returns None
        pass


def peak_memory(device):
    """Return the most bytes in use since the last reset: by torch's tensors on a GPU, else by the
    whole process. Only Linux knows the latter; elsewhere, return None."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return 1024 * kilobytes[0] if kilobytes else None


# --------------------------------------------------------------------------------------------------
# The attention of one block alone


def attention_alone(benchmark):
    """Print the time of one block's attention: PyTorch's own, over Keys and Values in full
    precision; ours over the same; and ours over packed codes. Beside it, the bytes that it reads in
    a second, which a copy of a large tensor bounds. Yield a record of each."""
    device = benchmark.device
    limit = copy_speed(benchmark)
    print(f"\none block's attention of one query; a copy moves {limit:.0f} GB/s")
    print(f"{'n':>8}{'':>9}{'ms':>28}{'against PyTorch':>17}{'GB/s':>8}{'of a copy':>11}")
    names = ["PyTorch", *["flash"] * device.startswith("cuda"), 16, *benchmark.config.bits]
    for n in benchmark.config.n:
        first = math.nan  # the time of PyTorch
        for name in names:
            bits = name if isinstance(name, int) else 16
            cache = noise_cache(benchmark, n, bits, L=blocks_to_time(benchmark.model, n, bits))
            L = len(cache.blocks)
            function = on_replay(attention_function(benchmark, cache, name), device)
            times = measure({name: function}, benchmark.config.repeats, device, calls=5)[name]
            time_ = Time(*(milliseconds / L for milliseconds in times))
            first = time_.median if name == "PyTorch" else first
            read = sum(store.nbytes for store in cache.blocks[0].tensors())
            speed = read / time_.median / 1e6
            label = "full" if name == 16 else f"{name} bits" if bits < 16 else name
            cells = (
                f"{time_!s:>28}{first / time_.median:>16.2f}x{speed:>8.0f}{speed / limit:>10.0%}"
            )
            print(f"{n:>8}{label:>9}{cells}")
            record = {"what": "attention", "n": n, "bits": bits, "name": label, "unit": "ms"}
            yield record | {**time_._asdict(), "bytes": read, "copy_GB/s": limit}
            del cache, function
            release_memory(device)


def blocks_to_time(model, n, bits):
    """Return how many blocks take turns, so that none finds its cache in the L2 cache of a GPU: as
    many as a gigabyte holds."""
    L = len(model.blocks)
    return min(L, max(1, int(2**30 * L / computed_bytes(model, n, bits))))


def attention_function(benchmark, cache, name):
    """Return a function that computes the attention of each block of a cache."""
    model = benchmark.model
    config = model.config
    h_kv = config.num_key_value_heads
    size = (1, config.num_attention_heads, 1, config.head_dim)
    Q = torch.randn(size, device=model.device, dtype=model.dtype)
    slot = torch.full((1, 1), cache.n - 2, device=model.device)
    machine = benchmark.config.machine
    one_block = machine.compiled(attention_of_block, benchmark.used, **decode.FUSE)

    def theirs():
        for block in cache.blocks:
            Q_ = Q.view(1, h_kv, -1, config.head_dim)  # no mask: all slots are seen
            F.scaled_dot_product_attention(Q_, block.K.X, block.V.X)

    def ours():
        for block in cache.blocks:
            one_block(block, Q, slot)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            theirs()

    return {"PyTorch": theirs, "flash": flash}.get(name, ours)


def attention_of_block(block, Q, slot):
    return block.attention(Q, slot, None)


def on_replay(function, device):
    """Return a function that does the same as one CUDA graph, as a decoding step does. Without a
    GPU, return the function."""
    if not device.startswith("cuda"):
        return function
    function()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_speed(benchmark):
    """Return how many GB a second a copy of a large tensor reads and writes."""
    source = torch.ones(2**28, dtype=torch.uint8, device=benchmark.device)
    target = torch.empty_like(source)
    copy = {"copy": functools.partial(target.copy_, source)}
    time_ = measure(copy, benchmark.config.repeats, benchmark.device, calls=5)["copy"]
    return 2 * source.nbytes / time_.median / 1e6


# --------------------------------------------------------------------------------------------------
# The `transformers` package, as its users run it: eager, with scaled_dot_product_attention

LONG = 16384  # tokens, at which decoding is compared, too


def versus_transformers(benchmark):
    """Print the times of a prefill, of the evaluation of a window and of decoding, ours and
    transformers', which alternate, and yield a record of each pair. Each of
    transformers' quantized caches is compared with ours of the same width."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--vs transformers needs it: pip install transformers") from None
    theirs = their_model(transformers, benchmark)
    version = f"transformers {transformers.__version__}"
    print(f"\n{'milliseconds':<44}{'ours':>28}{version:>28}{'ratio':>8}")
    n = benchmark.config.seq_len
    tokens = torch.randint(benchmark.model.config.vocab_size, (1, n), device=benchmark.device)
    for name, (our_function, their_function) in prompt_functions(benchmark, theirs, tokens).items():
        yield compare(benchmark, name, our_function, their_function)
    for m in sorted({n, LONG}):
        for bits, name, their_cache in their_caches(transformers, theirs):
            fill_their_cache(benchmark.model, their_cache, m)
            our_cache = noise_cache(benchmark, m, bits)
            yield compare(
                benchmark,
                f"decoding at {m}, {name}",
                functools.partial(decode_one_token, benchmark, our_cache),
                functools.partial(theirs, tokens[:, :1], past_key_values=their_cache),
            )


def their_model(transformers, benchmark):
    """Return the same model as a model of transformers, or one of the same shape with random
    weights."""
    device = benchmark.device
    dtype = benchmark.model.dtype
    directory = benchmark.directory
    if directory:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    else:
        raw = SHAPES[benchmark.config.model]
        raw = {key: value for key, value in raw.items() if key != "architectures"}
        raw["rms_norm_eps"] = 1e-5
        family = "Mistral" if "sliding_window" in raw else "Llama"
        config = getattr(transformers, f"{family}Config")(**raw)
        with torch.device(device):
            theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    return theirs.to(device, dtype).eval()


def prompt_functions(benchmark, theirs, tokens):
    """Return name -> our function and theirs, of the prefill and the evaluation of tokens (1, n).
    An evaluation takes the loss, too."""
    model = benchmark.model
    n = tokens.shape[1]
    full = kvsink.full_precision_quantizers(model)
    packed = quantizers(model, 2, benchmark.config.scheme)
    cache = KVCache(model, full, n)

    def our_prefill():
        decode.prefill(model, cache, tokens.tolist(), step=benchmark.step)

    def their_prefill():
        theirs(tokens, use_cache=True, logits_to_keep=1)

    def our_evaluation(cache):
        H, _ = kvsink.prefill(model, model.embedding(tokens), cache, step=benchmark.step)
        benchmark.loss(model, H, tokens).item()

    def their_evaluation():
        logits = theirs(tokens, use_cache=False).logits[0, :-1].float()
        F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()

    name = f"evaluation of {n} tokens"
    return {
        f"prefill of {n} tokens": (our_prefill, their_prefill),
        name: (functools.partial(our_evaluation, full), their_evaluation),
        f"{name}, ours at 2 bits": (functools.partial(our_evaluation, packed), their_evaluation),
    }


def compare(benchmark, name, ours, theirs):
    """Time two functions in turns, print a line, and return its record."""
    functions = {"ours": ours, "theirs": theirs}
    times = measure(functions, benchmark.config.repeats, benchmark.device)
    ratio = times["theirs"].median / times["ours"].median
    print(f"{name:<44}{times['ours']!s:>28}{times['theirs']!s:>28}{ratio:>7.2f}x", flush=True)
    record = {"what": name, "unit": "ms", "ratio": ratio}
    return record | {implementation: time_._asdict() for implementation, time_ in times.items()}


# Of the Keys: what transformers' documentation recommends for a backend, by which a token's numbers
# share a scale; and the other, by which a channel's do.
AXES = {"quanto": (0, -1), "hqq": (1, 0)}


def their_caches(transformers, theirs):
    """Yield the bits, the name and an empty cache: in full precision, and then for each backend,
    width and axis of transformers' quantized caches. Print which of them cannot be made, and
    why."""
    yield 16, "full precision", transformers.DynamicCache(config=theirs.config)
    for backend, axes in AXES.items():
        for bits, axis in itertools.product((4, 2), axes):
            try:
                cache = transformers.QuantizedCache(
                    backend, theirs.config, bits, axis_key=axis, axis_value=axes[0]
                )
            except (ImportError, ValueError) as error:  # not installed; Mistral's sliding window
                print(f"{backend} at {bits} bits: not run, {' '.join(str(error).split())}")
                break
            yield bits, f"{backend}, {bits} bits, axis_key={axis}", cache


def fill_their_cache(model, their_cache, n):
    """Fill a cache of transformers with n tokens of noise: a prefill of 16,384 tokens would take
    minutes."""
    config = model.config
    size = (2, 1, config.num_key_value_heads, n, config.head_dim)
    for l in range(config.num_hidden_layers):
        K, V = torch.randn(size, device=model.device, dtype=model.dtype)
        their_cache.update(K, V, l)


# --------------------------------------------------------------------------------------------------
# The command

PARTS = {
    "table4": table_4,
    "cost": cost_against_n,
    "decode": decoding,
    "kernel": attention_alone,
    "transformers": versus_transformers,
}


def main(argv=None):
    def work():
        args = parse_arguments(argv)
        run_benchmarks(benchmark_config(args), args.json)

    advice = "lower --n or --seq-len, or take a smaller --shape"
    return cli.run_command("paper.table4", work, advice)


def run_benchmarks(config, json_file=None):
    """Run each part of a BenchmarkConfig, and add its records to the file `json_file`."""
    machine = config.machine
    device_name = machine.device
    if machine.device.startswith("cuda"):
        torch.cuda.set_device(machine.device)  # CUDA events measure on the current device
        device_name = torch.cuda.get_device_name(machine.device)
    benchmark = load_benchmark(config)
    compiled = "compiled" if machine.compiles else "eager"
    print(
        f"{config.model} on {device_name}, {machine.dtype}, {compiled}, torch {torch.__version__}; "
        f"median of {config.repeats} (fastest-slowest)"
        + (", static ranges calibrated on noise" if kvsink.SCHEMES[config.scheme].static else "")
    )
    settings = {
        "model": config.model,
        "device": device_name,
        "dtype": machine.dtype,
    }
    records = []
    for part in config.parts:
        for record in PARTS[part](benchmark):
            compiled = ran_compiled(benchmark.used, machine.device)
            records.append(settings | {"compiled": compiled} | record)
            benchmark.used.clear()
            if json_file:
                save(json_file, json.dumps(records, indent=1).encode())


def load_benchmark(config):
    """Return the Benchmark of a BenchmarkConfig. Raises OSError or ValueError."""
    machine = config.machine
    used = set()
    directory = None
    if config.is_shape:
        model = random_model(shape(config.model), machine.device, machine.torch_dtype)
    else:
        directory = hub.model_directory(config.model)
        context = LlamaConfig.from_pretrained(directory).max_position_embeddings
        if config.seq_len > context and {"table4", "transformers"} & set(config.parts):
            raise ValueError(f"--seq-len {config.seq_len} is above the model's context, {context}")
        model = evaluate.load_model(config.model, machine).model
    return Benchmark(
        config=config,
        model=model,
        directory=directory,
        step=machine.compiled(kvsink.decoder_block, used),
        decode_block=machine.compiled(decode.decode_block, used, **decode.FUSE),
        loss=machine.compiled(negative_log_likelihood, used),
        used=used,
    )


def benchmark_config(args):
    """Return the BenchmarkConfig of the options."""
    return BenchmarkConfig(
        model=args.shape or args.model,
        is_shape=bool(args.shape),
        parts=(args.vs,) if args.vs else tuple(args.only),
        seq_len=args.seq_len,
        n=tuple(args.n),
        batch=tuple(args.batch),
        bits=tuple(args.bits),
        scheme=args.scheme,
        repeats=args.repeats,
        machine=pick_machine(args),
    )


def batch(text):
    """Return a number of sequences, or MAX."""
    return text if text == MAX else cli.number(1, 2**16)(text)


# fmt: off
def parse_arguments(argv):
    """Return the options. Raises ValueError, in one line, if they are invalid."""
    parser = cli.Parser(prog="python -m paper.table4",
        description="Table 4, and what a packed cache costs and saves when decoding.")
    model = parser.add_mutually_exclusive_group()
    cli.add_model_options(model.add_argument)
    model.add_argument("--shape", choices=SHAPES, help="a paper's model with random weights")
    add = parser.add_argument
    add("--only", nargs="+", choices=list(PARTS)[:4], default=["table4", "cost", "decode"],
        help="the parts to run; kernel is the attention of one block (default: table4 cost decode)")
    add("--seq-len", type=cli.number(32, 2**24), default=4096, help="tokens of the prefill "
        "(default: %(default)s)")
    add("--n", nargs="+", type=cli.number(32, 2**24), default=[1024, 4096, 16384, 65536],
        help="tokens in the cache when decoding, which may exceed the model's context (default: "
        "%(default)s)")
    add("--batch", nargs="+", type=batch, default=[1], metavar="B", help="sequences that are "
        "decoded together, or max: as many as fit in memory (default: 1)")
    add("--bits", nargs="+", type=int, choices=(1, 2, 3, 4, 8), default=[8, 4, 3, 2, 1],
        help="bits per number (default: %(default)s)")
    add("--scheme", choices=kvsink.SCHEMES, default="channel-static", help="as in eval_ppl.py "
        "(default: %(default)s)")
    add("--vs", choices=["transformers"], help="compare with another implementation, and run "
        "nothing else; this decodes at --seq-len and at 16,384 tokens")
    add("--repeats", type=cli.number(1), default=5, help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all times and sizes to this file")
    cli.add_machine_options(add)
    args = parser.parse_args(argv)
    cli.check_file(args.json)
    return args
# fmt: on


if __name__ == "__main__":
    cli.exit_process(main())
