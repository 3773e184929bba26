"""The paper's criteria, and the test beside them, against hand numbers and SciPy's own."""

import math
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from bert_tickets.report.significance import (
    Difference,
    Highest,
    Summary,
    highest,
    holm,
    matches,
    matches_or_exceeds,
    paired,
    summarize,
    verdict,
)

values = st.dictionaries(st.integers(0, 9), st.floats(0, 100, allow_nan=False), min_size=1, max_size=6)


def seeds(*numbers: float) -> Summary:
    return summarize(dict(enumerate(numbers)))


def test_a_summary_is_in_the_units_asked_for():
    summary = summarize({1: 0.5, 2: 0.7, 3: None}, 100)
    assert (summary.mean, summary.n, summary.undefined) == (pytest.approx(60), 2, (3,))
    assert summary.sd == pytest.approx(math.sqrt(200))  # n - 1


def test_one_seed_has_no_deviation_and_none_no_mean():
    assert (seeds(1).sd, seeds().mean, seeds().sd) == (None, None, None)


def test_equal_values_are_seen_as_such():
    assert seeds(0.5, 0.5).constant
    assert not seeds(0.5, 0.5 + 1e-12).constant
    assert not seeds(0.5).constant


@given(values)
def test_a_summary_does_not_depend_on_the_order(found):
    backwards = summarize(dict(reversed(found.items())))
    assert summarize(found) == backwards
    assert (summarize(found).mean, summarize(found).sd) == (backwards.mean, backwards.sd)


def test_the_difference_is_scipys_paired_test():
    ticket, full = seeds(80.1, 81.9, 79.5, 82.2), seeds(81.0, 82.5, 81.1, 82.0)
    found = paired(ticket, full)
    theirs = ttest_rel(list(ticket.values.values()), list(full.values.values()))
    interval = theirs.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, theirs.pvalue))
    assert found.mean == pytest.approx(-0.725)


def test_the_difference_by_hand():
    found = paired(seeds(1, 2, 3), seeds(0, 0, 0))
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)


def test_two_seeds_have_a_huge_interval():
    found = paired(seeds(1, 2), seeds(0, 0))
    assert found.high - found.low == pytest.approx(2 * 12.7062 * 0.5, abs=1e-4)


def test_only_common_seeds_pair():
    found = paired(summarize({1: 5.0, 2: 6.0, 3: 9.0}), summarize({2: 4.0, 3: 8.0, 4: 0.0, 5: None}))
    assert (found.seeds, found.alone, found.mean) == ((2, 3), (1, 4), 1.5)
    assert paired(summarize({1: 5.0}), summarize({2: 5.0})) is None


@pytest.mark.parametrize(("ticket", "words"), [((3.0,), "one seed: no interval"), ((3.0, 4.0), "the same difference in every")])
def test_what_has_no_spread_has_no_interval(ticket, words):
    found = paired(seeds(*ticket), seeds(1.0, 2.0))
    assert (found.low, found.high, found.p) == (None, None, None)
    assert verdict(found, None).startswith(words)


def test_rounding_makes_no_spread():
    """Two accuracies of 872 examples each, one example apart for both seeds."""
    found = paired(seeds(708 / 872 * 100, 719 / 872 * 100), seeds(709 / 872 * 100, 720 / 872 * 100))
    assert found.p is None


@given(values, values)
def test_a_difference_turns_its_sign_with_its_sides(one, other):
    there, back = paired(summarize(one), summarize(other)), paired(summarize(other), summarize(one))
    if there is None:
        assert back is None
        return
    assert there.mean == pytest.approx(-back.mean, abs=1e-9)
    assert (there.low is None) == (back.low is None)
    if there.low is not None:
        assert there.low == pytest.approx(-back.high)
        assert there.p == pytest.approx(back.p)
        assert there.low <= there.mean <= there.high


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_corrects_upwards_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    if p_values:
        assert min(corrected) == min(1, len(p_values) * min(p_values))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [corrected[i] for i in order] == sorted(corrected)


def test_matching_is_within_one_deviation_of_the_full_network():
    full = seeds(80.0, 82.0)
    bound = 81 - stdev([80, 82])
    assert matches(seeds(bound, bound), full)
    assert not matches(seeds(bound - 0.01, bound - 0.01), full)
    assert matches(seeds(99, 99), full)


def test_matching_or_exceeding_is_at_least_the_mean():
    full = seeds(80.0, 82.0)
    assert matches_or_exceeds(seeds(81.0, 81.0), full)
    assert not matches_or_exceeds(seeds(80.9, 81.0), full)
    assert matches_or_exceeds(seeds(81.0), seeds(80.0))


@pytest.mark.parametrize(("ticket", "full"), [(seeds(9), seeds(1, 2)), (seeds(9, 9), seeds(1)), (seeds(), seeds(1, 2))])
def test_one_seed_decides_nothing(ticket, full):
    assert matches(ticket, full) is None


def test_an_undefined_value_does_not_match():
    ticket = summarize({1: 99.0, 2: 99.0, 3: None})
    assert matches(ticket, seeds(1, 2)) is False
    assert matches_or_exceeds(ticket, seeds(1, 2)) is False


@given(values, values)
def test_who_matches_or_exceeds_also_matches(ticket, full):
    one, other = summarize(ticket), summarize(full)
    if matches_or_exceeds(one, other):
        assert matches(one, other) is not False


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ({0.1: True, 0.2: True, 0.3: False}, Highest(0.2, (), (), False)),
        ({0.1: True, 0.2: False, 0.3: True, 0.4: False}, Highest(0.3, (0.2,), (), False)),
        ({0.1: True, 0.2: True}, Highest(0.2, (), (), True)),
        ({0.1: False}, Highest(None, (), (), False)),
        ({0.1: None, 0.2: True, 0.3: None}, Highest(0.2, (), (0.1, 0.3), False)),
        ({}, Highest(None, (), (), False)),
    ],
)
def test_the_highest_sparsity(criterion, expected):
    assert highest(criterion) == expected


@pytest.mark.parametrize(
    ("difference", "corrected", "words"),
    [
        (None, None, "no common seed"),
        (Difference(-1, (1, 2), -2, -0.5, 0.01), 0.04, "below"),
        (Difference(1, (1, 2), 0.5, 2, 0.01), 0.04, "above"),
        (Difference(-1, (1, 2), -2, -0.5, 0.01), 0.06, "not told apart (below if tested alone)"),
        (Difference(1, (1, 2), -1, 3, 0.2), 0.2, "not told apart"),
        (Difference(0.0, (1, 2)), None, "no difference in any seed"),
    ],
)
def test_verdicts_in_words(difference, corrected, words):
    assert verdict(difference, corrected) == words


def test_an_interval_excludes_zero_where_its_own_test_tells_apart():
    for shift in (0.1, 0.5, 1.0, 2.0, 4.0):
        found = paired(seeds(1 + shift, 2 + shift, 4 + shift), seeds(1.3, 1.9, 3.8))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert mean([found.low, found.high]) == pytest.approx(found.mean)
