"""Figure 2 as a table: tickets trained on other tasks than the one they were found on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.cells import (
    CLOSE,
    FULL,
    NO_RUN,
    ONE_SHOT,
    Cell,
    ResultSet,
    compare,
    is_published,
    percent,
    row_name,
)
from bert_tickets.report.formats import frame, listing, signed
from bert_tickets.report.results import PRETRAINED
from bert_tickets.report.significance import paired

if TYPE_CHECKING:
    from pandas import DataFrame

Matrix = Mapping[str, Mapping[str, Cell]]  # ticket's row -> target task -> cell


def transfer(found: ResultSet, sparsity: float | None) -> tuple:
    """TRANSFER(source, target) minus the full BERT of the target, at 70 % or at the nearest sparsity with runs."""
    title = "Transfer of tickets at {} sparsity (the paper's Figure 2)"
    at = transfer_sparsity(found, sparsity)
    if at is None:
        return title, {}, [], []
    targets = found.dense_tasks
    matrix = transfer_matrix(found, at, {task: found.full(task) for task in targets})
    beside = [
        {"ticket": row, **{published.name(task): signed(published.transfer(key, task), 2) for task in targets}}
        | {"at least same-task": str(published.at_least_same_task(key))}
        for row in matrix
        if (key := _published_row(row))
    ]
    notes = [
        "A cell of the matrix: the mean paired difference to the target's full BERT in points (pairs of seeds).",
        "At least same-task: on how many other targets a ticket scores at least as high as the target's own, of those where both "
        "were trained; as published, of all others.",
        published.explain("transfer") + " Means of three runs of BERT-base.",
    ]
    cells = [cell for task in targets for cell in (found.full(task), *(matrix[row][task] for row in matrix))]
    heading = f"Published {published.source('transfer')}, at {percent(published.TRANSFER_SPARSITY)}"
    grids = {"": matrix_grid(matrix), heading: frame(beside)}
    grids[f"Differences to the {FULL}"] = listing([cell for cell in cells if cell.reference and cell.results])
    return title.format(percent(at)), grids, cells, notes


def transfer_sparsity(found: ResultSet, asked: float | None) -> float | None:
    """Where tickets were trained on other tasks: the sparsity that was asked for, or the nearest to the paper's.

    None without such tickets. Raises `UserError` if there are none at the sparsity asked for.
    """
    given = [r for r in found.results if r.given and r.weights == PRETRAINED and r.source != r.task]
    there = sorted({round(r.sparsity, 3) for r in given if r.source or found.row_of(r) == ONE_SHOT})
    wanted = published.TRANSFER_SPARSITY if asked is None else asked
    at = min(there, key=lambda level: abs(level - wanted), default=None)
    if at is not None and asked is not None and abs(at - asked) > CLOSE:
        listed = ", ".join(map(percent, there))
        raise UserError(f"no ticket of {percent(asked)} was trained on another task; there are some of {listed}")
    return at


def transfer_matrix(found: ResultSet, at: float, references: Mapping[str, Cell]) -> dict[str, dict[str, Cell]]:
    """Every ticket at a sparsity (rows) on every task of `references` (columns), compared with the reference.

    Tickets of a task by each method; then one-shot pruning and other tickets of no task.
    """
    there = [r for r in found.results if abs(r.sparsity - at) < CLOSE and r.weights == PRETRAINED and r.rewind == "0"]
    found_on = {(found.name_of(r), r.source) for r in there if r.source}
    rows: dict[str, tuple[str, str]] = {}  # row -> method's name, task
    for name in sorted({name for name, _ in found_on}, key=lambda name: (not is_published(name), name)):
        tasks = published.in_order(task for other, task in found_on if other == name)
        rows |= {row_name(name, source=task): (name, task) for task in tasks}
    rows |= dict.fromkeys([ONE_SHOT, *sorted({found.row_of(r) for r in there if not r.source})], ("", ""))
    swept = tuple(sorted({r.seed for r in there if r.given and r.source != r.task}))  # fewer than other sweeps may have
    columns = {}
    for target, reference in references.items():
        cells = []
        for row, (name, task) in rows.items():
            cell = found.ticket(target, name, at) if task == target else found.cell(target, row, at)
            if task != target:
                is_expected = bool(task or row == ONE_SHOT)
                sweep = "transfer" if is_expected and name in ("", published.METHOD) else ""
                seeds = swept if is_expected else tuple(r.seed for r in cell.results)
                cell = replace(cell, seeds=seeds, sweep=sweep, source=task)
            cells.append(replace(cell, row=row, published=_beside_figure2(row, target, at)))
        columns[target] = {cell.row: cell for cell in compare(reference, cells)}
    return {row: {target: columns[target][row] for target in columns} for row in rows}


def _published_row(row: str) -> str | None:
    """The row of the published Figure 2 for one of ours: a task, or one-shot pruning."""
    rows = {row_name(published.METHOD, source=task): task for task in published.TASKS} | {ONE_SHOT: ONE_SHOT}
    return rows.get(row)


def _beside_figure2(row: str, target: str, at: float) -> str:
    key = _published_row(row) if abs(at - published.TRANSFER_SPARSITY) < CLOSE else None
    return f"{signed(published.transfer(key, target), 2)} {published.source('transfer')}" if key else ""


def matrix_grid(matrix: Matrix) -> DataFrame:
    """The differences by ticket (lines) and target task (columns), and the last column of Figure 2."""
    return frame(
        [
            {"ticket": row, **{published.name(task): _difference(cell) for task, cell in columns.items()}}
            | {"at least same-task": at_least_same_task(matrix, row)}
            for row, columns in matrix.items()
        ]
    )


def at_least_same_task(matrix: Matrix, row: str) -> str:
    """On how many other targets a ticket scores at least as high as the target's own by the same method, of how many.

    A ticket of no task is compared with the paper's method.
    """
    method = row.partition(" ticket of ")[0] if " ticket of " in row else published.METHOD
    pairs = []
    for target, cell in matrix[row].items():
        own = row_name(method, source=target)
        if own != row and own in matrix and (pair := paired(cell.summary, matrix[own][target].summary)):
            pairs.append(pair.mean >= 0)
    return f"{sum(pairs)} of {len(pairs)}" if pairs else NO_RUN


def _difference(cell: Cell) -> str:
    """The difference and its number of pairs; the score, if there is nothing to compare it with."""
    if cell.difference is None:
        return cell.text if not cell.summary.n else f"{cell.text}, no {FULL}"
    return f"{signed(cell.difference.mean, 2)} ({cell.count(len(cell.difference.seeds))})"
