"""A text becomes blocks of tokens: each token once and in order, tokenized once, in little memory."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import OTHERS
from small_hub import write_shards
from transformers import AutoTokenizer

from bert_tickets.data import mlm_dataset, text_source, token_cache
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.mlm_dataset import load_corpus, read_tokens
from bert_tickets.data.text_source import HELD_OUT, HUB, PIECE, ROWS, WIKIPEDIA, WIKITEXT, file_text, find_texts
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError

LENGTH = 12


def words(count: int, seed: int = 0) -> str:
    """Draw words of the fixture's vocabulary, in lines."""
    rng = random.Random(seed)
    return "".join(word + rng.choice("     \n.") for word in rng.choices(OTHERS, k=count))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def stream_of(path: Path, tokenizer, most: int | None = None) -> list[int]:
    return read_tokens(file_text(path), tokenizer, most)[0].tolist()


# ---- a stream, and its blocks ----


def test_blocks_are_those_of_the_released_code_and_a_batch_is_like_a_token_stores(cache, tokenizer, tmp_path):
    """As `TextDataset` of the released LT_pretrain.py: the whole file at once, the tail dropped."""
    text = words(500)
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    cls, sep, inner = tokenizer.cls_token_id, tokenizer.sep_token_id, LENGTH - 2
    blocks = [[cls, *ids[i : i + inner], sep] for i in range(0, len(ids) - inner + 1, inner)]
    assert len(ids) % inner > 0
    found = load_corpus(file_text(written(tmp_path / "t", text)), tokenizer, LENGTH)
    store = TokenStore(Tokens.of(blocks, [[0] * LENGTH] * len(blocks)), np.zeros(len(blocks)))
    assert found.lengths.tolist() == store.lengths.tolist()
    assert found.lengths.strides == (0,)  # takes no memory
    for examples in (torch.arange(len(blocks)), torch.tensor([3, 0, 3])):
        batch, expected = found.batch(examples), store.batch(examples)
        for name in ("input_ids", "token_type_ids", "position_ids", "rows", "starts", "lens"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        assert batch.labels.tolist() == batch.input_ids[0].tolist()
        assert (batch.lengths.tolist(), batch.longest) == (expected.lengths.tolist(), LENGTH)


@settings(deadline=None, max_examples=30)
@given(
    pieces=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="[]"), max_size=12),
            st.sampled_from([" ", "\n", "\r\n", "\n\n", "  "]),
        ),
        max_size=40,
    ),
    size=st.sampled_from([16, 17, 40]),
    bom=st.booleans(),
)
def test_any_text_read_in_pieces_is_the_text_at_once(tokenizer, tmp_path_factory, pieces, size, bom):
    text = "a" + "".join(word + gap for word, gap in pieces)
    path = written(tmp_path_factory.getbasetemp() / "any", b"\xef\xbb\xbf" * bom + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_source, "PIECE", size)
        patch.setattr(mlm_dataset, "PIECES", 2)
        assert "".join(file_text(path).read()) == text
        patch.setattr(token_cache, "HF_HOME", str(tmp_path_factory.mktemp("hf")))
        assert stream_of(path, tokenizer) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("word", ["é,", "a ", "a"])
def test_a_long_line_or_word_is_read_in_pieces(cache, tokenizer, tmp_path, word):
    path = written(tmp_path / "t", word * (3 * PIECE))
    assert max(map(len, file_text(path).read())) <= 2 * PIECE
    unknown = [tokenizer.unk_token_id] * 2  # as any word of over a hundred letters
    expected = unknown if word == "a" else tokenizer(word * 2, add_special_tokens=False)["input_ids"][:2]
    assert stream_of(path, tokenizer)[:2] == expected


def test_the_text_of_a_special_token_is_ordinary_text(cache, tokenizer, tmp_path):
    path = written(tmp_path / "t", "[SEP] the [MASK] [CLS][PAD] a")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert special.isdisjoint(stream_of(path, tokenizer))


def test_the_sha256_is_of_the_blocks_and_their_length(cache, tokenizer, tmp_path):
    files = {name: written(tmp_path / name, words(500, name == "other")) for name in ("text", "other", "same")}
    cases = [("text", LENGTH, None), ("other", LENGTH, None), ("text", 402, None), ("text", 403, None), ("text", LENGTH, 5)]
    cases.append(("same", LENGTH, None))
    found = [load_corpus(file_text(files[name]), tokenizer, length, limit).sha256 for name, length, limit in cases]
    assert found[0] == found[-1]
    assert len(set(found)) == 5


