"""GLUE: nine tasks from a folder or the hub; every line of a file is read or reported."""

from __future__ import annotations

import math
import random
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentences import sentence
from small_hub import write_glue
from test_metrics import put_evaluate

from bert_tickets.config import TASKS, Config, Training
from bert_tickets.data.batches import subset
from bert_tickets.data.glue_files import ROWS, read_folder, read_tsv
from bert_tickets.errors import UserError
from bert_tickets.seeds import seeded
from bert_tickets.tasks.glue import Glue

METRIC = {"cola": "matthews", "stsb": "pearson"}  # Table 1 of the paper; accuracy otherwise
SECOND = {"cola": {"accuracy"}, "mrpc": {"f1"}, "qqp": {"f1"}, "stsb": {"spearman"}}
HUB_COLUMNS = {
    **dict.fromkeys(("cola", "sst2"), ("sentence",)),
    **dict.fromkeys(("mrpc", "stsb", "rte", "wnli"), ("sentence1", "sentence2")),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
}
CPU = torch.device("cpu")
GLUE, SST2 = TASKS["glue"], ROWS["sst2"]


def expected(task: str, file: str, count: int) -> list:
    """Draw the texts and labels of the fixture's file again."""
    rng, examples = random.Random(f"{ROWS[task].folder}/{file}"), []
    for number in range(count):
        y = number % 2
        first = sentence(rng, y)
        texts = (" ".join([first] * 30) if number == 7 else first, sentence(rng, y))
        label = {"stsb": 1.25 + 2.5 * y, "mnli": number % 2 + y}.get(task, y)
        examples.append((texts[: len(ROWS[task].texts)], label))
    return examples


def sst2_file(folder: Path, lines: list[str], header: str = "sentence\tlabel") -> Path:
    path = folder / "train.tsv"
    path.write_bytes("\n".join([header, *lines]).encode() + b"\n")
    return path


# ---- reading a folder ----


@pytest.mark.parametrize("task", GLUE)
def test_the_folder_of_all_tasks_and_that_of_one_give_texts_and_labels(glue_dir, task):
    found, files = read_folder(glue_dir, ROWS[task]), {"train": "train.tsv", **ROWS[task].dev}
    assert found == {split: expected(task, file, 44 if split == "train" else 20) for split, file in files.items()}
    assert found == read_folder(glue_dir / ROWS[task].folder, ROWS[task])


def test_columns_are_found_by_the_header_in_any_order(glue_dir, tmp_path):
    source = glue_dir / "MRPC" / "train.tsv"
    lines = [line.split("\t") for line in source.read_text(encoding="utf-8-sig").splitlines()]
    order = random.Random(0).sample(range(len(lines[0])), len(lines[0]))
    (tmp_path / "train.tsv").write_text("".join("\t".join(cells[at] for at in order) + "\n" for cells in lines), encoding="utf-8")
    assert read_tsv(tmp_path / "train.tsv", ROWS["mrpc"]) == read_tsv(source, ROWS["mrpc"])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.removesuffix(b"\n").replace(b"\n", b"\r\n"),
    ],
    ids=["byte-order mark", "CRLF", "CRLF and no final newline"],
)
def test_a_byte_order_mark_and_line_ends_do_not_matter(glue_dir, tmp_path, change, capsys):
    source = glue_dir / "STS-B" / "train.tsv"
    (tmp_path / "train.tsv").write_bytes(change(source.read_bytes()))
    assert read_tsv(tmp_path / "train.tsv", ROWS["stsb"]) == read_tsv(source, ROWS["stsb"])
    assert capsys.readouterr().out == ""


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"])), min_size=1, max_size=5))
@example(['he said "no', '""quoted""', "it's", "line\u2028separator", "next\x85line", "form\x0cfeed", "\\t"])
def test_only_tabs_and_newlines_are_special(tmp_path_factory, texts):
    """Texts are unchanged but stripped."""
    path = sst2_file(tmp_path_factory.getbasetemp(), [f"{text}\t{n % 2}" for n, text in enumerate(texts)])
    assert read_tsv(path, SST2) == [((text.strip(),), n % 2) for n, text in enumerate(texts)]


