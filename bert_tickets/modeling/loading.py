"""Load BERT checkpoints with a task's head, check them, and save them in transformers' format."""

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
DECODER_BIAS = "cls.predictions.decoder.bias"
POOLER_WEIGHTS = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def _with_pooler(kind: type) -> type:
    """Add BERT's pooler to a Hugging Face class without one, so that masks cover the same tensors for every task."""

    class Pooled(kind):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert.pooler = BertPooler(config)

    Pooled.__name__ = kind.__name__  # is written to config.json
    return Pooled


HEADS = {
    "classifier": BertForSequenceClassification,
    "qa": _with_pooler(BertForQuestionAnswering),
    "mlm": _with_pooler(BertForMaskedLM),
}


def load_bert(name: str, head: Head, init: str, seed: int, labels: int = 2) -> tuple[Net, Any]:
    """Load a BERT checkpoint with a head, in fp32 on the CPU, and its tokenizer.

    `init` selects the encoder's weights: `pretrained`, `random` (BERT's initialization, drawn by `seed`) or a safetensors file.
    The head is drawn by `seed`; the MLM head is the checkpoint's own, unless `init` is random. A pooler that the head does not
    use is frozen. Raises `UserError` for a checkpoint that is not BERT, or damaged.
    """
    transformers.logging.set_verbosity_error()  # otherwise it prints a table of new head weights
    transformers.utils.logging.disable_progress_bar()
    try:
        config, tokenizer = _read_config(name, labels)
        net, info = HEADS[head].from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # otherwise the checkpoint's own, half for some
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # another task's head, which is drawn again
            weights_only=True,
        )
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types for a damaged file
        where = f"the folder {name}" if Path(name).exists() else f"{name} (no such folder, and the hub did not provide it)"
        raise UserError(
            f"cannot load a BERT checkpoint from {where}: {type(error).__name__}: {first_line(error)}\n"
            "Give --model a folder with config.json, model.safetensors and tokenizer.json, or the name of a model that is in the "
            "Hugging Face cache or on the hub."
        ) from None
    _check_dtype(name)
    replace_dropout(net)
    missing = _check_encoder(net, info, name)
    net.bert.pooler.requires_grad_(head == "classifier")
    if head == "mlm":
        predictions = net.cls.predictions  # transformers makes its two biases one only if it ties the decoder's weights as well
        if DECODER_BIAS in info["missing_keys"]:
            predictions.decoder.bias = predictions.bias
        else:
            predictions.bias = predictions.decoder.bias
    _init_head(net, info, name, seed, keep=head == "mlm" and init != "random")
    if missing and (beside := _find(name, POOLER)) is not None:
        load_encoder(net, beside)
    elif missing:
        print(f"{name} has no pooler: its weights are drawn at random")
        init_weights(net, seeded(seed, "pooler"), sorted(missing))
    if init == "random":
        init_weights(net, seeded(seed, "encoder"), encoder_weights(net))
    elif init != "pretrained":
        load_encoder(net, Path(init))
    return net, tokenizer


def _read_config(name: str, labels: int) -> tuple[Any, Any]:
    """Read the configuration, for a head with `labels` labels, and the tokenizer. Checks that both are BERT's."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type != "bert" or getattr(config, "is_decoder", False):
        raise UserError(f"{name} is a {config.model_type} model or a decoder; this package prunes BERT encoders")
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not 100 < len(tokenizer) <= config.vocab_size:  # without its vocabulary file a tokenizer has only special tokens
        raise UserError(f"the tokenizer of {name} has {len(tokenizer)} tokens and the model {config.vocab_size}: no match")
    ids, cls, sep = tokenizer("a", "b")["input_ids"], tokenizer.cls_token_id, tokenizer.sep_token_id
    if ids[0] != cls or ids[-1] != sep or ids.count(sep) != 2:
        raise UserError(f"the tokenizer of {name} does not put [CLS] and [SEP] around texts, as BERT's does")
    config.problem_type = config.id2label = None  # these belong to the checkpoint's own head
    config.num_labels = labels
    config.chunk_size_feed_forward = 0  # otherwise it must divide the number of tokens; results do not depend on it
    return config, tokenizer


def _check_encoder(net: Net, info: dict[str, Any], name: str) -> set[str]:
    """Check that a checkpoint sets the whole encoder to finite values. Returns the pooler's tensors that it lacks."""
    missing = {key for key in info["missing_keys"] if key.startswith(ENCODER)}
    if missing and missing != POOLER_WEIGHTS:
        raise UserError(f"{name} lacks {min(missing - POOLER_WEIGHTS or missing)} ({len(missing)} tensors of BERT's encoder)")
    for key, *_ in info["mismatched_keys"]:
        if key.startswith(ENCODER):
            raise UserError(f"{key} of {name} has another shape than in its config.json")
    dropped = sorted(key for key in info["unexpected_keys"] if key.removeprefix(ENCODER).startswith("encoder."))
    if dropped:
        raise UserError(f"{name} has {dropped[0]}, which the BERT of its config.json does not have ({len(dropped)} tensors)")
    _check_finite(dict(net.named_parameters()), name)
    return missing


