"""Runs in folders of their own, how each ends when nothing disturbs it, and tables of the faults they met."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

from crash_harness import STEP, Fault, Harness, Outcome
from trainrun import THREE_LEVELS, contents

from bert_tickets.runs.integrity import problems

VARIANTS = [("lt_glue.py", words) for words in ("", "--rewind 3", "--rewind none", "--keep-models", "--protocol released")]
VARIANTS += [("lt_squad.py", words) for words in ("", "--rewind 3")] + [("lt_pretrain.py", words) for words in ("", "--rewind 3")]
Variant = tuple[str, str]


class Campaign:
    """Runs of the variants in the crash harness."""

    def __init__(self, harness: Harness, commands: dict[str, list[str]], place: Path) -> None:
        self.harness, self.commands, self.place = harness, commands, place
        self._number = itertools.count()
        self._undisturbed: dict[Variant, tuple[Outcome, dict[str, bytes]]] = {}
        self._sources: dict[tuple[Variant, bool], Path] = {}

    def folder(self) -> Path:
        """A folder that is not there yet."""
        return self.place / f"{next(self._number):04d}"

    def run(self, folder: Path, variant: Variant, fault: Fault | None = None) -> Outcome:
        script, words = variant
        return self.harness.run(folder, script, [*self.commands[script], *THREE_LEVELS, *words.split()], fault)

    def undisturbed(self, variant: Variant) -> tuple[Outcome, dict[str, bytes]]:
        """How a run ends by itself, and its files."""
        if variant not in self._undisturbed:
            folder = self.folder()
            outcome = self.run(folder, variant)
            assert outcome.code == 0, outcome.output
            assert list(problems(run_of(folder))) == []
            self._undisturbed[variant] = outcome, contents(folder / "runs")
            shutil.rmtree(folder)
        return self._undisturbed[variant]

    def source(self, variant: Variant, *, finished: bool) -> Path:
        """The folder of a run that is finished, or was killed at its very last step."""
        if (variant, finished) not in self._sources:
            alone, _ = self.undisturbed(variant)
            folder = self.folder()
            outcome = self.run(folder, variant, None if finished else Fault("SIGKILL", STEP, alone.calls[STEP]))
            assert outcome.code == (0 if finished else -9), outcome
            self._sources[variant, finished] = folder
        return self._sources[variant, finished]

    def check_rerun(self, folder: Path, variant: Variant, faults: list[Fault]) -> None:
        """Give the command again: the run ends with the undisturbed bytes. Removes the folder."""
        outcome = self.run(folder, variant)
        assert outcome.code == 0, (variant, faults, outcome.output)
        assert contents(folder / "runs") == self.undisturbed(variant)[1], (variant, faults)
        shutil.rmtree(folder)


def run_of(folder: Path) -> Path:
    """The run directory in a folder."""
    (run,) = (folder / "runs").iterdir()
    return run


def table(counts: Counter[tuple[str, str]], columns: list[str], first: str) -> list[str]:
    """Lines of counts by column and row."""
    rows = list(dict.fromkeys(row for _, row in counts))
    lines = [[first, *columns], *([row, *(str(counts[column, row]) for column in columns)] for row in rows)]
    lines.append(["all", *(str(sum(counts[column, row] for row in rows)) for column in columns)])
    return ["  " + line[0].ljust(24) + "".join(cell.rjust(17) for cell in line[1:]) for line in lines]
