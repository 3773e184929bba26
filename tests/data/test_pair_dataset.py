"""A text becomes pairs of segments, as a slow and plain reference of the rule makes them; they are made once."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_hub import write_shards
from transformers import AutoTokenizer

from bert_tickets.bench.tiny_bert import LETTERS, SPECIAL, save_tokenizer
from bert_tickets.data import pair_dataset, text_source, token_cache
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.pair_dataset import FIRST_LINE, SHORT_RATE, draw, load_pairs, split
from bert_tickets.data.text_source import HUB, WIKITEXT, Text, file_text, find_texts
from bert_tickets.errors import UserError
from bert_tickets.seeds import seeded

WORDS = [f"{letter}{second}" for letter in "abcd" for second in LETTERS]  # each is one word piece
LENGTH = 40


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of a vocabulary that has `=`, as BERT's."""
    folder = tmp_path_factory.mktemp("pairs")
    save_tokenizer([*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), *WORDS, "=", ".", "[", "]"], folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(bert):
    return AutoTokenizer.from_pretrained(bert)


def line(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def document(rng: random.Random, first: int = 30, lines: int = 6) -> str:
    """A first line of so many words, and up to `lines` lines of 1 to 30 words."""
    return "".join(line(rng, words) + "\n" for words in [first, *(rng.randint(1, 30) for _ in range(rng.randint(0, lines)))])


def documents(count: int, seed: int = 0) -> str:
    """Documents, headings between them, short ones, and one far longer than the others."""
    rng = random.Random(seed)
    return "\n".join(
        f" = {line(rng, 25)} = \n" if number % 7 == 3 else document(rng, rng.randint(10, 90), 60 if number == 5 else 6)
        for number in range(count)
    )


def written(path: Path, content: str) -> Text:
    path.write_bytes(content.encode())
    return file_text(path)


def in_memory(content: str) -> Text:
    return Text("a text", content, len(content), lambda: iter([content]))


def examples(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    """The token and type ids of each example."""
    batch = store.batch(torch.arange(len(store)))
    parts = batch.input_ids[0].split(batch.lens.tolist()), batch.token_type_ids[0].split(batch.lens.tolist())
    return [(ids.tolist(), types.tolist()) for ids, types in zip(*parts, strict=True)]


def reference(text: str, tokenizer, length: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Make the pairs of a text by the rule of BERT's `create_pretraining_data.py`, token by token."""
    found, rng, room = [], seeded(seed, "pairs"), length - 3
    pieces = [tokenizer.tokenize(line) for line in text.split("\n")]
    documents: list[list[list[str]]] = [[]]
    for tokens in pieces:
        if tokens:
            documents[-1].append(tokens)
        else:
            documents.append([])
    for lines in documents:
        if not lines or "=" in lines[0] or len(lines[0]) < 20:
            continue
        target = room
        if float(torch.rand((), generator=rng)) < 0.1:
            target = int(torch.randint(2, room + 1, (), generator=rng))
        chunk: list[list[str]] = []
        for i, tokens in enumerate(lines):
            chunk.append(tokens)
            if i < len(lines) - 1 and sum(map(len, chunk)) < target:
                continue
            a_end = int(torch.randint(1, len(chunk), (), generator=rng)) if len(chunk) > 1 else 1
            a = [token for segment in chunk[:a_end] for token in segment]
            b = [token for segment in chunk[a_end:] for token in segment]
            ends = torch.randint(2, (max(0, len(a) + len(b) - room),), generator=rng).tolist()
            while len(a) + len(b) > room:
                longer = a if len(a) > len(b) else b
                longer.pop(0 if ends.pop(0) else -1)
            tokens = ["[CLS]", *a, "[SEP]"] + ([*b, "[SEP]"] if b else [])
            types = [0] * (len(a) + 2) + [1] * (len(tokens) - len(a) - 2)
            found.append((tokenizer.convert_tokens_to_ids(tokens), types))
            chunk = []
    return found


# ---- the rule ----


@pytest.mark.parametrize("length", [5, 6, LENGTH, 41, 512])
@pytest.mark.parametrize("seed", [1, 2])
def test_pairs_are_those_of_the_plain_rule(cache, tokenizer, tmp_path, length, seed):
    text = documents(200)
    store = load_pairs(written(tmp_path / "t", text), tokenizer, length, seed)
    expected = reference(text, tokenizer, length, seed)
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
def test_documents_are_dropped_by_their_first_line(cache, tokenizer, text, kept):
    beside = "\n\n" + " ".join(WORDS[:30])  # otherwise there may be no pair
    store = load_pairs(in_memory(text + beside), tokenizer, 128, 1)
    assert len(store) == kept + 1
    assert examples(store)[-1][0][1:-1] == tokenizer.convert_tokens_to_ids(WORDS[:30])


def test_without_an_equals_sign_in_the_vocabulary_no_line_is_a_heading(cache, tmp_path):
    save_tokenizer([*SPECIAL, *LETTERS], tmp_path)
    store = load_pairs(in_memory("é " * 20 + "="), AutoTokenizer.from_pretrained(tmp_path), 128, 1)
    assert store.lengths.tolist() == [21 + 2]


def test_a_tenth_of_the_documents_have_a_shorter_target(cache, tokenizer):
    """Of lines of one token after the first, the first pair of a document shows its target."""
    room, count = 30, 2000
    text = (" ".join(WORDS[:20]) + "\n" + "aa\n" * room + "\n") * count
    store = load_pairs(in_memory(text), tokenizer, room + 3, 1)
    first = [len(ids) - 3 for ids, _ in examples(store) if ids[1:20] == tokenizer.convert_tokens_to_ids(WORDS[:19])]
    shorter = [length for length in first if length < room]
    assert len(shorter) / count == pytest.approx(SHORT_RATE, abs=0.02)
    assert (min(shorter), max(shorter)) == (19, room - 1)  # the first line alone has one [SEP]
    assert all(0 < shorter.count(target) < 25 for target in range(21, room))  # about 6.9 each


def test_every_line_may_begin_b_and_tokens_go_from_both_ends_of_the_longer(tokenizer):
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


def test_the_seed_fixes_the_pairs(cache, tokenizer, tmp_path, monkeypatch):
    text = written(tmp_path / "t", documents(60))
    first, other = (load_pairs(text, tokenizer, LENGTH, seed) for seed in (1, 2))
    monkeypatch.setattr(token_cache, "HF_HOME", str(tmp_path / "another"))
    assert load_pairs(text, tokenizer, LENGTH, 1).sha256 == first.sha256
    assert other.sha256 != first.sha256


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
def test_lines_are_put_together_across_pieces(tokenizer, tmp_path_factory, lines, size):
    rng = random.Random(len(lines))
    text = document(rng) + "\n" + "".join(line(rng, words) + end for words, end in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_source, "PIECE", size)
        patch.setattr(pair_dataset, "PIECES", 2)
        patch.setattr(token_cache, "HF_HOME", str(tmp_path_factory.mktemp("hf")))
        store = load_pairs(written(tmp_path_factory.getbasetemp() / "any", text), tokenizer, LENGTH, 1)
    assert examples(store) == reference(text.replace("\r\n", "\n"), tokenizer, LENGTH, 1)


def test_a_text_without_blank_lines_is_one_document(cache, tokenizer, tmp_path):
    rng = random.Random(0)
    text = "".join(line(rng, 25) + "\n" for _ in range(300))
    store = load_pairs(written(tmp_path / "t", text), tokenizer, LENGTH, 1)
    assert len(store) == 150
    assert examples(store) == reference(text, tokenizer, LENGTH, 1)


def test_one_long_line_is_a_alone(cache, tokenizer, tmp_path):
    text = " ".join(["aa", *WORDS, "zz"] * 3_000)
    assert len(text) > 12 * text_source.PIECE
    (found,) = examples(load_pairs(written(tmp_path / "t", text), tokenizer, LENGTH, 1))
    assert (len(found[0]), set(found[1])) == (LENGTH - 1, {0})


def test_the_text_of_a_special_token_is_ordinary_text(cache, tokenizer):
    (found,) = examples(load_pairs(in_memory("[SEP] " * 20), tokenizer, 200, 1))
    assert tokenizer.convert_ids_to_tokens(found[0])[:5] == ["[CLS]", "[", "s", "##e", "##p"]
    assert found[0].count(tokenizer.sep_token_id) == 1


def test_paragraphs_of_wikitext_on_the_hub_are_documents(cache, hub_cache, tokenizer):
    rows = ["", " = aa = \n", "", *(f" {' '.join(WORDS[i : i + 20])} \n" for i in range(3)), "", f" {' '.join(WORDS[:25])} \n"]
    for part in ("train", "validation"):
        write_shards(hub_cache / f"datasets--{WIKITEXT.replace('/', '--')}/snapshots/0/{HUB[WIKITEXT]}", part, {"text": rows})
    store = load_pairs(find_texts(None)["train"], tokenizer, 128, 5)
    assert store.lengths.tolist() == [3 * 20 + 3, 25 + 2]


@pytest.mark.parametrize("text", ["", "\n\n", " = aa = \n\n aa ba\n", "aa " * 19])
def test_a_text_without_a_pair_is_a_users_error(cache, tokenizer, text):
    with pytest.raises(UserError, match=f"a text has no document .* {FIRST_LINE} word pieces or more, and no ="):
        load_pairs(in_memory(text), tokenizer, LENGTH, 1)
    assert not cache.exists()


def test_a_length_without_room_for_a_pair_is_a_users_error(cache, tokenizer):
    with pytest.raises(UserError, match="--max-length 4 is too small for pairs: it must be at least 5"):
        load_pairs(in_memory("aa " * 30), tokenizer, 4, 1)


# ---- limit, cache, memory ----


def test_a_limit_takes_the_first_pairs_and_reads_no_further(cache, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "t"
    path.write_bytes(documents(400).encode() + b"\xff")
    monkeypatch.setattr(text_source, "PIECE", 1 << 10)
    monkeypatch.setattr(pair_dataset, "PIECES", 2)
    few, more = (load_pairs(file_text(path), tokenizer, LENGTH, 1, limit) for limit in (5, 9))
    assert (len(few), len(more)) == (5, 9)
    assert examples(more)[:5] == examples(few)
    with pytest.raises(UserError, match="not UTF-8"):
        load_pairs(file_text(path), tokenizer, LENGTH, 1)
    whole = written(path, documents(60))
    assert load_pairs(whole, tokenizer, LENGTH, 1, 10**6).sha256 == load_pairs(whole, tokenizer, LENGTH, 1).sha256


def test_a_text_is_read_once(cache, tokenizer, bert, tmp_path):
    """Another text, tokenizer, length, seed or limit is another entry; the last call of the tokenizer has no effect."""
    text, other = written(tmp_path / "t", documents(60)), AutoTokenizer.from_pretrained(bert)
    other(["aa", "ba"], truncation=True, max_length=3, padding="max_length")
    made = load_pairs(text, other, LENGTH, 1)
    assert load_pairs(replace(text, read=None), tokenizer, LENGTH, 1).sha256 == made.sha256
    assert len(list(cache.iterdir())) == 1
    for arguments in ((LENGTH + 1, 1), (LENGTH, 2), (LENGTH, 1, 30)):
        load_pairs(text, tokenizer, *arguments)
    load_pairs(written(tmp_path / "u", documents(61)), tokenizer, LENGTH, 1)
    other.add_tokens(["aabb"])
    load_pairs(text, other, LENGTH, 1)
    other = AutoTokenizer.from_pretrained(bert)
    other.cls_token = "[MASK]"  # of no effect on the tokenizer that is in the entry's name
    assert examples(load_pairs(text, other, LENGTH, 1))[0][0][0] == tokenizer.mask_token_id
    assert len(list(cache.iterdir())) == 7


def test_a_damaged_entry_is_made_again(cache, tokenizer, tmp_path):
    text = written(tmp_path / "t", documents(60))
    first = load_pairs(text, tokenizer, LENGTH, 1).sha256
    (entry,) = cache.iterdir()
    data = entry.read_bytes()
    for damaged in (data[:-8], data[:-8] + b"\xff" * 8, b""):
        entry.write_bytes(damaged)
        assert load_pairs(text, tokenizer, LENGTH, 1).sha256 == first
        assert entry.read_bytes() == data


def test_only_the_arrays_are_in_memory(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "PIECE", 1 << 12)
    monkeypatch.setattr(pair_dataset, "PIECES", 2)
    peaks, sizes = [], []
    for count in (50, 100, 1500):  # the first call fills caches
        text = written(tmp_path / "t", documents(count))
        tracemalloc.start()
        made = pair_dataset.make_pairs(text, tokenizer, LENGTH, 1, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        sizes.append(sum(array.nbytes for array in made.values()))
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 1.3 * (sizes[2] - sizes[1])
