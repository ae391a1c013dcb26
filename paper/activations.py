"""The activations inside a block, seen by hooks, and what Sections 3 and 4 measure on them: sinks,
stages, attention and its bias.

Read top to bottom: the hooks; sinks and the five stages; attention scores, biases and cosines; a
Subject, which is a model on a text with its sinks found; the measurements, block by block, behind
Figures 6, 7 and 18.

What this file does not do: it draws nothing and prints nothing (figures.py, table1.py), and it does
not loop over the blocks itself: Llama.forward does.

Blocks are counted from 1, as in Algorithm 1; the paper's figures, Table 3 and the option --layer
count from 0.
"""

import functools
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from kvsink import OUTLIER, SPARSE, Site, check_hidden_state, rtn_quantizers, with_bits
from llama import Llama, apply_rope, attention, causal_mask, rope_table
from quant import Quantizer, clipped_range
from support.tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# Inside a block


class Activations(NamedTuple):
    """The activations of block l for one sequence, in fp32, under the names of Sections 2 and
    3.1."""

    l: int  # counted from 1
    Q: torch.Tensor  # (h, n, d_k), after RoPE
    K: torch.Tensor  # (h_kv, n, d_k), after RoPE
    V: torch.Tensor  # (h_kv, n, d_k)
    O: torch.Tensor  # (n, d), the attention's output
    H_: torch.Tensor  # (n, d), H^{l'}: the residual stream after the attention
    X_d_in: torch.Tensor  # (n, d_ffn), Eq. 7
    X_d_out: torch.Tensor  # (n, d), Eq. 8
    H: torch.Tensor  # (n, d), H^l


def map_blocks(model, tokens, reduce):
    """Run the model once over tokens (1, n), and return a list of what `reduce` makes of the
    Activations of each block.

    `reduce` is called after each block, and should return numbers or small tensors: only one
    block's activations are in memory at a time, because those of all blocks of a large model would
    not fit.
    """
    rope = rope_table(model.config, tokens.shape[1], tokens.device)
    inputs = {}  # module -> its input, in the block that is running
    outputs = {}
    results = []

    def remember(module, args, output):
        inputs[module] = args[0][0]
        outputs[module] = output[0]

    def finish(block, args, H):
        l = len(results) + 1
        results.append(reduce(block_activations(l, block, inputs, outputs, rope)))
        inputs.clear()
        outputs.clear()

    # The logits are unused, so only the last token's are computed.
    hooks = [model.W_vocab.register_forward_pre_hook(lambda module, args: args[0][:, -1:])]
    for l in range(len(model.blocks)):  # by index: a loop over blocks on disk would read them all
        block = model.blocks[l]
        linear = (block.W_q, block.W_k, block.W_v, block.W_o, block.FFN.W_d)
        for module in (*linear, block.LN_ffn, block):
            hooks.append(module.register_forward_hook(remember))
        hooks.append(block.register_forward_hook(finish))
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return results


def block_activations(l, block, inputs, outputs, rope):
    """Return the Activations of block l from the inputs and outputs of its modules."""

    def heads(W):  # (heads, n, d_k)
        return outputs[W].float().unflatten(-1, (-1, block.d_k)).transpose(0, 1)

    return Activations(
        l,
        Q=apply_rope(heads(block.W_q), rope),
        K=apply_rope(heads(block.W_k), rope),
        V=heads(block.W_v),
        O=outputs[block.W_o].float(),
        H_=inputs[block.LN_ffn].float(),
        X_d_in=inputs[block.FFN.W_d].float(),
        X_d_out=outputs[block.FFN.W_d].float(),
        H=outputs[block].float(),
    )


# --------------------------------------------------------------------------------------------------
# Sinks and stages (Section 3.1)


def sink_tokens(H, c):
    """Return S, a mask (n,) of the tokens with a stable outlier in channel c of H^{l_E} (n, d).
    A sink stands out from the hidden state as the finder in kvsink.py requires, and is less than
    ten times weaker than the strongest sink."""
    X = H.abs()
    return X[:, c] > torch.maximum(OUTLIER * X.median(), X[:, c].max() / SPARSE)


class Stages(NamedTuple):
    """The five stages of Figure 4, each a range of blocks, counted from 1. A range is empty if the
    model lacks that stage."""

    initial: range
    emergence: range
    stabilization: range
    dissipation: range
    final: range


