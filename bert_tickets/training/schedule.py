"""The fraction that each level prunes, and the decay of the learning rate: pure functions of the settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from bert_tickets.errors import UserError


def fractions(levels: int, rate: float, schedule: Literal["linear", "geometric"]) -> list[float]:
    """Return the fraction of the remaining weights to prune before each level; level 0 is the dense network.

    `linear` prunes `rate` of the *original* weights per level: 0, 1/10, 1/9, ..., 1/2 for ten levels at 0.1, which gives the
    published sparsities. `geometric` prunes `rate` of the remaining weights, as Algorithm 1 says: a density of 0.9^k.
    """
    if not 0 < rate < 1:
        raise UserError(f"--rate {rate}: must be between 0 and 1")
    if not 1 <= levels < 1000:
        raise UserError(f"--levels {levels}: must be from 1 to 999")
    if schedule == "geometric":
        return [0.0] + [rate] * (levels - 1)
    step, most = Fraction(str(rate)), max_levels(rate, schedule)  # exact: in floats 0.1 / (1 - 0.1) is not 1/9
    if levels > most:
        raise UserError(
            f"--levels {levels}: the last one would prune {float((levels - 1) * step):.0%} of the weights; "
            f"--rate {rate} allows {most} levels, including the dense one (--schedule geometric has no limit)"
        )
    return [0.0] + [float(step / (1 - k * step)) for k in range(levels - 1)]


def max_levels(rate: float, schedule: str) -> float:
    """Return the largest number of levels of a schedule, including the dense one."""
    if schedule == "geometric" or not 0 < rate < 1:
        return math.inf
    return math.ceil(1 / Fraction(str(rate)))


def linear_decay(lr: float, steps: int, levels: int = 1, level: int = 0) -> Callable[[int], float]:
    """Return the learning rate by step in level `level` of a decay from `lr` to zero over `levels` levels of `steps` steps."""
    return lambda step: lr * max(0.0, 1 - (level * steps + step) / (levels * steps))


def decay_span(decay: str, level: int, levels: int, schedule_levels: int, prune_first: bool) -> tuple[int, int]:
    """Return the number of levels that one decay of the learning rate spans, and the index of `level` among them.

    `level`: a decay to zero in each level (the paper). `run`: a decay over `schedule_levels` that restarts at every level, so
    that a level sees only its first part (the released LT_glue.py and LT_squad.py). `once`: one decay over the `levels` of the
    run (the released standard pruning). With `prune_first`, level 0 is for comparison only, and decays separately.
    """
    if decay == "run":
        return schedule_levels, 0
    if decay == "level" or (prune_first and level == 0):
        return 1, 0
    return levels - prune_first, level - prune_first
