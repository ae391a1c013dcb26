"""The table, paired comparisons and Figure 9."""

import math
import subprocess

import pytest

import eval_ppl
from kvsink import AUTO, Rule, prefill, rtn_quantizers
from llama import Llama
from support import report, text
from support.rows import FULL_PRECISION, Row, options_of
from support.tokenizer import Tokenizer
from tests.helpers import EVAL_PPL, HERE, SITE, results_of


def result_of(row, ppl, **more):
    """Return a result of two windows, one harder and one easier than the PPL says."""
    keep, N = options_of(row.rule)
    return {
        "scheme": row.scheme,
        "bits": row.bits,
        "keep": keep,
        "sinks": N,
        "ppl": ppl,
        "ppl_fp": 10.0,
        "nll": [math.log(ppl) - 0.1, math.log(ppl) + 0.1],
        **more,
    }


# --------------------------------------------------------------------------------------------------
# The table


def test_rows_appear_as_they_are_done(capsys):
    """A row is printed before the next is measured; comparisons, when a group is complete."""
    rows = [
        FULL_PRECISION,
        Row("token-static", 4, Rule()),
        Row("token-static", 4, Rule(first=5)),
        Row("token-static", 4, Rule(k=5)),
        Row("token-static", 3, Rule()),
    ]
    printed = []  # before each row is measured

    def measure():
        for row, ppl in zip(rows, (10.0, 12.0, 11.5, 11.0, 30.0)):
            printed.append(capsys.readouterr().out)
            yield result_of(row, ppl)

    assert len(list(report.print_rows(measure()))) == 5
    assert [line.split() for line in printed] == [
        ["scheme", "bits", "kept", "PPL", "over", "full"],
        ["full", "precision", "10.000"],
        ["token-static", "4", "nothing", "12.000", "+2.000"],
        ["PFN-5", "11.500", "+1.500"],
        ["KVSink-5", "11.000", "+1.000"],
    ]
    best, comparison, last = capsys.readouterr().out.splitlines()
    assert best.strip() == "KVSink-5 is the best of these"
    # 11 / 11.5, the same in both windows
    assert comparison.strip() == "KVSink-5 against PFN-5: PPL 4.3 % lower, +- 0.0"
    assert last.split() == ["token-static", "3", "nothing", "30.000", "+20.000"]


def comparisons(results, capsys):
    """Return what is printed about results of one scheme at one width, after their rows."""
    assert list(report.print_rows(results)) == results
    return [line.strip() for line in capsys.readouterr().out.splitlines()[1 + len(results) :]]


def test_predicting_rows_are_compared_with_as_many_first_tokens_the_most_and_the_best(capsys):
    """Worked by hand, and the same in both windows: 11 / 11.5 = 1 - 4.3 %, 11 / 11.2 = 1 - 1.8 %,
    11.76 / 11.2 = 1 + 5 %, 10.9 / 11.2 = 1 - 2.7 %, 11.1 / 11.2 = 1 - 0.9 %."""
    group = {
        Rule(): 12.0,
        Rule(first=5): 11.5,
        Rule(first=20): 11.2,
        Rule(k=5): 11.0,
        Rule(k=10): 11.76,
        Rule(k=20): 10.9,
        Rule(first=1, k=7): 11.1,
    }
    results = [result_of(Row("token-static", 4, rule), ppl) for rule, ppl in group.items()]
    assert comparisons(results, capsys) == [
        "KVSink-20 is the best of these",
        "KVSink-5 against PFN-5: PPL 4.3 % lower, +- 0.0",
        "KVSink-5 against PFN-20: PPL 1.8 % lower, +- 0.0",
        "KVSink-10 against PFN-20: PPL 5.0 % higher, +- 0.0",
        "KVSink-20 against PFN-20: PPL 2.7 % lower, +- 0.0",
        "PFN-1+KVSink-7 against PFN-20: PPL 0.9 % lower, +- 0.0",
    ]
    group = {Rule(first=5): 11.2, Rule(first=20): 11.5, Rule(k=7): 11.0}  # PFN-5 is the best PFN
    results = [result_of(Row("token-static", 4, rule), ppl) for rule, ppl in group.items()]
    assert comparisons(results, capsys)[1:] == [
        "KVSink-7 against PFN-20: PPL 4.3 % lower, +- 0.0",
        "KVSink-7 against PFN-5: PPL 1.8 % lower, +- 0.0",
    ]


