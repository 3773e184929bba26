"""Read a ticket from a run: a finished level, with verified files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_tickets.config import Config, from_flat
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import find_level, level_dir, read_run
from bert_tickets.runs.integrity import check_level, read_mask


@dataclass(frozen=True)
class Ticket:
    """A finished level of a run."""

    run: Path
    level: int
    about: Mapping[str, Any]  # run.json
    result: Mapping[str, Any]  # the level's metrics.json
    cfg: Config
    mask: Mask
    model: str  # the base model: the absolute path of a folder, or a name on the hub

    @property
    def folder(self) -> Path:
        return level_dir(self.run, self.level)

    @property
    def rewind_file(self) -> Path | None:
        """The weights and the head of the step that the level started from, if it rewound to one."""
        path = self.run / "rewind.safetensors"
        return path if self.level > 0 and path.is_file() else None

    @property
    def is_search(self) -> bool:
        """Whether the level searched for its ticket, as EarlyBERT's does: its metrics are not those of the ticket."""
        return "draw" in self.result

    @property
    def is_local(self) -> bool:
        """Whether the base model is a folder of this machine."""
        return Path(self.model).is_absolute()

    @property
    def base(self) -> str:
        """The base model's name on the hub, or its folder's name."""
        return Path(self.model).name if self.is_local else self.model


def read_ticket(run: Path, level: int | None = None, model: str | None = None) -> Ticket:
    """Read and verify a finished level of a run (or its newest). `model` is the base model, if moved; raises `UserError`."""
    about, level = read_run(run), find_level(run, level)
    result, mask, cfg = check_level(run, level), read_mask(run, level), from_flat(about["config"])
    if model is None:
        earlier = about["differs_from_preset"].get("model", "")  # versions that named folders by their paths have it here
        model = earlier if Path(earlier).is_absolute() else cfg.model
    elif Path(model).exists():
        model = str(Path(model).resolve())
    return Ticket(run, level, about, result, cfg, mask, model)
