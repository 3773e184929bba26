"""Packed batches have the logits, loss, gradients and examples of padded ones."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import store_of
from golden import padded
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_tickets.data.batches import Batches, TokenStore, by_length, order
from bert_tickets.data.token_cache import Tokens
from bert_tickets.modeling.attention import SIMILAR, _Attention, by_similar_length, layout
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.dropout import Dropout, factors
from bert_tickets.training.evaluate import evaluate


@pytest.mark.parametrize("lengths", [[3, 17, 9, 64], [12, 12, 12]])
def test_packed_equals_padded_in_logits_loss_and_gradients(net, lengths):
    net = net.to(torch.float64).eval()
    batch = store_of(lengths).batch(torch.randperm(len(lengths)))
    loss = F.cross_entropy(packed := classify(net, batch), batch.labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()

    net.set_attn_implementation("eager")
    logits = net(**padded(batch)).logits
    expected = F.cross_entropy(logits, batch.labels)
    expected.backward()
    torch.testing.assert_close(packed, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for name, p in net.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=1e-10, msg=name)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_attention_with_dropout_and_its_gradients_equal_the_definition(lengths, seed):
    """softmax(q k^T scale), times the factors of dropout, times v: for each example, in fp64."""
    heads, width, p, scale = 3, 4, 0.25, 0.7
    batch = store_of(lengths).batch(torch.arange(len(lengths)))
    torch.manual_seed(seed)
    q, k, v, upstream = torch.randn(4, sum(lengths) * heads, width, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    grid = layout(batch, heads, width, torch.float64)
    assert all(block.shortest >= SIMILAR * block.shape[2] for block in grid.blocks)  # little padding
    torch.manual_seed(seed)
    out = _Attention.apply(*inputs, grid, p, scale)
    out.backward(upstream)

    torch.manual_seed(seed)
    expected, again = torch.empty_like(q), [x.clone().requires_grad_() for x in (q, k, v)]
    rows = [x.view(-1, heads, width).split(lengths) for x in again]
    pieces = [None] * len(lengths)
    for group in by_similar_length(batch.lengths):
        longest = max(lengths[i] for i in group)
        draws = factors(q.new_empty(len(group), heads, longest, longest), p)
        for i, drawn in zip(group, draws, strict=True):
            query, key, value = (x[i].transpose(0, 1) for x in rows)
            weights = torch.softmax(query @ key.mT * scale, -1) * drawn[:, : lengths[i], : lengths[i]]
            pieces[i] = (weights @ value).transpose(0, 1).reshape(-1, width)
    expected = torch.cat(pieces)
    expected.backward(upstream)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(inputs, again, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def test_joined_query_key_and_value_equal_separate_ones(net, monkeypatch):
    """In bf16, in loss and gradients, with weights large enough that attention is not uniform."""
    with torch.no_grad():
        for p in net.eval().bert.encoder.parameters():
            p.mul_(2)
    batch, found = store_of([9, 30, 4, 22]).batch(torch.arange(4)), []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr("bert_tickets.modeling.bert.cast_weights", lambda encoder, dtype: contextlib.nullcontext({}))
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(classify(net, batch), batch.labels)
        loss.backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in net.named_parameters()}))
    (loss, gradients), (expected, separate) = found
    assert loss == pytest.approx(expected, rel=1e-3)
    for name, gradient in gradients.items():
        if not name.endswith("key.bias"):  # it has no effect: its gradient is rounding error
            assert (gradient - separate[name]).norm() < 0.03 * separate[name].norm(), name


def test_dropout_has_its_rate_keeps_the_mean_and_follows_the_seed():
    layer, x = Dropout(0.1), torch.ones(1_000_003, requires_grad=True)
    first, second = (torch.manual_seed(3) and layer(x) for _ in range(2))
    assert torch.equal(first, second)
    first.sum().backward()
    assert torch.equal(first.detach(), x.grad)  # the backward pass uses the same factors
    assert abs((first == 0).float().mean().item() - 0.1) < 4 * math.sqrt(0.09 / x.numel())
    assert abs(first.mean().item() - 1) < 0.002
    assert len(first.unique()) == 2
    assert layer.eval()(x) is x


@given(count=st.integers(1, 70), batch_size=st.integers(1, 33), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_example_exactly_once(count, batch_size, seed, epoch):
    store = TokenStore(Tokens.of([[i] for i in range(count)], [[0]] * count), np.arange(count))
    batches = Batches(store, batch_size, seed)
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    seen = torch.cat([batches.parts(step)[0].labels for step in steps])
    assert sorted(seen.tolist()) == list(range(count))
    assert torch.equal(seen, order(count, seed, epoch))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), most=st.integers(40, 200))
@settings(max_examples=40, deadline=None)
def test_evaluation_batches_have_every_example_once_within_the_limit(lengths, most):
    store, seen = store_of(lengths), []
    for indices, batch in by_length(store, most):
        seen += indices.tolist()
        assert len(batch.lengths) * batch.longest <= most
    assert sorted(seen) == list(range(len(lengths)))


def test_evaluation_returns_rows_in_the_order_of_the_store(net):
    store, net = store_of([9, 30, 4, 22, 61, 5] * 20), net.eval()
    expected = [classify(net, store.batch(torch.tensor([i])))[0].tolist() for i in range(len(store))]
    logits = evaluate(net.train(), lambda batch: classify(net, batch), store, "fp32")
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert net.training
    found = evaluate(net, lambda batch: torch.stack([batch.input_ids[0], batch.position_ids[0]], 1), store, "fp32", "token")
    everything = store.batch(torch.arange(len(store)))
    assert np.array_equal(found, torch.stack([everything.input_ids[0], everything.position_ids[0]], 1).numpy())
    loose = evaluate(net, lambda batch: batch.input_ids[0], store, "fp32", "any")
    assert sorted(loose) == sorted(found[:, 0])
