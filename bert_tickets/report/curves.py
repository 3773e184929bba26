"""Lines with a band of their spread, in small multiples: a panel a task, one style a line throughout."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bert_tickets.report.pictures import WIDTH, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours keep apart for colour-blind readers; the markers, of another number, and the dashes keep apart in grey.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
ASIDE = 0.035  # of the axis, between points of one place
DASHES = ("-", "--", "-.", ":", (0, (5, 1)))

Points = Mapping[float, Sequence[float]]  # x -> the values there, of one run each


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: its lines by name, and levels that they are read against."""

    title: str
    unit: str  # what y is, and in which unit
    lines: Mapping[str, Points]
    levels: Mapping[str, Sequence[float]] = field(default_factory=dict)  # horizontal lines by name
    doubted: Mapping[str, Collection[float]] = field(default_factory=dict)  # by line, the x of points that are drawn hollow


def draw(
    output: Path, title: str, x: str, panels: Sequence[Panel], spread: str, ticks: Mapping[float, str] | None = None
) -> None:
    """Draw the panels as a .png, .svg or .pdf under one legend, which `spread` heads. `x` names the axis, `ticks` its places."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    styles = {name: _style(i) for i, name in enumerate(names)}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    in_legend = max(1, int(WIDTH / (0.5 + 0.065 * max(map(len, [*names, ""])))))
    with drawing(output) as figure:
        height = {1: 2.8, 2: 2.0}.get(columns, 1.55) * rows + 0.17 * math.ceil((len(names) + 1) / in_legend)
        figure.set_size_inches(WIDTH, height + 0.6)
        plots = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
        handles: dict[str, Any] = {}
        for i, (plot, panel) in enumerate(zip(plots, panels, strict=False)):
            handles |= _draw_panel(plot, panel, styles)
            plot.set_title(panel.title)
            if i % columns == 0 or panel.unit != panels[i - 1].unit:
                plot.set_ylabel(panel.unit)
            if i + columns >= len(panels):
                plot.set_xlabel(x)
                plot.tick_params(labelbottom=True)
            if ticks:
                plot.set_xticks(list(ticks), list(ticks.values()))
            plot.grid(color="0.9", linewidth=0.5)
            plot.set_axisbelow(True)
            plot.spines[["top", "right"]].set_visible(False)
        for plot in plots[len(panels) :]:
            plot.remove()
        figure.suptitle(title)
        shown = [*(name for name in names if name in handles), *(name for name in handles if name not in names)]
        figure.legend(
            [handles[name] for name in shown],
            shown,
            title=spread,
            title_fontsize=8,
            loc="outside lower center",
            ncols=in_legend,
            frameon=False,
            handlelength=3,
        )


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def _draw_panel(plot: Axes, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Draw one panel, and return what stands for each name in the legend."""
    handles: dict[str, Any] = {}
    everywhere = [x for points in panel.lines.values() for x in points]
    width = max(everywhere, default=0.0) - min(everywhere, default=0.0)
    for name, values in panel.levels.items():
        for value in values:
            handles[name] = plot.axhline(value, color="0.45", linewidth=0.9, linestyle=(0, (1, 1.5)))
    alone = [name for name, points in panel.lines.items() if len(points) == 1]
    for name, points in panel.lines.items():
        if not points:
            continue
        xs, style = sorted(points), styles[name]
        means = [mean(points[x]) for x in xs]
        spreads = [stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
        hollow = [x in panel.doubted.get(name, ()) for x in xs]
        if len(xs) == 1:  # points that share a place stand side by side, in the order of the legend
            xs = [xs[0] + ASIDE * width * (alone.index(name) - (len(alone) - 1) / 2)]
        (handles[name],) = plot.plot(xs, means, **style)
        if any(hollow):
            over = [(x, y) for x, y, is_hollow in zip(xs, means, hollow, strict=True) if is_hollow]
            look = {"marker": style["marker"], "markerfacecolor": "white", "markeredgecolor": style["color"]}
            plot.plot(*zip(*over, strict=True), linestyle="none", **look)
        if len(xs) == 1:
            plot.errorbar(xs, means, yerr=spreads, fmt="none", ecolor=style["color"], elinewidth=0.8, capsize=2)
        else:
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            plot.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)
    return handles
