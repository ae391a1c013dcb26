"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079): the method of Table 2, by itself or with
KVSink on top.

The idea in eight lines:
  1 Keys and Values do not matter alike: the squared gradient of the loss says how much each one does (Fisher);
  2 so levels are not evenly spaced: 2^b signposts in [-1, 1] lie where numbers that matter are (weighted k-means);
  3 Keys have channels that are large in every token, until RoPE turns them: they are quantized before it, by channel;
  4 Values have none: they are quantized by token, all heads together;
  5 a channel's range comes from calibration, a token's from the token itself; either is brought to [-1, 1];
  6 few numbers would widen a range for all the others: a fraction rho at both tails is stored apart, in 16 bits;
  7 the first token is a sink and is kept as it is (PFN-1); KVSink-5 keeps the five predicted ones instead;
  8 whatever is calibrated is calibrated without the tokens that are kept.

Read top to bottom: the codebook; the quantizer; the calibration; codebooks and caches made of it;
its file.

What this file does not do: Algorithm 1 is kvsink.py's. These quantizers take the places of
quant.py's in its cache, and the ranges of Keys come from it with an observer in the place of a
quantizer. Table 2 itself is table2.py's.

Keys, before RoPE, and Values are (b, h_kv, n, d_k) as in kvsink.py; d = h_kv d_k is the length of a
token's vector.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
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
    lock,
    log,
    write_atomically,
    write_checksum,
)

# --------------------------------------------------------------------------------------------------
# The codebook


def weighted_kmeans(x, w, k, restarts=8, trials=4, iterations=300, seed=0):
    """k centers that make the sum of w (x - nearest center)^2 small, ascending: x, w (B, N) -> (B,
    k), float64.

    Lloyd's algorithm. In one dimension a cluster is a run of the sorted x, so its sums are
    differences of running sums, and an iteration costs k searches, not N distances. The B problems
    and their restarts run at once, each begun by greedy k-means++ with a seed: of some x, drawn by
    w times the squared distance to the centers so far, the one that helps most is the next center.
    The best restart is returned.
    """
    x, order = x.double().sort(-1)
    w = w.double().gather(-1, order)
    sums = F.pad(
        torch.stack((w, w * x, w * x * x)).cumsum(-1), (1, 0)
    )  # (3, B, N + 1): of all x before the i-th
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
    for i in range(iterations):
        middle = (centers[..., 1:] + centers[..., :-1]) / 2
        edges = torch.searchsorted(x, middle.flatten(1)).view(B, restarts, k - 1)
        edges = F.pad(F.pad(edges, (1, 0)), (0, 1), value=N).flatten(
            1
        )  # a cluster lies between two of them
        weight, first, second = (
            sums.gather(-1, edges.expand(3, -1, -1)).view(3, B, restarts, k + 1).diff(dim=-1)
        )
        old, centers = centers, torch.where(weight > 0, first / weight, centers)
        if i % 10 == 9 and torch.equal(old, centers):  # to look waits for the device
            break
    inertia = (second - torch.where(weight > 0, first**2 / weight, 0.0)).sum(-1)  # (B, restarts)
    return centers[torch.arange(B, device=x.device), inertia.argmin(-1)]


# --------------------------------------------------------------------------------------------------
# The quantizer


def token_range(V, tail):
    """The smallest and the largest number of each token that are no outliers, when `tail` numbers
    at each end are: from all heads together, (b, h_kv, n, d_k) -> twice (b, 1, n, 1)."""
    vectors = V.transpose(1, 2).flatten(2)  # (b, n, d)
    if tail:
        hi = vectors.topk(tail + 1).values[..., -1]
        lo = vectors.topk(tail + 1, largest=False).values[..., -1]
    else:
        lo, hi = vectors.aminmax(dim=-1)
    return lo[:, None, :, None], hi[:, None, :, None]


def tail_of(rho, d):
    """How many of a token's d Values are outliers at each end: half of the fraction rho, to the
    nearest whole."""
    return round(rho * d / 2)


def normalized(X, lo, hi):
    """X with its range brought to [-1, 1]; and middle and half width of the range, in the 16 bits
    that are stored."""
    middle, half = ((hi + lo) / 2).half(), ((hi - lo) / 2).half()
    return (X - middle.float()) / torch.where(half > 0, half.float(), 1.0), middle, half


