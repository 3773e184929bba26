"""Run directories as finished runs leave them, of format 3, without the training: the values are made up."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bert_tickets.config import build, flat
from bert_tickets.files import append_line, file_sha256, read_checksummed, read_facts, write_checksummed, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.units import HEAD_OUTPUT, INNER, LAYER, OUTER, QKV, lower, sizes
from bert_tickets.runs.directory import FORMAT
from bert_tickets.runs.naming import differences, run_name

WEIGHTS = 1000
METRICS = {"cola": "matthews", "stsb": "pearson", "squad": "f1"}


def some_mask(sparsity: float, *seed: object) -> Mask:
    """A mask that prunes this fraction of 1000 weights, others for another seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    kept = torch.ones(WEIGHTS, dtype=torch.bool)
    kept[torch.randperm(WEIGHTS, generator=generator)[: round(sparsity * WEIGHTS)]] = False
    return Mask({"weight": kept})


def oneshot(path: Path, sparsity: float, method: str = "random", seed: int = 57) -> Path:
    """The file that oneshot.py writes."""
    drawn = seed if method == "random" else 0
    some_mask(sparsity, method, drawn).write(path, method=f"oneshot {method}", seed=seed)
    return path


def weights(path: Path, words: str, key: str = "perturbed") -> Path:
    """The file that perturb_weight.py writes, with one weight; with the key `rewound` that of a run."""
    write_tensors(path, {"weight": torch.zeros(1)}, {key: words})
    return path


def run(
    place: Path, values: Sequence[float | None], task: str = "sst2", seed: int = 57, warnings: Sequence[str] = (), **given: Any
) -> Path:
    """Write a run of `task` under `place` whose levels have these values; with `mask` it trains a given ticket, in one level.

    The run has as many levels as there are values, or `levels`. `warnings` are of the last one. `given` are the settings by name.
    """
    if "mask" in given:
        given["method"] = "transfer"
    else:
        given.setdefault("levels", max(1, len(values)))
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    cfg = build({"task": task, "seed": seed, **given})
    folder = describe(place, cfg)
    same = ("levels", "output_dir", "eval_steps", "report")  # do not change the masks
    found = {key: value for key, value in differences(cfg).items() if key not in same}
    for level, value in enumerate(values):
        mask = _mask(cfg, level, found)
        write_level(folder, level, mask, value, task, warnings if level == len(values) - 1 else ())
    return folder


def describe(place: Path, cfg: Any) -> Path:
    """Write the run.json of a configuration under `place`; returns the run directory."""
    folder = place / run_name(cfg)
    about = {
        "format": FORMAT,
        "run": folder.name,
        "config": {key: value for key, value in flat(cfg).items() if key != "dry_run"},
        "differs_from_preset": differences(cfg),
        "fingerprint": {
            "init": None if cfg.init in ("pretrained", "random") else read_facts(Path(cfg.init)),
            "architecture": {"num_attention_heads": HEADS},
        },
    }
    write_checksummed(folder / "run.json", about)
    return folder


def _mask(cfg: Any, level: int, found: dict[str, Any]) -> Mask:
    """The mask of a level, with the metadata of its file."""
    if cfg.settings.mask is not None:
        return Mask.load(cfg.settings.mask)
    left = 1.0
    for fraction in cfg.settings.fractions[: level + 1]:
        left *= 1 - fraction
    mask = some_mask(1 - left, cfg.method, cfg.task, cfg.train.seed, sorted(found.items())) if level else some_mask(0)
    return Mask(dict(mask), {"method": cfg.method, "task": cfg.task, "seed": cfg.train.seed, "level": level})


def write_level(folder: Path, level: int, mask: Mask, value: float | None, task: str, warnings: Sequence[str] = ()) -> None:
    """Write the folder of a finished level."""
    metric = METRICS.get(task, "accuracy")
    mask.write(mask_of(folder, level))
    line = {
        "run": folder.name,
        "level": level,
        "task": task,
        "method": mask.info.get("method", "transfer"),
        "metric": metric,
        "metrics": {metric: value},
        "warnings": list(warnings),
        "sparsity": mask.sparsity,
        "total": mask.total,
        "mask_sha256": mask.sha256(),
    }
    write_checksummed(folder / f"level_{level:02d}" / "metrics.json", line)


