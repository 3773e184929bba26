"""The checks of gpu_check.py: each takes the `Setting` and returns its figures, or raises an error, which is a failure."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "vocab_size": 10_000}
Figures = dict[str, Any]


class NeedsGpu(Exception):
    """A check that says nothing on a CPU."""


@dataclass(frozen=True)
class Setting:
    """Where checks run, on what, and how thoroughly."""

    output: Path
    asked: str
    quick: bool

    @cached_property
    def device(self) -> Any:
        from bert_tickets.device import prepare_device

        return prepare_device(self.asked)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def need_gpu(self) -> None:
        if not self.on_gpu:
            raise NeedsGpu

    def count(self, thorough: int, quick: int, cpu: int) -> int:
        """How many of something: on a GPU, there with --quick, on a CPU."""
        return cpu if not self.on_gpu else quick if self.quick else thorough

    @cached_property
    def model(self) -> Path:
        """A BERT-base of random weights; on a CPU a small BERT."""
        import generated

        folder = self.output / "model"
        if not (folder / "config.json").exists():
            generated.save_bert(folder, **{} if self.on_gpu else SMALL)
        return folder

    @cached_property
    def data(self) -> Path:
        """Generated MNLI, SQuAD and plain text."""
        import generated

        folder = self.output / "data"
        if not (folder / "en.valid").exists():
            generated.save_mnli(folder, self.count(4096, 2048, 512), self.count(256, 256, 32))
            generated.save_squad(folder, self.count(200, 200, 40), 20)
            generated.save_text(folder, self.count(200_000, 200_000, 20_000), self.count(20_000, 20_000, 2_000))
        return folder

    def case(self, precision: str, batches: int) -> Any:
        """Batches of random tokens with MNLI's lengths, and a network of which half of the weights are pruned."""
        import loops

        size = self.count(32, 32, 8)
        given = {"model": str(self.model), "precision": precision, "device": self.asked, "batch_size": size}
        return loops.prepare("mnli", given | {"limit_train": size * batches}, 0.5)


def run_checks(names: list[str], setting: Setting) -> bool:
    """Run the checks, and write a line of checks.jsonl for each; whether it stopped because the GPU may no longer be sound."""
    for name in names:
        began, broken = time.monotonic(), False
        line: dict[str, Any] = {"check": name, "result": "pass"}
        print(f"\n==== {name} ====", flush=True)
        try:
            figures = CHECKS[name](setting)
            line |= {"says": figures.pop("says", ""), "figures": figures}
        except NeedsGpu:
            line |= {"result": "no GPU"}
        except Exception as error:
            traceback.print_exc()
            line |= {
                "result": "FAIL",
                "why": f"{type(error).__name__}: {(str(error).strip() or 'see the log').splitlines()[0][:200]}",
            }
            broken = "CUDA" in str(error)
        with contextlib.suppress(Exception):
            line["gpu"] = gpu(setting)
        with (setting.output / "checks.jsonl").open("a") as file:
            file.write(json.dumps(line | {"seconds": time.monotonic() - began}) + "\n")
        if broken:
            return True
    return False


def gpu(setting: Setting) -> dict[str, Any]:
    import torch

    if not setting.on_gpu:
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
    from bert_tickets import UserError
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
    levels = f"--task mnli --levels 3 --max-steps {steps} --save-steps {steps // 3}"
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
    return {"says": f"{len(first)} files equal", "seconds of the whole run": seconds, "steps a level": steps}


def own_tests(setting: Setting) -> Figures:
    """The package's tests that need a GPU."""
    setting.need_gpu()
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text(encoding="utf-8")]
    words = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", *files]
    said = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
    print(said, flush=True)
    passed, failed = (int(found[1]) if (found := re.search(rf"(\d+) {word}", said)) else 0 for word in ("passed", "failed"))
    assert passed, "no test passed"
    assert not failed, f"{failed} of {passed + failed} tests failed"
    return {"says": f"{passed} passed"}


# ---- steps, in this process ----


