"""Results are read from run directories: what was trained, on which task, its scores; and which of them may be pooled."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import rundirs
from conftest import ROOT

from bert_tickets.cli import parse
from bert_tickets.content import brief, fingerprint
from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import read_checksummed, write_checksummed
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.main import run as run_method
from bert_tickets.report.results import comparable, read_results
from bert_tickets.report.rows import FULL, PRETRAINED, SHUFFLED


def read(*places):
    return read_results(places)[0]


def rows(levels):
    return set(levels["row"])


def values(levels, row):
    """The values of a row by seed."""
    found = levels[levels["row"] == row]
    return dict(zip(found["seed"], found["value"].round(9), strict=True))


# ---- reading ----


def test_each_finished_level_is_a_line(tmp_path):
    folder = rundirs.run(tmp_path, [0.8, 0.7, None], "rte", seed=3, levels=10, warnings=["all predictions are positive"])
    levels = read(tmp_path)
    assert levels[["level", "sparsity", "value"]].values.tolist()[:2] == [[0, 0.0, 80.0], [1, 0.1, 70.0]]
    assert math.isnan(levels["value"][2])
    assert list(levels["warnings"]) == [[], [], ["all predictions are positive"]]
    shared = {"run": str(folder), "levels": 10, "task": "rte", "metric": "accuracy", "seed": 3, "given": False, "method": "imp"}
    shared |= {"source": "rte", "weights": PRETRAINED, "row": "imp ticket", "rewind": "", "setting": ""}
    for level in levels.to_dict("records"):
        assert {key: level[key] for key in shared} == shared
        assert Mask.load(rundirs.mask_of(folder, level["level"])).sha256() == level["mask_sha256"]


def test_results_of_real_runs(commands, tmp_path, monkeypatch):
    """Of the training script, and of its ticket trained from random weights."""
    monkeypatch.chdir(tmp_path)
    words = [*commands["lt_glue.py"], "--max-steps", "1", "--limit-eval", "4"]
    run_method(parse("glue", None, [*words, "--levels", "2"]))
    found = read("runs")
    columns = ["level", "sparsity", "levels", "method", "given"]
    assert found[columns].values.tolist() == [[0, 0, 2, "imp", False], [1, 0.1, 2, "imp", False]]
    (folder,) = found["run"].unique()
    run_method(parse("glue", None, [*words, "--mask", f"{folder}/level_01/mask.safetensors", "--init", "random"]))
    levels = comparable(read("runs"))
    assert levels["row"].tolist() == [FULL, "imp ticket", "imp ticket, random weights"]
    assert levels["mask_sha256"].nunique() == 2


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
        assert rows(read(rundirs.run(tmp_path / f"given {row}", [0.5], mask=mask))) == {row}
    again = rundirs.run(tmp_path / "again", [0.5], "mlm", mask=rundirs.mask_of(found, 1))
    assert rows(read(again)) == {"imp ticket, trained again"}


def test_perturbed_and_rewound_weights_have_one_name_for_all_seeds(tmp_path):
    mask = rundirs.oneshot(tmp_path / "m", 0.5)
    names = {
        "the entries of each matrix shuffled": SHUFFLED,
        "its layers whole in the order 3 1 2 0": "layers in another order",
        "noise of 0.1 times 0.0387, the spread of its matrices": "noise of 0.1",
        "mlm trained to 5%, seed 57": "mlm trained to 5%",
    }
    for words, name in names.items():
        file = rundirs.weights(tmp_path / f"{name}.safetensors", words, "rewound" if "trained" in words else "perturbed")
        assert set(read(rundirs.run(tmp_path / "runs" / name, [0.5], mask=mask, init=file))["weights"]) == {name}


def test_a_row_has_the_methods_settings_and_a_run_its_training(tmp_path):
    """Standard pruning keeps AdamW, and in the released protocol decays the rate once: these follow from --rewind none."""
    runs = {
        "imp (rate 0.2, scope tensor) ticket": {"lr": 1e-4, "rate": 0.2, "scope": "tensor", "protocol": "released"},
        "imp ticket, rewind none": {"rewind": "none"},
        "imp (reset optimizer True) ticket, rewind none": {"rewind": "none", "reset_optimizer": True},
        "imp (reset optimizer False) ticket": {"reset_optimizer": False},
        "imp ticket": {"task": "mlm", "protocol": "released"},  # its preset does not rewind
        "imp (decay level) ticket, rewind none": {"protocol": "released", "rewind": "none", "decay": "level"},
        "imp (decay once, reset optimizer False) ticket": {"task": "mlm", "protocol": "released", "rewind": "none"},
        "imp ticket, found in random weights": {"init": "random"},
    }
    for seed, flags in enumerate(runs.values()):
        rundirs.run(tmp_path, [0.5], seed=seed, **flags)
    levels = read(tmp_path)
    assert dict(zip(levels["seed"], levels["row"], strict=True)) == dict(enumerate(runs))
    assert set(levels["setting"]) == {"lr 0.0001, protocol released", "", "protocol released"}


def test_a_given_ticket_has_the_settings_of_the_run_that_found_it(tmp_path):
    """Level 1 of two runs that rewind differently is one mask, and counts as the plain one."""
    plain = rundirs.run(tmp_path, [0.8, 0.7])
    for rewind, scope in (("5%", "global"), ("0", "tensor")):
        found = rundirs.run(tmp_path, [0.8, 0.7], rewind=rewind, scope=scope)
        rundirs.run(tmp_path, [0.5], "rte", mask=rundirs.mask_of(found, 1))
    given = read(tmp_path).query("given")
    assert rows(given) == {"imp ticket of SST-2, rewind 5%", "imp (scope tensor) ticket of SST-2"}
    copy = rundirs.run(tmp_path / "x", [0.8], rewind="5%", levels=2)
    rundirs.write_level(copy, 1, Mask.load(rundirs.mask_of(plain, 1)), 0.7, "sst2")
    run = rundirs.run(tmp_path / "x", [0.5], "mnli", mask=rundirs.mask_of(plain, 1))
    assert rows(read(plain, copy, run).query("given")) == {"imp ticket of SST-2"}


def test_tables_are_made_without_torch(tmp_path):
    rundirs.run(tmp_path, [0.5, 0.4])
    code = "import sys, tables; tables.main(tables.parse([sys.argv[1], '--table', 'curves'])); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT / "scripts", env=os.environ | {"PYTHONPATH": ROOT}, check=True
    )


def test_no_run_and_damaged_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory in"):
        read(tmp_path)
    folder = rundirs.run(tmp_path, [0.5, 0.4, 0.3])
    shutil.copytree(folder / "level_02", folder / "level_02.bak")
    assert len(read(tmp_path)) == 3
    shutil.rmtree(folder / "level_01")
    with pytest.raises(Damaged, match="level_01 is missing, and a later level is there"):
        read(tmp_path)


# ---- what may be compared ----


def test_equal_copies_count_once_and_different_ones_are_refused(tmp_path):
    folder = rundirs.run(tmp_path, [0.5, None])
    shutil.copytree(folder, tmp_path / "copy" / folder.name)
    assert values(comparable(read(tmp_path, folder)), FULL) == {57: 50.0}
    file = tmp_path / "copy" / folder.name / "level_00" / "metrics.json"
    write_checksummed(file, read_checksummed(file) | {"metrics": {"accuracy": 0.6}})
    message = r"sst2, row imp ticket, sparsity 0.0, seed 57\) have the same settings, but different results; give one of them"
    with pytest.raises(UserError, match=rf"{message}:\n  .*{folder.name}: .*\n  .*{folder.name}"):
        comparable(read(tmp_path))


def test_the_full_bert_is_level_0_of_the_plainest_run_of_each_seed(tmp_path):
    rundirs.run(tmp_path, [0.80], seed=1)
    rundirs.run(tmp_path, [0.81], seed=1, rewind="5%")
    rundirs.run(tmp_path, [0.82], seed=1, scope="tensor")
    rundirs.run(tmp_path, [0.83], seed=2, rewind="5%")
    rundirs.run(tmp_path, [0.10], seed=3, init="random")
    rundirs.run(tmp_path, [0.20], seed=4, mask=rundirs.oneshot(tmp_path / "m", 0.0))
    assert values(comparable(read(tmp_path)), FULL) == {1: 80.0, 2: 83.0}


def test_two_settings_are_refused_and_one_can_be_chosen(tmp_path):
    rundirs.run(tmp_path, [0.5])
    rundirs.run(tmp_path, [0.6], lr=1e-4, limit_train=100)
    rundirs.run(tmp_path, [0.6], lr=1e-4, limit_train=200, task="rte")
    levels = read(tmp_path)
    with pytest.raises(UserError, match=r"task sst2\) have different settings; (.|\n)*choose it(.|\n)*: the preset unchanged"):
        comparable(levels)
    chosen = {"lr 0.0001": ["rte", "sst2"], "limit train 100, lr 0.0001": ["sst2"], "": ["sst2"], "lr 0.1": []}
    for setting, tasks in chosen.items():
        assert sorted(comparable(read_results([tmp_path], setting)[0])["task"]) == tasks
    assert list(comparable(read_results([tmp_path], "")[0])["value"]) == [50.0]


def test_the_result_is_the_last_evaluation_unless_the_run_reports_the_best(tmp_path):
    plain, last, best = (
        rundirs.run(tmp_path / name, [0.5, 0.4], **flags)
        for name, flags in (("plain", {}), ("last", {"eval_steps": 5}), ("best", {"eval_steps": 5, "report": "best"}))
    )
    for folder in (last, best):
        rundirs.evaluate(folder, 0, 0.6, 3)
        rundirs.evaluate(folder, 1, 0.7, 9)
    columns = ["value", "best_of", "setting"]
    assert read(plain)[columns].values.tolist() == read(last)[columns].values.tolist() == [[50.0, 1, ""], [40.0, 1, ""]]
    setting = "eval steps 5, report best"
    assert read(best)[columns].round(9).values.tolist() == [[60.0, 3, setting], [70.0, 9, setting]]
    assert len(comparable(read(plain, last))) == 2  # equal copies: evaluations change no training
    with pytest.raises(UserError, match="have different settings"):
        comparable(read(plain, best))


def test_training_data_drawn_by_the_seed_may_differ_between_seeds_only(tmp_path):
    def drawn(place, seed, train, evaluation="e", **flags):
        file = rundirs.run(tmp_path / place, [0.8], seed=seed, limit_train=9, **flags) / "run.json"
        facts = {"train": {"sha256": train}, "evaluation": evaluation, "model": "m"}
        write_checksummed(file, read_checksummed(file) | {"fingerprint": facts})

    for seed in (1, 2):
        drawn("run", seed, f"of seed {seed}", limit_seed="run")
        drawn("fixed", seed, f"of seed {seed}")
    assert list(comparable(read(tmp_path / "run"))["seed"]) == [1, 2]
    with pytest.raises(UserError, match="different data or precision"):
        comparable(read(tmp_path / "fixed"))
    drawn("again", 1, "another", limit_seed="run", scope="tensor")
    with pytest.raises(UserError, match=r"seed 1\) have the same settings, but different training data"):
        comparable(read(tmp_path / "run", tmp_path / "again"))
    drawn("other", 3, "of seed 3", "another", limit_seed="run")
    with pytest.raises(UserError, match="different data or precision"):
        comparable(read(tmp_path / "run", tmp_path / "other"))


def test_other_data_or_weights_with_equal_settings_are_refused(tmp_path):
    for seed, data, model in ((1, "a", "m"), (2, "a", "n"), (3, "b", "m")):
        file = rundirs.run(tmp_path, [0.8], seed=seed) / "run.json"
        write_checksummed(file, read_checksummed(file) | {"fingerprint": {"train": {"sha256": data}, "model": model}})
    levels = read(tmp_path)
    comparable(levels[levels["seed"] < 3])  # a checkpoint without a pooler gets one by the seed
    with pytest.raises(UserError, match="have the same settings, but different data or precision"):
        comparable(levels)
    levels = levels[levels["seed"] < 3].assign(seed=1)
    with pytest.raises(UserError, match="have the same settings, but different initial weights"):
        comparable(levels)


def test_copies_of_a_model_of_data_and_of_weights_are_the_same(bert_dir, glue_dir, tmp_path):
    for seed, place in ((1, "one"), (2, "two")):
        copies = {name: shutil.copytree(folder, tmp_path / place / name) for name, folder in (("m", bert_dir), ("d", glue_dir))}
        weights = rundirs.weights(tmp_path / place / "w.safetensors", "", "made")
        mask = rundirs.oneshot(tmp_path / place / "mask", 0.5)
        given = {"model": copies["m"], "data_dir": copies["d"], "seed": seed}
        rundirs.run(tmp_path / "runs", [0.8], **given)
        rundirs.run(tmp_path / "runs", [0.7], **given, mask=mask, init=weights)
    levels = comparable(read(tmp_path / "runs"))
    assert set(levels["setting"]) == {f"model {brief(fingerprint(str(bert_dir)))}"}
    assert [len(seeds) for _, seeds in levels.groupby("row")["seed"]] == [2, 2]
    (copies["m"] / "config.json").write_text("{}")
    rundirs.run(tmp_path / "runs", [0.8], model=copies["m"], data_dir=copies["d"], seed=3)
    with pytest.raises(UserError, match="have different settings"):
        comparable(read(tmp_path / "runs"))
