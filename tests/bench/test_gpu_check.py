"""The check of a GPU machine: whole on a CPU, its checks of steps on a fake GPU, and going on after a failure."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from captures import capture_stand_in
from conftest import ROOT, needs_fake_cuda
from fake_cuda import one_gpu

from bert_tickets.bench import checks, step_checks, tiny_bert
from bert_tickets.modeling.loading import load_bert
from bert_tickets.tasks.glue import Glue
from bert_tickets.training.cuda_graphs import Recorder


def test_on_a_cpu_it_passes_the_checks_that_need_no_gpu(tmp_path):
    """Without `run`, which starts four processes, and `speed`: a minute on a busy machine."""
    out, only = tmp_path / "out", [name for name in gpu_check.CHECKS if name not in ("run", "speed")]
    command = ["bash", ROOT / "scripts" / "gpu_check.sh", "--device", "cpu", "--quick", "--output", out, "--only", *only]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "gpu_check.json").read_text())
    results = {line["check"]: line["result"] for line in found["checks"]}
    assert list(results) == only
    assert {name for name, result in results.items() if result == "pass"} == {"steps", "tasks"}
    assert set(results.values()) == {"pass", "no GPU"}
    assert "steps      pass" in done.stdout


# ---- the checks ----


@pytest.fixture
def setting(bert_dir, tmp_path):
    """A setting with the tests' own network, and the numbers of a CPU."""

    class Small(checks.Setting):
        model = bert_dir
        count = staticmethod(lambda thorough, quick, cpu: cpu)

    return Small(tmp_path, "cuda:0", True)


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU, with a stand-in for captures and a limit on memory: with less than all of it, 20 examples fit."""
    limits, loss = [1.0], Glue.loss

    def limited(self, net, batch):
        if limits[-1] < 1 and len(batch.lengths) > 20:
            raise torch.OutOfMemoryError("no room")
        return loss(self, net, batch)

    monkeypatch.setattr(Glue, "loss", limited)
    monkeypatch.setattr(Recorder, "record", lambda self, run: capture_stand_in(run, "cuda"))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**32))
    with one_gpu():
        yield limits


@needs_fake_cuda
@pytest.mark.parametrize("name", ["equal_steps", "graphs", "masks", "gradients", "memory"])
def test_the_checks_of_steps_pass_on_a_fake_gpu(setting, gpu, name):
    assert getattr(step_checks, name)(setting)["summary"]
    assert gpu == ([1.0, 0.25, 1.0] if name == "memory" else [1.0])


FAULTS = {
    "a loss is NaN": ("equal_steps", lambda loss: loss * float("nan"), "a loss is not finite"),
    "a loss is random": (
        "equal_steps",
        lambda loss: loss * torch.rand(1, generator=torch.Generator().manual_seed(torch.seed())).item(),
        "other losses",
    ),
    "a step synchronizes": ("equal_steps", lambda loss: loss * float(loss.detach() > 0), "synchronizing"),
    "CUDA computes something else": (
        "gradients",
        lambda loss: loss * (1.0 + 0.1 * (loss.device.type == "cuda")),
        "gradients differ",
    ),
}


@needs_fake_cuda
@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_fails_on_a_fault(setting, gpu, monkeypatch, fault):
    (name, change, message), loss = FAULTS[fault], Glue.loss
    monkeypatch.setattr(Glue, "loss", lambda self, net, batch: change(loss(self, net, batch)))
    with pytest.raises((AssertionError, RuntimeError), match=message):
        getattr(step_checks, name)(setting)


@needs_fake_cuda
def test_the_check_of_memory_fails_if_the_limit_has_no_effect(setting, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction: None)
    with pytest.raises(AssertionError, match="the whole batch fitted"):
        step_checks.memory(setting)


def test_files_that_differ_after_a_kill_are_named(setting, monkeypatch, tmp_path):
    """With stand-ins for the runs: two folders of files."""
    weights = iter(["a", "b"])

    def call(command, folder):
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        (folder / "runs" / "weights").write_text(next(weights))
        (folder / "runs" / "log.jsonl").write_text(str(folder))
        return "level 1/2"

    monkeypatch.setattr(checks, "call", call)
    monkeypatch.setattr(checks, "kill_in_level_1", lambda command, folder: None)
    type(setting).data = tmp_path
    with pytest.raises(AssertionError, match=r"files differ after the kill: runs/weights$"):
        checks.killed_run(setting)


@pytest.mark.parametrize(("code", "said"), [(0, "5 passed in 3 s"), (1, "5 passed, 2 errors in 3 s")])
def test_the_gpu_tests_pass_only_without_errors(setting, monkeypatch, code, said):
    calls = []
    done = SimpleNamespace(returncode=code, stdout=f"..\n{said}\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command) or done)
    if code:
        with pytest.raises(AssertionError, match="2 errors"):
            checks.gpu_tests(setting)
    else:
        assert checks.gpu_tests(setting) == {"summary": said}
    assert any(word.endswith("test_cuda_path.py") for word in calls[0])


# ---- going on after a failure ----

STAND_IN = """
import json, os, sys, time
for name in sys.argv[sys.argv.index("--child") + 1:]:
    if name == "masks":
        os._exit(9)
    if name == "speed":
        time.sleep(60)
    result = "FAIL" if name == "steps" else "pass"
    print(json.dumps({"check": name, "result": result, "seconds": 1.0, "summary": "broken"}), flush=True)
    if result == "FAIL":
        break