STEADY = 1.5  # stable outliers stay within this factor of their level
FADED = 10  # they are gone when they are this many times below it


def find_stages(peak, typical):
    """Return the stages of stable outliers, a list of Stages, from the largest and the median |H^l|
    of every block, both (L,).

    The last Stages belong to the strongest outliers. Those before it belong to weaker outliers that
    come and go in the initial stage of the strongest: SmolLM2 has some, but the paper describes
    only one emergence. The list is empty if no outlier lasts from one block to the next: a single
    high block is not stable.
    """
    height = torch.where(peak > OUTLIER * typical, peak, 0.0)  # (L,)
    level = stable_level(height)
    if level is None:
        return []
    L = len(height)
    steady = (height > level / STEADY).tolist()
    faded = (height < level / FADED).tolist()
    # The first block of each stage, as an index from 0. The outliers emerge after the last block
    # without them, and dissipate when two blocks in a row are low: one low block is a mere dip.
    top = steady.index(True)  # the first block at full height
    rise = max((l + 1 for l in range(top) if faded[l]), default=0)
    fall = min((l for l in range(top, L) if not any(steady[l : l + 2])), default=L)
    gone = min((l + 1 for l in range(fall, L) if faded[l]), default=L)
    edges = [l + 1 for l in (0, rise, top + 1, fall, gone, L)]  # counted from 1
    main = Stages(*(range(*ends) for ends in itertools.pairwise(edges)))
    return [*find_stages(peak[:rise], typical[:rise]), main]


def stable_level(height):
    """Return the level that the strongest outliers hold from block to block, or None if there is
    none. `height` (L,) is the largest |H^l| of each block, 0 if nothing stands out in it."""
    low = torch.minimum(height[1:], height[:-1])  # (L - 1,)
    high = torch.maximum(height[1:], height[:-1])
    held = torch.where(high < STEADY * low, low, 0.0)  # of two neighbours at the same level
    if not held.any():
        return None
    return held[held > held.max() / 4].median()


def extremes(X):
    """Return, for each token of X (n, channels), the entry that is largest in magnitude, with its
    sign: (n,)."""
    return X.gather(1, X.abs().argmax(1, keepdim=True))[:, 0]


def outlier_evolution(model, tokens, c):
    """Measure Figures 4 and 12-17 on tokens (1, n). Returns

        curves     "X_d_in", "X_d_out", "H_", "H" -> (L, n), the extremes of each block
        typical    (L,), the median |H^l|
        S          a mask (L, n) of the tokens that stand out in channel c of H^l

    Raises NotFinite if a hidden state holds NaN or inf.
    """
    names = ("X_d_in", "X_d_out", "H_", "H")

    def reduce(acts):
        check_hidden_state(acts.H, acts.l, len(model.blocks))
        peaks = [extremes(getattr(acts, name)) for name in names]
        return [X.cpu() for X in (*peaks, acts.H.abs().median(), sink_tokens(acts.H, c))]

    columns = zip(*map_blocks(model, tokens, reduce))
    *curves, typical, S = (torch.stack(column) for column in columns)
    return dict(zip(names, curves)), typical, S


# --------------------------------------------------------------------------------------------------
# Attention, and its bias (Sections 3.2 and 4.2)


