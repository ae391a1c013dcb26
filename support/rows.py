"""A row of a table: a scheme at a width, and a rule of which tokens are kept; its bits per number.

What this file does not do: it measures nothing. A rule is kvsink.py's; the words of the options
--keep and --sinks become rules here, and nowhere else.
"""

import itertools
from typing import NamedTuple

import kvsink
from kvsink import AUTO, Rule

PAPER_KEEPS = ("none", "pfn", "kvsink")
KEEPS = (*PAPER_KEEPS, "pfn+kvsink")


def rule_of(keep, N):
    """Return the Rule, without a site, that --keep `keep` --sinks `N` ask for. Raises ValueError if
    there is none."""
    if keep not in KEEPS:
        raise ValueError(f"keep {keep!r} is none of {', '.join(KEEPS)}")
    if keep == "none" or N == 0:
        return Rule()
    if keep == "pfn":
        if N == AUTO:
            raise ValueError("--sinks auto is for --keep kvsink and pfn+kvsink")
        return Rule(first=N)
    return Rule(first=1 if keep == "pfn+kvsink" else 0, k=N)


def options_of(rule):
    """Return --keep and --sinks of a Rule: the inverse of `rule_of`."""
    if rule.predicts:
        return "pfn+kvsink" if rule.first else "kvsink", rule.k
    return "pfn" if rule.first else "none", rule.first


class Row(NamedTuple):
    """One perplexity of Figure 9 or Table 2."""

    scheme: str  # one of kvsink.SCHEMES, "kvquant", or "full"
    bits: int
    rule: Rule  # without a site
    rho: float = 0.0  # KVQuant's fraction of outliers in 16 bits

    @property
    def is_static(self):
        return self.scheme in kvsink.SCHEMES and kvsink.SCHEMES[self.scheme].static

    @property
    def scheme_name(self):
        return f"{self.scheme} {100 * self.rho:g} %" if self.rho else self.scheme

    def __str__(self):
        if self == FULL_PRECISION:
            return "full precision"
        return f"{self.scheme_name} {self.bits} bits, {self.rule} kept"


FULL_PRECISION = Row("full", 16, Rule())


def row_of(result):
    """Return the Row to which a result (a dict, as in the JSON file) belongs."""
    rule = rule_of(result["keep"], result["sinks"])
    return Row(result["scheme"], result["bits"], rule, result.get("outliers", 0.0))


def expand_rows(groups, keeps, sinks):
    """Return the rows for every (scheme, bits) or (scheme, bits, rho) of `groups`, every word of
    --keep and every number of --sinks, in the order of the table. "none" and N = 0 are the same
    row; PFN has no AUTO. Raises ValueError if no row is left."""
    rows = []
    for (scheme, bits, *rho), keep, N in itertools.product(groups, keeps, sinks):
        if (keep, N) != ("pfn", AUTO):
            rows.append(Row(scheme, bits, rule_of(keep, N), *rho))
    if not rows:
        rule_of("pfn", AUTO)  # raises, and says why
    return list(dict.fromkeys(rows))


# --------------------------------------------------------------------------------------------------
# Bits per number of the cache, for n tokens


def average_bits(row, config, n, storage, l_E, N):
    """Return Table 2's last column: codes, scales and zeros; kept tokens in 16 bits, and the
    positions of the kept tokens.

    storage   bits per token, and bits that are stored once, as `rtn_bits` returns them
    N         the number of tokens kept after block l_E, the mean over windows
    """
    per_token, once = storage
    d = config.d_kv
    L = config.num_hidden_layers
    kept = (l_E * row.rule.first + (L - l_E) * N) / L  # mean over the blocks
    return ((n - kept) * per_token + kept * (2 * d * 16 + 32) + once) / (2 * d * n)


def rtn_bits(row, config, group_size):
    """Return the bits that a token takes in an RTN cache, and the bits that are stored once. Scale
    and zero take 16 bits each."""
    d = config.d_kv
    if row == FULL_PRECISION:
        return 2 * d * 16, 0
    K, V, static = kvsink.SCHEMES[row.scheme]
    groups = 0
    for granularity in (K, V):
        groups += d if static and granularity == "channel" else d / group_size
    if static:
        return 2 * d * row.bits, 32 * groups
    return 2 * d * row.bits + 32 * groups, 0


def stored_bits(row, config, n, group_size):
    """Return the bits per number that the packed cache (paper/kvcache.py) of a 16-bit model takes:
    codes of all tokens, the kept ones too; room in every block for the most tokens that may be
    kept; one group of tokens in 16 bits if groups span tokens; static scales and zeros in 16
    bits."""
    if row == FULL_PRECISION:
        return 16.0
    d = config.d_kv
    per_token, once = rtn_bits(row, config, group_size)
    g = group_size if row.scheme == "channel-dynamic" else 1  # tokens that share a scale
    residual = g * d * 16 if g > 1 else 0
    kept = row.rule.max_kept * (2 * d * 16 + 64)
    return (-(-n // g) * g * per_token + once + residual + kept) / (2 * d * n)
