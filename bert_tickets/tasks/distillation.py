"""Distillation of hidden states: how far a pruned network's layers are from the dense network's (Liu et al. 2022, TAMT-KD)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets.modeling.bert import Net, encode
from bert_tickets.modeling.packing import Batch, at_least_fp32


def hidden_states(net: Net, batch: Batch, padded_to: int | None = None) -> list[Tensor]:
    """Compute each layer's hidden states, without the embeddings': L tensors [T, hidden].

    `padded_to` pads every example to that many tokens, as the released code does, and returns the states of padding too.
    """
    states: list[Tensor] = []
    if padded_to is None:
        encode(net, batch, states)
        return states
    place = torch.arange(padded_to, device=batch.starts.device)
    real = place < batch.lens[:, None]  # [B, padded_to]
    token = batch.starts[:, None] + torch.minimum(place, batch.lens[:, None] - 1)
    ids, types = (torch.where(real, x[0][token], 0) for x in (batch.input_ids, batch.token_type_ids))  # [PAD] is 0
    mask = real[:, None, None, :].expand(-1, 1, padded_to, -1)  # taken as it is: of a smaller one transformers reads the values
    given = {"attention_mask": mask, "token_type_ids": types, "output_hidden_states": True}
    return [x.flatten(0, 1) for x in net.bert(ids, **given).hidden_states[1:]]


@contextmanager
def as_teacher(net: Net, dropout: bool) -> Iterator[None]:
    """Let `net` compute without gradients, and unless `dropout` in evaluation mode."""
    training = net.training
    net.train(training and dropout)
    try:
        with torch.no_grad():
            yield
    finally:
        net.train(training)


def distance(student: list[Tensor], teacher: list[Tensor], counted: Tensor, kind: Literal["cosine", "mse"] = "cosine") -> Tensor:
    """Compute the mean over layers and counted positions of 1 - cos(student, teacher), or of the mean squared error.

    `counted` [T] (bool) leaves out positions that belong to no example.
    """
    total = torch.zeros((), device=counted.device)
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours.to(at_least_fp32(ours)), theirs.to(at_least_fp32(theirs))
        each = (ours - theirs).square().mean(1) if kind == "mse" else 1 - F.cosine_similarity(ours, theirs, dim=1)
        total = total + torch.where(counted, each, 0.0).sum() / counted.sum()
    return total / len(student)


def real_tokens(batch: Batch) -> Tensor:
    """Return which of a batch's T tokens belong to an example, [T] (bool)."""
    return torch.arange(batch.input_ids.shape[1], device=batch.starts.device) < batch.lens.sum()


def all_positions(batch: Batch, padded_to: int) -> Tensor:
    """Return that all positions of a padded batch count, [B * padded_to] (bool)."""
    return torch.ones(len(batch.lengths) * padded_to, dtype=torch.bool, device=batch.starts.device)
