"""The Keys or the Values of one layer as packed codes, for a cache that grows token by token.

What this file does not do: quant.py makes the codes, and blocks.py packs them.
Tensors of b sequences, h_kv Key/Value heads and d_k channels are (b, h_kv, tokens, d_k).
"""

import torch

from beyond.blocks import add_codes, coded_tokens, empty_blocks, take_codes, write_codes

CHUNK = 2**18  # so many numbers are encoded at a time, which takes several times their memory


class GrowingStore:
    """Codes are made once, for complete groups of g tokens; if the end of a group is cut off, they
    are made again. `parts` holds all tensors that are stored. None is ever written into, so that
    copies may share them.

    codes         packed by blocks (blocks.py); `unpacked` are those of an incomplete block
    scale, zero   one of each per group, (b, h_kv, n / g, d_k / width); 16 bits wide if dynamic
    residual      the tokens of the last, incomplete group, in full precision
    kept          the kept tokens of all sequences, (k, h_kv, d_k), in full precision
    sequence      the sequence of each kept token (k,); `slot` is its position there (k,)
    """

    def __init__(self, quantizer, buffer, X):
        self.quantizer = quantizer
        self.buffer = buffer  # see `dequantized`
        self.bits = quantizer.bits
        self.g = quantizer.tokens_per_group
        place = torch.zeros(0, dtype=torch.int64, device=X.device)
        self.parts = empty_blocks(X, self.g, self.bits) | {"sequence": place, "slot": place}
        self.parts["kept"] = X.new_zeros(0, X.shape[1], X.shape[3])
        self.parts["residual"] = X[:, :, :0].clone()  # a view would keep all of X in memory

    @property
    def coded(self):
        """The number of tokens that have codes."""
        return coded_tokens(self.parts, self.bits)

    def update(self, X, S_sink, leave_out, is_prompt, exact=False):
        """Store new tokens X, and return all tokens as attention reads them; if `exact`, those of a
        prompt as they are. The masks are (b, n): `leave_out` marks sinks and padding. Only a
        prompt's tokens become sinks. A sink stays one: its group's codes were made without it."""
        past = self.coded + self.parts["residual"].shape[2]
        self.append(X, leave_out, is_prompt)
        X_ = self.dequantized()
        if is_prompt:
            sequence, slot = S_sink.nonzero(as_tuple=True)
            new = X[sequence, :, (slot - past).clamp(min=0)]  # (k, h_kv, d_k)
            kept = torch.where((slot >= past)[:, None, None], new, X_[sequence, :, slot])
            self.parts |= {"kept": kept, "sequence": sequence, "slot": slot}
            X_[sequence, :, slot] = kept
            if exact:
                X_[:, :, past:] = X
        return X_

    def append(self, X, leave_out, is_prompt):
        """Add tokens X to the residual, and encode its complete groups."""
        residual = torch.cat((self.parts["residual"], X), dim=2)
        # As in paper/kvcache.py, a group that a decoded token completes is read in full precision
        # once more: it is encoded when the next token comes.
        waiting = 1 if self.g > 1 and not is_prompt else 0
        complete = (residual.shape[2] - waiting) // self.g * self.g
        self.parts["residual"] = residual[:, :, complete:].clone()
        step = max(1, CHUNK // X[:, :, 0].numel() // self.g) * self.g
        for i in range(0, complete, step):
            chunk = residual[:, :, i : min(i + step, complete)]
            slots = slice(self.coded, self.coded + chunk.shape[2])
            self.encode(chunk, leave_out[:, None, slots, None])

    def encode(self, X, leave_out):
        """Add the codes of complete groups of tokens X."""
        codes, s, z = self.quantizer.encode(X.float(), leave_out)
        add_codes(self.parts, codes, self.bits)
        if self.quantizer.static:
            self.parts |= {"scale": s, "zero": z}  # one of each for all tokens
            return
        for name, part in (("scale", s.half()), ("zero", z.half())):
            self.parts[name] = torch.cat((self.parts.get(name, part[:, :, :0]), part), dim=2)

    def dequantized(self):
        """Return all tokens: those that have codes dequantized (Eq. 11), those of the residual and
        the kept ones in full precision. They lie in the buffer, which all layers share."""
        residual = self.parts["residual"]
        b, h_kv, m, d_k = residual.shape
        n = self.coded
        X = self.buffer.tensor((b, h_kv, n + m, d_k), residual)
        if n:  # in place: a new tensor for each operation would take three times as long
            write_codes(self.parts, X[:, :, :n], self.bits)
            s = self.parts["scale"][:, :, :, None, :, None].float()  # (b, h_kv, n / g, 1, d_k/w, 1)
            z = self.parts["zero"][:, :, :, None, :, None].float()
            X[:, :, :n].view(b, h_kv, -1, self.g, s.shape[4], d_k // s.shape[4]).sub_(z).mul_(s)
        X[:, :, n:] = residual
        X[self.parts["sequence"], :, self.parts["slot"]] = self.parts["kept"].to(X.dtype)
        return X.to(residual.dtype)

    def crop(self, n):
        """Keep the first n tokens, and free the others."""
        whole = min(n, self.coded) // self.g * self.g
        self.parts["residual"] = self.dequantized()[:, :, whole:n].clone()
        add_codes(self.parts, take_codes(self.parts, self.bits)[:, :, :whole], self.bits)
        for name in self.dynamic_parameters():
            self.parts[name] = self.parts[name][:, :, : whole // self.g].clone()
        stays = self.parts["slot"] < n
        self.parts |= {name: self.parts[name][stays] for name in ("kept", "sequence", "slot")}

    def reorder(self, indices):
        """Replace sequence i by what sequence indices[i] was."""
        indices = indices.to(self.parts["slot"].device)
        sequence, entry = (indices[:, None] == self.parts["sequence"]).nonzero(as_tuple=True)
        self.parts |= {name: self.parts[name][entry] for name in ("kept", "slot")}
        names = ("residual", "codes", "unpacked", *self.dynamic_parameters())
        self.parts |= {name: self.parts[name][indices] for name in names}
        self.parts["sequence"] = sequence

    def dynamic_parameters(self):
        """Return the names of the parts that have a scale or a zero for each group."""
        names = () if self.quantizer.static else ("scale", "zero")
        return [name for name in names if name in self.parts]
