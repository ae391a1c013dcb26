"""The frame that `python -m paper.table1`, `paper.table3`, `paper.figures` and `python -m paper`
share: their options, and the model on a text that these name.

Read top to bottom: the configuration and its options; the text; a Subject made of model and text;
what is printed and saved about it.

What this file does not do: it measures nothing. activations.py does.
"""

import hashlib
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import kvsink
from paper import activations
from support import cli, hub, text
from support.cache import save
from support.machine import Machine, pick_machine
from support.site import site_of

ADVICE = "give a shorter --prompt, or --device cpu"  # if memory is short
MAX_TOKENS = 2048  # of a prompt: attention scores are kept for every pair of tokens
SLUGS = {"packed": "packed", "1": "prompt1", "2": "prompt2"}  # prompts in the names of files


@dataclass(frozen=True)
class AnalysisConfig:
    """A model, a text, the figures to draw of them, and the folder for the results."""

    model: str
    machine: Machine
    prompt: str = "1"  # "1" or "2", the paper's; "packed"; or a text
    out: Path = Path("figures")
    figures: tuple[int, ...] = ()
    layer: int | None = None  # the layer to draw, counted from 0; None: see activations.examine
    format: str = "png"  # of the pictures
    results: Path | None = None  # the JSON file for Figure 9

    @property
    def model_name(self):
        """The model's name in titles and in the names of files."""
        return Path(self.model).resolve().name

    def path(self, kind, suffix):
        """Return the file of a table or figure."""
        slug = SLUGS.get(self.prompt)
        if slug is None:
            digest = hashlib.sha256(self.prompt.encode(errors="replace")).hexdigest()
            slug = f"text{digest[:8]}"
        return self.out / f"{kind}-{self.model_name}-{slug}.{suffix}"


def add_options(parser):
    add = parser.add_argument
    cli.add_model_options(add)
    add(
        "--prompt",
        help="1 or 2: the paper's prompts; packed: Wikipedia articles; or any text (default: "
        "packed for the default model, else 1)",
    )
    add(
        "--out",
        type=Path,
        default=Path("figures"),
        help="folder for results (default: %(default)s)",
    )


def add_machine_options(parser):
    """Add --device and --dtype. There is no --no-compile: hooks see nothing inside a compiled
    block, so these commands always run eager."""
    cli.add_machine_options(parser.add_argument, compiler=False)
    parser.set_defaults(no_compile=True)


def analysis_config(args):
    """Return the AnalysisConfig that the shared options ask for. Raises ValueError if the folder or
    the device cannot be used."""
    prompt = args.prompt
    if prompt is None:
        prompt = "packed" if args.model == hub.DEFAULT_MODEL else "1"
    cli.check_folder("--out", args.out)
    return AnalysisConfig(args.model, pick_machine(args), prompt, args.out)


# --------------------------------------------------------------------------------------------------
# Windows of token ids


def read_windows(prompt, tokenizer, context):
    """Return the title of a text and its windows (count, n). Raises ValueError if the text is too
    short or too long for a model with this context."""
    if prompt == "packed":
        n = min(1024, context)
        windows = text.windows(tokenizer, text.PACKED, "test", n, 8, 0)
        return f"packed wiki-sample, {n} tokens", windows
    if prompt in ("1", "2"):
        title = f"prompt {prompt}"
        windows = torch.tensor([tokenizer.encode(kvsink.PROMPTS[int(prompt) - 1])])
    else:
        title = f'"{textwrap.shorten(ascii(prompt)[1:-1], 40)}"'
        windows = torch.tensor([tokenizer.encode(prompt)])
    n = windows.shape[1]
    longest = min(MAX_TOKENS, context)
    if not 2 <= n <= longest:
        raise ValueError(f"--prompt has {n} tokens for this model: 2 to {longest} can be drawn")
    return title, windows


def calibration_text(config):
    """Return the name of the text to calibrate on."""
    packed = config.prompt == "packed" or config.model == hub.DEFAULT_MODEL
    return text.PACKED if packed else "wikitext2"


def calibration_windows(config, loaded):
    """Return windows (count, n) of the training split, as many as eval_ppl.py takes by default: 4
    of packed text, or 16 of WikiText-2."""
    name = calibration_text(config)
    n, count = (1024, 4) if name == text.PACKED else (4096, 16)
    n = min(n, loaded.model.config.max_position_embeddings)
    return text.calibration_windows(loaded.tokenizer, name, n, count, seed=0)


# --------------------------------------------------------------------------------------------------
# A Subject


def find_sinks(config, loaded):
    """Find the sinks of the model on the text, print them and the stages of the outliers, and
    return the Subject."""
    directory, model, tokenizer = loaded
    title, windows = read_windows(config.prompt, tokenizer, model.config.max_position_embeddings)
    text.check_vocabulary(windows, model.config, directory)
    subject = activations.examine(
        model,
        [window[None].to(model.device) for window in windows],
        site_of(model, tokenizer, config.model, directory),
        config.layer,
        name=config.model_name,
        text=title,
        tokenizer=tokenizer,
    )
    print_stages(subject)
    return subject


def calibrate(config, loaded, subject):
    """Return the Subject with the static quantizers that Table 1 and Figure 7 need."""
    tokens = calibration_windows(config, loaded)
    text.check_vocabulary(tokens, loaded.model.config, loaded.directory)
    bar = tqdm(tokens, desc="calibrating", unit="window", leave=False, disable=None)
    windows = (window[None].to(loaded.model.device) for window in bar)
    quantizers = activations.static_quantizers(subject, windows)
    calibration = text.describe_calibration(calibration_text(config), *tokens.shape)
    return replace(subject, quantizers=quantizers, calibration=calibration)


# --------------------------------------------------------------------------------------------------
# What is printed and saved about it


def print_stages(subject):
    sinks = ", ".join(map(str, subject.S.nonzero().flatten().tolist()))
    print(f"\n{subject.name} on {subject.text}: sinks at tokens {sinks}")
    titles = ["stages", *["weaker outliers"] * len(subject.stages)]
    for title, stages in zip(titles, reversed(subject.stages)):
        spans = [
            f"{name} {format_span(blocks)}" for name, blocks in stages._asdict().items() if blocks
        ]
        print(f"{title}, blocks from 1: {', '.join(spans)}", flush=True)


def format_span(blocks):
    """Return consecutive blocks as "first-last"."""
    return f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


def describe_setting(subject):
    """Return, for a heading, what the numbers of Table 1 and Figure 7 were measured on."""
    blocks = format_span(subject.stable_blocks)
    setting = f"groups of {activations.GROUP}: {subject.name} on {subject.text}, blocks {blocks}"
    return f"{setting}\n{subject.calibration}"


def save_json(path, subject, rows):
    table = {
        "model": subject.name,
        "text": subject.text,
        "windows": len(subject.windows),
        "group_size": activations.GROUP,
        "blocks": subject.stable_blocks,
        "rows": rows,
    }
    save(path, json.dumps(table, indent=1, allow_nan=False).encode())
