"""Tables 2 and 4 and the curves: up to which sparsity there are winning tickets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bert_tickets.report.cells import NEAR, Entry, Pool, compare, expecting, percent
from bert_tickets.report.layout import MISSING, Panel, Table, score
from bert_tickets.report.notes import CELL, EXCEED, TESTED, WITHIN, differences, make
from bert_tickets.report.published import FULL, RANDOM_PRUNING, RANDOM_WEIGHTS, ROWS, SHUFFLED_WEIGHTS, TICKET
from bert_tickets.report.results import IMP, ONESHOT, PRETRAINED, RANDOM, SHUFFLED
from bert_tickets.report.significance import Highest, highest, matches
from bert_tickets.runs.summary import published


def best_text(best: Highest, curve: Mapping[float, Entry]) -> str:
    """The highest sparsity in words, with what there is to say against it."""
    if best.sparsity is None:
        return "undecided: the criterion needs two seeds" if best.undecided else "none"
    warnings = ["doubted"] * bool(curve[best.sparsity].warnings)
    if best.last:
        warnings.append("the last level here")
    if best.misses:
        warnings.append(f"though not at {', '.join(map(percent, best.misses))}")
    if best.undecided:
        warnings.append(f"undecided at {', '.join(map(percent, best.undecided))}")
    return percent(best.sparsity) + (f" ({'; '.join(warnings)})" if warnings else "")


def _full_tasks(pool: Pool) -> list[str]:
    return [task for task in pool.tasks if pool.full(task).runs]


def _curve(pool: Pool, task: str) -> dict[float, Entry]:
    return {sparsity: pool.ticket(task, sparsity) for sparsity in pool.levels(task)}


def _percent(sparsity: float | None) -> str:
    return "not published" if sparsity is None else percent(sparsity)


# ---- Table 2 ----


def table2(pool: Pool) -> Table | None:
    """The highest sparsity with winning tickets, beside the controls, which stand where their runs are."""
    if not (tasks := _full_tasks(pool)):
        return None
    lines: list[list[str]] = []
    entries: list[Entry] = []
    for task in tasks:
        full, curve = pool.full(task), _curve(pool, task)
        best = highest({sparsity: matches(entry.summary, full.summary) for sparsity, entry in curve.items()})
        stands = standing(pool, task, best.sparsity)
        rows = [entry for at in stands for entry in (pool.ticket(task, at), *_controls(pool, task, at))]
        others = [entry for sparsity, entry in curve.items() if sparsity not in stands]  # tested too, as the best was sought
        shown = [_beside_published(entry) for entry in compare(full, [*rows, *others])[: len(rows)]]
        entries += [full, *shown]
        name = published.name(task)
        if best.sparsity is None:
            lines.append([name, "highest winning", best_text(best, curve), score(full), "", "", "", ""])
            name = ""
        for sparsity in stands:
            what = ("highest winning", best_text(best, curve)) if sparsity == best.sparsity else ("controls", percent(sparsity))
            lines.append([name, *what, score(full), *(score(entry) for entry in shown if entry.sparsity == sparsity)])
            name = ""
        lines.append(["", "published", _percent(published.sparsity(task)), *(_published(row, task) for row in ROWS)])
    notes = [
        CELL,
        f"{WITHIN} Beside the highest winning sparsity, a line where the controls are, if that is elsewhere.",
        f"Published figures: {published.source('table2')}; five runs of BERT-base. As printed, the tickets of MRPC, SST-2, CoLA "
        "and MLM are further below the full BERT than its standard deviation, and within their own.",
        TESTED.format(family="of a task's levels and of the controls shown"),
    ]
    panels = [Panel("", ["task", "", "sparsity", *ROWS], lines, words=3), differences(FULL, entries)]
    title = "The highest sparsity with winning tickets, and its controls (the paper's Table 2)"
    return make("2", title, panels, entries, notes, pool, "table2")


def _wanted(task: str) -> dict[str, dict[str, object]]:
    """What the records of Table 2's last three rows are."""
    return {
        RANDOM_PRUNING: {"ticket": RANDOM, "weights": PRETRAINED},
        RANDOM_WEIGHTS: {"ticket": task, "weights": "random"},
        SHUFFLED_WEIGHTS: {"ticket": task, "weights": SHUFFLED},
    }


def _controls(pool: Pool, task: str, sparsity: float) -> list[Entry]:
    variables = {"TASKS": task, "SPARSITY": f"{100 * sparsity:g}"}
    found = [pool.given(task, row, sparsity, **wanted) for row, wanted in _wanted(task).items()]
    return [replace(entry, sweep="table2", variables=variables) for entry in found]


