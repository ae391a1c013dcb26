"""The course: the handout, and the grader on the reference, on wrong solutions and on hostile
ones."""

import ast
import csv
import ctypes
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from course import __main__ as command
from course import grade, handout, sandbox, values
from course.checks import first_look
from course.checks.compare import close, same
from course.grade import ROOT
from course.problems import BY_NAME, FILES, PROBLEMS, WITHHELD
from kvsink import PROMPTS
from llama import Llama, apply_rope, rope_table
from support import hub
from support.tokenizer import Tokenizer
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
    """Return the Grade of one function."""
    grades = grade.grade_problem(server, PROBLEM_OF[BY_NAME[name]], folder)
    return next(g for g in grades if g.name == name)


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
    expected = {*handout.files(), handout.PICTURE}
    assert {name for name in names if "__pycache__" not in name} == expected
    pictures = [folder / handout.PICTURE for folder in (students_folder, tmp_path / "again")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert pictures[0].read_bytes().startswith(b"\x89PNG")


def test_a_handout_names_no_file_that_it_does_not_have():
    texts = handout.files()
    names = {path.rpartition("/")[2] for path in (*texts, handout.PICTURE)}
    for path, text in texts.items():
        for name in re.findall(r"[\w/]+\.(?:py|md|png)\b", text):
            assert name.rpartition("/")[2] in names, (path, name)


def test_what_answers_problem_7_comes_later(capsys):
    texts = handout.files()
    assert command.main(["handout", "--part", "2"]) == 0
    part = capsys.readouterr().out
    assert "**Explain** (6 points). Where were you right" in part and "KVSink-1 with PFN-1" in part
    for words in ("Why does one text gain", "KVSink-1 with PFN-1", "KVSink-5 beats"):
        assert not any(words in " ".join(text.split()) for text in texts.values()), words


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
        reference = handout.functions_of(ast.parse((ROOT / name).read_text()))
        stubs = handout.functions_of(ast.parse((students_folder / name).read_text()))
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


def test_first_look_at_attention(tiny, monkeypatch, capsys):
    """Block 1 against NumPy: softmax of Q K^T, one head and one query at a time."""
    monkeypatch.setattr(hub, "DEFAULT_MODEL", tiny[1])
    with torch.no_grad():
        first_look.main()
        model = Llama.from_pretrained(tiny[1])
        d_k = model.config.head_dim
        tokens = Tokenizer.from_pretrained(tiny[1]).encode(PROMPTS[1])[:d_k]
        n = len(tokens)
        block = model.blocks[0]
        Q, K, _ = block.QKV(block.LN_mhsa(model.embedding(torch.tensor([tokens]))))
        rope = rope_table(model.config, n, "cpu")
        Q, K = (apply_rope(X, rope)[0].double().numpy() for X in (Q, K))
    drawn = np.zeros(n)
    for h, i in np.ndindex(len(Q), n):
        p = np.exp(K[h * len(K) // len(Q), : i + 1] @ Q[h, i] / np.sqrt(d_k))
        drawn[: i + 1] += p / p.sum() / n / len(Q)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(model.blocks) and f"of {n} tokens" in lines[0]
    largest = np.argsort(-drawn)[:3]
    found = re.findall(r"(\d+) \S+ +(\d+)%", lines[1].removeprefix("block  1"))
    assert [int(i) for i, _ in found] == largest.tolist()
    assert [int(p) for _, p in found] == [round(100 * drawn[i]) for i in largest]


# --------------------------------------------------------------------------------------------------
# The grader: right and wrong


def test_a_class(students_folder, tmp_path):
    """The reference has all points, the untouched handout none, nor has an empty folder. Whatever
    happens in a submission is its row, and the next begins; a name is no formula and one line."""
    folder = tmp_path / "class"
    submission(folder / "anna")
    (folder / "bob").symlink_to(students_folder)
    submission(folder / "two" / "a")
    submission(folder / "two" / "b")
    for name in ("=1+1", "new\nline", "es\x1b[2Jc"):
        (folder / name).mkdir()
    os.mkdir(os.fsencode(folder) + b"/\xff")
    path = tmp_path / "grades.csv"
    assert command.main(["grade", "--class", str(folder), "--csv", str(path)]) == 0
    rows = {row["submission"]: row for row in csv.DictReader(path.open(newline=""))}
    names = ["'=1+1", "anna", "bob", "es\\x1b[2Jc", "new\\nline", "two", "\\udcff"]
    assert list(rows) == names
    anna = rows["anna"]
    assert (anna["points"], anna["of"], anna["lost"]) == ("88", "88", "")
    points = [anna[f"problem {i}"] for i in range(1, 7)]
    assert points == [str(problem.points) for problem in PROBLEMS[:6]]
    assert {rows[name]["points"] for name in names if name not in ("anna", "two")} == {"0"}
    assert "Quantizer.calibrate" in rows["bob"]["lost"]
    two = "could not be graded: more than one folder has the files: a, b"
    assert (rows["two"]["points"], rows["two"]["lost"]) == ("", two)


def test_a_class_when_the_disk_is_full(tmp_path, monkeypatch, capsys):
    """If the CSV file cannot be written for a while, nothing is lost; if it cannot in the end, the
    command says so, and an older file is still there. A submission for which there is no room has
    its row."""
    monkeypatch.setattr(grade, "PROBLEMS", PROBLEMS[:1])
    for name in "ab":
        submission(tmp_path / "class" / name)
    path = tmp_path / "grades.csv"
    full = OSError(errno.ENOSPC, "No space left on device")
    write = grade.save
    with monkeypatch.context() as patched:
        patched.setattr(grade, "save", Mock(side_effect=[full, None]))
        assert command.main(["grade", "--class", str(tmp_path / "class"), "--csv", str(path)]) == 0
        rows = grade.save.call_args.args[1].decode().splitlines()
        assert [row.split(",")[:2] for row in rows[1:]] == [["a", "10"], ["b", "10"]]
    path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(grade, "save", Mock(side_effect=full))
        arguments = ["grade", "--class", str(tmp_path / "class"), "--csv", str(path)]
        refuse(arguments, ["No space left"], capsys, command)
    assert path.read_text() == "old"
    with monkeypatch.context() as patched:
        patched.setattr(grade, "write_given", Mock(side_effect=full))
        assert command.main(["grade", "--class", str(tmp_path / "class"), "--csv", str(path)]) == 0
    assert path.read_text().count("could not be graded: [Errno 28] No space left on device") == 2
    assert grade.save is write and sorted(os.listdir(tmp_path)) == ["class", "grades.csv"]


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
    assert "scale is not in quant.py" in printed
    assert "kvsink.py stops: SyntaxError" in printed and "kvsink.py, line 2" in printed
    assert "0 of 5 tests passed" in printed  # of quantize, which is not there
    results = json.loads(path.read_text())
    assert results["score"] == 2 == sum(test["score"] for test in results["tests"])
    for test in results["tests"]:
        assert test["status"] == ("passed" if test["score"] == test["max_score"] else "failed")
        assert (test["output"] == "") == (test["status"] == "passed")


def test_a_submission_that_cannot_be_graded_has_a_results_json(tmp_path, capsys):
    for name in "ab":
        submission(tmp_path / "in" / name)
    path = tmp_path / "results.json"
    refuse(["grade", str(tmp_path / "in"), "--json", str(path)], ["more than one"], capsys, command)
    results = json.loads(path.read_text())
    assert results["score"] == 0 and "more than one folder has the files" in results["output"]


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
    return ast.get_source_segment(text, handout.functions_of(ast.parse(text))[name])


def wrong_file(name, old, new):
    """Return the text of the reference's file with one function wrong."""
    text = (ROOT / BY_NAME[name].file).read_text()
    right = right_function(name)
    return text.replace(right, right.replace(old, new))


@pytest.fixture(scope="module")
def wrong_grades(tmp_path_factory):
    """The grades of the problem of each wrong solution, two solutions at a time."""
    grades = {}
    folder = tmp_path_factory.mktemp("wrong")

    def half(first):
        with grade.serving() as server:
            for i in range(first, len(MISTAKES), 2):
                name, _, old, new = MISTAKES[i]
                files = {BY_NAME[name].file: wrong_file(name, old, new)}
                there = submission(folder / str(i), files)
                grades[i] = grade.grade_problem(server, PROBLEM_OF[BY_NAME[name]], there)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, (0, 1)))
    return grades


@pytest.mark.parametrize(
    "i", range(len(MISTAKES)), ids=[f"{name}: {error}" for name, error, *_ in MISTAKES]
)
def test_a_wrong_solution_loses_its_points_and_no_others(i, wrong_grades):
    name, error, *_ = MISTAKES[i]
    assert [g.name for g in wrong_grades[i] if g.points < g.max_points] == [name], error
    (found,) = (g for g in wrong_grades[i] if g.failures)
    assert found.points == 0
    for _, reason in found.failures:
        assert not reason.startswith(("no answer", "the process ended", "an answer")), reason


def test_another_right_solution_has_all_points(server, tmp_path):
    """All functions in other words, with helpers, loops, keywords, lists for tuples; nothing else
    is in these files."""
    grades = grade.grade(server, submission(tmp_path, OTHER), disable=True)
    assert [(g.name, g.failures) for g in grades if g.failures] == []
    assert grade.points_of(grades) == (88, 88)


def test_functions_that_share_a_convention_pass(server, tmp_path):
    """`scores` asks its own `slices` for one more thing, which the reference's does not have."""
    text = (ROOT / "paper/kvcache.py").read_text()
    text = text.replace("def slices(packed, bits):", "def slices(packed, bits, more=False):")
    more = "list(slices(self.codes, self.quantizer.bits, more=True))\n        "
    dequantized = "K = list(self.dequantized())"
    text = text.replace(dequantized, more + dequantized)
    grades = grade.grade_problem(
        server, PROBLEMS[5], submission(tmp_path, {"paper/kvcache.py": text})
    )
    assert grade.points_of(grades) == (14, 14)


def test_of_functions_that_are_written_from_each_other_one_loses(server, tmp_path):
    """`unpack` joins the slices and `slices` cuts what is unpacked: each passes among the
    reference's, but one of them is not solved. If `slices` is wrong, `unpack` keeps its points."""
    text = (ROOT / "paper/kvcache.py").read_text()
    cyclic = """
def unpack(packed, bits):
    return torch.cat([codes for _, codes in slices(packed, bits)], -1).to(torch.uint8)

def slices(packed, bits):
    codes = unpack(packed, bits).int()
    step = codes.shape[-1] // (4 if planes(bits)[-1] > 1 else 8)
    for i in range(0, codes.shape[-1], step):
        yield slice(i, i + step), codes[..., i : i + step]
"""
    files = {"paper/kvcache.py": text + cyclic}
    grades = grade.grade_problem(server, PROBLEMS[5], submission(tmp_path / "both", files))
    assert [g.name for g in grades if not g.points] == ["unpack"]
    assert "RecursionError" in grades[2].failures[0][1]
    files = {"paper/kvcache.py": text + cyclic.replace("i + step]", "i + step] + 1")}
    grades = grade.grade_problem(server, PROBLEMS[5], submission(tmp_path / "wrong", files))
    assert [g.name for g in grades if not g.points] == ["slices"]


# A student's file with a right `zero`; {} is the place for a line of its own.
RIGHT = [
    "from math import *\nfrom torch import *\ndef zero(lo, s):\n    return -round(lo / s)\n",
    "try:\n    import numpy as np\nexcept ImportError:\n    np = None\n{zero}",
    "try:\n    import no_such_package\nexcept ImportError:\n    pass\n{zero}",
    "T = {{}}\nT['a'] = -1\ndef zero(lo, s): return T['a'] * torch.round(lo / s)\n",
    "ONE = 0\nONE -= 1\ndef zero(lo, s): return ONE * torch.round(lo / s)\n",
    "zero = lambda lo, s: -torch.round(lo / s)\n",
    "import functools\n@functools.wraps(print)\ndef zero(lo, s): return -torch.round(lo / s)\n",
    "def sum(x): return -torch.round(x)\ndef zero(lo, s): return sum(lo / s)\n",
    "\ufeff{zero}",
    "X = f'a\u00a0{{1}}'\n{zero}",
    "".join(f"name_{i} = {i}\n" for i in range(20_000)) + "{zero}" + "#" * 600_000,
    "{zero}\nraise SystemExit\n",
    "{zero}\n1 / 0\n",
    "if __name__ == '__main__':\n    raise SystemExit\n{zero}",
    "def zero(lo, s): return 0\n{zero}",
    "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    x: int = -1\n"
    "def zero(lo, s): return Mine().x * torch.round(lo / s)\n",
]
ANNOTATED = """from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from numpy import ndarray
import torch
def zero(lo: ndarray, s: ndarray) -> ndarray: return -torch.round(lo / s)
"""


@pytest.mark.parametrize("i", range(len(RIGHT) + 1))
def test_a_file_is_run_as_python_runs_it(i, server, tmp_path):
    right = "def zero(lo, s):\n    return -torch.round(lo / s)\n"
    text = ANNOTATED if i == len(RIGHT) else "import torch\n" + RIGHT[i].format(zero=right)
    if text.startswith("import torch\n\ufeff"):
        text = "\ufeff" + text.replace("\ufeff", "")
    found = graded(server, "zero", submission(tmp_path, {"quant.py": text}))
    assert found.failures == ()


def test_helpers_of_a_students_own(server, tmp_path):
    """Imports, constants, functions and methods that an assigned function uses come along."""
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
    text += "\nimport operator as op\nSIGN = -1\n"
    text += "def minus(a, b, sign):\n    return op.add(a, sign * b)\n"
    folder = submission(tmp_path, {"quant.py": text})
    for name in ("dequantize", "Quantizer.calibrate", "scale"):
        assert graded(server, name, folder).failures == (), name


# --------------------------------------------------------------------------------------------------
# What a failing test says


@pytest.mark.parametrize(
    "check, actual, expected, message",
    [
        (same, np.arange(60) < 40, np.arange(60) < 41, "X: at [40] it is False, not True"),
        (same, [1, [2, 3]], [1, [2, 4]], "X: at [1, 1] it is 3, not 4"),
        (same, [[1], [2]], [[1], [2, 3]], "X: at [1] it has 1 items, not 2"),
        (same, 0.1, 0.1 + 1e-12, "X: 0.10000000000000001, not 0.100000000001"),
        (close, np.zeros((2, 3)), np.zeros((2, 1, 3)), "axis 1 was dropped"),
        (close, np.zeros((2, 3)), np.zeros((3, 2)), "X: shape (2, 3), not (3, 2)"),
        (close, np.float64([1e9 + 3000]), [1e9 - 9000], "X: at [0] it is 1e+09, not 9.99991e+08"),
        (close, np.float64([1 + 2e-7]), [1 - 2e-7], "X: at [0] it is 1.0000002, not 0.9999998"),
    ],
)
def test_a_difference_is_named(check, actual, expected, message):
    options = {"rtol": 1e-8, "atol": 0} if check is close else {}
    with pytest.raises(AssertionError) as error:
        check(actual, expected, "X", **options)
    assert message in str(error.value)


def test_a_failing_hidden_test_says_what_it_checks(server, tmp_path):
    """And all others do: each has a docstring of a sentence."""
    found = graded(server, "zero", zero_with(tmp_path, "return torch.clamp(-lo / s, 0).round()"))
    hidden = [reason for name, reason in found.failures if name.endswith("(hidden)")]
    assert "Eq. 13 gives whole numbers, on either side of 0 and not clamped" in hidden[0]
    for function, problem in PROBLEM_OF.items():
        assert all(test.__doc__ for _, test in grade.tests_of(problem, function))


# --------------------------------------------------------------------------------------------------
# The grader: hostile submissions

confined = pytest.mark.skipif(bool(sandbox.why_unconfined()), reason="needs bubblewrap")

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
RIGHTS = (
    "import os; status = open('/proc/self/status').read(); "
    "assert os.getuid() == os.getgid() == os.geteuid() == 65534 and not os.getgroups(); "
    "assert 'CapEff:\\t' + 16 * '0' in status and 'CapPrm:\\t' + 16 * '0' in status; 1 / 0"
)

# A line of `zero`, and how its first test fails: none gets its points.
HOSTILE = [
    ("while True: pass", "no answer in 1 seconds"),
    ("import time; time.sleep(99)", "no answer in 1 seconds"),
    ("import sys; sys.exit(0)", "SystemExit"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("raise MemoryError", "MemoryError"),
    ("return zero(lo, s)", "RecursionError"),
    ("import os; os._exit(0)", "the process ended"),
    ("x = [open('/dev/null') for _ in range(99)]", "Too many open files"),
    ("import os, signal; signal.raise_signal(signal.SIGSEGV)", "the process ended"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "no answer in 1 seconds"),
    ("bytearray(2**34)", "MemoryError"),
    (PATCHES + "return lo", "zero: at [0]"),
    ("return lambda: 0", "TypeError"),
    ("return object()", "TypeError"),
    ("return [[[]] * 3] * 200_000", "the process ended"),  # over 2 MiB of nested lists
    ("x = []\n    for i in range(5000): x = [x]\n    return x", "RecursionError"),
    ("return torch.zeros(2**22)", "the process ended"),
    ("return torch.zeros(0, 7)", "shape (0, 7)"),
    ("return lo + float('nan')", "zero: at [0] it is nan"),
    (FIND + "connection.send_bytes(b'garbage')", "an answer that cannot be read"),
    (FIND + "connection.send_bytes(b'[' * 10**6)", "an answer that cannot be read"),
    (FIND + "connection.send_bytes(b'9' * 10**5)", "an answer that cannot be read"),
    (FIND + "connection.send_bytes(b'{{\"value\": 3}}')", "zero: not a tensor"),
    (FIND + HALF_A_REPLY, "no answer in 1 seconds"),
    (FIND + "os.write(connection.fileno(), b'\\x7f' * 8); time.sleep(9)", "the process ended"),
    ("open('big', 'wb').write(bytes(2**22))", "Error"),
    ("import course.hidden.problem1", "ModuleNotFoundError"),
]
# What the sandbox refuses. (The first four hold without it, too, but for root.)
CONFINED = [
    ("import os; os.fork()", "BlockingIOError"),
    ("import subprocess; subprocess.run(['true'])", "BlockingIOError"),
    ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
    ("import resource; resource.setrlimit(resource.RLIMIT_NPROC, (9, 9))", "ValueError"),
    (RIGHTS, "ZeroDivisionError"),
    ("open({hidden!r}).read()", "FileNotFoundError"),
    ("torch.from_file({hidden!r}, size=9, dtype=torch.uint8)", "RuntimeError"),
    ("import os; raise OSError(os.listdir({root!r}))", "OSError: []"),
    ("import os; raise OSError(os.listdir('/home'))", "FileNotFoundError"),
    ("open('/etc/shadow')", "FileNotFoundError"),
    ("open({outside!r}, 'w').write('x')", "FileNotFoundError"),
    ("import os; os.mkdir({outside!r})", "FileNotFoundError"),
    ("import os; os.symlink({outside!r}, str(id(lo))); open(str(id(lo)), 'w')", "Error: [Errno"),
    ("torch.save(lo, {outside!r})", "RuntimeError"),
    ("import sys; open(sys.path[0] + '/quant.py', 'a')", "Error: [Errno"),
    ("import sys; open(sys.prefix + '/lib/x', 'w')", "Read-only file system"),
    ("open('/x', 'w')", "Read-only file system"),
    ("open('/dev/shm/x', 'w')", "Read-only file system"),
    ("import os; os.mkfifo('/usr/x')", "Read-only file system"),
    (
        "for i in range(40): open(f'/tmp/{{i}}', 'wb').write(bytes(10**6))",
        "No space left on device",
    ),
    ("import socket; socket.create_connection(('127.0.0.1', {port}))", "ConnectionRefused"),
    ("import socket; socket.create_connection(('1.1.1.1', 53), 2)", "Network is unreachable"),
    ("import os; os.kill({pid}, 9)", "ProcessLookupError"),
    ("import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)", "ProcessLookupError"),
    ("import resource; resource.prlimit({pid}, resource.RLIMIT_CPU)", "ProcessLookupError"),
    ("import os, signal; signal.pidfd_send_signal(os.pidfd_open({pid}), 9)", "ProcessLookup"),
    ("import os; os.setuid(0)", "Error: [Errno"),
    ("import os; os.chroot('/tmp')", "PermissionError"),
    ("import ctypes; assert ctypes.CDLL(None).unshare(0x20000) == 0", "AssertionError"),
    ("import ctypes; assert ctypes.CDLL(None).mount(0, b'/tmp', b'tmpfs', 0, 0) == 0", "Assertion"),
    ("import __main__; __main__.FORBIDDEN = (); open({hidden!r})", "FileNotFoundError"),
]


def zero_with(tmp_path, line, top=""):
    """Write a submission whose `zero` runs this line first; `top` stands below the function."""
    text = "import torch\n" + ZERO.format(line) + top
    return submission(tmp_path / "in", {"quant.py": text})


def check_hostile(line, reason, server, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "SECONDS", 1 if reason.startswith("no answer") else 20)
    outside = tmp_path / "outside"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found = graded(
            server,
            "zero",
            zero_with(
                tmp_path,
                line.format(
                    hidden=str(ROOT / "course/hidden/problem1.py"),
                    root=str(ROOT),
                    outside=str(outside),
                    pid=os.getpid(),
                    port=listening.getsockname()[1],
                ),
            ),
        )
    assert found.points == 0 and reason in found.failures[0][1], found.failures
    assert not outside.exists() and np.isclose(1, 2) == False  # noqa: E712
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19
    monkeypatch.setattr(grade, "SECONDS", 20)
    assert graded(server, "scale", submission(tmp_path / "next")).failures == ()


@pytest.mark.parametrize("line, reason", HOSTILE)
def test_a_hostile_function_gets_nothing_and_harms_nothing(
    line, reason, server, tmp_path, monkeypatch
):
    check_hostile(line, reason, server, tmp_path, monkeypatch)


@confined
@pytest.mark.parametrize("line, reason", CONFINED)
def test_the_sandbox_refuses(line, reason, server, tmp_path, monkeypatch):
    check_hostile(line, reason, server, tmp_path, monkeypatch)


SEGMENT = "import ctypes; libc = ctypes.CDLL(None); id = libc.shmget(777, 4096, {flags}); "


@confined
def test_a_sandbox_leaves_nothing_behind(tmp_path):
    """Not a segment of shared memory, a file or a process: the next submission finds none of what
    this one made, and the grader's folder for it is gone."""
    folders = set(Path(tempfile.gettempdir()).glob("kvsink-grade-*"))
    make = SEGMENT.format(flags="0o1666") + "assert id >= 0; import os; "
    make += "os.makedirs('/tmp/mine', exist_ok=True); os.chmod('/tmp/mine', 0)"
    look = SEGMENT.format(flags="0") + "assert id < 0; import os; assert not os.listdir('/tmp')"
    look = look.replace("os.listdir('/tmp')", "os.path.exists('/tmp/mine')")
    for line in (make, look):
        with grade.serving() as server:
            assert graded(server, "zero", zero_with(tmp_path, line)).failures == ()
    assert set(Path(tempfile.gettempdir()).glob("kvsink-grade-*")) == folders
    assert ctypes.CDLL(None).shmget(777, 4096, 0) == -1


@confined
def test_a_function_that_ends_its_server_costs_its_own_submission_only(tmp_path, monkeypatch):
    """What was graded before has its points: also `zero`, which is right, if it lives on to answer;
    the next submission has all."""
    monkeypatch.setattr(grade, "PROBLEMS", [PROBLEMS[2], PROBLEMS[0]])
    kill = "import os, signal; os.kill(os.getppid(), 9); signal.pause()"  # its sandbox ends, too
    stop = "import os; os.kill(os.getppid(), 19)"
    for name, line in (("a", kill), ("b", stop)):
        files = {"quant.py": "import torch\n" + ZERO.format(line)}
        submission(tmp_path / "class" / name, files)
    submission(tmp_path / "class" / "c")
    monkeypatch.setattr(grade, "SECONDS", 6)
    path = tmp_path / "grades.csv"
    assert command.main(["grade", "--class", str(tmp_path / "class"), "--csv", str(path)]) == 0
    assert [row["points"] for row in csv.DictReader(path.open())] == ["16", "18", "26"]


@confined
def test_a_python_that_nobody_may_read_is_a_reason_to_run_unconfined(tmp_path, monkeypatch):
    """Otherwise right answers would lose their points to a ModuleNotFoundError."""
    package = Mock(origin=str(tmp_path / "torch.py"))  # not in the sandbox
    monkeypatch.setattr(sandbox, "find_spec", lambda name: package)
    sandbox.why_unconfined.cache_clear()
    assert sandbox.why_unconfined().startswith("FileNotFoundError")
    monkeypatch.undo()
    sandbox.why_unconfined.cache_clear()
    assert sandbox.why_unconfined() == ""


def test_without_bubblewrap(tmp_path, monkeypatch, capfd):
    """The grader says in one line that submissions run unconfined; root becomes nobody if that user
    can run Python."""
    monkeypatch.setattr(grade, "PROBLEMS", PROBLEMS[:1])
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.why_unconfined.cache_clear()
    user = os.getuid() or (65534 if sandbox.nobody_can_run_python() else 0)
    line = f"import os; assert os.getuid() == {user}"
    text = (
        (ROOT / "quant.py")
        .read_text()
        .replace("    return -torch.round", f"    {line}\n    return -torch.round")
    )
    folder = submission(tmp_path / "in", {"quant.py": text})
    assert command.main(["grade", str(folder)]) == 0
    monkeypatch.undo()
    sandbox.why_unconfined.cache_clear()
    printed = capfd.readouterr()
    assert "10 of 10 points" in printed.out
    assert printed.err.count("\n") == 1 and "submissions run unconfined" in printed.err


def test_a_flood_of_prints_does_no_harm(server, tmp_path):
    flood = "import os, sys\n    for i in range(20000): print('x' * 1000)"
    flood += "\n    os.write(1, b'x' * 10**6); print('x', file=sys.stderr)"
    assert graded(server, "zero", zero_with(tmp_path, flood)).failures == ()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("def zero(lo, s:\n", "quant.py, line 1"),
        ("\0", "null bytes"),
        ("(" * 5000, "quant.py stops"),
        ("-" * 500_000 + "1", ""),
        ("X = " + "7" * 5000, "Exceeds the limit (4300 digits)"),
        ("X = " + "1 +" * 100_000 + "1", ""),
        ("def zero(lo, s): return " + "-" * 2000 + "lo / s", ""),
        ("x = 1\n" * 300_000, "larger than 1 MB"),
        ("def scale(lo, hi, n): pass\n", "zero is not in quant.py"),
        ("class zero: pass\n", "TypeError"),
        ("async def zero(lo, s): return lo\n", "TypeError"),
        ("while True: pass\n", "no answer in 1 seconds"),
        ("import os; os._exit(0)\n", "the process ended"),
        ("import sys; sys.modules['quant'] = 3\nsys.path.clear()\n", ""),
        (b"\xff\xfei\0m\0p\0o\0r\0t\0 \0o\0s\0", "the file is in UTF-16: save it in UTF-8"),
        (b"# \xe9\n", "invalid or missing encoding declaration"),
        ("def helper(): raise ValueError('mine')\nhelper()\n", "line 1: def helper"),
    ],
)
def test_files_that_cannot_be_run(text, reason, server, tmp_path, monkeypatch):
    """Their functions have no points, and the reason says why the file stops."""
    monkeypatch.setattr(grade, "SECONDS", 1 if reason.startswith("no answer") else 20)
    folder = submission(tmp_path)
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "quant.py").write_bytes(data)
    found = graded(server, "zero", folder)
    assert found.points == 0 and reason in " ".join(found.failures[0])
    monkeypatch.setattr(grade, "SECONDS", 20)
    assert graded(server, "pfn", tmp_path).failures == ()


