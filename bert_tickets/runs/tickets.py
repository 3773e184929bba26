"""A ticket where it was found: a finished level of a run, read from its files and held against their checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_tickets.config import Config, of_flat
from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import check_format
from bert_tickets.runs.integrity import check_mask, check_metrics


@dataclass(frozen=True)
class Ticket:
    """A finished level of a run, as its files tell of it."""

    run: Path  # the run directory
    level: int
    about: Mapping[str, Any]  # run.json
    line: Mapping[str, Any]  # the level's metrics.json
    cfg: Config
    mask: Mask
    given: str | None = None  # where its base model is, if not where it was

    @property
    def folder(self) -> Path:
        return self.run / f"level_{self.level:02d}"

    @property
    def later(self) -> Path | None:
        """The file of theta_i, where that is what the level started from, and not theta_0."""
        file = self.run / "rewind.safetensors"
        return file if self.level > 0 and file.is_file() else None

    @property
    def model(self) -> str:
        """Where its base model is: a folder, whose whole path run.json has, or a name on the hub."""
        return self.given or self.about["differs_from_preset"].get("model", self.cfg.model)

    @property
    def is_local(self) -> bool:
        """Whether the base model is a folder, of which nobody else knows."""
        return Path(self.model).is_absolute() or Path(self.model).is_dir()

    @property
    def base(self) -> str:
        """What its base model is called: by its name on the hub, or as the run called its folder."""
        return Path(self.cfg.model).absolute().name if self.is_local else self.model


def find(run: Path, level: int | None = None, model: str | None = None) -> Ticket:
    """A finished level of a run directory (the newest, unless `level` says another), its mask held against its checksums.

    `model` is where its base model is, if not where it was. Raises `UserError` for what is missing or damaged.
    """
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is no run directory: it has no run.json")
    about = _read(run / "run.json", {"format", "config", "differs_from_preset", "fingerprint"})
    check_format(run)
    levels = [int(path.name[6:]) for path in sorted(run.glob("level_*")) if path.name[6:].isdecimal()]
    if not levels:
        raise UserError(f"{run} has no finished level yet")
    if level is not None and level not in levels:
        raise UserError(f"{run} has no finished level {level}; it has {', '.join(map(str, levels))}")
    level = max(levels) if level is None else level
    folder = run / f"level_{level:02d}"
    line = _read(folder / "metrics.json", {"metrics", "kept", "total", "steps", "mask_sha256", "init_sha256"})
    check_metrics(run, level)
    check_mask(run, level)
    mask = Mask.load(folder / "mask.safetensors")
    if mask.sha256() != line["mask_sha256"]:
        raise UserError(f"{folder} is damaged: its mask is not the one that its metrics.json names (mask_sha256)")
    try:
        cfg = of_flat(about["config"])
    except (TypeError, AttributeError) as error:
        raise UserError(f"{run / 'run.json'} is damaged: its config is none ({error})") from None
    return Ticket(run, level, about, line, cfg, mask, model)


def _read(path: Path, keys: set[str]) -> Mapping[str, Any]:
    found = read_checksummed(path)
    if keys - found.keys():
        raise UserError(f"{path} is damaged: it is to have {', '.join(sorted(keys))}")
    return found
