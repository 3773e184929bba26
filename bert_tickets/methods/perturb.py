"""Perturb the pre-trained weights, to test whether a ticket depends on theta_0 itself (Chen et al. 2020, theta_0'').

Pure functions of theta, the encoder's weights by name, on the CPU. Each returns new tensors and does not change theta. The
*matrices* are the six of every layer and the pooler's; embeddings are not perturbed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bert_tickets.errors import UserError
from bert_tickets.modeling.parameters import PRUNABLE
from bert_tickets.seeds import seeded

LAYER = re.compile(r"(bert\.encoder\.layer\.)(\d+)(\..+)")

How = Literal["layers", "matrices", "entries", "noise"]


def perturb(theta: Mapping[str, Tensor], how: How, sigma: float, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Perturb theta with random numbers drawn by `seed`. Returns the weights and metadata of the perturbation.

    `sigma` is the standard deviation of the noise, in units of `spread(theta)`.
    """
    generator = seeded(seed, "perturb")
    if how == "entries":
        return shuffled_entries(theta, generator), {"perturbed": "the entries of each matrix shuffled"}
    if how == "noise":
        measured = spread(theta)
        what = f"noise of {sigma:g} times {measured:.4g}, the spread of its matrices"
        return noised(theta, sigma * measured, generator), {"perturbed": what, "sigma": sigma, "spread": measured}
    order = layer_order(theta, generator)
    what = f"its {'layers whole' if how == 'layers' else 'matrices by layer'} in the order {' '.join(map(str, order))}"
    return shuffled_layers(theta, order, whole=how == "layers"), {"perturbed": what, "order": order}


def layer_order(theta: Mapping[str, Tensor], generator: torch.Generator) -> list[int]:
    """Draw a random order of the layers, other than the present one. Raises `UserError` for a single layer."""
    layers = 1 + max(int(found[2]) for found in map(LAYER.fullmatch, theta) if found)
    if layers == 1:
        raise UserError("the model has one layer, and one layer cannot be shuffled")
    while (order := torch.randperm(layers, generator=generator).tolist()) == list(range(layers)):
        pass
    return order


def shuffled_layers(theta: Mapping[str, Tensor], order: list[int], *, whole: bool = True) -> dict[str, Tensor]:
    """Set layer i to layer order[i]; embeddings and pooler stay.

    `whole` layers move with their biases and LayerNorms: the same layers, run in another order. Otherwise the six matrices of a
    layer move together, and its biases and LayerNorms stay, as in the released pertub_weight.py.
    """

    def source(name: str) -> str:
        found = LAYER.fullmatch(name) if whole or PRUNABLE["matrices"].fullmatch(name) else None
        return f"{found[1]}{order[int(found[2])]}{found[3]}" if found else name

    return {name: theta[source(name)].detach().clone() for name in theta}


def shuffled_entries(theta: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Shuffle the entries of each matrix within that matrix: the paper's theta_0''."""
    shuffled = {name: tensor.detach().clone() for name, tensor in theta.items()}
    for name in _matrices(theta):
        order = torch.randperm(theta[name].numel(), generator=generator)
        shuffled[name] = shuffled[name].flatten()[order].view_as(theta[name])
    return shuffled


def noised(theta: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Add independent N(0, deviation^2) noise to every entry of the matrices. Raises `UserError` if the sum is not finite."""
    noisy = {name: tensor.detach().clone() for name, tensor in theta.items()}
    for name in _matrices(theta):
        noisy[name] += torch.randn(theta[name].shape, generator=generator) * deviation
        if not noisy[name].isfinite().all():
            raise UserError(f"{name} is not finite with noise of standard deviation {deviation:g}: give less noise")
    return noisy


def spread(theta: Mapping[str, Tensor]) -> float:
    """Return the standard deviation of all matrices' entries about their common mean, computed in float64.

    The released code uses 0.0387 for every model.
    """
    names = _matrices(theta)
    count = sum(theta[name].numel() for name in names)
    mean = sum(float(theta[name].detach().sum(dtype=torch.float64)) for name in names) / count
    squares = sum(float((theta[name].detach().double() - mean).square_().sum()) for name in names)
    return math.sqrt(squares / count)


def _matrices(theta: Mapping[str, Tensor]) -> list[str]:
    """Return the matrices' names, sorted, so that the random numbers of each do not depend on theta's order."""
    return sorted(name for name in theta if PRUNABLE["matrices"].fullmatch(name))
