"""What each level removes, and how the learning rate decays: pure functions of the settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from bert_tickets.errors import UserError


def fractions(levels: int, rate: float, schedule: Literal["linear", "geometric"]) -> list[float]:
    """The share of what is left that goes before each level; level 0 is the dense network.

    `linear` removes `rate` of the *original* weights a level: 0, 1/10, 1/9, ..., 1/2 for ten levels at 0.1, the only way
    to the published sparsities. `geometric` removes `rate` of what is left: Algorithm 1 to the letter, 1 - 0.9^k.
    """
    if not 0 < rate < 1:
        raise UserError(f"a rate is between 0 and 1, and {rate} is not")
    if levels < 1:
        raise UserError(f"a run has one level at least, and {levels} were asked for")
    if schedule == "geometric":
        return [0.0] + [rate] * (levels - 1)
    step, most = Fraction(str(rate)), max_levels(rate, schedule)  # exact: in floats 0.1 / (1 - 0.1) is not 1/9
    if levels > most:
        raise UserError(
            f"--levels {levels}: the last would remove {float((levels - 1) * step):.0%} of the weights; "
            f"at --rate {rate} there are {most} levels at most, the dense one counted (--schedule geometric has no end)"
        )
    return [0.0] + [float(step / (1 - k * step)) for k in range(levels - 1)]


def max_levels(rate: float, schedule: str) -> float:
    """How many levels a schedule has room for, the dense one counted."""
    if schedule == "geometric" or not 0 < rate < 1:
        return math.inf
    return math.ceil(1 / Fraction(str(rate)))


def linear_decay(lr: float, steps: int, levels: int = 1, level: int = 0) -> Callable[[int], float]:
    """The learning rate by the step of level `level`, where it decays from `lr` to zero over `levels` levels of `steps` steps."""
    return lambda step: lr * max(0.0, 1 - (level * steps + step) / (levels * steps))


def decay_span(decay: str, level: int, levels: int, schedule_levels: int, prune_first: bool) -> tuple[int, int]:
    """How many levels one decay of the learning rate spans, and which of them `level` is.

    `level`: its own, to zero within each (the paper). `run`: the decay over all `schedule_levels` restarts at every level,
    so that a level sees the first part of it (LT_glue.py and LT_squad.py). `once`: one decay over the `levels` of the run,
    which never restarts and reaches zero at its end (the released standard pruning). With `prune_first` level 0 is trained
    for comparison only, and decays by itself.
    """
    if decay == "run":
        return schedule_levels, 0
    if decay == "level" or (prune_first and level == 0):
        return 1, 0
    return levels - prune_first, level - prune_first
