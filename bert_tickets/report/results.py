"""Read run directories into one table, a pandas DataFrame with a line per finished level.

A row name says how a ticket was found and what it starts from: `imp ticket`, `imp (scope tensor) ticket of MNLI`,
`imp ticket, random weights`, `random pruning`, `importance bad ticket, pruned`. It
contains every setting of the method that differs from the preset, so that tickets found in different ways are never in one row,
and a new method has rows without code here. Settings of the training are in the column `setting`; a table has one of them per
task. All is read from the files, nothing from a directory's name, without torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_tickets.config import COMMON, build, deciding_flags, fields_of, flat, kind_of
from bert_tickets.content import brief, of_checkpoint
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts
from bert_tickets.report import published
from bert_tickets.report.recipes import RECIPE, adopt_settings, name_models, shared_settings
from bert_tickets.report.rows import FULL, GUARDED, PERTURBED, PRETRAINED, RANDOM, TRAINED, is_early_bird, name_rows, plainness
from bert_tickets.runs.directory import failure, level_dir, levels_done, read_run, results
from bert_tickets.runs.integrity import check_level

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = {
    "run": "the directory",
    "level": "",
    "levels": "of the finished run",
    "task": "",
    "row": "how the ticket was found and what it starts from",
    "sparsity": "pruned fraction of the covered weights, to three decimals: small networks cannot prune exactly 40 %",
    "seed": "",
    "metric": "the task's main metric",
    "value": "of the metric, x 100 as in the paper, losses as they are; NaN if undefined",
    "best_of": "the number of evaluations of which the value is the best one; 1 if it is the last one",
    "warnings": "a list",
    "total": "weights that the mask covers",
    "mask_sha256": "",
    "given": "whether the run trains or scores a given ticket; otherwise it found this one",
    "pruned": "whether the ticket is scored as it stands: trained weights without the pruned ones, not trained again",
    "method": 'that found the ticket, with its settings, and how it was derived from others; "" if the mask file does not say',
    "dense": "what decides on level 0 beside the setting: another decay of the learning rate, or weights that were given",
    "rewind": 'what the method rewinds to, if that differs from the preset; otherwise ""',
    "source": 'the task that the ticket was found on; "" if none',
    "weights": "that the ticket starts from",
    "setting": "settings of the training that differ from the preset; not the folder of the data",
    "recipe": "of a run beside EarlyBERT's: length and learning rate, where they differ from the preset of its method",
    "search": "of the run that found the ticket: settings of its training that differ from the preset",
    "data": "sha256 of the data, and the precision; without training data that are drawn by the seed",
    "subset": 'sha256 of the training data, if they are drawn by the seed; otherwise ""',
    "model": "sha256 of the encoder before training",
    "maker": 'the run that pre-trained the model, if it is there; otherwise ""',
}
# Settings that other columns say, or the files that the run reads.
NOT_IN_ROWS = dict.fromkeys(("mask", "weights", "rewind", "levels", "sparsity", "ticket_step", "save_masks"))
OF_DERIVED, OF_ONESHOT = ("units", "random_size"), ("init", "prunable")  # what their mask files say that rows name
ALL_UNITS = "heads+mlps"  # of a search by importance, unless its settings say otherwise


# ---- reading ----


def read_results(places: Iterable[str | Path], setting: str | None = None) -> tuple[DataFrame, list[str]]:
    """Read run directories, or all run directories in a folder; only those with a `setting` of the training, if one is given.

    Returns the table of levels (`COLUMNS`), and a sentence for each run whose next level diverged.
    Raises `UserError` if there is no run, `Damaged` for a damaged one.
    """
    import pandas as pd

    given = [Path(place) for place in places]
    files = [[place / "run.json"] if (place / "run.json").is_file() else place.rglob("run.json") for place in given]
    runs = sorted({file.parent.resolve(): file.parent for found in files for file in found}.values())
    if not runs:
        raise UserError(f"no run directory in {', '.join(map(str, given))}")
    lines: list[dict[str, Any]] = []
    failures = []
    for run in runs:
        facts, done = _facts_of_run(run), levels_done(run)
        first = int(is_early_bird(facts["method"]))  # its level 0 is a search
        lines += [facts | _facts_of_level(run, level, facts) for level in range(first, done)]
        if (failed := failure(run)) and _has_setting(facts["setting"], setting):
            failures.append(f"{run}: level {failed['level']} diverged: {failed['ended']}")
    lines = [part for line in lines for part in _losses(line)]
    name_models(lines)
    adopt_settings(lines)
    name_rows(lines)  # after runs of other settings, which may have found the tickets
    lines = [line for line in lines if _has_setting(line["setting"], setting)]
    return pd.DataFrame(lines, columns=list(COLUMNS)), failures


def _has_setting(found: str, wanted: str | None) -> bool:
    """Whether a setting has all words of another ("lr 0.0001, precision bf16"); "" is the preset unchanged."""
    if wanted is None:
        return True
    return set(wanted.split(", ")) <= set(found.split(", ")) if wanted else found == ""


def _facts_of_run(run: Path) -> dict[str, Any]:
    """The columns that all levels of a run share."""
    about = read_run(run)
    config, differs, fingerprint = about["config"], about["differs_from_preset"], about["fingerprint"]
    implied = _implied(config, differs)
    setting = {key: differs.get(key, config[key]) for key in _changed(config, differs, implied) if key in COMMON}
    for name in ("task", "method", "protocol", "seed", "init", "data_dir"):
        setting.pop(name, None)
    changed = _changed(config, differs, implied)
    own = {key: config[key] for key in changed if key not in COMMON | NOT_IN_ROWS}
    length = {key: config[key] for key in changed if key == "ticket_step"}
    setting |= {} if config["protocol"] == "paper" else {"protocol": config["protocol"]}
    if config.get("report", "last") == "last":
        setting.pop("eval_steps", None)  # more evaluations do not change the last one
    drawn, init = config.get("limit_seed") == "run", fingerprint.get("init") or {}
    return {
        "run": str(run),
        "levels": config.get("levels", 1),
        "task": config["task"],
        "seed": config["seed"],
        "given": config.get("mask") is not None,
        "method": config["method"],
        "own_settings": _words(own),
        "scored": config["method"] == "score",
        "dense": _words({key: differs.get(key, config[key]) for key in changed if key in ("decay", "weights")}),
        "rewind": differs.get("rewind", ""),
        "source": config["task"],
        "weights": _weights(config["init"], differs.get("init", ""), init, config["seed"]),
        "init_level": [init.get("run"), str(init.get("level"))],
        "setting": _words(setting),
        "search": _words(setting | length),
        "shared": shared_settings(config, differs, COMMON),
        "recipe": "",
        "trained": {name: brief(str(config.get(name.replace(" ", "_")))) for name in RECIPE},
        "maker": "",
        "report": config.get("report", "last"),
        "data": json.dumps([fingerprint.get(key) for key in ("train", "evaluation", "precision")[drawn:]], sort_keys=True),
        "subset": json.dumps(fingerprint.get("train"), sort_keys=True) if drawn else "",
        "model": str(fingerprint.get("model")),
    }


def _implied(config: Mapping[str, Any], differs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the preset has for the flags that decide on others, such as --rewind; {} if that is unknown."""
    try:
        deciding = deciding_flags(config["method"], kind_of(config["task"]), config["protocol"])
        named = {"task", "method", "protocol"} | differs.keys() & (deciding | {"rewind", "mask", "sparsity"})
        return flat(build({key: config[key] for key in named}))
    except (UserError, TypeError):  # the method is not installed, or has a required flag
        return {}


