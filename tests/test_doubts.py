"""A network that learned nothing is said to have, in the results."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bert_tickets.command import parse
from bert_tickets.history import results, run_dir
from bert_tickets.report import print_levels
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm
from bert_tickets.tasks.squad import Squad


def glue(task: str, logits: list, labels: list) -> list[str]:
    kind = np.float32 if task == "stsb" else np.int64
    store = SimpleNamespace(labels=torch.from_numpy(np.array(labels, kind)))
    return Glue(task).doubts({"validation": np.array(logits, np.float32)}, {"validation": store})


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
    (doubt,) = Glue("mnli").doubts(logits, dict.fromkeys(logits, store))
    assert doubt == "all 3 predictions on validation_mismatched are entailment"


@pytest.mark.parametrize(("starts", "doubtful"), [([0, 0, 0], True), ([0, 1, 0], False)])
def test_squad_says_when_every_window_points_at_one_place(starts, doubtful):
    task = Squad()
    task.windows = {"lengths": np.array([4, 3, 5])}
    logits = np.zeros((12, 2), np.float32)
    for begin, start in zip([0, 4, 7], starts, strict=True):
        logits[begin + start, 0] = 1
    expected = ["the likeliest start in all 3 windows is their token 0"] if doubtful else []
    assert task.doubts({"validation": logits}, {}) == expected


@pytest.mark.parametrize(
    ("loss", "said"), [(5.0, ["loss 5.000 on validation is above 4.000, which knowing no context gives"]), (3.0, [])]
)
def test_mlm_says_when_it_knows_less_than_frequencies(loss, said):
    outputs = {"validation": np.array([[loss, 0.0], [loss, 1.0]], np.float32)}
    assert Mlm().doubts(outputs, {"validation": SimpleNamespace(unigram_entropy=4.0)}) == said


def test_a_collapsed_run_says_so_in_its_results_and_its_table(commands, tmp_path, monkeypatch, capsys):
    import lt_glue

    monkeypatch.chdir(tmp_path)
    cfg = parse("glue", None, [*commands["lt_glue.py"], "--levels", "1", "--lr", "1e-30"])
    monkeypatch.setattr(Glue, "outputs", lambda self, net, batch: torch.eye(2)[torch.zeros(len(batch.starts), dtype=torch.int64)])
    lt_glue.main(cfg)
    (result,) = results(run_dir(cfg, "glue"))
    assert result["doubts"] == ["all 20 predictions on validation are entailment"]
    capsys.readouterr()
    print_levels(cfg, "glue")
    out = capsys.readouterr().out
    assert "0.5000*" in out
    assert "* level 0: all 20 predictions on validation are entailment" in out
