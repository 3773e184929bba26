"""What a run directory tells of its run: finished levels, results, times. No torch: a finished run answers at once."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_tickets import Refused, UserError, brief
from bert_tickets.config import Config, run_name
from bert_tickets.files import read_sealed
from bert_tickets.refusal import need_file

FAILURE = "failure.json"  # what ended the level under way, if it came to no result
FORMAT = 2  # of the run directory; a newer one is refused. From 2 on each file has a checksum and says which run it is of
# What every level's metrics.json has, and more.
LINE = {"level": int, "task": str, "metric": str, "metrics": dict, "sparsity": float, "mask_sha256": str}


def run_dir(cfg: Config, preset: str) -> Path:
    """Where a configuration runs. Equal configurations have one place."""
    return Path(cfg.output_dir) / run_name(cfg, preset)


def levels_of(cfg: Config) -> int:
    """How many levels a configuration's run has when it is finished."""
    return 1 if cfg.mask else cfg.levels


def level_dir(run: Path, level: int) -> Path:
    return run / f"level_{level:02d}"


def levels_done(run: Path) -> int:
    """How many levels are finished: the number of the first that is not. A level's folder is there complete or not at all."""
    level = 0
    while level_dir(run, level).is_dir():
        level += 1
    return level


def level_lost(run: Path) -> Path | None:
    """The folder of a level that is gone although a later one's is there; a run finishes its levels in turn."""
    later = [int(path.name[6:]) for path in run.glob("level_*") if path.name[6:].isdecimal() and path.is_dir()]
    done = levels_done(run)
    return level_dir(run, done) if max(later, default=0) > done else None


def is_finished(cfg: Config, preset: str) -> bool:
    """Whether the configuration's run has all its levels, and was tidied up after the last."""
    return is_settled(run_dir(cfg, preset), levels_of(cfg))


def is_settled(run: Path, levels: int) -> bool:
    """Whether a run directory has all of so many levels, and nothing that a kill after the last would leave: results.jsonl is
    written last."""
    if levels_done(run) < levels:
        return False
    need_file(run / "results.jsonl")
    try:
        return (run / "results.jsonl").read_bytes() == results_lines(run)
    except OSError:
        return False


def results_lines(run: Path) -> bytes:
    """What results.jsonl is to hold: a line a finished level, and one of what ended the next, if it came to no result."""
    files, strict = (level_dir(run, level) / "metrics.json" for level in range(levels_done(run))), is_strict(run)
    lines = [*(read_sealed(file, strict=strict) for file in files), failure(run)]
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines if line is not None).encode()


def failure(run: Path) -> dict[str, Any] | None:
    """What ended the level under way when it was last tried, if it came to no result: its `level`, and why (`ended`). A damaged
    file says nothing; `read_failure` says that it is."""
    try:
        found = read_failure(run)
    except Refused:
        raise
    except UserError:
        return None
    return found if found and found["level"] == levels_done(run) else None  # else it was finished later


def read_failure(run: Path) -> dict[str, Any] | None:
    """What failure.json says, if it is there; `UserError` where it is damaged, or another run's."""
    path = run / FAILURE
    if not path.exists():
        return None
    found, name = read_sealed(path, strict=True), read_sealed(run / "run.json").get("run")
    if type(found.get("level")) is not int or not isinstance(why := found.get("ended"), str) or not why.isprintable():
        raise UserError(f"{path} is damaged: it is to have level and ended")
    if found.get("run") != name:
        raise UserError(f"{path} is damaged or another run's: it is of {brief(found.get('run'))}, and not of {brief(name)}")
    return found


def results(run: Path) -> list[dict[str, Any]]:
    """A dictionary a finished level, as in results.jsonl."""
    return [result(run, level) for level in range(levels_done(run))]


def result(run: Path, level: int) -> dict[str, Any]:
    """What a level's metrics.json says; `UserError` where it is missing or damaged, or has not what all of them have."""
    path = level_dir(run, level) / "metrics.json"
    line = read_sealed(path, strict=is_strict(run))
    for key, kind in LINE.items():
        if not (is_number(line.get(key)) if kind is float else type(line.get(key)) is kind):
            raise UserError(f"{path} is damaged: it is to have {key}, of the kind {kind.__name__}")
    if not is_number(line.get("mask_distance", 0.0)) or not isinstance(line.get("doubts", []), list):
        raise UserError(f"{path} is damaged: its mask_distance is to be a number, and its doubts a list")
    if line["level"] != level:
        raise UserError(f"{path} is damaged or another level's: it is of level {line['level']}")
    values = line["metrics"].values()
    if line["metric"] not in line["metrics"] or not all(value is None or is_number(value) for value in values):
        raise UserError(f"{path} is damaged: its metrics are to be numbers, {line['metric'][:40]} among them")
    return line


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number that can be reckoned with: Python reads infinities, and integers of any size."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def seconds(run: Path) -> dict[int, float]:
    """Wall-clock seconds of training and evaluation by level, from log.jsonl."""
    return {
        event["level"]: event["seconds"]
        for event in events(run / "log.jsonl")
        if event.get("event") == "level" and is_number(event.get("level")) and is_number(event.get("seconds"))
    }


def events(log: Path) -> Iterator[dict[str, Any]]:
    """What log.jsonl tells, in its order. A line that a kill tore, or a log that is gone, is worth no crash."""
    if not os.path.isfile(log):  # a pipe would be read for ever
        return
    with contextlib.suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(event := json.loads(line), dict):
                    yield event


# ---- whether it can be gone on from ----


def check_format(run: Path) -> None:
    """Raise `UserError` where the directory was written by a newer version, or does not say."""
    with needed(run):
        found = _format(run)
    if found > FORMAT:
        raise UserError(f"{run} has format {found}; this version reads up to {FORMAT}: update bert_tickets")


def is_strict(run: Path) -> bool:
    """Whether every file of the directory is to have a checksum and to say which run it is of; those of format 1 need not."""
    return _format(run) >= 2


def _format(run: Path) -> int:
    path = run / "run.json"
    if not path.exists():
        return 0
    found = read_sealed(path).get("format", 0)
    if not is_number(found):
        raise UserError(f"{path} is damaged: its format is no number")
    if found >= 2:
        read_sealed(path, strict=True)
    return found


@contextlib.contextmanager
def needed(run: Path) -> Iterator[None]:
    """What is damaged in here, the run cannot go on without; the `UserError` says what can be done."""
    try:
        yield
    except Refused:
        raise
    except UserError as error:
        raise UserError(
            f"{str(error).rstrip('.')}. The run cannot go on without it: put back a copy, or move {run} away and give the same "
            "command again, which then begins anew."
        ) from None
