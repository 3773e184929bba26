"""How a table is written: Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from bert_tickets.report.cells import UNIT, Entry, percent
from bert_tickets.report.published import TICKET
from bert_tickets.runs.summary import published

MISSING = "no run"
LONG = 40  # lines beyond which a LaTeX table may break over pages
COLUMNS = [
    *("table", "task", "row", "sparsity", "metric", "unit", "mean", "sd", "n", "seeds", "undefined", "warnings"),
    *("within_one_sd", "match_or_exceed"),
    *("published_mean", "published_sd", "published_sparsity"),
    *("reference", "difference", "interval_low", "interval_high", "pairs", "p_holm", "published_difference", "verdict"),
    *("runs", "levels", "masks"),
]
FORMULA = r"$f(x, m_{\mathrm{IMP}} \odot \theta_0)$"
MARKS = re.compile(r"([\\|<\[\]#~]|(?<!\S )\*|\*(?! \S)|\b_|_\b)")  # not the star between words, the underscore within one
SIGNS = {"theta_0": r"\theta_0", ">=": r"\ge", "+": "+", "-": "-"}
LATEX = {c: f"\\{c}" for c in "%_&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "*": "$*$",
    '"': "''",
}


@dataclass(frozen=True)
class Panel:
    """A grid of texts. The first `words` columns are words, as is one headed `verdict`; the others are numbers."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    words: int


@dataclass(frozen=True)
class Table:
    """What is printed of it: panels, notes, what is missing. What is kept of it: its entries."""

    number: str
    title: str
    panels: Sequence[Panel]
    entries: Sequence[Entry]
    notes: Sequence[str] = ()
    missing: Sequence[str] = field(default=())


# ---- an entry in words ----


def score(entry: Entry) -> str:
    """Mean, standard deviation and number of seeds; and what is not as it should be."""
    summary = entry.summary
    if not entry.runs:
        return MISSING
    seeds = f"{summary.n} of {len(entry.seeds)}" if summary.n < len(entry.seeds) else str(summary.n)
    warnings = [f"{len(summary.undefined)} undefined"] * bool(summary.undefined) + ["all equal"] * summary.constant
    warnings += ["doubted"] * bool(entry.warnings)
    if summary.mean is None:
        return f"undefined: constant predictions or labels ({seeds})"
    deviation = "" if summary.sd is None else f" ± {summary.sd:.1f}"
    return f"{summary.mean:.1f}{deviation} ({', '.join([seeds, *warnings])})"


def signed(value: float | None, digits: int = 1) -> str:
    """A difference in points; one that is rounded to nothing has no sign."""
    if value is None:
        return ""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def against(entry: Entry) -> list[str]:
    """A line of a panel of tests."""
    found = entry.difference
    interval = "" if found is None or found.low is None else f"{signed(found.low)} to {signed(found.high)}"
    seeds = "" if found is None else str(len(found.seeds)) + (f" ({len(found.alone)} unpaired)" if found.alone else "")
    name, difference = published.name(entry.task), signed(found.mean if found else None)
    return [name, entry.row, percent(entry.sparsity), score(entry), difference, interval or "none", seeds or "0", entry.verdict]


def sources(tables: Sequence[Table]) -> Panel:
    """Where each number of these tables comes from: a line a run of it, with its level and its mask's hash."""
    found: dict[tuple[str, ...], None] = {}  # lines, each once: an entry may stand in several tables
    for entry in (entry for table in tables for entry in table.entries):
        for record in entry.records:
            value = "undefined" if record.value is None else f"{UNIT * record.value:.4f}"
            words = [published.name(entry.task), entry.row, percent(entry.sparsity), str(record.seed), value]
            found[(*words, str(record.run), str(record.level), record.mask_sha256)] = None
    return Panel(
        "Where these numbers come from",
        ["task", "row", "sparsity", "seed", "value", "run (python -m bert_tickets.runs.verify RUN)", "level", "mask sha256"],
        list(found),
        words=8,
    )


# ---- the formats ----


def markdown(tables: Sequence[Table], *, traced: bool = False) -> str:
    """Tables as GitHub renders them, what they share after the last; then, if `traced`, where their numbers come from."""
    shared = [note for note in tables[0].notes if all(note in table.notes for table in tables)] if len(tables) > 1 else []
    blocks = []
    for table in tables:
        blocks.append(f"## {_md(table.title)}")
        for panel in table.panels:
            if panel.lines:
                blocks += [f"**{_md(panel.title)}**"] * bool(panel.title)
                blocks.append(_md_grid(panel))
        blocks.append(_md_list([note for note in table.notes if note not in shared]))
    missing = list(dict.fromkeys(line for table in tables for line in table.missing))
    blocks += ["## In all these tables", _md_list(shared)] if shared else []
    blocks += ["## What is missing", _md_list(missing)] if missing else []
    if traced:
        blocks += [f"## {(found := sources(tables)).title}", _md_grid(found)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _md_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_md(line)}" for line in lines)