def test_links_are_not_followed(server, tmp_path):
    """A file, the folder paper/, or the whole submission, as a link to the reference."""
    (tmp_path / "quant.py").symlink_to(ROOT / "quant.py")
    (tmp_path / "paper").symlink_to(ROOT / "paper")
    assert graded(server, "zero", tmp_path).failures[0][1] == "quant.py is not there"
    assert graded(server, "pack", tmp_path).failures[0][1] == "paper/kvcache.py is not there"
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "in").symlink_to(ROOT)
    assert grade.points_of(grade.grade(server, tmp_path / "zip"))[0] == 0


def test_the_folder_with_the_files_is_found(tmp_path):
    """At any depth, and beside others, if there is one."""
    deep = tmp_path / "in/a b/c/kvsink"
    submission(deep)
    for name in ("in/__MACOSX", "in/.git", "in/a b/notes", "in/a b/c/kvsink/old"):
        (tmp_path / name).mkdir()
    submission(deep / "old")
    submission(tmp_path / "in/__MACOSX")
    assert grade.find_submission(tmp_path / "in") == deep
    assert grade.find_submission(deep) == deep
    assert grade.find_submission(tmp_path / "in/a b/notes") == tmp_path / "in/a b/notes"
    submission(tmp_path / "in/a b/notes")
    with pytest.raises(ValueError, match="more than one folder has the files: a b/c/kvsink, a b/n"):
        grade.find_submission(tmp_path / "in")


