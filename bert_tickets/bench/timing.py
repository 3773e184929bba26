"""Measurements for bench.py and gpu_check.py: loops in turns, the machine's own rate, FLOPs of a step, the cost of masking, and
the kernels of a GPU."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.parameters import prunable

Loop = Callable[[int], Any]  # takes one step, by number


def machine_rate(precision: str, device: torch.device) -> float:
    """Floating-point operations a second of one large square matrix product in the precision trained in."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = 30 if device.type == "cuda" and precision != "fp32" else 3
    for _ in range(times // 3):
        a @ b
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        a @ b
    wait(device)
    return times * 2 * n**3 / (time.perf_counter() - began)


def arithmetic(net: Net, lengths: np.ndarray, predicted: float = 0) -> float:
    """Floating-point operations of one training step on examples of these lengths, none spent on padding.

    Six a weight and token (two forward, four backward) in the encoder's matrices, the two products of attention within
    each example, and for `predicted` masked tokens the head: its transform and the vocabulary. Other heads and the pooler
    are left out.
    """
    weights = sum(p.numel() for name, p in prunable(net).items() if "pooler" not in name)
    attention = 12 * net.config.hidden_size * net.config.num_hidden_layers * (lengths.astype(float) ** 2).sum()
    head = net.config.hidden_size * (net.config.hidden_size + net.config.vocab_size)
    return 6 * (weights * lengths.sum() + head * predicted) + attention


def take_turns(loops: dict[str, Loop], turns: int, steps: int, device: torch.device) -> dict[str, float]:
    """Median seconds a step of each loop. The first turn is a warm-up and does not count; who begins a turn changes."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait(device)
            began = time.perf_counter()
            for i in range(turn * steps, (turn + 1) * steps):
                loops[name](i)
            wait(device)
            if turn:
                seconds[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def built(build: Callable[[], Loop], device: torch.device) -> tuple[Loop, float]:
    """A loop after three steps, and how many MiB of the GPU torch has reserved for it at most; on a CPU 0."""
    if device.type != "cuda":
        return build(), 0.0
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    loop = build()
    for i in range(3):
        loop(i)
    return loop, (torch.cuda.max_memory_reserved(device) - before) / 2**20


@dataclass(frozen=True)
class Kernels:
    """What a GPU ran in one step."""

    count: float
    seconds: float  # of their own time, summed
    names: dict[str, float]  # seconds by name

    def of(self, *words: str) -> list[str]:
        """The names in which one of the words is."""
        return sorted(name for name in self.names if any(word in name.lower() for word in words))


def kernels_of(loop: Loop, steps: int, device: torch.device) -> Kernels:
    """The kernels of a loop on a GPU, by torch's profiler, copies and fills left out."""
    wait(device)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as found:  # without it torch 2.11 warns
        for i in range(steps):
            loop(i)
        wait(device)
    names: dict[str, float] = {}
    count = 0
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            names[event.name] = names.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6 / steps
            count += 1
    return Kernels(count / steps, sum(names.values()), names)


def short(kernel: str) -> str:
    """The first 60 characters of a kernel's name without its namespaces."""
    return re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", kernel)[:60]


def masking_seconds(mask: Mask, device: torch.device) -> float:
    """What masking adds to a step, alone and warm: one multiplication of every masked gradient."""
    masks = [kept.to(device, torch.float32) for kept in mask.values()]
    grads = [torch.randn_like(kept) for kept in masks]
    seconds = []
    for _ in range(12):
        wait(device)
        began = time.perf_counter()
        torch._foreach_mul_(grads, masks)
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


@contextmanager
def no_waiting(refused: bool = True) -> Iterator[None]:
    """Within it torch raises an error where the host waits for the GPU; or, within another one, no longer does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error" if refused else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
