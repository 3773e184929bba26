"""Tables as Markdown, LaTeX or CSV, written by pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.report.cells import NO_RUN, percent, signed

if TYPE_CHECKING:
    from pandas import DataFrame

LONG = 40  # lines from which a LaTeX table may break over pages
CSV_COLUMNS = (
    *("task", "row", "sparsity", "metric", "mean", "sd", "n", "best_of", "seeds", "undefined", "warnings"),
    *("within_one_sd", "match_or_exceed", "published"),
    *("reference", "pairs", "difference", "interval_low", "interval_high", "p_holm", "verdict"),
    *("run", "level", "mask_sha256"),
)
COSTS = ("search_seconds", "train_seconds", "full_seconds", "time_saved", "flops_saved", "heads_kept", "neurons_kept", "drawn")


@dataclass(frozen=True)
class Table:
    """A table: `grids` of texts by heading, the `cells` behind them, what a reader must know, and the missing runs."""

    title: str
    grids: Mapping[str, DataFrame]
    cells: DataFrame
    notes: Sequence[str] = ()
    name: str = ""
    missing: Sequence[str] = ()
    sweep: str = ""  # that makes the runs of more tasks, if not the one of all tables of this name


# ---- grids ----


def frame(lines: Sequence[Mapping[str, str]]) -> DataFrame:
    import pandas as pd

    return pd.DataFrame(list(lines)).fillna("")


def listing(cells: DataFrame) -> DataFrame:
    """A line per cell: its score, the published one, and its difference to the reference. Columns without text are left out."""
    lines = []
    for cell in cells.sort_values("task", key=lambda tasks: tasks.map(published.place), kind="stable").to_dict("records"):
        line = _place(cell) | {"here": cell["text"], "overlap": cell.get("overlap", ""), "published": cell["published"]}
        line |= {"difference": "", "95 % interval": "", "pairs": "", "verdict": cell["verdict"] if cell["run"] else ""}
        if cell["pairs"] > 0:
            line["difference"] = signed(cell["difference"])
            interval = f"{signed(cell['interval_low'])} to {signed(cell['interval_high'])}"
            line["95 % interval"] = interval if cell["p"] >= 0 else "none"
            line["pairs"] = f"{cell['pairs']:.0f}" + (f" ({cell['unpaired']:.0f} unpaired)" if cell["unpaired"] else "")
        lines.append(line)
    wide = frame(lines)
    return wide.loc[:, (wide != "").any()]


def _place(cell: Mapping[str, Any]) -> dict[str, str]:
    return {"task": published.name(cell["task"]), "row": cell["row"], "sparsity": percent(cell["sparsity"])}


def scores(cells: DataFrame) -> DataFrame:
    """Scores by row and sparsity (lines) and task (columns), with a star for each criterion that a cell meets."""
    lines = []
    for cell in cells[cells["text"] != NO_RUN].to_dict("records"):
        stars = " *" * bool(cell["within_one_sd"]) + "*" * bool(cell["within_one_sd"] and cell["match_or_exceed"])
        lines.append(_place(cell) | {"text": cell["text"] + stars})
    wide = frame(lines).pivot_table(index=["row", "sparsity"], columns="task", values="text", aggfunc="first", sort=False)
    tasks = [published.name(task) for task in published.in_order(cells["task"])]
    return wide[tasks].fillna(NO_RUN).reset_index().rename_axis(columns=None)


def sources_of(tables: Sequence[Table]) -> DataFrame:
    """The run, level and mask of every number, each once."""
    lines = []
    for table in tables:
        for cell in table.cells.to_dict("records"):
            for seed, run, level, mask_sha256 in zip(cell["seeds"], cell["run"], cell["level"], cell["mask_sha256"], strict=True):
                value = f"{cell['values'][seed]:.4f}" if seed in cell["values"] else "undefined"
                line = _place(cell) | {"seed": str(seed), "value": value}
                lines.append(line | {"run": run, "level": str(level), "mask sha256": mask_sha256})
    return frame(lines).drop_duplicates()


# ---- formats ----


def markdown(tables: Sequence[Table], *, sources: bool = False) -> str:
    """Tables as GitHub renders them; notes, missing runs and `sources` come once at the end."""
    blocks = []
    for table in tables:
        blocks.append(f"## {table.title}")
        for heading, grid in table.grids.items():
            blocks += [f"**{heading}**"] * bool(heading) + [markdown_grid(grid)]
    blocks += ["## Notes", _bullets(note for table in tables for note in table.notes)]
    missing = _bullets(line for table in tables for line in table.missing)
    blocks += ["## Missing runs", missing] if missing else []
    blocks += ["## Sources of the numbers", markdown_grid(sources_of(tables))] if sources else []
    return "\n\n".join(blocks) + "\n"


def markdown_grid(grid: DataFrame) -> str:
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
    """A line per cell in full precision, with its runs, levels and masks separated by semicolons; of EarlyBERT with its costs."""
    import pandas as pd

    costs = [name for name in COSTS if any(name in table.cells for table in tables)]
    columns = [*CSV_COLUMNS, *costs, "unit"]
    cells = pd.concat([table.cells.reindex(columns=columns).assign(table=table.name) for table in tables])
    for name in ("best_of", "seeds", "undefined", "run", "level", "mask_sha256"):
        cells[name] = [";".join(map(str, values)) for values in cells[name]]
    given = zip(cells["task"], cells.pop("unit"), strict=True)
    units = [unit if isinstance(unit, str) else "loss" if task in published.LOSSES else "x 100" for task, unit in given]
    cells.insert(cells.columns.get_loc("mean"), "unit", units)
    return cells[["table", *cells.columns.drop("table")]].to_csv(index=False)
