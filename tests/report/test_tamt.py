"""Mask training in tables and figures: names of its rows, losses of scored tickets, means over tasks, training examples."""

from csv import DictReader
from io import StringIO
from pathlib import Path

import figures
import pytest
import rundirs
import tables

from bert_tickets.config import build
from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed, write_checksummed
from bert_tickets.masking.mask import Mask
from bert_tickets.report import published
from bert_tickets.report.formats import csv
from bert_tickets.report.results import comparable, of_tasks, read_results
from bert_tickets.report.rows import FULL
from bert_tickets.report.tables import build as build_table
from bert_tickets.report.tamt import published_row

FIVE = ["cola", "sst2", "stsb", "mnli", "squad"]
IMP = {"prunable": "matrices+embeddings", "scope": "tensor"}


def search(place: Path, objective: str = "mlm", sparsity: float = 0.7, seed: int = 1, **given: object) -> tuple[Path, Path]:
    """A finished run of mask training; returns its ticket's file, and that of a mask of step 1000."""
    settings = {"task": "mlm", "method": "mask_training", "sparsity": sparsity, "objective": objective, "seed": seed, **given}
    folder = rundirs.describe(place, build(settings))
    origin = {"method": "mask_training", "task": "mlm", "seed": seed, "run": folder.name}
    masks = [rundirs.some_mask(sparsity, folder.name, step) for step in (17, 1)]
    rundirs.write_level(folder, 0, Mask(dict(masks[0]), {**origin, "level": 0}), 0.5, "mlm")
    saved = folder / "masks" / "step_0001000.safetensors"
    masks[1].write(saved, **origin, step=1000)
    return rundirs.mask_of(folder, 0), saved


def score(place: Path, mask: Path, loss: float, distance: float, seed: int = 1) -> None:
    folder = rundirs.describe(place, build({"task": "mlm", "method": "score", "mask": str(mask), "seed": seed}))
    rundirs.write_level(folder, 0, Mask.load(mask), 0.3, "mlm", ["above chance"])
    line = read_checksummed(folder / "level_00" / "metrics.json")
    line |= {"metrics": {"accuracy": 0.3, "loss": loss}, "hidden_states": {"cosine": distance, "mse": 9.0}}
    write_checksummed(folder / "level_00" / "metrics.json", line)


def read(*places: Path):
    return read_results(places)[0]


def rows(levels, task: str = "sst2") -> set[str]:
    return set(levels.loc[levels["task"] == task, "row"])


def made(place: Path):
    levels, failures = read_results([place])
    return build_table("tamt", comparable(levels[levels["task"] != "mlm"]), None, failures)


def grid(table, heading: str = "") -> dict[tuple[str, str], dict[str, str]]:
    lines = next(found for name, found in table.grids.items() if name.startswith(heading)).to_dict("records")
    return {(line["row"], line["sparsity"]): line for line in lines}


# ---- rows ----


def test_a_row_has_the_objective_but_not_what_the_preset_implies_for_it(tmp_path):
    """kd has its own optimizer, rate and refresh, and each sparsity its number of steps: these are one row per objective."""
    for objective in ("mlm", "kd", "mlm+kd"):
        for sparsity in (0.5, 0.7):
            ticket, _ = search(tmp_path, objective, sparsity)
            rundirs.run(tmp_path, [0.5], "sst2", 1, mask=ticket)
    levels = read(tmp_path)
    assert rows(levels) == {
        "mask_training ticket of MLM",
        "mask_training (objective kd) ticket of MLM",
        "mask_training (objective mlm+kd) ticket of MLM",
    }
    assert set(levels["setting"]) == {""}
    assert sorted(levels.loc[levels["row"] == "mask_training ticket of MLM", "sparsity"]) == [0.5, 0.7]


def test_other_settings_than_the_objectives_are_named(tmp_path):
    ticket, _ = search(tmp_path, "kd", refresh=1000, lr=5e-5)  # the mlm objective's values
    rundirs.run(tmp_path, [0.5], "sst2", 1, mask=ticket)
    levels = read(tmp_path)
    assert rows(levels) == {"mask_training (objective kd, refresh 1000) ticket of MLM"}
    assert set(levels.loc[levels["task"] == "mlm", "setting"]) == {"lr 5e-05"}


def test_a_note_says_how_the_search_was_trained_once_for_all_sparsities(tmp_path):
    for sparsity, lr in ((0.7, 1e-4), (0.5, 1e-4), (0.6, 2e-4)):
        rundirs.run(tmp_path, [0.5], "sst2", 1, mask=search(tmp_path, sparsity=sparsity, lr=lr)[0])
    assert sorted(note for note in made(tmp_path).notes if "found by" in note) == [
        "mask_training ticket of MLM, 50 %, 70 %: found by a training with lr 0.0001",
        "mask_training ticket of MLM, 60 %: found by a training with lr 0.0002",
    ]


