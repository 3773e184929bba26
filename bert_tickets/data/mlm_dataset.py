"""Plain text as one stream of tokens, cut into blocks. It may be larger than memory, and is tokenized once.

The stream is a memory-mapped file of token ids in `$HF_HOME/bert_tickets`, with a JSON file of its sha256. Its name is a hash of
the text, the tokenizer and the number of tokens. `[CLS]` and `[SEP]` are added when a block is read, so that one stream serves
every block length. The files may be deleted at any time.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

from bert_tickets.data.text_source import Text
from bert_tickets.data.token_cache import cache_path
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import file_sha256, read_checksummed, write_checksummed, writing
from bert_tickets.modeling.packing import Batch, ship

PIECES = 16  # of a text that are tokenized at a time, about a megabyte

MaskBlocks = Callable[[Batch, Tensor], Batch]  # maps a batch and the indices of its blocks to the masked batch


class Corpus:
    """Blocks of `length` tokens each, with `[CLS]` and `[SEP]`, read from a memory-mapped stream. It is a `data.batches.Store`.

    A block has `length` - 2 tokens of the stream. As in the released code, the incomplete last block is dropped.
    """

    def __init__(
        self,
        stream: np.ndarray,
        sha256: str,
        ends: tuple[int, int],
        length: int,
        device: torch.device | str = "cpu",
        augment_batch: MaskBlocks | None = None,
    ) -> None:
        inner = length - 2
        self.blocks = stream[: len(stream) // inner * inner].reshape(-1, inner)  # without [CLS] and [SEP]
        self._ends, self._augment_batch = ends, augment_batch
        self.length, self.device = length, torch.device(device)
        self.lengths = np.broadcast_to(np.int64(length), len(self.blocks))  # takes no memory
        self.sha256 = hashlib.sha256(repr((sha256, ends, length, len(self))).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.blocks)

    def batch(self, examples: Tensor, *, bucketed: bool = False) -> Batch:
        """Return the blocks of these indices ([B], int64, on the CPU), in their order. The labels are the tokens themselves, [T].

        Never waits for the device. Batches of one size have one shape, so that `bucketed` has no effect.
        """
        count, length, device = len(examples), self.length, self.device
        ids = np.empty((count, length), np.int64)
        ids[:, 0], ids[:, -1] = self._ends
        ids[:, 1:-1] = self.blocks[examples.numpy()]
        tokens = ship(torch.from_numpy(ids), device).view(1, -1)
        block, position = torch.arange(count, device=device), torch.arange(length, device=device)
        batch = Batch(
            input_ids=tokens,
            token_type_ids=torch.zeros_like(tokens),
            position_ids=position.repeat(count)[None],
            rows=block.repeat_interleave(length),
            starts=block * length,
            lens=torch.full_like(block, length),
            labels=tokens[0],
            lengths=np.full(count, length),
            longest=length,
        )
        return batch if self._augment_batch is None else self._augment_batch(batch, examples)

    def uncorrupted(self) -> Corpus:
        """Return the same blocks without masked tokens."""
        plain = copy.copy(self)
        plain._augment_batch = None
        return plain

    @cached_property
    def unigram_entropy(self) -> float:
        """The loss of a model of token frequencies alone on these blocks, in nats per token."""
        size = int(self.blocks.max()) + 1
        parts = np.split(self.blocks, range(1000, len(self), 1000))  # counting takes eight bytes per token
        counts = np.sum([np.bincount(part.ravel(), minlength=size) for part in parts], axis=0)
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * np.log(frequencies)).sum())


def load_corpus(text: Text, tokenizer: Any, length: int, limit: int | None = None, **options: Any) -> Corpus:
    """Tokenize a text into blocks, or its first `limit` ones. Raises `UserError` for an unreadable or too short text."""
    inner = length - 2
    stream, sha256 = read_tokens(text, tokenizer, None if limit is None else limit * inner)
    if len(stream) < inner:
        few = f"{len(stream)} tokens, fewer than the {inner} of a block of --max-length {length}"
        raise UserError(f"{text.name} has {few}: give more text, or a smaller --max-length")
    return Corpus(stream, sha256, (tokenizer.cls_token_id, tokenizer.sep_token_id), length, **options)


def read_tokens(text: Text, tokenizer: Any, most: int | None = None) -> tuple[np.ndarray, str]:
    """Return the tokens of a text, or its first `most` ones, memory-mapped ([N], uint16 or int32), and their sha256.

    `[SEP]` and other special tokens in the text are tokenized as ordinary text.
    """
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    path = cache_path("corpus-{}.tokens", tokenizer, text.key, most)
    with suppress(Damaged, OSError):
        sha256 = read_checksummed(path.with_suffix(".json"))["sha256"]
        if file_sha256(path) == sha256:
            return np.memmap(path, dtype, "r"), sha256
    sha256 = _write(path, text, tokenizer, most, dtype)
    return np.memmap(path, dtype, "r"), sha256


def _write(path: Path, text: Text, tokenizer: Any, most: int | None, dtype: np.dtype) -> str:
    """Tokenize a text into a stream file; returns its sha256. Concurrent processes write the same content."""
    count, sha, pieces, backend = 0, hashlib.sha256(), text.read(), text_encoder(tokenizer)
    with progress_bar(text) as bar, writing(path) as file:
        while count != most and (part := list(islice(pieces, PIECES))):
            encodings = backend.encode_batch_fast(part, add_special_tokens=False)
            ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype)
            ids = ids if most is None else ids[: most - count]
            file.write(ids.tobytes())
            sha.update(ids.tobytes())
            count += len(ids)
            bar.update(sum(len(piece.encode()) for piece in part))
        if count == 0:
            raise UserError(f"{text.name} is empty")
    write_checksummed(path.with_suffix(".json"), {"sha256": sha.hexdigest()})
    return sha.hexdigest()


def text_encoder(tokenizer: Any) -> tokenizers.Tokenizer:
    """Return a tokenizer of whole texts: without truncation and padding, and `[SEP]` in a text is ordinary text."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def progress_bar(text: Text) -> tqdm:
    """Return a bar of the bytes of a text that are tokenized."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=text.size, desc=f"tokenizing {text.name}", unit="B", unit_scale=True, mininterval=interval)
