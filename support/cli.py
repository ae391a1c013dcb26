"""What all commands share: options, the machine that they run on, errors in one line.

Read top to bottom: options; the machine; memory and time in words; a command's frame.
"""

import argparse
import functools
import importlib.util
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import kvsink
from support import hub
from support.cache import format_bytes

# ---------------------------------------------------------------------------------------------------------------------
# Options


class Parser(argparse.ArgumentParser):
    def __init__(self, **how):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def parse_args(self, argv=None):
        for word in argv or []:
            if word.endswith("=--"):  # which argparse takes for no value at all
                self.error(f"{word}: a value is missing")
        return super().parse_args(argv)

    def error(self, message):  # one line, without the usage
        raise ValueError(f"{message} (--help explains)")


def number(low, high=math.inf):
    """An argparse type: a whole number from `low` to `high`."""

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
    """An argparse type: a whole number of at least `low`, or AUTO."""

    def parse(text):
        try:
            return text if text == kvsink.AUTO else number(low)(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or {kvsink.AUTO}") from None

    return parse


def fraction(text):
    """An argparse type: a number from 0 to 0.5."""
    try:
        if 0 <= float(text) <= 0.5:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to 0.5")


def add_model_options(add):
    add("--model", default=hub.DEFAULT_MODEL, help="a directory, a hub id, or one of "
        f"{', '.join([hub.DEFAULT_MODEL, *hub.MODELS])} (default: %(default)s)")  # fmt: skip


def add_site_options(add):
    add(
        "--layer",
        type=number(0),
        help="emergence layer, from 0 as in Table 3 (default: Table 3's, else the finder's)",
    )
    add("--channel", type=number(0), help="outlier channel (default: likewise)")


def add_machine_options(add):
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="(default: float16 on cuda, else float32)",
    )
    add("--no-compile", action="store_true", help="run eager, without torch.compile")


def check_file(path):
    """Raises ValueError where a file (None: none) could not be written at the end of a run."""
    if path and len(os.fsencode(path.name)) > 200:  # temporary names beside it are longer
        raise ValueError(f"the name {path.name[:20]}... is too long: at most 200 bytes")
    if path and not (
        path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)
    ):
        raise ValueError(f"{path}: cannot write in {path.absolute().parent}")
    if path and path.exists() and not path.is_file():
        raise ValueError(f"{path} is there and is not a file: name another")


def check_outputs(json, plot):
    """Raises ValueError where --json or --plot (None: not given) names a file that could not be written."""
    if plot and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {plot}: the name has to end in .png, .svg or .pdf")
    if plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for path in (json, plot):
        check_file(path)
    if json and json == plot:
        raise ValueError("--json and --plot name the same file")


def check_folder(option, folder):
    """Raises ValueError where files cannot be written in a folder, or it cannot be made."""
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{option} {folder}: cannot write in {existing}")


def chosen_site(layer, channel, config):
    """The site that --layer and --channel name; None where they are not given. Raises ValueError where the model has
    no such place."""
    if (layer is None) != (channel is None):
        raise ValueError("--layer and --channel belong together: give both")
    if layer is None:
        return None
    if layer >= config.num_hidden_layers or channel >= config.hidden_size:
        limits = (
            f"layers 0 to {config.num_hidden_layers - 1} and channels 0 to {config.hidden_size - 1}"
        )
        raise ValueError(f"--layer {layer} --channel {channel}: the model has {limits}")
    return kvsink.Site(layer + 1, channel)


def clamp_group_size(group_size, head_dim):
    """The group size, at most a head, and what is said of it. Raises ValueError where it does not divide a head."""
    if group_size > head_dim:
        return (
            head_dim,
            f"groups of {head_dim} channels, which is a head ({group_size} were asked for)",
        )
    if head_dim % group_size:
        raise ValueError(f"--group-size {group_size} does not divide a head of {head_dim} channels")
    return group_size, f"groups of {group_size} channels"


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@dataclass(frozen=True)
class Machine:
    """Where a command runs, in which dtype, and whether torch.compile is used."""

    device: str
    dtype: str
    compile: bool

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    def compiled(self, function, **how):
        """`function` as this machine runs it."""
        return (
            kvsink.compiled(function, **how)
            if self.compile and has_compiler(self.device)
            else function
        )


