"""One optimization step of a masked network: its precision, masking, clipping and optimizer."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bert_tickets import kernels
from bert_tickets.config import Training
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.packing import Batch
from bert_tickets.training.bert_adam import BertAdam
from bert_tickets.training.cuda_graphs import Graphs, Recorder
from bert_tickets.training.distributed import SINGLE_PROCESS, ProcessGroup

Loss = Callable[[Batch], Tensor]  # the mean loss of a packed batch, a scalar
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def precision_of(asked: str, device: torch.device) -> str:
    """Resolve `auto`: fp16 on CUDA, fp32 elsewhere. Raises `UserError` for bf16 on a GPU without it."""
    if asked == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if asked == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; give --precision fp16")
    return asked


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of forward passes; none for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


class LossScale:
    """The factor of fp16 losses, so that small gradients do not underflow (Micikevicius et al. 2018).

    Halved when gradients overflow and doubled after 2,000 steps without overflow, as in `torch.amp.GradScaler`; but AdamW
    unscales the gradients, and both tensors stay on the device, so that a step never synchronizes.
    """

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), 2.0**16, device=device)
        self.clean = torch.zeros((), dtype=torch.int32, device=device)  # steps since the last change

    def update(self, overflowed: Tensor) -> None:
        """Update the factor after a step; `overflowed` is 1.0 or 0.0."""
        torch._amp_update_scale_(self.factor, self.clean, overflowed, 2.0, 0.5, 2000)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.factor.item(), "_growth_tracker": self.clean.item()}  # as in GradScaler

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.factor.fill_(state["scale"])
        self.clean.fill_(state["_growth_tracker"])


# Optimizers by name. Each takes `lr`, `eps` and `fused`, and in half precision `grad_scale` and `found_inf` as attributes. There,
# on a GPU, `MaskedAdamW` takes the place of adamw.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "bert_adam": BertAdam}


# Parameters without weight decay, by name; a coefficient of a unit is drawn to zero by its own penalty alone. Scores have it.
UNDECAYED = re.compile(r"(?!score\.)(.*bias|.*LayerNorm.*|coefficient\..*)")


class Step:
    """Forward, backward, mask the gradients, clip, optimizer. A call takes one step and returns the loss, on the device.

    `params` are the tensors to train, by name; pruned weights must be zero already. Gradients are summed over the processes,
    then multiplied by the mask, then unscaled and clipped, so that no pruned gradient reaches the norm or AdamW's moments. In
    fp32 this equals `torch.nn.utils.prune` bit for bit. With a `recorder`, steps of one part are replayed as CUDA graphs.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        cfg: Training,
        mask: Mask | None,
        device: torch.device,
        recorder: Recorder | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
        optimizer: str = "adamw",
    ) -> None:
        self.group = group
        self.loss, self.params, self.cfg, self.device = loss, dict(params), cfg, device
        self.precision = precision_of(cfg.precision, device)
        self.loss_scale = LossScale(device) if self.precision == "fp16" else None
        self.masked_kernels = optimizer == "adamw" and self.precision != "fp32" and kernels.usable(device)
        self.masks = {  # in the dtype of the gradients, for torch's fused product
            name: kept.to(device, torch.uint8 if self.masked_kernels else params[name].dtype)
            for name, kept in (mask or {}).items()
            if name in params and not kept.all()  # frozen tensors are not in `params`, and stay as they are
        }
        undecayed = {name for name in self.params if UNDECAYED.fullmatch(name)}
        groups = [
            {"params": [p for name, p in self.params.items() if name not in undecayed], "weight_decay": cfg.weight_decay},
            {"params": [self.params[name] for name in self.params if name in undecayed], "weight_decay": 0.0},
        ]
        lr = torch.full((), cfg.lr, device=device)  # graphs and our kernels read the tensor
        self.optimizer: Any
        if self.masked_kernels:
            from bert_tickets.training.masked_adamw import MaskedAdamW

            masks, half = {self.params[name]: mask for name, mask in self.masks.items()}, DTYPES[self.precision]
            self.optimizer = MaskedAdamW(groups, masks, half, lr, cfg.adam_epsilon)
        else:
            self.optimizer = OPTIMIZERS[optimizer](groups, lr=lr if recorder else cfg.lr, eps=cfg.adam_epsilon, fused=True)
        self.max_grad_norm = cfg.max_grad_norm  # of all gradients together
        if isinstance(self.optimizer, BertAdam):
            self.optimizer.max_grad_norm, self.max_grad_norm = cfg.max_grad_norm, math.inf
        self.graphs = Graphs(recorder) if recorder else None

    def __call__(self, batch: Batch | Sequence[Batch], lr: float) -> Tensor:
        """Take a step on a batch, or on its parts with their gradients accumulated."""
        parts = [batch] if isinstance(batch, Batch) else list(batch)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.graphs and len(parts) == 1:
            return self.graphs(parts[0], self._train_step, self._state)
        return self._train_step(*parts)

    def _train_step(self, *parts: Batch) -> Tensor:
        if self.masked_kernels:  # its gradients may stay in half precision, unless several are added
            summed = len(parts) > 1 or self.group.world_size > 1
            for p in self.params.values():
                p.grad_dtype = torch.float32 if summed else None
        try:
            losses = [self._backward(part) for part in parts]
            return self._update(losses[0] if len(losses) == 1 else torch.stack(losses).sum())
        finally:  # also after an error, so that the next step begins without gradients
            self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, part: Batch) -> Tensor:
        """Accumulate the gradients of one part of the batch; returns its part of the mean loss."""
        with autocast(self.precision, self.device):
            loss = self.loss(part)
        if part.shard is not None:
            loss = loss * part.weight  # the sum over the parts is the mean of the batch
        (loss * self.loss_scale.factor if self.loss_scale else loss).backward()
        return loss.detach()

    def _update(self, loss: Tensor) -> Tensor:
        """Sum over the processes, mask, clip, and update the parameters; returns the loss of the whole batch."""
        self.group.all_reduce([*(p.grad for p in self.params.values() if p.grad is not None), loss])
        scale = self.loss_scale
        if self.masked_kernels:
            overflowed = self.optimizer.clip(self.max_grad_norm, scale.factor if scale else None)
            if scale:
                scale.update(overflowed)
        else:
            masks = [(grad, mask) for name, mask in self.masks.items() if (grad := self.params[name].grad) is not None]
            if masks:  # without a gradient where the loss does not depend on a tensor
                torch._foreach_mul_([grad for grad, _ in masks], [mask for _, mask in masks])
            if self.precision == "fp32":
                nn.utils.clip_grad_norm_(self.params.values(), self.max_grad_norm, foreach=True)
            else:
                grads = [p.grad for p in self.params.values() if p.grad is not None]
                self._clip_in_adamw(nn.utils.get_total_norm(grads, foreach=True))
        if self.graphs and self.device.type == "cuda":  # torch warns if capturable is set outside of a capture
            for group in self.optimizer.param_groups:
                group["capturable"] = torch.cuda.is_current_stream_capturing()
        self.optimizer.step()
        return loss

    def _clip_in_adamw(self, norm: Tensor) -> None:
        """Let AdamW's kernel divide the gradients by the loss scale and the clipping factor, which saves two passes.

        The result is the same to rounding, and bit for bit if nothing is clipped. If fp16 gradients overflow, so does their
        norm: AdamW then changes nothing, and the loss scale is halved.
        """
        scale, optimizer = self.loss_scale, self.optimizer
        unscaled = norm / scale.factor if scale else norm
        divisor = ((unscaled + 1e-6) / self.max_grad_norm).clamp(min=1)
        optimizer.grad_scale = scale.factor * divisor if scale else divisor
        if scale:
            optimizer.found_inf = overflowed = (~norm.isfinite()).float()
            scale.update(overflowed)

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes, except its loss."""
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        scale = [self.loss_scale.factor, self.loss_scale.clean] if self.loss_scale else []
        return [*self.params.values(), *moments, *scale]

    # ---- the optimizer's state ----

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state as `<moment>/<parameter name>`; empty before the first step."""
        return {
            f"{moment}/{name}": tensor
            for name, p in self.params.items()
            if p in self.optimizer.state
            for moment, tensor in self.optimizer.state[p].items()
        }

    def taken(self, before: Mapping[str, Tensor] | None = None) -> int:
        """Count the steps that changed the weights: AdamW's count, minus that of the moments `before`. Waits for the device."""
        initial = max((int(tensor) for name, tensor in (before or {}).items() if name.startswith("step/")), default=0)
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0) - initial

    @torch.no_grad()
    def set_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Set the optimizer's state, the inverse of `moments`. Zeroes the moments of pruned weights, which would change them."""
        for key, tensor in moments.items():
            moment, name = key.split("/", 1)
            if name in self.params:
                p = self.params[name]
                value = tensor.to(self.device, copy=True)
                masked = name in self.masks and value.shape == p.shape
                self.optimizer.state[p][moment] = value.mul_(self.masks[name]) if masked else value
