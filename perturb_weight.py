"""Perturb pre-trained BERT: write weights that the other scripts take by --init, to see what of a ticket was theta_0.

python perturb_weight.py --shuffle entries --output weights/shuffled.safetensors
python lt_glue.py --task rte --mask mask.safetensors --init weights/shuffled.safetensors
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert_tickets.cli import hyphens, run_command
from bert_tickets.config import Config, Training

SHUFFLES = "entries: within each matrix (theta_0''); layers: whole; matrices: by layer without biases and LayerNorms, as released"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--shuffle", choices=("layers", "matrices", "entries"), help=SHUFFLES)
    how.add_argument("--noise", type=float, metavar="SIGMA", help="normal noise on the matrices, in units of their spread")
    parser.add_argument("--output", required=True, metavar="FILE", help="the safetensors file to write: the encoder's weights")
    parser.add_argument("--model", default=Config.model, metavar="TEXT", help="a BERT checkpoint (default: bert-base-uncased)")
    parser.add_argument("--seed", type=int, default=Training.seed, metavar="N", help="fixes what is drawn (default: 57)")
    args = parser.parse_args(hyphens(argv))
    if args.noise is not None and not 0 < args.noise < math.inf:
        parser.error(f"--noise {args.noise}: a number above 0 is needed")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: a whole number from 0 to 2^32 - 1 is needed")
    if Path(args.output).parent.resolve() == Path(args.model).resolve():
        parser.error(f"--output {args.output}: a checkpoint stays as it is; give a place outside of the folder {args.model}")
    return args


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the file says of how its weights were asked for, beside what was drawn and measured."""
    return {"how": args.shuffle or "noise", "sigma": args.noise, "model": args.model, "seed": args.seed}


def main(args: argparse.Namespace) -> None:
    from bert_tickets.files import write_tensors
    from bert_tickets.methods.perturb import perturb
    from bert_tickets.modeling.loading import encoder_weights, load_bert

    net, _ = load_bert(args.model, "classifier", "pretrained", args.seed)
    weights, drawn = perturb(encoder_weights(net), args.shuffle or "noise", args.noise, args.seed)
    write_tensors(Path(args.output), weights, {**drawn, **facts(args)})
    print(f"{args.output}: {args.model} with {drawn['perturbed']}")


if __name__ == "__main__":
    run_command(main, parse())
