"""Read run directories: one `LevelResult` per finished level, and one `Failure` per run whose next level diverged.

Everything is read from the files, nothing from a directory's name. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bert_tickets.config import COMMON, build, flat
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts
from bert_tickets.report import published
from bert_tickets.runs.directory import failure, level_dir, levels_done, read_run
from bert_tickets.runs.integrity import check_level

PRETRAINED, SHUFFLED = "pre-trained", "shuffled"  # `LevelResult.weights`; others: "random", or as their file says
OWN_FIELD = {"seed", "mask", "init", "rewind", "levels"}  # settings that a LevelResult has as fields


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """One finished level of a run."""

    run: Path
    level: int
    levels: int  # of the finished run
    task: str
    seed: int
    metric: str  # the task's main metric, a key of `metrics`
    metrics: Mapping[str, float | None]  # fractions or correlations, not percent; None if undefined
    sparsity: float  # pruned fraction of the weights that the mask covers
    total: int  # weights that the mask covers
    mask_sha256: str
    warnings: tuple[str, ...]
    given: bool  # the run trains a given ticket; otherwise it found this one
    method: str  # that found the ticket; "" if its mask file does not say
    source: str  # task that the ticket was found on; "" if none
    weights: str  # that the ticket starts from
    rewind: str  # what the method rewinds to: 0, a step, a percentage, none
    finding: str  # other settings of the method that differ from its preset
    setting: str  # settings of the training that differ from the preset
    model: str  # sha256 of the encoder before training
    data: str  # sha256 of the data, and the precision

    @property
    def value(self) -> float | None:
        """The main metric."""
        return self.metrics[self.metric]

    @property
    def mask_file(self) -> Path:
        return level_dir(self.run, self.level) / "mask.safetensors"


@dataclass(frozen=True)
class Failure:
    """A run whose next level diverged when it was last tried."""

    run: Path
    task: str
    setting: str
    level: int
    ended: str

    def __str__(self) -> str:
        return f"{self.run}: level {self.level} diverged: {self.ended}"


Of = TypeVar("Of", LevelResult, Failure)


def read_results(places: Iterable[str | Path]) -> tuple[list[LevelResult], list[Failure]]:
    """Read run directories, or all run directories in a folder, sorted by path.

    A ticket found by one of the runs keeps that run's `rewind` and `finding` where it is given to another run. Raises
    `UserError` if there is no run, `Damaged` for a damaged one.
    """
    given = [Path(place) for place in places]
    files = [[place / "run.json"] if (place / "run.json").is_file() else place.rglob("run.json") for place in given]
    runs = sorted({file.parent.resolve(): file.parent for found in files for file in found}.values())
    if not runs:
        raise UserError(f"no run directory in {', '.join(map(str, given))}")
    results: list[LevelResult] = []
    failures: list[Failure] = []
    for run in runs:
        about = read_run(run)
        facts = _facts_of_run(run, about["config"], about["differs_from_preset"], about["fingerprint"])
        done = levels_done(run)
        results += [_read_level(run, level, facts) for level in range(done)]
        if failed := failure(run):
            failures.append(Failure(run, facts["task"], facts["setting"], failed["level"], failed["ended"]))
    return _inherit(results), failures


def _facts_of_run(run: Path, config: dict[str, Any], differs: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fields that all levels of a run share."""
    common = {key: value for key, value in differs.items() if key in COMMON and key not in OWN_FIELD}
    protocol = {} if config["protocol"] == "paper" else {"protocol": config["protocol"]}
    return {
        "run": run,
        "levels": config.get("levels", 1),
        "task": config["task"],
        "seed": config["seed"],
        "given": config.get("mask") is not None,
        "method": config["method"],
        "source": config["task"],
        "weights": _weights(config["init"], fingerprint.get("init") or {}, config["seed"]),
        "rewind": config.get("rewind", "0"),
        "finding": _words(_finding(config, differs)),
        "setting": _words(protocol | common),
        "model": str(fingerprint.get("model")),
        "data": json.dumps([fingerprint.get(key) for key in ("train", "evaluation", "precision")], sort_keys=True),
    }


