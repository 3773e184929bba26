"""The run directory: what it holds, what it answers, what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
from conftest import ROOT
from trainrun import MAY_DIFFER, train

from bert_tickets.cli import parse
from bert_tickets.config import build
from bert_tickets.errors import Busy, Diverged, UserError
from bert_tickets.files import read_checksummed, write_checksummed
from bert_tickets.methods import main as program
from bert_tickets.runs import session
from bert_tickets.runs.directory import events, failure, run_dir
from bert_tickets.runs.writer import Run
from bert_tickets.training.step import Step

# ---- a run directory ----


def test_files_of_a_finished_run(runs):
    found = runs("run")
    run = runs.dir("run")
    levels = {f"level_0{level}/{file}" for level in range(3) for file in ("mask.safetensors", "metrics.json")}
    assert found.keys() == {"run.json", "results.jsonl", "level_02/weights.safetensors", *levels}
    assert {path.name for path in run.iterdir()} & MAY_DIFFER == {"log.jsonl", "train.jsonl", "lock"}
    about = read_checksummed(run / "run.json")
    assert (about["run"], about["config"]["method"], about["config"]["lr"]) == (run.name, "imp", 1e-3)
    assert about["differs_from_preset"]["levels"] == 3
    assert set(about["fingerprint"]) == {
        "device",
        "precision",
        "model",
        "init",
        "head",
        "architecture",
        "kernels",
        "train",
        "evaluation",
    }
    assert {"torch", "transformers", "python"} <= set(about["environment"]["versions"])
    lines = [json.loads(line) for line in found["results.jsonl"].splitlines()]
    assert [(line["level"], line["method"], line["task"]) for line in lines] == [(level, "imp", "rte") for level in range(3)]


def test_train_jsonl_grows_while_a_level_trains(runs, monkeypatch):
    seen, plain = [], Step.__call__

    def call(self, batch, lr):
        seen.append(sum(1 for _ in events(runs.dir("run") / "train.jsonl")))
        return plain(self, batch, lr)

    monkeypatch.setattr(Step, "__call__", call)
    runs("run", "--levels", "1")
    assert seen == [0, 0, 1, 1, 2, 2]  # --log-every 2
    lines = list(events(runs.dir("run") / "train.jsonl"))
    losses = read_checksummed(runs.dir("run") / "level_00" / "metrics.json")["losses"]
    assert [[line["step"], line["loss"]] for line in lines] == losses


def test_losses_go_to_tensorboard_where_it_is_installed(runs, monkeypatch):
    board = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("bert_tickets.runs.train_log.importlib.util.find_spec", lambda name: name)
    runs("run", "--levels", "1")
    written = [(name, step) for name, _, step in (call.args for call in board.SummaryWriter().add_scalar.call_args_list)]
    assert written == [(name, step) for step in (2, 4, 6) for name in ("loss", "lr")]


def test_a_kept_model_does_not_depend_on_the_token_cache(runs, monkeypatch, tmp_path):
    """A tokenizer remembers its last call, and is saved with it."""
    monkeypatch.setattr("bert_tickets.data.token_cache.HF_HOME", tmp_path / "cache")
    assert runs("cold", "--keep-models", "--levels", "1") == runs("warm", "--keep-models", "--levels", "1")


# ---- a finished run ----


def test_a_finished_run_answers_without_torch_and_writes_nothing(runs, capsys):
    runs("run")
    place, table = runs.place / "run", capsys.readouterr().out.partition("level  sparsity  accuracy")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    command = [sys.executable, "-X", "importtime", str(ROOT / "lt_glue.py"), *runs.command]
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "".join(table[1:]))
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before  # not even the lock was taken
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines()}
    assert "bert_tickets" in imported
    assert imported.isdisjoint({"torch", "transformers", "filelock"})


# ---- refusals ----


def test_a_held_directory_is_busy(runs):
    cfg = parse("glue", None, [*runs.command, "--output-dir", str(runs.place)])
    with Run(cfg), pytest.raises(Busy, match=f"in use by process {os.getpid()}"):
        program.run(cfg)
    assert not run_dir(cfg).exists()  # nothing was begun
    with Run(cfg):
        pass


def test_another_format_is_refused(runs):
    runs.killed_at(8, "run")
    run = runs.dir("run")
    write_checksummed(run / "run.json", read_checksummed(run / "run.json") | {"format": 2})
    for levels in (1, 3):  # unfinished and finished
        for level in range(1, levels):
            shutil.copytree(run / "level_00", run / f"level_0{level}")
        with pytest.raises(UserError, match="has format 2, and this version reads format 3: give another --output-dir"):
            runs("run")


def test_another_model_or_other_data_are_not_mixed_in(runs):
    run = runs.killed_at(8, "run")
    about = read_checksummed(run / "run.json")
    for key in about["fingerprint"]:
        write_checksummed(run / "run.json", about | {"fingerprint": about["fingerprint"] | {key: "another"}})
        with pytest.raises(UserError, match=rf"was started with {key} .* would mix two runs"):
            runs("run")


def test_a_directory_of_another_run_is_refused(runs):
    run, other = runs.killed_at(8, "run"), runs.killed_at(8, "other", "--seed", "58")
    shutil.rmtree(run)
    shutil.copytree(other, run)
    with pytest.raises(UserError, match=rf"{run.name}/run\.json belongs to {other.name}"):
        runs("run")


def test_another_environment_is_printed_and_logged(runs, capsys):
    """It may change the bits; but the next node of a cluster may well be another, so it is not refused."""
    run = runs.killed_at(8, "run")
    about = read_checksummed(run / "run.json")
    about["environment"]["threads"] = 99
    write_checksummed(run / "run.json", about)
    runs("run")
    assert "started with 99: results may differ in the last bits" in capsys.readouterr().out
    (resume,) = (event for event in events(run / "log.jsonl") if event["event"] == "resume")
    assert list(resume["changed"]) == ["threads"]


@pytest.mark.parametrize("flag", ["--mask", "--model", "--data-dir", "--init"])
def test_a_mistake_leaves_no_directory(commands, tmp_path, flag):
    with pytest.raises(UserError, match="nowhere"):
        train("lt_glue.py", [*commands["lt_glue.py"], flag, "nowhere", "--output-dir", tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_before_run_json_leaves_no_directory(tmp_path):
    cfg = build({"task": "rte", "output_dir": str(tmp_path)})
    with pytest.raises(UserError, match="a mistake"), Run(cfg):
        raise UserError("a mistake")
    assert list(tmp_path.iterdir()) == []


# ---- levels without a result ----


def test_a_level_that_diverges_is_recorded_and_tried_again(runs, monkeypatch, capsys):
    expected, plain, calls = runs("undisturbed"), Step.__call__, 0

    def breaking(self, batch, lr):  # the loss of this very step is still finite
        nonlocal calls
        calls += 1
        loss = plain(self, batch, lr)
        if calls == 8:
            self.params["bert.pooler.dense.weight"].data[0] = float("nan")
        return loss

    said = r"level 1/2, .*became infinite or NaN by step 2\. results\.jsonl records it; finished levels are intact. A lower learn"
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", breaking)
        with pytest.raises(Diverged, match=said):
            runs("run")
    run = runs.dir("run")
    line = {"run": run.name, "task": "rte", "level": 1, "ended": "a weight became infinite or NaN by step 2"}
    assert failure(run) == line
    first, last = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    assert (first["level"], last) == (0, line)
    assert not (run / "checkpoint.safetensors").exists()
    capsys.readouterr()
    assert runs("run") == expected  # nothing is left of the failure
    assert f"level 1 diverged before ({line['ended']}); it is trained again" in capsys.readouterr().out


def test_predictions_that_are_not_finite_are_no_result(runs, monkeypatch):
    plain = session.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", lambda *arguments: plain(*arguments) * float("inf"))
        with pytest.raises(Diverged, match="predictions on validation are not finite"):
            runs("run", "--levels", "1")
    assert runs("run", "--levels", "1") == runs("undisturbed", "--levels", "1")
