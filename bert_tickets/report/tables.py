"""The paper's tables over our runs, with the published numbers beside them, and the runs that are missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bert_tickets.report import published
from bert_tickets.report.cells import (
    CLOSE,
    FULL,
    NO_RUN,
    RANDOM_PRUNING,
    Cell,
    ResultSet,
    compare,
    expect_common_seeds,
    is_published,
    percent,
    row_name,
)
from bert_tickets.report.formats import Table, frame, listing, scores
from bert_tickets.report.matching import Highest, highest, match_or_exceed, within_one_sd
from bert_tickets.report.results import PRETRAINED, SHUFFLED, LevelResult
from bert_tickets.report.transfer import transfer

REWINDS = ("0", "5%", "10%", "20%", "50%", "none")  # the paper's Table 3
WITHIN = "Within one deviation, the paper's criterion: mean >= mean - standard deviation of the full BERT; it needs two seeds."
EXCEED = "Match or exceed, the stricter criterion: mean >= mean of the full BERT."
COMMON_NOTES = (
    "Scores: mean ± standard deviation (n - 1) of accuracy, F1 or a correlation, x 100 (number of seeds).",
    "Differences: in points, paired over seeds, each with its own 95 % t-interval. Verdicts are corrected by Holm's method over "
    "all comparisons with one reference. `not significant` does not mean equal: see the width of the interval.",
    "Commands for missing runs need the variables of the other runs too (`bash scripts/table2.sh --help` lists them).",
)


def build(name: str, found: ResultSet, sparsity: float | None = None) -> Table | None:
    """Build one of `TABLES`; None if there are no runs for it. `sparsity` (a fraction) is for tables 3 and transfer."""
    make, sweep = TABLES[name]
    title, grids, cells, notes = make(found, sparsity)
    if not cells:
        return None
    warned = (f"{published.name(c.task)}, {c.row} at {percent(c.sparsity)}: {'; '.join(c.warnings)}" for c in cells if c.warnings)
    warnings = dict.fromkeys(f"Warning: {line}" for line in warned)
    notes = [*notes, *COMMON_NOTES, *warnings, *_coverings(cells), *_settings(found.results)]
    return Table(name, title, grids, cells, notes, missing_runs(found, cells, sweep))


def _coverings(cells: Sequence[Cell]) -> list[str]:
    """A note for each task whose masks cover different weights."""
    notes = []
    for task in dict.fromkeys(cell.task for cell in cells):
        sizes = sorted({r.total for cell in cells if cell.task == task for r in cell.results})
        words = f"{published.name(task)}: the masks cover {' or '.join(f'{n:,}' for n in sizes)} weights; their sparsities are"
        notes += [f"{words} not comparable."] * (len(sizes) > 1)
    return notes


def _settings(results: Sequence[LevelResult]) -> list[str]:
    """The settings that differ from the paper's, a note for all tasks that share them."""
    tasks: dict[str, set[str]] = {}
    for r in results:
        if (words := ", ".join(part for part in (r.setting, r.finding) if part)) and not r.given:
            tasks.setdefault(words, set()).add(published.name(r.task))
    return [f"{', '.join(sorted(names))}: not the published settings, but {words}" for words, names in sorted(tasks.items())]


def missing_runs(found: ResultSet, cells: Sequence[Cell], sweep: str) -> list[str]:
    """What a table lacks, a sentence each: diverged and unfinished runs, seeds of its cells, tasks of the paper."""
    tasks = {cell.task for cell in cells}
    lines = [str(failure) for failure in found.failures]
    last = {r.run: r for r in sorted(found.results, key=lambda r: r.level) if r.task in tasks}
    lines += [f"{run}: {r.level + 1} of {r.levels} levels are finished" for run, r in last.items() if r.level + 1 < r.levels]
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        if cell.missing:
            groups.setdefault((cell.task, cell.sparsity, cell.sweep, cell.missing), []).append(cell)
    lines += map(_missing_seeds, groups.values())
    if left := [task for task in published.TASKS if task not in tasks]:
        names = ", ".join(map(published.name, left))
        lines.append(f"no run of {names}. To make them: `TASKS='{' '.join(left)}' bash scripts/{sweep}.sh`")
    return lines


