"""The kernels of `fake_cuda` that torch's CPU build lacks: FlashAttention, and the backward pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# ---- attention in float32, with the arguments and results of torch's own operators ----


def _weights(q: Tensor, k: Tensor, p: float, scale: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The attention weights, and the factors of dropout, the same for the same seed."""
    weights = torch.softmax((q.float() @ k.float().mT) * scale, -1)
    drawn = torch.rand(weights.shape, generator=torch.Generator().manual_seed(int(seed)))
    return weights, (drawn >= p) / (1 - p)


def _attend(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    weights, factors = _weights(q, k, *how)
    return (weights * factors) @ v.float()


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, seed: Tensor) -> Any:
    weights, factors = _weights(q, k, p, scale, seed)
    grad = grad.float()
    of_weights = (grad @ v.float().mT) * factors
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    return of_scores @ k.float(), of_scores.mT @ q.float(), (weights * factors).mT @ grad


def _examples(ends: Tensor, *tensors: Tensor) -> list[list[Tensor]]:
    """The examples of tensors [T, heads, d], each [heads, L, d]."""
    return [[x[a:b].transpose(0, 1) for x in tensors] for a, b in pairwise(ends.tolist())]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, longest: int, *rest: Any) -> tuple[Tensor, ...]:
    """`_flash_attention_forward` on examples end to end: [T, heads, d]."""
    _longest_k, p, *_ = rest
    assert q.shape[2] % 8 == 0, "FlashAttention does not take this head size"
    assert ends[0] == 0, "the first token belongs to no example"
    assert ends[-1] == len(q), "not every token belongs to an example"
    assert int(ends.diff().max()) <= longest, "an example is longer than the longest"
    seed, out = torch.randint(2**31, ()), torch.empty_like(q, memory_format=torch.contiguous_format)
    for number, (query, key, value, into) in enumerate(_examples(ends, q, k, v, out)):
        into.copy_(_attend(query, key, value, p, q.shape[2] ** -0.5, seed + number))
    return out, torch.zeros(q.shape[1], len(q)), seed, torch.zeros(()), torch.zeros(())


def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float | None = None) -> tuple[Tensor, ...]:
    """`_flash_attention_backward`."""
    _out, _lse, ends, _ends_k, _longest, _longest_k, p, _causal, seed, *_ = rest
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for number, (upstream, query, key, value, *grads) in enumerate(_examples(ends, grad, q, k, v, *found)):
        gradients = _gradients(upstream, query, key, value, p, scale or q.shape[2] ** -0.5, seed + number)
        for into, gradient in zip(grads, gradients, strict=True):
            into.copy_(gradient)
    return tuple(found)


KERNELS = {
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
}


# ---- backward ----


def backward(loss: Tensor, gradient: None = None, **_: Any) -> None:
    """`Tensor.backward` without torch's engine, which asks the device for a stream."""
    assert loss.grad_fn is not None
    missing = _count_gradients(loss.grad_fn)
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
            for (after, place), out in zip(node.next_functions, outs, strict=False):  # arguments that are no tensors have no edge
                if after is None:
                    continue
                if out is not None:
                    like = after._input_metadata[place]
                    out = out.sum_to_size(like.shape).to(like.dtype)
                    grads[after][place] = grads[after][place] + out if place in grads[after] else out
                missing[after] -= 1
                if not missing[after]:
                    ready.append(after)


def _count_gradients(root: Any) -> Counter[Any]:
    """How many gradients each node of the graph waits for."""
    missing: Counter[Any] = Counter()
    seen, ahead = {root}, [root]
    while ahead:
        for after, _ in ahead.pop().next_functions:
            if after is not None:
                missing[after] += 1
                if after not in seen:
                    seen.add(after)
                    ahead.append(after)
    return missing
