"""Derive a ticket from tickets: a random or bad one of the same size, what several seeds have in common, set operations.

  python scripts/derive.py random runs/mnli-importance-s42-*/level_01/mask.safetensors --seed 1 --output masks/random.safetensors
  python scripts/derive.py bad runs/mnli-importance-s42-*/level_01/mask.safetensors --output masks/bad.safetensors
  python scripts/derive.py super runs/mnli-importance-s*/level_01/mask.safetensors --output masks/super.safetensors

Takes mask files. Of heads, MLPs and neurons each kind is derived by itself, with its exact size; of weights all tensors together.
Kinds of one mask:
  random        as many units as it keeps, drawn uniformly
  bad           as many of the pruned units, completed with kept ones if these are short; of weights, those of the smallest
                magnitude in --weights
  resize        the size of --like: units are dropped at random, or drawn from the others
  complement    all that it prunes
Kinds of several masks, such as those of the seeds of a task, in any order:
  super         what all keep
  super-bad     what all prune, resized to the size of super; the same for every seed
  super-random  what is in neither of these, resized likewise
  intersection  what all keep
  union         what any keeps
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.config import Training
from bert_tickets.content import fingerprint
from bert_tickets.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.prune import Scope

OF_ONE, OF_SEVERAL = ("random", "bad", "resize", "complement"), ("super", "super-bad", "super-random", "intersection", "union")
DRAWN = ("random", "bad", "resize", "super-random")  # by the seed
WORDS = {"mlps": "MLPs"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("kind", choices=(*OF_ONE, *OF_SEVERAL), metavar="KIND", help="one of the kinds above")
    parser.add_argument("masks", nargs="+", type=Path, metavar="MASK", help="the mask files (a released mask.pt too)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the mask file to write")
    parser.add_argument("--seed", type=int, metavar="N", help=f"of the draw (default: {Training.seed})")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="bad of weights: a safetensors file of the weights to rank")
    parser.add_argument("--like", type=Path, metavar="MASK", help="resize: the mask of the size")
    sizes = "random: as many as it keeps, or each unit with that probability, as in the released code (default: exact)"
    parser.add_argument("--random-size", choices=("exact", "binomial"), help=sizes)
    args = parser.parse_args(normalize_argv(argv))
    if (len(args.masks) > 1) != (args.kind in OF_SEVERAL):
        needed = "one mask" if args.kind in OF_ONE else "several masks"
        parser.error(f"{args.kind} takes {needed}, and {len(args.masks)} {'was' if len(args.masks) == 1 else 'were'} given")
    kinds = {"seed": DRAWN, "weights": ("bad",), "like": ("resize",), "random_size": ("random",)}  # that a flag has an effect on
    for name, of in kinds.items():
        if getattr(args, name) is not None and args.kind not in of:
            parser.error(f"--{name.replace('_', '-')} has no effect on {args.kind}, only on {', '.join(of)}")
    if args.kind == "resize" and args.like is None:
        parser.error("resize needs --like, a mask of the size")
    if not 0 <= (args.seed or 0) < 2**32:
        parser.error(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    if realpath(args.output) in [realpath(path) for path in (*args.masks, args.like, args.weights) if path]:
        parser.error(f"--output {args.output} is one of the files to read")
    return args


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings for the metadata of the file. Files are named by their content."""
    found: dict[str, Any] = {"derived": args.kind, "masks": [fingerprint(str(path)) for path in args.masks]}
    found |= {name: fingerprint(str(path)) for name in ("weights", "like") if (path := getattr(args, name))}
    found |= {"random_size": "binomial"} if args.random_size == "binomial" else {}
    return found | ({} if (seed := seed_of(args)) is None else {"seed": seed})


def seed_of(args: argparse.Namespace) -> int | None:
    """Return the seed of the draw; None for a kind that draws nothing, as weights of the smallest magnitude."""
    return Training.seed if args.seed is None and args.kind in DRAWN and args.weights is None else args.seed


