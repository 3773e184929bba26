"""The checks of gpu_check.py that take training steps in its process: correctness and speed."""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import replace

import torch
from torch import Tensor

from bert_tickets.bench.baselines import Case, packed_step
from bert_tickets.bench.checks import Figures, Setting
from bert_tickets.bench.measure import compare
from bert_tickets.bench.timing import sync_debug
from bert_tickets.data.batches import Batches
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import prunable
from bert_tickets.training.cuda_graphs import Recorder
from bert_tickets.training.hooks import LossCurve
from bert_tickets.training.loop import train
from bert_tickets.training.step import Step


def take(
    case: Case, steps: int, setting: Setting, recorder: Recorder | None = None, replays: bool = True
) -> tuple[Step, Tensor, dict[str, Tensor]]:
    """Take steps with a copy of the network. Returns the `Step`, its losses, and its final weights.

    With `recorder` and without `replays`, steps are eager on the same padded batches.
    """
    step, take_step = packed_step(case, recorder=recorder)
    if not replays:
        step.graphs = None
    losses = []
    for i in range(steps):
        torch.manual_seed(i)
        with sync_debug("error" if i and recorder is None else "default"):  # the first step and captures may wait
            losses.append(take_step(i))
    return step, torch.stack(losses), {name: p.detach() for name, p in step.params.items()}


def equal_steps(setting: Setting) -> Figures:
    """Check in each precision that no step waits for the GPU, equal steps give equal bits, and pruned weights stay zero."""
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
    """Check that steps by CUDA graphs give the same bits as eager ones on the same padded batches."""
    steps, case = setting.count(200, 60, 9), setting.case("fp16", setting.count(60, 30, 3))
    began = time.monotonic()
    step, losses, weights = take(case, steps, setting, Recorder(required=True))
    seconds, captured = time.monotonic() - began, len(step.graphs.captured) if step.graphs else 0
    assert captured, "no step was captured"
    _, eager, same = take(case, steps, setting, Recorder(required=True), replays=False)
    assert torch.equal(losses, eager), f"step {int((losses != eager).nonzero()[0])} by graphs has another loss"
    assert all(torch.equal(p, same[name]) for name, p in weights.items()), "steps by graphs end with other weights"
    return {"summary": f"{steps} steps, {captured} graphs", "seconds of these steps, captures included": seconds}


def speed(setting: Setting) -> Figures:
    """Measure the speed of eager steps, of graphs and of the released loop, on MNLI's lengths."""
    turns, steps = setting.count(5, 3, 2), setting.count(10, 6, 2)
    figures = compare(setting.case("auto", steps * (turns + 1)), turns, steps)
    best = "graphs" if setting.on_gpu else "eager"
    times, rate = figures[f"{best} over released, times"], figures[f"{best}: steps/s"]
    return {"summary": f"{times:.1f} times the released loop, {rate:.1f} steps/s", **figures}


def masks(setting: Setting) -> Figures:
    """Check that masks computed on the GPU equal the CPU's, over two levels."""
    net, _ = load_bert(str(setting.model), "classifier", "pretrained", 0)
    on_cpu = {name: p.detach() for name, p in prunable(net).items()}
    on_gpu = {name: p.to(setting.device) for name, p in on_cpu.items()}

    def two_levels(weights: dict[str, Tensor], scope: str) -> Mask:
        mask = prune(Mask.ones(weights), magnitude(weights), 0.1, scope)  # type: ignore[arg-type]
        return prune(mask, magnitude(weights), 0.5, scope).to("cpu")  # type: ignore[arg-type]

    for scope in ("global", "tensor"):
        assert two_levels(on_gpu, scope) == two_levels(on_cpu, scope), f"--scope {scope}: another mask"
    return {"summary": f"{sum(p.numel() for p in on_cpu.values()):,} weights"}


def without_dropout(case: Case) -> Case:
    """Set the dropout of a case to 0."""
    for module in case.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return case


def gradients(setting: Setting) -> Figures:
    """Check that gradients in fp32 without TF32 equal the CPU's to 1e-5 of the largest."""
    case = without_dropout(setting.case("fp32", 1))
    nets = {"cuda": case.net, "cpu": copy.deepcopy(case.net).to("cpu")}
    batch, found = case.store.batch(torch.arange(8)), {}
    for device, net in nets.items():
        tensors = {name: x.to(device) for name, x in vars(batch).items() if isinstance(x, Tensor)}
        case.task.loss(net, replace(batch, **tensors)).backward()  # type: ignore[arg-type]
        found[device] = {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max().item() for grad in found["cpu"].values())
    error = max((grad - found["cpu"][name]).abs().max().item() for name, grad in found["cuda"].items()) / largest
    assert error <= 1e-5, f"gradients differ by {error:.1e} of the largest"
    return {"summary": f"within {error:.1e} of the largest", "largest gradient": largest}


def memory(setting: Setting) -> Figures:
    """Check that the out-of-memory error advises --grad-accum, and that with it the losses are the same to rounding."""
    case = without_dropout(setting.case("fp32", setting.count(8, 8, 4)))
    case.mask.apply(prunable(case.net))

    def losses(grad_accum: int) -> list[float]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        size = len(case.store)
        cfg = replace(case.cfg.train, batch_size=size, grad_accum=grad_accum, max_steps=2)
        net, curve = copy.deepcopy(case.net), LossCurve(1)
        batches = Batches(case.store, size, 0, grad_accum=grad_accum)
        train(lambda b: case.task.loss(net, b), dict(net.named_parameters()), batches, cfg, mask=case.mask, hooks=[curve])
        return [loss for _, loss in curve.losses]

    split, small = losses(4), torch.cuda.max_memory_reserved()
    whole, large = losses(1), torch.cuda.max_memory_reserved()
    torch.testing.assert_close(torch.tensor(split), torch.tensor(whole), rtol=1e-4, atol=0)
    total, advice = torch.cuda.get_device_properties(setting.device).total_memory, ""
    torch.cuda.set_per_process_memory_fraction((small + large) / 2 / total)
    try:
        assert losses(4) == split, "with limited memory the losses are others"
        losses(1)
    except UserError as error:
        advice = str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert advice, "memory was limited, and the whole batch fitted"
    assert "--grad-accum" in advice, f"no advice in: {advice}"
    return {"summary": "--grad-accum 4 fits and gives the same losses", "GiB limit": (small + large) / 2**31}
