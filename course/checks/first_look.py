"""A first look at attention, when Problem 3 is solved: which tokens draw it?

python -m checks.first_look
"""

import torch

from kvsink import PROMPTS
from llama import Llama, apply_rope, attention, rope_table
from support import hub
from support.tokenizer import Tokenizer


def main():
    directory = hub.model_directory(hub.DEFAULT_MODEL)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = Llama.from_pretrained(directory)
    tokens = tokenizer.encode(PROMPTS[1])[: model.config.head_dim]
    n = len(tokens)
    H = model.embedding(torch.tensor([tokens]))  # (1, n, d)
    rope = rope_table(model.config, n, H.device)
    print(f"the three of {n} tokens that draw the most attention, a mean over heads and queries")
    for l, block in enumerate(model.blocks, start=1):
        Q, K, V = block.QKV(block.LN_mhsa(H))
        unit = torch.eye(n, V.shape[-1]).expand_as(V)  # for this V, Eq. 3 gives the softmax itself
        P = attention(apply_rope(Q, rope), apply_rope(K, rope), unit)  # (1, n, h d_k)
        P = P.unflatten(-1, (-1, V.shape[-1])).mean((0, 1, 2))  # (d_k,), of which n are tokens
        words = [f"{i} {tokenizer.decode([tokens[i]])!r} {P[i]:.0%}" for i in P.topk(3).indices]
        print(f"block {l:>2}   " + "".join(f"{word:<20}" for word in words).rstrip())
        H = block(H, rope)


if __name__ == "__main__":
    with torch.no_grad():
        main()