def standing(pool: Pool, task: str, best: float | None) -> list[float]:
    """The sparsities of Table 2's lines: the highest winning one, and where the controls are if that is elsewhere.

    Controls may be at many; then those with most of the three rows count, of these the published one, or the nearest to the
    best (the highest, where there is none).
    """
    counts: dict[float, int] = {}
    for wanted in _wanted(task).values():
        for sparsity in pool.sparsities(task=task, **wanted):
            counts[sparsity] = counts.get(sparsity, 0) + 1
    most = [sparsity for sparsity, count in counts.items() if count == max(counts.values())]
    if best is not None and (not most or best in most):
        return [best]
    at = published.sparsity(task)
    aim = next((sparsity for sparsity in most if at is not None and abs(sparsity - at) < NEAR), None)
    if aim is None and most:
        aim = max(most) if best is None else min(most, key=lambda sparsity: (abs(sparsity - best), sparsity))
    return [sparsity for sparsity in (best, aim) if sparsity is not None]


def _beside_published(entry: Entry) -> Entry:
    figure = published.table2(entry.row, entry.task)
    return replace(entry, published=figure, published_sparsity=published.sparsity(entry.task)) if figure else entry


def _published(row: str, task: str) -> str:
    figure = published.table2(row, task)
    if figure is None:
        return "not published"
    return f"{figure.mean:.1f}" + (f" ± {figure.sd:.1f}" if figure.sd is not None else "")


# ---- Table 4 ----


def table4(pool: Pool) -> Table | None:
    """The highest matching sparsity under both of the paper's criteria."""
    if not (tasks := _full_tasks(pool)):
        return None
    lines: list[list[str]] = []
    entries: list[Entry] = []
    for task in tasks:
        full, curve = pool.full(task), _curve(pool, task)
        tested = dict(zip(curve, compare(full, list(curve.values())), strict=True))
        strict = highest({sparsity: entry.exceeds for sparsity, entry in tested.items()})
        loose = highest({sparsity: entry.within for sparsity, entry in tested.items()})
        at = published.sparsity(task, "table4")
        ticket = None if strict.sparsity is None else replace(tested[strict.sparsity], published_sparsity=at)
        cells = [best_text(strict, curve), _percent(at), best_text(loose, curve), _percent(published.sparsity(task))]
        lines.append([published.name(task), *cells, score(full), score(ticket) if ticket else "none"])
        entries += [full, *([ticket] if ticket else [])]
    header = ["task", "match or exceed", "published", "within one deviation", "published", FULL, "ticket that matches or exceeds"]
    notes = [
        CELL,
        f"{EXCEED} {WITHIN} One seed can match or exceed, and says little.",
        f"Published, match or exceed: {published.source('table4')}; within one deviation: {published.source('table2')}.",
        TESTED.format(family="levels of a task"),
    ]
    panels = [Panel("", header, lines, words=5), differences(FULL, entries)]
    title = "The highest sparsity that matches or exceeds the full BERT (the paper's Table 4)"
    return make("4", title, panels, entries, notes, pool, "table2")


# ---- curves ----


def curves(pool: Pool) -> Table | None:
    """Every task over all sparsities: its own tickets, one-shot and random ones, and those of other tasks."""
    if not (tasks := _full_tasks(pool)):
        return None
    found: dict[str, dict[float, dict[str, Entry]]] = {}
    fulls = {task: pool.full(task) for task in tasks}
    entries: list[Entry] = []
    for task, full in fulls.items():
        raw = list(_curve(pool, task).values())
        for row, ticket in _tickets(pool, task).items():
            wanted = {"ticket": ticket, "weights": PRETRAINED}
            there = pool.sparsities(task=task, **wanted)
            raw += expecting([pool.given(task, row, sparsity, **wanted) for sparsity in there])
        compared = compare(full, raw)
        entries += [full, *compared]
        for entry in [replace(full, row=TICKET), *compared]:
            found.setdefault(entry.row, {}).setdefault(entry.sparsity, {})[task] = entry
    lines = [
        [row, percent(sparsity), *(_marked(by_task.get(task)) for task in tasks)]
        for row, by_sparsity in found.items()
        for sparsity, by_task in sorted(by_sparsity.items())
    ]
    header = ["ticket", "sparsity", *map(published.name, tasks)]
    notes = [
        CELL,
        f"* {WITHIN} ** And match or exceed: mean >= mean of the full BERT.",
        TESTED.format(family="comparisons of a task in this table"),
    ]
    panels = [Panel("", header, lines, words=2), differences(FULL, entries)]
    return make("curves", "Every task over all sparsities (the paper's Figure 11)", panels, entries, notes, pool, "table2")


def _tickets(pool: Pool, task: str) -> dict[str, str]:
    """The origins of the given tickets of a task by what they are called in a table."""
    there = {r.ticket for r in pool.records if r.task == task and r.weights == PRETRAINED} - {IMP, task}
    names = {"one-shot magnitude": ONESHOT, RANDOM_PRUNING: RANDOM}
    names |= {f"ticket of {published.name(other)}": other for other in published.tasks()}
    return {row: ticket for row, ticket in names.items() if ticket in there}


def _marked(entry: Entry | None) -> str:
    """A score with the stars of its criteria."""
    if entry is None:
        return MISSING
    return score(entry) + (" **" if entry.within and entry.exceeds else " *" if entry.within else "")
