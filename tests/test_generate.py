"""python -m paper.generate: sampling, the distance to full precision, the quantizers of a run, the
command, and the default model's text. What a packed cache predicts is in test_kvcache.py."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import kvsink
from kvsink import AUTO, Rule, full_precision_quantizers
from llama import Llama
from paper import decode, generate, kvquant
from paper.kvcache import KVCache
from quant import NotFinite
from support import evaluate, hub, text
from support.machine import Machine
from support.rows import FULL_PRECISION, Row
from support.tokenizer import Tokenizer
from tests.helpers import SITE, STRONG, calibrate, loaded, refuse
from tests.test_kvcache import SCHEMES, decoded

# --------------------------------------------------------------------------------------------------
# Sampling, and the distance to full precision


def test_sampling_by_hand():
    """The first two of the probabilities 0.5, 0.3, 0.15, 0.05 reach 0.8. At temperature 0 the first
    is taken."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    draw = torch.Generator().manual_seed(0)
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
    # A tiny temperature does not overflow.
    assert generate.sample(torch.tensor([0.1, 0.2]), 1e-45, 0.9, torch.Generator()) == 1


def test_text_ends_where_the_model_ends_it(planted, sequences):
    prompt = sequences[0][0][:20].tolist()
    for stop_ids, expected in ({}, [9, 8, 7, 6]), ({7}, [9, 8, 7]), ({9}, [9]):
        cache = KVCache(planted, full_precision_quantizers(planted), 24)
        choices = iter([9, 8, 7, 6])
        logits = decode.prefill(planted, cache, [prompt])
        tokens = generate.generate_tokens(
            planted,
            cache,
            logits,
            lambda logits, choices=choices: next(choices),
            max_new_tokens=4,
            stop_ids=stop_ids,
        )
        assert list(tokens) == expected
        assert cache.lengths == [20 + len(expected) - 1]


def test_kl_divergence_against_numpy(planted, sequences):
    tokens = sequences[0][0]
    quantizers = kvsink.rtn_quantizers(planted, "token-dynamic", 3, 8)
    full, _ = decoded(planted, tokens, 10, full_precision_quantizers(planted))
    other, _ = decoded(planted, tokens, 10, quantizers)
    p, q = (np.exp(x.double().numpy()) for x in (full[:14], other[:14]))
    p = p / p.sum(1, keepdims=True)
    q = q / q.sum(1, keepdims=True)
    cache = KVCache(planted, quantizers, 24)
    logits = decode.prefill(planted, cache, [tokens[:10].tolist()])
    kl, agree = generate.kl_divergence(planted, cache, logits, tokens[10:].tolist(), full[:14])
    assert agree == (p.argmax(1) == q.argmax(1)).tolist() and 0 < sum(agree) < 14
    assert cache.lengths == [23]  # the token after the last is not predicted
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(1), rtol=1e-2, atol=1e-6)
    assert max(kl) > 1e-3


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def long_calibration(monkeypatch):
    documents = ["A calibration text of bytes. " * 40]
    monkeypatch.setattr(hub, "documents", lambda name, split: documents)


def generate_options(tiny, *options):
    """Return the command's options for the tiny model."""
    base = "--layer 1 --channel 5 --no-compile --max-new-tokens 12".split()
    return ["--model", tiny[1], *base, *options]


@pytest.mark.parametrize("scheme", [*SCHEMES, "kvquant"])
def test_the_generate_command(tiny, capsys, long_calibration, scheme):
    options = ["--scheme", scheme, *"--bits 3 --keep kvsink --sinks 2".split()]
    options += ["--prompt", "A prompt of bytes."]
    options += ["--outliers", "0.05"] if scheme == "kvquant" else []
    outputs = []
    for _ in range(2):
        assert generate.main(generate_options(tiny, *options)) == 0
        outputs.append(capsys.readouterr().out)
    generated, report = outputs[0].rsplit("\n\n", 1)
    assert generated.startswith("A prompt of bytes.")
    assert generated == outputs[1].rsplit("\n\n", 1)[0]  # the seed decides
    calibrated = (
        "static ranges calibrated on 16 windows of 512 tokens of wikitext2's training split"
    )
    assert (calibrated in report) == (scheme in ("kvquant", "token-static", "channel-static"))
    assert "KVSink-2 kept" in report and "tokens per second" in report and "% of the" in report
    kept = re.findall(r"(\d+) '", report.splitlines()[-1])
    assert len(kept) == 2 and all(int(slot) < 18 for slot in kept)


