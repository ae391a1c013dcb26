"""beyond/transformers_cache.py, and where the transformers package is installed, the parity of
llama.py and of the tokenizers with it. It is no dependency: without it these tests skip."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_ppl
import kvsink
from kvsink import SCHEMES, Site
from llama import Llama, LlamaConfig, rope_table
from paper import generate
from paper.kvcache import KVCache
from quant import Quantizer
from support import hub, text
from support.tokenizer import Tokenizer
from tests.helpers import (
    FAMILIES,
    SITE,
    SMALL,
    STRONG,
    WEAK,
    bytes_vocabulary,
    cache_of,
    fetched_default_model,
    ordinary_tokens,
    plant,
    refuse,
    results_of,
    write_bpe,
    write_model,
)  # fmt: skip
from tests.test_tokenizer import (
    STRINGS_THAT_HURT,
    llama3_pre_tokenizer,
    write_byte_fallback,
    write_sentencepiece,
)

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)
if not transformers.__version__.startswith("5.23."):
    pytest.skip(
        "the transformers package is not the version that was tested", allow_module_level=True
    )

from beyond import side_by_side  # noqa: E402
from beyond.growing import GrowingStore  # noqa: E402
from beyond.transformers_cache import KVSinkCache, KVSinkLayer, hook, site_of  # noqa: E402

RULES = (("none", 0), ("pfn", 3), ("kvsink", 2), ("pfn+kvsink", "auto"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The planted model, as transformers runs it."""
    directory = plant(tmp_path_factory.mktemp("planted") / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def after(model, cache, tokens, **how):
    """Logits (b, vocab) after tokens (b, n)."""
    return model(torch.as_tensor(tokens), past_key_values=cache, **how).logits[:, -1]


def decoded(model, cache, prompt, tokens):
    """Logits after a prompt, and after each further token of one sequence: (1 + m, vocab)."""
    first = after(model, cache, [prompt])
    return torch.cat([first, *(after(model, cache, [[token]]) for token in tokens)])


def cached(model, scheme="token-dynamic", bits=4, keep="kvsink", sinks=2, **how):
    return KVSinkCache(model, bits, scheme, 8, keep, sinks, **{"site": SITE, **how})


# --------------------------------------------------------------------------------------------------
# Its logits are this project's


@pytest.mark.parametrize("keep, N", RULES)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_packed_cache(theirs, planted, sequences, scheme, bits, keep, N):
    """Of the planted model, token by token: a prompt of 24 tokens in groups of 8, and 10 more. The
    prefill's own attention reads what was quantized: its logits are not full precision's."""
    prompt, more = sequences[0][0].tolist(), ordinary_tokens(10, 5).tolist()
    ours = cache_of(planted, scheme, bits, sequences[0][:1], keep, N)
    ours = KVCache(planted, ours, 48, k=generate.most_kept(N, 24) if keep != "none" else 0)
    expected = [generate.prefill(planted, ours, [prompt], keep, N, SITE)]
    expected += [generate.decode(planted, ours, torch.tensor([token])) for token in more]
    cache = cached(theirs, scheme, bits, keep, N)
    if SCHEMES[scheme].static:
        cache.calibrate(sequences[0][:1])
    found = decoded(theirs, cache, prompt, more)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=2e-5)
    assert (found[0] - theirs(sequences[0][:1]).logits[0, -1]).abs().max() > 1e-3
    kept = {"none": [], "pfn": [0, 1, 2]}.get(keep, [6, 17])
    assert cache.sinks() == [kept]


@pytest.fixture(scope="module")
def default_theirs():
    """The default model as transformers runs it, with this project's RoPE table. Its own angles
    differ in the fifth digit, which flips a code here and there, and that flips others, so that
    perplexities of 4 bits differ by 0.2 to 0.7 %."""
    directory = fetched_default_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    cos, sin = rope_table(LlamaConfig.from_pretrained(directory), 1024, "cpu")
    model.model.rotary_emb.forward = lambda x, position_ids: (cos[position_ids], sin[position_ids])
    return model


