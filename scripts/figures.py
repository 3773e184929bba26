"""Draw the paper's figures from run directories, each with the table behind it.

  python scripts/figures.py curves runs --output curves.svg                           # metric over sparsity, a panel a task
  python scripts/figures.py curves runs/sst2-* --title "SST-2" --output sst2.png
  python scripts/figures.py transfer runs --sparsity 70 --output transfer.pdf         # tickets trained on other tasks
  python scripts/figures.py transfer runs --sparsity 70 --relative same-task --output transfer.pdf
  python scripts/figures.py overlap runs --sparsity 70 --output overlap.png           # how alike the tasks' tickets are
  python scripts/figures.py densities runs --sparsity 70 --output densities.png       # what is left of each layer

Takes run directories, or folders that hold them. Runs that differ in nothing but their seed are one line or one cell: their
mean, with the standard deviation of single runs. Masks that are in no run compare by python -m bert_tickets.masking.similarity.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from bert_tickets.cli import hyphens, run_command
from bert_tickets.errors import UserError
from bert_tickets.masking import similarity as compare
from bert_tickets.report.pictures import need_matplotlib, picture_file
from bert_tickets.runs.summary import curves, heatmap, published, table

if TYPE_CHECKING:
    from bert_tickets.report.results import LevelResult

BySeed = Mapping[int, "LevelResult"]
DENSE = "dense network"


def tell(values: Sequence[float], form: str = ".2f") -> str:
    """A mean, and with two values or more their standard deviation and number."""
    spread = f" ± {stdev(values):{form.lstrip('+')}} (n={len(values)})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}" if values else "-"


def tell_doubts(records: Iterable[LevelResult]) -> None:
    """Print what is left out of means, and what runs say against values that are in them, which a star marks."""
    records = list(records)
    if count := sum(record.value is None for record in records):
        print(f"{count} value(s) are undefined (a correlation of constant predictions or labels) and left out of the means")
    for record in records:
        for doubt in record.warnings:
            print(f"* {record.run}, level {record.level}: {doubt}")


def tell_seeds(counts: Iterable[int]) -> str:
    """What a picture's means and spreads are of."""
    found = sorted(set(counts) - {0})
    if not found or found[-1] == 1:
        return "one seed each"
    return f"mean ± standard deviation of {found[0]}{f' to {found[-1]}' if len(found) > 1 else ''} seeds"


def own_tickets(records: Sequence[LevelResult], sparsity: float) -> dict[str, BySeed]:
    """What IMP found from the pre-trained weights: task -> seed -> the level that removes `sparsity` percent.

    Raises `UserError` where there is none, or a task's were found in two ways.
    """
    from bert_tickets.report.results import IMP, PRETRAINED, by_seed
    from bert_tickets.report.series import in_order, percent

    found = [r for r in records if (r.ticket, r.weights, r.rewind) == (IMP, PRETRAINED, "0")]
    there = [r for r in found if percent(r) == sparsity]
    if not there:
        levels = ", ".join(f"{level:g}" for level in sorted({percent(r) for r in found})) or "no level"
        raise UserError(f"no IMP ticket at --sparsity {sparsity:g}: these runs have {levels}")
    for task in {r.task for r in there}:
        ways = {(r.finding, r.setting): r.run for r in there if r.task == task}
        if len(ways) > 1:
            listed = "\n".join(f"  {'; '.join(filter(None, way)) or 'the preset'} (such as {run})" for way, run in ways.items())
            raise UserError(f"the tickets of {task} were found in {len(ways)} ways; give the runs of one:\n{listed}")
    return {task: by_seed(there, task=task) for task in in_order(r.task for r in there)}


# ---- metric over sparsity ----


def draw_curves(records: Sequence[LevelResult], args: argparse.Namespace) -> None:
    from bert_tickets.report.series import UNITS, read_curves, read_doubted

    units = {record.task: UNITS.get(record.metric, f"{record.metric} × 100") for record in records}
    panels, found, doubted = [], read_curves(records), read_doubted(records)
    for task, lines in found.items():
        rows = [
            [f"{x:g} %", *(tell(line.get(x, [])) + "*" * (x in doubted[task][name]) for name, line in lines.items())]
            for x in sorted({x for line in lines.values() for x in line})
        ]
        print(f"{published.name(task)}, {units[task]}\n{table(['removed', *lines], rows)}\n")
        dense = sorted({mean(line[0.0]) for line in lines.values() if 0.0 in line})
        panels.append(
            curves.Panel(title=published.name(task), unit=units[task], lines=lines, levels={DENSE: dense}, doubted=doubted[task])
        )
    tell_doubts(records)
    if not panels:
        raise UserError("these runs hold no finished level with a defined value")
    spread = tell_seeds(len(values) for lines in found.values() for line in lines.values() for values in line.values())
    spread += "; hollow: a value is undefined or doubted" * any(line for lines in doubted.values() for line in lines.values())
    curves.draw(args.output, args.title or "Tickets over sparsities", "weights removed (%)", panels, spread)


