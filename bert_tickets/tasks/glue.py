"""The nine GLUE tasks: a table of nine rows, read from a folder in the original layout or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets import UserError
from bert_tickets.batches import Batch, TokenStore, order
from bert_tickets.bert import Net, classify
from bert_tickets.config import Config
from bert_tickets.doubts import shared, unread
from bert_tickets.hub import from_hub
from bert_tickets.metrics import METRICS, compare_with_evaluate
from bert_tickets.models import load_bert
from bert_tickets.tokens import tokenize

HUB = "nyu-mll/glue"
BROKEN = 0.01  # a file with a larger share of broken lines is not the file it should be
LONGEST = 2**20  # characters of a line; GLUE's longest have thousands


@dataclass(frozen=True)
class Row:
    """One task: where its data are, what its columns are called, how it is scored."""

    folder: str  # in the original layout
    texts: tuple[str, ...]  # columns of the .tsv
    hub_texts: tuple[str, ...]  # columns on the hub
    metrics: tuple[str, ...]  # the paper's first
    labels: tuple[str, ...] = ("0", "1")  # as written in the .tsv; empty: a score from 0 to 5
    label: str = "label"  # column of the .tsv
    meanings: tuple[str, ...] = ()  # of labels written as numbers: their names on the hub
    columns: tuple[str, ...] = ()  # of a .tsv without a header
    dev: dict[str, str] = field(default_factory=lambda: {"validation": "dev.tsv"})  # split on the hub: file

    @property
    def classes(self) -> tuple[str, ...]:
        """What the classes are called, in order; empty for a score."""
        return self.meanings or self.labels


ROWS = {
    "cola": Row(
        "CoLA",
        ("sentence",),
        ("sentence",),
        ("matthews", "accuracy"),
        meanings=("unacceptable", "acceptable"),
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst2": Row("SST-2", ("sentence",), ("sentence",), ("accuracy",), meanings=("negative", "positive")),
    "mrpc": Row(
        "MRPC",
        ("#1 String", "#2 String"),
        ("sentence1", "sentence2"),
        ("accuracy", "f1"),
        label="Quality",
        meanings=("not_equivalent", "equivalent"),
    ),
    "stsb": Row("STS-B", ("sentence1", "sentence2"), ("sentence1", "sentence2"), ("pearson", "spearman"), (), "score"),
    "qqp": Row(
        "QQP",
        ("question1", "question2"),
        ("question1", "question2"),
        ("accuracy", "f1"),
        label="is_duplicate",
        meanings=("not_duplicate", "duplicate"),
    ),
    "mnli": Row(
        "MNLI",
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("accuracy",),
        ("entailment", "neutral", "contradiction"),
        "gold_label",
        dev={"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"},
    ),
    "qnli": Row("QNLI", ("question", "sentence"), ("question", "sentence"), ("accuracy",), ("entailment", "not_entailment")),
    "rte": Row("RTE", ("sentence1", "sentence2"), ("sentence1", "sentence2"), ("accuracy",), ("entailment", "not_entailment")),
    "wnli": Row(
        "WNLI", ("sentence1", "sentence2"), ("sentence1", "sentence2"), ("accuracy",), meanings=("not_entailment", "entailment")
    ),
}
TASKS = tuple(ROWS)

Example = tuple[tuple[str, ...], float]  # one or two texts, a label


class Glue:
    """One GLUE task, as `bert_tickets.tasks.Task` asks."""

    rows: Literal["example"] = "example"

    def __init__(self, name: str) -> None:
        self.name, self.row = name, ROWS[name]
        self.metric = self.row.metrics[0]
        self.regression = not self.row.labels
        self.noted: list[str] = []  # what the data say against every score

    def load_net(self, cfg: Config) -> tuple[Net, Any]:
        net, tokenizer = load_bert(cfg.model, "classifier", cfg.init, cfg.train.seed, labels=len(self.row.labels) or 1)
        if not self.regression:
            net.config.id2label = dict(enumerate(self.row.classes))
            net.config.label2id = {label: number for number, label in net.config.id2label.items()}
        net.config.problem_type = "regression" if self.regression else "single_label_classification"
        return net, tokenizer

    def load_data(self, cfg: Config, tokenizer: Any, device: torch.device) -> tuple[TokenStore, dict[str, TokenStore]]:
        if cfg.data_dir is not None:
            folder = find_folder(Path(cfg.data_dir), self.row.folder)
            splits = {split: read_tsv(folder / file, self.row) for split, file in {"train": "train.tsv", **self.row.dev}.items()}
        else:
            splits = read_hub(self.name, self.row)
        train = splits.pop("train")
        if cfg.limit_train is not None:
            chosen = order(len(train), seed=0, epoch=0)[: cfg.limit_train]  # whatever the run's seed: one smaller task
            train = [train[i] for i in chosen.tolist()]
        evals = {split: examples[: cfg.limit_eval] for split, examples in splits.items()}
        self.noted = [note for split, found in evals.items() for note in shared(train, found, split, "examples")]
        if len({label for _, label in train}) == 1:
            self.noted.append(f"all training labels are {self._answer(train[0][1])}")
        store = self._store("train", train, tokenizer, cfg.max_length, device)
        return store, {split: self._store(split, found, tokenizer, cfg.max_length, device) for split, found in evals.items()}

    def _store(self, split: str, examples: list[Example], tokenizer: Any, max_length: int, device: torch.device) -> TokenStore:
        columns = [list(column) for column in zip(*(texts for texts, _ in examples), strict=True)]
        labels = np.array([label for _, label in examples], dtype=np.float32 if self.regression else np.int64)
        tokens = tokenize(tokenizer, columns, max_length)
        self.noted += unread(tokens.ids, tokenizer, split)
        if (empty := sum(not all(texts) for texts, _ in examples)) > BROKEN * len(examples):
            self.noted.append(f"{empty} of {len(examples)} examples of {split} have an empty text")
        return TokenStore(tokens, labels, device)

    def alter(self, batch: Batch, step: int, seed: int) -> Batch:
        return batch

    def loss(self, net: Net, batch: Batch) -> Tensor:
        return self.loss_of(classify(net, batch), batch.labels)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Squared error of a similarity score, cross-entropy of classes, in fp32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.mse_loss(logits.squeeze(1), labels) if self.regression else F.cross_entropy(logits, labels)

    def outputs(self, net: Net, batch: Batch) -> Tensor:
        """The logits, [B, labels]."""
        return classify(net, batch)

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """[n, labels] to [n]: the similarity score, or the class."""
        return logits[:, 0] if self.regression else logits.argmax(axis=1)

    def score(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any]) -> dict[str, float]:
        """The row's metrics on its first evaluation set; the mismatched one of MNLI beside it, as `accuracy_mm`."""
        values = {}
        for split, logits in outputs.items():
            suffix = "_mm" if split.endswith("mismatched") else ""
            for metric in self.row.metrics:
                values[metric + suffix] = METRICS[metric](self.predict(logits), stores[split].labels.cpu().numpy())
        return values

    def doubts(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any]) -> list[str]:
        """Of each set: one answer to every example, or one label; or a metric below what knowing no example gives, which is the
        share of the commonest class for accuracy, and 0 for a correlation. And what the data themselves say."""
        found = list(self.noted)
        for split, logits in outputs.items():
            predicted, labels = self.predict(logits), stores[split].labels.cpu().numpy()
            if np.ptp(labels) == 0:
                found.append(f"all {len(labels)} labels on {split} are {self._answer(labels[0])}: no score tells anything")
            if np.ptp(predicted) < 1e-4:
                found.append(f"all {len(predicted)} predictions on {split} are {self._answer(predicted[0])}")
            if np.ptp(labels) == 0 or np.ptp(predicted) < 1e-4:
                continue
            value = METRICS[self.metric](predicted, labels)
            chance = np.bincount(labels).max() / len(labels) if self.metric == "accuracy" else 0.0
            if value < chance:
                found.append(f"{self.metric} {value:.4f} on {split} is below {chance:.4f}, which knowing no example gives")
        return found

    def _answer(self, value: float) -> str:
        return f"{value:.4g}" if self.regression else self.row.classes[int(value)]

    def check(self, outputs: Mapping[str, np.ndarray], stores: Mapping[str, Any], ours: dict[str, float]) -> str:
        """What the `evaluate` package says of the same predictions; a line to print."""
        split = next(iter(self.row.dev))
        labels = stores[split].labels.cpu().numpy()
        return compare_with_evaluate(self.name, self.predict(outputs[split]), labels, ours)


