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
from bert_tickets.data.token_cache import Arrays, cached

SPECIAL = 3  # [CLS] and two [SEP]
N_BEST, MAX_ANSWER = 20, 30  # candidate starts and ends of a window; tokens of an answer; as in the released code
VERSION = 1  # of the cached arrays


@dataclass(frozen=True)
class Encoded:
    """n texts with N tokens in total, without special tokens, concatenated."""

    ids: np.ndarray  # [N], int32
    chars: np.ndarray  # [N, 2], int32: the character offsets of each token in its text, [begin, end)
    lengths: np.ndarray  # [n], int64

    @property
    def starts(self) -> np.ndarray:
        """The first token of each text, [n]."""
        return np.cumsum(self.lengths) - self.lengths


def encode(tokenizer: Any, texts: Sequence[str], longest: int | None = None) -> Encoded:
    """Tokenize texts, and keep the first `longest` tokens of each."""
    ids, chars, lengths = [np.empty(0, np.int32)], [np.empty((0, 2), np.int32)], []
    for begin in range(0, len(texts), 1000):  # the tokenizer's lists take ten times the memory of the arrays
        encoded = tokenizer(
            list(texts[begin : begin + 1000]),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning of texts that are longer than the network takes
        )
        for text, pairs in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids.append(np.array(text[:longest], np.int32))
            chars.append(np.array(pairs[:longest], np.int32).reshape(-1, 2))
            lengths.append(len(ids[-1]))
    return Encoded(np.concatenate(ids), np.concatenate(chars), np.array(lengths, np.int64))


# ---- windows ----


@dataclass(frozen=True)
class Windows:
    """W windows over the contexts of n questions, in the order of the questions. All arrays are [W], int64."""

    question: np.ndarray  # the index of its question
    first: np.ndarray  # its first token of the context
    asked: np.ndarray  # the number of tokens of its question
    held: np.ndarray  # the number of tokens of the context in it

    @property
    def lengths(self) -> np.ndarray:
        return self.asked + self.held + SPECIAL


