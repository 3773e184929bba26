"""Windows over contexts: the tokenizer's own cut, every answer labelled in one of them, and read back as it was written."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer

from bert_tickets.config import QUESTION
from bert_tickets.data import token_cache as tokens
from bert_tickets.data.squad_features import (
    BEST,
    LONGEST,
    Windows,
    align,
    best_spans,
    cut,
    encode,
    eval_windows,
    label,
    most_context,
    span_text,
    train_windows,
)
from bert_tickets.data.token_cache import Tokens

PLAIN = ["good", "film", "The", "plot", "was", "café", "naïve", "book's", "1984", "a.b", "(song)", '"fine"']
ODD = ["cafe\u0301", "日本語", "東京was", "😀", "👩‍🚀", "한국", "İstanbul", "ﬁlm", "½", "e\u0301\u0323a", "µ", "—", "…"]
BETWEEN = [" ", "  ", "\n", "\t ", "\u00a0", "\u3000"]


@pytest.fixture(scope="module")
def tokenizer(bert_dir):
    return AutoTokenizer.from_pretrained(bert_dir)


@pytest.fixture(scope="module")
def keeping(bert_dir):
    """The tokenizer, but that it keeps accents, as BERT's cased one does."""
    tokenizer = AutoTokenizer.from_pretrained(bert_dir)
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=True, strip_accents=False)
    return tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "HF_HOME", str(tmp_path))


def starts_of(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


@st.composite
def contexts(draw, words=tuple(PLAIN + ODD), longest=60):
    """A context, and where each of its words begins and ends."""
    chosen = draw(st.lists(st.tuples(st.sampled_from(words), st.sampled_from(BETWEEN)), min_size=1, max_size=longest))
    text, places = draw(st.sampled_from(["", " ", "\n "])), []
    for word, between in chosen:
        places.append((len(text), len(text) + len(word)))
        text += word + between
    return text, places


@st.composite
def tasks(draw, **options):
    """Questions about contexts, with an answer of whole words, white space about it perhaps."""
    found = []
    for text, places in draw(st.lists(contexts(**options), min_size=1, max_size=3)):
        for question in draw(st.lists(st.sampled_from(["what film", "", "the cast " * 30, "東京 ?"]), min_size=1, max_size=2)):
            first = draw(st.integers(0, len(places) - 1))
            last = draw(st.integers(first, min(first + 3, len(places) - 1)))
            begin, end = places[first][0], places[last][1]
            begin -= draw(st.integers(0, 1)) if begin and text[begin - 1].isspace() else 0
            end += draw(st.integers(0, 1)) if end < len(text) and text[end].isspace() else 0
            found.append((question, text, (text[begin:end], begin)))
    return [list(column) for column in zip(*found, strict=True)]


# ---- the cut ----


@pytest.mark.parametrize(
    ("asked", "length", "first", "held"),
    [
        (5, 0, [0], [0]),
        (5, 12, [0], [12]),  # 20 tokens: 3 special, 5 asked, room for 12
        (5, 13, [0, 4], [12, 9]),
        (5, 16, [0, 4], [12, 12]),
        (5, 17, [0, 4, 8], [12, 12, 9]),
        (13, 9, [0, 4, 8], [4, 4, 1]),  # windows that touch
    ],
)
def test_windows_begin_doc_stride_apart_until_one_reaches_the_end(asked, length, first, held):
    windows = cut(np.array([2, asked]), np.array([1, length]), 20, 4)
    assert windows.question.tolist() == [0] + [1] * len(first)
    assert windows.first.tolist() == [0, *first]
    assert windows.held.tolist() == [1, *held]
    assert windows.lengths.tolist() == [6, *(asked + 3 + n for n in held)]


@given(task=tasks(), doc_stride=st.integers(1, 40), more=st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_windows_are_the_tokenizers_own_with_the_overlap_as_its_stride(tokenizer, task, doc_stride, more):
    questions, texts, _ = task
    max_length = QUESTION + 3 + doc_stride + more
    made = eval_windows(tokenizer, questions, texts, max_length, doc_stride)
    at, starts = 0, starts_of(made["lengths"])
    for number, (question, text) in enumerate(zip(questions, texts, strict=True)):
        asked = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][:QUESTION]
        question = question[: asked[-1][1]] if asked else ""
        expected = tokenizer(
            [question],
            [text],
            truncation="only_second",
            max_length=max_length,
            stride=max_length - 3 - len(asked) - doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, ids in enumerate(expected["input_ids"]):
            part = slice(starts[at], starts[at] + made["lengths"][at])
            assert made["question"][at] == number
            assert made["ids"][part].tolist() == ids
            assert made["types"][part].tolist() == expected["token_type_ids"][i]
            chars = [
                pair if of == 1 else (-1, -1)
                for pair, of in zip(expected["offset_mapping"][i], expected.sequence_ids(i), strict=True)
            ]
            assert made["chars"][part].tolist() == [list(pair) for pair in chars]
            at += 1
    assert at == len(made["lengths"])


def test_a_question_is_cut_and_a_context_never(tokenizer):
    made = eval_windows(tokenizer, ["good " * 100], ["film " * 300], 100, 20)
    asked = made["lengths"] - 3 - np.add.reduceat(made["chars"][:, 0] >= 0, starts_of(made["lengths"]))
    assert set(asked.tolist()) == {QUESTION}
    assert set(made["chars"][made["chars"][:, 0] >= 0, 0].tolist()) == set(range(0, 1500, 5))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 90)), min_size=1, max_size=4), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_a_token_has_most_context_in_the_window_of_the_definition(sizes, doc_stride):
    """min(left, right) + 0.01 * tokens, the first of the best; a token of the context in exactly one window."""
    asked, lengths = np.array(sizes).T
    windows = cut(asked, lengths, 20 + 3 + doc_stride, doc_stride)
    spans = [(q, a, a + n) for q, a, n in zip(windows.question, windows.first, windows.held, strict=True)]
    token = np.concatenate(
        [np.r_[[-1] * (n + 2), a : a + m, -1] for n, a, m in zip(windows.asked, windows.first, windows.held, strict=True)]
    )
    widest, at = most_context(windows, token).tolist(), 0
    for row, (question, _, _) in enumerate(spans):
        for position in token[at : at + windows.lengths[row]].tolist():
            best, score = None, -1.0
            for other, (whose, a, b) in enumerate(spans):
                if (
                    whose == question
                    and a <= position < b
                    and (value := min(position - a, b - 1 - position) + 0.01 * (b - a)) > score
                ):
                    best, score = other, value
            assert widest[at] == (position >= 0 and best == row)
            at += 1
    assert sum(widest) == lengths.sum()


