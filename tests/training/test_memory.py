"""--grad-accum splits a batch and changes nothing but rounding; running out of memory, and out of fp16's range, is reported."""

import numpy as np
import pytest
import torch
from steps import with_gradient
from trainrun import KINDS, Killed, dying, train

from bert_tickets.errors import UserError
from bert_tickets.runs.directory import results
from bert_tickets.tasks.glue import Glue
from bert_tickets.training.step import Step


@pytest.fixture
def go(commands, tmp_path):
    """Run a script in a folder; returns its results."""

    def run(script: str, folder: str, *extra: object) -> list[dict]:
        return results(train(script, [*commands[script], "--levels", 2, "--output-dir", tmp_path / folder, *extra]))

    return run


# ---- --grad-accum ----


@pytest.mark.parametrize("script", KINDS)
def test_accumulated_gradients_equal_those_of_the_whole_batch_to_rounding(script, go, calm_bert_dir):
    """Also where a part is empty, as in the last batch of an epoch, or has no masked token."""
    words = "--batch-size", 8, "--model", calm_bert_dir
    whole, parts = (go(script, str(n), "--grad-accum", n, *words) for n in (1, 8))
    for a, b in zip(whole, parts, strict=True):
        assert np.allclose(a["losses"], b["losses"], rtol=1e-5)
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-4)
        assert a["mask_sha256"] == b["mask_sha256"]
    assert any(a["losses"] != b["losses"] for a, b in zip(whole, parts, strict=True)), "the batch was split"


def raise_(error: Exception):
    raise error


OUT_OF_MEMORY = {  # of a GPU, of torch on the CPU, of Python
    "gpu": lambda *_, **__: raise_(torch.OutOfMemoryError("no room")),
    "cpu": lambda *_, **__: torch.empty(2**50),
    "python": lambda *_, **__: raise_(MemoryError()),
}


@pytest.mark.parametrize("memory", OUT_OF_MEMORY)
def test_running_out_of_memory_is_a_users_error_that_names_grad_accum(go, monkeypatch, memory):
    where = (torch.optim.AdamW, "step") if memory == "gpu" else (Glue, "loss")
    monkeypatch.setattr(*where, OUT_OF_MEMORY[memory])
    with pytest.raises(UserError, match=r"out of memory in step 0: .*--grad-accum 6 splits"):
        go("lt_glue.py", "full", "--grad-accum", 3)
    monkeypatch.setattr(*where, lambda *_, **__: raise_(RuntimeError("shape")))
    with pytest.raises(RuntimeError, match="shape"):
        go("lt_glue.py", "bug")


# ---- fp16 ----


def scale_gradients(monkeypatch: pytest.MonkeyPatch, factor) -> None:
    """Multiply the gradient of every loss by `factor(gradient)`; the losses stay as they are."""
    plain = Glue.loss
    monkeypatch.setattr(Glue, "loss", lambda self, net, batch: with_gradient(plain(self, net, batch), factor))


def test_fp16_gradients_that_overflow_at_every_scale_end_the_run(go, monkeypatch):
    scale_gradients(monkeypatch, lambda grad: float("inf"))
    with pytest.raises(UserError, match="fp16 gradients overflowed at every scale by step"):
        go("lt_glue.py", "overflow", "--precision", "fp16", "--max-steps", "40")


def test_a_killed_run_keeps_the_loss_scale_after_an_overflow(go, monkeypatch):
    scale_gradients(monkeypatch, lambda grad: float("inf") if grad > 2.0**15 else 1.0)
    extra = "--precision", "fp16", "--save-steps", "2", "--levels", "1"
    expected = go("lt_glue.py", "undisturbed", *extra)
    assert expected[0]["skipped_steps"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying(Step.__call__, 5))
        with pytest.raises(Killed):
            go("lt_glue.py", "killed", *extra)
    assert go("lt_glue.py", "killed", *extra) == expected  # at the first scale a step would be skipped again


def test_skipped_fp16_steps_are_counted_and_many_are_a_warning(go, monkeypatch, capsys):
    calls = []
    scale_gradients(monkeypatch, lambda grad: calls.append(1) or (float("inf") if len(calls) in (2, 3, 9) else 1.0))
    first, second = go("lt_glue.py", "skips", "--precision", "fp16")
    assert (first["skipped_steps"], second["skipped_steps"]) == (2, 1)
    assert "fp16 gradients overflowed in 2 of 6 steps, which changed nothing" in first["warnings"]
    assert "level 0/1, 0% pruned: fp16 gradients overflowed in 2 of 6 steps" in capsys.readouterr().out
