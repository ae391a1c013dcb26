"""A run: what is refused before it starts, its rows and windows, several ranks, and rows that an
earlier run has done."""

import math
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import eval_ppl
from kvsink import Rule
from support import evaluate
from support.rows import FULL_PRECISION, Row
from tests.helpers import (
    DIGITS,
    HERE,
    SMALL,
    TWO_RANKS,
    bytes_vocabulary,
    refuse,
    results_of,
    write_bpe,
    write_model,
    write_unplanted,
    write_weights,
)

# --------------------------------------------------------------------------------------------------
# Models that cannot be evaluated


@pytest.mark.parametrize("damage, words", [
    (lambda file: file.unlink(), ["no model.safetensors"]),
    (lambda file: file.write_bytes(file.read_bytes()[:-1000]), ["not a whole"]),
])  # fmt: skip
def test_bad_checkpoints(damage, words, tiny, capsys, tmp_path):
    write_model(tmp_path, SMALL)
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    damage(tmp_path / "model.safetensors")
    refuse([*tiny, "--group-size", "16", "--model", str(tmp_path)], words, capsys, eval_ppl)


def test_no_stable_outliers_is_an_answer(tiny, capsys, tmp_path, monkeypatch):
    """Without --layer and --channel, the finder looks for the site of the model."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    write_unplanted(tmp_path / "model")
    options = [*tiny[2:-4], "--model", str(tmp_path / "model")]
    assert "--layer" not in options and "--channel" not in options
    refuse(options, ["no stable outliers"], capsys, eval_ppl)


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_logits_that_are_not_finite_name_the_first_block(value, tiny, capsys, tmp_path):
    weights = write_unplanted(tmp_path)
    weights["model.layers.3.mlp.down_proj.weight"][:] = value
    write_weights(tmp_path, weights)
    options = [*tiny, "--model", str(tmp_path), "--limit", "1"]
    refuse(options, ["NaN or inf", "block 4 of 6"], capsys, eval_ppl)


# --------------------------------------------------------------------------------------------------
# Several ranks


@pytest.fixture(params=[[], ["--stream"]], ids=["whole", "streamed"])
def measure(request, tiny, monkeypatch):
    """A function that measures two rows on five windows as one of several ranks, without processes.
    It returns the results as this rank sees them before they are added up, and the number of
    windows that it has evaluated."""
    evaluated = []

    def loss(model, H, window):
        evaluated.append(window)
        return evaluate.negative_log_likelihood(model, H, window)

    args = eval_ppl.parse_arguments([*tiny, "--limit", "5", *request.param])
    (run,) = evaluate.load_runs(eval_ppl.eval_configs(args))
    rows = (FULL_PRECISION, Row("token-dynamic", 3, Rule(k=2)))
    config = replace(run.config, rows=rows)
    run = replace(run, config=config, options=replace(run.options, loss=loss))

    def measure(rank, ranks):
        monkeypatch.setattr(evaluate, "rank_and_world_size", lambda: (rank, ranks))
        monkeypatch.setattr(evaluate.dist, "get_backend", lambda: "gloo")
        monkeypatch.setattr(evaluate.dist, "all_reduce", lambda numbers: None)
        evaluated.clear()
        return list(eval_ppl.evaluate_rows(run, [])), len(evaluated)

    return measure


def test_each_rank_takes_its_share(measure):
    """Two ranks measure, added up by hand, what one does; no window is evaluated twice."""
    results, count = measure(0, 1)
    first, first_count = measure(0, 2)
    second, second_count = measure(1, 2)
    assert (count, first_count, second_count) == (2 * 5, 2 * 3, 2 * 2)
    for a, b, one in zip(first, second, results, strict=True):
        for key in ("nll", "kept"):
            assert [a[key][w] for w in (1, 3)] == [0] * 2
            assert [b[key][w] for w in (0, 2, 4)] == [0] * 3
            assert [x + y for x, y in zip(a[key], b[key])] == one[key]
        assert one["ppl"] == pytest.approx(math.exp(statistics.mean(one["nll"])), rel=1e-12)
    full, quantized = results
    assert full["kept"] == [0] * 5
    assert quantized["kept"] == [2] * 5


def test_a_rank_may_have_no_window(measure):
    results, count = measure(5, 6)
    assert count == 0
    assert all(result["nll"] == [0] * 5 for result in results)


def test_two_ranks_give_the_perplexity_of_one(tiny, tmp_path):
    """torchrun with gloo: the windows are shared out and summed."""
    one = tmp_path / "one.json"
    two = tmp_path / "two.json"
    row = "--scheme token-dynamic --keep kvsink --sinks 2 --bits 3 --limit 5".split()
    assert eval_ppl.main([*tiny, *row, "--json", str(one)]) == 0
    command = [*TWO_RANKS, *tiny, *row, "--json", str(two)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for a, b in zip(results_of(one), results_of(two), strict=True):
        assert a["scheme"] == b["scheme"]
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-12)
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-12)
        assert a["kept"] == b["kept"]
        assert len(a["nll"]) == 5


# --------------------------------------------------------------------------------------------------
# Several runs


def test_a_second_run_goes_on_after_the_first(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    options = f"--scheme token-dynamic --sinks 3 --limit 2 --json {out}".split()
    assert eval_ppl.main([*tiny, *options, "--bits", "4"]) == 0
    first = results_of(out)
    measured = []
    row_batches = evaluate.row_batches

    def recording(run, row):
        measured.append(row)
        return row_batches(run, row)

    monkeypatch.setattr(evaluate, "row_batches", recording)
    assert eval_ppl.main([*tiny, *options, "--bits", "4", "2"]) == 0
    rules = [Rule(), Rule(first=3), Rule(k=3)]
    assert measured == [Row("token-dynamic", 2, rule) for rule in rules]
    assert results_of(out)[:4] == first
    assert len(results_of(out)) == 7


def test_several_texts_in_one_run(tiny, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 20)
    out = tmp_path / "out.json"
    options = f"--scheme token-dynamic --sinks 1 --limit 1 --json {out}".split()
    assert eval_ppl.main([*tiny, *options, "--data", tiny[3], str(other)]) == 0
    results = results_of(out)
    assert [Path(r["data"]).name for r in results] == ["text.txt"] * 7 + ["other.txt"] * 7
    assert results[0]["ppl"] != results[7]["ppl"]
    assert results[7]["ppl"] == results[7]["ppl_fp"] == results[8]["ppl_fp"]
    assert capsys.readouterr().out.count("full precision") == 2
