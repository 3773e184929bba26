"""Independent random streams, derived from a run's seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: object) -> int:
    """Derive a seed for one purpose of a run, an integer of 56 bits; different purposes give independent streams."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def seeded(seed: int, *purpose: object) -> torch.Generator:
    """Return a CPU generator for one purpose of a run."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *purpose))
