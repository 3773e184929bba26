"""Export a level of a run as a Hugging Face folder that plain transformers opens, with its mask and a model card.

  python scripts/export.py runs/mnli-imp-s57-1a2b3c4d mnli-70 --level 7
  python scripts/export.py runs/mnli-imp-s57-1a2b3c4d mnli-70-ticket --level 7 --untrained
  python scripts/export.py runs/mnli-transfer-s57-1a2b3c4d mnli-slim --onnx      # of a mask of heads, MLPs or neurons

The folder holds the trained subnetwork, with the metric of the run; with --untrained the weights that the level started from.
With --onnx it also holds model.onnx, the network without the heads and neurons that the mask prunes whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("output", type=Path, metavar="DIR", help="the folder to write; must not exist, or be empty")
    parser.add_argument("--level", type=int, metavar="N", help="the level (default: the newest)")
    parser.add_argument("--untrained", action="store_true", help="the weights that the level started from, not the trained ones")
    parser.add_argument("--model", metavar="TEXT", help="the run's base model, if it was moved")
    words = "also write model.onnx, without the pruned heads and neurons; needs pip install -e '.[onnx]'"
    parser.add_argument("--onnx", action="store_true", help=words)
    return parser.parse_args(normalize_argv(argv))


def main(args: argparse.Namespace) -> None:
    from bert_tickets.export.export import export
    from bert_tickets.export.model_card import KINDS

    ticket = export(args.run, args.output, args.level, untrained=args.untrained, model=args.model, onnx=args.onnx)
    weights = "the weights that it started from" if args.untrained or ticket.is_search else "its weights"
    print(f"{args.output}: level {ticket.level} of {ticket.run}, {weights}, {ticket.mask.sparsity:.1%} pruned")
    print(f"open it with transformers.{KINDS[ticket.cfg.kind]['opener']}.from_pretrained({str(args.output)!r})")
    if args.onnx:
        slim, dense = (args.output / name for name in ("model.onnx", "model.safetensors"))
        sizes = f"{slim.stat().st_size / 1e6:.3g} MB, {dense.name} with its zeros {dense.stat().st_size / 1e6:.3g} MB"
        print(f"{slim}: without the pruned heads and neurons, equal to torch in onnxruntime, {sizes}")


if __name__ == "__main__":
    run_command(main, parse())
