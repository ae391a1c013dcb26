"""beyond/kvsink_cache.py and the files around it; and the parity of llama.py and of the tokenizers
with the transformers package. transformers is no dependency: these tests skip without it."""

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F

import eval_ppl
import kvsink
from kvsink import SCHEMES, Site
from llama import Llama, LlamaConfig, rope_table
from paper.decode import decode, most_kept, prefill
from paper.kvcache import KVCache
from quant import Quantizer
from support import hub, text
from support.rows import rule_of
from support.tokenizer import Tokenizer
from tests import helpers
from tests.helpers import (
    FAMILIES,
    HERE,
    SITE,
    SMALL,
    STRONG,
    WEAK,
    bytes_vocabulary,
    ordinary_tokens,
    quantizers_for,
    refuse,
    results_of,
)
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

from beyond import check, side_by_side  # noqa: E402
from beyond.blocks import add_codes, coded_tokens, empty_blocks, take_codes  # noqa: E402
from beyond.growing import GrowingStore  # noqa: E402
from beyond.hooks import call_if_used  # noqa: E402
from beyond.layer import Buffer, KVSinkLayer  # noqa: E402
from beyond.sites import site_of  # noqa: E402
from beyond.transformers_cache import KVSinkCache  # noqa: E402

OPTIONS = (("none", 0), ("pfn", 3), ("kvsink", 2), ("pfn+kvsink", "auto"))  # keep, sinks


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The planted model, as transformers runs it."""
    directory = helpers.plant(tmp_path_factory.mktemp("planted") / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def make_cache(model, scheme="token-dynamic", bits=4, **options):
    """Return a KVSinkCache in groups of 8, which keeps two predicted tokens unless `options` say
    otherwise."""
    defaults = {"group_size": 8, "keep": "kvsink", "sinks": 2, "site": SITE}
    return KVSinkCache(model, bits, scheme, **defaults | options)


def logits_after(model, cache, tokens, **options):
    """Return the logits (b, vocab) after tokens (b, m)."""
    return model(torch.as_tensor(tokens), past_key_values=cache, **options).logits[:, -1]


def decoded_logits(model, cache, prompt, tokens):
    """Return the logits after a prompt, and after each further token of one sequence:
    (1 + m, vocab)."""
    logits = [logits_after(model, cache, [prompt])]
    logits += [logits_after(model, cache, [[token]]) for token in tokens]
    return torch.cat(logits)


def reference_logits(model, quantizers, prompt, tokens, rule):
    """Return the same of this project's own packed cache."""
    k = most_kept(rule, len(prompt))
    cache = KVCache(model, quantizers, len(prompt) + len(tokens), k=k)
    logits = [prefill(model, cache, [prompt], rule)]
    logits += [decode(model, cache, torch.tensor([token])) for token in tokens]
    return torch.cat(logits)


# --------------------------------------------------------------------------------------------------
# Its logits are this project's


@pytest.mark.parametrize("keep, N", OPTIONS)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_packed_cache(theirs, planted, sequences, scheme, bits, keep, N):
    """The planted model, token by token: a prompt of 24 tokens in groups of 8, and 10 more. The
    prompt's own attention reads quantized Keys and Values: its logits are not full precision's."""
    windows = sequences[0][:1]
    prompt = windows[0].tolist()
    more = ordinary_tokens(10, 5).tolist()
    rule = rule_of(keep, N).with_site(SITE)
    quantizers = quantizers_for(planted, scheme, bits, windows, rule)
    expected = reference_logits(planted, quantizers, prompt, more, rule)
    cache = make_cache(theirs, scheme, bits, keep=keep, sinks=N)
    if SCHEMES[scheme].static:
        cache.calibrate(windows)
    logits = decoded_logits(theirs, cache, prompt, more)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    full = theirs(windows).logits[0, -1]
    assert (logits[0] - full).abs().max() > 1e-3
    kept = {"none": [], "pfn": [0, 1, 2]}.get(keep, [6, 17])
    assert cache.sinks() == [kept]


@pytest.fixture(scope="module")
def default_theirs():
    """The default model as transformers runs it, with this project's RoPE table. Its own angles
    differ in the fifth digit, which flips a code here and there, and that flips others, so that
    perplexities at 4 bits differ by 0.2 to 0.7 %."""
    directory = helpers.fetched_default_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    cos, sin = rope_table(LlamaConfig.from_pretrained(directory), 1024, "cpu")
    model.model.rotary_emb.forward = lambda x, position_ids: (cos[position_ids], sin[position_ids])
    return model


@pytest.mark.parametrize("scheme", ["token-static", "channel-dynamic"])
def test_logits_of_the_default_model(default_llama, default_theirs, scheme):
    """A prompt of 66 tokens, which is one group of Keys and two more tokens, and three tokens after
    it; two schemes with two rules each. Logits are up to 30, and a flipped code moves them by
    5e-4."""
    tokenizer = Tokenizer.from_pretrained(hub.model_directory(hub.DEFAULT_MODEL))
    facts = "Rome is old.<|endoftext|>Mount Everest is high.<|endoftext|>" * 9
    prompt = tokenizer.encode(facts)[:66]
    tokens = torch.tensor([prompt])
    is_static = SCHEMES[scheme].static
    for bits, (keep, N) in zip((4, 2), OPTIONS[0 if is_static else 1 :: 2]):
        rule = rule_of(keep, N).with_site(kvsink.table_site(hub.DEFAULT_MODEL))
        quantizers = kvsink.rtn_quantizers(default_llama, scheme, bits, 64)
        # It finds the site by the directory's name.
        cache = KVSinkCache(default_theirs, bits, scheme, keep=keep, sinks=N)
        if is_static:
            helpers.calibrate(default_llama, [tokens], [quantizers], rule)
            cache.calibrate(tokens)
        expected = reference_logits(default_llama, quantizers, prompt, prompt[:3], rule)
        logits = decoded_logits(default_theirs, cache, prompt, prompt[:3])
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3, msg=f"{bits} bits, {keep}")


def test_perplexity_is_that_of_the_main_command(default_model, default_theirs, tmp_path):
    """One window of 256 tokens, to the digit (eight of 1,024 too: beyond/README.md)."""
    out = tmp_path / "out.json"
    small = "--seq-len 256 --limit 1 --calib-windows 1".split()
    rows = "--scheme channel-static --bits 4 --keep kvsink --sinks 5 --no-compile --json".split()
    assert eval_ppl.main([*small, *rows, str(out)]) == 0
    tokenizer = Tokenizer.from_pretrained(default_model)
    cache = KVSinkCache(default_theirs, 4, "channel-static", keep="kvsink", sinks=5)
    cache.calibrate(text.calibration_windows(tokenizer, "wiki-sample", 256, 1, 0))
    window = text.windows(tokenizer, "wiki-sample", "test", 256, 1, 0)
    logits = default_theirs(window, past_key_values=cache).logits[0, :-1]
    loss = F.cross_entropy(logits, window[0, 1:]).item()
    full, quantized = (result["nll"][0] for result in results_of(out))
    assert loss == pytest.approx(quantized, abs=1e-5) != full


