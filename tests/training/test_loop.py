"""The training loop and its hooks: schedule, loss curve, checkpoints by the clock, checks."""

from __future__ import annotations

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
from bert_tickets.errors import Diverged
from bert_tickets.runs.checkpoint import Checkpoint
from bert_tickets.training.hooks import At, LossCurve, check_finite
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


class MemoryRun:
    """A `Run` that holds its checkpoint in memory."""

    def __init__(self) -> None:
        self.saved, self.stop_signal, self.at = ({}, None), None, []

    def read_checkpoint(self, level):
        return self.saved

    def write(self, file, tensors, facts, level) -> None:
        self.saved = {name: tensor.clone() for name, tensor in tensors.items()}, facts
        self.at.append(facts["step"])


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
        problem = Problem()
        problem.params["w"].data.fill_(1)
        loop = problem.train([watch], cfg, start=start, schedule=lambda step: 0.0)
        assert (loop.start, loop.at, loop.step.taken()) == (start, STEPS, STEPS - start)
        return watch.seen

    assert losses(start=10) == losses()[10:]
    assert losses(seed=1) != losses()


def test_each_step_draws_other_random_numbers():
    drawn = Watch(lambda loop: torch.rand(()).item())  # follows those of the step
    Problem().train([drawn])
    assert len(set(drawn.seen)) == STEPS


def test_the_learning_rate_is_the_schedules():
    watch, rates = Watch(lambda loop: loop.step.optimizer.param_groups[0]["lr"]), []
    Problem().train([watch, curve := LossCurve(4, lambda line: rates.append(line["lr"]))])
    assert watch.seen == [linear_decay(0.1, STEPS)(step) for step in range(STEPS)]
    assert watch.seen[0] == 0.1
    assert rates == [watch.seen[step - 1] for step, _ in curve.losses]
    assert linear_decay(1.0, 10)(11) == 0


def test_the_number_of_steps_is_exact():
    assert total_steps(Training(epochs=1.1), 50) == 55  # in floats 1.1 * 50 is above 55
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
    problem = Problem()
    spoil = At(STEPS, lambda: problem.params["bias"].data.fill_(float("inf")))
    with pytest.raises(Diverged, match=f"a weight became infinite or NaN by step {STEPS}"):
        check_finite(problem.train([spoil]))


# ---- checkpoints ----


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
