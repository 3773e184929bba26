"""Draw units by their coefficients, and ask whether the masks of a search have become stable (Chen et al. 2021, You et al. 2020).

Coefficients and masks are by kind of unit, [L, units of a layer].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import prune

Rule = Literal["count", "quantile"]
Rank = Literal["magnitude", "signed"]
FIFO = 5  # masks that are compared
TOLERANCE = 0.1  # of their normalized Hamming distances


def draw(
    coefficients: Mapping[str, Tensor], fractions: Mapping[str, float], by_layer: Collection[str], rank: Rank, rule: Rule
) -> Mask:
    """Return the mask of units that is left when `fractions` of each kind go, smallest coefficients first.

    Kinds in `by_layer` lose as many units in each layer, the others in all layers together. `count` prunes round(n * fraction)
    of n units, of equal coefficients the lower index first; `quantile`, the released code's, keeps those above the quantile.
    """
    scores = {kind: values.abs() if rank == "magnitude" else values for kind, values in coefficients.items()}
    return Mask({kind: _kept(values, fractions[kind], kind in by_layer, rule) for kind, values in scores.items()})


def _kept(scores: Tensor, fraction: float, by_layer: bool, rule: Rule) -> Tensor:
    parts = {str(number): part for number, part in enumerate(scores if by_layer else scores[None])}
    if rule == "count":
        kept: Mapping[str, Tensor] = prune(Mask.ones(parts), parts, fraction, "tensor")
    else:
        wide = {number: part.double() for number, part in parts.items()}  # float32 would round a quantile up to a coefficient
        kept = {number: part > float(np.quantile(part.numpy(), fraction)) for number, part in wide.items()}
    return torch.stack(list(kept.values())).view(scores.shape)


def stable(masks: Sequence[Mask]) -> dict[str, bool]:
    """Return for each kind whether the last of five masks is within 0.1 of each of the other four; False of fewer masks."""
    *others, newest = masks
    enough = len(masks) == FIFO
    return {kind: enough and all(_distance(kept, other[kind]) <= TOLERANCE for other in others) for kind, kept in newest.items()}


def first_stable(masks: Iterable[tuple[int, Mask]]) -> dict[str, int | None]:
    """Return the first step at which the masks of a search, in order, are stable: of each kind, and of `all` at once."""
    last: deque[Mask] = deque(maxlen=FIFO)
    found: dict[str, int | None] = {}
    for step, units in masks:
        last.append(units)
        now = stable(last)
        for name, fires in {**now, "all": all(now.values())}.items():
            found[name] = step if fires and found.get(name) is None else found.get(name)
    return found


def _distance(one: Tensor, other: Tensor) -> float:
    return Mask({"": one}).distance(Mask({"": other}))
