"""Table 4 and `python -m paper.table4`: compared with the page as printed, and timed by a clock
that the test sets."""

import json
import sys

import pytest

from llama import LlamaConfig
from paper import shapes, table4
from paper.kvcache import cache_bytes
from support import machine
from tests.helpers import PLANTED, refuse

# Table 4's memory columns, in the characters of the page
TABLE_4_MEMORY = {
    "llama2-7b": ["256", "0.5", "2.5", "10"],
    "llama2-13b": ["400", "0.78", "3.91", "15.63"],
    "llama2-70b": ["160", "0.31", "1.56", "6.25"],
    "mistral-7b": ["64", "0.13", "0.63", "2.5"],
    "llama3-8b": ["64", "0.13", "0.63", "2.5"],
    "llama3.2-3b": ["56", "0.11", "0.55", "2.19"],
}


@pytest.mark.parametrize("name", TABLE_4_MEMORY)
def test_the_memory_columns_of_table_4_to_the_printed_digit(name):
    assert table4.table_4_memory(shapes.shape(name)) == TABLE_4_MEMORY[name]
    *_, memory, added = table4.PAPER_TABLE_4[name]
    assert [table4.as_printed(x) for x in (memory, *added)] == TABLE_4_MEMORY[name]


# Its time columns: prefill in ms, and what KVSink-1, KVSink-5 and KVSink-20 add
TABLE_4_TIME = {
    "llama2-7b": "676.78 0.04 0.04 0.05",
    "llama2-13b": "1090.70 0.04 0.05 0.05",
    "llama2-70b": "4481.05 0.04 0.05 0.05",
    "mistral-7b": "686.32 0.04 0.05 0.05",
    "llama3-8b": "707.95 0.04 0.05 0.05",
    "llama3.2-3b": "430.74 0.04 0.05 0.05",
}


def test_the_time_columns_of_table_4_as_printed():
    columns = {}
    for name, (ms, added, *_) in table4.PAPER_TABLE_4.items():
        columns[name] = f"{ms:.2f} " + " ".join(map(str, added))
    assert columns == TABLE_4_TIME


def test_time_is_the_median_and_warm_up_is_not_counted(monkeypatch):
    """Two functions whose i-th call takes i^2 units, so that median and mean differ; 3 repeats
    after a round that does not count."""
    clock = [0.0]
    calls = []

    def work(name, slow):
        calls.append(name)
        clock[0] += slow * calls.count(name) ** 2 / 1e3

    monkeypatch.setattr(table4.time, "perf_counter", lambda: clock[0])
    times = table4.measure({"a": lambda: work("a", 1), "b": lambda: work("b", 10)}, 3, "cpu")
    assert calls == ["a", "b"] * 4
    assert times["a"] == pytest.approx((9, 4, 16)) and times["b"] == pytest.approx((90, 40, 160))
    times = table4.measure({"a": lambda: work("c", 2)}, 1, "cpu", calls=4)
    assert times["a"] == pytest.approx(((25 + 36 + 49 + 64) * 2 / 4,) * 3)


def table4_options(tiny, options, json_file=None):
    """Return the command's options for the tiny model."""
    file = ["--json", str(json_file)] if json_file else []
    return ["--model", tiny[1], "--no-compile", *file, *options.split()]


def test_the_table4_command(tiny, capsys, tmp_path):
    out = tmp_path / "out.json"
    options = table4_options(tiny, "--n 64 96 --bits 4 2 --repeats 2 --seq-len 64", out)
    assert table4.main(options) == 0
    printed = capsys.readouterr().out
    records = json.loads(out.read_text())
    assert all(f"KVSink-{k}" in printed for k in (1, 5, 20))
    assert "prefill time" in printed and "tokens/s" in printed
    decoded = {(r["n"], r["bits"]): r for r in records if r["what"] == "decode"}
    assert set(decoded) == {(n, bits) for n in (64, 96) for bits in (16, 4, 2)}
    for (n, bits), record in decoded.items():
        numbers = 2 * 6 * n * 2 * 8
        codes_and_kept = numbers * bits / 8 + numbers / n * 5 * 2
        assert record["computed"] == (4 * numbers if bits == 16 else codes_and_kept)
        assert record["fastest"] <= record["median"] <= record["slowest"]
    caches = {r["what"]: r for r in records if r["unit"] == "bytes"}
    computed = cache_bytes(LlamaConfig.from_pretrained(tiny[1]), 64, 2, 20)
    assert caches["cache, 2 bits, k = 20"]["computed"] == computed
    assert {r["what"] for r in records} >= {f"lines 14-16, k = {k}" for k in (1, 5, 20)}


