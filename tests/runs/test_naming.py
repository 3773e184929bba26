"""A run's name: its settings, and the content of the files that it reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from test_config import GIVEN, NEEDED, OF_IMP
from trainrun import Killed, contents, dying, train

import oneshot
import perturb_weight
from bert_tickets.config import build, flat, from_flat
from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed, write_checksummed
from bert_tickets.runs.directory import events
from bert_tickets.runs.naming import differences, run_name
from bert_tickets.tasks import glue
from bert_tickets.training.step import Step

NOT_IN_THE_NAME = {"output_dir", "device", "keep_models", "check_metrics", "dry_run", "save_steps", "save_minutes"}


def name(**given):
    return run_name(build({"task": "rte", **given}))


# ---- settings ----


def test_a_name_does_not_depend_on_the_order_of_the_flags():
    values = {field: value for field, value in (GIVEN | OF_IMP).items() if field != "epochs"}
    cfg = build(values)
    assert run_name(cfg) == run_name(build(dict(reversed(values.items()))))
    assert from_flat(flat(cfg)) == cfg


@pytest.mark.parametrize("field", sorted((GIVEN | OF_IMP).keys()))
def test_a_name_depends_on_what_affects_the_result(field):
    needed = NEEDED.get(field, {})
    assert (name(**needed, **{field: (GIVEN | OF_IMP)[field]}) == name(**needed)) == (field in NOT_IN_THE_NAME)


def test_other_words_for_the_same_settings_change_no_name():
    defaults = {field: value for field, value in flat(build({"task": "rte"})).items() if field not in ("epochs", "doc_stride")}
    assert name(**defaults) == name()
    assert differences(build(defaults)) == {}
    for zero in ("0", "00", "+0", "0%", "0.0%"):
        assert name(rewind=zero) == name()
    assert name(rewind="none", reset_optimizer=False) == name(rewind="none") != name(rewind="none", reset_optimizer=True)
    assert name(rate=0.3, levels=4) == name(rate=0.3)


def test_a_name_tells_task_method_protocol_and_seed():
    assert re.fullmatch(r"mnli-imp-released-s3-[0-9a-f]{8}", name(task="mnli", protocol="released", seed=3))
    assert re.fullmatch(r"rte-transfer-s57-[0-9a-f]{8}", name(method="transfer", mask="mask.pt"))
    assert name(task="mnli") == "mnli-imp-s57-d28562b5"  # finished runs are found again


# ---- files and folders ----


@pytest.mark.parametrize("field", ["mask", "init"])
def test_a_file_counts_by_its_content(tmp_path, field):
    given = {"method": "transfer", "mask": "m"} if field == "mask" else {}
    for file, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / file).write_bytes(content)
    a, b, c = (name(**given | {field: str(tmp_path / file)}) for file in "abc")
    assert a == b != c
    (tmp_path / "a").write_bytes(b"2")
    assert name(**given | {field: str(tmp_path / "a")}) != a


def test_a_run_of_a_preset_that_has_changed_is_not_taken_for_one_of_the_new(commands, tmp_path, monkeypatch):
    words = [*commands["lt_glue.py"], "--levels", "1", "--output-dir", str(tmp_path)]
    run = train("lt_glue.py", words)
    about = read_checksummed(run / "run.json")
    for place in ("finished", "begun"):
        write_checksummed(run / "run.json", about | {"config": about["config"] | {"adam_epsilon": 1e-6}})
        with pytest.raises(UserError, match=r"was made with --adam-epsilon 1e-06, and now that is 1e-08: a preset or a default"):
            train("lt_glue.py", words)
        if place == "finished":
            shutil.rmtree(run / "level_00")
    write_checksummed(run / "run.json", about)
    assert train("lt_glue.py", words) == run


def test_a_word_of_init_is_not_a_folder_of_that_name(bert_dir, tmp_path, monkeypatch):
    before = name(), name(init="random")
    monkeypatch.chdir(tmp_path)
    for word in ("pretrained", "random"):
        shutil.copytree(bert_dir, word)
    assert (name(), name(init="random")) == before
    assert name(model="random") == name(model=str(bert_dir))


def test_a_checkpoint_counts_by_the_files_that_are_read(bert_dir, tmp_path):
    copy = shutil.copytree(bert_dir, tmp_path / "elsewhere" / "copy")
    (tmp_path / "link").symlink_to(copy)
    for file in ("README.md", "training_args.bin", ".gitattributes", "log.txt"):
        (copy / file).write_text("of one job")
    (copy / "checkpoint-500").mkdir()
    same = name(model=str(bert_dir))
    assert name(model=str(copy)) == name(model=f"{copy}/") == name(model=str(tmp_path / "link")) == same != name()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        content = (copy / file).read_bytes()
        (copy / file).write_bytes(content[:-1] + b" ")
        assert name(model=str(copy)) != same, file
        (copy / file).write_bytes(content)
    (copy / "bert_config.json").write_text("{}")  # is not read beside a config.json, nor this one beside a tokenizer.json
    (copy / "vocab.txt").write_text("a")
    (copy / "model-backup.safetensors").write_text("a")
    assert name(model=str(copy)) == same


def test_a_checkpoint_counts_by_all_files_of_its_index(bert_dir, tmp_path):
    copy = shutil.copytree(bert_dir, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "bert_part_1.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "bert_part_1.safetensors"}}))
    before = name(model=str(copy))
    (copy / "bert_part_1.safetensors").write_bytes(b"other weights")
    assert name(model=str(copy)) != before
    for names in ({"x": "../elsewhere"}, {"x": 1}):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UserError, match=r"index\.json is damaged: it has no weight_map of names of files beside it"):
            name(model=str(copy))


def test_a_folder_by_the_name_of_the_default_model_is_that_folder(bert_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bert_dir, "bert-base-uncased")
    assert name() == name(model=str(bert_dir))


@pytest.mark.parametrize("task", ["rte", "mnli", "cola", "squad", "mlm"])
def test_data_count_by_the_files_that_the_task_reads(task, glue_dir, squad_dir, corpus_dir, tmp_path):
    folder = {"squad": squad_dir, "mlm": corpus_dir}.get(task, glue_dir)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "more.tsv").write_text("of no task")
    same = name(task=task, data_dir=str(folder))
    assert name(task=task, data_dir=str(copy)) == same != name(task=task)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    changing = []
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        changing += [path.name] * (name(task=task, data_dir=str(copy)) != same)
        path.write_bytes(content)
    expected = {
        "mnli": ["dev_matched.tsv", "dev_mismatched.tsv", "train.tsv"],
        "squad": ["dev-v1.1.json", "train-v1.1.json"],
        "mlm": ["en.train", "en.valid"],
    }
    assert changing == expected.get(task, ["dev.tsv", "train.tsv"])


def test_the_folder_of_a_task_is_the_data_of_the_folder_above(glue_dir):
    assert name(data_dir=str(glue_dir)) == name(data_dir=str(glue_dir / "RTE"))


def test_a_folder_without_files_to_read_counts_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for field in ("data_dir", "model"):
        assert name(**{field: "empty"}) == name(**{field: str(tmp_path / "empty")}) == name(**{field: "./empty/"}) != name()
    assert (
        name(task="mlm", data_dir="wikimedia/wikipedia") == name(task="mlm", data_dir="wikimedia/wikipedia") != name(task="mlm")
    )


# ---- another path at every start ----


@pytest.fixture
def scratch(commands, bert_dir, squad_dir, glue_dir, corpus_dir, tmp_path, monkeypatch):
    """A function that copies the model and a script's data to a job's folder; returns the script's command with the copies."""
    monkeypatch.setattr("sys.argv", ["a script"])  # run.json holds it
    data = {"lt_glue.py": glue_dir, "lt_squad.py": squad_dir, "lt_pretrain.py": corpus_dir}

    def job(script, number):
        copies = {str(folder): str(tmp_path / number / f"{number}-{folder.name}") for folder in (bert_dir, data[script])}
        for folder, copy in copies.items():
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        return [copies.get(word, word) for word in commands[script]]

    return job