# ---- transfer ----


def draw_transfer(records: Sequence[LevelResult], args: argparse.Namespace) -> None:
    from bert_tickets.report.results import ONESHOT, PRETRAINED, RANDOM, by_seed, dense, need_one_setting
    from bert_tickets.report.series import in_order, is_doubted, percent, points

    own = own_tickets(records, args.sparsity)
    given = [r for r in records if (percent(r), r.weights, r.level) == (args.sparsity, PRETRAINED, 0) and r.ticket != r.task]
    found = {r.ticket for r in given}
    sources = [*in_order([*own, *found.intersection(published.tasks())]), *(name for name in (ONESHOT, RANDOM) if name in found)]
    targets = in_order([*own, *(r.task for r in given if r.ticket in sources)])
    runs: dict[tuple[str, str], BySeed] = {
        (source, task): own.get(task, {}) if source == task else by_seed(given, task=task, ticket=source)
        for source in sources
        for task in targets
    }
    bases = {task: own.get(task, {}) if args.relative == "same-task" else dense(records, task) for task in targets}
    used = [record for seeds in [*runs.values(), *bases.values()] for record in seeds.values()]
    need_one_setting(used)
    tell_doubts({(record.run, record.level): record for record in used}.values())

    base = {task: points(seeds) for task, seeds in bases.items()}
    less = {
        (source, task): [value - mean(base[task]) for value in points(seeds)] if base[task] else []
        for (source, task), seeds in runs.items()
    }
    doubted = {(s, t): any(map(is_doubted, [*seeds.values(), *bases[t].values()])) for (s, t), seeds in runs.items()}
    rows = []
    for source in sources:
        both = [task for task in targets if task != source and less[source, task] and less.get((task, task))]
        reach = sum(mean(less[source, task]) >= mean(less[task, task]) for task in both)
        told = [tell(less[source, task], "+.2f") + "*" * doubted[source, task] for task in targets]
        rows.append([published.name(source), *told, f"{reach} of {len(both)}"])
    names = [published.name(task) for task in targets]
    of = "same-task ticket" if args.relative == "same-task" else DENSE
    print(f"points above the {of}, at {args.sparsity:g} % sparsity, of the ticket of (row) trained on (column)")
    print(table(["", *names, "at least same-task"], rows))
    cells = [[_difference(runs[s, t], less[s, t], base[t], doubted[s, t]) for t in targets] for s in sources]
    scale = heatmap.around_zero([value for row in cells for value, _ in row if value is not None], "+.1f")
    title = args.title or f"Transfer of tickets at {args.sparsity:g} % sparsity"
    spread = tell_seeds(len(values) for values in less.values())
    spread += "; * a value is undefined or doubted" * any(doubted.values())
    unit = f"points above the {of}; colours end at ±{scale.high:g}"
    labels = [published.name(source) for source in sources]
    axes = ("trained on", "ticket of")
    heatmap.draw(args.output, f"{title}\n{spread}", axes, names, labels, cells, unit, scale=scale)


def _difference(seeds: BySeed, less: Sequence[float], base: Sequence[float], doubted: bool) -> heatmap.Cell:
    if less:
        return mean(less), (f"±{stdev(less):.1f}" if len(less) > 1 else "") + "*" * doubted
    return None, "no run" if not seeds else "undef." if base else "no base"


# ---- masks: overlap and densities ----


