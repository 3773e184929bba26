"""A heat map whose values can be read: each written in its cell, in ink that stands out from the cell's colour."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_tickets.report.pictures import drawing

Cell = tuple[float | None, str]  # a value and a note below it; or a note alone, on grey
LETTER, LINE = 0.072, 0.16  # inches of the 8-point type: a digit's width, a line's height
LIMITS = (1, 2, 5, 10, 20, 50)  # at which a scale around zero may end


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The colours of values from `low` to `high`, beyond which there are no others; and how values are written."""

    low: float
    high: float
    colors: str = "cividis"  # keeps its order for colour-blind readers and in grey
    form: str = ".3f"


def draw(
    output: Path,
    title: str,
    axes: tuple[str, str],
    columns: list[str],
    rows: list[str],
    cells: list[list[Cell]],
    measure: str,
    *,
    scale: Scale | None = None,
) -> None:
    """Draw rows of cells as a .png, .svg or .pdf; `axes` name the columns and the rows, `measure` the values.

    Values without a scale of their own are in [0, 1]; theirs goes from the tenth below them to the tenth above.
    """
    from matplotlib import colormaps

    known = [value for row in cells for value, _ in row if value is not None]
    scale = scale or Scale(low=tenths(known)[0], high=tenths(known)[1])
    below = [textwrap.fill(name, 12, break_long_words=False, break_on_hyphens=False) for name in columns]
    slanted = any(len(line) > 12 for name in below for line in name.splitlines())
    with drawing(output) as figure:
        figure.set_size_inches(_size(title, [""] * len(columns) if slanted else below, rows, cells, scale))
        plot = figure.subplots()
        colors = colormaps[scale.colors].with_extremes(bad="0.88")
        values = [[math.nan if value is None else value for value, _ in row] for row in cells]
        image = plot.imshow(values, cmap=colors, vmin=scale.low, vmax=scale.high, aspect="auto")
        for y, row in enumerate(cells):
            for x, (value, note) in enumerate(row):
                ink = "black" if value is None else ink_on(colors((value - scale.low) / (scale.high - scale.low)))
                plot.text(x, y, _text(value, note, scale), ha="center", va="center", color=ink, linespacing=1.1)
        slant: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        plot.set_xticks(range(len(columns)), columns if slanted else below, **slant)
        plot.set_yticks(range(len(rows)), rows)
        plot.set(xlabel=axes[0], ylabel=axes[1])
        figure.suptitle(title, fontsize=9)
        plot.tick_params(length=0)
        plot.spines[:].set_visible(False)
        for x in range(1, len(columns)):
            plot.axvline(x - 0.5, color="white", linewidth=1)
        for y in range(1, len(rows)):
            plot.axhline(y - 0.5, color="white", linewidth=1)
        more, less = any(value > scale.high for value in known), any(value < scale.low for value in known)
        extend = {(True, True): "both", (True, False): "max", (False, True): "min", (False, False): "neither"}[more, less]
        letters = int((figure.get_size_inches()[0] - 0.4 - LETTER * max(map(len, rows))) / (0.85 * LETTER))
        label = textwrap.fill(measure, letters)  # a label wider than its bar would be cut at the picture's edge
        figure.colorbar(image, label=label, location="bottom", extend=extend, aspect=40, pad=0.03)


def _text(value: float | None, note: str, scale: Scale) -> str:
    number = [] if value is None else [f"{value:{scale.form}}".replace("-", "−")]
    return "\n".join([*number, *([note] if note else [])])


def _size(title: str, columns: list[str], rows: list[str], cells: list[list[Cell]], scale: Scale) -> tuple[float, float]:
    """Inches for all of these without one touching another."""
    texts = [_text(*cell, scale).splitlines() for row in cells for cell in row]
    letters = max(len(line) for text in [*texts, *(name.splitlines() for name in columns)] for line in text or [""])
    width = max(len(columns) * (LETTER * letters + 0.07), LETTER * max(map(len, title.splitlines())))
    height = len(rows) * (LINE * max(map(len, texts)) + 0.08)
    return width + LETTER * max(map(len, rows)) + 0.4, height + LINE * (9 + len(title.splitlines()))


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """The tenths of [0, 1] next below and above all values, a tenth apart at least."""
    low = min(9, *(math.floor(10 * value) for value in values))
    return low / 10, max(low + 1, *(math.ceil(10 * value) for value in values)) / 10


def around_zero(values: Sequence[float], form: str) -> Scale:
    """Red below zero and blue above, as colour-blind readers tell apart too; white is zero.

    It ends where three in four of the values have their place, so that a few far away do not pale the others: they have the
    last colour.
    """
    sizes = sorted(map(abs, values))
    need = sizes[math.ceil(0.75 * len(sizes)) - 1] if sizes else 0
    end = next((limit for limit in LIMITS if limit >= need), LIMITS[-1])
    return Scale(low=-end, high=end, colors="RdBu", form=form)


def ink_on(color: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out more: a contrast of 4.5 to 1 at least, by the WCAG's relative luminance."""
    red, green, blue = (part**2.2 for part in color[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"
