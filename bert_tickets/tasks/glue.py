"""The nine GLUE tasks: loss, predictions and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.data.batches import TokenStore, subset
from bert_tickets.data.glue_files import MAX_BROKEN, ROWS, Example, read_folder, read_hub
from bert_tickets.data.token_cache import tokenize
from bert_tickets.errors import UserError
from bert_tickets.modeling.bert import Net, classify
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.packing import Batch, at_least_fp32
from bert_tickets.tasks import Outputs, Stores, Task
from bert_tickets.tasks.metrics import compare_with_evaluate, glue_metric
from bert_tickets.tasks.sanity import overlap, unknown_tokens


class Glue(Task):
    """One GLUE task."""

    rows = "example"

    def __init__(self, name: str) -> None:
        self.name, self.row = name, ROWS[name]
        self.metric = self.row.metrics[0]
        self.regression = not self.row.labels

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        self.metric = cfg.metric or self.row.metrics[0]
        if self.metric not in self.row.all_metrics:
            raise UserError(f"--metric {self.metric}: {self.name} has {' and '.join(self.row.all_metrics)}")
        net, tokenizer = load_bert(cfg.model, "classifier", cfg.init, cfg.train.seed, labels=len(self.row.labels) or 1)
        if not self.regression:
            net.config.id2label = dict(enumerate(self.row.classes))
            net.config.label2id = {label: number for number, label in net.config.id2label.items()}
        net.config.problem_type = "regression" if self.regression else "single_label_classification"
        return net, tokenizer

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[TokenStore, dict[str, TokenStore]]:
        splits = read_hub(self.name, self.row) if cfg.data_dir is None else read_folder(Path(cfg.data_dir), self.row)
        train = subset(splits.pop("train"), cfg.limit_train, cfg.subset_seed)
        evals = {split: examples[: cfg.limit_eval] for split, examples in splits.items()}
        self.data_warnings: list[str] = []
        for split, examples in evals.items():
            self.data_warnings += overlap(train, examples, split, "examples")
        if len({label for _, label in train}) == 1:
            self.data_warnings.append(f"all training labels are {self._answer(train[0][1])}")
        store = self._store("train", train, tokenizer, cfg.max_length, device)
        return store, {split: self._store(split, found, tokenizer, cfg.max_length, device) for split, found in evals.items()}

    def _store(self, split: str, examples: list[Example], tokenizer: Any, max_length: int, device: torch.device) -> TokenStore:
        columns = [list(column) for column in zip(*(texts for texts, _ in examples), strict=True)]
        labels = np.array([label for _, label in examples], dtype=np.float32 if self.regression else np.int64)
        tokens = tokenize(tokenizer, columns, max_length)
        self.data_warnings += unknown_tokens(tokens.ids, tokenizer, split)
        if (empty := sum(not all(texts) for texts, _ in examples)) > MAX_BROKEN * len(examples):
            self.data_warnings.append(f"{empty} of {len(examples)} examples of {split} have an empty text")
        return TokenStore(tokens, labels, device)

    def loss(self, net: Net, batch: Batch) -> Tensor:
        return self.loss_of(classify(net, batch), batch.labels)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the squared error of similarity scores, or the cross-entropy of classes, in fp32 at least."""
        logits = logits.to(at_least_fp32(logits))
        return F.mse_loss(logits.squeeze(1), labels) if self.regression else F.cross_entropy(logits, labels)

    def predict(self, net: Net, batch: Batch) -> Tensor:
        """Compute the logits, [B, labels]."""
        return classify(net, batch)

    def decode(self, logits: np.ndarray) -> np.ndarray:
        """Return the similarity scores, or the classes: [n, labels] to [n]."""
        return logits[:, 0] if self.regression else logits.argmax(axis=1)

    def compute_metrics(self, outputs: Outputs, stores: Stores) -> dict[str, float]:
        """Compute the row's metrics; those of MNLI's mismatched set have the suffix `_mm`."""
        values = {}
        for split, logits in outputs.items():
            suffix = "_mm" if split.endswith("mismatched") else ""
            for metric in self.row.metrics:
                values[metric + suffix] = glue_metric(metric, self.decode(logits), stores[split].labels.cpu().numpy())
        return values

    def warnings(self, outputs: Outputs, stores: Stores) -> list[str]:
        """Return warnings about the data, constant predictions or labels, and a metric below chance: the frequency of the most
        common class for accuracy, 0 for a correlation."""
        found = list(self.data_warnings)
        for split, logits in outputs.items():
            predicted, labels = self.decode(logits), stores[split].labels.cpu().numpy()
            if np.ptp(labels) == 0:
                found.append(f"all {len(labels)} labels on {split} are {self._answer(labels[0])}: its metrics are meaningless")
            if np.ptp(predicted) < 1e-4:
                found.append(f"all {len(predicted)} predictions on {split} are {self._answer(predicted[0])}")
            if np.ptp(labels) == 0 or np.ptp(predicted) < 1e-4:
                continue
            metric = self.row.metrics[0]
            value = glue_metric(metric, predicted, labels)
            chance = np.bincount(labels).max() / len(labels) if metric == "accuracy" else 0.0
            if value < chance:
                found.append(f"{metric} {value:.4f} on {split} is below chance ({chance:.4f})")
        return found

    def _answer(self, value: float) -> str:
        return f"{value:.4g}" if self.regression else self.row.classes[int(value)]

    def compare_with_evaluate(self, outputs: Outputs, stores: Stores, ours: Mapping[str, float]) -> str:
        split = next(iter(self.row.dev))
        labels = stores[split].labels.cpu().numpy()
        return compare_with_evaluate(self.name, self.decode(outputs[split]), labels, ours)
