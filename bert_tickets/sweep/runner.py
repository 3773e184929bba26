"""Run jobs as Ray tasks: a job's needs are its arguments; Ray retries failed commands and those of lost nodes."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert_tickets.errors import Stopped, UserError, first_line
from bert_tickets.signals import stop_signals
from bert_tickets.sweep.jobs import Job

GPUS = "CUDA_VISIBLE_DEVICES"  # set by Ray; the other variables of a run are the sweep's
GRACE = 300.0  # seconds for the commands to save when the sweep is stopped
BUSY_WAIT = 10.0  # seconds between attempts while another process holds the run directory
TAIL = 12  # lines of a failed command's output


def execute(command: str, folder: str, environment: dict[str, str], log: str, *needs: None) -> None:
    """Run a command by bash, with its output appended to `log`: the body of a Ray task, which waits for the tasks in `needs`.

    Tries again after exit code 75: another process holds the directory. Raises `UserError` for exit code 2, `RuntimeError`, which
    Ray retries, for others but 0. `ray.cancel` raises KeyboardInterrupt here, which sends SIGTERM to the command and waits until
    it has saved.
    """
    tether = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []  # stops the command if this process dies
    code = os.EX_TEMPFAIL
    with open(log, "ab", buffering=0) as output:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        options: dict[str, Any] = {"cwd": folder, "env": {**os.environ, **environment}, "start_new_session": True}
        while code == os.EX_TEMPFAIL:
            header = f"started on {socket.gethostname()}: {command}"
            print(header, flush=True)
            output.write(f"# {time.strftime('%F %T')} {header}\n".encode())
            process = subprocess.Popen([*tether, "bash", "-c", command], **streams, **options)
            try:
                while process.poll() is None:  # not `wait`, which Ray cannot interrupt
                    time.sleep(0.1)
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGTERM)  # of `cd DIR && python ...` the shell and the program
                process.wait()
                raise
            code = process.returncode
            if code == os.EX_TEMPFAIL:
                time.sleep(BUSY_WAIT)
    if code:
        raise (UserError if code == 2 else RuntimeError)(f"exit code {code}")


def run(jobs: Sequence[Job], args: argparse.Namespace) -> dict[Job, str]:
    """Run jobs, in the order of `plan`, on Ray, and print a line per event. Returns their outcomes: done, failed, or not run.

    Raises `Stopped` on a stop signal, after the commands have saved. A second one ends the sweep at once.
    """
    Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    ray = connect(args.address)
    received: list[int] = []
    outcomes: dict[Job, str] = {}
    try:
        with stop_signals(received.append):
            pending = _submit(ray, jobs, args)
            while pending and not received:
                for reference in ray.wait(list(pending), num_returns=len(pending), timeout=0.5)[0]:  # in the order of the jobs
                    job = pending.pop(reference)
                    outcomes[job] = _outcome(ray, job, reference, outcomes)
                    print(time.strftime("%T"), f"{len(outcomes)} of {len(jobs)} {outcomes[job]}: {job.text}", flush=True)
        if pending:
            with contextlib.suppress(OSError):  # the terminal may be closed
                print(f"stopping with {len(pending)} jobs left: the running commands save and end", flush=True)
            for reference in pending:
                ray.cancel(reference)
            ray.wait(list(pending), num_returns=len(pending), timeout=GRACE)
            raise Stopped("stopped; the same command resumes", 128 + received[0])
    finally:
        ray.shutdown()
    return outcomes


def connect(address: str) -> Any:
    """Connect Ray to a cluster, or start it on this machine for this sweep if `address` is `local`. Returns the module."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0", "RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # a wrong address is reported after a minute, not fifteen
    options: dict[str, Any] = {}
    if address == "local":  # a token keeps other users of this machine out
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        options = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    try:
        import ray
    except ImportError:
        raise UserError("a sweep needs Ray: pip install -e '.[sweep]'") from None
    try:
        ray.init(address=address, logging_level="ERROR", **options)
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
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"  # its `python` is this one
    environment |= {} if gpus else {GPUS: ""}
    options = {"num_cpus": args.cpus, "num_gpus": gpus, "max_retries": args.retries, "retry_exceptions": [RuntimeError]}
    task = ray.remote(execute).options(name="run", scheduling_strategy="SPREAD", **options)
    references: dict[Job, Any] = {}
    for job in jobs:
        log = str(Path(args.log_dir, job.log).resolve())
        needs = [references[need] for need in job.needs if need in references]
        references[job] = task.remote(job.text, os.getcwd(), environment, log, *needs)
    return {reference: job for job, reference in references.items()}


def _outcome(ray: Any, job: Job, reference: Any, outcomes: dict[Job, str]) -> str:
    """Return `done`, `failed (REASON)`, or `not run (NEED)` for a job that needs one that is not done."""
    for need in job.needs:
        if outcomes.get(need, "done") != "done":
            return f"not run (it needs {need.place}: {need.text})"
    try:
        ray.get(reference)
    except ray.exceptions.RayError as error:
        return f"failed ({first_line(getattr(error, 'cause', error))})"
    return "done"


def report(outcomes: dict[Job, str], finished: int, log_dir: str) -> str:
    """Format the counts, and of each failed job the reason, the last output and the log."""
    states = [outcome.partition(" (")[0] for outcome in outcomes.values()]
    lines = [f"{finished + states.count('done')} done, {states.count('failed')} failed, {states.count('not run')} not run"]
    for job, state in zip(outcomes, states, strict=True):
        if state == "failed":
            log = Path(log_dir, job.log)
            output = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            lines += [f"\n{outcomes[job]}: {job.text}", f"  {job.place}; all of its output: {log}"]
            lines += [f"  | {line}" for line in output[-TAIL:]]
    return "\n".join(lines)
