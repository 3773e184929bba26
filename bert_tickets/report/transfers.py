"""Figure 2 as a table: what a task's ticket does on another task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bert_tickets.errors import UserError
from bert_tickets.report.cells import NEAR, Entry, Pool, compare, expecting, percent
from bert_tickets.report.layout import MISSING, Panel, Table, score, signed
from bert_tickets.report.notes import TESTED, differences, make
from bert_tickets.report.published import FULL, RANDOM_PRUNING
from bert_tickets.report.results import IMP, ONESHOT, PRETRAINED, RANDOM
from bert_tickets.report.significance import paired
from bert_tickets.runs.summary import published

Matrix = Mapping[str, Mapping[str, Entry]]  # source -> target -> entry; a source is a task, ONESHOT or RANDOM


def transfer(pool: Pool, sparsity: float | None = None) -> Table | None:
    """TRANSFER(source, target) minus the full BERT of the target, as Figure 2, at 70 % or where most of the runs are.

    Raises `UserError` where there is no such run at the sparsity that is asked for.
    """
    counts = _counts(pool)
    if not counts:
        return None
    at = sparsity if sparsity is not None else _where(counts)
    if not any(abs(there - at) < NEAR for there in counts):
        listed = ", ".join(map(percent, sorted(counts)))
        raise UserError(f"no ticket of {percent(at)} was trained on another task; there are some of {listed}")
    targets = [task for task in pool.tasks if pool.full(task).runs]
    sources = _sources(pool, at)
    matrix: dict[str, dict[str, Entry]] = {source: {} for source in sources}
    entries: list[Entry] = []
    raw = expecting(
        [_entry(pool, source, target, at) for target in targets for source in sources if source not in (target, RANDOM)]
    )
    raw += expecting([_entry(pool, RANDOM, target, at) for target in targets if RANDOM in sources])  # of another sweep
    for target in targets:
        own = [pool.ticket(target, at, row=_name(target))] * (target in sources)
        compared = compare(pool.full(target), [_beside_published(e) for e in [*own, *(e for e in raw if e.task == target)]])
        entries += [pool.full(target), *compared]
        by_row = {entry.row: entry for entry in compared}
        for source in sources:
            matrix[source][target] = by_row[_name(source)]
    header = ["source \\ target", *map(published.name, targets), "at least same-task"]
    lines = [[_name(s), *(_cell(matrix[s][t]) for t in targets), at_least_same_task(matrix, s)] for s in sources]
    paper = [[_name(s), *(_published(s, t) for t in targets), _counted(s)] for s in sources if s != RANDOM]
    notes = [
        "A cell: the mean over seeds of the target's metric minus its full BERT's, in points (pairs of seeds).",
        "At least same-task: on how many other targets a source does at least as well as the target's own ticket, over the seeds "
        "of both, of the targets where both were run; as published, of all others.",
        f"Published figures: {published.source('transfer')}; means of three runs of BERT-base.",
        TESTED.format(family="sources of a target"),
    ]
    there = f"As published, at {percent(published.transfer_sparsity())}"
    panels = [Panel("", header, lines, words=1), Panel(there, header, paper, words=1), differences(FULL, entries)]
    title = f"Transfer of tickets at {percent(at)} sparsity (the paper's Figure 2)"
    return make("transfer", title, panels, entries, notes, pool, "transfer")


def at_least_same_task(matrix: Matrix, source: str) -> str:
    """On how many of the other targets a source does at least as well as the target's own ticket, of how many there are."""
    pairs = [
        paired(entry.summary, matrix[target][target].summary)
        for target, entry in matrix[source].items()
        if target != source and target in matrix
    ]
    told = [pair.mean >= 0 for pair in pairs if pair]
    return f"{sum(told)} of {len(told)}" if told else MISSING


def _counts(pool: Pool) -> dict[float, int]:
    """How many tickets of other tasks, or one-shot, were trained at each sparsity."""
    counts: dict[float, int] = {}
    for r in pool.records:
        if r.weights == PRETRAINED and r.ticket in {*published.tasks(), ONESHOT} - {r.task}:
            counts[round(r.sparsity, 3)] = counts.get(round(r.sparsity, 3), 0) + 1
    return counts


def _where(counts: Mapping[float, int]) -> float:
    """The paper's sparsity, or where most tickets were trained."""
    aim = published.transfer_sparsity()
    return next((at for at in counts if abs(at - aim) < NEAR), max(counts, key=lambda at: (counts[at], at)))


def _sources(pool: Pool, at: float) -> list[str]:
    """The tasks whose tickets there are at a sparsity; one-shot, as it is the paper's; and random ones where there are any."""
    plain = [r for r in pool.records if r.weights == PRETRAINED and r.rewind in ("", "0") and _near(r.sparsity, at)]
    there = {r.task if r.ticket == IMP else r.ticket for r in plain}
    return [*(task for task in published.tasks() if task in there), ONESHOT, *([RANDOM] if RANDOM in there else [])]


def _near(one: float, other: float) -> bool:
    return abs(one - other) < NEAR


def _name(source: str) -> str:
    return {ONESHOT: "one-shot magnitude", RANDOM: RANDOM_PRUNING}.get(source) or f"ticket of {published.name(source)}"


def _entry(pool: Pool, source: str, target: str, at: float) -> Entry:
    """A source's ticket on another task, with the sweep that trains it there; random ones have none."""
    entry = pool.given(target, _name(source), at, ticket=source, weights=PRETRAINED)
    needed = target if source == ONESHOT else source
    variables = {"SOURCES": needed, "TARGETS": target, "SPARSITY": f"{100 * at:g}"}
    return entry if source == RANDOM else replace(entry, sweep="transfer", variables=variables)


def _beside_published(entry: Entry) -> Entry:
    """The entry with Figure 2's, where it is at its sparsity."""
    if not _near(entry.sparsity, published.transfer_sparsity()):
        return entry
    keys = {_name(ONESHOT): "one-shot"} | {_name(task): task for task in published.tasks()}
    return replace(entry, published_difference=published.transfer(keys.get(entry.row, ""), entry.task))


def _cell(entry: Entry) -> str:
    """A difference and how many pairs of seeds it is of; a score where there is nothing to compare it with."""
    if entry.difference is None:
        return score(entry) if not entry.summary.n else f"{score(entry)}, no full BERT"
    pairs, summary = len(entry.difference.seeds), entry.summary
    seeds = f"{pairs} of {len(entry.seeds)}" if pairs < len(entry.seeds) else str(pairs)
    warnings = [f"{len(summary.undefined)} undefined"] * bool(summary.undefined) + ["all equal"] * summary.constant
    warnings += ["doubted"] * bool(entry.warnings)
    return f"{signed(entry.difference.mean, 2)} ({', '.join([seeds, *warnings])})"


def _published(source: str, target: str) -> str:
    return signed(published.transfer(source, target), 2) or "not published"


def _counted(source: str) -> str:
    count = published.at_least_same_task(source)
    return "not published" if count is None else str(count)
