"""Paired t-tests of differences over seeds, and the paper's two criteria of a matching ticket.

Runs with the same seed share the head's initial weights and the order of the examples, so that they are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import Series

ALPHA = 0.05  # of the tests; intervals have 1 - ALPHA
ROUNDING = 1e-9  # differences that vary by less are equal


def paired(ticket: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, Any]:
    """Compute the mean difference of two rows over their common seeds, and its 95 % t-interval, from values by seed.

    Without common seeds there is no `difference`; with one pair no `difference_sd`. Metrics that count examples often differ by
    the same amount in two seeds. That is no evidence of a variance of zero, so that equal differences, as one pair, get no
    interval.
    """
    seeds = sorted(ticket.keys() & reference.keys())
    found: dict[str, Any] = {"pairs": len(seeds), "unpaired": len(ticket.keys() ^ reference.keys())}
    if not seeds:
        return found
    ours, theirs = [ticket[seed] for seed in seeds], [reference[seed] for seed in seeds]
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    found["difference"] = mean(differences)
    if len(seeds) == 1:
        return found
    if max(differences) - min(differences) < ROUNDING:
        return found | {"difference_sd": 0.0}
    from scipy.stats import ttest_rel

    test = ttest_rel(ours, theirs)
    low, high = map(float, test.confidence_interval(1 - ALPHA))
    return found | {"difference_sd": stdev(differences), "interval_low": low, "interval_high": high, "p": float(test.pvalue)}


def holm(p_values: Series) -> Series:
    """Correct p-values for multiple tests by Holm's step-down method; NaN stays NaN and does not count."""
    known = p_values.dropna().sort_values()
    steps = known * list(range(len(known), 0, -1))
    return steps.clip(upper=1).cummax().reindex(p_values.index)


def verdict(cell: Mapping[str, Any]) -> str:
    """The result of a cell's comparison, with the corrected p-value, in words."""
    if not cell["n"]:
        return "undefined"
    if not cell["reference"]:
        return ""
    if not cell["pairs"] > 0:
        return "no common seed"
    if not cell["p_holm"] >= 0:  # NaN
        return "no interval"
    if cell["p_holm"] >= ALPHA:
        return "not significant"
    return "below" if cell["difference"] < 0 else "above"


# ---- the paper's criteria; `ticket` and `full` are defined values over seeds ----


def within_one_sd(ticket: Sequence[float], full: Sequence[float]) -> bool | None:
    """Whether a ticket matches: its mean is at least the full BERT's mean minus its standard deviation.

    None if either has fewer than two seeds.
    """
    return None if min(len(ticket), len(full)) < 2 else mean(ticket) >= mean(full) - stdev(full)


def match_or_exceed(ticket: Sequence[float], full: Sequence[float]) -> bool | None:
    """The stricter criterion: the ticket's mean is at least the full BERT's. None if either has no value."""
    return mean(ticket) >= mean(full) if ticket and full else None
