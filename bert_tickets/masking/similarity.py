"""How alike masks are: the overlap of every pair, beside what chance alone would give; of two also by layer and by kind.

  python -m bert_tickets.masking.similarity runs/mnli-imp-* runs/qqp-imp-* masks/random.safetensors --level 7 --output overlap.png
  python -m bert_tickets.masking.similarity runs/mnli-imp-s57-.../level_07 mask.pt --by kind --output parts.png

Takes mask files, the released code's mask.pt among them; run directories, of which the newest level counts, or --level; and
folders of one level. Prints tables; --output draws a heat map of the pairs, with --by one of layers and kinds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.cli import hyphens, run_command
from bert_tickets.errors import UserError
from bert_tickets.report.heatmap import Cell, draw
from bert_tickets.report.pictures import need_matplotlib, picture_file
from bert_tickets.runs.summary import table

if TYPE_CHECKING:
    from bert_tickets.masking.mask import Mask

FILE = "mask.safetensors"  # in a level's folder
KINDS = {
    "attention.self.query.weight": "query",
    "attention.self.key.weight": "key",
    "attention.self.value.weight": "value",
    "attention.output.dense.weight": "attention output",
    "intermediate.dense.weight": "intermediate",
    "output.dense.weight": "output",
}
ORDER = [*KINDS.values(), "pooler", "other"]
PLACE = re.compile(r"bert\.(?:encoder\.layer\.(\d+)|(pooler))\.(.+)")
MEASURE = "overlap of the kept weights"
LEGEND = """\
overlap    |both| / |either| of the kept weights
by chance  what two random masks that keep as many would have; in tensors: that keep as many in every tensor
distance   the share of all weights on which the two masks differ"""

Counts = Mapping[str, int]  # weights by the name of their tensor


# ---- counting ----


def pack(mask: Mask) -> dict[str, int]:
    """The bits of each tensor as one integer, on which & and `bit_count` are the whole arithmetic: 11 MB for BERT-base."""
    import numpy as np

    return {name: int.from_bytes(np.packbits(kept.cpu().numpy(), axis=None).tobytes(), "little") for name, kept in mask.items()}


def common(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """How many weights two packed masks both keep, by tensor."""
    return {name: (bits & other[name]).bit_count() for name, bits in one.items()}


def likeness(sizes: Counts, one: Counts, other: Counts, both: Counts) -> dict[str, Any]:
    """Overlap, distance and what chance would give, over the tensors of `sizes`: how many weights each tensor has, how many
    of them one mask keeps, the other, and both.

    By chance is the overlap at the expected number of common weights: k * l / n where random masks keep k and l of n. (The
    expected overlap itself differs from it by the order of 1 / n.)
    """
    n, k, m, x = (sum(counts[name] for name in sizes) for counts in (sizes, one, other, both))
    in_tensors = sum(one[name] * other[name] / max(1, size) for name, size in sizes.items())
    return {
        "weights": n,
        "kept": [k, m],
        "overlap": _jaccard(x, k, m),
        "chance": _jaccard(k * m / max(1, n), k, m),
        "chance_in_tensors": _jaccard(in_tensors, k, m),
        "distance": (k + m - 2 * x) / max(1, n),
    }


def _jaccard(both: float, one: int, other: int) -> float:
    return both / (one + other - both) if one or other else 1.0  # two empty masks are alike, as for Mask.overlap


# ---- layers and kinds ----


def place_of(name: str) -> tuple[str, str]:
    """The layer of a tensor ("0", ..., "pooler", "other") and its kind (one of `ORDER`; "other" for biases and LayerNorms)."""
    found = PLACE.fullmatch(name)
    if not found:
        return "other", "other"
    if found[2]:
        return "pooler", "pooler" if found[3] == "dense.weight" else "other"
    return found[1], KINDS.get(found[3], "other")


def parts(sizes: Counts, by: str) -> dict[str, dict[str, int]]:
    """The sizes split by `layer` or `kind`, in the order of the network; the last part, "all", is the whole."""
    split: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        split.setdefault(place_of(name)[by == "kind"], {})[name] = size
    order = sorted(split, key=lambda part: (part in ORDER, ORDER.index(part) if part in ORDER else int(part)))
    return {part: split[part] for part in order} | {"all": dict(sizes)}


def grid(sizes: Counts, *counts: Counts) -> dict[str, dict[str, dict[str, Any]]]:
    """The likeness of each part, layer -> kind, where there are weights; "all" sums up both. `counts` as for `likeness`."""
    kinds = parts(sizes, "kind")
    found = {}
    for layer, own in parts(sizes, "layer").items():
        inside = {kind: {name: size for name, size in own.items() if name in names} for kind, names in kinds.items()}
        found[layer] = {kind: likeness(part, *counts) for kind, part in inside.items() if part}
    return found


# ---- which masks, and what they are called ----


def is_run(place: str) -> bool:
    return Path(place).is_dir() and not (Path(place) / FILE).exists()


def find(place: str, level: int | None) -> Path:
    """The mask's file: the place itself, the one in a level's folder, or in a run directory `level`'s or else the newest's."""
    folder = Path(place)
    if not is_run(place):
        return folder / FILE if folder.is_dir() else folder  # if it is not there, Mask.load will say so
    levels = {int(path.parent.name[6:]): path for path in folder.glob(f"level_*/{FILE}") if path.parent.name[6:].isdecimal()}
    if not levels:
        raise UserError(f"{place} holds no mask: give mask files, run directories, or folders of a level")
    if level is not None and level not in levels:
        raise UserError(f"{place} has no level {level}; it has {', '.join(map(str, sorted(levels)))}")
    return levels[max(levels) if level is None else level]


def read(paths: Sequence[Path]) -> tuple[dict[str, int], list[dict[str, int]], list[dict[str, str]]]:
    """The sizes of the tensors; each mask, packed; what each file says of itself. Two masks at most are unpacked at once.

    Raises `UserError`, naming two files and a tensor, where masks are of different networks.
    """
    from bert_tickets.masking.mask import Mask

    first = Mask.load(paths[0])
    packed, infos = [pack(first)], [first.info]
    for path in paths[1:]:
        mask = Mask.load(path)
        try:
            first.check_fits(mask, str(path))
        except UserError as error:
            raise UserError(f"{paths[0]} is no mask of the same network: {error}") from None
        packed.append(pack(mask))
        infos.append(mask.info)
    return {name: tensor.numel() for name, tensor in first.items()}, packed, infos


def label(paths: Sequence[Path], infos: Sequence[Mapping[str, str]]) -> list[str]:
    """A short name for each mask, no two alike: its task, and level and seed where they tell it from another; or of its path."""
    labels = [info.get("task", "") for info in infos]
    for key in ("level", "seed"):
        values = [{info.get(key) for info, name in zip(infos, labels, strict=True) if name == own} for own in labels]
        labels = [
            f"{name} {key} {info[key]}" if name and key in info and len(found) > 1 else name
            for name, info, found in zip(labels, infos, values, strict=True)
        ]
    labels = [_end(path, paths) if not name or labels.count(name) > 1 else name for name, path in zip(labels, paths, strict=True)]
    return [f"{name} #{labels[:i].count(name) + 1}" if labels.count(name) > 1 else name for i, name in enumerate(labels)]


def _end(path: Path, paths: Sequence[Path]) -> str:
    """The shortest end of a path that no other path ends in, without what says only that it is a mask; levels if need be."""
    for dull in (re.compile(r"mask|level_\d+"), re.compile("mask|level_00")):
        words = {p: [part for part in _plain(p).parts if not dull.fullmatch(part)] for p in {path, *paths}}
        own = words.pop(path)
        for n in range(1, len(own) + 1):
            if all(own[-n:] != other[-n:] for other in words.values()):
                return "/".join(own[-n:])
        if own and own not in words.values():
            return "/".join(own)  # itself the end of another
    return path.name


def _plain(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".safetensors", ".pt") else path


# ---- the command ----


def main(args: argparse.Namespace) -> None:
    if args.output:
        need_matplotlib()  # a picture that cannot be drawn is refused before anything is counted
    from bert_tickets.files import write_json

    if args.level is not None and all(Path(place).exists() and not is_run(place) for place in args.masks):
        raise UserError(f"--level {args.level} chooses within run directories, and none was given")
    found = measure([find(place, args.level) for place in args.masks], by_part=args.by is not None)
    print_tables(found, args.by)
    if args.json:
        write_json(Path(args.json), found)
    if args.output:
        picture = picture_of_parts if args.by else picture_of_pairs
        picture(found, args.output)
        print(f"drawn in {args.output}")


def measure(paths: Sequence[Path], *, by_part: bool) -> dict[str, Any]:
    """What --json writes: the masks, their pairs, and with `by_part`, of two masks, the likeness of each part."""
    sizes, packed, infos = read(paths)
    kept = [common(bits, bits) for bits in packed]
    both = {(i, j): common(packed[i], packed[j]) for i, j in combinations(range(len(paths)), 2)}
    labels, total = label(paths, infos), max(1, sum(sizes.values()))
    masks = [
        {"label": name, "file": str(path), "sparsity": 1 - sum(counts.values()) / total, "about": info}
        for name, path, counts, info in zip(labels, paths, kept, infos, strict=True)
    ]
    pairs = [{"masks": [i, j], **likeness(sizes, kept[i], kept[j], counts)} for (i, j), counts in both.items()]
    found = {"masks": masks, "pairs": pairs}
    return found | {"parts": grid(sizes, *kept, both[0, 1])} if by_part else found


def print_tables(found: Mapping[str, Any], by: str | None) -> None:
    def numbers(like: Mapping[str, Any]) -> list[str]:
        return [f"{like[key]:.4f}" for key in ("overlap", "chance", "chance_in_tensors", "distance")]

    labels, measures = [mask["label"] for mask in found["masks"]], ["overlap", "by chance", "in tensors", "distance"]
    print(table(["mask", "sparsity", "file"], [[m["label"], f"{m['sparsity']:.1%}", m["file"]] for m in found["masks"]]) + "\n")
    rows = [[*(labels[i] for i in pair["masks"]), *numbers(pair)] for pair in found["pairs"]]
    print(table(["mask", "and mask", *measures], rows) + "\n")
    if by:
        parts = found["parts"]["all"] if by == "kind" else {layer: row["all"] for layer, row in found["parts"].items()}
        rows = [
            [part, f"{like['weights']:,}", *(f"{k / max(1, like['weights']):.1%}" for k in like["kept"]), *numbers(like)]
            for part, like in parts.items()
        ]
        print(table([by, "weights", *(f"kept by {name}" for name in labels), *measures], rows) + "\n")
    print(LEGEND)


def picture_of_pairs(found: Mapping[str, Any], output: Path) -> None:
    """The overlap of every two masks, and on the diagonal what each removes."""
    labels = [mask["label"] for mask in found["masks"]]
    cells: list[list[Cell]] = [[(None, f"{mask['sparsity']:.1%}")] * len(labels) for mask in found["masks"]]
    for pair in found["pairs"]:
        i, j = pair["masks"]
        cells[i][j] = cells[j][i] = _cell(pair)
    title = "Overlap (in brackets: by chance)\nand, on the diagonal, weights removed"
    draw(output, title, ("mask", "mask"), labels, labels, cells, MEASURE)


def picture_of_parts(found: Mapping[str, Any], output: Path) -> None:
    """The overlap of two masks by layer and kind; the pooler, a layer and a kind of its own, is a row."""
    layers, labels = found["parts"], [mask["label"] for mask in found["masks"]]
    kinds = [kind for kind in layers["all"] if kind != "pooler"]
    cells = [[_cell(row[kind]) if kind in row else (None, "") for kind in kinds] for row in layers.values()]
    title = f"Overlap of {labels[0]} with {labels[1]}\n(in brackets: by chance)"
    draw(output, title, ("kind of matrix", "layer"), kinds, list(layers), cells, MEASURE)


def _cell(like: Mapping[str, Any]) -> Cell:
    return like["overlap"], f"({like['chance']:.3f})"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bert_tickets.masking.similarity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("masks", nargs="+", metavar="MASK", help="two or more: mask files, run directories, folders of a level")
    parser.add_argument("--level", type=int, metavar="N", help="of run directories this level, instead of the newest")
    parser.add_argument("--by", choices=("layer", "kind"), help="compare two masks also by layer, or by kind of matrix")
    parser.add_argument("--output", type=picture_file, metavar="FILE", help="draw a heat map: .png, .svg or .pdf")
    parser.add_argument("--json", metavar="FILE", help="write all numbers")
    args = parser.parse_args(hyphens(argv))
    if len(args.masks) < 2:
        parser.error("two masks are needed, and one was given")
    if args.by and len(args.masks) != 2:
        parser.error(f"--by {args.by} compares two masks, and {len(args.masks)} were given")
    return args


if __name__ == "__main__":
    run_command(main, parse())
