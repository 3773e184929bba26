"""Verify the files of a run by their checksums, and by the run and level recorded in them. Imports torch only to read tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.config import from_flat
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import beginning_sha256, file_sha256, read_checksummed, read_facts, read_tensors
from bert_tickets.runs.directory import has_results, level_dir, levels_done, read_run, result

if TYPE_CHECKING:
    from torch import Tensor

    from bert_tickets.masking.mask import Mask

CHECKPOINT = "checkpoint.safetensors"
JOURNAL = "search.json"  # the measurements of the level in progress, if it is a search
RECORD = "coefficients.part"  # of level 0 in progress, if it trains coefficients (training.coefficients.Record)


def check_run(run: Path) -> None:
    """Raise `Damaged` unless run.json and the metrics and mask of every finished level are intact and this run's."""
    with advice_to_restore(run):
        _check_name(run)
        for level in range(levels_done(run)):
            check_level(run, level)


def _check_name(run: Path) -> None:
    if (name := read_run(run)["run"]) != run.absolute().name:
        raise Damaged(f"{run / 'run.json'} belongs to {name}")


@contextmanager
def advice_to_restore(run: Path) -> Iterator[None]:
    """Add advice to the error for a damaged or missing file."""
    try:
        yield
    except (Damaged, FileNotFoundError) as error:
        advice = f"The run cannot resume without it: restore a copy, or move {run} away and give the same command to start again."
        raise Damaged(f"{str(error).rstrip('.')}. {advice}") from None


def problems(run: Path) -> list[str]:
    """List the problems of a run's files, tensors included, one line each.

    A run.json that cannot be read, or a level that is missing before later ones, is the only problem listed.
    """
    try:
        about, done = read_run(run), levels_done(run)
    except (UserError, OSError) as error:
        return [str(error)]
    found: dict[str, None] = {}  # in order, each once

    def attempt(check: Callable[..., Any], *arguments: Any) -> None:
        try:
            check(*arguments)
        except (UserError, OSError) as error:
            found[str(error)] = None

    attempt(_check_name, run)
    for path in sorted(run.glob("masks/*.safetensors")):  # of steps within a level
        attempt(_read_mask, path)
    for level in range(done):
        attempt(check_level, run, level)
        attempt(read_mask, run, level)
        attempt(check_files, run, level)
    if done:
        newest = level_dir(run, done - 1)
        attempt(_check_kept, run, about["config"], done)
        attempt(_check_complete, run, about["config"], newest)
        if (newest / "moments.safetensors").exists():
            attempt(read_own, newest / "moments.safetensors", run, done - 1)
    if (run / "rewind.safetensors").exists():
        attempt(read_own, run / "rewind.safetensors", run)
    if (run / CHECKPOINT).exists():
        attempt(lambda: read_checkpoint(run, read_facts(run / CHECKPOINT)["level"]))  # a kill may leave an earlier one
    if (run / JOURNAL).exists():
        attempt(read_journal, run)
    if (run / "failure.json").exists():
        attempt(read_checksummed, run / "failure.json")
    attempt(_check_results, run)
    return list(found)


def check_level(run: Path, level: int) -> dict[str, Any]:
    """Return the metrics of a level. Raises `Damaged` if they are another run's, or name another mask (mask_sha256)."""
    line, path = result(run, level), level_dir(run, level) / "mask.safetensors"
    if line.get("run") != read_run(run)["run"]:
        raise Damaged(f"{path.parent / 'metrics.json'} belongs to {line.get('run')}")
    if read_facts(path).get("sha256") != line["mask_sha256"]:
        raise Damaged(f"{path} is not the mask that metrics.json names (mask_sha256)")
    return line


def read_own(path: Path, run: Path, level: int | None = None) -> dict[str, Tensor]:
    """Read a file of tensors. Raises `Damaged` if it belongs to another run or level, or does not match its checksum."""
    facts = read_facts(path)
    if (facts.get("run"), facts.get("level")) != (read_run(run)["run"], level):
        raise Damaged(f"{path} belongs to {facts.get('run')}, level {facts.get('level')}")
    return read_tensors(path)


