"""Checkpoints from anywhere: none runs code, none hangs, and none is made up or cut down in silence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bert_tickets.errors import UserError
from bert_tickets.modeling.loading import load_bert

INDEX = "model.safetensors.index.json"
LAST = "encoder.layer.1.output.dense.weight"

pytestmark = pytest.mark.usefixtures("soon")


@pytest.fixture
def model(bert_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert_dir, tmp_path / "model"))


def load(folder: Path, init: str | Path = "pretrained", head: Any = "classifier") -> None:
    load_bert(str(folder), head, str(init), 57)


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CONFIGS = {  # values, and what is said of them
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "fewer than none": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "a layer less than the weights": ({"num_hidden_layers": 1}, "has encoder.layer.1.*no place"),
    "a layer more": ({"num_hidden_layers": 3}, "lacks bert.encoder.layer.2"),
    "a vast width": ({"hidden_size": 10**9}, "no BERT has so many"),
    "a vast vocabulary": ({"vocab_size": 10**9}, "no BERT has so many"),
    "a negative width": ({"hidden_size": -32}, "hidden_size is -32"),
    "a width in words": ({"hidden_size": "abc"}, "hidden_size"),
    "no width": ({"hidden_size": None}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "heads that do not divide": ({"num_attention_heads": 5}, "num_attention_heads is 5"),
    "dropout of NaN": ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan"),
    "dropout of all": ({"attention_probs_dropout_prob": 1.0}, "attention_probs_dropout_prob is 1.0"),
    "an epsilon of NaN": ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    "no such activation": ({"hidden_act": "nosuch"}, "no hidden_act nosuch"),
    "padding beyond the vocabulary": ({"pad_token_id": 10**9}, "pad_token_id"),
    "a decoder": ({"is_decoder": True}, "is_decoder is True"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantization_config"),
    "relative positions": ({"position_embedding_type": "relative_key"}, "relative_key"),
    "another model": ({"model_type": "gpt2"}, "is a gpt2 model"),
    "a model type that is a list": ({"model_type": ["a"]}, "no BERT checkpoint"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_no_bert_has_is_refused(model, what):
    values, said = CONFIGS[what]
    configure(model, **values)
    with pytest.raises(UserError, match=said):
        load(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000, "{", "\0" * 50])
def test_json_that_is_no_checkpoints_is_refused(model, file, text):
    (model / file).write_text(text)
    with pytest.raises(UserError, match="model"):
        load(model)


# ---- code ----


class Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_hold_code_are_refused_and_it_does_not_run(model, tmp_path, zipped):
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    torch.save({LAST: Touch(tmp_path / "touched")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="without unpickling code"):
        load(model)
    assert not (tmp_path / "touched").exists()
    torch.load(file, weights_only=False)  # so that this file would have done it
    assert (tmp_path / "touched").exists()


def test_weights_in_torchs_own_format_are_read(model, bert_dir):
    torch.save(load_file(bert_dir / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    load(model)


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_a_checkpoints_own_code_is_not_run_and_nobody_is_asked(model, tmp_path, monkeypatch, model_type):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    named = {kind: f"evil.{kind}" for kind in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
    configure(model, model_type=model_type, auto_map=named)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    if model_type == "bert":
        load(model)
    else:
        with pytest.raises(UserError, match="no BERT checkpoint"):
            load(model)
    assert not asked
    assert not (tmp_path / "touched").exists()


# ---- weights ----


def without(*parts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not any(part in name for part in parts)}


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {LAST: change(weights[LAST])}


def one_layer_more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {name.replace("layer.1", "layer.2"): tensor.clone() for name, tensor in weights.items() if "layer.1" in name}


WEIGHTS = {
    "a matrix less": (without(LAST), f"lacks bert.{LAST} of"),
    "a layer less": (without("layer.1."), "lacks bert.encoder.layer.1.* and 15 more"),
    "a bias less": (without("layer.0.output.dense.bias"), "lacks bert.encoder.layer.0.output.dense.bias"),
    "half of the pooler": (without("pooler.dense.weight"), "lacks bert.pooler.dense.weight"),
    "a layer more": (one_layer_more, "has encoder.layer.2.*no place"),
    "NaN": (changed(lambda w: w * float("nan")), f"bert.{LAST} of .*model is not finite"),
    "infinity": (changed(lambda w: w.index_fill(0, torch.tensor([1]), float("inf"))), "not finite"),
    "whole numbers": (changed(lambda w: (w * 100).to(torch.int8)), f"{LAST} is I8"),
    "eight bits": (changed(lambda w: w.to(torch.float8_e4m3fn)), f"{LAST} is F8_E4M3"),
    "another shape": (changed(lambda w: w[:3].clone()), f"{LAST} of .* has another shape"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_would_be_made_up_or_left_out_are_refused(model, what):
    change, said = WEIGHTS[what]
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said):
        load(model)


@pytest.mark.parametrize("what", ["a layer more", "NaN", "whole numbers"])
def test_a_file_for_init_is_asked_the_same(model, tmp_path, what):
    change, _ = WEIGHTS[what]
    weights = change(load_file(model / "model.safetensors"))
    save_file({f"bert.{name}": tensor for name, tensor in weights.items()}, tmp_path / "init.safetensors")
    with pytest.raises(UserError, match=r"init\.safetensors"):
        load(model, tmp_path / "init.safetensors")


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(model, tmp_path, place):
    weights = load_file(model / "model.safetensors")
    shutil.copy(model / "model.safetensors", tmp_path / "other.safetensors")  # what is there would do
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, place)}))
    with pytest.raises(UserError, match="does not lie beside it"):
        load(model)


def test_a_checkpoint_in_parts_is_read_and_its_index_must_be_one(model):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = model / INDEX
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "part.safetensors")}))
    load(model)
    for content in ("null", '{"metadata": {}, "weight_map": []}', '{"metadata": {}, "weight_map": {"a": 1}}', "{"):
        index.write_text(content)
        with pytest.raises(UserError, match="damaged"):
            load(model)


def test_a_pipe_is_no_file_of_weights(model):
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    with pytest.raises(UserError, match="no BERT checkpoint"):
        load(model)


# ---- tokenizers ----


def retokenize(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("special", ["[CLS]", "[SEP]", "[UNK]"])
def test_a_vocabulary_without_a_special_token_is_refused_where_there_is_room_for_a_new_one(model, special):
    """By itself the library adds one, whose embedding nobody trained."""

    def rename(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["other"] = vocabulary.pop(special)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != special]

    weights = load_file(model / "model.safetensors")
    words = weights["embeddings.word_embeddings.weight"]
    save_file(
        weights | {"embeddings.word_embeddings.weight": torch.cat([words, words[:5]])},
        model / "model.safetensors",
        {"format": "pt"},
    )
    configure(model, vocab_size=len(words) + 5)
    load(model)
    retokenize(model, rename)
    with pytest.raises(UserError, match=rf"no \{special[:-1]}\]"):
        load(model)


def test_a_token_beyond_the_embeddings_is_refused(model):
    retokenize(model, lambda content: content["model"]["vocab"].update(film=10**6))
    with pytest.raises(UserError, match="'film' the number 1000000"):
        load(model)
