"""Models larger than the device: --stream gives the same results to the last digit."""

import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval_ppl
from llama import Llama, LlamaConfig
from support import cli, stream
from support.stream import BlocksOnDisk
from tests.helpers import (
    DIGITS,
    HERE,
    PLANTED,
    SMALL,
    bytes_vocabulary,
    refuse,
    results_of,
    write_bpe,
    write_model,
    write_weights,
)

TOKENS = torch.tensor(np.random.RandomState(1).randint(0, 97, (2, 100)))
ROWS = "--scheme token-static token-dynamic channel-static --bits 4 2 --keep none pfn kvsink --sinks 2 --limit 3".split()
ROWS += ["--calib-windows", "2"]


def same_results(one, other):
    """All but the seconds, to the last digit, in the same order."""
    return [{**a, "seconds": 0} for a in results_of(one)] == [
        {**b, "seconds": 0} for b in results_of(other)
    ]


@pytest.fixture
def reads(monkeypatch):
    """The blocks that a loop had, from 1, in order, while this is used; no two may be on the device
    at once."""
    seen, real = [], BlocksOnDisk.walk

    def walk(self, order):
        for block in real(self, order):
            seen.append(
                [
                    l
                    for l, other in enumerate(self._modules.values(), 1)
                    if not other.W_q.weight.is_meta
                ][-1]
            )
            assert sum(not p.is_meta for p in self.parameters()) == len(list(block.parameters()))
            yield block
        assert all(p.is_meta for p in self.parameters())

    monkeypatch.setattr(BlocksOnDisk, "walk", walk)
    return seen


def test_streamed_blocks_are_those_of_the_model(tmp_path, reads):
    write_model(tmp_path, {**SMALL, "tie_word_embeddings": True}, shards=4)
    whole, model = (
        Llama.from_pretrained(tmp_path),
        stream.from_pretrained(tmp_path, "cpu", torch.float32),
    )
    assert torch.equal(model(TOKENS), whole(TOKENS)) and reads == [1, 2, 3]
    for l, block in zip((3, 2, 1), reversed(model.blocks)):
        assert all(
            torch.equal(a, b)
            for a, b in zip(block.parameters(), whole.blocks[l - 1].parameters(), strict=True)
        )
    assert reads == [1, 2, 3, 3, 2, 1]
    for _ in model.blocks:  # a loop that is left early
        break
    assert all(p.is_meta for p in model.blocks.parameters()) and not model.W_vocab.weight.is_meta
    low = stream.from_pretrained(tmp_path, "cpu", torch.bfloat16)
    assert torch.equal(low(TOKENS), Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)(TOKENS))


def test_the_next_block_is_read_while_one_computes(tmp_path):
    model = stream.from_pretrained(write_model(tmp_path, SMALL), "cpu", torch.float32)
    begun, real = [threading.Event() for _ in range(3)], model.blocks.read

    def read(l):
        begun[l].set()
        return real(l)

    model.blocks.read = read
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
    assert str(streamed.value) == str(whole.value) and not reads


@pytest.mark.parametrize("compiled", [False, True])
def test_streaming_changes_no_digit(
    tiny, tmp_path, capsys, sample_calibration, monkeypatch, reads, compiled
):
    """Every scheme, width and rule. Blocks are read once to be timed, and once for each row and
    each calibration."""
    if compiled and not cli.has_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    command, rules = [*tiny, *ROWS], 3
    if compiled:
        command = [
            *(a for a in command if a != "--no-compile"),
            "--limit",
            "1",
            "--keep",
            "kvsink",
            "--bits",
            "4",
        ]
        rules = 1
    for name, options in (("whole", []), ("streamed", ["--stream"])):
        torch._dynamo.reset()
        assert eval_ppl.main([*command, *options, "--json", str(tmp_path / f"{name}.json")]) == 0
    assert same_results(tmp_path / "whole.json", tmp_path / "streamed.json")
    rows = 1 + 3 * (1 if compiled else 2) * rules
    assert len(results_of(tmp_path / "streamed.json")) == rows
    assert reads == [1] + [1, 2, 3, 4, 5, 6] * (rows + rules)
    capsys.readouterr()
    # What either has written, the other knows again.
    monkeypatch.setattr(eval_ppl, "window_losses", None)
    assert eval_ppl.main([*command, "--json", str(tmp_path / "streamed.json")]) == 0
    assert eval_ppl.main([*command, "--stream", "--json", str(tmp_path / "whole.json")]) == 0
    assert "streaming" not in capsys.readouterr().err


def test_streaming_follows_rope_and_dtype(tiny, tmp_path, sample_calibration):
    options = "--scheme channel-static --bits 3 --sinks 2 --limit 2 --calib-windows 2 --rope pre --dtype bfloat16".split()
    for name, how in (("whole", []), ("streamed", ["--stream"])):
        assert eval_ppl.main([*tiny, *options, *how, "--json", str(tmp_path / f"{name}.json")]) == 0
    assert same_results(tmp_path / "whole.json", tmp_path / "streamed.json")


