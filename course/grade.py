"""Grade a submission, or a folder of them, with the public tests and the hidden ones.

Read top to bottom: a submission; its tests; the student's process; what is printed and written.

What this file does not do: it runs no line of a student's code in this process. worker.py does, in
another, and sends back values. The tests compare them here, so the student's process never sees a
test.
"""

import csv
import importlib
import io
import json
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from course import sandbox, values
from course.problems import BY_NAME, FILES, PROBLEMS
from support.cache import printable, save

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20  # for one process of the student, whose tests usually take 0.1 s for each function
REPLY_BYTES = 2**21
SOURCE_BYTES = 10**6

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
    """Return the Grade of each function of a submission. Raises ValueError if it is not clear where
    in the folder its files are."""
    folder = find_submission(folder)
    problems = [problem for problem in PROBLEMS if problem.functions]
    bar = tqdm(problems, desc="grading", unit="problem", leave=False, disable=disable)
    return [g for problem in bar for g in grade_problem(server, problem, folder)]


def find_submission(folder):
    """Return the one folder in `folder`, at any depth, that has some of the files, or `folder`
    itself if none has."""
    found = []
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        if any((here / name).exists() for name in FILES):
            found.append(here)
            continue
        inside = [path for path in here.iterdir() if path.is_dir() and path.name[0] not in "._"]
        waiting += [path for path in inside if not path.is_symlink()]
    if len(found) > 1:
        places = ", ".join(sorted(str(path.relative_to(folder)) for path in found))
        raise ValueError(f"more than one folder has the files: {places}")
    return found[0] if found else folder


def read_file(folder, name):
    """Return the bytes of a file of a submission. Raises OSError."""
    path = folder / name
    inside = folder.resolve() in path.resolve().parents  # a link may lead to the reference
    if not (path.is_file() and inside):
        raise FileNotFoundError(f"{name} is not there")
    if path.stat().st_size > SOURCE_BYTES:
        raise OSError(f"{name} is larger than 1 MB")
    return path.read_bytes()


def grade_problem(server, problem, folder):
    """Return the Grade of each function of a problem: all of its points if all of its tests pass,
    else none.

    A function passes beside the student's other functions of the problem, which may share a
    convention, or else alone among the reference's, so that a mistake in one costs no points of
    another. One that passes alone must not call itself by way of those that pass: of two functions
    that are written from each other, one has its points.
    """
    functions = problem.functions
    try:
        data = read_file(folder, functions[0].file)
    except OSError as error:
        outcomes = [("the file", one_line(str(error)))]
        return [to_grade(problem, function, outcomes) for function in functions]
    grades = run_tests(server, problem, data, functions, functions)
    for function in functions:
        if grades[function.name].points:
            continue
        grades |= run_tests(server, problem, data, [function], [function])
        if grades[function.name].points:
            passing = [f for f in functions if grades[f.name].points]
            beside = run_tests(server, problem, data, passing, [function])
            if any("RecursionError" in reason for _, reason in beside[function.name].failures):
                grades |= beside
    return list(grades.values())


# --------------------------------------------------------------------------------------------------
# Its tests


def tests_of(problem, function):
    """Return the name and the function of each test of a student's function, public tests first."""
    tests = []
    for package, suffix in (("checks", ""), ("hidden", " (hidden)")):
        module = importlib.import_module(f"course.{package}.problem{problem.number}")
        for name, test in vars(module).items():
            if name.startswith(f"test_{function.short_name}_"):
                tests.append((name + suffix, test))
    return tests


def run_tests(server, problem, data, taken, tested):
    """Return name -> Grade of the functions `tested`, with the student's functions `taken` among
    the reference's. `data` is the student's file. No test is run after one in which the student's
    process ends."""
    outcomes = {function.name: [] for function in tested}
    function = tested[0]
    name = "the file"
    try:
        with student_process(server) as ask:
            names = [f.name for f in taken]
            missing = ask(taken[0].file, [np.frombuffer(data, np.uint8), names])
            for function in tested:
                if reason := missing.get(function.name):
                    outcomes[function.name].append(("the file", one_line(reason)))
                    continue
                for name, test in tests_of(problem, function):
                    outcomes[function.name].append((name, failure(test, ask)))
    except ProcessGone as error:
        outcomes[function.name].append((name, str(error)))
    return {f.name: to_grade(problem, f, outcomes[f.name]) for f in tested}


