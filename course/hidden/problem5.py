"""Problem 5 with noise, other places, and numbers that are nearly outliers."""

import numpy as np

from course.checks.compare import close, same
from course.checks.scenarios import outliers, site


def noise(seed, L=9, n=21, d=16):
    return np.random.RandomState(seed).randn(L, n, d).astype(np.float32)


def test_stable_outliers_in_noise(run):
    """Two tokens emerge in block 3 and dissipate in the last two; another channel is large in two
    blocks only."""
    for seed, c in ((1, 5), (2, 11)):
        H = noise(seed)
        H[2:7, 4, c] = -900
        H[2:7, 13, c] = 700
        H[4:6, 9, c - 1] = 5000
        (l_E, channels, magnitudes), _, hooks = run(outliers, H)
        same([l_E, channels, hooks], [3, [c], 0], "block, channels, hooks")
        close(np.array(magnitudes), [900], "magnitudes")


def test_stable_outliers_by_their_level(run):
    """The channel with the largest median over the blocks gives the block: 800 from block 4 on,
    beside 300 from block 2 on. The channels are those that stand out in block 4, by their magnitude
    there."""
    H = noise(3)
    H[1:, 6, 2] = 300
    H[3:, 6, 9] = 800
    same(run(outliers, H)[0][:2], [4, [9, 2]], "block and channels")


def test_stable_outliers_at_the_edges(run):
    """Outliers from the first block to the last, with magnitudes just above a hundred; a channel
    has not emerged while it is below a quarter of its level."""
    H = np.ones((5, 7, 8), np.float32)
    H[:, 0, 7] = 101
    same(run(outliers, H)[0][:2], [1, [7]], "block and channels")
    H[0, 0, 7] = 249
    H[1:, 0, 7] = 1000
    same(run(outliers, H)[0][:2], [2, [7]], "below a quarter of the level")
    H[0, 0, 7] = 251
    same(run(outliers, H)[0][:2], [1, [7]], "above a quarter of the level")


def test_stable_outliers_of_half_the_blocks(run):
    """An outlier in fewer than half of the blocks is not stable: ValueError, and no hook is
    left."""
    H = noise(4)
    H[3:7, 5, 1] = 4000
    found, error, hooks = run(outliers, H)
    assert error and not found, f"{found}: no ValueError"
    same(hooks, 0, "hooks that are left")


def test_find_site_of_three_prompts(run):
    """One prompt is enough; of three, the last may disagree; blocks are counted from 1."""
    same(run(site, [[1, [0], [200.0]]])[0], [1, 0], "site")
    same(run(site, [[12, [507, 247], [2e4, 1e3]]] * 3)[0], [12, 507], "site")
    error = run(site, [[12, [507], [2e4]]] * 2 + [[11, [507], [2e4]]])[1]
    assert error, "the third disagrees: no ValueError"
