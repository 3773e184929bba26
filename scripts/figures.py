"""Draw the papers' figures over run directories, and print the table behind each.

  python scripts/figures.py curves runs --output curves.svg                           # metric over sparsity, a panel per task
  python scripts/figures.py curves runs/sst2-* --title "SST-2" --output sst2.png
  python scripts/figures.py transfer runs --sparsity 70 --output transfer.pdf         # tickets trained on other tasks
  python scripts/figures.py transfer runs --sparsity 70 --relative same-task --output transfer.pdf
  python scripts/figures.py overlap runs --sparsity 70 --output overlap.png           # mask overlap between tasks and seeds
  python scripts/figures.py examples runs --output examples.png                       # metric over training examples
  python scripts/figures.py densities runs --sparsity 70 --output densities.png       # kept weights by layer and kind of matrix
  python scripts/figures.py distance runs_tamt --output distance.png                  # how far mask training moved its masks
  python scripts/figures.py losses runs_tamt --output losses.png                      # scores over losses without training
  python scripts/figures.py survival runs_importance --output survival.png            # heads and MLPs that seeds keep
  python scripts/figures.py survival runs_importance --method "importance (units heads)" --output heads.png
  python scripts/figures.py distances runs_earlybert --output distances.png           # EarlyBERT: masks of all pairs of steps
  python scripts/figures.py tradeoff runs_earlybert --output tradeoff.png             # EarlyBERT: scores over the time saved

Takes run directories, or folders that hold them. Runs that differ only in their seed are one line or cell: their mean, with the
standard deviation of single runs. Masks outside of run directories: scripts/compare.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.errors import UserError
from bert_tickets.report.pictures import picture_file

FIGURES = {
    "curves": "the metric over sparsity, a panel per task",
    "transfer": "the scores of all tickets on all tasks, as differences to the dense network",
    "overlap": "the mask overlap between the tickets of different tasks, and of different seeds",
    "examples": "the metric over the number of training examples (--limit-train), a panel per task",
    "densities": "the weights kept in each layer, by kind of matrix",
    "distance": "the distance of masks in mask training from their initial masks over steps, a panel per sparsity",
    "losses": "the scores of tickets over their losses without training (--score), a panel per task and loss",
    "survival": "the heads and MLPs that a search by importance or magnitude keeps, a panel per task",
    "distances": "the distances between the masks of all pairs of steps of EarlyBERT's searches, a row of panels per task",
    "tradeoff": "the scores of EarlyBERT's tickets over the time saved, a panel per task",
}
OF_TAMT = ("distance", "losses")  # drawn by report/tamt_figures.py
OF_EARLYBERT = ("distances", "tradeoff")  # drawn by report/earlybert_figures.py
CHOOSING = ("examples", "distances", *OF_TAMT)  # figures that choose comparable levels themselves


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, words in FIGURES.items():
        figure = figures.add_parser(name, help=words, description=f"Draw {words}.")
        figure.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold them")
        figure.add_argument("--output", type=picture_file, required=True, metavar="FILE", help="a .png, .svg or .pdf file")
        figure.add_argument("--tasks", metavar="TASKS", help='only these, such as "cola mnli"')
        figure.add_argument("--setting", metavar="WORDS", help="of runs with several settings, those with these words")
        figure.add_argument("--title", metavar="TEXT", help="the picture's title")
        if name in ("transfer", "overlap", "densities"):
            figure.add_argument("--sparsity", type=float, required=True, metavar="PERCENT", help="pruned weights")
        if name == "survival":
            search = 'the search, as rows name it, such as "importance (units heads)", guarded-magnitude (default: importance)'
            figure.add_argument("--method", metavar="NAME", default="importance", help=search)
        if name == "transfer":
            relative = "difference to the full BERT or to the target's own ticket (default: dense)"
            figure.add_argument("--relative", choices=("dense", "same-task"), default="dense", help=relative)
    return parser.parse_args(normalize_argv(argv))


def main(args: argparse.Namespace) -> None:
    from bert_tickets.report import earlybert_figures, figures, survival, tamt_figures
    from bert_tickets.report.results import comparable, of_tasks, read_results

    levels, failures = read_results(args.runs, args.setting)
    levels = of_tasks(levels, args.tasks)
    if args.figure not in CHOOSING:
        levels = comparable(levels)
    if levels.empty:
        raise UserError("no finished level" + (f" with the setting {args.setting!r}" if args.setting is not None else ""))
    modules = dict.fromkeys(OF_TAMT, tamt_figures) | dict.fromkeys(OF_EARLYBERT, earlybert_figures) | {"survival": survival}
    module = modules.get(args.figure, figures)
    draw = getattr(module, f"draw_{args.figure}")
    more = {"sparsity": args.sparsity / 100} if "sparsity" in args else {}
    more |= {"method": args.method} if args.figure == "survival" else {}
    more |= {"relative": args.relative} if args.figure == "transfer" else {}
    print(draw(levels, args.output, args.title, **more))
    for failure in failures:
        print(f"not drawn: {failure}")
    print(f"drawn in {args.output}")


if __name__ == "__main__":
    run_command(main, parse())
