"""The distance of hidden states against values of the released code of mask training (Liu et al. 2022)."""

import pytest
import torch
from formula_net import IDS, LENGTHS, POOLER, QUERY, formula_batch, formula_net, start_of, student_of

from bert_tickets.modeling.parameters import WORD_EMBEDDINGS
from bert_tickets.tasks.distillation import all_positions, as_teacher, distance, hidden_states, real_tokens
from bert_tickets.training.bert_adam import BertAdam

net, batch = pytest.fixture(formula_net), pytest.fixture(formula_batch)


def padded_states(net, _):
    """The hidden states of all positions, by transformers, on the formula's tokens also where there is padding."""
    real = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    return [
        x.flatten(0, 1) for x in net.bert(torch.tensor(IDS), attention_mask=real, output_hidden_states=True).hidden_states[1:]
    ]


def test_distillation_has_the_released_codes_values(net, batch):
    mask = start_of(net, "int")
    assert (len(mask), mask.total, mask.kept, start_of(net).kept) == (20, 27520, 8270, 8251)
    student, everything = student_of(net, mask), torch.ones(96, dtype=torch.bool)
    with as_teacher(net, dropout=False):
        teacher = padded_states(net, None)
    states = student(padded_states, batch)
    by_layer = [distance([ours], [theirs], everything).item() for ours, theirs in zip(states, teacher, strict=True)]
    assert by_layer == pytest.approx([0.414496, 0.493635, 0.615946], abs=1e-6)
    loss = distance(states, teacher, everything)
    assert loss.item() == pytest.approx(0.508026, abs=1e-6)
    assert distance(states, teacher, everything, "mse").item() == pytest.approx(1.022985, abs=1e-6)
    loss.backward()
    assert student.scores[QUERY].grad.abs().sum().item() == pytest.approx(0.243055, abs=1e-6)
    assert student.scores[WORD_EMBEDDINGS].grad.abs().sum().item() == pytest.approx(0.603045, abs=1e-6)
    assert student.scores[POOLER].grad is None
    first = student.scores[QUERY].detach().flatten()[:4].clone()
    BertAdam([{"params": list(student.scores.values())}], lr=2e-5).step()
    assert first.tolist() == pytest.approx([0, 0.02, 0.02, 0])
    assert student.scores[QUERY].flatten()[:4].tolist() == pytest.approx([-2.2779e-5, 0.0199423, 0.0199407, 2.6805e-5], abs=5e-8)


def test_packed_batches_have_the_loss_of_the_real_tokens(net, batch):
    student = student_of(net, start_of(net, "int"))
    states, teacher = student(hidden_states, batch), hidden_states(net, batch)
    assert distance(states, teacher, real_tokens(batch)).item() == pytest.approx(0.508351, abs=1e-6)


def test_padding_counts_where_it_is_asked_for(net, batch):
    states = hidden_states(net, batch, 14)
    assert [len(x) for x in states] == [8 * 14] * 3 == [len(all_positions(batch, 14))] * 3
    ids = torch.zeros(8, 14, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.tensor(IDS[row][:length])
    real = (torch.arange(14) < torch.tensor(LENGTHS)[:, None]).long()
    expected = net.bert(ids, attention_mask=real, output_hidden_states=True).hidden_states[1:]
    for found, wanted in zip(states, expected, strict=True):
        torch.testing.assert_close(found, wanted.flatten(0, 1), rtol=0, atol=1e-12)


def test_only_a_teacher_with_dropout_has_dropout(net, batch):
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    net.train()
    for dropout in (False, True):
        with as_teacher(net, dropout):
            one, two = (hidden_states(net, batch)[-1] for _ in range(2))
        assert torch.equal(one, two) != dropout
        assert not one.requires_grad
        assert net.training
