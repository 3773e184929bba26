"""The paper's tables over our runs, with the published numbers beside them, and the runs that are missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.report.cells import best_of, fill, full, percent
from bert_tickets.report.earlybert import earlybert
from bert_tickets.report.formats import Table, frame, listing, scores
from bert_tickets.report.importance import importance
from bert_tickets.report.results import own_tickets
from bert_tickets.report.rows import FULL, PRETRAINED, RANDOM, RANDOM_PRUNING, SHUFFLED, has_own_table, is_published, row_name
from bert_tickets.report.stability import stability
from bert_tickets.report.tamt import tamt
from bert_tickets.report.transfer import transfer

if TYPE_CHECKING:
    from pandas import DataFrame

REWINDS = ("5%", "10%", "20%", "50%", "none")  # the paper's Table 3
AT_SPARSITY = ("table2", "transfer", "perturbed")  # sweeps with the variable SPARSITY
WITHIN = "Within one deviation, the paper's criterion: mean >= mean - standard deviation of the full BERT; it needs two seeds."
EXCEED = "Match or exceed, the stricter criterion: mean >= mean of the full BERT. That one seed does is weak evidence."
COMMON_NOTES = (
    "Scores: mean ± standard deviation (n - 1) of accuracy, F1 or a correlation, x 100 (number of seeds).",
    "Differences: in points, paired over seeds, each with its own 95 % t-interval. Verdicts are corrected by Holm's method over "
    "all comparisons with one reference, unless a note says otherwise. `not significant` does not mean equal: see the interval's "
    "width.",
    "Commands for missing runs need the variables of the other runs too (`bash scripts/table2.sh --help` lists them).",
)


def build(name: str, levels: DataFrame, sparsity: float | None = None, failures: Sequence[str] = ()) -> Table | None:
    """Build one of `TABLES` from comparable levels; None if there are no runs for it.

    `sparsity` (a fraction) is for tables 3 and transfer, `failures` are sentences about runs that diverged.
    """
    make, sweep = TABLES[name]
    table = make(levels, sparsity) if len(levels) else None
    if table is None:
        return None
    notes = [*table.notes, *COMMON_NOTES, *remarks(table.cells), *_coverings(levels, table.cells), *_settings(levels)]
    return replace(table, name=name, notes=notes, missing=[*failures, *missing_runs(levels, table.cells, table.sweep or sweep)])


def remarks(cells: DataFrame) -> Iterator[str]:
    """The warnings of the runs, undefined values, which means leave out, and scores that are the best of several."""
    if best := best_of(cells["best_of"].explode().dropna()):
        chosen = "chosen on the set that they are reported on; warnings are about the last evaluation"
        yield f"Scores are the {best} evaluations of a level, {chosen}."
    for c in cells.itertuples():
        where = f"{published.name(c.task)}, {c.row} at {percent(c.sparsity)}"
        if c.warnings:
            yield f"Warning: {where}: {c.warnings}"
        if c.undefined:
            yield f"Undefined: {where}: seed {', '.join(map(str, c.undefined))}"


def _coverings(levels: DataFrame, cells: DataFrame) -> Iterator[str]:
    """A note for each task whose masks cover different weights."""
    shown = levels[levels["run"].isin(cells["run"].explode()) & (levels["sparsity"] > 0)]  # of the full BERT it has no meaning
    for task, totals in shown.groupby("task", sort=False)["total"]:
        if totals.nunique() > 1:
            sizes = " or ".join(f"{total:,}" for total in sorted(totals.unique()))
            yield f"{published.name(task)}: the masks cover {sizes} weights; their sparsities are not comparable."


def _settings(levels: DataFrame) -> Iterator[str]:
    """The settings that differ from the paper's, a note for all tasks that share them."""
    for setting, tasks in levels[levels["setting"] != ""].groupby("setting")["task"]:
        names = ", ".join(map(published.name, published.in_order(tasks)))
        yield f"{names}: not the published settings, but {setting}"


