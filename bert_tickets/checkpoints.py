"""What is asked of a checkpoint before a network is made of it: sizes that a BERT can have, weights that are numbers, a
tokenizer of its own. What a file leaves out must not be made up, and what it says must not be dropped, in silence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from bert_tickets import UserError
from bert_tickets.files import read_dtypes, read_json

INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # name the parts of a checkpoint in several files
FLOATS = ("F64", "F32", "F16", "BF16")  # in safetensors' words; others are quantised, and mean nothing without their scales
LAYERS = 1000  # BERT-large has 24; modules take memory before any file is looked at
WEIGHTS = 2**32  # 16 GiB of fp32; the largest BERT published has 3.9e9


def check_config(config: Any, name: str) -> None:
    """Raise `UserError` where a BERT's configuration is one that cannot be trained, or not as it says."""

    def need(ok: bool, key: str, what: str) -> None:
        if not ok:
            raise UserError(f"the config.json of {name} cannot be used: its {key} is {getattr(config, key)}, and {what}")

    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "type_vocab_size"):
        need(getattr(config, key) >= 1, key, "at least 1 is needed")
    need(1 <= config.num_hidden_layers <= LAYERS, "num_hidden_layers", f"1 to {LAYERS} are possible")
    need(config.hidden_size % config.num_attention_heads == 0, "num_attention_heads", f"hidden_size is {config.hidden_size}")
    tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    weights = config.hidden_size * (tables + config.hidden_size) + config.num_hidden_layers * layer
    need(weights <= WEIGHTS, "hidden_size", f"with its other sizes that is {weights:,} weights: no BERT has so many")
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        need(0 <= getattr(config, key) < 1, key, "a share from 0 to below 1 is needed")
    for key in ("layer_norm_eps", "initializer_range"):
        need(0 <= getattr(config, key) < math.inf, key, "a number from 0 is needed")
    need(config.pad_token_id is None or 0 <= config.pad_token_id < config.vocab_size, "pad_token_id", "no token has that number")
    for key in ("is_decoder", "add_cross_attention", "quantization_config"):
        if getattr(config, key, None):
            need(False, key, "only plain BERT encoders, in floats, are pruned here")
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        need(False, "position_embedding_type", "transformers builds BERT with absolute positions alone")


def parts_of(index: Path) -> list[str]:
    """The files that an index names, which are to lie beside it. Raises `UserError` for one that leads elsewhere."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of names to files")
    for part in places.values():
        if PurePath(part).name != part:
            raise UserError(f"{index} is refused: it names {json.dumps(part[:200])}, which does not lie beside it")
    return sorted(set(places.values()))


def check_floats(path: Path) -> None:
    """Raise `UserError` where a safetensors file's weights are no floating-point numbers. (Buffers may be whole numbers.)"""
    for name, dtype in read_dtypes(path).items():
        if name.endswith(("weight", "bias", "gamma", "beta")) and dtype not in FLOATS:
            raise UserError(f"{path}: {name} is {dtype}, no floating-point number; a quantised model cannot be pruned")


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Raise `UserError` where a weight is infinite or NaN."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} of {source} is not finite: the file is damaged, or its training had failed")


def check_keys(missing: list[str], unexpected: list[str], name: str) -> None:
    """Raise `UserError` where weights of the encoder would be drawn at random, or left out. Both lists are as transformers gives
    them; a checkpoint may lack the whole pooler."""
    if missing and (set(missing) != {"bert.pooler.dense.bias", "bert.pooler.dense.weight"}):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{name} lacks {sorted(missing)[0]}{others} of BERT's weights")
    dropped = sorted(key for key in unexpected if key.removeprefix("bert.").startswith("encoder."))
    if dropped:
        raise UserError(
            f"{name} has {dropped[0]}, for which there is no place in the BERT of its config.json ({len(dropped)} such weights): "
            "they would be left out; correct num_hidden_layers, or the file"
        )


def check_tokenizer(tokenizer: Any, own: Path | None, config: Any, name: str) -> None:
    """Raise `UserError` where a tokenizer is not this model's: its tokens have no embeddings, or it makes no
    [CLS] a [SEP] b [SEP]. `own` is its tokenizer.json, where it has one: what it lacks the library adds by itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer of {name} is {type(tokenizer).__name__}; one with a tokenizer.json is needed")
    known = len(tokenizer)
    if not 100 < known <= config.vocab_size:  # a vocabulary that was not found reads as a handful of special tokens
        raise UserError(f"the tokenizer of {name} has {known} tokens and the model {config.vocab_size}: they do not fit")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    word, number = max(vocabulary.items(), key=lambda entry: entry[1])
    if number >= config.vocab_size:
        raise UserError(f"the tokenizer of {name} gives {word[:80]!r} the number {number}, and the model has {config.vocab_size}")
    words = set(backend.get_vocab(with_added_tokens=False))
    if own is not None:
        words |= {token.get("content") for token in read_json(own).get("added_tokens", [])}
    for what, token in {"[CLS]": tokenizer.cls_token, "[SEP]": tokenizer.sep_token, "[UNK]": tokenizer.unk_token}.items():
        if token not in words:
            raise UserError(f"the vocabulary of {name} has no {what}: is it a BERT's?")
    ids, cls, sep = tokenizer("a", "b")["input_ids"], tokenizer.cls_token_id, tokenizer.sep_token_id
    if ids[0] != cls or ids[-1] != sep or ids.count(sep) != 2:
        raise UserError(f"the tokenizer of {name} does not put [CLS] and [SEP] around texts, as BERT's does")