def _missing_seeds(group: Sequence[Cell]) -> str:
    first = group[0]
    seeds = " ".join(map(str, first.missing))
    at = f" at {percent(first.sparsity)}" if first.sparsity else ""
    text = f"no run of {published.name(first.task)}{at}, seeds {seeds}: {'; '.join(dict.fromkeys(cell.row for cell in group))}"
    if not first.sweep:
        return text
    tasks = " ".join(dict.fromkeys(task for cell in group for task in (cell.source, cell.task) if task))
    more = f" SPARSITY={100 * first.sparsity:.0f}" if first.sparsity and first.sweep != "rewinding" else ""
    return f"{text}. To make them: `TASKS='{tasks}' SEEDS='{seeds}'{more} bash scripts/{first.sweep}.sh`"


# ---- Tables 2 and 4, Figure 11 ----


def table2(found: ResultSet, _: float | None) -> tuple:
    """The tickets at the highest matching sparsity, and the controls: random pruning, random weights, shuffled weights."""
    lines, cells = [], []
    for task in found.dense_tasks:
        full = found.full(task)
        shown, others = [], []
        for name in found.tickets(task):
            curve = found.curve(task, name)
            best = highest({at: within_one_sd(cell.summary, full.summary) for at, cell in curve.items()}).sparsity
            rows = {"ticket": row_name(name), RANDOM_PRUNING: RANDOM_PRUNING}
            rows |= {f"{words} weights": row_name(name, weights=words) for words in ("random", SHUFFLED)}
            places = {at for row in list(rows.values())[2:] for at in found.sparsities(task, row)}
            places |= {at for at in (best, published.sparsity(task)) if at is not None}
            keys = {row: published.beside_table2(key, task) if is_published(name) else "" for key, row in rows.items()}
            listed = [found.ticket(task, name, at, row, published=keys[row]) for at in sorted(places) for row in keys]
            stands = published.sparsity(task) if best is None else best  # where controls should be
            shown += [cell for cell in listed if cell.results or cell.sparsity == stands]
            others += [cell for at, cell in curve.items() if at not in places]  # tested too, in the search for the best
            lines.append(_highest_line(full, name, curve))
        cells += [full, *compare(full, [*shown, *others])[: len(shown)]]
    notes = [
        WITHIN,
        published.explain("table2", "table4"),
        "Table 2 has five runs of BERT-base. As printed, the tickets of MRPC, SST-2, CoLA and MLM are below the full BERT by "
        "more than its standard deviation, and less than their own.",
    ]
    title = "The highest sparsity with matching tickets, and controls (the paper's Table 2)"
    return title, {"": frame(lines), f"Scores, and differences to the {FULL}": listing(cells)}, cells, notes


def table4(found: ResultSet, _: float | None) -> tuple:
    """The tickets at the highest sparsity that matches or exceeds the full BERT."""
    lines, cells = [], []
    for task in found.dense_tasks:
        full, curves_of = found.full(task), {name: found.curve(task, name) for name in found.tickets(task)}
        tested = compare(full, [cell for curve in curves_of.values() for cell in curve.values()])
        cells.append(full)
        for name, curve in curves_of.items():
            best = highest({at: match_or_exceed(cell.summary, full.summary) for at, cell in curve.items()}).sparsity
            cells += [cell for cell in tested if (cell.row, cell.sparsity) == (row_name(name), best)]
            lines.append(_highest_line(full, name, curve))
    notes = [f"{EXCEED} That one seed does is weak evidence.", WITHIN, published.explain("table4", "table2")]
    title = "The highest sparsity that matches or exceeds the full BERT (the paper's Table 4)"
    return title, {"": frame(lines), f"Scores, and differences to the {FULL}": listing(cells)}, cells, notes


def _highest_line(full: Cell, name: str, curve: Mapping[float, Cell]) -> dict[str, str]:
    """The highest sparsities of a method's tickets by both criteria, and the published ones."""
    line = {"task": published.name(full.task), "method": name}
    criteria = {"within one deviation": ("table2", within_one_sd), "match or exceed": ("table4", match_or_exceed)}
    for words, (table, criterion) in criteria.items():
        best = highest({at: criterion(cell.summary, full.summary) for at, cell in curve.items()})
        at = published.sparsity(full.task, table) if is_published(name) else None
        line |= {words: describe(best, curve), f"published {published.source(table)}": "" if at is None else percent(at)}
    return line


