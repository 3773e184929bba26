"""What pretended.py does not leave to torch's CPU kernels: attention as by the GPU's fused kernels, and the backward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# ---- attention: the arguments and results of the operators of torch's two fused kernels ----


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, p: float, scale: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q.float() @ k.float().mT) * scale
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    drawn = torch.rand(weights.shape, generator=torch.Generator().manual_seed(int(seed)))
    return weights, (drawn >= p) / (1 - p)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float, scale: float, seed: Tensor
) -> tuple[Tensor, ...]:
    weights, factors = _weights(q, k, bias, p, scale, seed)
    grad = grad.float()
    of_weights = (grad @ v.float().mT) * factors
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    return of_scores @ k.float(), of_scores.mT @ q.float(), (weights * factors).mT @ grad


def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, _: bool, p: float = 0.0, causal: bool = False, *, scale: float
) -> tuple[Tensor, ...]:
    seed = torch.randint(2**31, ())
    weights, factors = _weights(q, k, bias, p, scale, seed)
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)  # [b, L, heads, d] in memory
    return out.copy_((weights * factors) @ v.float()), torch.zeros(q.shape[:3]), seed, torch.zeros((), dtype=torch.int64)


def efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    p: float,
    mask: Any,
    causal: bool = False,
    *,
    scale: float,
) -> tuple[Tensor | None, ...]:
    return *(x.to(q.dtype) for x in _gradients(grad, q, k, v, bias, p, scale, seed)), None


def _examples(ends: Tensor, *tensors: Tensor) -> list[list[Tensor]]:
    """Of each tensor [T, heads, d] its examples, [heads, L, d]."""
    return [[x[a:b].transpose(0, 1) for x in tensors] for a, b in pairwise(ends.tolist())]


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    _: Tensor,
    longest: int,
    same: int,
    p: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    assert q.shape[2] % 8 == 0, "its heads are of a size that FlashAttention does not take"
    assert ends[0] == 0, "the first token is of no example"
    assert ends[-1] == len(q), "not every token is of an example"
    assert int(ends.diff().max()) <= longest, "an example is longer than the longest"
    seed, out = torch.randint(2**31, ()), torch.empty_like(q, memory_format=torch.contiguous_format)
    for number, (query, key, value, into) in enumerate(_examples(ends, q, k, v, out)):
        weights, factors = _weights(query, key, None, p, scale or q.shape[2] ** -0.5, seed + number)
        into.copy_((weights * factors) @ value.float())
    return out, torch.zeros(q.shape[1], len(q)), seed, torch.zeros(()), torch.zeros(())


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor,
    _: Tensor,
    longest: int,
    same: int,
    p: float,
    causal: bool,
    seed: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for number, (upstream, query, key, value, *into) in enumerate(_examples(ends, grad, q, k, v, *found)):
        gradients = _gradients(upstream, query, key, value, None, p, scale or q.shape[2] ** -0.5, seed + number)
        for place, gradient in zip(into, gradients, strict=True):
            place.copy_(gradient)
    return tuple(found)


KERNELS = {
    "_scaled_dot_product_efficient_attention": efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
}


# ---- backward ----


def backward(loss: Tensor, gradient: None = None, **_: Any) -> None:
    """`Tensor.backward` without torch's engine, which asks the device for a stream."""
    assert loss.grad_fn is not None
    due: Counter[Any] = Counter()
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead:  # how many gradients each node waits for
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        for after, _ in node.next_functions:
            if after is not None:
                due[after] += 1
                ahead.append(after)
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    ready: list[Any] = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            got = grads.pop(node, {})
            if type(node).__name__ == "AccumulateGrad":
                p = node.variable
                p.grad = got[0] if p.grad is None else p.grad + got[0]
                continue
            given = [got.get(place) for place in range(len(node._input_metadata))]
            outs = getattr(node, "apply", node)(*given) if got else [None] * len(node.next_functions)
            outs = outs if isinstance(outs, (tuple, list)) else (outs,)
            for (after, place), out in zip(node.next_functions, outs, strict=False):  # no edges for what are no tensors
                if after is None:
                    continue
                if out is not None:
                    like = after._input_metadata[place]
                    out = out.sum_to_size(like.shape).to(like.dtype)
                    grads[after][place] = grads[after][place] + out if place in grads[after] else out
                due[after] -= 1
                if not due[after]:
                    ready.append(after)
