"""The metrics against values by hand, against the libraries, and on degenerate input."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from bert_tickets.errors import UserError
from bert_tickets.tasks.metrics import METRICS, compare_with_evaluate, normalised, squad_scores

RNG = np.random.default_rng(0)
CLASSES = RNG.integers(0, 2, 500), RNG.integers(0, 2, 500)
SCORES = RNG.normal(size=500), RNG.integers(0, 26, 500) / 5  # as STS-B's: predictions distinct, references with ties


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "value"),
    [
        ("accuracy", [1, 0, 1, 1], [1, 1, 1, 0], 2 / 4),
        ("accuracy", [2, 0, 1], [2, 1, 1], 2 / 3),  # three classes, as MNLI
        ("f1", [1, 0, 1, 1], [1, 1, 1, 0], 2 * 2 / (2 * 2 + 1 + 1)),
        ("f1", [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], 2 * 1 / (2 * 1 + 1 + 2)),
        ("matthews", [1, 0, 1, 1], [1, 1, 1, 0], (2 * 0 - 1 * 1) / math.sqrt(3 * 3 * 1 * 1)),
        ("matthews", [0, 1, 0], [1, 0, 1], -1),
        ("pearson", [1, 2, 3], [2, 4, 7], 5 / math.sqrt(2 * 38 / 3)),
        ("spearman", [10, 20, 30, 40], [0.1, 0.3, 0.2, 9.0], 1 - 6 * 2 / (4 * 15)),
    ],
)
def test_a_metric_by_hand(metric, predictions, references, value):
    assert METRICS[metric](predictions, references) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "data", "theirs"),
    [
        ("accuracy", CLASSES, lambda p, r: sklearn.metrics.accuracy_score(y_true=r, y_pred=p)),
        ("f1", CLASSES, lambda p, r: sklearn.metrics.f1_score(y_true=r, y_pred=p)),
        ("matthews", CLASSES, lambda p, r: sklearn.metrics.matthews_corrcoef(y_true=r, y_pred=p)),
        ("matthews", CLASSES, lambda p, r: np.corrcoef(p, r)[0, 1]),
        ("pearson", SCORES, lambda p, r: scipy.stats.pearsonr(p, r).statistic),
        ("pearson", SCORES, lambda p, r: np.corrcoef(p, r)[0, 1]),
        ("spearman", SCORES, lambda p, r: scipy.stats.spearmanr(p, r).statistic),
        ("spearman", SCORES, lambda p, r: np.corrcoef(scipy.stats.rankdata(p), scipy.stats.rankdata(r))[0, 1]),
    ],
)
def test_a_metric_equals_the_libraries(metric, data, theirs):
    value = METRICS[metric](*data)
    assert type(value) is float
    assert value == pytest.approx(theirs(*data), abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "value"),
    [
        ("matthews", [1, 1, 1, 1], [0, 1, 0, 1], 0),
        ("matthews", [0, 0, 0], [0, 0, 0], 0),
        ("f1", [0, 0, 0, 0], [0, 1, 0, 1], 0),
        ("f1", [0, 0], [0, 0], 0),
        ("pearson", [3.0, 3.0, 3.0], [1.0, 2.0, 5.0], math.nan),
        ("spearman", [3.0, 3.0, 3.0], [1.0, 2.0, 5.0], math.nan),
        ("pearson", [1.0, math.nan, 2.0], [1.0, 2.0, 5.0], math.nan),
    ],
)
def test_degenerate_predictions_have_a_value_and_no_error(metric, predictions, references, value):
    assert METRICS[metric](predictions, references) == pytest.approx(value, nan_ok=True)


# ---- SQuAD ----


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("The  Denver\nBroncos.", "denver broncos"),
        ("an apple, a pear", "apple pear"),
        ("U.S.A. (the)", "usa"),
        ("the-end", "theend"),  # punctuation goes before articles
        ("theatre a1 an", "theatre a1"),
        ("“É” – ¿x?", "“é” – ¿x"),  # ASCII punctuation only
        ("A", ""),
        ("", ""),
    ],
)
def test_what_is_compared_of_an_answer(answer, compared):
    assert normalised(answer) == compared


@pytest.mark.parametrize(
    ("said", "golds", "exact", "overlap"),
    [
        ("Denver Broncos", ["The Denver Broncos!"], 1, 1),
        ("the Broncos", ["Denver Broncos", "Broncos"], 1, 1),  # the nearest counts
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),
        ("Broncos of Denver", ["Denver Broncos", "Denver, Colorado"], 0, 4 / 5),
        ("to be or not to be", ["to be"], 0, 2 * 2 / (6 + 2)),  # words as often as both have them
        ("to to to", ["to be to"], 0, 2 * 2 / (3 + 3)),
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("", ["Denver"], 0, 0),
        ("the", ["a"], 1, 0),  # both empty: equal, and without a word in common
        ("x", [], 0, 0),
    ],
)
def test_squads_scores_by_hand(said, golds, exact, overlap):
    assert squad_scores({"q": said}, {"q": golds}) == pytest.approx({"f1": overlap, "exact_match": exact})


def test_squads_scores_are_means_over_all_questions():
    answers = {"a": ["one"], "b": ["two three"], "c": ["four"], "d": ["five"]}
    scores = squad_scores({"a": "One", "b": "two", "d": "six", "e": "four"}, answers)  # c is not answered, e was not asked
    assert scores == pytest.approx({"f1": (1 + 2 / 3) / 4, "exact_match": 1 / 4})


# ---- --check-metrics ----


def put_evaluate(monkeypatch: pytest.MonkeyPatch, values: dict[str, float] | Exception) -> list[tuple]:
    """Stand in for the package `evaluate`; what it was asked is in the list."""
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
    ("subset", "theirs", "ours"),
    [
        ("cola", {"matthews_correlation": 0.5}, {"matthews": 0.5, "accuracy": 0.7}),
        ("stsb", {"pearson": 0.8, "spearmanr": 0.7 + 1e-12}, {"pearson": 0.8, "spearman": 0.7}),
        ("stsb", {"pearson": math.nan, "spearmanr": math.nan}, {"pearson": math.nan, "spearman": math.nan}),
        ("mrpc", {"accuracy": 0.8, "f1": 0.7}, {"accuracy": 0.8, "f1": 0.7}),
    ],
)
def test_metrics_that_agree_with_evaluates_are_said_to(monkeypatch, subset, theirs, ours):
    asked = put_evaluate(monkeypatch, theirs)
    line = compare_with_evaluate(subset, [1, 0], [1, 1], ours)
    assert "equal" in line
    assert all(name in line for name in theirs)
    assert asked == [("glue", subset), {"predictions": [1, 0], "references": [1, 1]}]


def test_squads_percentages_are_compared_as_shares(monkeypatch):
    asked = put_evaluate(monkeypatch, {"exact_match": 25.0, "f1": 50.0})
    assert "equal" in compare_with_evaluate("squad", ["p"], ["r"], {"f1": 0.5, "exact_match": 0.25})
    assert asked == [("squad",), {"predictions": ["p"], "references": ["r"]}]
    with pytest.raises(UserError, match=r"f1 is 0\.5 by evaluate and 50 here"):
        compare_with_evaluate("squad", ["p"], ["r"], {"f1": 50, "exact_match": 0.25})


@pytest.mark.parametrize("value", [0.5 + 1e-6, math.nan])
def test_a_metric_that_differs_from_evaluates_ends_the_run(monkeypatch, value):
    put_evaluate(monkeypatch, {"matthews_correlation": value})
    with pytest.raises(UserError, match=r"matthews_correlation is .* by evaluate and 0.5 here"):
        compare_with_evaluate("cola", [1, 0], [1, 1], {"matthews": 0.5})


def test_without_evaluates_hub_the_comparison_is_left_out_in_words(monkeypatch):
    put_evaluate(monkeypatch, ConnectionError("no route to the hub"))
    assert "not compared" in compare_with_evaluate("cola", [1, 0], [1, 1], {"matthews": 0.5})


def test_without_the_package_the_comparison_is_left_out_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)  # importing it fails
    assert "not compared" in compare_with_evaluate("cola", [1, 0], [1, 1], {"matthews": 0.5})


def test_squads_scores_do_not_depend_on_the_order_of_a_set():
    """The last bit of a mean does depend on the order, and that of a set on the process's hash seed."""
    script = """if True:
        from bert_tickets.tasks.metrics import squad_scores
        ids = [f"q{i}" for i in range(997)]
        said = {name: " ".join("abcdefg"[: int(name[1:]) % 7 + 1]).replace("a", "x") for name in ids}
        print(squad_scores(said, {name: ["b c d e f g h i j k"] for name in ids}))
    """
    found = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed}
        ).stdout
        for seed in "1234"
    }
    assert len(found) == 1
