"""Seconds and arithmetic of EarlyBERT's runs, search included, beside those of the full BERT of the same task and seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.runs.directory import events, read_run, results, seconds

if TYPE_CHECKING:
    from pandas import DataFrame

SAME = ("gpu", "threads", "processes", "versions")  # of the environment, for seconds that can be compared


def costs(early: DataFrame, dense: DataFrame) -> DataFrame:
    """Compute a line per run of EarlyBERT: its seconds and draw, and the shares saved (%) of the full BERT's; NaN if unknown.

    `dense` are the levels of full BERTs; a run is compared with that of its task and seed. Both are levels of `read_results`.
    """
    import pandas as pd

    of_dense = {(line.task, line.seed): line for line in dense.itertuples()}
    found, longest = [], dict[tuple[str, int], Mapping[str, Any]]()
    for line in early.itertuples():
        search, train = results(Path(line.run))
        found.append((line, search, train))
        place = (line.task, line.seed)
        if train.get("steps", 0) > longest.get(place, {}).get("steps", 0):
            longest[place] = train
    lines = []
    for line, search, train in found:
        place = (line.task, line.seed)
        lines.append(_line(line, search, train) | _beside(line, search, train, of_dense.get(place), longest.get(place, {})))
    return pd.DataFrame(lines, columns=COLUMNS)


COLUMNS = ["task", "row", "seed", "search_seconds", "train_seconds", "full_seconds", "time_saved", "flops_saved"]
COLUMNS += ["heads", "heads_kept", "neurons", "neurons_kept", "drawn", "fired", "differing"]
MEANS = COLUMNS[3 : COLUMNS.index("fired")]


def _line(early: Any, search: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    spent, draw = seconds(Path(early.run)), search.get("draw", {})
    found = {"task": early.task, "row": early.row, "seed": early.seed, "differing": []}
    found |= {"search_seconds": spent.get(0, math.nan), "train_seconds": spent.get(1, math.nan)}
    found |= {name: train.get("sizes", {}).get(name, math.nan) for name in ("heads", "heads_kept", "neurons", "neurons_kept")}
    return found | {"drawn": draw.get("step") or math.nan, "fired": draw.get("fired")}


def _beside(
    early: Any, search: Mapping[str, Any], train: Mapping[str, Any], dense: Any, longest: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run saves of the cost of the full BERT."""
    if dense is None:
        return {}
    run, other = Path(early.run), Path(dense.run)
    spent, full = seconds(run), seconds(other).get(dense.level, math.nan)
    found = {"full_seconds": full, "time_saved": saved(spent.get(0, math.nan) + spent.get(1, math.nan), full)}
    found["flops_saved"] = saved(_flops(search) + _flops(train), full_flops(results(other)[dense.level], longest))
    return found | {"differing": differing(run, other)}


def saved(cost: float, of: float) -> float:
    """The share of a cost that is saved, in percent; NaN if one is unknown."""
    return 100 * (1 - cost / of) if of else math.nan


def _flops(level: Mapping[str, Any]) -> float:
    return level.get("flops", math.nan)


def full_flops(dense: Mapping[str, Any], early: Mapping[str, Any]) -> float:
    """The arithmetic of a full BERT's training: as recorded, or its steps at the mean cost of a full step in a ticket's training.

    Both trainings are over whole epochs of the same data, and have the same mean number of tokens a step.
    """
    if "flops" in dense or not early:
        return _flops(dense)
    return early.get("full_flops", math.nan) / early["steps"] * dense.get("steps", math.nan)


def differing(run: Path, other: Path) -> list[str]:
    """Name the parts of the environments in which two runs differ, such that their seconds cannot be compared."""
    one, two = (read_run(path).get("environment", {}) for path in (run, other))
    found = [name for name in SAME if one.get(name) != two.get(name)]
    return found + ["host"] * (_hosts(run) != _hosts(other))


def _hosts(run: Path) -> set[Any]:
    return {event["host"] for event in events(run / "log.jsonl") if "host" in event}


# ---- in words ----


def warnings(found: DataFrame) -> Iterator[str]:
    """Say of which tasks the seconds cannot be compared."""
    for task in published.in_order(found["task"]):
        parts = sorted({part for parts in found.loc[found["task"] == task, "differing"] for part in parts})
        if parts:
            words = f"runs of EarlyBERT and of the full BERT differ in {', '.join(parts)}"
            yield f"{published.name(task)}: {words}. Their seconds are not comparable, nor is the time saved."


def spread(values: Any, digits: int = 1, unit: str = "") -> str:
    """Mean ± standard deviation; "" without a known value."""
    known = [value for value in values if value == value]
    if not known:
        return ""
    return f"{mean(known):,.{digits}f}" + (f" ± {stdev(known):,.{digits}f}" if len(known) > 1 else "") + unit


def cost_line(found: DataFrame) -> dict[str, str]:
    """The costs of a row on a task in words: means and standard deviations over seeds."""
    line = {"seconds of the search": spread(found["search_seconds"]), "of the training": spread(found["train_seconds"])}
    line |= {"of the full BERT": spread(found["full_seconds"]), "time saved": spread(found["time_saved"], unit=" %")}
    line |= {"FLOPs saved": spread(found["flops_saved"], unit=" %")}
    for kind in ("heads", "neurons"):
        kept = spread(found[f"{kind}_kept"], 0)
        line[f"{kind} kept"] = kept and f"{kept} of {found[kind].iloc[0]:,.0f}"
    fired = [step for step in found["fired"] if step is not None and step == step]
    line["drawn at step"] = spread(found["drawn"], 0)
    line["rule fires at step"] = spread(fired, 0) + (f" (in {len(fired)} of {len(found)})" if 0 < len(fired) < len(found) else "")
    return line


def over_tasks(found: DataFrame, name: str) -> str:
    """The range over tasks of the means over seeds, in percent."""
    means = sorted(found.groupby("task")[name].mean().dropna())
    if not means:
        return ""
    return " to ".join(dict.fromkeys(f"{value:.1f}" for value in (means[0], means[-1]))) + " %"
