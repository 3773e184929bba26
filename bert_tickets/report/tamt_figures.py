"""Figures of mask training (Liu et al. 2022): how far masks move, and scores over losses. Each returns its table as text."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.cells import fill, percent
from bert_tickets.report.figures import MARKED, UNITS, evaluations_note, is_marked, seeds_note
from bert_tickets.report.formats import frame, markdown_grid, scores
from bert_tickets.report.pictures import draw_lines, draw_points
from bert_tickets.report.results import comparable
from bert_tickets.report.tables import remarks
from bert_tickets.runs.directory import result

if TYPE_CHECKING:
    from pandas import DataFrame

DISTANCE = "normalized Hamming distance: covered weights on which the mask and the initial one differ (%)"
FIVE = "five-task mean"
TICKET = ["row", "sparsity"]  # with the mask's hash in the row


def draw_distance(levels: DataFrame, output: Path, title: str | None) -> str:
    """Draw the distance of trained masks from their initial masks at each refresh: a panel per sparsity, a line per row."""
    import pandas as pd

    own = levels[levels["method"].str.startswith("mask_training") & ~levels["given"]]
    if own["setting"].nunique() > 1:  # lines of their own
        own = own.assign(row=own["row"] + own["setting"].map(lambda words: words and f", {words}"), setting="")
    own = comparable(own)
    if own.empty:
        raise UserError("no finished run of --method mask-training")
    refreshes = [
        {"sparsity": run.sparsity, "line": run.row, "x": refresh["step"], "distance": 100 * refresh["from_start"]}
        for run in own.itertuples()
        for refresh in result(Path(run.run), run.level)["refreshes"]
    ]
    pools = pd.DataFrame(refreshes).groupby(["sparsity", "x", "line"])["distance"]
    points = pools.agg(mean="mean", sd="std", n="count").reset_index()
    points = points.assign(panel=points["sparsity"].map(percent), unit="Hamming distance (%)", hollow=False)
    draw_lines(output, title or "Distance of trained masks from their initial masks", "step", points, seeds_note(points["n"]))
    spread = points["sd"].map(lambda sd: "" if math.isnan(sd) else f" ± {sd:.2f}")
    text = points["mean"].map("{:.2f}".format) + spread + points["n"].map(" ({})".format)
    wide = points.assign(text=text).pivot(index=["sparsity", "x"], columns="line", values="text").fillna("").reset_index()
    wide = wide.assign(sparsity=wide["sparsity"].map(percent), x=wide["x"].map(str)).rename(columns={"x": "step"})
    return f"{DISTANCE}\n{markdown_grid(wide)}"


def draw_losses(levels: DataFrame, output: Path, title: str | None) -> str:
    """Draw the scores of trained tickets over their losses without training: a point per mask, a panel per task and loss.

    A score is a mean over trainings of the mask. Colours are kinds of tickets; masks saved at several steps are of one kind.
    """
    import pandas as pd

    given = comparable(levels[levels["given"]])
    given = given.assign(row=given["row"] + ", mask " + given["mask_sha256"].str[:8])
    known = given[given["value"].notna()]
    is_loss = known["task"].isin(published.LOSSES)
    given = given[given["row"].isin({*known.loc[is_loss, "row"]} & {*known.loc[~is_loss, "row"]})]
    if given.empty:
        raise UserError("no ticket was both trained on a task and scored by lt_pretrain.py --score --mask FILE")
    cells = fill(given, given[["task", *TICKET]].drop_duplicates().to_dict("records"))
    pairs = scores_and_losses(cells)
    panels, lines = [], []
    for task in published.in_order(pairs["task"]):
        line = {"task": published.name(task)}
        for loss, name in published.LOSSES.items():
            panel = pairs[(pairs["task"] == task) & (pairs["task_loss"] == loss)]
            rho = panel["mean"].rank().corr(panel["mean_loss"].rank())  # Spearman's
            text = "undefined" if math.isnan(rho) else f"{rho:.2f}"
            line[name] = f"{text} ({len(panel)})"
            heading = f"{line['task']}: ρ = {text.replace('-', '−')}, n = {len(panel)}"
            panels.append(panel.assign(row=task, column=f"{name} ({UNITS[name]})", title=heading))
        lines.append(line)
    points = pd.concat(panels)
    note = "a point per ticket; ρ: Spearman's rank correlation of n tickets" + evaluations_note(cells)
    note += f"\nhollow: {MARKED}" if points["hollow"].any() else ""
    draw_points(output, title or "Scores of tickets over their losses without training", points, note)
    grids = [markdown_grid(frame(lines)), markdown_grid(scores(cells))]
    return "\n".join(["Spearman's rank correlation of scores and losses (tickets)", *grids, *remarks(cells)])


def scores_and_losses(cells: DataFrame) -> DataFrame:
    """The mean score of each ticket on each task, and over the paper's five, beside each of its losses, as points to draw."""
    import pandas as pd

    known = cells[cells["n"] > 0].assign(hollow=is_marked)
    is_loss = known["task"].isin(published.LOSSES)
    of_five = known[known["task"].isin(published.TAMT_TASKS)].groupby(TICKET, sort=False)
    five = of_five.agg(mean=("mean", "mean"), hollow=("hollow", "any"), tasks=("task", "count")).reset_index()
    five = five[five["tasks"] == len(published.TAMT_TASKS)].assign(task=FIVE, metric="score")
    found = pd.concat([known[~is_loss], five]).merge(known[is_loss], on=TICKET, suffixes=("", "_loss"))
    return found.assign(
        x=found["mean_loss"],
        y=found["mean"],
        unit=[UNITS.get(metric, f"{metric} × 100") for metric in found["metric"]],
        line=[re.sub(r" \(step \d+\)|, step \d+(?=\))|, mask \w+$", "", row) for row in found["row"]],
        hollow=found["hollow"] | found["hollow_loss"],
    )
