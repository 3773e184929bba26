"""EarlyBERT in tables: its rows beside the full BERT's, and what is saved."""

import shutil
from csv import DictReader
from io import StringIO
from pathlib import Path

import pytest
import rundirs

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.formats import csv
from bert_tickets.report.results import comparable, own_tickets, read_results
from bert_tickets.report.rows import FULL
from bert_tickets.report.tables import TABLES
from bert_tickets.report.tables import build as build_table

EARLY, RANDOM, BUDGET = "early_bird ticket", "early_bird (ticket random) ticket", "early_bird (ticket full) ticket"


def made(place: Path, name: str = "earlybert"):
    levels, failures = read_results([place])
    return build_table(name, comparable(levels), None, failures)


def grid(table, heading: str) -> list[dict[str, str]]:
    return next(found for name, found in table.grids.items() if name.startswith(heading)).to_dict("records")


def by_row(table, heading: str, task: str = "MNLI") -> dict[str, dict[str, str]]:
    return {line["row"]: line for line in grid(table, heading) if line.get("task", task) == task}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two tasks and three seeds: the full BERT, tickets, random ones, and the full BERT at the ticket's budget."""
    place = tmp_path_factory.mktemp("runs")
    for task, off in (("mnli", 0.0), ("squad", 0.1)):
        for seed in (1, 2, 3):
            rundirs.dense(place, task, seed, 0.80 + seed / 100 + off, 100.0 + seed)
            rundirs.early(place, task, seed, 0.78 + seed / 100 + seed * seed / 1000 + off, (10.0, 50.0 + off * 100))
            rundirs.early(place, task, seed, 0.7 + seed * seed / 1000 + off, (1.0, 50.0), ticket="random")
            rundirs.early(place, task, seed, 0.79 + off, (0.0, 70.0), ticket="full")
    return place


