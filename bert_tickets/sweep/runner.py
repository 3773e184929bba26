"""Which job of a sweep runs when: what it needs first, no computation twice, failures tried again, losses taken elsewhere.

Where the commands run is an `Executor`'s affair (Ray's, in scripts/sweep.py); this is the loop over it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from bert_tickets.errors import UserError
from bert_tickets.sweep.jobs import Job, is_done, progress, target

LOSSES = 20  # of one job, before it is given up
GRACE = 300.0  # seconds for runs to finish their step or evaluation and save, once asked to stop
PATIENCE = 5  # looks for a file that its maker has written and a slow file system does not show yet
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # exit codes of a run that somebody asked to end

State = Literal["waiting", "running", "done", "failed", "skipped"]


@dataclass
class Ended:
    """A command's end. `code` None: what ran it was lost, and nobody knows how far it came."""

    job: Job
    code: int | None
    why: str = ""


class Executor(Protocol):
    """Where commands run."""

    def room(self, wanted: int) -> int:
        """How many could start now, where `wanted` are ready."""

    def start(self, job: Job) -> str:
        """Start its command where there is room; returns the machine's name."""

    def wait(self, seconds: float) -> list[Ended]:
        """What has ended; waits at most so long for the first."""

    def stop(self) -> None:
        """Ask all that run to save and end."""


@dataclass
class Standing:
    """How a job stands."""

    state: State = "waiting"
    why: str = ""  # it failed, was skipped, or waits
    target: Path | None = None
    looked: bool = False  # its inputs are there and its target is known
    failures: int = 0
    losses: int = 0
    put_off: int = 0  # times in a row
    not_before: float = 0.0
    began: float = 0.0
    levels_before: int = 0  # finished when it began
    host: str = ""
    seconds: float | None = None  # that it took, where it was run to its end here


