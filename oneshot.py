"""Make a ticket without training: prune pre-trained (or random) BERT once, by magnitude or at random.

python oneshot.py --rate 0.5 --output masks/oneshot_50.safetensors
python oneshot.py --rate 0.5 --method random --seed 1 --output masks/random_50.safetensors
"""

import argparse
from collections.abc import Sequence

from bert_tickets.cli import hyphens, run_command
from bert_tickets.config import Config, Training


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, required=True, metavar="X", help="share of the weights to remove")
    parser.add_argument("--output", required=True, metavar="FILE", help="the mask file to write")
    parser.add_argument("--method", choices=("magnitude", "random"), default="magnitude", help="(default: magnitude)")
    scope = "rank all matrices together, or each by itself (default: global)"
    parser.add_argument("--scope", choices=("global", "tensor"), default="global", help=scope)
    parser.add_argument("--model", default=Config.model, metavar="TEXT", help="a BERT checkpoint (default: bert-base-uncased)")
    parser.add_argument("--init", default="pretrained", metavar="TEXT", help="pretrained, random, or a file of weights to rank")
    parser.add_argument("--seed", type=int, default=Training.seed, metavar="N", help="of random masks and weights (default: 57)")
    args = parser.parse_args(hyphens(argv))
    if not 0 < args.rate < 1:
        parser.error(f"--rate {args.rate}: a share between 0 and 1 is needed")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: a whole number from 0 to 2^32 - 1 is needed")
    return args


def facts(args: argparse.Namespace) -> dict[str, str]:
    """What the file says of how its mask was made; the share removed is its density."""
    method = f"oneshot {args.method}" + " by tensor" * (args.scope == "tensor")
    return {"base_model": args.model, "method": method, "init": args.init, "seed": str(args.seed)}


def main(args: argparse.Namespace) -> None:
    from bert_tickets.methods.oneshot import oneshot
    from bert_tickets.modeling.loading import load_bert

    net, _ = load_bert(args.model, "classifier", args.init, args.seed)
    mask = oneshot(net, args.rate, args.method, args.seed, args.scope)
    mask.write(args.output, **facts(args))
    print(f"{args.output}: {mask.sparsity:.1%} of {mask.total:,} weights removed by {args.method}")


if __name__ == "__main__":
    run_command(main, parse())