def test_comparisons_need_two_rows_and_the_losses_of_both(capsys):
    pfn = result_of(Row("token-static", 4, Rule(first=5)), 11.5)
    ours = result_of(Row("token-static", 4, Rule(k=5)), 11.0)
    assert comparisons([ours], capsys) == []
    for result in (pfn, ours):
        losses = result.pop("nll")  # files of earlier versions have none
        assert comparisons([pfn, ours], capsys) == ["KVSink-5 is the best of these"]
        result["nll"] = losses
    assert len(comparisons([pfn, ours], capsys)) == 2


def test_auto_says_how_many_tokens_it_kept_and_is_compared_with_the_best_pfn(
    tiny, tmp_path, capsys
):
    """Three windows of text, with the strong token at none, one or two places of each: prediction
    marks what stands out."""
    out = tmp_path / "out.json"
    options = "--scheme token-dynamic --bits 3 --keep pfn kvsink pfn+kvsink --sinks 1 3 auto"
    assert eval_ppl.main([*tiny, *options.split(), "--limit", "3", "--json", str(out)]) == 0
    table = capsys.readouterr().out
    results = results_of(out)
    full, *others = results
    pfn = others[:2]
    auto = [result for result in results if result["sinks"] == AUTO]

    assert [result["kept"] for result in results[:4]] == [[0] * 3, [1] * 3, [3] * 3, [1] * 3]
    assert [result["keep"] for result in auto] == ["kvsink", "pfn+kvsink"]
    assert auto[0]["kept"] == auto[1]["kept"]
    kept = auto[0]["kept"]
    assert table.count(f"{sum(kept) / 3:.1f} tokens, at most {max(kept)}") == 2

    best = min(pfn, key=lambda result: result["ppl"])
    assert f"KVSink-auto against PFN-{best['sinks']}: " in table
    assert "PFN-1+KVSink-3 against PFN-3: " in table

    assert {(result["l_E"], result["c"]) for result in auto} == {SITE}
    assert pfn[0]["l_E"] == 0
    assert auto[0]["stored_bits"] == auto[1]["stored_bits"] > pfn[1]["stored_bits"]
    assert f"{auto[0]['stored_bits']:.2f}" in table

    model = Llama.from_pretrained(tiny[1])
    tokenizer = Tokenizer.from_pretrained(tiny[1])
    for window, N in zip(text.windows(tokenizer, tiny[3], "test", 64, 3, 0), kept):
        H = model.embedding(window[None])
        _, S_sink = prefill(model, H, rtn_quantizers(model, "token-dynamic", 3, 8), *SITE, k=AUTO)
        assert S_sink.sum() == N


def test_the_table_is_flushed_line_by_line_into_a_pipe(tiny):
    """The first row can be read while the others, minutes of them, are still to come."""
    numbers = " ".join(map(str, range(30)))
    command = [*EVAL_PPL, *tiny, *f"--scheme token-dynamic --sinks {numbers}".split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=HERE, **pipes)
    line = "the heading"
    while not line.startswith("full precision"):
        line = process.stdout.readline()
        assert line
    assert process.poll() is None
    process.kill()
    process.communicate()


# --------------------------------------------------------------------------------------------------
# Paired comparisons


def test_a_gain_and_its_standard_error_by_hand():
    """d = -0.03, -0.01, -0.02: mean -0.02, deviation 0.01, error 0.01 / sqrt(3) = 0.0058;
    1 - exp(-0.02) = 1.98 %."""
    assert report.gain([1.97, 3.0, 2.48], [2.0, 3.01, 2.5]) == "PPL 2.0 % lower, +- 0.6"
    assert report.gain([2.0, 3.01, 2.5], [1.97, 3.0, 2.48]) == "PPL 2.0 % higher, +- 0.6"
    # d = 0.03, -0.01, -0.02: mean 0, error 0.0265 / sqrt(3) = 0.0153
    assert report.gain([2.03, 3.0, 2.48], [2.0, 3.01, 2.5]) == "not resolved (gain 0.0 % +- 1.5)"
    assert report.gain([2.0, 3.0], [2.0, 3.0]) == "not resolved (gain 0.0 % +- 0.0)"
    # d = -0.05, -0.01, -0.01: mean -0.0233, error 0.0231 / sqrt(3) = 0.0133, 1.75 of them
    assert report.gain([1.95, 2.99, 2.49], [2.0, 3.0, 2.5]) == "not resolved (gain 2.3 % +- 1.3)"
    assert report.gain([1.9], [2.0]) == "PPL 9.5 % lower, of one window"


