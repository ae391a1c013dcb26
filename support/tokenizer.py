"""Text to token ids and back: sentencepiece, tiktoken and tokenizers behind one encode and decode.

Read top to bottom: the Tokenizer; how each of three formats is read; the tokens that a fine-tune
added; which ids begin and end a text; what is refused.

What this file does not do: it cuts and merges nothing itself, knows no chat template, and runs no
code of a checkpoint.
"""

import base64
import itertools
import json
import re
from collections.abc import Callable, Container
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tiktoken
import tokenizers


class Tokenizer:
    """Text to token ids and back, exactly as the model's own tokenizer does it: each file is read
    by the library of the format's authors. If a directory has both, tokenizer.json goes first, as
    in transformers.

    tokenizer.json                    most models            special tokens are recognized
    tokenizer.model, SentencePiece    LLaMA-2, Mistral       special tokens are read as plain text
    tokenizer.model, tiktoken format  LLaMA-3, Meta's files  special tokens are read as plain text

    Tokens that the files beside it list as added (`added_tokens`) are recognized in all three.

    bos        the id that goes before every text, or None if there is none (SmolLM2)
    eot        the id that ends a document, put between packed ones, or None if the files name none
    stop_ids   the set of all ids at which generation stops
    """

    def __init__(self, path, backend):
        self._path = path
        self._backend = backend
        self.bos, self.eot, self.stop_ids = special_ids(path.parent, backend)

    @classmethod
    def from_pretrained(cls, directory):
        """Read the tokenizer of a checkpoint. Raises FileNotFoundError if there is none, ValueError
        with the file's path if it is damaged."""
        readers = {"tokenizer.json": read_tokenizer_json, "tokenizer.model": read_tokenizer_model}
        beside = read_files_beside(Path(directory))
        for name, read in readers.items():
            path = Path(directory) / name
            if path.is_file():
                with library_errors(path, "not a tokenizer that this project reads"):
                    backend = read(path, beside)
                return cls(path, backend)
        raise FileNotFoundError(f"{directory}: no tokenizer.model and no tokenizer.json")

    def encode(self, text, bos=True):
        """Return token ids, a list of int. With `bos`, the id of that name goes first if there is
        one. Raises ValueError if the tokenizer cannot encode the text."""
        with library_errors(self._path, "cannot encode this text"):
            text.encode()  # refuses half a surrogate pair, which tiktoken would silently replace
            ids = self._backend.encode(text)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids):
        """Return the text of token ids. A padded vocabulary has more ids than the tokenizer; those
        are skipped."""
        return self._backend.decode([i for i in ids if i in self._backend.ids])


class Backend(NamedTuple):
    """A tokenizer file as its library reads it."""

    encode: Callable  # text -> ids, with nothing before or after them
    decode: Callable  # ids -> text
    ids: Container[int]  # all that have a text
    special: dict[str, int]  # special token -> its id; those that were added are among them
    token_to_id: Callable  # name of a token -> its id, or None if there is no such token
    bos: int | None  # the id that begins a text, if this file has one
    eos: int | None  # the id that ends a text, if this file has one


# --------------------------------------------------------------------------------------------------
# tokenizer.model

# How LLaMA-3 cuts a text into words, within which byte-pair encoding merges.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The 256 ids after the vocabulary, as LLaMA-3.1 names them. LLaMA-3's file is the same, and LLaMA-3
# never uses those ids that LLaMA-3.1 names anew (<|eom_id|> is one).
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
]


def read_tokenizer_model(path, beside):
    """Return the Backend of a tokenizer.model, which is in one of two formats."""
    try:  # tiktoken's: a line for each token, its bytes in base64 and its rank
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:  # so it should be the other
        return sentencepiece_backend(path, beside)
    backend = tiktoken_backend(ranks)
    return with_added_tokens(backend, beside.added, backend.encode, backend.decode)


# Appended to a SentencePiece file, this sets normalizer_spec.add_dummy_prefix to false: no space is
# put before a text.
NO_PREFIX = b"\x1a\x02\x18\x00"


