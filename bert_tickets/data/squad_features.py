"""SQuAD's features: windows of tokens over long contexts, their labels, and answers from logits.

A window is [CLS] question [SEP] part of the context [SEP]. The windows of a context begin `doc_stride` tokens apart, until one
reaches its end, as in BERT's SQuAD code and in the released code (transformers 2.5.1, `squad_convert_example_to_features`). (The
`stride` of fast tokenizers is the overlap, max_length - 3 - tokens of the question - doc_stride.) A question is truncated to
`MAX_QUESTION` tokens. An answer is a slice of the context, by the tokenizer's character offsets of its first and last token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bert_tickets.config import MAX_QUESTION
from bert_tickets.data.token_cache import Arrays, cached, encode_in_chunks

SPECIAL = 3  # [CLS] and two [SEP]
N_BEST, MAX_ANSWER = 20, 30  # candidate starts and ends of a window; tokens of an answer; as in the released code
Texts = Sequence[str]
VERSION = 1  # of the cached arrays


@dataclass(frozen=True)
class Encoded:
    """A text of n tokens, without special tokens."""

    ids: np.ndarray  # [n], int32
    chars: np.ndarray  # [n, 2], int32: the character offsets of each token in the text, [begin, end)


@dataclass(frozen=True)
class Window:
    """The tokens `first` to `last` (exclusive) of a context behind its question."""

    ids: np.ndarray  # [n], int32
    offset: int  # the position of the context's first token in the window: 2 + tokens of the question
    first: int
    last: int


def encode(tokenizer: Any, texts: Sequence[str], longest: int | None = None) -> dict[str, Encoded]:
    """Tokenize the unique texts, and keep the first `longest` tokens of each."""
    unique, found = list(dict.fromkeys(texts)), []
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    for part in encode_in_chunks(tokenizer, [unique], **options, verbose=False):  # no warning of long texts
        for ids, chars in zip(part["input_ids"], part["offset_mapping"], strict=True):
            found.append(Encoded(np.array(ids[:longest], np.int32), np.array(chars[:longest], np.int32).reshape(-1, 2)))
    return dict(zip(unique, found, strict=True))


def cut(tokenizer: Any, question: Encoded, context: Encoded, max_length: int, doc_stride: int) -> list[Window]:
    """Return the windows of a question over a context."""
    cls, sep = (np.array([token], np.int32) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    asked, size = len(question.ids), len(context.ids)
    room = max_length - SPECIAL - asked
    windows = []
    for first in range(0, max(1, size - room + doc_stride), doc_stride):
        last = min(first + room, size)
        ids = np.concatenate([cls, question.ids, sep, context.ids[first:last], sep])
        windows.append(Window(ids, asked + 2, first, last))
    return windows


def _tokens(windows: Sequence[Window]) -> Arrays:
    """Concatenate the tokens of windows: the arrays of `token_cache.Tokens`."""
    lengths = np.array([len(window.ids) for window in windows], np.int64)
    offsets = np.array([window.offset for window in windows], np.int64)
    sizes = np.stack([offsets, lengths - offsets], axis=1).ravel()
    types = np.tile(np.array([0, 1], np.uint8), len(windows)).repeat(sizes)
    return {"ids": np.concatenate([np.empty(0, np.int32), *(w.ids for w in windows)]), "types": types, "lengths": lengths}


def train_windows(
    tokenizer: Any, questions: Texts, contexts: Texts, answers: Sequence[tuple[str, int]], max_length: int, doc_stride: int
) -> Arrays:
    """Make the training windows, or read them from the cache. An answer is a text and its first character in the context.

    Beside the tokens, the arrays are `labels` [W, 2], the first and last token of the answer in each window, or 0, 0 ([CLS]) if
    the window does not contain all of it; and `lost`, the indices of questions whose answer covers no token: they have no window.
    """

    def make() -> Arrays:
        asked, read = encode(tokenizer, questions, MAX_QUESTION), encode(tokenizer, contexts)
        windows: list[Window] = []
        labels, lost = [], []
        for number, (question, context, answer) in enumerate(zip(questions, contexts, answers, strict=True)):
            begin, end = covered_tokens(read[context], answer)
            if end < begin:
                lost.append(number)
                continue
            for window in cut(tokenizer, asked[question], read[context], max_length, doc_stride):
                whole = window.first <= begin and end < window.last
                shift = window.offset - window.first
                labels.append((begin + shift, end + shift) if whole else (0, 0))
                windows.append(window)
        return _tokens(windows) | {"labels": np.array(labels, np.int64).reshape(-1, 2), "lost": np.array(lost, np.int64)}

    texts, starts = [text for text, _ in answers], [str(start) for _, start in answers]
    settings = ["windows to train on", VERSION, MAX_QUESTION, max_length, doc_stride]
    return cached(tokenizer, [questions, contexts, texts, starts], settings, make)


def eval_windows(tokenizer: Any, questions: Texts, contexts: Texts, max_length: int, doc_stride: int) -> Arrays:
    """Make the evaluation windows, or read them from the cache.

    Beside the tokens, the arrays are `question` [W], the index of the question; `chars` [N, 2], each token's character offsets
    in the context, or -1; and `widest` [N], 1 where a token of the context is in its window of maximum context.
    """

    def make() -> Arrays:
        asked, read = encode(tokenizer, questions, MAX_QUESTION), encode(tokenizer, contexts)
        windows: list[Window] = []
        numbers, chars, widest = [], [np.empty((0, 2), np.int32)], [np.empty(0, np.uint8)]
        for number, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            found = cut(tokenizer, asked[question], read[context], max_length, doc_stride)
            best = most_context(found)
            for index, window in enumerate(found):
                numbers.append(number)
                chars.append(np.full((len(window.ids), 2), -1, np.int32))
                chars[-1][window.offset : -1] = read[context].chars[window.first : window.last]
                widest.append(np.zeros(len(window.ids), np.uint8))
                widest[-1][window.offset : -1] = best[window.first : window.last] == index
            windows += found
        arrays = _tokens(windows)
        arrays["question"] = np.array(numbers, np.int64)
        arrays["chars"], arrays["widest"] = np.concatenate(chars), np.concatenate(widest)
        return arrays

    settings = ["windows to answer from", VERSION, MAX_QUESTION, max_length, doc_stride]
    return cached(tokenizer, [questions, contexts], settings, make)


def most_context(windows: Sequence[Window]) -> np.ndarray:
    """Return for each token of a context the window, of all its windows, where it has maximum context (the first of equal ones).

    As in BERT's code, the score of a window is the number of tokens of context on the token's shorter side, plus 0.01 times
    those of the window.
    """
    first, last = (np.array([getattr(window, side) for window in windows])[:, None] for side in ("first", "last"))
    token = np.arange(windows[-1].last)
    shorter = np.minimum(token - first, last - 1 - token)  # [windows, tokens]; negative where a token is not in a window
    return np.where(shorter < 0, -np.inf, shorter + 0.01 * (last - first)).argmax(axis=0)


def covered_tokens(context: Encoded, answer: tuple[str, int]) -> tuple[int, int]:
    """Return the first and last token that an answer overlaps (none is white space). If none, the last precedes the first."""
    text, start = answer
    first = np.searchsorted(context.chars[:, 1], start, side="right")
    last = np.searchsorted(context.chars[:, 0], start + len(text), side="left") - 1
    return int(first), int(last)


def span_text(context: str, begin: int, end: int) -> str:
    """Return a slice of a context, extended by combining accents, which an uncased tokenizer drops."""
    while end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return context[begin:end]


def best_spans(logits: np.ndarray, arrays: Arrays) -> np.ndarray:
    """Return the answers to n questions as character offsets in the context, int64 [n, 2], or -1, -1.

    `logits` [N, 2] are the start and end logits of all windows' tokens. In each window the `N_BEST` highest starts are combined
    with the `N_BEST` highest ends. An answer begins in the window where its first token has the most context, and has at most
    `MAX_ANSWER` tokens. The highest sum wins, the first of equal ones.
    """
    count = int(arrays["question"].max(initial=-1)) + 1
    spans, scores = np.full((count, 2), -1, np.int64), np.full(count, -np.inf)
    ends = np.cumsum(arrays["lengths"])
    for question, begin, end in zip(arrays["question"], ends - arrays["lengths"], ends, strict=True):
        window, chars = logits[begin:end].astype(np.float64), arrays["chars"][begin:end]
        first, last = np.argsort(-window, axis=0, kind="stable")[:N_BEST].T
        first, last = first[arrays["widest"][begin:end][first] == 1], last[chars[last, 0] >= 0]
        size = last - first[:, None] + 1
        total = window[first, 0][:, None] + window[last, 1]  # [starts, ends]
        total[(size < 1) | (size > MAX_ANSWER)] = -np.inf
        if total.max(initial=-np.inf) > scores[question]:
            i, j = np.unravel_index(total.argmax(), total.shape)
            scores[question], spans[question] = total[i, j], (chars[first[i], 0], chars[last[j], 1])
    return spans
