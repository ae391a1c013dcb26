"""The JSON file of results: several writers, interrupted runs, files of others."""

import functools
import json
import math
import os
import signal
import subprocess
import threading
import time

import pytest

import eval_ppl
from paper import figures
from support import results
from tests.helpers import EVAL_PPL, HERE, RESULT, refuse, results_of

# --------------------------------------------------------------------------------------------------
# Several writers


def test_two_runs_may_write_to_one_file(tiny, tmp_path):
    """A row that another run has written meanwhile stays; a link stays a link."""
    out = tmp_path / "out.json"
    link = tmp_path / "link.json"
    link.symlink_to(out)
    options = f"--scheme token-dynamic --keep none --bits 4 --limit 1 --json {link}".split()
    assert eval_ppl.main([*tiny, *options]) == 0
    ours = results_of(out)
    another = {**ours[1], "bits": 5}
    results.add_result(link, another)
    results.add_result(link, ours[1])  # which is there already
    assert results_of(out) == [*ours, another]
    assert link.is_symlink()


def test_no_row_is_lost_if_several_write_at_once(tmp_path):
    out = tmp_path / "out.json"

    def write(writer):
        for i in range(12):
            results.add_result(out, {**RESULT, "nll": [0.0], "bits": 100 * writer + i})

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    expected = [100 * writer + i for writer in range(4) for i in range(12)]
    assert sorted(result["bits"] for result in results_of(out)) == expected


# --------------------------------------------------------------------------------------------------
# Interrupted runs


def test_interrupting_keeps_the_rows_done(tiny, tmp_path):
    out = tmp_path / "out.json"
    # Minutes of rows: eight widths, and 0 to 29 tokens for each of two rules.
    numbers = " ".join(map(str, range(30)))
    rows = f"--scheme token-dynamic --bits 1 2 3 4 5 6 7 8 --sinks {numbers} --json {out}".split()
    # A job in the background of a shell ignores interrupts, and so would its children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*EVAL_PPL, *tiny, *rows], cwd=HERE, preexec_fn=heed, **pipes)
    while process.poll() is None and (not out.exists() or len(results_of(out)) < 2):
        time.sleep(0.01)
    for _ in range(5):  # Python drops an interrupt that falls into a destructor: press again
        process.send_signal(signal.SIGINT)
        try:
            printed, errors = process.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            pass
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "full precision" in printed
    assert 2 <= len(results_of(out)) < 1 + 8 * 59
    assert set(os.listdir(tmp_path)) == {"out.json", ".out.json.lock"}  # no temporary file is left


def test_a_full_disk_keeps_the_rows_that_were_written(tiny, capsys, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    replace = os.replace
    has_room = iter([True, True, False])  # for the third row there is none

    def replace_if_room(*names):
        if not next(has_room):
            raise OSError(28, "No space left on device")
        replace(*names)

    monkeypatch.setattr(os, "replace", replace_if_room)
    options = f"--scheme token-dynamic --sinks 2 --limit 1 --json {out}".split()
    refuse([*tiny, *options], ["No space left"], capsys, eval_ppl)
    assert len(results_of(out)) == 2
    assert set(os.listdir(tmp_path)) == {"out.json", ".out.json.lock"}


# --------------------------------------------------------------------------------------------------
# Files that hold something else


@pytest.mark.parametrize("content", [
    "",
    "not json",
    "{}",
    "[1, 2]",
    '[{"a": 1}]',
    '[{"model": "m", "scheme": "full", "ppl": null}]',
])  # fmt: skip
def test_a_json_file_that_is_not_ours_is_left_as_it_is(content, tiny, capsys, tmp_path):
    out = tmp_path / "precious.json"
    out.write_text(content)
    refuse([*tiny, "--json", str(out)], ["precious.json", "left as it is"], capsys, eval_ppl)
    assert out.read_text() == content


@pytest.mark.parametrize("more", [{}, {"nll": [0.5], "compiled": True, "weights": "x"}])
def test_results_of_this_program_and_of_its_earlier_versions_are_read(more, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps([RESULT | more]))
    assert results.read_results(out) == [RESULT | more]


def test_a_scheme_of_a_million_characters_is_refused_at_once(capsys, tmp_path):
    out = tmp_path / "out.json"
    start = time.perf_counter()
    for scheme in ("x" * 10**6, "token-static" * 10**5, "\x1b[2J"):
        out.write_text(json.dumps([RESULT | {"scheme": scheme}]))
        options = f"--fig 9 --json {out} --out {tmp_path}".split()
        refuse(options, ["out.json", "left as it is"], capsys, figures)
    assert time.perf_counter() - start < 10


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text(json.dumps([RESULT]))
    monkeypatch.setattr(results, "LARGEST_FILE", out.stat().st_size)
    assert results.read_results(out) == [RESULT]
    monkeypatch.setattr(results, "LARGEST_FILE", out.stat().st_size - 1)
    with pytest.raises(ValueError, match="left as it is"):
        results.read_results(out)


def test_the_escapes_of_a_file_do_not_reach_the_terminal(capsys, tmp_path):
    """A panel of two settings is refused with the model's name, which begins with an escape."""
    out = tmp_path / "out.json"
    rows = [RESULT | {"model": "\x1b[2J\r\x9bmodel", "rope": rope} for rope in ("pre", "post")]
    out.write_text(json.dumps(rows))
    words = [r"\x1b[2J \x9bmodel", "differ in rope"]
    refuse(f"--fig 9 --json {out} --out {tmp_path}".split(), words, capsys, figures)


@pytest.mark.parametrize("change", [
    {"scheme": "row"}, {"scheme": ["full"]}, {"weights": "x" * 4097}, {"model": "x" * 4097},
    {"sinks": 10**400}, {"sinks": -1}, {"sinks": True}, {"bits": 2.5}, {"outliers": [1]},
    {"seq_len": [4]}, {"seq_len": 10**400}, {"model": "\ud800"}, {"weights": {}},
    {"keep": "some"}, {"keep": ["none"]},
    {"ppl": math.nan}, {"ppl": "1"}, {"nll": 3}, {"nll": ["x"]}, {"nll": [math.inf]},
])  # fmt: skip
def test_results_that_cannot_be_are_not_ours(change, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps([RESULT | change]))
    with pytest.raises(ValueError, match="left as it is"):
        results.read_results(out)
