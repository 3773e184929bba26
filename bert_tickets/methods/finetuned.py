"""Guarded pruning of a fine-tuned network: what the two methods of Prasanna et al. 2020 share. The network loses units, or
weights, while its score on the dev set stays above a fraction of the full network's; nothing is trained in between."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bert_tickets.config import MethodSettings, flag
from bert_tickets.errors import UserError

if TYPE_CHECKING:
    from bert_tickets.data.batches import Store, TokenStore
    from bert_tickets.masking.mask import Mask
    from bert_tickets.runs.session import Session


def finetune(session: Session, s: GuardedSettings, dense: Mask) -> None:
    """Level 0: fine-tune the dense network, or take the trained one of --weights."""
    from bert_tickets.modeling.loading import load_trained

    if session.finished(0):
        session.restore(0)
        return
    if s.weights is not None:
        load_trained(session.net, Path(s.weights))
    session.train_level(0, dense, steps=None if s.weights is None else 0)


def search_set(session: Session, s: GuardedSettings) -> tuple[str, Store]:
    """Return the examples that decide, with their name: the dev set (MNLI's matched one), or as many drawn from the training
    set."""
    import torch

    from bert_tickets.data.batches import Subset
    from bert_tickets.seeds import seeded

    split, dev = next(iter(session.evals.items()))
    if s.search_set == "dev":
        return split, dev
    train: TokenStore = session.batches.store  # type: ignore[assignment]
    drawn = torch.randperm(len(train), generator=seeded(session.cfg.train.seed, "search set"))[: len(dev)]
    return "train", Subset(train, drawn.sort().values)


def guard_score(metrics: Mapping[str, float]) -> float | None:
    """Return the score that guards: Matthews correlation for CoLA, the mean of Pearson's and Spearman's for STS-B, else accuracy.

    None if it is undefined, as correlations of constant predictions are.
    """
    if "pearson" not in metrics:
        return metrics.get("matthews", metrics["accuracy"])
    score = (metrics["pearson"] + metrics["spearman"]) / 2
    return score if math.isfinite(score) else None


class Guard:
    """Accepts scores of at least `threshold` times the full network's, which is the first; keeps and prints a trace of them."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.passes: list[dict[str, Any]] = []

    def __call__(self, score: float | None, what: str, **facts: Any) -> bool:
        """Record a pass, with facts about it. Returns whether it is accepted; an undefined score is not."""
        full = self.passes[0]["score"] if self.passes else score
        accepted = score is not None and full is not None and score >= self.threshold * full
        self.passes.append({**facts, "score": score, "accepted": accepted})
        value, verdict = "undefined" if score is None else f"{score:.4f}", "accepted" if accepted else "rejected"
        print(f"pass {len(self.passes)}: {what}: score {value}, {verdict}", flush=True)
        return accepted


@dataclass(frozen=True, kw_only=True)
class GuardedSettings(MethodSettings):
    """The flags of both methods."""

    weights: str | None = flag(
        "the trained weights of a finished run (level_NN/weights.safetensors), instead of fine-tuning", None
    )
    threshold: float = flag("prune while the score is at least this fraction of the full network's", 0.9)
    search_set: Literal["dev", "train"] = flag("the examples that decide: the dev set, or as many of the training set", "dev")
    levels = 2  # the dense network, and its ticket
    kept_weights = (0,)  # what tickets are scored on

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise UserError(f"--threshold {self.threshold}: must be at least 0 and finite")

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        if self.weights is not None and (unused := {*UNUSED, "init"} & {*given}):
            raise UserError(f"--{min(unused).replace('_', '-')} has no effect with --weights, whose network is not trained")


UNUSED = {"eval_steps", "lr", "epochs", "max_steps", "weight_decay"}  # flags of training, where nothing is trained
