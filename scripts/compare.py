"""Compute mask overlap for every pair of masks, and the overlap expected by chance; for two masks also by layer or kind.

  python scripts/compare.py runs/mnli-imp-* runs/qqp-imp-* masks/random.safetensors --level 7 --output overlap.png
  python scripts/compare.py runs/mnli-imp-s57-1a2b3c4d/level_07 mask.pt --by kind --output kinds.png

Takes mask files (a released mask.pt too), run directories (their newest level, or --level) and folders of a level. Prints tables;
--output draws a heat map of the pairs, or with --by one of layers and kinds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.errors import UserError
from bert_tickets.files import write
from bert_tickets.masking.similarity import MEASURES, overlap, tensor_counts, with_totals
from bert_tickets.report.formats import markdown_grid
from bert_tickets.report.pictures import draw_heat_map, picture_file
from bert_tickets.runs.directory import find_level, level_dir

if TYPE_CHECKING:
    from pandas import DataFrame

FILE = "mask.safetensors"  # in a level's folder


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("masks", nargs="+", type=Path, metavar="MASK", help="two or more masks: files, runs, folders of a level")
    parser.add_argument("--level", type=int, metavar="N", help="the level of run directories (default: the newest)")
    parser.add_argument("--by", choices=("layer", "kind"), help="compare two masks also by layer, or by kind of matrix")
    parser.add_argument("--output", type=picture_file, metavar="FILE", help="draw a heat map: .png, .svg or .pdf")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the pairs, or with --by the parts, in full precision")
    args = parser.parse_args(normalize_argv(argv))
    if len(args.masks) < 2:
        parser.error("give at least two masks")
    if args.by and len(args.masks) != 2:
        parser.error(f"--by {args.by} compares two masks, and {len(args.masks)} were given")
    if args.level is not None and not any(map(is_run, args.masks)):
        parser.error(f"--level {args.level} has no effect: no run directory is given")
    return args


def main(args: argparse.Namespace) -> None:
    import pandas as pd

    from bert_tickets.masking.mask import Mask

    paths = [find_mask(place, args.level) for place in args.masks]
    masks = [Mask.load(path) for path in paths]
    sparsities = [f"{mask.sparsity:.1%}" for mask in masks]
    names = labels(paths, [mask.info for mask in masks])
    show(pd.DataFrame({"mask": names, "sparsity": sparsities, "file": map(str, paths)}))
    lines: list[dict[str, Any]] = []
    for i, j in combinations(range(len(paths)), 2):
        try:
            counts = tensor_counts(masks[i], masks[j])
        except UserError as error:
            raise UserError(f"{paths[i]} and {paths[j]} cannot be compared: {error}") from None
        lines.append({"mask": names[i], "and mask": names[j], **overlap(counts)})
    table = pd.DataFrame(lines)
    show(table)
    if args.by:
        table = part_table(counts)
        show(table[table["kind" if args.by == "layer" else "layer"] == "all"])
    print("\n".join(f"{name:16}  {meaning}" for name, meaning in MEASURES.items()))
    if args.csv:
        write(args.csv, table.to_csv(index=False).encode())
    if args.output:
        draw_parts(args.output, names, table) if args.by else draw_pairs(args.output, names, sparsities, table)
        print(f"drawn in {args.output}")


def show(table: DataFrame) -> None:
    print(markdown_grid(table.map(lambda value: f"{value:.4f}" if isinstance(value, float) else str(value))) + "\n")


# ---- which masks ----


def is_run(place: Path) -> bool:
    return place.is_dir() and not (place / FILE).exists()


def find_mask(place: Path, level: int | None) -> Path:
    """Return the mask file of a run directory (of `level`, or the newest), of a level's folder, or the file itself."""
    if not is_run(place):
        return place / FILE if place.is_dir() else place
    return level_dir(place, find_level(place, level)) / FILE


def labels(paths: Sequence[Path], infos: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each mask by its task or file, and by its method, seed and level where they differ; numbered, if names are equal."""
    names = [str(info.get("task", path.stem)) for path, info in zip(paths, infos, strict=True)]
    for key in ("method", "seed", "level"):
        values = [info.get(key) for info in infos]
        if len({*values} - {None}) > 1:
            names = [f"{name} {key} {value}" if value is not None else name for name, value in zip(names, values, strict=True)]
    if len({*names}) == len(names):
        return names
    places = ["/".join(path.parts[-3:-1]) if path.name == FILE else path.name for path in paths]
    return [f"{number} {place}" for number, place in enumerate(places, 1)]


# ---- tables and pictures ----


def part_table(counts: DataFrame) -> DataFrame:
    """A line per layer and kind ("all" sums up): its weights, the percentage that each mask keeps, and the measures."""
    import pandas as pd

    lines = []
    for (layer, kind), part in with_totals(counts).groupby(["layer", "kind"], sort=False):
        weights, one, other = part[["weights", "one", "other"]].sum()
        kept = {"weights": weights, "kept by one (%)": 100 * one / weights, "kept by other (%)": 100 * other / weights}
        lines.append({"layer": layer, "kind": kind, **kept, **overlap(part)})
    return pd.DataFrame(lines)


def draw_pairs(output: Path, names: Sequence[str], sparsities: Sequence[str], pairs: DataFrame) -> None:
    """Draw the Jaccard index of every two masks, and each mask's sparsity on the diagonal."""
    import pandas as pd

    cells = [(name, name, math.nan, sparsity) for name, sparsity in zip(names, sparsities, strict=True)]
    for one, other, jaccard, chance in pairs[["mask", "and mask", "jaccard", "chance"]].itertuples(index=False):
        cells += [(row, column, jaccard, f"({chance:.3f})") for row, column in ((one, other), (other, one))]
    title = "Mask overlap (in brackets: by chance)\nOn the diagonal: sparsity"
    drawn = pd.DataFrame(cells, columns=["row", "column", "value", "remark"])
    draw_heat_map(output, title, ("mask", "mask"), drawn, MEASURES["jaccard"])


def draw_parts(output: Path, names: Sequence[str], parts: DataFrame) -> None:
    """Draw the Jaccard index of two masks by layer and kind. A tensor outside the layers, such as the pooler, is a row."""
    title = f"Overlap of {names[0]} with {names[1]}\n(in brackets: by chance)"
    drawn = parts[(parts["kind"] == "all") | ~parts["kind"].isin(parts["layer"])]
    drawn = drawn.sort_values("layer", key=lambda layers: layers == "all", kind="stable")  # "all" after the pooler
    drawn = drawn.rename(columns={"layer": "row", "kind": "column", "jaccard": "value"})
    drawn["remark"] = drawn["chance"].map("({:.3f})".format)
    draw_heat_map(output, title, ("kind of matrix", "layer"), drawn, MEASURES["jaccard"])


if __name__ == "__main__":
    run_command(main, parse())
