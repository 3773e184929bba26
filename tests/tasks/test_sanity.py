"""Constant predictions, metrics below chance and defects of the data are warnings."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bert_tickets.cli import parse
from bert_tickets.config import Config
from bert_tickets.methods.main import train
from bert_tickets.runs.directory import results, run_dir
from bert_tickets.runs.summary import print_levels
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm
from bert_tickets.tasks.squad import MISPLACED, Squad


def glue_warnings(task: str, logits: list, labels: list) -> list[str]:
    kind = np.float32 if task == "stsb" else np.int64
    store = SimpleNamespace(labels=torch.from_numpy(np.array(labels, kind)))
    return Glue(task).warnings({"validation": np.array(logits, np.float32)}, {"validation": store})


@pytest.mark.parametrize(
    ("task", "logits", "labels", "expected"),
    [
        ("rte", [[1, 0], [2, 1]], [0, 1], ["all 2 predictions on validation are entailment"]),
        ("mnli", [[0, 0, 1]] * 3, [0, 1, 2], ["all 3 predictions on validation are contradiction"]),
        ("stsb", [[2.5], [2.50001]], [1.0, 4.0], ["all 2 predictions on validation are 2.5"]),
        ("cola", [[1, 0], [0, 1]], [1, 0], ["matthews -1.0000 on validation is below chance (0.0000)"]),
        ("sst2", np.eye(2)[[0, 1, 0, 0]], [1, 1, 1, 0], ["accuracy 0.5000 on validation is below chance (0.7500)"]),
        ("sst2", [[1, 0], [0, 1]], [0, 1], []),
        ("stsb", [[0.1], [0.5]], [2.5, 2.5], ["all 2 labels on validation are 2.5: its metrics are meaningless"]),
        ("stsb", [[1.0], [4.0]], [1.0, 4.0], []),
    ],
)
def test_glue_warns_of_constant_predictions_and_metrics_below_chance(task, logits, labels, expected):
    assert glue_warnings(task, logits, labels) == expected


def test_squad_and_mlm_warn_of_their_outputs():
    squad, mlm, logits = Squad(), Mlm(), np.zeros((12, 2), np.float32)
    squad.windows = {"lengths": np.array([4, 3, 5])}
    logits[[0, 4, 7], 0] = 1
    assert squad.warnings({"validation": logits}, {}) == ["the most likely start in all 3 windows is token 0"]
    logits[5, 0] = 2
    assert squad.warnings({"validation": logits}, {}) == []
    store = {"validation": SimpleNamespace(unigram_entropy=4.0)}
    for loss, expected in ((5.0, ["loss 5.000 on validation is above the unigram entropy (4.000)"]), (3.0, [])):
        assert mlm.warnings({"validation": np.array([[loss, 0.0], [loss, 1.0]], np.float32)}, store) == expected


def data_warnings(task: Any, cfg: Config, tokenizer: Any) -> list[str]:
    task.load_data(cfg, tokenizer, torch.device("cpu"))
    return list(task.data_warnings)


def test_glue_warns_of_its_data(tokenizer, glue_dir, tmp_path):
    folder = Path(shutil.copytree(glue_dir / "SST-2", tmp_path / "SST-2"))
    cfg = Config(task="sst2", data_dir=str(tmp_path))
    assert data_warnings(Glue("sst2"), cfg, tokenizer) == []
    dev = (folder / "dev.tsv").read_text()
    shutil.copy(folder / "train.tsv", folder / "dev.tsv")
    assert data_warnings(Glue("sst2"), cfg, tokenizer) == ["44 of 44 examples of validation are in the training set"]
    few = replace(cfg, limit_train=1)  # the others are not trained on
    assert data_warnings(Glue("sst2"), few, tokenizer) == ["all training labels are positive"]
    (folder / "dev.tsv").write_text(dev)
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "☃ ☃ ☃\t1\n" * 20 + " \t1\n")
    found = data_warnings(Glue("sst2"), cfg, tokenizer)
    assert found[0] == "all training labels are positive"
    assert found[1].endswith("of the tokens of train are [UNK]: is the vocabulary of this language?")
    assert found[2:] == ["1 of 21 examples of train have an empty text"]


def test_squad_warns_of_its_data(tokenizer, squad_dir, tmp_path):
    folder = Path(shutil.copytree(squad_dir, tmp_path / "squad"))
    cfg = Config(task="squad", data_dir=str(folder), max_length=100, doc_stride=32)
    assert data_warnings(Squad(), cfg, tokenizer) == []
    shutil.copy(folder / "train-v1.1.json", folder / "dev-v1.1.json")
    assert data_warnings(Squad(), cfg, tokenizer) == ["30 of 30 questions of validation are in the training set"]
    text = (squad_dir / "dev-v1.1.json").read_text()
    (folder / "dev-v1.1.json").write_text(re.sub(r'"answer_start": \d+', '"answer_start": 100000', text))
    assert data_warnings(Squad(), cfg, tokenizer) == [f"20 of 20 questions of validation: {MISPLACED}"]


def test_mlm_warns_of_its_texts(tokenizer, corpus_dir, tmp_path):
    folder = Path(shutil.copytree(corpus_dir, tmp_path / "text"))
    cfg = Config(task="mlm", data_dir=str(folder), max_length=16)
    assert data_warnings(Mlm(), cfg, tokenizer) == []
    shutil.copy(folder / "en.train", folder / "en.valid")
    assert data_warnings(Mlm(), cfg, tokenizer) == ["the validation text is the training text"]
    (folder / "en.valid").write_text("☃ " * 1000)
    assert data_warnings(Mlm(), cfg, tokenizer) == [
        "100% of the tokens of validation are [UNK]: is the vocabulary of this language?"
    ]


def test_warnings_are_in_the_results_and_the_table(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = parse("glue", None, [*commands["lt_glue.py"], "--levels", "1", "--lr", "1e-30"])
    monkeypatch.setattr(Glue, "predict", lambda self, net, batch: torch.eye(2)[torch.zeros(len(batch.starts), dtype=torch.int64)])
    train(cfg)
    (result,) = results(run_dir(cfg))
    assert result["warnings"] == ["all 20 predictions on validation are entailment"]
    capsys.readouterr()
    print_levels(run_dir(cfg), cfg)
    out = capsys.readouterr().out
    assert "0.5000*" in out
    assert "* level 0: all 20 predictions on validation are entailment" in out
