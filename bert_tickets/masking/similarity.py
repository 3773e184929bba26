"""Compute mask overlap, compared with that of random masks: in total, by layer, by kind of matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bert_tickets.errors import UserError

if TYPE_CHECKING:
    from bert_tickets.masking.mask import Mask

# The measures of an `Overlap`. The Jaccard index of two sets is |both| / |either|; it is 1 for two empty sets.
MEASURES = {
    "jaccard": "Jaccard index of the kept weights, all tensors together",
    "chance": "its value for random masks that keep as many weights",
    "chance_by_tensor": "its value for random masks that keep as many weights in every tensor",
    "mean_jaccard": "mean over the tensors of the Jaccard index in each (Liu et al. 2022, TAMT)",
    "hamming": "fraction of all weights on which the masks differ (normalized Hamming distance)",
}


class Bits(NamedTuple):
    """One tensor of a mask: its shape, and its bits as an integer. BERT-base takes 11 MB, an eighth of boolean tensors."""

    shape: tuple[int, ...]
    size: int
    bits: int


Packed = Mapping[str, Bits]  # a mask, or a part of one, by parameter name


@dataclass(frozen=True)
class Overlap:
    """The overlap of two masks, over all their tensors or some; `MEASURES` describes the measures."""

    weights: int  # covered
    kept: tuple[int, int]  # by each mask
    jaccard: float
    chance: float
    chance_by_tensor: float
    mean_jaccard: float
    hamming: float


def pack(mask: Mask) -> dict[str, Bits]:
    """Pack a mask into the form that the functions below take."""
    import numpy as np

    return {
        name: Bits(tuple(kept.shape), kept.numel(), int.from_bytes(np.packbits(kept.cpu().numpy(), axis=None).tobytes(), "big"))
        for name, kept in mask.items()
    }


def check_same_covering(one: Packed, other: Packed) -> None:
    """Raise `UserError`, naming a tensor, unless the masks cover the same tensors with the same shapes."""
    if apart := sorted(one.keys() ^ other.keys()):
        raise UserError(f"{apart[0]} is covered by only one of the masks ({len(one)} and {len(other)} tensors)")
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            raise UserError(f"{name} has shape {tensor.shape} in one mask and {other[name].shape} in the other")


def mask_overlap(one: Packed, other: Packed) -> Overlap:
    """Compare two masks. Raises `UserError` if their coverings differ.

    Chance is the Jaccard index at the expected number of shared weights, k * l / n where random masks keep k and l of n. (The
    expected index itself differs from it by the order of 1 / n.)
    """
    check_same_covering(one, other)
    pairs = [(tensor, other[name]) for name, tensor in one.items()]
    counts = [(a.size, a.bits.bit_count(), b.bits.bit_count(), (a.bits & b.bits).bit_count()) for a, b in pairs]
    n, k, m, both = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0, 0)
    return Overlap(
        weights=n,
        kept=(k, m),
        jaccard=_jaccard(both, k, m),
        chance=_jaccard(k * m / max(1, n), k, m),
        chance_by_tensor=_jaccard(sum(a * b / max(1, size) for size, a, b, _ in counts), k, m),
        mean_jaccard=sum(_jaccard(shared, a, b) for _, a, b, shared in counts) / max(1, len(counts)),
        hamming=(k + m - 2 * both) / max(1, n),
    )


def _jaccard(both: float, one: int, other: int) -> float:
    return both / (one + other - both) if one or other else 1.0


# ---- layers and kinds ----


def layer_and_kind(name: str) -> tuple[str, str]:
    """Parse the layer and the kind of a tensor from its parameter's name.

    `bert.encoder.layer.3.attention.self.query.weight` is ("3", "attention.query"), its bias ("3", "attention.query.bias"). A
    tensor outside the layers is a layer by itself: `bert.pooler.dense.weight` is ("pooler", "pooler").
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is not None:
        return parts[at], _kind(parts[at + 1 :]) or name
    kind = _kind(parts[1:]) or _kind(parts) or name
    return kind, kind


def _kind(parts: list[str]) -> str:
    return ".".join(part for part in parts if part not in ("self", "dense", "weight"))


def overlap_by_part(one: Packed, other: Packed) -> dict[str, dict[str, Overlap]]:
    """Compare two masks by layer and kind: layer -> kind -> overlap; "all" pools layers or kinds.

    Layers are in their order, then the tensors outside of them; kinds are in the first mask's order. Raises `UserError` if the
    coverings differ.
    """
    check_same_covering(one, other)
    places = {name: layer_and_kind(name) for name in one}
    layers = sorted({layer for layer, _ in places.values()}, key=lambda x: (not x.isdecimal(), int(x) if x.isdecimal() else 0, x))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    found: dict[str, dict[str, Overlap]] = {}
    for layer in [*layers, "all"]:
        for kind in [*kinds, "all"]:
            names = [name for name, (own, own_kind) in places.items() if layer in (own, "all") and kind in (own_kind, "all")]
            if names:
                part = mask_overlap({name: one[name] for name in names}, {name: other[name] for name in names})
                found.setdefault(layer, {})[kind] = part
    return found
