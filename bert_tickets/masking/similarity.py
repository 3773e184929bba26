"""Compute mask overlap, compared with that of random masks: in total, by layer, by kind of matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

    from bert_tickets.masking.mask import Mask

# The measures of `overlap`. The Jaccard index of two sets is |both| / |either|; it is 1 for two empty sets.
MEASURES = {
    "jaccard": "Jaccard index of the kept weights, all tensors together",
    "chance": "its value for random masks that keep as many weights",
    "chance_by_tensor": "its value for random masks that keep as many weights in every tensor",
    "mean_jaccard": "mean over the tensors of the Jaccard index in each (Liu et al. 2022, TAMT)",
    "hamming": "fraction of all weights on which the masks differ (normalized Hamming distance)",
}


def tensor_counts(one: Mask, other: Mask) -> DataFrame:
    """Count the weights of each tensor, a line each: `weights`, those kept by each mask (`one`, `other`), and by `both`.

    The lines have their `layer` and `kind`, and are in the first mask's order. Raises `UserError`, naming a tensor, unless the
    masks, on the CPU, cover the same tensors with the same shapes.
    """
    import numpy as np
    import pandas as pd

    one.check_fits(other, "the other mask")
    lines = []
    for name, tensor in one.items():
        a, b = tensor.numpy(), other[name].numpy()
        counts = [int(np.count_nonzero(kept)) for kept in (a, b, a & b)]  # torch counts booleans more slowly
        lines.append((*layer_and_kind(name), a.size, *counts))
    return pd.DataFrame(lines, columns=["layer", "kind", "weights", "one", "other", "both"])


def overlap(counts: DataFrame) -> dict[str, float]:
    """Compute the `MEASURES` over lines of `tensor_counts`.

    Chance is the Jaccard index at the expected number of shared weights, k * l / n where random masks keep k and l of n. (The
    expected index itself differs from it by the order of 1 / n.)
    """
    n, k, m, both = (int(counts[column].sum()) for column in ("weights", "one", "other", "both"))
    expected = counts["one"] * counts["other"] / counts["weights"]
    in_tensors = [_jaccard(shared, a, b) for a, b, shared in counts[["one", "other", "both"]].itertuples(index=False)]
    return {
        "jaccard": _jaccard(both, k, m),
        "chance": _jaccard(k * m / n, k, m),
        "chance_by_tensor": _jaccard(expected.sum(), k, m),
        "mean_jaccard": sum(in_tensors) / len(in_tensors),
        "hamming": (k + m - 2 * both) / n,
    }


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


def with_totals(counts: DataFrame) -> DataFrame:
    """Repeat the lines of tensors under the layer "all", the kind "all", and both, so that groups by layer and kind sum up."""
    import pandas as pd

    totals = [counts.assign(layer="all"), counts.assign(kind="all"), counts.assign(layer="all", kind="all")]
    return pd.concat([counts, *totals], ignore_index=True)
