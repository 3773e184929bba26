"""Plain text, read piece by piece: the files of a folder, or a data set on the hub."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bert_tickets.data.hub import from_hub, missing_data
from bert_tickets.errors import UserError
from bert_tickets.files import file_sha256

PIECE = 1 << 16  # bytes of a file that are read at a time

FILES = {"train": "en.train", "validation": "en.valid"}
WIKITEXT, WIKIPEDIA = "Salesforce/wikitext", "wikimedia/wikipedia"
HUB = {WIKITEXT: "wikitext-103-raw-v1", WIKIPEDIA: "20231101.en"}  # configurations
HELD_OUT = 100  # the first articles of Wikipedia (3 MB) are the validation set; on the hub it has none


@dataclass(frozen=True)
class Text:
    """A text that is not in memory."""

    name: str  # for messages
    key: str  # identifies the content
    size: int | None  # bytes, if known
    read: Callable[[], Iterator[str]]  # yields pieces of some tens of kilobytes, split at white space


def find_texts(data_dir: str | None) -> dict[str, Text]:
    """Find the training and validation texts: `en.train` and `en.valid` of a folder, or those of a data set on the hub."""
    source = WIKITEXT if data_dir is None else data_dir
    if source in HUB and not Path(source).is_dir():
        return {split: hub_text(source, split) for split in FILES}
    return {split: file_text(Path(source) / file) for split, file in FILES.items()}


# ---- a file ----


def file_text(path: Path) -> Text:
    """Open a UTF-8 file with lines of any length. Reads it once for its hash. Raises `UserError` if it does not exist."""
    if not path.is_file():
        source = f"{WIKITEXT} is streamed, and its tokens are cached; --data-dir {WIKIPEDIA} is all of English Wikipedia"
        layout = f"a folder with {FILES['train']} and {FILES['validation']}, plain text in UTF-8"
        raise missing_data(f"there is no text at {path}", source, layout)
    key = file_sha256(path)
    return Text(str(path), key, path.stat().st_size, lambda: _read_file(path, key))


def _read_file(path: Path, key: str) -> Iterator[str]:
    decoder, sha = codecs.getincrementaldecoder("utf-8-sig")(), hashlib.sha256()
    rest, at, data = "", 0, b"-"
    try:
        with path.open("rb", buffering=0) as file:
            while data:
                data = file.read(PIECE)
                sha.update(data)
                at += len(data)
                text = rest + decoder.decode(data, final=not data)
                cut = 1 + max(text.rfind("\n"), text.rfind(" ")) or len(text)  # a word of this length may be cut anywhere
                rest = text[cut:] if data else ""
                yield text[:cut] if data else text
    except UnicodeDecodeError as error:
        wrong = at - len(error.object) + error.start
        raise UserError(f"{path} is not UTF-8 text: byte {wrong} is {error.object[error.start]:#04x}") from None
    if sha.hexdigest() != key:
        raise UserError(f"{path} changed while it was read; give the command again when it is complete")


# ---- the hub ----


def hub_text(name: str, split: str) -> Text:
    """Open a split of a data set on the hub, for streaming. Offline, the newest revision in the hub's cache is used."""
    with _hub(name):
        from huggingface_hub import hf_hub_download

        revision = Path(hf_hub_download(name, "README.md", repo_type="dataset")).parent.name
    return Text(f"{name} ({split})", f"{name} {HUB[name]} {revision} {split}", None, lambda: _read_hub(name, split, revision))


def _read_hub(name: str, split: str, revision: str) -> Iterator[str]:
    with _hub(name):
        from datasets import load_dataset

        source = "train" if name == WIKIPEDIA else split
        rows = load_dataset(name, HUB[name], split=source, streaming=True, revision=revision)
        if name == WIKIPEDIA:
            rows = rows.take(HELD_OUT) if split == "validation" else rows.skip(HELD_OUT)
        yield from _joined(row["text"] for row in rows)


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Join short texts into pieces of at least `PIECE` characters."""
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
