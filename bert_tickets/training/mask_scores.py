"""Mask training: a frozen network under trained scores, and the hook that refreshes its thresholds (Liu et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from bert_tickets.masking.mask import Mask
from bert_tickets.masking.straight_through import THRESHOLD, Rounding, initial_scores, masked, refresh
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.packing import Batch
from bert_tickets.training.functional import call_with
from bert_tickets.training.hooks import check_finite
from bert_tickets.training.loop import Hook, Loop

T = TypeVar("T")
MLM_HEAD = re.compile(r"cls\.predictions\.(transform\..+|bias|decoder\.bias)")  # its decoder stays as it is


class MaskedNetwork:
    """A network that runs with its matrices times 1[score > threshold]. Its own weights stay dense."""

    def __init__(self, net: Net, mask: Mask) -> None:
        """Begin with scores and thresholds that give `mask`."""
        device = next(net.parameters()).device
        scores = initial_scores(mask)
        self.net = net
        self.scores = {name: tensor.to(device).requires_grad_() for name, tensor in scores.items()}
        self.thresholds = {name: torch.full((), THRESHOLD, device=device) for name in scores}

    def params(self, *, head: bool) -> dict[str, Tensor]:
        """Freeze the network; return what is trained: the scores, as `score.<matrix>`, and with `head` the MLM head.

        The head's decoder stays frozen.
        """
        self.net.requires_grad_(False)
        found = {f"score.{name}": tensor for name, tensor in self.scores.items()}
        if head:
            found |= {name: p.requires_grad_() for name, p in self.net.named_parameters() if MLM_HEAD.fullmatch(name)}
        return found

    def __call__(self, function: Callable[[Net, Batch], T], batch: Batch) -> T:
        """Return `function(net, batch)` under the mask. A decoder that is tied to masked word embeddings stays dense."""
        weights = dict(self.net.named_parameters())
        given = {name: masked(weights[name], s, self.thresholds[name]) for name, s in self.scores.items()}
        return call_with(self.net, given, function, batch)

    @torch.no_grad()
    def refresh(self, sparsity: float, rounding: Rounding) -> Mask:
        """Set the thresholds so that each matrix has this sparsity again; returns the mask."""
        mask, thresholds = refresh(self.scores, sparsity, rounding)
        for name, threshold in thresholds.items():
            self.thresholds[name].copy_(threshold)  # in place: CUDA graphs read it
        return mask

    def kept(self) -> int:
        """Count the weights that the thresholds keep now."""
        return sum(int((tensor > self.thresholds[name]).count_nonzero()) for name, tensor in self.scores.items())


class Refresh(Hook):
    """Refresh the thresholds at intervals and at the end, and record there how far the mask has moved.

    `early` refreshes after the first step, and then one step before each interval ends, as the released code's KD does. `save`
    is called with the mask and the number of steps, and returns what joins the record.
    """

    def __init__(
        self,
        student: MaskedNetwork,
        start: Mask,
        sparsity: float,
        rounding: Rounding,
        interval: int,
        early: bool,
        save: Callable[[Mask, int], Mapping[str, Any]],
    ) -> None:
        self.student, self.start, self.sparsity, self.rounding = student, start, sparsity, rounding
        self.interval, self.early, self.save = interval, early, save
        self.records: list[dict[str, Any]] = []

    def __call__(self, loop: Loop) -> None:
        first = self.early and loop.at == 1
        if (loop.at + self.early) % self.interval and loop.at < loop.steps and not first:
            return
        check_finite(loop)
        drifted = 1 - self.student.kept() / self.start.total
        mask = self.student.refresh(self.sparsity, self.rounding)
        record = {"step": loop.at, "sparsity_before": drifted, "sparsity": mask.sparsity, "from_start": mask.distance(self.start)}
        self.records.append(record | dict(self.save(mask, loop.at)))

    def state(self) -> tuple[dict[str, Tensor], dict]:
        return dict(self.student.thresholds), {"records": self.records}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        for name, threshold in self.student.thresholds.items():
            threshold.copy_(tensors[name])
        self.records = list(facts["records"])

    def found(self) -> tuple[Mask, dict[str, Any]]:
        """Return the mask after the last refresh, with which the network's own weights are masked, and the records."""
        mask = self.student.refresh(self.sparsity, self.rounding)  # a second refresh changes nothing
        mask.apply(dict(self.student.net.named_parameters()))
        return mask, {"refreshes": self.records}
