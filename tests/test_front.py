"""python -m beyond.front: perplexity against stored bits, and what no other setting beats."""

import json
from dataclasses import replace

import pytest

import eval_ppl
from beyond import front
from kvsink import SCHEMES
from support import hub
from tests.helpers import refuse, results_of


def test_the_front_by_hand():
    """Of (bits, PPL): (2, 50), (2, 40), (3, 45), (4, 20), (4.5, 20), (5, 19), the second, fourth
    and last."""
    points = [(4.5, 20.0), (2, 50.0), (3, 45.0), (4, 20.0), (5, 19.0), (2, 40.0)]
    found = front.front([{"stored_bits": bits, "ppl": ppl} for bits, ppl in points])
    assert [(r["stored_bits"], r["ppl"]) for r in found] == [(2, 40.0), (4, 20.0), (5, 19.0)]


def test_every_setting_is_there_once():
    rows = front.rows()
    assert len(rows) == len(set(rows)) == 1 + 4 * 3 * 4 and {row.scheme for row in rows[1:]} == set(
        SCHEMES
    )
    assert front.group_sizes(128) == [32, 64, 128] and front.group_sizes(64) == [32, 64]
    with pytest.raises(ValueError, match="divides a head of 8"):
        front.group_sizes(8)


@pytest.fixture
def small(monkeypatch):
    """The sample in bytes, windows and groups for the tiny model."""

    def documents(name, split="test"):
        documents.asked.append(split)
        return ["A text of bytes, again and again. " * 20]

    documents.asked = []
    monkeypatch.setattr(hub, "documents", documents)
    monkeypatch.setattr(front, "GROUPS", (4, 8, 16))
    parse = front.parse

    def shorter(argv):
        what, *rest = parse(argv)
        return replace(what, seq_len=64, calib_windows=1), *rest

    monkeypatch.setattr(front, "parse", shorter)


def test_the_command(tiny, small, tmp_path, capsys, monkeypatch):
    out, plot = tmp_path / "front.json", tmp_path / "front.png"
    options = ["--model", tiny[1], "--layer", "1", "--channel", "5", "--no-compile", "--limit", "2"]
    command = [*options, "--json", str(out), "--plot", str(plot)]
    assert front.main(command) == 0
    rows, printed = results_of(out), capsys.readouterr().out
    assert len(rows) == 2 * (1 + 4 * 3 * 4) and {r["group_size"] for r in rows} == {4, 8}
    assert hub.documents.asked.count("test") == 1  # both groups are of one text
    assert "groups of 4 channels" in printed and "groups of 8 channels" in printed
    found = front.front(rows)
    table = printed.split("the front:")[1].splitlines()[2:]
    assert len(table) == len(found) > 1
    for line, r in zip(table, found):
        assert line.split()[:2] == [f"{r['stored_bits']:.2f}", f"{r['ppl']:.3f}"]
        assert r["scheme"] == "full" or line.endswith(front.setting(r))
    drawn = front.picture(rows).axes[0]
    points = {
        tuple(map(float, (*line.get_xdata(), *line.get_ydata())))
        for line in drawn.lines
        if len(line.get_xdata()) == 1
    }
    assert points == {(r["stored_bits"], front.above(r)) for r in rows if r["scheme"] != "full"}
    assert (
        front.above({"ppl": 12.0, "ppl_fp": 10.0}) == pytest.approx(20)
        and front.above({"ppl": 9.0, "ppl_fp": 10.0}) == 0.1
    )
    best = next(
        line for line in drawn.lines if line.get_color() == "k" and line.get_linestyle() == "-"
    )
    assert list(best.get_xdata()) == [
        r["stored_bits"] for r in front.front([r for r in rows if r["scheme"] != "full"])
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(eval_ppl, "window_losses", None)
    out.write_text(
        json.dumps([{key: r[key] for key in r if key != "stored_bits"} for r in rows])
    )  # as older files are
    assert front.main(command) == 0  # nothing is measured twice
    assert capsys.readouterr().out.split("the front:")[1] == printed.split("the front:")[1]


@pytest.mark.parametrize("change, words", [
    (["--limit", "0"], ["--limit"]),
    (["--plot", "front.txt"], ["front.txt", ".png"]),
    (["--json", "x.png", "--plot", "x.png"], ["same file"]),
    (["--json", "/nowhere/x"], ["/nowhere"]),
    (["--model", "/nowhere/model"], ["/nowhere/model"]),
])  # fmt: skip
def test_bad_arguments(change, words, capsys):
    refuse(change, words, capsys, front)
