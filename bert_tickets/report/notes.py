"""What the paper's tables have in common: their notes, and the panel that tests their differences."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bert_tickets.report.cells import Entry, Pool, percent
from bert_tickets.report.layout import Panel, Table, against
from bert_tickets.runs.summary import published

CELL = "A cell: mean ± standard deviation (n - 1) of accuracy, F1 or a correlation, x 100 (seeds); one seed has no deviation."
WITHIN = "Winning, by the paper's criterion: mean >= mean - standard deviation of the full BERT's seeds; it takes two seeds."
EXCEED = "Match or exceed, the stricter criterion: mean >= mean of the full BERT."
TESTED = (
    "Differences are in points, paired over seeds, each with its own t-interval (95 %, n - 1 degrees of freedom). Verdicts are "
    "by Holm's correction over all {family}. `Not told apart` is no proof of equality: see how wide the interval is."
)
HEADER = ["task", "row", "sparsity", "here", "difference", "95 % interval", "pairs", "verdict"]


def make(
    number: str,
    title: str,
    panels: Sequence[Panel],
    entries: Sequence[Entry],
    notes: Sequence[str],
    pool: Pool,
    sweep: str,
) -> Table:
    """A table with the notes that all have: of equal values, of settings, of what is missing. `sweep` makes all its runs."""
    tasks = {entry.task for entry in entries}
    missing = [*pool.unfinished(tasks), *pool.remedies(entries), *_absent(tasks, sweep)]
    return Table(number, title, panels, entries, [*notes, *doubtful(entries), *equal_values(entries), *pool.notes], missing)


def differences(reference: str, entries: Sequence[Entry]) -> Panel:
    """The panel of what was compared with `reference`, a line an entry that has values."""
    lines = [against(entry) for entry in entries if entry.reference and entry.summary.n]
    return Panel(f"Differences from the {reference}", HEADER, lines, words=2)


def doubtful(entries: Sequence[Entry]) -> list[str]:
    """What runs say against their own values, a sentence a row."""
    return [
        f"Doubted: {published.name(entry.task)}, {entry.row} at {percent(entry.sparsity)}: {'; '.join(entry.warnings)}"
        for entry in entries
        if entry.warnings
    ]


def equal_values(entries: Sequence[Entry]) -> list[str]:
    """Where rows of a task share one score in every seed, which networks that say one class do."""
    found: dict[tuple[str, float], dict[tuple, str]] = {}
    for entry in entries:
        if entry.summary.constant and entry.summary.mean is not None:
            rows = found.setdefault((entry.task, entry.summary.mean), {})
            rows[entry.runs, entry.sparsity] = f"{entry.row} at {percent(entry.sparsity)}"
    return [
        f"{published.name(task)}: exactly {value:.4f} in every seed of {', '.join(rows.values())}: a network that says one thing?"
        for (task, value), rows in found.items()
        if len(rows) > 1
    ]


def _absent(tasks: Collection[str], sweep: str) -> list[str]:
    """The paper's tasks that have no runs, as a sentence."""
    left = [task for task in published.tasks() if task not in tasks]
    names = ", ".join(map(published.name, left))
    return [f"no run of {names}. To make them: `TASKS='{' '.join(left)}' bash scripts/{sweep}.sh`"] if left else []
