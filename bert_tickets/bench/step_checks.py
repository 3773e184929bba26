"""The checks of gpu_check.py that take steps, in its own process: what they compute, and how fast."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bert_tickets.bench.checks import Figures, Setting


def take(case: Any, steps: int, setting: Setting, recorder: Any = None, eager: bool = False) -> tuple[Any, Any, Any]:
    """Steps of a copy of the network: the `Step`, its losses, and the weights they end in."""
    import torch

    from bert_tickets.bench import baselines as loops
    from bert_tickets.bench import timing as clock

    step, loop = loops.step_and_loop(case, recorder=recorder)
    if eager:
        step.graphs = None  # all else is as with graphs: the same shapes, and a learning rate on the device
    losses = []
    for i in range(steps):
        torch.manual_seed(i)
        with clock.no_waiting() if setting.on_gpu and i and recorder is None else contextlib.nullcontext():
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
    return {"summary": f"{steps} steps in fp16, bf16, fp32, twice"}


def graphs(setting: Setting) -> Figures:
    """Steps by CUDA graphs end in the bits of eager ones of the same shapes, and none is refused."""
    import torch

    from bert_tickets.training.cuda_graphs import Recorder

    setting.need_gpu()
    steps, case = setting.count(200, 60, 9), setting.case("fp16", setting.count(60, 30, 3))
    began = time.monotonic()
    step, losses, weights = take(case, steps, setting, Recorder(required=True))
    seconds, captured = time.monotonic() - began, len(step.graphs._captured)
    assert captured, "no step was captured"
    _, eager, same = take(case, steps, setting, Recorder(required=True), eager=True)
    assert torch.equal(losses, eager), f"step {int((losses != eager).nonzero()[0])} by graphs has another loss"
    assert all(torch.equal(p, same[name]) for name, p in weights.items()), "steps by graphs end in other weights"
    return {"summary": f"{steps} steps, {captured} graphs", "seconds of these steps, captures included": seconds}


def speed(setting: Setting) -> Figures:
    """Steps a second, eager, by graphs and as the released loop, on MNLI's lengths."""
    from bert_tickets.bench import baselines as loops
    from bert_tickets.bench import timing as clock

    turns, turn_steps = setting.count(5, 3, 2), setting.count(10, 6, 2)
    case = setting.case("auto", turn_steps * (turns + 1))
    sides = {"eager": loops.ours(case), "released": loops.released(case)}
    if setting.on_gpu:
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
    return {"summary": f"{seconds['released'] / best:.1f} times the released loop, {1 / best:.1f} steps/s"} | figures


def masks(setting: Setting) -> Figures:
    """Masks chosen on the GPU are the CPU's, over two levels."""
    setting.need_gpu()
    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.prune import magnitude, prune
    from bert_tickets.modeling.loading import load_bert
    from bert_tickets.modeling.parameters import prunable

    net, _ = load_bert(str(setting.model), "classifier", "pretrained", 0)
    here = {name: p.detach() for name, p in prunable(net).items()}
    there = {name: p.to(setting.device) for name, p in here.items()}
    for scope in ("global", "tensor"):
        found, expected = (prune(prune(Mask.ones(w), magnitude(w), 0.1, scope), magnitude(w), 0.5, scope) for w in (there, here))
        assert found.to("cpu") == expected, f"--scope {scope}: another mask"
    return {"summary": f"{expected.total:,} weights"}


def gradients(setting: Setting) -> Figures:
    """Gradients in fp32 are the CPU's to 1e-5 of the largest, TF32 being off."""
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
    largest = max(grad.abs().max().item() for grad in found["cpu"].values())
    apart = max((grad - found["cpu"][name]).abs().max().item() for name, grad in found["cuda"].items()) / largest
    assert apart <= 1e-5, f"gradients differ by {apart:.1e} of the largest"
    return {"summary": f"at most {apart:.1e} of the largest apart", "largest gradient": largest}


class Keeper:
    """A `bert_tickets.training.loop.Keeper` without checkpoints."""

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

    from bert_tickets.data.batches import Batches
    from bert_tickets.modeling.parameters import prunable
    from bert_tickets.training.loop import train

    case = setting.case("fp16", 8)
    case.mask.apply(prunable(case.net))

    def train_by(batch_size: int) -> Any:
        gc.collect()
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
    return {"summary": f"256 examples in {result.divided} parts", "GiB limit": sum(reserved) / 2 / 2**30}
