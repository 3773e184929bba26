"""Bucketed batches change nothing, and a captured step is the eager step or is refused. On a CPU, with a stand-in
for the capture that runs the step again on the batch it was given; the capture itself is tested on CUDA."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_tickets import UserError
from bert_tickets.batches import Batches, TokenStore
from bert_tickets.bert import classify
from bert_tickets.config import Training
from bert_tickets.graphs import bucket_of, tensors
from bert_tickets.mask import Mask
from bert_tickets.models import load_bert, prunable
from bert_tickets.prune import magnitude, prune
from bert_tickets.step import Step
from bert_tickets.tokens import Tokens


def store_of(lengths, device="cpu"):
    rng = np.random.default_rng(len(lengths))
    ids = [rng.integers(5, 100, n).tolist() for n in lengths]
    types = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    return TokenStore(Tokens.of(ids, types), rng.integers(0, 2, len(lengths)), device)


@pytest.fixture
def net(bert_dir):
    return load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].train()


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=20), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_bucketed_batch_holds_the_same_tokens_and_rounds_the_shapes_up(lengths, seed):
    store = store_of(lengths)
    examples = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    plain, bucketed = store.batch(examples), store.batch(examples, bucketed=True)
    tokens = sum(lengths)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(bucketed, name)[:, :tokens], getattr(plain, name))
    for name in ("starts", "lens", "labels"):
        assert torch.equal(getattr(bucketed, name), getattr(plain, name))
    assert bucketed.input_ids.shape[1] == tokens + bucketed.spare
    assert bucketed.spare < max(32, tokens / 8)
    assert plain.longest <= bucketed.longest <= max(lengths)
    spare = slice(tokens, None)
    assert (bucketed.position_ids[0, spare] >= bucketed.lens[bucketed.rows[spare]]).all()  # where attention pads


@pytest.mark.parametrize("lengths", [[3, 17, 9, 64, 33], [12, 12, 12, 50], [40, 40], [7]])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bucketing_changes_neither_loss_nor_gradients(net, lengths, dropout, monkeypatch):
    store, examples = store_of([*lengths, 64]), torch.arange(len(lengths))
    net = net.double()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in net.bert.encoder.layer:  # draws of other shapes are other draws: this much of them is tested as ones
        layer.attention.self.dropout.p = dropout
    monkeypatch.setattr("bert_tickets.dropout.factors", lambda like, p, shape, part: like.new_ones(shape))
    found = []
    for bucketed in (False, True):
        batch = store.batch(examples, bucketed=bucketed)
        loss = F.cross_entropy(classify(net, batch), batch.labels)
        net.zero_grad()
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}))
    assert batch.spare or lengths in ([40, 40], [7])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def run_again(take):
    """A stand-in for a capture: the replay runs the step on the batch it was captured with."""
    loss = torch.zeros(())

    def replay():
        run_again.replays += 1
        loss.copy_(take())

    return replay, loss


def steps_of(net, store, *, record=run_again, precision="fp32"):
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.4)
    mask.apply(prunable(net))
    cfg = Training(lr=1e-3, precision=precision, graphs=True)
    step = Step(
        lambda b: F.cross_entropy(classify(net, b).float(), b.labels),
        dict(net.named_parameters()),
        cfg,
        mask.to(store.device),
        store.device,
        record,
    )
    return step, Batches(store, 8, 0, bucketed=True)


def train(step, batches, count):
    losses = []
    for i in range(count):
        torch.manual_seed(i)
        losses.append(step(batches[i], 1e-3 * (1 - i / count)))
    return torch.stack(losses)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_run_equals_an_eager_one_bit_for_bit(bert_dir, precision):
    store, found = store_of([9 + 7 * (n % 5) for n in range(60)]), []
    run_again.replays = 0
    for graphs in (True, False):
        net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].train()
        step, batches = steps_of(net, store, precision=precision)
        if not graphs:
            step.graphs = None  # the same optimiser, every step eager
        found.append((train(step, batches, 16), [p.detach().clone() for p in net.parameters()]))
    assert run_again.replays > 4
    (losses, weights), (expected_losses, expected) = found
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_bucket_is_captured_when_it_comes_back(net):
    store, captured = store_of([20] * 40), []

    def record(take):
        captured.append(1)
        return run_again(take)

    step, batches = steps_of(net, store, record=record)
    counts = []
    for i in range(5):
        step(batches[i], 1e-3)
        counts.append(len(captured))
    assert counts == [0, 1, 1, 1, 1]


def test_a_capture_that_does_something_else_is_refused(net):
    def record(take):
        return (lambda: None), torch.zeros(())  # a capture that lost the step

    step, batches = steps_of(net, store_of([20] * 40), record=record)
    step(batches[0], 1e-3)
    with pytest.raises(UserError, match="ends in other bits than the eager step"):
        step(batches[1], 1e-3)


def test_a_step_that_cannot_be_captured_says_so(net):
    def record(take):
        raise RuntimeError("operation not permitted when stream is capturing")

    step, batches = steps_of(net, store_of([20] * 40), record=record)
    step(batches[0], 1e-3)
    with pytest.raises(UserError, match=r"cannot be captured .* not permitted .* without --graphs"):
        step(batches[1], 1e-3)


def test_buckets_differ_by_all_that_a_kernel_depends_on():
    store = store_of([30, 30, 30, 28, 29])
    keys = [bucket_of(store.batch(torch.tensor(chosen), bucketed=True)) for chosen in ([0, 1], [0, 3], [4, 0], [0, 1, 2])]
    assert keys == [(60, (2,), 2, 30, True), (60, (2,), 2, 30, False), (60, (2,), 2, 30, False), (90, (3,), 3, 30, True)]
    names = {"input_ids", "token_type_ids", "position_ids", "rows", "starts", "lens", "labels"}
    assert set(tensors(store.batch(torch.arange(2)))) == names


def test_graphs_on_a_cpu_are_refused(run_script, bert_dir, glue_dir):
    found = run_script("lt_glue.py", "--task", "sst2", "--model", bert_dir, "--data-dir", glue_dir, "--graphs", "--device", "cpu")
    assert found.returncode == 2
    assert "--graphs needs a CUDA device" in found.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda_a_captured_run_equals_an_eager_one_and_never_waits(bert_dir, precision):
    store, found = store_of([9 + 7 * (n % 5) for n in range(60)], "cuda"), []
    torch.use_deterministic_algorithms(True)
    for graphs in (True, False):
        net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].train().to("cuda")
        step, batches = steps_of(net, store, record=None, precision=precision)
        if not graphs:
            step.graphs = None
        losses = torch.cat([train(step, batches, 24), train(step, batches, 5), train(step, batches, 5)])  # all are captured now
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = train(step, batches, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append((torch.cat([losses, again]), [p.detach().clone() for p in net.parameters()]))
    (losses, weights), (expected_losses, expected) = found
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
