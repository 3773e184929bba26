"""One optimisation step of a masked network. Every trick of speed and every rule of exactness of a step lives here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bert_tickets import UserError, first_line
from bert_tickets.batches import Batch
from bert_tickets.config import Training
from bert_tickets.device import out_of_memory
from bert_tickets.dropout import dropout_of
from bert_tickets.graphs import Graphs, Recorder
from bert_tickets.mask import Mask
from bert_tickets.ranks import ALONE, Ranks

Loss = Callable[[Batch], Tensor]  # a packed batch to its mean loss, a scalar
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter


def precision_of(asked: str, device: torch.device) -> str:
    """`auto` as what it stands for: fp16 on CUDA, fp32 elsewhere."""
    if asked == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if asked == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; give --precision fp16")
    return asked


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of forward passes; fp32 has none."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16)


class LossScale:
    """What fp16 losses are multiplied by, so that small gradients do not vanish (Micikevicius et al. 2018).

    It halves when gradients overflow and doubles after 2,000 steps without, as `torch.amp.GradScaler`'s, whose constants
    these are; but AdamW unscales the gradients in its own pass. Both tensors stay on the device: a step never synchronises.
    """

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), 2.0**16, device=device)
        self.clean = torch.zeros((), dtype=torch.int32, device=device)  # steps since it changed

    def update(self, overflowed: Tensor) -> None:
        """Count a step; `overflowed` is 1.0 or 0.0."""
        torch._amp_update_scale_(self.factor, self.clean, overflowed, 2.0, 0.5, 2000)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.factor.item(), "_growth_tracker": self.clean.item()}  # GradScaler's names

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.factor.fill_(state["scale"])
        self.clean.fill_(state["_growth_tracker"])


class Step:
    """Forward, backward, mask the gradients, clip, AdamW. Calling it takes one step and returns the loss, on the device.

    `params` are the tensors to train, by name; those the mask names must be zero already where it removes. Their
    gradients are multiplied by the mask after the backward pass and before unscaling and clipping, which is what
    `torch.nn.utils.prune` computes (in fp32 bit for bit): no pruned gradient reaches the norm or Adam's moments. Where
    several processes divide a batch, their gradients are summed first, and all take the same step.

    With a `recorder` and on one process, steps are replayed as CUDA graphs.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, nn.Parameter],
        cfg: Training,
        mask: Mask | None,
        device: torch.device,
        recorder: Recorder | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.loss, self.params, self.cfg, self.device = loss, dict(params), cfg, device
        self.precision = precision_of(cfg.precision, device)
        self.loss_scale = LossScale(device) if self.precision == "fp16" else None
        self.masks = {  # in the gradients' own type, so that one fused product masks them; all-true ones do nothing
            name: kept.to(device, params[name].dtype)
            for name, kept in (mask or {}).items()
            if name in params and not kept.all()  # a frozen tensor is zero where the mask says, and stays so
        }
        decays = [p for name, p in self.params.items() if not name.endswith("bias") and "LayerNorm" not in name]
        spared = [p for name, p in self.params.items() if name.endswith("bias") or "LayerNorm" in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": cfg.weight_decay}, {"params": spared, "weight_decay": 0.0}],
            lr=torch.full((), cfg.lr, device=device) if recorder else cfg.lr,  # a captured graph reads the tensor
            eps=cfg.adam_epsilon,
            fused=True,
        )
        self.graphs = Graphs(recorder) if recorder else None

    def __call__(self, batch: Batch | Sequence[Batch], lr: float) -> Tensor:
        """One step on a batch, or on the parts that it is divided into, whose gradients are then added up.

        Raises `torch.OutOfMemoryError` with nothing changed, on all processes if on one, where a part is too large.
        """
        parts = [batch] if isinstance(batch, Batch) else list(batch)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.graphs and len(parts) == 1:
            return self.graphs(parts[0], self._take, self._state)
        return self._take(*parts)

    def _take(self, *parts: Batch) -> Tensor:
        try:
            loss = self._backward(parts)
            try:
                with out_of_memory():
                    return self._update(loss)
            except torch.OutOfMemoryError as error:  # smaller parts would not help, and the weights may have moved in part
                raise UserError(
                    f"out of memory for the gradients' sum or AdamW's moments: {first_line(error)}. What was finished or saved "
                    "before is intact; a larger GPU is needed, or a smaller model."
                ) from None
        finally:  # also where it failed: the next step begins without gradients
            self.optimizer.zero_grad(set_to_none=True)

    def _update(self, loss: Tensor) -> Tensor:
        """Sum over the processes, mask, clip, take the step; returns the loss of the whole batch."""
        if self.ranks.world > 1:
            self.ranks.sum([*(p.grad for p in self.params.values() if p.grad is not None), loss])
        if self.masks:
            torch._foreach_mul_(list(self._grads(self.masks)), list(self.masks.values()))
        if self.precision == "fp32":
            nn.utils.clip_grad_norm_(self.params.values(), self.cfg.max_grad_norm, foreach=True)
        else:
            self._clip_in_adamw()
        if self.graphs and self.device.type == "cuda":  # torch warns of capturable outside of a capture
            for group in self.optimizer.param_groups:
                group["capturable"] = torch.cuda.is_current_stream_capturing()
        self.optimizer.step()
        return loss

    def _clip_in_adamw(self) -> None:
        """Have AdamW divide the gradients by the loss scale and by what clips them, in its own pass over them.

        This saves two passes; the result is the same to rounding, and to the bit where nothing is clipped. Where fp16
        gradients overflowed, so does their norm: AdamW then changes nothing, and the loss scale is halved.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None], foreach=True)
        scale, optimizer = self.loss_scale, self.optimizer
        unscaled = norm / scale.factor if scale else norm
        divisor = ((unscaled + 1e-6) / self.cfg.max_grad_norm).clamp(min=1)
        optimizer.grad_scale = scale.factor * divisor if scale else divisor  # type: ignore[attr-defined]
        if scale:
            optimizer.found_inf = overflowed = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            scale.update(overflowed)

    def _backward(self, parts: Sequence[Batch]) -> Tensor:
        """The gradients of this process's part of the batch, in the parameters, and its part of the mean loss."""
        draws = torch.get_rng_state() if len(parts) > 1 and self.device.type == "cpu" else None
        losses, short = [], None
        try:
            for part in parts:
                if draws is not None:
                    torch.set_rng_state(draws)  # each part takes its own of the whole batch's dropout
                with out_of_memory():
                    with autocast(self.precision, self.device), dropout_of(part.share):
                        loss = self.loss(part)
                    if part.share is not None:
                        loss = loss * part.weight  # the sum over the shares is the mean of the batch
                    (loss * self.loss_scale.factor if self.loss_scale else loss).backward()
                losses.append(loss.detach())
        except torch.OutOfMemoryError as error:
            short = str(error)
        if any(self.ranks.any(short is not None)):
            raise torch.OutOfMemoryError(short or "of another process")
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _grads(self, names: Iterable[str]) -> Iterator[Tensor]:
        for name in names:
            grad = self.params[name].grad
            assert grad is not None, f"{name} is masked and takes no part in the loss"
            yield grad

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes, but for its loss."""
        moments = [state[moment] for state in self.optimizer.state.values() for moment in MOMENTS]
        scale = [self.loss_scale.factor, self.loss_scale.clean] if self.loss_scale else []
        return [*self.params.values(), *moments, *scale]

    # ---- what a checkpoint holds ----

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state as `<moment>/<parameter name>`; empty before the first step."""
        return {
            f"{moment}/{name}": self.optimizer.state[p][moment]
            for name, p in self.params.items()
            if p in self.optimizer.state
            for moment in MOMENTS
        }

    def taken(self, before: Mapping[str, Tensor] | None = None) -> int:
        """How many steps changed the weights: AdamW's count, less that of the moments `before`. Waits for the device."""
        begun = max((int(tensor) for name, tensor in (before or {}).items() if name.startswith("step/")), default=0)
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0) - begun

    @torch.no_grad()
    def set_moments(self, moments: Mapping[str, Tensor]) -> None:
        """The inverse of `moments`. What the mask removes gets none: a moment left there would move a pruned weight."""
        for name, p in self.params.items():
            if f"step/{name}" in moments:
                state = {moment: moments[f"{moment}/{name}"].to(self.device, copy=True) for moment in MOMENTS}
                for moment in MOMENTS[:2]:
                    if name in self.masks:
                        state[moment].mul_(self.masks[name])
                self.optimizer.state[p] = state
