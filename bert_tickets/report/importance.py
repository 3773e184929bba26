"""The tickets of guarded searches (Prasanna et al. 2020) as a table: good, random, bad and super ones, pruned and retrained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bert_tickets.files import read_facts
from bert_tickets.report import published
from bert_tickets.report.cells import NO_RUN, fill_over_sparsities
from bert_tickets.report.formats import Table, frame, listing
from bert_tickets.report.rows import FULL, PRUNED, is_guarded, plainness, row_name
from bert_tickets.report.significance import holm, verdict
from bert_tickets.report.tamt import mean_over_tasks
from bert_tickets.runs.directory import level_dir, result
from bert_tickets.runs.integrity import read_mask

if TYPE_CHECKING:
    from pandas import DataFrame

GOOD = "good"
SEARCHES = {  # a search -> its name in published.toml, in the order of the table
    "importance": "s",
    "importance (units heads)": "heads only",
    "importance (units mlps)": "MLPs only",
    "guarded_magnitude": "m",
}
KINDS = (GOOD, "random", "bad", "super", "super-random", "super-bad")
REFERENCES = {GOOD: "random", "bad": GOOD, "super": "super-random", "super-bad": "super"}  # a kind -> what it is compared with
MADE = {"importance": KINDS, "guarded_magnitude": KINDS[:3]}  # a search -> the kinds that the sweep makes, if not only good ones
APART = "wnli"  # all of it may be pruned: the full model is below the majority class
UNIT_NAMES = {"heads": "heads", "mlps": "MLPs", "neurons": "neurons", "weights": "weights"}
NOTES = (
    "Scores are on the dev set, where the searches chose the tickets too: of the fine-tuned network without what is pruned "
    "(`pruned`), or of the last evaluation of a training of the ticket from the pre-trained weights.",
    "Good tickets have the search's name. Random: as many units, drawn. Bad: as many, pruned ones first; with more than half "
    "kept it must contain good ones: the overlap. Super: good in all seeds; super-bad and super-random have its size. "
    "Sparsities differ by seed, and are pooled.",
    "Differences: good to random, bad to good, super to super-random, super-bad to super. Their verdicts are corrected over all "
    "comparisons of this table on a task.",
    "Percent of all - 21: parameters kept of all, minus 21 % for the embeddings, as in the paper: the full BERT has 79.",
    "WNLI stands apart and is in no mean: the published full BERT is below the majority class there, and all may be pruned.",
)


def importance(levels: DataFrame, _: float | None) -> Table | None:
    """Good, random, bad and super tickets of guarded searches, by task and over tasks, and the sizes of good and super ones."""
    own = tickets(levels)
    if own.empty:
        return None
    cells = _cells(levels, own)
    main, apart = cells[cells["task"] != APART], cells[cells["task"] == APART]
    of_sizes = sizes(own)
    grids = {"Sizes": of_sizes} if len(of_sizes) else {}
    if len(main):
        grids |= {"Scores": _scores(main), "Scores by task, and differences": listing(main)}
    if len(apart):
        grids["WNLI, apart"] = listing(apart)
    page = published.DATA["bertplays"]["table2"]
    means = ", ".join(f"{row} {value}" for row, value in page["rows"].items())
    marks = ("json", "pdf", "masks", "nb", "page")
    notes = [published.explain_marks(*marks), *NOTES, f"Published means of nine tasks [{page['source']}]: {means}."]
    majority = {published.name(task): published.bertplays("majority class", task) for task in tasks_of(cells)}
    notes.append("Published majority class: " + ", ".join(f"{task} {value}" for task, value in majority.items() if value) + ".")
    return Table("Heads and MLPs: good, random, bad and super tickets (Prasanna et al. 2020)", grids, cells, notes)


# ---- the levels ----


def tickets(levels: DataFrame) -> DataFrame:
    """The levels of guarded searches' tickets on their own task, and of those derived from them, with `search` and `kind`."""
    own = levels[levels["method"].map(is_guarded) & (levels["source"] == levels["task"]) & (levels["row"] != FULL)]
    parts = [search_and_kind(method) for method in own["method"]]
    return own.assign(search=[search for search, _ in parts], kind=[kind for _, kind in parts])


def search_and_kind(method: str) -> tuple[str, str]:
    """Divide a method: `importance bad (units heads)` is the kind `bad` of the search `importance (units heads)`.

    The file of a derived mask does not have the search's other settings.
    """
    name, _, own = method.partition(" (")
    search, _, kind = name.partition(" ")
    if not kind:
        return method, GOOD
    units = [words for words in own.removesuffix(")").split(", ") if words.startswith("units ")]
    return search + "".join(f" ({words})" for words in units), kind


