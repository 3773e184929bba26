"""Read the configuration and the weights in a checkpoint's folder. Refuses what would make another network of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from bert_tickets.errors import UserError, cause
from bert_tickets.files import read_json
from bert_tickets.modeling.checkpoint import CONFIGS, WEIGHTS, shards
from bert_tickets.modeling.parameters import ENCODER

# The fields of config.json that describe the network. All others, such as output_attentions, have their defaults.
NETWORK = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "classifier_dropout",
    "tie_word_embeddings",
)
# The fields that make another network of it, unless they have these values.
FIXED = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "position_embedding_type": "absolute",
    "quantization_config": None,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# How modules are named inside torch's wrappers: of several GPUs, of torch.compile, of FSDP, of recomputed activations.
WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
WORDS = "embeddings.word_embeddings.weight"


def read_config(folder: Path, name: str, labels: int) -> BertConfig:
    """Read the configuration of the checkpoint `name`, for a head of `labels` labels. Raises `UserError` unless it is a BERT."""
    if adapters := sorted(path.name for path in folder.glob("*adapter_*")):
        raise UserError(f"{name} has an adapter ({', '.join(adapters)}): merge it into the weights first, or remove its files")
    path = next((folder / file for file in CONFIGS if (folder / file).is_file()), None)
    if path is None:
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: it has no config.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    kind = values.get("model_type")
    if path.name == CONFIGS[1]:
        print(f"{name} has no config.json: {path.name} is read")
    elif kind is None and not str((values.get("architectures") or [""])[0]).startswith("Bert"):
        raise UserError(f'{path} has no "model_type": if the model is a BERT, add "model_type": "bert"')
    if kind not in (None, "bert"):
        raise UserError(f"{path} is of a model of type {kind}; this package prunes BERT encoders")
    for key, default in FIXED.items():
        if values.get(key) not in (None, default):
            raise UserError(
                f'{path}: "{key}" is {values[key]!r}: not a plain BERT encoder, or a decoder. This package prunes encoders'
            )
    try:
        return BertConfig(num_labels=labels, **{key: values[key] for key in NETWORK if key in values})
    except Exception as error:
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: {path.name}: {cause(error)}") from None


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the weights of the checkpoint `name`, by the names of a BERT with a head. Says which file is read if there are two."""
    found = [file for file in WEIGHTS if (folder / file).is_file()]
    if not found:
        others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size > 1 << 20)
        more = f"; its large files are {', '.join(others)}" if others else ""
        raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: it has none of {', '.join(WEIGHTS)}{more}")
    if len(found) > 1:
        newer = " (newer)" if (folder / found[1]).stat().st_mtime > (folder / found[0]).stat().st_mtime else ""
        print(f"{name} has two files of weights: {found[0]} is read, and {', '.join(found[1:])}{newer} is not")
    weights: dict[str, Tensor] = {}
    for file in shards(folder / found[0]) if found[0].endswith(".json") else found[:1]:
        try:
            path = folder / file
            part = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            weights |= {key: value for key, value in part.items() if isinstance(value, Tensor)}
        except Exception as error:  # the libraries raise a dozen types for a damaged file
            raise UserError(f"cannot load a BERT checkpoint from the folder {folder}: {file}: {cause(error)}") from None
    return _berts_names(weights, name)


def _berts_names(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Rename weights as in a BERT with a head: without what a wrapper or a class around it puts in front, which is said."""
    old = {WRAPPER.sub("", key): key for key in weights}
    if len(old) != len(weights):
        raise UserError(f"{name} has some weights twice, of which one is inside a wrapper of torch")
    places = [key.removesuffix(WORDS) for key in old if key == WORDS or key.endswith(f".{WORDS}")]
    if len(places) != 1:
        several = f"several: {', '.join(places)}" if places else "none"
        raise UserError(f"{name} lacks {ENCODER}{WORDS}, by which a BERT is found among its weights: there is {several}")
    place = places[0]  # of the encoder's weights
    around = place.removesuffix(ENCODER) if f".{place}".endswith(f".{ENCODER}") else place
    kind = place.rstrip(".").rpartition(".")[2]
    if kind != "bert" and kind in CONFIG_MAPPING_NAMES:
        raise UserError(f"{name} has the weights of a {kind} model ({place}{WORDS}); this package prunes BERT encoders")
    renamed: dict[str, Tensor] = {}
    for key, source in old.items():
        inner = key.removeprefix(place) if key.startswith(place) else ""
        if place != around or inner.startswith(("embeddings.", "encoder.", "pooler.")):
            new = ENCODER + inner if inner else key.removeprefix(around)
        else:
            new = key.removeprefix(around)
        new = new.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if new in renamed:
            raise UserError(f"{name} has two weights that may be its {new}, one of them {source}")
        renamed[new] = weights[source]
    if around or any(key != source for key, source in old.items()):
        print(f"{name} names its weights {old[place + WORDS]} and the like: read as {ENCODER}{WORDS}")
    return renamed
