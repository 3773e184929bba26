"""The paper's tables as data (published.toml), to stand beside what runs come to.

How each number was come by is said with it: none was checked against the paper's own text.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FULL, TICKET = "full BERT", "f(x, m_IMP * theta_0)"  # Table 2's rows
RANDOM_PRUNING, RANDOM_WEIGHTS, SHUFFLED_WEIGHTS = "random pruning", "random weights", "shuffled weights"
ROWS = (FULL, TICKET, RANDOM_PRUNING, RANDOM_WEIGHTS, SHUFFLED_WEIGHTS)


@dataclass(frozen=True)
class Figure:
    """A published number, x 100: a mean, and its standard deviation where one is given."""

    mean: float
    sd: float | None = None


@functools.cache
def _read() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))


def tasks() -> list[str]:
    """The paper's eleven tasks, in its order."""
    return _read()["tasks"]


def name(task: str) -> str:
    """A task as the paper writes it; one that it has not as it is."""
    return _by_task(_read()["names"]).get(task, task)


def metric(task: str) -> str | None:
    """The metric that the paper reports of a task."""
    return _by_task(_read()["metrics"]).get(task)


def source(table: str) -> str:
    """How `table2`, `table4` or `transfer` was come by, in words."""
    return _read()["sources"][_read()[table]["source"]]


def table2(row: str, task: str) -> Figure | None:
    """A figure of Table 2, of one of `ROWS`."""
    mean, sd = (_by_task(_read()["table2"][kind].get(row, [])).get(task) for kind in ("mean", "sd"))
    return None if mean is None else Figure(mean, sd)


def sparsity(task: str, table: str = "table2") -> float | None:
    """The highest sparsity with winning tickets, a share: within one standard deviation (`table2`), or matching or exceeding
    the full BERT (`table4`)."""
    percent = _by_task(_read()[table]["sparsity"]).get(task)
    return None if percent is None else percent / 100


def transfer(origin: str, target: str) -> float | None:
    """TRANSFER(origin, target) minus the full BERT of the target, in points; `origin` is a task or `one-shot`."""
    return _by_task(_read()["transfer"]["rows"].get(origin, [])).get(target)


def transfer_sparsity() -> float:
    """Where Figure 2 stands, a share."""
    return _read()["transfer"]["sparsity"] / 100


def at_least_same_task(origin: str) -> int | None:
    """On how many targets a ticket does at least as well as the target's own, as Figure 2 says."""
    return _read()["transfer"]["at_least_same_task"].get(origin)


def _by_task(values: list[Any]) -> dict[str, Any]:
    return dict(zip(tasks(), values, strict=True)) if values else {}
