"""Table 3, and perturbed weights: what becomes of a ticket that rewinds elsewhere, or starts from other weights."""

from __future__ import annotations

import re
from dataclasses import replace

from bert_tickets.report.cells import NEAR, Entry, Pool, compare, expecting, percent
from bert_tickets.report.layout import Panel, Table, score
from bert_tickets.report.notes import CELL, TESTED, differences, make
from bert_tickets.report.published import FULL, TICKET
from bert_tickets.report.results import IMP, PRETRAINED, SHUFFLED
from bert_tickets.runs.summary import published

REWINDS = ("0", "5%", "10%", "20%", "50%", "none")  # Table 3's


# ---- Table 3 ----


def table3(pool: Pool, sparsity: float | None = None) -> Table | None:
    """Rewinding to later steps than theta_0, and not rewinding, at each task's published sparsity or the one given."""
    found = [r for r in pool.records if r.ticket == IMP and r.weights == PRETRAINED and r.rewind != "0"]
    tasks = {r.task: None for r in found if r.sparsity > 0}  # a run of which only the full network is there has no rewinding yet
    if not tasks:
        return None
    rewinds = sorted({*REWINDS, *(r.rewind for r in pool.records if r.task in tasks and r.ticket == IMP)}, key=_lateness)
    notes, lines, entries = [], [], []
    for task in [task for task in pool.tasks if task in tasks]:
        at, said = _level(pool, task, rewinds, sparsity)
        notes += said
        full, plain = pool.full(task), pool.ticket(task, at)
        later = [_rewinding(pool, task, at, rewind) for rewind in rewinds if rewind != "0"]
        later = compare(plain, expecting(later))
        entries += [full, plain, *later]
        lines.append([published.name(task), percent(at), *map(score, [full, plain, *later])])
    notes = [
        CELL,
        *notes,
        "The paper's own Table 3 is not among the published figures here.",
        TESTED.format(family="rewinding steps of a task"),
    ]
    header = ["task", "sparsity", FULL, *map(rewound, rewinds)]
    panels = [Panel("", header, lines, words=1), differences(f"{TICKET} that rewinds to theta_0", entries)]
    title = "Rewinding to later steps, and standard pruning (the paper's Table 3)"
    return make("3", title, panels, entries, notes, pool, "rewinding")


def _rewinding(pool: Pool, task: str, at: float, rewind: str) -> Entry:
    entry = pool.ticket(task, at, rewind, rewound(rewind))
    return replace(entry, sweep="rewinding", variables={"TASKS": task, "REWIND": rewind})


def rewound(rewind: str) -> str:
    """A row of Table 3 in words."""
    if rewind == "none":
        return "standard pruning"
    step = rewind.replace("%", " %") if rewind.endswith("%") else f"step {rewind}"
    return TICKET if rewind == "0" else f"rewound to {step}"


def _lateness(rewind: str) -> tuple[int, float]:
    if rewind == "none":
        return 3, 0.0
    return (1, float(rewind[:-1])) if rewind.endswith("%") else (2 if rewind != "0" else 0, float(rewind))


def _level(pool: Pool, task: str, rewinds: list[str], sparsity: float | None) -> tuple[float, list[str]]:
    """Where a task stands in Table 3, and what is to be said of it: where the asked for is no level, the next lower one."""
    levels = sorted({level for rewind in rewinds for level in pool.levels(task, rewind)})
    asked = sparsity if sparsity is not None else published.sparsity(task)
    if asked is None:
        return levels[-1], [f"{published.name(task)}: no sparsity is published; this is the highest there is."]
    below = [level for level in levels if level < asked + NEAR]
    if sparsity is not None or (below and below[-1] > asked - NEAR):
        there = any(abs(level - asked) < NEAR for level in levels)
        where = f"{published.name(task)}: {percent(asked)} is none of its levels, {', '.join(map(percent, levels))}."
        return asked, [] if there else [where]
    at = below[-1] if below else levels[0]
    return at, [f"{published.name(task)}: the published {percent(asked)} is no level here; {percent(at)} stands for it."]


# ---- perturbed weights ----


def weights(pool: Pool) -> Table | None:
    """The tasks' own tickets trained from other weights than theta_0; None where there are but those of Table 2."""
    places = {(r.task, round(r.sparsity, 3)): None for r in pool.records if r.ticket == r.task and r.weights != PRETRAINED}
    labels = sorted({r.weights for r in pool.records if r.ticket == r.task} - {PRETRAINED}, key=_strength)
    if not set(labels) - {"random", SHUFFLED}:
        return None
    columns = sorted(places, key=lambda place: (pool.tasks.index(place[0]), place[1]))
    found: list[dict[str, Entry]] = []
    for task, at in columns:
        ticket = pool.ticket(task, at)
        raw = [_from_sweep(pool.given(task, label, at, ticket=task, weights=label)) for label in labels]
        compared = compare(ticket, expecting(raw))
        found.append({entry.row: entry for entry in (pool.full(task), ticket, *compared)})
    lines = [[row, *(score(column[row]) for column in found)] for row in (FULL, TICKET, *labels)]
    entries = [entry for column in found for entry in column.values()]
    notes = [CELL, TESTED.format(family="weights of a task at a sparsity")]
    header = ["weights", *(f"{published.name(task)}, {percent(at)}" for task, at in columns)]
    panels = [Panel("", header, lines, words=1), differences(f"{TICKET} of pre-trained weights", entries)]
    return make("weights", "The tasks' own tickets trained from other weights", panels, entries, notes, pool, "perturbed")


def _from_sweep(entry: Entry) -> Entry:
    """The entry with the sweep that makes it: random weights are Table 2's."""
    sweep = "table2" if entry.row == "random" else "perturbed"
    return replace(entry, sweep=sweep, variables={"TASKS": entry.task, "SPARSITY": f"{100 * entry.sparsity:g}"})


def _strength(label: str) -> tuple[bool, float, str]:
    """In order: noise from weak to strong, then the others by their names."""
    noise = re.match(r"noise of ([\d.e+-]+) times", label)
    return noise is None, float(noise[1]) if noise else 0.0, label
