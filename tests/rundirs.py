"""Run directories as finished runs leave them, without the training: the values are made up."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bert_tickets.config import build, flat, identity, run_name
from bert_tickets.files import read_facts, write_checksummed, write_json, write_tensors
from bert_tickets.masking.mask import Mask

WEIGHTS = 1000
METRICS = {"cola": "matthews", "stsb": "pearson", "squad": "f1"}


def some_mask(sparsity: float, *seed: object) -> Mask:
    """A mask that removes so many of 1000 weights, others for another seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    kept = torch.ones(WEIGHTS, dtype=torch.bool)
    kept[torch.randperm(WEIGHTS, generator=generator)[: round(sparsity * WEIGHTS)]] = False
    return Mask({"weight": kept})


def oneshot(path: Path, sparsity: float, method: str = "random", seed: int = 57) -> Path:
    """The file that oneshot.py makes."""
    drawn = seed if method == "random" else 0
    some_mask(sparsity, method, drawn).write(path, method=f"oneshot {method}", seed=str(seed))
    return path


def weights(path: Path, perturbed: str) -> Path:
    """The file that perturb_weight.py makes, its weights left out."""
    write_tensors(path, {"weight": torch.zeros(1)}, {"perturbed": perturbed})
    return path


def run(
    place: Path, values: Sequence[float | None], task: str = "sst2", seed: int = 57, warnings: Sequence[str] = (), **given: Any
) -> Path:
    """A run of `task` under `place` whose levels score these values; with `mask` a given ticket, of one level.

    Its levels are as many as the values unless `levels` says more. `warnings` are of the last one. `given` are the flags.
    """
    preset = task if task in ("squad", "mlm") else "glue"
    if "mask" not in given:
        given.setdefault("levels", max(1, len(values)))
    cfg = build(preset, {"task": task, "seed": seed, **{key: str(v) if isinstance(v, Path) else v for key, v in given.items()}})
    differs = identity(cfg, preset)
    folder = place / run_name(cfg, preset)
    init = None if cfg.init in ("pretrained", "random") else read_facts(Path(cfg.init))
    config = {key: value for key, value in flat(cfg).items() if key != "dry_run"}
    write_json(folder / "run.json", {"config": config, "differs_from_preset": differs, "fingerprint": {"init": init}})
    found = {key: value for key, value in differs.items() if key not in ("levels", "output_dir")}
    for level, value in enumerate(values):
        if cfg.mask:
            mask, info = Mask.load(cfg.mask), {}
        else:
            fractions = cfg.fractions
            left = 1.0
            for fraction in fractions[: level + 1]:
                left *= 1 - fraction
            mask = some_mask(1 - left, task, seed, sorted(found.items())) if level else some_mask(0)
            info = {"method": "imp", "task": task, "seed": str(seed), "level": str(level)}
        mask.write(folder / f"level_{level:02d}" / "mask.safetensors", **info)
        metric = METRICS.get(task, "accuracy")
        line = {"level": level, "task": task, "metric": metric, "metrics": {metric: value}, "sparsity": mask.sparsity}
        said = list(warnings) if level == len(values) - 1 else []
        write_json(folder / f"level_{level:02d}" / "metrics.json", line | {"mask_sha256": mask.sha256(), "warnings": said})
    return folder


def fail(folder: Path, level: int, why: str) -> None:
    """Have a run say that this level of it came to no result."""
    write_checksummed(folder / "failure.json", {"run": None, "level": level, "ended": why})


def mask_of(folder: Path, level: int) -> Path:
    return folder / f"level_{level:02d}" / "mask.safetensors"
