"""What the training scripts print: the plan of a run before, its levels after."""

from __future__ import annotations

from bert_tickets.config import Config, differences
from bert_tickets.runs.directory import is_finished, level_dir, read_run, results, run_dir, seconds
from bert_tickets.runs.integrity import check_levels
from bert_tickets.runs.resume import needed


def table(header: list[str], rows: list[list[str]]) -> str:
    """A plain table, columns aligned to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows])


def print_plan(cfg: Config) -> None:
    """What `--dry-run` prints: the run's directory, what differs from the preset, the method's plan."""
    print(f"would run in {run_dir(cfg)}")
    differs = differences(cfg)
    print(f"the {cfg.protocol} protocol's settings" + "".join(f"\n  but {name} = {value}" for name, value in differs.items()))
    for line in cfg.settings.plan() if hasattr(cfg.settings, "plan") else []:
        print(f"  {line}")


def print_finished(cfg: Config) -> bool:
    """Print the levels if the run is finished, and return whether it is. Takes no lock: such a run is only read."""
    run = run_dir(cfg)
    if not run.is_dir():
        return False
    if (run / "run.json").exists():
        with needed(run):
            read_run(run)
            if not is_finished(cfg):
                return False
            check_levels(run)
        print_levels(cfg)
        return True
    return False


def print_levels(cfg: Config) -> None:
    """The closing table: level, sparsity, metrics, difference to the dense level, mask distance, seconds."""
    run = run_dir(cfg)
    lines, spent = results(run), seconds(run)
    metric, names = lines[0]["metric"], list(lines[0]["metrics"])
    dense = lines[0]["metrics"][metric] if lines[0]["sparsity"] == 0 else None
    rows = []
    for result in lines:
        value = result["metrics"][metric]
        star = "*" * bool(result["warnings"])
        rows.append(
            [
                str(result["level"]),
                f"{result['sparsity']:.1%}",
                *(_number(result["metrics"].get(name)) + star for name in names),
                f"{value - dense:+.4f}" if dense is not None and value is not None else "-",
                _number(result["mask_distance"]),
                f"{spent[result['level']]:.1f}" if result["level"] in spent else "-",
            ]
        )
    print(table(["level", "sparsity", *names, f"{metric} - dense", "mask distance", "seconds"], rows))
    for line in lines:
        for warning in line["warnings"]:
            print(f"* level {line['level']}: {warning}")
    print(f"in {run}")
    if cfg.keep_models and not all((level_dir(run, line["level"]) / "model").is_dir() for line in lines):
        print("the levels that were finished before --keep-models was given have no model folder")


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
