"""Cross-entropy over a vocabulary, on logits in half precision.

Torch casts them to float32, writes all logarithms of probabilities, and casts the gradient back: nine passes instead of three.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_tickets import kernels

BLOCK = 4096  # logits of a row at a time


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows, classes = logits.shape
        losses, logs = (torch.empty(rows, device=logits.device) for _ in range(2))
        kernels.launch(_loss, rows, logits, labels, losses, logs, CLASSES=classes, BLOCK=BLOCK, num_warps=8)
        ctx.save_for_backward(logits, labels, logs)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, logs = ctx.saved_tensors
        (rows, classes), dlogits = logits.shape, torch.empty_like(logits)
        programs = rows * triton.cdiv(classes, BLOCK)
        given = (grad, logits, labels, logs, dlogits)
        kernels.launch(_loss_backward, programs, *given, CLASSES=classes, BLOCK=BLOCK, num_warps=8)
        return dlogits, None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy of logits [M, classes] in float32, a scalar. Rows whose label ([M], int64) is negative do not count.

    A logit of -inf is a class of probability 0.
    """
    return _CrossEntropy.apply(logits.contiguous(), labels)


@triton.jit
def _loss(logits, labels, losses, logs, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """A row's cross-entropy, and the logarithm of the sum of its exponentials."""
    row = tl.program_id(0).to(tl.int64)
    largest, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, CLASSES, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(logits + row * CLASSES + at, at < CLASSES, float("-inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, value)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - shift) + tl.exp(value - shift)
    peak = tl.max(largest)
    log = peak + tl.log(tl.sum(total * tl.exp(largest - peak)))
    tl.store(logs + row, log)
    label = tl.load(labels + row)
    chosen = tl.load(logits + row * CLASSES + label, label >= 0, 0.0).to(tl.float32)
    tl.store(losses + row, tl.where(label >= 0, log - chosen, 0.0))


@triton.jit
def _loss_backward(grad, logits, labels, logs, dlogits, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    parts: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    row, at = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    label, upstream = tl.load(labels + row), tl.load(grad)
    value = tl.load(logits + row * CLASSES + at, at < CLASSES, float("-inf")).to(tl.float32)
    d = (tl.exp(value - tl.load(logs + row)) - tl.where(at == label, 1.0, 0.0)) * upstream
    tl.store(dlogits + row * CLASSES + at, tl.where(label >= 0, d, 0.0), at < CLASSES)
