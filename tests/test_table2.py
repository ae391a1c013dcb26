"""Table 2: the printed figures, the command's rows and files, streamed and on two ranks."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import eval_ppl
from kvsink import prefill
from llama import Llama, LlamaConfig
from paper import kvquant, table2
from support import results, stream, text
from support.results import FULL_PRECISION, Row
from support.tokenizer import Tokenizer
from tests.helpers import HERE, SITE, refuse, results_of


@pytest.fixture
def quick_codebooks(monkeypatch):
    """Where clusters need not be the best ones: one start, few iterations."""
    monkeypatch.setattr(
        kvquant,
        "weighted_kmeans",
        functools.partial(kvquant.weighted_kmeans, restarts=1, iterations=9),
    )


@pytest.fixture
def even_codebooks(monkeypatch):
    """Where it does not matter where the levels lie."""
    monkeypatch.setattr(
        kvquant,
        "weighted_kmeans",
        lambda x, w, k: torch.linspace(-1, 1, k).double().expand(len(x), k),
    )


@pytest.fixture
def our_cache(tmp_path, monkeypatch, sample_calibration):
    """An empty cache of ours."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_in(path):
    return [results.row_of(result) for result in results_of(path)]


# --------------------------------------------------------------------------------------------------
# Table 2 as printed

PRINTED = {  # by model; 16 bits, then of each rho KVQuant and + KVSink-5
    "llama2-7b": {
        "wikitext2": (5.12, (7.46, 6.52), (5.73, 5.60), (5.62, 5.54), (5.53, 5.44)),
        "c4": (6.63, (9.46, 7.93), (7.11, 7.10), (7.11, 6.95), (6.94, 6.81)),
    },
    "llama2-13b": {
        "wikitext2": (4.57, (16.26, 5.10), (5.00, 4.85), (4.86, 4.76), (4.80, 4.71)),
        "c4": (6.05, (26.29, 6.47), (6.39, 6.28), (6.24, 6.22), (6.23, 6.19)),
    },
    "llama3-8b": {
        "wikitext2": (5.75, (7.31, 6.77), (6.84, 6.56), (6.51, 6.34), (6.37, 6.22)),
        "c4": (7.37, (8.53, 7.74), (8.06, 7.87), (7.87, 7.81), (7.82, 7.78)),
    },
    "llama3.1-8b-instruct": {
        "wikitext2": (6.75, (9.75, 8.83), (8.80, 8.25), (7.91, 7.69), (7.58, 7.47)),
        "c4": (8.03, (10.43, 9.57), (9.25, 8.80), (8.71, 8.65), (8.53, 8.50)),
    },
}


DEFAULT_ROWS = [
    Row("kvquant", 2, keep, N, rho)
    for rho in (0, 0.001, 0.005, 0.01)
    for keep, N in (("pfn", 1), ("kvsink", 5), ("pfn+kvsink", "auto"))
]


def test_the_papers_table_2():
    """All 72 figures, typed a second time from the paper; and what its caption says of them."""
    cells = 0
    for model, texts in PRINTED.items():
        for data, (full, *pairs) in texts.items():
            assert table2.paper_ppl(FULL_PRECISION, model, data, 4096) == full
            for rho, pair in zip((0, 0.001, 0.005, 0.01), pairs, strict=True):
                for (keep, N), ppl in zip((("pfn", 1), ("kvsink", 5)), pair):
                    assert (
                        table2.paper_ppl(Row("kvquant", 2, keep, N, rho), model, data, 4096) == ppl
                    )
                    cells += 1
            # KVSink-5 is never worse, and PPL falls as more outliers are kept.
            assert all(full < with_kvsink <= kvq for kvq, with_kvsink in pairs)
            assert [pair[0] for pair in pairs] == sorted((pair[0] for pair in pairs), reverse=True)
    assert cells == 64 == sum(map(len, table2.TABLE_2.values())) * 4 - 8


