"""paper/figures.py and `python -m paper`: what is drawn, by the numbers in the pictures, and what
the commands refuse."""

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
from paper.activations import look
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
    """In the place of a tokenizer."""

    def decode(self, ids):
        return {STRONG: "STRONG", WEAK: "WEAK"}.get(ids[0], f"${ids[0]}")


@pytest.fixture
def drawn():
    """A subject; the Activations of its blocks, l -> Activations; its attention scores in the block
    that is drawn."""
    subject = replace(planted_subject(), tokenizer=Letters())
    inside = {a.l: a for a in look(subject.model, subject.windows[0], lambda a: a)}
    assert subject.block == 4 and len(subject.S) == 40  # all of it is drawn token by token
    return subject, inside, activations.attention_scores(inside[4].Q, inside[4].K)


def image(axis):
    return torch.tensor(np.ma.filled(axis.images[0].get_array().astype(float), np.nan))


def shows(axis, X):
    """A map of queries by keys: white where a query does not see a key."""
    found, seen = image(axis), torch.ones(40, 40).tril().bool()
    return torch.equal(found.isnan(), ~seen) and torch.allclose(
        found[seen], X.double()[seen], atol=1e-6
    )


def panels_of(figure):
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def cosine(a):
    return activations.cosines(a.Q, a.K).mean(0)


def test_figure_1(drawn):
    subject, inside, P = drawn
    axes, S = panels_of(figures.figure_1(subject)), subject.S
    assert shows(axes[0], P.mean(0))
    tall = inside[2].H.abs() > inside[2].H.abs().max() / 50
    assert len(axes[1].lines) == tall.sum() >= 2
    assert {line.get_color() for line in axes[1].lines} == {figures.SINK}
    H = torch.stack([a.H[:, CHANNEL].abs() for a in inside.values()])  # (L, n)
    assert np.allclose([line.get_ydata() for line in axes[2].lines[:2]], H[:, S].T)
    assert np.allclose(axes[2].lines[2].get_ydata(), H[:, ~S].amax(1))


def test_figure_2(drawn):
    subject, inside, _ = drawn
    for axis, name in zip(panels_of(figures.figure_2(subject)), "QKV", strict=True):
        norms, dots, bars = getattr(inside[4], name).norm(dim=-1), axis.lines[::2], axis.lines[1::2]
        shown = [int(line.get_xdata()[0]) for line in dots]
        assert shown == list(range(8, 32))  # 24 tokens about the last sink
        for i, dot, bar in zip(shown, dots, bars):
            assert np.allclose(dot.get_ydata(), norms[:, i])
            assert bar.get_ydata()[0] == pytest.approx(norms[:, i].median().item())
            assert (
                dot.get_color()
                == bar.get_color()
                == (figures.SINK if subject.S[i] else figures.OTHER)
            )
        assert [label.get_text() for label in axis.get_xticklabels()][14] == "WEAK 22"


def test_figure_4(drawn):
    subject, inside, _ = drawn
    figure, names, S = figures.figure_4(subject), ("X_d_in", "X_d_out", "H_", "H"), subject.S
    left, panels = figure.subfigs[0].axes[0], np.array(figure.subfigs[1].axes).reshape(4, 3)
    for line, name in zip(left.lines, names):
        assert np.allclose(
            line.get_ydata(), [getattr(a, name).abs().max() for a in inside.values()]
        )
    titles = ["initial, block 1", "emergence, block 2", "stabilization, block 5"]
    assert [panel.get_title() for panel in panels[0]] == titles
    for row, name in zip(panels, names):
        for panel, l in zip(row, (1, 2, 5)):
            others, sinks = panel.collections
            X = getattr(inside[l], name)
            X = X[range(40), X.abs().argmax(1)]
            found = [segment[1] for segment in sinks.get_segments()]
            assert np.allclose(found, torch.stack([S.nonzero()[:, 0], X[S]], 1))
            assert np.allclose([segment[1][1] for segment in others.get_segments()], X[~S])


