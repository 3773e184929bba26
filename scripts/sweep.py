"""Run command lines on Ray, in the order of their dependencies, without duplicates and finished ones.

  bash scripts/table2.sh --dry-run | python scripts/sweep.py            this machine, no set-up
  python scripts/sweep.py lines.txt more.txt --gpus 0.5 --retries 5     two runs share a GPU
  python scripts/sweep.py lines.txt --address auto                      a cluster that was started with `ray start`

The same command resumes a stopped or killed sweep. On a cluster all nodes need this folder at the same place (a shared file
system) and the same Python environment. The runs of a lost node resume on another one.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # oneshot.py and perturb_weight.py are not in the package

import derive

import oneshot
import perturb_weight
from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.sweep.jobs import plan, read_lines, unfinished
from bert_tickets.sweep.runner import report, run

MAKERS = {"derive.py": derive, "oneshot.py": oneshot, "perturb_weight.py": perturb_weight}


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("files", nargs="*", metavar="FILE", help="command lines, one per line (default: standard input, also -)")
    parser.add_argument("--address", default="local", metavar="TEXT", help="a Ray cluster: auto, or host:port (default: none)")
    parser.add_argument("--gpus", type=float, metavar="X", help="GPUs per run: 0.5, 1, 2 (default: 1 where there are any)")
    parser.add_argument("--cpus", type=float, default=1, metavar="X", help="CPUs per run, and OMP_NUM_THREADS (default: 1)")
    retries = "retries of a run that failed or lost its node (default: 3)"
    parser.add_argument("--retries", type=int, default=3, metavar="N", help=retries)
    parser.add_argument("--log-dir", default="runs/sweep", metavar="DIR", help="the output of each run (default: runs/sweep)")
    args = parser.parse_args(normalize_argv(None))
    if args.gpus is not None and not (0 <= args.gpus <= 1 or (args.gpus > 1 and args.gpus % 1 == 0)):
        parser.error(f"--gpus {args.gpus}: must be a fraction of one GPU, or a whole number")
    if not 0 < args.cpus < 1e6:
        parser.error(f"--cpus {args.cpus}: must be above 0")
    if args.retries < 0:
        parser.error(f"--retries {args.retries}: must be at least 0")
    return args


def main(args: argparse.Namespace) -> None:
    jobs = plan(lines := read_lines(args.files), MAKERS)
    left = unfinished(jobs)
    finished = len(jobs) - len(left)
    print(f"{len(lines)} lines, {len(jobs)} jobs: {finished} already finished, {len(left)} to run", flush=True)
    outcomes = run(left, args) if left else {}
    print(report(outcomes, finished, args.log_dir))
    if any(outcome != "done" for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, parse())
