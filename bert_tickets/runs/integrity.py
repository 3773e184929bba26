"""Whether a run's files are sound and its own: what a run checks before it goes on. Imports no torch but to read tensors.

A checksum says that a file is as it was written; the run and level in it say which run wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import file_sha256, read_checksummed, read_facts, read_tensors
from bert_tickets.runs.directory import has_results, level_dir, levels_done, read_run, result


def check_levels(run: Path) -> None:
    """Raise `Damaged` (or an `OSError`) unless run.json and the metrics and mask of every finished level are there and sound."""
    if read_run(run)["run"] != run.name:
        raise Damaged(f"{run / 'run.json'} belongs to {read_run(run)['run']}")
    if (missing := _missing_level(run)) is not None:
        raise Damaged(f"{missing} is missing, and a later level is there")
    for level in range(levels_done(run)):
        check_level(run, level)


def check_level(run: Path, level: int) -> dict[str, Any]:
    """The metrics of a level, after checking that they are this run's, and that the mask beside them is the one they name."""
    line, path = result(run, level), level_dir(run, level) / "mask.safetensors"
    if line.get("run") != read_run(run)["run"]:
        raise Damaged(f"{path.parent / 'metrics.json'} belongs to {line.get('run')}")
    facts = read_facts(path)
    if facts.get("sha256") != line["mask_sha256"]:
        raise Damaged(f"{path} is not the mask that metrics.json names (mask_sha256)")
    return line


def check_tensors(path: Path, run: Path, level: int | None = None) -> None:
    """Raise `Damaged` where a file of tensors belongs to another run or level. Reading it verifies its checksum."""
    facts = read_facts(path)
    if (facts.get("run"), facts.get("level")) != (read_run(run)["run"], level):
        raise Damaged(f"{path} belongs to {facts.get('run')}, level {facts.get('level')}")


def problems(run: Path) -> Iterator[str]:
    """Everything that is wrong with the files of a run, tensors included; nothing where it is sound."""

    def attempt(check: Any, *arguments: Any) -> Iterator[str]:
        try:
            check(*arguments)
        except (UserError, OSError) as error:
            yield str(error)

    yield from attempt(read_run, run)
    if (missing := _missing_level(run)) is not None:
        yield f"{missing} is missing, and a later level is there"
    done = levels_done(run)
    for level in range(done):
        folder = level_dir(run, level)
        yield from attempt(check_level, run, level)
        yield from attempt(read_tensors, folder / "mask.safetensors")
        yield from attempt(_check_model, run, level)
    for level, name in [(done - 1, "weights"), (done - 1, "moments"), (None, "rewind"), (done, "checkpoint")]:
        path = (run if level in (None, done) else level_dir(run, level)) / f"{name}.safetensors"  # type: ignore[arg-type]
        if path.exists() or (name == "weights" and done):
            yield from attempt(check_tensors, path, run, level)
            yield from attempt(read_tensors, path)
    if (run / "failure.json").exists():
        yield from attempt(read_checksummed, run / "failure.json")
    elif done and not has_results(run):
        yield f"{run / 'results.jsonl'} is missing or does not match the levels; the same command writes it again"


def _check_model(run: Path, level: int) -> None:
    """Raise `Damaged` where a kept model is not what the level's metrics.json says."""
    for name, sha256 in result(run, level).get("model_files", {}).items():
        path = level_dir(run, level) / "model" / Path(name).name
        if file_sha256(path) != sha256:
            raise Damaged(f"{path} is damaged: its content does not match metrics.json")


def _missing_level(run: Path) -> Path | None:
    """The folder of a level that is gone although a later one is there."""
    later = [int(path.name[6:]) for path in run.glob("level_*") if path.name[6:].isdecimal() and path.is_dir()]
    done = levels_done(run)
    return level_dir(run, done) if max(later, default=0) > done else None
