"""The lecture page: one HTML file in which sinks emerge, and one sees what they do to a range.

Read top to bottom: the page; what it shows of a text; its lines of code; the options.

What this file does not do: paper/activations.py, quant.py and kvsink.py measure. page.html has the
layout, the lines of Algorithm 1 in our words, and the JavaScript that draws.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import torch

import kvsink
import quant
from course import handout
from kvsink import AUTO, Rule
from paper import activations, command
from support import cli, hub, text
from support.cache import printable, save
from support.evaluate import load_model
from support.machine import pick_machine
from support.site import site_of

TOKENS = 256  # the most tokens of the second text
CELLS = 128  # the most cells along an edge of an attention map
SIZES = (1, 5, 20)  # the N of PFN-N and KVSink-N
BITS = (4, 3, 2)  # the widths of the errors in part 4


def write(file, config, data):
    """Measure a model on the config's text, and on the beginning of a document of `data`, the name
    of a text or a file, and write the page."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    code = code_beside(page)
    documents = hub.documents(data)
    document = next((d for d in documents if len(d) > 8 * TOKENS), documents[0])
    loaded = load_model(config.model, config.machine)
    context = loaded.model.config.max_position_embeddings
    title, windows = command.read_windows(config.prompt, loaded.tokenizer, context)
    ids = loaded.tokenizer.encode(document[: 40 * TOKENS])[: min(TOKENS, context)]
    if len(ids) < 2:
        raise ValueError(f"--data {data}: it has {len(ids)} tokens for this model, fewer than 2")
    second = f"{Path(data).name}, {len(ids)} tokens"
    texts = [
        measure_text(config, loaded, printable(title), windows[0], CELLS),
        measure_text(config, loaded, printable(second), torch.tensor(ids), CELLS // 2),
    ]
    data = {"texts": texts, "code": code, "MAX_AUTO_SINKS": kvsink.MAX_AUTO_SINKS}
    data["model"] = printable(config.model_name)
    page = fill(page, json.dumps(data, allow_nan=False, default=list)).encode()
    save(file, page)
    print(f"wrote {file}: {len(page) / 1e6:.1f} MB")


def fill(page, data):
    """Return page.html with its data, of which no `<` reaches the HTML, and with the hashes of its
    style and script: the Content-Security-Policy admits nothing else."""
    for name in ("style", "script"):
        content = re.search(f"<{name}>(.*?)</{name}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        page = page.replace(f"{{{name} hash}}", f"'sha256-{digest}'")
    return page.replace("{data}", data.replace("<", "\\u003c"))


# --------------------------------------------------------------------------------------------------
# What is measured on a text


def measure_text(config, loaded, title, tokens, side):
    """Return what the page shows of a text, tokens (n,), as JSON has it: its attention maps have at
    most `side` cells along an edge. If no token stands out, return why."""
    directory, model, tokenizer = loaded
    text.check_vocabulary(tokens, model.config, directory)
    print(f"measuring {config.model_name} on {title}", flush=True)
    names = {"name": config.model_name, "text": title, "tokenizer": tokenizer}
    try:
        site = site_of(model, tokenizer, config.model, directory)
        subject = activations.examine(model, [tokens[None].to(model.device)], site, **names)
    except ValueError as error:
        if not str(error).startswith("no stable outliers"):
            raise
        return {"title": title, "nothing": printable(str(error))}
    l_E, c = site
    H = subject.map_blocks(lambda acts: acts.H.cpu() if acts.l == l_E else None)[l_E - 1]  # (n, d)
    sizes = [N for N in SIZES if N <= len(tokens)]
    # A model with many maps gets coarser ones, so that the file stays small.
    L = len(model.blocks)
    fits = (side * (40 / L) ** 0.5, side * (60 / L / model.config.num_attention_heads) ** 0.5)
    shown = {
        "title": title,
        "tokens": [printable(tokenizer.decode([i])) for i in tokens.tolist()],
        "S": subject.S.nonzero().flatten().tolist(),
        "l_E": l_E,
        "block": subject.block,
        "stages": subject.stages[-1]._asdict(),
        "channels": activations.shown_channels(H, subject.S, c),
        "H_c": rounded(H[:, c].abs().tolist(), 9),  # every digit of fp32: lines 15-16 compare them
        "cells": [-(-len(tokens) // int(min(side, fit))) for fit in fits],  # tokens in a cell
        "sizes": sizes,
        "bits": BITS,
    }
    rules = [Rule(), *(Rule(first=N) for N in sizes), *(Rule(k=k) for k in (*sizes, AUTO))]

    def reduce(acts):
        kept = {str(rule): kept_tokens(rule, H, c, acts.l > l_E) for rule in rules}
        return measure_block(subject, acts, shown, kept)

    return {**shown, "blocks": subject.map_blocks(reduce)}


def measure_block(subject, acts, shown, kept):
    """Return what the page shows of a block. `kept` is rule -> mask."""
    P = subject.scores(acts).cpu()
    H_c = acts.H[:, list(shown["channels"].values())].T.abs().double().cpu()  # (channels, n)
    errors = {}
    for mask in set(kept.values()):
        rows = activations.rtn_errors(subject, acts, torch.tensor(mask), BITS)
        errors[mask] = [rounded(row, 3) for row in rows]
    groups = activations.key_groups(acts.K.cpu(), subject.S)
    return {
        "H": packed(1000 * H_c.clamp(min=1e-20).log10() + 20000, "<u2"),
        "mean": packed_map(P.mean(0, keepdim=True), shown["cells"][0]),
        "heads": packed_map(P, shown["cells"][1]),
        "share": rounded(activations.attention_share(P, subject.S).tolist(), 3),
        "keys": [{**group._asdict(), "x": rounded(group.x, 4)} for group in groups],
        "errors": {rule: errors[mask] for rule, mask in kept.items()},
    }


def kept_tokens(rule, H, c, predicted):
    """Return the mask of what a rule keeps. H^{l_E} is (n, d); `predicted` is true after l_E."""
    if rule.predicts and predicted:
        return tuple(kvsink.predict_sinks(H[None], c, rule.k)[0].tolist())
    return tuple(kvsink.pfn(H[None], rule.first)[0].tolist())


def rounded(numbers, digits):
    return [float(f"{x:.{digits}g}") for x in numbers]


def packed(X, dtype):
    """Return numbers, rounded to integers of a dtype of NumPy, in base64."""
    return base64.b64encode(X.round().numpy().astype(dtype).tobytes()).decode()


def packed_map(P, g):
    """Return attention scores P (h, n, n) as bytes, 255 times their square root: the largest of
    each square of g x g, row by row, up to the diagonal."""
    P = torch.nn.functional.max_pool2d(P[None], g, ceil_mode=True)[0]
    rows, columns = torch.tril_indices(*P.shape[1:])
    return packed(255 * P[:, rows, columns].sqrt(), "u1")


# --------------------------------------------------------------------------------------------------
# The algorithm beside the code

PARTS = (
    ("line", kvsink, ("prefill", "decoder_block", "predict_sinks")),
    ("equation", quant, ("quantize", "dequantize", "scale", "zero")),
)


def code_beside(page):
    """Return the rows of code that belong to the lines of Algorithm 1 and to Eq. 10 to 13. Raises
    ValueError if a number of theirs has no counterpart in page.html, or the reverse."""
    code = {}
    for kind, module, names in PARTS:
        file = Path(module.__file__)
        code[kind] = handout.numbered_lines(file.read_text(encoding="utf-8"), names)
        printed = {int(number) for number in re.findall(rf'data-{kind}="(\d+)"', page)}
        coded = {number for row in code[kind] for number in row["numbers"]}
        for number in sorted(printed ^ coded):
            there, absent = ("page.html", file.name)[:: -1 if number in coded else 1]
            raise ValueError(f"{kind} {number} is in {there} and not in {absent}: give it a place")
    return code


def add_options(parser):
    add = parser.add_argument
    add("file", type=Path, nargs="?", default=Path("sinks.html"), help="(default: %(default)s)")
    cli.add_model_options(add)
    add("--prompt", help="the first text, as for `python -m paper.figures`")
    add("--data", default=text.PACKED, help="the second text: a name as for eval_ppl.py, or a file")
    command.add_machine_options(parser)


def run(args):
    cli.check_file(args.file)
    default = "packed" if args.model == hub.DEFAULT_MODEL else "1"
    prompt = default if args.prompt is None else args.prompt
    write(args.file, command.AnalysisConfig(args.model, pick_machine(args), prompt), args.data)
