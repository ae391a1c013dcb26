"""paper/table3.py: the finder's row for each prompt, beside the row as printed."""

import pytest
import torch

import kvsink
from llama import Llama
from paper import figures, table3
from support.tokenizer import Tokenizer
from tests.helpers import DIGITS, PLANTED, bytes_vocabulary, refuse, write_bpe, write_model
from tests.subjects import drawable  # noqa: F401


def prompts_of(directory):
    tokenizer = Tokenizer.from_pretrained(directory)
    return [torch.tensor([tokenizer.encode(prompt)]) for prompt in kvsink.PROMPTS]


def test_table_3_of_a_model_that_it_does_not_list(drawable, tiny):  # noqa: F811
    row = table3.table_3(Llama.from_pretrained(tiny[1]), prompts_of(tiny[1]), "model")
    assert (row["layers"], row["hidden_size"]) == (6, 32)
    assert row["prompts_agree"] is True and row["table_3"] is None
    sites = [(outliers["emergence"], outliers["channels"]) for outliers in row["prompts"]]
    assert sites == [(1, (5,))] * 2
    assert all(outliers["magnitudes"][0] > 1000 for outliers in row["prompts"])


@pytest.mark.parametrize("printed, agrees", [
    ((6, 1, 32, (5, 9)), True),
    ((6, 2, 32, (5,)), False),
    ((6, 1, 32, (9, 5)), False),
])  # fmt: skip
def test_table_3_beside_the_row_as_printed(
    printed,
    agrees,
    drawable,  # noqa: F811
    tiny,
    monkeypatch,
    capsys,
):
    monkeypatch.setitem(kvsink.TABLE_3, tiny[1], kvsink.Table3Row(*printed))
    row = table3.table_3(Llama.from_pretrained(tiny[1]), prompts_of(tiny[1]), tiny[1])
    assert row["table_3_agrees"] is agrees and row["table_3"]["channels"] == printed[3]
    table3.print_table_3(row)
    words = "Table 3 agrees on them" if agrees else "Table 3 DISAGREES"
    assert words in capsys.readouterr().out


def test_table_3_of_prompts_that_disagree(
    drawable,  # noqa: F811
    tiny,
    monkeypatch,
    capsys,
):
    monkeypatch.setitem(kvsink.TABLE_3, tiny[1], kvsink.Table3Row(6, 1, 32, (9, 5)))
    outliers = iter([kvsink.Outliers(2, (5,), (1.0,)), kvsink.Outliers(3, (5,), (1.0,))])
    monkeypatch.setattr(kvsink, "stable_outliers", lambda *_: next(outliers))
    row = table3.table_3(Llama.from_pretrained(tiny[1]), prompts_of(tiny[1]), tiny[1])
    table3.print_table_3(row)
    assert not row["prompts_agree"] and not row["table_3_agrees"]
    assert "DISAGREE on layer" in capsys.readouterr().out


def test_the_command_prints_the_row(drawable, capsys, tmp_path, monkeypatch):  # noqa: F811
    """It draws nothing, so it needs no matplotlib."""
    monkeypatch.setattr(figures, "Figure", None)
    assert table3.main(drawable[:2]) == 0
    printed = capsys.readouterr()
    assert "Table 3 (layers counted from 0)" in printed.out
    assert "6 layers, hidden size 32" in printed.out
    assert "prompt 2: outliers emerge in layer 1, channels (magnitudes) 5 (" in printed.out
    assert "the prompts agree" in printed.out and "Table 3 does not list this model" in printed.out
    assert not printed.err
    assert not list(tmp_path.iterdir())  # it writes and remembers nothing


@pytest.mark.parametrize("change, words", [
    (["--model", "lama2-7b"], ["llama2-7b"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--prompt", "1"], ["--prompt", "--help"]),
])  # fmt: skip
def test_table_3_refuses_wrong_options(change, words, drawable, capsys):  # noqa: F811
    refuse([*drawable[:2], *change], ["paper.table3: ", *words], capsys, table3)


def test_a_tokenizer_of_another_model_finds_nothing(drawable, capsys, tmp_path):  # noqa: F811
    write_model(tmp_path / "model", PLANTED)  # 64 tokens
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    options = ["--model", str(tmp_path / "model")]
    refuse(options, ["the tokenizer gives id", "the model has 64"], capsys, table3)


def test_the_row_of_the_default_model(default_model, default_llama, capsys):
    row = table3.table_3(default_llama, prompts_of(default_model), "smollm2-135m")
    assert row["prompts_agree"] and row["table_3_agrees"]
    assert row["table_3"]["channels"] == (507, 247)
    assert [outliers["emergence"] for outliers in row["prompts"]] == [11, 11]
    assert [outliers["channels"][:2] for outliers in row["prompts"]] == [(507, 247)] * 2
    assert all(22_000 < outliers["magnitudes"][0] < 24_000 for outliers in row["prompts"])
    table3.print_table_3(row)
    assert "kvsink.py's row (not the paper's) agrees on them: layer 11" in capsys.readouterr().out
