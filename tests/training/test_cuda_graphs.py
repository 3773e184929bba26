"""Bucketed batches change nothing, and a captured step is the eager step or is refused. On a CPU, with a stand-in
for the capture that runs the step again on the batch it was given; the capture itself is tested on CUDA."""

import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captures import step_again
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_tickets.config import Training
from bert_tickets.data.batches import Batches, TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.packing import max_padding
from bert_tickets.modeling.parameters import prunable
from bert_tickets.training.cuda_graphs import Recorder, bucket_of, recorder, tensors
from bert_tickets.training.step import Step


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
    assert bucketed.input_ids.shape[1] == tokens + bucketed.padding
    assert bucketed.padding <= max_padding(tokens + bucketed.padding)
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
    monkeypatch.setattr("bert_tickets.modeling.dropout.factors", lambda like, p, shape, part: like.new_ones(shape))
    found = []
    for bucketed in (False, True):
        batch = store.batch(examples, bucketed=bucketed)
        loss = F.cross_entropy(classify(net, batch), batch.labels)
        net.zero_grad()
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}))
    assert batch.padding or lengths in ([40, 40], [7])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


class Again(Recorder):
    captures = replays = 0

    def record(self, run):
        self.captures += 1
        replay, loss = step_again(run)

        def counted():
            self.replays += 1
            replay()

        return counted, loss


def steps_of(net, store, recorder, precision="fp32"):
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.4)
    mask.apply(prunable(net))
    cfg = Training(lr=1e-3, precision=precision)
    step = Step(
        lambda b: F.cross_entropy(classify(net, b).float(), b.labels),
        dict(net.named_parameters()),
        cfg,
        mask.to(store.device),
        store.device,
        recorder,
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
    for graphs in (True, False):
        net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].train()
        step, batches = steps_of(net, store, recorder := Again(required=True), precision)
        if not graphs:
            step.graphs = None  # the same optimiser, every step eager
        found.append((train(step, batches, 16), [p.detach().clone() for p in net.parameters()]))
        assert (recorder.replays > 4) == graphs
    (losses, weights), (expected_losses, expected) = found
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_bucket_is_captured_when_it_comes_back(net):
    step, batches = steps_of(net, store_of([20] * 40), recorder := Again(required=True))
    counts = []
    for i in range(5):
        step(batches[i], 1e-3)
        counts.append(recorder.captures)
    assert counts == [0, 1, 1, 1, 1]


class Lost(Recorder):
    """A capture that lost the step."""

    def record(self, run):
        return (lambda: None), torch.zeros(())


class Forbidden(Recorder):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")


class Halfway(Recorder):
    """The capture fails when the gradients are there."""

    def record(self, run):
        with patch.object(torch.optim.AdamW, "step", side_effect=RuntimeError("not permitted in the middle")):
            run()


class Full(Recorder):
    """Memory ends in the capture, and the capture's end then raises an error of its own."""

    def record(self, run):
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


class FullLater(Again):
    """Memory ends when a replay has taken the step already."""

    def record(self, run):
        replay, loss = super().record(run)

        def short():
            replay()
            raise torch.OutOfMemoryError("no room")

        return short, loss


FAILURES = {
    Lost: "ends in other bits than the eager step",
    Forbidden: "cannot be captured .* not permitted",
    Halfway: "cannot be captured .*in the middle",
    Full: "out of memory",
    FullLater: r"out of memory .*no room",
}


def eager_run(bert_dir, store):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].train()
    step, batches = steps_of(net, store, Again(required=True))
    step.graphs = None
    return train(step, batches, 5), dict(net.named_parameters())


