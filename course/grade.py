"""Grade a submission, or a folder of them, with the public tests and the hidden ones.

Read top to bottom: a submission; its tests; the student's process; what is printed and written.

What this file does not do: it runs no line of a student's code in this process. worker.py does, in
another, and sends back values. The tests compare them here, so the student's process never sees a
test.
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
SECONDS = 20  # for all tests of one function, which usually take 0.1 s
REPLY_BYTES = 2**26

# --------------------------------------------------------------------------------------------------
# A submission


class Grade(NamedTuple):
    """The grade of one function."""

    problem: int
    name: str
    points: int
    max_points: int
    tests: int
    passed: int  # of these tests
    failures: tuple[tuple[str, str], ...]  # name of a test, and why it failed


def grade(server, folder, disable=None):
    """Return the Grade of each function of a submission: the folder or, as archives have it, the
    one folder in it."""
    if not any((folder / name).exists() for name in FILES):
        inside = [path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"]
        if len(inside) == 1 and not inside[0].is_symlink():
            folder = inside[0]
    functions = [(problem, function) for problem in PROBLEMS for function in problem.functions]
    bar = tqdm(functions, desc=folder.name[:30], unit="function", leave=False, disable=disable)
    return [grade_function(server, problem, function, folder) for problem, function in bar]


def grade_function(server, problem, function, folder):
    """Return the Grade of one function: all of its points if all of its tests pass, else none.

    The function is graded alone, among the reference's versions of all others, so that a mistake in
    one function costs no points of another. If it fails, retry with the student's other functions
    of this problem, which may share a convention.
    """
    tests = tests_of(problem, function)
    outcomes = []
    try:
        outcomes = run_tests(server, files_with([function], folder), tests)
        if len(outcomes) == len(tests) and any(reason for _, reason in outcomes):
            again = run_tests(server, files_with(problem.functions, folder), tests)
            if not any(reason for _, reason in again):
                outcomes = again
    except (Absent, RecursionError) as error:  # ast.unparse recurses, so nesting is limited
        outcomes = outcomes or [(str(error), "it has no points")]
    failures = tuple((name, reason) for name, reason in outcomes if reason)
    return Grade(
        problem=problem.number,
        name=function.name,
        points=0 if failures else function.points,
        max_points=function.points,
        tests=len(tests),
        passed=len(outcomes) - len(failures),
        failures=failures,
    )


def files_with(functions, folder):
    """Return file name -> text: the reference's files, in which these functions, all of one file,
    are replaced by the submission's. Raises Absent if the submission in `folder` lacks one."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    file = functions[0].file
    tree = source.parse_file(folder, file)
    texts[file] = source.merged(texts[file], tree, [function.name for function in functions])
    texts["paper/__init__.py"] = ""
    texts["scenarios.py"] = (ROOT / "course/checks/scenarios.py").read_text(encoding="utf-8")
    return texts


# --------------------------------------------------------------------------------------------------
# Its tests


def tests_of(problem, function):
    """Return the name and the function of each test of a student's function, public tests first."""
    tests = []
    for package, suffix in (("checks", ""), ("hidden", " (hidden)")):
        module = importlib.import_module(f"course.{package}.problem{problem.number}")
        for name, test in vars(module).items():
            defined_here = getattr(test, "__module__", None) == module.__name__
            if name.startswith(f"test_{function.short_name}_") and defined_here:
                tests.append((name + suffix, test))
    return tests


def run_tests(server, texts, tests):
    """Return the name of each test, and why it fails, or None if it passes. Stop after the test in
    which the student's process ends."""
    outcomes = []
    with student_process(server, texts) as run:
        for name, test in tests:
            try:
                outcomes.append((name, failure(test, run)))
            except ProcessGone as error:
                outcomes.append((name, str(error)))
                break
    return outcomes


def failure(test, run):
    """Return in one line why a test fails, or None if it passes. Raises ProcessGone."""
    try:
        test(run)
    except ProcessGone:
        raise
    except ScenarioFailed as error:
        return str(error)
    except Exception as error:  # an assertion fails, or the test cannot compare the value
        message = one_line(str(error)) or type(error).__name__
        return f"{message} [{one_line(test.__doc__ or '')}]"


# --------------------------------------------------------------------------------------------------
# The student's process


class ScenarioFailed(Exception):
    """A scenario raised an exception in the student's process. The message is one line."""


class ProcessGone(Exception):
    """The student's process will not answer any more. The message says why."""


@contextmanager
def serving():
    """Run the server that forks students' processes, and yield the socket on which it listens."""
    if not worker.landlock_version():
        print(
            "no Landlock on this system: native code could reach files; see course/README.md",
            file=sys.stderr,
        )
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-W", "ignore", worker.__file__, str(theirs.fileno())]
    with ours:
        with theirs:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True
            )
        try:
            yield ours
        finally:
            ours.close()  # the server then ends
            process.wait()


