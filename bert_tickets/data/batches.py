"""Examples as one ragged store of tokens on the device, and packed batches of them.

A packed batch is the concatenation of its examples, without padding tokens: `input_ids[1, T]`. Its examples depend on (seed,
epoch, step) alone, so that a run resumes from a step number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bert_tickets.data.token_cache import Tokens
from bert_tickets.modeling.packing import Batch, Shard, ship
from bert_tickets.seeds import seeded

T = TypeVar("T")


class Store(Protocol):
    """A set of examples on a device, in packed batches."""

    sha256: str  # of the content
    device: torch.device
    lengths: np.ndarray  # [n], int64: tokens of each example

    def __len__(self) -> int: ...
    def batch(self, examples: Tensor, *, bucketed: bool = False) -> Batch: ...


class TokenStore:
    """A set of tokenized examples with labels ([n, ...]: class indices, positions or floats).

    They are packed on the host, and a batch is one transfer: on a device it would take a dozen small kernels.
    """

    def __init__(self, tokens: Tokens, labels: np.ndarray, device: torch.device | str = "cpu") -> None:
        if len(labels) != len(tokens.lengths):
            raise ValueError(f"{len(labels)} labels for {len(tokens.lengths)} examples")
        self.sha256 = hashlib.sha256(tokens.sha256().encode() + labels.tobytes()).hexdigest()
        self.device = torch.device(device)
        self.lengths, self.labels = tokens.lengths, torch.from_numpy(labels)
        self._tokens, self._longest = tokens, int(tokens.lengths.max(initial=0))
        self._offsets = np.cumsum(tokens.lengths) - tokens.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, examples: Tensor, *, bucketed: bool = False) -> Batch:
        """Pack the examples `examples` ([B], int64 indices on the CPU), in this order. Never waits for the device."""
        lengths, first = self.lengths[examples.numpy()], self._offsets[examples.numpy()]
        tokens, longest, padding = int(lengths.sum()), int(lengths.max()), 0
        starts = lengths.cumsum() - lengths
        rows = np.arange(len(lengths)).repeat(lengths)
        position = np.arange(tokens) - starts[rows]
        source = first[rows] + position
        if bucketed:
            longest = min(_round_up(longest, 32), self._longest)
            unit = max(32, (1 << tokens.bit_length()) // 32)  # within `packing.max_padding`
            padding = min(_round_up(tokens, unit), len(lengths) * longest) - tokens
            rows = np.pad(rows, (0, padding), constant_values=lengths.argmin())
            position = np.pad(position, (0, padding), constant_values=longest - 1)
            source = np.pad(source, (0, padding))
        columns = self._tokens.ids[source], self._tokens.types[source], position, rows, starts, lengths
        joined = ship(torch.from_numpy(np.concatenate(columns, dtype=np.int64)), self.device)  # one transfer
        ids, types, position_ids, *others = joined.split([len(column) for column in columns])
        return Batch(
            input_ids=ids[None],
            token_type_ids=types[None],
            position_ids=position_ids[None],
            rows=others[0],
            starts=others[1],
            lens=others[2],
            labels=ship(self.labels[examples], self.device),
            lengths=lengths,
            longest=longest,
            padding=padding,
        )


class Subset:
    """Some examples of a store, by their indices."""

    def __init__(self, store: TokenStore, examples: Tensor) -> None:
        self.store, self.examples = store, examples
        self.device, self.lengths, self.labels = store.device, store.lengths[examples.numpy()], store.labels[examples]
        self.sha256 = hashlib.sha256(store.sha256.encode() + examples.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, examples: Tensor, *, bucketed: bool = False) -> Batch:
        return self.store.batch(self.examples[examples], bucketed=bucketed)


def by_length(store: Store, max_tokens: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Batch]]:
    """Yield every example once, longest first, in batches of at most `max_tokens` padded tokens: (indices, batch).

    Of `world_size` processes, each yields every `world_size`-th batch.
    """
    order = np.argsort(-store.lengths, kind="stable")
    start = number = 0
    while start < len(order):
        rows = max(1, max_tokens // int(store.lengths[order[start]]))
        if number % world_size == rank:
            indices = torch.from_numpy(order[start : start + rows])
            yield indices, store.batch(indices)
        start, number = start + rows, number + 1


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@lru_cache(maxsize=1)
def order(count: int, seed: int, epoch: int) -> Tensor:
    """Draw the order of the examples in an epoch ([count], int64, CPU)."""
    return torch.randperm(count, generator=seeded(seed, "order", epoch))


def subset(examples: list[T], limit: int | None, seed: int | None = None) -> list[T]:
    """Draw up to `limit` of the examples by `seed`; the same ones in every run if it is None. A larger limit adds examples."""
    if limit is None:
        return examples
    count = len(examples)
    drawn = order(count, seed=0, epoch=0) if seed is None else torch.randperm(count, generator=seeded(seed, "subset"))
    return [examples[i] for i in drawn[:limit].tolist()]


Augment = Callable[[Batch, int], Batch]  # maps a batch and its step to the augmented batch


@dataclass(frozen=True)
class Batches:
    """The training batches of a level, by step, each split over `world_size` processes and there into `grad_accum` parts.

    Every example is in one part, and the parts have about equally many tokens.
    """

    store: Store
    batch_size: int
    seed: int
    bucketed: bool = False
    augment_batch: Augment = lambda batch, step: batch
    grad_accum: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def per_epoch(self) -> int:
        """The number of steps of an epoch."""
        return math.ceil(len(self.store) / self.batch_size)

    def parts(self, step: int) -> list[Batch]:
        """Return the parts of a step's batch that belong to this process."""
        epoch, place = divmod(step, self.per_epoch)
        examples = order(len(self.store), self.seed, epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        first = self.rank * self.grad_accum
        return [self.augment_batch(self._shard(examples, n), step) for n in range(first, first + self.grad_accum)]

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers of tokens of all examples of the steps [start, stop), in all processes."""
        at, last = (step // self.per_epoch * len(self.store) + step % self.per_epoch * self.batch_size for step in (start, stop))
        found = []
        while at < last:
            epoch, first = divmod(at, len(self.store))
            examples = order(len(self.store), self.seed, epoch)[first : first + last - at]
            found.append(self.store.lengths[examples.numpy()])
            at += len(examples)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _shard(self, examples: Tensor, number: int) -> Batch:
        """Return a shard of the examples. An empty one becomes the first example with weight 0: every process takes the step."""
        shards = self.world_size * self.grad_accum
        if shards == 1:
            return self.store.batch(examples, bucketed=self.bucketed)
        shard = shard_of(self.store.lengths[examples.numpy()], number, shards)
        weight = (shard.last - shard.first) / len(examples)
        if not weight:
            shard = replace(shard, first=0, last=1)
        batch = self.store.batch(examples[shard.first : shard.last], bucketed=self.bucketed)
        return replace(batch, shard=shard, weight=weight)


def shard_of(lengths: np.ndarray, number: int, shards: int) -> Shard:
    """Return the examples whose middle token is in part `number` of `shards` equal parts of all tokens; there may be none."""
    middles = lengths.cumsum() - lengths / 2
    bounds = [lengths.sum() * part / shards for part in (number, number + 1)]
    first, last = np.searchsorted(middles, bounds).tolist()
    return Shard(lengths, first, last)
