"""The figures of mask training: distances from initial masks over steps, and scores of tickets over their losses."""

from pathlib import Path

import figures
import pytest
import rundirs
from test_tamt import FIVE, IMP, score, search

from bert_tickets.errors import UserError
from bert_tickets.files import read_checksummed, write_checksummed
from bert_tickets.report import tamt_figures


@pytest.fixture
def plot(tmp_path, capsys, monkeypatch):
    """Run scripts/figures.py in this process; the lines of tables that it prints, and the points that it draws."""
    seen = []
    for name, place in (("draw_lines", 3), ("draw_points", 2)):
        draw = getattr(tamt_figures, name)
        monkeypatch.setattr(tamt_figures, name, lambda *a, draw=draw, at=place: (seen.append(a[at]), draw(*a)))

    def run(*words: object) -> tuple[list[list[str]], list[dict]]:
        seen.clear()
        figures.main(figures.parse([*map(str, words), "--output", str(tmp_path / "f.svg")]))
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed], seen[0].to_dict("records")

    return run


def lacks(picture: Path, *words: str) -> list[str]:
    text = picture.read_text()
    return [word for word in words if f">{word}<" not in text]


# ---- distance ----


def moves(
    place: Path, distances: dict[int, float], objective: str = "mlm", sparsity: float = 0.7, seed: int = 1, **given
) -> None:
    """A finished run of mask training with these distances at its refreshes."""
    ticket, _ = search(place, objective, sparsity, seed, **given)
    line = read_checksummed(ticket.parent / "metrics.json")
    refreshes = [{"step": step, "from_start": value, "sparsity": sparsity} for step, value in distances.items()]
    write_checksummed(ticket.parent / "metrics.json", line | {"refreshes": refreshes})


def test_distances_are_means_over_seeds_at_each_refresh(plot, tmp_path):
    rundirs.run(tmp_path, [0.5, 0.4], "mlm", 1, max_steps=200, **IMP)  # has no refreshes
    moves(tmp_path, {1000: 0.01, 2000: 0.02, 10000: 0.04}, seed=1)
    moves(tmp_path, {1000: 0.03, 2000: 0.04, 10000: 0.04}, seed=2)
    moves(tmp_path, {999: 0.05}, "kd")
    rundirs.run(tmp_path, [0.5], "sst2", 1, mask=search(tmp_path, sparsity=0.8)[0])
    moves(tmp_path, {1000: 0.06}, sparsity=0.8)
    moves(tmp_path, {1000: 0.07}, sparsity=0.5)
    table, points = plot("distance", tmp_path)
    kd, mlm = "mask_training (objective kd) ticket", "mask_training ticket"
    assert table == [
        ["sparsity", "step", kd, mlm],
        ["50 %", "1000", "", "7.00 (1)"],
        ["70 %", "999", "5.00 (1)", ""],
        ["70 %", "1000", "", "2.00 ± 1.41 (2)"],
        ["70 %", "2000", "", "3.00 ± 1.41 (2)"],
        ["70 %", "10000", "", "4.00 ± 0.00 (2)"],
        ["80 %", "1000", "", "6.00 (1)"],
    ]
    assert [(p["panel"], p["line"], p["x"], round(p["mean"], 9)) for p in points[:3]] == [
        ("50 %", mlm, 1000, 7.0),
        ("70 %", kd, 999, 5.0),
        ("70 %", mlm, 1000, 2.0),
    ]
    labels = ["50 %", "70 %", "step", "Hamming distance (%)", kd, mlm, "mean ± standard deviation of 1 to 2 seeds"]
    assert lacks(tmp_path / "f.svg", *labels) == []


def test_searches_with_several_settings_are_lines_of_their_own(plot, tmp_path):
    moves(tmp_path, {1000: 0.01})
    moves(tmp_path, {1000: 0.09}, lr=1e-4)
    moves(tmp_path, {1000: 0.5}, mask_init="random", seed=2)
    (names, found), _ = plot("distance", tmp_path)
    assert dict(zip(names, found, strict=True)) == {
        "sparsity": "70 %",
        "step": "1000",
        "mask_training ticket": "1.00 (1)",
        "mask_training ticket, lr 0.0001": "9.00 (1)",
        "mask_training (mask init random) ticket": "50.00 (1)",
    }


def test_without_mask_training_there_is_no_distance(plot, tmp_path):
    rundirs.run(tmp_path, [0.5, 0.4], "mlm", 1)
    with pytest.raises(UserError, match="no finished run of --method mask-training"):
        plot("distance", tmp_path)


# ---- losses ----

MLM, KD, RANDOM = "mask_training ticket of MLM", "mask_training (objective kd) ticket of MLM", "random pruning"


def trained(place: Path, mask: Path, scores: list[float], task: str = "sst2", **more) -> None:
    for i, value in enumerate(scores):
        rundirs.run(place, [value], task, 1 + 10 * i, mask=mask, **more)


