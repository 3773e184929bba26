"""The interface of a task. Each kind of task is one file here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.data.batches import Store
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.packing import Batch

Outputs = Mapping[str, np.ndarray]  # the predictions for each evaluation set
Stores = Mapping[str, Any]  # the evaluation sets


class Task(ABC):
    """The data of a task, its loss and predictions on packed batches, and its metrics."""

    name: str
    metric: str  # the paper's metric, a key of `compute_metrics`
    rows: Literal["example", "token", "any"]  # `predict` returns a row per example, a row per token, or rows in any order
    data_warnings: Sequence[str] = ()  # about the data, whatever the predictions

    @abstractmethod
    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        """Load the network with this task's head, in fp32 on the CPU, and its tokenizer."""

    @abstractmethod
    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[Store, Mapping[str, Store]]:
        """Load the training set, and the evaluation sets by name, with the limits of `cfg`."""

    def augment_batch(self, batch: Batch, step: int, seed: int) -> Batch:
        """Augment the training batch of a step (masked language modelling masks its tokens), or return it unchanged."""
        return batch

    @abstractmethod
    def loss(self, net: Net, batch: Batch) -> Tensor:
        """Compute the mean loss of a packed batch, a scalar. Never waits for the device."""

    @abstractmethod
    def predict(self, net: Net, batch: Batch) -> Tensor:
        """Compute the predictions for a packed batch: [rows, ...]."""

    @abstractmethod
    def compute_metrics(self, outputs: Outputs, stores: Stores) -> dict[str, float]:
        """Compute the metrics from the predictions for each evaluation set."""

    @abstractmethod
    def warnings(self, outputs: Outputs, stores: Stores) -> list[str]:
        """Return warnings about constant predictions, metrics below chance, and defects of the data."""

    def compare_with_evaluate(self, outputs: Outputs, stores: Stores, ours: Mapping[str, float]) -> str:
        """Compare the metrics `ours` with the `evaluate` package on the same predictions; returns a line to print."""
        return f"metrics not compared with evaluate, which has none for {self.name}"
