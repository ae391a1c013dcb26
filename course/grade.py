"""Grades a submission, or a folder of them, with the public tests and the hidden ones.

Read top to bottom: what the student's process gets; the process; the tests; a submission; what is printed and written.

What this file does not do: it runs no line of a student's in this process. worker.py does, and what it sends back is
compared here, with tests that the student's process has never seen. Each function is graded alone: the reference has the
place of all others, so that one that is wrong costs no point of another.
"""

import csv
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from course import source, worker
from course.problems import BY_NAME, FILES, PROBLEMS

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS = 10  # a test
CPU_SECONDS = 60  # all tests of a function
REPLY_BYTES = 2**26

# ---------------------------------------------------------------------------------------------------------------------
# What the student's process gets


def sources(function, folder):
    """File name -> text: the reference, in which one function is that of the submission in `folder`.
    Raises ValueError, in one line, where the submission has no such function."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    texts[function.file] = source.merged(texts[function.file], source.parsed(folder / function.file), function.name)
    texts["paper/__init__.py"] = ""
    texts["scenarios.py"] = (ROOT / "course/checks/scenarios.py").read_text(encoding="utf-8")
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# The process


class Failed(Exception):
    """A test that failed in the student's process, and why, in one line."""


@contextmanager
def serving():
    """The server that forks students' processes, as long as it is needed: the socket on which it listens."""
    ours, theirs = socket.socketpair()
    wanted = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    environment = {**wanted, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, worker.__file__, str(theirs.fileno())]
    with ours, theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        yield ours
    process.wait()


@contextmanager
def student(server, texts):
    """A process of the student's: the function `run(scenario, *arguments)` of the tests."""
    with tempfile.TemporaryDirectory(prefix="kvsink-grade-") as folder:
        folder = Path(folder).resolve()
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        ours, theirs = socket.socketpair()
        request = json.dumps({"folder": str(folder), "seconds": CPU_SECONDS}).encode()
        with theirs:
            socket.send_fds(server, [request], [theirs.fileno()])
        pid = int(server.recv(64))
        connection = Connection(ours.detach())
        try:
            yield lambda scenario, *arguments: ask(connection, scenario, arguments)
        finally:
            connection.close()
            server.send(json.dumps({"end": pid}).encode())
            server.recv(64)


def ask(connection, scenario, arguments):
    """What the scenario returns in the student's process. Raises Failed; EOFError or TimeoutError where that process is
    of no use any more."""
    try:
        connection.send_bytes(worker.encode([scenario.__name__, arguments]))
        if not connection.poll(TEST_SECONDS):
            raise TimeoutError(f"no answer in {TEST_SECONDS} seconds")
        reply = worker.decode(connection.recv_bytes(REPLY_BYTES))
    except (EOFError, ConnectionError):
        raise EOFError("the process ended by itself: exit, too much memory or time, or a crash") from None
    except (ValueError, OSError) as error:
        if isinstance(error, TimeoutError):
            raise
        raise EOFError(f"an answer that cannot be read ({type(error).__name__})") from None
    if not isinstance(reply, dict) or "value" not in reply:
        raise Failed(reply.get("error") if isinstance(reply, dict) else "an answer that cannot be read")
    return reply["value"]


# ---------------------------------------------------------------------------------------------------------------------
# The tests


def tests_of(problem, function):
    """The tests of a function: pairs of its name, and it. Public ones first."""
    found = []
    for kind, package in (("", "checks"), (" (hidden)", "hidden")):
        module = importlib.import_module(f"course.{package}.problem{problem.number}")
        named = [(name, test) for name, test in vars(module).items() if name.startswith(f"test_{function.short}_")]
        found += [(name + kind, test) for name, test in named if test.__module__ == module.__name__]
    return found


def reason(test, run):
    """Why a test fails, in one line; None where it passes."""
    try:
        test(run)
    except (EOFError, TimeoutError):
        raise
    except Failed as error:
        return str(error)
    except Exception as error:  # what came back is not what the test can compare
        what = " ".join((test.__doc__ or "").split())
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return f"{said} [{what}]"