@pytest.fixture
def scored(tmp_path) -> Path:
    """Three tickets and a mask of a step, scored and trained twice; one that is only scored, and one that is only trained."""
    ticket, saved = search(tmp_path, "kd")
    drawn = rundirs.oneshot(tmp_path / "random", 0.7)
    for mask, loss, distance, values in (
        (search(tmp_path, sparsity=0.5)[0], 2.0, 0.4, [0.90, 0.70]),
        (ticket, 4.0, 0.1, [0.75, 0.79]),
        (saved, 6.0, 0.2, [0.60, 0.70]),
        (drawn, 8.0, 0.3, [0.50, 0.50]),
    ):
        score(tmp_path, mask, loss, distance)
        trained(tmp_path, mask, values)
    score(tmp_path, search(tmp_path, "mlm+kd")[0], 1.0, 0.9)
    trained(tmp_path, search(tmp_path, sparsity=0.7)[0], [0.99])
    return tmp_path


def test_a_point_is_the_mean_score_of_a_mask_over_its_loss(plot, scored):
    """By hand: means 80, 77, 65, 50 fall with the MLM loss; ranks of the KD loss are 4, 1, 2, 3: 1 - 6 * 8 / 60 = 0.2."""
    table, points = plot("losses", scored)
    assert table[:2] == [["task", "MLM loss", "KD loss"], ["SST-2", "-1.00 (4)", "0.20 (4)"]]
    first = [p for p in points if p["column"] == "MLM loss (cross-entropy)"]
    assert sorted((p["x"], round(p["y"], 9), p["line"], p["sparsity"]) for p in first) == [
        (2.0, 80.0, MLM, 0.5),
        (4.0, 77.0, KD, 0.7),
        (6.0, 65.0, KD, 0.7),
        (8.0, 50.0, RANDOM, 0.7),
    ]
    assert sorted((p["x"], round(p["y"], 9)) for p in points if p not in first) == [
        (0.1, 77.0),
        (0.2, 65.0),
        (0.3, 50.0),
        (0.4, 80.0),
    ]
    lines = {line[0].split(", mask ")[0]: line[1:] for line in table[3:]}
    assert table[2] == ["row", "sparsity", "SST-2", "KD loss", "MLM loss"]
    assert lines["mask_training (objective kd, step 1000) ticket of MLM"] == [
        "70 %",
        "65.0 ± 7.1 (2)",
        "0.200 (1)",
        "6.000 (1, warning)",
    ]
    assert set(lines) == {MLM, KD, RANDOM, "mask_training (objective kd, step 1000) ticket of MLM"}


def test_losses_have_panels_with_units_a_legend_and_marks(plot, scored):
    _, points = plot("losses", scored)
    assert {(p["column"], p["hollow"]) for p in points} == {("MLM loss (cross-entropy)", True), ("KD loss (1 - cosine)", False)}
    labels = [
        "SST-2: ρ = −1.00, n = 4",
        "SST-2: ρ = 0.20, n = 4",
        "accuracy (%)",
        "MLM loss (cross-entropy)",
        "KD loss (1 - cosine)",
    ]
    labels += [MLM, KD, RANDOM, "sparsity 50 %, 70 %", "hollow: a value is undefined or has a warning"]
    assert lacks(scored / "f.svg", *labels) == []
    assert (scored / "f.svg").read_text().count("fill: #ffffff; stroke: #d55e00") == 2  # hollow, of mask_training (kd)


def test_the_mean_of_five_tasks_is_of_tickets_trained_on_all(plot, tmp_path):
    masks = [search(tmp_path, seed=seed)[0] for seed in (1, 2)]
    for seed, mask in enumerate(masks, 1):
        score(tmp_path, mask, float(seed), 0.3, seed)
        for i, task in enumerate(FIVE[: 6 - seed]):
            rundirs.run(tmp_path, [0.5 + 0.1 * i], task, seed, mask=mask)
    table, points = plot("losses", tmp_path)
    found = {line[0]: line[1:] for line in table}
    assert found["five-task mean"] == ["undefined (1)", "undefined (1)"]
    assert found["CoLA"] == ["undefined (2)", "undefined (2)"]  # equal scores have no ranks
    assert [(p["x"], round(p["y"], 9), p["unit"]) for p in points if p["task"] == "five-task mean"] == [
        (1.0, 70.0, "score × 100"),
        (0.3, 70.0, "score × 100"),
    ]


def test_tickets_that_were_only_scored_or_only_trained_are_refused(plot, tmp_path):
    score(tmp_path, search(tmp_path)[0], 2.0, 0.3)
    trained(tmp_path, search(tmp_path, "kd")[0], [0.5])
    with pytest.raises(UserError, match="no ticket was both trained on a task and scored by "):
        plot("losses", tmp_path)
