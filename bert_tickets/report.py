"""What a run says of itself on the terminal: its plan before, its levels after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bert_tickets.config import Config, identity, run_name

if TYPE_CHECKING:
    from bert_tickets.runs import Run


def table(header: list[str], rows: list[list[str]]) -> str:
    """A plain table, columns aligned to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows])


def print_levels(run: Run) -> None:
    """The closing table: level, sparsity, metrics, difference to the dense level, mask distance, seconds."""
    results, seconds = run.results(), run.seconds()
    metric = results[0]["metric"]
    names = list(results[0]["metrics"])
    dense = results[0]["metrics"][metric] if results[0]["sparsity"] == 0 else None
    rows = []
    for result in results:
        value = result["metrics"][metric]
        difference = f"{value - dense:+.4f}" if dense is not None and value is not None else "-"
        rows.append(
            [
                str(result["level"]),
                f"{result['sparsity']:.1%}",
                *(_number(result["metrics"][name]) for name in names),
                difference,
                f"{result['mask_distance']:.4f}",
                f"{seconds[result['level']]:.1f}" if result["level"] in seconds else "-",
            ]
        )
    print(table(["level", "sparsity", *names, f"{metric} - dense", "mask distance", "seconds"], rows))
    print(f"in {run.dir}")
    if run.cfg.keep_models and not all((run.level_dir(level) / "model").is_dir() for level in range(run.done)):
        print("the levels that were finished before --keep-models was given have no model folder")


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


def print_plan(cfg: Config, preset: str) -> None:
    """What `--dry-run` prints: the run's directory, what differs from the preset, the levels."""
    print(f"would run in {cfg.output_dir}/{run_name(cfg, preset)}")
    differs = identity(cfg, preset)
    print(f"the {cfg.protocol} protocol's settings" + "".join(f"\n  but {name} = {value}" for name, value in differs.items()))
    if cfg.mask:
        print(f"train the ticket {cfg.mask} once")
        return
    left = 1.0
    for level, fraction in enumerate(cfg.fractions):
        left *= 1 - fraction
        print(f"  level {level}: remove {fraction:.4f} of what is left: {1 - left:.1%} pruned; then train")
