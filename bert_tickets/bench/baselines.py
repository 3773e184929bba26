"""The training loops that bench.py puts side by side: ours, ours with one lever off, and the released code's.

Each loop takes a `Case` and returns a function that takes one step, by number. They train copies of one network at one
sparsity on one set of examples.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from bert_tickets.bench.timing import Loop
from bert_tickets.config import Config, build
from bert_tickets.data.batches import Batches, Store, TokenStore
from bert_tickets.data.mlm_dataset import Corpus
from bert_tickets.data.token_cache import Tokens
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.imp import oneshot
from bert_tickets.modeling import attention, dropout
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.dropout import Dropout
from bert_tickets.modeling.parameters import prunable
from bert_tickets.tasks import Task
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import MASKED, RANDOM, SHARE, Mlm
from bert_tickets.tasks.squad import Squad
from bert_tickets.training.cuda_graphs import Recorder
from bert_tickets.training.device import prepare_device
from bert_tickets.training.step import Step, autocast, precision_of

# To draw lengths from where no data are given: mean tokens of a training example at most 128 long, and the spread (standard
# deviation of the logarithm). Measured with BERT's uncased vocabulary on the published CoLA and RTE, on the first 9,000 of
# SST-2, and on samples of 8,999 of MNLI and of QQP.
LENGTHS = {"cola": (11.3, 0.33), "sst2": (13.3, 0.68), "mnli": (40.2, 0.47), "qqp": (30.8, 0.36), "rte": (66.6, 0.48)}
WHOLE = ("squad", "mlm")  # as if every window and block were full


@dataclass(frozen=True)
class Case:
    """A network at a sparsity, and examples to train it on."""

    net: Net
    task: Task
    mask: Mask
    store: Store
    cfg: Config

    @property
    def device(self) -> torch.device:
        return self.store.device

    @property
    def precision(self) -> str:
        return precision_of(self.cfg.train.precision, self.device)


def prepare(name: str, given: dict[str, Any], sparsity: float) -> Case:
    """The case of one task: `given` holds fields of `Config`; without a `data_dir`, lengths are drawn."""
    cfg = build(name if name in WHOLE else "glue", {"task": name, **{key: value for key, value in given.items() if value}})
    task: Any = Squad() if name == "squad" else Mlm() if name == "mlm" else Glue(name)
    device = prepare_device(cfg.device)
    net, tokenizer = task.load_net(cfg)
    assert cfg.limit_train is not None
    if cfg.data_dir:
        store = task.load_data(cfg, tokenizer, device)[0]
    else:
        store = drawn(name, net.config.vocab_size, cfg.limit_train, cfg.max_length, device)
        task.mask_id, task.vocabulary = tokenizer.mask_token_id, len(tokenizer)  # of masked language modelling
    mask = oneshot(net, sparsity, "magnitude", 0)
    return Case(net.to(device).train(), task, mask, store, cfg)


def drawn(task: str, vocabulary: int, count: int, longest: int, device: torch.device) -> Store:
    """Random tokens with the task's published lengths."""
    rng = np.random.default_rng(0)
    if task == "mlm":
        stream = rng.integers(5, vocabulary, count * (longest - 2), dtype=np.int32)
        return Corpus(stream, "drawn", (101, 102), longest, device)
    mean, spread = LENGTHS.get(task, (longest, 0.0))
    lengths = rng.lognormal(math.log(mean) - spread**2 / 2, spread, count).round().clip(3, longest).astype(np.int64)
    ids = rng.integers(5, vocabulary, lengths.sum(), dtype=np.int32)
    labels = rng.integers(0, 2, (count, 2) if task == "squad" else count)
    return TokenStore(Tokens(ids, np.zeros(len(ids), np.uint8), lengths), labels, device)


# ---- ours ----


def ours(case: Case) -> Loop:
    """The package's own step."""
    return step_and_loop(case)[1]


def dense(case: Case) -> Case:
    """The case without a mask."""
    return dataclasses.replace(case, mask=Mask.ones(prunable(case.net)))


