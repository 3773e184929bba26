"""The masks of the released code: `mask.pt`, a pickled dictionary of `<parameter>_mask` tensors with values 0 and 1."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bert_tickets.errors import UserError, first_line


def is_torch_file(path: Path) -> bool:
    """Return whether a file was written by `torch.save`: a zip archive, or the older plain pickle."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")


def read_mask_pt(path: Path) -> dict[str, Tensor]:
    """Read boolean tensors by parameter name. Raises `UserError` for a file that is not a mask, or would unpickle code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        masks = {key: tensor for key, tensor in content.items() if key.endswith("_mask")}
        binary = {key: bool(((tensor == 0) | (tensor == 1)).all()) for key, tensor in masks.items()}
    except Exception as error:  # torch raises a dozen types for a file that it cannot read
        raise UserError(f"{path} cannot be read as a mask.pt without unpickling code: {first_line(error)}") from None
    for key, ok in binary.items():
        if not ok:
            raise UserError(f"{path}: {key} is not a tensor of zeros and ones")
    if not masks:
        raise UserError(f"{path} has no key that ends in _mask")
    return {key.removeprefix("module.").removesuffix("_mask"): tensor != 0 for key, tensor in masks.items()}
