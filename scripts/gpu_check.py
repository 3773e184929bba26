"""Check that the package works on this machine's GPU, and measure how fast: bash scripts/gpu_check.sh

No hub and no data are needed: the network is a BERT-base of random weights, and tasks and vocabulary are generated. The checks
run in the order of their worth and go on after a failure, in a new process where one has died. At the end stands a table, with
gpu_check.json and the log beside it in --output; the exit code is 1 unless every check passed or was skipped.

  bash scripts/gpu_check.sh                        at most 8 minutes
  bash scripts/gpu_check.sh --quick                at most 2 minutes: fewer steps and tests
  bash scripts/gpu_check.sh --device cpu --quick   what needs no GPU, with a small network
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bert_tickets.bench import checks, step_checks
from bert_tickets.cli import hyphens, run_command
from bert_tickets.errors import UserError, first_line
from bert_tickets.files import write_json

CHECKS = {  # in the order of their worth
    "run": checks.whole_run,
    "tests": checks.own_tests,
    "steps": step_checks.equal_steps,
    "graphs": step_checks.graphs,
    "speed": step_checks.speed,
    "masks": step_checks.masks,
    "gradients": step_checks.gradients,
    "memory": step_checks.memory,
    "tasks": checks.other_tasks,
}
LOG = "log.txt"
STOPPED = 3  # exit code of a process whose GPU may be in an error that stays


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and tests, in 2 minutes")
    parser.add_argument("--device", default="cuda", metavar="TEXT", help="cuda, cuda:1 or cpu (default: cuda)")
    parser.add_argument("--output", default="runs/gpu_check", metavar="DIR", help="(default: runs/gpu_check)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these checks only")
    parser.add_argument("--minutes", type=float, metavar="X", help="stop after so long (default: 8; with --quick 2)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(hyphens(None))
    if args.minutes is None:
        args.minutes = 2.0 if args.quick else 8.0
    return args


def main(args: argparse.Namespace) -> None:
    output = Path(args.output).resolve()
    if args.child:
        sys.exit(STOPPED if run_checks(args.child, checks.Setting(output, args.device, args.quick)) else 0)
    if unknown := sorted(set(args.only or ()) - set(CHECKS)):
        raise UserError(f"there is no check {unknown[0]}; there are {', '.join(CHECKS)}")
    need_device(args.device)
    clear(output)
    began = time.monotonic()
    chosen = [name for name in CHECKS if args.only is None or name in args.only]
    print(f"checks: {', '.join(chosen)}; their output goes to {output}/log.txt", flush=True)
    found: list[dict[str, Any]] = []
    try:
        while remaining := chosen[len(found) :]:
            left = began + 60 * args.minutes - time.monotonic()
            if left <= 0:
                found += [{"check": name, "result": "no time", "seconds": 0.0} for name in remaining]
            else:
                follow(start(args, remaining, output), found, remaining, output, left)
    finally:  # of Ctrl-C too
        report(args, found, time.monotonic() - began, output)
    sys.exit(any(line["result"] in ("FAIL", "no time") for line in found))


def need_device(asked: str) -> None:
    """Raise `UserError` where torch does not see the device asked for. No context is made on it."""
    import torch

    if asked == "cpu":
        return
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise UserError(f"torch sees no GPU (torch {torch.__version__} {built}); --device cpu checks what needs none")
    number = asked.removeprefix("cuda").removeprefix(":") or "0"
    if not asked.startswith("cuda") or not number.isdecimal() or int(number) >= torch.cuda.device_count():
        raise UserError(f"--device {asked}: give cpu, cuda or cuda:1; {torch.cuda.device_count()} GPUs are seen")


def clear(output: Path) -> None:
    """Remove what an earlier check left in `output`. Raises `UserError` for a folder of something else."""
    if output.exists() and any(output.iterdir()) and not (output / LOG).exists():
        raise UserError(f"--output {output} has other files in it: give a new folder, or one of an earlier check")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)


# ---- the checks, in a process of their own ----


def run_checks(names: list[str], setting: checks.Setting) -> bool:
    """Run the checks and write a line of checks.jsonl for each; whether it stopped because the GPU may no longer be sound."""
    for name in names:
        began, broken = time.monotonic(), False
        line: dict[str, Any] = {"check": name, "result": "pass"}
        print(f"\n==== {name} ====", flush=True)
        try:
            line["figures"] = CHECKS[name](setting)
            line["summary"] = line["figures"].pop("summary")
        except checks.Skipped as why:
            line["result"] = str(why)
        except Exception as error:
            traceback.print_exc()
            line |= {"result": "FAIL", "summary": f"{type(error).__name__}: {first_line(error)}"}
            broken = "CUDA" in str(error)
        line["gpu"] = checks.gpu(setting) if not broken else {}
        with (setting.output / "checks.jsonl").open("a") as file:
            file.write(json.dumps(line | {"seconds": time.monotonic() - began}) + "\n")
        if broken:
            return True
    return False


# ---- following that process ----


def start(args: argparse.Namespace, names: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", *names, "--output", str(output), "--device", args.device]
    with (output / LOG).open("ab") as log:
        return subprocess.Popen(command + ["--quick"] * args.quick, stdout=log, stderr=log, start_new_session=True)


def follow(child: subprocess.Popen, found: list[dict], remaining: list[str], output: Path, left: float) -> None:
    """Print each check of a process as it ends, and add it to those found; also the one that the process died in."""
    lines, before = output / "checks.jsonl", len(found)
    began = time.monotonic()
    end = began + left
    try:
        while True:
            running = child.poll() is None and time.monotonic() < end
            written = lines.read_text().splitlines() if lines.exists() else []
            for line in map(json.loads, written[len(found) :]):
                show(line)
                found.append(line)
                began = time.monotonic()
            if not running:
                break
            time.sleep(0.1)
    finally:
        late = child.poll() is None
        if late:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if len(found) < before + len(remaining) and (late or child.returncode != STOPPED):
        result, why = ("no time", "ended at the limit") if late else ("FAIL", f"its process ended with {child.returncode}")
        line = {"check": remaining[len(found) - before], "result": result, "seconds": time.monotonic() - began, "summary": why}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        show(line)
        found.append(line)


def show(line: dict[str, Any]) -> None:
    print(f"{line['check']:10} {line['result']:9} {line['seconds']:6.1f} s  {line.get('summary', '')}".rstrip(), flush=True)


def report(args: argparse.Namespace, found: list[dict[str, Any]], seconds: float, output: Path) -> None:
    """The table, every figure under it, and the same as JSON."""
    print()
    for line in found:
        show(line)
        for name, value in line.get("figures", {}).items():
            text = ", ".join(value) if isinstance(value, list) else f"{value:,.4g}" if isinstance(value, float) else str(value)
            print(f"{'':10} {name}: {text}")
    machine = {"python": platform.python_version(), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {name: version(name) for name in ("torch", "transformers")} | next((x["gpu"] for x in found if x.get("gpu")), {})
    arguments = {key: value for key, value in vars(args).items() if key != "child"}
    write_json(output / "gpu_check.json", {"machine": machine, "arguments": arguments, "seconds": seconds, "checks": found})
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{seconds:.0f} s in all; {output}/gpu_check.json")


if __name__ == "__main__":
    run_command(main, parse())
