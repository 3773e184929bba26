"""What the campaigns of faults share: runs in folders of their own, what each comes to undisturbed, tables of what was done."""

from __future__ import annotations

import itertools
import shutil
import signal
from collections import Counter
from pathlib import Path

from refusals import Refusal
from victims import End, Nursery, Strike

from bert_tickets.runs.verify import SOUND, verify

MAY_DIFFER = {"log.jsonl", "lock"}  # when and where it ran
SETTINGS = ["--levels", "3", "--rate", "0.25", "--save-steps", "2"]
VARIANTS = [("lt_glue.py", words) for words in ("", "--rewind 3", "--rewind none", "--keep-models", "--protocol released")]
VARIANTS += [("lt_squad.py", words) for words in ("", "--rewind 3")] + [("lt_pretrain.py", words) for words in ("", "--rewind 3")]
Variant = tuple[str, str]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of the run directories in a folder, but for what differs between equal runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "runs").rglob("*"))
        if path.is_file() and path.name not in MAY_DIFFER
    }


class Bench:
    """Runs in folders of their own, and what each comes to when nothing disturbs it."""

    def __init__(self, nursery: Nursery, commands: dict[str, list[str]], place: Path) -> None:
        self.nursery, self.commands, self.place = nursery, commands, place
        self._number = itertools.count()
        self._undisturbed: dict[Variant, tuple[End, dict[str, bytes]]] = {}
        self._sources: dict[tuple[Variant, bool], Path] = {}

    def folder(self) -> Path:
        return self.place / f"{next(self._number):04d}"

    def run(self, folder: Path, variant: Variant, strike: Strike | Refusal | None = None) -> End:
        script, words = variant
        return self.nursery.run(folder, script, [*self.commands[script], *SETTINGS, *words.split()], strike)

    def undisturbed(self, variant: Variant) -> tuple[End, dict[str, bytes]]:
        """How a run ends by itself, and its files."""
        if variant not in self._undisturbed:
            folder = self.folder()
            end = self.run(folder, variant)
            assert end.code == 0, end.said
            (run,) = (folder / "runs").iterdir()
            assert {verdict for _, verdict in verify(run)} <= {SOUND, "not checked: differs between equal runs"}
            self._undisturbed[variant] = end, contents(folder)
            shutil.rmtree(folder)
        return self._undisturbed[variant]

    def source(self, variant: Variant, *, finished: bool) -> Path:
        """The folder of a run that is finished, or was killed at its very last step."""
        if (variant, finished) not in self._sources:
            alone, _ = self.undisturbed(variant)
            place, folder = "bert_tickets.training.step:Step.__call__", self.folder()
            strike = None if finished else Strike(signal.SIGKILL, place, alone.calls[place])
            end = self.run(folder, variant, strike)
            assert end.code == (0 if finished else -signal.SIGKILL), end
            self._sources[variant, finished] = folder
        return self._sources[variant, finished]


def table(struck: Counter[tuple[str, str]], columns: list[str], first: str) -> list[str]:
    """Lines of what was done how often, by column and row."""
    rows = list(dict.fromkeys(row for _, row in struck))
    lines = [[first, *columns], *([row, *(str(struck[column, row]) for column in columns)] for row in rows)]
    lines.append(["all", *(str(sum(struck[column, row] for row in rows)) for column in columns)])
    return ["  " + line[0].ljust(24) + "".join(cell.rjust(17) for cell in line[1:]) for line in lines]
