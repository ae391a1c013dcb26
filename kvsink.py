"""KVSink: predict the attention sinks from one hidden channel of one block, keep their Keys and Values (Algorithm 1).

Read top to bottom: Table 3 says where the stable outliers of each model emerge; then Algorithm 1, to be laid beside the
printed one line by line; then the schemes of Section 5.1 and their calibration, which is Algorithm 1 with quantizers
that only look; last the finder, which locates the outliers of a model that Table 3 does not list.

What this file does not do: the transformer's parts come from llama.py and the equations of quantization from quant.py.
It stores no cache: Keys and Values are quantized and dequantized in place, which is what perplexity needs.

Blocks are counted from 1, as Algorithm 1 does; only Table 3, as printed, counts from 0.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from llama import apply_rope, attention, rope_table
from quant import NotFinite, Quantizer

# ---------------------------------------------------------------------------------------------------------------------
# Table 3: emergence stage and outlier channels of stable outliers


class Table3Row(NamedTuple):
    layers: int
    emergence: int  # as printed, counted from 0
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
    "smollm2-135m": Table3Row(
        30, 11, 576, (507, 247)
    ),  # not the paper's: found by `find_site` below
}


class Site(NamedTuple):
    """Where Algorithm 1 looks: after block l_E (counted from 1), in channel c."""

    l_E: int
    c: int


def table_site(name):
    """Table 3's row as Algorithm 1 needs it: its layer + 1, because it counts from 0, and the first of its channels."""
    row = TABLE_3[name]
    return Site(l_E=row.emergence + 1, c=row.channels[0])


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1. S_sink is a mask (b, n): True for the tokens whose Keys and Values stay as they are. A cache is a list of
# L pairs (quantize_K, quantize_V), each a function of K or V (b, h_kv, n, d_k) and of the mask of tokens to leave out,
# which quantizes and dequantizes.
# The numbers on the right are the printed lines.


# fmt: off
def decoder_block(block, H, S_sink, quantize_K, quantize_V, rope, pre_rope=False):
    """Algorithm 1, lines 6-13: H^{l-1} -> H^l, both (b, n, d). The paper leaves RoPE out of its lines: Keys are
    quantized after it, as a cache holds them, or before it with `pre_rope`, as KVQuant does."""
    sink = S_sink[:, None, :, None]                               #     (b, 1, n, 1): a sink is one in every head
    X = block.LN_mhsa(H)                                          # 6   (b, n, d)
    Q, K, V = block.QKV(X)                                        # 7   (b, h, n, d_k), twice (b, h_kv, n, d_k)
    Q, K = apply_rope(Q, rope), K if pre_rope else apply_rope(K, rope)
    K_quant = torch.where(sink, K, quantize_K(K, sink))           # 8   only the tokens not in S_sink are quantized
    V_quant = torch.where(sink, V, quantize_V(V, sink))           # 9, 10
    K_quant = apply_rope(K_quant, rope) if pre_rope else K_quant
    A = attention(Q, K_quant, V_quant, block.sliding_window)      # 11  (b, n, h d_k)
    H = block.W_o(A) + H                                          # 12  (b, n, d), H^{l'} of Eq. 2
    return block.FFN(block.LN_ffn(H)) + H                         # 13  (b, n, d)


def predict_sinks(H, c, k):
    """Algorithm 1, lines 15-16: the k tokens of each sequence with the largest |H^{l_E}| (b, n, d) in channel c."""
    nothing = torch.zeros(H.shape[:2], dtype=torch.bool, device=H.device)
    S_outliers = H[:, :, c].abs().topk(k, dim=1).indices          # 15  (b, k): the i of every (i, c)
    return nothing.scatter(1, S_outliers, True)                   # 16  (b, n)


AUTO = "auto"  # in the place of k, which is not the paper's
MAX_AUTO_SINKS = 20  # so many tokens are kept then: the paper's largest N


def predict_auto(H, c):
    """Lines 15-16 without k, not the paper's: of the MAX_AUTO_SINKS tokens that `predict_sinks` marks, those that reach a
    tenth of the largest of their sequence. Sinks are some hundred times larger than the rest, so the tenth is not
    delicate; the bound holds where there is no gap, as in a text of one token again and again."""
    X = H[:, :, c].abs()                                          #     (b, n)
    return predict_sinks(H, c, min(MAX_AUTO_SINKS, X.shape[1])) & (X >= X.amax(1, keepdim=True) / 10)


