"""Write a run directory: lock it, resume its run, stop on a signal. `directory` lists its files."""

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
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor

from bert_tickets.config import Config, differences, flat
from bert_tickets.errors import Damaged, Diverged, Stopped, UserError
from bert_tickets.files import locked, read_facts, read_tensors, sync_folder, write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import FORMAT, level_dir, levels_done, levels_of, read_run, run_dir
from bert_tickets.runs.integrity import check_tensors
from bert_tickets.runs.provenance import environment
from bert_tickets.runs.resume import CHECKPOINT, advice_to_restore, resume, tidy
from bert_tickets.training.distributed import SINGLE_PROCESS, ProcessGroup

FIRST_FILES = {"run.json", "log.jsonl", "lock", "lock.holder"}  # written before the first level trains


class Run:
    """A run directory, as a context manager that holds its lock and handles signals.

    Of several processes, the main one holds the lock, reads for all of them, and alone writes.
    """

    def __init__(self, cfg: Config, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.cfg, self.group = cfg, group
        self.dir, self.levels = run_dir(cfg), levels_of(cfg)
        self.done = 0  # finished levels
        self.stop_signal: int | None = None
        self._signalled_at = 0.0
        self.saves_on_stop = False  # a level is in progress
        self.is_new = False  # this process wrote run.json

    # ---- entering and leaving ----

    def __enter__(self) -> Run:
        self._held = contextlib.ExitStack()
        self.group.on_main(self._hold)
        self.done = self.group.broadcast(levels_done(self.dir))
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.group.rank == 0:
            mistake = self.is_new and kind is not None and issubclass(kind, UserError)
            untrained = {path.name for path in self.dir.iterdir()} <= FIRST_FILES
            if (mistake and untrained) or not (self.dir / "run.json").exists():  # leave no folder behind after a mistyped flag
                with contextlib.suppress(OSError):
                    for name in FIRST_FILES:
                        (self.dir / name).unlink(missing_ok=True)
                    self.dir.rmdir()
            self._held.close()

    def _hold(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self.dir / "lock"))
        try:
            resume(self.dir, self.levels)
        except BaseException:
            self._held.close()
            raise

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.stop_signal = self.stop_signal is not None, number
        if again and self.group.world_size > 1 and time.monotonic() - self._signalled_at < 2:
            return  # from torchrun, which forwards a signal that each process has received already
        self._signalled_at = time.monotonic()
        if not self.saves_on_stop or again:
            raise Stopped(f"stopped; finished levels are in {self.dir}, and the same command resumes", 128 + number)
        os.write(2, b"\nstopping after this step or evaluation; once more to stop at once\n")  # print is not reentrant

    @property
    def complete(self) -> bool:
        return self.done >= self.levels

    def level_dir(self, level: int) -> Path:
        return level_dir(self.dir, level)

    # ---- reading and writing ----

    def describe(self, facts: dict[str, Any]) -> None:
        """Write run.json with the fingerprints `facts`, or, if the run is resumed, compare them with it."""
        self.group.check_same(facts)
        self.group.on_main(lambda: self._describe(facts))

    def _describe(self, facts: dict[str, Any]) -> None:
        here = environment(facts["device"]) | {"processes": self.group.world_size}
        if (self.dir / "run.json").exists():
            with advice_to_restore(self.dir):
                about = read_run(self.dir)
            for key, value in facts.items():
                if key in about["fingerprint"] and about["fingerprint"][key] != value:
                    was, now = _brief(about["fingerprint"][key]), _brief(value)
                    raise UserError(
                        f"{self.dir} was started with {key} {was}, and now it is {now}. Resuming would mix two runs: restore "
                        "the former value, or give another --output-dir."
                    )
            changed = {key: now for key, now in here.items() if about["environment"].get(key) != now}
            for key, now in changed.items():
                was = _brief(about["environment"].get(key))
                print(f"resuming with {key} {_brief(now)}, started with {was}: results may differ in the last bits")
            self.log("resume", changed=changed)
            return
        description = {
            "format": FORMAT,
            "run": self.dir.name,
            "config": {key: value for key, value in flat(self.cfg).items() if key != "dry_run"},
            "differs_from_preset": differences(self.cfg),
            "argv": sys.argv,
            "environment": here,
            "fingerprint": facts,
        }
        write_checksummed(self.dir / "run.json", description)
        self.is_new = True
        self.log("start")

    def log(self, event: str, **facts: Any) -> None:
        """Append a line to log.jsonl."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        append_line(self.dir / "log.jsonl", {"event": event, "time": now, "host": socket.gethostname(), **facts})

    def read_mask(self, level: int) -> Mask:
        """Read a finished level's mask onto the CPU."""

        def read() -> Mask:
            with advice_to_restore(self.dir):
                return Mask.load(self.level_dir(level) / "mask.safetensors")

        return self.group.on_main(read)

    def read_weights(self, name: str = "weights") -> dict[str, Tensor]:
        """Read the newest finished level's `weights`, or AdamW's `moments` at its end."""
        return self._read(self.level_dir(self.done - 1) / f"{name}.safetensors", self.done - 1)

    def read_rewind(self) -> dict[str, Tensor]:
        """Read the weights of the rewinding step."""
        return self._read(self.dir / "rewind.safetensors")

    def _read(self, path: Path, level: int | None = None) -> dict[str, Tensor]:
        def read() -> tuple[dict[str, Tensor], None]:
            with advice_to_restore(self.dir):
                check_tensors(path, self.dir, level)
                return read_tensors(path), None

        found = self.group.broadcast_tensors(read)
        assert found is not None
        return found[0]

    def write_rewind(self, weights: Mapping[str, Tensor], described: str) -> None:
        """Write the weights of the rewinding step."""
        facts = {"rewound": described, "run": self.dir.name, "level": None}
        self.group.on_main(lambda: write_tensors(self.dir / "rewind.safetensors", weights, facts))

    def finish(
        self,
        level: int,
        result: dict[str, Any],
        mask: Mask,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        write_model: Callable[[Path], dict[str, str]] | None,
    ) -> None:
        """Write the level's folder under a temporary name, rename it, and remove files that are not needed any more."""
        folder, facts, seconds = self.level_dir(level), {"run": self.dir.name, "level": level}, result.pop("seconds")
        temporary = self.dir / f".{folder.name}.tmp"

        def write() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            mask.write(temporary / "mask.safetensors")
            write_tensors(temporary / "weights.safetensors", weights, facts)
            if moments:
                write_tensors(temporary / "moments.safetensors", moments, facts)
            if write_model is not None:
                result["model_files"] = write_model(temporary / "model")
            write_checksummed(temporary / "metrics.json", {**facts, **result})
            self.log("level", level=level, seconds=round(seconds, 2))
            temporary.rename(folder)
            sync_folder(self.dir)

        def finish() -> None:
            try:
                write()
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
                raise
            tidy(self.dir, self.levels)

        self.group.on_main(finish)
        self.done = self.group.broadcast(levels_done(self.dir))
        self.saves_on_stop = False

    def fail(self, level: int, error: Diverged, title: str) -> NoReturn:
        """Record that a level diverged, and end the run."""

        def record() -> None:
            line = {"level": level, "ended": str(error)}
            write_checksummed(self.dir / "failure.json", {"run": self.dir.name, "task": self.cfg.task, **line})
            self.log("failure", **line)
            tidy(self.dir, self.levels)

        self.group.on_main(record)
        if self.group.rank:
            raise SystemExit(2)  # the main process reports the error
        advice = "A lower --lr, or --precision bf16 or fp32, may help."
        raise Diverged(f"{title}: {error}. results.jsonl records it; finished levels are intact. {advice}") from None