def missing_runs(levels: DataFrame, cells: DataFrame, sweep: str) -> list[str]:
    """What a table lacks, a sentence each: unfinished runs, seeds of its cells, tasks of the paper."""
    there = set(cells["task"])
    last = levels[levels["task"].isin(there)].groupby("run")[["level", "levels"]].max()
    unfinished = last[last["level"] + 1 < last["levels"]]
    lines = [f"{r.Index}: {r.level + 1} of {r.levels} levels are finished" for r in unfinished.itertuples()]
    lacking = cells.assign(missing=[" ".join(map(str, seeds)) for seeds in cells["missing"]]).fillna({"sparsity": 0.0})
    groups = lacking[lacking["missing"] != ""].groupby(["task", "sparsity", "sweep", "missing"], sort=False)
    lines += [_missing_seeds(group, *key) for key, group in groups]
    if left := [task for task in published.SWEEP_TASKS.get(sweep, published.TASKS) if task not in there]:
        names = ", ".join(map(published.name, left))
        lines.append(f"no run of {names}. To make them: `TASKS='{' '.join(left)}' bash scripts/{sweep}.sh`")
    return lines


def _missing_seeds(group: DataFrame, task: str, sparsity: float, sweep: str, seeds: str) -> str:
    at = f" at {percent(sparsity)}" if sparsity else ""
    text = f"no run of {published.name(task)}{at}, seeds {seeds}: {'; '.join(group['row'])}"
    if not sweep:
        return text
    tasks = " ".join(dict.fromkeys(task for task in (*group["source"], task) if task))
    more = f" SPARSITY={100 * sparsity:.0f}" if sparsity and sweep in AT_SPARSITY else ""
    return f"{text}. To make them: `TASKS='{tasks}' SEEDS='{seeds}'{more} bash scripts/{sweep}.sh`"


# ---- Tables 2 and 4: the highest sparsity with matching tickets ----


def table2(levels: DataFrame, _: float | None) -> Table | None:
    """The highest sparsity within one standard deviation of the full BERT, with the controls."""
    title = "The highest sparsity with matching tickets, and controls (the paper's Table 2)"
    note = (
        "Table 2 has five runs of BERT-base. As printed, the tickets of MRPC, SST-2, CoLA and MLM are below the full BERT by "
        "more than its standard deviation, and less than their own."
    )
    return _matching(title, levels, "within_one_sd", [note], with_controls=True)


def table4(levels: DataFrame, _: float | None) -> Table | None:
    """The highest sparsity that matches or exceeds the full BERT."""
    title = "The highest sparsity that matches or exceeds the full BERT (the paper's Table 4)"
    return _matching(title, levels, "match_or_exceed", [], with_controls=False)


def _matching(title: str, levels: DataFrame, criterion: str, notes: Sequence[str], *, with_controls: bool) -> Table | None:
    """Tickets at the highest sparsity that satisfies a criterion; controls also at the published one, and where there are some.

    All tickets that were tested in the search for that sparsity count in Holm's correction.
    """
    lines: list[dict[str, str]] = []
    shown: list[dict[str, Any]] = []
    tested: list[dict[str, Any]] = []
    is_other = levels["method"].map(has_own_table) & (levels["row"] != FULL)
    for task in published.in_order(levels.loc[levels["row"] == FULL, "task"]):
        shown.append(full(task))
        of_task = levels[(levels["task"] == task) & ~is_other]
        for method, runs in own_tickets(of_task).groupby("method"):
            finders = of_task[(of_task["method"] == method) & ~of_task["given"]]
            ticket: dict[str, Any] = {"task": task, "row": row_name(method), "reference": FULL, "expected": set(finders["seed"])}
            ticket["sweep"] = "table2" if is_published(method) else ""
            curve = [ticket | {"sparsity": sparsity} for sparsity in sorted(set(runs["sparsity"]))]
            filled = fill(levels, curve)
            best, _ = highest(filled, criterion)
            lines.append(_highest_line(task, method, filled))
            tested += curve
            if with_controls:
                shown += _with_controls(of_task, method, ticket, best)
            elif best is not None:
                shown.append(ticket | {"sparsity": best})
    if not shown or (not lines and levels["method"].map(has_own_table).any()):
        return None
    cells = fill(levels, [*(cell | {"shown": True} for cell in shown), *(cell | {"shown": False} for cell in tested)])
    cells = cells[cells["shown"]]
    grids = {"": frame(lines), f"Scores, and differences to the {FULL}": listing(cells)}
    return Table(title, grids, cells, [WITHIN, EXCEED, published.explain("table2", "table4"), *notes])