@pytest.fixture
def whole(runs, tmp_path) -> Path:
    """A copy of these runs, to be changed."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


# ---- rows ----


def test_searches_are_no_rows_and_full_budgets_no_full_bert(runs):
    levels = comparable(read_results([runs])[0])
    mnli = levels[levels["task"] == "mnli"]
    assert set(mnli["row"]) == {FULL, EARLY, RANDOM, BUDGET}
    assert len(mnli) == 4 * 3
    assert set(mnli.loc[mnli["row"] == FULL, "value"].round()) == {81, 82, 83}
    assert set(levels["setting"]) == {""}  # the batch size is EarlyBERT's


def test_the_searchs_learning_rate_is_named_where_searches_differ_in_it(tmp_path):
    rundirs.dense(tmp_path, "mnli", 1, 0.8)
    rundirs.early(tmp_path, "mnli", 1, 0.7, search_lr=1e-4)
    rundirs.early(tmp_path, "mnli", 1, 0.6, ticket="random")
    assert set(comparable(read_results([tmp_path])[0])["row"]) == {FULL, EARLY, RANDOM}
    rundirs.early(tmp_path, "mnli", 1, 0.7, search_lr=5e-5)
    rows = {FULL, RANDOM, *(f"early_bird (search lr {lr}) ticket" for lr in ("0.0001", "5e-05"))}
    assert set(comparable(read_results([tmp_path])[0])["row"]) == rows


def test_runs_of_another_batch_size_are_refused(tmp_path):
    rundirs.early(tmp_path, "mnli", 1, 0.7, batch_size=64)
    rundirs.dense(tmp_path, "mnli", 1, 0.8, batch_size=64)
    assert set(comparable(read_results([tmp_path])[0])["setting"]) == {"batch size 64"}
    rundirs.dense(tmp_path, "mnli", 2, 0.8)
    with pytest.raises(UserError, match="have different settings"):
        comparable(read_results([tmp_path])[0])


def test_a_full_bert_of_another_batch_size_is_not_compared_with_tickets(tmp_path):
    rundirs.early(tmp_path, "mnli", 1, 0.7)
    ticket = rundirs.oneshot(tmp_path / "masks", 0.4)
    rundirs.given(tmp_path, "mnli", 1, ticket, 0.3, "score")  # trains in no batches
    assert set(comparable(read_results([tmp_path])[0])["setting"]) == {""}
    rundirs.dense(tmp_path, "mnli", 1, 0.8, batch_size=32)  # fine-tuning's
    with pytest.raises(UserError, match=r"have different settings(.|\n)*batch size 128"):
        comparable(read_results([tmp_path])[0])
    rundirs.dense(tmp_path, "mnli", 1, 0.9)
    assert {setting: [*read_results([tmp_path], setting)[0]["value"]] for setting in ("", "batch size 128")} == {
        "": [80.0, 30.0],
        "batch size 128": [70.0, 90.0],
    }


def test_lengths_that_all_tickets_share_are_a_setting_and_others_are_rows(tmp_path):
    rundirs.early(tmp_path, "mnli", 1, 0.7, epochs=1.0)
    rundirs.dense(tmp_path, "mnli", 1, 0.8, epochs=1.0)
    levels = comparable(read_results([tmp_path])[0])
    assert dict(zip(levels["row"], levels["setting"], strict=True)) == {FULL: "epochs 1.0", EARLY: "epochs 1.0"}
    rundirs.early(tmp_path, "mnli", 1, 0.6, epochs=1.0, lr=2e-5)
    rundirs.early(tmp_path, "mnli", 1, 0.5)
    levels = comparable(read_results([tmp_path])[0])
    rows = {FULL, EARLY, f"{EARLY}, epochs 1.0", f"{EARLY}, epochs 1.0, lr 2e-05"}
    assert (set(levels["row"]), set(levels["setting"])) == (rows, {""})
    rundirs.dense(tmp_path, "mnli", 2, 0.8)
    with pytest.raises(UserError, match="have different lengths or learning rates"):
        comparable(read_results([tmp_path])[0])


def test_other_tables_leave_tickets_out(runs):
    levels = comparable(read_results([runs])[0])
    tables = {name: build_table(name, levels) for name in TABLES if name not in ("earlybert", "stability")}
    assert {name for name, table in tables.items() if table} == {"curves"}
    assert set(tables["curves"].cells["row"]) == {FULL}
    assert set(own_tickets(levels)["row"]) == {EARLY, RANDOM}


def test_no_run_no_table(tmp_path):
    rundirs.run(tmp_path, [0.8, 0.7], "mnli", 1)
    assert made(tmp_path) is None


# ---- scores and costs ----


def test_tickets_are_compared_with_the_full_bert(runs):
    """By hand: ticket - full is -2 + s^2 / 10 for seeds 1 to 3, its mean -2 + 14 / 30."""
    table = made(runs)
    lines = by_row(table, "Scores by task")
    assert lines[EARLY]["difference"] == "-1.5"
    assert lines[EARLY]["here"] == "80.5 ± 1.4 (3)"
    assert lines[FULL]["difference"] == ""
    cells = table.cells[(table.cells["task"] == "mnli") & table.cells["p"].notna()]
    assert len(cells) == 3
    assert cells["p_holm"].min() == pytest.approx(3 * cells["p"].min())


def test_published_scores_stand_beside_ours(runs):
    beside = {row: line["published"] for row, line in by_row(made(runs), "Scores by task").items()}
    assert beside == {FULL: "83.16 [slides]", EARLY: "81.81 [slides]", RANDOM: "79.92 [slides]", BUDGET: ""}
    lines = {line["published"]: line for line in grid(made(runs), "Published, base [slides]")}
    assert lines["LayerDrop"] == {
        "published": "LayerDrop", "MNLI": "81.27", "QNLI": "88.91", "QQP": "88.06", "SST-2": "89.89", "SQuAD": "84.25",
        "time saved": "~33 %",
    }  # fmt: skip


def test_time_and_arithmetic_saved_count_the_search(runs):
    """MNLI: 1 - 60 / (100 + s), SQuAD: 1 - 70 / (100 + s). FLOPs: 300 * 100 of the full BERT, 30 * 100 + 200 * 60 of a ticket."""
    table = made(runs)
    cost = by_row(table, "Cost")[EARLY]
    saved = [100 * (1 - 60 / (100 + seed)) for seed in (1, 2, 3)]
    assert cost["time saved"] == f"{sum(saved) / 3:.1f} ± 0.6 %"
    assert (cost["seconds of the search"], cost["of the training"], cost["of the full BERT"]) == (
        "10.0 ± 0.0",
        "50.0 ± 0.0",
        "102.0 ± 1.0",
    )
    assert (cost["FLOPs saved"], by_row(table, "Cost")[BUDGET]["FLOPs saved"]) == ("50.0 ± 0.0 %", "33.3 ± 0.0 %")
    assert (cost["heads kept"], cost["neurons kept"]) == ("6 ± 0 of 8", "7 ± 0 of 12")
    assert (cost["drawn at step"], cost["rule fires at step"]) == ("30 ± 0", "20 ± 0")
    assert by_row(table, "Cost")[RANDOM]["drawn at step"] == ""  # of no search
    line = by_row(table, "Scores")[EARLY]
    other = [100 * (1 - 70 / (100 + seed)) for seed in (1, 2, 3)]
    assert line["time saved"] == f"{sum(other) / 3:.1f} to {sum(saved) / 3:.1f} %"
    assert line["kind"] == "EarlyBERT"


def test_the_arithmetic_that_the_full_bert_recorded_counts(whole):
    for run in whole.glob("mnli-imp-*"):
        rundirs.add(run, 0, flops=150 * 300)
    assert by_row(made(whole), "Cost")[EARLY]["FLOPs saved"] == f"{100 * (1 - 15_000 / 45_000):.1f} ± 0.0 %"


def test_seconds_of_other_machines_are_said(whole):
    words = "differ in host, threads. Their seconds are not comparable"
    assert not [note for note in made(whole).notes if "not comparable" in note]
    for run in whole.glob("squad-early_bird-s1-*"):
        rundirs.timed(run, 10.0, 50.0, host="there", threads=4)
    notes = [note for note in made(whole).notes if "not comparable" in note]
    assert [note.startswith("SQuAD: ") and words in note for note in notes] == [True]


def test_without_seconds_nothing_is_saved(whole):
    for run in whole.glob("*"):
        (run / "log.jsonl").unlink()
    table = made(whole)
    assert by_row(table, "Scores")[EARLY]["time saved"] == ""
    assert "time saved" not in by_row(table, "Cost")[EARLY]


def test_the_lengths_of_the_trainings_are_said(runs):
    notes = made(runs).notes
    assert (
        "MNLI: trained are the full BERT for 3 epochs at 2e-05, EarlyBERT for 2 epochs at 4e-05 after a search at 2e-05." in notes
    )
    assert (
        "SQuAD: trained are the full BERT for 2 epochs at 3e-05, EarlyBERT for 3 epochs at 3e-05 after a search at 3e-05."
        in notes
    )


def test_missing_runs_are_named_with_the_sweep(whole):
    rundirs.dense(whole, "mnli", 4, 0.8)
    lines = [line for line in made(whole).missing if line.startswith("no run of MNLI")]
    assert any(EARLY in line for line in lines)
    assert all(line.endswith("`TASKS='mnli' SEEDS='4' bash scripts/earlybert.sh`") for line in lines)
    (line,) = [line for line in made(whole).missing if line.startswith("no run of QNLI")]
    assert line.endswith("`TASKS='qnli qqp sst2' bash scripts/earlybert.sh`")


def test_costs_are_columns_of_the_csv(runs):
    (line, *_) = [line for line in DictReader(StringIO(csv([made(runs)]))) if (line["task"], line["row"]) == ("mnli", EARLY)]
    assert float(line["search_seconds"]) == 10
    assert float(line["time_saved"]) == pytest.approx(sum(100 * (1 - 60 / (100 + seed)) for seed in (1, 2, 3)) / 3)
    assert "time_saved" not in csv([made(runs, "curves")])


def test_a_ticket_without_runs_has_no_sparsity(tmp_path):
    rundirs.dense(tmp_path, "qnli", 1, 0.9)
    rundirs.early(tmp_path, "qnli", 1, 0.88)
    sparsities = {line["row"]: line["sparsity"] for line in DictReader(StringIO(csv([made(tmp_path)])))}
    assert sparsities.pop(FULL) == "0.0"
    assert float(sparsities.pop(EARLY)) > 0
    assert sparsities == {RANDOM: "", BUDGET: ""}


def test_published_numbers_of_earlybert_are_complete():
    for part in ("base", "large", "heads-only", "pretraining-base", "pretraining-large"):
        table = published.EARLYBERT[part]
        assert all(len(scores) == len(table["tasks"]) for scores in table["rows"].values())
    mean = {row: sum(scores) / 5 for row, scores in published.EARLYBERT["base"]["rows"].items()}
    assert mean == pytest.approx({FULL: 88.658, "EarlyBERT": 87.578, "random": 85.59, "LayerDrop": 86.476})
    grid = published.earlybert_tradeoff()
    assert (len(grid), sum(time for time, _ in grid.values()), sum(score for _, score in grid.values())) == pytest.approx(
        (12, 517.13, 1074.04)
    )
    flags = [flags for ablation in published.EARLYBERT["ablations"] for *_, flags in ablation["rows"]]
    assert len(flags) == 3 + 3 + 3 + 3 + 4 + 4
    assert published.earlybert("base", "LayerDrop", "cola") == published.earlybert("", FULL, "mnli") == ""
