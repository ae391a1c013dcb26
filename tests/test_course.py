"""The course: the handout, and the grader on the reference, on wrong solutions and on hostile
ones."""

import ast
import csv
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from course import __main__ as command
from course import grade, handout, source, worker
from course.grade import ROOT
from course.problems import BY_NAME, FILES, PROBLEMS
from tests.helpers import refuse
from tests.other_solutions import OTHER
from tests.wrong_solutions import WRONG

PROBLEM_OF = {function: problem for problem in PROBLEMS for function in problem.functions}


@pytest.fixture(scope="module")
def server():
    with grade.serving() as server:
        yield server


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A handout, as the command writes it."""
    folder = tmp_path_factory.mktemp("handout") / "kvsink"
    assert command.main(["handout", str(folder)]) == 0
    return folder


def submission(folder, **files):
    """The reference as a submission, with other texts for some files: quant_py="..."."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(files.get(name.replace(".", "_"), (ROOT / name).read_text()))
    return folder


def graded(server, name, folder):
    function = BY_NAME[name]
    return grade.grade_function(server, PROBLEM_OF[function], function, folder)


# --------------------------------------------------------------------------------------------------
# The table and the tests


def test_points_and_tests():
    """100 points for all but the bonus; public and hidden tests for each function, and none for
    anything else."""
    assert sum(problem.points for problem in PROBLEMS if not problem.bonus) == 100
    assert [problem.number for problem in PROBLEMS] == list(range(1, 9))
    for problem in PROBLEMS:
        names = [
            name for function in problem.functions for name, _ in grade.tests_of(problem, function)
        ]
        for function in problem.functions:
            own = [name for name, _ in grade.tests_of(problem, function)]
            assert any(name.endswith("(hidden)") for name in own) and not own[0].endswith(
                "(hidden)"
            ), function.name
        if problem.functions:
            written = [
                ROOT / f"course/{kind}/problem{problem.number}.py" for kind in ("checks", "hidden")
            ]
            assert len(names) == sum(path.read_text().count("\ndef test_") for path in written), (
                problem.number
            )
    assert handout.overview() in (ROOT / "course/README.md").read_text()


# --------------------------------------------------------------------------------------------------
# The handout


def public_tests(folder):
    """The test cases of `python -m pytest` in a handout."""
    report = folder.parent / "report.xml"
    pytest_command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml",
        str(report),
    ]
    subprocess.run(pytest_command, cwd=folder, capture_output=True, timeout=120)
    return ElementTree.parse(report).findall(".//testcase")


def test_before_anything_is_solved_each_test_says_so(given, tiny):
    """The handout's second command: all tests fail, by NotImplementedError. Its first stops, and
    says so in one line."""
    cases = public_tests(given)
    public = sum(
        text.count("\ndef test_")
        for name, text in handout.files().items()
        if name.startswith("checks/test_")
    )
    assert len(cases) == public > 50
    for case in cases:
        assert case.find("failure").get("message").startswith("NotImplementedError: Problem "), (
            case.get("name")
        )
    run = subprocess.run(
        [sys.executable, "eval_ppl.py", *tiny],
        cwd=given,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        run.returncode == 2
        and run.stderr.startswith("eval_ppl.py: Problem ")
        and run.stderr.count("\n") == 1
    )


def test_once_all_is_solved_each_test_passes(given, tmp_path):
    shutil.copytree(given, tmp_path / "solved")
    submission(tmp_path / "solved")
    assert all(case.find("failure") is None for case in public_tests(tmp_path / "solved"))


