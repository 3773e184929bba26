"""Check that the package works on this machine's GPU, and measure its speed: bash scripts/gpu_check.sh

No hub and no data are needed: the network is a BERT-base with random weights, and the data are generated. The most important
checks come first; after a failure the others run in a new process. The table at the end is also written to gpu_check.json. The
exit code is 1 unless every check passed or was skipped.

  bash scripts/gpu_check.sh                        at most 8 minutes
  bash scripts/gpu_check.sh --quick                at most 3 minutes: fewer steps and tests
  bash scripts/gpu_check.sh --device cpu --quick   the checks that need no GPU, with a small network
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bert_tickets.bench.checks import Setting, Skipped
from bert_tickets.cli import FORMATTER, hyphens, run_command
from bert_tickets.errors import UserError, first_line
from bert_tickets.files import write

CHECKS = {  # the most important first; functions of bert_tickets.bench
    "run": "checks.killed_run",
    "tests": "checks.gpu_tests",
    "steps": "step_checks.equal_steps",
    "graphs": "step_checks.graphs",
    "speed": "step_checks.speed",
    "masks": "step_checks.masks",
    "gradients": "step_checks.gradients",
    "memory": "step_checks.memory",
    "tasks": "checks.other_tasks",
}
NEED_GPU = ("tests", "graphs", "masks", "gradients", "memory")
LOG = "log.txt"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true", help="fewer steps and tests")
    parser.add_argument("--device", default="cuda", metavar="TEXT", help="cuda, cuda:1 or cpu (default: cuda)")
    parser.add_argument("--output", default="runs/gpu_check", metavar="DIR", help="(default: runs/gpu_check)")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CHECKS), help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--minutes", type=float, metavar="X", help="time limit (default: 8; with --quick 3)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(hyphens())
    if unknown := sorted(set(args.only) - set(CHECKS)):
        parser.error(f"--only {unknown[0]}: the checks are {', '.join(CHECKS)}")
    args.output = Path(args.output).resolve()
    args.minutes = args.minutes or (3.0 if args.quick else 8.0)
    return args


def main(args: argparse.Namespace) -> None:
    if args.child:
        run_in_child(args)
        return
    need_device(args.device)
    clear(args.output)
    names = [name for name in CHECKS if name in args.only]
    print(f"checks: {', '.join(names)}; their output goes to {args.output / LOG}", flush=True)
    began = time.monotonic()
    lines: list[dict[str, Any]] = []
    try:
        while remaining := names[len(lines) :]:
            if (left := began + 60 * args.minutes - time.monotonic()) <= 0:
                lines += [{"check": name, "result": "no time", "seconds": 0.0} for name in remaining]
                break
            for line in run_checks(args, remaining, left):
                show(line)
                lines.append(line)
    finally:  # also after Ctrl-C
        report(args, lines, time.monotonic() - began)
    sys.exit(any(line["result"] in ("FAIL", "no time") for line in lines))


def need_device(asked: str) -> None:
    """Raise `UserError` if torch sees no GPU and one is asked for. Does not start CUDA on it."""
    import torch

    if asked != "cpu" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise UserError(f"torch sees no GPU (torch {torch.__version__} {built}); --device cpu runs the checks that need none")


def clear(output: Path) -> None:
    """Remove the folder of an earlier check. Raises `UserError` for another folder that is not empty."""
    if output.exists() and any(output.iterdir()) and not (output / LOG).exists():
        raise UserError(f"--output {output} has other files in it: give a new folder, or one of an earlier check")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)


# ---- running the checks ----


def run_checks(args: argparse.Namespace, names: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Run checks in a new process until one fails, for at most `seconds`; yields their results.

    After a failure the caller starts another process, as the CUDA context may be broken.
    """
    command = [sys.executable, __file__, "--output", str(args.output), "--device", args.device, *["--quick"] * args.quick]
    command += ["--child", *names]
    with (args.output / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    last, deadline, done = time.monotonic(), time.monotonic() + seconds, 0
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        for text in process.stdout or ():
            last, done = time.monotonic(), done + 1
            yield json.loads(text)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # after Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
    if code and done < len(names):
        late = time.monotonic() >= deadline
        result, why = ("no time", "ended at the limit") if late else ("FAIL", f"its process ended with {code}")
        yield {"check": names[done], "result": result, "seconds": time.monotonic() - last, "summary": why}


def run_in_child(args: argparse.Namespace) -> None:
    """Run checks in this process until one fails. Each writes a JSON line to stdout; all else goes to stderr."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in args.child:
        print(f"\n==== {name} ====", flush=True)
        began = time.monotonic()
        line = {"check": name, **run_check(name, Setting(args.output, args.device, args.quick))}
        print(json.dumps(line | {"seconds": time.monotonic() - began}), file=results, flush=True)
        if line["result"] == "FAIL":
            return


def run_check(name: str, setting: Setting) -> dict[str, Any]:
    """Run a check. Returns its result and its figures."""
    module, _, function = CHECKS[name].partition(".")
    try:
        if name in NEED_GPU and not setting.on_gpu:
            raise Skipped("no GPU")
        figures = getattr(importlib.import_module(f"bert_tickets.bench.{module}"), function)(setting)
    except Skipped as why:
        return {"result": str(why)}
    except Exception as error:
        traceback.print_exc()
        return {"result": "FAIL", "summary": f"{type(error).__name__}: {first_line(error)}"}
    return {"result": "pass", "summary": figures.pop("summary"), "figures": figures, "gpu": gpu()}


def gpu() -> dict[str, Any]:
    """Return the properties of the GPU, if this process uses one."""
    import torch

    if not torch.cuda.is_initialized():
        return {}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"gpu": found.name, "GiB": round(found.total_memory / 2**30, 1), "cuda": torch.version.cuda}


# ---- the table ----


def show(line: dict[str, Any]) -> None:
    print(f"{line['check']:10} {line['result']:9} {line['seconds']:6.1f} s  {line.get('summary', '')}".rstrip(), flush=True)


def report(args: argparse.Namespace, lines: list[dict[str, Any]], seconds: float) -> None:
    """Print every check with its figures, and write the same as JSON."""
    print()
    for line in lines:
        show(line)
        for name, value in line.get("figures", {}).items():
            print(f"{'':10} {name}: {value:,.4g}")
    machine = {"python": platform.python_version(), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {name: version(name) for name in ("torch", "transformers")} | next((x["gpu"] for x in lines if x.get("gpu")), {})
    arguments = {"quick": args.quick, "device": args.device, "only": args.only, "minutes": args.minutes}
    found = {"machine": machine, "arguments": arguments, "seconds": seconds, "checks": lines}
    write(args.output / "gpu_check.json", json.dumps(found, indent=1).encode() + b"\n")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{seconds:.0f} s in all; {args.output}/gpu_check.json")


if __name__ == "__main__":
    run_command(main, parse())
