"""What the library asks of a task. An adapter is one file here."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bert_tickets.batches import Batch, TokenStore
from bert_tickets.config import Config
from bert_tickets.models import Net


class Task(Protocol):
    """A task turns data into token stores, a batch into logits and a loss, and logits into metrics."""

    name: str
    metric: str  # the paper's metric, a key of what `score` returns

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        """The network with this task's head, fp32 on the CPU, and its tokenizer."""
        ...

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[TokenStore, dict[str, TokenStore]]:
        """The training set and the evaluation sets by name, limited as `cfg` says."""
        ...

    def logits(self, net: Net, batch: Batch) -> Tensor:
        """What the network says of a packed batch, a row per example."""
        ...

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        ...

    def score(self, logits: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics from each evaluation set's logits ([n, ...], in the set's order) and labels."""
        ...

    def check(self, logits: dict[str, np.ndarray], labels: dict[str, np.ndarray], ours: dict[str, float]) -> str:
        """Hold `ours` against another implementation of the metrics; a line to print."""
        ...
