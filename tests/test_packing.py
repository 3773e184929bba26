"""A packed batch is the padded batch without the padding: same logits, same loss, same gradients, same examples."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_tickets.attention import Dropout, drop
from bert_tickets.batches import Batches, TokenStore, order, seeded
from bert_tickets.models import classify, load_classifier
from bert_tickets.tokens import Tokens
from bert_tickets.train import evaluate

CPU = torch.device("cpu")


def store_of(lengths: list[int], vocabulary: int = 100) -> TokenStore:
    rng = np.random.default_rng(len(lengths))
    ids = [rng.integers(5, vocabulary, n).tolist() for n in lengths]
    types = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    return TokenStore(Tokens.of(ids, types), rng.integers(0, 3, len(lengths)))


def padded(store: TokenStore, examples: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same examples as Hugging Face pads them."""
    lengths = store.lengths[examples.numpy()]
    inputs = {key: torch.zeros(len(lengths), lengths.max(), dtype=torch.long) for key in ("input_ids", "token_type_ids")}
    for row, (example, length) in enumerate(zip(examples.tolist(), lengths, strict=True)):
        batch = store.batch(torch.tensor([example]))
        for key in inputs:
            inputs[key][row, :length] = getattr(batch, key)[0]
    inputs["attention_mask"] = (torch.arange(lengths.max()) < torch.from_numpy(lengths)[:, None]).long()
    return inputs


@pytest.fixture
def net(bert_dir):
    return load_classifier(str(bert_dir), 3, "pretrained", 0)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("lengths", [[3, 17, 9, 64], [12, 12, 12], [40]])
def test_packed_equals_padded_in_logits_loss_and_gradients(net, dtype, tolerance, lengths):
    store, examples = store_of(lengths), torch.randperm(len(lengths))
    net = net.to(dtype).eval()
    batch = store.batch(examples)
    loss = F.cross_entropy(packed := classify(net, batch), batch.labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()

    net.set_attn_implementation("eager")
    logits = net(**padded(store, examples)).logits
    expected = F.cross_entropy(logits, store.labels[examples])
    expected.backward()
    torch.testing.assert_close(packed, logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance)
    for name, p in net.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=tolerance, msg=name)


def test_attention_in_training_is_softmax_attention_with_dropout_on_its_weights(net, monkeypatch):
    """With the draws made to keep everything, training attention equals evaluation's."""
    store = store_of([5, 30, 11])
    batch = store.batch(torch.arange(3))
    net.eval()
    expected = classify(net, batch)
    monkeypatch.setattr("bert_tickets.attention.drop", lambda x, p: x)
    torch.testing.assert_close(classify(net.train(), batch), expected, rtol=0, atol=1e-5)


def test_examples_of_a_batch_do_not_see_each_other(net):
    net.eval()
    store = store_of([9, 30, 4, 22])
    together = classify(net, store.batch(torch.arange(4)))
    for example in range(4):
        alone = classify(net, store.batch(torch.tensor([example])))
        torch.testing.assert_close(together[example : example + 1], alone, rtol=0, atol=1e-5)


def test_dropout_drops_the_share_asked_for_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1_000_003, requires_grad=True)
    y = drop(x, 0.1)
    y.sum().backward()
    share = (y == 0).float().mean().item()
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / x.numel())
    assert abs(y.mean().item() - 1) < 0.002
    assert torch.equal(y.detach(), x.grad)  # the backward uses the forward's draws
    assert len(y.unique()) == 2


def test_dropout_follows_the_seed_and_rests_in_evaluation():
    layer, x = Dropout(0.5), torch.ones(999)
    first, second = (torch.manual_seed(3) and layer(x) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, layer(x))
    assert layer.eval()(x) is x


@given(count=st.integers(1, 70), batch_size=st.integers(1, 33), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_example_exactly_once(count, batch_size, seed, epoch):
    store = TokenStore(Tokens.of([[i] for i in range(count)], [[0]] * count), np.arange(count))
    batches = Batches(store, batch_size, seed)
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    seen = torch.cat([batches[step].labels for step in steps])
    assert sorted(seen.tolist()) == list(range(count))
    assert torch.equal(seen, order(count, seed, epoch))


def test_a_batch_depends_on_its_step_alone():
    store = store_of([4] * 50)
    forward, jumping = Batches(store, 8, 1), Batches(store, 8, 1)
    expected = [forward[step].input_ids for step in range(14)]
    for step in (13, 0, 6, 7, 12):
        assert torch.equal(jumping[step].input_ids, expected[step])
    assert not torch.equal(Batches(store, 8, 2)[0].input_ids, expected[0])


def test_streams_of_different_purposes_differ():
    draws = [torch.rand(4, generator=seeded(*key)) for key in [(1, "order"), (1, "head"), (2, "order"), (1, "order", 0)]]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), most=st.integers(40, 200))
@settings(max_examples=40, deadline=None)
def test_evaluation_packs_hold_every_example_once_within_the_limit(lengths, most):
    store, seen = store_of(lengths), []
    for indices, batch in store.by_length(most):
        seen += indices.tolist()
        assert batch.shape[0] * batch.shape[1] <= most
    assert sorted(seen) == list(range(len(lengths)))


def test_evaluation_returns_the_order_of_the_store(net):
    net.eval()
    store = store_of([9, 30, 4, 22, 61, 5] * 20)
    expected = torch.cat([classify(net, store.batch(torch.tensor([i]))) for i in range(len(store))])
    net.train()
    logits = evaluate(net, lambda batch: classify(net, batch), store, "fp32")
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5)
    assert net.training


def test_a_store_knows_its_content():
    same, other = store_of([4, 5]), store_of([4, 6])
    assert same.sha256 == store_of([4, 5]).sha256 != other.sha256
