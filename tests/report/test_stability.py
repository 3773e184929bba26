"""The agreement of masks over seeds and tasks: kappa, alpha and Q, common units, and where they are undefined."""

import math
from csv import DictReader
from io import StringIO

import numpy as np
import pytest
import rundirs
import tables

from bert_tickets.errors import UserError
from bert_tickets.report import stability
from bert_tickets.report.formats import csv
from bert_tickets.report.results import comparable, read_results
from bert_tickets.report.stability import agreement
from bert_tickets.report.tables import build

MASKS = {  # task -> seed -> heads, MLPs
    "qnli": {1: ("1111 1100", "11"), 2: ("1101 1110", "10"), 3: ("1100 1000", "11")},
    "mnli": {2: ("1100 1100", "11"), 3: ("1101 1000", "01"), 4: ("0111 0000", "01")},
}


def write(place, masks=MASKS, **given) -> None:
    for task, by_seed in masks.items():
        for seed, units in by_seed.items():
            rundirs.search(place, task, seed, rundirs.units(*units), [0.8, 0.7], **given)


def made(place):
    return build("stability", comparable(read_results([place])[0]))


def grid(table, heading: str) -> list[dict[str, str]]:
    return next(found for name, found in table.grids.items() if name.startswith(heading)).to_dict("records")


def raters(*kept: int, of: int = 5) -> np.ndarray:
    """Masks of this many seeds, whose units are kept by `kept` of them."""
    return np.array([[int(seed < count) for count in kept] for seed in range(of)])


# ---- statistics ----


def test_kappa_is_1_for_equal_masks_and_as_by_hand_for_others():
    """3, 2, 3, 2 of 5 seeds: half of the units are kept, and of the pairs of seeds .4 agree on a unit: (.4 - .5) / (1 - .5)."""
    assert agreement(raters(5, 0, 5, 0))["kappa"] == pytest.approx(1)
    assert agreement(raters(3, 2, 3, 2))["kappa"] == pytest.approx(-0.2)


def test_alpha_and_q_are_as_by_hand():
    """Two seeds that differ on one of three units: six values, four of them 1. Alpha = 1 - 5 * 2 / (2 * 4 * 2).

    Q over three seeds that keep 2, 1 and 0 of two units: 2 * (3 * 5 - 9) / (3 * 3 - 5) = 3 with two degrees of freedom.
    """
    found = agreement(np.array([[1, 1, 0], [1, 1, 0], [1, 1, 0]]))
    assert (found["kappa"], found["alpha"], math.isnan(found["Q"])) == (pytest.approx(1), pytest.approx(1), True)
    assert agreement(np.array([[1, 1, 0], [1, 0, 0]]))["alpha"] == pytest.approx(1 - 5 * 2 / (2 * 3 * 3))
    found = agreement(np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1]]))  # the last unit tells nothing
    assert (found["Q"], found["p"]) == (pytest.approx(3), pytest.approx(math.exp(-1.5)))


@pytest.mark.parametrize("matrix", [raters(1, 0, of=1), raters(5, 5, 5), raters(0, 0)])
def test_one_seed_and_equal_units_have_no_agreement(matrix):
    assert all(math.isnan(value) for value in agreement(matrix).values())


# ---- the table ----


def test_agreement_over_seeds_stands_beside_the_published_one(tmp_path):
    write(tmp_path)
    table = made(tmp_path)
    mnli, qnli = grid(table, "heads over seeds")
    assert (qnli["task"], qnli["seeds"], qnli["kept"], qnli["common"]) == ("QNLI", "3", "5.0 ± 1.7 of 8", "3")
    assert (qnli["published kappa"], qnli["published p"]) == ("0.302 [masks]", "0.033 [masks]")
    kept = np.array([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]])
    assert qnli["kappa"] == f"{agreement(kept)['kappa']:.3f}"
    assert (qnli["Q"], qnli["p"]) == (f"{agreement(kept)['Q']:.2f}", f"{agreement(kept)['p']:.2g}")
    assert mnli["common"] == "1"
    mlps = {line["task"]: line for line in grid(table, "MLPs over seeds")}
    assert (mlps["QNLI"]["kept"], mlps["QNLI"]["published p"]) == ("1.7 ± 0.6 of 2", "")
    lines = DictReader(StringIO(csv([table])))
    (line,) = [line for line in lines if (line["task"], line["metric"]) == ("qnli", "kappa of heads")]
    assert (line["unit"], float(line["mean"])) == ("statistic", pytest.approx(agreement(kept)["kappa"]))
    sparsities = [rundirs.units(*units).sparsity for units in MASKS["qnli"].values()]
    assert float(line["sparsity"]) == pytest.approx(np.mean(sparsities), abs=5e-4)