def test_figure_5(drawn):
    subject, inside, P = drawn
    (axes, a), S = (panels_of(figures.figure_5(subject)), inside[4]), subject.S
    assert shows(axes[0], cosine(a)) and shows(axes[3], P.mean(0))
    for axis, X in zip(
        (axes[1], axes[2], axes[4], axes[5]), (a.Q, a.K, a.V, a.O[None]), strict=True
    ):
        (others, sinks), norms = axis.lines[:2], X.norm(dim=-1).median(0).values
        assert np.allclose(sinks.get_ydata(), norms[S]) and sinks.get_color() == figures.SINK
        assert np.allclose(others.get_ydata(), norms[~S])


def test_figure_6(drawn):
    subject, inside, P = drawn
    axes = panels_of(figures.figure_6(subject))
    bias = activations.attention_bias(P, inside[4].V, subject.S)[:, 5:]  # from the first sink on
    alike = image(axes[0])  # (h, L)
    assert torch.allclose(alike[:, 3], activations.mean_cosine(bias).double(), atol=1e-6)
    heads = alike[:, 3].argsort(descending=True)
    for axis, head in zip(axes[1:4], (heads[0], heads[2], heads[3])):
        assert torch.allclose(image(axis), bias[head].double())


def test_figure_7(drawn):
    subject, inside, P = drawn
    axes, a, S = np.array(panels_of(figures.figure_7(subject))).reshape(4, 5), inside[4], subject.S
    bias = activations.attention_bias(P, a.V, S)
    head = int(activations.mean_cosine(bias).argmax())
    for kept in (0, 1):
        assert shows(axes[kept, 0], P.mean(0)) and torch.allclose(
            image(axes[2 + kept, 0]), bias[head].double()
        )
        for column, bits in enumerate((8, 4, 3, 2), start=1):
            *_, P_, bias_ = activations.quantized_attention(subject, a, S, bits, bool(kept))
            assert shows(axes[kept, column], P_.mean(0))
            assert torch.allclose(image(axes[2 + kept, column]), bias_[head].double())
            error = ((bias_ - bias).norm() / bias.norm()).item()
            assert axes[2 + kept, column].get_title() == f"{bits} bits, error {error:.3f}"


def test_figure_11(drawn):
    subject, inside, _ = drawn
    axes = panels_of(figures.figure_11(subject))
    for l, top, below in zip((2, 4, 5, 6), axes[:4], axes[4:], strict=True):
        assert top.get_title() == f"block {l} (layer {l - 1})"
        assert shows(top, activations.attention_scores(inside[l].Q, inside[l].K).mean(0))
        assert shows(below, cosine(inside[l]))


def test_figures_18_and_19(drawn):
    subject, inside, _ = drawn
    S = subject.S
    for axis, name in zip(panels_of(figures.figure_18(subject)), "QKV", strict=True):
        norms = [getattr(a, name).norm(dim=-1) for a in inside.values()]
        for line, who in zip(axis.lines, (S, ~S)):
            assert np.allclose(line.get_ydata(), [np.median(N[:, who]) for N in norms])
            assert line.get_color() == (figures.SINK if who is S else figures.OTHER)
    for axis, name in zip(panels_of(figures.figure_19(subject)), "QKV", strict=True):
        X = getattr(inside[4], name).abs()[:, 8:32]  # (heads, tokens, d_k)
        assert torch.allclose(image(axis), torch.cat([x.T for x in X]).double())


def numbers_by_hand(n, d, granularity, g):
    """Which group each number is in, with groups counted row by row: Figure 10 as a plain loop."""
    numbers = np.empty((n, d), int)
    for i, c in np.ndindex(n, d):
        per_channel = i // g * d + c
        numbers[i, c] = {"token": (i * d + c) // g, "channel": per_channel, "tensor": i // g}[
            granularity
        ]
    return numbers


@pytest.mark.parametrize("granularity", quant.GRANULARITIES)
def test_groups_are_numbered_as_figure_10_draws_them(granularity):
    for n, g in ((12, 4), (10, 4), (3, 8)):
        expected = numbers_by_hand(n, 8, granularity, g)
        assert np.array_equal(figures.group_numbers(n, 8, granularity, g), expected), (n, g)


