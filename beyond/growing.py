"""The Keys or the Values of one layer as packed codes, for a cache that grows token by token: its
final length is unknown, a prompt may come in parts, and the last tokens may be cut off again.

What this file does not do: paper/kvcache.py packs codes into bytes, and quant.py makes the codes.

Shapes: b sequences, n tokens so far, m new tokens, h_kv Key/Value heads, d_k channels per head.
"""

import torch

from paper.kvcache import pack, unpack
from quant import dequantize


class GrowingStore:
    """Codes are made once, for complete groups of tokens. `parts` holds all tensors that are
    stored, each of them (b, ...):

    codes         packed, (b, h_kv, n, bytes)
    scale, zero   one of each per group; 16 bits wide if they are dynamic
    residual      the tokens of the last, incomplete group, in full precision
    kept          the kept tokens in full precision, (b, h_kv, k, d_k)
    slots         the positions of the kept tokens, (b, k); -1 marks an unused slot
    """

    def __init__(self, quantizer, X):
        self.quantizer = quantizer
        self.g = quantizer.tokens_per_group
        # For each token that has codes, the index of its scale and zero.
        self.group = torch.zeros(0, dtype=torch.int64, device=X.device)
        self.parts = {
            "residual": X[:, :, :0],
            "kept": X[:, :, :0],
            "slots": self.group.repeat(len(X), 1),
        }

    @property
    def length(self):
        return len(self.group) + self.parts["residual"].shape[2]

    def update(self, X, S_sink, attended, is_prompt):
        """Store new tokens X (b, h_kv, m, d_k), and return all tokens (b, h_kv, n, d_k) as
        attention reads them. The masks S_sink and `attended`, which is False for padding, are
        (b, n). Only tokens of a prompt become sinks, and a token that became a sink stays one,
        because the codes of its group were made without it."""
        past = self.length
        self.append(X, S_sink | ~attended, is_prompt)
        X_ = self.dequantized()
        if is_prompt:
            X_[:, :, past:] = torch.where(S_sink[:, None, past:, None], X, X_[:, :, past:])
            is_kept, slots = S_sink.int().topk(int(S_sink.sum(1).max()))
            self.parts["slots"] = torch.where(is_kept > 0, slots, -1)
            self.parts["kept"] = X_.take_along_dim(slots[:, None, :, None], dim=2)
        return X_

    def append(self, X, leave_out, is_prompt):
        """Add new tokens X (b, h_kv, m, d_k) to the residual, and encode the groups that are now
        complete."""
        residual = torch.cat((self.parts["residual"], X), dim=2)
        # As in paper/kvcache.py, a group that a decoded token completes is read in full precision
        # once more: it is encoded when the next token comes.
        waiting = 1 if self.g > 1 and not is_prompt else 0
        complete = (residual.shape[2] - waiting) // self.g * self.g
        # Cloned, because a view would keep the whole prompt in memory.
        self.parts["residual"] = residual[:, :, complete:].clone()
        if complete:
            first = len(self.group)
            leave_out = leave_out[:, None, first : first + complete, None]
            self.encode(residual[:, :, :complete], leave_out)

    def encode(self, X, leave_out):
        """Add the codes of complete groups of tokens X (b, h_kv, m, d_k)."""
        codes, s, z = self.quantizer.encode(X.float(), leave_out)
        self.extend("codes", pack(codes, self.quantizer.bits))
        group = torch.arange(X.shape[2], device=X.device) // self.g
        if self.quantizer.static:
            group = torch.zeros_like(group)  # all tokens share one scale and zero
            if "scale" not in self.parts:
                self.parts["scale"] = s.expand(len(X), -1, -1, -1)
                self.parts["zero"] = z.expand(len(X), -1, -1, -1)
        else:
            if "scale" in self.parts:
                group = group + self.parts["scale"].shape[2]
            self.extend("scale", s.half())
            self.extend("zero", z.half())
        self.group = torch.cat((self.group, group))

    def extend(self, name, new):
        if name in self.parts:
            new = torch.cat((self.parts[name], new), dim=2)
        self.parts[name] = new

    def dequantized(self):
        """Return all tokens (b, h_kv, n, d_k): those that have codes dequantized (Eq. 11), those of
        the residual and the kept ones in full precision."""
        X = self.parts["residual"]
        if len(self.group):
            s = self.of_each_token("scale")
            z = self.of_each_token("zero")
            codes = unpack(self.parts["codes"], self.quantizer.bits)  # (b, h_kv, n, d_k)
            codes = codes.unflatten(-1, (s.shape[-2], -1))  # (b, h_kv, n, d_k / g, g)
            X = torch.cat((dequantize(codes, s, z).flatten(-2).to(X.dtype), X), dim=2)
        X = torch.cat((X, X[:, :, :1]), dim=2)  # one token more, which unused slots overwrite
        slots = self.parts["slots"][:, None, :, None] % X.shape[2]
        kept = self.parts["kept"]
        return X.scatter(2, slots.expand_as(kept), kept)[:, :, :-1]

    def of_each_token(self, name):
        """Return the scale or the zero of each token that has codes, (b, h_kv, n, d_k / g, 1)."""
        return self.parts[name].float().index_select(2, self.group)[..., None]

    def crop(self, n):
        """Keep the first n tokens. Codes stay as they are, so the last group may be shorter from
        then on."""
        self.parts["residual"] = self.parts["residual"][:, :, : max(n - len(self.group), 0)]
        self.parts["slots"] = self.parts["slots"].masked_fill(self.parts["slots"] >= n, -1)
        self.group = self.group[:n]
        if "codes" in self.parts:
            self.parts["codes"] = self.parts["codes"][:, :, :n]

    def reorder(self, indices):
        """Replace sequence i by what sequence indices[i] was."""
        for name, part in self.parts.items():
            self.parts[name] = part[indices.to(part.device)]

    def bytes(self):
        return sum(part.nbytes for part in self.parts.values())

    def bytes_in_16_bits(self):
        """Return the bytes that the same Keys or Values would take in 16 bits."""
        b, h_kv, _, d_k = self.parts["residual"].shape
        return 2 * b * h_kv * self.length * d_k
