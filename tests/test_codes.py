"""beyond/codes.py: `attention="codes"` computes what the default of a KVSinkCache computes."""

import copy

import pytest
import torch

from kvsink import SCHEMES, Site
from tests import helpers
from tests.helpers import SITE, ordinary_tokens

transformers = pytest.importorskip(
    "transformers", reason="the transformers package is not installed"
)

from beyond import codes  # noqa: E402
from beyond.transformers_cache import KVSinkCache  # noqa: E402
from tests.test_transformers_cache import MODELS, random_model, storages  # noqa: E402

MASKED = -1e9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The planted model, as transformers runs it."""
    directory = helpers.plant(tmp_path_factory.mktemp("planted") / "model")
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Without the compiler, except where a test asks for it."""
    monkeypatch.setattr(codes, "compiled_on", lambda device: codes.append_and_attend)
    codes.step_for.cache_clear()


@pytest.fixture
def steps(monkeypatch):
    """How often codes were read: once per layer and step."""
    calls = []
    attend = codes.CodesOfLayer.attend
    monkeypatch.setattr(
        codes.CodesOfLayer, "attend", lambda self, *args: calls.append(1) or attend(self, *args)
    )
    return calls


def both(model, scheme="channel-dynamic", bits=4, **options):
    """Return two caches, one that dequantizes and one that reads codes."""
    options = {"group_size": 8, "keep": "kvsink", "sinks": 2, "site": SITE} | options
    caches = [
        KVSinkCache(model, bits, scheme, attention=attention, **options)
        for attention in ("dequantized", "codes")
    ]
    if SCHEMES[scheme].static:
        for cache in caches:
            cache.calibrate(ordinary_tokens(64, 9)[None])
    return caches


def log_probabilities(model, cache, steps, **options):
    """Return those after each of several tensors of tokens (b, m): (steps, b, vocab)."""
    logits = [model(tokens, past_key_values=cache, **options).logits[:, -1] for tokens in steps]
    return torch.stack(logits).log_softmax(-1)


def one_by_one(tokens):
    return tokens[:, :, None].unbind(1)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_prompt_and_tokens_after_it(model, sequences, steps, scheme, bits):
    """In groups of 8: the prompt ends between two groups, and two more groups are completed."""
    dequantized, read = both(model, scheme, bits)
    tokens = [sequences[0][:1, :21], *one_by_one(ordinary_tokens(20, 5)[None])]
    same(log_probabilities(model, read, tokens), log_probabilities(model, dequantized, tokens))
    assert len(steps) == 20 * len(model.model.layers)
    assert read.sinks() == dequantized.sinks() == [[6, 17]]
    for ours, theirs in zip(read.quantized_layers, dequantized.quantized_layers):
        for store, other in zip(ours.stores, theirs.stores):
            for name, part in other.parts.items():
                # Keys and Values differ by rounding from one block to the next.
                torch.testing.assert_close(store.parts[name].float(), part.float(), atol=1, rtol=0)


@pytest.mark.parametrize("length", [16, 17, 24])
def test_a_prompt_that_ends_with_a_group(model, sequences, length):
    dequantized, read = both(model)
    tokens = [sequences[0][:1, :length], *one_by_one(ordinary_tokens(9, 5)[None])]
    same(log_probabilities(model, read, tokens), log_probabilities(model, dequantized, tokens))


def test_what_it_holds_is_what_it_tells(model, sequences):
    """The rooms count, whole."""
    _, read = both(model)
    layers = range(len(model.model.layers))
    log_probabilities(model, read, [sequences[0][:1], sequences[0][:1, :1]])
    held = storages()
    told, in_16_bits = read.bytes()
    assert in_16_bits == 2 * 25 * 2 * 16 * len(layers)
    tensors = [tensor for layer in read.quantized_layers for tensor in layer.tensors()]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert told == sum(held[pointer] for pointer in pointers)
    assert all(layer.codes for layer in read.quantized_layers)  # they are still there
    del tensors
    read.reset()
    assert read.bytes() == (0, 0)
    assert sum(held.values()) - sum(storages().values()) >= told


def test_two_sequences_with_padding(model, sequences, steps):
    """Groups of the prompt and of the decoded tokens hold padding, which is not seen and counts for
    no range."""
    tokens = torch.cat((sequences[0][:1, :21], sequences[0][1:2, :21]))
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, :19] = 0
    for scheme in ("channel-dynamic", "token-dynamic"):
        dequantized, read = both(model, scheme, keep="pfn+kvsink")
        more = ordinary_tokens(18, 3).view(2, 9)
        logits = []
        for cache in (dequantized, read):
            steps.clear()
            parts = [tokens, *one_by_one(more)]
            ends = range(21, 31)
            logits.append(
                torch.stack(
                    [
                        model(part, past_key_values=cache, attention_mask=mask[:, :end]).logits[
                            :, -1
                        ]
                        for part, end in zip(parts, ends)
                    ]
                )
            )
        same(logits[1].log_softmax(-1), logits[0].log_softmax(-1))
        assert len(steps) == 9 * len(model.model.layers)
        assert read.sinks() == dequantized.sinks()