def test_the_papers_figures_stand_beside_its_own_setting_only():
    row = Row("kvquant", 2, "kvsink", 5, 0.001)
    assert table2.paper_ppl(row, "llama2-7b", "wikitext2", 4096) == 5.60
    for other in (
        row._replace(bits=3),
        row._replace(N=6),
        row._replace(rho=0.2),
        row._replace(scheme="token-static"),
    ):
        assert table2.paper_ppl(other, "llama2-7b", "wikitext2", 4096) is None
    for setting in (
        ("llama2-7b", "wikitext2", 2048),
        ("llama2-7b", "wikitext2", 4096, True),
        ("llama2-7b", "x", 4096),
        ("mistral-7b", "c4", 4096),
    ):
        assert table2.paper_ppl(row, *setting) is None


def test_the_papers_figures_in_the_table(capsys):
    (what, _), kvq, *_ = table2.parse(["--model", "llama2-7b"])
    measured = [{"scheme": row.scheme, "bits": row.bits, "keep": row.keep, "sinks": row.N, "outliers": row.rho,
                 "ppl": 8.0, "ppl_fp": 5.0, "avg_bits": 2.02, "kept": [5]} for row in what.rows]  # fmt: skip
    list(results.print_rows(measured, table2.columns(what, kvq)))
    header, full, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.endswith("avg. bits   Table 2 (paper)") and full.split()[-1] == "5.12"
    assert first.split()[-2:] == ["2.020", "7.46"] and second.split()[-1] == "6.52"


def test_what_the_command_runs():
    """Of a model of the paper's both texts at 4,096 tokens, 16 calibration windows of WikiText-2 of
    2,048."""
    rows = (FULL_PRECISION, *DEFAULT_ROWS)
    whats, kvq, machine, streamed, place, json = table2.parse(["--model", "llama2-7b"])
    assert [(what.data, what.seq_len, what.limit, what.calib_windows) for what in whats] == [
        ("wikitext2", 4096, None, 16), ("c4", 4096, None, 16)]  # fmt: skip
    assert all(what.rows == rows for what in whats) and (kvq.q_norm, kvq.calibration, json) == (
        False,
        None,
        None,
    )
    for what in whats:
        recipes, _, made_with = table2.calibration_of(what, SITE, machine, "abc")
        assert made_with == kvquant.MadeWith("abc", "wikitext2", 16, 2048, 0, machine.dtype)
        assert recipes == [kvquant.Recipe(row.keep, row.N, row.rho) for row in rows[1:]]
    (what,), *_ = table2.parse([])
    assert (what.model, what.data, what.seq_len, what.limit) == (
        "smollm2-135m",
        "wiki-sample",
        1024,
        8,
    )
    assert (
        table2.calibration_of(what, SITE, machine, "abc")[2].text == "wiki-sample"
        and what.rows == rows
    )
    (what,), *_ = table2.parse(
        "--keep none pfn kvsink --sinks 0 2 --bits 4 3 --outliers 0.1".split()
    )
    rules = [("none", 0), ("pfn", 2), ("kvsink", 2)]
    assert what.rows[1:] == tuple(
        Row("kvquant", bits, *rule, 0.1) for bits in (4, 3) for rule in rules
    )
    (what,), *_ = table2.parse("--keep none kvsink --outliers 0".split())
    assert what.rows[1:] == (Row("kvquant", 2, "none", 0, 0.0), Row("kvquant", 2, "kvsink", 5, 0.0))