def by_hand(place: Path, task: str, seed: int, method: str, masks: Sequence[Mask], values: Sequence[float], **given: Any) -> Path:
    """Write a run of a method, whose settings are `given`, without asking its preset; a level per mask."""
    config = {"task": task, "method": method, "seed": seed, "protocol": "paper", "init": "pretrained", **given}
    words = zlib.crc32(repr(sorted(config.items())).encode())
    folder = place / f"{task}-{method}-s{seed}-{words:08x}"
    about = {"format": FORMAT, "run": folder.name, "config": config, "differs_from_preset": given}
    about["fingerprint"] = {"init": None, "architecture": {"num_attention_heads": HEADS}}
    write_checksummed(folder / "run.json", about)
    for level, (mask, value) in enumerate(zip(masks, values, strict=True)):
        own = {"method": method, "task": task, "seed": seed, "run": folder.name, "level": level}
        write_level(folder, level, mask if "mask" in given else Mask(dict(mask), {**mask.info, **own}), value, task)
    return folder


def fail(folder: Path, level: int, why: str) -> None:
    """Write that a level of a run diverged."""
    write_checksummed(folder / "failure.json", {"run": folder.name, "task": "", "level": level, "ended": why})


def mask_of(folder: Path, level: int) -> Path:
    return folder / f"level_{level:02d}" / "mask.safetensors"


def evaluate(folder: Path, level: int, best: float, count: int) -> None:
    """Add to a level the best of its evaluations, and their number."""
    path = folder / f"level_{level:02d}" / "metrics.json"
    line = read_checksummed(path)
    found = {"step": 5, "metrics": {line["metric"]: best}}
    last = {"step": 5 * count, "metrics": line["metrics"]}
    write_checksummed(path, line | {"evaluations": [found] * (count - 1) + [last], "best": found})


# ---- heads and MLPs ----

LAYERS, HEADS = 2, 4
LIKE = {  # parameters of a network of this size
    f"{LAYER}{layer}.{name}.{part}": torch.zeros(shape if part == "weight" else shape[:1])
    for layer in range(LAYERS)
    for name, shape in {**dict.fromkeys((*QKV, HEAD_OUTPUT), (8, 8)), INNER: (6, 8), OUTER: (8, 6)}.items()
    for part in ("weight", "bias")
}
EMBEDDINGS = {"bert.embeddings.word_embeddings.weight": torch.zeros(50, 8), "classifier.weight": torch.zeros(2, 8)}


def units(heads: str = "", mlps: str = "") -> Mask:
    """The lowered mask of heads and MLPs: "1101 0011" keeps three heads of the first layer, "10" its MLP."""
    found = {"heads": [[int(c) for c in layer] for layer in heads.split()], "mlps": [int(c) for c in mlps]}
    return lower(Mask({kind: torch.tensor(kept).bool() for kind, kept in found.items() if kept}), LIKE)


def search(
    place: Path, task: str, seed: int, mask: Mask, values: Sequence[float], method: str = "importance", **own: Any
) -> Path:
    """A finished guarded search: the full BERT's score and the pruned one's, and the mask that it found."""
    folder = by_hand(place, task, seed, method, [Mask.ones(mask), mask], values, **own)
    path = folder / "level_01" / "metrics.json"
    write_checksummed(path, read_checksummed(path) | {"sizes": sizes(mask, LIKE | EMBEDDINGS)})
    return folder


def derived(path: Path, mask: Mask, kind: str, task: str, method: str = "importance", **info: Any) -> Path:
    """The file that scripts/derive.py writes."""
    Mask(dict(mask), {**mask.info, "method": method, "task": task}).write(path, derived=kind, **info)
    return path


def given(place: Path, task: str, seed: int, mask: Path, value: float, method: str = "transfer", **settings: Any) -> Path:
    """A run that trains a given ticket once, or with the method `score` scores it."""
    return by_hand(place, task, seed, method, [Mask.load(mask)], [value], mask=str(mask), **settings)


# ---- EarlyBERT ----

NEURONS = 6  # of a layer
MACHINE = {"gpu": None, "threads": 2, "processes": 1, "versions": {"torch": "2"}}


def timed(folder: Path, *seconds: float, host: str = "here", **environment: Any) -> Path:
    """Add to a finished run the seconds of its levels, and its machine."""
    about = read_checksummed(folder / "run.json")
    write_checksummed(folder / "run.json", about | {"environment": MACHINE | {"git": folder.name} | environment})
    for level, spent in enumerate(seconds):
        append_line(folder / "log.jsonl", {"event": "level", "level": level, "seconds": spent, "host": host})
    return folder


def add(folder: Path, level: int, **facts: Any) -> None:
    """Add facts to a level's results."""
    path = folder / f"level_{level:02d}" / "metrics.json"
    write_checksummed(path, read_checksummed(path) | facts)


