"""GLUE: nine tasks from a folder or the hub, and every line of a file read or accounted for."""

from __future__ import annotations

import math
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import put_evaluate
from transformers import AutoTokenizer

from bert_tickets.config import Config, Training
from bert_tickets.errors import UserError
from bert_tickets.tasks.glue import ROWS, TASKS, Glue, read_tsv

METRIC = {  # Table 1 of the paper
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "accuracy",
    "stsb": "pearson",
    "qqp": "accuracy",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
}
HUB_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
CPU = torch.device("cpu")
SST2 = ROWS["sst2"]


def files(task: str) -> dict[str, tuple[str, int]]:
    """Each split's file in the fixture folder and how many examples it has."""
    if task == "mnli":
        devs = {"validation_matched": ("dev_matched.tsv", 20), "validation_mismatched": ("dev_mismatched.tsv", 20)}
    else:
        devs = {"validation": ("dev.tsv", 20)}
    return {"train": ("train.tsv", 44), **devs}


def expected(task: str, file: str, count: int) -> list:
    """What the fixture wrote, drawn again: texts and labels."""
    rng, examples = random.Random(f"{ROWS[task].folder}/{file}"), []
    for number in range(count):
        y = number % 2
        first = sentence(rng, y)
        texts = (" ".join([first] * 30) if number == 7 else first, sentence(rng, y))
        label = {"stsb": 1.25 + 2.5 * y, "mnli": number % 2 + y}.get(task, y)
        examples.append((texts[: len(ROWS[task].texts)], label))
    return examples


@pytest.fixture(scope="module")
def tokenizer(bert_dir):
    return AutoTokenizer.from_pretrained(bert_dir)


def sst2_file(folder: Path, lines: list[str], header: str = "sentence\tlabel") -> Path:
    path = folder / "train.tsv"
    path.write_bytes("\n".join([header, *lines]).encode() + b"\n")
    return path


# ---- reading a folder ----


@pytest.mark.parametrize("task", TASKS)
def test_every_file_of_a_task_gives_its_texts_and_labels(glue_dir, task):
    row = ROWS[task]
    assert set(files(task)) == {"train", *row.dev}
    for file, count in files(task).values():
        assert read_tsv(glue_dir / row.folder / file, row) == expected(task, file, count)


def test_the_tasks_are_the_nine_of_the_fixture():
    assert {row.folder for row in ROWS.values()} == set(LAYOUTS)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "cola"])
def test_columns_are_found_by_the_header_wherever_they_stand(glue_dir, tmp_path, task):
    source = glue_dir / ROWS[task].folder / "train.tsv"
    lines = [line.split("\t") for line in source.read_text(encoding="utf-8-sig").splitlines()]
    order = random.Random(0).sample(range(len(lines[0])), len(lines[0]))
    (tmp_path / "train.tsv").write_text("".join("\t".join(cells[at] for at in order) + "\n" for cells in lines), encoding="utf-8")
    assert read_tsv(tmp_path / "train.tsv", ROWS[task]) == read_tsv(source, ROWS[task])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.removesuffix(b"\n"),
        lambda data: data.removesuffix(b"\n").replace(b"\n", b"\r\n"),
    ],
    ids=["byte-order mark", "CRLF", "no final newline", "CRLF and no final newline"],
)
@pytest.mark.parametrize("task", ["sst2", "stsb", "qnli"])
def test_how_a_file_was_written_does_not_matter(glue_dir, tmp_path, task, change, capsys):
    source = glue_dir / ROWS[task].folder / "train.tsv"
    (tmp_path / "train.tsv").write_bytes(change(source.read_bytes()))
    assert read_tsv(tmp_path / "train.tsv", ROWS[task]) == read_tsv(source, ROWS[task])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text",
    ['he said "no', '"', '""quoted""', "it's", "line\u2028separator", "next\x85line", "form\x0cfeed", "re\rturn", "\\t"],
)
def test_only_tabs_and_newlines_are_special(tmp_path, text):
    path = sst2_file(tmp_path, ["first\t0", f"{text}\t1", "last\t0"])
    assert read_tsv(path, SST2) == [(("first",), 0), ((text,), 1), (("last",), 0)]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_goes_through_unchanged_but_for_its_ends(tmp_path_factory, texts):
    path = sst2_file(tmp_path_factory.getbasetemp(), [f"{text}\t{n % 2}" for n, text in enumerate(texts)])
    assert read_tsv(path, SST2) == [((text.strip(),), n % 2) for n, text in enumerate(texts)]


