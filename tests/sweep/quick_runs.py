"""Runs without training, for what a sweep looks at. A copy named lt_glue.py makes them as the script does."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from bert_tickets.cli import parse
from bert_tickets.files import write_checksummed
from bert_tickets.runs.directory import levels_done, results_lines, run_dir


def make_levels(run: Path, count: int) -> None:
    """Make the first `count` levels of a run."""
    run.mkdir(parents=True, exist_ok=True)
    for level in range(levels_done(run), count):
        facts = {"level": level, "task": "mnli", "method": "imp", "metric": "a", "metrics": {"a": 0.5}, "sparsity": 0.0}
        write_checksummed(run / f"level_{level:02d}" / "metrics.json", facts | {"mask_sha256": "", "warnings": []})
        (run / f"level_{level:02d}" / "mask.safetensors").write_text(f"{run.name} {level}")
    (run / "results.jsonl").write_bytes(results_lines(run))


def save(number: int, frame: FrameType | None) -> None:
    time.sleep(0.5)
    Path("saved").touch()
    sys.exit(143)


def main() -> None:
    """Make a run, with level 0 only while there is a file `slow`. Fails for seed 2."""
    signal.signal(signal.SIGTERM, save)
    cfg = parse("glue", None)
    if cfg.train.seed == 2:
        print("error: an unlucky number")
        sys.exit(2)
    make_levels(run_dir(cfg), 1)
    while Path("slow").exists():
        time.sleep(0.05)
    make_levels(run_dir(cfg), cfg.settings.levels)


if __name__ == "__main__":
    main()
