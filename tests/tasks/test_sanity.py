"""A network that learned nothing is said to have, in the results."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from bert_tickets.cli import parse
from bert_tickets.config import Config
from bert_tickets.runs.directory import results, run_dir
from bert_tickets.runs.summary import print_levels
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm
from bert_tickets.tasks.squad import Squad


def glue(task: str, logits: list, labels: list) -> list[str]:
    kind = np.float32 if task == "stsb" else np.int64
    store = SimpleNamespace(labels=torch.from_numpy(np.array(labels, kind)))
    return Glue(task).warnings({"validation": np.array(logits, np.float32)}, {"validation": store})


@pytest.mark.parametrize(
    ("task", "logits", "labels", "said"),
    [
        ("rte", [[1, 0], [2, 1]], [0, 1], ["all 2 predictions on validation are entailment"]),
        ("mnli", [[0, 0, 1]] * 3, [0, 1, 2], ["all 3 predictions on validation are contradiction"]),
        ("stsb", [[2.5], [2.50001]], [1.0, 4.0], ["all 2 predictions on validation are 2.5"]),
        ("cola", [[1, 0], [0, 1]], [1, 0], ["matthews -1.0000 on validation is below 0.0000, which knowing no example gives"]),
        (
            "sst2",
            [[1, 0], [0, 1], [1, 0], [1, 0]],
            [1, 1, 1, 0],
            ["accuracy 0.5000 on validation is below 0.7500, which knowing no example gives"],
        ),
        (
            "sst2",
            [[1, 0], [0, 1], [0, 1], [0, 1]],
            [1, 1, 1, 0],
            ["accuracy 0.5000 on validation is below 0.7500, which knowing no example gives"],
        ),
        ("sst2", [[1, 0], [0, 1]], [0, 1], []),
        ("cola", [[1, 0], [0, 1]], [0, 1], []),
        ("stsb", [[1.0], [4.0]], [1.0, 4.0], []),
    ],
)
def test_glue_says_constant_predictions_and_less_than_chance(task, logits, labels, said):
    assert glue(task, logits, labels) == said


def test_each_of_mnlis_sets_is_looked_at():
    store = SimpleNamespace(labels=torch.arange(3))
    logits = {"validation_matched": np.eye(3), "validation_mismatched": np.eye(3)[[0, 0, 0]]}
    (doubt,) = Glue("mnli").warnings(logits, dict.fromkeys(logits, store))
    assert doubt == "all 3 predictions on validation_mismatched are entailment"


@pytest.mark.parametrize(("starts", "doubtful"), [([0, 0, 0], True), ([0, 1, 0], False)])
def test_squad_says_when_every_window_points_at_one_place(starts, doubtful):
    task = Squad()
    task.windows = {"lengths": np.array([4, 3, 5])}
    logits = np.zeros((12, 2), np.float32)
    for begin, start in zip([0, 4, 7], starts, strict=True):
        logits[begin + start, 0] = 1
    expected = ["the likeliest start in all 3 windows is their token 0"] if doubtful else []
    assert task.warnings({"validation": logits}, {}) == expected


@pytest.mark.parametrize(
    ("loss", "said"), [(5.0, ["loss 5.000 on validation is above 4.000, which knowing no context gives"]), (3.0, [])]
)
def test_mlm_says_when_it_knows_less_than_frequencies(loss, said):
    outputs = {"validation": np.array([[loss, 0.0], [loss, 1.0]], np.float32)}
    assert Mlm().warnings(outputs, {"validation": SimpleNamespace(unigram_entropy=4.0)}) == said


def noted(task: Any, cfg: Config, bert_dir: Path) -> list[str]:
    task.load_data(cfg, AutoTokenizer.from_pretrained(bert_dir), torch.device("cpu"))
    return list(task.data_warnings)


def test_glue_says_what_the_data_say_against_its_scores(bert_dir, glue_dir, tmp_path):
    folder = Path(shutil.copytree(glue_dir / "SST-2", tmp_path / "SST-2"))
    cfg = Config(task="sst2", data_dir=str(tmp_path))
    assert noted(Glue("sst2"), cfg, bert_dir) == []
    dev = (folder / "dev.tsv").read_text()
    shutil.copy(folder / "train.tsv", folder / "dev.tsv")
    assert noted(Glue("sst2"), cfg, bert_dir) == ["44 of 44 examples of validation are trained on too"]
    few = replace(cfg, limit_train=1)  # what is not trained on does no harm
    assert noted(Glue("sst2"), few, bert_dir) == ["all training labels are positive"]
    (folder / "dev.tsv").write_text(dev)
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "☃ ☃ ☃\t1\n" * 20 + " \t1\n")
    said = noted(Glue("sst2"), cfg, bert_dir)
    assert said[0] == "all training labels are positive"
    assert said[1].endswith("of the tokens of train are [UNK]: is the vocabulary of this language?")
    assert said[2:] == ["1 of 21 examples of train have an empty text"]


def test_one_label_to_all_is_said_whatever_is_predicted():
    for task, labels, said in (
        ("cola", [1, 1, 1], "acceptable"),
        ("stsb", [2.5, 2.5, 2.5], "2.5"),
        ("mrpc", [0, 0, 0], "not_equ"),
    ):
        logits = [[0.1], [0.5], [0.2]] if task == "stsb" else [[1, 0], [0, 1], [1, 0]]
        (doubt,) = glue(task, logits, labels)
        assert doubt.startswith(f"all 3 labels on validation are {said}")


def test_squad_says_what_the_data_say_against_its_scores(bert_dir, squad_dir, tmp_path):
    folder = Path(shutil.copytree(squad_dir, tmp_path / "squad"))
    cfg = Config(task="squad", data_dir=str(folder), max_length=100, doc_stride=32)
    assert noted(Squad(), cfg, bert_dir) == []
    shutil.copy(folder / "train-v1.1.json", folder / "dev-v1.1.json")
    assert noted(Squad(), cfg, bert_dir) == ["30 of 30 questions of validation are trained on too"]
    text = (squad_dir / "dev-v1.1.json").read_text()
    (folder / "dev-v1.1.json").write_text(re.sub(r'"answer_start": \d+', '"answer_start": 100000', text))
    assert noted(Squad(), cfg, bert_dir) == ["20 of 20 questions of validation have no answer where it should stand"]


def test_mlm_says_what_the_texts_say_against_its_scores(bert_dir, corpus_dir, tmp_path):
    folder = Path(shutil.copytree(corpus_dir, tmp_path / "text"))
    cfg = Config(task="mlm", data_dir=str(folder), max_length=16)
    assert noted(Mlm(), cfg, bert_dir) == []
    shutil.copy(folder / "en.train", folder / "en.valid")
    assert noted(Mlm(), cfg, bert_dir) == ["the validation text is the training text"]
    (folder / "en.valid").write_text("☃ " * 1000)
    assert noted(Mlm(), cfg, bert_dir) == ["100% of the tokens of validation are [UNK]: is the vocabulary of this language?"]


def test_a_collapsed_run_says_so_in_its_results_and_its_table(commands, tmp_path, monkeypatch, capsys):
    import lt_glue

    monkeypatch.chdir(tmp_path)
    cfg = parse("glue", None, [*commands["lt_glue.py"], "--levels", "1", "--lr", "1e-30"])
    monkeypatch.setattr(Glue, "outputs", lambda self, net, batch: torch.eye(2)[torch.zeros(len(batch.starts), dtype=torch.int64)])
    lt_glue.main(cfg)
    (result,) = results(run_dir(cfg, "glue"))
    assert result["warnings"] == ["all 20 predictions on validation are entailment"]
    capsys.readouterr()
    print_levels(cfg, "glue")
    out = capsys.readouterr().out
    assert "0.5000*" in out
    assert "* level 0: all 20 predictions on validation are entailment" in out
