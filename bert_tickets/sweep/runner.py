"""Run jobs as Ray tasks: a job's needs are its arguments; Ray retries failed commands and those of lost nodes."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bert_tickets.errors import Stopped, UserError, first_line
from bert_tickets.sweep.jobs import Job

GPUS = "CUDA_VISIBLE_DEVICES"  # set by Ray; the other variables of a run are the sweep's
GRACE = 300.0  # seconds for the commands to save when the sweep is stopped
TAIL = 12  # lines of a failed command's output


class CommandFailed(Exception):
    """A command ended with exit code 2, a user's mistake. Arguments: exit code, last lines of its output."""


class Crashed(CommandFailed):
    """A command ended with another exit code than 0 and 2. Ray retries it."""


class Outcome(NamedTuple):
    """The state of a job (`done`, `failed` or `not run`), the reason, and the last lines of its output."""

    state: str
    why: str = ""
    output: Sequence[str] = ()


# ---- in a Ray worker ----


def execute(words: list[str], folder: str, environment: dict[str, str], log: str, *needs: None) -> None:
    """Run a command, with its output appended to `log`: the body of a Ray task, which waits for the tasks in `needs`.

    Retries every minute after exit code 75 (another process holds the directory). Raises `CommandFailed` for others but 0.
    """
    program = sys.executable if words[0] in ("python", "python3") else words[0]
    tether = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []  # stops the command if this process dies
    header, wait = f"{socket.gethostname()}: {shlex.join(words)}", 2.0
    with open(log, "ab", buffering=0) as output:
        while True:
            print(f"started on {header}", flush=True)
            output.write(f"# {time.strftime('%F %T')} {header}\n".encode())
            code = _call([*tether, program, *words[1:]], folder, {**os.environ, **environment}, output)
            if code != os.EX_TEMPFAIL:
                break
            time.sleep(wait := min(2 * wait, 60.0))
    if code:
        raise (CommandFailed if code == 2 else Crashed)(code, last_lines(Path(log)))


def _call(command: list[str], folder: str, environment: dict[str, str], output: Any) -> int:
    """Run a command and return its exit code. `ray.cancel` raises KeyboardInterrupt here, which sends SIGTERM to the command."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
    try:
        while process.poll() is None:  # not `wait`, which Ray cannot interrupt
            time.sleep(0.1)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    return process.returncode


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log's last attempt; of a progress bar the last state."""
    attempt = log.read_bytes().decode(errors="replace").split("\n# ")[-1]
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in attempt.split("\n")[1:]]
    return [line for line in lines if line][-TAIL:]


# ---- in the sweep's process ----


def run(jobs: Sequence[Job], args: argparse.Namespace) -> dict[Job, Outcome]:
    """Run jobs, in the order of `plan`, on Ray, and print a line per event. A job that needs a failed one is not run.

    Raises `Stopped` on Ctrl-C and SIGTERM, after the commands have saved. A second signal ends the sweep at once.
    """
    Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    ray = connect(args.address)
    received = _signals()
    outcomes: dict[Job, Outcome] = {}
    left = set(jobs)
    try:
        pending = _submit(ray, jobs, args)
        while left and not received:
            for reference in ray.wait(list(pending), num_returns=len(pending), timeout=0.5)[0]:
                job = pending[reference]
                if left.isdisjoint(job.needs):  # otherwise in the next round
                    outcomes[job] = _outcome(ray, job, reference, outcomes)
                    left.remove(job)
                    del pending[reference]
                    print(time.strftime("%T"), f"{len(outcomes)} of {len(jobs)}", _line(job, outcomes[job]), flush=True)
        if left:
            print(f"stopping with {len(left)} jobs left: the running commands save and end", flush=True)
            for reference in pending:
                ray.cancel(reference)
            ray.wait(list(pending), num_returns=len(pending), timeout=GRACE)
            raise Stopped("stopped; the same command resumes", 128 + received[0])
    finally:
        ray.shutdown()
    return outcomes


def _signals() -> list[int]:
    """Return a list to which the first SIGINT or SIGTERM is appended; a second one ends the process."""
    received: list[int] = []

    def on_signal(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return received


def _line(job: Job, outcome: Outcome) -> str:
    return f"{outcome.state}{f' ({outcome.why})' if outcome.why else ''}: {job.title}"


def connect(address: str) -> Any:
    """Connect Ray to a cluster, or start it on this machine for this sweep if `address` is `local`. Returns the module."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
    if shutil.which("setpriv"):  # let a command save after its worker has died, instead of killing it
        os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # a wrong address is reported after a minute, not fifteen
    if address == "local":  # a token keeps other users of this machine out
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise UserError("a sweep needs Ray: pip install -e '.[sweep]'") from None
    alone = {"object_store_memory": 80 * 2**20, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="ERROR", **alone)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        what = "no Ray cluster answers, or it asks for a token (export RAY_AUTH_MODE=token)"
        raise UserError(f"--address {address}: {what}: {first_line(error)}") from None
    return ray


def _submit(ray: Any, jobs: Sequence[Job], args: argparse.Namespace) -> dict[Any, Job]:
    """Submit all jobs to Ray, with the references of a job's needs as its arguments."""
    gpus = float(ray.cluster_resources().get("GPU", 0) > 0) if args.gpus is None else args.gpus
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= args.cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise UserError(f"no node has {args.cpus:g} CPUs and {gpus:g} GPUs for a run: give --cpus and --gpus")
    environment = {name: value for name, value in os.environ.items() if name != GPUS and not name.startswith("RAY_")}
    environment |= {} if gpus else {GPUS: ""}
    options = {"num_cpus": args.cpus, "num_gpus": gpus, "max_retries": args.retries, "retry_exceptions": [Crashed]}
    task = ray.remote(execute).options(name="run", scheduling_strategy="SPREAD", **options)
    references: dict[Job, Any] = {}
    for job in jobs:
        log = str(Path(args.log_dir, job.log).resolve())
        needs = [references[need] for need in job.needs if need in references]
        references[job] = task.remote(job.words, os.getcwd(), environment, log, *needs)
    return {reference: job for job, reference in references.items()}


def _outcome(ray: Any, job: Job, reference: Any, outcomes: dict[Job, Outcome]) -> Outcome:
    for need in job.needs:
        if need in outcomes and outcomes[need].state != "done":
            return Outcome("not run", f"it needs {need.title}, {need.place}: {outcomes[need].state}")
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, CommandFailed):
            code, output = cause.args
            return Outcome("failed", f"exit code {code}", output)
        return Outcome("failed", f"{type(cause).__name__}: {first_line(cause)}")
    return Outcome("done")


def report(outcomes: dict[Job, Outcome], finished: int, log_dir: str) -> str:
    """Format the counts, and of each failed job the reason, the last output and the log."""
    states = [outcome.state for outcome in outcomes.values()]
    lines = [f"{finished + states.count('done')} done, {states.count('failed')} failed, {states.count('not run')} not run"]
    for job, outcome in outcomes.items():
        if outcome.state == "failed":
            lines += [f"\n{_line(job, outcome)}", f"  {job.place}; all of its output: {Path(log_dir, job.log)}"]
            lines += [f"  | {line}" for line in outcome.output]
    return "\n".join(lines)
