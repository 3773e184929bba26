"""Runs as the lines of a picture: which of them are one line, what it is called, and its values over sparsity."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_tickets.files import read_checksummed
from bert_tickets.report.results import FINDING, IMP, ONESHOT, PRETRAINED, RANDOM, LevelResult, by_seed
from bert_tickets.runs.summary import published

UNITS = {
    "accuracy": "accuracy (%)",
    "f1": "F1 (%)",
    "matthews": "Matthews correlation × 100",
    "pearson": "Pearson correlation × 100",
}

Points = dict[float, list[float]]  # percent of the weights removed -> the values of the seeds, times 100


def in_order(tasks: Iterable[str]) -> list[str]:
    """Each task once, as the paper orders them."""
    order = published.tasks()
    return sorted(set(tasks), key=lambda task: (order.index(task) if task in order else len(order), task))


def percent(record: LevelResult) -> float:
    """The weights removed, to a tenth of a percent: a small network cannot remove exactly 40 % of its weights."""
    return round(100 * record.sparsity, 1)


def points(seeds: Mapping[int, LevelResult]) -> list[float]:
    """The task's own metric of each seed, times 100, where it is defined."""
    return [100 * record.value for record in seeds.values() if record.value is not None]


def read_curves(records: Sequence[LevelResult]) -> dict[str, dict[str, Points]]:
    """Task -> line -> its points. Lines pool nothing but seeds; a point without a defined value is left out.

    Raises `UserError` where two runs of one line have the same seed and differ.
    """
    labels, groups = label_runs(records), defaultdict(list)
    for record in records:
        groups[record.task, labels[record.run], percent(record)].append(record)
    places = {labels[record.run]: _place(record) for record in records}
    found: dict[str, dict[str, Points]] = {task: {} for task in in_order(record.task for record in records)}
    for task, label, removed in sorted(groups, key=lambda group: (places[group[1]], *group[1:])):
        values = points(by_seed(groups[task, label, removed], task=task))
        if values:
            found[task].setdefault(label, {})[removed] = values
    return {task: lines for task, lines in found.items() if lines}


def read_doubted(records: Sequence[LevelResult]) -> dict[str, dict[str, set[float]]]:
    """Task -> line -> where, in percent removed, a seed's value is undefined or doubted by its own run."""
    labels = label_runs(records)
    found: dict[str, dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        if is_doubted(record):
            found[record.task][labels[record.run]].add(percent(record))
    return found


def is_doubted(record: LevelResult) -> bool:
    """Whether a value is undefined, or the run that it is of says something against it."""
    return record.value is None or bool(record.warnings)


def _place(record: LevelResult) -> tuple[Any, ...]:
    """The order of lines: a task's own tickets, those of no task, those of other tasks."""
    own = [IMP, record.task, ONESHOT, RANDOM]
    rewound = float(record.rewind.rstrip("%")) if record.rewind[:1].isdigit() else float("inf")
    return (
        own.index(record.ticket) if record.ticket in own else len(own),
        in_order([*published.tasks(), record.ticket]).index(record.ticket),
        rewound,
    )


def label_runs(records: Sequence[LevelResult]) -> dict[Path, str]:
    """A name for the line each run belongs to: its ticket, and the settings in which the runs of its task differ."""
    firsts = {record.run: record for record in records}
    abouts = {run: read_checksummed(run / "run.json") for run in firsts}
    labels = {}
    for run, record in firsts.items():
        alike = {other: abouts[other] for other, first in firsts.items() if first.task == record.task}
        finders = {other: about for other, about in alike.items() if firsts[other].ticket == IMP}
        keys = {key for about in alike.values() for key in about["differs_from_preset"]} | {"protocol"}
        words = []
        for key in sorted(keys - {"seed", "mask", "init", "rewind", "levels"}):
            among = finders if key in FINDING else alike
            values = {str(about["config"].get(key)) for about in among.values()}
            if len(values) > 1 and run in among:
                words.append(f"{key.replace('_', ' ')} {_shorten(str(abouts[run]['config'].get(key)), values)}")
        labels[run] = ", ".join([name_ticket(record), *words])
    return labels


def _shorten(value: str, values: set[str]) -> str:
    """The last part of a path, where no other path ends so."""
    return Path(value).name if len({Path(other).name for other in values}) == len(values) else value


def name_ticket(record: LevelResult) -> str:
    """What is trained, in the words of a legend."""
    if record.ticket == IMP:
        to = f"{record.rewind[:-1]} %" if record.rewind.endswith("%") else f"step {record.rewind}"
        name = {"0": "IMP", "none": "standard pruning"}.get(record.rewind, f"IMP rewound to {to}")
    elif record.ticket == record.task:
        name = "IMP ticket"
    else:
        names = {ONESHOT: "one-shot pruning", RANDOM: "random pruning"}
        name = names.get(record.ticket, f"{published.name(record.ticket)} ticket")
    if record.weights == PRETRAINED:
        return f"{name}, given" if record.ticket == record.task else name
    weights = re.sub(r", seed \d+", "", record.weights)  # only seeds are pooled
    return f"{name}, {weights}" if " " in weights else f"{name}, {weights} weights"
