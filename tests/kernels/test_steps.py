"""Whole steps by the kernels, as by torch's operators."""

import copy
import shutil

import pytest
import torch
from fake_cuda import only_fake
from steps import take
from torch.nn.utils import prune
from transformers import BertModel

from bert_tickets import kernels
from bert_tickets.bench.baselines import make_case
from bert_tickets.modeling.bert import encode

pytest.importorskip("triton")
from bert_tickets.kernels import attention, embeddings, layers, loss
from bert_tickets.training.masked_adamw import MaskedAdamW


def with_two_heads(folder, tmp_path, layers=2):
    """A copy of a checkpoint with heads of a size that our attention takes, and its first layers."""
    shutil.copytree(folder, tmp_path / "bert")  # with the tokenizer
    BertModel.from_pretrained(folder, num_attention_heads=2, num_hidden_layers=layers).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@only_fake
@pytest.mark.parametrize(("grad_accum", "steps"), [(1, 2), (2, 1)])
def test_steps_by_our_kernels_equal_those_by_torchs(one_gpu, calm_bert_dir, tmp_path, monkeypatch, grad_accum, steps):
    """To rounding, without dropout. Gradients of several parts of a batch are added in float32."""
    with one_gpu():
        given = {
            "model": str(with_two_heads(calm_bert_dir, tmp_path, layers=1)),
            "precision": "fp16",
            "batch_size": 2,
            "limit_train": 4,
        }
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


@only_fake
def test_every_dropout_of_a_step_has_its_own_seed_and_an_evaluation_has_none(one_gpu, bert_dir, tmp_path, monkeypatch):
    seeds = []

    def noting(function, place):
        return lambda *given: seeds.append(int(given[place].cpu())) or function(*given)

    with one_gpu(), monkeypatch.context() as patch, torch.no_grad(), torch.autocast("cuda", torch.float16):
        given = {"model": str(with_two_heads(bert_dir, tmp_path)), "precision": "fp16", "batch_size": 2, "limit_train": 2}
        case = make_case("cola", given, 0.5)
        batch = case.store.batch(torch.arange(2))
        patch.setattr(kernels, "usable", lambda device: True)
        for owner, name, place in ((embeddings, "embed", 4), (layers, "add_norm", 6), (attention, "draw", 2)):
            patch.setattr(owner, name, noting(getattr(owner, name), place))
        training = [encode(case.net, batch).cpu() for _ in range(2)]
        assert len(seeds) == len(set(seeds)) == 2 * (1 + 3 * case.net.config.num_hidden_layers)
        case.net.eval()
        evaluated = encode(case.net, batch).cpu()
        patch.setattr(kernels, "usable", lambda device: False)
        torchs = encode(case.net, batch).cpu()
    assert not torch.equal(*training)
    torch.testing.assert_close(evaluated, torchs, rtol=0, atol=0.02)


@only_fake
def test_the_mlm_loss_in_half_precision_is_by_our_kernel(one_gpu, calm_bert_dir, monkeypatch):
    """To rounding that of torch, on the logits in half precision."""
    with one_gpu():
        given = {"model": str(calm_bert_dir), "precision": "fp16", "batch_size": 2, "limit_train": 2, "max_length": 24}
        case = make_case("mlm", given, 0.5)
        batch = case.task.augment_batch(case.store.batch(torch.arange(2)), 0, 0)
        calls, losses = [], []
        for ours in (False, True):
            with monkeypatch.context() as patch, torch.no_grad(), torch.autocast("cuda", torch.float16):
                patch.setattr(loss, "cross_entropy", lambda *given, own=loss.cross_entropy: calls.append(given) or own(*given))
                patch.setattr(kernels, "usable", lambda device, ours=ours: ours)
                losses.append(float(case.task.loss(case.net, batch).cpu()))
    assert len(calls) == 1
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_kernels_that_do_not_compile_are_not_used(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "launch", fail)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(size))
    assert not kernels.usable.__wrapped__(torch.device("cuda", 0))
    assert "Failed to find C compiler" in capsys.readouterr().out
