"""Check that the package works on this machine's GPU, and measure how fast: bash scripts/gpu_check.sh

No hub and no data are needed: the network is a BERT-base of random weights, and tasks and vocabulary are generated. The checks
run in the order of their worth, in processes of their own, and go on after a failure. At the end stands a table, with
gpu_check.json and the log beside it in --output; the exit code is 1 if a check failed.

  bash scripts/gpu_check.sh                        at most 8 minutes
  bash scripts/gpu_check.sh --quick                at most 2 minutes: fewer steps, and no graphs or released loop
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bert_tickets import UserError
from bert_tickets.command import hyphens, run_command
from bert_tickets.files import write_json

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 3  # exit code of a process whose GPU may be in an error that stays


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, in 2 minutes")
    parser.add_argument("--device", default="cuda", metavar="TEXT", help="cuda, cuda:1 or cpu (default: cuda)")
    parser.add_argument("--output", default="runs/gpu_check", metavar="DIR", help="(default: runs/gpu_check)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these checks only")
    parser.add_argument("--minutes", type=float, metavar="X", help="begin no check after so long (default: 8, or 2)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(hyphens(None))
    args.minutes = args.minutes or (2.0 if args.quick else 8.0)
    return args


def main(args: argparse.Namespace) -> None:
    from checks import CHECKS, Setting, run_checks

    output = Path(args.output).resolve()
    if args.child:
        sys.exit(STOPPED if run_checks(args.child, Setting(output, args.device, args.quick)) else 0)
    if unknown := sorted(set(args.only or ()) - set(CHECKS)):
        raise UserError(f"there is no check {unknown[0]}; there are {', '.join(CHECKS)}")
    need_device(args.device)
    began = time.monotonic()
    chosen = [name for name in CHECKS if args.only is None or name in args.only]
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    print(f"checks: {', '.join(chosen)}; what they print goes to {output}/log.txt", flush=True)
    found: list[dict[str, Any]] = []
    try:
        while ahead := chosen[len(found) :]:
            left = began + 60 * args.minutes - time.monotonic()
            if left <= 0:
                found += [{"check": name, "result": "no time", "seconds": 0.0} for name in ahead]
            else:
                follow(start(args, ahead, output), found, ahead, output, left)
    finally:  # of Ctrl-C too
        report(args, found, time.monotonic() - began, output)
    sys.exit(any(line["result"] == "FAIL" for line in found))


def need_device(asked: str) -> None:
    """Raise `UserError` where torch does not see the device asked for."""
    import torch

    from bert_tickets.device import prepare_device

    if asked != "cpu" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise UserError(f"torch sees no GPU (torch {torch.__version__} {built}); --device cpu checks what needs none")
    prepare_device(asked)


def start(args: argparse.Namespace, names: list[str], output: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", *names, "--output", str(output), "--device", args.device]
    with (output / "log.txt").open("ab") as log:
        return subprocess.Popen(command + ["--quick"] * args.quick, stdout=log, stderr=log, start_new_session=True)


def follow(child: subprocess.Popen, found: list[dict], ahead: list[str], output: Path, left: float) -> None:
    """Print each check of a process as it ends, and add it to those found; also the one that the process died in."""
    lines, before = output / "checks.jsonl", len(found)
    end = began = time.monotonic()
    end += left
    try:
        while True:
            running = child.poll() is None and time.monotonic() < end
            told = lines.read_text().splitlines() if lines.exists() else []
            for line in map(json.loads, told[len(found) :]):
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
    if len(found) < before + len(ahead) and (late or child.returncode != STOPPED):
        why = "out of time" if late else f"its process ended with {child.returncode}; see {output}/log.txt"
        line = {"check": ahead[len(found) - before], "result": "FAIL", "seconds": time.monotonic() - began, "why": why}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        show(line)
        found.append(line)


def show(line: dict[str, Any]) -> None:
    says = line.get("why") or line.get("says", "")
    print(f"{line['check']:10} {line['result']:8} {line['seconds']:6.1f} s  {says}".rstrip(), flush=True)


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