def test_a_run_says_what_it_will_take(tiny, capsys, sample_calibration):
    rows = "--scheme token-static --keep none pfn --sinks 2 --bits 4 --limit 3 --calib-windows 2 --stream".split()
    assert eval_ppl.main([*tiny, *rows]) == 0
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("streaming ")
    ]
    size = 3 * 64 * 32 * 4 / 2**20  # one row: three windows of 64 tokens, 32 channels, fp32
    assert "6 blocks 5 times" in line  # three rows and two calibrations
    assert (
        f"{size:.1f} MiB of hidden states in host memory" in line and "on cpu for a block" in line
    )


def test_the_time_that_is_announced(capsys, monkeypatch, tmp_path):
    """By hand: 3 blocks; a pass of 2 windows waits for the disk, one of 10 for the computing: 3 (5
    + 10) s."""
    model = stream.from_pretrained(write_model(tmp_path, SMALL), "cpu", torch.float32)
    monkeypatch.setattr(stream, "trial", lambda model, window: (5.0, 1.0))
    stream.announce(model, TOKENS, [2, 10])
    assert "about 45 s" in capsys.readouterr().err


def test_memory_on_the_device_is_about_what_a_block_takes():
    """LLaMA2-70B in fp16: 1.6 GiB a block, 1 GiB outside; with windows of 4,096 tokens far below a
    card of 24 GB."""
    config = LlamaConfig.from_dict({
        **SMALL, "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_hidden_layers": 80,
    })  # fmt: skip
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict({**SMALL, "num_hidden_layers": 1}))
    weights = stream.device_memory(model.config, 0, 4)
    assert (
        weights == 4 * sum(p.numel() for p in model.parameters()) - 4 * 64
    )  # all but the last norm
    assert 2.5 < stream.device_memory(config, 0, 2) / 2**30 < 2.8
    assert 4 < stream.device_memory(config, 4096, 2) / 2**30 < 8


def test_killed_a_run_goes_on_after_the_last_row_in_its_file(tiny, tmp_path, reads):
    out = tmp_path / "out.json"
    command = [*tiny, *"--scheme token-dynamic --bits 2 4 --sinks 1 2 3 --limit 5".split()]
    assert eval_ppl.main([*command, "--json", str(tmp_path / "whole.json")]) == 0
    command += ["--stream", "--json", str(out)]
    process = subprocess.Popen(
        [sys.executable, "eval_ppl.py", *command],
        cwd=HERE,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not (out.exists() and len(results_of(out)) >= 3):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    done = len(results_of(out))
    assert process.returncode == -signal.SIGKILL and 3 <= done < 15
    reads.clear()
    assert eval_ppl.main(command) == 0 and len(reads) == 1 + 6 * (15 - done)
    assert same_results(tmp_path / "whole.json", out)


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


def test_two_ranks_stream_together(tiny, tmp_path):
    """torchrun with gloo: each rank with its windows, whether streamed or not."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    arguments = [
        *tiny,
        *"--scheme token-dynamic --keep kvsink --sinks 2 --bits 3 --limit 5".split(),
    ]
    assert eval_ppl.main([*arguments, "--json", str(one)]) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "eval_ppl.py",
    ]
    command += [*arguments, "--stream", "--json", str(two)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert same_results(one, two)


def test_what_is_not_finite_names_its_block_when_streamed(tiny, tmp_path, capsys):
    write_model(tmp_path, {**PLANTED, "vocab_size": 300})
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    weights = load_file(tmp_path / "model.safetensors")
    command = [
        *tiny,
        "--model",
        str(tmp_path),
        "--scheme",
        "token-dynamic",
        "--limit",
        "1",
        "--stream",
    ]
    for key, where in (
        ("model.layers.3.mlp.down_proj.weight", "block 4 of 6"),
        ("lm_head.weight", "the output layer"),
    ):
        write_weights(tmp_path, {**weights, key: torch.full_like(weights[key], torch.nan)})
        assert eval_ppl.main(command) == 2
        assert (
            f"full precision: NaN or inf first appeared in {where}"
            in capsys.readouterr().err.splitlines()[-1]
        )
    write_weights(
        tmp_path,
        {**weights, "model.layers.1.self_attn.k_proj.weight": torch.full((16, 32), torch.nan)},
    )
    assert eval_ppl.main(command) == 2
    assert (
        "full precision: NaN or inf first appeared in block 2 of 6"
        in capsys.readouterr().err.splitlines()[-1]
    )


def test_streaming_the_default_model_changes_no_digit(default_model, tmp_path):
    """Two windows of 128 tokens; other schemes are the tiny model's."""
    options = "--scheme channel-static --bits 4 --keep kvsink --sinks 5".split()
    options += "--seq-len 128 --limit 2 --calib-windows 2 --no-compile".split()
    whole, streamed = tmp_path / "whole.json", tmp_path / "streamed.json"
    for out, how in ((whole, []), (streamed, ["--stream"])):
        assert eval_ppl.main([*options, *how, "--json", str(out)]) == 0
    assert same_results(whole, streamed) and len(results_of(whole)) == 2