@contextmanager
def student_process(server, texts):
    """Start a process that has the files `texts`, and yield the function
    `run(scenario, *arguments)` that the tests call."""
    with tempfile.TemporaryDirectory(prefix="kvsink-grade-") as folder:
        folder = Path(folder).resolve()
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pid = fork(server, folder, theirs)
            theirs.close()
            start = time.monotonic()
            timer = threading.Timer(SECONDS, ours.shutdown, [socket.SHUT_RDWR])
            timer.start()  # it ends whatever we wait for, to send or to receive
            connection = Connection(os.dup(ours.fileno()))

            def run(scenario, *arguments):
                try:
                    return ask(connection, scenario, arguments)
                except (EOFError, OSError):
                    if time.monotonic() - start >= SECONDS:
                        raise ProcessGone(f"no answer in {SECONDS} seconds") from None
                    cause = "exit, crash, or too much memory or time"
                    raise ProcessGone(f"the process ended by itself: {cause}") from None

            try:
                yield run
            finally:
                timer.cancel()
                connection.close()
                server.send(json.dumps({"end": pid}).encode())
                server.recv(64)


def fork(server, folder, connection):
    """Let the server fork a process that serves on the socket `connection`. Return its id."""
    request = json.dumps({"folder": str(folder), "seconds": SECONDS}).encode()
    socket.send_fds(server, [request], [connection.fileno()])
    if not (pid := server.recv(64)):
        raise RuntimeError(
            "the server of the students' processes did not start: can torch be imported?"
        )
    return int(pid)


def ask(connection, scenario, arguments):
    """Return what the scenario returns in the student's process. Raises ScenarioFailed if it raises
    there, ProcessGone if the answer cannot be read, EOFError or OSError if the process has
    ended."""
    connection.send_bytes(worker.encode([scenario.__name__, arguments]))
    data = connection.recv_bytes(REPLY_BYTES)
    try:
        reply = worker.decode(data)
        if "error" in reply:
            message = one_line(reply["error"])
            if printed := one_line(reply["printed"].strip().rpartition("\n")[2]):
                message += f" (printed: {printed})"
            raise ScenarioFailed(message)
        return reply["value"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProcessGone("an answer that cannot be read") from None


def one_line(text):
    """Make a student's text safe to print: one line, printable characters only."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]


# --------------------------------------------------------------------------------------------------
# What is printed and written


def grade_one(folder, json_file):
    """Print the table of one submission, and write results.json unless `json_file` is None."""
    start = time.monotonic()
    with serving() as server:
        grades = grade(server, folder)
    print_table(folder, grades)
    if json_file:
        results = gradescope(grades, time.monotonic() - start)
        json_file.write_text(json.dumps(results, indent=1), encoding="utf-8")


def grade_class(folder, csv_file):
    """Grade each folder in `folder`. Write one row for each to a CSV file, as soon as it is
    graded."""
    submissions = sorted(path for path in folder.iterdir() if path.is_dir())
    submissions = [path for path in submissions if not path.name.startswith(".")]
    if not submissions:
        raise ValueError(
            f"{folder} has no folders in it: --class takes a folder with one for each submission"
        )
    numbers = [problem.number for problem in PROBLEMS if problem.functions]
    columns = [f"problem {number}" for number in numbers]
    with serving() as server, open(csv_file, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["submission", *columns, "points", "of", "lost"])
        for submission in tqdm(submissions, desc="grading", unit="submission", disable=None):
            grades = grade(server, submission, disable=True)
            by_problem = [points_of(grades, number)[0] for number in numbers]
            lost = " ".join(g.name for g in grades if g.points < g.max_points)
            rows.writerow([submission.name, *by_problem, *points_of(grades), lost])
            file.flush()
    print(f"wrote {csv_file}: {len(submissions)} submissions")


def points_of(grades, problem=None):
    """Return the points and the highest possible points, of one problem or of all."""
    grades = [g for g in grades if problem in (None, g.problem)]
    return sum(g.points for g in grades), sum(g.max_points for g in grades)


def print_table(folder, grades):
    written = [f"Problem {problem.number}" for problem in PROBLEMS if problem.written_points]
    points, max_points = points_of(grades)
    print(
        f"{folder}: {points} of {max_points} points, besides {' and '.join(written)}, which are "
        "graded by hand"
    )
    for problem in PROBLEMS:
        if problem.functions:
            points, max_points = points_of(grades, problem.number)
            print(f"\nProblem {problem.number}, {problem.title}: {points} of {max_points}")
        for g in grades:
            if g.problem == problem.number:
                print_grade(g)


def print_grade(g):
    points = f"{g.points:>3} of {g.max_points:<4}"
    print(f"  {g.name:<22}{points}{g.passed} of {g.tests} tests passed")
    for name, reason in g.failures:
        print(f"      {name}: {reason}")


def gradescope(grades, seconds):
    """Return what Gradescope reads from results.json."""
    tests = [
        {
            "name": f"Problem {g.problem}: {g.name} ({BY_NAME[g.name].file})",
            "score": g.points,
            "max_score": g.max_points,
            "status": "passed" if g.points == g.max_points else "failed",
            "output": "\n".join(f"{name}: {reason}" for name, reason in g.failures),
        }
        for g in grades
    ]
    return {
        "score": points_of(grades)[0],
        "execution_time": round(seconds),
        "stdout_visibility": "hidden",
        "tests": tests,
    }
