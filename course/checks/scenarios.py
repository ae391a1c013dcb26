"""What the tests do with your functions: each scenario takes plain values, makes tensors of them, calls one assigned
function, and returns plain values. No test and no answer is here."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import kvsink
import llama
import quant


def tensor(x):
    return torch.tensor(x) if isinstance(x, np.ndarray) else x


def plain(x):
    """Tensors as arrays, in whatever lies around them; half precision as float32."""
    if isinstance(x, torch.Tensor):
        return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()
    if isinstance(x, dict):
        return {key: plain(part) for key, part in x.items()}
    return [plain(part) for part in x] if isinstance(x, (list, tuple)) else x


def refused(function, *arguments):
    """The name and text of the ValueError that a call raises; None where it raises none."""
    try:
        function(*arguments)
    except ValueError as error:
        return [type(error).__name__, str(error)]


# ---------------------------------------------------------------------------------------------------------------------
# Problems 1 and 2: quant.py


def equation(name, *arguments):
    """scale, zero, quantize or dequantize of arrays."""
    return plain(getattr(quant, name)(*map(tensor, arguments)))


def groups(X, granularity, group_size, fill):
    Xg, axes = quant.grouped(tensor(X), granularity, group_size, fill)
    return plain([Xg, sorted(axis % Xg.ndim - Xg.ndim for axis in axes)])


def groups_refused(X, granularity, group_size):
    return refused(quant.grouped, tensor(X), granularity, group_size)


def ranges(X, granularity, group_size, how):
    """`how` are clipped_range's other arguments, by name."""
    how = {name: tuple(x) if name == "axes" else tensor(x) for name, x in how.items()}
    return plain(quant.clipped_range(tensor(X), granularity, group_size, **how))


def calibrated(granularity, group_size, how, seen, dtype="float32"):
    """lo and hi of a static quantizer that has seen pairs of X and leave_out; and their dtype."""
    quantizer = quant.Quantizer(4, granularity, group_size, static=True, **how)
    for X, leave_out in seen:
        quantizer.calibrate(tensor(X).to(getattr(torch, dtype)), tensor(leave_out))
    return plain([quantizer.lo, quantizer.hi, str(quantizer.lo.dtype)])


def calibration_refused(X):
    return refused(quant.Quantizer(4, "token", static=True).calibrate, tensor(X))


# ---------------------------------------------------------------------------------------------------------------------
# Problem 3: llama.py

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def rope(config, n):
    """The table for a config.json that has these keys more."""
    return plain(llama.rope_table(llama.LlamaConfig.from_dict({**SHAPE, **config}), n, torch.device("cpu")))


def rotated(X, cos, sin, dtype="float32"):
    """What comes back, and its dtype."""
    out = llama.rotate(tensor(X).to(getattr(torch, dtype)), (tensor(cos), tensor(sin)))
    return plain([out, str(out.dtype)])


def mask(n, window):
    return plain(llama.causal(n, window, torch.device("cpu")))


def attended(Q, K, V, window):
    return plain(llama.attention(tensor(Q), tensor(K), tensor(V), window))
