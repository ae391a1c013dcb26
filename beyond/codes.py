"""Attention that reads packed codes, for the decoding steps of a KVSinkCache with
`attention="codes"`.

transformers calls an attention function with the Keys and Values that its cache returns. In a
decoding step KVSinkLayer returns those of the new token alone, with a mark that says to which layer
they belong. The attention function below finds the mark and computes over the codes instead. It
does so by the attention of paper/kvcache.py, compiled, which never has the dequantized numbers in
memory.

What this file does not do: prompts, and whatever else this attention cannot do, run as they do with
`attention="dequantized"`.

Shapes: b sequences, n tokens so far, h query heads, h_kv Key/Value heads, d_k channels of a head.
"""

import functools

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from beyond.blocks import add_codes, take_codes
from paper.decode import FUSE
from paper.kvcache import CacheShape, PackedBlockCache, as_bytes, pack, unpack
from support.cache import log
from support.machine import Machine

NAME = "kvsink"  # of the attention function


def use_codes(decoder, sizes):
    """Let a model compute its attention by `attention` below, which does the same as sdpa for every
    other cache. Raises ValueError if the model or its heads, of `sizes` channels, do not allow
    it."""
    name = decoder.config._attn_implementation
    if name not in ("sdpa", NAME) or not decoder._can_set_attn_implementation():
        raise ValueError(
            f"attention='codes' takes the place of sdpa, and {type(decoder).__name__} runs "
            f"{name!r}: set attn_implementation='sdpa', or leave attention='codes' out"
        )
    if len(sizes) > 1:
        raise ValueError(
            f"attention='codes' needs Keys and Values with the same number of channels, not {sizes}"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder.set_attn_implementation(NAME)


def attention(module, query, key, value, attention_mask, **kwargs):
    """An attention function of transformers: (b, h, m, d_k) -> (b, m, h, d_k), None."""
    layer = getattr(key, "kvsink_layer", None)
    if layer is not None:
        key, value = layer.pending.pop()
        if can_read_codes(layer, key, value, attention_mask, kwargs):
            if kwargs.get("scaling") is not None:  # the other function divides by sqrt(d_k)
                query = query * (kwargs["scaling"] * query.shape[-1] ** 0.5)
            return layer.attend(query, key, value, attention_mask), None
        key, value = layer.store(key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def can_read_codes(layer, K, V, attention_mask, kwargs):
    """Return whether the attention of this step is what `CodesOfLayer.attend` computes."""
    if attention_mask is not None:
        # True or False for each token, the same for all heads.
        if attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
            return False
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        return False
    if kwargs.get("dropout"):
        return False
    # After autocast, or a move of the model, `adapt` in layer.py comes first.
    stored = layer.held[0].parts["kept"]
    return all((X.dtype, X.device) == (stored.dtype, stored.device) for X in (K, V))


def room_for(n):
    """Return the number of slots for n tokens: it grows in steps, by an eighth to a quarter,
    because each number is compiled anew."""
    step = max(512, 2 ** (n.bit_length() - 3))
    return -(-n // step) * step


class CodesOfLayer:
    """The Keys and Values of a layer in a PackedBlockCache, which has room for more tokens. It
    takes the codes from two GrowingStores, and `give_back` moves them back."""

    def __init__(self, stores, quantizers, n, h, k):
        """Move n tokens here, for queries of h heads. No sequence keeps more than k tokens."""
        self.stores = stores
        self.n = n
        kept = stores[0].parts["kept"]
        b, h_kv, _, d_k = stores[0].parts["residual"].shape
        shape = CacheShape(b, room_for(n + 1), k, h, h_kv, d_k, kept.dtype, kept.device)
        self.block = PackedBlockCache(quantizers, shape, pre_rope=False)
        K = self.block.K
        self.step = step_for(shape, K.bits, K.tokens, K.channels)
        self.coded = [store.coded for store in stores]
        for store, packed in zip(stores, (self.block.K, self.block.V)):
            take(store, packed)
        # The i-th kept token of each sequence; they lie sorted by sequence.
        sequence = stores[0].parts["sequence"]
        slot = stores[0].parts["slot"]
        i = torch.arange(len(slot), device=slot.device) - torch.searchsorted(sequence, sequence)
        self.block.kept[sequence, i] = slot
        self.block.kept_K[sequence, :, i] = kept
        self.block.kept_V[sequence, :, i] = stores[1].parts["kept"]

    @property
    def is_full(self):
        return self.n == self.block.n

    def attend(self, Q, K, V, seen, attended):
        """Append one token, K and V (b, h_kv, 1, d_k), and return the attention of its query Q
        (b, h, 1, d_k) -> (b, 1, h, d_k). `seen` (b or 1, n + 1) masks the tokens that it sees, if
        not all; `attended` those that are no padding."""
        self.finish_groups(attended)
        slot = torch.full((len(Q), 1), self.n, device=Q.device)
        unseen = None
        if seen is not None:
            unseen = torch.ones(len(Q), self.block.n + 1, dtype=torch.bool, device=Q.device)
            unseen[:, : self.n + 1] = ~seen
        self.n += 1
        A = self.step(self.block, Q, K, V, slot, unseen)
        return A.unflatten(2, (Q.shape[1], -1))

    def finish_groups(self, attended):
        """Encode a group that has become complete. As in `GrowingStore.append`, that happens when
        the next token comes."""
        for i, packed in enumerate((self.block.K, self.block.V)):
            if packed.residual is not None and self.n - self.coded[i] == packed.g:
                slots = torch.arange(self.coded[i], self.n, device=attended.device)
                padding = torch.where(attended[:, slots], self.block.n, slots)
                end = torch.full((len(attended), 1), self.n, device=attended.device)
                leave_out = torch.cat((self.block.kept, padding), dim=1)
                sequences = torch.arange(len(attended), device=attended.device)[:, None]
                packed.finish_group(sequences, end, leave_out)
                self.coded[i] = self.n

    def give_back(self):
        """Move all tokens back to the two GrowingStores."""
        for store, packed, coded in zip(self.stores, (self.block.K, self.block.V), self.coded):
            give(store, packed, self.n, coded if packed.g > 1 else self.n)


def take(store, packed):
    """Move the codes of a GrowingStore to a PackedStore, and free them there."""
    residual = store.parts.pop("residual")
    if packed.residual is not None:
        packed.residual[:, :, : residual.shape[2]] = residual
    coded = store.coded
    if not coded:
        return
    codes = pack(take_codes(store.parts, store.bits), store.bits)
    packed.codes[:, :, :coded] = codes.view(packed.codes.dtype)
    if not packed.static:
        for numbers, name in zip(packed.parameters, ("scale", "zero")):
            numbers[:, :, : coded // packed.g] = store.parts.pop(name)


def give(store, packed, n, coded):
    """Move n tokens, of which the first `coded` have codes, back from a PackedStore."""
    kept = store.parts["kept"]
    b, h_kv = packed.codes.shape[:2]
    residual = kept.new_zeros(b, h_kv, 0, packed.d_k)
    if packed.residual is not None:
        residual = packed.residual[:, :, : n - coded].clone()
    store.parts["residual"] = residual
    if coded:
        codes = unpack(as_bytes(packed.codes[:, :, :coded]), store.bits)
        add_codes(store.parts, codes, store.bits)
        for numbers, name in zip(packed.parameters, ("scale", "zero")):
            groups = numbers.shape[2] if packed.static else coded // packed.g
            store.parts[name] = numbers[:, :, :groups].clone()


def append_and_attend(block, Q, K, V, slot, unseen):
    """Eq. 6, then Eq. 3."""
    block.append(K, V, slot)
    return block.attention(Q, slot, None, unseen=unseen)


@functools.cache
def step_for(shape, bits, tokens, channels):
    """Return `append_and_attend`, compiled if this machine has a compiler. Cached, so that each
    combination of arguments, for which torch.compile makes code of its own, is logged once."""
    step = compiled_on(shape.device.type)
    if step is not append_and_attend:
        what = f"codes of {bits} bits for up to {shape.n:,} tokens"
        log(f"compiling the attention over {what}, which takes a while")
    return step


@functools.cache
def compiled_on(device):
    return Machine(device, compile=True).compiled(append_and_attend, **compile_options(device))


def compile_options(device):
    """Return FUSE with less time between kernels, many of which are small: on a CPU C++ launches
    them, and PyTorch does not check before each call whether global names have changed."""
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
    if device == "cpu":
        options["cpp_wrapper"] = True
    return FUSE | {"options": FUSE["options"] | options}
