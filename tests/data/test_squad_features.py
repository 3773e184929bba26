"""Windows over contexts are the tokenizer's own; every answer is labelled in one, and read back as it was written."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paragraphs import labelled_texts, starts_of

from bert_tickets.data import squad_features
from bert_tickets.data.squad_features import best_spans, eval_windows, train_windows

PLAIN = ["good", "film", "The", "plot", "was", "café", "naïve", "book's", "1984", "a.b", "(song)", '"fine"']
ODD = ["cafe\u0301", "日本語", "東京was", "😀", "👩‍🚀", "한국", "İstanbul", "ﬁlm", "½", "e\u0301\u0323a", "µ", "—", "…"]
BETWEEN = [" ", "  ", "\n", "\t ", "\u00a0", "\u3000"]


LIMITS = {"MAX_QUESTION": 64, "N_BEST": 20, "MAX_ANSWER": 30}  # as in the released code
MAX_QUESTION, N_BEST, MAX_ANSWER = 8, 4, 5  # in these tests, so that short contexts have many windows


@pytest.fixture(scope="module", autouse=True)
def small_limits():
    with pytest.MonkeyPatch.context() as patch:
        for name, small in (("MAX_QUESTION", MAX_QUESTION), ("N_BEST", N_BEST), ("MAX_ANSWER", MAX_ANSWER)):
            assert getattr(squad_features, name) == LIMITS[name]
            patch.setattr(squad_features, name, small)
        yield


@st.composite
def contexts(draw, words=tuple(PLAIN + ODD), longest=60):
    """Draw a context, and the places where its words begin and end."""
    chosen = draw(st.lists(st.tuples(st.sampled_from(words), st.sampled_from(BETWEEN)), min_size=1, max_size=longest))
    text, places = draw(st.sampled_from(["", " ", "\n "])), []
    for word, between in chosen:
        places.append((len(text), len(text) + len(word)))
        text += word + between
    return text, places


@st.composite
def tasks(draw, **options):
    """Draw questions about contexts, with answers of whole words, some with white space around them."""
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


@given(task=tasks(), doc_stride=st.integers(1, 20), more=st.integers(0, 30))
@example(task=[["what film"], ["good " * 207], []], doc_stride=151, more=49)  # a last window shorter by more than 100 tokens
@settings(max_examples=40, deadline=None)
def test_windows_are_the_tokenizers_own_with_the_overlap_as_its_stride(tokenizer, task, doc_stride, more):
    """Each token of a context has most context in one window: min(left, right) + 0.01 * tokens, the first of the best."""
    questions, texts, _ = task
    max_length = MAX_QUESTION + 3 + doc_stride + more
    made = eval_windows(tokenizer, questions, texts, max_length, doc_stride)
    at, starts = 0, starts_of(made["lengths"])
    for number, (question, text) in enumerate(zip(questions, texts, strict=True)):
        asked = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][:MAX_QUESTION]
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
        held = [(i * doc_stride, i * doc_stride + len(ids) - 3 - len(asked)) for i, ids in enumerate(expected["input_ids"])]
        for i, ids in enumerate(expected["input_ids"]):
            part = slice(starts[at], starts[at] + made["lengths"][at])
            assert made["question"][at] == number
            assert made["ids"][part].tolist() == ids
            assert made["types"][part].tolist() == expected["token_type_ids"][i]
            places = zip(expected["offset_mapping"][i], expected.sequence_ids(i), strict=True)
            assert made["chars"][part].tolist() == [list(pair) if of == 1 else [-1, -1] for pair, of in places]
            widest = []
            for token in range(*held[i]):
                having = [(first, last) for first, last in held if first <= token < last]
                scores = [min(token - first, last - 1 - token) + 0.01 * (last - first) for first, last in having]
                widest.append(int(having[scores.index(max(scores))] == held[i]))
            assert made["widest"][part].tolist() == [0] * (len(asked) + 2) + widest + [0]
            at += 1
    assert at == len(made["lengths"])


@given(task=tasks(), doc_stride=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_answer_of_whole_words_is_labelled_in_a_window_as_it_was_written(tokenizer, task, doc_stride):
    questions, texts, answers = task
    max_length = MAX_QUESTION + 3 + doc_stride + 60  # so that four words, letter by letter, are whole in a window
    made = train_windows(tokenizer, questions, texts, answers, max_length, doc_stride)
    made = eval_windows(tokenizer, questions, texts, max_length, doc_stride) | made
    labelled = labelled_texts(made, texts)
    for number, (answer, _) in enumerate(answers):
        (text,) = labelled[number]  # the same in every window that has it
        assert text == answer.strip()


def test_an_answer_is_labelled_where_it_is_whole_and_cls_elsewhere(tokenizer):
    words = [random.Random(0).choice(["good", "film", "was"]) for _ in range(30)]
    context = " ".join(words)
    at = len(" ".join(words[:12])) + 1
    made = train_windows(tokenizer, ["the plot"], [context], [(" ".join(words[12:15]), at)], 3 + 2 + 10, 4)
    # Windows of 10 words from 0, 4, 8, 12, 16, 20: words 12 to 14 are in those from 8 and 12, and word 14 is not in that from 4.
    assert made["labels"].tolist() == [[0, 0], [0, 0], [4 + 4, 4 + 6], [4 + 0, 4 + 2], [0, 0], [0, 0]]
    whole = train_windows(tokenizer, ["the plot"], [context], [(context, 0)], 3 + 2 + 10, 4)  # longer than a window
    assert not whole["labels"].any()
    assert whole["lost"].size == 0


@pytest.mark.parametrize(
    ("context", "answer", "start", "first", "last"),
    [
        ("good film", " film", 4, 1, 1),  # without white space at its ends
        ("good film", "oo", 1, 0, 0),  # within a token: the whole token
        ("good film", "d f", 3, 0, 1),
        ("東京", "京", 1, 1, 1),
        ("👩‍🚀film good", "good", 8, 1, 1),
        ("good \u200b film", "\u200b", 5, 1, 0),  # the tokenizer drops it
    ],
)
def test_an_answer_is_the_tokens_that_it_overlaps(tokenizer, context, answer, start, first, last):
    assert context[start : start + len(answer)] == answer
    made = train_windows(tokenizer, ["was it"] * 2, ["good", context], [("good", 0), (answer, start)], 90, 20)
    lost = [1] if last < first else []
    spans = [[0, 0], [first, last]][: 2 - len(lost)]
    asked = 3  # tokens: "it" is two
    assert (made["labels"] - asked - 2).tolist() == spans
    assert made["lost"].tolist() == lost


def test_windows_are_cached_by_all_that_they_depend_on(tokenizer, cache):
    questions, texts, answers = ["what film", "plot"], ["good film was good", "a book"], [("film", 5), ("book", 2)]
    cases = [
        (train_windows, questions, texts, answers, 80, 10),
        (train_windows, questions, texts, [("film", 5), ("a", 0)], 80, 10),
        (train_windows, questions, texts, [("film", 5), ("book", 3)], 80, 10),
        (eval_windows, questions, texts, 80, 10),
        (eval_windows, questions, ["good film was good", "a song"], 80, 10),
        (eval_windows, questions, texts, 81, 10),
        (eval_windows, questions, texts, 80, 11),
    ]
    for count, (make, *columns) in enumerate(cases, 1):
        first, again = (make(tokenizer, *columns) for _ in range(2))
        assert len(list(cache.iterdir())) == count
        for name, array in first.items():
            np.testing.assert_array_equal(again[name], array, strict=True)


def naive(logits: np.ndarray, made: dict) -> list[list[int]]:
    """Compute the best spans by the definition, one window and one pair at a time."""
    spans, scores = [[-1, -1]] * (int(made["question"].max()) + 1), [-np.inf] * (int(made["question"].max()) + 1)
    for question, at, n in zip(made["question"], starts_of(made["lengths"]), made["lengths"], strict=True):
        starts, ends = (sorted(range(n), key=lambda i: -logits[at + i, side])[:N_BEST] for side in (0, 1))
        for a in starts:
            for b in ends:
                fits = made["widest"][at + a] and made["chars"][at + b, 0] >= 0 and a <= b < a + MAX_ANSWER
                if fits and (score := float(logits[at + a, 0]) + float(logits[at + b, 1])) > scores[question]:
                    scores[question], spans[question] = score, [int(made["chars"][at + a, 0]), int(made["chars"][at + b, 1])]
    return spans


@given(task=tasks(), doc_stride=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_best_spans_are_those_of_the_definition(tokenizer, task, doc_stride, seed, ties):
    made = eval_windows(tokenizer, *task[:2], MAX_QUESTION + 3 + doc_stride + 2, doc_stride)
    rng = np.random.default_rng(seed)
    logits = (rng.integers(0, 3, (len(made["ids"]), 2)) if ties else rng.normal(size=(len(made["ids"]), 2))).astype(np.float32)
    assert best_spans(logits, made).tolist() == naive(logits, made)
