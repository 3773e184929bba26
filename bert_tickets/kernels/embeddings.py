"""Gradients of position and token-type embeddings. Torch sums each row of a table one token after another, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_tickets import kernels
from bert_tickets.kernels.layers import add_rows

EXAMPLES, COLUMNS = 32, 128  # of a tile


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, words: Tensor, types: Tensor, positions: Tensor, type_ids: Tensor, position_ids: Tensor, ends: Tensor,
                longest: int) -> Tensor:  # fmt: skip
        ctx.save_for_backward(types, positions, type_ids, ends)
        ctx.longest = longest
        return words + types[type_ids] + positions[position_ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        types, positions, type_ids, ends = ctx.saved_tensors
        width, columns = grad.shape[1], triton.cdiv(grad.shape[1], COLUMNS)
        dpositions, sums = torch.zeros_like(positions), torch.empty(ctx.longest, 2 * width, device=grad.device)
        given = (grad.contiguous(), type_ids, ends, dpositions, sums, len(ends) - 2)
        constants = {"WIDTH": width, "EXAMPLES": EXAMPLES, "COLUMNS": COLUMNS, "num_warps": 4}
        kernels.launch(_sum_positions, ctx.longest * columns, *given, **constants)
        return grad, add_rows(sums, 2 * width, types.new_empty(0))[0], dpositions, None, None, None, None


def add(
    words: Tensor, types: Tensor, positions: Tensor, type_ids: Tensor, position_ids: Tensor, ends: Tensor, longest: int
) -> Tensor:
    """Return words + types[type_ids] + positions[position_ids], [T, width], of packed examples of up to `longest` tokens.

    `types` has two rows. `ends` [B + 2] (int32): 0, each example's end, and T. Each example's positions begin with 0. The rows
    after the last example have no gradient.
    """
    return _Add.apply(words, types, positions, type_ids, position_ids, ends, longest)


@triton.jit(do_not_specialize=["count"])
def _sum_positions(
    grad, type_ids, ends, dpositions, sums, count, WIDTH: tl.constexpr, EXAMPLES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum over the examples a position's gradient: into its row of `dpositions`, and by token type into its row of `sums`."""
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    position, at = tl.program_id(0) // parts, tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    total, second = tl.zeros((EXAMPLES, COLUMNS), tl.float32), tl.zeros((EXAMPLES, COLUMNS), tl.float32)
    first = 0
    while first < count:
        example = first + tl.arange(0, EXAMPLES)
        row = tl.load(ends + example, example < count, 0) + position
        inside = row < tl.load(ends + example + 1, example < count, 0)
        value = tl.load(grad + row[:, None] * WIDTH + at[None, :], inside[:, None] & (at < WIDTH)[None, :], 0.0)
        total += value
        second += value * tl.load(type_ids + row, inside, 0)[:, None].to(tl.float32)
        first += EXAMPLES
    whole, of_second = tl.sum(total, 0), tl.sum(second, 0)
    tl.store(dpositions + position * WIDTH + at, whole, at < WIDTH)
    tl.store(sums + position * 2 * WIDTH + at, whole - of_second, at < WIDTH)
    tl.store(sums + position * 2 * WIDTH + WIDTH + at, of_second, at < WIDTH)
