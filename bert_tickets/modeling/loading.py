"""BERT checkpoints: loaded under a task's head, checked, saved as transformers opens them."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertPooler

from bert_tickets.errors import UserError, first_line
from bert_tickets.files import write_tensors
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.dropout import replace_dropout
from bert_tickets.modeling.parameters import ENCODER, WORD_EMBEDDINGS, encoder_weights
from bert_tickets.seeds import seeded

Head = Literal["classifier", "qa", "mlm"]
POOLER = "pooler.safetensors"  # beside a model whose class has none, such as BertForQuestionAnswering
POOLER_WEIGHTS = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def _with_pooler(kind: type) -> type:
    """A Hugging Face class that leaves BERT's pooler out, with it: masks cover the same tensors under every head."""

    class Pooled(kind):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert.pooler = BertPooler(config)

    Pooled.__name__ = kind.__name__  # what a saved config.json says
    return Pooled


HEADS = {
    "classifier": BertForSequenceClassification,
    "qa": _with_pooler(BertForQuestionAnswering),
    "mlm": _with_pooler(BertForMaskedLM),
}


def load_bert(name: str, head: Head, init: str, seed: int, labels: int = 2) -> tuple[Net, Any]:
    """A BERT checkpoint under a head, in fp32 on the CPU, and its tokenizer.

    `init` is what the encoder holds: `pretrained`, `random` (BERT's own initialization, drawn by `seed`) or a safetensors file
    of weights. The head is drawn by `seed`; but the checkpoint's own is kept for masked language modelling, where it is
    pre-trained too. Where a head does not use the pooler, it is there, masked and never trained. Raises `UserError` for a
    checkpoint that is not BERT, or damaged.
    """
    transformers.logging.set_verbosity_error()  # its table of new head weights reads like an error
    transformers.utils.logging.disable_progress_bar()
    try:
        config, tokenizer = _read_config(name, labels)
        net, info = HEADS[head].from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # otherwise the checkpoint's own, half for some
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of another head, which is drawn anyway
            weights_only=True,
        )
    except UserError:
        raise
    except Exception as error:  # of a damaged file the library raises a dozen kinds, all of which mean the same here
        where = f"the folder {name}" if Path(name).exists() else f"{name} (no such folder here, and the hub did not give it)"
        raise UserError(
            f"cannot load a BERT checkpoint from {where}: {type(error).__name__}: {first_line(error)}\n"
            "Give --model a folder with config.json, model.safetensors and tokenizer.json, or the name of a model that is "
            "in the Hugging Face cache or can be downloaded."
        ) from None
    _check_dtype(name)
    replace_dropout(net)
    missing = _check_encoder(net, info, name)
    net.bert.pooler.requires_grad_(head == "classifier")
    _init_head(net, info, name, seed, keep=head == "mlm" and init != "random")
    if missing and (beside := _find(name, POOLER)) is not None:
        load_encoder(net, beside)
    elif missing:
        print(f"{name} has no pooler: its two tensors are drawn at random")
        init_weights(net, seeded(seed, "pooler"), sorted(missing))
    if init == "random":
        init_weights(net, seeded(seed, "encoder"), encoder_weights(net))
    elif init != "pretrained":
        load_encoder(net, Path(init))
    return net, tokenizer


