"""Run command lines on Ray: equal ones once, what needs a mask after what makes it, finished ones not again.

  bash scripts/table2.sh --dry-run | python scripts/sweep.py            this machine, nothing to set up
  python scripts/sweep.py lines.txt more.txt --gpus 0.5 --retries 2     two runs share a GPU
  python scripts/sweep.py lines.txt --address auto                      a cluster that was started with `ray start`

The same command goes on where a stopped or killed sweep was. On a cluster all nodes see this folder at the same place (a
shared file system) and have the same Python environment; what runs on a lost node goes on elsewhere, from its directory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # oneshot.py and perturb_weight.py are scripts, not of the package

import oneshot
import perturb_weight
from bert_tickets.cli import hyphens, run_command
from bert_tickets.errors import Stopped, UserError, first_line
from bert_tickets.sweep.jobs import Job, Line, plan, read_lines
from bert_tickets.sweep.runner import LOSSES, Ended, Sweep
from bert_tickets.sweep.view import View, report

MAKERS = {"oneshot.py": oneshot, "perturb_weight.py": perturb_weight}
NODES_SECONDS = 5.0  # between looks at which nodes there are
GPUS = "CUDA_VISIBLE_DEVICES"  # Ray's to set; all else of a run's environment is the sweep's

# Run first in a command's own process: it gets SIGTERM when what started it dies, however that dies, so that no run outlives
# its worker and holds its directory. (In a process of its own, as Ray's worker has threads, and must not run Python in a fork.)
TETHER = """
import ctypes, os, signal, sys
try: ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, of Linux; stays over exec
except AttributeError: pass
if os.getppid() != int(sys.argv[1]): sys.exit(143)  # it died before
try: os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error: print(f"{sys.argv[2]}: {error.strerror}"); sys.exit(127)
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="command lines, one a line (default: standard input, also -)")
    parser.add_argument("--address", default="local", metavar="TEXT", help="a Ray cluster: auto, or host:port (default: none)")
    parser.add_argument("--gpus", type=float, metavar="X", help="GPUs of a run: 0.5, 1, 2 (default: 1 where there are any)")
    parser.add_argument("--cpus", type=float, default=1, metavar="X", help="CPUs of a run, and its OMP_NUM_THREADS (default: 1)")
    parser.add_argument("--retries", type=int, default=1, metavar="N", help="tries more for a run that failed (default: 1)")
    parser.add_argument("--log-dir", default="runs/sweep", metavar="DIR", help="runs' output, a file each (default: runs/sweep)")
    args = parser.parse_args(hyphens(None))
    if args.gpus is not None and not (0 <= args.gpus <= 1 or (args.gpus > 1 and args.gpus == int(args.gpus))):
        parser.error(f"--gpus {args.gpus}: a share of one GPU, or a whole number, is needed")
    if not 0 < args.cpus < 1e6:
        parser.error(f"--cpus {args.cpus}: a number above 0 is needed")
    if args.retries < 0:
        parser.error(f"--retries {args.retries}: 0 or more is needed")
    return args


class Slot:
    """A place on some node with a run's CPUs and GPUs, as a Ray actor: runs one command after another."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping = False
        self.lock = threading.Lock()  # `stop` is called beside `run`

    def host(self) -> str:
        return socket.gethostname()

    def run(self, words: list[str], folder: str, environment: dict[str, str], log: str) -> int:
        """The command's exit code. Its output is added to `log`."""
        of_place = {name: os.environ[name] for name in (GPUS,) if name in os.environ}
        program = words[0] if os.path.sep not in words[0] or os.path.exists(words[0]) else sys.executable
        command = [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid()), program, *words[1:]]
        with open(log, "ab") as output:
            output.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {self.host()}: {shlex.join(words)}\n".encode())
            output.flush()
            with self.lock:
                if self.stopping:
                    return 128 + signal.SIGTERM
                self.process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=of_place | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the sweep, which then asks its runs to save
                )
        return self.process.wait()

    def stop(self) -> None:
        """Ask the command to save and end."""
        with self.lock:
            self.stopping = True
            if self.process and self.process.poll() is None:
                self.process.terminate()


