"""Bring the settings of runs into one scale where methods train in different ways: EarlyBERT's tickets beside the full BERT.

A setting in words is what differs from the preset of the run's own method. The preset of `early_bird` has another batch size,
learning rate and number of epochs than fine-tuning's, so that the same words would mean different trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bert_tickets.report.rows import PRETRAINED_BY, is_early_bird

RECIPE = ("epochs", "lr", "max steps")  # settings in words in which a ticket's training may differ from the full BERT's
OF_RUN = ("task", "method", "protocol", "seed", "init", "epochs", "lr", "max_steps")  # no part of what a task's runs must share


def shared_settings(config: Mapping[str, Any], differs: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The values, not the differences to a preset, of the settings that all runs of a table share; files by their content."""
    found = {name: differs.get(name, config.get(name)) for name, f in common.items() if f.metadata["affects_result"]}
    if config.get("report", "last") == "last":
        found["eval_steps"] = None
    return {name: value for name, value in found.items() if name not in (*OF_RUN, "data_dir")}


def adopt_settings(lines: Sequence[dict[str, Any]]) -> None:
    """Give the runs of a task the setting of its EarlyBERT runs, if their shared settings have the same values.

    What all EarlyBERT runs of the task have of `RECIPE` stays in the setting. What some have is their `length`, which the row
    names. The `recipe` of other runs is what differs from their own preset.
    """
    for task in {line["task"] for line in lines if _searches(line)}:
        of_task = [line for line in lines if line["task"] == task]
        searches = [line for line in of_task if _searches(line)]
        common = set.intersection(*(_words(line["setting"], of_recipe=True) for line in searches))
        for line in searches:
            own = _words(line["setting"], of_recipe=True) - common
            line |= {name: _without(line[name], own) for name in ("setting", "search")} | {"length": ", ".join(sorted(own))}
        for line in of_task:
            same = [other for other in searches if other["shared"] == line["shared"]]
            if same and not _searches(line):
                recipe = ", ".join(sorted(_words(line["setting"], of_recipe=True)))
                line |= {"setting": same[0]["setting"], "recipe": recipe}
                line |= {"length": ", ".join(sorted(_words(recipe) - common))} if line["given"] else {}


def name_models(lines: Sequence[dict[str, Any]]) -> None:
    """Say of runs on a model that another run pre-trained how that was found, in `weights` instead of in the setting."""
    makers = {line["made"]: line for line in lines if line.get("made")}
    for line in lines:
        if maker := makers.get(line["shared"].get("model")):
            method = f"{maker['method']} ({maker['own_settings']})" if maker["own_settings"] else maker["method"]
            words = {word for word in line["setting"].split(", ") if word.startswith("model ")}
            line |= {name: _without(line[name], words) for name in ("setting", "search")}
            line |= {"weights": PRETRAINED_BY + method, "maker": maker["run"]}


def _searches(line: Mapping[str, Any]) -> bool:
    return is_early_bird(line["method"]) and not line["given"]


def _words(setting: str, *, of_recipe: bool = False) -> set[str]:
    words = {word for word in setting.split(", ") if word}
    return {word for word in words if word.rsplit(" ", 1)[0] in RECIPE} if of_recipe else words


def _without(setting: str, words: set[str]) -> str:
    return ", ".join(word for word in setting.split(", ") if word not in words)
