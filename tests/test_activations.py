"""paper/activations.py: what hooks see, sinks, stages, Eq. 9, and what Figures 6, 7 and 18 are made
of."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kvsink import Site
from llama import Llama, apply_rope, rope_table
from paper import activations
from paper.activations import examine, look, stages
from paper.figures import stage_block
from support import stream
from tests.helpers import CHANNEL, SITE, STRONG, ordinary_tokens, plant
from tests.subjects import (
    PLACES,
    evidence,  # noqa: F401
    keys_and_values,
    planted_subject,
    planted_windows,
    seen_in_calibration,
    static_numpy,
)

# --------------------------------------------------------------------------------------------------
# Hooks


def double(model):
    twin = Llama(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.double()


def test_hooks_see_what_a_block_computes(planted, sequences):
    """Each activation against Section 2's equations in float64, block after block, and no hook is
    left behind."""
    model, tokens = double(planted), sequences[0][:1]
    H, rope = model.embedding(tokens), rope_table(model.config, 24, "cpu")
    seen = look(planted, tokens, lambda a: a)
    assert len(seen) == 6
    for l, (a, block) in enumerate(zip(seen, model.blocks), start=1):
        X = (
            H / (H.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.LN_mhsa.weight
        )  # (1, n, d)
        Q, K, V = (X[0] @ W.weight.T for W in (block.W_q, block.W_k, block.W_v))
        Q, K, V = (Y.view(24, -1, 8).transpose(0, 1) for Y in (Q, K, V))  # (heads, n, d_k)
        Q, K = apply_rope(Q, rope), apply_rope(K, rope)
        scores = torch.stack([(Q[h] @ K[h // 2].T / 8**0.5) for h in range(4)])
        P = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)
        O = torch.cat([P[h] @ V[h // 2] for h in range(4)], -1) @ block.W_o.weight.T
        H_ = O + H[0]
        Y = H_ / (H_.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.LN_ffn.weight
        X_d_in = F.silu(Y @ block.FFN.W_g.weight.T) * (Y @ block.FFN.W_u.weight.T)
        X_d_out = X_d_in @ block.FFN.W_d.weight.T
        H = (X_d_out + H_)[None]
        expected = {
            "Q": Q,
            "K": K,
            "V": V,
            "O": O,
            "H_": H_,
            "X_d_in": X_d_in,
            "X_d_out": X_d_out,
            "H": H[0],
        }
        assert a.l == l and set(a._fields) == {"l", *expected}
        for name, value in expected.items():
            found = getattr(a, name)
            assert found.dtype == torch.float32 and found.shape == value.shape, name
            assert (found - value).norm() <= 1e-5 * value.norm(), (l, name)
    assert not hooks_of(planted)


def hooks_of(model):
    return [
        module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks
    ]


def test_the_model_runs_once_and_one_block_is_in_memory_at_a_time(planted, sequences, monkeypatch):
    runs, kept = [], []
    forward = Llama.forward
    monkeypatch.setattr(
        Llama, "forward", lambda self, tokens: (runs.append(tokens), forward(self, tokens))[1]
    )

    def reduce(a):
        assert not any(reference() is not None for reference in kept)
        kept[:] = [weakref.ref(X) for X in (a.Q, a.K, a.V, a.O, a.H_, a.X_d_in, a.X_d_out)]
        return a.l, a.H.dtype

    assert (
        look(planted, sequences[0][:1], reduce) == [(l, torch.float32) for l in range(1, 7)]
        and len(runs) == 1
    )


def test_activations_of_a_model_in_half_precision_are_fp32(sequences, tmp_path):
    model = Llama.from_pretrained(plant(tmp_path / "model"), dtype=torch.bfloat16)
    for a in look(model, sequences[0][:1], lambda a: a):
        assert {X.dtype for X in a[1:]} == {torch.float32}


def test_hooks_are_removed_where_a_block_or_what_is_made_of_it_fails(
    planted, sequences, monkeypatch
):
    def fail(a):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look(planted, sequences[0][:1], fail)
    assert not hooks_of(planted)
    monkeypatch.setattr("llama.attention", None)
    with pytest.raises(TypeError):
        look(planted, sequences[0][:1], lambda a: a)
    assert not hooks_of(planted)


def test_hooks_see_blocks_that_come_from_disk(sequences, tmp_path):
    """The same numbers to the last digit, and each block is read once."""
    directory, tokens = plant(tmp_path / "model"), sequences[0][:1]
    model = stream.from_pretrained(directory, "cpu", torch.float32)
    reads, read = [], model.blocks.read
    model.blocks.read = lambda l: (reads.append(l), read(l))[1]
    found = look(model, tokens, lambda a: a)
    assert reads == list(range(6)) and not hooks_of(model)
    for a, b in zip(
        found, look(Llama.from_pretrained(directory), tokens, lambda a: a), strict=True
    ):
        assert a.l == b.l and all(torch.equal(X, Y) for X, Y in zip(a[1:], b[1:]))


# --------------------------------------------------------------------------------------------------
# Equations


@pytest.mark.parametrize("window", [None, 3])
def test_scores_bias_and_cosines_against_numpy(window):
    """Equations 3 and 9 and Figure 6a as plain loops in float64, with two queries to each Key and
    Value."""
    draw = np.random.RandomState(0)
    Q, K, V = draw.randn(4, 7, 8), draw.randn(2, 7, 8), draw.randn(2, 7, 8)
    S = np.array([True, False, False, True, False, False, False])
    P, bias, cosine = np.zeros((4, 7, 7)), np.zeros((4, 7, 8)), np.zeros((4, 7, 7))
    for h in range(4):
        for t in range(7):
            seen = [i for i in range(t + 1) if window is None or t - i < window]
            e = {i: np.exp(Q[h, t] @ K[h // 2, i] / np.sqrt(8)) for i in seen}
            for i in seen:
                P[h, t, i] = e[i] / sum(e.values())
                bias[h, t] += P[h, t, i] * V[h // 2, i] * S[i]
            for i in range(7):
                q, k = Q[h, t], K[h // 2, i]
                cosine[h, t, i] = q @ k / np.linalg.norm(q) / np.linalg.norm(k)
    Q, K, V = (torch.tensor(X) for X in (Q, K, V))
    assert torch.allclose(activations.attention_scores(Q, K, window), torch.tensor(P))
    assert torch.allclose(
        activations.attention_bias(torch.tensor(P), V, torch.tensor(S)), torch.tensor(bias)
    )
    assert torch.allclose(activations.cosines(Q, K), torch.tensor(cosine))
    pairs = [(t, u) for t in range(7) for u in range(7) if t != u]
    for h in range(4):
        unit = Q[h].numpy() / np.linalg.norm(Q[h].numpy(), axis=1, keepdims=True)
        expected = np.mean([unit[t] @ unit[u] for t, u in pairs])
        assert activations.mean_cosine(Q)[h].item() == pytest.approx(expected)


# the largest |H^l| of each block where the median is 0.1, and how many blocks one sees in each
# stage
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
    (found,) = stages(torch.tensor(peak, dtype=torch.float32), torch.full((len(peak),), 0.1))
    assert [len(blocks) for blocks in found] == lengths and sum(lengths) == len(peak)
    assert [l for blocks in found for l in blocks] == list(
        range(1, len(peak) + 1)
    )  # one after the other, none twice


def test_stages_where_there_are_two_emergences_or_none():
    peak = torch.tensor([5, 400, 900, 950, 940, 930, 300, 40, 20000] + [21000] * 10 + [9000, 900.0])
    weaker, main = stages(peak, torch.ones(21))
    assert main == (range(1, 9), range(9, 10), range(10, 20), range(20, 22), range(22, 22))
    assert weaker == (range(1, 2), range(2, 4), range(4, 7), range(7, 9), range(9, 9))
    weaker, main = stages(torch.tensor([5.0] + [300] * 12 + [20000] * 6 + [9]), torch.ones(20))
    assert main == (
        range(1, 14),
        range(14, 15),
        range(15, 20),
        range(20, 21),
        range(21, 21),
    )  # few blocks, but stronger
    assert weaker == (range(1, 2), range(2, 3), range(3, 14), range(14, 14), range(14, 14))
    assert (
        stages(torch.full((12,), 99.0), torch.ones(12)) == []
    )  # it takes a hundred times the median
    assert stages(torch.full((12,), 990.0), torch.full((12,), 10.0)) == []
    assert stages(torch.tensor([5, 5, 9000.0, 5, 5]), torch.ones(5)) == []  # a spike is not stable
    assert stages(torch.tensor([5, 5, 5, 5, 9000.0]), torch.ones(5)) == []
    spike = torch.tensor([5, 400, 420, 410, 5, 5, 9000.0, 5, 5])
    assert [s.stabilization for s in stages(spike, torch.ones(9))] == [range(3, 5)]


def test_sinks_are_what_stands_out_by_both_thresholds():
    H = torch.ones(6, 50)
    H[:, 3] = torch.tensor([2000, -250, 90, 199, -1500, 1])
    assert activations.sink_tokens(H, 3).tolist() == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]  # 199 < 2000 / 10
    H[:, 3] = torch.tensor([99, 1, 101, 1, 1, 1])
    assert activations.sink_tokens(H, 3).tolist() == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]  # 100 times the median
    X = torch.tensor([[1.0, -5.0, 2.0], [0.0, 3.0, -2.0]])
    assert activations.extremes(X).tolist() == [-5, 3]


# --------------------------------------------------------------------------------------------------
# A subject


def test_a_subject_is_examined():
    subject = planted_subject()
    assert subject.stages == [(range(1, 2), range(2, 3), range(3, 7), range(7, 7), range(7, 7))]
    assert (
        subject.S.nonzero().flatten().tolist() == [5, 22] and subject.block == 4 == subject.inside.l
    )
    seen = subject.look_where_stable(
        subject.windows[1], lambda a, S: (a.l, S.nonzero().flatten().tolist())
    )
    assert seen == [(l, [17, 18]) for l in (3, 4, 5, 6)]
    again = examine("x", "x", subject.model, None, subject.windows, SITE, layer=0)
    assert again.block == 1 == again.inside.l
    assert torch.equal(subject.inside.H, look(subject.model, subject.windows[0], lambda a: a.H)[3])


def test_evolution_is_of_every_token_the_entry_largest_in_magnitude(planted):
    """By NumPy, from the activations of each block."""
    curves, typical, S = activations.evolution(planted, planted_windows()[0], CHANNEL)
    seen = look(planted, planted_windows()[0], lambda a: a)
    for name, curve in curves.items():
        expected = [[row[np.abs(row).argmax()] for row in getattr(a, name).numpy()] for a in seen]
        assert curve.shape == (6, 40) and np.array_equal(curve, expected), name
    assert np.allclose(
        typical, [np.sort(np.abs(a.H.numpy()), None)[(40 * 32 - 1) // 2] for a in seen]
    )
    assert [row.nonzero().flatten().tolist() for row in S] == [
        [],
        *[PLACES[0]] * 5,
    ]  # from the emergence on


def test_a_site_after_the_emergence_leaves_fewer_blocks(planted):
    """Where Table 3 and the stages disagree, sinks are looked for only after l_E."""
    window = ordinary_tokens(40, 0)[None]
    window[0, 5] = STRONG
    subject = examine("planted", "by hand", planted, None, [window], Site(4, CHANNEL))
    assert subject.stable_blocks == [5, 6] == subject.look_where_stable(window, lambda a, S: a.l)
    assert subject.block == 6


def test_a_sliding_window_hides_sinks_that_are_too_far(planted):
    """Attention scores of a subject obey the model's window."""
    subject = planted_subject()
    twin = Llama(replace(planted.config, sliding_window=4))
    twin.load_state_dict(planted.state_dict())
    P = replace(subject, model=twin).scores(subject.inside)
    age = torch.arange(40)[:, None] - torch.arange(40)
    assert torch.equal(P > 0, ((age >= 0) & (age < 4)).expand(4, 40, 40))


