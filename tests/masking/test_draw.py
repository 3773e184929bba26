"""Units drawn by their coefficients, with the published counts, and the rule that says when masks are stable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_tickets.masking.draw import draw, first_stable, stable
from bert_tickets.masking.mask import Mask

THIRD, BOTH = 1 / 3, {"heads", "neurons"}


def removed(values, fraction, rule, by_layer=(), rank="signed"):
    """How many of these coefficients go, in each layer."""
    mask = draw({"units": values}, {"units": fraction}, by_layer, rank, rule)["units"]
    return (~mask).sum(1).tolist()


@pytest.mark.parametrize(
    ("fraction", "count", "by_quantile", "by_count"),
    [
        (THIRD, 12, 4, 4),
        (0.333333, 16, 5, 5),
        (THIRD, 16, 6, 5),
        (0, 12, 1, 0),
        (0.4, 3072, 1229, 1229),
        (0.4, 36864, 14746, 14746),
    ],
)
def test_as_many_distinct_coefficients_go_as_published(fraction, count, by_quantile, by_count):
    """Coefficients near 1, as after a short search: in float32 they are 1.2e-7 apart at least."""
    values = 1 + torch.randperm(count, generator=torch.Generator().manual_seed(1)) * 2**-20
    assert removed(values[None], fraction, "quantile") == [by_quantile]
    assert removed(values[None], fraction, "count") == [by_count]


def test_of_equal_coefficients_the_earlier_go_or_all():
    ones = torch.ones(2, 12)
    kept = draw({"heads": ones}, {"heads": THIRD}, {"heads"}, "magnitude", "count")["heads"]
    assert kept.tolist() == [[False] * 4 + [True] * 8] * 2
    assert removed(ones, THIRD, "count") == [8, 0]  # over both layers
    assert removed(ones, THIRD, "quantile", {"units"}) == [12, 12]
    assert removed(ones, 0.0, "quantile") == [12, 12]
    assert removed(torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.9, 0.9]]), 0.5, "quantile") == [4]


def test_units_are_ranked_by_layer_or_together_by_value_or_magnitude():
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.9, 0.5, 0.6, -0.7]])

    def kept(by_layer, rank, rule="count"):
        return draw({"neurons": values}, {"neurons": 0.5}, by_layer, rank, rule)["neurons"].int().tolist()

    for rule in ("count", "quantile"):
        assert kept({"neurons"}, "magnitude", rule) == [[0, 0, 1, 1], [1, 0, 0, 1]]
        assert kept({"neurons"}, "signed", rule) == [[0, 0, 1, 1], [0, 1, 1, 0]]
        assert kept((), "magnitude", rule) == [[0, 0, 0, 0], [1, 1, 1, 1]]
        assert kept((), "signed", rule) == [[0, 0, 1, 1], [0, 1, 1, 0]]


@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 1.0, 1.5]), min_size=7, max_size=7), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from(["magnitude", "signed"]),
)
@settings(max_examples=50, deadline=None)
def test_counts_are_exact_with_any_ties_and_no_removed_unit_is_above_a_kept_one(rows, fraction, rank):
    values = torch.tensor(rows)
    mask = draw({"heads": values, "neurons": values}, {"heads": fraction, "neurons": fraction}, {"heads"}, rank, "count")
    scores = values.abs() if rank == "magnitude" else values
    assert (~mask["heads"]).sum(1).tolist() == [round(7 * fraction)] * len(rows)
    assert int((~mask["neurons"]).sum()) == round(7 * len(rows) * fraction)
    parts = [(scores, mask["neurons"]), *zip(scores, mask["heads"], strict=True)]
    for of, kept in parts:
        if kept.any() and not kept.all():
            assert of[~kept].max() <= of[kept].min()


# ---- stable masks ----


def masks(*rows):
    """Masks of two heads and twenty neurons, of which each number says how many of the first ones go."""
    return [Mask({"heads": torch.tensor([[True, head]]), "neurons": torch.arange(20)[None] >= gone}) for head, gone in rows]


def test_the_fifth_equal_mask_fires_and_alternating_ones_never_do():
    equal = masks(*[(True, 8)] * 6)
    assert first_stable(enumerate(equal[:4], 1)) == {"heads": None, "neurons": None, "all": None}
    assert first_stable(enumerate(equal, 1)) == {"heads": 5, "neurons": 5, "all": 5}
    alternating = masks(*[(True, 8), (True, 11)] * 20)
    assert first_stable(enumerate(alternating, 1)) == {"heads": 5, "neurons": None, "all": None}


def test_only_the_newest_is_compared_and_a_tenth_is_near_enough():
    """The others may be farther from each other. Steps are those that are given."""
    near = masks((True, 6), (True, 10), (True, 6), (True, 10), (True, 8))  # 2 of 20 from each
    assert stable(near) == {"heads": True, "neurons": True}
    assert stable(masks((True, 5), (True, 8), (True, 8), (True, 8), (True, 8))) == {"heads": True, "neurons": False}
    assert stable(near[:4]) == {"heads": False, "neurons": False}


def test_each_kind_fires_by_itself_and_all_when_both_are_stable_at_once():
    heads = [True] * 5 + [False, True] * 3 + [True] * 5  # stable at 5, and again from 15 on
    neurons = [4, 8, 12, 16] + [8] * 12
    found = first_stable((10 * at, one) for at, one in enumerate(masks(*zip(heads, neurons, strict=True)), 1))
    assert found == {"heads": 50, "neurons": 90, "all": 150}
