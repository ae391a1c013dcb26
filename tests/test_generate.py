"""python -m paper.generate: sampling, the distance to full precision, the quantizers of a run, the
command, and the default model's text. What a packed cache predicts is in test_kvcache.py."""

import math
import re

import numpy as np
import pytest
import torch

import kvsink
from kvsink import full_precision_cache
from llama import Llama
from paper import generate, kvquant
from paper.kvcache import KVCache
from quant import NotFinite
from support import cli, hub, text
from support.results import FULL_PRECISION, Row
from support.tokenizer import Tokenizer
from tests.helpers import SITE, STRONG, calibrate, loaded, refuse
from tests.test_kvcache import SCHEMES, decoded

# --------------------------------------------------------------------------------------------------
# Sampling, and the distance to full precision


def test_sampling_by_hand():
    """Of probabilities 0.5, 0.3, 0.15, 0.05 the first two make up 0.8 and are enough for it. At
    temperature 0 it is the first."""
    logits, draw = torch.tensor([0.15, 0.5, 0.05, 0.3]).log(), torch.Generator().manual_seed(0)
    assert generate.sample(logits, 0, 0.9, draw) == 1
    drawn = [generate.sample(logits, 1.0, 0.8, draw) for _ in range(2000)]
    assert set(drawn) == {1, 3} and drawn.count(1) / 2000 == pytest.approx(0.5 / 0.8, abs=0.04)
    assert {generate.sample(logits, 1.0, 0.81, draw) for _ in range(500)} == {0, 1, 3}
    assert {generate.sample(logits, 1.0, 1.0, draw) for _ in range(500)} == {0, 1, 2, 3}
    cold = [generate.sample(logits, 0.5, 1.0, draw) for _ in range(2000)]  # squares: 0.25 of 0.365
    assert cold.count(1) / 2000 == pytest.approx(0.25 / 0.365, abs=0.04)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_text(value):
    for temperature in (0, 0.8):
        with pytest.raises(NotFinite, match="logits.*--dtype"):
            generate.sample(torch.tensor([0.1, value]), temperature, 0.9, torch.Generator())
    assert (
        generate.sample(torch.tensor([0.1, 0.2]), 1e-45, 0.9, torch.Generator()) == 1
    )  # and this is no overflow


def test_text_ends_where_the_model_ends_it(planted, sequences):
    for ends, expected in ({}, [9, 8, 7, 6]), ({7}, [9, 8, 7]), ({9}, [9]):
        cache, says = KVCache(planted, full_precision_cache(planted), 24), iter([9, 8, 7, 6])
        logits = generate.prefill(planted, cache, [sequences[0][0][:20].tolist()])
        said = generate.generate(
            planted, cache, logits, 4, lambda logits, says=says: next(says), ends
        )
        assert list(said) == expected
        assert cache.lengths == [20 + len(expected) - 1]


def test_kl_divergence_against_numpy(planted, sequences):
    tokens = sequences[0][0]
    quantizers = kvsink.rtn_cache(planted, "token-dynamic", 3, 8)
    full, _ = decoded(planted, tokens, 10, full_precision_cache(planted))
    other, _ = decoded(planted, tokens, 10, quantizers)
    p, q = (np.exp(x.double().numpy()) for x in (full[:14], other[:14]))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    cache = KVCache(planted, quantizers, 24)
    logits = generate.prefill(planted, cache, [tokens[:10].tolist()])
    kl, same = generate.kl_divergence(planted, cache, logits, tokens[10:].tolist(), full[:14])
    assert same == (p.argmax(1) == q.argmax(1)).tolist() and 0 < sum(same) < 14
    assert cache.lengths == [23]  # the last token's successor is not asked for
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(1), rtol=1e-2, atol=1e-6)
    assert max(kl) > 1e-3


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def long_calibration(monkeypatch):
    monkeypatch.setattr(
        hub, "documents", lambda name, split: ["A calibration text of bytes. " * 40]
    )


def talk(tiny, *options):
    """The command's options for the tiny model."""
    return [
        "--model",
        tiny[1],
        "--layer",
        "1",
        "--channel",
        "5",
        "--no-compile",
        "--max-new-tokens",
        "12",
        *options,
    ]


@pytest.mark.parametrize("scheme", [*SCHEMES, "kvquant"])
def test_the_generate_command(tiny, capsys, long_calibration, scheme):
    options = [
        "--scheme",
        scheme,
        "--bits",
        "3",
        "--keep",
        "kvsink",
        "--sinks",
        "2",
        "--prompt",
        "A prompt of bytes.",
    ]
    options += ["--outliers", "0.05"] if scheme == "kvquant" else []
    outputs = []
    for _ in range(2):
        assert generate.main(talk(tiny, *options)) == 0
        outputs.append(capsys.readouterr().out)
    said, report = outputs[0].rsplit("\n\n", 1)
    assert (
        said.startswith("A prompt of bytes.") and said == outputs[1].rsplit("\n\n", 1)[0]
    )  # the seed decides
    assert "KVSink-2 kept" in report and "tokens per second" in report and "% of the" in report
    kept = re.findall(r"(\d+) '", report.splitlines()[-1])
    assert len(kept) == 2 and all(int(slot) < 18 for slot in kept)