def test_what_generate_does_without_options(tiny, capsys):
    """4 bits by channel, dynamic; token 0 up to l_E, the tokens that stand out after it: here the
    strong one and no other, though there is room for 20. A prompt shorter than that has room for
    all of itself."""
    line = "channel-dynamic 4 bits, PFN-1+KVSink-auto kept: prompt of"
    for filler in (" bytes" * 5, ""):
        options = generate_options(tiny, "--prompt", f"a{chr(STRONG)}b{filler}")
        assert generate.main(options) == 0
        report = capsys.readouterr().out.splitlines()
        assert any(printed.startswith(line) for printed in report)
        assert re.findall(r"(\d+) '", report[-1]) == ["1"]
    model = Llama.from_pretrained(tiny[1])
    prompt = [65, STRONG, *range(70, 90)]
    cache = KVCache(model, kvsink.rtn_quantizers(model, "channel-dynamic", 4, 8), 32, k=20)
    decode.prefill(model, cache, [prompt], Rule(first=1, k=AUTO, site=SITE))
    slots = [[slot for slot in block.kept[0].tolist() if slot < cache.n] for block in cache.blocks]
    assert slots == [[0]] * SITE.l_E + [[1]] * (6 - SITE.l_E)
    small_cache = KVCache(model, full_precision_quantizers(model), 32, k=5)
    message = "cannot keep 20 tokens in a cache that was made to keep 5"
    with pytest.raises(ValueError, match=message):
        decode.prefill(model, small_cache, [prompt], Rule(k=AUTO, site=SITE))


def test_static_caches_are_calibrated_by_their_own_rule(tiny, long_calibration):
    """The ranges of each row are those that Algorithm 1 with observers gives for its rule; and its
    quantizers have its bits, K and V."""
    run = evaluate.load_model(tiny[1], Machine())
    model = run.model
    rules = (Rule(), Rule(first=20), Rule(k=20))
    rows = tuple(Row("channel-static", 3, rule) for rule in rules)
    caches = generate.CacheConfig(
        rows=(FULL_PRECISION, *rows),
        group_size=8,
        pre_rope=True,
        calib_text="wikitext2",
        calib_windows=2,
        calib_tokens=64,
    )
    quantizers = generate.quantizers(caches, run, SITE)
    assert quantizers[FULL_PRECISION] == full_precision_quantizers(model)
    windows = text.calibration_windows(run.tokenizer, "wikitext2", 64, 2, seed=0)
    for row in rows:
        expected = kvsink.rtn_quantizers(model, row.scheme, 3, 8)
        rule = row.rule.with_site(SITE)
        calibrate(model, windows[:, None], [expected], rule, kvsink.decoder_block_pre_rope)
        for pair, expected_pair in zip(quantizers[row], expected):
            for q, expected_q in zip(pair, expected_pair):
                assert q.bits == 3
                assert torch.allclose(q.lo, expected_q.lo) and torch.allclose(q.hi, expected_q.hi)
    none, pfn, kvsink_ = (quantizers[row][-1][0].lo for row in rows)
    assert not torch.equal(none, pfn) and not torch.equal(none, kvsink_)
    assert not torch.equal(pfn, kvsink_)


