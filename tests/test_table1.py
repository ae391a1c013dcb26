"""paper/table1.py: the table as printed, its numbers by NumPy, and what the command writes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from paper import command, table1
from paper.activations import KINDS
from support import text
from tests.helpers import (
    DIGITS,
    PLANTED,
    bytes_vocabulary,
    ordinary_tokens,
    refuse,
    write_bpe,
    write_model,
)
from tests.subjects import (
    PLACES,
    drawable,  # noqa: F401
    evidence,  # noqa: F401
    keys_and_values,
    planted_subject,
    seen_in_calibration,
    static_numpy,
)

PRINTED = {  # column by column: 4, 3, 2 bits; the kinds one after the other
    "dynamic": """1.30 9.00 27.58   1.38 9.57 29.32   0.07 0.50 1.37
                  0.10 0.68 2.53    0.11 0.72 2.68    0.01 0.08 0.23
                  0.28 2.03 7.05    0.26 1.78 6.52    0.31 2.30 7.58""",
    "static": """86.73 89.60 107.36   16.39 20.41 46.14
                 9.75 10.09 11.30     3.10 3.45 6.35
                 9.02 10.24 15.83     5.17 8.26 11.44""",
}


def test_the_papers_table_1_is_as_printed():
    for ranges, columns in PRINTED.items():
        printed = np.array([line.split() for line in columns.splitlines()], float).reshape(
            3, -1, 3
        )  # kind, part, bits
        for bits, at in ((4, 0), (3, 1), (2, 2)):
            assert np.array_equal(table1.PAPER_TABLE_1[ranges, bits], printed[:, :, at]), (
                ranges,
                bits,
            )
    assert len(table1.PAPER_TABLE_1) == 6


def test_what_the_paper_quotes_from_its_table_1():
    """Section 4.1: 81.1 % and 68.2 % less (static, 4 bits), 16.3 % to 29.2 % more, 42.7 % less."""
    table = table1.PAPER_TABLE_1
    less = [1 - without / overall for overall, without in table["static", 4]]
    assert [round(100 * x, 1) for x in less] == [81.1, 68.2, 42.7]
    more = [table["dynamic", bits][2][2] / table["dynamic", bits][2][1] - 1 for bits in (4, 3, 2)]
    assert round(100 * min(more), 1) == 16.3 and round(100 * max(more), 1) == 29.2
    for bits in (4, 3, 2):  # 1/16 of the tokens are sinks, by every row of per-token Keys
        overall, without, sinks = table["dynamic", bits][0]
        assert (without - overall) / (without - sinks) == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel"])
def test_groups_that_hold_a_sink(granularity):
    S = torch.zeros(40, dtype=torch.bool)
    S[[3, 35]] = True
    mixed = table1.groups_with_sinks(S, granularity).nonzero().flatten().tolist()
    assert mixed == ([3, 35] if granularity == "token" else [*range(16), *range(32, 40)])


def dynamic_numpy(X, bits, granularity):
    """Equations 10-13 for X (heads, 40, 8): a group is a token of 8 channels, or 16 tokens of a
    channel."""
    X_ = np.empty_like(X)
    for h, i, c in np.ndindex(X.shape):
        start = i // 16 * 16
        group = X[h, i] if granularity == "token" else X[h, start : start + 16, c]
        s = (group.max() - group.min()) / (2**bits - 1)
        z = -np.round(group.min() / s)
        X_[h, i, c] = s * (np.clip(np.round(X[h, i, c] / s) + z, 0, 2**bits - 1) - z)
    return X_


def test_table_1_against_numpy():
    """Every figure as sums of squares in float64 over blocks 3 to 6 of both windows."""
    for row in table1.table_1(planted_subject()):
        tensor, granularity = KINDS[row["kind"]]
        errors = {"overall": [], "without_sinks": [], "with_sinks": []}
        for window in (0, 1):
            sinks = np.isin(np.arange(40), PLACES[window])
            for l in (3, 4, 5, 6):
                X = keys_and_values(window)[l][tensor]
                if row["ranges"] == "dynamic":
                    error, with_sink = (dynamic_numpy(X, row["bits"], granularity) - X) ** 2, sinks
                    if granularity == "channel":
                        with_sink = np.concatenate(
                            [np.full(len(g), g.any()) for g in np.split(sinks, [16, 32])]
                        )
                    errors["with_sinks"].append(error[:, with_sink])
                    errors["without_sinks"].append(error[:, ~with_sink])
                    errors["overall"].append(error)
                    continue
                for part in ("overall", "without_sinks"):
                    seen = seen_in_calibration(l, tensor, kept=part == "without_sinks")
                    error = (static_numpy(X, row["bits"], seen, granularity) - X) ** 2
                    errors[part].append(error if part == "overall" else error[:, ~sinks])
        for part in row["paper"]:
            expected = 100 * np.concatenate([e.flatten() for e in errors[part]]).mean()
            assert row[part] == pytest.approx(expected, rel=1e-3), (
                row,
                part,
            )  # fp32 may round an edge the other way


def test_a_part_that_is_not_there_is_none(capsys):
    """A text in whose windows no group holds a sink."""
    subject = replace(planted_subject(), windows=[ordinary_tokens(40, 7)[None]])
    rows = table1.table_1(subject)
    for row in rows:
        assert row.get("with_sinks") is None and row["overall"] > 0
        assert row["overall"] == row["without_sinks"] or row["ranges"] == "static"
    table1.print_table_1(subject, rows)
    line = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  dynamic  4 bits")
    )
    assert line.split()[3:] == [*[f"{rows[0]['overall']:.2f}"] * 2, "-", "1.30", "1.38", "0.07"]


# --------------------------------------------------------------------------------------------------
# The command


def test_what_the_command_prints_and_writes(drawable, tmp_path, capsys):  # noqa: F811
    assert table1.main(drawable) == 0
    printed, (file,) = capsys.readouterr(), (tmp_path / "out").iterdir()
    table = json.loads(file.read_text())
    assert file.name == "table1-model-prompt1.json" and not printed.err
    assert (
        table["blocks"] == [3, 4, 5, 6] and len(table["rows"]) == 18 and table["text"] == "prompt 1"
    )
    assert (table["model"], table["windows"], table["group_size"]) == ("model", 1, 16)
    assert table["rows"][3] == {
        **table["rows"][3],
        "kind": "per-token Keys",
        "ranges": "static",
        "bits": 4,
    }
    assert table["rows"][3]["paper"] == {"overall": 86.73, "without_sinks": 16.39}
    lines = [
        line.split()[3:]
        for line in printed.out.splitlines()
        if line.startswith(("  static ", "  dynamic "))
    ]
    for cells, row in zip(lines, table["rows"], strict=True):
        parts = ["overall", "without_sinks", "with_sinks"]
        expected = [side.get(part) for side in (row, row["paper"]) for part in parts]
        assert cells == ["-" if x is None else f"{x:.2f}" for x in expected]
    assert "LLaMA2-7B (paper)" in printed.out and "Table 3" not in printed.out
    assert "model on prompt 1: sinks at tokens 10, 20\n" in printed.out
    assert "stages, blocks from 1: initial 1, emergence 2, stabilization 3-6\n" in printed.out


@pytest.mark.parametrize("change, words", [
    (["--prompt", "x"], ["1 tokens", "2 to 512"]),
    (["--prompt", "nothing stands out"], ["no stable outliers"]),
    (["--out", "/dev/null"], ["/dev/null", "cannot write"]),
    (["--model", "lama2-7b"], ["llama2-7b"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--dtype", "float8"], ["--dtype", "float8"]),
    (["--layer", "3"], ["--layer 3", "--help"]),
    (["--no-compile"], ["--no-compile"]),  # nothing here is compiled
])  # fmt: skip
def test_a_table_1_that_cannot_be(change, words, drawable, capsys, tmp_path):  # noqa: F811
    refuse([*drawable, *change], ["paper.table1: ", *words], capsys, table1)
    assert not (tmp_path / "out").exists()


def test_calibration_follows_the_prompt(drawable, tiny, monkeypatch):  # noqa: F811
    """Packed articles are calibrated on packed articles, prompts on WikiText-2, both on the
    training split; the default model always on packed articles. No window is longer than the
    model's context, here 512."""
    asked = []
    monkeypatch.undo()
    monkeypatch.setattr(
        text, "windows", lambda *how: asked.append(how[1:]) or torch.zeros(how[4], how[3]).long()
    )
    machine = command.cli.Machine("cpu", "float32", False)
    loaded = command.load(tiny[1], machine)
    for model, prompt in ((tiny[1], "1"), (tiny[1], "packed"), ("smollm2-135m", "2")):
        command.calibration_windows(command.What(model, prompt, None, machine), loaded)
    wikitext, packed = ("wikitext2", "train", 512, 16, 0), ("wiki-sample", "train", 512, 4, 0)
    assert asked == [wikitext, packed, packed]


# noqa: F811
def test_a_tokenizer_of_another_model_calibrates_nothing(capsys, tmp_path, drawable, monkeypatch):
    """A text whose ids fit is not enough: the calibration windows are checked too."""
    monkeypatch.setattr(command, "calibration_windows", lambda *_: torch.full((2, 64), 300))
    refuse(drawable, ["gives id 300", "the model has 300"], capsys, table1)
    write_model(tmp_path / "model", PLANTED)  # 64 tokens
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    options = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    refuse([*options, "--prompt", "letters"], ["gives id"], capsys, table1)


# --------------------------------------------------------------------------------------------------
# The default model


def test_quantization_errors_of_the_default_model(evidence):  # noqa: F811
    """Table 1: as LLaMA2-7B's where ranges are dynamic, and not where they are static."""
    for row in table1.table_1(replace(evidence, windows=evidence.windows[:1])):
        overall, without, paper = row["overall"], row["without_sinks"], row["paper"]
        if row["ranges"] == "static":
            assert abs(1 - without / overall) < 0.05 < 1 - paper["without_sinks"] / paper["overall"]
        elif row["kind"] == "per-channel Keys":
            assert row["with_sinks"] > 1.1 * without
        else:
            assert row["with_sinks"] < without / 5
