"""GLUE's metrics, by name, from scikit-learn and SciPy, and SQuAD's; nothing here touches the network.

Each of GLUE's takes predictions and references of shape [n] (class indices, or similarity scores for STS-B) and gives a
float. Degenerate input follows the libraries: Matthews is 0 for constant predictions, a correlation is NaN.
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
    """The share of equal pairs, in [0, 1]."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def f1(predictions: Array, references: Array) -> float:
    """F1 of class 1 (MRPC, QQP), in [0, 1]; 0 where class 1 is never predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, zero_division=0.0))


def matthews(predictions: Array, references: Array) -> float:
    """Matthews correlation (CoLA), in [-1, 1]."""
    from sklearn.metrics import matthews_corrcoef

    return _quietly(lambda: matthews_corrcoef(references, predictions))


def pearson(predictions: Array, references: Array) -> float:
    """Pearson correlation (STS-B), in [-1, 1]."""
    from scipy.stats import pearsonr

    if len(references) < 2:
        return float("nan")  # SciPy refuses it, though not Spearman's
    return _quietly(lambda: pearsonr(predictions, references)[0])


def spearman(predictions: Array, references: Array) -> float:
    """Spearman rank correlation (STS-B), in [-1, 1]."""
    from scipy.stats import spearmanr

    return _quietly(lambda: spearmanr(predictions, references)[0])


def _quietly(function: Callable[[], float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input: the value says it
        return float(function())


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


# ---- SQuAD ----

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """What SQuAD compares of an answer: lower case, without ASCII punctuation and articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def squad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 over words, in [0, 1]: means over the questions (Rajpurkar et al. 2016, section 6.1).

    `answers` holds every question's gold answers, the nearest of which counts; a question not in `predictions` is wrong.
    """
    exact, overlap = 0, 0.0
    for question in answers:  # in their order: a set's differs from process to process, and so would the sum's last bit
        if question not in predictions:
            continue
        said, golds = normalised(predictions[question]), [normalised(gold) for gold in answers[question]]
        exact += said in golds
        overlap += max((_overlap(said.split(), gold.split()) for gold in golds), default=0.0)
    return {"f1": overlap / len(answers), "exact_match": exact / len(answers)}


def _overlap(said: list[str], gold: list[str]) -> float:
    """F1 of two bags of words; 0 where they share none, two empty ones included, as in the official script."""
    common = (Counter(said) & Counter(gold)).total()
    return 2 * common / (len(said) + len(gold)) if common else 0.0


# ---- against another implementation ----


def compare_with_evaluate(task: str, predictions: Any, references: Any, ours: dict[str, float]) -> str:
    """Check `ours` against `evaluate.load("glue", task)`, or its "squad", of data as it wants them; one line to print.

    Raises `UserError` where a value differs by more than 1e-9. Where `evaluate` or its hub cannot be reached, says so.
    """
    names = {"matthews_correlation": "matthews", "spearmanr": "spearman"}
    unit = 100 if task == "squad" else 1  # evaluate gives SQuAD's in percent
    try:
        import evaluate

        metric = evaluate.load("squad") if task == "squad" else evaluate.load("glue", task)
        theirs = metric.compute(predictions=predictions, references=references)
    except Exception as error:  # no package, no network, no cached module: each means it cannot be compared here
        return f"metrics not compared with evaluate, which does not work here ({type(error).__name__}: {first_line(error)})"
    for name, value in theirs.items():
        mine = ours[names.get(name, name)]
        if not np.isclose(mine, value / unit, rtol=0, atol=1e-9, equal_nan=True):
            raise UserError(f"{name} is {value / unit} by evaluate and {mine} here: report this, and do not use the number")
    return f"metrics equal evaluate's ({', '.join(theirs)})"