def test_logits_are_those_of_an_oracle(theirs, sequences):
    """A DynamicCache that quantizes all that it holds anew, in a few lines of float64."""
    prompt = sequences[0][0].tolist()
    more = ordinary_tokens(13, 5).tolist()
    for bits, by_channel in ((4, True), (2, False)):
        scheme = "channel-dynamic" if by_channel else "token-dynamic"
        cache = make_cache(theirs, scheme, bits)
        logits = decoded_logits(theirs, cache, prompt, more)
        oracle = OracleCache(bits, by_channel, prompt=len(prompt), kept=[6, 17])
        expected = decoded_logits(theirs, oracle, prompt, more)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
        assert (logits - theirs(torch.tensor([prompt + more])).logits[0, 23:]).abs().max() > 1e-2


class OracleCache(transformers.DynamicCache):
    """Groups of 8 tokens of a channel of Keys, or of the 8 channels of a token; the kept tokens as
    they are, after block l_E."""

    def __init__(self, bits, by_channel, prompt, kept):
        super().__init__()
        self.bits, self.by_channel, self.prompt, self.kept = bits, by_channel, prompt, kept

    def update(self, K, V, layer, *args, **kwargs):
        K, V = super().update(K, V, layer)
        n = K.shape[2]
        coded = n // 8 * 8 if n == self.prompt else (n - 1) // 8 * 8
        kept = self.kept if layer >= SITE.l_E else []
        K_ = K.double()
        if self.by_channel:
            for group in range(0, coded, 8):
                tokens = range(group, group + 8)
                counted = [t for t in tokens if t not in kept]
                K_[:, :, tokens] = self.rounded(K[:, :, tokens], K[:, :, counted], dim=2)
        else:
            K_ = self.rounded(K, K, dim=3)
        V_ = self.rounded(V, V, dim=3)
        K_[:, :, kept] = K[:, :, kept].double()
        V_[:, :, kept] = V[:, :, kept].double()
        return K_.float(), V_.float()

    def rounded(self, X, counted, dim):
        lo = counted.double().amin(dim, keepdim=True)
        hi = counted.double().amax(dim, keepdim=True)
        s = ((hi - lo) / (2**self.bits - 1)).half().double()
        z = -(lo / s).round()
        return s * (((X.double() / s).round() + z).clamp(0, 2**self.bits - 1) - z)


# --------------------------------------------------------------------------------------------------
# What it stores


def test_what_it_holds_is_what_it_tells(sequences):
    """After a prompt of 3,000 tokens the process holds the bytes that the cache tells, those of
    the masks, and two buffers, each of one layer's Keys or Values."""
    model = random_model("Llama")
    tokens = torch.randint(97, (1, 3000), generator=torch.Generator().manual_seed(0))
    cache = KVSinkCache(model, site=Site(2, 7), group_size=16)
    held = storages()
    model(tokens, past_key_values=cache, logits_to_keep=1)
    new = {pointer: size for pointer, size in storages().items() if pointer not in held}
    stored, in_16_bits = cache.bytes()
    masks = sum(numbers.nbytes for numbers in cache.tokens.values())
    buffer = 3000 * 2 * 16 * 4
    assert in_16_bits == 4 * buffer
    assert stored < in_16_bits / 2.5
    assert stored + masks <= sum(new.values()) <= stored + masks + 2 * 1.2 * buffer + 10_000


def storages():
    """Return address -> bytes of all memory of tensors that is alive."""
    gc.collect()
    memory = {}
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor):
            with contextlib.suppress(RuntimeError):  # tensors of other tests that hold nothing
                memory[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return memory


def test_cutting_off_frees_what_it_cuts(theirs):
    """Ten tokens, eight more and back, a hundred times."""
    cache = make_cache(theirs, "channel-dynamic")
    logits_after(theirs, cache, ordinary_tokens(10, 0)[None])
    before = cache.bytes()
    for _ in range(100):
        logits_after(theirs, cache, ordinary_tokens(8, 1)[None])
        cache.crop(-8)
    stored, in_16_bits = cache.bytes()
    assert in_16_bits == before[1] and stored <= before[0]
    for store in stores_of(cache):
        for part in store.parts.values():
            assert part.untyped_storage().nbytes() == part.nbytes


def test_copies_live_on_their_own(theirs, sequences):
    """A prompt is read once and copied; both copies go on, each like a cache that read it itself,
    and their hooks do not meet."""
    prompt = sequences[0][:1]
    for scheme in ("channel-dynamic", "token-static"):
        first = make_cache(theirs, scheme)
        if SCHEMES[scheme].static:
            first.calibrate(sequences[0])
        logits_after(theirs, first, prompt)
        size = first.bytes()
        second = copy.deepcopy(first)
        turns = ([[20, 21, STRONG, 22]], [[30, 31]])
        both = [logits_after(theirs, cache, turn) for cache, turn in zip((second, first), turns)]
        for logits, cache, turn in zip(both, (second, first), turns):
            alone = make_cache(theirs, scheme)
            if SCHEMES[scheme].static:
                alone.calibrate(sequences[0])
            logits_after(theirs, alone, prompt)
            assert torch.equal(logits_after(theirs, alone, turn), logits)
            assert cache.sinks() == alone.sinks()
        assert second.sinks() == [[6, 17, 26]]
        first.crop(-2)
        assert first.bytes() == size
        first.close()
        logits_after(theirs, second, [[5]])
    one = make_cache(theirs, "token-static")
    one.calibrate(sequences[0])
    logits_after(theirs, one, prompt)
    read = [store.dequantized().clone() for store in stores_of(one)]
    copy.deepcopy(one).calibrate(ordinary_tokens(300, 9).view(1, -1))  # widens only its own ranges
    logits_after(theirs, one, [[20]])
    for store, X in zip(stores_of(one), read):
        assert torch.equal(store.dequantized()[:, :, :24], X)
    gemma = random_model("Gemma3Text", **GEMMA)
    cache = KVSinkCache(gemma, keep="pfn")
    logits_after(gemma, cache, torch.arange(3, 33)[None])
    twin = copy.deepcopy(cache)
    expected = logits_after(gemma, cache, [[5]])
    assert torch.equal(logits_after(gemma, twin, [[5]]), expected)


@pytest.mark.parametrize("scheme", ["channel-dynamic", "token-static"])
def test_a_cache_in_a_file(theirs, sequences, scheme, tmp_path):
    """It goes on as if it had not been away, to the digit."""
    file = tmp_path / "prompt.safetensors"
    cache = make_cache(theirs, scheme, 3)
    if SCHEMES[scheme].static:
        cache.calibrate(sequences[0])
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :3] = 0
    logits_after(theirs, cache, sequences[0], attention_mask=mask)
    cache.save(str(file))
    loaded = KVSinkCache.load(str(file), theirs)
    assert loaded.sinks() == cache.sinks() and loaded.bytes() == cache.bytes()
    for turn in ([[20]] * 2, [[21, STRONG]] * 2, [[22]] * 2):
        assert torch.equal(logits_after(theirs, loaded, turn), logits_after(theirs, cache, turn))
    empty = tmp_path / "empty.safetensors"
    make_cache(theirs).save(empty)
    assert KVSinkCache.load(empty, theirs).bytes() == (0, 0)


