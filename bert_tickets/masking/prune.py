"""From scores to a smaller mask: pure functions of dictionaries of tensors.

The rule is `torch.nn.utils.prune`'s: of the weights still kept, `round(fraction * kept)` with the lowest scores go,
ranked together (`scope="global"`) or within each tensor. Among equal scores the earlier index goes first, so that the
count is exact and the result defined.
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
    """The scores of magnitude pruning: |w|, in each weight's shape."""
    return {name: tensor.detach().abs() for name, tensor in weights.items()}


def random_scores(like: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The scores of random pruning: uniform in [0, 1), in each tensor's shape, on the CPU."""
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in like.items()}


def prune(mask: Mask, scores: Mapping[str, Tensor], fraction: float, scope: Scope = "global") -> Mask:
    """Remove `fraction` of what `mask` keeps, lowest scores first; a new mask on the mask's devices.

    Raises `ValueError` for a fraction outside [0, 1] or scores that do not fit; `UserError` where a kept weight's is NaN.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction is within [0, 1], not {fraction}")
    for name, tensor in mask.items():
        if name not in scores or scores[name].shape != tensor.shape:
            raise ValueError(f"no scores of shape {tuple(tensor.shape)} for {name}")
    if fraction == 0:
        return Mask(dict(mask))
    if scope == "tensor":
        return Mask({name: _remove({name: tensor}, scores, fraction)[name] for name, tensor in mask.items()})
    return Mask(_remove(dict(mask), scores, fraction))


def _remove(mask: dict[str, Tensor], scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Global removal over the tensors of `mask`."""
    scores = {name: scores[name].to(tensor.device) for name, tensor in mask.items()}
    kept = [scores[name].flatten() if tensor.all() else scores[name].masked_select(tensor) for name, tensor in mask.items()]
    total = sum(part.numel() for part in kept)
    count = round(fraction * total)
    if count == 0:
        return mask
    if any(part.isnan().any() for part in kept):
        raise UserError("the scores to prune by contain NaN: the weights they come from are not sound")
    threshold = _kth_smallest(kept, count)
    pruned = {name: (tensor & (scores[name] > threshold)).contiguous() for name, tensor in mask.items()}
    # Of those that sit at the threshold itself, the first by index go until the count is exact.
    spare = total - count - sum(int(tensor.count_nonzero()) for tensor in pruned.values())
    for name in reversed(pruned):
        if spare == 0:
            break
        ties = (mask[name] & (scores[name] == threshold)).flatten().nonzero().flatten()[-spare:]
        pruned[name].view(-1)[ties] = True
        spare -= ties.numel()
    return pruned


def _kth_smallest(parts: list[Tensor], k: int) -> Tensor:
    """The k-th smallest (from 1) of the values of all parts together, exactly, as a scalar tensor.

    A sample of a million brackets it to about a hundredth of the values, which alone are gathered and searched: for the
    85 M weights of BERT-base that moves a third of the memory that putting all in one tensor would. Where the sample
    misleads, all are searched.
    """
    total = sum(part.numel() for part in parts)
    sample = torch.cat([part[:: max(1, total >> 20)] for part in parts]).sort().values
    place, margin = k * len(sample) // total, 4000  # eight standard deviations of the rank in a random sample
    low, high = sample[max(0, place - margin)], sample[min(len(sample) - 1, place + margin)]
    below = sum(int((part < low).count_nonzero()) for part in parts)
    inside = torch.cat([part[(part >= low) & (part <= high)] for part in parts])
    if not below < k <= below + len(inside):
        below, inside = 0, torch.cat(parts)
    return torch.kthvalue(inside, k - below).values