def test_pairs_of_tasks_have_the_masks_of_their_common_seeds(tmp_path):
    """Seeds 2 and 3. Kept by all four: heads 0 and 1 of layer 0, head 0 of layer 1; no MLP."""
    write(tmp_path)
    common = {line["task"]: line for line in grid(made(tmp_path), "importance ticket: common heads/MLPs")}
    assert common["QNLI"] == {"task": "QNLI", "MNLI": "3/0", "QNLI": "3/1"}
    assert (common["MNLI"]["QNLI"], common["MNLI"]["MNLI"]) == ("3/0", "1/1")
    kappa = {line["task"]: line for line in grid(made(tmp_path), "importance ticket: kappa of MLPs")}
    assert kappa["QNLI"]["MNLI"] == f"{agreement(np.array([[1, 0], [1, 1], [1, 1], [0, 1]]))['kappa']:.3f}"


def test_units_are_counted_by_the_tasks_that_keep_them(tmp_path):
    """Sums of both tasks' shares of seeds, in thirds: heads 5 6 2 4, 5 3 1 0; MLPs 5 5."""
    write(tmp_path)
    assert grid(made(tmp_path), "importance ticket: units by the number") == [
        {"kept by": "more than 1 of 2 tasks", "heads": "4", "MLPs": "2"},
        {"kept by": "more than 0 of 2 tasks", "heads": "7", "MLPs": "2"},
    ]


def test_degenerate_masks_say_why_they_have_no_agreement(tmp_path):
    write(tmp_path, {"mnli": {1: ("1111 1111", "10")}, "rte": {1: ("1111 1111", "10"), 2: ("1111 1111", "10")}})
    table = made(tmp_path)
    assert [line["kappa"] for line in grid(table, "heads")] == ["needs two seeds", "all kept"]
    mlps = grid(table, "MLPs")
    assert [line["alpha"] for line in mlps] == ["needs two seeds", "1.000"]
    assert mlps[1]["Q"] == mlps[1]["p"] == "no seed differs"


def test_searches_of_other_units_and_of_weights_are_not_mixed(tmp_path):
    write(tmp_path)
    write(tmp_path, {"mnli": {2: ("1111 0000",), 3: ("0000 1111",)}}, units="heads")
    write(tmp_path, {"mnli": {2: ("1111 0000", "10")}}, method="guarded_magnitude")
    lines = [line for line in grid(made(tmp_path), "heads over seeds") if line["task"] == "MNLI"]
    assert [(line["ticket"], line["seeds"], line["common"]) for line in lines] == [
        ("importance ticket", "3", "1"),
        ("importance (units heads) ticket", "2", "0"),
    ]


def test_without_the_extra_the_table_is_refused_and_left_out_of_all(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    monkeypatch.setattr(stability, "PACKAGES", ("statsmodels", "no_such_package"))
    said = "table stability needs no_such_package: pip install -e '.[stability]'"
    with pytest.raises(UserError) as error:
        made(tmp_path)
    assert str(error.value) == said
    with pytest.raises(SystemExit):
        tables.parse([str(tmp_path), "--table", "stability"])
    assert said in capsys.readouterr().err
    tables.main(tables.parse([str(tmp_path)]))
    out = capsys.readouterr().out
    assert "## Heads and MLPs" in out
    assert "## Stability" not in out
