"""Find a checkpoint: a folder as it is, or a model of the hub as a folder of the hub's cache. All else reads that folder only."""

from __future__ import annotations

import re
from pathlib import Path

from bert_tickets.content import CONFIGS, POOLER, SETTINGS, TOKENIZERS, WEIGHTS, first_file, shards
from bert_tickets.errors import UserError
from bert_tickets.hub import Repository


def resolve(name: str) -> Path:
    """Return the folder of a checkpoint: `name` itself, or that of a model in the hub's cache, downloaded if it is not there."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file: give --model the folder that it is in")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"cannot load a BERT checkpoint from {name}: there is no such folder")
    config, weights, _ = (_fetch_first(name, files) for files in (CONFIGS, WEIGHTS, TOKENIZERS))
    for shard in shards(weights) if weights.suffix == ".json" else []:
        _model(name).fetch(shard)
    for file in (*SETTINGS, "adapter_config.json"):
        _model(name).fetch(file, needed=False)
    return config.parent


def find_pooler(name: str) -> Path | None:
    """Return the file of a checkpoint's pooler; None if it is certain that it has none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return first_file(folder, [POOLER])
    return _model(name).fetch(POOLER)


def _model(name: str) -> Repository:
    return Repository("model", name, "--model a folder with config.json, model.safetensors and tokenizer.json")


def _fetch_first(name: str, files: tuple[str, ...]) -> Path:
    """Return the first of these files that a model has."""
    path = next(filter(None, map(_model(name).fetch, files)), None)
    if path is None:
        raise UserError(f"cannot load a BERT checkpoint from {name}: on the hub it has none of {', '.join(files)}")
    return path
