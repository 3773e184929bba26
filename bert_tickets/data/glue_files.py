"""The data of GLUE's nine tasks: a table of nine rows, read from a folder in the original layout or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bert_tickets.data.hub import find_dataset
from bert_tickets.errors import UserError
from bert_tickets.hub import Repository

HUB = Repository("dataset", "nyu-mll/glue", "--data-dir a folder in GLUE's layout (MNLI/train.tsv, MNLI/dev_matched.tsv, ...)")
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

    @property
    def all_metrics(self) -> tuple[str, ...]:
        """The names of the results: the metrics, and with `_mm` those of MNLI's mismatched set."""
        return tuple(metric + suffix for suffix in ("", "_mm")[: len(self.dev)] for metric in self.metrics)


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


def files_of(data_dir: Path, row: Row) -> dict[str, Path]:
    """Return the files by split, of `data_dir/MNLI` or else of `data_dir` itself. They need not exist."""
    nested = data_dir / row.folder
    folder = nested if (nested / "train.tsv").is_file() else data_dir
    return {split: folder / file for split, file in {"train": "train.tsv", **row.dev}.items()}


def read_folder(data_dir: Path, row: Row) -> dict[str, list[Example]]:
    """Read all splits of a folder. Raises `UserError` if it has no such files."""
    files = files_of(data_dir, row)
    if not files["train"].is_file():
        raise HUB.unavailable(f"no {row.folder} data: neither {data_dir / row.folder}/train.tsv nor {data_dir}/train.tsv exists")
    return {split: read_tsv(path, row) for split, path in files.items()}


def read_tsv(path: Path, row: Row) -> list[Example]:
    """Read the examples of one file. Broken lines are skipped, and printed with their numbers.

    Raises `UserError` for a file of another layout or encoding, without examples, or with too many broken lines.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    lines = text.removesuffix("\n").split("\n")  # not splitlines: a text may contain \r, U+2028 or \x85
    header = row.columns or lines[0].rstrip("\r").split("\t")
    for name in (*row.texts, row.label):
        if (count := header.count(name)) != 1:
            raise UserError(f"{path} has {count} columns {name!r}, not one; its first line is {' | '.join(header)[:200]!r}")
    examples: list[Example] = []
    broken: list[str] = []
    first = 0 if row.columns else 1
    for number, line in enumerate(lines[first:], first + 1):
        try:
            examples.append(_parse(line, header, row))
        except ValueError as error:
            broken.append(f"  line {number}: {error}")
    if broken:
        shown = "\n".join(broken[:5]) + ("\n  ..." if len(broken) > 5 else "")
        if len(broken) > max(1, MAX_BROKEN * len(lines)):
            raise UserError(f"{path} is not the {row.folder} file: {len(broken)} of {len(lines)} lines are broken:\n{shown}")
        print(f"{path}: skipped {len(broken)} broken line(s) of {len(examples) + len(broken)}:\n{shown}")
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def _parse(line: str, header: Sequence[str], row: Row) -> Example:
    """Parse a line; quotes are ordinary characters. Raises `ValueError` if it is broken."""
    cells = line.split("\t")
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} columns, not {len(header)}")
    values = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    label = values[row.label]
    texts = tuple(values[name] for name in row.texts)
    if not row.labels and 0 <= (score := float(label)) <= 5:
        return texts, score
    if label not in row.labels:
        raise ValueError(f"label {label[:40]!r}, not {', '.join(row.labels) or '0 to 5'}")
    return texts, row.labels.index(label)


def read_hub(name: str, row: Row) -> dict[str, list[Example]]:
    """Read all splits from the hub, or its cache."""
    splits: dict[str, list[Example]] = {"train": [], **{split: [] for split in row.dev}}
    data = find_dataset(HUB, name, list(splits))
    for split, examples in splits.items():
        for *texts, labels in data.columns(split, [*(row.hub_texts or row.texts), "label"]):
            examples += zip(zip(*texts, strict=True), labels, strict=True)
    return splits
