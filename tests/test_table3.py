"""paper/table3.py: the finder's row for each prompt, beside the table as printed."""

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


# noqa: F811
def test_table_3_says_whether_prompts_and_table_agree(drawable, tiny, monkeypatch, capsys):
    model, prompts = Llama.from_pretrained(tiny[1]), prompts_of(tiny[1])
    row = table3.table_3(model, prompts, "model")
    assert (row["layers"], row["hidden_size"], row["prompts_agree"], row["table_3"]) == (
        6,
        32,
        True,
        None,
    )
    assert [(found["emergence"], found["channels"]) for found in row["prompts"]] == [(1, (5,))] * 2
    assert all(found["magnitudes"][0] > 1000 for found in row["prompts"])
    for printed, agrees in (
        ((6, 1, 32, (5, 9)), True),
        ((6, 2, 32, (5,)), False),
        ((6, 1, 32, (9, 5)), False),
    ):
        monkeypatch.setitem(kvsink.TABLE_3, tiny[1], kvsink.Table3Row(*printed))
        row = table3.table_3(model, prompts, tiny[1])
        assert row["table_3_agrees"] is agrees and row["table_3"]["channels"] == printed[3]
        table3.print_table_3(row)
        assert (
            "Table 3 agrees on them" if agrees else "Table 3 DISAGREES"
        ) in capsys.readouterr().out
    found = iter([kvsink.Outliers(2, (5,), (1.0,)), kvsink.Outliers(3, (5,), (1.0,))])
    monkeypatch.setattr(kvsink, "stable_outliers", lambda *_: next(found))
    row = table3.table_3(model, prompts, tiny[1])
    table3.print_table_3(row)
    assert (
        not row["prompts_agree"]
        and not row["table_3_agrees"]
        and "DISAGREE on layer" in capsys.readouterr().out
    )


def test_what_the_command_prints(drawable, capsys, tmp_path, monkeypatch):  # noqa: F811
    """Without matplotlib, too: it draws nothing."""
    monkeypatch.setattr(figures, "Figure", None)
    assert table3.main(drawable[:2]) == 0
    printed = capsys.readouterr()
    assert (
        "Table 3 (layers counted from 0)" in printed.out
        and "6 layers, hidden size 32" in printed.out
    )
    assert "prompt 2: outliers emerge in layer 1, channels (magnitudes) 5 (" in printed.out
    assert "the prompts agree" in printed.out and "Table 3 does not list this model" in printed.out
    assert not printed.err and not list(
        tmp_path.iterdir()
    )  # nor does it write or remember anything


@pytest.mark.parametrize("change, words", [
    (["--model", "lama2-7b"], ["llama2-7b"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--prompt", "1"], ["--prompt", "--help"]),
])  # fmt: skip
def test_a_table_3_that_cannot_be(change, words, drawable, capsys):  # noqa: F811
    refuse([*drawable[:2], *change], ["paper.table3: ", *words], capsys, table3)


def test_a_tokenizer_of_another_model_finds_nothing(drawable, capsys, tmp_path):  # noqa: F811
    write_model(tmp_path / "model", PLANTED)  # 64 tokens
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    refuse(
        ["--model", str(tmp_path / "model")],
        ["its tokenizer gives id", "the model has 64"],
        capsys,
        table3,
    )


def test_the_row_of_the_default_model(default_model, default_llama, capsys):
    row = table3.table_3(default_llama, prompts_of(default_model), "smollm2-135m")
    assert (
        row["prompts_agree"] and row["table_3_agrees"] and row["table_3"]["channels"] == (507, 247)
    )
    assert [found["emergence"] for found in row["prompts"]] == [11, 11]
    assert [found["channels"][:2] for found in row["prompts"]] == [(507, 247)] * 2
    assert all(22_000 < found["magnitudes"][0] < 24_000 for found in row["prompts"])
    table3.print_table_3(row)
    assert "kvsink.py's row (not the paper's) agrees on them: layer 11" in capsys.readouterr().out
