"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079): the method of Table 2, by itself or with KVSink on top.

The idea in eight lines:
  1 Keys and Values do not matter alike: by how much the loss feels each of them says its squared gradient (Fisher);
  2 so levels are not evenly spaced: 2^b signposts in [-1, 1] lie where numbers that matter are (weighted k-means);
  3 Keys have channels that are large in every token, until RoPE turns them: they are quantized before it, by channel;
  4 Values have none: they are quantized by token, all heads together;
  5 a channel's range comes from calibration, a token's from the token itself; either is brought to [-1, 1];
  6 few numbers would widen a range for all the others: a fraction rho at both tails is stored apart, in 16 bits;
  7 the first token is a sink and is kept as it is (PFN-1); KVSink-5 keeps the five predicted ones instead;
  8 whatever is calibrated is calibrated without the tokens that are kept.

Read top to bottom: the codebook; the quantizer; the calibration; its file; Table 2 as printed.

What this file does not do: Algorithm 1 is kvsink.py's, these quantizers take the places of quant.py's in its cache.

Keys, before RoPE, and Values are (b, h_kv, n, d_k) as in kvsink.py; d = h_kv d_k is the length of a token's vector.
"""

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

import hub
import kvsink
from llama import rope_table
from quant import NotFinite, check_finite

# ---------------------------------------------------------------------------------------------------------------------
# The codebook


def weighted_kmeans(x, w, k, restarts=8, trials=4, iterations=300, seed=0):
    """k centers that make the sum of w (x - nearest center)^2 small, ascending: x, w (B, N) -> (B, k), float64.

    Lloyd's algorithm. In one dimension a cluster is a run of the sorted x, so its sums are differences of running sums,
    and an iteration costs k searches, not N distances. The B problems and their restarts run at once, each begun by
    greedy k-means++ with a seed: of some x, drawn by w times the squared distance to the centers so far, the one that
    helps most is the next center. The best restart is returned.
    """
    x, order = x.double().sort(-1)
    w = w.double().gather(-1, order)
    sums = F.pad(torch.stack((w, w * x, w * x * x)).cumsum(-1), (1, 0))  # (3, B, N + 1): of all x before the i-th
    (B, N), draw = x.shape, torch.Generator().manual_seed(seed)
    far, centers = torch.ones(B, restarts, 1, N, dtype=torch.float64, device=x.device), []
    for chance in torch.rand(k, restarts, trials, generator=draw, dtype=torch.float64).to(x.device):
        chances = (w[:, None] * far[:, :, 0]).cumsum(-1)  # (B, restarts, N)
        at = torch.searchsorted(chances, chance * chances[..., -1:]).clamp(max=N - 1)
        drawn = x[:, None].expand_as(chances).gather(-1, at)[..., None]  # (B, restarts, trials, 1)
        distance = (x[:, None, None] - drawn).square()
        distance = torch.minimum(far, distance) if centers else distance
        best = (w[:, None, None] * distance).sum(-1, keepdim=True).argmin(2, keepdim=True)
        centers.append(drawn.gather(2, best).flatten(1))
        far = distance.gather(2, best.expand(-1, -1, -1, N))
    centers = torch.stack(centers, -1).sort(-1).values  # (B, restarts, k)
    for _ in range(iterations):
        middle = (centers[..., 1:] + centers[..., :-1]) / 2
        edges = torch.searchsorted(x, middle.flatten(1)).view(B, restarts, k - 1)
        edges = F.pad(F.pad(edges, (1, 0)), (0, 1), value=N).flatten(1)  # a cluster lies between two of them
        weight, first, second = sums.gather(-1, edges.expand(3, -1, -1)).view(3, B, restarts, k + 1).diff(dim=-1)
        old, centers = centers, torch.where(weight > 0, first / weight, centers)
        if torch.equal(old, centers):
            break
    inertia = (second - torch.where(weight > 0, first**2 / weight, 0.0)).sum(-1)  # (B, restarts)
    return centers[torch.arange(B, device=x.device), inertia.argmin(-1)]


# ---------------------------------------------------------------------------------------------------------------------
# The quantizer


def token_range(V, tail):
    """The smallest and the largest number of each token that are no outliers, when `tail` numbers at each end are: from
    all heads together, (b, h_kv, n, d_k) -> twice (b, 1, n, 1)."""
    vectors = V.transpose(1, 2).flatten(2)  # (b, n, d)
    if tail:
        hi = vectors.topk(tail + 1).values[..., -1]
        lo = vectors.topk(tail + 1, largest=False).values[..., -1]
    else:
        lo, hi = vectors.aminmax(dim=-1)
    return lo[:, None, :, None], hi[:, None, :, None]


def tail_of(rho, d):
    """How many of a token's d Values are outliers at each end: half of the fraction rho, to the nearest whole."""
    return round(rho * d / 2)