def prefill(model, H, cache, l_E=0, c=0, k=0, S_sink=None, pre_rope=False, step=decoder_block):
    """Algorithm 1. H is H^0 (b, n, d); returns H^L (b, n, d) and S_sink (b, n), each sequence with its own.

    l_E, c and k make it KVSink-k, S_sink = pfn(H, N) makes it PFN-N, without either nothing is kept. With both, S_sink
    is kept up to block l_E. k = AUTO finds the sinks without k. `step` is lines 6-13, eager or compiled. Raises
    ValueError where k exceeds n.
    """
    if k != AUTO and k > H.shape[1]:
        raise ValueError(f"cannot keep {k} of {H.shape[1]} tokens")
    rope = rope_table(model.config, H.shape[1], H.device)
    S_sink = pfn(H, 0) if S_sink is None else S_sink              # 4   the empty set
    for l, block in enumerate(model.blocks, start=1):             # 5
        quantize_K, quantize_V = cache[l - 1]
        H = step(block, H, S_sink, quantize_K, quantize_V, rope, pre_rope)  # 6-13
        if l == l_E:                                              # 14
            S_sink = predict_auto(H, c) if k == AUTO else predict_sinks(H, c, k)  # 15, 16
    return H, S_sink                                              # 19
# fmt: on


def pfn(H, N):
    """Preserve-First-N: the mask (b, n) of the first N tokens of each sequence, kept from block 1 on."""
    b, n, _ = H.shape
    return (torch.arange(n, device=H.device) < N).repeat(b, 1)


def preservation(keep, N, site, H):
    """The arguments that make `prefill` follow a rule, with N tokens: "none", "pfn" or "kvsink", and one that the paper
    does not have: "pfn+kvsink" keeps token 0 up to block l_E, and the N predicted tokens after it."""
    rule = {"l_E": site.l_E, "c": site.c, "k": N} if "kvsink" in keep else {}
    if "pfn" in keep:
        rule["S_sink"] = pfn(H, 1 if "kvsink" in keep else N)
    return rule


def compiled(function, **how):
    """`function` under torch.compile; `how` are its options. `decoder_block` is compiled at its first call and then
    serves every block, because weights, masks and ranges are inputs of its graph. Another scheme has another graph."""
    torch._dynamo.config.recompile_limit = (
        64  # graphs before torch would quietly go on without compiling
    )
    return torch.compile(function, **how)


# ---------------------------------------------------------------------------------------------------------------------
# The RTN schemes of Section 5.1 and their calibration


class Scheme(NamedTuple):
    K: str  # granularity of the Keys
    V: str  # granularity of the Values
    static: bool


SCHEMES = {
    "token-static": Scheme("token", "token", True),
    "token-dynamic": Scheme("token", "token", False),
    "channel-static": Scheme("channel", "token", True),
    "channel-dynamic": Scheme("channel", "token", False),  # not the paper's: KIVI's, for decoding
}
PAPER_SCHEMES = tuple(SCHEMES)[:3]


def unquantized(X, leave_out):
    """The quantizer of a full-precision cache."""
    return X


def full_precision_cache(model):
    return [(unquantized, unquantized)] * len(model.blocks)


def rtn_cache(model, scheme, bits, group_size):
    """A cache of one of the SCHEMES; a static one has to be calibrated."""
    K, V, static = SCHEMES[scheme]
    blocks = range(len(model.blocks))
    return [
        (Quantizer(bits, K, group_size, static), Quantizer(bits, V, group_size, static))
        for _ in blocks
    ]


def with_bits(cache, bits):
    """The same cache at another width: ranges do not depend on the bits, so one calibration serves all."""
    return [(replace(K, bits=bits), replace(V, bits=bits)) for K, V in cache]


