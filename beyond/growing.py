"""The Keys or the Values of one layer as packed codes, for a cache that grows token by token: its
final length is unknown, a prompt may come in parts, and the last tokens may be cut off again.

What this file does not do: paper/kvcache.py packs codes into bytes, and quant.py makes the codes.

Shapes: b sequences, n tokens so far, m new tokens, h_kv Key/Value heads, d_k channels per head.
"""

import torch

from paper.kvcache import pack, unpack
from quant import dequantize

CHUNK = 2**18  # so many numbers at a time: what they become on the way fits in a processor's cache


class Buffer:
    """Memory that all layers share. One layer's numbers have been read before the next layer writes
    its own."""

    def __init__(self):
        self.memory = torch.empty(0)

    def tensor(self, shape, like):
        """Return a tensor of this shape, and of the dtype and device of `like`."""
        size = shape.numel()
        same = self.memory.dtype == like.dtype and self.memory.device == like.device
        if not (same and size <= self.memory.numel() <= 2 * size):
            self.memory = torch.empty(0)  # freed first
            self.memory = like.new_empty(size + size // 8)
        return self.memory[:size].view(shape)


class GrowingStore:
    """Codes are made once, for complete groups of g tokens; if the end of a group is cut off, they
    are made again. `parts` holds all tensors that are stored:

    codes         packed, (b, h_kv, n, bytes)
    scale, zero   one of each per group; 16 bits wide if they are dynamic
    residual      the tokens of the last, incomplete group, in full precision
    kept          the kept tokens of all sequences, (k, h_kv, d_k), in full precision
    sequence      the sequence of each kept token (k,)
    slot          and its position there (k,)
    """

    def __init__(self, quantizer, buffer, X):
        self.quantizer = quantizer
        self.buffer = buffer
        self.g = quantizer.tokens_per_group
        none = torch.zeros(0, dtype=torch.int64, device=X.device)
        kept = X.new_zeros(0, X.shape[1], X.shape[3])
        self.parts = {"kept": kept, "sequence": none, "slot": none}
        self.parts["residual"] = X[:, :, :0].clone()  # a view would keep all of X in memory

    @property
    def coded(self):
        """The number of tokens that have codes."""
        return self.parts["codes"].shape[2] if "codes" in self.parts else 0

    @property
    def length(self):
        return self.coded + self.parts["residual"].shape[2]

    def update(self, X, S_sink, attended, is_prompt, exact=False):
        """Store new tokens X (b, h_kv, m, d_k), and return all tokens (b, h_kv, n, d_k) as
        attention reads them, in memory that the next update of any layer overwrites. The masks
        S_sink and `attended`, which is False for padding, are (b, n). Only tokens of a prompt
        become sinks, and a token that became a sink stays one, because the codes of its group were
        made without it. If `exact`, a prompt's new tokens come back as they are."""
        X = self.adapt(X)
        past = self.length
        self.append(X, S_sink | ~attended, is_prompt)
        X_ = self.dequantized()
        if is_prompt:
            sequence, slot = S_sink.nonzero(as_tuple=True)
            is_new = (slot >= past)[:, None, None]
            new = X[sequence, :, (slot - past).clamp(min=0)]  # (k, h_kv, d_k)
            kept = torch.where(is_new, new, X_[sequence, :, slot])
            self.parts |= {"kept": kept, "sequence": sequence, "slot": slot}
            X_[sequence, :, slot] = kept
            if exact:
                X_[:, :, past:] = X
        return X_

    def adapt(self, X):
        """Return X in the wider dtype of X and of what is stored, and move what is stored to its
        device: a model may be moved between two turns, or run under autocast in one of them."""
        dtype = torch.promote_types(X.dtype, self.parts["residual"].dtype)
        for name, part in self.parts.items():
            wide = name in ("residual", "kept")
            self.parts[name] = part.to(X.device, dtype if wide else part.dtype)
        return X.to(dtype)

    def append(self, X, leave_out, is_prompt):
        """Add new tokens X (b, h_kv, m, d_k) to the residual, and encode the groups that are now
        complete."""
        residual = torch.cat((self.parts["residual"], X), dim=2)
        # As in paper/kvcache.py, a group that a decoded token completes is read in full precision
        # once more: it is encoded when the next token comes.
        waiting = 1 if self.g > 1 and not is_prompt else 0
        complete = (residual.shape[2] - waiting) // self.g * self.g
        self.parts["residual"] = residual[:, :, complete:].clone()
        if complete:
            leave_out = leave_out[:, None, self.coded : self.coded + complete, None]
            self.encode(residual[:, :, :complete], leave_out)

    def encode(self, X, leave_out):
        """Add the codes of complete groups of tokens X (b, h_kv, m, d_k)."""
        step = self.tokens_at_a_time(X)
        new = []
        for x, mask in zip(X.split(step, dim=2), leave_out.split(step, dim=2)):
            codes, s, z = self.quantizer.encode(x.float(), mask)
            new.append((pack(codes, self.quantizer.bits), s, z))
        names = ("codes", "scale", "zero")
        for name, parts in zip(names, zip(*new)):
            if self.quantizer.static and name != "codes":
                self.parts[name] = parts[0]  # one for all tokens
            else:
                parts = parts if name == "codes" else [part.half() for part in parts]
                old = [self.parts[name]] if name in self.parts else []
                self.parts[name] = torch.cat((*old, *parts), dim=2)

    def tokens_at_a_time(self, X):
        b, h_kv, _, d_k = X.shape
        return max(1, CHUNK // (b * h_kv * d_k * self.g)) * self.g

    def dequantized(self):
        """Return all tokens (b, h_kv, n, d_k): those that have codes dequantized (Eq. 11), those of
        the residual and the kept ones in full precision."""
        residual = self.parts["residual"]
        b, h_kv, _, d_k = residual.shape
        X = self.buffer.tensor(torch.Size((b, h_kv, self.length, d_k)), residual)
        coded = self.coded
        step = self.tokens_at_a_time(residual)
        for first in range(0, coded, step):
            X[:, :, first : min(first + step, coded)] = self.decode(first, first + step)
        X[:, :, coded:] = residual
        X[self.parts["sequence"], :, self.parts["slot"]] = self.parts["kept"]
        return X

    def decode(self, first, end):
        """Return Eq. 11 for the tokens from first to end, both multiples of g."""
        codes = unpack(self.parts["codes"][:, :, first:end], self.quantizer.bits)
        groups = slice(None) if self.quantizer.static else slice(first // self.g, end // self.g)
        s = self.parts["scale"][:, :, groups, None, :, None].float()
        z = self.parts["zero"][:, :, groups, None, :, None].float()
        codes = codes.unflatten(-1, (s.shape[4], -1)).unflatten(2, (-1, self.g))
        return dequantize(codes, s, z).flatten(-2).flatten(2, 3)  # (b, h_kv, tokens, d_k)

    def crop(self, n):
        """Keep the first n tokens, and free the others."""
        whole = min(n, self.coded) // self.g * self.g
        self.parts["residual"] = self.dequantized()[:, :, whole:n].clone()
        for name in self.of_all_tokens():
            end = whole if name == "codes" else whole // self.g
            self.parts[name] = self.parts[name][:, :, :end].clone()
        self.choose_kept(*(self.parts["slot"] < n).nonzero(as_tuple=True))

    def choose_kept(self, entry, sequence=None):
        """Keep these entries of the kept tokens, which may belong to other sequences now."""
        for name in ("kept", "sequence", "slot"):
            self.parts[name] = self.parts[name][entry]
        if sequence is not None:
            self.parts["sequence"] = sequence

    def reorder(self, indices):
        """Replace sequence i by what sequence indices[i] was."""
        indices = indices.to(self.parts["slot"].device)
        belongs = indices[:, None] == self.parts["sequence"]
        sequence, entry = belongs.nonzero(as_tuple=True)
        self.choose_kept(entry, sequence)
        for name in ("residual", *self.of_all_tokens()):
            self.parts[name] = self.parts[name][indices]

    def of_all_tokens(self):
        """Return the names of the parts that grow with the tokens that have codes."""
        names = ("codes",) if self.quantizer.static else ("codes", "scale", "zero")
        return [name for name in names if name in self.parts]

    def copy(self, buffer):
        """Return a store that shares all tensors. Each replaces its own and writes into none."""
        other = object.__new__(GrowingStore)
        other.__dict__.update(self.__dict__)
        other.buffer = buffer
        other.parts = dict(self.parts)
        return other

    def bytes(self):
        return sum(part.nbytes for part in self.parts.values())

    def bytes_in_16_bits(self):
        """Return the bytes that the same Keys or Values would take in 16 bits."""
        b, h_kv, _, d_k = self.parts["residual"].shape
        return 2 * b * h_kv * self.length * d_k
