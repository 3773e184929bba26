"""The training loop and the evaluation, and nothing else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bert_tickets import UserError
from bert_tickets.batches import Batch, Batches, Store, by_length, derive
from bert_tickets.config import Training
from bert_tickets.mask import Mask
from bert_tickets.ranks import ALONE, Ranks
from bert_tickets.step import Loss, Step, autocast, precision_of

EVAL_TOKENS = {"cuda": 16384, "cpu": 4096}  # padded tokens of an evaluation batch


class Keeper(Protocol):
    """Who keeps a level's checkpoints (`levels.Level`); `train` only says when."""

    title: str

    @property
    def note(self) -> Mapping[str, float | None]: ...  # what the progress bar shows beside the loss
    @property
    def stop_requested(self) -> bool: ...
    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None: ...
    def save_checkpoint(self, tensors: dict[str, Tensor], facts: dict) -> None: ...
    def stopped(self, step: int) -> None: ...


@dataclass
class Result:
    """What training a level came to."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]]  # (step, mean loss since the one before)
    moments: dict[str, Tensor]  # AdamW's state at the end


def total_steps(cfg: Training, per_epoch: int) -> int:
    """Optimisation steps of one level, of `per_epoch` steps an epoch."""
    return cfg.max_steps or math.ceil(Fraction(str(cfg.epochs)) * per_epoch)  # exact: in floats 1.1 * 10 is above 11


def train(
    loss: Loss,
    params: Mapping[str, nn.Parameter],
    batches: Batches,
    cfg: Training,
    keeper: Keeper,
    *,
    mask: Mask | None = None,
    span: int | None = None,
    start: int = 0,
    capture: tuple[int, Callable[[], None]] | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Result:
    """Train `params` to minimise `loss` from step `start` to the last, or on from the keeper's checkpoint.

    The learning rate falls linearly to zero over `span` steps (the level's own, unless given). `capture` is a step and
    what to call when it is reached; `moments` is AdamW's state to begin with. (config, seed) fixes the outcome: a step's batch
    and dropout are the same on every level, so that two levels differ by their masks alone. Raises `UserError` where the
    loss or a weight stops being finite.
    """
    device, ranks = batches.store.device, batches.ranks
    steps = total_steps(cfg, batches.per_epoch)
    span = span or steps
    step = Step(loss, params, cfg, mask, device, ranks=ranks)
    # A CPU's processes draw the same numbers, and each takes its own; on CUDA each draws its own.
    stream = ("dropout", ranks.rank) if ranks.rank and device.type == "cuda" else ("dropout",)
    losses: list[tuple[int, float]] = []
    total = torch.zeros((), device=device)  # of the losses since the last look; it stays on the device
    at, seconds = start, 0.0
    checkpoint = keeper.load_checkpoint()
    if checkpoint is None:
        step.set_moments(moments or {})
    else:
        tensors, facts = checkpoint
        at, seconds, losses = facts["step"], facts["seconds"], [(s, x) for s, x in facts["losses"]]
        total.copy_(tensors["total"])
        _restore(step, tensors, facts)
    began = saved = time.monotonic()

    def check(ok: bool, what: str) -> None:
        if not ok:
            raise UserError(
                f"{keeper.title}: {what} by step {at}. Nothing of it was saved; what was finished or saved before is intact. "
                "A lower --lr, or --precision bf16 or fp32, may help."
            )

    def look() -> float:
        """The mean loss since the last look; where the host waits for the device."""
        mean = total.item() / (at - max(start, (at - 1) // cfg.log_every * cfg.log_every))
        check(math.isfinite(mean), f"the loss became {mean}")
        return mean

    def save() -> None:
        check(_finite(step.params), "a weight became infinite or NaN")
        spent = seconds + time.monotonic() - began
        facts = {"step": at, "seconds": spent, "losses": losses, "scaler": step.scaler.state_dict()}
        keeper.save_checkpoint({"total": total, **_state(step)}, facts)

    pace = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=steps, initial=at, desc=keeper.title, unit="step", mininterval=pace, disable=ranks.rank > 0) as bar:
        while at < steps:
            if capture is not None and at == capture[0]:
                capture[1]()
            torch.manual_seed(derive(cfg.seed, *stream, at))  # each step's own: no state to carry, the same on every level
            total += step(batches[at], cfg.lr * max(0.0, 1 - at / span))
            at += 1
            bar.update()
            if at % cfg.log_every == 0 or at == steps:
                losses.append((at, look()))
                total.zero_()
                bar.set_postfix({"loss": losses[-1][1], **keeper.note}, refresh=False)
            due = time.monotonic() - saved > 60 * cfg.save_minutes or (cfg.save_steps and at % cfg.save_steps == 0)
            stop, due = ranks.any(keeper.stop_requested, bool(due))  # of one process, and all must act
            if stop or (due and at < steps):
                save()
                saved = time.monotonic()
                if stop:
                    keeper.stopped(at)
    check(_finite(step.params), "a weight became infinite or NaN")
    step.graphs = None  # a circle, whose memory the next level would wait for the garbage collector to have
    return Result(steps - start, seconds + time.monotonic() - began, losses, step.moments())


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all())


def _state(step: Step) -> dict[str, Tensor]:
    """All that the next step depends on, but for the step's number and the scaler."""
    return {f"param/{name}": p.detach() for name, p in step.params.items()} | step.moments()


@torch.no_grad()
def _restore(step: Step, tensors: Mapping[str, Tensor], facts: dict) -> None:
    for name, p in step.params.items():
        p.copy_(tensors[f"param/{name}"])
    step.set_moments(tensors)
    step.scaler.load_state_dict(facts["scaler"])


@torch.inference_mode()
def evaluate(
    net: nn.Module,
    outputs: Callable[[Batch], Tensor],
    store: Store,
    precision: str,
    rows: Literal["example", "token", "any"] = "example",
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """The outputs of every example or token, in the store's order (`any`: in some order): [n, ...], float32.

    The network is left as it was. Several processes take the packs in turn, and each returns the outputs of all.
    """
    device = store.device
    was_training = net.training
    net.eval()
    with autocast(precision_of(precision, device), device):
        packs = [(chosen, outputs(batch).float()) for chosen, batch in by_length(store, EVAL_TOKENS[device.type], ranks)]
    net.train(was_training)
    turns = zip_longest(*ranks.gather([(chosen, found.cpu()) for chosen, found in packs]))
    indices, found = zip(*(pack for turn in turns for pack in turn if pack is not None), strict=True)
    values, order = torch.cat(found), torch.cat(indices)
    if rows == "token":
        order = torch.repeat_interleave(order, torch.from_numpy(store.lengths)[order])
    return (values if rows == "any" else values[order.argsort(stable=True)]).numpy()
