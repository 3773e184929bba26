"""Trained coefficients of heads and neurons, and the hooks that record them and stop a search (EarlyBERT; Chen et al. 2021)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bert_tickets.files import beginning_sha256
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.packing import Batch
from bert_tickets.modeling.units import all_units, effective_weights
from bert_tickets.training.functional import call_with
from bert_tickets.training.hooks import check_finite
from bert_tickets.training.loop import Hook, Loop

T = TypeVar("T")
FLUSH = 64  # steps whose coefficients are on the device at most: 9.5 MB of BERT-base


class GatedNetwork:
    """A network whose heads [L, A] and neurons [L, I] are multiplied by coefficients, leaves that begin at 1.

    `kept` are the units of a slim network: the coefficients of the others have no effect, no gradient, and stay at 1.
    """

    def __init__(self, net: Net, kept: Mask | None = None) -> None:
        like, units = next(net.parameters()), all_units(net.config, "heads+neurons")
        self.net = net
        self.coefficients = {kind: every.to(like.device, like.dtype).requires_grad_() for kind, every in units.items()}
        self._kept = {kind: [row.nonzero().flatten().to(like.device) for row in rows] for kind, rows in (kept or {}).items()}

    def params(self) -> dict[str, Tensor]:
        """Return the coefficients as leaves to train, `coefficient.<kind>`, which have no weight decay."""
        return {f"coefficient.{kind}": values for kind, values in self.coefficients.items()}

    def __call__(self, function: Callable[[Net, Batch], T], batch: Batch) -> T:
        """Return `function(net, batch)` of the gated network."""
        gates: dict[str, Any] = dict(self.coefficients)
        for kind, indices in self._kept.items():
            gates[kind] = [row.index_select(0, kept) for row, kept in zip(self.coefficients[kind], indices, strict=True)]
        return call_with(self.net, effective_weights(gates, dict(self.net.named_parameters())), function, batch)

    def penalty(self, heads: float, neurons: float) -> Tensor:
        """Compute heads * sum |c_heads| + neurons * sum |c_neurons|."""
        return heads * self.coefficients["heads"].abs().sum() + neurons * self.coefficients["neurons"].abs().sum()

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the network's own weights by the coefficients: without these it then computes the same."""
        weights = dict(self.net.named_parameters())
        for name, weight in effective_weights(self.coefficients, weights).items():
            weights[name].copy_(weight)


class Record(Hook):
    """Record the coefficients after each step in a file: float32, a row of heads, then neurons, for each step.

    They are gathered on the device, and written every `FLUSH` steps and with a checkpoint, so that a step never waits for it.
    The main process alone has the file. A resumed level writes its rows after the checkpoint's step again.
    """

    def __init__(self, coefficients: Mapping[str, Tensor], path: Path) -> None:
        self.shapes = {kind: values.shape for kind, values in coefficients.items()}
        self.values, self.path = [values.detach() for values in coefficients.values()], path
        self.width = sum(values.numel() for values in self.values)
        self.written = 0  # rows in the file
        self.waiting = 0  # rows in the buffer
        self.buffer = torch.empty(FLUSH, self.width, device=self.values[0].device)

    def begin(self, loop: Loop) -> None:
        self.is_main = loop.step.group.rank == 0

    def __call__(self, loop: Loop) -> None:
        if self.is_main:
            self.buffer[self.waiting].copy_(torch.cat([values.flatten() for values in self.values]))
            self.waiting += 1
            if self.waiting == FLUSH:
                self.flush()

    def flush(self) -> None:
        """Write the rows that are still on the device."""
        if self.waiting:
            if not self.written:
                self.path.write_bytes(b"")
            with self.path.open("r+b") as file:
                file.seek(self.written * self.width * 4)
                file.write(self.buffer[: self.waiting].cpu().numpy().tobytes())
            self.written, self.waiting = self.written + self.waiting, 0

    def rows(self) -> np.ndarray:
        """Return the rows so far, [steps, L * A + L * I], mapped into memory. Of the main process alone."""
        self.flush()
        return np.memmap(self.path, np.float32, "r", shape=(self.written, self.width))

    def after(self, updates: int) -> dict[str, Tensor]:
        """Return the coefficients after so many updates; after none all are 1."""
        row = torch.from_numpy(np.array(self.rows()[updates - 1])) if updates else torch.ones(self.width)
        parts = row.split([shape.numel() for shape in self.shapes.values()])
        return {kind: part.view(shape) for (kind, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def write(self, path: Path) -> None:
        """Write the record in numpy's format."""
        with path.open("wb") as file:
            np.save(file, self.rows())

    def state(self) -> tuple[dict[str, Tensor], dict]:
        if not self.is_main:
            return {}, {}  # only the main process writes it
        self.flush()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())  # before the checkpoint that counts on it
        size = self.written * self.width * 4
        return {}, {"rows": self.written, "file": self.path.name, "bytes": size, "sha256": beginning_sha256(self.path, size)}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        self.written = facts["rows"]


class StopWhen(Hook):
    """End the loop after the first of every `every` steps at which `ask(step)` of the main process is true."""

    def __init__(self, every: int, ask: Callable[[int], bool]) -> None:
        self.every, self.ask = every, ask
        self.stopped = False

    def begin(self, loop: Loop) -> None:
        self.loop = loop

    def __call__(self, loop: Loop) -> None:
        if loop.at % self.every:
            return
        check_finite(loop)
        if loop.step.group.on_main(lambda: self.ask(loop.at)):
            self.stopped, loop.steps = True, loop.at

    def state(self) -> tuple[dict[str, Tensor], dict]:
        return {}, {"stopped": self.stopped}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        if facts["stopped"]:
            self.stopped, self.loop.steps = True, self.loop.at
