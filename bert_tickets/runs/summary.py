"""Print the plan of a run before it, and its levels after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_tickets.config import Config, flat
from bert_tickets.content import brief
from bert_tickets.runs.directory import failure, is_finished, level_dir, results, run_dir, seconds
from bert_tickets.runs.integrity import check_run
from bert_tickets.runs.naming import differences


def print_plan(cfg: Config) -> None:
    """Print the run's directory, its differences to the preset, and the method's plan, for `--dry-run`."""
    print(f"would run in {run_dir(cfg)}")
    differs, given = differences(cfg), flat(cfg)
    print(f"settings of --protocol {cfg.protocol}" + ", except:" * bool(differs))
    for name, value in differs.items():
        print(f"  {name} = {given[name]}" + f" ({brief(str(value))})" * (value != given[name]))
    for line in cfg.settings.plan():
        print(f"  {line}")


def print_finished(cfg: Config) -> bool:
    """Print the levels if the run is finished, and return whether it is. Takes no lock: such a run is only read."""
    run = run_dir(cfg)
    if not (run / "run.json").exists():
        return False
    check_run(run)
    if finished := is_finished(cfg):
        print_levels(run, cfg)
    return finished


def print_levels(run: Path, cfg: Config) -> None:
    """Print the closing table of a run."""
    for line in level_lines(run):
        print(line)
    print(f"results in {run}")
    if cfg.keep_models and not all((level_dir(run, level) / "model").is_dir() for level in range(len(results(run)))):
        print("the levels that were finished before --keep-models was given have no model folder")


def level_lines(run: Path) -> Iterator[str]:
    """Format a table of the finished levels, then their warnings, and the reason if the next level diverged."""
    lines, spent = results(run), seconds(run)
    if lines:
        metric, names = lines[0]["metric"], list(lines[0]["metrics"])
        is_dense = lines[0]["sparsity"] == 0 and "draw" not in lines[0]  # a search that draws all units has trained nothing
        dense = lines[0]["metrics"][metric] if is_dense else None
        best = [f"best {metric}"] if any("best" in line for line in lines) else []  # beside the last one, of --eval-steps
        rows = [["level", "sparsity", *names, *best, f"{metric} - dense", "mask distance", "seconds"]]
        for line in lines:
            level, value, star = line["level"], line["metrics"][metric], "*" * bool(line["warnings"])
            row = [str(level), f"{line['sparsity']:.1%}", *(_number(line["metrics"].get(name)) + star for name in names)]
            row += [_best(line, metric) for _ in best]
            row.append(f"{value - dense:+.4f}" if dense is not None and value is not None else "-")
            row += [_number(line.get("mask_distance")), f"{spent[level]:.1f}" if level in spent else "-"]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    if lines and (found := lines[-1].get("sizes")):  # earlier versions did not record them
        yield f"level {lines[-1]['level']} keeps {_sizes(found)}"
    if lines and "draw" in lines[0]:
        yield _drawn(lines)
    levels: dict[str, list[str]] = {}
    for line in lines:
        for warning in line["warnings"]:
            levels.setdefault(warning, []).append(str(line["level"]))
    for warning, found in levels.items():
        yield f"* level{'s' * (len(found) > 1)} {', '.join(found)}: {warning}"
    if failed := failure(run):
        yield f"level {failed['level']} diverged: {failed['ended']}"


def _sizes(found: Mapping[str, float]) -> str:
    """Format what a ticket keeps under all denominators; the last is Prasanna et al.'s, of all without the embeddings."""
    parts = [f"{found[f'{kind}_kept']} of {found[kind]} {kind}" for kind in ("heads", "mlps", "neurons") if kind in found]
    for name, words in (("covered", "covered weights"), ("encoder_layers", "parameters of the layers"), ("all", "parameters")):
        parts.append(f"{found[f'{name}_kept'] / found[name]:.1%} of {found[name]:,} {words}")
    return ", ".join(parts) + f" ({found['bertplays_percent']:.1f} % as Prasanna et al. count)"


def _drawn(lines: Sequence[Mapping[str, Any]]) -> str:
    """Say of EarlyBERT's levels when the ticket was drawn, what level 0's metrics are of, and the arithmetic of all of them."""
    draw, steps, spent = lines[0]["draw"], lines[0]["steps"], sum(line["flops"] for line in lines)
    if not steps:
        return f"level 0 trained nothing, and has the metrics of the network before training; {spent:.3g} FLOPs in all"
    stable = f"were first stable at step {draw['fired']}" if draw["fired"] else "were never stable"
    found = f"the ticket was drawn after step {draw['step']} of {steps}, and the masks {stable}"
    share = f"{spent:.3g} FLOPs in all, {lines[0]['flops'] / spent:.0%} of them of the search"
    return f"level 0 is the search, and has the metrics of its full network: {found}; {share}"


def _best(line: Mapping[str, Any], metric: str) -> str:
    value = _number(line["best"]["metrics"][metric])
    return f"{value} (step {line['best']['step']}, of {len(line['evaluations'])} evaluations)"


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"
