"""Measure training on this machine, ours beside the released loop, in one run; ratios are what to quote.

  python scripts/bench.py --model DIR --data-dir glue --tasks cola sst2 mnli rte
  python scripts/bench.py --model DIR --data-dir glue --tasks cola rte --levers    # each lever off in turn: its share
  python scripts/bench.py --model DIR --data-dir glue --tasks mnli --profile       # where a step's time goes
  python scripts/bench.py --model DIR --data-dir glue --level                      # what a level costs beside its steps
  python scripts/bench.py --model bert-base-uncased --tasks mnli --precision fp16 --json bench.json
  python scripts/bench.py --model random --tasks mlm --batch-size 16 --max-length 512   # BERT-base of random weights
  python scripts/bench.py --count --tasks mnli             # kernels and memory traffic of a step on a GPU; needs none

The released loop is modelled faithfully (loops.py). All loops train the same network at the same sparsity on the same
examples, in turns of a few steps, so that a change of the machine's speed meets each; a figure is the median of the turns.
Arithmetic is counted on real tokens only, and as a share of the machine's own rate on large matrix products, measured
between the turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from bert_tickets.cli import hyphens, run_command
from bert_tickets.config import Config, preset_values, tasks
from bert_tickets.errors import UserError
from bert_tickets.files import write_json

ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "mnli", "rte"], metavar="TASK")
    models = f"a BERT checkpoint, or random (default: {Config.model}; with --count random)"
    parser.add_argument("--model", metavar="TEXT", help=models)
    parser.add_argument("--data-dir", metavar="DIR", help="real texts in GLUE's layout; otherwise lengths are drawn")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--max-length", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="X", help="of both networks (default: 0.5)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="turns of each loop (default: 5)")
    parser.add_argument("--turn-steps", type=int, default=4, metavar="N", help="steps a turn (default: 4)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp16", "bf16", "fp32"), help="(default: auto)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="(default: auto)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--levers", action="store_true", help="measure ours with each lever off, and nothing else")
    instead.add_argument("--profile", action="store_true", help="show where a step's time goes, and nothing else")
    instead.add_argument("--count", action="store_true", help="count a step's kernels and bytes on a GPU by kind; needs none")
    instead.add_argument("--level", action="store_true", help="measure what a level costs beside its steps, and nothing else")
    instead.add_argument("--alone", choices=("ours", "released"), help="run this loop alone: its time and peak memory")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(hyphens(None))
    if args.count and args.device != "auto":
        parser.error("--device has no effect with --count, which takes a GPU, or pretends that there is one")
    args.model = args.model or ("random" if args.count else Config.model)
    for name in ("turns", "turn_steps", "batch_size", "max_length"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if not 0 <= args.sparsity < 1:
        parser.error(f"--sparsity {args.sparsity}: a share from 0 to below 1 is needed")
    return args


def prepare(name: str, args: argparse.Namespace) -> Any:
    from bert_tickets.bench import baselines as loops

    ready = (*loops.LENGTHS, *loops.WHOLE)
    if name not in (*tasks("glue"), *ready) or (args.data_dir is None and name not in ready):
        raise UserError(f"no lengths for {name!r}: give --data-dir, or tasks of {', '.join(ready)}")
    fields = ("model", "data_dir", "batch_size", "max_length", "precision", "device")
    given = {field: getattr(args, field) for field in fields}
    batch_size = args.batch_size or preset_values(name if name in loops.WHOLE else "glue", "paper")["batch_size"]
    return loops.prepare(name, given | {"limit_train": batch_size * args.turn_steps * (args.turns + 1)}, args.sparsity)


# ---- the reports ----


def measure_task(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Ours, dense and masked, beside the released loop on one task."""
    from bert_tickets.bench import baselines as loops
    from bert_tickets.bench import timing as clock

    case = prepare(name, args)
    on_gpu = case.device.type == "cuda"
    best = "graphs" if on_gpu else "ours"
    ours = {"eager": loops.ours, "graphs": loops.with_graphs} if on_gpu else {"ours": loops.ours}
    sides, memory = {}, {}
    for side, build in {**ours, "released": loops.released}.items():
        sides[side], memory[side] = clock.built(partial(build, case), case.device)
        if not on_gpu:
            memory[side] = measure_alone(name, side, args)["peak memory, MiB"]
    sides["dense"] = ours[best](loops.dense(case))
    rates = [clock.machine_rate(case.precision, case.device)]
    seconds = clock.take_turns(sides, args.turns, args.turn_steps, case.device)
    rates.append(clock.machine_rate(case.precision, case.device))
    rate = statistics.mean(rates)
    batch_size = case.cfg.train.batch_size
    tokens, padded = float(case.store.lengths.mean()) * batch_size, batch_size * case.cfg.max_length
    predicted = 0.15 * (case.store.lengths - 2).sum() if name == "mlm" else 0.0
    flops = clock.arithmetic(case.net, case.store.lengths, predicted) / len(case.store) * batch_size
    figures = {"real tokens a step": tokens, "padded tokens a step": padded, "machine TFLOP/s": rate / 1e12}
    for side in memory:
        figures |= {f"{side}: steps/s": 1 / seconds[side], f"{side}: real tokens/s": tokens / seconds[side]}
        figures |= {f"{side}: % of the machine's rate": 100 * flops / seconds[side] / rate}
        if on_gpu:
            found = clock.kernels_of(sides[side], args.turn_steps, case.device)
            figures |= {f"{side}: kernels a step": found.count, f"{side}: GPU busy, %": 100 * found.seconds / seconds[side]}
        figures[f"{side}: peak memory, MiB"] = memory[side]
    figures |= {f"released over {side}, times": seconds["released"] / seconds[side] for side in memory if side != "released"}
    masking = clock.masking_seconds(case.mask, case.device)
    return figures | {
        "released padded tokens/s": padded / seconds["released"],
        "masked over dense, %": 100 * (seconds[best] / seconds["dense"] - 1),
        "masking alone, %": 100 * masking / seconds[best],
    }