def sentencepiece_backend(path, beside):
    model = path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    bos = processor.bos_id()  # -1 if there is none
    eos = processor.eos_id()
    backend = Backend(
        encode=processor.encode,
        decode=processor.decode,
        ids=ids,
        special={processor.id_to_piece(i): i for i in ids if processor.is_control(i)},
        token_to_id={processor.id_to_piece(i): i for i in ids}.get,
        bos=bos if bos in ids else None,
        eos=eos if eos in ids else None,
    )
    for name, (i, _) in beside.added.items():
        if i in ids and processor.id_to_piece(i) != name:
            raise ValueError(f"the id of the added token {name!r} is another token's")
    plain = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)

    def encode_later(text):
        has_prefix = beside.prefix == "first" or text.startswith(" ")
        return (plain if has_prefix else processor).encode(text)

    return with_added_tokens(backend, beside.added, encode_later, plain.decode)


def tiktoken_backend(ranks):
    check_ranks(ranks)
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    encoding = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=special
    )

    def encode(text):
        ids = []
        for piece in split_long_runs(text):
            ids += encoding.encode_ordinary(piece)
        return ids

    return Backend(
        encode=encode,
        decode=encoding.decode,
        ids=range(len(ranks) + len(special)),
        special=special,
        token_to_id=special.get,
        bos=special["<|begin_of_text|>"],
        eos=special["<|end_of_text|>"],
    )


def split_long_runs(text, longest_run=25_000, longest_piece=400_000):
    """Split a text with a long run of characters, all blank or none of them, as Meta's tokenizer
    does, because tiktoken panics on a run of a million spaces.

    A text without such a run stays whole. Meta's tokenizer cuts it every 400,000 characters, in the
    middle of a word, so it gives other ids than the tokenizer.json of the same model.
    """
    runs = re.compile(r"\s+|\S+")
    if all(run.end() - run.start() <= longest_run for run in runs.finditer(text)):
        return [text]
    cuts = []
    for start in range(0, len(text), longest_piece):
        cuts.append(start)
        for run in runs.finditer(text, start, start + longest_piece):
            cuts += range(run.start() + longest_run, run.end(), longest_run)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]


# --------------------------------------------------------------------------------------------------
# tokenizer.json


def read_tokenizer_json(path, beside):
    """Return the Backend of a tokenizer.json. The file does not say which token ends a text; if it
    has "</s>", that one does."""
    text = path.read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(text)
    # That raises for most damage; the checks below find the rest.
    raw = json.loads(text)
    special = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    for name, (i, flags) in beside.added.items():  # in the order of their ids
        if name not in special:
            tokenizer.add_tokens([tokenizers.AddedToken(name, **flags)])
        special[name] = i
    vocabulary = tokenizer.get_vocab()
    first = tokens_before_text(raw["post_processor"]) if raw.get("post_processor") else []
    check_model(raw, text)
    check_ids(vocabulary, special, first)
    is_llama2 = raw.get("normalizer") == LLAMA2_NORMALIZER and not raw.get("pre_tokenizer")
    if is_llama2 and beside.is_llama:  # as transformers reads it
        prefix = beside.prefix
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prefix, split=False)
    # A file may keep these two from its training run.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # It puts special tokens around a text. The one before it is `bos`, and none goes after it.
    tokenizer.post_processor = None
    return Backend(
        encode=lambda text: tokenizer.encode(text).ids,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        ids=set(vocabulary.values()),
        special=special,
        token_to_id=vocabulary.get,
        bos=first[0][1] if first else None,
        eos=special.get("</s>"),
    )


# How the tokenizer.json of a LLaMA-2 puts a space before a text, and before what follows a special
# token, too
LLAMA2_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def tokens_before_text(processor):
    """Return the special tokens that the post-processor of a tokenizer.json puts before a text, as
    pairs of name and id."""
    if processor["type"] == "Sequence":
        return [token for step in processor["processors"] for token in tokens_before_text(step)]
    if processor["type"] != "TemplateProcessing":
        # BERT's and RoBERTa's put "cls" first; ByteLevel's adds no token.
        return [processor["cls"]] if "cls" in processor else []
    # The name of a special token, or None for the text.
    names = [part.get("SpecialToken", {}).get("id") for part in processor["single"]]
    if names.count(None) != 1:
        raise ValueError("its post-processor's template does not hold the text once")
    tokens = processor["special_tokens"]
    first = []
    for name in names[: names.index(None)]:
        ids = tokens[name]["ids"] if name in tokens else ["no id"]
        first += [(name, i) for i in ids]
    return first


