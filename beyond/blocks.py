"""The codes of a growing number of tokens, packed in blocks of p tokens.

A block is packed as if it were one token of p d_k channels, because `unpack` is faster on long
rows. The codes of an incomplete block are not packed yet. So two tensors of a GrowingStore's
`parts` hold codes of `bits` bits:

    codes      (b, h_kv, number of blocks, p d_k bits / 8), packed bytes
    unpacked   (b, h_kv, fewer than p tokens, d_k), one code a byte
"""

import torch

from paper.kvcache import pack, unpack


def empty_blocks(X, g, bits):
    """Return the two tensors without a token, for Keys or Values X (b, h_kv, n, d_k) in groups of g
    tokens."""
    b, h_kv, _, d_k = X.shape
    p = max(g, 8)
    options = {"dtype": torch.uint8, "device": X.device}
    codes = torch.zeros(b, h_kv, 0, p * d_k * bits // 8, **options)
    return {"codes": codes, "unpacked": torch.zeros(b, h_kv, 0, d_k, **options)}


def tokens_per_block(parts, bits):
    """Return the number of tokens of a block, p."""
    return parts["codes"].shape[3] * 8 // bits // parts["unpacked"].shape[3]


def coded_tokens(parts, bits):
    """Return the number of tokens that have codes."""
    return parts["codes"].shape[2] * tokens_per_block(parts, bits) + parts["unpacked"].shape[2]


def add_codes(parts, codes, bits):
    """Add codes (b, h_kv, m, d_k) of new tokens."""
    codes = torch.cat((parts["unpacked"], codes), dim=2)
    p = tokens_per_block(parts, bits)
    blocks = codes.shape[2] // p
    if blocks:
        complete = codes[:, :, : blocks * p].unflatten(2, (blocks, p)).flatten(3)
        parts["codes"] = torch.cat((parts["codes"], pack(complete, bits)), dim=2)
        codes = codes[:, :, blocks * p :].clone()
    parts["unpacked"] = codes


def write_codes(parts, X, bits):
    """Write all codes to X (b, h_kv, n, d_k), of any dtype."""
    n = X.shape[2] - parts["unpacked"].shape[2]
    X[:, :, :n] = unpack(parts["codes"], bits).view(*X.shape[:2], n, X.shape[3])
    X[:, :, n:] = parts["unpacked"]


def take_codes(parts, bits):
    """Return all codes (b, h_kv, n, d_k), and free them in `parts`."""
    b, h_kv, _, d_k = parts["unpacked"].shape
    codes = parts["unpacked"].new_empty(b, h_kv, coded_tokens(parts, bits), d_k)
    write_codes(parts, codes, bits)
    parts |= {name: parts[name][:, :, :0].clone() for name in ("codes", "unpacked")}
    return codes
