"""When a ticket is matching, by the paper's two criteria; and beside them a paired test over seeds. No network, no files.

Values are by seed. Equal seeds share a head's first weights and the order of examples, so that they pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

LEVEL = 0.05  # of the tests; intervals hold 1 - LEVEL
NO_SPREAD = 1e-9  # differences that vary by less are one difference: what rounding leaves


@dataclass(frozen=True)
class Summary:
    """A metric over seeds: the values that there are, and the seeds of which the metric is undefined."""

    values: Mapping[int, float]
    undefined: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """How many seeds the mean is of."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return mean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """The standard deviation with n - 1; one seed has none."""
        return stdev(self.values.values()) if self.n > 1 else None

    @property
    def constant(self) -> bool:
        """Whether several seeds came to exactly one value, as networks that say one class do."""
        return self.n > 1 and len(set(self.values.values())) == 1


def summarize(values: Mapping[int, float | None], unit: float = 1.0) -> Summary:
    """The values times `unit` by seed, the undefined ones (None) apart."""
    defined = {seed: value * unit for seed, value in sorted(values.items()) if value is not None}
    return Summary(defined, tuple(sorted(values.keys() - defined.keys())))


# ---- the paper's criteria ----


def matches(ticket: Summary, full: Summary) -> bool | None:
    """Within one standard deviation of the full network: mean >= its mean - its standard deviation.

    None where that cannot be said: with fewer than two seeds of either. A ticket with an undefined value does not match.
    """
    if ticket.undefined:
        return False
    if ticket.mean is None or full.mean is None or full.sd is None or ticket.n < 2:
        return None
    return ticket.mean >= full.mean - full.sd


def matches_or_exceeds(ticket: Summary, full: Summary) -> bool | None:
    """The stricter criterion, mean >= the full network's mean; None where one of them has no value."""
    if ticket.undefined:
        return False
    return None if ticket.mean is None or full.mean is None else ticket.mean >= full.mean


# ---- a test beside them ----


@dataclass(frozen=True)
class Difference:
    """A ticket minus a reference over the seeds that both have. The interval is the t-interval of the one comparison."""

    mean: float
    seeds: tuple[int, ...]
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided, of the paired t-test; None where there is no spread to test by
    alone: tuple[int, ...] = ()  # the seeds that only one of the two has


def paired(ticket: Summary, reference: Summary) -> Difference | None:
    """The difference over common seeds with its 95 % t-interval (n - 1 degrees of freedom); None without a common seed.

    Two seeds of metrics that are counted in examples can differ by exactly one amount. That is no sign of certainty, so
    equal differences have no interval.
    """
    seeds = tuple(sorted(ticket.values.keys() & reference.values.keys()))
    if not seeds:
        return None
    alone = tuple(sorted(ticket.values.keys() ^ reference.values.keys()))
    differences = [ticket.values[seed] - reference.values[seed] for seed in seeds]
    centre = mean(differences)
    if len(seeds) < 2 or max(differences) - min(differences) < NO_SPREAD:
        return Difference(centre, seeds, alone=alone)
    from scipy.stats import t

    error, freedom = stdev(differences) / math.sqrt(len(seeds)), len(seeds) - 1
    half = float(t.ppf(1 - LEVEL / 2, freedom)) * error
    p = 2 * float(t.sf(abs(centre) / error, freedom))
    return Difference(centre, seeds, centre - half, centre + half, p, alone)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of those that there are: all verdicts at LEVEL hold together with 95 % probability."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[place] = largest
    return corrected


def verdict(difference: Difference | None, corrected: float | None) -> str:
    """What the test says of a difference, in words; `corrected` is its p among all that are tested together."""
    if difference is None:
        return "no common seed"
    if len(difference.seeds) == 1:
        return "one seed: no interval"
    if difference.p is None:
        return (
            "no difference in any seed" if abs(difference.mean) < NO_SPREAD else "the same difference in every seed: no interval"
        )
    side = "below" if difference.mean < 0 else "above"
    if corrected is not None and corrected < LEVEL:
        return side
    return f"not told apart ({side} if tested alone)" if difference.p < LEVEL else "not told apart"


# ---- the highest sparsity ----


@dataclass(frozen=True)
class Highest:
    """The highest sparsity of those tested that meets a criterion."""

    sparsity: float | None  # None: none of them does
    misses: tuple[float, ...]  # lower ones that do not meet it: the curve is not monotone
    undecided: tuple[float, ...]  # where the criterion says nothing
    last: bool  # it is the highest tested: the next might do as well


def highest(criterion: Mapping[float, bool | None]) -> Highest:
    """The highest sparsity at which a criterion holds, and whether it holds at every lower one."""
    met = [sparsity for sparsity, holds in criterion.items() if holds]
    undecided = tuple(sorted(sparsity for sparsity, holds in criterion.items() if holds is None))
    if not met:
        return Highest(None, (), undecided, False)
    misses = sorted(sparsity for sparsity, holds in criterion.items() if holds is False and sparsity < max(met))
    return Highest(max(met), tuple(misses), undecided, max(met) == max(criterion))