# ---- broken lines and files ----


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("sst2", "a text\t1\tand more"),
        ("sst2", "a text\t2"),
        ("sst2", ""),
        ("cola", "gj04\t1\ta text"),
        ("stsb", "3\tg\tf\t2012\t3\ts\ts\ta\tb\t5.1"),
        ("stsb", "3\tg\tf\t2012\t3\ts\ts\ta\tb\tnan"),
    ],
)
def test_a_broken_line_is_skipped_and_reported_by_its_number(glue_dir, tmp_path, task, line, capsys):
    source = glue_dir / ROWS[task].folder / "train.tsv"
    lines = source.read_text(encoding="utf-8").split("\n")
    lines[9] = line  # line 10, counted from 1 as editors do
    (tmp_path / "train.tsv").write_text("\n".join(lines), encoding="utf-8")
    examples = read_tsv(source, ROWS[task])
    del examples[9 if task == "cola" else 8]  # CoLA has no header
    assert read_tsv(tmp_path / "train.tsv", ROWS[task]) == examples
    out = capsys.readouterr().out
    assert "1 broken line(s)" in out
    assert "line 10: " in out


@pytest.mark.parametrize(("good", "broken", "allowed"), [(5, 1, True), (50, 2, False), (500, 5, True), (500, 9, False)])
def test_more_than_one_percent_of_broken_lines_is_a_users_error(tmp_path, good, broken, allowed, capsys):
    path = sst2_file(tmp_path, ["broken"] * broken + ["a text\t1"] * good)
    if allowed:
        assert len(read_tsv(path, SST2)) == good
        assert f"{broken} broken line(s)" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=rf"SST-2[^:]*: {broken} of .* lines are broken") as refusal:
            read_tsv(path, SST2)
        assert "line 2: " in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 columns 'sentence'"),
        (b"sentence\tlabel\n", "no examples"),
        (b"text\tlabel\na\t1\n", r"has 0 columns 'sentence', not one; its first line is 'text \| label'"),
        (b"sentence\tlabel\tlabel\na\t1\t1\n", "has 2 columns 'label'"),
        ("sentence\tlabel\ncafé\t1\n".encode("latin-1"), "not UTF-8 text: byte 18 is 0xe9"),
    ],
)
def test_a_file_of_another_layout_or_encoding_is_a_users_error(tmp_path, content, says):
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=says) as refusal:
        read_tsv(tmp_path / "train.tsv", SST2)
    assert str(tmp_path / "train.tsv") in str(refusal.value)


def load(task: str, tokenizer, data_dir: Path | None = None, **settings):
    return Glue(task).load_data(Config(task=task, data_dir=data_dir and str(data_dir), **settings), tokenizer, CPU)


# ---- limits ----


def test_limit_train_draws_the_same_examples_for_any_seed_and_limit_eval_takes_the_first(glue_dir, tokenizer):
    loaded = [load("mnli", tokenizer, glue_dir, limit_train=10, limit_eval=3, train=Training(seed=seed)) for seed in (1, 2)]
    (few, evals), (other, _), (whole, whole_evals) = *loaded, load("mnli", tokenizer, glue_dir)
    assert few.sha256 == other.sha256
    assert len(few) == 10
    assert few.labels.tolist() != whole.labels[:10].tolist()  # drawn from the whole set
    for split, store in evals.items():
        assert len(store) == 3
        assert store.lengths.tolist() == whole_evals[split].lengths[:3].tolist()
        assert store.labels.tolist() == whole_evals[split].labels[:3].tolist()


def test_the_same_examples_are_drawn_as_ever():
    """Finished runs are found again by their settings, whose data must not change."""
    first = torch.randperm(8, generator=seeded(0, "order", 0))
    assert subset(list(range(8)), 3) == first[:3].tolist()


