"""The main command: its rows, file, table and figure on a tiny model; and, as it stands on the
README, on the default model."""

import contextlib
import io
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

import eval_ppl
import kvsink
from support import hub, report
from support.rows import row_of
from support.tokenizer import Tokenizer
from tests.helpers import default_results, perplexities, results_of, sample_documents

# --------------------------------------------------------------------------------------------------
# A tiny model


class Evaluation(NamedTuple):
    results: list  # what the JSON file holds
    table: str  # what was printed
    picture: bytes


@pytest.fixture(scope="module")
def evaluation(tiny, tmp_path_factory):
    """Three windows of 64 tokens, all schemes at two widths, with 0 and 5 tokens kept."""
    folder = tmp_path_factory.mktemp("evaluation")
    out = folder / "out.json"
    plot = folder / "fig9.png"
    options = f"--bits 4 2 --sinks 0 5 --limit 3 --json {out} --plot {plot}".split()
    table = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(table):
        patch.setattr(hub, "documents", sample_documents)
        assert eval_ppl.main([*tiny, *options]) == 0
    return Evaluation(results_of(out), table.getvalue(), plot.read_bytes())


def test_the_json_file_has_each_row_once(evaluation):
    results = evaluation.results
    rows = [(r["scheme"], r["bits"], r["keep"], r["sinks"]) for r in results]
    assert rows[:4] == [
        ("full", 16, "none", 0),
        ("token-static", 4, "none", 0),
        ("token-static", 4, "pfn", 5),
        ("token-static", 4, "kvsink", 5),
    ]
    assert len(rows) == len(set(rows)) == 1 + 3 * 2 * 3
    settings = "model data seq_len windows scheme bits group_size keep sinks".split()
    measured = "ppl ppl_fp avg_bits seconds".split()
    assert all({*settings, *measured} <= result.keys() for result in results)


def test_settings_are_what_was_used(evaluation):
    full, static, *_ = evaluation.results
    dynamic = evaluation.results[-7]
    for result in (full, static, dynamic):
        used = {"device": "cpu", "dtype": "float32", "compiled": False, "bos": "start"}
        used |= {"torch": torch.__version__, "windows": 3}
        assert used.items() <= result.items()
    assert dynamic["scheme"] == "token-dynamic"
    assert (static["calib_windows"], static["calib_data"]) == (4, "wiki-sample")
    for result in (full, dynamic):
        assert (result["calib_windows"], result["calib_data"]) == (0, None)


