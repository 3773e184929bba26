"""Load BERT checkpoints with a task's head, check them, and save them in transformers' format."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification
from transformers.initialization import no_init_weights
from transformers.models.bert.modeling_bert import BertPooler

from bert_tickets.content import POOLER
from bert_tickets.errors import UserError, cause
from bert_tickets.files import read_tensors, write_tensors
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.checkpoint import resolve
from bert_tickets.modeling.dropout import replace_dropout
from bert_tickets.modeling.parameters import DECODER, ENCODER, WORD_EMBEDDINGS, encoder_weights, head_weights, set_parameters
from bert_tickets.modeling.tokenizer import OwnTokenizer, load_tokenizer
from bert_tickets.modeling.weights import FLOATS, POOLER_WEIGHTS, check_tensors, read_config, read_file, read_weights
from bert_tickets.seeds import seeded

Head = Literal["classifier", "qa", "mlm"]
HEAD_NAMES = ("cls.", "classifier.", "qa_outputs.")
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def _with_pooler(kind: type) -> type:
    """Add BERT's pooler to a Hugging Face class without one, so that masks cover the same tensors for every task."""

    class Pooled(kind):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert.pooler = BertPooler(config)

    Pooled.__name__ = kind.__name__  # is written to config.json
    return Pooled


HEADS = {"classifier": BertForSequenceClassification}
HEADS |= {"qa": _with_pooler(BertForQuestionAnswering), "mlm": _with_pooler(BertForMaskedLM)}


def load_bert(name: str, head: Head, init: str, seed: int, labels: int = 2) -> tuple[Net, OwnTokenizer]:
    """Load a BERT checkpoint with a head, in fp32 on the CPU, and its tokenizer.

    `init` selects the encoder's weights: `pretrained`, `random` (BERT's initialization, drawn by `seed`) or a safetensors file.
    The head is drawn by `seed`; the MLM head is the checkpoint's own, unless `init` is random. A pooler that the head does not
    use is frozen. Raises `UserError` for a checkpoint that is not BERT, or damaged.
    """
    folder = resolve(name)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = read_config(folder, name, labels)
    tokenizer = load_tokenizer(folder, name, config)
    weights = read_weights(folder, name, config)
    keep = head == "mlm" and init != "random"
    decoder, words = weights.get(DECODER), weights[WORD_EMBEDDINGS]
    if keep and decoder is not None and decoder.shape == words.shape and not torch.equal(decoder, words):
        config.tie_word_embeddings = False  # otherwise transformers overwrites the decoder
    net = _build(head, config)
    net.bert.pooler.requires_grad_(head == "classifier")
    new = _set_mlm_head(net, weights, name) if keep else list(head_weights(net))
    init_weights(net, seeded(seed, "head"), new)
    unused = sorted(key for key in weights if not key.startswith((ENCODER, *HEAD_NAMES)))
    if keep:
        known = {*head_weights(net), BIAS, DECODER, DECODER_BIAS}
        unused += sorted(key for key in weights.keys() - known if key.startswith("cls.predictions."))
    if unused:
        print(f"{name} has weights that are not used: {unused[0]}" + f" and {len(unused) - 1} more" * (len(unused) > 1))
    if not weights.keys() >= POOLER_WEIGHTS:
        print(f"{name} has no pooler: its weights are drawn at random")
        init_weights(net, seeded(seed, "pooler"), sorted(POOLER_WEIGHTS))
    _set_encoder(net, weights)
    if config.type_vocab_size == 1 and head != "mlm":
        print(f"{name} has one token type (type_vocab_size 1): both texts of a pair get type 0")
    if init == "random":
        init_weights(net, seeded(seed, "encoder"), encoder_weights(net))
    elif init != "pretrained":
        load_encoder(net, Path(init))
    return net, tokenizer


def _build(head: Head, config: Any) -> Net:
    """Make a network with a head, in evaluation mode. Its parameters have no values yet."""
    with no_init_weights():
        net: Net = HEADS[head](config)
    net.tie_weights()  # is part of what was left out
    if head == "mlm":
        predictions = net.cls.predictions  # transformers makes its two biases one only if it ties the decoder's weights as well
        predictions.decoder.bias = predictions.bias
    replace_dropout(net)
    return net.eval()


@torch.no_grad()
def _set_encoder(net: Net, weights: Mapping[str, Tensor]) -> None:
    for key, parameter in encoder_weights(net).items():
        if key in weights:
            parameter.copy_(weights[key])


