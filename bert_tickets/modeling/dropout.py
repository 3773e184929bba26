"""Dropout with a fast random generator on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def factors(like: Tensor, p: float) -> Tensor:
    """Draw the factors of dropout, in the shape and dtype of `like`: 0 with probability p, else 1 / (1 - p).

    p is rounded to a multiple of 2^-16 (0.1 to 0.100006), so that a draw takes 16 random bits.
    """
    dropped, count = round(p * 2**16), like.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = bits.view(torch.int16)[:count].view(like.shape)
    kept = torch.ge(draws, dropped - 2**15, out=like.new_empty(like.shape))
    return kept.mul_(2**16 / (2**16 - dropped))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        drawn = factors(x, p)
        ctx.save_for_backward(drawn)
        return x * drawn

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class Dropout(nn.Dropout):
    """`nn.Dropout` with `factors` on a CPU, where torch draws Bernoulli numbers one by one, an eighth of a training step."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return _Drop.apply(input, self.p) if input.device.type == "cpu" else F.dropout(input, self.p)


def replace_dropout(net: nn.Module) -> None:
    """Replace every `nn.Dropout` of a network by `Dropout`, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
