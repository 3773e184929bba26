"""Where the device's memory runs out a batch is divided, and the step stays the same; and where fp16 runs out it is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lt_glue
import lt_pretrain
import lt_squad
from bert_tickets.cli import parse
from bert_tickets.data.batches import Batches
from bert_tickets.errors import UserError
from bert_tickets.modeling.packing import Batch
from bert_tickets.runs.directory import results, run_dir
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm
from bert_tickets.tasks.squad import Squad
from bert_tickets.training.device import out_of_memory
from bert_tickets.training.step import Step

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "lt_glue.py": (lt_glue, "glue", Glue),
    "lt_squad.py": (lt_squad, "squad", Squad),
    "lt_pretrain.py": (lt_pretrain, "mlm", Mlm),
}


def small_device(task: type, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has room for the gradients of `most` examples at a time."""
    plain = task.loss

    def loss(self: object, net: object, batch: Batch) -> torch.Tensor:
        if len(batch.lengths) > most:
            raise torch.OutOfMemoryError("no room")
        return plain(self, net, batch)

    monkeypatch.setattr(task, "loss", loss)


@pytest.fixture
def go(commands, tmp_path, monkeypatch):
    """Run a script in a folder; its results."""

    def run(script: str, folder: str, *extra: str) -> list[dict]:
        module, preset, _ = SCRIPTS[script]
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        cfg = parse(preset, None, [*commands[script], "--levels", "2", *extra])
        module.main(cfg)
        return results(run_dir(cfg, preset))

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_batch_that_does_not_fit_is_divided_and_the_run_is_the_same_to_rounding(script, go, monkeypatch, capsys):
    """Dropout and all."""
    whole = go(script, "large")
    small_device(SCRIPTS[script][2], 3, monkeypatch)
    divided = go(script, "small")
    assert "out of memory in step 0; each process takes its batches in 2 parts from here on" in capsys.readouterr().out
    for a, b in zip(whole, divided, strict=True):
        assert a["batch_parts"] == 1
        assert b["batch_parts"] >= 4
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5)
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-4)
        assert a["mask_sha256"] == b["mask_sha256"]


def test_a_part_that_does_not_fit_leaves_nothing_of_those_that_did(go, monkeypatch):
    """Of two parts the first has its gradients already when the second runs out of memory."""
    whole, plain, calls = go("lt_glue.py", "large"), Glue.loss, 0

    def loss(self, net, batch):
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise torch.OutOfMemoryError("no room")
        return plain(self, net, batch)

    monkeypatch.setattr(Glue, "loss", loss)
    for a, b in zip(whole, go("lt_glue.py", "small"), strict=True):
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5)
        assert a["mask_sha256"] == b["mask_sha256"]


