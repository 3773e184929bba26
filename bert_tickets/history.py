"""What a run directory tells of its run: finished levels, results, times. No torch: a finished run answers at once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from bert_tickets import UserError
from bert_tickets.config import Config, run_name
from bert_tickets.files import read_sealed

FORMAT = 1  # of the run directory; a newer one is refused


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


def is_finished(cfg: Config, preset: str) -> bool:
    """Whether the configuration's run has all its levels, and was tidied up after the last."""
    return is_settled(run_dir(cfg, preset), levels_of(cfg))


def is_settled(run: Path, levels: int) -> bool:
    """Whether a run directory has all of so many levels, and nothing that a kill after the last would leave: results.jsonl is
    written last."""
    if levels_done(run) < levels:
        return False
    try:
        return (run / "results.jsonl").read_bytes() == results_lines(run)
    except OSError:
        return False


def results_lines(run: Path) -> bytes:
    """What results.jsonl is to hold: a line a finished level."""
    return "".join(json.dumps(result, sort_keys=True) + "\n" for result in results(run)).encode()


def results(run: Path) -> list[dict[str, Any]]:
    """A dictionary a finished level, as in results.jsonl."""
    return [read_sealed(level_dir(run, level) / "metrics.json") for level in range(levels_done(run))]


def seconds(run: Path) -> dict[int, float]:
    """Wall-clock seconds of training and evaluation by level, from log.jsonl."""
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill tore is worth no crash
            event = json.loads(line)
            if event["event"] == "level":
                found[event["level"]] = event["seconds"]
    return found


def check_format(run: Path) -> None:
    """Raise `UserError` where the directory was written by a newer version."""
    about = run / "run.json"
    if about.exists() and (found := read_sealed(about).get("format", 0)) > FORMAT:
        raise UserError(f"{run} has format {found}; this version reads up to {FORMAT}: update bert_tickets")
