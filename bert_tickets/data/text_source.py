"""Plain text, read piece by piece: the files of a folder, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from itertools import islice
from pathlib import Path

from bert_tickets.content import version_of
from bert_tickets.data.hub import Dataset, find_dataset
from bert_tickets.errors import UserError
from bert_tickets.files import file_sha256
from bert_tickets.hub import Repository

PIECE = 1 << 16  # characters of a file that are read at a time
ROWS = 100  # lines or articles of a data set on the hub that are read at a time

FILES = {"train": "en.train", "validation": "en.valid"}
WIKITEXT, WIKIPEDIA = "Salesforce/wikitext", "wikimedia/wikipedia"
HUB = {WIKITEXT: "wikitext-103-raw-v1", WIKIPEDIA: "20231101.en"}  # configurations
HELD_OUT = 100  # the first articles of Wikipedia (3 MB) are the validation set; on the hub it has none
INSTEAD = f"--data-dir a folder with {' and '.join(FILES.values())}, in UTF-8; or {WIKIPEDIA}, all of English Wikipedia"


@dataclass(frozen=True)
class Text:
    """A text that is not in memory."""

    name: str  # for messages
    key: str  # identifies the content
    size: int | None  # bytes, if known
    read: Callable[[], Iterator[str]]  # yields pieces of at most some hundreds of kilobytes, split at white space


def find_texts(data_dir: str | None) -> dict[str, Text]:
    """Find the training and validation texts: `en.train` and `en.valid` of a folder, or those of a data set on the hub."""
    if data_dir is None or (data_dir in HUB and not Path(data_dir).is_dir()):
        return hub_texts(data_dir or WIKITEXT)
    return {split: file_text(Path(data_dir) / file) for split, file in FILES.items()}


def file_text(path: Path) -> Text:
    """Open a UTF-8 file with lines of any length. Reads it once for its hash. Raises `UserError` if it does not exist."""
    if not path.is_file():
        raise Repository("dataset", WIKITEXT, INSTEAD).unavailable(f"there is no text at {path}")
    version = version_of(path)
    return Text(str(path), file_sha256(path), version[0], partial(_read_file, path, version))


def _read_file(path: Path, version: tuple[int, int, int]) -> Iterator[str]:
    rest = ""
    with path.open("rb") as raw, TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        try:
            while more := file.read(PIECE):
                if "\0" in more:
                    raise UserError(f"{path} has NUL characters (is it UTF-16?): save it as UTF-8")
                text = rest + more
                cut = 1 + max(text.rfind("\n"), text.rfind(" ")) or len(text)  # a word of this length may be cut anywhere
                rest = text[cut:]
                _check_version(path, version)  # here, too: those who need a part only do not read to the end
                yield text[:cut]
        except UnicodeDecodeError as error:
            wrong = raw.tell() - len(error.object) + error.start
            raise UserError(f"{path} is not UTF-8 text: byte {wrong} is {error.object[error.start]:#04x}") from None
    yield rest
    _check_version(path, version)


def _check_version(path: Path, version: tuple[int, int, int]) -> None:
    if version_of(path) != version:
        raise UserError(f"{path} changed while it was read; give the command again when it is complete")


def hub_texts(name: str) -> dict[str, Text]:
    """Open the splits of a data set on the hub, or in its cache, whose files are downloaded as the text is read."""
    data = find_dataset(Repository("dataset", name, INSTEAD), HUB[name], ["train"] if name == WIKIPEDIA else list(FILES))
    key = f"{name} {HUB[name]} {data.revision}"
    return {split: Text(f"{name} ({split})", f"{key} {split}", None, partial(_read_hub, data, split)) for split in FILES}


def _read_hub(data: Dataset, split: str) -> Iterator[str]:
    source = "train" if data.source.name == WIKIPEDIA else split
    end = "\n\n" if data.source.name == WIKIPEDIA else "\n"  # a row is an article, or a line with or without its end
    columns = data.columns(source, ["text"], ROWS)
    rows: Iterator[str] = (row.rstrip("\n") + end for (column,) in columns for row in column)
    if data.source.name == WIKIPEDIA:
        rows = islice(rows, HELD_OUT) if split == "validation" else islice(rows, HELD_OUT, None)
    while part := list(islice(rows, ROWS)):
        yield "".join(part)
