"""The paper's figures over our runs: each function draws one from comparable levels, and returns the table behind it as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import TYPE_CHECKING

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.cells import best_of, percent
from bert_tickets.report.formats import frame, markdown_grid
from bert_tickets.report.pictures import draw_heat_map, draw_lines
from bert_tickets.report.results import comparable, own_tickets
from bert_tickets.report.rows import FULL
from bert_tickets.report.tables import curves, remarks
from bert_tickets.report.transfer import transfer
from bert_tickets.runs.integrity import read_mask

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from bert_tickets.masking.mask import Mask

UNITS = {"accuracy": "accuracy (%)", "f1": "F1 (%)", "matthews": "Matthews × 100", "pearson": "Pearson × 100"}
UNITS |= {"MLM loss": "cross-entropy", "KD loss": "1 - cosine"}
MARKED = "a value is undefined or has a warning"


def draw_curves(levels: DataFrame, output: Path, title: str | None) -> str:
    """Draw the metric over sparsity, one panel per task and one line per row (Figure 11)."""
    table = curves(levels)
    shown = table.cells[table.cells["n"] > 0].sort_values("task", key=lambda tasks: tasks.map(published.place), kind="stable")
    if shown.empty:
        raise UserError("these runs have no finished level with a defined value")
    points = shown.assign(
        panel=shown["task"].map(published.name),
        unit=[UNITS.get(metric, f"{metric} × 100") for metric in shown["metric"]],
        line=shown["row"],
        x=(100 * shown["sparsity"]).where(shown["row"] != FULL),
        hollow=is_marked(shown),
    )
    tickets = points[points["row"] != FULL]
    note = seeds_note(tickets["n"]) + evaluations_note(shown) + (f"; hollow: {MARKED}" if tickets["hollow"].any() else "")
    draw_lines(output, title or "Tickets over sparsities", "pruned weights (%)", points, note)
    return "\n".join([markdown_grid(table.grids[""]), *remarks(table.cells)])


def draw_transfer(levels: DataFrame, output: Path, title: str | None, sparsity: float, relative: str = "dense") -> str:
    """Draw the scores of tickets on all tasks minus the full BERT (`dense`, Figure 2) or the own ticket (`same-task`)."""
    import numpy as np

    table = transfer(levels, sparsity, relative)
    if table is None:
        raise UserError("no ticket of these runs was trained on another task")
    cells = table.cells
    shown = cells[(cells["ticket"] != "") & (cells.groupby("ticket")["n"].transform("sum") > 0)]
    sizes = sorted(shown["difference"].abs().dropna())
    limit = max(1.0, sizes[math.ceil(0.75 * len(sizes)) - 1]) if sizes else 1.0  # so that outliers do not pale the rest
    heading = (title or f"Transfer of tickets at {percent(sparsity)} sparsity") + f"\n{seeds_note(shown['pairs'].dropna())}"
    heading += evaluations_note(shown)
    heading += f"; * {MARKED}" if is_marked(shown).any() else ""
    spread = shown["difference_sd"].map("±{:.1f}".format, na_action="ignore").fillna("")
    remark = (spread + np.where(is_marked(shown), "*", "")).where(shown["pairs"] > 0, "no base")
    remark = remark.where(shown["n"] > 0, shown["verdict"])  # no run, undefined
    named = shown.assign(row=shown["ticket"], column=shown["task"].map(published.name), value=shown["difference"], remark=remark)
    unit = f"difference to the {FULL if relative == 'dense' else 'own ticket of the target'} (points)"
    draw_heat_map(output, heading, ("trained on", "ticket"), named, unit, limit)
    return "\n".join([unit, markdown_grid(table.grids[""]), *remarks(shown)])


def draw_examples(levels: DataFrame, output: Path, title: str | None) -> str:
    """Draw the metric over the number of training examples, of runs with --limit-train: one panel per task, one line per row."""
    import pandas as pd

    sizes = levels["setting"].str.extract(r"\blimit train (\d+)")[0]
    if sizes.isna().all():
        raise UserError("no run has --limit-train")
    tables = {size: curves(comparable(levels[sizes == size])) for size in sorted(sizes.dropna().unique(), key=int)}
    cells = pd.concat([table.cells.assign(x=float(size)) for size, table in tables.items()])
    shown = cells[cells["n"] > 0].sort_values("task", key=lambda tasks: tasks.map(published.place), kind="stable")
    if shown.empty:
        raise UserError("these runs have no finished level with a defined value")
    line = shown["row"] + shown["sparsity"].map(lambda sparsity: f", {percent(sparsity)}" if sparsity else "")
    units = [UNITS.get(metric, f"{metric} × 100") for metric in shown["metric"]]
    points = shown.assign(panel=shown["task"].map(published.name), unit=units, line=line, hollow=is_marked(shown))
    note = seeds_note(points["n"]) + evaluations_note(shown)
    draw_lines(output, title or "Tickets over training examples", "training examples", points, note, log=True)
    texts = points.assign(examples=points["x"].map("{:.0f}".format), task=points["panel"])
    wide = texts.pivot_table(index=["line", "examples"], columns="task", values="text", aggfunc="first", sort=False)
    return "\n".join([markdown_grid(wide.fillna("").reset_index()), *remarks(cells)])


def is_marked(cells: DataFrame) -> Series:
    """Whether a value of each cell is undefined or has a warning."""
    return (cells["undefined"].str.len() > 0) | (cells["warnings"] != "")


def evaluations_note(cells: DataFrame) -> str:
    """The number of evaluations of which scores are the best ones."""
    best = best_of(cells["best_of"].explode().dropna())
    return f"; {best} evaluations" if best else ""


def seeds_note(counts: Iterable[float]) -> str:
    """The numbers of seeds behind means and spreads."""
    found = sorted({int(count) for count in counts} - {0})
    if not found or found[-1] == 1:
        return "one seed"
    return f"mean ± standard deviation of {found[0]}{f' to {found[-1]}' if len(found) > 1 else ''} seeds"


# ---- masks ----


def own_masks(levels: DataFrame, sparsity: float) -> dict[str, dict[int, Mask]]:
    """The masks of tickets at a sparsity: ticket -> seed -> mask. A ticket is named by its task; with the method, if there are
    several. Raises `UserError` if there are none."""
    own = own_tickets(levels)
    at = own[own["sparsity"] == round(sparsity, 3)]
    if at.empty:
        there = ", ".join(map(percent, sorted(set(own["sparsity"])))) or "none"
        raise UserError(f"no ticket at {percent(sparsity)} sparsity; the levels of these runs are {there}")
    masks: dict[str, dict[int, Mask]] = {}
    for ticket in at.itertuples():
        name = published.name(ticket.task) + (f", {ticket.method}" if at["method"].nunique() > 1 else "")
        masks.setdefault(name, {})[ticket.seed] = read_mask(Path(ticket.run), ticket.level)
    return masks


def draw_overlap(levels: DataFrame, output: Path, title: str | None, sparsity: float) -> str:
    """Draw the overlap of the tickets of every two tasks with the same seed, and of every two seeds of a task (diagonal)."""
    import pandas as pd

    from bert_tickets.masking.similarity import MEASURES, overlap, tensor_counts

    own = own_masks(levels, sparsity)
    if sum(map(len, own.values())) < 2:
        raise UserError(f"overlap needs two tickets, and these runs have one at {percent(sparsity)} sparsity")
    lines: list[dict[str, str]] = []
    drawn: list[tuple[str, str, float, str]] = []
    for one, other in combinations_with_replacement(own, 2):
        seeds = [(a, b) for a, b in product(own[one], own[other]) if (a < b if one == other else a == b)]
        try:
            found = [overlap(tensor_counts(own[one][a], own[other][b])) for a, b in seeds]
        except UserError as error:
            raise UserError(f"the tickets of {one} and {other} cannot be compared: {error}") from None
        pairs = pd.DataFrame(found, columns=list(MEASURES), dtype=float)
        line = {"ticket": one, "and": other, "pairs": str(len(seeds))}
        lines.append(line | {name: f"{mean:.4f}" if seeds else "no pair" for name, mean in pairs.mean().items()})
        jaccard, spread = pairs["jaccard"].mean(), pairs["jaccard"].std()
        remark = "no pair" if not seeds else "" if math.isnan(spread) else f"±{spread:.3f}"
        drawn += [(row, column, jaccard, remark) for row, column in dict.fromkeys([(one, other), (other, one)])]
    heading = title or f"Overlap of tickets at {percent(sparsity)} sparsity"
    heading += f"\n{seeds_note(map(len, own.values()))}; diagonal: two seeds of a task"
    if chances := sorted({f"{float(line['chance']):.3f}" for line in lines if line["chance"] != "no pair"}):
        heading += f"\nrandom masks: {' to '.join(dict.fromkeys((chances[0], chances[-1])))}"
    cells = pd.DataFrame(drawn, columns=["row", "column", "value", "remark"])
    draw_heat_map(output, heading, ("ticket of", "ticket of"), cells, "Jaccard index of the kept weights")
    return "\n".join([markdown_grid(frame(lines)), *(f"{name}: {words}" for name, words in MEASURES.items())])


def draw_densities(levels: DataFrame, output: Path, title: str | None, sparsity: float) -> str:
    """Draw the percentage of weights that tickets keep in each layer, one line per kind of matrix."""
    own = own_masks(levels, sparsity)
    kept = densities(own)
    layers = [layer for layer in kept["layer"].unique() if layer != "all"]
    lines = kept[(kept["layer"] == "all") == (kept["kind"] == "all")]
    points = lines.assign(
        panel=lines["ticket"],
        unit="kept weights (%)",
        line=lines["kind"].replace("all", "all weights"),
        x=lines["layer"].map({layer: float(x) for x, layer in enumerate(layers)}),
        hollow=False,
    )
    step = math.ceil(len(layers) / 5)
    ticks = {float(x): name for x, name in enumerate(layers) if not name.isdigit() or (x % step == 0 and x + step < len(layers))}
    heading = title or f"Kept weights at {percent(sparsity)} sparsity"
    draw_lines(output, heading, "layer", points, seeds_note(map(len, own.values())), ticks)
    texts = kept.assign(mean=kept["mean"].map("{:.2f}".format))
    wide = texts.pivot_table(index=["ticket", "layer"], columns="kind", values="mean", aggfunc="first", sort=False)
    return f"kept weights (%)\n{markdown_grid(wide.fillna('').reset_index())}"


def densities(masks: dict[str, dict[int, Mask]]) -> DataFrame:
    """The percentage of weights that tickets keep, by ticket, layer and kind of matrix: mean and sd over seeds; "all" sums up."""
    import pandas as pd

    from bert_tickets.masking.similarity import tensor_counts, with_totals

    parts = []
    for ticket, seeds in masks.items():
        for seed, mask in seeds.items():
            parts.append(with_totals(tensor_counts(mask, mask)).assign(ticket=ticket, seed=seed))
    sums = pd.concat(parts).groupby(["ticket", "layer", "kind", "seed"], sort=False)[["one", "weights"]].sum()
    shares = (100 * sums["one"] / sums["weights"]).groupby(["ticket", "layer", "kind"], sort=False)
    return shares.agg(mean="mean", sd="std").reset_index()
