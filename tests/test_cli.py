"""What all commands share: options that cannot be, errors in one line, the exit status."""

import os
import subprocess

import pytest
import torch

import eval_ppl
from support import cli, machine
from tests.helpers import EVAL_PPL, HERE, refuse


@pytest.mark.parametrize("change, words", [
    (["--sinks", "65"], ["--sinks 65", "window of 64"]),
    (["--sinks", "-1"], ["--sinks", "at least 0"]),
    (["--group-size", "3"], ["--group-size 3", "head of 8"]),
    (["--group-size", "0"], ["--group-size", "at least 1"]),
    (["--bits", "9"], ["--bits", "from 1 to 8"]),
    (["--bits", "four"], ["--bits", "'four'"]),
    (["--seq-len", "513"], ["--seq-len 513", "context, 512"]),
    (["--layer", "6"], ["--layer 6", "layers 0 to 5"]),
    (["--channel", "32"], ["channels 0 to 31"]),
    (["--model", "lama2-7b"], ["lama2-7b", "llama2-7b"]),
    (["--data", "wikitext"], ["wikitext", "wikitext2"]),
    (["--data", "/nowhere/text.txt"], ["/nowhere/text.txt"]),
    (["--data", "."], ["."]),
    (["--data", "README.md", "/nowhere/text.txt"], ["/nowhere/text.txt"]),
    (["--data", "/dev/zero"], ["/dev/zero", "no such file"]),
    (["--json", "/nowhere/out.json"], ["/nowhere"]),
    (["--json", "/dev/null/out.json"], ["cannot write"]),
    (["--json", "/dev/zero"], ["/dev/zero", "not a file"]),
    (["--json", "same.png", "--plot", "same.png"], ["same file"]),
    (["--plot", "fig9.gif"], [".png"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--device", "toaster"], ["toaster"]),
    (["--device", "meta"], ["cpu, cuda and mps"]),
    (["--limit", "0"], ["--limit", "at least 1"]),
    (["--seed", str(2**63)], ["--seed", "from 0 to"]),
    (["--seed", "-1"], ["--seed", "from 0 to"]),
    (["--model", "~nobody-of-that-name/model"], ["nobody-of-that-name"]),
    (["--scheme", "row"], ["--scheme", "token-static"]),
    (["--scheme", "kvquant"], ["--scheme", "'kvquant'"]),
])  # fmt: skip
def test_bad_arguments(change, words, tiny, capsys):
    refuse([*tiny, "--scheme", "token-dynamic", *change], words, capsys, eval_ppl)


def test_a_layer_without_a_channel(tiny, capsys):
    assert tiny[-2:] == ["--channel", "5"]
    refuse(tiny[:-2], ["--layer and --channel"], capsys, eval_ppl)


def test_an_option_without_its_value(capsys):
    refuse(["--model=--"], ["--model=--", "value"], capsys, eval_ppl)


def test_matplotlib_is_asked_for_by_name(tiny, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    refuse([*tiny, "--plot", "fig9.png"], ["pip install matplotlib"], capsys, eval_ppl)


CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity"


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError(CUDA_MESSAGE), ["20.00 GiB"]),
    (MemoryError(), ["more was asked for"]),
    (MemoryError("Unable to allocate 728. TiB for an array"), ["728. TiB"]),
    (None, ["2048.0 GiB"]),
])  # fmt: skip
def test_short_of_memory_in_one_line(error, words, tiny, capsys, monkeypatch):
    def evaluate_texts(*_):
        if error:
            raise error
        torch.empty(2**41, dtype=torch.int8)  # more than an address space's worth of this machine

    monkeypatch.setattr(machine, "free_memory", lambda device: 3 * 2**30)
    monkeypatch.setattr(eval_ppl, "evaluate_texts", evaluate_texts)
    words = ["out of memory", *words, "3.0 GiB are free", "--seq-len", "--stream"]
    refuse(tiny, words, capsys, eval_ppl)


def test_an_error_has_no_escapes_of_a_terminal(tiny, capsys, monkeypatch):
    """A file of somebody else may have put them into a name."""

    def evaluate_texts(*_):
        raise ValueError("tensor \x1b]0;x\x07\u202ea\ud800 is unexpected, modèle")

    monkeypatch.setattr(eval_ppl, "evaluate_texts", evaluate_texts)
    refuse(tiny, [r"tensor \x1b]0;x\x07\u202ea\ud800 is unexpected, modèle"], capsys, eval_ppl)


def test_a_process_ends_with_one_line_and_status_2():
    command = [*EVAL_PPL, "--bits", "0"]
    bad = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert (bad.returncode, bad.stdout, len(bad.stderr.splitlines())) == (2, "", 1)


def test_a_reader_that_has_enough_and_a_terminal_without_a_character(tiny, tmp_path):
    """`| head -1` ends the command quietly. A terminal that cannot show a character of a name gets
    a question mark."""
    model = tmp_path / "modèle"
    model.symlink_to(tiny[1])
    options = f"--model {model} --scheme token-dynamic --sinks 1".split()
    command = [*EVAL_PPL, *tiny, *options]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, cwd=HERE, env=ascii_only, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert "mod?le on" in done.stdout
    assert "KVSink-1" in done.stdout

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=HERE, **pipes)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(300) == 141
