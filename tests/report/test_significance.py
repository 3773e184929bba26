"""The paired test, Holm's correction and the paper's two criteria, against numbers by hand and SciPy."""

import math
from statistics import stdev

import pandas as pd
import pytest
from scipy.stats import t as student

from bert_tickets.report.significance import holm, match_or_exceed, paired, verdict, within_one_sd


def seeds(*numbers):
    return dict(enumerate(numbers))


def test_the_interval_is_the_paired_t_interval():
    ours, theirs = [80.1, 81.9, 79.5, 82.2], [81.0, 82.5, 81.1, 82.0]
    found = paired(seeds(*ours), seeds(*theirs))
    error = stdev(a - b for a, b in zip(ours, theirs, strict=True)) / math.sqrt(4)
    half = student.ppf(0.975, 3) * error
    interval = (found["difference"], found["interval_low"], found["interval_high"])
    assert interval == pytest.approx((-0.725, -0.725 - half, -0.725 + half))
    assert found["p"] == pytest.approx(2 * student.sf(0.725 / error, 3))
    by_hand = paired(seeds(1, 2, 3), seeds(0, 0, 0))
    assert by_hand["interval_high"] == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


def test_only_common_seeds_pair():
    found = paired({1: 5.0, 2: 6.0, 3: 9.0}, {2: 4.0, 3: 8.0, 4: 0.0})
    assert (found["pairs"], found["unpaired"], found["difference"]) == (2, 2, 1.5)
    assert "difference" not in paired({1: 5.0}, {2: 5.0})


@pytest.mark.parametrize(
    ("ticket", "full"),
    [
        ([3.0, 4.0], [1.0, 2.0]),
        ([708 / 872 * 100, 719 / 872 * 100], [709 / 872 * 100, 720 / 872 * 100]),  # one example apart for both seeds
    ],
)
def test_without_spread_there_is_no_interval(ticket, full):
    found = paired(seeds(*ticket), seeds(*full))
    assert "difference" in found
    assert not {"interval_low", "p"} & found.keys()


def test_holm_by_hand():
    assert list(holm(pd.Series([0.01, 0.04, 0.03]))) == pytest.approx([0.03, 0.06, 0.06])
    assert list(holm(pd.Series([0.6, math.nan, 0.9]))) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "below"),
        ({"difference": 1.0}, "above"),
        ({"p_holm": 0.06}, "not significant"),
        ({"p_holm": math.nan}, "no interval"),
        ({"pairs": 0}, "no common seed"),
        ({"n": 0}, "undefined"),
        ({"reference": ""}, ""),
    ],
)
def test_verdicts_use_the_corrected_p_value(changes, words):
    cell = {"n": 2, "reference": "full BERT", "pairs": 2, "difference": -1.0, "p": 0.01, "p_holm": 0.04}
    assert verdict(cell | changes) == words


def test_matching_is_within_one_deviation_of_the_full_network():
    full = [80.0, 82.0]
    bound = 81 - stdev(full)
    assert within_one_sd([bound, bound], full)
    assert not within_one_sd([bound - 0.01, bound - 0.01], full)
    for ticket, other in (([9], [1, 2]), ([9, 9], [1]), ([], [1, 2])):
        assert within_one_sd(ticket, other) is None  # one seed decides nothing


def test_matching_or_exceeding_is_at_least_the_mean():
    assert match_or_exceed([81.0, 81.0], [80.0, 82.0])
    assert not match_or_exceed([80.9, 81.0], [80.0, 82.0])
    assert match_or_exceed([81.0], [80.0])
    assert match_or_exceed([], [80.0]) is None
