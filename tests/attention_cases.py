"""Run the kernels of paper/attention_kernel.py beside the same attention in PyTorch, on random
caches, and print each case and its error: on a GPU, or in Triton's interpreter if TRITON_INTERPRET
is 1. (Triton reads that variable when it is imported, so test_attention_kernel.py runs this as a
process of its own.)"""

import itertools
import json

import torch
import triton.language as tl

from kvsink import SCHEMES
from paper import attention_kernel
from paper.kvcache import CacheShape, FullPrecisionBlockCache, PackedBlockCache, as_bytes
from quant import Quantizer

GPU = torch.cuda.is_available()
# b, h, h_kv, d_k, window: LLaMA-2 and 3, a batch, eight queries and a window, an odd head
SHAPES = ((1, 2, 2, 128, None), (2, 8, 2, 64, None), (1, 8, 1, 64, 100), (1, 2, 1, 80, None))
N = 256
M = 201  # tokens of the prompt: three groups of 64 and a part of one


def cases():
    """Return (scheme, bits, shape): all schemes and shapes at 3 bits, which are two planes; each
    other width once; full precision."""
    others = zip((*SCHEMES, "channel-static"), (1, 2, 4, 8, 5), SHAPES[:1] * 5)
    return [
        *itertools.product(SCHEMES, (3,), SHAPES),
        *others,
        *itertools.product(("full",), (16,), SHAPES),
    ]


def error(scheme, bits, shape):
    """Return the norm of the difference between the two results, over the norm of one."""
    draw = torch.Generator().manual_seed(0)
    b, h, h_kv, d_k, window = shape
    device = torch.device("cuda" if GPU else "cpu")
    dtype = torch.float16 if scheme == "full" else torch.float32
    k = 0 if scheme == "full" else 3
    K, V = torch.randn(2, b, h_kv, M, d_k, generator=draw).to(device, dtype)
    Q = torch.randn(b, h, 1, d_k, generator=draw).to(device, dtype)
    K[..., 1] *= 8  # an outlier channel
    shape = CacheShape(b, N, k, h, h_kv, d_k, dtype, device)
    block = FullPrecisionBlockCache(shape)
    if scheme != "full":
        block = PackedBlockCache(quantizers(scheme, bits, d_k, K, V), shape, False)
        # As on a GPU: bytes, of which those of Values have the tokens last in memory.
        block.K.codes = as_bytes(block.K.codes).contiguous()
        block.V.codes = as_bytes(block.V.codes).mT.contiguous().mT
    leave_out = torch.zeros(b, 1, M, 1, dtype=torch.bool, device=device)
    leave_out[:, :, [0, 150, 199][:k]] = True
    leave_out[-1, :, 150] = False  # one sequence keeps fewer
    store_K, store_V = block.storing_quantizers(torch.arange(b, device=device)[:, None])
    store_K(K, leave_out)
    store_V(V, leave_out)
    slot = M - 1 - torch.arange(b, device=device)[:, None]
    block.kernel = None
    expected = block.attention(Q, slot, None, window)
    out = attention_kernel.attention(block, Q, slot, window)
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def quantizers(scheme, bits, d_k, K, V):
    """Return the quantizers of a scheme in groups of 64 tokens, or of all channels of a token;
    static ones are calibrated."""
    of_K, of_V, static = SCHEMES[scheme]
    pair = [
        Quantizer(bits, granularity, 64 if granularity == "channel" else d_k, static)
        for granularity in (of_K, of_V)
    ]
    if static:
        pair[0].calibrate(K)
        pair[1].calibrate(V)
    return pair


if __name__ == "__main__":
    if not GPU:
        attention_kernel.FACTOR = tl.float16  # the interpreter has no bfloat16
    print(json.dumps([[*case, error(*case)] for case in cases()]))
