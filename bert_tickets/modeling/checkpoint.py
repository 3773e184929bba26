"""Find a checkpoint: a folder as it is, or a model of the hub as a folder of the hub's cache. All else reads that folder only."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bert_tickets.errors import UserError, cause
from bert_tickets.hub import Repository

POOLER = "pooler.safetensors"  # beside a model whose class has none, such as BertForQuestionAnswering
CONFIGS = ("config.json", "bert_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt")
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json")


def resolve(name: str) -> Path:
    """Return the folder of a checkpoint: `name` itself, or a snapshot of the model `name` in the hub's cache.

    Downloads the model's files that are not in the cache. Raises `UserError`.
    """
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
    for file in OTHERS:
        _model(name).fetch(file, needed=False)
    return config.parent


def find_pooler(name: str) -> Path | None:
    """Return the file of a checkpoint's pooler; None if it is certain that it has none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / POOLER if (folder / POOLER).is_file() else None
    return _model(name).fetch(POOLER)


def shards(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{index} is damaged: it has no weight_map of file names") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{index} is damaged: {cause(error)}") from None


def _model(name: str) -> Repository:
    return Repository("model", name, "--model a folder with config.json, model.safetensors and tokenizer.json")


def _fetch_first(name: str, files: tuple[str, ...]) -> Path:
    """Return the first of these files that a model has."""
    path = next(filter(None, map(_model(name).fetch, files)), None)
    if path is None:
        raise UserError(f"cannot load a BERT checkpoint from {name}: on the hub it has none of {', '.join(files)}")
    return path
