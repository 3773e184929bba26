"""Figure 2 as a table: tickets trained on other tasks than the one they were found on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.cells import NO_RUN, count, fill, full, percent, signed
from bert_tickets.report.formats import Table, frame, listing
from bert_tickets.report.results import own_tickets
from bert_tickets.report.rows import FULL, ONE_SHOT, PRETRAINED, is_published, plainness, row_name

if TYPE_CHECKING:
    from pandas import DataFrame


def transfer(levels: DataFrame, sparsity: float | None, relative: str = "dense") -> Table | None:
    """TRANSFER(source, target) minus the full BERT of the target (`dense`) or its own ticket (`same-task`), at 70 % or at the
    nearest sparsity with runs."""
    at = transfer_sparsity(levels, sparsity)
    if at is None:
        return None
    cells = transfer_cells(levels, at, relative)
    of_tickets = cells[cells["ticket"] != ""]
    notes = [
        "A cell of the matrix: the mean paired difference to the target's full BERT in points (pairs of seeds).",
        "At least same-task: on how many other targets a ticket scores at least as high as the target's own, of those where both "
        "were trained; as published, of all others.",
        published.explain("transfer") + " Means of three runs of BERT-base.",
    ]
    lines = []
    for ticket, key in of_tickets.loc[of_tickets["in_figure_2"] != "", ["ticket", "in_figure_2"]].drop_duplicates().values:
        differences = {
            published.name(task): signed(published.transfer(key, task), 2) for task in published.in_order(cells["task"])
        }
        lines.append({"ticket": ticket} | differences | {"at least same-task": str(published.at_least_same_task(key))})
    heading = f"Published {published.source('transfer')}, at {percent(published.TRANSFER_SPARSITY)}"
    grids = {"": matrix(levels, of_tickets), heading: frame(lines)}
    grids[f"Differences to the {FULL}"] = listing(of_tickets[of_tickets["verdict"] != NO_RUN])
    return Table(f"Transfer of tickets at {percent(at)} sparsity (the paper's Figure 2)", grids, cells, notes)


def transfer_sparsity(levels: DataFrame, asked: float | None) -> float | None:
    """Where tickets were trained on other tasks: the sparsity that was asked for, or the nearest to the paper's.

    None without such tickets. Raises `UserError` if there are none at the sparsity asked for.
    """
    is_given = levels["given"] & ~levels["pruned"] & (levels["weights"] == PRETRAINED) & (levels["source"] != levels["task"])
    there = sorted(set(levels.loc[is_given & ((levels["source"] != "") | (levels["row"] == ONE_SHOT)), "sparsity"]))
    wanted = published.TRANSFER_SPARSITY if asked is None else round(asked, 3)
    if there and asked is not None and wanted not in there:
        listed = ", ".join(map(percent, there))
        raise UserError(f"no ticket of {percent(wanted)} was trained on another task; there are some of {listed}")
    return min(there, key=lambda level: abs(level - wanted), default=None)


def transfer_cells(levels: DataFrame, at: float, relative: str) -> DataFrame:
    """Every ticket at a sparsity on every task, and the tasks' full BERTs.

    The column `ticket` names a ticket in the same way on all tasks ("" for the full BERT), `in_figure_2` is its row in the
    published figure: a task, one-shot pruning, or "". A ticket of no task is compared with own tickets of the plainest method.
    """
    is_trained = (levels["weights"] == PRETRAINED) & (levels["rewind"] == "") & ~levels["pruned"]
    there = levels[(levels["sparsity"] == at) & is_trained]
    found = sorted(set(zip(there["method"], there["source"], strict=True)), key=lambda pair: (pair[0], published.place(pair[1])))
    tickets = {row_name(method, source=source): (method, source) for method, source in found if source}
    plainest = min((method for method, _ in tickets.values()), key=plainness, default=published.METHOD)
    of_no_task = [ONE_SHOT, *there.loc[there["source"] == "", "row"]]
    wanted: list[dict[str, Any]] = []
    for target in published.in_order([*levels.loc[levels["row"] == FULL, "task"], *own_tickets(there)["task"]]):
        wanted.append(full(target) | {"ticket": "", "in_figure_2": ""})
        for ticket, (method, source) in (tickets | dict.fromkeys(of_no_task, (plainest, ""))).items():
            row, sweep = (row_name(method), "table2") if source == target else (ticket, "transfer")
            key = ticket if ticket == ONE_SHOT else source if is_published(method) else ""
            cell = {"task": target, "row": row, "sparsity": at, "ticket": ticket, "in_figure_2": key, "source": source}
            cell |= {"reference": FULL if relative == "dense" else row_name(method), "sweep": sweep if key else ""}
            if key and at == published.TRANSFER_SPARSITY:
                cell["published"] = f"{signed(published.transfer(key, target), 2)} {published.source('transfer')}"
            wanted.append(cell)
    return fill(levels, wanted)


def matrix(levels: DataFrame, cells: DataFrame) -> DataFrame:
    """The differences by ticket (lines) and target task (columns), and the last column of Figure 2."""
    texts = cells.assign(text=[_difference(cell) for cell in cells.to_dict("records")], target=cells["task"].map(published.name))
    wide = texts.pivot_table(index="ticket", columns="target", values="text", aggfunc="first", sort=False)
    same = transfer_cells(levels, cells["sparsity"].iloc[0], "same-task")
    others = same[(same["source"] != same["task"]) & (same["pairs"] > 0)]
    is_at_least = (others["difference"] >= 0).groupby(others["ticket"])
    counts = is_at_least.sum().astype(str) + " of " + is_at_least.count().astype(str)
    wide["at least same-task"] = counts.reindex(wide.index).fillna(NO_RUN)
    return wide.reset_index().rename_axis(columns=None)


def _difference(cell: Mapping[str, Any]) -> str:
    """The difference and its number of pairs; the score, if there is nothing to compare it with."""
    if not cell["pairs"] > 0:
        return cell["text"] + (f", no {cell['reference']}" if cell["n"] else "")
    return f"{signed(cell['difference'], 2)} ({count(cell, int(cell['pairs']))})"
