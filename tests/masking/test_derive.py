"""Derived masks: exact sizes and overlaps, draws that are uniform, apart from each other and the same again."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_tickets.errors import UserError
from bert_tickets.masking.derive import derive, draw, kept, resize
from bert_tickets.masking.mask import Mask
from bert_tickets.seeds import seeded

SHAPES = {"heads": (3, 4), "mlps": (3,)}
DRAWN_OF_ONE, SUPER = ("random", "bad", "resize"), ("super", "super-bad", "super-random")


def bits(**rows: str) -> Mask:
    """Make a mask of one tensor per row: "110" keeps the first two units."""
    return Mask({name: torch.tensor([c == "1" for c in row]) for name, row in rows.items()})


def units(seed: int, density: float = 0.5) -> Mask:
    """Draw a mask of heads and MLPs."""
    generator = torch.Generator().manual_seed(seed)
    return Mask({name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()})


@st.composite
def masks(draw, least: int = 1, most: int = 1) -> list[Mask]:
    """Draw masks of heads and MLPs of any sizes, whose tensors are in any order."""
    rows = {}
    for name, shape in SHAPES.items():
        count = math.prod(shape)
        rows[name] = (
            st.lists(st.booleans(), min_size=count, max_size=count).map(torch.tensor).map(lambda row, to=shape: row.view(to))
        )
    one = st.fixed_dictionaries(rows).map(Mask)
    return draw(st.lists(one, min_size=least, max_size=most))


def populations(mask: Mask, scope: str) -> list[Mask]:
    """A mask for each population of units."""
    return [mask] if scope == "global" else [Mask({name: mask[name]}) for name in SHAPES]


SCOPES = st.sampled_from(["tensor", "global"])


# ---- one mask ----


@settings(deadline=None, max_examples=40)
@given(masks(), st.integers(0, 2**32 - 1), SCOPES)
def test_random_and_bad_have_the_size_and_bad_the_least_overlap(given_masks, seed, scope):
    (good,) = given_masks
    made = {kind: derive(kind, [good], seed, scope) for kind in ("random", "bad")}
    assert kept(made["random"], scope) == kept(made["bad"], scope) == kept(good, scope)
    for one, bad in zip(populations(good, scope), populations(made["bad"], scope), strict=True):
        assert (one & bad).kept == max(0, 2 * one.kept - one.total)


@settings(deadline=None, max_examples=40)
@given(masks(2, 2), st.integers(0, 2**32 - 1), SCOPES)
def test_resize_keeps_or_adds_as_many_as_are_needed(two, seed, scope):
    mask, like = two
    found = derive("resize", [mask], seed, scope, like=like)
    assert kept(found, scope) == kept(like, scope)
    for one, resized in zip(populations(mask, scope), populations(found, scope), strict=True):
        assert (one & resized).kept == min(one.kept, resized.kept)


def test_all_choices_are_drawn_equally_often():
    good, count = bits(w="11010"), 500
    for kind, choices in (("random", itertools.combinations(range(5), 3)), ("bad", [(0, 2, 4), (1, 2, 4), (2, 3, 4)])):
        found = [tuple(derive(kind, [good], seed)["w"].nonzero().flatten().tolist()) for seed in range(count)]
        expected = count / len(choices := list(choices))
        assert {*found} == {*choices}
        assert all(abs(found.count(choice) - expected) < 5 * expected**0.5 for choice in choices)


def test_a_binomial_size_holds_in_expectation_only():
    good = bits(w="1101011001")
    made = [derive("random", [good], seed, binomial=True) for seed in range(1000)]
    sizes = torch.tensor([float(mask.kept) for mask in made])
    assert abs(sizes.mean() - 6) < 5 * (2.4 / 1000) ** 0.5
    assert abs(sizes.var() - 2.4) < 0.6  # n p (1 - p)
    assert made[0].info["random_size"] == "binomial"
    assert "random_size" not in derive("random", [good], 1).info


@settings(deadline=None, max_examples=40)
@given(masks(), st.integers(0, 99))
def test_a_bad_ticket_of_weights_prunes_the_largest_magnitudes_of_all_tensors(given_masks, seed):
    (good,) = given_masks
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in good.items()} | {"other": torch.ones(1)}
    bad = derive("bad", [good], None, "global", weights=weights)
    assert bad.kept == good.kept
    left, pruned = ([weights[n][k].abs() for n, k in mask.items()] for mask in (bad, ~bad))
    if 0 < bad.kept < bad.total:
        assert torch.cat(left).max() < torch.cat(pruned).min()
    assert "seed" not in bad.info


def test_complement_by_hand():
    assert derive("complement", [bits(w="1101")]) == bits(w="0010")


def test_a_draw_is_of_the_units_that_are_kept_and_a_pool_is_whole_or_not_used():
    generator, none = torch.Generator(), bits(w="000000")
    assert (draw(bits(w="110110"), 3, generator) & ~bits(w="110110")).kept == 0
    for _ in range(9):  # the first pool is short: all of the second may be drawn, not the rest only
        assert resize(none, 2, [bits(w="110000"), ~none], generator) == bits(w="110000")
    found = [resize(none, 3, [bits(w="110000"), bits(w="111110"), ~none], generator)["w"].tolist() for _ in range(50)]
    assert any(not row[0] for row in found)
    assert not any(row[5] for row in found)
    with pytest.raises(ValueError, match="no pool has 2 units beside the 1"):
        resize(bits(w="100000"), 3, [bits(w="110000")], generator)


# ---- several masks ----


@settings(deadline=None, max_examples=40)
@given(masks(2, 4), st.integers(0, 2**32 - 1), SCOPES)
def test_super_tickets_have_one_size_and_are_what_all_keep_and_prune(several, seed, scope):
    best, bad = (derive(kind, several, None, scope) for kind in ("super", "super-bad"))
    middle = derive("super-random", several, seed, scope)
    assert all((best & ~mask).kept == 0 for mask in several)
    assert kept(best, scope) == kept(bad, scope) == kept(middle, scope)
    for ours, theirs, third, *each in zip(*(populations(mask, scope) for mask in (best, bad, middle, *several)), strict=True):
        pruned_by_all = Mask({name: torch.stack([~mask[name] for mask in each]).all(0) for name in ours})
        assert (theirs & pruned_by_all).kept == min(theirs.kept, pruned_by_all.kept)
        if 2 * ours.kept <= ours.total:  # enough units are not in it
            assert (ours & theirs).kept == 0
        if 3 * ours.kept <= ours.total:
            assert ((ours | theirs) & third).kept == 0


@settings(deadline=None, max_examples=40)
@given(masks(2, 4), st.randoms(), st.sampled_from([*SUPER, "union", "intersection"]), SCOPES)
def test_the_order_of_the_masks_does_not_matter(several, random, kind, scope):
    seed = 7 if kind == "super-random" else None
    shuffled = random.sample(several, len(several))
    one, other = (derive(kind, order, seed, scope) for order in (several, shuffled))
    assert (one, one.info) == (other, other.info)
    assert list(other) == list(shuffled[0])


def test_super_random_is_drawn_for_each_seed_beside_the_one_super_bad():
    several = [bits(w="11000000000000000110"), bits(w="11000000000000011000")]
    bad = derive("super-bad", several)
    made = [derive("super-random", several, seed) for seed in range(20)]
    assert len({mask.sha256() for mask in made}) > 10
    assert all((mask & bad).kept == 0 for mask in made)


def test_union_and_intersection_by_hand():
    several = [bits(w="1100"), bits(w="1010"), bits(w="1000")]
    assert (derive("union", several), derive("intersection", several)) == (bits(w="1110"), bits(w="1000"))


# ---- streams, metadata, errors ----


@pytest.mark.parametrize("kind", DRAWN_OF_ONE)
def test_a_draw_depends_on_the_seed_and_on_its_own_kind_of_units_alone(kind):
    good, smaller = units(1), units(1) & Mask({"heads": torch.ones(3, 4).bool(), "mlps": torch.zeros(3).bool()})
    like = units(2, 0.7)
    made, again, other = (derive(kind, [mask], 5, like=like) for mask in (good, good, smaller))
    assert made == again
    assert list(made) == list(good)
    assert torch.equal(made["heads"], other["heads"])
    assert len({derive(kind, [good], seed, like=like).sha256() for seed in range(9)}) > 1


def test_kinds_of_units_have_streams_of_their_own():
    good = bits(heads="111100000000", mlps="111100000000")
    assert sum(not torch.equal(*derive("random", [good], seed).values()) for seed in range(9)) >= 8


def test_the_streams_are_named():
    """The bits of a ticket are fixed by these names."""
    good = units(1)
    expected = draw(Mask.ones({"heads": good["heads"]}), int(good["heads"].sum()), seeded(3, "random ticket", "heads"))
    assert torch.equal(derive("random", [good], 3)["heads"], expected["heads"])


def test_the_info_is_what_the_inputs_agree_on_the_draw_and_the_overlap():
    facts = {
        "base_model": "bert",
        "task": "rte",
        "method": "importance",
        "units": "heads+mlps",
        "heads": 4,
        "run": "r",
        "level": 1,
    }
    one, other = Mask(units(1), {**facts, "seed": 42}), Mask(units(2), {**facts, "seed": 86, "task": "mrpc"})
    shared = facts.keys() - {"run", "level"}
    bad = derive("bad", [one], 9)
    overlap = {name: int((bad[name] & one[name]).sum()) for name in SHAPES}
    assert bad.info == {key: facts[key] for key in shared} | {"derived": "bad", "seed": 9, "overlap": overlap}
    overlap = {name: int((one[name] & other[name]).sum()) for name in SHAPES}
    expected = {key: facts[key] for key in shared - {"task"}} | {"derived": "super", "overlap": overlap}
    assert derive("super", [one, other]).info == expected


def test_masks_of_other_tensors_and_a_draw_without_a_seed_raise():
    with pytest.raises(UserError, match="w is 3 in the other mask and 4 in the mask"):
        derive("union", [bits(w="1100"), bits(w="110")])
    with pytest.raises(ValueError, match="random is drawn, and needs a seed"):
        derive("random", [bits(w="1100")])