# --------------------------------------------------------------------------------------------------
# What the files beside it say, above all the tokens that a fine-tune added, such as <|im_start|>


class FilesBeside(NamedTuple):
    """The contents of the files beside a tokenizer's own file, as far as they matter."""

    added: dict  # see `added_tokens`
    is_llama: bool  # transformers takes its class for LLaMA's tokenizers
    # LLaMA-2's and Mistral's put a space before a text: "first". With `legacy` in
    # tokenizer_config.json, "always", they also put one before what follows an added token.
    prefix: str


def read_files_beside(directory):
    """Return FilesBeside. Raises ValueError with the path of a file that cannot be read."""
    config = read_json_object(directory / "tokenizer_config.json")
    family = read_json_object(directory / "config.json").get("model_type")
    kind = config.get("tokenizer_class") or "LlamaTokenizer"
    is_llama = family == "llama" and kind in ("LlamaTokenizer", "LlamaTokenizerFast")
    prefix = "always" if config.get("legacy") is True else "first"
    return FilesBeside(added_tokens(directory), is_llama, prefix)


FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def added_tokens(directory):
    """Return the tokens that tokenizer_config.json (`added_tokens_decoder`) or added_tokens.json
    lists, a dict in the order of their ids: name -> id and flags, as tokenizers.AddedToken takes
    them. Raises ValueError with the file's path."""
    added = {}
    path = directory / "tokenizer_config.json"
    with library_errors(path, "not a tokenizer's configuration"):
        for i, token in (read_json_object(path).get("added_tokens_decoder") or {}).items():
            flags = {flag: token[flag] for flag in FLAGS if flag in token}
            added[token["content"]] = int(i), flags
    path = directory / "added_tokens.json"
    with library_errors(path, "not a list of added tokens"):
        named = token_names(directory).values()
        for name, i in read_json_object(path).items():
            is_special = name in named
            flags = {"special": is_special, "normalized": not is_special}
            if added.setdefault(name, (i, flags))[0] != i:
                raise ValueError(f"{name!r} has another id in tokenizer_config.json")
    with library_errors(directory, "its added tokens cannot be read"):
        ids = [i for i, _ in added.values()]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError("ids of added tokens are not whole numbers, or two have the same")
        if not all(type(name) is str and name for name in added):
            raise ValueError("an added token has no text")
    return dict(sorted(added.items(), key=lambda token: token[1][0]))


def token_names(directory):
    """Return the tokens that tokenizer_config.json names, such as {"eos_token": "</s>"}. In files
    of older fine-tunes, those without added_tokens_decoder, special_tokens_map.json overrules
    it."""
    config = read_json_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_json_object(directory / "special_tokens_map.json")
    return {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }


def with_added_tokens(backend, added, encode_later, decode_later):
    """Return a Backend that also recognizes the `added` tokens, the longest first. `encode_later`
    and `decode_later` are for what follows one of them."""
    if not added:
        return backend
    check_flags(added)
    ids = {name: i for name, (i, _) in added.items()}
    names = {i: name for name, i in ids.items()}
    longest_first = sorted(map(re.escape, ids), key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(longest_first)})")

    def encode(text):
        encoded = []
        encode_part = backend.encode
        for k, part in enumerate(pattern.split(text)):
            if k % 2:  # an added token; what is between two stands at even k
                encoded.append(ids[part])
                encode_part = encode_later
            elif part:
                encoded += encode_part(part)
        return encoded

    def decode(tokens):
        parts = []
        decode_part = backend.decode
        for is_added, group in itertools.groupby(tokens, names.__contains__):
            if is_added:
                parts += [names[i] for i in group]
                decode_part = decode_later
            else:
                parts.append(decode_part(list(group)))
        return "".join(parts)

    return backend._replace(
        encode=encode,
        decode=decode,
        ids={*backend.ids, *names},
        special=backend.special | ids,
        token_to_id=lambda name: ids.get(name, backend.token_to_id(name)),
    )


