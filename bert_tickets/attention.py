"""Attention over packed batches, and dropout drawn fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bert_tickets.batches import Batch


class _Drop(torch.autograd.Function):
    """Zero entries with probability round(p * 2^16) / 2^16 and scale the others; four entries a 64-bit random draw."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = round(p * 2**16)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = (bits.view(torch.int16)[: x.numel()] >= dropped - 2**15).view(x.shape)
        ctx.scale = 2**16 / (2**16 - dropped)
        ctx.save_for_backward(keep)
        return x.mul(keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.mul(ctx.saved_tensors[0]).mul_(ctx.scale), None


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


class _Pad(torch.autograd.Function):
    """Tokens [T, H] to their places in a padded [places, H], zeros elsewhere; the backward is the exact inverse."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return tokens.new_zeros(count, tokens.shape[1]).index_copy_(0, places, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The tokens [T, H] out of a padded [places, H]."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: Batch | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention within each example of a packed batch: q, k, v [1, heads, T, d] to [1, T, heads, d].

    Only here are the tokens padded; every matrix product outside sees real tokens alone. Without `batch` it is plain
    attention within each row.
    """
    if batch is None:
        return _attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None
    _, heads, tokens, width = query.shape
    rows, longest = batch.shape

    def padded(x: Tensor) -> Tensor:  # [1, heads, T, d] -> [B, heads, L, d]
        x = x[0].transpose(0, 1).reshape(tokens, heads * width)
        x = _Pad.apply(x, batch.places, rows * longest) if batch.key_mask is not None else x
        return x.view(rows, longest, heads, width).transpose(1, 2)

    out = _attend(padded(query), padded(key), padded(value), batch.key_mask, dropout, scaling)
    out = out.transpose(1, 2).reshape(rows * longest, heads * width)
    out = _Unpad.apply(out, batch.places) if batch.key_mask is not None else out
    return out.view(1, tokens, heads, width), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    """softmax(q k^T) v on [B, heads, L, d]; `mask` is True where a key may be seen."""
    if dropout == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling)
    # torch has no fused kernel with dropout on a CPU; its fallback computes this, with the slower draws.
    scores = torch.matmul(q * (q.shape[-1] ** -0.5 if scaling is None else scaling), k.transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(drop(scores.softmax(-1), dropout), v)


transformers.AttentionInterface.register("packed", packed_attention)
