"""What KVSinkCache needs of a model of transformers: its blocks, the sizes of its heads, and which
tokens are padding.

What this file does not do: sites.py finds l_E and c of the model.
"""

import weakref

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def decoder_of(model):
    """Return the part of a model whose `layers` are its blocks. Raises ValueError if there is
    none."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder: KVSinkCache is for models that only decode")
    decoder = model if hasattr(model, "layers") else model.get_decoder()
    for inner in ("language_model", "model"):
        if not hasattr(decoder, "layers"):
            decoder = getattr(decoder, inner, decoder)
    if not hasattr(decoder, "layers"):
        raise ValueError(f"{name} has no `layers`: KVSinkCache cannot find its blocks")
    return decoder


HEAD_SIZES = weakref.WeakKeyDictionary()  # of the models that `head_sizes` has run


def head_sizes(decoder):
    """Run two tokens through a decoder, once, and return how many channels its Keys and Values
    have. Raises ValueError if its blocks or their cache are not what KVSinkCache reads."""
    if decoder in HEAD_SIZES:
        return HEAD_SIZES[decoder]
    name = type(decoder).__name__
    cache = DynamicCache(config=decoder.config)
    outputs = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
        for block in decoder.layers
    ]
    device = decoder.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
            decoder(input_ids=tokens, past_key_values=cache)
    except Exception as error:  # whatever a model's own code raises
        raise ValueError(f"{name} does not run with a DynamicCache: {error!r}") from None
    finally:
        for hook in hooks:
            hook.remove()
    for l, H in enumerate(outputs, start=1):
        H = H[0] if isinstance(H, tuple) else H
        if H.ndim != 3:
            raise ValueError(f"{name}: block {l} gives {H.ndim} dimensions, not (b, n, d)")
    if not len(cache.layers) == len(outputs) == len(decoder.layers):
        raise ValueError(f"{name} has blocks whose Keys are not in the cache")
    layers = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    if not layers:
        raise ValueError(
            "every layer has a sliding window or no Keys: there is nothing to quantize"
        )
    if not all(layer.is_initialized for layer in layers):
        raise ValueError(f"{name} has blocks that read the Keys and Values of other blocks")
    sizes = {X.shape[-1] for layer in layers for X in (layer.keys, layer.values)}
    return HEAD_SIZES.setdefault(decoder, sizes)


def attended_tokens(arguments, past):
    """Return which of the new tokens are no padding (b, m), from the arguments of a forward pass
    that comes after `past` tokens. Raises ValueError if the mask does not cover all tokens."""
    input_ids = arguments.get("input_ids")
    inputs = arguments["inputs_embeds"] if input_ids is None else input_ids
    b, m = inputs.shape[:2]
    mask = padding_mask(arguments.get("attention_mask"))
    if mask is None:
        return torch.ones(b, m, dtype=torch.bool, device=inputs.device)
    shape = tuple(mask.shape)
    if shape not in ((b, past + m), (1, past + m)):
        raise ValueError(
            f"attention_mask {shape} has to cover all {past + m} tokens of {b} sequences"
        )
    return mask[:, past:].bool().expand(b, m)


def padding_mask(attention_mask):
    """Return the mask (b, n) of an attention_mask, which may be None, a dict with one mask for each
    kind of layer, or have four dimensions (b, heads, m, n)."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if attention_mask is None or attention_mask.dim() != 4:
        return attention_mask
    # A token is real if any query of any head sees it. A mask says so by True, or by what is added
    # to the score: 0 or a bias, against -inf, the lowest number of the dtype, or -1e9.
    if attention_mask.dtype != torch.bool:
        attention_mask = attention_mask > 0.9 * max(torch.finfo(attention_mask.dtype).min, -1e9)
    return attention_mask.any(1).any(1)
