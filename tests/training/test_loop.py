"""The training loop and its hooks: schedule, loss curve, checkpoints with the hooks' state, checks, stopping."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bert_tickets.config import Training
from bert_tickets.data.batches import Batches, TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import Diverged, Stopped
from bert_tickets.files import sha256_of
from bert_tickets.runs.checkpoint import Checkpoint
from bert_tickets.training.hooks import At, LossCurve, ProgressBar, check_finite
from bert_tickets.training.loop import Hook, Loop, total_steps, train
from bert_tickets.training.schedule import linear_decay

EXAMPLES, STEPS = 20, 23
CFG = Training(max_steps=STEPS, lr=0.1, log_every=4, weight_decay=0.01, precision="fp32")
STORE = TokenStore(Tokens.of([[i] for i in range(EXAMPLES)], [[0]] * EXAMPLES), np.arange(EXAMPLES))


class Problem:
    """Two leaves and a loss with random numbers, as dropout draws them."""

    def __init__(self) -> None:
        self.params = {"w": torch.zeros(EXAMPLES, requires_grad=True), "bias": torch.zeros((), requires_grad=True)}

    def loss(self, batch) -> Tensor:
        target = batch.labels / EXAMPLES
        return ((self.params["w"][batch.labels] * torch.rand(len(target)) + self.params["bias"] - target) ** 2).mean()

    def train(self, hooks=(), cfg: Training = CFG, **options) -> Loop:
        return train(self.loss, self.params, Batches(STORE, 6, cfg.seed), cfg, hooks=hooks, **options)


class Watch(Hook):
    """Record a value of the loop after every step."""

    def __init__(self, value: Callable[[Loop], Any]) -> None:
        self.value, self.seen = value, []

    def __call__(self, loop: Loop) -> None:
        self.seen.append(self.value(loop))


class Average(Hook):
    """A hook with state: the sum of the weights over the steps, and their number."""

    def begin(self, loop: Loop) -> None:
        self.sum, self.count = torch.zeros(EXAMPLES), 0

    def __call__(self, loop: Loop) -> None:
        self.sum += loop.step.params["w"].detach()
        self.count += 1

    def state(self) -> tuple[dict[str, Tensor], dict]:
        return {"sum": self.sum}, {"count": self.count}

    def load_state(self, tensors, facts) -> None:
        self.sum, self.count = tensors["sum"].clone(), facts["count"]


class MemoryRun:
    """A `Run` that holds its checkpoint in memory."""

    def __init__(self) -> None:
        self.saved, self.stop_signal, self.at = ({}, None), None, []

    def read_checkpoint(self, level):
        return self.saved

    def write(self, file, tensors, facts, level) -> None:
        self.saved = {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts))
        self.at.append(facts["step"])

    def stop(self, level: int, step: int) -> None:
        raise Stopped(f"stopped at {step}", 143)


def kill() -> None:
    raise KeyboardInterrupt


def run(file: MemoryRun, kill_at: int = 0, save_steps: int | None = 5) -> tuple:
    """Train with all hooks, killed after step `kill_at`. Returns all that must be reproducible."""
    average, curve = Average(), LossCurve(CFG.log_every)
    checkpoint = Checkpoint(file, 0, [curve, average], 1e9, save_steps)
    loop = Problem().train([curve, average, checkpoint, ProgressBar("test", curve), At(kill_at, kill)])
    tensors = {**loop.step.params, **loop.step.moments(), "sum": average.sum, "loss": loop.loss}
    return sha256_of(tensors), average.count, curve.losses, loop.at


# ---- the loop ----


def test_hooks_are_called_after_every_nth_step_and_the_last():
    calls = []

    class Third(Hook):
        every = 3

        def begin(self, loop: Loop) -> None:
            calls.append("begin")

        def __call__(self, loop: Loop) -> None:
            calls.append(loop.at)

        def end(self, loop: Loop) -> None:
            calls.append("end")

    Problem().train([Third(), At(20, lambda: calls.append("at 20"))])
    assert calls == ["begin", *range(3, 19, 3), "at 20", 21, 23, "end"]
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        Problem().train([Third(), At(4, lambda: 1 / 0)])
    assert calls == ["begin", 3, "end"]


def test_a_hook_may_end_the_loop_and_change_what_is_trained():
    class Stop(Hook):
        def __call__(self, loop: Loop) -> None:
            if loop.at == 7:
                loop.step.params["w"].data.fill_(5)
                loop.steps = 7

    problem = Problem()
    assert problem.train([Stop()]).at == 7
    assert (problem.params["w"] == 5).all()


def test_batch_and_random_numbers_of_a_step_depend_on_the_seed_and_the_step_alone():
    def losses(start: int = 0, seed: int = 57) -> list[float]:
        watch, cfg = Watch(lambda loop: loop.loss.item()), replace(CFG, seed=seed, weight_decay=0.0)
        loop = Problem().train([watch], cfg, start=start, schedule=lambda step: 0.0)
        assert (loop.start, loop.at, loop.step.taken()) == (start, STEPS, STEPS - start)
        return watch.seen

    assert losses(start=10) == losses()[10:]
    assert losses(seed=1) != losses()


def test_the_learning_rate_is_the_schedules():
    watch, rates = Watch(lambda loop: loop.step.optimizer.param_groups[0]["lr"]), []
    Problem().train([watch, curve := LossCurve(4, lambda line: rates.append(line["lr"]))])
    assert watch.seen == [linear_decay(0.1, STEPS)(step) for step in range(STEPS)]
    assert watch.seen[0] == 0.1
    assert rates == [watch.seen[step - 1] for step, _ in curve.losses]
    assert linear_decay(1.0, 10)(11) == 0


def test_the_number_of_steps_is_exact():
    assert total_steps(Training(epochs=1.1), 10) == 11  # in floats 1.1 * 10 is above 11
    assert total_steps(Training(epochs=0.15), 10) == 2
    assert total_steps(Training(epochs=3.0, max_steps=5), 10) == 5


# ---- the loss curve ----


def test_the_loss_curve_has_means_of_log_every_steps():
    watch, lines = Watch(lambda loop: loop.loss.item()), []
    Problem().train([watch, curve := LossCurve(4, lines.append)])
    assert [step for step, _ in curve.losses] == [4, 8, 12, 16, 20, 23]
    means = [np.mean(watch.seen[at : at + 4]) for at in range(0, STEPS, 4)]
    assert [mean for _, mean in curve.losses] == pytest.approx(means)
    assert [(line["step"], line["loss"]) for line in lines] == curve.losses
    Problem().train([late := LossCurve(4)], start=6)
    assert [step for step, _ in late.losses] == [8, 12, 16, 20, 23]


def test_a_loss_or_a_weight_that_is_not_finite_is_divergence():
    problem = Problem()
    problem.loss = lambda batch: (problem.params["w"] * float("nan")).sum() + 0 * problem.params["bias"]
    with pytest.raises(Diverged, match="the loss became nan by step 4"):
        problem.train([LossCurve(4)])

    def spoil() -> None:
        problem.params["bias"].data.fill_(float("inf"))

    problem = Problem()
    with pytest.raises(Diverged, match=f"a weight became infinite or NaN by step {STEPS}"):
        check_finite(problem.train([At(STEPS, spoil)]))
    problem, file = Problem(), MemoryRun()
    with pytest.raises(Diverged, match="a weight became infinite or NaN by step 5"):
        problem.train([At(5, spoil), Checkpoint(file, 0, [], 1e9, 5)])
    assert file.at == []


# ---- checkpoints ----


def test_a_killed_or_stopped_run_continues_with_the_same_bits():
    """Weights, moments, the loss curve, and the tensor that another hook keeps."""
    expected = run(MemoryRun())
    for kill_at in (4, 13, 23):
        file = MemoryRun()
        with pytest.raises(KeyboardInterrupt):
            run(file, kill_at)
        assert file.at == list(range(5, kill_at + 1, 5))
        assert run(file) == expected
    file = MemoryRun()
    file.stop_signal = 15
    with pytest.raises(Stopped, match="stopped at 1"):
        run(file, save_steps=None)
    assert file.at == [1]  # at once
    file.stop_signal = None
    assert run(file) == expected


def test_checkpoints_follow_the_clock_and_keep_the_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def tick() -> Watch:
        return Watch(lambda loop: now.__setitem__(0, now[0] + 50))

    file = MemoryRun()
    loop = Problem().train([tick(), Checkpoint(file, 0, [], 4.0, None)])
    assert file.at == [5, 10, 15, 20, 23]  # the last one before the evaluation
    assert loop.seconds == 50 * STEPS
    file.at.clear()
    now[0] += 1e6
    assert Problem().train([tick(), Checkpoint(file, 0, [], 4.0, None)]).seconds == 50 * STEPS
    assert file.at == []
