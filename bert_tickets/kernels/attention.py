"""Attention within packed examples.

The algorithm is FlashAttention's (Dao et al. 2022; Dao 2023), whose own kernels are made for long sequences: on examples of some
dozen tokens they spend most of their time on starting, on filling buffers and on converting them. Here tiles are small, the sums
for the gradient of the projections' bias come along, and what dropout keeps is drawn beforehand, a bit for each weight: drawing
costs as much as all else that is done with a weight, and would be done three times.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_tickets import kernels
from bert_tickets.kernels.branch import Branch
from bert_tickets.kernels.dropout import ROUNDS, inverse, rounded
from bert_tickets.kernels.layers import add_rows

WORD = tl.constexpr(64)  # bits of a word: keys, and a tile's at most
DRAWN = 1024  # half words of a program that draws them


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, ends: Tensor, longest: int, heads: int, p: float, words: Tensor | None,
                branch: Branch) -> Tensor:  # fmt: skip
        ctx.branch = branch
        tokens, width = len(qkv), qkv.shape[1] // 3
        tile, size = min(WORD.value, max(16, triton.next_power_of_2(longest))), width // heads
        ctx.tiles = triton.cdiv(longest, tile)
        ctx.constants = {"HEADS": heads, "TILES": ctx.tiles, "WIDTH": width, "SIZE": size, "DROPPED": rounded(p)}
        ctx.constants |= {"SCALE": size**-0.5, "TILE": tile, "num_warps": 4}
        ctx.constants |= {"num_stages": 1, "maxnreg": 168}  # three programs at once on a multiprocessor of an H100
        out, logs = qkv.new_empty(tokens, width), torch.empty(heads, tokens, device=qkv.device)
        programs = (len(ends) - 1) * heads * ctx.tiles
        kernels.launch(_attention, programs, qkv, ends, words, out, logs, tokens, len(ends) - 2, **ctx.constants)
        ctx.save_for_backward(qkv, bias, ends, words, out, logs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, ends, words, out, logs = ctx.saved_tensors
        tokens, examples, constants = len(qkv), len(ends) - 2, ctx.constants
        grad, deltas = grad.contiguous(), torch.empty_like(logs)
        heads, size = constants["HEADS"], constants["SIZE"]
        kernels.launch(_deltas, triton.cdiv(tokens, WORD.value) * heads, grad, out, deltas, tokens, HEADS=heads, SIZE=size)
        dqkv, sums = torch.empty_like(qkv), torch.empty(examples * ctx.tiles, qkv.shape[1], device=qkv.device)
        given = (grad, qkv, ends, words, deltas, logs, dqkv, sums, tokens, examples)
        for kernel in (_of_keys, _of_queries)[: ctx.tiles]:
            kernels.launch(kernel, (examples + 1) * heads * ctx.tiles, *given, **constants)
        return dqkv, ctx.branch.run(add_rows, sums, 0, bias)[1], None, None, None, None, None, None


def empty_words(heads: int, tokens: int, longest: int, device: torch.device) -> Tensor:
    """Return memory for a bit of each weight of examples of up to `longest` tokens: [heads * T, W], words of 64 keys (int64)."""
    return torch.empty(heads * tokens, triton.cdiv(longest, WORD.value), dtype=torch.int64, device=device)


def draw(words: Tensor, p: float, seed: Tensor) -> None:
    """Draw which attention weights dropout with probability p keeps, in the bits of `words`.

    They depend on `seed` (int64, one element).
    """
    halves = words.view(torch.int32).view(-1)
    kernels.launch(_draw, triton.cdiv(len(halves), DRAWN), halves, seed, len(halves), KEPT=2**16 - rounded(p), BLOCK=DRAWN)


def attend(
    qkv: Tensor, bias: Tensor, ends: Tensor, longest: int, heads: int, p: float, words: Tensor | None, branch: Branch
) -> Tensor:
    """Compute attention with dropout p within packed examples of up to `longest` tokens: [T, hidden].

    `qkv` [T, 3 * hidden]: queries, keys and values, heads of 16, 32, 64 or 128 side by side. They include their `bias` detached:
    the branch computes its gradient, the sum over tokens. `ends` [B + 2] (int32): 0, each example's end, and T. The rows after
    the last example are 0, as are their gradients. `words` are `empty_words` after `draw`; None if p is 0.
    """
    return _Attention.apply(qkv, bias, ends, longest, heads, p, words, branch)


# ---- kernels ----
# A program computes a tile of an example's head: TILE queries, or keys and values. Those of the last example fill it with 0.
# Scores are in units of log 2, since exp2 is an instruction.

LOG2_E = tl.constexpr(1.4426950408889634)


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


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["seed"])
def _draw(words, seed, count, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """Draw words of bits that are 1 with probability KEPT / 2^16, from that number's last binary digit to its first: after each,
    the probability of a 1 is half of (the digit + what it was)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK,), tl.int32)
    for four in tl.static_range(4):
        drawn = tl.randint4x(tl.load(seed), 4 * at + four, ROUNDS)
        for i in tl.static_range(4):
            word = drawn[i].to(tl.int32, bitcast=True)
            bits = bits | word if (KEPT >> (4 * four + i)) & 1 else bits & word
    tl.store(words + at, bits, at < count)


