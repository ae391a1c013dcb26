"""Models larger than the machine: the blocks are read one by one, and everything goes through each.

Algorithm 1 takes a sequence through all blocks, so all blocks have to be in memory. Nothing in block l depends on what
another sequence does, so the two loops can change places: all windows of all rows go through block 1, its weights are
dropped, then all go through block 2. In memory are one block, what one window needs in it, and the hidden states, in
host memory or on disk. Static ranges of block l are calibrated right before they are used in it. Each number comes of
the same operations in the same order, so it is the same to the last digit.

Read top to bottom: what memory there is; the hidden states and where they lie; the pass; what is said before it.

What this file does not do: a block is llama.py's (`StreamedBlocks`), what happens in it is kvsink.py's. Rows, their
windows and their perplexity are eval_ppl.py's.
"""

import functools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import hub
import kvsink
from llama import rope_table
from quant import NotFinite

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# ---------------------------------------------------------------------------------------------------------------------
# Memory


def free_memory(device):
    """How many bytes can still be had: of a GPU's own memory, else of the host's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # not Linux, which alone says what is free: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def amount(size):
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def out_of_memory(error):
    """In words, what was asked for and what there is, where an error says that memory was short; else None."""
    said = re.search(r"out of memory|can(no|')t allocate memory", str(error))  # a GPU's allocator, the host's
    if not (isinstance(error, MemoryError) or isinstance(error, RuntimeError) and said):
        return None
    gpu = re.search(r"GPU (\d+) has", str(error))
    free = amount(free_memory(f"cuda:{gpu[1]}" if gpu else "cpu"))
    asked = re.search(r"allocate ([\d.]+) ?([KMGTP]i?B|bytes)", str(error))
    asked = asked and (amount(int(asked[1])) if asked[2] == "bytes" else f"{asked[1]} {asked[2]}")
    return f"out of memory: {asked or 'more'} was asked for, {free} are free{f' on GPU {gpu[1]}' if gpu else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# The hidden states and where they lie


def in_memory(shape, dtype):
    """A tensor in host memory. Raises ValueError where there is no room for it."""
    needed = math.prod(shape) * dtype.itemsize
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun: every rank on this machine takes as much
    check_room(needed, free_memory("cpu"), "host memory", "give --stream a --scratch folder on a disk, or lower")
    if dist.is_initialized():
        dist.barrier()  # before one rank fills its room, and another sees less than is there for both
    return torch.empty(shape, dtype=dtype)


def on_disk(folder, names, shape, dtype):
    """Tensors whose numbers lie in files; what is in them already stays. Raises ValueError where there is no room."""
    size, paths = math.prod(shape) * dtype.itemsize, [folder / name for name in names]
    needed = size * len(paths) - sum(path.stat().st_size for path in paths if path.exists())
    check_room(needed, shutil.disk_usage(folder).free, folder, "name a --scratch folder on another disk, or lower")
    for path in paths:
        with open(path, "a+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 1))  # a disk filled by others is an error now, not later
            else:
                file.truncate(size)
    return [torch.from_file(str(path), True, math.prod(shape), dtype=dtype).view(shape) for path in paths]


def check_room(needed, free, where, advice):
    if needed > free:
        raise ValueError(
            f"the hidden states take {amount(needed)} of {where}, where {amount(free)} are free: {advice} --limit, "
            "--seq-len, --calib-windows or the number of rows"
        )


class States:
    """H^l of S windows of n tokens, while the blocks go by: in host memory, or in files of a folder.

    H        where H^l lies, (S, n, d): one room; on disk two in turn, so that H^{l-1} is whole until H^l is
    column   of H^{l_E}, channel c, (S, n): all that Algorithm 1 needs of it later
    seconds  what each window took so far, (S,)
    done     how many blocks were done when an earlier run with the same folder and the same `made_with` was killed

    Raises ValueError where there is no room, where the folder is another run's (`made_with`, a str, is all that the
    hidden states depend on), or where a run is at work in it.
    """

    ROOMS = ("H0", "H1", "column", "seconds", "kvquant")

    def __init__(self, folder, made_with, S, n, d, dtype):
        self.folder, self.made_with, self.done = folder, made_with, 0
        if folder:
            self.claim()
        try:
            self.H = on_disk(folder, ["H0", "H1"], (S, n, d), dtype) if folder else [in_memory((S, n, d), dtype)]
            self.column = self.room("column", (S, n), dtype)
            self.seconds = self.room("seconds", (S,), torch.float64)
        except (ValueError, OSError):
            if not self.done:
                self.remove()
            raise

    def claim(self):
        """Take the folder for this run, and see how far it was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a")  # held until the process ends, however it ends
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another run is at work in this folder") from None
        there, made_with = [(self.folder / name).exists() for name in self.ROOMS[:4]], None
        try:
            progress = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
            made_with, self.done = progress["made_with"], progress["blocks"] if all(there) else 0
        except FileNotFoundError:
            made_with = None if any(there) else self.made_with
        except (ValueError, LookupError, TypeError):
            pass
        if made_with != self.made_with:
            raise ValueError(
                f"{self.folder} holds the hidden states of a run with other settings, and is left as it is: end that "
                "run with its own command, name another --scratch, or delete the folder"
            )
        self.finish(self.done)  # from now on it is ours

    def room(self, name, shape, dtype):
        return on_disk(self.folder, [name], shape, dtype)[0] if self.folder else in_memory(shape, dtype)

    def get(self, l, s, device):
        """H^l of the s-th window on a device, (1, n, d); a copy, which lies in memory as a result would."""
        return self.H[l % len(self.H)][s].to(device, copy=True)[None]

    def put(self, l, s, H):
        self.H[l % len(self.H)][s] = H[0]

    def finish(self, l):
        """Block l is done. On disk that is said when it is all there, so that it is true after a power cut, too."""
        if self.folder:
            for path in (self.folder / name for name in self.ROOMS):
                if path.exists():
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
            progress = json.dumps({"made_with": self.made_with, "blocks": l}).encode()
            hub.write_atomically(self.folder / "progress.json", progress)

    def remove(self, names=(*ROOMS, "progress.json", "lock")):
        """Delete files of ours, and the folder where nothing else is in it."""
        if self.folder:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# The pass