def test_files_that_are_refused(theirs, sequences, tmp_path):
    file = tmp_path / "prompt.safetensors"
    cache = make_cache(theirs)
    logits_after(theirs, cache, sequences[0])
    cache.save(file)
    whole = file.read_bytes()

    def refused(words, model=theirs):
        with pytest.raises(ValueError, match=words) as error:
            KVSinkCache.load(file, model)
        assert len(str(error.value).splitlines()) == 1

    refused("another model", random_model("Llama"))
    refused("another model", copy.deepcopy(theirs).bfloat16())
    file.write_bytes(whole[:-100])
    refused("damaged")
    file.write_bytes(b"nothing of the kind")
    refused("damaged")
    tensors = safetensors.torch.load(whole)
    with safetensors.safe_open(io_file(tmp_path, whole), "pt") as opened:
        metadata = opened.metadata()
    for name, change, words in (
        ("3.V.codes", lambda X: X[:, :, :-1].clone(), "codes has the shape"),
        ("3.V.scale", None, "scale"),
        ("tokens.X", lambda X: X[:1].clone(), "X has the shape"),
        ("6.K.slot", lambda X: X + 30, "outside"),
    ):
        changed = dict(tensors)
        old = changed.pop(name)
        if change:
            changed[name] = change(old)
        file.write_bytes(safetensors.torch.save(changed, metadata))
        refused(words)
    file.write_bytes(safetensors.torch.save(tensors))
    refused("not written by KVSinkCache.save")
    with pytest.raises(FileNotFoundError):
        KVSinkCache.load(tmp_path / "nowhere", theirs)
    gemma = random_model("Gemma3Text", **GEMMA)
    with pytest.raises(ValueError, match="cannot be saved"):
        KVSinkCache(gemma, keep="pfn").save(file)


def io_file(tmp_path, content):
    (tmp_path / "copy").write_bytes(content)
    return tmp_path / "copy"


