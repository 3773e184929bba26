"""Several processes that train one network: they train what one process trains, and one of them writes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bert_tickets.cli import parse
from bert_tickets.config import run_name
from bert_tickets.data.batches import share_of
from bert_tickets.errors import UserError
from bert_tickets.training.distributed import SINGLE_PROCESS, ProcessGroup, _buckets, joined

ROOT = Path(__file__).parent.parent
PRESETS = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}


def start(processes: int, folder: Path, script: str | Path, *arguments: object) -> subprocess.Popen[str]:
    """The script under torchrun, as a user starts it; or plainly, for one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=240)
    return process.returncode, out, errors


def run_dir(folder: Path, script: str, arguments: list[str]) -> Path:
    return folder / "runs" / run_name(parse(PRESETS[script], None, arguments), PRESETS[script])


def results(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", PRESETS)
def test_two_processes_train_what_one_trains(script, commands, tmp_path):
    """Dropout and all, to rounding: losses, metrics, masks and the last level's weights."""
    arguments = [*commands[script], "--levels", "2", "--batch-size", "7"]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        code, out, errors = finished(start(processes, tmp_path / str(processes), script, *arguments))
        assert code == 0, errors
        assert out.count("in runs/") == 1, "the first process speaks for all"
    one, two = (run_dir(tmp_path / str(processes), script, arguments) for processes in (1, 2))
    assert json.loads((two / "run.json").read_text())["environment"]["processes"] == 2
    for a, b in zip(results(one), results(two), strict=True):
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5)
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-5)
        assert a["mask_sha256"] == b["mask_sha256"]
        assert a["init_sha256"] == b["init_sha256"]
    ours, theirs = (load_file(run / "level_01" / "weights.safetensors") for run in (one, two))
    # AdamW's first steps are nearly the gradient's sign, which rounding may turn where the gradient is nearly zero
    far = sum(int(((ours[name] - theirs[name]).abs() > 1e-5).sum()) for name in ours)
    assert far <= 1e-2 * sum(tensor.numel() for tensor in ours.values())
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours), "two processes were really at work"


