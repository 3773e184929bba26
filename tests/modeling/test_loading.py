"""Checkpoints: loaded, checked and saved. None runs code, and no weight is made up or dropped silently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Touch
from safetensors.torch import load_file, save_file

from bert_tickets.content import POOLER
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.modeling.bert import classify
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
    pooler = {f"bert.{key}": weights[key] for key in weights if "pooler" in key}
    words = "bert.embeddings.word_embeddings.weight"
    save_file(pooler | {words: torch.zeros(3)}, model / POOLER, FORMAT)
    assert torch.equal(load(model).get_parameter(words), first.get_parameter(words))
    save_file({"bert.pooler.dense.weight": weights["pooler.dense.weight"]}, model / POOLER, FORMAT)
    with pytest.raises(UserError, match=rf"{POOLER} lacks bert\.pooler\.dense\.bias"):
        load(model)
    (model / POOLER).unlink()
    (model / POOLER).symlink_to(model / "purged")
    with pytest.raises(UserError, match=rf"{POOLER} is a link to a file that does not exist"):
        load(model)
    save_file(weights, model / "model.safetensors", FORMAT)
    (model / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")
    load(model)  # neither is read


@pytest.mark.parametrize(
    "place", ["bert.", "module.bert.", "_orig_mod.bert.", "module._orig_mod.", "model.bert.", "net.encoder."]
)
def test_what_wrappers_put_before_the_names_is_left_out_and_said(model, bert_dir, capsys, place):
    weights = load_file(model / "model.safetensors")
    renamed = {place + key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in weights.items()}
    head = place.removesuffix("bert.") + "classifier.weight"
    save_file(renamed | {head: torch.ones(2, 32)}, model / "model.safetensors", FORMAT)
    assert sha256_of(encoder_weights(load(model))) == sha256_of(encoder_weights(load(bert_dir)))
    assert ("names its weights" in capsys.readouterr().out) == (place != "bert.")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["query.bert.", "context.bert."], r"2 BERTs among its weights"),
        (["bert.", "module.bert."], "some weights twice"),
        (["roberta."], r"the weights of a roberta model"),
    ],
)
def test_names_that_may_be_of_another_network_are_a_users_error(model, places, message):
    weights = load_file(model / "model.safetensors")
    save_file({place + key: w.clone() for place in places for key, w in weights.items()}, model / "model.safetensors", FORMAT)
    with pytest.raises(UserError, match=message):
        load(model)


def test_weights_with_masks_of_torch_prune_are_multiplied_and_said(model, tmp_path, capsys):
    weights = load_file(model / "model.safetensors")
    mask = torch.rand(weights[LAST].shape) < 0.5
    pruned = {key: w for key, w in weights.items() if key != LAST} | {f"{LAST}_orig": weights[LAST]}
    save_file(pruned | {f"{LAST}_mask": mask.float()}, model / "model.safetensors", FORMAT)
    assert torch.equal(load(model).get_parameter(f"bert.{LAST}"), weights[LAST] * mask)
    assert f"as torch.nn.utils.prune keeps them ({LAST}_orig)" in capsys.readouterr().out
    whole = pruned | {f"{LAST}_mask": mask.float()}
    changes = ({f"{LAST}_mask": torch.ones(3)}, {LAST: torch.ones(2)}, {f"{LAST}_orig": weights[LAST].to(torch.int8)})
    for wrong in (pruned, *(whole | change for change in changes)):
        save_file(wrong, model / "model.safetensors", FORMAT)
        with pytest.raises(UserError, match=rf"has {LAST}_orig, which needs a {LAST}_mask of its shape, floating-point"):
            load(model)


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_the_file_of_a_training_and_sparse_tensors_are_read(model, bert_dir, capsys, key):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weights[LAST] = weights[LAST].to_sparse()
    torch.save({"epoch": 3, "optimizer": {"x": torch.ones(2)}, key: weights}, model / "pytorch_model.bin")
    assert sha256_of(encoder_weights(load(model))) == sha256_of(encoder_weights(load(bert_dir)))
    assert f"pytorch_model.bin is the file of a training: its '{key}' is read" in capsys.readouterr().out
    weights[LAST] = torch.empty(32, 64, device="meta")  # without values
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"lacks bert.{LAST}"):
        load(model)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
        ("tokenizer.json", None, "a link to a file that does not exist"),
        ("model.safetensors", "", "it is empty"),
        ("adapter_model.bin", "", r"has an adapter \(adapter_model.bin\): merge"),
    ],
)
def test_files_that_are_not_what_their_names_say_are_named(model, file, content, message):
    (model / file).unlink(missing_ok=True)
    (model / file).write_text(content) if content is not None else (model / file).symlink_to(model / "purged")
    (model / "train_adapter_notes.md").touch()  # no adapter
    with pytest.raises(UserError, match=rf"{file}.*{message}" if content != "" or file[0] == "m" else message):
        load(model)


def test_of_two_files_of_weights_the_one_that_is_read_is_said(model, bert_dir, capsys):
    weights = load_file(model / "model.safetensors")
    torch.save({key: tensor + 1 for key, tensor in weights.items()}, model / "pytorch_model.bin")
    assert sha256_of(encoder_weights(load(model))) == sha256_of(encoder_weights(load(bert_dir)))
    assert "model.safetensors is read, and pytorch_model.bin (newer) is not" in capsys.readouterr().out


def test_weights_that_would_change_the_network_are_refused_and_others_said(model, capsys):
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"prefix.weight": torch.ones(2)}, model / "model.safetensors", FORMAT)
    load(model)
    assert "has weights that are not used: prefix.weight" in capsys.readouterr().out
    save_file(weights | {"encoder.layer.0.adapter.down.weight": torch.ones(2)}, model / "model.safetensors", FORMAT)
    with pytest.raises(UserError, match=r"has bert\.encoder\.layer\.0\.adapter\.down\.weight, which the BERT"):
        load(model)
    save_file(weights | {f"{LAST.removesuffix('weight')}lora_A.weight": torch.ones(2)}, model / "model.safetensors", FORMAT)
    with pytest.raises(UserError, match=r"has adapters of PEFT .*merge_and_unload"):
        load(model)


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


def test_of_two_biases_the_one_that_fits_is_taken(with_head, capsys):
    predictions, _ = with_head(**{"decoder.bias": torch.ones(7)})
    assert (predictions.bias == 0.5).all()
    assert not capsys.readouterr().out


def test_a_decoder_that_config_unties_and_the_weights_lack_is_drawn_and_said(with_head, capsys):
    predictions, tied = with_head(False, **{key.removeprefix("cls.predictions."): None for key in mlm_head()})
    assert not tied
    assert 0.05 < predictions.decoder.weight.std() < 0.15
    said = capsys.readouterr().out
    assert "lacks all of a head for masked language modelling: drawn at random (biases 0); with its decoder, which config" in said


# ---- configurations and tokenizers ----


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({"vocab_size": 50}, {}, "no match"),
        ({"is_decoder": True}, {}, "or a decoder"),
        ({"model_type": "roberta"}, {}, "of type roberta"),
        ({"num_attention_heads": 3}, {}, r"config\.json: .*not a multiple of the number of attention heads"),
        ({"hidden_act": "geluu"}, {}, r"hidden_act\" is 'geluu', not an activation"),
        ({"num_attention_heads": -2}, {}, r"num_attention_heads\" is -2, not a whole number of at least 1"),
        ({"layer_norm_eps": -1.0}, {}, r"layer_norm_eps\" is -1.0, not 0 or more"),
        ({"hidden_dropout_prob": 1.0}, {}, r"hidden_dropout_prob\" is 1.0, not a probability below 1"),
        ({}, {"post_processor": None}, r"\[CLS\] and \[SEP\]"),
    ],
)
def test_a_configuration_or_tokenizer_that_is_not_berts_is_a_users_error(model, config, tokenizer, message):
    edit_json(model / "config.json", **config)
    edit_json(model / "tokenizer.json", **tokenizer)
    edit_json(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(UserError, match=message):
        load(model)


@pytest.mark.parametrize(
    "flags",
    [
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "torchscript": True, "use_cache": False},
        {"chunk_size_feed_forward": 5, "gradient_checkpointing": True, "pruned_heads": {}, "is_decoder": False, "num_labels": 7},
        {"_attn_implementation": "flash_attention_2", "problem_type": "regression", "id2label": {"0": "x"}, "dtype": "float16"},
    ],
)
def test_flags_left_in_config_json_change_nothing(model, bert_dir, tmp_path, flags):
    edit_json(model / "config.json", **flags)
    net, tokenizer = load_bert(str(model), "classifier", "pretrained", 0)
    assert net.config.to_dict() == load(bert_dir).config.to_dict()
    (tmp_path / "saved").mkdir()
    save_model(net, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert all(saved.get(key) != value for key, value in flags.items() if value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pruned_heads", {"0": [1]}),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_fields_that_make_another_network_of_it_are_named(model, key, value):
    edit_json(model / "config.json", **{key: value})
    with pytest.raises(UserError, match=rf'config\.json: "{key}" is '):
        load(model)


def test_sizes_that_config_json_lacks_are_named(model):
    """The library would take BERT-base's."""
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({key: x for key, x in values.items() if key != "num_hidden_layers"}))
    with pytest.raises(UserError, match=r"config\.json has no num_hidden_layers"):
        load(model)


