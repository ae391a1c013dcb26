"""What KVSinkCache would keep in a model of transformers, and whether that matters: where outliers
emerge, which tokens of a text are sinks, how much attention they get, and what keeping them gains.

    python -m beyond.transformers_cache --model ID --check

What this file does not do: the finder and lines 15-16 of Algorithm 1 are kvsink.py's.
"""

import torch
import torch.nn.functional as F

from beyond.kvsink_cache import KVSinkCache
from beyond.models import decoder_of
from beyond.sites import DecoderView
from kvsink import NOWHERE, predict_sinks_without_k, stable_outliers

TOKENS = 256  # of the text
BITS = 4


@torch.no_grad()
def print_check(model, tokenizer, window, site):
    """Print all that for the beginning of a text, a window of token ids (1, n)."""
    tokens = window[:, :TOKENS]
    decoder = decoder_of(model)
    if site == NOWHERE:
        print("no stable outliers were found: KVSinkCache would keep token 0 alone")
        return
    l_E, c = site
    L = len(decoder.layers)
    print(f"outliers emerge after block {l_E} of {L} (counted from 1), in channel {c}")
    try:
        found = stable_outliers(DecoderView(decoder), tokens)
        pairs = zip(found.channels[:3], found.magnitudes)
        largest = ", ".join(f"{magnitude:,.0f} in channel {c}" for c, magnitude in pairs)
        print(f"  in this text after block {found.l_E}; the largest: {largest}")
    except ValueError as error:
        print(f"  in this text: {error}")
    sinks, X, attention = observe(model, decoder, tokens, site)
    print(f"\nsinks among the {tokens.shape[1]} tokens, and their share of the attention "
          f"\nof its second half (mean over heads and the blocks after {l_E}):")  # fmt: skip
    for i in sinks:
        token = tokenizer.decode([tokens[0, i].item()])
        print(f"  token {i:>4} {token!r:<20}|H| {X[i]:>10,.0f}   attention {attention[i]:>6.1%}")
    others = attention.sum() - attention[sinks].sum()
    print(f"  all other tokens together {'':>28}attention {others:>6.1%}")
    print_gain(model, tokens, site, sinks)


def observe(model, decoder, tokens, site):
    """Return the positions of the sinks of a text; |H^{l_E}| of each token in channel c (n,); and
    its share of the attention (n,) of the queries in the second half."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its attention
    try:
        out = decoder(
            input_ids=tokens, output_hidden_states=True, output_attentions=True, use_cache=False
        )
    finally:
        model.set_attn_implementation(implementation)
    l_E, c = site
    H = out.hidden_states[l_E].float().cpu()  # 0 is before the first block
    (sinks,) = predict_sinks_without_k(H, c).nonzero()[:, 1:].T
    maps = [A[0].mean(0) for A in out.attentions[l_E:] if A is not None]  # each (n, n)
    attention = torch.stack(maps).float().cpu().mean(0)  # rows are queries
    second_half = attention[attention.shape[0] // 2 :]  # they see all tokens of the first
    return sinks.tolist(), H[0, :, c].abs(), second_half.mean(0)


def print_gain(model, tokens, site, sinks):
    """Print how far predictions at 4 bits are from full precision's under three rules."""
    full = model(tokens).logits[0].float().log_softmax(-1)
    print(f"\nKL divergence from full precision at {BITS} bits, nats per token of this text:")
    kl = {}
    for name, options in (
        ("nothing kept", {"keep": "none"}),
        ("token 0 kept", {"keep": "pfn"}),
        ("the sinks kept, token 0 up to l_E", {"keep": "pfn+kvsink"}),
    ):
        cache = KVSinkCache(model, BITS, site=site, **options)
        log_p = model(tokens, past_key_values=cache).logits[0].float().log_softmax(-1)
        kl[name] = kl_divergence(log_p, full)
        cache.close()
        print(f"  {name:<36}{kl[name]:.4f}")
    nothing, first, predicted = kl.values()
    if sinks == [0]:
        print("\nToken 0 is the only sink of this text: PFN-1 keeps all there is to keep, and "
              "prediction adds nothing.")  # fmt: skip
    elif predicted < first:
        print(f"\nThere are sinks beyond token 0. Keeping them lowers KL by "
              f"{1 - predicted / first:.0%} on this text.")  # fmt: skip
    else:
        print("\nThere are sinks beyond token 0, but keeping them does not lower KL on this text.")
    if min(first, predicted) > nothing:
        print("Keeping no token at all is better here.")


def kl_divergence(log_q, log_p):
    """Return the KL divergence of log-probabilities log_q (m, vocab) from log_p, a mean over m."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