def dense(place: Path, task: str, seed: int, value: float, seconds: float = 100.0, steps: int = 300, **given: Any) -> Path:
    """The full BERT of an EarlyBERT sweep, with the batch size of EarlyBERT's preset unless another is given."""
    given = {"batch_size": 48 if task == "squad" else 16 if task == "mlm" else 128} | given
    folder = timed(run(place, [value], task, seed, levels=1, **given), seconds)
    add(folder, 0, steps=steps)
    return folder


def early(
    place: Path,
    task: str,
    seed: int,
    value: float,
    seconds: Sequence[float] = (10.0, 50.0),
    gone: tuple[int, int] = (1, 5),
    draw: dict[str, Any] | None = None,
    **given: Any,
) -> Path:
    """A finished run of EarlyBERT whose ticket lacks so many heads of each layer, and so many of all neurons.

    A step of the full network has an arithmetic of 100, one of the ticket of 60; the search has 30 steps, the training 200.
    """
    cfg = build({"task": task, "seed": seed, "method": "early_bird", **given})
    folder = timed(describe(place, cfg), *seconds)
    kept = torch.arange(LAYERS * NEURONS).view(LAYERS, NEURONS) >= gone[1]
    found = lower(Mask({"heads": torch.arange(HEADS).expand(LAYERS, -1) >= gone[0], "neurons": kept}), LIKE)
    full = cfg.settings.ticket == "full"
    mask = Mask(dict(Mask.ones(found) if full else found), found.info)
    search = 0 if cfg.settings.ticket != "early-bird" else 30
    for level, steps in enumerate((search, 200)):
        own = {"method": "early_bird", "task": task, "seed": seed, "run": folder.name, "level": level}
        write_level(folder, level, Mask(dict(mask), {**mask.info, **own}), value if level else 0.1, task)
        one = 100 if full or not level else 60
        add(folder, level, steps=steps, flops=one * steps, full_flops=100 * steps, sizes=sizes(mask, LIKE | EMBEDDINGS))
    never = {"step": 0, "fired": None, "heads_fired": None, "neurons_fired": None}
    add(folder, 0, draw=draw or ({"step": 30, "fired": 20, "heads_fired": 20, "neurons_fired": 10} if search else never))
    return folder


def pretrained(folder: Path, level: int) -> Path:
    """Write the model that a level of a run keeps, with a file in it, and its hash to the level's results."""
    model = folder / f"level_{level:02d}" / "model"
    model.mkdir()
    (model / "config.json").write_text(f"{folder.name} {level}")
    add(folder, level, model_files={"config.json": file_sha256(model / "config.json"), "README.md": "0"})
    return model


# ---- several runs ----

CURVE = {57: [0.80, 0.81, 0.79, 0.60], 58: [0.82, 0.81, 0.83, 0.61], 59: [0.81, 0.80, 0.81, 0.62]}


def find(place: Path, curves: dict[int, list[float | None]], task: str = "sst2", **flags) -> dict[int, Path]:
    """Runs that find tickets at 0, 20, 40, ... %, one per seed."""
    return {seed: run(place, values, task, seed, **({"rate": 0.2} | flags)) for seed, values in curves.items()}


def one_task(place: Path) -> dict[int, Path]:
    """Runs that find tickets of one task, with the scores `CURVE`, and Table 2's controls at 40 %, with 0.5, 0.6, 0.7 by seed."""
    found = find(place, CURVE)
    shuffled = weights(place / "w.safetensors", "the entries of each matrix shuffled")
    for (seed, folder), value in zip(found.items(), (0.5, 0.6, 0.7), strict=True):
        own = mask_of(folder, 2)
        run(place, [value], seed=seed, mask=oneshot(place / f"random_{seed}", 0.4, seed=seed))
        run(place, [value], seed=seed, mask=own, init="random")
        run(place, [value], seed=seed, mask=own, init=shuffled)
    return found


def transfers(place: Path) -> Path:
    """Tickets of 40 % of three tasks, each trained on the two others; and one-shot pruning on one of them."""
    levels = {"sst2": [0.80, 0.79, 0.78], "qqp": [0.70, 0.70, 0.66], "mnli": [0.60, 0.60, 0.61]}
    found = {task: find(place, {s: [v + s / 1e4 for v in values] for s in (57, 58)}, task) for task, values in levels.items()}
    for source, folders in found.items():
        for target in set(levels) - {source}:
            for seed, folder in folders.items():
                value = levels[target][0] - (0.01 if source == "mnli" else 0.05) + seed / 1e4
                run(place, [value], target, seed, mask=mask_of(folder, 2))
    for seed in (57, 58):
        run(place, [0.50575], "qqp", seed, mask=oneshot(place / "magnitude", 0.4, "magnitude"))
    return place
