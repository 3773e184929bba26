"""Masks: which weights of a network a ticket keeps (True = kept).

A `Mask` may cover any named tensors, some matrices only or biases as well, so that structured tickets (heads, neurons) are masks
too. Nothing here depends on BERT.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_tickets.errors import UserError
from bert_tickets.files import read_facts, read_tensors, write_tensors
from bert_tickets.masking import released

FORMAT = "bert_tickets mask 2"
FACTS = ("format", "shapes", "order", "density", "sha256")  # metadata of a file, beside the mask's `info`


class Mask(Mapping[str, Tensor]):
    """An immutable mapping of parameter names to boolean tensors of the parameters' shapes (True = kept)."""

    def __init__(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise TypeError(f"mask tensor {name} has dtype {tensor.dtype}; a mask is boolean")
        self._tensors = dict(tensors)
        self.info = dict(info or {})  # where it was found: base model, task, method, seed, level

    @classmethod
    def ones(cls, like: Mapping[str, Tensor]) -> Mask:
        """Return the mask that keeps every weight of `like`."""
        return cls({name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in like.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and self.keys() == other.keys()
            and all(torch.equal(tensor, other[name]) for name, tensor in self.items())
        )

    # ---- counts ----

    @property
    def total(self) -> int:
        """The number of weights that the mask covers."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def kept(self) -> int:
        """The number of weights that it keeps."""
        return sum(int(tensor.count_nonzero()) for tensor in self._tensors.values())

    @property
    def density(self) -> float:
        """The fraction of the covered weights that it keeps, in [0, 1]."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """The fraction of the covered weights that it prunes, in [0, 1]."""
        return 1 - self.density

    def sha256(self) -> str:
        """Return the sha256 over names, shapes and bits."""
        sha = hashlib.sha256()
        for name in sorted(self._tensors):
            sha.update(f"{name}:{tuple(self[name].shape)}\n".encode())
            sha.update(_pack(self[name]).tobytes())
        return sha.hexdigest()

    # ---- comparison ----

    def overlap(self, other: Mask) -> float:
        """Return the Jaccard similarity of the kept sets: |both| / |either|, in [0, 1]; 1 for two empty masks."""
        self.check_fits(other, "the other mask")
        both = sum(int((tensor & other[name]).count_nonzero()) for name, tensor in self.items())
        either = self.kept + other.kept - both
        return both / either if either else 1.0

    def distance(self, other: Mask) -> float:
        """Return the normalized Hamming distance: the fraction of weights on which the masks differ, in [0, 1]."""
        self.check_fits(other, "the other mask")
        return sum(int((tensor ^ other[name]).count_nonzero()) for name, tensor in self.items()) / self.total

    def check_fits(self, tensors: Mapping[str, Tensor], what: str, *, partly: bool = False) -> None:
        """Raise `UserError`, naming a tensor and `what`, unless `tensors` has the mask's names and shapes; `partly`: at least."""
        for name, tensor in self.items():
            if name not in tensors:
                raise UserError(f"the mask covers {name}, which {what} does not have")
            if tensor.shape != tensors[name].shape:
                raise UserError(f"{name} is {_by(tensors[name])} in {what} and {_by(tensor)} in the mask")
        for name in () if partly else tensors:
            if name not in self:
                raise UserError(f"{what} has {name}, which the mask does not cover")

    # ---- operations ----

    def __and__(self, other: Mask) -> Mask:
        """Return the mask of the weights that both keep, with the info that both agree on. Raises as `check_fits`."""
        self.check_fits(other, "the other mask")
        return Mask({name: tensor & other[name] for name, tensor in self.items()}, self._agreed(other))

    def __or__(self, other: Mask) -> Mask:
        """Return the mask of the weights that either keeps, with the info that both agree on. Raises as `check_fits`."""
        self.check_fits(other, "the other mask")
        return Mask({name: tensor | other[name] for name, tensor in self.items()}, self._agreed(other))

    def __invert__(self) -> Mask:
        """Return the mask of the covered weights that it prunes."""
        return Mask({name: ~tensor for name, tensor in self.items()}, self.info)

    def _agreed(self, other: Mask) -> dict[str, Any]:
        return {key: value for key, value in self.info.items() if key in other.info and other.info[key] == value}

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero the pruned weights in place, in the tensors that the mask covers."""
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
            "order": list(self),  # pruning breaks ties by it, and files sort names
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
            advice = f": it is a folder. Give a file, such as {path / 'level_01' / 'mask.safetensors'}" if path.is_dir() else ""
            raise UserError(f"there is no mask file at {path}{advice}")
        if released.is_torch_file(path):
            return cls(released.read_mask_pt(path), {"source": "released mask.pt"})
        facts = read_facts(path)
        if facts.get("format") != FORMAT:
            raise UserError(f"{path} is not a mask file of this version: format {facts.get('format')!r}, not {FORMAT!r}")
        packed = read_tensors(path)  # both are checksummed
        shapes = facts["shapes"]
        tensors = {name: _unpack(packed[name].numpy(), shapes[name]) for name in facts.get("order", shapes)}
        return cls(tensors, {key: value for key, value in facts.items() if key not in FACTS})


def _pack(tensor: Tensor) -> np.ndarray:
    """Pack a boolean tensor, in C order, into bytes of eight bits ([ceil(numel / 8)], uint8)."""
    return np.packbits(tensor.detach().cpu().numpy(), axis=None)


def _unpack(packed: np.ndarray, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed, count=math.prod(shape)).view(np.bool_).reshape(shape))


def _by(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"
