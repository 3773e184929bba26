"""A masked step is `torch.nn.utils.prune`'s, bit for bit; and what would not be is shown not to be."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune

from bert_tickets.config import Training, build
from bert_tickets.data.batches import Batches, TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.parameters import prunable
from bert_tickets.tasks.glue import Glue
from bert_tickets.training.step import Step

CPU = torch.device("cpu")
STEPS = 30


@pytest.fixture
def setting(bert_dir, glue_dir):
    """A network pruned by 40 %, its mask, its batches and its loss."""
    task = Glue("sst2")
    cfg = build("glue", {"task": "sst2", "model": str(bert_dir), "data_dir": str(glue_dir), "max_length": 48})
    net, tokenizer = task.load_net(cfg)
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.4)
    store, _ = task.load_data(cfg, tokenizer, CPU)

    def loss(net, batch):  # three times the usual, so that clipping at 1.0 is at work
        return 3 * F.cross_entropy(classify(net, batch), batch.labels)

    return net.train(), mask, Batches(store, 8, 0), loss


def settings(weight_decay: float) -> Training:
    return Training(lr=3e-3, weight_decay=weight_decay, max_grad_norm=1.0)


def ours(setting, weight_decay: float):
    net, mask, batches, loss = setting
    net = copy.deepcopy(net)
    mask.apply(prunable(net))
    torch.manual_seed(1)
    step = Step(lambda batch: loss(net, batch), dict(net.named_parameters()), settings(weight_decay), mask, CPU)
    losses = [step(batches[i], 3e-3).item() for i in range(STEPS)]
    return losses, dict(net.named_parameters())


def by_hand(setting, weight_decay: float, *, after_the_step: bool):
    """The same training with torch's hooks, or, `after_the_step`, with the weights masked after each step instead."""
    net, mask, batches, loss = setting
    net = copy.deepcopy(net)
    if after_the_step:
        mask.apply(prunable(net))
    else:
        for name, kept in mask.items():
            torch_prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", kept)
    spared = [p for name, p in net.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    rest = [p for name, p in net.named_parameters() if not (name.endswith("bias") or "LayerNorm" in name)]
    # The hooks move `weight_orig` behind the bias; the norm is summed in the network's own order, as rounding depends on it.
    named = dict(net.named_parameters())
    in_order = [named.get(name, named.get(name + "_orig")) for name, _ in setting[0].named_parameters()]
    groups = [{"params": rest, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, eps=1e-8, fused=True)
    torch.manual_seed(1)
    losses = []
    for i in range(STEPS):
        value = loss(net, batches[i])
        value.backward()
        torch.nn.utils.clip_grad_norm_(in_order, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if after_the_step:
            mask.apply(prunable(net))
        losses.append(value.item())
    weights = {name.removesuffix("_orig"): p for name, p in net.named_parameters()}
    for name, kept in mask.items():
        weights[name] = weights[name] * kept  # under the hooks `module.weight` is one step old until the next forward
    return losses, weights


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_thirty_steps_equal_torch_prunes_bit_for_bit(setting, weight_decay):
    losses, weights = ours(setting, weight_decay)
    expected_losses, expected = by_hand(setting, weight_decay, after_the_step=False)
    assert losses == expected_losses
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def test_masking_after_the_step_is_another_training(setting):
    """The guard of the test above: were the gradients not masked, it would fail."""
    _, weights = ours(setting, 0.0)
    _, other = by_hand(setting, 0.0, after_the_step=True)
    assert max((weights[name] - other[name]).abs().max() for name in weights) > 1e-4


def test_the_clip_is_at_work_in_these_tests(setting):
    net, _, batches, loss = setting
    loss(net, batches[0]).backward()
    assert torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0) > 1


def test_pruned_weights_stay_zero_and_the_others_move(setting):
    net, mask, *_ = setting
    _, weights = ours(setting, 0.01)
    for name, kept in mask.items():
        assert (weights[name][~kept] == 0).all()
        assert (weights[name][kept] != net.get_parameter(name)[kept]).float().mean() > 0.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_takes_the_same_path_and_learns(setting, precision):
    net, mask, batches, loss = setting
    mask.apply(prunable(net))
    cfg = replace(settings(0.0), precision=precision)
    step = Step(lambda batch: loss(net, batch), dict(net.named_parameters()), cfg, mask, CPU)
    assert (step.loss_scale is not None) == (precision == "fp16")
    losses = [step(batches[i], 3e-3).item() for i in range(3 * STEPS)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all((net.get_parameter(name)[~kept] == 0).all() for name, kept in mask.items())


def test_an_fp16_step_that_overflows_changes_nothing_but_the_scale(setting):
    net, mask, batches, loss = setting
    cfg = replace(settings(0.0), precision="fp16")
    step = Step(lambda batch: loss(net, batch) * float("inf"), dict(net.named_parameters()), cfg, mask, CPU)
    before, scale = copy.deepcopy(dict(net.named_parameters())), step.loss_scale.factor.item()
    step(batches[0], 3e-3)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert step.loss_scale.factor == scale / 2


@pytest.mark.parametrize(("precision", "norm"), [("fp16", 0.5), ("bf16", 0.5), ("fp16", 1e6), ("bf16", 1e6)])
def test_in_half_precision_adamw_clips_as_torch_does_before_it(setting, precision, norm):
    """To rounding; to the bit where nothing is clipped. One of ten fp16 steps overflows."""
    net, mask, batches, loss = setting
    other = copy.deepcopy(net)
    for each in (net, other):
        mask.apply(prunable(each))
    cfg = replace(settings(0.01), precision=precision, max_grad_norm=norm)
    factors = [float("inf") if i == 4 and precision == "fp16" else 1.0 for i in range(10)]

    class Times(torch.autograd.Function):  # of gradients alone: the loss stays finite
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None

    now = iter(factors)
    step = Step(lambda batch: Times.apply(loss(net, batch), next(now)), dict(net.named_parameters()), cfg, mask, CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    groups = [
        {"params": [p for name, p in other.named_parameters() if spared == (name.endswith("bias") or "LayerNorm" in name)]}
        for spared in (False, True)
    ]
    groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8, weight_decay=0.01, fused=True)
    for i, factor in enumerate(factors):
        torch.manual_seed(i)
        found = step(batches[i], 1e-3)
        torch.manual_seed(i)
        with torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16):
            expected = Times.apply(loss(other, batches[i]), factor)
        scaler.scale(expected).backward()
        for name, kept in mask.items():
            other.get_parameter(name).grad.mul_(kept)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(other.parameters(), norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=0)
    for name, p in net.named_parameters():
        if norm > 1 or not name.endswith("key.bias"):  # a gradient of rounding errors alone, which AdamW makes large
            torch.testing.assert_close(p, other.get_parameter(name), rtol=0, atol=1e-4 if norm < 1 else 0, msg=name)
    if precision == "fp16":
        assert step.loss_scale.factor == scaler.get_scale() == 2.0**15
        assert step.taken() == 9


def test_weight_decay_spares_biases_and_layer_norms(setting):
    net, *_ = setting
    step = Step(lambda batch: None, dict(net.named_parameters()), settings(0.01), None, CPU)
    decayed, spared = (sum(p.numel() for p in group["params"]) for group in step.optimizer.param_groups)
    ones = sum(p.numel() for name, p in net.named_parameters() if p.dim() == 1)
    assert spared == ones
    assert decayed + spared == sum(p.numel() for p in net.parameters())


def test_a_frozen_tensor_may_be_masked(setting):
    """As the pooler of a model for masked language modelling: covered by the mask, not trained."""
    net, mask, batches, loss = setting
    mask.apply(prunable(net))
    params = {name: p for name, p in net.named_parameters() if not name.startswith("bert.pooler")}
    net.bert.pooler.requires_grad_(False)
    before = net.bert.pooler.dense.weight.clone()
    step = Step(lambda batch: loss(net, batch), params, settings(0.01), mask, CPU)
    step(batches[0], 1e-3)
    assert torch.equal(net.bert.pooler.dense.weight, before)


def test_moments_carry_over_but_not_to_what_a_later_mask_removes(setting):
    net, mask, batches, loss = setting
    params = dict(net.named_parameters())
    dense = Step(lambda batch: loss(net, batch), params, settings(0.0), None, CPU)
    for i in range(3):
        dense(batches[i], 1e-3)
    mask.apply(prunable(net))
    pruned = Step(lambda batch: loss(net, batch), params, settings(0.0), mask, CPU)
    pruned.set_moments(dense.moments())
    name, kept = next(iter(mask.items()))
    first, second = dense.moments(), pruned.moments()
    assert first.keys() == second.keys()
    assert torch.equal(second[f"exp_avg/{name}"], first[f"exp_avg/{name}"] * kept)
    assert second[f"step/{name}"] == 3
    pruned(batches[3], 1e-3)
    assert (net.get_parameter(name)[~kept] == 0).all()


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_cuda_never_waits_for_the_device(setting, precision):
    net, mask, batches, loss = setting
    device = torch.device("cuda")
    net.to(device)
    ids = [[2] + [9] * (n % 17) + [3] for n in range(99)]
    tokens = Tokens.of(ids, [[0] * len(example) for example in ids])
    batches = Batches(TokenStore(tokens, np.arange(99) % 2, device), 8, 0)
    torch.use_deterministic_algorithms(True)  # as a run does
    step = Step(
        lambda batch: loss(net, batch), dict(net.named_parameters()), replace(settings(0.0), precision=precision), mask, device
    )
    step(batches[0], 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 5):
            step(batches[i], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
