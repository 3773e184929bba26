"""Measurements: training steps in turns, the machine's GEMM rate, FLOPs of a step, the cost of masking, GPU kernels."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.parameters import prunable

TrainStep = Callable[[int], Any]  # takes the training step with this index


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, action: Callable[..., object], *arguments: Any) -> float:
    """Return the wall-clock seconds of `action(*arguments)`, with the device idle before and after."""
    synchronize(device)
    began = time.perf_counter()
    action(*arguments)
    synchronize(device)
    return time.perf_counter() - began


def take_steps(step: TrainStep, numbers: Iterable[int]) -> None:
    """Take the steps with these indices."""
    for i in numbers:
        step(i)


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


def step_flops(net: Net, lengths: np.ndarray, masked_tokens: float = 0) -> float:
    """Return the FLOPs of training once on examples of these lengths, without padding.

    Six per weight and token (two forward, four backward) of the encoder's matrices, attention's two products within each example,
    and the MLM head for masked tokens. Other heads and the pooler are left out.
    """
    weights = sum(p.numel() for name, p in prunable(net).items() if "pooler" not in name)
    attention = 12 * net.config.hidden_size * net.config.num_hidden_layers * (lengths.astype(float) ** 2).sum()
    head = net.config.hidden_size * (net.config.hidden_size + net.config.vocab_size)
    return 6 * (weights * lengths.sum() + head * masked_tokens) + attention


def masking_seconds(mask: Mask, device: torch.device) -> float:
    """Measure the seconds of masking in a step: one multiplication of every masked gradient."""
    masks = [kept.to(device, torch.float32) for kept in mask.values()]
    grads = [torch.randn_like(kept) for kept in masks]
    return statistics.median(seconds_of(device, torch._foreach_mul_, grads, masks) for _ in range(10))


# ---- GPU kernels ----


@dataclass(frozen=True)
class Kernels:
    """The kernels of one step on a GPU."""

    count: float
    seconds: float  # of GPU time, summed
    by_name: dict[str, float]  # seconds


def profile_kernels(step: TrainStep, steps: int, device: torch.device) -> Kernels:
    """Profile the GPU kernels of `steps` steps, copies and fills left out."""
    synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as found:  # without acc_events torch 2.11 warns
        take_steps(step, range(steps))
        synchronize(device)
    by_name: dict[str, float] = {}
    count = 0
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6 / steps
            count += 1
    return Kernels(count / steps, sum(by_name.values()), by_name)


def short_name(kernel: str) -> str:
    """Return the first 60 characters of a kernel's name without its namespaces."""
    return re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", kernel)[:60]


@contextmanager
def sync_debug(mode: str = "error") -> Iterator[None]:
    """Set torch's sync debug mode, if there is a GPU. With `error`, operators that wait for it raise `RuntimeError`."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
