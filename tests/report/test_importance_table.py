"""Guarded searches and tickets derived from theirs: names of rows, the table's comparisons, sizes and overlaps."""

from pathlib import Path

import pytest
import rundirs

from bert_tickets.errors import UserError
from bert_tickets.report import published
from bert_tickets.report.formats import csv
from bert_tickets.report.importance import published_row, search_and_kind
from bert_tickets.report.results import comparable, own_tickets, read_results
from bert_tickets.report.rows import FULL
from bert_tickets.report.tables import TABLES
from bert_tickets.report.tables import build as build_table

GOOD = {1: ("1111 1100", "11"), 2: ("1101 1110", "10"), 3: ("1100 1000", "11")}  # heads, MLPs
BAD = ("0011 0011", "01")


def made(name: str, place: Path):
    levels, failures = read_results([place])
    return build_table(name, comparable(levels), None, failures)


def grid(table, heading: str) -> list[dict[str, str]]:
    return next(found for name, found in table.grids.items() if name.startswith(heading)).to_dict("records")


def by_row(table, heading: str, column: str, task: str = "MNLI") -> dict[str, str]:
    return {line["row"]: line[column] for line in grid(table, heading) if line.get("task", task) == task}


def rows(place: Path, task: str = "mnli") -> set[str]:
    levels = comparable(read_results([place])[0])
    return set(levels.loc[levels["task"] == task, "row"])


@pytest.fixture
def whole(tmp_path) -> Path:
    """s on two tasks, and on WNLI, with three seeds: good, random and bad tickets, and on MNLI a super one."""
    masks = {seed: rundirs.units(*units) for seed, units in GOOD.items()}
    for i, task in enumerate(("mnli", "rte", "wnli")):
        for seed, mask in masks.items():
            found = rundirs.search(tmp_path, task, seed, mask, [0.84 + seed / 100, 0.76 + seed / 100 - i / 10])
            rundirs.given(tmp_path, task, seed, rundirs.mask_of(found, 1), 0.80 + seed / 100)
            for kind, value in (("random", 0.6), ("bad", 0.5)):
                info = {"overlap": {"heads": 2 * seed, "mlps": 1}} if kind == "bad" else {}
                file = rundirs.derived(tmp_path / f"{task}_{kind}_{seed}", rundirs.units(*BAD), kind, task, seed=seed, **info)
                pruned = value + seed * seed / 100 * (kind == "bad")
                rundirs.given(tmp_path, task, seed, file, pruned, "score")
                rundirs.given(tmp_path, task, seed, file, value + 0.1 + seed * seed / 200)
    file = rundirs.derived(tmp_path / "super", rundirs.units("1100 1000", "10"), "super", "mnli")
    for seed in GOOD:
        rundirs.given(tmp_path, "mnli", seed, file, 0.4, "score")
    return tmp_path


# ---- rows ----


def test_rows_say_how_a_ticket_was_derived_and_whether_it_was_trained_again(whole):
    assert rows(whole) == {
        FULL,
        "importance ticket, pruned",
        "importance ticket",
        "importance random ticket, pruned",
        "importance random ticket",
        "importance bad ticket, pruned",
        "importance bad ticket",
        "importance super ticket, pruned",
    }


def test_other_units_and_binomial_sizes_are_rows_of_their_own(tmp_path):
    heads = rundirs.units("1100 1100")
    rundirs.search(tmp_path, "mnli", 1, heads, [0.8, 0.7], units="heads")
    rundirs.search(tmp_path, "mnli", 1, rundirs.units("1111 1111", "11"), [0.8, 0.8])
    for kind, info in (("bad", {}), ("random", {"random_size": "binomial"})):
        for mask in (heads, rundirs.units("1100 1100", "11")):
            file = rundirs.derived(tmp_path / kind / mask.info["units"], mask, kind, "mnli", **info)
            rundirs.given(tmp_path, "mnli", 1, file, 0.6)
    assert rows(tmp_path) == {
        FULL,
        "importance ticket, pruned",  # with nothing pruned, and no second full BERT
        "importance (units heads) ticket, pruned",
        "importance bad ticket",
        "importance bad (units heads) ticket",
        "importance random (random size binomial) ticket",
        "importance random (random size binomial, units heads) ticket",
    }


