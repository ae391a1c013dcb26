"""KVSink: predict the attention sinks from one channel of one block's output, and keep their Keys
and Values in full precision while all others are quantized (Algorithm 1).

Read top to bottom: Algorithm 1, in the printed order, and PFN, its rival; the Rule that says which
tokens a run keeps; the schemes of Section 5.1 and their calibration, which is Algorithm 1 with
observers in place of quantizers; Table 3, which says where the outliers of each model emerge, and a
finder for a model that it does not list; last, KVSink without k, and the block for KVQuant.

What this file does not do: the parts of the transformer come from llama.py, the equations of
quantization from quant.py. It stores no cache: Keys and Values are quantized and dequantized in
place, which is all that perplexity needs.

Blocks are counted from 1, as in Algorithm 1; only Table 3, as printed, counts from 0.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from llama import apply_rope, attention, rope_table
from quant import NotFinite, Quantizer

# --------------------------------------------------------------------------------------------------
# Algorithm 1. The numbers at the right are its printed lines.
#
# H is a hidden state (b, n, d) of b sequences, n tokens and d channels. S_sink is a mask (b, n),
# True for the tokens whose Keys and Values are kept as they are. `quantizers` is a list of L pairs
# (quantize_K, quantize_V). Each takes K or V (b, h_kv, n, d_k), and a mask (broadcastable to it) of
# tokens to leave out of the ranges, and returns K or V quantized and dequantized.

AUTO = "auto"  # in place of k: keep as many tokens as stand out (see the end of this file)


# fmt: off
def prefill(model, H, quantizers, l_E=0, c=0, k=0, S_sink=None, step=None):  # 1  parameters
    """Algorithm 1: return H^L (b, n, d), and S_sink (b, n) as it is after the last block.

    KVSink-k has l_E, c and k. PFN-N has S_sink = pfn(H, N) instead. With both, `S_sink` is kept up
    to block l_E and the predicted tokens after it; with neither, nothing is kept (l_E = 0 is no
    block). `step` does lines 6-13; by default it is `decoder_block`. Raises ValueError if k > n.
    """
                                                                        # 2  the input is H = H^0
                                                                        # 3  the output is H^L
    step = step or decoder_block
    rope = rope_table(model.config, H.shape[1], H.device)
    S_sink = empty_set(H) if S_sink is None else S_sink                 # 4
    for l, block in enumerate(model.blocks, start=1):                   # 5
        quantize_K, quantize_V = quantizers[l - 1]
        H = step(block, H, S_sink, quantize_K, quantize_V, rope)        # 6-13
        if l == l_E:                                                    # 14
            S_sink = predict_sinks(H, c, k)                             # 15-16
                                                                        # 17  end if
                                                                        # 18  end for
    return H, S_sink                                                    # 19


def decoder_block(block, H, S_sink, quantize_K, quantize_V, rope):
    """Algorithm 1, lines 6-13: H^{l-1} -> H^l, both (b, n, d). The printed lines leave out RoPE:
    Keys are quantized after it, as a cache holds them."""
    sink = S_sink[:, None, :, None]                                     #     (b, 1, n, 1)
    X = block.LN_mhsa(H)                                                # 6   (b, n, d)
    Q, K, V = block.QKV(X)                                              # 7   (b, h or h_kv, n, d_k)
    Q = apply_rope(Q, rope)
    K = apply_rope(K, rope)
    K_quant = torch.where(sink, K, quantize_K(K, sink))                 # 8   sinks keep their K
    V_quant = torch.where(sink, V, quantize_V(V, sink))                 # 9-10
    AV = attention(Q, K_quant, V_quant, block.sliding_window)           # 11  (b, n, h d_k)
    H = block.W_o(AV) + H                                               # 12  H^{l'} of Eq. 2
    return block.FFN(block.LN_ffn(H)) + H                               # 13  (b, n, d)


def predict_sinks(H, c, k):
    """Algorithm 1, lines 15-16: return a mask (b, n) of the k tokens of each sequence with the
    largest |H^{l_E}| (b, n, d) in channel c. k may be AUTO. Raises ValueError if k exceeds n."""
    if k == AUTO:
        return predict_sinks_without_k(H, c)
    if k > H.shape[1]:
        raise ValueError(f"cannot keep {k} of {H.shape[1]} tokens")
    S_outliers = H[:, :, c].abs().topk(k, sorted=False).indices         # 15  (b, k), positions i
    return empty_set(H).scatter_(1, S_outliers, True)                   # 16  (b, n)
# fmt: on


def pfn(H, N):
    """Preserve-First-N: return a mask (b, n) of the first N tokens of each sequence, which are kept
    from block 1 on."""
    b, n, _ = H.shape
    return (torch.arange(n, device=H.device) < N).repeat(b, 1)


def empty_set(H):
    """Return the mask (b, n) of no token."""
    return torch.zeros(H.shape[:2], dtype=torch.bool, device=H.device)


def compiled(function, **options):
    """Return `function` under torch.compile. One graph of `decoder_block` serves all blocks,
    because weights, masks and ranges are its inputs; each scheme has a graph of its own."""
    torch._dynamo.config.recompile_limit = 64  # beyond this many graphs, torch runs eager
    return torch.compile(function, **options)


# --------------------------------------------------------------------------------------------------
# Which tokens a run keeps


class Site(NamedTuple):
    """The place where sinks are predicted: after block l_E (counted from 1), in channel c."""

    l_E: int
    c: int


NOWHERE = Site(0, 0)  # blocks are counted from 1, so nothing is predicted


@dataclass(frozen=True)
class Rule:
    """The choice of tokens that keep their Keys and Values in full precision.

        Rule()                 nothing is kept
        Rule(first=N)          PFN-N: the first N tokens, in every block
        Rule(k=k)              KVSink-k: the k predicted tokens, after block l_E
        Rule(first=1, k=k)     not the paper's: token 0 up to block l_E, and after block l_E the
                               k predicted tokens

    k may be AUTO. The site belongs to a model: `with_site` adds it.
    """

    first: int = 0
    k: int | str = 0
    site: Site = NOWHERE

    @property
    def predicts(self):
        return self.k != 0

    @property
    def max_kept(self):
        """The most tokens that it keeps in a block."""
        return max(self.first, MAX_AUTO_SINKS if self.k == AUTO else self.k)

    def with_site(self, site):
        return replace(self, site=site) if self.predicts else self

    def prefill_arguments(self, H):
        """Return the arguments that make `prefill` follow this rule on H (b, n, d)."""
        l_E, c = self.site
        return {"l_E": l_E, "c": c, "k": self.k, "S_sink": pfn(H, self.first)}

    def __str__(self):
        names = [f"PFN-{self.first}"] * (self.first > 0) + [f"KVSink-{self.k}"] * self.predicts
        return "+".join(names) or "nothing"


# --------------------------------------------------------------------------------------------------
# The RTN schemes of Section 5.1, and their calibration


class Scheme(NamedTuple):
    K: str  # granularity of the Keys
    V: str  # granularity of the Values
    static: bool


SCHEMES = {
    "token-static": Scheme("token", "token", True),
    "token-dynamic": Scheme("token", "token", False),
    "channel-static": Scheme("channel", "token", True),
    "channel-dynamic": Scheme("channel", "token", False),  # KIVI's; not in Section 5.1
}
PAPER_SCHEMES = tuple(SCHEMES)[:3]


def unquantized(X, leave_out):
    """The quantizer that changes nothing, for a cache in full precision."""
    return X


def full_precision_quantizers(model):
    return [(unquantized, unquantized)] * len(model.blocks)


def rtn_quantizers(model, scheme, bits, group_size):
    """Return the quantizers of one of the SCHEMES. Static ones must be calibrated before use."""
    K, V, static = SCHEMES[scheme]
    return [
        (Quantizer(bits, K, group_size, static), Quantizer(bits, V, group_size, static))
        for _ in range(len(model.blocks))
    ]


def with_bits(quantizers, bits):
    """Return the same quantizers at another width. Ranges do not depend on the bits, so one
    calibration serves all widths."""
    return [(replace(K, bits=bits), replace(V, bits=bits)) for K, V in quantizers]


def observers(schemes):
    """Return observers to take the place of quantizers: they return K and V unchanged, and widen
    the static ranges of all `schemes`, a list of lists of quantizers, to include the tokens that
    are not in S_sink.

    To calibrate, run `prefill` with them. So "sink tokens should also be excluded during
    quantization parameter calibration" (Appendix G) needs no code of its own: a token counts in
    just those blocks in which it will be quantized. One pass for each Rule serves all schemes and
    widths. Raises NotFinite, naming the block, if a Key or Value is NaN or inf.
    """

    def observer(l, quantizers):
        def observe(X, leave_out):
            for quantizer in quantizers:
                try:
                    quantizer.calibrate(X, leave_out)
                except NotFinite:
                    place = f"the Keys or Values of block {l} (from 1) while calibrating"
                    raise NotFinite(f"NaN or inf in {place}") from None
            return X

        return observe

    pairs_of_observers = []
    for l, pairs in enumerate(zip(*schemes), start=1):  # each scheme's pair for block l
        K_quantizers, V_quantizers = zip(*pairs)
        pairs_of_observers.append((observer(l, K_quantizers), observer(l, V_quantizers)))
    return pairs_of_observers


# --------------------------------------------------------------------------------------------------
# Table 3: where stable outliers emerge, and in which channels


class Table3Row(NamedTuple):
    layers: int
    emergence: int  # the layer, counted from 0 as printed
    hidden_size: int
    channels: tuple[int, ...]


TABLE_3 = {
    "llama2-7b": Table3Row(32, 1, 4096, (2533, 1415)),
    "llama2-13b": Table3Row(40, 3, 5120, (4743, 2100)),
    "mistral-7b": Table3Row(32, 1, 4096, (2070, 3398)),
    "llama3-8b": Table3Row(32, 1, 4096, (788, 1384, 4062)),
    "llama3.1-8b-instruct": Table3Row(32, 1, 4096, (788, 1384, 4062)),
    "llama3.2-1b": Table3Row(16, 1, 2048, (400, 698, 2029, 1159)),
    "llama3.2-3b": Table3Row(28, 1, 3072, (588, 1016, 3046, 1731)),
    "smollm2-135m": Table3Row(30, 11, 576, (507, 247)),  # not the paper's: `find_site` found it
}


def table_site(name):
    """Return the Site that Table 3 gives for a model: its layer + 1, because the table counts from
    0 and Algorithm 1 from 1, and the first of its channels."""
    row = TABLE_3[name]
    return Site(l_E=row.emergence + 1, c=row.channels[0])


# --------------------------------------------------------------------------------------------------
# The finder: emergence block and outlier channels of any LLaMA-type model

PROMPTS = (  # Appendix D
    "The following are multiple choice questions (with answers) about machine learning.\n \n "
    "A 6-sided die is rolled 15 times and the results are: side 1 comes up 0 times;",
    "Summer is warm.\n Winter is cold.\n Spring is mild.\n Autumn is crisp.\n "
    "The sun rises early in the summer.\n The days are short in the winter.\n ",
)
# A stable outlier is above OUTLIER times the median magnitude of its block's hidden state. It is
# also above SPARSE times the median magnitude of its channel over the tokens, so that only a few
# tokens have it. A median is torch.median: the lower of the two middle numbers of an even count.
OUTLIER = 100
SPARSE = 10


class Outliers(NamedTuple):
    """The outliers that one prompt shows: the emergence block (counted from 1), and the outlier
    channels with their magnitudes, the largest first."""

    l_E: int
    channels: tuple[int, ...]
    magnitudes: tuple[float, ...]


def check_hidden_state(H, l, L):
    """Raise NotFinite, naming block l of L, if H^l holds NaN or inf."""
    if not torch.isfinite(H).all():
        raise NotFinite(f"NaN or inf first appeared in block {l} of {L}, counted from 1")


def stable_outliers(model, tokens):
    """Return the stable outliers (Section 3.1) that a prompt (1, n) shows. Raises ValueError if it
    shows none, NotFinite if a hidden state holds NaN or inf."""
    L = len(model.blocks)
    peak = []  # of each block (d,): the maximum over tokens, channel by channel
    ordinary = []  # of each block (d,): the median over tokens, channel by channel
    typical = []  # of each block: the median of all its numbers

    def look(block, inputs, H):  # H^l (1, n, d)
        check_hidden_state(H, len(peak) + 1, L)
        X = H[0].to(tokens.device).abs().float()  # (n, d); blocks may lie on several devices
        peak.append(X.amax(0))
        ordinary.append(X.median(0).values)
        typical.append(X.median())

    hooks = [model.blocks[l].register_forward_hook(look) for l in range(L)]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    peak = torch.stack(peak)  # (L, d)
    ordinary = torch.stack(ordinary)  # (L, d)
    typical = torch.stack(typical)[:, None]  # (L, 1)
    outlying = (peak > OUTLIER * typical) & (peak > SPARSE * ordinary)  # (L, d)
    # The stabilization stage spans most blocks, so the median over the blocks is the level at which
    # a channel is stable.
    level = torch.where(outlying, peak, 0.0).median(0).values  # (d,)
    if not level.max() > 0:
        raise ValueError("no stable outliers: no channel of any token stands out in most blocks")
    c = int(level.argmax())
    # It emerges in the first block in which it exceeds a quarter of that level. A weaker emergence
    # in an earlier block (SmolLM2 has one) stays far below it.
    l = int((outlying[:, c] & (peak[:, c] > level[c] / 4)).int().argmax())
    channels = (outlying[l] & (level > 0)).nonzero().flatten()
    channels = channels[peak[l, channels].argsort(descending=True)]
    return Outliers(l + 1, tuple(channels.tolist()), tuple(peak[l, channels].tolist()))


def find_site(model, prompts):
    """Return the Site of any LLaMA-type model from several prompts, each a list of token ids.
    Appendix D finds that block and channel do not depend on the input. Raises ValueError if there
    are no stable outliers or the prompts disagree."""
    tokens = [torch.tensor([prompt], device=model.device) for prompt in prompts]  # each (1, n)
    found = [stable_outliers(model, prompt) for prompt in tokens]
    sites = [Site(outliers.l_E, outliers.channels[0]) for outliers in found]
    if len(set(sites)) > 1:
        seen = ", ".join(f"block {l_E} (from 1) channel {c}" for l_E, c in sites)
        options = f"--layer {sites[0].l_E - 1} --channel {sites[0].c}"  # layers count from 0
        raise ValueError(
            f"the prompts disagree about where outliers emerge: {seen}; choose one ({options})"
        )
    return sites[0]


# --------------------------------------------------------------------------------------------------
# Not in Algorithm 1: KVSink without k, and Keys quantized before RoPE, as KVQuant has them

MAX_AUTO_SINKS = 20  # the most tokens that auto mode keeps: the paper's largest N


def predict_sinks_without_k(H, c):
    """Lines 15-16 for k = AUTO: return a mask (b, n) of those of the MAX_AUTO_SINKS tokens with the
    largest |H^{l_E}| (b, n, d) in channel c that have at least a tenth of the largest of their
    sequence.

    Sinks are some hundred times larger than the rest, so the exact threshold hardly matters. The
    limit on their number matters only if there is no such gap, as in a text that repeats one
    token."""
    X = H[:, :, c].abs()  # (b, n)
    largest = predict_sinks(H, c, min(MAX_AUTO_SINKS, X.shape[1]))
    return largest & (X >= X.amax(1, keepdim=True) / 10)


def decoder_block_pre_rope(block, H, S_sink, quantize_K, quantize_V, rope):
    """A `step` for `prefill` that differs from `decoder_block` in one thing: Keys are quantized
    before RoPE, as KVQuant does, and rotated after it."""
    sink = S_sink[:, None, :, None]
    Q, K, V = block.QKV(block.LN_mhsa(H))
    K_quant = apply_rope(torch.where(sink, K, quantize_K(K, sink)), rope)
    V_quant = torch.where(sink, V, quantize_V(V, sink))
    AV = attention(apply_rope(Q, rope), K_quant, V_quant, block.sliding_window)
    H = block.W_o(AV) + H
    return block.FFN(block.LN_ffn(H)) + H
