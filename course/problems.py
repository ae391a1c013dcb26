"""The table of the course: which functions belong to which problem, their points, and what the
handout says about each.

To change an assignment, change this table and the tests in checks/ and hidden/, which are found by
their names: `test_apply_rope_...` tests `apply_rope`. A function has its points if all of its tests
pass.
"""

from pathlib import Path
from typing import NamedTuple


class Function(NamedTuple):
    file: str
    name: str  # a method has its class in it: "Quantizer.calibrate"
    points: int
    topic: str  # the stub says "Problem 1: Eq. 12"
    cut_docstring: bool = False  # cut it to its first paragraph: the rest gives the solution away

    @property
    def short_name(self):
        return self.name.rpartition(".")[2]


class Problem(NamedTuple):
    number: int
    title: str
    paper: str  # what to read
    hours: str
    task: str
    hint: str = ""
    functions: tuple[Function, ...] = ()
    written_points: int = 0  # for a written answer, which the lecturer grades
    bonus: bool = False  # on top of the 100 points

    @property
    def points(self):
        return sum(function.points for function in self.functions) + self.written_points


def text_of(name):
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()


LLAMA = "llama.py"
QUANT = "quant.py"
KVSINK = "kvsink.py"
KVCACHE = "paper/kvcache.py"
FILES = (LLAMA, QUANT, KVSINK, KVCACHE)

# File -> functions that are not assigned but cut as well, because they would give a solution away,
# each with what its stub says.
WITHHELD = {
    KVSINK: {"decoder_block_pre_rope": "--rope pre is not in the handout, to give nothing away"},
}

