"""CUDA graphs: a step's hundreds of kernel launches replayed as one, for each bucket of shapes.

A GLUE batch keeps a large GPU busy for a few milliseconds, less than Python needs to launch its kernels. A bucket is taken
eagerly when first met, captured when it comes back, and replayed from then on; so a small task captures little. Before a
capture is trusted it is replayed from the present state beside the eager step, and must end in the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from bert_tickets import UserError, first_line
from bert_tickets.batches import Batch

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]  # a step to its replay and where its loss appears


class Recorder:
    """Captures on the current CUDA device; all graphs share one pool of memory, as they never run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = run()
        return graph.replay, loss


class Graphs:
    """`take`, a step that depends on nothing of the host but shapes, replayed where its bucket is known.

    `state` lists every tensor that a step reads and writes: weights, moments, the scaler's. Raises `UserError` where
    a step cannot be captured, or where a capture's bits are not the eager step's.
    """

    def __init__(self, take: Callable[[Batch], Tensor], state: Callable[[], list[Tensor]], record: Record) -> None:
        self.take, self.state, self.record = take, state, record
        self._met: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Batch, Callable[[], Any], Tensor]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        key = bucket_of(batch)
        if key in self._captured:
            still, replay, loss = self._captured[key]
            for name, tensor in tensors(batch).items():
                getattr(still, name).copy_(tensor, non_blocking=True)
            replay()
            return loss.clone()  # the next graph may write over it
        if key not in self._met:
            self._met.add(key)
            return self.take(batch)
        return self._capture(key, batch)

    def _capture(self, key: Hashable, batch: Batch) -> Tensor:
        """Capture, replay, set everything back, take the step eagerly, compare. What stands in the end is the eager step."""
        still: Batch = dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in tensors(batch).items()})  # type: ignore[arg-type]
        try:
            replay, loss = self.record(lambda: self.take(still))
        except RuntimeError as error:
            raise UserError(f"a step cannot be captured as a CUDA graph: {first_line(error)}; run without --graphs") from None
        before, draws = [tensor.clone() for tensor in self.state()], _random_state(batch.starts.device)
        replay()
        replayed = [tensor.clone() for tensor in (*self.state(), loss)]
        with torch.no_grad():
            for tensor, value in zip(self.state(), before, strict=True):
                tensor.copy_(value)
        _set_random_state(batch.starts.device, draws)
        eager = self.take(batch)
        # as bytes, since an overflowing step's loss may be NaN
        if any(not torch.equal(_bytes(a), _bytes(b)) for a, b in zip((*self.state(), eager), replayed, strict=True)):
            raise UserError("a step captured as a CUDA graph ends in other bits than the eager step; run without --graphs")
        self._captured[key] = still, replay, loss
        return eager


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def bucket_of(batch: Batch) -> Hashable:
    """All that a step's kernels and their shapes depend on."""
    full = int(batch.lengths.min()) == batch.longest  # attention needs no mask then
    return batch.input_ids.shape[1], batch.labels.shape, len(batch.lengths), batch.longest, full


def _bytes(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