def test_a_nest_of_folders(tmp_path):
    """1,200 folders, one in the other, are walked through; paths that are too long are an
    OSError, which is a row."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert grade.find_submission(tmp_path) == tmp_path
    path = tmp_path / ("d/" * 1199) / "d"
    (path / "quant.py").touch()
    assert grade.find_submission(tmp_path) == path
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest could not


def test_values_as_bytes():
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = ["x", 1.5, None, True, {"a": numbers}, [np.array(3)], np.zeros((0, 4))]
    back = values.decode(values.encode(value))
    assert back[:4] == value[:4]
    assert np.array_equal(back[4]["a"], numbers) and back[5][0] == 3 and back[6].shape == (0, 4)
    assert np.isinf(values.decode(values.encode([float("inf")]))[0])
    with pytest.raises(TypeError):
        values.encode(object())
    good = {"array": "<f4", "shape": [1], "data": "AAAAAA=="}
    assert values.decode(json.dumps(good).encode()) == [0]
    bad = [
        b"",
        b"[",
        b"[" * 10**5,
        b"9" * 5000,
        b"\xff",
        *(
            json.dumps({**good, **change}).encode()
            for change in (
                {"array": "|O"},
                {"array": 3},
                {"shape": [2]},
                {"shape": [10**30]},
                {"shape": "x"},
                {"data": 1},
                {"data": "AAA"},
            )
        ),
        b'{"array": "<f4"}',
    ]
    for data in bad:
        with pytest.raises(ValueError):
            values.decode(data)


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["handout or grade"]),
        (["mark", "x"], ["mark"]),
        (["handout"], ["FOLDER"]),
        (["handout", "{full}/new", "--part", "2"], ["FOLDER, or --part 2"]),
        (["handout", "--part", "3"], ["3"]),
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
