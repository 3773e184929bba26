"""The tickets of EarlyBERT (Chen et al. 2021) as a table: scores, time and arithmetic saved, the trade-off, ablations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.report import published
from bert_tickets.report.cells import NO_RUN, fill_over_sparsities
from bert_tickets.report.costs import MEANS, cost_line, costs, over_tasks, warnings
from bert_tickets.report.formats import Table, frame, listing
from bert_tickets.report.pretraining import SLIM_NOTE, fine_tuned, heads_of, pretraining, published_grid
from bert_tickets.report.recipes import RECIPE
from bert_tickets.report.rows import EARLY_BIRD, FULL, is_early_bird, plainness, row_name
from bert_tickets.runs.directory import read_run, results

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = {"early-bird": "EarlyBERT", "random": "random", "full": "full BERT at the ticket's budget"}  # by --ticket
LONGER = ("whole search", "record epochs")  # settings of a search that may go on after the draw
ABLATED = {"heads", "neurons", "neuron scope", "lambda heads", "lambda neurons", *RECIPE}
NOTES = (
    "Differences are to the full BERT. EarlyBERT is searched and trained in one run; `random` draws as many units, without a "
    "search; the full BERT at the ticket's budget has no search and no ticket, and as many steps as cost the FLOPs of its search "
    "(to --draw-at, or whole) and of slim training.",
    "Time saved: of the seconds of the full BERT's run of the same task and seed, with the search counted. Seconds are those of "
    "training, without the evaluation after it. They can be compared only on the same machine, with nothing beside the runs.",
    "The search counts whole, also the steps after the draw of --whole-search.",
    "FLOPs saved: of the forward and backward passes over real tokens, with the search counted.",
    "The rule that fires is that of --draw-when stable, for heads and neurons both; --draw-when fixed does not depend on it.",
)


def earlybert(levels: DataFrame, _: float | None) -> Table | None:
    """EarlyBERT's tickets, random ones and the full BERT, by task, with their costs; the trade-off, ablations, pre-training."""
    import pandas as pd

    own, tuned = tickets(levels), fine_tuned(levels)
    if own.empty and tuned.empty:
        return None
    grids, notes, parts = {}, [*NOTES], []
    if len(own):
        found = costs(own, levels[levels["row"] == FULL])
        cells = cells_of(levels, own, found)
        main = cells[cells["is_main"]]
        if len(main[main["row"] != FULL]):
            grids = {"Scores": _scores(main, found)} | dict(_published(main))
        grids["Cost by task, search included"] = _costs(cells, found)
        grids["Scores by task, and differences"] = listing(cells)
        grids |= dict(_tradeoff(cells)) | dict(_ablations(cells))
        parts.append(cells)
        notes += [*_recipes(levels, own), *warnings(found)]
    if len(tuned):
        more, cells, said = pretraining(levels, tuned)
        grids, notes = grids | more, [*notes, SLIM_NOTE, *said]
        parts.append(cells)
    notes = [published.explain("earlybert"), *notes]
    title, sweep = "EarlyBERT: tickets drawn early in fine-tuning (Chen et al. 2021)", "" if len(own) else "earlybert_pretrain"
    return Table(title, grids, pd.concat(parts), notes, sweep=sweep)


# ---- rows ----


def tickets(levels: DataFrame) -> DataFrame:
    """The levels that train what a run of EarlyBERT drew, on tasks other than MLM, with `kind`, `changed` and `recipe_of_run`.

    A search that went on for its record alone is left out beside a shorter one that drew the same ticket.
    """
    own = levels[levels["method"].map(is_early_bird).astype(bool) & ~levels["given"] & (levels["task"] != "mlm")]
    words = [changed(method, row) for method, row in zip(own["method"], own["row"], strict=True)]
    own = own.assign(kind=[found.pop("ticket", "early-bird") for found in words], changed=words)
    own = own.assign(recipe_of_run=own["run"].map(recipe_of))
    ticket = [str(sorted((name, value) for name, value in found.items() if name not in LONGER)) for found in words]
    searched = [results(Path(run))[0].get("steps", 0) for run in own["run"]]
    sorted_by_search = own.assign(ticket=ticket, searched=searched).sort_values("searched", kind="stable")
    shortest = sorted_by_search.drop_duplicates(["task", "seed", "kind", "ticket", "mask_sha256"])
    return own.loc[own.index.isin(shortest.index)]


def changed(method: str, row: str) -> dict[str, float | str]:
    """What a row changes of the preset, by name: `early_bird (heads 1/2) ticket, lr 2e-05` has heads 0.5 and lr 2e-05."""
    own = method.partition(" (")[2].removesuffix(")").split(", ")
    own += [word for word in row.partition(" ticket")[2].split(", ") if word.rsplit(" ", 1)[0] in RECIPE]
    return {name: number(value) for name, _, value in (word.rpartition(" ") for word in own if word)}