def test_a_length_of_its_own_is_named_and_scores_have_the_setting_of_the_search(tmp_path):
    mask = rundirs.units(*GOOD[1])
    rundirs.search(tmp_path, "mnli", 1, mask, [0.8, 0.7], epochs=1.0)
    file = rundirs.derived(tmp_path / "bad", mask, "bad", "mnli")
    rundirs.given(tmp_path, "mnli", 1, file, 0.5, "score")
    rundirs.given(tmp_path, "mnli", 1, file, 0.6, epochs=1.0)
    rundirs.given(tmp_path, "mnli", 1, file, 0.7, epochs=6.0)
    levels = comparable(read_results([tmp_path])[0])
    assert set(levels["setting"]) == {"epochs 1.0"}
    values = dict(zip(levels["row"], levels["value"].round(), strict=True))
    assert {row: value for row, value in values.items() if "bad" in row} == {
        "importance bad ticket, pruned": 50,
        "importance bad ticket": 60,
        "importance bad ticket, epochs 6.0": 70,
    }
    rundirs.given(tmp_path, "mnli", 2, file, 0.7, epochs=1.0, lr=1e-4)
    with pytest.raises(UserError, match="have different settings"):
        comparable(read_results([tmp_path])[0])


def test_searches_are_no_trained_tickets_and_other_tables_leave_them_out(whole):
    levels = comparable(read_results([whole])[0])
    assert own_tickets(levels).empty
    tables = {name: build_table(name, levels) for name in TABLES if name not in ("importance", "stability")}
    assert {name for name, table in tables.items() if table} == {"curves"}
    assert set(tables["curves"].cells["row"]) == {FULL}
    rundirs.run(whole, [0.85, 0.8], "mnli", 1)  # IMP beside it
    table = made("2", whole)
    assert set(table.cells["row"]) >= {FULL, "imp ticket"}
    assert not table.cells["row"].str.contains("importance").any()


# ---- the table ----


def test_tickets_are_compared_with_their_controls(whole):
    """By hand: good - random is 76 + s - 60, bad - good is 50 + s^2 - 76 - s, for seeds 1 to 3."""
    table = made("importance", whole)
    difference, verdict = (by_row(table, "Scores by task", column) for column in ("difference", "verdict"))
    assert difference["importance ticket, pruned"] == "+18.0"
    assert difference["importance bad ticket, pruned"] == f"{(-26 - 24 - 20) / 3:.1f}"
    assert difference["importance random ticket, pruned"] == difference[FULL] == ""
    assert (verdict["importance ticket, pruned"], verdict["importance super ticket, pruned"]) == ("above", "no common seed")
    cells = table.cells[(table.cells["task"] == "mnli") & table.cells["p"].notna()]
    assert len(cells) == 4
    assert cells["p_holm"].min() == pytest.approx(4 * cells["p"].min())  # over all comparisons on the task


def test_published_scores_stand_beside_ours(whole):
    beside = by_row(made("importance", whole), "Scores by task", "published")
    assert beside[FULL] == "84.5 ± 0 [json]"
    assert beside["importance ticket, pruned"] == "76.4 ± 0 [json]"
    assert beside["importance random ticket"] == "79.0 ± 8 [json]"
    assert beside["importance bad ticket, pruned"] == "59.8 ± 13 [json]"
    assert beside["importance super ticket, pruned"] == "34.3 ± 1 [json]"


def test_the_mean_over_tasks_is_without_wnli(whole):
    lines = {line["row"]: line for line in grid(made("importance", whole), "Scores")}
    line = lines["importance ticket, pruned"]
    assert (line["mean of 2 tasks"], line["published mean"]) == ("73.0 ± 1.0 (3)", "66.9 [json]")  # 78 and 68
    assert "WNLI" not in line
    assert lines["importance super ticket, pruned"]["mean of 2 tasks"] == ""  # of one task only
    assert {line["task"] for line in grid(made("importance", whole), "WNLI")} == {"WNLI"}


def test_the_overlap_stands_beside_bad_scores(whole):
    """Means over seeds: 2, 4 and 6 heads of 6, 6 and 3 good ones; 1 MLP of 2, 1 and 2."""
    overlap = by_row(made("importance", whole), "Scores by task", "overlap")
    assert overlap["importance bad ticket"] == overlap["importance bad ticket, pruned"] == "4 of 5 heads, 1 of 1.7 MLPs"
    assert overlap["importance ticket, pruned"] == ""


