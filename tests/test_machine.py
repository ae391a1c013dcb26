"""The machine: its dtype, its compiler, its memory, and the ranks that torchrun starts."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval_ppl
import kvsink
from support import machine
from support.machine import or_eager
from tests.helpers import EVAL_PPL, HERE, refuse, results_of


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


def test_without_a_compiler_a_command_runs_eager(tiny, tmp_path, monkeypatch):
    """One line says so. CXX is the C++ compiler that torch.compile would take."""
    environment = {**os.environ, "CXX": "/no/compiler", "KVSINK_CACHE": str(tmp_path)}
    options = [option for option in tiny if option != "--no-compile"]
    options += "--scheme token-dynamic --sinks 2 --limit 1 --json".split()
    options.append(str(tmp_path / "out.json"))
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
    # Its rows say so, and a run that compiles does not take them over.
    written = results_of(tmp_path / "out.json")
    assert {row["compiled"] for row in written} == {False}
    monkeypatch.setattr(machine, "has_compiler", lambda device: True)
    monkeypatch.setattr(kvsink, "compiled", lambda function, **_: function)
    assert eval_ppl.main(options) == 0
    assert eval_ppl.main(options) == 0  # which it takes over
    both = results_of(tmp_path / "out.json")
    assert both[: len(written)] == written
    assert [row["compiled"] for row in both] == [False] * len(written) + [True] * len(written)


def test_a_row_says_whether_it_ran_compiled_to_its_end(tiny, tmp_path, monkeypatch):
    """The step fails in the second row, after 6 + 3 blocks, and the loss in the fourth. Each runs
    eager from there on."""

    def compiled(function, **options):
        calls_until_failure = itertools.count(9 if function is kvsink.decoder_block else 3, -1)

        def flaky(*args):
            if next(calls_until_failure) == 0:
                raise torch._dynamo.exc.FailOnRecompileLimitHit("too many graphs")
            return function(*args)

        return flaky

    monkeypatch.setattr(machine, "has_compiler", lambda device: True)
    monkeypatch.setattr(kvsink, "compiled", compiled)
    out = tmp_path / "out.json"
    options = [option for option in tiny if option != "--no-compile"]
    options += f"--scheme token-dynamic --sinks 2 --limit 1 --json {out}".split()
    assert eval_ppl.main(options) == 0
    how = [row["compiled"] for row in results_of(out)]
    assert how == [True, "partly", "partly", False, False, False, False]


def test_beyond_the_limit_of_graphs_it_runs_eager_and_says_so(capsys, monkeypatch):
    assert not torch._dynamo.config.fail_on_recompile_limit_hit or machine.has_compiler("cpu")
    used = set()
    function = or_eager(torch.compile(twice, backend="eager", dynamic=False), twice, used)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        assert [len(function(torch.ones(n))) for n in (2, 3, 4)] == [2, 3, 4]
    assert used == {True, False}
    assert machine.ran_compiled(used, "cpu") == "partly"
    assert "running it eager" in capsys.readouterr().err


HAS_COMPILER = """
import os
from types import SimpleNamespace
from support import machine
machine.pick_machine(SimpleNamespace(device="cpu", dtype=None, no_compile=False))
print(machine.has_compiler("cpu"), os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """A folder for PyTorch's own files, of which the slowest to compile are there the next time."""
    return tmp_path_factory.mktemp("temporary")


def compile_in(folder, temporary, **environment):
    """Return the process that compiled in this cache."""
    environment |= {"KVSINK_CACHE": str(folder), "TMPDIR": str(temporary)}
    environment = os.environ | environment
    environment.pop("TORCHINDUCTOR_CACHE_DIR")
    return subprocess.run(
        [sys.executable, "-c", HAS_COMPILER],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_compiled_code_lies_in_our_cache(tmp_path, temporary):
    """It reaches it, and nobody else may write there; nor is it refused in the next run."""
    if not machine.has_compiler("cpu"):
        pytest.skip("no compiler")
    done = compile_in(tmp_path / "cache", temporary)
    assert done.stdout.split() == ["True", str(tmp_path / "cache" / "compiled")], done.stderr
    assert len(list((tmp_path / "cache" / "compiled").rglob("*.so"))) > 0
    assert (tmp_path / "cache").stat().st_mode & 0o022 == 0
    assert (tmp_path / "cache" / "compiled").stat().st_mode & 0o777 == 0o700
    again = compile_in(tmp_path / "cache", temporary)
    assert again.stdout == done.stdout


def test_a_cache_with_a_blank_in_its_name_compiles(tmp_path, temporary):
    """PyTorch's own folder has the compiled code then."""
    if not machine.has_compiler("cpu"):
        pytest.skip("no compiler")
    done = compile_in(tmp_path / "a b'c", temporary)
    assert done.stdout.startswith(f"True {temporary}"), done.stderr
    assert "a b" not in done.stdout


def test_a_cache_that_cannot_be_written_is_not_for_compiled_code(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        machine.keep_compiled_code()
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("KVSINK_CACHE", "/dev/null/cache")
    machine.keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_compiler_that_is_turned_off_is_no_compiler(tmp_path, temporary):
    done = compile_in(tmp_path / "cache", temporary, TORCH_COMPILE_DISABLE="1")
    assert done.stdout.startswith("False")
    assert "turns torch.compile off" in done.stderr


def test_code_that_others_may_write_is_not_run(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    (tmp_path / "compiled").mkdir()
    tmp_path.chmod(0o755)  # others may enter it
    for folder in (tmp_path / "compiled", tmp_path):
        folder.chmod(0o757)
        with pytest.raises(PermissionError, match=f"chmod go-w {folder}, or set KVSINK_CACHE"):
            machine.has_compiler.__wrapped__("cpu")
        if folder == tmp_path:
            with monkeypatch.context() as patch:
                patch.setattr(machine, "has_compiler", machine.has_compiler.__wrapped__)
                options = [option for option in tiny if option != "--no-compile"]
                refuse(options, ["other users may write", "chmod go-w"], capsys, eval_ppl)
        folder.chmod(0o755)
    elsewhere = tmp_path.parent / f"{tmp_path.name} elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(elsewhere))
    with pytest.raises(PermissionError, match="or set TORCHINDUCTOR_CACHE_DIR"):
        machine.has_compiler.__wrapped__("cpu")


def test_the_cause_of_a_compilers_error():
    error = RuntimeError(
        f"C++ compile error\n\nCommand:\ng++ {'-x ' * 200}\n\nOutput:\nIn file included from y\n"
        "g++: fatal error: Python.h: No such file\ncompilation terminated.\n"
    )
    assert machine.reason(error) == "g++: fatal error: Python.h: No such file"
    assert machine.reason(RuntimeError("a\n b\nSet TORCHDYNAMO_VERBOSE=1 for more")) == "a b"


@pytest.mark.parametrize("seconds, words", [
    (0.0043, "0.0043 s"), (9.5, "9.5 s"), (45, "45 s"), (150, "2.5 min"), (3599, "60 min"),
    (7200, "2 h"), (432_000, "120 h"), (4.32e8, "120000 h"),
])  # fmt: skip
def test_durations_in_words(seconds, words):
    assert machine.format_duration(seconds) == words


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
