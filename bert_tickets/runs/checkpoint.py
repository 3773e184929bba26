"""The hook that saves the middle of a level in the run directory, resumes from it, and stops the run on a signal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bert_tickets.runs.integrity import CHECKPOINT
from bert_tickets.runs.writer import Run
from bert_tickets.training.hooks import check_finite
from bert_tickets.training.loop import Hook, Loop

EVALUATION = 1.0  # save a checkpoint before the evaluation if the last one is older than this, in minutes


class Checkpoint(Hook):
    """Save everything that the next step depends on, load it when the loop begins, and stop after a signal.

    This includes the state of `hooks`, which must come before it in the loop.
    """

    def __init__(self, run: Run, level: int, hooks: Sequence[Hook], minutes: float, steps: int | None) -> None:
        self.run, self.level, self.minutes, self.steps = run, level, minutes, steps
        self.hooks = {f"{type(hook).__name__}/{number}": hook for number, hook in enumerate(hooks)}

    def begin(self, loop: Loop) -> None:
        self.run.saves_on_stop = True
        tensors, facts = self.run.read_checkpoint(self.level)
        if facts is not None:
            self._load(loop, tensors, facts)
        loop.began = self.saved = time.monotonic()

    def __call__(self, loop: Loop) -> None:
        minutes = min(EVALUATION, self.minutes) if loop.at == loop.steps else self.minutes
        due = time.monotonic() - self.saved > 60 * minutes or (self.steps is not None and loop.at % self.steps == 0)
        stop, due = loop.step.group.any(self.run.stop_signal is not None, due)  # all processes must do the same
        if stop or due:
            self._save(loop)
            self.saved = time.monotonic()
        if stop:
            self.run.stop(self.level, loop.at)

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
        self.run.write(CHECKPOINT, tensors, facts, self.level)

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
