"""What is read from run directories: what was trained, and what it scored."""

import dataclasses
import json
import random
import shutil

import pytest
import rundirs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lt_glue
from bert_tickets.cli import parse
from bert_tickets.config import build
from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed, read_json, write_checksummed, write_json
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.imp import finetune, prepare
from bert_tickets.report.results import (
    GIVEN,
    IMP,
    ONESHOT,
    PRETRAINED,
    RANDOM,
    SHUFFLED,
    by_seed,
    dense,
    need_one_setting,
    need_one_subject,
    read_records,
    under,
)
from bert_tickets.runs.session import Run
from bert_tickets.tasks.glue import Glue


def only(records):
    (record,) = records
    return record


def test_a_run_that_finds_tickets_is_a_record_a_level(tmp_path):
    folder = rundirs.run(tmp_path, [0.8, 0.7, None], "rte", seed=3, levels=10)
    records = read_records([tmp_path])
    assert [(r.level, r.sparsity, r.value) for r in records] == [(0, 0.0, 0.8), (1, 0.1, 0.7), (2, 0.2, None)]
    assert {(r.run, r.levels, r.task, r.metric, r.seed, r.ticket, r.weights, r.rewind) for r in records} == {
        (folder, 10, "rte", "accuracy", 3, IMP, PRETRAINED, "0")
    }
    assert {(r.finding, r.setting, r.ticket_seed) for r in records} == {("", "", None)}
    assert all(Mask.load(r.mask_file).sha256() == r.mask_sha256 for r in records)


def test_records_of_a_real_run(commands, tmp_path, monkeypatch):
    """Of the training script itself, and of the ticket that it found, trained from random weights."""
    monkeypatch.chdir(tmp_path)
    words = [*commands["lt_glue.py"], "--max-steps", "1", "--limit-eval", "4"]
    lt_glue.main(parse("glue", None, [*words, "--levels", "2"]))
    found = read_records(["runs"])
    assert [(r.level, r.sparsity, r.levels, r.ticket, r.task) for r in found] == [(0, 0, 2, IMP, "rte"), (1, 0.1, 2, IMP, "rte")]
    config = build("glue", {"task": "rte"} | vars_of(words) | {"mask": str(found[1].mask_file), "init": "random"})
    with Run(config, "glue") as run:
        finetune(prepare(Glue("rte"), config, run), run, Mask.load(config.mask))
    given = only(r for r in read_records(["runs"]) if r.ticket != IMP)
    assert (given.ticket, given.ticket_seed, given.weights, given.rewind) == ("rte", 57, "random", "")
    assert (given.mask_sha256, given.setting) == (found[1].mask_sha256, found[1].setting)


def vars_of(words):
    """The flags of a command line by name."""
    config = parse("glue", None, words)
    return {name: getattr(config, name) for name in ("model", "data_dir", "limit_eval")} | {
        name: getattr(config.train, name) for name in ("batch_size", "max_steps", "lr", "log_every")
    }


def test_where_a_given_ticket_is_from(tmp_path):
    found = rundirs.run(tmp_path / "found", [0.9, 0.8], "mlm", seed=4)
    masks = {
        RANDOM: rundirs.oneshot(tmp_path / "r.safetensors", 0.5, "random", 7),
        ONESHOT: rundirs.oneshot(tmp_path / "m.safetensors", 0.5, "magnitude"),
        "mlm": rundirs.mask_of(found, 1),
        GIVEN: tmp_path / "unknown.safetensors",
    }
    rundirs.some_mask(0.3).write(masks[GIVEN])
    for origin, mask in masks.items():
        record = only(read_records([rundirs.run(tmp_path / origin, [0.5], mask=mask)]))
        assert (record.ticket, record.rewind, record.levels) == (origin, "", 1)
        assert record.ticket_seed == {RANDOM: 7, ONESHOT: 57, "mlm": 4, GIVEN: None}[origin]


