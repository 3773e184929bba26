"""Masks of heads, MLPs and neurons: lowered and read back, equal to gates, and their sizes under every denominator."""

import copy
from statistics import mean

import pytest
import torch
from formula_net import formula_batch, formula_net
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.gates import Gates
from bert_tickets.modeling.parameters import prunable
from bert_tickets.modeling.units import all_units, effective_weights, emptied_layers, lower, read_units, sizes

BOTH = "heads+mlps"


@pytest.fixture
def net():
    return formula_net()


def some_units(net, which=BOTH, seed=0):
    """Units of which about half are pruned: the last layer has no head left."""
    generator = torch.Generator().manual_seed(seed)
    units = {kind: torch.rand(kept.shape, generator=generator) < 0.5 for kind, kept in all_units(net.config, which).items()}
    if "heads" in units:
        units["heads"][-1] = False
    return Mask(units)


def bert_base(labels):
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(num_labels=labels))


# ---- lowering ----


@pytest.mark.parametrize("which", ["heads", "mlps", "neurons", BOTH, "heads+neurons"])
@pytest.mark.parametrize("empty_bias", ["keep", "drop"])
def test_units_are_read_back_as_they_were_lowered(net, tmp_path, which, empty_bias):
    units, weights = some_units(net, which), dict(net.named_parameters())
    lowered = lower(units, weights, empty_bias)
    lowered.check_fits(weights, "the network", partly=True)
    lowered.write(tmp_path / "mask.safetensors")
    found = Mask.load(tmp_path / "mask.safetensors")
    assert found == lowered
    assert read_units(found) == units
    assert lower(read_units(found), found, empty_bias) == lowered  # a mask gives the shapes too


def test_a_head_is_kept_if_any_of_its_columns_is(net):
    mask = Mask(dict(Mask.ones(prunable(net, "matrices"))), {"units": "heads", "heads": 4})
    columns = mask["bert.encoder.layer.1.attention.output.dense.weight"]
    columns[:, 8:16] = False  # the second head
    assert read_units(mask)["heads"].tolist() == [[True] * 4, [True, False, True, True], [True] * 4]
    columns[3, 9] = True
    assert read_units(mask)["heads"].all()


def test_masks_without_units_are_named(net):
    with pytest.raises(UserError, match="not one of heads, neurons or MLPs"):
        read_units(Mask.ones(prunable(net)))
    with pytest.raises(UserError, match=r"does not cover bert.encoder.layer.0.output.dense.bias: it has no mlps"):
        read_units(Mask(dict(Mask.ones(prunable(net))), {"units": "mlps", "heads": 4}))
    units = Mask({"heads": torch.tensor([[True, False], [False, False]]), "mlps": torch.tensor([False, False])})
    assert emptied_layers(units) == ["no heads left in layer 1"]


def test_only_a_layer_without_heads_loses_its_output_bias(net):
    weights = dict(net.named_parameters())
    kept, dropped = (lower(some_units(net), weights, empty_bias) for empty_bias in ("keep", "drop"))
    more = {name: bool(mask.any()) for name, mask in dropped.items() if name not in kept}
    assert more == {f"bert.encoder.layer.{i}.attention.output.dense.bias": i < 2 for i in range(3)}
    logits = []
    for mask in (kept, dropped):
        masked = copy.deepcopy(net)
        mask.apply(dict(masked.named_parameters()))
        logits.append(classify(masked, formula_batch()))
    assert not torch.allclose(*logits, atol=1e-3)


# ---- gates ----


def test_gates_of_zero_and_one_equal_the_lowered_mask(net):
    batch, units = formula_batch(), some_units(net)
    plain = classify(net, batch)
    assert torch.equal(classify(net, batch, Gates.of(all_units(net.config, BOTH), net, 8)), plain)
    gated = classify(net, batch, Gates.of(units, net, 8))
    lower(units, dict(net.named_parameters())).apply(dict(net.named_parameters()))
    torch.testing.assert_close(classify(net, batch), gated, rtol=0, atol=1e-13)
    assert not torch.allclose(plain, gated)


