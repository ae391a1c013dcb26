"""Rows: the JSON file, the table, Figure 9."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import eval_ppl
from kvsink import SCHEMES, prefill, rtn_cache
from llama import Llama, LlamaConfig
from quant import Quantizer
from support import cli, results, text
from support.results import FULL_PRECISION, Row
from support.tokenizer import Tokenizer
from tests.helpers import HERE, SMALL, refuse, results_of


def test_rows_json_table_and_figure(tiny, tmp_path, capsys, sample_calibration, monkeypatch):
    out, plot = tmp_path / "out.json", tmp_path / "fig9.png"
    options = f"--bits 4 2 --sinks 0 5 --limit 3 --json {out} --plot {plot}".split()
    assert eval_ppl.main([*tiny, *options]) == 0
    rows_done = results_of(out)
    rows = [(r["scheme"], r["bits"], r["keep"], r["sinks"]) for r in rows_done]
    assert rows[0] == ("full", 16, "none", 0) and len(rows) == len(set(rows)) == 1 + 3 * 2 * 3
    assert rows[1:4] == [
        ("token-static", 4, "none", 0),
        ("token-static", 4, "pfn", 5),
        ("token-static", 4, "kvsink", 5),
    ]
    fields = "model data seq_len windows scheme bits group_size keep sinks ppl ppl_fp avg_bits seconds".split()
    assert all(set(fields) <= result.keys() for result in rows_done)
    once = 32 / (8 * 64)  # a scale and a zero for each head of 8 channels, shared by 64 tokens
    kept = (
        (64 - 5) * 4 + 5 * (16 + 32 / 32)
    ) / 64  # 32 numbers in Keys and Values of a token, and one place
    assert [rows_done[i]["avg_bits"] for i in (0, 1, 2)] == pytest.approx(
        [16, 4 + once, kept + once]
    )
    dynamic = next(
        r
        for r in rows_done
        if r["scheme"] == "token-dynamic" and r["keep"] == "none" and r["bits"] == 2
    )
    assert (
        dynamic["avg_bits"] == 2 + 32 / 8
    )  # a scale and a zero of 16 bits for each head of 8 channels
    assert plot.read_bytes().startswith(b"\x89PNG")
    drawn = results.figure_9(rows_done)
    panels = {
        axis.get_title(): {line.get_label(): line for line in axis.lines} for axis in drawn.axes
    }
    lines = panels["model on text.txt\nchannel-static, 2 bits"]
    for keep, label in (("pfn", "PFN"), ("kvsink", "KVSink")):
        panel = [r for r in rows_done if (r["scheme"], r["bits"]) == ("channel-static", 2)]
        rows = {r["sinks"]: r["ppl"] for r in panel if r["keep"] in (keep, "none")}
        assert dict(zip(*lines[label].get_data())) == rows and set(rows) == {0, 5}
    assert set(lines["full precision"].get_ydata()) == {rows_done[0]["ppl"]}
    table = capsys.readouterr()
    assert (
        "3 windows of 64 tokens, groups of 8 channels, which is a head (128 were asked for)"
        in table.out
    )
    assert "sinks predicted after block 2 (counted from 1) in channel 5" in table.out
    best = min(rows_done[1:4], key=lambda r: r["ppl"])
    kept = (
        "nothing"
        if best["keep"] == "none"
        else f"{dict(pfn='PFN', kvsink='KVSink')[best['keep']]}-{best['sinks']}"
    )
    after = [line.strip() for line in table.out.splitlines()[7:9]]
    assert after[0] == f"{kept} is the best of these" and after[1].startswith(
        "KVSink-5 against PFN-5: "
    )
    assert table.out.count("is the best of these") == table.out.count("against") == 6


def test_a_second_run_takes_up_where_the_first_stopped(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.json"
    arguments = [
        *tiny,
        "--scheme",
        "token-dynamic",
        "--sinks",
        "3",
        "--json",
        str(out),
        "--limit",
        "2",
    ]
    assert eval_ppl.main([*arguments, "--bits", "4"]) == 0
    first, evaluated = results_of(out), []
    real = eval_ppl.window_losses
    monkeypatch.setattr(
        eval_ppl, "window_losses", lambda *args: evaluated.append(args[-1]) or real(*args)
    )
    assert eval_ppl.main([*arguments, "--bits", "4", "2"]) == 0
    assert len(evaluated) == 3 and all("2 bits" in label for label in evaluated)
    assert results_of(out)[:4] == first and len(results_of(out)) == 7


def test_rows_appear_as_they_are_done(capsys):
    """A row is printed before the next is measured, and what compares rows when a group is
    complete."""
    group = [
        Row("token-static", 4, keep, N) for keep, N in (("none", 0), ("pfn", 5), ("kvsink", 5))
    ]
    rows, seen = [FULL_PRECISION, *group, Row("token-static", 3, "none", 0)], []

    def measured():
        for row, ppl in zip(rows, (10.0, 12.0, 11.5, 11.0, 30.0)):
            seen.append(capsys.readouterr().out)
            own = {"scheme": row.scheme, "bits": row.bits, "keep": row.keep, "sinks": row.N}
            yield {
                **own,
                "ppl": ppl,
                "ppl_fp": 10.0,
                "nll": [math.log(ppl) - 0.1, math.log(ppl) + 0.1],
            }

    assert len(list(results.print_rows(measured()))) == 5
    assert seen[0].split() == ["scheme", "bits", "kept", "PPL", "over", "full"]
    assert [line.split() for line in seen[1:]] == [
        ["full", "precision", "10.000"],
        ["token-static", "4", "nothing", "12.000", "+2.000"],
        ["PFN-5", "11.500", "+1.500"],
        ["KVSink-5", "11.000", "+1.000"],
    ]
    after = capsys.readouterr().out.splitlines()
    assert after[0].split() == "KVSink-5 is the best of these".split()
    assert (
        after[1].strip() == "KVSink-5 against PFN-5: PPL 4.3 % lower, +- 0.0"
    )  # 11 / 11.5, the same in both windows
    assert (
        after[2].split() == ["token-static", "3", "nothing", "30.000", "+20.000"]
        and len(after) == 3
    )


def test_a_gain_and_its_standard_error_by_hand():
    """d = -0.03, -0.01, -0.02: mean -0.02, deviation 0.01, error 0.01 / sqrt(3) = 0.0058; 1 -
    exp(-0.02) = 1.98 %."""
    assert results.gain([1.97, 3.0, 2.48], [2.0, 3.01, 2.5]) == "PPL 2.0 % lower, +- 0.6"
    assert results.gain([2.0, 3.01, 2.5], [1.97, 3.0, 2.48]) == "PPL 2.0 % higher, +- 0.6"
    # d = 0.03, -0.01, -0.02: mean 0, error 0.0265 / sqrt(3) = 0.0153
    assert results.gain([2.03, 3.0, 2.48], [2.0, 3.01, 2.5]) == "not resolved (gain 0.0 % +- 1.5)"
    assert results.gain([2.0, 3.0], [2.0, 3.0]) == "not resolved (gain 0.0 % +- 0.0)"
    # d = -0.05, -0.01, -0.01: mean -0.0233, error 0.0231 / sqrt(3) = 0.0133, 1.75 of them
    assert results.gain([1.95, 2.99, 2.49], [2.0, 3.0, 2.5]) == "not resolved (gain 2.3 % +- 1.3)"
    assert results.gain([1.9], [2.0]) == "PPL 9.5 % lower, of one window"


def test_the_table_is_flushed_line_by_line_into_a_pipe(tiny):
    """The first row can be read while the second, of many, is still to come."""
    command = [
        sys.executable,
        "eval_ppl.py",
        *tiny,
        "--scheme",
        "token-dynamic",
        "--sinks",
        *map(str, range(30)),
    ]
    process = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines = []
    while not (lines and lines[-1].startswith("full precision")):
        lines.append(process.stdout.readline())
        assert lines[-1]
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_two_runs_may_write_to_one_file(tiny, tmp_path):
    """A row that another run wrote meanwhile stays; a link stays a link."""
    out, link = tmp_path / "out.json", tmp_path / "link.json"
    link.symlink_to(out)
    options = f"--scheme token-dynamic --keep none --bits 4 --limit 1 --json {link}".split()
    assert eval_ppl.main([*tiny, *options]) == 0
    mine = results_of(out)
    results.add_result(link, {**mine[1], "bits": 5})
    results.add_result(link, mine[1])
    assert results_of(out) == [*mine, {**mine[1], "bits": 5}] and link.is_symlink()


def test_no_row_is_lost_where_several_write_at_once(tmp_path):
    out = tmp_path / "out.json"
    own = {
        "model": "m",
        "data": "d",
        "scheme": "full",
        "keep": "none",
        "sinks": 0,
        "ppl": 1.0,
        "ppl_fp": 1.0,
        "nll": [0.0],
    }

    def write(who):
        for i in range(12):
            results.add_result(out, {**own, "bits": 100 * who + i})

    writers = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(r["bits"] for r in results_of(out)) == sorted(
        100 * who + i for who in range(4) for i in range(12)
    )


def test_interrupting_keeps_the_rows_done(tiny, tmp_path):
    out = tmp_path / "out.json"
    rows = ["--bits", *map(str, range(1, 9)), "--sinks", *map(str, range(30))]  # minutes of them
    command = [
        sys.executable,
        "eval_ppl.py",
        *tiny,
        "--scheme",
        "token-dynamic",
        *rows,
        "--json",
        str(out),
    ]
    # A job in the background of a shell ignores interrupts, and so would its children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=HERE, preexec_fn=heed, **pipes)
    while process.poll() is None and (not out.exists() or len(results_of(out)) < 2):
        time.sleep(0.01)
    for _ in range(5):  # Python drops an interrupt that falls into a destructor; one presses again
        process.send_signal(signal.SIGINT)
        try:
            printed, errors = process.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            pass
    assert process.returncode == 130 and "Traceback" not in errors
    assert 2 <= len(results_of(out)) < 1 + 8 * 59 and "full precision" in printed
    assert set(os.listdir(tmp_path)) == {"out.json", ".out.json.lock"}  # no temporary file is left


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "{}",
        "[1, 2]",
        '[{"a": 1}]',
        "",
        '[{"model": "m", "scheme": "full", "ppl": null}]',
    ],
)
def test_a_json_file_that_is_not_ours_is_left_as_it_is(content, tiny, capsys, tmp_path):
    out = tmp_path / "precious.json"
    out.write_text(content)
    refuse([*tiny, "--json", str(out)], ["precious.json", "left as it is"], capsys, eval_ppl)
    assert out.read_text() == content


def test_a_full_disk_keeps_the_rows_that_were_written(tiny, capsys, tmp_path, monkeypatch):
    out, real, room = tmp_path / "out.json", os.replace, iter([True, True, False])

    def replace(*names):
        if not next(room):
            raise OSError(28, "No space left on device")
        real(*names)

    monkeypatch.setattr(os, "replace", replace)
    options = f"--scheme token-dynamic --sinks 2 --limit 1 --json {out}".split()
    refuse([*tiny, *options], ["No space left"], capsys, eval_ppl)
    assert len(results_of(out)) == 2 and set(os.listdir(tmp_path)) == {"out.json", ".out.json.lock"}


def test_matplotlib_is_asked_for_by_name(tiny, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    refuse([*tiny, "--plot", "fig9.png"], ["pip install matplotlib"], capsys, eval_ppl)


def test_average_bits_of_the_rtn_schemes_count_what_a_quantizer_has():
    config = LlamaConfig.from_dict({**SMALL, "num_key_value_heads": 2})  # 2 heads of 16 channels
    X, n, g = torch.randn(1, 2, 64, 16), 64, 8

    def average_bits(row, l_E=0):
        return results.average_bits(row, config, n, results.rtn_bits(row, config, g), l_E, row.N)

    for scheme, (K, V, static) in SCHEMES.items():
        parameters = 0
        for granularity in (K, V):
            q = Quantizer(4, granularity, g, static)
            q.calibrate(X) if static else None
            parameters += 16 * sum(part.numel() for part in q.parameters(X))
        expected = (2 * X.numel() * 4 + parameters) / (2 * X.numel())
        assert average_bits(Row(scheme, 4, "none", 0)) == pytest.approx(expected), scheme
    assert average_bits(FULL_PRECISION) == 16
    row = Row(
        "token-dynamic", 4, "kvsink", 6
    )  # kept in two blocks of three: as four tokens in every block
    assert average_bits(row, l_E=1) == average_bits(row._replace(keep="pfn", N=4))
    both = Row("token-dynamic", 4, "pfn+kvsink", 7)  # 1, 7 and 7: as five
    assert average_bits(both, l_E=1) == average_bits(row._replace(keep="pfn", N=5))


def test_rules_beyond_the_paper_in_words():
    rows = results.expand_rows([("token-dynamic", 4, 0.0)], results.KEEPS, [0, 5, "auto"])
    names = "nothing PFN-5 KVSink-5 KVSink-auto PFN-1+KVSink-5 PFN-1+KVSink-auto"
    assert " ".join(row.kept() for row in rows) == names and [row.most() for row in rows] == [
        0,
        5,
        5,
        20,
        5,
        20,
    ]
    with pytest.raises(ValueError, match="--sinks auto is for --keep kvsink"):
        results.expand_rows([("token-dynamic", 4, 0.0)], ["pfn"], ["auto"])


def test_the_table_says_how_many_tokens_auto_kept_and_compares_it_with_the_best_pfn(
    tiny, tmp_path, capsys
):
    """Five windows of text, the strong token in none, one or two places of each; prediction marks
    what stands out."""
    out = tmp_path / "out.json"
    options = "--scheme token-dynamic --bits 3 --keep pfn kvsink pfn+kvsink --sinks 1 3 auto --limit 3 --json".split()
    assert eval_ppl.main([*tiny, *options, str(out)]) == 0
    table, rows = capsys.readouterr().out, results_of(out)
    assert [r["kept"] for r in rows[:4]] == [[0] * 3, [1] * 3, [3] * 3, [1] * 3]
    auto = [r for r in rows if r["sinks"] == "auto"]
    assert [r["keep"] for r in auto] == ["kvsink", "pfn+kvsink"] and auto[0]["kept"] == auto[1][
        "kept"
    ]
    kept = auto[0]["kept"]
    assert table.count(f"{sum(kept) / 3:.1f} tokens, at most {max(kept)}") == 2
    best = min(rows[1:3], key=lambda r: r["ppl"])
    assert (
        f"KVSink-auto against PFN-{best['sinks']}: " in table
        and "PFN-1+KVSink-3 against PFN-3: " in table
    )
    site = {(r["l_E"], r["c"]) for r in auto}
    assert site == {(2, 5)} and rows[1]["l_E"] == 0
    stored = [r["stored_bits"] for r in auto]
    assert stored[0] == stored[1] > rows[2]["stored_bits"] and f"{stored[0]:.2f}" in table
    model, tokenizer = Llama.from_pretrained(tiny[1]), Tokenizer.from_pretrained(tiny[1])
    for window, k in zip(text.windows(tokenizer, tiny[3], "test", 64, 3, 0), kept):
        H = model.embedding(window[None])
        _, S_sink = prefill(model, H, rtn_cache(model, "token-dynamic", 3, 8), 2, 5, "auto")
        assert S_sink.sum() == k


GOOD = {
    "model": "m",
    "data": "d",
    "scheme": "full",
    "keep": "none",
    "sinks": 0,
    "bits": 16,
    "ppl": 1.0,
    "ppl_fp": 1.0,
}


@pytest.mark.parametrize("change", [
    {"sinks": 10**400}, {"sinks": -1}, {"sinks": True}, {"outliers": [1]}, {"seq_len": [4]}, {"seq_len": 10**400}, {"bits": 2.5},
    {"model": "\ud800"}, {"keep": "some"}, {"keep": ["none"]}, {"ppl": math.nan}, {"ppl": "1"}, {"nll": 3}, {"nll": ["x"]},
    {"nll": [math.inf]}, {"weights": {}},
])  # fmt: skip
def test_results_that_cannot_be_are_not_ours(change, tmp_path):
    out = tmp_path / "out.json"
    for row, fine in (
        (GOOD, True),
        ({**GOOD, "nll": [0.5], "compiled": True, "weights": "x"}, True),
        (GOOD | change, False),
    ):
        out.write_text(json.dumps([row]))
        if fine:
            assert results.read_results(out) == [row]
        else:
            with pytest.raises(ValueError, match="left as it is"):
                results.read_results(out)


def test_several_texts_in_one_run(tiny, tmp_path, capsys):
    other, out = tmp_path / "other.txt", tmp_path / "out.json"
    other.write_text("Another text. " * 20)
    options = [
        "--data",
        tiny[3],
        str(other),
        "--scheme",
        "token-dynamic",
        "--sinks",
        "1",
        "--limit",
        "1",
        "--json",
        str(out),
    ]
    assert eval_ppl.main([*tiny, *options]) == 0
    results = results_of(out)
    assert [Path(r["data"]).name for r in results] == ["text.txt"] * 7 + ["other.txt"] * 7
    assert results[0]["ppl"] != results[7]["ppl"] == results[7]["ppl_fp"] == results[8]["ppl_fp"]
    assert capsys.readouterr().out.count("full precision") == 2


def test_figure_9_has_a_panel_for_each_model_scheme_and_width():
    rows = [
        {"model": model, "data": "wikitext2", "scheme": scheme, "bits": bits, "keep": keep, "sinks": N, "ppl": ppl, "ppl_fp": 5.0}
        for model in ("llama2-7b", "some/llama$2")
        for scheme, bits, keep, N, ppl in [
            ("full", 16, "none", 0, 5.0), ("token-static", 4, "none", 0, 9.0), ("token-static", 4, "pfn", 5, 8.0),
            ("token-static", 4, "kvsink", 5, 6.0), ("token-static", 2, "pfn", 5, 80.0), ("token-static", 2, "kvsink", 5, 60.0),
        ]
    ]  # fmt: skip
    drawn = results.figure_9(rows)
    panels = {
        axis.get_title(): {line.get_label(): line for line in axis.lines} for axis in drawn.axes
    }
    names = [
        f"{m} on wikitext2\ntoken-static, {bits} bits"
        for m in ("llama2-7b", r"llama\$2")
        for bits in (4, 2)
    ]
    assert list(panels) == names
    lines = panels[names[0]]
    assert [list(map(float, x)) for x in lines["KVSink"].get_data()] == [[0, 5], [9, 6]]
    assert [list(map(float, x)) for x in lines["PFN"].get_data()] == [[0, 5], [9, 8]]
    assert set(lines["full precision"].get_ydata()) == {5.0}
    with_nll = [{**row, "nll": [math.log(row["ppl"]) + x for x in (0.1, -0.1)]} for row in rows[:4]]
    with_nll[3] |= {
        "keep": "pfn+kvsink",
        "sinks": "auto",
        "kept": [3, 5],
        "nll": [math.log(6) + 0.2, math.log(6)],
    }
    axis = results.figure_9(with_nll).axes[0]
    line = next(line for line in axis.lines if line.get_label() == "PFN-1+KVSink-auto")
    assert [list(map(float, x)) for x in line.get_data()] == [[4], [6]]
    ends = [bars.get_segments()[0][:, 1].tolist() for bars in axis.collections]
    # PFN's differ from full precision's by the same in both windows; the last by 0.1 and 0.1 more:
    # mean +- 0
    assert ends[0] == pytest.approx([9, 9]) and ends[-1] == pytest.approx([6, 6])
    with_nll[3]["nll"][0] += 0.2  # differences 0.2 apart: deviation 0.1414, error 0.1
    bars = results.figure_9(with_nll).axes[0].collections[-1]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([6 * 0.9, 6 * 1.1])
    with pytest.raises(ValueError, match="no results to draw"):
        results.figure_9(rows[:1])
    with pytest.raises(ValueError, match="differ in rope"):
        results.figure_9([{**rows[1], "rope": "post"}, {**rows[1], "rope": "pre"}])
