"""Export a level of a run as a Hugging Face folder that plain transformers opens, with its mask and a model card.

  python scripts/export.py runs/mnli-imp-s57-1a2b3c4d mnli-70 --level 7
  python scripts/export.py runs/mnli-imp-s57-1a2b3c4d mnli-70-ticket --level 7 --untrained

The folder holds the trained subnetwork, with the metric of the run; with --untrained the weights that the level started from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bert_tickets.cli import FORMATTER, normalize_argv, run_command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("output", type=Path, metavar="DIR", help="the folder to write; must not exist, or be empty")
    parser.add_argument("--level", type=int, metavar="N", help="the level (default: the newest)")
    parser.add_argument("--untrained", action="store_true", help="the weights that the level started from, not the trained ones")
    parser.add_argument("--model", metavar="TEXT", help="the run's base model, if it was moved")
    return parser.parse_args(normalize_argv(argv))


def main(args: argparse.Namespace) -> None:
    from bert_tickets.export.export import export
    from bert_tickets.export.model_card import KINDS

    ticket = export(args.run, args.output, args.level, untrained=args.untrained, model=args.model)
    weights = "the weights that it started from" if args.untrained else "its trained weights"
    print(f"{args.output}: level {ticket.level} of {ticket.run}, {weights}, {ticket.mask.sparsity:.1%} pruned")
    print(f"open it with transformers.{KINDS[ticket.cfg.kind]['opener']}.from_pretrained({str(args.output)!r})")


if __name__ == "__main__":
    run_command(main, parse())
