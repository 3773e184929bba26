"""SQuAD v1.1: loss, predictions and metrics over windows of the contexts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.data.batches import TokenStore, order
from bert_tickets.data.squad_features import best_spans, eval_windows, span_text, train_windows
from bert_tickets.data.squad_files import Question, read_folder, read_hub
from bert_tickets.data.token_cache import Arrays, Tokens
from bert_tickets.errors import UserError
from bert_tickets.modeling.bert import Net, encode
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.packing import Batch
from bert_tickets.tasks.metrics import compare_with_evaluate, squad_scores
from bert_tickets.tasks.sanity import shared, unread


class Squad:
    """Questions answered by spans of their contexts, as `bert_tickets.tasks.Task` asks."""

    name, metric = "squad", "f1"
    rows: Literal["token"] = "token"
    data_warnings: Sequence[str] = ()  # what the data say against every score

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        return load_bert(cfg.model, "qa", cfg.init, cfg.train.seed)

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[TokenStore, dict[str, TokenStore]]:
        splits = read_folder(Path(cfg.data_dir)) if cfg.data_dir is not None else read_hub()
        taught = _taught(splits["train"], cfg.limit_train)
        columns = [q.question for q, _ in taught], [q.context for q, _ in taught], [answer for _, answer in taught]
        learned = train_windows(tokenizer, *columns, cfg.max_length, cfg.doc_stride)
        _report(learned, [q.id for q, _ in taught])
        self.asked = splits["validation"][: cfg.limit_eval]
        texts = [q.question for q in self.asked], [q.context for q in self.asked]
        self.windows = eval_windows(tokenizer, *texts, cfg.max_length, cfg.doc_stride)
        known = [(q.question, q.context) for q, _ in taught]
        self.data_warnings = [
            *shared(known, list(zip(*texts, strict=True)), "validation", "questions"),
            *_misplaced(self.asked),
            *unread(learned["ids"], tokenizer, "train"),
            *unread(self.windows["ids"], tokenizer, "validation"),
        ]
        return _store(learned, learned["labels"], device), {"validation": self._eval_store(device)}

    def _eval_store(self, device: torch.device) -> TokenStore:
        store = _store(self.windows, np.zeros((len(self.windows["lengths"]), 2), np.int64), device)
        scored = json.dumps([(q.id, q.context, q.answers) for q in self.asked])  # the score depends on these, and on no labels
        store.sha256 = hashlib.sha256((store.sha256 + scored).encode()).hexdigest()
        return store

    def augment_batch(self, batch: Batch, step: int, seed: int) -> Batch:
        return batch

    def predict(self, net: Net, batch: Batch) -> Tensor:
        """[T, 2]: each token's start and end logit."""
        hidden = encode(net, batch)
        with torch.autocast(hidden.device.type, enabled=False):  # half-precision logits tie, and the first would win
            return net.qa_outputs(hidden.to(net.qa_outputs.weight.dtype))

    def loss(self, net: Net, batch: Batch) -> Tensor:
        """The mean over windows of the mean of the start's and the end's cross-entropy, each over the window's own tokens."""
        logits = self.predict(net, batch)
        place, lens = torch.arange(batch.longest, device=logits.device), batch.lens[:, None]
        token = batch.starts[:, None] + torch.minimum(place, lens - 1)  # [B, L]; never a spare token
        grid = logits.index_select(0, token.flatten()).view(*token.shape, 2)
        grid = grid.masked_fill((place >= lens)[..., None], float("-inf"))
        return F.cross_entropy(grid.permute(2, 0, 1).flatten(0, 1), batch.labels.T.flatten())

    def decode(self, logits: np.ndarray) -> dict[str, str]:
        """The answer to every question, "" where no span may be one, from the logits of all tokens ([N, 2])."""
        spans = best_spans(logits, self.windows)
        if none := int((spans[:, 0] < 0).sum()):
            print(f"{none} of {len(spans)} questions are left without an answer: no likely start had a likely end")
        return {
            q.id: span_text(q.context, begin, end) if end > 0 else ""
            for q, (begin, end) in zip(self.asked, spans.tolist(), strict=True)
        }

    def compute_metrics(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any]) -> dict[str, float]:
        """F1 and exact match, in [0, 1]."""
        return squad_scores(self.decode(outputs["validation"]), {q.id: [text for text, _ in q.answers] for q in self.asked})

    def warnings(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any]) -> list[str]:
        """Whether the likeliest start of every window is one and the same place, whatever is in them: `[CLS]` for a network
        that says nothing. And what the data themselves say."""
        ends = np.cumsum(self.windows["lengths"])[:-1]
        starts = {int(window[:, 0].argmax()) for window in np.split(outputs["validation"], ends)}
        if len(starts) > 1 or len(ends) == 0:
            return list(self.data_warnings)
        return [*self.data_warnings, f"the likeliest start in all {len(ends) + 1} windows is their token {starts.pop()}"]

    def compare_with_evaluate(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any], ours: dict[str, float]) -> str:
        """What the `evaluate` package says of the same predictions; a line to print."""
        predictions = [{"id": id, "prediction_text": text} for id, text in self.decode(outputs["validation"]).items()]
        texts = [{"text": [text for text, _ in q.answers], "answer_start": [at for _, at in q.answers]} for q in self.asked]
        references = [{"id": q.id, "answers": answers} for q, answers in zip(self.asked, texts, strict=True)]
        return compare_with_evaluate(self.name, predictions, references, ours)


def _taught(questions: list[Question], limit: int | None) -> list[tuple[Question, tuple[str, int]]]:
    """The training questions with the answer that each teaches, `limit` of them."""
    taught = [(question, answer) for question in questions if (answer := question.standing) is not None]
    if len(taught) < len(questions):
        print(f"{len(questions) - len(taught)} of {len(questions)} training questions left out: no answer stands where it should")
    if limit is not None:
        chosen = order(len(taught), seed=0, epoch=0)[:limit]  # whatever the run's seed: one smaller task
        taught = [taught[i] for i in chosen.tolist()]
    return taught


def _misplaced(asked: list[Question]) -> list[str]:
    """Whether the gold answers of many questions to be asked are not in their contexts: nobody could find them."""
    count = sum(question.standing is None for question in asked)
    return [f"{count} of {len(asked)} questions of validation have no answer where it should stand"] * (count > 0.01 * len(asked))


def _report(learned: Arrays, ids: list[str]) -> None:
    """Say of which training questions (by id) the answer is not what is learned; `UserError` where nothing is."""
    if not len(learned["labels"]):
        raise UserError("none of SQuAD's training questions has an answer to learn")
    for name, what in (
        ("lost", "left out of training, as their answers cover no token"),
        ("inexact", "taught with answers that begin or end within a token, all of which is taught"),
    ):
        if found := [ids[i] for i in learned[name]]:
            print(f"{len(found)} of {len(ids)} training questions are {what}: {', '.join(found[:5])}{' ...' * (len(found) > 5)}")


def _store(arrays: Arrays, labels: np.ndarray, device: torch.device) -> TokenStore:
    return TokenStore(Tokens(arrays["ids"], arrays["types"], arrays["lengths"]), labels, device)
