"""The student's process: it has one function of theirs, the reference's for all else, and no test.

Read top to bottom: values as bytes; what the process may not do; the process; the server that forks
it.

What this file does not do: it judges nothing. grade.py sends the name of a scenario
(checks/scenarios.py) and its arguments, and gets back plain values or the text of an exception. No
pickle: what comes back is a student's.

`python course/worker.py FD` is the server. It imports torch once and forks a process for each
function, which then starts in milliseconds. It guards against accidents and plain tricks; only a
container guards against a determined attacker. README.md says which is which.
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
import safetensors  # noqa: F401  llama.py needs it: imported once, in the server
import torch

# --------------------------------------------------------------------------------------------------
# Values as bytes: the length of a JSON header in 8 bytes, the header, the arrays of which it has
# dtype and shape

DTYPES = ("|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8")


def encode(value):
    """Numbers, strings, None, lists, dictionaries with strings as keys, and NumPy arrays of these,
    to bytes."""
    arrays = []

    def plain(x):
        if isinstance(x, np.ndarray):
            arrays.append(x)
            return {"array": [x.dtype.str, list(x.shape)]}
        if isinstance(x, dict):
            return {"dict": {key: plain(part) for key, part in x.items()}}
        return [plain(part) for part in x] if isinstance(x, (list, tuple)) else x

    header = json.dumps(plain(value)).encode()
    return b"".join([len(header).to_bytes(8, "big"), header, *(x.tobytes() for x in arrays)])


def decode(data):
    """The inverse. Raises ValueError for bytes that `encode` cannot have made."""
    end = 8 + int.from_bytes(data[:8], "big")
    at = end

    def value(x):
        nonlocal at
        if isinstance(x, list):
            return [value(part) for part in x]
        if not isinstance(x, dict):
            return x
        if "dict" in x:
            return {key: value(part) for key, part in x["dict"].items()}
        dtype, shape = x["array"]
        if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("not an array")
        size, first = math.prod(shape), at
        at += size * np.dtype(dtype).itemsize
        return np.frombuffer(data[first:at], dtype, size).reshape(shape).copy()

    try:
        return value(json.loads(data[8:end]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a value: {error}") from None


# --------------------------------------------------------------------------------------------------
# What the process may not do

FORBIDDEN = (
    "socket.", "subprocess.", "ctypes.", "gc.", "pty.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "os.kill", "signal.pthread_kill", "resource.", "sys.addaudithook", "os.putenv", "os.unsetenv", "sqlite3.",
)  # fmt: skip
CHANGES = (
    "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate",
    "os.utime", "os.setxattr", "os.removexattr", "os.chdir", "os.chflags",
)  # fmt: skip
REPOSITORY = os.path.dirname(os.path.dirname(os.path.realpath(__file__))) + os.sep
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = (
    str,
    bytes,
    pathlib.PosixPath,
)  # what else looks like a path may look like another the next time


def packages(folder):
    """The folders where Python and its packages are."""
    found = [
        sys.prefix,
        sys.base_prefix,
        *(path for path in sys.path if path != folder),
        "/usr",
        "/lib",
    ]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in found if os.path.isdir(path)))


def landlock_version():
    """Of the kernel's own guard of files (Linux 5.13 and newer); 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(
        0, ctypes.CDLL(None).syscall(444, None, 0, 1)
    )  # landlock_create_ruleset, asked for its version


def landlock(folder):
    """From now on the kernel lets this process change files in `folder` only, and read there and
    where Python and its packages are; native code too. Newer kernels also refuse TCP (version 4)
    and signals to other processes (6)."""
    libc, version = ctypes.CDLL(None), landlock_version()
    everything = (
        2 ** (13 + (version >= 2) + (version >= 3)) - 1
    )  # kinds of access; the second and third added one each
    to_read = (
        *packages(folder),
        "/sys/devices/system/cpu",
        "/proc/cpuinfo",
    )  # torch asks what the processor can do
    refused = struct.pack("=QQQ", everything, 0b11, 0b11)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    ruleset = libc.syscall(444, refused, len(refused), 0)
    for path in filter(os.path.exists, (folder, *to_read)):
        reading = (
            0b1101 if os.path.isdir(path) else 0b0101
        )  # to execute, to read files, to read folders
        access = everything if path == folder else reading
        parent = os.open(path, os.O_PATH)
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", access, parent), 0)  # landlock_add_rule
        os.close(parent)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which the next is refused
    if libc.syscall(446, ruleset, 0):  # landlock_restrict_self
        raise OSError("Landlock refuses")
    os.close(ruleset)


