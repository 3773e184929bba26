"""A text becomes blocks of tokens: each token once and in order, tokenised once, in little memory."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OTHERS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from bert_tickets.data import mlm_dataset as corpus
from bert_tickets.data import text_source as texts
from bert_tickets.data.batches import Batches, Store, by_length
from bert_tickets.data.mlm_dataset import Corpus, load_corpus, tokens_of
from bert_tickets.data.text_source import HELD_OUT, HUB, PIECE, WIKIPEDIA, WIKITEXT, file_text, find_texts, hub_text
from bert_tickets.errors import UserError

LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer(bert_dir):
    return AutoTokenizer.from_pretrained(bert_dir)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(corpus, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "bert_tickets"


def words(count: int, seed: int = 0) -> str:
    """Sentences of the fixture's vocabulary, a paragraph a line, some empty."""
    rng = random.Random(seed)
    return "".join(word + rng.choice("     \n.") for word in rng.choices(OTHERS, k=count))


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def stream_of(path: Path, tokenizer, most: int | None = None) -> list[int]:
    return tokens_of(file_text(path), tokenizer, most)[0].tolist()


def counted(path: Path):
    """A file as a `Text`, and how often it was read."""
    text, reads = file_text(path), []

    def read():
        reads.append(1)
        return text.read()

    return replace(text, read=read), reads


# ---- a stream, and its blocks ----


