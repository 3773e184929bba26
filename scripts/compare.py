"""Compute mask overlap for every pair of masks, and the overlap expected by chance; for two masks also by layer or kind.

  python scripts/compare.py runs/mnli-imp-* runs/qqp-imp-* masks/random.safetensors --level 7 --output overlap.png
  python scripts/compare.py runs/mnli-imp-s57-1a2b3c4d/level_07 mask.pt --by kind --output kinds.png

Takes mask files (a released mask.pt too), run directories (their newest level, or --level) and folders of a level. Prints tables;
--output draws a heat map of the pairs, or with --by one of layers and kinds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from bert_tickets.cli import FORMATTER, hyphens, run_command
from bert_tickets.errors import UserError
from bert_tickets.files import write
from bert_tickets.masking.similarity import MEASURES, Overlap, Packed, check_same_covering, mask_overlap, overlap_by_part, pack
from bert_tickets.runs.directory import level_dir, levels_done
from bert_tickets.runs.summary import table

FILE = "mask.safetensors"  # in a level's folder


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("masks", nargs="+", metavar="MASK", help="two or more: mask files, run directories, folders of a level")
    parser.add_argument("--level", type=int, metavar="N", help="the level of run directories (default: the newest)")
    parser.add_argument("--by", choices=("layer", "kind"), help="compare two masks also by layer, or by kind of matrix")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw a heat map: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    args = parser.parse_args(hyphens(argv))
    if len(args.masks) < 2:
        parser.error("give at least two masks")
    if args.by and len(args.masks) != 2:
        parser.error(f"--by {args.by} compares two masks, and {len(args.masks)} were given")
    if args.level is not None and not any(is_run(Path(place)) for place in args.masks):
        parser.error(f"--level {args.level} has no effect: no run directory is given")
    if args.output and args.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {args.output}: a picture is .png, .svg or .pdf")
    if args.output and importlib.util.find_spec("matplotlib") is None:
        parser.error("--output needs matplotlib: pip install -e '.[figures]'")
    return args


def main(args: argparse.Namespace) -> None:
    masks = read([find_mask(Path(place), args.level) for place in args.masks])
    names = labels(masks)
    pairs = {(i, j): mask_overlap(masks[i].bits, masks[j].bits) for i, j in combinations(range(len(masks)), 2)}
    parts = overlap_by_part(masks[0].bits, masks[1].bits) if args.by else {}
    rows = [[name, f"{mask.sparsity:.1%}", str(mask.path)] for name, mask in zip(names, masks, strict=True)]
    print(table(["mask", "sparsity", "file"], rows) + "\n")
    rows = [[names[i], names[j], *_numbers(overlap)] for (i, j), overlap in pairs.items()]
    print(table(["mask", "and mask", *MEASURES], rows) + "\n")
    if args.by:
        print(part_table(args.by, names, parts) + "\n")
    print("\n".join(f"{name:16}  {meaning}" for name, meaning in MEASURES.items()))
    if args.json:
        write_json(args.json, names, masks, pairs, parts)
    if args.output:
        draw_parts(args.output, names, parts) if args.by else draw_pairs(args.output, names, masks, pairs)
        print(f"drawn in {args.output}")


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


@dataclass(frozen=True)
class File:
    """A mask and its file."""

    path: Path
    bits: Packed
    sparsity: float
    info: Mapping[str, Any]  # the metadata of the mask


def read(paths: Sequence[Path]) -> list[File]:
    """Read mask files. Raises `UserError` if two cover different tensors."""
    from bert_tickets.masking.mask import Mask

    found: list[File] = []
    for path in paths:
        mask = Mask.load(path)
        found.append(File(path, pack(mask), mask.sparsity, mask.info))
        try:
            check_same_covering(found[0].bits, found[-1].bits)
        except UserError as error:
            raise UserError(f"{paths[0]} and {path} cannot be compared: {error}") from None
    return found


def labels(masks: Sequence[File]) -> list[str]:
    """Name each mask by its task (or file), with level and seed where they distinguish masks, or else by its path."""
    for keys in ((), ("level",), ("seed",), ("level", "seed")):
        names = []
        for mask in masks:
            file = mask.path.stem if mask.path.stem != "mask" else mask.path.absolute().parent.name
            names.append(
                " ".join([mask.info.get("task", file), *(f"{key} {mask.info[key]}" for key in keys if key in mask.info)])
            )
        if len({*names}) == len(names):
            return names
    return [str(mask.path) for mask in masks]


# ---- tables, pictures, JSON ----


def _numbers(overlap: Overlap) -> list[str]:
    return [f"{getattr(overlap, name):.4f}" for name in MEASURES]


def part_table(by: str, names: Sequence[str], parts: Mapping[str, Mapping[str, Overlap]]) -> str:
    """Format a line per layer, or per kind."""
    found = parts["all"] if by == "kind" else {layer: row["all"] for layer, row in parts.items()}
    rows = [[part, f"{o.weights:,}", *(f"{kept / o.weights:.1%}" for kept in o.kept), *_numbers(o)] for part, o in found.items()]
    return table([by, "weights", *(f"kept by {name}" for name in names), *MEASURES], rows)


def write_json(
    path: Path,
    names: Sequence[str],
    masks: Sequence[File],
    pairs: Mapping[tuple[int, int], Overlap],
    parts: Mapping[str, Mapping[str, Overlap]],
) -> None:
    """Write all numbers: `masks`, `pairs` (of their indices), and `parts` by layer and kind."""
    found = {
        "masks": [
            {"label": name, "file": str(mask.path), "sparsity": mask.sparsity, "info": mask.info}
            for name, mask in zip(names, masks, strict=True)
        ],
        "pairs": [{"masks": pair, **asdict(overlap)} for pair, overlap in pairs.items()],
        "parts": {layer: {kind: asdict(overlap) for kind, overlap in row.items()} for layer, row in parts.items()},
    }
    write(path, json.dumps(found, indent=1).encode() + b"\n")


def draw_pairs(output: Path, names: list[str], masks: Sequence[File], pairs: Mapping[tuple[int, int], Overlap]) -> None:
    """Draw the Jaccard index of every two masks, and each mask's sparsity on the diagonal."""
    cells: list[list[Any]] = [[(None, f"{mask.sparsity:.1%}")] * len(masks) for mask in masks]
    for (i, j), overlap in pairs.items():
        cells[i][j] = cells[j][i] = _cell(overlap)
    _draw(output, "Mask overlap (in brackets: by chance)\nOn the diagonal: sparsity", ("mask", "mask"), names, names, cells)


def draw_parts(output: Path, names: Sequence[str], parts: Mapping[str, Mapping[str, Overlap]]) -> None:
    """Draw the Jaccard index of two masks by layer and kind. A tensor outside the layers, such as the pooler, is a row."""
    kinds = [kind for kind in parts["all"] if kind not in parts or kind == "all"]
    cells = [[_cell(row[kind]) if kind in row else (None, "") for kind in kinds] for row in parts.values()]
    title = f"Overlap of {names[0]} with {names[1]}\n(in brackets: by chance)"
    _draw(output, title, ("kind of matrix", "layer"), kinds, list(parts), cells)


def _cell(overlap: Overlap) -> tuple[float, str]:
    return overlap.jaccard, f"({overlap.chance:.3f})"


def _draw(output: Path, title: str, axes: tuple[str, str], columns: list[str], rows: list[str], cells: list[list[Any]]) -> None:
    from bert_tickets.report.heatmap import draw

    draw(output, title, axes, columns, rows, cells, MEASURES["jaccard"])


if __name__ == "__main__":
    run_command(main, parse())
