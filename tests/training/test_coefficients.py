"""Trained coefficients of heads and neurons: golden values, what they equal, and their record (Chen et al. 2021)."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formula_net import formula_batch, formula_net, formula_store

from bert_tickets.config import Training
from bert_tickets.data.batches import Batches
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.slim import slimmed
from bert_tickets.modeling.units import HEAD_OUTPUT, LAYER, OUTER, lower
from bert_tickets.training import coefficients
from bert_tickets.training.coefficients import GatedNetwork, Record, StopWhen
from bert_tickets.training.loop import train
from bert_tickets.training.step import Step

CPU = torch.device("cpu")
# Layer 1 has no heads, and layer 2 no neurons.
UNITS = Mask({
    "heads": torch.tensor([[True, False, True, True], [False] * 4, [True, True, False, False]]),
    "neurons": torch.rand(3, 64, generator=torch.Generator().manual_seed(3)) < torch.tensor([[0.4], [0.7], [0.0]]),
})  # fmt: skip


net, batch = pytest.fixture(formula_net), pytest.fixture(formula_batch)


def loss_of(net, batch):
    return F.cross_entropy(classify(net, batch), batch.labels)


def set_to(gated, values):
    with torch.no_grad():
        for kind, given in values.items():
            gated.coefficients[kind].copy_(given)
    return gated


def anything():
    """Coefficients of both signs, of float64."""
    drawn = torch.Generator().manual_seed(7)
    return {kind: torch.randn(kept.shape, generator=drawn, dtype=torch.float64) for kind, kept in UNITS.items()}


# ---- the gated network ----


def test_loss_and_gradients_are_the_released_codes(net, batch):
    gated = GatedNetwork(net)
    loss = gated(loss_of, batch) + gated.penalty(1e-4, 1e-4)
    loss.backward()
    assert loss.item() == pytest.approx(0.826544, abs=1e-6)
    heads, neurons = (gated.coefficients[kind].grad[0] for kind in ("heads", "neurons"))
    assert heads.tolist() == pytest.approx([-0.018626, -0.033875, 0.161048, -0.158354], abs=1e-6)
    assert neurons[:4].tolist() == pytest.approx([0.036642, -0.007775, -0.022534, 0.001570], abs=1e-6)


def test_each_penalty_is_the_sum_of_absolute_coefficients_of_its_kind(net):
    gated = set_to(GatedNetwork(net), {"heads": torch.full((3, 4), -2.0), "neurons": torch.full((3, 64), -0.5)})
    assert gated.penalty(0.1, 0.0).item() == pytest.approx(0.1 * 24)
    assert gated.penalty(0.0, 0.1).item() == pytest.approx(0.1 * 96)


def test_without_a_penalty_the_first_loss_and_gradients_are_fine_tunings_bit_for_bit(net, batch):
    plain = copy.deepcopy(net)
    expected = loss_of(plain, batch)
    expected.backward()
    gated = GatedNetwork(net)
    loss = gated(loss_of, batch) + gated.penalty(0.0, 0.0)
    loss.backward()
    assert torch.equal(loss, expected)
    for (name, p), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, other.grad), name
    assert all(c.grad.abs().min() > 0 for c in gated.coefficients.values())


def test_coefficients_of_zero_and_one_are_the_slim_network(net, batch):
    gated = set_to(GatedNetwork(net), UNITS)
    expected = gated(classify, batch)
    with slimmed(net, lower(UNITS, dict(net.named_parameters()))):
        torch.testing.assert_close(classify(net, batch), expected, rtol=0, atol=1e-12)


def test_a_folded_network_computes_what_the_gated_one_does(net, batch):
    gated = set_to(GatedNetwork(net), anything())
    expected, plain = gated(classify, batch), {name: p.detach().clone() for name, p in net.named_parameters()}
    gated.fold()
    torch.testing.assert_close(classify(net, batch), expected, rtol=0, atol=1e-12)
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, plain[name])}
    assert changed == {f"{LAYER}{layer}.{name}.weight" for layer in range(3) for name in (HEAD_OUTPUT, OUTER)}


def test_a_slim_network_has_coefficients_of_its_own_units_and_is_folded_dense(net, batch):
    """Those of removed units have no gradient and stay at 1."""
    mask = lower(UNITS, dict(net.named_parameters()))
    mask.apply(dict(net.named_parameters()))
    gated = set_to(GatedNetwork(net, UNITS), {kind: values.where(UNITS[kind], 1.0) for kind, values in anything().items()})
    with slimmed(net, mask):
        expected = gated(classify, batch)
        loss_of_slim = F.cross_entropy(expected, batch.labels)
        loss_of_slim.backward()
    for kind, values in gated.coefficients.items():
        assert torch.equal(values.grad != 0, UNITS[kind])
    gated.fold()
    torch.testing.assert_close(classify(net, batch), expected.detach(), rtol=0, atol=1e-12)
    assert not any(net.get_parameter(name)[~kept].any() for name, kept in mask.items())


# ---- training ----


def search(net, path, steps=6, weights=(0.0, 0.0), hooks=(), **settings):
    """Train the formula's network and its coefficients; returns these, and their record."""
    gated = GatedNetwork(net)
    record = Record(gated.coefficients, path)
    train(
        lambda batch: gated(loss_of, batch) + gated.penalty(*weights),
        {**dict(net.named_parameters()), **gated.params()},
        Batches(formula_store(), 4, 0),
        Training(lr=1e-2, max_steps=steps, **settings),
        hooks=[record, *hooks],
    )
    return gated.coefficients, record