# --------------------------------------------------------------------------------------------------
# The numbers of Figures 6, 7 and 18


def numpy_attention(Q, K, V, sinks):
    """Attention scores and the bias of Eq. 9, in float64, with two queries to each Key and
    Value."""
    e = np.exp(
        np.where(
            np.triu(np.ones((40, 40), bool), 1),
            -np.inf,
            Q @ K.repeat(2, 0).swapaxes(1, 2) / np.sqrt(8),
        )
    )
    P = e / e.sum(-1, keepdims=True)
    return P, P[:, :, sinks] @ V.repeat(2, 0)[:, sinks]


def test_static_damage_against_numpy():
    """Figure 7's numbers: relative errors over blocks 3 to 6 of the first window, with Keys, Values
    and Queries taken from the block, in float64."""
    subject, stored = planted_subject(), keys_and_values(0)
    sinks = np.isin(np.arange(40), PLACES[0])
    queries = look(subject.model, subject.windows[0], lambda a: a.Q.numpy().astype(np.float64))
    damage = activations.static_damage(subject)
    assert [row["bits"] for row in damage] == [8, 4, 3, 2]
    for row in damage:
        sums = {}
        for l in (3, 4, 5, 6):
            K, V = stored[l]["K"], stored[l]["V"]
            P, bias = numpy_attention(queries[l - 1], K, V, sinks)
            for kept in (False, True):
                K_ = static_numpy(K, row["bits"], seen_in_calibration(l, "K", kept), "token")
                V_ = static_numpy(V, row["bits"], seen_in_calibration(l, "V", kept), "token")
                if kept:
                    K_, V_ = np.where(sinks[:, None], K, K_), np.where(sinks[:, None], V, V_)
                else:
                    pairs = {
                        "sinks' K": (K_[:, sinks], K[:, sinks]),
                        "others' K": (K_[:, ~sinks], K[:, ~sinks]),
                    }
                    pairs |= {
                        "sinks' V": (V_[:, sinks], V[:, sinks]),
                        "others' V": (V_[:, ~sinks], V[:, ~sinks]),
                    }
                P_, bias_ = numpy_attention(queries[l - 1], K_, V_, sinks)
                suffix = ", kept" if kept else ""
                pairs |= {"scores" + suffix: (P_, P), "bias" + suffix: (bias_, bias)}
            for name, (X_, X) in pairs.items():
                sums.setdefault(name, []).append((((X_ - X) ** 2).sum(), (X**2).sum()))
        assert set(row) == {"bits", *sums}
        for name, terms in sums.items():
            error, size = np.sum(terms, axis=0)
            assert row[name] == pytest.approx(np.sqrt(error / size), rel=1e-3), (row["bits"], name)


