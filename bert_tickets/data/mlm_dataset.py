"""Plain text as one stream of tokens, cut into blocks: it may be larger than memory, and is tokenised once.

The stream lies in a file under `$HF_HOME/bert_tickets`, named after all that it depends on (the text, the tokenizer, how much
of it was asked for), and is mapped, not read. `[CLS]` and `[SEP]` are put around a block when it is taken, so that one file
serves every block length. The file may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from tqdm import tqdm

from bert_tickets.data.text_source import Text
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts, writing
from bert_tickets.modeling.packing import Batch, ship

PIECES = 16  # of a text that are tokenised at a time, about a megabyte: what memory holds of it
HEADER = 1024  # bytes of a cache file before its tokens
DAY = 24 * 3600

Augment = Callable[[Batch, Tensor], Batch]  # what is done to every batch of a corpus, given it and its blocks' indices


class Corpus:
    """Blocks of `length` tokens each, `[CLS]` and `[SEP]` among them, taken from a mapped stream; in place of a `TokenStore`.

    The stream is cut into `length` - 2 tokens a block and its tail dropped, as the released code does; so every block is full.
    """

    def __init__(
        self,
        stream: np.ndarray,
        sha256: str,
        ends: tuple[int, int],
        length: int,
        device: torch.device | str = "cpu",
        augment_batch: Augment | None = None,
    ) -> None:
        inner = length - 2
        self._blocks = stream[: len(stream) // inner * inner].reshape(-1, inner)
        self._ends, self._alter = ends, augment_batch
        self.length, self.device = length, torch.device(device)
        self.lengths = np.broadcast_to(np.int64(length), len(self._blocks))  # a number for each block, and no memory
        self.sha256 = hashlib.sha256(repr((sha256, ends, length, len(self))).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._blocks)

    def batch(self, examples: Tensor, *, bucketed: bool = False) -> Batch:
        """The blocks of these indices ([B], int64, on the CPU), in their order; the labels are the tokens themselves ([T]).

        Never waits for the device. Batches of one size have one shape, so that `bucketed` has nothing to do.
        """
        count, length, device = len(examples), self.length, self.device
        ids = np.empty((count, length), np.int64)
        ids[:, 0], ids[:, -1] = self._ends
        ids[:, 1:-1] = self._blocks[examples.numpy()]
        tokens = ship(torch.from_numpy(ids), device).view(1, -1)
        block, place = torch.arange(count, device=device), torch.arange(length, device=device)
        batch = Batch(
            input_ids=tokens,
            token_type_ids=torch.zeros_like(tokens),
            position_ids=place.repeat(count)[None],
            rows=block.repeat_interleave(length),
            starts=block * length,
            lens=torch.full_like(block, length),
            labels=tokens[0],
            lengths=np.full(count, length),
            longest=length,
        )
        return batch if self._alter is None else self._alter(batch, examples)

    def first(self, blocks: int = 10_000) -> np.ndarray:
        """The tokens of the first blocks, a million at the usual length, without [CLS] and [SEP]."""
        return self._blocks[:blocks]

    @cached_property
    def unigram_entropy(self) -> float:
        """What a model that knows only how often each token occurs would lose on these blocks, in nats a token."""
        counts = np.zeros(0, np.int64)
        for start in range(0, len(self), 1000):
            more = np.bincount(self._blocks[start : start + 1000].ravel(), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def load_corpus(
    text: Text,
    tokenizer: Any,
    length: int,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    augment_batch: Augment | None = None,
) -> Corpus:
    """The blocks of a text, or its first `limit` ones: the first, so that no more of it is read than is asked for.

    Raises `UserError` for a text that cannot be read, or has not one block.
    """
    inner = length - 2
    stream, sha256 = tokens_of(text, tokenizer, None if limit is None else limit * inner)
    if len(stream) < inner:
        raise UserError(
            f"{text.name} has {len(stream)} tokens, and a block of --max-length {length} takes {inner} beside [CLS] and [SEP]: "
            "give more text, or a smaller --max-length"
        )
    return Corpus(stream, sha256, (tokenizer.cls_token_id, tokenizer.sep_token_id), length, device, augment_batch)


# ---- a text to a stream ----


def tokens_of(text: Text, tokenizer: Any, most: int | None = None) -> tuple[np.ndarray, str]:
    """The tokens of a text, or its first `most` ones, mapped from the cache ([N], uint16 or int32), and their sha256.

    A word that looks like a special token is read as an ordinary one, so that no block holds a `[SEP]` but its own.
    """
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    path = Path(HF_HOME) / "bert_tickets" / f"corpus-{_key(text, tokenizer, most)}.safetensors"
    if (found := _open(path, dtype)) is None:
        try:
            _fill(path, text, tokenizer, most, dtype)
        except OSError as error:
            raise UserError(f"{error}: a text's tokens need a file under $HF_HOME; set it to another place") from None
        found = _open(path, dtype)
    if found is None:
        raise UserError(f"{path} was written and cannot be read back: is the disk under HF_HOME sound?")
    return found


def _key(text: Text, tokenizer: Any, most: int | None) -> str:
    what = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # not the last call's
    known = json.dumps([1, tokenizers.__version__, what, text.key, most], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:32]


def _open(path: Path, dtype: np.dtype) -> tuple[np.ndarray, str] | None:
    """The tokens of a sound cache file. All of it is hashed: that costs half of what hashing the text does, seconds where
    training takes hours, and no sample would find the one page that a crash left empty."""
    try:
        if not path.is_file():
            return None
        expected = read_facts(path)["sha256"]  # refuses a file that is shorter or longer than its header says
        with path.open("rb") as file:
            file.seek(HEADER)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return (np.memmap(path, dtype, "r", HEADER), found) if found == expected else None
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _fill(path: Path, text: Text, tokenizer: Any, most: int | None, dtype: np.dtype) -> None:
    """Write the cache file. Two processes that do so at once write the same, each under a name of its own."""
    for old in path.parent.glob(".corpus-*.tmp"):  # what a kill left behind; who lives has written to its own file just now
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > DAY:
                old.unlink()
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    count, digest, pieces = 0, hashlib.sha256(), text.read()
    pace = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(total=text.size, desc=f"tokenising {text.name}", unit="B", unit_scale=True, mininterval=pace)
    with bar, writing(path) as file:
        file.write(bytes(HEADER))
        while count != most and (part := list(islice(pieces, PIECES))):
            encodings = backend.encode_batch_fast(part, add_special_tokens=False)
            ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype)
            ids = ids if most is None else ids[: most - count]
            file.write(ids.tobytes())
            digest.update(ids.tobytes())
            count += len(ids)
            bar.update(sum(len(piece.encode()) for piece in part))
        if count == 0:
            raise UserError(f"{text.name} is empty")
        file.seek(0)
        file.write(_header(count, dtype, digest.hexdigest()))


def _header(count: int, dtype: np.dtype, sha256: str) -> bytes:
    """The header of a safetensors file, filled up with spaces: its place comes before the tokens, and its content after them."""
    ids = {"dtype": {2: "U16", 4: "I32"}[dtype.itemsize], "shape": [count], "data_offsets": [0, count * dtype.itemsize]}
    text = json.dumps({"__metadata__": {"facts": json.dumps({"sha256": sha256})}, "ids": ids}).encode()
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)
