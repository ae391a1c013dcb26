"""paper/activations.py: hooks, sinks, stages, Eq. 9, and the numbers behind Figures 6, 7 and 18."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kvsink import Site
from llama import Llama, apply_rope, rope_table
from paper import activations
from paper.activations import examine, find_stages, map_blocks
from paper.figures import stage_block
from support import stream
from tests.helpers import CHANNEL, SITE, STRONG, ordinary_tokens, plant
from tests.subjects import (
    PLACES,
    calibration_tensor,
    evidence,  # noqa: F401
    keys_and_values,
    planted_subject,
    planted_windows,
    static_numpy,
)

# --------------------------------------------------------------------------------------------------
# Hooks


def double(model):
    twin = Llama(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.double()


def rms_norm(H, LN):
    return H / (H.square().mean(-1, keepdim=True) + 1e-5).sqrt() * LN.weight


def block_by_equations(block, H, rope):
    """Section 2's equations for H (n, d), in float64: name -> activation."""
    n = len(H)
    X = rms_norm(H, block.LN_mhsa)  # (n, d)
    Q, K, V = (X @ W.weight.T for W in (block.W_q, block.W_k, block.W_v))
    Q, K, V = (Y.view(n, -1, 8).transpose(0, 1) for Y in (Q, K, V))  # (heads, n, d_k)
    Q = apply_rope(Q, rope)
    K = apply_rope(K, rope)
    scores = torch.stack([(Q[h] @ K[h // 2].T / 8**0.5) for h in range(4)])
    P = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    O = torch.cat([P[h] @ V[h // 2] for h in range(4)], -1) @ block.W_o.weight.T
    H_ = O + H
    Y = rms_norm(H_, block.LN_ffn)
    X_d_in = F.silu(Y @ block.FFN.W_g.weight.T) * (Y @ block.FFN.W_u.weight.T)
    X_d_out = X_d_in @ block.FFN.W_d.weight.T
    names = ("Q", "K", "V", "O", "H_", "X_d_in", "X_d_out", "H")
    return dict(zip(names, (Q, K, V, O, H_, X_d_in, X_d_out, X_d_out + H_)))


def test_hooks_see_the_activations_of_a_block(planted, sequences):
    """Each activation agrees with Section 2's equations, block after block, and no hook is left
    behind."""
    model = double(planted)
    tokens = sequences[0][:1]
    H = model.embedding(tokens)[0]
    rope = rope_table(model.config, 24, "cpu")
    blocks = map_blocks(planted, tokens, lambda acts: acts)
    assert len(blocks) == 6
    for l, (acts, block) in enumerate(zip(blocks, model.blocks), start=1):
        expected = block_by_equations(block, H, rope)
        H = expected["H"]
        assert acts.l == l and set(acts._fields) == {"l", *expected}
        for name, value in expected.items():
            X = getattr(acts, name)
            assert X.dtype == torch.float32 and X.shape == value.shape, name
            assert (X - value).norm() <= 1e-5 * value.norm(), (l, name)
    assert not hooks_of(planted)


def hooks_of(model):
    return [
        module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks
    ]


def test_the_model_runs_once_and_one_block_is_in_memory_at_a_time(planted, sequences, monkeypatch):
    runs = []
    references = []
    forward = Llama.forward

    def counted(self, tokens):
        runs.append(tokens)
        return forward(self, tokens)

    def reduce(acts):
        assert not any(reference() is not None for reference in references)
        tensors = (acts.Q, acts.K, acts.V, acts.O, acts.H_, acts.X_d_in, acts.X_d_out)
        references[:] = [weakref.ref(X) for X in tensors]
        return acts.l, acts.H.dtype

    monkeypatch.setattr(Llama, "forward", counted)
    results = map_blocks(planted, sequences[0][:1], reduce)
    assert results == [(l, torch.float32) for l in range(1, 7)]
    assert len(runs) == 1


def test_activations_of_a_model_in_half_precision_are_fp32(sequences, tmp_path):
    model = Llama.from_pretrained(plant(tmp_path / "model"), dtype=torch.bfloat16)
    for acts in map_blocks(model, sequences[0][:1], lambda acts: acts):
        assert {X.dtype for X in acts[1:]} == {torch.float32}


def test_hooks_are_removed_if_a_block_or_the_reduction_fails(planted, sequences, monkeypatch):
    def fail(acts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        map_blocks(planted, sequences[0][:1], fail)
    assert not hooks_of(planted)
    monkeypatch.setattr("llama.attention", None)
    with pytest.raises(TypeError):
        map_blocks(planted, sequences[0][:1], lambda acts: acts)
    assert not hooks_of(planted)


def test_hooks_see_blocks_that_come_from_disk(sequences, tmp_path):
    """The numbers are the same to the last digit, and each block is read once."""
    directory = plant(tmp_path / "model")
    tokens = sequences[0][:1]
    model = stream.from_pretrained(directory, "cpu", torch.float32)
    reads = []
    read = model.blocks.read

    def counted(l):
        reads.append(l)
        return read(l)

    model.blocks.read = counted
    streamed = map_blocks(model, tokens, lambda acts: acts)
    assert reads == list(range(6)) and not hooks_of(model)
    in_memory = map_blocks(Llama.from_pretrained(directory), tokens, lambda acts: acts)
    for a, b in zip(streamed, in_memory, strict=True):
        assert a.l == b.l and all(torch.equal(X, Y) for X, Y in zip(a[1:], b[1:]))


# --------------------------------------------------------------------------------------------------
# Equations


@pytest.mark.parametrize("window", [None, 3])
def test_scores_bias_and_cosines_against_numpy(window):
    """Equations 3 and 9 and Figure 6a agree with plain loops in float64, with two queries to each
    Key and Value."""
    draw = np.random.RandomState(0)
    Q = draw.randn(4, 7, 8)
    K = draw.randn(2, 7, 8)
    V = draw.randn(2, 7, 8)
    S = np.array([True, False, False, True, False, False, False])
    P = np.zeros((4, 7, 7))
    bias = np.zeros((4, 7, 8))
    cosine = np.zeros((4, 7, 7))
    for h in range(4):
        for t in range(7):
            seen = [i for i in range(t + 1) if window is None or t - i < window]
            e = {i: np.exp(Q[h, t] @ K[h // 2, i] / np.sqrt(8)) for i in seen}
            for i in seen:
                P[h, t, i] = e[i] / sum(e.values())
                bias[h, t] += P[h, t, i] * V[h // 2, i] * S[i]
            for i in range(7):
                q = Q[h, t]
                k = K[h // 2, i]
                cosine[h, t, i] = q @ k / np.linalg.norm(q) / np.linalg.norm(k)
    Q, K, V, S, P, bias, cosine = map(torch.tensor, (Q, K, V, S, P, bias, cosine))
    assert torch.allclose(activations.attention_scores(Q, K, window), P)
    assert torch.allclose(activations.attention_bias(P, V, S), bias)
    assert torch.allclose(activations.cosines(Q, K), cosine)
    pairs = [(t, u) for t in range(7) for u in range(7) if t != u]
    for h in range(4):
        unit = Q[h].numpy() / np.linalg.norm(Q[h].numpy(), axis=1, keepdims=True)
        expected = np.mean([unit[t] @ unit[u] for t, u in pairs])
        assert activations.mean_cosine(Q)[h].item() == pytest.approx(expected)


# The largest |H^l| of each block if the median is 0.1, and the number of blocks in each stage.
STAGE_CURVES = {
    "LLaMA2-7B: one block, a final stage": ([5, 700] + [720] * 28 + [8, 9], [1, 1, 28, 1, 1]),
    "LLaMA3-8B: the last block, no final stage": ([5, 300] + [310] * 29 + [20], [1, 1, 29, 1, 0]),
    "Mistral: several blocks": (
        [4, 300] + [305] * 20 + [190, 120, 60, 25, 12, 9],
        [1, 1, 20, 4, 2],
    ),
    "LLaMA2-13B: late, and it grows": (
        [5, 6, 7] + [1000 + 10 * i for i in range(35)] + [30, 30],
        [3, 1, 34, 1, 1],
    ),
    "emergence in two blocks": ([5, 200] + [900] * 10 + [7], [1, 2, 9, 1, 0]),
    "no dissipation": ([5, 6] + [400] * 6, [2, 1, 5, 0, 0]),
    "from the first block on": ([400] * 6 + [7], [0, 1, 5, 1, 0]),
    "one block far higher, at the end": ([5, 300] + [310] * 29 + [2000], [1, 1, 30, 0, 0]),
    "one block far higher, in the middle": (
        [5, 300] + [310] * 12 + [2000] + [310] * 15 + [5],
        [1, 1, 28, 1, 0],
    ),
    "one block lower": ([5, 700, 720, 720, 400] + [720] * 4 + [9], [1, 1, 7, 1, 0]),
}


@pytest.mark.parametrize("name", STAGE_CURVES)
def test_stages_of_curves_made_by_hand(name):
    peak, lengths = STAGE_CURVES[name]
    typical = torch.full((len(peak),), 0.1)
    (stages,) = find_stages(torch.tensor(peak, dtype=torch.float32), typical)
    assert [len(blocks) for blocks in stages] == lengths and sum(lengths) == len(peak)
    # one after the other, none twice
    assert [l for blocks in stages for l in blocks] == list(range(1, len(peak) + 1))


def test_two_emergences():
    peak = torch.tensor([5, 400, 900, 950, 940, 930, 300, 40, 20000] + [21000] * 10 + [9000, 900.0])
    weaker, main = find_stages(peak, torch.ones(21))
    assert main == (range(1, 9), range(9, 10), range(10, 20), range(20, 22), range(22, 22))
    assert weaker == (range(1, 2), range(2, 4), range(4, 7), range(7, 9), range(9, 9))
    # the main stage has fewer blocks here, but stronger outliers
    peak = torch.tensor([5.0] + [300] * 12 + [20000] * 6 + [9])
    weaker, main = find_stages(peak, torch.ones(20))
    assert main == (range(1, 14), range(14, 15), range(15, 20), range(20, 21), range(21, 21))
    assert weaker == (range(1, 2), range(2, 3), range(3, 14), range(14, 14), range(14, 14))


def test_no_emergence():
    """An outlier is a hundred times the median, and a spike in one block is not stable."""
    assert find_stages(torch.full((12,), 99.0), torch.ones(12)) == []
    assert find_stages(torch.full((12,), 990.0), torch.full((12,), 10.0)) == []
    assert find_stages(torch.tensor([5, 5, 9000.0, 5, 5]), torch.ones(5)) == []
    assert find_stages(torch.tensor([5, 5, 5, 5, 9000.0]), torch.ones(5)) == []
    spike = torch.tensor([5, 400, 420, 410, 5, 5, 9000.0, 5, 5])
    assert [s.stabilization for s in find_stages(spike, torch.ones(9))] == [range(3, 5)]


def test_sinks_stand_out_by_both_thresholds():
    H = torch.ones(6, 50)
    H[:, 3] = torch.tensor([2000, -250, 90, 199, -1500, 1])
    S = activations.sink_tokens(H, 3)
    assert S.nonzero().flatten().tolist() == [0, 1, 4]  # 199 < 2000 / 10
    H[:, 3] = torch.tensor([99, 1, 101, 1, 1, 1])
    S = activations.sink_tokens(H, 3)
    assert S.nonzero().flatten().tolist() == [2]  # 100 times the median
    X = torch.tensor([[1.0, -5.0, 2.0], [0.0, 3.0, -2.0]])
    assert activations.extremes(X).tolist() == [-5, 3]


# --------------------------------------------------------------------------------------------------
# A subject


def test_a_subject_is_examined():
    subject = planted_subject()
    assert subject.stages == [(range(1, 2), range(2, 3), range(3, 7), range(7, 7), range(7, 7))]
    assert subject.S.nonzero().flatten().tolist() == [5, 22]
    assert subject.block == 4 == subject.activations.l
    sinks = subject.map_stable_blocks(
        subject.windows[1], lambda acts, S: (acts.l, S.nonzero().flatten().tolist())
    )
    assert sinks == [(l, [17, 18]) for l in (3, 4, 5, 6)]
    names = {"name": "x", "text": "x", "tokenizer": None}
    other = examine(subject.model, subject.windows, SITE, layer=0, **names)
    assert other.block == 1 == other.activations.l
    H = map_blocks(subject.model, subject.windows[0], lambda acts: acts.H)
    assert torch.equal(subject.activations.H, H[3])


def test_the_evolution_has_the_largest_entry_of_every_token(planted):
    """It agrees with NumPy on the activations of each block."""
    tokens = planted_windows()[0]
    curves, typical, S = activations.outlier_evolution(planted, tokens, CHANNEL)
    blocks = map_blocks(planted, tokens, lambda acts: acts)
    for name, curve in curves.items():
        X = [getattr(acts, name).numpy() for acts in blocks]
        expected = [[row[np.abs(row).argmax()] for row in X_l] for X_l in X]
        assert curve.shape == (6, 40) and np.array_equal(curve, expected), name
    medians = [np.sort(np.abs(acts.H.numpy()), None)[(40 * 32 - 1) // 2] for acts in blocks]
    assert np.allclose(typical, medians)
    sinks = [row.nonzero().flatten().tolist() for row in S]
    assert sinks == [[], *[PLACES[0]] * 5]  # from the emergence on


def test_a_site_after_the_emergence_leaves_fewer_blocks(planted):
    """If Table 3 and the stages disagree, sinks are looked for only after l_E."""
    window = ordinary_tokens(40, 0)[None]
    window[0, 5] = STRONG
    names = {"name": "planted", "text": "by hand", "tokenizer": None}
    subject = examine(planted, [window], Site(4, CHANNEL), **names)
    assert subject.stable_blocks == [5, 6]
    assert subject.map_stable_blocks(window, lambda acts, S: acts.l) == [5, 6]
    assert subject.block == 6


def test_a_sliding_window_hides_sinks_that_are_too_far(planted):
    """Attention scores of a subject obey the model's window."""
    subject = planted_subject()
    twin = Llama(replace(planted.config, sliding_window=4))
    twin.load_state_dict(planted.state_dict())
    P = replace(subject, model=twin).scores(subject.activations)
    age = torch.arange(40)[:, None] - torch.arange(40)
    assert torch.equal(P > 0, ((age >= 0) & (age < 4)).expand(4, 40, 40))


# --------------------------------------------------------------------------------------------------
# The numbers of Figures 6, 7 and 18


def numpy_attention(Q, K, V, sinks):
    """Attention scores and the bias of Eq. 9, in float64, with two queries to each Key and
    Value."""
    scores = Q @ K.repeat(2, 0).swapaxes(1, 2) / np.sqrt(8)
    e = np.exp(np.where(np.triu(np.ones((40, 40), bool), 1), -np.inf, scores))
    P = e / e.sum(-1, keepdims=True)
    return P, P[:, :, sinks] @ V.repeat(2, 0)[:, sinks]


def numpy_pairs(Q, l, bits, sinks):
    """Return name -> X' and X for each column of `static_damage` in block l of the first window, in
    float64, from its Queries (h, n, d_k)."""
    K, V = keys_and_values(0)[l].values()
    P, bias = numpy_attention(Q, K, V, sinks)

    def quantized(kept):
        K_ = static_numpy(K, bits, calibration_tensor(l, "K", kept), "token")
        V_ = static_numpy(V, bits, calibration_tensor(l, "V", kept), "token")
        return K_, V_

    K_, V_ = quantized(kept=False)
    P_, bias_ = numpy_attention(Q, K_, V_, sinks)
    K_kept, V_kept = quantized(kept=True)
    K_kept = np.where(sinks[:, None], K, K_kept)
    V_kept = np.where(sinks[:, None], V, V_kept)
    P_kept, bias_kept = numpy_attention(Q, K_kept, V_kept, sinks)
    return {
        "sinks' K": (K_[:, sinks], K[:, sinks]),
        "others' K": (K_[:, ~sinks], K[:, ~sinks]),
        "sinks' V": (V_[:, sinks], V[:, sinks]),
        "others' V": (V_[:, ~sinks], V[:, ~sinks]),
        "scores": (P_, P),
        "scores, kept": (P_kept, P),
        "bias": (bias_, bias),
        "bias, kept": (bias_kept, bias),
    }


def test_static_damage_against_numpy():
    """Figure 7's numbers are relative errors over blocks 3 to 6 of the first window."""
    subject = planted_subject()
    sinks = np.isin(np.arange(40), PLACES[0])
    queries = subject.map_blocks(lambda acts: acts.Q.numpy().astype(np.float64))
    damage = activations.static_damage(subject)
    assert [row["bits"] for row in damage] == [8, 4, 3, 2]
    for row in damage:
        sums = {}
        for l in (3, 4, 5, 6):
            for name, (X_, X) in numpy_pairs(queries[l - 1], l, row["bits"], sinks).items():
                sums.setdefault(name, []).append((((X_ - X) ** 2).sum(), (X**2).sum()))
        assert set(row) == {"bits", *sums}
        for name, terms in sums.items():
            error, size = np.sum(terms, axis=0)
            assert row[name] == pytest.approx(np.sqrt(error / size), rel=1e-3), (row["bits"], name)


def test_bias_similarity_against_numpy():
    """Figure 6a is the mean over all pairs of two tokens' biases, from the first sink on."""
    subject = planted_subject()
    sinks = np.isin(np.arange(40), PLACES[0])
    similarity = activations.bias_similarity(subject)
    assert similarity.shape == (6, 4)
    for found, acts in zip(similarity, subject.map_blocks(lambda acts: acts)):
        Q, K, V = (X.numpy().astype(np.float64) for X in (acts.Q, acts.K, acts.V))
        _, bias = numpy_attention(Q, K, V, sinks)
        unit = bias[:, 5:] / np.linalg.norm(bias[:, 5:], axis=-1, keepdims=True)  # (h, 35, d_k)
        cosine = unit @ unit.swapaxes(1, 2)
        assert np.allclose(found, [C[~np.eye(35, dtype=bool)].mean() for C in cosine], atol=1e-5)


def test_norms_by_block_against_numpy():
    subject = planted_subject()
    sinks = np.isin(np.arange(40), PLACES[0])
    norms = activations.norms_by_block(subject)
    blocks = subject.map_blocks(lambda acts: acts)
    for name, found in norms.items():
        for l, acts in enumerate(blocks):
            N = np.linalg.norm(getattr(acts, name).numpy(), axis=-1)  # (heads, n)
            expected = [np.quantile(N[:, tokens], (0.1, 0.5, 0.9)) for tokens in (sinks, ~sinks)]
            assert np.allclose(found[l], expected, rtol=1e-5), (name, l)
    assert list(norms) == ["Q", "K", "V"] and found.shape == (6, 2, 3)


# --------------------------------------------------------------------------------------------------
# The default model: Sections 3 and 4 hold

STABLE = range(13, 29)  # the stabilization stage of the default model, counted from 1


def test_the_default_model_has_outliers_at_token_0_and_at_ends_of_documents(
    evidence,  # noqa: F811
):
    for window in evidence.windows:
        expected = window[0] == evidence.tokenizer.eot
        expected[0] = True
        assert expected.sum() >= 4

        def check(acts, S, expected=expected):
            assert torch.equal(acts.H[:, evidence.site.c].abs() > 5000, expected), acts.l
            # and in no other channel
            assert torch.equal(acts.H.abs().amax(1) > 5000, expected), acts.l
            assert torch.equal(S, expected)
            return acts.l

        assert evidence.map_stable_blocks(window, check) == list(STABLE)


def test_the_stages_of_the_default_model(evidence):  # noqa: F811
    """There is one emergence in a single block, out of the FFN; a weaker one before it; and
    dissipation by the opposite sign."""
    weaker, main = evidence.stages
    assert main == (range(1, 12), range(12, 13), STABLE, range(29, 31), range(31, 31))
    assert weaker.emergence == range(2, 4)
    assert weaker.stabilization == range(4, 10)
    assert weaker.dissipation == range(10, 12)
    peaks = {name: curve.abs().amax(1) for name, curve in evidence.curves.items()}
    X_d_in = peaks["X_d_in"]
    X_d_out = peaks["X_d_out"]
    assert X_d_in[11] > 1000 and X_d_out[11] > 10000
    for l in STABLE:
        assert X_d_in[l - 1] < X_d_in[11] / 15 and X_d_out[l - 1] < X_d_out[11] / 50
        assert peaks["H_"][l - 1] > 10000 and peaks["H"][l - 1] > 10000
    stages = {name: blocks for name, blocks in main._asdict().items() if blocks}
    shown = [stage_block(name, blocks, evidence.curves) for name, blocks in stages.items()]
    assert shown == [6, 12, 21, 29]  # 29 does more than 30
    X_d_out = evidence.curves["X_d_out"]
    S = evidence.S
    assert torch.equal(X_d_out[11, S].sign(), -X_d_out[28, S].sign())
    assert (X_d_out[28, S].abs() > 3000).all() and X_d_out[28, ~S].abs().max() < 300


def test_qkv_suppression_of_the_default_model(evidence):  # noqa: F811
    norms = activations.norms_by_block(evidence)
    for l in STABLE:
        for name in "KV" if l == 28 else "QKV":
            sinks, others = norms[name][l - 1, :, 1]
            assert sinks < others / 2, (name, l)
    # the large Queries of the last layer, Appendix E
    assert norms["Q"][29, 0, 1] > 1.5 * norms["Q"][29, 1, 1]


def test_the_gain_of_keeping_the_sinks_of_the_default_model(evidence):  # noqa: F811
    """It does not come from the ranges of other tokens, but from the sinks' own Keys and Values,
    and so from the bias of Eq. 9."""
    # bits -> the bias's error when the sinks are kept, at most this part of the error when not
    largest = {8: 0.1, 4: 0.2, 3: 0.4, 2: 0.7}
    # Scores are of all pairs of tokens: half of the window takes a quarter of the time.
    half = replace(evidence, windows=[evidence.windows[0][:, :512]])
    for row in activations.static_damage(half):
        assert row["sinks' K"] > 1.4 * row["others' K"] and row["sinks' V"] > 1.1 * row["others' V"]
        assert row["bias, kept"] < largest[row["bits"]] * row["bias"]
        assert row["scores, kept"] < 0.9 * row["scores"]


def test_the_attention_bias_of_the_default_model_is_one(evidence):  # noqa: F811
    """Figure 6: from the emergence on, the bias points the same way for every token."""
    similarity = activations.bias_similarity(evidence)
    assert similarity[12:28].min() > 0.9 and similarity[12:28].mean() > 0.97
    assert similarity[:12].mean() < 0.9
