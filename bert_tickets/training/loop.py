"""The training loop: batch, learning rate, step, hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from bert_tickets.config import Training
from bert_tickets.data.batches import Batches
from bert_tickets.errors import UserError, first_line
from bert_tickets.masking.mask import Mask
from bert_tickets.seeds import derive
from bert_tickets.training.cuda_graphs import Recorder
from bert_tickets.training.distributed import SINGLE_PROCESS, ProcessGroup
from bert_tickets.training.schedule import linear_decay
from bert_tickets.training.step import Loss, Step


class Loop:
    """The state of a training loop, which hooks read and may change."""

    def __init__(self, step: Step, steps: int, start: int, schedule: Callable[[int], float], group: ProcessGroup) -> None:
        self.step, self.steps, self.schedule, self.group = step, steps, schedule, group
        self.start = start  # the step it begins at
        self.at = start  # steps taken so far
        self.loss = torch.zeros((), device=step.device)  # of the last step, on the device
        self.spent = 0.0  # seconds before this process went on with it
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.spent + time.monotonic() - self.began


class Hook:
    """Called after every `every`-th step and after the last one; may change anything of the loop. A checkpoint holds its state."""

    every = 1

    def begin(self, loop: Loop) -> None:
        """Called before the first step."""

    def __call__(self, loop: Loop) -> None: ...

    def end(self, loop: Loop) -> None:
        """Called when the loop ends, also by an error."""

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON facts to go on from."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        """The inverse of `state`."""


def total_steps(cfg: Training, per_epoch: int) -> int:
    """Optimization steps of one level, of `per_epoch` steps an epoch."""
    return cfg.max_steps or math.ceil(Fraction(str(cfg.epochs)) * per_epoch)  # exact: in floats 1.1 * 10 is above 11


def train(
    loss: Loss,
    params: Mapping[str, Tensor],
    batches: Batches,
    cfg: Training,
    *,
    mask: Mask | None = None,
    schedule: Callable[[int], float] | None = None,
    optimizer: str = "adamw",
    start: int = 0,
    moments: Mapping[str, Tensor] | None = None,
    hooks: Sequence[Hook] = (),
    recorder: Recorder | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Loop:
    """Train `params` to minimise `loss` from step `start` to the last.

    `params` may hold further leaves beside the network's. `schedule` is the learning rate by step (a linear decay to zero unless
    given), `optimizer` a key of `step.OPTIMIZERS`, `moments` its state to begin with. (cfg, seed) fixes the outcome: a step's
    batch and dropout are the same at every level, so that two levels differ by their masks alone.
    """
    device, steps = batches.store.device, total_steps(cfg, batches.per_epoch)
    step = Step(loss, params, cfg, mask, device, recorder, group, optimizer)
    step.set_moments(moments or {})
    loop = Loop(step, steps, start, schedule or linear_decay(cfg.lr, steps), group)
    dropout = ("dropout", group.rank) if group.rank else ("dropout",)
    try:
        for hook in hooks:
            hook.begin(loop)
        while loop.at < steps:
            torch.manual_seed(derive(cfg.seed, *dropout, loop.at))  # each step's own: no state to carry
            loop.loss = step(batches.parts(loop.at), loop.schedule(loop.at))
            loop.at += 1
            for hook in hooks:
                if loop.at % hook.every == 0 or loop.at == steps:
                    hook(loop)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        advice = f"--grad-accum {2 * cfg.grad_accum} splits each batch into smaller parts"
        raise UserError(f"out of memory in step {loop.at}: {first_line(error)}. {advice}") from None
    finally:
        for hook in hooks:
            hook.end(loop)
    return loop
