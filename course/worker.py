"""The student's process: one function is the student's, all others are the reference's, and there
is no test in it.

Read top to bottom: the server; the process that it forks; what that process may not do; values as
bytes.

What this file does not do: it judges nothing. grade.py sends the name of a scenario
(checks/scenarios.py) and its arguments, and gets back plain values or the text of an exception.
The values are not pickled, because a student's code makes them.

`python course/worker.py FD` is the server. It imports torch once and forks a process for each
function, which then starts in milliseconds. It guards against accidents and plain tricks; only a
container guards against a determined attacker (README.md).
"""

import ctypes
import io
import json
import math
import os
import pathlib
import resource
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

import numpy as np
import safetensors  # noqa: F401  for llama.py: imported once, in the server
import torch

# --------------------------------------------------------------------------------------------------
# The server


def serve(control):
    """Answer messages, which are JSON, until grade.py hangs up. {"folder", "seconds"} comes with a
    socket: fork a process that serves on it, and answer with its id. {"end": id}: end that process
    and all that it started."""
    torch.set_num_threads(1)
    while True:
        message, fds, _, _ = socket.recv_fds(control, 4096, 1)
        if not message:
            return
        request = json.loads(message)
        if "end" in request:
            for kill in (os.killpg, os.kill):
                with suppress(ProcessLookupError):
                    kill(request["end"], signal.SIGKILL)
            os.waitpid(request["end"], 0)
            control.send(b"done")
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            control.close()
            try:
                become_student(Connection(fds[0]), request["folder"], request["seconds"])
            finally:
                os._exit(0)
        os.close(fds[0])
        control.send(str(pid).encode())


# --------------------------------------------------------------------------------------------------
# The process

NOBODY = 65534  # the user who owns nothing
REPOSITORY = os.path.dirname(os.path.dirname(os.path.realpath(__file__))) + os.sep


def become_student(connection, folder, seconds):
    """Give up every right that this forked process does not need, and serve scenarios."""
    closed = not os.stat(REPOSITORY).st_mode & 0o007  # gradescope/setup.sh closes it to others
    if os.geteuid() == 0 and closed:
        os.chown(folder, NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.chdir(folder)
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder, *(path for path in sys.path if path and os.path.realpath(path) != here)]
    os.environ.update(HOME=folder, TMPDIR=folder)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    limit(seconds)
    if landlock_version():
        landlock(folder)
    guard(folder)
    serve_scenarios(connection, folder)


def serve_scenarios(connection, folder):
    """Run scenarios until grade.py hangs up. A reply is {"value": ...}, or {"error": one line,
    "printed": the last output}."""
    output = LastOutput()
    sys.stdout = output
    sys.stderr = output
    while True:
        try:
            name, arguments = decode(connection.recv_bytes())
        except EOFError:
            return
        try:
            import scenarios  # which imports the student's function

            with torch.no_grad():
                reply = {"value": getattr(scenarios, name)(*arguments)}
            data = encode(reply)
        except BaseException as error:  # sys.exit too
            data = encode({"error": describe(error, folder), "printed": output.last})
        connection.send_bytes(data)


class LastOutput(io.TextIOBase):
    """A stream for stdout and stderr that remembers only the last characters, so that a flood of
    them takes time but no memory."""

    last = ""

    def write(self, text):
        self.last = (self.last + text[-300:])[-300:]
        return len(text)


def describe(error, folder):
    """Return an exception in one line: its type, its message, and the line of the student's file
    that it came from."""
    message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if f.filename.startswith(folder + os.sep)]
    frames = [f for f in frames if not f.filename.endswith("scenarios.py")]
    if frames and not isinstance(error, NotImplementedError):
        message += f" (at: {frames[-1].line})"
    return message


# --------------------------------------------------------------------------------------------------
# What the process may not do

FORBIDDEN = (
    "socket.", "subprocess.", "ctypes.", "gc.", "pty.", "os.system", "os.exec", "os.fork",
    "os.posix_spawn", "os.spawn", "os.kill", "signal.pthread_kill", "resource.", "sys.addaudithook",
    "os.putenv", "os.unsetenv", "sqlite3.",
)  # fmt: skip
FILE_CHANGES = (
    "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod",
    "os.chown", "os.truncate", "os.utime", "os.setxattr", "os.removexattr", "os.chdir",
    "os.chflags",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Other types that name a path may name another one when they are asked again.
PATHS = (str, bytes, pathlib.PosixPath)


def limit(seconds):
    """Limit CPU time, memory and file size, and forbid core dumps."""
    with suppress(OSError), open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])  # the address space that torch has taken
        memory = pages * resource.getpagesize() + 2**31
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def package_folders(folder):
    """Return the folders that hold Python and its packages; `folder` is the student's."""
    paths = [path for path in sys.path if path != folder]
    paths = [sys.prefix, sys.base_prefix, *paths, "/usr", "/lib"]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths if os.path.isdir(path)))


