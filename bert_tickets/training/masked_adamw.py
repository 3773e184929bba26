"""AdamW with masks by the kernels of `kernels.adamw`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bert_tickets.kernels import adamw
from bert_tickets.modeling.packing import ship


class MaskedAdamW(torch.optim.AdamW):
    """AdamW that multiplies gradients by masks, for float32 parameters on a GPU. Equals `torch.optim.AdamW` to rounding.

    Gradients are in float32 or in the dtype `half`; `masks` are uint8 tensors by parameter.

    `clip` comes before each `step`. As in torch's fused AdamW, the state is `step`, `exp_avg` and `exp_avg_sq`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], masks: Mapping[Tensor, Tensor], half: torch.dtype, lr: Tensor, eps: float
    ) -> None:
        super().__init__(groups, lr=lr, eps=eps, fused=True)
        self.masks, self.half = masks, half
        self._facts: list[Any] = []  # what the tables depend on
        self._columns: list[list[Tensor]]  # parameters, averages and steps, which the tables point to
        self._tables: adamw.Tables
        self._grads: list[Tensor]
        self._places: Tensor  # their addresses
        self._divisor: Tensor
        self._overflowed: Tensor  # 1.0 to skip the step

    @torch.no_grad()
    def clip(self, max_norm: float, scale: Tensor | None = None) -> Tensor:
        """Clip the L2 norm of the masked gradients / `scale`. Returns 1.0 if it overflowed: the step then does nothing; else 0.0.

        The gradients themselves stay as they are. Without `scale` the step is always taken.
        """
        trained = {p: group["weight_decay"] for group in self.param_groups for p in group["params"] if p.grad is not None}
        for p in trained:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        columns = [list(trained), *([self.state[p][name] for p in trained] for name in ("exp_avg", "exp_avg_sq", "step"))]
        halved = [p.grad.dtype == self.half for p in trained]
        facts = [halved, *(id(tensor) for column in columns for tensor in column)]
        if facts != self._facts:
            self._facts, self._columns, self._tables = facts, columns, self._tabulate(columns, [*trained.values()], halved)
        self._grads = [_aligned(p.grad) for p in trained]
        self._places = adamw.addresses(self._grads)
        self._divisor, self._overflowed = adamw.clip(self._places, self._tables, self.half, max_norm, scale)
        return self._overflowed

    def _tabulate(self, columns: list[list[Tensor]], decays: list[float], halved: list[bool]) -> adamw.Tables:
        params, device = columns[0], columns[0][0].device
        sizes = [p.numel() for p in params]
        starts = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, adamw.BLOCK)]
        masks = [self.masks.get(p) for p in params]
        places = [adamw.addresses(column) for column in columns]
        return adamw.Tables(
            adamw.addresses([p if mask is None else mask for p, mask in zip(params, masks, strict=True)]),
            *places,  # type: ignore[call-arg]
            ship(torch.tensor([mask is not None for mask in masks], dtype=torch.int32), device),
            ship(torch.tensor(halved, dtype=torch.int32), device),
            ship(torch.tensor(decays), device),
            ship(torch.tensor(sizes), device),
            ship(torch.tensor([i for i, _ in starts], dtype=torch.int32), device),
            ship(torch.tensor([first for _, first in starts]), device),
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        lr, betas, eps = (self.param_groups[0][name] for name in ("lr", "betas", "eps"))
        adamw.update(self._places, self._tables, self.half, lr, self._divisor, self._overflowed, betas, eps)
        self._grads = []  # those that are copies need no more memory


def _aligned(grad: Tensor) -> Tensor:
    """Return the gradient, or a copy if it begins within another tensor where an access of 16 bytes cannot begin."""
    grad = grad.contiguous()
    return grad if grad.storage_offset() * grad.element_size() % 16 == 0 else grad.clone()
