"""From run directories to the paper's tables: their values, and what is missing."""

import csv
import io
import shutil
import sys
from pathlib import Path

import pytest
import rundirs

import bert_tickets
from bert_tickets import config
from bert_tickets.errors import UserError
from bert_tickets.methods import imp
from bert_tickets.report import formats
from bert_tickets.report.formats import Table
from bert_tickets.report.results import comparable, read_results
from bert_tickets.report.rows import FULL
from bert_tickets.report.tables import build

TICKET = "imp (rate 0.2) ticket"
CONTROLS = ("random pruning", f"{TICKET}, random weights", f"{TICKET}, shuffled weights")


def made(name: str, *places: Path, sparsity: float | None = None) -> Table | None:
    levels, failures = read_results(places)
    return build(name, comparable(levels), sparsity, failures)


@pytest.fixture(scope="module")
def transfers(tmp_path_factory):
    return rundirs.transfers(tmp_path_factory.mktemp("transfers"))


def grid(table: Table, heading: str = "") -> list[dict[str, str]]:
    """A grid of a table by the beginning of its heading, a dictionary per line."""
    return next(grid for name, grid in table.grids.items() if name.startswith(heading)).to_dict("records")


def scores(table: Table, *columns: str) -> dict[tuple[str, str], str | tuple]:
    """The listing of a table: (row, sparsity) -> the given columns, by default `here`."""
    lines = grid(table, "Scores")
    return {(line["row"], line["sparsity"]): tuple(line[c] for c in columns) if columns else line["here"] for line in lines}


def records(*tables: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(formats.csv(tables))))


# ---- the best of several evaluations ----


def test_a_best_score_says_of_how_many_evaluations_in_every_format(tmp_path):
    found = rundirs.find(tmp_path, {57: [0.80, 0.70], 58: [0.82, 0.72]}, eval_steps=5, report="best")
    for seed, folder in found.items():
        rundirs.evaluate(folder, 0, 0.90, 20)
        rundirs.evaluate(folder, 1, 0.85, 20 if seed == 57 else 12)
    table = made("curves", tmp_path)
    assert [line["SST-2"].removesuffix(" *") for line in grid(table)] == [
        "90.0 ± 0.0 (2, best of 20, all equal)",
        "85.0 ± 0.0 (2, best of 12 to 20, all equal)",
    ]
    note = "Scores are the best of 12 to 20 evaluations of a level, chosen on the set that they are reported on"
    assert note in formats.markdown([table])
    assert note in formats.latex([table])
    assert [line["best_of"] for line in records(table)] == ["20;20", "20;12"]


def test_last_scores_say_nothing_of_evaluations(tmp_path):
    rundirs.evaluate(rundirs.find(tmp_path, {57: [0.80, 0.70]}, eval_steps=5)[57], 1, 0.85, 20)
    table = made("curves", tmp_path)
    assert [line["SST-2"] for line in grid(table)] == ["80.0 (1)", "70.0 (1)"]
    assert "best" not in formats.markdown([table])


# ---- Tables 2 and 4 ----


def test_table_2_has_the_ticket_the_controls_and_the_published_numbers(tmp_path):
    rundirs.one_task(tmp_path)
    table = made("2", tmp_path)
    columns = ["task", "method", "within one deviation", "published [fig]", "match or exceed", "published [notes]"]
    cells = ["SST-2", "imp (rate 0.2)", "40 %", "60 %", "40 % (not at 20 %)", "50 %"]
    assert grid(table) == [dict(zip(columns, cells, strict=True))]
    control = ("60.0 ± 10.0 (3)", "-21.0", "-44.7 to +2.7", "not significant")
    assert scores(table, "here", "difference", "95 % interval", "verdict") == {
        (FULL, "0 %"): ("81.0 ± 1.0 (3)", "", "", ""),
        (TICKET, "40 %"): ("81.0 ± 2.0 (3)", "0.0", "-2.5 to +2.5", "not significant"),
        **{(row, "40 %"): control for row in CONTROLS},
        (TICKET, "60 %"): ("61.0 ± 1.0 (3)", "-20.0", "-22.5 to -17.5", "below"),
    }
    assert [text for (text,) in scores(table, "published").values()] == [
        "92.1 ± 0.1 [fig]",
        *(f"{score} at 60 % [fig]" for score in ("91.9 ± 0.5", "83.1", "80.2", "82.6")),
        "91.9 ± 0.5 at 60 % [fig]",
    ]
    assert any("[fig] read off the authors' own figure files; [notes] taken from third-party" in note for note in table.notes)
    assert scores(made("4", tmp_path)) == {(FULL, "0 %"): "81.0 ± 1.0 (3)", (TICKET, "40 %"): "81.0 ± 2.0 (3)"}


