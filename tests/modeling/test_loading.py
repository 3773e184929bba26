"""Checkpoints: loaded, checked and saved. None runs code, and no weight is made up or dropped silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Touch
from safetensors.torch import load_file, save_file

from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.modeling.loading import load_bert, save_model
from bert_tickets.modeling.parameters import encoder_weights, prunable

LAST = "encoder.layer.1.output.dense.weight"
FORMAT = {"format": "pt"}


def load(folder: Path | str, init: Path | str = "pretrained", seed: int = 0, head: Any = "classifier") -> Any:
    return load_bert(str(folder), head, str(init), seed)[0]


@pytest.fixture
def model(bert_dir: Path, tmp_path: Path) -> Path:
    """A copy of the small BERT."""
    return Path(shutil.copytree(bert_dir, tmp_path / "model"))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- weights ----


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LAST, None, f"lacks bert.{LAST}"),
        ("pooler.dense.weight", None, "lacks bert.pooler.dense.weight"),
        (LAST.replace("layer.1", "layer.2"), lambda _: torch.ones(32, 64), "has bert.encoder.layer.2.*does not have"),
        (LAST, lambda w: w * float("nan"), f"bert.{LAST} of .*model is not finite"),
        (LAST, lambda w: (w * 100).to(torch.int8), f"{LAST} of .* is torch.int8"),
        (LAST, lambda w: w[:3].clone(), f"{LAST} of .* has another shape"),
    ],
)
def test_missing_extra_or_damaged_weights_are_a_users_error(model, tmp_path, name, change, message):
    weights = load_file(model / "model.safetensors")
    weight = weights.pop(name, None)
    if change is not None:
        weights[name] = change(weight)
        save_file({f"bert.{name}": tensor for name, tensor in weights.items()}, tmp_path / "init.safetensors")  # for --init
        with pytest.raises(UserError, match=r"init\.safetensors"):
            load(model, tmp_path / "init.safetensors")
    save_file(weights, model / "model.safetensors", FORMAT)
    with pytest.raises(UserError, match=message):
        load(model)


def test_a_checkpoint_without_a_pooler_gets_a_random_one(model, capsys):
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, model / "model.safetensors", FORMAT)
    first, second = load(model), load(model)
    assert "has no pooler" in capsys.readouterr().out
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert 0.05 < first.bert.pooler.dense.weight.std() < 0.15


# ---- configurations and tokenizers ----


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({"vocab_size": 50}, {}, "no match"),
        ({"is_decoder": True}, {}, "or a decoder"),
        ({"model_type": "roberta"}, {}, "of type roberta"),
        ({}, {"post_processor": None}, r"\[CLS\] and \[SEP\]"),
    ],
)
def test_a_configuration_or_tokenizer_that_is_not_berts_is_a_users_error(model, config, tokenizer, message):
    edit_json(model / "config.json", **config)
    edit_json(model / "tokenizer.json", **tokenizer)
    edit_json(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(UserError, match=message):
        load(model)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_a_file_that_is_damaged_or_missing_is_a_users_error(model, file):
    (model / file).write_bytes((model / file).read_bytes()[:500])
    with pytest.raises(UserError, match="cannot load a BERT checkpoint from the folder"):
        load(model)
    (model / file).unlink()
    with pytest.raises(UserError):
        load(model)
    with pytest.raises(UserError, match="cannot load a BERT checkpoint from there-is/no-such-model"):
        load("there-is/no-such-model")


# ---- code ----


def test_pickled_weights_are_read_and_their_code_is_not_run(model, bert_dir, tmp_path):
    file = model / "pytorch_model.bin"
    torch.save(load_file(bert_dir / "model.safetensors"), file)
    (model / "model.safetensors").unlink()
    assert sha256_of(encoder_weights(load(model))) == sha256_of(encoder_weights(load(bert_dir)))
    for zipped in (True, False):
        torch.save({LAST: Touch(tmp_path / "touched")}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="cannot load a BERT checkpoint"):
            load(model)
        assert not (tmp_path / "touched").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have run


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_a_checkpoints_own_code_is_not_run_and_nobody_is_asked(model, tmp_path, monkeypatch, model_type):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    named = {kind: f"evil.{kind}" for kind in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
    edit_json(model / "config.json", model_type=model_type, auto_map=named)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    if model_type == "bert":
        load(model)
    else:
        with pytest.raises(UserError, match="of type evil"):
            load(model)
    assert not asked
    assert not (tmp_path / "touched").exists()


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