def _read_config(name: str, labels: int) -> tuple[Any, Any]:
    """The configuration, for a head with so many labels, and the tokenizer. Checks that it is BERT, and the tokenizer's size."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type != "bert" or getattr(config, "is_decoder", False):
        raise UserError(f"{name} is a {config.model_type} model; this package prunes BERT encoders")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{name} is quantized; pruning needs floating-point weights")
    if getattr(config, "position_embedding_type", None) not in ("absolute", None):
        raise UserError(f"{name} has {config.position_embedding_type} positions, and transformers builds BERT with absolute ones")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not 100 < len(tokenizer) <= config.vocab_size:  # a vocabulary that was not found reads as a handful of special tokens
        raise UserError(f"the tokenizer of {name} has {len(tokenizer)} tokens and the model {config.vocab_size}: they do not fit")
    ids, cls, sep = tokenizer("a", "b")["input_ids"], tokenizer.cls_token_id, tokenizer.sep_token_id
    if ids[0] != cls or ids[-1] != sep or ids.count(sep) != 2:
        raise UserError(f"the tokenizer of {name} does not put [CLS] and [SEP] around texts, as BERT's does")
    config.problem_type = config.id2label = None  # of the checkpoint's own head, as its labels' names are
    config.num_labels = labels
    config.chunk_size_feed_forward = 0  # changes no result, and has to divide a batch's tokens
    return config, tokenizer


def _check_encoder(net: Net, info: dict[str, Any], name: str) -> set[str]:
    """Check that a checkpoint filled the encoder, with finite floats. Returns the pooler's tensors, if it lacks these."""
    missing = {key for key in info["missing_keys"] if key.startswith(ENCODER)}
    if missing and missing != POOLER_WEIGHTS:
        raise UserError(f"{name} lacks {min(missing - POOLER_WEIGHTS or missing)} ({len(missing)} tensors of BERT's encoder)")
    for key, *_ in info["mismatched_keys"]:
        if key.startswith(ENCODER):
            raise UserError(f"{key} of {name} has another shape than its config.json says")
    dropped = sorted(key for key in info["unexpected_keys"] if key.removeprefix(ENCODER).startswith("encoder."))
    if dropped:
        raise UserError(f"{name} has {dropped[0]}, for which the BERT of its config.json has no place ({len(dropped)} tensors)")
    _check_finite(dict(net.named_parameters()), name)
    return missing


def _check_dtype(name: str) -> None:
    """Check that weights are floats: the library would cast the integers of a quantized model without their scales."""
    path = _find(name, "model.safetensors")
    if path is None:
        return
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            dtype = file.get_slice(key).get_dtype()
            if key.endswith(("weight", "bias")) and dtype not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"{key} of {name} is {dtype}, not floating-point: a quantized model cannot be pruned")


def _check_finite(weights: dict[str, nn.Parameter], source: object) -> None:
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} of {source} is not finite: the file is damaged, or its training had failed")


def _init_head(net: Net, info: dict[str, Any], name: str, seed: int, *, keep: bool) -> None:
    """Draw the head by the seed; with `keep`, only what the checkpoint does not have."""
    new = [key for key, _ in net.named_parameters() if not key.startswith(ENCODER)]
    if keep:
        absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        new = [key for key in new if key in absent]
        if new:
            print(f"{name} has no head for masked language modelling: its transform is drawn, its decoder is the embeddings")
    init_weights(net, seeded(seed, "head"), new)


def save_plain(net: Net, folder: Path) -> None:
    """Save a network as transformers' own class opens it. Where that one has no pooler, ours goes into a file beside the
    model's, and `load_bert` finds it there."""
    weights = net.state_dict()
    if not isinstance(net, HEADS["classifier"]):
        write_tensors(folder / POOLER, {name: weights.pop(name) for name in list(weights) if name.startswith("bert.pooler.")})
    net.save_pretrained(folder, state_dict=weights)
    for file in folder.glob("model*.safetensors"):  # the library leaves it readable by its owner alone
        shutil.copymode(folder / "config.json", file)


def _find(name: str, file: str) -> Path | None:
    """A file of a checkpoint, in a folder or on the hub."""
    try:
        return Path(transformers.utils.cached_file(name, file))
    except OSError:
        return None


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
        raise UserError(f"--init {path}: give pretrained, random, or a file of weights; there is no such file")
    try:
        weights = load_file(path)
    except Exception as error:
        raise UserError(f"{path} is damaged, or not a safetensors file: {first_line(error)}") from None
    encoder = encoder_weights(net)
    known = {name: tensor for name, tensor in weights.items() if name in encoder}
    if more := sorted(name for name in weights.keys() - encoder.keys() if name.startswith(f"{ENCODER}encoder.")):
        raise UserError(f"{path} has {more[0]}, which the model does not have: it belongs to another network")
    if not known:
        raise UserError(f"{path} holds none of the encoder's weights (names such as {next(iter(encoder))})")
    for name, tensor in known.items():
        if tensor.shape != encoder[name].shape or not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}{tuple(tensor.shape)} in {path}, not {tuple(encoder[name].shape)} floats")
        encoder[name].copy_(tensor)
    _check_finite({name: encoder[name] for name in known}, path)
    if 2 < len(known) < len(encoder):
        print(f"{path} sets {len(known)} of the encoder's {len(encoder)} tensors; the others stay as they were")
