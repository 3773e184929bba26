"""The losses of ten training steps of each task, on padded batches of Hugging Face's own model or on our packed ones.

`python tests/golden.py FOLDERS` writes golden_losses.json, given the folders of conftest's fixtures calm_bert_dir, glue_dir,
squad_dir and corpus_dir. Run it only when a task or the training is meant to change, and give the reason in the commit.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from bert_tickets.config import TASKS, Config, build
from bert_tickets.data.batches import Batches
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.parameters import prunable
from bert_tickets.tasks import Task
from bert_tickets.tasks.create import create
from bert_tickets.training.step import Step

GOLDEN = Path(__file__).parent / "golden_losses.json"
STEPS = 10


def cases(bert_dir, glue_dir, squad_dir, corpus_dir) -> dict[str, tuple[Task, Config]]:
    """Return every task with small settings."""
    settings = {name: {"data_dir": str(glue_dir), "max_length": 48} for name in TASKS["glue"]}
    settings["squad"] = {"data_dir": str(squad_dir), "max_length": 100, "doc_stride": 32}
    settings["mlm"] = {"data_dir": str(corpus_dir), "max_length": 24}
    common = {"model": str(bert_dir), "batch_size": 8, "lr": 1e-3}
    return {name: (create(name), build({"task": name, **common, **own})) for name, own in settings.items()}


def losses(task: Task, cfg: Config, *, packed: bool) -> list[float]:
    """Return the losses of ten masked steps (30 % pruned)."""
    net, tokenizer = task.load_net(cfg)
    store, _ = task.load_data(cfg, tokenizer, torch.device("cpu"))
    seed = cfg.train.seed
    batches = Batches(store, cfg.train.batch_size, seed, augment_batch=lambda batch, step: task.augment_batch(batch, step, seed))
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.3)
    mask.apply(prunable(net))
    if not packed:
        net.set_attn_implementation("eager")
    loss = task.loss if packed else PADDED_LOSSES[cfg.kind]
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    step = Step(lambda batch: loss(net, batch), params, cfg.train, mask, store.device)
    net.train()
    return [step(batches.parts(i)[0], cfg.train.lr * (1 - i / STEPS)).item() for i in range(STEPS)]


def glue_loss(net, batch) -> torch.Tensor:
    logits = net(**padded(batch)).logits
    return F.cross_entropy(logits, batch.labels) if logits.shape[1] > 1 else F.mse_loss(logits[:, 0], batch.labels)


def squad_loss(net, batch) -> torch.Tensor:
    """Compute Hugging Face's loss, without the padding in its softmax."""
    inputs = padded(batch)
    found = net(**inputs)
    ignored = (inputs["attention_mask"] == 0) * -1e30
    begin, end = (F.cross_entropy(logits + ignored, batch.labels[:, i]) for i, logits in enumerate(found[:2]))
    return (begin + end) / 2


def mlm_loss(net, batch) -> torch.Tensor:
    labels = torch.full((batch.input_ids.shape[1],), -100)
    labels[batch.chosen] = batch.labels
    return net(**padded(batch), labels=labels.view(len(batch.lengths), -1)).loss


PADDED_LOSSES = {"glue": glue_loss, "squad": squad_loss, "mlm": mlm_loss}


def padded(batch) -> dict[str, torch.Tensor]:
    """Pad a packed batch to its longest example."""
    rows, longest = len(batch.lengths), batch.longest
    places = batch.rows * longest + batch.position_ids[0]

    def spread(tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(rows * longest, dtype=torch.long).index_copy(0, places, tokens[0]).view(rows, longest)

    inputs = {"input_ids": spread(batch.input_ids), "token_type_ids": spread(batch.token_type_ids)}
    return inputs | {"attention_mask": spread(torch.ones_like(batch.input_ids))}


if __name__ == "__main__":
    import sys

    found = {name: [round(x, 6) for x in losses(*case, packed=False)] for name, case in cases(*sys.argv[1:]).items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
