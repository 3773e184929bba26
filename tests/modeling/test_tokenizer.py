"""A checkpoint's tokenizer is its own: every rule of tokenizer.json, in a run and in the folders that are saved."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bert_tickets.bench.tiny_bert import SPECIAL, save_bert
from bert_tickets.config import build
from bert_tickets.errors import UserError
from bert_tickets.methods.main import run
from bert_tickets.modeling.loading import load_bert, save_model
from bert_tickets.modeling.tokenizer import load_tokenizer

WORDS = ["film", "Film", "FILM", "naïve", "naive", "Müller", "muller", "good", "Good", "a", "b", "A", ".", "-", "中", "it's"]
PIECES = ["film", "Film", "ï", "s", "m", "M", "a", "b"]
NORMALIZERS = [
    None,
    normalizers.Lowercase(),
    normalizers.StripAccents(),
    normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    normalizers.BertNormalizer(lowercase=False),
    normalizers.BertNormalizer(lowercase=True, strip_accents=False),
    normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=False),
    normalizers.Prepend("a"),
]
CUTS = [
    pre_tokenizers.BertPreTokenizer(),
    pre_tokenizers.Whitespace(),
    pre_tokenizers.WhitespaceSplit(),
    pre_tokenizers.Metaspace(),
    pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)]),
]
NAMES = [SPECIAL, ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]]
TEXTS = st.lists(st.sampled_from([*WORDS, *SPECIAL, "</s>", "<s>", "filmfilm", "Filmï", " ", "a" * 60]), max_size=8).map(
    " ".join
) | st.text(max_size=12)


def tokenizer_of(draw: Any) -> tuple[Tokenizer, bool]:
    """Draw a tokenizer; also whether it puts [CLS] and [SEP] around texts as BERT's does."""
    special, prefix = draw(st.sampled_from(NAMES)), draw(st.sampled_from(["##", "@@", ""]))
    words = dict.fromkeys([*special, *WORDS, *(prefix + piece for piece in PIECES)])
    vocabulary = {word: number for number, word in enumerate(words)}
    pad, unknown, cls, sep, mask = special
    tokenizer = Tokenizer(
        models.WordPiece(
            vocabulary,
            unk_token=unknown,
            continuing_subword_prefix=prefix,
            max_input_chars_per_word=draw(st.sampled_from([3, 50, 100, 200])),
        )
    )
    if (normalizer := draw(st.sampled_from(NORMALIZERS))) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = draw(st.sampled_from(CUTS))
    if draw(st.booleans()):
        tokenizer.add_special_tokens([pad, unknown, cls, sep, mask])
    if draw(st.booleans()):
        tokenizer.add_tokens(["filmfilm"])
    ends = (sep, vocabulary[sep]), (cls, vocabulary[cls])
    process = draw(st.sampled_from(["bert", "roberta", "types", "none"]))
    if process == "bert":
        tokenizer.post_processor = processors.BertProcessing(*ends)
    elif process == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(*ends)
    elif process == "types":
        single, pair = f"{cls} $A {sep}", f"{cls} $A {sep} $B {sep}"  # all of type 0
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[e[::1] for e in ends])
    return tokenizer, process == "bert"


@settings(max_examples=100, deadline=None)
@given(data=st.data(), texts=st.lists(TEXTS, min_size=2, max_size=4))
def test_any_tokenizer_json_encodes_as_it_does_itself_or_is_refused(tmp_path_factory, data, texts):
    tokenizer, berts = tokenizer_of(data.draw)
    folder = tmp_path_factory.mktemp("t")
    if data.draw(st.booleans()):
        tokenizer.enable_truncation(5)  # settings of a call, which every call of ours sets
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"do_lower_case": data.draw(st.booleans()), "tokenizer_class": data.draw(st.sampled_from(["BertTokenizer", "X"]))}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        ours = load_tokenizer(folder, "x", SimpleNamespace(vocab_size=tokenizer.get_vocab_size(), type_vocab_size=2))
    except UserError:
        ours = None
    assert (ours is not None) == berts
    if ours is None:
        return
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_truncation()
    columns = [texts, texts[::-1]]
    made = ours(*columns, return_token_type_ids=True)  # as all calls of the package, with lists
    expected = [own.encode(*pair) for pair in zip(*columns, strict=True)]
    assert made["input_ids"] == [encoding.ids for encoding in expected]
    assert made["token_type_ids"] == [encoding.type_ids for encoding in expected]
    assert ours(texts)["input_ids"] == [own.encode(text).ids for text in texts]
    again = folder / "saved"
    again.mkdir()
    ours.save_pretrained(again)
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


# ---- cased ----


