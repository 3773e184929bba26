"""From scores to a smaller mask: pure functions of dictionaries of tensors.

The rule is `torch.nn.utils.prune`'s: of the weights still kept, `round(fraction * kept)` with the lowest scores go,
ranked together (`scope="global"`) or within each tensor. Among equal scores the earlier index goes first, so that the
count is exact and the result defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bert_tickets import UserError
from bert_tickets.mask import Mask

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
    kept = torch.cat(
        [scores[name].flatten() if tensor.all() else scores[name].masked_select(tensor) for name, tensor in mask.items()]
    )
    count = round(fraction * kept.numel())
    if count == 0:
        return mask
    if kept.isnan().any():
        raise UserError("the scores to prune by contain NaN: the weights they come from are not sound")
    threshold = _kth_smallest(kept, count)
    pruned = {name: (tensor & (scores[name] > threshold)).contiguous() for name, tensor in mask.items()}
    # Of those that sit at the threshold itself, the first by index go until the count is exact.
    spare = kept.numel() - count - sum(int(tensor.count_nonzero()) for tensor in pruned.values())
    for name in reversed(pruned):
        if spare == 0:
            break
        ties = (mask[name] & (scores[name] == threshold)).flatten().nonzero().flatten()[-spare:]
        pruned[name].view(-1)[ties] = True
        spare -= ties.numel()
    return pruned


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) of a flat tensor, as a scalar tensor."""
    if values.is_cuda:
        return torch.kthvalue(values, k).values
    # NumPy's partition is vectorised: three times as fast as torch's kthvalue on 85 M floats.
    return torch.from_numpy(np.partition(values.numpy(), k - 1)[k - 1 : k])[0]
