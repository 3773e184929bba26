"""From run directories to the paper's tables: what stands in them, what is missing, and every format."""

import csv
import io
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from statistics import mean, stdev

import pytest
import rundirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_tickets.errors import UserError
from bert_tickets.files import read_json
from bert_tickets.masking.mask import Mask
from bert_tickets.report.cells import choose
from bert_tickets.report.layout import Panel, Table, latex, markdown, score, tidy
from bert_tickets.report.published import FULL, RANDOM_PRUNING, RANDOM_WEIGHTS, SHUFFLED_WEIGHTS, TICKET
from bert_tickets.report.results import read_failures, read_records
from bert_tickets.report.transfers import transfer
from bert_tickets.runs.summary import matching as winning
from bert_tickets.runs.summary import rewinding as variations

ROOT = Path(__file__).parent.parent
CURVE = {57: [0.80, 0.81, 0.79, 0.60], 58: [0.82, 0.81, 0.83, 0.61], 59: [0.81, 0.80, 0.81, 0.62]}


def pool(*places):
    return choose(read_records(places), read_failures(places))


def find(place: Path, curves: dict[int, list[float | None]], task: str = "sst2", **flags) -> dict[int, Path]:
    """Runs that find tickets at 0, 20, 40, ... %, one a seed."""
    return {seed: rundirs.run(place, values, task, seed, rate=0.2, **flags) for seed, values in curves.items()}


def control(place: Path, folders: dict[int, Path], percent: int, values: list[float | None], task: str = "sst2") -> None:
    """Table 2's last three rows at a sparsity, all with these values by seed."""
    shuffled = rundirs.weights(place / "w.safetensors", "the entries of each matrix shuffled")
    for (seed, folder), value in zip(folders.items(), values, strict=True):
        own = rundirs.mask_of(folder, percent // 20)
        rundirs.run(place, [value], task, seed, mask=rundirs.oneshot(place / f"r{percent}_{seed}", percent / 100, seed=seed))
        rundirs.run(place, [value], task, seed, mask=own, init="random")
        rundirs.run(place, [value], task, seed, mask=own, init=shuffled)


@pytest.fixture
def one_task(tmp_path):
    control(tmp_path, find(tmp_path, CURVE), 40, [0.5, 0.6, 0.7])
    return tmp_path


def rows(table: Table) -> dict[tuple, list[str]]:
    """A table's first panel by its lines' first two or three cells."""
    panel = table.panels[0]
    return {tuple(line[: panel.words]): list(line[panel.words :]) for line in panel.lines}


def records(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(tidy([table]))))


# ---- Table 2 ----


def test_table_2_has_every_row(one_task):
    table = winning.table2(pool(one_task))
    assert rows(table) == {
        ("SST-2", "highest winning", "40 %"): ["81.0 ± 1.0 (3)", "81.0 ± 2.0 (3)", *["60.0 ± 10.0 (3)"] * 3],
        ("", "published", "60 %"): ["92.1 ± 0.1", "91.9 ± 0.5", "83.1", "80.2", "82.6"],
    }
    assert table.panels[0].header[3:] == [FULL, TICKET, RANDOM_PRUNING, RANDOM_WEIGHTS, SHUFFLED_WEIGHTS]


def test_csv_goes_back_to_the_runs_in_full_precision(one_task):
    found = {row["row"]: row for row in records(winning.table2(pool(one_task)))}
    values = [100 * CURVE[seed][2] for seed in CURVE]
    ticket = found[TICKET]
    assert float(ticket["mean"]) == mean(values)
    assert float(ticket["sd"]) == stdev(values)
    assert (ticket["n"], ticket["seeds"], ticket["sparsity"], ticket["unit"]) == ("3", "57;58;59", "0.4", "x 100")
    assert (ticket["published_mean"], ticket["published_sd"], ticket["published_sparsity"]) == ("91.9", "0.5", "0.6")
    assert (ticket["within_one_sd"], ticket["match_or_exceed"], ticket["reference"]) == ("True", "True", FULL)
    for row in found.values():
        folders = [Path(name) for name in row["runs"].split(";")]
        assert len(folders) == 3
        assert all((folder / "run.json").exists() for folder in folders)
        masks = [rundirs.mask_of(folder, int(level)) for folder, level in zip(folders, row["levels"].split(";"), strict=True)]
        assert [Mask.load(mask).sha256() for mask in masks] == row["masks"].split(";")
    assert {row["task"] for row in found.values()} == {"sst2"}