def repeat_for_queries(X, h):
    """Repeat Keys or Values (h_kv, n, d_k) for the query heads that share them: (h, n, d_k)."""
    return X.repeat_interleave(h // X.shape[0], dim=0)


def attention_scores(Q, K, sliding_window=None):
    """Eq. 3: P = Softmax(Q K^T / sqrt(d_k) + M). Q (h, n, d_k), K (h_kv, n, d_k) -> (h, n, n), with
    p_i^t at [:, t, i]."""
    scores = Q @ repeat_for_queries(K, len(Q)).mT / Q.shape[-1] ** 0.5
    M = causal_mask(Q.shape[1], sliding_window, Q.device)
    return scores.masked_fill(~M, -torch.inf).softmax(-1)


def attention_bias(P, V, S):
    """Eq. 9: the sum over i in S of p_i^t v_i. P (h, n, n), V (h_kv, n, d_k), S a mask (n,) ->
    (h, n, d_k)."""
    return P[:, :, S] @ repeat_for_queries(V, len(P))[:, S]


def cosines(Q, K):
    """Return the cosine similarity of every query and every key: (h, n, n)."""
    return F.normalize(Q, dim=-1) @ F.normalize(repeat_for_queries(K, len(Q)), dim=-1).mT


def mean_cosine(X):
    """Figure 6a: the mean cosine similarity of all pairs of vectors of X (h, n, d_k) -> (h,)."""
    U = F.normalize(X, dim=-1)
    n = X.shape[1]
    return (U.sum(1).square().sum(-1) - n) / (n * (n - 1))  # |sum u|^2 = n + the sum over pairs


# --------------------------------------------------------------------------------------------------
# A model on a text


@dataclass(frozen=True)
class Subject:
    """A model on a text, and where its outliers and sinks are."""

    name: str  # the model's name in titles
    text: str  # the text's name in titles
    model: Llama
    tokenizer: Tokenizer
    # Token ids (1, n) on the model's device. Table 1 uses all windows, the figures draw the first.
    windows: list
    site: Site
    block: int  # the block that is drawn, counted from 1
    # As `outlier_evolution` and `find_stages` return them, for the first window.
    curves: dict
    typical: torch.Tensor
    stages: list
    stable_blocks: list  # those of the stabilization stage that come after l_E: they have sinks
    S: torch.Tensor  # (n,), the sinks of the first window, on the CPU
    quantizers: dict = field(default_factory=dict)  # as `static_quantizers` returns them
    calibration: str = ""  # on what they were calibrated, in words

    @functools.cached_property
    def activations(self):
        """The Activations of the block that is drawn, on the first window."""
        return self.map_blocks(lambda acts: acts if acts.l == self.block else None)[self.block - 1]

    def map_blocks(self, reduce):
        """Return a list of what `reduce` makes of the Activations of each block, on the first
        window."""
        return map_blocks(self.model, self.windows[0], reduce)

    def map_stable_blocks(self, tokens, reduce):
        """Run the model once over tokens (1, n), and return a list of what `reduce` makes of the
        Activations of each stable block and of S, a mask (n,) of the sinks among these tokens."""
        S = None

        def reduce_if_stable(acts):
            nonlocal S
            if acts.l == self.site.l_E:
                S = sink_tokens(acts.H, self.site.c)
            return reduce(acts, S) if acts.l in self.stable_blocks else None

        results = map_blocks(self.model, tokens, reduce_if_stable)
        return [results[l - 1] for l in self.stable_blocks]

    def scores(self, acts):
        """Return the attention scores (h, n, n) of a block."""
        return attention_scores(acts.Q, acts.K, self.model.config.sliding_window)


def examine(model, windows, site, layer=None, *, name, text, tokenizer):
    """Return the Subject of a model on windows of token ids (1, n).

    `layer` is the layer to draw, counted from 0. The default is the second in which sinks are
    stable, which is the paper's layer 3 of LLaMA2-7B. Raises ValueError if no token stands out, or
    if every token does.
    """
    curves, typical, S = outlier_evolution(model, windows[0], site.c)
    S = S[site.l_E - 1]  # (n,)
    stages = find_stages(curves["H"].abs().amax(1), typical)
    stable_blocks = [l for l in stages[-1].stabilization if l > site.l_E] if stages else []
    if not stable_blocks or not S.any():
        place = f"{name} after block {site.l_E} (from 1)"
        raise ValueError(f"no stable outliers: no token of {text} stands out in {place}")
    if S.all() or S.nonzero()[0] == len(S) - 1:
        raise ValueError(f"{text}: there is no other token to compare the sinks of {name} with")
    return Subject(
        name=name,
        text=text,
        model=model,
        tokenizer=tokenizer,
        windows=windows,
        site=site,
        block=stable_blocks[:2][-1] if layer is None else layer + 1,
        curves=curves,
        typical=typical,
        stages=stages,
        stable_blocks=stable_blocks,
        S=S,
    )


# --------------------------------------------------------------------------------------------------
# Static quantization with sinks and without, for Table 1 and Figure 7

KINDS = {  # the columns of Table 1: tensor and granularity
    "per-token Keys": ("K", "token"),
    "per-token Values": ("V", "token"),
    "per-channel Keys": ("K", "channel"),
}
GROUP = 16  # the group size of Table 1 and of Figure 7
FIGURE_7_BITS = (8, 4, 3, 2)


def static_quantizers(subject, calibration):
    """Calibrate a static Quantizer (l, kind, kept) for every stable block on windows (1, n), and
    return them in a dict. If kept is False, all tokens count; if it is True, all but the sinks."""
    quantizers = {}

    def calibrate(acts, S):
        for kind, (tensor, granularity) in KINDS.items():
            for kept in (False, True):
                new = Quantizer(8, granularity, GROUP, static=True)
                quantizer = quantizers.setdefault((acts.l, kind, kept), new)
                quantizer.calibrate(getattr(acts, tensor), (S & kept)[:, None])

    for tokens in calibration:
        subject.map_stable_blocks(tokens, calibrate)
    return quantizers


def quantized_attention(subject, acts, S, bits, kept):
    """Return Keys and Values after static per-token quantization, and the attention scores and the
    bias of Eq. 9 that they give. If `kept` is True, the sinks stay in full precision."""

    def quantizer(kind):
        return replace(subject.quantizers[acts.l, kind, kept], bits=bits)

    keep = (S & kept)[:, None]
    K = torch.where(keep, acts.K, quantizer("per-token Keys")(acts.K))
    V = torch.where(keep, acts.V, quantizer("per-token Values")(acts.V))
    P = attention_scores(acts.Q, K, subject.model.config.sliding_window)
    return K, V, P, attention_bias(P, V, S)


def static_damage(subject):
    """Measure the damage of static per-token quantization, the numbers behind Figure 7. Returns a
    list of dicts, one for each number of bits.

    Errors are relative, |X' - X| / |X| on the first window, over all stable blocks. "scores" are
    all p_i^t, "bias" is that of Eq. 9. In "scores, kept" and "bias, kept" the sinks are kept in
    full precision and left out of the calibration.
    """
    sums = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))  # (bits, name) -> two sums

    def add(acts, S):
        for bits, name, X_, X in quantized_pairs(subject, acts, S):
            sums[bits, name] += torch.tensor([(X_ - X).square().sum(), X.square().sum()])
        bar.update()

    L = len(subject.stable_blocks)
    with tqdm(desc="Figure 7", total=L, leave=False, unit="block", disable=None) as bar:
        subject.map_stable_blocks(subject.windows[0], add)
    rows = {bits: {"bits": bits} for bits in FIGURE_7_BITS}
    for (bits, name), (error, size) in sums.items():
        rows[bits][name] = math.sqrt(error / size)
    return list(rows.values())


