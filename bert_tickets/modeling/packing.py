"""Packed batches: the examples of a batch concatenated, without padding tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The examples [first, last) of a batch of B, which is split over processes or by --grad-accum."""

    lengths: np.ndarray  # [B], tokens of each example of the whole batch
    first: int
    last: int

    @property
    def tokens(self) -> slice:
        """The slice of its tokens in the whole batch."""
        return slice(int(self.lengths[: self.first].sum()), int(self.lengths[: self.last].sum()))

    @property
    def share(self) -> float:
        """The share of its tokens in the whole batch's."""
        return float(self.lengths[self.first : self.last].sum() / self.lengths.sum())


@dataclass(frozen=True)
class Batch:
    """B examples with T tokens in total, at most L each. Index tensors are int64, on the device.

    In a bucketed batch T and L are rounded up, so that all batches have one of a few shapes. Its last `padding` tokens belong
    to no example. Attention treats them as padding of the shortest example, or as another example; they affect no result.
    """

    input_ids: Tensor  # [1, T]
    token_type_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], from 0 in each example
    rows: Tensor  # [T], the example of each token
    starts: Tensor  # [B], the first token of each example
    lens: Tensor  # [B], tokens of each example
    labels: Tensor  # [B, ...], of the examples; or [M], of the chosen tokens
    lengths: np.ndarray  # [B], `lens` on the host: shapes are known without waiting for the device
    longest: int  # L
    padding: int = 0
    chosen: Tensor | None = None  # [M], the tokens that the loss is computed on, if it is a loss of tokens
    chosen_back: Tensor | None = None  # [T], each token's place among them, or -1
    shard: Shard | None = None  # the part of a larger batch that this is
    weight: float = 1.0  # of its mean loss in that of the whole batch


def max_padding(tokens: int) -> int:
    """Return the maximum padding of a bucketed batch of T tokens."""
    return max(32, tokens // 16)


def at_least_fp32(x: Tensor) -> torch.dtype:
    """Return float32, or the tensor's dtype if it is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def ship(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
