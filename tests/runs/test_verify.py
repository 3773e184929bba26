"""scripts/verify.py: where a run comes from, and whether every file is sound."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import verify
from trainrun import train

from bert_tickets.cli import run_command
from bert_tickets.files import read_checksummed, read_facts, read_tensors, write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.runs.directory import result, results, results_lines
from bert_tickets.runs.integrity import problems


@pytest.fixture(scope="module")
def made(commands, tmp_path_factory) -> Path:
    """A run of RTE on three levels, with every kind of file but a checkpoint."""
    place = tmp_path_factory.mktemp("verified")
    words = f"--levels 3 --rewind 3 --no-reset-optimizer --keep-models --output-dir {place}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lt_glue.py", "--task", "rte", "an argument"])
        return train("lt_glue.py", [*commands["lt_glue.py"], *words])


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def verified(*places: Path) -> int:
    """The script's exit code."""
    with pytest.raises(SystemExit) as end:
        run_command(verify.main, verify.parse([str(place) for place in places]))
    return end.value.code


def one_problem(run: Path) -> str:
    (problem,) = problems(run)
    return problem


def test_a_sound_run_is_traced(run, capsys):
    (run / "notes.txt").write_text("mine")
    (run / ".level_03.tmp").mkdir()  # a kill left it
    about = read_checksummed(run / "run.json")
    about["environment"]["git"] = {"sha": "0123abc", "dirty": True}
    about["config"]["init"] = "shuffled.safetensors"
    about["fingerprint"]["init"] = {"perturbed": "the entries of each matrix shuffled"}
    write_checksummed(run / "run.json", about)
    write_checksummed(run / "failure.json", {"run": run.name, "task": "rte", "level": 3, "ended": "the loss became nan"})
    (run / "results.jsonl").write_bytes(results_lines(run))
    assert verified(run.parent) == 0
    out, facts = capsys.readouterr().out, about["fingerprint"]
    assert "python lt_glue.py --task rte 'an argument'" in out
    assert "0123abc, with changes" in out
    assert f"torch {torch.__version__}" in out
    for sha256 in (facts["model"], facts["train"]["sha256"], facts["evaluation"]["validation"]["sha256"]):
        assert f"sha256 {sha256}\n" in out
    assert 'shuffled.safetensors {"perturbed": "the entries of each matrix shuffled"}' in out
    for line in results(run):
        assert all(warning in out for warning in line["warnings"])
        for value in (line["mask_sha256"], line["init_sha256"], f"{line['metrics']['accuracy']:.4f}"):
            assert value in out
    assert any(line["warnings"] for line in results(run))
    assert "level 3 diverged: the loss became nan" in out
    assert "all files are intact" in out
    write_checksummed(run / "run.json", about | {"config": about["config"] | {"mask": "given.safetensors"}})
    assert re.search(r"given mask +given\.safetensors: .*level 0, method imp, .*task rte", "\n".join(verify.provenance(run)))


def test_a_damaged_file_is_named_and_the_exit_code_is_1(run, capsys):
    """tests/faults/test_damage.py damages every file in every way."""
    path = run / "level_01" / "model" / "config.json"
    path.write_text("{}")
    assert verified(run.parent) == 1
    captured = capsys.readouterr()
    assert f"{path} is damaged" in captured.out
    assert captured.err == f"damaged: {run}\n"
    (run / "failure.json").write_text("{}")
    assert any("failure.json is damaged" in problem for problem in problems(run))


