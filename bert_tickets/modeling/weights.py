"""Read the configuration and the weights of a checkpoint's folder, and check that they are of one plain, complete BERT."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from bert_tickets.content import CONFIGS, POOLER, WEIGHTS, check_file, first_file, shards
from bert_tickets.errors import UserError, cause
from bert_tickets.files import read_json
from bert_tickets.modeling.checkpoint import find_pooler
from bert_tickets.modeling.parameters import ENCODER

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
# The fields of config.json that describe the network. All others, such as output_attentions, have their defaults.
NETWORK: tuple[str, ...] = SIZES + DROPOUT
NETWORK += ("hidden_act", "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "tie_word_embeddings")
# The valid values of fields.
RANGES: tuple[tuple[Sequence[str], Callable[[Any], bool], str], ...] = (
    ((*SIZES, "type_vocab_size"), lambda x: isinstance(x, int) and x >= 1, "a positive integer"),
    (DROPOUT, lambda x: x is None or (isinstance(x, float | int) and 0 <= x < 1), "a probability below 1"),
    (
        ("initializer_range", "layer_norm_eps"),
        lambda x: isinstance(x, float | int) and 0 <= x < math.inf,
        "a non-negative number",
    ),
    (("hidden_act",), lambda x: isinstance(x, str) and x in ACT2FN, "an activation of transformers"),
)
# Fields that change the architecture, with the values that do not.
FIXED = {"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
FIXED |= {"position_embedding_type": "absolute", "quantization_config": None}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# How modules are named inside torch's wrappers: of several GPUs, of torch.compile, of FSDP, of recomputed activations.
WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
WORDS = "embeddings.word_embeddings.weight"
POOLER_WEIGHTS = frozenset(f"{ENCODER}pooler.dense.{part}" for part in ("weight", "bias"))
NESTED = ("state_dict", "model_state_dict", "model", "module")  # entries of training checkpoints


def read_config(folder: Path, name: str, labels: int) -> BertConfig:
    """Read the configuration of the checkpoint `name`, for a head of `labels` labels. Raises `UserError` unless it is a BERT."""
    if adapters := sorted(path.name for path in folder.glob("adapter_[cm]*")):
        raise UserError(f"{name} has an adapter ({', '.join(adapters)}): merge it into the weights first, or remove its files")
    path = first_file(folder, CONFIGS)
    if path is None:
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: it has no config.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    kind = values.get("model_type")
    if path.name == CONFIGS[1]:
        print(f"{name} has no config.json: {path.name} is read")
    elif kind is None and not values.get("architectures"):
        print(f'{path} has no "model_type": it is read as a BERT, which its weights and tokenizer must match')
    elif kind is None and "'Bert" not in str(values["architectures"]):
        raise UserError(f'{path} has no "model_type": if the model is a BERT, add "model_type": "bert"')
    if kind not in (None, "bert"):
        raise UserError(f"{path} is of a model of type {kind}; this package prunes BERT encoders")
    for key, default in FIXED.items():
        if values.get(key) and values[key] != default:
            raise UserError(f'{path}: "{key}" is {values[key]!r}: not a plain BERT, or a decoder; this package prunes encoders')
    if values.get("auto_map"):
        print(f"{path} refers to custom code (auto_map), which is not run: the model is transformers' BERT")
    if missing := [key for key in SIZES if key not in values]:
        raise UserError(f"{path} has no {', '.join(missing)}")
    for keys, valid, what in RANGES:
        for key in keys:
            if key in values and not valid(values[key]):
                raise UserError(f'{path}: "{key}" is {values[key]!r}, not {what}')
    try:
        config = BertConfig(num_labels=labels, **{key: values[key] for key in NETWORK if key in values})
        _shapes(config)
    except Exception as error:
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: {path.name}: {cause(error)}") from None
    return config


def _shapes(config: BertConfig) -> dict[str, torch.Size]:
    """Return the shapes of the encoder's parameters. Raises the library's errors for an invalid configuration."""
    with torch.device("meta"):
        return {f"{ENCODER}{key}": parameter.shape for key, parameter in BertModel(config).named_parameters()}


def read_weights(folder: Path, name: str, config: BertConfig) -> dict[str, Tensor]:
    """Read the weights of the checkpoint `name`, by the names of a BERT with a head.

    Raises `UserError` unless its encoder is whole and has the configuration's shapes. Its pooler may be beside it, or missing.
    """
    path = first_file(folder, WEIGHTS)
    if path is None:
        others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size > 1 << 20)
        large = f"; its large files are {', '.join(others)}" if others else ""
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: it has none of {', '.join(WEIGHTS)}{large}")
    for other in [folder / file for file in WEIGHTS if (folder / file).is_file() and file != path.name]:
        newer = " (newer)" if other.stat().st_mtime > path.stat().st_mtime else ""
        print(f"{name} has two files of weights: {path.name} is read, and {other.name}{newer} is not")
    weights: dict[str, Tensor] = {}
    for file in shards(path) if path.suffix == ".json" else [path.name]:
        weights |= read_file(folder / file)
    if peft := next((key for key in weights if ".base_layer." in key or ".lora_" in key), None):
        raise UserError(f"{name} has PEFT adapters ({peft}): merge them into the weights first (merge_and_unload)")
    if odd := [key for key in weights if WRAPPER.search(key) or (key.endswith(f".{WORDS}") and key != ENCODER + WORDS)]:
        print(f"{name} has weights with a prefix, such as {odd[0]}: it is removed")
    weights = rename_as_bert(_apply_prune_masks(weights, name), name)
    shapes = _shapes(config)
    pooler = {key: shapes.pop(key) for key in POOLER_WEIGHTS}
    check_tensors(weights, shapes, name)
    if not pooler.keys().isdisjoint(weights):
        check_tensors(weights, pooler, name)
        if (folder / POOLER).is_file():
            print(f"{name} has a pooler among its weights: its {POOLER} is not read")
    elif path := find_pooler(name):
        beside = read_file(path)
        check_tensors(beside, pooler, path)
        weights |= {key: beside[key] for key in pooler}
    known = {*shapes, *pooler, *(f"{ENCODER}embeddings.{buffer}" for buffer in ("position_ids", "token_type_ids"))}
    if more := sorted(key for key in weights.keys() - known if key.startswith(ENCODER)):
        raise UserError(f"{name} has {more[0]}, which the BERT of its config.json does not have ({len(more)} tensors)")
    return weights


def read_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file. If it is a training checkpoint, print a line and read its entry with the weights."""
    check_file(path)
    try:
        found: Any = torch.load(path, "cpu", weights_only=True) if path.suffix == ".bin" else load_file(path)
        nested = next((key for key in NESTED if isinstance(found.get(key), Mapping) and _has_bert(found[key])), None)
        if nested and not _has_bert(found):
            print(f"{path} is a training checkpoint: its {nested!r} is read")
            found = found[nested]
        tensors = {str(key): x.to_dense() for key, x in found.items() if isinstance(x, Tensor) and not x.is_meta}
    except Exception as error:  # the libraries raise a dozen types for a damaged file
        why = cause(error)
        if isinstance(error, FileNotFoundError):
            why = "there is no such file"
        elif not path.stat().st_size:
            why = "it is empty"
        elif path.suffix == ".bin":
            why = "it is damaged, or holds more than tensors, whose code is not run: save the model's state_dict() instead"
        raise UserError(f"cannot load a BERT checkpoint from the folder {path.parent}: {path.name}: {why}") from None
    return tensors


