"""Perturbed pre-trained weights: what is left of a ticket when theta_0 itself is spoilt (Chen et al. 2020, theta_0'').

Pure functions of theta, the encoder's weights by name, on the CPU: each returns new tensors and leaves theta alone. The
*matrices* are what a mask covers, the six of every layer and the pooler's; embeddings are never touched.
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
    """theta perturbed by `seed`, and what was drawn or measured for it. `sigma` is the noise's, in theta's own spread.

    `layers` and `matrices` draw the same order from the same seed.
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
    """A random order of the layers, by their numbers. Never the one there is: that would perturb nothing, and is drawn again.

    Raises `UserError` where there is no other.
    """
    layers = 1 + max(int(found[2]) for found in map(LAYER.fullmatch, theta) if found)
    if layers == 1:
        raise UserError("the model has one layer, and one layer cannot be shuffled")
    while (order := torch.randperm(layers, generator=generator).tolist()) == list(range(layers)):
        pass
    return order


def shuffled_layers(theta: Mapping[str, Tensor], order: list[int], *, whole: bool = True) -> dict[str, Tensor]:
    """Layer i is what layer order[i] was; embeddings and pooler stay.

    `whole` layers move with their biases and LayerNorms: the same layers, run in another order. Otherwise the six matrices
    of a layer move together and its biases and LayerNorms stay, which is what the released pertub_weight.py does.
    """

    def source(name: str) -> str:
        found = LAYER.fullmatch(name)
        return (
            f"{found[1]}{order[int(found[2])]}{found[3]}" if found and (whole or PRUNABLE["matrices"].fullmatch(name)) else name
        )

    return {name: theta[source(name)].detach().clone() for name in theta}


def shuffled_entries(theta: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The entries of each matrix in a random order, within that matrix: the paper's theta_0''. The rest stays."""
    shuffled = {name: tensor.detach().clone() for name, tensor in theta.items()}
    for name in _matrices(theta):
        order = torch.randperm(theta[name].numel(), generator=generator)
        shuffled[name] = shuffled[name].flatten()[order].view_as(theta[name])
    return shuffled


def noised(theta: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Independent N(0, deviation^2) noise on every entry of the matrices. The rest stays.

    Raises `UserError` where the sum is not finite.
    """
    noisy = {name: tensor.detach().clone() for name, tensor in theta.items()}
    for name in _matrices(theta):
        noisy[name] += torch.randn(theta[name].shape, generator=generator) * deviation
        if not noisy[name].isfinite().all():
            raise UserError(f"{name} is not finite with noise of standard deviation {deviation:g}: less noise, or sound weights")
    return noisy


def spread(theta: Mapping[str, Tensor]) -> float:
    """The standard deviation of all matrices' entries about their common mean, in float64.

    The released code's noise takes 0.0387 for it, whatever the model.
    """
    names = _matrices(theta)
    count = sum(theta[name].numel() for name in names)
    mean = sum(float(theta[name].detach().sum(dtype=torch.float64)) for name in names) / count
    squares = sum(float((theta[name].detach().double() - mean).square_().sum()) for name in names)
    return math.sqrt(squares / count)


def _matrices(theta: Mapping[str, Tensor]) -> list[str]:
    """The matrices' names, in an order that does not depend on theta's: what is drawn for each is fixed by the generator."""
    return sorted(name for name in theta if PRUNABLE["matrices"].fullmatch(name))
