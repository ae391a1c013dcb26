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
from course.problems import BY_NAME, FILES, PROBLEMS, WITHHELD
from tests.helpers import refuse
from tests.other_solutions import OTHER
from tests.wrong_solutions import WRONG

PROBLEM_OF = {function: problem for problem in PROBLEMS for function in problem.functions}


@pytest.fixture(scope="module")
def server():
    with grade.serving() as server:
        yield server


@pytest.fixture(scope="module")
def students_folder(tmp_path_factory):
    """A handout, as the command writes it."""
    folder = tmp_path_factory.mktemp("handout") / "kvsink"
    assert command.main(["handout", str(folder)]) == 0
    return folder


def submission(folder, files=None):
    """Write the reference as a submission. `files` has other texts for some of its files."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text((files or {}).get(name, (ROOT / name).read_text()))
    return folder


def graded(server, name, folder):
    function = BY_NAME[name]
    return grade.grade_function(server, PROBLEM_OF[function], function, folder)


# --------------------------------------------------------------------------------------------------
# The table and the tests


def test_points_and_tests():
    """All problems but the bonus have 100 points, 88 of them from the grader. Each function has
    public tests and hidden ones, and there are no other tests."""
    assert sum(problem.points for problem in PROBLEMS if not problem.bonus) == 100
    assert sum(function.points for function in BY_NAME.values()) == 88
    assert [problem.number for problem in PROBLEMS] == list(range(1, 9))
    for problem in PROBLEMS:
        tests = 0
        for function in problem.functions:
            names = [name for name, _ in grade.tests_of(problem, function)]
            assert not names[0].endswith("(hidden)"), function.name
            assert names[-1].endswith("(hidden)"), function.name
            tests += len(names)
        if problem.functions:
            paths = [f"course/{kind}/problem{problem.number}.py" for kind in ("checks", "hidden")]
            texts = [(ROOT / path).read_text() for path in paths]
            assert tests == sum(text.count("\ndef test_") for text in texts), problem.number
    assert handout.overview() in (ROOT / "course/README.md").read_text()


# --------------------------------------------------------------------------------------------------
# The handout


def public_tests(folder):
    """Run `python -m pytest` in a handout, and return its test cases."""
    report = folder.parent / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    pytest_command = [sys.executable, "-m", "pytest", *options]
    subprocess.run(pytest_command, cwd=folder, capture_output=True, timeout=120)
    return ElementTree.parse(report).findall(".//testcase")


def test_before_anything_is_solved_each_test_says_so(students_folder, tiny):
    """The handout's second command: all tests fail, by NotImplementedError. Its first command
    stops, and says so in one line."""
    cases = public_tests(students_folder)
    texts = [text for name, text in handout.files().items() if name.startswith("checks/test_")]
    assert len(cases) == sum(text.count("\ndef test_") for text in texts) > 50
    for case in cases:
        message = case.find("failure").get("message")
        assert message.startswith("NotImplementedError: Problem "), case.get("name")
    process = subprocess.run(
        [sys.executable, "eval_ppl.py", *tiny],
        cwd=students_folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("eval_ppl.py: Problem ")
    assert process.stderr.count("\n") == 1


def test_when_all_is_solved_each_test_passes(students_folder, tmp_path):
    shutil.copytree(students_folder, tmp_path / "solved")
    submission(tmp_path / "solved")
    assert all(case.find("failure") is None for case in public_tests(tmp_path / "solved"))


def test_a_handout_is_the_same_bytes_each_time(students_folder, tmp_path, capsys):
    assert command.main(["handout", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert "Quantizer.calibrate (quant.py)" in printed and str(tmp_path / "again") in printed
    for name, text in handout.files().items():
        assert (tmp_path / "again" / name).read_bytes() == text.encode(), name
        assert (students_folder / name).read_bytes() == text.encode(), name
    paths = [path for path in students_folder.rglob("*") if path.is_file()]
    names = {path.relative_to(students_folder).as_posix() for path in paths}
    assert {name for name in names if "__pycache__" not in name} == set(handout.files())


def test_a_handout_holds_no_solution_and_no_hidden_test(tmp_path, monkeypatch, capsys):
    texts = handout.files()
    assert handout.leaks(texts) == []
    for name in texts:
        assert not any(word in name for word in ("hidden", "course/", "wrong_solutions")), name
    reference = {name: (ROOT / name).read_text() for name in FILES}
    assert {function for function, *_ in handout.leaks(reference)} == set(BY_NAME)
    secret = (
        "def scale(lo, hi, n):\n    return torch.where(s>0, s, torch.where(lo==0, 1.0, lo.abs()))"
    )
    monkeypatch.setattr(handout, "files", lambda: {**texts, "support/text.py": secret})
    refuse(["handout", str(tmp_path / "leaky")], ["support/text.py", "scale"], capsys, command)
    assert not (tmp_path / "leaky").exists()


def test_a_handout_without_the_withheld_functions_would_give_solutions_away(monkeypatch):
    """A function that is withheld has to be: otherwise it is not in the table."""
    monkeypatch.setattr(handout, "WITHHELD", {})
    assert {function for function, *_ in handout.leaks(handout.files())} == {"decoder_block"}


def test_stubs_keep_what_a_student_needs(students_folder):
    """Signatures and docstrings stay, and all other functions do; the parts that would give a
    solution away are gone."""
    for name in FILES:
        reference = source.functions_of(ast.parse((ROOT / name).read_text()))
        stubs = source.functions_of(ast.parse((students_folder / name).read_text()))
        withheld = WITHHELD.get(name, {})
        assert reference.keys() == stubs.keys()
        for function, node in stubs.items():
            if function not in BY_NAME and function not in withheld:
                assert ast.dump(node) == ast.dump(reference[function]), function
                continue
            assert ast.dump(node.args) == ast.dump(reference[function].args)
            assert len(node.body) == 2
            whole = ast.get_docstring(reference[function])
            cut = function in BY_NAME and BY_NAME[function].cut_docstring
            assert ast.get_docstring(node) == (whole.split("\n\n")[0] if cut else whole)
    assert "decoder_block_pre_rope" in WITHHELD["kvsink.py"]


# --------------------------------------------------------------------------------------------------
# The grader: right and wrong


def test_a_class(students_folder, tmp_path):
    """The reference has all points, the untouched handout none, nor has an empty folder."""
    submission(tmp_path / "class" / "anna")
    (tmp_path / "class" / "bob").symlink_to(students_folder)
    (tmp_path / "class" / "zoe").mkdir()
    path = tmp_path / "grades.csv"
    assert command.main(["grade", "--class", str(tmp_path / "class"), "--csv", str(path)]) == 0
    anna, bob, zoe = csv.DictReader(path.open())
    assert anna["submission"] == "anna"
    assert (anna["points"], anna["of"], anna["lost"]) == ("88", "88", "")
    points = [anna[f"problem {i}"] for i in range(1, 7)]
    assert points == [str(problem.points) for problem in PROBLEMS[:6]]
    assert (bob["points"], zoe["points"]) == ("0", "0")
    assert "Quantizer.calibrate" in bob["lost"]


def test_the_printed_table_and_results_json(tmp_path, capsys, monkeypatch):
    """One right function, one that is missing, a file that does not parse, two that are not
    there."""
    monkeypatch.setattr(grade, "PROBLEMS", [PROBLEMS[0], PROBLEMS[3]])
    zero = "import torch\ndef zero(lo, s):\n    return -torch.round(lo / s)\n"
    (tmp_path / "quant.py").write_text(zero)
    (tmp_path / "kvsink.py").write_text("x = 1\ndef pfn(H, N:\n    return 0\n")
    path = tmp_path / "results.json"
    assert command.main(["grade", str(tmp_path), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 32 points" in printed
    assert "scale is not there" in printed
    assert "kvsink.py, line 2:" in printed
    assert "0 of 5 tests passed" in printed  # of quantize, which is not there
    results = json.loads(path.read_text())
    assert results["score"] == 2 == sum(test["score"] for test in results["tests"])
    for test in results["tests"]:
        assert test["status"] == ("passed" if test["score"] == test["max_score"] else "failed")
        assert (test["output"] == "") == (test["status"] == "passed")


# One wrong solution: the function, the error in words, the reference's text, the student's.
MISTAKES = [(name, *mistake) for name, mistakes in WRONG.items() for mistake in mistakes]


def test_the_table_of_wrong_solutions():
    """There are at least forty, and one for each function; each differs from the reference in one
    place, which exists."""
    assert len(MISTAKES) >= 40 and WRONG.keys() == BY_NAME.keys()
    for name, _, old, new in MISTAKES:
        assert right_function(name).count(old) == 1 and old != new, (name, old)


def right_function(name):
    """Return the text of a function of the reference."""
    text = (ROOT / BY_NAME[name].file).read_text()
    return ast.get_source_segment(text, source.functions_of(ast.parse(text))[name])


def wrong_file(name, old, new):
    """Return the text of the reference's file with one function wrong."""
    text = (ROOT / BY_NAME[name].file).read_text()
    right = right_function(name)
    return text.replace(right, right.replace(old, new))