class Job(NamedTuple):
    """One row of a table: Algorithm 1 with one cache and one rule of preservation."""

    label: str
    keep: str
    N: int
    cache: list  # as kvsink.prefill takes it
    bits: int | None  # of a static cache, which jobs of several widths share and which the pass calibrates; else None
    pre_rope: bool

    def quantizers(self, l):
        """quantize_K and quantize_V of block l, once it is calibrated."""
        return kvsink.with_bits(self.cache[l - 1 : l], self.bits)[0] if self.bits else self.cache[l - 1]


class Task(NamedTuple):
    """One window on its way through the blocks; the s-th task has the s-th of the hidden states."""

    job: int | None  # its number, None where the window calibrates
    label: str
    window: torch.Tensor  # (n,)
    through: Callable  # l, block, H^{l-1} (1, n, d), s -> H^l


def tasks(model, tokens, jobs, calibration, static, site, step, states, pre_rope):
    """A Task for every window of the calibration, and then for every window of every job.

    tokens        windows (count, n) of token ids
    calibration   windows (count, n) that calibrate the `static` caches, each (keep, N, cache) as kvsink.calibrate's
    step          kvsink.decoder_block, eager or compiled
    """
    device = model.embedding.weight.device
    rope = rope_table(model.config, tokens.shape[1], device)

    def S_sink(keep, N, l, H, s):
        """What a rule keeps in block l: of KVSink's nothing up to l_E, then lines 15-16 of Algorithm 1."""
        if keep == "kvsink" and l > site.l_E:
            return kvsink.predict_sinks(states.column[s].to(device)[None, :, None], 0, N)
        return kvsink.pfn(H, N if keep == "pfn" else 0)

    def calibrate(l, block, H, s):
        S_sinks = [S_sink(keep, N, l, H, s) for keep, N, _ in static]
        return kvsink.calibrate_block(l, block, H, S_sinks, static, rope, pre_rope)

    def run(l, block, H, s, job):
        try:
            return step(block, H, S_sink(job.keep, job.N, l, H, s), *job.quantizers(l), rope, job.pre_rope)
        except NotFinite:  # what the quantizer says, eager
            return H * math.nan

    made = [Task(None, "calibrating", window, calibrate) for window in calibration]
    for j, job in enumerate(jobs):
        made += [Task(j, job.label, window, functools.partial(run, job=job)) for window in tokens]
    return made


def carry(model, work, site, states, quiet=None):
    """All tasks through all blocks that are not done; `states` then hold H^L. Raises NotFinite, naming the block, where
    a hidden state is not finite."""
    device, L = model.embedding.weight.device, len(model.blocks)
    start = done_by_all(states.done, device)
    states.finish(start)
    if start == 0:
        states.seconds.zero_()
        for s, task in enumerate(work):
            states.put(0, s, model.embedding(task.window[None].to(device)))  # H^0
    with tqdm(total=(L - start) * len(work), unit="window", leave=False, disable=quiet) as bar:
        for l, block in enumerate(model.blocks.walk(range(start, L)), start + 1):
            for s, task in enumerate(work):
                bar.set_description(f"block {l}/{L}, {task.label}", refresh=False)
                began = time.perf_counter()
                H = task.through(l, block, states.get(l - 1, s, device), s)
                if not torch.isfinite(H).all():
                    where = f"{task.label}: NaN or inf first appeared in block {l} of {L}, counted from 1"
                    raise NotFinite(f"{where}; is --dtype wide enough?")
                if l == site.l_E:
                    states.column[s] = H[0, :, site.c]
                states.put(l, s, H)
                states.seconds[s] += time.perf_counter() - began
                bar.update()
            states.finish(l)
            done_by_all(l, device)  # no rank is two blocks ahead: each still has the H^l of the slowest