# --------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("calibration", [None, "mine.safetensors"])
def test_rows_of_the_command(
    tiny, tmp_path, capsys, our_cache, even_codebooks, monkeypatch, calibration
):
    """Rows are printed and written; a calibration is made once, also for other widths and
    levels."""
    out = tmp_path / "out.json"
    file = ["--calibration", str(tmp_path / calibration)] if calibration else []
    command = [*tiny, "--limit", "2", "--calib-windows", "3", "--json", str(out), *file]
    assert table2.main(command) == 0
    first, printed = results_of(out), capsys.readouterr().out
    rows = rows_in(out)
    assert rows == [FULL_PRECISION, *DEFAULT_ROWS]
    assert all(
        r["rope"] == "pre" and r["calib_windows"] == 3 and r["q_norm"] is False for r in first[1:]
    )
    assert (
        "kvquant 0.5 %" in printed
        and "avg. bits" in printed
        and "(paper)" not in printed
        and "not one of the paper's rules" in printed
    )
    config = LlamaConfig.from_pretrained(tiny[1])
    for row, result in zip(rows[1:], first[1:]):
        stored = kvquant.kvquant_bits(row, config)
        assert result["avg_bits"] == results.average_bits(
            row, config, 64, stored, 2, np.mean(result["kept"])
        )
    assert first[0]["avg_bits"] == 16
    made = list(our_cache.glob("kvquant/*.safetensors")) + list(tmp_path.glob("mine.safetensors"))
    assert len(made) == 1

    monkeypatch.setattr(kvquant, "calibrate", None)  # what was calibrated is taken up
    out.unlink()
    assert table2.main([*command, "--bits", "2"]) == 0
    assert [r["ppl"] for r in results_of(out)] == [r["ppl"] for r in first]
    assert (
        table2.main([*command, "--q-norm"]) == 0
    )  # of the same calibration; full precision is not run again
    assert len(results_of(out)) == 25 and results_of(out)[13]["ppl"] != first[1]["ppl"]
    monkeypatch.setattr(eval_ppl, "measured", None)  # nothing is run again
    assert table2.main(command) == 0


