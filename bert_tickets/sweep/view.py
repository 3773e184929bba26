"""What a sweep shows while it runs, and at its end: a block redrawn in place on a terminal, a line an event elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from bert_tickets.sweep.jobs import Job, progress
from bert_tickets.sweep.runner import Sweep, duration

HEARTBEAT = 60.0  # seconds between lines, where nobody watches a terminal
REDRAW = 1.0
TAIL = 12  # lines of a failed run's output
QUIET = ("started", "done")  # what the block shows anyway


class View:
    """A sweep on a stream."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.live = stream.isatty()
        self.drawn = 0  # lines of the block that stands on the screen
        self.shown_at = clock()

    def say(self, event: str) -> None:
        """An event; on a terminal only those that the block does not show, above it."""
        if not self.live:
            print(f"{time.strftime('%H:%M:%S')} {event}", file=self.stream, flush=True)
        elif not event.startswith(QUIET):
            self.clear()
            print(event, file=self.stream, flush=True)

    def show(self, sweep: Sweep) -> None:
        """Redraw the block, or give a sign of life, where it is time."""
        if self.clock() - self.shown_at < (REDRAW if self.live else HEARTBEAT):
            return
        self.shown_at = self.clock()
        if not self.live:
            self.say(summary(sweep))
            return
        width, height = shutil.get_terminal_size()
        lines = [summary(sweep), *running(sweep)]
        if len(lines) > height - 1:
            lines[height - 2 :] = [f"  and {len(lines) - height + 2} more"]
        self.clear()
        self.stream.write("".join(line[: width - 1] + "\n" for line in lines))
        self.stream.flush()
        self.drawn = len(lines)

    def clear(self) -> None:
        """Take the block off the screen."""
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")  # up to its first line, and blank from there
            self.drawn = 0


def summary(sweep: Sweep) -> str:
    counts = [f"{sweep.count(state)} {state}" for state in ("done", "running", "waiting", "failed")]
    counts += [f"{sweep.count('skipped')} not run"] if sweep.count("skipped") else []
    if sweep.stopping:
        return ", ".join(counts) + "; saving (once more: stop at once)"
    left = sweep.time_left()
    return ", ".join(counts) + f"; time left: {'unknown' if left is None else duration(left)}"


def running(sweep: Sweep) -> list[str]:
    """A line a running job: how far, how long, where, what."""
    lines = []
    for job in sweep.among("running"):
        at = sweep.at[job]
        levels = progress(job, at.target)
        far = f"{levels[0]}/{levels[1]} levels" if levels else ""
        lines.append(f"  {far:>12}  {duration(sweep.clock() - at.began):>8}  {at.host}  {job.title}")
    return lines


def report(sweep: Sweep, log: Callable[[Job], Path]) -> str:
    """The end: how many did what; of each that did not, why, its last output, and where the rest of it is."""
    parts = [f"{sweep.count('done')} done, {sweep.count('failed')} failed"]
    parts[0] += f", {sweep.count('skipped')} not run" if sweep.count("skipped") else ""
    parts[0] += f", {left} left" if (left := sweep.count("waiting") + sweep.count("running")) else ""
    for job in sweep.among("failed"):
        parts.append(f"\nFAILED: {job.title}\n  {job.place}: {sweep.at[job].why}; all of its output: {log(job)}")
        parts += [f"  | {line}" for line in last_lines(log(job))]
    parts += [f"\nnot run: {job.title}\n  {job.place}: {sweep.at[job].why}" for job in sweep.among("skipped")]
    return "\n".join(parts)


def last_lines(log: Path) -> list[str]:
    """The last lines of a log, of its last try; of a progress bar what it showed last."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    start = max((i + 1 for i, line in enumerate(lines) if line.startswith("# ")), default=0)  # a try's first line
    return [line for line in lines[start:] if line][-TAIL:]