def test_bias_similarity_against_numpy():
    """Figure 6a: from the first sink on, the mean over all pairs of two tokens' biases."""
    subject, sinks = planted_subject(), np.isin(np.arange(40), PLACES[0])
    alike = activations.bias_similarity(subject)
    assert alike.shape == (6, 4)
    seen = look(
        subject.model,
        subject.windows[0],
        lambda a: [X.numpy().astype(np.float64) for X in (a.Q, a.K, a.V)],
    )
    for found, (Q, K, V) in zip(alike, seen):
        _, bias = numpy_attention(Q, K, V, sinks)
        unit = bias[:, 5:] / np.linalg.norm(bias[:, 5:], axis=-1, keepdims=True)  # (h, 35, d_k)
        cosine = unit @ unit.swapaxes(1, 2)
        assert np.allclose(found, [C[~np.eye(35, dtype=bool)].mean() for C in cosine], atol=1e-5)


def test_norms_by_block_against_numpy():
    subject, sinks = planted_subject(), np.isin(np.arange(40), PLACES[0])
    norms = activations.norms_by_block(subject)
    seen = look(subject.model, subject.windows[0], lambda a: a)
    for name, found in norms.items():
        for l, a in enumerate(seen):
            N = np.linalg.norm(getattr(a, name).numpy(), axis=-1)  # (heads, n)
            expected = [np.quantile(N[:, who], (0.1, 0.5, 0.9)) for who in (sinks, ~sinks)]
            assert np.allclose(found[l], expected, rtol=1e-5), (name, l)
    assert list(norms) == ["Q", "K", "V"] and found.shape == (6, 2, 3)


