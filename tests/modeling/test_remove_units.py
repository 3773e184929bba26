"""Heads and neurons that are removed for good: what a model of transformers computes, and what its modules say."""

import torch
from formula_net import formula_batch
from golden import padded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_slim import SOME, net_of, rows, unit_mask

from bert_tickets.modeling.slim import remove_units


@given(st.lists(rows(4), min_size=3, max_size=3), rows(3), st.sampled_from([0.0, 0.4, 1.0]), st.booleans())
@example(heads=[[False] * 4] * 3, mlps=[False] * 3, density=1.0, drop=False)
@example(heads=SOME, mlps=[True, False, True], density=0.4, drop=True)
@settings(max_examples=25, deadline=None)
def test_a_model_of_transformers_without_units_computes_what_it_computed_with_zeros(heads, mlps, density, drop):
    """By its own forward pass, with padding: logits and gradients."""
    net, mask = net_of(), unit_mask(heads, mlps, density, "drop" if drop else "keep")
    mask.apply(dict(net.named_parameters()))
    inputs = padded(formula_batch())
    assert 0 < inputs["attention_mask"].double().mean() < 1
    expected = own_gradients(net, inputs)
    remove_units(net, mask)
    left = dict(net.named_parameters())
    for name, gradient in own_gradients(net, inputs).items():
        kept = mask.get(name)
        of_masked = expected[name].flatten() if kept is None else expected[name][kept]
        torch.testing.assert_close(gradient.flatten(), of_masked, rtol=0, atol=1e-12, msg=name)
    for name, kept in mask.items():
        if kept.any():
            assert left[name].numel() == kept.count_nonzero(), name
        else:  # gone, or the output's bias of an MLP that is gone, which stays zero
            assert name not in left or (name.endswith("output.dense.bias") and not left[name].requires_grad), name


def own_gradients(net, inputs):
    """The logits of a model of transformers, and the gradients of its trained parameters."""
    net.zero_grad()
    found = net(**inputs)
    (found.logits * torch.linspace(-1, 1, found.logits.numel()).view_as(found.logits)).sum().backward()
    return {"logits": found.logits.detach()} | {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def test_modules_say_their_new_sizes_and_frozen_parameters_stay_frozen():
    net = net_of()
    net.bert.encoder.layer[0].requires_grad_(False)
    remove_units(net, unit_mask(SOME, [True, False, True]))
    for name, linear in net.named_modules():
        if isinstance(linear, torch.nn.Linear):
            assert linear.weight.shape == (linear.out_features, linear.in_features), name
    first, second, third = net.bert.encoder.layer
    assert (first.attention.self.num_attention_heads, third.attention.self.all_head_size) == (3, 16)
    assert not any(p.requires_grad for p in first.parameters())
    assert [name for name, p in second.named_parameters() if not p.requires_grad] == ["output.dense.bias"]
    assert all(p.requires_grad and p.is_leaf for p in third.parameters())
