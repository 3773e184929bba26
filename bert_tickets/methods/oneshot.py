"""Prune untrained weights once, by magnitude or at random."""

from __future__ import annotations

from torch import Tensor

from bert_tickets.config import Prunable
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import Scope, magnitude, prune, random_scores
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.parameters import prunable
from bert_tickets.seeds import seeded


def oneshot(net: Net, rate: float, ranking: str, seed: int, scope: Scope = "global", which: Prunable = "matrices") -> Mask:
    """Prune `rate` of the prunable weights at once: by the `magnitude` of the untrained weights, or at `random`."""
    return prune(Mask.ones(prunable(net, which)), ranked(net, ranking, seed, which), rate, scope)


def ranked(net: Net, ranking: str, seed: int, which: Prunable) -> dict[str, Tensor]:
    """Compute the scores of the prunable weights by which the smallest go: their magnitudes, or random ones."""
    weights = prunable(net, which)
    return magnitude(weights) if ranking == "magnitude" else random_scores(weights, seeded(seed, "random mask"))