# --------------------------------------------------------------------------------------------------
# The ids that begin and end a text

DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")


def special_ids(directory, backend):
    """Return bos, eot and stop_ids of a Tokenizer.

    tokenizer_config.json overrules the tokenizer's file, as in transformers: in DeepSeek's
    tokenizer.json, for one, no post-processor adds bos.
    """
    path = directory / "tokenizer_config.json"
    adds_bos = read_json_object(path).get("add_bos_token")
    special = backend.special
    bos = backend.bos
    eos = backend.eos
    with library_errors(path, "not a tokenizer's configuration"):
        names = token_names(directory)
        if adds_bos is not None:
            bos = named_id(backend, names, "bos_token", bos) if adds_bos else None
        eos = named_id(backend, names, "eos_token", eos)
    # In a chat model eos ends a turn: a token that ends a document goes before it.
    eot = next((special[name] for name in DOCUMENT_ENDS if name in special), eos)
    stop_ids = {eot, backend.eos, eos}
    stop_ids |= {special.get(name) for name in TURN_ENDS}
    stop_ids |= set(checkpoint_eos_ids(directory))
    return bos, eot, stop_ids - {None}


def named_id(backend, names, key, default):
    """Return the id of the token that the configuration names under a key. Raises ValueError if
    the tokenizer has no such token."""
    name = names.get(key)
    if name in (None, ""):  # some of the first LLaMA files name the empty token
        return default
    i = backend.token_to_id(name)
    if i is None:
        raise ValueError(f"its {key} {name!r} is none of the tokenizer's tokens: its id is unknown")
    return i


def checkpoint_eos_ids(directory):
    """Return a list of the ids at which generation stops by generation_config.json, else by
    config.json. Either may have one id or a list of them."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        ids = read_json_object(path).get("eos_token_id")
        if ids is None:
            continue
        if not isinstance(ids, list):
            ids = [ids]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise ValueError(f"{path}: eos_token_id {ids} is neither a token id nor a list of them")
        if ids:
            return ids
    return []


def read_json_object(path):
    """Return the object in a JSON file, or an empty one if there is no file. Raises ValueError with
    the file's path."""
    if not path.is_file():
        return {}
    with library_errors(path, "not a JSON object"):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


# --------------------------------------------------------------------------------------------------
# What is refused, although a library would let it pass, or panic


@contextmanager
def library_errors(path, problem):
    """Re-raise whatever a library raises as a ValueError of one line with the file's path."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust is not an Exception, and there is no module to import its class from: only
        # its name tells it from Ctrl-C.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path}: {problem} ({' '.join(str(error).split())})") from None
        raise


def check_ranks(ranks):
    """Raise ValueError if a file in tiktoken's format was cut short: tiktoken would shift the ids
    of all special tokens, or end the process."""
    all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if not all_bytes or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("it is cut short: bytes or ranks are missing")


def check_flags(added):
    """Raise ValueError if an added token takes in blanks beside it, or is one only as a word."""
    for name, (_, flags) in added.items():
        for flag in ("lstrip", "rstrip", "single_word"):
            if flags.get(flag):
                raise ValueError(f"{flag} of the added token {name!r} is not supported")


def check_model(raw, text):
    """Raise ValueError if a tokenizer.json has a pattern that matches everywhere, or merges at
    random. `raw` is its content, which was read from `text`."""
    if re.search(r'"(Regex|String)"\s*:\s*""', text):
        raise ValueError("it has an empty pattern")
    if raw["model"].get("dropout"):
        raise ValueError("it merges at random: dropout is for training")


def check_ids(vocabulary, special, first):
    """Raise ValueError if a tokenizer.json gives ids that its library does not use. The library
    numbers special tokens itself. `first` are the tokens before a text."""
    for name, i in special.items():
        if vocabulary.get(name) != i:
            raise ValueError(f"the id of its token {name!r} is another token's, or leaves a gap")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two of its tokens have one id")
    if len(first) > 1 or any(vocabulary.get(name) != i for name, i in first):
        raise ValueError(
            f"its post-processor begins a text with {first}: not one token of its vocabulary"
        )
