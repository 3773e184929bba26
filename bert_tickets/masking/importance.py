"""Importance of gated units from the gradients of each example's loss (Prasanna et al. 2020, after Michel et al. 2019)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Accumulate = Literal["example", "batch", "reference"]


def accumulate(gradients: Tensor, how: Accumulate, batch_size: int) -> Tensor:
    """Add the gradients of N examples' losses, [N, ...], up to an importance, [...].

    `example`: sum of |g_x|, the paper's expectation but for the factor N, which does not change an order. `batch`: of |g_b|, the
    gradients of the mean losses of batches. `reference`: of |g_1 + ... + g_b|, as the released code, which never zeroes
    gradients. The last two depend on the size of the batches and on the order of the examples.
    """
    if how == "example":
        return gradients.abs().sum(0)
    of_batches = torch.stack([part.mean(0) for part in gradients.split(batch_size)])
    return (of_batches.cumsum(0) if how == "reference" else of_batches).abs().sum(0)


def normalize(importance: Tensor, by_layer: bool) -> Tensor:
    """Divide each layer's row of [L, A] by its L2 norm, if asked, and then map all values to [0, 1]."""
    if by_layer:
        importance = importance / (importance.norm(dim=1, keepdim=True) + 1e-20)
    low, high = importance.min(), importance.max()
    return (importance - low) / (high - low) if high > low else torch.zeros_like(importance)
