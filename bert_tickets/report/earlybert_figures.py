"""Figures of EarlyBERT (Chen et al. 2021): distances between the masks of a search, and scores over the time saved. Each returns
its table as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.config import from_flat
from bert_tickets.errors import Damaged, UserError
from bert_tickets.report import published
from bert_tickets.report.costs import costs, warnings
from bert_tickets.report.earlybert import KINDS, cells_of, gone, is_tradeoff, tickets
from bert_tickets.report.figures import MARKED, UNITS, evaluations_note, is_marked, seeds_note
from bert_tickets.report.formats import frame, markdown_grid
from bert_tickets.report.pictures import draw_maps, draw_points
from bert_tickets.report.rows import FULL, is_early_bird, plainness
from bert_tickets.report.tables import remarks
from bert_tickets.runs.directory import level_dir, read_run, result

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from pandas import DataFrame

RECORD = "coefficients.npy"  # of level 0: after each step those of all heads, then those of all neurons
STEPS = 150  # of a map
WITHIN = 0.1  # of the early-bird rule
DISTANCE = "normalized Hamming distance: units of which one mask keeps what the other prunes (share)"


def draw_distances(levels: DataFrame, output: Path, title: str | None) -> str:
    """Draw the distances between the masks of all pairs of steps of a search: heads beside neurons, a row of panels per task.

    A mask is what the run's own rule draws from the coefficients of a step. Of a task the longest search is drawn, of several the
    plainest one with the lowest seed. The table has all searches.
    """
    found = levels[levels["method"].map(is_early_bird).astype(bool) & ~levels["given"]]
    searches = [(line, record) for line in found.itertuples() if (record := read_record(Path(line.run))) is not None]
    if not searches:
        raise UserError(f"no finished run of --method early-bird has a record of two steps (level_00/{RECORD})")
    drawn: dict[str, Any] = {}
    for line, record in sorted(searches, key=lambda pair: (-len(pair[1]["heads"]), plainness(pair[0].row), pair[0].seed)):
        drawn.setdefault(line.task, (line, record))
    panels, lines = [], []
    for line, record in searches:
        draw = result(Path(line.run), 0)["draw"]
        masks, steps = masks_of(Path(line.run), record), len(record["heads"])
        row = {"task": published.name(line.task), "row": line.row, "seed": str(line.seed), "steps": str(steps)}
        for kind, of_kind in masks.items():
            row[f"{kind} within {WITHIN} of the last mask from step"] = str(settled(of_kind))
        row |= {f"rule fires: {kind}": _step(draw.get(f"{kind}_fired")) for kind in masks}
        lines.append(row | {"both": _step(draw.get("fired")), "drawn at": _step(draw.get("step"))})
        if drawn[line.task][0] is line:
            for kind, of_kind in masks.items():
                at = thinned(steps)
                marks = {"drawn": draw.get("step"), "the rule fires": draw.get(f"{kind}_fired")}
                known = {name: step for name, step in marks.items() if step is not None}
                heading = f"{row['task']}, seed {line.seed}: {kind}"
                panels.append((published.place(line.task), (heading, at + 1, distances(of_kind[at]), known)))
    ordered = [panel for _, panel in sorted(panels, key=lambda pair: pair[0])]
    draw_maps(output, title or "Distances between the masks of a search", ordered, "normalized Hamming distance")
    return f"{DISTANCE}\n{markdown_grid(frame(lines))}"


def _step(step: int | None) -> str:
    return "never" if step is None else str(step)


def read_record(run: Path) -> dict[str, np.ndarray] | None:
    """Read a search's coefficients by kind, [steps, L, units of a layer]; None without a record of two steps.

    Raises `Damaged` for one of another size.
    """
    import numpy as np

    path = level_dir(run, 0) / RECORD
    if not path.is_file():
        return None
    record, sizes = np.load(path, mmap_mode="r"), result(run, 0)["sizes"]
    heads, in_layer = sizes["heads"], read_run(run)["fingerprint"]["architecture"]["num_attention_heads"]
    if record.ndim != 2 or record.shape[1] != heads + sizes["neurons"]:
        raise Damaged(f"{path} has the shape {record.shape}, for {heads} heads and {sizes['neurons']} neurons")
    layers = heads // in_layer
    parts = {"heads": record[:, :heads], "neurons": record[:, heads:]}
    return {kind: part.reshape(len(part), layers, -1) for kind, part in parts.items()} if len(record) > 1 else None


def masks_of(run: Path, record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Draw the masks of all steps of a record by the rule of its run: kind -> [steps, units], True = kept."""
    import numpy as np
    import torch

    settings = from_flat(read_run(run)["config"]).settings
    masks = []
    for step in range(len(record["heads"])):
        mask = settings.draw({kind: torch.from_numpy(np.array(values[step])) for kind, values in record.items()})
        masks.append({kind: kept.flatten().numpy() for kind, kept in mask.items()})
    return {kind: np.stack([mask[kind] for mask in masks]) for kind in record}


