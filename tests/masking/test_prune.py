"""Pruning: torch.nn.utils.prune's rule to the bit, exact counts, and the schedules of the paper."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import BERT_BASE
from torch import nn
from torch.nn.utils import prune as torch_prune

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import _kth_smallest, magnitude, prune, random_scores
from bert_tickets.training.schedule import fractions

SHAPES = {"query": (30, 40), "bias": (40,), "output": (17, 23), "pooler": (50, 10), "scalar": (1,)}
LINEAR = [0.0, 1 / 10, 1 / 9, 1 / 8, 1 / 7, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2]


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@st.composite
def cases(draw) -> tuple[Mask, dict[str, torch.Tensor]]:
    """A mask of a few tensors and scores with many ties, among them zeros of both signs and infinities."""
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, float("inf"), float("-inf")])
    rows = draw(st.lists(st.lists(st.tuples(st.booleans(), values), min_size=1, max_size=12), min_size=1, max_size=4))
    mask = Mask({f"w{i}": torch.tensor([kept for kept, _ in row]) for i, row in enumerate(rows)})
    return mask, {f"w{i}": torch.tensor([score for _, score in row]) for i, row in enumerate(rows)}


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# ---- the rule ----


def test_nine_levels_equal_torchs_global_unstructured_bit_for_bit():
    modules = {name: nn.Module() for name in SHAPES}
    for name, tensor in weights(0).items():
        modules[name].register_parameter("weight", nn.Parameter(tensor))
    mask = Mask.ones(weights(0))
    for level, fraction in enumerate(fractions(10, 0.1, "linear")[1:]):
        trained = weights(level + 1)
        for name, module in modules.items():
            parameter = module.weight_orig if level else module.weight
            parameter.data.copy_(trained[name])
            for hook in module._forward_pre_hooks.values():
                hook(module, ())  # recompute module.weight, as a forward pass does
        torch_prune.global_unstructured(
            [(module, "weight") for module in modules.values()], torch_prune.L1Unstructured, amount=fraction
        )
        mask = prune(mask, magnitude(trained), fraction)
        for name, module in modules.items():
            assert torch.equal(mask[name], module.weight_mask.bool()), (level, name)
    assert 0 < mask.kept < mask.total


@settings(deadline=None)
@given(cases(), st.floats(0, 1), st.sampled_from(["global", "tensor"]))
def test_the_count_is_exact_and_what_was_removed_stays_removed(case, fraction, scope):
    mask, scores = case
    before = {name: tensor.clone() for name, tensor in mask.items()}
    smaller = prune(mask, scores, fraction, scope)
    parts = [mask] if scope == "global" else [Mask({name: tensor}) for name, tensor in mask.items()]
    for part in parts:
        kept = sum(int(smaller[name].sum()) for name in part)
        assert kept == part.kept - round(fraction * part.kept)
    assert not (flat(smaller) & ~flat(mask)).any()
    assert mask == Mask(before)


@settings(deadline=None)
@given(cases(), st.floats(0, 1))
def test_lower_scores_go_first_and_among_equal_ones_the_earlier_index(case, fraction):
    mask, scores = case
    order = sorted(np.flatnonzero(flat(mask)), key=lambda at: float(flat(scores)[at]))  # stable: ties by index
    expected = flat(mask).clone()
    expected[order[: round(fraction * mask.kept)]] = False
    assert torch.equal(flat(prune(mask, scores, fraction)), expected)


def test_of_equal_scores_the_first_go():
    mask = Mask.ones({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    pruned = prune(mask, {"a": torch.ones(2, 3), "b": torch.ones(4)}, 0.8)
    assert flat(pruned).tolist() == [False] * 8 + [True] * 2


def test_ties_are_broken_by_index_whatever_the_layout_in_memory():
    scores = {"a": torch.ones(4, 6).t()}
    plain = {"a": torch.ones(6, 4)}
    assert prune(Mask.ones(scores), scores, 0.5) == prune(Mask.ones(plain), plain, 0.5)


def test_each_tensor_loses_its_share_under_scope_tensor():
    scores = {"low": torch.arange(10.0), "high": 100 + torch.arange(20.0)}
    within, together = (prune(Mask.ones(scores), scores, 0.3, scope) for scope in ("tensor", "global"))
    assert [int(tensor.sum()) for tensor in within.values()] == [7, 14]
    assert within["high"].tolist() == [False] * 6 + [True] * 14
    assert [int(tensor.sum()) for tensor in together.values()] == [1, 20]


def test_a_score_counts_only_where_the_mask_keeps():
    mask = Mask({"w": torch.tensor([False, True, True, False])})
    scores = {"w": torch.tensor([float("nan"), 2.0, 1.0, 0.0])}
    assert prune(mask, scores, 0.5)["w"].tolist() == [False, True, False, False]


def test_scores_that_are_nan_are_a_users_error():
    scores = {"w": torch.tensor([1.0, float("nan"), 3.0])}
    with pytest.raises(UserError, match="NaN"):
        prune(Mask.ones(scores), scores, 0.5)


@pytest.mark.parametrize("scores", [{"w": torch.ones(2, 3)}, {"w": torch.ones(6)}, {"v": torch.ones(3, 2)}, {}])
def test_scores_that_do_not_fit_are_a_programmers_error(scores):
    with pytest.raises(ValueError, match=r"no scores of shape \(3, 2\) for w"):
        prune(Mask({"w": torch.ones(3, 2, dtype=torch.bool)}), scores, 0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_within_0_and_1(fraction):
    with pytest.raises(ValueError, match="fraction"):
        prune(Mask.ones(weights(0)), weights(0), fraction)


def test_magnitude_is_the_absolute_value_detached():
    scores = magnitude({"w": nn.Parameter(torch.tensor([-2.0, 0.0, 1.0]))})
    assert scores["w"].tolist() == [2.0, 0.0, 1.0]
    assert not scores["w"].requires_grad


def test_random_scores_are_fixed_by_their_generator():
    one, same, other = (random_scores(weights(0), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == SHAPES
    assert torch.equal(flat(one), flat(same))
    assert not torch.equal(flat(one), flat(other))
    assert 0 <= flat(one).min() < flat(one).max() < 1


def test_random_pruning_does_not_look_at_the_weights():
    scores = random_scores(weights(0), torch.Generator().manual_seed(0))
    mask = prune(Mask.ones(scores), scores, 0.5)
    sizes = flat(weights(0)).abs()
    assert float(sizes[flat(mask)].mean()) == pytest.approx(float(sizes.mean()), rel=0.1)


def test_a_tenth_of_bert_base_is_8_552_448_weights():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in BERT_BASE.items()}
    mask = Mask.ones(scores)
    began = time.monotonic()
    pruned = prune(mask, scores, 0.1)
    assert time.monotonic() - began < 20
    assert mask.total - pruned.kept == 8_552_448


# ---- the schedules ----


def test_ten_linear_levels_remove_tenths_of_the_original():
    assert fractions(10, 0.1, "linear") == LINEAR  # exactly: 0.1 / (1 - 0.1) in floats is not 1/9


@settings(deadline=None)
@given(st.integers(10, 400), st.integers(0, 2**32))
def test_nine_linear_levels_reach_the_published_sparsities(total, seed):
    """Exactly where the total is a multiple of ten, as BERT-base's is; else each level rounds, to two weights in all."""
    scores = random_scores({"a": torch.zeros(total - 7), "b": torch.zeros(7)}, torch.Generator().manual_seed(seed))
    mask = Mask.ones(scores)
    for level, fraction in enumerate(fractions(10, 0.1, "linear")):
        mask = prune(mask, scores, fraction)
        assert abs(total - mask.kept - total * level / 10) <= (2 if total % 10 else 0)