# ---- answers ----


def covered(made: dict, texts: list[str]) -> dict[int, set[str]]:
    """By question, the texts that its labelled windows label."""
    found: dict[int, set[str]] = {}
    for at, question, (first, last) in zip(starts_of(made["lengths"]), made["question"], made["labels"], strict=True):
        if first or last:
            text = span_text(texts[question], *made["chars"][[at + first, at + last], [0, 1]])
            found.setdefault(int(question), set()).add(text)
    return found


@given(task=tasks(), doc_stride=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("which", ["tokenizer", "keeping"])
def test_every_answer_of_whole_words_is_labelled_in_a_window_as_it_was_written(request, which, task, doc_stride):
    tokenizer = request.getfixturevalue(which)
    questions, texts, answers = task
    max_length = QUESTION + 3 + doc_stride + 60  # so that four words, letter by letter, are whole in a window
    made = train_windows(tokenizer, questions, texts, answers, max_length, doc_stride)
    made = eval_windows(tokenizer, questions, texts, max_length, doc_stride) | made
    assert made["lost"].tolist() == []
    labelled = covered(made, texts)
    for number, (answer, _) in enumerate(answers):
        (text,) = labelled[number]  # the same in every window that has it
        assert text == answer.strip()
    assert made["inexact"].tolist() == []


def test_an_answer_is_labelled_where_it_is_whole_and_cls_elsewhere(tokenizer):
    words = [random.Random(0).choice(["good", "film", "was"]) for _ in range(30)]
    context = " ".join(words)
    at = len(" ".join(words[:12])) + 1
    made = train_windows(tokenizer, ["the plot"], [context], [(" ".join(words[12:16]), at)], 3 + 2 + 10, 4)
    # Windows of 10 words from 0, 4, 8, 12, 16, 20; words 12 to 15 are whole in those from 8 and 12.
    assert made["labels"].tolist() == [[0, 0], [0, 0], [4 + 4, 4 + 7], [4 + 0, 4 + 3], [0, 0], [0, 0]]


def test_an_answer_longer_than_a_window_is_cut_by_all_and_labelled_in_none(tokenizer):
    context = "film " * 30
    made = train_windows(tokenizer, ["plot"], [context], [(context.strip(), 0)], 14, 5)
    assert made["labels"].tolist() == [[0, 0]] * 5
    assert (made["lost"].size, made["inexact"].size) == (0, 0)


@pytest.mark.parametrize(
    ("context", "answer", "start", "first", "last"),
    [
        ("good film", "good", 0, 0, 0),
        ("good film", " film", 4, 1, 1),  # white space at its ends is not the answer's
        (" good  film ", "good  film ", 1, 0, 1),
        ("good film", "oo", 1, 0, 0),  # within a token: the whole token
        ("good film", "d f", 3, 0, 1),
        ("(good)", "good", 1, 1, 1),
        ("東京", "京", 1, 1, 1),
        ("😀 film", "film", 2, 1, 1),
        ("👩‍🚀film good", "good", 8, 1, 1),
        ("good \u200b film", "\u200b", 5, 1, 0),  # the tokenizer drops it
        ("good film \u200b", "\u200b", 10, 2, 1),
    ],
)
def test_an_answer_is_the_tokens_that_it_touches(tokenizer, context, answer, start, first, last):
    assert context[start : start + len(answer)] == answer
    texts = ["was it", context, "good"]
    spans = align(
        encode(tokenizer, texts), texts, np.array([0, 1, 2, 1]), [("it", 4), (answer, start), ("good", 0), (answer, start)]
    )
    assert spans.tolist() == [[1, 2], [first, last], [0, 0], [first, last]]  # "it" is two tokens


def test_answers_within_tokens_are_counted_and_those_of_no_token_have_no_windows(tokenizer):
    contexts = ["good film", "good \u200b film", "good film was"]
    made = train_windows(tokenizer, ["plot"] * 3, contexts, [("oo", 1), ("\u200b", 5), ("was", 10)], 80, 10)
    assert made["inexact"].tolist() == [0]
    assert made["lost"].tolist() == [1]
    assert made["labels"].tolist() == [[3, 3], [5, 5]]
    assert len(made["lengths"]) == 2


@given(task=tasks(longest=12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_labels_depend_on_the_question_and_its_context_alone(tokenizer, task, seed):
    questions, texts, answers = task
    order = random.Random(seed).sample(range(len(questions)), len(questions))
    whole = train_windows(tokenizer, *([column[i] for i in order] for column in task), 120, 30)
    alone = [train_windows(tokenizer, [questions[i]], [texts[i]], [answers[i]], 120, 30) for i in order]
    for name in ("ids", "types", "lengths", "labels"):
        assert np.array_equal(whole[name], np.concatenate([one[name] for one in alone]))


# ---- the cache ----


@pytest.mark.usefixtures("cache")
def test_what_was_cut_before_is_read(tokenizer, bert_dir, monkeypatch):
    questions, texts, answers = ["what film", "plot"], ["good film was good", "a book"], [("film", 5), ("book", 2)]
    first = [train_windows(tokenizer, questions, texts, answers, 80, 10), eval_windows(tokenizer, questions, texts, 80, 10)]

    def refuse(*_, **__):
        raise AssertionError("a text was tokenised again")

    again = AutoTokenizer.from_pretrained(bert_dir)
    monkeypatch.setattr(type(again), "__call__", refuse)
    second = [train_windows(again, questions, texts, answers, 80, 10), eval_windows(again, questions, texts, 80, 10)]
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    for other in (
        lambda: train_windows(again, questions, texts, [("film", 5), ("a", 0)], 80, 10),
        lambda: train_windows(again, questions, texts, [("film", 5), ("book", 3)], 80, 10),
        lambda: train_windows(again, ["what film", "cast"], texts, answers, 80, 10),
        lambda: eval_windows(again, questions, ["good film was good", "a song"], 80, 10),
        lambda: eval_windows(again, questions, texts, 81, 10),
        lambda: eval_windows(again, questions, texts, 80, 11),
    ):
        with pytest.raises(AssertionError, match="tokenised again"):
            other()


# ---- logits to answers ----


def naive(logits: np.ndarray, made: dict) -> list[list[int]]:
    """The definition, a window and a pair at a time."""
    spans, scores = [[-1, -1]] * (int(made["question"].max()) + 1), [-np.inf] * (int(made["question"].max()) + 1)
    for question, at, n in zip(made["question"], starts_of(made["lengths"]), made["lengths"], strict=True):
        starts, ends = (sorted(range(n), key=lambda i: -logits[at + i, side])[:BEST] for side in (0, 1))
        for a in starts:
            for b in ends:
                fits = made["widest"][at + a] and made["chars"][at + b, 0] >= 0 and a <= b < a + LONGEST
                if fits and (score := float(logits[at + a, 0]) + float(logits[at + b, 1])) > scores[question]:
                    scores[question], spans[question] = score, [int(made["chars"][at + a, 0]), int(made["chars"][at + b, 1])]
    return spans


@given(task=tasks(), doc_stride=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_best_spans_are_the_definitions(tokenizer, task, doc_stride, seed, ties):
    made = eval_windows(tokenizer, *task[:2], QUESTION + 3 + doc_stride + 20, doc_stride)
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-2, 3, (len(made["ids"]), 2)) if ties else rng.normal(size=(len(made["ids"]), 2))).astype(np.float32)
    assert best_spans(logits, made).tolist() == naive(logits, made)


def test_an_answer_has_at_most_so_many_tokens_and_does_not_end_before_it_begins(tokenizer):
    made = eval_windows(tokenizer, ["plot"], ["film " * 60], 100, 20)
    for first, last, fits in [(5, 5, True), (5, 4 + LONGEST, True), (5, 5 + LONGEST, False), (6, 5, False)]:
        logits = np.zeros((64, 2), np.float32)
        logits[3 + first, 0] = logits[3 + last, 1] = 9
        assert (best_spans(logits, made).tolist() == [[5 * first, 5 * last + 4]]) == fits


def test_where_no_likely_start_meets_a_likely_end_there_is_no_answer(tokenizer):
    made = eval_windows(tokenizer, ["the cast " * 40, "plot"], ["good film", "a book"], 90, 20)
    logits = np.zeros((len(made["ids"]), 2), np.float32)
    logits[1:65] = 5  # more than `BEST` tokens of the question, before any of the context
    assert best_spans(logits, made).tolist() == [[-1, -1], [0, 1]]


def test_a_start_counts_in_the_window_where_it_has_most_context_only(tokenizer):
    words = ["good", "film", "was", "song"] * 6
    made = eval_windows(tokenizer, ["plot"], [" ".join(words)], 3 + 1 + 12, 6)
    starts = starts_of(made["lengths"])
    assert starts.tolist() == [0, 16, 32]
    logits = np.full((len(made["ids"]), 2), -9, np.float32)
    logits[3 + 10, 0] = logits[3 + 11, 1] = 9  # words 10 and 11 at the end of the first window
    logits[16 + 3 + 3, 0] = logits[16 + 3 + 3, 1] = 5  # word 9 in the second
    (span,) = best_spans(logits, made).tolist()
    begins = [len(" ".join(words[:i])) + (i > 0) for i in range(24)]
    assert span == [begins[9], begins[9] + 4]


def test_labels_of_windows_by_hand():
    windows = Windows(*(np.array(column) for column in ([0, 0, 1], [0, 4, 0], [2, 2, 1], [8, 8, 3])))
    assert label(windows, np.array([[5, 7], [2, 3]])).tolist() == [[9, 11], [5, 7], [0, 0]]


def test_the_arrays_are_tokens(tokenizer):
    made = train_windows(tokenizer, ["plot"], ["good film"], [("film", 5)], 80, 10)
    held = Tokens(made["ids"], made["types"], made["lengths"])
    assert (held.ids.dtype, held.types.dtype, held.lengths.dtype) == (np.int32, np.uint8, np.int64)
    assert tokenizer.decode(held.ids) == "[CLS] plot [SEP] good film [SEP]"
    assert held.types.tolist() == [0, 0, 0, 1, 1, 1]
