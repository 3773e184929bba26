"""Texts to tokens, once: a cache beside the Hugging Face caches, shared by seeds and runs.

An entry's name is a hash of all that its content depends on (the texts, the tokenizer, the cut), so it is never out of
date; it carries a checksum, and a damaged one is made again. `$HF_HOME/bert_tickets` may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from huggingface_hub.constants import HF_HOME

from bert_tickets.errors import UserError
from bert_tickets.files import read_facts, read_tensors, write_tensors

Arrays = dict[str, np.ndarray]
CHUNK = 10_000  # texts tokenised at a time: the tokenizer's lists take dozens of times the memory of the arrays


@dataclass(frozen=True)
class Tokens:
    """The tokens of n examples, N in all, end to end."""

    ids: np.ndarray  # [N], int32
    types: np.ndarray  # [N], uint8: 0 in the first text, 1 in the second
    lengths: np.ndarray  # [n], int64

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> Tokens:
        """From a list an example."""
        lengths = np.array([len(example) for example in ids], dtype=np.int64)
        flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        return cls(flat, np.fromiter(chain.from_iterable(types), np.uint8, flat.size), lengths)

    def sha256(self) -> str:
        """A digest of the content."""
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self.ids.tobytes())
        digest.update(self.types.tobytes())
        return digest.hexdigest()


def tokenize(tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int) -> Tokens:
    """Encode one or two columns of n texts each; of a pair that is too long, the longer text is cut.

    Raises `ValueError` where the columns differ in length.
    """

    def make() -> Arrays:
        if len({len(column) for column in columns}) > 1:
            raise ValueError(f"columns of {', '.join(str(len(column)) for column in columns)} texts")
        options = {"truncation": "longest_first", "max_length": max_length}
        arrays = []
        for begin in range(0, max(1, len(columns[0])), CHUNK):
            texts = [list(column[begin : begin + CHUNK]) for column in columns]
            encoded = tokenizer(*texts, **options, return_token_type_ids=True, return_attention_mask=False)
            arrays.append(Tokens.of(encoded["input_ids"], encoded["token_type_ids"]))
        return {name: np.concatenate([getattr(part, name) for part in arrays]) for name in ("ids", "types", "lengths")}

    return Tokens(**cached(tokenizer, columns, [max_length, tokenizer.truncation_side, "longest_first"], make))


def cached(tokenizer: Any, columns: Sequence[Sequence[str]], settings: list[Any], make: Callable[[], Arrays]) -> Arrays:
    """What `make` makes of these texts by this tokenizer, from the cache where it was made before.

    `settings` (plain JSON) is all else that it depends on.
    """
    path = Path(HF_HOME) / "bert_tickets" / f"tokens-{_key(tokenizer, columns, settings)}.safetensors"
    if (found := _read(path)) is not None:
        return found
    arrays = make()
    try:
        write_tensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, {"sha256": _digest(arrays)})
    except UserError as error:
        print(f"the tokens are not cached: {error}")
    return arrays


def _key(tokenizer: Any, columns: Sequence[Sequence[str]], settings: list[Any]) -> str:
    what = json.loads(tokenizer.backend_tokenizer.to_str())
    what |= {"truncation": settings, "padding": None}  # not the last call's
    digest = hashlib.sha256(json.dumps([1, tokenizers.__version__, what], sort_keys=True).encode())
    for column in columns:
        digest.update(f"\n{len(column)}\n".encode())
        for text in column:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()[:32]


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Arrays | None:
    try:
        if not path.is_file():
            return None
        expected = read_facts(path)["sha256"]
        arrays = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
    except (UserError, OSError, KeyError, TypeError):
        return None
    return arrays if _digest(arrays) == expected else None