def measure_alone(name: str, side: str, args: argparse.Namespace, **environment: str) -> dict[str, float]:
    """One loop in a process of its own, which says its time and peak memory."""
    command = [sys.executable, __file__, "--alone", side, "--tasks", name]
    for field in ("model", "data_dir", "batch_size", "max_length", "sparsity", "turns", "turn_steps", "precision", "device"):
        if getattr(args, field) is not None:
            command += ["--" + field.replace("_", "-"), str(getattr(args, field))]
    return json.loads(_output(command, **environment).splitlines()[-1])


def alone(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step, and MiB at most in use by this process (on CUDA, of the GPU's memory)."""
    import torch

    from bert_tickets.bench import baselines as loops
    from bert_tickets.bench import timing as clock

    case = prepare(args.tasks[0], args)
    seconds = clock.take_turns({args.alone: getattr(loops, args.alone)(case)}, args.turns, args.turn_steps, case.device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if (status := Path("/proc/self/status")).exists():  # on Linux the other starts with the parent's peak
        used = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    if case.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(case.device)
    return {"a step, ms": 1000 * seconds[args.alone], "peak memory, MiB": used / 2**20}


def measure_levers(name: str, args: argparse.Namespace) -> dict[str, float]:
    """How much longer a step takes with each lever off, %."""
    from bert_tickets.bench import baselines as loops
    from bert_tickets.bench import timing as clock

    case = prepare(name, args)
    sides = {"all on": loops.ours(case)} | {lever: build(case) for lever, build in loops.LEVERS.items()}
    seconds = clock.take_turns(sides, args.turns, args.turn_steps, case.device)
    on = seconds.pop("all on")
    figures = {"all on, ms": 1000 * on} | {f"{lever}, %": 100 * (value / on - 1) for lever, value in seconds.items()}
    if case.device.type == "cpu":  # glibc's default cannot be had back in a process that left it
        kept, returned = (
            measure_alone(name, "ours", args, **variables)["a step, ms"] for variables in ({}, {"MALLOC_PERTURB_": "0"})
        )
        figures["freed memory kept, %"] = 100 * (returned / kept - 1)
    return figures


def profile(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of the costliest kernels, by graphs; on a CPU of the costliest operations, by their own time."""
    import torch

    from bert_tickets.bench import baselines as loops
    from bert_tickets.bench import timing as clock

    case = prepare(name, args)
    on_gpu = case.device.type == "cuda"
    loop = loops.with_graphs(case) if on_gpu else loops.ours(case)
    figures = {"a step, ms": 1000 * clock.take_turns({"": loop}, args.turns, args.turn_steps, case.device)[""]}
    own: dict[str, float] = defaultdict(float)
    if on_gpu:
        for kernel, seconds in clock.kernels_of(loop, args.turn_steps, case.device).names.items():
            own[clock.short(kernel)] += 1000 * seconds
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for i in range(args.turn_steps):
                loop(i)
        own.update({event.key: event.self_cpu_time_total / 1000 / args.turn_steps for event in found.key_averages()})
    return figures | dict(sorted(own.items(), key=lambda item: -item[1])[:24])


def measure_level(model: str) -> dict[str, float]:
    """What a level costs beside its training: choosing the mask, writing it, writing a checkpoint. Medians of three."""
    from bert_tickets.config import Training
    from bert_tickets.files import write_tensors
    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.prune import magnitude, prune
    from bert_tickets.modeling.loading import load_bert
    from bert_tickets.modeling.parameters import prunable

    net, _ = load_bert(model, "classifier", "pretrained", Training.seed)
    weights = prunable(net)
    params = dict(net.named_parameters())  # and AdamW's two moments of each
    state = {f"{part}/{name}": p.detach().clone() for part in ("param", "exp_avg", "exp_avg_sq") for name, p in params.items()}
    costs: list[tuple[float, float, float]] = []
    for _ in range(3):
        began = time.perf_counter()
        mask = prune(Mask.ones(weights), magnitude(weights), 0.1)
        chosen = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            mask.write(path := Path(folder) / "mask.safetensors")
            written, size = time.perf_counter(), path.stat().st_size
            write_tensors(Path(folder) / "checkpoint.safetensors", state)
            costs.append((chosen - began, written - chosen, time.perf_counter() - written))
    names = ("choose the mask, s", "write the mask, s", "write a checkpoint, s")
    figures = {name: statistics.median(values) for name, values in zip(names, zip(*costs, strict=True), strict=True)}
    figures["together, s"] = statistics.median(map(sum, costs))
    return {"prunable weights": mask.total, "mask file, MB": size / 1e6} | figures


def measure_start(args: argparse.Namespace) -> float:
    """Seconds of a whole process that loads model and data, takes one step and writes its level."""
    if args.data_dir is None:
        return math.nan
    with tempfile.TemporaryDirectory() as folder:
        words = f"--levels 1 --max-steps 1 --limit-eval 8 --device {args.device} --output-dir {folder}"
        scripts = {"squad": "lt_squad.py", "mlm": "lt_pretrain.py"}
        words += "" if args.tasks[0] in scripts else f" --task {args.tasks[0]}"
        script = str(ROOT / scripts.get(args.tasks[0], "lt_glue.py"))
        command = [sys.executable, script, *words.split(), "--model", args.model, "--data-dir", args.data_dir]
        for extra in (["--seed", "1"], []):  # the first fills the cache of tokens
            began = time.perf_counter()
            _output(command + extra)
    return time.perf_counter() - began


def count(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Kernels and gigabytes of one step of ours, by kind (kernels.py); where there is no GPU, on a pretended one."""
    import torch

    from bert_tickets.bench import baselines as loops
    from bert_tickets.bench import fake_cuda as pretended
    from bert_tickets.bench import kernels

    real = torch.cuda.is_available()
    if not real and (why := pretended.why_not()):
        raise UserError(f"--count needs a GPU here: {why}")
    with contextlib.nullcontext() if real else pretended.one_gpu(numbers=False):
        return kernels.count_step(loops.ours(prepare(name, args)))


def _output(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"{command[1]} ended with {done.returncode}"])[-1])
    return done.stdout


def show(figures: dict[str, dict[str, float]]) -> None:
    """A column a task."""
    rows = list(dict.fromkeys(row for column in figures.values() for row in column))
    print(" " * 60, *(f"{task:>10}" for task in figures))
    for row in rows:
        print(f"{row[:60]:>60}", *(f"{column[row]:10.4g}" if row in column else " " * 10 for column in figures.values()))


def main(args: argparse.Namespace) -> None:
    import torch

    figures: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    if args.device != "cpu" and torch.cuda.is_available():
        figures["machine"] = torch.cuda.get_device_name()
    figures |= {"torch": torch.__version__, "arguments": dict(vars(args))}
    measure = count if args.count else measure_levers if args.levers else profile if args.profile else measure_task
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "random":
            from bert_tickets.bench import tiny_bert as generated

            args.model = folder
            generated.save_bert(Path(folder))
        if args.alone:
            print(json.dumps(alone(args)))
            return
        figures["tasks"] = {} if args.level else {name: measure(name, args) for name in args.tasks}
        if args.level:
            figures["level"] = measure_level(args.model) | {"one-step run from a warm cache, s": measure_start(args)}
        show(figures["tasks"] or {"": figures["level"]})
    print(f"{figures['machine']}, torch {figures['torch']}")
    if args.json:
        write_json(Path(args.json), json.loads(json.dumps(figures).replace("NaN", "null")))


if __name__ == "__main__":
    run_command(main, parse())
