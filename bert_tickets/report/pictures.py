"""What all pictures share: type of the size it is printed in, and files whose bytes depend on nothing but their content."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 5.5  # inches: the text of a NeurIPS page, so that no picture need be shrunk below its 8-point type
DATELESS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "figure.titlesize": 10,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # TrueType: many publishers refuse the other, Type 3
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bert_tickets",  # the ids within a file are drawn at random otherwise
}


@contextmanager
def drawing(output: Path) -> Iterator[Figure]:
    """A figure to fill, in the common style; at the end it is written to `output`, whole or not at all.

    Equal content is equal bytes under one version of matplotlib. Raises `UserError` where matplotlib is not installed, or the
    file cannot be written.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    from bert_tickets.files import write

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        yield figure
        drawn = io.BytesIO()
        figure.savefig(drawn, format=output.suffix[1:], dpi=200, metadata=DATELESS[output.suffix])
    write(output, drawn.getvalue())


def need_matplotlib() -> None:
    """Raise `UserError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib, or pip install -e '.[figures]'") from None


def picture_file(word: str) -> Path:
    """The file that a command line names for a picture; for argparse's `type`."""
    if Path(word).suffix not in DATELESS:
        raise argparse.ArgumentTypeError(f"{word}: a picture is .png, .svg or .pdf")
    return Path(word)