@pytest.mark.parametrize(
    ("said", "weights"),
    [
        ("the entries of each matrix shuffled", SHUFFLED),
        ("its layers whole in the order 3 1 2 0", "its layers whole"),
        ("its matrices by layer in the order 1 0", "its matrices by layer"),
        ("noise of 0.1 times 0.0387, the spread of its matrices", "noise of 0.1 times 0.0387, the spread of its matrices"),
    ],
)
def test_what_a_ticket_starts_from(tmp_path, said, weights):
    """The same words for every seed: what a seed drew is left out."""
    mask = rundirs.oneshot(tmp_path / "m.safetensors", 0.5)
    file = rundirs.weights(tmp_path / "w.safetensors", said)
    assert only(read_records([rundirs.run(tmp_path / "a", [0.5], mask=mask, init=file)])).weights == weights


def test_later_weights_are_one_for_all_seeds(tmp_path):
    mask = rundirs.oneshot(tmp_path / "m.safetensors", 0.5)
    for seed in (1, 2):
        file = tmp_path / f"rewind{seed}.safetensors"
        rundirs.write_tensors(file, {"w": rundirs.torch.zeros(1)}, {"rewound": f"mlm trained to 5%, seed {seed}"})
        rundirs.run(tmp_path / "runs", [0.5], seed=seed, mask=mask, init=file)
    assert {r.weights for r in read_records([tmp_path / "runs"])} == {"mlm trained to 5%"}


def test_settings_and_ways_to_find_are_told_apart(tmp_path):
    rundirs.run(tmp_path, [0.5], lr=1e-4, rate=0.2, scope="tensor", protocol="released")
    record = only(read_records([tmp_path]))
    assert record.setting == "lr 0.0001, protocol released"
    assert record.finding == "rate 0.2, scope tensor"


def test_standard_pruning_is_no_other_way_to_find(tmp_path):
    """That it keeps AdamW follows from it; that it does not is said."""
    rundirs.run(tmp_path, [0.5], rewind="none")
    rundirs.run(tmp_path, [0.5], rewind="none", reset_optimizer=True, seed=2)
    rundirs.run(tmp_path, [0.5], reset_optimizer=False, seed=3)
    rundirs.run(tmp_path, [0.5], "mlm", protocol="released", seed=4)  # of which a new AdamW is the preset's
    assert sorted((r.seed, r.rewind, r.finding) for r in read_records([tmp_path])) == [
        (2, "none", "reset optimizer True"),
        (3, "0", "reset optimizer False"),
        (4, "none", ""),
        (57, "none", ""),
    ]


def test_released_standard_pruning_is_no_other_way_to_find_either(tmp_path):
    """Its one fall of the learning rate follows from it; not so where masked language modelling never rewinds anyway."""
    rundirs.run(tmp_path, [0.5], protocol="released", rewind="none")
    rundirs.run(tmp_path, [0.5], protocol="released", rewind="none", decay="level", seed=2)
    rundirs.run(tmp_path, [0.5], protocol="released", decay="once", seed=3)
    rundirs.run(tmp_path, [0.5], "mlm", protocol="released", rewind="none", seed=4)
    assert sorted((r.seed, r.rewind, r.finding) for r in read_records([tmp_path])) == [
        (2, "none", "decay level"),
        (3, "0", "decay once"),
        (4, "none", "decay once, reset optimizer False"),
        (57, "none", ""),
    ]


def test_no_run_and_a_damaged_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory in"):
        read_records([tmp_path])
    folder = rundirs.run(tmp_path, [0.5])
    (folder / "run.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(UserError, match="is not a sound run directory"):
        read_records([tmp_path])
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match="damaged or missing"):
        read_records([tmp_path])


def test_a_run_without_one_of_its_levels_is_refused_and_a_copy_beside_them_is_none(tmp_path):
    folder = rundirs.run(tmp_path, [0.8, 0.7, 0.6])
    shutil.copytree(folder / "level_02", folder / "level_02.bak")
    assert [record.level for record in read_records([tmp_path])] == [0, 1, 2]
    shutil.rmtree(folder / "level_01")
    with pytest.raises(UserError, match="level_01 is missing, and a later level is there"):
        read_records([tmp_path])


def test_a_newer_run_is_refused(tmp_path):
    folder = rundirs.run(tmp_path, [0.8])
    write_json(folder / "run.json", read_json(folder / "run.json") | {"format": 1})
    assert len(read_records([tmp_path])) == 1
    write_checksummed(folder / "run.json", read_json(folder / "run.json") | {"format": 99})
    with pytest.raises(UserError, match="format 99; this version reads up to 2: update"):
        read_records([tmp_path])