@dataclass
class NonUniformQuantizer:
    """KVQuant's quantizer of Keys (static ranges by channel) or Values (dynamic ranges by token),
    of one block.

    A number goes to the nearest signpost of the codebook, found among the midpoints between them,
    and comes back as its level: the signpost, or what Q-Norm made of it. Outliers come back as they
    were, in 16 bits.
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
        """X in fp32 -> codes, the middle and half width of the ranges, and a mask of the
        outliers."""
        lo, hi = token_range(X, self.tail) if self.lo is None else (self.lo, self.hi)
        x, middle, half = normalized(X, lo, hi)
        codes = torch.bucketize(x.flatten(), self.midpoints).view(
            X.shape
        )  # flat: it wants its input in one piece
        return codes, middle, half, ((X < lo) | (X > hi)) & self.sparse

    def decode(self, codes, middle, half):
        return self.levels[codes] * half.float() + middle.float()

    def __call__(self, X, leave_out=None):
        """Quantize X and dequantize it again. No token disturbs another here, so none has to be
        left out."""
        Xf = X.float()
        codes, middle, half, outlier = self.encode(Xf)
        X_ = torch.where(outlier, Xf.half().float(), self.decode(codes, middle, half))
        return (X_ + (Xf - Xf)).to(X.dtype)  # NaN where X is not finite, as in quant.py


# --------------------------------------------------------------------------------------------------
# The calibration: forwards for the ranges of Keys, once for each rule, and once backwards for the
# Fisher information


class Recipe(NamedTuple):
    """What one calibration serves: a rule of preservation with its N, and the fraction of
    outliers."""

    keep: str
    N: int | str  # or AUTO
    rho: float


class Calibration(NamedTuple):
    """Of one recipe: the Keys' ranges, and the Fisher information of all numbers by where they lie
    in their range."""

    lo: torch.Tensor  # (L, h_kv, 1, d_k)
    hi: torch.Tensor
    # (L, 2, 3, BINS): of Keys and Values, how many numbers, their sum of F, and of F times number
    fisher: torch.Tensor


# of [-1, 1]: far finer than 16 signposts, and it makes 134 million Keys of a block into 4,096
BINS = 4096


def key_ranges(model, rule, rhos, site, states, bar):
    """rho -> lo, hi (2, L, h_kv, 1, d_k): the quantiles rho/2 and 1 - rho/2 of each channel of the
    Keys before RoPE, over all tokens that the rule (keep, N) does not keep; and S_sink (2, W, n),
    the tokens that it keeps up to block l_E and after it.

    Algorithm 1 over the batch of all windows on the host, with an observer of Keys: the Keys of one
    block are in memory, not of all. `states` (L + 1, W, n, d) holds H^0 of the windows; H^1 to H^L
    are left there for the way back.
    """
    keys, ranges = [], {rho: [] for rho in rhos}

    def observe(K, leave_out):  # of one window
        keys.append(K[0][:, ~leave_out[0, 0, :, 0]])  # (h_kv, tokens that are not kept, d_k)
        return K

    through = stream.one_at_a_time(kvsink.decoder_block, model.embedding.weight.device)

    def step(*arguments):
        H = through(*arguments)
        ascending = torch.cat(keys, dim=1).float().sort(dim=1).values
        keys.clear()
        for rho, ends in ranges.items():
            ends.append(
                torch.stack([quantile(ascending, level) for level in (rho / 2, 1 - rho / 2)])[
                    :, :, None
                ]
            )
        states[len(ends)] = H  # as many blocks are done
        bar.update(len(H))
        return H

    H, observers = states[0].clone(), [(observe, kvsink.unquantized)] * len(model.blocks)
    kept = kvsink.preservation(*rule, site, H)
    _, S_sink = kvsink.prefill(model, H, observers, pre_rope=True, step=step, **kept)
    S_sink = torch.stack((kept.get("S_sink", kvsink.pfn(H, 0)), S_sink))
    return {rho: torch.stack(ends, dim=1) for rho, ends in ranges.items()}, S_sink


def quantile(ascending, level):
    """Along axis 1, between two neighbours by linear interpolation."""
    at = level * (ascending.shape[1] - 1)
    above = min(math.floor(at) + 1, ascending.shape[1] - 1)
    return torch.lerp(ascending[:, math.floor(at)], ascending[:, above], at - math.floor(at))


def recorder(seen):
    """In the place of a quantizer: keeps what it sees, and quantizes nothing."""

    def see(X, leave_out):
        seen.append(X)
        return X

    return see


def fisher_information(model, windows, states):
    """Yields l, i, K, V, F_K, F_V of every block l, from the last to the first, and in it of every
    window i: K before RoPE and V (1, h_kv, n, d_k), and the Fisher information (its diagonal) of
    each of their numbers: the squared gradient of the loss on the window.

    Backwards by hand, block after block from `states` (L + 1, W, n, d), the H^0 to H^L of all
    windows (W, n): the graph of one block and one window is in memory, not of all. Where H^l was,
    the loss's gradient with respect to it is left. Raises NotFinite where a gradient is not.
    """
    device = model.embedding.weight.device
    rope, nothing = (
        rope_table(model.config, windows.shape[1], device),
        kvsink.pfn(states[0, :1].to(device), 0),
    )
    for i, tokens in enumerate(windows.to(device)):
        with torch.enable_grad():
            H = states[-1, i].to(device)[None].requires_grad_()
            loss = F.cross_entropy(model.logits(H[0, :-1]).float(), tokens[1:], reduction="sum")
            states[-1, i] = torch.autograd.grad(loss, H)[0][0]
    for l, block in zip(range(len(model.blocks), 0, -1), reversed(model.blocks)):
        for i in range(len(windows)):
            K, V = [], []
            with torch.enable_grad():
                H = states[l - 1, i].to(device)[None].requires_grad_()
                H_l = kvsink.decoder_block(
                    block, H, nothing, recorder(K), recorder(V), rope, pre_rope=True
                )
                g_H, g_K, g_V = torch.autograd.grad(
                    H_l, (H, K[0], V[0]), states[l, i].to(device)[None]
                )
            if not (g_K.isfinite().all() and g_V.isfinite().all()):
                raise NotFinite(
                    f"NaN or inf in the gradient of block {l}, counted from 1: is --dtype wide enough?"
                )
            states[l - 1, i] = g_H[0]
            yield l, i, K[0].detach(), V[0].detach(), g_K.float().square(), g_V.float().square()


def histogram(X, weight, lo, hi, leave_out):
    """The third field of Calibration for one tensor: (3, BINS). Outliers and what is left out do
    not count."""
    X = X.float()
    x, *_ = normalized(X, lo, hi)
    counted = (lo <= X) & (X <= hi) & ~leave_out
    wide = torch.float32 if X.device.type == "mps" else torch.float64  # MPS has no float64
    x, weight = x[counted].to(wide), weight[counted].to(wide)
    at = ((x + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    return torch.stack(
        [torch.bincount(at, w, minlength=BINS) for w in (torch.ones_like(x), weight, weight * x)]
    )


def host_bytes(model, windows):
    """What `calibrate` takes of host memory: H^0 to H^L of all windows, and one more while blocks
    go by."""
    return (len(model.blocks) + 2) * stream.hidden_bytes(model, windows)


def calibrate(model, windows, recipes, site, quiet=None):
    """recipe -> Calibration, from windows (W, n) of token ids, for all recipes at once: forwards
    through the blocks once for each rule of preservation, backwards once. `quiet` is what tqdm
    calls `disable`. Raises ValueError where host memory has no room for the hidden states,
    NotFinite where a gradient is not finite."""
    if (needed := host_bytes(model, windows)) > (free := cli.free_memory("cpu")):
        raise ValueError(
            f"KVQuant's calibration takes {cli.format_bytes(needed)} of host memory for hidden states, where "
            f"{cli.format_bytes(free)} are free: lower --calib-windows or --seq-len"
        )
    device, L, (W, n) = model.embedding.weight.device, len(model.blocks), windows.shape
    d = model.config.num_key_value_heads * model.config.head_dim
    states = torch.empty(L + 1, W, n, model.config.hidden_size, dtype=model.embedding.weight.dtype)
    for i, tokens in enumerate(windows):
        states[0, i] = model.embedding(tokens.to(device))
    rules, ranges, S_sinks = dict.fromkeys((keep, N) for keep, N, _ in recipes), {}, {}
    progress = {"unit": "block", "leave": False, "disable": quiet}
    with tqdm(desc="ranges of Keys", total=L * W * len(rules), **progress) as bar:
        for rule in rules:
            rhos = [recipe.rho for recipe in recipes if recipe[:2] == rule]
            found, S_sinks[rule] = key_ranges(model, rule, rhos, site, states, bar)
            ranges |= {Recipe(*rule, rho): ends for rho, ends in found.items()}
    fisher = {recipe: torch.zeros(L, 2, 3, BINS, dtype=torch.float64) for recipe in recipes}
    gradients = fisher_information(model, windows, states)
    for l, i, K, V, F_K, F_V in tqdm(gradients, desc="Fisher information", total=L * W, **progress):
        for recipe in recipes:
            S = S_sinks[recipe[:2]][int(l > site.l_E), i, None, None, :, None].to(
                device
            )  # (1, 1, n, 1)
            fisher[recipe][l - 1, 0] += histogram(K, F_K, *ranges[recipe][:, l - 1], S).cpu()
            in_token = token_range(V.float(), tail_of(recipe.rho, d))
            fisher[recipe][l - 1, 1] += histogram(V, F_V, *in_token, S).cpu()
    return {recipe: Calibration(*ranges[recipe], fisher[recipe].float()) for recipe in recipes}


# --------------------------------------------------------------------------------------------------
# What is made of it


def codebooks(calibration, bits, q_norm=False):
    """The codebooks of all blocks at 2^bits signposts, and their levels: (L, 2, 2^b) each, of Keys
    and of Values.

    With Q-Norm the levels are the signposts stretched and shifted, so that what comes back has mean
    and deviation of what went in.
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
        levels = (signposts - mean_) * torch.where(
            deviation_ > 0, deviation / deviation_, 1.0
        ) + mean
    return [table.float().unflatten(0, (-1, 2)) for table in (signposts, levels)]


