"""Grades a submission, or a folder of them, with the public tests and the hidden ones.

Read top to bottom: what the student's process gets; the process; the tests; a submission; what is
printed and written.

What this file does not do: it runs no line of a student's in this process. worker.py does, and what
it sends back is compared here, with tests that the student's process has never seen.

Each function is graded alone: the reference has the place of all others, so that one that is wrong
costs no point of another. Where that fails, it is tried with the student's other functions of its
problem: each of two may be right, and both use another of the two than the reference's do.
"""

import csv
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from course import source, worker
from course.problems import BY_NAME, FILES, PROBLEMS
from course.source import Absent

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20  # for all tests of a function, which take a tenth of one
REPLY_BYTES = 2**26

# --------------------------------------------------------------------------------------------------
# What the student's process gets


def sources(functions, folder):
    """File name -> text: the reference, in which these functions of one file are those of the
    submission in `folder`. Raises Absent where the submission has no such function."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    file = functions[0].file
    tree = source.parsed(folder, file)
    texts[file] = source.merged(texts[file], tree, [function.name for function in functions])
    texts["paper/__init__.py"] = ""
    texts["scenarios.py"] = (ROOT / "course/checks/scenarios.py").read_text(encoding="utf-8")
    return texts


# --------------------------------------------------------------------------------------------------
# The process


class Failed(Exception):
    """A scenario that raised an exception in the student's process, in one line."""


class Gone(Exception):
    """A process of which nothing more is to be had, and why."""


@contextmanager
def serving():
    """The server that forks students' processes, as long as it is needed: the socket on which it
    listens."""
    if not worker.landlock_version():
        print(
            "no Landlock on this system: native code could get at files; see course/README.md",
            file=sys.stderr,
        )
    ours, theirs = socket.socketpair()
    wanted = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ
    }
    environment = {
        **wanted,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-W", "ignore", worker.__file__, str(theirs.fileno())]
    with ours:
        with theirs:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
            )
        try:
            yield ours
        finally:
            ours.close()  # which ends it
            process.wait()


@contextmanager
def student(server, texts):
    """A process of the student's, with these files: the function `run(scenario, *arguments)` of the
    tests."""
    with tempfile.TemporaryDirectory(prefix="kvsink-grade-") as folder:
        folder = Path(folder).resolve()
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            request = json.dumps({"folder": str(folder), "seconds": SECONDS}).encode()
            socket.send_fds(server, [request], [theirs.fileno()])
            theirs.close()
            if not (pid := server.recv(64)):
                raise RuntimeError(
                    "the server of the students' processes did not start: does torch import?"
                )
            timer, start = (
                threading.Timer(SECONDS, ours.shutdown, [socket.SHUT_RDWR]),
                time.monotonic(),
            )
            timer.start()  # whatever we wait for, to send or to receive, ends then
            connection = Connection(os.dup(ours.fileno()))

            def run(scenario, *arguments):
                try:
                    return ask(connection, scenario, arguments)
                except (EOFError, OSError):
                    late = time.monotonic() - start >= SECONDS
                    by_itself = (
                        "the process ended by itself: exit, crash, or too much memory or time"
                    )
                    raise Gone(f"no answer in {SECONDS} seconds" if late else by_itself) from None

            try:
                yield run
            finally:
                timer.cancel()
                connection.close()
                server.send(json.dumps({"end": int(pid)}).encode())
                server.recv(64)


