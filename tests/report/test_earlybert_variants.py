"""EarlyBERT in tables: the trade-off, ablations, pre-training."""

from pathlib import Path

import pytest
import rundirs
from test_earlybert import BUDGET, EARLY, RANDOM, by_row, grid, made

from bert_tickets.report.earlybert import changed, part_of
from bert_tickets.report.rows import FULL

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
    """The preset's ticket is in its cell, not another one of its size."""
    rundirs.early(ablated, "qnli", 1, 0.5, heads="0.3")
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


def test_learning_rates_stand_by_how_long_they_were_trained(tmp_path):
    """Of SQuAD, whose preset is neither; and where all tickets of a task were trained for an epoch."""
    rundirs.early(tmp_path, "squad", 1, 0.5)
    rundirs.early(tmp_path, "squad", 1, 0.6, lr=4e-5, epochs=2.0)
    rundirs.early(tmp_path, "squad", 1, 0.7, lr=4e-5, epochs=1.0)
    for lr, value in ((4e-5, 0.8), (2e-5, 0.9)):
        rundirs.early(tmp_path, "qnli", 1, value, epochs=1.0, lr=lr)
    lines = {(line["varied"], line["value"]): (line["QNLI"], line["SQuAD"]) for line in grid(made(tmp_path), "Ablations")}
    assert lines["learning rate, 1 epoch", "4e-5"] == ("80.0 (1)", "70.0 (1)")
    assert lines["learning rate, 1 epoch", "2e-5"] == ("90.0 (1)", "no run")
    assert lines["learning rate, 2 epochs", "4e-5"] == ("no run", "60.0 (1)")
    assert lines["learning rate, 2 epochs", "2e-5"] == ("no run", "no run")


def test_ablations_are_no_rows_of_the_main_table_and_heads_only_is_one(ablated):
    table = made(ablated)
    assert set(by_row(table, "Scores")) == {FULL, EARLY, RANDOM, BUDGET, "early_bird (neurons 0.0) ticket"}
    assert by_row(table, "Scores by task", "QNLI")["early_bird (neurons 0.0) ticket"]["published"] == "90.33 [slides]"
    assert any(name == "Published, heads only [slides]" for name in table.grids)


def test_a_longer_search_is_left_out_beside_its_shorter_one(ablated):
    longer = "early_bird (record epochs 2.5, whole search True) ticket"
    for seed in (1, 2):
        rundirs.add(rundirs.early(ablated, "qnli", seed, 0.88, whole_search=True, record_epochs=2.5), 0, steps=400)
    lines = by_row(made(ablated), "Scores by task", "QNLI")
    assert lines[longer]["here"] == "88.0 (1)"


def test_of_searches_that_are_whole_by_the_preset_the_shorter_is_shown(tmp_path):
    whole = rundirs.early(tmp_path, "qnli", 1, 0.8, (50.0, 50.0), protocol="released")
    rundirs.add(whole, 0, steps=400)
    rundirs.early(tmp_path, "qnli", 1, 0.8, (10.0, 50.0), protocol="released", whole_search=False)
    (line,) = (line for line in grid(made(tmp_path), "Cost") if line["task"] == "QNLI")
    assert line["seconds of the search"] == "10.0"


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
    assert part_of({"neurons": 0.0}, 16) == ""  # the slides have heads only of base


def test_a_sweep_at_a_learning_rate_of_its_own_has_all_ablations(tmp_path):
    """The runs that vary something else say what is its own; the preset's rate is then one of the ablation."""
    rundirs.dense(tmp_path, "qnli", 1, 0.9, lr=1e-4)
    rundirs.early(tmp_path, "qnli", 1, 0.88, lr=1e-4, search_lr=1e-4)
    rundirs.early(tmp_path, "qnli", 1, 0.87, (10.0, 40.0), (2, 5), heads="1/2", lr=1e-4, search_lr=1e-4)
    rundirs.early(tmp_path, "qnli", 1, 0.86, search_lr=1e-4)
    rundirs.early(tmp_path, "qnli", 1, 0.85, lr=2e-5, epochs=1.0, search_lr=1e-4)
    table = made(tmp_path)
    lines = {(line["varied"], line["value"]): line["QNLI"] for line in grid(table, "Ablations")}
    assert lines["heads gone of a layer's 12", "4"] == "88.0 (1)"
    assert lines["learning rate, 2 epochs", "4e-5"] == "86.0 (1)"
    assert lines["learning rate, 1 epoch", "2e-5"] == "85.0 (1)"
    assert by_row(table, "Scores")[EARLY]["QNLI"] == "88.0 (1)"
    assert {EARLY, f"{EARLY}, lr 4e-05", f"{EARLY}, epochs 1.0, lr 2e-05"} <= set(table.cells["row"])


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


def test_networks_that_were_pretrained_for_other_lengths_are_other_rows(pretrained):
    slim = rundirs.early(pretrained, "mlm", 1, 0.4, init="random", max_steps=4000)
    given = {"mask": rundirs.mask_of(slim, 0), "model": str(rundirs.pretrained(slim, 1)), "execution": "slim"}
    rundirs.run(pretrained, [0.6], "mnli", 1, **given)
    lines = by_row(made(pretrained), "Pre-trained, then fine-tuned")
    (short,) = (row for row in lines if "max steps 4000" in row)
    assert lines[short]["MNLI"] == "60.0 (1 of 2)"
    assert lines["early_bird ticket of MLM, pre-trained by early_bird"]["MNLI"] == "80.5 ± 2.1 (2)"


def test_slim_models_that_are_fine_tuned_whole_are_no_tickets(pretrained):
    (slim,) = [run for run in pretrained.glob("mlm-early_bird-s1-*") if rundirs.Mask.load(rundirs.mask_of(run, 0)).sparsity]
    rundirs.run(pretrained, [0.9], "mnli", 1, levels=1, model=str(slim / "level_01" / "model"))
    assert len(by_row(made(pretrained), "Pre-trained, then fine-tuned")) == 3
