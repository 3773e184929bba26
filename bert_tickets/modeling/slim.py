"""Slim execution: heads and neurons that a mask prunes whole are removed from the network, instead of masked.

Without dropout the narrower network trains and evaluates as the masked one, to rounding. It takes less time and arithmetic.
`slimmed` removes them within a context, for our packed forward pass; `remove_units` for good, for the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.parameters import ENCODER
from bert_tickets.modeling.units import HEAD_OUTPUT, INNER, LAYER, OUTER, QKV, all_units

MULTIPLE = 8  # of the neurons that a layer is left with: matrix products of other widths in half precision are slow on a GPU


def kept_units(net: Net, mask: Mask) -> Mask:
    """Return the heads [L, A] and the neurons [L, I] that the mask does not prune whole, on the CPU.

    It prunes one whole if it prunes all its columns of the consuming matrix: then nothing of it reaches the layer's output.
    """
    found = all_units(net.config, "heads+neurons")
    for kind, matrix in (("heads", HEAD_OUTPUT), ("neurons", OUTER)):
        for layer, kept in enumerate(found[kind]):
            if (columns := mask.get(f"{LAYER}{layer}.{matrix}.weight")) is not None:
                kept.copy_(columns.any(0).view(len(kept), -1).any(1))
    return found


def executed_units(net: Net, mask: Mask) -> Mask:
    """Return the units that `slimmed` leaves: those kept, and up to 7 pruned neurons of a layer, masked, for a multiple of 8."""
    units = kept_units(net, mask)
    for kept in units["neurons"]:
        kept[(~kept).nonzero().flatten()[: -int(kept.count_nonzero()) % MULTIPLE]] = True
    return units


def removed_units(net: Net, mask: Mask) -> dict[str, int]:
    """Count the heads and the neurons that a mask prunes whole. `slimmed` leaves up to 7 of a layer's neurons in place."""
    return {kind: int((~kept).count_nonzero()) for kind, kept in kept_units(net, mask).items()}


@contextmanager
def slimmed(net: Net, mask: Mask) -> Iterator[Mask]:
    """Remove the heads and neurons that `mask` prunes whole, within the context. Yields the mask of what is left.

    Their rows and columns are left out of new parameters with the old names. At the end the network has its own parameters again,
    with the values of the narrower ones; the removed entries are as they were before. These should be zero: weight decay does not
    reach those that the mask keeps, as the rows of a head of which an unstructured mask prunes all columns.
    """
    units = executed_units(net, mask)
    cuts = {name: (dim, kept.nonzero().flatten()) for name, dim, kept in _cuts(units, net.bert.encoder.layer)}
    dense = {name: net.get_parameter(name) for name in cuts}
    left = {name: _cut(kept, *cuts[name]) if name in cuts else kept for name, kept in mask.items()}
    for name, p in dense.items():
        _replace(net, name, nn.Parameter(_cut(p.detach(), *cuts[name]), p.requires_grad))
    _set_heads(net, units["heads"].sum(1).tolist())
    try:
        yield Mask(left, mask.info)
    finally:
        _set_heads(net, [net.config.num_attention_heads] * len(units["heads"]))
        with torch.no_grad():
            for name, p in dense.items():
                dim, index = cuts[name]
                p.index_copy_(dim, index.to(p.device), net.get_parameter(name))
                _replace(net, name, p)


def _cuts(units: Mask, layers: Iterable[nn.Module]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield each parameter that gets narrower, its dimension, and which of its rows or columns are kept."""
    for number, (layer, heads, neurons) in enumerate(zip(layers, units["heads"], units["neurons"], strict=True)):
        rows = heads.repeat_interleave(layer.attention.self.attention_head_size)  # type: ignore[union-attr]
        for inputs, output, kept in ((QKV, HEAD_OUTPUT, rows), ((INNER,), OUTER, neurons)):
            if not kept.all():  # otherwise the parameters stay the network's own
                yield from ((f"{LAYER}{number}.{name}.{kind}", 0, kept) for name in inputs for kind in ("weight", "bias"))
                yield f"{LAYER}{number}.{output}.weight", 1, kept


def _cut(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    return tensor.index_select(dim, index.to(tensor.device))


def _replace(net: Net, name: str, parameter: nn.Parameter) -> None:
    module, _, own = name.rpartition(".")
    setattr(net.get_submodule(module), own, parameter)


def _set_heads(net: Net, heads: Iterable[int]) -> None:
    for layer, count in zip(net.bert.encoder.layer, heads, strict=True):
        own = layer.attention.self
        own.num_attention_heads, own.all_head_size = count, count * own.attention_head_size


# ---- for good ----


class _NoHeads(nn.Module):
    """The self-attention of a layer without heads: it computes nothing."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return hidden, None


class _Bias(nn.Module):
    """A linear layer without inputs: its bias, of the shape of the residual [..., hidden]."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        return self.bias.expand_as(hidden)


def remove_units(net: Net, mask: Mask) -> None:
    """Remove the heads and neurons that `mask` prunes whole from a BERT of transformers, with or without a head, in place.

    Its own forward pass then runs on narrower layers: attention takes as many heads as there are. Of a layer without heads, or
    without neurons, the output's bias is left, which is frozen if the mask prunes it.
    """
    units, bert = kept_units(net, mask), net.base_model
    for name, dim, kept in _cuts(units, bert.encoder.layer):
        own = name.removeprefix(ENCODER)
        p = bert.get_parameter(own)
        _replace(bert, own, nn.Parameter(_cut(p.detach(), dim, kept.nonzero().flatten()), p.requires_grad))
    for number, (layer, heads, neurons) in enumerate(zip(bert.encoder.layer, units["heads"], units["neurons"], strict=True)):
        own = layer.attention.self
        own.num_attention_heads = int(heads.count_nonzero())
        own.all_head_size = own.num_attention_heads * own.attention_head_size
        for linear in (module for module in layer.modules() if isinstance(module, nn.Linear)):
            linear.out_features, linear.in_features = linear.weight.shape
        parts = ((heads, "attention.self", _NoHeads, HEAD_OUTPUT), (neurons, "intermediate", nn.Identity, OUTER))
        for kept, inputs, nothing, output in parts:
            if not kept.any():
                bias, of_mask = layer.get_submodule(output).bias, mask.get(f"{LAYER}{number}.{output}.bias")
                if of_mask is not None and not of_mask.any():
                    bias.requires_grad_(False)
                layer.set_submodule(inputs, nothing())
                layer.set_submodule(output, _Bias(bias))
