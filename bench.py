"""Speed and memory: Table 4, and what a packed cache costs and saves when decoding.

    python bench.py                          the embedded default model
    python bench.py --shape llama2-7b        a paper's model with random weights: no download, for a bare GPU
    python bench.py --vs transformers        beside the `transformers` package, its quantized caches too

Read top to bottom: the paper's models at their true shape; how time is taken; Table 4; the cost against n; decoding;
the comparison with another implementation; the command line.

What this file does not do: random weights say nothing of quality, which is eval_ppl.py's business. A time is the median
of repeats, with the fastest and the slowest, and warming up is not counted. The two prefills, the k, and the two
implementations alternate; caches of several widths, which together might not fit, follow one another.
"""

import functools
import json
import statistics
import sys
import time
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import eval_ppl
import generate
import hub
import kvsink
import stream
from kvcache import KVCache, cache_bytes
from llama import Llama, LlamaConfig

# ---------------------------------------------------------------------------------------------------------------------
# The paper's models at their true shape: what their config.json says

LLAMA2 = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "max_position_embeddings": 4096}
LLAMA2_7B = LLAMA2 | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32}  # fmt: skip
LLAMA3 = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
LLAMA3_8B = LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                      "num_attention_heads": 32}  # fmt: skip
LLAMA31_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA32 = LLAMA3 | {"rope_scaling": LLAMA31_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
                    "max_position_embeddings": 131072}  # fmt: skip
SHAPES = {
    "llama2-7b": LLAMA2_7B,
    "llama2-13b": LLAMA2 | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                            "num_attention_heads": 40},
    "llama2-70b": LLAMA2 | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                            "num_attention_heads": 64, "num_key_value_heads": 8},
    "llama2-7b-chat": LLAMA2_7B,
    "mistral-7b": {"architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
                   "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096},
    "llama3-8b": LLAMA3_8B | {"max_position_embeddings": 8192},
    "llama3.1-8b-instruct": LLAMA3_8B | {"max_position_embeddings": 131072, "rope_scaling": LLAMA31_ROPE},
    "llama3.2-1b": LLAMA32 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                              "num_attention_heads": 32, "head_dim": 64},
    "llama3.2-3b": LLAMA32 | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                              "num_attention_heads": 24, "head_dim": 128},
}  # fmt: skip


def shape(name):
    """The configuration of one of the paper's models."""
    return LlamaConfig.from_dict({"rms_norm_eps": 1e-5} | SHAPES[name])


def random_model(config, device, dtype):
    """A model of that shape whose weights are noise, made on the device. Raises ValueError where it does not fit."""
    with torch.device("meta"):
        model = Llama(config)
    size = torch.finfo(dtype).bits // 8 * sum(weight.numel() for weight in model.parameters())
    if size > (free := stream.free_memory(device)):
        raise ValueError(f"the weights take {stream.amount(size)}, and {stream.amount(free)} are free on {device}: "
                         "take a smaller --shape, or --dtype float16")  # fmt: skip
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    if config.tie_word_embeddings:
        model.W_vocab.weight = model.embedding.weight
    for weight in model.parameters():
        weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, 0.02)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Time


class Time(NamedTuple):
    """Of one thing done once, in milliseconds."""

    median: float
    fastest: float
    slowest: float

    def __str__(self):
        digits = 1 if self.median >= 10 else 3
        return f"{self.median:.{digits}f} ({self.fastest:.{digits}f}-{self.slowest:.{digits}f})"


def measure(works, repeats, device, times=1):
    """name -> Time of the work of that name, done `times` times in a row and divided. After one round of warming up, in
    which compiling falls, the works alternate, so that a slow spell of the machine meets all of them."""
    taken = {name: [] for name in works}
    for i in tqdm(range(repeats + 1), desc=str(next(iter(works))), unit="round", leave=False, disable=None):
        for name, work in works.items():
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


# ---------------------------------------------------------------------------------------------------------------------
# Table 4

KEPT = (1, 5, 20)  # k of Table 4
# As printed: model -> prefill time in ms, what KVSink-k adds in ms; memory in MB at 2 bits, what KVSink-k adds in MB
PAPER_TABLE_4 = {
    "llama2-7b": (676.78, (0.04, 0.04, 0.05), 256, (0.5, 2.5, 10)),
    "llama2-13b": (1090.70, (0.04, 0.05, 0.05), 400, (0.78, 3.91, 15.63)),
    "llama2-70b": (4481.05, (0.04, 0.05, 0.05), 160, (0.31, 1.56, 6.25)),
    "mistral-7b": (686.32, (0.04, 0.05, 0.05), 64, (0.13, 0.63, 2.5)),
    "llama3-8b": (707.95, (0.04, 0.05, 0.05), 64, (0.13, 0.63, 2.5)),
    "llama3.2-3b": (430.74, (0.04, 0.05, 0.05), 56, (0.11, 0.55, 2.19)),
}


