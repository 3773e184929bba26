"""What a run says of itself on the terminal: its plan before, its levels after."""

from __future__ import annotations

from bert_tickets.command import is_launched
from bert_tickets.config import Config, identity
from bert_tickets.history import check_format, is_finished, level_dir, needed, results, run_dir, seconds
from bert_tickets.soundness import check_finished, missing


def table(header: list[str], rows: list[list[str]]) -> str:
    """A plain table, columns aligned to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows])


def print_finished(cfg: Config, preset: str) -> bool:
    """Print the closing table if the run is finished, and say whether it is. Takes no lock: such a run is only read.

    Under torchrun it says no: processes that look at different file systems must not come to different answers.
    """
    if is_launched():
        return False
    run = run_dir(cfg, preset)
    check_format(run)
    with needed(run):
        if not is_finished(cfg, preset):
            return False
        check_finished(run)
    print_levels(cfg, preset)
    for path, what in missing(run):  # the levels were told from their metrics.json alone
        print(f"{path} is missing: {what}")
    return True


def print_levels(cfg: Config, preset: str) -> None:
    """The closing table: level, sparsity, metrics, difference to the dense level, mask distance, seconds."""
    run = run_dir(cfg, preset)
    lines, spent = results(run), seconds(run)
    metric = lines[0]["metric"]
    names = list(lines[0]["metrics"])
    dense = lines[0]["metrics"][metric] if lines[0]["sparsity"] == 0 else None
    rows = []
    for result in lines:
        value = result["metrics"][metric]
        difference = f"{value - dense:+.4f}" if dense is not None and value is not None else "-"
        rows.append(
            [
                str(result["level"]),
                f"{result['sparsity']:.1%}",
                *(_number(result["metrics"].get(name)) + "*" * bool(result.get("doubts")) for name in names),
                difference,
                _number(result.get("mask_distance")),
                f"{spent[result['level']]:.1f}" if result["level"] in spent else "-",
            ]
        )
    print(table(["level", "sparsity", *names, f"{metric} - dense", "mask distance", "seconds"], rows))
    for line in lines:
        for doubt in line.get("doubts", []):
            print(f"* level {line['level']}: {doubt}")
    print(f"in {run}")
    if cfg.keep_models and not all((level_dir(run, line["level"]) / "model").is_dir() for line in lines):
        print("the levels that were finished before --keep-models was given have no model folder")


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


def print_plan(cfg: Config, preset: str) -> None:
    """What `--dry-run` prints: the run's directory, what differs from the preset, the levels."""
    print(f"would run in {run_dir(cfg, preset)}")
    differs = identity(cfg, preset)
    print(f"the {cfg.protocol} protocol's settings" + "".join(f"\n  but {name} = {value}" for name, value in differs.items()))
    if cfg.mask:
        print(f"train the ticket {cfg.mask} once")
        return
    left = 1.0
    for level, fraction in enumerate(cfg.fractions):
        left *= 1 - fraction
        print(f"  level {level}: remove {fraction:.4f} of what is left: {1 - left:.1%} pruned; then train")
