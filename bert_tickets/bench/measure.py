"""What bench.py measures: sides in turns, the machine's GEMM rate, the FLOPs of a step, GPU kernels."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from bert_tickets.bench.baselines import OBJECTIVES, SIDES, Case, TrainStep, eager, graphs, mask_training, take_steps
from bert_tickets.bench.units import Removed, evaluation, executions, importance_pass
from bert_tickets.modeling.flops import TRAINING, forward_flops
from bert_tickets.tasks.mlm import MASK_RATE

Figures = dict[str, float]


def compare(case: Case, turns: int, steps: int) -> Figures:
    """Measure our step (eager; on a GPU also with graphs) and the released loop's."""
    device, on_gpu, batch_size = case.device, case.device.type == "cuda", case.cfg.train.batch_size
    names = [name for name in SIDES if name != "graphs" or on_gpu]
    built = {name: _with_memory(SIDES[name], case) for name in names}
    sides = {name: step for name, (step, _) in built.items()}
    before = gemm_rate(case.precision, device)
    seconds = time_in_turns(sides, turns, steps, device)
    rate = statistics.mean([before, gemm_rate(case.precision, device)])

    tokens, padded = float(case.store.lengths.mean()) * batch_size, batch_size * case.cfg.max_length
    flops = case_flops(case)
    figures = {"real tokens a step": tokens, "padded tokens a step": padded, "machine TFLOP/s": rate / 1e12}
    for name in names:
        each = seconds[name]
        figures |= {f"{name}: steps/s": 1 / each, f"{name}: real tokens/s": tokens / each}
        figures |= {f"{name}: padded tokens/s": padded / each, f"{name}: % of the machine's rate": 100 * flops / each / rate}
        if on_gpu:
            count, busy, _ = profile_kernels(sides[name], min(steps, 4), device)
            figures |= {f"{name}: kernels a step": count, f"{name}: GPU busy, %": 100 * busy / each}
            figures[f"{name}: memory reserved, MiB"] = built[name][1]
    return figures | {f"{name} over released, times": seconds["released"] / seconds[name] for name in names if name != "released"}


def compare_mask_training(case: Case, turns: int, steps: int) -> Figures:
    """Measure mask training by each objective, and training of the weights; on a GPU with graphs."""
    on_gpu = case.device.type == "cuda"
    builders = {"weights": graphs if on_gpu else eager} | {name: partial(mask_training, name) for name in OBJECTIVES}
    built = {name: _with_memory(build, case) for name, build in builders.items()}
    seconds = time_in_turns({name: step for name, (step, _) in built.items()}, turns, steps, case.device)
    figures = {f"{name}: steps/s": 1 / each for name, each in seconds.items()}
    if on_gpu:
        figures |= {f"{name}: memory reserved, MiB": memory for name, (_, memory) in built.items()}
    return figures | {f"{name} over weights, times as long": seconds[name] / seconds["weights"] for name in OBJECTIVES}


def compare_slim(removed: Removed, case: Case, turns: int, steps: int) -> Figures:
    """Measure training and evaluation of the full network, and without some heads and neurons, masked and removed.

    On a GPU with graphs, except for evaluation, as in a run.
    """
    build = graphs if case.device.type == "cuda" else eager
    cases = executions(case, removed)
    trained = time_in_turns({name: build(each) for name, each in cases.items()}, turns, steps, case.device)
    evaluated = time_in_turns({name: evaluation(each) for name, each in cases.items()}, turns, 1, case.device)
    figures = {f"{name}: steps/s": 1 / each for name, each in trained.items()}
    figures |= {f"{name}: examples evaluated/s": len(case.store) / each for name, each in evaluated.items()}
    figures |= {"slim over full, a step, times": trained["full"] / trained["slim"]}
    figures |= {"slim over full, evaluation, times": evaluated["full"] / evaluated["slim"]}
    return figures | {"full over slim, FLOPs, times": case_flops(cases["full"]) / case_flops(cases["slim"])}


