"""The jobs of a sweep: command lines without duplicates, each with the jobs whose files it needs.

The files of the package's scripts are known from their parsers. Any other command needs no job, and always runs. Imports no
torch, for a fast answer.
"""

from __future__ import annotations

import contextlib
import fileinput
import graphlib
import hashlib
import io
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_tickets.cli import parse
from bert_tickets.config import Config, flat, from_flat
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts
from bert_tickets.runs.directory import is_finished, run_dir

TRAINING = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}  # script: its kind of task


@dataclass(eq=False, kw_only=True)
class Job:
    """A command line, which runs once for all equal ones."""

    text: str
    place: str  # such as `table2.txt, line 3`
    cfg: Config | None = None  # of a training script; its files are absolute paths
    output: Path | None = None  # of a script that makes one file
    facts: Mapping[str, Any] = field(default_factory=dict)  # the settings in the metadata of that file
    inputs: Mapping[str, Path] = field(default_factory=dict)  # the files and folders that the command reads, by flag
    needs: set[Job] = field(default_factory=set)  # the jobs that write them

    @property
    def target(self) -> Path | None:
        """The run directory or file that it writes; None for another program.

        A run's name is a hash of its inputs, and is final only when these exist.
        """
        return run_dir(self.cfg) if self.cfg else self.output

    @property
    def log(self) -> str:
        """The name of its log file, the same in every sweep."""
        start = re.sub(r"[^\w.-]+", "-", self.text)[:60].strip("-")
        return f"{start}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}.log"


def read_lines(files: Sequence[str]) -> dict[str, str]:
    """Read command lines, one per line, by their place. Blank lines and comments are skipped; `-` or no file: standard input."""
    with fileinput.input(files or "-", encoding="utf-8") as stream:
        lines = {f"{stream.filename()}, line {stream.filelineno()}": text.strip() for text in stream}
    return {place: text for place, text in lines.items() if text and not text.startswith("#")}


def plan(lines: Mapping[str, str], makers: Mapping[str, Any]) -> list[Job]:
    """Return the jobs of these lines, equal ones merged, each after the jobs that it needs.

    `makers` are the modules of the scripts that write one file, with `parse(argv)` and `facts(args)`. Raises `UserError`, naming
    the line, if its script rejects it, it reads a missing file that no line writes, it needs itself, or another line writes the
    same file with different settings.
    """
    jobs: dict[Path | str, Job] = {}
    for place, text in lines.items():
        job = _job(text, place, makers)
        known = jobs.setdefault(job.target or job.text, job)
        if job.output and job.facts != known.facts:
            raise UserError(f"{known.place} and {job.place} both write {job.output}, with different settings")
        if job.cfg and job.cfg.keep_models:
            known.text = job.text
    _link(list(jobs.values()))
    try:
        return list(graphlib.TopologicalSorter({job: job.needs for job in jobs.values()}).static_order())
    except graphlib.CycleError as error:
        raise UserError(f"these lines need each other: {'; '.join(job.place for job in error.args[1])}") from None


def unfinished(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs (in the order of `plan`) that are not finished, or need one that is not."""
    left: dict[Job, None] = {}
    for job in jobs:
        if not job.needs.isdisjoint(left) or not _is_finished(job):
            left[job] = None
    return list(left)


def _job(text: str, place: str, makers: Mapping[str, Any]) -> Job:
    """Parse a line as its script does."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return Job(text=text, place=place, **_files(shlex.split(text), makers))
    except UserError as error:
        raise UserError(f"{place}: {error}\n  {text}") from None
    except ValueError as error:  # of shlex
        raise UserError(f"{place}: {str(error).lower()}\n  {text}") from None
    except SystemExit:
        reason = output.getvalue().partition(": error: ")[2].strip() or "it only asks for help"
        raise UserError(f"{place}: {reason}\n  {text}") from None


def _files(words: Sequence[str], makers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a job that name the files of its script; none for another program."""
    at = next((at for at, word in enumerate(words) if Path(word).name in {*TRAINING, *makers}), None)
    if at is None:
        return {}
    if "cd" in words[:at]:
        raise UserError("a line that changes the folder cannot be planned: start the sweep there, or give absolute paths")
    script, argv = Path(words[at]).name, words[at + 1 :]
    if script in makers:
        args = makers[script].parse(argv)
        given = vars(args)
        files = {f"MASK {number}": path for number, path in enumerate(given.get("masks", ()), 1)}
        inputs = _inputs(given.get("model"), given.get("init"), **files, weights=given.get("weights"), like=given.get("like"))
        return {"output": Path(args.output).resolve(), "facts": makers[script].facts(args), "inputs": inputs}
    cfg = parse(TRAINING[script], None, argv)
    if cfg.dry_run:
        return {}
    inputs = _inputs(cfg.model, cfg.init, mask=cfg.settings.mask, weights=cfg.settings.weights)
    places = {name: str(path) for name, path in inputs.items()} | {"output_dir": str(Path(cfg.output_dir).resolve())}
    return {"cfg": from_flat(flat(cfg) | places), "inputs": inputs}


def _inputs(model: str | None, init: str | None, **files: str | Path | None) -> dict[str, Path]:
    """Return the files and folders that a command reads, with links resolved."""
    on_hub = model is not None and model.count("/") < 2 and not model.startswith((".", "/")) and not os.path.lexists(model)
    values = {**files, "init": None if init in ("pretrained", "random") else init, "model": None if on_hub else model}
    return {name: Path(value).resolve() for name, value in values.items() if value is not None}


def _link(jobs: Sequence[Job]) -> None:
    """Set `needs` of every job."""
    writers = {job.target: job for job in jobs if job.output or (job.cfg and all(path.exists() for path in job.inputs.values()))}
    for job in jobs:
        for flag, path in job.inputs.items():
            target = next((place for place in (path, *path.parents) if place in writers), None)
            if target is not None:
                job.needs.add(writers[target])
            elif not path.exists():
                name = flag if flag.startswith("MASK") else f"--{flag}"
                raise UserError(f"{job.place}: {name} {path} does not exist, and no line makes it\n  {job.text}")


def _is_finished(job: Job) -> bool:
    """Return whether the job's target is complete, and has the job's settings, the content of its inputs included."""
    with contextlib.suppress(UserError, OSError):  # missing or damaged: the command reports it
        if job.cfg:
            return is_finished(job.cfg)
        if job.output:
            facts = read_facts(job.output)
            absent = ("prunable", "random_size")  # from the facts of files that have the default
            return job.facts.items() <= facts.items() and all(job.facts.get(key) == facts.get(key) for key in absent)
    return False