@pytest.mark.parametrize("scheme", ["token-static", "channel-dynamic"])
def test_logits_of_the_default_model(default_llama, default_theirs, scheme):
    """A prompt of 66 tokens, which is a group of Keys and two more, and three tokens after it; two
    schemes with two rules each."""
    tokenizer = Tokenizer.from_pretrained(hub.model_directory(hub.DEFAULT_MODEL))
    prompt = tokenizer.encode("Rome is old.<|endoftext|>Mount Everest is high.<|endoftext|>" * 9)[
        :66
    ]
    tokens, site = torch.tensor([prompt]), kvsink.table_site(hub.DEFAULT_MODEL)
    first = scheme == "channel-dynamic"
    for bits, (keep, N) in zip(
        (4, 2), RULES[first::2]
    ):  # logits of up to 30; a flipped code moves them by 5e-4
        H, quantizers = (
            default_llama.embedding(tokens),
            kvsink.rtn_cache(default_llama, scheme, bits, 64),
        )
        cache = KVSinkCache(
            default_theirs, bits, scheme, keep=keep, sinks=N
        )  # finds the site by the directory's name
        if SCHEMES[scheme].static:
            rule = kvsink.preservation(keep, N, site, H)
            kvsink.prefill(default_llama, H, kvsink.observers([quantizers]), **rule)
            cache.calibrate(tokens)
        ours = KVCache(
            default_llama, quantizers, 128, k=generate.most_kept(N, 66) if keep != "none" else 0
        )
        expected = [generate.prefill(default_llama, ours, [prompt], keep, N, site)]
        expected += [
            generate.decode(default_llama, ours, torch.tensor([token])) for token in prompt[:3]
        ]
        found = decoded(default_theirs, cache, prompt, prompt[:3])
        torch.testing.assert_close(
            found, torch.cat(expected), rtol=0, atol=2e-3, msg=f"{bits} bits, {keep}"
        )


def test_perplexity_is_that_of_the_main_command(default_model, default_theirs, tmp_path):
    """To the digit, on a window of 256 tokens (on eight of 1,024 too: beyond/README.md)."""
    out, small = tmp_path / "out.json", "--seq-len 256 --limit 1 --calib-windows 1".split()
    rows = "--scheme channel-static --bits 4 --keep kvsink --sinks 5 --no-compile --json".split()
    assert eval_ppl.main([*small, *rows, str(out)]) == 0
    tokenizer = Tokenizer.from_pretrained(default_model)
    cache = KVSinkCache(default_theirs, 4, "channel-static", keep="kvsink", sinks=5)
    cache.calibrate(text.calibration_windows(tokenizer, "wiki-sample", 256, 1, 0))
    window = text.windows(tokenizer, "wiki-sample", "test", 256, 1, 0)
    logits = default_theirs(window, past_key_values=cache).logits[0, :-1]
    full, kept = (r["nll"][0] for r in results_of(out))
    assert (
        torch.nn.functional.cross_entropy(logits, window[0, 1:]).item()
        == pytest.approx(kept, abs=1e-5)
        != full
    )


# --------------------------------------------------------------------------------------------------
# What it stores


def parts_of(cache):
    return [store.t for layer in cache.ours for store in layer.stores]


def test_codes_are_made_once_and_an_unfinished_group_waits(theirs, sequences):
    """29 tokens in groups of 8: of the Keys 24 have codes and 5 do not; 20 tokens later the same
    codes stand in front."""
    cache = cached(theirs, "channel-dynamic")
    decoded(theirs, cache, sequences[0][0].tolist(), range(20, 25))
    keys = [t for t in parts_of(cache)[::2]]
    assert all(t["codes"].shape[2] == 24 and t["residual"].shape[2] == 5 for t in keys)
    assert all(
        t["codes"].shape[2] == 29 and t["residual"].shape[2] == 0 for t in parts_of(cache)[1::2]
    )
    before = [{name: t[name].clone() for name in ("codes", "s", "z")} for t in parts_of(cache)]
    for token in range(20, 40):
        after(theirs, cache, [[token]])
    for old, new in zip(before, parts_of(cache)):
        assert all(
            torch.equal(part, new[name][:, :, : part.shape[2]]) for name, part in old.items()
        )


