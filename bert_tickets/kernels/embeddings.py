"""BERT's embeddings: the sum of three, LayerNorm and dropout, and the sums of gradients of repeated words, positions and types.

Torch sorts the indices for these sums. A batch of short examples has so few that a kernel may compare them all instead, and the
positions of an example are consecutive.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_tickets import kernels
from bert_tickets.kernels.branch import Branch
from bert_tickets.kernels.dropout import factors, rounded
from bert_tickets.kernels.layers import PROGRAMS, add_rows, normalized, of_normalized, row_of

EXAMPLES, COLUMNS = 32, 128  # of a tile of positions' gradients
TOKENS = 64  # of a tile of words' gradients
FEW = 4096  # up to so many tokens are compared


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, words: Tensor, types: Tensor, positions: Tensor, weight: Tensor, shift: Tensor, ids: tuple[Tensor, ...],
                ends: Tensor, longest: int, p: float, eps: float, seed: Tensor, dtype: torch.dtype, padding: int,
                zeros: Tensor | None, wait: Callable[[], None]) -> tuple[Tensor, Tensor]:  # fmt: skip
        tokens, width = len(ids[0]), words.shape[1]
        out, half = words.new_empty(tokens, width), words.new_empty(tokens, width, dtype=dtype)
        mean, scale = (torch.empty(tokens, device=words.device) for _ in range(2))
        ctx.longest, ctx.padding, ctx.wait = longest, padding, wait
        ctx.constants = {"DROPPED": rounded(p), "WIDTH": width, "BLOCK": triton.next_power_of_2(width), "num_warps": 4}
        given = (words, types, positions, *ids, weight, shift, seed, out, half, mean, scale)
        kernels.launch(_embed, tokens, *given, EPS=eps, **ctx.constants)
        ctx.save_for_backward(words, types, positions, *ids, weight, seed, mean, scale, ends, zeros)
        return out, half

    @staticmethod
    def backward(ctx: Any, grad: Tensor, half: Tensor) -> tuple[Tensor | None, ...]:
        *given, ends, zeros = ctx.saved_tensors
        words, types, positions, ids, type_ids, *_ = given
        tokens, width, nothing = len(ids), words.shape[1], types.new_empty(0)
        programs = min(tokens, PROGRAMS)
        dsum, sums = torch.empty_like(grad), torch.empty(programs, 2 * width, device=words.device)
        given = [grad.contiguous(), half.contiguous(), *given, dsum, sums, tokens, programs]
        kernels.launch(_embed_backward, programs, *given, **ctx.constants)
        dweight, dshift = add_rows(sums, 2 * width, nothing)[0]
        columns, constants = triton.cdiv(width, COLUMNS), {"WIDTH": width, "COLUMNS": COLUMNS, "num_warps": 4}
        dpositions, sums = torch.zeros_like(positions), torch.empty(ctx.longest, 2 * width, device=words.device)
        given = [dsum, type_ids, ends, dpositions, sums, len(ends) - 2]
        kernels.launch(_sum_positions, ctx.longest * columns, *given, EXAMPLES=EXAMPLES, **constants)
        dtypes = add_rows(sums, 2 * width, nothing)[0]
        if zeros is None:
            dwords = torch.ops.aten.embedding_dense_backward(dsum, ids, len(words), ctx.padding, False)
        else:
            ctx.wait()
            dwords, constants = zeros, constants | {"PADDING": ctx.padding, "ALL": triton.next_power_of_2(tokens)}
            kernels.launch(_sum_words, tokens * columns, dsum, ids, dwords, tokens, TOKENS=TOKENS, **constants)
        return dwords, dtypes, dpositions, dweight, dshift, *[None] * 10


def embed(
    tables: Any,
    ids: tuple[Tensor, Tensor, Tensor],
    ends: Tensor,
    longest: int,
    seed: Tensor,
    dtype: torch.dtype,
    branch: Branch,
) -> tuple[Tensor, Tensor]:
    """Compute BERT's embeddings of packed examples of up to `longest` tokens, in float32 and in `dtype`; [T, width].

    `tables` is Hugging Face's module, with two token types. `ids` [T] (int64) are of words, types and positions; the positions of
    each example begin with 0. `ends` [B + 2] (int32): 0, each example's end, and T. The rows after the last example have no
    gradient. `seed` (int64, one element) chooses what is dropped.
    """
    words, norm, p = tables.word_embeddings, tables.LayerNorm, tables.dropout.p if tables.dropout.training else 0.0
    zeros, padding = None, -1 if words.padding_idx is None else words.padding_idx
    if torch.is_grad_enabled() and words.weight.requires_grad and len(ids[0]) <= FEW:
        zeros = branch.run(torch.zeros_like, words.weight)  # by the end of the forward pass
    wait = partial(branch.wait, branch.event())
    weights = (words.weight, tables.token_type_embeddings.weight, tables.position_embeddings.weight, norm.weight, norm.bias)
    return _Embed.apply(*weights, ids, ends, longest, p, norm.eps, seed, dtype, padding, zeros, wait)


# ---- kernels ----


@triton.jit
def _sum(words, types, positions, ids, type_ids, position_ids, row, at, WIDTH: tl.constexpr):
    word, kind, position = tl.load(ids + row), tl.load(type_ids + row), tl.load(position_ids + row)
    return row_of(words, word, at, WIDTH) + row_of(types, kind, at, WIDTH) + row_of(positions, position, at, WIDTH)


@triton.jit(do_not_specialize_on_alignment=["seed"])
def _embed(
    words, types, positions, ids, type_ids, position_ids, weight, shift, seed, out, half, mean, scale,
    EPS: tl.constexpr, DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = _sum(words, types, positions, ids, type_ids, position_ids, row, at, WIDTH)
    normal, average, factor = normalized(value, at, EPS, WIDTH)
    result = normal * row_of(weight, 0, at, WIDTH) + row_of(shift, 0, at, WIDTH)
    result *= factors(seed, row * (BLOCK // 8), DROPPED, BLOCK)
    tl.store(out + row * WIDTH + at, result, at < WIDTH)
    tl.store(half + row * WIDTH + at, result, at < WIDTH)
    tl.store(mean + row, average)
    tl.store(scale + row, factor)


@triton.jit(do_not_specialize=["tokens", "programs"], do_not_specialize_on_alignment=["seed"])
def _embed_backward(
    grad, half, words, types, positions, ids, type_ids, position_ids, weight, seed, mean, scale, dsum, sums, tokens, programs,
    DROPPED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    weights = row_of(weight, 0, at, WIDTH)
    dweight, dshift = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    row = tl.program_id(0)
    while row < tokens:
        g = row_of(grad, row, at, WIDTH) + row_of(half, row, at, WIDTH)
        g *= factors(seed, row * (BLOCK // 8), DROPPED, BLOCK)
        value, factor = _sum(words, types, positions, ids, type_ids, position_ids, row, at, WIDTH), tl.load(scale + row)
        normal = tl.where(at < WIDTH, (value - tl.load(mean + row)) * factor, 0.0)
        tl.store(dsum + row * WIDTH + at, of_normalized(g * weights, normal, factor, WIDTH), at < WIDTH)
        dweight += g * normal
        dshift += g
        row += programs
    own = sums + tl.program_id(0) * 2 * WIDTH + at
    tl.store(own, dweight, at < WIDTH)
    tl.store(own + WIDTH, dshift, at < WIDTH)


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


@triton.jit(do_not_specialize=["tokens"])
def _sum_words(
    grad, ids, dwords, tokens,
    PADDING: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of a word's tokens into its row of `dwords`, if this token is the first of them."""
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    token, at = tl.program_id(0) // parts, tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    word, others = tl.load(ids + token), tl.arange(0, ALL)
    same = tl.load(ids + others, others < tokens, -1) == word
    if (tl.sum((same & (others < token)).to(tl.int32)) == 0) & (word != PADDING):
        if tl.sum(same.to(tl.int32)) == 1:
            tl.store(dwords + word * WIDTH + at, row_of(grad, token, at, WIDTH), at < WIDTH)
        else:
            total = tl.zeros((TOKENS, COLUMNS), tl.float32)
            first = token
            while first < tokens:
                other = first + tl.arange(0, TOKENS)
                again = tl.load(ids + other, other < tokens, -1) == word
                place = other[:, None] * WIDTH + at[None, :]
                total += tl.load(grad + place, again[:, None] & (at < WIDTH)[None, :], 0.0)
                first += TOKENS
            tl.store(dwords + word * WIDTH + at, tl.sum(total, 0), at < WIDTH)
