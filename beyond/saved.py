"""A KVSinkCache in a file, as safetensors.

What this file does not do: it holds no model. The file says which one it belongs to.

The tensors are named LAYER.KIND.PART, for example 3.K.codes, with the parts of a GrowingStore and,
if the scheme is static, the range (lo, hi) of the quantizer; and tokens.NAME, as KVSinkCache.tokens
names them. The metadata are the options of the cache and what tells its model from others.
"""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from beyond.blocks import empty_blocks, tokens_per_block
from beyond.growing import GrowingStore
from kvsink import Site
from support.cache import save

FORMAT = "KVSinkCache 2"


def save_cache(cache, file):
    """Write a KVSinkCache to a file, all or nothing. Raises ValueError if it holds layers of
    transformers' own, such as those with a sliding window."""
    if len(cache.quantized_layers) < len(cache.layers):
        raise ValueError("this cache has layers that are not quantized, and cannot be saved")
    tensors = {f"tokens.{name}": numbers for name, numbers in cache.tokens.items()}
    for l, layer in enumerate(cache.layers, start=1):
        for kind, store, quantizer in zip("KV", layer.stores, layer.quantizers):
            tensors |= {f"{l}.{kind}.{name}": part for name, part in store.parts.items()}
            if quantizer.lo is not None:
                tensors |= {f"{l}.{kind}.lo": quantizer.lo, f"{l}.{kind}.hi": quantizer.hi}
    metadata = {
        "format": FORMAT,
        "model": fingerprint(cache.decoder),
        "options": json.dumps(cache.options | {"group_size": cache.group_size}),
        "site": json.dumps(cache.rule.site),
    }
    tensors = {name: part.contiguous().cpu() for name, part in tensors.items()}
    save(Path(file), to_bytes(tensors, metadata))


def load_cache(cls, file, model, options):
    """Return a KVSinkCache that holds what `save_cache` wrote."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no file of safetensors: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file} was not written by KVSinkCache.save, or by another version of it")
    site = Site(*json.loads(metadata["site"]))
    cache = cls(model, **json.loads(metadata["options"]), site=site, **options)
    if metadata["model"] != fingerprint(cache.decoder):
        cache.close()
        raise ValueError(f"{file} belongs to another model, or to this one in another dtype")
    try:
        fill(cache, tensors)
    except (KeyError, ValueError) as error:
        cache.close()
        raise ValueError(f"{file} does not hold what its cache needs: {error}") from None
    return cache


def fill(cache, tensors):
    """Give the tensors of a file to a new cache. Raises KeyError if one is missing, ValueError if
    one has another shape or dtype than it must have."""
    names = ("attended", "in_prompt", "S_sink up to l_E", "S_sink after l_E", "X")
    cache.tokens |= {
        name: tensors[f"tokens.{name}"] for name in names if f"tokens.{name}" in tensors
    }
    if not cache.tokens:  # nothing was stored
        return
    b, n = tensors["tokens.attended"].shape
    for name, numbers in cache.tokens.items():
        check(name, numbers, (b, n))
    for l, (layer, block) in enumerate(zip(cache.layers, cache.decoder.layers), start=1):
        device = next(block.parameters()).device
        layer.length = n
        layer.is_initialized = True
        for kind, quantizer, buffer in zip("KV", layer.quantizers, layer.buffers):
            prefix = f"{l}.{kind}."
            parts = {
                name.removeprefix(prefix): part.to(device)
                for name, part in tensors.items()
                if name.startswith(prefix)
            }
            quantizer.lo = parts.pop("lo", None)
            quantizer.hi = parts.pop("hi", None)
            store = GrowingStore(quantizer, buffer, parts["residual"])
            check_parts(parts, quantizer, b, n)
            store.parts = parts
            layer.held.append(store)


def check_parts(parts, quantizer, b, n):
    """Raise KeyError or ValueError unless these are the parts of a store of b sequences of n
    tokens."""
    _, h_kv, waiting, d_k = parts["residual"].shape
    k = len(parts["slot"])
    coded = n - waiting
    g = quantizer.tokens_per_group
    blocks = empty_blocks(parts["residual"], g, quantizer.bits)
    p = tokens_per_block(blocks, quantizer.bits)
    shapes = {
        "codes": (b, h_kv, coded // p, blocks["codes"].shape[3]),
        "unpacked": (b, h_kv, coded % p, d_k),
        "residual": (b, h_kv, waiting, d_k),
        "kept": (k, h_kv, d_k),
        "sequence": (k,),
        "slot": (k,),
    }
    if coded:
        many = 1 if quantizer.granularity == "channel" else quantizer.group_size
        first = (1, h_kv, 1) if quantizer.static else (b, h_kv, coded // g)
        shapes["scale"] = shapes["zero"] = (*first, d_k // many)
    for name, shape in shapes.items():
        check(name, parts[name], shape)
    if k and not (
        0 <= parts["slot"].min() and parts["slot"].max() < n and parts["sequence"].max() < b
    ):
        raise ValueError("a kept token lies outside of it")


def check(name, tensor, shape):
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {shape}")


def fingerprint(decoder):
    """Return what tells one model from another: the shape of its blocks, its dtype, and some of its
    weights."""
    weight = decoder.get_input_embeddings().weight
    sizes = [tuple(parameter.shape) for parameter in decoder.layers.parameters()]
    numbers = weight[:16].detach().float().cpu().numpy().tobytes()
    return hashlib.sha256(repr((sizes, weight.dtype)).encode() + numbers).hexdigest()
