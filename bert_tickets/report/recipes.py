"""Bring the settings of runs into one scale where methods train in different ways: EarlyBERT's tickets beside the full BERT.

A setting in words is what differs from the preset of the run's own method. The preset of `early_bird` has another batch size,
learning rate and number of epochs than fine-tuning's, so that the same words would mean different trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bert_tickets.content import brief
from bert_tickets.report.rows import PRETRAINED_BY, is_early_bird

RECIPE = ("epochs", "lr", "max steps")  # settings in words in which a ticket's training may differ from the full BERT's
SEARCH = ("search lr", "search epochs")  # those of a search
OF_RUN = ("task", "method", "protocol", "seed", "init", "epochs", "lr", "max_steps")  # no part of what a task's runs must share


def shared_settings(config: Mapping[str, Any], differs: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The values, not the differences to a preset, of the settings that all runs of a table share; files by their content."""
    found = {name: differs.get(name, config.get(name)) for name, f in common.items() if f.metadata["affects_result"]}
    if config.get("report", "last") == "last":
        found["eval_steps"] = None
    return {name: value for name, value in found.items() if name not in (*OF_RUN, "data_dir")}


def adopt_settings(lines: Sequence[dict[str, Any]]) -> None:
    """Give the runs of a task the setting of its EarlyBERT runs, if their shared settings have the same values.

    What all EarlyBERT runs of the task have of `RECIPE` stays in the setting; if some differ from the preset in other settings,
    what all these have. Where a run has something else, that is its `length`, which the row names, as it does what some have of
    `SEARCH`. The `recipe` of other runs is what differs from their own preset. Where the shared settings of other runs have other
    values, the setting of the EarlyBERT runs names their own.
    """
    for task in {line["task"] for line in lines if _searches(line)}:
        of_task = [line for line in lines if line["task"] == task]
        searches = [line for line in of_task if _searches(line)]
        trained = [line for line in of_task if not _searches(line) and not line["scored"]]
        others = [line for line in trained if line["shared"] not in [one["shared"] for one in searches]]
        more = [sorted(set().union(*(_differing(line, other) for other in others))) for line in searches]
        for line, words in zip(searches, more, strict=True):
            line |= {name: ", ".join(filter(None, [line[name], *words])) for name in ("setting", "search")}
        of_base = [line for line in searches if _without(line["own_settings"], _words(line["own_settings"], SEARCH))] or searches
        common = set.intersection(*(_words(line["setting"], RECIPE) for line in of_base))
        early = [
            line for line in searches if not _words(line["own_settings"], ("ticket",))
        ]  # random and full ones search nothing
        of_search = set.intersection(*(_words(line["own_settings"], SEARCH) for line in early)) if early else set()
        for line in early:
            line["own_settings"] = _without(line["own_settings"], of_search)
        for line in searches:
            own_words = _words(line["setting"], RECIPE)
            presets = {word.rsplit(" ", 1)[0] for word in common} - {word.rsplit(" ", 1)[0] for word in own_words}
            own = own_words - common | {f"{name} {line['trained'][name]}" for name in presets}
            for name in ("setting", "search"):
                line[name] = ", ".join(sorted({*_without(line[name], own_words).split(", "), *common} - {""}))
            line["length"] = ", ".join(sorted(own))
        for line in of_task:
            same = [other for other in searches if other["shared"] == line["shared"]]
            if same and not _searches(line):
                recipe = ", ".join(sorted(_words(line["setting"], RECIPE)))
                line |= {"setting": same[0]["setting"], "recipe": recipe}
                line |= {"length": ", ".join(sorted(_words(recipe, RECIPE) - common))} if line["given"] else {}


def name_models(lines: Sequence[dict[str, Any]]) -> None:
    """Say of runs on a model that another run pre-trained how that was found, in `weights` instead of in the setting."""
    makers = {line["made"]: line for line in lines if line.get("made")}
    lengths: dict[str, list[set[str]]] = {}  # of a method's makers
    for made in makers.values():
        lengths.setdefault(made["method"], []).append(_words(made["setting"], RECIPE))
    for line in lines:
        if maker := makers.get(line["shared"].get("model")):
            of_method = lengths[maker["method"]]
            differing = sorted(_words(maker["setting"], RECIPE) - set[str].intersection(*of_method))
            place = [f"task {maker['task']}"] * (maker["task"] != "mlm")
            place += [f"sparsity {maker['sparsity']}"] * (maker["sparsity"] > 0 and not is_early_bird(maker["method"]))
            own = ", ".join(filter(None, [maker["own_settings"], *place, *differing]))
            method = f"{maker['method']} ({own})" if own else maker["method"]
            words = {word for word in line["setting"].split(", ") if word.startswith("model ")}
            line |= {name: _without(line[name], words) for name in ("setting", "search")}
            line |= {"weights": PRETRAINED_BY + method, "maker": maker["run"]}


def _searches(line: Mapping[str, Any]) -> bool:
    return is_early_bird(line["method"]) and not line["given"]


def _differing(line: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """The shared settings of a run, in words, that have another value in another run, and that neither setting names."""
    named = {word.rsplit(" ", 1)[0] for one in (line, other) for word in one["setting"].split(", ")}
    named |= {"model"} if other["maker"] else set()  # `weights` says of it
    differing = {name: value for name, value in line["shared"].items() if value != other["shared"].get(name)}
    words = {name.replace("_", " "): brief(str(value)) for name, value in differing.items()}
    return {f"{name} {value}" for name, value in words.items() if name not in named}


def _words(setting: str, names: Sequence[str]) -> set[str]:
    return {word for word in setting.split(", ") if word.rsplit(" ", 1)[0] in names}


def _without(setting: str, words: set[str]) -> str:
    return ", ".join(word for word in setting.split(", ") if word not in words)