def table_4_memory(config, n=4096, bits=2):
    """Table 4's memory, computed, as printed (its MB are 2^20 bytes): without KVSink, and what each of KEPT adds."""
    without = cache_bytes(config, n, bits)
    return [printed(size / 2**20) for size in (without, *(cache_bytes(config, n, bits, k) - without for k in KEPT))]


def printed(x):
    """To two places, halves rounded up, without idle zeros."""
    text = str(Decimal(x).quantize(Decimal("0.01"), ROUND_HALF_UP))
    return text.rstrip("0").rstrip(".")


def quantizers(model, bits):
    """Per-channel Keys and per-token Values at some width, static, calibrated with noise (16: full precision)."""
    if bits == 16:
        return kvsink.full_precision_cache(model)
    config, device = model.config, model.embedding.weight.device
    cache = kvsink.rtn_cache(model, "channel-static", bits, min(128, config.head_dim))
    for quantizer in (quantizer for pair in cache for quantizer in pair):
        quantizer.calibrate(torch.randn(1, config.num_key_value_heads, 64, config.head_dim, device=device))
    return cache


def prefill_works(model, n, step):
    """What Table 4 times, by name: the prefill of n tokens into a cache in full precision and in 2 bits; and lines
    14-16 of Algorithm 1 alone, for each k."""
    config, device = model.config, model.embedding.weight.device
    tokens = torch.randint(config.vocab_size, (n,), device=device).tolist()
    l_E, c = 1, config.hidden_size // 2  # any will do: the work is the same
    H = torch.randn(1, n, config.hidden_size, device=device, dtype=model.embedding.weight.dtype)

    def prefill(cache, keep, N):
        generate.prefill(model, cache, [tokens], keep, N, kvsink.Site(l_E, c), step)

    full, packed = KVCache(model, quantizers(model, 16), n), KVCache(model, quantizers(model, 2), n, k=5)
    prefills = {
        "prefill, full precision": functools.partial(prefill, full, "none", 0),
        "prefill, 2 bits, KVSink-5": functools.partial(prefill, packed, "kvsink", 5),
    }
    return prefills, {f"lines 14-16, k = {k}": functools.partial(kvsink.predict_sinks, H, c, k) for k in KEPT}


def table_4(name, model, args, step):
    """Table 4 of one model: prints it, and yields a record of each thing measured."""
    n, config = args.seq_len, model.config
    prefills, lines = prefill_works(model, n, step)
    times = measure(prefills, args.repeats, args.device) | measure(lines, args.repeats, args.device, times=100)
    for what, time_ in times.items():
        yield {"what": what, "n": n, "unit": "ms", **time_._asdict()}
    full, packed = (times[what] for what in prefills)
    without, *added = table_4_memory(config, n)
    measured = [KVCache(model, quantizers(model, 2), n, k=k).bytes() for k in KEPT]
    for k, size in zip(KEPT, measured):
        yield {"what": f"cache, 2 bits, k = {k}", "n": n, "unit": "bytes", "measured": size,
               "computed": cache_bytes(config, n, 2, k)}  # fmt: skip
    paper = PAPER_TABLE_4.get(name)
    print(f"\nTable 4: {name}, {n} tokens; time in ms, memory in MB of 2^20 bytes")
    print(f"{'':12}{'prefill time':>46}{'KV cache memory, 2 bits':>44}" + f"{'4 x A100 (paper)':>36}" * bool(paper))
    print(f"{'':12}{'w/o KVSink':>28}{'+ KVSink':>18}{'w/o KVSink':>16}{'+ KVSink':>12}{'measured':>16}"
          + f"{'time':>20}{'memory':>16}" * bool(paper))  # fmt: skip
    for i, k in enumerate(KEPT):
        line = times[f"lines 14-16, k = {k}"]
        cells = f"KVSink-{k:<5}{str(full) if i == 0 else '':>28}{f'+ {line.median:.4f}':>18}"
        cells += f"{without if i == 0 else '':>16}{f'+ {added[i]}':>12}{measured[i] / 2**20:>16.2f}"
        if paper:
            prefill_ms, added_ms, MB, added_MB = paper
            cells += f"{f'{prefill_ms} + {added_ms[i]}':>20}{f'{MB} + {added_MB[i]}':>16}"
        print(cells)
    share = max(times[what].median for what in lines) / full.median
    print(f"lines 14-16 take at most {100 * share:.4f} % of the prefill, which with KVSink-5 into the 2-bit cache "
          f"takes {packed} ms, {packed.median / full.median:.3f} times as long")  # fmt: skip


