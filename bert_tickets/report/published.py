"""The numbers of Chen et al. 2020, of Liu et al. 2022 for mask training, of Prasanna et al. 2020 for heads and MLPs, and of Chen
et al. 2021 for EarlyBERT (published.toml), to be printed beside ours. Sparsities are fractions."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
METHOD: str = DATA["method"]  # that finds the paper's tickets
TASKS: list[str] = DATA["tasks"]  # in the paper's order
TAMT_TASKS: list[str] = DATA["tamt"]["tasks"]  # over which the means of mask training's paper are
LOSSES: dict[str, str] = DATA["tamt"]["losses"]  # of scored tickets, which tables have as tasks: task -> name
BERTPLAYS_TASKS: list[str] = DATA["bertplays"]["tasks"]  # of Prasanna et al. 2020; WNLI is the last
EARLYBERT: dict[str, Any] = DATA["earlybert"]  # Chen et al. 2021
SWEEP_TASKS = {  # of others: TASKS
    "tamt": TAMT_TASKS,
    "importance": BERTPLAYS_TASKS[:-1],
    "stability": BERTPLAYS_TASKS[:-1],
    "earlybert": EARLYBERT["base"]["tasks"],
    "earlybert_pretrain": EARLYBERT["pretraining-base"]["tasks"],
}
TRANSFER_SPARSITY: float = DATA["transfer"]["sparsity"] / 100  # of Figure 2


def place(task: str) -> tuple[int, str]:
    """A sort key: the paper's order, then other tasks by name."""
    return (TASKS.index(task) if task in TASKS else len(TASKS)), task


def in_order(found: Iterable[str]) -> list[str]:
    """Each task once, in the paper's order; other tasks last."""
    return sorted(set(found), key=place)


def name(task: str) -> str:
    """A task as the paper writes it; an unknown one unchanged."""
    return _of_task(DATA["names"], task) or LOSSES.get(task, task)


def source(table: str) -> str:
    """The mark of the source of `table2`, `table4`, `transfer`, `tamt`, `bertplays` or `earlybert`, such as [fig]."""
    return f"[{DATA[table]['source']}]"


def explain(*tables: str) -> str:
    """The marks of these tables in words."""
    return explain_marks(*(DATA[table]["source"] for table in tables))


def explain_marks(*marks: str) -> str:
    """The marks of sources, such as fig, in words."""
    return "Published numbers: " + "; ".join(f"[{mark}] {DATA['sources'][mark]}" for mark in dict.fromkeys(marks)) + "."


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


def tamt(what: str, row: str, sparsity: float) -> str:
    """A number of mask training's paper with the mark of its source, or the range over its seeds; "" if there is none.

    `what` is `score`, `mlm_loss` or `kd_loss`. Rows are `full BERT`, `OMP`, `IMP`, `TAMT-MLM`, `TAMT-KD`, `random`.
    """
    table = DATA["tamt"]
    columns = dict(zip(table["sparsities"], table[what].get(row, []), strict=False))
    value = columns.get(50 if row == "full BERT" else round(100 * sparsity, 1))  # the full BERT's stands in every column
    if value is None:
        return ""
    ends = [value] if isinstance(value, (int, float)) else [min(value), max(value)]
    return " to ".join(f"{end:g}" if what != "score" else f"{end:.1f}" for end in ends) + f" {source('tamt')}"


# ---- heads and MLPs (Prasanna et al. 2020) ----


def bertplays(row: str, task: str) -> str:
    """A score x 100, mean ± standard deviation, with the mark of its source; "" if there is none.

    Rows are `majority class`, `full BERT`, and `s good, pruned`, `super bad, retrained`, `heads only, pruned` and the like.
    """
    mean, sd = (_bertplays(DATA["bertplays"][part].get(row), task) for part in ("mean", "sd"))
    return "" if mean is None else f"{mean:.1f}{'' if sd is None else f' ± {sd:.0f}'} {source('bertplays')}"


def bertplays_mean(row: str, tasks: Iterable[str]) -> float | None:
    """The mean over tasks of a row's scores; None unless all are given."""
    values = [_bertplays(DATA["bertplays"]["mean"].get(row), task) for task in tasks]
    return None if None in values or not values else sum(values) / len(values)


def bertplays_percent(row: str, task: str) -> str:
    """The percent of parameters kept, embeddings' 21 % taken off, of `s good`, `super good` or `m good`; "" if not given."""
    found = DATA["bertplays"]["percent"].get(row, {})
    value = _bertplays(found.get("values"), task)
    text = "" if value is None else f"{value}" if isinstance(value, int) else " ± ".join(map(str, value))
    return text and f"{text} [{found['source']}]"


def bertplays_kept(task: str) -> tuple[list[int], list[int]] | None:
    """The kept heads and the kept MLPs of the good masks of five seeds; None for another task."""
    pairs = DATA["bertplays"]["kept"].get(task)
    return pairs and ([heads for heads, _ in pairs], [mlps for _, mlps in pairs])


def bertplays_value(part: str, key: str, task: str) -> float | None:
    """A number of a part of `[bertplays]`: `super` or `agreement` of `heads` or `mlps`, `agreement` `q_p`, `covered` `m good`."""
    return _bertplays(DATA["bertplays"][part].get(key), task)


def bertplays_mark(part: str) -> str:
    """The mark of the source of a part of `[bertplays]`, such as [masks]."""
    return f"[{DATA['bertplays'][part]['source']}]"


def _bertplays(values: list[Any] | None, task: str) -> Any:
    return dict(zip(BERTPLAYS_TASKS, values or [], strict=False)).get(task)


# ---- EarlyBERT (Chen et al. 2021) ----


def earlybert(part: str, row: str, task: str) -> str:
    """A score x 100 of EarlyBERT's paper with the mark of its source; "" if there is none.

    `part` is `base`, `large`, `heads-only`, `pretraining-base` or `pretraining-large`, a row `full BERT`, `EarlyBERT`, `random`
    or `LayerDrop`.
    """
    found = EARLYBERT.get(part, {"tasks": [], "rows": {}})
    value = dict(zip(found["tasks"], found["rows"].get(row, []), strict=False)).get(task)
    return "" if value is None else f"{value:g} {source('earlybert')}"


def earlybert_tradeoff() -> dict[tuple[int, int], tuple[float, float]]:
    """The time saved in percent and the score, by the percent of neurons and the number of a layer's 12 heads that are gone."""
    table = EARLYBERT["tradeoff"]
    found = {int(neurons): pairs for neurons, pairs in table.items() if neurons != "heads"}
    return {(neurons, heads): pair for neurons, pairs in found.items() for heads, pair in zip(table["heads"], pairs, strict=True)}


def _of_task(values: list[Any] | None, task: str) -> Any:
    return values[TASKS.index(task)] if values and task in TASKS else None
