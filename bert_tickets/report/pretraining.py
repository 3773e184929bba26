"""EarlyBERT in pre-training (Chen et al. 2021) as parts of its table: slim networks, fine-tuned, beside their dense twin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.report.cells import fill_over_sparsities
from bert_tickets.report.costs import MEANS, cost_line, costs, warnings
from bert_tickets.report.formats import frame, listing
from bert_tickets.report.rows import FULL, PRETRAINED_BY, is_early_bird
from bert_tickets.runs.directory import read_run

if TYPE_CHECKING:
    from pandas import DataFrame

NAMES = {"": "EarlyBERT", "random": "random", "full": "full BERT at the ticket's budget"}  # by --ticket
SLIM_NOTE = (
    "Pre-trained networks are fine-tuned without the heads and neurons that they lack, beside the dense network of the same seed "
    "(the twin), which was pre-trained for as long as the preset or the flags say. Time and FLOPs saved are of pre-training."
)


def fine_tuned(levels: DataFrame) -> DataFrame:
    """The levels that fine-tune whole what another run pre-trained: dense networks, and tickets of EarlyBERT; with `kind`."""
    tuned = levels[(levels["maker"] != "") & (levels["task"] != "mlm") & ~levels["pruned"]]
    tuned = tuned.assign(kind=[kind_of(line) for line in tuned.itertuples()])
    return tuned[tuned["kind"] != ""] if (tuned["kind"] != FULL).any() else tuned.iloc[:0]


def kind_of(line: Any) -> str:
    """The name of a fine-tuned network: that of a row of published.toml, or of a control; "" for another one."""
    by, dense = line.weights.removeprefix(PRETRAINED_BY), not line.given and line.sparsity == 0
    ticket = next((kind for kind in ("random", "full") if f"ticket {kind}" in by), "")
    if not is_early_bird(by):
        return FULL if dense else ""
    return NAMES[ticket] if dense == (ticket == "full") else ""


def heads_of(line: Any) -> int:
    """The heads of a layer of the run's model."""
    return read_run(Path(line.run))["fingerprint"]["architecture"]["num_attention_heads"]


def pretraining(levels: DataFrame, tuned: DataFrame) -> tuple[dict[str, DataFrame], DataFrame, list[str]]:
    """The grids of fine-tuned scores and of the cost of pre-training, their cells, and notes."""
    import pandas as pd

    order, part = _rows(tuned), "pretraining-large" if heads_of(tuned.iloc[0]) == 16 else "pretraining-base"
    row_of = dict(zip(tuned["maker"], tuned["row"], strict=True))
    made = levels[levels["run"].isin(row_of) & (levels["task"] == "mlm")]
    made = made.assign(row=made["run"].map(row_of))
    is_early = made["method"].map(is_early_bird).astype(bool)
    found, shown = costs(made[is_early], made[~is_early]), pd.concat([made, tuned])
    cells = fill_over_sparsities(shown, _wanted(published.in_order(shown["task"]), order, part))
    cells = cells.merge(found.groupby(["task", "row"], as_index=False)[MEANS].mean(), how="left", on=["task", "row"])
    grids = {"Pre-trained, then fine-tuned": _scores(cells, order)}
    grids[f"Published, {part.replace('-', ', ')} {published.source('earlybert')}"] = published_grid(part)
    if len(found):
        of_row = [({"row": row}, found[found["row"] == row]) for row in order]
        grids["Cost of pre-training, search included"] = frame([line | cost_line(runs) for line, runs in of_row if len(runs)])
    grids["Fine-tuned scores by task, and differences to the dense twin"] = listing(cells)
    return grids, cells, list(warnings(found))


def _rows(tuned: DataFrame) -> dict[str, str]:
    """The kind of each row, the twin first."""
    kinds = [FULL, *NAMES.values()]
    rows = dict(zip(tuned["row"], tuned["kind"], strict=True))
    return dict(sorted(rows.items(), key=lambda pair: kinds.index(pair[1])))


def _wanted(tasks: Sequence[str], order: Mapping[str, str], part: str) -> Iterator[dict[str, Any]]:
    twin = next((row for row, kind in order.items() if kind == FULL), "")
    for task in tasks:
        for row, kind in order.items():
            cell = {"task": task, "row": row, "sweep": "earlybert_pretrain"}
            yield cell | {"reference": twin if row != twin else "", "published": published.earlybert(part, kind, task)}


def _scores(cells: DataFrame, order: Mapping[str, str]) -> DataFrame:
    tasks, lines = published.in_order(cells["task"]), []
    for row, kind in order.items():
        texts = dict(zip(cells.loc[cells["row"] == row, "task"], cells.loc[cells["row"] == row, "text"], strict=True))
        lines.append({"row": row, "kind": kind} | {published.name(task): texts[task] for task in tasks})
    return frame(lines)


def published_grid(part: str) -> DataFrame:
    """A part of `[earlybert]` in published.toml: a line per row, with the time saved if it is given."""
    table, lines = published.EARLYBERT[part], []
    names = [published.name(task) for task in table["tasks"]]
    for row, scores in table["rows"].items():
        line = {"published": row} | dict(zip(names, map("{:g}".format, scores), strict=True))
        lines.append(line | ({"time saved": table["saved"].get(row, "")} if table["saved"] else {}))
    return frame(lines)
