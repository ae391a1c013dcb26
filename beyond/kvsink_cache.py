"""KVSinkCache: a quantized cache for models of the transformers package, which keeps the sinks in
full precision.

    cache = KVSinkCache(model, bits=4)
    model.generate(**inputs, past_key_values=cache)
    print(cache.sinks(), cache.bytes())

beyond/README.md says for which models it works.

What this file does not do: kvsink.py predicts sinks, quant.py quantizes, layer.py and growing.py
store the Keys and Values of a block, and sites.py finds l_E and c.

transformers runs the model. It gives Keys and Values to a cache, but no hidden state. So the cache
puts two hooks on the model (hooks.py), which show it the tokens that come, and channel c.

Shapes: b sequences, n tokens so far (padding too), m tokens of this forward pass, h_kv Key/Value
heads, d_k channels per head.
"""

import copy
from dataclasses import replace

import torch

try:
    import transformers

    if not transformers.__version__.startswith("5.23."):
        raise ImportError
except ImportError:
    raise ImportError(
        "KVSinkCache needs transformers 5.23, with which it was tested: "
        "pip install transformers==5.23.0"
    ) from None
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import kvsink
from beyond.codes import use_codes
from beyond.hooks import register_hooks
from beyond.layer import AFTER, UP_TO, Buffer, KVSinkLayer
from beyond.models import attended_tokens, decoder_of, head_sizes
from beyond.options import check_options, checked_site, choose_group_size
from beyond.saved import load_cache, save_cache
from beyond.sites import DecoderView, site_of
from kvsink import AUTO, NOWHERE, predict_sinks
from support.rows import rule_of