def _md_grid(panel: Panel) -> str:
    rows = [[_md(cell) for cell in line] for line in [panel.header, *panel.lines]]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(panel.header))]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, _right(panel), strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [rows[0], rule, *rows[1:]]]
    return "\n".join(f"| {line} |" for line in lines)


def _right(panel: Panel) -> list[bool]:
    last = len(panel.header) - 1
    return [panel.words <= i and not (i == last and panel.header[i] == "verdict") for i in range(last + 1)]


def _md(text: str) -> str:
    """Text with what Markdown would read as its own escaped, but for what stands between backticks."""
    parts = text.split("`")
    return "`".join(part if i % 2 else MARKS.sub(r"\\\1", part) for i, part in enumerate(parts))


def latex(tables: Sequence[Table], *, traced: bool = False) -> str:
    r"""Tables for `\input`, with booktabs. What is missing is a comment: the cells say it already; so, if `traced`, is where the
    numbers come from."""
    found = sources(tables)
    lines = [f"{found.title}:", *map(", ".join, [found.header, *found.lines])] if traced else []
    comments = "".join(f"% {' '.join(line.split())}\n" for line in lines)
    return "% needs \\usepackage{booktabs,adjustbox,longtable}\n" + "\n".join(map(_latex_table, tables)) + comments


def _latex_table(table: Table) -> str:
    panels = [panel for panel in table.panels if panel.lines]
    floats, long = ([p for p in panels if (len(p.lines) > LONG) is wanted] for wanted in (False, True))
    notes = "\\par\\smallskip\n{\\footnotesize\\raggedright " + "\\\\\n".join(map(_tex, table.notes)) + "\\par}"
    body = [r"\begin{table}[htbp]", r"\centering", rf"\caption{{{_tex(table.title)}}}"]
    for panel in floats:
        body += [rf"\par\smallskip {{\small {_tex(panel.title)}}}\par"] * bool(panel.title)
        body += [r"\begin{adjustbox}{max width=\textwidth}", _tabular(panel, "tabular"), r"\end{adjustbox}"]
    body += [notes, r"\end{table}"]
    for panel in long:
        body += [rf"\par\noindent {_tex(panel.title or table.title)}\par", "{\\tiny", _tabular(panel, "longtable"), "}"]
    comments = [f"% missing: {line}" for text in table.missing for line in text.splitlines()]
    return "\n".join([*body, *comments]) + "\n"


def _tabular(panel: Panel, environment: str) -> str:
    columns = "".join("r" if right else "l" for right in _right(panel))
    head, *lines = (" & ".join(map(_tex, line)) + r" \\" for line in [panel.header, *panel.lines])
    top = [r"\toprule", head, r"\midrule", *([r"\endhead"] if environment == "longtable" else [])]
    return "\n".join([rf"\begin{{{environment}}}{{{columns}}}", *top, *lines, r"\bottomrule", rf"\end{{{environment}}}"])


def _tex(text: str) -> str:
    """Text as LaTeX prints it: its special characters escaped, formulas and signs in mathematics."""
    pieces = []
    for part in re.split(rf"({re.escape(TICKET)}|theta_0|>=|(?<![\w)])[+-](?=\d)|(?<= )-(?= ))", text):
        if part == TICKET:
            pieces.append(FORMULA)
        elif part in SIGNS:
            pieces.append(f"${SIGNS[part]}$")
        else:
            pieces.append("".join(LATEX.get(c, c) for c in part.replace("`", "")))
    return "".join(pieces)


def tidy(tables: Sequence[Table]) -> str:
    """CSV in full precision, an entry a line: from a number back to its runs, their levels and masks, separated by semicolons."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        writer.writerows({"table": table.number} | _facts(entry) for entry in table.entries)
    return text.getvalue()


def _facts(entry: Entry) -> dict[str, object]:
    found, summary = entry.difference, entry.summary
    return {
        "task": entry.task,
        "row": entry.row,
        "sparsity": entry.sparsity,
        "metric": entry.metric,
        "unit": "x 100",
        "mean": summary.mean,
        "sd": summary.sd,
        "n": summary.n,
        "seeds": _join(summary.values),
        "undefined": _join(summary.undefined),
        "warnings": "; ".join(entry.warnings),
        "within_one_sd": entry.within,
        "match_or_exceed": entry.exceeds,
        "published_mean": entry.published and entry.published.mean,
        "published_sd": entry.published and entry.published.sd,
        "published_sparsity": entry.published_sparsity,
        "reference": entry.reference,
        "difference": found and found.mean,
        "interval_low": found and found.low,
        "interval_high": found and found.high,
        "pairs": found and len(found.seeds),
        "p_holm": entry.corrected,
        "published_difference": entry.published_difference,
        "verdict": entry.verdict or (MISSING if not entry.runs else "undefined" if summary.mean is None else ""),
        "runs": _join(entry.runs),
        "levels": _join(record.level for record in entry.records),
        "masks": _join(record.mask_sha256 for record in entry.records),
    }


def _join(values: object) -> str:
    return ";".join(map(str, values))  # type: ignore[call-overload]
