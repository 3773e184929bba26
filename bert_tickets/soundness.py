"""Whether a run's files are sound and its own: what a run asks before it goes on, or answers. No torch: see `history`.

A checksum tells that a file is as it was written, and what it says of itself that it was written by this run at this level.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from bert_tickets import UserError, brief
from bert_tickets.files import check, file_sha256, read_facts, read_info, read_sealed
from bert_tickets.history import is_strict, level_dir, level_lost, levels_done, result
from bert_tickets.refusal import cannot_read


def check_levels(run: Path) -> None:
    """Raise `UserError` where run.json, or a finished level's metrics.json or mask, is missing, damaged or another run's; or a
    whole level is missing before others."""
    about = run / "run.json"
    if not about.exists():
        raise UserError(f"{about} is missing")
    if is_strict(run) and (name := read_sealed(about).get("run")) != run.name:
        raise UserError(f"{about} is damaged or another run's: it is of {brief(name)}")
    if lost := level_lost(run):
        raise UserError(f"{lost} is missing, and a later level is there")
    for level in range(levels_done(run)):
        line, info = check_metrics(run, level), check_mask(run, level)
        if info.get("sha256") != line["mask_sha256"]:
            mask = level_dir(run, level) / "mask.safetensors"
            raise UserError(f"{mask} is damaged or another level's: metrics.json names another mask (mask_sha256)")


def check_metrics(run: Path, level: int) -> dict[str, Any]:
    """What a level's metrics.json says; `UserError` where it is missing, damaged, or of another run or level."""
    line, name = result(run, level), _own(run)[0]
    if is_strict(run) and line.get("run") != name:
        path = level_dir(run, level) / "metrics.json"
        raise UserError(f"{path} is damaged or another run's: it is of {brief(line.get('run'))}")
    return line


def check_mask(run: Path, level: int) -> dict[str, str]:
    """What a level's mask file says of itself; `UserError` where it is missing, damaged, or of another run."""
    path, strict, (name, given) = level_dir(run, level) / "mask.safetensors", is_strict(run), _own(run)
    check(path, strict=strict)
    info = read_info(path)
    if strict and not given and info.get("run") != name:
        raise UserError(f"{path} is damaged or another run's: it is of {brief(info.get('run'))}")
    return info


def check_tensors(path: Path, run: Path, level: int | None = None) -> None:
    """Raise `UserError` where a file of tensors is missing, damaged, or of another run or level."""
    strict = is_strict(run)
    check(path, strict=strict)
    facts, own = read_facts(path), {"run": _own(run)[0], "level": level}
    if any(facts.get(key) != value for key, value in own.items() if strict or key in facts):
        said = f"{brief(facts.get('run'))}, level {brief(facts.get('level'))}"
        raise UserError(f"{path} is damaged or another run's: it is of {said}")


def check_model(run: Path, level: int, *names: str) -> None:
    """Raise `UserError` where a file of a level's kept model (one of `names`, if any are given) is missing or damaged. A level of
    an older version has noted no digests of them."""
    folder, noted = level_dir(run, level) / "model", kept_files(run, level)
    for name in names or noted:
        try:
            if name in noted and file_sha256(folder / name) != noted[name]:
                raise UserError(f"{folder / name} is damaged: it is not what the level's metrics.json noted")
        except OSError as error:
            raise cannot_read(folder / name, error) from None


def kept_files(run: Path, level: int) -> dict[str, str]:
    """The files of a level's kept model and their digests, as its metrics.json noted them."""
    noted = check_metrics(run, level).get("model_files", {})
    if not isinstance(noted, dict) or not all(name and "/" not in name and name != ".." for name in noted):
        raise UserError(f"{level_dir(run, level) / 'metrics.json'} is damaged: its model_files are to be names and digests")
    return noted


def check_finished(run: Path) -> None:
    """As `check_levels`, and of all other files of a finished run: what is there of them is to be sound."""
    check_levels(run)
    newest = levels_done(run) - 1
    for path in sorted(run.glob("rewind.safetensors")):
        check_tensors(path, run)
    for path in sorted(set(level_dir(run, newest).glob("*.safetensors")) - {level_dir(run, newest) / "mask.safetensors"}):
        check_tensors(path, run, newest)


def missing(run: Path) -> list[tuple[Path, str]]:
    """What a run's state says must be there and is not, and what that means: all but levels' masks and metrics."""
    done, needed = levels_done(run), {run / "run.json": "without it nobody can tell what ran, and the run cannot go on"}
    if lost := level_lost(run):
        needed[lost] = "there are later levels, which the run cannot go on from without it"
    elif done:
        newest = level_dir(run, done - 1)
        needed[run / "results.jsonl"] = "the same command writes it again"
        needed[newest / "weights.safetensors"] = "without the newest level's weights no run can go on, and no network be shared"
        try:
            config = read_sealed(run / "run.json").get("config")
        except UserError:
            config = None  # said elsewhere
        if isinstance(config, dict) and not config.get("mask"):
            if config.get("reset_optimizer") is False or (config.get("reset_optimizer"), config.get("rewind")) == (None, "none"):
                needed[newest / "moments.safetensors"] = "no run can go on without AdamW's state"
            if config.get("rewind") not in ("0", "none"):
                needed[run / "rewind.safetensors"] = "no later level can begin without these weights"
    for level in range(done):
        folder = level_dir(run, level) / "model"
        with contextlib.suppress(UserError):  # said elsewhere
            for name in kept_files(run, level):
                needed[folder / name if folder.is_dir() else folder] = "the level's kept model cannot be opened without it"
    return [(path, what) for path, what in needed.items() if not path.exists()]


def _own(run: Path) -> tuple[str, bool]:
    """What a run is called in its files, and whether it trains a given mask, which says where it was found."""
    about = read_sealed(run / "run.json")
    config = about.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{run / 'run.json'} is damaged: it is to have config")
    return about.get("run", run.name), bool(config.get("mask"))
