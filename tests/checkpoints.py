"""Load a copy of the small BERT whose files a test changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bert_tickets.modeling.loading import load_bert

LAST = "encoder.layer.1.output.dense.weight"
FORMAT = {"format": "pt"}


def load(folder: Path | str, init: Path | str = "pretrained", seed: int = 0, head: Any = "classifier") -> Any:
    return load_bert(str(folder), head, str(init), seed)[0]


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