def compare_importance(case: Case, turns: int, steps: int) -> Figures:
    """Measure an evaluation of all examples of the case, and a pass that also computes importances."""
    sides = {"evaluation": evaluation(case), "importance": importance_pass(case)}
    seconds = time_in_turns(sides, turns, 1, case.device)
    figures = {f"{name}: examples/s": len(case.store) / each for name, each in seconds.items()}
    return figures | {"importance over evaluation, times as long": seconds["importance"] / seconds["evaluation"]}


def profile(case: Case, turns: int, steps: int) -> Figures:
    """Measure the costliest kernels, or on a CPU the costliest operators without those they call, in ms per step."""
    on_gpu = case.device.type == "cuda"
    step = graphs(case) if on_gpu else eager(case)
    figures = {"a step, ms": 1000 * time_in_turns({"": step}, turns, steps, case.device)[""]}
    own: dict[str, float] = defaultdict(float)
    if on_gpu:
        for kernel, seconds in profile_kernels(step, steps, case.device)[2].items():
            own[short_name(kernel)] += 1000 * seconds
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as found:
            take_steps(step, range(steps))
        own.update({event.key: event.self_cpu_time_total / 1000 / steps for event in found.key_averages()})
    return figures | dict(sorted(own.items(), key=lambda item: -item[1])[:24])


# ---- time and memory ----


def time_in_turns(sides: Mapping[str, TrainStep], turns: int, steps: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds per step of each side.

    All sides take `steps` steps per turn, so that a change of the machine's speed affects all. The first of `turns` + 1 turns is
    a warm-up. Each turn begins with another side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(turns + 1):
        numbers = range(turn * steps, (turn + 1) * steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(seconds_of(device, take_steps, sides[name], numbers) / steps)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def seconds_of(device: torch.device, action: Callable[..., object], *arguments: Any) -> float:
    """Return the wall-clock seconds of `action(*arguments)`, with the device idle before and after."""
    _synchronize(device)
    began = time.perf_counter()
    action(*arguments)
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_memory(build: Callable[[Case], TrainStep], case: Case) -> tuple[TrainStep, float]:
    """Build a side and take three steps. Returns it with the peak of reserved GPU memory, in MiB (0 on a CPU)."""
    if case.device.type != "cuda":
        return build(case), 0.0
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    step = build(case)
    take_steps(step, range(3))
    return step, (torch.cuda.max_memory_reserved(case.device) - before) / 2**20


# ---- arithmetic ----


def gemm_rate(precision: str, device: torch.device) -> float:
    """Measure the FLOP/s of a large square matrix product in the precision of training."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = 30 if device.type == "cuda" and precision != "fp32" else 3

    def multiply(count: int) -> None:
        for _ in range(count):
            a @ b

    multiply(times // 3)
    return times * 2 * n**3 / seconds_of(device, multiply, times)


def case_flops(case: Case) -> float:
    """Return the FLOPs of a mean training step of a case."""
    lengths = case.store.lengths
    masked_tokens = MASK_RATE * (lengths - 2).sum() if case.task.name == "mlm" else 0.0
    return TRAINING * forward_flops(case.net, lengths, masked_tokens) / len(lengths) * case.cfg.train.batch_size


# ---- GPU kernels ----


def profile_kernels(step: TrainStep, steps: int, device: torch.device) -> tuple[float, float, dict[str, float]]:
    """Profile the GPU kernels of `steps` steps, copies and fills left out.

    Returns per step their number, the seconds in which any was running, and the seconds of each by name. Kernels of two streams
    may run at once: then each takes longer.
    """
    _synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as found:  # without acc_events torch 2.11 warns
        take_steps(step, range(steps))
        _synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    ranges = []
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            seconds[event.name] += event.time_range.elapsed_us() / 1e6 / steps
            ranges.append((event.time_range.start, event.time_range.end))
    return len(ranges) / steps, covered(ranges) / 1e6 / steps, seconds


def covered(ranges: list[tuple[float, float]]) -> float:
    """Return the length of the union of ranges, each (start, end)."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(ranges):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def short_name(kernel: str) -> str:
    """Return the first 60 characters of a kernel's name without its namespaces."""
    return re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", kernel)[:60]
