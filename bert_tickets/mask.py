"""Masks: which weights of a network a ticket keeps.

A `Mask` knows tensors and their names and nothing of BERT. True means *kept*. It may cover any named tensor, biases
included, so that structured tickets (heads, neurons) are masks as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import ItemsView, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bert_tickets import UserError, first_line
from bert_tickets.files import CHECKSUM, check, safetensors_parts, write
from bert_tickets.refusal import cannot_read

FORMAT = "1"  # of the mask file; a reader refuses a newer one


class Mask(Mapping[str, Tensor]):
    """An immutable mapping of parameter names to boolean tensors of the parameters' shapes (True = kept)."""

    def __init__(self, tensors: Mapping[str, Tensor], info: Mapping[str, str] | None = None) -> None:
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

    def check_fits(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raise `UserError`, naming the tensor, unless `tensors` has the mask's names and shapes."""
        for name, tensor in self.items():
            if name not in tensors:
                raise UserError(f"the mask covers {name}, which {what} does not have")
            if tensor.shape != tensors[name].shape:
                raise UserError(f"{name} is {_by(tensors[name])} in {what} and {_by(tensor)} in the mask: another architecture")
        for name in tensors:
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

    def to_bytes(self, **info: str) -> bytes:
        """The mask file: safetensors, a bit a weight, and `info` beside what the mask says of itself already."""
        metadata = {
            **self.info,
            **info,
            "format": f"bert_tickets mask {FORMAT}",
            "shapes": json.dumps({name: list(tensor.shape) for name, tensor in self.items()}),
            "density": repr(self.density),
            "sha256": self.sha256(),
        }
        return b"".join(safetensors_parts({name: torch.from_numpy(_pack(kept)) for name, kept in self.items()}, metadata))

    def write(self, path: str | Path, **info: str) -> None:
        """Write the mask file, whole or not at all; `info` joins its metadata."""
        write(Path(path), self.to_bytes(**info))

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask file of this package, or a released `mask.pt` (keys end in `_mask`, float 0/1), on the CPU.

        Raises `UserError` for a file that is missing, damaged or no mask. Nothing is unpickled.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no mask file at {path}")
        try:
            with path.open("rb") as file:
                start = file.read(4)
            if start in (b"PK\x03\x04", b"\x80\x02\x8a\x0a"):  # torch.save: a zip archive, or the older plain pickle
                return cls._load_released(path)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                _check_format(path, metadata)
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise cannot_read(path, error, "damaged, or no mask file") from None
        check(path)
        return cls._from_packed(path, metadata, packed)

    @classmethod
    def _from_packed(cls, path: Path, metadata: Mapping[str, str], packed: Mapping[str, np.ndarray]) -> Mask:
        try:
            shapes = {str(name): tuple(map(int, shape)) for name, shape in json.loads(metadata["shapes"]).items()}
            mask = cls({name: _unpack(packed[name], shape) for name, shape in shapes.items()})
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} is damaged: its shapes do not describe its bits ({first_line(error)})") from None
        if not mask or mask.sha256() != metadata.get("sha256"):
            raise UserError(f"{path} is damaged: its bits do not match its checksum")
        own = ("format", "shapes", "density", "sha256", CHECKSUM)
        mask.info = {key: value for key, value in metadata.items() if key not in own}
        return mask

    @classmethod
    def _load_released(cls, path: Path) -> Mask:
        try:
            _need_stored(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            masks = {key: tensor for key, tensor in state.items() if isinstance(key, str) and key.endswith("_mask")}
            if sum(tensor.nbytes for tensor in masks.values()) > path.stat().st_size:  # many views of one storage, for one
                raise ValueError("its tensors claim more bytes than the file has")
            binary = {key: _is_binary(tensor) for key, tensor in masks.items()}
        except Exception as error:  # torch raises a dozen kinds, all of which mean the same here
            raise UserError(f"{path} cannot be read as a mask.pt without unpickling code: {first_line(error)}") from None
        for key, ok in binary.items():
            if not ok:
                raise UserError(f"{path}: {key[:100]} is not a tensor of zeros and ones")
        tensors = {key.removeprefix("module.").removesuffix("_mask"): tensor != 0 for key, tensor in masks.items()}
        if not tensors:
            raise UserError(f"{path} has no key that ends in _mask")
        return cls(tensors, {"source": "released mask.pt"})


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    kind, _, version = metadata.get("format", "").rpartition(" ")
    if kind != "bert_tickets mask" or not (version.isascii() and version.isdigit() and len(version) < 9):
        raise UserError(f"{path} is a safetensors file but not a mask file (its metadata names no mask format)")
    if int(version) > int(FORMAT):
        raise UserError(f"{path} has mask format {version}; this version reads up to {FORMAT}: update bert_tickets")


def _need_stored(path: Path) -> None:
    """Raise `ValueError` for an archive with compressed parts: torch.save writes none, and a kilobyte may hold gigabytes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("parts of it are compressed, as torch.save leaves none")


def _is_binary(tensor: object) -> bool:
    """Whether it is a plain tensor of zeros and ones, whose storage is as large as its shape says."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or not tensor.is_contiguous():
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())


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