def cost_against_n(model, args):
    """Lines 14-16 for more and more tokens."""
    print(f"\nlines 14-16 alone, ms\n{'n':>8}" + "".join(f"{f'KVSink-{k}':>26}" for k in KEPT))
    for n in args.n:
        H = torch.randn(1, n, model.config.hidden_size, device=args.device, dtype=model.embedding.weight.dtype)
        works = {k: functools.partial(kvsink.predict_sinks, H, 0, k) for k in KEPT}
        times = measure(works, args.repeats, args.device, times=100)
        print(f"{n:>8}" + "".join(f"{str(times[k]):>26}" for k in KEPT))
        for k in KEPT:
            yield {"what": f"lines 14-16, k = {k}", "n": n, "unit": "ms", **times[k]._asdict()}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def noise_cache(model, bits, n):
    """A cache of n tokens of noise, of which the last is to be written again and again."""
    cache = KVCache(model, quantizers(model, bits), n, k=0 if bits == 16 else 5)
    for store in (store for block in cache.blocks for store in (block.K, block.V)):
        store.X.normal_() if bits == 16 else store.codes.random_(0, 256)
    return cache


def one_token(model, cache, step):
    """Decode the n-th token of n."""
    cache.at.fill_(cache.n - 1)
    cache.lengths = [cache.n - 1]
    generate.decode(model, cache, torch.zeros(1, dtype=torch.int64, device=cache.at.device), step)


def peak_memory(device, reset=False):
    """Bytes at most in use since the last reset: of the GPU by torch's tensors, else of the whole process (Linux)."""
    if device.startswith("cuda"):
        return torch.cuda.reset_peak_memory_stats(device) if reset else torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            return Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    except OSError:
        return None


def decoding(model, args, step):
    """Tokens a second and memory at each n and width; "full" is the model's own dtype, by PyTorch's own attention."""
    print(f"\ndecoding one sequence\n{'n':>8}{'bits':>8}{'tokens/s':>10}{'ms a token':>28}{'against full':>14}"
          f"{'cache, MiB':>12}{'computed':>10}{'peak, GiB':>11}")  # fmt: skip
    for n in args.n:
        full = None
        for bits in (16, *args.bits):
            width, k = (torch.finfo(model.embedding.weight.dtype).bits, 0) if bits == 16 else (bits, 5)
            computed, free = cache_bytes(model.config, n, width, k), stream.free_memory(args.device)
            if computed * 1.1 > free:
                print(f"{n:>8}{bits:>8}  not run: it takes {stream.amount(computed)}, of {stream.amount(free)} free")
                continue
            cache = noise_cache(model, bits, n)
            peak_memory(args.device, reset=True)
            time_ = measure({bits: functools.partial(one_token, model, cache, step)}, args.repeats, args.device)[bits]
            full, peak = time_ if bits == 16 else full, peak_memory(args.device)
            yield {"what": "decode", "n": n, "bits": bits, "unit": "ms", **time_._asdict(), "cache": cache.bytes(),
                   "computed": computed, "peak": peak}  # fmt: skip
            print(f"{n:>8}{bits if bits < 16 else 'full':>8}{1e3 / time_.median:>10.1f}{str(time_):>28}"
                  f"{full.median / time_.median if full else float('nan'):>13.2f}x"
                  f"{cache.bytes() / 2**20:>12.1f}{computed / 2**20:>10.1f}"
                  f"{f'{peak / 2**30:.2f}' if peak else '-':>11}")  # fmt: skip
            del cache
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()  # so that what is free is known


# ---------------------------------------------------------------------------------------------------------------------
# The `transformers` package, as its users run it: eager, with scaled_dot_product_attention


