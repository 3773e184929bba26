"""The paper's figures over our runs: each function draws one and returns the table behind it as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations_with_replacement, product
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bert_tickets.errors import UserError
from bert_tickets.report import heatmap, published
from bert_tickets.report.cells import CLOSE, FULL, Cell, ResultSet, percent, place, row_name
from bert_tickets.report.formats import frame, scores
from bert_tickets.report.plots import draw_lines
from bert_tickets.report.results import LevelResult
from bert_tickets.report.transfer import matrix_grid, transfer_matrix

if TYPE_CHECKING:
    from pandas import DataFrame

UNITS = {"accuracy": "accuracy (%)", "f1": "F1 (%)", "matthews": "Matthews × 100", "pearson": "Pearson × 100"}
MARKED = "a value is undefined or has a warning"


def draw_curves(found: ResultSet, output: Path, title: str | None = None) -> str:
    """Draw the metric over sparsity, one panel per task and one line per row (Figure 11)."""
    import pandas as pd

    shown = sorted((cell for cell in found.cells.values() if cell.summary.n), key=lambda c: (found.tasks.index(c.task), place(c)))
    if not shown:
        raise UserError("these runs have no finished level with a defined value")
    points = []
    for cell in shown:
        metric, is_full = cell.results[0].metric, cell.row.startswith(FULL)
        point = {"panel": published.name(cell.task), "unit": UNITS.get(metric, f"{metric} × 100"), "hollow": cell.is_marked}
        point |= {"line": FULL if is_full else cell.row, "x": math.nan if is_full else 100 * cell.sparsity}
        points.append(point | {"mean": cell.summary.mean, "sd": cell.summary.sd or 0.0})
    tickets = [cell for cell in shown if not cell.row.startswith(FULL)]
    note = _seeds(cell.summary.n for cell in tickets) + f"; hollow: {MARKED}" * any(cell.is_marked for cell in tickets)
    draw_lines(output, title or "Tickets over sparsities", "pruned weights (%)", pd.DataFrame(points), note)
    return _text(scores(cell for cell in found.cells.values() if not cell.row.startswith(FULL))) + _remarks(found.results)


def _seeds(counts: Iterable[int]) -> str:
    """The numbers of seeds behind means and spreads."""
    found = sorted(set(counts) - {0})
    if not found or found[-1] == 1:
        return "one seed"
    return f"mean ± standard deviation of {found[0]}{f' to {found[-1]}' if len(found) > 1 else ''} seeds"


def _text(grid: DataFrame) -> str:
    return grid.to_markdown(index=False, disable_numparse=True) + "\n"


def _remarks(results: Iterable[LevelResult]) -> str:
    """The undefined values, which means leave out, and the warnings of the runs."""
    lines = [f"undefined: {r.run}, level {r.level}" for r in results if r.value is None]
    lines += [f"warning: {r.run}, level {r.level}: {warning}" for r in results for warning in r.warnings]
    return "".join(f"{line}\n" for line in lines)


def draw_transfer(found: ResultSet, output: Path, sparsity: float, relative: str = "dense", title: str | None = None) -> str:
    """Draw the scores of tickets on all tasks minus the full BERT (`dense`, Figure 2) or the own ticket (`same-task`)."""
    own = own_tickets(found, sparsity)
    tasks = published.in_order({*found.dense_tasks, *(task for _, task in own)})
    references = {task: found.full(task) for task in tasks}
    if relative == "same-task":
        names = {task: name for name, task in reversed(own)}  # of several methods the first
        references = {task: found.cell(task, row_name(names.get(task, "")), sparsity) for task in tasks}
    matrix = transfer_matrix(found, sparsity, references)
    matrix = {row: cells for row, cells in matrix.items() if any(cell.results for cell in cells.values())}
    used = [cell for columns in matrix.values() for cell in columns.values()]
    compared = [cell.difference for cell in used if cell.difference]
    sizes = sorted(abs(difference.mean) for difference in compared)
    limit = max(1.0, sizes[math.ceil(0.75 * len(sizes)) - 1]) if sizes else 1.0  # so that outliers do not pale the rest
    heading = title or f"Transfer of tickets at {percent(sparsity)} sparsity"
    heading += f"\n{_seeds(len(difference.seeds) for difference in compared)}"
    heading += f"; * {MARKED}" * any(cell.is_marked for cell in used)
    unit = f"difference to the {FULL if relative == 'dense' else 'own ticket of the target'} (points)"
    cells = [[_difference(cell) for cell in columns.values()] for columns in matrix.values()]
    names_of = [published.name(task) for task in tasks]
    heatmap.draw(output, heading, ("trained on", "ticket"), names_of, list(matrix), cells, unit, limit)
    return f"{unit}\n{_text(matrix_grid(matrix))}" + _remarks(r for cell in used for r in cell.results)


def _difference(cell: Cell) -> heatmap.Cell:
    if (found := cell.difference) is not None:
        return found.mean, (f"±{found.sd:.1f}" if found.sd is not None else "") + "*" * cell.is_marked
    return None, "no run" if not cell.results else "undefined" if not cell.summary.n else "no base"


def own_tickets(found: ResultSet, sparsity: float) -> dict[tuple[str, str], dict[int, LevelResult]]:
    """The tickets at a sparsity: (method, task they were found on) -> seed -> result. Raises `UserError` if there are none."""
    cells = {(name, task): found.curve(task, name) for task in found.tasks for name in found.tickets(task)}
    at = {key: cell for key, curve in cells.items() for there, cell in curve.items() if abs(there - sparsity) < CLOSE}
    if not at:
        levels = ", ".join(map(percent, sorted({level for curve in cells.values() for level in curve}))) or "none"
        raise UserError(f"no ticket at {percent(sparsity)} sparsity; the levels of these runs are {levels}")
    return {key: {r.seed: r for r in cell.results} for key, cell in at.items()}


def _named(own: dict[tuple[str, str], dict[int, LevelResult]]) -> dict[str, dict[int, LevelResult]]:
    """Own tickets by the name of their task; with the method, if there are several."""
    several = len({method for method, _ in own}) > 1
    return {published.name(task) + f", {method}" * several: results for (method, task), results in own.items()}


def draw_overlap(found: ResultSet, output: Path, sparsity: float, title: str | None = None) -> str:
    """Draw the overlap of the tickets of every two tasks with the same seed, and of every two seeds of a task (diagonal)."""
    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.similarity import MEASURES, mask_overlap, pack

    own = _named(own_tickets(found, sparsity))
    if sum(map(len, own.values())) < 2:
        raise UserError(f"overlap needs two tickets, and these runs have one at {percent(sparsity)} sparsity")
    packed = {(name, seed): pack(Mask.load(r.mask_file)) for name, seeds in own.items() for seed, r in seeds.items()}
    cells: dict[tuple[str, str], heatmap.Cell] = {}
    lines = []
    for one, other in combinations_with_replacement(own, 2):
        seeds = [(a, b) for a, b in product(own[one], own[other]) if (a < b if one == other else a == b)]
        try:
            pairs = [mask_overlap(packed[one, a], packed[other, b]) for a, b in seeds]
        except UserError as error:
            raise UserError(f"the tickets of {one} and {other} cannot be compared: {error}") from None
        lines.append({"ticket": one, "and": other, "pairs": str(len(pairs))})
        for measure in ("jaccard", "chance", "chance_by_tensor"):
            lines[-1][measure] = f"{mean(getattr(pair, measure) for pair in pairs):.4f}" if pairs else "no pair"
        values = [pair.jaccard for pair in pairs]
        remark = f"±{stdev(values):.3f}" if len(values) > 1 else "" if values else "no pair"
        cells[one, other] = cells[other, one] = (mean(values) if values else None, remark)
    heading = title or f"Overlap of tickets at {percent(sparsity)} sparsity"
    heading += f"\n{_seeds(map(len, own.values()))}; diagonal: two seeds of a task"
    if chances := sorted({f"{float(line['chance']):.3f}" for line in lines if line["chance"] != "no pair"}):
        heading += f"\nrandom masks: {' to '.join(dict.fromkeys((chances[0], chances[-1])))}"
    grid = [[cells[one, other] for other in own] for one in own]
    heatmap.draw(output, heading, ("ticket of", "ticket of"), list(own), list(own), grid, "Jaccard index of the kept weights")
    return _text(frame(lines)) + "".join(f"{name}: {words}\n" for name, words in MEASURES.items() if name in lines[0])


def draw_densities(found: ResultSet, output: Path, sparsity: float, title: str | None = None) -> str:
    """Draw the percentage of weights that tickets keep in each layer, one line per kind of matrix."""
    own = _named(own_tickets(found, sparsity))
    kept = read_densities(own)
    layers = list(kept["layer"].drop_duplicates())[:-1]  # "all" is the last
    lines = kept[(kept["layer"] == "all") == (kept["kind"] == "all")]
    points = lines.rename(columns={"ticket": "panel"}).assign(
        x=lines["layer"].map({layer: float(x) for x, layer in enumerate(layers)}),
        line=lines["kind"].replace("all", "all weights"),
        unit="kept weights (%)",
        hollow=False,
    )
    step = math.ceil(len(layers) / 5)
    ticks = {float(x): name for x, name in enumerate(layers) if not name.isdigit() or (x % step == 0 and x + step < len(layers))}
    heading = title or f"Kept weights at {percent(sparsity)} sparsity"
    draw_lines(output, heading, "layer", points, _seeds(map(len, own.values())), ticks)
    wide = kept.assign(mean=kept["mean"].map("{:.2f}".format)).pivot_table(
        index=["ticket", "layer"], columns="kind", values="mean", aggfunc="first", sort=False
    )
    return f"kept weights (%)\n{_text(wide.fillna('').reset_index())}"


def read_densities(own: dict[str, dict[int, LevelResult]]) -> DataFrame:
    """The percentage of weights that tickets keep, by ticket, layer and kind of matrix: mean and sd over seeds; "all" sums up."""
    import pandas as pd

    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.similarity import layer_and_kind

    rows: list[dict[str, Any]] = []
    for ticket, seeds in own.items():
        for seed, r in seeds.items():
            for name, kept in Mask.load(r.mask_file).items():
                for layer, kind in product(*((part, "all") for part in layer_and_kind(name))):
                    part = {"ticket": ticket, "layer": layer, "kind": kind, "seed": seed}
                    rows.append(part | {"kept": 100 * int(kept.count_nonzero()), "total": kept.numel()})

    def rank(name: str) -> tuple:
        return name == "all", not name.isdigit(), int(name) if name.isdigit() else 0, name

    rows.sort(key=lambda row: (list(own).index(row["ticket"]), rank(row["layer"]), rank(row["kind"])))
    sums = pd.DataFrame(rows).groupby(["ticket", "layer", "kind", "seed"], sort=False).sum()
    shares = (sums["kept"] / sums["total"]).groupby(["ticket", "layer", "kind"], sort=False)
    return shares.agg(mean="mean", sd="std").fillna({"sd": 0.0}).reset_index()
