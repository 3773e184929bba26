"""Checkpoints: loaded, checked and saved. None runs code, and no weight is made up or dropped silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import load_bert, save_plain
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


def without(*parts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)}


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {LAST: change(weights[LAST])}


def one_layer_more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {name.replace("layer.1", "layer.2"): tensor.clone() for name, tensor in weights.items() if "layer.1" in name}


BROKEN = {
    "a matrix less": (without(LAST), f"lacks bert.{LAST}"),
    "half of the pooler": (without("pooler.dense.weight"), "lacks bert.pooler.dense.weight"),
    "a layer more": (one_layer_more, "has encoder.layer.2.*does not have"),
    "NaN": (changed(lambda w: w * float("nan")), f"bert.{LAST} of .*model is not finite"),
    "integers": (changed(lambda w: (w * 100).to(torch.int8)), f"{LAST} of .* is I8"),
    "another shape": (changed(lambda w: w[:3].clone()), f"{LAST} of .* has another shape"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_missing_extra_or_damaged_weights_are_a_users_error(model, tmp_path, what):
    change, message = BROKEN[what]
    weights = change(load_file(model / "model.safetensors"))
    if what in ("NaN", "another shape", "a layer more"):  # a file for --init likewise
        save_file({f"bert.{name}": tensor for name, tensor in weights.items()}, tmp_path / "init.safetensors")
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

CONFIGS = {
    "a layer less than the weights": ({"num_hidden_layers": 1}, "has encoder.layer.1.*does not have"),
    "an unknown activation": ({"hidden_act": "nosuch"}, "cannot load a BERT checkpoint"),
    "a small vocabulary": ({"vocab_size": 50}, "no match"),
    "a decoder": ({"is_decoder": True}, "or a decoder"),
    "another model": ({"model_type": "roberta"}, "is a roberta model"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_is_not_the_weights_or_not_bert_is_a_users_error(model, what):
    values, message = CONFIGS[what]
    edit_json(model / "config.json", **values)
    with pytest.raises(UserError, match=message):
        load(model)


def test_a_tokenizer_without_cls_and_sep_is_a_users_error(model):
    edit_json(model / "tokenizer.json", post_processor=None)
    edit_json(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(UserError, match=r"\[CLS\] and \[SEP\]"):
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


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


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
        with pytest.raises(UserError, match="cannot load a BERT checkpoint"):
            load(model)
    assert not asked
    assert not (tmp_path / "touched").exists()


# ---- saving ----


@pytest.mark.parametrize("head", ["qa", "mlm"])
def test_other_heads_have_the_checkpoints_pooler_frozen_and_saved_beside_the_model(bert_dir, tmp_path, head):
    """The model opens in transformers with its zeros."""
    classifier, (net, tokenizer) = load(bert_dir), load_bert(str(bert_dir), head, "pretrained", 0)
    assert list(prunable(net)) == list(prunable(classifier))
    assert sha256_of(encoder_weights(net)) == sha256_of(encoder_weights(classifier))
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    }
    prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.7).apply(prunable(net))
    save_plain(net, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kind = {"qa": transformers.AutoModelForQuestionAnswering, "mlm": transformers.AutoModelForMaskedLM}[head]
    plain = kind.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain).__module__.startswith("transformers")
    assert sha256_of(encoder_weights(plain)) == sha256_of({k: p for k, p in encoder_weights(net).items() if "pooler" not in k})
    ids = torch.tensor([[2, 9, 9, 3]])
    net.eval().set_attn_implementation("eager")
    assert torch.allclose(net(input_ids=ids)[0], plain.eval()(input_ids=ids)[0], atol=1e-6)
    assert sha256_of(encoder_weights(load(tmp_path, head=head))) == sha256_of(encoder_weights(net))
