"""Make a mask without training: prune pre-trained (or random) BERT once, by magnitude or at random.

python oneshot.py --rate 0.5 --output masks/oneshot_50.safetensors
python oneshot.py --rate 0.5 --method random --seed 1 --output masks/random_50.safetensors
"""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.config import Config, Prunable, Training
from bert_tickets.content import fingerprint, of_init


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--rate", type=float, required=True, metavar="X", help="fraction of the weights to prune")
    parser.add_argument("--output", required=True, metavar="FILE", help="the mask file to write")
    parser.add_argument("--method", choices=("magnitude", "random"), default="magnitude", help="(default: magnitude)")
    scope = "rank all weights together, or each matrix by itself (default: global)"
    parser.add_argument("--scope", choices=("global", "tensor"), default="global", help=scope)
    covered = "which parameters the mask covers (default: matrices)"
    parser.add_argument("--prunable", choices=get_args(Prunable), default="matrices", help=covered)
    parser.add_argument("--model", default=Config.model, metavar="TEXT", help=f"a BERT checkpoint (default: {Config.model})")
    parser.add_argument(
        "--init", default="pretrained", metavar="TEXT", help="rank pretrained or random weights, or those of a file"
    )
    parser.add_argument("--seed", type=int, default=Training.seed, metavar="N", help="of random masks and weights (default: 57)")
    args = parser.parse_args(normalize_argv(argv))
    if not 0 < args.rate < 1:
        parser.error(f"--rate {args.rate}: must be between 0 and 1")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    return args


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for the metadata of the mask file, with fingerprints of folders and files."""
    method = f"oneshot {args.method}" + " by tensor" * (args.scope == "tensor")
    found = {"base_model": fingerprint(args.model), "method": method, "init": of_init(args.init)}
    found |= {"rate": args.rate, "seed": args.seed}
    return found | ({"prunable": args.prunable} if args.prunable != "matrices" else {})


def main(args: argparse.Namespace) -> None:
    from bert_tickets.methods.oneshot import oneshot
    from bert_tickets.modeling.loading import load_bert

    net, _ = load_bert(args.model, "classifier", args.init, args.seed)
    mask = oneshot(net, args.rate, args.method, args.seed, args.scope, args.prunable)
    mask.write(args.output, **facts(args))
    how = "at random" if args.method == "random" else "by magnitude"
    print(f"{args.output}: {mask.sparsity:.1%} of {mask.total:,} weights pruned {how}")


if __name__ == "__main__":
    run_command(main, parse())
