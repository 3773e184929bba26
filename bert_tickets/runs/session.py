"""What a method works with: a network, a task's data and the run directory, behind operations on whole levels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bert_tickets.config import Config
from bert_tickets.data.batches import Batches, Store
from bert_tickets.errors import Diverged, UserError
from bert_tickets.files import file_sha256, read_facts, sha256_of, sync_folder
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.loading import save_plain
from bert_tickets.modeling.parameters import (
    WORD_EMBEDDINGS,
    encoder_weights,
    head_weights,
    prunable,
    set_parameters,
    untie_decoder,
)
from bert_tickets.runs.directory import results
from bert_tickets.runs.train_log import TrainLog
from bert_tickets.runs.writer import LevelCheckpoint, Run
from bert_tickets.tasks import Task
from bert_tickets.training.cuda_graphs import Recorder, recorder
from bert_tickets.training.device import prepare_device, set_tf32
from bert_tickets.training.distributed import joined
from bert_tickets.training.evaluate import evaluate
from bert_tickets.training.hooks import At, CheckFinite, Checkpoint, LossCurve, ProgressBar
from bert_tickets.training.loop import Hook, Loop, total_steps, train
from bert_tickets.training.step import Loss, precision_of

# What of a model's configuration, beside the shapes of its weights, the result depends on.
ARCHITECTURE = ("num_attention_heads", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")


@dataclass
class Session:
    """A run under way: the network on its device, the task's data beside it, and the run directory."""

    run: Run
    net: Net
    task: Task
    batches: Batches
    evals: Mapping[str, Store]
    tokenizer: Any
    recorder: Recorder | None = None
    previous: Mask | None = field(default=None, init=False)  # the mask of the level before

    @property
    def cfg(self) -> Config:
        return self.run.cfg

    @property
    def steps(self) -> int:
        """Optimization steps of a level."""
        return total_steps(self.cfg.train, self.batches.per_epoch)

    # ---- levels ----

    def finished(self, level: int) -> bool:
        """Whether a level is finished: it is never trained again."""
        return level < self.run.done

    def restore(self, level: int) -> Mask:
        """A finished level's mask, on the device. Of the newest level also the trained weights, into the network."""
        if level == self.run.done - 1:
            set_parameters(self.net, self.run.read_weights(), self.run.level_dir(level))
        self.previous = self.run.read_mask(level).to(self.batches.store.device)
        return self.previous

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state at the end of the newest finished level, where it was kept."""
        return self.run.read_weights("moments")

    def keep_at(self, step: int) -> Hook:
        """A hook that keeps the weights that step `step` begins with, for `kept_weights`."""
        described = f"{self.cfg.task} trained to step {step}, seed {self.cfg.train.seed}"
        return At(step, lambda: self.run.write_rewind(dict(self.net.named_parameters()), described))

    def kept_weights(self) -> dict[str, Tensor]:
        """The weights that `keep_at` kept."""
        return self.run.read_rewind()

    def train_level(
        self,
        level: int,
        mask: Mask,
        *,
        start: int = 0,
        schedule: Callable[[int], float] | None = None,
        moments: Mapping[str, Tensor] | None = None,
        keep_moments: bool = False,
        hooks: Sequence[Hook] = (),
        loss: Loss | None = None,
        params: Mapping[str, Tensor] | None = None,
        optimizer: str = "adamw",
        info: Mapping[str, str] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        """Train and evaluate the network as it stands under `mask`, and write the level's folder.

        Arguments are as for `training.loop.train`; the loss is the task's, and what is trained are the network's parameters,
        unless given. `info` joins the metadata of the mask file, `warnings` the level's.
        """
        net, cfg = self.net, self.cfg
        init_sha256, title = sha256_of(encoder_weights(net)), self._title(level, mask)
        with TrainLog(self.run.dir, level, enabled=self.run.group.rank == 0) as log:
            curve = LossCurve(cfg.train.log_every, log.append)
            own = [curve, *hooks]
            checkpoint = Checkpoint(LevelCheckpoint(self.run, level), own, cfg.train.save_minutes, cfg.train.save_steps)
            net.train()
            try:
                loop = train(
                    loss or (lambda batch: self.task.loss(net, batch)),
                    params or {name: p for name, p in net.named_parameters() if p.requires_grad},
                    self.batches,
                    cfg.train,
                    mask=mask,
                    schedule=schedule,
                    optimizer=optimizer,
                    start=start,
                    moments=moments,
                    hooks=[*own, CheckFinite(), checkpoint, ProgressBar(title, curve, self._note())],
                    recorder=self.recorder,
                    group=self.run.group,
                )
                if self.run.group.world_size > 1:
                    self.run.group.check_same({"trained weights": sha256_of(dict(net.named_parameters()))})
                metrics, said = self._evaluate()
            except Diverged as error:
                self.run.fail(level, error, title)
        print(f"{title}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
        skipped = loop.steps - loop.start - loop.step.taken(moments)
        warnings = [*warnings, *said, *_mask_warnings(mask), *_skip_warnings(skipped, loop)]
        for warning in warnings:
            print(f"{title}: {warning}", flush=True)
        result = self._result(mask, metrics, warnings) | {
            "steps": loop.steps - loop.start,
            "skipped_steps": skipped,
            "losses": curve.losses,
            "init_sha256": init_sha256,
            "seconds": loop.seconds,
        }
        kept = loop.step.moments() if keep_moments else {}
        write_model = self._write_model if cfg.keep_models else None
        labelled = Mask(dict(mask), {**mask.info, **self._origin(level), **(info or {})})
        self.run.finish(level, result, labelled, dict(net.named_parameters()), kept, write_model)
        self.previous = mask

    # ---- of a level ----

    def _title(self, level: int, mask: Mask) -> str:
        name = f"level {level}/{self.run.levels - 1}" if self.run.levels > 1 else self.cfg.method
        return f"{name}, {mask.sparsity:.0%} pruned"

    def _note(self) -> dict[str, float | None]:
        """What the progress bar shows beside the loss: the last level's metric."""
        last = results(self.run.dir)[-1:] if self.run.group.rank == 0 else []
        return {f"last {line['metric']}": line["metrics"][line["metric"]] for line in last}

    def _evaluate(self) -> tuple[dict[str, float], list[str]]:
        """The task's metrics on all its evaluation sets, and its warnings about them."""
        net, task = self.net, self.task
        outputs = {
            name: evaluate(
                net, lambda batch: task.predict(net, batch), store, self.cfg.train.precision, task.rows, self.run.group
            )
            for name, store in self.evals.items()
        }
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                raise Diverged(f"the network's predictions on {name} are not finite")
        metrics = task.compute_metrics(outputs, self.evals)
        if self.cfg.check_metrics:
            print(task.compare_with_evaluate(outputs, self.evals, metrics))
        return metrics, task.warnings(outputs, self.evals)

    def _result(self, mask: Mask, metrics: Mapping[str, float], warnings: list[str]) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "method": self.cfg.method,
            "metric": self.task.metric,
            "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},  # JSON has no NaN
            "warnings": warnings,
            "sparsity": mask.sparsity,
            "kept": mask.kept,
            "total": mask.total,
            "mask_distance": mask.distance(self.previous) if self.previous is not None else 0.0,
            "mask_sha256": mask.sha256(),
        }

    def _origin(self, level: int) -> dict[str, Any]:
        """Where a mask was found, for its file. A given mask keeps what its own file says."""
        if getattr(self.cfg.settings, "mask", None) is not None:
            return {}
        cfg = self.cfg
        own = {"base_model": cfg.model, "task": cfg.task, "seed": cfg.train.seed, "method": cfg.method}
        return own | {"level": level, "run": self.run.dir.name}

    def _write_model(self, folder: Path) -> dict[str, str]:
        """Write the network and its tokenizer as a Hugging Face folder; returns the sha256 of its files."""
        save_plain(self.net, folder)
        self.tokenizer.backend_tokenizer.no_truncation()  # otherwise it is saved as the last call left it
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def _mask_warnings(mask: Mask) -> list[str]:
    empty = [name for name, kept in mask.items() if not kept.any()]
    named = ", ".join(empty[:3]) + f" and {len(empty) - 3} more" * (len(empty) > 3)
    return [f"nothing is left of {named}; --scope tensor ranks each matrix by itself"] if empty else []


