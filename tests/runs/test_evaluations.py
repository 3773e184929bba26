"""Evaluations within a level: they leave the training alone, and the best of them is recorded beside the last."""

import sys
from unittest.mock import MagicMock

import pytest

from bert_tickets.errors import Diverged, UserError
from bert_tickets.files import read_tensors, sha256_of
from bert_tickets.methods import imp
from bert_tickets.runs import session
from bert_tickets.runs.directory import events, results, seconds
from bert_tickets.runs.session import _best
from bert_tickets.tasks.glue import Glue
from bert_tickets.training import loop

ADDED = ("run", "evaluations", "best")  # the run's name, which has the flags' hash


@pytest.mark.parametrize("script", ["lt_glue.py", "lt_squad.py", "lt_pretrain.py"])
def test_evaluations_change_nothing_else_of_a_level(runs, script):
    runs("plain"), runs("evaluated", "--eval-steps", "2")
    weights = [sha256_of(read_tensors(runs.dir(name) / "level_02/weights.safetensors")) for name in ("plain", "evaluated")]
    assert weights[0] == weights[1]
    before, after = results(runs.dir("plain")), results(runs.dir("evaluated"))
    for old, new in zip(before, after, strict=True):
        assert not {"evaluations", "best"} & old.keys()
        assert {key: value for key, value in new.items() if key not in ADDED} == {k: v for k, v in old.items() if k != "run"}
        assert [evaluation["step"] for evaluation in new["evaluations"]] == list(range(2, new["steps"] + 1, 2))
        assert new["evaluations"][-1]["metrics"] == new["metrics"]
        assert all(evaluation["metrics"].keys() == new["metrics"].keys() for evaluation in new["evaluations"])
        assert new["best"] == _best(new["evaluations"], new["metric"])


def test_evaluations_are_of_the_weights_at_their_steps(runs, monkeypatch):
    """At a constant learning rate a level of two steps ends as a longer one was after two steps."""
    monkeypatch.setattr(imp.Settings, "learning_rate", lambda self, lr, level, steps: lambda step: lr)
    runs("long", "--levels", "1", "--eval-steps", "2", "--lr", "1e-2")
    (line,) = results(runs.dir("long"))
    assert len({tuple(found["metrics"].values()) for found in line["evaluations"]}) > 1
    for found in line["evaluations"]:
        place = f"of {found['step']} steps"
        runs(place, "--levels", "1", "--lr", "1e-2", "--max-steps", str(found["step"]))
        assert results(runs.dir(place))[0]["metrics"] == found["metrics"]


def test_steps_that_do_not_divide_the_level_and_more_than_it_has(runs):
    for every, steps in ((4, [4, 6]), (7, [6])):
        runs(f"every {every}", "--levels", "1", "--eval-steps", str(every))
        (line,) = results(runs.dir(f"every {every}"))
        assert [found["step"] for found in line["evaluations"]] == steps


def test_the_seconds_of_a_level_are_those_of_its_training(runs, monkeypatch):
    clock, evaluate = [0.0], session.evaluate

    def slow(*arguments):
        clock[0] += 1000
        return evaluate(*arguments)

    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(session, "evaluate", slow)
    runs("slow", "--save-minutes", "1e9")
    assert clock[0] >= 3000
    assert seconds(runs.dir("slow")) == {0: 0.0, 1: 0.0, 2: 0.0}


@pytest.mark.parametrize(
    ("values", "step"), [([0.5, 0.7, 0.6], 2), ([0.7, 0.7, 0.1], 1), ([None, 0.2, None], 2), ([None, None], 2), ([-0.1, -0.2], 1)]
)
def test_the_best_evaluation_is_the_first_with_the_highest_main_metric(values, step):
    found = [{"step": n, "metrics": {"pearson": v, "spearman": -n}} for n, v in enumerate(values, 1)]
    assert _best(found, "pearson")["step"] == step


def test_evaluations_are_lines_of_train_jsonl_and_of_tensorboard(runs, monkeypatch):
    board = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("bert_tickets.runs.train_log.importlib.util.find_spec", lambda name: name)
    runs("run", "--levels", "1", "--eval-steps", "3")
    lines = list(events(runs.dir("run") / "train.jsonl"))
    assert [(line["step"], "metrics" in line) for line in lines] == [(2, False), (3, True), (4, False), (6, False)]
    evaluation = results(runs.dir("run"))[0]["evaluations"][0]
    assert {key: lines[1][key] for key in evaluation} == evaluation
    written = [call.args for call in board.SummaryWriter().add_scalar.call_args_list]
    assert ("evaluation/accuracy", evaluation["metrics"]["accuracy"], 3) in written
    assert [name for name, *_ in written].count("loss") == 3


def test_a_run_that_diverges_before_an_evaluation_has_no_result(runs, monkeypatch):
    plain = session.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", lambda *arguments: plain(*arguments) * float("nan"))
        with pytest.raises(Diverged, match="predictions on validation are not finite"):
            runs("run", "--levels", "1", "--eval-steps", "2")
    assert runs("run", "--levels", "1", "--eval-steps", "2") == runs("undisturbed", "--levels", "1", "--eval-steps", "2")


def test_another_metric_is_the_score_and_chooses_the_best_evaluation(runs, monkeypatch, capsys):
    values = {"accuracy": [0.5, 0.4, 0.6], "accuracy_mm": [0.2, 0.7, 0.1]}
    monkeypatch.setattr(Glue, "compute_metrics", lambda *_: {name: found.pop(0) for name, found in values.items()})
    runs("mm", "--task", "mnli", "--levels", "1", "--eval-steps", "2", "--metric", "accuracy_mm")
    (line,) = results(runs.dir("mm"))
    assert (line["metric"], line["best"]["step"]) == ("accuracy_mm", 4)
    assert "best accuracy_mm" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--metric f1: mnli has accuracy and accuracy_mm"):
        runs("f1", "--task", "mnli", "--metric", "f1")


def test_the_closing_table_has_the_best_evaluation(runs, capsys):
    runs("run", "--levels", "1", "--eval-steps", "2")
    best = results(runs.dir("run"))[0]["best"]
    said = f"{best['metrics']['accuracy']:.4f} (step {best['step']}, of 3 evaluations)"
    shown = capsys.readouterr().out.partition("level  sparsity  accuracy ")[2].splitlines()
    assert "best accuracy" in shown[0]
    assert said in shown[1]