class LevelCheckpoint:
    """The checkpoint file of the level in progress, a `training.hooks.CheckpointFile`."""

    def __init__(self, run: Run, level: int) -> None:
        self.run, self.level, self.path = run, level, run.dir / CHECKPOINT
        run.saves_on_stop = True

    @property
    def stop_requested(self) -> bool:
        return self.run.stop_signal is not None

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """Read this level's checkpoint, if there is one. If it is damaged, print so: the level starts again."""
        return self.run.group.broadcast_tensors(self._load)

    def _load(self) -> tuple[dict[str, Tensor], dict] | None:
        if not self.path.exists():
            return None
        try:
            check_tensors(self.path, self.run.dir, self.level)
            return read_tensors(self.path), read_facts(self.path)
        except Damaged as error:
            print(f"{error}; level {self.level} starts again")
            return None

    def save(self, tensors: dict[str, Tensor], facts: dict) -> None:
        facts = {**facts, "run": self.run.dir.name, "level": self.level}
        self.run.group.on_main(lambda: write_tensors(self.path, tensors, facts))

    def stop(self, step: int) -> None:
        number = max(self.run.group.gather(self.run.stop_signal or 0))
        if self.run.group.rank:
            raise Stopped("", 128 + number)  # the main process reports it
        self.run.log("stop", level=self.level, step=step)
        where = f"stopped in level {self.level} after step {step}, saved in {self.run.dir}"
        raise Stopped(f"{where}; the same command resumes", 128 + number)


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a JSON line to a file. If the last line is torn, start a new one."""
    with path.open("ab+") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
