"""A session for methods: network, data and run directory, with operations on whole levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bert_tickets.config import Config, Execution
from bert_tickets.data.batches import Batches, Store
from bert_tickets.errors import Diverged
from bert_tickets.files import file_sha256, sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.loading import save_model
from bert_tickets.modeling.packing import Batch
from bert_tickets.modeling.parameters import encoder_weights, set_parameters
from bert_tickets.modeling.slim import removed_units, slimmed
from bert_tickets.modeling.units import emptied_layers, read_units, sizes
from bert_tickets.runs.checkpoint import Checkpoint
from bert_tickets.runs.directory import level_dir
from bert_tickets.runs.train_log import train_log
from bert_tickets.runs.writer import Run
from bert_tickets.tasks import Task
from bert_tickets.training.cuda_graphs import Recorder
from bert_tickets.training.evaluate import evaluate
from bert_tickets.training.hooks import At, Evaluations, LossCurve, ProgressBar, check_finite
from bert_tickets.training.loop import Hook, Loop, total_steps, train
from bert_tickets.training.step import Loss

Predict = Callable[[Batch], Tensor]


@dataclass
class Session:
    """The network and the task's data on their device, and the run directory."""

    run: Run
    net: Net
    task: Task
    batches: Batches
    evals: Mapping[str, Store]
    tokenizer: Any
    base_model: str  # its name on the hub, or the fingerprint of its folder
    recorder: Recorder | None = None
    previous: Mask | None = field(default=None, init=False)  # the previous level's mask

    @property
    def cfg(self) -> Config:
        return self.run.cfg

    @property
    def steps(self) -> int:
        """Optimization steps of a level."""
        return total_steps(self.cfg.train, self.batches.per_epoch)

    # ---- levels ----

    def finished(self, level: int) -> bool:
        """Return whether a level is finished; if so, it is not trained again."""
        return level < self.run.done

    def restore(self, level: int) -> Mask:
        """Load a finished level's mask onto the device; for the newest level also its trained weights into the network."""
        if level == self.run.done - 1:
            set_parameters(self.net, self.run.read("weights.safetensors", level), level_dir(self.run.dir, level))
        self.previous = self.run.read_mask(level).to(self.batches.store.device)
        return self.previous

    def moments(self) -> dict[str, Tensor]:
        """Read AdamW's state at the end of the newest finished level, if it was kept."""
        return self.run.read("moments.safetensors", self.run.done - 1)

    def save_weights_at(self, step: int) -> Hook:
        """Make a hook that saves the weights before step `step`, for `saved_weights`."""
        facts = {"rewound": f"{self.cfg.task} trained to step {step}, seed {self.cfg.train.seed}"}
        return At(step, lambda: self.run.write("rewind.safetensors", dict(self.net.named_parameters()), facts))

    def saved_weights(self) -> dict[str, Tensor]:
        """Read the weights that `save_weights_at` saved."""
        return self.run.read("rewind.safetensors")

    def train_level(
        self,
        level: int,
        mask: Mask,
        *,
        execution: Execution = "masked",
        loss: Loss | None = None,
        params: Mapping[str, Tensor] | None = None,
        leaves: Mapping[str, Tensor] | None = None,
        predict: Predict | None = None,
        found: Callable[[], tuple[Mask, dict[str, Any]]] | None = None,
        after: Callable[[Mask], None] = lambda mask: None,
        results: Mapping[str, Any] | None = None,
        files: Mapping[str, Callable[[Path], None]] | None = None,
        hooks: Sequence[Hook] = (),
        warnings: Sequence[str] = (),
        **training: Any,
    ) -> None:
        """Train and evaluate the network under `mask`, and write the level's folder.

        Default: the task's loss and predictions, and all parameters of the network with `requires_grad`; `leaves` are trained
        beside these. With `found` the mask is what is trained: gradients are not masked, and after training it masks the network,
        and returns its mask and further results. `after` is called with the mask after the evaluation, and may change what is
        written of the network. `results` join the level's, and `files`, functions of a path, write files of the level's folder.
        With `execution` slim, heads and neurons that `mask` prunes whole are removed until the level is evaluated, also when
        `found` is called. AdamW's state is then of the narrower tensors: only for methods that reset it.
        `warnings` join the level's. Further arguments are those of `training.loop.train`: `batches`, `start`, `steps`,
        `schedule`, `moments`, `optimizer`.
        """
        net, title, init_sha256 = self.net, self._title(level, mask), sha256_of(encoder_weights(self.net))
        loss, predict = loss or (lambda batch: self.task.loss(net, batch)), predict or self._predict_task
        more: dict[str, Any] = dict(results or {})
        more |= {"removed": self._removed(mask, title)} if execution == "slim" else {}
        try:
            with slimmed(net, mask) if execution == "slim" else nullcontext(mask) as left:
                params = {**(params or {n: p for n, p in net.named_parameters() if p.requires_grad}), **(leaves or {})}
                of = (level, title, hooks, loss, params, predict)
                loop, losses, evaluations = self._train(*of, mask=None if found else left, **training)
                if found:
                    mask, facts = found()
                    more |= facts
                    title = self._title(level, mask)
                more["seconds"] = loop.seconds  # without the evaluation
                metrics, noticed = self._evaluate(predict)
        except Diverged as error:
            self.run.fail(level, error, title)
        after(mask)
        more |= {"init_sha256": sha256_of(encoder_weights(net)) if found else init_sha256}  # if found: of the ticket, m * theta
        print(f"{title}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
        steps, skipped = loop.steps - loop.start, loop.steps - loop.start - loop.step.taken(training.get("moments"))
        warnings = [*warnings, *noticed, *_mask_warnings(mask), *_skip_warnings(skipped, steps)]
        print(*(f"{title}: {warning}\n" for warning in warnings), sep="", end="", flush=True)
        result = self._result(mask, metrics, warnings) | {"steps": steps, "skipped_steps": skipped, "losses": losses}
        result |= more
        if self.cfg.eval_steps:
            evaluations.append({"step": loop.at, "metrics": result["metrics"]})
            result |= {"evaluations": evaluations, "best": _best(evaluations, self.task.metric)}
        self._finish(level, result, mask, loop, files or {})

    # ---- parts of a level ----

    def _finish(
        self, level: int, result: dict[str, Any], mask: Mask, loop: Loop, files: Mapping[str, Callable[[Path], None]]
    ) -> None:
        """Write the level's folder."""
        labelled = Mask(dict(mask), {**mask.info, **self._origin(level)})
        moments = {} if self.cfg.settings.reset_optimizer else loop.step.moments()
        write_model = self._write_model if self.cfg.keep_models else None
        self.run.finish(level, result, labelled, dict(self.net.named_parameters()), moments, write_model, files)
        self.previous = mask

    def _train(
        self,
        level: int,
        title: str,
        hooks: Sequence[Hook],
        loss: Loss,
        params: Mapping[str, Tensor],
        predict: Predict,
        **training: Any,
    ) -> tuple[Loop, list[tuple[int, float]], list[dict[str, Any]]]:
        """Train with the hooks of every level. Returns the final loop, the loss curve, and the evaluations within the level."""
        cfg, group = self.cfg.train, self.run.group
        with train_log(self.run.dir, level) if group.rank == 0 else nullcontext(lambda line: None) as append:
            curve = LossCurve(cfg.log_every, append)
            n, evaluate = self.cfg.eval_steps, lambda: _json(self._evaluate(predict)[0])
            evaluations = [Evaluations(n, evaluate, append)] if n else []
            own = [*hooks, curve, *evaluations]  # a hook may end the loop, and the curve ends with it
            checkpoint = Checkpoint(self.run, level, own, cfg.save_minutes, cfg.save_steps)
            every = [*own, checkpoint, ProgressBar(title, curve)]
            self.net.train()
            batches = training.pop("batches", self.batches)
            loop = train(loss, params, batches, cfg, hooks=every, recorder=self.recorder, group=group, **training)
        check_finite(loop)
        if group.world_size > 1:
            group.check_same({"trained weights": sha256_of(dict(self.net.named_parameters()) | loop.step.params)})
        return loop, curve.losses, [found for hook in evaluations for found in hook.found]

    def _removed(self, mask: Mask, title: str) -> dict[str, int]:
        """Count the units that slim execution removes, and print them."""
        removed, config = removed_units(self.net, mask), self.net.config
        of = {"heads": config.num_attention_heads, "neurons": config.intermediate_size}
        parts = [f"{count} of {config.num_hidden_layers * of[kind]} {kind}" for kind, count in removed.items()]
        print(f"{title}: without {' and '.join(parts)}", flush=True)
        return removed

    def _title(self, level: int, mask: Mask) -> str:
        name = f"level {level}/{self.run.levels - 1}" if self.run.levels > 1 else self.cfg.method
        return f"{name}, {mask.sparsity:.0%} pruned"

    def evaluate(self, predict: Callable[[Batch], Tensor]) -> dict[str, float | None]:
        """Compute the task's metrics of predictions on all its evaluation sets; None for those that are not finite."""
        return _json(self.task.compute_metrics(self._predict(predict), self.evals))

    def save_mask(self, mask: Mask, step: int) -> None:
        """Save the mask of a step within level 0, as a file that `--mask` takes."""
        path = self.run.dir / "masks" / f"step_{step:07d}.safetensors"

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            mask.write(path, **self._origin(0), step=step)

        self.run.group.on_main(write)

    def _predict(self, predict: Callable[[Batch], Tensor]) -> dict[str, np.ndarray]:
        """Compute the predictions for all evaluation sets. Raises `Diverged` if they are not finite."""
        precision, rows, group = self.cfg.train.precision, self.task.rows, self.run.group
        outputs = {name: evaluate(self.net, predict, store, precision, rows, group) for name, store in self.evals.items()}
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                raise Diverged(f"the network's predictions on {name} are not finite")
        return outputs

    def _predict_task(self, batch: Batch) -> Tensor:
        return self.task.predict(self.net, batch)

    def _evaluate(self, predict: Predict) -> tuple[dict[str, float], list[str]]:
        """Compute the task's metrics of predictions on all its evaluation sets, and its warnings about them."""
        task, outputs = self.task, self._predict(predict)
        metrics = task.compute_metrics(outputs, self.evals)
        if self.cfg.check_metrics:
            print(task.compare_with_evaluate(outputs, self.evals, metrics))
        return metrics, task.warnings(outputs, self.evals)

    def _result(self, mask: Mask, metrics: Mapping[str, float], warnings: list[str]) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "method": self.cfg.method,
            "metric": self.task.metric,
            "metrics": _json(metrics),
            "warnings": warnings,
            "sparsity": mask.sparsity,
            "kept": mask.kept,
            "total": mask.total,
            "mask_distance": mask.distance(self.previous) if self.previous is not None else 0.0,
            "mask_sha256": mask.sha256(),
            "sizes": sizes(mask, dict(self.net.named_parameters())),
        }

    def _origin(self, level: int) -> dict[str, Any]:
        """Return the origin of a mask, for its file. A given mask keeps that of its file."""
        if self.cfg.settings.mask is not None:
            return {}
        cfg = self.cfg
        own = {"base_model": self.base_model, "task": cfg.task, "seed": cfg.train.seed, "method": cfg.method}
        return own | {"level": level, "run": self.run.dir.name}

    def _write_model(self, folder: Path) -> dict[str, str]:
        """Write the network and its tokenizer as a Hugging Face folder; returns the sha256 of its files."""
        save_model(self.net, self.tokenizer, folder)
        return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def _json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN


def _best(evaluations: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Return the evaluation with the highest metric, the first of equal ones; the last one if it is undefined in all."""
    defined = [found for found in evaluations if found["metrics"][metric] is not None]
    return max(defined, key=lambda found: found["metrics"][metric], default=evaluations[-1])


def _mask_warnings(mask: Mask) -> list[str]:
    if "units" in mask.info:
        return emptied_layers(read_units(mask))
    empty = [name for name, kept in mask.items() if not kept.any()]
    named = ", ".join(empty[:3]) + f" and {len(empty) - 3} more" * (len(empty) > 3)
    return [f"nothing is left of {named}; --scope tensor ranks each matrix by itself"] if empty else []


def _skip_warnings(skipped: int, steps: int) -> list[str]:
    return [f"fp16 gradients overflowed in {skipped} of {steps} steps, which changed nothing"] * (skipped > 0.1 * steps)
