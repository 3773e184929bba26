"""Runs of the training scripts in processes of their own, alone or together, that may meet a fault: a signal, or an error of the
file system.

Each run is a fork of one process that has everything imported, which spares it the seconds of importing torch. The signals are
real. `python tests/faults/crash_harness.py` is that process: it reads a line of JSON for runs, and answers with one.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from trainrun import KINDS

ROOT = Path(__file__).parent.parent.parent
# Where a signal may come: at a call of a function, by module (and class) and name.
PLACES = [
    "bert_tickets.runs.prepare:prepare",
    "bert_tickets.runs.writer:Run.describe",
    "bert_tickets.training.step:Step.__call__",
    "bert_tickets.runs.session:evaluate",
    "bert_tickets.training.evaluate:autocast",
    "bert_tickets.masking.prune:prune",
    "bert_tickets.modeling.parameters:rewind",
    "bert_tickets.runs.writer:write_tensors",
    "bert_tickets.runs.writer:write_checksummed",
    "bert_tickets.masking.mask:Mask.write",
    "bert_tickets.runs.writer:append_line",
    "bert_tickets.runs.writer:write",
    "os:fsync",
    "pathlib:Path.replace",
    "pathlib:Path.rename",
    "pathlib:Path.unlink",
]
# Where the file system may raise an error.
FILE_SYSTEM = ["bert_tickets.runs.integrity:read_tensors", "os:fsync"]
FILE_SYSTEM += [f"pathlib:Path.{name}" for name in ("open", "mkdir", "replace", "rename", "unlink", "read_bytes")]
STEP = "bert_tickets.training.step:Step.__call__"
ANY_MOMENT = "any moment"


@dataclass(frozen=True)
class Fault:
    """A signal or an error (a name of `errno`), at a call of a function or so many seconds after the start."""

    name: str  # SIGKILL, SIGTERM, SIGINT, ENOSPC, ...
    place: str = ANY_MOMENT  # of `PLACES` or `FILE_SYSTEM`
    call: int = 0  # from 1
    before: bool = True  # or after the call has done its work
    twice: bool = False  # the signal
    after: float = 0.0  # seconds, at any moment

    def occur(self) -> None:
        """Send the signal to this process, or raise the error."""
        if self.name.startswith("E"):
            number = getattr(errno, self.name)
            raise OSError(number, os.strerror(number), "a file")
        for _ in range(1 + self.twice):
            os.kill(os.getpid(), getattr(signal, self.name))


@dataclass(frozen=True)
class Job:
    """A script to run in a folder, which is made if it is not there."""

    folder: Path
    script: str
    words: Sequence[object]
    fault: Fault | None = None
    environment: dict[str, str] = field(default_factory=dict)  # further variables
    setup: str = ""  # Python that the process runs first
    wait: float = 0.0  # seconds, before it starts


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int  # the exit code; of a killed process minus the signal's number
    output: str
    calls: dict[str, int]  # of each place, of a run that came to its end
    seconds: float
    pid: int


class Harness:
    """The process that forks. `added` is a folder on its PYTHONPATH."""

    def __init__(self, added: Path) -> None:
        path = os.pathsep.join(str(folder) for folder in (added, ROOT, ROOT / "tests"))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, str(Path(__file__))]
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.added = added

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def run(self, folder: Path, script: str, words: Sequence[object], fault: Fault | None = None) -> Outcome:
        """Run a script in `folder`, and wait for its end."""
        (outcome,) = self.run_together([Job(folder, script, words, fault)])
        return outcome

    def run_together(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run several scripts at the same time, and wait for their ends."""
        self.process.stdin.write(json.dumps([asdict(job) for job in jobs], default=str) + "\n")
        self.process.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(self.process.stdout.readline())]


# ---- in the process that forks ----


def serve() -> None:
    os.environ["HF_HUB_OFFLINE"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    from tqdm import tqdm
    from transformers import BertForMaskedLM, BertTokenizerFast  # noqa: F401

    from bert_tickets.runs import session, train_log, writer  # noqa: F401
    from bert_tickets.runs.provenance import environment
    from bert_tickets.tasks import glue, mlm, squad  # noqa: F401

    tqdm.monitor_interval = 0  # its thread would not live on in a fork
    known = environment("cpu")
    writer.environment = lambda device: known  # asking git takes as long as a level here
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        jobs = [Job(**asked) for asked in json.loads(line)]
        jobs = [replace(job, folder=Path(job.folder), fault=job.fault and Fault(**job.fault)) for job in jobs]
        running = [(job, _fork(job), time.monotonic()) for job in jobs]
        answers.write(json.dumps([asdict(_wait_for(*started)) for started in running]) + "\n")
        answers.flush()


def _files(job: Job) -> tuple[Path, Path]:
    """The files with the output of a process, and its numbers of calls."""
    rank = job.environment.get("RANK", "0")
    return job.folder / f"output{rank}.txt", job.folder / f"calls{rank}.json"


def _fork(job: Job) -> int:
    job.folder.mkdir(parents=True, exist_ok=True)
    for file in _files(job):
        file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _become(job)
    return child


def _wait_for(job: Job, child: int, began: float) -> Outcome:
    if job.fault and job.fault.place == ANY_MOMENT:
        time.sleep(job.fault.after)
        os.kill(child, getattr(signal, job.fault.name))  # not waited for yet, so that its number is nobody else's
    _, status = os.waitpid(child, 0)
    output, calls = _files(job)
    counted = json.loads(calls.read_text()) if calls.exists() else {}
    code, spent = os.waitstatus_to_exitcode(status), time.monotonic() - began
    return Outcome(code, output.read_text(errors="replace") if output.exists() else "", counted, spent, child)


def _become(job: Job) -> None:
    """Be the script's own process from here on."""
    from bert_tickets.data import token_cache
    from bert_tickets.methods.main import main

    output, counted = _files(job)
    code: Any = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(120)  # ends a run that hangs
        time.sleep(job.wait)
        os.chdir(job.folder)
        os.environ |= job.environment
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        token_cache.HF_HOME = "cache"  # its writes may meet a fault, too
        sys.argv = [job.script]  # run.json holds it
        exec(job.setup, {})
        calls = dict.fromkeys([*PLACES, *FILE_SYSTEM], 0)
        for place in calls:
            _watch(place, calls, job.fault)
        try:
            main(KINDS[job.script], None, list(map(str, job.words)))
        except SystemExit as leave:
            code = leave.code
        with open(counted, "w") as file:  # not by `Path`, where a fault may occur
            json.dump(calls, file)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 70)


def _watch(place: str, calls: dict[str, int], fault: Fault | None) -> None:
    """Count the calls of a function, and have the fault occur at one of them."""
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, name, _counting(getattr(owner, name), place, calls, fault))


def _counting(function: Callable[..., Any], place: str, calls: dict[str, int], fault: Fault | None) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls[place] += 1
        now = fault is not None and (fault.place, fault.call) == (place, calls[place])
        if now and fault.before:
            fault.occur()
        result = function(*arguments, **options)
        if now and not fault.before:
            fault.occur()
        return result

    return call


if __name__ == "__main__":
    serve()