def to_grade(problem, function, outcomes):
    """Return a Grade from the name of each test that was run and why it fails, or None."""
    failures = tuple((name, reason) for name, reason in outcomes if reason)
    passed = len(outcomes) - len(failures)
    tests = len(tests_of(problem, function))
    points = function.points if passed == tests else 0
    return Grade(problem.number, function.name, points, function.points, tests, passed, failures)


def failure(test, ask):
    """Return in one line why a test fails, and what it tests, or None if it passes. Raises
    ProcessGone."""
    try:
        test(lambda scenario, *arguments: ask(scenario.__name__, arguments))
    except ProcessGone:
        raise
    except Exception as error:  # a scenario or an assertion fails, or the value cannot be compared
        reason = one_line(str(error)) or type(error).__name__
        return f"{reason} [{one_line(test.__doc__)}]"


# --------------------------------------------------------------------------------------------------
# The student's process


class ProcessGone(Exception):
    """The student's process will not answer any more. The message says why."""


@contextmanager
def serving():
    """Run the server that forks students' processes, and yield the socket on which it listens.
    Raises RuntimeError if it does not start."""
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUSERBASE": site.getuserbase()}
    with tempfile.TemporaryDirectory(prefix="kvsink-grade-", ignore_cleanup_errors=True) as folder:
        given = write_given(Path(folder).resolve())
        environment |= {"HOME": folder, "TMPDIR": folder}
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                command = [sys.executable, "-W", "ignore", str(given / "worker.py")]
                command.append(str(theirs.fileno()))
                if not sandbox.why_unconfined():
                    command = [*sandbox.bubblewrap(given), *command, "nobody"]
                elif sandbox.nobody_can_run_python():
                    command.append("nobody")
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    cwd=folder,
                    start_new_session=True,
                )
            try:
                if not ours.recv(1):  # it has imported torch
                    raise RuntimeError("the student's process does not start: see course/README.md")
                ours.settimeout(SECONDS)
                yield ours
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def write_given(folder):
    """Write what the student's process imports to a folder in `folder`, and return it."""
    given = folder / "given"
    (given / "paper").mkdir(parents=True)
    for name in (*FILES, "paper/__init__.py"):
        shutil.copyfile(ROOT / name, given / name)
    for name in ("worker.py", "source.py", "values.py", "checks/scenarios.py"):
        shutil.copyfile(ROOT / "course" / name, given / Path(name).name)
    folder.chmod(0o755)  # for the user nobody
    return given


@contextmanager
def student_process(server):
    """Start a process of the student, and yield the function `ask(name, arguments)`, which returns
    what the process answers. Raises ProcessGone if it does not, RuntimeError for an exception
    there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ask_server(server, theirs)
        theirs.close()
        start = time.monotonic()
        timer = threading.Timer(SECONDS, ours.shutdown, [socket.SHUT_RDWR])
        timer.start()  # it ends whatever we wait for, to send or to receive
        connection = Connection(os.dup(ours.fileno()))

        def ask(name, arguments):
            try:
                connection.send_bytes(values.encode([name, arguments]))
                return value_of(connection.recv_bytes(REPLY_BYTES))
            except (EOFError, OSError):
                if time.monotonic() - start >= SECONDS:
                    raise ProcessGone(f"no answer in {SECONDS} seconds") from None
                cause = "exit, crash, or too much memory, time or output"
                raise ProcessGone(f"the process ended by itself: {cause}") from None

        try:
            yield ask
        finally:
            timer.cancel()
            connection.close()
            with suppress(ProcessGone):
                ask_server(server)


def ask_server(server, *connection):
    """Let the server fork a process that serves on the socket `connection` or, without one, end
    that process. Raises ProcessGone if it does not answer."""
    try:
        socket.send_fds(server, [b"."], [end.fileno() for end in connection])
        if server.recv(1):
            return
    except OSError:  # a timeout, too
        pass
    server.close()
    raise ProcessGone("the server of the student's processes has ended or does not answer")


def value_of(reply):
    """Return the value in a reply of worker.py. Raises RuntimeError, in one line, if it is an
    error, ProcessGone if it cannot be read."""
    try:
        reply = values.decode(reply)
        if "error" in reply:
            message = one_line(reply["error"])
            if printed := one_line(reply["printed"].strip().rpartition("\n")[2]):
                message += f" (printed: {printed})"
            raise RuntimeError(message)
        return reply["value"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProcessGone("an answer that cannot be read") from None


def one_line(text):
    """Make a student's text safe to print: one line, printable characters only."""
    return printable(" ".join(text.split()))[:400]