@pytest.mark.parametrize("recorder", FAILURES)
def test_where_a_capture_fails_the_run_goes_on_eagerly_to_the_same_bits_and_says_so_once(bert_dir, net, capsys, recorder):
    store = store_of([20] * 40)
    losses, weights = eager_run(bert_dir, store)
    made = recorder(required=False)
    step, batches = steps_of(net, store, made)
    assert torch.equal(train(step, batches, 5), losses)
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    said = capsys.readouterr().out
    assert re.search(FAILURES[recorder], said)
    assert said.count("goes on without CUDA graphs") == 1
    again, _ = steps_of(net, store, made)  # the next level's
    train(again, batches, 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("recorder", [Lost, Forbidden, Halfway])
def test_graphs_that_are_required_and_fail_end_the_run(net, recorder):
    step, batches = steps_of(net, store_of([20] * 40), recorder(required=True))
    step(batches[0], 1e-3)
    with pytest.raises(UserError, match=FAILURES[recorder] + ".*run without --graphs on"):
        step(batches[1], 1e-3)


@pytest.mark.parametrize("recorder", [Full, FullLater])
def test_memory_that_ends_with_graphs_required_is_told_and_takes_no_step(bert_dir, net, recorder):
    """The caller then takes the batch in parts; it must not be taken twice."""
    store = store_of([20] * 40)
    losses, weights = eager_run(bert_dir, store)
    step, batches = steps_of(net, store, recorder(required=True))
    found = []
    for i in range(5):
        torch.manual_seed(i)
        try:
            found.append(step(batches[i], 1e-3 * (1 - i / 5)))
        except torch.OutOfMemoryError:
            step.graphs = None
            torch.manual_seed(i)
            found.append(step(batches[i], 1e-3 * (1 - i / 5)))
    assert step.graphs is None
    assert torch.equal(torch.stack(found), losses)
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("asked", "device", "processes", "graphs"),
    [
        ("off", "cuda", 1, None),
        ("auto", "cuda", 1, False),
        ("on", "cuda", 1, True),
        ("auto", "cpu", 1, None),
        ("auto", "cuda", 2, None),
    ],
)
def test_graphs_are_for_one_process_on_a_gpu(asked, device, processes, graphs):
    found = recorder(asked, torch.device(device), processes)
    assert (found and found.required) is graphs


def test_graphs_that_cannot_be_are_refused_if_required():
    with pytest.raises(UserError, match="--graphs on needs a CUDA device"):
        recorder("on", torch.device("cpu"), 1)
    with pytest.raises(UserError, match="--graphs on is for one process"):
        recorder("on", torch.device("cuda"), 2)


def test_buckets_differ_by_all_that_a_kernel_depends_on():
    store = store_of([30, 30, 30, 28, 29])
    keys = [bucket_of(store.batch(torch.tensor(chosen), bucketed=True)) for chosen in ([0, 1], [0, 3], [4, 0], [0, 1, 2])]
    assert keys == [(60, (2,), 2, 30, True), (60, (2,), 2, 30, False), (60, (2,), 2, 30, False), (90, (3,), 3, 30, True)]
    names = {"input_ids", "token_type_ids", "position_ids", "rows", "starts", "lens", "labels"}
    assert set(tensors(store.batch(torch.arange(2)))) == names


@pytest.mark.cuda
def test_on_cuda_a_step_that_waits_cannot_be_captured_and_the_run_goes_on(bert_dir, capsys):
    """A capture that really fails leaves nothing behind that the eager steps after it would meet."""
    store, found = store_of([20] * 60, "cuda"), []
    torch.use_deterministic_algorithms(True)
    for waits in (True, False):
        net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].train().to("cuda")
        step, batches = steps_of(net, store, Recorder(required=False), "fp16")
        if not waits:
            step.graphs = None
        plain = step.loss
        step.loss = lambda batch, plain=plain: plain(batch) * (1.0 if plain(batch).item() > 0 else 0.0)
        found.append((train(step, batches, 6), [p.detach().clone() for p in net.parameters()]))
        torch.cuda.empty_cache()
    assert capsys.readouterr().out.count("cannot be captured") == 1
    (losses, weights), (expected_losses, expected) = found
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_cuda_a_captured_run_equals_an_eager_one_and_never_waits(bert_dir, precision):
    store, found = store_of([9 + 7 * (n % 5) for n in range(60)], "cuda"), []
    torch.use_deterministic_algorithms(True)
    for graphs in (True, False):
        net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].train().to("cuda")
        step, batches = steps_of(net, store, Recorder(required=True), precision)
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