def test_a_larger_penalty_ends_with_smaller_coefficients(tmp_path):
    means = {}
    for weight in (0.0, 0.01, 1.0):
        for name, weights in {"heads": (weight, 0.0), "neurons": (0.0, weight)}.items():
            found, _ = search(formula_net(), tmp_path / "record", weights=weights)
            means[name, weight] = {kind: values.mean().item() for kind, values in found.items()}
    for name, other in (("heads", "neurons"), ("neurons", "heads")):
        assert means[name, 1.0][name] < means[name, 0.01][name] < means[name, 0.0][name]
        assert means[name, 1.0][other] > means[name, 1.0][name]


def test_weight_decay_does_not_reach_coefficients(tmp_path):
    step = Step(loss_of, {**dict(formula_net().named_parameters()), **GatedNetwork(formula_net()).params()},
                Training(weight_decay=0.1), None, CPU)  # fmt: skip
    decays = {name: group["weight_decay"] for group in step.optimizer.param_groups for p in group["params"]
              for name, own in step.params.items() if own is p}  # fmt: skip
    assert decays.keys() == step.params.keys()
    for name, decay in decays.items():
        assert decay == (0.0 if name.endswith("bias") or "LayerNorm" in name or "coefficient" in name else 0.1), name


# ---- the record ----


@pytest.mark.parametrize("flush", [1, 4, 64])
def test_each_step_is_recorded_after_its_update(net, tmp_path, monkeypatch, flush):
    """Whatever the number of rows that wait on the device; no two rows are the same tensor's."""
    monkeypatch.setattr(coefficients, "FLUSH", flush)
    seen = []

    class Copy(coefficients.Hook):
        def __call__(self, loop):
            seen.append(torch.cat([loop.step.params[f"coefficient.{kind}"].detach().flatten() for kind in UNITS]).numpy().copy())

    found, record = search(net, tmp_path / "record", hooks=[Copy()])
    record.write(tmp_path / "coefficients.npy")
    rows = np.load(tmp_path / "coefficients.npy", mmap_mode="r")
    assert (rows.shape, rows.dtype) == ((6, 3 * 4 + 3 * 64), np.float32)
    assert np.array_equal(rows, np.stack(seen).astype(np.float32))
    assert all(not np.array_equal(rows[i], rows[i + 1]) for i in range(5))
    for kind, values in found.items():
        assert torch.equal(record.after(6)[kind], values.float())
        assert torch.equal(record.after(0)[kind], torch.ones(values.shape))
    second = torch.from_numpy(seen[1]).float().split([12, 192])
    for values, expected in zip(record.after(2).values(), second, strict=True):
        assert torch.equal(values.flatten(), expected)


def test_a_step_does_not_read_the_record_from_the_device(net, tmp_path, monkeypatch):
    """The file grows every FLUSH steps alone."""
    monkeypatch.setattr(coefficients, "FLUSH", 4)
    sizes = []

    class Size(coefficients.Hook):
        def __call__(self, loop):
            path = tmp_path / "record"
            sizes.append(path.stat().st_size // (204 * 4) if path.exists() else 0)

    search(net, tmp_path / "record", steps=9, hooks=[Size()])
    assert sizes == [0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_a_loop_ends_where_it_is_asked_to(net, tmp_path):
    """It is asked every so many steps alone."""
    asked = []

    def ask(step):
        asked.append(step)
        return step == 6

    _, record = search(net, tmp_path / "record", steps=20, hooks=[StopWhen(3, ask)])
    assert asked == [3, 6]
    assert len(record.rows()) == 6
    asked.clear()
    search(net, tmp_path / "record", steps=4, hooks=[StopWhen(3, ask)])
    assert asked == [3]  # not after the last step
