"""Cells of tables: the results that differ only in their seed, named by task, row and sparsity.

A row says how the ticket was found and what it starts from: `imp ticket`, `imp ticket of MNLI`, `imp ticket, random weights`,
`random pruning`. The names come from the results, so that a new method has rows without code here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.matching import match_or_exceed, within_one_sd
from bert_tickets.report.results import PRETRAINED, Failure, LevelResult, check_same_subject, plainness
from bert_tickets.report.significance import Difference, Summary, holm, paired, summarize, verdict

FULL = "full BERT"
RANDOM_PRUNING, ONE_SHOT = "random pruning", "one-shot pruning"
UNTRAINED = {"oneshot random": RANDOM_PRUNING, "oneshot magnitude": ONE_SHOT}  # the paper's names of what oneshot.py makes
UNIT = 100  # as in the paper: percent, and correlations x 100
NO_RUN = "no run"
CLOSE = 6e-4  # sparsities that differ by less are one level: masks consist of whole weights


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The results of one row on one task at one sparsity, over seeds. Values are x 100."""

    task: str
    row: str
    sparsity: float  # fraction, to three decimals: small networks cannot prune exactly 40 %
    results: tuple[LevelResult, ...] = ()  # sorted by seed
    seeds: tuple[int, ...] = ()  # that should be there
    sweep: str = ""  # scripts/<sweep>.sh makes such runs
    source: str = ""  # the task that the ticket is to be found on, if another
    published: str = ""  # the published value
    reference: str = ""  # the row that `difference` is to
    difference: Difference | None = None
    within: bool | None = None  # one standard deviation of the full BERT
    exceeds: bool | None = None  # or equals the full BERT's mean

    @property
    def summary(self) -> Summary:
        return summarize({r.seed: r.value for r in self.results}, UNIT)

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.seeds) - {r.seed for r in self.results}))

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"seed {r.seed}: {warning}" for r in self.results for warning in r.warnings)

    @property
    def is_marked(self) -> bool:
        """Whether a value is undefined or has a warning."""
        return bool(self.summary.undefined or self.warnings)

    @property
    def text(self) -> str:
        """Mean and standard deviation with `count`."""
        s = self.summary
        if not self.results:
            return NO_RUN
        if s.mean is None:
            return f"undefined ({self.count(s.n)})"
        return f"{s.mean:.1f}" + ("" if s.sd is None else f" ± {s.sd:.1f}") + f" ({self.count(s.n)})"

    def count(self, n: int) -> str:
        """The number of seeds or pairs, of how many, and marks of undefined values and warnings."""
        marks = [f"{n} of {len(self.seeds)}" if n < len(self.seeds) else str(n)]
        marks += [f"{len(self.summary.undefined)} undefined"] * bool(n and self.summary.undefined)
        marks += ["all equal"] * self.summary.constant + ["warning"] * bool(self.warnings)
        return ", ".join(marks)

    @property
    def verdict(self) -> str:
        if not self.results:
            return NO_RUN
        return ("" if self.summary.n else "undefined") or (verdict(self.difference) if self.reference else "")


def place(cell: Cell) -> tuple:
    """The order of rows: the full BERT, tickets on their own task, tickets of no task, tickets of other tasks."""
    first = cell.results[0]
    kind = 0 if not first.given else 1 if first.source == first.task else 2 if not first.source else 3
    order = [*published.TASKS, first.source].index(first.source)
    return not cell.row.startswith(FULL), kind, order if kind == 3 else 0, first.rewind, cell.row, cell.sparsity


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:.1f}".removesuffix(".0") + " %"


def row_name(method: str, *, source: str = "", rewind: str = "0", weights: str = PRETRAINED) -> str:
    """The row of a method's tickets; `source` is the task they were found on, if another than they are trained on."""
    text = method if rewind == "none" else f"{method} ticket"
    text += f" of {published.name(source)}" * bool(source)
    if rewind == "none":
        text += ", standard pruning"
    elif rewind != "0":
        text += f", rewound to {rewind.replace('%', ' %') if rewind.endswith('%') else f'step {rewind}'}"
    return text if weights == PRETRAINED else f"{text}, {weights}" + " weights" * (" " not in weights)


