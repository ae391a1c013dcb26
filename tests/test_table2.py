"""Table 2: the printed numbers, the command's rows and files, streamed and on two ranks."""

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
from kvsink import AUTO, Rule, decoder_block_pre_rope, prefill
from llama import Llama, LlamaConfig
from paper import kvquant, table2
from support import evaluate, report, stream, text
from support.rows import FULL_PRECISION, Row, average_bits, options_of, row_of
from support.tokenizer import Tokenizer
from tests.helpers import HERE, SITE, refuse, results_of


@pytest.fixture
def quick_codebooks(monkeypatch):
    """One start and few iterations: these clusters need not be the best ones."""
    quick = functools.partial(kvquant.weighted_kmeans, restarts=1, iterations=9)
    monkeypatch.setattr(kvquant, "weighted_kmeans", quick)


@pytest.fixture
def even_codebooks(monkeypatch):
    """Evenly spaced levels, for tests in which it does not matter where they lie."""
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
    return [row_of(result) for result in results_of(path)]


def configs_of(options):
    """Return the configs of the command with these options, a string."""
    return table2.kvquant_configs(table2.parse_arguments(options.split()))


# --------------------------------------------------------------------------------------------------
# Table 2 as printed

PRINTED = {  # by model; 16 bits, then for each rho KVQuant and + KVSink-5
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
PRINTED_RULES = (Rule(first=1), Rule(k=5))

DEFAULT_ROWS = [
    Row("kvquant", 2, rule, rho)
    for rho in (0, 0.001, 0.005, 0.01)
    for rule in (*PRINTED_RULES, Rule(first=1, k=AUTO))
]


def paper_ppl(row, model, data, seq_len, q_norm=False):
    config = table2.KVQuantConfig(model=model, data=data, seq_len=seq_len, q_norm=q_norm)
    return table2.paper_ppl(config, row)


def test_the_papers_table_2():
    """All 72 numbers, typed a second time from the paper; and what its caption says of them."""
    cells = 0
    for model, texts in PRINTED.items():
        for data, (full, *pairs) in texts.items():
            assert paper_ppl(FULL_PRECISION, model, data, 4096) == full
            for rho, pair in zip((0, 0.001, 0.005, 0.01), pairs, strict=True):
                for rule, ppl in zip(PRINTED_RULES, pair):
                    assert paper_ppl(Row("kvquant", 2, rule, rho), model, data, 4096) == ppl
                    cells += 1
            # KVSink-5 is never worse, and PPL falls as more outliers are kept.
            assert all(full < with_kvsink <= kvq for kvq, with_kvsink in pairs)
            assert [pair[0] for pair in pairs] == sorted((pair[0] for pair in pairs), reverse=True)
    assert cells == 64 == sum(map(len, table2.TABLE_2.values())) * 4 - 8


def test_the_papers_numbers_stand_beside_its_own_setting_only():
    row = Row("kvquant", 2, Rule(k=5), 0.001)
    assert paper_ppl(row, "llama2-7b", "wikitext2", 4096) == 5.60
    for change in ({"bits": 3}, {"rule": Rule(k=6)}, {"rho": 0.2}, {"scheme": "token-static"}):
        assert paper_ppl(row._replace(**change), "llama2-7b", "wikitext2", 4096) is None
    for setting in (
        ("llama2-7b", "wikitext2", 2048),
        ("llama2-7b", "wikitext2", 4096, True),
        ("llama2-7b", "x", 4096),
        ("mistral-7b", "c4", 4096),
    ):
        assert paper_ppl(row, *setting) is None


def test_the_papers_numbers_in_the_table(capsys):
    config, _ = configs_of("--model llama2-7b")
    measured = {"ppl": 8.0, "ppl_fp": 5.0, "avg_bits": 2.02, "kept": [5]}
    results = []
    for row in config.rows:
        keep, N = options_of(row.rule)
        settings = {"scheme": row.scheme, "bits": row.bits, "keep": keep, "sinks": N}
        results.append({**settings, "outliers": row.rho, **measured})
    list(report.print_rows(results, table2.columns(config)))
    header, full, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.endswith("avg. bits   Table 2 (paper)") and full.split()[-1] == "5.12"
    assert first.split()[-2:] == ["2.020", "7.46"] and second.split()[-1] == "6.52"


# --------------------------------------------------------------------------------------------------
# Options


def calibration_config(config):
    """Return the CalibrationConfig of a run whose checkpoint is known as "abc"."""
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    run = evaluate.Run(config, None, None, tokens, 128, SITE, "abc", None)
    return table2.calibration_config(run)


def test_a_model_of_the_paper_runs_both_texts():
    """Windows have 4,096 tokens; both are calibrated on 16 windows of WikiText-2 of 2,048."""
    rows = (FULL_PRECISION, *DEFAULT_ROWS)
    args = table2.parse_arguments(["--model", "llama2-7b"])
    configs = table2.kvquant_configs(args)
    assert [(c.data, c.seq_len, c.limit, c.calib_windows) for c in configs] == [
        ("wikitext2", 4096, None, 16),
        ("c4", 4096, None, 16),
    ]
    assert args.json is None
    for config in configs:
        assert config.rows == rows
        assert config.q_norm is False and config.calibration is None
        assert calibration_config(config) == kvquant.CalibrationConfig(
            recipes=[kvquant.Recipe(row.rule, row.rho) for row in rows[1:]],
            site=SITE,
            weights="abc",
            data="wikitext2",
            windows=16,
            tokens=2048,
            seed=0,
            dtype=config.machine.dtype,
        )


def test_the_default_model_runs_wiki_sample():
    (config,) = configs_of("")
    setting = (config.model, config.data, config.seq_len, config.limit)
    assert setting == ("smollm2-135m", "wiki-sample", 1024, 8)
    assert calibration_config(config).data == "wiki-sample"
    assert config.rows == (FULL_PRECISION, *DEFAULT_ROWS)


def test_rows_of_the_options():
    (config,) = configs_of("--keep none pfn kvsink --sinks 0 2 --bits 4 3 --outliers 0.1")
    rules = (Rule(), Rule(first=2), Rule(k=2))
    assert config.rows[1:] == tuple(
        Row("kvquant", bits, rule, 0.1) for bits in (4, 3) for rule in rules
    )
    (config,) = configs_of("--keep none kvsink --outliers 0")
    rows = (Row("kvquant", 2, Rule(), 0.0), Row("kvquant", 2, Rule(k=5), 0.0))
    assert config.rows[1:] == rows
    (config,) = configs_of("--keep none kvsink none --outliers 0 0 --bits 2 2")
    assert config.rows[1:] == rows  # none of them twice


# --------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("calibration", [None, "named.safetensors"])
def test_rows_of_the_command(
    tiny, tmp_path, capsys, our_cache, even_codebooks, monkeypatch, calibration
):
    """Rows are printed and written; a calibration is made once, also for other widths and
    levels."""
    out = tmp_path / "out.json"
    file = ["--calibration", str(tmp_path / calibration)] if calibration else []
    command = [*tiny, "--limit", "2", "--calib-windows", "3", "--json", str(out), *file]
    assert table2.main(command) == 0
    first = results_of(out)
    printed = capsys.readouterr().out
    rows = rows_in(out)
    assert rows == [FULL_PRECISION, *DEFAULT_ROWS]
    for result in first[1:]:
        assert result["rope"] == "pre" and result["calib_windows"] == 3
        assert result["q_norm"] is False
    assert "kvquant 0.5 %" in printed and "avg. bits" in printed and "(paper)" not in printed
    assert "not one of the paper's rules" in printed
    config = LlamaConfig.from_pretrained(tiny[1])
    for row, result in zip(rows[1:], first[1:]):
        storage = kvquant.kvquant_bits(row, config)
        kept = np.mean(result["kept"])
        assert result["avg_bits"] == average_bits(row, config, 64, storage, 2, kept)
    assert first[0]["avg_bits"] == 16
    made = [*our_cache.glob("kvquant/*.safetensors"), *tmp_path.glob("named.safetensors")]
    assert len(made) == 1

    monkeypatch.setattr(kvquant, "calibrate", None)  # the calibration is read
    out.unlink()
    assert table2.main([*command, "--bits", "2"]) == 0
    assert [r["ppl"] for r in results_of(out)] == [r["ppl"] for r in first]
    # Q-Norm has the same calibration, and full precision is not run again.
    assert table2.main([*command, "--q-norm"]) == 0
    assert len(results_of(out)) == 25 and results_of(out)[13]["ppl"] != first[1]["ppl"]
    monkeypatch.setattr(evaluate, "measure_row", None)  # nothing is run again
    assert table2.main(command) == 0


def test_a_named_calibration_that_does_not_fit_is_refused(
    tiny, tmp_path, capsys, our_cache, even_codebooks, monkeypatch
):
    named = tmp_path / "named.safetensors"
    command = [*tiny, "--limit", "1", "--calib-windows", "2", "--calibration", str(named)]
    assert table2.main([*command, "--outliers", "0.01", "0"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:  # before anything is run
        patch.setattr(evaluate, "measure_row", None)
        for change, words in (
            (["--outliers", "0", "--seed", "5"], ["seed 0, not 5", "delete it"]),
            (["--outliers", "0.2"], ["it has no pfn-1-0.2"]),
            (["--outliers", "0", "--channel", "6"], ["site [2, 5], not [2, 6]"]),
        ):
            refuse([*command, *change], ["named.safetensors", *words], capsys, table2)
    # A part of what it holds is enough.
    assert table2.main([*command, *"--bits 3 --keep pfn --outliers 0.01".split()]) == 0
    capsys.readouterr()
    for content in (b"{}", named.read_bytes()[:-1] + b"\xff"):
        named.write_bytes(content)
        refuse([*command, "--outliers", "0"], ["named.safetensors"], capsys, table2)
        assert named.read_bytes() == content


def test_a_damaged_calibration_of_our_cache_is_made_again(
    tiny, tmp_path, capsys, our_cache, even_codebooks
):
    """One flipped bit in its numbers: one line says so, and the PPL is the same."""
    first = tmp_path / "first.json"
    second = tmp_path / "second.json"
    command = [*tiny, *"--limit 1 --calib-windows 2 --outliers 0.01 --keep kvsink --json".split()]
    assert table2.main([*command, str(first)]) == 0
    (file,) = our_cache.glob("kvquant/*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes([content[-100] ^ 64]) + content[-99:])
    capsys.readouterr()
    assert table2.main([*command, str(second)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and file.name in lines[0]
    assert "recreating it" in lines[0] and "calibrating" in lines[1]
    assert [r["ppl"] for r in results_of(first)] == [r["ppl"] for r in results_of(second)]
    assert file.read_bytes() == content


def test_one_file_of_results_for_this_command_and_eval_ppl(
    tiny, tmp_path, our_cache, even_codebooks
):
    """Full precision is the same row in both, and neither runs or loses the other's."""
    out = tmp_path / "out.json"
    rtn = [*tiny, *"--scheme token-dynamic --keep none --bits 2 --limit 1 --json".split(), str(out)]
    assert eval_ppl.main(rtn) == 0
    options = "--outliers 0.01 --keep kvsink --calib-windows 2 --limit 1 --json".split()
    command = [*tiny, *options, str(out)]
    assert table2.main(command) == 0
    assert rows_in(out) == [
        FULL_PRECISION,
        Row("token-dynamic", 2, Rule()),
        Row("kvquant", 2, Rule(k=5), 0.01),
    ]
    before = out.read_bytes()
    assert eval_ppl.main(rtn) == 0 and table2.main(command) == 0 and out.read_bytes() == before
    keys = "model data seq_len windows scheme bits group_size keep sinks dtype rope seed"
    keys += " calib_windows l_E c compiled weights tokens outliers q_norm"
    keys += " ppl ppl_fp avg_bits seconds"
    assert set(keys.split()) <= results_of(out)[2].keys()


def test_a_row_is_algorithm_1_with_its_own_calibration(tiny, tmp_path, our_cache, quick_codebooks):
    out = tmp_path / "out.json"
    options = "--bits 3 --outliers 0.1 --keep kvsink --sinks 2 --calib-windows 2 --limit 2".split()
    assert table2.main([*tiny, *options, "--json", str(out)]) == 0
    model = Llama.from_pretrained(tiny[1])
    tokenizer = Tokenizer.from_pretrained(tiny[1])
    train = text.windows(tokenizer, "wiki-sample", "train", 64, 2, 0)
    recipe = kvquant.Recipe(Rule(k=2), 0.1)
    calibrations = kvquant.calibrate(model, train, [recipe], SITE)
    quantizers = kvquant.kvquant_quantizers(calibrations[recipe], 0.1, 3)
    loss = 0.0
    for window in text.windows(tokenizer, tiny[3], "test", 64, 2, 0):
        H = model.embedding(window[None])
        H, _ = prefill(model, H, quantizers, *SITE, k=2, step=decoder_block_pre_rope)
        loss += F.cross_entropy(model.logits(H)[0, :-1], window[1:]).item() / 2
    assert results_of(out)[1]["ppl"] == pytest.approx(np.exp(loss), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Streamed, and on several ranks


def test_streaming_changes_no_digit(tiny, tmp_path, capsys, our_cache, even_codebooks, monkeypatch):
    """PPL and calibration, made anew by both; and what the run announces before it begins."""
    options = "--bits 4 2 --outliers 0.1 --keep none pfn kvsink --sinks 2 --limit 3"
    command = [*tiny, *options.split(), "--calib-windows", "2"]
    files = {}  # name of the run -> the tensors of its calibration
    passes = []
    orders = []  # in which blocks are read
    walk = stream.BlocksOnDisk.walk

    def recording_walk(self, order):
        orders.append([*order])
        return walk(self, order)

    monkeypatch.setattr(stream, "announce", lambda model, tokens, windows: passes.append(windows))
    monkeypatch.setattr(stream.BlocksOnDisk, "walk", recording_walk)
    for name, option in (("whole", []), ("streamed", ["--stream"])):
        monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / name))
        assert table2.main([*command, *option, "--json", str(tmp_path / f"{name}.json")]) == 0
        files[name] = load_file(next((tmp_path / name / "kvquant").glob("*.safetensors")))
        size = f"{(6 + 2) * 2 * 64 * 32 * 4 / 2**20:.1f} MiB of hidden states in host memory"
        assert f"2 windows of 64 tokens: {size}" in capsys.readouterr().err
    whole, streamed = (
        [{**result, "seconds": 0} for result in results_of(tmp_path / f"{name}.json")]
        for name in files
    )
    assert whole == streamed and len(whole) == 7
    assert all(torch.equal(X, files["streamed"][name]) for name, X in files["whole"].items())
    assert passes == [[3] * 7 + [2, 2, 2, 6]]  # 7 rows; three rules forwards, once backwards
    forwards = [0, 1, 2, 3, 4, 5]
    assert orders == [forwards] * 3 + [forwards[::-1]] + [forwards] * 7
    assert table2.main([*command, "--stream"]) == 0
    assert passes[1] == [3] * 7  # it was calibrated before


def test_a_run_that_was_stopped_goes_on_after_its_last_row(
    tiny, tmp_path, our_cache, even_codebooks, monkeypatch
):
    options = "--outliers 0 0.1 --sinks 2 --limit 2 --calib-windows 2 --stream --json"
    command = [*tiny, *options.split()]
    whole = tmp_path / "whole.json"
    out = tmp_path / "out.json"
    assert table2.main([*command, str(whole)]) == 0
    calls = []
    measure_row = evaluate.measure_row

    def interrupted_measure_row(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure_row(*arguments)

    monkeypatch.setattr(evaluate, "measure_row", interrupted_measure_row)
    assert table2.main([*command, str(out)]) == 130 and len(results_of(out)) == 3
    assert table2.main([*command, str(out)]) == 0 and len(calls) == 4 + 4
    assert [r["ppl"] for r in results_of(out)] == [r["ppl"] for r in results_of(whole)]


DRIVER = """
import sys
from support import cli, hub

documents = hub.documents


def calibration_text(*arguments):
    if arguments[1:] == ("train",):
        return ["A calibration text of bytes. " * 10] * 20
    return documents(*arguments)


hub.documents = calibration_text
from paper import table2

cli.exit_process(table2.main(sys.argv[1:]))
"""


def test_two_ranks_give_the_perplexity_of_one_and_calibrate_once(tiny, tmp_path, our_cache):
    """torchrun with gloo: the windows are shared out, one rank calibrates and the other waits for
    its file."""
    one = tmp_path / "one.json"
    two = tmp_path / "two.json"
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    options = "--outliers 0.1 --keep kvsink --sinks 2 --limit 5 --calib-windows 2 --json"
    command = [*tiny, *options.split()]
    assert table2.main([*command, str(one)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(driver), *command, str(two)],
        env=os.environ | {"PYTHONPATH": str(HERE), "KVSINK_CACHE": str(tmp_path / "two")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("calibrating KVQuant") == 1, process.stderr
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


def test_a_folder_in_which_nothing_can_be_written(tiny, capsys, our_cache, monkeypatch):
    """Refused before minutes of calibration."""

    def cannot_write(option, folder):
        raise ValueError("cannot write")

    monkeypatch.setattr(kvquant.cli, "check_folder", cannot_write)
    monkeypatch.setattr(kvquant, "calibrate", None)
    refuse(tiny, ["cannot write"], capsys, table2)


# --------------------------------------------------------------------------------------------------
# The default model


def test_kvquant_on_the_default_model(default_model, tmp_path, quick_codebooks):
    """Its PPL at 2 bits is far below that of the static RTN scheme by channel, and lower still with
    outliers."""
    out = tmp_path / "out.json"
    file = tmp_path / "calibration.safetensors"
    options = "--keep kvsink --sinks 5 --limit 1 --seq-len 512 --calib-windows 2 --no-compile"
    common = [*options.split(), "--bits", "2", "--json", str(out)]
    assert eval_ppl.main([*common, "--scheme", "channel-static"]) == 0
    assert table2.main([*common, "--outliers", "0", "0.01", "--calibration", str(file)]) == 0
    ppl = {(r["scheme"], r["bits"], r.get("outliers")): r["ppl"] for r in results_of(out)}
    with_outliers = ppl["kvquant", 2, 0.01]
    without = ppl["kvquant", 2, 0.0]
    assert with_outliers < without < ppl["channel-static", 2, None] / 5, ppl
