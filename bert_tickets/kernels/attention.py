"""Attention within packed examples of few tokens, as in GLUE.

The algorithm is FlashAttention's (Dao et al. 2022; Dao 2023), whose own kernels are made for long sequences: on examples of some
dozen tokens they spend most of their time on starting, on filling buffers and on converting them. Tiles are small here, and the
sums for the gradient of the projections' bias come along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_tickets import kernels
from bert_tickets.kernels.branch import Branch
from bert_tickets.kernels.dropout import factors, rounded
from bert_tickets.kernels.layers import add_rows


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, ends: Tensor, longest: int, heads: int, p: float, seed: Tensor,
                branch: Branch) -> Tensor:  # fmt: skip
        ctx.branch = branch
        tokens, width = len(qkv), qkv.shape[1] // 3
        tile, size = min(64, max(16, triton.next_power_of_2(longest))), width // heads
        ctx.tiles = triton.cdiv(longest, tile)
        ctx.constants = {"HEADS": heads, "TILES": ctx.tiles, "WIDTH": width, "SIZE": size, "DROPPED": rounded(p)}
        ctx.constants |= {"SCALE": size**-0.5, "TILE": tile, "num_warps": 4}
        out, logs = qkv.new_empty(tokens, width), torch.empty(heads, tokens, device=qkv.device)
        programs = (len(ends) - 1) * heads * ctx.tiles
        kernels.launch(_attention, programs, qkv, ends, seed, out, logs, tokens, len(ends) - 2, **ctx.constants)
        ctx.save_for_backward(qkv, bias, ends, seed, out, logs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, ends, seed, out, logs = ctx.saved_tensors
        examples, heads = len(ends) - 2, ctx.constants["HEADS"]
        dqkv, sums = torch.empty_like(qkv), torch.empty(examples * ctx.tiles, qkv.shape[1], device=qkv.device)
        given = (grad.contiguous(), qkv, ends, seed, out, logs, dqkv, sums, len(qkv), examples)
        kernels.launch(_attention_backward, 2 * (examples + 1) * heads * ctx.tiles, *given, **ctx.constants)
        return dqkv, ctx.branch.run(add_rows, sums, 0, bias)[1], None, None, None, None, None, None


def attend(qkv: Tensor, bias: Tensor, ends: Tensor, longest: int, heads: int, p: float, seed: Tensor, branch: Branch) -> Tensor:
    """Compute attention with dropout p within packed examples of up to `longest` tokens: [T, hidden].

    `qkv` [T, 3 * hidden]: queries, keys and values, heads of 16, 32, 64 or 128 side by side. They include their `bias` detached:
    the branch computes its gradient, the sum over tokens. `ends` [B + 2] (int32): 0, each example's end, and T. The rows after
    the last example are 0, as are their gradients. `seed` (int64, one element) chooses what is dropped.
    """
    return _Attention.apply(qkv, bias, ends, longest, heads, p, seed, branch)


# ---- kernels ----
# A program computes a tile of an example's head: TILE queries, or keys and values. Those of the last example fill it with 0.


@triton.jit
def _load(pointer, start, rows, size, column, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """Rows of an example, of columns from `column` on; 0 after its last row."""
    place = (start + rows)[:, None] * STRIDE + column + tl.arange(0, SIZE)[None, :]
    return tl.load(pointer + place, (rows < size)[:, None], 0.0)


@triton.jit
def _store(pointer, value, start, rows, size, column, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    place = (start + rows)[:, None] * STRIDE + column + tl.arange(0, SIZE)[None, :]
    tl.store(pointer + place, value, (rows < size)[:, None])


@triton.jit
def _fill(pointer, start, first, size, column, STRIDE: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    while first < size:
        rows = first + tl.arange(0, TILE)
        _store(pointer, tl.zeros((TILE, SIZE), tl.float32), start, rows, size, column, STRIDE, SIZE)
        first += TILE * TILES


@triton.jit
def _scores(queries, keys, keys_at, size, SCALE: tl.constexpr):
    return tl.where((keys_at < size)[None, :], tl.dot(queries, tl.trans(keys)) * SCALE, float("-inf"))


@triton.jit
def _kept(seed, unit, query, key, DROPPED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """The factors of dropout of a tile of weights, from its first query and key; `unit` numbers the example's head."""
    tile = (unit * TILES + query // TILE) * TILES + key // TILE
    return tl.reshape(factors(seed, tile * (TILE * TILE // 8), DROPPED, TILE * TILE), (TILE, TILE))


@triton.jit(do_not_specialize=["tokens", "examples"], do_not_specialize_on_alignment=["seed"])
def _attention(
    qkv, ends, seed, out, logs, tokens, examples,
    HEADS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DROPPED: tl.constexpr,
    SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    unit, query = tl.program_id(0) // TILES, tl.program_id(0) % TILES * TILE
    example, head = unit // HEADS, unit % HEADS
    start = tl.load(ends + example)
    size = tl.load(ends + example + 1) - start
    if example == examples:
        _fill(out, start, query, size, head * SIZE, WIDTH, SIZE, TILE, TILES)
    elif query < size:
        rows = query + tl.arange(0, TILE)
        queries = _load(qkv, start, rows, size, head * SIZE, 3 * WIDTH, SIZE)
        total, largest = tl.zeros((TILE,), tl.float32), tl.full((TILE,), float("-inf"), tl.float32)
        result = tl.zeros((TILE, SIZE), tl.float32)
        key = 0
        while key < size:
            at = key + tl.arange(0, TILE)
            keys = _load(qkv, start, at, size, WIDTH + head * SIZE, 3 * WIDTH, SIZE)
            values = _load(qkv, start, at, size, 2 * WIDTH + head * SIZE, 3 * WIDTH, SIZE)
            scores = _scores(queries, keys, at, size, SCALE)
            before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
            weights, shrink = tl.exp(scores - largest[:, None]), tl.exp(before - largest)
            total = total * shrink + tl.sum(weights, 1)
            weights *= _kept(seed, unit, query, key, DROPPED, TILE, TILES)
            result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
            key += TILE
        _store(out, result / total[:, None], start, rows, size, head * SIZE, WIDTH, SIZE)
        tl.store(logs + head * tokens + start + rows, largest + tl.log(total), rows < size)


@triton.jit
def _queries(grad, qkv, out, logs, start, rows, size, column, log, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """A tile of queries, the gradient of its result, and for each row result times gradient and the log of the weights' sum."""
    upstream, result = _load(grad, start, rows, size, column, WIDTH, SIZE), _load(out, start, rows, size, column, WIDTH, SIZE)
    delta = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    return _load(qkv, start, rows, size, column, 3 * WIDTH, SIZE), upstream, delta, tl.load(logs + log + rows, rows < size, 0.0)


@triton.jit
def _gradients(queries, keys, values, upstream, delta, log, kept, at, size, SCALE: tl.constexpr):
    """The weights of a tile after dropout, and the gradient of its scores (Dao et al. 2022, algorithm 4)."""
    weights = tl.exp(_scores(queries, keys, at, size, SCALE) - log[:, None])
    dweights = tl.dot(upstream, tl.trans(values)) * kept
    return (weights * kept).to(values.dtype), (weights * (dweights - delta[:, None]) * SCALE).to(values.dtype)


@triton.jit
def _of_keys(
    grad, qkv, seed, out, logs, dqkv, own, unit, first, start, size, column, log,
    TILES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DROPPED: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, and of the queries if they are no more than a tile."""
    at = first + tl.arange(0, TILE)
    keys = _load(qkv, start, at, size, WIDTH + column, 3 * WIDTH, SIZE)
    values = _load(qkv, start, at, size, 2 * WIDTH + column, 3 * WIDTH, SIZE)
    dkeys, dvalues = tl.zeros((TILE, SIZE), tl.float32), tl.zeros((TILE, SIZE), tl.float32)
    query = tl.where(first < size, 0, size)
    while query < size:
        rows = query + tl.arange(0, TILE)
        queries, upstream, delta, logarithm = _queries(grad, qkv, out, logs, start, rows, size, column, log, WIDTH, SIZE)
        kept = _kept(seed, unit, query, first, DROPPED, TILE, TILES)
        weights, dscores = _gradients(queries, keys, values, upstream, delta, logarithm, kept, at, size, SCALE)
        dvalues += tl.dot(tl.trans(weights), upstream)
        dkeys += tl.dot(tl.trans(dscores), queries)
        if size <= TILE:
            dqueries = tl.dot(dscores, keys)
            _store(dqkv, dqueries, start, rows, size, column, 3 * WIDTH, SIZE)
            tl.store(own, tl.sum(dqueries, 0))
        query += TILE
    _store(dqkv, dkeys, start, at, size, WIDTH + column, 3 * WIDTH, SIZE)
    _store(dqkv, dvalues, start, at, size, 2 * WIDTH + column, 3 * WIDTH, SIZE)
    tl.store(own + WIDTH, tl.sum(dkeys, 0))
    tl.store(own + 2 * WIDTH, tl.sum(dvalues, 0))


@triton.jit
def _of_queries(
    grad, qkv, seed, out, logs, dqkv, own, unit, first, start, size, column, log,
    TILES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DROPPED: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries."""
    rows = first + tl.arange(0, TILE)
    queries, upstream, delta, logarithm = _queries(grad, qkv, out, logs, start, rows, size, column, log, WIDTH, SIZE)
    dqueries = tl.zeros((TILE, SIZE), tl.float32)
    key = tl.where(first < size, 0, size)
    while key < size:
        at = key + tl.arange(0, TILE)
        keys = _load(qkv, start, at, size, WIDTH + column, 3 * WIDTH, SIZE)
        values = _load(qkv, start, at, size, 2 * WIDTH + column, 3 * WIDTH, SIZE)
        kept = _kept(seed, unit, first, key, DROPPED, TILE, TILES)
        _, dscores = _gradients(queries, keys, values, upstream, delta, logarithm, kept, at, size, SCALE)
        dqueries += tl.dot(dscores, keys)
        key += TILE
    _store(dqkv, dqueries, start, rows, size, column, 3 * WIDTH, SIZE)
    tl.store(own, tl.sum(dqueries, 0))


@triton.jit(do_not_specialize=["tokens", "examples"], do_not_specialize_on_alignment=["seed"])
def _attention_backward(
    grad, qkv, ends, seed, out, logs, dqkv, sums, tokens, examples,
    HEADS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DROPPED: tl.constexpr,
    SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    of_keys, number = tl.program_id(0) % 2, tl.program_id(0) // 2
    unit, first = number // TILES, number % TILES * TILE
    example, column = unit // HEADS, unit % HEADS * SIZE
    start = tl.load(ends + example)
    size = tl.load(ends + example + 1) - start
    log = unit % HEADS * tokens + start
    own = sums + (example * TILES + number % TILES) * 3 * WIDTH + column + tl.arange(0, SIZE)
    if example == examples:
        if of_keys:
            _fill(dqkv, start, first, size, WIDTH + column, 3 * WIDTH, SIZE, TILE, TILES)
            _fill(dqkv, start, first, size, 2 * WIDTH + column, 3 * WIDTH, SIZE, TILE, TILES)
        else:
            _fill(dqkv, start, first, size, column, 3 * WIDTH, SIZE, TILE, TILES)
    elif of_keys:
        _of_keys(
            grad, qkv, seed, out, logs, dqkv, own, unit, first, start, size, column, log,
            TILES, WIDTH, SIZE, DROPPED, SCALE, TILE,
        )  # fmt: skip
    elif size > TILE or first > 0:
        _of_queries(
            grad, qkv, seed, out, logs, dqkv, own, unit, first, start, size, column, log,
            TILES, WIDTH, SIZE, DROPPED, SCALE, TILE,
        )  # fmt: skip
