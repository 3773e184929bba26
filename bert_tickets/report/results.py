"""What finished runs came to, a record a level: what was trained, on which task, and what it scored.

Tables and figures are made of these. A run directory says what it is; nothing is read from its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bert_tickets import config as settings
from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed, read_info
from bert_tickets.runs.directory import check_format, failure, is_number, level_dir, level_lost, levels_done
from bert_tickets.runs.integrity import check_metrics

IMP, ONESHOT, RANDOM, GIVEN = "IMP", "one-shot", "random", "given"  # where a ticket comes from; or the task that found it
PRETRAINED, SHUFFLED = "pre-trained", "shuffled"  # what a ticket's weights are; or "random", or what their file says
# How a ticket is found, beside `rewind`; the rest of what differs from the preset is how it is trained.
FINDING = tuple(name for name in settings.FINDING if name not in ("levels", "rewind"))


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """One level of one run."""

    run: Path
    level: int
    levels: int  # that the run is to have; those that it has finished are its records
    task: str
    metric: str  # the paper's of this task, a key of `metrics`
    metrics: Mapping[str, float | None]  # shares or correlations, not percent; None where undefined
    seed: int
    sparsity: float  # share of the prunable weights removed, to four decimals
    ticket: str  # IMP: found by this run; else the given one's origin: ONESHOT, RANDOM, GIVEN or the task that found it
    ticket_seed: int | None  # of a given ticket, where it says
    weights: str  # what the ticket starts from
    rewind: str  # of a ticket found by this run: 0, a step, a share, none; "" of a given one
    finding: str  # how a ticket is found, where it differs from the preset
    setting: str  # how it is trained, likewise; records of one task compare under one setting
    mask_sha256: str
    warnings: tuple[str, ...] = ()  # what the run says against its own value
    model: str = ""  # the encoder's fingerprint before training
    data: str = ""  # fingerprints of what was trained and evaluated on, and the precision: one place may hold others later

    @property
    def value(self) -> float | None:
        """The task's own metric."""
        return self.metrics[self.metric]

    @property
    def mask_file(self) -> Path:
        return level_dir(self.run, self.level) / "mask.safetensors"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run whose next level came to no result when it was last tried."""

    run: Path
    task: str
    setting: str
    level: int
    ended: str

    def __str__(self) -> str:
        return f"{self.run}: its level {self.level} came to no result: {self.ended}"


Of = TypeVar("Of", LevelResult, Failure)


def read_records(places: Iterable[str | Path]) -> list[LevelResult]:
    """The finished levels of run directories, or of the folders that hold them, in the order of their names.

    Raises `UserError` where there is no run, or one is damaged.
    """
    return [record for run in _runs(places) for record in _read_run(run)]


def read_failures(places: Iterable[str | Path]) -> list[Failure]:
    """Those of the same runs whose next level came to no result; `UserError` likewise."""
    failed = {run: found for run in _runs(places) if (found := failure(run))}
    return [
        Failure(
            **{key: _common(run)[key] for key in ("run", "task", "setting")}, **{key: found[key] for key in ("level", "ended")}
        )
        for run, found in failed.items()
    ]


def _runs(places: Iterable[str | Path]) -> list[Path]:
    given = [Path(place) for place in places]
    runs = sorted({about.parent.resolve(): about.parent for place in given for about in _abouts(place)}.values())
    if not runs:
        raise UserError(f"no run directory in {', '.join(map(str, given))}")
    return runs


def _abouts(place: Path) -> list[Path]:
    return [place / "run.json"] if (place / "run.json").is_file() else sorted(place.glob("**/run.json"))


def _read_run(run: Path) -> list[LevelResult]:
    common = _common(run)
    if lost := level_lost(run):
        raise UserError(f"{lost} is missing, and a later level is there (python -m bert_tickets.runs.verify {run} tells more)")
    try:
        return [_read_level(run, level, common) for level in range(levels_done(run))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run} is not a sound run directory: {repr(error)[:200]}") from None


def _common(run: Path) -> dict[str, Any]:
    """What all records of a run say, by its run.json."""
    about = read_checksummed(run / "run.json")
    check_format(run)
    try:
        config, differs = about["config"], about["differs_from_preset"]
        for key, kind in {"task": str, "seed": int, "levels": int, "init": str, "rewind": str, "protocol": str}.items():
            if type(config[key]) is not kind or (kind is int and not is_number(config[key])):
                raise TypeError(f"its {key} is no {kind.__name__}")
        if not re.fullmatch(r"none|[0-9]{1,18}|[0-9.e-]{1,18}%", config["rewind"]):
            raise ValueError("its rewind is none that can be asked for")
        own = ("seed", "mask", "init", "rewind", "levels", "reset_optimizer")  # what a record says by itself
        apart = {*own, *settings.set_by_rewind(config, differs)}
        plain = {key: value for key, value in differs.items() if key not in apart} | _resets(config, differs)
        protocol = {} if config["protocol"] == "paper" else {"protocol": config["protocol"]}
        return {
            "run": run,
            "task": config["task"],
            "seed": config["seed"],
            "levels": 1 if config["mask"] else config["levels"],
            "weights": _weights(config["init"], about["fingerprint"], config["seed"]),
            "finding": _words({key: value for key, value in plain.items() if key in FINDING}),
            "setting": _words(protocol | {key: value for key, value in plain.items() if key not in FINDING}),
            "rewind": "" if config["mask"] else config["rewind"],
            "model": about["fingerprint"].get("model", ""),
            "data": json.dumps([about["fingerprint"].get(key) for key in ("train", "evaluation", "precision")], sort_keys=True),
            "ticket": GIVEN if config["mask"] else IMP,
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run} is not a sound run directory: {repr(error)[:200]}") from None


def _resets(config: Mapping[str, Any], differs: Mapping[str, Any]) -> dict[str, bool]:
    """Whether AdamW begins anew each level, where that does not follow from `rewind`."""
    resets, follows = differs.get("reset_optimizer", True), "rewind" not in differs or config["rewind"] != "none"
    return {} if resets == follows else {"reset_optimizer": resets}


def _read_level(run: Path, level: int, common: dict[str, Any]) -> LevelResult:
    line, mask = check_metrics(run, level), level_dir(run, level) / "mask.safetensors"
    if line["task"] != common["task"]:
        raise ValueError(f"its level {level} is of another task")
    ticket, ticket_seed = (IMP, None) if common["ticket"] == IMP else _origin(read_info(mask))
    return LevelResult(
        **{**common, "ticket": ticket},
        level=level,
        metric=line["metric"],
        metrics=line["metrics"],
        sparsity=round(line["sparsity"], 4),
        ticket_seed=ticket_seed,
        mask_sha256=line["mask_sha256"],
        warnings=tuple(map(str, line.get("warnings", ()))),
    )


def _origin(info: Mapping[str, str]) -> tuple[str, int | None]:
    """Where a mask file says it comes from, and of which seed."""
    method, seed = info.get("method", ""), info.get("seed", "")
    names = {"oneshot magnitude": ONESHOT, "oneshot random": RANDOM, "imp": info.get("task", GIVEN)}
    return names.get(method, GIVEN), int(seed) if re.fullmatch(r"\d{1,10}", seed) else None


def _weights(init: str, fingerprint: Mapping[str, Any], seed: int) -> str:
    """What of the weights is the same for every seed: not the order that a seed has drawn, nor the run's own seed."""
    if init in ("pretrained", "random"):
        return {"pretrained": PRETRAINED}.get(init, init)
    facts = fingerprint.get("init") or {}
    said = facts.get("perturbed") or facts.get("rewound")
    if said == "the entries of each matrix shuffled":
        return SHUFFLED
    return said.partition(" in the order ")[0].removesuffix(f", seed {seed}") if said else f"the file {init}"


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(values.items()))


