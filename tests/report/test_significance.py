"""The paper's two criteria, the paired test and Holm's correction, against numbers by hand and SciPy."""

import math
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from bert_tickets.report.matching import Highest, highest, match_or_exceed, within_one_sd
from bert_tickets.report.significance import Difference, Summary, holm, paired, summarize, verdict

values = st.dictionaries(st.integers(0, 9), st.floats(0, 100, allow_nan=False), min_size=1, max_size=6)


def seeds(*numbers: float) -> Summary:
    return summarize(dict(enumerate(numbers)))


def test_a_summary_has_the_mean_and_the_sample_deviation():
    summary = summarize({1: 0.5, 2: 0.7, 3: None}, 100)
    assert (summary.mean, summary.n, summary.undefined) == (pytest.approx(60), 2, (3,))
    assert summary.sd == pytest.approx(math.sqrt(200))  # n - 1
    assert (seeds(1).sd, seeds().mean, seeds().sd) == (None, None, None)
    assert seeds(0.5, 0.5).constant
    assert not seeds(0.5, 0.5 + 1e-12).constant


def test_the_interval_is_the_paired_t_interval():
    ours, theirs = [80.1, 81.9, 79.5, 82.2], [81.0, 82.5, 81.1, 82.0]
    found = paired(seeds(*ours), seeds(*theirs))
    error = stdev(a - b for a, b in zip(ours, theirs, strict=True)) / math.sqrt(4)
    half = student.ppf(0.975, 3) * error
    assert (found.mean, found.low, found.high) == pytest.approx((-0.725, -0.725 - half, -0.725 + half))
    assert found.p == pytest.approx(2 * student.sf(0.725 / error, 3))
    by_hand = paired(seeds(1, 2, 3), seeds(0, 0, 0))
    assert (by_hand.low, by_hand.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)


def test_only_common_seeds_pair():
    found = paired(summarize({1: 5.0, 2: 6.0, 3: 9.0}), summarize({2: 4.0, 3: 8.0, 4: 0.0, 5: None}))
    assert (found.seeds, found.unpaired, found.mean) == ((2, 3), (1, 4), 1.5)
    assert paired(summarize({1: 5.0}), summarize({2: 5.0})) is None


@pytest.mark.parametrize(
    ("ticket", "full"),
    [
        ([3.0], [1.0, 2.0]),
        ([3.0, 4.0], [1.0, 2.0]),
        ([708 / 872 * 100, 719 / 872 * 100], [709 / 872 * 100, 720 / 872 * 100]),  # one example apart for both seeds
    ],
)
def test_without_spread_there_is_no_interval(ticket, full):
    found = paired(seeds(*ticket), seeds(*full))
    assert (found.low, found.high, found.p) == (None, None, None)
    assert verdict(found) == "no interval"


@given(values, values)
def test_swapping_the_sides_changes_the_sign(one, other):
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
        assert (there.p < 0.05) == (there.low > 0 or there.high < 0)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_corrects_upwards_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [corrected[i] for i in order] == sorted(corrected)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (None, "no common seed"),
        (Difference(-1, (1, 2), p=0.01, p_holm=0.04), "below"),
        (Difference(1, (1, 2), p=0.01, p_holm=0.04), "above"),
        (Difference(-1, (1, 2), p=0.01, p_holm=0.06), "not significant"),
    ],
)
def test_verdicts_use_the_corrected_p_value(difference, words):
    assert verdict(difference) == words


def test_matching_is_within_one_deviation_of_the_full_network():
    full = seeds(80.0, 82.0)
    bound = 81 - stdev([80, 82])
    assert within_one_sd(seeds(bound, bound), full)
    assert not within_one_sd(seeds(bound - 0.01, bound - 0.01), full)
    for ticket, other in ((seeds(9), seeds(1, 2)), (seeds(9, 9), seeds(1)), (seeds(), seeds(1, 2))):
        assert within_one_sd(ticket, other) is None  # one seed decides nothing


def test_matching_or_exceeding_is_at_least_the_mean():
    full = seeds(80.0, 82.0)
    assert match_or_exceed(seeds(81.0, 81.0), full)
    assert not match_or_exceed(seeds(80.9, 81.0), full)
    assert match_or_exceed(seeds(81.0), seeds(80.0))


def test_an_undefined_value_does_not_match():
    ticket = summarize({1: 99.0, 2: 99.0, 3: None})
    assert within_one_sd(ticket, seeds(1, 2)) is False
    assert match_or_exceed(ticket, seeds(1, 2)) is False


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ({0.1: True, 0.2: True, 0.3: False}, Highest(0.2)),
        ({0.1: True, 0.2: False, 0.3: True, 0.4: False}, Highest(0.3, misses=(0.2,))),
        ({0.1: True, 0.2: True}, Highest(0.2, last=True)),
        ({0.1: None, 0.2: True, 0.3: None}, Highest(0.2, undecided=(0.1, 0.3))),
        ({}, Highest(None)),
    ],
)
def test_the_highest_sparsity(criterion, expected):
    assert highest(criterion) == expected
