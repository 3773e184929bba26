"""The interface of a task. Each kind of task is one file here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.data.batches import Store
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.packing import Batch


class Task(Protocol):
    """The data of a task, its loss and predictions on packed batches, and its metrics."""

    name: str
    metric: str  # the paper's metric, a key of `compute_metrics`

    @property
    def rows(self) -> Literal["example", "token", "any"]:
        """Whether `predict` returns a row per example, a row per token, or rows in any order."""
        ...

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        """Load the network with this task's head, in fp32 on the CPU, and its tokenizer."""
        ...

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[Store, Mapping[str, Store]]:
        """Load the training set, and the evaluation sets by name, with the limits of `cfg`."""
        ...

    def augment_batch(self, batch: Batch, step: int, seed: int) -> Batch:
        """Augment the training batch of a step (masked language modelling masks its tokens), or return it unchanged."""
        ...

    def loss(self, net: Net, batch: Batch) -> Tensor:
        """Compute the mean loss of a packed batch, a scalar. Never waits for the device."""
        ...

    def predict(self, net: Net, batch: Batch) -> Tensor:
        """Compute the predictions for a packed batch: [rows, ...]."""
        ...

    def compute_metrics(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store]) -> dict[str, float]:
        """Compute the metrics from the predictions for each evaluation set."""
        ...

    def warnings(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store]) -> list[str]:
        """Return warnings about constant predictions, metrics below chance, and defects of the data."""
        ...

    def compare_with_evaluate(
        self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store], ours: dict[str, float]
    ) -> str:
        """Compare the metrics `ours` with another implementation; returns a line to print."""
        ...
