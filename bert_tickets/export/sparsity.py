"""Count the zeros of BERT's weights, of a network or of a Hugging Face folder, and compare them with a mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.parameters import ENCODER, PRUNABLE
from bert_tickets.modeling.weights import read_config, read_weights, rename_as_bert

BY_CHANCE = 1e-5  # the fraction of a tensor that may be zero without a mask


@dataclass(frozen=True)
class Zeros:
    """Counts of the weights of one tensor, or of several."""

    weights: int
    zeros: int
    filled: int = 0  # not zero where the mask prunes
    lost: int = 0  # zero where the mask keeps

    @property
    def sparsity(self) -> float:
        """The fraction of zeros, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    @classmethod
    def sum(cls, counts: Iterable[Zeros]) -> Zeros:
        return cls(*map(sum, zip(*((c.weights, c.zeros, c.filled, c.lost) for c in counts), strict=True)))

    def __str__(self) -> str:
        return f"{self.sparsity:8.4%} zero, {self.zeros:,} of {self.weights:,}"


@torch.no_grad()
def count_zeros(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None = None) -> dict[str, Zeros]:
    """Count the zeros of each tensor, and where they differ from the tensors of `mask` by the same names."""
    counts = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype}, not floating-point: the zeros of quantized weights cannot be counted")
        kept = (mask or {}).get(name)
        nonzero, filled, lost = tensor != 0, 0, 0
        present = int(nonzero.count_nonzero())
        if kept is not None:
            kept = kept.to(tensor.device)
            both = int((nonzero & kept).count_nonzero())
            filled, lost = present - both, int(kept.count_nonzero()) - both
        counts[name] = Zeros(tensor.numel(), tensor.numel() - present, filled, lost)
    return counts


def sparsity_lines(counts: Mapping[str, Zeros]) -> Iterator[str]:
    """Format the sparsity of each tensor, and of all together."""
    lines = {**counts, f"all {len(counts)}": Zeros.sum(counts.values())}
    width = max(map(len, lines))
    return (f"{name:{width}}  {zeros}" for name, zeros in lines.items())


def misfits(counts: Mapping[str, Zeros]) -> Iterator[tuple[str, bool]]:
    """Format where the zeros differ from the mask's, a line per tensor and kind of difference; True if the mask does not fit.

    Zeros that it keeps may be by chance: biases begin as zeros, and so does one random weight in ten millions (more in fp16).
    """
    for name, zeros in counts.items():
        if zeros.filled:
            yield f"{name}: {zeros.filled:,} weights that the mask prunes are not zero", True
        if zeros.lost:
            few = zeros.lost <= BY_CHANCE * zeros.weights or name.endswith("bias")
            yield f"{name}: {zeros.lost:,} weights that the mask keeps are zero" + ", as they may be by chance" * few, not few


def covered(tensors: Mapping[str, Tensor], mask: Mask, what: str) -> dict[str, Tensor]:
    """Return the tensors of `what` that a mask covers, by its names; a pooler may lack. Raises `UserError` if they do not fit."""
    known = tensors if mask.keys() <= tensors.keys() else rename_as_bert(tensors, what)
    part = Mask({name: kept for name, kept in mask.items() if name in known or not name.startswith(f"{ENCODER}pooler.")})
    part.check_fits(known, what, partly=True)
    return {name: known[name] for name in part}


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a folder by the names of a BERT with a head. Raises `UserError` unless it has a whole BERT."""
    return read_weights(folder, str(folder), read_config(folder, str(folder), labels=2))


def folder_zeros(folder: Path, mask: Mask | None = None) -> dict[str, Zeros]:
    """Count the zeros of the tensors that `mask` covers, or else of the six matrices of every layer and the pooler's."""
    found = folder_weights(folder)
    if mask is not None:
        return count_zeros(covered(found, mask, str(folder)), mask)
    return count_zeros({name: tensor for name, tensor in found.items() if PRUNABLE["matrices"].fullmatch(name)})
