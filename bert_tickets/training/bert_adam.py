"""BertAdam, the optimizer of BERT's first PyTorch port, which mask training by distillation uses (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

LATE = 2.0**20  # a step at which AdamW's corrections of bias are 1 to the last bit


class BertAdam(torch.optim.AdamW):
    """AdamW without bias correction; each tensor's gradient is clipped to the norm `max_grad_norm` by itself.

    By torch's fused AdamW, whose attributes `grad_scale` and `found_inf` it has. The state is `step`, `exp_avg`, `exp_avg_sq`.
    """

    max_grad_norm = 1.0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        norms = list(torch._foreach_norm(grads))
        if (scale := getattr(self, "grad_scale", None)) is not None:
            norms = [norm / scale for norm in norms]
        torch._foreach_mul_(grads, [(self.max_grad_norm / (norm + 1e-6)).clamp(max=1) for norm in norms])
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, LATE)
        super().step()
        torch._foreach_add_(steps, -LATE)