# --------------------------------------------------------------------------------------------------
# The default model: Sections 3 and 4 hold

STABLE = range(13, 29)  # the stabilization stage of the default model, counted from 1


# noqa: F811
def test_outliers_of_the_default_model_stand_at_token_0_and_where_documents_end(evidence):
    for window in evidence.windows:
        expected = window[0] == evidence.tokenizer.eot
        expected[0] = True
        assert expected.sum() >= 4

        def check(a, S, expected=expected):
            assert torch.equal(a.H[:, evidence.site.c].abs() > 5000, expected), a.l
            assert torch.equal(a.H.abs().amax(1) > 5000, expected), a.l  # and in no other channel
            assert torch.equal(S, expected)
            return a.l

        assert evidence.look_where_stable(window, check) == list(STABLE)


def test_the_stages_of_the_default_model(evidence):  # noqa: F811
    """One emergence in a single block, out of the FFN; a weaker one before it; dissipation by the
    opposite sign."""
    weaker, main = evidence.stages
    assert main == (range(1, 12), range(12, 13), STABLE, range(29, 31), range(31, 31))
    assert (weaker.emergence, weaker.stabilization, weaker.dissipation) == (
        range(2, 4),
        range(4, 10),
        range(10, 12),
    )
    peaks = {name: curve.abs().amax(1) for name, curve in evidence.curves.items()}
    assert peaks["X_d_in"][11] > 1000 and peaks["X_d_out"][11] > 10000
    for l in STABLE:
        assert (
            peaks["X_d_in"][l - 1] < peaks["X_d_in"][11] / 15
            and peaks["X_d_out"][l - 1] < peaks["X_d_out"][11] / 50
        )
        assert peaks["H_"][l - 1] > 10000 and peaks["H"][l - 1] > 10000
    X_d_out, S = evidence.curves["X_d_out"], evidence.S
    shown = [
        stage_block(name, blocks, evidence.curves)
        for name, blocks in main._asdict().items()
        if blocks
    ]
    assert shown == [6, 12, 21, 29]  # of the two blocks of the dissipation the one that does more
    assert torch.equal(X_d_out[11, S].sign(), -X_d_out[28, S].sign())
    assert (X_d_out[28, S].abs() > 3000).all() and X_d_out[28, ~S].abs().max() < 300