def test_limit_train_draws_by_the_runs_seed_where_asked(glue_dir, tokenizer):
    def drawn(limit, seed):
        return load("mnli", tokenizer, glue_dir, limit_train=limit, limit_seed="run", train=Training(seed=seed))

    (one, evals), (other, other_evals) = drawn(10, 1), drawn(10, 2)
    fixed, _ = load("mnli", tokenizer, glue_dir, limit_train=10)
    assert len({one.sha256, other.sha256, fixed.sha256}) == 3
    assert drawn(10, 1)[0].sha256 == one.sha256
    assert drawn(20, 1)[0].lengths[:10].tolist() == one.lengths.tolist()  # a larger limit adds examples
    assert {name: store.sha256 for name, store in evals.items()} == {name: store.sha256 for name, store in other_evals.items()}


def test_a_byte_order_mark_is_no_text_also_without_a_header(glue_dir, tmp_path):
    for task in ("cola", "sst2"):
        path = glue_dir / ROWS[task].folder / "train.tsv"
        (tmp_path / "marked.tsv").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert read_tsv(tmp_path / "marked.tsv", ROWS[task]) == read_tsv(path, ROWS[task])


# ---- the hub ----


@pytest.mark.parametrize("task", GLUE)
def test_the_hub_gives_the_same_tokens_as_the_folder(glue_dir, tokenizer, hub_cache, task):
    write_glue(hub_cache / "datasets--nyu-mll--glue/snapshots/0123", glue_dir, [task])
    (hub, hub_evals), (folder, folder_evals) = load(task, tokenizer), load(task, tokenizer, glue_dir)
    assert hub.sha256 == folder.sha256
    assert {split: store.sha256 for split, store in hub_evals.items()} == {k: store.sha256 for k, store in folder_evals.items()}


# ---- loss and metrics ----


def stores(labels: dict[str, np.ndarray]) -> dict[str, types.SimpleNamespace]:
    """Make evaluation sets that have labels only."""
    return {split: types.SimpleNamespace(labels=torch.from_numpy(values)) for split, values in labels.items()}


@pytest.mark.parametrize("task", GLUE)
def test_the_metrics_include_the_papers(task):
    labels = {"stsb": np.array([1.0, 2.0, 3.0])}.get(task, np.array([1, 1, 1, 0]))
    logits = {"stsb": np.array([[2.0], [4.0], [7.0]])}.get(task, np.eye(3 if task == "mnli" else 2)[[1, 0, 1, 1]])
    by_hand = {"accuracy": 2 / 4, "f1": 2 / 3, "matthews": -1 / 3, "pearson": 5 / math.sqrt(2 * 38 / 3), "spearman": 1.0}
    split = next(iter(ROWS[task].dev))
    values = Glue(task).compute_metrics({split: logits}, stores({split: labels}))
    assert Glue(task).metric == METRIC.get(task, "accuracy")
    assert values == {name: pytest.approx(by_hand[name]) for name in values}
    assert set(values) == SECOND.get(task, set()) | {Glue(task).metric}


def test_mnli_has_metrics_of_both_sets_and_evaluate_gets_the_classes_of_the_matched_one(monkeypatch):
    asked = put_evaluate(monkeypatch, {"accuracy": 1.0})
    logits = {"validation_mismatched": np.eye(3)[[1, 1, 2]], "validation_matched": np.eye(3)[[0, 1, 2]]}
    sets = stores(dict.fromkeys(logits, np.arange(3)))
    metrics = Glue("mnli").compute_metrics(logits, sets)
    assert metrics == {"accuracy": 1.0, "accuracy_mm": 2 / 3}
    assert "equal" in Glue("mnli").compare_with_evaluate(logits, sets, metrics)
    assert asked[0] == ("glue", "mnli")
    assert asked[1]["predictions"].tolist() == [0, 1, 2]


def test_the_loss_is_float32_in_half_precision():
    loss = Glue("sst2").loss_of(torch.zeros(1, 2, dtype=torch.float16), torch.tensor([1]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
