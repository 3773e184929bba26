"""What a run directory needs before it is gone on from: what a kill left undone is finished, and what is damaged is found."""

from __future__ import annotations

import shutil
from pathlib import Path

from bert_tickets import Refused, UserError
from bert_tickets.files import read_facts, write
from bert_tickets.history import FAILURE, check_format, failure, level_dir, levels_done, needed, read_failure, results_lines
from bert_tickets.refusal import in_words, need_file, remove
from bert_tickets.soundness import check_levels, check_tensors

CHECKPOINT = "checkpoint.safetensors"
ENDED = b'"ended": '  # in a line of results.jsonl that is no finished level's


def recover(run: Path, levels: int) -> None:
    """Finish what a kill may have left undone in the directory of a run of so many levels, which nobody else holds.

    Raises `UserError` where something is damaged that the run cannot go on without; what it can is named, and removed.
    """
    check_format(run)
    if levels_done(run) or any((run / name).exists() for name in ("run.json", CHECKPOINT, FAILURE)):
        with needed(run):
            check_levels(run)
    with in_words(run):
        for leftover in run.glob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    try:
        read_failure(run)
    except Refused:
        raise
    except UserError as error:
        print(f"{error}; it is removed")
        remove(run / FAILURE)
    if failed := failure(run):
        print(f"level {failed['level']} came to no result before: {failed['ended']}; it is tried again")
    if levels_done(run) or failed:
        settle(run, levels)


def settle(run: Path, levels: int) -> None:
    """Remove what only a level before needed; then write results.jsonl from the levels' folders, so that it is the last."""
    done, checkpoint, path = levels_done(run), run / CHECKPOINT, run / "results.jsonl"
    for level in range(done - 1):
        for name in ("weights.safetensors", "moments.safetensors"):
            remove(level_dir(run, level) / name)
    if checkpoint.exists() and (done >= levels or _is_of_a_finished_level(run, checkpoint)):
        remove(checkpoint)
    if failure(run) is None:  # the level was finished later
        remove(run / FAILURE)
    data = results_lines(run)
    need_file(path)
    with in_words(path):
        found = path.read_bytes() if path.exists() else None
    if found == data:
        return
    finished = b"".join(line for line in (found or b"").splitlines(keepends=True) if ENDED not in line)
    if not data.startswith(finished):  # more than a kill before its writing leaves
        print(f"{path} is damaged or was edited: it is written again from the levels' metrics.json")
    write(path, data)


def _is_of_a_finished_level(run: Path, checkpoint: Path) -> bool:
    try:
        level = read_facts(checkpoint).get("level")
        if not isinstance(level, int) or level >= levels_done(run):
            return False
        check_tensors(checkpoint, run, level)
    except Refused:
        raise
    except UserError:
        return False  # damaged: the level it may be of will say so
    return True
