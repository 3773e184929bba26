"""`load`: an exported ticket without its pruned heads and neurons computes what plain transformers does with the zeros."""

import copy
import shutil

import pytest
import torch
import transformers
from transformers import BertForTokenClassification, BertModel

import bert_tickets
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.units import LAYER

KINDS = {
    "rte": ("BertForSequenceClassification", ["logits"]),
    "squad": ("BertForQuestionAnswering", ["start_logits", "end_logits"]),
    "mlm": ("BertForMaskedLM", ["logits"]),
}


def inputs_of(lengths=(24, 3, 11, 1)):
    """A padded batch of random tokens and types."""
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    attended = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": attended.long(), "token_type_ids": ids % 2}


def counts(net):
    """The number of parameters, all and not zero."""
    return sum(p.numel() for p in net.parameters()), sum(int(p.count_nonzero()) for p in net.parameters())


@torch.no_grad()
@pytest.mark.parametrize("which", ["trained", "untrained"])
@pytest.mark.parametrize("task", KINDS)
def test_a_loaded_ticket_computes_what_plain_transformers_does(slim_tickets, task, which):
    folder, (kind, names) = getattr(slim_tickets[task], which), KINDS[task]
    dense, slim = getattr(transformers, kind).from_pretrained(folder), bert_tickets.load(str(folder))
    assert type(slim) is type(dense)
    assert not slim.training
    inputs = inputs_of()
    expected, found = dense(**inputs), slim(*inputs.values())
    assert list(found) == list(expected) == names
    for name in names:
        assert expected[name].std() > 1e-3
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    mask = Mask.load(folder / "mask.safetensors")
    gone = sum(int((~kept).count_nonzero()) for kept in mask.values())
    assert counts(slim)[0] == counts(dense)[0] - gone
    assert gone > 10_000
    for layer, parts in ((0, "output.dense"), (1, "attention.output.dense")):
        own = [name for name, _ in slim.named_parameters() if name.startswith(f"{LAYER}{layer}.{parts}.")]
        assert own == [f"{LAYER}{layer}.{parts}.bias"]


def test_it_trains_in_plain_torch_and_its_state_fits_another_one(slim_tickets, tmp_path):
    folder = slim_tickets["rte"].untrained
    slim, labels, losses = bert_tickets.load(folder).train(), torch.tensor([0, 1, 1, 0]), []
    start, parameters = copy.deepcopy(slim.state_dict()), counts(slim)[0]
    optimizer = torch.optim.AdamW(slim.parameters(), lr=1e-3)
    for _ in range(12):
        loss = slim(**inputs_of(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    same = {name for name, p in slim.named_parameters() if torch.equal(p, start[name]) and not name.endswith("key.bias")}
    assert same == set()
    torch.save(slim.state_dict(), tmp_path / "slim.pt")
    again = bert_tickets.load(folder)
    again.load_state_dict(torch.load(tmp_path / "slim.pt"))
    assert torch.equal(again(**inputs_of()).logits, slim.eval()(**inputs_of()).logits)
    assert counts(again)[0] == parameters


def test_another_head_is_as_with_load_ticket(slim_tickets, capsys):
    folder = slim_tickets["rte"].trained
    assert bert_tickets.load(folder, BertForTokenClassification, num_labels=9)(**inputs_of()).logits.shape == (4, 24, 9)
    assert "classifier.weight, classifier.bias are drawn at random" in capsys.readouterr().out
    dense, slim = BertModel.from_pretrained(folder), bert_tickets.load(folder, BertModel)
    torch.testing.assert_close(slim(**inputs_of()).pooler_output, dense(**inputs_of()).pooler_output, rtol=0, atol=1e-5)
    assert counts(slim)[0] < counts(dense)[0]


def test_single_weights_beside_units_are_zeros(slim_tickets, tmp_path):
    """Without word of units in the mask's file, too."""
    folder = shutil.copytree(slim_tickets["rte"].trained, tmp_path / "t")
    name = f"{LAYER}1.output.dense.weight"
    mask = {key: kept.clone() for key, kept in Mask.load(folder / "mask.safetensors").items()}
    mask[name][3] = False
    Mask(mask).write(folder / "mask.safetensors")
    weight = bert_tickets.load(folder).get_parameter(name)
    assert weight.shape == (32, 44)
    assert not weight[3].any()
    assert weight[4].all()


def test_what_has_no_units_is_a_sentence(exported, slim_tickets, tmp_path):
    run, folder, _ = exported["rte"]
    with pytest.raises(UserError, match="nothing can be removed: the mask prunes no head and no neuron whole"):
        bert_tickets.load(folder)
    with pytest.raises(UserError, match="is a run; export one of its tickets"):
        bert_tickets.load(run)
    whole = shutil.copytree(slim_tickets["rte"].trained, tmp_path / "whole")
    mask = Mask.load(whole / "mask.safetensors")
    Mask({name: torch.ones_like(kept) for name, kept in mask.items()}, mask.info).write(whole / "mask.safetensors")
    assert counts(bert_tickets.load(whole))[0] == counts(BertModel.from_pretrained(whole))[0] + 66  # all units, and the head