def test_a_store_of_two_sequences_with_padding_and_unequal_sinks():
    """Padding of 1,000 widens no range, and only sinks come back exactly, two of the one sequence
    and one of the other."""
    X, real, S_sink = (
        torch.randn(2, 1, 16, 8),
        torch.ones(2, 16, dtype=torch.bool),
        torch.zeros(2, 16, dtype=torch.bool),
    )
    X[1, :, :4], real[1, :4] = 1000.0, False
    S_sink[0, [2, 5]] = S_sink[1, 9] = True
    store = GrowingStore(Quantizer(4, "channel", 8, fp16_params=True), X)
    X_ = store.update(X, S_sink, real, prompt=True)
    assert (X_ - X).abs()[1, :, 4:].max() < 0.5
    assert torch.equal((X_ == X).all(-1)[:, 0], S_sink) and torch.equal(store.numbers(), X_)
    assert [sorted(slots) for slots in store.t["slots"].tolist()] == [[2, 5], [-1, 9]]


def test_bytes_are_what_is_stored(theirs, sequences):
    """By hand: 24 tokens of 2 sequences, 6 blocks of 2 heads of 8 channels, at 4 bits in groups of
    8; fp32."""
    cache = cached(theirs, "channel-dynamic")
    after(theirs, cache, sequences[0])
    codes, scales, zeros = (
        24 * 8 // 2,
        24 * 2,
        24 * 2,
    )  # of Keys 3 groups of 8 channels, of Values 24 of one
    kept = 2 * 8 * 4  # two tokens, in the blocks after l_E
    places = 4 * 2 * 2 * 2 * 8  # of these: 4 blocks, K and V, 2 sequences, 2 tokens, 8 bytes
    assert cache.bytes() == (
        6 * 8 * (codes + scales + zeros) + 4 * 8 * kept + places,
        6 * 8 * 24 * 8 * 2,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cutting_off_the_end(theirs, sequences, scheme):
    """Whatever was decoded before the cut reads the same after it, also where the cut goes through
    a group; and decoding goes on. Nothing is left of a kept token that was cut off."""
    cache = cached(theirs, scheme)
    if SCHEMES[scheme].static:
        cache.calibrate(sequences[0])
    decoded(theirs, cache, sequences[0][0].tolist(), range(20, 30))
    whole = [store.numbers() for layer in cache.ours for store in layer.stores]
    for n in (33, 27, 19, 12):
        cache.crop(n - cache.get_seq_length())
        assert cache.get_seq_length() == n
        for store, X in zip((store for layer in cache.ours for store in layer.stores), whole):
            assert torch.equal(store.numbers(), X[:, :, :n])
    assert cache.sinks() == [[6]]
    after(theirs, cache, [[STRONG, 30, 31, 32, 33, 34, 35, 36, 37]])  # another prompt, of 9 tokens
    assert cache.sinks() == [[6, 12]] and cache.get_seq_length() == 21
    with pytest.raises(ValueError, match="below 0"):
        cache.crop(3)
    cache.crop(-100)
    assert cache.get_seq_length() == 0


def test_sequences_are_reordered_repeated_and_chosen(theirs, sequences):
    tokens, more = sequences[0], torch.tensor([[20], [21]])

    def state(change):
        cache = cached(theirs, "channel-dynamic")
        after(theirs, cache, tokens)
        change(cache)
        return cache

    plain = state(lambda cache: None)
    expected, sinks = after(theirs, plain, more), plain.sinks()
    assert sinks == [[6, 17], [3, 9]]
    swapped = state(lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
    assert swapped.sinks() == sinks[::-1]
    torch.testing.assert_close(after(theirs, swapped, more.flip(0)), expected.flip(0))
    doubled = state(lambda cache: cache.batch_repeat_interleave(2))
    torch.testing.assert_close(
        after(theirs, doubled, more.repeat_interleave(2, 0)), expected.repeat_interleave(2, 0)
    )
    for chosen in (torch.tensor([1]), torch.tensor([False, True])):
        second = state(lambda cache: cache.batch_select_indices(chosen))
        torch.testing.assert_close(after(theirs, second, more[1:]), expected[1:])


# --------------------------------------------------------------------------------------------------
# Which tokens it keeps


@pytest.mark.parametrize("k", [1, 2, "auto"])
def test_a_prompt_in_chunks_keeps_a_running_top_k(theirs, k):
    """The weaker sink comes first and is kept, then the stronger one comes: of one kept token it
    would take the place, but the weaker one's code was made for a group without it, so both stay.
    The third chunk has none that is large enough. A decoded token is never a sink."""
    tokens = ordinary_tokens(24, 0)
    tokens[[3, 12]] = torch.tensor([WEAK, STRONG])
    cache = cached(theirs, "channel-dynamic", keep="kvsink", sinks=k)
    for chunk, sinks in zip(tokens[None].split(10, dim=1), ({3}, {3, 12}, {3, 12})):
        after(theirs, cache, chunk)
        (found,) = cache.sinks()  # of the first chunk, two have a second token beside the sink
        assert set(found) >= sinks and len(found) == len(sinks) + (k == 2)
    after(theirs, cache, [[STRONG]])
    assert cache.sinks() == [found]
    whole = cached(theirs, "channel-dynamic", keep="kvsink", sinks=k)
    after(theirs, whole, tokens[None])
    assert whole.sinks() == ([[12]] if k == 1 else [[3, 12]])
    for part, expected in zip(
        parts_of(cache)[: 2 * SITE.l_E], parts_of(whole)
    ):  # nothing is kept in these blocks
        assert torch.equal(part["codes"][:, :, :24], expected["codes"])
    assert all({3, 12} <= {*t["slots"][0].tolist()} for t in parts_of(cache)[2 * SITE.l_E :])


def test_generate_in_chunks_beams_and_two_turns(theirs, sequences):
    prompt = sequences[0][:1]
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = cached(theirs, sinks="auto")
    first = theirs.generate(
        prompt, past_key_values=cache, max_new_tokens=6, prefill_chunk_size=7, **how
    )
    assert first.shape == (1, 30) and cache.sinks() == [[6, 17]] and cache.get_seq_length() == 29
    turn = torch.cat((first, torch.tensor([[20, STRONG, 21]])), dim=1)
    second = theirs.generate(turn, past_key_values=cache, max_new_tokens=2, **how)
    assert torch.equal(second[:, :33], turn) and cache.sinks() == [[6, 17, 31]]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = theirs.generate(prompt, past_key_values=cache, max_new_tokens=6, **how)
    assert again.shape == (1, 30) and cache.sinks() == [[6, 17]]
    beams = theirs.generate(
        prompt, past_key_values=cached(theirs, bits=8), max_new_tokens=6, num_beams=3, **how
    )
    full = theirs.generate(prompt, max_new_tokens=6, num_beams=3, **how)
    assert torch.equal(beams, full)  # at 8 bits


@pytest.mark.parametrize("keep, N", RULES)
def test_left_padding_is_no_sink_and_no_position(theirs, keep, N):
    """A batch of unequal prompts, padded on the left with what would be a sink: of each the tokens
    are kept that are kept of it alone, and its logits are those of it alone (by token: no group has
    padding in it)."""
    long, short = ordinary_tokens(20, 0), ordinary_tokens(12, 1)
    long[[6, 15]], short[[2, 7]] = torch.tensor([WEAK, STRONG]), torch.tensor([STRONG, WEAK])
    padded = torch.stack([long, torch.cat((torch.full((8,), STRONG), short))])
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :8] = 0
    both = cached(theirs, keep=keep, sinks=N)
    found = [
        after(
            theirs,
            both,
            padded,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        )
    ]
    for i in range(3):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        found.append(
            after(theirs, both, [[20 + i]] * 2, attention_mask=mask, position_ids=positions)
        )
    for i, tokens in enumerate((long, short)):
        alone = cached(theirs, keep=keep, sinks=N)
        expected = decoded(theirs, alone, tokens.tolist(), range(20, 23))
        torch.testing.assert_close(torch.stack(found)[:, i], expected, rtol=1e-4, atol=2e-5)
        assert both.sinks()[i] == alone.sinks()[0]
    every = cached(theirs, sinks=25)
    after(theirs, every, padded, attention_mask=mask[:, :20])
    after(theirs, every, [[20], [21]], attention_mask=mask[:, :21])
    assert every.sinks() == [
        list(range(20)),
        list(range(12)),
    ]  # all there are, no padding, and no decoded token
    groups = cached(theirs, "channel-dynamic", keep=keep, sinks=N)  # a group of nothing but padding
    assert after(theirs, groups, padded, attention_mask=mask[:, :20]).isfinite().all()


def test_ones_own_rule(theirs, sequences):
    """RotateKV's top-k over all channels, of which the planted one is the largest; and one that no
    model would."""

    def rotatekv(H):
        return kvsink.predict_sinks(H.abs().amax(-1, keepdim=True), c=0, k=min(2, H.shape[1]))

    cache = cached(theirs, rule=rotatekv)
    after(theirs, cache, sequences[0])
    assert cache.sinks() == [[6, 17], [3, 9]]
    padded, mask = sequences[0].clone(), torch.ones(2, 24, dtype=torch.int64)
    padded[0, :3], mask[0, :3] = STRONG, 0  # padding has no place among the two
    cache = cached(theirs, rule=rotatekv)
    after(theirs, cache, padded, attention_mask=mask)
    assert cache.sinks() == [[3, 14], [3, 9]]
    every_third = cached(
        theirs, rule=lambda H: (torch.arange(H.shape[1]) % 3 == 0).expand(H.shape[:2])
    )
    after(theirs, every_third, sequences[0][:1, :8])
    after(theirs, every_third, sequences[0][:1, 8:])
    assert every_third.sinks() == [[0, 3, 6, 8, 11, 14, 17, 20, 23]]


# --------------------------------------------------------------------------------------------------
# Every model of transformers


def random_model(kind, attention="sdpa", **config):
    """Of the family `kind`, with random weights, 4 layers, 2 Key heads of 16 channels."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 256,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        **sizes | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | config
    )
    torch.manual_seed(0)
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {}, "SmolLM3": {},
    "GPTNeoX": {"num_key_value_heads": 4}, "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
}  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_family_runs(kind, attention):
    """Sinks are the top-k of the model's own hidden state; with 8 bits its logits are near full
    precision's, and at 2 bits they are not; layers with a sliding window stay transformers'."""
    model, tokens = random_model(kind, attention, **MODELS[kind]), torch.arange(3, 33)[None]
    states = model(tokens, output_hidden_states=True)
    cache = KVSinkCache(model, 8, "token-dynamic", 16, "kvsink", 3, site=Site(2, 7))
    found = model(tokens, past_key_values=cache).logits
    assert cache.sinks() == [
        sorted(states.hidden_states[2][0, :, 7].abs().topk(3).indices.tolist())
    ]
    far = model(
        tokens, past_key_values=KVSinkCache(model, 2, "token-dynamic", 16, site=Site(2, 7))
    ).logits
    error, far = (found - states.logits).norm(), (far - states.logits).norm()
    assert 0 < error < far / 10
    sliding = [type(layer).__name__ for layer in cache.layers if not isinstance(layer, KVSinkLayer)]
    assert sliding == ["DynamicSlidingWindowLayer"] * (2 if "Gemma" in kind else 0)
    model.generate(
        tokens,
        past_key_values=KVSinkCache(model, site=Site(2, 7)),
        max_new_tokens=4,
        do_sample=False,
    )


def test_a_model_that_only_slides_is_refused():
    with pytest.raises(ValueError, match="sliding window"):
        KVSinkCache(random_model("Mistral", sliding_window=8), site=Site(2, 7))


def test_the_site(theirs, tmp_path):
    """The finder's, by the tokens that a tokenizer makes; Table 3's, by name and shape; where there
    is none, a warning, and token 0 is kept."""

    class tokenizer:
        def __init__(self, prompt):
            self.input_ids = [20, 21, STRONG, *range(22, 30 + len(prompt) % 2)]

    assert site_of(theirs.model, tokenizer) == SITE
    model = random_model("Qwen2")
    with pytest.warns(UserWarning, match="site=Site") as warned:
        cache = KVSinkCache(model, tokenizer=tokenizer)
    assert len(warned) == 1
    after(model, cache, [[5, 6, 7, 8]])
    assert cache.sinks() == [[0]]
    listed = random_model("Llama", hidden_size=2048, num_hidden_layers=16, head_dim=8)
    for name in ("meta-llama/Llama-3.2-1B", "/somewhere/llama3.2-1b/"):
        listed.config._name_or_path = name
        assert site_of(listed.model) == Site(2, 400)
    for l, block in enumerate(theirs.model.layers):
        assert not block._forward_hooks or l == SITE.l_E - 1


# --------------------------------------------------------------------------------------------------
# Hooks, and what is refused


def test_a_cache_is_known_by_whatever_name_it_comes():
    class Block(torch.nn.Module):
        def forward(self, H, layer_past=None, **others):
            return H

    class Recorder:
        def predict(self, given, H):
            seen.append(H)

    seen, cache = [], Recorder()
    for args, kwargs in (
        ((1, cache), {}),
        ((1,), {"layer_past": cache}),
        ((1,), {"past": cache}),
        ((1,), {"past": None}),
    ):
        hook(weakref.ref(cache), "predict", Block(), args, kwargs, 1)
    assert len(seen) == 3


def test_two_caches_do_not_meet_and_hooks_go(theirs, sequences):
    gc.collect()
    decoder = theirs.get_decoder()
    block, hooks = (
        decoder.layers[SITE.l_E - 1],
        lambda: (len(decoder._forward_pre_hooks), len(block._forward_hooks)),
    )
    had = hooks()
    with cached(theirs) as one:
        two = cached(theirs, keep="pfn", sinks=1)
        after(theirs, one, sequences[0][:1])
        after(theirs, two, sequences[0][1:])
        theirs(sequences[0])
        after(theirs, one, [[20]])
        assert (
            one.sinks() == [[6, 17]]
            and two.sinks() == [[0]]
            and hooks() == (had[0] + 2, had[1] + 1)
        )
    with pytest.raises(ValueError, match="closed"):
        after(theirs, one, [[20]])
    del two
    gc.collect()
    assert hooks() == had


@pytest.mark.parametrize("how, words", [
    ({"scheme": "kivi"}, "scheme is one of token-static"),
    ({"keep": "first"}, "pfn"),
    ({"keep": "pfn", "sinks": "auto"}, "sinks='auto'"),
    ({"sinks": -1}, "sinks=-1"),
    ({"bits": 9}, "9 bits"),
    ({"site": Site(0, 5)}, "from 1"),
    ({"site": Site(7, 5)}, "from 1"),
    ({"site": Site(2, 32)}, "no place"),
])  # fmt: skip
def test_what_cannot_be(theirs, how, words):
    with pytest.raises(ValueError, match=words):
        cached(theirs, **how)


def test_a_pass_may_be_called_in_other_ways(theirs, sequences):
    """Token ids by place, masks of four dimensions, half precision around it: the same sinks."""
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :8] = 0
    expected = cached(theirs)
    after(theirs, expected, sequences[0], attention_mask=mask)
    four = mask[:, None, None, :].bool() & torch.ones(24, 24, dtype=torch.bool).tril()
    for given in (four, torch.zeros(2, 1, 24, 24).masked_fill(~four, -1e9)):
        cache = cached(theirs)
        theirs.model(sequences[0], given, past_key_values=cache)
        assert (
            cache.sinks() == expected.sinks() == [[9], [3, 9]] or cache.sinks() == expected.sinks()
        )
    gemma, tokens = random_model("Gemma3Text", **MODELS["Gemma3Text"]), torch.arange(3, 9)[None]
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    cache = KVSinkCache(gemma, keep="pfn", sinks=2)
    gemma.model(
        tokens,
        dict.fromkeys(("full_attention", "sliding_attention"), causal),
        past_key_values=cache,
    )
    assert cache.sinks() == [[0, 1]]
    with torch.autocast("cpu", torch.bfloat16):
        cache = cached(theirs, "channel-dynamic")
        for part in sequences[0].split(12, dim=1):
            after(theirs, cache, part)
    assert cache.get_seq_length() == 24


def test_a_failure_leaves_nothing_behind(theirs, sequences):
    """A calibration that fails, and a cut that a layer with a window refuses."""
    cache = cached(theirs, "token-static")
    cache.calibrate(sequences[0])
    expected = after(theirs, cache, sequences[0])
    with pytest.raises(IndexError):
        cache.calibrate(torch.tensor([[500]]))
    assert torch.equal(after(theirs, cache, sequences[0]), expected) and cache.bytes()[0] > 0
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8}
    gemma = random_model("Gemma3Text", **kinds)
    cache = KVSinkCache(gemma, keep="pfn", sinks=1)
    after(gemma, cache, torch.arange(3, 33)[None])
    with pytest.raises(RuntimeError):
        cache.crop(-2)
    assert cache.get_seq_length() == 30
    after(gemma, cache, [[5]])


def test_uses_that_are_refused(theirs, sequences):
    with pytest.raises(TypeError, match="not copied"):
        copy.deepcopy(cached(theirs))
    assert cached(theirs).sinks() == []
    with pytest.raises(ValueError, match="calibrate"):
        after(theirs, cached(theirs, "token-static"), sequences[0])
    with pytest.raises(ValueError, match="attention_mask"):
        after(theirs, cached(theirs), sequences[0], attention_mask=torch.ones(2, 23))
    with pytest.raises(ValueError, match="assisted"):
        theirs.generate(
            sequences[0][:1],
            past_key_values=cached(theirs),
            assistant_model=theirs,
            max_new_tokens=4,
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", ["token-dynamic", "channel-dynamic"])
def test_cuda_agrees_with_cpu(theirs, sequences, scheme, tmp_path):
    """All that a layer stores lies on its Keys' device."""
    theirs.save_pretrained(tmp_path)
    on_gpu = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).cuda().eval()
    cache, here = cached(on_gpu, scheme, 8), cached(theirs, scheme, 8)
    found = after(on_gpu, cache, sequences[0].cuda()).cpu()
    torch.testing.assert_close(found, after(theirs, here, sequences[0]), rtol=1e-2, atol=1e-2)
    assert cache.sinks() == here.sinks() and all(
        part.is_cuda for t in parts_of(cache) for part in t.values()
    )


