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

from bert_tickets import Diverged, UserError, first_line
from bert_tickets.batches import Batch, Batches, Store, by_length, derive
from bert_tickets.config import Training
from bert_tickets.device import empty_cache, out_of_memory
from bert_tickets.graphs import Recorder
from bert_tickets.mask import Mask
from bert_tickets.ranks import ALONE, Ranks
from bert_tickets.schedule import linear_decay
from bert_tickets.step import Loss, Step, autocast, precision_of

EVALUATION = 1.0  # minutes of training that are saved before a level's evaluation, which may take as long again
LEAST_SCALE = 2.0**-10  # of fp16 losses: below it the gradients themselves are beyond what fp16 holds
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
    def divided(self, step: int, parts: int) -> None: ...


@dataclass
class Result:
    """What training a level came to."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]]  # (step, mean loss since the one before)
    moments: dict[str, Tensor]  # AdamW's state at the end
    divided: int = 1  # parts of a batch at the end; more than one where memory ran out
    skipped: int = 0  # steps in which fp16 gradients overflowed, so that nothing was changed


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
    rate: Callable[[int], float] | None = None,
    start: int = 0,
    capture: tuple[int, Callable[[], None]] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    recorder: Recorder | None = None,
) -> Result:
    """Train `params` to minimise `loss` from step `start` to the last, or on from the keeper's checkpoint.

    `rate` is the learning rate by step (a linear decay to zero over the level, unless given). `capture` is a step and
    what to call when it is reached; `moments` is AdamW's state to begin with. (config, seed) fixes the outcome: a step's batch
    and dropout are the same on every level, so that two levels differ by their masks alone. Raises `Diverged` where the
    loss or a weight stops being finite, or fp16 gradients overflow at every scale.
    """
    device, ranks = batches.store.device, batches.ranks
    steps = total_steps(cfg, batches.per_epoch)
    rate = rate or linear_decay(cfg.lr, steps)
    step = Step(loss, params, cfg, mask, device, recorder, ranks)
    # A CPU's processes draw the same numbers, and each takes its own; on CUDA each draws its own.
    stream = ("dropout", ranks.rank) if ranks.rank and device.type == "cuda" else ("dropout",)
    losses: list[tuple[int, float]] = []
    total = torch.zeros((), device=device)  # of the losses since the last look; it stays on the device
    at, seconds, divided = start, 0.0, 1
    checkpoint = keeper.load_checkpoint()
    if checkpoint is None:
        step.set_moments(moments or {})
    else:
        tensors, facts = checkpoint
        at, seconds, losses = facts["step"], facts["seconds"], [(s, x) for s, x in facts["losses"]]
        divided = facts.get("divided", 1)
        total.copy_(tensors["total"])
        _restore(step, tensors, facts)
    began = saved = time.monotonic()

    def check(ok: bool, what: str) -> None:
        if not ok:
            raise Diverged(f"{what} by step {at}")

    def look() -> float:
        """The mean loss since the last look; where the host waits for the device."""
        mean = total.item() / (at - max(start, (at - 1) // cfg.log_every * cfg.log_every))
        check(math.isfinite(mean), f"the loss became {mean}")
        if step.loss_scale:
            check(step.loss_scale.factor.item() >= LEAST_SCALE, "fp16 gradients overflowed at every scale")
        return mean

    def take() -> Tensor:
        """The next step's loss. Where memory runs out, the batch is divided into twice as many parts, until the level ends."""
        nonlocal divided
        while True:
            torch.manual_seed(derive(cfg.seed, *stream, at))  # each step's own: no state to carry, the same on every level
            try:
                return step(batches.parts(at, divided), rate(at))
            except torch.OutOfMemoryError as error:
                if divided * ranks.world >= batches.batch_size:
                    why = f"out of memory in step {at}, with one example at a time: {first_line(error)}"
                    raise UserError(f"{keeper.title}: {why}. A smaller --max-length, or a larger GPU, may help.") from None
            divided *= 2
            empty_cache(device)
            keeper.divided(at, divided)

    def save() -> None:
        check(_finite(step.params), "a weight became infinite or NaN")
        spent = seconds + time.monotonic() - began
        scale = step.loss_scale.state_dict() if step.loss_scale else {}
        facts = {"step": at, "seconds": spent, "losses": losses, "divided": divided, "scaler": scale}
        keeper.save_checkpoint({"total": total, **_state(step)}, facts)

    pace = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=steps, initial=at, desc=keeper.title, unit="step", mininterval=pace, disable=ranks.rank > 0) as bar:
        while at < steps:
            if capture is not None and at == capture[0]:
                capture[1]()
            total += take()
            at += 1
            bar.update()
            if at % cfg.log_every == 0 or at == steps:
                losses.append((at, look()))
                total.zero_()
                bar.set_postfix({"loss": losses[-1][1], **keeper.note}, refresh=False)
            minutes = min(EVALUATION, cfg.save_minutes) if at == steps else cfg.save_minutes
            due = time.monotonic() - saved > 60 * minutes or (cfg.save_steps and at % cfg.save_steps == 0)
            stop, due = ranks.any(keeper.stop_requested, bool(due))  # of one process, and all must act
            if stop or due:
                save()
                saved = time.monotonic()
                if stop:
                    keeper.stopped(at)
    check(_finite(step.params), "a weight became infinite or NaN")
    ended = step.moments()
    return Result(steps - start, seconds + time.monotonic() - began, losses, ended, divided, steps - start - step.taken(moments))


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all())


def _state(step: Step) -> dict[str, Tensor]:
    """All that the next step depends on, but for the step's number and the loss scale."""
    return {f"param/{name}": p.detach() for name, p in step.params.items()} | step.moments()


@torch.no_grad()
def _restore(step: Step, tensors: Mapping[str, Tensor], facts: dict) -> None:
    for name, p in step.params.items():
        p.copy_(tensors[f"param/{name}"])
    step.set_moments(tensors)
    if step.loss_scale:
        step.loss_scale.load_state_dict(facts["scaler"])


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
    was_training = net.training
    net.eval()
    most = EVAL_TOKENS[store.device.type]
    while (packs := _packs(outputs, store, precision, most, ranks)) is None:
        most //= 2
        if most < 1:
            raise UserError("out of memory in the evaluation, with one example at a time: a smaller --max-length may help")
        print(f"out of memory in the evaluation: again, in packs of {most} tokens", flush=True)
    net.train(was_training)
    turns = zip_longest(*ranks.gather([(chosen, found.cpu()) for chosen, found in packs]))
    indices, found = zip(*(pack for turn in turns for pack in turn if pack is not None), strict=True)
    values, order = torch.cat(found), torch.cat(indices)
    if rows == "token":
        order = torch.repeat_interleave(order, torch.from_numpy(store.lengths)[order])
    return (values if rows == "any" else values[order.argsort(stable=True)]).numpy()


def _packs(
    outputs: Callable[[Batch], Tensor], store: Store, precision: str, most: int, ranks: Ranks
) -> list[tuple[Tensor, Tensor]] | None:
    """This process's packs of at most `most` tokens with their outputs; None where one of them, anybody's, was too large."""
    packs, short = [], False
    try:
        with out_of_memory(), autocast(precision_of(precision, store.device), store.device):
            packs = [(chosen, outputs(batch).float()) for chosen, batch in by_length(store, most, ranks)]
    except torch.OutOfMemoryError:
        short = True
    if not any(ranks.any(short)):
        return packs
    del packs
    empty_cache(store.device)
    return None
