"""Windows of token ids, cut from a text as is customary for that text.

What this file does not do: the documents come from hub.py, the ids from tokenizer.py.
"""

import functools
import random

import torch

from support import hub

# The text whose documents are packed end to end, as language models are pre-trained.
PACKED = "wiki-sample"


BOS = ("start", "window")


def windows(tokenizer, name, split, seq_len, count, seed, *, bos="start", advice="lower --seq-len"):
    """Return windows of a text (count, seq_len) int64, or all its windows if `count` is None.

    wiki-sample   articles packed end to end, with an end-of-text id after each; windows in order
    c4            as for KVQuant and GPTQ: each at a random offset of a random document that is long
                  enough; None means 256
    others        the whole text tokenized once; windows of "test" in order, of "train" at random
                  offsets

    bos      where the begin-of-sequence id goes: before the "start" of a text, if the tokenizer
             puts one there (the paper's protocol); or before every "window", as in some evaluation
             harnesses. A tokenizer that has no such id then takes its end-of-text id
    advice   what the user may do if the text is too short

    Raises ValueError if the text is shorter than one window.
    """
    documents = hub.documents(name, split)
    rng = random.Random(seed)
    first = [] if bos == "start" else [first_id(tokenizer)]  # of each window
    n = seq_len - len(first)
    encode = functools.partial(tokenizer.encode, bos=bos == "start")
    if name == "c4":
        drawn = [random_window(encode, documents, n, rng, advice) for _ in range(count or 256)]
        return torch.tensor([first + ids for ids in drawn])
    if name == PACKED:
        ids = packed(encode, tokenizer.eot, documents)
    else:
        ids = encode(documents[0])
    if len(ids) < n:
        raise ValueError(f"{name} has {len(ids)} tokens, fewer than one window of {n}: {advice}")
    if split == "test" or name == PACKED:
        starts = range(0, len(ids) - n + 1, n)[:count]
    else:
        starts = [rng.randint(0, len(ids) - n) for _ in range(count)]
    return torch.tensor([first + ids[start : start + n] for start in starts])


def first_id(tokenizer):
    """Return the id that goes before a window of a text. Raises ValueError if there is none."""
    ids = [i for i in (tokenizer.bos, tokenizer.eot) if i is not None]
    if not ids:
        raise ValueError("--bos window: this tokenizer has no token that begins or ends a text")
    return ids[0]


def packed(encode, eot, documents):
    """Return the ids of documents end to end: before the first what `encode` puts before a text,
    after each the end-of-text id."""
    if eot is None:
        raise ValueError(
            f"the articles of {PACKED} are packed, and this tokenizer has no end-of-text token to "
            f"put between them: choose wikitext2 or c4 (text files calibrate on {PACKED}), or a "
            "dynamic scheme, which needs no calibration text"
        )
    ids = encode("")
    for document in documents:
        ids += [*encode(document, bos=False), eot]
    return ids


def random_window(encode, documents, seq_len, rng, advice):
    """Return the ids of a window at a random offset of a random document that is long enough."""
    for _ in range(10000):  # about one in seventy of C4's documents is long enough for 4,096 tokens
        ids = encode(documents[rng.randint(0, len(documents) - 1)])
        if len(ids) >= seq_len:
            start = rng.randint(0, max(0, len(ids) - seq_len - 1))
            return ids[start : start + seq_len]
    raise ValueError(f"no document has {seq_len} tokens: {advice}")


def calibration_windows(tokenizer, name, seq_len, count, seed, *, bos="start"):
    """Return `count` windows of the training split, to calibrate on. Raises ValueError if there are
    fewer."""
    tokens = windows(tokenizer, name, "train", seq_len, count, seed, bos=bos)
    if len(tokens) < count:
        raise ValueError(
            f"--calib-windows {count}: there are only {len(tokens)} of {seq_len} tokens"
        )
    return tokens


def describe_calibration(name, count, n):
    """Return, for the heading of a table, on what static ranges were calibrated."""
    return f"static ranges calibrated on {count} windows of {n} tokens of {name}'s training split"


def check_vocabulary(tokens, config, name):
    """Raise ValueError if a token id is outside the model's vocabulary, as with another model's
    tokenizer. `name`, of the model or of the text, begins the message."""
    if tokens.max() >= config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer gives id {tokens.max()}; the model has {config.vocab_size} ids"
        )
