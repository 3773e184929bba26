"""Prune a mask by scores: pure functions of dictionaries of tensors.

The rule is that of `torch.nn.utils.prune`: prune the `round(fraction * kept)` weights with the lowest scores, ranked over all
tensors together (`scope="global"`) or within each. Of equal scores the earlier index is pruned first, so that counts are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask

Scope = Literal["global", "tensor"]


def magnitude(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of magnitude pruning, |w|."""
    return {name: tensor.detach().abs() for name, tensor in weights.items()}


def random_scores(like: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the scores of random pruning, uniform in [0, 1), on the CPU."""
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in like.items()}


def prune(mask: Mask, scores: Mapping[str, Tensor], fraction: float, scope: Scope = "global") -> Mask:
    """Prune `fraction` of the weights that `mask` keeps, lowest scores first; returns a new mask on the mask's devices.

    Raises `ValueError` for a fraction outside [0, 1] or scores of other shapes, `UserError` if the score of a kept weight is NaN.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} is not in [0, 1]")
    for name, tensor in mask.items():
        if name not in scores or scores[name].shape != tensor.shape:
            raise ValueError(f"no scores of shape {tuple(tensor.shape)} for {name}")
    if scope == "tensor":
        return Mask({name: _prune_globally({name: tensor}, scores, fraction)[name] for name, tensor in mask.items()})
    return Mask(_prune_globally(dict(mask), scores, fraction))


def _prune_globally(mask: dict[str, Tensor], scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    scores = {name: scores[name].to(tensor.device) for name, tensor in mask.items()}
    kept = [scores[name].flatten() if tensor.all() else scores[name].masked_select(tensor) for name, tensor in mask.items()]
    total = sum(part.numel() for part in kept)
    count = round(fraction * total)
    if count == 0:
        return mask
    if any(part.isnan().any() for part in kept):
        raise UserError("the pruning scores contain NaN: the weights that they were computed from are not finite")
    threshold = kth_smallest(kept, count)
    pruned = {name: (tensor & (scores[name] > threshold)).contiguous() for name, tensor in mask.items()}
    # Of the weights at the threshold itself, keep the last ones by index until the count is exact.
    missing = total - count - sum(int(tensor.count_nonzero()) for tensor in pruned.values())
    for name in reversed(pruned):
        if missing == 0:
            break
        ties = (mask[name] & (scores[name] == threshold)).flatten().nonzero().flatten()[-missing:]
        pruned[name].view(-1)[ties] = True
        missing -= ties.numel()
    return pruned


def kth_smallest(parts: list[Tensor], k: int) -> Tensor:
    """Return the k-th smallest value (k from 1) over all parts, exactly, as a scalar tensor.

    A sample of a million values brackets it within about 1 % of all values, and only these are sorted. For BERT-base this takes
    a third of the memory traffic of concatenating all scores. If the bracket misses, all values are sorted.
    """
    total = sum(part.numel() for part in parts)
    sample = torch.cat([part[:: max(1, total >> 20)] for part in parts]).sort().values
    rank, margin = k * len(sample) // total, 4000  # eight standard deviations of the rank in a random sample
    low, high = sample[max(0, rank - margin)], sample[min(len(sample) - 1, rank + margin)]
    below = sum(int((part < low).count_nonzero()) for part in parts)
    inside = torch.cat([part[(part >= low) & (part <= high)] for part in parts])
    if not below < k <= below + len(inside):
        below, inside = 0, torch.cat(parts)
    return torch.kthvalue(inside, k - below).values
