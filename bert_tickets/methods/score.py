"""Score a ticket without training it: on the weights of a fine-tuned network (*pruned*, Prasanna et al. 2020), or in masked
language modelling by the two losses of mask training (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bert_tickets.config import Execution, MethodSettings, flag
from bert_tickets.errors import UserError
from bert_tickets.methods.finetuned import UNUSED

if TYPE_CHECKING:
    from torch import Tensor

    from bert_tickets.masking.mask import Mask
    from bert_tickets.modeling.packing import Batch
    from bert_tickets.runs.session import Session


def run(session: Session, s: Settings) -> None:
    """Evaluate f(m * theta, gamma) on the task. In MLM the head is pre-trained, and the layers are compared with f(theta)'s."""
    from bert_tickets.masking.mask import Mask
    from bert_tickets.modeling.loading import load_trained

    if session.finished(0):
        return
    mask = Mask.load(s.mask).to(session.batches.store.device)
    if s.weights is not None:
        load_trained(session.net, Path(s.weights))
    found: dict[str, Any] = {}
    if session.cfg.kind == "mlm":
        found["hidden_states"] = {kind: distance_of(session, mask, kind) for kind in ("cosine", "mse")}
    mask.apply(dict(session.net.named_parameters()))
    session.train_level(0, mask, steps=0, found=lambda: (mask, found), execution=s.execution)


def distance_of(session: Session, mask: Mask, kind: Literal["cosine", "mse"]) -> float:
    """Compute the distance of the masked network's hidden states from the dense one's, over the held-out text's tokens."""
    from bert_tickets.data.mlm_dataset import Corpus
    from bert_tickets.tasks.distillation import distance, hidden_states, real_tokens
    from bert_tickets.training.evaluate import evaluate
    from bert_tickets.training.mask_scores import MaskedNetwork

    net, cfg = session.net, session.cfg.train
    student = MaskedNetwork(net, mask)

    def predict(batch: Batch) -> Tensor:
        ours, theirs = student(hidden_states, batch), hidden_states(net, batch)
        return distance(ours, theirs, real_tokens(batch), kind).expand(len(batch.lengths))

    (store,) = session.evals.values()
    assert isinstance(store, Corpus)
    values = evaluate(net, predict, store.uncorrupted(), cfg.precision, "example", session.run.group)
    return float(values.mean())


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """The flags of `--method score`."""

    mask: str = flag("the ticket to score: a mask file, or a released mask.pt")
    execution: Execution = flag("mask the weights, or remove the heads and neurons that the mask prunes whole", "masked")  # noqa: RUF009
    weights: str | None = flag("the trained weights to score it on, of a finished run: level_NN/weights.safetensors", None)

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        if unused := UNUSED & {*given}:
            raise UserError(f"--{min(unused).replace('_', '-')} has no effect with --score, which trains nothing")
        if self.weights is not None and "init" in given:
            raise UserError("--init has no effect with --weights, which has all of them")

    def check_kind(self, kind: str) -> None:
        """Raise `UserError` without trained weights for a task whose head would be drawn at random."""
        if kind != "mlm" and self.weights is None:
            raise UserError("--score needs --weights: a run's level_NN/weights.safetensors, with the task's trained head")

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        on = "" if self.weights is None else f" on the weights {self.weights}"
        return [f"score the ticket {self.mask}{on} without training"]
