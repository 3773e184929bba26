"""BertAdam against its formula, and within a step."""

from types import SimpleNamespace

import pytest
import torch

from bert_tickets.config import Training
from bert_tickets.training.bert_adam import BertAdam
from bert_tickets.training.step import Step


def test_a_step_with_bert_adam_clips_no_gradient_twice():
    """The norm of all gradients together has no effect; each tensor's is clipped to --max-grad-norm."""
    start, batch = [torch.ones(3), torch.ones(2)], SimpleNamespace(shard=None)
    params = {name: x.clone().requires_grad_() for name, x in zip("ab", start, strict=True)}
    cfg = Training(max_grad_norm=0.5, adam_epsilon=1e-6, weight_decay=0.01, precision="fp32")
    step = Step(
        lambda _: 3 * params["a"].sum() + 0.1 * params["b"].sum(), params, cfg, None, torch.device("cpu"), optimizer="bert_adam"
    )
    step._train_step(batch)
    for p, gradient in zip(params.values(), (3.0, 0.1), strict=True):
        norm = gradient * len(p) ** 0.5
        clipped = gradient * min(1.0, 0.5 / norm)
        assert step.optimizer.state[p]["exp_avg"].tolist() == pytest.approx([0.1 * clipped] * len(p), rel=1e-4)


def test_bert_adam_clips_each_tensor_decays_and_corrects_no_bias():
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5)]
    params = [p.clone().requires_grad_() for p in start]
    optimizer = BertAdam([{"params": params}], lr=0.1)
    m, v = ([torch.zeros_like(p) for p in start] for _ in range(2))
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) * (10 if i else 0.01)
            g = p.grad * min(1.0, 1.0 / (float(p.grad.norm()) + 1e-6))
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
            start[i] = start[i] - 0.1 * (m[i] / (v[i].sqrt() + 1e-6) + 0.01 * start[i])
        optimizer.step()
        for p, expected in zip(params, start, strict=True):
            torch.testing.assert_close(p.detach(), expected)
            assert optimizer.state[p]["step"] == step + 1


def test_bert_adam_unscales_and_leaves_out_an_overflowing_step():
    steps = []
    for scale, overflow in ((1.0, False), (1024.0, False), (1024.0, True)):
        p = torch.ones(4).requires_grad_()
        optimizer = BertAdam([{"params": [p]}], lr=0.1, eps=1e-6)
        p.grad = torch.tensor([1.0, 2.0, 3.0, float("inf") if overflow else 4.0]) * scale
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(overflow))
        optimizer.step()
        steps.append((p.detach(), *optimizer.state[p].values()))
    torch.testing.assert_close(steps[0], steps[1])
    assert torch.equal(steps[2][0], torch.ones(4))
    assert not any(state.any() for state in steps[2][1:])