def test_a_limit_takes_the_first_blocks_and_reads_no_further(cache, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(mlm_dataset, "PIECES", 1)
    path = written(tmp_path / "t", words(40000).encode() + b"\xff")  # an error for all who read to the end
    few, more = (load_corpus(file_text(path), tokenizer, LENGTH, limit) for limit in (5, 9))
    assert (len(few), len(more)) == (5, 9)
    assert torch.equal(few.batch(torch.arange(5)).input_ids, more.batch(torch.arange(5)).input_ids)
    with pytest.raises(UserError, match="not UTF-8"):
        load_corpus(file_text(path), tokenizer, LENGTH)
    whole = file_text(written(tmp_path / "u", words(500)))
    assert load_corpus(whole, tokenizer, LENGTH, 10**9).sha256 == load_corpus(whole, tokenizer, LENGTH).sha256


@pytest.mark.parametrize(("text", "nats"), [("a a a a", 0.0), ("a a a is", 0.5623351446188083)])
def test_unigram_entropy_is_of_the_tokens_and_not_of_the_ends(cache, tokenizer, tmp_path, text, nats):
    found = load_corpus(file_text(written(tmp_path / "t", text)), tokenizer, 6)
    assert found.unigram_entropy == pytest.approx(nats, abs=1e-12)


# ---- the cache ----


def test_a_text_is_tokenized_once_for_all_block_lengths(cache, tokenizer, bert_dir, tmp_path):
    """Another text, tokenizer or limit is another entry; the last call of the tokenizer has no effect."""
    path = written(tmp_path / "t", words(500))
    text = file_text(path)
    other = AutoTokenizer.from_pretrained(bert_dir)
    other(["the film", "a"], truncation=True, max_length=3, padding="max_length")
    load_corpus(text, other, LENGTH)
    cannot_be_read = replace(text, read=None)
    for length in (LENGTH, 2 * LENGTH):
        load_corpus(cannot_be_read, tokenizer, length)
    assert stream_of(path, tokenizer) == tokenizer(words(500), add_special_tokens=False)["input_ids"]
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".tokens"]
    other.add_tokens(["naïve"])
    stream_of(path, other)
    stream_of(path, tokenizer, 30)
    stream_of(written(path, words(499)), tokenizer)
    assert len(list(cache.glob("*.tokens"))) == 4


@pytest.mark.parametrize("suffix", [".tokens", ".json"])
def test_a_damaged_entry_is_made_again(cache, tokenizer, tmp_path, suffix):
    text = file_text(written(tmp_path / "t", words(500)))
    read_tokens(text, tokenizer)
    (entry,) = cache.glob(f"*{suffix}")
    data = entry.read_bytes()
    entry.unlink()  # it is mapped
    entry.write_bytes(data[:-8])
    read_tokens(text, tokenizer)
    assert entry.read_bytes() == data


def test_processes_may_fill_the_cache_at_the_same_time(cache, tokenizer, tmp_path):
    text = file_text(written(tmp_path / "t", words(3000)))
    expected = tokenizer(words(3000), add_special_tokens=False)["input_ids"]

    def check():
        assert read_tokens(text, tokenizer)[0].tolist() == expected

    children = [multiprocessing.get_context("fork").Process(target=check) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert sorted(entry.suffix for entry in cache.iterdir()) == [".json", ".tokens"]


def test_memory_stays_flat_however_long_the_text(cache, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PIECE", 1 << 12)
    monkeypatch.setattr(mlm_dataset, "PIECES", 2)
    once, peaks = words(4000), []
    for times in (1, 2, 12):  # the first call fills caches
        path = written(tmp_path / "t", once * times)
        tracemalloc.start()
        load_corpus(file_text(path), tokenizer, 128)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


# ---- other content ----


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xef\xbb\xbf \n\n \t\n", "is empty"),
        (b"the film is good", "has 4 tokens, fewer than the 10 of a block of --max-length 12"),
        (("the café " * 9000 + "é").encode()[:-1], "not UTF-8 text: byte 90000 is 0xc3"),
        (("the film is good " * 99).encode("utf-16-le"), "has NUL characters"),
        (b"\xef\xbb\xbf" + b"the " * 50000 + b"\xff", "not UTF-8 text: byte 200003 is 0xff"),
    ],
    ids=["empty", "short", "torn", "utf-16", "late"],
)
def test_a_file_without_a_block_of_text_is_a_users_error(cache, tokenizer, tmp_path, content, says):
    path = written(tmp_path / "en.train", content)
    with pytest.raises(UserError, match=says) as refusal:
        load_corpus(file_text(path), tokenizer, LENGTH)
    assert str(path) in str(refusal.value)
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("limit", [None, 5])
def test_a_file_that_changes_while_it_is_read_is_not_cached(cache, tokenizer, tmp_path, limit):
    path = written(tmp_path / "t", words(40000))
    text = file_text(path)
    written(path, words(40001))
    with pytest.raises(UserError, match="changed while it was read"):
        read_tokens(text, tokenizer, limit)
    assert list(cache.iterdir()) == []