def recipe_of(run: str) -> dict[str, float | str]:
    """The length and the learning rate with which a run trains its ticket."""
    config = read_run(Path(run))["config"]
    length = "max_steps" if config.get("max_steps") else "epochs"
    return {"lr": number(config.get("lr", 0)), length.replace("_", " "): number(config.get(length, 0))}


def number(value: Any) -> float | str:
    """A number, also one such as 5/12, to four digits; other text as it is."""
    try:
        return float(f"{float(Fraction(str(value))):.4g}")
    except ValueError:
        return str(value)


def part_of(change: Mapping[str, float | str], heads: int) -> str:
    """The part of published.toml that has the numbers of a change of the preset; "" if none has."""
    if not change:
        return "large" if heads == 16 else "base"
    only = change.get("neurons") == 0 and change.keys() <= {"neurons", "lambda neurons"}
    return "heads-only" if only and heads != 16 else ""  # of base alone


# ---- cells ----


def cells_of(levels: DataFrame, own: DataFrame, found: DataFrame) -> DataFrame:
    """The cells of the table with their costs. They pool over sparsities, which may differ by seed in the last digit."""
    import pandas as pd

    shown = pd.concat([levels[(levels["row"] == FULL) & levels["task"].isin(own["task"])], own])
    wanted = [cell for task in published.in_order(own["task"]) for cell in _wanted(task, own[own["task"] == task])]
    cells = fill_over_sparsities(shown, wanted)
    return cells.merge(found.groupby(["task", "row"], as_index=False)[MEANS].mean(), how="left", on=["task", "row"])


def _wanted(task: str, own: DataFrame) -> Iterator[dict[str, Any]]:
    """The cells of a task: the full BERT, the kinds of each change of the preset that is no ablation, then the ablations."""
    heads = heads_of(own.iloc[0])
    beside = published.earlybert(part_of({}, heads), FULL, task)
    beside = beside or published.earlybert(part_of({"neurons": 0.0}, heads), FULL, task)
    base = {"task": task, "changed": {}, "kind": "", "is_main": True, "heads_of_layer": heads}
    base |= {"recipe_of_run": {}}
    yield base | {"row": FULL, "sweep": "earlybert", "published": beside}
    order = sorted(own.drop_duplicates("row").itertuples(), key=lambda line: plainness(line.row))
    for line in sorted(order, key=lambda line: _is_ablation(line.kind, line.changed)):
        part, cell = part_of(line.changed, heads), base | {"reference": FULL, "changed": line.changed}
        cell |= {"recipe_of_run": line.recipe_of_run}
        is_ablation = _is_ablation(line.kind, line.changed)
        cell |= {"is_main": not is_ablation, "sweep": "earlybert" if not line.changed else "earlybert_ablations" * is_ablation}
        for kind in (line.kind,) if line.changed else KINDS:
            row = line.row if kind == line.kind else row_name(EARLY_BIRD + f" (ticket {kind})" * (kind != "early-bird"))
            yield cell | {"row": row, "kind": kind, "published": published.earlybert(part, KINDS[kind], task)}


def _is_ablation(kind: str, change: Mapping[str, Any]) -> bool:
    """Whether a row varies nothing but what the paper's ablations do. Heads only is a table of its own."""
    return kind == "early-bird" and bool(change) and change.keys() <= ABLATED and part_of(change, 0) != "heads-only"


# ---- grids ----


def _scores(cells: DataFrame, found: DataFrame) -> DataFrame:
    """A line per row: the score on each task, and the ranges over tasks of what is saved."""
    tasks, lines = published.in_order(cells["task"]), []
    for row, of_row in cells.groupby("row", sort=False):
        texts = dict(zip(of_row["task"], of_row["text"], strict=True))
        first = of_row.iloc[0]
        only = ", heads only" * (part_of(first["changed"], first["heads_of_layer"]) == "heads-only")
        line = {"row": row, "kind": row if row == FULL else KINDS[first["kind"]] + only}
        line |= {published.name(task): texts.get(task, NO_RUN) for task in tasks}
        own = found[found["row"] == row]
        lines.append(line | {"time saved": over_tasks(own, "time_saved"), "FLOPs saved": over_tasks(own, "flops_saved")})
    return frame(lines)


def _published(cells: DataFrame) -> Iterator[tuple[str, DataFrame]]:
    """The published tables of the rows that are there."""
    tickets = cells[cells["row"] != FULL]
    for part in dict.fromkeys(map(part_of, tickets["changed"], tickets["heads_of_layer"])):
        if part:
            yield f"Published, {part.replace('-', ' ')} {published.source('earlybert')}", published_grid(part)


def _costs(cells: DataFrame, found: DataFrame) -> DataFrame:
    lines = []
    for cell in cells[(cells["row"] != FULL) & (cells["text"] != NO_RUN)].itertuples():
        of_row = found[(found["task"] == cell.task) & (found["row"] == cell.row)]
        lines.append({"task": published.name(cell.task), "row": cell.row, "runs": str(len(of_row))} | cost_line(of_row))
    wide = frame(lines)
    return wide.loc[:, (wide != "").any()]