def test_the_hot_path_alone_and_another_scheme(tiny, capsys, tmp_path):
    out = tmp_path / "out.json"
    options = "--repeats 1 --n 100 --bits 3 --only kernel decode --scheme channel-dynamic"
    assert table4.main(table4_options(tiny, options, out)) == 0
    records = json.loads(out.read_text())
    alone = [(r["name"], r["n"], r["bits"]) for r in records if r["what"] == "attention"]
    assert alone == [("PyTorch", 100, 16), ("full", 100, 16), ("3 bits", 100, 3)]
    assert records[0]["bytes"] == 2 * 100 * 2 * 8 * 4  # Keys and Values of 2 heads of 8, fp32
    assert "a copy moves" in capsys.readouterr().out
    assert [r["bits"] for r in records if r["what"] == "decode"] == [16, 3]
    waiting = 6 * 2 * 8 * 8 * 4  # 6 blocks, a residual of 8 tokens in 2 heads of 8 channels, fp32
    assert records[-1]["cache"] > records[-1]["computed"] + waiting


def test_decoding_a_batch(tiny, capsys, tmp_path, monkeypatch):
    """In 60 % of 1 MB, as many sequences as fit: 12 of 49,152 bytes and 74 of 8,064."""
    monkeypatch.setattr(table4, "SPARE", 0.6)
    monkeypatch.setattr(table4, "free_memory", lambda device: 10**6)
    out = tmp_path / "out.json"
    options = "--repeats 1 --only decode --n 64 --bits 4 --batch 3 max"
    assert table4.main(table4_options(tiny, options, out)) == 0
    records = json.loads(out.read_text())
    assert [(r["b"], r["bits"]) for r in records] == [(3, 16), (3, 4), (12, 16), (74, 4)]
    assert [r["computed"] // r["b"] for r in records] == [49152, 8064, 49152, 8064]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    for row, record in zip(rows, records):
        assert float(row[3]) == pytest.approx(1e3 * record["b"] / record["median"], abs=0.05)


def test_a_shape_has_random_weights_and_runs(capsys, monkeypatch):
    shape = {**PLANTED, "tie_word_embeddings": True}
    monkeypatch.setitem(shapes.SHAPES, "llama2-7b", shape)
    options = "--shape llama2-7b --no-compile --repeats 1 --seq-len 32 --n 32 --bits 2".split()
    assert table4.main(options) == 0
    assert "676.78 + 0.04" in capsys.readouterr().out  # the paper's beside ours
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    refuse(options, ["weights take", "are free", "--shape"], capsys, table4)


def test_a_cache_that_does_not_fit_is_not_run(tiny, capsys, monkeypatch):
    """64 tokens take 49,152 bytes in fp32 and 8,064 in 4 bits, and a tenth is to spare."""
    monkeypatch.setattr(table4, "free_memory", lambda device: 10000)
    options = table4_options(tiny, "--only decode --repeats 1 --n 64 --bits 4")
    assert table4.main(options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["64"]]
    assert ["not run" in line for line in lines] == [True, False] and "nanx" in lines[1]


@pytest.mark.parametrize("change, words", [
    (["--n", "0"], ["--n", "from 32"]),
    (["--n", "1" + "0" * 400], ["--n", "from 32 to"]),
    (["--json", "/"], ["exists and is not a file"]),
    (["--bits", "16"], ["--bits"]),
    (["--model", "x", "--shape", "llama2-7b"], ["--shape", "--model"]),
    (["--shape", "llama2-8b"], ["--shape"]),
    (["--json", "nowhere/out.json"], ["nowhere", "cannot write"]),
    (["--seq-len", "600"], ["--seq-len 600", "context, 512"]),
])  # fmt: skip
def test_bad_arguments_of_table4(change, words, tiny, capsys):
    base = [] if "--shape" in change else ["--model", tiny[1]]
    refuse([*base, "--no-compile", *change], words, capsys, table4)


def test_the_other_implementation_is_asked_for_by_name(tiny, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = table4_options(tiny, "--seq-len 64 --vs transformers")
    refuse(options, ["pip install transformers"], capsys, table4)
