"""The training steps that bench.py compares: ours, eager and by CUDA graphs, and the released code's.

`eager`, `graphs` and `released` take a `Case` and return a function that takes the training step with a given index. Each trains
a copy of the network, at the same sparsity on the same examples. `mask_training` trains a mask of it instead.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from bert_tickets.config import Config, build
from bert_tickets.data.batches import Batches, Store, TokenStore
from bert_tickets.data.mlm_dataset import Corpus
from bert_tickets.data.token_cache import Tokens
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.mask_training import Settings
from bert_tickets.methods.mask_training import loss as mask_loss
from bert_tickets.methods.oneshot import oneshot
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.dropout import Dropout
from bert_tickets.modeling.packing import Batch
from bert_tickets.tasks import Task
from bert_tickets.tasks.create import create
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import MASK_RATE, MASKED, RANDOM, Mlm
from bert_tickets.tasks.squad import Squad
from bert_tickets.training.cuda_graphs import Recorder
from bert_tickets.training.device import prepare_device
from bert_tickets.training.mask_scores import MaskedNetwork
from bert_tickets.training.step import Step, autocast, precision_of

# Mean tokens of a training example (at most 128), and the standard deviation of their logarithm. Measured with BERT's uncased
# vocabulary on CoLA and RTE, on the first 9,000 examples of SST-2, and on samples of 8,999 of MNLI and of QQP.
LENGTHS = {"cola": (11.3, 0.33), "sst2": (13.3, 0.68), "mnli": (40.2, 0.47), "qqp": (30.8, 0.36), "rte": (66.6, 0.48)}
FULL_LENGTH = ("squad", "mlm")  # every window and block has --max-length tokens


TrainStep = Callable[[int], Any]


def take_steps(step: TrainStep, numbers: Iterable[int]) -> None:
    """Take the steps with these indices."""
    for i in numbers:
        step(i)


@dataclass(frozen=True)
class Case:
    """A network, a mask, and examples to train on."""

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


def make_case(name: str, given: Mapping[str, Any], sparsity: float) -> Case:
    """Load a task's network, pruned to a sparsity by magnitude, and `limit_train` examples.

    `given` are settings of the configuration; None means the preset's. Without `data_dir`, the examples are random tokens, with
    the lengths of the task.
    """
    cfg = build({"task": name, **{key: value for key, value in given.items() if value is not None}})
    assert cfg.limit_train is not None
    task, device = create(name), prepare_device(cfg.device)
    net, tokenizer = task.load_net(cfg)
    mask = oneshot(net, sparsity, "magnitude", 0)
    if cfg.data_dir:
        store = task.load_data(cfg, tokenizer, device)[0]
    else:
        store = random_store(name, net.config.vocab_size, cfg.limit_train, cfg.max_length, device)
        if isinstance(task, Mlm):
            task.mask_id, task.vocabulary = tokenizer.mask_token_id, len(tokenizer)
    return Case(net.to(device).train(), task, mask, store, cfg)


def random_store(task: str, vocabulary: int, count: int, longest: int, device: torch.device) -> Store:
    """Draw random examples with the lengths of a task's."""
    rng = np.random.default_rng(0)
    if task == "mlm":
        stream = rng.integers(5, vocabulary, count * (longest - 2), dtype=np.int32)
        return Corpus(stream, "random", (101, 102), longest, device)
    mean, spread = LENGTHS.get(task, (longest, 0.0))
    lengths = rng.lognormal(math.log(mean) - spread**2 / 2, spread, count).round().clip(3, longest).astype(np.int64)
    ids = rng.integers(5, vocabulary, lengths.sum(), dtype=np.int32)
    labels = rng.integers(0, 2, (count, 2) if task == "squad" else count)
    return TokenStore(Tokens(ids, np.zeros(len(ids), np.uint8), lengths), labels, device)


# ---- ours ----


def eager(case: Case) -> TrainStep:
    """Build the package's step."""
    return packed_step(case)[1]


def graphs(case: Case) -> TrainStep:
    """Build the package's step with CUDA graphs, and capture every bucket of the case."""
    return captured(case, packed_step(case, Recorder(required=True))[1])


def packed_step(case: Case, recorder: Recorder | None = None) -> tuple[Step, TrainStep]:
    """Build the package's step, as a `Step` and as a function."""
    net = copy.deepcopy(case.net)
    case.mask.apply(dict(net.named_parameters()))
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    step = Step(lambda batch: case.task.loss(net, batch), params, case.cfg.train, case.mask, case.device, recorder)
    return step, on_batches(case, step, partial(case.task.augment_batch, seed=0))


def on_batches(case: Case, step: Step, augment_batch: Callable[[Batch, int], Batch]) -> TrainStep:
    """Let `step` take the case's batches."""
    cfg = case.cfg.train
    bucketed = step.graphs is not None
    batches = Batches(case.store, cfg.batch_size, 0, bucketed=bucketed, augment_batch=augment_batch, grad_accum=cfg.grad_accum)
    return lambda i: step(batches.parts(i), cfg.lr)


