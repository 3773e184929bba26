"""Count the zeros of BERT's weights, of a network or of a Hugging Face folder, and compare them with a mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bert_tickets.content import POOLER, WEIGHTS
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.parameters import ENCODER, PRUNABLE
from bert_tickets.modeling.weights import POOLER_WEIGHTS, read_config, read_pooler, read_weights

BY_CHANCE = 1e-5  # the fraction of a tensor that may be zero without a mask
_FIRST = "encoder.layer.0.attention.self.query.weight"  # every BERT has it


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


# ---- names ----


def bert_tensors(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the tensors of BERT's encoder by bert_tickets' names, `bert.encoder...`, whatever their prefix is in `tensors`.

    The prefix is empty for a BertModel. Raises `UserError`, naming `what`, unless there is exactly one encoder.
    """
    prefixes = [name.removesuffix(_FIRST) for name in tensors if f".{name}".endswith(f".{_FIRST}")]
    if len(prefixes) != 1:
        raise UserError(f"{what} has {len(prefixes)} BERT encoders ({_FIRST}), not one")
    return {ENCODER + name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items() if name.startswith(prefixes[0])}


def covered(tensors: Mapping[str, Tensor], mask: Mask, what: str) -> dict[str, Tensor]:
    """Return the tensors that a mask covers, by the mask's names; without a pooler where the network has none.

    Raises `UserError`, naming `what`, if another tensor is missing or has another shape.
    """
    known = tensors if mask.keys() <= tensors.keys() else bert_tensors(tensors, what)
    part = Mask({name: kept for name, kept in mask.items() if name in known or not name.startswith(f"{ENCODER}pooler.")})
    part.check_fits(known, what, partly=True)
    return {name: known[name] for name in part}


# ---- folders ----


def weight_file(folder: Path) -> Path | None:
    """Return the file of weights that transformers reads from a folder: the model, or the index of its parts."""
    return next((path for path in map(folder.joinpath, WEIGHTS) if path.is_file()), None)


def folder_weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the weights of a folder by the names of a BERT with a head, and the pooler beside them.

    Returns the weights, and the names of the files that were read. Raises `UserError` for files that are missing or damaged, and
    if they are not of a whole BERT of the folder's config.json.
    """
    path = weight_file(folder)
    if path is None:
        raise UserError(f"{folder} has no weights ({', '.join(WEIGHTS[::2])})")
    config = read_config(folder, str(folder), labels=2)
    found, files = read_weights(folder, str(folder), config), [path.name]
    if found.keys().isdisjoint(POOLER_WEIGHTS) and (beside := folder / POOLER).is_file():
        found |= read_pooler(beside, config)
        files.append(POOLER)
    return found, files


def folder_zeros(folder: Path, mask: Mask | None = None) -> tuple[dict[str, Zeros], list[str]]:
    """Count the zeros of the tensors that `mask` covers, or else of the six matrices of every layer and the pooler's.

    Returns the counts, and the names of the files that were read. Raises `UserError` as `folder_weights` does, and if the mask
    is of other shapes.
    """
    found, files = folder_weights(folder)
    if mask is None:
        tensors = {name: tensor for name, tensor in found.items() if PRUNABLE["matrices"].fullmatch(name)}
    else:
        tensors = covered(found, mask, str(folder))
    return count_zeros(tensors, mask), files
