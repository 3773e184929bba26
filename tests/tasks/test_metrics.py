"""Metrics equal values by hand and the libraries', also on degenerate input."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import pytest

from bert_tickets.errors import UserError
from bert_tickets.tasks.metrics import compare_with_evaluate, glue_metric, squad_scores


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "value"),
    [
        ("accuracy", [2, 0, 1], [2, 1, 1], 2 / 3),  # three classes, as MNLI
        ("f1", [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], 2 * 1 / (2 * 1 + 1 + 2)),
        ("matthews", [1, 0, 1, 1], [1, 1, 1, 0], (2 * 0 - 1 * 1) / math.sqrt(3 * 3 * 1 * 1)),
        ("pearson", [1, 2, 3], [2, 4, 7], 5 / math.sqrt(2 * 38 / 3)),
        ("spearman", [10, 20, 30, 40], [0.1, 0.3, 0.2, 9.0], 1 - 6 * 2 / (4 * 15)),
        ("spearman", [1, 2, 3, 4], [0.5, 0.5, 1.0, 2.0], 4.5 / math.sqrt(5 * 4.5)),  # ties have their mean rank
        # degenerate predictions
        ("matthews", [1, 1, 1, 1], [0, 1, 0, 1], 0),
        ("f1", [0, 0], [0, 0], 0),
        ("pearson", [3.0, 3.0, 3.0], [1.0, 2.0, 5.0], math.nan),
        ("spearman", [3.0, 3.0, 3.0], [1.0, 2.0, 5.0], math.nan),
        ("pearson", [1.0, math.nan, 2.0], [1.0, 2.0, 5.0], math.nan),
    ],
)
def test_a_metric_by_hand(metric, predictions, references, value):
    found = glue_metric(metric, predictions, references)
    assert type(found) is float
    assert found == pytest.approx(value, abs=1e-12, nan_ok=True)


# ---- SQuAD ----


@pytest.mark.parametrize(
    ("said", "golds", "exact", "overlap"),
    [
        ("Denver Broncos", ["The Denver Broncos!"], 1, 1),
        ("the Broncos", ["Denver Broncos", "Broncos"], 1, 1),  # the best match counts
        ("Broncos of Denver", ["Denver Broncos", "Denver, Colorado"], 0, 4 / 5),
        ("to to to", ["to be to"], 0, 2 * 2 / (3 + 3)),  # with multiplicity
        ("the", ["a"], 1, 0),  # both empty: equal, without a common word
        # normalized as in the official script
        ("The  Denver\nBroncos.", ["denver broncos"], 1, 1),
        ("the-end", ["theend"], 1, 1),  # punctuation goes before articles
        ("theatre a1 an", ["theatre a1"], 1, 1),
        ("“É” – ¿x?", ["“é” – ¿x"], 1, 1),
        ("“É”", ["é"], 0, 0),  # ASCII punctuation only
    ],
)
def test_squads_scores_by_hand(said, golds, exact, overlap):
    assert squad_scores({"q": said}, {"q": golds}) == pytest.approx({"f1": overlap, "exact_match": exact})


def test_squads_scores_are_means_over_all_questions():
    answers = {"a": ["one"], "b": ["two three"], "c": ["four"], "d": ["five"]}
    scores = squad_scores({"a": "One", "b": "two", "d": "six", "e": "four"}, answers)  # c has no prediction, e no gold answer
    assert scores == pytest.approx({"f1": (1 + 2 / 3) / 4, "exact_match": 1 / 4})


# ---- --check-metrics ----


def put_evaluate(monkeypatch: pytest.MonkeyPatch, values: dict[str, float] | Exception) -> list[tuple]:
    """Stand in for the package `evaluate`; returns a list of the calls."""
    asked: list[tuple] = []

    def compute(**given):
        asked.append(given)
        return values

    def load(*names):
        asked.append(names)
        if isinstance(values, Exception):
            raise values
        return types.SimpleNamespace(compute=compute)

    monkeypatch.setitem(sys.modules, "evaluate", types.SimpleNamespace(load=load))
    return asked


@pytest.mark.parametrize(
    ("task", "theirs", "ours"),
    [
        ("cola", {"matthews_correlation": 0.5}, {"matthews": 0.5, "accuracy": 0.7}),
        ("stsb", {"pearson": math.nan, "spearmanr": 0.7 + 1e-12}, {"pearson": math.nan, "spearman": 0.7}),
        ("squad", {"exact_match": 25.0, "f1": 50.0}, {"f1": 0.5, "exact_match": 0.25}),  # evaluate's are percentages
    ],
)
def test_metrics_that_equal_evaluates_are_reported_and_others_end_the_run(monkeypatch, task, theirs, ours):
    asked = put_evaluate(monkeypatch, theirs)
    line = compare_with_evaluate(task, [1, 0], [1, 1], ours)
    assert "equal" in line
    assert all(name in line for name in theirs)
    assert asked == [("squad",) if task == "squad" else ("glue", task), {"predictions": [1, 0], "references": [1, 1]}]
    for wrong in (1e-6, math.nan):
        with pytest.raises(UserError, match=r"is .* by evaluate and .* here"):
            compare_with_evaluate(task, [1, 0], [1, 1], dict.fromkeys(ours, 0.3 + wrong))


def test_without_evaluate_or_its_hub_nothing_is_compared(monkeypatch):
    put_evaluate(monkeypatch, ConnectionError("no route to the hub"))
    assert "not compared" in compare_with_evaluate("cola", [1, 0], [1, 1], {"matthews": 0.5})
    monkeypatch.setitem(sys.modules, "evaluate", None)  # importing it fails
    assert "not compared" in compare_with_evaluate("cola", [1, 0], [1, 1], {"matthews": 0.5})


@pytest.mark.parametrize("task", ["rte", "squad"])
def test_no_file_of_the_working_directory_is_run(tmp_path, monkeypatch, task):
    """With the real package, offline: `glue` and `squad` may be folders of data."""
    for name in ("glue", "squad"):
        for folder in (tmp_path / name, tmp_path / "evaluate-metric" / name):
            folder.mkdir(parents=True)
            (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert "not compared" in compare_with_evaluate(task, [1, 0], [1, 1], {"accuracy": 0.5})
    assert Path.cwd() == tmp_path
    assert not (tmp_path / "executed").exists()


def test_squads_scores_are_summed_in_the_order_of_the_questions():
    """The last bit of the mean depends on the order: a set would make it depend on the process's hash seed."""
    ids = [f"q{i}" for i in range(997)]
    predictions = {name: " ".join("xbcdefg"[: int(name[1:]) % 7 + 1]) for name in ids}
    golds = "b c d e f g h i j k"
    total = 0.0
    for name in ids:
        total += squad_scores({name: predictions[name]}, {name: [golds]})["f1"]
    assert squad_scores(predictions, {name: [golds] for name in ids})["f1"] == total / len(ids)