@pytest.mark.parametrize(
    ("curves", "within", "exceed"),
    [
        ({57: [0.80, 0.5, 0.8, 0.1], 58: [0.82, 0.5, 0.8, 0.1]}, "40 % (not at 20 %)", "none"),
        ({57: [0.80, 0.8], 58: [0.82, 0.9]}, "20 % (the last level)", "20 % (the last level)"),
        ({57: [0.80, 0.8, 0.8], 58: [0.82, 0.9]}, "20 % (undecided at 40 %)", "20 %"),
        ({57: [0.80, 0.9, 0.9]}, "undecided: needs two seeds", "40 % (the last level)"),
    ],
)
def test_the_highest_sparsity_comes_with_what_speaks_against_it(tmp_path, curves, within, exceed):
    rundirs.find(tmp_path, curves)
    for name in ("2", "4"):
        (line,) = grid(made(name, tmp_path))
        assert (line["within one deviation"], line["match or exceed"]) == (within, exceed)


def test_another_method_has_rows_without_code_for_it(tmp_path, monkeypatch):
    runs, presets = tmp_path / "runs", tmp_path / "more" / "presets"
    presets.mkdir(parents=True)
    (presets / "toy.toml").touch()
    monkeypatch.setattr(bert_tickets, "__path__", [*bert_tickets.__path__, str(presets.parent)])
    monkeypatch.setitem(sys.modules, "bert_tickets.methods.toy", imp)
    rundirs.find(runs, {57: [0.8, 0.7], 58: [0.81, 0.7]})
    found = rundirs.find(runs, {57: [0.8, 0.9], 58: [0.81, 0.9]}, method="toy")
    rundirs.run(runs, [0.6], mask=rundirs.mask_of(found[57], 1), init="random")
    table = made("2", runs)
    lines = {line["method"]: line for line in grid(table)}
    assert lines["toy (rate 0.2)"]["within one deviation"] == "20 % (the last level)"
    assert [lines[f"{name} (rate 0.2)"]["published [fig]"] for name in ("toy", "imp")] == ["", "60 %"]
    assert scores(table)["toy (rate 0.2) ticket, random weights", "20 %"] == "60.0 (1 of 2)"
    assert any(line.endswith("seeds 58: toy (rate 0.2) ticket, random weights") for line in table.missing)
    monkeypatch.undo()  # the method is not installed any more
    for cached in (config.settings_class, config._preset):
        cached.cache_clear()
    assert "toy (rate 0.2)" in [line["method"] for line in grid(made("2", runs))]


# ---- warnings, undefined values, missing runs ----


def test_undefined_values_are_marked_and_never_match(tmp_path):
    rundirs.find(tmp_path, {57: [0.5, None, 0.5, None], 58: [0.5, 0.5, 0.5, None]}, "cola")
    table = made("curves", tmp_path)
    equal = "50.0 ± 0.0 (2, all equal)"
    assert [line["CoLA"] for line in grid(table)] == [equal, "50.0 (1 of 2, 1 undefined)", f"{equal} **", "undefined (0 of 2)"]
    assert f"Undefined: CoLA, {TICKET} at 20 %: seed 57" in table.notes
    found = {row["sparsity"]: row for row in records(table)}
    assert (found["0.2"]["undefined"], found["0.2"]["within_one_sd"], found["0.2"]["n"]) == ("57", "False", "1")
    assert (found["0.6"]["verdict"], found["0.6"]["mean"]) == ("undefined", "")


def test_missing_seeds_are_counted_and_unpaired_ones_named(tmp_path):
    rundirs.one_task(tmp_path)
    rundirs.find(tmp_path, {60: [0.9]})
    for run in tmp_path.glob("sst2-transfer-s58-*"):
        if '"init": "random"' in (run / "run.json").read_text():
            shutil.rmtree(run)
    table = made("2", tmp_path)
    found = scores(table, "here", "pairs")
    assert found[FULL, "0 %"] == ("83.2 ± 4.6 (4)", "")
    assert found[TICKET, "40 %"] == ("81.0 ± 2.0 (3 of 4)", "3 (1 unpaired)")
    assert found[CONTROLS[1], "40 %"] == ("60.0 ± 14.1 (2 of 4)", "2 (2 unpaired)")
    command = "`TASKS='sst2' SEEDS='58 60' SPARSITY=40 bash scripts/table2.sh`"
    assert f"no run of SST-2 at 40 %, seeds 58 60: {CONTROLS[1]}. To make them: {command}" in table.missing


def test_unfinished_and_diverged_runs_are_named(tmp_path):
    folder = rundirs.run(tmp_path, [0.8, 0.8], levels=10)
    rundirs.fail(folder, 2, "the loss became nan by step 40")
    rundirs.fail(rundirs.run(tmp_path, [], "rte", levels=10), 0, "fp16 gradients overflowed")
    missing = made("2", tmp_path).missing
    assert f"{folder}: level 2 diverged: the loss became nan by step 40" in missing
    assert f"{folder}: 2 of 10 levels are finished" in missing
    assert any("rte" in line and "fp16 gradients overflowed" in line for line in missing)
    assert "no run of QQP" not in missing[-1]
    assert "WNLI" in missing[-1]


def test_masks_that_cover_different_weights_have_a_note(tmp_path, monkeypatch):
    rundirs.find(tmp_path, {57: [0.8, 0.7]})
    monkeypatch.setattr(rundirs, "WEIGHTS", 2000)
    rundirs.find(tmp_path, {57: [0.8, 0.6]}, prunable="matrices+biases")
    (note,) = [note for note in made("curves", tmp_path).notes if "cover" in note]
    assert note == "SST-2: the masks cover 1,000 or 2,000 weights; their sparsities are not comparable."