def _skip_warnings(skipped: int, loop: Loop) -> list[str]:
    many = skipped > 0.1 * (loop.steps - loop.start)
    return [f"fp16 gradients overflowed in {skipped} of {loop.steps - loop.start} steps, which changed nothing"] * many


@contextmanager
def opened(cfg: Config) -> Iterator[Run]:
    """The run directory of a configuration, held; together with the other processes that torchrun started."""
    with joined(cfg.device) as group, Run(cfg, group) as run:
        yield run


def prepare(task: Task, run: Run) -> Session:
    """Load the model and the data onto the device, and record what they are."""
    cfg, group = run.cfg, run.group
    device = prepare_device(cfg.device, group.local_rank)
    precision = precision_of(cfg.train.precision, device)
    set_tf32(cfg.train.tf32, precision, device)
    graphs = recorder(cfg.train.graphs, device, group.world_size)
    if cfg.train.batch_size < group.world_size * cfg.train.grad_accum:
        raise UserError(
            f"--batch-size {cfg.train.batch_size} cannot be divided into {group.world_size * cfg.train.grad_accum} parts"
        )
    net, tokenizer = task.load_net(cfg)
    limit = net.config.max_position_embeddings
    if cfg.max_length > limit:
        raise UserError(f"--max-length {cfg.max_length}: {cfg.model} has positions for {limit} tokens")
    if cfg.task == "mlm" and WORD_EMBEDDINGS in prunable(net, getattr(cfg.settings, "prunable", "matrices")):
        untie_decoder(net)
    train_set, evals = group.main_first(lambda: task.load_data(cfg, tokenizer, device))
    batches = Batches(
        train_set,
        cfg.train.batch_size,
        cfg.train.seed,
        bucketed=graphs is not None,
        augment_batch=lambda batch, step: task.augment_batch(batch, step, cfg.train.seed),
        grad_accum=cfg.train.grad_accum,
        rank=group.rank,
        world_size=group.world_size,
    )
    run.describe(
        {
            "device": device.type,
            "precision": precision,
            "model": sha256_of(encoder_weights(net)),
            "init": read_facts(Path(cfg.init)) if cfg.init not in ("pretrained", "random") else None,
            "head": sha256_of(head_weights(net)),
            "architecture": {key: value for key, value in net.config.to_dict().items() if key in ARCHITECTURE},
            "train": {"examples": len(train_set), "tokens": int(train_set.lengths.sum()), "sha256": train_set.sha256},
            "evaluation": {name: {"examples": len(store), "sha256": store.sha256} for name, store in evals.items()},
        }
    )
    net.to(device)
    return Session(run, net, task, batches, evals, tokenizer, graphs)