def test_sources_go_from_each_number_to_its_run_and_mask(command, one_task, capsys):
    command(one_task, "--sources")
    _, _, text = capsys.readouterr().out.partition("## Where these numbers come from\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]
    assert len(lines) == len({tuple(line) for line in lines}) == 3 * (4 + 3)  # seeds; levels and controls
    for task, _, sparsity, seed, value, run, level, sha256 in lines:
        assert task == "SST-2"
        told = read_json(Path(run) / f"level_{int(level):02d}" / "metrics.json")
        assert f"{100 * told['metrics']['accuracy']:.4f}" == value
        assert f"{100 * told['sparsity']:.0f} %" == sparsity
        assert told["mask_sha256"] == sha256
        assert read_json(Path(run) / "run.json")["config"]["seed"] == int(seed)
    command(one_task, "--sources", "--format", "latex")
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("% SST-2, ")]
    assert [line.split(", ")[-1] for line in comments] == [line[-1] for line in lines]


def test_csv_has_its_sources_already(command, one_task, capsys):
    with pytest.raises(SystemExit):
        command(one_task, "--sources", "--format", "csv")
    assert "CSV has them in its last columns" in capsys.readouterr().err


def test_controls_elsewhere_have_a_line_of_their_own(tmp_path):
    """Their runs were made at 40 %, and the highest winning sparsity is 20 %: each line says where it stands."""
    control(tmp_path, find(tmp_path, {57: [0.8, 0.8, 0.1], 58: [0.82, 0.82, 0.1]}), 40, [0.05, 0.06])
    table = winning.table2(pool(tmp_path))
    assert rows(table) == {
        ("SST-2", "highest winning", "20 %"): ["81.0 ± 1.4 (2)", "81.0 ± 1.4 (2)", "no run", "no run", "no run"],
        ("", "controls", "40 %"): ["81.0 ± 1.4 (2)", "10.0 ± 0.0 (2, all equal)", *["5.5 ± 0.7 (2)"] * 3],
        ("", "published", "60 %"): ["92.1 ± 0.1", "91.9 ± 0.5", "83.1", "80.2", "82.6"],
    }
    missing = [line for line in table.missing if "SPARSITY=20" in line]
    assert len(missing) == 1
    assert "no run of SST-2 at 20 %, seeds 57, 58: random pruning, random weights, shuffled weights" in missing[0]


def test_of_controls_at_many_sparsities_one_is_shown(tmp_path):
    """As the one-shot sweep leaves them; the published sparsity where it is among them."""
    find(tmp_path, {57: [0.8, 0.1, 0.1, 0.1], 58: [0.81, 0.1, 0.1, 0.1]})
    for percent in (20, 40, 60):
        for seed in (57, 58):
            mask = rundirs.oneshot(tmp_path / f"{percent}_{seed}", percent / 100, seed=seed)
            rundirs.run(tmp_path, [0.5], "sst2", seed, mask=mask)
    lines = winning.table2(pool(tmp_path)).panels[0].lines
    assert [line[:4] for line in lines[:2]] == [
        ["SST-2", "highest winning", "none", "80.5 ± 0.7 (2)"],
        ["", "controls", "60 %", "80.5 ± 0.7 (2)"],
    ]


def test_the_highest_sparsity_says_what_is_to_be_said_against_it(tmp_path):
    find(tmp_path / "gap", {57: [0.80, 0.5, 0.8, 0.1], 58: [0.82, 0.5, 0.8, 0.1]})
    assert rows(winning.table4(pool(tmp_path / "gap")))[("SST-2", "none", "50 %", "40 % (though not at 20 %)", "60 %")]
    find(tmp_path / "last", {57: [0.80, 0.8], 58: [0.82, 0.9]})
    said = "20 % (the last level here)"
    assert rows(winning.table4(pool(tmp_path / "last")))[("SST-2", said, "50 %", said, "60 %")]
    find(tmp_path / "undecided", {57: [0.80, 0.8, 0.8], 58: [0.82, 0.9]})
    assert rows(winning.table2(pool(tmp_path / "undecided")))[("SST-2", "highest winning", "20 % (undecided at 40 %)")]


def test_one_seed_wins_nothing(tmp_path):
    control(tmp_path, find(tmp_path, {57: [0.8, 0.9, 0.9]}), 40, [0.5])
    table = winning.table2(pool(tmp_path))
    assert rows(table)[("SST-2", "highest winning", "undecided: the criterion needs two seeds")][0] == "80.0 (1)"
    assert {line[-1] for line in table.panels[1].lines} == {"one seed: no interval"}
    assert rows(winning.table4(pool(tmp_path)))[
        ("SST-2", "40 % (the last level here)", "50 %", "undecided: the criterion needs two seeds", "60 %")
    ]
    assert "*" not in "".join(cell for line in winning.curves(pool(tmp_path)).panels[0].lines for cell in line[2:])


