"""GLUE's metrics, from scikit-learn and SciPy, and SQuAD's. None uses the network.

GLUE's take predictions and references of shape [n] (class indices, or similarity scores for STS-B). For constant predictions
Matthews correlation is 0 and the other correlations are NaN, as in the libraries.
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bert_tickets.errors import UserError, first_line

Array = np.ndarray | Sequence[float]


def accuracy(predictions: Array, references: Array) -> float:
    """Return the fraction of equal pairs, in [0, 1]."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def f1(predictions: Array, references: Array) -> float:
    """Return F1 of class 1 (MRPC, QQP), in [0, 1]; 0 if class 1 is never predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, zero_division=0.0))


def matthews(predictions: Array, references: Array) -> float:
    """Return Matthews correlation (CoLA), in [-1, 1]."""
    from sklearn.metrics import matthews_corrcoef

    return _quietly(lambda: matthews_corrcoef(references, predictions))


def pearson(predictions: Array, references: Array) -> float:
    """Return Pearson correlation (STS-B), in [-1, 1]."""
    from scipy.stats import pearsonr

    if len(references) < 2:
        return float("nan")  # here pearsonr raises, unlike spearmanr
    return _quietly(lambda: pearsonr(predictions, references)[0])


def spearman(predictions: Array, references: Array) -> float:
    """Return Spearman rank correlation (STS-B), in [-1, 1]."""
    from scipy.stats import spearmanr

    return _quietly(lambda: spearmanr(predictions, references)[0])


def _quietly(function: Callable[[], float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant input, for which the value is NaN
        return float(function())


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


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

        metric = evaluate.load("squad") if task == "squad" else evaluate.load("glue", task)
        theirs = metric.compute(predictions=predictions, references=references)
    except Exception as error:  # no package, no network, no cached module
        return f"metrics not compared with evaluate, which failed ({type(error).__name__}: {first_line(error)})"
    for name, value in theirs.items():
        mine = ours[names.get(name, name)]
        if not np.isclose(mine, value / unit, rtol=0, atol=1e-9, equal_nan=True):
            raise UserError(f"{name} is {value / unit} by evaluate and {mine} here: please report this, and do not use the value")
    return f"metrics equal evaluate's ({', '.join(theirs)})"
