"""Attention over packed batches, and dropout drawn fast on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask

from bert_tickets.batches import Batch, Share

# ---- dropout ----


def _factors(like: Tensor, p: float, shape: Sequence[int], part: Any = ...) -> Tensor:
    """What dropout multiplies by: 0 with probability round(p * 2^16) / 2^16, else what keeps the mean. 16 bits a draw.

    Drawn for `shape`, of which `part` is returned, in the dtype of `like`.
    """
    dropped, count = round(p * 2**16), math.prod(shape)
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = bits.view(torch.int16)[:count].view(*shape)[part]
    factors = like.new_empty(draws.shape)
    torch.ge(draws, dropped - 2**15, out=factors)
    return factors.mul_(2**16 / (2**16 - dropped))


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
        factors = _factors(x, p, *_rows_of_all(x))
        ctx.save_for_backward(factors)
        return x * factors

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


# ---- where the tokens of a packed batch stand in attention ----

ALIKE = 0.75  # on a CPU, examples whose lengths differ by no more than this share are padded together


@dataclass(frozen=True)
class Block:
    """b examples padded to L tokens: b * heads * L rows of the grid, from `start` on."""

    start: int
    shape: tuple[int, int, int]  # b, heads, L
    shortest: int  # no example has fewer tokens
    real: Tensor  # [b, 1, 1, L], True at tokens
    whole: int  # examples of this block in the whole batch, where several processes divide it
    part: np.ndarray | None  # and which of them are these

    def of(self, grid: Tensor) -> Tensor:
        """This block of a grid [G, d], as a view [b, heads, L, d]."""
        b, heads, longest = self.shape
        return grid[self.start : self.start + b * heads * longest].view(b, heads, longest, grid.shape[-1])


@dataclass(frozen=True)
class Layout:
    """Attention's grid of G places: each head of each token, padded block by block. One gather leads there, one back."""

    blocks: list[Block]
    there: Tensor  # [G], which of the T * heads rows a place shows; padding shows a token of its own example
    back: Tensor  # [T * heads], each row's place
    padding: Tensor  # [G, 1], True at padding
    calls: list[None] = field(default_factory=list)  # of attention by this grid


def layout(batch: Batch, heads: int) -> Layout:
    """The grid of a packed batch. Never waits for the device.

    On a CPU, where a padded place costs what a token costs, examples of like length share a block; elsewhere there is
    one block, as more launches cost more. A share of a batch has the blocks of the whole, each with its own examples.
    """
    device, share = batch.starts.device, batch.share
    grouped = device.type == "cpu" and not batch.spare
    lengths_of_all = batch.lengths if share is None or not grouped else share.lengths
    groups: list[Any] = alike(lengths_of_all) if grouped else [slice(None)]
    base, width, head = torch.empty_like(batch.starts), torch.empty_like(batch.starts), torch.arange(heads, device=device)
    blocks, there, padding, start = [], [], [], 0
    for rows in groups:
        longest = int(lengths_of_all[rows].max()) if grouped else batch.longest
        whole, part = len(lengths_of_all[rows]), None
        if share is not None and grouped:
            part = np.flatnonzero((rows >= share.first) & (rows < share.last))
            rows = rows[part] - share.first
        lengths, first, lens = batch.lengths[rows], batch.starts[rows], batch.lens[rows, None]
        position = torch.arange(longest, device=device)
        real = (position < lens)[:, None]  # [b, 1, L]
        token = first[:, None] + torch.minimum(position, lens - 1)
        there.append((token[:, None] * heads + head[:, None]).flatten())
        padding.append((~real).expand(-1, heads, -1).flatten())
        shortest = int(lengths.min(initial=longest))
        if not grouped and shortest < longest:
            shortest = 0  # a captured step serves batches of other lengths
        blocks.append(Block(start, (len(lengths), heads, longest), shortest, real[:, :, None], whole, part))
        base[rows] = start + torch.arange(len(lengths), device=device) * heads * longest
        width[rows] = longest
        start += len(lengths) * heads * longest
    back = base[batch.rows][:, None] + head * width[batch.rows][:, None] + batch.position_ids[0][:, None]
    return Layout(blocks, torch.cat(there), back.flatten(), torch.cat(padding)[:, None])


def alike(lengths: np.ndarray) -> list[np.ndarray]:
    """The examples, longest first, cut into groups of like length."""
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    for at in range(1, len(order) + 1):
        if at == len(order) or lengths[order[at]] < ALIKE * lengths[order[start]]:
            groups.append(order[start:at])
            start = at
    return groups


# ---- attention ----


class _Gather(torch.autograd.Function):
    """Rows to the grid, or back: `x[index]`. The backward is a gather too, as the two indices are each other's inverse;
    padding, which shows a row a second time, never carries a gradient, nor takes one (`none` is True there)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, none: Tensor | None) -> Tensor:
        ctx.inverse, ctx.none = inverse, none
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.index_select(0, ctx.inverse)
        return (grad if ctx.none is None else grad.masked_fill_(ctx.none, 0)), None, None, None


class _Attention(torch.autograd.Function):
    """Attention with dropout on a CPU, where torch has no fused kernel for it: q, k, v [T * heads, d] to the same."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, grid: Layout, p: float, scale: float) -> Tensor:
        ctx.grid, ctx.scale = grid, scale
        q, k, v = (x.index_select(0, grid.there) for x in (q, k, v))
        q.mul_(scale)
        out, saved = torch.empty_like(q), []
        with torch.autocast("cpu", enabled=False):
            for block in grid.blocks:
                scores = (block.of(q) @ block.of(k).mT).to(_wide(q))
                if block.shortest < block.shape[2]:
                    scores[..., block.shortest :].masked_fill_(~block.real[..., block.shortest :], float("-inf"))
                weights = torch.softmax(scores, -1, out=scores)
                dropped = weights * _factors(
                    weights, p, (block.whole, *weights.shape[1:]), ... if block.part is None else block.part
                )
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
        # d(softmax) wants sum(weights * d(weights)) of each row, which is sum(out * grad)
        totals = (out.to(_wide(q)) * grad).sum(-1, keepdim=True)
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


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)  # softmax in half precision loses what it sums


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    grid: Layout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention within each example of a packed batch: q, k, v [1, heads, T, d] to [1, T, heads, d].

    Only here are the tokens padded; every matrix product outside sees real tokens alone. Without `grid` it is plain
    attention within each row.
    """
    if grid is None:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2), None
    grid.calls.append(None)
    _, heads, tokens, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1).reshape(tokens * heads, width) for x in (query, key, value))
    if dropout > 0 and q.device.type == "cpu":
        out = _Attention.apply(q, k, v, grid, dropout, scale)
    else:
        q, k, v = (_Gather.apply(x, grid.there, grid.back, None) for x in (q, k, v))
        parts = []
        for block in grid.blocks:
            mask = block.real if block.shortest < block.shape[2] else None
            part = F.scaled_dot_product_attention(block.of(q), block.of(k), block.of(v), mask, dropout_p=dropout, scale=scale)
            parts.append(part.reshape(-1, width))
        out = torch.cat(parts)
        out = _Gather.apply(out, grid.back, grid.there, grid.padding)
    return out.view(1, tokens, heads, width), None


transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", sdpa_mask)  # for a padded batch, as anyone may give the network