@pytest.mark.parametrize("script", ["lt_glue.py", "lt_squad.py", "lt_pretrain.py"])
@pytest.mark.parametrize("killed", [4, 8])  # in its first level, and in its second
def test_a_killed_run_goes_on_from_copies_of_its_files(scratch, tmp_path, monkeypatch, script, killed):
    words = ["--levels", "2", "--rate", "0.25", "--save-steps", "2", "--keep-models", "--output-dir"]
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying(Step.__call__, killed))
        with pytest.raises(Killed):
            train(script, [*scratch(script, "1001"), *words, tmp_path / "runs"])
    second = scratch(script, "1002")
    shutil.rmtree(tmp_path / "1001")
    run = train(script, [*second, *words, tmp_path / "runs"])
    assert list((tmp_path / "runs").iterdir()) == [run]
    assert any(event["event"] == "resume" for event in events(run / "log.jsonl"))
    undisturbed = train(script, [*scratch(script, "1001"), *words, tmp_path / "undisturbed"])
    expected, found = contents(undisturbed), contents(run)
    about = [read_checksummed(folder / "run.json") for folder in (undisturbed, run)]
    assert about[0] == about[1] | {"config": about[0]["config"]}
    del expected["run.json"], found["run.json"]  # it holds --output-dir
    assert found == expected