def method_of(search: str, kind: str) -> str:
    """Invert `search_and_kind`."""
    name, bracket, own = search.partition(" (")
    return (name if kind == GOOD else f"{name} {kind}") + bracket + own


def tasks_of(levels: DataFrame) -> list[str]:
    """The tasks of levels, WNLI last."""
    return sorted(published.in_order(levels["task"]), key=APART.__eq__)


def in_order(found: Iterable[str], order: Sequence[str]) -> list[str]:
    """Each once, in an order; others last, by name."""
    return sorted(set(found), key=lambda name: (order.index(name) if name in order else len(order), name))


def good_sizes(own: DataFrame) -> dict[tuple[str, str, int], dict[str, float]]:
    """The sizes of the good tickets by task, search and seed, as their searches recorded them."""
    found = own[~own["given"] & own["pruned"]]
    results = {(line.task, line.search, line.seed): result(Path(line.run), line.level) for line in found.itertuples()}
    return {place: line["sizes"] for place, line in results.items() if "sizes" in line}


# ---- the cells ----


def _cells(levels: DataFrame, own: DataFrame) -> DataFrame:
    """The cells of the table, which pool over sparsities: by seed, tickets differ in size."""
    import pandas as pd

    dense = levels[levels["row"] == FULL].merge(own[["task", "seed"]].drop_duplicates())
    shown = pd.concat([dense, own])
    wanted: list[dict[str, Any]] = []
    for task in tasks_of(own):
        beside = published.bertplays(FULL, task)
        wanted.append({"task": task, "row": FULL, "sweep": "importance", "published": beside})
        wanted += _wanted(task, own[own["task"] == task])
    cells = fill_over_sparsities(shown, wanted)
    cells["p_holm"] = cells.groupby("task")["p"].transform(holm)
    cells["verdict"] = [verdict(cell) if cell["run"] else NO_RUN for cell in cells.to_dict("records")]
    overlaps = dict(_overlaps(own))
    return cells.assign(overlap=[overlaps.get(place, "") for place in zip(cells["task"], cells["row"], strict=True)])


def _wanted(task: str, own: DataFrame) -> Iterator[dict[str, Any]]:
    """The cells of a task: the rows that are there, and those that the sweep makes for the searches that are there."""
    rows: dict[tuple[str, str, bool], list[str]] = {}
    for search in in_order(own["search"], list(SEARCHES)):
        made = MADE.get(search, (GOOD,))
        rows |= {(search, kind, pruned): [] for kind in made for pruned in (True, False)}
    for found in own[["search", "kind", "pruned", "row"]].drop_duplicates().itertuples(index=False):
        rows.setdefault((found.search, found.kind, found.pruned), []).append(found.row)
    for (search, kind, pruned), there in rows.items():
        rows[search, kind, pruned] = sorted(there, key=plainness) or [row_name(method_of(search, kind)) + f", {PRUNED}" * pruned]
    searches, kinds = in_order((key[0] for key in rows), list(SEARCHES)), in_order((key[1] for key in rows), KINDS)
    for search, kind, pruned in sorted(rows, key=lambda key: (searches.index(key[0]), kinds.index(key[1]), not key[2])):
        references = rows.get((search, REFERENCES.get(kind, ""), pruned), [""])
        for row in rows[search, kind, pruned]:
            cell = {"task": task, "row": row, "sweep": "importance", "reference": references[0]}
            beside = published.bertplays(published_row(search, kind, row), task)
            yield cell | {"search": search, "kind": kind, "published": beside}


def published_row(search: str, kind: str, row: str) -> str:
    """The name of a row in published.toml, where it may have none; "" if its tickets were found or trained in another way."""
    name, plain = SEARCHES.get(search, ""), row_name(method_of(search, kind))
    released = {row_name(f"{method_of(search, kind)} (random size binomial)"), f"{plain}, batch size 16, epochs 2.0"}
    if row.removesuffix(f", {PRUNED}") not in ({plain, *released} if kind == "random" else {plain}):
        return ""
    if kind.startswith("super") and name == "s":
        name = "super good" if kind == "super" else kind.replace("-", " ")
    elif name in ("s", "m") or kind != GOOD:
        name = f"{name} {kind}"
    return f"{name}, {PRUNED if row.endswith(PRUNED) else 'retrained'}"


