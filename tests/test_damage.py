"""Wrong inputs, several writers and killed runs, for all commands: one line that says so, and never
a wrong number. Wrong inputs of one module alone are in its own test file."""

import functools
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
import llama
from llama import Llama, LlamaConfig, checkpoint_names
from paper import __main__ as whole_paper
from paper import command, figures, generate, kvquant, table1, table2, table3, table4
from support import evaluate, hub, results, site
from support.tokenizer import Tokenizer
from tests.helpers import (
    DIGITS,
    HERE,
    RESULT,
    SMALL,
    STRONG,
    bytes_vocabulary,
    refuse,
    results_of,
    sample_documents,
    write_bpe,
    write_model,
    write_weights,
)

DEEP = "[" * 100_000
HUGE = "1" + "0" * 400  # JSON allows it, float does not


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if a model is made before the input is refused."""
    monkeypatch.setattr(Llama, "__init__", lambda *_: pytest.fail("a model was made"))


def one_line(error, *words):
    """Assert that the message of an error is one line that has all the words."""
    text = str(error.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


# --------------------------------------------------------------------------------------------------
# Options of commands


@pytest.mark.parametrize("program, change, words", [
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
    (eval_ppl, ["--model", ""], ["no model ''", "known names"]),
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
    (table2, ["--calibration", "/"], ["/ exists and is not a file"]),
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
def test_options_that_cannot_be(program, change, words, tiny, capsys, no_weights):
    base = tiny if program in (eval_ppl, table2) else tiny[:2]
    refuse([*base, *change], words, capsys, program)


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
    # Names and shapes of its weights are those of a LLaMA.
    "bitnet": {"quant_method": "bitnet", "quantization_mode": "online"},
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
    write_bpe(tmp_path, bytes_vocabulary(), DIGITS)
    words = ["config.json", f"quantized ({method})"]
    for program, options in ((eval_ppl, tiny[2:]), (table1, []), (generate, [])):
        refuse(["--model", str(tmp_path), *options], words, capsys, program)


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
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    for name in ("pytorch_model.bin", "training_args.bin", "original.pth"):
        (tmp_path / name).write_text("{}")
    assert hub.model_directory(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").rename(tmp_path / hub.INDEX)
    assert hub.model_directory(str(tmp_path)) == tmp_path


def test_a_llama_without_its_output_layer_is_named(tmp_path):
    """LlamaModel.save_pretrained writes the same tensors, without `model.` before their names."""
    write_model(tmp_path, SMALL)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    write_weights(tmp_path, {key.removeprefix("model."): weight for key, weight in weights.items()})
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path)
    one_line(error, "LlamaModel", "LlamaForCausalLM")


# --------------------------------------------------------------------------------------------------
# config.json

WHOLE_NUMBERS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
]


@pytest.mark.parametrize("change, words", [
    ({"architectures": {"a": 1}}, ["architecture", "not supported"]),
    ({"architectures": 7}, ["architecture 7"]),
    ({"architectures": [["LlamaForCausalLM"]]}, ["architecture"]),
    # So many heads would have 0 channels each: the message may name another number of heads.
    *[({key: 2**65}, ["num_" if key == "num_attention_heads" else key]) for key in WHOLE_NUMBERS],
    *[({key: -4}, ["-" if key == "num_attention_heads" else key]) for key in WHOLE_NUMBERS],
    ({"vocab_size": 1e30}, ["vocab_size is 1e+30"]),
    ({"hidden_size": True}, ["hidden_size"]),
    ({"hidden_size": [64]}, ["not a number"]),
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
    b"", b"[]", b"null", b"3", b"{", b"\xff\xfe{}", DEEP.encode(),
    b'{"hidden_size": 1' + b"0" * 5000 + b"}",
])  # fmt: skip
def test_a_config_json_that_is_no_configuration(content, tiny, capsys, tmp_path, no_weights):
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


@pytest.mark.parametrize("which, words", [
    ("one of each block", "is missing (160000 in all)"),
    ("all", "has shape (0,), config.json asks for"),
])  # fmt: skip
def test_many_blocks_of_empty_tensors_are_refused_at_once(which, words, tmp_path, monkeypatch):
    """Names first, then the shapes of one block, and only then a module for each block, which takes
    minutes and gigabytes."""
    L = 20_000
    config = LlamaConfig.from_dict({**SMALL, "num_hidden_layers": L})
    names = checkpoint_names(config)
    if which != "all":
        names = [key for key in names if "layers" not in key or "q_proj" in key]
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, empty)).encode()
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": L}))
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    blocks = []
    block = llama.Block
    monkeypatch.setattr(llama, "Block", lambda config: blocks.append(1) or block(config))
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path)
    one_line(error, words)
    assert len(blocks) <= 1


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
    b"", b"\xff" * 64, b"\2" + bytes(7) + b"[]",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n",
    b"<!DOCTYPE html><html>Sign in</html>",
])  # fmt: skip
def test_files_that_are_not_weights(content, tiny, capsys, tmp_path, no_weights):
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


@pytest.mark.parametrize("name", [
    "", "/", "/dev/zero", "x\0y", "\udcff", "wiki-sampel", "~nobody-of-that-name/text",
])  # fmt: skip
def test_names_that_are_not_texts(name):
    with pytest.raises(OSError) as error:
        hub.documents(name)
    one_line(error, "no text")


@pytest.mark.parametrize("content", [
    b"null", b"[{}]", b"[[]]", b"\xff", b"\xef\xbb\xbf[]", DEEP.encode(), b'[{"ppl": NaN}]',
    b"[1" + b"0" * 5000 + b"]",
])  # fmt: skip
def test_files_that_are_not_results(content, capsys, tmp_path):
    """Neither eval_ppl.py nor Figure 9 reads them; the file stays as it is."""
    path = tmp_path / "out.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        results.read_results(path)
    one_line(error, str(path), "left as it is")
    options = f"--fig 9 --json {path} --out {tmp_path}".split()
    refuse(options, [str(path)], capsys, figures)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("change", [
    {"sinks": int(HUGE)}, {"outliers": [1]}, {"seq_len": [64]}, {"model": "\ud800"},
    {"data": "\udfff"}, {"ppl": None},
])  # fmt: skip
def test_a_row_that_cannot_be_is_not_drawn(change, capsys, tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps([RESULT]))
    options = f"--fig 9 --json {path} --out {tmp_path}/pictures".split()
    assert figures.main(options) == 0
    (tmp_path / "pictures").rename(tmp_path / "good pictures")
    capsys.readouterr()
    path.write_text(json.dumps([RESULT | change]))
    refuse(options, ["left as it is"], capsys, figures)
    assert not (tmp_path / "pictures").exists()


# --------------------------------------------------------------------------------------------------
# Several writers


def fork(work):
    """Do the work in another process and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def exit_code_or_signal(child):
    """Wait for a process. Return 0 if it ended well, or the signal that killed it."""
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("attempt", range(20))
def test_four_processes_write_to_one_file(attempt, tmp_path):
    """No row is lost, and none is there twice, not even one that all four have measured; nothing
    else is left beside the file."""
    path = tmp_path / "out.json"

    def write(writer):
        for i in range(5):
            results.add_result(path, {**RESULT, "bits": 100 * writer + i})
        results.add_result(path, {**RESULT, "bits": 1000, "seconds": writer})

    children = [fork(lambda writer=writer: write(writer)) for writer in range(4)]
    assert [exit_code_or_signal(child) for child in children] == [0] * 4
    expected = [100 * writer + i for writer in range(4) for i in range(5)]
    bits = [result["bits"] for result in results.read_results(path)]
    assert sorted(bits) == [*expected, 1000]
    assert sorted(os.listdir(tmp_path)) == [".out.json.lock", "out.json"]


