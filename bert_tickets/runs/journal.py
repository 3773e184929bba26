"""A journal of the measurements within a level that is a search, so that a killed search resumes.

A search is a deterministic function of its measurements. When it starts again, the recorded ones are replayed, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bert_tickets.errors import Damaged
from bert_tickets.files import write_checksummed
from bert_tickets.runs.integrity import JOURNAL, read_journal
from bert_tickets.runs.writer import Run


class Journal:
    """The measurements of a level: JSON values, each written before the search goes on. A stop signal ends the run after one."""

    def __init__(self, run: Run, level: int) -> None:
        self.run, self.level = run, level
        self.lines: list[dict[str, Any]] = run.group.on_main(self._read)
        self.at = 0  # measurements so far

    def _read(self) -> list[dict[str, Any]]:
        path = self.run.dir / JOURNAL
        try:
            return read_journal(self.run.dir, self.level) if path.exists() else []
        except Damaged as error:
            print(f"{error}; level {self.level} starts again")
            return []

    def __call__(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the next measurement, of the search's state `key`: the recorded one, or `measure()`."""
        if self.at == len(self.lines):
            self.lines.append({"key": key, "measured": measure()})
            self.run.group.on_main(self._write)
            if self.run.group.any(self.run.stop_signal is not None)[0]:
                self.run.stop(self.level, self.at + 1)
        line = self.lines[self.at]
        if line["key"] != key:
            raise Damaged(f"{self.run.dir / JOURNAL} belongs to another search: delete it, and the search starts again")
        self.at += 1
        return line["measured"]

    def _write(self) -> None:
        facts = {"run": self.run.dir.name, "level": self.level}
        write_checksummed(self.run.dir / JOURNAL, {**facts, "measurements": self.lines})
