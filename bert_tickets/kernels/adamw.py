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


def norm(grads: Tensor, tables: Tables, half: torch.dtype) -> Tensor:
    """Return the L2 norm of the masked gradients, whose addresses `grads` holds; `half` is the dtype of the halved ones."""
    partial = torch.empty(len(tables.owner), device=grads.device)
    given = (grads, tables.masks, tables.masked, tables.halved, tables.sizes, tables.owner, tables.first, partial)
    kernels.launch(_norm, len(partial), *given, HALF=HALVES[half], BLOCK=BLOCK, num_warps=4)
    return partial.sum().sqrt()


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
