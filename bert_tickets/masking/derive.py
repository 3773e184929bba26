"""Derive tickets from tickets: random and bad ones of the same size, those over several seeds, set operations.

Prasanna et al. 2020 compare a good subnetwork with such controls. The units of a mask are drawn from one population: all its
tensors together, be they weights or the units of one kind. `derive` divides a mask of several kinds of units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import Scope, magnitude, prune, random_scores
from bert_tickets.seeds import seeded

FACTS = ("base_model", "task", "method", "units", "heads")  # of the inputs' info, those that they agree on describe the result


def derive(
    kind: str,
    masks: Sequence[Mask],
    seed: int | None = None,
    scope: Scope = "tensor",
    *,
    like: Mask | None = None,
    weights: Mapping[str, Tensor] | None = None,
    binomial: bool = False,
) -> Mask:
    """Derive a mask of this kind (scripts/derive.py lists them) from masks that cover the same tensors.

    Scope `tensor` derives each tensor by itself, as for kinds of units, `global` all together. The draws are of named streams:
    a tensor's does not depend on the other tensors, and that of `super-bad` not on the seed. `like` gives the size of `resize`;
    with `weights`, `bad` goes by their magnitude; `binomial` is for `random`. The result's info has `derived`, the `seed`, and as
    `overlap` the numbers of units that it shares with the input, or with what all inputs keep.

    Raises `UserError`, naming a tensor, if the masks do not cover the same tensors with the same shapes.
    """
    every = intersection(masks)
    found: dict[str, Tensor] = {}
    for name, names in _populations(every, scope):
        parts = [_part(mask, names) for mask in masks]
        size = 0 if like is None else _part(like, names).kept
        found |= _derive(kind, parts, seed, name, size, weights, binomial)
    mask = Mask({name: found[name] for name in every})
    info = {key: every.info[key] for key in FACTS if key in every.info} | {"derived": kind}
    info |= {} if seed is None else {"seed": seed}
    info |= {"random_size": "binomial"} if binomial else {}
    return Mask(mask, info | {"overlap": kept(mask & every, scope)})


def _derive(
    kind: str, masks: Sequence[Mask], seed: int | None, name: str, size: int, weights: Mapping[str, Tensor] | None, binomial: bool
) -> Mask:
    one = masks[0]
    if kind in ("super", "intersection"):
        return intersection(masks)
    if kind == "union":
        return union(masks)
    if kind == "complement":
        return ~one
    if kind == "bad" and weights is not None:
        return largest(one, weights)
    bad_generator = seeded(0, "super-bad ticket", name)  # one draw for all seeds, which `super-random` repeats
    if kind == "super-bad":
        return super_bad(masks, bad_generator)
    if seed is None:
        raise ValueError(f"a ticket of the kind {kind} is drawn, and needs a seed")
    generator = seeded(seed, f"{kind} ticket", name)
    if kind == "super-random":
        return super_random(masks, super_bad(masks, bad_generator), generator)
    if kind == "bad":
        return bad_like(one, generator)
    if kind == "resize":
        return resize(one, size, [~one], generator)
    return binomial_like(one, generator) if binomial else random_like(one, generator)


def kept(mask: Mask, scope: Scope) -> dict[str, int]:
    """Count the kept units: of each tensor, or with scope `global` of all together, under the name `weights`."""
    return {name: _part(mask, names).kept for name, names in _populations(mask, scope)}


def _populations(mask: Mask, scope: Scope) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of the populations of units, and of the tensors of each, in an order that all masks agree on."""
    yield from ((name, [name]) for name in mask) if scope == "tensor" else [("weights", sorted(mask))]


def _part(mask: Mask, names: Iterable[str]) -> Mask:
    return Mask({name: mask[name] for name in names})


# ---- sizes ----


def draw(mask: Mask, count: int, generator: torch.Generator) -> Mask:
    """Draw `count` of the units that `mask` keeps, uniformly without replacement."""
    if count == mask.kept:
        return mask
    return prune(mask, random_scores(mask, generator), 1 - count / mask.kept)


def resize(mask: Mask, size: int, pools: Iterable[Mask], generator: torch.Generator) -> Mask:
    """Return a mask of `size` units: too many are dropped at random, too few drawn from the first pool that has enough others.

    Raises `ValueError` if none has.
    """
    missing = size - mask.kept
    if missing <= 0:
        return draw(mask, size, generator)
    for pool in pools:
        others = pool & ~mask
        if others.kept >= missing:
            return mask | draw(others, missing, generator)
    raise ValueError(f"no pool has {missing} units beside the {mask.kept} of the mask")


# ---- controls of one ticket ----


def random_like(mask: Mask, generator: torch.Generator) -> Mask:
    """Draw as many units as the mask keeps, uniformly."""
    return draw(Mask.ones(mask), mask.kept, generator)


def binomial_like(mask: Mask, generator: torch.Generator) -> Mask:
    """Draw each unit with the mask's density as its probability, as the released code does: the size holds in expectation."""
    return Mask({name: scores < mask.density for name, scores in random_scores(mask, generator).items()})


def bad_like(mask: Mask, generator: torch.Generator) -> Mask:
    """Return as many units as the mask keeps, of those that it prunes, if they are short with some that it keeps.

    It shares max(0, 2 g - n) units with a mask that keeps g of n.
    """
    return resize(~mask, mask.kept, [mask], generator)


def largest(mask: Mask, weights: Mapping[str, Tensor]) -> Mask:
    """Prune as many weights as the mask does, those of the largest magnitude first: the bad ticket of magnitude pruning."""
    scores = {name: -score for name, score in magnitude({name: weights[name] for name in mask}).items()}
    return prune(Mask.ones(mask), scores, mask.sparsity)


# ---- tickets of several seeds ----


def intersection(masks: Sequence[Mask]) -> Mask:
    """Return the units that all masks keep."""
    return functools.reduce(Mask.__and__, masks)


def union(masks: Sequence[Mask]) -> Mask:
    """Return the units that any of the masks keeps."""
    return functools.reduce(Mask.__or__, masks)


def super_bad(masks: Sequence[Mask], generator: torch.Generator) -> Mask:
    """Return the units that all masks prune, resized to as many as all keep.

    Too few are completed from units that are in neither, or if these are short from all others.
    """
    every, bad = intersection(masks), ~union(masks)
    return resize(bad, every.kept, [~every, ~bad], generator)


def super_random(masks: Sequence[Mask], bad: Mask, generator: torch.Generator) -> Mask:
    """Return the units that are neither kept by all masks nor in `bad` (`super_bad`), resized to as many as all keep.

    Too few are completed from all others.
    """
    every = intersection(masks)
    neither = ~(every | bad)
    return resize(neither, every.kept, [~neither], generator)
