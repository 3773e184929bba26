"""Measure training speed on this machine, in comparison with a port of the released loop. Quote the ratios.

  python scripts/bench.py --model DIR --data-dir glue --tasks cola sst2 mnli rte
  python scripts/bench.py --model DIR --data-dir glue --tasks cola rte --levers    # ablation: each speed-up off in turn
  python scripts/bench.py --model DIR --data-dir glue --tasks mnli --profile       # time of a step by kernel or operator
  python scripts/bench.py --model DIR --level                                      # the costs of a level beside its steps
  python scripts/bench.py --model DIR --data-dir glue --tasks rte --alone eager    # one side: its time and peak memory
  python scripts/bench.py --model random --tasks mlm squad --batch-size 16         # BERT-base of random weights, random tokens

All sides train the same network at the same sparsity on the same examples, in turns of a few steps; figures are medians over the
turns. FLOPs are counted on real tokens only, and compared with the machine's rate for a large matrix product.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.cli import FORMATTER, hyphens, run_command
from bert_tickets.config import Config, kind_of, preset_values
from bert_tickets.errors import UserError
from bert_tickets.files import write

if TYPE_CHECKING:
    from bert_tickets.bench.measure import Figures

SETTINGS = ("model", "data_dir", "batch_size", "max_length", "precision", "device")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "mnli", "rte"], metavar="TASK")
    parser.add_argument("--model", metavar="TEXT", default=Config.model, help="a BERT checkpoint, or random for BERT-base")
    parser.add_argument("--data-dir", metavar="DIR", help="real texts in GLUE's layout; otherwise tokens are random")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--max-length", type=int, metavar="N", help="(default: the paper's)")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="X", help="of all sides (default: 0.5)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="turns of each side (default: 5)")
    parser.add_argument("--turn-steps", type=int, default=4, metavar="N", help="steps a turn (default: 4)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp16", "bf16", "fp32"), help="(default: auto)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="(default: auto)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--levers", action="store_true", help="measure ours with each speed-up off")
    instead.add_argument("--profile", action="store_true", help="measure the time of a step by kernel or operator")
    instead.add_argument("--level", action="store_true", help="measure the costs of a level beside its steps")
    instead.add_argument("--alone", choices=("eager", "graphs", "released"), help="measure this side alone, with its peak memory")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args(hyphens())
    for name in ("turns", "turn_steps", "batch_size", "max_length"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.sparsity < 1:
        parser.error(f"--sparsity {args.sparsity}: must be at least 0 and below 1")
    return args


def measure_task(name: str, args: argparse.Namespace) -> Figures:
    """Measure one task."""
    from bert_tickets.bench import measure
    from bert_tickets.bench.baselines import FULL_LENGTH, LENGTHS, make_case

    known = (*LENGTHS, *FULL_LENGTH)
    if args.data_dir is None and name not in known:
        raise UserError(f"no lengths for {name!r}: give --data-dir, or tasks of {', '.join(known)}")
    given: dict[str, Any] = {field: getattr(args, field) for field in SETTINGS}
    batch_size = args.batch_size or preset_values(Config.method, kind_of(name), Config.protocol)["batch_size"]
    given["limit_train"] = batch_size * args.turn_steps * (args.turns + 1)
    case = make_case(name, given, args.sparsity)
    if args.alone:
        return measure.measure_alone(args.alone, case, args.turns, args.turn_steps)
    function = measure.measure_levers if args.levers else measure.profile if args.profile else measure.compare
    return function(case, args.turns, args.turn_steps)


def show(columns: dict[str, Figures]) -> None:
    """Print a table with a column per task."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    print(" " * 60, *(f"{name:>10}" for name in columns))
    for row in rows:
        print(f"{row[:60]:>60}", *(f"{column[row]:10.4g}" if row in column else " " * 10 for column in columns.values()))


def main(args: argparse.Namespace) -> None:
    import torch

    from bert_tickets.bench import measure, tiny_bert

    arguments, machine = dict(vars(args)), f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if args.device != "cpu" and torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "random":
            tiny_bert.save_bert(Path(folder))
            args.model = folder
        if args.level:
            columns = {"level": measure.measure_level(args.model)}
        else:
            columns = {name: measure_task(name, args) for name in args.tasks}
    show(columns)
    print(f"{machine}, torch {torch.__version__}")
    if args.json:
        figures = {"machine": machine, "torch": torch.__version__, "arguments": arguments, "figures": columns}
        write(Path(args.json), json.dumps(figures, indent=1).encode() + b"\n")


if __name__ == "__main__":
    run_command(main, parse())