def test_a_mask_saved_on_the_way_is_a_row_of_its_step(tmp_path):
    ticket, saved = search(tmp_path, "kd")
    for mask in (ticket, saved):
        rundirs.run(tmp_path, [0.5], "sst2", 1, mask=mask)
    assert rows(read(tmp_path)) == {
        "mask_training (objective kd) ticket of MLM",
        "mask_training (objective kd, step 1000) ticket of MLM",
    }


def test_a_saved_mask_that_is_also_another_runs_ticket_is_its_own_runs(tmp_path):
    """As one-shot's mask is that of every run whose scores have hardly moved."""
    _, saved = search(tmp_path, "kd")
    ticket, _ = search(tmp_path, "mlm")
    same = Mask.load(ticket)
    Mask(dict(same), Mask.load(saved).info).write(saved)
    rundirs.run(tmp_path, [0.5], "sst2", 1, mask=saved)
    assert rows(read(tmp_path)) == {"mask_training (objective kd, step 1000) ticket of MLM"}


def test_searches_that_differ_in_their_training_are_rows_of_their_own(tmp_path):
    def find(steps: int) -> None:
        found = rundirs.run(tmp_path, [0.5, 0.4], "mlm", 1, max_steps=steps, lr=1e-4, **IMP)
        rundirs.run(tmp_path, [steps / 1000], "sst2", 1, mask=rundirs.mask_of(found, 1))

    find(200)
    assert rows(read(tmp_path)) == {"imp (prunable matrices+embeddings, scope tensor) ticket of MLM"}
    find(300)
    names = {f"imp (prunable matrices+embeddings, scope tensor, max steps {steps}) ticket of MLM" for steps in (200, 300)}
    assert rows(read(tmp_path)) == names
    assert set(read(tmp_path)["search"]) == {f"lr 0.0001, max steps {steps}" for steps in (200, 300)}


# ---- the table ----


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """Full BERT, and tickets of two objectives at 70 %: of mlm two seeds on the five tasks, with losses; else one task. The full
    BERT's masks cover other weights."""
    for seed in (1, 2):
        ticket, _ = search(tmp_path, seed=seed)
        for i, task in enumerate(FIVE):
            with monkeypatch.context() as patch:
                patch.setattr(rundirs, "WEIGHTS", 900)
                rundirs.run(tmp_path, [0.9], task, seed, levels=1)
            rundirs.run(tmp_path, [0.5 + 0.1 * i + 0.01 * seed], task, seed, mask=ticket)
        score(tmp_path, ticket, 1.9 + 0.1 * seed, 0.3, seed)
    for seed, objective, value in ((1, "kd", 0.6), (3, "mlm", 0.515)):
        rundirs.run(tmp_path, [value], "cola", seed, mask=search(tmp_path, objective, seed=seed)[0])
    return tmp_path


def test_the_table_has_the_mean_over_the_five_tasks_beside_the_published_one(whole):
    """By hand: 51, 61, 71, 81, 91 of seed 1 and one more each of seed 2."""
    table = made(whole)
    found = grid(table)
    mlm = found["mask_training ticket of MLM", "70 %"]
    assert (mlm["mean of five tasks"], mlm["published mean"]) == ("71.5 ± 0.7 (2)", "75.4 [digitised]")
    assert (mlm["in the paper"], mlm["CoLA"], mlm["SQuAD"]) == ("TAMT-MLM", "51.5 ± 0.5 (3)", "91.5 ± 0.7 (2)")
    kd = found["mask_training (objective kd) ticket of MLM", "70 %"]
    assert (kd["mean of five tasks"], kd["published mean"], kd["CoLA"]) == ("", "74.4 [digitised]", "60.0 (1)")
    assert found[FULL, "0 %"]["mean of five tasks"] == "90.0 ± 0.0 (2)"
    assert [row for row, _ in found] == [FULL, "mask_training ticket of MLM", "mask_training (objective kd) ticket of MLM"]
    assert any("[digitised]" in note and "0.1 point" in note for note in table.notes)
    assert any("inferred" in note and "mismatched" in note for note in table.notes)
    assert not any("cover" in note for note in table.notes)


def test_losses_stand_beside_the_published_ones(whole):
    line = grid(made(whole), "Losses")["mask_training ticket of MLM", "70 %"]
    assert line["MLM loss"] == "2.050 ± 0.071 (2, warning)"
    assert line["KD loss"] == "0.300 ± 0.000 (2, all equal)"
    assert (line["published MLM loss"], line["published KD loss"]) == ("1.9 [digitised]", "0.3 [digitised]")
    units = {line["task"]: line["unit"] for line in DictReader(StringIO(csv([made(whole)])))}
    assert (units["mlm_loss"], units["kd_loss"], units["cola"]) == ("loss", "loss", "x 100")
    assert set(read(whole).loc[lambda levels: levels["given"], "task"]) == {*FIVE, "mlm_loss", "kd_loss"}


