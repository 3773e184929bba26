"""Verify the files of a run by their checksums, and by the run and level recorded in them. Imports torch only to read tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.config import from_flat
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import file_sha256, read_checksummed, read_facts, read_tensors
from bert_tickets.runs.directory import has_results, level_dir, levels_done, read_run, result

if TYPE_CHECKING:
    from torch import Tensor


def check_levels(run: Path) -> None:
    """Raise `Damaged` (or an `OSError`) unless run.json and the metrics and mask of every finished level are intact."""
    if not (run / "run.json").is_file():
        raise Damaged(f"{run / 'run.json'} is missing")
    if read_run(run)["run"] != run.name:
        raise Damaged(f"{run / 'run.json'} belongs to {read_run(run)['run']}")
    if (missing := _missing_level(run)) is not None:
        raise Damaged(f"{missing} is missing, and a later level exists")
    for level in range(levels_done(run)):
        check_level(run, level)


def check_level(run: Path, level: int) -> dict[str, Any]:
    """Return the metrics of a level. Raises `Damaged` if they are another run's, or name another mask (mask_sha256)."""
    line, path = result(run, level), level_dir(run, level) / "mask.safetensors"
    if line.get("run") != read_run(run)["run"]:
        raise Damaged(f"{path.parent / 'metrics.json'} belongs to {line.get('run')}")
    facts = read_facts(path)
    if facts.get("sha256") != line["mask_sha256"]:
        raise Damaged(f"{path} is not the mask that metrics.json names (mask_sha256)")
    return line


def check_tensors(path: Path, run: Path, level: int | None = None) -> None:
    """Raise `Damaged` if a file of tensors belongs to another run or level. `read_tensors` verifies its checksum."""
    facts = read_facts(path)
    if (facts.get("run"), facts.get("level")) != (read_run(run)["run"], level):
        raise Damaged(f"{path} belongs to {facts.get('run')}, level {facts.get('level')}")


def check_weights(run: Path, level: int) -> dict[str, Tensor]:
    """Read a level's trained weights. Raises `Damaged` unless they are finite, the level's, and zero where pruned."""
    path = level_dir(run, level) / "weights.safetensors"
    check_tensors(path, run, level)
    weights, mask = read_tensors(path), _read_mask(run, level)
    mask.check_fits(weights, str(path), partly=True)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise Damaged(f"{path} has weights that are not finite, in {name}")
        if name in mask and tensor[~mask[name]].any():
            raise Damaged(f"{path} has nonzero weights in {name} that the mask prunes")
    return weights


def check_model(run: Path, level: int) -> None:
    """Raise `Damaged` (or an `OSError`) if a kept model does not match the checksums in the level's metrics.json."""
    for name, sha256 in result(run, level).get("model_files", {}).items():
        path = level_dir(run, level) / "model" / Path(name).name
        if file_sha256(path) != sha256:
            raise Damaged(f"{path} is damaged: its content does not match metrics.json")


def problems(run: Path) -> list[str]:
    """List the problems of a run's files, tensors included, one line each; for another format one line only."""
    found: dict[str, None] = {}  # in order, each once

    def attempt(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except (UserError, OSError) as error:
            found[str(error)] = None

    try:
        about = read_run(run)
    except Damaged as error:
        about, found = None, {str(error): None}
    except UserError as error:
        return [str(error)]
    done = levels_done(run)
    if (missing := _missing_level(run)) is not None:
        found[f"{missing} is missing, and a later level exists"] = None
    for level in range(done):
        attempt(check_level, run, level)
        attempt(_read_mask, run, level)
        attempt(check_model, run, level)
    if done:
        attempt(check_weights, run, done - 1)
    required = attempt(_required_files, run, about) if about else ()
    for path in (level_dir(run, done - 1) / "moments.safetensors", run / "rewind.safetensors", run / "checkpoint.safetensors"):
        if path.exists() or path in (required or ()):
            attempt(_check_own, run, path)
    diverged = (run / "failure.json").exists()
    if diverged:
        attempt(read_checksummed, run / "failure.json")
    if (done or diverged) and attempt(has_results, run) is False:
        found[f"{run / 'results.jsonl'} is missing or does not match the levels; the same command writes it again"] = None
    return list(found)


def _missing_level(run: Path) -> Path | None:
    """Return the folder of a level that is missing although a later one exists."""
    later = [int(path.name[6:]) for path in run.glob("level_*") if path.name[6:].isdecimal() and path.is_dir()]
    done = levels_done(run)
    return level_dir(run, done) if max(later, default=0) > done else None


def _read_mask(run: Path, level: int) -> Any:
    from bert_tickets.masking.mask import Mask

    return Mask.load(level_dir(run, level) / "mask.safetensors")


def _required_files(run: Path, about: dict[str, Any]) -> list[Path]:
    """List the files that resuming needs beside the newest weights: the weights to rewind to, the optimizer's state."""
    done = levels_done(run)
    if not done:
        return []
    settings, steps = from_flat(about["config"]).settings, result(run, 0)["steps"]
    rewinds = hasattr(settings, "rewind_step") and settings.rewind_step(steps) > 0
    keeps_moments = not getattr(settings, "reset_optimizer", True)
    newest = level_dir(run, done - 1)
    return [run / "rewind.safetensors"] * rewinds + [newest / "moments.safetensors"] * keeps_moments


def _check_own(run: Path, path: Path) -> None:
    level = None if path.parent == run else levels_done(run) - 1
    if path.name == "checkpoint.safetensors":  # after a kill it may be a finished level's; resuming removes it
        level = read_facts(path).get("level")
    check_tensors(path, run, level)
    read_tensors(path)
