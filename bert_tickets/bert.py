"""BERT's forward pass on packed batches.

The network is Hugging Face's own, with its own parameter names and modules; nothing of it is wrapped or hooked. Written
out here is only how a layer is put together, so that the tokens of a batch lie end to end, and a value that several
matrices use is cast to half precision once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bert_tickets.attention import Grid, attend, gather, layout
from bert_tickets.batches import Batch

Net = Any  # a Hugging Face BERT with a head; to a type checker nn.Module hides its submodules


def encode(net: Net, batch: Batch) -> Tensor:
    """The encoder's last hidden states of a packed batch: [T, hidden]. Equal to the padded model's."""
    bert, device = net.bert, batch.starts.device.type
    hidden = bert.embeddings(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids, position_ids=batch.position_ids)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    grid = layout(batch, net.config.num_attention_heads, dtype)
    with cast_weights(bert.encoder, dtype):
        for layer in bert.encoder.layer:
            hidden = _layer(layer, hidden, grid, dtype)
    return hidden.view(-1, hidden.shape[-1])


def _layer(layer: Any, hidden: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """`BertLayer`: [1, T, hidden] to the same. In half precision query, key and value share one cast, and their gradients are
    summed in it."""
    own = layer.attention.self
    x = hidden.to(dtype)
    mixed = attend(own.query(x), own.key(x), own.value(x), grid, own.dropout.p if own.training else 0.0)
    hidden = layer.attention.output(mixed, hidden)
    return layer.output(layer.intermediate(hidden), hidden)


def classify(net: Net, batch: Batch) -> Tensor:
    """The logits of a sequence classifier on a packed batch: [B, labels]. Equal to the padded model's."""
    first = gather(encode(net, batch), batch.starts, batch.rows, batch.position_ids[0, :, None] > 0)
    pooled = net.dropout(net.bert.pooler(first[:, None]))
    with torch.autocast(pooled.device.type, enabled=False):  # half-precision logits tie, and argmax then picks class 0
        return net.classifier(pooled.to(net.classifier.weight.dtype))


# ---- weights in half precision ----


class _Cast(torch.autograd.Function):
    """Tensors of one dtype, and last another dtype, to these tensors in that dtype: one kernel there, one back."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, dtype = args
        ctx.dtype = tensors[0].dtype
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_cast(grads, ctx.dtype), None


def _cast(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(cast, tensors)
    return cast


@contextmanager
def cast_weights(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the linear layers of `module` hold their weights and biases in `dtype`, cast all at once.

    Autocast casts each by itself, and each gradient back: for BERT-base 288 kernels a step, and as many autograd nodes.
    The values are the same. The layers' own parameters, which get the gradients, are back in their places at the end.
    """
    places = [
        (linear._parameters, name, weight)
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
        for name, weight in linear._parameters.items()
        if weight is not None and weight.dtype != dtype
    ]
    if places:
        cast = _Cast.apply(*(weight for *_, weight in places), dtype)
        for (parameters, name, _), weight in zip(places, cast, strict=True):
            parameters[name] = weight
    try:
        yield
    finally:
        for parameters, name, weight in places:
            parameters[name] = weight
