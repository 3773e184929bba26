"""BERT's forward pass on packed batches.

The network is an unmodified Hugging Face model. Only the composition of a layer is written out here, so that it takes packed
tokens, and casts a value to half precision once for all matrices that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_tickets import kernels
from bert_tickets.kernels.branch import Branch, joined, linear
from bert_tickets.modeling.attention import Fused, gather, layouts
from bert_tickets.modeling.gates import Gates
from bert_tickets.modeling.packing import Batch

Net = Any  # a Hugging Face BERT with a head; to a type checker nn.Module hides its submodules
Joined = tuple[Tensor, Tensor]  # the concatenated weights of query, key and value, and their biases


def encode(net: Net, batch: Batch, states: list[Tensor] | None = None, gates: Gates | None = None) -> Tensor:
    """Compute the encoder's last hidden states, [T, hidden], equal to the padded model's. `states` receives each layer's.

    Layers may differ in their numbers of heads and neurons, and have none (`slim`). `gates` multiply heads and MLPs, and their
    gradients are computed; in float32 or wider.
    """
    bert, config, device = net.bert, net.config, batch.starts.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else bert.embeddings.word_embeddings.weight.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    fused = half and config.hidden_act == "gelu" and config.type_vocab_size == 2 and kernels.usable(device)
    fused = fused and not any(map(_is_emptied, bert.encoder.layer))
    heads = [layer.attention.self.num_attention_heads for layer in bert.encoder.layer]
    grids = layouts(batch, heads, config.hidden_size // config.num_attention_heads, dtype, fused)
    packed = {count: grid for count, grid in grids.items() if isinstance(grid, Fused)}
    if packed:
        return _encode_fused(bert, batch, packed, dtype, states)
    with cast_weights(bert.encoder, dtype) as joined:
        return _encode(bert, batch, grids, joined, dtype, states, gates)


def _is_emptied(layer: Any) -> bool:
    """Return whether a layer has no heads or no neurons. Our kernels cannot run on tensors without elements."""
    return layer.attention.self.num_attention_heads == 0 or len(layer.intermediate.dense.bias) == 0


def _encode(
    bert: Any,
    batch: Batch,
    grids: Mapping[int, Any],
    joined: Mapping[nn.Module, Joined],
    dtype: torch.dtype,
    states: list[Tensor] | None,
    gates: Gates | None,
) -> Tensor:
    types = batch.token_type_ids
    if bert.config.type_vocab_size == 1:  # both texts of a pair have the only type
        types = torch.zeros_like(types)
    hidden = bert.embeddings(input_ids=batch.input_ids, token_type_ids=types, position_ids=batch.position_ids)[0]
    for number, layer in enumerate(bert.encoder.layer):
        own, x, three = layer.attention.self, hidden.to(dtype), joined.get(layer)
        q, k, v = F.linear(x, *three).chunk(3, -1) if three else (own.query(x), own.key(x), own.value(x))
        grid, p = grids.get(own.num_attention_heads), own.dropout.p if own.training else 0.0
        context = grid.attend(q, k, v, p) if grid else q  # without heads: [T, 0], and the output is its bias
        context = gates.on_heads(number, context, batch.rows) if gates else context
        hidden = layer.attention.output(context, hidden)
        inner = layer.intermediate(hidden)
        hidden = gates.output(number, layer.output, inner, hidden, batch.rows) if gates else layer.output(inner, hidden)
        if states is not None:
            states.append(hidden)
    return hidden


def _encode_fused(bert: Any, batch: Batch, grids: Mapping[int, Fused], dtype: torch.dtype, states: list[Tensor] | None) -> Tensor:
    """Compute `_encode` by our kernels, in half precision: `hidden` is in float32, and `half` its cast for matrix products."""
    from bert_tickets.kernels.embeddings import embed
    from bert_tickets.kernels.layers import add_norm, gelu

    device = batch.starts.device
    layers, branch = bert.encoder.layer, Branch(device)
    seed, *seeds = torch.randint(2**62, (1 + 3 * len(layers),), device=device)
    prepared = [*_prepare(layers, grids, batch.input_ids.shape[1], seeds[::3], dtype, branch)]
    ids = batch.input_ids[0], batch.token_type_ids[0], batch.position_ids[0]
    ends = next(iter(grids.values())).ends
    hidden, half = embed(bert.embeddings, ids, ends, batch.longest, seed, dtype, branch)

    def output(block: Any, x: Tensor, dense: Sequence[Tensor], norm: Sequence[Tensor], seed: Tensor) -> tuple[Tensor, Tensor]:
        (weight, bias), p = dense, block.dropout.p if block.training else 0.0
        return add_norm(linear(x, weight, None, branch), bias, hidden, norm, p, block.LayerNorm.eps, seed, branch)

    for layer, second, last, (cast, norms, words, ready) in zip(layers, seeds[1::3], seeds[2::3], prepared, strict=True):
        branch.wait(ready)
        (weight, bias, inner, inner_bias), own = cast[:4], layer.attention.self
        projected, p = linear(half, weight, bias.detach(), branch), own.dropout.p if own.training else 0.0
        attended = grids[own.num_attention_heads].attend(projected, bias, p, words, branch)
        hidden, half = output(layer.attention.output, attended, cast[4:6], norms[:2], second)
        expanded = gelu(linear(half, inner, None, branch), inner_bias, branch)
        hidden, half = output(layer.output, expanded, cast[6:], norms[2:], last)
        if states is not None:
            states.append(hidden)
    return hidden


def _prepare(
    layers: Iterable[Any], grids: Mapping[int, Fused], tokens: int, seeds: Iterable[Tensor], dtype: torch.dtype, branch: Branch
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None, Any]]:
    """Let the branch cast the layers' weights, and draw which attention weights dropout keeps.

    Yields of each layer the casts, its norms' weights, what was drawn, and the event of all this. The casts are weight and bias
    of query, key and value together, of the intermediate layer, of the attention's output, and of the layer's output.
    """
    from bert_tickets.kernels.layers import cast as copy

    cast: list[Tensor] = []
    norms: list[Tensor] = []
    drawn = []
    for layer, seed in zip(layers, seeds, strict=True):
        own, outputs = layer.attention.self, (layer.attention.output, layer.output)
        groups = [[getattr(x, name) for x in (own.query, own.key, own.value)] for name in ("weight", "bias")]
        groups += [[x] for dense in (layer.intermediate.dense, *(y.dense for y in outputs)) for x in (dense.weight, dense.bias)]
        cast += _Cast.apply(*chain(*groups), [len(group) for group in groups], dtype, partial(branch.run, copy))
        norms += [x for block in outputs for x in (block.LayerNorm.weight, block.LayerNorm.bias)]
        p = own.dropout.p if own.training else 0.0
        drawn.append((grids[own.num_attention_heads].draw(tokens, p, seed, branch), branch.event()))
    tensors = joined(branch, [*cast, *norms])
    of_norms = tensors[len(cast) :]
    for i, (words, event) in enumerate(drawn):
        yield tensors[8 * i : 8 * i + 8], of_norms[4 * i : 4 * i + 4], words, event


def classify(net: Net, batch: Batch, gates: Gates | None = None) -> Tensor:
    """Compute the logits of a sequence classifier, [B, labels], equal to the padded model's; with `gates` on its units."""
    first = gather(encode(net, batch, gates=gates), batch.starts, batch.rows, batch.position_ids[0, :, None] > 0)
    pooled = net.dropout(net.bert.pooler(first[:, None]))
    with torch.autocast(pooled.device.type, enabled=False):  # half-precision logits tie, and argmax then picks class 0
        return net.classifier(pooled.to(net.classifier.weight.dtype))