def test_no_mask_training_no_table(tmp_path):
    rundirs.one_task(tmp_path)
    assert made(tmp_path) is None


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (FULL, "full BERT"),
        ("oneshot magnitude by tensor (prunable matrices+embeddings)", "OMP"),
        ("one-shot pruning", ""),  # of all matrices together
        ("imp ticket of MLM", ""),
        ("imp (prunable matrices+embeddings, scope tensor) ticket of MLM", "IMP"),
        ("imp (prunable matrices+embeddings, scope tensor, max steps 2792) ticket of MLM", "IMP"),
        ("imp (prunable matrices+embeddings, scope tensor, max steps 200) ticket of MLM", ""),
        (
            "imp (decay run, prunable matrices+embeddings, reset optimizer True, scope tensor) ticket of MLM, rewind none",
            "IMP",
        ),
        ("mask_training (objective mlm+kd) ticket of MLM", ""),
        ("mask_training (objective kd, step 1000) ticket of MLM", ""),
    ],
)
def test_which_rows_are_the_papers(row, name):
    assert published_row(row) == name


def test_the_published_numbers_are_complete():
    for what in ("score", "mlm_loss", "kd_loss"):
        table = published.DATA["tamt"][what]
        assert [*table] == ["full BERT", "OMP", "IMP", "TAMT-MLM", "TAMT-KD", "random"]
        assert all(len(values) == 4 for values in table.values())
    assert [published.tamt("score", "TAMT-MLM", s / 100) for s in (50, 60, 70, 80, 90)] == [
        *(f"{score} [digitised]" for score in ("79.8", "78.0", "75.4", "68.2")),
        "",
    ]
    assert published.tamt("score", "IMP", 0.8) == "53.7 to 54.7 [digitised]"
    assert published.tamt("score", "full BERT", 0.0) == "82.5 [digitised]"
    assert published.tamt("kd_loss", "OMP", 0.7) == "0.531 [digitised]"
    assert published.tamt("score", "", 0.7) == ""


# ---- tasks, training examples ----


def test_tasks_can_be_chosen_where_others_have_several_settings(tmp_path):
    rundirs.run(tmp_path, [0.8], "sst2", 1, levels=1)
    for steps in (200, 300):
        rundirs.run(tmp_path, [0.5], "mlm", 1, max_steps=steps, levels=1)
    with pytest.raises(UserError, match="leave the task out with --tasks"):
        tables.main(tables.parse([str(tmp_path), "--table", "curves"]))
    tables.main(tables.parse([str(tmp_path), "--table", "curves", "--tasks", "sst2"]))
    with pytest.raises(UserError, match="no level of the task rte; there are sst2, mlm"):
        of_tasks(read(tmp_path), "rte")


def test_scores_over_training_examples_are_drawn_from_runs_of_all_settings(tmp_path, capsys):
    ticket, _ = search(tmp_path / "found")
    for size, epochs, value in ((1000, 8.0, 0.6), (5000, 3.0, 0.7)):
        for seed in (1, 2):
            few = {"limit_train": size, "epochs": epochs}
            rundirs.run(tmp_path / "few", [value + 0.1], "sst2", seed, levels=1, **few)
            rundirs.run(tmp_path / "few", [value + 0.01 * seed], "sst2", seed, mask=ticket, **few)
    rundirs.run(tmp_path / "found", [0.9], "sst2", 1, levels=1)  # of all examples: not drawn
    output = tmp_path / "f.svg"
    figures.main(figures.parse(["examples", str(tmp_path), "--tasks", "sst2", "--output", str(output)]))
    out = capsys.readouterr().out
    cells = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in out.splitlines() if line.startswith("| ")}
    dense, scores = ("70.0 ± 0.0 (2, all equal)", "80.0 ± 0.0 (2, all equal)"), ("61.5 ± 0.7 (2)", "71.5 ± 0.7 (2)")
    assert {line[2] for line in cells} == {"SST-2", *dense, *scores}
    assert ("mask_training ticket of MLM, 70 %", "1000", "61.5 ± 0.7 (2)") in cells
    text = output.read_text()
    assert all(f">{word}<" in text for word in ("training examples", "SST-2", "full BERT", "mask_training ticket of MLM, 70 %"))
    with pytest.raises(UserError, match="no run has --limit-train"):
        figures.main(figures.parse(["examples", str(tmp_path / "found"), "--output", str(output)]))