def captured(case: Case, step: TrainStep) -> TrainStep:
    """Take a step with CUDA graphs twice on each batch of the case, so that every bucket is captured; returns it."""
    take_steps(step, [*range(len(case.store) // case.cfg.train.batch_size)] * 2)
    return step


# ---- mask training ----


def mask_training(objective: str, case: Case) -> TrainStep:
    """Build a step that trains a mask (`--method mask-training`), with CUDA graphs on a GPU."""
    cfg = build({"task": case.task.name, "method": "mask_training", "objective": objective, "sparsity": case.mask.sparsity})
    cfg, settings = replace(cfg, max_length=case.cfg.max_length), cast(Settings, cfg.settings)
    train = replace(cfg.train, batch_size=case.cfg.train.batch_size, precision=case.cfg.train.precision)
    net = copy.deepcopy(case.net)
    student = MaskedNetwork(net, oneshot(net, settings.sparsity, settings.mask_init, 0, "tensor", settings.prunable))
    step = Step(
        lambda batch: mask_loss(cfg, settings, case.task, student, batch),
        student.params(head=objective != "kd"),
        train,
        None,
        case.device,
        Recorder(required=True) if case.device.type == "cuda" else None,
        optimizer=settings.optimizer,
    )
    augment = (lambda batch, i: batch) if objective == "kd" else partial(case.task.augment_batch, seed=0)
    taken = on_batches(case, step, augment)
    return captured(case, taken) if step.graphs else taken


# ---- the released code's ----


def released(case: Case) -> TrainStep:
    """Build the step of the released loop, ported to current torch and transformers.

    A DataLoader of padded examples, torch.nn.utils.prune's hooks, eager attention, loss.item() every step, AdamW tensor by
    tensor, no deterministic algorithms.
    """
    net, cfg, device = copy.deepcopy(case.net), case.cfg, case.device
    net.set_attn_implementation("eager")
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Dropout):
                setattr(parent, name, nn.Dropout(child.p))
    for name, kept in case.mask.items():
        torch_prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", kept.to(device))
    data = padded_data(case)
    loader = DataLoader(data, sampler=RandomSampler(data), batch_size=cfg.train.batch_size)

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (cfg.train.weight_decay, 0.0)]
    for name, p in net.named_parameters():
        groups["bias" in name or "LayerNorm" in name]["params"].append(p)
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.lr, eps=1e-8, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    batches = forever()

    def step(_: int) -> float:
        with nondeterministic():
            ids, types, attended, labels = (tensor.to(device) for tensor in next(batches))
            with autocast(case.precision, device):
                loss = hugging_face_loss(net, case.task, labels, input_ids=ids, token_type_ids=types, attention_mask=attended)
            scaler.scale(loss).backward()
            value = loss.item()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), cfg.train.max_grad_norm, foreach=False)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            net.zero_grad()
        return value

    return step


SIDES = {"eager": eager, "graphs": graphs, "released": released}
OBJECTIVES = ("mlm", "kd", "mlm+kd")  # of mask training


def padded_data(case: Case) -> TensorDataset:
    """Return the examples on the host, padded to --max-length: ids, token types, attention masks, labels."""
    count, longest = len(case.store), case.cfg.max_length
    packed = case.store.batch(torch.arange(count))
    places = (packed.rows * longest + packed.position_ids[0]).cpu()
    inputs = torch.zeros(3, count * longest, dtype=torch.long)
    for at, values in enumerate((packed.input_ids[0], packed.token_type_ids[0], torch.ones_like(packed.rows))):
        inputs[at, places] = values.cpu()
    labels = packed.labels.cpu() if len(packed.labels) == count else torch.zeros(count)  # MLM draws its own
    return TensorDataset(*inputs.view(3, count, longest), labels)


def hugging_face_loss(net: Net, task: Task, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Compute the loss as the released scripts do: by transformers, on all positions, padding included."""
    if isinstance(task, Squad):
        return net(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    if isinstance(task, Mlm):
        ids = inputs["input_ids"]
        chosen, kind = (torch.rand(ids.shape, device=ids.device) for _ in range(2))
        shown = torch.where(kind < MASKED, task.mask_id, torch.randint_like(ids, task.vocabulary))
        shown = torch.where((chosen < MASK_RATE) & (kind < MASKED + RANDOM), shown, ids)
        return net(**inputs | {"input_ids": shown}, labels=ids.masked_fill(chosen >= MASK_RATE, -100)).loss
    assert isinstance(task, Glue)
    return task.loss_of(net(**inputs).logits.float(), labels)


@contextlib.contextmanager
def nondeterministic() -> Iterator[None]:
    """Allow nondeterministic algorithms within the context."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)