# --------------------------------------------------------------------------------------------------
# Killed runs

PROGRAMS = {"eval_ppl": eval_ppl, "table2": table2, "table1": table1, "figures": figures}
MOMENTS = (
    "at the first row",
    "before it is written",
    "half of it is written",
    "not in its place",
    "in its place",
)
# Patterns of temporary names: a file is written under one of them, then moved to its place.
RESULTS_FILE = r"out\.json\.[0-9a-f]{32}"
CALIBRATION_FILE = r"[0-9a-f]{16}\.safetensors\.[0-9a-f]{32}"
SITE_FILE = r"[0-9a-f]+.*\.json\.[0-9a-f]{32}"
PICTURE = r"fig.*\.[0-9a-f]{32}"

SITE_PROMPTS = (f"ab{chr(STRONG)}", f"cde{chr(STRONG)}f")  # they show the tiny model's outliers


def moments_of(name):
    """Return the moments at which runs of a program are killed. A table or a picture is written
    once, at the end, and nothing was there before."""
    return MOMENTS if name in ("eval_ppl", "table2") else MOMENTS[2:4]


def even_codebooks(x, w, k):
    """A stand-in for kvquant.weighted_kmeans: here it does not matter where the levels lie."""
    return torch.linspace(-1, 1, k).double().expand(len(x), k)


