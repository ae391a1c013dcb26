"""Models larger than the device: blocks are read from disk one by one, and hidden states stay in
host memory.

No sequence of a batch depends on another. So Algorithm 1 runs over the batch of all windows at once
(kvsink.prefill does not change), and its `step` takes them through a block one at a time, to the
device and back. While one block computes, a thread reads the next. Each number comes from the same
operations in the same order as in memory, so it is the same to the last digit.

Read top to bottom: blocks on disk; the batch on the host; what is announced before a run.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import nn

from llama import locate_weights, read_weights, rope_table, set_weights, tie_output_layer
from support.cache import format_bytes, log
from support.machine import format_duration, free_memory


class BlocksOnDisk(nn.ModuleList):
    """The blocks of a model, with their weights on disk. A loop over them, forwards or backwards,
    loads one block to the device while the next is read. A block taken by its index has no
    weights.

    read    a function that yields names and weights of block l, counted from 0, in host memory
    """

    def __init__(self, blocks, read, device):
        super().__init__(blocks)
        self.read = read
        self.device = device

    def walk(self, order):
        """Yield the blocks in the order of these numbers, which count from 0."""
        with ThreadPoolExecutor(1) as reader:
            next_weights = reader.submit(self.read, order[0])
            for l, next_l in zip(order, [*order[1:], None]):
                weights = next_weights.result()
                if next_l is not None:
                    next_weights = reader.submit(self.read, next_l)
                on_device = ((name, W.to(self.device, non_blocking=True)) for name, W in weights)
                set_weights(self[l], on_device)
                try:
                    yield self[l]
                finally:  # also if the loop is left early
                    self[l].to("meta")

    def __iter__(self):
        return self.walk(range(len(self)))

    def __reversed__(self):
        return self.walk(range(len(self))[::-1])


def from_pretrained(directory, device, dtype):
    """Return the same model as Llama.from_pretrained, with its blocks on disk. Raises the same
    errors, as early."""
    model, places = locate_weights(directory)
    outside_blocks = ("embedding.", "LN_final.", "W_vocab.")
    set_weights(model, read_weights(places, device, dtype, outside_blocks))

    def read(l):
        prefix = f"blocks.{l}."
        weights = []
        for name, W in read_weights(places, "cpu", dtype, (prefix,)):
            # A memory-mapped file is read on first access, so copy it now. A pinned copy goes to a
            # GPU faster, and asynchronously.
            W = W.pin_memory() if "cuda" in str(device) else W.clone()
            weights.append((name.removeprefix(prefix), W))
        return weights

    model.blocks = BlocksOnDisk(model.blocks, read, device)
    return tie_output_layer(model)


# --------------------------------------------------------------------------------------------------
# The batch on the host


def embed(model, tokens):
    """Return H^0 of all windows, (W, n) -> (W, n, d), in host memory. Raises ValueError if it does
    not fit."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun: each rank needs as much
    needed = hidden_bytes(model, tokens) * ranks
    free = free_memory("cpu")
    if needed > free:
        raise ValueError(
            f"the hidden states take {format_bytes(needed)} of host memory, and "
            f"{format_bytes(free)} are free: lower --limit, --seq-len or --calib-windows"
        )
    if dist.is_initialized():
        dist.barrier()  # every rank checks free memory before any of them allocates
    H = torch.empty(*tokens.shape, model.config.hidden_size, dtype=model.dtype)
    for w, window in enumerate(tokens):
        H[w] = model.embedding(window.to(model.device))
    return H


def hidden_bytes(model, tokens):
    return tokens.numel() * model.config.hidden_size * model.dtype.itemsize


def one_at_a_time(step, device):
    """Return a `step` for kvsink.prefill that takes the sequences of a batch on the host through a
    block one by one."""

    def step_on_host(block, H, S_sink, quantize_K, quantize_V, rope):
        rope = [table.to(device) for table in rope]
        for w in range(len(H)):  # H^l takes the place of H^{l-1}
            H_w = H[w : w + 1].to(device, copy=True)  # in memory of its own, as without streaming
            S_w = S_sink[w : w + 1].to(device)
            H[w] = step(block, H_w, S_w, quantize_K, quantize_V, rope)[0]
        return H

    return step_on_host


# --------------------------------------------------------------------------------------------------
# What is announced before a run


def announce(model, tokens, passes):
    """Log the memory that a run takes, and an estimate of its time. `tokens` are the windows of the
    largest pass (W, n), `passes` the number of windows of each pass through all blocks."""
    L = len(model.blocks)
    read_time, window_time = time_block(model, tokens[0])
    # A block is read while another one computes.
    seconds = sum(L * max(read_time, window_time * windows) for windows in passes)
    on_device = device_memory(model.config, tokens.shape[1], model.dtype.itemsize)
    per_rank = " per rank" if dist.is_initialized() else ""
    log(
        f"streaming {L} blocks {len(passes)} times: {format_bytes(hidden_bytes(model, tokens))} of "
        f"hidden states in host memory{per_rank}, about {format_bytes(on_device)} on "
        f"{model.device} for a block and a window; about {format_duration(seconds)} (reading a "
        f"block takes {format_duration(read_time)}, computing a window in it "
        f"{format_duration(window_time)}); if it is killed, rows in the --json file are not run "
        "again"
    )


def time_block(model, window):
    """Return the seconds that it takes to read a block, and to take a window (n,) through it."""
    start = time.perf_counter()
    model.blocks.read(0)
    read_time = time.perf_counter() - start
    H = model.embedding(window[None].to(model.device))
    rope = rope_table(model.config, H.shape[1], model.device)
    for block in model.blocks.walk([0]):
        block(H, rope).sum().item()  # warm-up
        start = time.perf_counter()
        block(H, rope).sum().item()  # waits for the device
    return read_time, time.perf_counter() - start


def device_memory(config, n, itemsize):
    """Return about how many bytes a run takes on the device: the weights outside the blocks, and
    the larger of two: one block and what a window of n tokens needs in it, or the logits of 1,024
    tokens."""
    d = config.hidden_size
    d_ffn = config.intermediate_size
    d_heads = config.num_attention_heads * config.head_dim
    block = 2 * (d_heads + config.d_kv) * d + 3 * d * d_ffn + 2 * d
    # Q, K and V in fp32, rotated, in codes; X_d.in and its two factors.
    inside = n * (40 * d_heads + 3 * d_ffn * itemsize)
    logits = min(n, 1024) * config.vocab_size * (itemsize + 8)  # in fp32 too, and their softmax
    outside = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return outside * itemsize + max(block * itemsize + inside, logits)
