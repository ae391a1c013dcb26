"""Algorithm 1 on windows of text: window by window, or streamed; and with observers, which is
calibration.

What this file does not do: the algorithm is kvsink.py's. What is made of H^L is the caller's
business.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tqdm import tqdm

import kvsink
from quant import NotFinite
from support import cli, stream


@dataclass(frozen=True)
class How:
    """How Algorithm 1 runs: lines 6-13 and the loss, each eager or compiled; Keys quantized before
    or after RoPE; window by window, or all windows through one block after the other
    (stream.py)."""

    step: Callable
    nll: Callable
    pre_rope: bool = False
    stream: bool = False


def algorithm_1(model, tokens, cache, rule, how, label):
    """Yields each window (1, n) of `tokens` (W, n), its H^L (1, n, d) and its S_sink (n,). `rule`
    is keep, N and site, as kvsink.preservation takes them."""
    device = model.embedding.weight.device
    with tqdm(
        total=len(tokens) * len(model.blocks),
        desc=label,
        unit="block",
        leave=False,
        disable=cli.bar_off(),
    ) as bar:

        def step(*arguments):
            H = how.step(*arguments)
            bar.update()
            return H

        for batch in [tokens] if how.stream else [tokens[w : w + 1] for w in range(len(tokens))]:
            H = (
                stream.embed(model, batch) if how.stream else model.embedding(batch.to(device))
            )  # H^0
            through = stream.one_at_a_time(step, device) if how.stream else step
            kept = kvsink.preservation(*rule, H)
            H, S_sink = kvsink.prefill(model, H, cache, pre_rope=how.pre_rope, step=through, **kept)
            for window, H_w, S_sink_w in zip(batch, H, S_sink):
                yield window[None].to(device), H_w[None].to(device), S_sink_w


def calibrated(model, tokens, schemes, group_size, rule, how):
    """scheme -> its cache, for static schemes under one rule of preservation: Algorithm 1 with
    observers, eager."""
    caches = {scheme: kvsink.rtn_cache(model, scheme, 8, group_size) for scheme in schemes}
    how = replace(how, step=kvsink.decoder_block)
    for _ in algorithm_1(
        model, tokens, kvsink.observers(caches.values()), rule, how, "calibrating"
    ):
        pass
    return caches


def first_non_finite(model, tokens, cache, rule, how):
    """The first block after which a hidden state is not finite, found by running these windows
    again, eager."""
    L = len(model.blocks)

    def step(block, H, *rest):
        H = kvsink.decoder_block(block, H, *rest)
        if not H.isfinite().all():
            l = next(l for l in range(L) if model.blocks[l] is block)
            raise NotFinite(f"block {l + 1} of {L}, counted from 1")
        return H

    try:
        for _ in algorithm_1(
            model, tokens, cache, rule, replace(how, step=step), "looking for NaN"
        ):
            pass
    except NotFinite as block:
        return str(block)
    return "the output layer"