def _changed(config: Mapping[str, Any], differs: Mapping[str, Any], implied: Mapping[str, Any]) -> list[str]:
    """The settings that affect the result and differ from those that the preset implies, and those that decide on others."""
    if not implied:
        return list(differs)
    deciding = deciding_flags(config["method"], kind_of(config["task"]), config["protocol"])
    fields = fields_of(config["method"])
    return [
        key
        for key, value in config.items()
        if fields[key].metadata["affects_result"] and (value != implied.get(key) or (key in differs and key in deciding))
    ]


def _weights(init: str, sha256: str, facts: Mapping[str, Any], seed: int) -> str:
    """The initial weights in words, the same for every seed: without a drawn order, or the run's own seed."""
    if init in ("pretrained", "random"):
        return PRETRAINED if init == "pretrained" else RANDOM
    said = str(facts.get("perturbed") or facts.get("rewound") or f"the file {Path(init).name} ({brief(sha256)})")
    said = re.split(" in the order | times ", said)[0].removesuffix(f", seed {seed}")
    return PERTURBED.get(said, said)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {brief(str(value))}" for key, value in sorted(values.items()))


def _facts_of_level(run: Path, level: int, of_run: Mapping[str, Any]) -> dict[str, Any]:
    line = check_level(run, level)
    is_best = of_run["report"] == "best"
    value = (line["best"] if is_best else line)["metrics"][line["metric"]]
    facts: dict[str, Any] = {"best_of": len(line["evaluations"]) if is_best else 1}
    facts |= {key: line[key] for key in ("level", "metric", "mask_sha256", "warnings")}
    facts |= {"value": math.nan if value is None else 100 * value}
    facts |= {"sparsity": round(line["sparsity"], 3), "total": line.get("total", 0)}
    is_scored = of_run["scored"] and of_run["task"] != "mlm"  # there the losses are no scores of a trained network
    facts["made"] = of_checkpoint(line["model_files"]) if "model_files" in line else ""
    facts["pruned"] = is_scored or (of_run["method"] in GUARDED and level > 0)
    if of_run["given"]:
        info = read_facts(level_dir(run, level) / "mask.safetensors")
        own = {key: info[key] for key in OF_DERIVED if "derived" in info and key in info}
        own |= {key: info[key] for key in OF_ONESHOT if str(info.get("method")).startswith("oneshot") and key in info}
        own = {key: value for key, value in own.items() if (key, value) not in (("units", ALL_UNITS), ("init", "pretrained"))}
        if info.get("run") and [info["run"], str(info.get("level"))] == of_run["init_level"]:
            facts["weights"] = TRAINED
        facts |= {"method": " ".join(filter(None, (info.get("method"), info.get("derived")))), "source": info.get("task", "")}
        facts |= {"own_settings": _words(own), "rewind": "", "step": info.get("step"), "found_by": info.get("run")}
    return facts


