"""Wrong inputs, writers that meet and runs that are killed: one line that says so, and never a
wrong number.

Wrong inputs that belong to one module alone are in its own test file; here are the kinds that hold
for all commands.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_ppl
from llama import Llama, LlamaConfig
from paper import __main__ as whole_paper
from paper import activations, figures, generate, kvquant, table1, table2, table3, table4
from paper import command as shared
from support import hub, results, site
from support.tokenizer import Tokenizer
from tests.helpers import (
    DIGITS,
    HERE,
    SMALL,
    STRONG,
    bytes_vocabulary,
    refuse,
    results_of,
    write_bpe,
    write_model,
    write_weights,
)

DEEP = "[" * 100_000
HUGE = "1" + "0" * 400  # JSON allows it, float does not


@pytest.fixture
def no_weights(monkeypatch):
    """What is refused here is refused before a model is made."""
    monkeypatch.setattr(Llama, "__init__", lambda *_: pytest.fail("a model was made"))


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# --------------------------------------------------------------------------------------------------
# Options of commands


@pytest.mark.parametrize("command, change, words", [
    (eval_ppl, ["--rope", "mid"], ["--rope", "mid"]),
    (eval_ppl, ["--keep", "all"], ["--keep", "all"]),
    (eval_ppl, ["--dtype", "int4"], ["--dtype", "int4"]),
    (eval_ppl, ["--device", ""], ["--device"]),
    (eval_ppl, ["--device", "cpu\n"], ["--device cpu"]),
    (eval_ppl, ["--seq-len", "1"], ["--seq-len", "at least 2"]),
    (eval_ppl, ["--seq-len", "1e3"], ["--seq-len", "'1e3'"]),
    (eval_ppl, ["--limit", "-1"], ["--limit", "at least 1"]),
    (eval_ppl, ["--calib-windows", "0"], ["--calib-windows", "at least 1"]),
    (eval_ppl, ["--seed", "1.5"], ["--seed", "1.5"]),
    (eval_ppl, ["--layer", "two"], ["--layer", "'two'"]),
    (eval_ppl, ["--channel", "-3"], ["--channel", "at least 0"]),
    (eval_ppl, ["--channel", HUGE], ["channels 0 to 31"]),
    (eval_ppl, ["--bits", ""], ["--bits", "''"]),
    (eval_ppl, ["--sinks", HUGE], ["--sinks", "window of 64"]),
    (eval_ppl, ["--sinks", "9" * 5000], ["--sinks", "not a whole number"]),
    (eval_ppl, ["--model", ""], ["no model ''", "nearest"]),
    (eval_ppl, ["--model", "x\0y"], ["no model"]),
    (eval_ppl, ["--model", "\udcff"], ["no model"]),
    (eval_ppl, ["--model", "/"], ["no config.json"]),
    (eval_ppl, ["--model", "/dev/null"], ["/dev/null"]),
    (eval_ppl, ["--model", "https://huggingface.co/org/name"], ["web address", "org/name"]),
    (eval_ppl, ["--data=--"], ["--data=--", "value"]),
    (eval_ppl, ["--json", ""], ["not a file"]),
    (eval_ppl, ["--json", "x" * 230], ["name xxxx", "too long"]),
    (eval_ppl, ["--json", "/nowhere/\udcff"], ["/nowhere", "cannot write"]),
    (eval_ppl, ["--plot", "fig9"], [".png"]),
    (eval_ppl, ["--plot", "/nowhere/fig9.png"], ["/nowhere"]),
    (eval_ppl, ["--stream=yes"], ["--stream"]),
    (eval_ppl, ["--no-such"], ["--no-such", "--help"]),
    (eval_ppl, ["--bits"], ["--bits", "expected"]),
    (table1, ["--prompt"], ["--prompt", "expected"]),
    (table1, ["--model=--"], ["--model=--", "value"]),
    (table1, ["--model", "model.Q4_0.gguf"], ["GGUF"]),
    (table1, ["--device", "cpu:x"], ["--device cpu:x"]),
    (table2, ["--bits", "1"], ["--bits", "from 2 to 4"]),
    (table2, ["--keep", "some"], ["--keep", "some"]),
    (table2, ["--outliers", "-0.1"], ["--outliers", "0 to 0.5"]),
    (table2, ["--outliers", "inf"], ["--outliers", "inf"]),
    (table2, ["--limit", "none"], ["--limit", "'none'"]),
    (table2, ["--seed", HUGE], ["--seed", "not a whole number"]),
    (table2, ["--calibration", "/"], ["is there and is not a file"]),
    (table2, ["--json", "/dev/null"], ["/dev/null"]),
    (table2, ["--model", "hf.co/org/name"], ["web address"]),
    (table3, ["--model", "lora/adapter_config.json"], ["LoRA adapter"]),
    (table3, ["--model", "consolidated.00.pth"], ["Meta's own format"]),
    (table3, ["--dtype", "half"], ["--dtype", "half"]),
    (table4, ["--only", "all"], ["--only", "all"]),
    (table4, ["--vs", "vllm"], ["--vs", "vllm"]),
    (table4, ["--repeats", "0"], ["--repeats", "at least 1"]),
    (table4, ["--seq-len", "31"], ["--seq-len", "from 32"]),
    (table4, ["--model", "x\0y"], ["no model"]),
    (generate, ["--seed", HUGE], ["--seed", "not a whole number"]),
    (generate, ["--temperature", "warm"], ["--temperature", "warm"]),
    (generate, ["--temperature", "inf"], ["--temperature"]),
    (generate, ["--temperature", "1e-40"], ["--temperature"]),  # 0 in fp32
    (generate, ["--top-p", "1e-50"], ["--top-p"]),
    (generate, ["--top-p", "1.1"], ["--top-p"]),
    (generate, ["--max-new-tokens", HUGE], ["--max-new-tokens"]),
    (generate, ["--prompt", "half a pair \udc80"], ["cannot encode"]),
    (generate, ["--sinks", "0"], ["--sinks", "at least 1"]),
    (figures, ["--fig", "0"], ["'0'", "the paper's figures"]),
    (figures, ["--fig", "²"], ["'²'", "the paper's figures"]),
    (figures, ["--fig", ""], ["''", "the paper's figures"]),
    (figures, ["--layer", HUGE], ["layers 0 to 5"]),
    (figures, ["--fig", "9", "--json", "/"], ["--json /", "no such file"]),
    (whole_paper, ["--out", "/dev/null/x"], ["cannot write"]),
    (whole_paper, ["--format", "png"], ["--format"]),
])  # fmt: skip
def test_options_that_cannot_be(command, change, words, tiny, capsys, no_weights):
    base = tiny if command in (eval_ppl, table2) else tiny[:2]
    refuse([*base, *change], words, capsys, command)


# --------------------------------------------------------------------------------------------------
# Checkpoints of other kinds

QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "bitsandbytes": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "bitnet": {
        "quant_method": "bitnet",
        "quantization_mode": "online",
    },  # whose names and shapes fit
    "unnamed": {"load_in_8bit": True},  # as old files have it
    "GPTQ": "GPTQ",
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_refused_by_their_method(method, tiny, capsys, tmp_path, no_weights):
    change = {"quantization_config": QUANTIZED[method]}
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_dict({**SMALL, **change})
    one_line(error, f"quantized ({method})", "fp16, bf16 or fp32")
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **change}))
    for command, options in ((eval_ppl, tiny[2:]), (table1, []), (generate, [])):
        write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
        refuse(
            ["--model", str(tmp_path), *options],
            ["config.json", f"quantized ({method})"],
            capsys,
            command,
        )


@pytest.mark.parametrize("files, words", [
    (["config.json", "pytorch_model.bin"],
     ["FOLDER holds pickled", "from_pretrained('FOLDER').save_pretrained"]),
    (["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
     ["FOLDER holds pickled"]),
    (["adapter_config.json", "adapter_model.safetensors"], ["FOLDER is a LoRA adapter", "merge"]),
    (["config.json", "adapter_config.json", "adapter_model.bin"], ["FOLDER is a LoRA adapter"]),
    (["llama.Q4_K_M.gguf", "README.md"], ["FOLDER is in llama.cpp's GGUF"]),
    (["consolidated.00.pth", "params.json", "tokenizer.model"],
     ["FOLDER is in Meta's own format", "-hf"]),
])  # fmt: skip
def test_a_directory_in_another_format_is_called_what_it_is(
    files, words, tiny, capsys, tmp_path, no_weights
):
    for name in files:
        (tmp_path / name).write_text("{}")
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    with pytest.raises(ValueError) as error:
        hub.model_directory(str(tmp_path))
    one_line(error, *words)
    refuse([*tiny, "--model", str(tmp_path)], words, capsys, eval_ppl)


def test_a_model_may_lie_beside_files_in_other_formats(tmp_path):
    for name in (
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "original.pth",
    ):
        (tmp_path / name).write_text("{}")
    assert hub.model_directory(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").rename(tmp_path / hub.INDEX)
    assert hub.model_directory(str(tmp_path)) == tmp_path


def test_a_llama_without_its_output_layer_is_named(tmp_path):
    """What LlamaModel.save_pretrained writes: the same tensors without `model.` before their
    names."""
    write_model(tmp_path, SMALL)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    write_weights(tmp_path, {key.removeprefix("model."): weight for key, weight in weights.items()})
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path)
    one_line(error, "LlamaModel", "LlamaForCausalLM")


# --------------------------------------------------------------------------------------------------
# config.json

WHOLE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings"]  # fmt: skip


@pytest.mark.parametrize("change, words", [
    ({"architectures": {"a": 1}}, ["architecture", "not supported"]),
    ({"architectures": 7}, ["architecture 7"]),
    ({"architectures": [["LlamaForCausalLM"]]}, ["architecture"]),
    *[({key: 2**65}, [key]) for key in WHOLE if key != "num_attention_heads"],
    ({"num_attention_heads": 2**65}, ["num_"]),  # a head of 0 channels
    *[({key: -4}, [key if key != "num_attention_heads" else "-"]) for key in WHOLE],
    ({"vocab_size": 1e30}, ["vocab_size is 1e+30"]),
    ({"hidden_size": True}, ["hidden_size"]),
    ({"hidden_size": [64]}, ["numbers"]),
    ({"head_dim": 15}, ["do not fit"]),
    ({"rope_theta": math.inf}, ["rope_theta is inf"]),
    ({"rope_theta": math.nan}, ["rope_theta is nan"]),
    ({"rope_theta": int(HUGE)}, ["rope_theta is 1000"]),
    ({"rope_theta": -1.0}, ["rope_theta is -1.0"]),
    ({"rms_norm_eps": 0}, ["rms_norm_eps is 0"]),
    ({"rms_norm_eps": int(HUGE)}, ["rms_norm_eps is 1000"]),
    ({"rope_parameters": [1]}, ["rope_scaling"]),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, ["rope_factor is 0"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
    ({"tie_word_embeddings": "false"}, ["tie_word_embeddings is 'false'"]),
    ({"tie_word_embeddings": 0}, ["tie_word_embeddings is 0"]),
])  # fmt: skip
def test_configurations_that_cannot_be(change, words):
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_dict({**SMALL, **change})
    one_line(error, *words)


@pytest.mark.parametrize("content", [
    b"", b"[]", b"null", b"3", b"{", b"\xff\xfe{}", DEEP.encode(), b'{"hidden_size": 1' + b"0" * 5000 + b"}",
])  # fmt: skip
def test_a_config_json_that_is_none(content, tiny, capsys, tmp_path, no_weights):
    (tmp_path / "config.json").write_bytes(content)
    refuse([*tiny, "--model", str(tmp_path)], [f"{tmp_path / 'config.json'}: "], capsys, eval_ppl)


@pytest.mark.parametrize("change, words", [
    ({"num_hidden_layers": 1_000_000_000}, ["more blocks than there are tensors"]),
    ({"vocab_size": 2**31 - 1}, ["config.json"]),
    ({"hidden_size": 2**31 - 4, "intermediate_size": 2**31 - 1}, ["config.json"]),
])  # fmt: skip
def test_a_model_larger_than_its_file_is_refused_at_once(change, words, tiny, capsys, tmp_path):
    write_model(tmp_path, SMALL)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **change}))
    refuse([*tiny, "--model", str(tmp_path), "--group-size", "2"], words, capsys, eval_ppl)


@pytest.mark.parametrize("index, words", [
    ({"k": 7}, "no readable weight_map"),
    ({"k": "/etc/passwd"}, "outside"),
    ({"k": "../model/model.safetensors"}, "outside"),
    ({"k": ""}, "outside"),
    ({"k": "config.json"}, "config.json: not a whole safetensors file"),
    ({}, "more blocks than there are tensors"),
])  # fmt: skip
def test_an_index_that_cannot_be(index, words, tiny, capsys, tmp_path, no_weights):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / hub.INDEX).write_text(json.dumps({"weight_map": index}))
    refuse([*tiny, "--group-size", "2", "--model", str(tmp_path)], [words], capsys, eval_ppl)


@pytest.mark.parametrize("content", [
    b"", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n",
    b"\2" + bytes(7) + b"[]", b"<!DOCTYPE html><html>Sign in</html>",
])  # fmt: skip
def test_weights_that_are_none(content, tiny, capsys, tmp_path, no_weights):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "model.safetensors").write_bytes(content)
    words = ["model.safetensors: not a whole safetensors file"]
    refuse([*tiny, "--group-size", "2", "--model", str(tmp_path)], words, capsys, eval_ppl)


# --------------------------------------------------------------------------------------------------
# Tokenizers, texts, results


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer.json", b"\xef\xbb\xbf{}", "tokenizer.json"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
     "tokenizer.json"),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": [], "merges": []}}', "tokenizer.json"),
    ("tokenizer.model", b"\0" * 4096, "tokenizer.model"),
    ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n",
     "tokenizer.model"),
    ("vocab.json", b"{}", "no tokenizer.model and no tokenizer.json"),
])  # fmt: skip
def test_files_that_are_not_tokenizers(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        Tokenizer.from_pretrained(tmp_path)
    one_line(error, words)


@pytest.mark.parametrize(
    "name", ["", "/", "/dev/zero", "x\0y", "\udcff", "wiki-sampel", "~nobody-of-that-name/text"]
)
def test_names_that_are_not_texts(name):
    with pytest.raises(OSError) as error:
        hub.documents(name)
    one_line(error, "no text")


@pytest.mark.parametrize("content", [
    b"null", b"[{}]", b"[[]]", b"\xff", DEEP.encode(), b"[1" + b"0" * 5000 + b"]", b'[{"ppl": NaN}]', b"\xef\xbb\xbf[]",
])  # fmt: skip
def test_results_that_are_none(content, capsys, tmp_path):
    """As eval_ppl.py and Figure 9 read them; the file stays as it is."""
    path = tmp_path / "out.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        results.read_results(path)
    one_line(error, str(path), "left as it is")
    refuse(
        ["--fig", "9", "--json", str(path), "--out", str(tmp_path)], [str(path)], capsys, figures
    )
    assert path.read_bytes() == content and sorted(os.listdir(tmp_path)) == ["out.json"]


ROW = {
    "model": "m",
    "data": "d",
    "scheme": "token-static",
    "keep": "none",
    "sinks": 0,
    "bits": 4,
    "ppl": 1.0,
    "ppl_fp": 1.0,
}


@pytest.mark.parametrize("change", [
    {"sinks": int(HUGE)}, {"outliers": [1]}, {"seq_len": [64]}, {"model": "\ud800"}, {"data": "\udfff"}, {"ppl": None},
])  # fmt: skip
def test_a_row_that_cannot_be_is_not_drawn(change, capsys, tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps([ROW]))
    assert figures.main(["--fig", "9", "--json", str(path), "--out", str(tmp_path / "good")]) == 0
    capsys.readouterr()
    path.write_text(json.dumps([ROW | change]))
    refuse(
        ["--fig", "9", "--json", str(path), "--out", str(tmp_path / "bad")],
        ["left as it is"],
        capsys,
        figures,
    )
    assert not (tmp_path / "bad").exists()


# --------------------------------------------------------------------------------------------------
# Several writers


def fork(work):
    """Do the work in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("attempt", range(20))
