"""The arithmetic of training steps, and the number of steps of the full network that cost as much as a ticket."""

from __future__ import annotations

import bisect

from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.flops import TRAINING, forward_flops
from bert_tickets.modeling.units import all_units
from bert_tickets.runs.session import Session
from bert_tickets.tasks.mlm import MASK_RATE


def cost(session: Session, units: Mask, start: int, stop: int) -> int:
    """Count the arithmetic of the steps [start, stop) of a network with these units, on the tokens of the steps' own examples. Of
    these an MLM head predicts 15 %."""
    lengths = session.batches.lengths(start, stop)
    return TRAINING * forward_flops(session.net, lengths, MASK_RATE * float((lengths - 2).sum()), units)


def matched_steps(session: Session, units: Mask, searched: int, start: int) -> int:
    """Return the number of steps of the full network for which the arithmetic of a ticket is enough: a search of `searched` steps
    with the full network, then the training of the units that are left, from step `start` on."""
    full = all_units(session.net.config, "heads+neurons")
    budget = cost(session, full, 0, searched) + cost(session, units, start, session.steps)
    most = searched + session.steps + 2 * session.batches.per_epoch  # the examples of two epochs differ in their order alone
    return max(1, bisect.bisect_right(range(most), budget, key=lambda steps: cost(session, full, 0, steps)) - 1)
