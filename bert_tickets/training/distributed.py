"""Several processes that train one network together, as `torchrun` starts them.

Each has the whole network and takes the same steps, with its shard of every batch. Process 0, the main one, alone reads and
writes the run directory. With one process all operations here are the identity.
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

from bert_tickets.cli import is_launched
from bert_tickets.errors import UserError, first_line

T = TypeVar("T")
START = timedelta(minutes=2)  # to find torchrun, which started before its processes
TIMEOUT = timedelta(days=2)  # processes wait while one tokenizes a corpus; if one dies, torchrun ends all


class ProcessGroup:
    """This process among `world_size`. `local_rank` is its number on this machine, and the number of its GPU."""

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, control: Any = None) -> None:
        self.rank, self.world_size, self.local_rank, self._control = rank, world_size, local_rank, control

    # ---- agreement ----

    def on_main(self, action: Callable[[], T]) -> T:
        """Return the result of the main process's `action`. If it raises `UserError` or `OSError`, the others exit silently."""
        if self.world_size == 1:
            return action()
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [(action(), None)]
            except (UserError, OSError) as error:
                box = [(None, error)]
        dist.broadcast_object_list(box, src=0, group=self._control)
        value, failed = box[0]
        if failed is not None:
            raise failed if self.rank == 0 else SystemExit(2)
        return value

    def main_first(self, action: Callable[[], T]) -> T:
        """Return the result of `action`, which each machine's first process runs before the others, to fill the caches."""
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

    def broadcast_tensors(self, read: Callable[[], tuple[dict[str, Tensor], T]]) -> tuple[dict[str, Tensor], T]:
        """Return the main process's result of `read`, CPU tensors and metadata, as `on_main` does. Sends tensors one by one."""
        if self.world_size == 1:
            return read()
        tensors: dict[str, Tensor] = {}

        def outline() -> tuple[dict[str, Any], T]:
            found, facts = read()
            tensors.update(found)
            return {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}, facts

        outlines, facts = self.on_main(outline)
        for name, (shape, dtype) in outlines.items():
            tensors[name] = tensors[name].contiguous() if self.rank == 0 else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensors[name], src=0, group=self._control)
        return tensors, facts

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set in any process. Never waits for the GPU."""
        if self.world_size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(flag) for flag in raised.tolist())

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise `UserError`, naming a key and a process, if facts differ between processes."""
        for rank, (host, theirs) in enumerate(self.gather((socket.gethostname(), dict(facts)))):
            for key, value in facts.items():
                if theirs.get(key) != value:
                    raise UserError(
                        f"process {rank} on {host} has another {key} than process {self.rank}: they must train one network"
                    )

    # ---- sums ----

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Set each tensor, in place, to its sum over the processes, with the same bits in all of them.

        One sum over all tensors, so that a resumed run continues with the same bits. (DistributedDataParallel rebuilds its
        buckets after a process's first step.)
        """
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        summed = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [values.view_as(tensor) for values, tensor in zip(summed, tensors, strict=True)])


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def joined(device: str) -> Iterator[ProcessGroup]:
    """Connect the processes that `torchrun` started (NCCL for sums on GPUs, gloo for the rest); or yield `SINGLE_PROCESS`.

    Only the main process prints. Raises `UserError` for another device than cpu or cuda.
    """
    if not is_launched():
        yield SINGLE_PROCESS
        return
    local = int(os.environ["LOCAL_RANK"])
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: under torchrun each process has its own GPU; give auto, cuda or cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=START))
    except dist.DistError as error:
        raise UserError(f"cannot reach torchrun; has it ended? {first_line(error)}") from None
    store.set_timeout(TIMEOUT)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    stdout = sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere:
            sys.stdout = stdout if rank == 0 else nowhere
            yield ProcessGroup(rank, size, local, dist.new_group(backend="gloo", timeout=TIMEOUT))
    finally:
        sys.stdout = stdout
        dist.destroy_process_group()
