"""`load_ticket`: an exported folder as a model of transformers, with the head that is asked for."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    RobertaModel,
)

import bert_tickets
from bert_tickets import load_ticket
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask


@pytest.mark.parametrize(
    ("kind", "options", "drawn"),
    [
        (None, {}, ""),
        (None, {"num_labels": 5}, "classifier"),
        (BertForTokenClassification, {"num_labels": 9}, "classifier"),
        (BertForQuestionAnswering, {}, "qa_outputs"),
        (BertModel, {}, ""),
        (AutoModelForSequenceClassification, {"dtype": "auto"}, ""),
    ],
)
def test_a_ticket_has_the_folders_weights_and_the_head_that_is_asked_for(exported, tokenizer, capsys, kind, options, drawn):
    folder = exported["rte"].trained
    model, loaded, mask = load_ticket(str(folder), kind, **options)
    is_auto = kind in (None, AutoModelForSequenceClassification)
    assert type(model) is (BertForSequenceClassification if is_auto else kind)
    assert model.config.num_labels == options.get("num_labels", 2)
    assert mask == Mask.load(folder / "mask.safetensors")
    assert loaded("a good film").input_ids == tokenizer("a good film").input_ids
    stored = {name.removeprefix("bert."): p for name, p in load_file(folder / "model.safetensors").items()}
    found = {name.removeprefix("bert."): p for name, p in model.named_parameters()}
    head = [f"{drawn}.weight", f"{drawn}.bias"] if drawn else []
    assert [name for name, p in found.items() if name not in stored or not torch.equal(p, stored[name])] == head
    said = capsys.readouterr().out
    assert f"{', '.join(head)} are drawn at random" in said if drawn else not said


def test_a_pooler_beside_a_model_without_one_is_loaded(exported, tmp_path):
    folder = shutil.copytree(exported["embeddings"].trained, tmp_path / "ticket")
    pooler = load_file(folder / "pooler.safetensors")["bert.pooler.dense.weight"]
    assert torch.equal(load_ticket(folder, num_labels=2)[0].bert.pooler.dense.weight, pooler)
    assert torch.equal(load_ticket(folder, BertModel)[0].pooler.dense.weight, pooler)
    (folder / "pooler.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no bert.pooler.dense.weight of its config.json's shape \(2 tensors"):
        load_ticket(folder, num_labels=2)


def test_weights_that_do_not_fit_the_mask_are_set_to_zero_and_a_line_says_so(exported, tmp_path, capsys):
    folder = shutil.copytree(exported["rte"].trained, tmp_path / "other")
    mask = Mask({name: ~kept for name, kept in Mask.load(folder / "mask.safetensors").items()})
    mask.write(folder / "mask.safetensors")
    model, _, _ = load_ticket(folder)
    assert not any(model.get_parameter(name).any() for name in mask)
    assert f"has {mask.total - mask.kept:,} nonzero weights that the mask prunes" in capsys.readouterr().out


def test_what_is_not_a_ticket_is_a_sentence(exported, tmp_path):
    run, trained, _ = exported["rte"]
    folder = shutil.copytree(trained, tmp_path / "t")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"cannot load a BERT checkpoint from the folder .*t: model"):
        load_ticket(folder)
    (folder / "mask.safetensors").unlink()
    with pytest.raises(UserError, match=r"t has no mask.safetensors: it is not an exported ticket. python scripts/export.py"):
        load_ticket(folder)
    with pytest.raises(UserError, match=r"nowhere has no config\.json"):
        load_ticket(tmp_path / "nowhere")
    with pytest.raises(UserError, match="RobertaModel is not a class of BERT"):
        load_ticket(trained, RobertaModel)
    with pytest.raises(UserError, match="is a run; export one of its tickets"):
        load_ticket(run)


def test_the_package_has_no_other_names():
    assert not hasattr(bert_tickets, "Ticket")