def draw_overlap(records: Sequence[LevelResult], args: argparse.Namespace) -> None:
    own = own_tickets(records, args.sparsity)
    tickets = [(task, seed) for task, seeds in own.items() for seed in seeds]
    if len(tickets) < 2:
        raise UserError(f"a ticket overlaps with another, and these runs have one at --sparsity {args.sparsity:g}")
    found = compare.measure([own[task][seed].mask_file for task, seed in tickets], by_part=False)
    names = {task: published.name(task) for task in own}
    cells: dict[tuple[str, str], heatmap.Cell] = {}
    rows, chances = [], []
    for one, other in combinations_with_replacement(own, 2):
        pairs = []
        for pair in found["pairs"]:
            (a, seed), (b, other_seed) = (tickets[i] for i in pair["masks"])
            if (a, b) == (one, other) and (a == b or seed == other_seed):
                pairs.append(pair)
        overlaps, *by_chance = ([pair[key] for pair in pairs] for key in ("overlap", "chance", "chance_in_tensors"))
        rows.append([names[one], names[other], *(tell(values, ".4f") for values in (overlaps, *by_chance))])
        chances += [*zip(*by_chance, strict=True)]
        note = f"±{stdev(overlaps):.3f}" if len(overlaps) > 1 else ""
        cells[one, other] = cells[other, one] = (mean(overlaps), note) if pairs else (None, "no pair")
    print(f"tickets at {args.sparsity:g} % sparsity: of two tasks with the same seed, or of one task with two seeds")
    print(table(["ticket of", "and of", "overlap", "by chance", "in tensors"], rows))
    print(compare.LEGEND)
    chance, in_tensors = (_range(values) for values in zip(*chances, strict=True))
    title = args.title or f"Overlap of tickets at {args.sparsity:g} % sparsity"
    title += f"\n{tell_seeds(len(seeds) for seeds in own.values())}; diagonal: two seeds of a task"
    title += f"\nby chance {chance}; with each matrix's own density {in_tensors}"
    grid = [[cells[one, other] for other in own] for one in own]
    heatmap.draw(args.output, title, ("ticket of", "ticket of"), [*names.values()], [*names.values()], grid, compare.MEASURE)


def _range(values: Sequence[float]) -> str:
    ends = list(dict.fromkeys(f"{value:.3f}" for value in (min(values), max(values))))
    return " to ".join(ends)


def draw_densities(records: Sequence[LevelResult], args: argparse.Namespace) -> None:
    panels, names = [], []
    own = own_tickets(records, args.sparsity)
    for task, seeds in own.items():
        shares = [read_densities(record.mask_file) for record in seeds.values()]
        names = [name for name in shares[0] if name != "all"]
        kinds = list(dict.fromkeys(kind for row in shares[0].values() for kind in row))
        rows = [
            [name, *(tell([100 * share[name][k] for share in shares if k in share[name]]) for k in kinds)] for name in shares[0]
        ]
        print(f"{published.name(task)}, weights kept (%) at {args.sparsity:g} % sparsity\n{table(['layer', *kinds], rows)}\n")
        lines = {
            kind: {
                float(x): [100 * share[name][kind] for share in shares] for x, name in enumerate(names) if kind in shares[0][name]
            }
            for kind in kinds
            if kind != "all"
        }
        whole = mean(100 * share["all"]["all"] for share in shares)
        panels.append(
            curves.Panel(title=published.name(task), unit="weights kept (%)", lines=lines, levels={"all matrices": [whole]})
        )
    step = math.ceil(len(names) / 5)
    ticks = {float(x): name for x, name in enumerate(names) if not name.isdigit() or (x % step == 0 and x + step < len(names))}
    title = args.title or f"Weights kept at {args.sparsity:g} % sparsity"
    curves.draw(args.output, title, "layer", panels, tell_seeds(len(seeds) for seeds in own.values()), ticks)


def read_densities(file: Path) -> dict[str, dict[str, float]]:
    """Layer -> kind of matrix -> the share of its weights that a mask keeps; "all" sums up each."""
    sizes, (mask,), _ = compare.read([file])
    kept = compare.common(mask, mask)
    grid = compare.grid(sizes, kept, kept, kept)
    return {layer: {kind: part["kept"][0] / max(1, part["weights"]) for kind, part in row.items()} for layer, row in grid.items()}


# ---- the command ----

COMMANDS = {"curves": draw_curves, "transfer": draw_transfer, "overlap": draw_overlap, "densities": draw_densities}


def main(args: argparse.Namespace) -> None:
    need_matplotlib()  # met before anything is read
    from bert_tickets.report.results import need_one_subject, read_failures, read_records

    records = read_records(args.runs)
    need_one_subject(records)
    COMMANDS[args.figure](records, args)
    for failure in read_failures(args.runs):
        print(f"not drawn: {failure}")
    print(f"drawn in {args.output}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, what in {
        "curves": "the metric over sparsity, a panel a task",
        "transfer": "every ticket trained on every task, as a difference to the dense network",
        "overlap": "how alike the tickets of different tasks are, and of different seeds",
        "densities": "the share of weights kept in each layer, by kind of matrix",
    }.items():
        figure = figures.add_parser(name, help=what, description=f"Draw {what}.")
        figure.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold them")
        figure.add_argument("--output", type=picture_file, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
        figure.add_argument("--title", metavar="TEXT", help="the picture's title")
        if name != "curves":
            figure.add_argument("--sparsity", type=float, required=True, metavar="PERCENT", help="of the weights removed")
        if name == "transfer":
            bases = ("dense", "same-task")
            figure.add_argument("--relative", choices=bases, default="dense", help="to what the difference is (default: dense)")
    return parser.parse_args(hyphens(argv))


if __name__ == "__main__":
    run_command(main, parse())