def test_figure_10():
    for axis, granularity in zip(
        panels_of(figures.figure_10(None)), quant.GRANULARITIES, strict=True
    ):
        found = {text.get_position()[::-1]: text for text in axis.texts}
        for (i, c), number in np.ndenumerate(numbers_by_hand(12, 8, granularity, 4)):
            assert found[i, c].get_text() == str(number)
            assert (found[i, c].get_color() == figures.SINK) == (i in (0, 6))


def test_long_texts_are_drawn_in_squares():
    """300 tokens as 100 squares of 3: each square is the largest number in it, and one that no
    query sees is white."""
    X, axis = (
        torch.rand(300, 300, generator=torch.Generator().manual_seed(0)),
        figures.Figure().subplots(),
    )
    S = torch.arange(300) == 0
    drawn = figures.token_map(axis, X, S, "").get_array()
    assert drawn.shape == (100, 100) and drawn[0, 1] is np.ma.masked
    assert (
        drawn[40, 7] == X[120:123, 21:24].max()
        and drawn[40, 40] == X[120:123, 120:123].tril().max()
    )
    assert (
        axis.get_xlim()[0] < -5 and axis.get_xlim()[1] == 299.5
    )  # token 0 stands clear of the frame


# --------------------------------------------------------------------------------------------------
# The commands


