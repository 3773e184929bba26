"""The run directory: what a run has finished, what it was doing, and how it goes on after a kill.

    run.json        what runs: configuration, command line, versions, fingerprints of model and data
    results.jsonl   a line a level
    log.jsonl       when and where it ran, and how long: the one file that differs between two equal runs
    level_00/       mask.safetensors, metrics.json; of the newest level also weights.safetensors, and moments.safetensors where
                    AdamW goes on; model/ if kept
    failure.json    what ended the level under way, if it came to no result
    rewind.safetensors      the weights of the rewinding step, where one was asked for
    checkpoint.safetensors  the middle of a level, while one is under way

A level's folder appears by one rename, complete. Everything else is derived from those folders, or written whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

from bert_tickets import Stopped, UserError
from bert_tickets.config import Config, flat, identity
from bert_tickets.environment import environment
from bert_tickets.files import (
    file_sha256,
    read_sealed,
    read_tensors,
    sync_folder,
    take_lock,
    write_sealed,
    write_tensors,
)
from bert_tickets.history import FAILURE, FORMAT, level_dir, levels_done, levels_of, needed, results, run_dir
from bert_tickets.mask import Mask
from bert_tickets.models import save_plain, set_parameters
from bert_tickets.ranks import ALONE, Ranks
from bert_tickets.recovery import recover, settle
from bert_tickets.refusal import cannot_write, in_words
from bert_tickets.soundness import check_tensors


class Run:
    """One run directory, held by one process. A context manager: it locks on entering, and listens for signals.

    Of several processes that train together the first holds it; the others are told what it reads, and write nothing.
    """

    def __init__(self, cfg: Config, preset: str, ranks: Ranks = ALONE) -> None:
        self.cfg, self.preset, self.ranks = cfg, preset, ranks
        self.dir, self.levels = run_dir(cfg, preset), levels_of(cfg)
        self._told = 0  # finished levels, as the first process says
        self.stop_signal: int | None = None
        self._asked_at = 0.0
        self.saves_on_stop = False

    # ---- entering and leaving ----

    def __enter__(self) -> Run:
        self.ranks.first(self._hold)
        self._told = self.ranks.agree(self.done)
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.ranks.rank:
            return
        if not (self.dir / "run.json").exists():
            with contextlib.suppress(OSError):  # nothing was begun: leave no folder behind a mistyped flag
                (self.dir / "lock").unlink()
                self.dir.rmdir()
        self._lock.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        asked, self.stop_signal = self.stop_signal is not None, number  # at once: what is raised in a finaliser, Python drops
        if asked and self.ranks.world > 1 and time.monotonic() - self._asked_at < 2:
            return  # from torchrun, which passes on what a terminal or a cluster has sent to each process already
        self._asked_at = time.monotonic()
        if not self.saves_on_stop or asked:  # nothing to save; or asked a second time
            raise Stopped(f"stopped; finished levels are in {self.dir}, and the same command goes on from there", 128 + number)
        os.write(2, b"\nstopping after this step or evaluation; once more to stop at once\n")  # print may be at work

    def _hold(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.dir / "lock")
        except OSError as error:
            if not self.complete:
                raise cannot_write(self.dir, error) from None
            self._lock = open(os.devnull, "rb")  # noqa: SIM115 - a finished run in a read-only archive: there is nothing to write
        else:
            recover(self.dir, self.levels)

    # ---- what there is ----

    @property
    def done(self) -> int:
        """How many levels are finished: the number of the first that is not."""
        return self._told if self.ranks.rank else levels_done(self.dir)

    @property
    def complete(self) -> bool:
        return self.done >= self.levels

    def level_dir(self, level: int) -> Path:
        return level_dir(self.dir, level)

    def finished(self, level: int) -> bool:
        return level < self.done

    def results(self) -> list[dict[str, Any]]:
        """A dictionary a finished level, as in results.jsonl; to the first process only."""
        return [] if self.ranks.rank else results(self.dir)

    # ---- a run's course ----

    def describe(self, facts: dict[str, Any]) -> None:
        """Write run.json, or hold `facts` (model, data, precision) against the one that is there."""
        self.ranks.need_same(facts)
        self.ranks.first(lambda: self._describe(facts))

    def _describe(self, facts: dict[str, Any]) -> None:
        path, here = self.dir / "run.json", environment(facts["device"]) | {"processes": self.ranks.world}
        if path.exists():
            with needed(self.dir):
                about = read_sealed(path)
                if not all(isinstance(about.get(key), dict) for key in ("fingerprint", "environment")):
                    raise UserError(f"{path} is damaged: it is to have fingerprint and environment")
            before = about["fingerprint"]
            for key, value in facts.items():
                if key in before and before[key] != value:
                    raise UserError(
                        f"{self.dir} was begun with {key} {_brief(before.get(key))}, and now it is {_brief(value)}. "
                        "Going on would mix two runs: restore the former, or give another --output-dir."
                    )
            begun = {"processes": 1} | about["environment"]
            changed = {key: now for key, now in here.items() if begun.get(key) != now}
            for key, now in changed.items():
                print(f"going on with {key} {_brief(now)}, begun with {_brief(begun.get(key))}: the bits may differ")
            self.log("resume", changed=changed)
            return
        write_sealed(
            path,
            {
                "format": FORMAT,
                "run": self.dir.name,
                "config": {key: value for key, value in flat(self.cfg).items() if key != "dry_run"},
                "differs_from_preset": identity(self.cfg, self.preset),
                "argv": sys.argv,
                "environment": here,
                "fingerprint": facts,
            },
        )
        self.log("start")

    def log(self, event: str, **facts: Any) -> None:
        line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(), **facts})
        try:
            with (self.dir / "log.jsonl").open("ab+") as file:
                torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write(b"\n" * torn + line.encode() + b"\n")
        except OSError as error:
            raise cannot_write(self.dir / "log.jsonl", error) from None

    def restore(self, level: int, net: nn.Module) -> Mask:
        """A finished level's mask; of the newest one also its trained weights, into `net`."""
        if level == self.done - 1:
            path = self.level_dir(level) / "weights.safetensors"
            set_parameters(net, self._read(path, level), path)
        return self.ranks.first(lambda: Mask.load(self.level_dir(level) / "mask.safetensors"))

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state at the end of the newest finished level (where the optimiser is not reset)."""
        return self._read(self.level_dir(self.done - 1) / "moments.safetensors", self.done - 1)

    def _read(self, path: Path, level: int | None = None) -> dict[str, Tensor]:
        """A file's tensors, read by the first process for all. It is to be sound, and this run's."""

        def read() -> tuple[dict[str, Tensor], None]:
            with needed(self.dir):
                check_tensors(path, self.dir, level)
                return read_tensors(path), None

        found = self.ranks.spread(read)
        assert found is not None
        return found[0]

    def save_rewind(self, net: nn.Module) -> None:
        facts = {"rewound": f"{self.cfg.task} trained to {self.cfg.rewind}, seed {self.cfg.train.seed}", "run": self.dir.name}
        self.ranks.first(lambda: write_tensors(self.dir / "rewind.safetensors", dict(net.named_parameters()), facts))

    def load_rewind(self) -> dict[str, Tensor]:
        return self._read(self.dir / "rewind.safetensors")

    def finish(
        self, level: int, net: nn.Module, tokenizer: Any, mask: Mask, result: dict[str, Any], moments: dict[str, Tensor]
    ) -> None:
        """Make the level's folder appear, complete; then tidy up."""
        self.ranks.first(lambda: self._finish(level, net, tokenizer, mask, result, moments))
        self._told = self.ranks.agree(self.done)

    def _finish(
        self, level: int, net: nn.Module, tokenizer: Any, mask: Mask, result: dict[str, Any], moments: dict[str, Tensor]
    ) -> None:
        seconds = result.pop("seconds")
        folder = self.level_dir(level)
        temporary = self.dir / f".{folder.name}.tmp"
        found = {"base_model": self.cfg.model, "task": self.cfg.task, "seed": str(self.cfg.train.seed), "method": "imp"}
        info = {} if self.cfg.mask else {**found, "level": str(level), "run": folder.parent.name}  # a given mask stays as it came
        facts = {"run": self.dir.name, "level": level}
        try:
            with in_words(folder):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                mask.write(temporary / "mask.safetensors", **info)
                write_tensors(temporary / "weights.safetensors", dict(net.named_parameters()), facts)
                if moments:
                    write_tensors(temporary / "moments.safetensors", moments, facts)
                if self.cfg.keep_models:
                    _keep_model(net, tokenizer, temporary / "model")
                    result["model_files"] = {path.name: file_sha256(path) for path in sorted((temporary / "model").iterdir())}
                write_sealed(temporary / "metrics.json", {**facts, **result})
                self.log("level", level=level, seconds=round(seconds, 2))
                temporary.rename(folder)
                sync_folder(self.dir)
        except UserError:
            shutil.rmtree(temporary, ignore_errors=True)  # what fills the disk
            raise
        settle(self.dir, self.levels)

    def fail(self, level: int, why: str) -> None:
        """Have the results say what ended a level that came to no result."""
        self.ranks.first(lambda: self._fail(level, why))

    def _fail(self, level: int, why: str) -> None:
        write_sealed(self.dir / FAILURE, {"run": self.dir.name, "task": self.cfg.task, "level": level, "ended": why})
        self.log("failure", level=level, ended=why)
        settle(self.dir, self.levels)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keep_model(net: Any, tokenizer: Any, folder: Path) -> None:
    save_plain(net, folder)
    tokenizer.backend_tokenizer.no_truncation()  # or it is saved as the last call left it, which a cache may have spared
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)