def one_window(config, loaded):
    """A stand-in for the calibration windows of Table 1 and Figure 7."""
    return torch.arange(32, 96)[None]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_be_killed(program, file, moment, arguments):
    """Run a command that is killed at a moment of writing a file whose temporary name matches the
    pattern `file`: the third such file if it is the results, which are written row by row, else
    the first."""
    files_left = 3 if file == RESULTS_FILE else 1
    write_bytes = Path.write_bytes
    replace = os.replace

    def write_or_die(path, data):
        nonlocal files_left
        if re.fullmatch(file, path.name):
            files_left -= 1
        if files_left == 0 and moment == "before it is written":
            die()
        if files_left == 0 and moment == "half of it is written":
            write_bytes(path, data[: len(data) // 2])
            die()
        return write_bytes(path, data)

    def replace_or_die(*names):
        if files_left == 0 and moment == "not in its place":
            die()
        replace(*names)
        if files_left == 0 and moment == "in its place":
            die()

    Path.write_bytes = write_or_die
    os.replace = replace_or_die
    if moment == "at the first row":
        evaluate.row_batches = lambda *_: die()
    program.main(arguments)


def killed_runs(name, file, folder, *arguments):
    """Run a command once for each moment, each time in a process and a folder of its own, and kill
    it. Print how each process ended."""
    torch.set_num_threads(1)  # a forked process has no other thread
    kvquant.weighted_kmeans = even_codebooks
    hub.documents = sample_documents
    site.PROMPTS = SITE_PROMPTS
    command.calibration_windows = one_window
    for i, moment in enumerate(moments_of(name)):
        os.environ["KVSINK_CACHE"] = f"{folder}/{i}/cache"
        output = ["--out", f"{folder}/{i}"]
        if name in ("eval_ppl", "table2"):
            output = ["--json", f"{folder}/{i}/out.json"]
        options = [*arguments, *output]
        run = functools.partial(run_and_be_killed, PROGRAMS[name], file, moment, options)
        print(exit_code_or_signal(fork(run)))


def be_killed(name, file, arguments, tmp_path):
    """Call `killed_runs` in a process that has started no threads. Return the folders of the runs;
    there is one for an undisturbed run, too."""
    folders = [tmp_path / str(i) for i in range(len(moments_of(name)))]
    for folder in (tmp_path / "undisturbed", *folders):
        folder.mkdir()
    code = "import sys; from tests import test_damage; test_damage.killed_runs(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, name, file, str(tmp_path), *arguments],
        cwd=HERE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    ends = [line for line in done.stdout.splitlines() if line.isdecimal()]
    assert ends == [str(int(signal.SIGKILL))] * len(folders), done.stderr
    return folders


@pytest.fixture
def kill_and_run_again(tmp_path, monkeypatch, capsys):
    """A function that kills a command at each moment and runs it again. It yields the moment, the
    folder, how many rows the killed run left, and what the next run says on stderr. The rows of the
    next run have to be those of an undisturbed one."""
    monkeypatch.setattr(kvquant, "weighted_kmeans", even_codebooks)
    monkeypatch.setattr(hub, "documents", sample_documents)

    def run(name, arguments, folder):
        monkeypatch.setenv("KVSINK_CACHE", str(folder / "cache"))
        capsys.readouterr()
        out = folder / "out.json"
        assert PROGRAMS[name].main([*arguments, "--json", str(out)]) == 0
        return [{**row, "seconds": 0} for row in results_of(out)]

    def kill_and_run_again(name, file, arguments):
        folders = be_killed(name, file, arguments, tmp_path)
        expected = run(name, arguments, tmp_path / "undisturbed")
        for moment, folder in zip(moments_of(name), folders):
            out = folder / "out.json"
            rows = len(results_of(out)) if out.exists() else 0
            assert run(name, arguments, folder) == expected, moment
            yield moment, folder, rows, capsys.readouterr().err

    return kill_and_run_again


def check_leftovers(moment, log):
    """Assert that the next run removes the file that a killed run has begun, and says so."""
    begun = moment in ("half of it is written", "not in its place")
    removed = re.search(r"removed leftovers of interrupted runs in \S+: 1 in all", log)
    assert bool(removed) == begun, moment


def test_killed_at_any_moment_a_run_spoils_nothing(tiny, kill_and_run_again):
    """kill -9 while the third row is written; the next run leaves the JSON file and its lock."""
    rows = "--scheme token-dynamic --keep pfn kvsink --sinks 3 --bits 3 2 --limit 2".split()
    rows_left = []
    for moment, folder, rows_done, log in kill_and_run_again(
        "eval_ppl", RESULTS_FILE, [*tiny, *rows]
    ):
        rows_left.append(rows_done)
        assert sorted(os.listdir(folder)) == [".out.json.lock", "out.json"], moment
        check_leftovers(moment, log)
    assert rows_left == [0, 2, 2, 2, 3]


def test_killed_while_it_keeps_a_calibration_a_run_spoils_nothing(tiny, kill_and_run_again):
    """kill -9 while KVQuant's calibration is written; the next run leaves it, its SHA-256 and its
    lock in our cache."""
    rows = "--limit 1 --calib-windows 2 --outliers 0.01 --keep kvsink".split()
    for moment, folder, _, log in kill_and_run_again("table2", CALIBRATION_FILE, [*tiny, *rows]):
        assert sorted(os.listdir(folder)) == [".out.json.lock", "cache", "out.json"], moment
        kept = sorted(path.name for path in (folder / "cache" / "kvquant").iterdir())
        (calibration,) = [name for name in kept if name.endswith(".safetensors")]
        assert kept == [f".{calibration}.lock", calibration, f"{calibration}.sha256"], moment
        without_record = "no record of its SHA-256: recreating it" in log
        assert without_record == (moment == "in its place"), moment
        check_leftovers(moment, log)


@pytest.mark.parametrize("name, file, options", [
    ("table1", SITE_FILE, []),
    ("figures", PICTURE, ["--fig", "2"]),
], ids=["site", "picture"])  # fmt: skip
def test_killed_while_it_writes_a_site_or_a_picture_a_run_spoils_nothing(
    name, file, options, tiny, tmp_path, monkeypatch
):
    """kill -9 while the site that the finder found is written, or a picture is; the next run gives
    the same bytes and leaves no more files than an undisturbed one."""
    monkeypatch.setattr(hub, "documents", sample_documents)
    monkeypatch.setattr(site, "PROMPTS", SITE_PROMPTS)
    monkeypatch.setattr(command, "calibration_windows", one_window)
    arguments = [*tiny[:2], "--prompt", f"Some text{chr(STRONG)} and more of it", *options]

    def run(folder):
        """Return name -> content of each file; of a SHA-256's record, which has times, None."""
        monkeypatch.setenv("KVSINK_CACHE", str(folder / "cache"))
        assert PROGRAMS[name].main([*arguments, "--out", str(folder)]) == 0
        contents = {}
        for path in folder.rglob("*"):
            if path.is_file():
                is_record = path.suffix == ".sha256"
                contents[str(path.relative_to(folder))] = None if is_record else path.read_bytes()
        return contents

    folders = be_killed(name, file, arguments, tmp_path)
    expected = run(tmp_path / "undisturbed")
    for moment, folder in zip(moments_of(name), folders):
        assert run(folder) == expected, moment
