"""The main command as it stands on the README, on the default model."""

import pytest

import eval_ppl
from tests.helpers import REFERENCE, default_results, results_of


def test_the_default_command(default_model):
    """`python eval_ppl.py`, eager so that it does not depend on a compiler."""
    out = default_results()
    assert eval_ppl.main(["--no-compile", "--json", str(out)]) == 0
    ppl = {(r["scheme"], r["bits"], r["keep"], r["sinks"]): r["ppl"] for r in results_of(out)}
    for row, expected in REFERENCE.items():
        assert ppl[row] == pytest.approx(expected, rel=0.005), row
    assert ppl["full", 16, "none", 0] == pytest.approx(19.559, abs=0.001)
    for bits in (4, 3):
        for scheme in ("channel-static", "token-static"):
            assert ppl[scheme, bits, "kvsink", 5] < ppl[scheme, bits, "pfn", 5]
        assert ppl["channel-static", bits, "kvsink", 5] < ppl["channel-static", bits, "pfn", 20]