def gone(cell: Any) -> tuple[int, int]:
    """The percent of all neurons, and the heads of a layer, that are gone; -1 for unknown."""
    if not (cell.heads > 0 and cell.neurons > 0):
        return -1, -1
    neurons = round(100 * (1 - cell.neurons_kept / cell.neurons))
    return neurons, round(cell.heads_of_layer * (1 - cell.heads_kept / cell.heads))


def is_tradeoff(cell: Any) -> bool:
    """Whether a cell of EarlyBERT varies nothing but how many heads and neurons go."""
    return cell.kind == "early-bird" and cell.changed.keys() <= {"heads", "neurons"} and cell.changed.get("neurons") != 0


def _tradeoff(cells: DataFrame) -> Iterator[tuple[str, DataFrame]]:
    """Time saved and score by what is gone, of each task with several sizes, and the published grid."""
    shown = [cell for cell in cells[cells["text"] != NO_RUN].itertuples() if is_tradeoff(cell)]
    for task in dict.fromkeys(cell.task for cell in shown):
        of_task = [cell for cell in shown if cell.task == task]
        texts = {gone(cell): f"{_percent(cell.time_saved)} / {cell.text}" for cell in reversed(of_task)}  # the plainest is first
        if len(texts) > 1:
            heads = shown[0].heads_of_layer
            yield f"Time saved / score on {published.name(task)}, by what is gone", _grid(texts, heads)
            texts = {place: f"{time:g} / {score:g}" for place, (time, score) in published.earlybert_tradeoff().items()}
            yield f"Published time saved / score, task not named {published.source('earlybert')}", _grid(texts, 12)


def _percent(value: float) -> str:
    return f"{value:.1f}" if value == value else "unknown"


def _grid(texts: Mapping[tuple[int, int], str], of: int) -> DataFrame:
    """Lines by neurons, columns by heads."""
    columns = sorted({heads for _, heads in texts})
    return frame(
        [
            {"neurons gone": f"{neurons} %"} | {f"{heads} of {of} heads": texts.get((neurons, heads), "") for heads in columns}
            for neurons in sorted({neurons for neurons, _ in texts})
        ]
    )


def _ablations(cells: DataFrame) -> Iterator[tuple[str, DataFrame]]:
    """The scores of each of the paper's ablations of which more than the preset was run."""
    shown = [cell for cell in cells[cells["text"] != NO_RUN].itertuples() if cell.kind == "early-bird"]
    tasks, lines, varied = published.in_order(cell.task for cell in shown), [], set()
    for ablation in published.EARLYBERT["ablations"]:
        mark = published.source("earlybert")[:-1] + (", digitised]" if "digitised" in ablation else "]")
        for value, score, flags in ablation["rows"]:
            wanted = {name.replace("_", " "): number(flag) for name, flag in flags.items()}
            found = [cell for cell in shown if _is_of(cell, wanted)]
            texts = {published.name(cell.task): cell.text for cell in found}
            line = {"varied": ablation["name"], "value": value}
            line |= {name: texts.get(name, NO_RUN) for name in map(published.name, tasks)}
            lines.append(line | {"published, task not named": f"{score:g} {mark}"})
            varied |= {ablation["name"]} if any(cell.changed for cell in found) else set()
    if varied:
        yield "Ablations", frame([line for line in lines if line["varied"] in varied])


def _is_of(cell: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a cell is that of an ablation: it changes these settings, or is trained for so long at this learning rate."""
    if wanted.keys() & {*RECIPE}:
        return cell.changed.keys() <= {*RECIPE} and cell.recipe_of_run == wanted
    return cell.changed == wanted


# ---- notes ----


def _recipes(levels: DataFrame, own: DataFrame) -> Iterator[str]:
    """How long the full BERT and EarlyBERT's plainest tickets train, a note for all tasks that share it."""
    names: dict[str, list[str]] = {}
    for task in published.in_order(own["task"]):
        early = own[(own["task"] == task) & (own["kind"] == "early-bird")].sort_values(
            "row", key=lambda rows: rows.map(plainness)
        )
        runs = {"the full BERT": levels.loc[(levels["task"] == task) & (levels["row"] == FULL), "run"], "EarlyBERT": early["run"]}
        words = [f"{name} {_length(of_row.iloc[0])}" for name, of_row in runs.items() if len(of_row)]
        names.setdefault(", ".join(words), []).append(published.name(task))
    for trainings, tasks in names.items():
        yield f"{', '.join(tasks)}: trained are {trainings}."


def _length(run: str) -> str:
    config = read_run(Path(run))["config"]
    length = f"{config['max_steps']} steps" if config.get("max_steps") else f"{config.get('epochs', 0):g} epochs"
    searched = f" after a search at {config['search_lr']:g}" if "search_lr" in config else ""
    return f"for {length} at {config.get('lr', 0):g}{searched}"
