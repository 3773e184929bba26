"""Pairs of segments from plain text, on which a mask is trained by distillation (Liu et al. 2022).

They are made as in BERT's own pre-training, without random second segments:

- Lines between two blank lines are a document. It is dropped if its first line has the token `=`, as in WikiText's headings, or
  fewer than 20 word pieces.
- A document has a target: `length` - 3 tokens, or with probability 0.1 uniform in 2 .. `length` - 3. Lines are gathered until
  they reach it or the document ends. These are a pair. The next line of the document begins another pair with the same target.
- The lines of a pair are split at a random one into A and B; a single line is A alone. One by one, tokens are removed from a
  random end of the longer of the two until both together have `length` - 3.

An example is `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`. Pairs are made once, and cached in `$HF_HOME/bert_tickets`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch

from bert_tickets.data.batches import TokenStore
from bert_tickets.data.mlm_dataset import PIECES, progress_bar, text_encoder
from bert_tickets.data.text_source import Text
from bert_tickets.data.token_cache import Arrays, Tokens, cache_path, cached_at
from bert_tickets.errors import UserError
from bert_tickets.seeds import seeded

FIRST_LINE = 20  # word pieces that the first line of a document has at least
SHORT_RATE = 0.1  # fraction of the documents with a shorter target
SHORTEST = 2

Pair = tuple[np.ndarray, np.ndarray]  # the tokens of A and B, which may be empty


def load_pairs(
    text: Text, tokenizer: Any, length: int, seed: int, limit: int | None = None, device: torch.device | str = "cpu"
) -> TokenStore:
    """Make the pairs of a text, or its first `limit` ones, of at most `length` tokens each. All labels are 0.

    Raises `UserError` for an unreadable text and for one without a pair.
    """
    if length < SHORTEST + 3:
        raise UserError(f"--max-length {length} is too small for pairs: it must be at least {SHORTEST + 3}")
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    path = cache_path("pairs-{}.safetensors", tokenizer, text.key, ends, length, seed, limit)
    tokens = Tokens(**cached_at(path, lambda: make_pairs(text, tokenizer, length, seed, limit)))
    return TokenStore(tokens, np.zeros(len(tokens.lengths), np.int64), device)


def make_pairs(text: Text, tokenizer: Any, length: int, seed: int, limit: int | None) -> Arrays:
    """Tokenize a text into pairs; returns the fields of `Tokens`. Beside these, only a part of the text is in memory."""
    encoder, rng = text_encoder(tokenizer), seeded(seed, "pairs")
    documents = (lines for has_tokens, lines in groupby(read_lines(text, encoder), lambda line: len(line) > 0) if has_tokens)
    equals_sign = encoder.token_to_id("=")
    pairs = (pair for lines in documents for pair in pairs_of(lines, length - 3, equals_sign, rng))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids, types, lengths = array("i"), array("B"), array("q")
    for a, b in islice(pairs, limit):
        first, second = [cls, *a.tolist(), sep], [*b.tolist(), sep] if len(b) else []
        ids.extend(first + second)
        types.extend([0] * len(first) + [1] * len(second))
        lengths.append(len(first) + len(second))
    if not lengths:
        kept = f"whose first line has {FIRST_LINE} word pieces or more, and no ="
        raise UserError(f"{text.name} has no document (lines between blank lines) {kept}: give text with longer lines")
    return {"ids": np.asarray(ids), "types": np.asarray(types), "lengths": np.asarray(lengths)}


def read_lines(text: Text, encoder: Any) -> Iterator[np.ndarray]:
    """Yield the word pieces of each line, [tokens], int32; a blank line has none. A line may span pieces of the text."""
    pieces = text.read()
    line: list[np.ndarray] = []  # its parts
    with progress_bar(text) as bar:
        while part := list(islice(pieces, PIECES)):
            encodings = encoder.encode_batch_fast("".join(part).split("\n"), add_special_tokens=False)
            rest, *begun = (np.array(encoding.ids, np.int32) for encoding in encodings)
            line.append(rest)
            for begin in begun:
                yield np.concatenate(line)
                line = [begin]
            bar.update(sum(len(piece.encode()) for piece in part))
        yield np.concatenate([*line, np.empty(0, np.int32)])


def pairs_of(document: Iterator[np.ndarray], room: int, equals_sign: int | None, rng: torch.Generator) -> Iterator[Pair]:
    """Yield the pairs of a document's lines, of at most `room` tokens each; none if its first line is a heading or short."""
    first = next(document)
    if len(first) < FIRST_LINE or equals_sign in first:
        return
    short = float(torch.rand((), generator=rng)) < SHORT_RATE
    target = draw(SHORTEST, room, rng) if short else room
    gathered: list[np.ndarray] = []
    count = 0
    for line in chain([first], document):
        gathered.append(line)
        count += len(line)
        if count >= target:
            yield split(gathered, room, rng)
            gathered, count = [], 0
    if gathered:
        yield split(gathered, room, rng)


def split(lines: list[np.ndarray], room: int, rng: torch.Generator) -> Pair:
    """Split lines at a random one into A and B, and shorten the longer of the two until both together fit into `room`."""
    at = draw(1, len(lines) - 1, rng) if len(lines) > 1 else 1
    pair = np.concatenate(lines[:at]), np.concatenate([*lines[at:], np.empty(0, np.int32)])
    begin, end = [0, 0], [len(segment) for segment in pair]
    for from_front in torch.randint(2, (max(0, sum(end) - room),), generator=rng).tolist():
        longer = 0 if end[0] - begin[0] > end[1] - begin[1] else 1
        if from_front:
            begin[longer] += 1
        else:
            end[longer] -= 1
    return pair[0][begin[0] : end[0]], pair[1][begin[1] : end[1]]


def draw(low: int, high: int, rng: torch.Generator) -> int:
    """Draw an integer, uniform in `low` .. `high`."""
    return int(torch.randint(low, high + 1, (), generator=rng))
