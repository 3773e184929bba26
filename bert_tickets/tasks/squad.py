"""SQuAD v1.1: loss, predictions and metrics over windows of the contexts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.data.batches import TokenStore, subset
from bert_tickets.data.squad_features import best_spans, eval_windows, span_text, train_windows
from bert_tickets.data.squad_files import read_folder, read_hub
from bert_tickets.data.token_cache import Arrays, Tokens
from bert_tickets.errors import UserError
from bert_tickets.modeling.bert import Net, encode
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.packing import Batch
from bert_tickets.tasks import Outputs, Stores, Task
from bert_tickets.tasks.metrics import compare_with_evaluate, squad_scores
from bert_tickets.tasks.sanity import overlap, unknown_tokens

MISPLACED = "no answer is in the context at its answer_start"


class Squad(Task):
    """Questions answered by spans of their contexts."""

    name, metric = "squad", "f1"
    rows = "token"

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        return load_bert(cfg.model, "qa", cfg.init, cfg.train.seed)

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[TokenStore, dict[str, TokenStore]]:
        splits = read_hub() if cfg.data_dir is None else read_folder(Path(cfg.data_dir))
        found = [(question, answer) for question in splits["train"] if (answer := question.found_answer) is not None]
        if len(found) < len(splits["train"]):
            print(f"skipped {len(splits['train']) - len(found)} of {len(splits['train'])} training questions: {MISPLACED}")
        train = subset(found, cfg.limit_train, cfg.subset_seed)
        columns = [q.question for q, _ in train], [q.context for q, _ in train], [answer for _, answer in train]
        arrays = train_windows(tokenizer, *columns, cfg.max_length, cfg.doc_stride)
        if lost := [train[i][0].id for i in arrays["lost"]]:
            shown = ", ".join(lost[:5]) + " ..." * (len(lost) > 5)
            print(f"skipped {len(lost)} of {len(train)} training questions: no token covers the answer: {shown}")
        if not len(arrays["labels"]):
            raise UserError("none of SQuAD's training questions has an answer to learn")
        self.asked = splits["validation"][: cfg.limit_eval]
        texts = [q.question for q in self.asked], [q.context for q in self.asked]
        self.windows = eval_windows(tokenizer, *texts, cfg.max_length, cfg.doc_stride)
        misplaced = sum(question.found_answer is None for question in self.asked)
        self.data_warnings = [
            *overlap([(q.question, q.context) for q, _ in train], list(zip(*texts, strict=True)), "validation", "questions"),
            *[f"{misplaced} of {len(self.asked)} questions of validation: {MISPLACED}"] * (misplaced > 0.01 * len(self.asked)),
            *unknown_tokens(arrays["ids"], tokenizer, "train"),
            *unknown_tokens(self.windows["ids"], tokenizer, "validation"),
        ]
        evals = _store(self.windows, np.zeros((len(self.windows["lengths"]), 2), np.int64), device)
        scored = json.dumps([(q.id, q.context, q.answers) for q in self.asked])  # metrics depend on these, not on labels
        evals.sha256 = hashlib.sha256((evals.sha256 + scored).encode()).hexdigest()
        return _store(arrays, arrays["labels"], device), {"validation": evals}

    def predict(self, net: Net, batch: Batch) -> Tensor:
        """Compute each token's start and end logit: [T, 2]."""
        hidden = encode(net, batch)
        with torch.autocast(hidden.device.type, enabled=False):  # half-precision logits tie, and the first would win
            return net.qa_outputs(hidden.to(net.qa_outputs.weight.dtype))

    def loss(self, net: Net, batch: Batch) -> Tensor:
        """Compute the mean over windows of the start's and the end's cross-entropy, each over the window's own tokens."""
        logits = self.predict(net, batch)
        place, lens = torch.arange(batch.longest, device=logits.device), batch.lens[:, None]
        token = batch.starts[:, None] + torch.minimum(place, lens - 1)  # [B, L]; never a token of padding
        grid = logits.index_select(0, token.flatten()).view(*token.shape, 2)
        grid = grid.masked_fill((place >= lens)[..., None], float("-inf"))
        return F.cross_entropy(grid.permute(2, 0, 1).flatten(0, 1), batch.labels.T.flatten())

    def decode(self, logits: np.ndarray) -> dict[str, str]:
        """Return the answer to every question, or "" if no span qualifies, from the logits of all tokens ([N, 2])."""
        spans = best_spans(logits, self.windows)
        if none := int((spans[:, 0] < 0).sum()):
            print(f"{none} of {len(spans)} questions have no answer: no likely start precedes a likely end")
        return {
            q.id: span_text(q.context, begin, end) if end > 0 else ""
            for q, (begin, end) in zip(self.asked, spans.tolist(), strict=True)
        }

    def compute_metrics(self, outputs: Outputs, stores: Stores) -> dict[str, float]:
        """Compute F1 and exact match, in [0, 1]."""
        return squad_scores(self.decode(outputs["validation"]), {q.id: [text for text, _ in q.answers] for q in self.asked})

    def warnings(self, outputs: Outputs, stores: Stores) -> list[str]:
        """Return warnings about the data, and one if the most likely start is the same position in all windows."""
        ends = np.cumsum(self.windows["lengths"])[:-1]
        starts = {int(window[:, 0].argmax()) for window in np.split(outputs["validation"], ends)}
        if len(starts) > 1 or len(ends) == 0:
            return list(self.data_warnings)
        return [*self.data_warnings, f"the most likely start in all {len(ends) + 1} windows is token {starts.pop()}"]

    def compare_with_evaluate(self, outputs: Outputs, stores: Stores, ours: Mapping[str, float]) -> str:
        predictions = [{"id": id, "prediction_text": text} for id, text in self.decode(outputs["validation"]).items()]
        texts = [{"text": [text for text, _ in q.answers], "answer_start": [at for _, at in q.answers]} for q in self.asked]
        references = [{"id": q.id, "answers": answers} for q, answers in zip(self.asked, texts, strict=True)]
        return compare_with_evaluate(self.name, predictions, references, ours)


def _store(arrays: Arrays, labels: np.ndarray, device: torch.device) -> TokenStore:
    return TokenStore(Tokens(arrays["ids"], arrays["types"], arrays["lengths"]), labels, device)
