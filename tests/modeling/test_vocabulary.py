"""A checkpoint with vocab.txt alone has BERT's tokenizer by the settings beside it, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from bert_tickets.errors import UserError
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.tokenizer import load_tokenizer


def with_vocabulary(bert_dir: Path, folder: Path, content: str, **settings: Any) -> Path:
    """A copy of the small BERT with its vocabulary as vocab.txt, changed by `content`, and no tokenizer.json."""
    shutil.copytree(bert_dir, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    vocabulary = Tokenizer.from_file(str(bert_dir / "tokenizer.json")).get_vocab()
    lines = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text(content.format("\n".join(lines)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("content", ["{}\n", "{}", "{}\n\n\n", "\ufeff{}\n"])
@pytest.mark.parametrize("lower", [{"do_lower_case": 1}, {"do_lower_case": True}, {"tokenizer_class": "ElectraTokenizerFast"}])
def test_a_vocabulary_with_blank_lines_or_a_flag_as_a_number_is_read(bert_dir, tokenizer, tmp_path, content, lower):
    ours = load_bert(str(with_vocabulary(bert_dir, tmp_path / "m", content, **lower)), "classifier", "pretrained", 0)[1]
    for text in ("The GOOD film [SEP] café", "a naïve plot"):
        assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert ours.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("{}\n", {"do_lower_case": "no"}, '"do_lower_case" is "no", not true or false'),
        ("{}\nmore\n", {}, "'more'.*no match"),
        ("{}\n", {"cls_token": "<s>"}, r"vocab\.txt.*cls_token not found in the vocabulary"),
        ("{}\n", {"unk_token": "<unk>"}, r"vocab\.txt.*Missing \[UNK\] token"),
        (
            "{}\n",
            {"tokenizer_class": "BertJapaneseTokenizer"},
            r"vocab\.txt alone does not describe .*BertJapaneseTokenizer.*: save it",
        ),
        ("{}\n", {"additional_special_tokens": "good"}, '"additional_special_tokens" is "good", not a JSON list or dict'),
        ("{}\n", {"do_basic_tokenize": False}, '"do_basic_tokenize": false'),
        ("{}\n", {"never_split": ["x"], "do_basic_tokenize": True}, '"never_split": '),
        ("{}\n", {"word_tokenizer_type": "mecab", "subword_tokenizer_type": "wordpiece"}, '"word_tokenizer_type": "mecab"'),
        ("{}\n", {"truncation_side": "up"}, "a setting beside it: .*Truncation side"),
        ("{}\n", {"model_max_length": "512"}, '"model_max_length" is "512", not a JSON int or float'),
    ],
)
def test_a_vocabulary_that_does_not_fit_names_the_line_or_the_key(bert_dir, tmp_path, content, settings, message):
    with pytest.raises(UserError, match=message):
        load_bert(str(with_vocabulary(bert_dir, tmp_path / "m", content, **settings)), "classifier", "pretrained", 0)


def test_the_class_of_the_tokenizer_may_be_in_config_json(bert_dir, tmp_path):
    model = with_vocabulary(bert_dir, tmp_path / "m", "{}\n")
    config = json.loads((model / "config.json").read_text()) | {"tokenizer_class": "BertJapaneseTokenizer"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="BertJapaneseTokenizer"):
        load_bert(str(model), "classifier", "pretrained", 0)


@pytest.mark.parametrize("named", ["<E>", {"content": "<E>", "lstrip": False, "__type": "AddedToken"}])
def test_special_tokens_of_old_files_are_found_as_they_are_written(bert_dir, tmp_path, capfd, named):
    """One that is a line of the vocabulary, and one whose id is in added_tokens.json, which only lower case finds."""
    folder = with_vocabulary(bert_dir, tmp_path / "m", "{}\n<E>\n", additional_special_tokens=[named])
    size = len((folder / "vocab.txt").read_text().split())
    (folder / "added_tokens.json").write_text(json.dumps({"<f>": size}))
    ours = load_tokenizer(folder, "m", SimpleNamespace(vocab_size=size + 1, type_vocab_size=2))
    good = ours.convert_tokens_to_ids("good")
    assert ours("<E> good <F>", add_special_tokens=False)["input_ids"] == [size - 1, good, size]
    assert size - 1 not in ours("<e> good")["input_ids"]
    assert "__type" not in "".join(capfd.readouterr())  # the library prints fields that it does not know


def test_a_cased_vocabulary_that_is_lower_cased_is_said(bert_dir, tmp_path, capsys):
    model = with_vocabulary(bert_dir, tmp_path / "m", "{}\n")
    text = (
        (model / "vocab.txt")
        .read_text()
        .replace("good", "Good")
        .replace("café", "cafe")
        .replace("naïve", "naive")
        .replace("é", "ø")
    )
    (model / "vocab.txt").write_text(text)
    load_bert(str(model), "classifier", "pretrained", 0)
    assert "1 of " in (said := capsys.readouterr().out)
    assert "'Good'" in said
    (model / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    load_bert(str(model), "classifier", "pretrained", 0)
    assert not capsys.readouterr().out
