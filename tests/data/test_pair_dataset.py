"""A text becomes pairs of segments, as a slow and plain reference of the rule makes them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from pairs import LENGTH, WORDS, documents, examples, in_memory, reference, written
from transformers import AutoTokenizer

from bert_tickets.bench.tiny_bert import LETTERS, SPECIAL, save_tokenizer
from bert_tickets.data import token_cache
from bert_tickets.data.pair_dataset import SHORT_RATE, draw, load_pairs, split
from bert_tickets.seeds import seeded


@pytest.mark.parametrize("length", [5, 6, LENGTH, 41, 512])
@pytest.mark.parametrize("seed", [1, 2])
def test_pairs_are_those_of_the_plain_rule(cache, pairs_tokenizer, tmp_path, length, seed):
    text = documents(200)
    store = load_pairs(written(tmp_path / "t", text), pairs_tokenizer, length, seed)
    expected = reference(text, pairs_tokenizer, length, seed)
    assert len(expected) > 100
    assert examples(store) == expected
    assert store.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert store.lengths.max() <= length
    if length == LENGTH:  # there are all kinds
        longest = [max(len(ids) for ids, types in expected if max(types) == second) for second in (0, 1)]
        assert longest == [LENGTH - 1, LENGTH]  # without B there is one [SEP]
    batch = store.batch(torch.arange(len(store)))
    assert batch.labels.tolist() == [0] * len(store)
    assert batch.labels.dtype == torch.int64
    assert [store._tokens.ids.dtype, store._tokens.types.dtype, store.lengths.dtype] == [np.int32, np.uint8, np.int64]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" ".join(WORDS[:19]) + "\n" + " ".join(WORDS[:40]), 0),  # the first line counts, not the document
        (" ".join(WORDS[:20]) + "\n" + WORDS[0], 1),
        ("xyz " * 10, 1),  # three word pieces each
        (" ".join(WORDS[:20]) + " = ", 0),
        (" ".join(WORDS[:20]) + "=aa", 0),
        (" ".join(WORDS[:20]) + "\n = aa = \n", 1),  # in another line it is a token as any
        ("\n" + " = aa = \n \n" + " ".join(WORDS[:20]), 1),
    ],
)
def test_documents_are_dropped_by_their_first_line(cache, pairs_tokenizer, text, kept):
    beside = "\n\n" + " ".join(WORDS[:30])  # otherwise there may be no pair
    store = load_pairs(in_memory(text + beside), pairs_tokenizer, 128, 1)
    assert len(store) == kept + 1
    assert examples(store)[-1][0][1:-1] == pairs_tokenizer.convert_tokens_to_ids(WORDS[:30])


def test_without_an_equals_sign_in_the_vocabulary_no_line_is_a_heading(cache, tmp_path):
    save_tokenizer([*SPECIAL, *LETTERS], tmp_path)
    store = load_pairs(in_memory("é " * 20 + "="), AutoTokenizer.from_pretrained(tmp_path), 128, 1)
    assert store.lengths.tolist() == [21 + 2]


def test_a_tenth_of_the_documents_have_a_shorter_target(cache, pairs_tokenizer):
    """Of lines of one token after the first, the first pair of a document shows its target."""
    room, count = 30, 2000
    text = (" ".join(WORDS[:20]) + "\n" + "aa\n" * room + "\n") * count
    store = load_pairs(in_memory(text), pairs_tokenizer, room + 3, 1)
    first = [len(ids) - 3 for ids, _ in examples(store) if ids[1:20] == pairs_tokenizer.convert_tokens_to_ids(WORDS[:19])]
    shorter = [length for length in first if length < room]
    assert len(shorter) / count == pytest.approx(SHORT_RATE, abs=0.02)
    assert (min(shorter), max(shorter)) == (19, room - 1)  # the first line alone has one [SEP]
    assert all(0 < shorter.count(target) < 25 for target in range(21, room))  # about 6.9 each


def test_every_line_may_begin_b_and_tokens_go_from_both_ends_of_the_longer(pairs_tokenizer):
    rng = seeded(0, "test")
    lines = [np.array([number]) for number in range(4)]
    found = Counter(len(split(lines, 10, rng)[0]) for _ in range(3000))
    assert found.keys() == {1, 2, 3}
    assert min(found.values()) > 900
    short, long = np.arange(5), np.arange(100, 130)
    for lines, kept in (([short, long], [5, 15]), ([long, short], [15, 5]), ([long, long], [10, 10]), ([long], [20, 0])):
        starts = set()
        for _ in range(50):
            pair = split(lines, 20, rng)
            assert [len(segment) for segment in pair] == kept
            for segment in pair:
                assert np.array_equal(segment, np.arange(len(segment)) + (segment[0] if len(segment) else 0))
            starts.add(int(max(segment[0] for segment in pair if len(segment))))
        assert len(starts) > 3
        assert 100 <= min(starts) < max(starts) <= 120
    odd = split([long, long], 21, rng)
    assert [len(segment) for segment in odd] == [11, 10]  # of two equally long ones, B is shortened


def test_draws_reach_both_bounds():
    rng = seeded(0, "test")
    assert {draw(2, 5, rng) for _ in range(200)} == {2, 3, 4, 5}


def test_the_seed_fixes_the_pairs(cache, pairs_tokenizer, tmp_path, monkeypatch):
    text = written(tmp_path / "t", documents(60))
    first, other = (load_pairs(text, pairs_tokenizer, LENGTH, seed) for seed in (1, 2))
    monkeypatch.setattr(token_cache, "HF_HOME", str(tmp_path / "another"))
    assert load_pairs(text, pairs_tokenizer, LENGTH, 1).sha256 == first.sha256
    assert other.sha256 != first.sha256