# ---- the hub ----


def put_in(hub_cache: Path, name: str, revision: str, splits: dict[str, list[str]], shards: int = 1) -> None:
    """Write a revision of a data set into the hub's cache."""
    folder = hub_cache / f"datasets--{name.replace('/', '--')}" / "snapshots" / revision / HUB[name]
    for split, rows in splits.items():
        write_shards(folder, split, {"text": rows}, shards)


def test_wikitext_is_read_once_for_each_revision(cache, hub_cache, tokenizer, tmp_path, monkeypatch):
    text = words(3000)
    rows = [line + "\n" for line in text.split("\n")]
    assert len(rows) > 2 * ROWS
    put_in(hub_cache, WIKITEXT, "0123", {"train": rows, "validation": rows[::-1]}, shards=2)
    found = {split: read_tokens(text, tokenizer)[0] for split, text in find_texts(None).items()}
    assert found["train"].tolist() == stream_of(written(tmp_path / "t", text), tokenizer)
    assert found["validation"].tolist() == stream_of(written(tmp_path / "v", "".join(rows[::-1])), tokenizer)
    read_tokens(replace(find_texts(None)["train"], read=None), tokenizer)
    (tmp_path / WIKITEXT).mkdir(parents=True)
    written(tmp_path / WIKITEXT / "en.train", "another")  # a folder of this name counts only if it is given
    monkeypatch.chdir(tmp_path)
    assert find_texts(None)["train"].name == f"{WIKITEXT} (train)"
    shutil.rmtree(hub_cache / "datasets--Salesforce--wikitext")
    put_in(hub_cache, WIKITEXT, "4567", {"train": ["the film"], "validation": ["a"]})
    assert len(read_tokens(find_texts(None)["train"], tokenizer)[0]) == 2


def test_lines_and_articles_of_the_hub_keep_their_ends(hub_cache, monkeypatch):
    """A blank line ends a document; the rows of WikiText have their line's end, but blank ones are empty."""
    monkeypatch.setattr(text_source, "ROWS", 2)
    put_in(hub_cache, WIKITEXT, "0123", {"train": ["", " = A = \n", "", " the film \n", " a film \n", ""], "validation": ["a"]})
    assert "".join(find_texts(None)["train"].read()) == "\n = A = \n\n the film \n a film \n\n"
    put_in(hub_cache, WIKIPEDIA, "0123", {"train": ["good"] * HELD_OUT + ["the film\n\na", "is\n", "bad"]})
    assert "".join(find_texts(WIKIPEDIA)["train"].read()) == "the film\n\na\n\nis\n\nbad\n\n"


def test_wikipedias_first_articles_are_held_out(cache, hub_cache, tokenizer):
    articles = [f"good {OTHERS[0]}" if number < HELD_OUT else "bad" for number in range(HELD_OUT + 7)]
    put_in(hub_cache, WIKIPEDIA, "0123", {"train": articles}, shards=3)
    found = {split: read_tokens(text, tokenizer)[0] for split, text in find_texts(WIKIPEDIA).items()}
    assert found["train"].tolist() == tokenizer(" bad" * 7, add_special_tokens=False)["input_ids"]
    assert found["validation"].tolist() == tokenizer(" good film" * HELD_OUT, add_special_tokens=False)["input_ids"]


def test_a_file_of_the_hub_is_not_needed_before_it_is_read(cache, hub_cache, tokenizer, monkeypatch):
    monkeypatch.setattr(mlm_dataset, "PIECES", 1)
    put_in(hub_cache, WIKIPEDIA, "0123", {"train": ["the film"] * (3 * HELD_OUT)}, shards=3)
    for file in hub_cache.rglob("train-00002-of-00003.parquet"):
        file.unlink()
    assert len(read_tokens(find_texts(WIKIPEDIA)["train"], tokenizer, 10)[0]) == 10
