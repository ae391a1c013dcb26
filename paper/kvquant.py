"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079): the method of Table 2, by itself or with
KVSink on top.

The idea in eight lines:
  1 not all Keys and Values matter alike: the squared gradient of the loss says how much (Fisher);
  2 so levels are not evenly spaced: weighted k-means spreads 2^b signposts over [-1, 1];
  3 Keys have channels that are large in every token, but only before RoPE: they are quantized
    before it, by channel;
  4 Values have no such channels: they are quantized by token, all heads together;
  5 a channel's range comes from calibration, a token's from the token; both are scaled to [-1, 1];
  6 a few numbers would widen the range for all others: a fraction rho is stored apart, in 16 bits;
  7 the first token is a sink and is kept (PFN-1); KVSink-5 keeps the five predicted ones instead;
  8 tokens that are kept are left out of the calibration.

Read top to bottom: the quantizer; the quantizers of a model, with their codebooks; the calibration
that these come from; weighted k-means; the file of a calibration.

What this file does not do: Algorithm 1 is kvsink.py's. It runs with these quantizers in the place
of quant.py's, and the ranges of Keys come from it with an observer in the place of a quantizer.
Table 2 itself is table2.py's.

Keys, before RoPE, and Values are (b, h_kv, n, d_k) as in kvsink.py; d = h_kv d_k is the length of a
token's vector.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import kvsink
from llama import rope_table
from quant import NotFinite
from support import cli, stream, text
from support.cache import (
    cache_directory,
    checksum_matches,
    format_bytes,
    lock,
    log,
    write_atomically,
    write_checksum,
)
from support.machine import free_memory
from support.rows import options_of

# --------------------------------------------------------------------------------------------------
# The quantizer


@dataclass
class NonUniformQuantizer:
    """KVQuant's quantizer of the Keys (static ranges by channel) or the Values (dynamic ranges by
    token) of one block.

    A number is coded as the nearest signpost of the codebook, found among the midpoints between
    signposts. It comes back as its level: the signpost, or what Q-Norm made of it. Outliers come
    back as they were, in 16 bits.
    """

    midpoints: torch.Tensor  # (2^b - 1,), ascending
    levels: torch.Tensor  # (2^b,)
    sparse: bool  # whether outliers are stored apart
    tail_size: int = 0  # Values: how many outliers a token has at each end
    lo: torch.Tensor | None = None  # Keys: the range of each channel, (h_kv, 1, d_k)
    hi: torch.Tensor | None = None

    def __call__(self, X, leave_out=None):
        """Quantize X and dequantize it again. No token affects the range of another, so none has to
        be left out."""
        Xf = X.float()
        codes, middle, half_width, outliers = self.encode(Xf)
        X_ = self.decode(codes, middle, half_width)
        X_ = torch.where(outliers, Xf.half().float(), X_)
        return (X_ + (Xf - Xf)).to(X.dtype)  # X - X is 0, or NaN if X is not finite

    # What a packed cache asks of a quantizer (paper/kvcache.py).

    def encode(self, X, leave_out=None):
        """Return, for X in fp32, what a cache stores: codes, the middle and the half width of the
        ranges, and a mask of the outliers."""
        if self.static:
            lo = self.lo
            hi = self.hi
        else:
            lo, hi = token_range(X, self.tail_size)
        x, middle, half_width = normalize(X, lo, hi)
        # Flattened, because bucketize wants its input contiguous.
        codes = torch.bucketize(x.flatten(), self.midpoints).view(X.shape)
        outliers = ((X < lo) | (X > hi)) & self.sparse
        return codes, middle, half_width, outliers

    def decode(self, codes, middle, half_width):
        """Return the levels of codes, scaled back to ranges that broadcast against them."""
        return self.levels[codes] * half_width.float() + middle.float()

    @property
    def bits(self):
        return (len(self.levels) - 1).bit_length()

    @property
    def static(self):
        return self.lo is not None

    tokens_per_group = 1  # each token has its own range, or the ranges are static


def normalize(X, lo, hi):
    """Return X scaled so that its range becomes [-1, 1], and the middle and the half width of the
    range, in the 16 bits in which they are stored."""
    middle = ((hi + lo) / 2).half()
    half_width = ((hi - lo) / 2).half()
    x = (X - middle.float()) / torch.where(half_width > 0, half_width.float(), 1.0)
    return x, middle, half_width


