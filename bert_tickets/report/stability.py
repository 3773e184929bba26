"""The stability of masks of heads and MLPs over seeds and tasks (Prasanna et al. 2020) as a table."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.cells import fill_over_sparsities
from bert_tickets.report.formats import Table, frame
from bert_tickets.report.importance import GOOD, SEARCHES, UNIT_NAMES, in_order, tasks_of, tickets
from bert_tickets.report.rows import row_name
from bert_tickets.runs.integrity import read_mask

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

    from bert_tickets.masking.mask import Mask

PACKAGES = ("statsmodels", "krippendorff")
STATISTICS = ("kappa", "alpha", "Q", "p")
NEEDS_TWO = "needs two seeds"
NOTES = (
    "Kappa: Fleiss' kappa, with units as subjects and seeds as raters. Alpha: Krippendorff's, nominal. Both are 1 for equal "
    "masks, and about 0 for independent ones. Q, p: Cochran's test that all seeds keep as many units.",
    "Common: units that the masks of all seeds keep, which is the super ticket. The kappa of a pair of tasks is over the masks "
    "of both, of their common seeds; its common units are in all of these. On the diagonal stands each task by itself.",
    "Tasks that keep a unit: the mean over seeds, which is the sum over tasks of the share of seeds that keep it.",
)


def why_missing() -> str:
    """Say which extra the table needs; "" if its packages are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"table stability needs {' and '.join(missing)}: pip install -e '.[stability]'" if missing else ""


def stability(levels: DataFrame, _: float | None) -> Table | None:
    """The agreement of good masks over seeds, by task and between tasks. Raises `UserError` without the extra `stability`."""
    own = searched(levels)
    own = own[own["search"].map(lambda search: not search.startswith("guarded_magnitude")).astype(bool)]  # those are of weights
    if own.empty:
        return None
    if missing := why_missing():
        raise UserError(missing)
    found = {search: unit_masks(own[own["search"] == search]) for search in in_order(own["search"], list(SEARCHES))}
    cells, grids = [], {}
    for kind in ("heads", "mlps"):
        lines = []
        for search, by_task in found.items():
            for task, masks in by_task.items():
                if kind in next(iter(masks.values())):
                    matrix = stack(masks.values(), kind)
                    statistics = agreement(matrix)
                    lines.append(_line(task, search, kind, matrix, statistics))
                    cells.append((task, search, kind, dict(zip(masks, matrix.sum(1).tolist(), strict=True)), statistics))
        if lines:
            grids[f"{UNIT_NAMES[kind]} over seeds"] = frame(lines)
    for search, by_task in found.items():
        if len(by_task) > 1:
            grids |= _between_tasks(row_name(search), by_task)
    notes = [published.explain_marks("masks", "nb"), *NOTES]
    return Table("Stability of heads and MLPs over seeds and tasks (Prasanna et al. 2020)", grids, _cells(own, cells), notes)


# ---- masks ----


def searched(levels: DataFrame) -> DataFrame:
    """The levels of the good tickets of guarded searches, as their searches found them."""
    own = tickets(levels)
    return own[~own["given"] & own["pruned"] & (own["kind"] == GOOD)]


def unit_masks(own: DataFrame) -> dict[str, dict[int, Mask]]:
    """The masks of units of the levels of one search: task -> seed -> mask."""
    from bert_tickets.modeling.units import read_units

    found: dict[str, dict[int, Mask]] = {task: {} for task in tasks_of(own)}
    for line in own.sort_values("seed").itertuples():
        found[line.task][line.seed] = read_units(read_mask(Path(line.run), line.level))
    return found


def stack(masks: Any, kind: str) -> np.ndarray:
    """Stack the units of a kind of several masks: [masks, units], 1 = kept."""
    import numpy as np

    return np.stack([mask[kind].flatten().numpy() for mask in masks]).astype(int)


# ---- agreement ----


def agreement(matrix: np.ndarray) -> dict[str, float]:
    """Compute the `STATISTICS` of masks [raters, units] of 0 and 1; NaN for one mask, or where they are undefined."""
    import krippendorff
    import numpy as np
    from statsmodels.stats.contingency_tables import cochrans_q
    from statsmodels.stats.inter_rater import fleiss_kappa

    raters, by = len(matrix), matrix.sum(0)
    if raters < 2 or by.min() == raters or by.max() == 0:
        return dict.fromkeys(STATISTICS, np.nan)
    kappa = fleiss_kappa(np.stack([raters - by, by], 1))
    alpha = krippendorff.alpha(reliability_data=matrix, level_of_measurement="nominal")
    differing = matrix[:, (by > 0) & (by < raters)]  # the others do not count in Q
    test = cochrans_q(differing.T) if differing.size else None
    q, p = (float(test.statistic), float(test.pvalue)) if test else (np.nan, np.nan)
    return {"kappa": float(kappa), "alpha": float(alpha), "Q": q, "p": p}


