"""The run directory, as it is read: finished levels, results, times. Imports no torch: a finished run answers at once.

    run.json        what runs: configuration, command line, versions, fingerprints of model and data
    results.jsonl   one line per level
    train.jsonl     the loss while it trains: level, step, loss, learning rate, seconds
    log.jsonl       when and where it ran, and for how long: with train.jsonl, all that differs between two equal runs
    level_00/       mask.safetensors, metrics.json; of the newest level also weights.safetensors, and moments.safetensors where
                    AdamW goes on; model/ if kept
    failure.json    why the level in progress has no result, if it diverged
    rewind.safetensors      the weights of the rewinding step, where one was asked for
    checkpoint.safetensors  the middle of a level, while one is in progress
    lock, lock.holder       held by the process that trains

A level's folder appears by one rename, complete. Everything else is derived from those folders, or written atomically.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_tickets.config import Config, run_name
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import read_checksummed

FORMAT = 3  # of the run directory; no other is read
FIELDS = {"level": int, "task": str, "method": str, "metric": str, "metrics": dict, "sparsity": float, "mask_sha256": str}


def run_dir(cfg: Config) -> Path:
    """Where a configuration runs. Equal configurations have one place."""
    return Path(cfg.output_dir) / run_name(cfg)


def levels_of(cfg: Config) -> int:
    """How many levels a configuration's run has when it is finished."""
    return getattr(cfg.settings, "levels", 1)


def level_dir(run: Path, level: int) -> Path:
    return run / f"level_{level:02d}"


def levels_done(run: Path) -> int:
    """How many levels are finished: the number of the first that is not."""
    level = 0
    while level_dir(run, level).is_dir():
        level += 1
    return level


def read_run(run: Path) -> dict[str, Any]:
    """run.json. Raises `UserError` if there is none, `Damaged` if it is damaged or another run's, `UserError` for another format."""
    path = run / "run.json"
    if not path.is_file():
        raise UserError(f"{run} is not a run directory: it has no run.json")
    about = read_checksummed(path)
    if about.get("format") != FORMAT:
        raise UserError(
            f"{run} has format {about.get('format')}, and this version reads format {FORMAT}: give another --output-dir"
        )
    if not all(isinstance(about.get(key), dict) for key in ("config", "differs_from_preset", "environment", "fingerprint")):
        raise Damaged(f"{path} is damaged: it lacks config, differs_from_preset, environment or fingerprint")
    return about


def result(run: Path, level: int) -> dict[str, Any]:
    """A level's metrics.json. Raises `Damaged` if it is damaged or another level's."""
    path = level_dir(run, level) / "metrics.json"
    line = read_checksummed(path)
    for key, kind in FIELDS.items():
        if not (is_number(line.get(key)) if kind is float else type(line.get(key)) is kind):
            raise Damaged(f"{path} is damaged: missing field {key} ({kind.__name__})")
    if line["metric"] not in line["metrics"] or not all(v is None or is_number(v) for v in line["metrics"].values()):
        raise Damaged(f"{path} is damaged: its metrics must be numbers, {line['metric']} among them")
    if line["level"] != level:
        raise Damaged(f"{path} belongs to level {line['level']}")
    return line


def results(run: Path) -> list[dict[str, Any]]:
    """One dictionary per finished level, as in results.jsonl."""
    return [result(run, level) for level in range(levels_done(run))]


def results_lines(run: Path) -> bytes:
    """What results.jsonl must hold: a line per finished level, and one for a level that diverged."""
    lines = [*results(run), *([failed] if (failed := failure(run)) else [])]
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()


def failure(run: Path) -> dict[str, Any] | None:
    """Why the level in progress has no result, if it diverged when it was last tried: its `level`, and `ended`."""
    path = run / "failure.json"
    if not path.exists():
        return None
    found = read_checksummed(path)
    return found if found.get("level") == levels_done(run) else None  # else the level was finished later


def is_finished(cfg: Config) -> bool:
    """Whether a configuration's run has all its levels, and results.jsonl, which is written last."""
    run = run_dir(cfg)
    return levels_done(run) >= levels_of(cfg) and has_results(run)


def has_results(run: Path) -> bool:
    """Whether results.jsonl is there, and up to date."""
    path = run / "results.jsonl"
    return path.is_file() and path.read_bytes() == results_lines(run)


def is_number(value: object) -> bool:
    """Whether a value from a JSON file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def seconds(run: Path) -> dict[int, float]:
    """Wall-clock seconds of training and evaluation by level, from log.jsonl."""
    return {event["level"]: event["seconds"] for event in events(run / "log.jsonl") if event.get("event") == "level"}


def events(log: Path) -> Iterator[dict[str, Any]]:
    """The lines of log.jsonl or train.jsonl in their order, without those that a kill tore."""
    if not log.is_file():
        return
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if isinstance(event := json.loads(line), dict):
                    yield event
