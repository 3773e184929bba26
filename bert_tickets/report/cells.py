"""The entries of the paper's tables, gathered from the records of runs: a metric under one treatment, over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bert_tickets.errors import UserError
from bert_tickets.report.results import IMP, PRETRAINED, Failure, LevelResult, by_seed, dense, need_one_setting, need_one_subject
from bert_tickets.report.significance import Difference, Summary, holm, matches, matches_or_exceeds, paired, summarize, verdict
from bert_tickets.report.sweeps import command
from bert_tickets.runs.summary import published

UNIT = 100.0  # the paper's: percent, and correlations x 100
NEAR = 6e-4  # two sparsities that differ by less are one level: masks are made of whole weights
CHOOSE = "give those of one, or choose it with --setting"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A number of a table, and all that is said of it. Values are x 100."""

    task: str
    row: str
    sparsity: float  # a share
    metric: str = ""
    seeds: tuple[int, ...]  # that the task has runs of; `missing` are those without this one
    summary: Summary
    records: tuple[LevelResult, ...] = ()  # that it is of, by seed
    warnings: tuple[str, ...] = ()  # what its runs say against their values, with the seed
    published: published.Figure | None = None
    published_sparsity: float | None = None
    published_difference: float | None = None
    reference: str = ""  # what the difference is to
    difference: Difference | None = None
    within: bool | None = None  # of the full BERT's standard deviation, and
    exceeds: bool | None = None  # matches or exceeds its mean; None where that cannot be said, or was not compared
    corrected: float | None = None  # the difference's p by Holm
    verdict: str = ""
    sweep: str = ""  # that makes such runs, with these of its variables
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> tuple[Path, ...]:
        return tuple(record.run for record in self.records)

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(seed for seed in self.seeds if seed not in self.summary.values and seed not in self.summary.undefined)


@dataclass(frozen=True)
class Pool:
    """Records that may stand in one table: one setting a task, and tickets found in one way."""

    records: Sequence[LevelResult]
    notes: Sequence[str] = ()
    failures: Sequence[Failure] = ()

    @property
    def tasks(self) -> list[str]:
        """The tasks that anything was trained on, in the paper's order."""
        order = published.tasks()
        return sorted({r.task for r in self.records}, key=lambda t: (order.index(t) if t in order else len(order), t))

    def seeds(self, task: str) -> tuple[int, ...]:
        """Those of the runs that find the task's tickets, and where there are none of all that were trained on it."""
        own = [r for r in self.records if r.task == task]
        return tuple(sorted({r.seed for r in own if r.ticket == IMP} or {r.seed for r in own}))

    def sparsities(self, **wanted: object) -> list[float]:
        """Where there are records whose fields are as wanted, rising; the full network is not counted."""
        found = {round(r.sparsity, 3) for r in self.records if all(getattr(r, k) == v for k, v in wanted.items())}
        return sorted(found - {0.0})

    def levels(self, task: str, rewind: str = "0") -> list[float]:
        """The sparsities of a task's own tickets."""
        return self.sparsities(task=task, ticket=IMP, weights=PRETRAINED, rewind=rewind)

    def full(self, task: str) -> Entry:
        """The full BERT, trained on the task."""
        entry = self._entry(task, published.FULL, 0.0, dense(self.records, task))
        figure = published.table2(published.FULL, task)
        at = 0.0 if figure else None
        return replace(entry, published=figure, published_sparsity=at, sweep="table2", variables={"TASKS": task})

    def ticket(self, task: str, sparsity: float, rewind: str = "0", row: str = published.TICKET) -> Entry:
        """A task's own ticket: a level of the runs that find them."""
        entry = self.given(task, row, sparsity, ticket=IMP, weights=PRETRAINED, rewind=rewind)
        return replace(entry, sweep="table2", variables={"TASKS": task, "SPARSITY": f"{100 * sparsity:g}"})

    def given(self, task: str, row: str, sparsity: float, **wanted: object) -> Entry:
        """The records on a task at a sparsity whose fields are as wanted."""
        near = [r for r in self.records if abs(r.sparsity - sparsity) < NEAR]
        return self._entry(task, row, sparsity, by_seed(near, task=task, **wanted))

    def _entry(self, task: str, row: str, sparsity: float, found: Mapping[int, LevelResult]) -> Entry:
        records = [found[seed] for seed in sorted(found)]
        return Entry(
            task=task,
            row=row,
            sparsity=sparsity,
            metric=records[0].metric if records else "",
            seeds=self.seeds(task),
            summary=summarize({seed: record.value for seed, record in found.items()}, UNIT),
            records=tuple(records),
            warnings=tuple(f"seed {record.seed}: {doubt}" for record in records for doubt in record.warnings),
        )

    def unfinished(self, tasks: Iterable[str]) -> list[str]:
        """The runs of these tasks that have not all their levels, a sentence each; first those of any task that say why."""
        told = [str(failure) for failure in self.failures]
        done: dict[Path, list[LevelResult]] = {}
        for record in self.records:
            if record.task in tasks and record.ticket == IMP:
                done.setdefault(record.run, []).append(record)
        short = {run: (len(r), r[0].levels) for run, r in done.items() if len(r) < r[0].levels}
        return told + [f"{run} has finished {some} of its {levels} levels" for run, (some, levels) in short.items()]

    def remedies(self, entries: Iterable[Entry]) -> list[str]:
        """What runs entries lack, and the command of the sweep that makes them, a sentence each."""
        groups: dict[tuple, list[Entry]] = {}
        for entry in entries:
            if entry.missing and entry.sweep:
                fixed = tuple(sorted((k, v) for k, v in entry.variables.items() if k not in JOINED))
                groups.setdefault((entry.task, entry.sparsity, entry.sweep, fixed, entry.missing), []).append(entry)
        return [self._remedy(group) for group in groups.values()]

    def _remedy(self, group: Sequence[Entry]) -> str:
        first = group[0]
        rows = ", ".join(dict.fromkeys(entry.row for entry in group))
        at = f" at {percent(first.sparsity)}" if first.sparsity else ""
        seeds = f"seed{'s' * (len(first.missing) > 1)} {', '.join(map(str, first.missing))}"
        variables = dict(first.variables)
        for name in JOINED & variables.keys():
            variables[name] = " ".join(dict.fromkeys(entry.variables[name] for entry in group))
        found = f"no run of {published.name(first.task)}{at}, {seeds}: {rows}"
        tasks = dict.fromkeys([first.task, *variables.get("SOURCES", "").split()])
        finding = [next((r.run for r in self.records if r.task == task and r.ticket == IMP), None) for task in tasks]
        line = command(first.sweep, [run for run in finding if run], first.missing, variables)
        return f"{found}. To make them: `{line}`" if line else f"{found}. No sweep makes them as the others were made."


