"""The main command as it stands on the README, on the default model."""

import itertools

import numpy as np
import torch

import eval_ppl
import kvsink
from llama import Llama
from support import hub, results
from support.tokenizer import Tokenizer
from tests.helpers import default_results, perplexities, results_of


def test_the_gain_of_five_predicted_tokens_is_no_chance(default_model):
    """In the rows that test_kvsink.py holds to an independent implementation, eight windows."""
    out = default_results()
    rows = "--scheme channel-static --bits 4 --keep pfn kvsink --sinks 5".split()
    assert eval_ppl.main([*rows, "--no-compile", "--json", str(out)]) == 0
    nll = {(r["keep"], r["sinks"]): r["nll"] for r in results_of(out)}
    d = np.subtract(nll["kvsink", 5], nll["pfn", 5])
    # A permutation test: if the rules were alike, each window's difference could as well have the
    # other sign.
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    p = (abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    assert p < 0.05 and "lower" in results.gain(nll["kvsink", 5], nll["pfn", 5])
    nothing = signs[signs.sum(1) == 0][0] * abs(d)  # four windows better, four worse
    assert "not resolved" in results.gain(nothing, np.zeros(8))


def test_one_token_again_and_again_keeps_twenty(default_model):
    """Each has the massive number of a sink, so a tenth of the largest is no bound; a short text
    keeps all it has."""
    model, tokenizer = (
        Llama.from_pretrained(default_model),
        Tokenizer.from_pretrained(default_model),
    )
    site, massive = kvsink.table_site(hub.DEFAULT_MODEL), []

    def step(block, H, *rest):
        H = kvsink.decoder_block(block, H, *rest)
        if block is model.blocks[site.l_E - 1]:
            massive.append((H[..., site.c].abs() > 10_000).sum().item())
        return H

    for n, kept in ((100, 20), (7, 7)):
        H = model.embedding(torch.full((1, n), tokenizer.eot))
        _, S_sink = kvsink.prefill(
            model, H, kvsink.full_precision_cache(model), *site, k=kvsink.AUTO, step=step
        )
        assert massive.pop() == n and S_sink.sum() == kept


def test_the_default_command(default_model, tmp_path):
    """The rows of `python eval_ppl.py`, on half of its first window: who is better shows there,
    too."""
    out = tmp_path / "out.json"
    small = "--no-compile --limit 1 --calib-windows 1 --seq-len 512 --json".split()
    assert eval_ppl.main([*small, str(out)]) == 0
    ppl = perplexities(out)
    assert len(ppl) == 13 and {scheme for scheme, *_ in ppl} == {
        "full",
        "channel-static",
        "token-static",
    }
    for bits in (4, 3):
        for scheme in ("channel-static", "token-static"):
            assert ppl[scheme, bits, "kvsink", 5] < ppl[scheme, bits, "pfn", 5]
    assert ppl["channel-static", 3, "kvsink", 5] < ppl["channel-static", 3, "pfn", 20]
