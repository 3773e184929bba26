"""Find a checkpoint: a folder as it is, or a model of the hub as a folder of the hub's cache. All else reads that folder only.

A revision in the cache is used without asking the hub. The cache also knows which files a revision does not have, so that a
complete one needs no network. Only the hub's own answer that a file does not exist counts as missing; any other is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from bert_tickets.errors import UserError, cause
from bert_tickets.hub import is_of_disk, patiently

POOLER = "pooler.safetensors"  # beside a model whose class has none, such as BertForQuestionAnswering
CONFIGS = ("config.json", "bert_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt")
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json", POOLER)


def resolve(name: str) -> Path:
    """Return the folder of a checkpoint: `name` itself, or a snapshot of the model `name` in the hub's cache.

    Downloads the model's files that are not in the cache. Raises `UserError`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file: give --model the folder that it is in")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"cannot load a BERT checkpoint from {name}: there is no such folder")
    config, weights, _ = (_fetch_first(name, files) for files in (CONFIGS, WEIGHTS, TOKENIZERS))
    for shard in shards(weights) if weights.suffix == ".json" else []:
        _fetch(name, shard)
    for file in OTHERS:
        _fetch(name, file, needed=False)
    return config.parent


def shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{index} is damaged: it has no weight_map of file names") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{index} is damaged: {cause(error)}") from None


def check_absent(folder: Path, file: str) -> None:
    """Raise `UserError` unless it is certain that a checkpoint does not have a file that its folder lacks."""
    if _cache_of(folder) and not _is_absent(folder, file):
        raise UserError(
            f"{folder} has no {file}, which is needed, and it is not known whether the hub has it: run this command once online, "
            "without HF_HUB_OFFLINE"
        )


def check_download(folder: Path) -> None:
    """Check the files of a snapshot in the hub's cache against the hashes that name them. Raises `UserError`."""
    cache = _cache_of(folder)
    for path in sorted(folder.iterdir()) if cache else []:
        content = path.resolve()
        if content == path or not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", content.name) or not content.is_file():
            continue
        found = {_digest(content, "sha256", b"")}
        if len(content.name) == 40:  # git's hash of a small file; some mirrors name them by the sha1
            found = {_digest(content, "sha1", b"blob %d\0" % content.stat().st_size), _digest(content, "sha1", b"")}
        if content.name not in found:
            raise UserError(
                f"{path} does not match the hash that names its content: the download is damaged. Delete {cache}, and give the "
                "command again"
            )


def _digest(path: Path, algorithm: str, prefix: bytes) -> str:
    sha = hashlib.new(algorithm, prefix)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: sha).hexdigest()


def _cache_of(folder: Path) -> Path | None:
    """The model's folder in the hub's cache, if `folder` is a snapshot there."""
    cache = folder.parent.parent
    return cache if folder.parent.name == "snapshots" and cache.name.startswith("models--") else None


def _is_absent(snapshot: Path, file: str) -> bool:
    """Whether the cache knows that a revision does not have a file: by a mark for it, or by a list of all files."""
    cache = snapshot.parent.parent
    if (cache / ".no_exist" / snapshot.name / file).exists():
        return True
    try:
        from huggingface_hub import get_cached_repo_tree  # huggingface_hub 2; the list is of `hf download`

        tree = get_cached_repo_tree(cache.name.removeprefix("models--").replace("--", "/"), revision=snapshot.name)
    except Exception:
        return False
    return file not in {entry.path for entry in tree}


def _fetch_first(name: str, files: Sequence[str]) -> Path:
    """Return the first of these files that a model has."""
    for file in files:
        if path := _fetch(name, file):
            return path
    raise UserError(f"cannot load a BERT checkpoint from {name}: on the hub it has none of {', '.join(files)}")


def _fetch(name: str, file: str, *, needed: bool = True) -> Path | None:
    """Return a file of a model in the cache, downloaded if necessary; None if the model does not have it."""
    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    commit = cache / "refs" / "main"
    revision = commit.read_text(encoding="utf-8") if commit.is_file() else "main"
    path = cache / "snapshots" / revision / file
    if path.is_file():
        return path
    if _is_absent(path.parent, file):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()  # `load_bert` disables those of transformers
    try:
        return Path(patiently(hf_hub_download, name, file, revision=revision))
    except Exception as error:  # offline, behind a proxy, without permission, on a full disk: many types
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        if constants.HF_HUB_OFFLINE and not needed:
            return None
        raise _hub_error(name, file, error) from None


def _hub_error(name: str, file: str, error: Exception) -> UserError:
    """Return the error of a download, with its true cause and what to do."""
    why, remedy = cause(error), "set HF_HUB_OFFLINE=1 to use the cache as it is"
    if is_of_disk(error):
        return UserError(
            f"cannot keep {file} of {name} in HF_HOME, {constants.HF_HOME}: {why}. Set HF_HOME to a folder that can be written "
            "and has space"
        )
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        why = f"there is no such folder here, and no such model there, or it is private ({why})"
    elif constants.HF_HUB_OFFLINE:
        why, remedy = "it is not in the cache, and HF_HUB_OFFLINE is set", "leave out HF_HUB_OFFLINE"
    return UserError(
        f"cannot load a BERT checkpoint from {name}: no {file} from the hub: {why}\nGive --model a folder with config.json, "
        "model.safetensors and tokenizer.json; or run this command once on a machine that is online, and copy its HF_HOME to "
        f"this one's, {constants.HF_HOME}; or {remedy}"
    )
