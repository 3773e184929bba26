"""Where a number comes from, and whether it still stands: a run's command, data, model and masks; every file verified.

  python -m bert_tickets.runs.verify runs/mnli-imp-s57-...
  python -m bert_tickets.runs.verify runs                           # all runs of a folder; exit code 1 if a file of any is damaged

Nothing is changed. Takes run directories, or folders that hold them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bert_tickets.cli import run_command
from bert_tickets.errors import UserError, brief, need_file
from bert_tickets.files import check, read_checksummed, read_facts, read_info
from bert_tickets.runs.directory import (
    FAILURE,
    check_format,
    events,
    failure,
    is_strict,
    level_dir,
    levels_done,
    read_failure,
    results,
    results_lines,
)
from bert_tickets.runs.integrity import check_mask, check_metrics, check_model, check_tensors, kept_files, missing
from bert_tickets.runs.summary import table

if TYPE_CHECKING:
    from bert_tickets.masking.mask import Mask

TENSORS = ("weights.safetensors", "moments.safetensors", "rewind.safetensors", "checkpoint.safetensors")
SOUND, UNSEALED = "sound", "readable; of an older version, without a checksum"
VARIES = "not checked: differs between equal runs"
UNNOTED = "not checked: an older version noted no digest of it"
FOREIGN = "not of a run"
LEFT = "left by a kill; the next start removes it"
HARMLESS = {SOUND, UNSEALED, VARIES, UNNOTED, FOREIGN, LEFT}
Finding = tuple[Path, str]  # a file and what is to be said of it


# ---- what a run was ----


def provenance(run: Path) -> str:
    """What was run, where, on what, as run.json and log.jsonl tell."""
    check_format(run)
    about = read_checksummed(run / "run.json")
    try:
        config, noted, here = about["config"], about["fingerprint"], about["environment"]
        git = here["git"]
        lines = {
            "command": "python " + shlex.join(about["argv"]),
            "differs from the preset": ", ".join(f"{key} {value}" for key, value in about["differs_from_preset"].items())
            or "nothing",
            "seed": config["seed"],
            "began": _began(run),
            "commit": "not known" if git is None else git["sha"] + ", with changes" * bool(git["dirty"]),
            "versions": ", ".join(f"{name} {number}" for name, number in here["versions"].items()),
            "device": f"{noted['device']}, {noted['precision']}, {here['threads']} threads"
            + f", {here['gpu']}" * bool(here["gpu"]),
            "model": f"{config['model']}, sha256 {noted['model']}",
            "training set": f"{noted['train']['examples']:,} examples, sha256 {noted['train']['sha256']}",
            **{
                f"evaluated on {name}": f"{of['examples']:,} examples, sha256 {of['sha256']}"
                for name, of in noted["evaluation"].items()
            },
        }
        if config["mask"]:
            lines["given mask"] = f"{config['mask']}: {_origin(run)}"
        if config["init"] != "pretrained":
            lines["starts from"] = f"{config['init']} {json.dumps(noted['init']) if noted.get('init') else ''}"
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{run / 'run.json'} is not a run's: {repr(error)[:200]}") from None
    width = max(map(len, lines))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in lines.items())


def _began(run: Path) -> str:
    """When and where the run began, and how often it went on."""
    if not (run / "log.jsonl").exists():
        return "not known: log.jsonl is gone"
    told = list(events(run / "log.jsonl"))
    starts = [event for event in told if event.get("event") == "start"]
    resumed = sum(event.get("event") == "resume" for event in told)
    where = f"{starts[0].get('time')} on {starts[0].get('host')}" if starts else "not known"
    return where + f", gone on with {resumed} time(s)" * bool(resumed)


def _origin(run: Path) -> str:
    file = level_dir(run, 0) / "mask.safetensors"
    if not file.exists():
        return "not used yet"
    own = ("format", "shapes", "density", "checksum")
    return ", ".join(f"{key} {value}" for key, value in sorted(read_info(file).items()) if key not in own)


def levels(run: Path) -> str:
    """A line a finished level: its metric and the hashes of its mask and of the weights it began with. A star is of a metric that
    the run warnings, and says why below."""
    rows, told = [], []
    for result in results(run):
        value = result["metrics"][result["metric"]]
        number = "undefined" if value is None else f"{value:.6f}"
        hashes = [result["mask_sha256"], str(result.get("init_sha256"))]
        rows.append([str(result["level"]), f"{result['sparsity']:.2%}", number + "*" * bool(result.get("warnings")), *hashes])
        told += [f"* level {result['level']}: {doubt}" for doubt in result.get("warnings", [])]
    if failed := failure(run):
        told.append(f"level {failed['level']} came to no result: {failed['ended']}")
    header = ["level", "sparsity", results(run)[0]["metric"] if rows else "", "mask sha256", "began with sha256"]
    return "\n".join([table(header, rows) if rows else "no finished level", *told])


# ---- whether its files are what they were ----


def verify(run: Path) -> Iterator[Finding]:
    """Every file of a run directory and what is `HARMLESS` or wrong with it; then what is missing or contradicts."""
    for path in sorted(path for path in run.rglob("*") if not path.is_dir()):
        try:
            need_file(path)
            yield path, _verdict(run, path)
        except (UserError, OSError) as error:
            yield path, str(error)
    yield from ((path, f"is missing: {what}") for path, what in missing(run))
    yield from _disagreements(run)


def _verdict(run: Path, path: Path) -> str:
    name, place = path.name, path.relative_to(run).parts
    if name in ("lock", "log.jsonl"):
        return VARIES
    if any(part.startswith(".") for part in place):
        return LEFT
    if name in ("run.json", "metrics.json") and "model" not in place:
        read_checksummed(path, strict=is_strict(run))
        if name == "metrics.json":
            check_metrics(run, _level_of(path))
        elif is_strict(run) and (told := _runs_of_levels(run)) - {str(read_checksummed(path).get("run"))}:
            raise UserError(f"{path} is damaged or another run's: its levels are of {brief(', '.join(sorted(told)))}")
        return SOUND if b'"checksum"' in path.read_bytes() else UNSEALED
    if name == FAILURE and len(place) == 1:
        read_failure(run)
        return SOUND
    if name == "results.jsonl":
        return SOUND if path.read_bytes() == results_lines(run) else "is not what the levels' metrics.json say"
    if "model" in place:
        level = _level_of(path.parent)
        check_model(run, level, name)
        noted = kept_files(run, level)
        return SOUND if name in noted else FOREIGN if noted else UNNOTED
    if path.suffix == ".safetensors":
        if name == "mask.safetensors":
            check_mask(run, _level_of(path))
        elif name in TENSORS:
            check_tensors(path, run, read_facts(path).get("level") if len(place) == 1 else _level_of(path))
        else:
            check(path)
        return SOUND if "checksum" in read_info(path) else UNSEALED
    return FOREIGN


def _runs_of_levels(run: Path) -> set[str]:
    """Which runs the levels say that they are of; none where one of them is damaged, which is said of it."""
    try:
        return {str(line.get("run")) for line in results(run)}
    except UserError:
        return set()


def _level_of(path: Path) -> int:
    """The level in whose folder a file lies."""
    number = path.parent.name.removeprefix("level_")
    if not (number.isascii() and number.isdigit()) or path.parent.name != f"level_{int(number):02d}":
        raise UserError(f"{path} is in no level's folder")
    return int(number)


def _disagreements(run: Path) -> Iterator[Finding]:
    """What sound files say against each other: hashes, counts, a weight that grew back, or that is trained outside the mask."""
    before: Mask | None = None
    for level in range(levels_done(run)):
        try:
            mask, found = _level(run, level, before)
        except UserError as error:
            yield level_dir(run, level), str(error)
            before = None
            continue
        yield from ((level_dir(run, level), what) for what in found)
        before = mask


def _level(run: Path, level: int, before: Mask | None) -> tuple[Mask, list[str]]:
    from bert_tickets.files import read_tensors
    from bert_tickets.masking.mask import Mask

    folder = level_dir(run, level)
    said, mask, found = read_checksummed(folder / "metrics.json"), Mask.load(folder / "mask.safetensors"), []
    if said.get("mask_sha256") != mask.sha256():
        found.append("metrics.json names another mask (mask_sha256)")
    if (said.get("kept"), said.get("total"), said.get("level")) != (mask.kept, mask.total, level):
        found.append("metrics.json has other counts than the mask, or another level")
    if before is not None and [(name, kept.shape) for name, kept in before.items()] != [(n, k.shape) for n, k in mask.items()]:
        found.append("the mask is of another architecture than the level before's")
    elif before is not None and any((kept & ~before[name]).any() for name, kept in mask.items()):
        found.append("the mask keeps weights that the level before had removed")
    if (folder / "weights.safetensors").exists():
        weights = read_tensors(folder / "weights.safetensors")
        if any(name not in weights or weights[name].shape != kept.shape for name, kept in mask.items()):
            found.append("weights.safetensors is of another architecture than the mask")
        elif any((weights[name][~kept] != 0).any() for name, kept in mask.items()):
            found.append("weights.safetensors has weights where the mask has none")
        if not all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point()):
            found.append("weights.safetensors has weights that are not finite")
    return mask, found


# ---- the command ----


def inspect(run: Path) -> bool:
    """Print all of it for one run; whether every file is sound."""
    print(f"{run}")
    sound = True
    for part in (provenance, levels):
        try:
            print(part(run))
        except UserError as error:
            print(error)
            sound = False
    good, other = 0, []
    for path, verdict in verify(run):
        good += verdict in (SOUND, UNSEALED)
        sound = sound and verdict in HARMLESS
        if verdict != SOUND:
            other.append(f"  {path.relative_to(run)}: {verdict}")
    print(f"{good} files verified" + (", and:" if other else ""))
    print("\n".join([*other, ""]))
    return sound


def main(args: argparse.Namespace) -> None:
    places = [Path(place) for place in args.runs]
    runs = [run for place in places for run in _runs(place)]
    if not runs:
        raise UserError(f"no run directory in {', '.join(args.runs)}")
    damaged = [run for run in runs if not inspect(run)]
    if damaged:
        print(f"damaged: {', '.join(map(str, damaged))}", file=sys.stderr)
        sys.exit(1)


def _runs(place: Path) -> list[Path]:
    """The run directories of a place: what has a run.json, or levels and has lost it."""
    found = [place] if (place / "run.json").is_file() or level_dir(place, 0).is_dir() else place.glob("**/run.json")
    return sorted({path.parent if path.name == "run.json" else path for path in found})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders of them")
    run_command(main, parser.parse_args())