def _losses(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a level; of a ticket that is scored on MLM one for each of its losses."""
    if not line["scored"] or line["task"] != "mlm":
        return [line]
    (found,) = results(Path(line["run"]))
    values = {"mlm_loss": found["metrics"]["loss"], "kd_loss": found["hidden_states"]["cosine"]}
    warnings = {"mlm_loss": line["warnings"], "kd_loss": []}
    return [
        line | {"task": task, "metric": name, "value": values[task], "warnings": warnings[task]}
        for task, name in published.LOSSES.items()
    ]


# ---- what may be compared ----


def of_tasks(levels: DataFrame, tasks: str | None) -> DataFrame:
    """The levels of these tasks, separated by spaces; all for None. Raises `UserError` for a task without levels."""
    if tasks is None:
        return levels
    for task in tasks.split():
        if task not in set(levels["task"]):
            raise UserError(f"no level of the task {task}; there are {', '.join(published.in_order(levels['task']))}")
    return levels[levels["task"].isin(tasks.split())]


def comparable(levels: DataFrame) -> DataFrame:
    """The levels that tables and figures compare, in the order of rows: those of one setting, equal copies once.

    Level 0 of runs that find tickets is the row `full BERT`, unless only it is trained so (`dense`); of each task and seed it is
    the plainest run's. Raises `UserError`
    if the runs of a task have several settings, or if runs with equal settings differ.
    """
    import pandas as pd

    if levels.empty:
        return levels
    advice = "give the runs of one, choose it with --setting, or leave the task out with --tasks"
    refuse_several(levels, ["setting"], ["task"], f"have different settings; {advice}")
    dense = levels[~levels["given"] & ~levels["method"].map(is_early_bird)]
    refuse_several(dense, ["recipe"], ["task"], f"have different lengths or learning rates; {advice}")
    for columns, what, same in (
        (["data"], "data or precision", ["task"]),
        (["subset"], "training data", ["task", "seed"]),
        (["model"], "initial weights", ["task", "seed", "weights"]),
        (["value", "mask_sha256"], "results", ["task", "row", "sparsity", "seed"]),
    ):
        refuse_several(levels, columns, same, f"have the same settings, but different {what}; give one of them")
    levels = levels.drop_duplicates(["task", "row", "sparsity", "seed"])
    is_full = ~levels["given"] & ~levels["pruned"] & (levels["weights"] == PRETRAINED) & (levels["sparsity"] == 0)
    is_full &= ~levels["method"].map(is_early_bird).astype(bool) & (levels["dense"] == "")
    dense = levels[is_full].sort_values("row", key=lambda rows: rows.map(plainness)).drop_duplicates(["task", "seed"])
    levels = pd.concat([levels[~is_full], dense.assign(row=FULL)], ignore_index=True)
    return levels.loc[[line.Index for line in sorted(levels.itertuples(), key=_place)]].reset_index(drop=True)


def refuse_several(levels: DataFrame, columns: list[str], same: list[str], message: str) -> None:
    """Raise `UserError` if lines that agree in the columns `same` differ in `columns`."""
    distinct = levels.drop_duplicates([*same, *columns])
    several = distinct[distinct.duplicated(same, keep=False)]
    if several.empty:
        return
    first = several[(several[same] == several[same].iloc[0]).all(axis=1)]
    where = ", ".join(f"{key} {value}" for key, value in first[same].iloc[0].items())
    listed = "".join(
        f"\n  {run}: {setting or 'the preset unchanged'}" for run, setting in zip(first.run, first.setting, strict=True)
    )
    raise UserError(f"runs ({where}) {message}:{listed}")


def _place(line: Any) -> tuple:
    """The order of rows: the full BERT, tickets on their own task, tickets of no task, tickets of other tasks."""
    kind = 0 if not line.given else 1 if line.source == line.task else 2 if not line.source else 3
    source = published.place(line.source) if kind == 3 else (0, "")
    return line.row != FULL, kind, source, line.row, published.place(line.task), line.sparsity, line.seed


def own_tickets(levels: DataFrame) -> DataFrame:
    """The levels that are tickets trained on the task that they were found on, rewound as the preset says."""
    is_own = ~levels["given"] & ~levels["pruned"] & (levels["weights"] == PRETRAINED) & (levels["rewind"] == "")
    return levels[is_own & (levels["sparsity"] > 0)]