def test_the_seed_is_the_texts_and_not_the_calibrations(
    tiny, capsys, long_calibration, monkeypatch, tmp_path
):
    """Another seed gives another text, from the same calibration, which is made once."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    texts = []
    for seed in ("0", "1"):
        options = ["--scheme", "kvquant", "--bits", "2", "--seed", seed]
        options += ["--prompt", "A prompt of bytes."]
        assert generate.main(generate_options(tiny, *options)) == 0
        texts.append(capsys.readouterr().out.rsplit("\n\n", 1)[0])
        monkeypatch.setattr(kvquant, "calibrate", None)
    assert texts[0] != texts[1] and len(list((tmp_path / "kvquant").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("rope", ["post", "pre"])
def test_the_generate_command_compares(tiny, capsys, long_calibration, rope):
    options = "--compare --scheme channel-static --bits 2 --sinks 2 --rope".split()
    assert generate.main(generate_options(tiny, *options, rope)) == 0
    out = capsys.readouterr().out
    rules = ("nothing", "PFN-2", "KVSink-2", "PFN-1+KVSink-2")
    headings = ("full precision", *(f"{rule} kept" for rule in rules))
    assert all(heading in out for heading in headings)
    kl = [float(number) for number in re.findall(r"KL ([\d.]+)", out)]
    assert len(kl) == 5 and kl[0] == 0 and min(kl[1:]) > 0
    assert len(re.findall(r"KL [\d.]+ \+- [\d.]+", out)) == 4
    assert len(re.findall(r"same \d+ %", out)) == 5


def test_prompt_and_new_tokens_may_fill_the_context(tiny, capsys):
    """511 tokens and a new one are the context of 512."""
    options = generate_options(tiny, "--max-new-tokens", "1", "--prompt")
    assert generate.main([*options, "x" * 511]) == 0
    assert "prompt of 511 tokens" in capsys.readouterr().out
    refuse([*options, "x" * 512], ["512 tokens and 1 new"], capsys, generate)


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
])  # fmt: skip
def test_bad_arguments_of_generate(change, words, tiny, capsys, monkeypatch):
    """All are refused before the weights are read."""
    monkeypatch.setattr(Llama, "from_pretrained", None)
    refuse(generate_options(tiny, *change), words, capsys, generate)


def test_more_sinks_than_a_calibration_window_can_lose(tiny, capsys, monkeypatch):
    """The windows are shorter than usual: those of the tiny model are as long as its context."""
    monkeypatch.setattr(Llama, "from_pretrained", None)
    generate_config = generate.generate_config

    def with_short_windows(args):
        config = generate_config(args)
        return replace(config, caches=replace(config.caches, calib_tokens=501))

    monkeypatch.setattr(generate, "generate_config", with_short_windows)
    options = ["--scheme", "token-static", "--prompt", "x" * 500, "--sinks", "500"]
    words = ["--sinks 500", "windows of 501"]
    refuse(generate_options(tiny, *options), words, capsys, generate)


def test_a_cache_that_does_not_fit_is_refused_before_the_weights_are_read(
    tiny, capsys, monkeypatch
):
    monkeypatch.setattr(generate, "free_memory", lambda device: 1000)
    monkeypatch.setattr(Llama, "from_pretrained", None)
    words = ["takes", "are free", "--max-new-tokens or --bits"]
    refuse(generate_options(tiny), words, capsys, generate)


# --------------------------------------------------------------------------------------------------
# The default model


def test_the_distance_to_full_precision_of_the_default_model(default_model):
    """The mean KL divergence along 12 tokens of its own text: 0 to itself, at 8 bits less than a
    hundredth of that at 4."""
    model = loaded(default_model)
    tokenizer = Tokenizer.from_pretrained(default_model)
    prompt = tokenizer.encode(
        "The capital of France is Paris.<|endoftext|>Mount Everest is the highest mountain on Earth"
    )
    n = len(prompt) + 12
    reference = []

    def choose(logits):
        reference.append(logits)
        return int(logits.argmax())

    cache = KVCache(model, full_precision_quantizers(model), n)
    logits = decode.prefill(model, cache, [prompt])
    tokens = list(generate.generate_tokens(model, cache, logits, choose, max_new_tokens=12))
    means = {}
    for bits in (16, 8, 4):
        quantizers = full_precision_quantizers(model)
        rule = Rule()
        if bits < 16:
            quantizers = kvsink.rtn_quantizers(model, "token-dynamic", bits, 64)
            rule = Rule(k=2, site=kvsink.table_site("smollm2-135m"))
        cache = KVCache(model, quantizers, n, k=2)
        logits = decode.prefill(model, cache, [prompt], rule)
        kl, agree = generate.kl_divergence(model, cache, logits, tokens, reference)
        means[bits] = sum(kl) / len(kl)
        assert len(kl) == 12 and (bits == 4 or all(agree))
    assert cache.blocks[-1].kept.tolist() == [[0, prompt.index(tokenizer.eot)]]
    assert abs(means[16]) < 1e-6 and 0 < means[8] < means[4] / 100, means
