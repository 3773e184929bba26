"""AdamW of a masked network in two passes over memory: the norm of the masked gradients, then the update.

Torch takes more: the products of gradients and masks, the norm, and a fused AdamW at half of the memory's bandwidth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_tickets import kernels

BLOCK = 1024  # elements of a tensor for one program
ARGUMENTS = 64  # tensors of one launch
HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tables(NamedTuple):
    """n parameters, as tables on their device; `blocks` programs, each for `BLOCK` elements of one parameter."""

    masks: Tensor  # [n], addresses, as are the next four; of uint8
    parameters: Tensor  # of float32, as are the next three
    means: Tensor  # exponential averages of the gradients
    variances: Tensor  # and of their squares
    steps: Tensor  # the number of steps, this one included
    masked: Tensor  # [n], int32: whether there is a mask
    halved: Tensor  # [n], int32: whether the gradient is in half precision
    decays: Tensor  # [n], float32
    sizes: Tensor  # [n], int64, elements
    owner: Tensor  # [blocks], int32, the parameter of each program
    first: Tensor  # [blocks], int64, its first element


def addresses(tensors: list[Tensor]) -> Tensor:
    """Return the tensors' addresses, on their device. A kernel takes them as arguments, which a CUDA graph keeps."""
    table = torch.empty(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for start in range(0, len(tensors), ARGUMENTS):
        kernels.launch(_collect, 1, table[start:], tuple(tensors[start : start + ARGUMENTS]))
    return table


def clip(grads: Tensor, tables: Tables, half: torch.dtype, max_norm: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the divisor that unscales the masked gradients and clips their L2 norm, and 1.0 if that overflowed, else 0.0.

    `grads` holds their addresses; `half` is the dtype of the halved ones. They were multiplied by `scale`; without it nothing
    counts as overflow. If the norm did not overflow, the parameters' numbers of steps increase.
    """
    device = grads.device
    partial, found = torch.empty(len(tables.owner), device=device), torch.empty(2, device=device)
    given = (grads, tables.masks, tables.masked, tables.halved, tables.sizes, tables.owner, tables.first, partial)
    kernels.launch(_norm, len(partial), *given, HALF=HALVES[half], BLOCK=BLOCK, num_warps=4)
    counts = len(partial), len(tables.steps)
    kernels.launch(
        _clip, 1, partial, scale, found, tables.steps, *counts, MAX_NORM=max_norm, BLOCK=8 * BLOCK, STEPS=256, num_warps=32
    )
    divisor, overflowed = found
    return divisor, overflowed


def update(
    grads: Tensor,
    tables: Tables,
    half: torch.dtype,
    lr: Tensor,
    divisor: Tensor,
    skip: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update parameters and averages with the gradients / `divisor` * masks, unless `skip` is not 0."""
    constants = {"BETA1": betas[0], "BETA2": betas[1], "LOG_BETA1": math.log2(betas[0]), "LOG_BETA2": math.log2(betas[1])}
    given = (grads, *tables, lr, divisor, skip)
    kernels.launch(_update, len(tables.owner), *given, **constants, EPS=eps, HALF=HALVES[half], BLOCK=BLOCK, num_warps=8)


# ---- kernels ----


@triton.jit
def _collect(table, tensors):
    for i in tl.static_range(len(tensors)):
        tl.store(table + i, tensors[i].to(tl.int64))


@triton.jit
def _pointer(addresses, i, element: tl.constexpr):
    return tl.multiple_of(tl.load(addresses + i).to(tl.pointer_type(element)), 16)  # torch aligns tensors


@triton.jit
def _masked_gradient(grads, masks, masked, halved, i, at, inside, HALF: tl.constexpr):
    if tl.load(halved + i) != 0:
        grad = tl.load(_pointer(grads, i, HALF) + at, inside).to(tl.float32)
    else:
        grad = tl.load(_pointer(grads, i, tl.float32) + at, inside)
    if tl.load(masked + i) != 0:
        grad *= tl.load(_pointer(masks, i, tl.uint8) + at, inside).to(tl.float32)
    return grad


@triton.jit
def _norm(grads, masks, masked, halved, sizes, owner, first, partial, HALF: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = tl.load(owner + program)
    start, size = tl.multiple_of(tl.load(first + program), BLOCK), tl.load(sizes + i)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # without a condition an access takes 16 bytes
        grad = _masked_gradient(grads, masks, masked, halved, i, at, None, HALF)
        tl.store(partial + program, tl.sum(grad * grad))
    else:
        grad = tl.where(at < size, _masked_gradient(grads, masks, masked, halved, i, at, at < size, HALF), 0.0)
        tl.store(partial + program, tl.sum(grad * grad))


@triton.jit(do_not_specialize=["squares", "count"])
def _clip(partial, scale, found, steps, squares, count, MAX_NORM: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total, first = tl.zeros((BLOCK,), tl.float32), 0
    while first < squares:
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial + i, i < squares, 0.0)
        first += BLOCK
    norm = tl.sqrt(tl.sum(total))
    factor, overflowed = 1.0, 0.0
    if scale is not None:
        factor, overflowed = tl.load(scale), tl.where(tl.abs(norm) < float("inf"), 0.0, 1.0)  # 1 for NaN too
    over = (norm / factor + 1e-6) / MAX_NORM
    tl.store(found, factor * tl.where(over < 1, 1.0, over))
    tl.store(found + 1, overflowed)
    first = 0
    while first < count:
        i = first + tl.arange(0, STEPS)
        step = tl.load(steps + i, i < count, 0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, i < count, 0.0) + 1 - overflowed, i < count)
        first += STEPS


@triton.jit
def _change(grad, parameters, means, variances, i, at, inside, shrink, rate, root, BETA1, BETA2, EPS):
    param, mean, variance = (
        _pointer(parameters, i, tl.float32),
        _pointer(means, i, tl.float32),
        _pointer(variances, i, tl.float32),
    )
    m = BETA1 * tl.load(mean + at, inside) + (1 - BETA1) * grad
    v = BETA2 * tl.load(variance + at, inside) + (1 - BETA2) * grad * grad
    p = tl.load(param + at, inside) * shrink - rate * m / (tl.sqrt(v) / root + EPS)
    tl.store(mean + at, m, inside)
    tl.store(variance + at, v, inside)
    tl.store(param + at, p, inside)


@triton.jit
def _update(
    grads, masks, parameters, means, variances, steps, masked, halved, decays, sizes, owner, first, lr, divisor, skip,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if tl.load(skip) == 0:
        i = tl.load(owner + program)
        start, size = tl.multiple_of(tl.load(first + program), BLOCK), tl.load(sizes + i)
        at = start + tl.arange(0, BLOCK)
        step = tl.load(_pointer(steps, i, tl.float32)).to(tl.float64)  # in float32, 1 - beta^t loses four digits at first
        rate = tl.load(lr) / (1 - tl.exp2(step * LOG_BETA1)).to(tl.float32)
        root = tl.sqrt((1 - tl.exp2(step * LOG_BETA2)).to(tl.float32))
        shrink, by = 1 - tl.load(lr) * tl.load(decays + i), tl.load(divisor)
        if start + BLOCK <= size:
            grad = _masked_gradient(grads, masks, masked, halved, i, at, None, HALF) / by
            _change(grad, parameters, means, variances, i, at, None, shrink, rate, root, BETA1, BETA2, EPS)
        else:
            grad = _masked_gradient(grads, masks, masked, halved, i, at, at < size, HALF) / by
            _change(grad, parameters, means, variances, i, at, at < size, shrink, rate, root, BETA1, BETA2, EPS)
