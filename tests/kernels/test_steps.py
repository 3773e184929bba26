"""Whole steps by the kernels, as by torch's operators."""

import copy
import json
import shutil

import pytest
import torch
from fake_cuda import only_fake
from steps import take
from torch.nn.utils import prune

from bert_tickets import kernels
from bert_tickets.bench.baselines import make_case
from bert_tickets.modeling.bert import encode

pytest.importorskip("triton")
from bert_tickets.training.masked_adamw import MaskedAdamW


@only_fake
@pytest.mark.parametrize(("grad_accum", "steps"), [(1, 2), (2, 1)])
def test_steps_by_our_kernels_equal_those_by_torchs(one_gpu, calm_bert_dir, tmp_path, monkeypatch, grad_accum, steps):
    """To rounding, without dropout. Gradients of several parts of a batch are added in float32."""
    config = json.loads((calm_bert_dir / "config.json").read_text())
    shutil.copytree(calm_bert_dir, tmp_path / "bert")  # with heads that our attention takes
    (tmp_path / "bert/config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    with one_gpu():
        given = {"model": str(tmp_path / "bert"), "precision": "fp16", "batch_size": 2, "limit_train": 4}
        case = make_case("cola", given | {"grad_accum": grad_accum}, 0.5)
        expected = take(copy.copy(case), steps)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda device: True)
            found = take(case, steps)
        assert isinstance(found[0].optimizer, MaskedAdamW)
        torch.testing.assert_close(found[1].cpu(), expected[1].cpu(), rtol=0.01, atol=0.003)
        for name, before in case.net.named_parameters():
            kept = case.mask.get(name, torch.ones(()))
            before = before.detach().cpu() * kept
            ours, theirs = (step.params[name].detach().cpu() - before for step in (found[0], expected[0]))
            if not name.endswith("key.bias"):  # its gradient is 0 but for rounding
                assert (ours - theirs).abs().mean() <= 0.1 * theirs.abs().mean(), name
            assert not ours[kept.expand_as(ours) == 0].any()
            assert found[0].params[name].grad_dtype == (torch.float32 if grad_accum == 2 else None)


@only_fake
def test_weights_under_the_hooks_of_torchs_pruning_are_used(one_gpu, calm_bert_dir, monkeypatch):
    with one_gpu():
        given = {"model": str(calm_bert_dir), "precision": "fp16", "batch_size": 2, "limit_train": 2}
        case = make_case("cola", given, 0.5)
        for layer in case.net.bert.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                prune.random_unstructured(linear, "weight", 0.5)
        hidden = []
        for ours in (False, True):
            with monkeypatch.context() as patch, torch.no_grad(), torch.autocast("cuda", torch.float16):
                patch.setattr(kernels, "usable", lambda device, ours=ours: ours)
                hidden.append(encode(case.net, case.store.batch(torch.arange(2))).cpu())
    torch.testing.assert_close(*hidden, rtol=0, atol=0.02)


def test_kernels_that_do_not_compile_are_not_used(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "launch", fail)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(size))
    assert not kernels.usable.__wrapped__(torch.device("cuda", 0))
    assert "Failed to find C compiler" in capsys.readouterr().out
