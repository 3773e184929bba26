"""EarlyBERT in tables: its rows beside the full BERT's, what is saved, the trade-off, ablations, pre-training."""

import shutil
from csv import DictReader
from io import StringIO
from pathlib import Path

import pytest
import rundirs

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.earlybert import changed, part_of
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


# ---- the trade-off and ablations ----


@pytest.fixture
def ablated(tmp_path) -> Path:
    """Sizes, lambdas and lengths on one task."""
    rundirs.dense(tmp_path, "qnli", 1, 0.9)
    rundirs.early(tmp_path, "qnli", 1, 0.88)
    rundirs.early(tmp_path, "qnli", 1, 0.87, (10.0, 30.0), (2, 6), heads="1/2", neurons=0.5)
    rundirs.early(tmp_path, "qnli", 1, 0.86, (10.0, 40.0), (2, 5), heads="0.5")
    rundirs.early(tmp_path, "qnli", 1, 0.85, lambda_heads=1e-3, lambda_neurons=1e-3)
    rundirs.early(tmp_path, "qnli", 1, 0.84, neuron_scope="layer")
    rundirs.early(tmp_path, "qnli", 1, 0.83, lr=2e-5, epochs=1.0)
    rundirs.early(tmp_path, "qnli", 1, 0.82, gone=(1, 0), neurons=0.0)
    return tmp_path


def test_the_trade_off_is_a_grid_beside_the_published_one(ablated):
    table = made(ablated)
    assert grid(table, "Time saved / score on QNLI") == [
        {"neurons gone": "42 %", "1 of 4 heads": "40.0 / 88.0 (1)", "2 of 4 heads": "50.0 / 86.0 (1)"},
        {"neurons gone": "50 %", "1 of 4 heads": "", "2 of 4 heads": "60.0 / 87.0 (1)"},
    ]
    lines = grid(table, "Published time saved / score, task not named [slides]")
    assert lines[1]["4 of 12 heads"] == "42.97 / 89.61"


def test_ablations_are_those_of_the_slides(ablated):
    lines = {
        (line["varied"], line["value"]): (line["QNLI"], line["published, task not named"])
        for line in grid(made(ablated), "Ablations")
    }
    assert lines["lambda of both penalties", "1e-4"] == ("88.0 (1)", "88.55 [slides]")
    assert lines["lambda of both penalties", "1e-3"] == ("85.0 (1)", "88.43 [slides]")
    assert lines["lambda of both penalties", "1e-2"] == ("no run", "88.42 [slides]")
    assert lines["heads gone of a layer's 12", "6"] == ("86.0 (1)", "87.65 [slides]")
    assert lines["neurons gone, ranked by layer", "40 %"] == ("84.0 (1)", "88.22 [slides]")
    assert lines["learning rate, 1 epoch", "2e-5"] == ("83.0 (1)", "84.9 [slides, digitised]")
    assert ("learning rate, 2 epochs", "2e-5") not in lines  # of this nothing but the preset was run
    assert ("neurons gone, ranked globally", "30 %") not in lines


def test_ablations_are_no_rows_of_the_main_table_and_heads_only_is_one(ablated):
    table = made(ablated)
    assert set(by_row(table, "Scores")) == {FULL, EARLY, RANDOM, BUDGET, "early_bird (neurons 0.0) ticket"}
    assert by_row(table, "Scores by task", "QNLI")["early_bird (neurons 0.0) ticket"]["published"] == "90.33 [slides]"
    assert any(name == "Published, heads only [slides]" for name in table.grids)


def test_a_longer_search_is_left_out_beside_its_shorter_one(ablated):
    longer = "early_bird (record epochs 2.5, whole search True) ticket"
    rundirs.early(ablated, "qnli", 1, 0.88, whole_search=True, record_epochs=2.5)
    rundirs.early(ablated, "qnli", 2, 0.88, whole_search=True, record_epochs=2.5)
    lines = by_row(made(ablated), "Scores by task", "QNLI")
    assert lines[longer]["here"] == "88.0 (1)"