def test_what_generate_does_without_options(tiny, capsys):
    """4 bits by channel, dynamic; token 0 up to l_E, the tokens that stand out after it: here the
    strong one and no other, though there is room for 20; a prompt shorter than that has room for
    all of itself."""
    for filler, room in ((" bytes" * 5, 20), ("", 3)):
        assert generate.main(talk(tiny, "--prompt", f"a{chr(STRONG)}b{filler}")) == 0
        report = capsys.readouterr().out.splitlines()
        assert any(
            line.startswith("channel-dynamic 4 bits, PFN-1+KVSink-auto kept: prompt of")
            for line in report
        )
        assert re.findall(r"(\d+) '", report[-1]) == ["1"]
    model, prompt = Llama.from_pretrained(tiny[1]), [65, STRONG, *range(70, 90)]
    cache = KVCache(model, kvsink.rtn_cache(model, "channel-dynamic", 4, 8), 32, k=20)
    generate.prefill(model, cache, [prompt], "pfn+kvsink", "auto", SITE)
    slots = [[slot for slot in block.kept[0].tolist() if slot < cache.n] for block in cache.blocks]
    assert slots == [[0]] * SITE.l_E + [[1]] * (6 - SITE.l_E)
    with pytest.raises(
        ValueError, match="cannot keep 20 tokens in a cache that was made to keep 5"
    ):
        generate.prefill(
            model,
            KVCache(model, full_precision_cache(model), 32, k=5),
            [prompt],
            "kvsink",
            "auto",
            SITE,
        )


def test_static_caches_are_calibrated_by_their_own_rule(tiny, long_calibration):
    """Each row's ranges are those that Algorithm 1 with observers gives for its rule; and have its
    bits, K and V."""
    directory = hub.model_directory(tiny[1])
    model, tokenizer = Llama.from_pretrained(directory), Tokenizer.from_pretrained(directory)
    rows = tuple(
        Row("channel-static", 3, keep, N) for keep, N in (("none", 0), ("pfn", 20), ("kvsink", 20))
    )
    caches = generate.Caches(
        (FULL_PRECISION, *rows), 8, pre_rope=True, text="wikitext2", windows=2, tokens=64
    )
    quantizers = generate.quantizers_for(caches, model, tokenizer, SITE, "weights")
    assert quantizers[FULL_PRECISION] == full_precision_cache(model)
    windows, seen = text.calibration_windows(tokenizer, "wikitext2", 64, 2, seed=0), []
    for row in rows:
        expected = kvsink.rtn_cache(model, row.scheme, 3, 8)
        calibrate(model, windows[:, None], [expected], row.keep, row.N, pre_rope=True)
        for pair, pair_ in zip(quantizers[row], expected):
            for q, q_ in zip(pair, pair_):
                assert q.bits == 3 and torch.allclose(q.lo, q_.lo) and torch.allclose(q.hi, q_.hi)
        seen.append(quantizers[row][-1][0].lo)
    assert (
        not torch.equal(seen[0], seen[1])
        and not torch.equal(seen[0], seen[2])
        and not torch.equal(*seen[1:])
    )