def describe(best: Highest, curve: Mapping[float, Cell]) -> str:
    """The highest sparsity that satisfies a criterion, with what speaks against it in brackets."""
    if not curve:
        return NO_RUN
    if best.sparsity is None:
        return "undecided: needs two seeds" if best.undecided else "none"
    remarks = ["warning"] * bool(curve[best.sparsity].warnings) + ["the last level"] * best.last
    remarks += [f"not at {', '.join(map(percent, best.misses))}"] * bool(best.misses)
    remarks += [f"undecided at {', '.join(map(percent, best.undecided))}"] * bool(best.undecided)
    return percent(best.sparsity) + (f" ({'; '.join(remarks)})" if remarks else "")


def curves(found: ResultSet, _: float | None) -> tuple:
    """All rows that start from the pre-trained weights, over all sparsities."""
    cells: list[Cell] = []
    for task in found.dense_tasks:
        names = {row_name(name): name for name in found.tickets(task)}
        plain = {row for (of, row, at), cell in found.cells.items() if of == task and at and _is_plain(cell)}
        raw = [cell for name in names.values() for cell in found.curve(task, name).values()]
        for row in sorted(plain - names.keys() - {FULL}):
            raw += expect_common_seeds([found.cell(task, row, at) for at in found.sparsities(task, row)])
        cells += [found.full(task), *compare(found.full(task), raw)]
    grids = {"": scores(cells), f"Differences to the {FULL}": listing([cell for cell in cells if cell.reference])}
    return "All tasks over all sparsities (the paper's Figure 11)", grids, cells, [f"* {WITHIN} ** {EXCEED}"]


def _is_plain(cell: Cell) -> bool:
    return all(r.weights == PRETRAINED and r.rewind == "0" for r in cell.results)


# ---- Table 3, perturbed weights ----


def table3(found: ResultSet, sparsity: float | None) -> tuple:
    """Rewinding to later steps, and standard pruning, at each task's published sparsity or the given one.

    A task without that level stands at the highest level below.
    """
    cells: list[Cell] = []
    for task in found.tasks:
        later = [r for r in found.own(task) if r.rewind != "0" and r.weights == PRETRAINED and r.sparsity > 0]
        for name in sorted({found.name_of(r) for r in later}):
            rewinds = sorted({*REWINDS[1:], *(r.rewind for r in later if found.name_of(r) == name)}, key=_lateness)
            rows = [row_name(name, rewind=rewind) for rewind in rewinds]
            levels = sorted({at for row in (row_name(name), *rows) for at in found.sparsities(task, row)})
            wanted = sparsity or published.sparsity(task) or levels[-1]
            at = max((level for level in levels if level < wanted + CLOSE), default=levels[0])
            own = found.ticket(task, name, at)
            swept = expect_common_seeds([found.ticket(task, name, at, row, "rewinding") for row in rows])
            cells += [found.full(task), own, *compare(own, swept)]
    title = "Rewinding to later steps, and standard pruning (the paper's Table 3)"
    notes = ["The paper's Table 3 is not among the published numbers."]
    return title, {"Scores, and differences to the ticket that rewinds to the pre-trained weights": listing(cells)}, cells, notes


def _lateness(rewind: str) -> tuple[int, float]:
    if rewind == "none":
        return 3, 0.0
    return (1, float(rewind[:-1])) if rewind.endswith("%") else (2, float(rewind))


def weights(found: ResultSet, _: float | None) -> tuple:
    """Tickets trained on their own task from perturbed pre-trained weights."""
    cells: list[Cell] = []
    given = [r for r in found.results if r.given and r.source == r.task and r.weights != PRETRAINED and r.rewind == "0"]
    labels = sorted({r.weights for r in given}, key=_strength)
    places = {(r.task, found.name_of(r), round(r.sparsity, 3)) for r in given} if set(labels) - {"random", SHUFFLED} else set()
    for task, name, at in sorted(places, key=lambda place: (found.tasks.index(place[0]), place[1:])):
        own = found.ticket(task, name, at)
        sweeps = {row_name(name, weights=label): "table2" if label == "random" else "perturbed" for label in labels}
        perturbed = [found.ticket(task, name, at, row, sweep) for row, sweep in sweeps.items()]
        cells += [found.full(task), own, *compare(own, expect_common_seeds(perturbed))]
    title = "Tickets trained from perturbed weights"
    return title, {"Scores, and differences to the ticket with pre-trained weights": listing(cells)}, cells, []


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
}
