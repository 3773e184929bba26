"""What a layer of BERT computes between its matrix products, forward and backward, each as one kernel.

Values are in half precision where autocast has them so. What is in between is in float32, as are the residual stream and its
gradient. Sums over tokens are taken in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_tickets import kernels
from bert_tickets.kernels.branch import Branch
from bert_tickets.kernels.dropout import factors, rounded

PROGRAMS = 528  # at most, of a kernel that sums over tokens; four for each multiprocessor of an H100
BLOCK = 1024  # columns of a program of GELU
CAST = 4096  # elements of a program that casts
COLUMNS, ROWS = 64, 16  # of a tile of its backward pass


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, p: float, eps: float,
                seed: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens, width = x.shape
        ctx.branch = branch
        out, half = torch.empty_like(residual), torch.empty_like(x)
        mean, scale = (torch.empty(tokens, device=x.device) for _ in range(2))
        ctx.constants = {"DROPPED": rounded(p), "WIDTH": width, "BLOCK": triton.next_power_of_2(width), "num_warps": 4}
        given = (x, bias, residual, weight, shift, seed, out, half, mean, scale)
        kernels.launch(_add_norm, tokens, *given, EPS=eps, **ctx.constants)
        ctx.save_for_backward(x, bias, residual, weight, seed, mean, scale)
        ctx.set_materialize_grads(False)
        return out, half

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, half: Tensor | None) -> tuple[Tensor | None, ...]:
        x, bias, residual, weight, seed, mean, scale = ctx.saved_tensors
        tokens, width = x.shape
        programs = min(tokens, PROGRAMS)
        dx, dresidual = torch.empty_like(x), torch.empty_like(residual)
        sums = torch.empty(programs, 3, width, device=x.device)
        grads = [None if given is None else given.contiguous() for given in (grad, half)]
        given = (*grads, x, bias, residual, weight, seed, mean, scale, dx, dresidual, sums, tokens, programs)
        ahead = 3 if tokens > 8 * PROGRAMS else 1  # loads of later rows, worth their shared memory where there are many
        kernels.launch(_add_norm_backward, programs, *given, STAGES=ahead, **ctx.constants)
        (dweight, dshift), dbias = ctx.branch.run(add_rows, sums.view(programs, -1), 2 * width, bias)
        return dx, dbias, dresidual, dweight, dshift, None, None, None, None


def add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, norm: Sequence[Tensor], p: float, eps: float, seed: Tensor, branch: Branch
) -> tuple[Tensor, Tensor]:
    """Compute LayerNorm(dropout(x + bias, p) + residual), in float32 and in x's dtype; all [T, width].

    `norm` has its weight and bias. `seed` (int64, one element) chooses what is dropped. The branch computes the gradients of
    `bias` and `norm`.
    """
    return _AddNorm.apply(x, bias, residual, *norm, p, eps, seed, branch)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, branch: Branch) -> Tensor:
        out, ctx.branch = torch.empty_like(x), branch
        tokens, width = x.shape
        kernels.launch(_gelu, tokens * triton.cdiv(width, BLOCK), x, bias, out, width, BLOCK=BLOCK, num_warps=4)
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, bias = ctx.saved_tensors
        tokens, width = x.shape
        columns = triton.cdiv(width, COLUMNS)
        chunks = min(triton.cdiv(tokens, ROWS), triton.cdiv(2 * PROGRAMS, columns))
        dx, sums = torch.empty_like(x), torch.empty(chunks, width, device=x.device)
        given = (grad.contiguous(), x, bias, dx, sums, tokens, chunks, width)
        kernels.launch(_gelu_backward, columns * chunks, *given, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
        return dx, ctx.branch.run(add_rows, sums, 0, bias)[1], None


def gelu(x: Tensor, bias: Tensor, branch: Branch) -> Tensor:
    """Compute GELU (by the error function) of x + bias, [T, width]. The branch computes the gradient of `bias`."""
    return _Gelu.apply(x, bias, branch)


def add_rows(partial: Tensor, split: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sum [R, C] over R: the first `split` sums as [2, split / 2], and the rest like `bias`."""
    sums, rest = partial.new_empty(2, split // 2), torch.empty_like(bias)
    count = partial.shape[1]
    given = (partial, sums, rest, len(partial), count, split)
    kernels.launch(_sum_rows, triton.cdiv(count, 16), *given, ROWS=128, COLUMNS=16, num_warps=4)
    return sums, rest


def cast(results: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors into others of their sizes and another dtype, by one kernel; all are contiguous."""
    sizes = tuple(len(tensor.view(-1)) for tensor in tensors)
    programs = sum(triton.cdiv(size, CAST) for size in sizes)
    kernels.launch(_cast, programs, tuple(results), tuple(tensors), sizes, BLOCK=CAST, num_warps=4)


# ---- kernels ----
# Widths that differ between the layers of a slim network are arguments, not constants: one compilation serves all.


@triton.jit
def row_of(pointer, row, at, WIDTH: tl.constexpr):
    return tl.load(pointer + row * WIDTH + at, at < WIDTH, 0.0).to(tl.float32)


@triton.jit
def normalized(value, at, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """A row with mean 0 and variance 1, its mean, and the factor that its variance asks for."""
    average = tl.sum(value) / WIDTH
    centered = tl.where(at < WIDTH, value - average, 0.0)
    factor = tl.rsqrt(tl.sum(centered * centered) / WIDTH + EPS)
    return centered * factor, average, factor


@triton.jit
def of_normalized(grad, normal, factor, WIDTH: tl.constexpr):
    """The gradient of the row that was normalized."""
    return (grad - normal * (tl.sum(normal * grad) / WIDTH) - tl.sum(grad) / WIDTH) * factor


@triton.jit(do_not_specialize_on_alignment=["seed"])
def _add_norm(
    x, bias, residual, weight, shift, seed, out, half, mean, scale,
    EPS: tl.constexpr, DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    dropped = (row_of(x, row, at, WIDTH) + row_of(bias, 0, at, WIDTH)) * factors(seed, row * (BLOCK // 8), DROPPED, BLOCK)
    normal, average, factor = normalized(dropped + row_of(residual, row, at, WIDTH), at, EPS, WIDTH)
    result = normal * row_of(weight, 0, at, WIDTH) + row_of(shift, 0, at, WIDTH)
    tl.store(out + row * WIDTH + at, result, at < WIDTH)
    tl.store(half + row * WIDTH + at, result, at < WIDTH)
    tl.store(mean + row, average)
    tl.store(scale + row, factor)


@triton.jit(do_not_specialize=["tokens", "programs"], do_not_specialize_on_alignment=["seed"])
def _add_norm_backward(
    grad, half, x, bias, residual, weight, seed, mean, scale, dx, dresidual, sums, tokens, programs,
    DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    biases, weights = row_of(bias, 0, at, WIDTH), row_of(weight, 0, at, WIDTH)
    dweight, dshift = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0), tokens, programs, num_stages=STAGES):
        g = tl.zeros((BLOCK,), tl.float32)
        if grad is not None:
            g += row_of(grad, row, at, WIDTH)
        if half is not None:
            g += row_of(half, row, at, WIDTH)
        kept, factor = factors(seed, row * (BLOCK // 8), DROPPED, BLOCK), tl.load(scale + row)
        value = (row_of(x, row, at, WIDTH) + biases) * kept + row_of(residual, row, at, WIDTH)
        normal = tl.where(at < WIDTH, (value - tl.load(mean + row)) * factor, 0.0)
        inner = of_normalized(g * weights, normal, factor, WIDTH)
        tl.store(dresidual + row * WIDTH + at, inner, at < WIDTH)
        tl.store(dx + row * WIDTH + at, inner * kept, at < WIDTH)
        dweight += g * normal
        dshift += g
        dbias += inner * kept
    own = sums + tl.program_id(0) * 3 * WIDTH + at
    tl.store(own, dweight, at < WIDTH)
    tl.store(own + WIDTH, dshift, at < WIDTH)
    tl.store(own + 2 * WIDTH, dbias, at < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def _sum_rows(partial, sums, rest, rows, count, split, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at, first = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), 0
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    while first < rows:
        row = first + tl.arange(0, ROWS)
        total += tl.load(partial + row[:, None] * count + at[None, :], (row < rows)[:, None] & (at < count)[None, :], 0.0)
        first += ROWS
    total = tl.sum(total, 0)
    tl.store(sums + at, total, at < split)
    tl.store(rest + at - split, total, (at >= split) & (at < count))


@triton.jit
def _normal(x):
    """The standard normal distribution function at x, to 1e-7 (Abramowitz and Stegun 7.1.26), and exp(-x^2 / 2)."""
    bell = tl.exp2(x * x * -0.7213475204444817)
    t = 1 / (1 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * bell * 0.5
    return tl.where(x < 0, tail, 1 - tail), bell


@triton.jit
def _gelu(x, bias, out, width, BLOCK: tl.constexpr):
    parts = tl.cdiv(width, BLOCK)
    row, at = tl.program_id(0) // parts, tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    value = row_of(x, row, at, width) + row_of(bias, 0, at, width)
    tl.store(out + row * width + at, value * _normal(value)[0], at < width)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _gelu_backward(
    grad, x, bias, dx, sums, tokens, chunks, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    chunk, at = tl.program_id(0) % chunks, tl.program_id(0) // chunks * COLUMNS + tl.arange(0, COLUMNS)
    biases = row_of(bias, 0, at, width)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = chunk * ROWS
    while first < tokens:
        rows = first + tl.arange(0, ROWS)
        place = rows[:, None] * width + at[None, :]
        inside = (rows[:, None] < tokens) & (at[None, :] < width)
        value = tl.load(x + place, inside, 0.0).to(tl.float32) + biases[None, :]
        normal, bell = _normal(value)
        d = tl.load(grad + place, inside, 0.0).to(tl.float32) * (normal + value * bell * 0.3989422804014327)
        tl.store(dx + place, d, inside)
        total += d
        first += chunks * ROWS
    tl.store(sums + chunk * width + at, tl.sum(total, 0), at < width)


@triton.jit
def _cast(results, tensors, sizes, BLOCK: tl.constexpr):
    program, first = tl.program_id(0), 0
    for i in tl.static_range(len(sizes)):
        if program >= first and program < first + tl.cdiv(sizes[i], BLOCK):
            at = (program - first) * BLOCK + tl.arange(0, BLOCK)
            tl.store(results[i] + at, tl.load(tensors[i] + at, at < sizes[i]), at < sizes[i])
        first += tl.cdiv(sizes[i], BLOCK)
