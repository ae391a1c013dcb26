"""paper/table1.py: the table as printed, its numbers by NumPy, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from paper import command, table1
from paper.activations import KINDS
from support import text
from support.evaluate import load_model
from support.machine import Machine
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
    calibration_tensor,
    drawable,  # noqa: F401
    evidence,  # noqa: F401
    keys_and_values,
    planted_subject,
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
        printed = np.array([line.split() for line in columns.splitlines()], float)
        printed = printed.reshape(3, -1, 3)  # kind, part, bits
        for i, bits in enumerate((4, 3, 2)):
            table = table1.PAPER_TABLE_1[ranges, bits]
            assert np.array_equal(table, printed[:, :, i]), (ranges, bits)
    assert len(table1.PAPER_TABLE_1) == 6


def test_the_papers_text_quotes_its_table_1():
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
    """Apply Equations 10-13 to X (heads, 40, 8): a group is a token of 8 channels, or 16 tokens of
    a channel."""
    X_ = np.empty_like(X)
    for h, i, c in np.ndindex(X.shape):
        start = i // 16 * 16
        group = X[h, i] if granularity == "token" else X[h, start : start + 16, c]
        s = (group.max() - group.min()) / (2**bits - 1)
        z = -np.round(group.min() / s)
        X_[h, i, c] = s * (np.clip(np.round(X[h, i, c] / s) + z, 0, 2**bits - 1) - z)
    return X_


def numpy_errors(row, l, window):
    """Return part -> squared errors in one block of one window, for a row of Table 1."""
    tensor, granularity = KINDS[row["kind"]]
    bits = row["bits"]
    sinks = np.isin(np.arange(40), PLACES[window])
    X = keys_and_values(window)[l][tensor]

    def static_errors(kept):
        calibration = calibration_tensor(l, tensor, kept)
        return (static_numpy(X, bits, calibration, granularity) - X) ** 2

    if row["ranges"] == "static":
        return {
            "overall": static_errors(kept=False),
            "without_sinks": static_errors(kept=True)[:, ~sinks],
        }
    dynamic = (dynamic_numpy(X, bits, granularity) - X) ** 2
    mixed = sinks
    if granularity == "channel":
        groups = np.split(sinks, [16, 32])
        mixed = np.concatenate([np.full(len(group), group.any()) for group in groups])
    return {
        "overall": dynamic,
        "without_sinks": dynamic[:, ~mixed],
        "with_sinks": dynamic[:, mixed],
    }


def test_table_1_against_numpy():
    """Every number comes from sums of squares in float64 over blocks 3 to 6 of both windows."""
    for row in table1.table_1(planted_subject()):
        blocks = [numpy_errors(row, l, window) for window in (0, 1) for l in (3, 4, 5, 6)]
        for part in row["paper"]:
            errors = np.concatenate([block[part].flatten() for block in blocks])
            # fp32 may round an edge the other way
            assert row[part] == pytest.approx(100 * errors.mean(), rel=1e-3), (row, part)


def test_a_part_without_tokens_is_none(capsys):
    """No group holds a sink in the windows of this text."""
    subject = replace(planted_subject(), windows=[ordinary_tokens(40, 7)[None]])
    rows = table1.table_1(subject)
    for row in rows:
        assert row.get("with_sinks") is None and row["overall"] > 0
        assert row["overall"] == row["without_sinks"] or row["ranges"] == "static"
    table1.print_table_1(subject, rows)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("  dynamic  4 bits"))
    assert line.split()[3:] == [*[f"{rows[0]['overall']:.2f}"] * 2, "-", "1.30", "1.38", "0.07"]


# --------------------------------------------------------------------------------------------------
# The command


def test_the_command_prints_and_writes_the_table(drawable, tmp_path, capsys):  # noqa: F811
    assert table1.main(drawable) == 0
    printed = capsys.readouterr()
    (file,) = (tmp_path / "out").iterdir()
    table = json.loads(file.read_text())
    assert file.name == "table1-model-prompt1.json" and not printed.err
    assert table["blocks"] == [3, 4, 5, 6] and len(table["rows"]) == 18
    assert table["text"] == "prompt 1"
    assert (table["model"], table["windows"], table["group_size"]) == ("model", 1, 16)
    row = table["rows"][3]
    assert (row["kind"], row["ranges"], row["bits"]) == ("per-token Keys", "static", 4)
    assert row["paper"] == {"overall": 86.73, "without_sinks": 16.39}
    lines = printed.out.splitlines()
    lines = [line.split()[3:] for line in lines if line.startswith(("  static ", "  dynamic "))]
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
def test_table_1_refuses_wrong_options(change, words, drawable, capsys, tmp_path):  # noqa: F811
    refuse([*drawable, *change], ["paper.table1: ", *words], capsys, table1)
    assert not (tmp_path / "out").exists()


def test_calibration_follows_the_prompt(drawable, tiny, monkeypatch):  # noqa: F811
    """Packed articles are calibrated on packed articles, prompts on WikiText-2, both on the
    training split; the default model always on packed articles. No window is longer than the
    model's context, here 512."""
    calls = []

    def windows(tokenizer, name, split, seq_len, count, seed, bos):
        calls.append((name, split, seq_len, count, seed))
        return torch.zeros(count, seq_len).long()

    monkeypatch.undo()
    monkeypatch.setattr(text, "windows", windows)
    loaded = load_model(tiny[1], Machine())
    for model, prompt in ((tiny[1], "1"), (tiny[1], "packed"), ("smollm2-135m", "2")):
        command.calibration_windows(command.AnalysisConfig(model, Machine(), prompt), loaded)
    wikitext = ("wikitext2", "train", 512, 16, 0)
    packed = ("wiki-sample", "train", 512, 4, 0)
    assert calls == [wikitext, packed, packed]


def test_a_tokenizer_of_another_model_calibrates_nothing(
    capsys,
    tmp_path,
    drawable,  # noqa: F811
    monkeypatch,
):
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
    """Its errors compare as LLaMA2-7B's if ranges are dynamic, and do not if they are static."""
    for row in table1.table_1(replace(evidence, windows=evidence.windows[:1])):
        overall = row["overall"]
        without = row["without_sinks"]
        paper = row["paper"]
        if row["ranges"] == "static":
            assert abs(1 - without / overall) < 0.05 < 1 - paper["without_sinks"] / paper["overall"]
        elif row["kind"] == "per-channel Keys":
            assert row["with_sinks"] > 1.1 * without
        else:
            assert row["with_sinks"] < without / 5
