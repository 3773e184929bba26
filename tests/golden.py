"""Ten training steps a task, padded as Hugging Face pads or packed as we pack; `python tests/golden.py` writes the file.

Run it only when a task or the training itself is meant to change, and say in the commit why the numbers moved.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from bert_tickets.batches import Batches
from bert_tickets.config import Config, build, tasks
from bert_tickets.mask import Mask
from bert_tickets.models import prunable
from bert_tickets.prune import magnitude, prune
from bert_tickets.step import Step
from bert_tickets.tasks.glue import Glue

GOLDEN = Path(__file__).parent / "golden_losses.json"
STEPS = 10


def losses(cfg: Config, *, packed: bool) -> list[float]:
    """The losses of ten masked steps (30 % pruned)."""
    cfg = replace(cfg, max_length=48, train=replace(cfg.train, batch_size=8, lr=1e-3))
    task = Glue(cfg.task)
    net, tokenizer = task.load_net(cfg)
    store, _ = task.load_data(cfg, tokenizer, torch.device("cpu"))
    batches = Batches(store, cfg.train.batch_size, cfg.train.seed)
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.3)
    mask.apply(prunable(net))
    if not packed:
        net.set_attn_implementation("eager")

    def logits(batch):
        return task.outputs(net, batch) if packed else net(**padded(batch)).logits

    step = Step(
        lambda batch: task.loss_of(logits(batch), batch.labels), dict(net.named_parameters()), cfg.train, mask, store.device
    )
    net.train()
    return [step(batches[i], cfg.train.lr * (1 - i / STEPS)).item() for i in range(STEPS)]


def padded(batch) -> dict[str, torch.Tensor]:
    """A packed batch, padded to its longest example."""
    rows, longest = len(batch.lengths), batch.longest
    places = batch.rows * longest + batch.position_ids[0]

    def spread(tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(rows * longest, dtype=torch.long).index_copy(0, places, tokens[0]).view(rows, longest)

    inputs = {"input_ids": spread(batch.input_ids), "token_type_ids": spread(batch.token_type_ids)}
    return inputs | {"attention_mask": spread(torch.ones_like(batch.input_ids))}


if __name__ == "__main__":
    import sys

    bert_dir, glue_dir = sys.argv[1:]
    found = {
        task: [round(x, 6) for x in losses(build("glue", {"task": task, "model": bert_dir, "data_dir": glue_dir}), packed=False)]
        for task in tasks("glue")
    }
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