def token_range(V, tail_size):
    """Return the smallest and the largest number of each token that is no outlier, (b, 1, n, 1)
    each, if all heads together have `tail_size` outliers at each end."""
    vectors = V.transpose(1, 2).flatten(2)  # (b, n, d)
    if tail_size:
        hi = vectors.topk(tail_size + 1).values[..., -1]
        lo = vectors.topk(tail_size + 1, largest=False).values[..., -1]
    else:
        lo, hi = vectors.aminmax(dim=-1)
    return lo[:, None, :, None], hi[:, None, :, None]


def outliers_per_end(rho, d):
    """Return how many of a token's d Values are outliers at each end: half of the fraction rho, to
    the nearest whole number."""
    return round(rho * d / 2)


# --------------------------------------------------------------------------------------------------
# The quantizers of a model, made of a Calibration


def kvquant_quantizers(calibration, rho, bits, q_norm=False):
    """Return the quantizers of one recipe at 2, 3 or 4 bits, as kvsink.prefill takes them with
    decoder_block_pre_rope."""
    device = calibration.lo.device
    L, h_kv, _, d_k = calibration.lo.shape
    signposts, levels = codebooks(calibration, bits, q_norm)
    midpoints = midpoints_of(signposts)
    sparse = rho > 0
    tail_size = outliers_per_end(rho, h_kv * d_k)
    quantizers = []
    for l in range(L):
        midpoints_K, midpoints_V = midpoints[l].to(device)
        levels_K, levels_V = levels[l].to(device)
        lo = calibration.lo[l]
        hi = calibration.hi[l]
        quantize_K = NonUniformQuantizer(midpoints_K, levels_K, sparse, lo=lo, hi=hi)
        quantize_V = NonUniformQuantizer(midpoints_V, levels_V, sparse, tail_size)
        quantizers.append((quantize_K, quantize_V))
    return quantizers


