"""A checkpoint's configuration and weights: read as they are, or refused. None runs code."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import FORMAT, LAST, edit_json, load
from conftest import Touch
from safetensors.torch import load_file, save_file

from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.modeling.loading import load_bert, save_model
from bert_tickets.modeling.parameters import encoder_weights

# ---- weights ----


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


@pytest.mark.parametrize(
    "place", ["bert.", "module.bert.", "_orig_mod.bert.", "module._orig_mod.", "model.bert.", "net.encoder."]
)
def test_what_wrappers_put_before_the_names_is_left_out_and_said(model, bert_dir, capsys, place):
    weights = load_file(model / "model.safetensors")
    renamed = {place + key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in weights.items()}
    head = place.removesuffix("bert.") + "classifier.weight"
    save_file(renamed | {head: torch.ones(2, 32)}, model / "model.safetensors", FORMAT)
    assert sha256_of(encoder_weights(load(model))) == sha256_of(encoder_weights(load(bert_dir)))
    assert ("weights with a prefix" in capsys.readouterr().out) == (place != "bert.")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["query.bert.", "context.bert."], r"has 2 BERT encoders, not one"),
        (["bert.", "module.bert."], "duplicate weights"),
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
    assert f"in the form of torch.nn.utils.prune ({LAST}_orig)" in capsys.readouterr().out
    whole = pruned | {f"{LAST}_mask": mask.float()}
    changes = ({f"{LAST}_mask": torch.ones(3)}, {LAST: torch.ones(2)}, {f"{LAST}_orig": weights[LAST].to(torch.int8)})
    for wrong in (pruned, *(whole | change for change in changes)):
        save_file(wrong, model / "model.safetensors", FORMAT)
        with pytest.raises(UserError, match=rf"{LAST}_orig must be floating-point, with a {LAST}_mask of its shape"):
            load(model)


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_the_file_of_a_training_and_sparse_tensors_are_read(model, bert_dir, capsys, key):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weights[LAST] = weights[LAST].to_sparse()
    torch.save({"epoch": 3, "optimizer": {"x": torch.ones(2)}, key: weights}, model / "pytorch_model.bin")
    assert sha256_of(encoder_weights(load(model))) == sha256_of(encoder_weights(load(bert_dir)))
    assert f"pytorch_model.bin is a training checkpoint: its '{key}' is read" in capsys.readouterr().out
    weights[LAST] = torch.empty(32, 64, device="meta")  # without values
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"lacks bert.{LAST}"):
        load(model)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "model.safetensors",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer: run git lfs pull",
        ),
        ("tokenizer.json", None, "is a broken symbolic link"),
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
    with pytest.raises(UserError, match=r"has PEFT adapters .*merge_and_unload"):
        load(model)


# ---- configurations and tokenizers ----


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({"vocab_size": 50}, {}, "no match"),
        ({"is_decoder": True}, {}, "or a decoder"),
        ({"model_type": "roberta"}, {}, "of type roberta"),
        ({"num_attention_heads": 3}, {}, r"config\.json: .*not a multiple of the number of attention heads"),
        ({"hidden_act": "geluu"}, {}, r"hidden_act\" is 'geluu', not an activation"),
        ({"num_attention_heads": -2}, {}, r"num_attention_heads\" is -2, not a positive integer"),
        ({"layer_norm_eps": -1.0}, {}, r"layer_norm_eps\" is -1.0, not a non-negative number"),
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
    assert 'has no "model_type": it is read as a BERT' in capsys.readouterr().out
    (model / "config.json").rename(model / "bert_config.json")
    load(model)
    assert "bert_config.json is read" in capsys.readouterr().out


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
        assert "refers to custom code (auto_map), which is not run" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="of type evil"):
            load(model)
    assert not asked
    assert not (tmp_path / "touched").exists()
