"""Prune untrained weights once, by magnitude or at random."""

from __future__ import annotations

from bert_tickets.config import Prunable
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import Scope, magnitude, prune, random_scores
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.parameters import prunable
from bert_tickets.seeds import seeded


def oneshot(net: Net, rate: float, ranking: str, seed: int, scope: Scope = "global", which: Prunable = "matrices") -> Mask:
    """Prune `rate` of the prunable weights at once: by the `magnitude` of the untrained weights, or at `random`."""
    weights = prunable(net, which)
    scores = magnitude(weights) if ranking == "magnitude" else random_scores(weights, seeded(seed, "random mask"))
    return prune(Mask.ones(weights), scores, rate, scope)