def codebooks(calibration, bits, q_norm=False):
    """Return the codebooks of all blocks, 2^bits signposts each, and their levels: (L, 2, 2^b)
    both, for Keys and for Values.

    Q-Norm stretches and shifts the signposts into levels, so that the numbers that come back have
    the mean and the deviation of those that went in. Without it the levels are the signposts.
    """
    count, weight, first = calibration.fisher.double().flatten(0, 1).unbind(1)  # each (2 L, BINS)
    bin_centers = ((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * 2 - 1).to(count.device)
    x = torch.where(weight > 0, first / weight, bin_centers)  # one number stands for each bin
    signposts = weighted_kmeans(x, weight, 2**bits)
    levels = signposts
    if q_norm:
        x_ = signposts.gather(1, torch.searchsorted(midpoints_of(signposts), x))
        mean, deviation = moments(x, count)
        mean_, deviation_ = moments(x_, count)
        stretch = torch.where(deviation_ > 0, deviation / deviation_, 1.0)
        levels = (signposts - mean_) * stretch + mean
    return [table.float().unflatten(0, (-1, 2)) for table in (signposts, levels)]


def midpoints_of(signposts):
    return (signposts[..., 1:] + signposts[..., :-1]) / 2


def moments(x, count):
    """Return the mean and the standard deviation, (B, 1) each, of numbers x (B, N) that occur
    `count` times."""
    total = count.sum(1, keepdim=True).clamp(min=1)
    mean = (count * x).sum(1, keepdim=True) / total
    return mean, ((count * (x - mean) ** 2).sum(1, keepdim=True) / total).sqrt()


def kvquant_bits(row, config):
    """Return the bits that a token takes, and the bits that are stored once, as rows.average_bits
    takes them. A token has codes, the range of its Values, its outliers in 16 bits with their
    channels, and their number. The ranges of Keys and two codebooks are stored once."""
    d = config.d_kv
    outliers = 32 * (row.rho * d + 2 * outliers_per_end(row.rho, d)) + 2 * 16 if row.rho else 0
    return 2 * d * row.bits + 2 * 16 + outliers, 2 * 16 * d + 2 * 16 * 2**row.bits


# --------------------------------------------------------------------------------------------------
# The calibration: one forward pass for each rule finds the ranges of Keys, one backward pass the
# Fisher information


class Recipe(NamedTuple):
    """A rule and a fraction of outliers: rows that share them share a calibration."""

    rule: kvsink.Rule  # without a site
    rho: float

    @property
    def name(self):
        """The recipe's name in the file of a calibration."""
        keep, N = options_of(self.rule)
        return f"{keep}-{N}-{self.rho}"


class Calibration(NamedTuple):
    """The ranges of Keys for one recipe, and the Fisher information F of all numbers, in bins by
    their place in their range."""

    lo: torch.Tensor  # (L, h_kv, 1, d_k)
    hi: torch.Tensor
    # (L, 2, 3, BINS), for Keys and Values. Per bin: the count, the sum of F, the sum of F times x.
    fisher: torch.Tensor


# Bins of [-1, 1]. They are far finer than 16 signposts, and 134 million Keys of a block become
# 4,096 numbers.
BINS = 4096


def calibrate(model, windows, recipes, site):
    """Return recipe -> Calibration from windows (W, n) of token ids. One forward pass through the
    blocks for each rule, and one backward pass, serve all recipes. Raises ValueError if the hidden
    states do not fit in host memory, NotFinite if a gradient is NaN or inf."""
    check_host_memory(model, windows)
    recipes = list(dict.fromkeys(recipes))
    rules = list(dict.fromkeys(recipe.rule for recipe in recipes))
    L = len(model.blocks)
    W, n = windows.shape
    hidden_states = torch.empty(L + 1, W, n, model.config.hidden_size, dtype=model.dtype)
    for w, tokens in enumerate(windows):
        hidden_states[0, w] = model.embedding(tokens.to(model.device))
    ranges = {}  # recipe -> lo and hi
    S_sinks = {}  # rule -> S_sink up to block l_E, and after it
    progress = {"unit": "block", "leave": False, "disable": None}
    with tqdm(desc="ranges of Keys", total=L * W * len(rules), **progress) as bar:
        for rule in rules:
            rhos = [recipe.rho for recipe in recipes if recipe.rule == rule]
            by_rho, S_sinks[rule] = key_ranges(
                model, rule.with_site(site), rhos, hidden_states, bar
            )
            ranges |= {Recipe(rule, rho): lo_hi for rho, lo_hi in by_rho.items()}
    fisher = {recipe: torch.zeros(L, 2, 3, BINS, dtype=torch.float64) for recipe in recipes}
    gradients = fisher_information(model, windows, hidden_states)
    for l, w, K, V, F_K, F_V in tqdm(gradients, desc="Fisher information", total=L * W, **progress):
        for recipe in recipes:
            S_sink = S_sinks[recipe.rule][int(l > recipe.rule.with_site(site).site.l_E)]
            leave_out = S_sink[w, None, None, :, None].to(model.device)  # (1, 1, n, 1)
            range_K = ranges[recipe][:, l - 1]
            tail_size = outliers_per_end(recipe.rho, model.config.d_kv)
            range_V = token_range(V.float(), tail_size)
            fisher[recipe][l - 1, 0] += histogram(K, F_K, *range_K, leave_out).cpu()
            fisher[recipe][l - 1, 1] += histogram(V, F_V, *range_V, leave_out).cpu()
    return {recipe: Calibration(*ranges[recipe], fisher[recipe].float()) for recipe in recipes}


def key_ranges(model, rule, rhos, hidden_states, bar):
    """Return the ranges of the Keys before RoPE, rho -> lo and hi (2, L, h_kv, 1, d_k); and the
    tokens that `rule` keeps up to block l_E and after it, S_sink (2, W, n).

    A range goes from the quantile rho/2 to the quantile 1 - rho/2 of a channel, over all tokens
    that are not kept. Algorithm 1 runs over the batch of all windows, on the host, with an observer
    of Keys, so that the Keys of one block are in memory, not of all. `hidden_states`
    (L + 1, W, n, d) holds H^0 of the windows; this function adds H^1 to H^L, for the backward pass.
    """
    keys = []  # of one block, one tensor per window
    ranges = {rho: [] for rho in rhos}

    def observe(K, leave_out):  # K (1, h_kv, n, d_k), of one window
        keys.append(K[0][:, ~leave_out[0, 0, :, 0]])  # (h_kv, tokens that are not kept, d_k)
        return K

    step_on_host = stream.one_at_a_time(kvsink.decoder_block_pre_rope, model.device)

    def step(*arguments):
        H = step_on_host(*arguments)
        ascending = torch.cat(keys, dim=1).float().sort(dim=1).values
        keys.clear()
        for rho, blocks in ranges.items():
            ends = [quantile(ascending, level) for level in (rho / 2, 1 - rho / 2)]
            blocks.append(torch.stack(ends)[:, :, None])  # (2, h_kv, 1, d_k)
        hidden_states[len(blocks)] = H
        bar.update(len(H))
        return H

    H = hidden_states[0].clone()
    arguments = rule.prefill_arguments(H)
    observers = [(observe, kvsink.unquantized)] * len(model.blocks)
    _, S_sink = kvsink.prefill(model, H, observers, step=step, **arguments)
    S_sinks = torch.stack((arguments["S_sink"], S_sink))
    return {rho: torch.stack(blocks, dim=1) for rho, blocks in ranges.items()}, S_sinks


def quantile(ascending, level):
    """Return a quantile along axis 1, by linear interpolation between two neighbours."""
    last = ascending.shape[1] - 1
    position = level * last
    below = math.floor(position)
    above = min(below + 1, last)
    return torch.lerp(ascending[:, below], ascending[:, above], position - below)


def fisher_information(model, windows, hidden_states):
    """Yield l, w, K, V, F_K, F_V for every block l, from the last to the first, and in it every
    window w. K before RoPE and V are (1, h_kv, n, d_k). F_K and F_V are the Fisher information of
    their numbers (its diagonal): the squared gradient of the loss on the window.

    The backward pass goes by hand, block after block, from `hidden_states` (L + 1, W, n, d), the
    H^0 to H^L of all windows (W, n): the graph of one block and one window is in memory, not of
    all. The gradient of the loss with respect to H^l replaces H^l. Raises NotFinite if a gradient
    is NaN or inf.
    """
    device = model.device
    rope = rope_table(model.config, windows.shape[1], device)
    for w, tokens in enumerate(windows.to(device)):
        with torch.enable_grad():
            H = hidden_states[-1, w].to(device)[None].requires_grad_()
            loss = F.cross_entropy(model.logits(H[0, :-1]).float(), tokens[1:], reduction="sum")
            hidden_states[-1, w] = torch.autograd.grad(loss, H)[0][0]
    for l, block in zip(range(len(model.blocks), 0, -1), reversed(model.blocks)):
        for w in range(len(windows)):
            H = hidden_states[l - 1, w].to(device)[None]
            g_H = hidden_states[l, w].to(device)[None]
            K, V, g_H, g_K, g_V = block_gradients(block, H, g_H, rope)
            if not (g_K.isfinite().all() and g_V.isfinite().all()):
                raise NotFinite(
                    f"NaN or inf in the gradient of block {l}, counted from 1: is --dtype wide "
                    "enough?"
                )
            hidden_states[l - 1, w] = g_H[0]
            yield l, w, K, V, g_K.float().square(), g_V.float().square()


def block_gradients(block, H, g_H, rope):
    """Return K before RoPE and V of a block, and the gradients with respect to its input H, to K
    and to V, from the gradient g_H with respect to its output."""
    recorded = []  # K, then V

    def record(X, leave_out):
        recorded.append(X)
        return X

    nothing = kvsink.pfn(H, 0)
    with torch.enable_grad():
        H = H.requires_grad_()
        output = kvsink.decoder_block_pre_rope(block, H, nothing, record, record, rope)
        K, V = recorded
        gradients = torch.autograd.grad(output, (H, K, V), g_H)
    return K.detach(), V.detach(), *gradients


def histogram(X, weight, lo, hi, leave_out):
    """Return, for one tensor, the third field of Calibration: (3, BINS). Outliers and the tokens
    that `leave_out` masks do not count."""
    X = X.float()
    x, *_ = normalize(X, lo, hi)
    counted = (lo <= X) & (X <= hi) & ~leave_out
    dtype = torch.float32 if X.device.type == "mps" else torch.float64  # MPS has no float64
    x = x[counted].to(dtype)
    weight = weight[counted].to(dtype)
    bins = ((x + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    summands = (torch.ones_like(x), weight, weight * x)
    return torch.stack([torch.bincount(bins, w, minlength=BINS) for w in summands])


def check_host_memory(model, windows):
    """Raise ValueError if host memory has no room for the hidden states."""
    needed = host_bytes(model, windows)
    free = free_memory("cpu")
    if needed > free:
        raise ValueError(
            f"KVQuant's calibration takes {format_bytes(needed)} of host memory for hidden states, "
            f"and {format_bytes(free)} are free: lower --calib-windows or --seq-len"
        )


def host_bytes(model, windows):
    """Return the bytes of host memory that `calibrate` takes: H^0 to H^L of all windows, and the
    batch that goes through the blocks."""
    return (len(model.blocks) + 2) * stream.hidden_bytes(model, windows)


# --------------------------------------------------------------------------------------------------
# Weighted k-means


def weighted_kmeans(x, w, k, *, restarts=8, trials=4, iterations=300, seed=0):
    """Return k centers (B, k), ascending and float64, that make the sum of w (x - nearest center)^2
    small, for x and w (B, N).

    The B problems and their restarts run at once. Each starts with greedy k-means++ and goes on
    with Lloyd's algorithm; the best restart is returned.
    """
    x, order = x.double().sort(-1)
    w = w.double().gather(-1, order)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(k, restarts, trials, generator=generator, dtype=torch.float64)
    centers = kmeans_plus_plus(x, w, draws.to(x.device))
    centers, inertia = lloyd(x, w, centers, iterations)
    return centers[torch.arange(len(x), device=x.device), inertia.argmin(-1)]


def kmeans_plus_plus(x, w, draws):
    """Return initial centers (B, restarts, k), ascending. The candidates for the next center are
    some x, drawn with probability proportional to w times the squared distance to the nearest
    center so far; the one that lowers the inertia most is taken. `draws` (k, restarts, trials) are
    uniform random numbers."""
    B, N = x.shape
    restarts = draws.shape[1]
    centers = []
    # The squared distance of each x to the nearest center. Without a center it is 1.
    distance = torch.ones(B, restarts, N, dtype=torch.float64, device=x.device)
    for draw in draws:
        cumulative = (w[:, None] * distance).cumsum(-1)  # (B, restarts, N)
        index = torch.searchsorted(cumulative, draw * cumulative[..., -1:]).clamp(max=N - 1)
        candidates = x[:, None].expand_as(cumulative).gather(-1, index)  # (B, restarts, trials)
        distances = (x[:, None, None] - candidates[..., None]).square()  # (B, restarts, trials, N)
        if centers:
            distances = torch.minimum(distance[:, :, None], distances)
        inertia = (w[:, None, None] * distances).sum(-1)  # (B, restarts, trials)
        best = inertia.argmin(-1, keepdim=True)
        centers.append(candidates.gather(-1, best)[..., 0])
        distance = distances.gather(2, best[..., None].expand(-1, -1, -1, N))[:, :, 0]
    return torch.stack(centers, -1).sort(-1).values


def lloyd(x, w, centers, iterations):
    """Return the centers (B, restarts, k) after Lloyd's algorithm, and their inertia (B, restarts).

    In one dimension a cluster is a run of the sorted x, so its sums are differences of running
    sums, and an iteration costs k searches, not N distances."""
    N = x.shape[1]
    restarts = centers.shape[1]
    # running[..., i] sums over all x before the i-th.
    running = F.pad(torch.stack((w, w * x, w * x * x)).cumsum(-1), (1, 0))  # (3, B, N + 1)
    running = running[:, :, None].expand(-1, -1, restarts, -1)
    for i in range(iterations):
        midpoints = midpoints_of(centers)
        edges = torch.searchsorted(x, midpoints.flatten(1)).view_as(midpoints)
        edges = F.pad(F.pad(edges, (1, 0)), (0, 1), value=N)  # a cluster lies between two of them
        sums = running.gather(-1, edges.expand(3, -1, -1, -1)).diff(dim=-1)
        weight, first, second = sums  # each (B, restarts, k)
        previous = centers
        centers = torch.where(weight > 0, first / weight, centers)
        if i % 10 == 9 and torch.equal(previous, centers):  # not each time: it waits for the device
            break
    inertia = (second - torch.where(weight > 0, first**2 / weight, 0.0)).sum(-1)
    return centers, inertia


# --------------------------------------------------------------------------------------------------
# The file of a calibration: safetensors, with the settings in the metadata


@dataclass(frozen=True)
class CalibrationConfig:
    """The recipes of a run, and the settings that their calibrations depend on."""

    recipes: list[Recipe]
    site: kvsink.Site
    weights: str  # hub.fingerprint of the checkpoint
    data: str  # the name of a text; the file calls it "text"
    windows: int
    tokens: int  # per window
    seed: int
    dtype: str

    def settings(self):
        """Return the settings as the file has them. The site is None if no rule predicts sinks."""
        predicts = any(recipe.rule.predicts for recipe in self.recipes)
        return {
            "weights": self.weights,
            "text": self.data,
            "windows": self.windows,
            "tokens": self.tokens,
            "seed": self.seed,
            "dtype": self.dtype,
            "site": list(self.site) if predicts else None,
            "bins": BINS,
        }


def cache_file(config):
    """Return the file of our cache for these calibrations."""
    names = sorted({recipe.name for recipe in config.recipes})
    key = hashlib.sha256(repr((config.settings(), names)).encode()).hexdigest()[:16]
    return cache_directory() / "kvquant" / f"{key}.safetensors"


def load_or_calibrate(model, tokenizer, config, path=None):
    """Return recipe -> Calibration for a CalibrationConfig: loaded from a file if an earlier run
    saved them with the same settings, else calibrated and saved there.

    The file is `path`, or one of our cache. A damaged file of our cache is recreated. A `path` that
    is damaged, or has other settings, raises ValueError. If several runs or ranks need the same
    file, one of them calibrates and the others wait.
    """
    file = path or cache_file(config)
    settings = config.settings()
    with lock(file):
        usable = path.is_file() if path else checksum_matches(file)
        if usable:
            return load_calibrations(file, settings, config.recipes, model.device)
        cli.check_folder("the calibration's folder", file.parent)
        windows = text.calibration_windows(
            tokenizer, config.data, config.tokens, config.windows, config.seed
        )
        text.check_vocabulary(windows, model.config, config.data)
        W, n = windows.shape
        log(
            f"calibrating KVQuant on {W} windows of {n} tokens: "
            f"{format_bytes(host_bytes(model, windows))} of hidden states in host memory"
        )
        calibrations = calibrate(model, windows, config.recipes, config.site)
        save_calibrations(file, settings, calibrations)
        if not path:
            write_checksum(file)
    return calibrations


def save_calibrations(path, settings, calibrations):
    """Write all calibrations of a run, and the codebooks of 2, 3 and 4 bits for other programs to
    read. `settings`, a dict, is what they depend on."""
    tensors = {}
    for recipe, calibration in calibrations.items():
        for field, tensor in calibration._asdict().items():
            tensors[f"{recipe.name}.{field}"] = tensor.cpu().contiguous()
        for bits in (2, 3, 4):
            signposts, _ = codebooks(calibration, bits)
            tensors[f"{recipe.name}.signposts.{bits}"] = signposts.cpu()
    metadata = {"settings": json.dumps(settings | {"sha256": sha256_of_tensors(tensors)})}
    write_atomically(path.resolve(), save(tensors, metadata=metadata))


def load_calibrations(path, settings, recipes, device):
    """Return recipe -> Calibration. Raises ValueError, which says what is wrong, if the file is not
    as it was written, has another setting, or lacks a recipe."""
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("settings", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        check_calibration_file(saved, tensors, settings)
        calibrations = {}
        for recipe in recipes:
            if f"{recipe.name}.fisher" not in tensors:
                raise ValueError(f"it has no {recipe.name}")
            lo, hi, fisher = (tensors[f"{recipe.name}.{field}"] for field in Calibration._fields)
            calibrations[recipe] = Calibration(lo.to(device), hi.to(device), fisher)
        return calibrations
    except (SafetensorError, ValueError, AttributeError) as error:  # the last: not an object
        raise ValueError(
            f"{path}: {error}; name another file, or delete it to calibrate again"
        ) from None


def check_calibration_file(saved, tensors, settings):
    """Raise ValueError if the `saved` settings of a file are not `settings`, of which those that
    are None do not matter, or if its tensors are not those that were written."""
    for key, value in settings.items():
        if value is not None and saved.get(key) != value:
            raise ValueError(f"it was made with {key} {saved.get(key)}, not {value}")
    if saved.get("sha256") != sha256_of_tensors(tensors):
        raise ValueError("its numbers are not those that were written, by their SHA-256")


def sha256_of_tensors(tensors):
    """Return the SHA-256 of named tensors. It is stored in the file, so a copy of the file has it
    too."""
    sha256 = hashlib.sha256()
    for name, X in sorted(tensors.items()):
        sha256.update(repr((name, X.dtype, tuple(X.shape))).encode() + X.numpy().tobytes())
    return sha256.hexdigest()