def test_beams_and_answers_from_a_filled_cache(theirs, sequences):
    """A prompt is read once, and several answers to a question start from copies of it, as with a
    DynamicCache; at 8 bits they are the same."""
    prompt = sequences[0][:1]
    question = torch.cat((prompt, torch.tensor([[20, 21, 22]])), dim=1)
    ours = make_cache(theirs, bits=8)
    full = transformers.DynamicCache(config=theirs.config)
    for cache in (ours, full):
        logits_after(theirs, cache, prompt)

    def answers(cache, **options):
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(3)
        return theirs.generate(
            question, past_key_values=cache, max_new_tokens=4, pad_token_id=0, eos_token_id=None,
            **options,
        )  # fmt: skip

    beams = {"num_beams": 3, "do_sample": False}
    assert torch.equal(answers(ours, **beams), answers(full, **beams))
    torch.manual_seed(0)
    expected = answers(full, num_return_sequences=3, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(answers(ours, num_return_sequences=3, do_sample=True), expected)


def test_a_prompt_that_reads_its_own_keys_and_values_as_they_are(theirs, sequences):
    """Its logits are then full precision's, and what it stores is what it would store anyway."""
    prompt = sequences[0]
    cache = make_cache(theirs, "channel-dynamic", 2, exact_prompt=True)
    torch.testing.assert_close(theirs(prompt, past_key_values=cache).logits, theirs(prompt).logits)
    assert cache.sinks() == [[6, 17], [3, 9]]
    more = logits_after(theirs, cache, [[20]] * 2)
    full = theirs(torch.cat((prompt, torch.tensor([[20]] * 2)), dim=1)).logits[:, -1]
    assert (more - full).abs().max() > 1e-2  # it reads codes
    first = 2 * SITE.l_E  # until there the hidden states are the same
    other = make_cache(theirs, "channel-dynamic", 2)
    theirs(prompt, past_key_values=other)
    for ours, expected in zip(stores_of(cache)[:1], stores_of(other)[:first]):
        assert torch.equal(ours.parts["codes"], expected.parts["codes"])


# --------------------------------------------------------------------------------------------------
# What it stores, part by part


def stores_of(cache):
    """Return the stores of all layers: Keys and Values in turn."""
    return [store for layer in cache.quantized_layers for store in layer.stores]


def test_codes_are_made_once_and_an_incomplete_group_waits(theirs, sequences):
    """29 tokens in groups of 8: of the Keys 24 have codes and 5 do not, of the Values all have. 20
    tokens later the same codes are still in front."""
    cache = make_cache(theirs, "channel-dynamic")
    decoded_logits(theirs, cache, sequences[0][0].tolist(), range(20, 25))
    before = []
    for i, store in enumerate(stores_of(cache)):
        with_codes = 24 if i % 2 == 0 else 29
        assert store.coded == with_codes
        assert store.parts["codes"].shape[2] == 3  # blocks of 8 tokens
        residual = store.parts["residual"]
        assert residual.shape[2] == 29 - with_codes
        assert residual.untyped_storage().nbytes() == residual.nbytes  # the prompt is freed
        before.append({name: store.parts[name].clone() for name in ("codes", "scale", "zero")})
    for token in range(20, 40):
        logits_after(theirs, cache, [[token]])
    for old_parts, store in zip(before, stores_of(cache)):
        for name, part in old_parts.items():
            assert torch.equal(part, store.parts[name][:, :, : part.shape[2]])


@pytest.mark.parametrize("g, p", [(1, 8), (4, 8), (12, 12)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_in_blocks(bits, g, p):
    """Whatever the pieces in which they come, all codes come back, and only those of an incomplete
    block take a byte each."""
    codes = torch.randint(2**bits, (2, 3, 100, 8), dtype=torch.uint8)
    parts = empty_blocks(codes, g, bits)
    for piece in codes.split([1, 1, 5, 1, 30, 2, 0, 40, 13, 7], dim=2):
        add_codes(parts, piece, bits)
    unpacked = 100 % p
    assert coded_tokens(parts, bits) == 100
    assert parts["unpacked"].shape == (2, 3, unpacked, 8)
    assert parts["codes"].nbytes == 6 * (100 - unpacked) * bits
    assert torch.equal(take_codes(parts, bits), codes)
    assert coded_tokens(parts, bits) == sum(part.nbytes for part in parts.values()) == 0


def test_a_store_of_two_sequences_with_padding_and_unequal_sinks():
    """Padding of 1,000 widens no range, and only sinks come back exactly: two of one sequence, and
    one of the other."""
    X = torch.randn(2, 1, 16, 8)
    X[1, :, :4] = 1000.0
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, :4] = True
    S_sink = torch.zeros(2, 16, dtype=torch.bool)
    S_sink[0, [2, 5]] = True
    S_sink[1, 9] = True
    store = GrowingStore(Quantizer(4, "channel", 8, fp16_params=True), Buffer(), X)
    X_ = store.update(X, S_sink, S_sink | padding, is_prompt=True).clone()
    assert (X_ - X).abs()[1, :, 4:].max() < 0.5
    assert torch.equal((X_ == X).all(-1)[:, 0], S_sink)
    assert torch.equal(store.dequantized(), X_)
    assert kept_of(store) == [(0, 2), (0, 5), (1, 9)]


def kept_of(store):
    """Return the (sequence, slot) of all kept tokens."""
    return [*zip(store.parts["sequence"].tolist(), store.parts["slot"].tolist())]


def test_bytes_are_what_is_stored(theirs, sequences):
    """24 tokens of 2 sequences, 6 blocks of 2 heads of 8 channels, at 4 bits in groups of 8; fp32.
    Counted by hand."""
    cache = make_cache(theirs, "channel-dynamic")
    logits_after(theirs, cache, sequences[0])
    # For the Keys or the Values of one head. Keys have 3 groups of 8 channels, Values 24 groups.
    codes = 24 * 8 // 2
    scales = 24 * 2
    zeros = 24 * 2
    kept = 2 * 8 * 4  # two tokens, in the 4 blocks after l_E
    places = 4 * 2 * 2 * 2 * 16  # 4 blocks, K and V, 2 sequences, 2 tokens, two numbers of 8 bytes
    stored = 6 * 8 * (codes + scales + zeros) + 4 * 8 * kept + places
    assert cache.bytes() == (stored, 6 * 8 * 24 * 8 * 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cutting_off_the_end(theirs, sequences, scheme):
    """Tokens decoded before the cut read the same after it, even if the cut goes through a
    group; decoding goes on; and nothing is left of a kept token that was cut off."""
    cache = make_cache(theirs, scheme)
    if SCHEMES[scheme].static:
        cache.calibrate(sequences[0])
    decoded_logits(theirs, cache, sequences[0][0].tolist(), range(20, 30))
    before = [store.dequantized().clone() for store in stores_of(cache)]
    for n in (33, 27, 19, 12):
        cache.crop(n - cache.get_seq_length())
        assert cache.get_seq_length() == n
        for store, X in zip(stores_of(cache), before):
            assert torch.equal(store.dequantized(), X[:, :, :n])
    assert cache.sinks() == [[6]]
    second_prompt = [STRONG, 30, 31, 32, 33, 34, 35, 36, 37]
    logits_after(theirs, cache, [second_prompt])
    assert cache.sinks() == [[6, 12]]
    assert cache.get_seq_length() == 21
    with pytest.raises(ValueError, match=r"crop\(3\): pass minus the number"):
        cache.crop(3)
    cache.crop(-100)
    assert cache.get_seq_length() == 0


def test_sequences_are_reordered_repeated_and_chosen(theirs, sequences):
    tokens = sequences[0]
    more = torch.tensor([[20], [21]])

    def cache_after(change):
        cache = make_cache(theirs, "channel-dynamic")
        logits_after(theirs, cache, tokens)
        change(cache)
        return cache

    unchanged = cache_after(lambda cache: None)
    expected = logits_after(theirs, unchanged, more)
    sinks = unchanged.sinks()
    assert sinks == [[6, 17], [3, 9]]
    swapped = cache_after(lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
    assert swapped.sinks() == sinks[::-1]
    logits = logits_after(theirs, swapped, more.flip(0))
    torch.testing.assert_close(logits, expected.flip(0))
    doubled = cache_after(lambda cache: cache.batch_repeat_interleave(2))
    logits = logits_after(theirs, doubled, more.repeat_interleave(2, 0))
    torch.testing.assert_close(logits, expected.repeat_interleave(2, 0))
    for indices in (torch.tensor([1]), torch.tensor([False, True])):
        chosen = cache_after(lambda cache, indices=indices: cache.batch_select_indices(indices))
        torch.testing.assert_close(logits_after(theirs, chosen, more[1:]), expected[1:])


# --------------------------------------------------------------------------------------------------
# Which tokens it keeps


@pytest.mark.parametrize("k", [1, 2, "auto"])
def test_a_prompt_in_chunks_keeps_a_running_top_k(theirs, k):
    """The weaker sink comes first and is kept, then the stronger one comes. If one token is kept,
    it would take the place of the weaker one, but the codes of the weaker one's group were made
    without it, so both stay. The third chunk has no token that is large enough. A decoded token is
    never a sink."""
    tokens = ordinary_tokens(24, 0)
    tokens[[3, 12]] = torch.tensor([WEAK, STRONG])
    cache = make_cache(theirs, "channel-dynamic", keep="kvsink", sinks=k)
    for chunk, sinks in zip(tokens[None].split(10, dim=1), ({3}, {3, 12}, {3, 12})):
        logits_after(theirs, cache, chunk)
        (kept,) = cache.sinks()  # k = 2 keeps a second token of the first chunk beside the sink
        assert set(kept) >= sinks
        assert len(kept) == len(sinks) + (k == 2)
    logits_after(theirs, cache, [[STRONG]])
    assert cache.sinks() == [kept]
    whole = make_cache(theirs, "channel-dynamic", keep="kvsink", sinks=k)
    logits_after(theirs, whole, tokens[None])
    assert whole.sinks() == ([[12]] if k == 1 else [[3, 12]])
    first_after = 2 * SITE.l_E  # the first store after block l_E; nothing is kept in those before
    for store, expected in zip(stores_of(cache)[:first_after], stores_of(whole)):
        assert expected.parts["codes"].shape[2] == 3  # blocks of 8 tokens
        assert torch.equal(store.parts["codes"][:, :, :3], expected.parts["codes"])
    for store in stores_of(cache)[first_after:]:
        assert {(0, 3), (0, 12)} <= {*kept_of(store)}


def test_generate_in_chunks_beams_and_two_turns(theirs, sequences):
    prompt = sequences[0][:1]

    def generate(tokens, cache, max_new_tokens=6, **options):
        return theirs.generate(
            tokens,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )

    cache = make_cache(theirs, sinks="auto")
    first = generate(prompt, cache, prefill_chunk_size=7)
    assert first.shape == (1, 30)
    assert cache.sinks() == [[6, 17]]
    assert cache.get_seq_length() == 29
    turn = torch.cat((first, torch.tensor([[20, STRONG, 21]])), dim=1)
    second = generate(turn, cache, max_new_tokens=2)
    assert torch.equal(second[:, :33], turn)
    assert cache.sinks() == [[6, 17, 31]]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = generate(prompt, cache)
    assert again.shape == (1, 30)
    assert cache.sinks() == [[6, 17]]
    beams = generate(prompt, make_cache(theirs, bits=8), num_beams=3)
    assert torch.equal(beams, generate(prompt, None, num_beams=3))  # at 8 bits


@pytest.mark.parametrize("keep, N", OPTIONS)
def test_left_padding_is_no_sink_and_no_position(theirs, keep, N):
    """A batch of unequal prompts, padded on the left with a token that would be a sink. Each has
    the sinks that it has alone, and the logits that it has alone (by token: no group has padding in
    it)."""
    long = ordinary_tokens(20, 0)
    long[[6, 15]] = torch.tensor([WEAK, STRONG])
    short = ordinary_tokens(12, 1)
    short[[2, 7]] = torch.tensor([STRONG, WEAK])
    padded = torch.stack([long, torch.cat((torch.full((8,), STRONG), short))])
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :8] = 0
    prompt_mask = mask
    both = make_cache(theirs, keep=keep, sinks=N)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = [logits_after(theirs, both, padded, attention_mask=mask, position_ids=positions)]
    for token in (20, 21, 22):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), dim=1)
        options = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        logits.append(logits_after(theirs, both, [[token]] * 2, **options))
    for i, tokens in enumerate((long, short)):
        alone = make_cache(theirs, keep=keep, sinks=N)
        expected = decoded_logits(theirs, alone, tokens.tolist(), (20, 21, 22))
        torch.testing.assert_close(torch.stack(logits)[:, i], expected, rtol=1e-4, atol=2e-5)
        assert both.sinks()[i] == alone.sinks()[0]
    all_kept = make_cache(theirs, sinks=25)
    logits_after(theirs, all_kept, padded, attention_mask=prompt_mask)
    logits_after(theirs, all_kept, [[20], [21]], attention_mask=mask[:, :21])
    # All tokens of the prompts, but neither padding nor a decoded token.
    assert all_kept.sinks() == [list(range(20)), list(range(12))]
    # A group of nothing but padding.
    grouped = make_cache(theirs, "channel-dynamic", keep=keep, sinks=N)
    assert logits_after(theirs, grouped, padded, attention_mask=prompt_mask).isfinite().all()


def test_a_function_in_the_place_of_lines_15_and_16(theirs, sequences):
    """RotateKV's top-k over all channels, of which the planted one is the largest; and a function
    that fits no model."""

    def rotatekv(H):
        return kvsink.predict_sinks(H.abs().amax(-1, keepdim=True), c=0, k=min(2, H.shape[1]))

    def every_third_token(H):
        return (torch.arange(H.shape[1]) % 3 == 0).expand(H.shape[:2])

    cache = make_cache(theirs, predict=rotatekv)
    logits_after(theirs, cache, sequences[0])
    assert cache.sinks() == [[6, 17], [3, 9]]
    padded = sequences[0].clone()
    padded[0, :3] = STRONG  # padding has no place among the two
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :3] = 0
    cache = make_cache(theirs, predict=rotatekv)
    logits_after(theirs, cache, padded, attention_mask=mask)
    assert cache.sinks() == [[3, 14], [3, 9]]
    cache = make_cache(theirs, predict=every_third_token)
    logits_after(theirs, cache, sequences[0][:1, :8])
    logits_after(theirs, cache, sequences[0][:1, 8:])
    assert cache.sinks() == [[0, 3, 6, 8, 11, 14, 17, 20, 23]]


