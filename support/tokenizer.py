"""Text to token ids and back: sentencepiece, tiktoken and tokenizers behind one encode and decode.

Read top to bottom: the Tokenizer; how each of three formats is read; which ids begin and end a
text.

What this file does not do: it cuts and merges nothing itself, knows no chat template, and runs no
code of a checkpoint.
"""

import base64
import json
import re
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers


class Tokenizer:
    """Text to token ids and back, exactly as the model's own tokenizer: each file format is read as
    its owner reads it.

    tokenizer.model, SentencePiece    LLaMA-2, Mistral           text that looks like a special token stays text
    tokenizer.model, tiktoken format  LLaMA-3, as Meta ships it  the same
    tokenizer.json                    all others                 special tokens written out in the text are recognised

    `bos` is the id that the model's tokenizer puts before every text (None where it puts none, as
    SmolLM2's), `eot` the id that ends a document, by which documents are packed end to end (None
    where the files name none), `ends` the set of all ids that end what a model says.
    """

    def __init__(self, path, encode, decode, known, bos, eot, ends):
        self._path, self._encode, self._decode, self._known = path, encode, decode, known
        self.bos, self.eot, self.ends = bos, eot, ends

    @classmethod
    def from_pretrained(cls, directory):
        """Raises FileNotFoundError where there is no tokenizer, ValueError that names the file
        where it is damaged."""
        directory = Path(directory)
        for path, read in (
            (directory / "tokenizer.model", read_model),
            (directory / "tokenizer.json", read_json),
        ):
            if path.is_file():
                with one_line(path, "not a tokenizer this project reads"):
                    encode, decode, known, special, bos, eos = read(path)
                return cls(
                    path, encode, decode, known, *begin_and_ends(directory, special, bos, eos)
                )
        raise FileNotFoundError(f"{directory}: no tokenizer.model and no tokenizer.json")

    def encode(self, text, bos=True):
        """Token ids, a list of int. With `bos`, the begin-of-sequence id goes first where the model
        has one. Raises ValueError for a text that the tokenizer cannot encode."""
        with one_line(self._path, "cannot encode this text"):
            # refuses half a surrogate pair, which tiktoken would replace without a word
            text.encode()
            ids = self._encode(text)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids):
        """The text. A model may have more ids than its tokenizer, to make a round number: these
        have no text."""
        return self._decode([i for i in ids if i in self._known])