def test_rooms_grow(model, sequences, monkeypatch):
    """Beyond the room of 24 slots there is one of 48, and what was stored comes along."""
    monkeypatch.setattr(codes, "room_for", lambda n: -(-n // 24) * 24)
    dequantized, read = both(model)
    tokens = [sequences[0][:1, :21], *one_by_one(ordinary_tokens(30, 5)[None])]
    same(log_probabilities(model, read, tokens), log_probabilities(model, dequantized, tokens))
    assert read.quantized_layers[0].codes.block.n == 72


def test_room_for():
    assert [codes.room_for(n) for n in (1, 512, 513, 4033, 4097, 9000)] == [
        512,
        512,
        1024,
        4096,
        5120,
        10240,
    ]
    for n in range(1, 70_000, 37):
        assert n <= codes.room_for(n) <= max(1.25 * n, n + 512)


def test_several_turns_copies_files_and_cutting_off(model, sequences, tmp_path):
    """Whatever needs the stores gets them back, and the next step reads codes again."""
    dequantized, read = both(model)
    results = []
    for cache in (dequantized, read):
        prompt = sequences[0][:1, :21]
        more = one_by_one(ordinary_tokens(11, 5)[None])
        logits = [log_probabilities(model, cache, [prompt, *more])]
        twin = copy.deepcopy(cache)
        cache.save(tmp_path / "cache")
        attention = "codes" if cache is read else "dequantized"
        loaded = KVSinkCache.load(tmp_path / "cache", model, attention=attention)
        for other in (cache, twin, loaded):
            other.crop(-3)
            logits.append(log_probabilities(model, other, more))
            logits.append(log_probabilities(model, other, [sequences[0][1:2], *more]))
        results.append(torch.cat(logits))
    same(results[1], results[0])


def test_reordered_sequences(model, sequences):
    """A beam search, and answers that begin from a filled cache."""
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3}
    dequantized, read = both(model)
    answers = [
        model.generate(sequences[0][:1], past_key_values=cache, **options)
        for cache in (dequantized, read)
    ]
    assert torch.equal(*answers)


def test_masks_that_differ_by_head_or_add_are_left_to_sdpa(model, sequences, steps):
    prompt = sequences[0][:1]
    n = prompt.shape[1]
    heads = model.config.num_attention_heads
    by_head = torch.ones(1, heads, 1, n + 1, dtype=torch.bool)
    by_head[:, 0, :, 3] = False
    adding = torch.zeros(1, 1, 1, n + 1)
    adding[..., 5] = MASKED
    for_all = torch.ones(1, 1, 1, n + 1, dtype=torch.bool)
    for_all[..., 4] = False
    for mask, reads in ((by_head, 0), (adding, 0), (for_all, len(model.model.layers))):
        logits = []
        for cache in both(model):
            steps.clear()
            model(prompt, past_key_values=cache)
            token = prompt[:, :1]
            logits.append(model(token, past_key_values=cache, attention_mask=mask).logits[:, -1])
        same(logits[1], logits[0])
        assert len(steps) == reads


def test_another_dtype_is_left_to_sdpa(model, sequences, steps):
    """Under autocast Keys are bfloat16, and the stores are not."""
    dequantized, read = both(model)
    logits = []
    for cache in (dequantized, read):
        steps.clear()
        logits.append(log_probabilities(model, cache, [sequences[0][:1]]))
        with torch.autocast("cpu", torch.bfloat16):
            token = sequences[0][:1, :1]
            logits.append(log_probabilities(model, cache, [token]))
    same(logits[3], logits[1])
    assert not steps


def test_other_caches_of_the_model_are_as_before(model, sequences):
    before = model(sequences[0][:1]).logits
    both(model)
    assert model.config._attn_implementation == codes.NAME
    assert torch.equal(model(sequences[0][:1]).logits, before)
    cache = transformers.DynamicCache(config=model.config)
    prompt, token = sequences[0][:1, :-1], sequences[0][:1, -1:]
    logits = log_probabilities(model, cache, [prompt, token])[-1]
    same(logits, before[:, -1].log_softmax(-1))


def test_models_that_are_refused(model):
    eager = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        KVSinkCache(eager, site=SITE, attention="codes")
    with pytest.raises(ValueError, match="neither 'dequantized' nor 'codes'"):
        KVSinkCache(model, site=SITE, attention="packed")
    with pytest.raises(ValueError, match="same number of channels"):
        codes.use_codes(model.model, {16, 24})  # as of DeepSeek's Keys and Values


@pytest.mark.parametrize("kind", MODELS)
def test_every_family(kind, steps):
    """Those with a sliding window in some of their layers, and with queries that share Keys."""
    model = random_model(kind, **MODELS[kind])
    tokens = [torch.arange(3, 33)[None], *one_by_one(torch.arange(40, 50)[None])]
    dequantized, read = both(model, site=Site(2, 7))
    same(log_probabilities(model, read, tokens), log_probabilities(model, dequantized, tokens))
    assert len(steps) == 10 * len(read.quantized_layers)


def test_an_attention_that_does_not_ask_the_interface_is_refused(model, sequences, monkeypatch):
    """Its Keys would be those of one token."""
    (_, read) = both(model)
    model(sequences[0][:1], past_key_values=read)
    monkeypatch.setitem(
        transformers.AttentionInterface._global_mapping, codes.NAME, codes.sdpa_attention_forward
    )
    with pytest.raises(ValueError, match="AttentionInterface"):
        model(sequences[0][:1, :1], past_key_values=read)


def test_compiled(model, sequences, monkeypatch):
    """The compiled step, which is made once for all layers of a width and says so in a line. Eight
    channels of 4 bits are read as one word, and those of 3 bits byte by byte."""
    monkeypatch.undo()
    codes.step_for.cache_clear()
    codes.compiled_on("cpu")  # tries the compiler
    lines = []
    monkeypatch.setattr(codes, "log", lines.append)
    graphs = torch._dynamo.utils.counters["stats"]
    tokens = [sequences[0][:1, :21], *one_by_one(ordinary_tokens(4, 5)[None])]
    for bits in (4, 3):
        graphs.clear()
        dequantized, read = both(model, bits=bits)
        same(log_probabilities(model, read, tokens), log_probabilities(model, dequantized, tokens))
        assert "512 tokens" in lines.pop() and not lines
        assert graphs["unique_graphs"] == 1
