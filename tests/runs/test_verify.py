"""From a number back to its run; and every file of a run directory verified."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import lt_glue
from bert_tickets.cli import parse
from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed, read_facts, read_tensors, write_checksummed, write_json, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import results, results_lines, run_dir, seconds
from bert_tickets.runs.integrity import check_finished
from bert_tickets.runs.resume import recover
from bert_tickets.runs.verify import SOUND, inspect, main, provenance, verify


@pytest.fixture(scope="module")
def made(commands, tmp_path_factory) -> Path:
    """A run of three levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("inspected"))
        patch.setattr(sys, "argv", ["lt_glue.py", "--task", "rte", "an argument"])
        cfg = parse("glue", None, [*commands["lt_glue.py"], "--levels", "3", "--keep-models"])
        lt_glue.main(cfg)
        return run_dir(cfg, "glue").resolve()


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def faults(run: Path) -> dict[str, str]:
    said = {str(path.relative_to(run)): verdict for path, verdict in verify(run)}
    return {name: verdict for name, verdict in said.items() if verdict != SOUND and not verdict.startswith("not checked")}


def test_a_sound_run_is_traced_and_verified(run, capsys):
    assert inspect(run)
    out = capsys.readouterr().out
    about = read_checksummed(run / "run.json")
    assert "python lt_glue.py --task rte 'an argument'" in out
    assert about["fingerprint"]["train"]["sha256"] in out
    assert f"{about['config']['model']}, sha256 {about['fingerprint']['model']}\n" in out
    for result in results(run):
        assert result["mask_sha256"] in out
        assert result["init_sha256"] in out
        for doubt in result["warnings"]:
            assert f"* level {result['level']}: {doubt}" in out
    assert any(result["warnings"] for result in results(run))
    assert faults(run) == {}


def test_commit_given_mask_and_other_weights_are_told(run):
    about = read_checksummed(run / "run.json")
    about["environment"]["git"] = {"sha": "0123abc", "dirty": True}
    about["config"] |= {"mask": "given.safetensors", "init": "shuffled.safetensors"}
    about["fingerprint"]["init"] = {"perturbed": "the entries of each matrix shuffled"}
    write_checksummed(run / "run.json", about)
    path = run / "level_00" / "mask.safetensors"
    Mask(Mask.load(path)).write(path, method="oneshot random", seed="3")
    lines = {line.split("  ")[1]: line for line in provenance(run).splitlines()}
    assert lines["commit"].endswith("  0123abc, with changes")
    assert "  given.safetensors: method oneshot random, seed 3, sha256 " in lines["given mask"]
    assert lines["starts from"].endswith('  shuffled.safetensors {"perturbed": "the entries of each matrix shuffled"}')


def test_what_ended_a_level_is_told_and_verified(run, capsys):
    shutil.rmtree(run / "level_02")
    write_checksummed(
        run / "failure.json", {"run": run.name, "task": "rte", "level": 2, "ended": "the loss became nan by step 4"}
    )
    (run / "results.jsonl").write_bytes(results_lines(run))
    inspect(run)
    assert "\nlevel 2 came to no result: the loss became nan by step 4\n" in capsys.readouterr().out
    assert not {"failure.json", "results.jsonl"} & faults(run).keys()
    (run / "failure.json").write_text((run / "failure.json").read_text().replace("nan", "inf"))
    assert {"failure.json", "results.jsonl"} <= faults(run).keys()


