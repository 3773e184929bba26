"""Attention within each example of a packed batch. Examples are padded only here; all other operations are on packed tokens.

A layout has `attend(q, k, v, p)`, attention with dropout p: q, k, v [T, hidden], heads side by side, to [T, hidden]. `Fused` is
for the package's kernels, and takes one tensor [T, 3 * hidden].

On a GPU, in half precision, it is attention on the packed tokens themselves: `Fused` by the package's kernel, `Ragged` by
FlashAttention (Dao 2023). Otherwise `Padded`: all examples are padded to the longest, for torch's fused kernels. `Blocks`: a CPU
has no fused kernel with dropout, and padding costs as much as tokens there; so examples of similar length are padded together, by
head, with a backward pass written out here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets.kernels.branch import Branch
from bert_tickets.modeling import dropout
from bert_tickets.modeling.packing import Batch, at_least_fp32, max_padding

SIMILAR = 0.75  # on a CPU, examples are padded together if the shortest has this fraction of the longest's tokens


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, none: Tensor | None) -> Tensor:
        ctx.inverse, ctx.none = inverse, none
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if not len(grad):
            return grad.new_zeros(len(ctx.inverse), *grad.shape[1:]), None, None, None
        grad = grad.index_select(0, ctx.inverse)
        return (grad if ctx.none is None else grad.masked_fill_(ctx.none, 0)), None, None, None


def gather(x: Tensor, index: Tensor, inverse: Tensor, none: Tensor | None) -> Tensor:
    """Return the rows `x[index]`. The backward pass is a gather too, instead of a sum over indices.

    `inverse` is the index of each row of x in the result. `none` ([rows of x, 1]) is True for rows without a gradient: those
    that are not in the result, and padding.
    """
    return _Gather.apply(x, index, inverse, none)


# ---- on a GPU ----


@dataclass(frozen=True)
class Fused:
    """Concatenated examples, without padding, for the package's kernels."""

    ends: Tensor  # [b + 2], int32: 0, each example's end, and T: the batch's padding
    longest: int  # an upper bound of the tokens of an example
    heads: int

    def draw(self, tokens: int, p: float, seed: Tensor, branch: Branch) -> Tensor | None:
        """Let the branch draw which weights dropout keeps, for `attend` on T tokens; None without dropout."""
        from bert_tickets.kernels.attention import draw, empty_words
        from bert_tickets.kernels.dropout import rounded

        if rounded(p) == 0:
            return None
        words = empty_words(self.heads, tokens, self.longest, seed.device)
        branch.run(draw, words, p, seed)
        return words

    def attend(self, qkv: Tensor, bias: Tensor, p: float, words: Tensor | None, branch: Branch) -> Tensor:
        """Attend within [T, 3 * hidden], which includes `bias` detached: the branch computes its gradient."""
        from bert_tickets.kernels.attention import attend

        return attend(qkv, bias, self.ends, self.longest, self.heads, p, words, branch)


@dataclass(frozen=True)
class Ragged:
    """Concatenated examples, without padding."""

    ends: Tensor  # as in `Fused`; the batch's padding is one more example
    longest: int  # an upper bound of the tokens of an example
    heads: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        q, k, v = (x.unflatten(1, (self.heads, -1)) for x in (q, k, v))
        # torch.nn.attention.varlen has no dropout; nested tensors call this kernel too, but through slow dispatch in Python
        kernel = torch.ops.aten._flash_attention_forward
        out, *_ = kernel(q, k, v, self.ends, self.ends, self.longest, self.longest, p, False, False)
        return out.flatten(1)


def _ends(batch: Batch) -> Tensor:
    ends = F.pad(batch.lens.cumsum(0), (1, 1))
    ends[-1].fill_(batch.input_ids.shape[1])
    return ends.int()


@functools.cache
def _has_flash(device: torch.device, head_size: int) -> bool:
    """Return whether the device has FlashAttention for heads of this size, in half precision."""
    built = torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return built and head_size % 8 == 0 and head_size <= 256