class ResultSet:
    """Results grouped into cells.

    Raises `UserError` for runs that have the same settings and seed, and differ in their results, data or initial weights. Equal
    copies of a run count once.
    """

    def __init__(self, results: Sequence[LevelResult], failures: Sequence[Failure] = ()) -> None:
        check_same_subject(results)
        self.results, self.failures = results, failures
        found = [((r.source, r.method), r.finding) for r in results if not r.given]
        self.names = {
            (*key, finding): key[1] + (f" ({', '.join(words)})" if words else "")
            for (key, finding), words in _unshared(found).items()
        }
        self.cells: dict[tuple[str, str, float], Cell] = {}
        settings = _unshared((r.task, r.setting) for r in results)
        for row, r in [*((self.row_of(r), r) for r in results), *((FULL, r) for r in _dense(results))]:
            self._add(", ".join([row, *settings[r.task, r.setting]]), r)
        self.tasks = published.in_order(r.task for r in results)
        self.dense_tasks = [task for task in self.tasks if (task, FULL, 0.0) in self.cells]  # with a full BERT

    def _add(self, row: str, r: LevelResult) -> None:
        key = (r.task, row, round(r.sparsity, 3))
        cell = self.cells.get(key) or Cell(task=key[0], row=row, sparsity=key[2])
        other = next((q for q in cell.results if q.seed == r.seed), None)
        if other is None:
            added = tuple(sorted((*cell.results, r), key=lambda q: q.seed))
            self.cells[key] = replace(cell, results=added)
        elif (other.metrics, other.mask_sha256) != (r.metrics, r.mask_sha256):
            where = f"{r.task} at {percent(r.sparsity)} with seed {r.seed}"
            raise UserError(f"{other.run} and {r.run} are both {row} on {where}, and differ: give one of them")

    def row_of(self, r: LevelResult) -> str:
        """A result's row. Own tickets that are given again, and masks of unknown origin, are told apart from the others."""
        name = self.name_of(r)
        if not r.given:
            found_in = "" if r.weights == PRETRAINED else f", found in {r.weights} weights"
            return row_name(name, rewind=r.rewind) + found_in
        if not r.source:
            name = UNTRAINED.get(r.method, r.method or f"mask {r.mask_sha256[:8]}")
            return name if r.weights == PRETRAINED else row_name(name, weights=r.weights)
        row = row_name(name, source="" if r.source == r.task else r.source, rewind=r.rewind, weights=r.weights)
        return row + ", trained again" * (r.source == r.task and r.weights == PRETRAINED)

    def name_of(self, r: LevelResult) -> str:
        """The method of a result in a row's name: with its settings, if there are runs with others."""
        return self.names.get((r.source, r.method, r.finding), r.method)

    def tickets(self, task: str) -> list[str]:
        """The methods that found tickets on a task, as in the names of rows; the paper's first."""
        found = {self.name_of(r) for r in self.own(task) if r.weights == PRETRAINED and r.sparsity > 0}
        return sorted(found, key=lambda name: (not is_published(name), name))

    def own(self, task: str) -> list[LevelResult]:
        """The results of the runs that find tickets on a task."""
        return [r for r in self.results if r.task == task and not r.given]

    def sparsities(self, task: str, row: str) -> list[float]:
        """Where a row has results, ascending, without 0."""
        return sorted(at for other, name, at in self.cells if (other, name) == (task, row) and at > 0)

    def full(self, task: str) -> Cell:
        """The full BERT, fine-tuned on the task."""
        return self.cell(task, FULL, 0.0, sweep="table2", published=published.beside_table2(FULL, task))

    def cell(self, task: str, row: str, sparsity: float, *, method: str = "", **more: Any) -> Cell:
        """The cell with these results, or one without any; it should have the seeds of the runs of `method` on the task."""
        own = {r.seed for r in self.own(task) if method in ("", self.name_of(r))}
        seeds = tuple(sorted(own or {r.seed for r in self.results if r.task == task}))
        found = self.cells.get((task, row, round(sparsity, 3)), Cell(task=task, row=row, sparsity=sparsity))
        return replace(found, seeds=seeds, **more)

    def ticket(self, task: str, name: str, at: float, row: str = "", sweep: str = "table2", **more: Any) -> Cell:
        """A cell of a method's tickets on their own task, by default of the ticket itself. Sweeps make only the paper's."""
        sweep = sweep if name == published.METHOD else ""
        return self.cell(task, row or row_name(name), at, method=name, sweep=sweep, **more)

    def curve(self, task: str, name: str) -> dict[float, Cell]:
        """The tickets of a method by sparsity."""
        return {at: self.ticket(task, name, at) for at in self.sparsities(task, row_name(name))}


def is_published(name: str) -> bool:
    """Whether a method, as in the name of a row, is the paper's."""
    return name.partition(" (")[0] == published.METHOD


def _unshared(pairs: Iterable[tuple[Any, str]]) -> dict[tuple[Any, str], list[str]]:
    """Of each pair of a group and a text ("lr 0.1, scope tensor") the words that not all texts of the group have."""
    groups: dict[Any, dict[str, list[str]]] = {}
    for key, text in pairs:
        groups.setdefault(key, {})[text] = text.split(", ") if text else []
    shared = {key: set.intersection(*map(set, texts.values())) for key, texts in groups.items()}
    return {
        (key, text): [word for word in words if word not in shared[key]]
        for key, texts in groups.items()
        for text, words in texts.items()
    }


def _dense(results: Iterable[LevelResult]) -> list[LevelResult]:
    """The full BERT: level 0 of runs that find tickets from the pre-trained weights; of each task and seed the plainest."""
    found = sorted((r for r in results if not r.given and r.weights == PRETRAINED and r.sparsity == 0), key=plainness)
    plainest = {(r.task, r.setting, r.seed): plainness(r) for r in reversed(found)}
    return [r for r in found if plainness(r) == plainest[r.task, r.setting, r.seed]]


def expect_common_seeds(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, of which each should have all seeds that any has: a sweep may use fewer seeds than another."""
    seeds = tuple(sorted({r.seed for cell in cells for r in cell.results}))
    return [replace(cell, seeds=seeds) for cell in cells]


def compare(reference: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """The cells with their paired differences to `reference`, p-values corrected over all of them; to the full BERT also with the
    paper's criteria."""
    differences = [paired(cell.summary, reference.summary) for cell in cells]
    corrected = holm([difference.p if difference else None for difference in differences])
    done = []
    for cell, difference, p in zip(cells, differences, corrected, strict=True):
        cell = replace(cell, reference=reference.row, difference=difference and replace(difference, p_holm=p))
        if reference.row == FULL and cell.results:
            within, exceeds = within_one_sd(cell.summary, reference.summary), match_or_exceed(cell.summary, reference.summary)
            cell = replace(cell, within=within, exceeds=exceeds)
        done.append(cell)
    return done
