"""Measure training on this machine, ours beside the released loop, in one run; ratios are what to quote.

  python scripts/bench.py --model DIR --data-dir glue --tasks cola sst2 mnli rte
  python scripts/bench.py --model bert-base-uncased --tasks mnli --precision fp16 --json bench.json

The released loop is modelled faithfully: every example padded to --max-length by a DataLoader, torch.nn.utils.prune's
hooks, eager attention, loss.item() every step, AdamW tensor by tensor. Both train the same network at the same sparsity on
the same examples, in turns of a few steps, so that a change of the machine's speed meets both; each figure is the median of
the turns. Arithmetic is counted on real tokens only, and as a share of the machine's own rate on large matrix products,
measured between the turns.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bert_tickets import UserError
from bert_tickets.command import hyphens, run_command
from bert_tickets.config import Config, build, tasks
from bert_tickets.files import write_json

ROOT = Path(__file__).resolve().parent.parent

# To draw lengths from where no data are given: mean tokens of a training example at most 128 long, and the spread (standard
# deviation of the logarithm). Measured with BERT's uncased vocabulary on the published CoLA and RTE, on the first 9,000 of
# SST-2, and on samples of 8,999 of MNLI and of QQP.
LENGTHS = {"cola": (11.3, 0.33), "sst2": (13.3, 0.68), "mnli": (40.2, 0.47), "qqp": (30.8, 0.36), "rte": (66.6, 0.48)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="*", default=["cola", "sst2", "mnli", "rte"], metavar="TASK", help="none: only a level's costs"
    )
    parser.add_argument("--model", default=Config.model, metavar="TEXT", help="a BERT checkpoint")
    parser.add_argument("--data-dir", metavar="DIR", help="real texts in GLUE's layout; otherwise lengths are drawn")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    parser.add_argument("--max-length", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="X", help="of both networks (default: 0.5)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="turns of each loop (default: 5)")
    parser.add_argument("--turn-steps", type=int, default=4, metavar="N", help="steps a turn (default: 4)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp16", "bf16", "fp32"), help="(default: auto)")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="(default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(hyphens(None))
    for task in args.tasks:
        if task not in tasks("glue") or (args.data_dir is None and task not in LENGTHS):
            parser.error(f"no lengths for {task!r}: give --data-dir, or tasks of {', '.join(LENGTHS)}")
    return args


# ---- what is measured ----


def machine_rate(precision: str, device: Any) -> float:
    """Floating-point operations a second of one large square matrix product in the precision trained in."""
    import torch

    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    _wait(device)
    began = time.perf_counter()
    for _ in range(3):
        a @ b
    _wait(device)
    return 3 * 2 * n**3 / (time.perf_counter() - began)


def arithmetic(net: Any, lengths: Any) -> float:
    """Floating-point operations of one training step on examples of these lengths, none spent on padding.

    Six a weight and token (two forward, four backward) in the encoder's matrices, and the two products of attention
    within each example; the pooler and the head see one token an example and are left out.
    """
    from bert_tickets.models import prunable

    weights = sum(p.numel() for name, p in prunable(net).items() if "pooler" not in name)
    attention = 12 * net.config.hidden_size * net.config.num_hidden_layers * (lengths.astype(float) ** 2).sum()
    return 6 * weights * lengths.sum() + attention


def our_loop(net: Any, task: Any, mask: Any, store: Any, cfg: Config) -> Callable[[int], Any]:
    """One of our steps, by number."""
    from bert_tickets.batches import Batches
    from bert_tickets.models import prunable
    from bert_tickets.step import Step

    net.train()
    mask.apply(prunable(net))
    batches = Batches(store, cfg.train.batch_size, 0)
    step = Step(lambda b: task.loss(task.logits(net, b), b), dict(net.named_parameters()), cfg.train, mask, store.device)
    return lambda i: step(batches[i], cfg.train.lr)


def released_loop(net: Any, task: Any, mask: Any, store: Any, cfg: Config) -> Callable[[int], Any]:
    """One step of the released loop as it was written, on today's torch and transformers."""
    import torch
    import torch.nn.utils.prune as torch_prune
    from torch import nn
    from torch.utils.data import DataLoader, RandomSampler, TensorDataset

    from bert_tickets.attention import Dropout
    from bert_tickets.step import autocast, precision_of

    net.train()
    net.set_attn_implementation("eager")
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Dropout):
                setattr(parent, name, nn.Dropout(child.p))
    for name, kept in mask.items():
        torch_prune.custom_from_mask(net.get_submodule(name.removesuffix(".weight")), "weight", kept)

    device, precision = store.device, precision_of(cfg.train.precision, store.device)
    rows = store.batch(torch.arange(len(store)))
    spread = torch.zeros(3, len(store) * cfg.max_length, dtype=torch.long)
    places = (rows.rows * cfg.max_length + rows.position_ids[0]).cpu()
    for at, values in enumerate((rows.input_ids[0], rows.token_type_ids[0], torch.ones_like(rows.rows))):
        spread[at, places] = values.cpu()
    data = TensorDataset(*spread.view(3, len(store), cfg.max_length), rows.labels.cpu())
    loader = DataLoader(data, sampler=RandomSampler(data), batch_size=cfg.train.batch_size)

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    spared = [p for name, p in net.named_parameters() if "bias" in name or "LayerNorm" in name]
    rest = [p for name, p in net.named_parameters() if not ("bias" in name or "LayerNorm" in name)]
    groups = [{"params": rest, "weight_decay": cfg.train.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.lr, eps=1e-8, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    batches, total = forever(), 0.0

    def step(_: int) -> None:
        nonlocal total
        ids, types, attention, labels = (tensor.to(device) for tensor in next(batches))
        with autocast(precision, device):
            logits = net(input_ids=ids, token_type_ids=types, attention_mask=attention).logits
            loss = nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        total += loss.item()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), cfg.train.max_grad_norm, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        net.zero_grad()

    return step


def take_turns(loops: dict[str, Callable[[int], Any]], turns: int, steps: int, device: Any) -> dict[str, list[float]]:
    """Seconds a step of each loop, a value a turn; the first turn of each is a warm-up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(turns + 1):
        for name, loop in loops.items():
            _wait(device)
            began = time.perf_counter()
            for i in range(turn * steps, (turn + 1) * steps):
                loop(i)
            _wait(device)
            if turn:
                seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def _wait(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


# ---- the report ----


def measure_task(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Ours, dense and masked, beside the released loop on one task."""
    import torch

    from bert_tickets.lottery import oneshot, prepare_device
    from bert_tickets.mask import Mask
    from bert_tickets.models import prunable
    from bert_tickets.step import precision_of
    from bert_tickets.tasks.glue import Glue

    device = prepare_device(args.device)
    examples = args.batch_size * args.turn_steps * (args.turns + 1)
    given = {"task": name, "model": args.model, "data_dir": args.data_dir, "batch_size": args.batch_size}
    given |= {"max_length": args.max_length, "precision": args.precision, "limit_train": examples}
    cfg, task = build("glue", given), Glue(name)
    net, tokenizer = task.load_net(cfg)
    store = task.load_data(cfg, tokenizer, device)[0] if args.data_dir else drawn(name, net, examples, args.max_length, device)
    mask = oneshot(net, args.sparsity, "magnitude", 0)
    net.to(device)
    copies = [copy.deepcopy(net) for _ in range(2)]
    torch.use_deterministic_algorithms(False)  # the released loop did not ask for it
    loops = {
        "ours": our_loop(net, task, mask, store, cfg),
        "dense": our_loop(copies[0], task, Mask.ones(prunable(net)), store, cfg),
        "released": released_loop(copies[1], task, mask, store, cfg),
    }
    rates = [machine_rate(precision := precision_of(cfg.train.precision, device), device)]
    seconds = {name: statistics.median(values) for name, values in take_turns(loops, args.turns, args.turn_steps, device).items()}
    rates.append(machine_rate(precision, device))
    tokens = float(store.lengths.mean()) * args.batch_size
    share = arithmetic(net, store.lengths) / len(store) * args.batch_size / statistics.mean(rates)
    return {
        "real tokens a step": tokens,
        "padded tokens a step": args.batch_size * args.max_length,
        "steps/s": 1 / seconds["ours"],
        "released steps/s": 1 / seconds["released"],
        "times faster": seconds["released"] / seconds["ours"],
        "real tokens/s": tokens / seconds["ours"],
        "released real tokens/s": tokens / seconds["released"],
        "released padded tokens/s": args.batch_size * args.max_length / seconds["released"],
        "machine GFLOP/s": statistics.mean(rates) / 1e9,
        "share of it": share / seconds["ours"],
        "released share of it": share / seconds["released"],
        "masking adds": seconds["ours"] / seconds["dense"] - 1,
    }


def drawn(task: str, net: Any, count: int, longest: int, device: Any) -> Any:
    """A store of random tokens with the task's published lengths."""
    import numpy as np

    from bert_tickets.batches import TokenStore
    from bert_tickets.tokens import Tokens

    mean, spread = LENGTHS[task]
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(math.log(mean) - spread**2 / 2, spread, count).round().clip(3, longest).astype(np.int64)
    ids = rng.integers(5, net.config.vocab_size, lengths.sum(), dtype=np.int32)
    return TokenStore(Tokens(ids, np.zeros(len(ids), np.uint8), lengths), rng.integers(0, 2, count), device)


def measure_level(model: str) -> dict[str, float]:
    """What a level costs beside its training: choosing the mask, writing it, writing a checkpoint."""
    from bert_tickets.config import Training
    from bert_tickets.files import write_tensors
    from bert_tickets.mask import Mask
    from bert_tickets.models import load_classifier, prunable
    from bert_tickets.prune import magnitude, prune

    net, _ = load_classifier(model, 2, "pretrained", Training.seed)
    weights = prunable(net)
    began = time.perf_counter()
    mask = prune(Mask.ones(weights), magnitude(weights), 0.1)
    chosen = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        mask.write(path := Path(folder) / "mask.safetensors")
        written, size = time.perf_counter(), path.stat().st_size
        params = dict(net.named_parameters())  # and AdamW's two moments of each
        state = {
            f"{part}/{name}": p.detach().clone() for part in ("param", "exp_avg", "exp_avg_sq") for name, p in params.items()
        }
        write_tensors(Path(folder) / "checkpoint.safetensors", state)
        saved = time.perf_counter()
    return {
        "prunable weights": mask.total,
        "choose the mask, s": chosen - began,
        "write the mask, s": written - chosen,
        "mask file, MB": size / 1e6,
        "write a checkpoint, s": saved - written,
    }


def measure_start(args: argparse.Namespace) -> float:
    """Seconds of a whole process that loads model and data, takes one step and writes its level."""
    if args.data_dir is None or not args.tasks:
        return math.nan
    with tempfile.TemporaryDirectory() as folder:
        words = f"--task {args.tasks[0]} --levels 1 --max-steps 1 --limit-eval 8 --device {args.device} --output-dir {folder}"
        command = [sys.executable, str(ROOT / "lt_glue.py"), *words.split(), "--model", args.model, "--data-dir", args.data_dir]
        for extra in (["--seed", "1"], []):  # the first fills the cache of tokens
            began = time.perf_counter()
            done = subprocess.run(command + extra, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(done.stderr.strip().splitlines()[-1])
    return time.perf_counter() - began


def main(args: argparse.Namespace) -> None:
    import torch

    figures: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        figures["machine"] = torch.cuda.get_device_name()
    figures |= {"torch": torch.__version__, "arguments": vars(args)}
    print(" " * 26, *(f"{task:>10}" for task in args.tasks))
    figures["tasks"] = {name: measure_task(name, args) for name in args.tasks}
    for name in next(iter(figures["tasks"].values()), {}):
        print(name.rjust(26), *(f"{figures['tasks'][task][name]:10.4g}" for task in args.tasks))
    figures["level"] = measure_level(args.model) | {"one-step run from a warm cache, s": measure_start(args)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures["level"]["peak memory of the process, MiB"] = peak
    if torch.cuda.is_available():
        figures["level"]["peak memory of the GPU, MiB"] = torch.cuda.max_memory_allocated() / 2**20
    for name, value in figures["level"].items():
        print(f"{name:>32} {value:.4g}")
    print(f"{figures['machine']}, torch {figures['torch']}")
    if args.json:
        write_json(Path(args.json), figures)


if __name__ == "__main__":
    run_command(main, parse())
