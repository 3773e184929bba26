"""BertAdam, the optimizer of BERT's first PyTorch port, which mask training by distillation uses (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled weight decay; each tensor's gradient is clipped to `max_grad_norm` by itself.

    As in torch's fused AdamW, the attributes `grad_scale` (a divisor of the gradients) and `found_inf` (not 0 to skip the step)
    may be set before a step, and the state is `step`, `exp_avg` and `exp_avg_sq`. Never waits for the device.
    """

    max_grad_norm = 1.0
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        eps: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["step"] = torch.zeros((), device=p.device)
                    self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            means, variances, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
            taken: float | Tensor = 1.0 if self.found_inf is None else 1 - self.found_inf
            a, b = ((1 - beta) * taken for beta in group["betas"])
            for p, mean, variance, step in zip(params, means, variances, steps, strict=True):
                grad = self._clipped(p)
                mean.mul_(1 - a).add_(grad * a)
                variance.mul_(1 - b).add_(grad * grad * b)
                p.sub_((mean / (variance.sqrt() + group["eps"]) + group["weight_decay"] * p) * (group["lr"] * taken))
                step += taken

    def _clipped(self, p: Tensor) -> Tensor:
        grad = p.grad
        assert grad is not None
        if self.grad_scale is not None:
            grad = grad / self.grad_scale
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, 0.0, grad)  # 0 times infinity is not 0
        return grad * (self.max_grad_norm / (grad.norm() + 1e-6)).clamp(max=1)
