"""Table 4: what KVSink adds to prefill time and to memory; and what a packed cache costs and saves
when decoding.

    python -m paper.table4                          the embedded default model
    python -m paper.table4 --shape llama2-7b        a paper's model with random weights: no download, for a bare GPU
    python -m paper.table4 --vs transformers        beside the `transformers` package, its quantized caches too

Read top to bottom: how time is taken; Table 4; its cost against n; decoding; the comparison with
another implementation; the command.

What this file does not do: it measures no quality, which is eval_ppl.py's business. A time is the
median of repeats, with the fastest and the slowest, and warming up is not counted. What is compared
alternates: the two prefills, the k, the two implementations. Only caches of several widths follow
one another, because together they might not fit.
"""

import functools
import json
import statistics
import time
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import kvsink
from eval_ppl import negative_log_likelihood
from llama import Llama, LlamaConfig
from paper import generate
from paper.kvcache import BlockCache, FullPrecisionStore, KVCache, cache_bytes
from paper.shapes import SHAPES, random_model, shape
from support import cli, hub
from support.cache import save

# --------------------------------------------------------------------------------------------------
# Time


class Time(NamedTuple):
    """Of one thing done once, in milliseconds."""

    median: float
    fastest: float
    slowest: float

    def __str__(self):
        digits = 1 if self.median >= 10 else 3
        return f"{self.median:.{digits}f} ({self.fastest:.{digits}f}-{self.slowest:.{digits}f})"


def measure(benchmarks, repeats, device, times=1):
    """name -> Time of the work of that name, done `times` times in a row and divided. The first
    round is warming up, in which compiling falls. The benchmarks alternate, so that a slow spell of
    the machine meets all of them."""
    taken = {name: [] for name in benchmarks}
    for i in tqdm(
        range(repeats + 1),
        desc=str(next(iter(benchmarks))),
        unit="round",
        leave=False,
        disable=None,
    ):
        for name, work in benchmarks.items():
            took = once(functools.partial(several, work, times), device) / times
            if i:
                taken[name].append(took)
    return {name: Time(statistics.median(ms), min(ms), max(ms)) for name, ms in taken.items()}


def several(work, times):
    for _ in range(times):
        work()


def once(work, device):
    """Milliseconds: on a GPU between two of its events, else by the clock."""
    if not device.startswith("cuda"):
        wait = torch.mps.synchronize if device.startswith("mps") else lambda: None
        wait()
        start = time.perf_counter()
        work()
        wait()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


