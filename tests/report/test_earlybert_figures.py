"""The figures of EarlyBERT: distances between the masks of a search, and scores over the time saved."""

from pathlib import Path

import figures
import numpy as np
import pytest
import rundirs

from bert_tickets.errors import Damaged, UserError
from bert_tickets.report import earlybert_figures
from bert_tickets.report.earlybert_figures import distances, settled, thinned

HEADS, NEURONS = rundirs.LAYERS * rundirs.HEADS, rundirs.LAYERS * rundirs.NEURONS


@pytest.fixture
def plot(tmp_path, capsys, monkeypatch):
    """Run scripts/figures.py in this process; the lines of tables that it prints, and the panels or points that it draws."""
    seen = []
    for name in ("draw_maps", "draw_points"):
        draw = getattr(earlybert_figures, name)
        monkeypatch.setattr(earlybert_figures, name, lambda *a, draw=draw: (seen.append(a[2]), draw(*a)))

    def run(*words: object) -> tuple[list[dict[str, str]], list]:
        seen.clear()
        figures.main(figures.parse([*map(str, words), "--output", str(tmp_path / "f.svg")]))
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        names, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed]
        return [dict(zip(names, line, strict=True)) for line in lines], seen[0]

    return run


def lacks(picture: Path, *words: str) -> list[str]:
    text = picture.read_text()
    return [word for word in words if f">{word}<" not in text]


# ---- distances ----


def record(folder: Path, steps: list[tuple[int, int]]) -> None:
    """Write a record: at each step one head of each layer has the smallest coefficient, and those of neurons rise from one on."""
    rows = np.ones((len(steps), HEADS + NEURONS), np.float32)
    for row, (head, neuron) in zip(rows, steps, strict=True):
        row[head : HEADS : rundirs.HEADS] = 0.5
        row[HEADS:] = np.roll(np.linspace(0, 1, NEURONS), neuron)
    np.save(folder / "level_00" / "coefficients.npy", rows)


def test_masks_are_compared_at_all_pairs_of_steps(plot, tmp_path):
    """Of 8 heads 2 go, and of 12 neurons 5: another head is a distance of 4 / 8, a shift by one neuron one of 2 / 12."""
    run = rundirs.early(tmp_path, "rte", 3, 0.7, heads="1/4", whole_search=True)
    record(run, [(0, 0), (0, 3), (1, 2), (1, 2), (1, 2)])
    (line,), panels = plot("distances", tmp_path)
    assert line == {
        "task": "RTE",
        "row": "early_bird (heads 0.25, whole search True) ticket",
        "seed": "3",
        "steps": "5",
        "heads within 0.1 of the last mask from step": "3",
        "neurons within 0.1 of the last mask from step": "3",
        "rule fires: heads": "20",
        "rule fires: neurons": "10",
        "both": "20",
        "drawn at": "30",
    }
    (heads, _, of_heads, marks), (neurons, at, of_neurons, _) = panels
    assert (heads, neurons) == ("RTE, seed 3: heads", "RTE, seed 3: neurons")
    assert marks == {"the rule fires": 20, "drawn": 30}
    assert at.tolist() == [1, 2, 3, 4, 5]
    assert (of_heads == of_heads.T).all()
    assert of_heads[0].tolist() == pytest.approx([0, 0, 0.5, 0.5, 0.5])
    assert of_neurons[0].tolist() == pytest.approx([0, 6 / 12, 4 / 12, 4 / 12, 4 / 12])
    assert of_neurons[1, 2] == pytest.approx(2 / 12)
    assert lacks(tmp_path / "f.svg", heads, neurons, "step", "normalized Hamming distance", "the rule fires", "drawn") == []


def test_the_rule_of_the_run_draws(plot, tmp_path):
    """The first four neurons go, then those of the other layer; by layer the first two of each, twice."""
    for more in ({}, {"neuron_scope": "layer"}):
        run = rundirs.early(tmp_path / str(len(more)), "rte", 1, 0.7, neurons=1 / 3, **more)
        record(run, [(0, 0), (0, 6), (0, 3)])
    _, (_, (*_, of_all, _)) = plot("distances", tmp_path / "0")
    _, (_, (*_, by_layer, _)) = plot("distances", tmp_path / "1")
    assert of_all[0, 1] == pytest.approx(8 / 12)
    assert by_layer[0, 1] == 0


def test_the_longest_search_of_a_task_is_drawn_and_all_are_in_the_table(plot, tmp_path):
    record(rundirs.early(tmp_path, "rte", 1, 0.7), [(0, 0)] * 3)
    record(rundirs.early(tmp_path, "rte", 2, 0.7, whole_search=True), [(0, 0)] * 9)
    record(rundirs.early(tmp_path, "mnli", 2, 0.7), [(0, 0)] * 3)
    record(rundirs.early(tmp_path, "mnli", 1, 0.7), [(0, 0)] * 3)
    rundirs.early(tmp_path, "mnli", 1, 0.7, ticket="random")
    record(rundirs.early(tmp_path, "qnli", 1, 0.7), [(0, 0)])
    lines, panels = plot("distances", tmp_path)
    assert sorted((line["task"], line["steps"]) for line in lines) == [("MNLI", "3"), ("MNLI", "3"), ("RTE", "3"), ("RTE", "9")]
    assert [panel[0] for panel in panels] == [
        f"{task}: {kind}" for task in ("MNLI, seed 1", "RTE, seed 2") for kind in ("heads", "neurons")
    ]


