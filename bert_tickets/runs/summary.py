"""Print the plan of a run before it, and its levels after it."""

from __future__ import annotations

from bert_tickets.config import Config, differences
from bert_tickets.runs.directory import is_finished, is_number, level_dir, read_run, results, run_dir, seconds
from bert_tickets.runs.integrity import check_levels
from bert_tickets.runs.resume import advice_to_restore


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a plain table, columns aligned to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *rows])


def print_plan(cfg: Config) -> None:
    """Print the run's directory, its differences to the preset, and the method's plan, for `--dry-run`."""
    print(f"would run in {run_dir(cfg)}")
    differs = differences(cfg)
    print(f"settings of --protocol {cfg.protocol}" + ", except:" * bool(differs))
    for name, value in differs.items():
        print(f"  {name} = {value}")
    for line in cfg.settings.plan() if hasattr(cfg.settings, "plan") else []:
        print(f"  {line}")


def print_finished(cfg: Config) -> bool:
    """Print the levels if the run is finished, and return whether it is. Takes no lock: such a run is only read."""
    run = run_dir(cfg)
    if not (run / "run.json").exists():
        return False
    with advice_to_restore(run):
        read_run(run)
        if not is_finished(cfg):
            return False
        check_levels(run)
    print_levels(cfg)
    return True


def print_levels(cfg: Config) -> None:
    """Print the closing table: level, sparsity, metrics, difference to the dense level, mask distance, seconds."""
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
                _number(result.get("mask_distance")),
                f"{spent[result['level']]:.1f}" if result["level"] in spent else "-",
            ]
        )
    print(table(["level", "sparsity", *names, f"{metric} - dense", "mask distance", "seconds"], rows))
    levels: dict[str, list[str]] = {}
    for line in lines:
        for warning in line["warnings"]:
            levels.setdefault(warning, []).append(str(line["level"]))
    for warning, found in levels.items():
        print(f"* level{'s' * (len(found) > 1)} {', '.join(found)}: {warning}")
    print(f"results in {run}")
    if cfg.keep_models and not all((level_dir(run, line["level"]) / "model").is_dir() for line in lines):
        print("the levels that were finished before --keep-models was given have no model folder")


def _number(value: object) -> str:
    return f"{value:.4f}" if is_number(value) else "nan"
