"""Write a run directory: lock it, resume its run, stop on a signal. bert_tickets/README.md lists its files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.errors import Damaged, Diverged, Stopped, UserError
from bert_tickets.files import (
    append_line,
    file_sha256,
    locked,
    read_checksummed,
    read_facts,
    write,
    write_checksummed,
    write_tensors,
    writing_folder,
)
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import (
    FORMAT,
    failure,
    has_results,
    level_dir,
    levels_done,
    read_run,
    results_lines,
    run_dir,
)
from bert_tickets.runs.integrity import (
    CHECKPOINT,
    JOURNAL,
    RECORD,
    advice_to_restore,
    check_run,
    kept_weights,
    read_checkpoint,
    read_mask,
    read_own,
)
from bert_tickets.runs.naming import check_settings, differences, with_absolute_folders
from bert_tickets.runs.provenance import environment
from bert_tickets.signals import signal_at_parents_end, stop_signals
from bert_tickets.training.distributed import SINGLE_PROCESS, ProcessGroup


class Run:
    """A run directory, as a context manager that holds its lock and handles signals.

    Of several processes, the main one holds the lock, reads for all of them, and alone writes.
    """

    def __init__(self, cfg: Config, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.cfg, self.group = cfg, group
        self.dir, self.levels = group.on_main(lambda: run_dir(cfg)), cfg.settings.levels
        self.done = 0  # finished levels
        self.stop_signal: int | None = None
        self._signalled_at = 0.0
        self.saves_on_stop = False  # a level is in progress: `checkpoint.Checkpoint` stops it

    # ---- entering and leaving ----

    def __enter__(self) -> Run:
        self.done = self.group.on_main(self._hold)
        self._signals = stop_signals(self._on_signal)
        self._signals.__enter__()
        return self

    def _hold(self) -> int:
        """Lock the directory and prepare it for resuming. Returns the number of finished levels."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(locked(self.dir / "lock"))
            if any(self.dir.glob("level_*")) or any((self.dir / name).exists() for name in ("run.json", CHECKPOINT)):
                check_run(self.dir)
                check_settings(self.dir, read_run(self.dir)["config"], self.cfg)
            for leftover in self.dir.glob(".*.tmp"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if failed := failure(self.dir):
                print(f"level {failed['level']} diverged before ({failed['ended']}); it is trained again")
            tidy(self.dir)
            self._held = held.pop_all()
        return levels_done(self.dir)

    def __exit__(self, *_: object) -> None:
        self._signals.__exit__(None, None, None)
        if self.group.rank == 0:
            if not (self.dir / "run.json").exists():  # leave no folder behind after a mistyped flag
                with contextlib.suppress(OSError):
                    for name in ("lock", "lock.holder"):
                        (self.dir / name).unlink(missing_ok=True)
                    self.dir.rmdir()
            self._held.close()

    def _on_signal(self, number: int) -> None:
        signal_at_parents_end(0)  # the end of torchrun needs no second signal
        before, self.stop_signal = self.stop_signal, number
        again = before == number and number in (signal.SIGINT, signal.SIGTERM)  # others: a scheduler's warning, then its SIGTERM
        repeated = number == signal.SIGTERM or self.group.world_size > 1
        if again and repeated and time.monotonic() - self._signalled_at < 2:
            return  # from torchrun or a sweep, which forward a signal that a scheduler has sent to each process already
        self._signalled_at = time.monotonic()
        if not self.saves_on_stop or again:
            saved = any(self.dir.glob("level_*")) or (self.dir / CHECKPOINT).exists()
            resumes = f"all that was saved is in {self.dir}, and the same command resumes"
            raise Stopped(f"stopped; {resumes if saved else 'the same command starts again'}", 128 + number)
        if before is None:
            with contextlib.suppress(OSError):  # the terminal may be closed. `print` is not reentrant
                at_once = b"a second Ctrl-C, or SIGTERM after two seconds, stops at once"
                os.write(2, b"\nstopping after this step or evaluation; " + at_once + b"\n")

    # ---- run.json and log.jsonl ----

    def describe(self, facts: dict[str, Any]) -> None:
        """Write run.json with the fingerprints `facts`, or, if the run is resumed, compare them with it."""
        self.group.check_same(facts)
        self.group.on_main(lambda: self._describe(facts))

    def _describe(self, facts: dict[str, Any]) -> None:
        here = environment(facts["device"]) | {"processes": self.group.world_size}
        if (self.dir / "run.json").exists():
            self._compare(read_run(self.dir), facts, here)
            return
        description = {
            "format": FORMAT,
            "run": self.dir.name,
            "config": {key: value for key, value in with_absolute_folders(self.cfg).items() if key != "dry_run"},
            "differs_from_preset": differences(self.cfg),
            "argv": sys.argv,
            "environment": here,
            "fingerprint": facts,
        }
        write_checksummed(self.dir / "run.json", description)
        self.log("start")

    def _compare(self, about: dict[str, Any], facts: dict[str, Any], here: dict[str, Any]) -> None:
        """Raise `UserError` if a fingerprint is not that of run.json; print and log what else changed in the environment."""
        for key, value in facts.items():
            if (was := about["fingerprint"].get(key, value)) != value:
                raise UserError(
                    f"{self.dir} was started with {key} {_brief(was)}, and now it is {_brief(value)}. Resuming would mix two "
                    "runs: restore the former value, or give another --output-dir."
                )
        changed = {key: now for key, now in here.items() if about["environment"].get(key) != now}
        for key, now in changed.items():
            was = about["environment"].get(key)
            print(f"resuming with {key} {_brief(now)}, started with {_brief(was)}: results may differ in the last bits")
        self.log("resume", changed=changed)

    def log(self, event: str, **facts: Any) -> None:
        """Append a line to log.jsonl."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        append_line(self.dir / "log.jsonl", {"event": event, "time": now, "host": socket.gethostname(), **facts})

    # ---- tensors ----

    def read_mask(self, level: int) -> Mask:
        """Read a finished level's mask onto the CPU."""

        def read() -> Mask:
            with advice_to_restore(self.dir):
                return read_mask(self.dir, level)

        return self.group.on_main(read)

    def read(self, file: str, level: int | None = None) -> dict[str, Tensor]:
        """Read the tensors of a file of the run, or of a finished level."""
        path = (self.dir if level is None else level_dir(self.dir, level)) / file

        def read() -> tuple[dict[str, Tensor], None]:
            with advice_to_restore(self.dir):
                return read_own(path, self.dir, level), None

        return self.group.broadcast_tensors(read)[0]

    def read_checkpoint(self, level: int) -> tuple[dict[str, Tensor], dict | None]:
        """Read the checkpoint of a level and its facts, ({}, None) without one. If it is damaged, the level starts again."""
        path = self.dir / CHECKPOINT

        def read() -> tuple[dict[str, Tensor], dict | None]:
            try:
                return read_checkpoint(self.dir, level) if path.exists() else ({}, None)
            except Damaged as error:
                print(f"{error}; level {level} starts again")
                path.unlink()
                return {}, None

        return self.group.broadcast_tensors(read)

    def write(self, file: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], level: int | None = None) -> None:
        """Write tensors to a file of the run, with facts about them."""
        facts = {**facts, "run": self.dir.name, "level": level}
        self.group.on_main(lambda: write_tensors(self.dir / file, tensors, facts))

    # ---- the end of a level ----

    def stop(self, level: int, step: int) -> NoReturn:
        """End the run after a signal; its checkpoint is saved."""
        number = max(self.group.gather(self.stop_signal or 0)) or signal.SIGTERM
        if self.group.rank:
            raise Stopped("", 128 + number)  # the main process reports it
        self.log("stop", level=level, step=step)
        raise Stopped(f"stopped in level {level} after step {step}, saved in {self.dir}; the same command resumes", 128 + number)

    def finish(
        self,
        level: int,
        result: dict[str, Any],
        mask: Mask,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        write_model: Callable[[Path], dict[str, str]] | None,
        files: Mapping[str, Callable[[Path], None]],
    ) -> None:
        """Write the level's folder with `files`, and remove files that are not needed any more."""
        facts, seconds = {"run": self.dir.name, "level": level}, result.pop("seconds")

        def write_level() -> None:
            with writing_folder(level_dir(self.dir, level)) as folder:
                mask.write(folder / "mask.safetensors")
                write_tensors(folder / "weights.safetensors", weights, facts)
                if moments:
                    write_tensors(folder / "moments.safetensors", moments, facts)
                if write_model is not None:
                    result["model_files"] = write_model(folder / "model")
                for name, write_file in files.items():
                    write_file(folder / name)
                if files:
                    result["files"] = {name: file_sha256(folder / name) for name in files}
                write_checksummed(folder / "metrics.json", {**facts, **result})
                self.log("level", level=level, seconds=round(seconds, 2))
            tidy(self.dir)

        self.group.on_main(write_level)
        self.done = level + 1
        self.saves_on_stop = False

    def fail(self, level: int, error: Diverged, title: str) -> NoReturn:
        """Record that a level diverged, and end the run."""

        def record() -> None:
            line = {"level": level, "ended": str(error)}
            write_checksummed(self.dir / "failure.json", {"run": self.dir.name, "task": self.cfg.task, **line})
            self.log("failure", **line)
            tidy(self.dir)

        self.group.on_main(record)
        if self.group.rank:
            raise SystemExit(2)  # the main process reports the error
        advice = "A lower learning rate, or --precision bf16 or fp32, may help."
        raise Diverged(f"{title}: {error}. results.jsonl records it; finished levels are intact. {advice}") from None


def tidy(run: Path) -> None:
    """Remove files that only a finished level needed, then write results.jsonl from the levels' folders."""
    done = levels_done(run)
    for level in {*range(done)} - {*kept_weights(read_run(run)["config"], done)} if done else ():
        for name in ("weights.safetensors", "moments.safetensors"):
            (level_dir(run, level) / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError, Damaged):  # the level that loads a damaged one reports it
        if read_facts(run / CHECKPOINT)["level"] < done:
            (run / CHECKPOINT).unlink()
    if done:
        (run / RECORD).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError, Damaged):
        if read_checksummed(run / JOURNAL)["level"] < done:
            (run / JOURNAL).unlink()
    if failure(run) is None:
        (run / "failure.json").unlink(missing_ok=True)  # damaged, or the level was finished later
    if not has_results(run):
        write(run / "results.jsonl", results_lines(run))


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
