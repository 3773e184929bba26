"""Prepare a run directory for resuming: verify its files, and finish the work that a kill interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_tickets.errors import Damaged
from bert_tickets.files import read_facts, write
from bert_tickets.runs.directory import failure, levels_done, results_lines
from bert_tickets.runs.directory import level_dir as _level_dir
from bert_tickets.runs.integrity import check_levels, check_tensors

CHECKPOINT = "checkpoint.safetensors"


def resume(run: Path, levels: int) -> None:
    """Verify and tidy the directory of a run of `levels` levels. Raises `Damaged` if a file that the run needs is damaged."""
    if levels_done(run) or any((run / name).exists() for name in ("run.json", CHECKPOINT)):
        with advice_to_restore(run):
            check_levels(run)
    for leftover in run.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if failed := failure(run):
        print(f"level {failed['level']} diverged before ({failed['ended']}); it is trained again")
    elif (run / "failure.json").exists():
        print(f"{run / 'failure.json'} is damaged, or its level was finished later; it is removed")
        (run / "failure.json").unlink()
    if levels_done(run) or failed:
        tidy(run, levels)


def tidy(run: Path, levels: int) -> None:
    """Remove files that only an earlier level needed, then write results.jsonl from the levels' folders."""
    done, checkpoint = levels_done(run), run / CHECKPOINT
    for level in range(done - 1):
        for name in ("weights.safetensors", "moments.safetensors"):
            (_level_dir(run, level) / name).unlink(missing_ok=True)
    if checkpoint.exists() and (done >= levels or _is_of_a_finished_level(run, checkpoint)):
        checkpoint.unlink()
    if failure(run) is None:
        (run / "failure.json").unlink(missing_ok=True)  # damaged, or the level was finished later
    data, path = results_lines(run), run / "results.jsonl"
    if not path.is_file() or path.read_bytes() != data:
        write(path, data)


def _is_of_a_finished_level(run: Path, checkpoint: Path) -> bool:
    try:
        level = read_facts(checkpoint).get("level")
        check_tensors(checkpoint, run, level)
    except Damaged:
        return False  # reported when its level loads it
    return isinstance(level, int) and level < levels_done(run)


@contextmanager
def advice_to_restore(run: Path) -> Iterator[None]:
    """Add advice to the error for a damaged or missing file."""
    try:
        yield
    except (Damaged, FileNotFoundError) as error:
        advice = f"The run cannot resume without it: restore a copy, or move {run} away and give the same command to start again."
        raise Damaged(f"{str(error).rstrip('.')}. {advice}") from None