def observers(caches):
    """In the place of a cache: quantizers that return K and V unchanged, and widen the static ranges of all `caches` by
    what lies outside S_sink. `prefill` with them is the calibration, so "sink tokens should also be excluded during
    quantization parameter calibration" (Appendix G) needs no code of its own. One pass for each rule of preservation
    serves all schemes and widths. Raises NotFinite, naming the block, where a Key or Value is NaN or inf."""

    def observer(l, quantizers):
        def observe(X, leave_out):
            for quantizer in quantizers:
                try:
                    quantizer.calibrate(X, leave_out)
                except NotFinite:
                    raise NotFinite(
                        f"NaN or inf in the Keys or Values of block {l} (from 1) while calibrating"
                    ) from None
            return X

        return observe

    blocks = enumerate(zip(*caches), start=1)  # of each block the pairs of all caches
    return [tuple(observer(l, quantizers) for quantizers in zip(*pairs)) for l, pairs in blocks]


# ---------------------------------------------------------------------------------------------------------------------
# The finder: emergence block and outlier channels of any LLaMA-type model

PROMPTS = (  # Appendix D
    "The following are multiple choice questions (with answers) about machine learning.\n \n "
    "A 6-sided die is rolled 15 times and the results are: side 1 comes up 0 times;",
    "Summer is warm.\n Winter is cold.\n Spring is mild.\n Autumn is crisp.\n "
    "The sun rises early in the summer.\n The days are short in the winter.\n ",
)
OUTLIER = 100  # a stable outlier is at least this many times the median magnitude of its block's hidden state,
SPARSE = (
    10  # and this many times the median of its channel over the tokens: it belongs to a few tokens
)


class Outliers(NamedTuple):
    """What one prompt shows: the emergence block (counted from 1), and its outlier channels, the largest first."""

    l_E: int
    channels: tuple[int, ...]
    magnitudes: tuple[float, ...]


def check_hidden_state(H, l, L):
    """Raises NotFinite, naming block l of L, where H^l holds NaN or inf."""
    if not torch.isfinite(H).all():
        raise NotFinite(f"NaN or inf first appeared in block {l} of {L}, counted from 1")


def stable_outliers(model, tokens):
    """The stable outliers (Section 3.1) that a prompt (1, n) shows. Raises ValueError where it shows none, NotFinite
    where a hidden state holds NaN or inf."""
    L, peak, typical, elsewhere = len(model.blocks), [], [], []

    def look(block, inputs, H):  # H^l (1, n, d)
        check_hidden_state(H, len(peak) + 1, L)
        X = H[0].to(tokens.device).abs().float()  # (n, d); the blocks may lie on several devices
        peak.append(X.amax(0))  # (d,): the largest token of each channel
        elsewhere.append(X.median(0).values)  # (d,): an ordinary token of each channel
        typical.append(X.median())

    hooks = [model.blocks[l].register_forward_hook(look) for l in range(L)]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    peak, elsewhere, typical = (
        torch.stack(peak),
        torch.stack(elsewhere),
        torch.stack(typical),
    )  # (L, d), (L, d), (L,)
    outlying = (peak > OUTLIER * typical[:, None]) & (peak > SPARSE * elsewhere)  # (L, d)
    # The stabilization stage spans most blocks: a channel's median over the blocks is the level at which it is stable.
    level = torch.where(outlying, peak, 0.0).median(0).values  # (d,)
    if not level.max() > 0:
        raise ValueError(
            "no stable outliers: no channel of any token stands out through most blocks"
        )
    c = int(level.argmax())
    # It emerges where it first comes near that level; a weaker emergence before it (SmolLM2 has one) stays far below.
    l = int((outlying[:, c] & (peak[:, c] > level[c] / 4)).int().argmax())
    channels = (outlying[l] & (level > 0)).nonzero().flatten()
    channels = channels[peak[l, channels].argsort(descending=True)]
    return Outliers(l + 1, tuple(channels.tolist()), tuple(peak[l, channels].tolist()))


def find_site(model, prompts):
    """The site of any LLaMA-type model from several prompts (token ids, each a list): Appendix D finds that block and
    channel do not depend on the input. Raises ValueError where there are no stable outliers or the prompts disagree."""
    device = model.embedding.weight.device
    found = [stable_outliers(model, torch.tensor([prompt], device=device)) for prompt in prompts]
    if any(
        other.l_E != found[0].l_E or other.channels[0] != found[0].channels[0] for other in found
    ):
        seen = ", ".join(f"block {o.l_E} (from 1) channel {o.channels[0]}" for o in found)
        raise ValueError(
            f"the prompts disagree where outliers emerge: {seen}; eval_ppl.py has --layer and --channel"
        )
    return Site(found[0].l_E, found[0].channels[0])
