"""The generated task of demo.sh."""

import pytest

from bert_tickets.data.demo import DEV_WORDS, TRAIN_WORDS, sentences


def test_the_demo_task_cannot_be_solved_by_the_words_of_the_training_set():
    train, dev = list(sentences(1280, TRAIN_WORDS, 0)), list(sentences(400, DEV_WORDS, 1))
    assert len({text for text, _ in train}) == 1280
    assert (sum(label for _, label in train), sum(label for _, label in dev)) == (640, 200)
    opinions = set(" ".join(DEV_WORDS).split())
    assert not opinions & {word for text, _ in train for word in text.split()}
    negations = ("not", "never", "nobody", "but", "nothing", "cannot")
    negated = [any(word in negations for word in text.split()) for text, _ in dev]
    assert sum(negated) / len(negated) == pytest.approx(1 / 3, abs=0.01)
    assert list(sentences(50, DEV_WORDS, 1)) == dev[:50]