ASTRAY = """
import os, runpy, sys
from bert_tickets.training.step import Step
plain = Step.__call__
def call(self, batch, lr):
    loss = plain(self, batch, lr)
    if os.environ["RANK"] == "1":
        self.params["classifier.bias"].data += 1e-7  # a GPU that computes wrongly now and then
    return loss
Step.__call__ = call
sys.path.insert(0, {root!r})
sys.argv[0] = {root!r} + "/lt_glue.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_processes_whose_weights_have_parted_are_no_result(commands, tmp_path):
    script = tmp_path / "astray.py"
    script.write_text(ASTRAY.format(root=str(ROOT)))
    arguments = [*commands["lt_glue.py"], "--levels", "1", "--max-steps", "3"]
    code, _, errors = finished(start(2, tmp_path, script, *arguments))
    assert code != 0
    assert "has another trained weights than process" in errors
    assert not (run_dir(tmp_path, "lt_glue.py", arguments) / "level_00").exists()


def test_stopped_processes_save_once_and_go_on_to_the_same_bits(commands, tmp_path):
    script = "lt_glue.py"
    arguments = [*commands[script], "--levels", "2", "--batch-size", "7", "--rewind", "3", "--max-steps", "60"]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = start(2, tmp_path / "whole", script, *arguments)
    assert finished(whole)[0] == 0

    run = run_dir(tmp_path / "stopped", script, arguments)
    process = start(2, tmp_path / "stopped", script, *arguments)
    for _ in range(600):
        if (run / "rewind.safetensors").exists():  # training is under way
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finished(process)
    assert code != 0
    assert errors.count("the same command goes on from there") == 1
    assert (run / "checkpoint.safetensors").exists()

    code, _, errors = finished(start(2, tmp_path / "stopped", script, *arguments))
    assert code == 0, errors
    undisturbed = run_dir(tmp_path / "whole", script, arguments)
    for file in sorted(path for path in undisturbed.rglob("*") if path.is_file() and path.name not in ("log.jsonl", "lock")):
        assert (run / file.relative_to(undisturbed)).read_bytes() == file.read_bytes(), file
    assert not (run / "checkpoint.safetensors").exists()


def test_a_users_mistake_ends_all_processes_in_a_sentence(commands, tmp_path):
    code, _, errors = finished(start(2, tmp_path, "lt_glue.py", *commands["lt_glue.py"], "--batch-size", "1"))
    assert code != 0
    assert "--batch-size 1 cannot be divided among 2 processes" in errors
    assert "UserError" not in errors
    assert not list(tmp_path.glob("runs/*/level_*"))


def test_a_mistake_in_the_data_is_one_sentence(commands, tmp_path):
    """The first process meets it while the other waits for its turn."""
    code, _, errors = finished(start(2, tmp_path, "lt_glue.py", *commands["lt_glue.py"], "--data-dir", str(tmp_path / "nope")))
    assert code != 0
    assert errors.count("error: no RTE data") == 1
    assert "[rank1]" not in errors


def test_a_finished_run_answers_two_processes_too(commands, tmp_path):
    arguments = [*commands["lt_glue.py"], "--levels", "1", "--max-steps", "2"]
    for _ in range(2):
        code, out, errors = finished(start(2, tmp_path, "lt_glue.py", *arguments))
        assert code == 0, errors
        assert out.count("in runs/") == 1


def test_processes_that_diverge_say_so_once_and_in_the_results(commands, tmp_path):
    arguments = [*commands["lt_glue.py"], "--levels", "1", "--max-steps", "4", "--lr", "1e14"]
    code, _, errors = finished(start(2, tmp_path, "lt_glue.py", *arguments))
    assert code != 0
    assert errors.count("error: level 0/0") == 1, errors
    (line,) = results(run_dir(tmp_path, "lt_glue.py", arguments))
    assert line["level"] == 0
    assert re.fullmatch(
        r"(the loss became nan|a weight became infinite or NaN) by step \d|the network's outputs on .*", line["ended"]
    )


def test_a_gpu_by_number_is_none_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="under torchrun each process has a GPU of its own"), joined("cuda:1"):
        pass


# ---- shares ----

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(np.array)


@given(LENGTHS, st.integers(1, 9))
def test_every_example_is_in_one_share(lengths, world):
    shares = [share_of(lengths, rank, world) for rank in range(world)]
    assert np.concatenate([np.arange(len(lengths))[share.examples] for share in shares]).tolist() == list(range(len(lengths)))
    tokens = np.arange(lengths.sum())
    assert np.concatenate([tokens[share.tokens] for share in shares]).tolist() == tokens.tolist()


@given(LENGTHS, st.integers(1, 9))
def test_shares_have_about_as_many_tokens(lengths, world):
    sizes = [int(lengths[share_of(lengths, rank, world).examples].sum()) for rank in range(world)]
    assert max(sizes) <= lengths.sum() / world + lengths.max()


# ---- one process ----


def test_alone_there_is_nothing_to_agree_on():
    tensor = torch.arange(3.0)
    SINGLE_PROCESS.sum([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert SINGLE_PROCESS.gather("a") == ["a"]
    assert SINGLE_PROCESS.agree("a") == SINGLE_PROCESS.first(lambda: "a") == SINGLE_PROCESS.main_first(lambda: "a") == "a"
    assert SINGLE_PROCESS.any(True, False) == (True, False)
    SINGLE_PROCESS.check_same({"a": 1})


def test_joined_is_one_process_without_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for world in ("1", "8"):  # some clusters set it for every program
        monkeypatch.setenv("WORLD_SIZE", world)
        with joined("cpu") as group:
            assert group is SINGLE_PROCESS


@pytest.mark.parametrize("value", ["abc", "-1", "1.5"])
def test_variables_that_are_no_numbers_are_named(monkeypatch, value):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match="WORLD_SIZE is"), joined("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", value)
    with pytest.raises(UserError, match="LOCAL_RANK is"), joined("cpu"):
        pass


def test_variables_that_another_program_left_do_not_make_a_run_wait(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(UserError, match="MASTER_PORT is not set; to run one process alone, unset WORLD_SIZE"), joined("cpu"):
        pass
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setattr("bert_tickets.training.distributed.MEETING", timedelta(seconds=1))
    with pytest.raises(UserError, match="2 processes that WORLD_SIZE tells of did not meet"), joined("cpu"):
        pass
    assert "waiting for 2 processes at 127.0.0.1" in capsys.readouterr().out
    monkeypatch.setenv("MASTER_PORT", "no port")
    with pytest.raises(UserError, match="did not meet"), joined("cpu"):
        pass


def test_what_differs_between_processes_is_named(monkeypatch):
    group = ProcessGroup(0, 2)
    monkeypatch.setattr(group, "gather", lambda value: [value, ("other", {"train": 2, "model": 1})])
    with pytest.raises(UserError, match="process 1 on other has another train than process 0"):
        group.check_same({"model": 1, "train": 1})


def test_buckets_hold_every_tensor_once_and_no_more_than_they_should(monkeypatch):
    monkeypatch.setattr("bert_tickets.training.distributed.BUCKET", 10)
    tensors = [torch.empty(size) for size in (3, 8, 2, 30, 1, 9, 1)]
    parts = list(_buckets(tensors))
    assert all(a is b for a, b in zip((t for part in parts for t in part), tensors, strict=True))
    assert [[t.numel() for t in part] for part in parts] == [[3], [8, 2], [30], [1, 9], [1]]
