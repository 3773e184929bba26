"""Name the rows of tables: how a ticket was found, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bert_tickets.report import published

FULL = "full BERT"
RANDOM_PRUNING, ONE_SHOT = "random pruning", "one-shot pruning"
UNTRAINED = {"oneshot random": RANDOM_PRUNING, "oneshot magnitude": ONE_SHOT}  # the paper's names of what oneshot.py makes
PRETRAINED, RANDOM, SHUFFLED = "pre-trained", "random", "shuffled"  # weights; others as their file says
PERTURBED = {  # what perturb_weight.py writes: weights in the name of a row
    "the entries of each matrix shuffled": SHUFFLED,
    "its layers whole": "layers in another order",
    "its matrices by layer": "matrices in another order",
}


def name_rows(lines: Sequence[dict[str, Any]]) -> None:
    """Name the rows, and complete `method` by its settings. A given ticket has those of the run that found it, if it is there.

    If several runs found the same mask, as at level 1 if they rewind to different steps, it is the plainest one's. The settings
    of the search's training are named if several searches of a method differ in them, and the step of a mask saved on the way.
    """
    found = [line for line in lines if not line["given"]]
    for line in found:
        _name_row(line)
    searches: dict[tuple, set[str]] = {}
    for line in found:
        searches.setdefault((line["method"], line["source"], line["sparsity"]), set()).add(line["search"])
    finders: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in sorted(found, key=lambda line: plainness(line["row"])):
        finders.setdefault((line["method"].partition(" (")[0], line["source"], line["mask_sha256"]), line)
    saved_by = {Path(line["run"]).name: line for line in found}
    for line in lines:
        if line["given"]:
            same = finders.get((line["method"], line["source"], line["mask_sha256"]), line)
            finder = saved_by.get(line["found_by"], same) if line["step"] else same
            is_ticket = finder is not line and finder["mask_sha256"] == line["mask_sha256"]
            line["search"] = "" if finder is line else finder["search"]
            several = searches.get((finder["method"], finder["source"], line["sparsity"]), {line["search"]})
            shared = set.intersection(*(set(search.split(", ")) for search in several))
            words = [word for word in line["search"].split(", ") if word not in shared]
            words += [] if is_ticket or not line["step"] else [f"step {line['step']}"]
            line |= {"method": _with_settings(finder["method"], words), "rewind": finder["rewind"]}
            _name_row(line)


def _with_settings(method: str, words: Iterable[str]) -> str:
    """Add settings to a method's: `imp (scope tensor)` becomes `imp (scope tensor, max steps 200)`."""
    name, _, own = method.partition(" (")
    settings = ", ".join(filter(None, [own.removesuffix(")"), *words]))
    return f"{name} ({settings})" if settings else name


def _name_row(line: dict[str, Any]) -> None:
    line["method"] = _with_settings(line["method"], [line["own_settings"]])
    method, source, weights = line["method"], line["source"], line["weights"]
    if not line["given"]:
        found_in = "" if weights == PRETRAINED else f", found in {weights} weights"
        line["row"] = row_name(method, rewind=line["rewind"]) + found_in
    elif not source:
        name = UNTRAINED.get(method, method or f"mask {line['mask_sha256'][:8]}")
        line["row"] = name + _from(weights)
    else:
        again = ", trained again" if source == line["task"] and weights == PRETRAINED else ""
        other = "" if source == line["task"] else source
        line["row"] = row_name(method, source=other, rewind=line["rewind"], weights=weights) + again


def row_name(method: str, *, source: str = "", rewind: str = "", weights: str = PRETRAINED) -> str:
    """The row of a method's tickets; `source` is the task they were found on, if another than they are trained on."""
    of = f" of {published.name(source)}" if source else ""
    return f"{method} ticket{of}" + (f", rewind {rewind}" if rewind else "") + _from(weights)


def _from(weights: str) -> str:
    if weights == PRETRAINED:
        return ""
    return f", {weights}" if " " in weights else f", {weights} weights"


def plainness(row: str) -> tuple[int, bool, str]:
    """A sort key of rows: those with the fewest settings first, then the paper's method."""
    return len(row.split()), not is_published(row), row


def is_published(name: str) -> bool:
    """Whether a method, or the method of a row, is the paper's."""
    return name.partition(" ")[0] == published.METHOD
