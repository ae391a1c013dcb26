"""The Keys or the Values of one layer, in packed codes of as many tokens as come: for a cache whose
size nobody knows beforehand, whose prompt may come in parts, and whose end may be cut off.

What this file does not do: paper/kvcache.py packs codes into bytes, quant.py makes them.

Shapes: b sequences, n tokens so far, h_kv Key/Value heads, d_k channels a head.
"""

import torch

from paper.kvcache import pack, unpack
from quant import dequantize


class GrowingStore:
    """Codes are made once, for whole groups of tokens. What it holds is in `t`, all of it (b, ...):

    codes, s, z   packed, (b, h_kv, n, bytes); scale and zero of every group, in 16 bits where they are dynamic
    residual          the tokens of the unfinished group, in full precision
    kept, slots   the kept tokens as they came, (b, h_kv, k, d_k), and where they stand, (b, k); -1 is unused
    """

    def __init__(self, quantizer, X):
        self.quantizer = quantizer
        self.g = (
            quantizer.group_size
            if quantizer.granularity == "channel" and not quantizer.static
            else 1
        )
        self.group = torch.zeros(0, dtype=torch.int64, device=X.device)  # of each token with codes
        self.t = {
            "residual": X[:, :, :0],
            "kept": X[:, :, :0],
            "slots": self.group.repeat(len(X), 1),
        }

    def update(self, X, S_sink, real, prompt):
        """Stores new tokens X (b, h_kv, new, d_k) and returns all, (b, h_kv, n, d_k), as attention
        reads them. S_sink and `real`, no padding, are (b, n). A sink comes in a prompt, and stays:
        its code was made for a group without it."""
        past = len(self.group) + self.t["residual"].shape[2]
        self.append(X, S_sink | ~real, prompt)
        X_ = self.numbers()
        if prompt:
            X_[:, :, past:] = torch.where(S_sink[:, None, past:, None], X, X_[:, :, past:])
            is_kept, slots = S_sink.int().topk(int(S_sink.sum(1).max()))
            self.t["slots"] = torch.where(is_kept > 0, slots, -1)
            self.t["kept"] = X_.take_along_dim(slots[:, None, :, None], dim=2)
        return X_

    def append(self, X, leave_out, prompt):
        residual, first, t = torch.cat((self.t["residual"], X), dim=2), len(self.group), self.t
        # A group that a decoded token fills is read in full precision once more, as in kvcache.py.
        whole = (residual.shape[2] - (not prompt and self.g > 1)) // self.g * self.g
        t["residual"] = residual[:, :, whole:]
        if whole:
            leave_out = leave_out[:, None, first : first + whole, None]
            codes, s, z = self.quantizer.encode(residual[:, :, :whole].float(), leave_out)
            new, group = (
                {"codes": pack(codes, self.quantizer.bits)},
                torch.arange(whole, device=X.device) // self.g,
            )
            if not self.quantizer.static:
                group, new = (
                    group + (t["s"].shape[2] if "s" in t else 0),
                    new | {"s": s.half(), "z": z.half()},
                )
            elif "s" not in t:
                t["s"], t["z"] = (p.expand(len(X), -1, -1, -1) for p in (s, z))
            t |= {
                name: torch.cat((t[name], part), dim=2) if name in t else part
                for name, part in new.items()
            }
            self.group = torch.cat((self.group, 0 * group if self.quantizer.static else group))

    def numbers(self):
        """All tokens, dequantized where they have codes (Eq. 11), the kept ones as they came."""
        X = self.t["residual"]
        if len(self.group):
            s, z = (
                self.t[p].float().index_select(2, self.group)[..., None] for p in "sz"
            )  # (b, h_kv, n, d_k / g, 1)
            codes = unpack(self.t["codes"], self.quantizer.bits).unflatten(-1, (s.shape[-2], -1))
            X = torch.cat((dequantize(codes, s, z).flatten(-2).to(X.dtype), X), dim=2)
        X = torch.cat((X, X[:, :, :1]), dim=2)  # one more, where unused slots write
        slots = self.t["slots"][:, None, :, None] % X.shape[2]
        return X.scatter(2, slots.expand_as(self.t["kept"]), self.t["kept"])[:, :, :-1]

    def bytes(self):
        return sum(part.nbytes for part in self.t.values())

    def crop(self, n):
        """Keeps the first n tokens. Codes stay as they are: the last group may be short from now
        on."""
        self.t["residual"] = self.t["residual"][:, :, : max(n - len(self.group), 0)]
        self.t["slots"] = self.t["slots"].masked_fill(self.t["slots"] >= n, -1)
        self.group = self.group[:n]
        if "codes" in self.t:
            self.t["codes"] = self.t["codes"][:, :, :n]