# --------------------------------------------------------------------------------------------------
# Models of transformers


def random_model(kind, attention="sdpa", **config):
    """Return a model of the family `kind` with random weights, 4 layers, and 2 Key heads of 16
    channels."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 97,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | config)
    torch.manual_seed(0)
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config).eval()


GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "SmolLM3": {},
    "GPTNeoX": {"num_key_value_heads": 4},
    "Gemma3Text": GEMMA,
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_family_runs(kind, attention):
    """Sinks are the top-k of the model's own hidden state. With 8 bits its logits are near full
    precision's, and with 2 bits they are not. Layers with a sliding window stay transformers'."""
    model = random_model(kind, attention, **MODELS[kind])
    tokens = torch.arange(3, 33)[None]
    site = Site(2, 7)
    full = model(tokens, output_hidden_states=True)
    cache = KVSinkCache(model, 8, "token-dynamic", group_size=16, keep="kvsink", sinks=3, site=site)
    logits = model(tokens, past_key_values=cache).logits
    top_3 = full.hidden_states[2][0, :, 7].abs().topk(3).indices
    assert cache.sinks() == [sorted(top_3.tolist())]
    coarse = KVSinkCache(model, 2, "token-dynamic", group_size=16, site=site)
    coarse_logits = model(tokens, past_key_values=coarse).logits
    error = (logits - full.logits).norm()
    assert 0 < error < (coarse_logits - full.logits).norm() / 10
    others = [type(layer).__name__ for layer in cache.layers if not isinstance(layer, KVSinkLayer)]
    assert others == ["DynamicSlidingWindowLayer"] * (2 if kind == "Gemma3Text" else 0)
    cache = KVSinkCache(model, site=site)
    model.generate(tokens, past_key_values=cache, max_new_tokens=4, do_sample=False)


def test_models_that_cannot_be_served_are_refused_in_a_line():
    """When the cache is made, before any text."""
    names = {
        "Gemma3nTextConfig": "4 dimensions",
        "BartConfig": "DynamicCache",
        "GPT2Config": "no `layers`",
        "MambaConfig": "nothing to quantize",
    }
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 4, "d_model": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    gemma = {"vocab_size_per_layer_input": 97, "num_kv_shared_layers": 2, "head_dim": 16}
    gemma |= {"activation_sparsity_pattern": [0.0] * 4, "layer_types": GEMMA["layer_types"]}
    for name, words in names.items():
        config = getattr(transformers, name)(**sizes | (gemma if "Gemma" in name else {}))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(ValueError, match=words) as error:
            KVSinkCache(model, site=Site(2, 7))
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="encoder"):
        KVSinkCache(transformers.T5ForConditionalGeneration(transformers.T5Config(
            d_model=16, num_layers=1, num_heads=2, vocab_size=97, d_kv=8, d_ff=16)))  # fmt: skip


def test_heads_of_several_sizes():
    """Gemma 4 has other heads in its layers with a window than in the others; Deepseek's Keys and
    Values are of unequal length."""
    gemma = random_model("Gemma4Text", **GEMMA)
    assert KVSinkCache(gemma, site=Site(2, 7)).group_size == 128
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    deepseek = random_model(
        "DeepseekV3", head_dim=8, num_key_value_heads=4, v_head_dim=16, moe_intermediate_size=32,
        **sizes | experts,
    )  # fmt: skip
    cache = KVSinkCache(deepseek, 8, site=Site(2, 7))  # Keys of 24 channels, Values of 16
    assert cache.group_size == 8
    tokens = torch.arange(3, 33)[None]
    full = deepseek(tokens).logits
    logits = deepseek(tokens, past_key_values=cache).logits
    assert 0 < (logits - full).norm() < 0.02 * full.norm()


def test_pfn_alone_keeps_token_0_and_a_site_may_be_a_pair(theirs, sequences):
    cache = KVSinkCache(theirs, keep="pfn", group_size=8)
    assert not cache.is_initialized
    logits_after(theirs, cache, sequences[0])
    assert cache.is_initialized and cache.sinks() == [[0], [0]]
    cache.reset()
    assert not cache.is_initialized
    cache = make_cache(theirs, site=tuple(SITE))
    logits_after(theirs, cache, sequences[0])
    assert cache.sinks() == [[6, 17], [3, 9]]


def test_a_model_that_only_slides_is_refused():
    with pytest.raises(ValueError, match="sliding window"):
        KVSinkCache(random_model("Mistral", sliding_window=8), site=Site(2, 7))


def test_the_site(theirs):
    """The finder's, from the tokens that a tokenizer makes; Table 3's, by name and shape; if there
    is none, a warning, and token 0 is kept."""

    class tokenizer:
        def __init__(self, prompt):
            self.input_ids = [20, 21, STRONG, *range(22, 30 + len(prompt) % 2)]

    assert site_of(theirs.model, tokenizer) == SITE
    model = random_model("Qwen2")
    with pytest.warns(UserWarning, match="site=Site") as warned:
        cache = KVSinkCache(model, tokenizer=tokenizer)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    logits_after(model, cache, [[5, 6, 7, 8]])
    assert cache.sinks() == [[0]]
    cache = KVSinkCache(model, site=kvsink.NOWHERE)  # the same without the warning
    logits_after(model, cache, [[5, 6, 7, 8]])
    assert cache.sinks() == [[0]]
    listed = random_model("Llama", hidden_size=2048, num_hidden_layers=16, head_dim=8)
    for name in ("meta-llama/Llama-3.2-1B", "/somewhere/llama3.2-1b/"):
        listed.config._name_or_path = name
        assert site_of(listed.model) == Site(2, 400)
    for l, block in enumerate(theirs.model.layers, start=1):
        assert not block._forward_hooks or l == SITE.l_E


# --------------------------------------------------------------------------------------------------
# Hooks, and what is refused


def test_a_cache_may_be_passed_positionally_or_under_any_keyword():
    class Block(torch.nn.Module):
        def forward(self, H, layer_past=None, **others):
            return H

    class Recorder:
        outputs = []

        def after_emergence(self, arguments, H):
            self.outputs.append(H)

    cache = Recorder()
    for args, kwargs in (
        ((1, cache), {}),
        ((1,), {"layer_past": cache}),
        ((1,), {"past": cache}),
        ((1,), {"past": None}),
    ):
        call_if_used(weakref.ref(cache), "after_emergence", Block(), args, kwargs, 1)
    assert len(cache.outputs) == 3


def test_two_caches_do_not_meet_and_hooks_go(theirs, sequences):
    gc.collect()
    decoder = theirs.get_decoder()
    block = decoder.layers[SITE.l_E - 1]

    def count_hooks():
        return len(decoder._forward_pre_hooks), len(block._forward_hooks)

    on_decoder, on_block = count_hooks()
    with make_cache(theirs) as one:
        two = make_cache(theirs, keep="pfn", sinks=1)
        logits_after(theirs, one, sequences[0][:1])
        logits_after(theirs, two, sequences[0][1:])
        theirs(sequences[0])
        logits_after(theirs, one, [[20]])
        assert one.sinks() == [[6, 17]]
        assert two.sinks() == [[0]]
        assert count_hooks() == (on_decoder + 2, on_block + 1)
    with pytest.raises(ValueError, match="closed"):
        logits_after(theirs, one, [[20]])
    del two
    gc.collect()
    assert count_hooks() == (on_decoder, on_block)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scheme": "kivi"}, "scheme='kivi' is none of token-static"),
        ({"keep": "first"}, "pfn"),
        ({"keep": "pfn", "sinks": "auto"}, "keep='pfn' needs a number of tokens"),
        ({"sinks": -1}, "sinks=-1"),
        ({"keep": "pfn", "predict": torch.abs}, "predict="),
        ({"bits": 9}, "9 bits"),
        ({"group_size": 3}, "group_size=3"),
        ({"site": Site(0, 5)}, "blocks 1 to 6"),
        ({"site": Site(7, 5)}, "blocks 1 to 6"),
        ({"site": Site(2, 32)}, "channels 0 to 31"),
        ({"site": (2, 5, 7)}, "not a pair"),
        ({"site": (2, "x")}, "not a pair"),
        ({"site": 7}, "not a pair"),
    ],
)
def test_arguments_that_are_refused(theirs, options, words):
    with pytest.raises(ValueError, match=words):
        make_cache(theirs, **options)


def test_other_ways_to_call_a_model(theirs, sequences):
    """Token ids passed positionally, masks of four dimensions, autocast: the same sinks."""
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :8] = 0
    expected = make_cache(theirs)
    logits_after(theirs, expected, sequences[0], attention_mask=mask)
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    seen = mask[:, None, None, :].bool() & causal
    for attention_mask in (seen, torch.zeros(2, 1, 24, 24).masked_fill(~seen, -1e9)):
        cache = make_cache(theirs)
        theirs.model(sequences[0], attention_mask, past_key_values=cache)
        assert cache.sinks() == expected.sinks()
    # What is added to scores: the lowest number of the dtype, and a bias like ALiBi's.
    bias = -0.5 * (torch.arange(24)[:, None] - torch.arange(24)).abs()
    for lowest in (torch.finfo(torch.float32).min, -torch.inf):
        cache = make_cache(theirs)
        added = torch.where(seen, bias, lowest).expand(2, 4, 24, 24)
        theirs.model(sequences[0], added, past_key_values=cache)
        assert [s[:2] for s in cache.sinks()] == expected.sinks()
    gemma = random_model("Gemma3Text", **GEMMA)
    tokens = torch.arange(3, 9)[None]
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    masks = dict.fromkeys(("full_attention", "sliding_attention"), causal)
    cache = KVSinkCache(gemma, keep="pfn", sinks=2)
    gemma.model(tokens, masks, past_key_values=cache)
    assert cache.sinks() == [[0, 1]]
    with torch.autocast("cpu", torch.bfloat16):
        cache = make_cache(theirs, "channel-dynamic")
        for chunk in sequences[0].split(12, dim=1):
            logits_after(theirs, cache, chunk)
    assert cache.get_seq_length() == 24


def test_a_token_is_real_if_any_query_of_any_head_sees_it(theirs):
    """Two documents in one row, the second of which does not see the first; and heads that see
    different halves. What is taken for padding would not count for a range of Keys."""
    tokens = ordinary_tokens(32, 0)[None]
    document = torch.arange(32) // 16
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    documents = (causal & (document[:, None] == document))[None, None]
    halves = torch.stack([causal & (torch.arange(32) % 2 == i % 2) for i in range(4)])[None]
    halves |= torch.eye(32, dtype=torch.bool)
    for mask in (documents, halves):
        full = theirs.model(tokens, mask).last_hidden_state
        cache = make_cache(theirs, "channel-dynamic", 8, keep="none", sinks=0)
        H = theirs.model(tokens, mask, past_key_values=cache).last_hidden_state
        assert (H - full).norm() < 0.02 * full.norm()
        assert cache.tokens["attended"].all()


def test_a_change_of_dtype_between_two_turns(theirs, sequences):
    """A prompt under autocast and a token without, and a model that changes its dtype: what is held
    takes the wider one, as with DynamicCache."""
    expected = make_cache(theirs, "channel-dynamic", 8)
    logits_after(theirs, expected, sequences[0])
    logits = logits_after(theirs, expected, [[20]] * 2)
    cache = make_cache(theirs, "channel-dynamic", 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits_after(theirs, cache, sequences[0])
    assert stores_of(cache)[1].parts["residual"].dtype == torch.bfloat16  # Values
    after = logits_after(theirs, cache, [[20]] * 2)
    assert (after - logits).norm() < 0.05 * logits.norm()
    assert stores_of(cache)[1].parts["residual"].dtype == torch.float32
    model = copy.deepcopy(theirs)
    cache = make_cache(model, "channel-dynamic", 8)
    logits_after(model, cache, sequences[0])
    model.double()
    after = logits_after(model, cache, [[20]] * 2)
    assert after.dtype == torch.float64 and (after - logits).norm() < 1e-3 * logits.norm()


def test_a_failure_leaves_nothing_behind(theirs, sequences):
    """A calibration that fails, and a cut that a layer with a window refuses."""
    cache = make_cache(theirs, "token-static")
    cache.calibrate(sequences[0])
    expected = logits_after(theirs, cache, sequences[0])
    with pytest.raises(IndexError):
        cache.calibrate(torch.tensor([[500]]))
    assert torch.equal(logits_after(theirs, cache, sequences[0]), expected)
    assert cache.bytes()[0] > 0
    layer_types = ["full_attention", "sliding_attention"] * 2
    gemma = random_model("Gemma3Text", layer_types=layer_types, sliding_window=8)
    cache = KVSinkCache(gemma, keep="pfn", sinks=1)
    logits_after(gemma, cache, torch.arange(3, 33)[None])
    with pytest.raises(RuntimeError):
        cache.crop(-2)
    assert cache.get_seq_length() == 30
    logits_after(gemma, cache, [[5]])


def test_uses_that_are_refused(theirs, sequences):
    with pytest.raises(TypeError, match="cache.save"):
        pickle.dumps(make_cache(theirs))
    with torch.enable_grad(), pytest.raises(ValueError, match="inference"):
        logits_after(theirs, make_cache(theirs), sequences[0])
    assert make_cache(theirs).sinks() == []
    with pytest.raises(ValueError, match="calibrate"):
        logits_after(theirs, make_cache(theirs, "token-static"), sequences[0])
    with pytest.raises(ValueError, match="attention_mask"):
        mask = torch.ones(2, 23)
        logits_after(theirs, make_cache(theirs), sequences[0], attention_mask=mask)
    with pytest.raises(ValueError, match="assisted"):
        theirs.generate(
            sequences[0][:1],
            past_key_values=make_cache(theirs),
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
    gpu_cache = make_cache(on_gpu, scheme, 8)
    cpu_cache = make_cache(theirs, scheme, 8)
    logits = logits_after(on_gpu, gpu_cache, sequences[0].cuda()).cpu()
    expected = logits_after(theirs, cpu_cache, sequences[0])
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
    assert gpu_cache.sinks() == cpu_cache.sinks()
    for store in stores_of(gpu_cache):
        assert all(part.is_cuda for part in store.parts.values())


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_example_of_the_readme(default_theirs, monkeypatch, tmp_path, capsys):
    """As it stands, but for what `from_pretrained` returns: the default model, and its tokenizer
    with the chat template that it has on the hub."""
    readme = (HERE / "beyond" / "README.md").read_text()
    (code,) = [block for block in readme.split("```python\n")[1:] if "from_pretrained" in block]
    directory = helpers.fetched_default_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHATML
    for name, loaded in (("AutoTokenizer", tokenizer), ("AutoModelForCausalLM", default_theirs)):
        loader = getattr(transformers, name)
        monkeypatch.setattr(loader, "from_pretrained", lambda repository, loaded=loaded: loaded)
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.enable_grad():  # as a script runs
        exec(code.split("```")[0], names)
    printed = capsys.readouterr().out.splitlines()
    assert len(names["messages"]) == 4
    assert len(printed) >= 3
    cache = names["cache"]  # from the file
    assert cache.get_seq_length() == names["encode"](names["system"])["input_ids"].shape[1]
    stored, in_16_bits = cache.bytes()
    assert stored < in_16_bits / 2
    assert 0 in cache.sinks()[0]


# --------------------------------------------------------------------------------------------------
# The command


def test_without_transformers_it_says_what_to_install(tmp_path):
    def run_python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=HERE,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    (tmp_path / "transformers.py").write_text("raise ImportError('not here')")
    done = run_python("-m", "beyond.transformers_cache", "--windows", "1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "pip install transformers==5.23.0" in done.stderr
    (tmp_path / "transformers.py").write_text("__version__ = '4.0'")
    done = run_python("-c", "import beyond.transformers_cache")
    assert "tested with transformers 5.23" in done.stderr or "pip install" in done.stderr


def test_the_command(tiny, capsys, monkeypatch):
    """transformers' caches beside ours, a row for each, and progress line by line where no terminal
    shows a bar. A cache that cannot be run says why."""

    class Refuses(transformers.DynamicCache):
        def update(self, *args, **kwargs):
            raise ValueError("Group size (64) must be\na divisor")

    def their_caches(transformers, model):
        yield 16, "full precision", transformers.DynamicCache(config=model.config)
        yield 4, "itself, 4 bits", make_cache(model, bits=5)
        yield 2, "other, 2 bits", Refuses()

    monkeypatch.setattr(hub, "documents", lambda *_: ["Some text of bytes. " * 30] * 9)
    monkeypatch.setattr(side_by_side, "their_caches", their_caches)
    model = tiny[:2]
    texts = "--layer 1 --channel 5 --prompt 40 --tokens 5 --windows 2".split()
    ours = "--bits 4 2 --group-size 8 64 --keep kvsink none".split()
    assert side_by_side.main([*model, *texts, *ours]) == 0
    printed, progress = capsys.readouterr()
    lines = printed.splitlines()
    assert "after block 2 (counted from 1) in channel 5" in lines[1]
    assert [line.split("  ")[0] for line in lines[3:9]] == [
        "transformers, full precision",
        "transformers, itself, 4 bits",
        "transformers, other, 2 bits: not run, Group size (64) must be a divisor",
        "KVSinkCache, 4 bits, groups of 8, keep=kvsink",
        "KVSinkCache, 4 bits, groups of 8, keep=none",
        "KVSinkCache, 2 bits, groups of 8, keep=kvsink",
    ]
    assert "32.00" in lines[3]
    assert all("+-" in lines[i] for i in (4, 6, 7, 8, 9))
    assert sum("keep=kvsink against nothing kept" in line for line in lines[10:]) == 2
    assert "KVSinkCache, 2 bits, groups of 8, keep=none: text 2 of 2" in progress
    refuse(["--model", "nobody"], ["no model", "nobody"], capsys, side_by_side)
    undivided = [*model, *texts, "--group-size", "3"]
    refuse(undivided, ["no --group-size", "head of 8"], capsys, side_by_side)


def test_what_follows_from_the_table(capsys):
    """Ours with the same or fewer bits against their best axis; a difference is resolved if it is
    over two standard errors."""
    comparison = side_by_side.Comparison(None, None, 1, SITE, (4, 2), (16,), ("kvsink", "none"))
    theirs = [
        side_by_side.Measured("their default", (4,), 6.0, [0.5, 0.6, 0.7]),
        side_by_side.Measured("their best", (4,), 6.0, [0.010, 0.011, 0.012]),
        side_by_side.Measured("their 2 bits", (2,), 1.0, [1.0, 1.0, 1.0]),
    ]
    ours = [
        side_by_side.Measured("too many bits", (4, 16, "kvsink"), 6.1, [0.0, 0.0, 0.0]),
        side_by_side.Measured("ours", (2, 16, "kvsink"), 6.0, [0.004, 0.006, 0.006]),
        side_by_side.Measured("4 bits, nothing", (4, 16, "none"), 6.1, [0.0, 0.1, -0.1]),
        side_by_side.Measured("2 bits, nothing", (2, 16, "none"), 6.0, [0.104, 0.106, 0.106]),
    ]
    side_by_side.print_conclusions(comparison, theirs, ours)
    _, _, first, second, third, fourth, fifth = capsys.readouterr().out.splitlines()
    assert first == "  ours"
    # 0.006, 0.005, 0.006
    assert second == "    against their best: lower by 0.0057 +- 0.0003"
    assert third == "  no KVSinkCache here stores as few bits as their 2 bits"
    assert "4 bits, groups of 16" in fourth and "not resolved (+0.0000 +- 0.0577)" in fourth
    assert "2 bits, groups of 16" in fifth and "lower by 0.1000 +- 0.0000" in fifth


class Letters:
    def decode(self, ids):
        return chr(64 + ids[0])


def test_the_check(theirs, capsys):
    """The planted model's sinks, with the attention that they get, counted here from its own maps;
    a text whose only sink is token 0; a model without a site."""
    tokens = ordinary_tokens(40, 0)[None]
    tokens[0, [6, 17]] = torch.tensor([WEAK, STRONG])
    check.print_check(theirs, Letters(), tokens, SITE)
    printed = capsys.readouterr().out
    assert (
        f"outliers emerge after block {SITE.l_E} of 6 (counted from 1), in channel {SITE.c}"
        in printed
    )
    rows = [line.split() for line in printed.splitlines() if line.startswith("  token ")]
    assert [int(row[1]) for row in rows[:2]] == [6, 17]
    eager = copy.deepcopy(theirs)
    eager.set_attn_implementation("eager")
    maps = eager(tokens, output_attentions=True).attentions[SITE.l_E :]
    share = torch.stack(maps)[:, 0].mean((0, 1))[20:].mean(0)
    for row, i in zip(rows, (6, 17)):
        assert float(row[-1].rstrip("%")) == pytest.approx(100 * float(share[i]), abs=0.06)
    assert "There are sinks beyond token 0" in printed
    tokens = ordinary_tokens(40, 0)[None]
    tokens[0, 0] = STRONG
    check.print_check(theirs, Letters(), tokens, SITE)
    assert "Token 0 is the only sink" in capsys.readouterr().out
    assert theirs.config._attn_implementation == "sdpa"
    check.print_check(theirs, Letters(), tokens, kvsink.NOWHERE)
    assert capsys.readouterr().out.startswith("no stable outliers")


# --------------------------------------------------------------------------------------------------
# The parity of the reference with transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_reference_are_those_of_transformers(family, tmp_path):
    directory = helpers.write_model(tmp_path / "model", {**SMALL, **FAMILIES[family]})
    tokens = torch.tensor(np.random.RandomState(2).randint(0, 97, (2, 90)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = theirs.eval()(tokens).logits
    ours = Llama.from_pretrained(directory)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=2e-5)


def test_tokenizers_are_those_of_transformers(default_model, tmp_path):
    """The default model's, LLaMA-3's kind, and LLaMA-2's kind of tokenizer.json, on strings that
    hurt."""
    special = ("<|begin_of_text|>", "<|end_of_text|>")
    ranks = bytes_vocabulary([" cat", "1234", "ab", "  "])
    pre_tokenizer = llama3_pre_tokenizer()
    helpers.write_bpe(tmp_path / "llama3", ranks, pre_tokenizer, special, first=special[0])
    write_byte_fallback(tmp_path / "llama2", write_sentencepiece(tmp_path / "pieces"))
    for directory in (default_model, tmp_path / "llama3", tmp_path / "llama2"):
        ours = Tokenizer.from_pretrained(directory)
        file = str(directory / "tokenizer.json")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
        for words in STRINGS_THAT_HURT:
            assert ours.encode(words) == theirs(words).input_ids, (directory.name, words)
