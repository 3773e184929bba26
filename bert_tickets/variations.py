"""Table 3, Figure 2 as a table, and perturbed weights: what becomes of a ticket trained from other weights, or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from bert_tickets import UserError, published
from bert_tickets.entries import NEAR, Entry, Pool, compare, percent
from bert_tickets.layout import MISSING, Panel, Table, score, signed
from bert_tickets.published import FULL, TICKET
from bert_tickets.records import IMP, ONESHOT, PRETRAINED, RANDOM, SHUFFLED
from bert_tickets.tables import CELL, TESTED, differences, make

REWINDS = ("0", "5%", "10%", "20%", "50%", "none")  # Table 3's


# ---- Table 3 ----


def table3(pool: Pool, sparsity: float | None = None) -> Table | None:
    """Rewinding to later steps than theta_0, and not rewinding, at each task's published sparsity or the one given."""
    there = {r.rewind for r in pool.records if r.ticket == IMP and r.weights == PRETRAINED}
    if not there - {"0"}:
        return None
    rewinds = sorted({*REWINDS, *there}, key=_lateness)
    tasks = [task for task in pool.tasks if any(pool.levels(task, rewind) for rewind in rewinds)]
    notes, lines, entries = [], [], []
    for task in tasks:
        at, said = _level(pool, task, rewinds, sparsity)
        notes += said
        full = pool.full(task)
        own = {rewind: pool.ticket(task, at, rewind, rewound(rewind)) for rewind in rewinds}
        for rewind in own.keys() - {"0"}:
            own[rewind] = replace(own[rewind], sweep="rewinding", variables={"TASKS": task, "REWIND": rewind})
        own |= zip(list(own)[1:], compare(own["0"], list(own.values())[1:]), strict=True)
        entries += [full, *own.values()]
        lines.append([published.name(task), percent(at), score(full), *map(score, own.values())])
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


# ---- Figure 2 ----


def transfer(pool: Pool, sparsity: float | None = None) -> Table | None:
    """TRANSFER(source, target) minus the full BERT of the target, as Figure 2, at 70 % or where most of the runs are."""
    counts = _transfers(pool)
    if not counts:
        return None
    at = sparsity if sparsity is not None else _where(counts)
    if not any(abs(there - at) < NEAR for there in counts):
        listed = ", ".join(map(percent, sorted(counts)))
        raise UserError(f"no ticket of {percent(at)} was trained on another task; there are some of {listed}")
    tasks = [task for task in pool.tasks if pool.full(task).runs]
    sources = [task for task in published.tasks() if _is_source(pool, task, at)]
    rows = {_ticket_of(task): _from(task) for task in sources}
    rows |= {"one-shot magnitude": lambda target: {"ticket": ONESHOT}}
    if pool.sparsities(ticket=RANDOM, weights=PRETRAINED):
        rows |= {"random pruning": lambda target: {"ticket": RANDOM}}
    keys = [*sources, "one-shot"]
    matrix: dict[str, dict[str, Entry]] = {row: {} for row in rows}
    entries: list[Entry] = []
    for target in tasks:
        full, raw = pool.full(target), []
        for number, (row, wanted) in enumerate(rows.items()):
            entry = pool.given(target, row, at, weights=PRETRAINED, **wanted(target))
            source = keys[number] if number < len(keys) else ""
            if source:  # the sweep has no random tickets
                variables = {"SOURCES": source if source in sources else target, "TARGETS": target, "SPARSITY": f"{100 * at:g}"}
                value = published.transfer(source, target) if abs(at - published.transfer_sparsity()) < NEAR else None
                entry = replace(entry, sweep="transfer", variables=variables, published_difference=value)
            raw.append(entry)
        compared = compare(full, raw)
        entries += [full, *compared]
        for entry in compared:
            matrix[entry.row][target] = entry
    names = [published.name(task) for task in tasks]
    lines = [[row, *(_cell(found[task]) for task in tasks), same_task(matrix, found, tasks)] for row, found in matrix.items()]
    paper = [
        [row, *(signed(published.transfer(key, task), 2) or "not published" for task in tasks), _counted(key)]
        for row, key in zip(rows, keys, strict=False)
    ]
    here = Panel("", ["source \\ target", *names, "at least same-task"], lines, words=1)
    there = Panel(
        f"As published, at {percent(published.transfer_sparsity())}", ["source \\ target", *names, "at least same-task"], paper, 1
    )
    notes = [
        "A cell: the mean over seeds of the target's metric minus its full BERT's, in points (pairs of seeds).",
        "At least same-task: on how many other targets a source does at least as well as the target's own ticket, of those where "
        "both were run; in the published panel of all eleven.",
        f"Published figures: {published.source('transfer')}; means of three runs of BERT-base.",
        TESTED.format(family="sources of a target"),
    ]
    title = f"Transfer of tickets at {percent(at)} sparsity (the paper's Figure 2)"
    return make("transfer", title, [here, there, differences(FULL, entries)], entries, notes, pool, "transfer")


def _ticket_of(task: str) -> str:
    return f"ticket of {published.name(task)}"


