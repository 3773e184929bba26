"""What the library asks of a task. An adapter is one file here."""

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
    """A task turns data into stores of examples, a batch into a loss and into outputs, and outputs into metrics."""

    name: str
    metric: str  # the paper's metric, a key of what `score` returns

    @property
    def rows(self) -> Literal["example", "token", "any"]:
        """What a row of `outputs` is of; `any`: their order says nothing."""
        ...

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        """The network with this task's head, fp32 on the CPU, and its tokenizer."""
        ...

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[Store, Mapping[str, Store]]:
        """The training set and the evaluation sets by name, limited as `cfg` says."""
        ...

    def augment_batch(self, batch: Batch, step: int, seed: int) -> Batch:
        """The training batch of a step, changed as the task draws it anew each time; most tasks change nothing."""
        ...

    def loss(self, net: Net, batch: Batch) -> Tensor:
        """The mean loss of a packed batch, a scalar. Never waits for the device."""
        ...

    def predict(self, net: Net, batch: Batch) -> Tensor:
        """What evaluation keeps of a packed batch: [rows, ...]."""
        ...

    def compute_metrics(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store]) -> dict[str, float]:
        """Metrics from each evaluation set's outputs, in the set's order."""
        ...

    def warnings(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store]) -> list[str]:
        """What the metrics do not say of a network that learned nothing: the same answer to everything, or worse than chance."""
        ...

    def compare_with_evaluate(
        self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Store], ours: dict[str, float]
    ) -> str:
        """Hold `ours` against another implementation of the metrics; a line to print."""
        ...


def create(name: str) -> Task:
    """The adapter of a task."""
    from bert_tickets.tasks.glue import Glue
    from bert_tickets.tasks.mlm import Mlm
    from bert_tickets.tasks.squad import Squad

    return {"squad": Squad, "mlm": Mlm}[name]() if name in ("squad", "mlm") else Glue(name)