def test_a_beginning_for_each_window_is_another_setting(tiny, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = f"--scheme token-dynamic --keep none --bits 4 --limit 2 --json {out}".split()
    assert eval_ppl.main([*tiny, *options]) == 0
    assert eval_ppl.main([*tiny, *options, "--bos", "window"]) == 0
    results = results_of(out)
    assert [result["bos"] for result in results] == ["start", "start", "window", "window"]
    assert results[0]["tokens"] != results[2]["tokens"]
    assert results[0]["ppl"] != results[2]["ppl"]
    assert "each after a begin-of-sequence token" in capsys.readouterr().out


def test_the_bits_per_number(evaluation):
    full, nothing, pfn, *_ = evaluation.results
    # 16 bits each for a scale and a zero per head of 8 channels, which 64 tokens share.
    once = 32 / (8 * 64)
    # A kept token has 32 numbers in its Keys and Values, and its position in 32 bits.
    kept = ((64 - 5) * 4 + 5 * (16 + 32 / 32)) / 64
    assert full["avg_bits"] == 16
    assert nothing["avg_bits"] == pytest.approx(4 + once)
    assert pfn["avg_bits"] == pytest.approx(kept + once)
    (dynamic,) = [
        r
        for r in evaluation.results
        if (r["scheme"], r["bits"], r["keep"]) == ("token-dynamic", 2, "none")
    ]
    assert dynamic["avg_bits"] == 2 + 32 / 8  # of each head of each token, a scale and a zero


def test_the_table(evaluation):
    table = evaluation.table
    asked = "3 windows of 64 tokens, groups of 8 channels, which is a head (128 were asked for)"
    assert asked in table
    # The text has no training split, so another calibrates, and the table says which.
    calibrated = (
        "static ranges calibrated on 4 windows of 64 tokens of wiki-sample's training split"
    )
    assert table.splitlines()[1] == calibrated
    assert "sinks predicted after block 2 (counted from 1) in channel 5" in table
    best = min(evaluation.results[1:4], key=lambda result: result["ppl"])
    after = [line.strip() for line in table.splitlines()[8:10]]
    assert after[0] == f"{row_of(best).rule} is the best of these"
    assert after[1].startswith("KVSink-5 against PFN-5: ")
    assert table.count("is the best of these") == table.count("against") == 6


def test_the_plot_is_figure_9_of_the_results(evaluation):
    results = evaluation.results
    assert evaluation.picture.startswith(b"\x89PNG")
    axes = {axis.get_title(): axis for axis in report.figure_9(results).axes}
    axis = axes["model on text.txt\nchannel-static, 2 bits"]
    lines = {line.get_label(): line for line in axis.lines}
    panel = [r for r in results if (r["scheme"], r["bits"]) == ("channel-static", 2)]
    for keep, label in (("pfn", "PFN"), ("kvsink", "KVSink")):
        ppl = {r["sinks"]: r["ppl"] for r in panel if r["keep"] in (keep, "none")}
        assert set(ppl) == {0, 5}
        assert dict(zip(*lines[label].get_data())) == ppl
    assert set(lines["full precision"].get_ydata()) == {results[0]["ppl"]}


# --------------------------------------------------------------------------------------------------
# The default model


def test_the_gain_of_five_predicted_tokens_is_no_chance(default_model):
    """Eight windows, in the rows that test_kvsink.py holds to an independent implementation."""
    out = default_results()
    rows = "--scheme channel-static --bits 4 --keep pfn kvsink --sinks 5".split()
    assert eval_ppl.main([*rows, "--no-compile", "--json", str(out)]) == 0
    nll = {(r["keep"], r["sinks"]): r["nll"] for r in results_of(out)}
    d = np.subtract(nll["kvsink", 5], nll["pfn", 5])
    # A permutation test: if the rules were alike, each window's difference could as well have the
    # other sign.
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    p = (abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    assert p < 0.05
    assert "lower" in report.gain(nll["kvsink", 5], nll["pfn", 5])
    nothing = signs[signs.sum(1) == 0][0] * abs(d)  # four windows better, four worse
    assert "not resolved" in report.gain(nothing, np.zeros(8))


@pytest.mark.parametrize("n, kept", [(100, 20), (7, 7)])
def test_one_token_again_and_again_keeps_at_most_twenty(n, kept, default_model, default_llama):
    """Each has the massive number of a sink, so a tenth of the largest is no bound; a short text
    keeps all its tokens."""
    model = default_llama
    tokenizer = Tokenizer.from_pretrained(default_model)
    site = kvsink.table_site(hub.DEFAULT_MODEL)
    massive = []  # the number of massive tokens in block l_E

    def step(block, H, *rest):
        H = kvsink.decoder_block(block, H, *rest)
        if block is model.blocks[site.l_E - 1]:
            massive.append((H[..., site.c].abs() > 10_000).sum().item())
        return H

    H = model.embedding(torch.full((1, n), tokenizer.eot))
    quantizers = kvsink.full_precision_quantizers(model)
    _, S_sink = kvsink.prefill(model, H, quantizers, *site, k=kvsink.AUTO, step=step)
    assert massive == [n]
    assert S_sink.sum() == kept


def test_the_default_command(default_model, tmp_path):
    """The rows of `python eval_ppl.py`, on its first window: it shows there, too, which rule is
    better."""
    out = tmp_path / "out.json"
    small = f"--no-compile --limit 1 --calib-windows 2 --json {out}".split()
    assert eval_ppl.main(small) == 0
    ppl = perplexities(out)
    assert len(ppl) == 11
    assert {scheme for scheme, *_ in ppl} == {"full", "channel-static", "token-static"}
    for scheme, bits in (("channel-static", 4), ("channel-static", 3), ("token-static", 4)):
        assert ppl[scheme, bits, "kvsink", 5] < ppl[scheme, bits, "pfn", 5]
    assert ppl["channel-static", 3, "kvsink", 5] < ppl["channel-static", 3, "pfn", 20]
