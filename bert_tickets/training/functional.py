"""A network that runs with other weights than its own, as trained scores or coefficients make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.packing import Batch

T = TypeVar("T")


class _Call(nn.Module):
    """A function of a network and a batch as a module, for `functional_call`."""

    def __init__(self, net: Net, function: Callable[[Net, Batch], Any]) -> None:
        super().__init__()
        self.net, self.function = net, function

    def forward(self, batch: Batch) -> Any:
        return self.function(self.net, batch)


def call_with(net: Net, weights: Mapping[str, Tensor], function: Callable[[Net, Batch], T], batch: Batch) -> T:
    """Return `function(net, batch)` with `weights` in the place of the parameters of these names.

    A parameter that is tied to one of them keeps its own value: an MLM decoder stays dense under masked word embeddings.
    """
    given = {f"net.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(_Call(net, function), given, (batch,), tie_weights=False)