def main(args: argparse.Namespace) -> None:
    from bert_tickets.masking.derive import derive
    from bert_tickets.masking.mask import Mask
    from bert_tickets.modeling.units import HEAD_OUTPUT, lower, read_units

    paths = [*args.masks, *([args.like] if args.like else [])]
    given = [Mask.load(path) for path in paths]
    check_alike(paths, given)
    of_units = "units" in given[0].info
    scope: Scope = "tensor" if of_units else "global"
    weights = ranked_weights(args, given[0], of_units)
    inputs = [read_units(mask) if of_units else mask for mask in given]
    like = inputs.pop() if args.like else None
    found = derive(args.kind, inputs, seed_of(args), scope, like=like, weights=weights, binomial=args.random_size == "binomial")
    ticket = found
    if of_units:
        covers_bias = any(name.endswith(f"{HEAD_OUTPUT}.bias") for name in given[0])
        ticket = lower(found, given[0], "drop" if covers_bias else "keep")
    ticket.write(args.output, **facts(args))
    parts = [f"{args.output}: keeps {sizes(found, scope)}"]
    parts += [f"shares {sizes(found & mask, scope, of=False)} with {path}" for path, mask in zip(args.masks, inputs, strict=True)]
    print(("; " if len(inputs) == 1 else "\n  ").join(parts))


def check_alike(paths: Sequence[Path], masks: Sequence[Mask]) -> None:
    """Raise `UserError`, naming two files, unless all masks cover the same tensors and are of the same kinds of units."""
    for path, mask in zip(paths, masks, strict=True):
        try:
            masks[0].check_fits(mask, "the other mask")
        except UserError as error:
            raise UserError(f"{paths[0]} and {path} do not fit: {error}") from None
        if covers(mask) != covers(masks[0]):
            raise UserError(f"{paths[0]} and {path} do not fit: one is a mask of {covers(masks[0])}, the other of {covers(mask)}")


def covers(mask: Mask) -> str:
    """Return what a mask is of: weights, or kinds of units."""
    heads = f" ({mask.info['heads']} heads a layer)" if "heads" in mask.info else ""
    return mask.info.get("units", "weights") + heads


def ranked_weights(args: argparse.Namespace, mask: Mask, of_units: bool) -> Mapping[str, Tensor] | None:
    """Read the weights whose magnitude chooses a bad ticket of weights; None for any other ticket.

    Raises `UserError` if they are not given, or do not fit the mask, and for a flag without effect.
    """
    if args.kind != "bad" or of_units:
        if args.weights:
            raise UserError(f"--weights has no effect: {args.masks[0]} is a mask of {covers(mask)}, whose bad ticket is drawn")
        return None
    if args.weights is None:
        raise UserError(f"{args.masks[0]} is a mask of weights, whose bad ticket is chosen by magnitude: give --weights")
    if args.seed is not None:
        raise UserError(f"--seed has no effect: {args.masks[0]} is a mask of weights, whose bad ticket is chosen by magnitude")
    from bert_tickets.export.sparsity import covered
    from bert_tickets.modeling.weights import check_tensors, read_file

    found = covered(read_file(args.weights), mask, str(args.weights))
    check_tensors(found, {name: kept.shape for name, kept in mask.items()}, args.weights)
    return found


def sizes(mask: Mask, scope: Scope, *, of: bool = True) -> str:
    """Format the numbers of kept units, with `of` also that of all."""
    from bert_tickets.masking.derive import kept
    from bert_tickets.masking.mask import Mask

    numbers, totals = kept(mask, scope), kept(Mask.ones(mask), scope)
    return " and ".join(
        f"{number:,}" + f" of {totals[name]:,}" * of + f" {WORDS.get(name, name)}" for name, number in numbers.items()
    )


if __name__ == "__main__":
    run_command(main, parse())
