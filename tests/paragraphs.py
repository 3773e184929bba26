"""Generated paragraphs in SQuAD's layout: several answers, answers at the ends, Unicode, long contexts and questions."""

import random

import numpy as np

from bert_tickets.data.squad_features import span_text

WORDS = ["good", "film", "Song", "plot", "was", "song", "café", "it's", "東京", "😀", "cafe\u0301", '"fine"', "naïve,"]


def question(rng: random.Random, number: int, words: int) -> dict:
    """Make a paragraph with one question and up to three gold answers of one to three words, some at its ends."""
    chosen, text, places = rng.choices(WORDS, k=words), " " * (number % 3 == 0), []
    for word in chosen:
        places.append((len(text), len(text) + len(word)))
        text += word + rng.choice([" ", " ", "\u00a0", "\n "])
    answers = []
    for i in range(1 + number % 3):
        first = 0 if number % 5 == 1 else rng.randrange(words)
        last = words - 1 if number % 5 == 2 and i == 0 else min(first + rng.randrange(3), words - 1)
        first = max(first, last - 2)
        begin, end = places[first][0], places[last][1]
        answers.append({"text": text[begin:end], "answer_start": begin})
    asked = "what was it? " * (20 if number % 7 == 3 else 1)
    return {"context": text, "qas": [{"id": f"q{number}", "question": asked, "answers": answers}]}


def content(seed: str, count: int) -> dict:
    rng = random.Random(seed)
    paragraphs = [question(rng, number, rng.choice([4, 20, 90])) for number in range(count)]
    return {
        "version": "1.1",
        "data": [{"title": "A", "paragraphs": paragraphs[:5]}, {"title": "B", "paragraphs": paragraphs[5:]}],
    }


def starts_of(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def labelled_texts(made: dict, contexts: list[str]) -> dict[int, set[str]]:
    """Return the labelled texts of each question, from the arrays of its training and evaluation windows."""
    found: dict[int, set[str]] = {}
    for at, question, (first, last) in zip(starts_of(made["lengths"]), made["question"], made["labels"], strict=True):
        if first or last:
            text = span_text(contexts[question], *made["chars"][[at + first, at + last], [0, 1]])
            found.setdefault(int(question), set()).add(text)
    return found
