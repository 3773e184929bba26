"""The experiments: iterative magnitude pruning with rewinding, one ticket trained, one-shot pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bert_tickets import Diverged, UserError
from bert_tickets.batches import Batches, Store, seeded
from bert_tickets.bert import Net
from bert_tickets.config import Config
from bert_tickets.device import prepare_device, set_tf32
from bert_tickets.files import read_facts
from bert_tickets.graphs import Recorder, recorder
from bert_tickets.levels import Level
from bert_tickets.mask import Mask
from bert_tickets.models import digest, encoder_weights, prunable, rewind, snapshot
from bert_tickets.prune import Scope, magnitude, prune, random_scores
from bert_tickets.ranks import joined
from bert_tickets.report import print_levels
from bert_tickets.runs import Run
from bert_tickets.step import precision_of
from bert_tickets.tasks import Task
from bert_tickets.train import Result, evaluate, total_steps, train

# What of a model's configuration, beside its weights' shapes, the result depends on.
ARCHITECTURE = ("num_attention_heads", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")


@dataclass
class Setup:
    """All that an experiment works with: a network on its device, and the task's data beside it."""

    net: Net
    task: Task
    cfg: Config
    batches: Batches
    evals: Mapping[str, Store]
    tokenizer: Any
    recorder: Recorder | None = None

    @property
    def steps(self) -> int:
        """Optimisation steps of a level."""
        return total_steps(self.cfg.train, self.batches.per_epoch)


def run_task(task: Task, cfg: Config, preset: str) -> None:
    """What a training script does: find a ticket, or train the given one, in its run directory; then print its levels."""
    with joined(cfg.device) as ranks, Run(cfg, preset, ranks) as run:
        if not run.complete:
            mask = Mask.load(cfg.mask) if cfg.mask else None  # a bad file is met before the model is loaded
            setup = prepare(task, cfg, run)
            if mask is None:
                imp(setup, run)
            else:
                finetune(setup, run, mask)
        if ranks.rank == 0:
            print_levels(cfg, preset)


def imp(setup: Setup, run: Run) -> Mask:
    """Iterative magnitude pruning with rewinding to the pre-trained weights (Chen et al. 2020, Algorithm 1)."""
    net, cfg = setup.net, setup.cfg
    theta0, mask = snapshot(net), Mask.ones(prunable(net))  # a snapshot clones: a state_dict only aliases
    theta = theta0
    i = cfg.rewind_step(setup.steps)
    for level, fraction in enumerate(cfg.fractions):
        if run.finished(level):  # never train a finished level again
            mask = run.restore(level, net).to(setup.batches.store.device)
            continue
        if level > 0 and i > 0:
            theta = run.load_rewind()  # theta_i, which level 0 passed and left behind
        if level == 1 and cfg.prune_first:  # level 0 was for comparison only
            rewind(net, theta0, mask)
        before, mask = mask, prune(mask, magnitude(prunable(net)), fraction, cfg.scope)  # by what the last level trained
        if cfg.rewind == "none":
            mask.apply(prunable(net))
        else:
            rewind(net, theta, mask, head=cfg.rewind_head)
        carried = run.moments() if level > cfg.prune_first and not cfg.resets_optimizer else None
        fit(setup, run, level, mask, before, start=i if level else 0, moments=carried)
    return mask


def finetune(setup: Setup, run: Run, mask: Mask) -> None:
    """Train one given ticket on the task: TRANSFER(source, target), or a row of Table 2."""
    params, matrices = dict(setup.net.named_parameters()), prunable(setup.net)
    mask.check_fits({name: p for name, p in params.items() if name in matrices or name in mask}, "the model")
    if mask.info.get("base_model", setup.cfg.model) != setup.cfg.model:
        print(f"the mask was found on {mask.info['base_model']}, and trains {setup.cfg.model}: are they the same weights?")
    if not run.finished(0):
        mask.apply(params)
        fit(setup, run, 0, mask, mask)


def oneshot(net: Net, rate: float, method: str, seed: int, scope: Scope = "global") -> Mask:
    """Remove `rate` of the prunable weights at once: by the magnitude of the untrained weights, or at random."""
    weights = prunable(net)
    scores = magnitude(weights) if method == "magnitude" else random_scores(weights, seeded(seed, "random mask"))
    return prune(Mask.ones(weights), scores, rate, scope)


