"""The command of a sweep (scripts/*.sh) that makes runs like those that there are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_tickets import config as settings
from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed

VARIABLES = {"rate": "STEP", "levels": "LEVELS", "model": "MODEL"}  # of what a sweep has a variable for
APART = {"seed", "mask", "init", "rewind", "reset_optimizer", *VARIABLES}  # what FLAGS does not say
FINDING = set(settings.FINDING) - APART  # what FLAGS cannot say: a given ticket refuses them


def command(sweep: str, like: Sequence[Path], seeds: Sequence[int], variables: Mapping[str, str]) -> str | None:
    """The command that has `sweep` make runs of these seeds with the settings of `like`: runs that find tickets, one a task
    that the command is about.

    None where no sweep does: tickets found in a way of their own, tasks of one script under two settings, or a sparsity
    (SPARSITY, percent) that is no level. Raises `UserError` for a run.json that has not the settings of a run.
    """
    try:
        return _command(sweep, like, seeds, variables) if like else None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        places = ", ".join(str(run / "run.json") for run in like[:3])
        raise UserError(f"{places}: the settings are not a run's ({repr(error)[:200]})") from None


def _command(sweep: str, like: Sequence[Path], seeds: Sequence[int], variables: Mapping[str, str]) -> str | None:
    abouts = [read_checksummed(run / "run.json") for run in like]
    shared = [_shared(about["config"], about["differs_from_preset"]) for about in abouts]
    flags: dict[str, set[str]] = {}
    for about in abouts:
        flags.setdefault(_kind(about["config"]["task"]), set()).add(_flags(about["config"], about["differs_from_preset"]))
    step = abouts[0]["config"]["rate"] * 100
    pairs = [(about["config"], about["differs_from_preset"]) for about in abouts]
    ways = set().union(*(differs.keys() - settings.set_by_rewind(config, differs) for config, differs in pairs))
    if any(one != shared[0] for one in shared) or any(len(kind) > 1 for kind in flags.values()) or FINDING & ways:
        return None
    percent = float(variables.get("SPARSITY", 0))
    if abs(step - round(step)) > 1e-6 or percent % round(step) or percent >= step * abouts[0]["config"]["levels"]:
        return None
    words = {kind: flag for kind, (flag,) in ((kind, tuple(found)) for kind, found in flags.items()) if flag}
    if len(set(words.values())) == 1 and len(words) == len(flags):
        words = {"FLAGS": next(iter(words.values()))}
    own = shared[0] | {"SEEDS": " ".join(map(str, seeds))} | words | dict(variables)
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in own.items()), f"bash scripts/{sweep}.sh"])


def _shared(config: Mapping[str, Any], differs: Mapping[str, Any]) -> dict[str, str]:
    """The variables of all trainings of a sweep."""
    own = {name: str(config[key]) for key, name in VARIABLES.items() if key in differs}
    if "STEP" in own:
        own["STEP"] = f"{config['rate'] * 100:.0f}"
    return own | ({"OUTPUT": config["output_dir"]} if config["output_dir"] != "runs" else {})


def _kind(task: str) -> str:
    """The variable of the flags for a task's script."""
    return {"squad": "SQUAD_FLAGS", "mlm": "MLM_FLAGS"}.get(task, "GLUE_FLAGS")


def _flags(config: Mapping[str, Any], differs: Mapping[str, Any]) -> str:
    """The flags of a training, by the values that were given: the sweep's own variables and the tickets are not among them."""
    words = [] if config["protocol"] == "paper" else [f"--protocol {config['protocol']}"]
    for key in sorted(differs.keys() - APART - FINDING):
        flag, value = key.replace("_", "-"), config[key]
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {shlex.quote(str(value))}")
    return " ".join(words)
