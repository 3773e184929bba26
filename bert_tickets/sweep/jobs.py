"""What a sweep has to do: command lines as jobs, equal ones merged, each with what it needs; and whether one is done already.

The package's own scripts are known by their parsers: where they write, what they read. Of any other program only the text is
known: it needs nothing, and is always run. Imports no torch, so that a finished sweep answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import graphlib
import hashlib
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bert_tickets.cli import parse
from bert_tickets.config import FIELDS, Config, flat
from bert_tickets.errors import UserError
from bert_tickets.runs.directory import is_settled, levels_done, levels_of, run_dir

TRAINING = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}  # script: its preset
QUOTED = re.compile(r"""'[^']*'|"(\\.|[^"\\])*"|\\.""", re.DOTALL)
PYTHON = re.compile(r"python(3(\.\d+)?)?")
WORDS = {"init": ("pretrained", "random")}  # where a flag's value is no file

T = TypeVar("T")


class Maker(Protocol):
    """A script that makes one file (oneshot.py, perturb_weight.py): its parser, and what it writes of its settings there."""

    def parse(self, argv: Sequence[str] | None = ...) -> argparse.Namespace: ...

    def facts(self, args: argparse.Namespace) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Line:
    text: str
    place: str  # where it stands: "table2.txt, line 3"


@dataclass(eq=False, kw_only=True)
class Job:
    """A command to run once, whichever lines ask for it."""

    words: list[str]
    place: str
    key: str  # equal for lines that ask for the same
    name: str  # of its log file
    kind: str  # jobs of a kind take about as long
    cfg: Config | None = None  # of a training script
    preset: str = ""
    output: Path | None = None  # of a maker
    facts: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None
    inputs: dict[str, Path] = field(default_factory=dict)  # flag: a file or folder that it reads
    needs: list[Job] = field(default_factory=list)  # the jobs that make them

    @property
    def title(self) -> str:
        return shlex.join(self.words[1:] if self.cfg or self.output else self.words)


# ---- lines to jobs ----


def read_lines(name: str, text: str) -> list[Line]:
    """The commands of a text: a line each; blank ones and comments are passed over."""
    lines = [Line(line.strip(), f"{name}, line {number}") for number, line in enumerate(text.splitlines(), 1)]
    return [line for line in lines if line.text and not line.text.startswith("#")]


def plan(lines: Iterable[Line], makers: Mapping[str, Maker]) -> list[Job]:
    """The jobs of these lines in their order, equal ones merged, each with the jobs it needs.

    Raises `UserError`, naming the line, for one that its script refuses, that reads what is not there and no line makes,
    or that would wait for itself; and for two that write one file differently.
    """
    jobs: dict[str, Job] = {}
    for line in lines:
        job = _job(line, makers)
        known = jobs.setdefault(job.key, job)
        if job.cfg and known.cfg and job.cfg.keep_models and not known.cfg.keep_models:
            known.words, known.cfg = job.words, job.cfg  # what is kept beside the result is for both
    _link(list(jobs.values()))
    return list(jobs.values())


def split(line: Line) -> list[str]:
    """A line's words, as a shell would take them; what only a shell could do is refused."""
    try:
        words = shlex.split(line.text)
    except ValueError as error:
        raise UserError(f"{line.place}: {str(error).lower()}\n  {line.text}") from None
    if found := re.search(r"[|&;<>()$`*]", QUOTED.sub("", line.text)):
        raise UserError(f"{line.place}: {found[0]} is for a shell: quote it, or give bash -c '...'\n  {line.text}")
    return words


def _job(line: Line, makers: Mapping[str, Maker]) -> Job:
    words = split(line)
    script = _script(words)
    at = next((i for i, word in enumerate(words) if Path(word).name == script), 0)
    if script in TRAINING:
        cfg = _parsed(line, lambda argv: parse(TRAINING[script], None, argv), words[at + 1 :])
        if not cfg.dry_run:
            return _training(line, words, script, cfg)
    if script in makers:
        args = _parsed(line, makers[script].parse, words[at + 1 :])
        return _making(line, words, script, args, makers[script].facts(args))
    kind = " ".join(words[: 2 if PYTHON.fullmatch(Path(words[0]).name) else 1])
    return Job(words=words, place=line.place, key=shlex.join(words), name=_log_name(kind, words), kind=kind)


def _script(words: list[str]) -> str:
    """The script's name where this is `python [-u] SCRIPT ...`."""
    if not PYTHON.fullmatch(Path(words[0]).name):
        return ""
    return next((Path(word).name for word in words[1:] if not word.startswith("-")), "")


def _parsed(line: Line, parser: Callable[[Sequence[str]], T], argv: list[str]) -> T:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parser(argv)
    except SystemExit:
        reason = said.getvalue().partition(": error: ")[2].strip() or "it asks for help only"
        raise UserError(f"{line.place}: {reason}\n  {line.text}") from None


def _training(line: Line, words: list[str], script: str, cfg: Config) -> Job:
    inputs = {flag: _input(flag, getattr(cfg, flag)) for flag in ("mask", "init", "model")}
    same = {name: value for name, value in flat(cfg).items() if FIELDS[name].metadata["identity"]}
    same |= {flag: str(path) for flag, path in inputs.items() if path is not None}
    same |= {"reset_optimizer": cfg.resets_optimizer, "output_dir": str(Path(cfg.output_dir).resolve())}
    if cfg.data_dir and Path(cfg.data_dir).is_dir():
        same["data_dir"] = str(Path(cfg.data_dir).resolve())
    what = "ticket" if cfg.mask else "imp"
    return Job(
        words=words,
        place=line.place,
        key=json.dumps([script, same], sort_keys=True),
        name=_log_name(f"{cfg.task}-{what}-s{cfg.train.seed}", same),
        kind=f"{cfg.task} {what}",
        cfg=cfg,
        preset=TRAINING[script],
        inputs={flag: path for flag, path in inputs.items() if path is not None},
    )


