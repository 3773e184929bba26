"""The paper's tables from run directories, its published figures beside them; what is missing is said, with the command for it.

  python scripts/tables.py runs                                 # all tables that there are runs for, as Markdown
  python scripts/tables.py runs --table 2 --format latex --output table2.tex
  python scripts/tables.py runs --table transfer --sparsity 50
  python scripts/tables.py runs --table 2 --sources             # and where each number comes from: runs, levels, masks
  python scripts/tables.py runs --setting "lr 0.0001" --format csv --output tables.csv   # full precision, with the runs' names

Takes run directories, or folders that hold them. Tables:
  2         the highest sparsity with winning tickets; random pruning, random weights, shuffled weights   (table2.sh)
  4         the highest sparsity that matches or exceeds the full BERT                                     (table2.sh)
  3         rewinding to later steps, and standard pruning                                                 (rewinding.sh)
  transfer  Figure 2: every task's ticket on every task                                                    (transfer.sh)
  curves    every task over all sparsities                                                                 (table2.sh)
  weights   the tasks' own tickets from shuffled and noised weights                                        (perturbed.sh)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bert_tickets.cli import hyphens, run_command
from bert_tickets.errors import UserError

if TYPE_CHECKING:
    from bert_tickets.report.cells import Pool
    from bert_tickets.report.layout import Table

TABLES = {  # each with the sweep that makes its runs
    "2": "table2",
    "4": "table2",
    "3": "rewinding",
    "transfer": "transfer",
    "curves": "table2",
    "weights": "perturbed",
}
AT_ONE_SPARSITY = ("3", "transfer")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--table", choices=TABLES, help="one table (default: all that there are runs for)")
    parser.add_argument("--sparsity", type=float, metavar="PERCENT", help="of the weights removed, for tables 3 and transfer")
    parser.add_argument("--setting", metavar="WORDS", help="of runs with several settings those that have these words")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown", help="(default: markdown)")
    parser.add_argument("--sources", action="store_true", help="also of each number its runs, levels and masks (CSV has them)")
    parser.add_argument("--output", metavar="FILE", help="write there instead of to the terminal")
    args = parser.parse_args(hyphens(None))
    if args.sparsity is not None and args.table not in AT_ONE_SPARSITY:
        parser.error(f"--sparsity is of one table: add --table {' or --table '.join(AT_ONE_SPARSITY)}")
    if args.sparsity is not None and not 1 <= args.sparsity < 100:
        parser.error(f"--sparsity {args.sparsity:g}: percent of the weights, from 1 to below 100, are needed")
    if args.sources and args.format == "csv":
        parser.error("--sources: CSV has them in its last columns")
    return args


def main(args: argparse.Namespace) -> None:
    from bert_tickets.files import write
    from bert_tickets.report.cells import choose
    from bert_tickets.report.results import read_failures, read_records, under
    from bert_tickets.runs.summary import layout

    records, failures = read_records(args.runs), read_failures(args.runs)
    if args.setting is not None:
        records, failures = under(records, args.setting), under(failures, args.setting)
        if not records and not failures:
            raise UserError(f"no run has the setting {args.setting!r}")
    pool = choose(records, failures)
    made = {
        name: build(name, pool, None if args.sparsity is None else args.sparsity / 100)
        for name in ([args.table] if args.table else TABLES)
    }
    tables = [table for table in made.values() if table]
    if not tables:
        sweep = TABLES[args.table or "2"]
        what = f"table {args.table}" if args.table else "any table"
        told = "".join(f"\n  {failure}" for failure in failures)
        raise UserError(f"there are no runs here for {what}; they are made by: bash scripts/{sweep}.sh{told}")
    if args.format == "csv":
        text = layout.tidy(tables)
    else:
        text = {"markdown": layout.markdown, "latex": layout.latex}[args.format](tables, traced=args.sources)
    if args.output:
        write(Path(args.output), text.encode(errors="backslashreplace"))
        print(f"written to {args.output}")
    else:
        print(text, end="")


def build(name: str, pool: Pool, sparsity: float | None) -> Table | None:
    """A table; None where there are no runs for it."""
    from bert_tickets.runs.summary import matching as winning
    from bert_tickets.runs.summary import rewinding as variations
    from bert_tickets.runs.summary import transfers

    match name:
        case "2":
            return winning.table2(pool)
        case "4":
            return winning.table4(pool)
        case "3":
            return variations.table3(pool, sparsity)
        case "transfer":
            return transfers.transfer(pool, sparsity)
        case "curves":
            return winning.curves(pool)
        case _:
            return variations.weights(pool)


if __name__ == "__main__":
    run_command(main, parse())