def test_blocks_are_what_the_released_code_cuts(cache, tokenizer, tmp_path):
    """`TextDataset` of the released LT_pretrain.py, written out: the whole file at once, the tail dropped."""
    text = words(500)
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    inner = LENGTH - 2
    expected = [
        [tokenizer.cls_token_id, *ids[i : i + inner], tokenizer.sep_token_id] for i in range(0, len(ids) - inner + 1, inner)
    ]
    found = load_corpus(file_text(written(tmp_path / "t", text)), tokenizer, LENGTH)
    assert len(ids) % inner > 0
    assert len(found) == len(expected)
    assert found.batch(torch.arange(len(found))).input_ids.view(-1, LENGTH).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(
    pieces=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="[]"), max_size=12),
            st.sampled_from([" ", "\n", "\r\n", "\n\n", "  "]),
        ),
        max_size=40,
    ),
    size=st.sampled_from([64, 65, 100, 1000]),
    bom=st.booleans(),
)
def test_any_text_read_in_pieces_is_the_text_at_once(tokenizer, tmp_path_factory, pieces, size, bom):
    text = "a" + "".join(word + gap for word, gap in pieces)
    path = written(tmp_path_factory.getbasetemp() / "any", b"\xef\xbb\xbf" * bom + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", size)
        patch.setattr(corpus, "PIECES", 2)
        assert "".join(file_text(path).read()) == text
        patch.setattr(corpus, "HF_HOME", str(tmp_path_factory.mktemp("hf")))
        assert stream_of(path, tokenizer) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("gap", ["", " ", "\n"])
def test_a_line_far_longer_than_a_piece_is_read_in_pieces(cache, tokenizer, tmp_path, gap):
    path = written(tmp_path / "t", (("a" if gap else "é,") + gap) * (5 * PIECE))
    assert max(map(len, file_text(path).read())) <= 2 * PIECE
    assert (
        stream_of(path, tokenizer)[:4] == tokenizer(f"{'a' if gap else 'é,'}{gap}" * 4, add_special_tokens=False)["input_ids"][:4]
    )


def test_a_word_that_never_ends_does_not_fill_the_memory(cache, tokenizer, tmp_path):
    path = written(tmp_path / "t", "a" * (5 * PIECE))
    assert max(map(len, file_text(path).read())) <= 2 * PIECE
    assert set(stream_of(path, tokenizer)) == {tokenizer.unk_token_id}  # as any word of more than a hundred letters


def test_words_that_look_like_special_tokens_are_words(cache, tokenizer, tmp_path):
    path = written(tmp_path / "t", "[SEP] the [MASK] [CLS][PAD] a")
    assert {tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id}.isdisjoint(
        stream_of(path, tokenizer)
    )


def test_what_the_tokenizer_was_asked_before_does_not_matter(cache, tokenizer, bert_dir, tmp_path):
    path = written(tmp_path / "t", words(100))
    expected = stream_of(path, tokenizer)
    used = AutoTokenizer.from_pretrained(bert_dir)
    used(["the film", "a"], truncation=True, max_length=3, padding="max_length")
    text, reads = counted(path)
    assert tokens_of(text, used)[0].tolist() == expected
    assert reads == []


# ---- a corpus in place of a store ----


@pytest.fixture
def blocks(cache, tokenizer, tmp_path) -> Corpus:
    return load_corpus(file_text(written(tmp_path / "t", words(500))), tokenizer, LENGTH)


def test_a_batch_is_its_blocks_end_to_end(blocks, tokenizer):
    store: Store = blocks
    batch = store.batch(torch.tensor([3, 0, 3]))
    assert {t.dtype for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {torch.int64}
    rows = batch.input_ids.view(3, LENGTH)
    assert rows[0].tolist() == rows[2].tolist() == blocks.batch(torch.tensor([3])).input_ids[0].tolist() != rows[1].tolist()
    assert set(rows[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(rows[:, -1].tolist()) == {tokenizer.sep_token_id}
    assert batch.token_type_ids.tolist() == [[0] * 3 * LENGTH]
    assert batch.position_ids.tolist() == [[*range(LENGTH)] * 3]
    assert batch.rows.tolist() == [0] * LENGTH + [1] * LENGTH + [2] * LENGTH
    assert batch.starts.tolist() == [0, LENGTH, 2 * LENGTH]
    assert batch.lens.tolist() == batch.lengths.tolist() == [LENGTH] * 3
    assert batch.labels.tolist() == batch.input_ids[0].tolist()
    assert batch.longest == LENGTH


def test_every_block_once_an_epoch_and_once_an_evaluation(blocks):
    batches = Batches(blocks, 7, seed=1)
    everything = blocks.batch(torch.arange(len(blocks))).input_ids.view(-1, LENGTH).tolist()
    epoch = [row for step in range(batches.per_epoch) for row in batches[step].input_ids.view(-1, LENGTH).tolist()]
    assert sorted(epoch) == sorted(everything)
    assert epoch != everything
    packs = list(by_length(blocks, 5 * LENGTH + 1))
    assert torch.cat([indices for indices, _ in packs]).tolist() == list(range(len(blocks)))
    assert torch.cat([batch.input_ids[0] for _, batch in packs]).view(-1, LENGTH).tolist() == everything
    assert {len(indices) for indices, _ in packs[:-1]} == {5}
    assert all(len(indices) == 1 for indices, _ in by_length(blocks, 3))


def test_lengths_take_no_memory_and_say_what_a_store_says(blocks):
    assert len(blocks.lengths) == len(blocks)
    assert blocks.lengths.dtype == np.int64
    assert blocks.lengths.sum() == len(blocks) * LENGTH
    assert blocks.lengths.strides == (0,)


def test_the_fingerprint_is_of_the_blocks_and_how_they_are_cut(cache, tokenizer, tmp_path):
    path, other = written(tmp_path / "t", words(500)), written(tmp_path / "u", words(500, seed=1))

    def fingerprint(path: Path, length: int = LENGTH, limit: int | None = None) -> str:
        return load_corpus(file_text(path), tokenizer, length, limit).sha256

    same = written(tmp_path / "same", path.read_bytes())
    assert fingerprint(path) == fingerprint(same)
    assert len({fingerprint(path), fingerprint(other), fingerprint(path, LENGTH + 1), fingerprint(path, limit=5)}) == 4


def test_a_limit_takes_the_first_blocks_and_reads_no_further(cache, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECES", 1)
    path = written(tmp_path / "t", words(40000).encode() + b"\xff")  # whoever reads to the end is told so
    assert path.stat().st_size > 2 * PIECE
    few = load_corpus(file_text(path), tokenizer, LENGTH, limit=5)
    more = load_corpus(file_text(path), tokenizer, LENGTH, limit=9)
    assert (len(few), len(more)) == (5, 9)
    assert torch.equal(few.batch(torch.arange(5)).input_ids, more.batch(torch.arange(5)).input_ids)
    with pytest.raises(UserError, match="not UTF-8"):
        load_corpus(file_text(path), tokenizer, LENGTH)


def test_a_limit_beyond_the_text_takes_all_of_it(cache, tokenizer, tmp_path):
    path = written(tmp_path / "t", words(500))
    assert load_corpus(file_text(path), tokenizer, LENGTH, 10**9).sha256 == load_corpus(file_text(path), tokenizer, LENGTH).sha256


@pytest.mark.parametrize(("text", "nats"), [("a a a a", 0.0), ("a is a is", math.log(2)), ("a a a is", 0.5623351446188083)])
def test_unigram_entropy_is_of_the_tokens_and_not_of_the_ends(cache, tokenizer, tmp_path, text, nats):
    found = load_corpus(file_text(written(tmp_path / "t", text)), tokenizer, 6)
    assert found.unigram_entropy == pytest.approx(nats, abs=1e-12)


def test_unigram_entropy_adds_up_over_many_blocks(tokenizer):
    rng = np.random.default_rng(0)
    stream = np.concatenate([rng.integers(5, 9, 4000), rng.integers(5, 60, 4000)]).astype(np.uint16)
    shares = np.unique(stream, return_counts=True)[1] / len(stream)
    assert Corpus(stream, "", (2, 3), 4).unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())


def test_large_vocabularies_take_four_bytes_a_token(cache, tokenizer, tmp_path, monkeypatch):
    path = written(tmp_path / "t", words(100))
    small = tokens_of(file_text(path), tokenizer)[0]
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 70_000)
    large = tokens_of(replace(file_text(path), key="another"), tokenizer)[0]
    assert (small.dtype, large.dtype) == (np.uint16, np.int32)
    assert small.tolist() == large.tolist()


# ---- the cache ----


def test_a_text_is_tokenised_once_for_every_block_length(cache, tokenizer, tmp_path):
    text, reads = counted(written(tmp_path / "t", words(500)))
    for length in (LENGTH, LENGTH, 2 * LENGTH):
        load_corpus(text, tokenizer, length)
    assert len(reads) == 1
    (entry,) = cache.iterdir()
    assert load_file(entry)["ids"].tolist() == stream_of(tmp_path / "t", tokenizer)  # a plain safetensors file


def test_another_text_tokenizer_or_limit_is_another_entry(cache, tokenizer, bert_dir, tmp_path):
    path = written(tmp_path / "t", words(500))
    other = AutoTokenizer.from_pretrained(bert_dir)
    other.add_tokens(["naïve"])
    stream_of(path, tokenizer)
    stream_of(path, other)
    stream_of(path, tokenizer, 30)
    stream_of(written(path, words(499)), tokenizer)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "longer", "flip", "header", "no facts", "hole", "empty", "foreign", "folder"])
def test_a_damaged_entry_is_made_again(cache, tokenizer, tmp_path, damage):
    text, reads = counted(written(tmp_path / "t", words(9000)))
    expected = tokens_of(text, tokenizer)[0].tolist()
    (entry,) = cache.iterdir()
    data = bytearray(entry.read_bytes())
    flipped = data.copy()
    flipped[{"flip": -3, "header": 60}.get(damage, 0)] ^= 1
    entry.unlink()
    bad = {
        "cut": data[:-8],
        "longer": data + b"\0\0",
        "flip": flipped,
        "header": flipped,
        "no facts": data.replace(b"facts", b"fakts"),
        "hole": data[:8192] + bytes(4096) + data[12288:],  # a page that a crash left empty
        "empty": b"",
        "foreign": b"\x10" + bytes(7) + b"{}" + b" " * 14,
        "folder": None,
    }[damage]
    if bad is None:
        entry.mkdir()
        with pytest.raises(UserError, match="cannot write"):
            tokens_of(text, tokenizer)
        entry.rmdir()
    else:
        entry.write_bytes(bad)
    assert tokens_of(text, tokenizer)[0].tolist() == expected
    again = len(reads)
    assert tokens_of(text, tokenizer)[0].tolist() == expected
    assert len(reads) == again > 1


@settings(deadline=None, max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_a_token(tokenizer, tmp_path_factory, where, bit):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("hf")
        patch.setattr(corpus, "HF_HOME", str(home))
        text = file_text(written(home / "t", words(300)))
        ids, sha256 = tokens_of(text, tokenizer)
        expected = ids.tolist(), sha256  # now: the mapped file is about to change
        (entry,) = (home / "bert_tickets").iterdir()
        data = bytearray(entry.read_bytes())
        data[int(where * len(data))] ^= 1 << bit
        entry.write_bytes(data)
        ids, sha256 = tokens_of(text, tokenizer)
        assert (ids.tolist(), sha256) == expected


def forked(action) -> int:
    """Run this in a process of its own: the status it ended with."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_kill_half_way_leaves_no_entry_and_little_else(cache, tokenizer, tmp_path):
    text = file_text(written(tmp_path / "t", words(60000)))
    expected = tokens_of(text, tokenizer)[0].tolist()
    (entry,) = cache.iterdir()
    entry.unlink()

    def read():
        yield from list(text.read())[:3]
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECES", 1)
        assert forked(lambda: tokens_of(replace(text, read=read), tokenizer)) == signal.SIGKILL
    (leftover,) = cache.iterdir()
    assert leftover.suffix == ".tmp"
    assert tokens_of(text, tokenizer)[0].tolist() == expected
    assert leftover.exists()  # it may be another process's
    entry.unlink()
    os.utime(leftover, (0, time.time() - 2 * corpus.DAY))
    tokens_of(text, tokenizer)
    assert list(cache.iterdir()) == [entry]


def test_an_error_half_way_leaves_nothing(cache, tokenizer, tmp_path):
    with pytest.raises(UserError, match="not UTF-8"):
        stream_of(written(tmp_path / "t", words(60000).encode() + b"\xff"), tokenizer)
    assert list(cache.iterdir()) == []


def test_processes_that_fill_the_cache_at_once_do_not_meet(cache, tokenizer, tmp_path):
    text = file_text(written(tmp_path / "t", words(3000)))
    expected = tokenizer(words(3000), add_special_tokens=False)["input_ids"]

    def check():
        found = tokens_of(text, tokenizer)[0].tolist()
        assert found == expected

    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            with contextlib.suppress(BaseException):
                check()
                os._exit(0)
            os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [entry.suffix for entry in cache.iterdir()] == [".safetensors"]
    check()


def test_a_full_disk_is_said_in_words(cache, tokenizer, tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="the disk is full"):
        stream_of(written(tmp_path / "t", words(50)), tokenizer)
    assert list(cache.iterdir()) == []


MEASURE = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from bert_tickets.data.mlm_dataset import load_corpus
from bert_tickets.data.text_source import file_text

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for path in sys.argv[2:]:
    blocks = load_corpus(file_text(Path(path)), tokenizer, 128)
    print(len(blocks), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_flat_however_long_the_text(bert_dir, tmp_path):
    once, paths = words(150_000).encode(), []
    for name, times in (("warm", 1), ("one", 2), ("four", 8)):
        paths.append(written(tmp_path / name, once * times + name.encode()))
    home = {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(bert_dir), *map(str, paths)],
        env=os.environ | home, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    (_, _), (blocks, before), (more, after) = (map(int, line.split()) for line in ran.stdout.splitlines())
    assert paths[1].stat().st_size > 1.3e6
    assert more > 3.9 * blocks
    assert after - before < 3000  # kilobytes: the text has 4.5 MB more


# ---- texts that are none ----


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\n \t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"the film is good", "has 4 tokens, and a block of --max-length 12 takes 10"),
        ("the café ".encode("latin-1") * 9, "not UTF-8 text: byte 7 is 0xe9"),
        (("the café " * 9000 + "é").encode()[:-1], "not UTF-8 text: byte 90000 is 0xc3"),
        (b"\xef\xbb\xbf" + b"the " * 50000 + b"\xff", "not UTF-8 text: byte 200003 is 0xff"),
        (b"the film " * 20000 + b"\0", "byte 180000 is NUL"),
        ("the film is good ".encode("utf-16") * 9, "byte 3 is NUL"),
        (b"\x7fELF\x02\x01\x01\x00" + bytes(range(256)), "byte 7 is NUL"),
        (b"\x1f\x8b\x08\x08" + bytes(range(1, 256)), "not UTF-8 text: byte 1 is 0x8b"),
    ],
    ids=["empty", "blank", "mark", "short", "latin", "torn", "late", "NUL", "utf-16", "binary", "gzip"],
)
def test_a_file_of_something_else_is_refused_in_words(cache, tokenizer, tmp_path, content, says):
    path = written(tmp_path / "en.train", content)
    with pytest.raises(UserError, match=says) as refusal:
        load_corpus(file_text(path), tokenizer, LENGTH)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("missing", ["en.train", "en.valid", "folder"])
def test_missing_data_name_the_three_ways_to_get_them(tmp_path, missing):
    for file in {"en.train", "en.valid"} - {missing}:
        written(tmp_path / file, words(50))
    folder = tmp_path / "absent" if missing == "folder" else tmp_path
    with pytest.raises(UserError) as refusal:
        find_texts(str(folder))
    first, *ways = str(refusal.value).splitlines()
    assert str(folder / missing.replace("folder", "en.train")) in first
    assert [word in way for word, way in zip([WIKITEXT, "HF_HOME", "en.train and en.valid"], ways, strict=True)] == [True] * 3


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = written(tmp_path / "t", "a")

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=f"cannot read {path}: Permission denied"):
        file_text(path)


def test_a_file_that_changes_while_it_is_read_is_not_cached_as_what_it_was(cache, tokenizer, tmp_path):
    path = written(tmp_path / "t", words(100))
    text = file_text(path)
    written(path, words(101))
    with pytest.raises(UserError, match="changed while it was read"):
        tokens_of(text, tokenizer)
    assert list(cache.iterdir()) == []


# ---- the hub ----


class Rows(list):
    """What `datasets` streams: an iterable with `take` and `skip`."""

    def take(self, count: int) -> Rows:
        return Rows(self[:count])

    def skip(self, count: int) -> Rows:
        return Rows(self[count:])


def put_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[str]], revision: str = "0123abc") -> list:
    """A hub of one data set: what was asked of it."""
    asked = []

    def load_dataset(name: str, config: str, **options) -> Rows:
        asked.append((name, config, options))
        return Rows({"text": text} for text in splits[options["split"]])

    def hf_hub_download(name: str, file: str, repo_type: str) -> str:
        return f"cache/{name}/snapshots/{revision}/{file}"

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return asked


def test_wikitext_is_streamed_row_by_row(cache, tokenizer, tmp_path, monkeypatch):
    text = words(30000)
    rows = [line + "\n" for line in text.split("\n")]
    asked = put_hub(monkeypatch, {"train": rows, "validation": rows[::-1]})
    found = {split: tokens_of(text, tokenizer)[0] for split, text in find_texts(None).items()}
    assert found["train"].tolist() == stream_of(written(tmp_path / "t", text), tokenizer)
    assert found["validation"].tolist() == stream_of(written(tmp_path / "v", "".join(rows[::-1])), tokenizer)
    assert [options for *_, options in asked] == [
        {"split": split, "streaming": True, "revision": "0123abc"} for split in ("train", "validation")
    ]
    assert {(name, config) for name, config, _ in asked} == {(WIKITEXT, "wikitext-103-raw-v1")}


def test_wikipedias_first_articles_are_held_out(cache, tokenizer, monkeypatch):
    articles = [f"good {OTHERS[0]}" if number < HELD_OUT else "bad" for number in range(HELD_OUT + 7)]
    asked = put_hub(monkeypatch, {"train": articles})
    found = {split: tokens_of(text, tokenizer)[0] for split, text in find_texts(WIKIPEDIA).items()}
    assert found["train"].tolist() == tokenizer(" bad" * 7, add_special_tokens=False)["input_ids"]
    assert found["validation"].tolist() == tokenizer(" good film" * HELD_OUT, add_special_tokens=False)["input_ids"]
    assert {options["split"] for *_, options in asked} == {"train"}


def test_the_hub_is_asked_for_rows_once_a_revision(cache, tokenizer, monkeypatch):
    for revision, times in (("one", 1), ("one", 0), ("two", 1)):
        asked = put_hub(monkeypatch, {"train": ["the film"]}, revision)
        tokens_of(hub_text(WIKITEXT, "train"), tokenizer)
        assert len(asked) == times


def test_a_folder_of_a_data_sets_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("en.train", "en.valid"):
        (tmp_path / WIKIPEDIA).mkdir(parents=True, exist_ok=True)
        written(tmp_path / WIKIPEDIA / file, "a")
    assert find_texts(WIKIPEDIA)["train"].size == 1


@pytest.mark.parametrize("at", ["revision", "rows", "midway"])
@pytest.mark.parametrize(
    "error", [ConnectionError("no route to huggingface.co\nand more"), ConnectionError(), OSError(28, "full")]
)
def test_a_hub_that_fails_points_to_the_folder(cache, tokenizer, monkeypatch, at, error):
    def fail(*_, **__):
        raise error

    def rows(*_, **__):
        yield {"text": "the film"}
        raise error

    put_hub(monkeypatch, {})
    if at == "revision":
        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    else:
        loader = types.SimpleNamespace(load_dataset=fail if at == "rows" else rows)
        monkeypatch.setitem(sys.modules, "datasets", loader)
    with pytest.raises(UserError, match=rf"{WIKITEXT} \({HUB[WIKITEXT]}\)[^\n]*: \S[^\n]*\n.*--data-dir"):
        tokens_of(hub_text(WIKITEXT, "train"), tokenizer)
    assert list(cache.glob("*")) == []


def test_without_the_package_datasets_the_folder_is_offered(cache, tokenizer, monkeypatch):
    put_hub(monkeypatch, {})
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(UserError, match=r"package datasets.*--data-dir"):
        tokens_of(hub_text(WIKITEXT, "train"), tokenizer)
