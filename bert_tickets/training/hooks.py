"""What happens between training steps: the loss curve, checkpoints, checks, the progress bar."""

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

EVALUATION = 1.0  # minutes of training that are saved before a level's evaluation, which may take as long again
MIN_LOSS_SCALE = 2.0**-10  # of fp16: below it the gradients themselves exceed what fp16 holds


class LossCurve(Hook):
    """The mean loss of every `log_every` steps, read where the host waits for the device anyway.

    Raises `Diverged` where it is not finite, or fp16 gradients overflow at every scale. `report` gets step, loss, learning rate
    and seconds as they are read.
    """

    def __init__(self, log_every: int, report: Callable[[dict[str, Any]], None] = lambda line: None) -> None:
        self.log_every, self.report = log_every, report
        self.losses: list[tuple[int, float]] = []  # (step, mean loss since the one before)

    def begin(self, loop: Loop) -> None:
        self.total = torch.zeros_like(loop.loss)  # since the last reading; it stays on the device

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
    """Call `action` once, when `step` steps are taken."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def __call__(self, loop: Loop) -> None:
        if loop.at == self.step:
            self.action()


class CheckFinite(Hook):
    """Raise `Diverged` if a weight is infinite or NaN at the end."""

    def __call__(self, loop: Loop) -> None:
        if loop.at == loop.steps:
            check_finite(loop)


def check_finite(loop: Loop) -> None:
    """Raise `Diverged` if a trained tensor is infinite or NaN."""
    if not torch.stack([tensor.isfinite().all() for tensor in loop.step.params.values()]).all():
        raise Diverged(f"a weight became infinite or NaN by step {loop.at}")


class ProgressBar(Hook):
    """A progress bar with the newest loss of a `LossCurve`."""

    def __init__(self, title: str, curve: LossCurve, note: Mapping[str, float | None]) -> None:
        self.title, self.curve, self.note = title, curve, note

    def begin(self, loop: Loop) -> None:
        pace = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(
            total=loop.steps, initial=loop.at, desc=self.title, unit="step", mininterval=pace, disable=loop.group.rank > 0
        )

    def __call__(self, loop: Loop) -> None:
        if self.curve.losses and self.curve.losses[-1][0] == loop.at:
            self.bar.set_postfix({"loss": self.curve.losses[-1][1], **self.note}, refresh=False)
        self.bar.update()

    def end(self, loop: Loop) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class CheckpointFile(Protocol):
    """Where a `Checkpoint` is kept."""

    @property
    def stop_requested(self) -> bool: ...
    def load(self) -> tuple[dict[str, Tensor], dict] | None: ...
    def save(self, tensors: dict[str, Tensor], facts: dict) -> None: ...
    def stop(self, step: int) -> None:
        """Raise `Stopped`: the checkpoint of `step` is saved."""


class Checkpoint(Hook):
    """Saves all that the next step depends on, the hooks' state included; loads it when the loop begins; stops on request.

    Place it after the hooks whose state it holds.
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
        stop, due = loop.group.any(self.file.stop_requested, due)  # of one process, and all must act
        if not (stop or due):
            return
        self._save(loop)
        self.saved = time.monotonic()
        if stop:
            self.file.stop(loop.at)

    def _save(self, loop: Loop) -> None:
        check_finite(loop)
        step = loop.step
        tensors = {f"param/{name}": p.detach() for name, p in step.params.items()} | step.moments()
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
        step.set_moments(tensors)
        if step.loss_scale:
            step.loss_scale.load_state_dict(facts["scaler"])
        for name, hook in self.hooks.items():
            own = {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
            hook.load_state(own, facts["hooks"][name])
