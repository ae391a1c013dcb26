"""paper/figures.py and `python -m paper`: the numbers in the pictures, and the commands."""

import hashlib
import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kvsink
import paper.__main__ as whole_paper
import quant
from paper import activations, figures
from support import hub
from tests.helpers import (
    CHANNEL,
    DIGITS,
    PLANTED,
    STRONG,
    WEAK,
    bytes_vocabulary,
    refuse,
    write_bpe,
    write_model,
    write_weights,
)
from tests.subjects import drawable, planted_subject  # noqa: F401

# --------------------------------------------------------------------------------------------------
# Pictures


class Letters:
    """A tokenizer that only decodes."""

    def decode(self, ids):
        return {STRONG: "STRONG", WEAK: "WEAK"}.get(ids[0], f"${ids[0]}")


@pytest.fixture
def drawn():
    """A subject, its Activations (l -> Activations), and the attention scores in the block that is
    drawn."""
    subject = replace(planted_subject(), tokenizer=Letters())
    acts = {acts.l: acts for acts in subject.map_blocks(lambda acts: acts)}
    assert subject.block == 4 and len(subject.S) == 40  # all of it is drawn token by token
    return subject, acts, activations.attention_scores(acts[4].Q, acts[4].K)


def image(axis):
    return torch.tensor(np.ma.filled(axis.images[0].get_array().astype(float), np.nan))


def shows(axis, X):
    """Return whether a map of queries by keys shows X, and is white if a query does not see a
    key."""
    drawn = image(axis)
    seen = torch.ones(40, 40).tril().bool()
    same = torch.allclose(drawn[seen], X.double()[seen], atol=1e-6)
    return same and torch.equal(drawn.isnan(), ~seen)


def panels_of(figure):
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def mean_cosines(acts):
    return activations.cosines(acts.Q, acts.K).mean(0)


def test_figure_1(drawn):
    subject, acts, P = drawn
    axes = panels_of(figures.figure_1(subject))
    S = subject.S
    assert shows(axes[0], P.mean(0))
    tall = acts[2].H.abs() > acts[2].H.abs().max() / 50
    assert len(axes[1].lines) == tall.sum() >= 2
    assert {line.get_color() for line in axes[1].lines} == {figures.SINK}
    H = torch.stack([a.H[:, CHANNEL].abs() for a in acts.values()])  # (L, n)
    assert np.allclose([line.get_ydata() for line in axes[2].lines[:2]], H[:, S].T)
    assert np.allclose(axes[2].lines[2].get_ydata(), H[:, ~S].amax(1))


def test_figure_2(drawn):
    subject, acts, _ = drawn
    for axis, name in zip(panels_of(figures.figure_2(subject)), "QKV", strict=True):
        norms = getattr(acts[4], name).norm(dim=-1)
        dots = axis.lines[::2]
        bars = axis.lines[1::2]
        tokens = [int(line.get_xdata()[0]) for line in dots]
        assert tokens == list(range(8, 32))  # 24 tokens about the last sink
        for i, dot, bar in zip(tokens, dots, bars):
            assert np.allclose(dot.get_ydata(), norms[:, i])
            assert bar.get_ydata()[0] == pytest.approx(norms[:, i].median().item())
            color = figures.SINK if subject.S[i] else figures.OTHER
            assert dot.get_color() == bar.get_color() == color
        assert [label.get_text() for label in axis.get_xticklabels()][14] == "WEAK 22"


def test_figure_4(drawn):
    subject, acts, _ = drawn
    S = subject.S
    names = ("X_d_in", "X_d_out", "H_", "H")
    figure = figures.figure_4(subject)
    left = figure.subfigs[0].axes[0]
    panels = np.array(figure.subfigs[1].axes).reshape(4, 3)
    for line, name in zip(left.lines, names):
        peaks = [getattr(a, name).abs().max() for a in acts.values()]
        assert np.allclose(line.get_ydata(), peaks)
    titles = ["initial, block 1", "emergence, block 2", "stabilization, block 5"]
    assert [panel.get_title() for panel in panels[0]] == titles
    for row, name in zip(panels, names):
        for panel, l in zip(row, (1, 2, 5)):
            others, sinks = panel.collections
            X = getattr(acts[l], name)
            X = X[range(40), X.abs().argmax(1)]
            ends = [segment[1] for segment in sinks.get_segments()]
            assert np.allclose(ends, torch.stack([S.nonzero()[:, 0], X[S]], 1))
            assert np.allclose([segment[1][1] for segment in others.get_segments()], X[~S])


