"""Fingerprints of files and of checkpoints' folders by their content: a copy under another path has the same one.

The sha256 of a large file is kept in `$HF_HOME/bert_tickets`, in a file of its own whose name is a hash of the path, the size and
the times of change. These files may be deleted at any time. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bert_tickets.errors import Damaged
from bert_tickets.files import file_sha256, read_checksummed, write_checksummed

PREFIX = "sha256:"
SMALL = 2**20  # bytes; hashing them takes no longer than the cache
SETTLED = 2.0  # seconds since a file's last change; within them it may change again without another time
CHECKPOINT = re.compile(  # the files of a checkpoint's folder that are read
    r"(config|bert_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|vocab\.txt|pooler\.safetensors"
    r"|(model|pytorch_model)\b.*\.(safetensors|bin)(\.index\.json)?"
)


def fingerprint(value: str) -> str:
    """Return `sha256:...` of a file or of a checkpoint's folder; a folder without a checkpoint as its absolute path, and other
    text, such as a name on the hub, as it is."""
    path = Path(value)
    if path.is_file():
        return PREFIX + _sha256(path)
    if not path.is_dir():
        return value
    return of_files({entry.name: entry for entry in path.iterdir() if CHECKPOINT.fullmatch(entry.name)}) or str(path.resolve())


def of_init(init: str) -> str:
    """Return the fingerprint of a value of --init: `pretrained`, `random`, or a file."""
    return init if init in ("pretrained", "random") else fingerprint(init)


def of_files(files: Mapping[str, Path]) -> str | None:
    """Return `sha256:...` of several files with their names, which need not be those on disk; None if there are none."""
    found = {name: _sha256(path) for name, path in files.items() if path.is_file()}
    return PREFIX + hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else None


def brief(value: str) -> str:
    """Shorten a fingerprint for messages and tables."""
    return value[: len(PREFIX) + 12] if value.startswith(PREFIX) else value


def _sha256(path: Path) -> str:
    size, *_ = version = _version(path)
    return file_sha256(path) if size < SMALL else _cached(path.resolve(), *version)


def _version(path: Path) -> tuple[int, int, int]:
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
    if _version(path) == version and time.time() - version[-1] / 1e9 > SETTLED:
        with suppress(OSError):  # an unwritable cache only costs time
            write_checksummed(row, {**key, "sha256": sha256})
    return sha256