PROBLEMS = (
    Problem(
        number=1,
        title="The equations of quantization",
        paper="Appendix C, Equations 10 to 13",
        hours="45 minutes",
        functions=(
            Function(QUANT, "scale", 4, "Eq. 12", cut_docstring=True),
            Function(QUANT, "zero", 2, "Eq. 13"),
            Function(QUANT, "quantize", 3, "Eq. 10"),
            Function(QUANT, "dequantize", 1, "Eq. 11"),
        ),
        task=(
            "Write the four equations, each in one to three lines. A constant group (`lo` equals "
            "`hi`) must come back exactly, so choose its scale with care; a scale is positive. "
            "Only codes are clamped. Round halves to even, as `torch.round` does."
        ),
        hint=(
            "Put a constant x into Equations 13, 10 and 11. With which scale is x / scale a whole "
            "number, and scale times that number x again, bit for bit? What if x is 0?"
        ),
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
        task=(
            "`figure10.png` shows which numbers share a scale. `grouped` brings them into an axis "
            "of their own. It raises ValueError for an unknown granularity (call "
            "`check_granularity`) and for a group size that does not divide the channels. "
            "`clipped_range` returns the ends of each group's range, without the numbers that are "
            "left out; use `nanquantile` for quantiles. `calibrate` checks a tensor with "
            "`check_finite` and then widens the static range by it, in fp32. All sequences and "
            "tokens share a static range; each head has its own."
        ),
        hint=(
            "Replace a number that must not count by one that changes nothing: inf for a minimum, "
            "-inf for a maximum, NaN for a quantile. The tokens that are missing in the last "
            "group must not count, either."
        ),
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
        task=(
            "Pair i of a head is channels i and i + d_k/2, and it turns by the frequency "
            "`rope_theta ** (-2 i / d_k)` from one token to the next. The type `linear` divides "
            "every frequency by `rope_factor`. The type `llama3` divides those of slow pairs "
            "only: count the turns that a pair makes in `rope_original_context` tokens. With "
            "`rope_high_freq_factor` turns or more, the frequency stays as it is; with "
            "`rope_low_freq_factor` turns or fewer, it is divided; between the two numbers, the "
            "two frequencies are mixed linearly. In grouped-query attention, h / h_kv "
            "neighbouring query heads share a Key head. With a window w, a token sees itself and "
            "the w - 1 tokens before it. Then look at a real model for the first time: `python -m "
            "checks.first_look` prints which tokens draw the most attention, block by block, and "
            "takes a few seconds after a download of 94 MB. What do these tokens mean?"
        ),
        hint=(
            "Rotate with complex numbers on paper first: (x + iy)(cos a + i sin a). For the "
            "heads, `repeat` and `repeat_interleave` differ: write down which of two Key heads "
            "each of four query heads gets."
        ),
    ),
    Problem(
        number=4,
        title="Algorithm 1",
        paper="Section 4.3 and Appendix G, with Algorithm 1",
        hours="3 hours",
        functions=(
            Function(KVSINK, "prefill", 6, "Algorithm 1"),
            Function(KVSINK, "decoder_block", 6, "Algorithm 1, lines 6-13"),
            Function(KVSINK, "predict_sinks", 4, "Algorithm 1, lines 15-16"),
            Function(KVSINK, "pfn", 2, "Preserve-First-N"),
            Function(KVSINK, "observers", 4, "calibration without sinks, Appendix G"),
        ),
        task=(
            "Write Algorithm 1 line by line, with the paper open beside your code. S_sink is a "
            "mask, and every sequence has sinks of its own. Nothing is kept up to and including "
            "block l_E, unless `prefill` is given a mask. A quantizer gets all tokens and the "
            "mask of those to leave out; throw away what it returns for a sink. k may be `AUTO`: "
            "then `predict_sinks` returns what `predict_sinks_without_k` does, which is given at "
            "the end of the file. Sinks are left out of calibration, too: `observers` returns, in "
            "place of quantizers, functions that record ranges and change nothing, so that "
            "calibration is `prefill` itself. When Problems 1 to 4 are solved, see your Algorithm "
            "1 lower a real perplexity: `python eval_ppl.py --limit 1 --calib-windows 1 --scheme "
            "channel-static --bits 4 --keep none kvsink --sinks 5 --no-compile` takes less than a "
            "minute on two cores."
        ),
        hint=(
            "A sink is a sink in every head: which axes of Keys (b, h_kv, n, d_k) does a mask (b, "
            "n) lack? Does line 14 look at H^l before line 13 or after it, and which is the first "
            "block in which its result matters?"
        ),
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
        task=(
            "The paper lists where outliers emerge, but not how to find the place. Here is one "
            "way. A median is `torch.median` here: the lower of the two middle numbers of an even "
            "count. A number in H^l is an outlier if its magnitude is above `OUTLIER` times the "
            "median magnitude of H^l and above `SPARSE` times the median magnitude of its channel "
            "over the tokens. The peak of a channel in a block is its largest outlier there, or "
            "0. The level of a channel is the median of its peaks over all blocks. l_E, counted "
            "from 1, is the first block in which the channel with the highest level has an "
            "outlier above a quarter of its level. Return all channels that have a level above 0 "
            "and an outlier in block l_E, the largest peak first. `check_hidden_state` refuses "
            "NaN. Leave the model as it was. `find_site` does this for each prompt, and raises "
            "ValueError if the prompts disagree about the block or the first channel."
        ),
        hint=(
            "Forward hooks on the blocks see every H^l without a change to the model. Remove them "
            "at the end, even if the forward pass fails."
        ),
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
            Function(KVCACHE, "PackedStore.scores", 5, "Q K^T of Eq. 6, from packed codes"),
        ),
        task=(
            "The docstrings say how bits lie in bytes; `planes` says into which widths a number "
            "of bits is split. `scores` multiplies a query with Keys that exist as codes only: go "
            "through the slices of `dequantized`, and never make all of K. Keys are stored after "
            "RoPE or before it. In either case there may be a newest group of g tokens, still in "
            "full precision and stored as the codes are, after RoPE or before it. Its slots "
            "differ from sequence to sequence, and its scores replace those of its codes. If "
            "there are outliers, they add to the scores of all queries at once, in the shape (b, "
            "h_kv, G, n)."
        ),
        hint=(
            "Write the eight codes of the first test on paper, and draw their bytes. For Keys "
            "before RoPE: (R q) . (R' k) needs a rotated Key, but it equals (R'^-1 R q) . k, "
            "which rotates the query back instead."
        ),
    ),
    Problem(
        number=7,
        title="An experiment",
        paper="Section 4.3 and Section 5.2, Figure 9",
        hours="2 hours",
        written_points=12,
        task=text_of("problem7.md"),
    ),
    Problem(
        number=8,
        title="Open problems",
        paper="the reference of the problem that you choose",
        hours="a day, or a thesis",
        written_points=10,
        bonus=True,
        task=text_of("problem8.md"),
    ),
)

BY_NAME = {function.name: function for problem in PROBLEMS for function in problem.functions}