def guard(folder):
    """From now on Python lets this process do no more than that, start and end no process, and open
    no socket."""
    real, is_folder, text = os.path.realpath, os.path.isdir, os.fsdecode
    own = (real(folder) + os.sep,)
    readable = own + tuple(path + os.sep for path in packages(folder))
    inside = tuple(
        path for path in readable if path.startswith(REPOSITORY)
    )  # as a virtual environment may be

    def within(path, roots):
        if type(path) not in PATHS:
            return type(path) is int  # a file that is open
        return path == os.devnull or (real(text(path)) + os.sep).startswith(roots)

    def may_read(path):
        return within(path, inside) or within(path, readable) and not within(path, REPOSITORY)

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & WRITING
            allowed = (
                within(path, own)
                if writes or type(path) is not int and is_folder(path)
                else may_read(path)
            )
        elif event in ("os.listdir", "os.scandir"):
            allowed = may_read(arguments[0] or ".")
        elif event in CHANGES:
            allowed = all(
                type(x) in (int, float, tuple, type(None)) or within(x, own) for x in arguments
            )
        else:
            allowed = not event.startswith(FORBIDDEN)
        if not allowed:
            raise PermissionError(f"{event} {arguments[:1]} is not allowed while grading")

    sys.addaudithook(hook)


def limit(seconds):
    """Limits of CPU time, memory, file size; no core dump."""
    with (
        suppress(OSError),
        open("/proc/self/statm") as file,
    ):  # what torch takes of address space, and 2 GiB
        room = int(file.read().split()[0]) * resource.getpagesize() + 2**31
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


class Tail(io.TextIOBase):
    """In the place of stdout and stderr: remembers the last that was printed, so that a flood costs
    time and no memory."""

    last = ""

    def write(self, text):
        self.last = (self.last + text[-300:])[-300:]
        return len(text)


# --------------------------------------------------------------------------------------------------
# The process


def serve_scenarios(connection, folder):
    """Runs scenarios until grade.py hangs up. A reply is {"value": ...}, or {"error": one line,
    "printed": its last output}."""
    printed = sys.stdout = sys.stderr = Tail()
    while True:
        try:
            name, arguments = decode(connection.recv_bytes())
        except EOFError:
            return
        try:
            import scenarios  # and with it the student's function

            with torch.no_grad():
                reply = {"value": getattr(scenarios, name)(*arguments)}
            data = encode(reply)
        except BaseException as error:  # sys.exit too
            data = encode({"error": described(error, folder), "printed": printed.last})
        connection.send_bytes(data)


def described(error, folder):
    """An exception in one line: its type, its message, and the line of the student's file that it
    came from."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename.startswith(folder + os.sep)
    ]
    frames = [f for f in frames if not f.filename.endswith("scenarios.py")]
    return (
        f"{said} (at: {frames[-1].line})"
        if frames and not isinstance(error, NotImplementedError)
        else said
    )


NOBODY = 65534  # the user who owns nothing


def become_student(connection, folder, seconds):
    """What a forked process does: gives up what it does not need, and serves."""
    if (
        os.geteuid() == 0 and not os.stat(REPOSITORY).st_mode & 0o007
    ):  # gradescope/setup.sh closes it to others
        os.chown(folder, NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.chdir(folder)
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder, *(path for path in sys.path if path and os.path.realpath(path) != here)]
    os.environ.update(HOME=folder, TMPDIR=folder)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    limit(seconds)
    if landlock_version():
        landlock(folder)
    guard(folder)
    serve_scenarios(connection, folder)


# --------------------------------------------------------------------------------------------------
# The server


def serve(control):
    """Each message is JSON. {"folder", "seconds"} comes with a socket: forks a process that serves
    on it, and answers with its id. {"end": id} ends that process and all that it started. The
    server leaves when grade.py does."""
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


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
