"""The sandbox of the student's process: bubblewrap, https://github.com/containers/bubblewrap."""

import functools
import os
import shutil
import site
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534  # the user who owns nothing; worker.py becomes it
# What Python and torch read besides Python's own folders.
SYSTEM = "/usr /bin /lib /lib32 /lib64 /nix/store /etc/ld.so.cache /etc/alternatives"


@functools.cache
def why_unconfined():
    """Return in one line why there is no sandbox, or "" if there is one."""
    if not shutil.which("bwrap"):
        return "bubblewrap (bwrap) is not installed"
    become_nobody = f"import os; os.geteuid() or os.setuid({NOBODY}); "
    read_torch = f"open({find_spec('torch').origin!r})"
    trial = [*bubblewrap(), sys.executable, "-S", "-c", become_nobody + read_torch]
    trial = subprocess.run(trial, capture_output=True, text=True)
    last = (trial.stderr.strip() or "bwrap fails").splitlines()[-1]
    return last if trial.returncode else ""


def nobody_can_run_python():
    """Return whether the user nobody may enter the folders of Python, outside a sandbox."""
    folders = [Path(folder) / "lib" for folder in (sys.prefix, sys.base_prefix)]
    return all(above.stat().st_mode & 1 for folder in folders for above in folder.parents)


def bubblewrap(*folders):
    """Return the command that runs another in namespaces of its own: without capabilities, network
    and other processes, with a small /tmp as the only place to write. It sees the system's
    libraries, Python with its packages and, of this repository, nothing but `folders`."""
    options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --cap-drop ALL"
    if os.geteuid() == 0:  # worker.py becomes nobody, which root in a user namespace could not
        options += " --cap-add CAP_SETUID --cap-add CAP_SETGID"
    else:
        options += f" --unshare-user --disable-userns --uid {NOBODY} --gid {NOBODY}"
    options += " --die-with-parent --new-session --proc /proc --dev /dev --remount-ro /dev"
    options += " --perms 1777 --size 16777216 --tmpfs /tmp --chdir /tmp"
    options += " --setenv HOME /tmp --setenv TMPDIR /tmp"
    command = ["bwrap", *options.split()]
    # What lies in the two prefixes, not the prefixes: their modes may shut out nobody.
    python = [Path(site.getusersitepackages())]
    for prefix in (sys.prefix, sys.base_prefix):
        python += [Path(prefix) / name for name in ("bin", "lib", "lib64", "pyvenv.cfg")]
    for path in (*map(Path, SYSTEM.split()), *python):
        command += bind(path)
    command += ["--tmpfs", str(ROOT)]
    for path in (*folders, *(path for path in python if ROOT in path.parents)):
        command += bind(path)
    return [*command, "--remount-ro", str(ROOT), "--remount-ro", "/", "--"]


def bind(path):
    """Return options that show a file or folder, read-only, below folders that nobody may enter."""
    options = []
    for folder in reversed(path.parents[:-1]):
        options += ["--perms", "0755", "--dir", str(folder)]
    return [*options, "--ro-bind-try", str(path), str(path)]
