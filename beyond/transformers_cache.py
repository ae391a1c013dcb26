"""KVSink for the models of the transformers package: a quantized cache that keeps the sinks in full
precision.

    cache = KVSinkCache(model, bits=4)
    model.generate(**inputs, past_key_values=cache)
    cache.sinks(), cache.bytes()

Read top to bottom: a layer's cache; the hooks; the cache. beyond/README.md says more.

What this file does not do: kvsink.py predicts, quant.py quantizes, growing.py stores, sites.py
knows l_E and c. transformers runs the model, asks a cache for Keys and Values, and shows it no
hidden state. So one hook on the decoder sees which tokens come, and one on block l_E sees channel
c.

Shapes: b sequences, n tokens so far (padding too), h_kv Key/Value heads, d_k channels a head.
"""

import inspect
import math
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch

import kvsink
from beyond.growing import GrowingStore
from beyond.sites import NOWHERE, head_dim, site_of
from kvsink import AUTO, predict_auto, predict_sinks
from paper.kvcache import check_head
from support import cli, results

if (
    __name__ == "__main__"
):  # first of all, because without transformers the command says what to install
    from beyond import side_by_side

    cli.exit_process(side_by_side.main())

try:
    import transformers
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
except ImportError:
    raise ImportError("KVSinkCache needs transformers: pip install transformers==5.23.0") from None
if not transformers.__version__.startswith("5.23."):
    raise ImportError(
        f"KVSinkCache was tested with transformers 5.23, not with {transformers.__version__}"
    )

# --------------------------------------------------------------------------------------------------
# The cache


class KVSinkLayer(DynamicLayer):
    """One layer in transformers' terms: Keys and Values (b, h_kv, new, d_k) come in, all of them go
    out."""

    is_croppable = (
        False  # would mean without a trace: the range of a group remembers what was cut off
    )
    observing = False  # while a static scheme is calibrated

    def __init__(self, quantizers, tokens, S_sink):
        super().__init__()
        self.quantizers, self.tokens, self.S_sink, self.length, self.stores = (
            quantizers,
            tokens,
            S_sink,
            0,
            [],
        )

    def update(self, K, V, *args, **kwargs):
        """Raises ValueError where the cache's hooks have not seen these tokens."""
        past, self.length = self.length, self.length + K.shape[2]
        if self.S_sink not in self.tokens or self.tokens[self.S_sink].shape != (
            len(K),
            self.length,
        ):
            raise ValueError(
                "this KVSinkCache is closed, of another model, or a pass was interrupted: reset() it"
            )
        S_sink, real = (self.tokens[name].to(K.device) for name in (self.S_sink, "real"))
        if self.observing:
            for quantizer, X in zip(self.quantizers, (K, V)):
                quantizer.calibrate(X, S_sink[:, None, :, None])
            return K, V
        self.stores = self.stores or [
            GrowingStore(quantizer, X) for quantizer, X in zip(self.quantizers, (K, V))
        ]
        prompt = past == 0 or K.shape[2] > 1
        with torch.autocast(K.device.type, enabled=False):
            return [store.update(X, S_sink, real, prompt) for store, X in zip(self.stores, (K, V))]

    def get_seq_length(self):
        return self.length

    def reset(self):
        self.length, self.stores, self.observing = 0, [], False

    def crop(self, tokens_to_remove):
        self.length = max(self.length + tokens_to_remove, 0)
        for store in self.stores:
            store.crop(self.length)

    def reorder_cache(self, beam_idx):  # sequence i becomes what sequence beam_idx[i] was
        for store in self.stores:
            store.t = {name: part[beam_idx.to(part.device)] for name, part in store.t.items()}


def hook(cache, method, module, args, kwargs, *output):
    """On a module: calls a method of a cache where a forward pass fills this one. `cache` is a weak
    reference."""
    # The cache may come by place, or under another name.
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments | kwargs
    if cache() is not None and any(value is cache() for value in given.values()):
        getattr(cache(), method)(given, *output)