def _making(line: Line, words: list[str], script: str, args: argparse.Namespace, facts: Mapping[str, Any]) -> Job:
    inputs = {flag: _input(flag, getattr(args, flag, None)) for flag in ("init", "model")}
    output = Path(args.output).resolve()
    same = vars(args) | {flag: str(path) for flag, path in inputs.items() if path is not None} | {"output": str(output)}
    return Job(
        words=words,
        place=line.place,
        key=json.dumps([script, same], sort_keys=True),
        name=_log_name(output.stem, same),
        kind=script,
        output=output,
        facts=facts,
        rate=getattr(args, "rate", None),
        inputs={flag: path for flag, path in inputs.items() if path is not None},
    )


def _input(flag: str, value: str | None) -> Path | None:
    """The place that a flag's value names, links followed; None for a word, and for a model's name on the hub."""
    if value is None or value in WORDS.get(flag, ()):
        return None
    on_hub = flag == "model" and value.count("/") < 2 and not value.startswith((".", "/", "~")) and not os.path.lexists(value)
    return None if on_hub else Path(value).resolve()


def _log_name(start: str, same: object) -> str:
    """A file name that begins readably and is the same for the same job in every sweep."""
    readable = re.sub(r"[^\w.-]+", "-", start).strip("-.")[:40]
    return f"{readable}-{hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]}.log"


# ---- who waits for whom ----


def _link(jobs: list[Job]) -> None:
    makers: dict[Path, Job] = {}
    for job in jobs:
        if job.output and job.output in makers:
            raise UserError(f"{makers[job.output].place} and {job.place} both write {job.output}, with different settings")
        made = job.output or (target(job) if _has_its_name(job) else None)
        if made is not None:
            makers.setdefault(made.resolve(), job)
    for job in jobs:
        for flag, path in job.inputs.items():
            place = next((place for place in (path, *path.parents) if place in makers), None)
            if place is not None:
                _check_level(job, flag, path.relative_to(place), makers[place])
                job.needs.append(makers[place])
            elif not path.exists():
                raise UserError(f"{job.place}: --{flag} {path} is not there, and no line makes it\n  {job.title}")
    try:
        graphlib.TopologicalSorter({job: job.needs for job in jobs}).prepare()
    except graphlib.CycleError as error:
        circle = " needs ".join(job.place for job in reversed(error.args[1]))
        raise UserError(f"these lines wait for each other in a circle: {circle}") from None


def _has_its_name(job: Job) -> bool:
    """Whether a training job's directory is known before it runs: names hold the content of the files that are read."""
    return job.cfg is not None and all(path.exists() for path in job.inputs.values())


def _check_level(job: Job, flag: str, within: Path, maker: Job) -> None:
    found = re.match(r"level_(\d+)", str(within))
    levels = levels_of(maker.cfg) if maker.cfg else 0
    if maker.cfg and found and int(found[1]) >= levels:
        raise UserError(f"{job.place}: --{flag} is of level {int(found[1])}, and {maker.place} has levels 0 to {levels - 1}")


# ---- done or not ----


def target(job: Job) -> Path | None:
    """What it makes: a run's directory, a maker's file; None for another program.

    A run is named by the content of its mask and weights: before they are there this is not its last name.
    """
    return run_dir(job.cfg, job.preset).resolve() if job.cfg else job.output


def is_done(job: Job, made: Path | None) -> bool:
    """Whether `made` (`target`, once the job's inputs are there) is finished, sound, and of these settings."""
    if made is None or not made.exists():
        return False
    with contextlib.suppress(UserError):  # a damaged file: the run itself says so
        return is_settled(made, levels_of(job.cfg)) if job.cfg else _is_made(job, made)
    return False


def progress(job: Job, made: Path | None) -> tuple[int, int] | None:
    """How many levels of a run are finished, and how many it has; None for what has none."""
    return (levels_done(made), levels_of(job.cfg)) if job.cfg and made else None


def _is_made(job: Job, file: Path) -> bool:
    """Whether the file is whole, says the same settings, and is no older than what it was made from."""
    from safetensors import SafetensorError, safe_open

    try:
        if any(path.stat().st_mtime_ns > file.stat().st_mtime_ns for path in job.inputs.values()):
            return False
        with safe_open(file, framework="numpy") as opened:  # also holds the file's length against its header
            metadata = opened.metadata() or {}
        said = metadata | json.loads(metadata.get("facts", "{}"))
        if job.rate is not None:  # the same share is removed: of all together, or of each matrix, to the weight
            sizes = [math.prod(shape) for shape in json.loads(said["shapes"]).values()]
            sizes = sizes if str(said["method"]).endswith("by tensor") else [sum(sizes)]
            if round((1 - float(said["density"])) * sum(sizes)) != sum(round(job.rate * size) for size in sizes):
                return False
        return all(key in said and _alike(said[key], value) for key, value in job.facts.items())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _alike(said: object, asked: object) -> bool:
    """Equal, or two ways to write one place: `theta0` and `./theta0`."""
    both_text = isinstance(said, str) and isinstance(asked, str)
    return said == asked or (both_text and os.path.realpath(str(said)) == os.path.realpath(str(asked)))
