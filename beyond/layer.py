"""A layer of a KVSinkCache: the quantized Keys and Values of one block, as transformers uses them.

What this file does not do: growing.py stores them, codes.py reads their codes.
Shapes as in kvsink_cache.py.
"""

import copy
import math
from dataclasses import replace

import torch
from transformers.cache_utils import DynamicLayer

from beyond.codes import CodesOfLayer
from beyond.growing import GrowingStore

# The masks in KVSinkCache.tokens that say which tokens a block keeps.
UP_TO = "S_sink up to l_E"
AFTER = "S_sink after l_E"


class KVSinkLayer(DynamicLayer):
    """The quantized Keys and Values of one block. `S_sink` is the name of the mask in
    KVSinkCache.tokens that says which tokens this block keeps."""

    # Cropping is not lossless: the range of a group still reflects the removed tokens.
    is_croppable = False

    def __init__(self, cache, quantizers, S_sink, buffers):
        super().__init__()
        self.quantizers = quantizers  # of the Keys, of the Values: these three
        self.buffers = buffers
        self.exact_prompt = cache.exact_prompt
        self.reads_codes = cache.reads_codes
        self.pending = cache.pending
        self.tokens = cache.tokens
        self.S_sink = S_sink
        self.reset()

    def copy(self, cache, buffers):
        """Return the same layer of another cache, which shares all tensors."""
        # Quantizers of its own: to calibrate one cache must not change the scales of the other.
        quantizers = [replace(quantizer) for quantizer in self.quantizers]
        other = KVSinkLayer(cache, quantizers, self.S_sink, buffers)
        other.length = self.length
        other.is_initialized = self.is_initialized
        for store, quantizer, buffer in zip(self.stores, quantizers, buffers):
            store = copy.copy(store)
            store.quantizer = quantizer
            store.buffer = buffer
            store.parts = dict(store.parts)
            other.held.append(store)
        return other

    def reset(self):
        self.length = 0
        self.is_initialized = False
        self.held = []  # two stores, of which `codes` may hold the codes
        self.codes = None  # see codes.CodesOfLayer
        self.observing = False  # True while a static scheme is calibrated

    @property
    def stores(self):
        """The GrowingStores of the Keys and the Values."""
        if self.codes:
            self.codes.give_back()
            self.codes = None
        return self.held

    def tensors(self):
        """Return all tensors that are stored."""
        tensors = [part for store in self.held for part in store.parts.values()]
        return tensors + (self.codes.block.tensors() if self.codes else [])

    def update(self, K, V, *args, **kwargs):
        """Store the new K and V (b, h_kv, m, d_k), and return all of them (b, h_kv, n, d_k). Raises
        ValueError if the cache's hooks have not seen these tokens."""
        if torch.is_grad_enabled() and (K.requires_grad or V.requires_grad):
            raise ValueError("a KVSinkCache is for inference: run the model under torch.no_grad()")
        if self.pending:
            raise ValueError(
                "this model's attention does not go through transformers' AttentionInterface, or a "
                "forward pass was interrupted: leave attention='codes' out, or reset() the cache"
            )
        m = K.shape[2]
        self.length += m
        S_sink = self.tokens.get(self.S_sink)
        if S_sink is None or S_sink.shape != (len(K), self.length):
            raise ValueError(
                "this KVSinkCache is closed, or belongs to another model, or a forward pass was "
                "interrupted: reset() it"
            )
        if self.observing:
            for quantizer, X in zip(self.quantizers, (K, V)):
                quantizer.calibrate(X, S_sink.to(X.device)[:, None, :, None])
            return K, V
        if not self.held:
            parts = zip(self.quantizers, self.buffers, (K, V))
            self.held = [GrowingStore(*arguments) for arguments in parts]
            self.is_initialized = True
        if self.reads_codes and m == 1 < self.length:
            # codes.py's attention function takes them from here.
            self.pending.append((K, V))
            K = K.view_as(K)  # a tensor of our own, to put a mark on
            K.kvsink_layer = self
            return K, V
        return self.store(K, V)

    def store(self, K, V):
        """Store the new K and V, and return all of them."""
        m = K.shape[2]
        S_sink = self.tokens[self.S_sink].to(K.device)
        leave_out = S_sink | ~self.tokens["attended"].to(K.device)
        is_prompt = m == self.length or m > 1
        with torch.autocast(K.device.type, enabled=False):
            return [
                store.update(adapt(store, X), S_sink, leave_out, is_prompt, self.exact_prompt)
                for store, X in zip(self.stores, (K, V))
            ]

    def attend(self, Q, K, V, mask):
        """Store one new token, and return the attention of its query over the codes."""
        if self.codes is None or self.codes.is_full:
            stores = self.stores
            kept = max(int(self.tokens[name].sum(1).max()) for name in (UP_TO, AFTER))
            k = -(-kept // 8) * 8  # by eights, because each number is compiled anew
            self.codes = CodesOfLayer(stores, self.quantizers, self.length - 1, Q.shape[1], k)
        seen = None if mask is None else mask[:, 0, 0]
        attended = self.tokens["attended"].to(K.device)
        with torch.autocast(K.device.type, enabled=False):
            return self.codes.attend(Q, K, V, seen, attended)

    def get_seq_length(self):
        return self.length

    def crop(self, tokens_to_remove):
        self.length = max(self.length + tokens_to_remove, 0)
        for store in self.stores:
            store.crop(self.length)

    def reorder_cache(self, beam_idx):
        for store in self.stores:
            store.reorder(beam_idx)


def adapt(store, X):
    """Return X in the wider dtype of X and of what a store holds, and move that to the device of X:
    a model may be moved between two turns, or run under autocast in one of them."""
    residual = store.parts["residual"]
    if (X.dtype, X.device) == (residual.dtype, residual.device):
        return X
    dtype = torch.promote_types(X.dtype, residual.dtype)
    for name, part in store.parts.items():
        is_wide = name in ("residual", "kept")
        store.parts[name] = part.to(X.device, dtype if is_wide else part.dtype)
    return X.to(dtype)


class Buffer:
    """Memory that all layers share, for what attention reads: one layer's numbers have been read
    before the next layer writes its own."""

    def __init__(self):
        self.memory = torch.empty(0)

    def tensor(self, shape, like):
        """Return a tensor of this shape, on the device and in the dtype of another, but at least
        in fp32."""
        n = math.prod(shape)
        dtype = torch.promote_types(like.dtype, torch.float32)
        fits = n <= self.memory.numel() <= 2 * n
        if not (fits and self.memory.dtype == dtype and self.memory.device == like.device):
            self.memory = None  # freed first
            self.memory = torch.empty(n + n // 8, dtype=dtype, device=like.device)
        return self.memory[:n].view(shape)