@contextmanager
def one_line(path, problem):
    """Whatever a library raises becomes a ValueError of one line. A Rust panic is no Exception, and
    there is no module to import it from: only its name tells it from Ctrl-C."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path}: {problem} ({' '.join(str(error).split())})") from None
        raise


# --------------------------------------------------------------------------------------------------
# Formats. A reader returns encode, decode, the ids that have text, the special tokens (name -> id),
# and the ids that its file gives for the beginning and the end of a text, or None.

# How LLaMA-3 cuts text into words, before byte-pair encoding merges within them.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# The 256 ids after the vocabulary, as LLaMA-3.1 names them. LLaMA-3's file is the same, and LLaMA-3
# never uses those ids that LLaMA-3.1 names anew (<|eom_id|> is one).
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
]  # fmt: skip


def read_model(path):
    try:  # tiktoken's format: a line for each token, its bytes in base64 and its rank
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:  # not that, so it should be SentencePiece's protocol buffer
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        known = range(processor.get_piece_size())
        special = {processor.id_to_piece(i): i for i in known if processor.is_control(i)}
        bos, eos = (
            i if i in known else None for i in (processor.bos_id(), processor.eos_id())
        )  # -1 where it has none
        return processor.encode, processor.decode, known, special, bos, eos
    # tiktoken takes what it gets: a file cut short would shift every special token, or end the
    # process.
    if any(bytes([byte]) not in ranks for byte in range(256)) or sorted(ranks.values()) != list(
        range(len(ranks))
    ):
        raise ValueError("it is cut short: bytes or ranks are missing")
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    coding = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=special
    )
    known = range(len(ranks) + len(special))
    bos, eos = special["<|begin_of_text|>"], special["<|end_of_text|>"]
    encode = lambda text: [i for piece in pieces(text) for i in coding.encode_ordinary(piece)]
    return encode, coding.decode, known, special, bos, eos


def pieces(text, longest_run=25_000, longest_piece=400_000):
    """tiktoken panics on a run of a million spaces. Text with a run of over 25,000 characters, all
    blank or none, is cut as Meta's tokenizer cuts. Other text stays whole: Meta's cuts at 400,000
    characters, in mid-word, would only give it other ids than the same model's tokenizer.json
    gives."""
    runs = re.compile(r"\s+|\S+")
    if all(run.end() - run.start() <= longest_run for run in runs.finditer(text)):
        return [text]
    cuts = []
    for start in range(0, len(text), longest_piece):
        cuts.append(start)
        for run in runs.finditer(text, start, start + longest_piece):
            cuts += range(run.start() + longest_run, run.end(), longest_run)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]


def read_json(path):
    text = path.read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(
        text
    )  # refuses what has another form; what follows, it lets pass
    tokenizer.no_truncation()  # what a file keeps of its training run
    tokenizer.no_padding()
    tokenizer.post_processor = (
        None  # puts special tokens around a text: `bos` is the one before, and none goes after
    )
    raw, vocabulary = json.loads(text), tokenizer.get_vocab()
    special = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    begin = before_text(raw["post_processor"]) if raw.get("post_processor") else []
    known = set(vocabulary.values())
    if re.search(r'"(Regex|String)"\s*:\s*""', text):
        raise ValueError("it has an empty pattern")
    if raw["model"].get("dropout"):
        raise ValueError("it merges at random: dropout is for training")
    if moved := [
        name for name, i in special.items() if vocabulary.get(name) != i
    ]:  # the library numbers them itself
        raise ValueError(f"the id of its token {moved[0]!r} is another token's, or leaves a gap")
    if len(known) < len(vocabulary):
        raise ValueError("two of its tokens have one id")
    if len(begin) > 1 or any(vocabulary.get(name) != i for name, i in begin):
        raise ValueError(
            f"its post-processor begins a text with {begin}: not one token of its vocabulary"
        )
    encode = lambda text: tokenizer.encode(text).ids
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    return encode, decode, known, special, begin[0][1] if begin else None, special.get("</s>")


def before_text(processor):
    """The special tokens that a tokenizer.json's post-processor puts before a text: pairs of name
    and id."""
    if processor["type"] == "Sequence":
        return [pair for step in processor["processors"] for pair in before_text(step)]
    if processor["type"] != "TemplateProcessing":
        return (
            [processor["cls"]] if "cls" in processor else []
        )  # BERT's and RoBERTa's; ByteLevel's adds nothing
    names = [
        part.get("SpecialToken", {}).get("id") for part in processor["single"]
    ]  # None where the text goes
    if names.count(None) != 1:
        raise ValueError("its post-processor's template does not hold the text once")
    tokens = processor["special_tokens"]
    return [
        (name, i)
        for name in names[: names.index(None)]
        for i in tokens.get(name, {"ids": ["no id"]})["ids"]
    ]


# --------------------------------------------------------------------------------------------------
# The ids that begin and end a text

DOCUMENT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
)  # before the tokenizer's own, which in a chat model ends a turn
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")


def begin_and_ends(directory, special, bos, eos):
    """A Tokenizer's bos, eot and ends. `bos` and `eos` are those of the tokenizer's file;
    tokenizer_config.json overrules it, as in transformers (DeepSeek's tokenizer.json, for one, has
    no post-processor that adds its bos)."""
    path = directory / "tokenizer_config.json"
    settings = read_object(path)
    with one_line(path, "not a tokenizer's configuration"):
        tokens = {
            key: x.get("content") if isinstance(x, dict) else x for key, x in settings.items()
        }
        if tokens.get("add_bos_token") is not None:
            bos = special.get(tokens.get("bos_token"), bos) if tokens["add_bos_token"] else None
        end = special.get(tokens.get("eos_token"), eos)
    eot = next((special[name] for name in DOCUMENT_ENDS if name in special), end)
    ends = {
        eot,
        eos,
        end,
        *(special.get(name) for name in TURN_ENDS),
        *ends_of_checkpoint(directory),
    }
    return bos, eot, ends - {None}


def ends_of_checkpoint(directory):
    """The ids that end what the model says: those of generation_config.json, else of config.json;
    one or a list."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        ids = read_object(path).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise ValueError(f"{path}: eos_token_id {ids} is no token id and no list of them")
        if ids:
            return ids
    return []


def read_object(path):
    """A JSON file's object, empty where there is no file. Raises ValueError that names the file."""
    if not path.is_file():
        return {}
    with one_line(path, "not a JSON object"):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
