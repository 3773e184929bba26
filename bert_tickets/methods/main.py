"""The main program of the training scripts: one method on one task, in its run directory."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NoReturn

from bert_tickets.cli import is_launched, parse, run_command
from bert_tickets.config import Config
from bert_tickets.runs.summary import print_finished, print_levels, print_plan


def main(kind: str, description: str | None, argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line of the script for a kind of task, run it, and exit."""
    run_command(run, parse(kind, description, argv))


def run(cfg: Config) -> None:
    """Run a configuration: print its plan or its finished results, or train the levels that are not finished."""
    if cfg.dry_run:
        print_plan(cfg)
    elif is_launched() or not print_finished(cfg):  # torchrun's processes may see different file systems
        train(cfg)


def train(cfg: Config) -> None:
    """Train all levels that are not finished, then print the results."""
    from bert_tickets.runs.prepare import prepare
    from bert_tickets.runs.writer import Run
    from bert_tickets.tasks.create import create
    from bert_tickets.training.distributed import joined

    with joined(cfg.device) as group, Run(cfg, group) as run:
        if run.done < run.levels:
            method = importlib.import_module(f"bert_tickets.methods.{cfg.method}")
            method.run(prepare(create(cfg.task), run), cfg.settings)
        if run.group.rank == 0:
            print_levels(run.dir, cfg)