class KVSinkCache(Cache):
    """A cache for `model(..., past_key_values=)` and `model.generate`. Its defaults are the best
    that was measured.

    scheme      one of kvsink.SCHEMES; a static one needs `calibrate` first. `bits` are 1 to 8
    group_size  channels of a Value, tokens of a channel of Keys, that share scale and zero (a head, at most 128)
    keep        "none", "pfn", "kvsink" or "pfn+kvsink"; `sinks` is N, or "auto": as many as stand out, at most 20
    rule        in the place of lines 15-16, H^{l_E} (b, n, d) -> mask (b, n). RotateKV's, for example, looks at all
                channels: `lambda H: predict_sinks(H.abs().amax(-1, keepdim=True), c=0, k=min(20, H.shape[1]))`
    site        kvsink.Site(l_E, c); else Table 3's, else found with the `tokenizer`

    Sinks are predicted in prompts: in the first forward pass, and in each of two or more tokens. A
    prompt in chunks keeps a running top-k: a new token has to be among the largest of all, and one
    that was kept stays. A rule sees a chunk alone. Raises ValueError for what cannot be.
    """

    def __init__(self, model, bits=4, scheme="channel-dynamic", group_size=None, keep="pfn+kvsink", sinks=AUTO,
                 rule=None, site=None, tokenizer=None):  # fmt: skip
        if scheme not in kvsink.SCHEMES or keep not in results.KEEPS:
            raise ValueError(
                f"scheme is one of {', '.join(kvsink.SCHEMES)}; keep one of {', '.join(results.KEEPS)}"
            )
        if (
            sinks != AUTO
            and not (type(sinks) is int and sinks >= 0)
            or (keep, sinks) == ("pfn", AUTO)
        ):
            raise ValueError(
                f"sinks={sinks!r}: a number of tokens, or {AUTO!r} where they are predicted"
            )
        self.decoder = model if hasattr(model, "layers") else model.get_decoder()
        if not hasattr(self.decoder, "layers"):
            raise ValueError(
                f"{type(self.decoder).__name__} has no `layers`: this cache does not know its blocks"
            )
        config, self.keep, self.k, self.rule = self.decoder.config, keep, sinks, rule
        head = head_dim(config)
        check_head(head)
        group_size, blocks = (
            min(group_size or math.gcd(128, head), head),
            SimpleNamespace(blocks=self.decoder.layers),
        )
        if head % group_size:
            raise ValueError(f"group_size={group_size} does not divide a head of {head} channels")
        if site and not (
            1 <= site.l_E <= len(self.decoder.layers) and 0 <= site.c < config.hidden_size
        ):
            raise ValueError(f"{site} is no place of this model; l_E counts blocks from 1")
        self.site = (site or site_of(self.decoder, tokenizer)) if "kvsink" in keep else NOWHERE
        # What layers share, masks (b, n): `real`, no padding; `prompt`, in a prompt and so perhaps
        # a sink; the S_sink up to block l_E, and the one after it. And X (b, n), channel c of
        # H^{l_E}.
        self.tokens, layers = {}, DynamicCache(config=config).layers
        for l, pair in enumerate(kvsink.rtn_cache(blocks, scheme, bits, group_size)):
            if (
                type(layers[l]) is DynamicLayer
            ):  # sliding windows and other kinds stay transformers'
                pair = [replace(quantizer, fp16_params=True) for quantizer in pair]
                layers[l] = KVSinkLayer(
                    pair, self.tokens, "up to l_E" if l < self.site.l_E else "after l_E"
                )
        self.ours = [layer for layer in layers if isinstance(layer, KVSinkLayer)]
        if not self.ours:
            raise ValueError(
                "every layer has a sliding window or no Keys: there is nothing to quantize"
            )
        super().__init__(layers=layers)
        expect, predict = (partial(hook, weakref.ref(self), name) for name in ("expect", "predict"))
        hooks = [self.decoder.register_forward_pre_hook(expect, with_kwargs=True)]
        if self.site != NOWHERE:
            l_E = self.decoder.layers[self.site.l_E - 1]
            hooks.append(l_E.register_forward_hook(predict, with_kwargs=True))
        self.close = weakref.finalize(self, lambda: [hook.remove() for hook in hooks])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __deepcopy__(self, memo):
        raise TypeError("a KVSinkCache is not copied, because its hooks are its own: make another")

    def append(self, name, new):
        self.tokens[name] = (
            torch.cat((self.tokens[name], new), dim=1) if name in self.tokens else new
        )

    def expect(self, kwargs):
        """Before a forward pass: which tokens come. PFN counts positions without padding."""
        ids, mask, t = kwargs.get("input_ids"), kwargs.get("attention_mask"), self.tokens
        new = kwargs["inputs_embeds"] if ids is None else ids
        (b, n), past = new.shape[:2], self.ours[0].length
        mask = mask.get("full_attention") if isinstance(mask, dict) else mask
        if (
            mask is not None and mask.dim() == 4
        ):  # what the last query sees: True, or 0 is added to its score
            mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
        if mask is not None and mask.shape != (b, past + n):
            raise ValueError(
                f"attention_mask {tuple(mask.shape)} has to cover all {past + n} tokens of {b} sequences"
            )
        real = (
            torch.ones(b, n, dtype=torch.bool, device=new.device)
            if mask is None
            else mask[:, past:].bool()
        )
        self.append("real", real)
        self.append("prompt", real & (n > 1 or past == 0))
        N = 0 if "pfn" not in self.keep else 1 if "kvsink" in self.keep else self.k
        t["up to l_E"] = t["prompt"] & (t["prompt"].cumsum(1) <= N)
        if self.site == NOWHERE:
            t["after l_E"] = t["up to l_E"]

    def predict(self, kwargs, H):
        """After block l_E, lines 15-16 of Algorithm 1 over all prompts so far. Padding and decoded
        tokens count as 0."""
        H = H[0] if isinstance(H, tuple) else H  # (b, n of this pass, d)
        new = self.tokens["prompt"][:, -H.shape[1] :]
        H = H.masked_fill(~new.to(H.device)[..., None], 0)
        self.append("X", H[:, :, self.site.c].to(new.device))
        X, n = self.tokens["X"][..., None], self.tokens["X"].shape[1]
        if H.shape[1] == 1 < n:  # a decoded token is no sink: nothing to look for
            S_sink = new
        elif self.rule:
            S_sink = self.rule(H).to(new.device)
        else:
            S_sink = predict_auto(X, 0) if self.k == AUTO else predict_sinks(X, 0, min(self.k, n))
        self.append("after l_E", S_sink[:, -H.shape[1] :] & new)

    @torch.no_grad()
    def calibrate(self, windows):
        """Static ranges, as kvsink.observers make them: in full precision, on windows of token ids
        (W, n)."""
        self.reset()
        try:
            for window in windows.split(1):
                for layer in self.ours:
                    layer.observing = True
                self.decoder(input_ids=window, past_key_values=self)
                self.reset()
        finally:
            self.reset()

    def sinks(self):
        """Of each sequence the positions, padding not counted, that are kept after block l_E."""
        if not self.tokens:
            return []
        places = self.tokens["real"].cumsum(1) - 1
        return [p[kept].tolist() for p, kept in zip(places, self.tokens["after l_E"])]

    def bytes(self):
        """What the quantized layers store, and what the same numbers take in 16 bits."""
        stored = numbers = 0
        for layer in self.ours:
            for store in layer.stores:
                b, h_kv, _, d_k = store.t["residual"].shape
                stored, numbers = stored + store.bytes(), numbers + b * h_kv * layer.length * d_k
        return stored, 2 * numbers

    def reset(self):
        super().reset()
        self.tokens.clear()

    def crop(self, tokens_to_remove):
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give a number below 0, of tokens to take off the end"
            )
        for layer in sorted(
            self.layers, key=lambda layer: layer in self.ours
        ):  # first those that may refuse
            layer.crop(tokens_to_remove)
        for name, mask in self.tokens.items():
            self.tokens[name] = mask[:, : self.ours[0].length]

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        for name, mask in self.tokens.items():
            self.tokens[name] = mask[beam_idx.to(mask.device)]

    def batch_repeat_interleave(self, repeats):
        self.reorder_cache(torch.arange(len(self.tokens["real"])).repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        self.reorder_cache(torch.arange(len(self.tokens["real"]))[indices.cpu()])

    def activate_past_recording(self):
        raise ValueError(
            "assisted decoding would take its drafts for prompts: not with a KVSinkCache"
        )