# ---- what is not there ----


def test_undefined_values_are_said_and_never_match(tmp_path):
    find(tmp_path, {57: [0.5, None, 0.5, None], 58: [0.5, 0.5, 0.5, None]}, "cola")
    table = winning.curves(pool(tmp_path))
    assert rows(table) == {
        (TICKET, "0 %"): ["50.0 ± 0.0 (2, all equal)"],
        (TICKET, "20 %"): ["50.0 (1 of 2, 1 undefined)"],
        (TICKET, "40 %"): ["50.0 ± 0.0 (2, all equal) **"],
        (TICKET, "60 %"): ["undefined: constant predictions or labels (0 of 2)"],
    }
    found = {row["sparsity"]: row for row in records(table)}
    assert (found["0.2"]["undefined"], found["0.2"]["within_one_sd"], found["0.2"]["n"]) == ("57", "False", "1")
    assert (found["0.6"]["verdict"], found["0.6"]["mean"]) == ("undefined", "")


def test_missing_seeds_are_counted_and_pairs_are_said(one_task):
    find(one_task, {60: [0.9]})
    folder = next(path for path in one_task.glob("sst2-ticket-s58-*") if '"init": "random"' in (path / "run.json").read_text())
    rundirs.write_json(folder / "level_00" / "metrics.json", {})  # so that it is damaged, which is said as well
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        pool(one_task)
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    table = winning.table2(pool(one_task))
    cells = rows(table)[("SST-2", "highest winning", "40 %")]
    assert cells[0] == "83.2 ± 4.6 (4)"
    assert cells[1] == "81.0 ± 2.0 (3 of 4)"
    assert cells[3] == "60.0 ± 14.1 (2 of 4)"
    tests = {line[1]: line for line in table.panels[1].lines}
    assert tests[TICKET][6] == "3 (1 unpaired)"
    assert tests[RANDOM_WEIGHTS][6] == "2 (2 unpaired)"
    assert any("seeds 58, 60: random weights" in line for line in table.missing)
    assert any("seed 60: f(x, m_IMP * theta_0), random pruning, shuffled weights" in line for line in table.missing)


def test_an_unfinished_run_is_named(tmp_path):
    folder = rundirs.run(tmp_path, [0.8, 0.8], levels=10)
    assert f"{folder} has finished 2 of its 10 levels" in winning.table2(pool(tmp_path)).missing


def test_a_level_that_came_to_no_result_is_named_with_its_reason(tmp_path):
    folder = rundirs.run(tmp_path, [0.8, 0.8], levels=10)
    rundirs.fail(folder, 2, "the loss became nan by step 40")
    missing = winning.table2(pool(tmp_path)).missing
    assert f"{folder}: its level 2 came to no result: the loss became nan by step 40" in missing
    assert f"{folder} has finished 2 of its 10 levels" in missing
    rundirs.fail(rundirs.run(tmp_path, [], "rte", levels=10), 0, "fp16 gradients overflowed at every scale by step 7")
    assert [failure.task for failure in read_failures([tmp_path])] == ["rte", "sst2"]
    assert any("overflowed at every scale" in line for line in winning.table2(pool(tmp_path)).missing)


def test_a_later_rewinding_that_has_only_its_full_network_is_in_no_table_3_yet(tmp_path):
    rundirs.run(tmp_path, [0.9], "rte", rewind="5%", levels=3)
    assert variations.table3(pool(tmp_path)) is None
    rundirs.run(tmp_path, [0.9, 0.8], "rte", rewind="5%", levels=3, seed=2)
    assert variations.table3(pool(tmp_path)) is not None


def test_equal_scores_are_not_hidden(tmp_path):
    """A network that says one class scores the same everywhere."""
    control(tmp_path, find(tmp_path, {57: [0.8, 0.8, 0.5], 58: [0.9, 0.9, 0.5]}), 40, [0.5, 0.5])
    (note,) = [note for note in winning.table2(pool(tmp_path)).notes if "exactly" in note]
    assert note.startswith("SST-2: exactly 50.0000 in every seed of f(x, m_IMP * theta_0) at 40 %, random pruning at 40 %,")


