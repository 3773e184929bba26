"""Several processes train the network that one process trains, and one of them writes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from processes import KINDS, run
from trainrun import contents

from bert_tickets.cli import parse
from bert_tickets.config import run_name
from bert_tickets.data.batches import shard_of
from bert_tickets.errors import UserError
from bert_tickets.files import read_tensors
from bert_tickets.runs.directory import read_run, results
from bert_tickets.training.distributed import joined


def directory(folder: Path, script: str, arguments: list) -> Path:
    """Return the run directory of a command that ran in a folder."""
    return folder / "runs" / run_name(parse(KINDS[script], None, list(map(str, arguments))))


# ---- training ----


@pytest.mark.parametrize("script", KINDS)
def test_two_processes_train_what_one_trains_to_rounding(script, commands, calm_bert_dir, tmp_path):
    """Without dropout, which each process draws for itself; losses, metrics, masks and weights."""
    arguments = [*commands[script], "--levels", 2, "--batch-size", 7, "--model", calm_bert_dir]
    for processes in (1, 2):
        codes, out, errors = run(processes, tmp_path / str(processes), script, *arguments)
        assert codes == [0] * processes, errors
        assert out.count("in runs/") == 1, "only the main process prints"
    one, two = (directory(tmp_path / str(processes), script, arguments) for processes in (1, 2))
    assert read_run(two)["environment"]["processes"] == 2
    for a, b in zip(results(one), results(two), strict=True):
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5)
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-5)
        assert a["mask_sha256"] == b["mask_sha256"]
        assert a["init_sha256"] == b["init_sha256"]
    ours, theirs = (read_tensors(path / "level_01" / "weights.safetensors") for path in (one, two))
    # the first steps of AdamW are nearly the gradient's sign, which rounding may change where it is nearly zero
    far = sum(int(((ours[name] - theirs[name]).abs() > 1e-5).sum()) for name in ours)
    assert far <= 1e-2 * sum(tensor.numel() for tensor in ours.values())
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours), "the batches were split"


DIFFERENT_WEIGHTS = """
import os
from bert_tickets.training.step import Step
plain = Step.__call__
def call(self, batch, lr):
    loss = plain(self, batch, lr)
    if os.environ["RANK"] == "1":
        self.params["classifier.bias"].data += 1e-7  # as on a faulty GPU
    return loss
Step.__call__ = call
"""


def test_processes_with_different_weights_have_no_result(commands, tmp_path):
    arguments = [*commands["lt_glue.py"], "--levels", 1, "--max-steps", 3]
    codes, _, errors = run(2, tmp_path, "lt_glue.py", *arguments, setup=DIFFERENT_WEIGHTS)
    assert all(codes)
    assert "has another trained weights than process" in errors
    assert not (directory(tmp_path, "lt_glue.py", arguments) / "level_00").exists()


STOPPED_IN_STEP_8 = """
import os, signal
from bert_tickets.training.step import Step
plain, calls = Step.__call__, []
def call(self, batch, lr):
    calls.append(1)
    if len(calls) == 8 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun or a cluster does
    return plain(self, batch, lr)
Step.__call__ = call
"""


def test_processes_that_are_stopped_save_once_and_continue_with_the_same_bits(commands, tmp_path):
    script, stopped = "lt_glue.py", tmp_path / "stopped"
    arguments = [*commands[script], "--levels", 2, "--batch-size", 7, "--rewind", 3]
    codes, _, errors = run(2, tmp_path / "whole", script, *arguments)
    assert codes == [0, 0], errors
    path = directory(stopped, script, arguments)
    codes, _, errors = run(2, stopped, script, *arguments, setup=STOPPED_IN_STEP_8)
    assert all(codes)
    assert errors.count("the same command resumes") == 1
    assert (path / "checkpoint.safetensors").exists()

    codes, _, errors = run(2, stopped, script, *arguments)
    assert codes == [0, 0], errors
    whole, resumed = (contents(directory(tmp_path / name, script, arguments)) for name in ("whole", "stopped"))
    assert len(whole) > 6
    assert whole | {"run.json": b""} == resumed | {"run.json": b""}


def test_torchrun_starts_processes_that_train_together(commands, tmp_path):
    arguments = [*commands["lt_glue.py"], "--levels", 1, "--max-steps", 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "lt_glue.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, arguments)], cwd=tmp_path, env=environment, check=True, timeout=240)
    run = directory(tmp_path, "lt_glue.py", arguments)
    assert read_run(run)["environment"]["processes"] == 2
    assert len(results(run)) == 1


# ---- errors ----


def test_a_users_error_of_all_processes_or_of_the_main_one_is_reported_once(commands, tmp_path):
    for arguments, message in (
        (["--batch-size", 1], "--batch-size 1 cannot be divided into 2 parts"),
        (["--data-dir", tmp_path / "nope"], "no RTE data"),
    ):
        codes, _, errors = run(2, tmp_path, "lt_glue.py", *commands["lt_glue.py"], *arguments)
        assert codes == [2, 2], errors
        assert errors.count(f"error: {message}") in (1, 2)
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("runs/*/level_*"))


def test_a_gpu_by_number_is_refused_under_torchrun(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda:1: under torchrun each process has its own GPU"), joined("cuda:1"):
        pass


# ---- shards ----

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(np.array)


@given(LENGTHS, st.integers(1, 9))
def test_every_example_is_in_one_shard_and_shards_have_similar_numbers_of_tokens(lengths, count):
    shards = [shard_of(lengths, number, count) for number in range(count)]
    assert [i for shard in shards for i in range(shard.first, shard.last)] == list(range(len(lengths)))
    tokens = np.arange(lengths.sum())
    assert np.concatenate([tokens[shard.tokens] for shard in shards]).tolist() == tokens.tolist()
    assert max(len(tokens[shard.tokens]) for shard in shards) <= lengths.sum() / count + lengths.max()


# ---- one process ----


def test_without_torchrun_there_is_one_process_whose_operations_are_the_identity(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it for every program
    tensor = torch.arange(3.0)
    with joined("cpu") as group:
        group.all_reduce([tensor])
        group.check_same({"a": 1})
        assert group.gather("a") == ["a"]
        assert group.on_main(lambda: "a") == group.main_first(lambda: "a") == "a"
        assert group.broadcast_tensors(lambda: ({"w": tensor}, "a")) == ({"w": tensor}, "a")
        assert group.any(True, False) == (True, False)
    assert tensor.tolist() == [0, 1, 2]
