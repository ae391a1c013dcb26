"""python -m beyond.front: perplexity against stored bits, and what no other setting beats."""

import json
from dataclasses import replace

import pytest

from beyond import front
from kvsink import SCHEMES
from support import evaluate, hub
from tests.helpers import refuse, results_of


def test_the_front_by_hand():
    """(bits, PPL) are (2, 50), (2, 40), (3, 45), (4, 20), (4.5, 20), (5, 19): the second, fourth
    and last are the front."""
    points = [(4.5, 20.0), (2, 50.0), (3, 45.0), (4, 20.0), (5, 19.0), (2, 40.0)]
    best = front.front([{"stored_bits": bits, "ppl": ppl} for bits, ppl in points])
    assert [(r["stored_bits"], r["ppl"]) for r in best] == [(2, 40.0), (4, 20.0), (5, 19.0)]


def test_every_setting_is_there_once():
    rows = front.all_rows()
    assert len(rows) == len(set(rows)) == 1 + 4 * 3 * 4
    assert {row.scheme for row in rows[1:]} == set(SCHEMES)
    assert front.group_sizes(128) == [32, 64, 128]
    assert front.group_sizes(64) == [32, 64]
    with pytest.raises(ValueError, match="divides a head of 8"):
        front.group_sizes(8)


@pytest.fixture
def small(monkeypatch):
    """A sample in bytes, with windows and group sizes for the tiny model. Return the splits that
    were read."""
    splits = []

    def documents(name, split="test"):
        splits.append(split)
        return ["A text of bytes, again and again. " * 20]

    eval_configs = front.eval_configs

    def small_configs(args):
        return [replace(config, seq_len=64, calib_windows=1) for config in eval_configs(args)]

    monkeypatch.setattr(hub, "documents", documents)
    monkeypatch.setattr(front, "GROUP_SIZES", (4, 8, 16))
    monkeypatch.setattr(front, "eval_configs", small_configs)
    return splits


def test_the_command(tiny, small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "front.json"
    plot = tmp_path / "front.png"
    options = "--layer 1 --channel 5 --no-compile --limit 2".split()
    command = [*tiny[:2], *options, "--json", str(out), "--plot", str(plot)]
    assert front.main(command) == 0
    results = results_of(out)
    printed = capsys.readouterr().out
    assert len(results) == 2 * (1 + 4 * 3 * 4)
    assert {r["group_size"] for r in results} == {4, 8}
    assert small.count("test") == 1  # both group sizes share a text
    assert "groups of 4 channels" in printed
    assert "groups of 8 channels" in printed
    best = front.front(results)
    table = printed.split("the front:")[1].splitlines()[2:]
    assert len(table) == len(best) > 1
    for line, r in zip(table, best):
        assert line.split()[:2] == [f"{r['stored_bits']:.2f}", f"{r['ppl']:.3f}"]
        assert line.endswith(front.setting(r))
    check_picture(results)
    assert plot.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(evaluate, "measure_row", None)  # nothing is measured twice
    without_bits = [{key: r[key] for key in r if key != "stored_bits"} for r in results]
    out.write_text(json.dumps(without_bits))  # as older files are
    assert front.main(command) == 0
    assert capsys.readouterr().out.split("the front:")[1] == printed.split("the front:")[1]


def check_picture(results):
    """Assert that the picture shows each setting as a point, and the front as a line."""
    quantized = [r for r in results if r["scheme"] != "full"]
    lines = front.picture(results).axes[0].lines
    points = set()
    for line in lines:
        if len(line.get_xdata()) == 1:
            points.add((float(line.get_xdata()[0]), float(line.get_ydata()[0])))
    assert points == {(r["stored_bits"], front.percent_above(r)) for r in quantized}
    best = next(line for line in lines if line.get_color() == "k" and line.get_linestyle() == "-")
    assert list(best.get_xdata()) == [r["stored_bits"] for r in front.front(quantized)]


def test_percent_above_full_precision():
    assert front.percent_above({"ppl": 12.0, "ppl_fp": 10.0}) == pytest.approx(20)
    assert front.percent_above({"ppl": 9.0, "ppl_fp": 10.0}) == 0.1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--limit", "0"], ["--limit"]),
        (["--plot", "front.txt"], ["front.txt", ".png"]),
        (["--json", "x.png", "--plot", "x.png"], ["same file"]),
        (["--json", "/nowhere/x"], ["/nowhere"]),
        (["--model", "/nowhere/model"], ["/nowhere/model"]),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    refuse(arguments, words, capsys, front)
