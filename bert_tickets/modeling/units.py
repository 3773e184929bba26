"""Structured tickets: attention heads, MLPs and neurons as masks over parameters, gates by effective weights, and sizes.

A mask of units is a `Mask` with tensors by kind of unit: `heads` [L, A], `mlps` [L], `neurons` [L, I]. It is *lowered* to a mask
over parameters, which is a ticket as any other: it trains, transfers and exports. `read_units` inverts that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bert_tickets.config import Units
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask

LAYER = "bert.encoder.layer."
QKV = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
HEAD_OUTPUT, INNER, OUTER = "attention.output.dense", "intermediate.dense", "output.dense"
EmptyBias = Literal["keep", "drop"]
_OF_LAYER = re.compile(rf"{re.escape(LAYER)}(\d+)\.(.+)")


def all_units(config: Any, which: Units) -> Mask:
    """Return the mask that keeps all units of these kinds in a BERT of this configuration."""
    shapes = {
        "heads": (config.num_hidden_layers, config.num_attention_heads),
        "mlps": (config.num_hidden_layers,),
        "neurons": (config.num_hidden_layers, config.intermediate_size),
    }
    return Mask({kind: torch.ones(shapes[kind], dtype=torch.bool) for kind in which.split("+")})


def lower(units: Mask, like: Mapping[str, Tensor], empty_bias: EmptyBias = "keep") -> Mask:
    """Lower a mask of units onto the parameters (or the lowered mask) `like`, which gives the shapes.

    A head is its rows of query, key and value, with their biases, and its columns of the attention's output; a neuron its row of
    the intermediate layer, with its bias, and its column of the output; an MLP both matrices and both biases. The bias of the
    attention's output stays where a layer has no head left, unless `empty_bias` is `drop`, as in the released code of Prasanna
    et al. 2020.
    """
    found: dict[str, Tensor] = {}
    for layer in range(len(next(iter(units.values())))):
        found |= {f"{LAYER}{layer}.{name}": kept for name, kept in _lower_layer(units, layer, like, empty_bias)}
    heads = {"heads": units["heads"].shape[1]} if "heads" in units else {}
    return Mask(found, {**units.info, "units": "+".join(units), **heads})


def _lower_layer(units: Mask, layer: int, like: Mapping[str, Tensor], empty_bias: EmptyBias) -> Iterator[tuple[str, Tensor]]:
    def full(name: str) -> Tensor:
        return torch.ones(like[f"{LAYER}{layer}.{name}"].shape, dtype=torch.bool, device=next(iter(units.values())).device)

    if "heads" in units:
        heads = units["heads"][layer]
        rows = heads.repeat_interleave(len(full(f"{QKV[0]}.bias")) // len(heads))
        for name in QKV:
            yield f"{name}.weight", full(f"{name}.weight") & rows[:, None]
            yield f"{name}.bias", rows
        yield f"{HEAD_OUTPUT}.weight", full(f"{HEAD_OUTPUT}.weight") & rows
        if empty_bias == "drop":
            yield f"{HEAD_OUTPUT}.bias", full(f"{HEAD_OUTPUT}.bias") & heads.any()
    if units.keys() & {"mlps", "neurons"}:
        kept = full(f"{INNER}.bias")
        if "neurons" in units:
            kept = kept & units["neurons"][layer]
        if "mlps" in units:
            kept = kept & units["mlps"][layer]
            yield f"{OUTER}.bias", full(f"{OUTER}.bias") & units["mlps"][layer]
        yield f"{INNER}.weight", full(f"{INNER}.weight") & kept[:, None]
        yield f"{INNER}.bias", kept
        yield f"{OUTER}.weight", full(f"{OUTER}.weight") & kept


def read_units(mask: Mask) -> Mask:
    """Read the units that a lowered mask keeps: a head or a neuron if any entry of its columns in the consuming matrix is kept,
    an MLP if any entry of its output is. Raises `UserError` for a mask that does not cover them.
    """
    if (which := mask.info.get("units")) is None:
        raise UserError("the mask is not one of heads, neurons or MLPs")
    in_layer = int(mask.info.get("heads", 1))
    layers = 1 + max((int(found[1]) for name in mask if (found := _OF_LAYER.fullmatch(name))), default=-1)

    def rows(kind: str) -> list[Tensor]:
        needed = [f"{HEAD_OUTPUT}.weight"] if kind == "heads" else [f"{OUTER}.weight"]
        needed += [f"{OUTER}.bias"] if kind == "mlps" else []
        names = [[f"{LAYER}{layer}.{name}" for name in needed] for layer in range(layers)]
        if not layers or (missing := sorted({name for of_layer in names for name in of_layer} - mask.keys())):
            raise UserError(f"the mask does not cover {missing[0] if layers else 'any layer'}: it has no {kind}")
        if kind == "mlps":
            return [torch.stack([mask[name].any() for name in of_layer]).any() for of_layer in names]
        columns = [mask[weight].any(0) for (weight,) in names]
        return [kept.view(in_layer, -1).any(1) for kept in columns] if kind == "heads" else columns

    return Mask({kind: torch.stack(rows(kind)) for kind in which.split("+")}, mask.info)


def emptied_layers(units: Mask) -> list[str]:
    """Name the layers that have no heads or no neurons left, a sentence per kind."""
    rows = {kind: kept for kind, kept in units.items() if kind != "mlps"}
    found = {kind: [str(i) for i, kept in enumerate(of_kind) if not kept.any()] for kind, of_kind in rows.items()}
    return [f"no {kind} left in layer{'s' * (len(at) > 1)} {', '.join(at)}" for kind, at in found.items() if at]


# ---- gates ----


def effective_weights(gates: Mapping[str, Iterable[Tensor]], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters whose use in the place of `weights` equals gating the activations: `functional_call` takes them.

    `gates` are of the shapes of a mask of units, of any float values; or a row for each layer, of the units that it has. A head's
    gate multiplies its context vectors, hence its columns of the attention's output; a neuron's its activation, hence its column
    of the output; an MLP's its output with the bias.
    """
    found: dict[str, Tensor] = {}
    for kind, values in gates.items():
        for layer, gate in enumerate(values):
            names = [f"{LAYER}{layer}.{HEAD_OUTPUT if kind == 'heads' else OUTER}.weight"]
            names += [f"{LAYER}{layer}.{OUTER}.bias"] if kind == "mlps" else []
            for name in names:
                weight = found.get(name, weights[name])
                columns = gate.repeat_interleave(weight.shape[1] // max(1, len(gate))) if kind == "heads" else gate
                found[name] = weight * columns
    return found


# ---- sizes ----


def sizes(mask: Mask, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Count what a mask keeps under the denominators in use: `weights` are the parameters of the network, head included.

    `encoder_layers` are all parameters of the layers, `all` those of the network. `bertplays_percent` is Prasanna et al.'s:
    kept / all - 21 % for the embeddings.
    """
    pruned = {name: int((~kept).count_nonzero()) for name, kept in mask.items()}
    count = {name: tensor.numel() for name, tensor in weights.items()}
    total, in_layers = sum(count.values()), sum(n for name, n in count.items() if name.startswith(LAYER))
    embeddings = sum(n for name, n in count.items() if name.startswith("bert.embeddings."))
    gone, gone_in_layers = sum(pruned.values()), sum(n for name, n in pruned.items() if name.startswith(LAYER))
    found = {
        "covered": mask.total,
        "covered_kept": mask.kept,
        "encoder_layers": in_layers,
        "encoder_layers_kept": in_layers - gone_in_layers,
        "all": total,
        "all_kept": total - gone,
        "embeddings": embeddings,
        "bertplays_percent": 100 * ((total - gone) / total - 0.21),
    }
    if "units" in mask.info:
        for kind, kept in read_units(mask).items():
            found |= {kind: kept.numel(), f"{kind}_kept": int(kept.count_nonzero())}
    return found
