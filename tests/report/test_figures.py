"""The figures: the tables behind them, what they leave open, and files that depend on nothing but their content."""

import re
import sys
from pathlib import Path

import pytest
import rundirs
from conftest import ROOT

from bert_tickets.errors import UserError


@pytest.fixture
def draw(monkeypatch, tmp_path, capsys):
    """Run scripts/figures.py in this process; what it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import figures

    def run(*words: object, output: str = "f.svg") -> str:
        figures.main(figures.parse([*map(str, words), "--output", str(tmp_path / output)]))
        return capsys.readouterr().out

    return run


def rows(out: str) -> dict[str, list[str]]:
    """The lines of printed tables by their first word; cells are apart by two spaces at least."""
    lines = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line.strip())
    return {line[0]: line[1:] for line in lines}


# ---- metric over sparsity ----


def test_curves_pool_nothing_but_seeds(draw, tmp_path):
    for seed, values in ((1, [0.6, 0.5]), (2, [0.8, 0.7])):
        rundirs.run(tmp_path, values, seed=seed)
    rundirs.run(tmp_path, [0.3, 0.1], seed=1, init="random")
    rundirs.run(tmp_path, [0.4], seed=1, protocol="released")
    rundirs.run(tmp_path, [0.9, 0.8], seed=1, rewind="5%")
    rundirs.run(tmp_path, [0.7, 0.2], seed=1, rewind="none")
    found = rows(draw("curves", tmp_path))
    names = found["removed"]
    at = {level: dict(zip(names, found[level], strict=True)) for level in ("0 %", "10 %")}
    assert at["0 %"].pop("IMP, protocol paper") == "70.00 ± 14.14 (n=2)"
    assert at["10 %"].pop("IMP, protocol paper") == "60.00 ± 14.14 (n=2)"
    assert at["10 %"] == {
        "IMP, random weights, protocol paper": "10.00",
        "IMP, protocol released": "-",
        "IMP rewound to 5 %, protocol paper": "80.00",
        "standard pruning, protocol paper": "20.00",
    }


def test_a_doubted_or_undefined_value_is_marked_in_the_table_and_the_picture(draw, tmp_path):
    rundirs.run(tmp_path, [0.6, 0.5, 0.4], task="stsb", seed=1)
    rundirs.run(tmp_path, [0.8, None, 0.2], task="stsb", seed=2, warnings=["all predictions are 2.5"])
    out = draw("curves", tmp_path)
    found = rows(out)
    assert [found[level] for level in ("0 %", "10 %", "20 %")] == [["70.00 ± 14.14 (n=2)"], ["50.00*"], ["30.00 ± 14.14 (n=2)*"]]
    assert "1 value(s) are undefined" in out
    assert re.search(r"^\* .*stsb-imp-s2-.*, level 2: all predictions are 2.5$", out, re.MULTILINE)
    assert "hollow: a value is undefined or doubted" in (tmp_path / "f.svg").read_text()
    rundirs.run(tmp_path / "sound", [0.6, 0.5], task="stsb", seed=1)
    assert "*" not in draw("curves", tmp_path / "sound")
    assert "hollow" not in (tmp_path / "f.svg").read_text()


def test_a_doubted_value_is_marked_where_tickets_are_transferred(draw, tmp_path):
    own = rundirs.run(tmp_path, [0.8, 0.7])
    other = rundirs.run(tmp_path, [0.6, 0.5], task="mnli")
    rundirs.run(tmp_path, [0.5], mask=rundirs.mask_of(other, 1), warnings=["all predictions are positive"])
    rundirs.run(tmp_path, [0.4], task="mnli", mask=rundirs.mask_of(own, 1))
    found = rows(draw("transfer", tmp_path, "--sparsity", "10"))
    assert found["SST-2"][:2] == ["-20.00", "-10.00"]
    assert found["MNLI"][:2] == ["-10.00", "-30.00*"]
    assert "* a value is undefined or doubted" in (tmp_path / "f.svg").read_text()


def test_given_tickets_are_lines_of_their_own(draw, tmp_path):
    own = rundirs.run(tmp_path, [0.8, 0.7])
    other = rundirs.run(tmp_path, [0.8, 0.7], task="mnli")
    for mask in (rundirs.mask_of(own, 1), rundirs.mask_of(other, 1), rundirs.oneshot(tmp_path / "r", 0.1)):
        rundirs.run(tmp_path, [0.5], mask=mask)
    found = draw("curves", *(path for path in tmp_path.iterdir() if path.is_dir() and "sst2" in path.name))
    assert set(rows(found)["removed"]) == {"IMP", "IMP ticket, given", "MNLI ticket", "random pruning"}


def test_undefined_values_are_counted_not_hidden(draw, tmp_path):
    rundirs.run(tmp_path, [0.6, None])
    out = draw("curves", tmp_path)
    assert "1 value(s) are undefined" in out
    assert "10 %" not in out


def test_runs_that_came_to_no_result_are_named(draw, tmp_path):
    rundirs.run(tmp_path, [0.6, 0.7])
    folder = rundirs.run(tmp_path, [], "rte", levels=3)
    rundirs.fail(folder, 0, "the loss became nan by step 40")
    assert f"not drawn: {folder}: its level 0 came to no result: the loss became nan by step 40" in draw("curves", tmp_path)


def test_tasks_have_a_panel_each_with_its_unit(draw, tmp_path):
    for task in ("cola", "sst2", "squad", "mnli"):
        rundirs.run(tmp_path, [0.6, 0.5], task=task)
    out = draw("curves", tmp_path, "--title", "All of them")
    order = [out.index(name) for name in ("MNLI, accuracy (%)", "SST-2, accuracy (%)", "CoLA, Matthews", "SQuAD, F1 (%)")]
    assert order == sorted(order)
    text = (tmp_path / "f.svg").read_text()
    for words in ("All of them", "weights removed (%)", "accuracy (%)", "F1 (%)", "one seed each", "dense network"):
        assert f">{words}<" in text, words


# ---- transfer ----


@pytest.fixture
def grid(tmp_path) -> Path:
    """Two tasks, two seeds, and of their tickets at 10 % all but one trained on the other task."""
    for seed in (1, 2):
        runs = {task: rundirs.run(tmp_path, [0.80, 0.79], task=task, seed=seed) for task in ("sst2", "qqp")}
        rundirs.run(tmp_path, [0.70 + 0.02 * seed], task="sst2", seed=seed, mask=rundirs.mask_of(runs["qqp"], 1))
        rundirs.run(tmp_path, [0.79], task="qqp", seed=seed, mask=rundirs.oneshot(tmp_path / "one", 0.1, "magnitude"))
    return tmp_path


def test_transfer_is_relative_to_the_targets_dense_network(draw, grid):
    out = draw("transfer", grid, "--sparsity", "10")
    found = rows(out)
    assert found["QQP"] == ["-1.00 ± 0.00 (n=2)", "-7.00 ± 1.41 (n=2)", "0 of 1"]  # trained on QQP, on SST-2; of other tasks
    assert found["SST-2"] == ["-", "-1.00 ± 0.00 (n=2)", "0 of 0"]
    assert found["one-shot"] == ["-1.00 ± 0.00 (n=2)", "-", "1 of 1"]
    text = (grid / "f.svg").read_text()
    assert text.count(">no run<") == 2
    for words in ("trained on", "ticket of", "−7.0", "points above the dense network"):
        assert f">{words}" in text, words


def test_transfer_can_be_relative_to_the_same_task_ticket(draw, grid):
    found = rows(draw("transfer", grid, "--sparsity", "10", "--relative", "same-task"))
    assert found["QQP"] == ["+0.00 ± 0.00 (n=2)", "-6.00 ± 1.41 (n=2)", "0 of 1"]


def test_a_sparsity_without_a_ticket_names_those_there_are(draw, grid):
    with pytest.raises(UserError, match="no IMP ticket at --sparsity 70: these runs have 0, 10"):
        draw("transfer", grid, "--sparsity", "70")


def test_tickets_found_in_two_ways_are_not_one(draw, grid):
    rundirs.run(grid, [0.8, 0.7], task="qqp", seed=1, scope="tensor")
    with pytest.raises(UserError, match="tickets of qqp were found in 2 ways"):
        draw("transfer", grid, "--sparsity", "10")


# ---- masks ----


def test_overlap_is_of_tasks_with_one_seed_and_of_seeds_of_one_task(draw, grid):
    out = draw("overlap", grid, "--sparsity", "10")
    lines = [line.split() for line in out.splitlines() if line.split()[:1] in (["QQP"], ["SST-2"])]
    assert [line[:2] for line in lines] == [["QQP", "QQP"], ["QQP", "SST-2"], ["SST-2", "SST-2"]]
    assert all(0.7 < float(line[2]) < 0.9 for line in lines)  # 0.818 by chance
    assert "0.8182" in lines[0][3]
    assert ">diagonal" in (grid / "f.svg").read_text() or "diagonal: two seeds of a task" in (grid / "f.svg").read_text()


def test_one_ticket_overlaps_with_nothing(draw, tmp_path):
    rundirs.run(tmp_path, [0.8, 0.7])
    with pytest.raises(UserError, match="a ticket overlaps with another"):
        draw("overlap", tmp_path, "--sparsity", "10")


def test_densities_are_the_shares_kept(draw, grid):
    out = draw("densities", grid, "--sparsity", "10")
    assert out.count("90.00 ± 0.00 (n=2)") == 2 * 4  # each task: its one tensor, its layer, its kind, all
    assert ">weights kept (%)<" in (grid / "f.svg").read_text()


# ---- files ----


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("figure", [["curves"], ["transfer", "--sparsity", "10"]], ids=lambda words: words[0])
def test_equal_content_is_equal_bytes(draw, grid, figure, suffix):
    for name in ("a", "b"):
        draw(figure[0], grid, *figure[1:], output=name + suffix)
    assert (grid / f"a{suffix}").read_bytes() == (grid / f"b{suffix}").read_bytes()
    assert len((grid / f"a{suffix}").read_bytes()) > 2000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["curves", "runs", "--output", "f.jpg"], "f.jpg: a picture is .png, .svg or .pdf"),
        (["transfer", "runs", "--output", "f.png"], "--sparsity"),
        (["pie", "runs", "--output", "f.png"], "invalid choice: 'pie'"),
        (["curves", "runs"], "--output"),
    ],
)
def test_a_users_mistake_is_a_sentence(draw, words, said, capsys):
    with pytest.raises(SystemExit) as end:
        sys.modules["figures"].parse(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_run_it_says_so(draw, tmp_path):
    with pytest.raises(UserError, match="no run directory in"):
        draw("curves", tmp_path)
    assert not (tmp_path / "f.svg").exists()
