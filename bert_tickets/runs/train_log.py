"""Loss and evaluations while a level trains: train.jsonl, and TensorBoard's files if the extra `[tensorboard]` is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_tickets.files import append_line


@contextmanager
def train_log(run: Path, level: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the log of a level: a function that appends a line with step, seconds, and loss and learning rate or metrics."""
    board: Any = None
    if importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run / "tensorboard" / f"level_{level:02d}"))

    def append(line: dict[str, Any]) -> None:
        append_line(run / "train.jsonl", {"level": level, **line})
        if board is not None:
            for name, value in line.get("metrics", {name: line.get(name) for name in ("loss", "lr")}).items():
                if value is not None:
                    board.add_scalar(f"evaluation/{name}" if "metrics" in line else name, value, line["step"])
            board.flush()

    try:
        yield append
    finally:
        if board is not None:
            board.close()