def ask(connection, scenario, arguments):
    """What the scenario returns in the student's process. Raises Failed where it raises there, Gone
    where the answer is none, EOFError or OSError where there is no process any more."""
    connection.send_bytes(worker.encode([scenario.__name__, arguments]))
    data = connection.recv_bytes(REPLY_BYTES)
    try:
        reply = worker.decode(data)
        if "error" in reply:
            printed = one_line(reply["printed"].strip().rpartition("\n")[2])
            raise Failed(one_line(reply["error"]) + (f" (printed: {printed})" if printed else ""))
        return reply["value"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Gone("an answer that cannot be read") from None


def one_line(text):
    """A student's text, as a terminal may show it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]


# --------------------------------------------------------------------------------------------------
# The tests


def tests_of(problem, function):
    """The tests of a function: pairs of its name, and it. Public ones first."""
    found = []
    for kind, package in (("", "checks"), (" (hidden)", "hidden")):
        module = importlib.import_module(f"course.{package}.problem{problem.number}")
        named = [
            (name, test)
            for name, test in vars(module).items()
            if name.startswith(f"test_{function.short}_")
        ]
        found += [(name + kind, test) for name, test in named if test.__module__ == module.__name__]
    return found


def reason(test, run):
    """Why a test fails, in one line; None where it passes. Raises Gone."""
    try:
        test(run)
    except Gone:
        raise
    except Failed as error:
        return str(error)
    except (
        Exception
    ) as error:  # an assertion; or what came back is nothing that the test can compare
        said = one_line(str(error)) or type(error).__name__
        return f"{said} [{one_line(test.__doc__ or '')}]"


# --------------------------------------------------------------------------------------------------
# A submission


class Grade(NamedTuple):
    """Of one function."""

    problem: int
    name: str
    points: int
    of: int
    tests: int
    passed: int  # of them
    failed: tuple[tuple[str, str], ...]  # test and reason


def tried(server, texts, tests):
    """Of each test its name, and why it fails or None: up to the one after which the process is
    gone."""
    found = []
    with student(server, texts) as run:
        for name, test in tests:
            try:
                found.append((name, reason(test, run)))
            except Gone as error:
                return [*found, (name, str(error))]
    return found


def grade_function(server, problem, function, folder):
    """All its points when all tests pass, none otherwise."""
    tests, found = tests_of(problem, function), []
    try:
        found = tried(server, sources([function], folder), tests)
        if len(found) == len(tests) and any(why for _, why in found):
            again = tried(server, sources(problem.functions, folder), tests)
            found = found if any(why for _, why in again) else again
    except (Absent, RecursionError) as error:  # or code nested too deeply to be written down again
        found = found or [(str(error), "it has no points")]
    failed = tuple((name, why) for name, why in found if why)
    points = 0 if failed else function.points
    return Grade(
        problem.number,
        function.name,
        points,
        function.points,
        len(tests),
        len(found) - len(failed),
        failed,
    )


def grade(server, folder, disable=None):
    """The Grade of each function of a submission: of the folder, or of the one folder in it, as
    archives have it."""
    if not any((folder / name).exists() for name in FILES):
        inside = [path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"]
        folder = inside[0] if len(inside) == 1 and not inside[0].is_symlink() else folder
    every = [(problem, function) for problem in PROBLEMS for function in problem.functions]
    bar = tqdm(every, desc=folder.name[:30], unit="function", leave=False, disable=disable)
    return [grade_function(server, *pair, folder) for pair in bar]


# --------------------------------------------------------------------------------------------------
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
            print(
                f"\nProblem {problem.number}, {problem.title}: {points_of(own)[0]} of {points_of(own)[1]}"
            )
        for g in own:
            print(f"  {g.name:<22}{g.points:>3} of {g.of:<4}{g.passed} of {g.tests} tests passed")
            for name, why in g.failed:
                print(f"      {name}: {why}")


def gradescope(grades, seconds):
    """What Gradescope reads from results.json."""
    tests = [
        {
            "name": f"Problem {g.problem}: {g.name} ({BY_NAME[g.name].file})",
            "score": g.points,
            "max_score": g.of,
            "status": "passed" if g.points == g.of else "failed",
            "output": "\n".join(f"{name}: {why}" for name, why in g.failed),
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
        file.write_text(
            json.dumps(gradescope(grades, time.monotonic() - start), indent=1), encoding="utf-8"
        )


def grade_class(folder, file):
    """Grades each folder in `folder`, and writes a row of each to a CSV file as it is done."""
    submissions = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not submissions:
        raise ValueError(
            f"{folder} has no folders in it: --class takes a folder with one for each submission"
        )
    numbers = [problem.number for problem in PROBLEMS if problem.functions]
    with serving() as server, open(file, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(
            ["submission", *(f"problem {number}" for number in numbers), "points", "of", "lost"]
        )
        for submission in tqdm(submissions, desc="grading", unit="submission", disable=None):
            grades = grade(server, submission, disable=True)
            lost = " ".join(g.name for g in grades if g.points < g.of)
            rows.writerow(
                [
                    submission.name,
                    *(points_of(grades, n)[0] for n in numbers),
                    *points_of(grades),
                    lost,
                ]
            )
            out.flush()
    print(f"wrote {file}: {len(submissions)} submissions")
