"""Tokenize texts, with a cache in `$HF_HOME/bert_tickets`.

The name of an entry is a hash of the texts, the tokenizer and the settings, so that it is never out of date. A damaged entry is
computed again. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from huggingface_hub.constants import HF_HOME

from bert_tickets.errors import Damaged
from bert_tickets.files import read_tensors, write_tensors

Arrays = dict[str, np.ndarray]
CHUNK = 1000  # texts tokenized at a time: the tokenizer's lists take dozens of times the memory of the arrays


@dataclass(frozen=True)
class Tokens:
    """The tokens of n examples, N in total, concatenated."""

    ids: np.ndarray  # [N], int32
    types: np.ndarray  # [N], uint8: 0 in the first text, 1 in the second
    lengths: np.ndarray  # [n], int64

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> Tokens:
        """Concatenate the lists of n examples."""
        lengths = np.array([len(example) for example in ids], dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        return cls(flat, np.fromiter(chain.from_iterable(types), np.uint8, flat.size), lengths)

    def sha256(self) -> str:
        """Return the sha256 of the content."""
        sha = hashlib.sha256(self.lengths.tobytes())
        sha.update(self.ids.tobytes())
        sha.update(self.types.tobytes())
        return sha.hexdigest()


def tokenize(tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int) -> Tokens:
    """Encode one or two columns of n texts each. Of a pair that is too long, the longer text is truncated."""

    def make() -> Arrays:
        options = {"truncation": "longest_first", "max_length": max_length, "return_token_type_ids": True}
        parts = [Tokens.of(part["input_ids"], part["token_type_ids"]) for part in encode_in_chunks(tokenizer, columns, **options)]
        return {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "types", "lengths")}

    return Tokens(**cached(tokenizer, columns, [max_length, tokenizer.truncation_side, "longest_first"], make))


def encode_in_chunks(tokenizer: Any, columns: Sequence[Sequence[str]], **options: Any) -> Iterator[Mapping[str, Any]]:
    """Call a tokenizer on `CHUNK` texts at a time."""
    for begin in range(0, len(columns[0]), CHUNK):
        texts = [list(column[begin : begin + CHUNK]) for column in columns]
        yield tokenizer(*texts, return_attention_mask=False, **options)


def cached(tokenizer: Any, columns: Sequence[Sequence[str]], settings: list[Any], make: Callable[[], Arrays]) -> Arrays:
    """Return the result of `make`, from the cache if possible. It depends on the texts, the tokenizer and `settings` (JSON)."""
    sha = hashlib.sha256()
    for column in columns:
        sha.update(f"\n{len(column)}\n".encode())
        for text in column:
            sha.update(len(text.encode()).to_bytes(4, "little") + text.encode())
    return cached_at(cache_path("tokens-{}.safetensors", tokenizer, sha.hexdigest(), settings), make)


def cached_at(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays in a file of the cache. If it is missing or damaged, make and write them."""
    with suppress(Damaged, OSError):
        return {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    arrays = make()
    try:
        write_tensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()})
    except OSError as error:
        print(f"the tokens are not cached: {error}")
    return arrays


def cache_path(name: str, tokenizer: Any, *content: Any) -> Path:
    """Return a file of the cache, `name` with the hash of a tokenizer, without its last call's settings, and `content` (JSON)."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    known = json.dumps([2, tokenizers.__version__, settings, content], sort_keys=True)
    return Path(HF_HOME) / "bert_tickets" / name.format(hashlib.sha256(known.encode()).hexdigest()[:32])
