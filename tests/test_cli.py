"""What commands share: options, the machine, errors in one line; eval_ppl.py as a process, and on
several ranks."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_ppl
from kvsink import Site, full_precision_cache
from llama import Llama
from support import cli, run
from support.run import How
from tests.helpers import (
    DIGITS,
    HERE,
    PLANTED,
    SMALL,
    bytes_vocabulary,
    refuse,
    results_of,
    write_bpe,
    write_model,
    write_weights,
)


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
    (["--json", "/nowhere/out.json"], ["/nowhere"]),
    (["--plot", "fig9.gif"], [".png"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--device", "toaster"], ["toaster"]),
    (["--device", "meta"], ["cpu, cuda and mps"]),
    (["--limit", "0"], ["--limit", "at least 1"]),
    (["--seed", str(2**63)], ["--seed", "from 0 to"]),
    (["--seed", "-1"], ["--seed", "from 0 to"]),
    (["--json", "same.png", "--plot", "same.png"], ["same file"]),
    (["--json", "/dev/null/out.json"], ["cannot write"]),
    (["--json", "/dev/zero"], ["/dev/zero", "not a file"]),
    (["--data", "/dev/zero"], ["/dev/zero", "no such file"]),
    (["--model", "~nobody-of-that-name/model"], ["nobody-of-that-name"]),
    (["--scheme", "row"], ["--scheme", "token-static"]),
    (["--scheme", "kvquant"], ["python -m paper.table2"]),
    (["--outliers", "0.01"], ["--outliers", "python -m paper.table2"]),
    (["--q-norm"], ["--q-norm", "python -m paper.table2"]),
    (["--calibration", "file"], ["--calibration", "python -m paper.table2"]),
    (["--table", "2"], ["--table", "python -m paper.table2"]),
    (["--table=2"], ["--table", "python -m paper.table2"]),
    (["--stream", "--scratch", "x"], ["--scratch is gone"]),
    (["--data", "README.md", "/nowhere/text.txt"], ["/nowhere/text.txt"]),
])  # fmt: skip
def test_bad_arguments(change, words, tiny, capsys):
    refuse([*tiny, "--scheme", "token-dynamic", *change], words, capsys, eval_ppl)


def test_a_layer_without_a_channel(tiny, capsys):
    refuse([*tiny[:-2]], ["--layer and --channel"], capsys, eval_ppl)


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
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model", {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path / "model", bytes_vocabulary(), DIGITS)
    refuse(
        [*tiny[2:-4], "--model", str(tmp_path / "model")], ["no stable outliers"], capsys, eval_ppl
    )


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_logits_that_are_not_finite_name_the_first_block(value, tiny, capsys, tmp_path):
    write_model(tmp_path, {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][:] = value
    write_weights(tmp_path, weights)
    refuse(
        [*tiny, "--model", str(tmp_path), "--limit", "1"],
        ["NaN or inf", "block 4 of 6"],
        capsys,
        eval_ppl,
    )


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity"), ["20.00 GiB"]),
    (MemoryError(), ["more was asked for"]),
    (MemoryError("Unable to allocate 728. TiB for an array"), ["728. TiB"]),
    (None, ["2048.0 GiB"]),
])  # fmt: skip
def test_short_of_memory_in_one_line(error, words, tiny, capsys, monkeypatch):
    def run(*_):
        if error:
            raise error
        torch.empty(2**41, dtype=torch.int8)  # more than an address space's worth of this machine

    monkeypatch.setattr(cli, "free_memory", lambda device: 3 * 2**30)
    monkeypatch.setattr(eval_ppl, "run", run)
    refuse(
        tiny,
        ["out of memory", *words, "3.0 GiB are free", "--seq-len", "--stream"],
        capsys,
        eval_ppl,
    )


def test_free_memory(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < cli.free_memory("cpu") <= whole
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path: "MemTotal: 9000 kB\nMemAvailable:    1024 kB\nBuffers: 5 kB\n",
    )
    assert cli.free_memory("cpu") == 2**20
    monkeypatch.setattr(Path, "read_text", lambda path: "something else")
    assert cli.free_memory("cpu") == whole


def test_the_command_itself(tiny, tmp_path):
    """As a process: exit status 2 and one line; and eager where there is no compiler."""
    environment = {**os.environ, "CXX": "/no/compiler", "KVSINK_CACHE": str(tmp_path)}
    run = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True, timeout=120)
    bad = run([sys.executable, "eval_ppl.py", "--bits", "0"])
    assert (bad.returncode, bad.stdout, len(bad.stderr.splitlines())) == (2, "", 1)
    arguments = [a for a in tiny if a != "--no-compile"] + [
        "--scheme",
        "token-dynamic",
        "--sinks",
        "2",
        "--limit",
        "1",
    ]
    eager = run([sys.executable, "eval_ppl.py", *arguments], env=environment)
    assert eager.returncode == 0 and "KVSink-2" in eager.stdout
    assert len([line for line in eager.stderr.splitlines() if "no working compiler" in line]) == 1


def test_each_rank_takes_its_share(tiny, monkeypatch):
    """Without processes: the losses of both ranks, added by hand, are one rank's; no window is
    evaluated twice."""
    model, seen = Llama.from_pretrained(tiny[1]), []
    tokens = torch.randint(0, 256, (5, 64), generator=torch.Generator().manual_seed(0))

    def nll(model, H, window):
        seen.append(window)
        return eval_ppl.negative_log_likelihood(model, H, window)

    def losses(rank, ranks):
        monkeypatch.setattr(eval_ppl, "rank_and_world_size", lambda: (rank, ranks))
        monkeypatch.setattr(eval_ppl.dist, "get_backend", lambda: "gloo")
        monkeypatch.setattr(eval_ppl.dist, "all_reduce", lambda total: None)
        how = How(run.kvsink.decoder_block, nll)
        return eval_ppl.window_losses(
            model, tokens, full_precision_cache(model), ("none", 0, Site(0, 0)), how, ""
        )

    one = losses(0, 1)
    assert len(seen) == 5
    seen.clear()
    second = losses(1, 2)
    assert second[:, [0, 2, 4]].eq(0).all() and len(seen) == 2
    assert torch.equal(losses(0, 2) + second, one) and len(seen) == 5
    one, kept = one
    assert kept.eq(0).all()
    assert eval_ppl.perplexity(one, 64) == pytest.approx(
        (one.sum() / (5 * 63)).exp().item(), rel=1e-12
    )


def test_two_ranks_give_the_perplexity_of_one(tiny, tmp_path):
    """torchrun with gloo: the windows are shared out and summed."""
    arguments = [
        *tiny,
        *"--scheme token-dynamic --keep kvsink --sinks 2 --bits 3 --limit 5".split(),
    ]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert eval_ppl.main([*arguments, "--json", str(one)]) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "eval_ppl.py",
    ]
    command += [*arguments, "--json", str(two)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for a, b in zip(results_of(one), results_of(two), strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-12) and a["scheme"] == b["scheme"]
        assert (
            a["nll"] == pytest.approx(b["nll"], rel=1e-12)
            and a["kept"] == b["kept"]
            and len(a["nll"]) == 5
        )


def test_half_precision_only_where_it_is_safe(monkeypatch):
    """fp16 on cuda; fp32 on the CPU, and on Apple's GPU, where half precision has leaked future
    tokens."""
    args = eval_ppl.parse_arguments([])
    real = torch.zeros
    for device, dtype in (("cpu", "float32"), ("mps", "float32"), ("cuda", "float16")):
        args.device = device
        fake = type("Tensor", (), {"device": torch.device(device)})
        monkeypatch.setattr(torch, "zeros", lambda *_, fake=fake, **__: fake)
        assert cli.machine(args).dtype == dtype
    monkeypatch.setattr(torch, "zeros", real)


@pytest.mark.parametrize("environment, words", [
    ({"RANK": "1"}, ["RANK is set", "WORLD_SIZE"]),
    ({"RANK": "abc"}, ["RANK is 'abc'"]),
    ({"RANK": "1", "WORLD_SIZE": ""}, ["WORLD_SIZE is ''"]),
    ({"RANK": "0", "WORLD_SIZE": "1"}, ["MASTER_PORT is None"]),
])  # fmt: skip
def test_half_of_torchruns_environment(environment, words, tiny, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuse([*tiny, "--scheme", "token-dynamic"], words, capsys, eval_ppl)


def test_a_reader_that_has_enough_and_a_terminal_without_a_character(tiny, tmp_path):
    """`| head -1` ends the command quietly; a name that the terminal cannot show is shown as far as
    it can."""
    model = tmp_path / "modèle"
    model.symlink_to(tiny[1])
    command = [
        sys.executable,
        "eval_ppl.py",
        *tiny,
        "--model",
        str(model),
        "--scheme",
        "token-dynamic",
        "--sinks",
        "1",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "mod?le on" in done.stdout and "KVSink-1" in done.stdout
    process = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(120) == 141


def test_an_option_without_its_value(capsys):
    refuse(["--model=--"], ["--model=--", "value"], capsys, eval_ppl)
