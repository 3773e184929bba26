"""The checks of gpu_check.py that run whole commands, and the setting of all checks.

A check takes a `Setting` and returns figures, among them a `summary` for the table. Any error but `Skipped` is a failure.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.errors import UserError
from bert_tickets.files import read_facts

if TYPE_CHECKING:
    import torch

    from bert_tickets.bench.baselines import Case

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "vocab_size": 10_000}
MAY_DIFFER = ("log.jsonl", "train.jsonl", "lock", "lock.holder")  # when and where a run ran
Figures = dict[str, Any]


class Skipped(Exception):
    """A check that cannot run here; the message is the reason, in two words."""


@dataclass(frozen=True)
class Setting:
    """The output folder, the device and the thoroughness of all checks."""

    output: Path
    asked: str  # --device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is asked for. Does not start CUDA: a GPU may be exclusive, and some checks start other processes."""
        return self.asked != "cpu"

    @cached_property
    def device(self) -> torch.device:
        from bert_tickets.training.device import prepare_device

        return prepare_device(self.asked)

    def count(self, thorough: int, quick: int, cpu: int) -> int:
        """Select a number: on a GPU, on a GPU with --quick, on a CPU."""
        return cpu if not self.on_gpu else quick if self.quick else thorough

    @cached_property
    def model(self) -> Path:
        """A BERT-base with random weights; on a CPU a small BERT."""
        from bert_tickets.bench import tiny_bert

        folder = self.output / "model"
        if not (folder / "config.json").exists():
            tiny_bert.save_bert(folder, **{} if self.on_gpu else SMALL)
        return folder

    @cached_property
    def data(self) -> Path:
        """Generated MNLI, SQuAD and plain text."""
        from bert_tickets.bench import tiny_bert

        folder = self.output / "data"
        if not (folder / "en.valid").exists():
            tiny_bert.save_mnli(folder, self.count(4096, 2048, 512), self.count(256, 256, 32))
            tiny_bert.save_squad(folder, self.count(200, 200, 40), 20)
            tiny_bert.save_text(folder, self.count(200_000, 200_000, 20_000), self.count(20_000, 20_000, 2_000))
        return folder

    @property
    def flags(self) -> list[str]:
        """Model, data and device, for a training script."""
        return ["--model", str(self.model), "--data-dir", str(self.data), "--device", self.asked]

    def case(self, precision: str, batches: int) -> Case:
        """Make a network with half of its weights pruned, and `batches` batches of random tokens with MNLI's lengths."""
        from bert_tickets.bench.baselines import make_case

        size = self.count(32, 32, 8)
        given = {"model": str(self.model), "precision": precision, "device": self.asked, "batch_size": size}
        return make_case("mnli", given | {"limit_train": size * batches}, 0.5)


# ---- a run that is killed ----


def killed_run(setting: Setting) -> Figures:
    """Check that a run that is killed in level 1 and resumed has the same files as one that is not killed."""
    steps = setting.count(60, 20, 6)
    words = f"--task mnli --levels 3 --max-steps {steps} --save-steps {steps // 2 + 1}"
    command = [sys.executable, str(ROOT / "lt_glue.py"), *words.split(), *setting.flags]
    whole, killed = setting.output / "whole", setting.output / "killed"
    began = time.monotonic()
    call(command, whole)
    seconds = time.monotonic() - began
    kill_in_level_1(command, killed)
    assert "level 1/2" in call(command, killed), "nothing was left to do after the kill"
    first, second = contents(whole), contents(killed)
    differ = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    assert not differ, f"files differ after the kill: {', '.join(differ)}"
    return {"summary": f"{len(first)} files equal", "seconds of the whole run": seconds, "steps a level": steps}


def call(command: list[str], folder: Path) -> str:
    """Run a command in a folder; returns its output."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    assert done.returncode == 0, f"{' '.join(command[1:4])} ended with {done.returncode}"
    return done.stdout


def kill_in_level_1(command: list[str], folder: Path) -> None:
    """Start a run, and kill it when it has saved a checkpoint in level 1."""
    folder.mkdir(parents=True)
    with subprocess.Popen(command, cwd=folder) as process:
        try:
            while process.poll() is None:
                for checkpoint in folder.glob("runs/*/checkpoint.safetensors"):
                    with contextlib.suppress(UserError, OSError):  # it may be removed meanwhile
                        if read_facts(checkpoint)["level"] == 1:
                            process.send_signal(signal.SIGKILL)
                            process.wait()
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of the files, by name, that two equal runs must have in common."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in MAY_DIFFER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- other commands ----


def gpu_tests(setting: Setting) -> Figures:
    """Run the package's tests that need a GPU; with --quick, only the fp16 ones of whole runs."""
    if not all(find_spec(name) for name in ("pytest", "hypothesis")):
        raise Skipped("no pytest")
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", *files]
    command += ["-k", "not cuda_path or (whole_run and fp16)"] * setting.quick
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, last
    return {"summary": last}


def other_tasks(setting: Setting) -> Figures:
    """Run SQuAD and masked language modelling for five steps and an evaluation."""
    from bert_tickets.cli import parse
    from bert_tickets.methods.main import run

    figures: Figures = {}
    small = "--max-length 96 --batch-size 4" if not setting.on_gpu else ""
    for kind, own in (("squad", "--doc-stride 16" if small else ""), ("mlm", "")):
        began = time.monotonic()
        words = f"--levels 1 --max-steps 5 --limit-eval 16 {small} {own}".split()
        run(parse(kind, None, [*words, *setting.flags, "--output-dir", str(setting.output / kind)]))
        figures[f"{kind}: seconds"] = time.monotonic() - began
    return {"summary": "five steps each", **figures}
