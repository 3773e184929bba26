"""Several processes train the network that one process trains, and one of them writes."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from processes import KINDS, free_port, run

from bert_tickets.cli import parse
from bert_tickets.config import run_name
from bert_tickets.data.batches import shard_of
from bert_tickets.errors import UserError
from bert_tickets.files import read_tensors
from bert_tickets.runs.directory import read_run, results
from bert_tickets.training.distributed import SINGLE_PROCESS, ProcessGroup, _buckets, joined


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
    whole, logs = directory(tmp_path / "whole", script, arguments), ("log.jsonl", "train.jsonl", "lock", "run.json")
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file() and file.name not in logs]
    assert len(files) > 6
    for file in files:
        assert (path / file).read_bytes() == (whole / file).read_bytes(), file
    assert not (path / "checkpoint.safetensors").exists()


def test_processes_started_by_torchrun_train_what_forked_ones_train(commands, tmp_path):
    script = "lt_glue.py"
    arguments = [*commands[script], "--levels", 1, "--max-steps", 2]
    assert run(2, tmp_path / "forked", script, *arguments)[0] == [0, 0]
    (tmp_path / "started").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, arguments)], cwd=tmp_path / "started", env=environment, check=True, timeout=240)
    results = [directory(tmp_path / name, script, arguments) / "results.jsonl" for name in ("forked", "started")]
    assert results[0].read_bytes() == results[1].read_bytes()


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


@pytest.mark.parametrize(
    ("world_size", "local_rank", "device", "message"),
    [
        ("abc", "0", "cpu", "WORLD_SIZE is"),
        ("2", "-1", "cpu", "LOCAL_RANK is"),
        ("2", "0", "cuda:1", "under torchrun each process has its own GPU"),
    ],
)
def test_processes_that_cannot_be_joined_are_a_users_error(monkeypatch, world_size, local_rank, device, message):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(UserError, match=message), joined(device):
        pass


def test_variables_of_another_program_do_not_make_a_run_wait(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(UserError, match="MASTER_PORT is not set; to run one process alone, unset WORLD_SIZE"), joined("cpu"):
        pass
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr("bert_tickets.training.distributed.START_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match="cannot connect 2 processes"), joined("cpu"):
        pass
    assert "waiting for 2 processes at 127.0.0.1" in capsys.readouterr().out


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


def test_with_one_process_every_operation_is_the_identity():
    tensor, group = torch.arange(3.0), SINGLE_PROCESS
    group.all_reduce([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert group.gather("a") == ["a"]
    assert group.broadcast("a") == group.on_main(lambda: "a") == group.main_first(lambda: "a") == "a"
    assert group.broadcast_tensors(lambda: ({"w": tensor}, "a")) == ({"w": tensor}, "a")
    assert group.any(True, False) == (True, False)
    group.check_same({"a": 1})


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for world_size in ("1", "8"):  # some clusters set it for every program
        monkeypatch.setenv("WORLD_SIZE", world_size)
        with joined("cpu") as group:
            assert group is SINGLE_PROCESS


def test_facts_that_differ_between_processes_are_named(monkeypatch):
    group = ProcessGroup(0, 2)
    monkeypatch.setattr(group, "gather", lambda value: [value, ("other", {"train": 2, "model": 1})])
    with pytest.raises(UserError, match="process 1 on other has another train than process 0"):
        group.check_same({"model": 1, "train": 1})


def test_buckets_have_every_tensor_once_within_their_size(monkeypatch):
    monkeypatch.setattr("bert_tickets.training.distributed.BUCKET", 10)
    tensors = [torch.empty(size) for size in (3, 8, 2, 30, 1, 9, 1)]
    parts = list(_buckets(tensors))
    assert all(a is b for a, b in zip((t for part in parts for t in part), tensors, strict=True))
    assert [[t.numel() for t in part] for part in parts] == [[3], [8, 2], [30], [1, 9], [1]]
