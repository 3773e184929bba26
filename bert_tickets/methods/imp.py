"""Iterative magnitude pruning with rewinding to the pre-trained weights (Chen et al. 2020, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bert_tickets.config import Prunable, flag
from bert_tickets.errors import UserError
from bert_tickets.training.schedule import decay_span, fractions, linear_decay, max_levels

if TYPE_CHECKING:
    from bert_tickets.runs.session import Session


def run(session: Session, s: Settings) -> None:
    """Find tickets at growing sparsity. Line numbers are those of Algorithm 1."""
    from bert_tickets.masking.mask import Mask  # here, as --help reads this file without torch
    from bert_tickets.masking.prune import magnitude, prune
    from bert_tickets.modeling.parameters import prunable, rewind, snapshot

    net, i = session.net, s.rewind_step(session.steps)
    theta0 = theta = snapshot(net)  # a clone: a state_dict would alias the live weights
    mask = Mask.ones(prunable(net, s.prunable))  # 2: m = 1
    for level, fraction in enumerate(s.fractions):  # 3, 6: repeat until the sparsity is reached
        if session.finished(level):
            mask = session.restore(level)
            continue
        if level > 0 and i > 0:
            theta = session.kept_weights()  # 1: theta_i, which level 0 passed
        if level == 1 and s.prune_first:  # level 0 was for comparison only
            rewind(net, theta0, mask)
        mask = prune(mask, magnitude(prunable(net, s.prunable)), fraction, s.scope)  # 5: of m * theta_t
        if s.rewind == "none":
            mask.apply(dict(net.named_parameters()))  # standard pruning goes on from theta_t
        else:
            rewind(net, theta, mask, head=s.rewind_head)  # 7: f(m * theta_i)
        session.train_level(  # 4: train to step t
            level,
            mask,
            start=i if level else 0,
            schedule=s.learning_rate(session.cfg.train.lr, level, session.steps),
            moments=session.moments() if level > s.prune_first and not s.resets_optimizer else None,
            keep_moments=not s.resets_optimizer,
            hooks=[session.keep_at(i)] if level == 0 and i > 0 else [],
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `--method imp`."""

    levels: int = flag("number of sparsities, the dense network counted (default: 10, or as many as --rate allows)", 0)
    rate: float = flag("fraction of the weights that a level prunes", 0.1)
    schedule: Literal["linear", "geometric"] = flag("--rate of the original weights, or of the remaining ones", "linear")
    scope: Literal["global", "tensor"] = flag("rank all weights together, or each matrix by itself", "global")
    prunable: Prunable = flag("which parameters the mask covers", "matrices")
    rewind: str = flag("weights a level starts from: 0, a step (500) or part (5%) of training, or none (standard pruning)", "0")
    rewind_head: bool = flag("rewind the task's head with the encoder", True)
    prune_first: bool = flag("level 0 is for comparison: level 1 prunes the pre-trained weights and starts from them", False)
    decay: Literal["level", "run", "once"] = flag(
        "the learning rate decays to zero in each level; or restarts a decay over all levels in each (run); or decays once",
        "level",
    )
    reset_optimizer: bool | None = flag("a new AdamW at each level (default: unless --rewind none)", None)

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(f"--rate {self.rate}: must be between 0 and 1")
        levels = self.levels or int(min(10, max_levels(self.rate, self.schedule)))
        set_field = object.__setattr__  # of a frozen dataclass, before anyone sees it
        set_field(self, "levels", levels)
        set_field(self, "rewind", _shortest(self.rewind))
        if self.reset_optimizer is None:
            set_field(self, "reset_optimizer", self.rewind != "none")
        _ = self.fractions  # raises for a level beyond what is left

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        if self.rewind == "none" and "rewind_head" in given:
            raise UserError("--rewind-head has no effect with --rewind none")

    @property
    def resets_optimizer(self) -> bool:
        return bool(self.reset_optimizer)

    @property
    def fractions(self) -> list[float]:
        """The fraction of the remaining weights that is pruned before each level."""
        return fractions(self.levels, self.rate, self.schedule)

    def rewind_step(self, steps: int) -> int:
        """The step i of `steps` whose weights each level starts from; 0 also for `none`."""
        if self.rewind == "none":
            return 0
        percent = self.rewind.endswith("%")
        step = round(float(self.rewind[:-1]) / 100 * steps) if percent else int(self.rewind)
        if step >= steps:
            raise UserError(f"--rewind {self.rewind} is step {step}, and a level has {steps} steps: nothing would be trained")
        return step

    def learning_rate(self, lr: float, level: int, steps: int) -> Callable[[int], float]:
        """The learning rate by the step of a level of so many steps."""
        most = max_levels(self.rate, self.schedule)
        most = 10 if math.isinf(most) else int(most)  # whatever --levels is: a shorter run is the beginning of the whole
        span, number = decay_span(self.decay, level, self.levels, most, self.prune_first)
        return linear_decay(lr, steps, span, number)

    def plan(self) -> list[str]:
        """What --dry-run prints of the levels."""
        lines, left = [], 1.0
        for level, fraction in enumerate(self.fractions):
            left *= 1 - fraction
            lines.append(f"level {level}: prune {fraction:.4f} of the remaining weights: {1 - left:.1%} pruned; then train")
        return lines


def _shortest(rewind: str) -> str:
    """The shortest way to write the same rewinding step. Raises `UserError` for anything else."""
    try:
        if rewind == "none":
            return rewind
        percent = float(rewind[:-1]) if rewind.endswith("%") else None
        if percent is None and int(rewind) >= 0:
            return str(int(rewind))
        if percent is not None and 0 <= percent < 100:
            return f"{percent:.15g}%" if percent else "0"
    except ValueError:
        pass
    raise UserError(f"--rewind {rewind}: give 0, a step, a part such as 5%, or none")