def test_the_sweeps_command_makes_what_is_missing(tmp_path):
    """Given to the sweep itself, in a dry run, it names the run that is not there."""
    given = {"model": "DIR", "data_dir": "glue", "lr": 1e-4, "graphs": "on", "levels": 3}
    for seed, values in {57: [0.8, 0.8, 0.1], 58: [0.81, 0.81, 0.1]}.items():
        rundirs.run(tmp_path, values, "sst2", seed, rate=0.2, **given)
    (line,) = [line for line in winning.table2(pool(tmp_path)).missing if "SPARSITY=20" in line]
    command = line.split("`")[1]
    assert command == (
        "STEP=20 LEVELS=3 MODEL=DIR SEEDS='57 58' FLAGS='--data-dir glue --graphs on --lr 0.0001' TASKS=sst2 SPARSITY=20 "
        "bash scripts/table2.sh"
    )
    *variables, bash, script = shlex.split(command)
    assert bash == "bash"
    found = subprocess.run(
        ["env", *variables, "bash", ROOT / script, "--dry-run", "--stage", "1"], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    expected = "lt_glue.py --task sst2 --model DIR --seed 58 --data-dir glue --graphs on --lr 0.0001 --rate 0.2 --levels 3"
    assert f"python {expected}" in found.stdout.splitlines()


@pytest.mark.parametrize(
    ("flags", "made"), [({}, True), ({"schedule": "geometric"}, False), ({"scope": "tensor"}, False), ({"rate": 0.125}, False)]
)
def test_where_no_sweep_makes_it_none_is_named(tmp_path, flags, made):
    for seed in (57, 58):
        rundirs.run(tmp_path, [0.8, 0.8, 0.7], "sst2", seed, **({"rate": 0.2} | flags))
    table = winning.table2(pool(tmp_path))
    (line,) = [line for line in table.missing if "random pruning" in line]
    assert ("No sweep makes them" in line) != made


def test_a_sweep_is_not_asked_for_a_level_that_its_runs_have_not(tmp_path):
    """Random tickets of 60 % beside runs that end at 40 %: the other controls would need a ticket of 60 %."""
    find(tmp_path, {57: [0.8, 0.1, 0.1], 58: [0.81, 0.1, 0.1]})
    for seed in (57, 58):
        rundirs.run(tmp_path, [0.5], "sst2", seed, mask=rundirs.oneshot(tmp_path / f"r{seed}", 0.6, seed=seed))
    lines = [line for line in winning.table2(pool(tmp_path)).missing if "at 60 %" in line]
    assert lines
    assert all("No sweep makes them" in line for line in lines)


def test_tasks_of_other_scripts_keep_their_own_flags(tmp_path):
    sst2 = find(tmp_path, {57: [0.8, 0.8, 0.7]}, lr=1e-4)
    find(tmp_path, {57: [0.3, 0.3, 0.2]}, "mlm", max_steps=100)
    rundirs.run(tmp_path, [0.2], "mlm", mask=rundirs.mask_of(sst2[57], 2), max_steps=100)
    lines = transfer(pool(tmp_path), 0.4).missing
    (line,) = [line for line in lines if line.startswith("no run of SST-2")]
    assert "GLUE_FLAGS='--lr 0.0001' MLM_FLAGS='--max-steps 100'" in line
    assert "SOURCES='mlm sst2' TARGETS=sst2" in line


# ---- Table 3 ----


def test_table_3_is_against_rewinding_to_theta_0(tmp_path):
    find(tmp_path, CURVE)
    find(tmp_path, {seed: [0.8, 0.7, 0.7, 0.5 + seed / 1000] for seed in CURVE}, rewind="5%")
    find(tmp_path, {57: [0.8, 0.7, 0.7, 0.65]}, rewind="none")
    table = variations.table3(pool(tmp_path))
    assert table.panels[0].header[3:] == [
        "f(x, m_IMP * theta_0)",
        *(f"rewound to {n} %" for n in (5, 10, 20, 50)),
        "standard pruning",
    ]
    assert table.panels[0].lines == [
        ["SST-2", "60 %", "81.0 ± 1.0 (3)", "61.0 ± 1.0 (3)", "55.8 ± 0.1 (3)", *["no run"] * 3, "65.0 (1 of 3)"]
    ]
    tests = {line[1]: line for line in table.panels[1].lines}
    assert tests["rewound to 5 %"][4] == "-5.2"
    assert tests["standard pruning"][4:] == ["+5.0", "none", "1 (2 unpaired)", "one seed: no interval"]
    assert any("REWIND='10% 20% 50%'" in line and "rewinding.sh" in line for line in table.missing)


def test_table_3_holds_the_released_standard_pruning(tmp_path):
    """Of which the learning rate falls otherwise than that of the tickets beside it."""
    find(tmp_path, CURVE, protocol="released")
    find(tmp_path, {seed: [0.8, 0.7, 0.7, 0.65] for seed in CURVE}, protocol="released", rewind="none")
    table = variations.table3(pool(tmp_path))
    assert table.panels[0].lines[0][3] == "61.0 ± 1.0 (3)"
    assert table.panels[0].lines[0][-1] == "65.0 ± 0.0 (3, all equal)"
    assert any("GLUE_FLAGS='--protocol released'" in line or "FLAGS='--protocol released'" in line for line in table.missing)


def test_table_3_at_another_sparsity(tmp_path):
    find(tmp_path, {57: [0.8, 0.7, 0.6]})
    find(tmp_path, {57: [0.8, 0.7, 0.65]}, rewind="5%")
    table = variations.table3(pool(tmp_path))
    assert table.panels[0].lines[0][:2] == ["SST-2", "40 %"]
    assert "SST-2: the published 60 % is no level here; 40 % stands for it." in table.notes
    assert variations.table3(pool(tmp_path), 0.2).panels[0].lines[0][1:5] == ["20 %", "80.0 (1)", "70.0 (1)", "70.0 (1)"]
    asked = variations.table3(pool(tmp_path), 0.7)
    assert asked.panels[0].lines[0][3] == "no run"
    assert "SST-2: 70 % is none of its levels, 20 %, 40 %." in asked.notes


# ---- transfer ----


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """Tickets of 40 % of three tasks, each trained on the two others; and one-shot on one of them."""
    tmp_path = tmp_path_factory.mktemp("transfers")
    levels = {"sst2": [0.80, 0.79, 0.78], "qqp": [0.70, 0.70, 0.66], "mnli": [0.60, 0.60, 0.61]}
    found = {task: find(tmp_path, {s: [v + s / 1e4 for v in values] for s in (57, 58)}, task) for task, values in levels.items()}
    for source, folders in found.items():
        for target in set(levels) - {source}:
            for seed, folder in folders.items():
                value = levels[target][0] - (0.01 if source == "mnli" else 0.05) + seed / 1e4
                rundirs.run(tmp_path, [value], target, seed, mask=rundirs.mask_of(folder, 2))
    for seed in (57, 58):
        rundirs.run(tmp_path, [0.50575], "qqp", seed, mask=rundirs.oneshot(tmp_path / "magnitude", 0.4, "magnitude"))
    return tmp_path


@pytest.fixture
def transfers(made_once, tmp_path):
    return Path(shutil.copytree(made_once, tmp_path / "runs"))


def test_transfer_is_the_targets_metric_minus_its_full_network(transfers):
    table = transfer(pool(transfers))
    assert table.title.startswith("Transfer of tickets at 40 % sparsity")
    assert table.panels[0].header[1:] == ["MNLI", "QQP", "SST-2", "at least same-task"]
    assert rows(table) == {
        ("ticket of MNLI",): ["+1.00 (2)", "-1.00 (2)", "-1.00 (2)", "2 of 2"],
        ("ticket of QQP",): ["-5.00 (2)", "-4.00 (2)", "-5.00 (2)", "0 of 2"],
        ("ticket of SST-2",): ["-5.00 (2)", "-5.00 (2)", "-2.00 (2)", "0 of 2"],
        ("one-shot magnitude",): ["no run", "-20.00 (2, all equal)", "no run", "0 of 1"],
    }
    published = {line[0]: line[1:] for line in table.panels[1].lines}
    assert published["ticket of MNLI"] == ["+0.14", "-0.99", "-1.22", "2"]
    assert published["one-shot magnitude"] == ["+0.07", "-0.57", "-0.99", "4"]


def test_a_published_difference_stands_only_beside_its_own_sparsity(transfers):
    assert {row["published_difference"] for row in records(transfer(pool(transfers)))} == {""}


def test_transfer_where_there_is_none_says_where_there_is(transfers):
    with pytest.raises(UserError, match="no ticket of 70 % was trained on another task; there are some of 40 %"):
        transfer(pool(transfers), 0.7)


def test_tickets_found_elsewhere_do_not_slip_in(transfers):
    """A ticket of MNLI that rewinds to 5 %, trained on QQP: not Figure 2's."""
    before = markdown([transfer(pool(transfers))])
    later = find(transfers, {57: [0.1, 0.1, 0.1]}, "mnli", rewind="5%")
    rundirs.run(transfers, [0.1], "qqp", 57, mask=rundirs.mask_of(later[57], 2))
    assert markdown([transfer(pool(transfers))]) == before


def test_a_sweep_of_fewer_seeds_lacks_none(transfers):
    """Three seeds of Table 2, and two of Figure 2: what the transfer sweep was asked for is there."""
    find(transfers, {59: [0.80, 0.79, 0.78]})
    for seed in (57, 58, 59):
        rundirs.run(transfers, [0.5], "qqp", seed, mask=rundirs.oneshot(transfers / f"r{seed}", 0.4, seed=seed))
    table = transfer(pool(transfers))
    assert rows(table)[("ticket of QQP",)][2] == "-5.00 (2)"
    assert rows(table)[("ticket of SST-2",)][2] == "-2.00 (3)"
    assert not any("59" in line for line in table.missing)


# ---- perturbed weights ----


def test_table_2s_weights_alone_make_no_table_of_weights(one_task):
    assert variations.weights(pool(one_task)) is None


def test_weights_are_against_the_ticket_of_pretrained_ones(tmp_path):
    folders = find(tmp_path, CURVE)
    control(tmp_path, folders, 40, [0.5, 0.6, 0.7])
    for sigma in ("1", "0.05"):
        noise = rundirs.weights(tmp_path / f"n{sigma}", f"noise of {sigma} times 0.0387, the spread of its matrices")
        for seed, folder in folders.items():
            rundirs.run(tmp_path, [0.7], "sst2", seed, mask=rundirs.mask_of(folder, 2), init=noise)
    table = variations.weights(pool(tmp_path))
    assert [line[0].partition(" times")[0] for line in table.panels[0].lines] == [
        FULL,
        TICKET,
        "noise of 0.05",
        "noise of 1",
        "random",
        "shuffled",
    ]
    assert table.panels[0].header == ["weights", "SST-2, 40 %"]
    assert {line[4] for line in table.panels[1].lines} == {"-11.0", "-21.0"}
    assert {entry.reference for entry in table.entries} == {"", TICKET}


# ---- which runs may stand in one table ----


def test_tickets_found_in_several_ways_are_not_pooled(tmp_path):
    find(tmp_path, {57: [0.8, 0.7]})
    rundirs.run(tmp_path, [0.8, 0.6], seed=58, rate=0.2, scope="tensor")
    with pytest.raises(UserError, match=r"sst2 were found in 2 ways; give the runs of one:\n  rate 0.2 \(such as"):
        pool(tmp_path)
    rundirs.run(tmp_path, [0.8, 0.9], seed=59)
    chosen = pool(tmp_path)
    assert {record.seed for record in chosen.records} == {59}
    assert "SST-2: tickets found with rate 0.2 are left out" in chosen.notes


def test_several_settings_are_refused_with_the_flag_that_chooses(tmp_path):
    find(tmp_path, {57: [0.8, 0.7]})
    find(tmp_path, {58: [0.8, 0.7]}, lr=1e-4)
    with pytest.raises(UserError, match="sst2 have 2 settings; give those of one, or choose it with --setting"):
        pool(tmp_path)


def test_what_differs_from_the_paper_is_said(tmp_path):
    find(tmp_path, {57: [0.8, 0.7]}, lr=1e-4)
    assert pool(tmp_path).notes == ["SST-2: not the published settings, but lr 0.0001, rate 0.2"]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(one_task, rng: random.Random):
    places = sorted(path.parent for path in one_task.glob("*/run.json"))
    shuffled = read_records(rng.sample(places, len(places)))
    rng.shuffle(shuffled)
    assert tables_of(choose(shuffled)) == tables_of(choose(read_records(places)))


def tables_of(chosen) -> str:
    tables = [winning.table2(chosen), winning.table4(chosen)]
    return markdown(tables) + latex(tables)


def test_an_irrelevant_run_changes_nothing(one_task):
    before = tables_of(pool(one_task))
    rundirs.some_mask(0.3).write(one_task / "unknown")
    rundirs.run(one_task, [0.9], "sst2", 99, mask=one_task / "unknown")  # a mask that says nothing of itself
    rundirs.run(one_task, [0.9], "sst2", 57, init="random", rate=0.2)  # the full network from random weights
    rundirs.run(one_task, [0.1], "sst2", 98, mask=rundirs.oneshot(one_task / "m", 0.4, "magnitude"))
    find(one_task, {57: [0.1, 0.1, 0.1]}, rewind="5%")
    assert tables_of(pool(one_task)) == before


# ---- the formats ----


def test_every_line_of_a_markdown_table_has_its_columns(transfers):
    text = markdown([transfer(pool(transfers)), winning.curves(pool(transfers))])
    for block in text.split("\n\n"):
        if block.startswith("|"):
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(counts) == 1
    assert text.count("What is missing") == 1


def test_markdown_means_what_it_says():
    panel = Panel("a_b", ["x", "y"], [["1 * 2 | 3", "4 **"], ["m_IMP", "<b> _c_ `a*b|`"]], 1)
    text = markdown([Table("2", "T", [panel], [], ["* note", "`TASKS='a b' x_y*`"])])
    assert "1 * 2 \\| 3" in text
    assert r"4 \*\*" in text
    assert "m_IMP" in text
    assert r"\<b> \_c\_ `a*b|`" in text
    assert r"- \* note" in text
    assert "- `TASKS='a b' x_y*`" in text


def test_latex_is_balanced_and_escaped(transfers):
    chosen = pool(transfers)
    text = latex([transfer(chosen), winning.table2(chosen), winning.curves(chosen)])
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert body.count("$") % 2 == 0
    assert not re.search(r"(?<!\\)[%#]|[^\x00-\x7f]", body)
    assert not re.search(r"(?<!\\)_", re.sub(r"\$[^$]*\$", "", body))
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", body) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended)
    for columns, grid in re.findall(r"\\begin\{(?:tabular|longtable)\}\{([lr]+)\}(.*?)\\bottomrule", body, re.S):
        lines = [line for line in grid.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    assert r"\toprule" in body
    assert r"$f(x, m_{\mathrm{IMP}} \odot \theta_0)$" in body


def test_latex_escapes_what_users_may_write():
    text = latex([Table("2", r"50% & a_b #1 $ {x} \ ~ ^", [Panel("", ["a"], [["-1.0 to +2.0 >= 3"]], 0)], [])])
    assert r"50\% \& a\_b \#1 \$ \{x\} \textbackslash{} \textasciitilde{} \textasciicircum{}" in text
    assert r"$-$1.0 to $+$2.0 $\ge$ 3" in text


def test_a_long_latex_table_may_break(tmp_path):
    for task in ("sst2", "qqp", "mnli", "rte", "cola"):
        rundirs.run(tmp_path, [0.8 - level / 100 for level in range(10)], task)
    text = latex([winning.curves(pool(tmp_path))])
    assert r"\begin{longtable}" in text
    assert r"\endhead" in text


def test_csv_has_an_entry_a_line(transfers):
    chosen = pool(transfers)
    tables = [transfer(chosen), winning.curves(chosen)]
    found = list(csv.DictReader(io.StringIO(tidy(tables))))
    assert len(found) == sum(len(table.entries) for table in tables)
    assert {row["table"] for row in found} == {"transfer", "curves"}
    gap = next(row for row in found if row["verdict"] == "no run")
    assert (gap["mean"], gap["n"], gap["runs"]) == ("", "0", "")


def test_nothing_is_written_as_nan_or_none(one_task):
    chosen = pool(one_task)
    for text in (markdown([winning.table2(chosen)]), tidy([winning.table2(chosen)]), latex([winning.table2(chosen)])):
        assert not re.search(r"\bnan\b|\bNone\b", text)


def test_a_score_of_one_seed_has_no_deviation(tmp_path):
    find(tmp_path, {57: [0.8]})
    assert score(pool(tmp_path).full("sst2")) == "80.0 (1)"


# ---- the command ----


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tables

    def call(*words: object) -> None:
        monkeypatch.setattr("sys.argv", ["tables.py", *map(str, words)])
        tables.main(tables.parse())

    return call


def test_by_default_every_table_there_are_runs_for(command, transfers, capsys):
    command(transfers)
    titles = re.findall(r"^## (.*)", capsys.readouterr().out, re.M)
    assert [title.partition(" (")[0] for title in titles] == [
        "The highest sparsity with winning tickets, and its controls",
        "The highest sparsity that matches or exceeds the full BERT",
        "Transfer of tickets at 40 % sparsity",
        "Every task over all sparsities",
        "In all these tables",
        "What is missing",
    ]


def test_where_all_runs_failed_their_reasons_are_told(command, tmp_path):
    rundirs.fail(rundirs.run(tmp_path, [], levels=10), 0, "the loss became nan by step 40")
    with pytest.raises(UserError, match=r"(?s)no runs here for any table.*its level 0 came to no result: the loss became nan"):
        command(tmp_path)


def test_a_table_is_written_whole(command, one_task, tmp_path, capsys):
    command(one_task, "--table", "2", "--format", "csv", "--output", tmp_path / "out" / "t.csv")
    assert "written to" in capsys.readouterr().out
    assert (tmp_path / "out" / "t.csv").read_text().startswith("table,task,row,sparsity")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["t.csv"]


def test_a_setting_is_chosen(command, tmp_path, capsys):
    find(tmp_path, {57: [0.8, 0.7]})
    find(tmp_path, {57: [0.6, 0.5]}, lr=1e-4)
    command(tmp_path, "--setting", "lr 0.0001", "--table", "curves")
    assert "60.0 (1)" in (shown := capsys.readouterr().out)
    assert "80.0" not in shown
    with pytest.raises(UserError, match=r"no run has the setting 'lr 0\.3'"):
        command(tmp_path, "--setting", "lr 0.3")


@pytest.mark.parametrize(("table", "sweep"), [("3", "rewinding"), ("transfer", "transfer"), ("weights", "perturbed")])
def test_a_table_without_runs_names_its_sweep(command, tmp_path, table, sweep):
    find(tmp_path, {57: [0.8, 0.7]})
    with pytest.raises(UserError, match=rf"no runs here for table {table}; they are made by: bash scripts/{sweep}\.sh"):
        command(tmp_path, "--table", table)
    assert (ROOT / "scripts" / f"{sweep}.sh").exists()


def test_runs_of_which_no_table_is_made_say_so(command, tmp_path):
    rundirs.run(tmp_path, [0.8], mask=rundirs.oneshot(tmp_path / "m", 0.5))
    with pytest.raises(UserError, match="no runs here for any table"):
        command(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "0.5"], "--sparsity is of one table: add --table 3 or --table transfer"),
        (["--table", "2", "--sparsity", "0.5"], "--sparsity is of one table"),
        (["--table", "3", "--sparsity", "0.5"], "percent of the weights, from 1 to below 100, are needed"),
        (["--table", "5"], "invalid choice: '5'"),
        (["--format", "html"], "invalid choice: 'html'"),
    ],
)
def test_a_wrong_flag_is_a_sentence(command, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as end:
        command(tmp_path, *words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_conflict_is_not_passed_over(command, tmp_path):
    """Also where all tables are asked for: one that cannot be made for two runs that differ is no table without runs."""
    find(tmp_path / "a", {57: [0.8, 0.7]})
    find(tmp_path / "b", {57: [0.8, 0.6]})
    with pytest.raises(UserError, match="and differ: give one"):
        command(tmp_path)


def test_help_answers_without_torch(run_script):
    import time

    began = time.monotonic()
    found = run_script("scripts/tables.py", "--help")
    assert found.returncode == 0
    assert "--table" in found.stdout
    assert time.monotonic() - began < 2


def test_what_a_run_says_against_its_value_stands_in_every_format(tmp_path):
    """The last level of one seed of three is a network that says one class."""
    for seed, values in CURVE.items():
        said = ["all 872 predictions on validation are negative"] if seed == 58 else []
        rundirs.run(tmp_path, values, "sst2", seed, warnings=said, rate=0.2)
    table = winning.curves(pool(tmp_path))
    cells = [cell for cells in rows(table).values() for cell in cells]
    assert [cell for cell in cells if "doubted" in cell] == ["61.0 ± 1.0 (3, doubted)"]
    note = "SST-2, f(x, m_IMP * theta_0) at 60 %: seed 58: all 872 predictions on validation are negative"
    assert f"Doubted: {note}" in table.notes
    assert "61.0 ± 1.0 (3, doubted)" in markdown([table])
    assert "all 872 predictions" in latex([table])
    found = list(csv.DictReader(io.StringIO(tidy([table]))))
    assert [line["warnings"] for line in found if line["warnings"]] == ["seed 58: all 872 predictions on validation are negative"]


def test_a_highest_sparsity_that_is_doubted_says_so(tmp_path):
    for seed, values in {57: [0.8, 0.9], 58: [0.82, 0.92]}.items():
        rundirs.run(tmp_path, values, "sst2", seed, warnings=["all 872 predictions on validation are negative"] * (seed == 58))
    for table in (winning.table2(pool(tmp_path)), winning.table4(pool(tmp_path))):
        cells = [cell for line in table.panels[0].lines for cell in line]
        assert "10 % (doubted; the last level here)" in cells


def test_a_doubted_transfer_is_marked_in_its_cell(tmp_path):
    rundirs.run(tmp_path, [0.8, 0.7], "sst2")
    other = rundirs.run(tmp_path, [0.6, 0.5], "mnli")
    rundirs.run(tmp_path, [0.5], "sst2", mask=rundirs.mask_of(other, 1), warnings=["all predictions are positive"])
    cells = [cell for line in transfer(pool(tmp_path), 0.1).panels[0].lines for cell in line]
    assert [cell for cell in cells if "doubted" in cell] == ["-30.00 (1, doubted)"]