def test_qkv_suppression_of_the_default_model(evidence):  # noqa: F811
    norms = activations.norms_by_block(evidence)
    for l in STABLE:
        for name in "KV" if l == 28 else "QKV":
            sinks, others = norms[name][l - 1, :, 1]
            assert sinks < others / 2, (name, l)
    assert (
        norms["Q"][29, 0, 1] > 1.5 * norms["Q"][29, 1, 1]
    )  # the large Queries of the last layer, Appendix E


def test_where_the_default_model_gains_from_its_sinks(evidence):  # noqa: F811
    """Not from the ranges of other tokens, but from the sinks' own Keys and Values, and so from the
    bias of Eq. 9."""
    left = {8: 0.1, 4: 0.2, 3: 0.4, 2: 0.7}  # of the bias's error when the sinks are kept, at most
    half = replace(
        evidence, windows=[evidence.windows[0][:, :512]]
    )  # scores are of all pairs: a quarter of the time
    for row in activations.static_damage(half):
        assert row["sinks' K"] > 1.4 * row["others' K"] and row["sinks' V"] > 1.1 * row["others' V"]
        assert (
            row["bias, kept"] < left[row["bits"]] * row["bias"]
            and row["scores, kept"] < 0.9 * row["scores"]
        )


def test_the_attention_bias_of_the_default_model_is_one(evidence):  # noqa: F811
    """Figure 6: from the emergence on, the bias points the same way for every token."""
    alike = activations.bias_similarity(evidence)
    assert alike[12:28].min() > 0.9 and alike[12:28].mean() > 0.97 and alike[:12].mean() < 0.9