def why_undefined(matrix: np.ndarray) -> str:
    """Say why masks [raters, units] have no agreement: a single one, all units kept, or all pruned; "" if they have one."""
    if len(matrix) < 2:
        return NEEDS_TWO
    return "all kept" if matrix.all() else "" if matrix.any() else "all pruned"


def _number(value: float, matrix: np.ndarray, form: str = ".3f") -> str:
    return f"{value:{form}}" if value == value else why_undefined(matrix) or "no seed differs"


# ---- grids ----


def _line(task: str, search: str, kind: str, matrix: np.ndarray, found: Mapping[str, float]) -> dict[str, str]:
    kept = matrix.sum(1).tolist()
    spread = f" ± {stdev(kept):.1f}" if len(kept) > 1 else ""
    line = {"task": published.name(task), "ticket": row_name(search), "seeds": str(len(kept))}
    line |= {"kept": f"{mean(kept):.1f}{spread} of {matrix.shape[1]}", "common": str(int(matrix.all(0).sum()))}
    line |= {"kappa": _number(found["kappa"], matrix), "published kappa": "", "alpha": _number(found["alpha"], matrix)}
    line |= {"Q": _number(found["Q"], matrix, ".2f"), "p": _number(found["p"], matrix, ".2g"), "published p": ""}
    if search == "importance":
        beside = {"published kappa": published.bertplays_value("agreement", kind, task)}
        beside["published p"] = published.bertplays_value("agreement", "q_p", task) if kind == "heads" else None
        mark = published.bertplays_mark("agreement")
        line |= {name: f"{value:g} {mark}" for name, value in beside.items() if value is not None}
    return line


def _between_tasks(ticket: str, by_task: Mapping[str, Mapping[int, Mask]]) -> dict[str, DataFrame]:
    """Matrices of tasks: kappa and common units of pairs; and how many tasks keep a unit."""
    kinds = [kind for kind in ("heads", "mlps") if all(kind in mask for masks in by_task.values() for mask in masks.values())]
    grids = {}
    for what in (*(f"kappa of {UNIT_NAMES[kind]}" for kind in kinds), f"common {'/'.join(UNIT_NAMES[kind] for kind in kinds)}"):
        lines: dict[str, dict[str, str]] = {task: {"task": published.name(task)} for task in by_task}
        for one, other in product(by_task, by_task):
            seeds = by_task[one].keys() & by_task[other].keys()
            masks = [by_task[task][seed] for task in dict.fromkeys((one, other)) for seed in sorted(seeds)]
            matrices = {UNIT_NAMES[kind]: stack(masks, kind) for kind in kinds} if masks else {}
            if not masks:
                text = "no common seed"
            elif what.startswith("kappa"):
                matrix = matrices[what.removeprefix("kappa of ")]
                text = _number(agreement(matrix)["kappa"], matrix)
            else:
                text = "/".join(str(int(matrix.all(0).sum())) for matrix in matrices.values())
            lines[one][published.name(other)] = text
        grids[f"{ticket}: {what}"] = frame(list(lines.values()))
    return grids | {f"{ticket}: units by the number of tasks that keep them": _by_tasks(ticket, by_task, kinds)}


def _by_tasks(ticket: str, by_task: Mapping[str, Mapping[int, Mask]], kinds: Sequence[str]) -> DataFrame:
    """The number of units that more than k tasks keep, on average over seeds."""
    total = len(by_task)
    counts = {kind: sum(stack(masks.values(), kind).mean(0) for masks in by_task.values()) for kind in kinds}
    lines = []
    for k in reversed(range(total)):
        line = {"kept by": f"more than {k} of {total} tasks"}
        line |= {UNIT_NAMES[kind]: str(int((count > k + 1e-9).sum())) for kind, count in counts.items()}
        if (k, total) == (5, 9):
            part = published.DATA["bertplays"]["over_five"]
            of = part["together"] if ticket == row_name("importance") else {kind: part["alone"][kind] for kind in kinds}
            numbers = ", ".join(f"{of[kind]} {UNIT_NAMES[kind]}" for kind in kinds)
            line["published"] = f"{numbers} {published.bertplays_mark('over_five')}"
        lines.append(line)
    return frame(lines)


def _cells(own: DataFrame, found: Sequence[tuple[str, str, str, dict[int, int], dict[str, float]]]) -> DataFrame:
    """A cell per statistic, with the runs and masks behind it; the values of seeds are numbers of kept units."""
    import pandas as pd

    wanted = own[["task", "row", "search"]].drop_duplicates().to_dict("records")
    pooled = fill_over_sparsities(own, [want | {"sweep": "stability"} for want in wanted])
    lines = []
    for task, search, kind, kept, statistics in found:
        cell = pooled[(pooled["task"] == task) & (pooled["search"] == search)].iloc[0].to_dict()
        cell |= {"undefined": [], "warnings": "", "values": kept, "sd": float("nan"), "unit": "statistic", "verdict": ""}
        for name, value in statistics.items():
            lines.append(cell | {"metric": f"{name} of {UNIT_NAMES[kind]}", "mean": value})
    return pd.DataFrame(lines)
