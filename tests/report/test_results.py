"""Results are read from run directories: what was trained, on which task, its scores; and which of them may be pooled."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import rundirs

from bert_tickets.cli import parse
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import read_checksummed, write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.main import run as run_method
from bert_tickets.report.cells import FULL, ResultSet
from bert_tickets.report.results import (
    PRETRAINED,
    SHUFFLED,
    check_one_setting,
    check_same_subject,
    choose_setting,
    read_results,
)


def read(*places):
    return read_results(places)[0]


def only(results):
    (result,) = results
    return result


def edit(run, **changes):
    """Change run.json, checksum included."""
    write_checksummed(run / "run.json", read_checksummed(run / "run.json") | changes)


def rows(results, task="sst2"):
    return {row for name, row, _ in ResultSet(results).cells if name == task} - {FULL}


# ---- reading ----


def test_each_finished_level_is_a_result(tmp_path):
    folder = rundirs.run(tmp_path, [0.8, 0.7, None], "rte", seed=3, levels=10)
    results = read(tmp_path)
    assert [(r.level, round(r.sparsity, 4), r.value) for r in results] == [(0, 0.0, 0.8), (1, 0.1, 0.7), (2, 0.2, None)]
    fields = {(r.run, r.levels, r.task, r.metric, r.seed, r.given, r.method, r.source, r.weights, r.rewind) for r in results}
    assert fields == {(folder, 10, "rte", "accuracy", 3, False, "imp", "rte", PRETRAINED, "0")}
    assert {(r.finding, r.setting) for r in results} == {("", "")}
    assert all(Mask.load(r.mask_file).sha256() == r.mask_sha256 for r in results)


def test_results_of_real_runs(commands, tmp_path, monkeypatch):
    """Of the training script, and of its ticket trained from random weights."""
    monkeypatch.chdir(tmp_path)
    words = [*commands["lt_glue.py"], "--max-steps", "1", "--limit-eval", "4"]
    run_method(parse("glue", None, [*words, "--levels", "2"]))
    found = read("runs")
    assert [(r.level, round(r.sparsity, 3), r.levels, r.method, r.given) for r in found] == [
        (0, 0, 2, "imp", False),
        (1, 0.1, 2, "imp", False),
    ]
    run_method(parse("glue", None, [*words, "--mask", str(found[1].mask_file), "--init", "random"]))
    given = only(r for r in read("runs") if r.given)
    assert (given.method, given.source, given.weights, given.levels) == ("imp", "rte", "random", 1)
    assert (given.mask_sha256, given.setting) == (found[1].mask_sha256, found[1].setting)
    assert rows(read("runs"), "rte") == {"imp ticket", "imp ticket, random weights"}


def test_given_tickets_are_named_by_their_mask_files(tmp_path):
    found = rundirs.run(tmp_path / "found", [0.9, 0.8], "mlm", seed=4)
    rundirs.some_mask(0.3).write(tmp_path / "unknown")
    masks = {
        "random pruning": rundirs.oneshot(tmp_path / "r", 0.5, "random", 7),
        "one-shot pruning": rundirs.oneshot(tmp_path / "m", 0.5, "magnitude"),
        "oneshot magnitude by tensor": rundirs.oneshot(tmp_path / "t", 0.5, "magnitude by tensor"),
        "imp ticket of MLM": rundirs.mask_of(found, 1),
        f"mask {rundirs.some_mask(0.3).sha256()[:8]}": tmp_path / "unknown",
    }
    for row, mask in masks.items():
        run = rundirs.run(tmp_path / f"given {row}", [0.5], mask=mask)
        assert only(read(run)).given
        assert rows(read(run)) == {row}


def test_perturbed_and_rewound_weights_have_one_name_for_all_seeds(tmp_path):
    mask = rundirs.oneshot(tmp_path / "m", 0.5)
    names = {
        "the entries of each matrix shuffled": SHUFFLED,
        "its layers whole in the order 3 1 2 0": "its layers whole",
        "noise of 0.1 times 0.0387, the spread of its matrices": "noise of 0.1",
        "mlm trained to 5%, seed 57": "mlm trained to 5%",
    }
    for words, name in names.items():
        file = tmp_path / f"{name}.safetensors"
        write_tensors(file, {"w": rundirs.torch.zeros(1)}, {"rewound" if "trained" in words else "perturbed": words})
        assert only(read(rundirs.run(tmp_path / "runs" / name, [0.5], mask=mask, init=file))).weights == name


def test_settings_of_training_and_of_finding_are_separate(tmp_path):
    result = only(read(rundirs.run(tmp_path, [0.5], lr=1e-4, rate=0.2, scope="tensor", protocol="released")))
    assert result.setting == "lr 0.0001, protocol released"
    assert result.finding == "rate 0.2, scope tensor"


def test_settings_that_follow_from_the_rewinding_step_are_left_out(tmp_path):
    """Standard pruning keeps AdamW, and in the released protocol decays the learning rate once."""
    rundirs.run(tmp_path, [0.5], rewind="none")
    rundirs.run(tmp_path, [0.5], rewind="none", reset_optimizer=True, seed=2)
    rundirs.run(tmp_path, [0.5], reset_optimizer=False, seed=3)
    rundirs.run(tmp_path, [0.5], "mlm", protocol="released", seed=4)  # its preset does not rewind
    rundirs.run(tmp_path, [0.5], protocol="released", rewind="none", decay="level", seed=6)
    rundirs.run(tmp_path, [0.5], "mlm", protocol="released", rewind="none", seed=7)
    assert sorted((r.seed, r.rewind, r.finding) for r in read(tmp_path)) == [
        (2, "none", "reset optimizer True"),
        (3, "0", "reset optimizer False"),
        (4, "none", ""),
        (6, "none", "decay level"),
        (7, "none", "decay once, reset optimizer False"),
        (57, "none", ""),
    ]


def test_a_given_ticket_has_the_settings_of_the_run_that_found_it(tmp_path):
    """Level 1 of two runs that rewind differently is one mask, and counts as the plain one."""
    plain = rundirs.run(tmp_path, [0.8, 0.7])
    for rewind, scope in (("5%", "global"), ("0", "tensor")):
        found = rundirs.run(tmp_path, [0.8, 0.7], rewind=rewind, scope=scope)
        rundirs.run(tmp_path, [0.5], "rte", mask=rundirs.mask_of(found, 1))
    given = [r for r in read(tmp_path) if r.given]
    assert sorted((r.rewind, r.finding) for r in given) == [("0", "scope tensor"), ("5%", "")]
    assert rows(read(tmp_path), "rte") == {"imp ticket of SST-2, rewound to 5 %", "imp (scope tensor) ticket of SST-2"}
    copy = rundirs.run(tmp_path / "x", [0.8], rewind="5%", levels=2)
    rundirs.write_level(copy, 1, Mask.load(rundirs.mask_of(plain, 1)), 0.7, "sst2")
    run = rundirs.run(tmp_path / "x", [0.5], "mnli", mask=rundirs.mask_of(plain, 1))
    assert only(r for r in read(plain, copy, run) if r.given).rewind == "0"


def test_no_run_and_damaged_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory in"):
        read(tmp_path)
    folder = rundirs.run(tmp_path, [0.5, 0.4, 0.3])
    shutil.copytree(folder / "level_02", folder / "level_02.bak")
    assert len(read(tmp_path)) == 3
    shutil.rmtree(folder / "level_01")
    with pytest.raises(Damaged, match="level_01 is missing, and a later level is there"):
        read(tmp_path)
    edit(folder, format=99)
    with pytest.raises(UserError, match="has format 99, and this version reads format 3"):
        read(tmp_path)
    (folder / "run.json").write_text('{"config": {}}')
    with pytest.raises(Damaged, match=r"run\.json is damaged"):
        read(tmp_path)


def test_reading_and_tables_import_no_torch(tmp_path):
    rundirs.run(tmp_path, [0.5, 0.4])
    code = (
        "import sys; from bert_tickets.report import figures, formats; from bert_tickets.report.cells import ResultSet\n"
        "from bert_tickets.report.results import read_results; from bert_tickets.report.tables import build\n"
        "heavy = {'pandas', 'matplotlib', 'scipy', 'torch'} & sys.modules.keys(); assert not heavy, heavy\n"
        "print(formats.markdown([build('curves', ResultSet(read_results(sys.argv[1:])[0]))])); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "40.0 (1)" in done.stdout


# ---- pooling ----


def test_a_cell_pools_only_seeds(tmp_path):
    for seed, value in ((1, 0.5), (2, 0.7)):
        rundirs.run(tmp_path, [value], seed=seed)
    for value, flags in enumerate(({"init": "random"}, {"protocol": "released"}, {"rewind": "5%"}, {"rewind": "none"})):
        rundirs.run(tmp_path, [value / 10], seed=1, **flags)
    assert {row: cell.text for (_, row, _), cell in ResultSet(read(tmp_path)).cells.items() if not row.startswith(FULL)} == {
        "imp ticket": "60.0 ± 14.1 (2)",
        "imp ticket, found in random weights": "0.0 (1)",
        "imp ticket, protocol released": "10.0 (1)",
        "imp ticket, rewound to 5 %": "20.0 (1)",
        "imp, standard pruning": "30.0 (1)",
    }


def test_equal_copies_count_once_and_different_ones_are_refused(tmp_path):
    folder = rundirs.run(tmp_path, [0.5])
    shutil.copytree(folder, tmp_path / "copy" / folder.name)
    assert ResultSet(read(tmp_path, folder)).full("sst2").summary.values == {57: 50.0}
    file = tmp_path / "copy" / folder.name / "level_00" / "metrics.json"
    write_checksummed(file, read_checksummed(file) | {"metrics": {"accuracy": 0.6}})
    with pytest.raises(UserError, match="are both imp ticket on sst2 at 0 % with seed 57, and differ: give one of them"):
        ResultSet(read(tmp_path))


def test_the_full_bert_is_level_0_of_the_plainest_run_of_each_seed(tmp_path):
    rundirs.run(tmp_path, [0.80], seed=1)
    rundirs.run(tmp_path, [0.81], seed=1, rewind="5%")
    rundirs.run(tmp_path, [0.82], seed=1, scope="tensor")
    rundirs.run(tmp_path, [0.83], seed=2, rewind="5%")
    rundirs.run(tmp_path, [0.10], seed=3, init="random")
    rundirs.run(tmp_path, [0.20], seed=4, mask=rundirs.oneshot(tmp_path / "m", 0.0))
    assert ResultSet(read(tmp_path)).full("sst2").summary.values == {1: 80.0, 2: 83.0}


def test_two_settings_are_refused_and_one_can_be_chosen(tmp_path):
    rundirs.run(tmp_path, [0.5])
    rundirs.run(tmp_path, [0.6], lr=1e-4, limit_train=100)
    rundirs.run(tmp_path, [0.6], lr=1e-4, limit_train=200, task="rte")
    results = read(tmp_path)
    with pytest.raises(UserError, match=r"sst2 have 2 settings; choose:(.|\n)*the preset unchanged"):
        check_one_setting(results, "choose")
    assert [r.task for r in choose_setting(results, "lr 0.0001")] == ["rte", "sst2"]
    assert [r.task for r in choose_setting(results, "limit train 100, lr 0.0001")] == ["sst2"]
    assert [r.value for r in choose_setting(results, "")] == [0.5]
    assert choose_setting(results, "lr 0.1") == []
    check_one_setting(choose_setting(results, "lr 0.0001"))


def test_other_data_or_weights_with_equal_settings_are_refused(tmp_path):
    for seed, data, model in ((1, "a", "m"), (2, "a", "n"), (3, "b", "m")):
        edit(rundirs.run(tmp_path, [0.8], seed=seed), fingerprint={"train": {"sha256": data}, "model": model})
    one, two, three = sorted(read(tmp_path), key=lambda r: r.seed)
    check_same_subject([one, two])  # a checkpoint without a pooler gets one by the seed
    with pytest.raises(UserError, match="have the same settings, but different data or precision"):
        check_same_subject([one, two, three])
    with pytest.raises(UserError, match="have the same settings, but different initial weights"):
        ResultSet([one, dataclasses.replace(one, model="n")])
