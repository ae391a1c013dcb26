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


class Characters:
    """A tokenizer that gives the code of each character, and begins a text with 1."""

    bos = 1
    eot = 2

    def encode(self, text, bos=True):
        return [1] * bos + [ord(c) for c in text]


@pytest.fixture
def take(monkeypatch):
    """`text.windows` on documents that are given instead of fetched."""

    def windows_of(name, split, documents, n, count=None, seed=0, **options):
        monkeypatch.setattr(hub, "documents", lambda *_: documents)
        return text.windows(Characters(), name, split, n, count, seed, **options).tolist()

    return windows_of


DOCUMENT = "".join(chr(c) for c in range(100, 150))
IDS = [1, *range(100, 150)]


def test_windows_in_order(take):
    # What is left over at the end is dropped.
    assert take("some.txt", "test", [DOCUMENT], 20) == [IDS[:20], IDS[20:40]]
    # The last window fits exactly.
    assert take("some.txt", "test", [DOCUMENT], 17) == [IDS[:17], IDS[17:34], IDS[34:]]
    assert take("wikitext2", "test", [DOCUMENT], 20, count=1) == [IDS[:20]]
    with pytest.raises(ValueError, match="fewer than one window"):
        take("some.txt", "test", [DOCUMENT], 52)


def test_packed_windows(take):
    documents = ["ab", "c", "defg"]
    first = [1, 97, 98, 2, 99]
    second = [2, 100, 101, 102, 103]
    assert take("wiki-sample", "test", documents, 5) == [first, second]
    assert take("wiki-sample", "train", documents, 5, 1) == [first]


def test_a_window_each_with_its_own_beginning(take):
    """Of each window, the first token begins a text, and the others are the text's, without gap."""
    documents = ["ab", "c", "defg"]
    packed = [[1, 97, 98, 2, 99], [1, 2, 100, 101, 102]]
    assert take("wiki-sample", "test", documents, 5, bos="window") == packed
    assert take("wiki-sample", "train", documents, 5, 1, bos="window") == packed[:1]
    in_order = [[1, *IDS[1:20]], [1, *IDS[20:39]]]
    assert take("some.txt", "test", [DOCUMENT], 20, bos="window") == in_order
    rng = random.Random(3)
    starts = [1 + rng.randint(0, 31) for _ in range(4)]
    at_random = [[1, *IDS[start : start + 19]] for start in starts]
    assert take("wikitext2", "train", [DOCUMENT], 20, 4, seed=3, bos="window") == at_random
    for window in take("c4", "test", [DOCUMENT], 20, 9, bos="window"):
        start = window[1] - 99
        assert window == [1, *IDS[start : start + 19]]
    # 50 characters are two windows of 26 then, and none of 52.
    assert len(take("some.txt", "test", [DOCUMENT], 26, bos="window")) == 2
    with pytest.raises(ValueError, match="50 tokens, fewer than one window of 51: lower --seq-len"):
        take("some.txt", "test", [DOCUMENT], 52, bos="window")


def test_what_begins_a_window_if_the_tokenizer_begins_no_text(monkeypatch):
    """The end of another: as several evaluation harnesses have it."""
    monkeypatch.setattr(Characters, "bos", None)
    assert text.first_id(Characters()) == 2
    monkeypatch.setattr(Characters, "eot", None)
    with pytest.raises(ValueError, match="--bos window: this tokenizer has no token"):
        text.first_id(Characters())


def test_windows_at_random(take):
    rng = random.Random(3)
    starts = [rng.randint(0, 31) for _ in range(4)]
    expected = [IDS[start : start + 20] for start in starts]
    assert take("wikitext2", "train", [DOCUMENT], 20, 4, seed=3) == expected


def test_windows_of_random_documents(take):
    """As in GPTQ's loop: random documents until one is long enough, then a random offset."""
    documents = ["short", DOCUMENT, DOCUMENT[::-1], "tiny"]
    rng = random.Random(0)
    expected = []
    for _ in range(6):
        ids = []
        while len(ids) < 20:
            ids = [1, *map(ord, documents[rng.randint(0, 3)])]
        start = rng.randint(0, len(ids) - 20 - 1)
        expected.append(ids[start : start + 20])
    assert take("c4", "test", documents, 20, 6) == expected
    assert len(take("c4", "test", documents, 51)) == 256
    with pytest.raises(ValueError, match="no document has 52 tokens"):
        take("c4", "test", documents, 52)


@pytest.mark.parametrize("content, words", [
    (b"", ["empty"]),
    (b" \n\n", ["empty"]),
    (b"caf\xe9 and so on", ["byte 3", "UTF-8"]),
    (b"short", ["fewer than one window"]),
])  # fmt: skip
def test_bad_texts(content, words, tiny, capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    refuse([*tiny, "--scheme", "token-dynamic", "--data", str(path)], words, capsys, eval_ppl)


def test_a_tokenizer_of_another_model(tiny, capsys, tmp_path):
    write_model(tmp_path, PLANTED)  # an embedding of 64
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    refuse([*tiny, "--model", str(tmp_path)], ["tokenizer gives id 126", "64"], capsys, eval_ppl)


def test_more_calibration_than_there_is(tiny, capsys, sample_calibration):
    options = [*tiny, "--scheme", "token-static", "--calib-windows", "1000"]
    refuse(options, ["--calib-windows 1000", "only"], capsys, eval_ppl)
