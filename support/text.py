"""Windows of token ids, cut from a text by the protocol that its literature uses.

What this file does not do: the documents come from hub.py, the ids from tokenizer.py.
"""

import random

import torch

from support import hub

# articles end to end, an end-of-text id after each, as language models are pre-trained
PACKED = "wiki-sample"


def windows(tokenizer, text, split, seq_len, count, seed):
    """`count` windows (None: all) of `seq_len` token ids, (count, seq_len) int64, by the protocol
    of the text.

    wiki-sample   articles packed end to end, an end-of-text id after each; windows in order
    c4            KVQuant's and GPTQ's: each at a random offset of a random document that is long enough; 256 of them
    others        the whole text tokenized once; "test" windows in order, "train" windows at random offsets
    Raises ValueError where the text is shorter than one window.
    """
    documents, draw = hub.documents(text, split), random.Random(seed)
    if text == "c4":
        return torch.tensor(
            [cut_from_documents(tokenizer, documents, seq_len, draw) for _ in range(count or 256)]
        )
    if text == PACKED:
        if tokenizer.eot is None:
            raise ValueError(
                f"{text} is packed documents, and this tokenizer has no end-of-text token to put between"
            )
        ids = tokenizer.encode("")  # the begin-of-sequence id, once, where the model has one
        for document in documents:
            ids += [*tokenizer.encode(document, bos=False), tokenizer.eot]
    else:
        ids = tokenizer.encode(documents[0])
    if len(ids) < seq_len:
        raise ValueError(
            f"{text} has {len(ids)} tokens, fewer than one window of {seq_len}: lower --seq-len"
        )
    if split == "test" or text == PACKED:
        starts = range(0, len(ids) - seq_len + 1, seq_len)[:count]
    else:
        starts = [draw.randint(0, len(ids) - seq_len) for _ in range(count)]
    return torch.tensor([ids[start : start + seq_len] for start in starts])


def cut_from_documents(tokenizer, documents, seq_len, draw):
    for _ in range(10000):  # of C4's documents one in about seventy is long enough for 4,096 tokens
        ids = tokenizer.encode(documents[draw.randint(0, len(documents) - 1)])
        if len(ids) >= seq_len:
            start = draw.randint(0, max(0, len(ids) - seq_len - 1))
            return ids[start : start + seq_len]
    raise ValueError(f"no document has {seq_len} tokens: lower --seq-len")


def calibration_windows(tokenizer, text, seq_len, count, seed):
    """The windows of the training split that calibrate. Raises ValueError where there are fewer
    than `count`."""
    tokens = windows(tokenizer, text, "train", seq_len, count, seed)
    if len(tokens) < count:
        raise ValueError(
            f"--calib-windows {count}: there are only {len(tokens)} of {seq_len} tokens"
        )
    return tokens


def check_vocabulary(tokens, config, directory):
    """Raises ValueError where a token is none of the model's: the tokenizer is another model's."""
    if tokens.max() >= config.vocab_size:
        raise ValueError(
            f"{directory}: its tokenizer gives id {tokens.max()}, the model has {config.vocab_size}"
        )
