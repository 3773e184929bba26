"""A masked step equals `torch.nn.utils.prune`'s bit for bit, for masks of any parameters."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from steps import with_gradient

from bert_tickets.config import Training, build
from bert_tickets.data.batches import Batches
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.parameters import prunable, snapshot
from bert_tickets.tasks.glue import Glue
from bert_tickets.training.step import OPTIMIZERS, Step

CPU = torch.device("cpu")
STEPS = 30


@pytest.fixture
def setting(bert_dir, glue_dir):
    """A network, a mask of 40 %, batches and a loss."""
    task = Glue("sst2")
    cfg = build({"task": "sst2", "model": str(bert_dir), "data_dir": str(glue_dir), "max_length": 48})
    net, tokenizer = task.load_net(cfg)
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.4)
    store, _ = task.load_data(cfg, tokenizer, CPU)

    def loss(net, batch):  # three times the usual, so that gradients are clipped at 1.0
        return 3 * F.cross_entropy(classify(net, batch), batch.labels)

    return net.train(), mask, Batches(store, 8, 0), loss


def settings(weight_decay: float) -> Training:
    return Training(lr=3e-3, weight_decay=weight_decay, max_grad_norm=1.0)


def masked_step(net, loss, mask: Mask, cfg: Training) -> Step:
    """Mask the weights; the step that trains them."""
    params = dict(net.named_parameters())
    mask.apply(params)
    return Step(lambda batch: loss(net, batch), params, cfg, mask, CPU)


def ours(setting, weight_decay: float):
    net, mask, batches, loss = setting
    net = copy.deepcopy(net)
    step = masked_step(net, loss, mask, settings(weight_decay))
    torch.manual_seed(1)
    losses = [step(batches.parts(i)[0], 3e-3).item() for i in range(STEPS)]
    return losses, dict(net.named_parameters())


def decay_groups(net, weight_decay: float) -> list[dict]:
    """Biases and LayerNorms have no weight decay."""
    groups: dict[float, list] = {weight_decay: [], 0.0: []}
    for name, p in net.named_parameters():
        groups[0.0 if name.endswith("bias") or "LayerNorm" in name else weight_decay].append(p)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items()]


def test_biases_have_no_weight_decay_and_scores_of_biases_have():
    names = ("a.bias", "a.weight", "LayerNorm.weight", "coefficient.heads", "score.a.bias", "score.LayerNorm.weight")
    params = {name: torch.ones(1, requires_grad=True) for name in names}
    step = Step(lambda batch: params["a.bias"].sum(), params, settings(0.1), None, torch.device("cpu"))
    decays = {id(p): group["weight_decay"] for group in step.optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in params.values()] == [0, 0.1, 0, 0, 0.1, 0.1]


def by_hand(setting, weight_decay: float, *, after_the_step: bool):
    """Train likewise with torch's hooks; or, `after_the_step`, with the weights masked after each step instead."""
    net, mask, batches, loss = setting
    net = copy.deepcopy(net)
    if after_the_step:
        mask.apply(prunable(net))
    else:
        for name, kept in mask.items():
            torch_prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", kept)
    # the hooks move `weight_orig` after the bias; the norm is summed in the network's order, as rounding depends on it
    named = dict(net.named_parameters())
    in_order = [named.get(name, named.get(name + "_orig")) for name, _ in setting[0].named_parameters()]
    optimizer = torch.optim.AdamW(decay_groups(net, weight_decay), lr=3e-3, eps=1e-8, fused=True)
    torch.manual_seed(1)
    losses = []
    for i in range(STEPS):
        value = loss(net, batches.parts(i)[0])
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
    assert losses[-1] < losses[0]
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def test_masking_the_weights_after_the_step_differs(setting):
    """So that the test above fails if the gradients are not masked. They are clipped, too."""
    _, weights = ours(setting, 0.0)
    _, other = by_hand(setting, 0.0, after_the_step=True)
    assert max((weights[name] - other[name]).abs().max() for name in weights) > 1e-4
    net, _, batches, loss = setting
    loss(net, batches.parts(0)[0]).backward()
    assert torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0) > 1