def test_a_named_calibration_that_does_not_fit_is_refused(
    tiny, tmp_path, capsys, our_cache, even_codebooks, monkeypatch
):
    mine = tmp_path / "mine.safetensors"
    command = [*tiny, "--limit", "1", "--calib-windows", "2", "--calibration", str(mine)]
    assert table2.main([*command, "--outliers", "0.01", "0"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:  # before anything is run
        patch.setattr(eval_ppl, "measured", None)
        for change, words in (
            (["--outliers", "0", "--seed", "5"], ["seed 0, not 5", "delete it"]),
            (["--outliers", "0.2"], ["it has no pfn-1-0.2"]),
            (["--outliers", "0", "--channel", "6"], ["site [2, 5], not [2, 6]"]),
        ):
            refuse([*command, *change], ["mine.safetensors", *words], capsys, table2)
    assert (
        table2.main([*command, *"--bits 3 --keep pfn --outliers 0.01".split()]) == 0
    )  # a part of what it holds
    capsys.readouterr()
    for content in (b"{}", mine.read_bytes()[:-1] + b"\xff"):
        mine.write_bytes(content)
        refuse([*command, "--outliers", "0"], ["mine.safetensors"], capsys, table2)
        assert mine.read_bytes() == content


def test_a_damaged_calibration_of_our_cache_is_made_again(
    tiny, tmp_path, capsys, our_cache, even_codebooks
):
    """One flipped bit in its numbers: said in one line, and the same PPL."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    command = [*tiny, *"--limit 1 --calib-windows 2 --outliers 0.01 --keep kvsink --json".split()]
    assert table2.main([*command, str(first)]) == 0
    (file,) = our_cache.glob("kvquant/*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes([content[-100] ^ 64]) + content[-99:])
    capsys.readouterr()
    assert table2.main([*command, str(second)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 2
        and file.name in said[0]
        and "made again" in said[0]
        and "calibrating" in said[1]
    )
    assert [r["ppl"] for r in results_of(first)] == [
        r["ppl"] for r in results_of(second)
    ] and file.read_bytes() == content


def test_one_file_of_results_for_this_command_and_eval_ppl(
    tiny, tmp_path, our_cache, even_codebooks
):
    """Full precision is the same row in both, and neither runs or loses the other's."""
    out = tmp_path / "out.json"
    rtn = [*tiny, *"--scheme token-dynamic --keep none --bits 2 --limit 1 --json".split(), str(out)]
    assert eval_ppl.main(rtn) == 0
    command = [
        *tiny,
        *"--outliers 0.01 --keep kvsink --calib-windows 2 --limit 1 --json".split(),
        str(out),
    ]
    assert table2.main(command) == 0
    assert rows_in(out) == [
        FULL_PRECISION, Row("token-dynamic", 2, "none", 0), Row("kvquant", 2, "kvsink", 5, 0.01)]  # fmt: skip
    before = out.read_bytes()
    assert eval_ppl.main(rtn) == 0 and table2.main(command) == 0 and out.read_bytes() == before
    keys = set(
        "model data seq_len windows scheme bits group_size keep sinks dtype rope seed calib_windows l_E c".split()
    )
    keys |= set("compiled weights tokens outliers q_norm ppl ppl_fp avg_bits seconds".split())
    assert keys <= results_of(out)[2].keys()


def test_a_row_is_algorithm_1_with_its_own_calibration(tiny, tmp_path, our_cache, quick_codebooks):
    out = tmp_path / "out.json"
    options = "--bits 3 --outliers 0.1 --keep kvsink --sinks 2 --calib-windows 2 --limit 2".split()
    assert table2.main([*tiny, *options, "--json", str(out)]) == 0
    model, tokenizer = Llama.from_pretrained(tiny[1]), Tokenizer.from_pretrained(tiny[1])
    train = text.windows(tokenizer, "wiki-sample", "train", 64, 2, 0)
    recipe = kvquant.Recipe("kvsink", 2, 0.1)
    calibrations = kvquant.calibrate(model, train, [recipe], SITE, quiet=True)
    quantizers, loss = kvquant.kvquant_cache(calibrations[recipe], 0.1, 3), 0.0
    for window in text.windows(tokenizer, tiny[3], "test", 64, 2, 0):
        H, _ = prefill(model, model.embedding(window[None]), quantizers, *SITE, k=2, pre_rope=True)
        loss += F.cross_entropy(model.logits(H)[0, :-1], window[1:]).item() / 2
    assert results_of(out)[1]["ppl"] == pytest.approx(np.exp(loss), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Streamed, and on several ranks


def test_streaming_changes_no_digit(tiny, tmp_path, capsys, our_cache, even_codebooks, monkeypatch):
    """PPL and calibration, made anew by both; and what the run says of it before it begins."""
    command = [
        *tiny,
        *"--bits 4 2 --outliers 0.1 --keep none pfn kvsink --sinks 2 --limit 3 --calib-windows 2".split(),
    ]
    files, passes, reads, walk = {}, [], [], stream.BlocksOnDisk.walk
    monkeypatch.setattr(stream, "announce", lambda model, tokens, windows: passes.append(windows))
    monkeypatch.setattr(
        stream.BlocksOnDisk, "walk", lambda self, order: reads.append([*order]) or walk(self, order)
    )
    for name, how in (("whole", []), ("streamed", ["--stream"])):
        monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / name))
        assert table2.main([*command, *how, "--json", str(tmp_path / f"{name}.json")]) == 0
        files[name] = load_file(next((tmp_path / name / "kvquant").glob("*.safetensors")))
        size = f"{(6 + 2) * 2 * 64 * 32 * 4 / 2**20:.1f} MiB of hidden states in host memory"
        assert f"2 windows of 64 tokens: {size}" in capsys.readouterr().err
    a, b = (
        [{**result, "seconds": 0} for result in results_of(tmp_path / f"{name}.json")]
        for name in files
    )
    assert a == b and len(a) == 7
    assert all(torch.equal(X, files["streamed"][name]) for name, X in files["whole"].items())
    assert passes == [[3] * 7 + [2, 2, 2, 6]]  # 7 rows; three rules forwards, once backwards
    forwards = [0, 1, 2, 3, 4, 5]
    assert reads == [forwards] * 3 + [forwards[::-1]] + [forwards] * 7
    assert table2.main([*command, "--stream"]) == 0 and passes[1] == [3] * 7  # calibrated before


def test_a_run_that_was_stopped_goes_on_after_its_last_row(
    tiny, tmp_path, our_cache, even_codebooks, monkeypatch
):
    command = [
        *tiny,
        *"--outliers 0 0.1 --sinks 2 --limit 2 --calib-windows 2 --stream --json".split(),
    ]
    whole, out, real = tmp_path / "whole.json", tmp_path / "out.json", eval_ppl.measured
    assert table2.main([*command, str(whole)]) == 0
    runs = []

    def measured(*arguments):
        runs.append(arguments)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(eval_ppl, "measured", measured)
    assert table2.main([*command, str(out)]) == 130 and len(results_of(out)) == 3
    assert table2.main([*command, str(out)]) == 0 and len(runs) == 4 + 4
    assert [r["ppl"] for r in results_of(out)] == [r["ppl"] for r in results_of(whole)]


DRIVER = """
import sys
from support import cli, hub
real = hub.documents
hub.documents = lambda *a: ["A calibration text of bytes. " * 10] * 20 if a[1:] == ("train",) else real(*a)
from paper import table2
cli.exit_process(table2.main(sys.argv[1:]))
"""


def test_two_ranks_give_the_perplexity_of_one_and_calibrate_once(tiny, tmp_path, our_cache):
    """torchrun with gloo: the windows are shared out, one rank calibrates and the other waits for
    its file."""
    one, two, driver = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "driver.py"
    driver.write_text(DRIVER)
    command = [
        *tiny,
        *"--outliers 0.1 --keep kvsink --sinks 2 --limit 5 --calib-windows 2 --json".split(),
    ]
    assert table2.main([*command, str(one)]) == 0
    ranks = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(driver),
    ]
    environment = os.environ | {"PYTHONPATH": str(HERE), "KVSINK_CACHE": str(tmp_path / "two")}
    done = subprocess.run(
        [*ranks, *command, str(two)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr.count("calibrating KVQuant") == 1, done.stderr
    for a, b in zip(results_of(one), results_of(two), strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-12) and a["scheme"] == b["scheme"]


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("change, words", [
    (["--bits", "8"], ["--bits", "from 2 to 4"]),
    (["--outliers", "0.7"], ["--outliers", "0.7", "0 to 0.5"]),
    (["--outliers", "few"], ["few"]),
    (["--outliers", "nan"], ["nan"]),
    (["--keep", "pfn", "--sinks", "63"], ["--sinks", "windows of 64"]),
    (["--keep", "pfn", "--sinks", "65"], ["--sinks", "window of 64"]),
    (["--json", "x.json", "--calibration", "x.json"], ["same file"]),
    (["--calibration", "/nowhere/file"], ["/nowhere"]),
    (["--json", "/nowhere/file"], ["/nowhere"]),
    (["--channel", "32"], ["channels 0 to 31"]),
    (["--data", "README.md", "/nowhere/text.txt"], ["/nowhere/text.txt"]),
    (["--table", "2"], ["--table"]),
])  # fmt: skip
def test_bad_arguments(change, words, tiny, capsys):
    refuse([*tiny, *change], words, capsys, table2)


def test_more_calibration_than_there_is(tiny, capsys, our_cache):
    refuse([*tiny, "--calib-windows", "1000"], ["--calib-windows 1000", "only"], capsys, table2)


def test_a_folder_where_nothing_can_be_written(tiny, capsys, our_cache, monkeypatch):
    """Refused before minutes of calibration."""
    monkeypatch.setattr(
        kvquant.cli, "check_folder", lambda *_: (_ for _ in ()).throw(ValueError("cannot write"))
    )
    monkeypatch.setattr(kvquant, "calibrate", None)
    refuse(tiny, ["cannot write"], capsys, table2)


# --------------------------------------------------------------------------------------------------
# The default model


def test_kvquant_on_the_default_model(default_model, tmp_path, quick_codebooks):
    """At 2 bits far below the RTN scheme with static ranges by channel, and lower with outliers."""
    out, file = tmp_path / "out.json", tmp_path / "calibration.safetensors"
    common = "--keep kvsink --sinks 5 --limit 1 --seq-len 512 --calib-windows 2 --no-compile --bits 2".split()
    common += ["--json", str(out)]
    assert eval_ppl.main([*common, "--scheme", "channel-static"]) == 0
    assert table2.main([*common, "--outliers", "0", "0.01", "--calibration", str(file)]) == 0
    ppl = {(r["scheme"], r["bits"], r.get("outliers")): r["ppl"] for r in results_of(out)}
    assert ppl["kvquant", 2, 0.01] < ppl["kvquant", 2, 0.0] < ppl["channel-static", 2, None] / 5, (
        ppl
    )
