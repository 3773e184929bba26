"""Texts are tokenized once; the cache is never out of date, and a damaged entry is made again."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from bert_tickets.data import token_cache
from bert_tickets.data.token_cache import Tokens, tokenize

TEXTS = ["the film was good", "a café is naïve", "", "it's bad"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "HF_HOME", str(tmp_path))
    return tmp_path / "bert_tickets"


@pytest.fixture
def tokenizer(bert_dir):
    """A tokenizer that counts its calls."""
    plain = AutoTokenizer.from_pretrained(bert_dir)

    class Counting:
        calls = 0
        backend_tokenizer = plain.backend_tokenizer
        truncation_side = plain.truncation_side

        def __call__(self, *columns, **options):
            Counting.calls += 1
            return plain(*columns, **options)

    return Counting()


def arrays(tokens: Tokens) -> list:
    return [(array.dtype, array.tolist()) for array in vars(tokens).values()] + [tokens.sha256()]


@pytest.mark.parametrize("columns", [[TEXTS], [TEXTS, TEXTS[::-1]]])
def test_the_second_call_reads_what_the_first_wrote(cache, tokenizer, columns, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 3)  # of the four texts
    first, second = tokenize(tokenizer, columns, 12), tokenize(tokenizer, columns, 12)
    assert tokenizer.calls == 2
    assert arrays(first) == arrays(second)
    starts = np.cumsum(first.lengths) - first.lengths
    for i, texts in enumerate(zip(*columns, strict=True)):
        # a batch of one: a plain call takes an empty second text for none at all
        alone = tokenizer(*([text] for text in texts), truncation="longest_first", max_length=12)
        part = slice(starts[i], starts[i] + first.lengths[i])
        assert first.ids[part].tolist() == alone["input_ids"][0]
        assert first.types[part].tolist() == alone["token_type_ids"][0]


def test_another_text_length_column_or_tokenizer_is_another_entry(cache, tokenizer):
    tokenize(tokenizer, [TEXTS], 12)
    tokenize(tokenizer, [TEXTS], 11)
    tokenize(tokenizer, [TEXTS[:3]], 12)
    tokenize(tokenizer, [[TEXTS[0], "a café", " is naïve", TEXTS[3]]], 12)  # the same letters, cut elsewhere
    tokenize(tokenizer, [TEXTS[:2], TEXTS[2:]], 12)
    tokenizer.backend_tokenizer.add_tokens(["naïve"])
    tokenize(tokenizer, [TEXTS], 12)
    assert tokenizer.calls == 6 == len(list(cache.iterdir()))


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]])
def test_a_damaged_entry_is_made_again(cache, tokenizer, damage):
    expected = arrays(tokenize(tokenizer, [TEXTS], 12))
    (entry,) = cache.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    for _ in range(2):
        assert arrays(tokenize(tokenizer, [TEXTS], 12)) == expected
        assert tokenizer.calls == 2


def test_a_cache_that_cannot_be_written_is_reported_and_not_needed(tmp_path, monkeypatch, tokenizer, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(token_cache, "HF_HOME", str(tmp_path / "file"))
    assert len(tokenize(tokenizer, [TEXTS], 12).lengths) == 4
    assert "not cached" in capsys.readouterr().out