# --------------------------------------------------------------------------------------------------
# Table 4


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured, and how often."""

    seq_len: int  # tokens of the prefill
    n: tuple[int, ...]  # tokens in the cache when decoding
    bits: tuple[int, ...]
    repeats: int
    scheme: str


KEPT = (1, 5, 20)  # k of Table 4
# As printed: model -> prefill time in ms, what KVSink-k adds in ms; memory in MB at 2 bits, what
# KVSink-k adds in MB
PAPER_TABLE_4 = {
    "llama2-7b": (676.78, (0.04, 0.04, 0.05), 256, (0.5, 2.5, 10)),
    "llama2-13b": (1090.70, (0.04, 0.05, 0.05), 400, (0.78, 3.91, 15.63)),
    "llama2-70b": (4481.05, (0.04, 0.05, 0.05), 160, (0.31, 1.56, 6.25)),
    "mistral-7b": (686.32, (0.04, 0.05, 0.05), 64, (0.13, 0.63, 2.5)),
    "llama3-8b": (707.95, (0.04, 0.05, 0.05), 64, (0.13, 0.63, 2.5)),
    "llama3.2-3b": (430.74, (0.04, 0.05, 0.05), 56, (0.11, 0.55, 2.19)),
}


def table_4_memory(config, n=4096, bits=2):
    """Table 4's memory, computed, as printed (its MB are 2^20 bytes): without KVSink, and what each
    of KEPT adds."""
    without = cache_bytes(config, n, bits)
    return [
        printed(size / 2**20)
        for size in (without, *(cache_bytes(config, n, bits, k) - without for k in KEPT))
    ]


def printed(x):
    """To two places, halves rounded up, without trailing zeros."""
    digits = str(Decimal(x).quantize(Decimal("0.01"), ROUND_HALF_UP))
    return digits.rstrip("0").rstrip(".")


def quantizers(model, bits, scheme):
    """Those of a scheme at some width (16: full precision), calibrated with noise where they are
    static."""
    if bits == 16:
        return kvsink.full_precision_cache(model)
    config, device = model.config, model.embedding.weight.device
    cache = kvsink.rtn_cache(model, scheme, bits, min(128, config.head_dim))
    for quantizer in (quantizer for pair in cache for quantizer in pair if quantizer.static):
        quantizer.calibrate(
            torch.randn(1, config.num_key_value_heads, 64, config.head_dim, device=device)
        )
    return cache


def prefill_benchmarks(model, sizes, step):
    """What Table 4 times, by name: the prefill of n tokens into a cache in full precision and in 2
    bits; and lines 14-16 of Algorithm 1 alone, for each k."""
    config, device, n = model.config, model.embedding.weight.device, sizes.seq_len
    tokens = torch.randint(config.vocab_size, (n,), device=device).tolist()
    l_E, c = 1, config.hidden_size // 2  # any will do: the work is the same
    H = torch.randn(1, n, config.hidden_size, device=device, dtype=model.embedding.weight.dtype)

    def prefill(cache, keep, N):
        generate.prefill(model, cache, [tokens], keep, N, kvsink.Site(l_E, c), step)

    full = KVCache(model, kvsink.full_precision_cache(model), n)
    packed = KVCache(model, quantizers(model, 2, sizes.scheme), n, k=5)
    prefills = {
        "prefill, full precision": functools.partial(prefill, full, "none", 0),
        "prefill, 2 bits, KVSink-5": functools.partial(prefill, packed, "kvsink", 5),
    }
    return prefills, {
        f"lines 14-16, k = {k}": functools.partial(kvsink.predict_sinks, H, c, k) for k in KEPT
    }


def table_4(name, model, sizes, step):
    """Table 4 of one model: prints it, and yields a record of each thing measured."""
    n, repeats, device = sizes.seq_len, sizes.repeats, str(model.embedding.weight.device)
    prefills, lines = prefill_benchmarks(model, sizes, step)
    times = measure(prefills, repeats, device) | measure(lines, repeats, device, times=100)
    for what, time_ in times.items():
        yield {"what": what, "n": n, "unit": "ms", **time_._asdict()}
    measured = [KVCache(model, quantizers(model, 2, sizes.scheme), n, k=k).bytes() for k in KEPT]
    for k, size in zip(KEPT, measured):
        computed = cache_bytes(model.config, n, 2, k)
        yield {
            "what": f"cache, 2 bits, k = {k}",
            "n": n,
            "unit": "bytes",
            "measured": size,
            "computed": computed,
        }
    full, packed = (times[what] for what in prefills)
    print_table_4(name, model.config, n, full, [times[what].median for what in lines], measured)
    share = max(times[what].median for what in lines) / full.median
    print(
        f"lines 14-16 take at most {100 * share:.4f} % of the prefill, which with KVSink-5 into the 2-bit cache takes "
        f"{packed} ms, {packed.median / full.median:.3f} times as long"
    )


def print_table_4(name, config, n, prefill, added, measured):
    """`prefill` is a Time; of each of KEPT `added` has the milliseconds, `measured` the bytes of
    the whole cache."""
    (without, *added_MB), paper = table_4_memory(config, n), PAPER_TABLE_4.get(name)
    print(f"\nTable 4: {name}, {n} tokens; time in ms, memory in MB of 2^20 bytes")
    top, head = f"{'':12}{'prefill time':>46}{'KV cache memory, 2 bits':>44}", f"{'':12}"
    head += f"{'w/o KVSink':>28}{'+ KVSink':>18}{'w/o KVSink':>16}{'+ KVSink':>12}{'measured':>16}"
    if paper:
        top, head = top + f"{'4 x A100 (paper)':>36}", head + f"{'time':>20}{'memory':>16}"
    print(top)
    print(head)
    for i, k in enumerate(KEPT):
        cells = f"KVSink-{k:<5}{str(prefill) if i == 0 else '':>28}{f'+ {added[i]:.4f}':>18}"
        cells += (
            f"{without if i == 0 else '':>16}{f'+ {added_MB[i]}':>12}{measured[i] / 2**20:>16.2f}"
        )
        if paper:
            paper_ms, paper_added_ms, paper_MB, paper_added_MB = paper
            cells += f"{f'{paper_ms} + {paper_added_ms[i]}':>20}{f'{paper_MB} + {paper_added_MB[i]}':>16}"
        print(cells)


def cost_against_n(model, sizes):
    """Lines 14-16 for more and more tokens: prints a line for each n, and yields a record of each
    time."""
    device, dtype = str(model.embedding.weight.device), model.embedding.weight.dtype
    print(f"\nlines 14-16 alone, ms\n{'n':>8}" + "".join(f"{f'KVSink-{k}':>26}" for k in KEPT))
    for n in sizes.n:
        H = torch.randn(1, n, model.config.hidden_size, device=device, dtype=dtype)
        benchmarks = {k: functools.partial(kvsink.predict_sinks, H, 0, k) for k in KEPT}
        times = measure(benchmarks, sizes.repeats, device, times=100)
        print(f"{n:>8}" + "".join(f"{times[k]!s:>26}" for k in KEPT))
        for k in KEPT:
            yield {"what": f"lines 14-16, k = {k}", "n": n, "unit": "ms", **times[k]._asdict()}


# --------------------------------------------------------------------------------------------------
# Decoding


def noise_cache(model, bits, n, scheme):
    """A cache of n tokens of noise, of which one is to be written again and again."""
    cache = KVCache(model, quantizers(model, bits, scheme), n, k=0 if bits == 16 else 5)
    fill_with_noise(cache.blocks)
    return cache


def fill_with_noise(blocks):
    for store in (store for block in blocks for store in (block.K, block.V)):
        store.X.normal_() if isinstance(store, FullPrecisionStore) else store.codes.random_(0, 256)


def one_token(model, cache, step):
    """Decode the last token but one of n, by which no group of tokens becomes full."""
    cache.at.fill_(cache.n - 2)
    cache.lengths = [cache.n - 2]
    generate.decode(model, cache, torch.zeros(1, dtype=torch.int64, device=cache.at.device), step)


def peak_memory(device, reset=False):
    """Bytes in use at most since the last reset: of the GPU by torch's tensors, else of the whole
    process (Linux)."""
    if device.startswith("cuda"):
        return (
            torch.cuda.reset_peak_memory_stats(device)
            if reset
            else torch.cuda.max_memory_allocated(device)
        )
    try:
        if reset:
            return Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(
            (1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None
        )
    except OSError:
        return None


def decoding(model, sizes, step):
    """Tokens a second and memory at each n and width: prints a line for each, and yields its
    record. "full" is the model's own dtype, by PyTorch's own attention."""
    device, dtype = str(model.embedding.weight.device), model.embedding.weight.dtype
    head = f"\ndecoding one sequence\n{'n':>8}{'bits':>8}{'tokens/s':>10}{'ms a token':>28}{'against full':>14}"
    print(head + f"{'cache, MiB':>12}{'computed':>10}{'peak, GiB':>11}")
    for n in sizes.n:
        full = None
        for bits in (16, *sizes.bits):
            width, k = (8 * dtype.itemsize, 0) if bits == 16 else (bits, 5)
            computed, free = cache_bytes(model.config, n, width, k), cli.free_memory(device)
            if computed * 1.1 > free:
                print(
                    f"{n:>8}{bits:>8}  not run: it takes {cli.format_bytes(computed)}, of {cli.format_bytes(free)} free"
                )
                continue
            cache = noise_cache(model, bits, n, sizes.scheme)
            peak_memory(device, reset=True)
            time_ = measure(
                {bits: functools.partial(one_token, model, cache, step)}, sizes.repeats, device
            )[bits]
            full, peak, size = time_ if bits == 16 else full, peak_memory(device), cache.bytes()
            yield {"what": "decode", "n": n, "bits": bits, "unit": "ms", **time_._asdict()} | {
                "cache": size, "computed": computed, "peak": peak}  # fmt: skip
            ratio = full.median / time_.median if full else float("nan")
            cells = f"{n:>8}{bits if bits < 16 else 'full':>8}{1e3 / time_.median:>10.1f}{time_!s:>28}{ratio:>13.2f}x"
            cells += f"{size / 2**20:>12.1f}{computed / 2**20:>10.1f}"
            print(cells + f"{f'{peak / 2**30:.2f}' if peak else '-':>11}")
            del cache
            if device.startswith("cuda"):
                torch.cuda.empty_cache()  # so that what is free is known


def kernels(model, sizes, compiled):
    """The hot path alone, of one block: Q K^T and p V from packed codes, beside the same in full
    precision as a matrix product. Prints a line for each n and width, and yields its record."""
    config, device, dtype = (
        model.config,
        model.embedding.weight.device,
        model.embedding.weight.dtype,
    )
    h_kv, d_k = config.num_key_value_heads, config.head_dim
    G = config.num_attention_heads // h_kv
    at = torch.zeros(1, 1, dtype=torch.int64, device=device)
    scores, weighted_sum = (
        compiled(lambda K, q: K.scores(q, None, at)),
        compiled(lambda V, p: V.weighted_sum(p)),
    )
    print(f"\none block: Q K^T and p V, ms\n{'n':>8}{'bits':>8}{'Q K^T':>28}{'p V':>28}")
    g = min(128, d_k)
    for n in (-(-n // g) * g for n in sizes.n):  # whole groups of tokens
        q = torch.randn(1, h_kv, G, d_k, device=device)
        p = torch.randn(1, h_kv, G, n, device=device).softmax(-1)
        for bits in (16, *sizes.bits):
            block = BlockCache(
                quantizers(model, bits, sizes.scheme)[0], config, n, 1, 5, False, dtype, device
            )
            fill_with_noise([block])
            K, V = block.K, block.V
            benchmarks = {"Q K^T": lambda: scores(K, q), "p V": lambda: weighted_sum(V, p)}
            if bits == 16:
                benchmarks = {
                    "Q K^T": lambda: q.to(dtype) @ K.X.mT,
                    "p V": lambda: p.to(dtype) @ V.X,
                }
            times = measure(benchmarks, sizes.repeats, str(device), times=20)
            print(
                f"{n:>8}{bits if bits < 16 else 'full':>8}"
                + "".join(f"{times[what]!s:>28}" for what in benchmarks)
            )
            for what in benchmarks:
                yield {"what": what, "n": n, "bits": bits, "unit": "ms", **times[what]._asdict()}


# --------------------------------------------------------------------------------------------------
# The `transformers` package, as its users run it: eager, with scaled_dot_product_attention

LONG = 16384  # tokens, at which decoding is compared, too


def their_model(transformers, name, directory, device, dtype):
    """The same model; where there is no directory, of the shape `name` with random weights."""
    if directory:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    else:
        raw = {key: value for key, value in SHAPES[name].items() if key != "architectures"} | {
            "rms_norm_eps": 1e-5
        }
        kind = "Mistral" if "sliding_window" in raw else "Llama"
        with torch.device(device):
            theirs = getattr(transformers, f"{kind}ForCausalLM")(
                getattr(transformers, f"{kind}Config")(**raw)
            )
    return theirs.to(device, dtype).eval()


def their_caches(transformers, theirs):
    """Yields bits, how a cache of that width is called, and one that is still empty. Says which
    cannot be had."""
    yield 16, "full precision", transformers.DynamicCache(config=theirs.config)
    for backend, axis in (("quanto", 0), ("hqq", 1)):
        for bits in (4, 2):
            try:
                cache = transformers.QuantizedCache(
                    backend, theirs.config, bits, axis_key=axis, axis_value=axis
                )
            except (
                ImportError,
                ValueError,
            ) as error:  # that backend is not installed; Mistral's window
                print(f"{backend} at {bits} bits: not run, {' '.join(str(error).split())}")
                continue
            yield bits, f"{bits} bits against {backend}", cache


def versus_transformers(name, model, directory, sizes, step, nll, decode_step):
    """The same prefill, evaluation of a window, and decoding, alternating; its quantized caches
    beside ours."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--vs transformers needs it: pip install transformers") from None
    n, device = sizes.seq_len, str(model.embedding.weight.device)
    theirs = their_model(transformers, name, directory, device, model.embedding.weight.dtype)
    tokens = torch.randint(model.config.vocab_size, (1, n), device=device)
    full, packed = kvsink.full_precision_cache(model), quantizers(model, 2, sizes.scheme)
    cache = KVCache(model, full, n)

    def our_evaluation(cache):
        H, _ = kvsink.prefill(model, model.embedding(tokens), cache, step=step)
        nll(model, H, tokens).item()

    def their_evaluation():
        logits = theirs(tokens, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()

    pairs = {
        f"prefill of {n} tokens": (
            lambda: generate.prefill(model, cache, tokens.tolist(), step=step),
            lambda: theirs(tokens, use_cache=True, logits_to_keep=1),
        ),
        f"evaluation of {n} tokens": (lambda: our_evaluation(full), their_evaluation),
        f"evaluation of {n} tokens, ours at 2 bits": (
            lambda: our_evaluation(packed),
            their_evaluation,
        ),
    }
    print(
        f"\n{'milliseconds':<44}{'ours':>28}{'transformers ' + transformers.__version__:>28}{'ratio':>8}"
    )

    def beside(what, ours, its):
        times = measure({"ours": ours, "theirs": its}, sizes.repeats, device)
        ratio = times["theirs"].median / times["ours"].median
        print(f"{what:<44}{times['ours']!s:>28}{times['theirs']!s:>28}{ratio:>7.2f}x", flush=True)
        return {"what": what, "unit": "ms", "ratio": ratio} | {
            who: t._asdict() for who, t in times.items()
        }

    for what, (ours, its) in pairs.items():
        yield beside(what, ours, its)
    for m in sorted({n, LONG}):
        for bits, what, its_cache in their_caches(transformers, theirs):
            shape = (1, model.config.num_key_value_heads, m, model.config.head_dim)
            for l in range(
                model.config.num_hidden_layers
            ):  # noise: its prefill of 16,384 tokens would take minutes
                K, V = torch.randn(2, *shape, device=device, dtype=model.embedding.weight.dtype)
                its_cache.update(K, V, l)
            ours = functools.partial(
                one_token, model, noise_cache(model, bits, m, sizes.scheme), decode_step
            )
            its = functools.partial(theirs, tokens[:, :1], past_key_values=its_cache)
            yield beside(f"decoding at {m}, {what}", ours, its)


# --------------------------------------------------------------------------------------------------
# The command

PARTS = ("table4", "cost", "decode", "kernel")


# fmt: off
def parse_arguments(argv):
    parser = cli.Parser(prog="python -m paper.table4",
        description="Table 4, and what a packed cache costs and saves when decoding.")
    which = parser.add_mutually_exclusive_group()
    cli.add_model_options(which.add_argument)
    which.add_argument("--shape", choices=SHAPES, help="a paper's model with random weights")
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS[:3], help="parts of it; kernel is the hot path alone "
        "(default: table4 cost decode)")
    add("--seq-len", type=cli.number(32, 2**24), default=4096, help="tokens of the prefill (default: %(default)s)")
    add("--n", nargs="+", type=cli.number(32, 2**24), default=[1024, 4096, 16384, 65536],
        help="tokens in the cache when decoding, may be beyond the model's context (default: %(default)s)")
    add("--bits", nargs="+", type=int, choices=(1, 2, 3, 4, 8), default=[8, 4, 3, 2, 1], help="(default: %(default)s)")
    add("--scheme", choices=kvsink.SCHEMES, default="channel-static", help="as in eval_ppl.py (default: %(default)s)")
    add("--vs", choices=["transformers"], help="beside another implementation, and nothing else; decodes "
        "at --seq-len and at 16,384 tokens")
    add("--repeats", type=cli.number(1), default=5, help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write what was measured")
    cli.add_machine_options(add)
    return parser.parse_args(argv)
# fmt: on


def parse(argv):
    """What `run` takes. Raises ValueError for options that cannot be."""
    args = parse_arguments(argv)
    cli.check_file(args.json)
    sizes = BenchmarkConfig(
        args.seq_len, tuple(args.n), tuple(args.bits), args.repeats, args.scheme
    )
    return (
        args.shape or args.model,
        bool(args.shape),
        cli.machine(args),
        sizes,
        [args.vs] if args.vs else args.only,
        args.json,
    )


def run(name, random, machine, sizes, parts, json_file):
    """Each part of `parts`, of the model `name` or, with `random`, of its shape with random
    weights."""
    directory = None
    if machine.device.startswith("cuda"):
        torch.cuda.set_device(machine.device)  # whose events take the time
    if random:
        model = random_model(shape(name), machine.device, machine.torch_dtype)
    else:
        directory = hub.model_directory(name)
        context = LlamaConfig.from_pretrained(directory).max_position_embeddings
        if sizes.seq_len > context and {"table4", "transformers"} & {*parts}:
            raise ValueError(f"--seq-len {sizes.seq_len} is above the model's context, {context}")
        model = Llama.from_pretrained(directory, machine.device, machine.torch_dtype)
    card = (
        torch.cuda.get_device_name(machine.device)
        if machine.device.startswith("cuda")
        else machine.device
    )
    step, nll = machine.compiled(kvsink.decoder_block), machine.compiled(negative_log_likelihood)
    decode_step = machine.compiled(generate.decode_block, **generate.FUSE)
    compiled = step is not kvsink.decoder_block  # where there is a compiler
    how = f"{machine.dtype}, {'compiled' if compiled else 'eager'}, torch {torch.__version__}"
    print(f"{name} on {card}, {how}; median of {sizes.repeats} (fastest-slowest)")
    measured = {
        "table4": lambda: table_4(name, model, sizes, step),
        "cost": lambda: cost_against_n(model, sizes),
        "decode": lambda: decoding(model, sizes, decode_step),
        "kernel": lambda: kernels(
            model, sizes, lambda function: machine.compiled(function, **generate.FUSE)
        ),
        "transformers": lambda: versus_transformers(
            name, model, directory, sizes, step, nll, decode_step
        ),
    }
    here, records = (
        {"model": name, "device": card, "dtype": machine.dtype, "compiled": compiled},
        [],
    )
    for part in parts:
        for record in measured[part]():
            records.append(here | record)
            if json_file:
                save(json_file, json.dumps(records, indent=1).encode())


def main(argv=None):
    advice = "lower --n or --seq-len, or take a smaller --shape"
    return cli.run_command("paper.table4", lambda: run(*parse(argv)), advice)


if __name__ == "__main__":
    cli.exit_process(main())
