"""Importance against values of the released code, and what it depends on (Prasanna et al. 2020)."""

import pytest
import torch
from formula_net import formula_net, formula_store
from torch.nn.functional import cross_entropy

from bert_tickets.masking.importance import accumulate, normalize
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.gates import Gates
from bert_tickets.modeling.units import all_units


@pytest.fixture(scope="module")
def gradients():
    """The gradients of each example's loss: of the heads [8, 3, 4] and of the MLPs [8, 3]."""
    net, batch = formula_net(), formula_store().batch(torch.arange(8))
    gates = Gates.of(all_units(net.config, "heads+mlps"), net, 8)
    logits = classify(net, batch, gates)
    assert logits[0].tolist() == pytest.approx([-1.678988, -1.251366], abs=1e-6)
    assert cross_entropy(logits, batch.labels).item() == pytest.approx(0.806144, abs=1e-6)
    return gates.gradients(cross_entropy(logits, batch.labels, reduction="sum"))


RAW = {  # of the heads of layer 0, and of the MLPs; reference and batch: of two batches of 4
    "example": ([1.719231, 0.519059, 2.362478, 1.322039], [1.399564, 2.271302, 0.794947]),
    "batch": ([0.181499, 0.089985, 0.321895, 0.316908], None),
    "reference": ([0.109475, 0.078968, 0.492379, 0.498474], [0.156208, 0.125564, 0.036130]),
}
NORMALIZED = {
    "example": [[0.4712, 0, 0.7238, 0.3153], [0.5446, 0.1261, 0.7173, 0.1275], [0.0518, 0.0493, 1, 0.0167]],
    "reference": [[0.1282, 0.068, 0.8837, 0.8958], [0.4663, 0, 0.6079, 1], [0.515, 0.5185, 0.8361, 0.5427]],
}
ORDER = {"example": [1, 11, 9, 8, 5, 7], "reference": [5, 1, 0, 4, 8, 9]}


@pytest.mark.parametrize("how", RAW)
def test_importances_are_those_of_the_released_code(gradients, how):
    heads, mlps = (accumulate(found, how, 4) for found in gradients)
    assert heads[0].tolist() == pytest.approx(RAW[how][0], abs=1e-6)
    if RAW[how][1]:
        assert mlps.tolist() == pytest.approx(RAW[how][1], abs=1e-6)
    if how in NORMALIZED:
        normalized = normalize(heads, by_layer=True)
        torch.testing.assert_close(normalized, torch.tensor(NORMALIZED[how], dtype=torch.float64), rtol=0, atol=5.1e-5)
        assert normalized.flatten().argsort()[:6].tolist() == ORDER[how]


def test_only_examples_do_not_depend_on_batches_and_order(gradients):
    heads, turned = gradients[0], gradients[0].roll(1, 0)
    for how in RAW:
        same = [
            torch.allclose(accumulate(heads, how, 4), other) for other in (accumulate(heads, how, 3), accumulate(turned, how, 4))
        ]
        assert same == [how == "example"] * 2


def test_a_last_batch_that_is_not_full_is_a_mean_too():
    assert accumulate(torch.tensor([[1.0], [3.0], [-5.0]]), "batch", 2).item() == 2 + 5
    assert accumulate(torch.tensor([[1.0], [3.0], [-5.0]]), "reference", 2).item() == 2 + 3


def test_normalization_ends_at_zero_and_one_and_of_equal_values_at_zero():
    raw = torch.tensor([[1.0, 3.0], [20.0, 20.0]])
    assert normalize(raw, by_layer=False).tolist() == [[0, pytest.approx(2 / 19)], [1, 1]]
    by_layer = normalize(raw, by_layer=True)
    assert (by_layer.min(), by_layer.max()) == (0, 1)
    assert by_layer[0, 1] == 1
    assert normalize(torch.ones(3), by_layer=False).tolist() == [0, 0, 0]