FILES = ["run.json", "results.jsonl", "level_00/metrics.json", "level_01/mask.safetensors", "level_02/weights.safetensors"]
FILES += [f"level_01/model/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "foreign"])
def test_a_damaged_file_is_named(run, name, how, capsys):
    path = run / name
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    damaged = {"flipped": data, "cut": data[: len(data) // 2], "emptied": b"", "foreign": b"PK\x03\x04 something else"}[how]
    path.write_bytes(damaged)
    assert any(name.startswith(found) or found == name for found in faults(run)), faults(run)
    assert not inspect(run)
    with pytest.raises(SystemExit) as end:
        main(type("Args", (), {"runs": [str(run)]}))
    assert end.value.code == 1
    assert "damaged: " in capsys.readouterr().err


def test_a_damaged_file_is_named_whatever_its_folder_is_called(run, tmp_path, monkeypatch, capsys):
    """What is said of it begins with its path."""
    monkeypatch.chdir(tmp_path)
    place = Path("not mine") / run.name
    shutil.copytree(run, place)
    (place / "level_00" / "mask.safetensors").write_bytes(b"")
    assert not inspect(place)
    assert "not mine" in capsys.readouterr().out


PIPES = ["run.json", "results.jsonl", "log.jsonl", "checkpoint.safetensors", "failure.json", "level_00/metrics.json"]
PIPES += ["level_01/mask.safetensors", "level_02/weights.safetensors", "level_01/model/config.json"]


@pytest.mark.parametrize(
    ("name", "fact", "said"),
    [
        ("run.json", {"run": "another"}, "another run's: it is of another"),
        ("level_01/metrics.json", {"run": "another"}, "another run's: it is of another"),
        ("level_01/metrics.json", {"level": 0}, "another level's: it is of level 0"),
        ("level_01/metrics.json", {"mask_sha256": "0" * 64}, "metrics.json names another mask"),
        ("level_01/mask.safetensors", {"run": "another"}, "another run's: it is of another"),
        ("level_02/weights.safetensors", {"run": "another"}, "another run's: it is of another, level 2"),
        ("level_02/weights.safetensors", {"level": 1}, "another run's: it is of .*, level 1"),
    ],
)
def test_a_file_of_another_run_or_level_is_refused_and_named_though_it_is_sound(run, name, fact, said):
    path = run / name
    if path.suffix == ".json":
        write_checksummed(path, read_checksummed(path) | fact)
    elif path.name == "mask.safetensors":
        Mask.load(path).write(path, **fact)
    else:
        write_tensors(path, read_tensors(path), read_facts(path) | fact)
    with pytest.raises(UserError, match=said):
        check_finished(run)
    assert {name, str(Path(name).parent)} & faults(run).keys()


def go_on(run: Path) -> None:
    recover(run, 3)
    check_finished(run)


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_named_and_not_waited_for(run, name, soon):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert not inspect(run)
    assert faults(run)[name] == f"{run / name} is no file"
    if name == "log.jsonl":
        assert seconds(run) == {}
    elif name in ("checkpoint.safetensors", "failure.json"):  # what a run can do without
        recover(run, 3)
        assert not (run / name).exists()
    elif "model" not in name:  # which no run reads
        with pytest.raises(UserError, match="is no file"):
            go_on(run)


def test_a_level_that_is_gone_before_others_is_named(run):
    shutil.rmtree(run / "level_01")
    assert faults(run)["level_01"] == "is missing: there are later levels, which the run cannot go on from without it"


def test_files_that_contradict_each_other_are_named(run):
    """Each is sound by itself."""
    shutil.copy(run / "level_00" / "mask.safetensors", run / "level_01" / "mask.safetensors")
    assert faults(run)["level_01"] == "metrics.json has other counts than the mask, or another level"
    first, last = (Mask.load(run / f"level_0{level}" / "mask.safetensors") for level in (0, 2))
    Mask({name: ~kept for name, kept in last.items()}).write(run / "level_02" / "mask.safetensors")
    found = [verdict for path, verdict in verify(run) if path.name == "level_02"]
    assert "metrics.json names another mask (mask_sha256)" in found
    assert "weights.safetensors has weights where the mask has none" in found
    first.write(run / "level_02" / "mask.safetensors")
    last.write(run / "level_01" / "mask.safetensors")
    assert "the mask keeps weights that the level before had removed" in [v for p, v in verify(run) if p.name == "level_02"]


def test_weights_that_are_not_finite_are_named(run):
    path = run / "level_02" / "weights.safetensors"
    weights = read_tensors(path)
    weights["classifier.bias"][0] = torch.nan
    write_tensors(path, weights, read_facts(path))
    assert faults(run) == {"level_02": "weights.safetensors has weights that are not finite"}


def test_a_kept_model_of_which_something_is_missing_is_named(run):
    (run / "level_00" / "model" / "config.json").unlink()
    shutil.rmtree(run / "level_01" / "model")
    why = "is missing: the level's kept model cannot be opened without it"
    assert faults(run) == {"level_00/model/config.json": why, "level_01/model": why}


@pytest.mark.parametrize(("rewind", "name"), [("none", "level_02/moments.safetensors"), ("5%", "rewind.safetensors")])
def test_what_a_run_that_rewinds_otherwise_is_to_have_and_lacks_is_named(run, rewind, name):
    about = read_checksummed(run / "run.json")
    write_checksummed(run / "run.json", about | {"config": about["config"] | {"rewind": rewind}})
    assert faults(run)[name].startswith("is missing: no ")


def test_a_kept_model_of_an_older_version_is_not_checked(run):
    path = run / "level_00" / "metrics.json"
    write_checksummed(path, {key: value for key, value in read_checksummed(path).items() if key != "model_files"})
    (run / "results.jsonl").write_bytes(results_lines(run))
    said = {path.name: verdict for path, verdict in verify(run) if path.parent == run / "level_00" / "model"}
    assert set(said.values()) == {"not checked: an older version noted no digest of it"}
    assert faults(run) == {}


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..", "", "a/b"])
def test_a_kept_model_has_no_file_elsewhere(run, name):
    path = run / "level_00" / "metrics.json"
    write_checksummed(path, read_checksummed(path) | {"model_files": {name: "0"}})
    assert "its model_files are to be names and digests" in faults(run)["level_00/model/config.json"]


def test_a_run_of_an_older_version_is_read_and_said_to_be_one(run, capsys):
    value = read_checksummed(run / "run.json") | {"format": 1}
    write_json(run / "run.json", value)
    assert inspect(run)
    assert "run.json: readable; of an older version, without a checksum" in capsys.readouterr().out
    write_checksummed(run / "run.json", value | {"format": 99})
    assert not inspect(run)
    assert "has format 99; this version reads up to" in capsys.readouterr().out


def test_what_a_kill_left_and_what_is_not_of_a_run_do_no_harm(run, capsys):
    (run / ".level_03.tmp").mkdir()
    (run / ".level_03.tmp" / "mask.safetensors").write_bytes(b"")
    (run / "notes.txt").write_text("mine")
    assert inspect(run)
    out = capsys.readouterr().out
    assert "left by a kill; the next start removes it" in out
    assert "notes.txt: not of a run" in out


def test_a_folder_without_a_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no run directory in"):
        main(type("Args", (), {"runs": [str(tmp_path)]}))