def moments(x, count):
    """Mean and standard deviation of numbers x that occur `count` times, (B, N) -> (B, 1) each."""
    total = count.sum(1, keepdim=True).clamp(min=1)
    mean = (count * x).sum(1, keepdim=True) / total
    return mean, ((count * (x - mean) ** 2).sum(1, keepdim=True) / total).sqrt()


def kvquant_cache(calibration, rho, bits, q_norm=False):
    """The cache of one recipe at a width of 2, 3 or 4 bits, as kvsink.prefill takes it (with
    pre_rope=True)."""
    signposts, levels = codebooks(calibration, bits, q_norm)
    midpoints = (signposts[..., 1:] + signposts[..., :-1]) / 2
    (L, h_kv, _, d_k), sparse, cache = calibration.lo.shape, rho > 0, []
    for l in range(L):
        (m_K, m_V), (l_K, l_V) = (
            table[l].to(calibration.lo.device) for table in (midpoints, levels)
        )
        quantize_K = NonUniformQuantizer(
            m_K, l_K, sparse, lo=calibration.lo[l], hi=calibration.hi[l]
        )
        quantize_V = NonUniformQuantizer(m_V, l_V, sparse, tail=tail_of(rho, h_kv * d_k))
        cache.append((quantize_K, quantize_V))
    return cache