def test_figure_5(drawn):
    subject, acts, P = drawn
    S = subject.S
    Q, K, V, O = acts[4][1:5]
    a, b, c, d, e, f = panels_of(figures.figure_5(subject))
    assert shows(a, mean_cosines(acts[4])) and shows(d, P.mean(0))
    for axis, X in ((b, Q), (c, K), (e, V), (f, O[None])):
        others, sinks = axis.lines[:2]
        norms = X.norm(dim=-1).median(0).values
        assert np.allclose(sinks.get_ydata(), norms[S]) and sinks.get_color() == figures.SINK
        assert np.allclose(others.get_ydata(), norms[~S])


def test_figure_6(drawn):
    subject, acts, P = drawn
    axes = panels_of(figures.figure_6(subject))
    bias = activations.attention_bias(P, acts[4].V, subject.S)[:, 5:]  # from the first sink on
    similarity = image(axes[0])[:, 3]  # (h,), in block 4
    assert torch.allclose(similarity, activations.mean_cosine(bias).double(), atol=1e-6)
    heads = similarity.argsort(descending=True)
    for axis, head in zip(axes[1:4], (heads[0], heads[2], heads[3])):
        assert torch.allclose(image(axis), bias[head].double())


def test_figure_7(drawn):
    subject, acts, P = drawn
    S = subject.S
    axes = np.array(panels_of(figures.figure_7(subject))).reshape(4, 5)
    bias = activations.attention_bias(P, acts[4].V, S)
    head = int(activations.mean_cosine(bias).argmax())
    for kept in (0, 1):
        assert shows(axes[kept, 0], P.mean(0))
        assert torch.allclose(image(axes[2 + kept, 0]), bias[head].double())
        for column, bits in enumerate((8, 4, 3, 2), start=1):
            *_, P_, bias_ = activations.quantized_attention(subject, acts[4], S, bits, bool(kept))
            assert shows(axes[kept, column], P_.mean(0))
            assert torch.allclose(image(axes[2 + kept, column]), bias_[head].double())
            error = ((bias_ - bias).norm() / bias.norm()).item()
            assert axes[2 + kept, column].get_title() == f"{bits} bits, error {error:.3f}"


def test_figure_11(drawn):
    subject, acts, _ = drawn
    axes = panels_of(figures.figure_11(subject))
    for l, top, below in zip((2, 4, 5, 6), axes[:4], axes[4:], strict=True):
        assert top.get_title() == f"block {l} (layer {l - 1})"
        assert shows(top, activations.attention_scores(acts[l].Q, acts[l].K).mean(0))
        assert shows(below, mean_cosines(acts[l]))


def test_figures_18_and_19(drawn):
    subject, acts, _ = drawn
    S = subject.S
    for axis, name in zip(panels_of(figures.figure_18(subject)), "QKV", strict=True):
        norms = [getattr(a, name).norm(dim=-1) for a in acts.values()]
        for line, tokens, color in zip(axis.lines, (S, ~S), (figures.SINK, figures.OTHER)):
            assert np.allclose(line.get_ydata(), [np.median(N[:, tokens]) for N in norms])
            assert line.get_color() == color
    for axis, name in zip(panels_of(figures.figure_19(subject)), "QKV", strict=True):
        X = getattr(acts[4], name).abs()[:, 8:32]  # (heads, tokens, d_k)
        assert torch.allclose(image(axis), torch.cat([x.T for x in X]).double())