def _with_controls(levels: DataFrame, method: str, ticket: dict[str, Any], best: float | None) -> list[dict[str, Any]]:
    """A ticket and its controls, as far as there are runs; all of them at the best sparsity, or else at the published one."""
    controls = {f"{weights} weights": row_name(method, weights=weights) for weights in (RANDOM, SHUFFLED)}
    rows = {"ticket": ticket["row"], RANDOM_PRUNING: RANDOM_PRUNING} | controls
    there = set(zip(levels["row"], levels["sparsity"], strict=True))
    wanted = published.sparsity(ticket["task"])
    places = {best, wanted, *levels.loc[levels["row"].isin(controls.values()), "sparsity"]} - {None}
    cells = []
    for sparsity in sorted(places):
        for key, row in rows.items():
            if (row, sparsity) in there or sparsity == (wanted if best is None else best):
                beside = published.beside_table2(key, ticket["task"]) if is_published(method) else ""
                cells.append(ticket | {"row": row, "sparsity": sparsity, "published": beside})
    return cells


def _highest_line(task: str, method: str, curve: DataFrame) -> dict[str, str]:
    """The highest sparsities of a method's tickets by both criteria, and the published ones."""
    line = {"task": published.name(task), "method": method}
    criteria = {"within one deviation": ("table2", "within_one_sd"), "match or exceed": ("table4", "match_or_exceed")}
    for words, (table, criterion) in criteria.items():
        at = published.sparsity(task, table) if is_published(method) else None
        line[words] = highest(curve, criterion)[1]
        line[f"published {published.source(table)}"] = "" if at is None else percent(at)
    return line


def highest(curve: DataFrame, criterion: str) -> tuple[float | None, str]:
    """The highest sparsity at which a criterion holds; the same in words, with what speaks against it in brackets."""
    holds, fails, undecided = (
        curve.loc[where, "sparsity"].tolist()
        for where in (curve[criterion].eq(True), curve[criterion].eq(False), curve[criterion].isna())
    )
    if not holds:
        return None, "undecided: needs two seeds" if undecided else "none"
    best = max(holds)
    remarks = []
    if (curve.loc[curve["sparsity"] == best, "warnings"] != "").any():
        remarks.append("warning")
    if best == curve["sparsity"].max():
        remarks.append("the last level")
    if below := [sparsity for sparsity in fails if sparsity < best]:
        remarks.append(f"not at {', '.join(map(percent, below))}")
    if undecided:
        remarks.append(f"undecided at {', '.join(map(percent, undecided))}")
    return best, percent(best) + (f" ({'; '.join(remarks)})" if remarks else "")


# ---- Figure 11 ----


def curves(levels: DataFrame, _: float | None = None) -> Table:
    """Every row of every task at every sparsity; not methods with a table of their own, whose tickets have one sparsity."""
    levels = levels[~levels["method"].map(has_own_table) | (levels["row"] == FULL)]
    own = own_tickets(levels)
    by_sweep = {*own.loc[own["method"].map(is_published), "row"]}
    wanted = []
    for task, row, sparsity in levels[["task", "row", "sparsity"]].drop_duplicates().itertuples(index=False):
        cell = {"task": task, "row": row, "sparsity": sparsity, "reference": FULL, "sweep": "table2" if row in by_sweep else ""}
        wanted.append(full(task) if row == FULL else cell)
    cells = fill(levels, wanted)
    grids = {"": scores(cells), f"Differences to the {FULL}": listing(cells[cells["reference"] != ""])}
    return Table(
        "All tasks over all sparsities (the paper's Figure 11)", grids, cells, [f"One star: {WITHIN}", f"Two stars: {EXCEED}"]
    )