@pytest.fixture(scope="module")
def wrong_grades(tmp_path_factory):
    """The grade of each wrong solution, two at a time."""
    grades = {}
    folder = tmp_path_factory.mktemp("wrong")

    def half(first):
        with grade.serving() as server:
            for i in range(first, len(MISTAKES), 2):
                name, _, old, new = MISTAKES[i]
                files = {BY_NAME[name].file: wrong_file(name, old, new)}
                grades[i] = graded(server, name, submission(folder / str(i), files))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, (0, 1)))
    return grades


@pytest.mark.parametrize(
    "i", range(len(MISTAKES)), ids=[f"{name}: {error}" for name, error, *_ in MISTAKES]
)
def test_a_wrong_solution_loses_its_points_and_no_others(i, wrong_grades):
    name, error, old, new = MISTAKES[i]
    found = wrong_grades[i]
    assert found.points == 0 and found.failures, f"{error}: not noticed"
    for _, reason in found.failures:
        assert not reason.startswith(("no answer", "the process ended", "an answer")), reason
    # Other files are the same, and so is what the grader makes of the other functions of this one.
    file = BY_NAME[name].file
    tree = ast.parse(wrong_file(name, old, new))
    for other in BY_NAME.values():
        if other.file == file and other.name != name:
            merged = source.merged((ROOT / file).read_text(), tree, [other.name])
            assert merged == merged_reference(other), other.name