def _overlaps(own: DataFrame) -> Iterator[tuple[tuple[str, str], str]]:
    """Of each row of bad tickets, how many kept units are good ones: means over seeds, beside the size of the good tickets."""
    sizes_of = good_sizes(own)
    for (task, row), runs in own[own["kind"] == "bad"].groupby(["task", "row"]):
        shared: dict[str, list[float]] = {}
        kept: dict[str, list[float]] = {}
        for run in runs.itertuples():
            good = sizes_of.get((task, run.search, run.seed), {})
            info = read_facts(level_dir(Path(run.run), run.level) / "mask.safetensors")
            for name, number in info.get("overlap", {}).items():
                shared.setdefault(name, []).append(number)
                key = "covered_kept" if name == "weights" else f"{name}_kept"
                kept.setdefault(name, []).extend([good[key]] if key in good else [])
        parts = []
        for name, numbers in shared.items():
            of = f" of {mean(kept[name]):,.1f}" if kept[name] else ""
            parts.append(f"{mean(numbers):,.1f}{of} {UNIT_NAMES.get(name, name)}".replace(".0 ", " "))
        yield (task, row), ", ".join(parts)


# ---- grids ----


def _scores(cells: DataFrame) -> DataFrame:
    """A line per row: the mean over the tasks, beside the published one, and each task's score."""
    tasks = published.in_order(cells["task"])
    lines = []
    for row, found in cells.groupby("row", sort=False):
        texts = dict(zip(found["task"], found["text"], strict=True))
        line = {"row": row}
        if len(tasks) > 1:
            first = found.iloc[0]
            name = FULL if row == FULL else published_row(first["search"], first["kind"], row)
            beside = published.bertplays_mean(name, tasks)
            line[f"mean of {len(tasks)} tasks"] = mean_over_tasks(found, tasks)
            line["published mean"] = "" if beside is None else f"{beside:.1f} {published.source('bertplays')}"
        lines.append(line | {published.name(task): texts.get(task, NO_RUN) for task in tasks})
    return frame(lines)


def sizes(own: DataFrame) -> DataFrame:
    """The sizes of good and super tickets under all denominators, means over seeds, beside the published ones."""
    of_good = good_sizes(own)
    lines = []
    of_kinds = own[own["kind"].isin((GOOD, "super"))]
    for task in tasks_of(of_kinds):
        of_task = of_kinds[of_kinds["task"] == task]
        for search in in_order(of_task["search"], list(SEARCHES)):
            for kind in (GOOD, "super"):
                runs = of_task[(of_task["search"] == search) & (of_task["kind"] == kind)]
                found = [size for (*place, _), size in of_good.items() if place == [task, search]]
                if kind == "super" and found:
                    found = [_size(run, found[0]) for run in runs.drop_duplicates("mask_sha256").itertuples()]
                if len(runs) and found:
                    line = {"task": published.name(task), "ticket": row_name(method_of(search, kind))}
                    lines.append(line | _size_line(found) | _beside(task, search, kind))
    return frame(lines)


def _size(run: Any, good: Mapping[str, float]) -> dict[str, float]:
    """The size of a mask, with the numbers of all parameters from another ticket's size on that task."""
    from bert_tickets.modeling.units import read_units

    mask = read_mask(Path(run.run), run.level)
    gone = mask.total - mask.kept
    found = {f"{name}_kept": good[name] - gone for name in ("encoder_layers", "all")}
    found |= {"bertplays_percent": 100 * (found["all_kept"] / good["all"] - 0.21), "covered_kept": mask.kept}
    if "units" in mask.info:
        found |= {f"{kind}_kept": int(kept.count_nonzero()) for kind, kept in read_units(mask).items()}
    return {**good, **found}


def _size_line(found: Sequence[Mapping[str, float]]) -> dict[str, str]:
    line = {"masks": str(len(found))}
    for kind in ("heads", "mlps", "neurons"):
        if kind in found[0]:
            line[UNIT_NAMES[kind]] = f"{_spread([size[f'{kind}_kept'] for size in found])} of {found[0][kind]:,}"
    for name, words in (("covered", "% of covered"), ("encoder_layers", "% of the layers"), ("all", "% of all")):
        line[words] = _spread([100 * size[f"{name}_kept"] / size[name] for size in found])
    return line | {"% of all - 21": _spread([size["bertplays_percent"] for size in found])}


def _beside(task: str, search: str, kind: str) -> dict[str, str]:
    """The published sizes of a ticket."""
    name = "super good" if (search, kind) == ("importance", "super") else f"{SEARCHES.get(search, '')} {kind}"
    line = {"published % of all - 21": published.bertplays_percent(name, task)}
    if name == "s good" and (kept := published.bertplays_kept(task)):
        line["published heads/MLPs"] = f"{_spread(kept[0])} / {_spread(kept[1])} {published.bertplays_mark('kept')}"
    elif name == "super good" and (heads := published.bertplays_value("super", "heads", task)) is not None:
        mlps = published.bertplays_value("super", "mlps", task)
        line["published heads/MLPs"] = f"{heads} / {mlps} {published.bertplays_mark('super')}"
    if (share := published.bertplays_value("covered", name, task)) is not None:
        line["published % of covered"] = f"{100 * share:.1f} {published.bertplays_mark('covered')}"
    return line


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
