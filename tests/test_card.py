"""What can be shown of a GPU without one: tensors that claim to be on a card and hold nothing. An
operation that mixes devices raises, and so does one that would wait for the card to look at a
number. (Calling the card "cuda" would need a build of torch for it.)"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvsink
import quant
from kvsink import AUTO, Rule, observers, prefill
from llama import Llama, LlamaConfig
from paper import decode, kvquant
from paper.kvcache import KVCache
from tests.helpers import FAMILIES, SITE, SMALL

try:
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        FakeTensorDeviceMismatchError,
        FakeTensorMode,
    )
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError as error:  # private names: PyTorch 2.11 does not have them all
    pytest.skip(f"PyTorch {torch.__version__}: {error}", allow_module_level=True)
_setup_privateuseone_for_python_backend("card")  # from here on torch knows devices of this name
CARD = torch.device("card:0")
RULES = (Rule(), Rule(first=2), Rule(k=2, site=SITE), Rule(first=1, k=AUTO, site=SITE))
# Two Key heads of 16 channels, a window of 16
MISTRAL = {**SMALL, **FAMILIES["mistral"], "num_hidden_layers": 3}


@pytest.fixture
def model(monkeypatch):
    """A Mistral on a card that does not exist, inside its mode."""
    make_tensor = torch.tensor  # it copies numbers to the card

    def numbers_on(data, device="cpu", **options):
        made = make_tensor(data, **options)
        return torch.empty(made.shape, dtype=made.dtype, device=device)

    monkeypatch.setattr(torch, "tensor", numbers_on)
    monkeypatch.setattr(quant, "check_finite", lambda X: None)  # calibration calls it, and waits
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(MISTRAL))
    with FakeTensorMode():
        for module in model.modules():
            for name, W in module._parameters.items():
                if W is not None:
                    W = torch.empty(W.shape, dtype=torch.float16, device=CARD)
                    module._parameters[name] = torch.nn.Parameter(W, requires_grad=False)
        yield model


class CopiesToTheHost(TorchDispatchMode):
    """Counts copies to the host: each waits until the device has done all that it was told."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.count += any(x.device == CARD for x in tensors)
        return out


def with_ranges(cache):
    """Return the same cache, and give its static quantizers some range."""
    for pair in cache:
        for quantizer in pair:
            if quantizer.static:
                quantizer.calibrate(torch.empty(1, 2, 10, 16, device=CARD))
    return cache


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("scheme", kvsink.SCHEMES)
def test_algorithm_1_stays_on_the_card(model, scheme, rule):
    """A batch of two texts longer than Mistral's window; no look at the host inside the loop over
    blocks."""
    cache = with_ranges(kvsink.rtn_quantizers(model, scheme, 3, 8))
    H = model.embedding(torch.zeros(2, 40, dtype=torch.int64, device=CARD))
    with CopiesToTheHost() as copies:
        H, S_sink = prefill(model, H, cache, **rule.prefill_arguments(H))
    assert H.device == S_sink.device == CARD and S_sink.shape == (2, 40) and copies.count == 0
    assert model.logits(H).shape == (2, 40, 97)


def test_the_watch_sees_what_it_should():
    with FakeTensorMode(), CopiesToTheHost() as copies:
        X = torch.zeros(3, device=CARD)
        X.cpu()
        assert copies.count == 1
        with pytest.raises(DataDependentOutputException):
            X.sum().item()
        with pytest.raises(FakeTensorDeviceMismatchError):
            X + torch.ones(3)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_calibration_stays_on_the_card(model, rule):
    """All but the check whether each Key and Value is finite."""
    schemes = ("token-static", "channel-static")
    caches = [kvsink.rtn_quantizers(model, scheme, 4, 8) for scheme in schemes]
    H = model.embedding(torch.zeros(1, 40, dtype=torch.int64, device=CARD))
    prefill(model, H, observers(caches), **rule.prefill_arguments(H))
    for cache in caches:
        for pair in cache:
            for quantizer in pair:
                assert quantizer.lo.device == quantizer.hi.device == CARD


def test_the_finder_stays_on_the_card_until_it_decides(model, monkeypatch):
    monkeypatch.setattr(kvsink, "check_hidden_state", lambda H, l, L: None)
    with pytest.raises(DataDependentOutputException) as error:
        kvsink.stable_outliers(model, torch.zeros(1, 40, dtype=torch.int64, device=CARD))
    assert "level.max() > 0" in str(error.traceback[1].statement)


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("scheme", [*kvsink.SCHEMES, "full"])
def test_the_packed_cache_stays_on_the_card(model, scheme, pre_rope):
    """Prefill of a prompt, then three tokens."""
    quantizers = kvsink.full_precision_quantizers(model)
    if scheme != "full":
        quantizers = with_ranges(kvsink.rtn_quantizers(model, scheme, 3, 8))
    cache = KVCache(model, quantizers, 48, k=2, pre_rope=pre_rope)
    logits = decode.prefill(model, cache, [[0] * 30], Rule(k=2, site=SITE))
    with CopiesToTheHost() as copies:
        for _ in range(3):
            token = torch.zeros(1, dtype=torch.int64, device=CARD)
            logits = decode.decode(model, cache, token)
    assert logits.shape == (1, 97) and logits.device == CARD and copies.count == 0


@pytest.mark.parametrize("rule", [Rule(first=2), Rule(k=2, site=SITE)], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_kvquant_stays_on_the_card(model, sparse, rule):
    midpoints = torch.zeros(3, device=CARD)
    levels = torch.zeros(4, device=CARD)
    lo = torch.zeros(2, 1, 16, device=CARD)
    K = kvquant.NonUniformQuantizer(midpoints, levels, sparse, lo=lo, hi=lo + 1)
    V = kvquant.NonUniformQuantizer(midpoints, levels, sparse, tail_size=1)
    H = model.embedding(torch.zeros(2, 40, dtype=torch.int64, device=CARD))
    step = kvsink.decoder_block_pre_rope
    with CopiesToTheHost() as copies:
        H, _ = prefill(model, H, [(K, V)] * 3, step=step, **rule.prefill_arguments(H))
    assert H.device == CARD and copies.count == 0
