"""Score a ticket without training it, by the two losses of mask training (Liu et al. 2022): MLM, with the pre-trained head, and
the distance of the hidden states from the dense network's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bert_tickets.config import MethodSettings, flag
from bert_tickets.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bert_tickets.masking.mask import Mask
    from bert_tickets.modeling.packing import Batch
    from bert_tickets.runs.session import Session


def run(session: Session, s: Settings) -> None:
    """Evaluate f(m * theta, gamma) on the held-out text, and compare its layers with those of f(theta)."""
    from bert_tickets.masking.mask import Mask

    if session.finished(0):
        return
    mask = Mask.load(s.mask).to(session.batches.store.device)
    found = {"hidden_states": {kind: distance_of(session, mask, kind) for kind in ("cosine", "mse")}}
    mask.apply(dict(session.net.named_parameters()))
    session.train_level(0, mask, steps=0, found=lambda: (mask, found))


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

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        if unused := {"eval_steps", "lr", "epochs", "max_steps", "weight_decay"} & {*given}:
            raise UserError(f"--{min(unused).replace('_', '-')} has no effect with --score, which trains nothing")

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        return [f"score the ticket {self.mask} without training"]
