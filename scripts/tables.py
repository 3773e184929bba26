"""Print the paper's tables over run directories, with the published numbers beside them, and the runs that are missing.

  python scripts/tables.py runs                                 # all tables that there are runs for, as Markdown
  python scripts/tables.py runs --table 2 --format latex --output table2.tex
  python scripts/tables.py runs --table transfer --sparsity 50
  python scripts/tables.py runs --table 2 --sources             # with the run, level and mask of each number
  python scripts/tables.py runs --setting "lr 0.0001" --format csv --output tables.csv   # full precision, with the sources

Takes run directories, or folders that hold them. Tables, and the sweeps (scripts/*.sh) that make their runs:
  2           the highest sparsity with matching tickets; random pruning, random and shuffled weights   table2
  4           the highest sparsity that matches or exceeds the full BERT                                table2
  3           rewinding to later steps, and standard pruning                                            rewinding
  transfer    Figure 2: every ticket on every task                                                      transfer
  curves      all tasks over all sparsities                                                             table2
  weights     tickets trained from shuffled and noised weights                                          perturbed
  tamt        mask training (Liu et al. 2022): tickets found on MLM over sparsities, and their losses   tamt, tamt_cost
  importance  heads and MLPs (Prasanna et al. 2020): good, random, bad and super tickets                importance
  stability   heads and MLPs: the agreement of masks over seeds and tasks                               stability
  earlybert   EarlyBERT (Chen et al. 2021): tickets, time saved, ablations, pre-training                earlybert*
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.errors import UserError
from bert_tickets.files import write

AT_ONE_SPARSITY = ("3", "transfer")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from bert_tickets.report.stability import why_missing
    from bert_tickets.report.tables import TABLES

    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold them")
    parser.add_argument("--table", choices=TABLES, help="one table (default: all that there are runs for)")
    parser.add_argument("--sparsity", type=float, metavar="PERCENT", help="pruned weights, for tables 3 and transfer")
    parser.add_argument("--tasks", metavar="TASKS", help='only these, such as "cola mnli"')
    parser.add_argument("--setting", metavar="WORDS", help="of runs with several settings, those with these words")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown", help="(default: markdown)")
    parser.add_argument("--sources", action="store_true", help="add the run, level and mask of each number (CSV has them)")
    parser.add_argument("--output", metavar="FILE", help="write there instead of to the terminal")
    args = parser.parse_args(normalize_argv(argv))
    if args.sparsity is not None and args.table not in AT_ONE_SPARSITY:
        parser.error(f"--sparsity has an effect only with --table {' or --table '.join(AT_ONE_SPARSITY)}")
    if args.sparsity is not None and not 1 <= args.sparsity < 100:
        parser.error(f"--sparsity {args.sparsity:g}: must be a percentage from 1 to below 100")
    if args.table == "stability" and (missing := why_missing()):
        parser.error(missing)
    if args.sources and args.format == "csv":
        parser.error("--sources has no effect with --format csv, which has the sources in its last columns")
    return args


def main(args: argparse.Namespace) -> None:
    from bert_tickets.report import formats
    from bert_tickets.report.results import comparable, of_tasks, read_results
    from bert_tickets.report.stability import why_missing
    from bert_tickets.report.tables import TABLES, build

    levels, failures = read_results(args.runs, args.setting)
    levels = of_tasks(levels, args.tasks)
    if args.table == "tamt":
        levels = levels[levels["task"] != "mlm"]  # the searches, which may have many settings
    levels = comparable(levels)
    if args.setting is not None and levels.empty and not failures:
        raise UserError(f"no run has the setting {args.setting!r}")
    sparsity = None if args.sparsity is None else args.sparsity / 100
    names = [args.table] if args.table else [name for name in TABLES if name != "stability" or not why_missing()]
    made = [build(name, levels, sparsity, failures) for name in names]
    tables = [table for table in made if table]
    if not tables:
        what, (_, sweep) = f"table {args.table}" if args.table else "any table", TABLES[args.table or "2"]
        raise UserError("\n  ".join([f"no runs for {what}; make them by: bash scripts/{sweep}.sh", *failures]))
    if args.format == "csv":
        text = formats.csv(tables)
    else:
        text = {"markdown": formats.markdown, "latex": formats.latex}[args.format](tables, sources=args.sources)
    if args.output:
        write(Path(args.output), text.encode())
        print(f"written to {args.output}")
    else:
        print(text, end="")


if __name__ == "__main__":
    run_command(main, parse())