def _from(source: str) -> Callable[[str], dict[str, object]]:
    """What the records of a source's tickets are on a target: on its own task, a level of the run that finds them."""
    return lambda target: {"ticket": IMP, "rewind": "0"} if source == target else {"ticket": source}


def _is_source(pool: Pool, task: str, at: float) -> bool:
    return any(
        abs(level - at) < NEAR
        for wanted in ({"ticket": task}, {"ticket": IMP, "task": task, "rewind": "0"})
        for level in pool.sparsities(weights=PRETRAINED, **wanted)
    )


def _transfers(pool: Pool) -> dict[float, int]:
    """How many given tickets were trained at each sparsity, another task's or one-shot."""
    counts: dict[float, int] = {}
    for r in pool.records:
        if r.weights == PRETRAINED and r.ticket in {*published.tasks(), ONESHOT} - {r.task}:
            counts[round(r.sparsity, 3)] = counts.get(round(r.sparsity, 3), 0) + 1
    return counts


def _where(counts: dict[float, int]) -> float:
    """The paper's sparsity, or where most tickets were trained."""
    aim = published.transfer_sparsity()
    return next((at for at in counts if abs(at - aim) < NEAR), max(counts, key=lambda at: (counts[at], at)))


def _cell(entry: Entry) -> str:
    if not entry.summary.n:
        return score(entry)
    if entry.difference is None:
        return f"no full BERT, {score(entry)}"
    pairs = len(entry.difference.seeds)
    doubts = [f"{len(entry.summary.undefined)} undefined"] * bool(entry.summary.undefined)
    doubts += ["all equal"] * entry.summary.constant
    return f"{signed(entry.difference.mean, 2)} ({', '.join([_of(pairs, len(entry.seeds)), *doubts])})"


def _of(count: int, seeds: int) -> str:
    return str(count) if count == seeds else f"{count} of {seeds}"


def same_task(matrix: dict[str, dict[str, Entry]], found: dict[str, Entry], tasks: list[str]) -> str:
    """On how many of the other targets a source does at least as well as the target's own ticket does."""
    pairs = []
    for task in tasks:
        own = matrix.get(_ticket_of(task), {}).get(task)
        entry = found[task]
        if own is not None and entry is not own and entry.difference and own.difference:
            pairs.append(entry.difference.mean >= own.difference.mean)
    return f"{sum(pairs)} of {len(pairs)}" if pairs else MISSING


def _counted(key: str) -> str:
    count = published.at_least_same_task(key)
    return "" if count is None else str(count)


# ---- perturbed weights ----


def weights(pool: Pool) -> Table | None:
    """A task's own tickets trained from other weights than theta_0: shuffled, noised, random."""
    found = {(r.weights, round(r.sparsity, 3)) for r in pool.records if r.ticket == r.task and r.weights != PRETRAINED}
    if not found:
        return None
    sparsities = sorted({sparsity for _, sparsity in found})
    labels = sorted({label for label, _ in found}, key=_strength)
    tasks = [task for task in pool.tasks if pool.sparsities(task=task, ticket=task)]
    matrix: dict[tuple[float, str], dict[str, Entry]] = {}
    entries: list[Entry] = []
    for task in tasks:
        entries.append(full := pool.full(task))
        matrix.setdefault((0.0, FULL), {})[task] = full
        for at in sparsities:
            there = {label for label in labels if at in pool.sparsities(task=task, ticket=task, weights=label)}
            if there:
                ticket = pool.ticket(task, at)
                raw = [pool.given(task, label, at, ticket=task, weights=label) for label in labels if (label, at) in found]
                compared = compare(ticket, [_from_sweep(entry, task, at) for entry in raw])
                entries += [ticket, *compared]
                for entry in [ticket, *compared]:
                    matrix.setdefault((at, entry.row), {})[task] = entry
    lines = [
        [row, percent(at), *(score(by_task[task]) if task in by_task else MISSING for task in tasks)]
        for (at, row), by_task in sorted(matrix.items(), key=lambda item: (item[0][0], _strength(item[0][1])))
    ]
    notes = [CELL, TESTED.format(family="weights of a task at a sparsity")]
    panels = [Panel("", ["weights", "sparsity", *map(published.name, tasks)], lines, words=1)]
    panels.append(differences(f"{TICKET} of pre-trained weights", entries))
    return make("weights", "The tasks' own tickets trained from other weights", panels, entries, notes, pool, "perturbed")


def _from_sweep(entry: Entry, task: str, at: float) -> Entry:
    """The entry with the sweep that makes it, where one does: random weights are Table 2's."""
    sweep = "table2" if entry.row in ("random", SHUFFLED) else "perturbed"
    return replace(entry, sweep=sweep, variables={"TASKS": task, "SPARSITY": f"{100 * at:g}"})


def _strength(label: str) -> tuple[int, float, str]:
    """Rows in order: full BERT, the ticket, noise from weak to strong, the others."""
    noise = re.match(r"noise of ([\d.e+-]+) times", label)
    first = {FULL: 0, TICKET: 1, "random": 4}.get(label, 3)
    return (2, float(noise[1]), label) if noise else (first, 0.0, label)
