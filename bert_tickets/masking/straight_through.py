"""Trained masks: a real score for each weight, cut at a threshold, with straight-through gradients (Liu et al. 2022, TAMT).

Everything is per matrix. A weight is kept where its score is above the matrix's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import kth_smallest, prune

THRESHOLD = 0.01  # of every matrix at the start, when scores are 0 and twice this
Rounding = Literal["round", "int"]


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight * (scores > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, grad * ctx.saved_tensors[0], None


def masked(weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """Return weight * 1[scores > threshold]. The gradient of the scores is that of the mask: weight * d(result)."""
    return _Masked.apply(weight, scores, threshold)


def initial_scores(mask: Mask) -> dict[str, Tensor]:
    """Return scores that give `mask` at the initial threshold: 0 for pruned weights, 0.02 for kept ones."""
    return {name: kept.float() * 2 * THRESHOLD for name, kept in mask.items()}


def refresh(scores: Mapping[str, Tensor], sparsity: float, rounding: Rounding = "round") -> tuple[Mask, dict[str, Tensor]]:
    """Return the mask that prunes `sparsity` of each matrix by its scores, and the thresholds.

    `round` prunes round(n * sparsity) of n weights, of equal scores the earlier index first; `int`, the released code's, all
    up to the int(n * sparsity)-th smallest score. Until the next refresh the threshold alone decides, in both.
    """
    count = round if rounding == "round" else int
    detached = {name: tensor.detach() for name, tensor in scores.items()}
    thresholds = {}
    for name, tensor in detached.items():
        k = count(tensor.numel() * sparsity)
        thresholds[name] = kth_smallest([tensor.flatten()], k) if k else tensor.new_full((), float("-inf"))
    if rounding == "int":
        return Mask({name: tensor > thresholds[name] for name, tensor in detached.items()}), thresholds
    return prune(Mask.ones(detached), detached, sparsity, "tensor"), thresholds
