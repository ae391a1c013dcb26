"""Problem 5, the finder: given hidden states."""

import numpy as np

from .compare import close, same
from .scenarios import outliers, site


def states():
    """Return H^1 to H^5 of seven tokens and eight channels, all 1, so that the median is 1."""
    return np.ones((5, 7, 8), np.float32)


def test_stable_outliers_by_hand(run):
    """Token 3 has 120 in channel 2, and token 5 has -340 in channel 4, from block 2 on: the larger
    comes first."""
    H = states()
    H[1:, 3, 2] = 120
    H[1:, 5, 4] = -340
    (l_E, channels, magnitudes), _, _ = run(outliers, H)
    same([l_E, channels], [2, [4, 2]], "block, from 1, and channels")
    close(np.array(magnitudes), [340, 120], "magnitudes")


def test_stable_outliers_above_both_thresholds(run):
    """99 is below a hundred times the median, and 500 in all tokens is not ten times its channel's
    median: ValueError."""
    H = states()
    H[1:, 3, 2] = 99
    assert run(outliers, H)[1], "99: no ValueError"
    H[1:, :, 6] = 500
    assert run(outliers, H)[1], "500 in all tokens: no ValueError"


def test_stable_outliers_pass_over_a_weaker_emergence(run):
    """Channel 2 has 150 in block 1 and 1000 from block 2 on: it emerges in block 2."""
    H = states()
    H[0, 3, 2] = 150
    H[1:, 3, 2] = 1000
    same(run(outliers, H)[0][:2], [2, [2]], "block, from 1, and channels")


def test_stable_outliers_in_an_even_number_of_blocks(run):
    """A median is the lower of the two middle numbers: 0, 0, 120, 120 has the level 0, and so no
    stable outlier (ValueError); 0, 120, 120, 120 has the level 120."""
    H = states()[:4]
    H[2:, 3, 2] = 120
    assert run(outliers, H)[1], "in two of four blocks: no ValueError"
    H[1, 3, 2] = 120
    same(run(outliers, H)[0][:2], [2, [2]], "block, from 1, and channels")


def test_stable_outliers_name_the_block_of_a_nan(run):
    """NaN in block 4 raises NotFinite, as check_hidden_state says it, and no hook is left on the
    model."""
    H = states()
    H[3, 0, 0] = np.nan
    _, error, hooks = run(outliers, H)
    good = error and error[0] == "NotFinite" and "block 4" in error[1]
    assert good, f"{error}: not NotFinite of block 4"
    same(hooks, 0, "hooks that are left")


def test_find_site_by_hand(run):
    """Two prompts agree on block 2 and channel 4; further channels may differ. Each prompt has the
    shape (1, n)."""
    found, _, tokens = run(site, [[2, [4, 2], [340, 120]], [2, [4, 7], [500, 130]]])
    same(found, [2, 4], "site")
    same(tokens, [[[0, 1, 2]], [[1, 2, 3]]], "tokens")


def test_find_site_refuses_prompts_that_disagree(run):
    """Another block or another first channel raises ValueError."""
    error = run(site, [[2, [4], [340]], [3, [4], [340]]])[1]
    assert error, "another block: no ValueError"
    error = run(site, [[2, [4, 2], [340, 120]], [2, [2, 4], [340, 120]]])[1]
    assert error, "another channel: no ValueError"
