"""Masks: which weights of a network a ticket keeps.

A `Mask` knows tensors and their names and nothing of BERT. True means *kept*. It may cover any named tensor, biases
included, so that structured tickets (heads, neurons) are masks as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import ItemsView, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import read_facts, read_tensors, write_tensors
from bert_tickets.masking import released

FORMAT = "bert_tickets mask 2"


class Mask(Mapping[str, Tensor]):
    """An immutable mapping of parameter names to boolean tensors of the parameters' shapes (True = kept)."""

    def __init__(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise TypeError(f"mask tensor {name} has dtype {tensor.dtype}; a mask is boolean")
        self._tensors = dict(tensors)
        self.info = dict(info or {})  # what a file says of its mask: base model, method, seed, level

    @classmethod
    def ones(cls, like: Mapping[str, Tensor]) -> Mask:
        """The mask that keeps every weight of `like`."""
        return cls({name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in like.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def items(self) -> ItemsView[str, Tensor]:
        return self._tensors.items()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and self.keys() == other.keys()
            and all(torch.equal(tensor, other[name]) for name, tensor in self.items())
        )

    __hash__ = None  # type: ignore[assignment]  # equality is by value

    # ---- what a mask says of itself ----

    @property
    def total(self) -> int:
        """How many weights the mask covers."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def kept(self) -> int:
        """How many of them it keeps."""
        return sum(int(tensor.count_nonzero()) for tensor in self._tensors.values())

    @property
    def density(self) -> float:
        """Kept over covered, in [0, 1]."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """Removed over covered, in [0, 1]."""
        return 1 - self.density

    def sha256(self) -> str:
        """A digest of names, shapes and bits: equal masks have equal digests."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            digest.update(f"{name}:{tuple(self[name].shape)}\n".encode())
            digest.update(_pack(self[name]).tobytes())
        return digest.hexdigest()

    # ---- two masks ----

    def overlap(self, other: Mask) -> float:
        """Jaccard similarity of the kept sets: |both| / |either|, in [0, 1]; two empty masks are alike (1)."""
        self.check_fits(other, "the other mask")
        both = sum(int((tensor & other[name]).count_nonzero()) for name, tensor in self.items())
        either = self.kept + other.kept - both
        return both / either if either else 1.0

    def distance(self, other: Mask) -> float:
        """Normalised Hamming distance: the share of weights on which the two masks differ, in [0, 1]."""
        self.check_fits(other, "the other mask")
        return sum(int((tensor ^ other[name]).count_nonzero()) for name, tensor in self.items()) / self.total

    def check_fits(self, tensors: Mapping[str, Tensor], what: str, *, partly: bool = False) -> None:
        """Raise `UserError`, naming the tensor, unless `tensors` has the mask's names and shapes; with `partly`, and more."""
        for name, tensor in self.items():
            if name not in tensors:
                raise UserError(f"the mask covers {name}, which {what} does not have")
            if tensor.shape != tensors[name].shape:
                raise UserError(f"{name} is {_by(tensors[name])} in {what} and {_by(tensor)} in the mask: another architecture")
        for name in () if partly else tensors:
            if name not in self:
                raise UserError(f"{what} has {name}, which the mask does not cover")

    # ---- what is done with a mask ----

    def shuffle(self, generator: torch.Generator) -> Mask:
        """A mask with the same density in every tensor, its kept places drawn anew."""
        return Mask(
            {
                name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator).to(tensor.device)].view_as(tensor)
                for name, tensor in self.items()
            }
        )

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero in place what the mask removes from the tensors it names."""
        for name, tensor in self.items():
            tensors[name].mul_(tensor.to(tensors[name].device))

    def to(self, device: torch.device | str) -> Mask:
        return Mask({name: tensor.to(device) for name, tensor in self.items()}, self.info)

    # ---- files ----

    def write(self, path: str | Path, **info: Any) -> None:
        """Write the mask file atomically: safetensors, one bit per weight; `info` joins its metadata."""
        facts = {
            **self.info,
            **info,
            "format": FORMAT,
            "shapes": {name: list(tensor.shape) for name, tensor in self.items()},
            "density": self.density,
            "sha256": self.sha256(),
        }
        write_tensors(Path(path), {name: torch.from_numpy(_pack(kept)) for name, kept in self.items()}, facts)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask file, or a released `mask.pt`, on the CPU. Nothing is unpickled.

        Raises `UserError` for a file that is missing, damaged or not a mask.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no mask file at {path}")
        if released.is_torch_file(path):
            return cls(released.read_mask_pt(path), {"source": "released mask.pt"})
        facts = read_facts(path)
        if facts.get("format") != FORMAT:
            raise UserError(f"{path} is not a mask file of this version (its metadata name no {FORMAT!r})")
        packed = read_tensors(path)
        mask = cls({name: _unpack(packed[name].numpy(), tuple(shape)) for name, shape in facts["shapes"].items()})
        if mask.sha256() != facts["sha256"]:
            raise Damaged(f"{path} is damaged: its bits do not match its checksum")
        mask.info = {key: value for key, value in facts.items() if key not in ("format", "shapes", "density", "sha256")}
        return mask


def _pack(tensor: Tensor) -> np.ndarray:
    """The bits of a boolean tensor in C order, eight a byte (shape: ceil(numel / 8), uint8)."""
    return np.packbits(tensor.detach().cpu().numpy(), axis=None)


def _unpack(packed: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != ((count + 7) // 8,):
        raise ValueError(f"{count} bits stored as {packed.dtype}{packed.shape}")
    return torch.from_numpy(np.unpackbits(packed, count=count).view(np.bool_).reshape(shape))


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"
