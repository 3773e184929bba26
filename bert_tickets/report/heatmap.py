"""Heat maps with the values written in the cells, in black or white, whichever is readable on the cell's colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bert_tickets.report.plots import drawing

Cell = tuple[float | None, str]  # a value and a remark below it; without a value grey


def draw(
    output: Path,
    title: str,
    axes: tuple[str, str],
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Sequence[Sequence[Cell]],
    unit: str,
    limit: float | None = None,
) -> None:
    """Draw rows of cells; `axes` are the names of the columns and of the rows, `unit` is the colour bar's label.

    Values are in [0, 1]; with `limit` differences, whose colours end at -limit and limit.
    """
    from matplotlib import colormaps

    known = [value for row in cells for value, _ in row if value is not None] or [0.0]
    low, high, form, colors = math.floor(10 * min(known)) / 10, math.floor(10 * max(known) + 1) / 10, ".3f", "cividis"
    if limit is not None:
        low, high, form, colors = -limit, limit, "+.1f", "RdBu"
    values = [[math.nan if value is None else value for value, _ in row] for row in cells]
    with drawing(output) as figure:
        width, lines = 0.7 * len(columns) + 0.072 * max(map(len, rows)), len(title.splitlines())
        figure.set_size_inches(
            max(width + 0.5, 0.072 * max(map(len, (*title.splitlines(), unit)))), 0.36 * len(rows) + 1.5 + lines / 6
        )
        plot = figure.subplots()
        palette = colormaps[colors].with_extremes(bad="0.88")
        image = plot.imshow(values, cmap=palette, vmin=low, vmax=high, aspect="auto")
        for y, row in enumerate(cells):
            for x, (value, remark) in enumerate(row):
                number = "" if value is None else f"{value:{form}}".replace("-", "−")
                ink = "black" if value is None else ink_on(palette((value - low) / (high - low)))
                plot.text(x, y, f"{number}\n{remark}".strip(), ha="center", va="center", color=ink, linespacing=1.1)
        plot.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        plot.set_yticks(range(len(rows)), rows)
        plot.set(xlabel=axes[0], ylabel=axes[1])
        plot.tick_params(length=0)
        plot.spines[:].set_visible(False)
        figure.suptitle(title)
        figure.colorbar(image, label=unit, location="bottom", extend="neither" if limit is None else "both", aspect=40, pad=0.03)


def ink_on(color: tuple[float, float, float, float]) -> str:
    """Black or white, the one with the higher contrast (at least 4.5 to 1 by WCAG)."""
    red, green, blue = (part**2.2 for part in color[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"
