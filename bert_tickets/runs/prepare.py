"""Load the model and the data of a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from bert_tickets import kernels
from bert_tickets.config import Config
from bert_tickets.content import fingerprint
from bert_tickets.data.batches import Batches
from bert_tickets.errors import UserError
from bert_tickets.files import has_facts, read_facts, read_tensors, sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.parameters import WORD_EMBEDDINGS, encoder_weights, head_weights, prunable, untie_decoder
from bert_tickets.modeling.slim import executed_units
from bert_tickets.runs.directory import run_dir
from bert_tickets.runs.session import Session
from bert_tickets.runs.writer import Run
from bert_tickets.tasks import Task
from bert_tickets.training.cuda_graphs import recorder
from bert_tickets.training.device import prepare_device, set_tf32
from bert_tickets.training.step import precision_of

# The fields of a model's configuration, beside the shapes of its weights, that affect the result.
ARCHITECTURE = ("num_attention_heads", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")


def prepare(task: Task, run: Run) -> Session:
    """Load the model and the data onto the device, and record them in run.json."""
    cfg, group = run.cfg, run.group
    device = prepare_device(cfg.device, group.local_rank)
    precision = precision_of(cfg.train.precision, device)
    set_tf32(cfg.train.tf32, precision, device)
    parts = group.world_size * cfg.train.grad_accum
    graphs = recorder(cfg.train.graphs, device, parts)
    if cfg.train.batch_size < parts:
        raise UserError(f"--batch-size {cfg.train.batch_size} cannot be divided into {parts} parts")
    net, tokenizer = _load_net(task, cfg)
    train_set, evals = group.main_first(lambda: task.load_data(cfg, tokenizer, device))
    fingerprints = {  # they must not change when a run is resumed
        "device": device.type,
        "precision": precision,
        "kernels": precision != "fp32" and kernels.usable(device),  # they draw other numbers for dropout than torch's operators
        "model": sha256_of(encoder_weights(net)),
        "init": _init_facts(cfg.init),
        "head": sha256_of(head_weights(net)),
        "architecture": {key: value for key, value in net.config.to_dict().items() if key in ARCHITECTURE},
        "train": {"examples": len(train_set), "tokens": int(train_set.lengths.sum()), "sha256": train_set.sha256},
        "evaluation": {name: {"examples": len(store), "sha256": store.sha256} for name, store in evals.items()},
    }
    if group.on_main(lambda: run_dir(cfg)) != run.dir:
        raise UserError("the model, the data, or another file changed while it was read; give the command again")
    run.describe(fingerprints)
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
    net.to(device)
    base_model = group.on_main(lambda: fingerprint(cfg.model))
    return Session(run, net, task, batches, evals, tokenizer, base_model, graphs)


def _load_net(task: Task, cfg: Config) -> tuple[Net, Any]:
    """Load the network and its tokenizer. If masks cover the word embeddings, untie the MLM decoder. Raises `UserError`."""
    net, tokenizer = task.load_net(cfg)
    limit = net.config.max_position_embeddings
    if cfg.max_length > limit:
        raise UserError(f"--max-length {cfg.max_length}: {cfg.model} has positions for {limit} tokens")
    if (trained := cfg.settings.weights) is not None and not Path(trained).is_file():
        raise UserError(f"--weights {trained}: no such file; give the level_NN/weights.safetensors of a finished run")
    covered: Collection[str] = prunable(net, cfg.settings.prunable)
    if cfg.settings.mask is not None:
        covered = mask = Mask.load(cfg.settings.mask)
        mask.check_fits(dict(net.named_parameters()), "the model", partly=True)
        if cfg.settings.execution == "slim" and all(kept.all() for kept in executed_units(net, mask).values()):
            raise UserError(
                f"--execution slim has no effect: {cfg.settings.mask} prunes no head, and no 8 neurons of a layer, whole"
            )
    if WORD_EMBEDDINGS in covered and cfg.task == "mlm":
        untie_decoder(net)
    return net, tokenizer


def _init_facts(init: str) -> dict[str, Any] | None:
    """Read the metadata of an --init file that this package wrote. Raises `Damaged` if its checksum does not match."""
    if init in ("pretrained", "random") or not has_facts(Path(init)):
        return None
    read_tensors(Path(init))
    return read_facts(Path(init))
