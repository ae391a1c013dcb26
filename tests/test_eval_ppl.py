"""The main command as it stands on the README, on the default model."""

import pytest

import eval_ppl
from tests.helpers import REFERENCE, default_results, perplexities


def test_the_values_of_an_independent_implementation(default_model):
    """Full precision and 4 bits by channel, on eight windows; eager, so that they do not depend on a compiler."""
    out = default_results()
    rows = "--scheme channel-static --bits 4 --sinks 0 5 20".split()
    assert eval_ppl.main([*rows, "--no-compile", "--json", str(out)]) == 0
    ppl = perplexities(out)
    for row, expected in REFERENCE.items():
        assert ppl[row] == pytest.approx(expected, rel=0.005), row
    assert ppl["full", 16, "none", 0] == pytest.approx(19.559, abs=0.001)
    assert ppl["channel-static", 4, "kvsink", 5] < ppl["channel-static", 4, "pfn", 20]


def test_the_default_command(default_model, tmp_path):
    """The rows of `python eval_ppl.py`, on its first window: who is better shows there, too."""
    out = tmp_path / "out.json"
    assert eval_ppl.main(["--no-compile", "--limit", "1", "--calib-windows", "1", "--json", str(out)]) == 0
    ppl = perplexities(out)
    assert len(ppl) == 13 and {scheme for scheme, *_ in ppl} == {"full", "channel-static", "token-static"}
    for bits in (4, 3):
        for scheme in ("channel-static", "token-static"):
            assert ppl[scheme, bits, "kvsink", 5] < ppl[scheme, bits, "pfn", 5]
        assert ppl["channel-static", bits, "kvsink", 5] < ppl["channel-static", bits, "pfn", 20]
