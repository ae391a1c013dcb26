"""Models larger than the device: --stream gives the same results to the last digit."""

import signal
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval_ppl
from llama import Llama, LlamaConfig
from support import evaluate, stream
from support.machine import has_compiler
from support.stream import BlocksOnDisk
from tests.helpers import (
    EVAL_PPL,
    HERE,
    SMALL,
    TWO_RANKS,
    refuse,
    results_of,
    write_model,
    write_unplanted,
    write_weights,
)

TOKENS = torch.tensor(np.random.RandomState(1).randint(0, 97, (2, 100)))
SIX_BLOCKS = [1, 2, 3, 4, 5, 6]  # of the tiny model


def assert_same_results(one, other):
    """Assert that two files hold the same results in the same order, to the last digit. Only the
    seconds may differ."""
    ours, theirs = ([{**r, "seconds": 0} for r in results_of(path)] for path in (one, other))
    assert ours == theirs


@pytest.fixture
def reads(monkeypatch):
    """The blocks that loops have had on the device so far, from 1, in order. Asserts that no two
    are there at once."""
    blocks = []
    walk = BlocksOnDisk.walk

    def recording_walk(self, order):
        for block in walk(self, order):
            numbers = [l for l, other in enumerate(self._modules.values(), 1) if other is block]
            blocks.extend(numbers)
            assert not any(p.is_meta for p in block.parameters())
            assert sum(not p.is_meta for p in self.parameters()) == len(list(block.parameters()))
            yield block
        assert all(p.is_meta for p in self.parameters())

    monkeypatch.setattr(BlocksOnDisk, "walk", recording_walk)
    return blocks


# --------------------------------------------------------------------------------------------------
# Blocks on disk


def test_streamed_blocks_are_those_of_the_model(tmp_path, reads):
    write_model(tmp_path, {**SMALL, "tie_word_embeddings": True}, shards=4)
    whole = Llama.from_pretrained(tmp_path)
    model = stream.from_pretrained(tmp_path, "cpu", torch.float32)
    assert torch.equal(model(TOKENS), whole(TOKENS))
    assert reads == [1, 2, 3]
    for l, block in zip((3, 2, 1), reversed(model.blocks)):
        expected = whole.blocks[l - 1].parameters()
        for W, W_expected in zip(block.parameters(), expected, strict=True):
            assert torch.equal(W, W_expected)
    assert reads == [1, 2, 3, 3, 2, 1]
    for _ in model.blocks:  # a loop that is left early
        break
    assert all(p.is_meta for p in model.blocks.parameters())
    assert not model.W_vocab.weight.is_meta
    low = stream.from_pretrained(tmp_path, "cpu", torch.bfloat16)
    assert torch.equal(low(TOKENS), Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)(TOKENS))


def test_the_next_block_is_read_while_one_computes(tmp_path):
    model = stream.from_pretrained(write_model(tmp_path, SMALL), "cpu", torch.float32)
    read = model.blocks.read
    begun = [threading.Event() for _ in range(3)]  # of each block, that it is being read

    def announcing_read(l):
        begun[l].set()
        return read(l)

    model.blocks.read = announcing_read
    for l, _ in enumerate(model.blocks):
        assert l == 2 or begun[l + 1].wait(10)  # while the loop is still at block l
        assert l > 0 or not begun[2].is_set()  # one ahead, no more