# ---- Table 3, perturbed weights ----


def table3(levels: DataFrame, sparsity: float | None) -> Table | None:
    """Rewinding to later steps, and standard pruning, at each task's published sparsity or the given one.

    A task without that level stands at the highest level below.
    """
    is_later = ~levels["given"] & (levels["rewind"] != "") & (levels["weights"] == PRETRAINED) & (levels["sparsity"] > 0)
    wanted: list[dict[str, Any]] = []
    for task in published.in_order(levels[is_later]["task"]):
        later = levels[is_later & (levels["task"] == task)]
        for method, runs in later.groupby("method"):
            rows = [row_name(method, rewind=rewind) for rewind in dict.fromkeys([*REWINDS, *sorted(runs["rewind"])])]
            of_task = levels[(levels["task"] == task) & levels["row"].isin([row_name(method), *rows])]
            there = sorted(set(of_task["sparsity"]))
            asked = sparsity or published.sparsity(task) or there[-1]
            at = max((level for level in there if level <= round(asked, 3)), default=there[0])
            wanted += _variants(task, method, at, dict.fromkeys(rows, "rewinding"))
    title = "Rewinding to later steps, and standard pruning (the paper's Table 3)"
    notes = ["`rewind none` is standard pruning. The paper's Table 3 is not among the published numbers."]
    return _beside_own(title, levels, wanted, "the ticket that rewinds to the pre-trained weights", notes)


def weights(levels: DataFrame, _: float | None) -> Table | None:
    """Tickets trained on their own task from perturbed pre-trained weights."""
    is_perturbed = (levels["source"] == levels["task"]) & (levels["weights"] != PRETRAINED) & (levels["rewind"] == "")
    given = levels[levels["given"] & is_perturbed]
    labels = sorted(set(given["weights"]), key=_strength)
    wanted: list[dict[str, Any]] = []
    if set(labels) - {RANDOM, SHUFFLED}:  # Table 2 has these
        for task in published.in_order(given["task"]):
            places = given.loc[given["task"] == task, ["method", "sparsity"]].drop_duplicates()
            for method, at in sorted(places.itertuples(index=False, name=None)):
                rows = {row_name(method, weights=label): "table2" if label == RANDOM else "perturbed" for label in labels}
                wanted += _variants(task, method, at, rows)
    return _beside_own("Tickets trained from perturbed weights", levels, wanted, "the ticket with pre-trained weights")


def _variants(task: str, method: str, at: float, sweep_of_row: Mapping[str, str]) -> list[dict[str, Any]]:
    """The full BERT, a method's ticket at a sparsity, and rows to be compared with the ticket. Sweeps make only the paper's."""
    ticket = {"task": task, "row": row_name(method), "sparsity": at, "sweep": "table2" if is_published(method) else ""}
    variants = [
        ticket | {"row": row, "sweep": sweep if is_published(method) else "", "reference": ticket["row"]}
        for row, sweep in sweep_of_row.items()
    ]
    return [full(task), ticket, *variants]


def _beside_own(
    title: str, levels: DataFrame, wanted: list[dict[str, Any]], what: str, notes: Sequence[str] = ()
) -> Table | None:
    if not wanted:
        return None
    cells = fill(levels, wanted)
    return Table(title, {f"Scores, and differences to {what}": listing(cells)}, cells, notes)


def _strength(label: str) -> tuple[bool, float, str]:
    """Noise from weak to strong, then the others by name."""
    noise = re.fullmatch(r"noise of ([\d.e+-]+)", label)
    return noise is None, float(noise[1]) if noise else 0.0, label


TABLES = {  # name -> function, the sweep that makes its runs
    "2": (table2, "table2"),
    "4": (table4, "table2"),
    "3": (table3, "rewinding"),
    "transfer": (transfer, "transfer"),
    "curves": (curves, "table2"),
    "weights": (weights, "perturbed"),
    "tamt": (tamt, "tamt"),
    "importance": (importance, "importance"),
    "stability": (stability, "stability"),
    "earlybert": (earlybert, "earlybert"),
}
