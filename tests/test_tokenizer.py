"""The tokenizer: each format against ids that the owner's library gave, or that are worked out by
hand."""

import base64
import io
import json

import pytest
import sentencepiece
import tokenizers

from support.tokenizer import Tokenizer, library_errors
from tests.helpers import BYTE_LEVEL, DIGITS, bytes_vocabulary, write_bpe

STRINGS_THAT_HURT = [
    "",
    " ",
    "a  5",
    "3.14159, 1234567 and 2²",
    "  two  spaces   three ",
    "\n\n\t \t\nx\r\n",
    "don't we'll I'M it's5'll",
    "naïve café e\u0301 Ελλάδα",
    "你好，世界 こんにちは",
    "👩‍👩‍👧 🇨🇭 😀😀",
    "a<|endoftext|>b <|im_start|>",
    "x\u00a0y\u2003z\u200bw\ufeff",
    "!\x04!\x00\x1d a\U00050000b",
    "def f(x):\n    return x**2  # ok",
    "İstanbul ½ Ⅷ ٣ ९",
    " " * 300 + "end",
]
# The ids that the tokenizers package (0.23.3) gives for these strings and SmolLM2's tokenizer.json.
# A few bytes are not in its vocabulary (0x04, 0x1d, the first of U+50000): they are dropped.
SMOLLM2_IDS = [
    [],
    [216],
    [81, 256, 37],
    [35, 30, 33, 36, 33, 37, 41, 28, 216, 33, 34, 35, 36, 37, 38, 39, 284, 216, 34, 19133],
    [216, 827, 216, 5600, 256, 1296, 216],
    [14436, 216, 197, 198, 104, 2738],
    [12420, 982, 392, 3060, 339, 23, 61, 357, 506, 37, 3060],
    [3546, 46494, 37366, 297, 151, 219, 5664, 239, 17162, 17162, 26112, 29589, 8998],
    [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230, 46673, 237, 10391, 237, 41152, 7365,
     111, 7365, 124],
    [10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 15107, 225, 118, 10813,
     225, 251, 40303, 218, 10813, 242, 218],
    [81, 0, 82, 216, 1],
    [104, 15442, 105, 321, 221, 106, 321, 229, 103, 186, 136, 140],
    [10095, 190, 253, 234, 218, 218, 82],
    [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 10907],
    [143, 125, 28683, 216, 16738, 216, 173, 223, 117, 216, 164, 113, 216, 9310, 124],
    [40686, 40686, 40686, 40686, 12427, 16964, 1112],
]  # fmt: skip


def write_tiktoken(directory, ranks):
    directory.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")


