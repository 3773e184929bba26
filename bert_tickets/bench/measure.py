"""The measurements of bench.py: each returns figures by name."""

from __future__ import annotations

import gc
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from bert_tickets.bench.baselines import SIDES, Case, eager, graphs
from bert_tickets.bench.levers import LEVERS
from bert_tickets.bench.timing import (
    TrainStep,
    gemm_rate,
    masking_seconds,
    profile_kernels,
    short_name,
    step_flops,
    take_steps,
    time_in_turns,
)
from bert_tickets.config import Training
from bert_tickets.files import write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import prunable
from bert_tickets.tasks.mlm import MASK_RATE

Figures = dict[str, float]


def compare(case: Case, turns: int, steps: int) -> Figures:
    """Measure our step (eager; on a GPU also with graphs), the released loop's, and the cost of masking."""
    device, on_gpu, batch_size = case.device, case.device.type == "cuda", case.cfg.train.batch_size
    names = [name for name in SIDES if name != "graphs" or on_gpu]
    built = {name: _with_memory(name, case) for name in names}
    sides = {name: step for name, (step, _) in built.items()}
    before = gemm_rate(case.precision, device)
    seconds = time_in_turns(sides, turns, steps, device)
    rate = statistics.mean([before, gemm_rate(case.precision, device)])

    lengths = case.store.lengths
    tokens, padded = float(lengths.mean()) * batch_size, batch_size * case.cfg.max_length
    masked_tokens = MASK_RATE * (lengths - 2).sum() if case.task.name == "mlm" else 0.0
    flops = step_flops(case.net, lengths, masked_tokens) / len(lengths) * batch_size
    figures = {"real tokens a step": tokens, "padded tokens a step": padded, "machine TFLOP/s": rate / 1e12}
    for name in names:
        each = seconds[name]
        figures |= {f"{name}: steps/s": 1 / each, f"{name}: real tokens/s": tokens / each}
        figures |= {f"{name}: padded tokens/s": padded / each, f"{name}: % of the machine's rate": 100 * flops / each / rate}
        if on_gpu:
            found = profile_kernels(sides[name], steps, device)
            figures |= {f"{name}: kernels a step": found.count, f"{name}: GPU busy, %": 100 * found.seconds / each}
            figures[f"{name}: memory reserved, MiB"] = built[name][1]
    best = names[-2]  # graphs on a GPU, else eager
    figures |= {f"{name} over released, times": seconds["released"] / seconds[name] for name in names if name != "released"}
    return figures | {"masking alone, % of a step": 100 * masking_seconds(case.mask, device) / seconds[best]}


def _with_memory(name: str, case: Case) -> tuple[TrainStep, float]:
    """Build a side and take three steps. Returns it with the peak of reserved GPU memory, in MiB (0 on a CPU)."""
    if case.device.type != "cuda":
        return SIDES[name](case), 0.0
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    step = SIDES[name](case)
    take_steps(step, range(3))
    return step, (torch.cuda.max_memory_reserved(case.device) - before) / 2**20


def measure_alone(side: str, case: Case, turns: int, steps: int) -> Figures:
    """Measure the time of a step of one side, and the peak memory: of the GPU, or of this process."""
    seconds = time_in_turns({side: SIDES[side](case)}, turns, steps, case.device)[side]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if case.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(case.device)
    return {f"{side}: a step, ms": 1000 * seconds, f"{side}: peak memory, MiB": used / 2**20}


def measure_levers(case: Case, turns: int, steps: int) -> Figures:
    """Measure the increase in a step's time with each speed-up off, in percent."""
    sides = {"all on": eager(case)} | {lever: build(case) for lever, build in LEVERS.items()}
    seconds = time_in_turns(sides, turns, steps, case.device)
    on = seconds.pop("all on")
    return {"all on, ms": 1000 * on} | {f"{lever}, %": 100 * (value / on - 1) for lever, value in seconds.items()}


def profile(case: Case, turns: int, steps: int) -> Figures:
    """Measure the costliest kernels, or on a CPU the costliest operators without those they call, in ms per step."""
    on_gpu = case.device.type == "cuda"
    step = graphs(case) if on_gpu else eager(case)
    figures = {"a step, ms": 1000 * time_in_turns({"": step}, turns, steps, case.device)[""]}
    own: dict[str, float] = defaultdict(float)
    if on_gpu:
        for kernel, seconds in profile_kernels(step, steps, case.device).by_name.items():
            own[short_name(kernel)] += 1000 * seconds
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            take_steps(step, range(steps))
        own.update({event.key: event.self_cpu_time_total / 1000 / steps for event in found.key_averages()})
    return figures | dict(sorted(own.items(), key=lambda item: -item[1])[:24])


def measure_level(model: str) -> Figures:
    """Measure the costs of a level beside its training: pruning, writing the mask, writing a checkpoint. Medians of three."""
    net, _ = load_bert(model, "classifier", "pretrained", Training.seed)
    weights, params = prunable(net), dict(net.named_parameters())
    state = {f"{part}/{name}": p.detach().clone() for part in ("param", "exp_avg", "exp_avg_sq") for name, p in params.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            marks = [time.perf_counter()]
            mask = prune(Mask.ones(weights), magnitude(weights), 0.1)
            marks.append(time.perf_counter())
            mask.write(path := Path(folder) / "mask.safetensors")
            marks.append(time.perf_counter())
            write_tensors(Path(folder) / "checkpoint.safetensors", state)
            marks.append(time.perf_counter())
            size = path.stat().st_size
        for name, seconds in zip(("choose the mask", "write the mask", "write a checkpoint"), np.diff(marks), strict=True):
            times[f"{name}, s"].append(float(seconds))
        times["together, s"].append(marks[-1] - marks[0])
    figures = {name: statistics.median(values) for name, values in times.items()}
    return {"prunable weights": mask.total, "mask file, MB": size / 1e6} | figures
