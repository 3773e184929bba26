"""BERT with a task's head: loading, what of it may be pruned, snapshot and rewind.

The encoder is everything under `bert.`, pooler included; the rest is the task's head (gamma in the paper).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertPooler

from bert_tickets import UserError, first_line
from bert_tickets.batches import seeded
from bert_tickets.bert import Net
from bert_tickets.checkpoints import INDEX, check_config, check_finite, check_floats, check_keys, check_tokenizer, parts_of
from bert_tickets.dropout import replace_dropout
from bert_tickets.files import check, write_tensors
from bert_tickets.mask import Mask

ENCODER = "bert."
POOLER = "pooler.safetensors"  # beside a model whose class has none, such as BertForQuestionAnswering
PRUNABLE = re.compile(
    r"bert\.(encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
    r"|pooler\.dense)\.weight"
)


# ---- loading ----


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


def load_bert(name: str, head: Literal["classifier", "qa", "mlm"], init: str, seed: int, labels: int = 2) -> tuple[Net, Any]:
    """A BERT checkpoint under a head, in fp32 on the CPU, and its tokenizer.

    `init` is what the encoder holds: `pretrained`, `random` (BERT's own initialisation, drawn by `seed`) or a
    safetensors file of weights. The head is drawn anew, by `seed`; but the checkpoint's own is kept for masked language
    modelling, where it is pre-trained too. Where a head does not use the pooler, it is there, masked and never trained.
    Raises `UserError` for what is no BERT.
    """
    transformers.logging.set_verbosity_error()  # its table of new head weights reads like a failure; ours say it
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # by itself it asks on the terminal
        if config.model_type != "bert":
            raise UserError(f"{name} is a {config.model_type} model; this package prunes BERT")
        check_config(config, name)
        if config.hidden_act not in ACT2FN:
            raise UserError(f"the config.json of {name} cannot be used: there is no hidden_act {config.hidden_act}")
        _check_weight_files(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        check_tokenizer(tokenizer, _find(name, "tokenizer.json"), config, name)
        config.problem_type = config.id2label = None  # of the checkpoint's own head, as its labels' names are
        config.num_labels = labels
        config.chunk_size_feed_forward = 0  # changes no result, and has to divide a batch's tokens
        net, info = HEADS[head].from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # otherwise the checkpoint's own, half for some
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of another head, which is drawn anew anyway
            weights_only=True,
        )
    except UserError:
        raise
    except Exception as error:  # of a damaged file the library raises a dozen kinds, all of which mean the same here
        where = f"the folder {name}" if Path(name).exists() else f"{name} (no such folder here, and the hub did not give it)"
        raise UserError(
            f"no BERT checkpoint to be had from {where}: {_reason(error)}\n"
            "Give --model a folder with config.json, model.safetensors and tokenizer.json, or the name of a model that is "
            "in the Hugging Face cache or can be downloaded."
        ) from None
    replace_dropout(net)

    missing = {key for key in info["missing_keys"] if key.startswith(ENCODER)}
    check_keys(sorted(missing), sorted(info["unexpected_keys"]), name)
    misfits = [key for key, *_ in info["mismatched_keys"] if key.startswith(ENCODER)]
    if misfits:
        raise UserError(f"{misfits[0]} of {name} has another shape than its config.json says")
    check_finite(dict(net.named_parameters()), name)
    new = [key for key, _ in net.named_parameters() if not key.startswith(ENCODER)]
    if head == "mlm" and init != "random":
        absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        new = [key for key in new if key in absent]
        if new:
            print(f"{name} has no head for masked language modelling: its transform is drawn anew, its decoder is the embeddings")
    draw(net, seeded(seed, "head"), new)
    net.bert.pooler.requires_grad_(head == "classifier")
    if missing and (beside := _find(name, POOLER)):
        _fill(net, beside)
    elif missing:
        print(f"{name} has no pooler: its two tensors are drawn at random")
        draw(net, seeded(seed, "pooler"), sorted(missing))
    if init == "random":
        draw(net, seeded(seed, "encoder"), [key for key, _ in net.named_parameters() if key.startswith(ENCODER)])
    elif init != "pretrained":
        known, every = _fill(net, Path(init)), len(encoder_weights(net))
        if known < every:
            print(f"{init} sets {known} of the encoder's {every} tensors; the others stay pre-trained")
    return net, tokenizer


def save_plain(net: Net, folder: Path) -> None:
    """Save a network as transformers' class of its name opens it without a word: where that one has no pooler, ours goes into a
    file beside the model's, and `load_bert` finds it there."""
    weights: dict[str, Tensor] = net.state_dict()
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


def _reason(error: Exception) -> str:
    """What went wrong as a checkpoint was read, in a line."""
    kind = type(error).__name__
    if kind == "UnpicklingError":  # torch's own words tell how to run what the file says
        return "its weights cannot be read without unpickling code, which is never done; or they are damaged"
    return first_line(error) if isinstance(error, OSError | ValueError | RuntimeError) else f"{kind}: {first_line(error)}"


def _check_weight_files(name: str) -> None:
    """Raise `UserError` where a checkpoint's files of weights lead elsewhere, or hold what are no floating-point numbers."""
    parts = {part for file in INDEX if (index := _find(name, file)) for part in parts_of(index)}
    for part in sorted(parts | {"model.safetensors"}):
        if part.endswith(".safetensors") and (path := _find(name, part)):
            check_floats(path)


@torch.no_grad()
def draw(net: Net, generator: torch.Generator, names: list[str]) -> None:
    """Initialise the named parameters as BERT does: N(0, initializer_range), LayerNorm 1 and 0, biases 0."""
    for name in names:
        parameter = net.get_parameter(name)
        if name.endswith("bias"):
            parameter.zero_()
        elif "LayerNorm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(0, net.config.initializer_range, generator=generator)
    padding = net.config.pad_token_id
    if "bert.embeddings.word_embeddings.weight" in names and padding is not None:
        net.bert.embeddings.word_embeddings.weight[padding] = 0


@torch.no_grad()
def _fill(net: Net, path: Path) -> int:
    """Overwrite the encoder's weights with those of a safetensors file; a head in the file is passed over. Returns how many."""
    if not path.is_file():
        raise UserError(f"--init {path}: give pretrained, random, or a file of weights; there is no such file")
    check(path)
    check_floats(path)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {error}") from None
    encoder = encoder_weights(net)
    known = {name: tensor for name, tensor in weights.items() if name in encoder}
    if more := sorted(name for name in weights.keys() - encoder.keys() if name.startswith(f"{ENCODER}encoder.")):
        raise UserError(f"{path} has {more[0]}, and the model has no such weight: they are another network's")
    for name, tensor in known.items():
        if tensor.shape != encoder[name].shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in {path} and {tuple(encoder[name].shape)} in the model")
        encoder[name].copy_(tensor)
    check_finite({name: encoder[name] for name in known}, path)
    if not known:
        raise UserError(f"{path} holds none of the encoder's weights (names such as {next(iter(encoder))})")
    return len(known)


# ---- the weights of a ticket ----


def encoder_weights(net: Net) -> dict[str, nn.Parameter]:
    """The encoder's parameters by name, pooler included: theta."""
    return {name: parameter for name, parameter in net.named_parameters() if name.startswith(ENCODER)}


def prunable(net: Net) -> dict[str, nn.Parameter]:
    """The matrices a mask covers: six a layer and the pooler's (73 and 85,524,480 weights in BERT-base)."""
    return {name: parameter for name, parameter in net.named_parameters() if PRUNABLE.fullmatch(name)}


def snapshot(net: Net) -> dict[str, Tensor]:
    """A copy of every parameter, on the CPU. A `state_dict` would alias the live ones and follow them."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in net.named_parameters()}


@torch.no_grad()
def rewind(net: Net, theta: Mapping[str, Tensor], mask: Mask, *, head: bool = True) -> None:
    """Set the encoder to mask * theta, and with `head` the head to gamma as it was then."""
    for name, parameter in net.named_parameters():
        if head or name.startswith(ENCODER):
            parameter.copy_(theta[name])
    mask.apply(prunable(net))


@torch.no_grad()
def set_parameters(net: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Set every parameter to what the file at `path` held. Raises `UserError` where one is missing or has another shape."""
    for name, parameter in net.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(f"{path} is another network's: it has no {name} of shape {tuple(parameter.shape)}")
        parameter.copy_(weights[name])


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names and values."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
