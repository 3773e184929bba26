"""Ablations of the training step, each with one speed-up off. The increase in time is the contribution of that speed-up."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from bert_tickets.bench.baselines import Case, eager, packed_step
from bert_tickets.bench.timing import TrainStep
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.modeling import attention, dropout


def without_packing(case: Case) -> TrainStep:
    """Build the step with all examples of --max-length tokens. (MLM's are so already.)"""
    store, longest = case.store, case.cfg.max_length
    if not isinstance(store, TokenStore):
        return eager(case)
    count = len(store) * longest
    tokens = Tokens(np.resize(np.arange(5, 100, dtype=np.int32), count), np.zeros(count, np.uint8), np.full(len(store), longest))
    return eager(dataclasses.replace(case, store=TokenStore(tokens, store.labels.cpu().numpy(), store.device)))


def without_length_groups(case: Case) -> TrainStep:
    """Build the step with all examples of a batch padded to its longest in attention."""
    return _patched(eager(case), lambda: patch.object(attention, "by_similar_length", lambda lengths: [np.arange(len(lengths))]))


def without_short_draws(case: Case) -> TrainStep:
    """Build the step with torch's Bernoulli numbers in dropout."""

    def factors(like: Tensor, p: float) -> Tensor:
        return like.new_empty(like.shape).bernoulli_(1 - p).div_(1 - p)

    return _patched(eager(case), lambda: patch.object(dropout, "factors", factors))


def without_fused_update(case: Case) -> TrainStep:
    """Build the step with AdamW and clipping tensor by tensor."""
    step, take_step = packed_step(case)
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in step.optimizer.param_groups]
    step.optimizer = torch.optim.AdamW(groups, lr=case.cfg.train.lr, eps=case.cfg.train.adam_epsilon, foreach=False)
    clip = nn.utils.clip_grad_norm_

    def clip_each(params: Any, norm: float, foreach: bool) -> Tensor:
        return clip(params, norm, foreach=False)

    def unscale_and_clip() -> None:  # in half precision, before AdamW instead of within
        for p in step.params.values():
            if p.grad is not None and step.loss_scale:
                p.grad.div_(step.loss_scale.factor)
        clip(step.params.values(), case.cfg.train.max_grad_norm, foreach=False)

    step._clip_in_adamw = unscale_and_clip  # type: ignore[method-assign]
    return _patched(take_step, lambda: patch.object(nn.utils, "clip_grad_norm_", clip_each))


def without_gradient_masks(case: Case) -> TrainStep:
    """Build the step with torch's hooks, which mask the weights in every forward pass."""
    return packed_step(case, mask_weights=True)[1]


def with_loss_read(case: Case) -> TrainStep:
    """Build the step with the loss read on the host after every step."""
    step = eager(case)
    return lambda i: step(i).item()


LEVERS = {
    "packing": without_packing,
    "attention by similar lengths": without_length_groups,
    "16-bit dropout draws": without_short_draws,
    "fused AdamW and clip": without_fused_update,
    "masks on gradients": without_gradient_masks,
    "no wait for the loss": with_loss_read,
}


def _patched(step: TrainStep, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> TrainStep:
    def take_step(i: int) -> Any:
        with context():
            return step(i)

    return take_step
