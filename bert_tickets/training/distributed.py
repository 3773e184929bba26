"""Several processes that train one network together, as `torchrun` starts them: who they are, and what they tell each other.

All of them hold the whole network and take the same steps, each with its share of every batch; the first alone reads and writes
the run directory. With one process everything here is the identity.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bert_tickets.cli import environment_number, is_launched
from bert_tickets.errors import UserError, first_line

T = TypeVar("T")
BUCKET = 2**25  # numbers that are summed in one message: 128 MiB of fp32
MEETING = timedelta(minutes=10)  # for all to start; the machines import torch from slow disks
PATIENCE = timedelta(days=2)  # one process may tokenise a corpus while the others wait; torchrun ends all when one dies


class ProcessGroup:
    """This process among `world_size` ones. `local_rank` is its number on this machine, and of its GPU there."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, control: Any = None) -> None:
        self.rank, self.world_size, self.local_rank, self._control = rank, world_size, local_rank, control

    # ---- what all know ----

    def broadcast(self, value: T) -> T:
        """The first process's value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """What the first process's `action` returns. Its `UserError` ends the others as well, in silence."""
        if self.world_size == 1:
            return action()
        found: Any = None
        if self.rank == 0:
            try:
                found = (action(), None)
            except (UserError, OSError) as error:
                found = (None, error)
        value, failed = self.broadcast(found)
        if failed is not None:
            raise failed if self.rank == 0 else SystemExit(2)
        return value

    def main_first(self, action: Callable[[], T]) -> T:
        """What `action` returns here, done by each machine's first process before the others: they find its caches filled."""
        if self.world_size == 1:
            return action()
        result, failed = None, None
        try:
            result = action() if self.local_rank == 0 else None
        except UserError as error:
            failed = error
        if any(self.any(failed is not None)):
            raise failed if failed is not None else SystemExit(2)
        return result if self.local_rank == 0 else action()  # type: ignore[return-value]

    def broadcast_tensors(self, read: Callable[[], tuple[dict[str, Tensor], T] | None]) -> tuple[dict[str, Tensor], T] | None:
        """What `read` returns to the first process, tensors on the CPU and something beside them; as `on_main`, and sent one by one."""
        if self.world_size == 1:
            return read()
        tensors: dict[str, Tensor] = {}

        def outline() -> Any:
            if (found := read()) is None:
                return None
            tensors.update(found[0])
            return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, found[1]

        if (told := self.on_main(outline)) is None:
            return None
        for name, (shape, dtype) in told[0].items():
            tensors[name] = tensors[name].contiguous() if self.rank == 0 else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensors[name], src=0, group=self._control)
        return tensors, told[1]

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of the processes."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true where it is of any process. A message between hosts, that no GPU is waited for."""
        if self.world_size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(flag) for flag in raised.tolist())

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise `UserError` where the processes hold different facts, naming one and where."""
        for rank, (host, theirs) in enumerate(self.gather((socket.gethostname(), dict(facts)))):
            for key, value in facts.items():
                if theirs.get(key) != value:
                    raise UserError(
                        f"process {rank} on {host} has another {key} than process {self.rank}: they train one network"
                    )

    # ---- what they compute together ----

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Set each tensor, in place, to its sum over the processes: the same bits for all of them.

        The messages are the same at every step, so that a run that was stopped goes on with the same bits. (torch's
        DistributedDataParallel lays its messages out anew after a process's first step.)
        """
        if self.world_size == 1:
            return
        parts = list(_buckets(tensors))
        flats = [torch.cat([tensor.reshape(-1) for tensor in part]) for part in parts]
        works = [dist.all_reduce(flat, async_op=True) for flat in flats]
        for part, flat, work in zip(parts, flats, works, strict=True):
            work.wait()
            summed = flat.split([tensor.numel() for tensor in part])
            torch._foreach_copy_(list(part), [values.view_as(tensor) for values, tensor in zip(summed, part, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.numel() > BUCKET:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    if part:
        yield part


SINGLE_PROCESS = ProcessGroup()


def _meet(world: int, backend: str) -> None:
    """Join the other processes. Raises `UserError` where they do not come: the variables may be another program's leftovers."""
    said = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    alone = f"to run one process alone, unset {' '.join(name for name, value in said.items() if value is not None)}"
    if missing := [name for name, value in said.items() if not value]:
        raise UserError(f"WORLD_SIZE={world} says that {world} processes train together, but {missing[0]} is not set; {alone}")
    if not dist.is_torchelastic_launched():
        print(f"waiting for {world} processes at {said['MASTER_ADDR']}:{said['MASTER_PORT']}; {alone}", flush=True)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:  # torch's DistError is a RuntimeError
        raise UserError(f"the {world} processes that WORLD_SIZE tells of did not meet: {first_line(error)}; {alone}") from None


@contextmanager
def joined(device: str) -> Iterator[ProcessGroup]:
    """The processes that `torchrun` started, joined (NCCL for the GPUs' sums, gloo for the rest); or this one alone.

    All but the first are silent: what they would print, the first prints.
    """
    if not is_launched():
        yield SINGLE_PROCESS
        return
    world, local = environment_number("WORLD_SIZE"), environment_number("LOCAL_RANK")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: under torchrun each process has a GPU of its own; give cuda, cpu or nothing")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    _meet(world, "nccl" if on_gpu else "gloo")
    rank, said = dist.get_rank(), sys.stdout
    try:
        with open(os.devnull, "w") as nowhere:
            sys.stdout = said if rank == 0 else nowhere
            yield ProcessGroup(rank, world, local, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        sys.stdout = said
        dist.destroy_process_group()
