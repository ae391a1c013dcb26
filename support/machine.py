"""The machine that a command runs on: device, dtype, compiler, ranks, memory.

Read top to bottom: the Machine; the compiler; several processes (torchrun); memory and time.
"""

import functools
import math
import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import kvsink
from support.cache import cache_path, check_private, format_bytes, log, make_folder


@dataclass(frozen=True)
class Machine:
    """The device that a command runs on, its dtype, and whether it uses torch.compile."""

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)

    @property
    def kind(self):
        """The device without its number: cpu, cuda or mps."""
        return self.device.split(":")[0]

    @property
    def compiles(self):
        """True if functions run compiled, False if the user said --no-compile or the machine has no
        working compiler."""
        return self.compile and has_compiler(self.device)

    def compiled(self, function, used=None, **options):
        """Return `function` under torch.compile with these options, or as it is if this machine
        does not compile. Each call adds to the set `used` whether it ran compiled."""
        if self.compiles:
            return or_eager(kvsink.compiled(function, **options), function, used)
        return function


def pick_machine(args):
    """Return the Machine that the options --device, --dtype and --no-compile ask for.
    Raises ValueError if that device cannot be used."""
    keep_compiled_code()
    best = "cpu"
    if torch.backends.mps.is_available():
        best = "mps"
    if torch.cuda.is_available():
        best = "cuda"
    name = best if args.device is None else args.device
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU for each rank
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not usable here: {first_line}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: only cpu, cuda and mps are supported")
    # On Apple's GPU, attention in half precision has been seen to leak future tokens
    # (pytorch/pytorch#195910), so fp32 is the default there.
    dtype = args.dtype or ("float16" if device.type == "cuda" else "float32")
    return Machine("cpu" if device.type == "cpu" else str(device), dtype, not args.no_compile)


def keep_compiled_code():
    """Let PyTorch keep compiled code in our cache, where the next run finds it. PyTorch chooses and
    makes its folder when something first imports its compiler, so this comes before all else."""
    folder = cache_path().absolute() / "compiled"
    # A blank or a quote in its name would break the call of the C++ compiler.
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ or shlex.quote(str(folder)) != str(folder):
        return
    with suppress(OSError):  # it cannot be made: PyTorch's own place has to do
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


@functools.cache
def has_compiler(device):
    """Return whether torch.compile works here; if not, say so in one line. Raises PermissionError
    if others could write the code that it would find in its folders, and run."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        if cache_path().absolute() in Path(folder).absolute().parents:
            check_private(cache_path(), "KVSINK_CACHE")
        else:
            check_private(Path(folder), "TORCHINDUCTOR_CACHE_DIR")
    # Its precompiled headers always lie here.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    check_private(Path(default_cache_dir()), "TMPDIR")
    # Beyond its limit of graphs, torch.compile would run eager without a word.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    try:
        # Takes a second and needs the whole toolchain.
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        if graphs["unique_graphs"] == before:
            raise RuntimeError("a setting of PyTorch turns torch.compile off")
    except Exception as error:  # a missing C++ compiler, headers or Triton: each has its own type
        log(f"no working compiler on this machine, running eager ({reason(error)})")
        return False
    return True


def or_eager(compiled, function, used=None):
    """Return a function that calls `compiled`. From the first input for which the compiler fails,
    it says so in one line and calls `function`, the same in eager. Each call adds to the set `used`
    whether it ran compiled."""
    used = set() if used is None else used
    is_compiled = True

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal is_compiled
        if is_compiled:
            try:
                result = compiled(*args, **kwargs)
                used.add(True)
                return result
            except (
                torch._dynamo.exc.BackendCompilerFailed,
                torch._dynamo.exc.FailOnRecompileLimitHit,
            ) as error:
                problem = f"torch.compile failed on {function.__name__}, running it eager"
                log(f"{problem} ({reason(error)})")
                is_compiled = False
        used.add(False)
        return function(*args, **kwargs)

    return call


def ran_compiled(used, device):
    """Return what a result says of how it was computed, from the sets `used` of all ranks: True or
    False, or "partly" if the compiler failed on the way."""
    flags = torch.tensor([False in used, True in used], dtype=torch.int32)
    if dist.is_initialized():
        flags = flags.to(device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    some_eager, some_compiled = map(bool, flags.tolist())
    return "partly" if some_eager and some_compiled else some_compiled


def reason(error):
    """Return the cause in a compiler's error, in one line: the first line of the C++ compiler's
    output that names one, or the beginning of the message."""
    message = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]
    _, _, output = message.partition("Output:\n")
    for line in output.splitlines():
        if re.search(r"error: |cannot find|No such file", line):
            message = line
            break
    return " ".join(message.split())[:200]


# --------------------------------------------------------------------------------------------------
# Several processes, started by torchrun


def init_distributed(device):
    """Join the process group if torchrun started this process.
    Raises ValueError if only some of torchrun's environment variables are set."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "").isdecimal():
            raise ValueError(
                f"RANK is set, but {name} is {os.environ.get(name)!r}: start with torchrun, or "
                "unset RANK"
            )
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_rank():
    return rank_and_world_size()[0] == 0


def no_progress_bar():
    """Return tqdm's `disable`: True on every rank but 0; None on rank 0, which shows the bar only
    on a terminal."""
    return None if is_first_rank() else True


# --------------------------------------------------------------------------------------------------
# Memory and time


def free_memory(device):
    """Return the free bytes of a CUDA GPU, or of the host for any other device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable: *(\d+) kB", meminfo)[1])
    except (OSError, TypeError):  # only Linux says what is free; elsewhere take all there is
        if not hasattr(os, "sysconf"):
            return math.inf
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def format_duration(seconds):
    """Return a duration in words, with at least two digits."""
    units = {"h": 3600, "min": 60, "s": 1}
    unit = next((name for name, length in units.items() if seconds >= length), "s")
    number = seconds / units[unit]
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def out_of_memory_message(error):
    """Return, in words, how much memory was asked for and how much is free, or None if the error
    is not about memory."""
    about_memory = re.search(r"out of memory|can(no|')t allocate memory", str(error))  # GPU, host
    if not (isinstance(error, MemoryError) or isinstance(error, RuntimeError) and about_memory):
        return None
    gpu = re.search(r"GPU (\d+) has", str(error))
    free = format_bytes(free_memory(f"cuda:{gpu[1]}" if gpu else "cpu"))
    where = f" on GPU {gpu[1]}" if gpu else ""
    requested = "more"
    if asked := re.search(r"allocate ([\d.]+) ?([KMGTP]i?B|bytes)", str(error)):
        size, unit = asked.groups()
        requested = format_bytes(int(size)) if unit == "bytes" else f"{size} {unit}"
    return f"out of memory: {requested} was asked for, {free} are free{where}"