@pytest.mark.parametrize(
    ("name", "fact", "problem"),
    [
        ("run.json", {"run": "another"}, "belongs to rte-imp"),
        ("run.json", {"config": {"task": "rte", "method": "imp", "later": 1}}, "no setting later"),
        ("level_01/metrics.json", {"run": "another"}, "level_01/metrics.json belongs to another"),
        ("level_01/metrics.json", {"level": 0}, "level_01/metrics.json belongs to level 0"),
        ("level_01/metrics.json", {"mask_sha256": "0" * 64}, "level_01/mask.safetensors is not the mask"),
        ("level_02/weights.safetensors", {"run": "another"}, "weights.safetensors belongs to another, level 2"),
        ("level_02/weights.safetensors", {"level": 1}, "weights.safetensors belongs to rte-imp.*, level 1"),
        ("level_02/moments.safetensors", {"run": "another"}, "moments.safetensors belongs to another"),
        ("rewind.safetensors", {"run": "another"}, "rewind.safetensors belongs to another"),
    ],
)
def test_a_sound_file_of_another_run_or_level_is_named(run, name, fact, problem):
    path = run / name
    if path.suffix == ".json":
        write_checksummed(path, read_checksummed(path) | fact)
    else:
        write_tensors(path, read_tensors(path), read_facts(path) | fact)
    assert any(re.search(problem, line) for line in problems(run))


def test_a_run_that_cannot_be_read_has_one_problem(run):
    shutil.rmtree(run / "level_01")
    assert one_problem(run) == f"{run / 'level_01'} is missing, and a later level is there"
    write_checksummed(run / "run.json", read_checksummed(run / "run.json") | {"format": 2})
    assert f"{run} has format 2, and this version reads format 3" in one_problem(run)
    (run / "run.json").unlink()
    assert "is not a run directory: it has no run.json" in one_problem(run)


def test_masks_and_weights_that_do_not_fit_are_named(run):
    """Each file is sound by itself."""
    level = run / "level_02"
    shutil.copy(run / "level_01" / "mask.safetensors", level / "mask.safetensors")
    assert "is not the mask that metrics.json names" in one_problem(run)
    mask = Mask.load(level / "mask.safetensors")
    inverse = Mask({name: ~kept for name, kept in mask.items()})
    inverse.write(level / "mask.safetensors")
    write_checksummed(level / "metrics.json", result(run, 2) | {"mask_sha256": inverse.sha256()})
    (run / "results.jsonl").write_bytes(results_lines(run))
    assert "that the mask prunes" in one_problem(run)


def test_weights_that_are_not_finite_are_named(run):
    path = run / "level_02" / "weights.safetensors"
    weights = read_tensors(path)
    weights["classifier.bias"][0] = torch.nan
    write_tensors(path, weights, read_facts(path))
    assert one_problem(run) == f"{path} has weights that are not finite, in classifier.bias"


@pytest.mark.parametrize("name", ["level_02/moments.safetensors", "rewind.safetensors"])
def test_missing_files_that_a_run_rewinds_with_are_named(run, name):
    (run / name).unlink()
    assert one_problem(run) == f"{run / name} is missing"


def test_checkpoints_are_verified_and_those_of_a_finished_level_do_no_harm(run):
    path = run / "checkpoint.safetensors"
    write_tensors(path, {"x": torch.zeros(2)}, {"run": run.name, "level": 2, "step": 1})
    assert problems(run) == []
    write_tensors(path, {"x": torch.zeros(2)}, {"run": "another", "level": 2, "step": 1})
    assert "checkpoint.safetensors belongs to another" in one_problem(run)
    shutil.copy(run / "level_02/mask.safetensors", path)
    assert "another file of the run" in one_problem(run)


def test_a_folder_without_a_run_is_a_users_mistake(run, tmp_path, capsys):
    for place in (tmp_path / "nothing", tmp_path / "typo"):
        assert verified(run, place) == 2
        assert f"no run directory in {place}" in capsys.readouterr().err


def test_a_run_without_its_description_and_one_under_another_name_are_damaged(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "renamed")
    assert one_problem(tmp_path / "renamed") == f"{tmp_path / 'renamed' / 'run.json'} belongs to {run.name}"
    (run / "run.json").unlink()
    assert verified(tmp_path) == 1
    said = capsys.readouterr().err
    assert all(str(damaged) in said for damaged in (run, tmp_path / "renamed"))


def test_masks_of_steps_are_verified(run):
    (run / "masks").mkdir()
    whole = (run / "level_01" / "mask.safetensors").read_bytes()
    (run / "masks" / "step_0000001.safetensors").write_bytes(whole)
    assert problems(run) == []
    (run / "masks" / "step_0000002.safetensors").write_bytes(whole[:-9])
    assert "step_0000002.safetensors" in one_problem(run)