# --------------------------------------------------------------------------------------------------
# What is printed and written


def grade_one(folder, json_file):
    """Print the table of one submission, and write results.json unless `json_file` is None. Raises
    ValueError if it cannot be graded."""
    warn_if_unconfined()
    start = time.monotonic()
    try:
        with serving() as server:
            grades = grade(server, folder)
    except Exception as error:
        message = f"could not be graded: {one_line(str(error))}"
        if json_file:
            save(json_file, json.dumps({"score": 0, "output": message}).encode())
        raise ValueError(f"{printable(str(folder))} {message}") from error
    print_table(folder, grades)
    if json_file:
        results = gradescope(grades, time.monotonic() - start)
        save(json_file, json.dumps(results, indent=1).encode())


def grade_class(folder, csv_file):
    """Grade each folder in `folder`. After each, write one row for each so far to a CSV file, all
    or nothing. Whatever happens in a submission is its row. Raises OSError if the file could not be
    written in the end."""
    submissions = sorted(path for path in folder.iterdir() if path.is_dir())
    submissions = [path for path in submissions if not path.name.startswith(".")]
    if not submissions:
        raise ValueError(f"{folder} has no folders in it: --class takes one for each submission")
    warn_if_unconfined()
    numbers = [problem.number for problem in PROBLEMS if problem.functions]
    columns = [f"problem {number}" for number in numbers]
    rows = [["submission", *columns, "points", "of", "lost"]]
    for submission in tqdm(submissions, desc="grading", unit="submission", disable=None):
        try:
            with serving() as server:
                grades = grade(server, submission, disable=True)
            by_problem = [points_of(grades, number)[0] for number in numbers]
            lost = " ".join(g.name for g in grades if g.points < g.max_points)
            row = [*by_problem, *points_of(grades), lost]
        except Exception as error:
            reason = one_line(str(error)) or type(error).__name__
            row = [*[""] * (len(numbers) + 2), f"could not be graded: {reason}"]
        rows.append([cell(submission.name), *row])
        failed = None
        try:
            text = io.StringIO(newline="")
            csv.writer(text).writerows(rows)
            save(csv_file, text.getvalue().encode())
        except OSError as error:  # the disk may be full for a while
            failed = error
    if failed:
        raise failed
    print(f"wrote {csv_file}: {len(submissions)} submissions")


def cell(text):
    """Return a name that a spreadsheet does not take for a formula, in printable characters."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def warn_if_unconfined():
    if reason := sandbox.why_unconfined():
        print(f"submissions run unconfined (see course/README.md): {reason}", file=sys.stderr)


def points_of(grades, problem=None):
    """Return the points and the highest possible points, of one problem or of all."""
    grades = [g for g in grades if problem in (None, g.problem)]
    return sum(g.points for g in grades), sum(g.max_points for g in grades)


def print_table(folder, grades):
    written = [f"Problem {problem.number}" for problem in PROBLEMS if problem.written_points]
    points, max_points = points_of(grades)
    print(
        f"{printable(str(folder))}: {points} of {max_points} points, besides "
        f"{' and '.join(written)}, which are graded by hand"
    )
    for problem in PROBLEMS:
        if problem.functions:
            points, max_points = points_of(grades, problem.number)
            print(f"\nProblem {problem.number}, {problem.title}: {points} of {max_points}")
        for g in (g for g in grades if g.problem == problem.number):
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
    score, _ = points_of(grades)
    summary = {"score": score, "execution_time": round(seconds), "stdout_visibility": "hidden"}
    return {**summary, "tests": tests}
