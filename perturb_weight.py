"""Perturb pre-trained BERT: write weights for --init of the training scripts, to test how a ticket depends on theta_0.

python perturb_weight.py --shuffle entries --output weights/shuffled.safetensors
python lt_glue.py --task rte --mask mask.safetensors --init weights/shuffled.safetensors
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.config import Config, Training
from bert_tickets.content import fingerprint

SHUFFLES = (
    "entries: the entries of each matrix (theta_0''); layers: whole layers; "
    "matrices: layers without their biases and LayerNorms, as in the released code"
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--shuffle", choices=("layers", "matrices", "entries"), help=SHUFFLES)
    sigma = "add normal noise to the matrices, SIGMA times their standard deviation"
    how.add_argument("--noise", type=float, metavar="SIGMA", help=sigma)
    parser.add_argument("--output", required=True, metavar="FILE", help="the safetensors file to write: the encoder's weights")
    parser.add_argument("--model", default=Config.model, metavar="TEXT", help=f"a BERT checkpoint (default: {Config.model})")
    parser.add_argument("--seed", type=int, default=Training.seed, metavar="N", help="of the order or the noise (default: 57)")
    args = parser.parse_args(normalize_argv(argv))
    if args.noise is not None and not 0 < args.noise < math.inf:
        parser.error(f"--noise {args.noise}: must be above 0 and finite")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    if Path(args.output).parent.resolve() == Path(args.model).resolve():
        parser.error(f"--output {args.output}: must be outside the checkpoint's folder {args.model}")
    return args


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for the metadata of the file."""
    return {"how": args.shuffle or "noise", "sigma": args.noise, "model": fingerprint(args.model), "seed": args.seed}


def main(args: argparse.Namespace) -> None:
    from bert_tickets.files import write_tensors
    from bert_tickets.methods.perturb import perturb
    from bert_tickets.modeling.loading import load_bert
    from bert_tickets.modeling.parameters import encoder_weights

    net, _ = load_bert(args.model, "classifier", "pretrained", args.seed)
    weights, drawn = perturb(encoder_weights(net), args.shuffle or "noise", args.noise, args.seed)
    write_tensors(Path(args.output), weights, {**drawn, **facts(args)})
    print(f"{args.output}: {args.model} with {drawn['perturbed']}")


if __name__ == "__main__":
    run_command(main, parse())
