"""CUDA graphs: the hundreds of kernel launches of a step replayed as one, for each bucket of shapes.

A large GPU computes a GLUE batch in less time than Python needs to launch the kernels. The first batch of a bucket is an eager
step, the second is captured, later ones are replayed. A capture is used only if its replay ends in the bits of the eager step,
and if that step changed the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from bert_tickets.errors import UserError, first_line
from bert_tickets.modeling.packing import Batch


class Recorder:
    """Captures steps on the current CUDA device; one for a run.

    If a step cannot be captured, the run ends with `required` (`--graphs on`); otherwise it continues eagerly, to the same bits.
    """

    def __init__(self, required: bool) -> None:
        self.required, self.failed = required, False
        self._place: Any = None  # memory pool and stream of all graphs

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """Capture a step; returns a function that replays it, and the tensor that then holds its loss."""
        if self._place is None:
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool, stream = self._place
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                loss = run()
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
        return graph.replay, loss

    def renew(self) -> None:
        """Use a new memory pool and stream: torch does not reuse a pool without graphs, and frees a stream's workspaces with
        each graph that was captured on it."""
        self._place = None

    def fail(self, why: str) -> None:
        """Use no more graphs in this run. Raises `UserError` if they are required."""
        if self.required:
            raise UserError(f"{why}; run without --graphs on")
        self.failed = True
        print(f"{why}; the run continues without CUDA graphs, with the same results", flush=True)


def recorder(asked: str, device: torch.device, parts: int) -> Recorder | None:
    """Return the recorder for `--graphs`; None for no graphs. Raises `UserError` if `on` is impossible.

    `parts` are those of a step, by processes and by `--grad-accum`: a step of several is eager.
    """
    if asked == "on" and device.type != "cuda":
        raise UserError("--graphs on needs a CUDA device")
    if asked == "on" and parts > 1:
        raise UserError("--graphs on is for steps of one part: leave it out under torchrun and with --grad-accum")
    return Recorder(asked == "on") if asked != "off" and device.type == "cuda" and parts == 1 else None


TrainStep = Callable[[Batch], Tensor]


class Graphs:
    """Captured steps, one for each bucket; steps of other buckets are eager.

    All graphs share one memory pool. A step that raises `torch.OutOfMemoryError` changes nothing.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.captured: dict[Hashable, tuple[Batch, Callable[[], Any], Tensor]] = {}  # inputs, replay, loss
        self._met: set[Hashable] = set()
        recorder.renew()

    def __call__(self, batch: Batch, step: TrainStep, state: Callable[[], list[Tensor]]) -> Tensor:
        """Take `step` on a batch. `state` lists every tensor that the step reads and writes, except the batch."""
        if self.recorder.failed:
            return step(batch)
        device = batch.starts.device
        random_state = _random_state(device)
        try:
            return self._step(batch, step, state)
        except torch.OutOfMemoryError as error:
            self._forget(device)  # the graphs may hold the memory that is missing
            if self.recorder.required:
                raise
            why = first_line(error)
        self.recorder.fail(f"out of memory in a step with CUDA graphs ({why})")
        torch.cuda.empty_cache()
        _set_random_state(device, random_state)
        return step(batch)

    def _step(self, batch: Batch, step: TrainStep, state: Callable[[], list[Tensor]]) -> Tensor:
        key = bucket_of(batch)
        if key in self.captured:
            inputs, replay, loss = self.captured[key]
            _copy(tensors(inputs), tensors(batch))
            replay()
            return loss.clone()  # the next graph may overwrite it
        if key not in self._met:
            self._met.add(key)
            return step(batch)
        return self._capture(key, batch, step, state())

    def _capture(self, key: Hashable, batch: Batch, step: TrainStep, state: list[Tensor]) -> Tensor:
        """Capture, replay, restore the state, take the step eagerly, compare. The result is that of the eager step."""
        device = batch.starts.device
        random_state = _random_state(device)
        inputs: Batch = dataclasses.replace(batch, **{name: tensor.clone() for name, tensor in tensors(batch).items()})  # type: ignore[arg-type]
        recorded, why = None, ""
        try:
            recorded = self.recorder.record(lambda: step(inputs))
        except Exception as error:
            why = first_line(error)
            if _out_of_memory(error):
                raise torch.OutOfMemoryError(why) from None
        if recorded is None:  # outside the handler above, whose traceback keeps the capture's memory
            self._forget(device)
            self.recorder.fail(f"a step cannot be captured as a CUDA graph ({why})")
            _set_random_state(device, random_state)
            return step(batch)
        replay, loss = recorded
        before = [tensor.clone() for tensor in state]
        try:
            replay()
            replayed = [tensor.clone() for tensor in (*state, loss)]
        finally:  # after an error too: a step must not be taken twice
            with torch.no_grad():
                torch._foreach_copy_(state, before)
            _set_random_state(device, random_state)
        eager = step(batch)
        # compare bytes: the loss of an overflowing step may be NaN
        if not all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip((*state, eager), replayed, strict=True)):
            self._forget(device)
            self.recorder.fail("a step captured as a CUDA graph ends in other bits than the eager step")
        elif any(x.requires_grad and not torch.equal(x, old) for x, old in zip(state, before, strict=True)):
            self.captured[key] = inputs, replay, loss
        elif not self.captured:  # a step that overflows changes no weight: its gradients were not compared
            self.recorder.renew()
        return eager

    def _forget(self, device: torch.device) -> None:
        """Drop all graphs, and the capture that may have failed."""
        self.captured.clear()
        self.recorder.renew()
        if device.type == "cuda":  # before torch 2.13 a failed capture leaves the generator in a state in which it cannot draw
            generator = torch.cuda.default_generators[device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch by field."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def _copy(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for dtype in {tensor.dtype for tensor in values.values()}:  # one kernel each
        names = [name for name, tensor in values.items() if tensor.dtype == dtype]
        torch._foreach_copy_([into[name] for name in names], [values[name] for name in names], non_blocking=True)


def bucket_of(batch: Batch) -> Hashable:
    """Return everything that the kernels of a step and their shapes depend on."""
    full = int(batch.lengths.min()) == batch.longest  # attention needs no mask then
    return batch.input_ids.shape[1], batch.labels.shape, len(batch.lengths), batch.longest, full


def _out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is out of memory: ending a failed capture raises another error."""
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