def quantized_pairs(subject, acts, S):
    """Yield (bits, name, X', X) for every column of `static_damage` in one block."""
    P = subject.scores(acts)
    bias = attention_bias(P, acts.V, S)
    for bits in FIGURE_7_BITS:
        K, V, P_, bias_ = quantized_attention(subject, acts, S, bits, kept=False)
        _, _, P_kept, bias_kept = quantized_attention(subject, acts, S, bits, kept=True)
        yield bits, "sinks' K", K[:, S], acts.K[:, S]
        yield bits, "others' K", K[:, ~S], acts.K[:, ~S]
        yield bits, "sinks' V", V[:, S], acts.V[:, S]
        yield bits, "others' V", V[:, ~S], acts.V[:, ~S]
        yield bits, "scores", P_, P
        yield bits, "scores, kept", P_kept, P
        yield bits, "bias", bias_, bias
        yield bits, "bias, kept", bias_kept, bias


# --------------------------------------------------------------------------------------------------
# Figures 6a and 18 in numbers


def bias_similarity(subject):
    """Figure 6a: the mean cosine similarity of the attention biases (Eq. 9) of all pairs of tokens
    from the first sink on, (L, h)."""
    S = subject.S.to(subject.model.device)
    first = int(subject.S.nonzero()[0])

    def reduce(acts):
        return mean_cosine(attention_bias(subject.scores(acts), acts.V, S)[:, first:]).cpu()

    return torch.stack(subject.map_blocks(reduce))


def norms_by_block(subject):
    """Figures 18, 20, 22, 23: "Q", "K", "V" -> (L, 2, 3), the L2 norms of sinks and of the other
    tokens, each as its 10th, 50th and 90th percentile over heads and tokens."""
    S = subject.S
    levels = torch.tensor([0.1, 0.5, 0.9])

    def percentiles(X):  # (heads, n, d_k) -> (2, 3)
        norms = X.norm(dim=-1).cpu()  # (heads, n)
        return torch.stack([norms[:, S].quantile(levels), norms[:, ~S].quantile(levels)])

    def reduce(acts):
        return [percentiles(X) for X in (acts.Q, acts.K, acts.V)]

    columns = zip(*subject.map_blocks(reduce))
    return {name: torch.stack(column) for name, column in zip("QKV", columns)}


