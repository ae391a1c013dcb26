"""Problem 5 with noise, other places, and what is nearly an outlier."""

import numpy as np

from course.checks.compare import close, same
from course.checks.scenarios import outliers, site


def noise(seed, L=9, n=21, d=16):
    return np.random.RandomState(seed).randn(L, n, d).astype(np.float32)


def test_stable_outliers_in_noise(run):
    """Emergence in block 3, dissipation in the last two; two tokens; another channel is large in
    two blocks only."""
    for seed, c in ((1, 5), (2, 11)):
        H = noise(seed)
        H[2:7, 4, c], H[2:7, 13, c] = -900, 700
        H[4:6, 9, c - 1] = 5000
        (l_E, channels, magnitudes), _, hooks = run(outliers, H)
        same([l_E, channels, hooks], [3, [c], 0], "block, channels, hooks")
        close(np.array(magnitudes), [900], "magnitudes")


def test_stable_outliers_by_their_level(run):
    """The channel whose median over the blocks is largest says where: 800 from block 4 on, beside
    300 from block 2 on. The channels are those that stand out in block 4, by magnitude there."""
    H = noise(3)
    H[1:, 6, 2], H[3:, 6, 9] = 300, 800
    same(run(outliers, H)[0][:2], [4, [9, 2]], "block and channels")


def test_stable_outliers_at_the_edges(run):
    """From block 1 to the last; magnitudes just above a hundred; a quarter of the level is not yet
    emergence."""
    H = np.ones((5, 7, 8), np.float32)
    H[:, 0, 7] = 101
    same(run(outliers, H)[0][:2], [1, [7]], "block and channels")
    H[:, 0, 7], H[0, 0, 7], H[1:, 0, 7] = 0, 249, 1000
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
    """The third disagrees; one alone is enough; blocks are counted from 1 throughout."""
    same(run(site, [[1, [0], [200.0]]])[0], [1, 0], "site")
    same(run(site, [[12, [507, 247], [2e4, 1e3]]] * 3)[0], [12, 507], "site")
    assert run(site, [[12, [507], [2e4]]] * 2 + [[11, [507], [2e4]]])[1], (
        "the third disagrees: no ValueError"
    )