@functools.cache
def merged_reference(function):
    text = (ROOT / function.file).read_text()
    return source.merged(text, ast.parse(text), [function.name])


def test_another_right_solution_has_all_points(server, tmp_path):
    """All functions in other words, with helpers, loops, keywords, lists for tuples; nothing else
    is in these files."""
    grades = grade.grade(server, submission(tmp_path, OTHER), disable=True)
    assert [(g.name, g.failures) for g in grades if g.failures] == []
    assert grade.points_of(grades) == (88, 88)


def test_helpers_of_a_students_own(server, tmp_path):
    """Imports, constants, functions and methods that an assigned function uses come along; what it
    does not use does not."""
    text = (ROOT / "quant.py").read_text()
    changes = {
        '"""Eq. 11: X\' = scale * (Q(X) - zero)."""\n    return s * (codes.to(s.dtype) - z)': (
            "return minus(codes.to(s.dtype), z, SIGN) * s"
        ),
        "        check_finite(X)\n": "        self.looked_at(X)\n",
        "    def calibrate": (
            "    def looked_at(self, X):\n        check_finite(X)\n\n    def calibrate"
        ),
        '"""Eq. 12': '"""\\ud800 Eq. 12',
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    text += "\nimport operator as op\nSIGN = -1\nBROKEN = 1 / 0\nimport nowhere\n"
    text += "def minus(a, b, sign):\n    return op.add(a, sign * b)\n"
    folder = submission(tmp_path, {"quant.py": text})
    for name in ("dequantize", "Quantizer.calibrate", "scale"):
        assert graded(server, name, folder).failures == (), name


# --------------------------------------------------------------------------------------------------
# The grader: hostile submissions

ZERO = "def zero(lo, s):\n    {}\n    return -torch.round(lo / s)\n"
PATCHES = (
    "import numpy, torch, pytest; "
    "numpy.isclose = numpy.allclose = torch.allclose = lambda *a, **k: numpy.array(True); "
)
FIND = """import os, sys, time
    frame = sys._getframe()
    while "connection" not in frame.f_locals: frame = frame.f_back
    connection = frame.f_locals["connection"]; """
HALF_A_REPLY = "os.write(connection.fileno(), b'\\0\\0\\1\\0half'); time.sleep(9)"

HOSTILE = [
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
    (FIND + HALF_A_REPLY, "no answer in 1 seconds"),
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
]
# Audit hooks do not see these; Landlock does.
SEND_SIGNAL = "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)"
if worker.landlock_version():
    HOSTILE += [
        ("torch.from_file({hidden!r}, size=9, dtype=torch.uint8)", "Permission denied"),
        ("torch.save(lo, {outside!r})", "RuntimeError"),
        ("import os; os.mkfifo({outside!r})", "PermissionError"),
    ]
if worker.landlock_version() >= 6:
    HOSTILE.append((SEND_SIGNAL, "PermissionError"))


def zero_with(tmp_path, line, top=""):
    """Write a submission whose `zero` runs this line first; `top` stands below the function."""
    text = "import torch\n" + ZERO.format(line) + top
    return submission(tmp_path / "in", {"quant.py": text})


@pytest.mark.parametrize("line, reason", HOSTILE)
def test_a_hostile_function_gets_nothing_and_harms_nothing(
    line, reason, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(grade, "SECONDS", 1 if reason.startswith("no answer") else 20)
    outside = tmp_path / "outside"
    paths = {
        "hidden": str(ROOT / "course/hidden/problem1.py"),
        "root": str(ROOT),
        "outside": str(outside),
    }
    for name, path in paths.items():
        line = line.replace(f"{{{name}!r}}", repr(path))
    found = graded(server, "zero", zero_with(tmp_path, line))
    assert found.points == 0 and reason in found.failures[0][1], found.failures
    assert not outside.exists() and np.isclose(1, 2) == False  # noqa: E712
    monkeypatch.setattr(grade, "SECONDS", 20)
    assert graded(server, "scale", submission(tmp_path / "next")).failures == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_a_repository_that_is_closed_cannot_be_read_by_native_code(tmp_path, monkeypatch):
    """Without Landlock, native code can be kept from the reference like this: root becomes
    nobody."""
    closed = Path(tempfile.mkdtemp())  # which others may not read
    (closed / "course").mkdir()
    monkeypatch.setattr(worker, "__file__", shutil.copy(worker.__file__, closed / "course"))
    line = "import os; assert os.getuid() == os.getgid() == 65534 and os.getgroups() == []"
    with grade.serving() as server:
        assert graded(server, "zero", zero_with(tmp_path, line)).failures == ()
    shutil.rmtree(closed)


def test_code_that_runs_on_import_is_not_taken_over(server, tmp_path):
    """A right function has its points, in a file that would end, patch, write and loop."""
    outside = tmp_path / "outside"
    top = f"torch.round = None\nopen({str(outside)!r}, 'w')\nraise SystemExit\nwhile True: pass\n"
    assert graded(server, "zero", zero_with(tmp_path, "", top)).failures == ()
    assert not outside.exists()


def test_a_flood_of_prints_does_no_harm(server, tmp_path):
    flood = "import os, sys\n    for i in range(20000): print('x' * 1000)"
    flood += "\n    os.write(1, b'x' * 10**6); print('x', file=sys.stderr)"
    assert graded(server, "zero", zero_with(tmp_path, flood)).failures == ()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("def zero(lo, s:\n", "quant.py, line 1"),
        ("\0", "quant.py"),
        ("(" * 5000, "quant.py"),
        ("-" * 500_000 + "1", "quant.py"),
        ("def zero(lo, s): return " + "-" * 2000 + "lo / s", "recursion"),
        ("x = 1\n" * 300_000, "larger than 1 MB"),
        ("def scale(lo, hi, n): pass\n", "zero is not there"),
        ("class zero: pass\n", "zero is not there"),
        ("async def zero(lo, s): return lo\n", "zero is not there"),
    ],
)
def test_files_that_cannot_be_read(text, reason, server, tmp_path):
    found = graded(server, "zero", submission(tmp_path, {"quant.py": text}))
    assert found.points == 0 and reason in found.failures[0][0]
    assert graded(server, "pfn", tmp_path).failures == ()


