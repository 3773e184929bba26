"""Tables of cells, as grids (DataFrames of texts), and written as Markdown, LaTeX or CSV by pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.report.cells import NO_RUN, UNIT, Cell, percent, place

if TYPE_CHECKING:
    from pandas import DataFrame

LONG = 40  # lines from which a LaTeX table may break over pages


@dataclass(frozen=True)
class Table:
    """A table: `grids` by heading, `cells` for CSV and sources, and what a reader must know."""

    name: str
    title: str
    grids: Mapping[str, DataFrame]
    cells: Sequence[Cell]
    notes: Sequence[str]
    missing: Sequence[str]


# ---- grids ----


def frame(lines: Sequence[Mapping[str, str]]) -> DataFrame:
    import pandas as pd

    return pd.DataFrame(list(lines)).fillna("")


def listing(cells: Sequence[Cell]) -> DataFrame:
    """One line per cell: its score, the published one, and its difference to the reference."""
    lines = []
    for c in cells:
        line = {"task": published.name(c.task), "row": c.row, "sparsity": percent(c.sparsity), "here": c.text}
        line |= {"published": c.published, "difference": "", "95 % interval": "", "pairs": ""}
        if (d := c.difference) is not None:
            line["difference"] = signed(d.mean)
            line["95 % interval"] = "none" if d.low is None else f"{signed(d.low)} to {signed(d.high)}"
            line["pairs"] = str(len(d.seeds)) + f" ({len(d.unpaired)} unpaired)" * bool(d.unpaired)
        lines.append(line | {"verdict": c.verdict if c.results else ""})
    wide = frame(lines)
    return wide.loc[:, (wide != "").any()]


def signed(value: float | None, digits: int = 1) -> str:
    """A difference in points; one that rounds to zero has no sign."""
    if value is None:
        return ""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def scores(cells: Iterable[Cell]) -> DataFrame:
    """The cells' texts by row and sparsity (lines) and task (columns), with a star for each criterion that a cell meets."""
    cells = sorted((cell for cell in cells if cell.results), key=place)
    lines = []
    for c in cells:
        stars = " **" if c.within and c.exceeds else " *" if c.within else ""
        lines.append({"row": c.row, "sparsity": percent(c.sparsity), "task": published.name(c.task), "text": c.text + stars})
    if not lines:
        return frame([])
    wide = frame(lines).pivot_table(index=["row", "sparsity"], columns="task", values="text", aggfunc="first", sort=False)
    tasks = [published.name(task) for task in published.in_order(cell.task for cell in cells)]
    return wide[tasks].fillna(NO_RUN).reset_index().rename_axis(columns=None)


def sources_of(tables: Sequence[Table]) -> DataFrame:
    """The run, level and mask of every number, each once."""
    lines = [
        {
            "task": published.name(cell.task),
            "row": cell.row,
            "sparsity": percent(cell.sparsity),
            "seed": str(r.seed),
            "value": "undefined" if r.value is None else f"{UNIT * r.value:.4f}",
            "run": str(r.run),
            "level": str(r.level),
            "mask sha256": r.mask_sha256,
        }
        for table in tables
        for cell in table.cells
        for r in cell.results
    ]
    return frame(lines).drop_duplicates()


# ---- formats ----


def markdown(tables: Sequence[Table], *, sources: bool = False) -> str:
    """Tables as GitHub renders them; notes, missing runs and `sources` come once at the end."""
    blocks = []
    for table in tables:
        blocks.append(f"## {table.title}")
        for heading, grid in table.grids.items():
            blocks += [f"**{heading}**"] * bool(heading) + [_markdown_grid(grid)]
    blocks += ["## Notes", _bullets(note for table in tables for note in table.notes)]
    missing = _bullets(line for table in tables for line in table.missing)
    blocks += ["## Missing runs", missing] if missing else []
    blocks += ["## Sources of the numbers", _markdown_grid(sources_of(tables))] if sources else []
    return "\n\n".join(blocks) + "\n"


def _markdown_grid(grid: DataFrame) -> str:
    return grid.map(lambda text: text.replace("|", "\\|")).to_markdown(index=False, disable_numparse=True)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def latex(tables: Sequence[Table], *, sources: bool = False) -> str:
    r"""Tables for `\input`; missing runs, and `sources`, are comments."""
    blocks = ["% needs \\usepackage{adjustbox,booktabs,longtable}"]
    for table in tables:
        for heading, grid in table.grids.items():
            caption = table.title + f". {heading}" * bool(heading)
            options = {"caption": _escape_tex(caption), "longtable": len(grid) > LONG, "escape": True, "index": False}
            text = grid.to_latex(**options).replace("±", r"$\pm$")
            text = text.replace(r"\begin{tabular}", "\\begin{adjustbox}{max width=\\textwidth}\n\\begin{tabular}")
            blocks.append(text.replace(r"\end{tabular}", "\\end{tabular}\n\\end{adjustbox}"))
        notes = "\\\\\n".join(map(_escape_tex, table.notes))
        blocks.append(f"{{\\footnotesize\\raggedright\n{notes}\\par}}")
        blocks += [f"% missing: {' '.join(line.split())}" for line in table.missing]
    if sources:
        blocks += [f"% {line}" for line in sources_of(tables).to_csv(index=False).splitlines()]
    return "\n".join(blocks) + "\n"


def _escape_tex(text: str) -> str:
    text = text.replace("`", "").replace("\\", "/").replace("~", " ")
    text = "".join(f"\\{c}" if c in "%_&#${}" else c for c in text)
    return text.replace(">=", r"$\ge$").replace("±", r"$\pm$").replace("^", r"\textasciicircum{}")


def csv(tables: Sequence[Table]) -> str:
    """One line per cell in full precision, with its runs, levels and masks separated by semicolons."""
    import pandas as pd

    return pd.DataFrame([{"table": table.name} | _facts(cell) for table in tables for cell in table.cells]).to_csv(index=False)


def _facts(cell: Cell) -> dict[str, Any]:
    s, d, results = cell.summary, cell.difference, cell.results
    facts: dict[str, Any] = {"task": cell.task, "row": cell.row, "sparsity": cell.sparsity}
    facts |= {"metric": results[0].metric if results else "", "unit": f"x {UNIT}", "mean": s.mean, "sd": s.sd, "n": s.n}
    facts |= {"seeds": _join(s.values), "undefined": _join(s.undefined), "warnings": "; ".join(cell.warnings)}
    facts |= {"within_one_sd": cell.within, "match_or_exceed": cell.exceeds, "published": cell.published}
    facts |= {"reference": cell.reference, "pairs": d and len(d.seeds), "difference": d and d.mean}
    facts |= {"interval_low": d and d.low, "interval_high": d and d.high, "p_holm": d and d.p_holm, "verdict": cell.verdict}
    facts |= {name: _join(getattr(r, name) for r in results) for name in ("run", "level", "mask_sha256")}
    return facts


def _join(values: Iterable[Any]) -> str:
    return ";".join(map(str, values))