@dataclass(frozen=True)
class Padded:
    """b examples padded to L tokens: a grid of b * L places."""

    shape: tuple[int, int]  # b, L
    heads: int
    there: Tensor  # [b * L], the token at each place; padding repeats a token of the same example
    back: Tensor  # [T], the place of each token
    padding: Tensor  # [b * L, 1], True at padding
    bias: Tensor | None  # [b, 1, 1, L], added to the scores: 0 at tokens, -inf at padding; None if there is no padding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        ragged = self.bias is not None
        if ragged:
            q, k, v = (gather(x, self.there, self.back, None) for x in (q, k, v))
        q, k, v = (x.view(*self.shape, self.heads, -1).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.bias, dropout_p=p)
        out = out.transpose(1, 2).reshape(len(self.there), -1)
        return gather(out, self.back, self.there, self.padding) if ragged else out


def _padded(batch: Batch, heads: int, dtype: torch.dtype) -> Padded:
    b, longest, device = len(batch.lengths), batch.longest, batch.starts.device
    width = -(-longest // 8) * 8  # torch's kernel copies a bias with unaligned rows in every layer
    place, lens = torch.arange(width, device=device), batch.lens[:, None]
    padding = place >= lens  # [b, width]
    bias = torch.zeros(b, width, dtype=dtype, device=device).masked_fill_(padding, float("-inf"))[:, None, None, :longest]
    there = batch.starts[:, None] + torch.minimum(place[:longest], lens - 1)
    back = batch.rows * longest + batch.position_ids[0]
    full = not batch.padding and len(back) == b * longest  # from shapes alone: a captured graph serves batches of other lengths
    return Padded((b, longest), heads, there.flatten(), back, padding[:, :longest].reshape(-1, 1), None if full else bias)


# ---- on a CPU ----


@dataclass(frozen=True)
class Block:
    """b examples padded to L tokens: b * heads * L rows of a grid, from `start` on."""

    start: int
    shape: tuple[int, int, int]  # b, heads, L
    shortest: int  # a lower bound of the tokens of an example
    real: Tensor  # [b, 1, 1, L], True at tokens

    def of(self, grid: Tensor) -> Tensor:
        """Return the block's rows of a grid [G, d], as a view [b, heads, L, d]."""
        b, heads, longest = self.shape
        return grid[self.start : self.start + b * heads * longest].view(b, heads, longest, grid.shape[-1])


@dataclass(frozen=True)
class Blocks:
    """A grid of G places, one per head and token, padded block by block. One gather fills it, one reads it."""

    blocks: list[Block]
    heads: int
    there: Tensor  # [G], which of the T * heads rows is at a place; padding repeats a token of the same example
    back: Tensor  # [T * heads], the place of each row
    padding: Tensor  # [G, 1], True at padding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        q, k, v = (x.reshape(len(self.back), -1) for x in (q, k, v))
        if p > 0:
            out = _Attention.apply(q, k, v, self, p, q.shape[1] ** -0.5)
        else:
            q, k, v = (gather(x, self.there, self.back, None) for x in (q, k, v))
            parts = []
            for block in self.blocks:
                mask = block.real if block.shortest < block.shape[2] else None
                part = F.scaled_dot_product_attention(block.of(q), block.of(k), block.of(v), mask)
                parts.append(part.reshape(-1, q.shape[1]))
            out = gather(torch.cat(parts), self.back, self.there, self.padding)
        return out.view(len(self.back) // self.heads, -1)


def _blocks(batch: Batch, heads: int) -> Blocks:
    """Put examples of similar length into one block; a bucketed batch is one block."""
    grouped = not batch.padding
    groups: list[Any] = by_similar_length(batch.lengths) if grouped else [slice(None)]
    base, width, head = torch.empty_like(batch.starts), torch.empty_like(batch.starts), torch.arange(heads)
    blocks, there, padding, start = [], [], [], 0
    for rows in groups:
        lengths, first, lens = batch.lengths[rows], batch.starts[rows], batch.lens[rows, None]
        longest = int(lengths.max()) if grouped else batch.longest
        position = torch.arange(longest)
        real = (position < lens)[:, None]  # [b, 1, L]
        token = first[:, None] + torch.minimum(position, lens - 1)
        there.append((token[:, None] * heads + head[:, None]).flatten())
        padding.append((~real).expand(-1, heads, -1).flatten())
        shortest = int(lengths.min())
        if not grouped and shortest < longest:
            shortest = 0  # a captured graph serves batches of other lengths
        blocks.append(Block(start, (len(lengths), heads, longest), shortest, real[:, :, None]))
        base[rows] = start + torch.arange(len(lengths)) * heads * longest
        width[rows] = longest
        start += len(lengths) * heads * longest
    back = base[batch.rows][:, None] + head * width[batch.rows][:, None] + batch.position_ids[0][:, None]
    return Blocks(blocks, heads, torch.cat(there), back.flatten(), torch.cat(padding)[:, None])


def by_similar_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Group the examples, longest first, by similar length. Returns the indices of each group."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    for at in range(1, len(order) + 1):
        if at == len(order) or lengths[order[at]] < SIMILAR * lengths[order[start]]:
            groups.append(order[start:at])
            start = at
    return groups


class _Attention(torch.autograd.Function):
    """Attention with dropout on a CPU: q, k, v [T * heads, d] to [T * heads, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, grid: Blocks, p: float, scale: float) -> Tensor:
        ctx.grid, ctx.scale = grid, scale
        q, k, v = (x.index_select(0, grid.there) for x in (q, k, v))
        q.mul_(scale)
        out, saved = torch.empty_like(q), []
        with torch.autocast("cpu", enabled=False):
            for block in grid.blocks:
                scores = (block.of(q) @ block.of(k).mT).to(at_least_fp32(q))  # softmax in half precision is inaccurate
                if block.shortest < block.shape[2]:
                    scores[..., block.shortest :].masked_fill_(~block.real[..., block.shortest :], float("-inf"))
                weights = torch.softmax(scores, -1, out=scores)
                dropped = weights * dropout.factors(weights, p)
                torch.matmul(dropped.to(v.dtype), block.of(v), out=block.of(out))
                saved += [weights, dropped]
        ctx.save_for_backward(q, k, v, out, *saved)
        return out.index_select(0, grid.back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        grid = ctx.grid
        grad = grad.index_select(0, grid.there).masked_fill_(grid.padding, 0)
        into = [torch.empty_like(q) for _ in range(3)]
        # the gradient of softmax needs sum(weights * d(weights)) of each row, which equals sum(out * grad)
        totals = (out.to(at_least_fp32(q)) * grad).sum(-1, keepdim=True)
        for block, weights, dropped in zip(grid.blocks, saved[::2], saved[1::2], strict=True):
            dq, dk, dv = map(block.of, into)
            g = block.of(grad)
            torch.matmul(dropped.to(g.dtype).mT, g, out=dv)
            scores = (g @ block.of(v).mT).to(weights.dtype).mul_(dropped).addcmul_(weights, block.of(totals), value=-1)
            scores = scores.to(g.dtype)
            torch.matmul(scores, block.of(k), out=dq)
            torch.matmul(scores.mT, block.of(q), out=dk)
        into[0].mul_(ctx.scale)
        return *(x.index_select(0, grid.back) for x in into), None, None, None


# ---- on any device ----

Grid = Fused | Ragged | Padded | Blocks


def layout(batch: Batch, heads: int, head_size: int, dtype: torch.dtype, fused: bool = False) -> Grid:
    """Choose the layout of a packed batch for attention in `dtype`, `Fused` only if `fused`. Never waits for the device."""
    device = batch.starts.device
    if device.type == "cpu":
        return _blocks(batch, heads)
    if dtype in (torch.float16, torch.bfloat16):  # constants from shapes alone, as a captured graph keeps them
        if fused and head_size in (16, 32, 64, 128):
            return Fused(_ends(batch), batch.longest, heads)
        if _has_flash(device, head_size):
            return Ragged(_ends(batch), max(batch.longest, max_padding(batch.input_ids.shape[1])), heads)
    return _padded(batch, heads, dtype)


def layouts(batch: Batch, heads: Iterable[int], head_size: int, dtype: torch.dtype, fused: bool = False) -> dict[int, Grid]:
    """Choose the layout for each number of heads that occurs in `heads`, the layers' numbers; none for 0 heads."""
    counts = sorted({*heads} - {0})
    grids = {count: layout(batch, count, head_size, dtype, fused) for count in counts[:1]}
    for count in counts[1:]:
        first = grids[counts[0]]
        grids[count] = _blocks(batch, count) if isinstance(first, Blocks) else replace(first, heads=count)
    return grids