def test_without_transformers_it_says_what_to_install(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('not here')")
    run = {
        "cwd": Path(__file__).parent.parent,
        "capture_output": True,
        "text": True,
        "env": os.environ | {"PYTHONPATH": str(tmp_path)},
    }
    done = subprocess.run(
        [sys.executable, "-m", "beyond.transformers_cache", "--windows", "1"], **run
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and "pip install transformers==5.23.0" in done.stderr
    )
    (tmp_path / "transformers.py").write_text("__version__ = '4.0'")
    done = subprocess.run([sys.executable, "-c", "import beyond.transformers_cache"], **run)
    assert "tested with transformers 5.23" in done.stderr or "pip install" in done.stderr


def test_the_command(tiny, capsys, monkeypatch):
    """transformers beside ours: the quantized rows take at most the bytes that theirs take."""
    monkeypatch.setattr(hub, "documents", lambda *_: ["Some text of bytes. " * 30] * 9)
    monkeypatch.setattr(side_by_side, "their_caches", lambda t, model: [
        (16, "full precision", t.DynamicCache(config=model.config)), (4, "4 bits against itself", cached(model, bits=5)),
    ])  # fmt: skip
    options = [
        *tiny[:2],
        "--layer",
        "1",
        "--channel",
        "5",
        "--prompt",
        "40",
        "--tokens",
        "5",
        "--windows",
        "2",
    ]
    assert side_by_side.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "transformers, full precision", "transformers, itself, 4 bits", "KVSinkCache, 4 bits, groups of 8",
    ]  # fmt: skip
    assert all("+-" in line for line in lines[3:]) and "32.00" in lines[2]
    refuse(["--model", "nobody"], ["no model", "nobody"], capsys, side_by_side)


