"""Slim execution equals masked execution: removed heads and neurons change no logit, no gradient, no step."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import store_of
from fake_cuda import only_fake
from formula_net import formula_batch, formula_net
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bert_tickets import kernels
from bert_tickets.config import Training
from bert_tickets.errors import Diverged
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling import bert
from bert_tickets.modeling.bert import classify, encode
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.slim import kept_units, removed_units, slimmed
from bert_tickets.modeling.units import HEAD_OUTPUT, INNER, LAYER, OUTER, QKV, lower
from bert_tickets.training.cuda_graphs import tensors
from bert_tickets.training.step import Step

CPU = torch.device("cpu")
NET = formula_net()


def net_of():
    return copy.deepcopy(NET)


def unit_mask(heads, mlps=(True,) * 3, density=0.5, empty_bias="keep"):
    """The lowered mask of these heads [3, 4] and MLPs [3], and of neurons of which it keeps about `density`."""
    neurons = torch.rand(3, 64, generator=torch.Generator().manual_seed(3)) < density
    units = {"heads": torch.tensor(heads), "mlps": torch.tensor(mlps), "neurons": neurons}
    return lower(Mask(units), dict(NET.named_parameters()), empty_bias)


SOME = [[True, False, True, True], [False] * 4, [True, True, False, False]]
ALL_HEADS = [[True] * 4] * 3


def unstructured(mask, density=0.6):
    """A mask that also prunes single weights of what `mask` keeps, and covers the pooler."""
    generator = torch.Generator().manual_seed(5)
    pooler = torch.ones(32, 32, dtype=torch.bool)
    found = {**mask, "bert.pooler.dense.weight": pooler}
    return Mask({name: kept & (torch.rand(kept.shape, generator=generator) < density) for name, kept in found.items()})


def loss_of(net, batch):
    return F.cross_entropy(classify(net, batch), batch.labels)


def gradients(net, batch):
    net.zero_grad()
    loss = loss_of(net, batch)
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def rows(count):
    return st.lists(st.booleans(), min_size=count, max_size=count)


@given(st.lists(rows(4), min_size=3, max_size=3), rows(3), st.sampled_from([0.0, 0.4, 1.0]), st.booleans())
@example(heads=[[False] * 4] * 3, mlps=[False] * 3, density=1.0, drop=False)
@example(heads=SOME, mlps=[True, False, True], density=0.4, drop=True)
@settings(max_examples=25, deadline=None)
def test_logits_and_gradients_of_any_units_equal_the_masked_networks(heads, mlps, density, drop):
    """On examples of unequal lengths. What is removed has no parameters left."""
    net, batch = net_of(), formula_batch()
    mask = unit_mask(heads, mlps, density, "drop" if drop else "keep")
    params = dict(net.named_parameters())
    mask.apply(params)
    expected, masked = classify(net, batch), gradients(net, batch)
    with slimmed(net, mask) as left:
        torch.testing.assert_close(classify(net, batch), expected, rtol=0, atol=1e-12)
        slim = gradients(net, batch)
        for name, p in net.named_parameters():
            kept = mask.get(name, torch.ones_like(params[name], dtype=torch.bool))
            of_kept = slim[name][left[name]] if name in left else slim[name].flatten()
            torch.testing.assert_close(of_kept, masked[name][kept], rtol=0, atol=1e-12, msg=name)
            if name in mask and not name.endswith("output.dense.bias"):
                extra = p.numel() - int(kept.count_nonzero())
                if "attention" in name:
                    assert extra == 0, name
                else:  # neurons that stay for a multiple of 8
                    width = p.shape[-1 if name.endswith(f".{OUTER}.weight") else 0]
                    assert width % 8 == 0, name
                    assert extra * width <= 7 * p.numel(), name


def test_unstructured_masks_are_removed_where_they_can_be_and_masked_elsewhere():
    net, batch = net_of(), formula_batch()
    mask = unstructured(unit_mask(SOME, [True, False, True]))
    mask.apply(dict(net.named_parameters()))
    expected = classify(net, batch)
    with slimmed(net, mask) as left:
        torch.testing.assert_close(classify(net, batch), expected, rtol=0, atol=1e-12)
        assert net.get_parameter(f"{LAYER}0.{QKV[0]}.weight").shape == (24, 32)
        assert {name: kept.shape for name, kept in left.items()} == {name: net.get_parameter(name).shape for name in mask}
        assert (left.kept, left.keys()) == (mask.kept, mask.keys())
        assert left.total < mask.total
        for name, kept in left.items():
            assert not net.get_parameter(name)[~kept].any(), name


def test_only_whole_units_are_removed_and_only_of_matrices_that_the_mask_covers():
    net = net_of()
    weights = dict(net.named_parameters())
    heads, outer = (torch.ones(weights[f"{LAYER}1.{name}.weight"].shape, dtype=torch.bool) for name in (HEAD_OUTPUT, OUTER))
    heads[:, :8], heads[:, 8:15], outer[:, 3:12], outer[1:, 12] = False, False, False, False
    mask = Mask({f"{LAYER}1.{HEAD_OUTPUT}.weight": heads, f"{LAYER}1.{OUTER}.weight": outer})
    assert removed_units(net, mask) == {"heads": 1, "neurons": 9}
    assert kept_units(net, mask)["heads"].tolist() == [[True] * 4, [False, True, True, True], [True] * 4]
    mask.apply(weights)
    before = {name: p.detach().clone() for name, p in weights.items()}
    with slimmed(net, mask) as left:
        assert net.get_parameter(f"{LAYER}1.{INNER}.bias").shape == (56,)  # 55 are kept
        assert left[f"{LAYER}1.{OUTER}.weight"].shape == (32, 56)
        assert net.get_parameter(f"{LAYER}0.{INNER}.weight") is weights[f"{LAYER}0.{INNER}.weight"]
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1)
    query, kept = f"{LAYER}1.{QKV[0]}.weight", torch.arange(32) >= 8  # its rows of the removed head are not in the mask
    assert torch.equal(net.get_parameter(query)[kept], before[query][kept] + 1)
    assert torch.equal(net.get_parameter(query)[~kept], before[query][~kept])


def test_the_network_has_its_own_parameters_again_also_after_an_error():
    net = net_of()
    mask = unit_mask(SOME)
    net.get_parameter(f"{LAYER}0.{INNER}.weight").requires_grad_(False)
    params = dict(net.named_parameters())
    mask.apply(params)
    values = {name: p.detach().clone() for name, p in params.items()}
    expected = classify(net, formula_batch())

    def fail():
        with slimmed(net, mask):
            inside = dict(net.named_parameters())
            assert list(inside) == list(params)
            assert {name for name, p in inside.items() if not p.requires_grad} == {f"{LAYER}0.{INNER}.weight"}
            assert all(isinstance(p, torch.nn.Parameter) and p.is_contiguous() for p in inside.values())
            raise Diverged("the loss became nan")

    with pytest.raises(Diverged):
        fail()
    for name, p in net.named_parameters():
        assert p is params[name]
        assert torch.equal(p, values[name])
    assert torch.equal(classify(net, formula_batch()), expected)


# ---- training ----


def train(net, mask, weight_decay, steps=12):
    """Take steps with AdamW, clipped; the losses."""
    cfg = Training(lr=1e-3, weight_decay=weight_decay, max_grad_norm=0.5, precision="fp32")
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    step = Step(lambda batch: loss_of(net, batch), params, cfg, mask, CPU)
    losses = [step(formula_batch(), 1e-3 * (1 - i / steps)).item() for i in range(steps)]
    return torch.tensor(losses, dtype=torch.float64)


MASKS = {
    "heads": unit_mask(SOME, density=1.0),
    "neurons": unit_mask(ALL_HEADS, density=0.5),
    "everything": unit_mask(SOME, [True, False, True]),
    "dropped bias": unit_mask(SOME, empty_bias="drop"),
    "nothing left": unit_mask([[False] * 4] * 3, density=0.0),
    "unstructured": unstructured(unit_mask(SOME, [False, True, True])),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", MASKS)
def test_training_steps_equal_masked_ones_and_end_in_the_same_dense_weights(kind, weight_decay):
    mask, nets = MASKS[kind], [net_of(), net_of()]
    for net in nets:
        net.train()
        mask.apply(dict(net.named_parameters()))
    start = {name: p.detach().clone() for name, p in nets[0].named_parameters()}
    expected = train(nets[0], mask, weight_decay)
    with slimmed(nets[1], mask) as left:
        found = train(nets[1], left, weight_decay)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert expected[-1] < expected[0] - 1e-3
    ours = dict(nets[1].named_parameters())
    for name, p in nets[0].named_parameters():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-10, msg=name)
        assert name not in mask or not ours[name][~mask[name]].any()
        assert not torch.equal(p, start[name]) or (name in mask and not mask[name].any()) or name.endswith("key.bias"), name


def test_a_dropped_bias_differs_from_a_kept_one_in_the_emptied_layer_alone():
    """Prasanna et al.'s released code drops the bias of the attention's output with the layer's last head."""
    keep, drop = (unit_mask(SOME, density=1.0, empty_bias=choice) for choice in ("keep", "drop"))
    whole = {name: kept for name, kept in drop.items() if name in keep or not kept.all()}
    assert {name for name in whole if name not in keep} == {f"{LAYER}1.{HEAD_OUTPUT}.bias"}
    assert all(torch.equal(whole[name], keep[name]) for name in keep)
    states = []
    for mask in (keep, drop):
        net, found = net_of(), []
        mask.apply(dict(net.named_parameters()))
        with slimmed(net, mask):
            encode(net, formula_batch(), found)
        states.append(found)
    assert [torch.equal(a, b) for a, b in zip(*states, strict=True)] == [True, False, False]