def test_a_run_that_divides_and_is_killed_ends_with_the_same_bits(go, monkeypatch, tmp_path):
    small_device(Glue, 3, monkeypatch)
    expected = go("lt_glue.py", "undisturbed", "--save-steps", "2")
    calls, plain = 0, Step.__call__

    def dying(self, batch, lr):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return plain(self, batch, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            go("lt_glue.py", "killed", "--save-steps", "2")
    assert go("lt_glue.py", "killed", "--save-steps", "2") == expected
    (log,) = (tmp_path / "killed").rglob("log.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    told = [event["level"] for event in events if event["event"] == "out of memory"]
    assert told == [0, 0, 0, 1, 1, 1]  # 2 parts, 4, 8: level 0 goes on with 8
    assert [event["parts"] for event in events if event["event"] == "out of memory"][:3] == [2, 4, 8]


def test_one_example_that_does_not_fit_ends_the_run_in_words(go, monkeypatch):
    small_device(Glue, 0, monkeypatch)
    with pytest.raises(UserError, match="out of memory in step 0, with one example at a time: no room"):
        go("lt_glue.py", "none")


def test_an_evaluation_that_does_not_fit_is_taken_in_smaller_packs(go, monkeypatch, capsys):
    whole = go("lt_squad.py", "large")
    plain = Squad.outputs

    def predict(self, net, batch):
        if not net.training and len(batch.lengths) > 2:
            raise torch.OutOfMemoryError("no room")
        return plain(self, net, batch)

    monkeypatch.setattr(Squad, "outputs", outputs)
    assert [line["metrics"] for line in go("lt_squad.py", "small")] == [line["metrics"] for line in whole]
    assert "out of memory in the evaluation: again, in packs of" in capsys.readouterr().out


def test_an_allocation_that_fails_on_a_cpu_is_out_of_memory_too():
    for allocate in (lambda: torch.empty(2**50), lambda: bytearray(2**60)):
        with pytest.raises(torch.OutOfMemoryError), out_of_memory():
            allocate()
    with pytest.raises(RuntimeError, match="shape") as other, out_of_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(other.value, torch.OutOfMemoryError)


def test_a_batch_that_a_cpu_cannot_hold_is_divided(go, monkeypatch, capsys):
    """The allocator's own words, where `small_device` has a GPU's."""
    plain = Glue.loss

    def loss(self, net, batch):
        return plain(self, net, batch) + (torch.empty(2**50).sum() if len(batch.lengths) > 3 else 0)

    whole = go("lt_glue.py", "large")
    monkeypatch.setattr(Glue, "loss", loss)
    assert [line["mask_sha256"] for line in go("lt_glue.py", "small")] == [line["mask_sha256"] for line in whole]
    assert "can't allocate" not in capsys.readouterr().out


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and knows glibc")
@pytest.mark.parametrize("limited", [False, True])
def test_freed_memory_is_kept_unless_memory_is_limited(limited):
    """A gigabyte in 64 pieces, of which all but one are freed again, under a limit of 32."""
    script = f"""
import resource
from pathlib import Path
from bert_tickets.cli import keep_freed_memory
if {limited}:
    resource.setrlimit(resource.RLIMIT_AS, (2**35, resource.RLIM_INFINITY))
keep_freed_memory()
pages = lambda: int(Path("/proc/self/statm").read_text().split()[0])
before = pages()
for size in (2**20, 2**24):
    pieces = [bytes(size) for _ in range(64)]
    last = pieces.pop()  # above the others, if they are in the heap
    del pieces
print((pages() - before) * resource.getpagesize())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=60)
    kept = int(ran.stdout)
    assert kept < 2**26 if limited else kept > 2**29


def test_parts_hold_every_example_once(bert_dir, glue_dir):
    cfg = parse("glue", None, ["--task", "rte", "--model", str(bert_dir), "--data-dir", str(glue_dir)])
    task = Glue("rte")
    _, tokenizer = task.load_net(cfg)
    store, _ = task.load_data(cfg, tokenizer, torch.device("cpu"))
    batches = Batches(store, 16, 57)
    whole = batches[1]
    for count in (2, 3, 16, 40):
        parts = [part for part in batches.parts(1, count) if part.weight]
        assert torch.equal(torch.cat([part.input_ids for part in parts], 1), whole.input_ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert sum(part.weight for part in parts) == pytest.approx(1)


def test_memory_that_ends_in_the_update_ends_the_run(go, monkeypatch, capsys):
    """Smaller parts would not help there, and some weights may have moved already."""

    def short(*_, **__):
        raise torch.OutOfMemoryError("no room for moments")

    monkeypatch.setattr(torch.optim.AdamW, "step", short)
    with pytest.raises(UserError, match="out of memory for the gradients' sum or AdamW's moments: no room for moments"):
        go("lt_glue.py", "update")
    assert "parts from here on" not in capsys.readouterr().out


# ---- fp16 ----


def test_fp16_that_overflows_at_every_scale_ends_the_run_in_words(go, monkeypatch):
    """The losses stay finite; the gradients do not."""

    class Huge(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    plain = Glue.loss
    monkeypatch.setattr(Glue, "loss", lambda self, net, batch: Huge.apply(plain(self, net, batch)))
    with pytest.raises(UserError, match="fp16 gradients overflowed at every scale by step"):
        go("lt_glue.py", "overflow", "--precision", "fp16", "--max-steps", "40")


def test_a_run_whose_fp16_overflowed_and_that_is_killed_ends_with_the_same_bits(go, monkeypatch, tmp_path):
    """The scale that the overflow has halved is the checkpoint's, and so is the count of steps since."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf") if grad > 2.0**15 else grad

    plain, scales = Glue.loss, []
    monkeypatch.setattr(Glue, "loss", lambda self, net, batch: Once.apply(plain(self, net, batch)))

    def watching(self, batch, lr):
        scales.append(self.loss_scale.factor.item())
        if len(scales) == 5:
            raise KeyboardInterrupt
        return take(self, batch, lr)

    extra, take = ("--precision", "fp16", "--save-steps", "2", "--levels", "1"), Step.__call__
    expected = go("lt_glue.py", "undisturbed", *extra)
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", watching)
        with pytest.raises(KeyboardInterrupt):
            go("lt_glue.py", "killed", *extra)
        assert go("lt_glue.py", "killed", *extra) == expected
    assert scales == [2.0**16, *[2.0**15] * 6]
    assert expected[0]["skipped_steps"] == 1


def test_steps_that_fp16_skips_are_counted_and_many_are_said(go, monkeypatch, capsys):
    class Sometimes(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            Sometimes.calls += 1
            return grad * (float("inf") if Sometimes.calls in (2, 3, 9) else 1.0)

    plain = Glue.loss
    monkeypatch.setattr(Glue, "loss", lambda self, net, batch: Sometimes.apply(plain(self, net, batch)))
    first, second = go("lt_glue.py", "skips", "--precision", "fp16")
    assert (first["skipped_steps"], second["skipped_steps"]) == (2, 1)
    assert "fp16 gradients overflowed in 2 of 6 steps, which changed nothing" in first["warnings"]
    assert "level 0/1, 0% pruned: fp16 gradients overflowed in 2 of 6 steps" in capsys.readouterr().out
