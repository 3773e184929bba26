"""Gates on heads and MLPs, one of each per example, so that one backward pass gives the gradients of each example's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.units import all_units


@dataclass(frozen=True)
class Gates:
    """The gates of B examples. A head's multiplies its context vectors (by linearity the same as its attention probabilities), an
    MLP's its output with the bias, before the residual connection (Prasanna et al. 2020)."""

    heads: list[Tensor]  # of each layer, [B, A]
    mlps: list[Tensor]  # of each layer, [B, 1]

    @classmethod
    def of(cls, units: Mask, net: Any, examples: int) -> Gates:
        """Make gates of one for kept units and zero for pruned ones, as leaves that require gradients.

        Kinds of units that the mask does not cover have gates too, of one.
        """
        like, both = next(net.parameters()), {**all_units(net.config, "heads+mlps"), **units}

        def leaves(kept: Tensor) -> list[Tensor]:
            each = kept.view(len(kept), 1, -1).expand(-1, examples, -1)
            return [gate.to(like.device, like.dtype, copy=True).requires_grad_() for gate in each]

        return cls(leaves(both["heads"]), leaves(both["mlps"]))

    def on_heads(self, layer: int, context: Tensor, rows: Tensor) -> Tensor:
        """Multiply the context vectors [T, hidden] of the examples `rows` [T]."""
        gate = self.heads[layer].index_select(0, rows)
        return (context.unflatten(1, (gate.shape[1], -1)) * gate[..., None]).flatten(1)

    def output(self, layer: int, block: Any, inner: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """Compute a layer's output block with its MLP gated: `inner` [T, intermediate] and the residual `hidden` [T, hidden]."""
        mlp = block.dense(inner) * self.mlps[layer].index_select(0, rows)
        return block.LayerNorm(block.dropout(mlp) + hidden)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Compute once the gradients of a loss that is a sum over the examples: of the heads [B, L, A], of the MLPs [B, L]."""
        loss.backward(inputs=[*self.heads, *self.mlps])
        of_heads, of_mlps = ([gate.grad for gate in gates] for gates in (self.heads, self.mlps))
        return torch.stack(of_heads, 1), torch.cat(of_mlps, 1)  # type: ignore[arg-type]
