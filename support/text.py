"""Windows of token ids, cut from a text as is customary for that text.

What this file does not do: the documents come from hub.py, the ids from tokenizer.py.
"""

import random

import torch

from support import hub

# The text whose documents are packed end to end, as language models are pre-trained.
PACKED = "wiki-sample"


def windows(tokenizer, name, split, seq_len, count, seed):
    """Return windows of a text (count, seq_len) int64, or all its windows if `count` is None.

    wiki-sample   articles packed end to end, with an end-of-text id after each; windows in order
    c4            as for KVQuant and GPTQ: each at a random offset of a random document that is long
                  enough; None means 256
    others        the whole text tokenized once; windows of "test" in order, of "train" at random
                  offsets

    Raises ValueError if the text is shorter than one window.
    """
    documents = hub.documents(name, split)
    rng = random.Random(seed)
    if name == "c4":
        drawn = [random_window(tokenizer, documents, seq_len, rng) for _ in range(count or 256)]
        return torch.tensor(drawn)
    if name == PACKED:
        ids = packed(tokenizer, documents)
    else:
        ids = tokenizer.encode(documents[0])
    if len(ids) < seq_len:
        raise ValueError(
            f"{name} has {len(ids)} tokens, fewer than one window of {seq_len}: lower --seq-len"
        )
    if split == "test" or name == PACKED:
        starts = range(0, len(ids) - seq_len + 1, seq_len)[:count]
    else:
        starts = [rng.randint(0, len(ids) - seq_len) for _ in range(count)]
    return torch.tensor([ids[start : start + seq_len] for start in starts])


def packed(tokenizer, documents):
    """Return the ids of documents end to end, with the begin-of-sequence id, if the model has one,
    before the first only."""
    if tokenizer.eot is None:
        raise ValueError(
            f"the articles of {PACKED} are packed, and this tokenizer has no end-of-text token to "
            f"put between them: choose wikitext2 or c4 (text files calibrate on {PACKED}), or a "
            "dynamic scheme, which needs no calibration text"
        )
    ids = tokenizer.encode("")
    for document in documents:
        ids += [*tokenizer.encode(document, bos=False), tokenizer.eot]
    return ids


def random_window(tokenizer, documents, seq_len, rng):
    """Return the ids of a window at a random offset of a random document that is long enough."""
    for _ in range(10000):  # about one in seventy of C4's documents is long enough for 4,096 tokens
        ids = tokenizer.encode(documents[rng.randint(0, len(documents) - 1)])
        if len(ids) >= seq_len:
            start = rng.randint(0, max(0, len(ids) - seq_len - 1))
            return ids[start : start + seq_len]
    raise ValueError(f"no document has {seq_len} tokens: lower --seq-len")


def calibration_windows(tokenizer, name, seq_len, count, seed):
    """Return `count` windows of the training split, to calibrate on. Raises ValueError if there are
    fewer."""
    tokens = windows(tokenizer, name, "train", seq_len, count, seed)
    if len(tokens) < count:
        raise ValueError(
            f"--calib-windows {count}: there are only {len(tokens)} of {seq_len} tokens"
        )
    return tokens


def check_vocabulary(tokens, config, name):
    """Raise ValueError if a token id is outside the model's vocabulary, as with another model's
    tokenizer. `name`, of the model or of the text, begins the message."""
    if tokens.max() >= config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer gives id {tokens.max()}; the model has {config.vocab_size} ids"
        )