# ---- files that are not as they should be ----


@pytest.mark.parametrize("header", ["sentence\tlabel\tlabel", "label\tsentence\tsentence"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, header):
    (tmp_path / "train.tsv").write_text(f"{header}\n1\t0\t1\n")
    with pytest.raises(UserError, match="has 2 columns"):
        read_tsv(tmp_path / "train.tsv", SST2)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_read(tmp_path, make):
    make(tmp_path / "dev.tsv")
    with pytest.raises(UserError, match=r"dev\.tsv is no file"):
        read_tsv(tmp_path / "dev.tsv", SST2)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("sst2", "only a text"),
        ("sst2", "a text\t1\tand more"),
        ("sst2", "a text\t2"),
        ("sst2", "a \0 text\t1"),
        ("sst2", "long " * 220_000 + "\t1"),
        ("sst2", "a text\t"),
        ("sst2", ""),
        ("cola", "gj04\t1\ta text"),
        ("cola", "gj04\tyes\t\ta text"),
        ("rte", "3\ta\tb\tneutral"),
        ("stsb", "3\tg\tf\t2012\t3\ts\ts\ta\tb\tnone"),
        ("stsb", "3\tg\tf\t2012\t3\ts\ts\ta\tb\t5.1"),
        ("stsb", "3\tg\tf\t2012\t3\ts\ts\ta\tb\tnan"),
    ],
)
def test_a_broken_line_is_reported_by_number_and_shifts_nothing(glue_dir, tmp_path, task, line, capsys):
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
def test_more_broken_lines_than_a_hundredth_end_the_run(tmp_path, good, broken, allowed, capsys):
    path = sst2_file(tmp_path, ["broken"] * broken + ["a text\t1"] * good)
    if allowed:
        assert len(read_tsv(path, SST2)) == good
        assert f"{broken} broken line(s)" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=rf"SST-2[^:]*: {broken} of .* lines are broken") as refusal:
            read_tsv(path, SST2)
        assert "line 2: " in str(refusal.value)


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("sst2", b"", "no column 'sentence'"),
        ("cola", b"", "no examples"),
        ("sst2", b"sentence\tlabel\n", "no examples"),
        ("sst2", b"text\tlabel\na\t1\n", "no column 'sentence'.*text | label"),
        ("mrpc", b"sentence\tlabel\na\t1\n", "no column '#1 String'"),
        ("qnli", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", "no column 'question'"),
        ("sst2", "sentence\tlabel\ncafé\t1\n".encode("latin-1"), "not UTF-8 text: byte 18 is 0xe9"),
        ("sst2", "sentence\tlabel\na\t1\n".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_a_file_of_something_else_is_refused_in_words(tmp_path, task, content, says):
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=says) as refusal:
        read_tsv(tmp_path / "train.tsv", ROWS[task])
    assert str(tmp_path / "train.tsv") in str(refusal.value)


def load(task: str, tokenizer, data_dir: Path | None = None, **settings):
    return Glue(task).load_data(Config(task=task, data_dir=data_dir and str(data_dir), **settings), tokenizer, CPU)


def test_missing_data_name_the_three_ways_to_get_them(tmp_path, tokenizer):
    with pytest.raises(UserError) as refusal:
        load("mnli", tokenizer, tmp_path / "absent")
    first, *ways = str(refusal.value).splitlines()
    assert str(tmp_path / "absent" / "MNLI") in first
    assert [word in way for word, way in zip(["hub", "HF_HOME", "MNLI/train.tsv"], ways, strict=True)] == [True] * 3


def test_a_missing_evaluation_file_is_named(tmp_path, tokenizer):
    sst2_file(tmp_path, ["a text\t1"])
    with pytest.raises(UserError, match=r"dev\.tsv is missing"):
        load("sst2", tokenizer, tmp_path)


def test_the_folder_may_be_the_tasks_own(glue_dir, tokenizer):
    inner, outer = (load("rte", tokenizer, folder)[0] for folder in (glue_dir / "RTE", glue_dir))
    assert inner.sha256 == outer.sha256


# ---- examples to tokens ----


@pytest.mark.parametrize("task", ["cola", "mrpc"])
def test_the_store_holds_what_the_tokenizer_says(glue_dir, tokenizer, task):
    store, _ = load(task, tokenizer, glue_dir, max_length=60)
    examples = expected(task, "train.tsv", 44)
    assert len(store) == 44
    for number in (0, 7, 43):  # the 7th is cut
        batch, encoded = store.batch(torch.tensor([number])), tokenizer(*examples[number][0])
        cut = len(encoded["input_ids"]) > 60
        assert store.lengths[number] == min(60, len(encoded["input_ids"]))
        assert cut == (number == 7)
        if not cut:
            assert batch.input_ids[0].tolist() == encoded["input_ids"]
            assert batch.token_type_ids[0].tolist() == encoded["token_type_ids"]
        assert batch.input_ids[0, 0] == tokenizer.cls_token_id
        assert int((batch.input_ids == tokenizer.sep_token_id).sum()) == len(examples[number][0])
        assert batch.labels.tolist() == [examples[number][1]]


@pytest.mark.parametrize(("task", "dtype"), [("stsb", torch.float32), ("mnli", torch.int64), ("cola", torch.int64)])
def test_labels_are_scores_for_a_regression_and_classes_else(glue_dir, tokenizer, task, dtype):
    store, _ = load(task, tokenizer, glue_dir)
    assert store.labels.dtype == dtype
    assert store.labels.tolist() == [label for _, label in expected(task, "train.tsv", 44)]


def test_mnli_has_both_evaluation_sets(glue_dir, tokenizer):
    _, evals = load("mnli", tokenizer, glue_dir)
    assert list(evals) == ["validation_matched", "validation_mismatched"]
    assert evals["validation_matched"].sha256 != evals["validation_mismatched"].sha256


def test_limit_train_draws_the_same_examples_for_any_seed(glue_dir, tokenizer):
    stores = [load("rte", tokenizer, glue_dir, limit_train=10, train=Training(seed=seed))[0] for seed in (1, 2)]
    whole, _ = load("rte", tokenizer, glue_dir)
    assert stores[0].sha256 == stores[1].sha256
    assert len(stores[0]) == 10
    assert set(stores[0].lengths) <= set(whole.lengths)
    assert 0 < int(stores[0].labels.sum()) < 10  # drawn from the whole set, and not its first class


def test_limits_beyond_the_data_take_all_of_it(glue_dir, tokenizer):
    store, evals = load("rte", tokenizer, glue_dir, limit_train=1000, limit_eval=1000)
    assert (len(store), len(evals["validation"])) == (44, 20)


def test_limit_eval_takes_the_first_examples(glue_dir, tokenizer):
    _, few = load("mnli", tokenizer, glue_dir, limit_eval=3)
    _, whole = load("mnli", tokenizer, glue_dir)
    assert [len(store) for store in few.values()] == [3, 3]
    for split, store in few.items():
        assert store.lengths.tolist() == whole[split].lengths[:3].tolist()
        assert store.labels.tolist() == whole[split].labels[:3].tolist()


# ---- the hub ----


def put_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize("task", TASKS)
def test_the_hub_gives_the_same_tokens_as_the_folder(glue_dir, tokenizer, monkeypatch, task):
    def load_dataset(name: str, subset: str) -> dict:
        assert (name, subset) == ("nyu-mll/glue", task)
        splits = {"test": {column: [] for column in (*HUB_COLUMNS[task], "label", "idx")}}
        for split, (file, count) in files(task).items():
            texts, labels = zip(*expected(task, file, count), strict=True)
            splits[split] = dict(zip(HUB_COLUMNS[task], map(list, zip(*texts, strict=True)), strict=True))
            splits[split] |= {"label": list(labels), "idx": list(range(count))}
        return splits

    put_datasets(monkeypatch, load_dataset)
    (hub, hub_evals), (folder, folder_evals) = load(task, tokenizer), load(task, tokenizer, glue_dir)
    assert hub.sha256 == folder.sha256
    assert {split: store.sha256 for split, store in hub_evals.items()} == {k: store.sha256 for k, store in folder_evals.items()}


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route to huggingface.co\nand more"), ConnectionError(), ValueError("\nBuilderConfig not found")],
    ids=["with a message", "without one", "with an empty first line"],
)
def test_a_hub_that_fails_points_to_the_folder(monkeypatch, tokenizer, error):
    def load_dataset(*_: str) -> None:
        raise error

    put_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"nyu-mll/glue \(rte\)[^\n]*: \S[^\n]*\n.*--data-dir"):
        load("rte", tokenizer)


