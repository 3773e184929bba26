"""Processes to be killed: the training scripts, and others, each run in a fork of one process that has everything imported.

`python tests/victims.py` reads a line of JSON for a run and answers with one. A fork is a process of its own: the signals are
real, and so is what they leave behind. It only spares a hundred runs the seconds that importing torch takes. Nothing is
computed before the fork, and with one thread there is none to be lost in it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refusals import FileSystem, Refusal

ROOT = Path(__file__).parent.parent
PRESETS = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}
# Where a signal may land: a function, by its module (and class) and name, beside what the place is called.
PLACES = {
    "bert_tickets.methods.imp:prepare": "start",
    "bert_tickets.runs.session:Run.describe": "start",
    "bert_tickets.training.step:Step.__call__": "step",
    "bert_tickets.methods.imp:evaluate": "evaluation",
    "bert_tickets.training.loop:autocast": "evaluation",
    "bert_tickets.methods.imp:prune": "pruning",
    "bert_tickets.methods.imp:rewind": "pruning",
    "bert_tickets.runs.levels:write_tensors": "checkpoint",
    "bert_tickets.runs.session:write_tensors": "the level's files",
    "bert_tickets.runs.session:write_checksummed": "the level's files",
    "bert_tickets.masking.mask:Mask.write": "the level's files",
    "bert_tickets.files:Part.write": "between a file's parts",
    "os:fsync": "flush",
    "pathlib:Path.replace": "rename",
    "pathlib:Path.rename": "rename",
    "pathlib:Path.unlink": "tidying",
    "bert_tickets.runs.resume:write": "tidying",
}
ANY_MOMENT = "any moment"


@dataclass(frozen=True)
class Strike:
    """A signal, and when it comes: at a call of a function, or so many seconds after the start."""

    number: int
    place: str = ANY_MOMENT  # of `PLACES`
    call: int = 0  # from 1
    before: bool = True  # the call does its work
    twice: bool = False
    after: float = 0.0  # seconds, at any moment


@dataclass(frozen=True)
class End:
    """How a run ended."""

    code: int  # the exit code; of a killed process minus the signal's number
    said: str
    calls: dict[str, int]  # of each place, of a run that came to its end
    seconds: float
    process: int
    refused: dict[str, Any] | None = None  # the paths, and the finished files of that moment with their sha256


class Nursery:
    """The process that forks. A context manager. `within` is a command that is to run it: `unshare`, with its flags."""

    def __init__(self, *within: str) -> None:
        self.within = within

    def __enter__(self) -> Nursery:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [*self.within, sys.executable, str(Path(__file__))]
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def run(self, folder: Path, script: str, words: Sequence[str], strike: Strike | Refusal | None = None) -> End:
        """Run a script, or a module of the package, in `folder`, which is made where it is not there, and wait for its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"folder": str(folder), "script": script, "words": list(words), "strike": strike and asdict(strike)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return End(**json.loads(self.process.stdout.readline()))


# ---- in the process that forks ----


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    from tqdm import tqdm
    from transformers import BertForMaskedLM, BertTokenizerFast  # noqa: F401

    from bert_tickets import lottery, runs  # noqa: F401
    from bert_tickets.runs.provenance import environment
    from bert_tickets.tasks import glue, mlm, squad  # noqa: F401

    tqdm.monitor_interval = 0  # its thread would not live on in a fork
    known = environment("cpu")
    runs.environment = lambda device: known  # asking git takes as long as a level here
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        given = asked["strike"]
        strike = given and (Refusal if "error" in given else Strike)(**given)
        end = _fork(Path(asked["folder"]), asked["script"], asked["words"], strike)
        answers.write(json.dumps(asdict(end)) + "\n")
        answers.flush()


def _fork(folder: Path, script: str, words: list[str], strike: Strike | Refusal | None) -> End:
    began = time.monotonic()
    said, calls = folder / "said.txt", folder / "calls.json"
    for file in (said, calls):
        file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _become(folder, script, words, strike)
    if isinstance(strike, Strike) and strike.place == ANY_MOMENT:
        time.sleep(strike.after)
        os.kill(child, strike.number)  # it is not waited for yet, so that its number is nobody else's
    _, status = os.waitpid(child, 0)
    counted, refused = json.loads(calls.read_text()) if calls.exists() else ({}, None)
    code, spent = os.waitstatus_to_exitcode(status), time.monotonic() - began
    return End(code, said.read_text(errors="replace"), counted, spent, child, refused)


def _become(folder: Path, script: str, words: list[str], strike: Strike | Refusal | None) -> None:
    """The script's own process from here on."""
    from importlib import import_module

    from bert_tickets.cli import parse, run_command
    from bert_tickets.data import mlm_dataset as corpus
    from bert_tickets.data import token_cache as tokens

    code: Any = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(120)  # a run that hangs ends as one
        os.chdir(folder)
        with open("said.txt", "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        tokens.HF_HOME = corpus.HF_HOME = "cache"  # its writes are among those that a signal may land in
        sys.argv = [script]  # run.json holds it
        calls = dict.fromkeys(PLACES, 0)
        system = FileSystem(strike) if isinstance(strike, Refusal) else None
        if system:
            system.install()
        for place in PLACES if system is None else ():
            _watch(place, calls, strike)
        try:
            if script in PRESETS:
                run_command(import_module(script.removesuffix(".py")).main, parse(PRESETS[script], None, words))
            sys.argv = [script, *words]
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            runpy.run_module(script, run_name="__main__")
        except KeyboardInterrupt:  # in `parse`: Python's own answer is a traceback, and the same code
            print("interrupted before it began")
            code = 130
        except SystemExit as leave:
            code = leave.code
        told = (system.calls, system.refused) if system else (calls, None)
        Path("calls.json").write_text(json.dumps(told))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 70)


def _watch(place: str, calls: dict[str, int], strike: Strike | None) -> None:
    """Count the calls of a function, and deliver the signal to this process at one of them."""
    from importlib import import_module

    module, _, path = place.partition(":")
    if path == "Part.write":
        _watch_parts(calls, place, strike)
        return
    owner: Any = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, name, _counting(getattr(owner, name), place, calls, strike))


def _counting(function: Callable[..., Any], place: str, calls: dict[str, int], strike: Strike | None) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls[place] += 1
        now = strike is not None and strike.place == place and strike.call == calls[place]
        if now and strike.before:
            _deliver(strike)
        result = function(*arguments, **options)
        if now and not strike.before:
            _deliver(strike)
        return result

    return call


def _deliver(strike: Strike) -> None:
    for _ in range(1 + strike.twice):
        os.kill(os.getpid(), strike.number)


def _watch_parts(calls: dict[str, int], place: str, strike: Strike | None) -> None:
    """As `_watch`, between the parts that a file is written of: what was written is in the file, unflushed."""
    from bert_tickets import files

    plain = files.writing

    @contextmanager
    def writing(path: Path) -> Iterator[Any]:
        with plain(path) as file:

            class Part:
                write = staticmethod(_counting(lambda part: (file.write(part), file.flush()), place, calls, strike))

            yield Part

    files.writing = writing


if __name__ == "__main__":
    serve()
