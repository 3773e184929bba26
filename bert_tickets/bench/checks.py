"""The setting of gpu_check.py's checks, and the checks of whole runs.

A check takes the `Setting` and returns its figures, among them the table's line as `summary`. An error that it raises is a
failure; `Skipped` is none.
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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "vocab_size": 10_000}
Figures = dict[str, Any]


class Skipped(Exception):
    """A check that says nothing here; the message says why, in two words."""


@dataclass(frozen=True)
class Setting:
    """Where checks run, on what, and how thoroughly."""

    output: Path
    asked: str
    quick: bool

    @cached_property
    def device(self) -> Any:
        from bert_tickets.training.device import prepare_device

        return prepare_device(self.asked)

    @property
    def on_gpu(self) -> bool:
        """Without asking CUDA: a GPU may be of one process alone, and the first checks start processes of their own."""
        return self.asked != "cpu"

    def need_gpu(self) -> None:
        if not self.on_gpu:
            raise Skipped("no GPU")

    def count(self, thorough: int, quick: int, cpu: int) -> int:
        """How many of something: on a GPU, there with --quick, on a CPU."""
        return cpu if not self.on_gpu else quick if self.quick else thorough

    @cached_property
    def model(self) -> Path:
        """A BERT-base of random weights; on a CPU a small BERT."""
        from bert_tickets.bench import tiny_bert as generated

        folder = self.output / "model"
        if not (folder / "config.json").exists():
            generated.save_bert(folder, **{} if self.on_gpu else SMALL)
        return folder

    @cached_property
    def data(self) -> Path:
        """Generated MNLI, SQuAD and plain text."""
        from bert_tickets.bench import tiny_bert as generated

        folder = self.output / "data"
        if not (folder / "en.valid").exists():
            generated.save_mnli(folder, self.count(4096, 2048, 512), self.count(256, 256, 32))
            generated.save_squad(folder, self.count(200, 200, 40), 20)
            generated.save_text(folder, self.count(200_000, 200_000, 20_000), self.count(20_000, 20_000, 2_000))
        return folder

    def case(self, precision: str, batches: int) -> Any:
        """Batches of random tokens with MNLI's lengths, and a network of which half of the weights are pruned."""
        from bert_tickets.bench import baselines as loops

        size = self.count(32, 32, 8)
        given = {"model": str(self.model), "precision": precision, "device": self.asked, "batch_size": size}
        return loops.prepare("mnli", given | {"limit_train": size * batches}, 0.5)


def gpu(setting: Setting) -> Figures:
    """The GPU, once one of the checks uses it in this process."""
    import torch

    if not torch.cuda.is_initialized():
        return {}
    found = torch.cuda.get_device_properties(setting.device)
    facts = {"gpu": found.name, "GiB": round(found.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    return facts


# ---- whole runs, in processes of their own ----


def given(setting: Setting) -> list[str]:
    return ["--model", str(setting.model), "--data-dir", str(setting.data), "--device", setting.asked]


def call(words: list[str], folder: Path) -> str:
    """Run a command in a folder; its output."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    assert done.returncode == 0, f"{' '.join(words[1:4])} ended with {done.returncode}"
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """All files of runs but when and where they ran."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if path.name not in ("log.jsonl", "lock")}


def kill_in_level_1(words: list[str], folder: Path) -> None:
    """Start a run, and kill it when it has saved a checkpoint in level 1."""
    from bert_tickets.errors import UserError
    from bert_tickets.files import read_facts

    folder.mkdir(parents=True)
    with subprocess.Popen(words, cwd=folder) as process:
        try:
            while process.poll() is None:
                for checkpoint in folder.glob("runs/*/checkpoint.safetensors"):
                    with contextlib.suppress(UserError, OSError):  # it may be on its way
                        if read_facts(checkpoint)["level"] == 1:
                            process.send_signal(signal.SIGKILL)
                            process.wait()
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def whole_run(setting: Setting) -> Figures:
    """The default run of three levels equals, file for file, one that is killed in level 1 and goes on."""
    steps = setting.count(60, 20, 6)
    levels = f"--task mnli --levels 3 --max-steps {steps} --save-steps {steps // 2 + 1}"
    words = [sys.executable, str(ROOT / "lt_glue.py"), *levels.split(), *given(setting)]
    whole, killed = setting.output / "whole", setting.output / "killed"
    began = time.monotonic()
    call(words, whole)
    seconds = time.monotonic() - began
    kill_in_level_1(words, killed)
    said = call(words, killed)
    assert "level 1/2" in said, "nothing was left to do after the kill"
    first, second = contents(whole), contents(killed)
    assert first.keys() == second.keys(), f"other files: {sorted(first.keys() ^ second.keys())}"
    differ = [name for name in first if first[name] != second[name]]
    assert not differ, f"other bits after the kill: {', '.join(differ)}"
    return {"summary": f"{len(first)} files equal", "seconds of the whole run": seconds, "steps a level": steps}


def own_tests(setting: Setting) -> Figures:
    """The package's tests that need a GPU; with --quick the whole runs in fp16 alone of those of the CUDA path."""
    setting.need_gpu()
    if not all(find_spec(name) for name in ("pytest", "hypothesis")):
        raise Skipped("no pytest")
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text(encoding="utf-8")]
    words = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", *files]
    words += ["-k", "not cuda_path or (whole_run and fp16)"] * setting.quick
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, last
    return {"summary": last}


def other_tasks(setting: Setting) -> Figures:
    """SQuAD and masked language modelling: five steps, the evaluation, the level's files."""
    sys.path.insert(0, str(ROOT))
    import lt_pretrain
    import lt_squad
    from bert_tickets.cli import parse

    figures: Figures = {}
    for script, preset, small in (
        (lt_squad, "squad", "--max-length 96 --doc-stride 16 --batch-size 4"),
        (lt_pretrain, "mlm", "--max-length 96 --batch-size 4"),
    ):
        began = time.monotonic()
        words = f"--levels 1 --max-steps 5 --limit-eval 16 {'' if setting.on_gpu else small}".split()
        script.main(parse(preset, None, [*words, *given(setting), "--output-dir", str(setting.output / preset)]))
        figures[f"{preset}: seconds"] = time.monotonic() - began
    return {"summary": "five steps each", **figures}