# --------------------------------------------------------------------------------------------------
# What the lecture page shows of a block (course/page.py)


def attention_share(P, S):
    """Return the share of each head's attention that goes to the sinks S (n,), a mean over the
    tokens after the first sink: P (h, n, n) -> (h,)."""
    first = int(S.nonzero()[0])
    return P[:, first + 1 :, S].sum(-1).mean(-1)


def shown_channels(H, S, c):
    """Return name -> channel of H^{l_E} (n, d): c; the second in which sinks stand out, if there is
    one; and the one whose largest magnitude is the median over channels."""
    X = H.abs()
    X[:, c] = 0
    second = int(X[S].amax(0).argmax())
    ordinary = int(X.amax(0).argsort()[X.shape[1] // 2])
    if X[S, second].max() < max(OUTLIER * X.median(), SPARSE * X[:, second].median()):
        return {"outlier": c, "ordinary": ordinary}
    return {"outlier": c, "second outlier": second, "ordinary": ordinary}


class KeyGroup(NamedTuple):
    """The Keys x of one head that share a scale: `channels` of each of `tokens`, in this order."""

    head: int
    by: str  # "channel": one channel of GROUP tokens; "token": GROUP channels, static, 4 tokens
    tokens: range
    channels: range
    wider: float  # the group's range, as a multiple of that of the numbers that are not the sinks'
    x: list


def key_groups(K, S, heads=3):
    """Return KeyGroups of K (h_kv, n, d_k) with a sink of S (n,) in them, of a few heads. Of each
    kind there are three: the one whose range the sink widens most, the one in the first eighth of
    this order, and the median."""
    h_kv, n, d_k = K.shape
    aligned = [range(start, min(start + GROUP, n)) for start in range(0, n, GROUP)]
    anywhere = [range(start, min(start + 4, n)) for start in range(max(1, n - 3))]
    groups = []
    for head in range(0, h_kv, -(-h_kv // heads)):
        for by, spans, g in (("channel", aligned, 1), ("token", anywhere, min(GROUP, d_k))):
            tokens = most_others(spans, S)
            X = K[head, list(tokens)]  # (tokens, d_k)
            widened = spread(X, by) / spread(X, by, S[list(tokens)][:, None])
            order = widened.argsort(descending=True).tolist()
            for i in dict.fromkeys(order[rank] for rank in (0, len(order) // 8, len(order) // 2)):
                channels = range(i * g, (i + 1) * g)
                x = X[:, list(channels)].flatten().tolist()
                groups.append(KeyGroup(head, by, tokens, channels, widened[i].item(), x))
    return groups


def most_others(spans, S):
    """Return, of those spans of tokens that have a sink, the last with the most other tokens."""
    with_sink = [span for span in reversed(spans) if S[list(span)].any()]
    return max(with_sink, key=lambda span: int((~S[list(span)]).sum()))


def spread(X, by, leave_out=None):
    """Return the ranges of the groups of X (n, d) that all its tokens share, (groups,)."""
    lo, hi = clipped_range(X, by, GROUP if by == "token" else None, (-3,), leave_out)
    return (hi - lo).flatten().clamp(min=1e-9)  # a range of no number is -inf


def rtn_errors(subject, acts, keep, widths, scheme="channel-static"):
    """Quantize a block's Keys and Values by an RTN scheme that is calibrated on this text, while
    the tokens of `keep` (n,) stay as they are. Return the relative errors |X' - X| / |X| of Keys,
    of Values, and of the attention (Eq. 3 before W_o): (widths, 3)."""

    def attend(K, V):
        window = subject.model.config.sliding_window
        return attention(acts.Q[None], K[None], V[None], window)

    keep = keep.to(acts.K.device)[:, None]
    X = (acts.K, acts.V)
    pair = rtn_quantizers(subject.model, scheme, 8, GROUP)[0]
    for quantizer, tensor in zip(pair, X):
        quantizer.calibrate(tensor, keep)
    exact = (*X, attend(*X))
    rows = []
    for bits in widths:
        quantizers = with_bits([pair], bits)[0]
        K, V = (torch.where(keep, tensor, Q(tensor)) for Q, tensor in zip(quantizers, X))
        pairs = zip((K, V, attend(K, V)), exact)
        rows.append([float((Y - Z).norm() / Z.norm()) for Y, Z in pairs])
    return rows