# ---- what is asked of records ----


def by_seed(records: Sequence[LevelResult], **wanted: object) -> dict[int, LevelResult]:
    """The records whose fields are as wanted, by seed. Equal runs under two names agree; two that differ are refused."""
    found: dict[int, LevelResult] = {}
    for record in records:
        if all(getattr(record, field) == value for field, value in wanted.items()):
            other = found.setdefault(record.seed, record)
            if (other.metrics, other.mask_sha256) != (record.metrics, record.mask_sha256):
                raise UserError(f"{other.run} and {record.run} are both {wanted} with seed {record.seed}, and differ: give one")
    return found


def dense(records: Sequence[LevelResult], task: str) -> dict[int, LevelResult]:
    """The full BERT of a task by seed: level 0 of the runs that find tickets from the pre-trained weights, the plain ones first.

    However a run goes on, its level 0 is the same training, but where `--decay run` or `once` spans it. Two equal runs that
    differ are refused.
    """
    full = [r for r in records if (r.task, r.ticket, r.weights, r.sparsity) == (task, IMP, PRETRAINED, 0.0)]
    plainest: dict[int, tuple[bool, bool, str, str]] = {}
    for r in full:
        plainest[r.seed] = max(_plainness(r), plainest.get(r.seed, _plainness(r)))
    return by_seed([r for r in full if _plainness(r) == plainest[r.seed]], task=task, sparsity=0.0)


def _plainness(record: LevelResult) -> tuple[bool, bool, str, str]:
    return record.rewind == "0", record.finding == "", record.rewind, record.finding


def under(records: Sequence[Of], setting: str) -> list[Of]:
    """The records of one setting, or of those that hold these words ("lr 0.0001, precision bf16"); "" is the preset as it is."""
    words = set(setting.split(", ")) if setting else set()
    return [r for r in records if (words <= set(r.setting.split(", ")) if words else r.setting == "")]


def need_one_setting(records: Sequence[LevelResult], how: str = "give those of one") -> None:
    """Raise `UserError` where a task was trained under two settings: their numbers must not stand in one column.

    `how` ends its sentence: what to do.
    """
    settings: dict[str, dict[str, Path]] = {}
    for record in records:
        settings.setdefault(record.task, {}).setdefault(record.setting, record.run)
    for task, found in settings.items():
        if len(found) > 1:
            listed = "\n".join(f"  {setting or 'the preset as it is'} (such as {run})" for setting, run in found.items())
            raise UserError(f"the runs of {task} have {len(found)} settings; {how}:\n{listed}")


def need_one_subject(records: Sequence[LevelResult]) -> None:
    """Raise `UserError` where runs of one setting saw other data, or began one seed with other weights: files change."""
    first: dict[tuple[str, ...], LevelResult] = {}
    for record in records:
        same = (record.task, record.setting)
        for kind, key in (("data", same), ("model", (*same, str(record.seed), record.weights))):
            other = first.setdefault((kind, *key), record)
            if getattr(other, kind) != getattr(record, kind):
                what = "data or precision" if kind == "data" else "weights to begin with"
                raise UserError(
                    f"{other.run} and {record.run} are of one setting and had other {what} under one name "
                    "(python -m bert_tickets.runs.verify shows them): give those of one"
                )
