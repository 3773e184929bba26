"""Magnitude pruning of a fine-tuned network, guarded by its score: m-pruning of *When BERT Plays the Lottery* (Prasanna et al.
2020). Unlike IMP, it trains nothing between two prunings, and covers biases, but no pooler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bert_tickets.config import Prunable, flag
from bert_tickets.errors import UserError
from bert_tickets.methods.finetuned import Guard, GuardedSettings, finetune, guard_score, search_set

if TYPE_CHECKING:
    from bert_tickets.masking.mask import Mask
    from bert_tickets.runs.session import Session


def run(session: Session, s: Settings) -> None:
    """Level 0 is the fine-tuned network, level 1 its ticket as it stands: the last mask with a score of `threshold` or more."""
    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.prune import magnitude, prune
    from bert_tickets.modeling.parameters import prunable
    from bert_tickets.runs.journal import Journal

    weights = prunable(session.net, s.prunable)
    finetune(session, s, Mask.ones(weights))
    guard, journal = Guard(s.threshold), Journal(session.run, 1)

    def found() -> tuple[Mask, dict[str, Any]]:
        scores, trained = magnitude(weights), {name: p.detach().clone() for name, p in weights.items()}
        accepted = candidate = Mask.ones(weights)
        for _ in range(s.removals + 1):
            candidate.apply(weights)
            score = journal(candidate.sha256(), lambda: {"score": measure(session, s)})["score"]
            if not guard(score, f"{candidate.density:.1%} of the weights", kept=candidate.density):
                break
            accepted, candidate = candidate, prune(candidate, scores, s.rate)
        for name, p in weights.items():
            p.detach().copy_(trained[name] * accepted[name])
        return accepted, {"passes": guard.passes}

    session.train_level(1, Mask.ones(weights), steps=0, found=found)


def measure(session: Session, s: Settings) -> float | None:
    """Score the network as it stands on the search set, in fp32."""
    from bert_tickets.training.evaluate import evaluate

    net, task, (split, store) = session.net, session.task, search_set(session, s)
    outputs = evaluate(net, lambda batch: task.predict(net, batch), store, "fp32", "example", session.run.group)
    return guard_score(task.compute_metrics({split: outputs}, {split: store}))


@dataclass(frozen=True, kw_only=True)
class Settings(GuardedSettings):
    """The flags of `--method guarded-magnitude`."""

    rate: float = flag("fraction of the remaining weights that is pruned at a time", 0.1)
    removals: int = flag("how often at most", 9)
    prunable: Prunable = flag("which parameters the mask covers", "layers+biases")  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise UserError(f"--rate {self.rate}: must be between 0 and 1")
        if self.removals < 1:
            raise UserError(f"--removals {self.removals}: must be at least 1")

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        first = "fine-tune the dense network" if self.weights is None else f"take the trained weights {self.weights}"
        often = f"up to {self.removals} times, while the score is at least {self.threshold:.0%} of level 0's"
        return [f"level 0: {first}", f"level 1: prune {self.rate:.0%} of the remaining weights {often}"]
