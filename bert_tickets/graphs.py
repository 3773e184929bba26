"""CUDA graphs: a step's hundreds of kernel launches replayed as one, for each bucket of shapes.

A GLUE batch keeps a large GPU busy for a few milliseconds, less than Python needs to launch its kernels. A bucket is taken
eagerly when first met, captured when it comes back, and replayed from then on; so a small task captures little. Before a
capture is trusted it is replayed from the present state beside the eager step, and must end in the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from bert_tickets import UserError, first_line
from bert_tickets.batches import Batch
from bert_tickets.device import empty_cache


class Recorder:
    """Captures steps on the current CUDA device; one for a run.

    All graphs share one pool of memory, as they never run at the same time. With `required` (`--graphs on`) what cannot be
    captured ends the run; otherwise it is printed once, and the run goes on eagerly to the same bits.
    """

    def __init__(self, required: bool) -> None:
        self.required, self.failed = required, False
        self._pool: Any = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Capture a step: how to replay it, and the tensor that then holds its loss."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = run()
        return graph.replay, loss

    def fail(self, why: str) -> None:
        """Use no more graphs in this run. Raises `UserError` where they are required."""
        if self.required:
            raise UserError(f"{why}; run without --graphs on")
        if not self.failed:
            print(f"{why}; the run goes on without CUDA graphs, to the same results", flush=True)
        self.failed = True


def recorder(asked: Literal["auto", "on", "off"], device: torch.device, processes: int) -> Recorder | None:
    """What `--graphs` asks for; None for no graphs. Raises `UserError` where `on` cannot be."""
    if asked == "on" and device.type != "cuda":
        raise UserError("--graphs on needs a CUDA device; a CPU has no launches to save")
    if asked == "on" and processes > 1:
        raise UserError("--graphs on is for one process: leave it out under torchrun")
    return Recorder(asked == "on") if asked != "off" and device.type == "cuda" and processes == 1 else None


class Graphs:
    """`take`, a step that depends on nothing of the host but shapes, replayed where its bucket is known.

    `state` lists every tensor that a step reads and writes: weights, moments, the loss scale. A step that raises
    `torch.OutOfMemoryError` changes nothing.
    """

    def __init__(self, take: Callable[[Batch], Tensor], state: Callable[[], list[Tensor]], recorder: Recorder) -> None:
        self.take, self.state, self.recorder = take, state, recorder
        self._met: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Batch, Callable[[], Any], Tensor]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        if self.recorder.failed:
            return self.take(batch)
        try:
            return self._step(batch)
        except torch.OutOfMemoryError as error:
            self._captured.clear()  # what they hold may be what is missing
            if self.recorder.required:
                raise  # and the batch is taken in parts
            self.recorder.fail(f"out of memory in a step with CUDA graphs ({first_line(error)})")
        empty_cache(batch.starts.device)
        return self.take(batch)

    def _step(self, batch: Batch) -> Tensor:
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
        device = batch.starts.device
        draws = _random_state(device)
        still: Batch = dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in tensors(batch).items()})  # type: ignore[arg-type]
        try:
            replay, loss = self.recorder.record(lambda: self.take(still))
        except Exception as error:
            _set_random_state(device, draws)
            if _out_of_memory(error):
                raise torch.OutOfMemoryError(first_line(error)) from None
            self._captured.clear()
            self.recorder.fail(f"a step cannot be captured as a CUDA graph ({first_line(error)})")
            return self.take(batch)
        state = self.state()
        before = [tensor.clone() for tensor in state]
        try:
            replay()
            replayed = [tensor.clone() for tensor in (*state, loss)]
        finally:  # whatever happened: a step that is then taken again must not be taken twice
            with torch.no_grad():
                torch._foreach_copy_(state, before)
            _set_random_state(device, draws)
        eager = self.take(batch)
        # as bytes, since an overflowing step's loss may be NaN
        if all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip((*state, eager), replayed, strict=True)):
            self._captured[key] = still, replay, loss
        else:
            self._captured.clear()
            self.recorder.fail("a step captured as a CUDA graph ends in other bits than the eager step")
        return eager


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def bucket_of(batch: Batch) -> Hashable:
    """All that a step's kernels and their shapes depend on."""
    full = int(batch.lengths.min()) == batch.longest  # attention needs no mask then
    return batch.input_ids.shape[1], batch.labels.shape, len(batch.lengths), batch.longest, full


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory that ran out is behind an error: the end of a failed capture raises one of its own over it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def _bytes(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