def test_sizes_are_those_of_the_search_and_of_the_super_mask(whole):
    """A head has 70 parameters, an MLP 110; all are 780 + 2 * 8 of the output's biases, and 416 of embeddings and head."""
    found = {(line["task"], line["ticket"]): line for line in grid(made("importance", whole), "Sizes")}
    good, best = found["MNLI", "importance ticket"], found["MNLI", "importance super ticket"]
    assert (good["masks"], good["heads"], good["MLPs"]) == ("3", "5.0 ± 1.7 of 8", "1.7 ± 0.6 of 2")
    assert (best["masks"], best["heads"], best["MLPs"]) == ("1", "3.0 of 8", "1.0 of 2")
    assert best["% of covered"] == f"{100 * (3 * 70 + 110) / 780:.1f}"
    assert best["% of the layers"] == f"{100 * (3 * 70 + 110 + 16) / 796:.1f}"
    kept = (3 * 70 + 110 + 16 + 416) / (796 + 416)
    assert (best["% of all"], best["% of all - 21"]) == (f"{100 * kept:.1f}", f"{100 * kept - 21:.1f}")
    assert (good["published heads/MLPs"], good["published % of all - 21"]) == ("95.0 ± 4.9 / 8.4 ± 0.9 [masks]", "55 ± 5 [pdf]")
    assert best["published heads/MLPs"] == "40 / 4 [masks]"


def test_missing_runs_are_named_with_the_sweep(whole):
    rundirs.search(whole, "rte", 4, rundirs.units(*GOOD[3]), [0.8, 0.7])
    lines = [line for line in made("importance", whole).missing if "no run of RTE" in line]
    (line,) = [line for line in lines if "importance super-bad ticket, pruned" in line]
    assert line.endswith("`TASKS='rte' SEEDS='1 2 3 4' bash scripts/importance.sh`")
    (line,) = [line for line in lines if "importance bad ticket, pruned" in line]
    assert line.endswith("`TASKS='rte' SEEDS='4' bash scripts/importance.sh`")


def test_weights_by_magnitude_are_a_search_too(tmp_path):
    kept = rundirs.Mask({name: rundirs.torch.ones(tensor.shape) > 0 for name, tensor in rundirs.LIKE.items()})
    for seed in (1, 2):
        half = rundirs.Mask({name: tensor & (rundirs.torch.rand(tensor.shape) < 0.5) for name, tensor in kept.items()})
        rundirs.search(tmp_path, "mnli", seed, half, [0.8, 0.7 + seed / 100], method="guarded_magnitude")
        file = rundirs.derived(tmp_path / f"bad_{seed}", half, "bad", "mnli", "guarded_magnitude", overlap={"weights": 100})
        rundirs.given(tmp_path, "mnli", seed, file, 0.4, "score")
    table = made("importance", tmp_path)
    assert by_row(table, "Scores by task", "published")["guarded_magnitude bad ticket, pruned"] == "31.8 ± 0 [json]"
    assert by_row(table, "Scores by task", "overlap")["guarded_magnitude bad ticket, pruned"].startswith("100 of ")
    (line,) = grid(table, "Sizes")
    assert (line["published % of covered"], line["published % of all - 21"]) == ("51.3 [nb]", "41 ± 0 [pdf]")
    assert "super" not in csv([table])


def test_methods_are_divided_and_published_rows_found():
    assert search_and_kind("importance bad (random size binomial, units heads)") == ("importance (units heads)", "bad")
    assert search_and_kind("importance (accumulate batch)") == ("importance (accumulate batch)", "good")
    assert published_row("importance (units mlps)", "good", "importance (units mlps) ticket, pruned") == "MLPs only, pruned"
    released = "guarded_magnitude random ticket, batch size 16, epochs 2.0"
    assert published_row("guarded_magnitude", "random", released) == "m random, retrained"
    for row in ("importance random ticket, random weights", "importance bad ticket, epochs 6.0"):
        assert published_row(*search_and_kind(row.partition(" ticket")[0]), row) == ""
    assert (
        published_row("importance (accumulate batch)", "good", "importance (accumulate batch) ticket")
        not in (published.DATA["bertplays"]["mean"])
    )


def test_no_search_no_table(tmp_path):
    rundirs.run(tmp_path, [0.8, 0.7], "mnli", 1)
    assert made("importance", tmp_path) is None
    assert made("stability", tmp_path) is None
