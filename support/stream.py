"""Models larger than the device: blocks come from disk one by one, hidden states lie in host
memory.

Nothing in block l depends on what another sequence does. So Algorithm 1 runs over the batch of all
windows at once (kvsink.prefill does not change), and its `step` takes them through a block one at a
time, to the device and back. While one block computes, a thread reads the next. Each number comes
of the same operations in the same order as in memory, so it is the same to the last digit.

Read top to bottom: blocks on disk; the batch on the host; what is said before a run.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import nn

from llama import locate_weights, read_weights, rope_table, set_weights, tie
from support.cli import duration, format_bytes, free_memory


class BlocksOnDisk(nn.ModuleList):
    """The blocks of a model, their weights on disk. A loop over them, forwards or backwards, has
    one block on the device and the next on its way; by its index a block is there without weights.

    read    a function that gives names and weights of block l, counted from 0, in host memory
    """

    def __init__(self, blocks, read, device):
        super().__init__(blocks)
        self.read, self.device = read, device

    def walk(self, order):
        """The blocks in the order of these numbers, from 0."""
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.read, order[0])
            for l, following in zip(order, [*order[1:], None]):
                weights = coming.result()
                if following is not None:
                    coming = reader.submit(self.read, following)
                set_weights(
                    self[l], ((name, W.to(self.device, non_blocking=True)) for name, W in weights)
                )
                try:
                    yield self[l]
                finally:  # also where the loop is left early
                    self[l].to("meta")

    def __iter__(self):
        return self.walk(range(len(self)))

    def __reversed__(self):
        return self.walk(range(len(self))[::-1])


def from_pretrained(directory, device, dtype):
    """The same model as Llama.from_pretrained's, its blocks on disk. Raises what that raises, as
    early."""
    model, places = locate_weights(directory)
    set_weights(model, read_weights(places, device, dtype, ("embedding.", "LN_final.", "W_vocab.")))

    def read(l):
        prefix, weights = f"blocks.{l}.", []
        for name, W in read_weights(places, "cpu", dtype, (prefix,)):
            # A copy, because a mapped file is read only when somebody looks. A pinned one goes to a
            # GPU in one go.
            weights.append(
                (name.removeprefix(prefix), W.pin_memory() if "cuda" in str(device) else W.clone())
            )
        return weights

    model.blocks = BlocksOnDisk(model.blocks, read, device)
    return tie(model)


def embed(model, tokens):
    """H^0 of all windows, (W, n) -> (W, n, d), in host memory. Raises ValueError where there is no
    room for it."""
    E, ranks = (
        model.embedding.weight,
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )  # torchrun: each rank has as much
    needed, free = hidden_bytes(model, tokens) * ranks, free_memory("cpu")
    if needed > free:
        raise ValueError(
            f"the hidden states take {format_bytes(needed)} of host memory, where {format_bytes(free)} are free: lower --limit, "
            "--seq-len or --calib-windows"
        )
    if dist.is_initialized():
        # before one rank fills its room, and another sees less than is there for both
        dist.barrier()
    H = torch.empty(*tokens.shape, E.shape[1], dtype=E.dtype)
    for w, window in enumerate(tokens):
        H[w] = model.embedding(window.to(E.device))
    return H


def hidden_bytes(model, tokens):
    return tokens.numel() * model.config.hidden_size * model.embedding.weight.dtype.itemsize


def one_at_a_time(step, device):
    """A `step` for kvsink.prefill that takes the sequences of a batch on the host through a block
    one by one."""

    def through(block, H, S_sink, quantize_K, quantize_V, rope, pre_rope):
        rope = [table.to(device) for table in rope]
        for w in range(len(H)):  # H^l takes the place of H^{l-1}
            H_w = H[w : w + 1].to(device, copy=True)  # which lies in memory as a result would
            H[w] = step(
                block, H_w, S_sink[w : w + 1].to(device), quantize_K, quantize_V, rope, pre_rope
            )[0]
        return H

    return through


def announce(model, tokens, passes):
    """On stderr, before a run: the memory that it takes, and about how long. `tokens` are the
    windows of the largest pass (W, n), `passes` the number of windows of each pass through all
    blocks."""
    L, n, E = len(model.blocks), tokens.shape[1], model.embedding.weight
    read, computed = trial(model, tokens[0])
    seconds = sum(
        L * max(read, computed * windows) for windows in passes
    )  # a block is read while one computes
    print(
        f"streaming {L} blocks {len(passes)} times: {format_bytes(hidden_bytes(model, tokens))} of hidden states in host memory"
        f"{' a rank' if dist.is_initialized() else ''}, about {format_bytes(device_memory(model.config, n, E.dtype.itemsize))} "
        f"on {E.device} for a block and a window; about {duration(seconds)} (a block is read in {duration(read)}, a "
        f"window computed in {duration(computed)}); if it is killed, rows in the --json file are not run again",
        file=sys.stderr,
    )


def trial(model, window):
    """Seconds to read a block, and to take a window (n,) through it: the first, and what comes out
    is dropped."""
    device, began = model.embedding.weight.device, time.perf_counter()
    model.blocks.read(0)
    read = time.perf_counter() - began
    H = model.embedding(window[None].to(device))
    rope = rope_table(model.config, H.shape[1], device)
    for block in model.blocks.walk([0]):
        block(H, rope).sum().item()  # the first is slower
        began = time.perf_counter()
        block(H, rope).sum().item()  # waits for the device
    return read, time.perf_counter() - began


def device_memory(config, n, itemsize):
    """About how many bytes a run takes on the device: what is outside the blocks, and the larger of
    two: one block with what a window of n tokens needs in it, or the logits of 1,024 tokens."""
    d, d_ffn, d_k = config.hidden_size, config.intermediate_size, config.head_dim
    heads, vocab = config.num_attention_heads, config.vocab_size
    block = 2 * (heads + config.num_key_value_heads) * d_k * d + 3 * d * d_ffn + 2 * d
    inside = n * (
        40 * heads * d_k + 3 * d_ffn * itemsize
    )  # Q, K, V in fp32, turned, in codes; X_d.in and its factors
    logits = min(n, 1024) * vocab * (itemsize + 8)  # and in fp32, and their softmax
    outside = vocab * d * (1 if config.tie_word_embeddings else 2)
    return outside * itemsize + max(block * itemsize + inside, logits)