def llama3_pre_tokenizer():
    words = (  # as the tokenizer.json of LLaMA-3 has it
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


def write_sentencepiece(directory, **settings):
    """Train a model of LLaMA-2's kind: an unknown character becomes bytes, each digit is a token,
    and nothing is normalized."""
    sentences = [
        "the cat sat on the mat 1 2 3 4 5 6 7 8 9 0",
        "hello world, it is a cat",
        "sinks are predicted",
    ] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        vocab_size=320,
        byte_fallback=True,
        model_type="bpe",
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def rewrite(directory, **change):
    """Change the values of some keys of a tokenizer.json."""
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


# --------------------------------------------------------------------------------------------------
# What each format gives


def test_the_default_tokenizer_agrees_with_the_original(default_model):
    tokenizer = Tokenizer.from_pretrained(default_model)
    assert [tokenizer.encode(text) for text in STRINGS_THAT_HURT] == SMOLLM2_IDS
    for text in STRINGS_THAT_HURT:
        assert tokenizer.decode(tokenizer.encode(text)) == text or "\x04" in text
    assert (tokenizer.bos, tokenizer.eot, tokenizer.stop_ids) == (None, 0, {0, 2})


def test_llama3_tokenizer_in_both_formats(tmp_path):
    """Worked by hand: words are cut first (three digits at a time, a space with its word), then
    merged by rank."""
    ranks = bytes_vocabulary([" cat", "1234", "ab", "  "])
    cat = ranks[b" cat"]
    ab = ranks[b"ab"]
    write_tiktoken(tmp_path / "meta", ranks)
    special = ("<|begin_of_text|>", "<|end_of_text|>")
    write_bpe(tmp_path / "hub", ranks, llama3_pre_tokenizer(), special, first=special[0])
    meta = Tokenizer.from_pretrained(tmp_path / "meta")
    hub = Tokenizer.from_pretrained(tmp_path / "hub")
    assert meta.bos == hub.bos == len(ranks)
    assert meta.eot == hub.eot == len(ranks) + 1
    for tokenizer in (meta, hub):
        assert tokenizer.encode("ab cat1234", bos=False) == [ab, cat, ranks[b"123"], ord("4")]
        assert tokenizer.encode("12  cat\n", bos=False) == [ranks[b"12"], ord(" "), cat, ord("\n")]
        assert tokenizer.encode("1 234", bos=True) == [len(ranks), *b"1 234"]
        assert tokenizer.encode("", bos=True) == [len(ranks)]
    for text in STRINGS_THAT_HURT:
        assert meta.encode(text) == hub.encode(text)
        for tokenizer in (meta, hub):
            assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    # A special token in a text is text to Meta's own tokenizer, and the token to the hub's file.
    assert hub.encode("a<|end_of_text|>", bos=False) == [ord("a"), len(ranks) + 1]
    assert meta.encode("a<|end_of_text|>", bos=False) == [*b"a<|end_of_text|>"]


def test_llama3_special_tokens_have_their_names_and_places(tmp_path):
    """As published: of LLaMA-3.1's 128,000 + i, i = 0 begins a text, 1, 8 and 9 end one, and there
    are 256 in all."""
    write_tiktoken(tmp_path, bytes_vocabulary())
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos, tokenizer.eot, tokenizer.stop_ids) == (256, 257, {257, 264, 265})
    places = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
        255: "<|reserved_special_token_246|>",
        256: "",
    }
    assert {i: tokenizer.decode([256 + i]) for i in places} == places
    assert len({tokenizer.decode([256 + i]) for i in range(256)}) == 256


def test_sentencepiece_tokenizer(tmp_path):
    pieces = write_sentencepiece(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos, tokenizer.eot, tokenizer.stop_ids) == (1, 2, {2})
    cat = [pieces.id_to_piece(i) for i in tokenizer.encode("the cat 12")]
    assert cat == ["<s>", "▁the", "▁cat", "▁", "1", "2"]
    e_acute = [pieces.id_to_piece(i) for i in tokenizer.encode("é", bos=False)]
    assert e_acute == ["▁", "<0xC3>", "<0xA9>"]
    assert 1 not in tokenizer.encode("<s>", bos=False)  # text is never a special token
    for text in STRINGS_THAT_HURT:
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    # Further ids of a model have no text, and numbers that are no ids have none.
    assert tokenizer.decode([*tokenizer.encode("the cat"), 320, 5000, -1, 2**40]) == "the cat"


def test_a_sentencepiece_model_without_begin_and_end(tmp_path):
    write_sentencepiece(tmp_path, bos_id=-1, eos_id=-1)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos, tokenizer.eot, tokenizer.stop_ids) == (None, None, set())
    assert tokenizer.encode("the cat") == tokenizer.encode("the cat", bos=False)


def write_byte_fallback(directory, pieces):
    """Write the tokenizer.json of a SentencePiece model, as TinyLlama's is: merges in the order of
    the ids of the merged pieces."""
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = []
    for piece, i in vocabulary.items():
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i)):
            merges += [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    merges = [merge for merge in merges if {*merge} <= vocabulary.keys()]
    merges.sort(key=lambda merge: vocabulary["".join(merge)])
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    raw = {
        "added_tokens": [
            {"id": i, "content": name, **flags} for i, name in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "post_processor": template(["<s>", None], {"<s>": 1}),
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "byte_fallback": True,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "merges": merges,
        },
    }
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(raw))


