"""A heat map whose values can be read: each written in its cell, in ink that stands out from the cell's colour."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import Any

from bert_tickets import UserError

Cell = tuple[float | None, str]  # a value in [0, 1] and a note below it; or a note alone, on grey


def draw(
    output: Path, title: str, axes: tuple[str, str], columns: list[str], rows: list[str], cells: list[list[Cell]], measure: str
) -> None:
    """Draw rows of cells as a .png, .svg or .pdf; `axes` name the columns and the rows, `measure` the values.

    The scale goes from the tenth below the values to the tenth above. Its colours (cividis) keep their order for colour-blind
    readers and in grey.
    """
    need_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from bert_tickets.files import write

    figure = Figure(figsize=(2.8 + 0.8 * len(columns), 1.6 + 0.5 * len(rows)), layout="constrained")
    plot = figure.subplots()
    low, high = scale([value for row in cells for value, _ in row if value is not None])
    values = [[math.nan if value is None else value for value, _ in row] for row in cells]
    colors = colormaps["cividis"].with_extremes(bad="0.93")
    image = plot.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
    for y, row in enumerate(cells):
        for x, (value, note) in enumerate(row):
            if value is None:
                plot.text(x, y, note, ha="center", va="center", fontsize=8)
                continue
            ink = ink_on(colors((value - low) / (high - low)))
            plot.text(x, y, f"{value:.3f}", ha="center", va="bottom", fontsize=9, color=ink)
            plot.text(x, y + 0.06, note, ha="center", va="top", fontsize=7, color=ink)
    below = [textwrap.fill(name, 12, break_long_words=False, break_on_hyphens=False) for name in columns]
    wide = any(len(line) > 12 for name in below for line in name.splitlines())
    slant: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if wide else {}
    plot.set_xticks(range(len(columns)), columns if wide else below, fontsize=9, **slant)
    plot.set_yticks(range(len(rows)), rows, fontsize=9)
    plot.set(xlabel=axes[0], ylabel=axes[1])
    plot.set_title(title, fontsize=10)
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    for x in range(1, len(columns)):
        plot.axvline(x - 0.5, color="white", linewidth=1)
    for y in range(1, len(rows)):
        plot.axhline(y - 0.5, color="white", linewidth=1)
    figure.colorbar(image, label=measure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=output.suffix[1:], dpi=160)
    write(output, drawn.getvalue())


def scale(values: list[float]) -> tuple[float, float]:
    """The tenths of [0, 1] next below and above all values, a tenth apart at least."""
    low = min(9, *(math.floor(10 * value) for value in values))
    return low / 10, max(low + 1, *(math.ceil(10 * value) for value in values)) / 10


def ink_on(color: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out more: a contrast of 4.5 to 1 at least, by the WCAG's relative luminance."""
    red, green, blue = (part**2.2 for part in color[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


def need_matplotlib() -> None:
    """Raise `UserError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib, or pip install -e '.[figures]'") from None
