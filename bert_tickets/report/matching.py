"""Matching subnetworks: the paper's two criteria, and the highest sparsity that satisfies one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bert_tickets.report.significance import Summary


def within_one_sd(ticket: Summary, full: Summary) -> bool | None:
    """Whether a ticket matches: its mean is at least the full BERT's mean minus its standard deviation.

    None if either has fewer than two seeds. A ticket with an undefined value does not match.
    """
    if ticket.undefined:
        return False
    if ticket.mean is None or full.mean is None or full.sd is None or ticket.n < 2:
        return None
    return ticket.mean >= full.mean - full.sd


def match_or_exceed(ticket: Summary, full: Summary) -> bool | None:
    """The stricter criterion: the ticket's mean is at least the full BERT's. None if either has no value."""
    if ticket.undefined:
        return False
    return None if ticket.mean is None or full.mean is None else ticket.mean >= full.mean


@dataclass(frozen=True)
class Highest:
    """The highest sparsity that satisfies a criterion."""

    sparsity: float | None  # None: no tested one does
    misses: tuple[float, ...] = ()  # lower ones that do not
    undecided: tuple[float, ...] = ()  # where the criterion needs more seeds
    last: bool = False  # it is the highest tested one


def highest(criterion: Mapping[float, bool | None]) -> Highest:
    """The highest sparsity at which a criterion is satisfied, of those tested."""
    met = [sparsity for sparsity, holds in criterion.items() if holds]
    undecided = tuple(sorted(sparsity for sparsity, holds in criterion.items() if holds is None))
    if not met:
        return Highest(None, undecided=undecided)
    misses = sorted(sparsity for sparsity, holds in criterion.items() if holds is False and sparsity < max(met))
    return Highest(max(met), tuple(misses), undecided, max(met) == max(criterion))
