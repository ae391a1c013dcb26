"""The table of the course: which functions belong to which problem, their points, and what the handout says of each.

This is the only place that knows. To change an assignment, change it here and in checks/ and hidden/, whose tests are
found by name: `test_rotate_...` checks `rotate`, and a function has its points when all tests of its name pass.
"""

from typing import NamedTuple


class Function(NamedTuple):
    file: str
    name: str  # "Quantizer.calibrate" for a method
    points: int
    says: str  # what its stub says: "Eq. 12"
    cut: bool = False  # whether its docstring would give the solution away, and is cut to its first paragraph

    @property
    def short(self):
        return self.name.rpartition(".")[2]


class Problem(NamedTuple):
    number: int
    title: str
    paper: str  # what to read
    hours: str
    functions: tuple[Function, ...]
    write: str
    hint: str = ""
    by_hand: int = 0  # points for a written answer, which no program gives

    @property
    def points(self):
        return sum(function.points for function in self.functions) + self.by_hand


QUANT, LLAMA, KVSINK, KVCACHE = "quant.py", "llama.py", "kvsink.py", "paper/kvcache.py"
FILES = (LLAMA, QUANT, KVSINK, KVCACHE)

PROBLEMS = (
    Problem(
        number=1,
        title="The equations of quantization",
        paper="Appendix C, Equations 10 to 13",
        hours="45 minutes",
        functions=(
            Function(QUANT, "scale", 4, "Eq. 12", cut=True),
            Function(QUANT, "zero", 2, "Eq. 13"),
            Function(QUANT, "quantize", 3, "Eq. 10"),
            Function(QUANT, "dequantize", 1, "Eq. 11"),
        ),
        write="The four equations, each in one to three lines. A constant group (`lo` equals `hi`) has to come back exactly, "
        "so choose its scale with care; it is positive. Only codes are clamped. Halves are rounded to even, as `torch.round` does.",
        hint="Put a constant x into Equations 13, 10 and 11. With which scale is x / scale a whole number, and scale times "
        "that number x again, bit for bit? What if x is 0?",
    ),
    Problem(
        number=2,
        title="Granularities and ranges",
        paper="Appendix C with Figure 10; Section 5.1 on static and dynamic quantization",
        hours="2 hours",
        functions=(
            Function(QUANT, "grouped", 5, "Figure 10"),
            Function(QUANT, "clipped_range", 6, "clipped_min and clipped_max of Eq. 12 and 13"),
            Function(QUANT, "Quantizer.calibrate", 5, "static ranges, Appendix C"),
        ),
        write="`grouped` brings the numbers that share a scale into an axis of their own; `clipped_range` looks for the ends of each "
        "group, without what is left out; `calibrate` widens a static range by one more tensor. Sequences and tokens share a static "
        "range, heads do not. `nanquantile` is there.",
        hint="What must not count is easiest to replace by a number that changes nothing: inf where you look for a minimum, "
        "-inf for a maximum, NaN for a quantile. The tokens that are missing in the last group are such numbers too.",
    ),
    Problem(
        number=3,
        title="RoPE and attention",
        paper="Section 2, Equations 1 to 3",
        hours="2 hours",
        functions=(
            Function(LLAMA, "rope_table", 5, "cos and sin of RoPE, Section 2"),
            Function(LLAMA, "rotate", 3, "RoPE, Section 2"),
            Function(LLAMA, "causal", 3, "M of Eq. 3"),
            Function(LLAMA, "attention", 5, "Eq. 3"),
        ),
        write="Pair i of a head turns by `rope_theta ** (-2 i / d_k)` a token, and is channels i and i + d_k/2. The type "
        "`linear` divides that frequency by `rope_factor`. The type `llama3` does so for slow pairs only: count the turns that a "
        "pair makes in `rope_original_context` tokens; from `rope_high_freq_factor` turns on its frequency stays, up to "
        "`rope_low_freq_factor` turns it is divided, and between them it is mixed linearly. In grouped-query attention "
        "h / h_kv neighbouring query heads share a Key head. A window w lets a token see itself and the w - 1 before it.",
        hint="Turn with complex numbers on paper first: (x + iy)(cos a + i sin a). For the heads, `repeat` and `repeat_interleave` "
        "differ: write down which Key head each of four query heads gets from two.",
    ),
)

BY_NAME = {function.name: function for problem in PROBLEMS for function in problem.functions}
