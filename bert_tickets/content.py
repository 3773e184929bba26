"""Fingerprints of files and of checkpoints' folders by their content: a copy under another path has the same one.

The sha256 of a large file is kept in `$HF_HOME/bert_tickets`, in a file of its own whose name is a hash of the path, the size and
the times of change. These files may be deleted at any time. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from bert_tickets.errors import Damaged, UserError, cause
from bert_tickets.files import file_sha256, read_checksummed, read_json, write_checksummed

PREFIX = "sha256:"
SMALL = 2**20  # bytes; hashing them takes no longer than the cache
SETTLED = 2.0  # seconds since a file's last change; within them it may change again without another time
# The files of a checkpoint that are read: of the configuration, weights and tokenizer the first, and all settings.
CONFIGS = ("config.json", "bert_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
POOLER = "pooler.safetensors"  # beside a model whose class has none, such as BertForQuestionAnswering


def fingerprint(value: str) -> str:
    """Return `sha256:...` of a file or of a checkpoint's folder; a folder without a checkpoint as its absolute path, and other
    text, such as a name on the hub, as it is."""
    path = Path(value)
    if path.is_file():
        return PREFIX + _sha256(path)
    if not path.is_dir():
        return value
    return of_files({file.name: file for file in checkpoint_files(path)}) or str(path.resolve())


def of_checkpoint(hashes: Mapping[str, str]) -> str:
    """Return the fingerprint of a checkpoint's folder without shards, from the sha256 of its files by name."""
    groups = (CONFIGS, WEIGHTS, TOKENIZERS, *([name] for name in (*SETTINGS, POOLER)))
    read = [name for names in groups if (name := next((name for name in names if name in hashes), None))]
    return _of_hashes({name: hashes[name] for name in read})


def first_file(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first file of these names that a folder has. Raises `UserError` if `check_file` does."""
    for name in names:
        check_file(folder / name)
        if (folder / name).is_file():
            return folder / name
    return None


def check_file(path: Path) -> None:
    """Raise `UserError` for a broken symbolic link or a Git LFS pointer."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a broken symbolic link")
    if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer: run git lfs pull")


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's folder that are read. Raises `UserError` for an index of weights that is damaged."""
    groups = (CONFIGS, WEIGHTS, TOKENIZERS, *([name] for name in (*SETTINGS, POOLER)))
    files = [path for names in groups if (path := first_file(folder, names))]
    return files + [folder / shard for path in files if path.name in WEIGHTS and path.suffix == ".json" for shard in shards(path)]


def shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists. Raises `UserError`."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"they are {names}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{index} is damaged: it has no weight_map of names of files beside it ({cause(error)})") from None
    return names


def of_init(init: str) -> str:
    """Return the fingerprint of a value of --init: `pretrained`, `random`, or a file."""
    return init if init in ("pretrained", "random") else fingerprint(init)


def of_files(files: Mapping[str, Path]) -> str | None:
    """Return `sha256:...` of several files with their names, which need not be those on disk; None if there are none."""
    found = {name: _sha256(path) for name, path in files.items() if path.is_file()}
    return _of_hashes(found) if found else None


def _of_hashes(found: Mapping[str, str]) -> str:
    return PREFIX + hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def brief(value: str) -> str:
    """Shorten a fingerprint for messages and tables."""
    return value[: len(PREFIX) + 12] if value.startswith(PREFIX) else value


def _sha256(path: Path) -> str:
    size, *_ = version = version_of(path)
    return file_sha256(path) if size < SMALL else _cached(path.resolve(), *version)


def version_of(path: Path) -> tuple[int, int, int]:
    """The size and the times of change. `cp -p` and the like keep the first time, but not the second."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


@functools.cache  # a sweep names hundreds of runs by the same few files
def _cached(path: Path, *version: int) -> str:
    from huggingface_hub.constants import HF_HOME  # imported here: most commands need no cache

    key = {"path": str(path), "version": version}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    row = Path(HF_HOME) / "bert_tickets" / f"sha256-{name}.json"
    with suppress(OSError, Damaged, KeyError):
        return read_checksummed(row)["sha256"]
    sha256 = file_sha256(path)
    if version_of(path) == version and time.time() - version[-1] / 1e9 > SETTLED:
        with suppress(OSError):  # an unwritable cache only costs time
            write_checksummed(row, {**key, "sha256": sha256})
    return sha256