def machine(args):
    """The Machine that the options ask for. Raises ValueError where that device is not to be had."""
    best = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    name = best if args.device is None else args.device
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each rank
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} is not usable here: {str(error).splitlines()[0]}"
        ) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: cpu, cuda and mps are known")
    # On Apple's GPU attention in half precision has been seen to leak future tokens (pytorch/pytorch#195910).
    dtype = args.dtype or ("float16" if device.type == "cuda" else "float32")
    return Machine("cpu" if device.type == "cpu" else str(device), dtype, not args.no_compile)


@functools.cache
def has_compiler(device):
    """Whether torch.compile works here. Says so in one line where it does not."""
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(hub.cache_directory() / "compiled")
    )  # for the next run too
    try:
        torch.compile(lambda x: x + 1)(
            torch.zeros(8, device=device)
        )  # takes a second and asks the whole toolchain
    except Exception as error:  # each thing that can be missing (C++ compiler, headers, Triton) has a type of its own
        reason = " ".join(str(error).split())[:160]
        print(f"no working compiler on this machine, running eager ({reason})", file=sys.stderr)
        return False
    return True


def init_distributed(device):
    """Under torchrun, meet the other ranks. Raises ValueError where the environment is only half torchrun's."""
    if "RANK" in os.environ and not dist.is_initialized():
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            if not os.environ.get(name, "").isdecimal():
                raise ValueError(
                    f"RANK is set, but {name} is {os.environ.get(name)!r}: start with torchrun, or unset RANK"
                )
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def bar_off():
    """What tqdm calls `disable`: None leaves it to whether there is a terminal."""
    return None if rank_and_world_size()[0] == 0 else True


# ---------------------------------------------------------------------------------------------------------------------
# Memory and time in words


def free_memory(device):
    """How many bytes can still be had: of a GPU's own memory, else of the host's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(
            re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]
        )
    except (OSError, TypeError):  # not Linux, which alone says what is free: all there is
        return (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if hasattr(os, "sysconf")
            else math.inf
        )


def duration(seconds):
    """In words, to two digits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"


def out_of_memory(error):
    """In words, what was asked for and what there is, where an error says that memory was short; else None."""
    said = re.search(
        r"out of memory|can(no|')t allocate memory", str(error)
    )  # a GPU's allocator, the host's
    if not (isinstance(error, MemoryError) or isinstance(error, RuntimeError) and said):
        return None
    gpu = re.search(r"GPU (\d+) has", str(error))
    free = format_bytes(free_memory(f"cuda:{gpu[1]}" if gpu else "cpu"))
    asked = re.search(r"allocate ([\d.]+) ?([KMGTP]i?B|bytes)", str(error))
    asked = asked and (
        format_bytes(int(asked[1])) if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    )
    return f"out of memory: {asked or 'more'} was asked for, {free} are free{f' on GPU {gpu[1]}' if gpu else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# A command's frame


def run_command(program, work, advice):
    """Do the work and give the exit status. What the user can mend is one line on stderr and status 2, no traceback;
    `advice` says what to do where memory is short."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that lacks a character shows another, and the work goes on
    try:
        with torch.no_grad():
            work()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python would complain while it ends
        return 141
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        # RuntimeError: no memory, or a rank that was lost. What the options ask is the same on all ranks, which tell it
        # one by one until they have met, and then the first alone.
        rank, short = os.environ.get("RANK", "0"), out_of_memory(error)
        if rank == "0" or short or not dist.is_initialized():
            said = f"{short}; {advice}" if short else " ".join(str(error).split())
            print(f"{program}: {f'rank {rank}: ' if rank != '0' else ''}{said}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def exit_process(status):
    """End the process of a command with this status."""
    if "RANK" in os.environ:
        # A thread of gloo's may still hold a tensor while Python shuts down, and then aborts the process, rarely but
        # seen (pytorch/pytorch#179291). All is written by now, so a rank leaves without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
