"""Plausible errors of students. Each must lose the points of its function. The handout does not
have this file."""

# Assigned function -> its errors: the error in words, the text that stands once in the reference's
# function, and what the student writes instead.
WRONG = {
    # Problem 1
    "scale": [
        ("2^n instead of 2^n - 1", "(2**n - 1)", "2**n"),
        (
            "a constant group divides by 0",
            "torch.where(s > 0, s, torch.where(lo == 0, 1.0, lo.abs()))",
            "s",
        ),
        ("a constant group is rounded", "torch.where(lo == 0, 1.0, lo.abs())", "1.0"),
        ("a tiny constant is taken for 0", "lo == 0", "lo.abs() < 1e-6"),
        ("a negative constant has a negative scale", "lo.abs()", "lo"),
    ],
    "zero": [
        ("zero is clamped", "-torch.round(lo / s)", "torch.clamp(-torch.round(lo / s), 0, 255)"),
        ("halves are rounded up", "-torch.round(lo / s)", "torch.floor(-lo / s + 0.5)"),
        ("zero is not rounded", "torch.round(lo / s)", "lo / s"),
        ("the sign of zero is wrong", "-torch.round", "torch.round"),
    ],
    "quantize": [
        ("one code too many", "2**n - 1", "2**n"),
        ("zero is added before rounding", "torch.round(X / s) + z", "torch.round(X / s + z)"),
        ("halves are rounded up", "torch.round(X / s)", "torch.floor(X / s + 0.5)"),
        (
            "codes are not clamped",
            "torch.clamp(torch.round(X / s) + z, 0, 2**n - 1)",
            "(torch.round(X / s) + z)",
        ),
        ("codes are signed", "0, 2**n - 1", "-(2 ** (n - 1)), 2 ** (n - 1) - 1"),
        ("codes are floats", ".to(torch.uint8)", ""),
    ],
    "dequantize": [
        ("zero is added", "s.dtype) - z", "s.dtype) + z"),
        ("codes below zero wrap around", "codes.to(s.dtype) - z", "codes - z.to(torch.uint8)"),
        (
            "the parentheses of Eq. 11 are missing",
            "(codes.to(s.dtype) - z)",
            "codes.to(s.dtype) - z",
        ),
    ],
    # Problem 2
    "grouped": [
        (
            "tokens of a short group are dropped",
            "F.pad(X, (0, 0, 0, -n % g), value=fill)",
            "X[..., : n // g * g, :]",
        ),
        ("fill is forgotten", "value=fill", "value=0.0"),
        ("the missing tokens come first", "(0, 0, 0, -n % g)", "(0, 0, -n % g, 0)"),
        (
            "the range is over the wrong axis",
            '((-2,) if granularity == "channel" else (-2, -1))',
            "(-1,)",
        ),
        (
            "tokens and channels are swapped",
            'if granularity == "token":',
            'if granularity == "channel":',
        ),
        ("a group is wider than X", "min(group_size or n, n)", "group_size or n"),
        ("a size that does not divide is not refused", "if d % g:", "if False:"),
    ],
    "clipped_range": [
        (
            "axes are forgotten",
            "Xg.amin((*axes, *group_axes), keepdim=True)",
            "Xg.amin(group_axes, True)",
        ),
        (
            "a missing token counts as 0 for the minimum",
            "groups_with(torch.inf)",
            "groups_with(0.0)",
        ),
        (
            "a missing token counts as 0 for the maximum",
            "groups_with(-torch.inf)",
            "groups_with(0.0)",
        ),
        (
            "nothing is left out",
            "X if leave_out is None else X.masked_fill(leave_out, value)",
            "X",
        ),
        (
            "the mask is inverted",
            "masked_fill(leave_out, value)",
            "masked_fill(~leave_out, value)",
        ),
        ("ratio cuts twice as much", "(1 - ratio) / 2 * (hi - lo)", "(1 - ratio) * (hi - lo)"),
        (
            "inf - inf",
            "torch.where(lo <= hi, (1 - ratio) / 2 * (hi - lo), 0.0)",
            "(1 - ratio) / 2 * (hi - lo)",
        ),
        (
            "both ends are the same quantile",
            "nanquantile(Xg, 1 - quantile,",
            "nanquantile(Xg, quantile,",
        ),
    ],
    "Quantizer.calibrate": [
        ("heads share a range", "range(X.ndim - 3)", "range(X.ndim - 2)"),
        ("each sequence has a range", "(*range(X.ndim - 3), -3)", "(-3,)"),
        (
            "only the last tensor counts",
            "lo if self.lo is None else torch.minimum(self.lo, lo)",
            "lo",
        ),
        ("the range shrinks", "torch.maximum(self.hi, hi)", "torch.minimum(self.hi, hi)"),
        ("sinks are calibrated on", "            leave_out,\n", "            None,\n"),
        (
            "quantile and ratio are forgotten",
            "            self.quantile,\n            self.ratio,\n",
            "",
        ),
        ("ranges are in half precision", "X.float()", "X"),
        ("NaN is taken for a range", "check_finite(X)", "pass"),
    ],
    # Problem 3
    "rope_table": [
        (
            "RoPE pairs are interleaved",
            "torch.cat((angle, angle), dim=-1)",
            "angle.repeat_interleave(2, -1)",
        ),
        ("half of the exponent", "-pairs / config.head_dim", "-pairs / 2 / config.head_dim"),
        (
            "faster instead of slower",
            "frequency / config.rope_factor",
            "frequency * config.rope_factor",
        ),
        (
            "fast pairs are slowed down, not slow ones",
            "fast + (1 - fast) / config",
            "1 - fast + fast / config",
        ),
        ("radians are taken for turns", " / (2 * math.pi)", ""),
        ("positions start at 1", "torch.arange(n,", "torch.arange(1, n + 1,"),
    ],
    "apply_rope": [
        ("the direction of rotation is wrong", "(-second, first)", "(second, -first)"),
        (
            "RoPE pairs are interleaved",
            "X.float().chunk(2, dim=-1)",
            "X[..., ::2].float(), X[..., 1::2].float()",
        ),
        ("half precision comes back as fp32", ".to(X.dtype)", ""),
    ],
    "causal_mask": [
        ("the window is one too long", "(distance < (", "(distance <= ("),
        ("a token does not see itself", "distance >= 0", "distance > 0"),
        ("the mask is transposed", "i[:, None] - i[None, :]", "i[None, :] - i[:, None]"),
    ],
    "attention": [
        (
            "heads are repeated, not repeat-interleaved",
            "K.repeat_interleave(queries_per_head, dim=1)\n"
            "    V = V.repeat_interleave(queries_per_head, dim=1)",
            "K.repeat(1, queries_per_head, 1, 1)\n    V = V.repeat(1, queries_per_head, 1, 1)",
        ),
        ("tokens see the future", "is_causal=M is None", "is_causal=False"),
        ("sqrt(d_k) is forgotten", "attn_mask=M", "attn_mask=M, scale=1.0"),
        (
            "heads and tokens are mixed up",
            "AV.transpose(1, 2).flatten(2)",
            "AV.reshape(len(AV), n, -1)",
        ),
        ("the window is forgotten", "if sliding_window and n > sliding_window:", "if False:"),
    ],
    # Problem 4
    "prefill": [
        ("l_E is off by one: late", "if l == l_E:", "if l == l_E + 1:"),
        ("l_E is off by one: early", "if l == l_E:", "if l == l_E - 1:"),
        ("sinks are predicted again in each block", "if l == l_E:", "if l >= l_E:"),
        ("token 0 is always kept", "S_sink = empty_set(H) if", "S_sink = pfn(H, 1) if"),
        (
            "sinks are kept before l_E",
            "empty_set(H) if S_sink is None else S_sink",
            "predict_sinks(H, c, k)",
        ),
        ("all blocks have the same quantizers", "quantizers[l - 1]", "quantizers[0]"),
        (
            "the given mask is kept after l_E too",
            "S_sink = predict_sinks(H, c, k)",
            "S_sink = S_sink | predict_sinks(H, c, k)",
        ),
    ],
    "decoder_block": [
        (
            "K is quantized where it must be kept",
            "where(sink, K, quantize_K(K, sink))",
            "where(sink, quantize_K(K, sink), K)",
        ),
        ("V is not kept", "torch.where(sink, V, quantize_V(V, sink))", "quantize_V(V, sink)"),
        ("K is not kept", "torch.where(sink, K, quantize_K(K, sink))", "quantize_K(K, sink)"),
        (
            "K is quantized before RoPE",
            "    K = apply_rope(K, rope)\n    K_quant = torch.where(sink, K, quantize_K(K, sink))",
            "    K_quant = apply_rope(torch.where(sink, K, quantize_K(K, sink)), rope)",
        ),
        ("K is never rotated", "K = apply_rope(K, rope)", "pass"),
        ("the residual is forgotten", "block.W_o(AV) + H", "block.W_o(AV)"),
        ("the wrong norm", "block.LN_ffn(H)", "block.LN_mhsa(H)"),
        (
            "a mask of channels, not of tokens",
            "S_sink[:, None, :, None]",
            "S_sink[:, None, None, :]",
        ),
        ("the window is forgotten", ", block.sliding_window", ""),
        ("sinks widen the ranges", "quantize_K(K, sink)", "quantize_K(K, sink & False)"),
    ],
    "predict_sinks": [
        ("signed instead of absolute value", ".abs()", ""),
        (
            "all sequences share one S_sink",
            ".topk(k, sorted=False).indices",
            ".topk(k, sorted=False).indices[:1].expand(len(H), -1)",
        ),
        (
            "top-k over the batch",
            "return empty_set(H).scatter_(1, S_outliers, True)",
            "return empty_set(H).flatten().scatter("
            "0, H[:, :, c].abs().flatten().topk(k).indices, True).view(H.shape[:2])",
        ),
        ("all channels", "H[:, :, c].abs()", "H.abs().amax(-1)"),
        ("the smallest", "topk(k, sorted", "topk(k, largest=False, sorted"),
        ("one too many", "topk(k, sorted", "topk(min(k + 1, H.shape[1]), sorted"),
        ("k = n is refused", "k > H.shape[1]", "k >= H.shape[1]"),
        ("k > n is not refused by name", "if k > H.shape[1]:", "if False:"),
        ("auto keeps all", "return predict_sinks_without_k(H, c)", "k = H.shape[1]"),
    ],
    "pfn": [
        ("one token too many", "< N", "<= N"),
        ("the last N", "< N", ">= n - N"),
    ],
    "observers": [
        (
            "sinks are calibrated on",
            "quantizer.calibrate(X, leave_out)",
            "quantizer.calibrate(X)",
        ),
        (
            "only sinks are calibrated on",
            "quantizer.calibrate(X, leave_out)",
            "quantizer.calibrate(X, ~leave_out)",
        ),
        (
            "blocks are counted from 0",
            "enumerate(zip(*schemes), start=1)",
            "enumerate(zip(*schemes))",
        ),
        (
            "only the first scheme is calibrated",
            "for quantizer in quantizers:",
            "for quantizer in quantizers[:1]:",
        ),
        (
            "an observer changes its input",
            "return X",
            "return X.masked_fill(leave_out, 0)",
        ),
    ],
    # Problem 5
    "stable_outliers": [
        ("blocks are counted from 0", "Outliers(l + 1,", "Outliers(l,"),
        ("signed instead of absolute value", ".abs().float()", ".float()"),
        (
            "one block is enough",
            "torch.where(outlying, peak, 0.0).median(0).values",
            "torch.where(outlying, peak, 0.0).amax(0)",
        ),
        (
            "a median is the mean of the two middle numbers",
            "peak, 0.0).median(0).values",
            "peak, 0.0).quantile(0.5, dim=0)",
        ),
        ("a channel may be large in all tokens", " & (peak > SPARSE * ordinary)", ""),
        (
            "a weaker emergence comes first",
            "(outlying[:, c] & (peak[:, c] > level[c] / 4))",
            "outlying[:, c]",
        ),
        ("the smallest channel comes first", "descending=True", "descending=False"),
        ("hooks are left on the model", "hook.remove()", "pass"),
        ("a model without outliers is not refused", "if not level.max() > 0:", "if False:"),
        (
            "NaN's block is counted from 0",
            "check_hidden_state(H, len(peak) + 1, L)",
            "check_hidden_state(H, len(peak), L)",
        ),
    ],
    "find_site": [
        ("blocks are not compared", "len(set(sites)) > 1", "len({c for _, c in sites}) > 1"),
        ("channels are not compared", "len(set(sites)) > 1", "len({l_E for l_E, _ in sites}) > 1"),
        (
            "all channels must agree",
            "len(set(sites)) > 1",
            "len({outliers.channels for outliers in found}) > 1",
        ),
        (
            "blocks are counted from 0, as in Table 3",
            "Site(outliers.l_E,",
            "Site(outliers.l_E - 1,",
        ),
    ],
    # Problem 6
    "pack": [
        (
            "neighbours share a byte",
            "(8 // width, -1)).unbind(-2)",
            "(-1, 8 // width)).unbind(-1)",
        ),
        (
            "the highest bits come first",
            "codes_i << (width * i)",
            "codes_i << (8 - width * (i + 1))",
        ),
        ("each plane has the lowest bits", "codes = codes >> width", "pass"),
    ],
    "slices": [
        ("planes lie on top of each other", "shift + width", "shift"),
        (
            "a code has its neighbours in it",
            "((byte >> (width * part)) & (2**width - 1))",
            "(byte >> (width * part))",
        ),
        (
            "slices are counted, not channels",
            "slice(first, first + step)",
            "slice(first // step, first // step + 1)",
        ),
    ],
    "unpack": [
        ("planes lie on top of each other", "<< shift", "<< 0"),
        (
            "channels in reverse order",
            "m * i : m * (i + 1)",
            "d // size - m * (i + 1) : d // size - m * i",
        ),
    ],
    "PackedStore.scores": [
        ("the query is rotated in the wrong direction", "-rope[1]", "rope[1]"),
        (
            "all sequences have the first one's group",
            "group == slot // self.g",
            "group == slot[:1] // self.g",
        ),
        (
            "all queries have the first one's scores",
            "of_residual[:, :, i, None]",
            "of_residual[:, :, 0, None]",
        ),
        (
            "the newest group is read from codes that are not there",
            "if self.residual is not None:",
            "if False:",
        ),
        ("outliers are forgotten", "if self.outliers is not None:", "if False:"),
        (
            "the newest group is not rotated",
            "residual = apply_rope(residual, [table[slots][:, None] for table in rope])",
            "pass",
        ),
    ],
}