# --------------------------------------------------------------------------------------------------
# Parity of the reference with transformers, live


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_reference_are_those_of_transformers(family, tmp_path):
    directory = write_model(tmp_path / "model", {**SMALL, **FAMILIES[family]})
    tokens = torch.tensor(np.random.RandomState(2).randint(0, 97, (2, 90)))
    expected = (
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        .eval()(tokens)
        .logits
    )
    torch.testing.assert_close(
        Llama.from_pretrained(directory)(tokens), expected, rtol=1e-4, atol=2e-5
    )


def test_tokenizers_are_those_of_transformers(default_model, tmp_path):
    """The default model's, LLaMA-3's kind, and LLaMA-2's kind of tokenizer.json, on strings that
    hurt."""
    special = ("<|begin_of_text|>", "<|end_of_text|>")
    ranks = bytes_vocabulary([" cat", "1234", "ab", "  "])
    write_bpe(tmp_path / "llama3", ranks, llama3_pre_tokenizer(), special, first=special[0])
    write_byte_fallback(tmp_path / "llama2", write_sentencepiece(tmp_path / "pieces"))
    for directory in (default_model, tmp_path / "llama3", tmp_path / "llama2"):
        ours = Tokenizer.from_pretrained(directory)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json")
        )
        for words in STRINGS_THAT_HURT:
            assert ours.encode(words) == theirs(words).input_ids, (directory.name, words)
