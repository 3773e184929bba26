"""Iterative magnitude pruning with rewinding to the pre-trained weights (Chen et al. 2020, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bert_tickets.config import MethodSettings, Prunable, flag
from bert_tickets.errors import UserError
from bert_tickets.training.schedule import decay_span, fractions, linear_decay, max_levels

if TYPE_CHECKING:
    from bert_tickets.runs.session import Session


def run(session: Session, s: Settings) -> None:
    """Run Algorithm 1; comments give its lines. A level prunes, rewinds and trains; level 0 trains the dense network."""
    from bert_tickets.masking.mask import Mask  # imported here: --help reads this file without torch
    from bert_tickets.masking.prune import magnitude, prune
    from bert_tickets.modeling.parameters import prunable, rewind, snapshot

    net, i = session.net, s.rewind_step(session.steps)
    theta_0 = theta_i = snapshot(net)  # a clone: a state_dict would alias the live weights
    mask = Mask.ones(prunable(net, s.prunable))  # line 2: m = 1
    for level, fraction in enumerate(s.fractions):  # lines 3 and 6: repeat until sparsity s
        if session.finished(level):
            mask = session.restore(level)
            continue
        if level > 0 and i > 0:
            theta_i = session.saved_weights()  # line 1: level 0 trained f(theta_0) to step i
        if level == 1 and s.prune_first:
            rewind(net, theta_0, mask)  # variant: prune theta_0 first, and ignore the result of level 0
        mask = prune(mask, magnitude(prunable(net, s.prunable)), fraction, s.scope)  # line 5: prune m * theta_t
        if s.rewind == "none":
            mask.apply(dict(net.named_parameters()))  # variant, standard pruning: continue from m * theta_t
        else:
            rewind(net, theta_i, mask, head=s.rewind_head)  # line 7: the ticket f(m * theta_i)
        session.train_level(  # line 4: train f(m * theta_i) to step t
            level,
            mask,
            start=i if level else 0,
            schedule=s.learning_rate(session.cfg.train.lr, level, session.steps),
            moments=session.moments() if level > s.prune_first and not s.reset_optimizer else None,
            hooks=[session.save_weights_at(i)] if level == 0 and i > 0 else [],  # line 1: theta_i
        )


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """The flags of `--method imp`."""

    levels: int = flag("number of levels, including the dense network (default: 10, or as many as --rate allows)", None)
    rate: float = flag("fraction of the weights pruned at each level", 0.1)
    schedule: Literal["linear", "geometric"] = flag("--rate of the original weights, or of the remaining ones", "linear")
    scope: Literal["global", "tensor"] = flag("rank all weights together, or each matrix by itself", "global")
    prunable: Prunable = flag("which parameters the mask covers", "matrices")  # noqa: RUF009
    rewind: str = flag("step to rewind to: 0, a step (500), a part of training (5%), or none (standard pruning)", "0")
    rewind_head: bool = flag("rewind the task's head with the encoder", True)
    prune_first: bool = flag("prune the pre-trained weights at level 1; level 0 is trained for comparison only", False)
    decay: Literal["level", "run", "once"] = flag(
        "learning rate decay: to zero in each level; over all levels, restarted in each (run); or once over the run", "level"
    )
    reset_optimizer: bool | None = flag("a new AdamW at each level (default: unless --rewind none)", None)

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        if self.levels is None:
            set_field(self, "levels", int(min(10, max_levels(self.rate, self.schedule))))
        fractions(self.levels, self.rate, self.schedule)  # raises for a rate or a number of levels that is impossible
        set_field(self, "rewind", _normalize(self.rewind))
        if self.reset_optimizer is None:
            set_field(self, "reset_optimizer", self.rewind != "none")

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        if self.rewind == "none" and "rewind_head" in given:
            raise UserError("--rewind-head has no effect with --rewind none")

    @property
    def fractions(self) -> list[float]:
        """Compute the fraction of the remaining weights that is pruned before each level."""
        return fractions(self.levels, self.rate, self.schedule)

    def rewind_step(self, steps: int) -> int:
        """Return the step i of `steps` whose weights each level starts from; 0 also for `none`."""
        if self.rewind == "none":
            return 0
        percent = self.rewind.endswith("%")
        step = round(float(self.rewind[:-1]) / 100 * steps) if percent else int(self.rewind)
        if step >= steps:
            raise UserError(f"--rewind {self.rewind} is step {step}, and a level has {steps} steps: nothing would be trained")
        return step

    def learning_rate(self, lr: float, level: int, steps: int) -> Callable[[int], float]:
        """Return the learning rate as a function of the step, for a level of `steps` steps."""
        most = max_levels(self.rate, self.schedule)
        most = 10 if math.isinf(most) else int(most)  # independent of --levels: a shorter run is a prefix of a longer one
        return linear_decay(lr, steps, *decay_span(self.decay, level, self.levels, most, self.prune_first))

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        lines, left = ["level 0: the dense network"], 1.0
        for level, fraction in enumerate(self.fractions[1:], 1):
            left *= 1 - fraction
            lines.append(f"level {level}: {1 - left:.1%} pruned ({fraction:.4f} of the remaining weights)")
        return lines


def _normalize(rewind: str) -> str:
    """Normalize a value of --rewind, so that equal values have equal text. Raises `UserError` for an invalid one."""
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
