"""A run without training, for what a sweep looks at. A copy named lt_glue.py makes it as the script does; it fails for seed 2."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

from bert_tickets.cli import parse
from bert_tickets.files import write_checksummed
from bert_tickets.runs.directory import results_lines, run_dir


def save(number: int, frame: FrameType | None) -> None:
    time.sleep(0.5)
    Path("saved").touch()
    sys.exit(143)


def main() -> None:
    signal.signal(signal.SIGTERM, save)
    cfg = parse("glue", None)
    if cfg.train.seed == 2:
        print("error: an unlucky number")
        sys.exit(2)
    run = run_dir(cfg)
    for level in range(cfg.settings.levels):
        write_checksummed(run / f"level_{level:02d}" / "metrics.json", {"level": level})
        (run / f"level_{level:02d}" / "mask.safetensors").write_text(f"{run.name} {level}")
        while Path("slow").exists():
            time.sleep(0.05)
    (run / "results.jsonl").write_bytes(results_lines(run))


if __name__ == "__main__":
    main()
