"""Read a run directory: finished levels, results, times. Imports no torch, for a fast answer.

bert_tickets/README.md lists its files. A level's folder is complete when it appears, by a rename.
All other files are derived from levels, or written atomically.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_tickets.config import Config
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import read_checksummed
from bert_tickets.runs.naming import check_settings, run_name

FORMAT = 3  # of the run directory; no other is read


def run_dir(cfg: Config) -> Path:
    """Return the directory of a configuration's run. Equal configurations on equal files have the same one."""
    return Path(cfg.output_dir) / run_name(cfg)


def level_dir(run: Path, level: int) -> Path:
    return run / f"level_{level:02d}"


def levels_done(run: Path) -> int:
    """Return the number of finished levels. Raises `Damaged` if one is missing: it might end otherwise if trained again."""
    done = sum(path.name[6:].isdecimal() and path.is_dir() for path in run.glob("level_*"))
    for level in range(done):
        if not level_dir(run, level).is_dir():
            raise Damaged(f"{level_dir(run, level)} is missing, and a later level is there")
    return done


def find_level(run: Path, level: int | None) -> int:
    """Return the number of a finished level, the newest unless `level` is given. Raises `UserError` if there is none."""
    done = levels_done(run)
    if not done:
        raise UserError(f"{run} has no finished level")
    if level is not None and not 0 <= level < done:
        raise UserError(f"{run} has no finished level {level}; its levels are 0 to {done - 1}")
    return done - 1 if level is None else level


def read_run(run: Path) -> dict[str, Any]:
    """Read run.json. Raises `Damaged` if it is missing or damaged, `UserError` if it has another format."""
    if not (run / "run.json").is_file():
        raise Damaged(f"{run} is not a run directory: it has no run.json")
    about = read_checksummed(run / "run.json")
    if (found := about.get("format")) != FORMAT:
        raise UserError(f"{run} has format {found}, and this version reads format {FORMAT}: give another --output-dir")
    return about


def result(run: Path, level: int) -> dict[str, Any]:
    """Read a level's metrics.json. Raises `Damaged` if it is damaged or another level's."""
    path = level_dir(run, level) / "metrics.json"
    line = read_checksummed(path)
    if line.get("level") != level:
        raise Damaged(f"{path} belongs to level {line.get('level')}")
    return line


def results(run: Path) -> list[dict[str, Any]]:
    """Read the results of all finished levels, as in results.jsonl."""
    return [result(run, level) for level in range(levels_done(run))]


def failure(run: Path) -> dict[str, Any] | None:
    """Read failure.json if the level in progress diverged when it was last tried: its `level`, and the reason, `ended`."""
    try:
        found = read_checksummed(run / "failure.json")
    except (FileNotFoundError, Damaged):
        return None
    return found if found.get("level") == levels_done(run) else None


def results_lines(run: Path) -> bytes:
    """Return the content that results.jsonl must have: a line per finished level, and one for a level that diverged."""
    lines = [*results(run), *([failed] if (failed := failure(run)) else [])]
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()


def has_results(run: Path) -> bool:
    """Return whether results.jsonl is up to date. It may be missing as long as it would have no line."""
    path = run / "results.jsonl"
    return (path.read_bytes() if path.is_file() else b"") == results_lines(run)


def is_finished(cfg: Config) -> bool:
    """Return whether a configuration's run has all its levels, and results.jsonl, which is written last.

    Raises `UserError` if the run has other settings than its name says.
    """
    run = run_dir(cfg)
    if (run / "run.json").exists():
        check_settings(run, read_run(run)["config"], cfg)
    return levels_done(run) >= cfg.settings.levels and has_results(run)


def seconds(run: Path) -> dict[int, float]:
    """Read the wall-clock seconds of each level's training from log.jsonl, without its last evaluation."""
    found = {}
    for event in events(run / "log.jsonl"):
        level, spent = event.get("level"), event.get("seconds")
        if event.get("event") == "level" and isinstance(level, int) and isinstance(spent, float) and math.isfinite(spent):
            found[level] = spent
    return found


def events(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of log.jsonl or train.jsonl. Skips lines that are not JSON objects: a kill may leave a part of one."""
    if not log.is_file():
        return
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(event := json.loads(line), dict):
                    yield event