def save_cased(folder: Path, tokenizer: Tokenizer) -> None:
    """Save a small BERT with another tokenizer, without a word about it in tokenizer_config.json."""
    save_bert(folder, vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()


def cased_tokenizer(words: list[str], special: list[str] = SPECIAL, longest: int = 30) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=longest))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def test_a_cased_bert_learns_labels_that_depend_on_capitals(tmp_path):
    names = ["Film", "film", "Plot", "plot", "was", "the", "a"]
    save_cased(tmp_path / "cased", cased_tokenizer(names))
    (tmp_path / "SST-2").mkdir()
    rng = random.Random(0)
    for file, count in (("train.tsv", 200), ("dev.tsv", 60)):
        rows = [(rng.choice(["Film", "Plot"] if n % 2 else ["film", "plot"]), n % 2) for n in range(count)]
        lines = [f"{rng.choice(['the', 'a'])} {word} was {rng.choice(['the', 'a'])}\t{label}" for word, label in rows]
        (tmp_path / "SST-2" / file).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    train = {"max_steps": 80, "batch_size": 16, "lr": 3e-3, "levels": 1, "max_length": 16, "limit_train": 200}
    run(
        build(
            {"task": "sst2", "model": str(tmp_path / "cased"), "data_dir": str(tmp_path), "output_dir": str(tmp_path / "r")}
            | train
        )
    )
    (line,) = next((tmp_path / "r").iterdir()).joinpath("results.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"]["accuracy"] > 0.95


@pytest.mark.parametrize("longest", [100, 30])
def test_a_saved_tokenizer_is_the_same_and_opens_in_transformers(tmp_path, longest):
    """With no rules but BERT's it names BERT's class, which transformers 4 has too; else the class of any tokenizer."""
    tokenizer = cased_tokenizer(WORDS)
    tokenizer.model.max_input_chars_per_word = longest
    save_cased(tmp_path / "cased", tokenizer)
    (tmp_path / "saved").mkdir()
    save_model(*load_bert(str(tmp_path / "cased"), "classifier", "pretrained", 0), tmp_path / "saved")
    named = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == ("BertTokenizer" if longest == 100 else "PreTrainedTokenizerFast")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (tmp_path / "cased" / "tokenizer.json").read_bytes()
    opened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("Film naïve Müller", "film " + "a" * 40, "FILM. it's 中"):
        made, own = opened([text], ["a film"]), tokenizer.encode(text, "a film")
        assert (made["input_ids"], made["token_type_ids"]) == ([own.ids], [own.type_ids])


@pytest.mark.parametrize(
    "post",
    [
        processors.BertProcessing(("[SEP]", 3), ("[CLS]", 999)),  # ids of another vocabulary
        processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]),  # types 0
    ],
)
def test_what_is_not_as_berts_tokenizer_does_it_is_refused(tmp_path, post):
    tokenizer = cased_tokenizer(WORDS)
    tokenizer.post_processor = post
    save_cased(tmp_path / "cased", tokenizer)
    with pytest.raises(UserError, match=r"does not put \[CLS\] and \[SEP\] around texts, with types 0 and 1"):
        load_bert(str(tmp_path / "cased"), "classifier", "pretrained", 0)


def test_with_one_token_type_a_saved_tokenizer_keeps_it(tmp_path):
    tokenizer = cased_tokenizer(WORDS)
    tokenizer.model.max_input_chars_per_word = 100
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(tmp_path, "x", SimpleNamespace(vocab_size=100, type_vocab_size=1)).save_pretrained(tmp_path)
    assert not any(PreTrainedTokenizerFast.from_pretrained(tmp_path)("a", "b")["token_type_ids"])
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_what_settings_say_otherwise_than_tokenizer_json_is_said(bert_dir, tmp_path, capsys):
    model = Path(shutil.copytree(bert_dir, tmp_path / "m"))
    (model / "added_tokens.json").write_text(json.dumps({"<x>": 200}))
    content = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(f"\ufeff{content}", encoding="utf-8")
    (model / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": ["[E]", "[SEP]", "good"]}))
    tokenizer = load_bert(str(model), "classifier", "pretrained", 0)[1]
    assert "settings that tokenizer.json lacks are split into pieces: <x>, [E]" in capsys.readouterr().out
    assert tokenizer.files["tokenizer.json"] == content  # without the byte order mark


def test_the_side_at_which_tokenizer_json_truncates_is_kept(bert_dir, tmp_path):
    model, cut = Path(shutil.copytree(bert_dir, tmp_path / "m")), Tokenizer.from_file(str(bert_dir / "tokenizer.json"))
    cut.enable_truncation(4, direction="left")
    cut.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}")
    tokenizer = load_bert(str(model), "classifier", "pretrained", 0)[1]
    text = "a good film"
    assert tokenizer(text, truncation=True, max_length=4)["input_ids"] == cut.encode(text).ids
    assert len(tokenizer(text)["input_ids"]) == 5


@pytest.mark.parametrize("change", ["no mask", "spaces"])
def test_what_berts_class_would_change_is_saved_with_another_class(tmp_path, change):
    """It adds [MASK] with an id beyond the vocabulary, and transformers 4 changes add_prefix_space unless it is given."""
    tokenizer = cased_tokenizer(WORDS, SPECIAL[:4] if change == "no mask" else SPECIAL, longest=100)
    if change == "spaces":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path, "m", SimpleNamespace(vocab_size=tokenizer.get_vocab_size(), type_vocab_size=2))
    saved = json.loads(ours.files["tokenizer_config.json"])
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved.get("add_prefix_space") == (True if change == "spaces" else None)
    (tmp_path / "saved").mkdir()
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(again) == tokenizer.get_vocab_size()
    assert again("film Good")["input_ids"] == ours("film Good")["input_ids"]
