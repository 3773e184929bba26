"""Evaluation: predictions for every example of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bert_tickets.data.batches import Store, by_length
from bert_tickets.modeling.packing import Batch
from bert_tickets.training.distributed import SINGLE_PROCESS, ProcessGroup
from bert_tickets.training.step import autocast, precision_of

EVAL_TOKENS = {"cuda": 16384, "cpu": 4096}  # padded tokens of an evaluation batch


@torch.no_grad()  # not inference mode: importances need gradients of the gates
def evaluate(
    net: nn.Module,
    predict: Callable[[Batch], Tensor],
    store: Store,
    precision: str,
    rows: Literal["example", "token", "any"] = "example",
    group: ProcessGroup = SINGLE_PROCESS,
    max_tokens: int | None = None,
) -> np.ndarray:
    """Compute the predictions for every example or token, in the store's order (`any`: in any order): [n, ...], float32.

    A batch has at most `max_tokens` padded tokens (default: `EVAL_TOKENS`). Restores the network's mode. Several processes split
    the batches, and each returns all predictions.
    """
    was_training = net.training
    net.eval()
    with autocast(precision_of(precision, store.device), store.device):
        batches = by_length(store, max_tokens or EVAL_TOKENS[store.device.type], group.rank, group.world_size)
        own = [(examples, predict(batch).float()) for examples, batch in batches]
    net.train(was_training)
    turns = zip_longest(*group.gather([(examples, found.cpu()) for examples, found in own]))
    indices, found = zip(*(part for turn in turns for part in turn if part is not None), strict=True)
    values, order = torch.cat(found), torch.cat(indices)
    if rows == "token":
        order = torch.repeat_interleave(order, torch.from_numpy(store.lengths)[order])
    return (values if rows == "any" else values[order.argsort(stable=True)]).numpy()
