"""Questions about contexts that may be longer than the network takes: windows of tokens, labels, and answers read back.

A window is [CLS] question [SEP] part of the context [SEP]. A context's first window begins with it, and each next one
`doc_stride` tokens of the context further on, until one reaches the end: the meaning in BERT's own SQuAD code and in the
released one's (transformers 2.5.1, `squad_convert_example_to_features`). What fast tokenizers call `stride` is another
thing, the overlap, which is max_length - 3 - tokens of the question - doc_stride. A question is cut to `MAX_QUESTION` tokens.

Tokens are found in a text by the characters the tokenizer says they cover, and an answer is those of its first to its
last token: a slice of the context as it was written.
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
BEST, LONGEST = 20, 30  # likeliest starts and ends of a window that are combined; tokens of an answer; as in the released code
VERSION = 1  # of the arrays that are cached


@dataclass(frozen=True)
class Encoded:
    """n texts of N tokens together, special ones not among them, end to end."""

    ids: np.ndarray  # [N], int32
    chars: np.ndarray  # [N, 2], int32: the token's first character in its text, and the one after its last
    lengths: np.ndarray  # [n], int64

    @property
    def starts(self) -> np.ndarray:
        """[n], where each text's tokens begin."""
        return np.cumsum(self.lengths) - self.lengths


def encode(tokenizer: Any, texts: Sequence[str], longest: int | None = None) -> Encoded:
    """The texts as tokens, the first `longest` of each."""
    ids, chars, lengths = [np.empty(0, np.int32)], [np.empty((0, 2), np.int32)], []
    for begin in range(0, len(texts), 1000):  # the tokenizer's lists take ten times the memory of the arrays
        encoded = tokenizer(
            list(texts[begin : begin + 1000]),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # that a text is longer than the network takes is why there are windows
        )
        for text, pairs in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids.append(np.array(text[:longest], np.int32))
            chars.append(np.array(pairs[:longest], np.int32).reshape(-1, 2))
            lengths.append(len(ids[-1]))
    return Encoded(np.concatenate(ids), np.concatenate(chars), np.array(lengths, np.int64))


# ---- windows ----


@dataclass(frozen=True)
class Windows:
    """W windows over the contexts of n questions, in the order of the questions; all arrays are [W], int64."""

    question: np.ndarray  # whose window it is
    first: np.ndarray  # the token of the context that it begins with
    asked: np.ndarray  # tokens of the question
    held: np.ndarray  # tokens of the context

    @property
    def lengths(self) -> np.ndarray:
        return self.asked + self.held + SPECIAL


