"""The student's process: it takes the functions of the student's file and calls them.

Read top to bottom: the server; the process that it forks; its limits.

What this file does not do: it judges nothing, and it confines nothing but time and memory. grade.py
starts it, in a sandbox if there is one, sends the name of a scenario (checks/scenarios.py) and its
arguments, and gets back plain values or the text of an exception.

`python worker.py FD [nobody]` is the server. It imports torch once, and forks a process whenever it
gets a socket; that process then starts in milliseconds. What else it imports lies beside it.
"""

import importlib
import io
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

import safetensors  # noqa: F401  for llama.py: imported once, in the server
import source
import torch
import values

# --------------------------------------------------------------------------------------------------
# The server

NOBODY = 65534  # the user who owns nothing


def serve(control):
    """Say that torch is imported, then answer messages until grade.py hangs up. One with a socket:
    fork a process that serves on it. One without: end that process."""
    torch.set_num_threads(1)
    if os.geteuid() == 0 and "nobody" in sys.argv:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    control.send(b".")
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if sockets:
            pid = os.fork()
            if pid == 0:
                control.close()
                try:
                    become_student(Connection(sockets[0]))
                finally:
                    os._exit(0)
            os.close(sockets[0])
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        control.send(b".")


# --------------------------------------------------------------------------------------------------
# The process


def become_student(connection):
    """Take the functions that the first message names, then run the scenarios of all others until
    grade.py hangs up. A reply is {"value": ...}, or {"error": one line, "printed": the last
    output}."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    output = sys.stdout = sys.stderr = LastOutput()
    limit()
    file, (data, names) = values.decode(connection.recv_bytes())
    missing = source.take_functions(file, data.tobytes(), names)
    connection.send_bytes(values.encode({"value": missing}))
    while True:
        try:
            name, arguments = values.decode(connection.recv_bytes())
        except EOFError:
            return
        try:
            scenarios = importlib.import_module("scenarios")
            with torch.no_grad():
                reply = values.encode({"value": getattr(scenarios, name)(*arguments)})
        except BaseException as error:  # SystemExit too
            error = source.describe(error, file)
            reply = values.encode({"error": error, "printed": output.last})
        connection.send_bytes(reply)


class LastOutput(io.TextIOBase):
    """A stream for stdout and stderr that remembers only the last characters, so that a flood of
    them takes time but no memory."""

    last = ""

    def write(self, text):
        self.last = (self.last + text[-300:])[-300:]
        return len(text)


# --------------------------------------------------------------------------------------------------
# Its limits


def limit():
    """Limit time, memory and files. Forbid new processes and threads, and core dumps."""
    limits = {
        resource.RLIMIT_CPU: 20,  # seconds
        resource.RLIMIT_FSIZE: 2**20,  # bytes
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    with suppress(OSError), open("/proc/self/statm") as file:  # not on macOS
        taken = int(file.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = taken + 2**30
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
