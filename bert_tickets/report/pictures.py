"""Pictures as .png, .svg or .pdf: their common style, lines in one panel per task, and heat maps."""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.files import write
from bert_tickets.report.cells import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

WIDTH = 5.5  # inches, the text width of a NeurIPS page: the 8-point type is printed unscaled
DATELESS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "legend.fontsize": "medium",
    "xtick.labelsize": "medium",
    "ytick.labelsize": "medium",
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType: many publishers refuse Type 3
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bert_tickets",  # otherwise ids are random
}
# Okabe and Ito's colours, for colour-blind readers; with markers and dashes of other periods, also for grey print.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
NAMED_SIZES = 8  # of points in a legend; of more the first and the last
DASHES = ("-", "--", "-.", ":", (0, (5, 1)))
POINT = ["row", "column", "unit", "title", "line", "sparsity", "x", "y", "hollow"]  # the columns that `draw_points` takes


def picture_file(word: str) -> Path:
    """The `type` of an argparse flag for a picture's file."""
    if Path(word).suffix not in DATELESS:
        raise argparse.ArgumentTypeError(f"{word}: must end in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("pictures need matplotlib: pip install matplotlib, or pip install -e '.[figures]'")
    return Path(word)


@contextmanager
def drawing(output: Path) -> Iterator[Figure]:
    """A figure to draw on, written atomically at the end of the block. Equal content gives equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        yield figure
        drawn = io.BytesIO()
        figure.savefig(drawn, format=output.suffix[1:], dpi=200, metadata=DATELESS[output.suffix])
    write(output, drawn.getvalue())


def draw_lines(
    output: Path,
    title: str,
    x: str,
    points: DataFrame,
    note: str,
    ticks: Mapping[float, str] | None = None,
    *,
    log: bool = False,
) -> None:
    """Draw means with error bars of one standard deviation, under one legend with the title `note`; over log x with `log`.

    `points` has the columns panel, unit (of y), line, x, mean, sd and hollow (the marker). Without x a mean is a horizontal line.
    """
    names, panels = list(points["line"].unique()), points["panel"].nunique()
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    per_row = _legend_columns([*names, note[:20]])
    handles: dict[str, Any] = {}
    with drawing(output) as figure:
        height = {1: 2.8, 2: 2.0}.get(columns, 1.55) * rows + 0.17 * math.ceil((len(names) + 1) / per_row)
        figure.set_size_inches(WIDTH, height + 0.6)
        plots = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flatten())
        for i, (name, panel) in enumerate(points.groupby("panel", sort=False)):
            handles |= _draw_panel(plots[i], panel, names)
            plots[i].set(title=name, ylabel=panel["unit"].iloc[0])
            if i + columns >= panels:
                plots[i].set_xlabel(x)
                plots[i].tick_params(labelbottom=True)
            if ticks:
                plots[i].set_xticks(list(ticks), list(ticks.values()))
            if log:
                plots[i].set_xscale("log")
            plots[i].grid(color="0.9", linewidth=0.5)
            plots[i].set_axisbelow(True)
            plots[i].spines[["top", "right"]].set_visible(False)
        for plot in plots[panels:]:
            plot.remove()
        figure.suptitle(title)
        legend = {"loc": "outside lower center", "ncols": per_row, "frameon": False, "handlelength": 3}
        figure.legend([handles[name] for name in names], names, title=note, title_fontsize=8, **legend)


def _legend_columns(names: Iterable[str]) -> int:
    """How many columns of such names fit into the width of a picture."""
    return max(1, int(WIDTH / (0.45 + 0.055 * max(map(len, names)))))


def _draw_panel(plot: Axes, panel: DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Draw one panel; returns the legend's handles by name."""
    handles: dict[str, Any] = {}
    for name, line in panel.groupby("line", sort=False):
        if line["x"].isna().all():
            for value in line["mean"]:
                handles[name] = plot.axhline(value, color="0.45", linewidth=0.9, linestyle=(0, (1, 1.5)))
            continue
        i, line = names.index(name), line.sort_values("x")
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        bars = {"yerr": line["sd"].fillna(0), "elinewidth": 0.8, "capsize": 2}
        handles[name] = plot.errorbar(line["x"], line["mean"], linestyle=DASHES[i % len(DASHES)], **bars, **style)
        hollow = line[line["hollow"]]
        plot.plot(hollow["x"], hollow["mean"], linestyle="none", markerfacecolor="white", zorder=3, **style)
    return handles


def draw_points(output: Path, title: str, points: DataFrame, note: str) -> None:
    """Draw points in a grid of panels, whose rows share y and whose columns share x, under one legend with the title `note`.

    `points` has the columns row (of panels), unit (of y), column (x's name), title (of the panel), line (colour and marker),
    sparsity (size), x, y and hollow.
    """
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D

    rows, columns, names = (list(points[key].unique()) for key in ("row", "column", "line"))
    sparsities = sorted(points["sparsity"].unique())
    sizes = {sparsity: 2.5 + 3 * i / len(sparsities) for i, sparsity in enumerate(sparsities)}
    styles: dict[str, dict[str, Any]] = {
        name: {"linestyle": "none", "color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }
    handles: dict[str, Any] = {name: Line2D([], [], **style) for name, style in styles.items()}
    of_size: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "0.6"}
    named = sparsities if len(sparsities) <= NAMED_SIZES else [sparsities[0], sparsities[-1]]  # the whole line has to fit
    in_words = "sparsity " + (" to " if len(named) < len(sparsities) else ", ").join(map(percent, named))
    handles[in_words] = tuple(Line2D([], [], markersize=sizes[sparsity], **of_size) for sparsity in named)
    per_row = _legend_columns(handles)
    with drawing(output) as figure:
        figure.set_size_inches(WIDTH, 1.65 * len(rows) + 0.17 * (math.ceil(len(handles) / per_row) + 2) + 0.6)
        plots = figure.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="row")
        for row, column, unit, name, line, sparsity, x, y, hollow in points[POINT].itertuples(index=False):
            plot = plots[rows.index(row), columns.index(column)]
            plot.plot(x, y, markersize=sizes[sparsity], markerfacecolor="white" if hollow else None, **styles[line])
            plot.set_title(name)
            plots[rows.index(row), 0].set_ylabel(unit)
            plots[-1, columns.index(column)].set_xlabel(column)
        for plot in plots.flat:
            plot.grid(color="0.9", linewidth=0.5)
            plot.set_axisbelow(True)
            plot.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title)
        legend: dict[str, Any] = {"loc": "outside lower center", "ncols": per_row, "frameon": False, "handlelength": 3}
        legend["handler_map"] = {tuple: HandlerTuple(ndivide=None)}
        drawn = figure.legend(handles.values(), handles.keys(), title=note, title_fontsize=8, **legend)
        drawn.get_title().set_multialignment("center")


