"""Name a run by its settings, and by the content of the files that it reads. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert_tickets.config import Config, fields_of, flat, from_flat, preset_values
from bert_tickets.content import fingerprint, of_files, of_init
from bert_tickets.data import glue_files, squad_files, text_source
from bert_tickets.errors import UserError

PATHS = ("model", "data_dir", "init", "mask", "weights")  # settings that may name a file or a folder


def run_name(cfg: Config) -> str:
    """Return `<task>-<method>-s<seed>-<hash>`. Two runs have the same name only if their settings are the same."""
    method = cfg.method if cfg.protocol == "paper" else f"{cfg.method}-{cfg.protocol}"
    named = {"task": cfg.task, "method": cfg.method, "protocol": cfg.protocol, **differences(cfg)}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return f"{cfg.task}-{method}-s{cfg.train.seed}-{digest[:8]}"


def differences(cfg: Config) -> dict[str, Any]:
    """Return the settings that affect the result and differ from the preset of method, task and protocol.

    Files and folders are their fingerprints; names on the hub are as they are.
    """
    fields, values = fields_of(cfg.method), flat(cfg)
    named = {"task": cfg.task, "method": cfg.method, "protocol": cfg.protocol}
    required = {name: values[name] for name, f in fields.items() if f.default is dataclasses.MISSING and name != "task"}
    preset = flat(from_flat(preset_values(cfg.method, cfg.kind, cfg.protocol) | named | required))
    values |= _by_content(cfg)
    changed = {name: value for name, value in values.items() if value != preset[name]} | {name: values[name] for name in required}
    return {name: value for name, value in changed.items() if fields[name].metadata["affects_result"]}


def check_settings(run: Path, config: Mapping[str, Any], cfg: Config) -> None:
    """Raise `UserError` if a setting is not that of the run's `config`: a run's name has what differs from a preset, which may
    have changed since. Files count by their content, which other checks compare."""
    fields = fields_of(cfg.method)
    for name, value in flat(cfg).items():
        if fields[name].metadata["affects_result"] and name not in PATHS and config.get(name, value) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{run} was made with {flag} {config[name]}, and now that is {value}: a preset or a default has changed. Restore "
                "it, or give another --output-dir."
            )


def _by_content(cfg: Config) -> dict[str, Any]:
    """Return the settings that name files, with fingerprints instead of paths."""
    found: dict[str, Any] = {"model": fingerprint(cfg.model), "init": of_init(cfg.init)}
    for name in ("mask", "weights"):
        if (file := getattr(cfg.settings, name)) is not None:
            found[name] = fingerprint(file)
    if cfg.data_dir is not None and (folder := Path(cfg.data_dir)).is_dir():
        if cfg.kind == "glue":
            files = glue_files.files_of(folder, glue_files.ROWS[cfg.task])
        else:
            names = squad_files.FILES if cfg.kind == "squad" else text_source.FILES
            files = {split: folder / file for split, file in names.items()}
        found["data_dir"] = of_files(files) or str(folder.resolve())
    return found


def with_absolute_folders(cfg: Config) -> dict[str, Any]:
    """Return all settings by name, model and data as absolute paths if they are folders, to find them again later."""
    values = flat(cfg)
    folders = {name: Path(values[name]) for name in ("model", "data_dir") if values[name] is not None}
    return values | {name: str(path.absolute()) for name, path in folders.items() if path.is_dir()}