def test_changes_are_read_from_rows():
    row = "early_bird (heads 5/12, neuron scope layer, ticket random) ticket, lr 2e-05"
    assert changed("early_bird (heads 5/12, neuron scope layer, ticket random)", row) == {
        "heads": 0.4167, "neuron scope": "layer", "ticket": "random", "lr": 2e-5,
    }  # fmt: skip
    assert [part_of({}, 12), part_of({}, 16), part_of({"neurons": 0.0}, 12), part_of({"neurons": 0.5}, 12)] == [
        "base",
        "large",
        "heads-only",
        "",
    ]


# ---- pre-training ----


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A dense twin and a slim network, pre-trained with two seeds and fine-tuned on two tasks."""
    for seed in (1, 2):
        twin = rundirs.dense(tmp_path, "mlm", seed, 0.5, 100.0, init="random")
        slim = rundirs.early(tmp_path, "mlm", seed, 0.45, (20.0, 40.0), init="random")
        short = rundirs.early(tmp_path, "mlm", seed, 0.48, (0.0, 60.0), init="random", ticket="full")
        whole, model, cheap = rundirs.pretrained(twin, 0), rundirs.pretrained(slim, 1), rundirs.pretrained(short, 1)
        for task, value in (("mnli", 0.8), ("cola", 0.4)):
            rundirs.run(tmp_path, [value + seed / 100], task, seed, levels=1, model=str(whole))
            rundirs.run(tmp_path, [value + seed / 200], task, seed, levels=1, model=str(cheap))
            mask = rundirs.mask_of(slim, 0)
            rundirs.run(tmp_path, [value - 0.02 + seed * seed / 100], task, seed, mask=mask, model=str(model), execution="slim")
    return tmp_path


def test_slim_pretrained_networks_stand_beside_their_dense_twin(pretrained):
    """By hand: on MNLI 80 + s against 78 + s^2; the models are not a setting."""
    table = made(pretrained)
    twin, slim = "full BERT, pre-trained by imp", "early_bird ticket of MLM, pre-trained by early_bird"
    lines = by_row(table, "Pre-trained, then fine-tuned")
    short = "full BERT, pre-trained by early_bird (ticket full)"
    assert list(lines) == [twin, slim, short]
    assert (lines[twin]["MNLI"], lines[slim]["MNLI"], lines[slim]["MLM"]) == (
        "81.5 ± 0.7 (2)",
        "80.5 ± 2.1 (2)",
        "45.0 ± 0.0 (2, all equal)",
    )
    assert (lines[twin]["kind"], lines[slim]["kind"]) == (FULL, "EarlyBERT")
    differences = by_row(table, "Fine-tuned scores by task")
    assert (differences[slim]["difference"], differences[slim]["published"]) == ("-1.0", "79.97 [slides]")
    costs = {line["row"]: line["time saved"] for line in grid(table, "Cost of pre-training")}
    assert costs == {slim: "40.0 ± 0.0 %", short: "40.0 ± 0.0 %"}
    published_lines = {line["published"]: line for line in grid(table, "Published, pretraining, base [slides]")}
    assert published_lines["EarlyBERT"]["CoLA"] == "41"
    assert not [note for note in table.notes if "model" in note]
    (line,) = [line for line in table.missing if line.startswith("no run of QNLI")]
    assert line.endswith("`TASKS='qnli qqp sst2 rte mrpc squad' bash scripts/earlybert_pretrain.sh`")


def test_slim_models_that_are_fine_tuned_whole_are_no_tickets(pretrained):
    (slim,) = [run for run in pretrained.glob("mlm-early_bird-s1-*") if rundirs.Mask.load(rundirs.mask_of(run, 0)).sparsity]
    rundirs.run(pretrained, [0.9], "mnli", 1, levels=1, model=str(slim / "level_01" / "model"))
    assert len(by_row(made(pretrained), "Pre-trained, then fine-tuned")) == 3


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