def draw_heat_map(
    output: Path, title: str, axes: tuple[str, str], cells: DataFrame, unit: str, limit: float | None = None
) -> None:
    """Draw values with a remark below each; without a value grey. `axes` are the names of the columns and of the rows.

    `cells` has the columns row, column, value and remark; rows and columns are in the order in which they appear. Values are in
    [0, 1]; with `limit` differences, whose colours end at -limit and limit. `unit` is the colour bar's label.
    """
    from matplotlib import colormaps

    rows, columns = list(cells["row"].unique()), list(cells["column"].unique())
    values = cells.pivot(index="row", columns="column", values="value").reindex(index=rows, columns=columns)
    form, colors = (".3f", "cividis") if limit is None else ("+.1f", "RdBu")
    low, high = (0.0, 1.0) if limit is None else (-limit, limit)
    if limit is None and cells["value"].notna().any():
        low, high = math.floor(10 * cells["value"].min()) / 10, math.floor(10 * cells["value"].max() + 1) / 10
    with drawing(output) as figure:
        lines = title.splitlines()
        width = 0.7 * len(columns) + 0.072 * max(map(len, rows)) + 0.5
        figure.set_size_inches(max(width, 0.08 * max(map(len, (*lines, unit)))), 0.36 * len(rows) + 1.5 + len(lines) / 6)
        plot = figure.subplots()
        palette = colormaps[colors].with_extremes(bad="0.88")
        image = plot.imshow(values.to_numpy(), cmap=palette, vmin=low, vmax=high, aspect="auto")
        for row, column, value, remark in cells[["row", "column", "value", "remark"]].itertuples(index=False):
            number = "" if math.isnan(value) else f"{value:{form}}".replace("-", "−")
            ink = "black" if math.isnan(value) else ink_on(palette((value - low) / (high - low)))
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink, "linespacing": 1.1}
            plot.text(columns.index(column), rows.index(row), f"{number}\n{remark}".strip(), **style)
        plot.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        plot.set_yticks(range(len(rows)), rows)
        plot.set(xlabel=axes[0], ylabel=axes[1])
        plot.tick_params(length=0)
        plot.spines[:].set_visible(False)
        figure.suptitle(title)
        figure.colorbar(image, label=unit, location="bottom", extend="neither" if limit is None else "both", aspect=40, pad=0.03)