# ---- Table 3, transfer, perturbed weights ----


def test_table_3_compares_with_rewinding_to_the_pretrained_weights(tmp_path):
    rundirs.find(tmp_path, rundirs.CURVE)
    assert made("3", tmp_path) is None
    rundirs.find(tmp_path, {seed: [0.8, 0.7, 0.7, 0.5 + seed / 1000] for seed in rundirs.CURVE}, rewind="5%")
    rundirs.find(tmp_path, {57: [0.8, 0.7, 0.7, 0.65]}, rewind="none")
    table = made("3", tmp_path)
    assert scores(table, "here", "difference", "pairs") == {
        (FULL, "0 %"): ("81.0 ± 1.0 (3)", "", ""),
        (TICKET, "60 %"): ("61.0 ± 1.0 (3)", "", ""),
        (f"{TICKET}, rewind 5%", "60 %"): ("55.8 ± 0.1 (3)", "-5.2", "3"),
        **{(f"{TICKET}, rewind {n}%", "60 %"): ("no run", "", "") for n in (10, 20, 50)},
        (f"{TICKET}, rewind none", "60 %"): ("65.0 (1 of 3)", "+5.0", "1 (2 unpaired)"),
    }
    assert scores(made("3", tmp_path, sparsity=0.2))[f"{TICKET}, rewind 5%", "20 %"] == "70.0 ± 0.0 (3, all equal)"
    assert any("rewind 20%; " in line and "SEEDS='57 58 59' bash scripts/rewinding.sh" in line for line in table.missing)


def test_transfer_is_the_difference_to_the_targets_full_bert(transfers):
    table = made("transfer", transfers)
    with pytest.raises(UserError, match="no ticket of 70 % was trained on another task; there are some of 40 %"):
        made("transfer", transfers, sparsity=0.7)
    assert [list(line.values()) for line in grid(table)] == [
        [f"{TICKET} of MNLI", "+1.00 (2)", "-1.00 (2)", "-1.00 (2)", "2 of 2"],
        [f"{TICKET} of QQP", "-5.00 (2)", "-4.00 (2)", "-5.00 (2)", "0 of 2"],
        [f"{TICKET} of SST-2", "-5.00 (2)", "-5.00 (2)", "-2.00 (2)", "0 of 2"],
        ["one-shot pruning", "no run", "-20.00 (2, all equal)", "no run", "0 of 1"],
    ]
    published = {line["ticket"]: list(line.values())[1:] for line in grid(table, "Published [fig], at 70 %")}
    assert published[f"{TICKET} of MNLI"] == ["+0.14", "-0.99", "-1.22", "2"]
    assert published["one-shot pruning"] == ["+0.07", "-0.57", "-0.99", "4"]
    assert {row["published"] for row in records(table) if row["sparsity"] == "0.4"} == {""}  # Figure 2 is at 70 %
    assert any("TASKS='mnli' SEEDS='57 58' SPARSITY=40 bash scripts/transfer.sh" in line for line in table.missing)


def test_rewound_tickets_and_other_seeds_do_not_change_the_transfer_table(transfers, tmp_path):
    before = grid(made("transfer", transfers))
    later = rundirs.find(tmp_path, {57: [0.1, 0.1, 0.1]}, "mnli", rewind="5%")
    rundirs.run(tmp_path, [0.1], "qqp", 57, mask=rundirs.mask_of(later[57], 2))
    assert grid(made("transfer", transfers, tmp_path)) == before
    rundirs.find(tmp_path, {59: [0.80, 0.79, 0.78]})  # a seed of Table 2 that the transfer sweep does not use
    table = made("transfer", transfers, tmp_path)
    assert [line["SST-2"] for line in grid(table)[1:3]] == ["-5.00 (2)", "-2.00 (3)"]
    assert not any("59" in line for line in table.missing if "transfer.sh" in line)


def test_perturbed_weights_are_compared_with_the_pretrained_ones(tmp_path):
    folders = rundirs.one_task(tmp_path)
    assert made("weights", tmp_path) is None  # Table 2 has these
    for sigma in ("1", "0.05"):
        noise = rundirs.weights(tmp_path / f"n{sigma}", f"noise of {sigma} times 0.0387, the spread of its matrices")
        for seed, folder in folders.items():
            rundirs.run(tmp_path, [0.7], "sst2", seed, mask=rundirs.mask_of(folder, 2), init=noise)
    table = made("weights", tmp_path)
    differences = {row: difference for (row, _), (difference,) in scores(table, "difference").items()}
    rows = [f"{TICKET}, {words}" for words in ("noise of 0.05", "noise of 1", "random weights", "shuffled weights")]
    expected = ["", "", "-11.0", "-11.0", "-21.0", "-21.0"]
    assert list(differences.items()) == list(zip([FULL, TICKET, *rows], expected, strict=True))
    assert {row["reference"] for row in records(table)} == {"", TICKET}