def landlock_version():
    """Return the version of Landlock, by which the kernel guards files (Linux 5.13 and newer), or
    0."""
    if sys.platform != "linux":
        return 0
    # landlock_create_ruleset, asked for its version
    return max(0, ctypes.CDLL(None).syscall(444, None, 0, 1))


def landlock(folder):
    """Let the kernel forbid this process, native code included, to change files outside `folder`,
    and to read files outside it and the folders of Python and its packages. Newer kernels also
    refuse TCP (version 4) and signals to other processes (version 6)."""
    libc = ctypes.CDLL(None)
    version = landlock_version()
    # Kinds of access, one bit each: versions 2 and 3 added one.
    everything = 2 ** (13 + (version >= 2) + (version >= 3)) - 1
    refused = struct.pack("=QQQ", everything, 0b11, 0b11)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(444, refused[:size], size, 0)  # landlock_create_ruleset
    # torch asks what the processor can do.
    processor = ("/sys/devices/system/cpu", "/proc/cpuinfo")
    for path in filter(os.path.exists, (folder, *package_folders(folder), *processor)):
        # to execute, to read files and, of a folder, to list it
        reading = 0b1101 if os.path.isdir(path) else 0b0101
        access = everything if path == folder else reading
        parent = os.open(path, os.O_PATH)
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", access, parent), 0)  # landlock_add_rule
        os.close(parent)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which the next call is refused
    if libc.syscall(446, ruleset, 0):  # landlock_restrict_self
        raise OSError("Landlock refuses")
    os.close(ruleset)


def guard(folder):
    """Let Python's audit hooks forbid this process what `landlock` forbids, and also to start and
    end processes and to open sockets."""
    may_read, may_write = path_checks(folder)
    isdir = os.path.isdir  # a student's function may replace it in `os`

    def may_open(path, mode, flags):
        writes = set(mode or "") & set("wax+") or (flags or 0) & WRITING
        is_folder = type(path) is not int and isdir(path)
        return may_write(path) if writes or is_folder else may_read(path)

    def hook(event, arguments):
        if event == "open":
            allowed = may_open(*arguments)
        elif event in ("os.listdir", "os.scandir"):
            allowed = may_read(arguments[0] or ".")
        elif event in FILE_CHANGES:
            paths = [x for x in arguments if type(x) not in (int, float, tuple, type(None))]
            allowed = all(may_write(path) for path in paths)
        else:
            allowed = not event.startswith(FORBIDDEN)
        if not allowed:
            raise PermissionError(f"{event} {arguments[:1]} is not allowed while grading")

    sys.addaudithook(hook)


def path_checks(folder):
    """Return two functions of a path: whether the process may read it, and whether it may write
    it."""
    realpath = os.path.realpath  # a student's function may replace these two in `os`
    fsdecode = os.fsdecode
    writable = (realpath(folder) + os.sep,)
    readable = writable + tuple(path + os.sep for path in package_folders(folder))
    # Packages may lie in the repository, in a virtual environment.
    packages_inside = tuple(path for path in readable if path.startswith(REPOSITORY))

    def within(path, roots):
        if type(path) not in PATHS:
            return type(path) is int  # the number of an open file
        return path == os.devnull or (realpath(fsdecode(path)) + os.sep).startswith(roots)

    def may_read(path):
        if within(path, packages_inside):
            return True
        return within(path, readable) and not within(path, REPOSITORY)

    def may_write(path):
        return within(path, writable)

    return may_read, may_write


# --------------------------------------------------------------------------------------------------
# Values as bytes: 8 bytes with the length of a JSON header; the header, which has the values and
# the dtypes and shapes of arrays; the numbers of the arrays

DTYPES = ("|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")


def encode(value):
    """Return the bytes of a value: a number, a string, None, a NumPy array, or a list of values or
    a dictionary of them with strings as keys."""
    arrays = []

    def to_json(x):
        if isinstance(x, np.ndarray):
            arrays.append(x)
            return {"array": [x.dtype.str, list(x.shape)]}
        if isinstance(x, dict):
            return {"dict": {key: to_json(part) for key, part in x.items()}}
        return [to_json(part) for part in x] if isinstance(x, (list, tuple)) else x

    header = json.dumps(to_json(value)).encode()
    return b"".join([len(header).to_bytes(8, "big"), header, *(x.tobytes() for x in arrays)])


def decode(data):
    """Undo `encode`. Raises ValueError for bytes that it cannot have made."""
    header_end = 8 + int.from_bytes(data[:8], "big")
    position = header_end

    def from_json(x):
        nonlocal position
        if isinstance(x, list):
            return [from_json(part) for part in x]
        if not isinstance(x, dict):
            return x
        if "dict" in x:
            return {key: from_json(part) for key, part in x["dict"].items()}
        dtype, shape = x["array"]
        if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("not an array")
        start = position
        size = math.prod(shape)
        position += size * np.dtype(dtype).itemsize
        return np.frombuffer(data[start:position], dtype, size).reshape(shape).copy()

    try:
        return from_json(json.loads(data[8:header_end]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a value: {error}") from None


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
