"""The jobs of a sweep: command lines without duplicates, each with the jobs whose files it needs.

The files of the package's scripts are known from their parsers. Any other program needs no job, and always runs. Imports no
torch, for a fast answer.
"""

from __future__ import annotations

import contextlib
import graphlib
import hashlib
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bert_tickets.cli import parse
from bert_tickets.config import Config, flat, from_flat
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts
from bert_tickets.runs.directory import is_finished, run_dir

TRAINING = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}  # script: its kind of task
QUOTED = re.compile(r"""'[^']*'|"(\\.|[^"\\])*"|\\.""", re.DOTALL)
PYTHON = re.compile(r"python(3(\.\d+)?)?")


class Line(NamedTuple):
    """A command line and its place, such as `table2.txt, line 3`."""

    text: str
    place: str


@dataclass(eq=False, kw_only=True)
class Job:
    """A command, which runs once for all equal lines."""

    words: list[str]
    place: str
    cfg: Config | None = None  # of a training script; its files are absolute paths
    output: Path | None = None  # of a script that makes one file
    facts: Mapping[str, Any] = field(default_factory=dict)  # the settings in the metadata of that file
    inputs: dict[str, Path] = field(default_factory=dict)  # the files and folders that the command reads, by flag
    needs: list[Job] = field(default_factory=list)  # the jobs that write them

    @property
    def title(self) -> str:
        return shlex.join(self.words[1:] if self.target else self.words)

    @property
    def target(self) -> Path | None:
        """The run directory or file that it writes; None for another program.

        A run's name is a hash of its inputs, and is final only when these exist.
        """
        return run_dir(self.cfg) if self.cfg else self.output

    @property
    def log(self) -> str:
        """The name of its log file, the same in every sweep."""
        start = re.sub(r"[^\w.-]+", "-", self.title)[:60].strip("-")
        return f"{start}-{hashlib.sha256(self.title.encode()).hexdigest()[:8]}.log"


def read_lines(name: str, text: str) -> list[Line]:
    """Return the commands of a text, one per line, without blank lines and comments."""
    lines = [Line(line.strip(), f"{name}, line {number}") for number, line in enumerate(text.splitlines(), 1)]
    return [line for line in lines if line.text and not line.text.startswith("#")]


def split(line: Line) -> list[str]:
    """Split a line into words as a shell does. Raises `UserError` for a line that only a shell could run."""
    try:
        words = shlex.split(line.text)
    except ValueError as error:
        raise UserError(f"{line.place}: {str(error).lower()}\n  {line.text}") from None
    if found := re.search(r"[|&;<>()$`*]", QUOTED.sub("", line.text)):
        raise UserError(f"{line.place}: {found[0]} needs a shell: quote it, or write bash -c '...'\n  {line.text}")
    return words


def plan(lines: Iterable[Line], makers: Mapping[str, Any]) -> list[Job]:
    """Return the jobs of these lines, equal ones merged, each after the jobs that it needs.

    `makers` are the modules of the scripts that write one file, with `parse(argv)` and `facts(args)`. Raises `UserError`, naming
    the line, if its script rejects it, it reads a missing file that no line writes, it needs itself, or another line writes the
    same file with different settings.
    """
    jobs: dict[Path | str, Job] = {}
    for line in lines:
        job = _job(line, makers)
        known = jobs.setdefault(job.target or job.title, job)
        if (job.facts, job.output and job.inputs) != (known.facts, known.output and known.inputs):
            raise UserError(f"{known.place} and {job.place} both write {job.output}, with different settings")
        if job.cfg and known.cfg and job.cfg.keep_models > known.cfg.keep_models:
            known.words, known.cfg = job.words, job.cfg
    _link(list(jobs.values()))
    try:
        return list(graphlib.TopologicalSorter({job: job.needs for job in jobs.values()}).static_order())
    except graphlib.CycleError as error:
        raise UserError(f"these lines need each other: {'; '.join(job.place for job in error.args[1])}") from None


def unfinished(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs (in the order of `plan`) that are not finished, or need one that is not."""
    left: dict[Job, None] = {}
    for job in jobs:
        if any(need in left for need in job.needs) or not _is_finished(job):
            left[job] = None
    return list(left)


# ---- one line ----


def _job(line: Line, makers: Mapping[str, Any]) -> Job:
    words = split(line)
    is_python = PYTHON.fullmatch(Path(words[0]).name)
    at = next((i for i, word in enumerate(words) if i and not word.startswith("-")), 0) if is_python else 0
    script, argv = Path(words[at]).name if at else "", words[at + 1 :]  # of `python [-u] SCRIPT ...`
    if script in TRAINING:
        cfg = _parsed(line, lambda: parse(TRAINING[script], None, argv))
        if not cfg.dry_run:
            inputs = _inputs(cfg.model, cfg.init, getattr(cfg.settings, "mask", None))
            places = {name: str(path) for name, path in inputs.items()} | {"output_dir": str(Path(cfg.output_dir).resolve())}
            return Job(words=words, place=line.place, cfg=from_flat(flat(cfg) | places), inputs=inputs)
    if script in makers:
        args = _parsed(line, lambda: makers[script].parse(argv))
        facts, output = makers[script].facts(args), Path(args.output).resolve()
        return Job(words=words, place=line.place, output=output, facts=facts, inputs=_inputs(args.model, vars(args).get("init")))
    return Job(words=words, place=line.place)


def _parsed(line: Line, parser: Callable[[], Any]) -> Any:
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return parser()
    except SystemExit:
        reason = output.getvalue().partition(": error: ")[2].strip() or "it only asks for help"
        raise UserError(f"{line.place}: {reason}\n  {line.text}") from None


def _inputs(model: str, init: str | None, mask: str | None = None) -> dict[str, Path]:
    """Return the files and folders that a command reads, with links resolved."""
    on_hub = model.count("/") < 2 and not model.startswith((".", "/", "~")) and not os.path.lexists(model)
    values = {"mask": mask, "init": None if init in ("pretrained", "random") else init, "model": None if on_hub else model}
    return {name: Path(value).resolve() for name, value in values.items() if value is not None}


# ---- all lines ----


def _link(jobs: Sequence[Job]) -> None:
    """Set `needs` of every job."""
    writers = {job.target: job for job in jobs if job.output or (job.cfg and all(path.exists() for path in job.inputs.values()))}
    for job in jobs:
        for flag, path in job.inputs.items():
            target = next((place for place in (path, *path.parents) if place in writers), None)
            if target is not None:
                job.needs += [writers[target]] if writers[target] not in job.needs else []
            elif not path.exists():
                raise UserError(f"{job.place}: --{flag} {path} does not exist, and no line makes it\n  {job.title}")


def _is_finished(job: Job) -> bool:
    """Return whether the job's target is complete, has the job's settings, and is not older than the job's inputs."""
    with contextlib.suppress(UserError, OSError):  # missing or damaged: the command reports it
        if job.cfg:
            return is_finished(job.cfg)
        if job.output:
            facts, written = read_facts(job.output), job.output.stat().st_mtime_ns
            newer = all(path.stat().st_mtime_ns <= written for path in job.inputs.values())
            return newer and job.facts.items() <= facts.items() and job.facts.get("prunable") == facts.get("prunable")
    return False