def test_all_figures_and_tables_of_a_model(drawable, tmp_path, capsys):  # noqa: F811
    assert whole_paper.main(drawable) == 0
    printed, out = capsys.readouterr(), tmp_path / "out"
    expected = {f"fig{number}-model-prompt1.png" for number in (1, 2, 4, 5, 6, 7, 10, 11, 18, 19)}
    assert set(os.listdir(out)) == expected | {
        "table1-model-prompt1.json",
        "fig7-model-prompt1.json",
    }
    for name in expected:
        picture = (out / name).read_bytes()
        width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
        assert picture.startswith(b"\x89PNG") and width >= 900 and height >= 300
    for title in (
        "Table 3 (layers",
        "sinks at tokens",
        "Table 1: quantization error",
        "Figure 7 in numbers",
        "figures 1",
    ):
        assert printed.out.count(f"\n{title}") == 1 or title == "sinks at tokens"
    rows = json.loads((out / "fig7-model-prompt1.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == [8, 4, 3, 2]
    lines = [line.split() for line in printed.out.split("Figure 7 in numbers")[1].splitlines()[2:6]]
    assert lines == [
        [str(row["bits"]), *(f"{x:.3f}" for x in list(row.values())[1:])] for row in rows
    ]


def test_figures_are_chosen_by_the_papers_numbers(drawable, tmp_path, capsys):  # noqa: F811
    """13 is Figure 4 for prompt 2, 21 is Figure 19; a text of one's own; another format."""
    options = [
        "--fig",
        "13",
        "4",
        "21",
        "--prompt",
        "cost: $5 \x07 and $6",
        "--format",
        "svg",
        "--layer",
        "5",
    ]
    assert figures.main([*drawable, *options]) == 0
    files = sorted(os.listdir(tmp_path / "out"))
    slug = hashlib.sha256(b"cost: $5 \x07 and $6").hexdigest()[:8]
    assert files == [f"fig19-model-text{slug}.svg", f"fig4-model-text{slug}.svg"]
    assert "Table" not in capsys.readouterr().out
    svg = (tmp_path / "out" / files[0]).read_text()
    assert svg.startswith("<?xml") and "<!-- |Q| -->" in svg and "block 6 (layer 5)" in svg


def commands():
    """The modules of paper/ that are commands."""
    folder = Path(figures.__file__).parent
    return [
        path.stem
        for path in folder.glob("[a-z]*.py")
        if "\ndef main(" in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", ["paper", "paper.figures", "paper.table1", "paper.table3"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_run_as_modules(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.startswith(f"usage: python -m {name} ")
    if name == "paper":
        listed = [
            line.split()[2] for line in printed.splitlines() if line.startswith("python -m paper.")
        ]
        assert sorted(listed) == sorted(f"paper.{command}" for command in commands())


FIGURE_9 = [
    {"model": model, "data": "wikitext2", "scheme": scheme, "bits": bits, "keep": keep, "sinks": N, "ppl": ppl,
     "ppl_fp": 5.0, "nll": [1.5, 1.7]}
    for model in ("llama2-7b", "some/llama$2")
    for scheme, bits, keep, N, ppl in [
        ("full", 16, "none", 0, 5.0), ("token-static", 4, "none", 0, 9.0), ("token-static", 4, "pfn", 5, 8.0),
        ("token-static", 4, "kvsink", 5, 6.0),
    ]
]  # fmt: skip


def test_figure_9_is_drawn_from_results(tmp_path, monkeypatch, capsys):
    """No model is loaded. Where it cannot be drawn, the picture that was there stays as it was."""
    monkeypatch.setattr(hub, "model_directory", None)
    file, options = (
        tmp_path / "fig9.json",
        ["--fig", "9", "--json", str(tmp_path / "fig9.json"), "--out", str(tmp_path)],
    )
    file.write_text(json.dumps(FIGURE_9))
    assert figures.main(options) == 0
    picture = (tmp_path / "fig9.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    file.write_text(json.dumps(FIGURE_9[:1]))
    refuse(options, ["no results"], capsys, figures)
    file.write_text(json.dumps([{**FIGURE_9[1], "rope": "post"}, {**FIGURE_9[1], "rope": "pre"}]))
    refuse(options, ["differ in rope"], capsys, figures)
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    file.write_text(json.dumps(FIGURE_9))
    refuse(options, ["No space"], capsys, figures)
    assert (tmp_path / "fig9.png").read_bytes() == picture and len(list(tmp_path.iterdir())) == 2


def test_figure_9_beside_all_others(drawable, tmp_path, monkeypatch, capsys):  # noqa: F811
    """--json without --fig: Figure 9 too."""
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
# noqa: F811
def test_figures_that_cannot_be(change, words, drawable, capsys, tmp_path, monkeypatch):
    if (
        change[-1] == "wrong site"
    ):  # sinks are stable in blocks 3 to 6, and these would be read off after block 6
        change = change[:-2]
        monkeypatch.setitem(kvsink.TABLE_3, drawable[1], kvsink.Table3Row(6, 5, 32, (5,)))
    refuse([*drawable, *change], ["paper.figures: ", *words], capsys, figures)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("fig*"))


@pytest.mark.parametrize("value", [float("nan"), 3e38])
# noqa: F811
def test_figures_name_the_block_of_a_nan(value, drawable, capsys, tmp_path, monkeypatch):
    write_model(tmp_path / "model", {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][:] = value
    write_weights(tmp_path / "model", weights)
    monkeypatch.setitem(kvsink.TABLE_3, str(tmp_path / "model"), kvsink.Table3Row(6, 1, 32, (5,)))
    refuse(
        ["--model", str(tmp_path / "model"), "--fig", "1"],
        ["NaN or inf", "block 4 of 6"],
        capsys,
        figures,
    )


def test_only_pictures_need_matplotlib(drawable, capsys, monkeypatch):  # noqa: F811
    """test_table3.py has a table without it."""
    monkeypatch.setattr(figures, "Figure", None)
    refuse(
        [*drawable, "--fig", "1"], ["paper.figures: ", "pip install matplotlib"], capsys, figures
    )
    refuse(drawable, ["paper: ", "pip install matplotlib"], capsys, whole_paper)


def test_a_tokenizer_of_another_model_draws_nothing(drawable, capsys, tmp_path):  # noqa: F811
    write_model(tmp_path / "model", PLANTED)  # 64 tokens
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    refuse(
        ["--model", str(tmp_path / "model"), "--fig", "1", "--prompt", "letters"],
        ["gives id"],
        capsys,
        figures,
    )