def kvquant_bits(row, config):
    """Bits that a token takes, and bits that are stored once, as results.average_bits takes them.
    Of a token: codes, the range of its Values, outliers in 16 bits with their channels, and their
    number. Once: the ranges of Keys and two codebooks."""
    d = config.num_key_value_heads * config.head_dim
    outliers = 32 * (row.rho * d + 2 * tail_of(row.rho, d)) + 2 * 16 if row.rho else 0
    return 2 * d * row.bits + 2 * 16 + outliers, 2 * 16 * d + 2 * 16 * 2**row.bits


# --------------------------------------------------------------------------------------------------
# Its file: safetensors, the settings in the metadata


@dataclass(frozen=True)
class MadeWith:
    """What a calibration depends on, besides its recipes and the site of their rules."""

    weights: str  # hub.fingerprint of the checkpoint
    text: str
    windows: int
    tokens: int  # of a window
    seed: int
    dtype: str


def settings(recipes, site, made_with):
    """All that the calibrations of these recipes depend on, as their file has it."""
    of_rule = list(site) if any("kvsink" in recipe.keep for recipe in recipes) else None
    return asdict(made_with) | {"site": of_rule, "bins": BINS}


def own_file(recipes, site, made_with):
    """Where our cache keeps the calibrations of these recipes."""
    key = repr((settings(recipes, site, made_with), sorted(set(recipes), key=str)))
    return (
        cache_directory()
        / "kvquant"
        / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    )