JOINED = {"SOURCES", "REWIND"}  # variables of a sweep that several entries' commands share as one


def percent(sparsity: float) -> str:
    text = f"{100 * sparsity:.1f}".removesuffix(".0")
    return f"{text} %"


def choose(records: Sequence[LevelResult], failures: Sequence[Failure] = ()) -> Pool:
    """The records that tables are made of: those of the plain way to find tickets, or of the one that there is.

    Raises `UserError` where a task has two settings, or tickets found in several ways of which none is the plain one. A given
    ticket is left out where the run that found it is there and is not one of those chosen, or rewinds elsewhere.
    """
    need_one_setting(records, CHOOSE)
    need_one_subject(records)
    notes, chosen = [], {}
    for task in sorted({r.task for r in records}):
        ways: dict[str, Path] = {}
        for record in records:
            if record.task == task and record.ticket == IMP:
                ways.setdefault(record.finding, record.run)
        if len(ways) > 1 and "" not in ways:
            listed = "\n".join(f"  {way} (such as {run})" for way, run in ways.items())
            raise UserError(f"the tickets of {task} were found in {len(ways)} ways; give the runs of one:\n{listed}")
        chosen[task] = "" if "" in ways else next(iter(ways), "")
        others = sorted(set(ways) - {chosen[task]})
        notes += [f"{published.name(task)}: tickets found with {way} are left out" for way in others]
    own = [r for r in records if r.ticket != IMP or r.finding == chosen[r.task]]
    plain = {r.mask_sha256 for r in own if r.ticket == IMP and r.rewind == "0"}
    rewound = {r.task for r in own if r.rewind == "0"}  # where there are plain tickets to tell the others from
    foreign = {
        r.mask_sha256
        for r in records
        if r.ticket == IMP and (r.finding != chosen[r.task] or (r.rewind != "0" and r.task in rewound))
    }
    kept = [r for r in own if r.ticket == IMP or r.mask_sha256 not in foreign - plain]
    return Pool(kept, [*notes, *_settings(kept)], failures)


def _settings(records: Sequence[LevelResult]) -> list[str]:
    """What differs from the published settings, a sentence for the tasks that share it."""
    tasks: dict[str, set[str]] = {}
    for record in records:
        words = ", ".join(part for part in (record.setting, record.finding) if part)
        if words and record.ticket == IMP:
            tasks.setdefault(words, set()).add(published.name(record.task))
    return [f"{', '.join(sorted(names))}: not the published settings, but {words}" for words, names in sorted(tasks.items())]


def expecting(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, of which each is to have the seeds that any has: what one sweep makes may be fewer than another's."""
    seeds = tuple(sorted({seed for e in entries for seed in (*e.summary.values, *e.summary.undefined)}))
    return [replace(entry, seeds=seeds) for entry in entries]


def compare(reference: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """The entries with their paired differences to `reference`, and a verdict by Holm's correction over all of them.

    Beside the full BERT also whether they match, by the paper's two criteria.
    """
    differences = [paired(entry.summary, reference.summary) for entry in entries]
    full = reference.row == published.FULL
    corrected = holm([difference.p if difference else None for difference in differences])
    return [
        replace(
            e,
            reference=reference.row,
            difference=d,
            within=matches(e.summary, reference.summary) if full and e.runs else None,
            exceeds=matches_or_exceeds(e.summary, reference.summary) if full and e.runs else None,
            corrected=p,
            verdict=verdict(d, p) if e.summary.n else "",
        )
        for e, d, p in zip(entries, differences, corrected, strict=True)
    ]