# ---------------------------------------------------------------------------------------------------------------------
# A submission


class Grade(NamedTuple):
    """Of one function."""

    problem: int
    name: str
    points: int
    of: int
    tests: int
    failed: tuple[tuple[str, str], ...]  # test and reason


def grade_function(server, problem, function, folder):
    """All its points when all tests pass, none otherwise."""
    tests, failed = tests_of(problem, function), []
    try:
        texts = sources(function, folder)
    except ValueError as error:
        return Grade(problem.number, function.name, 0, function.points, len(tests), ((str(error), ""),))
    with student(server, texts) as run:
        for name, test in tests:
            try:
                if why := reason(test, run):
                    failed.append((name, why))
            except (EOFError, TimeoutError) as error:  # nothing more to be had from this process
                failed.append((name, str(error)))
                break
    return Grade(
        problem.number, function.name, 0 if failed else function.points, function.points, len(tests), tuple(failed)
    )


def grade(server, folder, disable=None):
    """The Grade of each function of a submission."""
    every = [(problem, function) for problem in PROBLEMS for function in problem.functions]
    bar = tqdm(every, desc=folder.name[:30], unit="function", leave=False, disable=disable)
    return [grade_function(server, *pair, folder) for pair in bar]


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and written


def points_of(grades, number=None):
    """Points and how many there are, of a problem or of all."""
    chosen = [g for g in grades if number in (None, g.problem)]
    return sum(g.points for g in chosen), sum(g.of for g in chosen)


def print_table(folder, grades):
    hand = " and ".join(f"Problem {problem.number}" for problem in PROBLEMS if problem.by_hand)
    print(
        f"{folder}: {points_of(grades)[0]} of {points_of(grades)[1]} points, besides {hand}, which are graded by hand"
    )
    for problem in PROBLEMS:
        own = [g for g in grades if g.problem == problem.number]
        if own:
            print(f"\nProblem {problem.number}, {problem.title}: {points_of(own)[0]} of {points_of(own)[1]}")
        for g in own:
            print(f"  {g.name:<22}{g.points:>3} of {g.of:<4}{g.tests - len(g.failed)} of {g.tests} tests passed")
            for name, why in g.failed:
                print(f"      {name}{': ' if why else ''}{why}")


def gradescope(grades, seconds):
    """What Gradescope reads from results.json."""
    tests = [
        {
            "name": f"Problem {g.problem}: {g.name} ({BY_NAME[g.name].file})",
            "score": g.points,
            "max_score": g.of,
            "status": "passed" if g.points == g.of else "failed",
            "output": "\n".join(f"{name}: {why}" if why else name for name, why in g.failed),
        }
        for g in grades
    ]
    return {
        "score": points_of(grades)[0],
        "execution_time": round(seconds),
        "stdout_visibility": "hidden",
        "tests": tests,
    }


def grade_one(folder, file):
    """Prints the table of one submission, and writes results.json where `file` is given."""
    start = time.monotonic()
    with serving() as server:
        grades = grade(server, folder)
    print_table(folder, grades)
    if file:
        file.write_text(json.dumps(gradescope(grades, time.monotonic() - start), indent=1), encoding="utf-8")


def grade_class(folder, file):
    """Grades each folder in `folder`, and writes a row of each to a CSV file as it is done."""
    submissions = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    numbers = [problem.number for problem in PROBLEMS if problem.functions]
    with serving() as server, open(file, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["submission", *(f"problem {number}" for number in numbers), "points", "of", "lost"])
        for submission in tqdm(submissions, desc="grading", unit="submission", disable=None):
            grades = grade(server, submission, disable=True)
            lost = " ".join(g.name for g in grades if g.points < g.of)
            rows.writerow([submission.name, *(points_of(grades, n)[0] for n in numbers), *points_of(grades), lost])
            out.flush()
    print(f"wrote {file}: {len(submissions)} submissions")
