"""Read a ticket from a run: a finished level, with verified files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_tickets.config import Config, from_flat
from bert_tickets.errors import Damaged, UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import level_dir, levels_done, read_run
from bert_tickets.runs.integrity import check_level


@dataclass(frozen=True)
class Ticket:
    """A finished level of a run."""

    run: Path
    level: int
    about: Mapping[str, Any]  # run.json
    result: Mapping[str, Any]  # the level's metrics.json
    cfg: Config
    mask: Mask
    moved: str | None = None  # the base model's new place, if it was moved

    @property
    def folder(self) -> Path:
        return level_dir(self.run, self.level)

    @property
    def rewind_file(self) -> Path | None:
        """The weights of the rewinding step, if the level started from them and not from the initial weights."""
        path = self.run / "rewind.safetensors"
        return path if self.level > 0 and path.is_file() else None

    @property
    def model(self) -> str:
        """The base model: the absolute path of a folder, or a name on the hub."""
        return self.moved or self.about["differs_from_preset"].get("model", self.cfg.model)

    @property
    def is_local(self) -> bool:
        """Whether the base model is a folder of this machine."""
        return Path(self.model).is_absolute() or Path(self.model).is_dir()

    @property
    def base(self) -> str:
        """The base model's name on the hub, or its folder's name."""
        return Path(self.cfg.model).absolute().name if self.is_local else self.model


def load_ticket(run: Path, level: int | None = None, model: str | None = None) -> Ticket:
    """Read a finished level of a run directory (the newest unless `level` is given), and verify its metrics and mask.

    `model` is the base model, if it was moved since the run. Raises `UserError` for a level that is missing or damaged.
    """
    about, done = read_run(run), levels_done(run)
    if not done:
        raise UserError(f"{run} has no finished level yet")
    if level is not None and not 0 <= level < done:
        raise UserError(f"{run} has no finished level {level}; its levels are 0 to {done - 1}")
    level = done - 1 if level is None else level
    result, mask = check_level(run, level), Mask.load(level_dir(run, level) / "mask.safetensors")
    if (mask.sha256(), mask.kept, mask.total) != (result["mask_sha256"], result["kept"], result["total"]):
        raise Damaged(f"{level_dir(run, level)} is damaged: metrics.json and the mask differ")
    return Ticket(run, level, about, result, from_flat(about["config"]), mask, model)