def test_a_file_lost_on_the_way_is_an_error(tmp_path):
    model = stream.from_pretrained(write_model(tmp_path, SMALL), "cpu", torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        model(TOKENS)


@pytest.mark.parametrize("change, words", [
    ({"model.norm.weight": None}, "model.norm.weight is missing"),
    ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "unexpected"),
    ({"model.norm.weight": torch.zeros(63)}, "has shape"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_before_a_block_is_read(change, words, tmp_path, reads):
    weights = load_file(write_model(tmp_path, SMALL) / "model.safetensors") | change
    write_weights(tmp_path, {key: W for key, W in weights.items() if W is not None})
    with pytest.raises(ValueError, match=words) as whole:
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError) as streamed:
        stream.from_pretrained(tmp_path, "cpu", torch.float32)
    assert str(streamed.value) == str(whole.value)
    assert not reads


# --------------------------------------------------------------------------------------------------
# The same results


@pytest.mark.parametrize("compiled", [False, True])
def test_streaming_changes_no_digit(
    tiny, tmp_path, capsys, sample_calibration, monkeypatch, reads, compiled
):
    """Every scheme, width and rule. Blocks are read once to be timed, and once for each row and
    each calibration."""
    schemes = "--scheme token-static token-dynamic channel-static --sinks 2 --calib-windows 2"
    if compiled:
        if not has_compiler("cpu"):
            pytest.skip("no compiler on this machine")
        command = [option for option in tiny if option != "--no-compile"]
        command += f"{schemes} --bits 4 --keep kvsink --limit 1".split()
        widths = rules = 1
    else:
        command = [*tiny, *f"{schemes} --bits 4 2 --keep none pfn kvsink --limit 3".split()]
        widths = 2
        rules = 3
    whole = tmp_path / "whole.json"
    streamed = tmp_path / "streamed.json"
    torch._dynamo.reset()
    assert eval_ppl.main([*command, "--json", str(whole)]) == 0
    torch._dynamo.reset()
    assert eval_ppl.main([*command, "--stream", "--json", str(streamed)]) == 0
    assert_same_results(whole, streamed)
    rows = 1 + 3 * widths * rules
    assert len(results_of(streamed)) == rows
    assert reads == [1] + SIX_BLOCKS * (rows + rules)
    capsys.readouterr()

    # Each of the two finds the rows that the other has done: nothing is measured.
    monkeypatch.setattr(evaluate, "row_batches", None)
    assert eval_ppl.main([*command, "--json", str(streamed)]) == 0
    assert eval_ppl.main([*command, "--stream", "--json", str(whole)]) == 0
    assert "streaming" not in capsys.readouterr().err


def test_streaming_follows_rope_and_dtype(tiny, tmp_path, sample_calibration):
    rows = "--scheme channel-static --bits 3 --sinks 2 --limit 2 --calib-windows 2"
    command = [*tiny, *rows.split(), *"--rope pre --dtype bfloat16".split()]
    whole = tmp_path / "whole.json"
    streamed = tmp_path / "streamed.json"
    assert eval_ppl.main([*command, "--json", str(whole)]) == 0
    assert eval_ppl.main([*command, "--stream", "--json", str(streamed)]) == 0
    assert_same_results(whole, streamed)


def test_a_killed_run_goes_on_after_the_last_row_in_its_file(tiny, tmp_path, reads):
    whole = tmp_path / "whole.json"
    out = tmp_path / "out.json"
    command = [*tiny, *"--scheme token-dynamic --bits 2 4 --sinks 1 2 3 --limit 5".split()]
    assert eval_ppl.main([*command, "--json", str(whole)]) == 0
    command += ["--stream", "--json", str(out)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*EVAL_PPL, *command], cwd=HERE, **silent)
    while process.poll() is None and not (out.exists() and len(results_of(out)) >= 3):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = len(results_of(out))
    assert process.returncode == -signal.SIGKILL
    assert 3 <= done < 15
    reads.clear()
    assert eval_ppl.main(command) == 0
    assert len(reads) == 1 + 6 * (15 - done)
    assert_same_results(whole, out)


def test_two_ranks_stream_together(tiny, tmp_path):
    """torchrun with gloo: each rank streams its share of the windows."""
    one = tmp_path / "one.json"
    two = tmp_path / "two.json"
    row = "--scheme token-dynamic --keep kvsink --sinks 2 --bits 3 --limit 5".split()
    assert eval_ppl.main([*tiny, *row, "--json", str(one)]) == 0
    command = [*TWO_RANKS, *tiny, *row, "--stream", "--json", str(two)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_results(one, two)


@pytest.mark.parametrize("key, place", [
    ("model.layers.3.mlp.down_proj.weight", "block 4 of 6"),
    ("model.layers.1.self_attn.k_proj.weight", "block 2 of 6"),
    ("lm_head.weight", "the output layer"),
])  # fmt: skip
def test_a_nan_names_its_block(key, place, tiny, tmp_path, capsys):
    weights = write_unplanted(tmp_path)
    weights[key][:] = torch.nan
    write_weights(tmp_path, weights)
    options = f"--model {tmp_path} --scheme token-dynamic --limit 1 --stream".split()
    assert eval_ppl.main([*tiny, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"full precision: NaN or inf first appeared in {place}" in error


def test_a_nan_of_one_of_two_ranks_ends_both(tiny, tmp_path):
    """The rank that looks for the block does so without the other."""
    weights = write_unplanted(tmp_path / "model")
    weights["model.embed_tokens.weight"][ord("~")] = torch.nan
    write_weights(tmp_path / "model", weights)
    (tmp_path / "text.txt").write_text("a" * 64 + "~" * 64)  # the second window is rank 1's
    options = f"--model {tmp_path / 'model'} --data {tmp_path / 'text.txt'} --limit 2".split()
    command = [*TWO_RANKS, *tiny, *options, "--scheme", "token-dynamic", "--stream"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "rank 1: 1/19 full precision: NaN or inf first appeared in block 1 of 6" in done.stderr


def test_streaming_the_default_model_changes_no_digit(default_model, tmp_path):
    """Two windows of 128 tokens; the tiny model has the other schemes."""
    whole = tmp_path / "whole.json"
    streamed = tmp_path / "streamed.json"
    command = "--scheme channel-static --bits 4 --keep kvsink --sinks 5".split()
    command += "--seq-len 128 --limit 2 --calib-windows 2 --no-compile".split()
    assert eval_ppl.main([*command, "--json", str(whole)]) == 0
    assert eval_ppl.main([*command, "--stream", "--json", str(streamed)]) == 0
    assert_same_results(whole, streamed)
    assert len(results_of(whole)) == 2


# --------------------------------------------------------------------------------------------------
# Memory and time


def test_a_run_announces_what_it_will_take(tiny, capsys, sample_calibration):
    rows = "--scheme token-static --keep none pfn --sinks 2 --bits 4 --limit 3 --calib-windows 2"
    assert eval_ppl.main([*tiny, *rows.split(), "--stream"]) == 0
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("streaming ")]
    size = 3 * 64 * 32 * 4 / 2**20  # one row: three windows of 64 tokens, 32 channels, fp32
    assert "6 blocks 5 times" in line  # three rows and two calibrations
    assert f"{size:.1f} MiB of hidden states in host memory" in line
    assert "on cpu for a block" in line


def test_the_time_that_is_announced(capsys, monkeypatch, tmp_path):
    """Worked by hand, for 3 blocks: a pass of 2 windows waits 5 s for the disk, a pass of 10
    windows computes for 10 s; 3 (5 + 10) s."""
    model = stream.from_pretrained(write_model(tmp_path, SMALL), "cpu", torch.float32)
    monkeypatch.setattr(stream, "time_block", lambda model, window: (5.0, 1.0))
    stream.announce(model, TOKENS, [2, 10])
    assert "about 45 s" in capsys.readouterr().err


def test_memory_on_the_device_is_about_what_a_block_takes():
    """LLaMA2-70B in fp16 has 1.6 GiB per block, and 1 GiB outside; with windows of 4,096 tokens it
    stays far below a card of 24 GB."""
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict({**SMALL, "num_hidden_layers": 1}))
    last_norm = 64  # which is not counted
    weights = sum(p.numel() for p in model.parameters()) - last_norm
    assert stream.device_memory(model.config, 0, 4) == 4 * weights
    llama2_70b = LlamaConfig.from_dict(
        {
            **SMALL,
            "vocab_size": 32000,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
        }
    )
    assert 2.5 < stream.device_memory(llama2_70b, 0, 2) / 2**30 < 2.8
    assert 4 < stream.device_memory(llama2_70b, 4096, 2) / 2**30 < 8


def test_hidden_states_without_room_are_refused(tiny, capsys, monkeypatch):
    command = [*tiny, *"--scheme token-dynamic --bits 2 --sinks 2 --limit 2 --stream".split()]
    monkeypatch.setattr(stream, "announce", lambda *_: None)
    monkeypatch.setattr(stream, "free_memory", lambda device: 2**13)
    refuse(command, ["0.0 MiB of host memory", "--limit"], capsys, eval_ppl)


def test_ranks_share_the_memory_of_a_machine(tmp_path, monkeypatch):
    model = stream.from_pretrained(write_model(tmp_path, SMALL), "cpu", torch.float32)
    size = 2 * 100 * 64 * 4
    monkeypatch.setattr(stream, "free_memory", lambda device: 2 * size - 1)
    assert torch.equal(stream.embed(model, TOKENS), model.embedding(TOKENS))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="hidden states"):
        stream.embed(model, TOKENS)
