"""Draw a task's metric over sparsity: iterative magnitude pruning beside other tickets, mean and range over seeds.

  python scripts/figures.py runs/demo --output tickets.png
  python scripts/figures.py runs/sst2-* --title "SST-2" --output sst2.svg

Takes run directories of one task, or folders that hold them.
Prints the table behind the picture.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bert_tickets import UserError
from bert_tickets.command import run_command
from bert_tickets.files import read_json
from bert_tickets.report import table

# Okabe and Ito's colours keep apart for colour-blind readers; the markers keep apart in grey.
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"), ("#56B4E9", "v", "-")]

Series = dict[str, dict[float, list[float]]]  # label -> sparsity -> a value a seed


def read_runs(paths: list[Path]) -> tuple[str, str, Series]:
    """The task, its metric, and the values of all finished levels."""
    runs = sorted({about.parent for path in paths for about in [*path.glob("run.json"), *path.glob("*/run.json")]})
    if not runs:
        raise UserError(f"no run directory in {', '.join(map(str, paths))}")
    series: Series = defaultdict(lambda: defaultdict(list))
    subjects = set()
    for run in runs:
        config = read_json(run / "run.json")["config"]
        for file in sorted(run.glob("level_*/metrics.json")):
            level = read_json(file)
            subjects.add((level["task"], level["metric"]))
            value = level["metrics"][level["metric"]]
            if value is not None:
                series[_label(config, run)][round(level["sparsity"], 4)].append(value)
    if len(subjects) != 1:
        found = ", ".join(sorted(task for task, _ in subjects)) or "no finished level"
        raise UserError(f"one task makes a picture, and these runs hold {found}")
    ((task, metric),) = subjects
    return task, metric, series


def _label(config: dict[str, Any], run: Path) -> str:
    """What a run's tickets are: how they were found, and the learning rate they were trained at."""
    if config["mask"] is None:
        kind = "IMP, rewound to pre-trained" if config["rewind"] == "0" else f"IMP, rewind {config['rewind']}"
    else:
        from bert_tickets.mask import Mask

        method = Mask.load(run / "level_00" / "mask.safetensors").info.get("method", "given")
        kind = f"{method.removeprefix('oneshot ')} ticket"
    return f"{kind} (lr {config['lr']:g})"


def print_table(metric: str, series: Series) -> None:
    sparsities = sorted({sparsity for values in series.values() for sparsity in values})
    rows = [[f"{sparsity:.0%}", *(_cell(values.get(sparsity, [])) for values in series.values())] for sparsity in sparsities]
    print(table([metric, *series], rows))


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f} (n={len(values)})" if len(values) > 1 else "")


def draw(title: str, metric: str, series: Series, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (label, values), (color, marker, line) in zip(series.items(), STYLES * 9, strict=False):
        x = sorted(values)
        axes.plot([100 * s for s in x], [mean(values[s]) for s in x], line, marker=marker, color=color, label=label)
        low, high = [min(values[s]) for s in x], [max(values[s]) for s in x]
        if low != high:
            axes.fill_between([100 * s for s in x], low, high, color=color, alpha=0.15, linewidth=0)
    dense = [values[0.0] for values in series.values() if 0.0 in values]
    if dense:
        level = mean(value for values in dense for value in values)
        axes.axhline(level, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
        axes.text(0.99, level, "dense", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color="0.35", fontsize=9)
    axes.set(xlabel="weights removed (%)", ylabel=f"{metric} on the evaluation set", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    try:
        figure.savefig(output, dpi=160)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}") from None


def main(args: argparse.Namespace) -> None:
    task, metric, series = read_runs([Path(path) for path in args.runs])
    print_table(metric, series)
    draw(args.title or f"Tickets on {task}", metric, series, Path(args.output))
    print(f"drawn in {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--output", required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--title", metavar="TEXT", help="the picture's title")
    run_command(main, parser.parse_args())
