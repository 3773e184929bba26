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

from bert_tickets.errors import UserError, first_line
from bert_tickets.modeling.packing import Batch
from bert_tickets.training.device import empty_cache


class Recorder:
    """Captures steps on the current CUDA device; one for a run.

    With `required` (`--graphs on`) a step that cannot be captured ends the run; otherwise that is printed once, and the run
    goes on eagerly to the same bits.
    """

    def __init__(self, required: bool) -> None:
        self.required, self.failed = required, False
        self._place: Any = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Capture a step: how to replay it, and the tensor that then holds its loss."""
        if self._place is None:
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool, stream = self._place
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                loss = run()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream current
        return graph.replay, loss

    def renew(self) -> None:
        """Have the next graphs use a new memory pool and stream: torch does not reuse a pool whose graphs are all gone, and
        frees the workspaces of a stream with each graph captured on it."""
        self._place = None

    def fail(self, why: str) -> None:
        """Use no more graphs in this run. Raises `UserError` where they are required."""
        if self.required:
            raise UserError(f"{why}; run without --graphs on")
        if not self.failed:
            print(f"{why}; the run goes on without CUDA graphs, to the same results", flush=True)
        self.failed = True


def recorder(asked: str, device: torch.device, processes: int) -> Recorder | None:
    """The recorder for `--graphs`; None for no graphs. Raises `UserError` where `on` is impossible."""
    if asked == "on" and device.type != "cuda":
        raise UserError("--graphs on needs a CUDA device; a CPU has no launches to save")
    if asked == "on" and processes > 1:
        raise UserError("--graphs on is for one process: leave it out under torchrun")
    return Recorder(asked == "on") if asked != "off" and device.type == "cuda" and processes == 1 else None


Take = Callable[[Batch], Tensor]


class Graphs:
    """Steps whose kernels depend only on tensor shapes, replayed where their bucket is known.

    All graphs share one pool of memory, as they never run at the same time. A step that raises `torch.OutOfMemoryError`
    changes nothing.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._met: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Batch, Callable[[], Any], Tensor]] = {}
        recorder.renew()

    def __call__(self, batch: Batch, take: Take, state: Callable[[], list[Tensor]]) -> Tensor:
        """The step `take` on a batch; `state` lists every tensor that it reads and writes, but for the batch."""
        if self.recorder.failed:
            return take(batch)
        device = batch.starts.device
        draws = _random_state(device)
        try:
            return self._step(batch, take, state)
        except torch.OutOfMemoryError as error:
            self._forget(device)  # the graphs may hold the memory that is missing
            if self.recorder.required:
                raise  # and the batch is taken in parts
            why = first_line(error)
        self.recorder.fail(f"out of memory in a step with CUDA graphs ({why})")
        empty_cache(device)
        _set_random_state(device, draws)
        return take(batch)

    def _step(self, batch: Batch, take: Take, state: Callable[[], list[Tensor]]) -> Tensor:
        key = bucket_of(batch)
        if key in self._captured:
            still, replay, loss = self._captured[key]
            for name, tensor in tensors(batch).items():
                getattr(still, name).copy_(tensor, non_blocking=True)
            replay()
            return loss.clone()  # the next graph may write over it
        if key not in self._met:
            self._met.add(key)
            return take(batch)
        return self._capture(key, batch, take, state())

    def _capture(self, key: Hashable, batch: Batch, take: Take, state: list[Tensor]) -> Tensor:
        """Capture, replay, restore the state, take the step eagerly, compare. What stands in the end is the eager step."""
        draws = _random_state(batch.starts.device)
        still: Batch = dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in tensors(batch).items()})  # type: ignore[arg-type]
        recorded, why = None, ""
        try:
            recorded = self.recorder.record(lambda: take(still))
        except Exception as error:
            why = first_line(error)
            if _out_of_memory(error):
                raise torch.OutOfMemoryError(why) from None
        if recorded is None:  # not in the handler above: its traceback keeps what the capture holds
            self._forget(batch.starts.device)
            self.recorder.fail(f"a step cannot be captured as a CUDA graph ({why})")
            _set_random_state(batch.starts.device, draws)
            return take(batch)
        replay, loss = recorded
        before = [tensor.clone() for tensor in state]
        try:
            replay()
            replayed = [tensor.clone() for tensor in (*state, loss)]
        finally:  # whatever happened: a step that is then taken again must not be taken twice
            with torch.no_grad():
                torch._foreach_copy_(state, before)
            _set_random_state(batch.starts.device, draws)
        eager = take(batch)
        # as bytes, since an overflowing step's loss may be NaN
        if all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip((*state, eager), replayed, strict=True)):
            self._captured[key] = still, replay, loss
        else:
            self._forget(batch.starts.device)
            self.recorder.fail("a step captured as a CUDA graph ends in other bits than the eager step")
        return eager

    def _forget(self, device: torch.device) -> None:
        """Let go of all graphs, and of the capture that may have failed."""
        self._captured.clear()
        self.recorder.renew()
        if device.type == "cuda":  # before torch 2.13 a failed capture leaves the generator in it, which then refuses to draw
            generator = torch.cuda.default_generators[device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())


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