def some_matrices(net) -> dict[str, torch.Tensor]:
    return {name: p for name, p in prunable(net).items() if "layer.1" in name}


@pytest.mark.parametrize("covered", ["matrices", "matrices+embeddings", "matrices+biases", "heads", "neurons", some_matrices])
def test_weights_pruned_by_any_mask_stay_zero_and_the_others_move(setting, covered):
    """With weight decay; AdamW's moments of pruned weights are zero too."""
    net, _, batches, loss = setting
    weights = prunable(net, covered) if isinstance(covered, str) else covered(net)
    mask, before = prune(Mask.ones(weights), magnitude(weights), 0.4), snapshot(net)
    step = masked_step(net, loss, mask, settings(0.01))
    for i in range(10):
        step(batches.parts(i)[0], 3e-3)
    moments, moved = step.moments(), []
    for name, p in net.named_parameters():
        kept = mask.get(name, torch.ones_like(p, dtype=torch.bool))
        assert (p[~kept] == 0).all()
        assert all((moments[f"{moment}/{name}"][~kept] == 0).all() for moment in ("exp_avg", "exp_avg_sq"))
        moved.append((p[kept] != before[name][kept]).float().mean())
    assert sum(moved) > 0.9 * len(moved)


def test_further_leaves_train_beside_the_network_with_an_optimizer_by_name(setting, monkeypatch):
    net, mask, batches, loss = setting
    mask.apply(prunable(net))
    scale, scores = torch.ones((), requires_grad=True), torch.zeros(5, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)  # has no gradient
    params = dict(net.named_parameters()) | {"scale": scale, "scores": scores, "unused": unused}
    gate = Mask({"unused": torch.tensor([True, False]), "scores": torch.tensor([True, False, True, True, False])})

    def scaled(batch):
        return scale * loss(net, batch) + (scores - 1).square().sum()

    monkeypatch.setitem(OPTIMIZERS, "adam", torch.optim.Adam)
    step = Step(scaled, params, settings(0.0), Mask(dict(gate) | dict(mask)), CPU, optimizer="adam")
    assert type(step.optimizer) is torch.optim.Adam
    for i in range(5):
        step(batches.parts(i)[0], 0.1)
    assert scale < 1
    assert scores[gate["scores"]].min() > 0.3
    assert (scores[~gate["scores"]] == 0).all()
    assert (unused == 1).all()


@pytest.mark.parametrize(("precision", "norm"), [("fp16", 0.5), ("bf16", 0.5), ("fp16", 1e6)])
def test_clipping_in_adamw_equals_torchs_clipping_in_half_precision(setting, precision, norm):
    """To rounding; bit for bit if nothing is clipped. One of ten fp16 steps overflows."""
    net, mask, batches, loss = setting
    mask.apply(prunable(net))
    other = copy.deepcopy(net)
    cfg = replace(settings(0.01), precision=precision, max_grad_norm=norm)
    factors = [float("inf") if i == 4 and precision == "fp16" else 1.0 for i in range(10)]

    now = iter(factors)
    step = masked_step(net, lambda net, batch: with_gradient(loss(net, batch), lambda _: next(now)), mask, cfg)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    optimizer = torch.optim.AdamW(decay_groups(other, 0.01), lr=1e-3, eps=1e-8, fused=True)
    for i, factor in enumerate(factors):
        torch.manual_seed(i)
        found = step(batches.parts(i)[0], 1e-3)
        torch.manual_seed(i)
        with torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16):
            expected = with_gradient(loss(other, batches.parts(i)[0]), lambda _, factor=factor: factor)
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
        if norm > 1 or not name.endswith("key.bias"):  # its gradient is rounding error, which AdamW scales up
            torch.testing.assert_close(p, other.get_parameter(name), rtol=0, atol=1e-4 if norm < 1 else 0, msg=name)
    if precision == "fp16":
        assert step.loss_scale.factor == scaler.get_scale() == 2.0**15
        assert step.taken() == 9
