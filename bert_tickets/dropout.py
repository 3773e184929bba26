"""Dropout, drawn fast on a CPU, and alike in several processes that divide a batch there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_tickets.batches import Share


def factors(like: Tensor, p: float, shape: Sequence[int], part: Any = ...) -> Tensor:
    """What dropout multiplies by: 0 with probability round(p * 2^16) / 2^16, else 1 / (1 - that). 16 bits a draw.

    Drawn for `shape`, of which `part` is returned, in the dtype of `like`.
    """
    dropped, count = round(p * 2**16), math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = bits.view(torch.int16)[:count].view(*shape)[part]
    kept = like.new_empty(draws.shape)
    torch.ge(draws, dropped - 2**15, out=kept)
    return kept.mul_(2**16 / (2**16 - dropped))


_share: list[Share] = []  # of the step under way, where several processes divide its batch


@contextmanager
def dropout_of(share: Share | None) -> Iterator[None]:
    """Within it, dropout on a CPU is what the share's examples get in the whole batch: each process draws for all and keeps its
    part, so that several processes train as one does."""
    _share[:] = [] if share is None else [share]
    try:
        yield
    finally:
        _share.clear()


def _rows_of_all(x: Tensor) -> tuple[list[int], Any]:
    """The shape that [1, T, hidden] or [B, hidden] has in the whole batch, and the part of it that x is."""
    if not _share:
        return list(x.shape), ...
    (share,) = _share
    if x.dim() == 3:
        return [1, int(share.lengths.sum()), x.shape[2]], (slice(None), share.tokens)
    return [len(share.lengths), x.shape[1]], share.examples


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        drawn = factors(x, p, *_rows_of_all(x))
        ctx.save_for_backward(drawn)
        return x * drawn

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout in training. On a CPU torch draws its Bernoulli numbers one by one, at an eighth of a training step;
    here p is rounded to a multiple of 2^-16 (0.1 to 0.100006) and the draws are 16 bits each."""
    return _Drop.apply(x, p) if x.device.type == "cpu" else F.dropout(x, p)


class Dropout(nn.Dropout):
    """`nn.Dropout`, drawn by `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p) if self.training and self.p > 0 else input


def replace_dropout(net: nn.Module) -> None:
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
