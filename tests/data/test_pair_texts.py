"""What a text of pairs may hold, what of it is read, and that pairs are made once."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import LENGTH, WORDS, document, documents, examples, in_memory, line, reference, written
from small_hub import write_shards
from transformers import AutoTokenizer

from bert_tickets.data import pair_dataset, text_source, token_cache
from bert_tickets.data.pair_dataset import FIRST_LINE, load_pairs
from bert_tickets.data.text_source import HUB, WIKITEXT, file_text, find_texts
from bert_tickets.errors import UserError

# ---- the text ----


@settings(deadline=None, max_examples=40)
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 5, 19, 20, 25, 70]), st.sampled_from(["\n", "\r\n", " \n", "\n\n", "\n \t\n", "\r\n\r\n"])
        ),
        max_size=30,
    ),
    size=st.sampled_from([16, 17, 100]),
)
def test_lines_are_put_together_across_pieces(pairs_tokenizer, tmp_path_factory, lines, size):
    rng = random.Random(len(lines))
    text = document(rng) + "\n" + "".join(line(rng, words) + end for words, end in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_source, "PIECE", size)
        patch.setattr(pair_dataset, "PIECES", 2)
        patch.setattr(token_cache, "HF_HOME", str(tmp_path_factory.mktemp("hf")))
        store = load_pairs(written(tmp_path_factory.getbasetemp() / "any", text), pairs_tokenizer, LENGTH, 1)
    assert examples(store) == reference(text.replace("\r\n", "\n"), pairs_tokenizer, LENGTH, 1)


def test_a_text_without_blank_lines_is_one_document(cache, pairs_tokenizer, tmp_path):
    rng = random.Random(0)
    text = "".join(line(rng, 25) + "\n" for _ in range(300))
    store = load_pairs(written(tmp_path / "t", text), pairs_tokenizer, LENGTH, 1)
    assert len(store) == 150
    assert examples(store) == reference(text, pairs_tokenizer, LENGTH, 1)


def test_one_long_line_is_a_alone(cache, pairs_tokenizer, tmp_path):
    text = " ".join(["aa", *WORDS, "zz"] * 3_000)
    assert len(text) > 12 * text_source.PIECE
    (found,) = examples(load_pairs(written(tmp_path / "t", text), pairs_tokenizer, LENGTH, 1))
    assert (len(found[0]), set(found[1])) == (LENGTH - 1, {0})


def test_the_text_of_a_special_token_is_ordinary_text(cache, pairs_tokenizer):
    (found,) = examples(load_pairs(in_memory("[SEP] " * 20), pairs_tokenizer, 200, 1))
    assert pairs_tokenizer.convert_ids_to_tokens(found[0])[:5] == ["[CLS]", "[", "s", "##e", "##p"]
    assert found[0].count(pairs_tokenizer.sep_token_id) == 1


def test_paragraphs_of_wikitext_on_the_hub_are_documents(cache, hub_cache, pairs_tokenizer):
    rows = ["", " = aa = \n", "", *(f" {' '.join(WORDS[i : i + 20])} \n" for i in range(3)), "", f" {' '.join(WORDS[:25])} \n"]
    for part in ("train", "validation"):
        write_shards(hub_cache / f"datasets--{WIKITEXT.replace('/', '--')}/snapshots/0/{HUB[WIKITEXT]}", part, {"text": rows})
    store = load_pairs(find_texts(None)["train"], pairs_tokenizer, 128, 5)
    assert store.lengths.tolist() == [3 * 20 + 3, 25 + 2]


@pytest.mark.parametrize("text", ["", "\n\n", " = aa = \n\n aa ba\n", "aa " * 19])
def test_a_text_without_a_pair_is_a_users_error(cache, pairs_tokenizer, text):
    with pytest.raises(UserError, match=f"a text has no document .* {FIRST_LINE} word pieces or more, and no ="):
        load_pairs(in_memory(text), pairs_tokenizer, LENGTH, 1)
    assert not cache.exists()


def test_a_length_without_room_for_a_pair_is_a_users_error(cache, pairs_tokenizer):
    with pytest.raises(UserError, match="--max-length 4 is too small for pairs: it must be at least 5"):
        load_pairs(in_memory("aa " * 30), pairs_tokenizer, 4, 1)


# ---- limit, cache, memory ----


def test_a_limit_takes_the_first_pairs_and_reads_no_further(cache, pairs_tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "t"
    path.write_bytes(documents(400).encode() + b"\xff")
    monkeypatch.setattr(text_source, "PIECE", 1 << 10)
    monkeypatch.setattr(pair_dataset, "PIECES", 2)
    few, more = (load_pairs(file_text(path), pairs_tokenizer, LENGTH, 1, limit) for limit in (5, 9))
    assert (len(few), len(more)) == (5, 9)
    assert examples(more)[:5] == examples(few)
    with pytest.raises(UserError, match="not UTF-8"):
        load_pairs(file_text(path), pairs_tokenizer, LENGTH, 1)
    whole = written(path, documents(60))
    assert load_pairs(whole, pairs_tokenizer, LENGTH, 1, 10**6).sha256 == load_pairs(whole, pairs_tokenizer, LENGTH, 1).sha256


def test_a_text_is_read_once(cache, pairs_tokenizer, pairs_bert, tmp_path):
    """Another text, tokenizer, length, seed or limit is another entry; the last call of the tokenizer has no effect."""
    text, other = written(tmp_path / "t", documents(60)), AutoTokenizer.from_pretrained(pairs_bert)
    other(["aa", "ba"], truncation=True, max_length=3, padding="max_length")
    made = load_pairs(text, other, LENGTH, 1)
    assert load_pairs(replace(text, read=None), pairs_tokenizer, LENGTH, 1).sha256 == made.sha256
    assert len(list(cache.iterdir())) == 1
    for arguments in ((LENGTH + 1, 1), (LENGTH, 2), (LENGTH, 1, 30)):
        load_pairs(text, pairs_tokenizer, *arguments)
    load_pairs(written(tmp_path / "u", documents(61)), pairs_tokenizer, LENGTH, 1)
    other.add_tokens(["aabb"])
    load_pairs(text, other, LENGTH, 1)
    other = AutoTokenizer.from_pretrained(pairs_bert)
    other.cls_token = "[MASK]"  # of no effect on the tokenizer that is in the entry's name
    assert examples(load_pairs(text, other, LENGTH, 1))[0][0][0] == pairs_tokenizer.mask_token_id
    assert len(list(cache.iterdir())) == 7


def test_a_damaged_entry_is_made_again(cache, pairs_tokenizer, tmp_path):
    text = written(tmp_path / "t", documents(60))
    first = load_pairs(text, pairs_tokenizer, LENGTH, 1).sha256
    (entry,) = cache.iterdir()
    data = entry.read_bytes()
    for damaged in (data[:-8], data[:-8] + b"\xff" * 8, b""):
        entry.write_bytes(damaged)
        assert load_pairs(text, pairs_tokenizer, LENGTH, 1).sha256 == first
        assert entry.read_bytes() == data


def test_only_the_arrays_are_in_memory(pairs_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PIECE", 1 << 12)
    monkeypatch.setattr(pair_dataset, "PIECES", 2)
    peaks, sizes = [], []
    for count in (50, 100, 1500):  # the first call fills caches
        text = written(tmp_path / "t", documents(count))
        tracemalloc.start()
        made = pair_dataset.make_pairs(text, pairs_tokenizer, LENGTH, 1, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        sizes.append(sum(array.nbytes for array in made.values()))
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 1.3 * (sizes[2] - sizes[1])