class Slots:
    """The executor of a sweep on Ray: as many slots as its nodes have room for, asked for when there is work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.ray = connect(args.address)
        self.cpus: float = args.cpus
        self.gpus: float = args.gpus if args.gpus is not None else float(self.ray.cluster_resources().get("GPU", 0) > 0)
        self.log_dir = Path(args.log_dir).resolve()
        self.environment = {name: value for name, value in os.environ.items() if name != GPUS and not name.startswith("RAY_")}
        self.environment |= {} if self.gpus else {GPUS: ""}  # a run that was given none sees none
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, int(self.cpus))))
        self.actor = self.ray.remote(Slot).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_concurrency=2, scheduling_strategy="SPREAD"
        )
        self.coming: dict[Any, Any] = {}  # Ray's reference to a slot's first answer: the slot
        self.idle: list[tuple[Any, str]] = []  # slots, with their machines' names
        self.busy: dict[Any, tuple[Job, Any, str]] = {}  # reference to an exit code: the job, its slot and machine
        self.counted_at, self.total, self.failed_slots = 0.0, 0, 0
        if not self._count():
            raise UserError(f"no node has {self.cpus:g} CPUs and {self.gpus:g} GPUs for a run: give --cpus and --gpus")

    def _count(self) -> int:
        """Places that all nodes have room for; nodes may come and go."""
        if self.counted_at == 0 or time.monotonic() - self.counted_at > NODES_SECONDS:
            nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            asked = {"CPU": self.cpus, "GPU": self.gpus}
            places = [min(int(node.get(kind, 0) / each + 1e-6) for kind, each in asked.items() if each) for node in nodes]
            self.total, self.counted_at = sum(places), time.monotonic()
        return self.total

    def room(self, wanted: int) -> int:
        """Slots that are free; more are asked for, and what is not needed is given back."""
        for slot, _ in self.idle[wanted:]:
            self.ray.kill(slot)
        del self.idle[wanted:]
        have = len(self.coming) + len(self.idle)
        for _ in range(min(wanted, self._count() - len(self.busy)) - have):
            slot = self.actor.remote()
            self.coming[slot.host.remote()] = slot
        return len(self.idle)

    def start(self, job: Job) -> str:
        slot, host = self.idle.pop()
        words = [sys.executable if job.words[0] in ("python", "python3") else job.words[0], *job.words[1:]]
        reference = slot.run.remote(words, os.getcwd(), self.environment, str(self.log(job)))
        self.busy[reference] = job, slot, host
        return host

    def wait(self, seconds: float) -> list[Ended]:
        references = [*self.coming, *self.busy]
        if not references:
            time.sleep(seconds)
            return []
        self.ray.wait(references, timeout=seconds)
        ready, _ = self.ray.wait(references, num_returns=len(references), timeout=0)  # all that have ended, not the first alone
        return [ended for reference in ready for ended in self._receive(reference)]

    def _receive(self, reference: Any) -> Iterator[Ended]:
        """A slot that has come, or a command's end. A slot whose node is lost goes, and its job is told so."""
        if slot := self.coming.pop(reference, None):
            try:
                self.idle.append((slot, self.ray.get(reference)))
            except self.ray.exceptions.RayError as error:
                self.failed_slots += 1
                if self.failed_slots > LOSSES:
                    raise UserError(f"Ray starts no workers: {first_line(error)}") from None
            return
        job, slot, host = self.busy.pop(reference)
        try:
            yield Ended(job, self.ray.get(reference))
            self.idle.append((slot, host))
        except self.ray.exceptions.RayTaskError as error:  # of the slot's own: no such folder there, a full disk
            yield Ended(job, 1, f"on {host}: {error.cause}")
            self.idle.append((slot, host))
        except self.ray.exceptions.RayError as error:
            self.ray.kill(slot)  # where it is only out of reach, its command must not go on
            yield Ended(job, None, type(error).__name__)

    def stop(self) -> None:
        for _, slot, _ in self.busy.values():
            slot.stop.remote()

    def log(self, job: Job) -> Path:
        return self.log_dir / job.name


def connect(address: str) -> Any:
    """Ray, connected; started on this machine for this sweep alone where `address` is `local`."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}  # no reports home, no chatter
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # a wrong address is told after a minute, not a quarter of an hour
    if address == "local":  # a token for this sweep alone: Ray's own would stay in the home, and bind later clusters to it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise UserError("a sweep needs Ray: pip install -e '.[sweep]'") from None

    alone = {"object_store_memory": 80 * 2**20, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **alone)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        what = "no Ray cluster answers, or it asks for a token (export RAY_AUTH_MODE=token)"
        raise UserError(f"--address {address}: {what}: {first_line(error)}") from None
    return ray


@contextlib.contextmanager
def stopping_on_signals(sweep: Sweep) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask the sweep to stop, a second one stops at once. Yields the signals that came."""
    came: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if came:
            raise Stopped("stopped at once; the same command goes on from the last checkpoints", 128 + number)
        came.append(number)
        sweep.stopping = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lines_of(files: list[str]) -> list[Line]:
    """The lines of the files; of standard input where none is given."""
    if not files and sys.stdin.isatty():
        raise UserError("give files of command lines, or pipe them in")
    lines = []
    for file in files or ["-"]:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
        lines += read_lines("standard input" if file == "-" else file, text)
    return lines


def main(args: argparse.Namespace) -> None:
    view = View(sys.stdout)
    jobs = plan(lines := lines_of(args.files), MAKERS)
    sweep = Sweep(jobs, args.retries, view.say)
    sweep.settle()
    came: list[int] = []
    print(f"{len(lines)} lines are {len(jobs)} jobs, of which {sweep.count('done')} are done", flush=True)
    logs = Path(args.log_dir)
    if not sweep.over:
        logs.mkdir(parents=True, exist_ok=True)
        came = run(sweep, args, view)
    print(report(sweep, lambda job: logs / job.name))
    if came:
        raise Stopped("stopped; the same command goes on", 128 + came[0])
    if sweep.count("failed") or sweep.count("skipped"):
        sys.exit(1)


def run(sweep: Sweep, args: argparse.Namespace, view: View) -> list[int]:
    """Run what is left of the sweep on Ray. Returns the signals that stopped it."""
    slots = Slots(args)
    try:
        with stopping_on_signals(sweep) as came:
            sweep.go(slots, lambda: view.show(sweep))
    finally:
        view.clear()
        slots.ray.shutdown()
    return came


if __name__ == "__main__":
    run_command(main, parse())