def versus_transformers(name, model, directory, args, step, nll, decode_step):
    """The same prefill, evaluation of a window, and decoding, alternating; its quantized caches beside ours."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--vs transformers needs it: pip install transformers") from None
    if directory:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, args.dtype))
    else:
        raw = {key: value for key, value in SHAPES[name].items() if key != "architectures"} | {"rms_norm_eps": 1e-5}
        kind = "Mistral" if "sliding_window" in raw else "Llama"
        with torch.device(args.device):
            theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**raw))
    theirs = theirs.to(args.device, getattr(torch, args.dtype)).eval()
    n = args.seq_len
    tokens = torch.randint(model.config.vocab_size, (1, n), device=args.device)

    def our_evaluation(quantizers):
        H, _ = kvsink.prefill(model, model.embedding(tokens), quantizers, step=step)
        nll(model, H, tokens).item()

    def their_evaluation():
        logits = theirs(tokens, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()

    full, packed = quantizers(model, 16), quantizers(model, 2)
    cache = KVCache(model, full, n)
    pairs = {
        f"prefill of {n} tokens": (
            lambda: generate.prefill(model, cache, tokens.tolist(), step=step),
            lambda: theirs(tokens, use_cache=True, logits_to_keep=1),
        ),
        f"evaluation of {n} tokens": (lambda: our_evaluation(full), their_evaluation),
        f"evaluation of {n} tokens, ours at 2 bits": (lambda: our_evaluation(packed), their_evaluation),
    }
    for bits, backend in ((16, None), (4, "quanto"), (2, "quanto"), (4, "hqq"), (2, "hqq")):
        other = transformers.DynamicCache(config=theirs.config)
        if backend:
            axis = {"quanto": 0, "hqq": 1}[backend]
            try:
                other = transformers.QuantizedCache(backend, theirs.config, bits, axis_key=axis, axis_value=axis)
            except (ImportError, ValueError) as error:  # that backend is not installed; Mistral's window
                print(f"{backend} at {bits} bits: not run, {' '.join(str(error).split())}")
                continue
        theirs(tokens, past_key_values=other, logits_to_keep=1)
        what = f"{bits} bits against {backend}" if backend else "full precision"
        pairs[f"decoding at {n}, {what}"] = (
            functools.partial(one_token, model, noise_cache(model, bits, n), decode_step),
            functools.partial(theirs, tokens[:, :1], past_key_values=other),
        )
    print(f"\n{'milliseconds':<44}{'ours':>28}{'transformers ' + transformers.__version__:>28}{'ratio':>8}")
    for what, (ours, its) in pairs.items():
        times = measure({"ours": ours, "theirs": its}, args.repeats, args.device)
        ratio = times["theirs"].median / times["ours"].median
        print(f"{what:<44}{str(times['ours']):>28}{str(times['theirs']):>28}{ratio:>7.2f}x")
        yield {"what": what, "n": n, "unit": "ms", "ratio": ratio} | {who: t._asdict() for who, t in times.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv):
    parser = eval_ppl.Parser(description="Table 4, and what a packed cache costs and saves when decoding.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=hub.DEFAULT_MODEL, help="as in eval_ppl.py (default: %(default)s)")
    which.add_argument("--shape", choices=SHAPES, help="a paper's model with random weights")
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=["table4", "cost", "decode"],
        default=["table4", "cost", "decode"],
        help="parts of it (default: all)",
    )
    add("--seq-len", type=eval_ppl.number(32, 2**24), default=4096, help="tokens of the prefill (default: %(default)s)")
    add(
        "--n",
        nargs="+",
        type=eval_ppl.number(32, 2**24),
        default=[1024, 4096, 16384, 65536],
        help="tokens in the cache when decoding, may be beyond the model's context (default: %(default)s)",
    )
    add("--bits", nargs="+", type=int, choices=(1, 2, 3, 4, 8), default=[8, 4, 3, 2, 1], help="(default: %(default)s)")
    add(
        "--vs",
        choices=["transformers"],
        help="beside another implementation, and nothing else; decodes at --seq-len tokens",
    )
    add("--repeats", type=eval_ppl.number(1), default=5, help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write what was measured")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on cpu, else float16)")
    add("--no-compile", action="store_true", help="run eager, without torch.compile")
    args = parser.parse_args(argv)
    eval_ppl.check_file(args.json)
    eval_ppl.choose_device(args)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)  # whose events take the time
    return args


def run(args):
    name, directory, dtype = args.shape or args.model, None, getattr(torch, args.dtype)
    if args.shape:
        model = random_model(shape(args.shape), args.device, dtype)
    else:
        directory = hub.model_directory(args.model)
        if args.seq_len > (context := LlamaConfig.from_pretrained(directory).max_position_embeddings):
            raise ValueError(f"--seq-len {args.seq_len} is above the model's context, {context}")
        model = Llama.from_pretrained(directory, args.device, dtype)
    card = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    (step, nll), decode_step = eval_ppl.compiled(args), generate.compiled(args)
    compiled = step is not kvsink.decoder_block  # where there is a compiler
    print(f"{name} on {card}, {args.dtype}, {'compiled' if compiled else 'eager'}, torch {torch.__version__}; median "
          f"of {args.repeats} (fastest-slowest)")  # fmt: skip
    parts, here = {
        "table4": lambda: table_4(name, model, args, step),
        "cost": lambda: cost_against_n(model, args),
        "decode": lambda: decoding(model, args, decode_step),
        "vs": lambda: versus_transformers(name, model, directory, args, step, nll, decode_step),
    }, {"model": name, "device": card, "dtype": args.dtype, "compiled": compiled}  # fmt: skip
    if args.vs:
        args.only = ["vs"]
    records = []
    for part in args.only:
        for record in parts[part]():
            records.append(here | record)
            if args.json:
                hub.write_atomically(args.json.resolve(), json.dumps(records, indent=1).encode())


def main(argv=None):
    advice = "lower --n or --seq-len, or take a smaller --shape"
    return eval_ppl.guarded("bench.py", lambda: run(parse_arguments(argv)), advice)


if __name__ == "__main__":
    sys.exit(main())
