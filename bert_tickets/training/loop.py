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

    def __init__(self, step: Step, steps: int, start: int, schedule: Callable[[int], float]) -> None:
        self.step, self.steps, self.schedule = step, steps, schedule
        self.start = start  # the first step
        self.at = start  # the number of completed steps, `start` included
        self.loss = torch.zeros((), device=step.device)  # of the last step, on the device
        self.spent = 0.0  # seconds before the last resume
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return self.spent + time.monotonic() - self.began


class Hook:
    """A function of the loop, called after every `every`-th step and after the last one. It may change the loop."""

    every = 1

    def begin(self, loop: Loop) -> None:
        """Run before the first step."""

    def __call__(self, loop: Loop) -> None: ...

    def end(self, loop: Loop) -> None:
        """Run when the loop ends, also after an error."""

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Return tensors and JSON values, which a checkpoint holds for `load_state`."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        """Restore the state of a checkpoint."""


def total_steps(cfg: Training, per_epoch: int) -> int:
    """Return the number of steps of a level, with `per_epoch` steps per epoch."""
    return cfg.max_steps or math.ceil(Fraction(str(cfg.epochs)) * per_epoch)  # exact: in floats 1.1 * 50 is above 55


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
    steps: int | None = None,
    moments: Mapping[str, Tensor] | None = None,
    hooks: Sequence[Hook] = (),
    recorder: Recorder | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Loop:
    """Train `params`, the network's parameters or any other leaf tensors, to minimize `loss`, from step `start` to the last.

    `steps` is the number of the last step, if not that of `cfg`. `schedule` maps a step to its learning rate (default: linear
    decay to zero). `optimizer` is a key of `step.OPTIMIZERS`, `moments` its initial state. The batch and the dropout of a step
    depend only on the seed and the step, so that two levels differ only by their masks. Raises `UserError` if memory runs out.
    """
    device, steps = batches.store.device, total_steps(cfg, batches.per_epoch) if steps is None else steps
    step = Step(loss, params, cfg, mask, device, recorder, group, optimizer)
    step.set_moments(moments or {})
    loop = Loop(step, steps, start, schedule or linear_decay(cfg.lr, steps))
    dropout = ("dropout", group.rank) if group.rank else ("dropout",)
    try:
        for hook in hooks:
            hook.begin(loop)
        while loop.at < loop.steps:
            torch.manual_seed(derive(cfg.seed, *dropout, loop.at))  # no generator state to save
            loop.loss = step(batches.parts(loop.at), loop.schedule(loop.at))
            loop.at += 1
            for hook in hooks:
                if loop.at % hook.every == 0 or loop.at == loop.steps:
                    hook(loop)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        advice = f"--grad-accum {2 * cfg.grad_accum} splits each batch into smaller parts"
        raise UserError(f"out of memory in step {loop.at}: {first_line(error)}. {advice}") from None
    finally:
        for hook in hooks:
            hook.end(loop)
    return loop


def _is_out_of_memory(error: Exception) -> bool:
    texts = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")  # of the RuntimeErrors that torch raises then
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)
