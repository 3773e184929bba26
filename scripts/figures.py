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

Series = dict[str, dict[float, dict[int, float]]]  # label -> sparsity -> seed -> value


def read_runs(paths: list[Path]) -> tuple[str, str, Series]:
    """The task, its metric, and the values of all finished levels; only seeds are pooled under one label."""
    folders = sorted({about.parent for path in paths for about in [*path.glob("run.json"), *path.glob("*/run.json")]})
    if not folders:
        raise UserError(f"no run directory in {', '.join(map(str, paths))}")
    abouts = {folder: read_json(folder / "run.json") for folder in folders}
    labels = _labels(abouts)
    series: Series = defaultdict(lambda: defaultdict(dict))
    subjects, undefined = set(), 0
    for folder, about in abouts.items():
        for file in sorted(folder.glob("level_*/metrics.json")):
            level = read_json(file)
            subjects.add((level["task"], level["metric"]))
            value, seeds = level["metrics"][level["metric"]], series[labels[folder]][round(level["sparsity"], 4)]
            if about["config"]["seed"] in seeds:
                raise UserError(f"{folder} and another run are both {labels[folder]!r} with seed {about['config']['seed']}")
            if value is None:
                undefined += 1
            else:
                seeds[about["config"]["seed"]] = value
    if len(subjects) != 1:
        found = ", ".join(sorted(task for task, _ in subjects)) or "no finished level"
        raise UserError(f"one task makes a picture, and these runs hold {found}")
    if undefined:
        print(f"{undefined} value(s) are undefined (a correlation of constant predictions) and left out of the means")
    ((task, metric),) = subjects
    return task, metric, series


def _labels(abouts: dict[Path, dict[str, Any]]) -> dict[Path, str]:
    """A label a run: how its tickets were found, and the settings in which the runs of this kind differ, but for the seed."""
    kinds = {folder: _kind(folder, about["config"]) for folder, about in abouts.items()}
    labels = {}
    for folder, about in abouts.items():
        alike = [other["config"] for place, other in abouts.items() if kinds[place] == kinds[folder]]
        named = {key for place, other in abouts.items() if kinds[place] == kinds[folder] for key in other["differs_from_preset"]}
        named = (named | {"protocol"}) - {"seed", "mask"}
        differ = sorted(key for key in named if len({repr(config[key]) for config in alike}) > 1)
        values = [f"{key.replace('_', ' ')} {about['config'][key]}" for key in differ]
        labels[folder] = kinds[folder] + (f" ({', '.join(values)})" if values else "")
    return labels


def _kind(folder: Path, config: dict[str, Any]) -> str:
    if config["mask"] is None:
        return "IMP"
    from bert_tickets.mask import Mask

    info = Mask.load(folder / "level_00" / "mask.safetensors").info if (folder / "level_00").exists() else {}
    source = f" of {info['task']}" if "task" in info else ""
    return f"{info.get('method', 'given').removeprefix('oneshot ')} ticket{source}"


def print_table(metric: str, series: Series) -> None:
    sparsities = sorted({sparsity for values in series.values() for sparsity in values})
    rows = [
        [f"{sparsity:.0%}", *(_cell(list(values.get(sparsity, {}).values())) for values in series.values())]
        for sparsity in sparsities
    ]
    print(table([metric, *series], rows))


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f} (n={len(values)})" if len(values) > 1 else "")


def draw(title: str, metric: str, series: Series, output: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib, or pip install -e '.[figures]'") from None

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (label, values), (color, marker, line) in zip(series.items(), STYLES * 9, strict=False):
        x = sorted(sparsity for sparsity, seeds in values.items() if seeds)
        percent, points = [100 * sparsity for sparsity in x], [list(values[sparsity].values()) for sparsity in x]
        axes.plot(percent, list(map(mean, points)), line, marker=marker, color=color, label=label)
        axes.fill_between(percent, list(map(min, points)), list(map(max, points)), color=color, alpha=0.15, linewidth=0)
        if 0.0 in x:
            dense = mean(points[0])
            axes.axhline(dense, color=color, linewidth=1, linestyle=(0, (1, 2)))
            axes.text(
                0.99, dense, "dense", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=color, fontsize=8
            )
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
