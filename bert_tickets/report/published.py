"""The numbers of Chen et al. 2020 (published.toml), to be printed beside ours. Sparsities are fractions."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
METHOD: str = DATA["method"]  # that finds the paper's tickets
TASKS: list[str] = DATA["tasks"]  # in the paper's order
TRANSFER_SPARSITY: float = DATA["transfer"]["sparsity"] / 100  # of Figure 2


def place(task: str) -> tuple[int, str]:
    """A sort key: the paper's order, then other tasks by name."""
    return (TASKS.index(task) if task in TASKS else len(TASKS)), task


def in_order(found: Iterable[str]) -> list[str]:
    """Each task once, in the paper's order; other tasks last."""
    return sorted(set(found), key=place)


def name(task: str) -> str:
    """A task as the paper writes it; an unknown one unchanged."""
    return _of_task(DATA["names"], task) or task


def source(table: str) -> str:
    """The mark of the source of `table2`, `table4` or `transfer`: [fig] or [notes]."""
    return f"[{DATA[table]['source']}]"


def explain(*tables: str) -> str:
    """The marks of these tables in words."""
    marks = dict.fromkeys(DATA[table]["source"] for table in tables)
    return "Published numbers: " + "; ".join(f"[{mark}] {DATA['sources'][mark]}" for mark in marks) + "."


def table2(row: str, task: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation x 100 in Table 2, None if not given.

    Rows are `full BERT`, `ticket`, `random pruning`, `random weights`, `shuffled weights`.
    """
    table = DATA["table2"]
    return _of_task(table["mean"][row], task), _of_task(table["sd"].get(row), task)


def beside_table2(row: str, task: str) -> str:
    """A score of Table 2 with its sparsity and the mark of its source; "" if there is none."""
    (mean, sd), at = table2(row, task), sparsity(task)
    if mean is None or at is None:
        return ""
    spread, level = "" if sd is None else f" ± {sd:.1f}", "" if row == "full BERT" else f" at {100 * at:g} %"
    return f"{mean:.1f}{spread}{level} {source('table2')}"


def sparsity(task: str, table: str = "table2") -> float | None:
    """The highest sparsity with a matching ticket: within one standard deviation of the full BERT (`table2`), or at least its
    mean (`table4`)."""
    percent = _of_task(DATA[table]["sparsity"], task)
    return None if percent is None else percent / 100


def transfer(row: str, target: str) -> float | None:
    """TRANSFER(row, target) minus the full BERT of the target, in points; a row is a task or `one-shot pruning`."""
    return _of_task(DATA["transfer"]["rows"].get(row), target)


def at_least_same_task(row: str) -> int | None:
    """The last column of Figure 2: on how many other targets a ticket scores at least as high as the target's own."""
    return DATA["transfer"]["at_least_same_task"].get(row)


def _of_task(values: list[Any] | None, task: str) -> Any:
    return values[TASKS.index(task)] if values and task in TASKS else None