def cut(asked: np.ndarray, lengths: np.ndarray, max_length: int, doc_stride: int) -> Windows:
    """The windows of questions of `asked` tokens about contexts of `lengths` tokens ([n] each)."""
    room = max_length - SPECIAL - asked
    count = 1 + np.maximum(0, -(-(lengths - room) // doc_stride))
    question = np.repeat(np.arange(len(asked)), count)
    first = (np.arange(len(question)) - (np.cumsum(count) - count)[question]) * doc_stride
    return Windows(question, first, asked[question], np.minimum(lengths[question] - first, room[question]))


def fill(windows: Windows, questions: Encoded, contexts: Encoded, place: np.ndarray, tokenizer: Any) -> tuple[Arrays, np.ndarray]:
    """The windows' tokens (`ids`, `types`, `lengths`), N together, and each one's place in its window's context ([N], or -1).

    `place` [n] is the context of each question.
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
    """Windows to train on, from the cache where they were made before. An answer is a text and where it begins.

    Beside the tokens: `labels` [W, 2], the tokens of each window where the answer begins and ends, or 0, 0 ([CLS]) where it
    is not wholly in the window; `lost`, the questions whose answer covers no token, and that have no window; `inexact`,
    the others whose answer begins or ends within a token, where all of that token is labelled. These two are indices.
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
    """Windows to answer from, from the cache where they were made before.

    Beside the tokens: `question` [W], whose window it is; `chars` [N, 2], what of its context a token covers, or -1;
    `widest` [N], 1 in the one window of its question where a token of the context has most context.
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
    """[N], uint8: 1 for a token of the context in the window that has most of the context on its poorer side.

    A hundredth of the window's tokens counts as well, and of equals the first has it, as in BERT's own code. `token` [N] is
    each token's place in its context, or -1.
    """
    rows = np.repeat(np.arange(len(windows.held)), windows.lengths)
    inside = token >= 0
    rows, at = rows[inside], token[inside]
    left, held = at - windows.first[rows], windows.held[rows]
    score = np.minimum(left, held - 1 - left) + 0.01 * held
    longest = int((windows.first + windows.held).max(initial=0))
    _, slot = np.unique(windows.question[rows] * longest + at, return_inverse=True)  # one for a token in all its windows
    order = np.lexsort((rows, -score, slot))
    best = order[np.flatnonzero(np.diff(slot[order], prepend=-1))]
    widest = np.zeros(len(token), dtype=np.uint8)
    widest[np.flatnonzero(inside)[best]] = 1
    return widest


# ---- answers as tokens ----


def align(contexts: Encoded, texts: Sequence[str], place: np.ndarray, answers: Sequence[tuple[str, int]]) -> np.ndarray:
    """The first and last token of each answer in its context, int64 [m, 2]: all that it touches, white space at its ends
    aside. Where it touches none, the last comes before the first. `place` [m] says whose the answer is."""
    begin = [start + len(text) - len(text.lstrip()) for text, start in answers]
    end = [max(start + len(text.rstrip()), at) for (text, start), at in zip(answers, begin, strict=True)]
    sizes = np.array([len(text) + 1 for text in texts], dtype=np.int64)
    base = np.cumsum(sizes) - sizes  # as if the texts were one
    chars = contexts.chars + base.repeat(contexts.lengths)[:, None]
    first = np.searchsorted(chars[:, 1], base[place] + begin, side="right")
    last = np.searchsorted(chars[:, 0], base[place] + end, side="left") - 1
    return np.stack([first, last], axis=1) - contexts.starts[place][:, None]


def label(windows: Windows, spans: np.ndarray) -> np.ndarray:
    """[W, 2], int64: where in each window its question's span lies, and 0, 0 where it does not lie wholly there."""
    within = spans[windows.question] - windows.first[:, None]
    whole = (within[:, 0] >= 0) & (within[:, 1] < windows.held)
    return np.where(whole[:, None], within + windows.asked[:, None] + 2, 0)


def _same(contexts: Encoded, texts: Sequence[str], place: int, span: np.ndarray, answer: tuple[str, int]) -> bool:
    """Whether a span's text is the answer's, white space aside."""
    first, last = contexts.starts[place] + span
    return first <= last and _bare(span_text(texts[place], contexts.chars[first, 0], contexts.chars[last, 1])) == _bare(answer[0])


def _bare(text: str) -> str:
    return "".join(text.split())


def span_text(context: str, begin: int, end: int) -> str:
    """What a context says from one character to before another, and the accents that stand on the last one: an uncased
    tokenizer drops them, so that no token covers them where they are characters of their own."""
    while end < len(context) and unicodedata.category(context[end]) == "Mn":
        end += 1
    return context[begin:end]


def _unique(contexts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different contexts, and which of them each question's is ([n])."""
    number = {context: i for i, context in enumerate(dict.fromkeys(contexts))}
    return list(number), np.array([number[context] for context in contexts], dtype=np.int64)


def best_spans(logits: np.ndarray, arrays: Arrays) -> np.ndarray:
    """The answer to each of n questions, from start and end logits of all windows' tokens ([N, 2]): the characters of the
    context where it begins and ends, int64 [n, 2], or -1, -1.

    In each window the `BEST` likeliest starts meet the `BEST` likeliest ends. An answer begins at a token of the context, in
    the window where that token has most context, and has at most `LONGEST` tokens. The highest sum wins; of equals the first.
    """
    lengths, chars, question = arrays["lengths"], arrays["chars"], arrays["question"]
    starts = np.cumsum(lengths) - lengths
    score, span = np.full(len(lengths), -np.inf), np.full((len(lengths), 2), -1, dtype=np.int64)
    for begin in range(0, len(lengths), 256):
        rows = np.arange(begin, min(begin + 256, len(lengths)))
        place = np.arange(lengths[rows].max())
        token = starts[rows, None] + np.minimum(place, lengths[rows, None] - 1)  # [w, L]
        grid = np.where((place < lengths[rows, None])[..., None], logits[token].astype(np.float64), -np.inf)
        first, last = (np.argsort(-grid[..., side], axis=1, kind="stable")[:, :BEST] for side in (0, 1))
        a, b = (np.take_along_axis(token, at, 1) for at in (first, last))
        total = np.take_along_axis(grid[..., 0], first, 1)[:, :, None] + np.take_along_axis(grid[..., 1], last, 1)[:, None]
        size = last[:, None] - first[:, :, None] + 1
        fits = (size >= 1) & (size <= LONGEST) & (arrays["widest"][a] == 1)[:, :, None] & (chars[b, 0] >= 0)[:, None]
        total = np.where(fits, total, -np.inf).reshape(len(rows), -1)
        best, each = total.argmax(1), np.arange(len(rows))
        i, j = np.divmod(best, last.shape[1])
        score[rows] = total[each, best]
        span[rows] = np.stack([chars[a[each, i], 0], chars[b[each, j], 1]], axis=1)
    span[np.isneginf(score)] = -1
    order = np.lexsort((-score, question))  # stable: the first of equal windows leads
    return span[order[np.flatnonzero(np.diff(question[order], prepend=-1))]]
