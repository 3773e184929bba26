"""Cells of tables: levels pooled over seeds, and compared with a reference over the same seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.report.results import refuse_several
from bert_tickets.report.rows import FULL
from bert_tickets.report.significance import holm, match_or_exceed, paired, verdict, within_one_sd

if TYPE_CHECKING:
    from pandas import DataFrame

NO_RUN = "no run"
UNCOMPARED = dict.fromkeys(("pairs", "unpaired", "difference", "difference_sd", "interval_low", "interval_high", "p"), math.nan)


def full(task: str) -> dict[str, Any]:
    """The full BERT as a wanted cell."""
    return {"task": task, "row": FULL, "sparsity": 0.0, "sweep": "table2", "published": published.beside_table2(FULL, task)}


def fill(levels: DataFrame, wanted: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Make the table of the wanted cells, each once, from comparable levels. A cell without runs has no `run`.

    A wanted cell has a `task`, a `row` and a `sparsity`. It may have the `reference` (the row that it is compared with, on the
    same task: the full BERT, or a row at the same sparsity), the `sweep` that makes its runs (scripts/<sweep>.sh), the `source`
    task of its ticket, if that is another, the `published` value, and more columns. It should have the seeds `expected`, or else
    those that any wanted cell of its task and sweep has. P-values are corrected over all cells with the same task and reference.
    """
    import pandas as pd

    pools = dict(iter(levels.groupby(["task", "row", "sparsity"])))
    nothing = levels.iloc[:0]
    cells: dict[tuple, dict[str, Any]] = {}
    for want in wanted:
        place = (want["task"], want["row"], want["sparsity"])
        if place not in cells:
            cell = {"reference": "", "sweep": "", "source": "", "published": "", "expected": (), **want}
            cell |= _pool(pools.get(place, nothing))
            beside = (want["task"], cell["reference"], 0.0 if cell["reference"] == FULL else want["sparsity"])
            cells[place] = cell | _compare(cell, _pool(pools.get(beside, nothing)))
    _expect_seeds(list(cells.values()))
    found = pd.DataFrame(list(cells.values()))
    found["p_holm"] = found.groupby(["task", "reference"])["p"].transform(holm)
    found["verdict"] = [verdict(cell) if cell["run"] else NO_RUN for cell in found.to_dict("records")]
    return found


def fill_over_sparsities(levels: DataFrame, wanted: Iterable[Mapping[str, Any]]) -> DataFrame:
    """`fill` for rows whose runs differ in sparsity: a cell takes all of them, and their mean sparsity (NaN without runs).

    Raises `UserError` for a row with several tickets of a seed.
    """
    refuse_several(levels, ["mask_sha256"], ["task", "row", "seed"], "have several tickets in one row; give one of them")
    cells = fill(levels.assign(sparsity=0.0), ({**cell, "sparsity": 0.0} for cell in wanted))
    sparsities = levels.groupby(["task", "row"])["sparsity"].mean().round(3)
    return cells.assign(sparsity=[sparsities.get(place, math.nan) for place in zip(cells["task"], cells["row"], strict=True)])


def _pool(levels: DataFrame) -> dict[str, Any]:
    """Pool the levels of a cell: its values by seed, their mean and sample standard deviation, warnings and sources."""
    by_seed = dict(zip(levels["seed"], levels["value"], strict=True))
    values = {seed: value for seed, value in by_seed.items() if not math.isnan(value)}
    seeded = zip(levels["seed"], levels["warnings"], strict=True)
    return {
        "metric": levels["metric"].iloc[0] if len(levels) else "",
        "values": values,
        "mean": mean(values.values()) if values else math.nan,
        "sd": stdev(values.values()) if len(values) > 1 else math.nan,
        "n": len(values),
        "seeds": list(by_seed),
        "undefined": [seed for seed in by_seed if seed not in values],
        "warnings": "; ".join(f"seed {seed}: {warning}" for seed, warnings in seeded for warning in warnings),
        **{name: list(levels[name]) for name in ("run", "level", "mask_sha256", "best_of")},
    }


def _compare(cell: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a cell with its reference; with the full BERT also by the paper's criteria. An undefined value does not match."""
    found = UNCOMPARED | {"within_one_sd": None, "match_or_exceed": None}
    if not cell["reference"] or not cell["run"]:
        return found
    found |= paired(cell["values"], reference["values"])
    if cell["reference"] == FULL:
        for criterion in (within_one_sd, match_or_exceed):
            ours, theirs = list(cell["values"].values()), list(reference["values"].values())
            found[criterion.__name__] = False if cell["undefined"] else criterion(ours, theirs)
    return found


def _expect_seeds(cells: list[dict[str, Any]]) -> None:
    """Replace the seeds that each cell should have by their number, and add the `missing` ones, and its score in words."""
    seeds: dict[Any, set[int]] = {}
    for cell in cells:
        for group in ((cell["task"], cell["sweep"] or cell["row"]), cell["task"]):
            seeds.setdefault(group, set()).update(cell["seeds"])
    for cell in cells:
        expected = set(cell["expected"]) or seeds[cell["task"], cell["sweep"] or cell["row"]] or seeds[cell["task"]]
        cell["missing"] = sorted(expected - set(cell["seeds"]))
        cell["expected"] = len(expected)
        cell["text"] = _score(cell)


def _score(cell: Mapping[str, Any]) -> str:
    """The mean and standard deviation with `count`."""
    if not cell["run"]:
        return NO_RUN
    digits = 3 if cell["task"] in published.LOSSES else 1
    spread = "" if math.isnan(cell["sd"]) else f" ± {cell['sd']:.{digits}f}"
    return (f"{cell['mean']:.{digits}f}{spread}" if cell["n"] else "undefined") + f" ({count(cell, cell['n'])})"


def count(cell: Mapping[str, Any], n: int) -> str:
    """The number of seeds or pairs, of how many, and marks of best evaluations, undefined values and warnings."""
    marks = [f"{n} of {cell['expected']}" if n < cell["expected"] else str(n)]
    if best := best_of(cell["best_of"]):
        marks.append(best)
    if n and cell["undefined"]:
        marks.append(f"{len(cell['undefined'])} undefined")
    if cell["n"] > 1 and len(set(cell["values"].values())) == 1:
        marks.append("all equal")  # as constant predictions give
    if cell["warnings"]:
        marks.append("warning")
    return ", ".join(marks)


def best_of(counts: Iterable[int]) -> str:
    """Of how many evaluations values are the best ones, in words; "" if they are the last ones."""
    found = sorted(set(counts))
    if not found or found[-1] == 1:
        return ""
    return f"best of {found[0]}" + (f" to {found[-1]}" if found[0] < found[-1] else "")


def percent(sparsity: float) -> str:
    """Sparsity as text; none for NaN, a cell without runs."""
    return f"{100 * sparsity:.1f}".removesuffix(".0") + " %" if sparsity == sparsity else ""


def signed(value: float | None, digits: int = 1) -> str:
    """A difference in points, "" for none; one that rounds to zero has no sign."""
    if value is None:
        return ""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"
