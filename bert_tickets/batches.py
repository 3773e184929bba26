"""Examples as one ragged store of tokens on the device, and packed batches cut from it.

A packed batch is the batch's examples end to end, without a padding token: `input_ids[1, T]`. Which examples make a batch
is a function of (seed, epoch, step) alone; so a run resumes from a step number, and packing changes no batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_tickets.ranks import ALONE, Ranks
from bert_tickets.tokens import Tokens


def derive(seed: int, *purpose: object) -> int:
    """A seed for one purpose of a run; different purposes give independent streams."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def seeded(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose of a run."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def ship(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of a batch: its examples from `first` to before `last`."""

    lengths: np.ndarray  # tokens of each example of the whole batch
    first: int
    last: int

    @property
    def examples(self) -> slice:
        return slice(self.first, self.last)

    @property
    def tokens(self) -> slice:
        return slice(int(self.lengths[: self.first].sum()), int(self.lengths[: self.last].sum()))


def share_of(lengths: np.ndarray, rank: int, world: int) -> Share:
    """The examples in the middle of whose tokens the rank-th of `world` equal parts of all tokens lies: each in one share.

    A share may be empty, where one example has most of the tokens or there are few.
    """
    middles = lengths.cumsum() - lengths / 2
    first, last = np.searchsorted(middles, [lengths.sum() * part / world for part in (rank, rank + 1)]).tolist()
    return Share(lengths, first, last)


@dataclass(frozen=True)
class Batch:
    """B examples of T tokens together, none of more than L. Index tensors are int64, on the device.

    In a bucketed batch T and L are rounded up, so that a few shapes serve all: the last `spare` tokens belong to no
    example, stand where attention pads the shortest one or are one more example there, and neither change a result nor
    take a gradient.
    """

    input_ids: Tensor  # [1, T]
    token_type_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], from 0 in each example
    rows: Tensor  # [T], the example of each token
    starts: Tensor  # [B], where each example begins
    lens: Tensor  # [B], its tokens
    labels: Tensor  # [B, ...]; or [M], of the chosen tokens
    lengths: np.ndarray  # [B], `lens` on the host, to know shapes without asking the device
    longest: int  # L
    spare: int = 0
    chosen: Tensor | None = None  # [M], the tokens that the loss is of, where it is not of examples
    share: Share | None = None  # which part of a batch this is, where several processes divide it
    weight: float = 1.0  # and how much of the whole batch's mean is this part's mean


class Store(Protocol):
    """A set of examples on a device, of which batches are cut."""

    sha256: str  # of the content
    device: torch.device
    lengths: np.ndarray  # [n], int64: tokens of each example

    def __len__(self) -> int: ...
    def batch(self, examples: Tensor, *, bucketed: bool = False) -> Batch: ...


class TokenStore:
    """A set of tokenised examples with labels ([n, ...], class indices, places or floats), resident on a device."""

    def __init__(self, tokens: Tokens, labels: np.ndarray, device: torch.device | str = "cpu") -> None:
        if len(labels) != len(tokens.lengths):
            raise ValueError(f"{len(labels)} labels for {len(tokens.lengths)} examples")
        self.sha256 = hashlib.sha256(tokens.sha256().encode() + labels.tobytes()).hexdigest()
        self.device = torch.device(device)
        self._longest = int(tokens.lengths.max(initial=0))
        self.lengths = tokens.lengths  # on the host as well, to know a batch's shape without asking the device
        self.labels = torch.from_numpy(labels).to(device)
        self._ids = torch.from_numpy(tokens.ids).to(device)
        self._types = torch.from_numpy(tokens.types).to(device)
        self._lengths = torch.from_numpy(tokens.lengths).to(device)
        self._offsets = torch.from_numpy(np.cumsum(tokens.lengths) - tokens.lengths).to(device)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, examples: Tensor, *, bucketed: bool = False) -> Batch:
        """The examples of these indices ([B], int64, on the CPU), packed in their order. Never waits for the device."""
        lengths, device = self.lengths[examples.numpy()], self.device
        tokens, longest = int(lengths.sum()), int(lengths.max())
        examples = ship(examples, device)
        lens = self._lengths[examples]
        starts = lens.cumsum(0) - lens
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=device), lens, output_size=tokens)
        position = torch.arange(tokens, device=device) - starts[rows]
        source = self._offsets[examples][rows] + position
        spare = 0
        if bucketed:
            longest = min(_round_up(longest, 32), self._longest)
            unit = max(32, (1 << tokens.bit_length()) // 32)  # at most a 16th of the tokens, as `most_spare` says
            spare = min(_round_up(tokens, unit), len(lengths) * longest) - tokens
            rows = F.pad(rows, (0, spare), value=int(lengths.argmin()))
            position = F.pad(position, (0, spare), value=longest - 1)
            source = F.pad(source, (0, spare))
        return Batch(
            input_ids=self._ids[source].long()[None],
            token_type_ids=self._types[source].long()[None],
            position_ids=position[None],
            rows=rows,
            starts=starts,
            lens=lens,
            labels=self.labels[examples],
            lengths=lengths,
            longest=longest,
            spare=spare,
        )


def by_length(store: Store, max_tokens: int, ranks: Ranks = ALONE) -> Iterator[tuple[Tensor, Batch]]:
    """Every example once, the longest first, in packs of at most `max_tokens` padded tokens: (indices, batch).

    Several processes take the packs in turn.
    """
    order = np.argsort(-store.lengths, kind="stable")
    start = number = 0
    while start < len(order):
        rows = max(1, max_tokens // int(store.lengths[order[start]]))
        if number % ranks.world == ranks.rank:
            indices = torch.from_numpy(order[start : start + rows])
            yield indices, store.batch(indices)
        start, number = start + rows, number + 1


def most_spare(tokens: int) -> int:
    """Of a bucketed batch's T tokens no more are spare."""
    return max(32, tokens // 16)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `count` examples in which an epoch sees them ([count], int64, CPU)."""
    return torch.randperm(count, generator=seeded(seed, "order", epoch))


Alter = Callable[[Batch, int], Batch]  # a batch and its step to what the step sees


class Batches:
    """The training batches of a level, by step: a cursor that can be set anywhere at no cost.

    Several processes divide each batch, and one may divide it once more where memory is short: every example is in one share,
    and shares have about as many tokens.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        seed: int,
        *,
        bucketed: bool = False,
        alter: Alter = lambda batch, step: batch,
        ranks: Ranks = ALONE,
    ) -> None:
        self.store, self.batch_size, self.seed, self.bucketed, self.alter = store, batch_size, seed, bucketed, alter
        self.ranks = ranks
        self.per_epoch = math.ceil(len(store) / batch_size)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; of several processes, this one's share of it."""
        (batch,) = self.parts(step, 1)
        return batch

    def parts(self, step: int, count: int) -> list[Batch]:
        """The same in `count` parts, for one after another."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order(len(self.store), self.seed, epoch)
        examples = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        shares = self.ranks.world * count
        if shares == 1:
            return [self.alter(self.store.batch(examples, bucketed=self.bucketed), step)]
        mine = range(self.ranks.rank * count, (self.ranks.rank + 1) * count)
        return [self.alter(self._share(examples, number, shares), step) for number in mine]

    def _share(self, examples: Tensor, number: int, shares: int) -> Batch:
        """One of the shares of the examples. An empty one is the first example at no weight: all must take the step."""
        share = share_of(self.store.lengths[examples.numpy()], number, shares)
        weight = (share.last - share.first) / len(examples)
        if not weight:
            share = replace(share, first=0, last=1)
        return replace(self.store.batch(examples[share.examples]), share=share, weight=weight)
