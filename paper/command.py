"""What `python -m paper.table1`, `paper.table3`, `paper.figures` and `python -m paper` share:
options, and the model on a text that these name.

Read top to bottom: options; the model; the text; a Subject of both; what is said and saved of it.

What this file does not do: it measures nothing, activations.py does.
"""

import hashlib
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import kvsink
from llama import Llama, LlamaConfig
from paper import activations
from support import cli, hub, text
from support.cache import save
from support.tokenizer import Tokenizer

ADVICE = "give a shorter --prompt, or --device cpu"  # where memory is short
LONGEST = 2048  # tokens of a text: attention scores are kept for every pair of them
SLUGS = {
    "packed": "packed",
    "1": "prompt1",
    "2": "prompt2",
}  # in the names of files; any other text has a hash


@dataclass(frozen=True)
class What:
    """What is looked at, on which machine, and where the results go."""

    model: str
    prompt: str  # "1", "2", "packed", or a text
    out: Path
    machine: cli.Machine
    layer: int | None = None  # the one to draw, counted from 0

    @property
    def name(self):
        """Of the model, in titles and in the names of files."""
        return Path(self.model).resolve().name

    def file(self, kind, ending):
        """The file of a table or figure."""
        known = SLUGS.get(self.prompt)
        slug = (
            known or "text" + hashlib.sha256(self.prompt.encode(errors="replace")).hexdigest()[:8]
        )
        return self.out / f"{kind}-{self.name}-{slug}.{ending}"


def add_options(add):
    cli.add_model_options(add)
    add("--prompt", help="1 or 2, the paper's; packed, Wikipedia articles; or a text (default: 1, and packed for the "
        "default model)")  # fmt: skip
    add(
        "--out",
        type=Path,
        default=Path("figures"),
        help="folder for results (default: %(default)s)",
    )


def add_machine_options(parser):
    """Those of other commands but --no-compile: hooks see nothing inside a compiled block, so all
    runs eager here."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    dtypes = ["float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, help="(default: float16 on cuda, else float32)")
    parser.set_defaults(no_compile=True)


def what(args):
    """The What that the options ask for. Raises ValueError where they cannot be."""
    prompt = args.prompt
    if prompt is None:
        prompt = "packed" if args.model == hub.DEFAULT_MODEL else "1"
    cli.check_folder("--out", args.out)
    return What(args.model, prompt, args.out, cli.machine(args), getattr(args, "layer", None))


# --------------------------------------------------------------------------------------------------
# The model, and windows of token ids


class Loaded(NamedTuple):
    directory: Path
    model: Llama
    tokenizer: Tokenizer


def load(name, machine, layer=None):
    """A model by its name. Raises ValueError, before weights are read, where it lacks the layer,
    counted from 0."""
    directory = hub.model_directory(name)
    L = LlamaConfig.from_pretrained(directory).num_hidden_layers
    if layer is not None and layer >= L:
        raise ValueError(f"--layer {layer}: the model has layers 0 to {L - 1}")
    model = Llama.from_pretrained(directory, machine.device, machine.torch_dtype)
    return Loaded(directory, model, Tokenizer.from_pretrained(directory))


def read_windows(prompt, tokenizer, context):
    """What titles call a text, and its windows (count, n). Raises ValueError where it is too short
    or too long."""
    if prompt == "packed":
        n = min(1024, context)
        return f"packed wiki-sample, {n} tokens", text.windows(
            tokenizer, text.PACKED, "test", n, 8, 0
        )
    printed = {"1": kvsink.PROMPTS[0], "2": kvsink.PROMPTS[1]}.get(prompt)
    windows = torch.tensor([tokenizer.encode(printed or prompt)])
    most = min(LONGEST, context)
    if not 2 <= windows.shape[1] <= most:
        raise ValueError(
            f"--prompt has {windows.shape[1]} tokens for this model: 2 to {most} can be drawn"
        )
    return (
        f"prompt {prompt}" if printed else f'"{textwrap.shorten(ascii(prompt)[1:-1], 40)}"',
        windows,
    )


def calibration_windows(what, loaded):
    """Of the training split, as eval_ppl.py's defaults: 4 windows of packed text, or 16 of
    WikiText-2."""
    sample = what.prompt == "packed" or what.model == hub.DEFAULT_MODEL
    name, n, count = (text.PACKED, 1024, 4) if sample else ("wikitext2", 4096, 16)
    n = min(n, loaded.model.config.max_position_embeddings)
    return text.calibration_windows(loaded.tokenizer, name, n, count, seed=0)


# --------------------------------------------------------------------------------------------------
# A Subject, and what is said of it


def examined(what, loaded):
    """The Subject: its sinks and stages are printed."""
    (directory, model, tokenizer), device = loaded, what.machine.device
    title, windows = read_windows(what.prompt, tokenizer, model.config.max_position_embeddings)
    text.check_vocabulary(windows, model.config, directory)
    windows = [window[None].to(device) for window in windows]
    site = hub.site_of(model, tokenizer, what.model, directory)
    subject = activations.examine(what.name, title, model, tokenizer, windows, site, what.layer)
    print_stages(subject)
    return subject


def calibrated(what, loaded, subject):
    """The Subject with the static quantizers that Table 1 and Figure 7 need."""
    tokens = calibration_windows(what, loaded)
    text.check_vocabulary(tokens, loaded.model.config, loaded.directory)
    windows = tqdm(tokens, desc="calibrating", unit="window", leave=False, disable=None)
    found = activations.static_quantizers(
        subject, (window[None].to(what.machine.device) for window in windows)
    )
    return replace(subject, quantizers=found)


def print_stages(subject):
    sinks = ", ".join(map(str, subject.S.nonzero().flatten().tolist()))
    print(f"\n{subject.name} on {subject.text}: sinks at tokens {sinks}")
    for found, what in zip(
        subject.stages[::-1], ["stages", *["weaker outliers"] * len(subject.stages)]
    ):
        listed = ", ".join(
            f"{name} {span(blocks)}" for name, blocks in found._asdict().items() if blocks
        )
        print(f"{what}, blocks from 1: {listed}", flush=True)


def span(blocks):
    return f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


def whereabouts(subject):
    """Of the numbers of Table 1 and Figure 7."""
    blocks = span(subject.stable_blocks)
    return f"groups of {activations.GROUP}: {subject.name} on {subject.text}, blocks {blocks}"


def save_json(path, subject, rows):
    about = {"model": subject.name, "text": subject.text, "windows": len(subject.windows)}
    about |= {"group_size": activations.GROUP, "blocks": subject.stable_blocks}
    save(path, json.dumps(about | {"rows": rows}, indent=1, allow_nan=False).encode())
