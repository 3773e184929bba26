"""GLUE's nine tasks as data: a table of nine rows, read from a folder in the original layout or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bert_tickets.data.hub import from_hub
from bert_tickets.errors import UserError

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

Example = tuple[tuple[str, ...], float]  # one or two texts, a label


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