def _finding(config: Mapping[str, Any], differs: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own settings that differ from those that the preset and the rewinding step imply."""
    asked = {key: config[key] for key in ("task", "method", "protocol", *(differs.keys() & {"rewind"}))}
    own = {key: value for key, value in config.items() if key not in COMMON and key not in OWN_FIELD}
    try:
        plain = flat(build(asked)) if own else {}
    except (UserError, TypeError):  # the method is not installed, or has a required flag
        return {key: value for key, value in own.items() if key in differs}
    return {key: value for key, value in own.items() if value != plain.get(key)}


def _weights(init: str, facts: Mapping[str, Any], seed: int) -> str:
    """The initial weights in words, the same for every seed: without a drawn order, or the run's own seed."""
    if init in ("pretrained", "random"):
        return PRETRAINED if init == "pretrained" else init
    said = str(facts.get("perturbed") or facts.get("rewound") or f"the file {init}")
    if said == "the entries of each matrix shuffled":
        return SHUFFLED
    return re.split(" in the order | times ", said)[0].removesuffix(f", seed {seed}")


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(values.items()))


def _read_level(run: Path, level: int, facts: dict[str, Any]) -> LevelResult:
    line = check_level(run, level)
    origin = {}
    if facts["given"]:
        info = read_facts(level_dir(run, level) / "mask.safetensors")
        origin = {"method": info.get("method", ""), "source": info.get("task", ""), "rewind": "0", "finding": ""}
    return LevelResult(
        **(facts | origin),
        level=level,
        **{key: line[key] for key in ("metric", "metrics", "sparsity", "mask_sha256")},
        total=line.get("total", 0),
        warnings=tuple(line.get("warnings", ())),
    )


def _inherit(results: Sequence[LevelResult]) -> list[LevelResult]:
    """Give given tickets the `rewind` and `finding` of the run that found them; of several, of the plainest."""
    found: dict[tuple[str, str, str], LevelResult] = {}
    for r in sorted((r for r in results if not r.given), key=plainness):
        found.setdefault((r.method, r.source, r.mask_sha256), r)
    finders = [found.get((r.method, r.source, r.mask_sha256)) if r.given else None for r in results]
    return [replace(r, rewind=f.rewind, finding=f.finding) if f else r for r, f in zip(results, finders, strict=True)]


def plainness(r: LevelResult) -> tuple[bool, bool, bool, str, str, str]:
    """A sort key: runs that rewind to the pre-trained weights first, then the preset's settings, then the paper's method."""
    return r.rewind != "0", r.finding != "", r.method != published.METHOD, r.method, r.rewind, r.finding


# ---- what may be compared ----


def choose_setting(found: Sequence[Of], setting: str) -> list[Of]:
    """Those whose setting has all these words ("lr 0.0001, precision bf16"); "" is the preset unchanged."""
    words = set(setting.split(", ")) if setting else set()
    return [r for r in found if (words <= set(r.setting.split(", ")) if words else r.setting == "")]


def check_one_setting(results: Sequence[LevelResult], advice: str = "give the runs of one") -> None:
    """Raise `UserError` if the runs of a task have several settings."""
    settings: dict[str, dict[str, Path]] = {}
    for r in results:
        settings.setdefault(r.task, {}).setdefault(r.setting, r.run)
    for task, found in settings.items():
        if len(found) > 1:
            listed = "\n".join(f"  {setting or 'the preset unchanged'} (such as {run})" for setting, run in found.items())
            raise UserError(f"the runs of {task} have {len(found)} settings; {advice}:\n{listed}")


def check_same_subject(results: Sequence[LevelResult]) -> None:
    """Raise `UserError` if runs with equal settings used other data, or started from other weights with the same seed."""
    first: dict[tuple[str, ...], LevelResult] = {}
    for r in results:
        same = (r.task, r.setting)
        seeded = (*same, str(r.seed), r.weights)
        for field, what, key in (("data", "data or precision", same), ("model", "initial weights", seeded)):
            other = first.setdefault((field, *key), r)
            if getattr(other, field) != getattr(r, field):
                raise UserError(f"{other.run} and {r.run} have the same settings, but different {what}: give one of them")