def _check_dtype(name: str) -> None:
    """Check that weights are floats. transformers would cast the integers of a quantized model without their scales."""
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
            raise UserError(f"{name} of {source} is not finite: the file is damaged, or its training diverged")


def _init_head(net: Net, info: dict[str, Any], name: str, seed: int, *, keep: bool) -> None:
    """Draw the head by the seed; with `keep`, only the tensors that the checkpoint does not have."""
    new = [key for key, _ in net.named_parameters() if not key.startswith(ENCODER)]
    if keep:
        absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        new = [key for key in new if key in absent]
        if new:
            print(f"{name} has no head for masked language modelling: its transform is drawn at random")
    init_weights(net, seeded(seed, "head"), new)


def save_model(net: Net, tokenizer: Any, folder: Path) -> None:
    """Save a network and its tokenizer as a Hugging Face folder. Raises `OSError` if the disk is full."""
    try:
        save_plain(net, folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the libraries, written in Rust, raise other types for a full disk
        raise OSError(f"cannot write {folder}: {first_line(error)}") from error


def save_plain(net: Net, folder: Path) -> None:
    """Save a network so that transformers' own class opens it; the pooler in a separate file if that class has none."""
    weights = net.state_dict()
    if DECODER_BIAS in weights and not net.config.tie_word_embeddings:  # transformers saves shared tensors only if it ties them
        weights[DECODER_BIAS] = weights[DECODER_BIAS].clone()
    if not isinstance(net, HEADS["classifier"]):
        write_tensors(folder / POOLER, {name: weights.pop(name) for name in list(weights) if name.startswith("bert.pooler.")})
    net.save_pretrained(folder, state_dict=weights)
    for file in folder.glob("model*.safetensors"):  # the library makes it readable by its owner only
        shutil.copymode(folder / "config.json", file)


def _find(name: str, file: str) -> Path | None:
    """Find a file of a checkpoint, in a folder or on the hub."""
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
        raise UserError(f"--init {path}: no such file; give pretrained, random, or a safetensors file")
    try:
        weights = load_file(path)
    except Exception as error:
        raise UserError(f"{path} is damaged, or not a safetensors file: {first_line(error)}") from None
    encoder = encoder_weights(net)
    known = {name: tensor for name, tensor in weights.items() if name in encoder}
    if more := sorted(name for name in weights.keys() - encoder.keys() if name.startswith(f"{ENCODER}encoder.")):
        raise UserError(f"{path} has {more[0]}, which the model does not have")
    if not known:
        raise UserError(f"{path} has none of the encoder's weights (such as {next(iter(encoder))})")
    for name, tensor in known.items():
        if tensor.shape != encoder[name].shape or not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}{tuple(tensor.shape)} in {path}, not {tuple(encoder[name].shape)} floats")
        encoder[name].copy_(tensor)
    _check_finite({name: encoder[name] for name in known}, path)
    if len(known) < len(encoder) and path.name != POOLER:
        print(f"{path} sets {len(known)} of the encoder's {len(encoder)} tensors; the others are unchanged")
