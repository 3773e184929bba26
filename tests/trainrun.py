"""Training runs of the three scripts in this process, with small settings, and runs that are killed on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bert_tickets.cli import parse
from bert_tickets.config import kind_of
from bert_tickets.methods.main import run as run_config
from bert_tickets.runs.directory import run_dir

KINDS = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}
MAY_DIFFER = {"log.jsonl", "train.jsonl", "lock", "lock.holder"}  # when and where it ran, and the steps taken twice
THREE_LEVELS = ["--levels", "3", "--rate", "0.25", "--save-steps", "2"]


class Killed(BaseException):
    """Stands for SIGKILL: the package does not catch it."""


def kill() -> None:
    raise Killed


def dying(function: Callable[..., Any], at: int, *, before: bool = True, by: Callable[[], None] = kill) -> Callable[..., Any]:
    """`function`, killed (or met with `by`) at its call number `at`, before or after it does its work."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and before:
            by()
        result = function(*arguments, **options)
        if calls == at and not before:
            by()
        return result

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder by path, but for those that differ between equal runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in MAY_DIFFER and "tensorboard" not in path.parts
    }


def train(script: str, words: list[Any]) -> Path:
    """Run a script's command line in this process; returns the run directory."""
    cfg = parse(KINDS[script], None, [str(word) for word in words])
    run_config(cfg)
    return run_dir(cfg)


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same files, but for run.json, which names their folder."""
    files = [contents(folder) for folder in (one, other)]
    return all(found.pop("run.json") for found in files) and files[0] == files[1]


def of_sst2(commands: dict[str, list[str]], *words: object) -> list[str]:
    """A command on SST-2 with small settings; for one that trains, thirty steps."""
    given = commands["lt_glue.py"]
    data = [word for i, word in enumerate(given) if not {*given[max(0, i - 1) : i + 1]} & {"--lr", "--max-steps"}]
    steps = [] if {"--weights", "--score"} & {*words} else ["--lr", "3e-3", "--max-steps", "30"]
    return [*data, "--task", "sst2", *steps, *map(str, words)]


def script_of(task: str) -> str:
    """The script that trains a task."""
    return next(script for script, kind in KINDS.items() if kind == kind_of(task))


class Exported(NamedTuple):
    """A run, and its newest level as exported folders."""

    run: Path
    trained: Path
    untrained: Path


class Runs:
    """Runs of one command, each in a folder of its own below `place`."""

    def __init__(self, script: str, command: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.command, self.place, self.monkeypatch = script, command, place, monkeypatch
        monkeypatch.setattr("sys.argv", [script])  # run.json holds it

    def __call__(self, name: str, *more: str) -> dict[str, bytes]:
        """Run the command in the folder `name`, with more words; all files of its run directory."""
        (self.place / name).mkdir(exist_ok=True)
        with self.monkeypatch.context() as patch:
            patch.chdir(self.place / name)
            train(self.script, [*self.command, *more])
        return contents(self.dir(name))

    def dir(self, name: str) -> Path:
        """The run directory in the folder `name`."""
        (found,) = (self.place / name / "runs").iterdir()
        return found

    def killed_at(self, step: int, name: str, *more: str) -> Path:
        """Run the command, killed before the step of this number (from 1, over all levels); its run directory."""
        from bert_tickets.training.step import Step

        with self.monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", dying(Step.__call__, step))
            with pytest.raises(Killed):
                self(name, *more)
        return self.dir(name)