def test_links_are_not_followed(server, tmp_path):
    """A file, the folder paper/, or the whole submission, as a link to the reference."""
    (tmp_path / "quant.py").symlink_to(ROOT / "quant.py")
    (tmp_path / "paper").symlink_to(ROOT / "paper")
    assert graded(server, "zero", tmp_path).failures[0][0] == "quant.py is not there"
    assert graded(server, "pack", tmp_path).failures[0][0] == "paper/kvcache.py is not there"
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "in").symlink_to(ROOT)
    assert grade.points_of(grade.grade(server, tmp_path / "zip"))[0] == 0


def test_one_folder_in_the_submission_is_the_submission(server, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "PROBLEMS", PROBLEMS[:1])
    submission(tmp_path / "in")
    (tmp_path / "__MACOSX").mkdir()
    assert grade.points_of(grade.grade(server, tmp_path)) == (10, 10)


def test_values_as_bytes():
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = ["x", 1.5, None, True, {"a": numbers}, [np.array(3)], np.zeros((0, 4))]
    back = worker.decode(worker.encode(value))
    assert back[:4] == value[:4]
    assert np.array_equal(back[4]["a"], numbers) and back[5][0] == 3 and back[6].shape == (0, 4)
    assert np.isinf(worker.decode(worker.encode([float("inf")]))[0])
    header = json.dumps({"array": ["|O", [1]]}).encode()
    forged = len(header).to_bytes(8, "big") + header + b"12345678"
    for data in (b"", b"\0" * 7 + b"\2[]"[:1], forged):
        with pytest.raises(ValueError):
            worker.decode(data)


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize(
    "arguments, words",
    [
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
    ],
)
def test_commands_that_are_refused(arguments, words, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    arguments = [argument.format(full=full, file=full / "file") for argument in arguments]
    refuse(arguments, words, capsys, command)
    assert os.listdir(full) == ["file"]


def test_an_empty_folder_takes_a_handout(tmp_path):
    assert command.main(["handout", str(tmp_path)]) == 0 and (tmp_path / "README.md").is_file()