@settings(deadline=None)
@given(st.integers(1, 99))
def test_the_most_linear_levels_are_possible_and_one_more_is_not(percent):
    rate = percent / 100
    most = -(-100 // percent)  # the dense level, and as many as do not remove the last weight
    left = 1.0
    for fraction in fractions(most, rate, "linear"):
        left *= 1 - fraction
    assert left == pytest.approx(1 - (most - 1) * rate)
    assert left > 0
    with pytest.raises(UserError, match=rf"{most} levels at most"):
        fractions(most + 1, rate, "linear")


def test_geometric_levels_remove_the_rate_of_what_is_left():
    assert fractions(4, 0.1, "geometric") == [0.0, 0.1, 0.1, 0.1]
    assert len(fractions(50, 0.5, "geometric")) == 50  # it has no end


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_rate_outside_0_and_1_is_refused(rate, schedule):
    with pytest.raises(UserError, match="between 0 and 1"):
        fractions(2, rate, schedule)


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
def test_a_run_has_one_level_at_least(schedule):
    assert fractions(1, 0.9, schedule) == [0.0]
    with pytest.raises(UserError, match="one level"):
        fractions(0, 0.1, schedule)


@pytest.mark.parametrize("k", [1, 1000, 2_500_000, 4_999_999, 5_000_000])
@pytest.mark.parametrize("order", ["random", "misleading"])
def test_the_threshold_is_exact_also_where_the_sample_misleads(k, order):
    """Every fourth value, which is what the sample takes, is larger than all others: no bracket holds."""
    values = torch.rand(5_000_000, generator=torch.Generator().manual_seed(k))
    if order == "misleading":
        values[::4] += 1
    expected = values.sort().values[k - 1]
    assert _kth_smallest([values[:2_000_000], values[2_000_000:]], k) == expected
