"""What all commands share: their options, and errors in one line.

Read top to bottom: argparse types; options; checks of options; the frame of a command.
"""

import argparse
import importlib.util
import math
import os
import sys

import torch
import torch.distributed as dist

from kvsink import AUTO, Site
from quant import NotFinite
from support import hub
from support.cache import nearest_existing, printable
from support.machine import out_of_memory_message

# --------------------------------------------------------------------------------------------------
# Types of options


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError with one line instead of printing its usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, argv=None):
        for word in sys.argv[1:] if argv is None else argv:
            if word.endswith("=--"):  # argparse would take this for an option without a value
                self.error(f"{word}: a value is missing")
        return super().parse_args(argv)

    def error(self, message):
        raise ValueError(f"{message} (--help explains)")


def number(low, high=math.inf):
    """Return an argparse type: a whole number from `low` to `high`."""

    def parse(text):
        try:
            if low <= int(text) <= high:
                return int(text)
        except ValueError:
            pass
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")

    return parse


def number_or_auto(low):
    """Return an argparse type: a whole number of at least `low`, or "auto"."""

    def parse(text):
        try:
            return text if text == AUTO else number(low)(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or {AUTO}") from None

    return parse


def fraction(text):
    """An argparse type: a number from 0 to 0.5."""
    try:
        if 0 <= float(text) <= 0.5:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to 0.5")


# --------------------------------------------------------------------------------------------------
# Options. `add` is the `add_argument` of a parser or of an argument group.

DTYPES = ("float32", "float16", "bfloat16")


def add_model_options(add):
    names = ", ".join([hub.DEFAULT_MODEL, *hub.MODELS])
    add(
        "--model",
        default=hub.DEFAULT_MODEL,
        help=f"a directory, a hub id, or one of {names} (default: %(default)s)",
    )


def add_site_options(add):
    add(
        "--layer",
        type=number(0),
        help="emergence layer, counted from 0 (default: Table 3's, else the finder's)",
    )
    add(
        "--channel",
        type=number(0),
        help="outlier channel (default: Table 3's, else the finder's)",
    )


def add_machine_options(add, compiler=True):
    """Add --device and --dtype and, for a command that can compile, --no-compile."""
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best available)")
    add("--dtype", choices=DTYPES, help="(default: float16 on cuda, else float32)")
    if compiler:
        add("--no-compile", action="store_true", help="run eager, without torch.compile")


# --------------------------------------------------------------------------------------------------
# Checks


def check_file(path):
    """Raise ValueError if `path`, which may be None, could not be written at the end of a run."""
    if path is None:
        return
    folder = path.absolute().parent
    if len(os.fsencode(path.name)) > 200:  # temporary names beside it are longer
        raise ValueError(f"the name {path.name[:20]}... is too long: at most 200 bytes")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{path}: cannot write in {folder}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} exists and is not a file: choose another name")


def check_outputs(json, plot):
    """Raise ValueError if the file of --json or --plot could not be written. Each may be None."""
    if plot and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {plot}: the name has to end in .png, .svg or .pdf")
    if plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for path in (json, plot):
        check_file(path)
    if json and json == plot:
        raise ValueError("--json and --plot name the same file")


def check_folder(option, folder):
    """Raise ValueError if a folder cannot be made, or files cannot be written in it."""
    existing = nearest_existing(folder)
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{option} {folder}: cannot write in {existing}")


def chosen_site(layer, channel, config):
    """Return the Site that --layer and --channel name, or None if they are not given.
    Raises ValueError if the model has no such layer or channel."""
    if (layer is None) != (channel is None):
        raise ValueError("--layer and --channel belong together: give both")
    if layer is None:
        return None
    L = config.num_hidden_layers
    d = config.hidden_size
    if layer >= L or channel >= d:
        limits = f"layers 0 to {L - 1} and channels 0 to {d - 1}"
        raise ValueError(f"--layer {layer} --channel {channel}: the model has {limits}")
    return Site(layer + 1, channel)


def clamp_group_size(group_size, head_dim):
    """Return the group size, at most one head. Raises ValueError if it does not divide a head."""
    if group_size > head_dim:
        return head_dim
    if head_dim % group_size:
        raise ValueError(f"--group-size {group_size} does not divide a head of {head_dim} channels")
    return group_size


# --------------------------------------------------------------------------------------------------
# The frame of a command


def run_command(program, work, advice):
    """Do the work and return the exit status. An error that the user can fix is one line on
    stderr and status 2, without a traceback; `advice` says what to do if memory is short."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that the terminal cannot encode
    try:
        with torch.no_grad():
            work()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        # Without this, Python would complain while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        print_error(program, error, advice)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def print_error(program, error, advice):
    """Print one line. Before the process group exists, every rank reports; afterwards rank 0 alone,
    because a wrong option is wrong on all ranks. A rank that runs out of memory or meets NaN always
    reports."""
    rank = os.environ.get("RANK", "0")
    memory = out_of_memory_message(error)
    alone = memory or isinstance(error, NotFinite)  # an error that other ranks need not have
    if rank != "0" and not alone and dist.is_initialized():
        return
    message = f"{memory}; {advice}" if memory else " ".join(str(error).split())
    prefix = f"rank {rank}: " if rank != "0" else ""
    print(printable(f"{program}: {prefix}{message}"), file=sys.stderr)


def exit_process(status):
    """End the process of a command with this status."""
    if "RANK" in os.environ:
        # A thread of gloo may still hold a tensor while Python shuts down, and then aborts the
        # process, rarely but seen (pytorch/pytorch#179291). All is written by now, so a rank exits
        # without that shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
