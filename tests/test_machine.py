"""The machine: its dtype, its compiler, its memory, and the ranks that torchrun starts."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

import eval_ppl
from support import machine
from support.machine import or_eager
from tests.helpers import EVAL_PPL, HERE, refuse


def test_half_precision_only_on_cuda(monkeypatch):
    """fp16 on cuda; fp32 on the CPU, and on Apple's GPU, where half precision has leaked future
    tokens."""
    args = eval_ppl.parse_arguments([])
    for device, dtype in (("cpu", "float32"), ("mps", "float32"), ("cuda", "float16")):
        args.device = device
        tensor = type("Tensor", (), {"device": torch.device(device)})
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", lambda *_, tensor=tensor, **__: tensor)
            picked = machine.pick_machine(args)
        assert picked.dtype == dtype
        assert picked.torch_dtype == getattr(torch, dtype)


def test_without_a_compiler_a_command_runs_eager(tiny, tmp_path):
    """One line says so. CXX is the C++ compiler that torch.compile would take."""
    environment = {**os.environ, "CXX": "/no/compiler", "KVSINK_CACHE": str(tmp_path)}
    options = [option for option in tiny if option != "--no-compile"]
    options += "--scheme token-dynamic --sinks 2 --limit 1".split()
    eager = subprocess.run(
        [*EVAL_PPL, *options],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert eager.returncode == 0
    assert "KVSink-2" in eager.stdout
    assert eager.stderr.count("no working compiler") == 1


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


def test_free_memory(monkeypatch):
    """Linux says how much memory is available; without that, it is all that the machine has."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < machine.free_memory("cpu") <= whole
    meminfo = "MemTotal: 9000 kB\nMemAvailable:    1024 kB\nBuffers: 5 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: meminfo)
    assert machine.free_memory("cpu") == 2**20
    monkeypatch.setattr(Path, "read_text", lambda path: "something else")
    assert machine.free_memory("cpu") == whole


def test_a_function_that_does_not_compile_runs_eager(capsys):
    """One line says so, once, and results are those of the function."""

    def fails(graph, inputs):
        raise RuntimeError("CantSplit:\n 16")

    function = or_eager(torch.compile(twice, backend=fails), twice)
    assert [float(function(torch.tensor(x))) for x in (1.0, 2.0)] == [2.0, 4.0]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "twice" in lines[0] and "CantSplit: 16" in lines[0]


def twice(x):
    return 2 * x