# ---- half precision, and a GPU's layouts ----


def test_half_precision_on_a_cpu_equals_the_masked_networks_to_rounding(net):
    mask = lower(Mask({"heads": torch.tensor([[True, False, True, False], [False] * 4])}), dict(net.named_parameters()))
    mask.apply(dict(net.eval().named_parameters()))
    batch, found = store_of([9, 30, 4, 22]).batch(torch.arange(4)), []
    with torch.autocast("cpu", torch.bfloat16):
        expected = classify(net, batch)
        with slimmed(net, mask):
            loss = loss_of(net, batch)
            loss.backward()
            found = classify(net, batch)
            assert all(p.grad is not None for p in net.parameters() if p.numel())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


HEADS = {"equal": [[True, False]] * 2, "unequal": [[True, False], [True, True]], "emptied": [[True, False], [False, False]]}
EMPTIED = [("equal", "none"), ("emptied", "some")]


@only_fake
@pytest.mark.parametrize("layouts", ["Padded", "Ragged", "Fused"])
@pytest.mark.parametrize(("heads", "neurons"), [("equal", "some"), ("unequal", "some"), *EMPTIED])
def test_a_gpus_layouts_serve_any_numbers_of_heads_and_neurons(one_gpu, two_heads, monkeypatch, layouts, heads, neurons):
    """In hidden states and gradients. Our kernels, with `Fused`, leave a network with an emptied layer to torch's operators."""
    if layouts == "Fused":
        pytest.importorskip("triton")
    kept = torch.ones(2, 64, dtype=torch.bool)
    kept[0, 5:20], kept[1, : 64 if neurons == "none" else 3] = False, False
    calls, fused = [], bert._encode_fused
    with one_gpu(), monkeypatch.context() as patch:
        net, batch = two_heads.to("cuda"), store_of([9, 4]).batch(torch.arange(2))
        batch = replace(batch, **{name: tensor.to("cuda") for name, tensor in tensors(batch).items()})
        weights = dict(net.named_parameters())
        mask = lower(Mask({"heads": torch.tensor(HEADS[heads]), "neurons": kept}), weights).to("cuda")
        mask.apply(weights)
        patch.setattr(bert, "_encode_fused", lambda *given: calls.append(given) or fused(*given))
        expected = states_and_gradients(net, batch, half=layouts != "Padded")
        patch.setattr(kernels, "usable", lambda device: layouts == "Fused")
        with slimmed(net, mask) as left:
            found = states_and_gradients(net, batch, half=layouts != "Padded")
        assert len(calls) == (layouts == "Fused" and (heads, neurons) not in EMPTIED)
        bound = 1e-5 if layouts == "Padded" else 0.02
        for name, gradient in found.items():
            of_masked = expected[name]
            if name in mask:
                gradient, of_masked = gradient[left[name].cpu()], of_masked[mask[name].cpu()]
            if not name.endswith("key.bias"):  # its gradient is 0 but for rounding
                torch.testing.assert_close(gradient, of_masked, rtol=bound, atol=bound)


def states_and_gradients(net, batch, half):
    """The hidden states, in half precision or not, and the gradients of a weighted sum of them, on the CPU."""
    net.zero_grad()
    with torch.autocast("cuda", torch.float16, enabled=half):
        hidden = encode(net, batch)
    (hidden.float() * torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden) / 30).sum().backward()
    zeros = {name: torch.zeros(p.shape) for name, p in net.named_parameters()}
    found = {name: p.grad.float().cpu() for name, p in net.named_parameters() if p.grad is not None}
    return zeros | found | {"states": hidden.float().detach().cpu()}


@pytest.fixture
def two_heads(calm_bert_dir, tmp_path):
    """The small BERT without dropout, with two heads, of a size that our attention takes, and a classifier."""
    config = json.loads((calm_bert_dir / "config.json").read_text())
    shutil.copytree(calm_bert_dir, tmp_path / "bert")
    (tmp_path / "bert/config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    return load_bert(str(tmp_path / "bert"), "classifier", "pretrained", 0)[0]
