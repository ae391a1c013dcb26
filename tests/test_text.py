"""Windows of token ids, by each text's protocol."""

import random

import pytest

import eval_ppl
from support import hub, text
from tests.helpers import (
    DIGITS,
    PLANTED,
    bytes_vocabulary,
    refuse,
    write_bpe,
    write_model,
)


def test_windows_in_order_packed_and_at_random(tmp_path, monkeypatch):
    """The protocols, on a tokenizer that gives each character's code and begins with 1."""
    ids = "".join(chr(c) for c in range(100, 150))

    class Characters:
        bos, eot = 1, 2

        def encode(self, text, bos=True):
            return [1] * bos + [ord(c) for c in text]

    def take(name, split, documents, n, count=None, seed=0):
        monkeypatch.setattr(hub, "documents", lambda *_: documents)
        return text.windows(Characters(), name, split, n, count, seed).tolist()

    whole = [1, *range(100, 150)]
    assert take("some.txt", "test", [ids], 20) == [whole[:20], whole[20:40]]  # the rest is dropped
    assert take("some.txt", "test", [ids], 17) == [
        whole[:17],
        whole[17:34],
        whole[34:],
    ]  # the last one fits exactly
    assert take("wikitext2", "test", [ids], 20, count=1) == [whole[:20]]
    assert take("wiki-sample", "test", ["ab", "c", "defg"], 5) == [
        [1, 97, 98, 2, 99],
        [2, 100, 101, 102, 103],
    ]
    assert take("wiki-sample", "train", ["ab", "c", "defg"], 5, 1) == [[1, 97, 98, 2, 99]]
    draw = random.Random(3)
    starts = [draw.randint(0, 31) for _ in range(4)]
    assert take("wikitext2", "train", [ids], 20, 4, seed=3) == [whole[s : s + 20] for s in starts]
    # GPTQ's loop: a document at random until one is long enough, then an offset at random.
    documents, draw, expected = ["short", ids, ids[::-1], "tiny"], random.Random(0), []
    for _ in range(6):
        while len(document := [1, *map(ord, documents[draw.randint(0, 3)])]) < 20:
            pass
        start = draw.randint(0, len(document) - 20 - 1)
        expected.append(document[start : start + 20])
    assert take("c4", "test", documents, 20, 6) == expected
    assert len(take("c4", "test", documents, 51)) == 256
    with pytest.raises(ValueError, match="no document has 52 tokens"):
        take("c4", "test", documents, 52)
    with pytest.raises(ValueError, match="fewer than one window"):
        take("some.txt", "test", [ids], 52)


@pytest.mark.parametrize("content, words", [
    (b"", ["empty"]), (b" \n\n", ["empty"]), (b"caf\xe9 and so on", ["byte 3", "UTF-8"]), (b"short", ["fewer than one window"]),
])  # fmt: skip
def test_bad_texts(content, words, tiny, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    refuse([*tiny, "--scheme", "token-dynamic", "--data", str(text)], words, capsys, eval_ppl)


def test_a_tokenizer_of_another_model(tiny, capsys, tmp_path):
    write_model(tmp_path, PLANTED)  # an embedding of 64
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    refuse([*tiny, "--model", str(tmp_path)], ["tokenizer gives id 126", "64"], capsys, eval_ppl)


def test_more_calibration_than_there_is(tiny, capsys, sample_calibration):
    refuse(
        [*tiny, "--scheme", "token-static", "--calib-windows", "1000"],
        ["--calib-windows 1000", "only"],
        capsys,
        eval_ppl,
    )