# --------------------------------------------------------------------------------------------------
# Figure 9


def lines_of(figure):
    """Return title -> label -> line, of each panel of a figure."""
    panels = {}
    for axis in figure.axes:
        panels[axis.get_title()] = {line.get_label(): line for line in axis.lines}
    return panels


def points(line):
    """Return the x and the y of a line's points."""
    return [list(map(float, numbers)) for numbers in line.get_data()]


def ends_of(bars):
    """Return the lower and the upper end of the first error bar."""
    return bars.get_segments()[0][:, 1].tolist()


GROUP = [
    (FULL_PRECISION, 5.0),
    (Row("token-static", 4, Rule()), 9.0),
    (Row("token-static", 4, Rule(first=5)), 8.0),
    (Row("token-static", 4, Rule(k=5)), 6.0),
    (Row("token-static", 2, Rule(first=5)), 80.0),
    (Row("token-static", 2, Rule(k=5)), 60.0),
]


def results_of_model(model):
    run = {"model": model, "data": "wikitext2", "ppl_fp": 5.0}
    return [result_of(row, ppl, **run) for row, ppl in GROUP]


def test_figure_9_has_a_panel_for_each_model_scheme_and_width():
    results = results_of_model("llama2-7b") + results_of_model("some/llama$2")
    for result in results:
        del result["nll"]  # files of earlier versions have none
    panels = lines_of(report.figure_9(results))
    assert list(panels) == [
        "llama2-7b on wikitext2\ntoken-static, 4 bits",
        "llama2-7b on wikitext2\ntoken-static, 2 bits",
        "llama\\$2 on wikitext2\ntoken-static, 4 bits",
        "llama\\$2 on wikitext2\ntoken-static, 2 bits",
    ]
    lines = panels["llama2-7b on wikitext2\ntoken-static, 4 bits"]
    assert points(lines["KVSink"]) == [[0, 5], [9, 6]]
    assert points(lines["PFN"]) == [[0, 5], [9, 8]]
    assert set(lines["full precision"].get_ydata()) == {5.0}


def test_figure_9_has_error_bars_and_a_point_for_auto():
    full, nothing, pfn, _, *_ = results_of_model("llama2-7b")
    auto = result_of(
        Row("token-static", 4, Rule(first=1, k=AUTO)),
        6.0,
        model="llama2-7b",
        data="wikitext2",
        ppl_fp=5.0,
        kept=[3, 5],
    )
    figure = report.figure_9([full, nothing, pfn, auto])
    (lines,) = lines_of(figure).values()
    assert points(lines["PFN-1+KVSink-auto"]) == [[4], [6]]
    # Each row's loss exceeds full precision's by the same in both windows: mean +- 0.
    (axis,) = figure.axes
    assert ends_of(axis.collections[0]) == pytest.approx([9, 9])
    assert ends_of(axis.collections[-1]) == pytest.approx([6, 6])
    # The two differences lie 0.2 apart: deviation 0.1414, error 0.1.
    auto["nll"][0] += 0.2
    (axis,) = report.figure_9([full, nothing, pfn, auto]).axes
    assert ends_of(axis.collections[-1]) == pytest.approx([6 * 0.9, 6 * 1.1])


def test_figure_9_needs_results_of_one_setting():
    full, nothing, *_ = results_of_model("llama2-7b")
    with pytest.raises(ValueError, match="no results to draw"):
        report.figure_9([full])
    for setting in ("rope", "compiled", "tokens", "device", "torch", "bos", "calib_data"):
        with pytest.raises(ValueError, match=f"differ in {setting}"):
            report.figure_9([{**nothing, setting: "post"}, {**nothing, setting: "pre"}])


def test_the_title_of_a_panel_is_short_and_has_no_escapes():
    full, nothing, *_ = results_of_model("m" * 4000)
    nothing["data"] = "\x1b[2J"
    (title,) = lines_of(report.figure_9([full, nothing]))
    assert title.startswith("m" * 60 + r" on \x1b[2J")