@contextlib.contextmanager
def no_waiting(setting: Setting) -> Iterator[None]:
    """Within it, torch raises an error where the host waits for the GPU."""
    import torch

    if not setting.on_gpu:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def take(case: Any, steps: int, setting: Setting, recorder: Any = None, eager: bool = False) -> tuple[Any, Any, Any]:
    """Steps of a copy of the network: the `Step`, its losses, and what they end in."""
    import loops
    import torch

    step, loop = loops.step_and_loop(case, recorder=recorder)
    if eager:
        step.graphs = None  # all else is as with graphs: the same shapes, and a learning rate on the device
    losses = []
    for i in range(steps):
        torch.manual_seed(i)
        with no_waiting(setting) if i and recorder is None else contextlib.nullcontext():
            losses.append(loop(i))
    return step, torch.stack(losses), {name: p.detach() for name, p in step.params.items()}


def equal_steps(setting: Setting) -> Figures:
    """In each precision steps never wait, equal steps give equal bits, and pruned weights stay zero."""
    import torch

    steps = setting.count(50, 20, 4)
    for precision in ("fp16", "bf16", "fp32"):
        case = setting.case(precision, steps)
        (_, losses, weights), (_, again, same) = (take(case, steps, setting) for _ in range(2))
        assert losses.isfinite().all(), f"{precision}: a loss is not finite"
        assert torch.equal(losses, again), f"{precision}: the same steps gave other losses"
        assert all(torch.equal(p, same[name]) for name, p in weights.items()), f"{precision}: the same steps gave other weights"
        for name, kept in case.mask.items():
            assert not weights[name][~kept.to(setting.device)].count_nonzero(), f"{precision}: pruned weights of {name} moved"
    return {"says": f"{steps} steps in fp16, bf16, fp32, twice"}


def graphs(setting: Setting) -> Figures:
    """Steps by CUDA graphs end in the bits of eager ones of the same shapes, and none is refused."""
    import torch

    from bert_tickets.graphs import Recorder

    setting.need_gpu()
    steps, case = setting.count(200, 60, 9), setting.case("fp16", setting.count(60, 30, 3))
    began = time.monotonic()
    step, losses, weights = take(case, steps, setting, Recorder(required=True))
    seconds, captured = time.monotonic() - began, len(step.graphs._captured)
    _, eager, same = take(case, steps, setting, Recorder(required=True), eager=True)
    assert torch.equal(losses, eager), f"step {int((losses != eager).nonzero()[0])} by graphs has another loss"
    assert all(torch.equal(p, same[name]) for name, p in weights.items()), "steps by graphs end in other weights"
    return {"says": f"{steps} steps, {captured} graphs", "seconds of these steps, captures included": seconds}


def speed(setting: Setting) -> Figures:
    """Steps a second, eager, by graphs and as the released loop, on MNLI's lengths."""
    import clock
    import loops

    turns, turn_steps = setting.count(5, 3, 2), setting.count(10, 6, 2)
    case = setting.case("auto", turn_steps * (turns + 1))
    sides = {"eager": loops.ours(case), "released": loops.released(case)}
    if setting.on_gpu and not setting.quick:
        sides["graphs"] = loops.with_graphs(case)
    seconds = clock.take_turns(sides, turns, turn_steps, setting.device)
    rate = clock.machine_rate(case.precision, setting.device)
    tokens = float(case.store.lengths.mean()) * case.cfg.train.batch_size
    flops = clock.arithmetic(case.net, case.store.lengths) / len(case.store) * case.cfg.train.batch_size
    figures: Figures = {"GEMM TFLOP/s": rate / 1e12}
    for side, each in seconds.items():
        figures |= {f"{side}: steps/s": 1 / each, f"{side}: real tokens/s": tokens / each}
        figures |= {f"{side}: % of the GEMM rate": 100 * flops / each / rate}
        if setting.on_gpu:
            found = clock.kernels_of(sides[side], turn_steps, setting.device)
            figures |= {f"{side}: kernels a step": found.count, f"{side}: GPU busy, %": 100 * found.seconds / each}
            figures[f"{side}: attention kernels"] = [name[:80] for name in found.of("attention", "fmha", "flash", "softmax")]
    best = min(each for side, each in seconds.items() if side != "released")
    return {"says": f"{seconds['released'] / best:.1f} times the released loop, {1 / best:.1f} steps/s"} | figures