def _has_bert(weights: Mapping) -> bool:
    return any(f".{key}".endswith(f".{WORDS}") for key in weights)


def _apply_prune_masks(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Apply the masks that `torch.nn.utils.prune` stores beside weights, and print a line."""
    pruned = [key.removesuffix("_orig") for key in weights if key.endswith("_orig")]
    for key in pruned:
        original, mask = weights.pop(f"{key}_orig"), weights.pop(f"{key}_mask", None)
        if mask is None or mask.shape != original.shape or original.dtype not in FLOATS or key in weights:
            raise UserError(f"{name}: {key}_orig must be floating-point, with a {key}_mask of its shape, and without {key}")
        weights[key] = original * mask.to(original.dtype)
    if pruned:
        print(f"{name} has pruned weights in the form of torch.nn.utils.prune ({pruned[0]}_orig): the masks are applied")
    return weights


def check_tensors(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: object) -> None:
    """Raise `UserError` unless there are finite tensors of these shapes."""
    if missing := shapes.keys() - weights.keys():
        raise UserError(f"{source} lacks {min(missing)} ({len(missing)} tensors of BERT's encoder)")
    for key, shape in shapes.items():
        tensor = weights[key]
        if tensor.dtype not in FLOATS:
            raise UserError(f"{key} of {source} is {tensor.dtype}, not floating-point: a quantized model cannot be pruned")
        if tensor.shape != shape:
            raise UserError(f"{key} of {source} has another shape than in the model: {tuple(tensor.shape)}, not {tuple(shape)}")
        if not tensor.isfinite().all():
            raise UserError(f"{key} of {source} is not finite: the file is damaged, or its training diverged")


def rename_as_bert(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Rename tensors as in a BERT with a head, without prefixes of wrappers. Raises `UserError` unless there is one BERT."""
    old = {WRAPPER.sub("", key): key for key in weights}
    if len(old) != len(weights):
        raise UserError(f"{name} has duplicate weights, with and without a prefix of a torch wrapper")
    places = [key.removesuffix(WORDS) for key in old if f".{key}".endswith(f".{WORDS}")]
    if len(places) != 1:
        raise UserError(f"{name} has {len(places)} BERT encoders, not one ({', '.join(places) or f'no {WORDS}'})")
    place = places[0]  # of the encoder's weights
    kind = place.rstrip(".").rpartition(".")[2]
    if kind != "bert" and kind in CONFIG_MAPPING_NAMES:
        raise UserError(f"{name} has the weights of a {kind} model ({place}{WORDS}); this package prunes BERT encoders")
    around = place.removesuffix(ENCODER) if kind == "bert" else place
    renamed: dict[str, Tensor] = {}
    for key, source in old.items():
        inner = key.removeprefix(place)
        in_encoder = key.startswith(place) and inner.startswith(("embeddings.", "encoder.", "pooler."))
        new = ENCODER + inner if in_encoder else key.removeprefix(around)
        new = new.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if new in renamed:
            raise UserError(f"{name} has two weights that may be its {new}, one of them {source}")
        renamed[new] = weights[source]
    return renamed
