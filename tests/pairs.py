"""Texts that become pairs of segments, and the pairs as a slow and plain reference of the rule makes them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bert_tickets.bench.tiny_bert import LETTERS, SPECIAL, save_tokenizer
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.text_source import Text, file_text
from bert_tickets.seeds import seeded

WORDS = [f"{letter}{second}" for letter in "abcd" for second in LETTERS]  # each is one word piece
LENGTH = 40


@pytest.fixture(scope="session")
def pairs_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of a vocabulary that has `=`, as BERT's."""
    folder = tmp_path_factory.mktemp("pairs")
    save_tokenizer([*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), *WORDS, "=", ".", "[", "]"], folder)
    return folder


@pytest.fixture(scope="session")
def pairs_tokenizer(pairs_bert):
    return AutoTokenizer.from_pretrained(pairs_bert)


def line(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def document(rng: random.Random, first: int = 30, lines: int = 6) -> str:
    """A first line of so many words, and up to `lines` lines of 1 to 30 words."""
    return "".join(line(rng, words) + "\n" for words in [first, *(rng.randint(1, 30) for _ in range(rng.randint(0, lines)))])


def documents(count: int, seed: int = 0) -> str:
    """Documents, headings between them, short ones, and one far longer than the others."""
    rng = random.Random(seed)
    return "\n".join(
        f" = {line(rng, 25)} = \n" if number % 7 == 3 else document(rng, rng.randint(10, 90), 60 if number == 5 else 6)
        for number in range(count)
    )


def written(path: Path, content: str) -> Text:
    path.write_bytes(content.encode())
    return file_text(path)


def in_memory(content: str) -> Text:
    return Text("a text", content, len(content), lambda: iter([content]))


def examples(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    """The token and type ids of each example."""
    batch = store.batch(torch.arange(len(store)))
    parts = batch.input_ids[0].split(batch.lens.tolist()), batch.token_type_ids[0].split(batch.lens.tolist())
    return [(ids.tolist(), types.tolist()) for ids, types in zip(*parts, strict=True)]


def reference(text: str, tokenizer, length: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Make the pairs of a text by the rule of BERT's `create_pretraining_data.py`, token by token."""
    found, rng, room = [], seeded(seed, "pairs"), length - 3
    pieces = [tokenizer.tokenize(line) for line in text.split("\n")]
    documents: list[list[list[str]]] = [[]]
    for tokens in pieces:
        if tokens:
            documents[-1].append(tokens)
        else:
            documents.append([])
    for lines in documents:
        if not lines or "=" in lines[0] or len(lines[0]) < 20:
            continue
        target = room
        if float(torch.rand((), generator=rng)) < 0.1:
            target = int(torch.randint(2, room + 1, (), generator=rng))
        chunk: list[list[str]] = []
        for i, tokens in enumerate(lines):
            chunk.append(tokens)
            if i < len(lines) - 1 and sum(map(len, chunk)) < target:
                continue
            a_end = int(torch.randint(1, len(chunk), (), generator=rng)) if len(chunk) > 1 else 1
            a = [token for segment in chunk[:a_end] for token in segment]
            b = [token for segment in chunk[a_end:] for token in segment]
            ends = torch.randint(2, (max(0, len(a) + len(b) - room),), generator=rng).tolist()
            while len(a) + len(b) > room:
                longer = a if len(a) > len(b) else b
                longer.pop(0 if ends.pop(0) else -1)
            tokens = ["[CLS]", *a, "[SEP]"] + ([*b, "[SEP]"] if b else [])
            types = [0] * (len(a) + 2) + [1] * (len(tokens) - len(a) - 2)
            found.append((tokenizer.convert_tokens_to_ids(tokens), types))
            chunk = []
    return found