def template(parts, ids):
    """Return a post-processor that puts special tokens around the text, which is None."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": part, "type_id": 0}} if part else text for part in parts
        ],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()
        },
    }


def test_a_byte_fallback_tokenizer_json_gives_what_sentencepiece_gives(tmp_path):
    pieces = write_sentencepiece(tmp_path / "model")
    write_byte_fallback(tmp_path / "json", pieces)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "json")
    assert (tokenizer.bos, tokenizer.eot, tokenizer.stop_ids) == (1, 2, {2})
    for text in [*STRINGS_THAT_HURT, "the cat sat on the mat, it is 10 sinks"]:
        assert tokenizer.encode(text, bos=False) == pieces.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    assert tokenizer.encode("</s>", bos=False) == [2]  # a special token in a text is the token


def test_other_kinds_of_tokenizer_json(tmp_path):
    """Ids worked by hand, on a vocabulary of the bytes, "ab" (256) and one special token (257)."""
    strip_left = {
        "id": 257,
        "content": "<x>",
        "lstrip": True,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
    }
    unigram = {
        "type": "Unigram",
        "vocab": [["?", 0.0], ["a", -3.0], ["b", -3.0], ["ab", -2.0]],
        "unk_id": 0,
    }
    for change, text, ids in [
        ({"normalizer": {"type": "NFC"}}, "e\u0301", [0xC3, 0xA9]),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "ab cd", [256, ord("c"), ord("d")]),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "ab", [ord(" "), 256]),
        ({"pre_tokenizer": None}, "abc", [256, ord("c")]),
        ({"added_tokens": [{**strip_left, "special": True}]}, "a  <x>b", [ord("a"), 257, ord("b")]),
        ({"model": unigram, "pre_tokenizer": None, "added_tokens": []}, "abba", [3, 2, 1]),
    ]:
        write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS)
        rewrite(tmp_path, **change)
        assert Tokenizer.from_pretrained(tmp_path).encode(text) == ids, change


def test_merges_are_done_in_their_own_order(tmp_path):
    """By hand: "abc" is ab + c if that merge comes first, a + bc if the other does, whatever the
    ids are."""
    raw = write_bpe(tmp_path, bytes_vocabulary(["ab", "bc", "cd"]), DIGITS)
    assert Tokenizer.from_pretrained(tmp_path).encode("abc") == [256, ord("c")]
    rewrite(tmp_path, model={**raw["model"], "merges": raw["model"]["merges"][::-1]})
    assert Tokenizer.from_pretrained(tmp_path).encode("abc") == [ord("a"), 257]
    # "cd" is a token without a merge: out of reach, or taken whole if merges may be ignored.
    one_merge = {**raw["model"], "merges": [["a", "b"]]}
    rewrite(tmp_path, model=one_merge)
    assert Tokenizer.from_pretrained(tmp_path).encode("cd ab") == [*b"cd ", 256]
    rewrite(tmp_path, model={**one_merge, "ignore_merges": True})
    assert Tokenizer.from_pretrained(tmp_path).encode("cd ab") == [258, ord(" "), 256]


def test_a_file_that_was_saved_in_training_truncates_and_pads_nothing(tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 7,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    rewrite(tmp_path, truncation=truncation, padding=padding)
    assert Tokenizer.from_pretrained(tmp_path).encode("abc") == [*b"abc"]


def test_a_tokenizer_json_goes_before_a_tokenizer_model(tmp_path):
    """As in transformers: a fine-tune may have left the tokenizer.model of its base model there."""
    write_tiktoken(tmp_path, bytes_vocabulary())
    write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS)
    assert Tokenizer.from_pretrained(tmp_path).encode("ab", bos=False) == [256]


# --------------------------------------------------------------------------------------------------
# Tokens that a fine-tune added

ADDED = ("<|im_start|>", "<|im_end|>")  # ChatML's, with the ids after the 320 of the vocabulary
FLAGS = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
LAYOUTS = {  # the files of a fine-tune of LLaMA-2
    "added_tokens.json": ("tokenizer.model", "added_tokens.json"),
    "added_tokens_decoder": ("tokenizer.model", "added_tokens_decoder"),
    "all of them": ("tokenizer.model", "tokenizer.json", "added_tokens.json"),
    "added_tokens.json beside tokenizer.json": ("base tokenizer.json", "added_tokens.json"),
    "tokenizer.json beside tokenizer.model": ("tokenizer.model", "tokenizer.json"),
    "tokenizer.json": ("tokenizer.json",),
}


def write_fine_tune(directory, layout, family="llama", **settings):
    """Write a fine-tune of LLaMA-2 whose turns end at <|im_end|>, with the files of a layout.
    Return its SentencePiece model."""
    files = LAYOUTS[layout]
    pieces = write_sentencepiece(directory / "pieces")
    added = [
        {"id": 320 + i, "content": name, **FLAGS, "special": True} for i, name in enumerate(ADDED)
    ]
    if "tokenizer.json" in layout or "tokenizer.json" in files:
        write_byte_fallback(directory / "json", pieces)
        raw = json.loads((directory / "json" / "tokenizer.json").read_text())
        if "base tokenizer.json" not in files:
            raw["added_tokens"] += added
        (directory / "tokenizer.json").write_text(json.dumps(raw))
    if "tokenizer.model" in files:
        (directory / "tokenizer.model").write_bytes(
            (directory / "pieces/tokenizer.model").read_bytes()
        )
    if "added_tokens.json" in files:
        (directory / "added_tokens.json").write_text(
            json.dumps({t["content"]: t["id"] for t in added})
        )
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True, **settings}
    if "added_tokens_decoder" in files:
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in added
        }
    settings["tokenizer_class"] = "LlamaTokenizer"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    return pieces


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_tokens_are_read_in_every_layout(layout, tmp_path):
    """By hand: six ids, of which 320 and 321 are the added ones. The text after one of them has no
    space before it, which the text itself has; with `legacy` it has one, too."""
    pieces = write_fine_tune(tmp_path, layout)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    t, he, the, cat = (pieces.piece_to_id(name) for name in ("t", "he", "▁the", "▁cat"))
    assert tokenizer.encode("<|im_start|>the cat<|im_end|>") == [1, 320, t, he, cat, 321]
    assert tokenizer.encode("the cat<|im_end|>the") == [1, the, cat, 321, t, he]
    assert tokenizer.encode("<|im_start|> the cat") == [1, 320, the, cat]
    assert tokenizer.encode("the cat") == [1, *pieces.encode("the cat")]
    assert tokenizer.encode("<|im_star|>", bos=False) == pieces.encode("<|im_star|>")
    for text in (
        "<|im_start|>the cat<|im_end|>",
        "the cat<|im_end|>\n<|im_start|> a 1",
        "a<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    assert 321 in tokenizer.stop_ids
    write_fine_tune(tmp_path / "legacy", layout, legacy=True)
    legacy = Tokenizer.from_pretrained(tmp_path / "legacy")
    assert legacy.encode("<|im_start|>the cat<|im_end|>") == [1, 320, the, cat, 321]
    assert legacy.encode("<|im_start|> the cat") == [1, 320, the, cat]


def test_the_longest_added_token_is_recognized(tmp_path):
    write_sentencepiece(tmp_path)
    added = {"<|a|>": 320, "<|a|><|b|>": 321, "<|b|>": 322}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("<|a|><|b|><|b|><|a|>", bos=False) == [321, 322, 320]


def test_added_tokens_of_metas_file(tmp_path):
    """A file that lists <|eot_id|> makes it a token in a text; without one, it is text."""
    write_tiktoken(tmp_path, bytes_vocabulary())
    eot_id = 256 + 9
    assert Tokenizer.from_pretrained(tmp_path).encode("<|eot_id|>", bos=False) == [*b"<|eot_id|>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|eot_id|>": eot_id}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("a<|eot_id|>", bos=False) == [ord("a"), eot_id]
    assert tokenizer.decode([ord("a"), eot_id]) == "a<|eot_id|>"


@pytest.mark.parametrize("name, content, words", [
    ("added_tokens.json", {"<a>": 5}, "another token's"),
    ("added_tokens.json", {"<a>": 320, "<b>": 320}, "two have the same"),
    ("added_tokens.json", {"<a>": -1}, "whole numbers"),
    ("added_tokens.json", {"<a>": "320"}, "whole numbers"),
    ("added_tokens.json", {"": 320}, "no text"),
    ("added_tokens.json", {"<a>": 320, "<c>": 321}, "another id in tokenizer_config.json"),
    ("added_tokens.json", [], "JSON object"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "configuration"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"320": "<a>"}}, "configuration"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "<a>"}}},
        "whole numbers"),
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "configuration"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"320": {"content": "<a>", "lstrip": True}}},
        "not supported"),
    ("tokenizer_config.json", {"eos_token": "<|im_end|>"}, "its id is unknown"),
    ("tokenizer_config.json", {"bos_token": "<b>", "add_bos_token": True}, "its id is unknown"),
])  # fmt: skip
def test_added_tokens_that_cannot_be_read_are_refused(name, content, words, tmp_path):
    write_sentencepiece(tmp_path)
    decoder = {"added_tokens_decoder": {"322": {"content": "<c>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(decoder))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_token_that_tokenizer_json_numbers_otherwise_is_refused(tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)  # 257 tokens
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": 300}))
    check_refusal(tmp_path, "tokenizer.json", "leaves a gap")


def test_an_end_of_text_that_is_an_ordinary_token_ends_a_text(tmp_path):
    """tokenizer_config.json may name a token that tokenizer.json does not list as special."""
    write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "ab"}))
    assert 256 in Tokenizer.from_pretrained(tmp_path).stop_ids


def test_an_empty_name_names_nothing(tmp_path):
    write_sentencepiece(tmp_path)
    names = {"bos_token": "", "eos_token": {"content": ""}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos, tokenizer.stop_ids) == (1, {2})


def test_older_files_name_the_end_of_a_text_in_special_tokens_map(tmp_path):
    write_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<end>": 320}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}})
    )
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == {2, 320}


# --------------------------------------------------------------------------------------------------
# A run of a million spaces


def cut_as_meta_cuts(text):
    """Cut character by character: every 400,000 characters, and in a run of blanks, or of others,
    every 25,000."""
    parts = []
    start = 0
    run = 0
    for i, char in enumerate(text):
        run = run + 1 if i and char.isspace() == text[i - 1].isspace() else 1
        if i % 400_000 == 0 or run > 25_000:
            parts.append(text[start:i])
            start = i
            run = 1
    return [*parts, text[start:]]


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_000_000,
        "word" + " " * 1_000_000 + "word",
        "\t\u3000" * 12_501 + "ba" + "a" * 50_000 + "\n the end",
        "a b " * 99_999 + "x" + "ab" * 20_000,
    ],
)
def test_a_long_run_gives_the_ids_of_metas_tokenizer(text, tmp_path):
    """No part alone has a run that is too long for a library: its ids are those that tokenizers
    gives for LLaMA-3's pattern. The ids show how long a run was and where it was cut, because every
    merge doubles."""
    merges = [("a", "b")]
    merges += [(2**i * "Ġ", 2**i * "Ġ") for i in range(6)]
    merges += [("a", "a"), ("aa", "aa"), ("ab", "ab")]
    merged = ["".join(merge) for merge in merges]
    ranks = {token.replace("Ġ", " ").encode(): 256 + i for i, token in enumerate(merged)}
    write_tiktoken(tmp_path, bytes_vocabulary() | ranks)
    hub = tmp_path / "hub"
    model = write_bpe(hub, bytes_vocabulary(), llama3_pre_tokenizer(), special=())["model"]
    vocabulary = model["vocab"] | {token: 256 + i for i, token in enumerate(merged)}
    rewrite(hub, model={**model, "vocab": vocabulary, "merges": merges})
    original = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json"))
    expected = []
    for part in cut_as_meta_cuts(text):
        expected += original.encode(part).ids
    assert Tokenizer.from_pretrained(tmp_path).encode(text, bos=False) == expected


def test_a_text_without_a_long_run_is_not_cut(tmp_path):
    """Every word is one token, also the one across character 400,000, and runs of 25,000 are short
    enough."""
    write_tiktoken(tmp_path, bytes_vocabulary([" word"]))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    word = tokenizer.encode(" word")[1]
    assert tokenizer.encode(" word" * 100_001, bos=False) == [word] * 100_001
    assert len(tokenizer.encode(" " * 24_999 + " word" * 80_000, bos=False)) == 24_999 + 80_000


# --------------------------------------------------------------------------------------------------
# The ids that begin and end a text


@pytest.mark.parametrize("processor, bos", [
    (None, None),
    (BYTE_LEVEL, None),
    (template([None], {}), None),
    (template([None, "</s>"], {"</s>": 257}), None),
    (template(["<s>", None], {"<s>": 256}), 256),
    (template(["<s>", None, "</s>"], {"<s>": 256, "</s>": 257}), 256),
    ({"type": "Sequence", "processors": [BYTE_LEVEL, template(["<s>", None], {"<s>": 256})]}, 256),
    ({"type": "RobertaProcessing", "sep": ["</s>", 257], "cls": ["<s>", 256], "trim_offsets": True,
      "add_prefix_space": False}, 256),
])  # fmt: skip
def test_what_goes_before_a_text_and_never_after_it(processor, bos, tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS, ("<s>", "</s>"))
    rewrite(tmp_path, post_processor=processor)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos == bos
    assert tokenizer.encode("a") == ([ord("a")] if bos is None else [bos, ord("a")])
    assert tokenizer.encode("a", bos=False) == [ord("a")]


def test_tokenizer_config_goes_before_the_post_processor(tmp_path):
    """As in transformers, an explicit add_bos_token decides. DeepSeek's files name bos only
    there."""
    write_sentencepiece(tmp_path / "model")
    for name, first in (("plain", None), ("first", "<s>")):
        write_bpe(tmp_path / name, bytes_vocabulary(), DIGITS, ("<s>", "</s>", "<b>"), first=first)
    for name, settings, bos in [
        ("plain", {"add_bos_token": True, "bos_token": "<b>"}, 258),
        ("plain", {"add_bos_token": True, "bos_token": {"content": "<b>", "lstrip": False}}, 258),
        ("plain", {"add_bos_token": True, "bos_token": None}, None),
        ("plain", {"add_bos_token": True}, None),
        ("plain", {"bos_token": "<b>"}, None),
        ("first", {"add_bos_token": True}, 256),
        ("first", {"add_bos_token": False, "bos_token": "<s>"}, None),
        ("first", {"add_bos_token": None, "bos_token": "<b>"}, 256),
        ("model", {"add_bos_token": False, "bos_token": "<s>"}, None),
        ("model", {"add_bos_token": True, "bos_token": "<s>"}, 1),
    ]:
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        assert Tokenizer.from_pretrained(tmp_path / name).bos == bos, (name, settings)


@pytest.mark.parametrize("special, eos, eot, stop_ids", [
    # SmolLM2-instruct and LLaMA-3.1-instruct
    (["<a>", "<|endoftext|>", "<|im_end|>"], "<|im_end|>", 257, {257, 258}),
    (["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>", 256, {256, 257, 258}),
    (["<s>", "</s>"], "</s>", 257, {257}),  # Mistral-Nemo, TinyLlama
    (["<s>", "</s>"], None, 257, {257}),
    (["<s>", "<end>"], {"content": "<end>", "special": True}, 257, {257}),  # DeepSeek
    (["<s>", "<end>"], None, None, set()),
    (["<|endoftext|>", "<end>"], "<end>", 256, {256, 257}),
    (["<s>", "</s>", "<|im_end|>"], "<|im_end|>", 258, {257, 258}),
])  # fmt: skip
def test_what_ends_a_document_and_what_stops_the_model(special, eos, eot, stop_ids, tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS, special)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eot, tokenizer.stop_ids) == (eot, stop_ids)


@pytest.mark.parametrize("generation, config, stop_ids", [
    (None, None, set()),
    (None, 300, {300}),
    (None, [300, 301], {300, 301}),
    (302, [300, 301], {302}),
    ([32000], 2, {32000}),  # ChatML on Mistral
    ("absent", 300, {300}),
    ([], 300, {300}),
])  # fmt: skip
def test_the_checkpoint_names_further_stop_ids(generation, config, stop_ids, tmp_path):
    """generation_config.json, else config.json, has one id or a list. The tokenizer's own stops the
    model too."""
    write_sentencepiece(tmp_path)
    if generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eot, tokenizer.stop_ids) == (2, stop_ids | {2})


# --------------------------------------------------------------------------------------------------
# Damage


def check_refusal(directory, name, words):
    """Check that the tokenizer is refused in one line that names the file and what it is not."""
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.from_pretrained(directory)
    assert str(caught.value).startswith(f"{directory / name}: ")
    assert "\n" not in str(caught.value)


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


EMPTY_SPLIT = {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False}
EMPTY_REPLACE = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
TEXT_TWICE = {**template([None], {}), "single": template([None, None], {})["single"]}
FIRST = "<|endoftext|>"


@pytest.mark.parametrize("change, words", [
    ({"model": {"type": "Unigram"}}, "vocab"),
    ({"model": {"type": "Nonsense"}}, "not a tokenizer"),
    ({"model": None}, "not a tokenizer"),
    ({"pre_tokenizer": {"type": "Nonsense"}}, "not a tokenizer"),
    ({"pre_tokenizer": EMPTY_SPLIT}, "empty pattern"),
    ({"normalizer": EMPTY_REPLACE}, "empty pattern"),
    # The library panics.
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "charsmap"),
    ({"added_tokens": [{"id": 257, "content": "<x>"}]}, "missing field"),
    ({"added_tokens": {"id": 257}}, "sequence"),
    ({"post_processor": {"type": "Nonsense"}}, "PostProcessor"),
    ({"post_processor": {"type": "TemplateProcessing", "single": []}}, "PostProcessor"),
    ({"post_processor": template([], {})}, "the text once"),
    ({"post_processor": TEXT_TWICE}, "the text once"),
    ({"post_processor": template(["<s>", None], {})}, "begins a text"),  # the library would panic
    ({"post_processor": template(["<s>", None], {"<s>": 99999})}, "begins a text"),
    ({"post_processor": template([FIRST, None], {FIRST: 3})}, "begins a text"),
    ({"post_processor": template([FIRST, FIRST, None], {FIRST: 257})}, "begins a text"),
    ({"version": "2.0"}, "version"),
])  # fmt: skip
def test_a_tokenizer_json_that_is_refused(change, words, tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS)
    rewrite(tmp_path, **change)
    check_refusal(tmp_path, "tokenizer.json", words)


@pytest.mark.parametrize("change, words", [
    ({"ab": -1}, "integer `-1`"),
    ({"ab": 2**65}, "e.19"),
    ({"ab": 2**33}, "8589934592"),
    ({"ab": 1.5}, "1.5"),
    ({"ab": True}, "true"),
    ({"ab": "256"}, "256"),
    ({"ab": 3}, "two of its tokens have one id"),
    ({"ab": None}, "null"),
])  # fmt: skip
def test_ids_of_a_vocabulary(change, words, tmp_path):
    raw = write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS)
    rewrite(tmp_path, model={**raw["model"], "vocab": {**raw["model"]["vocab"], **change}})
    check_refusal(tmp_path, "tokenizer.json", words)


@pytest.mark.parametrize("ids, words", [
    ([257, 257], "'<y>'"),
    ([257, 3], "'<y>'"),
    ([257, 999], "'<y>'"),
    ([258, 259], "'<x>'"),
    ([257, -1], "integer `-1`"),
    ([257, 2**65], "e.19"),
])  # fmt: skip
def test_ids_of_special_tokens(ids, words, tmp_path):
    """The library numbers added tokens itself, one after another: a file that says otherwise would
    be read wrongly."""
    raw = write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS, ("<x>", "<y>"))
    added = [{**token, "id": i} for token, i in zip(raw["added_tokens"], ids, strict=True)]
    rewrite(tmp_path, added_tokens=added)
    check_refusal(tmp_path, "tokenizer.json", words)


def test_merges_that_drop_out_are_refused(tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(["ab"]), DIGITS, dropout=0.5)
    check_refusal(tmp_path, "tokenizer.json", "at random")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"{", b"\xff", b"[" * 100_000, b'{"model": NaN}']
)
def test_a_tokenizer_json_that_is_not_one(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    check_refusal(tmp_path, "tokenizer.json", "not a tokenizer")


def test_a_tiktoken_file_cut_short_is_refused(tmp_path):
    write_tiktoken(tmp_path, bytes_vocabulary(["ab", "cd"]))
    lines = (tmp_path / "tokenizer.model").read_text().splitlines()
    for remaining in (
        lines[:200],
        lines[:256] + lines[257:],
        [],
        [*lines[:-1], lines[-1].replace("257", str(2**65))],
    ):
        (tmp_path / "tokenizer.model").write_text("\n".join(remaining))
        check_refusal(tmp_path, "tokenizer.model", "cut short")


def test_a_sentencepiece_file_that_is_damaged_is_refused(tmp_path):
    write_sentencepiece(tmp_path)
    complete = (tmp_path / "tokenizer.model").read_bytes()
    for content in (
        complete[:1000],
        complete[:-1],
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\0" * 1000,
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        check_refusal(tmp_path, "tokenizer.model", "not a tokenizer")


BAD_EOS = (-1, [2, -1], True, 1.5, "2", 2**65, {}, [[2]])


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer_config.json", "[]", "JSON object"),
    ("tokenizer_config.json", "{", "JSON object"),
    ("tokenizer_config.json", '{"eos_token": ["</s>"]}', "configuration"),
    ("config.json", "3", "JSON object"),
    ("generation_config.json", "\xff", "JSON object"),
    ("generation_config.json", "[" * 100_000, "JSON object"),
    *[("generation_config.json", json.dumps({"eos_token_id": x}), "eos_token_id") for x in BAD_EOS],
])  # fmt: skip
def test_the_files_beside_a_tokenizer(name, content, words, tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    (tmp_path / name).write_text(content, encoding="latin-1")
    check_refusal(tmp_path, name, words)


def test_a_panic_while_a_text_is_encoded(tmp_path):
    write_bpe(tmp_path, bytes_vocabulary(), {"type": "FixedLength", "length": 0})
    with pytest.raises(
        ValueError, match="tokenizer.json: cannot encode this text .*non-zero"
    ) as caught:
        Tokenizer.from_pretrained(tmp_path).encode("abc")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_an_error_of_a_library(interrupt):
    with pytest.raises(interrupt), library_errors("tokenizer.json", "not a tokenizer"):
        raise interrupt


def test_an_error_of_many_lines_becomes_one():
    with (
        pytest.raises(ValueError, match=r"^tokenizer.json: damaged \(here and there\)$"),
        library_errors("tokenizer.json", "damaged"),
    ):
        raise RuntimeError("here\n  and\nthere")


def test_half_a_surrogate_pair_is_refused_in_every_format(tmp_path):
    """Python turns bytes of a command line that are not UTF-8 into these."""
    write_sentencepiece(tmp_path / "spm")
    write_tiktoken(tmp_path / "tiktoken", bytes_vocabulary())
    write_bpe(tmp_path / "json", bytes_vocabulary(), DIGITS)
    for name in ("spm", "tiktoken", "json"):
        with pytest.raises(ValueError, match="cannot encode this text"):
            Tokenizer.from_pretrained(tmp_path / name).encode("a\udcffb")