@triton.jit
def _words(words, row, rows, size, key, TILES: tl.constexpr):
    """The words of a tile of queries for the tile of keys that begins with `key`; all ones without dropout."""
    if words is None:
        found = tl.full(rows.shape, -1, tl.int64)
    else:  # after a return, Triton would compile this for None too
        found = tl.load(words + (row + rows) * TILES + key // WORD, rows < size, 0)
    return found


@triton.jit
def _bits(words, keys):
    return (words >> keys.to(tl.int64)) & 1 != 0


@triton.jit
def _place(ends, tokens, HEADS: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """A program's example, its tile's first token, the example's first token and size, its head's column, and place in `logs`."""
    unit = tl.program_id(0) // TILES
    example, head = unit // HEADS, unit % HEADS
    start = tl.load(ends + example)
    return (
        example,
        tl.program_id(0) % TILES * TILE,
        start,
        tl.load(ends + example + 1) - start,
        head * SIZE,
        head * tokens + start,
    )


@triton.jit(do_not_specialize=["tokens", "examples"])
def _attention(
    qkv, ends, words, out, logs, tokens, examples,
    HEADS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DROPPED: tl.constexpr,
    SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    example, query, start, size, column, log = _place(ends, tokens, HEADS, TILES, SIZE, TILE)
    if example == examples:
        _fill(out, start, query, size, column, WIDTH, SIZE, TILE, TILES)
    elif query < size:
        rows = query + tl.arange(0, TILE)
        queries = _load(qkv, start, rows, size, column, 3 * WIDTH, SIZE)
        total, largest = tl.zeros((TILE,), tl.float32), tl.full((TILE,), float("-inf"), tl.float32)
        result = tl.zeros((TILE, SIZE), tl.float32)
        for key in tl.range(0, size, TILE):
            at = key + tl.arange(0, TILE)
            keys = _load(qkv, start, at, size, WIDTH + column, 3 * WIDTH, SIZE)
            values = _load(qkv, start, at, size, 2 * WIDTH + column, 3 * WIDTH, SIZE)
            scores = tl.where((at < size)[None, :], tl.dot(queries, tl.trans(keys)) * (SCALE * LOG2_E), float("-inf"))
            before, largest = largest, tl.maximum(largest, tl.max(scores, 1))
            weights, shrink = tl.exp2(scores - largest[:, None]), tl.exp2(before - largest)
            total = total * shrink + tl.sum(weights, 1)
            kept = _bits(_words(words, log, rows, size, key, TILES)[:, None], tl.arange(0, TILE)[None, :])
            weights = tl.where(kept, weights, 0.0)
            result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        _store(out, result * (inverse(DROPPED) / total)[:, None], start, rows, size, column, WIDTH, SIZE)
        tl.store(logs + log + rows, largest + tl.log2(total), rows < size)


@triton.jit(do_not_specialize=["tokens"])
def _deltas(grad, out, deltas, tokens, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Result times gradient of each query."""
    head, rows = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS * WORD + tl.arange(0, WORD)
    upstream = _load(grad, 0, rows, tokens, head * SIZE, HEADS * SIZE, SIZE).to(tl.float32)
    result = _load(out, 0, rows, tokens, head * SIZE, HEADS * SIZE, SIZE).to(tl.float32)
    tl.store(deltas + head * tokens + rows, tl.sum(upstream * result, 1), rows < tokens)


@triton.jit
def _queries(grad, qkv, deltas, logs, start, rows, size, column, log, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """A tile of queries, the gradient of its result, and for each row result times gradient and the log of the weights' sum."""
    queries = _load(qkv, start, rows, size, column, 3 * WIDTH, SIZE)
    upstream = _load(grad, start, rows, size, column, WIDTH, SIZE)
    return queries, upstream, tl.load(deltas + log + rows, rows < size, 0.0), tl.load(logs + log + rows, rows < size, 0.0)


@triton.jit
def _gradients(scores, dweights, kept, delta, log, inside, DROPPED: tl.constexpr, SCALE: tl.constexpr):
    """A tile of weights after dropout, not yet divided by the fraction that is kept, and the gradient of its scores / SCALE (Dao
    et al. 2022, algorithm 4)."""
    weights = tl.exp2(tl.where(inside, scores * (SCALE * LOG2_E), float("-inf")) - log)
    return tl.where(kept, weights, 0.0), weights * (tl.where(kept, dweights * inverse(DROPPED), 0.0) - delta)


@triton.jit
def _of_tile(
    keys, values, queries, upstream, delta, log, words, at, size, DROPPED: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr
):
    """`_gradients` of a tile of keys and one of queries, [keys, queries]: so the products with both need no transposition."""
    scores, dweights = tl.dot(keys, tl.trans(queries)), tl.dot(values, tl.trans(upstream))
    kept = _bits(words[None, :], tl.arange(0, TILE)[:, None])
    weights, dscores = _gradients(scores, dweights, kept, delta[None, :], log[None, :], (at < size)[:, None], DROPPED, SCALE)
    return weights.to(values.dtype), dscores.to(values.dtype)


@triton.jit(do_not_specialize=["tokens", "examples"])
def _of_keys(
    grad, qkv, ends, words, deltas, logs, dqkv, sums, tokens, examples,
    HEADS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DROPPED: tl.constexpr,
    SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, and of the queries of an example of one tile."""
    example, first, start, size, column, log = _place(ends, tokens, HEADS, TILES, SIZE, TILE)
    own = sums + (example * TILES + first // TILE) * 3 * WIDTH + column + tl.arange(0, SIZE)
    at = first + tl.arange(0, TILE)
    if example == examples:
        for third in tl.static_range(3):
            _fill(dqkv, start, first, size, third * WIDTH + column, 3 * WIDTH, SIZE, TILE, TILES)
    else:
        keys = _load(qkv, start, at, size, WIDTH + column, 3 * WIDTH, SIZE)
        values = _load(qkv, start, at, size, 2 * WIDTH + column, 3 * WIDTH, SIZE)
        dkeys, dvalues = tl.zeros((TILE, SIZE), tl.float32), tl.zeros((TILE, SIZE), tl.float32)
        if size <= TILE:
            dqueries = tl.zeros((TILE, SIZE), tl.float32)
            if first == 0:
                queries, upstream, delta, total = _queries(grad, qkv, deltas, logs, start, at, size, column, log, WIDTH, SIZE)
                kept = _words(words, log, at, size, 0, TILES)
                weights, dscores = _of_tile(keys, values, queries, upstream, delta, total, kept, at, size, DROPPED, SCALE, TILE)
                dvalues, dkeys = tl.dot(weights, upstream), tl.dot(dscores, queries)
                dqueries = tl.dot(tl.trans(dscores), keys) * SCALE
            _store(dqkv, dqueries, start, at, size, column, 3 * WIDTH, SIZE)
            tl.store(own, tl.sum(dqueries, 0))
        elif first < size:
            for query in tl.range(0, size, TILE):
                rows = query + tl.arange(0, TILE)
                queries, upstream, delta, total = _queries(grad, qkv, deltas, logs, start, rows, size, column, log, WIDTH, SIZE)
                kept = _words(words, log, rows, size, first, TILES)
                weights, dscores = _of_tile(keys, values, queries, upstream, delta, total, kept, at, size, DROPPED, SCALE, TILE)
                dvalues += tl.dot(weights, upstream)
                dkeys += tl.dot(dscores, queries)
        dkeys, dvalues = dkeys * SCALE, dvalues * inverse(DROPPED)
        _store(dqkv, dkeys, start, at, size, WIDTH + column, 3 * WIDTH, SIZE)
        _store(dqkv, dvalues, start, at, size, 2 * WIDTH + column, 3 * WIDTH, SIZE)
        tl.store(own + WIDTH, tl.sum(dkeys, 0))
        tl.store(own + 2 * WIDTH, tl.sum(dvalues, 0))


@triton.jit(do_not_specialize=["tokens", "examples"])
def _of_queries(
    grad, qkv, ends, words, deltas, logs, dqkv, sums, tokens, examples,
    HEADS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DROPPED: tl.constexpr,
    SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, of an example of several tiles."""
    example, first, start, size, column, log = _place(ends, tokens, HEADS, TILES, SIZE, TILE)
    if example < examples and size > TILE:
        rows = first + tl.arange(0, TILE)
        queries, upstream, delta, total = _queries(grad, qkv, deltas, logs, start, rows, size, column, log, WIDTH, SIZE)
        dqueries = tl.zeros((TILE, SIZE), tl.float32)
        for key in tl.range(0, tl.where(first < size, size, 0), TILE):
            at = key + tl.arange(0, TILE)
            keys = _load(qkv, start, at, size, WIDTH + column, 3 * WIDTH, SIZE)
            values = _load(qkv, start, at, size, 2 * WIDTH + column, 3 * WIDTH, SIZE)
            scores, dweights = tl.dot(queries, tl.trans(keys)), tl.dot(upstream, tl.trans(values))
            kept = _bits(_words(words, log, rows, size, key, TILES)[:, None], tl.arange(0, TILE)[None, :])
            given = delta[:, None], total[:, None], (at < size)[None, :]
            dscores = _gradients(scores, dweights, kept, *given, DROPPED, SCALE)[1]
            dqueries += tl.dot(dscores.to(keys.dtype), keys)
        dqueries *= SCALE
        _store(dqkv, dqueries, start, rows, size, column, 3 * WIDTH, SIZE)
        own = sums + (example * TILES + first // TILE) * 3 * WIDTH + column + tl.arange(0, SIZE)
        tl.store(own, tl.sum(dqueries, 0))