def done_by_all(l, device):
    """The number of blocks that every rank has done; they wait for each other here."""
    if not dist.is_initialized():
        return l
    least = torch.tensor(l, device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def totals(model, work, jobs, nll, states):
    """Of each job the sum of `nll`, the negative log-likelihood, over its windows in order, and how many tokens that
    predicts, (jobs, 2) in float64; and the seconds it took, (jobs,). Raises NotFinite where a sum is not."""
    device = model.embedding.weight.device
    sums, seconds = torch.zeros(len(jobs), 2, dtype=torch.float64), torch.zeros(len(jobs))
    for s, task in enumerate(work):
        if task.job is not None:
            H = states.get(len(model.blocks), s, device)
            loss = nll(model, H, task.window[None].to(device)).item()
            if not math.isfinite(loss):
                where = f"{task.label}: NaN or inf first appeared in the output layer"
                raise NotFinite(f"{where}; is --dtype wide enough?")
            sums[task.job] += torch.tensor([loss, len(task.window) - 1])
            seconds[task.job] += states.seconds[s]
    return sums, seconds


# ---------------------------------------------------------------------------------------------------------------------
# What is said before a run


def device_memory(config, n, itemsize):
    """About how many bytes a run takes on the device: what is outside the blocks, and the most of one block with what
    one window of n tokens needs in it, and the output layer."""
    d, d_ffn, d_k = config.hidden_size, config.intermediate_size, config.head_dim
    heads, vocab = config.num_attention_heads, config.vocab_size
    block = 2 * (heads + config.num_key_value_heads) * d_k * d + 3 * d * d_ffn + 2 * d
    inside = n * (40 * heads * d_k + 3 * d_ffn * itemsize)  # Q, K, V in fp32, turned, in codes; X_d.in and its factors
    logits = n * vocab * (itemsize + 8)  # and in fp32, and their softmax
    outside = vocab * d * (1 if config.tie_word_embeddings else 2)
    return outside * itemsize + max(block * itemsize + inside, logits)


def trial(model, window):
    """Seconds to read a block, and to take a window (n,) through it: the first, once; what comes out is dropped."""
    H = model.embedding(window[None].to(model.embedding.weight.device))
    rope, began = rope_table(model.config, H.shape[1], H.device), time.perf_counter()
    for block in model.blocks:
        block(H, rope).sum().item()  # waits for the device; weights that are mapped are read only now
        first, began = time.perf_counter() - began, time.perf_counter()
        block(H, rope).sum().item()
        again = time.perf_counter() - began
        return max(first - again, 0.0), again


def announce(model, window, S, states, kvquant):
    """On stderr: what memory a run will take, and about how long, for S windows as long as `window`. KVQuant is first
    calibrated on `kvquant` windows, how many of how many tokens: forwards, and backwards at three times the cost."""
    L, n, weight, (count, n_kvquant) = len(model.blocks), len(window), model.embedding.weight, kvquant
    read, computed = trial(model, window)
    windows = (L - states.done) * S + L * 4 * count * n_kvquant / n
    read, computed = read * (L - states.done), computed * windows
    where = f"in {states.folder}" if states.folder else "in host memory"
    first = amount((L + 1) * count * n_kvquant * weight.shape[1] * weight.dtype.itemsize)
    print(
        f"streaming: {S} windows through blocks {states.done + 1} to {L}; {amount(sum(H.nbytes for H in states.H))} of "
        f"hidden states {where}{' a rank' if dist.is_initialized() else ''}"
        f"{f', and {first} while KVQuant is calibrated' if count else ''}, about "
        f"{amount(device_memory(model.config, n, weight.dtype.itemsize))} on {weight.device} for a block and a window; "
        f"about {clock(read + computed)} ({clock(read)} to read, {clock(computed)} to compute); if it is killed, "
        f"{'the same command goes on' if states.folder else 'it starts over (--scratch FOLDER would go on)'}",
        file=sys.stderr,
    )


def clock(seconds):
    """In words, to two digits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"