def test_without_the_package_datasets_the_folder_is_offered(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(UserError, match=r"package datasets.*--data-dir"):
        load("rte", tokenizer)


# ---- logits to a loss and to metrics ----


def stores(labels: dict[str, np.ndarray]) -> dict[str, types.SimpleNamespace]:
    """Evaluation sets as far as a score reads them."""
    return {split: types.SimpleNamespace(labels=torch.from_numpy(values)) for split, values in labels.items()}


@pytest.mark.parametrize("task", TASKS)
def test_a_score_has_the_papers_metric(task):
    labels = {"stsb": np.array([1.0, 2.0, 3.0])}.get(task, np.array([1, 1, 1, 0]))
    logits = {"stsb": np.array([[2.0], [4.0], [7.0]])}.get(task, np.eye(3 if task == "mnli" else 2)[[1, 0, 1, 1]])
    by_hand = {"accuracy": 2 / 4, "f1": 2 / 3, "matthews": -1 / 3, "pearson": 5 / math.sqrt(2 * 38 / 3), "spearman": 1.0}
    split = next(iter(ROWS[task].dev))
    values = Glue(task).score({split: logits}, stores({split: labels}))
    assert Glue(task).metric == METRIC[task]
    assert METRIC[task] in values
    assert values == {name: pytest.approx(by_hand[name]) for name in values}


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("cola", {"matthews", "accuracy"}),
        ("mrpc", {"accuracy", "f1"}),
        ("qqp", {"accuracy", "f1"}),
        ("stsb", {"pearson", "spearman"}),
    ],
)
def test_tasks_with_two_metrics_report_both(task, names):
    logits, labels = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]]), np.array([1, 0, 1])
    assert set(Glue(task).score({"validation": logits}, stores({"validation": labels}))) == names


