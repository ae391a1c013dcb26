"""Prefill, then decode, with a KV cache that is stored in its low-bit form (Equations 5 and 6).

Read top to bottom: prefill, which is Algorithm 1 filling a cache; decoding, one token of each
sequence at a time; a decoding step as one CUDA graph.

What this file does not do: kvcache.py stores Keys and Values and computes the attention over them.
No token is chosen here; generate.py samples.

Shapes as in kvcache.py: b sequences, n slots, h query heads, h_kv Key/Value heads, d_k channels of
a head.
"""

import functools

import torch

import kvsink
from kvsink import AUTO, Rule
from llama import apply_rope
from support.cache import log

# --------------------------------------------------------------------------------------------------
# Prefill


def prefill(model, cache, prompts, rule=None, step=None):
    """Run Algorithm 1 on each prompt, a list of token ids, and fill the cache with them. Return the
    logits (b, vocab) of the token after each. Prompts run one by one: if they were padded to one
    length, padding could be predicted as a sink.

    `rule` says which tokens are kept; by default none are. `step` is lines 6-13, eager by default;
    if it is compiled, it is recompiled for each prompt length.

    Raises ValueError if a prompt is empty, longer than the cache, or shorter than what the cache
    keeps, and if the rule may keep more or fewer tokens than the cache.
    """
    rule = rule or Rule()
    if step is None:
        step = kvsink.decoder_block_pre_rope if cache.pre_rope else kvsink.decoder_block
    logits = []
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, cache, rule)
        H = model.embedding(torch.tensor([prompt], device=cache.next_slot.device))
        sequence = torch.tensor([[i]], device=cache.next_slot.device)
        quantizers = [block_cache.storing_quantizers(sequence) for block_cache in cache.blocks]
        H, _ = kvsink.prefill(model, H, quantizers, step=step, **rule.prefill_arguments(H))
        logits.append(model.logits(H[:, -1]))
        cache.lengths[i] = len(prompt)
        cache.next_slot[i] = len(prompt)
    return torch.cat(logits)


def check_prompt(prompt, cache, rule):
    """Raise ValueError if `prefill` cannot run a prompt."""
    length = len(prompt)
    if not prompt:
        raise ValueError("the prompt is empty")
    if length > cache.n:
        raise ValueError(f"the prompt has {length} tokens, and the cache was made for {cache.n}")
    if cache.k > length:
        raise ValueError(f"cannot keep {cache.k} of {length} tokens")
    most = most_kept(rule, length)
    if most not in (0, cache.k):
        raise ValueError(f"cannot keep {most} tokens in a cache that was made to keep {cache.k}")


def most_kept(rule, n):
    """Return the most tokens that a rule keeps of a prompt of n tokens: the k of its cache."""
    return min(rule.max_kept, n) if rule.k == AUTO else rule.max_kept


# --------------------------------------------------------------------------------------------------
# Decoding: Eq. 5 makes the Query, Key and Value of the new token, Eq. 6 appends them to the cache


def decode(model, cache, tokens, step=None):
    """Append the next token of each sequence, tokens (b,), and return the logits (b, vocab) of the
    one after it. `step` is `decode_block`, or the same compiled. On a CUDA device it all runs as
    one graph, unless the cache has outliers. Raises ValueError if a sequence has no slot left."""
    if max(cache.lengths) >= cache.n:
        raise ValueError(f"the cache was made for {cache.n} tokens and is full")
    step = step or decode_block
    for block_cache in cache.blocks:
        block_cache.make_room()
    if cache.next_slot.is_cuda:
        if cache.replayed != (model, step):  # captured once, unless another model takes the cache
            cache.replay = capture_cuda_graph(model, cache, step)
            cache.replayed = (model, step)
        logits = cache.replay(tokens)
    else:
        logits = decode_step(model, cache, step, tokens)
    cache.lengths = [length + 1 for length in cache.lengths]
    cache.finish_groups()
    return logits


def decode_step(model, cache, step, tokens):
    """The part of `decode` that runs on the device."""
    H = model.embedding(tokens[:, None])  # (b, 1, d)
    for block, block_cache in zip(model.blocks, cache.blocks):
        H = step(block, H, block_cache, cache.next_slot, cache.rope)
    cache.next_slot += 1
    return model.logits(H[:, 0])


def decode_block(block, H, cache, slot, rope):
    """Algorithm 1, lines 6-13, for one token of each sequence, in `slot` (b, 1): H^{l-1} -> H^l,
    both (b, 1, d). `cache` is the block's, with room for the token (`make_room`)."""
    Q, K, V = block.QKV(block.LN_mhsa(H))  # Eq. 5: (b, h, 1, d_k), twice (b, h_kv, 1, d_k)
    rope_of_slot = [table[slot][:, None] for table in rope]  # (b, 1, 1, d_k)
    Q = apply_rope(Q, rope_of_slot)
    if not cache.pre_rope:
        K = apply_rope(K, rope_of_slot)
    cache.append(K, V, slot)  # Eq. 6
    A = cache.attention(Q, slot, rope, block.sliding_window)  # Eq. 3: (b, 1, h d_k)
    H = block.W_o(A) + H
    return block.FFN(block.LN_ffn(H)) + H


# How torch.compile compiles `decode_block`. With its own limits, Inductor would write the unpacked
# Keys and Values to memory, because all G queries read them: without limits, it computes everything
# in the kernel that reads it. A scale stored in 16 bits has to be rounded before codes are made
# with it; without emulated casts, Inductor skips that. Not dynamic: it is recompiled for each n.
FUSE = {
    "dynamic": False,
    "options": {
        "realize_opcount_threshold": 1000,
        "realize_reads_threshold": 1000,
        "realize_acc_reads_threshold": 1000,
        "emulate_precision_casts": True,
    },
}


# --------------------------------------------------------------------------------------------------
# A decoding step as one CUDA graph


def capture_cuda_graph(model, cache, step):
    """Return `decode_step` as one CUDA graph, a function of tokens (b,): instead of some forty
    kernel launches per block there is one per token.

    A graph repeats the same work on the same addresses. So caches have their full size from the
    start, and `next_slot` lies on the device. KVQuant's outliers grow, so a cache that has them is
    not captured. In that case, and if the capture fails, this returns the plain `decode_step`.
    """
    run_step = functools.partial(decode_step, model, cache, step)
    if cache.has_outliers:
        return run_step
    slot = cache.next_slot.clone()
    tokens = torch.zeros_like(slot[:, 0])
    stream = torch.cuda.Stream(slot.device)
    stream.wait_stream(torch.cuda.current_stream(slot.device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and writes into the slot that the first replay writes again
            run_step(tokens)
            cache.next_slot.copy_(slot)
    torch.cuda.current_stream(slot.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            logits = run_step(tokens)
    except RuntimeError as error:
        cache.next_slot.copy_(slot)
        reason = str(error).splitlines()[0]
        log(f"decoding without a CUDA graph, which could not be captured: {reason}")
        return run_step

    def replay(new_tokens):
        tokens.copy_(new_tokens)
        graph.replay()
        return logits.clone()

    return replay