def test_masks_and_weights_of_a_copied_model_are_the_same_files(scratch, bert_dir, tmp_path):
    names = []
    for number in ("1001", "1002"):
        command = scratch("lt_glue.py", number)
        model = command[command.index("--model") + 1]
        weights, mask = tmp_path / number / "weights", tmp_path / number / "mask"
        perturb_weight.main(perturb_weight.parse(f"--noise 0.1 --model {model} --output {weights}".split()))
        oneshot.main(oneshot.parse(f"--rate 0.5 --model {model} --init {weights} --output {mask}".split()))
        words = [*command, "--mask", mask, "--init", weights, "--output-dir", tmp_path / "runs"]
        names.append(train("lt_glue.py", words))
    assert names[0] == names[1]


def test_data_that_change_while_they_are_read_have_no_run(scratch, tmp_path, monkeypatch):
    command = scratch("lt_glue.py", "1001")
    data = Path(command[command.index("--data-dir") + 1]) / "RTE" / "train.tsv"
    read = glue.read_folder

    def read_other(*arguments):
        data.write_text("\n".join(data.read_text().split("\n")[:-9]) + "\n")
        return read(*arguments)

    monkeypatch.setattr(glue, "read_folder", read_other)
    with pytest.raises(UserError, match="changed while it was read; give the command again"):
        train("lt_glue.py", [*command, "--levels", "1", "--output-dir", tmp_path / "runs"])
    assert list((tmp_path / "runs").iterdir()) == []


def test_other_data_under_one_path_are_another_run(scratch, tmp_path):
    command = scratch("lt_glue.py", "1001")
    words = [*command, "--levels", "1", "--output-dir", tmp_path / "runs"]
    first = train("lt_glue.py", words)
    before = contents(first)
    data = Path(command[command.index("--data-dir") + 1]) / "RTE" / "train.tsv"
    data.write_text("\n".join(data.read_text().split("\n")[:-9]) + "\n")
    second = train("lt_glue.py", words)
    assert first != second
    assert contents(first) == before
    shutil.rmtree(second)
    shutil.copytree(first, second)  # even if both had one name
    write_checksummed(second / "run.json", read_checksummed(second / "run.json") | {"run": second.name})
    for level in second.glob("level_*"):
        shutil.rmtree(level)
    with pytest.raises(UserError, match=r"was started with train .* would mix two runs"):
        train("lt_glue.py", words)