def with_graphs(case: Case) -> Loop:
    """Ours by CUDA graphs, every bucket of the case met and captured before."""
    loop = step_and_loop(case, recorder=Recorder(required=True))[1]
    for i in [*range(len(case.store) // case.cfg.train.batch_size)] * 2:
        loop(i)
    return loop


def step_and_loop(case: Case, *, hooked: bool = False, recorder: Recorder | None = None) -> tuple[Step, Loop]:
    """Ours, of a copy of the network; `hooked` masks the weights by torch's hooks, a `recorder` makes it go by CUDA graphs."""
    net, cfg = copy.deepcopy(case.net), case.cfg.train
    if hooked:
        _hook(net, case.mask)
    else:
        case.mask.apply(prunable(net))
    augment_batch = partial(case.task.augment_batch, seed=0)
    batches = Batches(case.store, cfg.batch_size, 0, bucketed=recorder is not None, augment_batch=augment_batch)
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    mask = None if hooked else case.mask
    step = Step(lambda b: case.task.loss(net, b), params, cfg, mask, case.device, recorder)
    return step, lambda i: step(batches[i], cfg.lr)


# ---- ours, with one lever off ----


def without_packing(case: Case) -> Loop:
    """Every example takes --max-length tokens, and all of them are computed."""
    store, longest = case.store, case.cfg.max_length
    if isinstance(store, Corpus):
        return ours(case)  # its blocks are full
    assert isinstance(store, TokenStore)
    tokens = Tokens(
        np.resize(np.arange(5, 100, dtype=np.int32), len(store) * longest),
        np.zeros(len(store) * longest, np.uint8),
        np.full(len(store), longest),
    )
    return ours(dataclasses.replace(case, store=TokenStore(tokens, store.labels.cpu().numpy(), store.device)))


def without_groups(case: Case) -> Loop:
    """Attention pads all examples of a batch to its longest."""
    return _patched(ours(case), lambda: patch.object(attention, "alike", lambda lengths: [np.arange(len(lengths))]))


def without_short_draws(case: Case) -> Loop:
    """Dropout draws torch's Bernoulli numbers."""

    def factors(like: Tensor, p: float, shape: Sequence[int], part: object) -> Tensor:
        return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)

    return _patched(ours(case), lambda: patch.object(dropout, "factors", factors))


def without_fused_update(case: Case) -> Loop:
    """AdamW and the clip go tensor by tensor."""
    step, loop = step_and_loop(case)
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in step.optimizer.param_groups]
    step.optimizer = torch.optim.AdamW(groups, lr=case.cfg.train.lr, eps=case.cfg.train.adam_epsilon, foreach=False)
    clip = nn.utils.clip_grad_norm_

    def tensor_by_tensor(params: Any, norm: float, foreach: bool) -> Tensor:
        return clip(params, norm, foreach=False)

    def unscale_and_clip() -> None:  # in half precision, before AdamW and not within
        for p in step.params.values():
            if p.grad is not None and step.loss_scale:
                p.grad.div_(step.loss_scale.factor)
        clip(step.params.values(), case.cfg.train.max_grad_norm, foreach=False)

    step._clip_in_adamw = unscale_and_clip  # type: ignore[method-assign]
    return _patched(loop, lambda: patch.object(nn.utils, "clip_grad_norm_", tensor_by_tensor))


def without_gradient_masks(case: Case) -> Loop:
    """The weights are masked in every forward pass, by torch's hooks."""
    return step_and_loop(case, hooked=True)[1]


def with_waiting(case: Case) -> Loop:
    """The loss is read on the host after every step."""
    loop = ours(case)
    return lambda i: loop(i).item()


LEVERS = {
    "packing": without_packing,
    "attention by like lengths": without_groups,
    "16-bit dropout draws": without_short_draws,
    "fused AdamW and clip": without_fused_update,
    "masks on gradients": without_gradient_masks,
    "no wait for the loss": with_waiting,
}


def _patched(loop: Loop, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Loop:
    def step(i: int) -> Any:
        with context():
            return loop(i)

    return step


# ---- the released code's ----


def released(case: Case) -> Loop:
    """The released loop as it was written, on today's torch and transformers: every example padded to --max-length by a
    DataLoader, torch.nn.utils.prune's hooks, eager attention, loss.item() every step, AdamW tensor by tensor."""
    net, cfg, device = copy.deepcopy(case.net), case.cfg, case.device
    net.set_attn_implementation("eager")
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Dropout):
                setattr(parent, name, nn.Dropout(child.p))
    _hook(net, case.mask)

    rows = case.store.batch(torch.arange(len(case.store)))
    spread = torch.zeros(3, len(case.store) * cfg.max_length, dtype=torch.long)
    places = (rows.rows * cfg.max_length + rows.position_ids[0]).cpu()
    for at, values in enumerate((rows.input_ids[0], rows.token_type_ids[0], torch.ones_like(rows.rows))):
        spread[at, places] = values.cpu()
    labels = rows.labels.cpu() if len(rows.labels) == len(case.store) else torch.zeros(len(case.store))  # or drawn below
    data = TensorDataset(*spread.view(3, len(case.store), cfg.max_length), labels)
    loader = DataLoader(data, sampler=RandomSampler(data), batch_size=cfg.train.batch_size)

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    spared = [p for name, p in net.named_parameters() if "bias" in name or "LayerNorm" in name]
    rest = [p for name, p in net.named_parameters() if not ("bias" in name or "LayerNorm" in name)]
    groups = [{"params": rest, "weight_decay": cfg.train.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.lr, eps=1e-8, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    batches, total = forever(), 0.0

    def step(_: int) -> None:
        nonlocal total
        ids, types, attended, labels = (tensor.to(device) for tensor in next(batches))
        with autocast(case.precision, device):
            loss = _loss(net, case.task, labels, input_ids=ids, token_type_ids=types, attention_mask=attended)
        scaler.scale(loss).backward()
        total += loss.item()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), cfg.train.max_grad_norm, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        net.zero_grad()

    return _patched(step, _undetermined)  # it did not ask for deterministic algorithms, as our runs do


@contextlib.contextmanager
def _undetermined() -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def _loss(net: Net, task: Any, labels: Tensor, **inputs: Tensor) -> Tensor:
    """As the released scripts compute it: by transformers, of every position, padding and the whole vocabulary included."""
    if isinstance(task, Squad):
        return net(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    if isinstance(task, Mlm):
        ids = inputs["input_ids"]
        chosen, kind = (torch.rand(ids.shape, device=ids.device) for _ in range(2))
        shown = torch.where(kind < MASKED, task.mask_id, torch.randint_like(ids, task.vocabulary))
        shown = torch.where((chosen < SHARE) & (kind < MASKED + RANDOM), shown, ids)
        return net(**inputs | {"input_ids": shown}, labels=ids.masked_fill(chosen >= SHARE, -100)).loss
    return nn.functional.cross_entropy(net(**inputs).logits.float(), labels)


def _hook(net: Net, mask: Mask) -> None:
    for name, kept in mask.items():
        torch_prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", kept.to(net.device))