def test_a_configuration_without_a_type_names_the_key_and_googles_own_is_read(model, capsys):
    values = json.loads((model / "config.json").read_text())
    del values["model_type"]
    (model / "config.json").write_text(json.dumps(values))
    load(model)  # its architectures name BERT's class
    (model / "config.json").write_text(json.dumps(values | {"architectures": ["RobertaModel"]}))
    with pytest.raises(UserError, match=r'config\.json has no "model_type"'):
        load(model)
    assert not capsys.readouterr().out
    del values["architectures"]
    (model / "config.json").write_text(json.dumps(values))
    load(model)
    assert 'has no "model_type": only its weights and its tokenizer show' in capsys.readouterr().out
    (model / "config.json").rename(model / "bert_config.json")
    load(model)
    assert "bert_config.json is read" in capsys.readouterr().out


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


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_a_file_that_is_damaged_or_missing_is_a_users_error(model, file):
    (model / file).write_bytes((model / file).read_bytes()[:500])
    with pytest.raises(UserError, match="cannot load a BERT checkpoint from the folder"):
        load(model)
    (model / file).unlink()
    with pytest.raises(UserError):
        load(model)
    with pytest.raises(UserError, match="there is no folder there-is/no-such-model; cannot read"):
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
def test_a_checkpoints_own_code_is_not_run_and_nobody_is_asked(model, tmp_path, monkeypatch, capsys, model_type):
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    named = {kind: f"evil.{kind}" for kind in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
    edit_json(model / "config.json", model_type=model_type, auto_map=named)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    if model_type == "bert":
        load(model)
        assert "names code of its own (auto_map), which is not run" in capsys.readouterr().out
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