def test_a_handout_is_the_same_bytes_each_time(given, tmp_path, capsys):
    assert command.main(["handout", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert "Quantizer.calibrate (quant.py)" in printed and str(tmp_path / "again") in printed
    for name, text in handout.files().items():
        assert (
            (tmp_path / "again" / name).read_bytes() == (given / name).read_bytes() == text.encode()
        ), name
    here = {path.relative_to(given).as_posix() for path in given.rglob("*") if path.is_file()}
    assert {name for name in here if "__pycache__" not in name} == set(handout.files())


def test_a_handout_holds_no_solution_and_no_hidden_test(tmp_path, monkeypatch, capsys):
    texts = handout.files()
    assert handout.leaks(texts) == []
    assert not any(
        "hidden" in name or "course/" in name or "wrong_solutions" in name for name in texts
    )
    found = {
        function
        for function, *_ in handout.leaks({name: (ROOT / name).read_text() for name in FILES})
    }
    assert found == set(BY_NAME)
    secret = (
        "def scale(lo, hi, n):\n    return torch.where(s>0, s, torch.where(lo==0, 1.0, lo.abs()))"
    )
    monkeypatch.setattr(handout, "files", lambda: {**texts, "support/text.py": secret})
    refuse(["handout", str(tmp_path / "leaky")], ["support/text.py", "scale"], capsys, command)
    assert not (tmp_path / "leaky").exists()


def test_stubs_keep_what_a_student_needs(given):
    """Signatures, docstrings, everything between; the parts that would give it away are gone."""
    for name in FILES:
        reference, stub = (
            source.functions_of(ast.parse((root / name).read_text())) for root in (ROOT, given)
        )
        assert reference.keys() == stub.keys()
        for function, node in stub.items():
            if function not in BY_NAME:
                assert ast.dump(node) == ast.dump(reference[function]), function
                continue
            assert ast.dump(node.args) == ast.dump(reference[function].args) and len(node.body) == 2
            doc, whole = (ast.get_docstring(nodes[function]) for nodes in (stub, reference))
            assert doc == (whole.split("\n\n")[0] if BY_NAME[function].cut else whole)


# --------------------------------------------------------------------------------------------------
# The grader: right and wrong


def test_a_class(given, tmp_path):
    """The reference has all points, the untouched handout none, nor has an empty folder."""
    submission(tmp_path / "class" / "anna")
    (tmp_path / "class" / "bob").symlink_to(given)
    (tmp_path / "class" / "zoe").mkdir()
    out = tmp_path / "grades.csv"
    assert command.main(["grade", "--class", str(tmp_path / "class"), "--csv", str(out)]) == 0
    anna, bob, zoe = csv.DictReader(out.open())
    assert (anna["submission"], anna["points"], anna["of"], anna["lost"]) == (
        "anna",
        "88",
        "88",
        "",
    )
    assert [anna[f"problem {i}"] for i in range(1, 7)] == [
        str(problem.points) for problem in PROBLEMS[:6]
    ]
    assert (bob["points"], zoe["points"]) == ("0", "0") and "Quantizer.calibrate" in bob["lost"]


def test_what_is_printed_and_results_json(tmp_path, capsys, monkeypatch):
    """One right function, one that is missing, a file that does not parse, two that are not
    there."""
    monkeypatch.setattr(grade, "PROBLEMS", [PROBLEMS[0], PROBLEMS[3]])
    (tmp_path / "quant.py").write_text(
        "import torch\ndef zero(lo, s):\n    return -torch.round(lo / s)\n"
    )
    (tmp_path / "kvsink.py").write_text("x = 1\ndef pfn(H, N:\n    return 0\n")
    out = tmp_path / "results.json"
    assert command.main(["grade", str(tmp_path), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "2 of 32 points" in printed
        and "scale is not there" in printed
        and "kvsink.py, line 2:" in printed
    )
    results = json.loads(out.read_text())
    assert results["score"] == 2 == sum(test["score"] for test in results["tests"])
    assert "0 of 5 tests passed" in printed  # of quantize, which is not there
    for test in results["tests"]:
        assert test["status"] == ("passed" if test["score"] == test["max_score"] else "failed")
        assert (test["output"] == "") == (test["status"] == "passed")


def test_the_table_of_wrong_solutions():
    """At least forty, for each function one; each differs from the reference in one place that
    there is."""
    assert len(WRONG) >= 40 and {name for name, *_ in WRONG} == set(BY_NAME)
    for name, old, new, _ in WRONG:
        text = (ROOT / BY_NAME[name].file).read_text()
        right = ast.get_source_segment(text, source.functions_of(ast.parse(text))[name])
        assert right.count(old) == 1 and old != new, (name, old)


def wrong_file(name, old, new):
    """The reference's file with one function wrong."""
    text = (ROOT / BY_NAME[name].file).read_text()
    right = ast.get_source_segment(text, source.functions_of(ast.parse(text))[name])
    return text.replace(right, right.replace(old, new))


@pytest.fixture(scope="module")
def wrong_grades(tmp_path_factory):
    """The grade of each wrong solution, two at a time."""

    def half(first):
        with grade.serving() as server:
            for i, (name, old, new, _) in list(enumerate(WRONG))[first::2]:
                files = {BY_NAME[name].file.replace(".", "_"): wrong_file(name, old, new)}
                grades[i] = graded(server, name, submission(folder / str(i), **files))

    grades, folder = {}, tmp_path_factory.mktemp("wrong")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, (0, 1)))
    return grades


@pytest.mark.parametrize("i", range(len(WRONG)), ids=[f"{w[0]}: {w[3]}" for w in WRONG])
def test_a_wrong_solution_loses_its_points_and_no_others(i, wrong_grades):
    (name, old, new, error), found = WRONG[i], wrong_grades[i]
    assert found.points == 0 and found.failed, f"{error}: not noticed"
    assert not any(
        why.startswith(("no answer", "the process ended", "an answer")) for _, why in found.failed
    ), found.failed
    file, tree = BY_NAME[name].file, ast.parse(wrong_file(name, old, new))
    for (
        other
    ) in BY_NAME.values():  # other files are the same, and so is what the grader makes of this one
        if other.file == file and other.name != name:
            merged = source.merged((ROOT / file).read_text(), tree, [other.name])
            assert merged == of_the_reference(other), other.name


@functools.cache
def of_the_reference(function):
    text = (ROOT / function.file).read_text()
    return source.merged(text, ast.parse(text), [function.name])


def test_another_right_solution_has_all_points(server, tmp_path):
    """All functions in other words, with helpers, loops, keywords, lists for tuples; nothing else
    is in these files."""
    folder = submission(tmp_path, **{file.replace(".", "_"): text for file, text in OTHER.items()})
    grades = grade.grade(server, folder, disable=True)
    assert [(g.name, g.failed) for g in grades if g.failed] == [] and grade.points_of(grades) == (
        88,
        88,
    )


def test_helpers_of_a_students_own(server, tmp_path):
    """Imports, constants, functions and methods that an assigned function uses come along; what it
    does not use does not."""
    text = (ROOT / "quant.py").read_text()
    text = text.replace('"""Eq. 11: X\' = scale * (Q(X) - zero)."""\n    return s * (codes.to(s.dtype) - z)',
                        "return minus(codes.to(s.dtype), z, SIGN) * s")  # fmt: skip
    text = text.replace("        check_finite(X)\n", "        self.looked_at(X)\n")
    text = text.replace(
        "    def calibrate",
        "    def looked_at(self, X):\n        check_finite(X)\n\n    def calibrate",
    )
    text = text.replace('"""Eq. 12', '"""\\ud800 Eq. 12')
    text += "\nimport operator as op\nSIGN = -1\nBROKEN = 1 / 0\nimport nowhere\n"
    text += "def minus(a, b, sign):\n    return op.add(a, sign * b)\n"
    folder = submission(tmp_path, quant_py=text)
    assert "minus" in text and "looked_at" in text
    for name in ("dequantize", "Quantizer.calibrate", "scale"):
        assert graded(server, name, folder).failed == (), name


# --------------------------------------------------------------------------------------------------
# The grader: hostile submissions

ZERO = "def zero(lo, s):\n    {}\n    return -torch.round(lo / s)\n"
PATCHES = "import numpy, torch, pytest; numpy.isclose = numpy.allclose = torch.allclose = lambda *a, **k: numpy.array(True); "
FIND = """import os, sys, time
    frame = sys._getframe()
    while "connection" not in frame.f_locals: frame = frame.f_back
    connection = frame.f_locals["connection"]; """


NATIVE = (  # which audit hooks do not see, and Landlock does
    ("torch.from_file({hidden!r}, size=9, dtype=torch.uint8)", "Permission denied"),
    ("torch.save(lo, {outside!r})", "RuntimeError"),
    ("import os; os.mkfifo({outside!r})", "PermissionError"),
)
if worker.landlock_version() >= 6:
    NATIVE += (
        (
            "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
            "PermissionError",
        ),
    )


def zero_with(tmp_path, line, top=""):
    return submission(tmp_path / "in", quant_py="import torch\n" + ZERO.format(line) + top)


@pytest.mark.parametrize("line, why", [
    ("while True: pass", "no answer in 1 seconds"),
    ("import sys; sys.exit(0)", "SystemExit"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("import os; os._exit(0)", "the process ended"),
    ("import os, signal; signal.raise_signal(signal.SIGSEGV)", "the process ended"),
    ("bytearray(2**34)", "MemoryError"),
    (PATCHES + "return lo", "zero: at [0]"),
    ("return lambda: 0", "TypeError"),
    (FIND + "connection.send_bytes(b'garbage')", "an answer that cannot be read"),
    (FIND + "connection.send_bytes(bytes(7) + b'\\2[]')", "an answer that cannot be read"),
    (FIND + "os.write(connection.fileno(), b'\\0\\0\\1\\0half'); time.sleep(9)", "no answer in 1 seconds"),
    (FIND + "os.write(connection.fileno(), b'\\x7f' * 8); time.sleep(9)", "the process ended"),
    ("open({hidden!r}).read()", "PermissionError"),
    ("import course.hidden.problem1", "ModuleNotFoundError"),
    ("import os; os.listdir({root!r})", "PermissionError"),
    ("open({outside!r}, 'w').write('x')", "PermissionError"),
    ("import os; os.mkdir({outside!r})", "PermissionError"),
    ("import pathlib; pathlib.Path({outside!r}).mkdir()", "PermissionError"),
    ("import pathlib; pathlib.Path({outside!r}).write_text('x')", "PermissionError"),
    ("import os; os.symlink({outside!r}, 'link'); open('link', 'w')", "PermissionError"),
    ("import subprocess; subprocess.run(['touch', {outside!r}])", "PermissionError"),
    ("import os; os.system('touch ' + {outside!r})", "PermissionError"),
    ("import os; os.fork()", "PermissionError"),
    ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    ("import socket; socket.socket()", "PermissionError"),
    ("import ctypes; ctypes.CDLL(None).system(b'true')", "PermissionError"),
    ("open('big', 'wb').write(bytes(2**22))", "OSError"),
    *(NATIVE if worker.landlock_version() else ()),
])  # fmt: skip
def test_a_hostile_function_gets_nothing_and_harms_nothing(
    line, why, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(grade, "SECONDS", 1 if why.startswith("no answer") else 20)
    outside = tmp_path / "outside"
    paths = {
        "hidden": str(ROOT / "course/hidden/problem1.py"),
        "root": str(ROOT),
        "outside": str(outside),
    }
    for name, path in paths.items():
        line = line.replace(f"{{{name}!r}}", repr(path))
    found = graded(server, "zero", zero_with(tmp_path, line))
    assert found.points == 0 and why in found.failed[0][1], found.failed
    assert not outside.exists() and np.isclose(1, 2) == False  # noqa: E712
    monkeypatch.setattr(grade, "SECONDS", 20)
    assert graded(server, "scale", submission(tmp_path / "next")).failed == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_a_repository_that_is_closed_cannot_be_read_by_native_code(tmp_path, monkeypatch):
    """Where there is no Landlock, native code can be kept from the reference like this: root
    becomes nobody."""
    closed = Path(tempfile.mkdtemp())  # which others may not read
    (closed / "course").mkdir()
    monkeypatch.setattr(worker, "__file__", shutil.copy(worker.__file__, closed / "course"))
    line = "import os; assert os.getuid() == os.getgid() == 65534 and os.getgroups() == []"
    with grade.serving() as server:
        assert graded(server, "zero", zero_with(tmp_path, line)).failed == ()
    shutil.rmtree(closed)


def test_what_runs_on_import_is_not_taken_over(server, tmp_path):
    """A right function in a file that would end, patch, write and loop: it has its points."""
    outside = tmp_path / "outside"
    top = f"torch.round = None\nopen({str(outside)!r}, 'w')\nraise SystemExit\nwhile True: pass\n"
    assert (
        graded(server, "zero", zero_with(tmp_path, "", top)).failed == () and not outside.exists()
    )


def test_a_flood_of_prints_does_no_harm(server, tmp_path):
    flood = "import os, sys\n    for i in range(20000): print('x' * 1000)"
    flood += "\n    os.write(1, b'x' * 10**6); print('x', file=sys.stderr)"
    assert graded(server, "zero", zero_with(tmp_path, flood)).failed == ()


@pytest.mark.parametrize("text, why", [
    ("def zero(lo, s:\n", "quant.py, line 1"),
    ("\0", "quant.py"),
    ("(" * 5000, "quant.py"),
    ("-" * 500_000 + "1", "quant.py"),
    ("def zero(lo, s): return " + "-" * 2000 + "lo / s", "recursion"),
    ("x = 1\n" * 300_000, "larger than 1 MB"),
    ("def scale(lo, hi, n): pass\n", "zero is not there"),
    ("class zero: pass\n", "zero is not there"),
    ("async def zero(lo, s): return lo\n", "zero is not there"),
])  # fmt: skip
def test_files_that_cannot_be_read(text, why, server, tmp_path):
    found = graded(server, "zero", submission(tmp_path, quant_py=text))
    assert found.points == 0 and why in found.failed[0][0]
    assert graded(server, "pfn", tmp_path).failed == ()


def test_links_are_not_followed(server, tmp_path):
    """A file, the folder paper/, or the whole submission, as a link to the reference."""
    (tmp_path / "quant.py").symlink_to(ROOT / "quant.py")
    (tmp_path / "paper").symlink_to(ROOT / "paper")
    assert graded(server, "zero", tmp_path).failed[0][0] == "quant.py is not there"
    assert graded(server, "pack", tmp_path).failed[0][0] == "paper/kvcache.py is not there"
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "in").symlink_to(ROOT)
    assert grade.points_of(grade.grade(server, tmp_path / "zip"))[0] == 0


def test_one_folder_in_the_submission_is_the_submission(server, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "PROBLEMS", PROBLEMS[:1])
    submission(tmp_path / "in")
    (tmp_path / "__MACOSX").mkdir()
    assert grade.points_of(grade.grade(server, tmp_path)) == (10, 10)


def test_values_as_bytes():
    value = [
        "x",
        1.5,
        None,
        True,
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3)},
        [np.array(3)],
        np.zeros((0, 4)),
    ]
    back = worker.decode(worker.encode(value))
    assert back[:4] == value[:4] and np.array_equal(back[4]["a"], value[4]["a"]) and back[5][0] == 3
    assert back[6].shape == (0, 4) and np.isinf(worker.decode(worker.encode([float("inf")]))[0])
    header = json.dumps({"array": ["|O", [1]]}).encode()
    for data in (
        b"",
        b"\0" * 7 + b"\2[]"[:1],
        len(header).to_bytes(8, "big") + header + b"12345678",
    ):
        with pytest.raises(ValueError):
            worker.decode(data)


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize("arguments, words", [
    ([], ["handout or grade"]),
    (["mark", "x"], ["mark"]),
    (["handout"], ["folder"]),
    (["handout", "{full}"], ["not an empty folder"]),
    (["handout", "{file}"], ["not an empty folder"]),
    (["grade"], ["FOLDER"]),
    (["grade", "{full}", "--class", "{full}"], ["FOLDER"]),
    (["grade", "{file}"], ["is not a folder"]),
    (["grade", "{full}/none"], ["is not a folder"]),
    (["grade", "--class", "{full}", "--csv", "{full}/../x.csv"], ["no folders in it"]),
    (["grade", "{full}", "--csv", "x.csv"], ["--csv"]),
    (["grade", "--class", "{full}", "--json", "x.json"], ["--json"]),
    (["grade", "{full}", "--json", "{full}/none/x.json"], ["cannot write"]),
])  # fmt: skip
def test_commands_that_are_refused(arguments, words, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    arguments = [
        a.format(full=tmp_path / "full", file=tmp_path / "full" / "file") for a in arguments
    ]
    refuse(arguments, words, capsys, command)
    assert os.listdir(tmp_path / "full") == ["file"]


def test_an_empty_folder_takes_a_handout(tmp_path):
    assert command.main(["handout", str(tmp_path)]) == 0 and (tmp_path / "README.md").is_file()
