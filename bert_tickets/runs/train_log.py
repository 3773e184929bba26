"""The loss while a level trains: train.jsonl, and TensorBoard's files where the extra `[tensorboard]` is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from bert_tickets.runs.writer import append_line


class TrainLog:
    """Appends the loss of a level as it is read. A context manager."""

    def __init__(self, run: Path, level: int, *, enabled: bool = True) -> None:
        self.run, self.level, self.enabled = run, level, enabled
        self._board: Any = None

    def __enter__(self) -> TrainLog:
        if self.enabled and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run / "tensorboard" / f"level_{self.level:02d}"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def append(self, line: dict[str, Any]) -> None:
        """Append step, loss, learning rate and seconds, with the level's number."""
        if not self.enabled:
            return
        append_line(self.run / "train.jsonl", {"level": self.level, **line})
        if self._board is not None:
            self._board.add_scalar("loss", line["loss"], line["step"])
            self._board.add_scalar("lr", line["lr"], line["step"])
            self._board.flush()
