"""Arithmetic counted by formula equals that of the matrix products that run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formula_net import LENGTHS, formula_batch, formula_net
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.flops import forward_flops
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.slim import slimmed
from bert_tickets.modeling.units import all_units, lower


def test_the_count_is_that_of_the_products_of_a_slim_network():
    """torch counts the same of one example at a time, where attention has no padding. Layers are unequal, one has no heads."""
    net = formula_net()
    units = Mask({
        "heads": torch.tensor([[True, False, True, True], [False] * 4, [True] * 4]),
        "neurons": torch.arange(64) < torch.tensor([[10], [64], [3]]),
    })  # fmt: skip
    batch = formula_batch()
    with slimmed(net, lower(units, dict(net.named_parameters()))):
        expected, counted = classify(net, batch), 0
        for i, ids in enumerate(batch.input_ids.split(LENGTHS, 1)):
            with FlopCounterMode(display=False) as counter:
                logits = alone(net, ids)
            counted += counter.get_total_flops()
            torch.testing.assert_close(logits, expected[i : i + 1])
        assert forward_flops(net, np.array(LENGTHS)) == counted
    assert counted > forward_flops(net, np.array(LENGTHS), units=units) > 0.9 * counted  # slim layers have multiples of 8 neurons


def alone(net, ids):
    """The logits of one example, in plain products."""
    hidden, size = net.bert.embeddings(input_ids=ids)[0], net.config.hidden_size // net.config.num_attention_heads
    for layer in net.bert.encoder.layer:
        at, heads = layer.attention.self, layer.attention.self.num_attention_heads
        if heads:
            q, k, v = (x(hidden).view(-1, heads, size).transpose(0, 1) for x in (at.query, at.key, at.value))
            context = ((q @ k.transpose(1, 2) / size**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        else:
            context = hidden[:, :0]
        hidden = layer.attention.output(context, hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return net.classifier(net.bert.pooler(hidden[None]))


def test_a_ticket_of_bert_base_has_the_derived_share_of_the_layers_products():
    """48 heads and 14,746 neurons are 37.7 % of them at length 128."""
    config, lengths = BertConfig(), np.full(32, 128)
    full = all_units(config, "heads+neurons")
    ticket = Mask({kind: kept.clone() for kind, kept in full.items()})
    ticket["heads"][:, :4] = False
    ticket["neurons"].view(-1)[:14746] = False
    net = SimpleNamespace(config=config, qa_outputs=SimpleNamespace(out_features=0))  # without a head
    assert forward_flops(net, lengths, units=full) == 2 * 12 * 32 * (128 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 128**2 * 768)
    assert 1 - forward_flops(net, lengths, units=ticket) / forward_flops(net, lengths, units=full) == pytest.approx(
        0.377, abs=5e-4
    )


@pytest.mark.parametrize(
    ("head", "own"),
    [("classifier", 2 * 3 * 32 * (32 + 2)), ("qa", 2 * 24 * 32 * 2), ("mlm", None)],
)
def test_heads_of_tasks_are_counted(bert_dir, head, own):
    net, lengths = load_bert(str(bert_dir), head, "pretrained", 0)[0], np.array([7, 8, 9])
    none = Mask({kind: torch.zeros_like(kept) for kind, kept in all_units(net.config, "heads+neurons").items()})
    expected = 2 * 5 * 32 * (32 + net.config.vocab_size) if own is None else own
    assert forward_flops(net, lengths, 5, none) == expected
    assert forward_flops(net, lengths, 5) > expected
