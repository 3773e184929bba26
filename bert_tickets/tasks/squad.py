"""SQuAD v1.1: read from its published files or from the hub, answered from windows, scored as published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets import UserError
from bert_tickets import files as whole_files
from bert_tickets.batches import Batch, TokenStore, order
from bert_tickets.bert import Net, encode
from bert_tickets.config import Config
from bert_tickets.doubts import shared, unread
from bert_tickets.hub import from_hub
from bert_tickets.metrics import compare_with_evaluate, squad_scores
from bert_tickets.models import load_bert
from bert_tickets.tokens import Arrays, Tokens
from bert_tickets.windows import best_spans, eval_windows, span_text, train_windows

HUB = "rajpurkar/squad"
FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}


@dataclass(frozen=True)
class Question:
    """A question about a context, with its gold answers: each a text, and the character of the context it begins at."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]

    @property
    def standing(self) -> tuple[str, int] | None:
        """The first answer that is where it is said to be."""
        for text, start in self.answers:
            if start >= 0 and text.strip() and self.context.startswith(text, start):
                return text, start
        return None


class Squad:
    """Questions answered by spans of their contexts, as `bert_tickets.tasks.Task` asks."""

    name, metric = "squad", "f1"
    rows: Literal["token"] = "token"
    noted: Sequence[str] = ()  # what the data say against every score

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
        self.noted = [
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

    def alter(self, batch: Batch, step: int, seed: int) -> Batch:
        return batch

    def outputs(self, net: Net, batch: Batch) -> Tensor:
        """[T, 2]: each token's start and end logit."""
        hidden = encode(net, batch)
        with torch.autocast(hidden.device.type, enabled=False):  # half-precision logits tie, and the first would win
            return net.qa_outputs(hidden.to(net.qa_outputs.weight.dtype))

    def loss(self, net: Net, batch: Batch) -> Tensor:
        """The mean over windows of the mean of the start's and the end's cross-entropy, each over the window's own tokens."""
        logits = self.outputs(net, batch)
        place, lens = torch.arange(batch.longest, device=logits.device), batch.lens[:, None]
        token = batch.starts[:, None] + torch.minimum(place, lens - 1)  # [B, L]; never a spare token
        grid = logits.index_select(0, token.flatten()).view(*token.shape, 2)
        grid = grid.masked_fill((place >= lens)[..., None], float("-inf"))
        return F.cross_entropy(grid.permute(2, 0, 1).flatten(0, 1), batch.labels.T.flatten())

    def predict(self, logits: np.ndarray) -> dict[str, str]:
        """The answer to every question, "" where no span may be one, from the logits of all tokens ([N, 2])."""
        spans = best_spans(logits, self.windows)
        if none := int((spans[:, 0] < 0).sum()):
            print(f"{none} of {len(spans)} questions are left without an answer: no likely start had a likely end")
        return {
            q.id: span_text(q.context, begin, end) if end > 0 else ""
            for q, (begin, end) in zip(self.asked, spans.tolist(), strict=True)
        }

    def score(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any]) -> dict[str, float]:
        """F1 and exact match, in [0, 1]."""
        return squad_scores(self.predict(outputs["validation"]), {q.id: [text for text, _ in q.answers] for q in self.asked})

    def doubts(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any]) -> list[str]:
        """Whether the likeliest start of every window is one and the same place, whatever is in them: `[CLS]` for a network
        that says nothing. And what the data themselves say."""
        ends = np.cumsum(self.windows["lengths"])[:-1]
        starts = {int(window[:, 0].argmax()) for window in np.split(outputs["validation"], ends)}
        if len(starts) > 1 or len(ends) == 0:
            return list(self.noted)
        return [*self.noted, f"the likeliest start in all {len(ends) + 1} windows is their token {starts.pop()}"]

    def check(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any], ours: dict[str, float]) -> str:
        """What the `evaluate` package says of the same predictions; a line to print."""
        predictions = [{"id": id, "prediction_text": text} for id, text in self.predict(outputs["validation"]).items()]
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


# ---- reading ----


def read_folder(data_dir: Path) -> dict[str, list[Question]]:
    """Both published files of a folder."""
    for file in FILES.values():
        if not (data_dir / file).is_file():
            raise UserError(
                f"no SQuAD data: {data_dir / file} is not there. Three ways to get it:\n"
                f"  leave out --data-dir on a machine that reaches the hub ({HUB} is downloaded and cached);\n"
                f"  fill the cache on another machine and set HF_HOME to a copy of it, with HF_HUB_OFFLINE=1;\n"
                f"  give --data-dir a folder with the published files {' and '.join(FILES.values())}."
            )
    return {split: read_json(data_dir / file) for split, file in FILES.items()}


def read_json(path: Path) -> list[Question]:
    """The questions of one published file. Raises `UserError` with the place of what is not as it should be."""
    questions: dict[str, Question] = {}
    for place, question in _parse(whole_files.read_json(path), path):
        if question.id in questions:
            raise UserError(f"{path}: {place}.id {question.id[:80]!r} is another question's already")
        questions[question.id] = question
    if not questions:
        raise UserError(f"{path} has no questions")
    return list(questions.values())


def _parse(content: Any, path: Path) -> Iterator[tuple[str, Question]]:
    """Each question with its place in the file."""

    def get(node: Any, place: str, key: str, kind: type) -> Any:
        if not isinstance(node, dict):
            raise UserError(f"{path}: {place} is {_kind(node)}, where SQuAD has an object with {key!r}")
        if key not in node:
            raise UserError(f"{path}: {place} has no {key!r}")
        value = node[key]
        if type(value) is not kind:
            raise UserError(f"{path}: {place}.{key} is {_kind(value)}, where SQuAD has {_KINDS[kind]}")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{path}: {place}.{key} is no text: character {error.start} is half a surrogate pair") from None
        return value

    def parts(node: Any, place: str, key: str) -> Iterator[tuple[str, Any]]:
        for number, part in enumerate(get(node, place, key, list)):
            yield f"{place}.{key}[{number}]".removeprefix("the file."), part

    for place, article in parts(content, "the file", "data"):
        for inner, paragraph in parts(article, place, "paragraphs"):
            context = get(paragraph, inner, "context", str)
            for at, asked in parts(paragraph, inner, "qas"):
                answers = [
                    (get(a, there, "text", str), get(a, there, "answer_start", int)) for there, a in parts(asked, at, "answers")
                ]
                if not answers:
                    raise UserError(f"{path}: {at} has no answer; in SQuAD v1.1 every question has one (v2.0 is another task)")
                yield at, Question(get(asked, at, "id", str), get(asked, at, "question", str), context, tuple(answers))


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def read_hub() -> dict[str, list[Question]]:
    """Both splits from the hub, or its cache, through `datasets`."""
    with from_hub(HUB, f"a folder with {' and '.join(FILES.values())}"):
        from datasets import load_dataset

        data = load_dataset(HUB)
    return {
        split: [
            Question(id, question, context, tuple(zip(answers["text"], answers["answer_start"], strict=True)))
            for id, question, context, answers in zip(
                *(data[split][column] for column in ("id", "question", "context", "answers")), strict=True
            )
        ]
        for split in FILES
    }