def masks(setting: Setting) -> Figures:
    """Masks chosen on the GPU are the CPU's, over two levels."""
    setting.need_gpu()
    from bert_tickets.mask import Mask
    from bert_tickets.models import load_bert, prunable
    from bert_tickets.prune import magnitude, prune

    net, _ = load_bert(str(setting.model), "classifier", "pretrained", 0)
    here = {name: p.detach() for name, p in prunable(net).items()}
    there = {name: p.to(setting.device) for name, p in here.items()}
    for scope in ("global", "tensor"):
        found, expected = (prune(prune(Mask.ones(w), magnitude(w), 0.1, scope), magnitude(w), 0.5, scope) for w in (there, here))
        assert found.to("cpu") == expected, f"--scope {scope}: another mask"
    return {"says": f"{expected.total:,} weights"}


def gradients(setting: Setting) -> Figures:
    """Gradients in fp32 are the CPU's to 1e-5, TF32 being off."""
    setting.need_gpu()
    import torch

    case = setting.case("fp32", 1)
    for module in case.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    nets = {"cuda": case.net, "cpu": copy.deepcopy(case.net).to("cpu")}
    batch, found = case.store.batch(torch.arange(8)), {}
    for place, net in nets.items():
        tensors = {name: x.to(place) for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
        case.task.loss(net, replace(batch, **tensors)).backward()
        found[place] = {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}
    worst = max((grad - found["cpu"][name]).abs().max().item() for name, grad in found["cuda"].items())
    assert worst <= 1e-5, f"gradients differ by {worst:.1e}"
    return {"says": f"at most {worst:.1e} apart", "largest gradient": max(g.abs().max().item() for g in found["cpu"].values())}


class Keeper:
    """A level that keeps nothing (`bert_tickets.train.Keeper`)."""

    title, stop_requested = "limited memory", False
    note: Mapping[str, float | None] = {}

    def load_checkpoint(self) -> None:
        return None

    def save_checkpoint(self, tensors: Any, facts: Any) -> None: ...
    def stopped(self, step: int) -> None: ...
    def divided(self, step: int, parts: int) -> None:
        print(f"out of memory in step {step}: {parts} parts", flush=True)


def memory(setting: Setting) -> Figures:
    """Where the GPU's memory runs out, batches are taken in parts, and the run goes on."""
    setting.need_gpu()
    import torch

    from bert_tickets.batches import Batches
    from bert_tickets.models import prunable
    from bert_tickets.train import train

    case = setting.case("fp16", 8)
    case.mask.apply(prunable(case.net))

    def train_by(batch_size: int) -> Any:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cfg = replace(case.cfg.train, batch_size=batch_size, max_steps=3, log_every=1)
        net = copy.deepcopy(case.net)
        batches = Batches(case.store, batch_size, 0)
        return train(lambda b: case.task.loss(net, b), dict(net.named_parameters()), batches, cfg, Keeper(), mask=case.mask)

    reserved = []
    for batch_size in (16, 256):
        train_by(batch_size)
        reserved.append(torch.cuda.max_memory_reserved())
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction(sum(reserved) / 2 / total)
    try:
        result = train_by(256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.divided > 1, "memory was limited, and no batch was taken in parts"
    return {"says": f"256 examples in {result.divided} parts", "GiB limit": sum(reserved) / 2 / 2**30}


def other_tasks(setting: Setting) -> Figures:
    """SQuAD and masked language modelling: five steps, the evaluation, the level's files."""
    sys.path.insert(0, str(ROOT))
    import lt_pretrain
    import lt_squad
    from bert_tickets.command import parse

    figures: Figures = {}
    for script, preset, small in (
        (lt_squad, "squad", "--max-length 96 --doc-stride 16 --batch-size 4"),
        (lt_pretrain, "mlm", "--max-length 96 --batch-size 4"),
    ):
        began = time.monotonic()
        words = f"--levels 1 --max-steps 5 --limit-eval 16 {'' if setting.on_gpu else small}".split()
        script.main(parse(preset, None, [*words, *given(setting), "--output-dir", str(setting.output / preset)]))
        figures[f"{preset}: seconds"] = time.monotonic() - began
    return {"says": "five steps each", **figures}


CHECKS: dict[str, Callable[[Setting], Figures]] = {
    "run": whole_run,
    "tests": own_tests,
    "steps": equal_steps,
    "graphs": graphs,
    "speed": speed,
    "masks": masks,
    "gradients": gradients,
    "memory": memory,
    "tasks": other_tasks,
}