class Sweep:
    """The jobs of a sweep and how each stands. `say` hears of every event, in a line."""

    def __init__(
        self,
        jobs: Sequence[Job],
        retries: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.jobs, self.retries, self.say, self.clock = list(jobs), retries, say, clock
        self.at = {job: Standing() for job in jobs}
        self.claims: dict[Path, Job] = {}  # of jobs with one target the first runs
        self.most = 1  # that ran at once
        self.stopping = False

    def count(self, state: State) -> int:
        return len(self.among(state))

    def among(self, state: State) -> list[Job]:
        return [job for job in self.jobs if self.at[job].state == state]

    @property
    def over(self) -> bool:
        return not self.count("waiting") and not self.count("running")

    # ---- the loop ----

    def go(self, executor: Executor, show: Callable[[], None], tick: float = 0.5) -> None:
        """Run what is left, until all has ended or, when `stopping`, all that ran has saved."""
        asked_at: float | None = None
        while True:
            ready = self.settle()
            if self.stopping:
                if asked_at is None:
                    asked_at = self.clock()
                    executor.stop()
                if not self.count("running") or self.clock() > asked_at + GRACE:
                    return
            elif self.over:
                return
            else:
                self._start(executor, ready)
            for ended in executor.wait(tick):
                self._end(ended)
            show()

    def settle(self) -> list[Job]:
        """Mark what is done, or will never run; return what could start, in the lines' order."""
        while True:
            before = self.count("waiting")
            ready = [job for job in self.among("waiting") if self._is_ready(job)]
            if self.count("waiting") == before:  # nothing ended, so nothing else has become ready
                return ready

    def _is_ready(self, job: Job) -> bool:
        at = self.at[job]
        for need in job.needs:
            if self.at[need].state in ("failed", "skipped"):
                what = "failed" if self.at[need].state == "failed" else "was not run"
                self._mark(job, "skipped", f"it needs {need.title} ({need.place}), which {what}")
                return False
        if at.not_before > self.clock() or any(self.at[need].state != "done" for need in job.needs):
            return False
        return self._look(job) and not self._is_anothers(job)

    def _look(self, job: Job) -> bool:
        """Find out what it makes, now that what it needs is there; False where that ends it, or puts it off."""
        at = self.at[job]
        if at.looked:
            return True
        missing = next((path for path in job.inputs.values() if not path.exists()), None)
        if missing is not None and at.put_off < PATIENCE:
            self._put_off(job, f"{missing} is not there yet")
        elif missing is not None:
            self._mark(job, "skipped", f"{missing} is not there, though what should make it is done")
        else:
            try:
                at.target = target(job)
            except UserError as error:
                self._mark(job, "failed", str(error))
                return False
            at.looked, at.put_off = True, 0
            if is_done(job, at.target):
                self._mark(job, "done", "")
        return at.looked and at.state == "waiting"

    def _is_anothers(self, job: Job) -> bool:
        """Whether another job makes the same: equal masks under different names. It waits for that one."""
        at = self.at[job]
        other = self.claims.setdefault(at.target, job) if at.target else job
        if other is job:
            return False
        if self.at[other].state == "done":
            self._mark(job, "done", "")
        elif self.at[other].state in ("failed", "skipped"):
            self._mark(job, "skipped", f"it is the same run as {other.title} ({other.place}), which failed")
        return True

    def _start(self, executor: Executor, ready: list[Job]) -> None:
        for job in ready[: executor.room(len(ready))]:
            at = self.at[job]
            if is_done(job, at.target):  # by somebody else meanwhile
                self._mark(job, "done", "")
                continue
            at.state, at.began = "running", self.clock()
            at.levels_before = (progress(job, at.target) or (0, 0))[0]
            at.host = executor.start(job)
            self.most = max(self.most, self.count("running"))
            self.say(f"started on {at.host}: {job.title}")

    # ---- how a command ended ----

    def _end(self, ended: Ended) -> None:
        job, code = ended.job, ended.code
        at = self.at[job]
        if code == 0:
            at.seconds = self.clock() - at.began
            self._mark(job, "done", "")
        elif self.stopping and (code is None or code in STOPPED):
            at.state, at.why = "waiting", "stopped"
        elif code is None or code in STOPPED:
            at.losses += 1
            why = ended.why or "ended from outside"
            if at.losses > LOSSES:
                self._mark(job, "failed", f"lost {at.losses} times ({why})")
            else:
                self._put_off(job, f"lost on {at.host} ({why}), loss {at.losses}; it is started again")
        elif code == os.EX_TEMPFAIL and job.cfg:
            self._put_off(job, "another process holds its directory; it is tried again")
        else:
            at.failures += 1
            if code == 2 or at.failures > self.retries:  # a user's mistake would only repeat
                self._mark(job, "failed", ended.why or f"exit code {code}")
            else:
                at.state = "waiting"
                self.say(f"failed ({ended.why or f'exit code {code}'}) and is tried again: {job.title}")

    def _put_off(self, job: Job, why: str) -> None:
        """Back to the queue, each time in a row for longer: 1, 2, 4, ... 60 seconds."""
        at = self.at[job]
        at.state, at.not_before = "waiting", self.clock() + min(60.0, 2.0**at.put_off)
        at.put_off += 1
        if why != at.why:
            at.why = why
            self.say(f"{why}: {job.title}")

    def _mark(self, job: Job, state: State, why: str) -> None:
        at = self.at[job]
        at.state, at.why = state, why
        what = {"done": "done", "failed": "FAILED", "skipped": "not run"}[state]
        if state != "done" or at.seconds is not None:  # what was done before is only counted
            took = "" if at.seconds is None else f" in {duration(at.seconds)}"
            self.say(f"{what}{took}{f' ({why})' if why else ''}: {job.title}")

    # ---- how long it will take ----

    def time_left(self) -> float | None:
        """Seconds to the end, from the runs of the same kind that ended here; None until that can be told.

        The work that is left on as many places as were in use at once, but no less than the longest chain of needs.
        """
        left: dict[Job, float] = {}
        for job in self.jobs:
            if self.at[job].state in ("waiting", "running"):
                seconds = self._seconds_left(job)
                if seconds is None:
                    return None
                left[job] = seconds
        ends: dict[Job, float] = {}

        def end(job: Job) -> float:
            if job not in ends:
                ends[job] = left[job] + max((end(need) for need in job.needs if need in left), default=0.0)
            return ends[job]

        return max(sum(left.values()) / self.most, max(map(end, left), default=0.0))

    def _seconds_left(self, job: Job) -> float | None:
        at = self.at[job]
        spent = self.clock() - at.began if at.state == "running" else 0.0
        found = progress(job, at.target) if at.state == "running" else None
        if found and found[0] > at.levels_before:
            return max(0.0, spent / (found[0] - at.levels_before) * (found[1] - at.levels_before) - spent)
        alike = [other.seconds for known, other in self.at.items() if known.kind == job.kind and other.seconds is not None]
        return max(0.0, sum(alike) / len(alike) - spent) if alike else None


def duration(seconds: float) -> str:
    """0:07:05, or 3 d 04:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24:02d}:{minute:02d}:{second:02d}" if hours >= 24 else f"{hours}:{minute:02d}:{second:02d}"
