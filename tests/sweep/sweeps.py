"""Run the sweeps in bash, and read the commands that they print."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def sweep(name: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def stub(folder: Path, script: str = "") -> str:
    """A Python interpreter that runs this bash script; it answers --dry-run at once, as the training scripts do."""
    path = folder / "python"
    dry_run = '[[ "$*" == *--dry-run ]] && echo "would run in runs/$(cksum <<< "$*" | tr " " -)" && exit'
    path.write_text(f"#!/usr/bin/env bash\n{dry_run}\n{script}\n")
    path.chmod(0o755)
    return str(path)


def printed(name: str, *flags: str, **variables: str) -> list[str]:
    found = sweep(name, "--dry-run", *flags, **variables)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def lines(name: str, folder: Path, **variables: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in printed(name, PYTHON=stub(folder), **variables)]


def flag(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None
