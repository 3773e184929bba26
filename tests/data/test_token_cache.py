"""Texts are tokenized once; the cache is never out of date, and a damaged entry is made again."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from bert_tickets.data import token_cache
from bert_tickets.data.token_cache import tokenize

TEXTS = ["the film was good", "a café is naïve", "", "it's bad"]


@pytest.mark.parametrize("columns", [[TEXTS], [TEXTS, TEXTS[::-1]]])
def test_tokens_are_those_of_each_text_and_a_damaged_entry_is_made_again(cache, tokenizer, columns, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 3)  # of the four texts
    first = tokenize(tokenizer, columns, 12)
    (entry,) = cache.iterdir()
    data, about = entry.read_bytes(), entry.stat()
    assert tokenize(tokenizer, columns, 12).sha256() == first.sha256()
    assert entry.stat() == about  # it was read
    entry.write_bytes(data[:-9])
    assert tokenize(tokenizer, columns, 12).sha256() == first.sha256()
    assert entry.read_bytes() == data
    starts = np.cumsum(first.lengths) - first.lengths
    for i, texts in enumerate(zip(*columns, strict=True)):
        # a batch of one: a plain call takes an empty second text for none at all
        alone = tokenizer(*([text] for text in texts), truncation="longest_first", max_length=12)
        part = slice(starts[i], starts[i] + first.lengths[i])
        assert first.ids[part].tolist() == alone["input_ids"][0]
        assert first.types[part].tolist() == alone["token_type_ids"][0]


def test_another_text_length_column_or_tokenizer_is_another_entry(cache, bert_dir):
    tokenizer = AutoTokenizer.from_pretrained(bert_dir)
    tokenize(tokenizer, [TEXTS], 12)
    tokenize(tokenizer, [TEXTS], 11)
    tokenize(tokenizer, [TEXTS[:3]], 12)
    tokenize(tokenizer, [[TEXTS[0], "a café", " is naïve", TEXTS[3]]], 12)  # the same letters, cut elsewhere
    tokenize(tokenizer, [TEXTS[:2], TEXTS[2:]], 12)
    tokenizer.backend_tokenizer.add_tokens(["naïve"])
    tokenize(tokenizer, [TEXTS], 12)
    assert len(list(cache.iterdir())) == 6


def test_a_cache_that_cannot_be_written_is_reported_and_not_needed(tmp_path, monkeypatch, tokenizer, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(token_cache, "HF_HOME", str(tmp_path / "file"))
    assert len(tokenize(tokenizer, [TEXTS], 12).lengths) == 4
    assert "not cached" in capsys.readouterr().out
