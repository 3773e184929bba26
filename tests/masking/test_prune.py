"""Pruning: torch.nn.utils.prune's rule bit for bit, exact counts, and the schedules of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import kth_smallest, magnitude, prune, random_scores
from bert_tickets.training.schedule import fractions

SHAPES = {"query": (30, 40), "bias": (40,), "output": (17, 23), "pooler": (50, 10), "scalar": (1,)}
LINEAR = [0.0, 1 / 10, 1 / 9, 1 / 8, 1 / 7, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2]


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@st.composite
def cases(draw) -> tuple[Mask, dict[str, torch.Tensor]]:
    """Draw a mask of a few tensors, and scores with many ties, zeros of both signs and infinities."""
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
def test_the_count_is_exact_and_pruned_weights_stay_pruned(case, fraction, scope):
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
def test_lower_scores_are_pruned_first_and_of_equal_ones_the_earlier_index(case, fraction):
    mask, scores = case
    order = sorted(np.flatnonzero(flat(mask)), key=lambda at: float(flat(scores)[at]))  # stable: ties by index
    expected = flat(mask).clone()
    expected[order[: round(fraction * mask.kept)]] = False
    assert torch.equal(flat(prune(mask, scores, fraction)), expected)


def test_ties_are_broken_by_index_for_any_layout_in_memory():
    transposed, plain = {"a": torch.ones(4, 6).t()}, {"a": torch.ones(6, 4)}
    assert prune(Mask.ones(transposed), transposed, 0.5) == prune(Mask.ones(plain), plain, 0.5)


def test_scores_count_only_where_the_mask_keeps_and_must_not_be_nan_there():
    mask = Mask({"w": torch.tensor([False, True, True, False])})
    scores = {"w": torch.tensor([float("nan"), 2.0, 1.0, 0.0])}
    assert prune(mask, scores, 0.5)["w"].tolist() == [False, True, False, False]
    with pytest.raises(UserError, match="NaN"):
        prune(Mask.ones(scores), scores, 0.5)


def test_scores_of_another_shape_or_name_and_a_fraction_outside_0_and_1_raise():
    mask, scores = Mask.ones({"w": torch.ones(3, 2)}), {"w": torch.ones(3, 2)}
    for wrong, fraction in (({"w": torch.ones(6)}, 0.5), ({"v": torch.ones(3, 2)}, 0.5), (scores, 1.1), (scores, float("nan"))):
        with pytest.raises(ValueError, match=r"no scores of shape \(3, 2\) for w|fraction"):
            prune(mask, wrong, fraction)


@pytest.mark.parametrize("k", [1, 2_500_000, 5_000_000])
@pytest.mark.parametrize("order", ["random", "misleading"])
def test_the_threshold_is_exact_even_if_the_sample_misses_it(k, order):
    """Every fourth value, which is in the sample, is larger than all others: no bracket holds."""
    values = torch.rand(5_000_000, generator=torch.Generator().manual_seed(k))
    if order == "misleading":
        values[::4] += 1
    assert kth_smallest([values[:2_000_000], values[2_000_000:]], k) == values.kthvalue(k).values


# ---- the schedules ----


def test_linear_levels_prune_tenths_of_the_original_and_geometric_ones_of_what_remains():
    assert fractions(10, 0.1, "linear") == LINEAR  # exactly: 0.1 / (1 - 0.1) in floats is not 1/9
    assert fractions(4, 0.1, "geometric") == [0.0, 0.1, 0.1, 0.1]


@settings(deadline=None)
@given(st.integers(10, 400), st.integers(0, 2**32))
def test_nine_linear_levels_reach_the_published_sparsities(total, seed):
    """Exactly if the total is a multiple of ten, as BERT-base's; otherwise each level rounds, to two weights in all."""
    scores = random_scores({"a": torch.zeros(total - 7), "b": torch.zeros(7)}, torch.Generator().manual_seed(seed))
    mask = Mask.ones(scores)
    for level, fraction in enumerate(fractions(10, 0.1, "linear")):
        mask = prune(mask, scores, fraction)
        assert abs(total - mask.kept - total * level / 10) <= (2 if total % 10 else 0)


@pytest.mark.parametrize("percent", [1, 30, 33, 50, 99])
def test_linear_levels_end_before_the_last_weight(percent):
    rate = percent / 100
    most = -(-100 // percent)
    left = 1.0
    for fraction in fractions(most, rate, "linear"):
        left *= 1 - fraction
    assert left == pytest.approx(1 - (most - 1) * rate)
    assert left > 0
    with pytest.raises(UserError, match=rf"allows {most} levels"):
        fractions(most + 1, rate, "linear")
