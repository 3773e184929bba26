"""Task-agnostic mask training (TAMT; Liu et al. 2022): theta_0 is frozen, and a score for each of its weights is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bert_tickets.config import Config, MethodSettings, Prunable, flag
from bert_tickets.errors import UserError
from bert_tickets.training.schedule import linear_decay

if TYPE_CHECKING:
    from torch import Tensor

    from bert_tickets.data.batches import Batches
    from bert_tickets.masking.mask import Mask
    from bert_tickets.modeling.packing import Batch
    from bert_tickets.runs.session import Session
    from bert_tickets.tasks import Task
    from bert_tickets.training.mask_scores import MaskedNetwork


def run(session: Session, s: Settings) -> None:
    """Train the scores S of f(theta_0 * 1[S > phi]); the ticket is the mask after the last refresh of the thresholds phi."""
    from bert_tickets.masking.straight_through import refresh
    from bert_tickets.methods.oneshot import ranked
    from bert_tickets.training.loop import total_steps
    from bert_tickets.training.mask_scores import MaskedNetwork, Refresh

    if session.finished(0):
        return
    cfg, batches = session.cfg, pairs(session) if s.objective == "kd" else session.batches
    horizon = total_steps(cfg.train, batches.per_epoch)  # of the learning rate's decay
    scores = ranked(session.net, s.mask_init, cfg.train.seed, s.prunable)
    start = refresh(scores, s.sparsity, s.rounding)[0]  # one-shot pruning's mask: S = 0.02 where it keeps, else 0
    student = MaskedNetwork(session.net, start)

    def save(mask: Mask, step: int) -> Mapping[str, Any]:
        if not s.saved(step + s.refresh_early):
            return {}
        session.save_mask(mask, step)
        return {} if s.objective == "kd" else {"metrics": session.evaluate(lambda batch: student(session.task.predict, batch))}

    last = s.ticket_step or horizon
    late = [f"--ticket-step {last} is after the last step: the ticket is that of step {horizon}"] * (last > horizon)
    refreshes = Refresh(student, start, s.sparsity, s.rounding, s.refresh, s.refresh_early, save)
    session.train_level(
        0,
        start,
        found=refreshes.found,
        loss=lambda batch: loss(cfg, s, session.task, student, batch),
        params=student.params(head=s.objective != "kd"),
        batches=batches,
        optimizer=s.optimizer,
        schedule=linear_decay(cfg.train.lr, horizon),
        steps=min(s.ticket_step - s.refresh_early if s.ticket_step else horizon, horizon),
        hooks=[refreshes],
        warnings=late,
    )


def loss(cfg: Config, s: Settings, task: Task, student: MaskedNetwork, batch: Batch) -> Tensor:
    """Compute the objective: the MLM loss, the distance of the hidden states from the dense network's, or their sum."""
    from bert_tickets.tasks.distillation import all_positions, as_teacher, distance, hidden_states, real_tokens

    if s.objective == "mlm":
        return student(task.loss, batch)
    net, padded_to = student.net, cfg.max_length if s.kd_padding else None
    with as_teacher(net, s.teacher_dropout):
        teacher = hidden_states(net, batch, padded_to)
    counted = real_tokens(batch) if padded_to is None else all_positions(batch, padded_to)
    # of a part of a batch: a mean over tokens, where the step weights the loss by the part's examples or masked tokens
    share = batch.shard.share / batch.weight if batch.shard and batch.weight and not s.kd_padding else 1.0
    if s.objective == "kd":
        return share * distance(student(lambda net, batch: hidden_states(net, batch, padded_to), batch), teacher, counted)
    states: list[Tensor] = []
    mlm = student(lambda net, batch: task.loss(net, batch, states), batch)  # type: ignore[call-arg]
    return mlm + share * distance(states, teacher, counted)


def pairs(session: Session) -> Batches:
    """Return batches of the text's pairs of segments, which are not corrupted."""
    from bert_tickets.data.pair_dataset import load_pairs
    from bert_tickets.data.text_source import find_texts

    cfg, device = session.cfg, session.batches.store.device
    text = find_texts(cfg.data_dir)["train"]
    given = (session.tokenizer, cfg.max_length, cfg.train.seed, cfg.limit_train, device)
    store = session.run.group.main_first(lambda: load_pairs(text, *given))
    return replace(session.batches, store=store, augment_batch=lambda batch, step: batch)


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """The flags of `--method mask-training`."""

    sparsity: float = flag("fraction of each matrix that is pruned")
    objective: Literal["mlm", "kd", "mlm+kd"] = flag(
        "masked language modelling, distillation of hidden states, or their sum", "mlm"
    )
    mask_init: Literal["magnitude", "random"] = flag("the mask to begin with: one-shot pruning's, or a random one", "magnitude")
    prunable: Prunable = flag("which parameters have scores", "matrices+embeddings")  # noqa: RUF009
    refresh: int = flag("set the thresholds anew every N steps", 1000)
    refresh_early: bool = flag("refresh after the first step, and then one step before each interval ends", False)
    rounding: Literal["round", "int"] = flag(
        "prune round(n s) of n weights, or all up to the int(n s)-th smallest score", "round"
    )
    save_masks: str = flag("save the mask every N steps, or at steps such as 1000,5000; multiples of --refresh", "1000")
    ticket_step: int | None = flag("end at this step, whose mask is the ticket, and not at the last", None)
    optimizer: Literal["adamw", "bert_adam"] = flag("AdamW, or BertAdam, which clips each tensor by itself", "adamw")
    teacher_dropout: bool = flag("dropout in the teacher of kd", False)
    kd_padding: bool = flag("pad the examples of kd, and count padding in its mean", False)

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError(f"--sparsity {self.sparsity}: must be between 0 and 1")
        for name in ("refresh", "ticket_step"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.ticket_step == 1 and self.refresh_early:
            raise UserError("--ticket-step 1 with --refresh-early: nothing would be trained")
        for step in self._saved_steps():
            if step < 1 or step % self.refresh:
                raise UserError(
                    f"--save-masks {self.save_masks}: give multiples of --refresh ({self.refresh}), where masks are exact"
                )

    def _saved_steps(self) -> list[int]:
        try:
            return [int(step) for step in self.save_masks.split(",")]
        except ValueError:
            raise UserError(f"--save-masks {self.save_masks}: give a number of steps, or several as in 1000,5000") from None

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        if "eval_steps" in given:
            raise UserError("--eval-steps is for training weights: a mask is evaluated where it is saved (--save-masks)")
        unused = {"mlm": {"teacher_dropout", "kd_padding"}, "mlm+kd": {"kd_padding"}, "kd": set[str]()}[self.objective]
        if found := unused & {*given}:  # the blocks of MLM have no padding
            raise UserError(f"--{min(found).replace('_', '-')} has no effect with --objective {self.objective}")

    def saved(self, step: int) -> bool:
        """Return whether the mask is saved at a step; a single number is an interval."""
        steps = self._saved_steps()
        return step % steps[0] == 0 if len(steps) == 1 else step in steps

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        return [f"train the scores of a mask of {self.sparsity:.0%} sparsity by {self.objective}"]