"""


@pytest.fixture
def run_check(monkeypatch, tmp_path):
    """Run gpu_check.main with a stand-in for the process of the checks: its exit code, and its lines by check."""

    def run(*words):
        (tmp_path / "stand_in.py").write_text(STAND_IN)
        monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "stand_in.py"))
        monkeypatch.setattr("sys.argv", ["gpu_check.py", "--device", "cpu", "--output", str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as end:
            gpu_check.main(gpu_check.parse())
        found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["checks"]
        return end.value.code, {line["check"]: line for line in found}

    return run


def test_it_goes_on_after_a_check_that_fails_and_one_whose_process_dies(run_check):
    code, found = run_check("--only", "run", "steps", "masks", "gradients", "memory")
    results = {name: line["result"] for name, line in found.items()}
    assert results == {"run": "pass", "steps": "FAIL", "masks": "FAIL", "gradients": "pass", "memory": "pass"}
    assert code == 1
    assert found["masks"]["summary"] == "its process ended with 9"


def test_a_check_that_takes_too_long_is_killed_and_the_rest_is_left_out(run_check):
    code, found = run_check("--minutes", "0.02", "--only", "run", "speed", "masks")
    assert code == 1
    assert [found[name]["result"] for name in ("run", "speed", "masks")] == ["pass", "no time", "no time"]
    assert found["speed"]["summary"] == "ended at the limit"


def test_a_check_that_raises_has_failed_and_one_that_cannot_run_is_skipped(setting, monkeypatch, tmp_path):
    def fail(setting):
        raise RuntimeError("shapes differ\nand more")

    monkeypatch.setattr(step_checks, "equal_steps", fail)
    failed = gpu_check.run_check("steps", setting)
    assert failed == {"result": "FAIL", "summary": "RuntimeError: shapes differ"}
    assert gpu_check.run_check("masks", checks.Setting(tmp_path, "cpu", True)) == {"result": "no GPU"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "abacus"], "--only abacus: the checks are run"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--device", "cpu", "--output", "."], "has other files in it"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").write_text("kept")
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--output", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit) as end:
        gpu_check.run_command(gpu_check.main, gpu_check.parse())
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_generated_checkpoints_and_data_can_be_trained_on(tmp_path):
    tiny_bert.save_bert(tmp_path / "bert", **checks.SMALL)
    net, tokenizer = load_bert(str(tmp_path / "bert"), "classifier", "pretrained", 0)
    assert net.config.vocab_size == len(tokenizer) == checks.SMALL["vocab_size"]
    tiny_bert.save_mnli(tmp_path, 300, 9)
    cfg = SimpleNamespace(data_dir=str(tmp_path), limit_train=None, limit_eval=None, max_length=128)
    train, evals = Glue("mnli").load_data(cfg, tokenizer, torch.device("cpu"))
    assert (len(train), [len(store) for store in evals.values()]) == (300, [9, 9])
    assert 36 < train.lengths.mean() < 45  # as MNLI's own
    assert set(train.labels.tolist()) == {0, 1, 2}