def fit(
    setup: Setup,
    run: Run,
    level: int,
    mask: Mask,
    before: Mask,
    start: int = 0,
    moments: Mapping[str, Tensor] | None = None,
) -> None:
    """Train and score the network as it stands under `mask`, and write the level down."""
    net, task, cfg = setup.net, setup.task, setup.cfg
    begins_at = digest(encoder_weights(net))
    keeper = Level(run, level, mask.sparsity)
    i = cfg.rewind_step(setup.steps)
    net.train()
    try:
        result = train(
            lambda batch: task.loss(net, batch),
            {name: p for name, p in net.named_parameters() if p.requires_grad},
            setup.batches,
            cfg.train,
            keeper,
            mask=mask,
            rate=cfg.learning_rate(level, setup.steps),
            start=start,
            capture=(i, lambda: run.save_rewind(net)) if level == 0 and i > 0 else None,
            moments=moments,
            recorder=setup.recorder,
        )
        if run.ranks.world > 1:
            run.ranks.need_same({"trained weights": digest(dict(net.named_parameters()))})
        metrics, doubts = score(setup)
    except Diverged as error:
        keeper.diverged(error)
    print(f"{keeper.title}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
    if result.skipped > 0.1 * result.steps:
        doubts.append(f"fp16 gradients overflowed in {result.skipped} of {result.steps} steps, which changed nothing")
    for doubt in doubts:
        print(f"{keeper.title}: {doubt}", flush=True)
    kept = {} if cfg.resets_optimizer else result.moments
    run.finish(level, net, setup.tokenizer, mask, _line(result, metrics, doubts, task, mask, before, begins_at), kept)


def score(setup: Setup) -> tuple[dict[str, float], list[str]]:
    """The task's metrics on all its evaluation sets, and what they do not say of a network that learned nothing."""
    net, task = setup.net, setup.task
    precision = setup.cfg.train.precision
    outputs = {
        name: evaluate(net, lambda batch: task.outputs(net, batch), store, precision, task.rows, setup.batches.ranks)
        for name, store in setup.evals.items()
    }
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise Diverged(f"the network's outputs on {name} are not finite")
    metrics = task.score(outputs, setup.evals)
    if setup.cfg.check_metrics:
        print(task.check(outputs, setup.evals, metrics))
    return metrics, task.doubts(outputs, setup.evals)


def _line(
    result: Result, metrics: dict[str, float], doubts: list[str], task: Task, mask: Mask, before: Mask, begins_at: str
) -> dict[str, Any]:
    return {
        "task": task.name,
        "metric": task.metric,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},  # JSON has no NaN
        "doubts": doubts,
        "sparsity": mask.sparsity,
        "kept": mask.kept,
        "total": mask.total,
        "mask_distance": mask.distance(before),
        "steps": result.steps,
        "skipped_steps": result.skipped,
        "batch_parts": result.divided,
        "losses": result.losses,
        "starts_at_sha256": begins_at,
        "mask_sha256": mask.sha256(),
        "seconds": result.seconds,
    }


def prepare(task: Task, cfg: Config, run: Run) -> Setup:
    """Load the model and the data onto the device, and write down what they are."""
    ranks = run.ranks
    device = prepare_device(cfg.device, ranks.local)
    precision = precision_of(cfg.train.precision, device)
    set_tf32(cfg.train.tf32, precision, device)
    graphs = recorder(cfg.train.graphs, device, ranks.world)
    if cfg.train.batch_size < ranks.world:
        raise UserError(f"--batch-size {cfg.train.batch_size} cannot be divided among {ranks.world} processes")
    net, tokenizer = task.load_net(cfg)
    limit = net.config.max_position_embeddings
    if cfg.max_length > limit:
        raise UserError(f"--max-length {cfg.max_length}: {cfg.model} has positions for {limit} tokens")
    train_set, evals = ranks.in_turn(lambda: task.load_data(cfg, tokenizer, device))
    seed = cfg.train.seed
    batches = Batches(
        train_set,
        cfg.train.batch_size,
        seed,
        bucketed=graphs is not None,
        alter=lambda batch, step: task.alter(batch, step, seed),
        ranks=ranks,
    )
    setup = Setup(net, task, cfg, batches, evals, tokenizer, graphs)
    cfg.rewind_step(setup.steps)
    run.describe(
        {
            "device": device.type,
            "precision": precision,
            "model": digest(encoder_weights(net)),
            "init": read_facts(Path(cfg.init)) if cfg.init not in ("pretrained", "random") else None,
            "head": digest({name: p for name, p in net.named_parameters() if name not in encoder_weights(net)}),
            "architecture": {key: value for key, value in net.config.to_dict().items() if key in ARCHITECTURE},
            "train": {"examples": len(train_set), "tokens": int(train_set.lengths.sum()), "sha256": train_set.sha256},
            "evaluation": {name: {"examples": len(store), "sha256": store.sha256} for name, store in evals.items()},
        }
    )
    net.to(device)
    return setup
