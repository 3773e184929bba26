"""The results of mask training (Liu et al. 2022) as a table: tickets found on MLM over sparsities, and their losses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.report.cells import fill, percent
from bert_tickets.report.formats import Table, frame, listing
from bert_tickets.report.rows import FULL, PRETRAINED

if TYPE_CHECKING:
    from pandas import DataFrame

PUBLISHED_ROWS = {  # pattern of a row -> its name in published.toml, in the order of the table
    FULL: FULL,
    r"oneshot magnitude by tensor \(prunable matrices\+embeddings\)": "OMP",
    r"imp \((.*, )?prunable matrices\+embeddings, .*scope tensor(, max steps 2792)?\) ticket of MLM(, rewind none)?": "IMP",
    r"mask_training ticket of MLM": "TAMT-MLM",
    r"mask_training \(objective kd\) ticket of MLM": "TAMT-KD",
    r"oneshot random by tensor \(prunable matrices\+embeddings\)": "random",
}
NOTES = (
    "The published scores are means over five tasks, which are inferred from the released scripts. These report the best of "
    "many evaluations, and of MNLI mismatched accuracy; their IMP does not rewind. Ours are of MNLI matched accuracy.",
    "The mean over the five tasks needs a run of each. It is taken for each seed; its standard deviation is over seeds.",
    "MLM loss: of the ticket before training, with the pre-trained head. KD loss: the mean of 1 - cosine of its hidden states "
    "and the dense network's; whether the published ones are cosine or squared distances is unknown. The published losses of "
    "random masks are the range over all sparsities.",
)


def tamt(levels: DataFrame, _: float | None) -> Table | None:
    """Tickets found on MLM, or without training, by row and sparsity: scores, their mean over the paper's tasks, and losses."""
    is_ticket = levels["given"] & levels["source"].isin(["mlm", ""]) & (levels["weights"] == PRETRAINED)
    shown = levels[(is_ticket | (levels["row"] == FULL)) & (levels["task"] != "mlm")]
    if not levels.loc[is_ticket, "method"].str.startswith("mask_training").any():
        return None
    cells = fill(shown, [_cell(shown, *place) for place in shown[["task", "row", "sparsity"]].drop_duplicates().values])
    is_loss = cells["task"].isin(published.LOSSES)
    grids = {"": _scores(cells[~is_loss])}
    if is_loss.any():
        grids["Losses of the tickets before training"] = _losses(cells[is_loss])
    grids[f"Differences to the {FULL}"] = listing(cells[(cells["reference"] != "") & ~is_loss])
    tickets = shown[shown["search"].ne("") & shown["row"].ne(FULL)]
    found_by = [
        f"{row}, {', '.join(map(percent, sorted(sparsities.unique())))}: found by a training with {search}"
        for (row, search), sparsities in tickets.groupby(["row", "search"])["sparsity"]
    ]
    notes = [published.explain("tamt"), *NOTES, *found_by]
    return Table("Mask training: tickets over sparsities (Liu et al. 2022)", grids, cells, notes)


def _cell(levels: DataFrame, task: str, row: str, sparsity: float) -> dict[str, Any]:
    if task not in published.LOSSES:
        return {"task": task, "row": row, "sparsity": sparsity, "reference": "" if row == FULL else FULL}
    there = levels[(levels["task"] == task) & (levels["row"] == row) & (levels["sparsity"] == sparsity)]
    beside = published.tamt(task, published_row(row), sparsity)
    return {"task": task, "row": row, "sparsity": sparsity, "published": beside, "expected": set(there["seed"])}


def published_row(row: str) -> str:
    """The name of a row in published.toml, "" if it has none."""
    return next((name for pattern, name in PUBLISHED_ROWS.items() if re.fullmatch(pattern, row)), "")


def _rows(cells: DataFrame) -> list[tuple[str, float, DataFrame]]:
    """The cells of each row and sparsity, those of the paper first."""
    order = [*PUBLISHED_ROWS.values(), ""]
    groups = [(row, sparsity, found) for (row, sparsity), found in cells.groupby(["row", "sparsity"])]
    return sorted(groups, key=lambda group: (order.index(published_row(group[0])), group[:2]))


def _place(row: str, sparsity: float) -> dict[str, str]:
    return {"row": row, "in the paper": published_row(row), "sparsity": percent(sparsity)}


def _scores(cells: DataFrame) -> DataFrame:
    tasks = published.in_order(cells["task"])
    lines = []
    for row, sparsity, found in _rows(cells):
        line = _place(row, sparsity) | {"mean of five tasks": mean_over_tasks(found, published.TAMT_TASKS)}
        line["published mean"] = published.tamt("score", published_row(row), sparsity)
        texts = dict(zip(found["task"], found["text"], strict=True))
        lines.append(line | {published.name(task): texts.get(task, "") for task in tasks})
    wide = frame(lines)
    return wide.loc[:, (wide != "").any()]


def mean_over_tasks(cells: DataFrame, tasks: Sequence[str]) -> str:
    """The mean over tasks, for each seed that has them all: mean ± standard deviation (number of seeds)."""
    by_task = dict(zip(cells["task"], cells["values"], strict=True))
    if not by_task.keys() >= {*tasks}:
        return ""
    seeds = set.intersection(*(set(by_task[task]) for task in tasks))
    means = [mean(by_task[task][seed] for task in tasks) for seed in sorted(seeds)]
    if not means:
        return ""
    return f"{mean(means):.1f}" + (f" ± {stdev(means):.1f}" if len(means) > 1 else "") + f" ({len(means)})"


def _losses(cells: DataFrame) -> DataFrame:
    lines = []
    for row, sparsity, found in _rows(cells):
        line = _place(row, sparsity)
        for cell in found.itertuples():
            name = published.name(cell.task)
            line |= {name: cell.text, f"published {name}": cell.published}
        lines.append(line)
    return frame(lines)