def thinned(steps: int) -> np.ndarray:
    """The indices of at most `STEPS` of so many steps, at equal intervals, the first and the last included."""
    import numpy as np

    return np.unique(np.linspace(0, steps - 1, min(steps, STEPS)).round().astype(int))


def distances(masks: np.ndarray) -> np.ndarray:
    """Compute the share of units in which masks [n, units] differ, of all pairs: [n, n]."""
    import numpy as np

    kept = masks.astype(np.float32)  # counts up to 2^24 are exact
    both, each = kept @ kept.T, kept.sum(1)
    return (each[:, None] + each - 2 * both) / masks.shape[1]


def settled(masks: np.ndarray) -> int:
    """The first step, from 1, from which on all masks [steps, units] are within `WITHIN` of the last one."""
    far = ((masks != masks[-1]).mean(1) > WITHIN).nonzero()[0]
    return int(far[-1]) + 2 if len(far) else 1


# ---- scores over time ----


def draw_tradeoff(levels: DataFrame, output: Path, title: str | None) -> str:
    """Draw scores over the time saved, a panel per task: the full BERT, tickets of several sizes, and their controls."""
    own = tickets(levels)
    sized = own["changed"].map(lambda change: change.keys() <= {"heads", "neurons"}).astype(bool)
    own = own[sized]
    if own.empty:
        raise UserError("no finished run of --method early-bird on a task other than MLM")
    found = costs(own, levels[levels["row"] == FULL])
    cells = cells_of(levels, own, found)
    cells = cells[cells["n"] > 0]
    cells = cells.assign(time_saved=cells["time_saved"].where(cells["row"] != FULL, 0.0))
    shown = cells[cells["time_saved"].notna()]
    if (shown["row"] == FULL).all():
        raise UserError("no run of --method early-bird stands beside a full BERT of its task and seed, with the seconds of both")
    points = shown.assign(
        row=shown["task"],
        unit=[UNITS.get(metric, f"{metric} × 100") for metric in shown["metric"]],
        column="time saved (%)",
        title=shown["task"].map(published.name),
        line=[_line(cell) for cell in shown.itertuples()],
        x=shown["time_saved"],
        y=shown["mean"],
        hollow=is_marked(shown),
    )
    note = (
        seeds_note(shown["n"]).replace("mean ± standard deviation", "means")
        + evaluations_note(shown)
        + (f"; hollow: {MARKED}" if points["hollow"].any() else "")
        + "; with seconds that are not comparable" * bool(list(warnings(found)))
    )
    draw_points(output, title or "Scores over the time saved, search included", points, note)
    lines = [
        {"task": published.name(cell.task), "row": cell.row, "time saved": f"{cell.time_saved:.1f} %", "score": cell.text}
        for cell in shown.itertuples()
    ]
    return "\n".join([markdown_grid(frame(lines)), *remarks(shown), *warnings(found)])


def _line(cell: Any) -> str:
    if cell.row == FULL or cell.kind != "early-bird":
        return FULL if cell.row == FULL else KINDS[cell.kind]
    return f"EarlyBERT, {gone(cell)[0]} % of the neurons gone" if is_tradeoff(cell) else "EarlyBERT, heads only"