def numbers_by_hand(n, d, granularity, g):
    """Return the number of the group of each number, counted row by row: Figure 10 as a plain
    loop."""
    numbers = np.empty((n, d), int)
    for i, c in np.ndindex(n, d):
        group = {"token": (i * d + c) // g, "channel": i // g * d + c, "tensor": i // g}
        numbers[i, c] = group[granularity]
    return numbers


@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_groups_are_numbered_as_figure_10_draws_them(granularity):
    for n, g in ((12, 4), (10, 4), (3, 8)):
        expected = numbers_by_hand(n, 8, granularity, g)
        assert np.array_equal(figures.group_numbers(n, 8, granularity, g), expected), (n, g)


def test_figure_10():
    axes = panels_of(figures.figure_10(None))
    for axis, granularity in zip(axes, quant.GRANULARITIES, strict=True):
        texts = {text.get_position()[::-1]: text for text in axis.texts}
        for (i, c), number in np.ndenumerate(numbers_by_hand(12, 8, granularity, 4)):
            assert texts[i, c].get_text() == str(number)
            assert (texts[i, c].get_color() == figures.SINK) == (i in (0, 6))


def test_long_texts_are_drawn_in_squares():
    """300 tokens are drawn as 100 squares of 3: each square shows the largest number in it, and one
    that no query sees is white."""
    X = torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
    S = torch.arange(300) == 0
    axis = figures.Figure().subplots()
    squares = figures.draw_pairs(axis, X, S, "").get_array()
    assert squares.shape == (100, 100) and squares[0, 1] is np.ma.masked
    assert squares[40, 7] == X[120:123, 21:24].max()
    assert squares[40, 40] == X[120:123, 120:123].tril().max()
    left, right = axis.get_xlim()
    assert left < -5 and right == 299.5  # token 0 stands clear of the frame


# --------------------------------------------------------------------------------------------------
# The commands


def test_all_figures_and_tables_of_a_model(drawable, tmp_path, capsys):  # noqa: F811
    assert whole_paper.main(drawable) == 0
    printed = capsys.readouterr()
    out = tmp_path / "out"
    pictures = {f"fig{number}-model-prompt1.png" for number in (1, 2, 4, 5, 6, 7, 10, 11, 18, 19)}
    tables = {"table1-model-prompt1.json", "fig7-model-prompt1.json"}
    assert set(os.listdir(out)) == pictures | tables
    for name in pictures:
        picture = (out / name).read_bytes()
        width = int.from_bytes(picture[16:20])
        height = int.from_bytes(picture[20:24])
        assert picture.startswith(b"\x89PNG") and width >= 900 and height >= 300
    titles = ("Table 3 (layers", "Table 1: quantization error", "Figure 7 in numbers", "figures 1")
    for title in titles:
        assert printed.out.count(f"\n{title}") == 1
    assert printed.out.count("sinks at tokens") == 1
    rows = json.loads((out / "fig7-model-prompt1.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == [8, 4, 3, 2]
    assert printed.out.count("\nstatic ranges calibrated on ") == 2  # Table 1 and Figure 7
    lines = printed.out.split("Figure 7 in numbers")[1].splitlines()[3:7]
    for line, row in zip(lines, rows, strict=True):
        errors = [f"{error:.3f}" for name, error in row.items() if name != "bits"]
        assert line.split() == [str(row["bits"]), *errors]


def test_figures_are_chosen_by_the_papers_numbers(drawable, tmp_path, capsys):  # noqa: F811
    """13 is Figure 4 for prompt 2, and 21 is Figure 19; here for another text, in another
    format."""
    prompt = "cost: $5 \x07 and $6"
    options = ["--prompt", prompt, "--format", "svg", "--layer", "5"]
    assert figures.main([*drawable, "--fig", "13", "4", "21", *options]) == 0
    files = sorted(os.listdir(tmp_path / "out"))
    slug = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    assert files == [f"fig19-model-text{slug}.svg", f"fig4-model-text{slug}.svg"]
    assert "Table" not in capsys.readouterr().out
    svg = (tmp_path / "out" / files[0]).read_text()
    assert svg.startswith("<?xml") and "<!-- |Q| -->" in svg and "block 6 (layer 5)" in svg


def commands():
    """Return the modules of paper/ that are commands."""
    paths = Path(figures.__file__).parent.glob("[a-z]*.py")
    return [path.stem for path in paths if "\ndef main(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", ["paper", "paper.figures", "paper.table1", "paper.table3"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_run_as_modules(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.startswith(f"usage: python -m {name} ")
    if name == "paper":
        lines = [line for line in printed.splitlines() if line.startswith("python -m paper.")]
        listed = sorted(line.split()[2] for line in lines)
        assert listed == sorted(f"paper.{command}" for command in commands())


FIGURE_9 = [
    {
        "model": model,
        "data": "wikitext2",
        "scheme": scheme,
        "bits": bits,
        "keep": keep,
        "sinks": N,
        "ppl": ppl,
        "ppl_fp": 5.0,
        "nll": [1.5, 1.7],
    }
    for model in ("llama2-7b", "some/llama$2")
    for scheme, bits, keep, N, ppl in [
        ("full", 16, "none", 0, 5.0),
        ("token-static", 4, "none", 0, 9.0),
        ("token-static", 4, "pfn", 5, 8.0),
        ("token-static", 4, "kvsink", 5, 6.0),
    ]
]


def test_figure_9_is_drawn_from_results(tmp_path, monkeypatch, capsys):
    """No model is loaded. If the figure cannot be drawn, the picture that was there stays."""
    monkeypatch.setattr(hub, "model_directory", None)
    file = tmp_path / "fig9.json"
    options = ["--fig", "9", "--json", str(file), "--out", str(tmp_path)]
    file.write_text(json.dumps(FIGURE_9))
    assert figures.main(options) == 0
    picture = (tmp_path / "fig9.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    file.write_text(json.dumps(FIGURE_9[:1]))
    refuse(options, ["no results"], capsys, figures)
    file.write_text(json.dumps([{**FIGURE_9[1], "rope": "post"}, {**FIGURE_9[1], "rope": "pre"}]))
    refuse(options, ["differ in rope"], capsys, figures)

    def disk_is_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_is_full)
    file.write_text(json.dumps(FIGURE_9))
    refuse(options, ["No space"], capsys, figures)
    assert (tmp_path / "fig9.png").read_bytes() == picture and len(list(tmp_path.iterdir())) == 2


def test_figure_9_beside_all_others(drawable, tmp_path, monkeypatch, capsys):  # noqa: F811
    """--json without --fig draws Figure 9 too."""
    monkeypatch.setattr(figures, "FIGURES", {10: figures.figure_10})
    (tmp_path / "fig9.json").write_text(json.dumps(FIGURE_9))
    assert figures.main([*drawable, "--json", str(tmp_path / "fig9.json"), "--format", "svg"]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["fig10-model-prompt1.svg", "fig9.svg"]
    assert "Figure 7 in numbers" not in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    (["--layer", "6"], ["--layer 6", "layers 0 to 5"]),
    (["--layer", "-1"], ["--layer", "at least 0"]),
    (["--layer", "0", "--fig", "7"], ["--layer 0", "sinks are stable, 2-5"]),
    (["--prompt", "x"], ["1 tokens", "2 to 512"]),
    (["--prompt", ""], ["0 tokens"]),
    (["--prompt", "x" * 600], ["600 tokens", "2 to 512"]),
    (["--prompt", "nothing stands out"], ["no stable outliers"]),
    (["--fig", "3"], ["'3'", "sketches"]),
    (["--fig", "24"], ["'24'"]),
    (["--fig", "one"], ["'one'"]),
    (["--fig", "9"], ["Figure 9", "--json"]),
    (["--table", "2"], ["--table"]),
    (["--fig", "9", "--json", "/nowhere/fig9.json"], ["/nowhere/fig9.json", "no such file"]),
    (["--fig", "1", "--json", "fig9.json"], ["only Figure 9"]),
    (["--prompt", "\x07\x07\x07"], ["no other token"]),
    (["--prompt", "ab\x07"], ["no other token"]),
    (["--fig", "7", "--model", "wrong site"], ["no stable outliers"]),
    (["--out", "/dev/null"], ["/dev/null", "cannot write"]),
    (["--out", "/proc/figures"], ["/proc"]),
    (["--format", "gif"], ["--format"]),
    (["--model", "lama2-7b"], ["llama2-7b"]),
    (["--device", "cuda:99"], ["cuda:99"]),
])  # fmt: skip
def test_figures_refuse_wrong_options(
    change,
    words,
    drawable,  # noqa: F811
    capsys,
    tmp_path,
    monkeypatch,
):
    if change[-1] == "wrong site":  # block 6, while sinks are stable in blocks 3 to 6
        change = change[:-2]
        monkeypatch.setitem(kvsink.TABLE_3, drawable[1], kvsink.Table3Row(6, 5, 32, (5,)))
    refuse([*drawable, *change], ["paper.figures: ", *words], capsys, figures)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("fig*"))


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_figures_name_the_block_of_a_nan(
    value,
    drawable,  # noqa: F811
    capsys,
    tmp_path,
    monkeypatch,
):
    write_model(tmp_path / "model", {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][:] = value
    write_weights(tmp_path / "model", weights)
    monkeypatch.setitem(kvsink.TABLE_3, str(tmp_path / "model"), kvsink.Table3Row(6, 1, 32, (5,)))
    options = ["--model", str(tmp_path / "model"), "--fig", "1"]
    refuse(options, ["NaN or inf", "block 4 of 6"], capsys, figures)


def test_only_pictures_need_matplotlib(drawable, capsys, monkeypatch):  # noqa: F811
    """test_table3.py has a table without it."""
    monkeypatch.setattr(figures, "Figure", None)
    words = ["paper.figures: ", "pip install matplotlib"]
    refuse([*drawable, "--fig", "1"], words, capsys, figures)
    refuse(drawable, ["paper: ", "pip install matplotlib"], capsys, whole_paper)


def test_a_tokenizer_of_another_model_draws_nothing(drawable, capsys, tmp_path):  # noqa: F811
    write_model(tmp_path / "model", PLANTED)  # 64 tokens
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    options = ["--model", str(tmp_path / "model"), "--fig", "1", "--prompt", "letters"]
    refuse(options, ["gives id"], capsys, figures)