def test_mnli_scores_the_matched_set_and_the_mismatched_beside_it():
    right, wrong = np.eye(3)[[0, 1, 2]], np.eye(3)[[1, 1, 2]]
    logits = {"validation_mismatched": wrong, "validation_matched": right}
    assert Glue("mnli").score(logits, stores(dict.fromkeys(logits, np.arange(3)))) == {"accuracy": 1.0, "accuracy_mm": 2 / 3}


def test_check_hands_evaluate_the_classes_of_the_matched_set(monkeypatch):
    asked = put_evaluate(monkeypatch, {"accuracy": 1.0})
    logits = {"validation_matched": np.eye(3)[[0, 1, 2]], "validation_mismatched": np.eye(3)[[1, 1, 1]]}
    line = Glue("mnli").check(logits, stores(dict.fromkeys(logits, np.arange(3))), {"accuracy": 1.0, "accuracy_mm": 1 / 3})
    assert "equal" in line
    assert asked[0] == ("glue", "mnli")
    assert asked[1]["predictions"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("task", "logits", "labels", "value"),
    [
        ("stsb", [[1.0], [3.0]], torch.tensor([2.0, 5.0]), (1 + 4) / 2),
        ("sst2", [[0.0, 0.0]], torch.tensor([1]), math.log(2)),
        ("mnli", [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], torch.tensor([0, 2]), (math.log(1 + 2 / math.e) + math.log(3)) / 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loss_is_squared_error_or_cross_entropy_in_float32(task, logits, labels, value, dtype):
    loss = Glue(task).loss_of(torch.tensor(logits, dtype=dtype), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("task", "outputs"), [("stsb", 1), ("rte", 2), ("mnli", 3)])
def test_the_head_has_an_output_a_class_or_one_for_a_regression(bert_dir, task, outputs):
    net, _ = Glue(task).load_net(Config(task=task, model=str(bert_dir)))
    assert net.classifier.out_features == outputs
