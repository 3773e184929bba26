"""Bucketed batches change nothing, and after a failed capture the run goes on eagerly. (Captures: tests/gpu.)"""

import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import capture_stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import check_equal, take

from bert_tickets.bench.baselines import make_case, packed_step
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.packing import max_padding
from bert_tickets.training import cuda_graphs
from bert_tickets.training.cuda_graphs import Recorder, bucket_of, recorder, tensors


def store_of(lengths):
    rng = np.random.default_rng(len(lengths))
    ids = [rng.integers(5, 100, n).tolist() for n in lengths]
    types = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    return TokenStore(Tokens.of(ids, types), rng.integers(0, 2, len(lengths)), torch.device("cpu"))


# ---- buckets ----


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=20), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_bucketed_batch_has_the_same_tokens_and_rounded_shapes(lengths, seed):
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
    padding = slice(tokens, None)
    assert (bucketed.position_ids[0, padding] >= bucketed.lens[bucketed.rows[padding]]).all()  # where attention pads


@pytest.mark.parametrize("lengths", [[3, 17, 9, 64, 33], [7]])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bucketing_changes_neither_loss_nor_gradients(calm_bert_dir, lengths, dropout, monkeypatch):
    store, examples = store_of([*lengths, 64]), torch.arange(len(lengths))
    net = load_bert(str(calm_bert_dir), "classifier", "pretrained", 0)[0].train().double()
    for layer in net.bert.encoder.layer:  # other shapes draw other numbers: attention's dropout runs with factors of one
        layer.attention.self.dropout.p = dropout
    monkeypatch.setattr("bert_tickets.modeling.dropout.factors", lambda like, p: like.new_ones(like.shape))
    found = []
    for bucketed in (False, True):
        batch = store.batch(examples, bucketed=bucketed)
        loss = F.cross_entropy(classify(net, batch), batch.labels)
        found.append((loss.detach(), torch.autograd.grad(loss, list(net.parameters()))))
    assert batch.padding or lengths == [7]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_buckets_differ_by_all_that_a_kernel_depends_on():
    store = store_of([30, 30, 30, 28, 29])
    keys = [bucket_of(store.batch(torch.tensor(chosen), bucketed=True)) for chosen in ([0, 1], [0, 3], [4, 0], [0, 1, 2])]
    assert keys == [(60, (2,), 2, 30, True), (60, (2,), 2, 30, False), (60, (2,), 2, 30, False), (90, (3,), 3, 30, True)]
    names = {"input_ids", "token_type_ids", "position_ids", "rows", "starts", "lens", "labels"}
    assert set(tensors(store.batch(torch.arange(2)))) == names


# ---- captures ----


@pytest.fixture
def case(bert_dir):
    """A network with half of its weights pruned, on a CPU, and eight examples of eight tokens: all steps are of one bucket."""
    given = {"model": str(bert_dir), "device": "cpu", "batch_size": 8, "limit_train": 8, "max_length": 8}
    return make_case("mnli", given, 0.5)


class Lost(Recorder):
    """The capture does not hold the step."""

    def record(self, run):
        return (lambda: None), torch.zeros(())


class Halfway(Recorder):
    """The capture fails after the backward pass."""

    def record(self, run):
        with patch.object(torch.optim.AdamW, "step", side_effect=RuntimeError("not permitted in the middle")):
            run()


class Full(Recorder):
    """Memory runs out in the capture, and ending the capture then raises an error of its own."""

    def record(self, run):
        torch.rand(9)  # dropout of the layers before
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


class FullLater(Recorder):
    """Memory runs out after a replay has changed the weights."""

    def record(self, run):
        replay, loss = capture_stand_in(run)

        def failing():
            replay()
            raise torch.OutOfMemoryError("no room")

        return failing, loss


FAILURES = {
    Lost: "ends in other bits than the eager step",
    Halfway: "cannot be captured .*in the middle",
    Full: "out of memory",
    FullLater: r"out of memory .*no room",
}


@pytest.mark.parametrize("failing", FAILURES)
def test_after_a_failed_capture_the_run_goes_on_eagerly_to_the_same_bits(case, capsys, failing):
    failed = failing(required=False)
    check_equal(take(case, 5, failed), take(case, 5, Recorder(required=True), replays=False))
    printed = capsys.readouterr().out
    assert re.search(FAILURES[failing], printed)
    assert printed.count("continues without CUDA graphs") == 1
    take(case, 3, failed)  # the next level's
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("failing", [Lost, Halfway])
def test_a_failed_capture_ends_the_run_if_graphs_are_required(case, failing):
    take_step = packed_step(case, failing(required=True))[1]
    take_step(0)
    with pytest.raises(UserError, match=FAILURES[failing] + ".*run without --graphs on"):
        take_step(1)


def test_a_step_that_changes_no_weight_is_captured_again(case, monkeypatch):
    """As in fp16, where the gradients of a step that overflows cannot be compared."""
    monkeypatch.setattr(Recorder, "record", lambda self, run: capture_stand_in(run))
    step, take_step = packed_step(case, Recorder(required=True))
    plain, captured = torch.optim.AdamW.step, []
    for overflows in (False, True, True, False, False):
        monkeypatch.setattr(torch.optim.AdamW, "step", (lambda *given, **more: None) if overflows else plain)
        take_step(0)
        captured.append(len(step.graphs.captured))
    assert captured == [0, 0, 0, 1, 1]


# ---- --graphs ----


def test_graphs_are_for_steps_of_one_part_on_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert recorder("on", gpu, 1).required
    assert not recorder("auto", gpu, 1).required
    assert recorder("off", gpu, 1) is recorder("auto", cpu, 1) is recorder("auto", gpu, 2) is None
    with pytest.raises(UserError, match="--graphs on needs a CUDA device"):
        recorder("on", torch.device("cpu"), 1)
    with pytest.raises(UserError, match="--graphs on is for steps of one part"):
        recorder("on", torch.device("cuda"), 2)


def test_tensors_of_every_dtype_reach_the_captured_inputs():
    values = {"ids": torch.arange(4), "labels": torch.tensor([0.5, 2.0]), "chosen": torch.arange(3)}
    into = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    cuda_graphs._copy(into, values)
    assert all(torch.equal(into[name], tensor) for name, tensor in values.items())
