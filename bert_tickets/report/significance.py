"""Means over seeds, and paired t-tests of their differences.

Runs with the same seed share the head's initial weights and the order of the examples, so that they are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

ALPHA = 0.05  # of the tests; intervals have 1 - ALPHA
ROUNDING = 1e-9  # differences that vary by less are equal


@dataclass(frozen=True)
class Summary:
    """A metric over seeds."""

    values: Mapping[int, float]  # by seed
    undefined: tuple[int, ...] = ()  # seeds whose metric is undefined

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return mean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """The sample standard deviation (n - 1); None for fewer than two seeds."""
        return stdev(self.values.values()) if self.n > 1 else None

    @property
    def constant(self) -> bool:
        """Whether all of several seeds have the same value, as constant predictions give."""
        return self.n > 1 and len(set(self.values.values())) == 1


def summarize(values: Mapping[int, float | None], unit: float = 1.0) -> Summary:
    """Summarize values by seed, times `unit`; None is an undefined value."""
    defined = {seed: value * unit for seed, value in sorted(values.items()) if value is not None}
    return Summary(defined, tuple(sorted(values.keys() - defined.keys())))


@dataclass(frozen=True)
class Difference:
    """The mean paired difference of two summaries, and its 95 % t-interval."""

    mean: float
    seeds: tuple[int, ...]  # that both have
    unpaired: tuple[int, ...] = ()  # that only one has
    sd: float | None = None  # of the differences
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided; None, as the interval, for one pair or for equal differences
    p_holm: float | None = None  # corrected over all comparisons with one reference


def paired(ticket: Summary, reference: Summary) -> Difference | None:
    """Subtract `reference` from `ticket` over their common seeds; None if there are none.

    Metrics that count examples often differ by the same amount in two seeds. That is no evidence of a variance of zero, so equal
    differences get no interval.
    """
    seeds = tuple(sorted(ticket.values.keys() & reference.values.keys()))
    if not seeds:
        return None
    unpaired = tuple(sorted(ticket.values.keys() ^ reference.values.keys()))
    ours, theirs = ([summary.values[seed] for seed in seeds] for summary in (ticket, reference))
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(seeds) == 1:
        return Difference(differences[0], seeds, unpaired)
    if max(differences) - min(differences) < ROUNDING:
        return Difference(mean(differences), seeds, unpaired, sd=0.0)
    from scipy.stats import ttest_rel

    test = ttest_rel(ours, theirs)
    low, high = map(float, test.confidence_interval(1 - ALPHA))
    return Difference(mean(differences), seeds, unpaired, stdev(differences), low, high, float(test.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for multiple tests by Holm's step-down method; None stays None and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def verdict(difference: Difference | None) -> str:
    """The result of a test, with the corrected p-value, in words."""
    if difference is None:
        return "no common seed"
    if difference.p is None:
        return "no interval"
    if difference.p_holm is None or difference.p_holm >= ALPHA:
        return "not significant"
    return "below" if difference.mean < 0 else "above"
