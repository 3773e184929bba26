"""Where plain text comes from: the files of a folder or a data set on the hub, read piece by piece."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bert_tickets.data.hub import from_hub
from bert_tickets.errors import UserError

PIECE = 1 << 16  # bytes of a file read at a time, about

FILES = {"train": "en.train", "validation": "en.valid"}
WIKITEXT, WIKIPEDIA = "Salesforce/wikitext", "wikimedia/wikipedia"
HUB = {WIKITEXT: "wikitext-103-raw-v1", WIKIPEDIA: "20231101.en"}  # configurations
HELD_OUT = 100  # Wikipedia has no validation set on the hub: its first articles are one, some 3 MB, and are not trained on


@dataclass(frozen=True)
class Text:
    """A text, not read yet."""

    name: str  # in messages
    key: str  # another one for another content
    size: int | None  # bytes, where they are known
    read: Callable[[], Iterator[str]]  # its pieces, some tens of kilobytes each, cut at white space


def find_texts(data_dir: str | None) -> dict[str, Text]:
    """The training and the validation text: `en.train` and `en.valid` of a folder, or those of a data set on the hub."""
    place = WIKITEXT if data_dir is None else data_dir
    if place in HUB and not Path(place).is_dir():
        return {split: hub_text(place, split) for split in FILES}
    return {split: file_text(Path(place) / file) for split, file in FILES.items()}


# ---- a file ----


def file_text(path: Path) -> Text:
    """A file of UTF-8 with lines of any length. Hashing its content takes a pass over it."""
    if not path.is_file():
        raise UserError(
            f"there is no text at {path}. Three ways to get it:\n"
            f"  leave out --data-dir on a machine that reaches the hub ({WIKITEXT} is streamed, and its tokens are cached), or "
            f"give --data-dir {WIKIPEDIA} for all of English Wikipedia;\n"
            f"  fill the cache on another machine and set HF_HOME to a copy of it, with HF_HUB_OFFLINE=1;\n"
            f"  give --data-dir a folder with {FILES['train']} and {FILES['validation']}, plain text in UTF-8."
        )
    try:
        with path.open("rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
        return Text(str(path), key, path.stat().st_size, lambda: _read_file(path, key))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _read_file(path: Path, key: str) -> Iterator[str]:
    decoder, digest = codecs.getincrementaldecoder("utf-8-sig")(), hashlib.sha256()
    rest, at, data = "", 0, b"-"
    try:
        with path.open("rb", buffering=0) as file:
            while data:
                data = file.read(PIECE)
                if (nul := data.find(0)) >= 0:
                    raise UserError(f"{path} is no plain text in UTF-8: byte {at + nul} is NUL")
                digest.update(data)
                at += len(data)
                text = rest + decoder.decode(data, final=not data)
                cut = 1 + max(text.rfind("\n"), text.rfind(" ")) or len(text)  # a word as long as this is none: cut it anywhere
                rest = text[cut:] if data else ""
                yield text[:cut] if data else text
    except UnicodeDecodeError as error:
        wrong = at - len(error.object) + error.start
        raise UserError(f"{path} is not UTF-8 text: byte {wrong} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if digest.hexdigest() != key:
        raise UserError(f"{path} changed while it was read; give the command again when it is complete")


# ---- the hub ----


def hub_text(name: str, split: str) -> Text:
    """A split of a data set on the hub, streamed. Offline its revision is the one that the hub's own cache last saw."""
    with _hub(name):
        from huggingface_hub import hf_hub_download

        revision = Path(hf_hub_download(name, "README.md", repo_type="dataset")).parent.name
    return Text(f"{name} ({split})", f"{name} {HUB[name]} {revision} {split}", None, lambda: _read_hub(name, split, revision))


def _read_hub(name: str, split: str, revision: str) -> Iterator[str]:
    with _hub(name):
        from datasets import load_dataset

        there = "train" if name == WIKIPEDIA else split
        rows = load_dataset(name, HUB[name], split=there, streaming=True, revision=revision)
        if name == WIKIPEDIA:
            rows = rows.take(HELD_OUT) if split == "validation" else rows.skip(HELD_OUT)
        yield from _joined(row["text"] for row in rows)


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Short texts as longer pieces; a long one stays whole, as it is in memory already."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= PIECE:
            yield "\n".join(held)
            held, size = [], 0
    yield "\n".join(held)


def _hub(name: str) -> AbstractContextManager[None]:
    return from_hub(f"{name} ({HUB[name]})", f"a folder with {FILES['train']} and {FILES['validation']}")
