"""Read a run directory: finished levels, results, times. Imports no torch, for a fast answer.

    run.json        configuration, command line, versions, fingerprints of model and data
    results.jsonl   one line per level
    train.jsonl     the loss while it trains: level, step, loss, learning rate, seconds
    log.jsonl       when and where it ran, and for how long; two equal runs differ only in this file and train.jsonl
    level_00/       mask.safetensors, metrics.json; in the newest level also weights.safetensors, and moments.safetensors if
                    the next level continues with AdamW's state; model/ with --keep-models
    failure.json    the reason, if the level in progress diverged
    rewind.safetensors      the weights of the rewinding step
    checkpoint.safetensors  the state within the level in progress
    lock, lock.holder       held by the process that trains

A level's folder is complete when it appears, by a rename. All other files are derived from levels, or written atomically.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_tickets.config import Config, run_name
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import read_checksummed

FORMAT = 3  # of the run directory; no other is read
FIELDS = {  # of a level's metrics.json
    "level": int,
    "task": str,
    "method": str,
    "metric": str,
    "metrics": dict,
    "sparsity": float,
    "mask_sha256": str,
    "warnings": list,
}


def run_dir(cfg: Config) -> Path:
    """Return the directory of a configuration's run. Equal configurations have the same one."""
    return Path(cfg.output_dir) / run_name(cfg)


def levels_of(cfg: Config) -> int:
    """Return the number of levels of a configuration's run."""
    return getattr(cfg.settings, "levels", 1)


def level_dir(run: Path, level: int) -> Path:
    return run / f"level_{level:02d}"


def levels_done(run: Path) -> int:
    """Return the number of finished levels."""
    level = 0
    while level_dir(run, level).is_dir():
        level += 1
    return level


def read_run(run: Path) -> dict[str, Any]:
    """Read run.json. Raises `UserError` if there is none or it has another format, `Damaged` if it is damaged."""
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
    """Read a level's metrics.json. Raises `Damaged` if it is damaged or another level's."""
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
    """Read the results of all finished levels, as in results.jsonl."""
    return [result(run, level) for level in range(levels_done(run))]


def results_lines(run: Path) -> bytes:
    """Return the content that results.jsonl must have: a line per finished level, and one for a level that diverged."""
    lines = [*results(run), *([failed] if (failed := failure(run)) else [])]
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()


def failure(run: Path) -> dict[str, Any] | None:
    """Read failure.json if the level in progress diverged when it was last tried: its `level`, and the reason, `ended`."""
    try:
        found = read_checksummed(run / "failure.json")
    except (FileNotFoundError, Damaged):
        return None
    return found if found.get("level") == levels_done(run) and isinstance(found.get("ended"), str) else None


def is_finished(cfg: Config) -> bool:
    """Return whether a configuration's run has all its levels, and results.jsonl, which is written last."""
    run = run_dir(cfg)
    return levels_done(run) >= levels_of(cfg) and has_results(run)


def has_results(run: Path) -> bool:
    """Return whether results.jsonl exists and is up to date."""
    path = run / "results.jsonl"
    return path.is_file() and path.read_bytes() == results_lines(run)


def is_number(value: object) -> bool:
    """Return whether a value from a JSON file is a finite number."""
    return type(value) in (int, float) and -1e300 < value < 1e300  # type: ignore[operator]


def seconds(run: Path) -> dict[int, float]:
    """Read the wall-clock seconds of training and evaluation of each level from log.jsonl."""
    return {
        event["level"]: event["seconds"]
        for event in events(run / "log.jsonl")
        if event.get("event") == "level" and type(event.get("level")) is int and is_number(event.get("seconds"))
    }


def events(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of log.jsonl or train.jsonl. Skips lines that are not JSON objects: a kill may leave a part of one."""
    if not log.is_file():
        return
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(event := json.loads(line), dict):
                    yield event
