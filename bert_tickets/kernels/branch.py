"""A second stream within the CUDA graph of a step, for work whose result is needed much later.

A backward pass is a chain of gradients of activations. The gradients of weights and the sums of the gradients of biases are half
of its work and not part of the chain: beside it they fill multiprocessors that its small kernels leave idle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


class Branch:
    """Does work beside the current stream while that is captured, and at once otherwise: the results are the same bits."""

    def __init__(self, device: torch.device) -> None:
        self.used = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._stream = _stream(device) if self.used else None
        self._inputs: list[Any] = []  # until `join` their memory must not be used again

    def run(self, work: Callable[..., T], *inputs: Any) -> T:
        """Return `work(*inputs)`. Only later work of the branch may use the result before `join`, or `wait` for its `event`."""
        if self._stream is None:
            return work(*inputs)
        self._stream.wait_stream(torch.cuda.current_stream())
        self._inputs += inputs
        with torch.cuda.stream(self._stream):
            return work(*inputs)

    def event(self) -> Any:
        """Return the end of the work so far, for `wait`."""
        return self._stream and self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the current stream wait for an event."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def join(self) -> None:
        """Let the current stream wait for all work so far."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._inputs.clear()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: Branch, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.branch = branch
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.branch.join()
        return None, *grads


def joined(branch: Branch, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors. What the branch computes as gradients of these may be read by what comes before them."""
    return _Join.apply(branch, *tensors) if branch.used else tuple(tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.branch = branch
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, *_) = ctx.saved_tensors, ctx.needs_input_grad
        dweight = ctx.branch.run(_product, grad, x) if of_weight else None
        return grad @ weight if of_x else None, dweight, None, None


def _product(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, branch: Branch) -> Tensor:
    """Compute x @ weight.T + bias, [T, outputs]; the branch computes the gradient of `weight`, [outputs, inputs].

    `weight` is one of `joined`, and `bias` has no gradient.
    """
    return _Linear.apply(x, weight, bias, branch) if branch.used else F.linear(x, weight, bias)