def cut(asked: np.ndarray, lengths: np.ndarray, max_length: int, doc_stride: int) -> Windows:
    """Return the windows of questions of `asked` tokens over contexts of `lengths` tokens ([n] each)."""
    room = max_length - SPECIAL - asked
    count = 1 + np.maximum(0, -(-(lengths - room) // doc_stride))
    question = np.repeat(np.arange(len(asked)), count)
    first = (np.arange(len(question)) - (np.cumsum(count) - count)[question]) * doc_stride
    return Windows(question, first, asked[question], np.minimum(lengths[question] - first, room[question]))


def fill(windows: Windows, questions: Encoded, contexts: Encoded, place: np.ndarray, tokenizer: Any) -> tuple[Arrays, np.ndarray]:
    """Return the windows' tokens (`ids`, `types`, `lengths`), N in total, and the position of each in its context ([N], or -1).

    `place` [n] is the index of each question's context.
    """
    lengths = windows.lengths
    rows = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[rows]
    at = position - windows.asked[rows] - 2
    inside = (at >= 0) & (at < windows.held[rows])
    asks = (position > 0) & (position <= windows.asked[rows])
    ids = np.where(position == 0, tokenizer.cls_token_id, tokenizer.sep_token_id).astype(np.int32)
    begin = contexts.starts[place][windows.question] + windows.first
    ids[inside] = contexts.ids[begin[rows[inside]] + at[inside]]
    ids[asks] = questions.ids[questions.starts[windows.question][rows[asks]] + position[asks] - 1]
    arrays = {"ids": ids, "types": (at >= 0).astype(np.uint8), "lengths": lengths}
    return arrays, np.where(inside, at + windows.first[rows], -1)


def train_windows(
    tokenizer: Any,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[tuple[str, int]],
    max_length: int,
    doc_stride: int,
) -> Arrays:
    """Make the training windows, or read them from the cache. An answer is a text and its first character in the context.

    Beside the tokens, the arrays are `labels` [W, 2], the first and last token of the answer in each window, or 0, 0 ([CLS]) if
    the window does not contain all of it; `lost`, the indices of questions whose answer covers no token, which have no window;
    and `inexact`, those of questions whose answer begins or ends within a token, where the whole token is labelled.
    """

    def make() -> Arrays:
        unique, place = _unique(contexts)
        asked, c = encode(tokenizer, questions, MAX_QUESTION), encode(tokenizer, unique)
        spans = align(c, unique, place, answers)
        lost = spans[:, 1] < spans[:, 0]
        windows = cut(asked.lengths, c.lengths[place], max_length, doc_stride)
        windows = Windows(*(column[~lost[windows.question]] for column in vars(windows).values()))
        arrays, _ = fill(windows, asked, c, place, tokenizer)
        exact = [_same(c, unique, *what) for what in zip(place, spans, answers, strict=True)]
        return arrays | {
            "labels": label(windows, spans),
            "lost": np.flatnonzero(lost),
            "inexact": np.flatnonzero(~np.array(exact, dtype=bool) & ~lost),
        }

    texts, starts = [text for text, _ in answers], [str(start) for _, start in answers]
    settings = ["windows to train on", VERSION, MAX_QUESTION, max_length, doc_stride]
    return cached(tokenizer, [questions, contexts, texts, starts], settings, make)


def eval_windows(tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], max_length: int, doc_stride: int) -> Arrays:
    """Make the evaluation windows, or read them from the cache.

    Beside the tokens, the arrays are `question` [W], the index of the question; `chars` [N, 2], each token's character offsets
    in the context, or -1; and `widest` [N], of `most_context`.
    """

    def make() -> Arrays:
        unique, place = _unique(contexts)
        asked, c = encode(tokenizer, questions, MAX_QUESTION), encode(tokenizer, unique)
        windows = cut(asked.lengths, c.lengths[place], max_length, doc_stride)
        arrays, token = fill(windows, asked, c, place, tokenizer)
        inside = token >= 0
        source = (c.starts[place][windows.question].repeat(windows.lengths) + token)[inside]
        chars = np.full((len(token), 2), -1, dtype=np.int32)
        chars[inside] = c.chars[source]
        return arrays | {"question": windows.question, "chars": chars, "widest": most_context(windows, token)}

    settings = ["windows to answer from", VERSION, MAX_QUESTION, max_length, doc_stride]
    return cached(tokenizer, [questions, contexts], settings, make)


def most_context(windows: Windows, token: np.ndarray) -> np.ndarray:
    """Return [N], uint8: 1 where a token of the context is in its window of maximum context (the first of equal ones).

    As in BERT's code, the score of a window is the number of tokens of context on the token's shorter side, plus 0.01 times
    those of the window. `token` [N] is the position of each token in its context, or -1.
    """
    rows = np.repeat(np.arange(len(windows.held)), windows.lengths)
    inside = token >= 0
    rows, at = rows[inside], token[inside]
    left, held = at - windows.first[rows], windows.held[rows]
    score = np.minimum(left, held - 1 - left) + 0.01 * held
    longest = int((windows.first + windows.held).max(initial=0))
    _, slot = np.unique(windows.question[rows] * longest + at, return_inverse=True)  # one number per token of a context
    order = np.lexsort((rows, -score, slot))
    best = order[np.flatnonzero(np.diff(slot[order], prepend=-1))]
    widest = np.zeros(len(token), dtype=np.uint8)
    widest[np.flatnonzero(inside)[best]] = 1
    return widest


# ---- answers as tokens ----


def align(contexts: Encoded, texts: Sequence[str], place: np.ndarray, answers: Sequence[tuple[str, int]]) -> np.ndarray:
    """Return the first and last token that each answer, stripped of white space, overlaps in its context, int64 [m, 2].

    If it overlaps none, the last precedes the first. `place` [m] is the index of each answer's context.
    """
    begin = [start + len(text) - len(text.lstrip()) for text, start in answers]
    end = [max(start + len(text.rstrip()), at) for (text, start), at in zip(answers, begin, strict=True)]
    sizes = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    base = np.cumsum(sizes) - sizes  # as if the texts were concatenated
    chars = contexts.chars + base.repeat(contexts.lengths)[:, None]
    first = np.searchsorted(chars[:, 1], base[place] + begin, side="right")
    last = np.searchsorted(chars[:, 0], base[place] + end, side="left") - 1
    return np.stack([first, last], axis=1) - contexts.starts[place][:, None]


def label(windows: Windows, spans: np.ndarray) -> np.ndarray:
    """Return the answer's span in each window, or 0, 0 if the window does not contain all of it: [W, 2], int64."""
    within = spans[windows.question] - windows.first[:, None]
    whole = (within[:, 0] >= 0) & (within[:, 1] < windows.held)
    return np.where(whole[:, None], within + windows.asked[:, None] + 2, 0)


def _same(contexts: Encoded, texts: Sequence[str], place: int, span: np.ndarray, answer: tuple[str, int]) -> bool:
    """Return whether the text of a span equals the answer, apart from white space."""
    first, last = contexts.starts[place] + span
    if first > last:
        return False
    text = span_text(texts[place], contexts.chars[first, 0], contexts.chars[last, 1])
    return "".join(text.split()) == "".join(answer[0].split())


def span_text(context: str, begin: int, end: int) -> str:
    """Return a slice of a context, extended by combining accents, which an uncased tokenizer drops."""
    while end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return context[begin:end]


def _unique(contexts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the unique contexts, and the index of each question's ([n])."""
    number = {context: i for i, context in enumerate(dict.fromkeys(contexts))}
    return list(number), np.array([number[context] for context in contexts], dtype=np.int64)


def best_spans(logits: np.ndarray, arrays: Arrays) -> np.ndarray:
    """Return the answers to n questions as character offsets in the context, int64 [n, 2], or -1, -1.

    `logits` [N, 2] are the start and end logits of all windows' tokens. In each window the `N_BEST` highest starts are combined
    with the `N_BEST` highest ends. An answer begins in the window where its first token has the most context, and has at most
    `MAX_ANSWER` tokens. The highest sum wins, the first of equal ones.
    """
    lengths, chars, question = arrays["lengths"], arrays["chars"], arrays["question"]
    starts = np.cumsum(lengths) - lengths
    score, span = np.full(len(lengths), -np.inf), np.full((len(lengths), 2), -1, dtype=np.int64)
    for begin in range(0, len(lengths), 256):
        rows = np.arange(begin, min(begin + 256, len(lengths)))
        place = np.arange(lengths[rows].max())
        token = starts[rows, None] + np.minimum(place, lengths[rows, None] - 1)  # [w, L]
        grid = np.where((place < lengths[rows, None])[..., None], logits[token].astype(np.float64), -np.inf)
        first, last = (np.argsort(-grid[..., side], axis=1, kind="stable")[:, :N_BEST] for side in (0, 1))
        a, b = (np.take_along_axis(token, at, 1) for at in (first, last))
        total = np.take_along_axis(grid[..., 0], first, 1)[:, :, None] + np.take_along_axis(grid[..., 1], last, 1)[:, None]
        size = last[:, None] - first[:, :, None] + 1
        fits = (size >= 1) & (size <= MAX_ANSWER) & (arrays["widest"][a] == 1)[:, :, None] & (chars[b, 0] >= 0)[:, None]
        total = np.where(fits, total, -np.inf).reshape(len(rows), -1)
        best, each = total.argmax(1), np.arange(len(rows))
        i, j = np.divmod(best, last.shape[1])
        score[rows] = total[each, best]
        span[rows] = np.stack([chars[a[each, i], 0], chars[b[each, j], 1]], axis=1)
    span[np.isneginf(score)] = -1
    order = np.lexsort((-score, question))  # stable: the first of equal windows wins
    return span[order[np.flatnonzero(np.diff(question[order], prepend=-1))]]