@torch.no_grad()
def _set_mlm_head(net: Net, weights: Mapping[str, Tensor], name: str) -> list[str]:
    """Set the MLM head's weights, and print which are not the checkpoint's own. Returns the names of those to be drawn."""
    head, drawn, notes = head_weights(net), [], []
    for key, parameter in (head | {DECODER: net.cls.predictions.decoder.weight}).items():
        found = [weights[other] for other in ((DECODER_BIAS, BIAS) if key == BIAS else (key,)) if other in weights]
        fitting = [tensor for tensor in found if tensor.shape == parameter.shape and tensor.dtype in FLOATS]
        if fitting:
            check_tensors({key: fitting[0]}, {key: parameter.shape}, name)
            parameter.copy_(fitting[0])
            if len(fitting) > 1 and not torch.equal(*fitting):
                notes.append(f"its {DECODER_BIAS} is used, and {BIAS}, which differs, is not")
        elif found:
            notes.append(f"{key} does not fit ({found[0].dtype} of shape {tuple(found[0].shape)}, not {tuple(parameter.shape)})")
        if not fitting and key in head:  # a decoder that is not in it is the word embeddings
            drawn.append(key)
    if drawn:
        part = ", ".join(drawn) if len(drawn) < len(head) else "all"
        notes.insert(0, f"lacks {part} of a head for masked language modelling: drawn at random (biases 0)")
    if DECODER in drawn:
        notes.append("with its decoder, which config.json does not tie to the word embeddings")
    elif DECODER in head:
        notes.append("its decoder is untied, not the word embeddings")
    if notes:
        print(f"{name} {'; '.join(notes)}" if drawn else f"{name}: {'; '.join(notes)}")
    return drawn


def save_model(net: Net, tokenizer: Any, folder: Path) -> None:
    """Save a network and its tokenizer for transformers' own classes; a pooler that they lack is in a file of its own."""
    weights = net.state_dict()
    if DECODER_BIAS in weights and not net.config.tie_word_embeddings:  # transformers saves shared tensors only if it ties them
        weights[DECODER_BIAS] = weights[DECODER_BIAS].clone()
    try:
        if not isinstance(net, HEADS["classifier"]):
            write_tensors(folder / POOLER, {name: weights.pop(name) for name in sorted(POOLER_WEIGHTS)})
        net.save_pretrained(folder, state_dict=weights)
        for file in folder.glob("model*.safetensors"):  # the library makes it readable by its owner only
            shutil.copymode(folder / "config.json", file)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the libraries, written in Rust, raise other types for a full disk
        raise OSError(f"cannot write {folder}: {cause(error)}") from error


@torch.no_grad()
def init_weights(net: Net, generator: torch.Generator, names: Collection[str]) -> None:
    """Initialize the named parameters as BERT does: N(0, initializer_range), LayerNorm 1 and 0, biases 0."""
    for name in names:
        parameter = net.get_parameter(name)
        if name.endswith("bias"):
            parameter.zero_()
        elif "LayerNorm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(0, net.config.initializer_range, generator=generator)
    padding = net.config.pad_token_id
    if padding is not None and WORD_EMBEDDINGS in names:
        net.bert.embeddings.word_embeddings.weight[padding] = 0


@torch.no_grad()
def load_encoder(net: Net, path: Path) -> None:
    """Overwrite the encoder's weights with those of a safetensors file; a head in the file is ignored."""
    if not path.is_file():
        raise UserError(f"--init {path}: no such file; give pretrained, random, or a safetensors file")
    weights, encoder = read_file(path), encoder_weights(net)
    known = {name: tensor for name, tensor in weights.items() if name in encoder}
    if more := sorted(name for name in weights.keys() - encoder.keys() if name.startswith(f"{ENCODER}encoder.")):
        raise UserError(f"{path} has {more[0]}, which the model does not have")
    if not known:
        raise UserError(f"{path} has none of the encoder's weights (such as {next(iter(encoder))})")
    check_tensors(known, {name: encoder[name].shape for name in known}, path)
    _set_encoder(net, known)
    if len(known) < len(encoder):
        print(f"{path} sets {len(known)} of the encoder's {len(encoder)} tensors; the others are unchanged")


def load_trained(net: Net, path: Path) -> None:
    """Overwrite all weights, the head's included, with those of a finished run. Raises `UserError` if they do not fit."""
    set_parameters(net, read_tensors(path), path)