def test_four_processes_write_to_one_file(attempt, tmp_path):
    """No row is lost, none is there twice, also of those that all four have; nothing is left beside
    the file."""
    path = tmp_path / "out.json"

    def write(writer):
        for i in range(5):
            results.add_result(path, {**ROW, "bits": 100 * writer + i})
        results.add_result(
            path, {**ROW, "bits": 1000, "seconds": writer}
        )  # which all of them have measured

    children = [fork(lambda writer=writer: write(writer)) for writer in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    bits = sorted(row["bits"] for row in results.read_results(path))
    assert bits == sorted([*(100 * writer + i for writer in range(4) for i in range(5)), 1000])
    assert sorted(os.listdir(tmp_path)) == [".out.json.lock", "out.json"]


# --------------------------------------------------------------------------------------------------
# Killed runs

MOMENTS = (
    "at the first row",
    "before it is written",
    "half of it is written",
    "not in its place",
    "in its place",
)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_be_killed(program, file, moment, arguments):
    """A command that is killed at a moment of the writing of `file`, a pattern of temporary names,
    which may be of the third time that such a file is written."""
    write, replace, left = Path.write_bytes, os.replace, 3 if "out" in file else 1

    def writing(path, data):
        nonlocal left
        left -= re.fullmatch(file, path.name) is not None
        if left or moment in MOMENTS[3:]:
            return write(path, data)
        write(path, data[: len(data) // 2]) if moment == "half of it is written" else None
        die()

    def replacing(*names):
        die() if left == 0 and moment == "not in its place" else replace(*names)
        die() if left == 0 else None

    Path.write_bytes, os.replace = writing, replacing
    if moment == "at the first row":
        eval_ppl.window_losses = activations.examine = lambda *_: die()
    program.main(arguments)


def moments_of(name):
    """A table or a picture is written once, at the end: nothing was there before."""
    return MOMENTS if name in ("eval_ppl", "table2") else MOMENTS[2:4]


def killed_runs(name, file, folder, *arguments):
    """In a process of its own: a run for each moment, in a folder of its own. Prints how each
    ended."""
    torch.set_num_threads(1)  # a forked process has no other thread
    program = {"eval_ppl": eval_ppl, "table2": table2, "table1": table1, "figures": figures}[name]
    kvquant.weighted_kmeans = even_codebooks
    hub.documents = sample_documents
    site.PROMPTS = SITE_PROMPTS
    shared.calibration_windows = one_window
    for i, moment in enumerate(moments_of(name)):
        os.environ["KVSINK_CACHE"] = f"{folder}/{i}/cache"
        output = (
            ["--json", f"{folder}/{i}/out.json"]
            if name in ("eval_ppl", "table2")
            else ["--out", f"{folder}/{i}"]
        )
        options = [*arguments, *output]
        print(
            os.waitpid(fork(lambda m=moment, o=options: run_and_be_killed(program, file, m, o)), 0)[
                1
            ]
        )


SITE_PROMPTS = (f"ab{chr(STRONG)}", f"cde{chr(STRONG)}f")  # which show the tiny model's outliers


def even_codebooks(x, w, k):
    """It does not matter here where the levels lie."""
    return torch.linspace(-1, 1, k).double().expand(len(x), k)


def one_window(what, loaded):
    """Of Table 1's and Figure 7's calibration."""
    return torch.arange(32, 96)[None]


def sample_documents(name, split="test", real=hub.documents):
    return ["A calibration text of bytes. " * 10] * 20 if split == "train" else real(name, split)


def be_killed(name, file, arguments, tmp_path):
    """A run of the command for each moment; returns their folders. There is one for an undisturbed
    run, too."""
    folders = [tmp_path / str(i) for i in range(len(moments_of(name)))]
    for folder in (tmp_path / "undisturbed", *folders):
        folder.mkdir()
    code = "import sys; from tests import test_damage; test_damage.killed_runs(*sys.argv[1:])"
    run, environment = (
        [sys.executable, "-c", code, name, file, str(tmp_path)],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(
        [*run, *arguments], cwd=HERE, env=environment, capture_output=True, text=True, timeout=300
    )
    ends = [line for line in done.stdout.splitlines() if line.isdecimal()]
    assert ends == [str(int(signal.SIGKILL))] * len(folders), done.stderr
    return folders


def kill_and_run_again(program, name, file, arguments, tmp_path, monkeypatch, capsys):
    """Yields moment, folder, how many rows were there, and what the next run said, whose rows are
    the undisturbed."""
    monkeypatch.setattr(kvquant, "weighted_kmeans", even_codebooks)
    monkeypatch.setattr(hub, "documents", sample_documents)
    folders = be_killed(name, file, arguments, tmp_path)

    def run(folder):
        monkeypatch.setenv("KVSINK_CACHE", str(folder / "cache"))
        capsys.readouterr()
        assert program.main([*arguments, "--json", str(folder / "out.json")]) == 0
        return [{**row, "seconds": 0} for row in results_of(folder / "out.json")]

    expected = run(tmp_path / "undisturbed")
    for moment, folder in zip(MOMENTS, folders):
        out = folder / "out.json"
        rows = len(results_of(out)) if out.exists() else 0
        assert run(folder) == expected, moment
        yield moment, folder, rows, capsys.readouterr().err


def test_killed_at_any_moment_a_run_spoils_nothing(tiny, tmp_path, monkeypatch, capsys):
    """kill -9 while the third row is written; the next run leaves the JSON file and its lock."""
    arguments = [
        *tiny,
        *"--scheme token-dynamic --keep pfn kvsink --sinks 3 --bits 3 2 --limit 2".split(),
    ]
    file, had = r"out\.json\.[0-9a-f]{32}", []
    again = kill_and_run_again(eval_ppl, "eval_ppl", file, arguments, tmp_path, monkeypatch, capsys)
    for moment, folder, rows, said in again:
        had.append(rows)
        assert sorted(os.listdir(folder)) == [".out.json.lock", "out.json"], moment
        removed = re.search(r"removed leftovers of interrupted runs in \S+: 1 in all", said)
        half_written = moment in ("half of it is written", "not in its place")
        assert bool(removed) == half_written, moment
    assert had == [0, 2, 2, 2, 3]


def test_killed_while_it_keeps_a_calibration_a_run_spoils_nothing(
    tiny, tmp_path, monkeypatch, capsys
):
    """kill -9 while KVQuant's calibration is written; the next run leaves it, its SHA-256 and its
    lock in our cache."""
    arguments = [*tiny, *"--limit 1 --calib-windows 2 --outliers 0.01 --keep kvsink".split()]
    file = r"[0-9a-f]{16}\.safetensors\.[0-9a-f]{32}"
    for moment, folder, _, said in kill_and_run_again(
        table2, "table2", file, arguments, tmp_path, monkeypatch, capsys
    ):
        assert sorted(os.listdir(folder)) == [".out.json.lock", "cache", "out.json"], moment
        left = sorted(path.name for path in (folder / "cache" / "kvquant").iterdir())
        (calibration,) = [name for name in left if name.endswith(".safetensors")]
        assert left == [f".{calibration}.lock", calibration, f"{calibration}.sha256"], moment
        assert ("no record of its SHA-256: it is made again" in said) == (
            moment == "in its place"
        ), moment
        removed = re.search(r"removed leftovers of interrupted runs in \S+: 1 in all", said)
        half_written = moment in ("half of it is written", "not in its place")
        assert bool(removed) == half_written, moment


@pytest.mark.parametrize("program, name", [(table1, "table1"), (figures, "figures")])
def test_killed_while_it_writes_a_table_or_a_picture_a_run_spoils_nothing(
    program, name, tiny, tmp_path, monkeypatch
):
    """kill -9 while a picture is written, and while the site that the finder found is; the next run
    gives the same bytes, and leaves no more than the undisturbed."""
    monkeypatch.setattr(hub, "documents", sample_documents)
    monkeypatch.setattr(site, "PROMPTS", SITE_PROMPTS)
    monkeypatch.setattr(shared, "calibration_windows", one_window)
    prompt = ["--prompt", f"Some text{chr(STRONG)} and more of it"]
    arguments = [*tiny[:2], *prompt, *(["--fig", "2"] if name == "figures" else [])]

    def run(folder):
        monkeypatch.setenv("KVSINK_CACHE", str(folder / "cache"))
        assert program.main([*arguments, "--out", str(folder)]) == 0
        there = {
            str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()
        }
        return {
            name: path.read_bytes() for name, path in there.items() if "sha256" not in name
        }, set(there)

    patterns = [
        rf"{name[:3]}.*\.[0-9a-f]{{32}}",
        r"[0-9a-f]+.*\.json\.[0-9a-f]{32}",
    ]  # the last is the site's
    for pattern in patterns[1:] if name == "table1" else patterns[:1]:
        place = tmp_path / pattern[:3]
        place.mkdir()
        folders = be_killed(name, pattern, arguments, place)
        expected = run(place / "undisturbed")
        for moment, folder in zip(moments_of(name), folders):
            assert run(folder) == expected, moment