# ---- weights in half precision ----


class _Cast(torch.autograd.Function):
    """Cast all tensors to another dtype by one call, and their gradients back by one call, unless they may have any dtype.

    The last three arguments are the number of tensors to concatenate into each result, the dtype, and the first call.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, sizes, dtype, copy = args
        ctx.sizes, ctx.dtype = sizes, tensors[0].dtype
        ctx.any_dtype = all(tensor.is_leaf and tensor.grad_dtype is None for tensor in tensors)
        parts, cast = iter(tensors), []
        for size in sizes:
            group = [next(parts) for _ in range(size)]
            cast.append(group[0].new_empty(sum(map(len, group)), *group[0].shape[1:], dtype=dtype))
        copy(_parts(cast, sizes), tensors)
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = _parts(grads, ctx.sizes)
        if ctx.any_dtype:
            return *parts, None, None, None
        cast = [torch.empty_like(part, dtype=ctx.dtype) for part in parts]
        torch._foreach_copy_(cast, parts)
        return *cast, None, None, None


def _parts(tensors: Iterable[Tensor], sizes: list[int]) -> list[Tensor]:
    return [part for tensor, size in zip(tensors, sizes, strict=True) for part in tensor.chunk(size)]


@contextmanager
def cast_weights(encoder: Any, dtype: torch.dtype) -> Iterator[dict[nn.Module, Joined]]:
    """Replace the weights and biases of the encoder's linear layers by casts to `dtype`, made all at once, within the context.

    Yields the concatenated weights and biases of query, key and value by layer. Does nothing if the parameters have that dtype.
    The layers' own parameters get the gradients, and are restored at the end. Values equal autocast's, which casts each tensor
    and each gradient by itself: 288 kernels a step for BERT-base, and as many autograd nodes.
    """
    if next(encoder.parameters()).dtype == dtype:
        yield {}
        return
    projections = {layer: [getattr(layer.attention.self, name) for name in ("query", "key", "value")] for layer in encoder.layer}
    # under the hooks of torch.nn.utils.prune, a baseline of bench.py, a layer's weight is not a parameter
    projections = {layer: three for layer, three in projections.items() if all("weight" in x._parameters for x in three)}
    joined = [[linear._parameters[name] for linear in three] for three in projections.values() for name in ("weight", "bias")]
    apart = {linear for three in projections.values() for linear in three}
    places = [
        (linear._parameters, name, tensor)
        for linear in encoder.modules()
        if isinstance(linear, nn.Linear) and linear not in apart
        for name, tensor in linear._parameters.items()
    ]
    groups = [*joined, *([tensor] for *_, tensor in places)]
    cast = _Cast.apply(*chain(*groups), [len(group) for group in groups], dtype, torch._foreach_copy_)
    for (parameters, name, _), tensor in zip(places, cast[len(joined) :], strict=True):
        parameters[name] = tensor
    try:
        yield dict(zip(projections, zip(cast[: len(joined) : 2], cast[1 : len(joined) : 2], strict=True), strict=True))
    finally:
        for parameters, name, tensor in places:
            parameters[name] = tensor
