"""Training scripts in several processes, forked from a server that has imported torch: no import per process, no torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

KINDS = {"lt_glue.py": "glue", "lt_squad.py": "squad", "lt_pretrain.py": "mlm"}


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes", "bert_tickets.runs.session", "transformers.models.bert.modeling_bert"])
    return context


def _main(folder: Path, script: str, argv: list[str], environment: dict[str, str], setup: str) -> None:
    os.chdir(folder)
    os.environ |= environment
    rank = environment.get("RANK", "0")
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(1)  # as torchrun has it: the bits depend on it
    exec(setup, {})
    from bert_tickets.methods.main import main

    main(KINDS[script], None, argv)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(world_size: int, folder: Path, script: str, *arguments: object, setup: str = "") -> tuple[list[int | None], str, str]:
    """Run a training script in `world_size` processes in a folder; returns their exit codes, and all output and errors.

    `setup` is Python that each process runs first.
    """
    folder.mkdir(exist_ok=True)
    together = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children = []
    for rank in range(world_size):
        variables = {name: str(value) for name, value in {**together, "RANK": rank, "LOCAL_RANK": rank}.items()}
        given = (folder, script, list(map(str, arguments)), variables if world_size > 1 else {}, setup)
        children.append(_context().Process(target=_main, args=given))
        children[-1].start()
    for child in children:
        child.join(120)
        child.kill()
    texts = ["".join((folder / f"{name}{rank}").read_text() for rank in range(world_size)) for name in ("out", "err")]
    return [child.exitcode for child in children], texts[0], texts[1]