def draw_units(output: Path, title: str, panels: Mapping[str, tuple[Any, Any]], unit: str) -> None:
    """Draw shares in [0, 1] of heads and MLPs, a panel per title: layers by heads, and a column of MLPs if they have values.

    A panel has arrays of heads [layers, heads] and of MLPs [layers], with NaN for no value. `unit` is the colour bar's label.
    """
    import numpy as np
    from matplotlib import colormaps

    known = np.concatenate([part[~np.isnan(part)] for panel in panels.values() for part in panel])
    low, high = math.floor(10 * known.min()) / 10, math.ceil(10 * known.max()) / 10
    norm = (low, high) if low < high else (0.0, 1.0)
    columns, palette = min(2, len(panels)), colormaps["cividis"].with_extremes(bad="white")
    rows = math.ceil(len(panels) / columns)
    layers, heads = map(max, zip(*(heads.shape for heads, _ in panels.values()), strict=True))
    height = rows * (0.17 * layers + 0.55) + 0.8
    with drawing(output) as figure:
        width = max(0.07 * max(len(title), len(unit)), columns * min(WIDTH / 2, 0.22 * heads + 0.7))
        figure.set_size_inches(width, height)
        plots = list(figure.subplots(rows, columns, squeeze=False).flatten())
        for plot, (name, (of_heads, of_mlps)) in zip(plots, panels.items(), strict=False):
            image = plot.imshow(of_heads, cmap=palette, vmin=norm[0], vmax=norm[1], aspect="auto")
            count, at_mlp = of_heads.shape[1], of_heads.shape[1] + 0.5  # half a cell beside the heads
            ends = (count, count + 1, len(of_mlps) - 0.5, -0.5)
            plot.imshow(of_mlps[:, None], cmap=palette, vmin=norm[0], vmax=norm[1], aspect="auto", extent=ends)
            has_mlps = not np.isnan(of_mlps).all()
            for (layer, at), share in np.ndenumerate(np.column_stack([of_heads, of_mlps])):
                if not math.isnan(share):
                    ink = ink_on(palette((share - norm[0]) / (norm[1] - norm[0])))
                    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 5.5, "color": ink}
                    plot.text(at_mlp if at == count else at, layer, _short(share), **style)
            labels = [*map(str, range(count)), *["MLP"] * has_mlps]
            plot.set_xticks([*range(count), *[at_mlp] * has_mlps], labels, fontsize=6)
            plot.set_yticks(range(len(of_mlps)), map(str, range(len(of_mlps))), fontsize=6)
            plot.set(title=name, xlabel="head", ylabel="layer", xlim=(-0.5, count + has_mlps - 0.5 * (not has_mlps)))
            plot.tick_params(length=0)
            plot.spines[:].set_visible(False)
        for plot in plots[len(panels) :]:
            plot.remove()
        figure.suptitle(title)
        bar: dict[str, Any] = {"location": "bottom", "aspect": 50, "shrink": 0.8, "pad": 0.12 / height}
        figure.colorbar(image, ax=plots[: len(panels)], label=unit, **bar)


def draw_maps(output: Path, title: str, panels: Sequence[tuple[str, Any, Any, Mapping[str, int]]], unit: str) -> None:
    """Draw matrices of distances between steps, two panels a row, with a line at each marked step; 0 is dark.

    A panel has a title, n steps at equal intervals [n], distances [n, n], and the steps to mark by name.
    """
    high = max(float(values.max()) for _, _, values, _ in panels) or 1.0
    rows, handles = math.ceil(len(panels) / 2), dict[str, Any]()
    names = list(dict.fromkeys(mark for *_, marks in panels for mark in marks))
    with drawing(output) as figure:
        figure.set_size_inches(WIDTH, 2.5 * rows + 1.1)
        plots = list(figure.subplots(rows, 2, squeeze=False).flatten())
        for plot, (name, steps, values, marks) in zip(plots, panels, strict=True):
            extent = (steps[0], steps[-1], steps[-1], steps[0])
            image = plot.imshow(values, cmap="cividis", vmin=0, vmax=high, extent=extent, aspect="auto", interpolation="nearest")
            for mark, step in marks.items():
                i = names.index(mark) % 2
                style: dict[str, Any] = {"color": ("#FFFFFF", "#D55E00")[i], "linestyle": DASHES[i], "linewidth": 0.9}
                handles[mark] = plot.axvline(step, **style)
                plot.axhline(step, **style)
            plot.set(title=name, xlabel="step", ylabel="step")
        figure.suptitle(title)
        figure.colorbar(image, ax=plots, label=unit, location="bottom", aspect=50, shrink=0.8, pad=0.03)
        if handles:
            legend: dict[str, Any] = {
                "loc": "outside lower center",
                "ncols": len(handles),
                "facecolor": "0.6",
                "edgecolor": "none",
            }
            figure.legend(handles.values(), handles.keys(), **legend)


def _short(share: float) -> str:
    """A share as `1`, `.8`, `.25`."""
    return f"{share:.2f}".rstrip("0").rstrip(".").removeprefix("0") or "0"


def ink_on(color: tuple[float, float, float, float]) -> str:
    """Black or white, the one with the higher contrast (at least 4.5 to 1 by WCAG)."""
    red, green, blue = (part**2.2 for part in color[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"
