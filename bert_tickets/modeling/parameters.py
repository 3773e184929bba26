"""The parameters of BERT with a task's head: the prunable ones, snapshots, rewinding.

The encoder (theta in the paper) is everything under `bert.`, the pooler included; the rest is the task's head (gamma).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bert_tickets.config import Prunable
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net

ENCODER = "bert."
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"

_LAYER = r"bert\.encoder\.layer\.\d+\."
_ATTENTION, _MLP = r"attention\.(self\.(query|key|value)|output\.dense)", r"(intermediate|output)\.dense"
_MATRICES = rf"{_LAYER}({_ATTENTION}|{_MLP})\.weight|bert\.pooler\.dense\.weight"

# What a mask covers. `matrices`: Chen et al. 2020, six a layer and the pooler's (73 and 85,524,480 weights in BERT-base).
PRUNABLE: dict[str, re.Pattern[str]] = {
    "matrices": re.compile(_MATRICES),
    "matrices+embeddings": re.compile(rf"{_MATRICES}|{re.escape(WORD_EMBEDDINGS)}"),  # TAMT's 74
    "matrices+biases": re.compile(rf"{_MATRICES}|{_LAYER}({_ATTENTION}|{_MLP})\.bias|bert\.pooler\.dense\.bias"),
    # m-pruning of Prasanna et al. 2020: no pooler, and not the biases of the output (132 and 85,008,384 in BERT-base)
    "layers+biases": re.compile(rf"{_LAYER}(({_ATTENTION}|intermediate\.dense)\.(weight|bias)|output\.dense\.weight)"),
    "heads": re.compile(rf"{_LAYER}attention\.(self\.(query|key|value)\.(weight|bias)|output\.dense\.weight)"),
    "neurons": re.compile(rf"{_LAYER}(intermediate\.dense\.(weight|bias)|output\.dense\.weight)"),
}


def prunable(net: Net, which: Prunable = "matrices") -> dict[str, nn.Parameter]:
    """Return the parameters of the named set `which`, in the network's order."""
    return {name: parameter for name, parameter in net.named_parameters() if PRUNABLE[which].fullmatch(name)}


def encoder_weights(net: Net) -> dict[str, nn.Parameter]:
    """Return the encoder's parameters by name, theta."""
    return {name: parameter for name, parameter in net.named_parameters() if name.startswith(ENCODER)}


def head_weights(net: Net) -> dict[str, nn.Parameter]:
    """Return the head's parameters by name, gamma."""
    return {name: parameter for name, parameter in net.named_parameters() if not name.startswith(ENCODER)}


def snapshot(net: Net) -> dict[str, Tensor]:
    """Copy every parameter to the CPU. (A `state_dict` aliases the live parameters, and changes with them.)"""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in net.named_parameters()}


@torch.no_grad()
def rewind(net: Net, theta: Mapping[str, Tensor], mask: Mask, *, head: bool = True) -> None:
    """Set the encoder to mask * theta, and, with `head`, the head to its values in `theta`."""
    for name, parameter in net.named_parameters():
        if head or name.startswith(ENCODER):
            parameter.copy_(theta[name])
    mask.apply(dict(net.named_parameters()))


@torch.no_grad()
def set_parameters(net: Net, weights: Mapping[str, Tensor], source: Path) -> None:
    """Set every parameter from the tensors of a file. Raises `UserError` if one is missing or has another shape."""
    if DECODER in weights:
        untie_decoder(net)
    for name, parameter in net.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(f"{source} belongs to another network: it has no {name} of shape {tuple(parameter.shape)}")
        parameter.copy_(weights[name])


def untie_decoder(net: Net) -> None:
    """Copy the weights of an MLM decoder that shares the word embeddings, so that a mask does not prune it (Liu et al. 2022)."""
    if hasattr(net, "cls") and net.cls.predictions.decoder.weight is net.get_parameter(WORD_EMBEDDINGS):
        decoder = net.cls.predictions.decoder
        decoder.weight = nn.Parameter(decoder.weight.detach().clone())
        net.config.tie_word_embeddings = False
