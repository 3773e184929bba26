"""Load an exported ticket without what its mask prunes whole: `load`, which the package's top offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bert_tickets.errors import UserError
from bert_tickets.export.trainer import load_ticket
from bert_tickets.modeling.slim import remove_units, removed_units


def load(folder: str | Path, head: type | None = None, **options: Any) -> nn.Module:
    """Load an exported ticket, physically without the heads and neurons that its mask prunes whole, in evaluation mode.

    The result is a model of transformers with narrower layers. It is called like the folder's own, computes the same to
    rounding, and trains like any module. Its `state_dict` fits another `load(folder)`, not `from_pretrained`. Single weights
    that the mask prunes beside units are zeros, which training fills. `head` and `options` are those of `load_ticket`. Raises
    `UserError` for a folder that is not an exported ticket, and for a mask that prunes single weights only.
    """
    model, _, mask = load_ticket(folder, head, **options)
    if "units" not in mask.info and not any(removed_units(model, mask).values()):
        why = "the mask prunes no head and no neuron whole"
        raise UserError(f"nothing can be removed: {why}. bert_tickets.load_ticket loads the zeros in place")
    remove_units(model, mask)
    return model.eval()
