"""Several processes train the network that one process trains, and one of them writes."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from crash_harness import STEP, Fault, Job
from hypothesis import given
from hypothesis import strategies as st
from trainrun import KINDS, contents

from bert_tickets.data.batches import shard_of
from bert_tickets.errors import UserError
from bert_tickets.files import read_tensors
from bert_tickets.runs.directory import read_run, results
from bert_tickets.training.distributed import joined


def directory(folder: Path) -> Path:
    """The run directory of a command that ran in a folder."""
    (found,) = (folder / "runs").iterdir()
    return found


@pytest.fixture
def run(harness):
    """Run a training script in several processes in a folder; returns their exit codes, and all that they print."""

    def go(
        world_size: int, folder: Path, script: str, *words: object, fault: Fault | None = None, setup: str = ""
    ) -> tuple[list[int], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs = []
        for rank in range(world_size):
            variables = {name: str(value) for name, value in {**together, "RANK": rank, "LOCAL_RANK": rank}.items()}
            own = fault if rank == 1 else None
            jobs.append(Job(folder, script, words, own, variables if world_size > 1 else {}, setup))
        outcomes = harness.run_together(jobs)
        return [outcome.code for outcome in outcomes], "".join(outcome.output for outcome in outcomes)

    return go


# ---- training ----


@pytest.mark.parametrize("script", KINDS)
def test_two_processes_train_what_one_trains_to_rounding(run, script, commands, calm_bert_dir, tmp_path):
    """Without dropout, which each process draws for itself; losses, metrics, masks and weights."""
    arguments = [*commands[script], "--levels", 2, "--batch-size", 7, "--model", calm_bert_dir]
    for processes in (1, 2):
        codes, out = run(processes, tmp_path / str(processes), script, *arguments)
        assert codes == [0] * processes, out
        assert out.count("in runs/") == 1, "only the main process prints"
    one, two = (directory(tmp_path / str(processes)) for processes in (1, 2))
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


@pytest.mark.parametrize("words", ["--draw-at 5", "--draw-when stable --draw-every 1 --record-epochs 2"])
def test_two_processes_search_and_draw_what_one_does(run, commands, calm_bert_dir, tmp_path, words):
    """The main one has the record. In the first update a coefficient goes by the sign of its gradient, which is the same."""
    script = "lt_glue.py"
    arguments = [*commands[script], "--batch-size", 7, "--model", calm_bert_dir, "--method", "early-bird", *words.split()]
    for processes in (1, 2):
        codes, out = run(processes, tmp_path / str(processes), script, *arguments, "--search-lr", "1e-4", "--save-steps", 2)
        assert codes == [0] * processes, out
    one, two = (directory(tmp_path / str(processes)) for processes in (1, 2))
    for a, b in zip(results(one), results(two), strict=True):
        assert a["steps"] == b["steps"] > 0
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5)
        assert (a["flops"], a.get("draw")) == (b["flops"], b.get("draw"))
        assert a["sizes"] == b["sizes"]
    ours, theirs = (np.load(path / "level_00" / "coefficients.npy") for path in (one, two))
    assert ours.shape == theirs.shape
    assert (abs(ours - theirs) > 1e-6).mean() < 0.05
    trained = [read_tensors(path / "level_01" / "weights.safetensors") for path in (one, two)]
    assert any(not torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items()), "the batches were split"

    killed = tmp_path / "killed"
    codes, out = run(2, killed, script, *arguments, "--search-lr", "1e-4", "--save-steps", 2, fault=Fault("SIGTERM", STEP, 4))
    assert all(codes)
    assert (directory(killed) / "coefficients.part").exists()
    codes, out = run(2, killed, script, *arguments, "--search-lr", "1e-4", "--save-steps", 2)
    assert codes == [0, 0], out
    assert contents(directory(killed)) == contents(two)


DIFFERENT_WEIGHTS = """
import os
from bert_tickets.training.step import Step
plain = Step.__call__
def call(self, batch, lr):
    loss = plain(self, batch, lr)
    if os.environ["RANK"] == "1":
        next(iter(self.params.values())).data += 1e-7  # as on a faulty GPU
    return loss
Step.__call__ = call
"""


MASK_TRAINING = "--method mask-training --sparsity 0.5 --objective mlm --refresh 3 --save-masks 3"


@pytest.mark.parametrize(("script", "words"), [("lt_glue.py", "--levels 1"), ("lt_pretrain.py", MASK_TRAINING)])
def test_processes_with_different_weights_have_no_result(run, commands, tmp_path, script, words):
    """Or with different scores, under which the network is frozen."""
    codes, out = run(2, tmp_path, script, *commands[script], *words.split(), "--max-steps", 3, setup=DIFFERENT_WEIGHTS)
    assert all(codes)
    assert "has another trained weights than process" in out
    assert not (directory(tmp_path) / "level_00").exists()


def test_processes_that_are_stopped_save_once_and_continue_with_the_same_bits(run, commands, tmp_path):
    """One of them receives the signal, as from a cluster."""
    script, stopped = "lt_glue.py", tmp_path / "stopped"
    arguments = [*commands[script], "--levels", 2, "--batch-size", 7, "--rewind", 3, "--eval-steps", 2]
    codes, out = run(2, tmp_path / "whole", script, *arguments)
    assert codes == [0, 0], out
    codes, out = run(2, stopped, script, *arguments, fault=Fault("SIGTERM", STEP, 8))
    assert all(codes)
    assert out.count("the same command resumes") == 1
    assert (directory(stopped) / "checkpoint.safetensors").exists()

    codes, out = run(2, stopped, script, *arguments)
    assert codes == [0, 0], out
    whole, resumed = (contents(directory(tmp_path / name)) for name in ("whole", "stopped"))
    assert len(whole) > 6
    assert whole == resumed


def test_torchrun_starts_processes_that_train_together(commands, tmp_path):
    arguments = [*commands["lt_glue.py"], "--levels", 1, "--max-steps", 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "lt_glue.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *map(str, arguments)], cwd=tmp_path, env=environment, check=True, timeout=240)
    run = directory(tmp_path)
    assert read_run(run)["environment"]["processes"] == 2
    assert len(results(run)) == 1


# ---- errors ----


def test_a_users_error_of_all_processes_or_of_the_main_one_is_reported_once(run, commands, tmp_path):
    for arguments, message in (
        (["--batch-size", 1], "--batch-size 1 cannot be divided into 2 parts"),
        (["--data-dir", tmp_path / "nope"], "no RTE data"),
    ):
        codes, out = run(2, tmp_path, "lt_glue.py", *commands["lt_glue.py"], *arguments)
        assert codes == [2, 2], out
        assert out.count(f"error: {message}") in (1, 2)
        assert "Traceback" not in out
        assert not list(tmp_path.glob("runs/*/level_*"))


def test_a_gpu_by_number_is_refused_under_torchrun(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda:1: under torchrun each process has its own GPU"), joined("cuda:1"):
        pass


def test_a_process_whose_torchrun_ended_before_ends_too(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (names | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("bert_tickets.training.distributed.START", timedelta(seconds=1))
    with pytest.raises(UserError, match="cannot reach torchrun; has it ended"), joined("cpu"):
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


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it for every program
    with joined("cpu") as group:
        assert (group.rank, group.world_size) == (0, 1)