def calibrations(model, tokenizer, recipes, site, made_with, path=None):
    """recipe -> Calibration: from a file where they were made before with the same settings, else
    made and saved there. `made_with` is a MadeWith. The file is one of our cache, where a damaged
    one is made again, or `path`, where it is refused with ValueError. Of several runs or ranks that
    need the same file, one makes it and the others wait."""
    recipes = list(dict.fromkeys(recipes))
    known, file = settings(recipes, site, made_with), path or own_file(recipes, site, made_with)
    with lock(file):
        if file.is_file() if path else checksum_matches(file):
            return load_calibrations(file, known, recipes, model.embedding.weight.device)
        cli.check_folder("the calibration's folder", file.parent)
        ids = text.calibration_windows(
            tokenizer, made_with.text, made_with.tokens, made_with.windows, made_with.seed
        )
        (W, n), size = ids.shape, cli.format_bytes(host_bytes(model, ids))
        log(
            f"calibrating KVQuant on {W} windows of {n} tokens: {size} of hidden states in host memory"
        )
        made = calibrate(model, ids, recipes, site)
        save_calibrations(file, known, made)
        if not path:
            write_checksum(file)
    return made


def save_calibrations(path, known, calibrations):
    """All of a run's calibrations, with the codebooks of 2, 3 and 4 bits for others to read.
    `known`, a dict, is what they depend on."""
    tensors = {}
    for recipe, calibration in calibrations.items():
        name = recipe_name(recipe)
        tensors |= {
            f"{name}.{field}": tensor.cpu().contiguous()
            for field, tensor in calibration._asdict().items()
        }
        tensors |= {
            f"{name}.signposts.{bits}": codebooks(calibration, bits)[0].cpu() for bits in (2, 3, 4)
        }
    settings = json.dumps(known | {"sha256": digest(tensors)})
    write_atomically(path.resolve(), save(tensors, metadata={"settings": settings}))


def digest(tensors):
    """The SHA-256 of named tensors. It goes with the file, wherever that is copied."""
    sha256 = hashlib.sha256()
    for name, X in sorted(tensors.items()):
        sha256.update(repr((name, X.dtype, tuple(X.shape))).encode() + X.numpy().tobytes())
    return sha256.hexdigest()


def load_calibrations(path, known, recipes, device):
    """recipe -> Calibration. Raises ValueError, saying which, where the file is not as it was
    written, a setting is another or a recipe is missing."""
    try:
        with safe_open(path, framework="pt") as file:
            saved, names = json.loads((file.metadata() or {}).get("settings", "{}")), file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        for key, value in known.items():
            if (
                value is not None and saved.get(key) != value
            ):  # None: these recipes do not depend on it
                raise ValueError(f"it was made with {key} {saved.get(key)}, not {value}")
        if saved.get("sha256") != digest(tensors):
            raise ValueError("its numbers are not those that were written, by their SHA-256")
        names = {recipe: recipe_name(recipe) for recipe in recipes}
        if missing := [name for name in names.values() if f"{name}.fisher" not in tensors]:
            raise ValueError(f"it has no {missing[0]}")
        found = {}
        for recipe, name in names.items():
            lo, hi, fisher = (tensors[f"{name}.{field}"] for field in Calibration._fields)
            found[recipe] = Calibration(lo.to(device), hi.to(device), fisher)
        return found
    except (
        SafetensorError,
        ValueError,
        AttributeError,
    ) as error:  # the last: settings that are no object
        raise ValueError(
            f"{path}: {error}; name another file, or delete it to calibrate again"
        ) from None


def recipe_name(recipe):
    return f"{recipe.keep}-{recipe.N}-{recipe.rho}"