class KVSinkCache(Cache):
    """A cache for `model(..., past_key_values=)` and `model.generate`. Its defaults are the best
    setting that this project has measured.

    bits        1 to 8
    scheme      one of kvsink.SCHEMES; a static one needs `calibrate` first
    group_size  how many channels of a Value, and how many tokens of a channel of Keys, share a
                scale and a zero (default: the largest power of 2 that divides a head, at most 128)
    keep        "none", "pfn", "kvsink" or "pfn+kvsink", as in eval_ppl.py
    sinks       how many tokens to keep, or "auto": as many as stand out, at most 20 (default:
                "auto" if tokens are predicted, else 1)
    predict     a function in the place of Algorithm 1, lines 15-16, from H^{l_E} (b, n, d) to a
                mask (b, n). For example, RotateKV looks at all channels:
                lambda H: predict_sinks(H.abs().amax(-1, keepdim=True), c=0, k=min(20, H.shape[1]))
    site        kvsink.Site(l_E, c), or kvsink.NOWHERE to predict no sinks (default: Table 3's,
                else the one that the finder finds)
    tokenizer   for the finder (default: the model's own)
    attention   how a decoding step reads what is stored. "dequantized": transformers' own attention
                gets all Keys and Values in floating point. "codes": an attention of ours computes
                over the packed codes, which wants a compiler (codes.py)
    exact_prompt  whether a prompt's own attention reads its Keys and Values as they are, as with
                transformers' own quantized caches. By default it reads them quantized, as in the
                paper's perplexities.

    Sinks are predicted in prompts. A prompt is the first forward pass, and every later one of two
    or more tokens. If a prompt comes in chunks, the cache keeps a running top-k: a token of a new
    chunk has to be among the largest of all tokens so far, and a token that was kept stays.
    `predict` sees one chunk at a time. Raises ValueError if the model cannot be served or an
    argument is wrong.
    """

    # fmt: off
    def __init__(self, model, bits=4, scheme="channel-dynamic", *, group_size=None,
                 keep="pfn+kvsink", sinks=None, predict=None, site=None, tokenizer=None,
                 attention="dequantized", exact_prompt=False):
        # fmt: on
        if sinks is None:
            sinks = 1 if keep == "pfn" else AUTO
        check_options(scheme, keep, sinks, attention)
        self.rule = rule_of(keep, sinks)
        self.decoder = decoder_of(model)
        heads = head_sizes(self.decoder)
        self.group_size = choose_group_size(group_size, heads)
        self.predict = predict
        self.exact_prompt = exact_prompt
        self.reads_codes = attention == "codes"
        self.pending = []  # see KVSinkLayer.update
        if self.reads_codes:
            use_codes(self.decoder, heads)
        self.options = {"bits": bits, "scheme": scheme, "keep": keep, "sinks": sinks}
        site = checked_site(site, self.decoder)
        if self.rule.predicts:
            self.rule = self.rule.with_site(site or site_of(self.decoder, tokenizer))
        elif predict:
            raise ValueError(f"predict= has no effect with keep={keep!r} and sinks={sinks!r}")
        # The tensors (b, n) that all layers share, with one number per token so far:
        #   attended    the token is not padding
        #   in_prompt   it came in a prompt, and so may be a sink
        #   UP_TO       it is kept in the blocks up to l_E
        #   AFTER       it is kept in the blocks after l_E
        #   X           its number in channel c of H^{l_E}
        self.tokens = {}
        super().__init__(layers=self.make_layers(scheme, bits))
        self.quantized_layers = [layer for layer in self.layers if isinstance(layer, KVSinkLayer)]
        self.close = register_hooks(self)

    def make_layers(self, scheme, bits):
        """Return one layer per block. Layers with a sliding window, and any other layer than
        DynamicLayer, stay transformers' own."""
        layers = DynamicCache(config=self.decoder.config).layers
        buffers = [Buffer(), Buffer()]  # for Keys, for Values
        quantizers = kvsink.rtn_quantizers(DecoderView(self.decoder), scheme, bits, self.group_size)
        for l, pair in enumerate(quantizers, start=1):
            if type(layers[l - 1]) is DynamicLayer:
                pair = [replace(quantizer, fp16_params=True) for quantizer in pair]
                S_sink = UP_TO if l <= self.rule.site.l_E else AFTER
                layers[l - 1] = KVSinkLayer(self, pair, S_sink, buffers)
        return layers

    # Algorithm 1, before the first block and after block l_E

    def before_forward(self, arguments):
        """Note which tokens come in this forward pass, and which of them are kept up to block l_E.
        The first N of PFN are counted without padding."""
        past = self.quantized_layers[0].length
        attended = attended_tokens(arguments, past)
        m = attended.shape[1]
        self.append("attended", attended)
        self.append("in_prompt", attended & (m > 1 or past == 0))
        in_prompt = self.tokens["in_prompt"]
        self.tokens[UP_TO] = in_prompt & (in_prompt.cumsum(1) <= self.rule.first)
        if self.rule.site == NOWHERE:
            self.tokens[AFTER] = self.tokens[UP_TO]

    def after_emergence(self, arguments, H):
        """Algorithm 1, lines 15-16, after block l_E, over the prompts so far. Padding and decoded
        tokens count as 0."""
        H = H[0] if isinstance(H, tuple) else H  # (b, m, d)
        m = H.shape[1]
        in_prompt = self.tokens["in_prompt"][:, -m:]
        X = H[:, :, self.rule.site.c].to(in_prompt.device)
        self.append("X", X.masked_fill(~in_prompt, 0))  # a copy: a view would keep all of H
        X = self.tokens["X"][..., None]  # (b, n, 1)
        n = X.shape[1]
        if m == 1 < n:  # a decoded token is never a sink, so no top-k is needed
            S_sink = torch.zeros_like(in_prompt)
        elif self.predict:
            H = H.masked_fill(~in_prompt.to(H.device)[..., None], 0)
            S_sink = self.predict(H).to(in_prompt.device)
        else:
            k = self.rule.k
            S_sink = predict_sinks(X, 0, k if k == AUTO else min(k, n))
        self.append(AFTER, S_sink[:, -m:] & in_prompt)

    def append(self, name, new):
        if name in self.tokens:
            new = torch.cat((self.tokens[name], new), dim=1)
        self.tokens[name] = new

    @torch.no_grad()
    def calibrate(self, windows):
        """Calibrate a static scheme in full precision, as kvsink.observers do, on windows of token
        ids (W, n). A second call widens the ranges of the first."""
        self.reset()
        try:
            for window in windows.split(1):
                for layer in self.quantized_layers:
                    layer.observing = True
                self.decoder(input_ids=window, past_key_values=self)
                self.reset()
        finally:
            self.reset()

    # What is stored

    def sinks(self):
        """Return, for each sequence, the positions that are kept after block l_E. Padding has no
        position."""
        if not self.tokens:
            return []
        positions = self.tokens["attended"].cumsum(1) - 1
        return [p[kept].tolist() for p, kept in zip(positions, self.tokens[AFTER])]

    def bytes(self):
        """Return the bytes that the quantized layers store, and the bytes that the same numbers
        take in 16 bits."""
        layers = self.quantized_layers
        stored = sum(tensor.nbytes for layer in layers for tensor in layer.tensors())
        # The kept tokens of a store are (k, h_kv, d_k).
        sizes = [store.parts["kept"].shape for layer in layers for store in layer.held]
        b = len(self.tokens["attended"]) if self.tokens else 0
        return stored, 2 * self.get_seq_length() * b * sum(h_kv * d_k for _, h_kv, d_k in sizes)

    # What transformers asks of a cache

    def reset(self):
        super().reset()
        self.tokens.clear()
        self.pending.clear()

    def crop(self, tokens_to_remove):
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): pass minus the number of tokens to remove"
            )
        others = [layer for layer in self.layers if layer not in self.quantized_layers]
        for layer in (*others, *self.quantized_layers):  # the others first, which may refuse
            layer.crop(tokens_to_remove)
        for name, numbers in self.tokens.items():
            self.tokens[name] = numbers[:, : self.quantized_layers[0].length]

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        for name, numbers in self.tokens.items():
            self.tokens[name] = numbers[beam_idx.to(numbers.device)]

    def batch_repeat_interleave(self, repeats):
        b = len(self.tokens["attended"])
        self.reorder_cache(torch.arange(b).repeat_interleave(repeats))

    def batch_select_indices(self, indices):
        b = len(self.tokens["attended"])
        self.reorder_cache(torch.arange(b)[indices.cpu()])

    def activate_past_recording(self):
        raise ValueError(
            "no assisted decoding with a KVSinkCache, which would take the drafts for prompts"
        )

    # Copies and files

    def __deepcopy__(self, memo):
        """Return a cache that holds the same tokens, with hooks of its own on the same model. It
        takes no memory until one of the two grows."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.tokens = dict(self.tokens)
        other.pending = []
        buffers = [Buffer(), Buffer()]
        other.layers = [
            layer.copy(other, buffers) if layer in self.quantized_layers else copy.deepcopy(layer)
            for layer in self.layers
        ]
        other.quantized_layers = [x for x in other.layers if isinstance(x, KVSinkLayer)]
        other.close = register_hooks(other)
        return other

    def __reduce__(self):
        raise TypeError(
            "a KVSinkCache cannot be pickled, because it has hooks: use cache.save(FILE)"
        )

    def save(self, file):
        """Write what the cache holds to a file of safetensors. Raises ValueError if some layers are
        not quantized."""
        save_cache(self, file)

    @classmethod
    def load(cls, file, model, **options):
        """Return the cache that `save` wrote, for the same model. `predict` and `exact_prompt` are
        not in the file: give them again. Raises ValueError if the file is damaged or of another
        model."""
        return load_cache(cls, file, model, options)

    # `with KVSinkCache(model) as cache` removes the hooks at the end

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
