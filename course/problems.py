"""The table of the course: which functions belong to which problem, their points, and what the
handout says of each.

This is the only place that knows. To change an assignment, change it here and in checks/ and
hidden/, whose tests are found by name: `test_apply_rope_...` checks `apply_rope`, and a function
has its points when all tests of its name pass.
"""

from pathlib import Path
from typing import NamedTuple


class Function(NamedTuple):
    file: str
    name: str  # "Quantizer.calibrate" for a method
    points: int
    says: str  # what its stub says: "Eq. 12"
    # whether its docstring would give the solution away, and is cut to its first paragraph
    cut: bool = False

    @property
    def short(self):
        return self.name.rpartition(".")[2]


class Problem(NamedTuple):
    number: int
    title: str
    paper: str  # what to read
    hours: str
    write: str
    hint: str = ""
    functions: tuple[Function, ...] = ()
    by_hand: int = 0  # points for a written answer, which no program gives
    bonus: bool = False  # on top of the 100

    @property
    def points(self):
        return sum(function.points for function in self.functions) + self.by_hand


def text_of(name):
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()


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
        write="The four equations, each in one to three lines. A constant group (`lo` equals `hi`) has to come back "
        "exactly, so choose its scale with care; it is positive. Only codes are clamped. Halves are rounded to "
        "even, as `torch.round` does.",
        hint="Put a constant x into Equations 13, 10 and 11. With which scale is x / scale a whole number, and scale"
        " times that number x again, bit for bit? What if x is 0?",
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
        write="`grouped` brings the numbers that share a scale into an axis of their own, and refuses with ValueError"
        " an unknown granularity (see `check_granularity`) and a group size that does not divide the channels. "
        "`clipped_range` looks for the ends of each group, without what is left out; `nanquantile` is there. "
        "`calibrate` widens a static range by one more tensor, in fp32, after a look at it with `check_finite`."
        " Sequences and tokens share a static range, heads do not.",
        hint="What must not count is easiest to replace by a number that changes nothing: inf where you look for a "
        "minimum, -inf for a maximum, NaN for a quantile. The tokens that are missing in the last group are "
        "such numbers too.",
    ),
    Problem(
        number=3,
        title="RoPE and attention",
        paper="Section 2, Equations 1 to 3",
        hours="2 hours",
        functions=(
            Function(LLAMA, "rope_table", 5, "cos and sin of RoPE, Section 2"),
            Function(LLAMA, "apply_rope", 3, "RoPE, Section 2"),
            Function(LLAMA, "causal_mask", 3, "M of Eq. 3"),
            Function(LLAMA, "attention", 5, "Eq. 3"),
        ),
        write="Pair i of a head turns by `rope_theta ** (-2 i / d_k)` a token, and is channels i and i + d_k/2. The "
        "type `linear` divides that frequency by `rope_factor`. The type `llama3` does so for slow pairs only: "
        "count the turns that a pair makes in `rope_original_context` tokens; from `rope_high_freq_factor` "
        "turns on its frequency stays, up to `rope_low_freq_factor` turns it is divided, and between them it is"
        " mixed linearly. In grouped-query attention h / h_kv neighbouring query heads share a Key head. A "
        "window w lets a token see itself and the w - 1 before it.",
        hint="Turn with complex numbers on paper first: (x + iy)(cos a + i sin a). For the heads, `repeat` and "
        "`repeat_interleave` differ: write down which Key head each of four query heads gets from two.",
    ),
    Problem(
        number=4,
        title="Algorithm 1",
        paper="Section 4.3 and Appendix G, with Algorithm 1",
        hours="3 hours",
        functions=(
            Function(KVSINK, "decoder_block", 6, "Algorithm 1, lines 6-13"),
            Function(KVSINK, "predict_sinks", 4, "Algorithm 1, lines 15-16"),
            Function(KVSINK, "prefill", 6, "Algorithm 1"),
            Function(KVSINK, "pfn", 2, "Preserve-First-N"),
            Function(KVSINK, "observers", 4, "calibration without sinks, Appendix G"),
        ),
        write="Algorithm 1, line by line. Lay the print beside the code. S_sink is a mask: every sequence has its own"
        " sinks, and nothing is kept up to and including block l_E unless `prefill` is given a mask. Quantizers"
        " see all tokens, and the mask of those to leave out; what they make of a sink is thrown away. Sinks "
        "are left out of calibration as well: `observers` makes, in the place of a cache, functions that only "
        "look, so that calibration is `prefill` itself.",
        hint="A sink is one in every head: which axes does a mask (b, n) lack beside Keys (b, h_kv, n, d_k)? When "
        "does line 14 look at H^l, before line 13 or after it, and in which block does its result first matter?",
    ),
    Problem(
        number=5,
        title="The finder",
        paper="Section 3.1 and Appendix D, with Table 3",
        hours="1.5 hours",
        functions=(
            Function(KVSINK, "stable_outliers", 7, "Section 3.1, Appendix D"),
            Function(KVSINK, "find_site", 3, "Appendix D"),
        ),
        write="The paper lists where outliers emerge, not how to find it. Here is a way. In H^l a number is an "
        "outlier when its magnitude is above `OUTLIER` times the median magnitude of H^l and above `SPARSE` "
        "times the median of its channel over the tokens. A channel's peak in a block is its largest outlier "
        "there, or 0; its level is the median of its peaks over all blocks. The channel of the highest level "
        "emerges in the first block where it is an outlier above a quarter of its level; that is l_E, from 1. "
        "The channels are all that have a level and are outliers in that block, the largest peak first. "
        "`check_hidden_state` refuses NaN. Leave the model as it was. `find_site` asks each prompt, and refuses"
        " prompts that disagree on block or first channel.",
        hint="Forward hooks on the blocks see every H^l without a change to the model. Take them off again, also "
        "when the forward pass fails.",
    ),
    Problem(
        number=6,
        title="A cache that is really small",
        paper="Appendix F with Table 4; Equations 5 and 6",
        hours="2.5 hours",
        functions=(
            Function(KVCACHE, "pack", 4, "codes to bytes, Appendix F"),
            Function(KVCACHE, "slices", 3, "bytes to codes, a few channels at a time"),
            Function(KVCACHE, "unpack", 2, "bytes to codes"),
            Function(KVCACHE, "Packed.scores", 5, "Q K^T of Eq. 6, from packed codes"),
        ),
        write="The docstrings say how bits lie in bytes; `planes` says which widths a number of bits is made of. "
        "`scores` multiplies a query with Keys that exist as codes only: go through the slices of "
        "`dequantized`, and never make all of K. Three cases: Keys after RoPE; Keys before it; and a newest "
        "group of g tokens, still in full precision, whose scores take the place of those from its codes, in "
        "another slot for each sequence. Outliers, where there are any, add to the scores of all queries at "
        "once, in (b, h_kv, G, n).",
        hint="Write the eight codes of the first test on paper, and draw their bytes. For Keys before RoPE: (R q) . "
        "(R' k) needs a turned Key, but it equals (R'^-1 R q) . k, which turns the query back instead.",
    ),
    Problem(
        number=7,
        title="An experiment",
        paper="Section 4.3 and Section 5.2, Figure 9",
        hours="2 hours, half of it the machine's",
        by_hand=12,
        write=text_of("problem7.md"),
        hint="The lines `KVSink-5 against PFN-5` are paired over windows; `+-` is one standard error. With four "
        "times as many windows it halves. For prose compare KVSink-1 with PFN-1: in the end they keep the same "
        "token.",
    ),
    Problem(
        number=8,
        title="Open problems",
        paper="the reference of the one that you choose",
        hours="a day, or a thesis",
        by_hand=10,
        bonus=True,
        write=text_of("problem8.md"),
    ),
)

BY_NAME = {function.name: function for problem in PROBLEMS for function in problem.functions}