def test_a_run_counts_once_however_it_is_named(tmp_path):
    folder = rundirs.run(tmp_path / "runs", [0.5, 0.4])
    assert len(read_records([tmp_path, folder, tmp_path / "runs"])) == 2


def test_equal_copies_agree_and_others_are_refused(tmp_path):
    folder = rundirs.run(tmp_path, [0.5])
    shutil.copytree(folder, tmp_path / "copy")
    assert len(by_seed(read_records([tmp_path]), task="sst2")) == 1
    line = json.loads((tmp_path / "copy" / "level_00" / "metrics.json").read_text())
    (tmp_path / "copy" / "level_00" / "metrics.json").write_text(json.dumps(line | {"metrics": {"accuracy": 0.6}}))
    with pytest.raises(UserError, match="with seed 57, and differ: give one"):
        by_seed(read_records([tmp_path]), task="sst2")
    with pytest.raises(UserError, match="with seed 57, and differ: give one"):
        dense(read_records([tmp_path]), "sst2")


def test_the_full_network_is_the_plain_runs(tmp_path):
    """Level 0 of another kind of run stands in where a seed has no plain one."""
    rundirs.run(tmp_path, [0.80], seed=1)
    rundirs.run(tmp_path, [0.81], seed=1, rewind="5%")
    rundirs.run(tmp_path, [0.82], seed=1, rate=0.2)
    rundirs.run(tmp_path, [0.83], seed=2, rewind="5%")
    rundirs.run(tmp_path, [0.84], seed=2, rewind="none")
    rundirs.run(tmp_path, [0.10], seed=3, init="random")
    rundirs.run(tmp_path, [0.20], seed=4, mask=rundirs.oneshot(tmp_path / "m.safetensors", 0.0))
    found = dense(read_records([tmp_path]), "sst2")
    assert {seed: r.value for seed, r in found.items()} == {1: 0.80, 2: 0.84}


def test_two_settings_are_refused_and_one_can_be_chosen(tmp_path):
    rundirs.run(tmp_path, [0.5])
    rundirs.run(tmp_path, [0.6], lr=1e-4, limit_train=100)
    rundirs.run(tmp_path, [0.6], lr=1e-4, limit_train=200, task="rte")
    records = read_records([tmp_path])
    with pytest.raises(UserError, match=r"sst2 have 2 settings; choose:(.|\n)*the preset as it is"):
        need_one_setting(records, "choose")
    assert [r.task for r in under(records, "lr 0.0001")] == ["rte", "sst2"]
    assert [r.task for r in under(records, "limit train 100, lr 0.0001")] == ["sst2"]
    assert [r.value for r in under(records, "")] == [0.5]
    assert under(records, "lr 0.1") == []
    need_one_setting(under(records, "lr 0.0001"))


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_places_does_not_matter(tmp_path, rng: random.Random):
    if not any(tmp_path.iterdir()):
        for seed in (1, 2, 3):
            rundirs.run(tmp_path / f"place{seed}", [0.5, 0.4], seed=seed)
    places = sorted(tmp_path.iterdir())
    shuffled = rng.sample(places, len(places))
    assert read_records(shuffled) == read_records(places)


def test_other_data_or_weights_under_one_name_are_not_pooled(tmp_path):
    """The places are equal; what lay there when the runs began was not."""
    for seed, data, model in ((1, "a", "m"), (2, "a", "n"), (3, "b", "m")):
        run = rundirs.run(tmp_path, [0.8], seed=seed)
        about = read_checksummed(run / "run.json")
        write_checksummed(run / "run.json", about | {"fingerprint": {"train": {"sha256": data}, "model": model}})
    one, two, three = sorted(read_records([tmp_path]), key=lambda record: record.seed)
    need_one_subject([one, two])  # a checkpoint without a pooler has one drawn by each seed
    with pytest.raises(UserError, match="had other data or precision under one name"):
        need_one_subject([one, two, three])
    with pytest.raises(UserError, match="had other weights to begin with under one name"):
        need_one_subject([one, dataclasses.replace(one, model="n")])
