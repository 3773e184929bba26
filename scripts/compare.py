"""Compute mask overlap for every pair of masks, and the overlap expected by chance; for two masks also by layer or kind.

  python scripts/compare.py runs/mnli-imp-* runs/qqp-imp-* masks/random.safetensors --level 7 --output overlap.png
  python scripts/compare.py runs/mnli-imp-s57-1a2b3c4d/level_07 mask.pt --by kind --output kinds.png

Takes mask files (a released mask.pt too), run directories (their newest level, or --level) and folders of a level. Prints tables;
--output draws a heat map of the pairs, or with --by one of layers and kinds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.cli import FORMATTER, hyphens, run_command
from bert_tickets.errors import UserError
from bert_tickets.files import write
from bert_tickets.masking.similarity import MEASURES, overlap, pack, tensor_counts, with_totals
from bert_tickets.report.formats import markdown_grid
from bert_tickets.report.pictures import draw_heat_map, picture_file
from bert_tickets.runs.directory import level_dir, levels_done

if TYPE_CHECKING:
    from pandas import DataFrame

FILE = "mask.safetensors"  # in a level's folder


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("masks", nargs="+", type=Path, metavar="MASK", help="two or more masks: files, runs, folders of a level")
    parser.add_argument("--level", type=int, metavar="N", help="the level of run directories (default: the newest)")
    parser.add_argument("--by", choices=("layer", "kind"), help="compare two masks also by layer, or by kind of matrix")
    parser.add_argument("--output", type=picture_file, metavar="FILE", help="draw a heat map: .png, .svg or .pdf")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the last table that is printed, in full precision")
    args = parser.parse_args(hyphens(argv))
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
    names = labels(paths, [mask.info for mask in masks])
    sparsities = [f"{mask.sparsity:.1%}" for mask in masks]
    show(pd.DataFrame({"mask": names, "sparsity": sparsities, "file": map(str, paths)}))
    packed = [pack(mask) for mask in masks]
    lines: list[dict[str, Any]] = []
    for i, j in combinations(range(len(masks)), 2):
        try:
            counts = tensor_counts(packed[i], packed[j])
        except UserError as error:
            raise UserError(f"{paths[i]} and {paths[j]} cannot be compared: {error}") from None
        lines.append({"mask": names[i], "and mask": names[j], **overlap(counts)})
    table = pd.DataFrame(lines)
    show(table)
    parts = with_totals(counts).groupby(["layer", "kind"], sort=False)
    if args.by:
        table = part_table(parts, args.by)
        show(table)
    print("\n".join(f"{name:16}  {meaning}" for name, meaning in MEASURES.items()))
    if args.csv:
        write(args.csv, table.to_csv(index=False).encode())
    if args.output:
        draw_parts(args.output, names, parts) if args.by else draw_pairs(args.output, names, sparsities, table)
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
    done = levels_done(place)
    if not done:
        raise UserError(f"{place} holds no mask: give mask files, run directories, or folders of a level")
    if level is not None and not 0 <= level < done:
        raise UserError(f"{place} has no level {level}; its levels are 0 to {done - 1}")
    return level_dir(place, done - 1 if level is None else level) / FILE


def labels(paths: Sequence[Path], infos: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each mask by its task (or file), and by its method, seed and level where masks differ in them; or else by its path."""
    names = [str(info.get("task", path.stem)) for path, info in zip(paths, infos, strict=True)]
    for key in ("method", "seed", "level"):
        values = [info.get(key) for info in infos]
        if len({*values} - {None}) > 1:
            names = [f"{name} {key} {value}" if value is not None else name for name, value in zip(names, values, strict=True)]
    return names if len({*names}) == len(names) else list(map(str, paths))


# ---- tables and pictures ----


def part_table(parts: Any, by: str) -> DataFrame:
    """A line per layer, or per kind: its weights, the percentage that each mask keeps, and the measures."""
    import pandas as pd

    lines = []
    for (layer, kind), counts in parts:
        if (kind if by == "layer" else layer) == "all":
            sums = counts[["weights", "one", "other"]].sum()
            kept = {f"kept by {name} (%)": 100 * sums[name] / sums["weights"] for name in ("one", "other")}
            lines.append({by: layer if by == "layer" else kind, "weights": sums["weights"], **kept, **overlap(counts)})
    return pd.DataFrame(lines)


def draw_pairs(output: Path, names: Sequence[str], sparsities: Sequence[str], pairs: DataFrame) -> None:
    """Draw the Jaccard index of every two masks, and each mask's sparsity on the diagonal."""
    import pandas as pd

    square = pd.DataFrame(index=pd.Index(names, name="mask"), columns=pd.Index(names, name="mask"))
    values, remarks = square.astype(float), square.astype(object)
    for name, sparsity in zip(names, sparsities, strict=True):
        remarks.loc[name, name] = sparsity
    for one, other, jaccard, chance in pairs[["mask", "and mask", "jaccard", "chance"]].itertuples(index=False):
        for row, column in ((one, other), (other, one)):
            values.loc[row, column], remarks.loc[row, column] = jaccard, f"({chance:.3f})"
    title = "Mask overlap (in brackets: by chance)\nOn the diagonal: sparsity"
    draw_heat_map(output, title, values, remarks, MEASURES["jaccard"])


def draw_parts(output: Path, names: Sequence[str], parts: Any) -> None:
    """Draw the Jaccard index of two masks by layer and kind. A tensor outside the layers, such as the pooler, is a row."""
    import pandas as pd

    found = pd.DataFrame({place: overlap(counts) for place, counts in parts}).T
    found["remark"] = found["chance"].map("({:.3f})".format)
    values, remarks = (found[name].unstack(sort=False) for name in ("jaccard", "remark"))
    title = f"Overlap of {names[0]} with {names[1]}\n(in brackets: by chance)"
    values = values.rename_axis(index="layer", columns="kind of matrix")
    draw_heat_map(output, title, values, remarks.fillna(""), MEASURES["jaccard"])


if __name__ == "__main__":
    run_command(main, parse())
