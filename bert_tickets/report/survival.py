"""The survival of heads and MLPs over seeds (Prasanna et al. 2020, Figure 1) as a picture, and its table as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.formats import frame, markdown_grid
from bert_tickets.report.importance import tasks_of
from bert_tickets.report.pictures import draw_heat_map, draw_units
from bert_tickets.report.rows import row_name
from bert_tickets.report.stability import searched
from bert_tickets.runs.directory import read_run
from bert_tickets.runs.integrity import read_mask

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

    from bert_tickets.masking.mask import Mask


def draw_survival(levels: DataFrame, output: Path, title: str | None, method: str) -> str:
    """Draw which heads and MLPs the good tickets of a search keep: a panel per task, layers by heads, with a column of MLPs.

    `method` is a search as in the names of rows, such as `importance (units heads)`. A value is the share of seeds that keep the
    unit; of masks of weights the share of the unit's entries that is kept, a mean over seeds.
    """
    import numpy as np
    import pandas as pd

    own = searched(levels)
    method = method.replace("guarded-magnitude", "guarded_magnitude")
    if method not in set(own["search"]):
        there = ", ".join(sorted(set(own["search"]))) or "none"
        raise UserError(f"no finished search of the method {method!r}; there are {there}")
    own = own[own["search"] == method]
    panels = survival(own)
    of_weights = method.startswith("guarded_magnitude")
    unit = "share of its entries that is kept, mean over seeds" if of_weights else "share of seeds that keep it"
    counts = {task: f"{count} seed{'s' if count > 1 else ''}" for task, count in own.groupby("task")["seed"].nunique().items()}
    named = {f"{published.name(task)} ({counts[task]})": panel for task, panel in panels.items()}
    heading = title or f"Heads and MLPs of the {row_name(method)}"
    if all(np.isnan(heads).all() for heads, _ in named.values()):  # MLPs alone: a column per task
        shares = [(str(layer), name, share, "") for name, (_, mlps) in named.items() for layer, share in enumerate(mlps)]
        cells = pd.DataFrame(shares, columns=["row", "column", "value", "remark"])
        draw_heat_map(output, heading, ("task", "layer"), cells, unit)
    else:
        draw_units(output, heading, named, unit)
    lines = []
    for task, (heads, mlps) in panels.items():
        for layer, (of_heads, of_mlp) in enumerate(zip(heads, mlps, strict=True)):
            line = {"task": published.name(task), "layer": str(layer)}
            lines.append(line | {f"head {head}": _text(share) for head, share in enumerate(of_heads)} | {"MLP": _text(of_mlp)})
    return f"{unit}\n{markdown_grid(frame(lines))}"


def _text(share: float) -> str:
    return f"{share:.2f}" if share == share else ""


def survival(own: DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute, by task, the mean over seeds of the kept share of each head [L, A] and MLP [L]; NaN where it is not covered.

    Of masks of units a unit is kept whole, or not at all.
    """
    import numpy as np

    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {task: [] for task in tasks_of(own)}
    for line in own.itertuples():
        heads = read_run(Path(line.run))["fingerprint"]["architecture"]["num_attention_heads"]
        found[line.task].append(unit_shares(read_mask(Path(line.run), line.level), heads))
    return {task: (np.mean([h for h, _ in shares], 0), np.mean([m for _, m in shares], 0)) for task, shares in found.items()}


def unit_shares(mask: Mask, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the share of the covered entries that a mask keeps of each head [L, A] and each MLP [L]; NaN if it covers none."""
    import numpy as np

    from bert_tickets.modeling.units import HEAD_OUTPUT, INNER, LAYER, OUTER, QKV

    layers = 1 + max(int(name.removeprefix(LAYER).partition(".")[0]) for name in mask if name.startswith(LAYER))
    of_heads, of_mlps = np.full((layers, heads), np.nan), np.full(layers, np.nan)
    for layer in range(layers):
        kept = {name: mask[f"{LAYER}{layer}.{name}"].numpy() for name in _names(mask, f"{LAYER}{layer}.")}
        parts = [kept[f"{name}.{part}"] for name in QKV for part in ("weight", "bias") if f"{name}.{part}" in kept]
        parts += [kept[f"{HEAD_OUTPUT}.weight"].T] if f"{HEAD_OUTPUT}.weight" in kept else []
        if parts:
            of_heads[layer] = np.concatenate([part.reshape(heads, -1) for part in parts], 1).mean(1)
        parts = [kept[f"{name}.{part}"] for name in (INNER, OUTER) for part in ("weight", "bias") if f"{name}.{part}" in kept]
        if parts:
            of_mlps[layer] = np.concatenate([part.ravel() for part in parts]).mean()
    return of_heads, of_mlps


def _names(mask: Mask, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in mask if name.startswith(prefix)]