# ---- reading ----


def find_folder(data_dir: Path, folder: str) -> Path:
    """The task's folder: `data_dir/MNLI`, or `data_dir` itself where the files lie in it."""
    for place in (data_dir / folder, data_dir):
        if (place / "train.tsv").is_file():
            return place
    raise UserError(
        f"no {folder} data: neither {data_dir / folder}/train.tsv nor {data_dir}/train.tsv is there. Three ways to get it:\n"
        f"  leave out --data-dir on a machine that reaches the hub ({HUB} is downloaded and cached);\n"
        f"  fill the cache on another machine and set HF_HOME to a copy of it, with HF_HUB_OFFLINE=1;\n"
        f"  give --data-dir a folder in GLUE's original layout ({folder}/train.tsv, {folder}/dev.tsv, ...)."
    )


def read_tsv(path: Path, row: Row) -> list[Example]:
    """The examples of one file. A broken line is left out and reported with its number; too many end the run."""
    if not path.is_file():  # a pipe or a device would be read for ever
        raise UserError(f"{path} is {'no file' if path.exists() else 'missing'}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # at nothing else: a text may hold \r, U+2028 or \x85
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    examples: list[Example] = []
    broken: list[str] = []
    for problem, example in _parse(lines, path, row):
        if example is not None:
            examples.append(example)
        else:
            broken.append(problem)
    if broken:
        shown = "\n".join(f"  {problem}" for problem in broken[:5]) + ("\n  ..." if len(broken) > 5 else "")
        if len(broken) > max(1, BROKEN * len(lines)):
            raise UserError(f"{path} is not the {row.folder} file: {len(broken)} of {len(lines)} lines are broken:\n{shown}")
        print(f"{path}: {len(broken)} broken line(s) left out of {len(examples) + len(broken)}:\n{shown}")
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def _parse(lines: list[str], path: Path, row: Row) -> Iterator[tuple[str, Example | None]]:
    """Each line as (problem, None) or ("", example). Quotes are ordinary characters."""
    first = 0 if row.columns else 1
    header = list(row.columns) or lines[0][:LONGEST].rstrip("\r").split("\t")
    absent = [name for name in (*row.texts, row.label) if name not in header]
    if absent:
        raise UserError(f"{path} has no column {absent[0]!r}; its first line is {' | '.join(header)[:200]!r}")
    if doubled := [name for name in (*row.texts, row.label) if header.count(name) > 1]:
        raise UserError(f"{path} has {header.count(doubled[0])} columns {doubled[0]!r}: which of them counts?")
    wanted = [header.index(name) for name in row.texts]
    label_at = header.index(row.label)
    for number, line in enumerate(lines[first:], first + 1):
        line = line.rstrip("\r")
        if not line and number == len(lines):
            continue  # the newline that ends the file
        if len(line) > LONGEST or "\0" in line:
            yield f"line {number}: " + ("a NUL byte in it" if len(line) <= LONGEST else f"{len(line):,} characters"), None
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            yield f"line {number}: {len(cells)} columns, not {len(header)}", None
            continue
        label = _label(cells[label_at].strip(), row)
        if label is None:
            yield f"line {number}: label {cells[label_at][:40]!r} is none of {', '.join(row.labels) or '0 to 5'}", None
        else:
            yield "", (tuple(cells[at].strip() for at in wanted), label)


def _label(text: str, row: Row) -> float | None:
    if row.labels:
        return row.labels.index(text) if text in row.labels else None
    try:
        score = float(text)
    except ValueError:
        return None
    return score if 0 <= score <= 5 else None


def read_hub(name: str, row: Row) -> dict[str, list[Example]]:
    """All splits from the hub, or its cache, through `datasets`."""
    with from_hub(f"{HUB} ({name})", "a folder in GLUE's original layout"):
        from datasets import load_dataset

        data = load_dataset(HUB, name)
    splits = {}
    for split in ("train", *row.dev):
        columns = [data[split][column] for column in (*row.hub_texts, "label")]
        splits[split] = [(tuple(texts), label) for *texts, label in zip(*columns, strict=True)]
    return splits
