"""Name the rows of tables: how a ticket was found, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bert_tickets.report import published

FULL = "full BERT"
RANDOM_PRUNING, ONE_SHOT = "random pruning", "one-shot pruning"
UNTRAINED = {"oneshot random": RANDOM_PRUNING, "oneshot magnitude": ONE_SHOT}  # the paper's names of what oneshot.py makes
GUARDED = ("importance", "guarded_magnitude")  # methods that prune a trained network while its score holds, and train no more
EARLY_BIRD = "early_bird"  # the method whose level 0 searches for a ticket, and whose level 1 trains it
PRUNED = "pruned"  # in the rows of tickets that are scored as they stand
LENGTH = ("batch size", "epochs")  # settings of a training that the row names where only it has them
PRETRAINED, RANDOM, SHUFFLED = "pre-trained", "random", "shuffled"  # weights; others as their file says
TRAINED = "its trained weights"  # of the level that found the ticket
PRETRAINED_BY = "pre-trained by "  # weights of a run that is there
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
            if is_guarded(line["method"]):
                of_task = [other for other in found if other["task"] == line["task"] and is_guarded(other["method"])]
                _adopt_setting(line, {other["setting"] for other in of_task})
            _name_row(line)


def _adopt_setting(line: dict[str, Any], searches: Iterable[str]) -> None:
    """Give a guarded search's ticket the search's setting, if it differs by nothing but a length, which the row then names.

    A ticket that is scored as it stands has no training of its own, and the setting of the search.
    """
    own = _by_name(line["setting"])
    for search in sorted(searches):
        theirs = _by_name(search)
        differing = {name: value for name, value in own.items() if theirs.get(name) != value}
        if line["pruned"] and not differing:
            line["setting"] = search
        elif theirs.keys() <= own.keys() and differing.keys() <= {*LENGTH}:
            line |= {"setting": search, "length": ", ".join(f"{name} {value}" for name, value in differing.items())}
        else:
            continue
        return


def _by_name(setting: str) -> dict[str, str]:
    """Divide a setting's words: `batch size 16, epochs 2`."""
    return dict(word.rsplit(" ", 1) for word in setting.split(", ") if word)


def _with_settings(method: str, words: Iterable[str]) -> str:
    """Add settings to a method's: `imp (scope tensor)` becomes `imp (scope tensor, max steps 200)`."""
    name, _, own = method.partition(" (")
    settings = ", ".join(filter(None, [own.removesuffix(")"), *words]))
    return f"{name} ({settings})" if settings else name


def _name_row(line: dict[str, Any]) -> None:
    line["method"] = _with_settings(line["method"], [line["own_settings"]])
    method, source, weights = line["method"], line["source"], line["weights"]
    if not line["given"] and weights.startswith(PRETRAINED_BY):
        line["row"] = (row_name(method, rewind=line["rewind"]) if line["sparsity"] else FULL) + f", {weights}"
    elif not line["given"]:
        found_in = "" if weights == PRETRAINED else f", found in {weights} weights"
        line["row"] = row_name(method, rewind=line["rewind"]) + found_in
    elif not source:
        name = UNTRAINED.get(method, method or f"mask {line['mask_sha256'][:8]}")
        line["row"] = name + _from(weights)
    else:
        is_again = source == line["task"] and weights == PRETRAINED and not line["pruned"] and not is_guarded(method)
        other = "" if source == line["task"] else source
        line["row"] = row_name(method, source=other, rewind=line["rewind"], weights=weights) + ", trained again" * is_again
    line["row"] += "".join(f", {words}" for words in (line.get("length"), PRUNED * line["pruned"]) if words)


def row_name(method: str, *, source: str = "", rewind: str = "", weights: str = PRETRAINED) -> str:
    """The row of a method's tickets; `source` is the task they were found on, if another than they are trained on."""
    of = f" of {published.name(source)}" if source else ""
    return f"{method} ticket{of}" + (f", rewind {rewind}" if rewind else "") + _from(weights)


def _from(weights: str) -> str:
    if weights == PRETRAINED:
        return ""
    return f", {weights}" if " " in weights else f", {weights} weights"


def is_guarded(method: str) -> bool:
    """Whether a method, with or without settings, is a guarded search, or derives tickets from one's."""
    return method.partition(" ")[0] in GUARDED


def is_early_bird(method: str) -> bool:
    """Whether a method, with or without settings, is EarlyBERT's."""
    return method.partition(" ")[0] == EARLY_BIRD


def has_own_table(method: str) -> bool:
    """Whether a method's tickets are in a table of their own, not in those over sparsities."""
    return is_guarded(method) or is_early_bird(method)


def plainness(row: str) -> tuple[int, bool, str]:
    """A sort key of rows: those with the fewest settings first, then the paper's method."""
    return len(row.split()), not is_published(row), row


def is_published(name: str) -> bool:
    """Whether a method, or the method of a row, is the paper's."""
    return name.partition(" ")[0] == published.METHOD
