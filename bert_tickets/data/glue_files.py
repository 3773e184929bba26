"""The data of GLUE's nine tasks: a table of nine rows, read from a folder in the original layout or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bert_tickets.data.hub import from_hub, missing_data
from bert_tickets.errors import UserError

HUB = "nyu-mll/glue"
MAX_BROKEN = 0.01  # a file with a larger fraction of broken lines raises an error


@dataclass(frozen=True)
class Row:
    """One task: its folder, the names of its columns, its labels and its metrics."""

    folder: str  # in the original layout
    texts: tuple[str, ...]  # columns of the .tsv
    metrics: tuple[str, ...]  # the paper's first
    label: str = "label"  # column of the .tsv
    labels: tuple[str, ...] = ("0", "1")  # as written in the .tsv; empty for a score from 0 to 5
    meanings: tuple[str, ...] = ()  # names of labels that are written as numbers, as on the hub
    hub_texts: tuple[str, ...] = ()  # columns on the hub, if they have other names
    columns: tuple[str, ...] = ()  # of a .tsv without a header
    dev: dict[str, str] = field(default_factory=lambda: {"validation": "dev.tsv"})  # files by split of the hub

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in order; empty for a score."""
        return self.meanings or self.labels


PAIR, ACCURACY, AND_F1 = ("sentence1", "sentence2"), ("accuracy",), ("accuracy", "f1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI_DEV = {"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"}
# fmt: off
ROWS = {
    "cola": Row("CoLA", ("sentence",), ("matthews", "accuracy"), meanings=("unacceptable", "acceptable"),
                columns=("source", "label", "mark", "sentence")),
    "sst2": Row("SST-2", ("sentence",), ACCURACY, meanings=("negative", "positive")),
    "mrpc": Row("MRPC", ("#1 String", "#2 String"), AND_F1, "Quality", meanings=("not_equivalent", "equivalent"), hub_texts=PAIR),
    "stsb": Row("STS-B", PAIR, ("pearson", "spearman"), "score", ()),
    "qqp": Row("QQP", ("question1", "question2"), AND_F1, "is_duplicate", meanings=("not_duplicate", "duplicate")),
    "mnli": Row("MNLI", PAIR, ACCURACY, "gold_label", ("entailment", "neutral", "contradiction"),
                hub_texts=("premise", "hypothesis"), dev=MNLI_DEV),
    "qnli": Row("QNLI", ("question", "sentence"), ACCURACY, labels=ENTAILMENT),
    "rte": Row("RTE", PAIR, ACCURACY, labels=ENTAILMENT),
    "wnli": Row("WNLI", PAIR, ACCURACY, meanings=("not_entailment", "entailment")),
}
# fmt: on

Example = tuple[tuple[str, ...], float]  # one or two texts, a label


def find_folder(data_dir: Path, folder: str) -> Path:
    """Find the task's folder: `data_dir/MNLI`, or `data_dir` itself. Raises `UserError` if neither has the files."""
    for place in (data_dir / folder, data_dir):
        if (place / "train.tsv").is_file():
            return place
    message = f"no {folder} data: neither {data_dir / folder}/train.tsv nor {data_dir}/train.tsv exists"
    layout = f"a folder in GLUE's original layout ({folder}/train.tsv, {folder}/dev.tsv, ...)"
    raise missing_data(message, f"{HUB} is downloaded and cached", layout)


def read_tsv(path: Path, row: Row) -> list[Example]:
    """Read the examples of one file. Broken lines are skipped, and printed with their numbers.

    Raises `UserError` for a file of another layout or encoding, without examples, or with too many broken lines.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not splitlines: a text may contain \r, U+2028 or \x85
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
        if len(broken) > max(1, MAX_BROKEN * len(lines)):
            raise UserError(f"{path} is not the {row.folder} file: {len(broken)} of {len(lines)} lines are broken:\n{shown}")
        print(f"{path}: skipped {len(broken)} broken line(s) of {len(examples) + len(broken)}:\n{shown}")
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def _parse(lines: list[str], path: Path, row: Row) -> Iterator[tuple[str, Example | None]]:
    """Parse each line to (problem, None) or ("", example). Quotes are ordinary characters."""
    first = 0 if row.columns else 1
    header = list(row.columns) or lines[0].rstrip("\r").split("\t")
    absent = [name for name in (*row.texts, row.label) if name not in header]
    if absent:
        raise UserError(f"{path} has no column {absent[0]!r}; its first line is {' | '.join(header)[:200]!r}")
    if doubled := [name for name in (*row.texts, row.label) if header.count(name) > 1]:
        raise UserError(f"{path} has {header.count(doubled[0])} columns {doubled[0]!r}")
    wanted = [header.index(name) for name in row.texts]
    label_at = header.index(row.label)
    for number, line in enumerate(lines[first:], first + 1):
        line = line.rstrip("\r")
        if not line and number == len(lines):
            continue  # the newline that ends the file
        cells = line.split("\t")
        if len(cells) != len(header):
            yield f"line {number}: {len(cells)} columns, not {len(header)}", None
            continue
        label = _label(cells[label_at].strip(), row)
        if label is None:
            yield f"line {number}: label {cells[label_at][:40]!r}, not {', '.join(row.labels) or '0 to 5'}", None
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
    """Read all splits from the hub, or its cache, by means of `datasets`."""
    with from_hub(f"{HUB} ({name})", "a folder in GLUE's original layout"):
        from datasets import load_dataset

        data = load_dataset(HUB, name)
    splits = {}
    for split in ("train", *row.dev):
        columns = [data[split][column] for column in (*(row.hub_texts or row.texts), "label")]
        splits[split] = [(tuple(texts), label) for *texts, label in zip(*columns, strict=True)]
    return splits
