"""Networks from checkpoints: whose weights they have, which are drawn at random and said, and what is saved."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FORMAT, edit_json, load
from safetensors.torch import load_file, save_file

from bert_tickets.content import POOLER
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.loading import load_bert, save_model
from bert_tickets.modeling.parameters import encoder_weights, prunable


def test_the_head_is_drawn_by_the_seed_and_the_encoder_is_the_checkpoints_in_fp32(model):
    weights = load_file(model / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, model / "model.safetensors", FORMAT)
    edit_json(model / "config.json", dtype="float16")
    first, same, other = load(model, seed=1), load(model, seed=1), load(model, seed=2)
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    expected = {f"bert.{name}": tensor.half().float() for name, tensor in weights.items()}
    assert sha256_of(encoder_weights(first)) == sha256_of(encoder_weights(other)) == sha256_of(expected)


def test_random_weights_are_berts_initialization(bert_dir):
    net, again = load(bert_dir, "random", 3), load(bert_dir, "random", 3)
    weights = encoder_weights(net)
    assert sha256_of(weights) == sha256_of(encoder_weights(again)) != sha256_of(encoder_weights(load(bert_dir)))
    assert abs(weights["bert.encoder.layer.1.intermediate.dense.weight"].std().item() - 0.1) < 0.01  # initializer_range
    assert all((p == 1).all() for name, p in weights.items() if "LayerNorm.weight" in name)
    assert all((p == 0).all() for name, p in weights.items() if name.endswith("bias"))


def test_init_takes_some_weights_from_a_file(bert_dir, tmp_path, capsys):
    net, path = load(bert_dir), tmp_path / "w.safetensors"
    query, key = (f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key"))
    save_file({query: torch.full_like(net.get_parameter(query), 2.0)}, path)
    changed = load(bert_dir, path)
    assert (changed.get_parameter(query) == 2).all()
    assert torch.equal(changed.get_parameter(key), net.get_parameter(key))
    assert "sets 1 of the encoder's" in capsys.readouterr().out
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="has none of"):
        load(bert_dir, path)


def test_a_checkpoint_without_a_pooler_gets_a_random_one(model, capsys):
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, model / "model.safetensors", FORMAT)
    first, second = load(model), load(model)
    assert "has no pooler" in capsys.readouterr().out
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert 0.05 < first.bert.pooler.dense.weight.std() < 0.15
    pooler = {f"bert.{key}": weights[key] for key in weights if "pooler" in key}
    words = "bert.embeddings.word_embeddings.weight"
    save_file(pooler | {words: torch.zeros(3)}, model / POOLER, FORMAT)
    assert torch.equal(load(model).get_parameter(words), first.get_parameter(words))
    save_file({"bert.pooler.dense.weight": weights["pooler.dense.weight"]}, model / POOLER, FORMAT)
    with pytest.raises(UserError, match=rf"{POOLER} lacks bert\.pooler\.dense\.bias"):
        load(model)
    (model / POOLER).unlink()
    (model / POOLER).symlink_to(model / "purged")
    with pytest.raises(UserError, match=rf"{POOLER} is a broken symbolic link"):
        load(model)
    save_file(weights, model / "model.safetensors", FORMAT)
    (model / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")
    load(model)  # neither is read


# ---- heads for masked language modelling ----

TRANSFORM = "cls.predictions.transform.dense.weight"


def mlm_head(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """An MLM head for the small BERT, its decoder aside; `None` removes a tensor."""
    head = {"bias": torch.full((VOCABULARY,), 0.5), "transform.LayerNorm.weight": torch.ones(32)}
    head |= {"transform.dense.weight": torch.full((32, 32), 0.25), "transform.dense.bias": torch.zeros(32)}
    head |= {"transform.LayerNorm.bias": torch.zeros(32)} | changes
    return {f"cls.predictions.{key}": tensor for key, tensor in head.items() if tensor is not None}


VOCABULARY = 123  # set by the fixture below


@pytest.fixture
def with_head(model, monkeypatch):
    """Write the small BERT with an MLM head, and load it with that."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    monkeypatch.setattr(f"{__name__}.VOCABULARY", vocabulary)
    encoder = {f"bert.{key}": tensor for key, tensor in load_file(model / "model.safetensors").items()}

    def load_with(tied: bool = True, init: str = "pretrained", **changes: Any) -> Any:
        edit_json(model / "config.json", tie_word_embeddings=tied)
        save_file(encoder | mlm_head(**changes), model / "model.safetensors", FORMAT)
        net = load(model, head="mlm", init=init)
        predictions = net.cls.predictions
        assert predictions.bias is predictions.decoder.bias
        assert torch.isfinite(torch.cat([p.flatten() for p in net.parameters()])).all()
        return predictions, predictions.decoder.weight is net.bert.embeddings.word_embeddings.weight

    return load_with