def normalized(X, lo, hi):
    """X with its range brought to [-1, 1]; and middle and half width of the range, in the 16 bits that are stored."""
    middle, half = ((hi + lo) / 2).half(), ((hi - lo) / 2).half()
    return (X - middle.float()) / torch.where(half > 0, half.float(), 1.0), middle, half


@dataclass
class NonUniformQuantizer:
    """KVQuant's quantizer of Keys (static ranges by channel) or Values (dynamic ranges by token), of one block.

    A number goes to the nearest signpost of the codebook, found among the midpoints between them, and comes back as its
    level: the signpost, or what Q-Norm made of it. Outliers come back as they were, in 16 bits.
    """

    midpoints: torch.Tensor  # (2^b - 1,), ascending
    levels: torch.Tensor  # (2^b,)
    sparse: bool  # whether outliers are stored apart
    tail: int = 0  # Values: how many outliers at each end of a token
    lo: torch.Tensor | None = None  # Keys: the range of each channel, (h_kv, 1, d_k)
    hi: torch.Tensor | None = None

    @property
    def bits(self):
        return (len(self.levels) - 1).bit_length()

    def encode(self, X, leave_out=None):
        """X in fp32 -> codes, the middle and half width of the ranges, and a mask of the outliers."""
        lo, hi = token_range(X, self.tail) if self.lo is None else (self.lo, self.hi)
        x, middle, half = normalized(X, lo, hi)
        codes = torch.bucketize(x.flatten(), self.midpoints).view(X.shape)  # flat: it wants its input in one piece
        return codes, middle, half, ((X < lo) | (X > hi)) & self.sparse

    def decode(self, codes, middle, half):
        return self.levels[codes] * half.float() + middle.float()

    def __call__(self, X, leave_out=None):
        """Quantize X and dequantize it again. No token disturbs another here, so none has to be left out."""
        if not torch.compiler.is_compiling():
            check_finite(X)
        Xf = X.float()
        codes, middle, half, outlier = self.encode(Xf)
        X_ = torch.where(outlier, Xf.half().float(), self.decode(codes, middle, half))
        if torch.compiler.is_compiling():
            X_ = X_ + (Xf - Xf)  # NaN where X is not finite, as in quant.py
        return X_.to(X.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The calibration: one pass forwards for the ranges of Keys, one backwards for the Fisher information


class Recipe(NamedTuple):
    """What one calibration serves: a rule of preservation with its N, and the fraction of outliers."""

    keep: str
    N: int
    rho: float


class Calibration(NamedTuple):
    """Of one recipe: the Keys' ranges, and the Fisher information of all numbers by where they lie in their range."""

    lo: torch.Tensor  # (L, h_kv, 1, d_k)
    hi: torch.Tensor
    fisher: torch.Tensor  # (L, 2, 3, BINS): of Keys and Values, how many numbers, their sum of F, and of F times number


BINS = 4096  # of [-1, 1]: far finer than 16 signposts, and it makes 134 million Keys of a block into 4,096


def key_ranges(model, windows, recipes, site, states, bar):
    """recipe -> lo, hi (2, L, h_kv, 1, d_k): the quantiles rho/2 and 1 - rho/2 of each channel of the Keys before RoPE,
    over all tokens that the recipe's rule does not keep; and rule -> the kept tokens, a mask (1, n) a window.

    Block by block, all windows through one before the next: the Keys of one block are in memory, not of all. What a
    backward pass needs is left in `states` (L + 1, windows, n, d): H^0 to H^L of every window.
    """
    for i, tokens in enumerate(windows):
        H = model.embedding(tokens)
        states[0, i] = H[0]
    rope, nothing = rope_table(model.config, H.shape[1], H.device), kvsink.pfn(H, 0)
    S_sinks = {(keep, N): [kvsink.pfn(H, N if keep == "pfn" else 0)] * len(windows) for keep, N, _ in recipes}
    ranges = {recipe: [] for recipe in recipes}
    for l, block in enumerate(model.blocks, start=1):
        keys = []  # of each window, (h_kv, n, d_k)
        for i in range(len(windows)):
            H = states[l - 1, i].to(H.device)[None]
            H = kvsink.decoder_block(block, H, nothing, recorder(keys), kvsink.unquantized, rope, pre_rope=True)
            states[l, i] = H[0]
            bar.update()
        for rule, S in S_sinks.items():
            ascending = torch.cat([K[0][:, ~s[0]] for K, s in zip(keys, S)], dim=1).float().sort(dim=1).values
            for recipe in recipes:
                if (recipe.keep, recipe.N) == rule:
                    ends = [quantile(ascending, level) for level in (recipe.rho / 2, 1 - recipe.rho / 2)]
                    ranges[recipe].append(torch.stack(ends)[:, :, None])
        if l == site.l_E:
            for keep, N in S_sinks:
                if keep == "kvsink":
                    S_sinks[keep, N] = [kvsink.predict_sinks(h.to(H.device)[None], site.c, N) for h in states[l]]
    return {recipe: torch.stack(ends, dim=1) for recipe, ends in ranges.items()}, S_sinks


def quantile(ascending, level):
    """Along axis 1, between two neighbours by linear interpolation."""
    at = level * (ascending.shape[1] - 1)
    above = min(math.floor(at) + 1, ascending.shape[1] - 1)
    return torch.lerp(ascending[:, math.floor(at)], ascending[:, above], at - math.floor(at))


def recorder(seen):
    """In the place of a quantizer: keeps what it sees, and quantizes nothing."""

    def see(X, _):
        seen.append(X)
        return X

    return see


def fisher_information(model, windows, states):
    """Yields l, i, K, V, F_K, F_V of every block, from the last to the first, and in it of every window i (1, n): K
    before RoPE and V (1, h_kv, n, d_k), and the diagonal of the Fisher information of each of their numbers, which is
    the squared gradient of the loss on the window.

    Backwards by hand, block after block from `states` (L + 1, windows, n, d), the H^0 to H^L of all windows: the graph
    of one block and one window is in memory, not of all. Where H^l was, the loss's gradient with respect to it is left.
    Raises NotFinite where a gradient is not.
    """
    device = windows[0].device
    rope, nothing = rope_table(model.config, windows[0].shape[1], device), kvsink.pfn(states[0, :1].to(device), 0)
    for i, tokens in enumerate(windows):
        with torch.enable_grad():
            H = states[-1, i].to(device)[None].requires_grad_()
            loss = F.cross_entropy(model.logits(H[0, :-1]).float(), tokens[0, 1:], reduction="sum")
            states[-1, i] = torch.autograd.grad(loss, H)[0][0]
    for l, block in zip(range(len(model.blocks), 0, -1), reversed(model.blocks)):
        for i in range(len(windows)):
            K, V = [], []
            with torch.enable_grad():
                H = states[l - 1, i].to(device)[None].requires_grad_()
                H_l = kvsink.decoder_block(block, H, nothing, recorder(K), recorder(V), rope, pre_rope=True)
                g_H, g_K, g_V = torch.autograd.grad(H_l, (H, K[0], V[0]), states[l, i].to(device)[None])
            if not (g_K.isfinite().all() and g_V.isfinite().all()):
                raise NotFinite(f"NaN or inf in the gradient of block {l}, counted from 1: is --dtype wide enough?")
            states[l - 1, i] = g_H[0]
            yield l, i, K[0].detach(), V[0].detach(), g_K.float().square(), g_V.float().square()


def histogram(X, weight, lo, hi, leave_out):
    """The third field of Calibration for one tensor: (3, BINS). Outliers and what is left out do not count."""
    X = X.float()
    x, _, half = normalized(X, lo, hi)
    counted = (lo <= X) & (X <= hi) & ~leave_out
    wide = torch.float32 if X.device.type == "mps" else torch.float64  # MPS has no float64
    x, weight = x[counted].to(wide), weight[counted].to(wide)
    at = ((x + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    return torch.stack([torch.bincount(at, w, minlength=BINS) for w in (torch.ones_like(x), weight, weight * x)])


def calibrate(model, windows, recipes, site, quiet=None, room=torch.empty):
    """recipe -> Calibration, from windows (1, n) of token ids, for all recipes at once: once forwards through the
    blocks, once backwards. `room` is torch.empty or takes its place: the hidden states of all blocks and windows are
    many, (L + 1, windows, n, d), and lie on the CPU."""
    L, d = len(model.blocks), model.config.num_key_value_heads * model.config.head_dim
    shape = (L + 1, len(windows), windows[0].shape[1], model.config.hidden_size)
    states = room(shape, dtype=model.embedding.weight.dtype)
    progress = {"total": L * len(windows), "unit": "block", "leave": False, "disable": quiet}
    with tqdm(desc="ranges of Keys", **progress) as bar:
        ranges, S_sinks = key_ranges(model, windows, recipes, site, states, bar)
    fisher = {recipe: torch.zeros(L, 2, 3, BINS, dtype=torch.float64) for recipe in recipes}
    gradients = fisher_information(model, windows, states)
    for l, i, K, V, F_K, F_V in tqdm(gradients, desc="Fisher information", **progress):
        for recipe in recipes:
            S = S_sinks[recipe.keep, recipe.N][i][:, None, :, None]
            S = S & (recipe.keep != "kvsink" or l > site.l_E)  # nothing is predicted up to block l_E
            fisher[recipe][l - 1, 0] += histogram(K, F_K, *ranges[recipe][:, l - 1], S).cpu()
            in_token = token_range(V.float(), tail_of(recipe.rho, d))
            fisher[recipe][l - 1, 1] += histogram(V, F_V, *in_token, S).cpu()
    return {recipe: Calibration(*ranges[recipe], fisher[recipe].float()) for recipe in recipes}


def codebooks(calibration, bits, q_norm=False):
    """The codebooks of all blocks at 2^bits signposts, and their levels: (L, 2, 2^b) each, of Keys and of Values.

    With Q-Norm the levels are the signposts stretched and shifted, so that what comes back has mean and deviation of
    what went in.
    """
    count, weight, first = calibration.fisher.double().flatten(0, 1).unbind(1)  # each (2 L, BINS)
    grid = ((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * 2 - 1).to(count.device)
    x = torch.where(weight > 0, first / weight, grid)
    signposts = weighted_kmeans(x, weight, 2**bits)
    levels = signposts
    if q_norm:
        nearest = torch.searchsorted(((signposts[:, 1:] + signposts[:, :-1]) / 2), x)
        x_ = signposts.gather(1, nearest)
        (mean, deviation), (mean_, deviation_) = moments(x, count), moments(x_, count)
        levels = (signposts - mean_) * torch.where(deviation_ > 0, deviation / deviation_, 1.0) + mean
    return [table.float().unflatten(0, (-1, 2)) for table in (signposts, levels)]


def moments(x, count):
    """Mean and standard deviation of numbers x that occur `count` times, (B, N) -> (B, 1) each."""
    total = count.sum(1, keepdim=True).clamp(min=1)
    mean = (count * x).sum(1, keepdim=True) / total
    return mean, ((count * (x - mean) ** 2).sum(1, keepdim=True) / total).sqrt()


def kvquant_cache(calibration, rho, bits, q_norm=False):
    """The cache of one recipe at a width of 2, 3 or 4 bits, as kvsink.prefill takes it (with pre_rope=True)."""
    signposts, levels = codebooks(calibration, bits, q_norm)
    midpoints = (signposts[..., 1:] + signposts[..., :-1]) / 2
    (L, h_kv, _, d_k), sparse, cache = calibration.lo.shape, rho > 0, []
    for l in range(L):
        (m_K, m_V), (l_K, l_V) = (table[l].to(calibration.lo.device) for table in (midpoints, levels))
        quantize_K = NonUniformQuantizer(m_K, l_K, sparse, lo=calibration.lo[l], hi=calibration.hi[l])
        quantize_V = NonUniformQuantizer(m_V, l_V, sparse, tail=tail_of(rho, h_kv * d_k))
        cache.append((quantize_K, quantize_V))
    return cache


# ---------------------------------------------------------------------------------------------------------------------
# Its file: safetensors, the settings in the metadata


def save_calibrations(path, settings, calibrations):
    """All of a run's calibrations, with the codebooks of 2, 3 and 4 bits for others to read. `settings` is what they
    depend on, a dict."""
    tensors = {}
    for recipe, calibration in calibrations.items():
        name = recipe_name(recipe)
        tensors |= {f"{name}.{field}": tensor.cpu().contiguous() for field, tensor in calibration._asdict().items()}
        tensors |= {f"{name}.signposts.{bits}": codebooks(calibration, bits)[0].cpu() for bits in (2, 3, 4)}
    hub.write_atomically(path.resolve(), save(tensors, metadata={"settings": json.dumps(settings)}))


def load_calibrations(path, settings, recipes, device):
    """recipe -> Calibration. Raises ValueError, saying which, where a setting is another or a recipe is missing."""
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {}).get("settings", "{}"))
            names = {recipe: recipe_name(recipe) for recipe in recipes}
            if missing := [name for name in names.values() if f"{name}.fisher" not in file.keys()]:
                raise ValueError(f"it has no {missing[0]}")
            for key, value in settings.items():
                if value is not None and saved.get(key) != value:  # None: these recipes do not depend on it
                    raise ValueError(f"it was made with {key} {saved.get(key)}, not {value}")
            found = {}
            for recipe, name in names.items():
                lo, hi, fisher = (file.get_tensor(f"{name}.{field}") for field in Calibration._fields)
                found[recipe] = Calibration(lo.to(device), hi.to(device), fisher)
            return found
    except (SafetensorError, ValueError, AttributeError) as error:  # the last: settings that are no object
        raise ValueError(f"{path}: {error}; name another file, or delete it to calibrate again") from None


def recipe_name(recipe):
    return f"{recipe.keep}-{recipe.N}-{recipe.rho}"


# ---------------------------------------------------------------------------------------------------------------------
# Table 2 as printed: model -> text -> PPL of 16 bits, then KVQuant and + KVSink-5 at 2 bits for each rho

RHOS = (0.0, 0.001, 0.005, 0.01)
PAPER_TABLE_2 = {
    "llama2-7b": {
        "wikitext2": (5.12, (7.46, 6.52), (5.73, 5.60), (5.62, 5.54), (5.53, 5.44)),
        "c4": (6.63, (9.46, 7.93), (7.11, 7.10), (7.11, 6.95), (6.94, 6.81)),
    },
    "llama2-13b": {
        "wikitext2": (4.57, (16.26, 5.10), (5.00, 4.85), (4.86, 4.76), (4.80, 4.71)),
        "c4": (6.05, (26.29, 6.47), (6.39, 6.28), (6.24, 6.22), (6.23, 6.19)),
    },
    "llama3-8b": {
        "wikitext2": (5.75, (7.31, 6.77), (6.84, 6.56), (6.51, 6.34), (6.37, 6.22)),
        "c4": (7.37, (8.53, 7.74), (8.06, 7.87), (7.87, 7.81), (7.82, 7.78)),
    },
    "llama3.1-8b-instruct": {
        "wikitext2": (6.75, (9.75, 8.83), (8.80, 8.25), (7.91, 7.69), (7.58, 7.47)),
        "c4": (8.03, (10.43, 9.57), (9.25, 8.80), (8.71, 8.65), (8.53, 8.50)),
    },
}


def paper_ppl(model, text, recipe):
    """Table 2's PPL for a recipe at 2 bits (None: full precision), None where it has none."""
    full, *rows = PAPER_TABLE_2.get(model, {}).get(text, (None,))
    if recipe is None:
        return full
    column = {("pfn", 1): 0, ("kvsink", 5): 1}.get((recipe.keep, recipe.N))
    return rows[RHOS.index(recipe.rho)][column] if rows and recipe.rho in RHOS and column is not None else None