def test_a_rule_that_never_fires_is_not_marked(plot, tmp_path):
    draw = {"step": 2, "fired": None, "heads_fired": None, "neurons_fired": 1}
    record(rundirs.early(tmp_path, "rte", 1, 0.7, draw=draw), [(0, 0)] * 3)
    (line,), panels = plot("distances", tmp_path)
    assert (line["rule fires: heads"], line["rule fires: neurons"], line["both"]) == ("never", "1", "never")
    assert [panel[3] for panel in panels] == [{"drawn": 2}, {"the rule fires": 1, "drawn": 2}]


def test_distances_need_a_record_of_the_networks_size(plot, tmp_path):
    run = rundirs.early(tmp_path, "rte", 1, 0.7)
    with pytest.raises(UserError, match="no finished run of --method early-bird has a record of two steps"):
        plot("distances", tmp_path)
    np.save(run / "level_00" / "coefficients.npy", np.ones((3, HEADS), np.float32))
    with pytest.raises(Damaged, match=r"has the shape \(3, 8\), for 8 heads and 12 neurons"):
        plot("distances", tmp_path)


def test_steps_are_thinned_with_both_ends():
    assert thinned(4).tolist() == [0, 1, 2, 3]
    many = thinned(2001)
    assert (len(many), many[0], many[-1]) == (earlybert_figures.STEPS, 0, 2000)
    assert set(np.diff(many)) <= {13, 14}


def test_a_search_has_settled_when_it_stays_near_its_last_mask():
    masks = np.ones((6, 20), bool)
    masks[1, :2] = masks[4, :2] = False  # 0.1
    assert settled(masks) == 1
    masks[2, :3] = False  # 0.15, after a step that was near
    assert settled(masks) == 4
    masks[4, :3] = False
    assert settled(masks) == 6
    assert distances(masks)[2, 4] == 0


# ---- scores over time ----


def test_scores_stand_over_the_time_saved(plot, tmp_path):
    for seed in (1, 2):
        rundirs.dense(tmp_path, "rte", seed, 0.8, 100.0 * seed)
        rundirs.early(tmp_path, "rte", seed, 0.7 + seed / 100, (10.0, 40.0))
    rundirs.early(tmp_path, "rte", 1, 0.69, (10.0, 30.0), (2, 6), heads="1/2", neurons=0.5)
    rundirs.early(tmp_path, "rte", 1, 0.6, (0.0, 30.0), ticket="random")
    rundirs.early(tmp_path, "rte", 1, 0.75, (10.0, 50.0), (1, 0), neurons=0.0)
    rundirs.early(tmp_path, "rte", 1, 0.5, lambda_heads=1e-3)
    rundirs.early(tmp_path, "mnli", 1, 0.5)  # without a full BERT
    lines, points = plot("tradeoff", tmp_path)
    drawn = {(p["line"], round(p["x"], 6), round(p["y"], 6)) for p in points.to_dict("records")}
    assert drawn == {
        ("full BERT", 0.0, 80.0),
        ("EarlyBERT, 42 % of the neurons gone", (50 + 75) / 2, 71.5),
        ("EarlyBERT, 50 % of the neurons gone", 60.0, 69.0),
        ("EarlyBERT, heads only", 40.0, 75.0),
        ("random", 70.0, 60.0),
    }
    assert {line["row"]: line["time saved"] for line in lines}["early_bird ticket"] == "62.5 %"
    assert lacks(tmp_path / "f.svg", "RTE", "accuracy (%)", "time saved (%)", "means of 1 to 2 seeds") == []


def test_of_many_sparsities_the_legend_names_the_range(plot, tmp_path):
    rundirs.dense(tmp_path, "rte", 1, 0.8)
    for neurons in range(1, 9):
        rundirs.early(tmp_path, "rte", 1, 0.7, gone=(1, neurons), neurons=neurons / 12)
    plot("tradeoff", tmp_path)
    assert lacks(tmp_path / "f.svg", "sparsity 0 % to 36.1 %") == []


def test_seconds_of_other_machines_are_said_in_the_picture_and_below_it(tmp_path, capsys):
    rundirs.dense(tmp_path, "rte", 1, 0.8)
    rundirs.timed(rundirs.early(tmp_path, "rte", 1, 0.7), 10.0, 50.0, host="there")
    figures.main(figures.parse(["tradeoff", str(tmp_path), "--output", str(tmp_path / "f.svg")]))
    assert "RTE: runs of EarlyBERT and of the full BERT differ in host" in capsys.readouterr().out
    assert lacks(tmp_path / "f.svg", "one seed; with seconds that are not comparable") == []


def test_without_a_full_bert_there_is_no_trade_off(plot, tmp_path):
    rundirs.early(tmp_path, "rte", 1, 0.7)
    with pytest.raises(UserError, match="no run of --method early-bird stands beside a full BERT"):
        plot("tradeoff", tmp_path)
    rundirs.run(tmp_path / "imp", [0.8, 0.7], "rte", 1)
    with pytest.raises(UserError, match="no finished run of --method early-bird on a task other than MLM"):
        plot("tradeoff", tmp_path / "imp")