def test_a_whole_mlm_head_is_taken_and_nothing_is_said(with_head, capsys):
    predictions, tied = with_head()
    assert tied
    assert (predictions.bias == 0.5).all()
    assert (predictions.transform.dense.weight == 0.25).all()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_decoder_is_kept(with_head, capsys, tied):
    predictions, _ = with_head()
    decoder = torch.full_like(predictions.decoder.weight, 2.0).detach()
    predictions, is_tied = with_head(tied, **{"decoder.weight": decoder})
    assert not is_tied
    assert torch.equal(predictions.decoder.weight, decoder)
    assert "its decoder is untied" in capsys.readouterr().out
    assert with_head(tied, init="random", **{"decoder.weight": decoder})[1] == tied  # nothing is the checkpoint's


def test_a_head_that_is_partly_there_or_of_another_size_is_said_exactly(with_head, capsys):
    predictions, tied = with_head(bias=torch.ones(7), **{"transform.dense.weight": None, "decoder.weight": torch.ones(7, 32)})
    assert tied
    assert (predictions.bias == 0).all()
    assert 0.05 < predictions.transform.dense.weight.std() < 0.15
    said = capsys.readouterr().out
    assert f"lacks cls.predictions.bias, {TRANSFORM} of a head for masked language modelling: drawn at random" in said
    assert "cls.predictions.bias does not fit (torch.float32 of shape (7,), not (" in said
    assert "cls.predictions.decoder.weight does not fit (torch.float32 of shape (7, 32), not (" in said


def test_a_head_that_is_not_finite_is_refused(with_head):
    with pytest.raises(UserError, match=rf"{TRANSFORM} of .* is not finite"):
        with_head(**{"transform.dense.weight": torch.full((32, 32), torch.nan)})


def test_a_tensor_that_an_mlm_head_does_not_have_is_said(with_head, capsys):
    with_head(**{"second.weight": torch.ones(2)})
    assert "has weights that are not used: cls.predictions.second.weight" in capsys.readouterr().out


def test_of_two_biases_the_one_that_fits_is_taken(with_head, capsys):
    predictions, _ = with_head(**{"decoder.bias": torch.ones(7)})
    assert (predictions.bias == 0.5).all()
    assert not capsys.readouterr().out
    predictions, _ = with_head(**{"decoder.bias": torch.ones(VOCABULARY)})
    assert (predictions.bias == 1).all()
    assert "cls.predictions.decoder.bias is used, and cls.predictions.bias, which differs, is not" in capsys.readouterr().out


def test_a_decoder_that_config_unties_and_the_weights_lack_is_drawn_and_said(with_head, capsys):
    predictions, tied = with_head(False, **{key.removeprefix("cls.predictions."): None for key in mlm_head()})
    assert not tied
    assert 0.05 < predictions.decoder.weight.std() < 0.15
    said = capsys.readouterr().out
    assert "lacks all of a head for masked language modelling: drawn at random (biases 0); with its decoder, which config" in said


def test_with_one_token_type_both_texts_of_a_pair_have_it(model, capsys):
    weights = load_file(model / "model.safetensors")
    name = "embeddings.token_type_embeddings.weight"
    save_file(weights | {name: weights[name][:1].clone()}, model / "model.safetensors", FORMAT)
    edit_json(model / "config.json", type_vocab_size=1)
    net, tokenizer = load_bert(str(model), "classifier", "pretrained", 0)
    assert "both texts of a pair get type 0" in capsys.readouterr().out
    pairs = tokenizer(["good film"], ["bad plot"])
    tokens = Tokens.of(pairs["input_ids"], pairs["token_type_ids"])
    assert tokens.types.max() == 1
    batch = TokenStore(tokens, np.zeros(1, np.int64)).batch(torch.arange(1))
    inputs = {"input_ids": torch.tensor(pairs["input_ids"]), "token_type_ids": torch.zeros(1, len(tokens.ids), dtype=torch.long)}
    torch.testing.assert_close(classify(net, batch), net(**inputs).logits)


# ---- saving ----


@pytest.mark.parametrize("head", ["qa", "mlm"])
def test_other_heads_have_the_checkpoints_pooler_frozen_and_saved_beside_the_model(bert_dir, tmp_path, head):
    classifier, (net, tokenizer) = load(bert_dir), load_bert(str(bert_dir), head, "pretrained", 0)
    assert list(prunable(net)) == list(prunable(classifier))
    assert sha256_of(encoder_weights(net)) == sha256_of(encoder_weights(classifier))
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    save_model(net, tokenizer, tmp_path)
    assert sha256_of(encoder_weights(load(tmp_path, head=head))) == sha256_of(encoder_weights(net))