def read_checkpoint(run: Path, level: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the facts of the checkpoint of a level. Raises `Damaged`, also for another kind of file."""
    tensors, facts = read_own(run / CHECKPOINT, run, level), read_facts(run / CHECKPOINT)
    if "step" not in facts:
        raise Damaged(f"{run / CHECKPOINT} is another file of the run, not a checkpoint")
    for own in facts.get("hooks", {}).values():
        if "file" in own and beginning_sha256(run / own["file"], own["bytes"]) != own["sha256"]:
            raise Damaged(f"{run / own['file']} is not the one that {CHECKPOINT} continues")
    return tensors, facts


def read_journal(run: Path, level: int | None = None) -> list[dict[str, Any]]:
    """Read the measurements of a search. Raises `Damaged` if they are another run's, or another level's than `level`."""
    found = read_checksummed(run / JOURNAL)
    if found.get("run") != read_run(run)["run"] or level not in (None, found.get("level")):
        raise Damaged(f"{run / JOURNAL} belongs to {found.get('run')}, level {found.get('level')}")
    return found["measurements"]


def kept_weights(config: dict[str, Any], done: int) -> list[int]:
    """List the levels of `done` finished ones whose weights a run keeps: the newest, and those that its method says."""
    return sorted({*from_flat(config).settings.kept_weights, done - 1} & {*range(done)})


def check_weights(run: Path, level: int) -> dict[str, Tensor]:
    """Read a level's trained weights. Raises `Damaged` unless they are finite, the level's, and zero where pruned."""
    path = level_dir(run, level) / "weights.safetensors"
    weights, mask = read_own(path, run, level), read_mask(run, level)
    mask.check_fits(weights, str(path), partly=True)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise Damaged(f"{path} has weights that are not finite, in {name}")
        if name in mask and tensor[~mask[name]].any():
            raise Damaged(f"{path} has nonzero weights in {name} that the mask prunes")
    return weights


def check_files(run: Path, level: int) -> None:
    """Raise `Damaged` (or an `OSError`) if a kept model, or another file, does not match the checksums in metrics.json."""
    line, folder = result(run, level), level_dir(run, level)
    paths = {folder / "model" / name: sha256 for name, sha256 in line.get("model_files", {}).items()}
    for path, sha256 in {**paths, **{folder / name: sha256 for name, sha256 in line.get("files", {}).items()}}.items():
        if file_sha256(path) != sha256:
            raise Damaged(f"{path} is damaged: its content does not match metrics.json")


def read_mask(run: Path, level: int) -> Mask:
    """Read a level's mask onto the CPU. Raises `UserError` if it is missing or damaged."""
    return _read_mask(level_dir(run, level) / "mask.safetensors")


def _read_mask(path: Path) -> Mask:
    from bert_tickets.masking.mask import Mask

    return Mask.load(path)


def _check_kept(run: Path, config: dict[str, Any], done: int) -> None:
    for level in kept_weights(config, done):
        check_weights(run, level)


def _check_complete(run: Path, config: dict[str, Any], newest: Path) -> None:
    """Raise `Damaged` if the weights to rewind to, or AdamW's state for the next level, are needed and missing."""
    settings, steps, needed = from_flat(config).settings, result(run, 0)["steps"], []
    if settings.rewind_step(steps) > 0:
        needed.append(run / "rewind.safetensors")
    if not settings.reset_optimizer:
        needed.append(newest / "moments.safetensors")
    for path in needed:
        if not path.exists():
            raise Damaged(f"{path} is missing")


def _check_results(run: Path) -> None:
    if not has_results(run):
        raise Damaged(f"{run / 'results.jsonl'} is missing or does not match the levels; the same command writes it again")