class Classifier(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return classify(self.net, batch)


@pytest.mark.parametrize("pruned", [False, True])
def test_effective_weights_equal_gated_activations_with_their_gradients(net, pruned):
    """For any values of the gates; the gradient of a gate at zero is there too. Of a batch it is the sum over the examples."""
    batch, units = formula_batch(), some_units(net) if pruned else all_units(net.config, BOTH)
    gates = Gates.of(units, net, 8)
    logits = classify(net, batch, gates)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    values = {kind: kept.double().requires_grad_() for kind, kept in units.items()}
    effective = effective_weights(values, dict(net.named_parameters()))
    weighted = functional_call(Classifier(net), {f"net.{name}": w for name, w in effective.items()}, (batch,))
    torch.testing.assert_close(weighted, logits, rtol=0, atol=1e-13)
    other = torch.autograd.grad(torch.nn.functional.cross_entropy(weighted, batch.labels, reduction="sum"), [*values.values()])
    for by_example, together in zip(gates.gradients(loss), other, strict=True):
        torch.testing.assert_close(by_example.sum(0), together, rtol=0, atol=1e-12)
        assert (together[~units["heads"] if together.dim() == 2 else ~units["mlps"]] != 0).all()


def test_a_neurons_gate_multiplies_its_activation(net):
    batch, values = formula_batch(), torch.rand(3, 64, dtype=torch.float64)
    effective = effective_weights(
        {"neurons": values, "mlps": torch.full((3,), 0.5, dtype=torch.float64)}, dict(net.named_parameters())
    )
    weighted = functional_call(net, effective, (batch.input_ids[:, :6],)).logits
    for layer, row in zip(net.bert.encoder.layer, values, strict=True):
        layer.output.dense.register_forward_pre_hook(lambda _, inputs, row=row: (inputs[0] * row,))
        layer.output.dense.register_forward_hook(lambda _, inputs, output: output * 0.5)
    torch.testing.assert_close(net(batch.input_ids[:, :6]).logits, weighted, rtol=0, atol=1e-13)


def test_the_gradient_of_a_gate_is_the_finite_difference(net):
    batch = formula_batch()

    def losses(gates):
        logits = classify(net, batch, gates)
        return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")

    gates = Gates.of(some_units(net), net, 8)
    found = gates.gradients(losses(gates).sum())
    for place, index, gradients in ((gates.heads[1], 2, found[0][:, 1, 2]), (gates.mlps[0], 0, found[1][:, 0])):
        sides = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                place[:, index] += step
                sides.append(losses(gates))
        torch.testing.assert_close((sides[0] - sides[1]) / 2e-6, gradients, rtol=0, atol=1e-6)


# ---- sizes ----

# Labels, heads/MLPs of the published good masks by seed, and the percentage that they keep (Prasanna et al. 2020, [masks]).
GOOD = {
    "mnli": (3, "95/9 102/9 95/9 88/7 95/8", 54.7),
    "qnli": (2, "81/9 95/9 88/9 74/9 88/8", 54.6),
    "rte": (2, "18/11 116/11 74/7 74/8 88/9", 54.3),
    "mrpc": (2, "88/8 81/9 95/11 81/9 102/9", 57.1),
    "qqp": (2, "67/8 67/9 88/9 102/9 67/8", 52.5),
    "sst2": (2, "88/8 74/7 67/8 60/9 46/7", 47.0),
    "cola": (2, "95/11 81/12 116/10 102/11 67/10", 64.5),
    "stsb": (1, "74/8 74/7 81/8 88/5 67/9", 47.1),
    "wnli": (2, "0/0 0/0 144/0 0/0 0/0", 6.5),
}
TOTAL = {1: 109_483_009, 2: 109_483_778, 3: 109_484_547}  # parameters of BERT-base with so many labels


def gone_of(heads, mlps, emptied):
    """Count the parameters that are gone with all but so many units, and the output biases of emptied layers."""
    return 196_800 * (144 - heads) + 4_722_432 * (12 - mlps) + 768 * emptied


@pytest.mark.parametrize(("heads", "mlps", "emptied"), [(18, 11, 1), (95, 9, 0), (0, 0, 12)])
def test_sizes_of_bert_base_are_exact(heads, mlps, emptied):
    weights, kept = dict(bert_base(3).named_parameters()), torch.zeros(12, 12, dtype=torch.bool)
    for i in range(heads):
        kept[i % (12 - emptied), i // (12 - emptied)] = True
    size = sizes(lower(Mask({"heads": kept, "mlps": torch.arange(12) < mlps}), weights, "drop"), weights)
    assert (size["heads_kept"], size["heads"], size["mlps_kept"], size["mlps"]) == (heads, 144, mlps, 12)
    gone = gone_of(heads, mlps, emptied)
    assert (size["all"], size["all"] - size["all_kept"]) == (TOTAL[3], gone)
    assert size["encoder_layers"] - size["encoder_layers_kept"] == size["covered"] - size["covered_kept"] == gone
    assert size["bertplays_percent"] == pytest.approx(100 * (1 - gone / TOTAL[3]) - 21)


@pytest.mark.parametrize("task", GOOD)
def test_the_published_counts_give_the_published_sizes(task):
    labels, masks, percent = GOOD[task]
    found = []
    for heads, mlps in (map(int, mask.split("/")) for mask in masks.split()):
        emptied = 12 if heads == 0 else (heads, mlps) == (18, 11)  # RTE's first mask has a layer without heads
        found.append(100 * (1 - gone_of(heads, mlps, emptied) / TOTAL[labels]) - 21)
    assert round(mean(found), 1) == percent


def test_the_denominators_of_bert_base():
    for labels, total in TOTAL.items():
        weights = dict(bert_base(labels).named_parameters())
        full = sizes(Mask({}), weights)
        assert (full["all"], full["encoder_layers"], full["embeddings"]) == (total, 85_054_464, 23_837_184)
    assert full["bertplays_percent"] == pytest.approx(79)
    for kept, percent in ((0.513, 41), (0.636, 51), (0.436, 35)):  # of magnitude pruning, as printed
        assert round(100 * ((kept * 85_008_384 + total - 85_008_384) / total - 0.21)) == percent
