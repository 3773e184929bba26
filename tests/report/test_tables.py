"""From run directories to the paper's tables: their values, what is missing, refusals, and the three formats."""

import csv
import io
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest
import rundirs
import tables
from conftest import ROOT
from scipy.stats import ttest_rel

from bert_tickets.errors import UserError
from bert_tickets.files import read_json
from bert_tickets.report import formats
from bert_tickets.report.formats import Table
from bert_tickets.report.results import FULL, comparable, read_results
from bert_tickets.report.tables import TABLES, build

TICKET = "imp (rate 0.2) ticket"
CONTROLS = ("random pruning", f"{TICKET}, random weights", f"{TICKET}, shuffled weights")
CURVE = {57: [0.80, 0.81, 0.79, 0.60], 58: [0.82, 0.81, 0.83, 0.61], 59: [0.81, 0.80, 0.81, 0.62]}


def made(name: str, *places: Path, sparsity: float | None = None) -> Table | None:
    levels, failures = read_results(places)
    return build(name, comparable(levels), sparsity, failures)


def find(place: Path, curves: dict[int, list[float | None]], task: str = "sst2", **flags) -> dict[int, Path]:
    """Runs that find tickets at 0, 20, 40, ... %, one per seed."""
    return {seed: rundirs.run(place, values, task, seed, **({"rate": 0.2} | flags)) for seed, values in curves.items()}


def control(place: Path, folders: dict[int, Path], percent: int, values: list[float | None], task: str = "sst2") -> None:
    """The controls of Table 2 at a sparsity, all with these values by seed."""
    shuffled = rundirs.weights(place / "w.safetensors", "the entries of each matrix shuffled")
    for (seed, folder), value in zip(folders.items(), values, strict=True):
        own = rundirs.mask_of(folder, percent // 20)
        rundirs.run(place, [value], task, seed, mask=rundirs.oneshot(place / f"r{percent}_{seed}", percent / 100, seed=seed))
        rundirs.run(place, [value], task, seed, mask=own, init="random")
        rundirs.run(place, [value], task, seed, mask=own, init=shuffled)


@pytest.fixture(scope="module")
def made_one_task(tmp_path_factory):
    place = tmp_path_factory.mktemp("one")
    control(place, find(place, CURVE), 40, [0.5, 0.6, 0.7])
    return place


@pytest.fixture
def one_task(made_one_task, tmp_path):
    return Path(shutil.copytree(made_one_task, tmp_path / "runs"))


@pytest.fixture(scope="module")
def transfers(tmp_path_factory):
    """Tickets of 40 % of three tasks, each trained on the two others; and one-shot pruning on one of them."""
    place = tmp_path_factory.mktemp("transfers")
    levels = {"sst2": [0.80, 0.79, 0.78], "qqp": [0.70, 0.70, 0.66], "mnli": [0.60, 0.60, 0.61]}
    found = {task: find(place, {s: [v + s / 1e4 for v in values] for s in (57, 58)}, task) for task, values in levels.items()}
    for source, folders in found.items():
        for target in set(levels) - {source}:
            for seed, folder in folders.items():
                value = levels[target][0] - (0.01 if source == "mnli" else 0.05) + seed / 1e4
                rundirs.run(place, [value], target, seed, mask=rundirs.mask_of(folder, 2))
    for seed in (57, 58):
        rundirs.run(place, [0.50575], "qqp", seed, mask=rundirs.oneshot(place / "magnitude", 0.4, "magnitude"))
    return place


def grid(table: Table, heading: str = "") -> list[dict[str, str]]:
    """A grid of a table by the beginning of its heading, a dictionary per line."""
    return next(grid for name, grid in table.grids.items() if name.startswith(heading)).to_dict("records")


def scores(table: Table, *columns: str) -> dict[tuple[str, str], str | tuple]:
    """The listing of a table: (row, sparsity) -> the given columns, by default `here`."""
    lines = grid(table, "Scores")
    return {(line["row"], line["sparsity"]): tuple(line[c] for c in columns) if columns else line["here"] for line in lines}


def records(*tables: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(formats.csv(tables))))


