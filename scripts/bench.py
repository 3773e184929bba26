"""Measure training speed on this machine, in comparison with a port of the released loop. Quote the ratios.

  python scripts/bench.py --model DIR --data-dir glue --tasks cola sst2 mnli rte
  python scripts/bench.py --model random --tasks mlm squad --batch-size 16         # BERT-base of random weights, random tokens
  python scripts/bench.py --model DIR --data-dir glue --tasks mnli --profile       # time of a step by kernel or operator
  python scripts/bench.py --model random --tasks mlm --mask-training               # mask training, beside training of weights
  python scripts/bench.py --model DIR --data-dir glue --tasks mnli --importance    # a pass of the search, beside an evaluation
  python scripts/bench.py --model random --tasks mnli --slim 4,0.4                 # 4 heads and 40 % of the neurons a layer gone
  python scripts/bench.py --model DIR --data-dir glue --tasks sst2 --slim runs/sst2-importance-s42-*/level_01/mask.safetensors
  python scripts/bench.py --onnx mnli-slim                                         # an exported ticket as ONNX: dense, slim

All sides train the same network at the same sparsity on the same examples, in turns of a few steps; figures are medians over the
turns. FLOPs are counted on real tokens only, and compared with the machine's rate for a large matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.config import GLUE, Config, kind_of, preset_values
from bert_tickets.errors import UserError
from bert_tickets.files import write

if TYPE_CHECKING:
    from bert_tickets.bench.measure import Figures

SETTINGS = ("model", "data_dir", "batch_size", "max_length", "precision", "device")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "mnli", "rte"], metavar="TASK")
    parser.add_argument("--model", metavar="TEXT", default=Config.model, help="a BERT checkpoint, or random for BERT-base")
    parser.add_argument("--data-dir", metavar="DIR", help="real texts in GLUE's layout; otherwise tokens are random")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--max-length", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="X", help="of all sides (default: 0.5)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="turns of each side (default: 5)")
    parser.add_argument("--turn-steps", type=int, metavar="N", help="steps a turn (default: 4; on a GPU 16)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp16", "bf16", "fp32"), help="(default: auto)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="(default: auto)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--profile", action="store_true", help="measure the time of a step by kernel or operator instead")
    instead.add_argument("--mask-training", action="store_true", help="measure --method mask-training instead, by each objective")
    words = "measure a pass of --method importance instead, beside an evaluation"
    instead.add_argument("--importance", action="store_true", help=words)
    words = "measure the network without HEADS heads and the fraction NEURONS of each layer, or under a mask: full, masked, slim"
    instead.add_argument("--slim", type=removed_units, metavar="HEADS,NEURONS|FILE", help=words)
    words = "measure ONNX files of an exported ticket of units instead, on the CPU: dense with its zeros, and slim"
    instead.add_argument("--onnx", type=Path, metavar="DIR", help=words)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there, with the machine and the versions")
    args = parser.parse_args(normalize_argv())
    for name in ("turns", "turn_steps", "batch_size", "max_length"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.onnx:
        others = ("tasks", "sparsity", *SETTINGS)
        if idle := [name.replace("_", "-") for name in others if getattr(args, name) != parser.get_default(name)]:
            parser.error(f"--{idle[0]} has no effect with --onnx")
        args.device = "cpu"
    if args.mask_training and args.tasks != ["mlm"]:
        parser.error("--mask-training is for --tasks mlm")
    if (args.slim or args.importance) and args.sparsity != parser.get_default("sparsity"):
        parser.error(f"--sparsity has no effect with --{'slim' if args.slim else 'importance'}")
    if args.importance and not {*args.tasks} <= {*GLUE}:
        parser.error("--importance is for GLUE's tasks")
    if not 0 <= args.sparsity < 1:
        parser.error(f"--sparsity {args.sparsity}: must be at least 0 and below 1")
    return args


def removed_units(text: str) -> tuple[int, float] | Path:
    """Read the value of --slim: 4,0.4, or a mask file."""
    if Path(text).is_file():
        return Path(text)
    heads, neurons = text.split(",")
    if int(heads) < 0 or not 0 <= float(neurons) <= 1 or not (int(heads) or float(neurons)):
        raise argparse.ArgumentTypeError(f"{text}: give a number of heads and a fraction of neurons, not both 0, as in 4,0.4")
    return int(heads), float(neurons)


def measure_task(name: str, args: argparse.Namespace) -> Figures:
    """Measure one task."""
    import torch

    from bert_tickets.bench import measure
    from bert_tickets.bench.baselines import FULL_LENGTH, LENGTHS, make_case

    known = (*LENGTHS, *FULL_LENGTH)
    if args.data_dir is None and name not in known:
        raise UserError(f"no lengths for {name!r}: give --data-dir, or tasks of {', '.join(known)}")
    given: dict[str, Any] = {field: getattr(args, field) for field in SETTINGS}
    batch_size = args.batch_size or preset_values(Config.method, kind_of(name), Config.protocol)["batch_size"]
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    turn_steps = args.turn_steps or (16 if on_gpu else 4)  # a turn begins with an idle device
    given["limit_train"] = batch_size * turn_steps * (args.turns + 1)
    function = measure.profile if args.profile else measure.compare_mask_training if args.mask_training else measure.compare
    if args.importance:
        function = measure.compare_importance
    if args.slim:
        function = partial(measure.compare_slim, args.slim)
    return function(make_case(name, given, args.sparsity), args.turns, turn_steps)


def measure_onnx(args: argparse.Namespace) -> Figures:
    """Measure an exported ticket as ONNX files, with its zeros and without what they stand for."""
    from bert_tickets.bench.onnx_speed import compare_onnx
    from bert_tickets.export.load import load
    from bert_tickets.export.trainer import load_ticket

    return compare_onnx({"dense": load_ticket(args.onnx)[0], "slim": load(args.onnx)}, args.turns, args.turn_steps or 4)


def main(args: argparse.Namespace) -> None:
    import pandas as pd
    import torch

    from bert_tickets.bench.tiny_bert import save_bert
    from bert_tickets.runs.provenance import environment

    arguments = dict(vars(args))
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "random":
            save_bert(Path(folder))
            args.model = folder
        if args.onnx:
            columns = {args.onnx.absolute().name: measure_onnx(args)}
        else:
            columns = {name: measure_task(name, args) for name in args.tasks}
    print(pd.DataFrame(columns).to_string(float_format="{:.4g}".format, na_rep=""))
    machine: dict[str, Any] = environment("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    machine |= {"cuda": torch.version.cuda, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    names = ["torch", *["onnxruntime"] * bool(args.onnx)]
    machine["versions"] |= {name: version(name) for name in names[1:]}
    named = ", ".join(f"{name} {machine['versions'][name]}" for name in names)
    print(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {named}")
    if args.json:
        figures = {"machine": machine, "arguments": arguments, "figures": columns}
        write(Path(args.json), json.dumps(figures, indent=1, default=str).encode() + b"\n")


if __name__ == "__main__":
    run_command(main, parse())
