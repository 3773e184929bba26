"""Hooks of the training loop: the loss curve, checkpoints, checks, the progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from bert_tickets.errors import Diverged
from bert_tickets.training.loop import Hook, Loop

EVALUATION = 1.0  # save a checkpoint before the evaluation if the last one is older than this, in minutes
MIN_LOSS_SCALE = 2.0**-10  # of fp16; gradients that overflow at this scale are too large themselves


class LossCurve(Hook):
    """Read the mean loss from the device every `log_every` steps, and call `report` with step, loss, learning rate and seconds.

    Raises `Diverged` if the loss is not finite, or fp16 gradients overflow at every scale.
    """

    def __init__(self, log_every: int, report: Callable[[dict[str, Any]], None] = lambda line: None) -> None:
        self.log_every, self.report = log_every, report
        self.losses: list[tuple[int, float]] = []  # (step, mean loss since the previous entry)

    def begin(self, loop: Loop) -> None:
        self.total = torch.zeros_like(loop.loss)  # since the last reading, on the device

    def __call__(self, loop: Loop) -> None:
        self.total += loop.loss
        if loop.at % self.log_every and loop.at < loop.steps:
            return
        mean = self.total.item() / (loop.at - max(loop.start, (loop.at - 1) // self.log_every * self.log_every))
        if not math.isfinite(mean):
            raise Diverged(f"the loss became {mean} by step {loop.at}")
        if loop.step.loss_scale and loop.step.loss_scale.factor.item() < MIN_LOSS_SCALE:
            raise Diverged(f"fp16 gradients overflowed at every scale by step {loop.at}")
        self.losses.append((loop.at, mean))
        self.total.zero_()
        rate = loop.schedule(loop.at - 1)
        self.report({"step": loop.at, "loss": mean, "lr": rate, "seconds": round(loop.seconds, 2)})

    def state(self) -> tuple[dict[str, Tensor], dict]:
        return {"total": self.total}, {"losses": self.losses}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        self.total.copy_(tensors["total"])
        self.losses = [(step, loss) for step, loss in facts["losses"]]


class At(Hook):
    """Call `action` after `step` steps."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def __call__(self, loop: Loop) -> None:
        if loop.at == self.step:
            self.action()


class CheckFinite(Hook):
    """Raise `Diverged` if a trained tensor is infinite or NaN after the last step."""

    def __call__(self, loop: Loop) -> None:
        if loop.at == loop.steps:
            check_finite(loop)


def check_finite(loop: Loop) -> None:
    """Raise `Diverged` if a trained tensor is infinite or NaN."""
    if not torch.stack([tensor.isfinite().all() for tensor in loop.step.params.values()]).all():
        raise Diverged(f"a weight became infinite or NaN by step {loop.at}")


class ProgressBar(Hook):
    """Show a progress bar with the last loss of a `LossCurve`."""

    def __init__(self, title: str, curve: LossCurve, note: Mapping[str, float | None]) -> None:
        self.title, self.curve, self.note = title, curve, note

    def begin(self, loop: Loop) -> None:
        interval, quiet = 0.5 if sys.stderr.isatty() else 30, loop.group.rank > 0
        self.bar = tqdm(total=loop.steps, initial=loop.at, desc=self.title, unit="step", mininterval=interval, disable=quiet)

    def __call__(self, loop: Loop) -> None:
        if self.curve.losses and self.curve.losses[-1][0] == loop.at:
            self.bar.set_postfix({"loss": self.curve.losses[-1][1], **self.note}, refresh=False)
        self.bar.update()

    def end(self, loop: Loop) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class CheckpointFile(Protocol):
    """The file of a `Checkpoint`."""

    @property
    def stop_requested(self) -> bool: ...
    def load(self) -> tuple[dict[str, Tensor], dict] | None: ...
    def save(self, tensors: dict[str, Tensor], facts: dict) -> None: ...
    def stop(self, step: int) -> None:
        """Raise `Stopped`: the checkpoint of `step` is saved."""


class Checkpoint(Hook):
    """Save everything that the next step depends on, load it when the loop begins, and stop on request.

    This includes the state of `hooks`, which must come before it in the loop.
    """

    def __init__(self, file: CheckpointFile, hooks: Sequence[Hook], minutes: float, steps: int | None) -> None:
        self.file, self.minutes, self.steps = file, minutes, steps
        self.hooks = {f"{type(hook).__name__}/{number}": hook for number, hook in enumerate(hooks)}

    def begin(self, loop: Loop) -> None:
        if (found := self.file.load()) is not None:
            self._load(loop, *found)
        loop.began = self.saved = time.monotonic()

    def __call__(self, loop: Loop) -> None:
        minutes = min(EVALUATION, self.minutes) if loop.at == loop.steps else self.minutes
        due = time.monotonic() - self.saved > 60 * minutes or (self.steps is not None and loop.at % self.steps == 0)
        stop, due = loop.group.any(self.file.stop_requested, due)  # all processes must do the same
        if stop or due:
            self._save(loop)
            self.saved = time.monotonic()
        if stop:
            self.file.stop(loop.at)

    def _save(self, loop: Loop) -> None:
        check_finite(loop)
        step = loop.step
        tensors = {f"param/{name}": p.detach() for name, p in step.params.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in step.moments().items()}
        facts: dict[str, Any] = {"step": loop.at, "seconds": loop.seconds, "hooks": {}}
        facts["scaler"] = step.loss_scale.state_dict() if step.loss_scale else {}
        for name, hook in self.hooks.items():
            own, facts["hooks"][name] = hook.state()
            tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
        self.file.save(tensors, facts)

    @torch.no_grad()
    def _load(self, loop: Loop, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        step = loop.step
        loop.at, loop.spent = facts["step"], facts["seconds"]
        for name, p in step.params.items():
            p.copy_(tensors[f"param/{name}"])
        step.set_moments(_with_prefix("optimizer", tensors))
        if step.loss_scale:
            step.loss_scale.load_state_dict(facts["scaler"])
        for name, hook in self.hooks.items():
            hook.load_state(_with_prefix(name, tensors), facts["hooks"][name])


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}/")}