# ---- Tables 2 and 4 ----


def test_table_2_has_the_ticket_the_controls_and_the_published_numbers(one_task):
    table = made("2", one_task)
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
    assert scores(made("4", one_task)) == {(FULL, "0 %"): "81.0 ± 1.0 (3)", (TICKET, "40 %"): "81.0 ± 2.0 (3)"}


def test_csv_goes_back_to_the_runs_in_full_precision(one_task):
    found = {(row["row"], row["sparsity"]): row for row in records(made("2", one_task))}
    values = [100 * CURVE[seed][2] for seed in CURVE]
    ticket = found[TICKET, "0.4"]
    assert (float(ticket["mean"]), float(ticket["sd"])) == (mean(values), stdev(values))
    assert (ticket["n"], ticket["seeds"], ticket["unit"]) == ("3", "57;58;59", "x 100")
    assert ticket["published"] == "91.9 ± 0.5 at 60 % [fig]"
    assert (ticket["within_one_sd"], ticket["match_or_exceed"], ticket["reference"]) == ("True", "True", FULL)
    last, full = ([values[level] for values in CURVE.values()] for level in (3, 0))
    tested = 6  # tickets at 20, 40 and 60 %, and three controls
    assert float(found[TICKET, "0.6"]["p_holm"]) == pytest.approx(tested * ttest_rel(last, full).pvalue)
    for run, level, sha256 in zip(*(ticket[name].split(";") for name in ("run", "level", "mask_sha256")), strict=True):
        assert read_json(Path(run) / f"level_{int(level):02d}" / "metrics.json")["mask_sha256"] == sha256


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
    find(tmp_path, curves)
    for name in ("2", "4"):
        (line,) = grid(made(name, tmp_path))
        assert (line["within one deviation"], line["match or exceed"]) == (within, exceed)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A method `toy` in a package folder of its own."""
    import bert_tickets
    import bert_tickets.methods

    package = tmp_path / "more" / "bert_tickets"
    for name in ("methods", "presets"):
        (package / name).mkdir(parents=True)
    shutil.copy(ROOT / "bert_tickets" / "methods" / "imp.py", package / "methods" / "toy.py")
    (package / "presets" / "toy.toml").write_text("")
    monkeypatch.setattr(bert_tickets, "__path__", [*bert_tickets.__path__, str(package)])
    monkeypatch.setattr(bert_tickets.methods, "__path__", [*bert_tickets.methods.__path__, str(package / "methods")])


def test_another_method_has_rows_without_code_for_it(toy, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    find(runs, {57: [0.8, 0.7], 58: [0.81, 0.7]})
    found = find(runs, {57: [0.8, 0.9], 58: [0.81, 0.9]}, method="toy")
    rundirs.run(runs, [0.6], mask=rundirs.mask_of(found[57], 1), init="random")
    table = made("2", runs)
    lines = {line["method"]: line for line in grid(table)}
    toy, imp = lines["toy (rate 0.2)"], lines["imp (rate 0.2)"]
    assert toy["within one deviation"] == "20 % (the last level)"
    assert (toy["published [fig]"], imp["published [fig]"]) == ("", "60 %")
    assert scores(table)["toy (rate 0.2) ticket, random weights", "20 %"] == "60.0 (1 of 2)"
    assert any(line.endswith("seeds 58: toy (rate 0.2) ticket, random weights") for line in table.missing)
    monkeypatch.undo()  # the method is not installed any more
    assert "toy (rate 0.2)" in [line["method"] for line in grid(made("2", runs))]


# ---- warnings, undefined values, missing runs ----


def test_undefined_values_are_marked_and_never_match(tmp_path):
    find(tmp_path, {57: [0.5, None, 0.5, None], 58: [0.5, 0.5, 0.5, None]}, "cola")
    table = made("curves", tmp_path)
    equal = "50.0 ± 0.0 (2, all equal)"
    assert [line["CoLA"] for line in grid(table)] == [equal, "50.0 (1 of 2, 1 undefined)", f"{equal} **", "undefined (0 of 2)"]
    assert f"Undefined: CoLA, {TICKET} at 20 %: seed 57" in table.notes
    found = {row["sparsity"]: row for row in records(table)}
    assert (found["0.2"]["undefined"], found["0.2"]["within_one_sd"], found["0.2"]["n"]) == ("57", "False", "1")
    assert (found["0.6"]["verdict"], found["0.6"]["mean"]) == ("undefined", "")


def test_warnings_are_in_every_format(tmp_path):
    said = "all 872 predictions on validation are negative"
    for seed, values in {57: [0.8, 0.9], 58: [0.82, 0.92]}.items():
        rundirs.run(tmp_path, values, seed=seed, warnings=[said] * (seed == 58), rate=0.2)
    table = made("curves", tmp_path)
    assert "91.0 ± 1.4 (2, warning) **" in formats.markdown([table])
    assert f"Warning: SST-2, {TICKET} at 20 %: seed 58: {said}" in table.notes
    assert said in formats.latex([table])
    assert [row["warnings"] for row in records(table)] == ["", f"seed 58: {said}"]
    assert grid(made("4", tmp_path))[0]["match or exceed"] == "20 % (warning; the last level)"


def test_missing_seeds_are_counted_and_unpaired_ones_named(one_task):
    find(one_task, {60: [0.9]})
    for run in one_task.glob("sst2-transfer-s58-*"):
        if '"init": "random"' in (run / "run.json").read_text():
            shutil.rmtree(run)
    table = made("2", one_task)
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
    find(tmp_path, {57: [0.8, 0.7]})
    monkeypatch.setattr(rundirs, "WEIGHTS", 2000)
    find(tmp_path, {57: [0.8, 0.6]}, prunable="matrices+biases")
    (note,) = [note for note in made("curves", tmp_path).notes if "cover" in note]
    assert note == "SST-2: the masks cover 1,000 or 2,000 weights; their sparsities are not comparable."


# ---- Table 3, transfer, perturbed weights ----


def test_table_3_compares_with_rewinding_to_the_pretrained_weights(tmp_path):
    find(tmp_path, CURVE)
    assert made("3", tmp_path) is None
    find(tmp_path, {seed: [0.8, 0.7, 0.7, 0.5 + seed / 1000] for seed in CURVE}, rewind="5%")
    find(tmp_path, {57: [0.8, 0.7, 0.7, 0.65]}, rewind="none")
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
    later = find(tmp_path, {57: [0.1, 0.1, 0.1]}, "mnli", rewind="5%")
    rundirs.run(tmp_path, [0.1], "qqp", 57, mask=rundirs.mask_of(later[57], 2))
    assert grid(made("transfer", transfers, tmp_path)) == before
    find(tmp_path, {59: [0.80, 0.79, 0.78]})  # a seed of Table 2 that the transfer sweep does not use
    table = made("transfer", transfers, tmp_path)
    assert [line["SST-2"] for line in grid(table)[1:3]] == ["-5.00 (2)", "-2.00 (3)"]
    assert not any("59" in line for line in table.missing if "transfer.sh" in line)


def test_perturbed_weights_are_compared_with_the_pretrained_ones(tmp_path):
    folders = find(tmp_path, CURVE)
    control(tmp_path, folders, 40, [0.5, 0.6, 0.7])
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


# ---- the formats, scripts/tables.py ----


@pytest.fixture
def command(capsys):
    """Run scripts/tables.py in this process; what it prints."""

    def run(*words: object) -> str:
        tables.main(tables.parse([str(word) for word in words]))
        return capsys.readouterr().out

    return run


def test_the_order_of_runs_does_not_matter(command, one_task, transfers):
    runs = [*sorted(one_task.glob("sst2-*")), *sorted(transfers.glob("qqp-*"))]
    expected = command(*runs, "--sources") + command(*runs, "--format", "csv")
    assert command(*reversed(runs), "--sources") + command(*reversed(runs), "--format", "csv") == expected
    assert not re.search(r"\bnan\b|\bNone\b|\bNaN\b", expected)


def test_latex_is_balanced_and_escaped(transfers, one_task):
    rundirs.run(one_task, [0.3], mask=rundirs.oneshot(one_task / "m", 0.5, r"a_b 50% & {x} #1 \ ~ ^ |"))
    tables = [made("transfer", transfers), made("2", transfers), made("curves", one_task)]
    body = "\n".join(line for line in formats.latex(tables).splitlines() if not line.startswith("%"))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert not re.search(r"(?<!\\)[%#]|[^\x00-\x7f]", body)
    begun, ended = (sorted(re.findall(rf"\\{word}\{{(\w+)\}}", body)) for word in ("begin", "end"))
    assert begun == ended
    assert r"a\_b 50\% \& \{x\} \#1" in body
    assert r"\toprule" in body


def test_sources_name_the_run_level_and_mask_of_each_number(command, one_task):
    _, _, text = command(one_task, "--sources").partition("## Sources of the numbers\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]
    assert len(lines) == len({tuple(line) for line in lines}) == 3 * (4 + 3)  # seeds; levels and controls
    for task, _, sparsity, seed, value, run, level, sha256 in lines:
        said = read_json(Path(run) / f"level_{int(level):02d}" / "metrics.json")
        assert (f"{100 * said['metrics']['accuracy']:.4f}", said["mask_sha256"], task) == (value, sha256, "SST-2")
        assert f"{100 * said['sparsity']:.0f} %" == sparsity
        assert read_json(Path(run) / "run.json")["config"]["seed"] == int(seed)


def test_one_of_several_settings_can_be_chosen(command, tmp_path):
    find(tmp_path, {57: [0.8, 0.7]})
    find(tmp_path, {57: [0.6, 0.5]}, lr=1e-4)
    command(tmp_path, "--setting", "lr 0.0001", "--table", "curves", "--output", tmp_path / "out" / "t.md")
    shown = (tmp_path / "out" / "t.md").read_text()
    assert "50.0 (1)" in shown
    assert "80.0" not in shown
    assert "SST-2: not the published settings, but lr 0.0001" in shown
    with pytest.raises(UserError, match=r"no run has the setting 'lr 0\.3'"):
        command(tmp_path, "--setting", "lr 0.3")


def test_a_table_without_runs_names_its_sweep(command, tmp_path):
    find(tmp_path, {57: [0.8, 0.7]})
    rundirs.fail(rundirs.run(tmp_path, [], "rte", levels=10), 0, "the loss became nan by step 40")
    with pytest.raises(UserError, match=r"(?s)no runs for table 3; make them by: bash scripts/rewinding\.sh.*0 diverged"):
        command(tmp_path, "--table", "3")
    assert all((ROOT / "scripts" / f"{sweep}.sh").exists() for _, sweep in TABLES.values())
    shutil.rmtree(next(tmp_path.glob("sst2-*")))
    with pytest.raises(UserError, match="no runs for any table"):
        command(tmp_path)


def test_flags_without_effect_are_refused(command, tmp_path, capsys):
    for words, message in (
        (["--sparsity", "0.5"], "--sparsity has an effect only with --table 3 or --table transfer"),
        (["--table", "3", "--sparsity", "0.5"], "must be a percentage from 1 to below 100"),
        (["--sources", "--format", "csv"], "--sources has no effect with --format csv"),
    ):
        with pytest.raises(SystemExit):
            command(tmp_path, *words)
        assert message in capsys.readouterr().err
