"""Hooks of the training loop: the loss curve, evaluations, actions at a step, progress bar. `runs/checkpoint.py` has another."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bert_tickets.errors import Diverged
from bert_tickets.training.loop import Hook, Loop

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
        previous = self.losses[-1][0] if self.losses else loop.start
        mean = self.total.item() / (loop.at - previous)
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


class Evaluations(Hook):
    """Evaluate every `every` steps, except after the last one, and call `report` with step, metrics and seconds.

    This does not change the training: `evaluate` restores the network's mode, and a step seeds its own random numbers.
    """

    def __init__(self, every: int, evaluate: Callable[[], dict], report: Callable[[dict[str, Any]], None]) -> None:
        self.every, self.evaluate, self.report = every, evaluate, report
        self.found: list[dict[str, Any]] = []  # step and metrics of each

    def __call__(self, loop: Loop) -> None:
        if loop.at == loop.steps:
            return  # the finished level is evaluated, after its checkpoint
        self.found.append({"step": loop.at, "metrics": self.evaluate()})
        self.report({**self.found[-1], "seconds": round(loop.seconds, 2)})

    def state(self) -> tuple[dict[str, Tensor], dict]:
        return {}, {"found": self.found}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        self.found = list(facts["found"])


class At(Hook):
    """Call `action` after `step` steps."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def __call__(self, loop: Loop) -> None:
        if loop.at == self.step:
            self.action()


def check_finite(loop: Loop) -> None:
    """Raise `Diverged` if a trained tensor is infinite or NaN."""
    if not torch.stack([tensor.isfinite().all() for tensor in loop.step.params.values()]).all():
        raise Diverged(f"a weight became infinite or NaN by step {loop.at}")


class ProgressBar(Hook):
    """Show a progress bar with the last loss of a `LossCurve`."""

    def __init__(self, title: str, curve: LossCurve) -> None:
        self.title, self.curve = title, curve

    def begin(self, loop: Loop) -> None:
        interval, quiet = 0.5 if sys.stderr.isatty() else 30, loop.step.group.rank > 0
        self.bar = tqdm(total=loop.steps, initial=loop.at, desc=self.title, unit="step", mininterval=interval, disable=quiet)

    def __call__(self, loop: Loop) -> None:
        if self.curve.losses and self.curve.losses[-1][0] == loop.at:
            self.bar.set_postfix({"loss": self.curve.losses[-1][1]}, refresh=False)
        with suppress(OSError):  # its terminal or `tee` ended, and the run may be about to stop
            self.bar.update()

    def end(self, loop: Loop) -> None:
        if hasattr(self, "bar"):
            with suppress(OSError):
                self.bar.close()
