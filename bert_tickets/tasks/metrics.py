"""GLUE's metrics, from scikit-learn and SciPy, and SQuAD's. None uses the network."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import chdir
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bert_tickets.errors import UserError, cause

Array = np.ndarray | Sequence[float]


def glue_metric(name: str, predictions: Array, references: Array) -> float:
    """Compute a metric of predictions and references, [n] each: class indices, or similarity scores for the last two.

    `accuracy` and `f1` (of class 1; 0 if it is never predicted) in [0, 1]; `matthews`, `pearson` and `spearman` correlation in
    [-1, 1]. For constant predictions Matthews correlation is 0 and the other correlations are NaN, as in the libraries.
    """
    if name == "accuracy":
        return float(np.mean(np.asarray(predictions) == np.asarray(references)))
    from scipy import stats
    from sklearn import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant input
        if name == "f1":
            value = metrics.f1_score(references, predictions, zero_division=0.0)
        elif name == "matthews":
            value = metrics.matthews_corrcoef(references, predictions)
        elif name == "pearson":
            value = stats.pearsonr(predictions, references)[0] if len(references) > 1 else np.nan  # of one pair pearsonr raises
        else:
            value = stats.spearmanr(predictions, references)[0]
    return float(value)


# ---- SQuAD ----

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Normalize an answer as SQuAD's script does: lower case, without ASCII punctuation and articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def squad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return exact match and F1 over words, in [0, 1]: means over the questions (Rajpurkar et al. 2016, section 6.1).

    `answers` has the gold answers of every question, of which the best match counts. A question without a prediction scores 0.
    """
    exact, overlap = 0, 0.0
    for question in answers:  # in a fixed order, on which the last bit of the sum depends
        if question not in predictions:
            continue
        predicted, golds = normalize(predictions[question]), [normalize(gold) for gold in answers[question]]
        exact += predicted in golds
        overlap += max((_overlap(predicted.split(), gold.split()) for gold in golds), default=0.0)
    return {"f1": overlap / len(answers), "exact_match": exact / len(answers)}


def _overlap(predicted: list[str], gold: list[str]) -> float:
    """Return F1 of two bags of words; 0 without a common word, also if both are empty, as in the official script."""
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold)) if common else 0.0


# ---- comparison with evaluate ----


def compare_with_evaluate(task: str, predictions: Any, references: Any, ours: Mapping[str, float]) -> str:
    """Compare `ours` with `evaluate.load("glue", task)`, or its "squad"; returns a line to print.

    Raises `UserError` if a value differs by more than 1e-9. If `evaluate` cannot be loaded, the line gives the reason.
    """
    names = {"matthews_correlation": "matthews", "spearmanr": "spearman"}
    unit = 100 if task == "squad" else 1  # evaluate returns SQuAD's in percent
    try:
        import evaluate

        with TemporaryDirectory() as empty, chdir(empty):  # it would run glue/glue.py of the working directory
            metric = evaluate.load("squad") if task == "squad" else evaluate.load("glue", task)
        theirs = metric.compute(predictions=predictions, references=references)
    except Exception as error:  # no package, no network, no cached module
        return f"metrics not compared with evaluate, which failed ({cause(error)})"
    for name, value in theirs.items():
        mine = ours[names.get(name, name)]
        if not np.isclose(mine, value / unit, rtol=0, atol=1e-9, equal_nan=True):
            raise UserError(f"{name} is {value / unit} by evaluate and {mine} here: please report this, and do not use the value")
    return f"metrics equal evaluate's ({', '.join(theirs)})"