def test_the_seed_is_the_texts_and_not_the_calibrations(
    tiny, capsys, long_calibration, monkeypatch, tmp_path
):
    """Another seed says something else, from the same calibration, which is made once."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    texts = []
    for seed in ("0", "1"):
        options = [
            "--scheme",
            "kvquant",
            "--bits",
            "2",
            "--seed",
            seed,
            "--prompt",
            "A prompt of bytes.",
        ]
        assert generate.main(talk(tiny, *options)) == 0
        texts.append(capsys.readouterr().out.rsplit("\n\n", 1)[0])
        monkeypatch.setattr(kvquant, "calibrate", None)
    assert texts[0] != texts[1] and len(list((tmp_path / "kvquant").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("rope", ["post", "pre"])
def test_the_generate_command_compares(tiny, capsys, long_calibration, rope):
    options = [
        "--compare",
        "--scheme",
        "channel-static",
        "--bits",
        "2",
        "--sinks",
        "2",
        "--rope",
        rope,
    ]
    assert generate.main(talk(tiny, *options)) == 0
    out = capsys.readouterr().out
    headings = (
        "full precision",
        "nothing kept",
        "PFN-2 kept",
        "KVSink-2 kept",
        "PFN-1+KVSink-2 kept",
    )
    assert all(heading in out for heading in headings)
    kl = [float(number) for number in re.findall(r"KL ([\d.]+)", out)]
    assert len(kl) == 5 and kl[0] == 0 and min(kl[1:]) > 0
    assert (
        len(re.findall(r"KL [\d.]+ \+- [\d.]+", out)) == 4
        and len(re.findall(r"same \d+ %", out)) == 5
    )


def test_prompt_and_new_tokens_may_fill_the_context(tiny, capsys):
    """511 tokens and a new one are the context of 512."""
    assert generate.main(talk(tiny, "--prompt", "x" * 511, "--max-new-tokens", "1")) == 0
    assert "prompt of 511 tokens" in capsys.readouterr().out
    refuse(
        talk(tiny, "--prompt", "x" * 512, "--max-new-tokens", "1"),
        ["512 tokens and 1 new"],
        capsys,
        generate,
    )


@pytest.mark.parametrize("change, words", [
    (["--prompt", "  \n"], ["prompt is empty"]),
    (["--prompt", "x" * 600], ["600 tokens", "context, 512", "--max-new-tokens"]),
    (["--max-new-tokens", "600"], ["600 new ones", "512"]),
    (["--prompt", "abc", "--keep", "pfn"], ["3 tokens", "--sinks 5"]),
    (["--prompt", "abc", "--compare"], ["3 tokens", "--sinks 5"]),
    (["--prompt", "abc", "--sinks", "4"], ["3 tokens", "--sinks 4"]),
    (["--keep", "pfn", "--sinks", "auto"], ["--sinks auto", "kvsink"]),
    (["--sinks", "0"], ["--sinks", "at least 1"]),
    (["--bits", "5"], ["--bits"]),
    (["--scheme", "kvquant", "--bits", "8"], ["kvquant", "2, 3 and 4"]),
    (["--outliers", "0.1"], ["--outliers", "kvquant"]),
    (["--outliers", "0.7"], ["--outliers", "0 to 0.5"]),
    (["--temperature", "-1"], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--top-p", "0"], ["--top-p"]),
    (["--channel", "7", "--layer", "99"], ["--layer 99"]),
    (["--channel", "7", "--layer", ""], ["--layer"]),
    (["--group-size", "3"], ["--group-size 3", "head of 8"]),
    (["--model", "llama2-7c"], ["llama2-7b"]),
    (["--device", "abacus"], ["--device abacus"]),
    (["--scheme", "token-static", "--prompt", "x" * 500, "--sinks", "500"], ["--sinks 500", "windows of 501"]),
])  # fmt: skip
def test_bad_arguments_of_generate(change, words, tiny, capsys, monkeypatch):
    """None of them needs the weights to be read."""
    monkeypatch.setattr(Llama, "from_pretrained", None)
    if "token-static" in change:
        parse = generate.parse
        monkeypatch.setattr(generate, "parse", lambda argv: with_windows_of(501, parse(argv)))
    refuse(talk(tiny, *change), words, capsys, generate)


def with_windows_of(tokens, parsed):
    """What `parse` gives, calibrated on shorter windows: those of the tiny model are as long as its
    context."""
    name, machine, speech, caches, place = parsed
    return name, machine, speech, generate.replace(caches, tokens=tokens), place


def test_a_cache_that_does_not_fit_is_refused_before_the_weights_are_read(
    tiny, capsys, monkeypatch
):
    monkeypatch.setattr(cli, "free_memory", lambda device: 1000)
    monkeypatch.setattr(Llama, "from_pretrained", None)
    refuse(talk(tiny), ["takes", "are free", "--max-new-tokens or --bits"], capsys, generate)


# --------------------------------------------------------------------------------------------------
# The default model


def test_the_distance_to_full_precision_of_the_default_model(default_model):
    """Mean KL divergence along 12 tokens of its own text: 0 to itself, at 8 bits less than a
    hundredth of that at 4."""
    model, tokenizer = loaded(default_model), Tokenizer.from_pretrained(default_model)
    prompt = tokenizer.encode(
        "The capital of France is Paris.<|endoftext|>Mount Everest is the highest mountain on Earth"
    )
    site, n, kl = kvsink.table_site("smollm2-135m"), len(prompt) + 12, {}
    seen, cache = [], KVCache(model, full_precision_cache(model), n)
    logits = generate.prefill(model, cache, [prompt])
    spoken = list(
        generate.generate(
            model, cache, logits, 12, lambda logits: seen.append(logits) or int(logits.argmax())
        )
    )
    for bits in (16, 8, 4):
        quantizers = (
            full_precision_cache(model)
            if bits == 16
            else kvsink.rtn_cache(model, "token-dynamic", bits, 64)
        )
        cache = KVCache(model, quantizers, n, k=2)
        logits = generate.prefill(
            model, cache, [prompt], "kvsink" if bits < 16 else "none", 2, site
        )
        each, same = generate.kl_divergence(model, cache, logits, spoken, seen)
        kl[bits] = sum(each) / len(each)
        assert len(each) == 12 and (bits == 4 or all(same))
    assert cache.blocks[-1].kept.tolist() == [[0, prompt.index(tokenizer.eot)]]
    assert abs(kl[16]) < 1e-6 and 0 < kl[8] < kl[4] / 100, kl
