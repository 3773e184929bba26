"""Print the provenance of a run and verify all its files, or count the zeros of a Hugging Face folder's weights.

  python scripts/verify.py runs/mnli-imp-s57-1a2b3c4d
  python scripts/verify.py runs                             # every run in a folder
  python scripts/verify.py mnli-70                          # sparsity by matrix, and whether its own mask fits
  python scripts/verify.py my-bert --mask mnli-70/mask.safetensors

Changes nothing. The exit code is 0 if all files are intact and the weights fit the mask, and 1 if a file is damaged, missing, or
of another run, if weights that the mask prunes are not zero, or if more than a few that it keeps are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from bert_tickets.cli import FORMATTER, Parser, normalize_argv, run_command
from bert_tickets.content import WEIGHTS, first_file
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts
from bert_tickets.runs.directory import events, level_dir, read_run, results
from bert_tickets.runs.integrity import problems
from bert_tickets.runs.summary import level_lines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("places", nargs="+", type=Path, metavar="FOLDER", help="runs, folders of runs, or Hugging Face folders")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="the mask that the weights of Hugging Face folders must fit")
    return parser.parse_args(normalize_argv(argv))


def main(args: argparse.Namespace) -> None:
    folders = [place for place in args.places if not is_run(place) and first_file(place, WEIGHTS)]
    found = {place: find_runs(place) for place in args.places if place not in folders}
    if empty := [str(place) for place, runs in found.items() if not runs]:
        raise UserError(f"no run directory in {', '.join(empty)}, and no weights (model.safetensors or pytorch_model.bin)")
    runs = list(chain.from_iterable(found.values()))
    if runs and args.mask:
        raise UserError(f"--mask is for Hugging Face folders; {runs[0]} is a run, and has its own masks")
    damaged = [run for run in runs if not verify(run)]
    unfit = [folder for folder in folders if not verify_weights(folder, args.mask)]
    for what, places in (("damaged", damaged), ("do not fit the mask", unfit)):
        if places:
            print(f"{what}: {', '.join(map(str, places))}", file=sys.stderr)
    if damaged or unfit:
        sys.exit(1)


def is_run(place: Path) -> bool:
    return (place / "run.json").is_file() or level_dir(place, 0).is_dir()


def find_runs(place: Path) -> list[Path]:
    """Return the place if it is a run directory (it has a run.json or a level), else all run directories in it."""
    return [place] if is_run(place) else sorted({path.parent for name in ("run.json", "level_00") for path in place.rglob(name)})


def verify(run: Path) -> bool:
    """Print the provenance of a run, its levels and its problems. Returns whether it has no problem."""
    print(run)
    found = problems(run)
    with contextlib.suppress(UserError, OSError):  # it is among the problems
        for line in chain(provenance(run), level_lines(run), hashes(run)):
            print(f"  {line}")
    for problem in found or ["all files are intact"]:
        print(f"  {problem}")
    return not found


def verify_weights(folder: Path, mask_file: Path | None) -> bool:
    """Print the sparsity of a Hugging Face folder's weights. Returns whether they fit the mask, or the folder's own if any."""
    from bert_tickets.export.sparsity import folder_zeros, misfits, sparsity_lines
    from bert_tickets.masking.mask import Mask

    own = folder / "mask.safetensors"
    path = mask_file or (own if own.is_file() else None)
    counts = folder_zeros(folder, None if path is None else Mask.load(path))
    print(folder, *sparsity_lines(counts), sep="\n  ")
    found = list(misfits(counts))
    fits = not any(bad for _, bad in found)
    if path is not None:
        lines = [line for line, _ in found] + [f"the weights fit {path}"] * fits
        print(*(f"  {line}" for line in lines), sep="\n")
    return fits


def provenance(run: Path) -> Iterator[str]:
    """Format the command, commit, versions and fingerprints of a run, from run.json and log.jsonl."""
    about = read_run(run)
    config, facts, here = about["config"], about["fingerprint"], about["environment"]
    git, log, differs = here["git"], list(events(run / "log.jsonl")), about["differs_from_preset"]
    began = next((f"{event['time']} on {event['host']}" for event in log if event.get("event") == "start"), "unknown")
    resumed = sum(event.get("event") == "resume" for event in log)
    lines = {
        "command": "python " + shlex.join(about["argv"]),
        "differs from the preset": ", ".join(f"{key} {value}" for key, value in differs.items()) or "nothing",
        "seed": config["seed"],
        "began": began + f", resumed {resumed} time(s)" * bool(resumed),
        "commit": "unknown" if git is None else git["sha"] + ", with changes" * git["dirty"],
        "versions": ", ".join(f"{name} {number}" for name, number in here["versions"].items()),
        "device": f"{here['gpu'] or facts['device']}, {facts['precision']}, {here['threads']} threads",
        "model": f"{config['model']}, sha256 {facts['model']}",
    }
    for name, data in {"training set": facts["train"], **facts["evaluation"]}.items():
        lines[name] = f"{data['examples']:,} examples, sha256 {data['sha256']}"
    if config.get("mask"):
        lines["given mask"] = f"{config['mask']}: {_origin(level_dir(run, 0) / 'mask.safetensors')}"
    if config["init"] != "pretrained":
        lines["initial weights"] = config["init"] + (f" {json.dumps(facts['init'])}" if facts["init"] else "")
    width = max(map(len, lines))
    return (f"{name:{width}}  {value}" for name, value in lines.items())


def _origin(path: Path) -> str:
    """Format the metadata of a mask file."""
    if not path.is_file():
        return "not trained yet"
    facts = sorted(read_facts(path).items())
    return ", ".join(f"{key} {value}" for key, value in facts if key not in ("format", "shapes", "order", "density"))


def hashes(run: Path) -> Iterator[str]:
    """Format the hashes of each level's mask and initial weights."""
    for line in results(run):
        yield f"level {line['level']}: mask sha256 {line['mask_sha256']}, initial weights sha256 {line['init_sha256']}"


if __name__ == "__main__":
    run_command(main, parse())
