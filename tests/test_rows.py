"""The rows of a table: their names, and their bits per number."""

import pytest
import torch

from kvsink import AUTO, SCHEMES, Rule
from llama import LlamaConfig
from quant import Quantizer
from support import rows
from support.rows import FULL_PRECISION, Row
from tests.helpers import SMALL

GROUP = [("token-dynamic", 4, 0.0)]


def test_rules_of_all_options_in_words():
    expanded = rows.expand_rows(GROUP, rows.KEEPS, [0, 5, AUTO])
    names = "nothing PFN-5 KVSink-5 KVSink-auto PFN-1+KVSink-5 PFN-1+KVSink-auto"
    assert " ".join(str(row.rule) for row in expanded) == names
    assert [row.rule.max_kept for row in expanded] == [0, 5, 5, 20, 5, 20]
    for row in expanded:
        assert rows.rule_of(*rows.options_of(row.rule)) == row.rule
    with pytest.raises(ValueError, match="--sinks auto is for --keep kvsink"):
        rows.expand_rows(GROUP, ["pfn"], [AUTO])


def average_bits(row, l_E=0, N=0):
    """Return the average bits of a row for 64 tokens of a model that has two Key heads of 16
    channels in each of three blocks."""
    config = LlamaConfig.from_dict({**SMALL, "num_key_value_heads": 2})
    return rows.average_bits(row, config, 64, rows.rtn_bits(row, config, 8), l_E, N)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_average_bits_count_what_the_quantizers_have(scheme):
    K, V, static = SCHEMES[scheme]
    X = torch.randn(1, 2, 64, 16)  # the Keys, or the Values, of a block
    bits = 2 * X.numel() * 4
    for granularity in (K, V):
        quantizer = Quantizer(4, granularity, 8, static)
        if static:
            quantizer.calibrate(X)
        bits += 16 * sum(parameter.numel() for parameter in quantizer.parameters(X))
    assert average_bits(Row(scheme, 4, Rule())) == pytest.approx(bits / (2 * X.numel()))


def test_average_bits_count_kept_tokens_in_the_blocks_that_keep_them():
    assert average_bits(FULL_PRECISION) == 16

    def pfn(N):
        return average_bits(Row("token-dynamic", 4, Rule(first=N)), N=N)

    # In two blocks of three: as many bits as four tokens in every block.
    assert average_bits(Row("token-dynamic", 4, Rule(k=6)), l_E=1, N=6) == pfn(4)
    # 1, 7 and 7 tokens in the three blocks: as many bits as five in every block.
    assert average_bits(Row("token-dynamic", 4, Rule(first=1, k=7)), l_E=1, N=7) == pfn(5)
