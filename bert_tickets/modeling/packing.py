"""Packed batches: the examples of a batch end to end, without a padding token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The examples [first, last) of a batch of B examples, where processes or --grad-accum divide it."""

    lengths: np.ndarray  # [B], tokens of each example of the whole batch
    first: int
    last: int

    @property
    def tokens(self) -> slice:
        """Its tokens among the whole batch's."""
        return slice(int(self.lengths[: self.first].sum()), int(self.lengths[: self.last].sum()))


@dataclass(frozen=True)
class Batch:
    """B examples of T tokens together, none of more than L. Index tensors are int64, on the device.

    In a bucketed batch T and L are rounded up, so that a few shapes serve all: the last `padding` tokens belong to no example,
    stand where attention pads the shortest one or form one more example there, and neither change a result nor take a gradient.
    """

    input_ids: Tensor  # [1, T]
    token_type_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], from 0 in each example
    rows: Tensor  # [T], the example of each token
    starts: Tensor  # [B], where each example begins
    lens: Tensor  # [B], its tokens
    labels: Tensor  # [B, ...]; or [M], of the chosen tokens
    lengths: np.ndarray  # [B], `lens` on the host, to know shapes without asking the device
    longest: int  # L
    padding: int = 0
    chosen: Tensor | None = None  # [M], the tokens that the loss is of, where it is not of examples
    shard: Shard | None = None  # which part of a batch this is, where the batch is divided
    weight: float = 1.0  # of its mean loss in the whole batch's


def max_padding(tokens: int) -> int:
    """The most padding that a bucketed batch of T tokens has."""
    return max(32, tokens // 16)


def ship(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
